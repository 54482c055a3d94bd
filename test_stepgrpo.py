# SPDX-License-Identifier: MIT
"""Tests of stepgrpo.py, data/shapes.py and data/key_steps.py: pytest, CPU, no network, no download.

    python -m pytest -q test_stepgrpo.py

A test is named after the trap it guards. Reference tests compare with a naive version written beside them. Where CUDA
is present, the tests of sections 4 and 5 run on it, in float32. Nothing is written into the repository.
"""
import ast
import contextlib
import doctest
import importlib.util
import inspect
import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter, deque
from copy import deepcopy
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"               # before transformers is imported: no test may reach for the Hub

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

import stepgrpo as sg

HERE = Path(__file__).resolve().parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOSE = 1e-5 if DEVICE == "cpu" else 1e-4        # what two orders of summation may differ by in float32
FAMILIES = ("qwen2_vl", "qwen2_5_vl")
torch.set_num_threads(1)                         # these models are too small for two
torch.backends.cudnn.allow_tf32 = False          # else a GPU rounds the patch embedding to 10 bits


def load_script(name):
    """data/<name>.py as a module."""
    spec = importlib.util.spec_from_file_location(name, HERE / "data" / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)      # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


ks, shapes = load_script("key_steps"), load_script("shapes")


# ─── 1. A checkpoint in the layout that was published in 2024 ─────────────────────────────────────────────────────────

PUBLISHED_SPECIAL = [f"<|{name}|>" for name in (
    "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end "
    "vision_start vision_end vision_pad image_pad video_pad").split()]
PUBLISHED_PLAIN = ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
         "<|repo_name|>", "<|file_sep|>"]  # Qwen2.5-VL only; not special, so `skip_special_tokens` keeps them
PUBLISHED_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
PUBLISHED_TEXT = [
    "### Image Description: The image shows a triangle.", "### Rationales: The question asks for the area.",
    "### Let's think step by step.\n### Step 1: The base is 6.\n### Step 2: The area is 6 * 4 / 2 = 12.",
    "### The final answer is: 12", "system\nYou are a helpful assistant.", "user\nassistant\n"] * 4
PUBLISHED_CHAT = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def write_published_checkpoint(folder, family):
    """Write a checkpoint with small random weights; `family` is 'qwen2_vl' or 'qwen2_5_vl'. Return the folder."""
    folder, old = Path(folder), family == "qwen2_vl"
    folder.mkdir(parents=True, exist_ok=True)

    def dump(name, content):
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PUBLISHED_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.train_from_iterator(PUBLISHED_TEXT, trainers.BpeTrainer(
        vocab_size=380, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    tokenizer.model.save(str(folder))  # vocab.json and merges.txt, without the special tokens
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in PUBLISHED_SPECIAL])
    tokenizer.add_tokens([] if old else [AddedToken(token, normalized=False) for token in PUBLISHED_PLAIN])
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {token[2:-2]: tokenizer.token_to_id(token) for token in PUBLISHED_SPECIAL}
    dump("tokenizer_config.json", {
        "add_prefix_space": False, "additional_special_tokens": PUBLISHED_SPECIAL[1:], "bos_token": None,
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(token)): dict.fromkeys(["lstrip", "normalized", "rstrip", "single_word"], False)
            | {"content": token, "special": token in PUBLISHED_SPECIAL}
            for token in PUBLISHED_SPECIAL + ([] if old else PUBLISHED_PLAIN)},
        "chat_template": PUBLISHED_CHAT, "clean_up_tokenization_spaces": False, "eos_token": "<|im_end|>",
        "errors": "replace", "model_max_length": 32768 if old else 131072, "pad_token": "<|endoftext|>",
        "split_special_tokens": False, "tokenizer_class": "Qwen2Tokenizer", "unk_token": None}
        | ({"padding_side": "left"} if old else {"add_bos_token": False}))
    dump("chat_template.json", {"chat_template": PUBLISHED_CHAT})
    dump("preprocessor_config.json", {
        "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor" if old else "Qwen2_5_VLProcessor"})
    dump("generation_config.json", {
        "bos_token_id": ids["endoftext"], "pad_token_id": ids["endoftext"], "do_sample": True,
        "eos_token_id": [ids["im_end"], ids["endoftext"]], "repetition_penalty": 1.05,
        "temperature": 0.01 if old else 0.1, "top_p": 0.001, "top_k": 1, "transformers_version": "4.37.0"})

    vision = {"depth": 2, "num_heads": 4, "in_chans": 3, "patch_size": 14, "spatial_merge_size": 2,
              "spatial_patch_size": 14, "temporal_patch_size": 2}
    vision |= {"embed_dim": 32, "mlp_ratio": 4, "hidden_size": 64} if old else {
        "hidden_act": "silu", "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "window_size": 112,
        "fullatt_block_indexes": [1], "tokens_per_second": 2}
    config = {
        "architectures": ["Qwen2VLForConditionalGeneration" if old else "Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0, "bos_token_id": ids["endoftext"], "eos_token_id": ids["im_end"],
        "vision_start_token_id": ids["vision_start"], "vision_end_token_id": ids["vision_end"],
        "vision_token_id": ids["vision_pad"], "image_token_id": ids["image_pad"], "video_token_id": ids["video_pad"],
        "hidden_act": "silu", "hidden_size": 64, "initializer_range": 0.02, "intermediate_size": 96,
        "max_position_embeddings": 32768 if old else 128000, "max_window_layers": 2, "model_type": family,
        "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2", "use_cache": True, "use_sliding_window": False, "vision_config": vision,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "vocab_size": tokenizer.get_vocab_size() + 6}  # more rows than tokens, as published
    dump("config.json", config)

    shards, generator = {1: {}, 2: {}}, torch.Generator().manual_seed(0)
    with torch.random.fork_rng():  # building a model draws random numbers: leave the caller's stream alone
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    for name, value in model.state_dict().items():
        if name != "lm_head.weight":  # tied, hence not published
            noise = torch.randn(value.shape, generator=generator)
            value = noise * value[0].numel() ** -0.5 if value.dim() > 1 else value.float() + 0.1 * noise
            name = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
            shards[2 if name.startswith(("model.layers.1.", "model.norm.")) else 1][name] = value.bfloat16()
    files = {part: f"model-0000{part}-of-00002.safetensors" for part in shards}
    for part, tensors in shards.items():
        save_file(tensors, folder / files[part], metadata={"format": "pt"})
    dump("model.safetensors.index.json", {
        "metadata": {"total_size": sum(2 * t.numel() for shard in shards.values() for t in shard.values())},
        "weight_map": {name: files[part] for part in shards for name in sorted(shards[part])}})
    return folder


# ─── 2. Template, answers, key steps, rewards ─────────────────────────────────────────────────────────────────────────

BUDGET_S = 0.05


def a_path(description="A triangle.", rationale="Use the angle sum.", steps=("x = 3", "y = 4"), answer="4"):
    numbered = "\n\n".join(f"### Step {i}:\n{step}" for i, step in enumerate(steps, 1))
    return (f"### Image Description:\n{description}\n\n### Rationales:\n{rationale}\n\n"
            f"### Let's think step by step.\n\n{numbered}\n\n### The final answer is: {answer}")


# -- template and segmentation

def test_instruction_keeps_braces_of_the_question_and_the_space_after_the_last_header():
    text = sg.build_instruction(r"What is \frac{1}{2} of {question}?")
    assert text.endswith("### The final answer is: \n\n" + r"What is \frac{1}{2} of {question}?")
    assert text.startswith("Generate an image description") and text.count("###") == 7
    assert "'The final answer is: xxx.\n" in text


def test_split_path_of_the_template():
    assert sg.split_path("hello\n" + a_path()) == sg.Sections(
        "A triangle.", "Use the angle sum.", ["x = 3", "y = 4"], "4",
        ["description", "rationale", "reasoning", "step 1", "step 2", "answer"],
    )


@pytest.mark.parametrize("line, order", [
    ("### Image Description: a", ["description"]),
    ("#IMAGE  description a", ["description"]),
    ("  #####  **Rationales:** a", ["rationale"]),
    ("### Rationale:\na", ["rationale"]),
    ("### Let’s think step by step.\na", ["reasoning"]),
    ("### let's think STEP by step", ["reasoning"]),
    ("### **Step 12**: a", ["step 12"]),
    ("###step 3 a", ["step 3"]),
    ("### The final answer is a", ["answer"]),
    ("the FINAL answer is: a", ["answer"]),
    ("**The final answer is:** a", ["answer"]),
    ("**The final answer is** a", ["answer"]),
    ("The final answer is found by adding.", []),  # a sentence
    ("So the final answer is: 4", []),  # not at the start of a line
    ("see ### Step 1: a", []),
    ("Step 1: a", []),
    ("### Step 1.5 a", ["step 1"]),
    ("### Step one", []),
    ("### Steps", []),
    ("### Something else", []),
    ("### Step 123456: a", []),
    ("\r\n### Step 2:\r\na\r\n", ["step 2"]),
])
def test_header_variants(line, order):
    assert sg.split_path(line).order == order


def test_absent_is_none_and_empty_is_empty():
    assert sg.split_path("") == sg.Sections(None, None, [], None, [])
    assert sg.split_path("### Rationales:\n\n### Step 1:\n### The final answer is:") == sg.Sections(
        None, "", [""], "", ["rationale", "step 1", "answer"])


def test_foreign_header_ends_the_section_and_owns_its_text():
    parts = sg.split_path("### Step 1:\na\n### Note:\nb\n### The final answer is: 4\n### Check\n5")
    assert parts.steps == ["a"] and parts.answer == "4" and parts.order == ["step 1", "answer"]


def test_a_number_sign_or_bullet_in_a_step_is_no_header():
    assert sg.split_path("### Step 1:\n# of apples = 5\n* x").steps == ["# of apples = 5\n* x"]


# -- final answer

@pytest.mark.parametrize("answer, expected", [
    ("4", "4"), ("**4**", "4"), ("$4$", "4"), ("4.", "4"), ("\n4\n", "4"), (r"\(4\)", "4"), (r"\[ 4 \]", "4"),
    (r"$\boxed{4}$.", "4"), (r"\(\boxed{\text{(A)}}.\)", "(A)"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    ('"Yes."', "Yes"), ("'B'", "B"), ("`D`", "D"), (".57", ".57"),
    ("", None), (" ", None), ("**", None), (".", None), ("$$", None), (r"\boxed{}", None), (r"\text{ }", None),
    ("\n### Check\n4", None), ("\n### Step 3:\n4", None), ("\n###\n4", None),
])
def test_final_answer_decoration_and_null(answer, expected):
    assert sg.final_answer("### The final answer is: " + answer) == expected


def test_last_header_counts_and_a_right_number_in_a_step_does_not():
    assert sg.final_answer("### The final answer is: 3\n### The final answer is: 5") == "5"
    assert sg.final_answer("### The final answer is: 3\n### The final answer is:") is None
    assert sg.final_answer("### Step 1:\nThe answer is 4. \\boxed{4}") is None


# -- same answer

SAME = [
    ("C", "(C)"), ("C.", "c"), ("C: 123", "C"), ("C) 123", "C"), ("option C", "C"), ("Option C: 123", "(C) 123"),
    ("123", "C: 123"), ("(b)", "B"), ("C. A careful look shows it", "C"), ("A: 0.5", "A: 1/2"),
    ("5 cm", "5"), ("5cm", "5 cm"), ("5 cm^2", "5 cm²"), (r"5\,\mathrm{cm}^2", "5 cm²"), ("5 m/s", "5"), ("$5", "5"),
    ("5 apples", "5"), ("5 apple", "5 apples"), ("4.4 m", "4.4 metres"), (r"5\text{ cm}", "5"), ("5 °C", "5"),
    ("90°", "90"), (r"90^\circ", "90 degrees"), (r"90^{\circ}", "90°"), ("50%", "50"), ("50%", "0.5"), (r"50\%", "50"),
    ("50 percent", "50%"), ("x = 3", "3"), (r"x=\frac{3}{4}", "0.75"), ("x=3", "X = 3"), ("∠CED = 140°", "140"),
    ("0.5", "1/2"), ("0.5", r"\frac{1}{2}"), (r"\frac12", "0.5"), (r"\dfrac{1}{2}", r"\tfrac{1}{2}"),
    (r"-\frac{1}{2}", "-0.5"), (r"\frac{-1}{2}", "-1/2"), ("3.0", "3"), ("00.57", "0.57"), (".57", "0.57"),
    ("1e3", "1000"), (r"1.35 \times 10^{4}", "13500"), (r"2 \times 10^{-3}", "0.002"), ("1 1/2", "3/2"),
    ("-1 1/2", "-1.5"), (r"2\frac{1}{2}", "2.5"), ("+60", "60"), ("−3", "-3"), ("- 3", "-3"), ("１２", "12"),
    ("1,234", "1234"), ("1{,}234", "1,234"), ("1,234,567.50", "1234567.5"), ("(1, 2)", "(1,2)"), ("Left", "left."),
    ("(100,200)", "(100, 200)"), (r"\left(3, 4\right)", "(3,4)"), (r"2\sqrt{3}", "2√3"), ("sqrt(3)", r"\sqrt3"),
    (r"\pi", "π"), ("pi", "π"), ("10*pi", r"10\pi"), (r"\frac{2\pi}{3}", "2π/3"), (r"\frac{\sqrt{30}}{2}", "√30/2"),
    (r"\boxed{\frac{\sqrt{3}}{2}}", "√3/2"), ("y=-2 x+5", "$y = -2x + 5$"), ("yes", "Yes."),
    ("Saint Bernard", "saint  bernard"), ("Rep/Lean", "Rep / Lean"), ("**Yes**", '"yes"'), ("5 million", "5 Million"),
]
DIFFERENT = [
    ("C", "D"), ("C: 123", "C: 124"), ("C: 123", "D: 123"), ("A dog", "A"), ("A, B", "A"), ("A or C", "A"),
    ("(A) 5 (B) 6", "A"), ("A. x B. y", "A"), ("May", "a"), ("A: C", "C"), ("", ""), (" ", " "), ("", "4"),
    ("$$", "**"),
    ("5 cm", "5 m"), ("5 am", "5 pm"), ("5%", "5 cm"), ("5x", "5"), ("5xy", "5"), ("2π", "2"), ("5 million", "5"),
    ("13²", "13"), ("60 or 61", "60"), ("not 5", "5"), ("5 is wrong", "5"), ("0.333", "1/3"), ("4", "40"), ("1", "12"),
    ("1,2,3", "123"), ("1,2", "12"), ("100,200", "(100,200)"), ("x = 3", "y = 3"), ("y", "y = -3"), ("-3", "3"),
    ("21/2", r"2\frac12"), ("2(3)", "23"), ("1/0", "2/0"), ("1/0", "0"), ("9**9**9", "9"), ("50%", "0.05"),
    ("0.5%", "50"),
    ("1e999999999", "1e999999998"), ("Peru and Chile", "Peru"), ("-2√3", "2√3"), ("Agree", "[Strongly agree, Agree]"),
    ("__import__('os')", "A"), ("5/4", "4/5"), ("left", "right"), (None, "4"), (None, None),
]


@pytest.mark.parametrize("a, b", SAME)
def test_same_answer_true_both_ways(a, b):
    assert sg.same_answer(a, b) and sg.same_answer(b, a), (sg.canonical(a), sg.canonical(b))


@pytest.mark.parametrize("a, b", DIFFERENT)
def test_same_answer_false_both_ways(a, b):
    assert not sg.same_answer(a, b) and not sg.same_answer(b, a)


def test_numbers_agree_with_fractions_on_random_pairs():
    rng = random.Random(0)
    for _ in range(300):
        p, q, r, s = (rng.randint(-12, 12), rng.randint(1, 6), rng.randint(-12, 12), rng.randint(1, 6))
        assert sg.same_answer(rf"\frac{{{p}}}{{{q}}}", f"{r}/{s}") == (p * s == r * q), (p, q, r, s)


# -- key steps

def test_parse_key_steps_accepts_what_users_bring():
    groups = [["x = 3", "3 = x"], ["y"]]
    mixed = [["x = 3", "3 = x"], "y"]
    assert sg.parse_key_steps(mixed) == groups
    assert sg.parse_key_steps({"Steps": mixed, "Image Description": [1]}) == groups
    assert sg.parse_key_steps([{"Steps": mixed}]) == groups


@pytest.mark.parametrize("value, message", [
    ([["a"], ["b"], []], "group 3 is empty"), ([["a"], [5]], "group 2, form 1"),
    ({"Rationales": []}, '"Steps", not None'), ([], r"not \[\]"), ({"Steps": []}, r"not \[\]"),
    ([3], "group 1 is empty or no list: 3"), (None, "not None"), ("x = 3", "not x = 3"),
    ([["a", "$$"]], "group 1, form 2"), ([""], "group 1, form 1"),
])
def test_parse_key_steps_says_what_is_wrong_and_where(value, message):
    with pytest.raises(ValueError, match=message):
        sg.parse_key_steps(value)


MATCH = [
    (r"so \frac{6}{3} = 2.", "6/3=2"), ("6 ÷ 3 = 2", "6/3=2"), ("6 divided by 3 equals 2", r"\frac{6}{3} = 2"),
    ("we get x=3 here", "x = 3"), (r"3 \times 4 = 12", "3*4=12"), ("3 times 4 equals 12", r"3 \cdot 4 = 12"),
    ("3 multiplied by 4 is equal to 12", "3x4=12"), ("7-3=4", "3"), ("7 -3 = 4", "7-3=4"), ("7 - 3 = 4.", "7-3=4"),
    ("7 minus 3 equals 4", "7 - 3 = 4"), ("2 plus 3 equals 5", "2+3=5"), ("is -3", "-3"), ("$x = 3$, so", "x=3"),
    ("- x = 3\n- y = 4", "y=4"), ("- x = 3\n- y = 4", "x=3"), ("- 3 apples", "3"), ("1,300 kg", "1300"),
    ("x = 6/3 = 2", "6/3=2"), ("x = 6/3 = 2", "x = 6/3"), ("x = 3.0", "x = 3"), ("2*x = 8", "2x = 8"),
    (r"\left( 3 + 4 \right) \cdot 2", "(3+4)*2"), (r"\sqrt{16} = 4", "√16=4"), (r"area = \pi r^2", "πr²"),
    ("90 degrees", "90°"), ("**right triangle** here", "right triangle"), ("A Right Triangle.", "right triangle"),
    ("not a right triangle", "not a right triangle"), ("It is not small. A right triangle", "right triangle"),
    ("No, a right triangle", "right triangle"), ("we get x = 3 here", "x = 3."),
    ("not small, but a right triangle", "right triangle"), ("the triangle's area", "triangle"), ("so x = 2 or 3", "3"),
]
MISS = [
    ("13", "3"), ("3.5", "3"), ("1,300", "3"), ("1,300", "300"), ("x = -3", "3"), ("x = - 3", "3"), ("is -3", "3"),
    ("17 - 3 = 4", "7-3=4"), ("7 - 3 = 40", "7-3=4"), ("7-3=4.5", "7-3=4"), ("7-3=4/2", "7-3=4"), ("2x = 3", "x=3"),
    ("5 + x = 3", "x=3"), ("x_3 = 1", "3"), ("H2O", "2"), ("upright triangles", "right triangle"), ("x=4", "x=3"),
    ("not a right triangle", "right triangle"), ("isn't a right triangle", "right triangle"), ("x ≠ 3", "3"),
    ("it isn’t a right triangle", "right triangle"), ("it cannot be a right triangle", "right triangle"),
    ("without a right triangle", "right triangle"), ("a right triangle", "not a right triangle"), ("", "3"),
]


@pytest.mark.parametrize("step, form", MATCH)
def test_key_step_is_found(step, form):
    assert sg.match_key_steps(a_path(steps=[step]), [[form]]) == 1.0, (sg.canonical(step), sg.canonical(form))


@pytest.mark.parametrize("step, form", MISS)
def test_key_step_is_not_found(step, form):
    assert sg.match_key_steps(a_path(steps=[step]), [[form]]) == 0.0, (sg.canonical(step), sg.canonical(form))


def test_only_text_of_the_steps_counts():
    text = a_path("alpha", "beta", ["gamma"], "delta") + "\n### Note\nepsilon"
    key_steps = [["alpha"], ["beta"], ["gamma"], ["delta"], ["epsilon"]]
    assert sg.matched_key_steps(text, key_steps) == [None, None, 0, None, None]


def test_any_form_matches_and_a_group_counts_once():
    assert sg.match_key_steps(a_path(steps=["x = 3", "x = 3"]), [["3 = x", "x = 3"], ["z"]]) == 0.5


def test_dumping_all_key_words_in_one_step_does_not_beat_an_honest_path():
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]
    key_steps = [[word] for word in words]
    honest = sg.match_key_steps(a_path(steps=["alpha beta", "gamma delta", "epsilon zeta"]), key_steps)
    dumped = sg.match_key_steps(a_path(steps=[" ".join(words), "so", "done"]), key_steps)
    assert honest == 1.0 and dumped == pytest.approx(2 / 6)


def test_a_full_step_passes_a_group_on():
    # Greedy would give a and b to step 0 and leave c and d, which only step 0 states, without a home.
    text = a_path(steps=["alpha beta gamma delta", "alpha beta"])
    assert sg.matched_key_steps(text, [["alpha"], ["beta"], ["gamma"], ["delta"]]) == [1, 1, 0, 0]


def test_assignment_is_the_best_of_all_assignments():
    rng = random.Random(1)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta"]
    for _ in range(60):
        count, n_steps = rng.randint(1, 7), rng.randint(1, 3)
        homes = [[s for s in range(n_steps) if rng.random() < 0.5] for _ in range(count)]
        steps = ["so " + " ".join(words[g] for g in range(count) if s in homes[g]) for s in range(n_steps)]
        earned = sg.matched_key_steps(a_path(steps=steps), [[w] for w in words[:count]])
        capacity = max(2, -(-count // 3))
        best = max(
            sum(s is not None for s in choice)
            for choice in itertools.product(*[home + [None] for home in homes])
            if all(choice.count(s) <= capacity for s in range(n_steps))
        )
        assert sum(s is not None for s in earned) == best
        assert all(s is None or s in homes[g] for g, s in enumerate(earned))
        assert all(earned.count(s) <= capacity for s in range(n_steps))


# -- rewards

KEYS = [["x = 3"], ["y = 4"], ["z = 5"], ["right triangle"]]


@pytest.mark.parametrize("answer, reward", [
    ("4", 1.05), ("**4.0**", 1.05), ("5", 0.05), ("", 0.0), ("\n### x\n4", 0.0),
])
def test_accuracy_reward_is_equation_2_with_its_null_case(answer, reward):
    assert sg.step_accuracy_reward(a_path(answer=answer), "4", KEYS) == pytest.approx(reward)


def test_accuracy_reward_alpha_and_rescue_by_a_step():
    assert sg.step_accuracy_reward(a_path(), "4", KEYS, alpha=0.4) == pytest.approx(1.2)
    assert sg.step_accuracy_reward(a_path(steps=["the answer is 4"], answer="9"), "4", KEYS) == 0.0


@pytest.mark.parametrize("truth", ["", " ", "$$"])
def test_empty_ground_truth_is_an_error(truth):
    with pytest.raises(ValueError, match="ground-truth"):
        sg.step_accuracy_reward(a_path(), truth, KEYS)


def test_no_key_steps_is_an_error():
    with pytest.raises(ValueError, match="expected groups"):
        sg.match_key_steps(a_path(), [])


D, R, L, S1, S2, A = ("### Image Description: d\n", "### Rationales: r\n", "### Let's think step by step.\n",
                      "### Step 1: a\n", "### Step 2: b\n", "### The final answer is: 4\n")


@pytest.mark.parametrize("why, text, reward", [
    ("template", D + R + L + S1 + S2 + A, 1), ("one step", D + R + L + S1 + A, 1),
    ("heading is optional", D + R + S1 + S2 + A, 1), ("rationale first", R + D + L + S1 + A, 1),
    ("foreign section at the end", D + R + S1 + A + "### Note: n\n", 1),
    ("empty skeleton", "### Image Description:\n### Rationales:\n### Step 1:\n### The final answer is:\n", 0),
    ("no description", R + L + S1 + A, 0), ("no rationale", D + L + S1 + A, 0), ("no steps", D + R + L + A, 0),
    ("no answer", D + R + L + S1, 0), ("empty step", D + R + S1 + "### Step 2:\n" + A, 0),
    ("empty description", "### Image Description:\n" + R + S1 + A, 0),
    ("bold nothing as answer", D + R + S1 + "### The final answer is: ****", 0),
    ("unclosed answer", D + R + S1 + "### The final answer is:\n### Note: 4", 0),
    ("description after a step", R + S1 + D + A, 0), ("rationale after a step", D + S1 + R + A, 0),
    ("description again", D + R + S1 + D + A, 0), ("starts at step 2", D + R + S2 + A, 0),
    ("steps swapped", D + R + S2 + S1 + A, 0), ("step twice", D + R + S1 + S1 + A, 0),
    ("step 3 missing", D + R + S1 + S2 + "### Step 4: c\n" + A, 0), ("two answers", D + R + S1 + A + A, 0),
    ("step after the answer", D + R + S1 + A + S2, 0), ("answer before the steps", D + R + A + S1, 0),
    ("nothing", "", 0),
])
def test_validity_reward_is_equation_3(why, text, reward):
    assert sg.step_validity_reward(text) == reward, why


# -- hostile texts: every function returns within the budget, in the main thread and in another

HOSTILE = {
    "2,000 characters": "a" * 2000, "100,000 digits": "2" * 100_000, "a million digits": "1" * 1_000_000,
    "5,000 digits": "7" * 5000, "5,000-digit fraction": "7" * 5000 + "/" + "3" * 5000, "powers": "9**9**9",
    "exponent": "1e999999999", "negative exponent": "1e-999999999", "braces": "{" * 10_000, "parentheses": "(" * 10_000,
    "nested frac": r"\frac{1}{" * 1000 + "2" + "}" * 1000, "open frac": r"\frac{" * 3000, "boxed": r"\boxed{" * 300,
    "thousands": "1,234" * 20_000, "spaces": " " * 100_000, "marks": "# " * 50_000, "stars": "\t*" * 50_000,
    "dashes": "- " * 10_000, "bullets": "\n- " * 7000, "negations": "not x " * 3000, "quotes": "x'" * 5000,
    "equations": "x = " * 10_000, "units": "5 cm " * 200, "many units": "5" + " abc" * 240 + "1", "roots": "√{" * 3000,
    "headers": "\n## " * 5000, "half header": "### image" + " " * 50_000, "decimals": "1." * 10_000,
    "zeros": ".0" * 10_000, "combining": "e\u0301" * 1000, "steps": "\n### Step 1:\nx" * 2000,
}


def slowest(text):
    keys = [["x = 3"], ["2"], ["right triangle"], ["not x"], ["x"]] * 2
    whole = f"### Step 1:\n{text}\n### The final answer is: {text}"
    calls = {
        "split_path": lambda: sg.split_path(text), "final_answer": lambda: sg.final_answer(whole),
        "same_answer": lambda: sg.same_answer(text, "3"),
        "same_answer_short": lambda: sg.same_answer(text[:999], text[1:1000]),
        "match_key_steps": lambda: sg.match_key_steps(whole, keys), "validity": lambda: sg.step_validity_reward(whole),
        "accuracy": lambda: sg.step_accuracy_reward(whole, "3", keys),
    }

    def best_of(call):  # the machine may be busy: a hang is slow every time
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - start)
            if best < BUDGET_S / 2:
                break
        return best

    return max((best_of(call), name) for name, call in calls.items())


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_fast_in_the_main_thread(name):
    assert slowest(HOSTILE[name]) < (BUDGET_S,)


def test_hostile_texts_are_fast_in_another_thread():
    found = []
    thread = threading.Thread(target=lambda: found.extend(slowest(text) for text in HOSTILE.values()), daemon=True)
    thread.start()
    thread.join(timeout=30)
    assert len(found) == len(HOSTILE) and max(found) < (BUDGET_S,)


def test_a_huge_number_equals_itself_only():
    assert sg.same_answer("7" * 5000, "7" * 5000) and not sg.same_answer("7" * 5000, "7" * 4999 + "8")
    assert sg.same_answer("7" * 900, "$" + "7" * 900 + "$") and not sg.same_answer("7" * 900, "7" * 899)


# ─── 3. What is shared by the tests below ─────────────────────────────────────────────────────────────────────────────

QUESTIONS = ["How many objects are left?", "What is the area of the triangle with base 6 and height 4? Explain.", "Hi"]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Family → folder in the published layout."""
    root = tmp_path_factory.mktemp("published")
    return {family: write_published_checkpoint(root / family, family) for family in FAMILIES}


@pytest.fixture(scope="session")
def loaded(checkpoints):
    """Family → (model, processor), shared: a test that trains or changes the model copies it."""
    return {family: sg.load_model(folder, torch.device(DEVICE), torch.float32, 400_000)
            for family, folder in checkpoints.items()}


@pytest.fixture(params=FAMILIES)
def any_model(loaded, request):
    return loaded[request.param]


@pytest.fixture
def small_model(loaded):
    """A Qwen2-VL of one's own: a copy that may be trained."""
    model, processor = loaded["qwen2_vl"]
    return deepcopy(model), processor


@pytest.fixture(scope="session")
def shapes_set(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    shapes.make_shapes(folder, train=24, warmup=48, test=16, seed=0)
    return folder


def noise_image(width, height, seed=0):
    rng = random.Random(seed)
    return Image.frombytes("RGB", (width, height), rng.randbytes(3 * width * height))


def prompts_of(processor):
    """Three prompts of different length: a small image, two images of other grids, text alone."""
    return [processor.prompt(QUESTIONS[0], [noise_image(56, 56, 1)]),
            processor.prompt(QUESTIONS[1], [noise_image(140, 56, 2), noise_image(84, 112, 3)]),
            processor.prompt(QUESTIONS[2])]


def random_paths(processor, lengths, seed=0):
    """Lists of lengths → the same lists of tensors of allowed ids."""
    generator = torch.Generator().manual_seed(seed)
    allowed = (~processor.banned).nonzero()[:, 0]
    return [[allowed[torch.randint(len(allowed), (n,), generator=generator)] for n in group] for group in lengths]


def full_logits(model, prompt, path):
    """Naive: one forward of the plain model over prompt and path → logits that predict the path (C, V)."""
    ids = torch.cat([prompt.ids, path])
    images = {} if prompt.pixels is None else {"pixel_values": prompt.pixels, "image_grid_thw": prompt.grids}
    types = torch.cat([prompt.is_image, torch.zeros(len(path), dtype=torch.bool)]).int()
    inputs = {"input_ids": ids[None], "mm_token_type_ids": types[None], **images}
    logits = model(**{name: value.to(model.device) for name, value in inputs.items()}).logits
    return logits[0, len(prompt.ids) - 1:-1].float()


def naive_logps(model, processor, prompt, path, temperature=1.0):
    logits = (full_logits(model, prompt, path) / temperature).masked_fill(processor.banned.to(model.device), -torch.inf)
    return torch.log_softmax(logits, -1).gather(1, path.to(model.device)[:, None])[:, 0]


def seeded(model, seed=0):
    return torch.Generator(model.device).manual_seed(seed)


def run_main(*flags):
    """main() as from the command line → its exit: 0, 130, or the line it stops with."""
    try:
        sg.main([str(flag) for flag in flags])
    except SystemExit as stop:
        return stop.code or 0
    return 0


def run_flags(out, folder, /, **changes):
    """The flags of a run of seconds on the tiny model: 2 warm-up and 4 StepGRPO updates."""
    settings = dict(
        out=out, data=folder / "train.json", warmup_data=folder / "warmup.json", device="cpu", warmup_steps=2,
        warmup_batch=4, steps=4, questions=2, group_size=2, max_new_tokens=8, held_out=0, save_every=2, show_every=2,
        warmup_lr=1e-3, lr=1e-3) | changes
    flags = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        flags += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return flags


def records(file):
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").split("\n")[:-1]]


def metrics(out):
    """The log of a run without what may differ between two runs of the same."""
    return [{name: value for name, value in row.items() if name != "seconds"}
            for row in records(Path(out) / "metrics.jsonl")]


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def same(a, b):
    """Equality, bit for bit, of nested lists, dicts and tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@contextlib.contextmanager
def varied_rewards():
    """A random model earns nothing, and a group of zeros moves no weight: here validity depends on the text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sg, "step_validity_reward", lambda text: zlib.crc32(text.encode()) % 8 / 8)
        yield


@contextlib.contextmanager
def at_log(phase, step, act):
    """Calls act() right after the log line of this update."""
    log = sg.Run.log

    def spy(run, file, record):
        log(run, file, record)
        if file == "metrics.jsonl" and (record["phase"], record.get("step")) == (phase, step):
            act()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sg.Run, "log", spy)
        yield


# ─── 4. Model, sampling, KV cache ─────────────────────────────────────────────────────────────────────────────────────

def test_only_the_four_packages_and_the_standard_library_are_imported():
    allowed = {"torch", "transformers", "huggingface_hub", "safetensors", "PIL", "tqdm"} | sys.stdlib_module_names
    for file in (HERE / "stepgrpo.py", *(HERE / "data").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= allowed, f"{file.name} line {node.lineno}"
    if importlib.util.find_spec("torchvision") is None:
        assert "torchvision" not in sys.modules


def test_no_bare_except_hides_a_bug():
    for file in (HERE / "stepgrpo.py", *(HERE / "data").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler):
                names = {name.id for name in ast.walk(node.type or ast.Name("Exception")) if isinstance(name, ast.Name)}
                assert not names & {"Exception", "BaseException"}, f"{file.name} line {node.lineno}"


@pytest.mark.parametrize("family", FAMILIES)
def test_published_layout_loads_with_every_weight_and_sizes_live_in_the_text_config(family, checkpoints, loaded):
    model, processor = loaded[family]
    published = {name: value for file in checkpoints[family].glob("*.safetensors")
                 for name, value in load_file(file).items()}
    ours = {name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): value
            for name, value in model.state_dict().items()}
    assert set(ours) - set(published) == {"lm_head.weight"} and not set(published) - set(ours)
    assert all(torch.equal(ours[name].cpu(), value.float()) for name, value in published.items())
    assert model.lm_head.weight is model.get_input_embeddings().weight and not model.training
    assert len(processor.banned) == model.config.get_text_config().vocab_size == model.lm_head.weight.shape[0]
    assert model.dtype == torch.float32 and model.device.type == DEVICE


@pytest.mark.parametrize("family", FAMILIES)
def test_published_layout_trains_one_update_through_main(family, checkpoints, shapes_set, tmp_path):
    rows = json.loads((shapes_set / "train.json").read_text())[:3]
    data = tmp_path / "three.jsonl"
    data.write_text("\n".join(json.dumps(row | {"image_path": str(shapes_set / row["image_path"])}) for row in rows))
    with varied_rewards():
        assert run_main("--model", checkpoints[family], "--data", data, "--out", tmp_path / "run", "--steps", 1,
                        "--group-size", 2, "--questions", 1, "--max-new-tokens", 8, "--held-out", 0, "--lr", 1e-3,
                        "--device", DEVICE, "--offload-optimizer" if family == "qwen2_5_vl" else "--no-resume") == 0
    (row,) = metrics(tmp_path / "run")
    assert row["grad_norm"] > 0 and row["flat_groups"] == 0 and row["loss"] == pytest.approx(0, abs=1e-5)
    trained, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "run" / "checkpoint", dtype=torch.float32,
                                                                output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    before = sg.load_model(checkpoints[family], torch.device("cpu"), torch.float32, 400_000)[0].state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    assert len(AutoTokenizer.from_pretrained(tmp_path / "run" / "checkpoint")) > 300
    assert sg.load_model(tmp_path / "run", torch.device("cpu"), torch.float32, 400_000)        # a run folder will do


@pytest.mark.parametrize("sizes", [[], [(56, 56)], [(140, 84)], [(28, 400)], [(112, 84), (56, 196)],
                                   [(84, 84), (84, 84), (300, 60)]])
def test_mrope_positions_equal_those_of_the_plain_model(any_model, sizes):
    model, processor = any_model
    prompt = processor.prompt(QUESTIONS[0], [noise_image(*size) for size in sizes])
    expected, _ = model.model.get_rope_index(
        input_ids=prompt.ids[None], mm_token_type_ids=prompt.is_image[None].int(), image_grid_thw=prompt.grids,
        attention_mask=torch.ones_like(prompt.ids)[None])
    assert torch.equal(prompt.positions, expected[:, 0])
    if any(min(size) > 28 for size in sizes):
        assert prompt.positions.max() < len(prompt.ids) - 1             # an image advances less than its tokens


def test_chat_layout_is_written_without_a_template_file(loaded):
    _, processor = loaded["qwen2_vl"]
    prompt = processor.prompt("Why?", [noise_image(84, 56)])
    assert processor.tokenizer.decode(prompt.ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        + "<|image_pad|>" * 6 + "<|vision_end|>Why?<|im_end|>\n<|im_start|>assistant\n")
    assert prompt.is_image.sum() == 6 and prompt.grids.tolist() == [[1, 4, 6]]


def test_special_tokens_in_a_question_are_plain_text(any_model):
    model, processor = any_model
    prompt = processor.prompt("What does <|image_pad|> or <|im_end|> mean?", [noise_image(56, 56)])
    assert prompt.is_image.sum() == 4 and (prompt.ids == processor.special["<|im_end|>"]).sum() == 2
    assert "<|image_pad|> or <|im_end|>" in processor.tokenizer.decode(prompt.ids)
    assert processor.special["<|im_end|>"] not in processor.path_ids("a <|im_end|> b")[:-1]
    assert len(sg.rollout(model, processor, [prompt], 2, 2, generator=seeded(model)).ids[0]) == 2


def test_prompt_length_is_known_without_reading_pixels(any_model):
    _, processor = any_model
    for sizes in ([], [(56, 56)], [(1, 1)], [(140, 84), (300, 20)], [(640, 480)]):
        prompt = processor.prompt(QUESTIONS[0], [noise_image(*size) for size in sizes])
        assert processor.prompt_length(QUESTIONS[0], sizes) == len(prompt.ids), sizes


@pytest.mark.parametrize("temperature", [0.7, 1.2])
def test_logps_of_cached_sampling_equal_the_full_forward_with_images_of_two_grids(any_model, temperature):
    model, processor = any_model
    prompts = prompts_of(processor)
    sampled = sg.rollout(model, processor, prompts, 3, 12, temperature, seeded(model))
    with torch.no_grad():
        for prompt, ids, logps in zip(prompts, sampled.ids, sampled.logps):
            for path, logp in zip(ids, logps):
                expected = naive_logps(model, processor, prompt, path, temperature)
                assert torch.allclose(logp, expected.cpu(), atol=1e-4), (logp - expected.cpu()).abs().max()


def test_greedy_sampling_equals_greedy_by_full_forwards(any_model):
    model, processor = any_model
    prompts = prompts_of(processor)
    sampled = sg.rollout(model, processor, prompts, 1, 10, 0)
    for prompt, (path,), (logps,) in zip(prompts, sampled.ids, sampled.logps):
        naive = torch.empty(0, dtype=torch.long)
        while len(naive) < 10 and (len(naive) == 0 or naive[-1] not in processor.eos):
            with torch.no_grad():                              # the last id is a stand-in: only its prediction is read
                logits = full_logits(model, prompt, torch.cat([naive, torch.tensor([0])]))[-1].cpu()
            naive = torch.cat([naive, logits.masked_fill(processor.banned, -torch.inf).argmax(-1, keepdim=True)])
        assert path.tolist() == naive.tolist()
        assert torch.allclose(logps, naive_logps(model, processor, prompt, path).detach().cpu(), atol=1e-4)


def test_rope_deltas_of_the_last_image_do_not_stay(small_model):
    model, processor = small_model
    a, b, _ = prompts_of(processor)
    fresh = sg.rollout(model, processor, [a], 1, 6, 0)
    packed = sg.path_logps(model, processor, [a], fresh.ids)[0].detach()
    with torch.no_grad():
        full_logits(model, b, torch.tensor([5]))               # the plain forward leaves rope_deltas on the module
    sg.rollout(model, processor, [b], 2, 6, 0)
    again = sg.rollout(model, processor, [a], 1, 6, 0)
    assert same(fresh.ids, again.ids) and same(fresh.logps, again.logps)
    assert torch.equal(packed, sg.path_logps(model, processor, [a], fresh.ids)[0].detach())


def test_a_padded_row_equals_the_same_row_alone(any_model):
    model, processor = any_model
    prompts = prompts_of(processor)
    assert len({len(prompt.ids) for prompt in prompts}) == 3
    together = sg.rollout(model, processor, prompts, 1, 8, 0)
    for q, prompt in enumerate(prompts):
        alone = sg.rollout(model, processor, [prompt], 1, 8, 0)
        assert same(alone.ids[0], together.ids[q])
        assert torch.allclose(alone.logps[0][0], together.logps[q][0], atol=CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_in_train_mode_does_not_drop_the_cache(family, loaded):
    model, processor = deepcopy(loaded[family][0]), loaded[family][1]
    expected = sg.rollout(model, processor, prompts_of(processor), 2, 8, 1.0, seeded(model))
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.train()
    sampled = sg.rollout(model, processor, prompts_of(processor), 2, 8, 1.0, seeded(model))
    assert same(sampled.ids, expected.ids) and same(sampled.logps, expected.logps)
    assert model.training and all(module.training for module in model.modules())       # the mode is as it was
    model.eval()
    sg.rollout(model, processor, prompts_of(processor)[:1], 2, 2)
    assert not model.training


def test_a_model_that_keeps_no_cache_is_an_error(small_model, monkeypatch):
    model, processor = small_model
    monkeypatch.setattr(sg.DynamicCache, "get_seq_length", lambda *args, **more: 0)
    with pytest.raises(RuntimeError, match="no KV cache"):
        sg.rollout(model, processor, prompts_of(processor)[:1], 2, 4)


def test_checkpointed_gradients_equal_plain_ones(small_model):
    model, processor = small_model
    prompts, paths = prompts_of(processor)[:2], random_paths(processor, [[5, 3], [4, 6]])

    def gradients():
        model.train().zero_grad()
        sg.path_logps(model, processor, prompts, paths)[0].sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    plain = gradients()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    assert (gradients() - plain).norm() < 1e-5 * plain.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_fuzz_no_banned_id_is_ever_sampled(family, loaded):
    """A hot random model would emit image tokens and ids past the tokenizer; the next forward would then fail."""
    model, processor = deepcopy(loaded[family][0]), loaded[family][1]
    with torch.no_grad():                                      # make the banned ids the likeliest of all
        model.get_input_embeddings().weight[processor.banned.to(model.device)] *= 5
    for seed in range(3):
        sampled = sg.rollout(model, processor, prompts_of(processor), 8, 24, 5.0, seeded(model, seed))
        ids = torch.cat([path for group in sampled.ids for path in group])
        assert not processor.banned[ids].any() and all(map(torch.isfinite, torch.cat(sum(sampled.logps, []))))
    assert processor.banned[[processor.special[f"<|{name}_pad|>"] for name in ("image", "video", "vision")]].all()
    assert processor.banned[len(processor.tokenizer):].all() and not processor.banned[processor.eos].any()


def test_generation_config_does_not_leak_into_sampling(loaded):
    model, processor = loaded["qwen2_vl"]
    assert model.generation_config.top_k == 1 and model.generation_config.repetition_penalty > 1    # as published
    sampled = sg.rollout(model, processor, prompts_of(processor)[:1], 32, 1, 1.2, seeded(model))
    assert len({int(path[0]) for path in sampled.ids[0]}) > 8
    greedy = sg.rollout(model, processor, prompts_of(processor)[:1], 4, 6, 0)
    assert len({tuple(path.tolist()) for path in greedy.ids[0]}) == 1


def test_sampling_follows_the_models_distribution_at_its_temperature(loaded):
    model, processor = loaded["qwen2_vl"]
    prompt, n = processor.prompt("Hi"), 4000
    sampled = sg.rollout(model, processor, [prompt], n, 1, 0.7, seeded(model))
    with torch.no_grad():
        logits = full_logits(model, prompt, torch.tensor([0]))[0].cpu().masked_fill(processor.banned, -torch.inf)
    expected = torch.softmax(logits / 0.7, -1)
    observed = torch.bincount(torch.cat(sampled.ids[0]), minlength=len(expected)) / n
    assert ((observed - expected).abs() < 5 * (expected / n).sqrt() + 5 / n).all()


def test_either_eos_ends_a_path_once_and_rows_that_ended_do_not_disturb_the_others(small_model):
    model, processor = small_model
    with torch.no_grad():                                      # likelier ends, at different lengths
        model.lm_head.weight[processor.eos] *= 4
    prompts, ends = prompts_of(processor), Counter()
    sampled = sg.rollout(model, processor, prompts, 6, 40, 3.0, seeded(model, 1))
    for prompt, ids, texts, logps in zip(prompts, *sampled):
        for path, text, logp in zip(ids, texts, logps):
            at = torch.isin(path, torch.tensor(processor.eos)).nonzero()[:, 0].tolist()
            assert at == [len(path) - 1] or at == [] and len(path) == 40
            assert "<|" not in text and len(logp) == len(path)
            with torch.no_grad():
                expected = naive_logps(model, processor, prompt, path, 3.0).cpu()
            assert torch.allclose(logp, expected, atol=1e-4)
            ends[int(path[-1])] += 1
    assert all(ends[eos] for eos in processor.eos) and len({len(path) for ids in sampled.ids for path in ids}) > 3


def test_the_mask_holds_exactly_one_eos_the_emitted_one(loaded):
    model, processor = loaded["qwen2_vl"]
    end, pad = processor.eos                                   # pad is an EOS here: `ids != pad` would lose it
    ids = torch.tensor([[7, 8, pad, end, end, 9], [end, 7, 7, 7, 7, 7], [7, 8, 9, 7, 8, 9], [7, 8, 9, 7, 8, pad]])
    sampled = sg.cut_at_eos(processor, ids, torch.arange(24.).reshape(4, 6), 2)
    assert [[path.tolist() for path in group] for group in sampled.ids] == [
        [[7, 8, pad], [end]], [[7, 8, 9, 7, 8, 9], [7, 8, 9, 7, 8, pad]]]
    assert [len(logps) for group in sampled.logps for logps in group] == [3, 1, 6, 6]
    prompts = [processor.prompt("Hi"), processor.prompt("Why?")]
    logps, mask = sg.path_logps(model, processor, prompts, sampled.ids)
    assert mask.sum(-1).tolist() == [[3, 1], [6, 6]] and bool((logps[mask] < 0).all()) and not logps[~mask].any()


def test_warm_up_trains_exactly_one_eos(loaded):
    _, processor = loaded["qwen2_vl"]
    ids = processor.path_ids("### The final answer is: 4")
    assert ids[-1] == processor.special["<|im_end|>"] and torch.isin(ids, torch.tensor(processor.eos)).sum() == 1


def test_ids_are_kept_end_to_end_where_decoding_and_encoding_again_would_change_them(small_model):
    model, processor = small_model
    groups = sampled_groups(model, processor)
    changed = [path for group in groups for path, text in zip(group.ids, group.texts)
               if processor.text_ids(text) != path.tolist()]
    assert changed                                             # else this test would show nothing
    stats = train_update(small_model, groups)
    assert stats["sampling_gap"] < 1e-5 and stats["ratio"] == pytest.approx(1, abs=1e-6)


def test_two_images_of_one_size_are_paired_with_their_own_questions(any_model):
    model, processor = any_model
    red, blue = (processor.prompt("Which colour?", [Image.new("RGB", (84, 56), colour)]) for colour in ("red", "blue"))
    paths = random_paths(processor, [[4, 6]])
    with torch.no_grad():
        alone = [sg.path_logps(model, processor, [prompt], paths)[0][0] for prompt in (red, blue)]
        assert not torch.allclose(*alone, atol=1e-3)
        together = sg.path_logps(model, processor, [red, blue], paths * 2)[0]
        assert torch.allclose(together, torch.stack(alone), atol=CLOSE)
    sampled = sg.rollout(model, processor, [red, blue], 2, 4, 0)
    for q, prompt in enumerate((red, blue)):
        assert same(sampled.ids[q], sg.rollout(model, processor, [prompt], 2, 4, 0).ids[0])


def test_a_small_image_does_not_resize_the_later_ones(any_model):
    _, processor = any_model
    images = [noise_image(28, 28, 1), noise_image(300, 200, 2), noise_image(60, 50, 3), noise_image(640, 480, 4)]
    alone = [processor.prompt("Hi", [image]) for image in images]
    mixed = processor.prompt("Hi", images)
    assert mixed.grids.tolist() == [prompt.grids[0].tolist() for prompt in alone]
    assert torch.equal(mixed.pixels, torch.cat([prompt.pixels for prompt in alone]))


def test_the_vision_tower_sees_each_image_once_per_group_and_not_once_per_path(any_model):
    model, processor = any_model
    prompts, seen = prompts_of(processor), []
    patches = sum(len(prompt.pixels) for prompt in prompts[:2])
    hook = model.model.visual.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    try:
        sampled = sg.rollout(model, processor, prompts, 4, 4, generator=seeded(model))
        assert seen == [patches]
        with torch.no_grad():
            sg.path_logps(model, processor, prompts, sampled.ids)
        assert seen == [patches, patches]
    finally:
        hook.remove()


# -- images of any kind

def make_image(mode):
    if mode == "I;16":
        image = Image.new("I;16", (60, 40))
        image.putdata([1000 * (i % 60) for i in range(60 * 40)])
        return image
    if mode == "RGBA":
        image = Image.new("RGBA", (60, 40), (255, 0, 0, 0))
        image.paste((0, 0, 255, 255), (0, 0, 30, 40))
        return image
    return noise_image(60, 40).convert(mode)


@pytest.mark.parametrize("mode, suffix", [("RGB", "png"), ("RGBA", "png"), ("CMYK", "jpg"), ("P", "gif"), ("LA", "png"),
                                          ("1", "png"), ("L", "bmp"), ("I;16", "png"), ("F", "tiff")])
def test_an_image_of_any_mode_becomes_rgb(mode, suffix, tmp_path):
    file = tmp_path / f"image.{suffix}"
    make_image(mode).save(file)
    image = sg.load_image(file, 400_000)
    assert image.mode == "RGB" and image.size == (60, 40) == sg.image_size(file, 400_000)
    assert image.convert("L").getextrema()[0] < 130 < image.convert("L").getextrema()[1]     # neither black nor white
    if mode == "RGBA":
        assert image.getpixel((59, 0)) == (255, 255, 255) and image.getpixel((0, 0)) == (0, 0, 255)
    if mode == "I;16":
        assert [image.getpixel((x, 5))[0] for x in (0, 30, 59)] == pytest.approx([0, 130, 255], abs=2)


@pytest.mark.parametrize("size", [(1, 1), (10, 3000), (3000, 10), (1, 5000), (2, 2), (27, 29), (4000, 3000)])
def test_an_image_of_any_size_fits_the_model(size, tmp_path, checkpoints):
    file, limit = tmp_path / "image.png", 400_000
    Image.new("RGB", size, "red").save(file)
    image = sg.load_image(file, limit)
    assert image.size == sg.image_size(file, limit) and image.size[0] * image.size[1] <= limit
    processor = sg.load_model(checkpoints["qwen2_vl"], torch.device("cpu"), torch.float32, limit)[1]
    prompt = processor.prompt("Hi", [image])
    assert 1 <= prompt.is_image.sum() <= limit / 784
    assert processor.prompt_length("Hi", [image.size]) == len(prompt.ids)


@pytest.mark.parametrize("limit", [784, 3136, 10_000, 400_000])
def test_max_pixels_holds_for_a_large_image_even_when_load_image_did_not_shrink_it(limit, checkpoints):
    processor = sg.load_model(checkpoints["qwen2_vl"], torch.device("cpu"), torch.float32, limit)[1]
    assert processor.prompt("Hi", [Image.new("RGB", (4000, 3000))]).is_image.sum() <= max(1, limit // 784)


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (100, 48), "blue")
    image.paste("red", (0, 0, 50, 48))
    exif = image.getexif()
    exif[0x0112] = 6                                           # shown a quarter turn clockwise: red on top
    image.save(tmp_path / "turned.jpg", exif=exif)
    turned = sg.load_image(tmp_path / "turned.jpg", 400_000)
    assert turned.size == (48, 100) == sg.image_size(tmp_path / "turned.jpg", 400_000)
    assert turned.getpixel((24, 20))[0] > 200 and turned.getpixel((24, 80))[2] > 200


def test_an_image_that_cannot_be_read_is_an_error_with_its_name(tmp_path):
    (tmp_path / "torn.png").write_bytes(b"no image")
    with pytest.raises(sg.UserError, match="torn.png"):
        sg.load_image(tmp_path / "torn.png", 400_000)


# ─── 5. Packed log-probs, objective, optimiser ────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_packed_logps_and_gradients_equal_one_forward_per_path(any_model, temperature):
    model, processor = any_model
    prompts = [*prompts_of(processor)[:2]]
    paths = random_paths(processor, [[7, 1, 4], [3, 9, 2]])
    logps, mask = sg.path_logps(model, processor, prompts, paths, temperature)
    naive = torch.zeros_like(logps)
    for q, prompt in enumerate(prompts):
        for g, path in enumerate(paths[q]):
            naive[q, g, :len(path)] = naive_logps(model, processor, prompt, path, temperature)
            assert mask[q, g].tolist() == [c < len(path) for c in range(9)]
    assert torch.allclose(logps, naive, atol=CLOSE)
    parameters = [p for p in model.parameters() if p.requires_grad]
    weight = torch.randn(logps.shape, generator=torch.Generator().manual_seed(0)).to(logps.device)
    packed, separate = (torch.autograd.grad((x * weight).sum(), parameters, allow_unused=True) for x in (logps, naive))
    assert [a is None for a in packed] == [b is None for b in separate]
    packed, separate = (torch.cat([g.flatten() for g in grads if g is not None]) for grads in (packed, separate))
    assert (packed - separate).norm() < CLOSE * separate.norm()
    visual = [n for n, p in model.named_parameters() if "visual" in n]
    assert visual and torch.autograd.grad(sg.path_logps(model, processor, prompts, paths)[0].sum(),
                                          [dict(model.named_parameters())[visual[0]]])[0].abs().sum() > 0


def test_inputs_of_every_logp_function_are_unchanged(loaded):
    model, processor = loaded["qwen2_vl"]
    prompts, paths = prompts_of(processor), random_paths(processor, [[5, 2], [3, 3], [1, 6]])
    hidden, targets = torch.randn(5, 8), torch.tensor([0, 1, 2, 3, 4])
    table = [torch.randn(4, 6) for _ in range(3)] + [torch.randn(4), torch.rand(4, 6) > .3]
    rewards = torch.randn(2, 4)
    inputs = [*map(list, prompts), paths, processor.banned, hidden, targets, table, rewards]
    before = deepcopy(inputs)
    with torch.no_grad():
        sg.path_logps(model, processor, prompts, paths)
        sg.rollout(model, processor, prompts, 2, 3)
        sg.token_logps(torch.nn.Linear(8, 7), hidden, targets, 0.7, torch.arange(7) == 6)
    sg.grpo_loss(*table)
    sg.group_advantages(rewards)
    assert same(inputs, before)


def test_token_logps_do_not_depend_on_the_chunk():
    head, hidden, targets = torch.nn.Linear(8, 11), torch.randn(23, 8, requires_grad=True), torch.arange(23) % 10
    banned, results = torch.arange(11) == 10, []
    for chunk in (1, 5, 23, 512):
        logps = sg.token_logps(head, hidden, targets, 0.7, banned, chunk)
        results.append((logps.detach(), *torch.autograd.grad(logps.pow(2).sum(), [hidden, *head.parameters()])))
    naive = torch.log_softmax((head(hidden) / 0.7)[:, :10], -1)[torch.arange(23), targets]
    naive = (naive.detach(), *torch.autograd.grad(naive.pow(2).sum(), [hidden, *head.parameters()]))
    for result in results:
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(result, naive))


def test_group_advantages_equal_a_naive_z_score():
    rewards = torch.tensor([[0., 1., 2.1, 1.], [0.03, 0., 0., 0.]])
    for row, found in zip(rewards.tolist(), sg.group_advantages(rewards).tolist()):
        mean = sum(row) / len(row)
        std = (sum((r - mean) ** 2 for r in row) / (len(row) - 1)) ** .5           # unbiased
        assert found == pytest.approx([(r - mean) / (std + 1e-4) for r in row], abs=1e-5)


def test_equal_rewards_give_exactly_zero_and_noise_stays_small():
    assert not sg.group_advantages(torch.full((3, 4), 1.1)).any()
    assert not sg.group_advantages(torch.full((1, 7), 0.1) * 3).any()
    noise = 1 + 1e-7 * torch.tensor([[1., -1., 2., -2.]])
    assert sg.group_advantages(noise).abs().max() < 0.01            # with eps 1e-8 it would be 1.5


@pytest.mark.parametrize("shape", [(3, 1), (1, 1), (4,), (0,)])
def test_a_group_of_one_is_refused_and_gives_no_nan(shape):
    with pytest.raises(ValueError, match="at least 2"):
        sg.group_advantages(torch.zeros(shape))
    with pytest.raises(sg.UserError, match="group-size"):
        sg.parse_config(["--group-size", "1"])


def random_objective(seed=0, N=6, C=7):
    generator = torch.Generator().manual_seed(seed)
    logps, old, ref = (-2 + 0.4 * torch.randn(N, C, generator=generator) for _ in range(3))
    mask = torch.arange(C) < torch.tensor([[7], [1], [3], [5], [2], [7]])
    return logps, old, ref, torch.randn(N, generator=generator), mask


def naive_objective(logps, old, ref, A, mask, clip, beta):
    loss = kl_mean = clipped_mean = ratio_mean = 0.0
    for i in range(len(A)):
        terms, kls, clipped, ratios = [], [], [], []
        for c in range(int(mask[i].sum())):
            ratio = torch.exp(logps[i, c] - old[i, c]).item()
            bounded = min(max(ratio, 1 - clip), 1 + clip)
            kl = torch.exp(ref[i, c] - logps[i, c]).item() - (ref[i, c] - logps[i, c]).item() - 1
            gain = min(ratio * A[i].item(), bounded * A[i].item())
            terms.append(gain - beta * kl)
            kls.append(kl)
            clipped.append(gain != ratio * A[i].item())
            ratios.append(ratio)
        loss -= sum(terms) / len(terms) / len(A)
        kl_mean += sum(kls) / len(kls) / len(A)
        clipped_mean += sum(clipped) / len(clipped) / len(A)
        ratio_mean += sum(ratios) / len(ratios) / len(A)
    return loss, kl_mean, clipped_mean, ratio_mean


@pytest.mark.parametrize("clip, beta", [(0.2, 0.04), (0.1, 0.0), (0.5, 1.0)])
def test_loss_and_its_statistics_equal_a_naive_loop(clip, beta):
    inputs = random_objective()
    loss, stats = sg.grpo_loss(*inputs, clip, beta)
    expected = naive_objective(*inputs, clip, beta)
    assert loss.item() == pytest.approx(expected[0], abs=1e-5)
    assert stats["ratio"] == pytest.approx(expected[3], abs=1e-5)
    assert stats["clip_fraction"] == pytest.approx(expected[2])
    assert stats["kl"] == pytest.approx(expected[1] if beta else 0.0, abs=1e-5) and expected[2] > 0


@pytest.mark.parametrize("ratio, advantage, clipped", [
    (1.5, 1, True), (1.5, -1, False), (0.5, 1, False), (0.5, -1, True)])
def test_clip_table(ratio, advantage, clipped):
    """The clip takes the gradient away where the ratio has gone too far in the direction that pays, and only there."""
    logps = torch.tensor([[ratio]]).log().requires_grad_()
    A = torch.tensor([float(advantage)])
    loss, stats = sg.grpo_loss(logps, torch.zeros(1, 1), None, A, torch.ones(1, 1), beta=0)
    loss.backward()
    assert stats["clip_fraction"] == float(clipped) and stats["ratio"] == pytest.approx(ratio)
    bounded = {1.5: 1.2, 0.5: 0.8}[ratio] if clipped else ratio
    assert loss.item() == pytest.approx(-bounded * advantage) and bool(logps.grad.any()) is not clipped


def test_kl_is_k3_never_negative_and_pulls_to_the_reference():
    logps = torch.linspace(-3, 0, 7)[None].requires_grad_()
    ref, mask, A = torch.full((1, 7), -1.5), torch.ones(1, 7), torch.zeros(1)
    loss, stats = sg.grpo_loss(logps, logps.detach(), ref, A, mask, beta=0.5)
    loss.backward()
    assert stats["kl"] > 0 and loss.item() == pytest.approx(0.5 * stats["kl"])
    assert torch.equal(logps.grad.sign(), (logps.detach() - ref).sign())
    assert sg.grpo_loss(ref, ref, ref, A, mask, beta=0.5)[1]["kl"] == 0


def test_beta_zero_needs_no_reference():
    logps, old, _, A, mask = random_objective()
    loss, stats = sg.grpo_loss(logps, old, None, A, mask, beta=0.0)
    assert torch.isfinite(loss) and stats["kl"] == 0


def test_the_gradient_at_ratio_one_is_that_of_reinforce_and_the_loss_is_beta_times_kl():
    logps, _, ref, _, mask = random_objective()
    A = sg.group_advantages(torch.tensor([[0., 1., 2.], [1., 0., 0.]])).flatten()
    logps.requires_grad_()
    (gradient,) = torch.autograd.grad(sg.grpo_loss(logps, logps.detach(), None, A, mask, beta=0)[0], logps)
    assert torch.allclose(gradient, -(A[:, None] * mask / mask.sum(1, keepdim=True)) / len(A))
    loss, stats = sg.grpo_loss(logps, logps.detach(), ref, A, mask, beta=0.04)
    assert loss.item() == pytest.approx(0.04 * stats["kl"], abs=1e-6) and stats["ratio"] == pytest.approx(1)
    assert stats["clip_fraction"] == 0


def test_padding_never_counts():
    logps, old, ref, A, mask = random_objective()
    loss, stats = sg.grpo_loss(logps, old, ref, A, mask)
    moved = [torch.where(mask, x, x - 1) for x in (logps, old, ref)]
    assert sg.grpo_loss(*moved, A, mask)[0].item() == pytest.approx(loss.item())


# -- update(): micro-batches, inner updates, masters

def sampled_groups(model, processor, G=3, tokens=10, rewards=None):
    """Groups of three questions, as sample_groups makes them, with rewards of our choice."""
    prompts = prompts_of(processor)
    sampled = sg.rollout(model, processor, prompts, G, tokens, 1.2, seeded(model))
    rewards = rewards or [[(3 * q + g * g) % 5 / 2 for g in range(G)] for q in range(len(prompts))]
    rows = [sg.Row(f"file row {q}", "?", "4", "", [], []) for q in range(len(prompts))]
    return [sg.Group(row, prompt, ids, texts, logps, [{"reward": r} for r in group])
            for row, prompt, ids, texts, logps, group in zip(rows, prompts, *sampled, rewards)]


def train_update(model_and_processor, groups, lr=1e-3, offload=False, reference=None, **settings):
    """One call of update() on the model → its statistics."""
    model, processor = model_and_processor
    cfg = sg.Config(**settings)
    rewards = torch.tensor([[score["reward"] for score in group.scores] for group in groups])
    optimizer = sg.MasterAdamW(model, offload)
    return sg.update(cfg, model, reference, processor, groups, sg.group_advantages(rewards), optimizer, lr)


def flat_weights(model):
    return torch.cat([p.detach().flatten().float() for p in model.parameters()])


def test_micro_batch_1_2_and_all_give_the_same_update_and_the_same_log(loaded):
    base, processor = loaded["qwen2_vl"]
    groups, reference = sampled_groups(base, processor), deepcopy(base)
    with torch.no_grad():
        reference.get_input_embeddings().weight.mul_(1.1)      # so that KL is not 0
    results = []
    for micro_batch in (1, 2, 3):
        model = deepcopy(base)
        stats = train_update((model, processor), groups, reference=reference, micro_batch=micro_batch, beta=0.5)
        results.append((flat_weights(model) - flat_weights(base), stats))
    (one, logged), *others = results
    assert logged["kl"] > 0 and logged["loss"] == pytest.approx(0.5 * logged["kl"], abs=1e-5)
    for change, stats in others:
        # Adam's first step is lr × sign of the gradient: where that is 0 but for rounding, signs may differ.
        assert ((change - one).abs() < 1e-5).float().mean() > 0.999
        assert stats == pytest.approx(logged, rel=1e-3, abs=1e-5)           # a mean of all, not the last micro-batch


def test_gradient_of_an_update_is_the_mean_over_all_paths(loaded):
    """Token mean per path, then the mean over paths, against a loop: a mean of means would differ."""
    base, processor = loaded["qwen2_vl"]
    groups, model, naive = sampled_groups(base, processor), deepcopy(base), deepcopy(base)
    groups[0] = groups[0]._replace(ids=[path[:n] for path, n in zip(groups[0].ids, (2, 5, 9))],
                                   logps=[path[:n] for path, n in zip(groups[0].logps, (2, 5, 9))])
    seen = {}
    step = sg.MasterAdamW.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sg.MasterAdamW, "step", lambda self, lr, norm, limit: (
            seen.update(norm=norm, gradient=[None if m.grad is None else m.grad.clone() for m in self.masters]),
            step(self, lr, norm, limit)))
        stats = train_update((model, processor), groups, micro_batch=2, beta=0.0)
    rewards = torch.tensor([[score["reward"] for score in group.scores] for group in groups])
    A, loss = sg.group_advantages(rewards), 0
    for q, group in enumerate(groups):
        for g, path in enumerate(group.ids):
            loss = loss - A[q, g].item() * naive_logps(naive, processor, group.prompt, path, 1.2).mean() / A.numel()
    loss.backward()
    expected = [p.grad for p in naive.parameters()]
    assert [a is None for a in seen["gradient"]] == [b is None for b in expected]
    ours, theirs = (torch.cat([g.flatten().cpu() for g in grads if g is not None])
                    for grads in (seen["gradient"], expected))
    assert (ours - theirs).norm() < 10 * CLOSE * theirs.norm()
    assert stats["grad_norm"] == pytest.approx(theirs.norm().item(), rel=1e-3)


def test_a_batch_of_flat_groups_gives_finite_zero_gradients(small_model):
    model, processor = small_model
    groups = sampled_groups(model, processor, rewards=[[1.1] * 3] * 3)
    assert all(group.is_flat() for group in groups)
    before, stats = flat_weights(model), train_update(small_model, groups, beta=0.0)
    assert stats["grad_norm"] == 0 and stats["loss"] == 0 and torch.equal(flat_weights(model), before)
    reference = deepcopy(model)
    with torch.no_grad():
        reference.get_input_embeddings().weight.mul_(1.1)
    stats = train_update(small_model, groups, reference=reference, beta=0.1)       # KL still pulls, finitely
    assert 0 < stats["grad_norm"] < 1e3 and torch.isfinite(flat_weights(model)).all()


def test_bf16_weights_need_fp32_masters_to_move_at_1e_6(loaded):
    base, processor = loaded["qwen2_vl"]
    groups = sampled_groups(base, processor)
    model, naive = deepcopy(base).bfloat16(), deepcopy(base).bfloat16()
    adamw, gradients = torch.optim.AdamW(naive.parameters(), lr=1e-6, weight_decay=0.0), []
    optimizer = sg.MasterAdamW(model)
    assert optimizer.separate and all(m.dtype == torch.float32 for m in optimizer.masters)
    masters = [m.clone() for m in optimizer.masters]
    A = torch.randn(9, generator=torch.Generator().manual_seed(0)).to(base.device)
    for policy in (model, naive):
        logps, mask = (x.flatten(0, 1) for x in sg.path_logps(policy, processor, [g.prompt for g in groups],
                                                              [g.ids for g in groups]))
        sg.grpo_loss(logps, logps.detach(), None, A, mask, beta=0)[0].backward()
    assert all(p.grad is None for p in model.parameters())      # moved to the masters as they came
    gradients = [torch.zeros_like(m) if m.grad is None else m.grad.clone() for m in optimizer.masters]
    before = [p.detach().clone() for p in naive.parameters()]
    optimizer.step(1e-6, optimizer.gradient_norm(), 1.0)
    adamw.step()

    def moved(new, old):
        changed, live = (sum(int(x.sum()) for x in xs) for xs in (
            [(n != o) & (g != 0) for n, o, g in zip(new, old, gradients)], [g != 0 for g in gradients]))
        return changed / live
    assert moved(optimizer.masters, masters) > 0.99 and moved(naive.parameters(), before) < 0.2
    assert all(torch.equal(p, m.bfloat16()) for p, m in zip(model.parameters(), optimizer.masters))


def test_bf16_updates_add_up_in_the_masters(loaded):
    """300 steps of 1e-6 in one direction: each alone is lost in bf16, their sum is not."""
    linear = torch.nn.Linear(4, 4, bias=False).bfloat16()
    linear.device = linear.weight.device                       # as a transformers model has it
    torch.nn.init.constant_(linear.weight, 0.01)
    optimizer, start = sg.MasterAdamW(linear), linear.weight.detach().clone()
    for _ in range(300):
        linear(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
        optimizer.step(1e-6, optimizer.gradient_norm(), 1.0)
    assert (linear.weight - start).float().mean().item() == pytest.approx(-3e-4, rel=0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_offloaded_optimiser_gives_the_same_weights(dtype, loaded):
    base, processor = loaded["qwen2_vl"]
    groups, results = sampled_groups(base, processor), []
    for offload in (False, True):
        model = deepcopy(base).to(dtype)
        train_update((model, processor), groups, offload=offload, micro_batch=2, beta=0.0)
        results.append(flat_weights(model))
    if DEVICE == "cpu":
        assert torch.equal(*results)
    assert ((results[0] - results[1]).abs() < 1e-4).float().mean() > 0.99


def test_master_adamw_equals_torchs_adamw_with_clipped_gradients():
    ours, theirs = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    optimizer, adamw = sg.MasterAdamW(ours, offload=True), torch.optim.AdamW(theirs.parameters(), weight_decay=0.0)
    for step in range(5):
        x, lr = torch.randn(7, 5, generator=torch.Generator().manual_seed(step)), 0.1 / (step + 1)
        for part in x.split(3):
            ours(part).pow(2).sum().backward()
        norm = optimizer.gradient_norm()
        theirs(x).pow(2).sum().backward()
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        adamw.param_groups[0]["lr"] = lr
        adamw.step()
        adamw.zero_grad()
        optimizer.step(lr, norm, 0.5)
        assert norm == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(ours.weight, theirs.weight, atol=1e-6) and torch.allclose(ours.bias, theirs.bias, atol=1e-6)


def test_two_inner_updates_differ_from_one_and_only_then_the_clip_acts(loaded):
    base, processor = loaded["qwen2_vl"]
    groups, results = sampled_groups(base, processor), {}
    for inner, clip in ((1, 0.2), (2, 0.2), (2, 0.9)):
        model = deepcopy(base)
        stats = train_update((model, processor), groups, lr=5e-3, inner_updates=inner, clip=clip, beta=0.0)
        results[inner, clip] = flat_weights(model), stats
    assert results[1, 0.2][1]["clip_fraction"] == 0 and results[1, 0.2][1]["ratio"] == pytest.approx(1, abs=1e-5)
    assert results[2, 0.2][1]["clip_fraction"] > 0.05
    assert not torch.allclose(results[1, 0.2][0], results[2, 0.2][0])
    assert not torch.equal(results[2, 0.2][0], results[2, 0.9][0])


def test_an_update_makes_the_better_paths_likelier(small_model):
    model, processor = small_model
    groups = sampled_groups(model, processor)
    prompts, paths = [g.prompt for g in groups], [g.ids for g in groups]
    A = sg.group_advantages(torch.tensor([[score["reward"] for score in group.scores] for group in groups]))

    def gain():
        with torch.no_grad():
            logps, mask = sg.path_logps(model.eval(), processor, prompts, paths, 1.2)
        return ((logps * mask).sum(-1) / mask.sum(-1) * A.to(logps.device)).mean().item()
    before = gain()
    train_update(small_model, groups, lr=1e-4, beta=0.0)
    assert gain() > before


def test_warm_up_schedule_rises_then_falls_to_zero():
    assert [sg.warmup_schedule(p, 0.1) for p in (0.05, 0.1, 1.0)] == pytest.approx([0.5, 1.0, 0.0])
    assert sg.warmup_schedule(0.55, 0.1) == pytest.approx(0.5)
    assert sg.warmup_schedule(0.001, 0.0) == pytest.approx(1, abs=1e-4)


# ─── 6. Training: loop, run folder, stop and resume ───────────────────────────────────────────────────────────────────

class Killed(BaseException):
    """What kill -9 is to the run: nothing of it is caught."""


def killed():
    raise Killed


@pytest.fixture(scope="session")
def straight(tmp_path_factory, shapes_set):
    """The folder of a run of 2 + 4 updates that nothing disturbed."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    with varied_rewards():
        assert run_main(*run_flags(out, shapes_set)) == 0
    return out


def assert_same_run(a, b):
    assert metrics(a) == metrics(b)
    assert (a / "samples.jsonl").read_bytes() == (b / "samples.jsonl").read_bytes()
    for part in ("checkpoint", "reference"):
        assert (a / part / "model.safetensors").read_bytes() == (b / part / "model.safetensors").read_bytes()
    assert same(*(torch.load(run / "checkpoint" / "training_state.pt", weights_only=True) for run in (a, b)))


def test_a_run_trains_and_logs_every_update(straight):
    rows = metrics(straight)
    assert [(row["phase"], row["step"]) for row in rows] == [
        *(("warm-up", step) for step in (1, 2)), *(("StepGRPO", step) for step in (1, 2, 3, 4))]
    warm, rl = rows[:2], rows[2:]
    assert [row["lr"] for row in warm] == pytest.approx([1e-3 * sg.warmup_schedule(p, 0.05) for p in (0.25, 0.75)])
    assert [row["lr"] for row in rl] == pytest.approx([1e-3 * (1 - step / 4) for step in range(4)])     # no constant
    assert rl[0]["kl"] == pytest.approx(0, abs=1e-6) and rl[3]["kl"] > 1e-7 and all(row["grad_norm"] > 0 for row in rl)
    for row in rl:
        assert row["loss"] == pytest.approx(0.01 * row["kl"], abs=1e-5) and row["ratio"] == pytest.approx(1, abs=1e-5)
        assert row["sampling_gap"] < 1e-5 and row["clip_fraction"] == 0 and row["length"] <= 8
    reference, policy = weights(straight / "reference"), weights(straight / "checkpoint")
    assert any(not torch.equal(reference[name], policy[name]) for name in policy)
    saved = json.loads((straight / "config.json").read_text())
    assert set(saved) == {f.name for f in fields(sg.Config)} and saved["steps"] == 4
    samples = records(straight / "samples.jsonl")
    assert [row["step"] for row in samples] == [1, 1, 3, 3] and samples[0]["reward"] >= samples[1]["reward"]
    assert not list(straight.glob("checkpoint.*"))


def test_a_run_is_repeated_by_its_seed_and_differs_by_another(straight, shapes_set, tmp_path):
    with varied_rewards():
        assert run_main(*run_flags(tmp_path / "again", shapes_set)) == 0
        assert run_main(*run_flags(tmp_path / "other", shapes_set, seed=1, steps=1)) == 0
    assert_same_run(straight, tmp_path / "again")
    assert metrics(tmp_path / "other")[0] != metrics(straight)[0]


@pytest.mark.parametrize("phase, step, number", [("StepGRPO", 2, signal.SIGINT), ("StepGRPO", 3, signal.SIGTERM),
                                                 ("warm-up", 1, signal.SIGINT), ("warm-up", 2, signal.SIGTERM)])
def test_stop_and_resume_go_on_with_the_same_curve_bit_for_bit(phase, step, number, straight, shapes_set, tmp_path,
                                                               capsys):
    out, handler = tmp_path / "run", signal.getsignal(number)
    with varied_rewards():
        with at_log(phase, step, lambda: os.kill(os.getpid(), number)):
            assert run_main(*run_flags(out, shapes_set)) == 130
        assert f"--resume --out {out}" in capsys.readouterr().out
        assert (metrics(out)[-1]["phase"], metrics(out)[-1]["step"]) == (phase, step)           # not one update more
        assert AutoModelForImageTextToText.from_pretrained(out / "checkpoint")                  # and it is saved
        assert run_main("--resume", "--out", out) == 0
    assert signal.getsignal(number) is handler
    assert_same_run(straight, out)


@pytest.mark.parametrize("phase, step", [("StepGRPO", 3), ("StepGRPO", 1), ("warm-up", 1)])
def test_kill_9_and_resume_go_on_from_the_last_checkpoint(phase, step, straight, shapes_set, tmp_path):
    """What was logged after that checkpoint is dropped, since it is done again."""
    out = tmp_path / "run"
    with varied_rewards():
        with at_log(phase, step, killed), pytest.raises(Killed):
            run_main(*run_flags(out, shapes_set))
        assert (metrics(out)[-1]["phase"], metrics(out)[-1]["step"]) == (phase, step)
        assert run_main("--resume", "--out", out) == 0
    assert_same_run(straight, out)


def test_kill_9_while_the_checkpoint_is_written_or_renamed_loses_nothing(straight, shapes_set, tmp_path):
    out, rename = tmp_path / "run", Path.rename

    def torn(self, target):
        if self.name == "checkpoint.new" and Path(target).exists() is False and (out / "checkpoint.old").exists():
            raise Killed                                       # between the two renames: there is no checkpoint/ now
        return rename(self, target)
    with varied_rewards():
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Path, "rename", torn)
            run_main(*run_flags(out, shapes_set))
        assert not (out / "checkpoint").exists()
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(torch, "save", lambda *args: killed())           # half a new one
            run_main("--resume", "--out", out)
        assert (out / "checkpoint.new").exists() and (out / "checkpoint").exists()
        assert run_main("--resume", "--out", out) == 0
    assert_same_run(straight, out)


def test_resume_does_not_repeat_or_skip_a_question(straight, shapes_set, tmp_path):
    drawn, out, draw = [], tmp_path / "run", sg.draw
    with varied_rewards(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sg, "draw", lambda rows, number, *more: (
            drawn.extend(row.where for row in draw(rows, number, *more)) or draw(rows, number, *more)))
        run_main(*run_flags(tmp_path / "whole", shapes_set))
        whole = list(drawn)
        drawn.clear()
        with at_log("StepGRPO", 2, lambda: os.kill(os.getpid(), signal.SIGINT)):
            run_main(*run_flags(out, shapes_set))
        run_main("--resume", "--out", out)
    assert drawn == whole and len(set(whole)) == len(whole) == 2 * 4 + 4 * 2


def test_draw_uses_every_row_once_per_epoch_wherever_it_starts():
    rows = list(range(7))
    stream = sg.draw(rows, 21, 5, 0)
    assert [sorted(stream[i:i + 7]) for i in (0, 7, 14)] == [rows] * 3 and stream[:7] != stream[7:14]
    for start in range(15):
        assert sg.draw(rows, 6, 5, start) == stream[start:start + 6]
    assert sg.draw(rows, 21, 6, 0) != stream


def test_resume_of_a_finished_run_changes_nothing(straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    assert run_main("--resume", "--out", tmp_path / "run") == 0
    assert_same_run(straight, tmp_path / "run")


def test_resume_names_the_settings_it_changes_and_refuses_those_it_cannot(straight, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    assert run_main("--resume", "--out", out, "--lr", "0.5") == 0
    assert "lr 0.001 → 0.5" in capsys.readouterr().out
    for flag, value in (("--model", "R1-VL-2B"), ("--data", "other.json"), ("--seed", "7"), ("--warmup-data", "x")):
        assert f"{flag} cannot change on --resume" in run_main("--resume", "--out", out, flag, value)
    assert "nothing to resume" in run_main("--resume", "--out", tmp_path / "absent")


@pytest.mark.parametrize("flags", [
    ["--save-every", "3"], ["--micro-batch", "1"], ["--show-every", "4"],
    ["--offload-optimizer"]])
def test_resume_with_settings_that_do_not_change_the_result(flags, straight, shapes_set, tmp_path):
    out = tmp_path / "run"
    with varied_rewards():
        with at_log("StepGRPO", 2, lambda: os.kill(os.getpid(), signal.SIGINT)):
            assert run_main(*run_flags(out, shapes_set)) == 130
        assert run_main("--resume", "--out", out, *flags) == 0
    a, b = weights(straight / "checkpoint"), weights(out / "checkpoint")
    assert all(((a[name] - b[name]).abs() < 1e-5).float().mean() > 0.95 for name in a)


@pytest.mark.parametrize("offload", [False, True])
def test_resume_restores_the_masters_of_bf16_weights(offload, shapes_set, tmp_path):
    flags = dict(dtype="bfloat16", offload_optimizer=offload, lr=1e-5, warmup_steps=0)
    with varied_rewards():
        assert run_main(*run_flags(tmp_path / "whole", shapes_set, **flags)) == 0
        with at_log("StepGRPO", 3, lambda: os.kill(os.getpid(), signal.SIGINT)):
            assert run_main(*run_flags(tmp_path / "run", shapes_set, **flags)) == 130
        assert run_main("--resume", "--out", tmp_path / "run") == 0
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "run")
    states = [torch.load(tmp_path / name / "checkpoint" / "training_state.pt", weights_only=True)
              for name in ("whole", "run")]
    assert same(*states) and states[0]["optimizer"]["masters"][0].dtype == torch.float32


def test_resume_of_a_run_that_was_started_with_overwrite(straight, shapes_set, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    with varied_rewards():
        with at_log("StepGRPO", 1, lambda: os.kill(os.getpid(), signal.SIGINT)):
            assert run_main(*run_flags(out, shapes_set, overwrite=True)) == 130
        assert run_main("--resume", "--out", out) == 0
    assert metrics(out) == metrics(straight)


def test_a_line_separator_in_a_sampled_path_does_not_shift_the_logs_on_resume(straight, shapes_set, tmp_path):
    """str.splitlines also cuts at U+2028, U+0085 and others, which stand unescaped in the JSON of a sampled text."""
    out, decode = tmp_path / "run", sg.Processor.decode
    with varied_rewards(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sg.Processor, "decode", lambda self, ids: "a\u2028b\x85c" + decode(self, ids))
        with at_log("StepGRPO", 3, lambda: os.kill(os.getpid(), signal.SIGINT)):
            assert run_main(*run_flags(out, shapes_set)) == 130
        before = records(out / "samples.jsonl")
        assert run_main("--resume", "--out", out) == 0
    assert "\u2028" in before[0]["path"] and records(out / "samples.jsonl") == before and len(before) == 4


def test_more_steps_after_the_end_are_evaluated_again(shapes_set, tmp_path):
    """Resumed with more --steps, the table must not show the figures of the old end."""
    out = tmp_path / "run"
    assert run_main(*run_flags(out, shapes_set, steps=1, held_out=2)) == 0
    assert run_main("--resume", "--out", out, "--steps", 2) == 0
    names = [row["name"] for row in metrics(out) if row["phase"] == "evaluation"]
    assert Counter(names)["after, greedy"] == 2 and Counter(names)["before, greedy"] == 1


@pytest.mark.parametrize("phase", [
    "before", "after"])
def test_a_stop_during_an_evaluation_saves_and_goes_on(phase, shapes_set, tmp_path):
    def stop_in_evaluation(run, cfg, policy, processor, rows, name, temperature, *more):
        if name.startswith(phase) and not stopped:
            stopped.append(name)
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(run, cfg, policy, processor, rows, name, temperature, *more)
    evaluate, stopped, flags = sg.evaluate, [], dict(held_out=2, steps=3)
    with varied_rewards():
        assert run_main(*run_flags(tmp_path / "whole", shapes_set, **flags)) == 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sg, "evaluate", stop_in_evaluation)
            assert run_main(*run_flags(tmp_path / "run", shapes_set, **flags)) == 130
        state = torch.load(tmp_path / "run" / "checkpoint" / "training_state.pt", weights_only=True)
        assert state["step"] == {"before": 0, "after": 3}[phase]                    # no update is lost
        assert run_main("--resume", "--out", tmp_path / "run") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_second_ctrl_c_stops_at_once(shapes_set, tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    with at_log("warm-up", 1, twice):
        assert run_main(*run_flags(tmp_path / "run", shapes_set)) == 130
    assert not (tmp_path / "run" / "checkpoint").exists()
    assert len(metrics(tmp_path / "run")) == 1


def test_ctrl_c_in_a_terminal_saves_and_exits_with_130(shapes_set, tmp_path):
    """The real thing: a process of its own, interrupted once its log shows an update."""
    flags = run_flags(tmp_path / "run", shapes_set, steps=10_000, save_every=10_000, warmup_steps=0)
    process = subprocess.Popen([sys.executable, str(HERE / "stepgrpo.py"), *flags], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    log, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while not (log.exists() and log.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert f"--resume --out {tmp_path / 'run'}" in printed and "Traceback" not in printed
    state = torch.load(tmp_path / "run" / "checkpoint" / "training_state.pt", weights_only=True)
    assert state["step"] == len(metrics(tmp_path / "run")) > 0


def test_an_existing_run_is_never_overwritten_unasked(straight, shapes_set, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    refused = run_main(*run_flags(out, shapes_set))
    assert "--resume" in refused and "--overwrite" in refused
    assert_same_run(straight, out)
    assert "exclude each other" in run_main("--resume", "--overwrite", "--out", out)
    with varied_rewards():
        assert run_main(*run_flags(out, shapes_set, overwrite=True, steps=1)) == 0
    assert len(metrics(out)) == 3
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").write_text("years of work")
    assert "no run folder" in run_main(*run_flags(tmp_path / "papers", shapes_set, overwrite=True))
    assert (tmp_path / "papers" / "thesis.tex").exists()


def test_a_run_that_failed_before_training_does_not_block_the_next_one(shapes_set, tmp_path):
    """The user mends what the message names, and the same command works."""
    flags = run_flags(tmp_path / "run", shapes_set, warmup_steps=0, steps=1)
    bad = ["absent.json" if flag == str(shapes_set / "train.json") else flag for flag in flags]
    assert "absent.json does not exist" in run_main(*bad)
    assert run_main(*flags) == 0


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_non_finite_loss_stops_with_the_row_named_and_the_last_good_state(value, straight, shapes_set, tmp_path):
    out, losses, loss = tmp_path / "run", [], sg.grpo_loss

    def bad(*args):
        losses.append(1)
        good, stats = loss(*args)
        return good * float(value) if len(losses) == 3 else good, stats        # once per update here: in the third
    with varied_rewards():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sg, "grpo_loss", bad)
            refused = run_main(*run_flags(out, shapes_set))
        assert re.search(r"train\.json row \d+", refused) and "checkpoint" in refused
        state = torch.load(out / "checkpoint" / "training_state.pt", weights_only=True)
        assert (state["phase"], state["step"]) == ("StepGRPO", 2)
        model = AutoModelForImageTextToText.from_pretrained(out / "checkpoint")
        assert torch.isfinite(flat_weights(model)).all()
        assert run_main("--resume", "--out", out) == 0
    assert_same_run(straight, out)


def test_a_non_finite_loss_in_a_later_inner_update_saves_the_state_before_the_update(shapes_set, tmp_path):
    """With μ = 2 the first inner step has moved the weights when the second one fails."""
    flags = dict(inner_updates=2, steps=3)
    losses, loss = [], sg.grpo_loss

    def bad(*args):
        losses.append(1)
        good, stats = loss(*args)
        return good * float("nan") if len(losses) == 6 else good, stats        # the second inner step of update 3
    with varied_rewards():
        assert run_main(*run_flags(tmp_path / "whole", shapes_set, **flags)) == 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sg, "grpo_loss", bad)
            assert "row" in run_main(*run_flags(tmp_path / "run", shapes_set, **flags))
        assert run_main("--resume", "--out", tmp_path / "run") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_weights_that_ran_away_stop_with_one_line_and_a_finite_checkpoint(shapes_set, tmp_path):
    """A step of lr 1e38 gives weights whose next logits are not finite: sampling must not end in a traceback."""
    with varied_rewards():
        refused = run_main(*run_flags(tmp_path / "run", shapes_set, lr=3e38, warmup_steps=0, save_every=1))
    assert isinstance(refused, str) and refused.startswith("stepgrpo: ")


def test_an_image_torn_behind_its_header_stops_with_its_name_and_saves(shapes_set, tmp_path):
    """The validation reads headers only, so this one shows when its row is drawn."""
    rows = json.loads((shapes_set / "train.json").read_text())
    bad = tmp_path / "torn.jpg"
    noise_image(300, 200).save(bad)
    bad.write_bytes(bad.read_bytes()[:9000])
    for row in rows:
        row["image_path"] = str(shapes_set / row["image_path"])
    order = sg.draw(list(range(24)), 8, 0, 0)
    rows[order[7]]["image_path"] = str(bad)                    # drawn in the last of 4 updates
    (tmp_path / "data.json").write_text(json.dumps(rows))
    refused = run_main(*run_flags(tmp_path / "run", shapes_set, data=tmp_path / "data.json", warmup_steps=0,
                                  save_every=100, max_prompt_tokens=2000))
    assert "torn.jpg" in refused
    state = torch.load(tmp_path / "run" / "checkpoint" / "training_state.pt", weights_only=True)
    assert state["step"] == 3


def test_micro_batch_size_does_not_change_a_whole_run(straight, shapes_set, tmp_path):
    with varied_rewards():
        assert run_main(*run_flags(tmp_path / "run", shapes_set, micro_batch=1)) == 0
    for a, b in list(zip(metrics(straight), metrics(tmp_path / "run")))[:3]:      # then roundings sample
        a, b = ({name: value for name, value in row.items() if name != "phase"} for row in (a, b))
        assert b == pytest.approx(a, rel=1e-2, abs=1e-4)


# -- sampling and scoring of groups

class FakePolicy:
    device = torch.device("cpu")


def fake_rollout(monkeypatch, processor, text_of):
    """Sampling that returns text_of(number of the question, number of the path)."""
    count = itertools.count()

    def rollout(policy, processor, prompts, G, *more):
        texts = [[text_of(q, g) for g in range(G)] for q in itertools.islice(count, len(prompts))]
        ids = [[processor.path_ids(text) for text in group] for group in texts]
        return sg.Rollout(ids, texts, [[torch.zeros(len(path)) for path in group] for group in ids])
    monkeypatch.setattr(sg, "rollout", rollout)


def text_rows(answers):
    return [sg.Row(f"row {q}", f"question {q}", answer, "", [["x = 3"]], []) for q, answer in enumerate(answers)]


def test_each_question_is_scored_with_its_own_answer(loaded, monkeypatch):
    """[q0] × G + [q1] × G, and not q0's answer for both."""
    processor, rows = loaded["qwen2_vl"][1], text_rows(["4", "5", "6"])
    cfg = sg.Config(questions=3, group_size=2)
    fake_rollout(monkeypatch, processor, lambda q, g: a_path(answer="4" if g == 0 else "6"))
    groups, drawn, _ = sg.sample_groups(cfg, FakePolicy, processor, rows, 0, 0)
    right = {group.row.answer: [score["right"] for score in group.scores] for group in groups}
    assert right == {"4": [1, 0], "5": [0, 0], "6": [0, 1]} and drawn == 3
    for group in groups:
        expected = processor.prompt(sg.build_instruction(group.row.problem))
        assert torch.equal(group.prompt.ids, expected.ids)


def test_every_update_samples_with_random_numbers_of_its_own(loaded, shapes_set):
    """They are a function of seed and step: a resumed run draws the same, and no two updates draw the same."""
    model, processor = loaded["qwen2_vl"]
    rows = sg.read_rows(shapes_set / "train.json")[0][:1]

    def sample(seed, step):
        cfg = sg.Config(questions=1, group_size=3, max_new_tokens=6, seed=seed)
        return [path.tolist() for path in sg.sample_groups(cfg, model, processor, rows, step, 0)[0][0].ids]
    first = sample(0, 0)
    assert sample(0, 0) == first and sample(0, 1) != first != sample(1, 0)
    assert first[0] != first[1] != first[2]                    # nor do two paths of a group


@pytest.mark.parametrize("reward, expected", [("step", [2.1, 1.05, 0.0]), ("outcome", [1, 0, 0]),
                                              ("accuracy", [1.1, 0.05, 0]), ("validity", [1, 1, 0])])
def test_each_reward_of_the_ablation(reward, expected):
    row = sg.Row("", "?", "4", "", [["x = 3"], ["y = 4"]], [])
    texts = [a_path(answer="4"), a_path(steps=["x = 3"], answer="5"), "### Step 1:\nx = 3"]
    scores = [sg.score_path(text, row, sg.Config(reward=reward)) for text in texts]
    assert [score["reward"] for score in scores] == pytest.approx(expected)
    assert [score["k"] for score in scores] == [1, 0.5, 0.5]
    assert [(score["right"], score["step_validity"]) for score in scores] == [(1, 1), (0, 1), (0, 0)]


def test_flat_groups_are_counted_and_skipped_on_demand(loaded, monkeypatch):
    processor, rows = loaded["qwen2_vl"][1], text_rows(["4"] * 10)
    for skip, expected in ((False, (3, 3, 2)), (True, (3, 6, 3))):      # questions 0, 1 and 3 are flat
        fake_rollout(monkeypatch, processor, lambda q, g: a_path(answer="4" if g or q in (0, 1, 3) else "5"))
        cfg = sg.Config(questions=3, group_size=2, skip_flat_groups=skip)
        groups, drawn, flat = sg.sample_groups(cfg, FakePolicy, processor, rows, 0, 0)
        assert (len(groups), drawn, flat) == expected
        assert [group.is_flat() for group in groups] == ([False] * 3 if skip else [True, True, False])


def test_an_update_of_flat_groups_alone_teaches_nothing_and_goes_on(shapes_set, tmp_path, capsys):
    """A random model writes no valid path: every reward is 0, and with --skip-flat-groups no group is left."""
    assert run_main(*run_flags(tmp_path / "skip", shapes_set, reward="validity", skip_flat_groups=True, beta=0.0)) == 0
    assert "every group was flat" in capsys.readouterr().out
    assert [row["flat_groups"] for row in metrics(tmp_path / "skip")[2:]] == [8] * 4
    state = torch.load(tmp_path / "skip" / "checkpoint" / "training_state.pt", weights_only=True)
    assert state["drawn"] == 4 * 8
    assert run_main(*run_flags(tmp_path / "keep", shapes_set, reward="validity")) == 0
    rows = metrics(tmp_path / "keep")[2:]
    assert [row["flat_groups"] for row in rows] == [2] * 4 and all(row["reward_std"] == 0 for row in rows)
    for out in (tmp_path / "skip", tmp_path / "keep"):
        start, end = weights(out / "reference"), weights(out / "checkpoint")
        assert all(torch.allclose(start[name], end[name], atol=1e-4) for name in start)


def test_printed_lines_are_aligned_and_fit_120_columns():
    cfg = sg.Config(steps=13125)
    record = dict(step=1, questions=4, flat_groups=0, lr=1e-6, seconds=3.2, reward=1.0, right=0.5, k=0.25, kl=0.0,
                  step_validity=1.0, loss=-0.0, length=42.0)
    late = record | dict(step=13125, flat_groups=16, seconds=812.3, kl=1.2345, loss=0.1234, length=1024.0)
    lines = [sg.format_update(row, cfg) for row in (record, late)]
    assert len(lines[0]) == len(lines[1]) <= 120
    assert len(sg.format_update(record | {"questions": 0}, cfg)) <= 120


def test_a_shown_path_marks_sections_key_steps_and_rewards():
    row = sg.Row("f row 1", "How many?", "4", "", [["x = 3"], ["y = 5"]], [])
    texts = [a_path(answer="4"), a_path(answer="7") + "\n### Step 9:\nlate"]
    shown, wrong = (re.sub(" +", " ", sg.show_path(row, text, sg.score_path(text, row, sg.Config()), advantage))
                    for text, advantage in zip(texts, (1.5, -1.5)))
    for part in ("step 1 x = 3 ✓ x = 3", "missed y = 5", "answer 4 ✓", "+1.50", "reward 2.05", "A triangle.",
                 "Use the angle sum.", "How many?", "f row 1"):
        assert part in shown
    for part in ("7 ✗ (right: 4)", "StepRVR 0", "step 9 late", "-1.50"):
        assert part in wrong


# ─── 7. Settings ──────────────────────────────────────────────────────────────────────────────────────────────────────

def test_every_setting_is_read_somewhere_and_not_only_checked():
    source = inspect.getsource(sg).replace(inspect.getsource(sg.check_config), "")
    unread = [f.name for f in fields(sg.Config) if not re.search(rf"\bcfg\.{f.name}\b", source)]
    assert not unread


def test_help_explains_every_setting(capsys):
    for argv in (["--help"], ["--model", "Qwen2-VL-2B", "-h"]):
        with pytest.raises(SystemExit) as stop:
            sg.parse_config(argv)
        printed = capsys.readouterr().out
        assert stop.value.code == 0
        for f in fields(sg.Config):
            assert "--" + f.name.replace("_", "-") in printed and f.metadata["help"]


def test_defaults_are_the_papers_and_tiny_changes_what_its_preset_lists():
    paper, tiny = sg.parse_config(["--model", "Qwen2-VL-2B"]), sg.parse_config([])
    assert (paper.group_size, paper.temperature, paper.alpha, paper.beta, paper.lr) == (4, 1.2, 0.1, 0.04, 1e-6)
    assert (paper.max_new_tokens, paper.questions, paper.steps, paper.max_pixels) == (1024, 4, 13125, 400_000)
    assert (paper.warmup_batch, paper.warmup_lr, paper.warmup_steps, paper.inner_updates) == (128, 1e-5, -1, 1)
    assert paper.out == "runs/Qwen2-VL-2B" and tiny.out == "runs/tiny" and tiny.model == "tiny"
    assert all(getattr(tiny, name) == value for name, value in sg.TINY.items())
    assert sg.parse_config(["--lr=2e-4"]).lr == 2e-4                   # a flag wins over the preset, also with '='


@pytest.mark.parametrize("flags, message", [
    (["--group-size", "0"], "--group-size"), (["--temperature", "0"], "--temperature"), (["--lr", "0"], "--lr"),
    (["--lr", "nan"], "--lr"), (["--reward", "best"], "--reward"), (["--dtype", "float16"], "--dtype"),
    (["--questions", "0"], "--questions"), (["--micro-batch", "-1"], "--micro-batch"), (["--beta", "-1"], "--beta"),
    (["--clip", "1.5"], "--clip"), (["--clip", "0"], "--clip"), (["--warmup-steps", "-2"], "--warmup-steps"),
    (["--max-pixels", "100"], "--max-pixels"), (["--steps", "-1"], "--steps"), (["--alpha", "-0.1"], "--alpha"),
    (["--save-every", "0"], "--save-every"), (["--warmup-ratio", "1"], "--warmup-ratio"),
    (["--max-new-tokens", "0"], "--max-new-tokens"), (["--inner-updates", "0"], "--inner-updates"),
    (["--held-out", "-1"], "--held-out")])
def test_impossible_values_are_errors(flags, message, tmp_path):
    refused = run_main(*flags, "--out", tmp_path / "run")
    assert message in refused and not (tmp_path / "run").exists()


def test_all_impossible_values_are_named_at_once():
    with pytest.raises(sg.UserError, match="group-size.*temperature.*--lr"):
        sg.parse_config(["--group-size", "1", "--temperature", "-1", "--lr", "-1"])


@pytest.mark.parametrize("flags", [["--unknown"], ["--learning-rate", "1"], ["--step", "5"], ["--steps", "many"],
                                   ["--steps", "1.5"], ["stray"], ["--lr"]])
def test_unknown_flags_are_errors(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        sg.parse_config(flags)
    assert stop.value.code == 2 and "error:" in capsys.readouterr().err


@pytest.mark.parametrize("model, message", [
    ("Qwen2-VL-3B", "no model 'Qwen2-VL-3B'"), ("absent/deeper/x", "no model"), ("bert", "is a bert model"),
    ("Qwen2-VL-2B", "cannot load model Qwen/Qwen2-VL-2B-Instruct"), ("nobody/nothing", "cannot load model"),
    ("empty", "empty"),
    ("no-weights", "cannot load model"), ("no-images", "cannot load model"), ("torn-config", "cannot load model"),
    ("no-tokenizer", "no-tokenizer"),
    ("torn-weights", "torn-weights"),
])
def test_a_model_that_is_not_there_gives_one_clear_line(model, message, shapes_set, checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path(model)
    if model == "bert":
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "bert"}')
    elif model == "empty":
        folder.mkdir()
    elif model.startswith(("no-", "torn-")):
        shutil.copytree(checkpoints["qwen2_vl"], folder)
        for file in folder.glob({
                "no-weights": "*.safetensors*", "no-images": "preprocessor*", "torn-config": "config.json",
                "no-tokenizer": "[tvm][oe][kcr]*", "torn-weights": "*.safetensors"}[model]):
            file.unlink() if model.startswith("no-") else file.write_bytes(file.read_bytes()[:100])
    refused = run_main(*run_flags(tmp_path / "run", shapes_set, model=model, warmup_steps=0))
    assert message in refused and len(refused.splitlines()) == 1, refused


def test_offline_with_a_hub_id_gives_one_clear_line(shapes_set, tmp_path):
    """In a process of its own, with an empty cache, as a user behind a firewall has it."""
    flags = run_flags(tmp_path / "run", shapes_set, model="Qwen2.5-VL-3B", warmup_steps=0)
    done = subprocess.run([sys.executable, str(HERE / "stepgrpo.py"), *flags], capture_output=True, text=True,
                          timeout=120, env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")})
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "cannot load model Qwen/Qwen2.5-VL-3B-Instruct" in done.stderr.splitlines()[-1]


def test_a_device_that_is_not_there_gives_one_clear_line(shapes_set, tmp_path):
    for device in ("cuda:77", "gpu"):
        assert f"--device {device} is not there" in run_main(*run_flags(tmp_path / device, shapes_set, device=device))


# -- the promise of copy and paste

UNITS = ["build_instruction", "split_path", "final_answer", "same_answer", "parse_key_steps", "match_key_steps",
         "matched_key_steps", "step_accuracy_reward", "step_validity_reward", "group_advantages", "grpo_loss",
         "mrope_positions", "additive", "tempered_logps", "token_logps", "warmup_schedule", "fitted_size"]


def own_names(value):
    """The names of stepgrpo.py's own that a top-level function or assignment refers to."""
    tree = ast.parse(inspect.getsource(value) if callable(value) else value)
    defined = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return defined & TOP_LEVEL.keys()


def top_level():
    """Name → source of every top-level function, class and assignment of stepgrpo.py."""
    source, found = inspect.getsource(sg), {}
    for node in ast.parse(source).body:
        targets = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else [
            target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)]
        start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        found |= dict.fromkeys(targets, "\n".join(source.splitlines()[start - 1:node.end_lineno]))
    return found


TOP_LEVEL = top_level()


def pasted(unit):
    """The unit executed in an empty module with the imports and what it names, and nothing else of stepgrpo.py."""
    needed, queue = set(), [unit]
    while queue:
        name = queue.pop()
        if name not in needed:
            needed.add(name)
            queue += own_names(TOP_LEVEL[name])
    source = inspect.getsource(sg)
    lines = [ast.get_source_segment(source, node) for node in ast.parse(source).body
             if isinstance(node, (ast.Import, ast.ImportFrom))]
    lines += [text for name, text in TOP_LEVEL.items() if name in needed]                       # in the file's order
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pasted.py"
        file.write_text("\n\n".join(lines), encoding="utf-8")
        spec = importlib.util.spec_from_file_location("pasted", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return getattr(module, unit), needed


@pytest.mark.parametrize("unit", UNITS)
def test_a_pasted_unit_takes_plain_inputs_and_no_settings_or_files(unit):
    function, needed = pasted(unit)
    assert function.__doc__ or function.__name__ == "warmup_schedule"
    assert not needed & {"Config", "UserError", "HERE", "Processor", "TINY"}
    assert not {"args", "cfg", "config"} & set(inspect.signature(function).parameters)
    opened = {node.func.id for node in ast.walk(ast.parse(TOP_LEVEL[unit])) if isinstance(node, ast.Call)
              and isinstance(node.func, ast.Name)} & {"open", "print", "input"}
    assert not opened


def test_pasted_units_work():
    unit = {name: pasted(name)[0] for name in UNITS}
    text = a_path()
    assert "a?" in unit["build_instruction"]("a?")
    assert unit["split_path"](text).answer == unit["final_answer"](text) == "4"
    assert unit["same_answer"]("C", "(C) 5") and unit["parse_key_steps"](["a"]) == [["a"]]
    assert unit["match_key_steps"](text, [["x = 3"], ["z"]]) == 0.5 and unit["step_validity_reward"](text) == 1
    assert unit["matched_key_steps"](text, [["y = 4"]]) == [1]
    assert unit["step_accuracy_reward"](text, "4", [["x = 3"]]) == pytest.approx(1.1)
    A = unit["group_advantages"](torch.tensor([[0., 1.]]))
    loss, stats = unit["grpo_loss"](*[torch.zeros(2, 3)] * 3, A[0], torch.ones(2, 3))
    assert loss.item() == pytest.approx(0, abs=1e-6) and stats == {"kl": 0, "clip_fraction": 0, "ratio": 1}
    assert unit["mrope_positions"](torch.tensor([False, True, False]), torch.tensor([[1, 2, 2]]), 2).shape == (3, 3)
    assert unit["additive"](torch.tensor([True, False]), torch.float32)[0] == 0
    assert unit["tempered_logps"](torch.zeros(2), 1.0, torch.tensor([True, False])).tolist() == [-torch.inf, 0]
    logps = unit["token_logps"](torch.nn.Linear(2, 3), torch.zeros(4, 2), torch.zeros(4).long(), 1.0,
                                torch.zeros(3).bool())
    assert logps.shape == (4,) and unit["warmup_schedule"](1, 0) == pytest.approx(0)
    assert 3000 / 200 < unit["fitted_size"](10, 3000, 400_000)[0] <= 3000 / 100


@pytest.mark.parametrize("unit", UNITS[:9])
def test_the_docstring_of_a_unit_says_what_must_be_pasted_with_it(unit):
    missing = [name for name in own_names(TOP_LEVEL[unit]) - {unit} if name not in getattr(sg, unit).__doc__]
    assert not missing


def test_every_python_file_carries_its_licence():
    for file in (*HERE.glob("*.py"), *(HERE / "data").glob("*.py")):
        assert file.read_text(encoding="utf-8").startswith("# SPDX-License-Identifier: MIT\n"), file


# ─── 8. Data ──────────────────────────────────────────────────────────────────────────────────────────────────────────

KEYS_OF_4 = {"Steps": [["x = 3", "3 = x"], "y = 4"]}


def record(**changes):
    """A good R1-VL-10K record; None leaves a field out."""
    row = {"problem": "How many?", "solution": a_path(), "image_path": "a.png", "key_steps": KEYS_OF_4} | changes
    return {name: value for name, value in row.items() if value is not None}


def mulberry(text="How many?", path=None, images="a.png"):
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": path or a_path()}],
            "images": images}


@pytest.fixture
def folder(tmp_path):
    noise_image(84, 56).save(tmp_path / "a.png")
    noise_image(56, 56).save(tmp_path / "b.png")
    return tmp_path


@pytest.mark.parametrize("made, expected", [
    (record(), ("How many?", "4", [["x = 3", "3 = x"], ["y = 4"]], ["a.png"])),
    (record(solution="42"), ("How many?", "42", [["x = 3", "3 = x"], ["y = 4"]], ["a.png"])),     # a bare answer
    (record(solution=42), ("How many?", "42", [["x = 3", "3 = x"], ["y = 4"]], ["a.png"])),
    (record(key_steps=[KEYS_OF_4], image_path=["a.png", "b.png"]),
     ("How many?", "4", [["x = 3", "3 = x"], ["y = 4"]], ["a.png", "b.png"])),
    (record(key_steps=None, image_path=None), ("How many?", "4", [], [])),
    (mulberry("<image>How many?"), ("How many?", "4", [], ["a.png"])),
    (mulberry("<image>\n" + sg.build_instruction("How many?"), images=["a.png", "b.png"]),
     ("How many?", "4", [], ["a.png", "b.png"])),
])
def test_both_formats_are_read(made, expected, folder):
    row = sg.parse_record("file row 1", made, folder)
    images = [image.relative_to(folder).as_posix() for image in row.images]
    assert (row.problem, row.answer, row.key_steps, images) == expected
    assert row.where == "file row 1" and (row.path == a_path()) == (row.answer == "4")


BAD_ROWS = [
    (["no object"], "is no JSON object"), ({"problem": "?"}, "has no 'solution'"),
    ({}, "no 'problem' and no 'solution'"),
    (record(solution=""), "no answer"), (record(solution="### The final answer is:"), "no answer"),
    (record(solution=a_path(answer="** **")), "no answer"), (record(problem="<image>"), "problem is empty"),
    (record(image_path="absent.png"), "absent.png does not exist"), (record(problem=5), "must be text"),
    (record(key_steps={"Steps": [["a"], []]}), "group 2 is empty"), (record(key_steps={"Steps": []}), "not []"),
    (record(key_steps=[["a"], 5]), "group 2 is empty or no list"),
    (record(key_steps={"steps": []}), '"Steps", not None'),
    (record(solution=["4"]), "must be text"), (record(solution={}), "must be text"),
    ({"messages": 5}, "'messages' must hold"),
    ({"messages": [{"role": "user", "content": "?"}]}, "'messages' must hold"),
    (mulberry(images="absent.png"), "absent.png does not exist"), (mulberry(path="### Step 1: a"), "no answer"),
]


@pytest.mark.parametrize("made, message", BAD_ROWS)
def test_a_bad_row_is_an_error_that_says_what_is_wrong(made, message, folder):
    with pytest.raises(ValueError, match=re.escape(message)):
        sg.parse_record("file row 1", made, folder)


@pytest.mark.parametrize("images", [5, [5], {"a": 1}, [None], [["a.png"]], pytest.param(
    "a" * 5000 + ".png", id="long")])
def test_an_image_field_of_the_wrong_kind_is_an_error_of_its_row(images, folder):
    for made in (record(image_path=images), mulberry(images=images)):
        with pytest.raises(ValueError):
            sg.parse_record("file row 1", made, folder)


def test_an_image_field_of_null_does_not_crash(folder):
    made = [record() | {"image_path": None}, mulberry() | {"images": None}]
    for one in made:
        try:
            assert sg.parse_record("file row 1", one, folder).images == []
        except ValueError:
            pass                                               # an error that is collected by row will do as well


def test_all_bad_rows_are_reported_at_once_by_file_and_row_before_training(folder, checkpoints, capsys):
    rows = [record(), record(solution=""), record(image_path="absent.png"), record(key_steps={"Steps": [[]]}),
            record(problem="long " * 3000), record(key_steps=None), record(), record()]
    data, warm = folder / "data.jsonl", folder / "warm.json"
    data.write_text("\n".join(map(json.dumps, rows)))
    warm.write_text(json.dumps([mulberry(), mulberry(images="gone.png")]))
    (folder / "torn.png").write_bytes(b"nothing")
    flags = ["--model", checkpoints["qwen2_vl"], "--data", data, "--warmup-data", warm, "--warmup-steps", 1,
             "--steps", 1, "--warmup-batch", 1, "--questions", 1, "--group-size", 2, "--max-new-tokens", 4,
             "--held-out", 0, "--device", "cpu"]
    refused = run_main(*flags, "--out", folder / "run1")
    for line, message in ((2, "no answer"), (3, "absent.png"), (4, "group 1 is empty"),
                          (5, "--max-prompt-tokens is 2048"), (6, "no key_steps")):
        assert re.search(rf"data\.jsonl line {line}: .*{re.escape(message)}", refused), line
    assert "warm.json row 2: image" in refused and "6 rows cannot be used" in refused and "--skip-bad-rows" in refused
    assert not (folder / "run1").exists()                  # so that the mended command is not refused
    assert run_main(*flags, "--out", folder / "run2", "--skip-bad-rows") == 0
    printed = capsys.readouterr().out
    assert "skipped 6 bad rows" in printed and "3 questions, 1 warm-up paths" in printed


def test_a_prompt_too_long_is_an_error_that_names_the_row_and_nothing_is_cut(loaded, folder):
    processor = loaded["qwen2_vl"][1]
    row = sg.parse_record("data.json row 7", record(problem="Why? " * 50, image_path=["a.png", "b.png"]), folder)
    prompt = sg.make_prompt(processor, row, sg.Config(instruction=False))
    text = processor.tokenizer.decode(prompt.ids)
    assert text.count("Why? ") == 50 - 1 and text.endswith("Why?<|im_end|>\n<|im_start|>assistant\n")
    exact = len(prompt.ids)
    for limit, fine in ((exact, True), (exact - 1, False)):
        cfg = sg.Config(instruction=False, max_prompt_tokens=limit)
        if fine:
            assert sg.validate(([row],), [], processor, cfg) == [[row]]
        else:
            with pytest.raises(sg.UserError, match=rf"data.json row 7: the prompt has {exact} tokens"):
                sg.validate(([row],), [], processor, cfg)


def test_an_unreadable_image_is_reported_with_its_row_before_training(loaded, folder):
    (folder / "torn.png").write_bytes(b"no image")
    row = sg.parse_record("data.json row 3", record(image_path="torn.png"), folder)
    with pytest.raises(sg.UserError, match="data.json row 3: .*torn.png"):
        sg.validate(([row],), [], loaded["qwen2_vl"][1], sg.Config())


def test_the_images_of_a_row_reach_the_prompt_in_order_and_upright(loaded, folder):
    processor = loaded["qwen2_vl"][1]
    row = sg.parse_record("", record(image_path=["b.png", "a.png"]), folder)
    prompt = sg.make_prompt(processor, row, sg.Config())
    images = [Image.open(folder / name).convert("RGB") for name in ("b.png", "a.png")]
    expected = processor.prompt(sg.build_instruction("How many?"), images)
    assert torch.equal(prompt.pixels, expected.pixels) and torch.equal(prompt.ids, expected.ids)


def test_mulberry_rows_lose_image_marker_and_instruction_and_reflective_ones_are_dropped_and_counted(folder, capsys):
    reflective = a_path(steps=[f"x = 5\n{sg.REFLECTIVE}", "x = 3"])
    warm, data = folder / "warm.json", folder / "data.json"
    warm.write_text(json.dumps([mulberry("<image>" + sg.build_instruction("One?")), mulberry(path=reflective),
                                mulberry("<image>\nTwo?"), mulberry(path=reflective)]))
    data.write_text(json.dumps([record()]))
    cfg = sg.Config(model="m", data=str(data), warmup_data=str(warm), held_out=0)
    train, warmup, test, complaints = sg.load_data(cfg)
    assert [row.problem for row in warmup] == ["One?", "Two?"] and not complaints and not test and len(train) == 1
    assert "2 of 4 paths left out" in capsys.readouterr().out


def test_the_held_out_questions_of_ones_own_data_are_never_trained_on(folder, capsys):
    """Also not in the warm-up, and not where the same question stands twice."""
    rows = [record(problem=f"Question {i % 25}?", image_path="ab"[i % 2] + ".png") for i in range(60)]
    data, warm = folder / "data.json", folder / "warm.json"
    data.write_text(json.dumps(rows))
    warm.write_text(json.dumps([mulberry(row["problem"], images=row["image_path"]) for row in rows]))
    cfg = sg.Config(model="m", data=str(data), warmup_data=str(warm), held_out=5)
    splits = sg.load_data(cfg)[:3]
    train, warmup, test = ({(row.problem, *row.images) for row in rows} for rows in splits)
    assert len(splits[2]) == 5 and train and warmup and not test & train and not test & warmup
    assert train | test == {(row.problem, *row.images) for row in sg.read_rows(data)[0]}
    assert splits == sg.load_data(cfg)[:3]                     # by seed, so that a resumed run holds out the same
    sg.load_data(sg.Config(model="m", data=str(data), held_out=200))
    assert "held out: 6 questions" in capsys.readouterr().out  # at most a tenth


def test_a_held_out_image_named_by_another_path_is_not_trained_on_in_the_warm_up(folder):
    rows = [record(problem=f"Question {i}?") for i in range(20)]
    (folder / "data.json").write_text(json.dumps(rows))
    (folder / "warm").mkdir()
    paths = [mulberry(row["problem"], images="../a.png") for row in rows]
    (folder / "warm" / "warm.json").write_text(json.dumps(paths))
    _, warmup, test, _ = sg.load_data(sg.Config(model="m", data=str(folder / "data.json"), held_out=2,
                                                warmup_data=str(folder / "warm" / "warm.json")))
    assert test and not {row.problem for row in test} & {row.problem for row in warmup}


def test_a_file_that_cannot_be_read_gives_one_clear_line(folder):
    (folder / "torn.json").write_text('[{"problem": ')
    (folder / "dict.json").write_text('{"problem": 1}')
    (folder / "latin.json").write_bytes(b'["\xe9"]')
    for name, message in (("torn.json", "cannot read"), ("dict.json", "no list"), ("latin.json", "cannot read"),
                          ("absent.json", "does not exist"), ("owner/set", "cannot get data set")):
        source = name if "/" in name else str(folder / name)
        with pytest.raises(sg.UserError, match=message) as refused:
            sg.read_rows(source)
        assert len(str(refused.value).splitlines()) == 1 and name in str(refused.value)


def test_a_broken_line_of_jsonl_is_named_by_its_line_and_can_be_skipped(folder):
    (folder / "data.jsonl").write_text("\n".join([json.dumps(record()), "", '{"problem": ', json.dumps(record())]))
    try:
        rows, complaints = sg.read_rows(folder / "data.jsonl")
    except sg.UserError as problem:
        pytest.fail(f"the whole file is refused: {problem}")
    assert len(rows) == 2 and len(complaints) == 1 and "data.jsonl line 3" in complaints[0]


def test_line_separators_inside_a_jsonl_string_do_not_cut_a_row_either(folder):
    text = json.dumps(record(problem="a\u2028b\x85c"), ensure_ascii=False)
    (folder / "data.jsonl").write_text(text + "\r\n\n" + text + "\n", encoding="utf-8")
    rows, complaints = sg.read_rows(folder / "data.jsonl")
    assert [row.problem for row in rows] == ["a\u2028b\x85c"] * 2 and not complaints


def test_data_without_key_steps_serves_the_rewards_that_need_none(folder):
    (folder / "data.json").write_text(json.dumps([record(key_steps=None)] * 3))
    for reward, bad in (("step", 3), ("accuracy", 3), ("outcome", 0), ("validity", 0)):
        _, _, _, complaints = sg.load_data(sg.Config(data=str(folder / "data.json"), reward=reward, held_out=0))
        assert len(complaints) == bad and all("--reward outcome" in complaint for complaint in complaints)
    row = sg.read_rows(folder / "data.json")[0][0]
    assert sg.score_path(a_path(), row, sg.Config(reward="outcome"))["reward"] == 1


def test_steps_need_paths_and_a_run_needs_questions(folder, checkpoints, shapes_set, tmp_path):
    (folder / "data.json").write_text("[]")
    flags = ["--model", checkpoints["qwen2_vl"], "--device", "cpu", "--held-out", 0]
    assert "no questions" in run_main(*flags, "--data", folder / "data.json", "--out", tmp_path / "run1")
    assert "--warmup-data" in run_main(*flags, "--data", shapes_set / "train.json", "--warmup-steps", 5,
                                       "--out", tmp_path / "run2")


def test_warm_up_of_minus_one_is_two_epochs(folder, checkpoints, shapes_set, tmp_path):
    warm = json.loads((shapes_set / "warmup.json").read_text())[:5]
    (shapes_set / "five.json").write_text(json.dumps(warm))
    flags = ["--model", checkpoints["qwen2_vl"], "--device", "cpu", "--held-out", 0, "--steps", 0,
             "--data", shapes_set / "train.json", "--warmup-data", shapes_set / "five.json", "--warmup-batch", 4]
    assert run_main(*flags, "--out", tmp_path / "run") == 0
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3]         # 10 paths, 4 at a time


def test_the_warm_up_learns_the_answer_tokens_only(small_model, shapes_set, tmp_path, monkeypatch):
    """Its loss is the mean over all tokens of the paths, whatever the micro-batch, and the prompt is no target."""
    model, processor = small_model
    rows = sg.read_rows(shapes_set / "warmup.json")[0][:4]
    cfg = sg.Config(warmup_steps=2, warmup_batch=4, micro_batch=3, out=str(tmp_path / "run"), instruction=False,
                    save_every=100, warmup_lr=1e-4)

    def naive():
        pairs = [(sg.make_prompt(processor, row, cfg), processor.path_ids(row.path)) for row in rows]
        return torch.cat([naive_logps(model, processor, *pair) for pair in pairs]).mean().item()
    before = naive()
    run = sg.Run(cfg)
    run.open()
    sg.warm_up(run, cfg, model, processor, rows, sg.MasterAdamW(model))
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(-before, rel=1e-4)
    assert naive() > before


def test_a_flawless_copy_of_the_reference_earns_everything(shapes_set):
    for row in sg.read_rows(shapes_set / "train.json", needs_key_steps=True)[0]:
        for reward, best in (("step", 2.1), ("outcome", 1), ("accuracy", 1.1), ("validity", 1)):
            assert sg.score_path(row.path, row, sg.Config(reward=reward))["reward"] == pytest.approx(best)


# -- data/shapes.py

def test_shapes_are_the_same_files_for_the_same_seed(tmp_path):
    def draw(name, seed):
        subprocess.run([sys.executable, str(HERE / "data" / "shapes.py"), "--out", str(tmp_path / name), "--train", "6",
                        "--warmup", "8", "--test", "4", "--seed", str(seed)], check=True, stdout=subprocess.PIPE)
        files = sorted(file for file in (tmp_path / name).rglob("*") if file.is_file())
        return {file.relative_to(tmp_path / name).as_posix(): file.read_bytes() for file in files}
    first = draw("a", 3)
    assert len(first) == 3 + 6 + 8 + 4 and first == draw("b", 3) and first != draw("c", 4)


def test_no_image_of_a_held_out_question_occurs_anywhere_else(tmp_path):
    shapes.make_shapes(tmp_path, train=150, warmup=250, test=100, seed=1)
    pixels = {}
    for split in ("train", "warmup", "test"):
        rows = json.loads((tmp_path / f"{split}.json").read_text())
        names = [row["images"] if split == "warmup" else row["image_path"] for row in rows]
        assert len(set(names)) == len(rows)
        pixels[split] = []
        for name in names:
            with Image.open(tmp_path / name) as image:
                pixels[split].append((image.size, image.tobytes()))
    assert [len(pixels[split]) for split in ("train", "warmup", "test")] == [150, 250, 100]
    held_out = set(pixels["test"])
    assert len(held_out) == 100 and not held_out & {*pixels["train"], *pixels["warmup"]}


def test_every_reference_path_of_the_shapes_is_flawless(shapes_set):
    for split in ("train", "test"):
        rows, complaints = sg.read_rows(shapes_set / f"{split}.json", needs_key_steps=True)
        assert not complaints and len(rows) == {"train": 24, "test": 16}[split]
        for row in rows:
            assert sg.step_validity_reward(row.path) == 1 and sg.match_key_steps(row.path, row.key_steps) == 1
            assert sg.step_accuracy_reward(row.path, row.answer, row.key_steps) == pytest.approx(1.1)


def read_scene(image):
    """What the pixels show: column → from the top, the (colour, shape) in each cell that holds something."""
    names, size, columns = {rgb: name for name, rgb in shapes.COLOURS.items()}, shapes.CELL, {}
    for x, y in itertools.product(range(image.width // size), range(image.height // size)):
        cell = image.crop((x * size, y * size, (x + 1) * size, (y + 1) * size))
        pixels = enumerate(zip(*[iter(cell.tobytes())] * 3))
        found = [(i % size, i // size, names[rgb]) for i, rgb in pixels if rgb in names]
        if found:
            left, top, colours = (set(part) for part in zip(*found))
            filled = len(found) / ((max(left) - min(left) + 1) * (max(top) - min(top) + 1))
            shape = "square" if filled > 0.9 else "circle" if filled > 0.65 else "triangle"
            (colour,) = colours
            columns.setdefault(x, []).append((colour, shape))
    return columns


def test_answers_and_key_steps_of_the_shapes_are_what_the_image_shows(shapes_set):
    kinds = Counter()
    for row in json.loads((shapes_set / "train.json").read_text()) + json.loads((shapes_set / "test.json").read_text()):
        with Image.open(shapes_set / row["image_path"]) as image:
            seen = read_scene(image.convert("RGB"))
        problem, answer = row["problem"], int(sg.final_answer(row["solution"]))
        equation = row["key_steps"]["Steps"][2][0]
        if problem.startswith("Subtract"):
            word = re.search(r"all (\w+?)(?: things|s)\.", problem)[1]
            kind = "colour" if word in shapes.COLOURS else "shape"
            objects = sum(seen.values(), [])
            removed = sum(word in thing for thing in objects)
            assert removed and answer == len(objects) - removed and equation == f"{len(objects)} - {removed} = {answer}"
        else:
            kind = "sum" if "together" in problem else "taller"
            heights = dict(zip(("left", "middle", "right"), (len(column) for _, column in sorted(seen.items()))))
            a, b = (heights[place] for place in re.findall(r"the (\w+) bar", problem))
            assert answer == (a + b if kind == "sum" else a - b) >= 0
            assert equation == f"{a} {'+' if kind == 'sum' else '-'} {b} = {answer}"
        kinds[kind] += 1
        assert all(sg.match_key_steps(a_path(steps=[form]), [group]) == 1
                   for group in row["key_steps"]["Steps"] for form in group)
    assert set(kinds) == set(shapes.SLIPS)


def test_the_demonstrations_hold_slips_in_the_stated_shares():
    rng, made = random.Random(0), {kind: Counter() for kind in shapes.SLIPS}
    for _ in range(6000):
        scene = rng.choice((shapes.ObjectScene, shapes.BarScene))(rng)
        path = shapes.reference_path(scene, shapes.draw_slip(scene.kind, rng), rng)
        sections, truth = sg.split_path(path), sg.final_answer(shapes.reference_path(scene))
        kind = ("no rationale" if sections.rationale is None else
                "order" if [name for name in sections.order if "step" in name] != ["step 1", "step 2", "step 3"] else
                "wrong" if not sg.same_answer(sections.answer, truth) else "right")
        made[scene.kind][kind] += 1
        assert sg.step_validity_reward(path) == (kind in ("wrong", "right"))
        assert (sg.match_key_steps(path, scene.key_steps()) == 1) == (kind != "wrong")
    for kind, slips in shapes.SLIPS.items():
        stated = Counter({name: share for name, share in slips if name in ("no rationale", "order")})
        stated["wrong"] = sum(share for name, share in slips if name not in stated)
        stated["right"] = 1 - sum(stated.values())
        total = sum(made[kind].values())
        for name, share in stated.items():
            assert abs(made[kind][name] / total - share) < 4 * (share * (1 - share) / total) ** .5, (kind, name)


def test_one_object_is_one_image_token_and_the_background_is_dark_to_the_model(shapes_set, loaded):
    processor = loaded["qwen2_vl"][1]
    row = sg.read_rows(shapes_set / "train.json")[0]
    objects = next(r for r in row if r.problem.startswith("Subtract"))
    with Image.open(objects.images[0]) as image:
        cells = image.width // shapes.CELL * (image.height // shapes.CELL)
        assert processor.prompt("Hi", [image.convert("RGB")]).is_image.sum() == max(cells, 4)     # at least min_pixels
    blank = processor.prompt("Hi", [Image.new("RGB", (84, 84), shapes.BACKGROUND)])
    assert blank.pixels.abs().max() < 0.05


def test_key_steps_by_rule_fit_the_rewards_of_the_same_path(shapes_set):
    """data/key_steps.py and match_key_steps each know the template: what one extracts, the other must find."""
    for row in sg.read_rows(shapes_set / "train.json")[0]:
        groups = ks.extract_key_steps(row.path)
        assert sg.parse_key_steps(groups) == groups and len(groups) >= 2
        earned, cap = sg.matched_key_steps(row.path, groups), max(2, -(-len(groups) // 3))
        missed = [group for group, step in zip(groups, earned) if step is None]
        full = {step for step in earned if earned.count(step) == cap}
        for group in missed:                                   # only the cap of its step may have turned it away
            home = sg.matched_key_steps(row.path, [group])[0]
            assert home is not None and home in full, (group, row.path)
        assert sg.match_key_steps(row.path, groups) >= 2 / 3


# -- the default command, and those of the READMEs

def test_the_default_command_draws_its_data_trains_and_shows_the_table(tmp_path, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "shapes.py").write_text(              # the real script, drawing less
        "import importlib.util, pathlib\n"
        f"spec = importlib.util.spec_from_file_location('shapes', {str(HERE / 'data' / 'shapes.py')!r})\n"
        "shapes = importlib.util.module_from_spec(spec); spec.loader.exec_module(shapes)\n"
        "shapes.make_shapes(pathlib.Path(__file__).parent / 'shapes', 20, 30, 10, 0)\n")
    monkeypatch.setattr(sg, "HERE", tmp_path)                  # so that nothing is drawn into the repository
    monkeypatch.chdir(tmp_path)
    assert run_main("--warmup-steps", 2, "--steps", 1, "--held-out", 8, "--warmup-batch", 4, "--questions", 2,
                    "--group-size", 2, "--max-new-tokens", 16, "--device", "cpu") == 0
    printed, out = capsys.readouterr().out, tmp_path / "runs" / "tiny"
    assert "drawing the shapes data set" in printed and "held-out, 8 questions" in printed
    for row in ("greedy, warm-up", "greedy, StepGRPO", "sampled at T = 1, warm-up", "sampled at T = 1, StepGRPO"):
        assert re.search(rf"^{row} +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+$", printed, re.M)
    assert re.search(r"^right +[\d.]+ [▁▂▃▄▅▆▇█]+ [\d.]+$", printed, re.M)
    assert {"config.json", "metrics.jsonl", "samples.jsonl", "checkpoint"} <= {file.name for file in out.iterdir()}
    phases = [row["phase"] for row in metrics(out)]
    assert phases == ["warm-up"] * 2 + ["evaluation"] * 2 + ["StepGRPO"] + ["evaluation"] * 2
    model = AutoModelForImageTextToText.from_pretrained(out / "checkpoint")
    assert 5e5 < sum(p.numel() for p in model.parameters()) < 2e6 and model.config.model_type == "qwen2_vl"
    tokenizer = AutoTokenizer.from_pretrained(out / "checkpoint")
    for text in ("### Step 1:\nThere are 7 objects.", "naïve ½ 日本 🙂"):      # byte-level: no unknown characters
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert run_main("--resume") == 0                           # and the last line it prints in such a case works too


def test_evaluation_is_reproducible_and_leaves_the_random_numbers_of_training_alone(shapes_set, tmp_path):
    with varied_rewards():
        for name, held_out in (("a", 4), ("b", 4), ("c", 0)):
            assert run_main(*run_flags(tmp_path / name, shapes_set, held_out=held_out, steps=2)) == 0
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    names = [row["name"] for row in metrics(tmp_path / "a") if row["phase"] == "evaluation"]
    assert names == [f"{when}, {how}" for when in ("before", "after") for how in ("greedy", "sampled at T = 1")]


COMMANDS = [(file.relative_to(HERE).as_posix(), command)
            for file in (HERE / "README.md", HERE / "data" / "README.md") if file.exists()
            for block in re.findall(r"^```bash\n(.*?)^```", file.read_text(encoding="utf-8"), re.M | re.S)
            for line in block.replace("\\\n", " ").splitlines()
            for command in re.split(r"&&|;|\|", line.split(" #")[0]) if command.strip().startswith("python ")]


@pytest.mark.skipif(not (HERE / "README.md").exists(), reason="README.md is not written yet")
def test_the_readme_shows_the_default_command_and_the_tests():
    commands = [command.strip() for file, command in COMMANDS if file == "README.md"]
    assert "python stepgrpo.py" in commands and any("pytest" in command for command in commands)


@pytest.mark.parametrize("file, command", COMMANDS, ids=[command.strip() for _, command in COMMANDS])
def test_a_command_of_the_readmes_is_accepted(file, command, tmp_path, monkeypatch):
    _, script, *flags = shlex.split(command)
    if script == "-m":
        assert flags[0] in ("venv", "pytest") and (flags[0] == "venv" or all((HERE / f).exists() for f in flags[1:]
                                                                              if f.endswith(".py")))
        return
    assert (HERE / script).is_file(), f"{file}: {script} is not there"
    monkeypatch.chdir(tmp_path)
    if script == "stepgrpo.py":
        try:
            assert sg.parse_config(flags)
        except sg.UserError as problem:
            assert "--resume" in flags and "nothing to resume" in str(problem)
    elif script == "data/key_steps.py":
        monkeypatch.setenv("OPENAI_API_KEY", "x")
        assert ks.read_arguments(flags)
    else:
        helped = subprocess.run([sys.executable, str(HERE / script), "--help"], capture_output=True, text=True,
                                check=True)
        assert all(flag in helped.stdout for flag in flags if flag.startswith("--"))


def test_the_example_of_the_data_readme_is_a_good_row(folder):
    text = (HERE / "data" / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```json\n(.*?)^```", text, re.M | re.S)
    made = json.loads(example)
    (folder / made["image_path"]).parent.mkdir(parents=True, exist_ok=True)
    noise_image(56, 56).save(folder / made["image_path"])
    row = sg.parse_record("README", made, folder)
    assert sg.step_accuracy_reward(row.path, row.answer, row.key_steps) == pytest.approx(1.1)
    assert sg.step_validity_reward(row.path) == 1


# ─── 9. data/key_steps.py ─────────────────────────────────────────────────────────────────────────────────────────────

SHORT_INSTRUCTION = (
    "Generate an image description based on the question.\n\nFormat your response with the following sections, "
    "separated by ###:\n### Image Description:\n### Rationales:\n### Let's think step by step.\n### Step 1:\n"
    "### Step 2:\n...\n### The final answer is: \n\n")


def path_of(n: int) -> str:
    return (f"### Image Description:\nThe image shows {n} metal objects.\n### Rationales:\nSubtract the red balls.\n"
            f"### Let's think step by step.\n### Step 1:\nThere are {n} objects.\n### Step 2: Take away 3 red balls: "
            f"{n} - 3 = {n - 3}.\n### The final answer is: {n - 3}")


def rows_of(count: int) -> list[dict]:
    return [{"problem": f"How many are left of {n}?", "solution": path_of(n), "image_path": f"images/{n}.png"}
            for n in range(10, 10 + count)]


def write_rows(path: Path, rows: list) -> Path:
    lines = "\n".join(map(json.dumps, rows)) + "\n"
    path.write_text(json.dumps(rows) if path.suffix == ".json" else lines, encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def good_reply(prompt: str) -> str:
    n = int(re.search(r"There are (\d+) objects", prompt)[1])
    if prompt.startswith(ks.AUGMENT):
        return json.dumps({f"{n} objects": [f"{n} things", str(n)], f"{n} - 3 = {n - 3}": [f"{n} minus 3 is {n - 3}"]})
    extra = ', "purple unicorn"' if prompt.startswith(ks.EXTRACT) else ""
    return (f'Image Description: ["metal objects"]; Rationales: ["red balls"]; '
            f'Step 1: ["{n} objects"{extra}], Step 2: ["{n} - 3 = {n - 3}"]')


class FakeEndpoint:
    """An OpenAI-compatible server in a thread. Faults go first: (status, headers, text), 'hang' or a reply."""

    def __init__(self):
        self.asked, self.paths, self.keys, self.faults = [], [], [], deque()
        self.answers_left, self.closing = 10 ** 9, threading.Event()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.asked.append(body["messages"][0]["content"])
                fake.paths.append(self.path)
                fake.keys.append(self.headers["Authorization"])
                fault = fake.faults.popleft() if fake.faults else good_reply(fake.asked[-1])
                fake.answers_left -= 1
                if fault == "hang" or fake.answers_left < 0:
                    fake.closing.wait()
                    return
                reply = {"choices": [{"message": {"content": fault}, "finish_reason": "stop"}]}
                status, headers, text = fault if isinstance(fault, tuple) else (200, {}, json.dumps(reply))
                with contextlib.suppress(ConnectionError):
                    self.send_response(status)
                    for name, value in {"Content-Length": str(len(text.encode())), **headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(text.encode())

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    fake = FakeEndpoint()
    yield fake
    fake.close()


def llm_arguments(source: Path, out: Path, url: str, *more: str) -> list[str]:
    return [str(source), str(out), "--llm", url, "--llm-model", "m", "--backoff", "0.01", "--retries", "2", *more]


# -- by rule

@pytest.mark.parametrize("step, groups", [
    ("There are 7 objects.", [["7 objects", "seven objects"]]),
    ("7 - 3 = 4", [["7 - 3 = 4", "7 minus 3 equals 4"]]),                       # never '4' alone
    ("3 + 4 = 7", [["3 + 4 = 7", "3 plus 4 equals 7", "4 + 3 = 7"]]),
    ("6 divided by 3 equals 2", [["6 divided by 3 equals 2", "6 / 3 = 2"]]),
    (r"So $\frac{6}{3} = 2$.", [[r"\frac{6}{3} = 2", "6 / 3 = 2", "6 divided by 3 equals 2"]]),
    (r"7 - 3 = \boxed{4}", [["7 - 3 = 4", "7 minus 3 equals 4"]]),
    ("Hence (7 - 3 = 4).", [["7 - 3 = 4", "7 minus 3 equals 4"]]),
    ("7 km - 3 km = 4 km", [["7 km - 3 km = 4", "7 - 3 = 4", "7 minus 3 equals 4"]]),
    ("Area = 3 × 4 = 12", [["Area = 3 × 4 = 12", "Area = 3 * 4 = 12", "3 * 4 = 12", "Area = 12"]]),
    ("2(3 + 4) = 14", [["2(3 + 4) = 14"]]),
    ("It holds 1/2 cup, which is 50%.", [["1/2 cup", "0.5 cup"], ["50%", "50 percent"]]),
    ("The radius is 5.", [["radius is 5", "radius = 5"]]),
    ("The angle is 90° wide.", [["90°", "90 degrees"]]),
    ("Look at the large metal cube.", [["large metal cube"]]),
    ("The triangle is not a right triangle.", [["triangle"]]),                  # a denied phrase is no key step
    ("Subtract 3 from 7.", []),                                                 # bare numbers are found by accident
    ("There are 2 dogs, 3 cats, 4 cows and 5 pigs.",
     [["2 dogs", "two dogs"], ["3 cats", "three cats"], ["4 cows", "four cows"]]),          # capped
])
def test_key_steps_of_one_step(step, groups):
    assert ks.extract_key_steps(f"### Step 1: {step}") == groups


def test_key_steps_come_from_steps_only_and_never_twice():
    path = path_of(7).replace("### The final", "### Step 3: Again 7 objects, seven objects.\n### The final")
    groups = ks.extract_key_steps(path + "\n### Step 9: 5 green cones")
    assert groups == [["7 objects", "seven objects"], ["7 - 3 = 4", "7 minus 3 equals 4"],
                      ["3 red balls", "three red balls"]]
    assert groups == ks.extract_key_steps(path)
    forms = [ks.fold(form) for group in groups for form in group]
    assert len(forms) == len(set(forms))
    assert ks.extract_key_steps("The answer is 4.") == []


@pytest.mark.parametrize("text", ["1+" * 20000, "(" * 20000, "a" * 40000, "a " * 20000, "\\frac{" * 5000, "3 a" * 9000,
                                  "1" * 5000 + "/" + "2" * 5000 + "\n### Step " + "9" * 5000 + ": a",
                                  "= " * 20000, "Step 1: [" + '"a",' * 9000, 'Step 1: ["' + "\\" * 20000, "' " * 20000])
def test_hostile_text_is_read_in_time(text):
    start = time.perf_counter()
    ks.extract_key_steps("### Step 1: " + text)
    for attempt in (lambda: ks.read_elements(text, {"step 1": "a"}), lambda: ks.read_forms(text, ["a"])):
        with contextlib.suppress(ks.TryAgain):
            attempt()
    assert time.perf_counter() - start < 1


def test_docstring_examples():
    assert doctest.testmod(ks).failed == 0


def test_by_rule_end_to_end(tmp_path, capsys):
    rows = rows_of(3)
    rows[1]["solution"] = "### Step 1: 7 balls.\nI think I have made a mistake. Let me rethink it.\n### Step 2: 8."
    rows += [{"problem": "p", "solution": "42", "image_path": "a.png"}, {"problem": "p"}, ["no row"], {"messages": 5}]
    source = write_rows(tmp_path / "in.jsonl", rows)
    (tmp_path / "deep").mkdir()
    out = tmp_path / "deep" / "out.jsonl"
    assert ks.main([str(source), str(out)]) == 1
    made, printed = read_rows(out), capsys.readouterr()
    assert [row["row"] for row in made] == [1, 3]
    assert made[0] == {"row": 1, "by": "rule", "problem": rows[0]["problem"], "solution": rows[0]["solution"],
                       "image_path": "../images/10.png",                        # seen from OUT's folder
                       "key_steps": {"Image Description": ["10 metal objects"], "Rationales": ["red balls"],
                                     "Steps": [["10 objects", "ten objects"], ["10 - 3 = 7", "10 minus 3 equals 7"],
                                               ["3 red balls", "three red balls"]]}}
    assert "1 reflective rows dropped" in printed.out and "4 rows failed" in printed.out
    for line in ("row 4: its solution has no", "row 5: has no solution", "row 6: not a JSON object"):
        assert line in printed.err


def test_sharegpt_rows_lose_template_and_image_marker(tmp_path):
    def turns(images, text):
        return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": path_of(7)}],
                "images": images}
    source = write_rows(tmp_path / "in.json", [turns("a/b.png", "<image>" + SHORT_INSTRUCTION + "How many?"),
                                          turns(["c.png"], "<image>\nHow many?"),
                                          turns(["c.png", "d.png"], "How many?"),
                                          turns("e.png", "<image>" + SHORT_INSTRUCTION)])
    out = tmp_path / "out.jsonl"
    assert ks.main([str(source), str(out)]) == 1
    assert [(row["row"], row["problem"], row["image_path"]) for row in read_rows(out)] == [
        (1, "How many?", "a/b.png"), (2, "How many?", "c.png")]


def test_line_separators_inside_a_string_do_not_cut_a_row(tmp_path):
    rows = rows_of(1)
    rows[0]["problem"] = "a\u2028b\x85c \ud83d"
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(rows[0]).replace("\\u2028", "\u2028") + "\n\n", encoding="utf-8")
    out = tmp_path / "out.jsonl"
    assert ks.main([str(source), str(out)]) == 0
    assert json.loads(out.read_text("utf-8"))["problem"] == rows[0]["problem"]
    assert ks.main([str(source), str(out)]) == 0                         # and the row is known again


# -- by a language model

def test_llm_three_passes(tmp_path, endpoint, monkeypatch, capsys):
    monkeypatch.setenv("MY_KEY", "secret")
    source, out = write_rows(tmp_path / "in.jsonl", rows_of(4)), tmp_path / "out.jsonl"
    arguments = llm_arguments(source, out, endpoint.url + "/", "--workers", "3", "--api-key-env", "MY_KEY")
    assert ks.main(arguments) == 0
    assert len(endpoint.asked) == 12 and set(endpoint.paths) == {"/v1/chat/completions"}
    assert set(endpoint.keys) == {"Bearer secret"}
    made = sorted(read_rows(out), key=lambda row: row["row"])
    assert [row["row"] for row in made] == [1, 2, 3, 4]
    assert made[0]["key_steps"] == {"Image Description": ["metal objects"], "Rationales": ["red balls"],
                                    "Steps": [["10 objects", "10 things"],      # the bare '10' is no form of it
                                              ["10 - 3 = 7", "10 minus 3 is 7"]]}
    printed = capsys.readouterr()
    assert "4 elements dropped" in printed.out and "secret" not in printed.out + printed.err + out.read_text()


@pytest.mark.parametrize("url, posted_to", [
    ("http://h", "http://h/v1/chat/completions"), ("http://h/", "http://h/v1/chat/completions"),
    ("http://h/v1", "http://h/v1/chat/completions"), ("http://h/v1/", "http://h/v1/chat/completions"),
    ("https://h/api/v1/chat/completions", "https://h/api/v1/chat/completions"),
    ("https://h/x?api-version=1", "https://h/x/chat/completions?api-version=1")])
def test_addresses(url, posted_to):
    assert ks.chat_url(url) == posted_to


@pytest.mark.parametrize("url", ["file:///etc/passwd", "localhost:8000", "http://"])
def test_addresses_that_are_none(url):
    with pytest.raises(ks.Stop):
        ks.chat_url(url)


SECTIONS = ks.split_path(r"### Step 1: 7 objects, one \frac{6}{3}. ### Step" + "\n### Step 2: Tom's right angle")


@pytest.mark.parametrize("reply", [
    'Step 1: ["7 objects"], Step 2: ["right angle"]',
    'Sure! Here you go:\n```\nStep 1: ["7 objects"],\nStep 2: [\n  "right angle",\n]\n```\nHope this helps.',
    "**Step 1:** ['7 objects']\n**Step 2**: ['right angle']",
    '{"Step 1": ["7 objects"], "Step 2": ["right angle"]}',
    'Step 1: ["a long whole sentence here", "7 objects", "7  objects"]; Step 2: ["right angle", "9 objects"]',
])
def test_replies_that_can_be_read(reply):
    assert ks.read_elements(reply, SECTIONS)[0] == {"step 1": ["7 objects"], "step 2": ["right angle"]}


def test_latex_in_a_reply_is_no_json_escape():
    elements, _ = ks.read_elements(r'Step 1: ["\frac{6}{3}"], Step 2: ["Tom\'s"]', SECTIONS)
    assert elements == {"step 1": [r"\frac{6}{3}"], "step 2": ["Tom's"]}
    assert ks.read_forms(r'{"\\frac{6}{3}": ["6 \\times \u00b0"]}', [r"\frac{6}{3}"]) == [
        [r"\frac{6}{3}", r"6 \times °"]]


@pytest.mark.parametrize("bad", [
    "I cannot help with that.", "", 'Step 1: ["10 objects"], Step 2: ["10 - 3', 'Step 1: [], Step 2: []',
    'Step 1: ["green cone"], Step 2: ["blue cone"]', (200, {}, "<html>"), (200, {}, '{"choices": []}'),
    (200, {}, '{"choices": [{"message": {"content": null}}]}'), (200, {"Content-Length": "999"}, "{"),
    (200, {}, '{"choices": [{"finish_reason": "length", "message": {"content": "x"}}]}'), (200, {}, "[" * 90000),
    (429, {"Retry-After": "0"}, "slow down"), (500, {}, "oops"), (503, {"Retry-After": "soon"}, ""), "hang"])
def test_a_bad_answer_is_asked_again(bad, tmp_path, endpoint):
    source, out = write_rows(tmp_path / "in.jsonl", rows_of(1)), tmp_path / "out.jsonl"
    endpoint.faults.extend([bad, bad])
    assert ks.main(llm_arguments(source, out, endpoint.url, "--timeout", "0.15")) == 0
    assert len(endpoint.asked) == 5 and len(read_rows(out)) == 1


def test_a_bad_third_pass_is_asked_again(tmp_path, endpoint):
    source, out = write_rows(tmp_path / "in.jsonl", rows_of(1)), tmp_path / "out.jsonl"
    endpoint.faults.extend([good_reply(ks.EXTRACT + path_of(10)), good_reply(ks.TRIM + path_of(10)),
                            '{"10 objects": ["ten'])
    assert ks.main(llm_arguments(source, out, endpoint.url)) == 0
    assert [prompt.startswith(ks.AUGMENT) for prompt in endpoint.asked] == [False, False, True, True]


def test_trim_can_strike_but_not_add():
    sections = ks.split_path(path_of(10))
    reply = 'Step 1: ["10 objects"], Step 2: ["3 red balls"]'
    assert ks.read_elements(reply, sections, {"10 objects"})[0]["step 2"] == []


def test_a_row_that_keeps_failing_is_reported_and_the_others_are_done(tmp_path, endpoint, capsys):
    source, out = write_rows(tmp_path / "in.jsonl", rows_of(3)), tmp_path / "out.jsonl"
    endpoint.faults.extend(["nonsense"] * 3)
    assert ks.main(llm_arguments(source, out, endpoint.url)) == 1
    assert "in.jsonl row 1: 3 requests failed" in capsys.readouterr().err
    assert [row["row"] for row in read_rows(out)] == [2, 3]
    asked = len(endpoint.asked)
    assert ks.main(llm_arguments(source, out, endpoint.url)) == 0        # a rerun tries only the failed row
    assert len(endpoint.asked) == asked + 3 and [row["row"] for row in read_rows(out)] == [2, 3, 1]


def test_a_dead_endpoint_ends_the_run(tmp_path, endpoint, capsys):
    source, out = write_rows(tmp_path / "in.jsonl", rows_of(40)), tmp_path / "out.jsonl"
    endpoint.faults.extend([(500, {}, "dead")] * 1000)
    assert ks.main(llm_arguments(source, out, endpoint.url, "--retries", "0")) == 2
    assert "10 rows in a row failed" in capsys.readouterr().err and len(endpoint.asked) < 20


@pytest.mark.parametrize("status", [400, 401, 404, 302])
def test_a_refusal_stops_at_once(status, tmp_path, endpoint, capsys):
    source, out = write_rows(tmp_path / "in.jsonl", rows_of(3)), tmp_path / "out.jsonl"
    endpoint.faults.extend([(status, {"Location": "/elsewhere"}, '{"error": "bad key"}')] * 9)
    assert ks.main(llm_arguments(source, out, endpoint.url)) == 2
    stopped = capsys.readouterr().err.splitlines()[-1]
    assert f"row 1: {endpoint.url}/v1/chat/completions refuses with HTTP {status}" in stopped and "bad key" in stopped
    assert len(endpoint.asked) <= 2             # the worker may have taken up the next row before the run ended


def test_retry_after_is_obeyed(tmp_path, endpoint, monkeypatch):
    waits = []
    monkeypatch.setattr(ks.time, "sleep", waits.append)
    source, out = write_rows(tmp_path / "in.jsonl", rows_of(1)), tmp_path / "out.jsonl"
    endpoint.faults.extend([(429, {"Retry-After": "7"}, ""), (503, {"Retry-After": "99999"}, "")])
    assert ks.main(llm_arguments(source, out, endpoint.url)) == 0
    # A worker of the test before may still be backing off, by hundredths of a second.
    assert [wait for wait in waits if wait > 1] == [7, ks.LONGEST_WAIT]
    date = ks.email.utils.formatdate(time.time() + 60, usegmt=True)
    assert 55 < ks.asked_wait(date) < 61 and ks.asked_wait("nan") == ks.asked_wait(None) == 0


# -- resume

@pytest.mark.parametrize("kill, status", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_killed_run_goes_on_where_it_stopped(kill, status, tmp_path, endpoint):
    source, out = write_rows(tmp_path / "in.jsonl", rows_of(5)), tmp_path / "out.jsonl"
    endpoint.answers_left = 7                                                   # two rows and a third of the next
    arguments = llm_arguments(source, out, endpoint.url)
    process = subprocess.Popen([sys.executable, str(HERE / "data" / "key_steps.py"), *arguments],
                               stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 8
    while len(endpoint.asked) < 8 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(kill)
    _, printed = process.communicate(timeout=8)
    assert process.returncode == status
    assert kill == signal.SIGKILL or "the same command goes on from here" in printed
    assert [row["row"] for row in read_rows(out)] == [1, 2]

    whole = out.read_text("utf-8")
    out.write_text(whole + whole.splitlines()[0][:50].replace('"row": 1', '"row": 3'), encoding="utf-8")    # torn
    endpoint.answers_left = 10 ** 9
    asked = len(endpoint.asked)
    assert ks.main(arguments) == 0
    assert [row["row"] for row in read_rows(out)] == [1, 2, 3, 4, 5] and len(endpoint.asked) == asked + 9
    assert ks.main(arguments) == 0 and len(endpoint.asked) == asked + 9


@pytest.mark.parametrize("content, complaint", [
    (json.dumps({"row": 1, "by": "rule", "problem": "other", "solution": "x", "key_steps": {"Steps": []}}) + "\n",
     "line 1 is not from this IN"),
    ('{"row": 99}\n', "line 1 is not from this IN"), ("my notes\n", "line 1 is not from this IN"),
    ("\n", "line 1 is not from this IN"), ("my only note", "did not write")])
def test_a_file_of_another_input_is_left_alone(content, complaint, tmp_path, capsys):
    source, out = write_rows(tmp_path / "in.jsonl", rows_of(2)), tmp_path / "out.jsonl"
    out.write_text(content)
    assert ks.main([str(source), str(out)]) == 2
    assert complaint in capsys.readouterr().err and out.read_text() == content


def test_a_changed_input_or_another_way_is_refused(tmp_path, endpoint, capsys):
    source, out = write_rows(tmp_path / "in.jsonl", rows_of(2)), tmp_path / "out.jsonl"
    assert ks.main([str(source), str(out)]) == 0
    before = out.read_text()
    assert ks.main(llm_arguments(source, out, endpoint.url)) == 2
    assert "made by rule, not by m" in capsys.readouterr().err
    write_rows(source, rows_of(3)[1:])                                               # every row moved up by one
    assert ks.main([str(source), str(out)]) == 2
    assert out.read_text() == before and not endpoint.asked


@pytest.mark.parametrize("arguments", [
    ["{in}", "{in}"], ["{in}", "out.csv"], ["in.txt", "out.jsonl"], ["{in}", "no/such/out.jsonl"],
    ["{in}", "out.jsonl", "--llm", "http://h"], ["{in}", "out.jsonl", "--llm-model", "m"],
    ["{in}", "out.jsonl", "--workers", "0"], ["{in}", "out.jsonl", "--timeout", "nan"],
    ["{in}", "out.jsonl", "--retries", "-1"], ["{in}", "out.jsonl", "--api-key-env", "NO_SUCH_VARIABLE"],
    ["{in}", "out.jsonl", "--unknown"]])
def test_impossible_arguments_are_refused(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "in.jsonl", rows_of(1))
    with pytest.raises(SystemExit) as refused:
        ks.main([argument.replace("{in}", "in.jsonl") for argument in arguments])
    assert refused.value.code == 2 and not (tmp_path / "out.jsonl").exists()


def test_input_that_cannot_be_read_stops_with_one_line(tmp_path, capsys):
    (tmp_path / "in.json").write_text("{")
    for name in ("in.json", "absent.jsonl"):
        assert ks.main([str(tmp_path / name), str(tmp_path / "out.jsonl")]) == 2
        assert "cannot read" in capsys.readouterr().err


def test_help_explains(capsys):
    with pytest.raises(SystemExit):
        ks.main(["--help"])
    assert "by rule" in capsys.readouterr().out

# SPDX-License-Identifier: MIT
"""Tests of stepgrpo.py, eval.py and the scripts in data/: pytest, CPU, no network, no download.

    python -m pytest -q test_stepgrpo.py

A test is named after the trap it guards. Reference tests compare with a naive version written beside them. Where CUDA
is present, the tests of sections 4 and 5 run on it, in float32. Nothing is written into the repository. Tests of
sections 10 to 13 that need ../shared, which is no part of the project, are skipped where it is absent.
"""
import ast
import base64
import contextlib
import csv
import doctest
import functools
import gc
import hashlib
import html.parser
import importlib.util
import inspect
import io
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
import tracemalloc
import weakref
import zlib
from collections import Counter, deque
from copy import deepcopy
from dataclasses import asdict, fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"               # before transformers is imported: no test may reach for the Hub
# Before torch is: some virtual machines announce AMX and then refuse it; bf16 would die of an illegal instruction.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

import eval as ev
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
bench = load_script("bench")                     # after shapes, which it imports
speed, rep, ablation = load_script("speed"), load_script("report"), load_script("ablation")
PROJECT_FILES = [HERE / "stepgrpo.py", HERE / "eval.py", *sorted((HERE / "data").glob("*.py"))]


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


def best_of(call, tries=5):
    """Seconds of the fastest try: the machine may be busy, but a hang is slow every time."""
    best = float("inf")
    for _ in range(tries):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
        if best < BUDGET_S / 2:
            break
    return best


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
    own = {"stepgrpo.py": {"data"}, "eval.py": {"stepgrpo", "data"}, "bench.py": {"shapes"}}     # others stand alone
    own |= dict.fromkeys(("report.py", "speed.py", "explain.py", "ablation.py"), {"stepgrpo"})
    for file in PROJECT_FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            names = {name.split(".")[0] for name in names}
            assert names <= allowed | own.get(file.name, set()), f"{file.name} line {node.lineno}"
    if importlib.util.find_spec("torchvision") is None:
        assert "torchvision" not in sys.modules


def test_no_bare_except_hides_a_bug():
    for file in PROJECT_FILES:
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
    assert len(sg.rollout(model, processor, [prompt], 2, 2).ids[0]) == 2


def test_prompt_length_is_known_without_reading_pixels(any_model):
    _, processor = any_model
    for sizes in ([], [(56, 56)], [(1, 1)], [(140, 84), (300, 20)], [(640, 480)]):
        prompt = processor.prompt(QUESTIONS[0], [noise_image(*size) for size in sizes])
        assert processor.prompt_length(QUESTIONS[0], sizes) == len(prompt.ids), sizes


@pytest.mark.parametrize("temperature", [0.7, 1.2])
def test_logps_of_cached_sampling_equal_the_full_forward_with_images_of_two_grids(any_model, temperature):
    model, processor = any_model
    prompts = prompts_of(processor)
    sampled = sg.rollout(model, processor, prompts, 3, 12, temperature, range(3))
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
    expected = sg.rollout(model, processor, prompts_of(processor), 2, 8, 1.0, range(3))
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.train()
    sampled = sg.rollout(model, processor, prompts_of(processor), 2, 8, 1.0, range(3))
    assert same(sampled.ids, expected.ids) and same(sampled.logps, expected.logps)
    assert model.training and all(module.training for module in model.modules())       # the mode is as it was
    model.eval()
    sg.rollout(model, processor, prompts_of(processor)[:1], 2, 2)
    assert not model.training


def test_the_paths_of_a_question_do_not_depend_on_the_batch_it_is_asked_in(any_model):
    """Random numbers belong to the question: not to the batch, its order or the number of GPUs."""
    model, processor = any_model
    prompts = prompts_of(processor)
    together = sg.rollout(model, processor, prompts, 3, 8, 1.2, [5, 6, 7])
    turned = sg.rollout(model, processor, prompts[::-1], 3, 8, 1.2, [7, 6, 5])
    assert same(together.ids, turned.ids[::-1])
    for q in range(3):
        assert same(sg.rollout(model, processor, prompts[q:q + 1], 3, 8, 1.2, [5 + q]).ids, together.ids[q:q + 1])
    again = [sg.rollout(model, processor, prompts[:1], 3, 8).ids for _ in range(2)]         # without seeds: others
    assert not same(*again)


@pytest.mark.parametrize("temperature", [0, 1.2])
def test_the_decoding_step_of_constant_shape_equals_the_eager_one(any_model, temperature):
    """What a CUDA graph replays, against buffers that shrink with the batch; on the CPU the same steps, not captured.

    Three rollouts of one shape use the same buffers, also with shorter prompts: what the last one left must not show.
    """
    model, processor = any_model
    prompts, decoders = prompts_of(processor), []
    sg._captured.clear()
    for order in ((0, 1, 2), (2, 0, 2), (0, 1, 2)):
        asked = [prompts[q] for q in order]
        eager, static = (sg.rollout(model, processor, asked, 4, 40, temperature, order, constant_shape=constant)
                         for constant in (False, True))
        assert same(static.ids, eager.ids) and static.texts == eager.texts
        assert torch.allclose(*(torch.cat(sum(x.logps, [])) for x in (static, eager)), atol=CLOSE)
        decoders += sg._captured.values()
    assert decoders[0] is decoders[1] is decoders[2]           # made once, used three times
    long = processor.prompt("Why? " * 300)
    sg.rollout(model, processor, [long] * 3, 4, 40, temperature, constant_shape=True)
    assert len(sg._captured) == 1 and decoders[0] not in sg._captured.values()         # a longer prompt needs another
    sg._captured.clear()


def test_a_step_changes_no_buffer_for_another(any_model):
    """A CUDA graph is bound to addresses: a buffer that a step replaced would be read by the next replay no more."""
    model, processor = any_model
    prompts = prompts_of(processor)
    decoder = sg.Decoder(model, processor, 3, 2, 128, 20, 1.0)

    def addresses():
        values = [*vars(decoder).values(), *sum(decoder.prompt_cache + decoder.path_cache, ())]
        return [value.data_ptr() for value in values if isinstance(value, torch.Tensor)]
    before = addresses()
    with torch.inference_mode():
        for _ in range(2):
            decoder.prefill(prompts, torch.rand(3, 2, 20))
            for c in range(20):
                decoder.step(20)
    assert addresses() == before and len(before) > 15 and int(decoder.c) == 20


def test_rounding_in_the_cumulative_sum_never_samples_a_banned_id(small_model, monkeypatch):
    """A parallel cumulative sum may rise where a probability is 0, and the search would stop there."""
    model, processor = small_model
    banned = int(processor.banned.nonzero()[0])
    monkeypatch.setattr(torch, "searchsorted", lambda cdf, values: torch.full_like(values, banned, dtype=torch.long))
    sampled = sg.rollout(model, processor, prompts_of(processor), 2, 4)
    assert [path.tolist() for group in sampled.ids for path in group] == [processor.eos[:1]] * 6


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
        sampled = sg.rollout(model, processor, prompts_of(processor), 8, 24, 5.0, range(3 * seed, 3 * seed + 3))
        ids = torch.cat([path for group in sampled.ids for path in group])
        assert not processor.banned[ids].any() and all(map(torch.isfinite, torch.cat(sum(sampled.logps, []))))
    assert processor.banned[[processor.special[f"<|{name}_pad|>"] for name in ("image", "video", "vision")]].all()
    assert processor.banned[len(processor.tokenizer):].all() and not processor.banned[processor.eos].any()


def test_generation_config_does_not_leak_into_sampling(loaded):
    model, processor = loaded["qwen2_vl"]
    assert model.generation_config.top_k == 1 and model.generation_config.repetition_penalty > 1    # as published
    sampled = sg.rollout(model, processor, prompts_of(processor)[:1], 32, 1, 1.2, [0])
    assert len({int(path[0]) for path in sampled.ids[0]}) > 8
    greedy = sg.rollout(model, processor, prompts_of(processor)[:1], 4, 6, 0)
    assert len({tuple(path.tolist()) for path in greedy.ids[0]}) == 1


def test_sampling_follows_the_models_distribution_at_its_temperature(loaded):
    model, processor = loaded["qwen2_vl"]
    prompt, n = processor.prompt("Hi"), 4000
    sampled = sg.rollout(model, processor, [prompt], n, 1, 0.7, [0])
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
    sampled = sg.rollout(model, processor, prompts, 6, 40, 3.0, range(3))
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
        sampled = sg.rollout(model, processor, prompts, 4, 4, seeds=range(3))
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
    sampled = sg.rollout(model, processor, prompts, G, tokens, 1.2, range(3))
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
    assert optimizer.local.separate and all(m.dtype == torch.float32 for m in optimizer.masters)
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


def test_an_optimiser_that_is_dropped_frees_its_masters(loaded):
    """Its hooks stay with the parameters: they must not hold 26 GB."""
    model = deepcopy(loaded["qwen2_vl"][0]).bfloat16()
    optimizer = sg.MasterAdamW(model)
    alive = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert alive() is None


def test_nan_in_the_last_norm_is_an_error_and_no_crash(small_model):
    model, processor = small_model
    with torch.no_grad():
        model.model.language_model.norm.weight.fill_(torch.nan)
    with pytest.raises(sg.NonFinite, match="nan"):
        sg.rollout(model, processor, prompts_of(processor), 2, 4)


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
    for file in ("training_state.pt", "optimizer_0.pt"):
        assert same(*(torch.load(run / "checkpoint" / file, weights_only=True) for run in (a, b)))


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
    assert [row["step"] for row in samples] == [1, 3] and all(Path(samples[0]["images"][0]).is_file() for _ in samples)
    for row in samples:
        A = sg.group_advantages(torch.tensor([[path["reward"] for path in row["paths"]]]))[0].tolist()
        assert [path["advantage"] for path in row["paths"]] == pytest.approx(A) and len(A) == 2
    page = (straight / "report.html").read_text(encoding="utf-8")
    assert "4 of 4" in page or "finished" in page
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
    states = [torch.load(tmp_path / name / "checkpoint" / "optimizer_0.pt", weights_only=True)
              for name in ("whole", "run")]
    assert same(*states) and states[0]["masters"][0].dtype == torch.float32


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
    assert "\u2028" in before[0]["paths"][0]["text"] and records(out / "samples.jsonl") == before and len(before) == 2


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


# -- several processes

def torchrun(processes, *flags, script=HERE / "stepgrpo.py"):
    """A script under torchrun on the CPU (gloo) → its exit status and what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", processes, "--master-port", "0",
               "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", script, *flags]
    done = subprocess.run([str(part) for part in command], env=os.environ | {"OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def close_logs(a, b):
    """Two runs' metrics, equal but for the order of summation."""
    a, b = metrics(a), metrics(b)
    assert [row.keys() for row in a] == [row.keys() for row in b]
    for left, right in zip(a, b):
        assert {k: v for k, v in right.items() if not isinstance(v, str)} == pytest.approx(
            {k: v for k, v in left.items() if not isinstance(v, str)}, rel=1e-3, abs=1e-5)


def test_two_processes_make_the_same_updates_as_one_and_resume_as_two(shapes_set, tmp_path):
    """Same questions, same random numbers, gradients summed, optimiser state in two halves."""
    flags = dict(questions=4, warmup_batch=4, micro_batch=1, max_new_tokens=24, held_out=3, lr=1e-4, beta=0.5)
    assert run_main(*run_flags(tmp_path / "one", shapes_set, **flags)) == 0
    status, printed = torchrun(2, *run_flags(tmp_path / "two", shapes_set, **flags))
    assert status == 0, printed
    assert printed.count("update     4/4") == 1                # the second process is quiet
    close_logs(tmp_path / "one", tmp_path / "two")
    assert [row["step"] for row in records(tmp_path / "two" / "samples.jsonl")] == [
        row["step"] for row in records(tmp_path / "one" / "samples.jsonl")]
    one, two = (weights(tmp_path / name / "checkpoint") for name in ("one", "two"))
    close = [((one[name] - two[name]).abs() < 1e-5).float().mean() for name in one]
    # Adam's steps are signs at first: where a gradient is 0 but for rounding, they may differ.
    assert min(close) > 0.98 and one.keys() == two.keys()
    folder = tmp_path / "two" / "checkpoint"
    halves = [torch.load(folder / f"optimizer_{rank}.pt", weights_only=True) for rank in (0, 1)]
    sizes = [sum(state["exp_avg"].numel() for state in half["adamw"]["state"].values()) for half in halves]
    assert sum(sizes) == sum(tensor.numel() for tensor in one.values()) and max(sizes) < 0.7 * sum(sizes)

    status, printed = torchrun(2, "--resume", "--out", tmp_path / "two", "--steps", "6")
    assert status == 0 and len([row for row in metrics(tmp_path / "two") if row["phase"] == "StepGRPO"]) == 6, printed
    assert "a run on 2 processes, and here are 1" in run_main("--resume", "--out", tmp_path / "two", "--steps", "8")


def test_two_processes_stop_together_and_go_on_bit_for_bit(shapes_set, tmp_path):
    """A stop asked of one process is one of all. In bf16, where the masters are kept apart."""
    flags = dict(questions=2, warmup_batch=2, micro_batch=1, dtype="bfloat16", save_every=100, skip_flat_groups=True)
    assert torchrun(2, *run_flags(tmp_path / "whole", shapes_set, **flags))[0] == 0
    script = tmp_path / "stop.py"
    script.write_text(f"""import os, signal, sys
sys.path.insert(0, {str(HERE)!r})
import stepgrpo as sg
log = sg.Run.log
def spy(run, file, record):
    log(run, file, record)
    if sg.rank() == 0 and record.get("phase") == "StepGRPO" and record["step"] == 2:
        os.kill(os.getpid(), signal.SIGINT)
sg.Run.log = spy
sg.main(sys.argv[1:])
""")
    status, printed = torchrun(2, *run_flags(tmp_path / "run", shapes_set, **flags), script=script)
    assert status != 0 and "Go on with" in printed
    assert [row["step"] for row in metrics(tmp_path / "run") if row["phase"] == "StepGRPO"] == [1, 2]
    status, printed = torchrun(2, "--resume", "--out", tmp_path / "run")
    assert status == 0, printed
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert same(weights(tmp_path / "run" / "checkpoint"), weights(tmp_path / "whole" / "checkpoint"))


def test_questions_that_cannot_be_shared_evenly_are_an_error(shapes_set, tmp_path):
    status, printed = torchrun(2, *run_flags(tmp_path / "run", shapes_set, questions=3))
    assert status != 0 and "--questions 3 cannot be shared evenly by 2 processes" in printed


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
    groups, _, drawn, _ = sg.sample_groups(cfg, FakePolicy, processor, rows, 0)
    right = {group.row.answer: [score["right"] for score in group.scores] for group in groups}
    assert right == {"4": [1, 0], "5": [0, 0], "6": [0, 1]} and drawn == 3
    for group in groups:
        expected = processor.prompt(sg.build_instruction(group.row.problem))
        assert torch.equal(group.prompt.ids, expected.ids)


def test_every_update_samples_with_random_numbers_of_its_own(loaded, shapes_set):
    """They are a function of seed and question: a resumed run draws the same, and no two updates draw the same."""
    model, processor = loaded["qwen2_vl"]
    rows = sg.read_rows(shapes_set / "train.json")[0][:1]

    def sample(seed, drawn):
        cfg = sg.Config(questions=1, group_size=3, max_new_tokens=6, seed=seed)
        return [path.tolist() for path in sg.sample_groups(cfg, model, processor, rows, drawn)[0][0].ids]
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
        groups, _, drawn, flat = sg.sample_groups(cfg, FakePolicy, processor, rows, 0)
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


def test_a_sliding_window_is_refused_and_not_ignored(checkpoints, tmp_path):
    """The forward of section 7 attends to everything."""
    shutil.copytree(checkpoints["qwen2_vl"], tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"use_sliding_window": True,
                                                                        "max_window_layers": 1}))
    with pytest.raises(sg.UserError, match="sliding"):
        sg.load_model(tmp_path / "model", torch.device("cpu"), torch.float32, 400_000)


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
         "matched_key_steps", "step_accuracy_reward", "step_validity_reward", "solution_answer", "step_accuracy",
         "step_validity", "compute_score", "group_advantages", "grpo_loss",
         "mrope_positions", "rotate", "tempered_logps", "token_logps", "warmup_schedule", "fitted_size"]


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
    assert function.__doc__
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
    quarter = unit["rotate"](torch.tensor([[1., 2.]]), torch.zeros(1, 2), torch.tensor([[-1., 1.]]))
    assert quarter.tolist() == [[-2, 1]]
    assert unit["tempered_logps"](torch.zeros(2), 1.0, torch.tensor([True, False])).tolist() == [-torch.inf, 0]
    logps = unit["token_logps"](torch.nn.Linear(2, 3), torch.zeros(4, 2), torch.zeros(4).long(), 1.0,
                                torch.zeros(3).bool())
    assert logps.shape == (4,) and unit["warmup_schedule"](1, 0) == pytest.approx(0)
    assert 3000 / 200 < unit["fitted_size"](10, 3000, 400_000)[0] <= 3000 / 100


@pytest.mark.parametrize("unit", UNITS)
def test_the_docstring_of_a_unit_says_what_must_be_pasted_with_it(unit):
    missing = [name for name in own_names(TOP_LEVEL[unit]) - {unit} if name not in getattr(sg, unit).__doc__]
    assert not missing


def test_the_pasted_rollout_and_log_probs_work_without_the_rest(loaded):
    model, processor = loaded["qwen2_vl"]
    prompts, (rollout, needed), (path_logps, _) = prompts_of(processor), pasted("rollout"), pasted("path_logps")
    ours, theirs = (call(model, processor, prompts, 2, 6, 1.2, range(3)) for call in (rollout, sg.rollout))
    assert same(ours.ids, theirs.ids) and same(ours.logps, theirs.logps)
    assert torch.equal(*(call(model, processor, prompts, ours.ids)[0] for call in (path_logps, sg.path_logps)))
    assert not needed & {"Config", "Processor", "HERE", "TINY", "Run", "dist"}


def test_every_python_file_carries_its_licence():
    for file in (*HERE.glob("*.py"), *(HERE / "data").glob("*.py")):
        assert file.read_text(encoding="utf-8").startswith("# SPDX-License-Identifier: MIT\n"), file


def test_lines_fit_120_columns():
    for file in (*PROJECT_FILES, HERE / "test_stepgrpo.py"):
        for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
            assert len(line) <= 120, f"{file.name} line {number}"


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
            for command in re.split(r"&&|;|\|", line.split(" #")[0])
            if command.strip().startswith(("python ", "torchrun "))]


@pytest.mark.skipif(not (HERE / "README.md").exists(), reason="README.md is not written yet")
def test_the_readme_shows_the_default_command_and_the_tests():
    commands = [command.strip() for file, command in COMMANDS if file == "README.md"]
    assert "python stepgrpo.py" in commands and any("pytest" in command for command in commands)


@pytest.mark.parametrize("file, command", COMMANDS, ids=[command.strip() for _, command in COMMANDS])
def test_a_command_of_the_readmes_is_accepted(file, command, tmp_path, monkeypatch):
    _, script, *flags = shlex.split(re.sub(r"^torchrun --nproc-per-node \d+", "python", command))
    if script == "-m":
        assert flags[0] in ("venv", "pytest") and (flags[0] == "venv" or all((HERE / f).exists() for f in flags[1:]
                                                                              if f.endswith(".py")))
        return
    assert (HERE / script).is_file(), f"{file}: {script} is not there"
    monkeypatch.chdir(tmp_path)
    if flags and flags[0] in sg.TOOLS:
        assert script == "stepgrpo.py" and (HERE / "data" / sg.TOOLS[flags[0]]).is_file()
    elif script == "stepgrpo.py":
        try:
            assert sg.parse_config(flags)
        except sg.UserError as problem:
            assert "--resume" in flags and "nothing to resume" in str(problem)
    elif script == "eval.py":
        assert ev.parse_arguments(flags)
    elif script == "data/key_steps.py":
        monkeypatch.setenv("OPENAI_API_KEY", "x")
        assert ks.read_arguments(flags)
    elif script == "data/report.py":
        assert len(flags) == 1
    else:
        helped = subprocess.run([sys.executable, str(HERE / script), "--help"], capture_output=True, text=True,
                                check=True)
        assert all(flag in helped.stdout for flag in flags if flag.startswith("--"))


def test_the_walk_through_of_the_readme_is_what_explain_prints():
    """Block by block; numbers may differ by rounding on another machine."""
    command = [sys.executable, str(HERE / "stepgrpo.py"), "--explain"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    shown = [block for block in re.findall(r"^```text\n(.*?)^```", readme, re.M | re.S) if block.startswith("── ")]
    printed = printed[printed.index("── "):]                   # it may have drawn the data first, and said so
    blocks = [block.rstrip("\n") + "\n" for block in re.split(r"\n(?=── )", printed)]
    assert len(shown) == len(blocks) == 7
    for a, b in zip(shown, blocks):
        number = r"[-+]?\d+\.\d+"
        assert re.sub(number, "#", a) == re.sub(number, "#", b)
        a, b = (list(map(float, re.findall(number, text))) for text in (a, b))
        assert a == pytest.approx(b, abs=0.11)


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


# ─── 10. eval.py: files and images ────────────────────────────────────────────────────────────────────────────────────

SHARED = HERE.parent / "shared"                  # test data and facts that are no part of the project


def needs(path):
    """Skips a test where the shared folder lacks this."""
    return pytest.mark.skipif(not (SHARED / path).exists(), reason=f"{SHARED / path} is absent")


CASES, REAL_ROWS = SHARED / "benchmarks" / "cases", SHARED / "benchmarks" / "tsv"
has_cases, has_real_rows = needs(CASES), needs(REAL_ROWS)


def encoded(color="red", size=(40, 30), kind="PNG"):
    """An image as base64 text."""
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


def write_tsv(file, rows, header=("index", "image", "question"), end="\r\n", quoting=csv.QUOTE_MINIMAL):
    with open(file, "w", encoding="utf-8", newline="") as f:
        csv.writer(f, "excel-tab", lineterminator=end, quoting=quoting).writerows([header, *rows])
    return file


def write_bytes(file, data):
    file.write_bytes(data)
    return file


def names_in(folder):
    return sorted(file.name for file in folder.iterdir())


# -- find and download

BODY = random.Random(0).randbytes(700_000)
BODY_MD5 = hashlib.md5(BODY).hexdigest()


class FileServer(ThreadingHTTPServer):
    """Serves its body at any address. `cuts`: how many bytes to send, per request, before the line goes dead."""
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), FileHandler)
        self.body = BODY
        self.url = f"http://127.0.0.1:{self.server_port}/some/where.tsv"
        self.ranges, self.agents, self.cuts, self.knows_range, self.on_request = [], [], [], True, None

    def handle_error(self, request, client_address):
        pass


class FileHandler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, start, asked = self.server, 0, self.headers["Range"]
        server.ranges.append(asked)
        server.agents.append(self.headers["User-Agent"])
        if server.on_request:
            server.on_request(self)
        if asked and server.knows_range:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
        if start >= len(server.body):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(server.body) - start))
        self.end_headers()
        self.wfile.write(server.body[start:][:server.cuts.pop(0) if server.cuts else None])

    def log_message(self, *args):
        pass


@pytest.fixture
def no_proxy(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def file_server(no_proxy):
    with FileServer() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


def test_full_download_creates_the_folder_and_shows_bytes(file_server, tmp_path, capsys):
    file = tmp_path / "new" / "folder" / "A.tsv"
    assert ev.download(file_server.url, file, BODY_MD5) == file
    assert file.read_bytes() == BODY and names_in(file.parent) == ["A.tsv"]
    assert file_server.ranges == [None] and "Python-urllib" not in file_server.agents[0]
    err = capsys.readouterr().err
    assert "A.tsv" in err and "700k/700k" in err


def test_a_partial_file_is_resumed_with_a_range(file_server, tmp_path, capsys):
    (tmp_path / "A.tsv.part").write_bytes(BODY[:500_000])
    ev.download(file_server.url, tmp_path / "A.tsv", BODY_MD5)
    assert file_server.ranges == ["bytes=500000-"]
    assert (tmp_path / "A.tsv").read_bytes() == BODY and names_in(tmp_path) == ["A.tsv"]
    assert "700k/700k" in capsys.readouterr().err              # the bar counts what was there


def test_a_server_that_ignores_the_range_starts_over_and_is_not_appended(file_server, tmp_path):
    file_server.knows_range = False
    (tmp_path / "A.tsv.part").write_bytes(BODY[:500_000])
    ev.download(file_server.url, tmp_path / "A.tsv", BODY_MD5)
    assert file_server.ranges == ["bytes=500000-"] and (tmp_path / "A.tsv").read_bytes() == BODY


def test_a_short_body_is_a_dropped_connection_and_is_resumed(file_server, tmp_path):
    file_server.cuts = [100_000, 250_000]
    ev.download(file_server.url, tmp_path / "A.tsv", BODY_MD5)
    assert file_server.ranges == [None, "bytes=100000-", "bytes=350000-"]
    assert (tmp_path / "A.tsv").read_bytes() == BODY


def test_a_short_body_is_noticed_without_an_md5_too(file_server, tmp_path):
    file_server.cuts = [100_000]
    ev.download(file_server.url, tmp_path / "A.tsv", None)
    assert (tmp_path / "A.tsv").read_bytes() == BODY


def test_drops_without_progress_end_in_an_error_and_the_part_stays(file_server, tmp_path):
    file_server.cuts = [100_000, 0, 100_000]
    with pytest.raises(sg.UserError, match="ended after 100,000 of 700,000 bytes.*goes on from A.tsv.part"):
        ev.download(file_server.url, tmp_path / "A.tsv", BODY_MD5)
    assert len(file_server.ranges) == 2 and (tmp_path / "A.tsv.part").read_bytes() == BODY[:100_000]
    file_server.cuts = []
    ev.download(file_server.url, tmp_path / "A.tsv", BODY_MD5)
    assert (tmp_path / "A.tsv").read_bytes() == BODY


def test_drops_with_progress_end_after_ten(file_server, tmp_path):
    file_server.cuts = [1000] * 100
    with pytest.raises(sg.UserError, match="10,000 of 700,000"):
        ev.download(file_server.url, tmp_path / "A.tsv", BODY_MD5)
    assert len(file_server.ranges) == 10


@pytest.mark.parametrize("part, ranges", [
    (BODY, ["bytes=700000-"]), (bytes(700_000), ["bytes=700000-", None]), (BODY + b"x", ["bytes=700001-", None]),
], ids=["whole", "of another file", "too long"])
def test_a_range_past_the_end_means_whole_or_start_over(file_server, tmp_path, part, ranges):
    (tmp_path / "A.tsv.part").write_bytes(part)
    ev.download(file_server.url, tmp_path / "A.tsv", BODY_MD5)
    assert file_server.ranges == ranges and (tmp_path / "A.tsv").read_bytes() == BODY
    assert names_in(tmp_path) == ["A.tsv"]


def test_a_wrong_md5_is_kept_apart_and_both_sums_are_named(file_server, tmp_path):
    with pytest.raises(sg.UserError) as e:
        ev.download(file_server.url, tmp_path / "A.tsv", "0" * 32)
    named = (BODY_MD5, "0" * 32, str(tmp_path / "A.tsv.wrong-md5"), file_server.url)
    assert all(part in str(e.value) for part in named)
    assert names_in(tmp_path) == ["A.tsv.wrong-md5"]
    ev.download(file_server.url, tmp_path / "A.tsv", BODY_MD5)         # it does not poison the next try
    assert file_server.ranges == [None, None]


def test_a_stale_part_of_an_older_file_is_a_wrong_md5_and_no_mixture_stays(file_server, tmp_path):
    (tmp_path / "A.tsv.part").write_bytes(bytes(1000))
    with pytest.raises(sg.UserError, match="MD5"):
        ev.download(file_server.url, tmp_path / "A.tsv", BODY_MD5)
    assert names_in(tmp_path) == ["A.tsv.wrong-md5"]


def test_nothing_stands_at_the_final_name_before_the_check(file_server, tmp_path, monkeypatch):
    seen, md5_of = [], ev.md5_of
    file_server.cuts, file_server.on_request = [100_000], lambda _: seen.append((tmp_path / "A.tsv").exists())
    monkeypatch.setattr(ev, "md5_of", lambda file: seen.append((tmp_path / "A.tsv").exists()) or md5_of(file))
    ev.download(file_server.url, tmp_path / "A.tsv", BODY_MD5)
    assert seen == [False] * 3 and (tmp_path / "A.tsv").exists()


def test_ctrl_c_leaves_the_part_of_a_download(file_server, tmp_path, monkeypatch):
    class Stopped(ev.tqdm):
        def update(self, n=1):
            super().update(n)
            if self.n > 300_000:
                raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(ev, "tqdm", Stopped)
        ev.download(file_server.url, tmp_path / "A.tsv", BODY_MD5)
    size = (tmp_path / "A.tsv.part").stat().st_size
    assert 300_000 < size < 400_000 and names_in(tmp_path) == ["A.tsv.part"]
    ev.download(file_server.url, tmp_path / "A.tsv", BODY_MD5)
    assert file_server.ranges[-1] == f"bytes={size}-" and (tmp_path / "A.tsv").read_bytes() == BODY


def test_an_unreachable_server_is_one_line_with_address_and_folder(no_proxy, tmp_path):
    with FileServer() as gone:
        url = gone.url
    with pytest.raises(sg.UserError) as e:
        ev.download(url, tmp_path / "A.tsv", BODY_MD5)
    text = str(e.value)
    assert "\n" not in text and url in text and str(tmp_path) in text and "refused" in text and ".part" not in text
    assert not names_in(tmp_path)
    (tmp_path / "A.tsv.part").write_bytes(BODY[:10])
    with pytest.raises(sg.UserError, match="goes on from A.tsv.part"):
        ev.download(url, tmp_path / "A.tsv", BODY_MD5)


def test_a_missing_page_a_mute_server_and_an_unwritable_folder_are_user_errors(file_server, tmp_path):
    for reply, message in [(lambda handler: handler.send_error(404, "Gone away"), "HTTP Error 404: Gone away"),
                           (lambda handler: handler.send_error(416, "No such range"), "HTTP Error 416"),
                           (lambda handler: handler.wfile.write(b"hello\r\n\r\n"), "hello"),
                           (lambda handler: 1 / 0, "closed connection without response")]:
        file_server.on_request = reply
        with pytest.raises(sg.UserError, match=message):
            ev.download(file_server.url, tmp_path / "A.tsv", None)
        assert not names_in(tmp_path)
    write_bytes(tmp_path / "plain", b"")
    with pytest.raises(sg.UserError, match="cannot download"):
        ev.download(file_server.url, tmp_path / "plain" / "A.tsv", None)


def test_the_first_folder_that_has_the_file_wins_whatever_its_md5(file_server, tmp_path):
    folders = [tmp_path / name for name in ("given", "second", "third")]
    for folder in folders[1:]:
        folder.mkdir()
        (folder / "A.tsv").write_text("a rebuilt file")
    (tmp_path / "second" / "B.tsv").mkdir()                    # a folder is no file
    assert ev.find_tsv("A.tsv", file_server.url, BODY_MD5, folders) == tmp_path / "second" / "A.tsv"
    assert not file_server.ranges
    assert ev.find_tsv("B.tsv", file_server.url, BODY_MD5, folders) == tmp_path / "given" / "B.tsv"
    assert (tmp_path / "given" / "B.tsv").read_bytes() == BODY


def test_data_folders_are_those_of_vlmevalkit_after_the_given_one(monkeypatch):
    monkeypatch.setenv("LMUData", "/lmu")
    home = Path("~/LMUData").expanduser()
    assert ev.data_folders("mine") == [Path("mine"), Path("/lmu"), home]
    assert ev.data_folders(None) == [Path("/lmu"), home]
    monkeypatch.delenv("LMUData")
    assert ev.data_folders("") == [home] and ev.data_folders("~/x")[0] == Path("~/x").expanduser()


# -- read

def test_rows_hold_text_verbatim_and_no_image(tmp_path):
    rows = [["1", encoded(), 'two\nlines, a\ttab and "quotes"'], ["b 2", "", " é ∠ 72° \u2028 x "]]
    file = write_tsv(tmp_path / "A.tsv", rows)
    table = ev.read_tsv(file, ("question",))
    assert [row.cells for row in table.rows.values()] == [
        {"index": "1", "question": rows[0][2]}, {"index": "b 2", "question": rows[1][2]}]
    assert [row.has_image for row in table.rows.values()] == [True, False]
    assert list(table.rows) == ["1", "b 2"] and not table.complaints
    assert table.md5 == hashlib.md5(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("last", [True, False])
def test_line_ends_bom_and_a_missing_last_line_end_change_nothing(tmp_path, end, bom, last):
    file = write_tsv(tmp_path / "A.tsv", [[1, encoded("red"), "a"], [2, encoded("blue"), "b"]], end=end)
    file.write_bytes(bom + (file.read_bytes() if last else file.read_bytes().rstrip()))
    table = ev.read_tsv(file, ("index", "question"))
    assert [row.cells for row in table.rows.values()] == [{"index": "1", "question": "a"},
                                                          {"index": "2", "question": "b"}]
    colors = [ev.row_images(table, row, 10**6)[0].getpixel((0, 0)) for row in table.rows.values()]
    assert colors == [(255, 0, 0), (0, 0, 255)] and table.md5 == hashlib.md5(file.read_bytes()).hexdigest()


def test_blank_lines_are_ignored_but_counted(tmp_path):
    file = write_bytes(tmp_path / "A.tsv", b"index\tq\n\n  \n1\ta\n\r\n\t\n2\tb\n\n")
    table = ev.read_tsv(file)
    assert not table.complaints
    assert [row.where for row in table.rows.values()] == [f"{file} line 4", f"{file} line 7"]


def test_a_bad_row_is_named_by_its_physical_line_after_cells_of_several_lines(tmp_path):
    file = write_bytes(tmp_path / "A.tsv", b'index\tq\n1\t"a\n\nb"\n2\ttoo\tmany\n3\t"c\r\nd"\n4\n5\te\n')
    table = ev.read_tsv(file)
    assert table.complaints == [f"{file} line 5: has 3 cells, the header has 2",
                                f"{file} line 8: has 1 cells, the header has 2"]
    assert {i: row.where.split()[-1] for i, row in table.rows.items()} == {"1": "2", "3": "6", "5": "9"}


def test_duplicate_and_empty_index_are_complaints_and_the_first_row_stays(tmp_path):
    file = write_tsv(tmp_path / "A.tsv", [["7", "a"], ["8", "b"], ["7 ", "c"], ["", "d"]], ("index", "q"))
    table = ev.read_tsv(file)
    assert table.complaints == [f"{file} line 4: has the index '7' of {file} line 2",
                                f"{file} line 5: the index is empty"]
    assert [row.cells["q"] for row in table.rows.values()] == ["a", "b"]


@pytest.mark.parametrize("column", [0, 1])
def test_a_quote_that_never_closes_is_a_complaint_though_the_cell_count_fits(tmp_path, column):
    bad = b'2\t"b' if column else b'"2\tb'
    file = write_bytes(tmp_path / "A.tsv", b"index\tq\n1\ta\n" + bad + b"\n3\tc\n4\td\n")
    table = ev.read_tsv(file)
    assert list(table.rows) == ["1"] and len(table.complaints) == 1
    assert table.complaints[0].startswith(f"{file} line 3: ") and "line 5" in table.complaints[0]


def test_a_lone_carriage_return_outside_quotes_is_a_complaint(tmp_path):
    file = write_bytes(tmp_path / "A.tsv", b"index\tq\n1\ta\rb\n2\tc\n")
    table = ev.read_tsv(file)
    assert list(table.rows) == ["2"] and table.complaints[0].startswith(f"{file} line 2: ")


def test_a_quote_closed_by_a_later_cell_is_no_silent_merge(tmp_path):
    file = write_bytes(tmp_path / "A.tsv", b'index\tq\n1\t"open\n2\t"quoted"\n3\tc\n')
    table = ev.read_tsv(file)
    assert list(table.rows) == ["3"] and table.complaints[0].startswith(f"{file} line 2: ")


def test_an_open_quote_does_not_read_the_rest_of_a_large_file_into_memory(tmp_path, monkeypatch):
    limit = csv.field_size_limit
    monkeypatch.setattr(ev.csv, "field_size_limit", lambda size: limit(10**5))
    rows = b"".join(b"%d\t%s\n" % (i, b"x" * 1000) for i in range(2, 300))
    try:
        table = ev.read_tsv(write_bytes(tmp_path / "A.tsv", b'index\tq\n1\t"open\n' + rows))
    finally:
        limit(1 << 26)
    assert len(table.complaints) == 1 and "field limit" in table.complaints[0] and len(table.rows) > 190


def test_the_field_limit_fits_images_and_every_platform():
    csv.field_size_limit(131072)
    with pytest.raises(sg.UserError):
        ev.read_tsv("absent.tsv")
    assert 5e7 < csv.field_size_limit() < 2**31                # a C long has 32 bits on Windows


def test_missing_columns_are_named_beside_those_found(tmp_path):
    file = write_tsv(tmp_path / "A.tsv", [])
    with pytest.raises(sg.UserError) as e:
        ev.read_tsv(file, ("question", "answer", "category"))
    assert str(e.value) == f"{file} has no column answer, category; its first line holds: index, image, question"


@pytest.mark.parametrize("data", [b"", b"\n\n", b"1\t" + b"A" * 10**6 + b"\n", b"<!DOCTYPE html>\n<html>\n"],
                         ids=["empty", "blank", "no header", "web page"])
def test_no_header_is_an_error_of_readable_length(tmp_path, data):
    with pytest.raises(sg.UserError, match="A.tsv has no column index") as e:
        ev.read_tsv(write_bytes(tmp_path / "A.tsv", data))
    assert len(str(e.value)) < 500


def test_unreadable_files_are_user_errors(tmp_path):
    for data, message in [(b"index\tq\n1\ta\n2\t\xff\xfe\n", "A.tsv line 3 is not UTF-8.*byte 3"),
                          ("index\tq\n".encode("utf-16"), "A.tsv line 1 is not UTF-8"),
                          (b'"index\tq\n1\ta\n', "cannot read .*A.tsv")]:
        with pytest.raises(sg.UserError, match=message):
            ev.read_tsv(write_bytes(tmp_path / "A.tsv", data))
    for file in (tmp_path / "absent.tsv", tmp_path):
        with pytest.raises(sg.UserError, match="cannot read"):
            ev.read_tsv(file)


def test_every_offset_is_where_the_record_begins_in_random_files(tmp_path):
    rng = random.Random(0)
    for n in range(20):
        rows = [[str(i), str(i) * 70, "".join(rng.choices('ab\n\t"é\r,', k=rng.randrange(12)))] for i in range(30)]
        rows = [[i, base64.b64encode(text.encode()).decode(), q] for i, text, q in rows]
        end = rng.choice(["\n", "\r\n"])
        table = ev.read_tsv(write_tsv(tmp_path / "A.tsv", rows, end=end, quoting=csv.QUOTE_ALL))
        assert [row.cells["question"] for row in table.rows.values()] == [q for _, _, q in rows]
        assert [ev.image_texts(table, row) for row in table.rows.values()] == [[text] for _, text, _ in rows]


@pytest.mark.parametrize("value, text", [
    (None, ""), (float("nan"), ""), ("", ""), ("  ", ""), ("NA", ""), ("N/A", ""), ("None", ""), ("null", ""),
    ("nan", ""), ("NaN", ""), (" x ", "x"), (3, "3"), (3.0, "3.0"), (0, "0"), ("none of them", "none of them"),
])
def test_a_cell_is_missing_where_pandas_reads_none(value, text):
    assert ev.cell({"A": value}, "A") == text and ev.cell({}, "A") == ""


# -- images

def images_of(tmp_path, cells, max_pixels=10**6):
    """Cells of the image column → list of (images or the error) per row; their indices are 1, 2, …"""
    table = ev.read_tsv(write_tsv(tmp_path / "A.tsv", [[i, cell, "q"] for i, cell in enumerate(cells, 1)]))
    assert len(table.rows) == len(cells)
    found = []
    for row in table.rows.values():
        try:
            found.append(ev.row_images(table, row, max_pixels))
        except ValueError as e:
            found.append(str(e))
    return found


def test_all_forms_of_an_image_cell(tmp_path):
    red, blue = encoded("red"), encoded("blue", kind="JPEG")
    folded = "\n".join(red[i:i + 60] for i in range(0, len(red), 60))
    cells = [red, blue, folded, "data:image/png;base64," + red, str([red, blue]), f'["{red}",\n "{blue}"]',
             "1", " 2 ", "['1', '2']", "[1, 2]", f"['5', '{blue}']", "[]", str(["data:image/png;base64," + red])]
    found = images_of(tmp_path, cells)
    assert ["".join("RGB"[image.getpixel((1, 1)).index(max(image.getpixel((1, 1))))] for image in images)
            for images in found] == ["R", "B", "R", "R", "RB", "RB", "R", "B", "RB", "RB", "RBB", "", "R"]
    assert all(image.mode == "RGB" and image.size == (40, 30) for images in found for image in images)


@pytest.mark.parametrize("cell", ["", " ", "NA", "N/A", "None", "null", "NaN", "nan", "NULL", "[]"])
def test_a_missing_image_is_known_after_the_first_pass(tmp_path, cell):
    table = ev.read_tsv(write_tsv(tmp_path / "A.tsv", [["1", cell, "q"]]))
    assert not table.rows["1"].has_image and ev.row_images(table, table.rows["1"], 10**6) == []


def test_a_file_without_image_column_can_be_read(tmp_path):
    table = ev.read_tsv(write_tsv(tmp_path / "A.tsv", [["1", "q"]], ("index", "question")))
    assert not table.rows["1"].has_image and ev.row_images(table, table.rows["1"], 10**6) == []


def test_references_to_nothing_or_in_a_circle_say_so(tmp_path):
    found = images_of(tmp_path, ["2", "3", "1", "4", "99", "", "6", f"['{encoded()}', '']"])
    assert "in a circle: 1 → 2 → 3 → 1" in found[0] and "in a circle: 4 → 4" in found[3]
    assert "row '99', which does not exist" in found[4] and "row '6'" in found[6] and "row ''" in found[7]
    assert found[5] == []


def test_the_same_image_twice_is_no_circle(tmp_path):
    assert [len(images) for images in images_of(tmp_path, [encoded(), "[1, 1]", "['2', '1']"])] == [1, 2, 3]


@pytest.mark.parametrize("cell, message", [
    ("?" * 100, "no base64"), ("é" * 100, "no base64"), ("A" * 101, "no base64"), ("A" * 100, "cannot identify"),
    (encoded(size=(300, 300), kind="PNG")[:800], "image file is truncated"), ("['A', ", "like a list"),
    ("[" * 9999, "like a list"), ("[" + "-" * 99999 + "1]", "like a list"),
    (encoded().replace("A", "A?", 1), "no base64"), ("[None]", "row 'None'"), ("[{[]: 1}]", "like a list"),
], ids=range(11))
def test_an_image_that_is_none_is_a_value_error_of_readable_length(tmp_path, cell, message):
    error, = images_of(tmp_path, [cell])
    assert isinstance(error, str) and message in error and len(error) < 200 and "BytesIO" not in error, error


def test_max_pixels_holds_for_every_image_of_a_row(tmp_path):
    cells = [encoded(size=(400, 300)), str([encoded(size=(50, 900)), encoded(size=(20, 20))])]
    found = images_of(tmp_path, cells, 9000)
    assert [image.size for images in found for image in images] == [(109, 82), (22, 402), (20, 20)]
    assert all(image.width * image.height <= 9000 for images in found for image in images)


def test_images_are_not_held_in_memory(tmp_path):
    """25 images of 1 MB: a pass over the text and one over the images stay below 10 MB."""
    file = tmp_path / "big.tsv"
    with open(file, "w", newline="") as f:
        f.write("index\timage\tquestion\n")
        for i in range(25):
            noise = io.BytesIO()
            noise_image(580, 430, i).save(noise, "PNG", compress_level=0)
            f.write(f"{i}\t{base64.b64encode(noise.getvalue()).decode()}\twhat is this?\n")
    assert file.stat().st_size > 24e6
    tracemalloc.start()
    try:
        table = ev.read_tsv(file)
        reading, peak = tracemalloc.get_traced_memory()
        for row in table.rows.values():
            assert len(ev.row_images(table, row, 10**6)) == 1
        images = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert reading < 1e6 and max(peak, images) < 10e6, (reading, peak, images)


@has_real_rows
@pytest.mark.parametrize("benchmark, count", [("mathvision_mini", 304), ("dynamath", 400)])
def test_real_files_are_read_whole(benchmark, count):
    file = REAL_ROWS / ev.BENCHMARKS[benchmark].file
    table = ev.read_tsv(file, ev.BENCHMARKS[benchmark].columns)
    assert len(table.rows) == count and not table.complaints
    for row in list(table.rows.values())[::8]:
        image, = ev.row_images(table, row, 400_000)
        assert image.mode == "RGB" and image.width * image.height <= 400_000


# ─── 11. eval.py: from response to score ──────────────────────────────────────────────────────────────────────────────

def cases(benchmark):
    return records(CASES / f"{benchmark}.jsonl")


@functools.cache
def agreement(benchmark):
    """With the verdicts of a careful grader → number of cases, (answer, right answer, verdict) where we differ."""
    judged = [case for case in cases(benchmark) if case["truth"] is not None]
    scores = [ev.score(benchmark, case, case["prediction"]) for case in judged]
    return len(judged), [(s.answer, case["answer"], case["truth"]) for s, case in zip(scores, judged)
                         if s != case["truth"]]


@functools.cache
def lavin():
    """All 2,374 MME responses of a real model → our figures, and the rows that its publishers scored otherwise."""
    rows = cases("mme_lavin_full")
    scores = [ev.score("mme", row, row["prediction"]) for row in rows]
    return ev.summarize("mme", rows, scores), [row for row, s in zip(rows, scores) if s != row["official"]]


@has_cases
@pytest.mark.parametrize("benchmark", ev.PAPER)
def test_scores_agree_with_those_of_a_careful_grader(benchmark):
    n, differing = agreement(benchmark)
    assert n > 80 and 1 - len(differing) / n >= 0.97, differing


@has_cases
def test_mme_totals_of_a_real_model_are_those_published():
    summary, _ = lavin()
    assert summary["perception"] == pytest.approx(963.61, abs=1)
    assert summary["reasoning"] == pytest.approx(249.64, abs=1)
    assert summary["perception + reasoning"] == pytest.approx(summary["perception"] + summary["reasoning"])


@has_cases
def test_the_agreement_is_shown(capsys):
    lines = []
    for benchmark in ev.PAPER:
        n, differing = agreement(benchmark)
        lines.append(f"  {benchmark:15} {n - len(differing):4} of {n:4} {100 - 100 * len(differing) / n:6.1f} %")
    summary, differing = lavin()
    lines.append(f"  MME of LaVIN, 2,374 responses: {summary['perception']:.2f} + {summary['reasoning']:.2f}, "
                 f"published 963.61 + 249.64; {len(differing)} verdicts differ")
    with capsys.disabled():
        print("\n\nagreement of eval.py with the careful grader:", *lines, sep="\n")


# -- rows, and what answers to them must score

def verdict(benchmark, row, answer):
    """True or False for a right or wrong answer at the end of a path; None when it states none."""
    s = ev.score(benchmark, row, a_path(answer=answer))
    assert s in (0.0, 1.0) and (s.answer is not None or s == 0)
    return None if s.answer is None else s == 1.0


NAN = float("nan")
VISTA = {"question": "How many?", "answer": "14", "question_type": "free_form", "answer_type": "integer",
         "precision": None, "choices": None, "answer_option": None}
VISTA_FLOAT = VISTA | {"answer": "1.2", "answer_type": "float"}
VISTA_CHOICE = VISTA | {"question_type": "multi_choice", "answer_type": "text", "choices": "['135°', '140°', '145°']",
                        "answer": "145°", "answer_option": "C"}
STAR = {"question": "Which?", "A": "The suitcase is on the book.", "B": "The suitcase is beneath the cat.",
        "C": "Both.", "D": "Neither.", "answer": "B", "category": "math", "l2_category": "geometry"}
VISION = {"question": "How long?", "answer": "5", "choices": "[]", "category": "algebra", "level": 2}
VISION_CHOICE = VISION | {"answer": "A", "choices": "['5', '6', '7', '8', '1']"}
CHART = {"question": "What is the value?", "answer": "14", "split": "test_human"}
DYNA = {"question": "What is the period?", "answer": "2.0944", "answer_type": "float", "qid": 1, "varid": 1}
DYNA_CHOICE = DYNA | {"question": "Is it even? choice: (A) odd (B) even (C) neither", "answer": "B",
                      "answer_type": "multiple choice"}
HALLUSION = {"index": "VD_figure_1_0_0_0", "category": "VD", "l2-category": "VD_figure", "question": "Are they equal?",
             "answer": "No"}
VERSE = {"question": "Find AB.", "question_for_eval": "Find AB.", "answer": r"5\sqrt{3}", "question_type": "free-form",
         "problem_index": 1, "problem_version": "Text Lite"}
VERSE_CHOICE = VERSE | {"question_type": "multi-choice", "answer": "D",
                        "question_for_eval": "The angle is ()\nChoices:\nA:40°\nB:60°\nC:120°\nD:140°"}
MME = {"question": "Is there a car? Please answer yes or no.", "answer": "No", "category": "existence",
       "image_path": "existence/1.jpg"}
UNSURE = ("not sure", "I cannot tell.", "Yes or No", "It depends on the angle", "Norway", "Yesterday")


@pytest.mark.parametrize("benchmark, row, right, wrong", [
    # letters
    ("mmstar", STAR, ["B", "b", "(B)", "B.", "**B**", "(B) The suitcase is beneath the cat.", "Option B", r"\boxed{B}",
                      "The suitcase is beneath the cat.", "the suitcase is beneath the cat"],
     ["A", "C", "E", "A and B", "A, B", "AB", "B or C", "not B", "(B) The suitcase is on the book.", "the cat", ""]),
    ("mathvista", VISTA_CHOICE, ["C", "145", "145°", "(C) 145°", "C. 145 degrees"],
     ["A", "135", "D", "146", "(A) 145°", "C: 135°", ""]),
    ("mathvision", VISION_CHOICE, ["A", "(A)", "5", "A: 5"], ["E", "B", "6", "1", "9", "A: 6"]),
    ("dynamath", DYNA_CHOICE, ["B", "even", "(B) even"], ["A", "odd", "(A) even", "D", "B or C"]),
    ("mathverse", VERSE_CHOICE, ["D", "140", "140°", "D:140°", "∠CED = 140°"], ["C", "40", "E", "C:140°"]),
    # MathVista: rounded to the precision, 0 decimals for integers; 0 is an answer
    ("mathvista", VISTA, ["14", "14.0", "14.3", "13.6", "14 cars", "fourteen", "x = 14"],
     ["14.6", "15", "-14", "1", "4", ""]),
    ("mathvista", VISTA | {"answer": "0"}, ["0", "0.0", "zero", "0.4"], ["1", "10", "", "none of them"]),
    ("mathvista", VISTA | {"answer": 0}, ["0"], ["1", ""]),
    ("mathvista", VISTA_FLOAT | {"precision": "1.0"}, ["1.2", "1.24", "1.16", "6/5"], ["1.26", "1.3", "1", "12"]),
    *(("mathvista", VISTA_FLOAT | {"answer": "1.23", "precision": precision}, ["1.23", "1.234"], ["1.24", "1.2"])
      for precision in (2, 2.0, "2", "2.0", NAN, None)),
    ("mathvista", VISTA | {"answer": "[1, 2, 3]", "answer_type": "list"},
     ["[1, 2, 3]", "1, 2, 3", "[1,2,3]", "1, 2 and 3"],
     ["[1, 2]", "[1, 2, 4]", "[1, 2, 3, 4]", "6", "1", ""]),
    # MathVista: without answer_option the answer's text tells which it is
    *(("mathvista", VISTA_CHOICE | {"answer_option": absent}, ["C", "145°", "(C) 145°"], ["A", "135", "(A) 135°", "D"])
      for absent in (None, NAN, "", "nan")),
    # MMStar: what pandas made of a column with empty cells
    *(("mmstar", STAR | {"A": 3.0, "B": 4.0, "C": absent, "D": absent}, ["B", "4", "4.0", "(B) 4"],
       ["A", "C", "3", "nan", "None", "(A) 4"]) for absent in (None, NAN, "", "nan", "NaN", "None")),
    ("mmstar", STAR | {"A": 3, "B": 4, "C": 5, "D": 6}, ["B", "4", "four"], ["A", "3", "5.5"]),
    # Math-V: no letter is a number; tuples, fractions, LaTeX, π, roots, degrees
    ("mathvision", VISION, ["5", "5.0", "5.0000005", "$5$", "10/2", r"\frac{10}{2}", "√25"],
     ["A", "a", "B", "(A)", "E", "5.00001", "6", "15", "0.5", ""]),
    ("mathvision", VISION | {"answer": "(3, 4)"}, ["(3, 4)", "(3,4)", r"\left(3, 4\right)", "(3, 8/2)"],
     ["(4, 3)", "3", "(3, 4, 5)", "(3)", "34", "A"]),
    ("mathvision", VISION | {"answer": r"\frac{1}{2}"}, ["1/2", "0.5", r"\frac12", r"\dfrac{1}{2}", ".5"],
     ["0.51", "1", "2", "12", "A"]),
    ("mathvision", VISION | {"answer": r"9\pi"}, ["9π", r"9 \pi", "28.274334", "9*π"], ["9", "28.27", "π", "A"]),
    ("mathvision", VISION | {"answer": r"2\sqrt{3}"}, ["2√3", "3.4641016", r"\sqrt{12}"], ["3.46", "2", "√3"]),
    ("mathvision", VISION | {"answer": r"60^\circ"}, ["60", "60°", "60 degrees"], ["61", "6", "0"]),
    # ChartQA: 5 % of the right answer, not of the given one
    ("chartqa", CHART, ["14", "14.7", "13.3", "14.0", "$14", "fourteen"], ["14.71", "13.29", "15", "140", "1", ""]),
    ("chartqa", CHART | {"answer": "62"}, ["62", "65.1", "58.9"], ["65.2", "58.8", "6"]),
    ("chartqa", CHART | {"answer": "100"}, ["95", "105"], ["105.2", "94.9"]),          # 5 / 95 > 0.05 > 5.2 / 105.2
    ("chartqa", CHART | {"answer": 2010}, ["2010", "2014"], ["2200", "201"]),          # years are no exception
    ("chartqa", CHART | {"answer": "0"}, ["0", "0.0"], ["0.01", "1"]),
    ("chartqa", CHART | {"answer": "-8"}, ["-8", "−8.4", "-7.6"], ["8", "-8.5"]),
    ("chartqa", CHART | {"answer": "1,234"}, ["1234", "1,234", "1290"], ["1.234", "1,300"]),
    # ChartQA: % reads as /100 on both sides or on neither
    ("chartqa", CHART | {"answer": "50%"}, ["50%", "50", "0.5", "52.5%", "52.5", "0.52", "50 percent"],
     ["53%", "53", "0.53", "5", "0.5%"]),
    ("chartqa", CHART | {"answer": "0.5"}, ["0.5", "50%", "0.52"], ["50", "0.5%", "5"]),
    ("chartqa", CHART | {"answer": "50"}, ["50", "52"], ["50%", "0.5"]),
    ("chartqa", CHART | {"answer": "50", "question": "What percent is it?"}, ["50", "50%", "52%"], ["0.5", "53%"]),
    # ChartQA: texts and lists
    ("chartqa", CHART | {"answer": "Lamb"}, ["lamb", "LAMB", "Lamb.", '"Lamb"'],
     ["Corn", "Lamb chop", "Lam", "Lamb or Corn", ""]),
    ("chartqa", CHART | {"answer": "Yes"}, ["yes", "Yes."], ["No", "Yesterday", ""]),
    ("chartqa", CHART | {"answer": "[2014, 2016]"}, ["[2014, 2016]", "2014, 2016", "2014 and 2016"],
     ["2014", "[2014]", "[2014, 2016, 2018]", "2014-2016", ""]),
    ("chartqa", CHART | {"answer": "['Yes', 'No']"}, ["[Yes, No]", "yes, no"],
     ["Yes", "[Yes, Yes]", "Yes, No, No", ""]),
    ("chartqa", CHART | {"answer": "[red, red, blue]"}, ["[red, red, blue]"], ["[red, blue, blue]", "[red, blue]"]),
    # DynaMath: within 0.001
    ("dynamath", DYNA, ["2.0944", "2.095", "2.0935", "2π/3", r"\frac{2\pi}{3}"], ["2.0955", "2.093", "2.1", "2", ""]),
    ("dynamath", DYNA | {"answer": "1", "answer_type": "single answer"}, ["1", "1.001", "0.999"],
     ["1.0011", "11", "A"]),
    ("dynamath", DYNA | {"answer": "3", "answer_type": "int"}, ["3", "three", "3.0"], ["3.1", "13"]),
    ("dynamath", DYNA | {"answer": "x-axis", "answer_type": "text"}, ["x-axis", "X-axis.", "the x-axis"],
     ["y-axis", "x", ""]),
    # MathVerse: values, LaTeX, units
    ("mathverse", VERSE, [r"5\sqrt{3}", "5√3", r"$5\sqrt3$", "5√3 cm", "AB = 5√3", "5√3 ≈ 8.66", "8.6602540"],
     ["8.66", "5", "√3", "A", "D"]),
    ("mathverse", VERSE | {"answer": "40°"}, ["40", "40°", r"40^\circ", "40 degrees"], ["140", "4", "50"]),
    ("mathverse", VERSE | {"answer": "10 m"}, ["10", "10 m", "10 meters"], ["10 cm", "1", "100"]),
    # yes and no, as a word, before any explanation
    *((benchmark, row, ["No", "no.", "NO", "No, the bars differ", "No, as can be seen at a glance, yes means equal",
                        "no because yes is on the left", "**No**"],
       ["Yes", "yes, they are", "Yes, no bar is taller", *UNSURE, ""])
      for benchmark, row in (("mme", MME), ("hallusionbench", HALLUSION))),
    ("mme", MME | {"answer": "Yes"}, ["Yes", "yes, a car", "Yes."],
     ["No", "No, a car is absent", "A", "a car", *UNSURE]),
    ("mme", MME, ["No"], ["B", "(B)"]),                        # a letter is no answer here: there are no options
    ("hallusionbench", HALLUSION, ["B", "(B)", "B: No", "(B) No"], ["A", "(A)", "A: Yes", "A: No", "B: Yes", "C"]),
    ("hallusionbench", HALLUSION | {"answer": "Yes"}, ["A", "Yes", "A: Yes"], ["B", "No", "No, all bars are alike"]),
])
def test_a_score_worked_out_by_hand(benchmark, row, right, wrong):
    assert [answer for answer in right if not verdict(benchmark, row, answer)] == []
    assert [answer for answer in wrong if verdict(benchmark, row, answer)] == []


@pytest.mark.parametrize("benchmark, row, answers", [
    ("mme", MME, ["A", "B", "(B)", *UNSURE]), ("hallusionbench", HALLUSION, [*UNSURE, "A: No", "B: Yes"]),
    ("mathvista", VISTA, ["I do not know", "cannot be determined"]),
    ("chartqa", CHART, ["unclear", "between 3 and 20"]),
    ("mmstar", STAR, ["I cannot determine the answer", "hard to say"]),
    *((benchmark, row, ["", " ", "****", "$$", r"\boxed{}"]) for benchmark, row in (
        ("mathvista", VISTA), ("mathvista", VISTA_CHOICE), ("mmstar", STAR), ("mathvision", VISION), ("chartqa", CHART),
        ("chartqa", CHART | {"answer": "Lamb"}), ("dynamath", DYNA), ("hallusionbench", HALLUSION),
        ("mathverse", VERSE), ("mme", MME))),
])
def test_what_states_no_answer_is_unparsed(benchmark, row, answers):
    """'not sure' is no No; a letter is no answer where there are no options; a hedge is no number."""
    assert [answer for answer in answers if verdict(benchmark, row, answer) is not None] == []


@pytest.mark.parametrize("response, expected", [
    ("14", True), ("The answer is 14.", True), (r"So we get \boxed{14}.", True), ("First 3.\n\nThe answer is 14", True),
    ("### the FINAL answer is: 14", True), ("**The final answer is:** 14", True), ("The final answer is 14", True),
    (a_path(answer="13") + "\n### The final answer is: 14", True),       # the last header counts
    (a_path(answer="14") + "\n### The final answer is: 13", False),
    (a_path(answer="14") + "\n### Note:\nor is it 13?", True),           # up to the next section
    (a_path(answer="\n14\n"), True), (a_path(answer="It is 14, since 20 - 6 = 14."), True),
    (a_path(steps=("x = 14",), answer="13"), False),                     # a right number in a step rescues nothing
    (a_path(steps=("x = 14",), answer=""), None),
    ("### Image Description:\nA.\n### Step 1:\nx = 14", None),           # cut off before its answer
    ("", None), (" \n", None), ("The image shows 14 cars and 3 bikes, 17 in all.", None),
])
def test_where_the_answer_of_a_response_stands(response, expected):
    s = ev.score("mathvista", VISTA, response)
    assert (None if s.answer is None else s == 1) == expected


def test_the_answer_scored_is_told():
    s = ev.score("chartqa", CHART, a_path(answer="**14.7**"))
    assert s == 1 and isinstance(s, float) and s.answer == "14.7" and json.dumps(s) == "1.0"
    assert ev.score("mmstar", STAR, a_path(answer="A and B")).answer == "A, B"
    assert ev.score("mme", MME, a_path(answer="no, none")).answer == "No"


@pytest.mark.parametrize("benchmark, row, message", [
    ("mathvista", VISTA | {"answer": None}, "answer is missing"),
    ("chartqa", CHART | {"answer": NAN}, "answer is missing"),
    ("mme", MME | {"answer": ""}, "answer is missing"), ("chartqa", {"question": "?"}, "answer is missing"),
    ("mme", MME | {"answer": "Maybe"}, "neither Yes nor No"),
    ("hallusionbench", HALLUSION | {"answer": "1"}, "neither Yes nor No"),
    ("mathvista", VISTA_CHOICE | {"choices": "['1', "}, "SyntaxError"),
    ("mathvista", VISTA_CHOICE | {"answer": "150°", "answer_option": None}, "none of the options"),
    ("mathvision", VISION_CHOICE | {"answer": "9"}, "none of the options"),
])
def test_a_malformed_row_is_an_error_and_no_wrong_answer(benchmark, row, message):
    with pytest.raises(ValueError, match=message):
        ev.score(benchmark, row, a_path())


# -- hostile responses

CODE = "__import__('os').system('touch hacked')"
HOSTILE_RESPONSES = {
    "powers": "9**9**9", "tower": "9^9^9^9^9", "digits": "9" * 100_000, "braces": "{" * 10_000,
    "parentheses": "(" * 10_000, "nested": "((((1" * 10_000 + "))))" * 10_000, "frac": r"\frac{" * 3000,
    "sqrt": r"\sqrt{" * 5000, "√": "√" * 50_000, "boxed": r"\boxed{" * 20_000, "text": r"\text{" * 20_000,
    "left": r"\left(" * 20_000, "or": "A or " * 30_000, "list": "1," * 50_000, "statements": "answer is " * 20_000,
    "yes no": "yes no " * 30_000, "letters": "A" * 100_000, "[A": "[A" * 50_000, "blanks": " " * 200_000,
    "lines": "\n" * 200_000, "numbers": "1 " * 50_000, "minus": "-" * 50_000, "stars": "**" * 50_000,
    "2^": "2^" * 30_000, "1e": "1e" * 40_000, "1/": "1/" * 50_000, "0.": "0." * 50_000, "json": '"answer": ' * 20_000,
    "Chinese": "答案是" * 40_000, "x=": "x=" * 50_000, "u2028": "\u2028" * 100_000, "is": "is " * 60_000,
    "marks": "### " * 50_000, "steps": "### Step 1:\n" * 20_000, "so": "so " * 60_000,
    "headers": "The final answer is: " * 10_000, "sentences": ". " * 80_000, "words": "twenty " * 30_000,
    "quotes": '"' * 100_000, "negations": "is not " * 30_000, "backslashes": "\\" * 100_000, "dollars": "$" * 100_000,
    "code": CODE,
}
HOSTILE_ROWS = [("mathvista", VISTA), ("mathvista", VISTA_CHOICE), ("mmstar", STAR),
                ("mathvision", VISION | {"answer": "(3, 4)"}), ("chartqa", CHART | {"answer": "[2014, 2016]"}),
                ("dynamath", DYNA | {"answer": "x-axis"}), ("hallusionbench", HALLUSION), ("mathverse", VERSE),
                ("mme", MME)]


def slowest_score(text):
    return max((best_of(lambda: ev.score(benchmark, row, text), 2), benchmark) for benchmark, row in HOSTILE_ROWS)


@pytest.mark.parametrize("name", HOSTILE_RESPONSES)
def test_a_hostile_response_is_scored_in_time(name):
    text = HOSTILE_RESPONSES[name]
    assert max(slowest_score(text), slowest_score("### The final answer is: " + text)) < (BUDGET_S,)


def test_hostile_responses_are_scored_in_time_in_another_thread():
    found = []
    thread = threading.Thread(target=lambda: found.extend(map(slowest_score, HOSTILE_RESPONSES.values())), daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert len(found) == len(HOSTILE_RESPONSES) and max(found) < (BUDGET_S,)


def test_no_response_and_no_cell_of_a_row_is_run_as_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for benchmark, row in HOSTILE_ROWS:
        for answer in (CODE, f"[{CODE}, 1]", f"$${CODE}$$", "9**9**9"):
            assert not verdict(benchmark, row, answer)
        for column in row:
            with contextlib.suppress(ValueError):              # no right answer, no choices: a malformed row
                ev.score(benchmark, row | {column: CODE}, a_path(answer=CODE))
                ev.build_prompt(benchmark, row | {column: CODE})
    assert verdict("chartqa", CHART | {"answer": CODE}, CODE)  # it is a text
    assert not names_in(tmp_path)


def test_no_text_is_ever_given_to_the_interpreter():
    for file in PROJECT_FILES:
        called = {node.func.id for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
                  if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
        assert not called & {"eval", "exec", "compile"}, file


# -- prompts

TEMPLATE = """Generate an image description based on the question.
Then, provide a rationale to analyze the question.
Next, generate a step-by-step reasoning process to solve the problem. Ensure the steps are logical and concise.
Finally, provide a concise summary of the final answer in the following format: 'The final answer is: xxx.

Format your response with the following sections, separated by ###:
### Image Description:
### Rationales:
### Let's think step by step.
### Step 1:
### Step 2:
...
### The final answer is: \n\n"""


HINTED = "Hint: Answer with the letter.\nQuestion: How many?\nChoices:\n(A) 1\n(B) 2"


@pytest.mark.parametrize("benchmark, row, plain, asked", [
    *((benchmark, row, row["question"], "Question: " + row["question"]) for benchmark, row in (
        ("mathvista", VISTA), ("mathvision", VISION), ("chartqa", CHART), ("dynamath", DYNA_CHOICE),
        ("mathverse", VERSE_CHOICE), ("mme", MME))),
    ("mathvision_mini", VISION, "How long?", "Question: How long?"),
    # hint and choices are in these questions already, and so is the prefix
    *((benchmark, {"question": HINTED}, HINTED, HINTED) for benchmark in ("mathvista", "mathvision", "mathverse")),
    ("chartqa", {"question": r"Is {question} or {} or %s \frac{1}{2}?"}, r"Is {question} or {} or %s \frac{1}{2}?",
     r"Question: Is {question} or {} or %s \frac{1}{2}?"),
    ("chartqa", {"question": "Question:none"}, "Question:none", "Question: Question:none"),
    *(("mmstar", row, text, text) for row, text in (
        (STAR, "Question: Which?\nChoices:\nA: The suitcase is on the book.\nB: The suitcase is beneath the cat.\n"
               "C: Both.\nD: Neither.\nPlease select the correct answer from the choices above."),
        (STAR | {"A": 3.0, "B": 4, "C": NAN, "D": "", "hint": "Look up."},
         "Hint: Look up.\nQuestion: Which?\nChoices:\nA: 3.0\nB: 4\n"
         "Please select the correct answer from the choices above."),
        (STAR | {"C": None, "D": "nan", "hint": NAN},
         "Question: Which?\nChoices:\nA: The suitcase is on the book.\nB: The suitcase is beneath the cat.\n"
         "Please select the correct answer from the choices above."))),
    ("hallusionbench", HALLUSION, "Are they equal?\nChoices:\nA: Yes\nB: No",
     "Question: Are they equal?\nChoices:\nA: Yes\nB: No"),
])
def test_the_prompt_is_the_one_of_r1_vls_evaluation(benchmark, row, plain, asked):
    assert ev.build_prompt(benchmark, row, plain=True) == plain
    assert ev.build_prompt(benchmark, row) == TEMPLATE + asked


# ─── 12. eval.py: figures ─────────────────────────────────────────────────────────────────────────────────────────────

def mme_rows(answers):
    """'category image': scores → rows and scores."""
    rows = [({"index": str(n), "category": place.split()[0], "image_path": place, "question": "?", "answer": "Yes"}, s)
            for n, (place, s) in enumerate((place, s) for place, scores in answers.items() for s in scores)]
    return [row for row, _ in rows], [s for _, s in rows]


def test_mme_worked_out_by_hand():
    rows, scores = mme_rows({"existence a": (1, 1), "existence b": (1, 0), "OCR a": (1, 1), "OCR b": (1, 1),
                             "code_reasoning a": (0, 0), "numerical_calculation a": (0, 1)})
    # existence: acc 3/4 = 75, acc+ 1 of 2 images = 50, together 125; OCR 100 + 100; code 0; numerical 50 + 0.
    summary = ev.summarize("mme", rows, scores)
    assert list(summary.items())[0] == ("perception + reasoning", 375)
    assert {name: summary[name] for name in (
        "perception", "reasoning", "existence", "existence acc", "existence acc+", "OCR", "code_reasoning",
        "numerical_calculation", "numerical_calculation acc", "numerical_calculation acc+", "unparsed")} == {
        "perception": 325, "reasoning": 50, "existence": 125, "existence acc": 75, "existence acc+": 50, "OCR": 200,
        "code_reasoning": 0, "numerical_calculation": 50, "numerical_calculation acc": 50,
        "numerical_calculation acc+": 0, "unparsed": 0}


def hallusion_rows(scores):
    """'l2-category set figure question': score → rows and scores."""
    rows = []
    for place in scores:
        kind, *numbers = place.split()
        rows.append(HALLUSION | {"index": "_".join([kind, "1", *numbers]), "l2-category": kind, "category": kind[:2]})
    return rows, list(scores.values())


def test_hallusionbench_worked_out_by_hand():
    # Two figures of one set × two questions. Figure 0 has both right, figure 1 only question 0:
    #              question 0   question 1
    #   figure 0       1            1        → figure right          aAcc = 3/4, fAcc = 1/2 (figure 0),
    #   figure 1       1            0        → figure wrong          qAcc = 1/2 (question 0)
    rows, scores = hallusion_rows({"VD_figure 0 0 0": 1, "VD_figure 0 0 1": 1,
                                   "VD_figure 0 1 0": 1, "VD_figure 0 1 1": 0})
    summary = ev.summarize("hallusionbench", rows, scores)
    assert list(summary.items())[:4] == [("mean of aAcc, fAcc, qAcc", pytest.approx(175 / 3)),
                                         ("aAcc", 75), ("fAcc", 50), ("qAcc", 50)]
    # The same figure and question numbers in another set, and in another category, are others.
    rows, scores = hallusion_rows({"VD_figure 0 0 0": 1, "VD_figure 1 0 0": 0,
                                   "VD_chart 0 0 0": 1, "VS_chart 0 0 0": 0})
    summary = ev.summarize("hallusionbench", rows, scores)
    assert (summary["aAcc"], summary["fAcc"], summary["qAcc"]) == (50, 50, 50)
    assert (summary["category VD"], summary["category VS"]) == (pytest.approx(200 / 3), 0)


def test_dynamath_worked_out_by_hand():
    rows = [DYNA | {"index": str(n), "qid": n // 10, "varid": n % 10 + 1, "knowledge_level": "high school",
                    "subject": "arithmetic" if n < 20 else "algebra"} for n in range(30)]
    # Question 0 has all ten variants right, question 1 nine, question 2 none: average 19/30, worst case 1/3.
    scores = [1] * 10 + [0] + [1] * 9 + [0] * 10
    summary = ev.summarize("dynamath", rows, scores)
    assert list(summary)[:2] == ["average", "worst case"]
    assert summary["average"] == pytest.approx(1900 / 30) and summary["worst case"] == pytest.approx(100 / 3)
    assert summary["subject arithmetic"] == 95 and summary["subject algebra"] == 0


@pytest.mark.parametrize("benchmark, row, splits", [
    ("mathvista", VISTA, {"question_type": ["free_form", "multi_choice"], "answer_type": ["integer", "text"],
                          "task": ["chart", "figure"]}),
    ("mmstar", STAR, {"category": ["math", "logic"], "l2_category": ["a", "b"]}),
    ("mathvision", VISION, {"category": ["algebra", "counting"], "level": [1, 5]}),
    ("mathvision_mini", VISION, {"category": ["algebra", "counting"], "level": [1, 5]}),
    ("chartqa", CHART, {"split": ["test_human", "test_augmented"]}),
    ("mathverse", VERSE, {"problem_version": ["Text Lite", "Vision Only"],
                          "question_type": ["free-form", "multi-choice"]}),
])
def test_accuracy_comes_first_and_its_parts_by_split_follow(benchmark, row, splits):
    """Three right of four in the first half, one right of two in the second: 4/6, 3/4, 1/2."""
    rows = [row | {"index": str(n)} | {name: values[n >= 4] for name, values in splits.items()} for n in range(6)]
    summary = ev.summarize(benchmark, rows, [1, 1, 1, 0, 1, 0])
    assert list(summary)[0] == "accuracy" and summary["accuracy"] == pytest.approx(400 / 6)
    for name, (first, second) in splits.items():
        assert summary[f"{name} {first}"] == 75 and summary[f"{name} {second}"] == 50


def test_unparsed_responses_are_counted_and_wrong():
    rows = [CHART | {"index": str(n)} for n in range(5)]
    scores = [ev.score("chartqa", CHART, text)
              for text in ("14", a_path(answer="15"), "", "hard to say", a_path(answer="14"))]
    assert ev.summarize("chartqa", rows, scores) == {"accuracy": 40, "split test_human": 40, "unparsed": 2}


# Naive versions of the figures: one row after the other.

def naive_accuracy(rows, scores):
    return {"accuracy": 100 * sum(scores) / len(scores)}


def naive_mme(rows, scores):
    totals = Counter()
    for category in {row["category"] for row in rows}:
        inside = [(row["image_path"], s) for row, s in zip(rows, scores) if row["category"] == category]
        images = {image for image, _ in inside}
        both = [image for image in images if all(s == 1 for other, s in inside if other == image)]
        part = "reasoning" if category in ("code_reasoning", "commonsense_reasoning", "numerical_calculation",
                                           "text_translation") else "perception"
        totals[part] += 100 * sum(s for _, s in inside) / len(inside) + 100 * len(both) / len(images)
    return {"perception + reasoning": totals["perception"] + totals["reasoning"], **totals}


def naive_hallusionbench(rows, scores):
    def all_right(*places):
        units = {}
        for row, s in zip(rows, scores):
            numbers = row["index"].split("_")[-3:]
            units.setdefault((row["l2-category"], *(numbers[place] for place in places)), []).append(s)
        return 100 * sum(min(unit) for unit in units.values()) / len(units)
    parts = {"aAcc": 100 * sum(scores) / len(scores), "fAcc": all_right(0, 1), "qAcc": all_right(0, 2)}
    return {"mean of aAcc, fAcc, qAcc": sum(parts.values()) / 3, **parts}


def naive_dynamath(rows, scores):
    qids = {row["qid"] for row in rows}
    worst = [min(s for row, s in zip(rows, scores) if row["qid"] == qid) for qid in qids]
    return {"average": 100 * sum(scores) / len(scores), "worst case": 100 * sum(worst) / len(worst)}


MME_CATEGORIES = ("existence count position color posters celebrity scene landmark artwork OCR code_reasoning "
                  "commonsense_reasoning numerical_calculation text_translation").split()
RANDOM_ROWS = {
    "mme": [MME | {"index": str(n), "category": MME_CATEGORIES[n % 14], "image_path": f"{n % 42}.png"}
            for n in range(84)],
    "hallusionbench": [HALLUSION | {"index": f"{kind}_1_{s}_{f}_{q}", "l2-category": kind}
                       for kind in ("VD_figure", "VS_chart") for s in range(4) for f in range(3) for q in range(3)],
    "dynamath": [DYNA | {"index": str(n), "qid": n // 3, "varid": n % 3} for n in range(60)],
    "mathverse": [VERSE | {"index": str(n), "problem_index": n // 5} for n in range(200)],
    "chartqa": [CHART | {"index": str(n)} for n in range(50)],
}
# the same name in two other categories: two more images
RANDOM_ROWS["mme"] += [row | {"index": f"b{n}", "image_path": "0.png"} for n, row in enumerate(RANDOM_ROWS["mme"][1:3])]
NAIVE = {"mme": naive_mme, "hallusionbench": naive_hallusionbench, "dynamath": naive_dynamath}


@pytest.mark.parametrize("benchmark", RANDOM_ROWS)
@pytest.mark.parametrize("seed", range(3))
def test_figures_equal_a_naive_count(benchmark, seed):
    rng = random.Random(seed)
    rows = rng.sample(RANDOM_ROWS[benchmark], len(RANDOM_ROWS[benchmark]))      # in any order
    scores = [float(rng.random() < 0.7) for _ in rows]
    naive = NAIVE.get(benchmark, naive_accuracy)(rows, scores)
    summary = ev.summarize(benchmark, rows, scores)
    assert next(iter(summary)) == next(iter(naive))
    assert {name: summary[name] for name in naive} == pytest.approx(naive)


# -- intervals

def naive_interval(clusters, resamples, rng):
    """95 % bootstrap interval of the accuracy: lists of scores that are drawn together."""
    means = []
    for _ in range(resamples):
        drawn = [s for cluster in rng.choices(clusters, k=len(clusters)) for s in cluster]
        means.append(100 * sum(drawn) / len(drawn))
    means.sort()
    return means[int(0.025 * resamples)], means[int(0.975 * resamples)]


@pytest.mark.parametrize("benchmark, column", [
    ("chartqa", "index"), ("mathverse", "problem_index"), ("dynamath", "qid")])
def test_intervals_equal_a_naive_bootstrap_over_clusters(benchmark, column):
    rng, clusters, scores = random.Random(0), {}, []
    rows = RANDOM_ROWS[benchmark]
    for row in rows:                                           # the rows of a cluster are alike
        cluster = clusters.setdefault(row[column], [])
        scores.append(cluster[0] if cluster and rng.random() < 0.8 else float(rng.random() < 0.6))
        cluster.append(scores[-1])
    naive = naive_interval(list(clusters.values()), 3000, rng)
    name = "average" if benchmark == "dynamath" else "accuracy"
    low, high = ev.intervals(benchmark, rows, scores, resamples=3000)[name]
    step = 100 / len(clusters)                                 # between neighbouring means of the draws
    assert low == pytest.approx(naive[0], abs=step) and high == pytest.approx(naive[1], abs=step)
    assert high - low == pytest.approx(naive[1] - naive[0], abs=step)
    assert low < ev.summarize(benchmark, rows, scores)[name] < high


def test_ten_identical_variants_count_as_one_row_in_an_interval():
    """As if independent, they would make the interval √10 times too narrow."""
    rng = random.Random(1)
    outcomes = [float(rng.random() < 0.5) for _ in range(60)]
    once = ev.intervals("chartqa", [CHART | {"index": str(n)} for n in range(60)], outcomes)["accuracy"]
    rows = [DYNA | {"index": f"{qid} {varid}", "qid": qid, "varid": varid} for qid in range(60) for varid in range(10)]
    tenfold = ev.intervals("dynamath", rows, [s for s in outcomes for _ in range(10)])
    assert tenfold["average"] == pytest.approx(once) and tenfold["worst case"] == pytest.approx(once)
    independent = ev.intervals("chartqa", [CHART | {"index": str(n)} for n in range(600)], outcomes * 10)["accuracy"]
    widths = [high - low for low, high in (tenfold["average"], independent)]
    assert widths[0] / widths[1] == pytest.approx(10 ** .5, rel=0.15)


def test_questions_on_one_image_are_drawn_together():
    """So acc and acc+ never disagree about what was drawn: with both questions right or both wrong they are equal."""
    rows, scores = mme_rows({f"OCR {n}": (n % 3 > 0,) * 2 for n in range(30)})
    found = ev.intervals("mme", rows, scores)
    assert found["OCR acc"] == found["OCR acc+"] and found["OCR acc"][0] < 200 / 3 < found["OCR acc"][1]
    assert found["perception + reasoning"] == pytest.approx([2 * bound for bound in found["OCR acc"]])


def test_intervals_are_reproducible_and_certain_figures_have_no_width():
    rows, scores = RANDOM_ROWS["mathverse"], [float(n // 5 % 3 * n % 7 > 1) for n in range(200)]
    first = ev.intervals("mathverse", rows, scores)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert ev.intervals("mathverse", rows, scores) == first and torch.equal(torch.get_rng_state(), state)
    assert ev.intervals("mathverse", rows, scores, seed=1) != first
    assert ev.intervals("mathverse", rows, [1.0] * 200)["accuracy"] == (100, 100)
    assert ev.intervals("mathverse", rows[:1], [0.0])["accuracy"] == (0, 0)
    for benchmark, rows in RANDOM_ROWS.items():                # every figure has one, but the count
        scores = [float(n % 3 > 0) for n in range(len(rows))]
        summary = ev.summarize(benchmark, rows, scores)
        for name, (low, high) in ev.intervals(benchmark, rows, scores).items():
            assert low <= summary[name] <= high, (benchmark, name)


# -- the paper's table

def test_the_average_is_the_papers_truncated_to_one_decimal_with_mme_over_28():
    found = {name: ev.average(dict(zip(ev.PAPER, numbers))) for name, numbers in ev.PUBLISHED.items()}
    assert found == {"Qwen2-VL-2B": 41.2, "Qwen2-VL-2B-GRPO": 41.4, "R1-VL-2B": 45.8, "Qwen2-VL-7B": 53.3,
                     "Qwen2-VL-7B-GRPO": 51.4, "R1-VL-7B": 57.1}
    full = dict(zip(ev.PAPER, ev.PUBLISHED["R1-VL-7B"]))
    assert ev.average({**full, "mathvision_mini": 99}) == 57.1
    for name in ev.PAPER:
        assert ev.average({other: value for other, value in full.items() if other != name}) is None
    assert ev.average(dict.fromkeys(ev.PAPER, 60) | {"mme": 60 * 28}) == 60         # no 59.9 by rounding
    assert ev.average(dict.fromkeys(ev.PAPER, 0)) == 0


@needs("METHOD.md")
def test_the_published_rows_are_those_of_the_paper():
    lines = (SHARED / "METHOD.md").read_text(encoding="utf-8").split("## 8.")[1].splitlines()
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines if line.startswith("| ")]
    published = {name: tuple(map(float, numbers)) for name, *numbers in cells if len(numbers) == 8 and numbers[0]}
    assert published == ev.PUBLISHED
    assert re.findall(r"MathVista.*MME", lines[0])[0].split() == [ev.BENCHMARKS[name].title for name in ev.PAPER]


@needs("BENCHMARKS.md")
def test_files_sums_and_addresses_are_the_published_ones():
    text = (SHARED / "BENCHMARKS.md").read_text(encoding="utf-8")
    for name, b in ev.BENCHMARKS.items():
        assert b.file in text and b.md5 in text and b.url in text, name
    for line in text.split("columns needed")[1].split("\n\n")[0].splitlines():
        name, *rest = [cell.strip() for cell in line.strip("| ").split("|")]
        if name in ev.BENCHMARKS:                              # each column that must be there is published
            for column in ev.BENCHMARKS[name].columns:
                assert re.search(rf"\b{column}\b|A–D", " ".join(rest)), (name, column)


def a_result(headline, **more):
    return {"headline": headline, "interval": (headline - 1, headline + 2), "rows": 8, "unparsed": 2} | more


def test_the_table_shows_what_was_measured_beside_the_paper():
    results = {name: a_result(2000.4 if name == "mme" else 50.04) for name in ev.PAPER}
    rows = ev.table_rows(results, "mine")
    assert {len(row) for row in rows} == {10} and rows[0][-1] == "Average" and rows[0][1] == "MathVista"
    assert rows[6] == ["R1-VL-7B (paper)", "63.5", "60.0", "24.7", "83.9", "45.2", "54.7", "40.0", "2376", "57.1"]
    shown = {row[0].strip(): row[1:] for row in rows}
    assert shown["mine"] == ["50.0"] * 7 + ["2000", "52.7"]    # (7 · 50.04 + 2000.4 / 28) / 8 = 52.72
    assert shown["95 % interval, from"][:8] == ["49.0"] * 7 + ["1999"] and shown["to"][:8] == ["52.0"] * 7 + ["2002"]
    assert shown["rows"][:8] == ["8"] * 8 and shown["unparsed, %"][:8] == ["25.0"] * 8
    assert not any("judge" in row[0] for row in rows)
    some = {"mme": a_result(7), "mathvision_mini": a_result(9)}
    some = {row[0].strip(): row[1:] for row in ev.table_rows(some, "mine")}
    assert some["mine"] == ["–"] * 7 + ["7", "9.0", "–"] and some["R1-VL-7B (paper)"][-2:] == ["–", "57.1"]
    lines = ev.as_text(rows).splitlines()
    assert len(lines) == len(rows) and len({len(line.rstrip()) for line in lines[:8]}) == 1 and len(lines[0]) <= 120
    markdown = ev.as_markdown(rows).splitlines()
    assert len(markdown) == len(rows) + 1 and {line.count("|") for line in markdown} == {11}


def test_an_average_of_zero_is_shown():
    rows = ev.table_rows({name: a_result(0) for name in ev.PAPER}, "mine")
    assert next(row for row in rows if row[0] == "mine")[-1] == "0.0"


# ─── 13. eval.py: a whole run ─────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture(scope="module")
def random_tiny(tmp_path_factory):
    """The folder of a checkpoint of random weights."""
    folder = tmp_path_factory.mktemp("models") / "random-tiny"
    sg.build_tiny(folder, [a_path()] * 4, seed=0)
    return folder


@pytest.fixture(scope="module")
def miniatures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    bench.make_bench(folder, 0)
    return folder


def run_eval(*flags):
    """eval.py as from the command line → its exit: 0, 130, or the line it stops with."""
    try:
        ev.main([str(flag) for flag in flags])
    except SystemExit as stop:
        return stop.code or 0
    return 0


@pytest.fixture(scope="module")
def evaluated(random_tiny, miniatures, tmp_path_factory):
    """The folder of an evaluation of all eight miniatures that nothing disturbed."""
    out = tmp_path_factory.mktemp("evaluated") / "eval"
    assert run_eval("--model", random_tiny, "--data", miniatures, "--out", out, "--device", "cpu",
                    "--max-new-tokens", 4) == 0
    return out


@pytest.fixture
def ask(random_tiny, miniatures, tmp_path):
    """ask('mme', '--limit', 3): evaluates the random model into tmp_path / out; a flag given again wins."""
    def ask(benchmarks, *flags):
        return run_eval("--model", random_tiny, "--data", miniatures, "--out", tmp_path / "out", "--device", "cpu",
                        "--max-new-tokens", 4, "--benchmarks", benchmarks, *flags)
    return ask


@contextlib.contextmanager
def counted(stop_before=None):
    """Counts how many questions the model gets, batch by batch; Ctrl-C instead of batch number `stop_before`."""
    batches, rollout = [], sg.rollout

    def spy(model, processor, prompts, *args, **more):
        if len(batches) == stop_before:
            raise KeyboardInterrupt
        batches.append(len(prompts))
        return rollout(model, processor, prompts, *args, **more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sg, "rollout", spy)
        yield batches


@contextlib.contextmanager
def at_batch(number, act):
    """Calls act() instead of sampling this batch, the first being 0."""
    rollout, seen = sg.rollout, itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sg, "rollout", lambda *args, **more: act() if next(seen) == number else rollout(*args, **more))
        yield


@pytest.fixture
def no_model(monkeypatch):
    """Makes loading a model an error."""
    def refuse(*args):
        raise AssertionError("a model is loaded")
    monkeypatch.setattr(sg, "load_model", refuse)


def scores_of(out):
    return json.loads((Path(out) / "scores.json").read_text())["benchmarks"]


def table_of(folder, benchmark):
    return ev.read_tsv(Path(folder) / ev.BENCHMARKS[benchmark].file)


def cells_of(folder, benchmark):
    """The rows of a benchmark that have an image."""
    return [row.cells for row in table_of(folder, benchmark).rows.values() if row.has_image]


def change_rows(source, target, change):
    """Copies a TSV file; change(number of the line, cells) edits the cells of each row."""
    table = ev.read_tsv(source)
    with open(source, encoding="utf-8", newline="") as f:
        header, *rows = csv.reader(f, "excel-tab")
    assert header == table.header
    for line, row in enumerate(rows, 2):
        change(line, row)
    return write_tsv(target, rows, header, end="\n")


def write_lines(file, made):
    file.write_text("".join(json.dumps(record) + "\n" for record in made), encoding="utf-8")
    return file


def answers_to(rows, wrong_every=3):
    """[(id, response)]: right paths, but every third (the first, the fourth …) without an answer."""
    return [(row["index"], a_path(answer=row["answer"] if n % wrong_every else "")) for n, row in enumerate(rows)]


def test_a_whole_run_writes_every_response_the_table_and_all_figures(evaluated, miniatures, random_tiny):
    found = scores_of(evaluated)
    assert list(found) == list(ev.PAPER)
    for name in ev.PAPER:
        rows, made, b = cells_of(miniatures, name), records(evaluated / f"{name}.jsonl"), ev.BENCHMARKS[name]
        assert [r["id"] for r in made] == [row["index"] for row in rows]
        scores = [ev.score(name, row, r["response"]) for row, r in zip(rows, made)]
        assert [(r["prompt"], r["answer"], r["score"]) for r in made] == [
            (ev.build_prompt(name, row), s.answer, s) for row, s in zip(rows, scores)]
        summary, spread = ev.summarize(name, rows, scores), ev.intervals(name, rows, scores)
        headline = next(iter(summary))
        assert found[name]["headline"] == summary[headline] and found[name]["interval"] == list(spread[headline])
        assert {figure: f["value"] for figure, f in found[name]["figures"].items()} == summary
        assert (found[name]["rows"], found[name]["unparsed"]) == (len(rows), summary["unparsed"])
        assert found[name]["file"] == str(miniatures / b.file)
        assert found[name]["md5"] == hashlib.md5((miniatures / b.file).read_bytes()).hexdigest()
    assert json.loads((evaluated / "scores.json").read_text())["average"] == 0
    assert json.loads((evaluated / "scores.json").read_text())["model"] == str(random_tiny)
    table = (evaluated / "table.md").read_text(encoding="utf-8")
    assert "| R1-VL-7B (paper) | 63.5 |" in table and f"| {random_tiny} | 0.0 |" in table
    assert not list(evaluated.glob("*.new"))


def test_rows_without_an_image_are_left_out_and_counted(evaluated, miniatures):
    assert {name: r["without image"] for name, r in scores_of(evaluated).items()} == dict.fromkeys(ev.PAPER, 0) | {
        "hallusionbench": 2}
    assert "hallusionbench: 2 rows without image left out" in (evaluated / "table.md").read_text(encoding="utf-8")
    assert len(table_of(miniatures, "hallusionbench").rows) == 2 + len(records(evaluated / "hallusionbench.jsonl"))


def test_each_response_is_the_greedy_one_to_its_own_images_and_prompt(evaluated, miniatures, random_tiny):
    """Naive: one row at a time, the images decoded here."""
    model, processor = sg.load_model(random_tiny, torch.device("cpu"), torch.float32, 10**6)
    for name in ("mathvision", "hallusionbench"):              # lists of images, and references to other rows
        table = table_of(miniatures, name)
        with open(table.file, encoding="utf-8", newline="") as f:
            images = {row["index"]: row["image"] for row in csv.DictReader(f, delimiter="\t")}
        for r in records(evaluated / f"{name}.jsonl"):
            cell = images[r["id"]]
            cell = images.get(cell, cell)
            texts = ast.literal_eval(cell) if cell.startswith("[") else [cell]
            shown = [Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB") for text in texts]
            prompt = processor.prompt(ev.build_prompt(name, table.rows[r["id"]].cells), shown)
            assert sg.rollout(model, processor, [prompt], 1, 4, temperature=0).texts == [[r["response"]]]


@pytest.mark.parametrize("size", [1, 7, 99])
def test_batch_size_does_not_change_the_responses(size, ask, evaluated, tmp_path):
    with counted() as batches:
        assert ask("mathvision,chartqa", "--batch-size", size) == 0
    assert max(batches) == min(size, 16) and sum(batches) == 32
    for name in ("mathvision", "chartqa"):
        assert (tmp_path / "out" / f"{name}.jsonl").read_bytes() == (evaluated / f"{name}.jsonl").read_bytes()


# -- stop, go on, and what must not be mixed

def test_a_stopped_run_goes_on_and_never_asks_twice(ask, evaluated, tmp_path, capsys):
    out = tmp_path / "out"
    with counted(stop_before=2) as batches:
        assert ask("mme", "--batch-size", 5) == 130
    assert batches == [5, 5] and "the same command goes on" in capsys.readouterr().out
    assert len(records(out / "mme.jsonl")) == 10               # written as they came
    with counted() as batches:
        assert ask("mme", "--batch-size", 5) == 0
    assert sum(batches) == 14
    assert (out / "mme.jsonl").read_bytes() == (evaluated / "mme.jsonl").read_bytes()
    assert scores_of(out)["mme"] == scores_of(evaluated)["mme"]
    with counted() as batches:
        assert ask("mme") == 0
    assert batches == []


@pytest.mark.parametrize("cut", [1, 20, 300])
def test_a_last_line_torn_by_a_kill_is_asked_again(cut, ask, evaluated, tmp_path):
    shutil.copytree(evaluated, tmp_path / "out")
    whole = (evaluated / "mme.jsonl").read_bytes()
    (tmp_path / "out" / "mme.jsonl").write_bytes(whole[:-cut])
    with counted() as batches:
        assert ask("mme") == 0
    assert sum(batches) == 1 and (tmp_path / "out" / "mme.jsonl").read_bytes() == whole


def test_kill_9_keeps_what_was_answered(ask, evaluated, tmp_path):
    with at_batch(3, killed), pytest.raises(Killed):
        ask("mme", "--batch-size", 4)
    assert len(records(tmp_path / "out" / "mme.jsonl")) == 12
    with counted() as batches:
        assert ask("mme") == 0
    assert sum(batches) == 12
    assert (tmp_path / "out" / "mme.jsonl").read_bytes() == (evaluated / "mme.jsonl").read_bytes()


def test_limit_then_a_larger_limit_asks_the_difference(ask, evaluated, tmp_path):
    asked = []
    for flags in (["--limit", 3], ["--limit", 5], ["--limit", 2], []):
        with counted() as batches:
            assert ask("mmstar", *flags) == 0
        asked.append((sum(batches), scores_of(tmp_path / "out")["mmstar"]["rows"]))
    assert asked == [(3, 3), (2, 5), (0, 2), (11, 16)]         # a smaller limit looks at fewer rows, and drops none
    assert (tmp_path / "out" / "mmstar.jsonl").read_bytes() == (evaluated / "mmstar.jsonl").read_bytes()


@pytest.mark.parametrize("what, flags", [
    ("md5", []), ("weights", []), ("plain", ["--plain"]), ("max_new_tokens", ["--max-new-tokens", 5]),
    ("max_pixels", ["--max-pixels", 50_000])])
def test_responses_made_otherwise_are_never_mixed(what, flags, random_tiny, miniatures, tmp_path):
    model, data, out = (tmp_path / name for name in ("model", "data", "out"))
    shutil.copytree(random_tiny, model)
    shutil.copytree(miniatures, data)
    fixed = ["--model", model, "--data", data, "--out", out, "--benchmarks", "mmstar", "--device", "cpu", "--limit", 4,
             "--max-new-tokens", 3]
    assert run_eval(*fixed) == 0
    before = names_in(out), (out / "mmstar.jsonl").read_bytes()
    if what == "md5":
        with open(data / "MMStar.tsv", "a") as f:
            f.write("\n")
    if what == "weights":                                      # trained further, in the same folder
        shutil.rmtree(model)
        sg.build_tiny(model, [a_path()] * 4, seed=1)
    with counted() as batches:
        refused = run_eval(*fixed, *flags)
    assert re.findall(r"(\w+) was \S+ and is", refused) == [what], refused
    assert "mmstar.jsonl" in refused and "--overwrite" in refused and "--out" in refused
    assert batches == [] and (names_in(out), (out / "mmstar.jsonl").read_bytes()) == before
    with counted() as batches:
        assert run_eval(*fixed, *flags, "--overwrite") == 0
        assert run_eval(*fixed, *flags) == 0                   # and now it is these settings that go on
    assert batches == [4] and len(records(out / "mmstar.jsonl")) == 4


def test_what_does_not_change_a_response_may_differ(ask, tmp_path):
    assert ask("mmstar", "--limit", 4) == 0
    with counted() as batches:
        assert ask("chartqa", "--limit", 2) == 0               # another benchmark in the same folder
        assert ask("mmstar,chartqa", "--limit", 5, "--batch-size", 2, "--skip-bad-rows") == 0
    assert batches == [2, 1, 2, 1]
    assert names_in(tmp_path / "out") == ["chartqa.jsonl", "mmstar.jsonl", "scores.json", "settings.json", "table.md"]


def test_overwrite_asks_only_the_named_benchmarks_again(ask, evaluated, tmp_path):
    shutil.copytree(evaluated, tmp_path / "out")
    with counted() as batches:
        assert ask("mathverse", "--overwrite") == 0
        assert ask("mathverse,chartqa") == 0
    assert sum(batches) == 15
    assert (tmp_path / "out" / "mathverse.jsonl").read_bytes() == (evaluated / "mathverse.jsonl").read_bytes()


def test_kept_responses_are_scored_anew(ask, evaluated, miniatures, tmp_path):
    """The rules may be newer than the responses. Here the responses are: right ones, under their old scores."""
    out = tmp_path / "out"
    shutil.copytree(evaluated, out)
    for name in ev.PAPER:
        rows = {row["index"]: row for row in cells_of(miniatures, name)}
        write_lines(out / f"{name}.jsonl", [r | {"response": a_path(answer=rows[r["id"]]["answer"])}
                                            for r in records(out / f"{name}.jsonl")])
    with counted() as batches:
        assert ask(",".join(ev.PAPER)) == 0
    found = scores_of(out)
    assert batches == [] and {name: r["headline"] for name, r in found.items()} == dict.fromkeys(ev.PAPER, 100) | {
        "mme": 1200}                                           # six of the fourteen categories
    assert all(r["unparsed"] == 0 for r in found.values())
    assert all(r["score"] == 1 and r["answer"] for name in ev.PAPER for r in records(out / f"{name}.jsonl"))
    assert json.loads((out / "scores.json").read_text())["average"] == 92.8              # (700 + 1200 / 28) / 8


# -- bad rows

def test_malformed_rows_stop_with_file_and_line_before_a_model_is_loaded(ask, miniatures, tmp_path, no_model):
    def spoil(line, row):
        if line == 4:
            row.append("too many")
        if line == 6:
            row[3] = ""                                        # the answer
        if line == 9:
            row[2] = " "                                       # the question
        if line == 11:
            row[0] = "1"                                       # the index of another row
    file = change_rows(miniatures / "ChartQA_TEST.tsv", tmp_path / "ChartQA_TEST.tsv", spoil)
    refused = ask("chartqa", "--data", tmp_path)
    assert refused.startswith("eval: 4 rows cannot be used:") and "--skip-bad-rows" in refused
    for part in ("line 4: has 6 cells", "line 6: chartqa row: the answer is missing", "line 9: the question is empty",
                 f"line 11: has the index '1' of {file} line 3"):
        assert f"{file} {part}" in refused
    assert not (tmp_path / "out" / "chartqa.jsonl").exists()


def test_skip_bad_rows_goes_on_without_them(ask, miniatures, tmp_path, capsys):
    def spoil(line, row):
        if line in (4, 6):
            row[3] = ""
    change_rows(miniatures / "ChartQA_TEST.tsv", tmp_path / "ChartQA_TEST.tsv", spoil)
    assert ask("chartqa", "--data", tmp_path, "--skip-bad-rows") == 0
    printed = capsys.readouterr()
    assert "skipped 2 bad rows, the first: " in printed.out + printed.err
    assert scores_of(tmp_path / "out")["chartqa"]["rows"] == 14
    assert {"2", "4"} & {r["id"] for r in records(tmp_path / "out" / "chartqa.jsonl")} == set()


@pytest.mark.parametrize("benchmark, kind, column, value", [
    ("mathvista", "multi_choice", "choices", "['1', "), ("mathvista", "multi_choice", "choices", "5"),
    ("mathvista", "multi_choice", "choices", "[" * 300),
    ("mathvista", "float", "precision", "many"), ("mathvista", "float", "precision", "inf"),
    ("mathvista", "integer", "question", ""), ("mmstar", "math", "answer", "Z"), ("mmstar", "math", "question", ""),
    ("mme", "No", "answer", "perhaps"), ("hallusionbench", "VD", "answer", "2"),
    ("hallusionbench", "VD", "index", "17"), ("hallusionbench", "VD", "question", "nan"),
    ("mathverse", "free-form", "answer", ""),
], ids=lambda value: value if len(value) < 20 else "[…")
def test_every_kind_of_malformed_row_is_named_by_its_line(benchmark, kind, column, value, ask, miniatures, tmp_path,
                                                          no_model):
    """`kind` tells which row is spoiled: the first with such a cell."""
    header, spoiled = table_of(miniatures, benchmark).header, []

    def spoil(line, row):
        if kind in row and not spoiled:
            row[header.index(column)] = value
            spoiled.append(line - 2)
    file = change_rows(miniatures / ev.BENCHMARKS[benchmark].file, tmp_path / ev.BENCHMARKS[benchmark].file, spoil)
    refused = ask(benchmark, "--data", tmp_path)
    assert isinstance(refused, str) and refused.startswith("eval: 1 rows cannot be used:")
    assert list(ev.read_tsv(file).rows.values())[spoiled[0]].where + ": " in refused


def test_a_torn_image_stops_with_file_and_line_and_can_be_skipped(ask, miniatures, tmp_path):
    def tear(line, row):
        if line == 5:
            row[1] = row[1][:len(row[1]) // 2]
    file = change_rows(miniatures / "ChartQA_TEST.tsv", tmp_path / "ChartQA_TEST.tsv", tear)
    with counted() as batches:
        refused = ask("chartqa", "--data", tmp_path, "--batch-size", 2)
        assert f"{file} line 5: its image cell holds no base64 of an image" in refused and "--skip-bad-rows" in refused
        assert "BytesIO" not in refused
        assert ask("chartqa", "--data", tmp_path, "--batch-size", 2, "--skip-bad-rows") == 0
    assert sum(batches) == 15                                  # what came before the error was kept
    found = scores_of(tmp_path / "out")["chartqa"]
    assert (found["rows"], found["without response"], found["without image"]) == (15, 1, 0)
    assert "chartqa: 1 rows without response left out" in (tmp_path / "out" / "table.md").read_text(encoding="utf-8")


# -- responses of other engines

FORMS = {
    "id.jsonl": lambda file, answers: write_lines(file, [{"id": name, "response": text} for name, text in answers]),
    "index.jsonl": lambda file, answers: write_lines(file, [
        {"index": int(name), "prediction": text, "model": "x"} for name, text in reversed(answers)]),
    "vlmevalkit.tsv": lambda file, answers: write_tsv(file, [[name, "a\nb", text] for name, text in answers],
                                                      ("index", "question", "prediction")),
}


@pytest.mark.parametrize("benchmark", ["mathvista", "mme", "dynamath"])
def test_predictions_of_any_engine_score_as_those_of_the_model(benchmark, ask, evaluated, miniatures, tmp_path,
                                                               no_model):
    answers = answers_to(cells_of(miniatures, benchmark))
    own = write_lines(tmp_path / "own.jsonl", [         # as if the model had given them
        r | {"response": text} for r, (_, text) in zip(records(evaluated / f"{benchmark}.jsonl"), answers)])
    rows = cells_of(miniatures, benchmark)
    scores = [ev.score(benchmark, row, text) for row, (_, text) in zip(rows, answers)]
    expected = ev.summarize(benchmark, rows, scores)
    assert 0 < expected[next(iter(expected))] and expected["unparsed"] == -(-len(rows) // 3)
    files = [own, *(form(tmp_path / name, answers) for name, form in FORMS.items())]
    for n, file in enumerate(files):
        out = tmp_path / f"out{n}"
        assert ask(benchmark, "--predictions", file, "--out", out) == 0
        (found,) = scores_of(out).values()
        assert {name: f["value"] for name, f in found["figures"].items()} == expected
        assert found["unparsed"] == expected["unparsed"] and found["without response"] == 0
        assert f"| {file} |" in (out / "table.md").read_text(encoding="utf-8")


def test_scoring_the_models_own_file_changes_no_figure(ask, evaluated, tmp_path, no_model):
    before = (evaluated / "chartqa.jsonl").read_bytes()
    assert ask("chartqa", "--predictions", evaluated / "chartqa.jsonl") == 0
    assert scores_of(tmp_path / "out")["chartqa"] == scores_of(evaluated)["chartqa"]
    assert (evaluated / "chartqa.jsonl").read_bytes() == before


def test_scores_of_predictions_go_beside_them_and_some_rows_may_lack_one(miniatures, tmp_path, monkeypatch, no_model):
    monkeypatch.chdir(tmp_path)
    Path("vllm").mkdir()
    write_lines(Path("vllm/answers.jsonl"), [{"id": name, "response": text} for name, text in
                                        answers_to(cells_of(miniatures, "chartqa"))[:5]])
    assert run_eval("--benchmarks", "chartqa", "--data", miniatures, "--predictions", "vllm/answers.jsonl") == 0
    (found,) = scores_of("vllm/eval").values()
    assert (found["rows"], found["without response"], found["headline"]) == (5, 11, 60)
    assert "11 rows without response left out" in Path("vllm/eval/table.md").read_text(encoding="utf-8")


def test_a_file_without_images_can_be_scored_but_not_asked(ask, miniatures, tmp_path, no_model):
    with open(miniatures / "ChartQA_TEST.tsv", encoding="utf-8", newline="") as f:
        rows = [row[:1] + row[2:] for row in csv.reader(f, "excel-tab")]
    write_tsv(tmp_path / "ChartQA_TEST.tsv", rows[1:], rows[0])
    answers = FORMS["id.jsonl"](tmp_path / "a.jsonl", answers_to(cells_of(miniatures, "chartqa")))
    assert ask("chartqa", "--data", tmp_path, "--predictions", answers) == 0
    assert scores_of(tmp_path / "out")["chartqa"]["rows"] == 16
    assert "holds no rows with an image" in ask("chartqa", "--data", tmp_path)


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", '{"id": "0", "response": "1"}\n{"id": "777", "response": "1"}\n', "rows that .* has not: ['777']"),
    ("a.jsonl", '{"id": "0", "response": "1"}\n{"id": 0, "response": "2"}\n', "record 2: id 0 occurs twice"),
    ("a.tsv", "index\tprediction\n0\t1\n0\t2\n", "record 2: id 0 occurs twice"),
    ("a.jsonl", '{"id": "0"}\n', "record 1: needs id"), ("a.jsonl", '{"response": "1"}\n', "record 1: needs id"),
    ("a.tsv", "index\tanswer\n0\t1\n", "record 1: needs id"), ("a.tsv", "index\tprediction\n0\n", "record 1: needs id"),
    ("a.jsonl", "my notes\n", "a.jsonl is no .jsonl file"), ("a.jsonl", "", "no response to any row"),
    ("a.jsonl", "[1]\n5\n", "record 1"), ("a.tsv", b"index\tprediction\n0\t\xff\n", "a.tsv"),
    ("a.jsonl", b"\xff\xfe", "a.jsonl"), ("absent.jsonl", None, "there is no such file"),
])
def test_predictions_that_do_not_fit_are_one_clear_error(name, content, message, ask, tmp_path, no_model):
    if content is not None:
        write_bytes(tmp_path / name, content if isinstance(content, bytes) else content.encode())
    refused = ask("chartqa", "--predictions", tmp_path / name)
    assert isinstance(refused, str) and refused.startswith("eval: ") and len(refused.splitlines()) == 1
    assert re.search(message.replace("[", r"\["), refused), refused
    assert not (tmp_path / "out" / "scores.json").exists()


def test_odd_characters_in_a_response_are_kept(ask, miniatures, tmp_path, no_model):
    """Line separators cut no record, and half of an emoji, which JSON can hold and UTF-8 cannot, ends no run."""
    rows = cells_of(miniatures, "chartqa")[:3]
    texts = ["a\u2028b\x85c\r\n" + a_path(answer=rows[0]["answer"]), "\ud83d" + a_path(answer=rows[1]["answer"]), "🙂"]
    write_lines(tmp_path / "a.jsonl", [{"id": row["index"], "response": text} for row, text in zip(rows, texts)])
    assert ask("chartqa", "--predictions", tmp_path / "a.jsonl") == 0
    assert scores_of(tmp_path / "out")["chartqa"]["headline"] == pytest.approx(200 / 3)


# -- real rows, and the default command

@has_real_rows
def test_real_rows_go_the_whole_way(random_tiny, tmp_path, capsys):
    assert run_eval("--model", random_tiny, "--data", REAL_ROWS, "--device", "cpu", "--limit", 6,
                    "--max-new-tokens", 4, "--max-pixels", 200_000, "--benchmarks", "mathvision_mini,dynamath",
                    "--out", tmp_path) == 0
    found = scores_of(tmp_path)
    assert {name: (r["rows"], r["without response"]) for name, r in found.items()} == {
        "mathvision_mini": (6, 0), "dynamath": (6, 0)}
    printed = capsys.readouterr().out
    assert printed.count("is not the published file") == 2 and "miniatures" not in printed
    assert "Math-V mini" in (tmp_path / "table.md").read_text(encoding="utf-8")
    for name in found:
        assert len(records(tmp_path / f"{name}.jsonl")) == 6


@has_real_rows
@pytest.mark.parametrize("benchmark", ["mathvision_mini", "dynamath"])
def test_the_right_answer_of_every_real_row_scores_and_another_option_does_not(benchmark):
    for row in cells_of(REAL_ROWS, benchmark):
        assert verdict(benchmark, row, row["answer"]), row
        options = ev.choices_of(row) if benchmark == "mathvision_mini" else ev.options_in(row["question"])
        for letter in options if re.fullmatch("[A-H]", row["answer"]) else ():
            assert verdict(benchmark, row, letter) == (letter == row["answer"]), row


@pytest.fixture
def small_default(tmp_path, monkeypatch):
    """tmp_path as the working folder, and as the repository in which the default command draws its data; the real
    scripts, drawing and training less."""
    (tmp_path / "data").mkdir()
    shutil.copy(HERE / "data" / "bench.py", tmp_path / "data")
    shutil.copy(HERE / "data" / "shapes.py", tmp_path / "data" / "shapes.py")
    main, trained = sg.main, []

    def hasty(argv):
        trained.append(argv)
        main([*argv, "--warmup-steps", "2", "--device", "cpu"])
    run = subprocess.run

    def drawn(command, **more):
        return run([str(part) if part != "3200" else "40" for part in command], **more)
    monkeypatch.setattr(sg, "main", hasty)
    monkeypatch.setattr(ev.subprocess, "run", drawn)
    monkeypatch.setattr(sg, "HERE", tmp_path)
    monkeypatch.setattr(ev, "MINIATURES", tmp_path / "data" / "bench")
    monkeypatch.chdir(tmp_path)
    return trained


def test_the_default_command_draws_trains_and_shows_the_table(small_default, tmp_path, capsys):
    flags = ["--limit", 2, "--max-new-tokens", 4, "--device", "cpu"]
    assert run_eval(*flags) == 0
    printed, out = capsys.readouterr().out, tmp_path / "runs" / "tiny-hasty" / "eval"
    assert len(small_default) == 1 and "miniature" in printed and "R1-VL-7B (paper)" in printed
    assert set(scores_of(out)) == set(ev.PAPER) and "miniature" in (out / "table.md").read_text(encoding="utf-8")
    assert "trained on bare questions" in printed              # so it gets no template
    assert records(out / "chartqa.jsonl")[0]["prompt"] == cells_of(ev.MINIATURES, "chartqa")[0]["question"]
    with counted() as batches:
        assert run_eval(*flags) == 0                           # trained once, asked once
    assert len(small_default) == 1 and batches == []
    shutil.copytree(tmp_path / "runs" / "tiny-hasty", tmp_path / "runs" / "tiny")        # `python stepgrpo.py` was run
    assert run_eval(*flags, "--benchmarks", "mme", "--overwrite") == 0
    assert json.loads((tmp_path / "runs" / "tiny" / "eval" / "scores.json").read_text())["model"] == "runs/tiny"


def test_miniatures_are_known_by_any_path_to_them(random_tiny, miniatures, tmp_path, monkeypatch, capsys):
    """Their figures must never be taken for the benchmark's."""
    monkeypatch.setattr(ev, "MINIATURES", miniatures)
    monkeypatch.chdir(miniatures.parent)
    for path in (miniatures, miniatures.name):
        assert run_eval("--model", random_tiny, "--data", path, "--benchmarks", "mme", "--limit", 2, "--device", "cpu",
                        "--max-new-tokens", 2, "--out", tmp_path / f"out {len(str(path))}") == 0
        assert "These are miniatures" in capsys.readouterr().out


@pytest.mark.parametrize("instruction, flags, plain", [
    (False, [], True), (False, ["--no-plain"], False), (True, [], False), (True, ["--plain"], True)])
def test_a_run_is_asked_as_it_was_trained(instruction, flags, plain, random_tiny, miniatures, tmp_path, monkeypatch,
                                          capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(random_tiny, "runs/mine/checkpoint")
    Path("runs/mine/config.json").write_text(json.dumps({"instruction": instruction}))
    assert run_eval("--model", "runs/mine", "--data", miniatures, "--benchmarks", "chartqa", "--limit", 1,
                    "--device", "cpu", "--max-new-tokens", 2, *flags) == 0
    (r,) = records(Path("runs/mine/eval/chartqa.jsonl"))
    assert r["prompt"] == ev.build_prompt("chartqa", cells_of(miniatures, "chartqa")[0], plain)
    assert ("trained on bare questions" in capsys.readouterr().out) == (not instruction and not flags)


# -- the judge

def judge_flags(endpoint, out):
    return ["--judge", endpoint.url, "--judge-model", "m", "--api-key-env", "MY_KEY", "--out", out]


@pytest.fixture
def unclear(miniatures, tmp_path):
    """Responses to DynaMath: right, wrong, right, none → their file, and the rows whose response states no answer."""
    made, unparsed = [], []
    for n, row in enumerate(cells_of(miniatures, "dynamath")):
        right, wrong = row["answer"], "17" if row["answer"] not in "ABC" else "A" if row["answer"] != "A" else "B"
        text = [a_path(answer=right), a_path(answer=wrong), a_path(answer=right), "Hard to say"][n % 4]
        made.append({"id": row["index"], "response": text})
        if text == "Hard to say" and row["answer_type"] != "text":     # there, any text is an answer
            unparsed.append(row)
    return write_lines(tmp_path / "unclear.jsonl", made), unparsed


def test_the_judge_gets_what_the_rules_cannot_parse_and_only_that(ask, unclear, endpoint, tmp_path, monkeypatch,
                                                                  no_model):
    monkeypatch.setenv("MY_KEY", "secret")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    file, unparsed = unclear
    out = tmp_path / "out"
    assert ask("dynamath", "--predictions", file) == 0
    (alone,) = scores_of(out).values()
    assert "with judge" not in alone and not endpoint.asked
    endpoint.faults.extend(["Hmm.", "**Right.**", *["Not right, but wrong"] * (len(unparsed) - 2), "right"])
    assert ask("dynamath", "--predictions", file, *judge_flags(endpoint, out)) == 0
    assert len(endpoint.asked) == len(unparsed) + 1            # 'Hmm.' is no verdict: asked again
    for row, prompt in zip(unparsed, endpoint.asked[1:]):
        assert row["question"] in prompt and f"Right answer: {row['answer']}\n" in prompt and "Hard to say" in prompt
    assert set(endpoint.keys) == {"Bearer secret"} and set(endpoint.paths) == {"/v1/chat/completions"}
    (found,) = scores_of(out).values()
    assert {name: found[name] for name in alone} == alone      # the figures by rule are what they were
    assert found["with judge"] == pytest.approx(alone["headline"] + 100 * 2 / 40)        # two of 40 rows more
    assert (found["judge"], found["judged"]) == ("m", len(unparsed))
    table = (out / "table.md").read_text(encoding="utf-8")
    assert re.search(rf"^\| {re.escape(str(file))} \|.* {alone['headline']:.1f} \|", table, re.M)
    assert re.search(rf"^\| {re.escape(str(file))} \+ judge \|.* {found['with judge']:.1f} \|", table, re.M)
    assert f"dynamath: {len(unparsed)} unparsed responses judged by m" in table
    assert not any("secret" in written.read_text(encoding="utf-8") for written in out.iterdir())
    asked = len(endpoint.asked)
    assert ask("dynamath", "--predictions", file, *judge_flags(endpoint, out)) == 0      # kept: nothing is judged twice
    assert len(endpoint.asked) == asked and list(scores_of(out).values()) == [found]
    endpoint.faults.extend(["wrong"] * len(unparsed))          # another judge is another opinion
    assert ask("dynamath", "--predictions", file, *judge_flags(endpoint, out), "--judge-model", "other") == 0
    assert len(endpoint.asked) == asked + len(unparsed)
    assert scores_of(out)["dynamath"]["with judge"] == alone["headline"]


def test_a_judge_that_fails_keeps_its_verdicts_and_the_figures_by_rule(ask, unclear, endpoint, tmp_path, no_model,
                                                                       capsys):
    file, unparsed = unclear
    endpoint.faults.extend(["right", "right", (401, {}, "bad key")])
    assert ask("dynamath", "--predictions", file, *judge_flags(endpoint, tmp_path / "out")) == 0
    printed = "".join(capsys.readouterr())
    assert "dynamath: no figure with the judge" in printed and "HTTP 401" in printed and "bad key" in printed
    assert "with judge" not in scores_of(tmp_path / "out")["dynamath"]
    endpoint.faults.extend(["wrong"] * (len(unparsed) - 2))
    assert ask("dynamath", "--predictions", file, *judge_flags(endpoint, tmp_path / "out")) == 0
    assert len(endpoint.asked) == len(unparsed) + 1 and not endpoint.faults


@pytest.mark.parametrize("benchmark", ["mmstar", "hallusionbench", "mme"])
def test_benchmarks_of_letters_and_yes_or_no_are_not_judged(benchmark, ask, miniatures, endpoint, tmp_path, no_model):
    file = write_lines(tmp_path / "a.jsonl", [{"id": row["index"], "response": "hard to say"}
                                              for row in cells_of(miniatures, benchmark)])
    assert ask(benchmark, "--predictions", file, *judge_flags(endpoint, tmp_path / "out")) == 0
    found = scores_of(tmp_path / "out")[benchmark]
    assert not endpoint.asked and "with judge" not in found and found["unparsed"] == found["rows"]
    assert "judge" not in (tmp_path / "out" / "table.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("reply, expected", [
    ("right", True), ("Wrong.", False), ("**RIGHT**", True), ("It says right, but that is wrong", False)])
def test_the_verdict_of_a_judge_is_its_last_word(reply, expected):
    assert ev.read_verdict(reply) is expected


@pytest.mark.parametrize("reply", ["", "correct", "copyright", "0", "rightly"])
def test_a_reply_that_is_no_verdict_is_asked_again(reply):
    with pytest.raises(ev.TryAgain):
        ev.read_verdict(reply)


# -- settings and errors

def test_every_setting_of_the_evaluation_is_explained_and_read(capsys):
    with pytest.raises(SystemExit) as stop:
        ev.parse_arguments(["--help"])
    printed, source = capsys.readouterr().out, inspect.getsource(ev)
    assert stop.value.code == 0
    for name in vars(ev.parse_arguments([])):
        assert re.search(rf"^  --{name.replace('_', '-')}\b.*(\n?.*)[a-z]", printed, re.M), name
        assert re.search(rf"\bargs\.{name}\b", source) or name in ("device", "dtype"), name     # sg.pick_device


@pytest.mark.parametrize("flags, message", [
    (["--benchmarks", "mme,mmbench"], "no benchmark mmbench; there are mathvista, mmstar"),
    (["--benchmarks", ""], "no benchmark"), (["--predictions", "a.jsonl"], "--benchmarks"),
    (["--benchmarks", "mme", "--judge", "http://h"], "--judge-model"), (["--judge-model", "m"], "belong together"),
    (["--limit", "-1"], "--limit"), (["--batch-size", "0"], "--batch-size"),
    (["--max-new-tokens", "0"], "--max-new-tokens"), (["--max-pixels", "0"], "--max-pixels"),
    (["--dtype", "float17"], "float17"), (["--device", "gpu"], "--device gpu is not there"),
    (["--model", "absent/deeper/x"], "no model 'absent/deeper/x'"),
    (["--model", "nobody/nothing"], "cannot load model nobody/nothing"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_impossible_settings_of_the_evaluation_are_one_clear_line(flags, message, random_tiny, miniatures, tmp_path):
    refused = run_eval("--model", random_tiny, "--data", miniatures, "--out", tmp_path / "out", "--device", "cpu",
                       *flags)
    assert isinstance(refused, str) and refused.startswith("eval: ") and len(refused.splitlines()) == 1
    assert message in refused and not list((tmp_path / "out").glob("*.jsonl"))


@pytest.mark.parametrize("flags", [["--unknown"], ["--bench", "mme"], ["--limit", "many"], ["stray"]])
def test_unknown_flags_of_the_evaluation_are_errors(flags, capsys):
    assert run_eval(*flags) == 2 and "error:" in capsys.readouterr().err


def moved(monkeypatch, benchmark, url, md5):
    """Points a benchmark to another address."""
    monkeypatch.setitem(ev.BENCHMARKS, benchmark, ev.BENCHMARKS[benchmark]._replace(url=url, md5=md5))


def test_a_file_that_is_missing_is_downloaded_into_the_data_folder(file_server, ask, miniatures, tmp_path,
                                                                   monkeypatch, capsys):
    file_server.body = (miniatures / "MME.tsv").read_bytes()
    moved(monkeypatch, "mme", file_server.url + "/", hashlib.md5(file_server.body).hexdigest())
    for _ in range(2):
        assert ask("mme", "--data", tmp_path / "data", "--limit", 2) == 0
    assert len(file_server.ranges) == 1 and (tmp_path / "data" / "MME.tsv").read_bytes() == file_server.body
    assert "is not the published file" not in capsys.readouterr().out


def test_offline_one_line_says_what_to_get_and_where_to_put_it(no_proxy, ask, tmp_path, monkeypatch, no_model):
    with FileServer() as gone:
        moved(monkeypatch, "mme", gone.url + "/", "0" * 32)
    refused = ask("mme", "--data", tmp_path / "data")
    assert len(refused.splitlines()) == 1 and f"cannot download {gone.url}/MME.tsv" in refused
    assert f"save it in {tmp_path / 'data'} as MME.tsv" in refused


def test_data_is_found_where_vlmevalkit_keeps_it(random_tiny, miniatures, tmp_path, monkeypatch):
    monkeypatch.setenv("LMUData", str(miniatures))
    assert run_eval("--model", random_tiny, "--benchmarks", "mme", "--limit", 2, "--device", "cpu",
                    "--max-new-tokens", 2, "--out", tmp_path) == 0
    assert scores_of(tmp_path)["mme"]["file"] == str(miniatures / "MME.tsv")


def test_missing_columns_of_a_benchmark_are_named(ask, tmp_path, no_model):
    write_tsv(tmp_path / "MME.tsv", [["0", "", "?", "Yes"]], ("index", "image", "question", "answer"))
    refused = ask("mme", "--data", tmp_path)
    assert len(refused.splitlines()) == 1 and f"{tmp_path / 'MME.tsv'} has no column image_path, category" in refused


def test_a_base_models_evaluation_does_not_block_its_training(shapes_set, evaluated, tmp_path):
    """eval.py keeps the responses of `--model NAME` in runs/NAME/eval, where stepgrpo.py trains it."""
    out = tmp_path / "run"
    for flags in ({}, {"overwrite": True}):
        shutil.copytree(evaluated, out / "eval")
        with varied_rewards():
            assert run_main(*run_flags(out, shapes_set, warmup_steps=0, steps=1, **flags)) == 0
        assert (out / "checkpoint").is_dir() and names_in(out / "eval") == names_in(evaluated)
        assert (out / "eval" / "mme.jsonl").read_bytes() == (evaluated / "mme.jsonl").read_bytes()
        assert "exists" in run_main(*run_flags(out, shapes_set, warmup_steps=0, steps=1))       # now it is a run
        shutil.rmtree(out)
    (out / "eval").mkdir(parents=True)
    (out / "thesis.tex").write_text("years of work")
    assert "exists" in run_main(*run_flags(out, shapes_set)) and (out / "thesis.tex").exists()


def test_ctrl_c_and_errors_need_no_traceback_in_a_terminal(miniatures, random_tiny, tmp_path):
    """The real thing: a process of its own, interrupted once a response is there; the same command goes on."""
    command = [sys.executable, str(HERE / "eval.py"), "--model", str(random_tiny), "--data", str(miniatures),
               "--out", str(tmp_path), "--benchmarks", "dynamath", "--batch-size", "1", "--max-new-tokens", "60",
               "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    made, deadline = tmp_path / "dynamath.jsonl", time.monotonic() + 120
    while not (made.exists() and made.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on" in printed and "Traceback" not in printed, printed
    before = len(records(made))
    assert 0 < before < 40
    with counted() as batches:
        assert run_eval(*command[2:], "--limit", before + 1) == 0
    assert sum(batches) == 1


# ─── 14. data/bench.py ────────────────────────────────────────────────────────────────────────────────────────────────

def test_the_miniatures_are_the_same_files_for_the_same_seed(miniatures, tmp_path):
    def drawn(name, *flags):
        subprocess.run([sys.executable, str(HERE / "data" / "bench.py"), "--out", str(tmp_path / name), *flags],
                       check=True, stdout=subprocess.PIPE)
        return {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
    first = drawn("a")
    assert first == {file.name: file.read_bytes() for file in miniatures.iterdir()}
    assert set(first) == {ev.BENCHMARKS[name].file for name in ev.PAPER}
    other = drawn("b", "--seed", "1")
    assert first.keys() == other.keys() and all(first[name] != other[name] for name in first)


def options_of(row):
    """{letter: text} of any benchmark's row."""
    question = row.get("question_for_eval", row["question"])
    return ev.mmstar_options(row) or ev.choices_of(row) or ev.options_in(question)


@pytest.mark.parametrize("seed", range(3))
def test_right_and_wrong_answers_to_the_miniatures_score_1_and_0(seed, tmp_path):
    bench.make_bench(tmp_path, seed)
    for name in ev.PAPER:
        table = ev.read_tsv(tmp_path / ev.BENCHMARKS[name].file, ev.BENCHMARKS[name].columns)
        assert not table.complaints and len(table.rows) >= 14
        for row in (row.cells for row in table.rows.values()):
            answer, gold, options = row["answer"], row.get("answer_option") or row["answer"], options_of(row)
            assert ev.score(name, row, f"### The final answer is: {answer}") == 1, row
            if options:
                wrong = [letter for letter in options if letter != gold]
            elif answer in ("Yes", "No"):
                wrong = ["No" if answer == "Yes" else "Yes"]
            elif re.fullmatch(r"[\d.]+%?", answer):
                wrong = [f"{float(answer.strip('%')) * 1.5 + 2:g}{'%' * answer.endswith('%')}"]
            else:
                wrong = ["purple", "[purple, black]", "[7, 8, 9]"]
            for other in wrong:
                assert ev.score(name, row, f"### The final answer is: {other}") == 0, (row, other)
            for letter, text in options.items():
                assert ev.score(name, row, f"### The final answer is: {text}") == (letter == gold), row
                assert ev.score(name, row, f"### The final answer is: ({letter}) {text}") == (letter == gold), row


def test_the_miniatures_hold_rows_of_every_kind(miniatures):
    tables = {name: table_of(miniatures, name) for name in ev.PAPER}
    rows = {name: [row.cells for row in table.rows.values()] for name, table in tables.items()}

    def images(name):
        return [ev.row_images(tables[name], row, 10**6) for row in tables[name].rows.values()]

    def kinds(name, *columns):
        return {tuple(row[column] for column in columns) for row in rows[name]}
    assert {len(found) for found in images("mathvision")} == {1, 2}                      # a list of images
    assert {len(found) for found in images("hallusionbench")} == {0, 1}                  # none, and a reference:
    with open(miniatures / "HallusionBench.tsv", encoding="utf-8", newline="") as f:
        assert {row["image"] for row in csv.DictReader(f, delimiter="\t")} & set(tables["hallusionbench"].rows)
    assert kinds("mathvista", "question_type", "answer_type") >= {
        ("free_form", "integer"), ("free_form", "float"), ("free_form", "list"), ("multi_choice", "text")}
    assert {"0", ""} <= {row["answer"] for row in rows["mathvista"]} | {row["precision"] for row in rows["mathvista"]}
    assert {len(ev.mmstar_options(row)) for row in rows["mmstar"]} == {3, 4}
    assert {len(ev.choices_of(row)) for row in rows["mathvision"]} >= {0, 5}
    assert kinds("chartqa", "split") == {("test_human",), ("test_augmented",)}
    assert {"%", "["} <= {c for row in rows["chartqa"] for c in row["answer"]}
    assert kinds("dynamath", "answer_type") == {("float",), ("single answer",), ("multiple choice",), ("text",)}
    assert Counter(row["qid"] for row in rows["dynamath"]) == dict.fromkeys("1234", 10)
    pictures = [(row["qid"], image.size, image.tobytes())
                for row, (image,) in zip(rows["dynamath"], images("dynamath"))]
    assert len(set(pictures)) == 40                            # every variant shows something else
    assert kinds("hallusionbench", "category", "answer") == {("VD", "Yes"), ("VD", "No"), ("VS", "Yes"), ("VS", "No")}
    assert Counter(row["problem_index"] for row in rows["mathverse"]) == dict.fromkeys("123", 5)
    assert len(kinds("mathverse", "problem_version")) == 5 and len(kinds("mathverse", "question_type")) == 2
    pairs = {}
    for row in rows["mme"]:
        pairs.setdefault((row["category"], row["image_path"]), []).append(row["answer"])
    assert all(sorted(pair) == ["No", "Yes"] for pair in pairs.values())
    assert kinds("mme", "category") & {(name,) for name in ev.REASONING} and len(kinds("mme", "category")) >= 4


def test_answers_of_the_miniatures_are_what_the_images_show(miniatures):
    checked = Counter()
    for name in ev.PAPER:
        table = table_of(miniatures, name)
        for row in table.rows.values():
            asked = re.search(r"Subtract all (\w+?)(?: things|s)\.|How many units .*?\?", row.cells["question"])
            if not asked or name == "mme":
                continue
            (image,) = ev.row_images(table, row, 10**6)
            seen = read_scene(image)
            if asked[1]:
                objects = sum(seen.values(), [])
                answer = len(objects) - sum(asked[1] in thing for thing in objects)
            elif "from the left" in asked[0]:
                answer = [len(column) for _, column in sorted(seen.items())]
            else:
                heights = dict(zip(("left", "middle", "right"), (len(column) for _, column in sorted(seen.items()))))
                a, b = (heights[place] for place in re.findall(r"the (\w+) bar", asked[0]))
                answer = a + b if "together" in asked[0] else a - b
            options = options_of(row.cells)
            gold = row.cells.get("answer_option") or row.cells["answer"]
            assert options.get(gold, row.cells["answer"]) == str(answer), row
            checked[name] += 1
    assert checked["dynamath"] == 20 and min(checked[name] for name in (
        "mathvista", "mmstar", "mathvision", "chartqa", "mathverse")) >= 6


def test_the_examples_of_the_readme_are_scored_as_it_says():
    """Each row of the table of differences from VLMEvalKit."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    table = text.split("| benchmark | right answer |")[1].split("\n\n")[0].strip().split("\n")[2:]
    assert len(table) >= 10
    for line in table:
        benchmark, gold, response, _, here, _ = (part.strip() for part in line.strip("| ").split(" | "))
        row = {"index": "VS_chart_0_1_0_0", "question": "How many?", "answer": re.findall("`(.*?)`", gold)[0],
               "choices": "[]", "question_type": "free-form", "answer_type": "text", "A": "1", "B": "2", "C": "3"}
        if "precision" in gold:
            row |= {"answer_type": "float", "precision": gold[-1]}
        answers = re.findall("`(.*?)`", response)
        path = "".join(f"### The final answer is: {answer}\n" for answer in answers)
        score = ev.score("mathvision" if benchmark == "all" else benchmark, row, path)
        assert score == (here == "right"), line


@pytest.mark.parametrize("response, gold, right", [
    ("In 2014, the value was 14.", "14", True), ("There were 14 in 2014.", "2014", False),
    ("The highest value is 14 in 2014.", "2010", False), ("It grew by 20 in 5 years", "5", False),
    ("four thousand two hundred and fifty", "4250", True), ("8 336 817", "8336817", True)])
def test_a_year_beside_the_number_is_not_the_answer(response, gold, right):
    row = {"index": 0, "question": "How many?", "answer": gold, "split": "test_human"}
    assert ev.score("chartqa", row, f"### The final answer is: {response}") == right


def test_a_conflict_of_settings_is_found_before_anything_is_asked(ask, tmp_path):
    assert ask("mme", "--limit", 2) == 0
    with counted() as batches:
        assert "mme.jsonl was made otherwise" in ask("chartqa,mme", "--limit", 2, "--max-new-tokens", 5)
    assert batches == []


def test_overwrite_keeps_the_old_responses_and_a_part_has_no_average(ask, tmp_path):
    assert ask(",".join(ev.PAPER), "--limit", 2) == 0
    before = (tmp_path / "out" / "mme.jsonl").read_bytes()
    table = (tmp_path / "out" / "table.md").read_text(encoding="utf-8").split("\n")
    (ours,) = [line for line in table if "tiny" in line]
    assert ours.rstrip("| ").endswith("–")
    assert ask("mme", "--limit", 2, "--overwrite") == 0
    assert (tmp_path / "out" / "mme.jsonl.old").read_bytes() == before


def test_responses_that_failed_and_empty_sets(tmp_path):
    row = {"index": 0, "question": "?", "answer": "Yes"}
    assert ev.score("mme", row, None) == ev.score("mme", row, float("nan")) == 0
    with pytest.raises(ValueError, match="no rows"):
        ev.summarize("mme", [], [])


# ─── 15. data/speed.py ────────────────────────────────────────────────────────────────────────────────────────────────

def test_peak_memory_counts_what_lives_and_not_views_or_what_was_there():
    known = torch.zeros(1000)
    with speed.PeakMemory([known]) as memory:
        a = torch.ones(100) * 2                                # two of 400 bytes, one of which goes at once
        assert (memory.now, memory.peak) == (400, 800)
        view, same_one = a[:50], known.view(10, 100).T
        assert memory.now == 400
        del a
        assert memory.now == 400                               # the view keeps it
        del view
        assert (memory.now, memory.peak) == (0, 800) and same_one.shape == (100, 10)


def test_every_part_of_the_bench_runs_and_both_updates_have_the_same_gradient(capsys):
    model, processor = speed.build("tiny", torch.device(DEVICE), torch.float32)
    speed.bench_rollout(model, processor, [("small", 2, 3, (3, 2), 9)], 1)
    speed.bench_update(model, processor, 12, 1)
    cfg = sg.Config(**sg.TINY | dict(questions=2, group_size=2, max_new_tokens=8, micro_batch=1))
    optimizer, reference = speed.bench_step(model, processor, cfg, (3, 1), 1)
    speed.bench_memory(model, reference, optimizer)
    printed = capsys.readouterr().out
    assert re.search(r"small +2 +3 +\d+ +9 ", printed) and "peak memory" in printed and "GB: policy" in printed
    differences = re.findall(r"differ by (\S+)", printed)[:2]
    assert len(differences) == 2 and all(float(x) < 1e-4 for x in differences)
    parts = set(re.findall(r"^ +([a-z: ]+?) +[\d.]+ %", printed, re.M))
    assert {"rollout", "rewards", "reference", "optimiser"} <= parts
    assert not hasattr(sg.rollout, "__wrapped__") and not hasattr(torch.Tensor.backward, "__wrapped__")    # clocks off


def test_no_path_of_the_bench_ends_early():
    model, processor = speed.build("tiny", torch.device(DEVICE), torch.float32)
    prompts = speed.make_prompts(processor, 2, (2, 1))
    assert {len(path) for group in sg.rollout(model, processor, prompts, 4, 30, 2.0).ids for path in group} == {30}
    out = speed.generate(model, prompts, 4, 30, 2.0)
    assert out.shape == (8, len(prompts[0].ids) + 30)


def test_the_2b_shape_is_counted_without_its_weights(capsys):
    speed.count_2b(2, 64, 100, 400)
    printed = capsys.readouterr().out
    assert "2.209 G parameters" in printed                     # as the published checkpoint
    parts = dict(re.findall(r"^ {6}(.+?) +([\d.]+) GB$", printed, re.M))
    assert float(parts["moments, fp32"]) == pytest.approx(2 * float(parts["masters, fp32"]), abs=0.01)
    assert 0 < float(parts["activations"]) < 2 and 0 < float(parts["cache and buffers of 4 questions"]) < 0.5


def test_the_bench_is_reached_by_its_flag():
    command = [sys.executable, str(HERE / "stepgrpo.py"), "--bench", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "--repeats" in done.stdout


# ─── 16. data/report.py ───────────────────────────────────────────────────────────────────────────────────────────────

# -- a fake run

class Page(html.parser.HTMLParser):
    """A page as (tag, attributes, text inside) in order of opening; text of <style> does not count."""
    VOID = {"img", "meta", "path", "polyline", "circle"}

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.found, self.open = [], []
        self.feed(text)
        self.close()
        assert not self.open, "every tag is closed"

    def handle_starttag(self, tag, attrs):
        self.found.append([tag, dict(attrs), ""])
        if tag not in self.VOID:
            self.open.append(self.found[-1])

    def handle_startendtag(self, tag, attrs):
        self.found.append([tag, dict(attrs), ""])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for element in self.open:
            element[2] += data

    def all(self, tag, kind=None):
        return [(attrs, text) for name, attrs, text in self.found
                if name == tag and (kind is None or kind in attrs.get("class", "").split())]

    def text(self):
        return next(text for tag, _, text in self.found if tag == "body")


def report_path(steps=("There are 7 objects.", "3 balls go.", "7 - 3 = 4"), description="Seven objects.",
           rationale="Subtract.", answer="4"):
    return shapes.write_path(description, rationale, list(enumerate(steps, 1)), answer)


REPORT_KEYS = [["7 objects", "seven objects"], ["3 balls"], ["7 - 3 = 4", "7 minus 3 is 4"]]


def a_group(texts, step=1, key_steps=REPORT_KEYS, answer="4", cfg=None, **changes):
    """A line of samples.jsonl, scored as in training."""
    row = sg.Row("data/train.json row 3", "How many are left?", answer, "", key_steps, [])
    scores = [sg.score_path(text, row, cfg or sg.Config()) for text in texts]
    advantages = sg.group_advantages(torch.tensor([[score["reward"] for score in scores]]))[0].tolist()
    return {"step": step, "where": row.where, "problem": row.problem, "answer": answer, "images": [],
            "key_steps": key_steps, "paths": [{"text": text, **score, "advantage": A}
                                              for text, score, A in zip(texts, scores, advantages)]} | changes


def an_update(step, **changes):
    return {"phase": "StepGRPO", "step": step, "questions": 4, "flat_groups": 1, "lr": 1e-6, "seconds": 2.0, "kl": .01,
            "clip_fraction": 0.0, "ratio": 1.0, "loss": 0.0, "sampling_gap": 0.0, "grad_norm": .3, "reward": 1.6,
            "right": .6, "step_accuracy": .68, "step_validity": .9, "k": .8, "reward_std": .5, "length": 70.0,
            "cut": 0.0} | changes


def an_evaluation(name, right):
    return {"phase": "evaluation", "name": name, "questions": 100, "right": right, "step_accuracy": right + .05,
            "step_validity": .9, "k": .5}


def a_run(folder, metrics=None, groups=None, **settings):
    """Writes a run folder, with what a short run logs unless it is given."""
    folder.mkdir(parents=True, exist_ok=True)
    cfg = asdict(sg.Config()) | {"steps": 3, "warmup_steps": 2} | settings
    (folder / "config.json").write_text(json.dumps(cfg))
    if metrics is None:
        metrics = [*({"phase": "warm-up", "step": s, "loss": 3 / s, "grad_norm": 1.0, "lr": 1e-5} for s in (1, 2)),
                   an_evaluation("before, greedy", .4), *map(an_update, (1, 2, 3)), an_evaluation("after, greedy", .65)]
    groups = [a_group([report_path(), report_path(answer="5")])] if groups is None else groups
    for name, records in (("metrics", metrics), ("samples", groups)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return folder


def page_of(folder):
    return Page(rep.write_report(folder).read_text(encoding="utf-8"))


# -- the page

def test_the_page_shows_settings_progress_gain_curves_and_paths(tmp_path):
    page = page_of(a_run(tmp_path / "first", seed=7))
    text = page.text()
    assert page.all("title")[0][1].startswith("first") and page.all("h1")[0][1] == "first"
    assert "seed 7" in text and "finished after 3 updates, 2 s each" in text
    assert "0.400" in text and "0.650" in text and "+0.250" in text
    figures = page.all("figure")
    assert len(figures) == len(page.all("svg")) == 6
    assert all(caption.count(".") >= 1 for _, caption in page.all("figcaption"))
    assert [text for _, text in page.all("span", "s1")] == ["StepRAR 0.68", "k 0.8"]
    assert len(page.all("details", "group")) == 1 and len(page.all("article")) == 2
    assert [attrs["name"] for attrs, _ in page.all("meta") if "name" in attrs] == ["viewport"]


def test_the_page_needs_no_script_and_nothing_from_elsewhere(tmp_path):
    Image.new("RGB", (60, 20), "red").save(tmp_path / "a.png")
    group = a_group([report_path()] * 2, images=[str(tmp_path / "a.png")])
    file = rep.write_report(a_run(tmp_path / "run", groups=[group]))
    page, text = Page(file.read_text(encoding="utf-8")), file.read_text(encoding="utf-8")
    assert not page.all("script") and not page.all("link") and "@import" not in text and "url(" not in text
    assert "http:" not in text and "https:" not in text
    for tag, attrs, _ in page.found:
        assert not {"href", "srcset", "action"} & attrs.keys() and not any(name.startswith("on") for name in attrs)
        assert attrs.get("src", "data:image/").startswith("data:image/"), tag


HOSTILE_MARKUP = ["<script>alert(1)</script>", "</style>", '"><img src=x onerror=alert(1)>', "a & b &lt; <b>c",
                  "' onload='1",
           "</details></article>", "<!--", "]]>"]


@pytest.mark.parametrize("bad", HOSTILE_MARKUP)
def test_no_text_of_model_or_data_becomes_a_tag(bad, tmp_path):
    def shape(page):
        return [(tag, sorted(attrs)) for tag, attrs, _ in page.found]

    def written(name, word):
        steps = (f"{word} 7 objects {word}", f"{word}", f"so 7 - 3 = 4 {word}")
        group = a_group([report_path(steps, word, word, word), report_path(answer=word) + f"\n### Step 9: {word}"],
                        key_steps=[[f"7 objects {word}"], [word, word], ["nowhere " + word]], answer=word + " 4",
                        where=word, problem=word, images=["/nowhere/" + word.replace("/", "")])
        evaluations = [an_evaluation(f"before, {word}", .5), an_update(1), an_evaluation(f"after, {word}", .6)]
        return rep.write_report(a_run(tmp_path / name, evaluations, [group], model=word, data=word))

    hostile, harmless = written("run " + bad.replace("/", ""), bad), written("harmless", "word")
    page = Page(hostile.read_text(encoding="utf-8"))
    assert {tag for tag, _ in shape(page)} <= {tag for tag, _ in shape(Page(harmless.read_text(encoding="utf-8")))}
    allowed = {"class", "style", "title", "open", "name", "content", "charset", "lang", "d", "x", "y", "dy", "cx", "cy",
               "r", "points", "viewbox", "role", "aria-label", "text-anchor"}
    assert {name for _, attrs in shape(page) for name in attrs} <= allowed
    assert not {"script", "img", "iframe", "link"} & {tag for tag, _ in shape(page)}
    assert page.text().count(bad) >= 10 and len(page.all("article")) == 2 and len(page.all("style")) == 1
    assert bad.replace("/", "") in page.all("title")[0][1]


def test_a_run_that_has_logged_nothing_yet_has_a_page(tmp_path):
    page = page_of(a_run(tmp_path / "run", [], []))
    assert "nothing is logged yet" in page.text() and "No paths are logged yet" in page.text()
    assert not page.all("figure") and not page.all("table")
    (tmp_path / "run" / "samples.jsonl").unlink()              # written by someone who made only the metrics
    assert "No paths" in page_of(tmp_path / "run").text()


def test_progress_tells_warm_up_update_and_end(tmp_path):
    warm = [{"phase": "warm-up", "step": 1, "loss": 2.0}]
    before, after = an_evaluation("before, greedy", .4), an_evaluation("after, greedy", .5)
    for records, words in ((warm, "warm-up, update 1 of 2"), ([before, an_update(1)], "update 1 of 3"),
                           ([before, an_update(3)], "update 3 of 3"), ([before, an_update(3), after], "finished"),
                           ([before, an_update(2), after, an_update(3)], "update 3 of 3"),     # the run was prolonged
                           ([an_update(3)], "finished after 3 updates")):
        assert words in page_of(a_run(tmp_path / "run", records)).text()


def test_updates_without_a_group_and_values_that_are_no_numbers_do_not_stop_the_page(tmp_path):
    empty = {"phase": "StepGRPO", "step": 2, "questions": 0, "flat_groups": 16, "lr": 0.0, "seconds": 1.0}
    page = page_of(a_run(tmp_path / "run", [an_update(1, kl=float("nan")), empty, an_update(3, kl=float("inf"))],
                         skip_flat_groups=True))
    titles = [text for _, text in page.all("h3")]
    assert "Reward" in titles and "KL to the reference" not in titles
    # 1 of 5, 16 of 16, 1 of 5 groups were flat
    assert next(text for _, text in page.all("figure") if text.startswith("Flat")).startswith("Flat groupsshare 0.2")


# -- logs

@pytest.mark.parametrize("torn", ['{"phase": "StepGRPO", "ste', '{"phase": "Ste\u00e9', "1", '"x'])
def test_a_last_line_torn_by_a_killed_process_is_left_out(torn, tmp_path):
    folder = a_run(tmp_path / "run")
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(folder / name, "ab") as file:
            file.write(torn.encode()[:-1] if not torn.isascii() else torn.encode())
    assert "finished after 3 updates" in page_of(folder).text()


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
@pytest.mark.parametrize("line", ['{"phase": "Ste', "7", "[]", "", "null", '{"step": 1}', "\udcff"])
def test_a_malformed_line_is_named_and_the_old_page_stays(name, line, tmp_path):
    folder = a_run(tmp_path / "run", groups=[a_group([report_path()] * 2)] * 4)
    old = rep.write_report(folder).read_text(encoding="utf-8")
    lines = (folder / name).read_text(encoding="utf-8").split("\n")
    (folder / name).write_text("\n".join([*lines[:2], line, *lines[3:]]), encoding="utf-8", errors="surrogateescape")
    with pytest.raises(sg.UserError, match=rf"{name} line 3 "):
        rep.write_report(folder)
    assert (folder / "report.html").read_text(encoding="utf-8") == old


def test_samples_of_an_older_version_are_named_with_what_they_lack(tmp_path):
    folder = a_run(tmp_path / "run", groups=[{"step": 1, "where": "x", "problem": "p", "path": "text", "reward": 1.0}])
    with pytest.raises(sg.UserError, match="samples.jsonl line 1 .*no answer, images, key_steps, paths"):
        rep.write_report(folder)


def test_what_is_no_run_is_one_line_and_no_traceback(tmp_path):
    with pytest.raises(sg.UserError, match="nowhere holds no metrics.jsonl"):
        rep.write_report(tmp_path / "nowhere")
    folder = a_run(tmp_path / "run")
    (folder / "config.json").write_text("{")
    with pytest.raises(sg.UserError, match="cannot read .*config.json"):
        rep.write_report(folder)
    (folder / "config.json").write_text('{"steps": 3}')        # of an older version: the defaults of today fill in
    assert "finished" in page_of(folder).text()
    for target, code, said in ((tmp_path / "nowhere", 1, "report: "), (folder, 0, "")):
        done = subprocess.run([sys.executable, HERE / "data" / "report.py", target], capture_output=True, text=True)
        assert done.returncode == code and done.stderr.startswith(said) and done.stderr.count("\n") <= 1
        assert "Traceback" not in done.stderr
    assert done.stdout.strip() == str(folder / "report.html")


def test_a_crash_while_writing_leaves_the_old_page(tmp_path, monkeypatch):
    folder = a_run(tmp_path / "run")
    old = rep.write_report(folder).read_bytes()
    a_run(tmp_path / "run", model="another")

    def half(self, text, **_):
        self.write_bytes(text[:len(text) // 2].encode())
        raise OSError("no space left on device")
    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="no space"):
        rep.write_report(folder)
    assert (folder / "report.html").read_bytes() == old
    monkeypatch.undo()
    assert b"another" in rep.write_report(folder).read_bytes() and not (folder / "report.html.new").exists()


def test_a_long_run_is_written_fast_and_small(tmp_path):
    rng = random.Random(0)
    paths = [report_path((f"There are {rng.randint(5, 9)} objects.", "3 balls go.", f"7 - 3 = {rng.randint(3, 5)}"),
                    f"Objects {i}.") for i in range(800)]
    groups = [a_group(paths[8 * i:8 * i + 8], step=100 * i + 1) for i in range(100)]
    folder = a_run(tmp_path / "run", [an_update(s + 1, kl=rng.random()) for s in range(13_000)], groups)
    durations = []
    for _ in range(3):
        began = time.perf_counter()
        page = rep.write_report(folder)
        durations.append(time.perf_counter() - began)
    assert min(durations) < 0.3 * 3 and page.stat().st_size < 2_000_000         # thrice, for machines under load
    for attrs, _ in Page(page.read_text(encoding="utf-8")).all("polyline"):
        assert len(attrs["points"].split()) <= 200


# -- groups

@pytest.mark.parametrize("number", [1, 2, 23, 24, 25, 47, 100])
def test_groups_are_thinned_evenly_with_the_first_and_the_last(number, tmp_path):
    page = page_of(a_run(tmp_path / "run", groups=[a_group([report_path()] * 2, step=s) for s in range(number)]))
    shown = [int(text.split()[1]) for _, text in page.all("b") if text.startswith("update ") and "of" not in text]
    assert len(shown) == min(number, 24) and shown[0] == 0 and shown[-1] == number - 1
    gaps = {b - a for a, b in itertools.pairwise(shown)}
    assert not gaps or 0 < min(gaps) <= max(gaps) <= min(gaps) + 1
    assert ["open" in attrs for attrs, _ in page.all("details", "group")] == [False] * (len(shown) - 1) + [True]


def test_images_are_embedded_shrunk_and_a_missing_one_is_named(tmp_path):
    Image.effect_noise((1600, 800), 80).save(tmp_path / "large.jpg")
    Image.new("RGBA", (60, 20), (255, 0, 0, 128)).save(tmp_path / "small.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "small.png").read_bytes()[:50])
    images = [str(tmp_path / name) for name in ("large.jpg", "small.png", "torn.png", "gone.png", "n" * 300)]
    page = page_of(a_run(tmp_path / "run", groups=[a_group([report_path()] * 2, images=images)]))
    large, small = (attrs for attrs, _ in page.all("img"))
    assert (large["width"], large["height"]) == ("480", "240") and large["src"].startswith("data:image/jpeg;base64,")
    assert (small["width"], small["height"]) == ("60", "20") and small["src"].startswith("data:image/png;base64,")
    assert "image cannot be read: torn.png" in page.text() and "image not found: gone.png" in page.text()


def test_an_image_is_encoded_once_however_often_the_report_is_written(tmp_path, monkeypatch):
    loaded, load = [], rep.load_image
    monkeypatch.setattr(rep, "load_image", lambda *args: loaded.append(args) or load(*args))
    Image.new("RGB", (60, 20), "red").save(tmp_path / "a.png")
    folder = a_run(tmp_path / "run", groups=[a_group([report_path()] * 2, images=[str(tmp_path / "a.png")])] * 2)
    for _ in range(3):
        rep.write_report(folder)
    assert len(loaded) == 1


def test_paths_come_best_first_and_equal_ones_share_a_card(tmp_path):
    texts = [report_path(answer="5"), report_path(), "no section", report_path()]
    page = page_of(a_run(tmp_path / "run", groups=[a_group(texts)]))
    cards = [text for _, text in page.all("article")]
    assert [card[:4] for card in cards] == ["2.10", "1.10", "0.00"]
    assert "2 alike" in cards[0] and "alike" not in cards[1]
    assert "right 1" in cards[0] and "key steps 3/3: 0.10" in cards[0] and "StepRVR 1" in cards[0]
    assert "✗ right: 4" in cards[1] and "no section of the template" in cards[2]
    dots = [attrs["class"] for attrs, _ in page.all("i") if "class" in attrs and "style" not in attrs]
    assert dots[3:] == ["pos", "pos", "neg", "neg"]            # the first three are the legend
    bars = [attrs for attrs, _ in page.all("i") if "left:" in attrs.get("style", "")]
    assert [bar["class"] for bar in bars] == ["pos", "neg", "neg"]
    for bar in bars:
        left, width = (float(part.split(":")[1].rstrip("%")) for part in bar["style"].split(";"))
        assert 0 <= left and left + width <= 100 and 50 in (left, round(left + width, 1))


def test_what_the_reward_leaves_out_is_struck_through(tmp_path):
    for reward, off in (("step", []), ("accuracy", ["StepRVR 1"]), ("outcome", ["key steps 3/3: 0.10", "StepRVR 1"]),
                        ("validity", ["right 1", "key steps 3/3: 0.10"])):
        page = page_of(a_run(tmp_path / "run", groups=[a_group([report_path()] * 2)], reward=reward))
        assert [text for _, text in page.all("span", "off")] == off


def test_paths_without_key_steps_and_without_an_answer_are_explained(tmp_path):
    nothing = report_path().split("### The final")[0]
    page = page_of(a_run(tmp_path / "run", groups=[a_group([report_path(), nothing])]))
    assert "without an answer, key steps do not count" in page.all("article")[1][1]
    page = page_of(a_run(tmp_path / "run", groups=[a_group([report_path(), nothing], key_steps=[])]))
    assert "no key steps" in page.all("article")[0][1] and not page.all("mark")[1:]        # one is in the legend


# -- marks

@pytest.mark.parametrize("step, form, words", [
    ("There are 7 objects.", "7 objects", "7 objects"),
    ("There are **seven objects** here", "Seven objects", "seven objects"),
    ("So \\frac{6}{3} = 2 units.", "6/3=2", "\\frac{6}{3} = 2"),
    ("6 divided by 3 equals 2, so 2", "6 / 3 = 2", "6 divided by 3 equals 2"),
    ("It costs 1,300 dollars, not 13.", "1300 dollars", "1,300 dollars"),
    ("It is not 3 objects. It has 3 objects.", "3 objects", "3 objects"),
    ("x = 3.5 and then x = 3", "x = 3", "x = 3"),
    ("2x = 3, and so x = 3", "x = 3", "x = 3"),
    ("It is 3 <b>red</b> balls", "3", "3"),
    ("- 3 balls\n- 4 cubes", "4 cubes", "4 cubes"),
])
def test_the_words_of_a_key_step_are_found_in_the_text_as_it_stands(step, form, words):
    start, end = rep.find_span(step, sg.canonical(form))
    assert step[start:end] == words
    assert step.rindex(words) == start                         # where there are two, the first is negated or a part


def test_no_words_are_marked_that_the_reward_does_not_see():
    for step, form in (("There are not 3 objects.", "3 objects"), ("13 objects", "3 objects"), ("2x = 3", "x = 3"),
                       ("", "3"), ("3.5 objects", "5 objects"), ("7 - 3 = 4 / 2", "7 - 3 = 4")):
        assert rep.find_span(step, sg.canonical(form)) is None


def test_a_span_is_found_only_where_the_step_says_the_form():
    rng, words = random.Random(1), ["3", "7", "x", "=", "-", "not", "red", "objects", ".", "3.5", ",", "\\frac{1}{2}"]
    found = 0
    for _ in range(1500):
        step = " ".join(rng.choices(words, k=rng.randint(3, 9)))
        form = sg.canonical(" ".join(rng.choices(words, k=rng.randint(1, 3))))
        if not form:
            continue
        span = rep.find_span(step, form)
        if span:
            found += 1
            words_found = step[slice(*span)]
            assert sg.canonical(words_found) == form and words_found == words_found.strip()
            assert sg.says(sg.canonical("\n" + step).split(), form.split())
    assert found > 100


def test_a_step_that_goes_in_circles_does_not_hold_the_report_up():
    for step in ("There are not 3 objects. " * 400, "7 - 3 = 4 / " * 800, "3 " * 5000, "(" * 9999, "\\frac{" * 1600):
        began = time.perf_counter()
        rep.mark(step, [["3 objects"], ["7 - 3 = 4"], ["3"]])
        assert time.perf_counter() - began < 3


def test_marks_stand_in_the_step_that_earned_them_and_change_no_text(tmp_path):
    rng = random.Random(2)
    names = ["red", "7 objects", "3 balls", "7 - 3 = 4", "not 3 balls", "\\frac{6}{3}=2", "& <b>"]
    for _ in range(30):
        texts = [report_path([" ".join(rng.choices(names, k=rng.randint(1, 5))) for _ in range(3)],
                             "7 objects", "3 balls")
                 for _ in range(4)]
        group = a_group(texts, key_steps=REPORT_KEYS + [["6/3 = 2"]])
        page = page_of(a_run(tmp_path / "run", groups=[group]))
        for path in group["paths"]:
            sections = sg.split_path(path["text"])
            bodies = [sections.description, sections.rationale, *sections.steps, sections.answer]
            html_of = rep.render_sections(path, group, sg.matched_key_steps(path["text"], group["key_steps"]))
            card = Page(html_of)
            assert [text for _, text in card.all("span", "text")] == bodies
            earned = sg.matched_key_steps(path["text"], group["key_steps"])
            per_step = html_of.split("<h4>")[1:]
            for index, part in enumerate(per_step):
                shown = Page("<h4>" + part)
                forms = [group["key_steps"][k] for k, step in enumerate(earned) if step == index - 2]
                marks = [attrs["title"] for attrs, _ in shown.all("mark")]
                chips = [text[2:] for _, text in shown.all("span", "yes") if text != "✓ right"]
                assert sorted(marks + chips) == sorted(group[0] for group in forms)
                for attrs, words in shown.all("mark"):
                    wanted = next(forms for forms in group["key_steps"] if forms[0] == attrs["title"])
                    assert sg.canonical(words) in map(sg.canonical, wanted)
        assert page.all("article")


def test_every_reference_path_of_shapes_has_all_its_key_steps_marked():
    rng = random.Random(3)
    for _ in range(60):
        scene = (shapes.ObjectScene if rng.random() < .5 else shapes.BarScene)(rng)
        text, keys = shapes.reference_path(scene), sg.parse_key_steps(scene.key_steps())
        page = Page(rep.render_sections({"text": text, "right": 1.0}, {"key_steps": keys, "answer": ""},
                                        sg.matched_key_steps(text, keys)))
        assert len(page.all("mark")) == len(keys) and len(page.all("span", "yes")) == 1


# -- why a path is not valid

D, R, L = "### Image Description: d\n", "### Rationales: r\n", "### Let's think step by step.\n"
S1, S2, A = "### Step 1: a\n", "### Step 2: b\n", "### The final answer is: 4"


@pytest.mark.parametrize("text, reasons", [
    (D + R + L + S1 + S2 + A, []),
    ("just words", ["no section of the template"]),
    (R + L + S1 + A, ["no description"]),
    (D + L + S1 + A, ["no rationale"]),
    (D + R + L + A, ["no step"]),
    (D + R + S1, ["no answer"]),
    (D + R + S1 + "### The final answer is: **", ["answer is empty"]),
    (D + "### Rationales:\n" + S1 + A, ["rationale is empty"]),
    (D + R + S1 + "### Step 2:\n" + A, ["step is empty"]),
    (D + R + S2 + S1 + A, ["steps are numbered 2, 1"]),
    (D + R + S2 + A, ["steps are numbered 2"]),
    (D + S1 + R + A, ["rationale comes after step 1"]),
    (D + R + S1 + A + "\n" + S2, ["step 2 comes after answer"]),
    (D + R + S1 + A + "\n" + A, ["more than one answer"]),
    (D + R + D + S1 + A, ["more than one description"]),
])
def test_a_path_that_is_not_valid_is_told_why(text, reasons):
    assert rep.why_invalid(text) == reasons


def test_there_is_a_reason_exactly_when_step_validity_is_0():
    rng, pieces = random.Random(4), [D, R, L, S1, S2, A + "\n", "### Step 1:\n", "### The final answer is:\n", "## x\n"]
    valid = 0
    for _ in range(4000):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 6)))
        if rng.random() < .3:
            text = "".join(rng.sample([D, R], 2)) + "".join(rng.sample([L, S1, S2, A + "\n"], rng.randint(2, 4)))
        assert bool(rep.why_invalid(text)) == (sg.step_validity_reward(text) == 0), text
        valid += sg.step_validity_reward(text) == 1
    assert valid > 20


def test_the_raw_text_of_an_invalid_path_can_be_unfolded(tmp_path):
    text = "before <the> headers\n" + D + R + S1 + A + "\n" + A
    page = page_of(a_run(tmp_path / "run", groups=[a_group([report_path(), text])]))
    assert [raw for _, raw in page.all("pre")] == [text]
    assert "said again below" in page.all("article")[1][1]


# ─── 17. data/ablation.py ─────────────────────────────────────────────────────────────────────────────────────────────

def test_the_interval_is_students_and_the_table_pairs_the_seeds():
    mean, half = ablation.interval([0.5, 0.6, 0.7, 0.8, 0.9])
    assert mean == pytest.approx(0.7) and half == pytest.approx(2.776 * 0.158114 / 5 ** .5, rel=1e-2)
    rows = [{"arm": arm, "seed": seed, "sampled right": right, "greedy right": 1, "sampled step_validity": 1,
             "sampled k": 1, "flat groups": .5, "reward_std": .25}
            for arm, rights in (("outcome reward (GRPO)", (.5, .7)), ("StepRAR", (.6, .8)), ("both, M = 8", (.9, )))
            for seed, right in enumerate(rights)]
    lines = ablation.table(rows).split("\n")
    assert "| outcome reward (GRPO) | 2 | 60.0 ± 127.1 |" in lines[2] and lines[2].endswith("| – |")
    assert lines[3].startswith("| StepRAR | 2 | 70.0") and lines[3].endswith("| 50.0 ± 0.0 | 0.25 | +10.0 ± 0.0 |")
    assert lines[4].startswith("| both, M = 8 | 1 | 90.0 ± nan") and "+40.0" in lines[4] and len(lines) == 5


def test_an_evaluation_of_before_the_last_update_does_not_count_as_done(tmp_path):
    after = {"phase": "evaluation", "name": "after, sampled at T = 1", "right": 1}
    lines = [after, {"phase": "StepGRPO", "step": 1}]
    for end, done in (([], False), ([after], True)):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines + end))
        assert ablation.is_done(tmp_path, 1) == done and not ablation.is_done(tmp_path, 2)
    assert not ablation.is_done(tmp_path / "none", 0)


def test_the_arms_sample_as_many_paths_and_start_from_the_same_warm_up(tmp_path, monkeypatch):
    commands = []

    def fake(command, stdout, env, stderr):
        commands.append(command)
        folder = Path(command[command.index("--out") + 1])
        (folder / "checkpoint").mkdir(parents=True, exist_ok=True)
        stdout.write("warm-up 50.00update/s")
        steps, old = int(command[command.index("--steps") + 1]), folder / "metrics.jsonl"
        lines = [{"phase": "StepGRPO", "questions": 8, "flat_groups": 2, "reward_std": .5, "seconds": 2}] * steps
        scores = {"right": .5, "step_validity": 1, "k": 1}
        lines += [{"phase": "evaluation", "name": f"after, {how}", **scores} for how in ("greedy", "sampled at T = 1")]
        with open(old, "a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
        return subprocess.CompletedProcess(command, 0)
    monkeypatch.setattr(ablation.subprocess, "run", fake)
    monkeypatch.setattr(ablation, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["ablation.py", "--quick", "--seeds", "1", "--jobs", "1"])
    for _ in range(2):                                         # the second time everything is there
        ablation.main()
    assert len(commands) == len(ablation.ARMS) == 8
    said = [" ".join(command[2:]) for command in commands]
    assert "--model tiny" in said[0] and all("--resume" in text and "--steps 40" in text for text in said[1:7])
    assert all(str(ablation.folder_of(tmp_path / "runs" / "ablation-quick", 0, arm)) in " ".join(said)
               for arm in ablation.ARMS)
    for settings in filter(None, ablation.ARMS.values()):
        assert settings.get("questions", 8) * settings.get("group_size", 8) == ablation.PATHS
        assert settings.keys() <= {f.name for f in fields(sg.Config)}
    assert "--warmup-steps 4000" in said[7]                    # 40 updates of 2 s, at 50 updates/s
    assert len(records(tmp_path / "runs" / "ablation-quick" / "ablation.jsonl")) == 8


# ─── 18. Rewards in other frameworks ──────────────────────────────────────────────────────────────────────────────────

def test_trl_rewards_take_plain_and_conversational_completions_and_the_columns_of_r1_vl_10k():
    right, wrong = a_path(answer="4"), a_path(steps=["x = 3"], answer="5")
    columns = {"solution": [right, "4"], "key_steps": [{"Steps": [["x = 3"], ["y = 4"]]}] * 2, "image_path": ["a", "b"]}
    chat = [[{"role": "assistant", "content": right}],
            [{"role": "assistant", "content": [{"type": "text", "text": part} for part in (wrong[:9], wrong[9:])]}]]
    for completions in ([right, wrong], chat):
        assert sg.step_accuracy(prompts=["?", "?"], completions=completions, **columns) == pytest.approx([1.1, 0.05])
        assert sg.step_validity(prompts=["?", "?"], completions=completions, **columns) == [1, 1]
    with pytest.raises(ValueError, match="empty"):             # sections, but no answer in the reference
        sg.step_accuracy(["?"], [right], ["### Step 1:\nx = 3"], columns["key_steps"][:1])
    with pytest.raises(ValueError):                            # a column that is too short is no wrong answer
        sg.step_accuracy(["?", "?"], [right, wrong], ["4"], columns["key_steps"])


def test_verls_compute_score():
    extra = {"key_steps": [["x = 3"], ["y = 4"]]}
    scores = sg.compute_score("my data", a_path(answer="4"), "4", extra)
    assert scores == pytest.approx({"score": 2.1, "step_accuracy": 1.1, "step_validity": 1})
    assert sg.compute_score("my data", "no answer", a_path(answer="4"), extra_info=extra)["score"] == 0


def test_a_real_trl_trainer_trains_with_the_step_rewards(tmp_path):
    pytest.importorskip("trl", reason="trl is not installed (pip install trl): its GRPOTrainer was not tried")
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    from trl import GRPOConfig, GRPOTrainer
    published = write_published_checkpoint(tmp_path / "published", "qwen2_vl")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(published / "tokenizer.json"), eos_token="<|im_end|>",
                                        pad_token="<|endoftext|>")
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    keys = {"Steps": [["x = 3"], ["y = 4"]]}
    data = Dataset.from_list([{"prompt": "How many?", "solution": a_path(answer="4"), "key_steps": keys}] * 8)
    seen = []

    def spy(prompts, completions, **columns):
        seen.append((sg.step_accuracy(prompts, completions, **columns), columns["key_steps"][0]))
        return seen[-1][0]
    config = GRPOConfig(output_dir=str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=4, num_generations=4,
                        max_completion_length=8, report_to=[], logging_steps=1, use_cpu=True, save_strategy="no")
    trainer = GRPOTrainer(model=model, reward_funcs=[spy, sg.step_accuracy, sg.step_validity], args=config,
                          train_dataset=data, processing_class=tokenizer)
    trainer.train()
    assert len(seen) >= 2 and all(len(rewards) == 4 and set(rewards) == {0.0} for rewards, _ in seen)
    assert seen[0][1] == keys                                  # the column came through Arrow as it was
    logged = [entry for entry in trainer.state.log_history if "rewards/step_validity/mean" in entry]
    assert len(logged) == 2 and all("rewards/step_accuracy/mean" in entry for entry in logged)

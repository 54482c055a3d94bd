# SPDX-License-Identifier: MIT
"""Tests of stepgrpo.py, eval.py and data/: `python -m pytest -q`; CPU, no network, no download.

A test is named after the trap it guards: see it fail, and you know what broke. Reference tests
compare with a naive version beside them. Where CUDA is present, sections 3 and 4 run on it, in
float32. Tests that need ../shared, which is no part of the project, are skipped without it.
"""
import ast
import base64
import contextlib
import csv
import gc
import gzip
import hashlib
import html.parser
import http.server
import importlib.util
import io
import itertools
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
import zlib
from collections import Counter
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may reach for the Hub
# Some virtual machines announce AMX and then refuse it: bf16 would die of an illegal instruction.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers,
                        pre_tokenizers, processors, trainers)
from transformers import AutoConfig, AutoModelForImageTextToText

import eval as ev
import stepgrpo as sg

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / "shared"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOSE = 1e-5 if DEVICE == "cpu" else 1e-4  # what two orders of summation may differ by in float32
FAMILIES = ("qwen2_vl", "qwen2_5_vl")
torch.set_num_threads(1)  # these models are too small for two
torch.backends.cudnn.allow_tf32 = False  # else a GPU rounds the patch embedding to 10 bits

def load_script(name):
    """data/<name>.py as a module."""
    spec = importlib.util.spec_from_file_location(name, HERE / "data" / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

shapes, ks, rep = map(load_script, ("shapes", "key_steps", "report"))
speed, ablation = map(load_script, ("speed", "ablation"))
PROJECT_FILES = [HERE / "stepgrpo.py", HERE / "eval.py", *sorted((HERE / "data").glob("*.py"))]

# ─── 1. What is shared: a checkpoint in the published layout, models, runs ────────────────────────

PUBLISHED_SPECIAL = [f"<|{name}|>" for name in (
    "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start "
    "quad_end vision_start vision_end vision_pad image_pad video_pad").split()]
PUBLISHED_PLAIN = ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|repo_name|>"]  # 2.5 only
PUBLISHED_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+")
PUBLISHED_TEXT = [
    "### Image Description: The image shows a triangle.", "### Rationales: It asks for the area.",
    "### Let's think step by step.\n### Step 1: The base is 6.\n### Step 2: 6 * 4 / 2 = 12.",
    "### The final answer is: 12", "system\nYou are a helpful assistant.", "user\nassistant\n"] * 4

def dump(file, content):
    file.write_text(json.dumps(content, indent=2))

def write_published_tokenizer(folder, old):
    """A byte-level BPE as published, trained on a few lines."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PUBLISHED_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.train_from_iterator(PUBLISHED_TEXT, trainers.BpeTrainer(
        vocab_size=380, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    tokenizer.model.save(str(folder))  # vocab.json and merges.txt, without the special tokens
    plain = [] if old else PUBLISHED_PLAIN
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)
                                  for token in PUBLISHED_SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in plain])
    tokenizer.save(str(folder / "tokenizer.json"))
    flags = dict.fromkeys(["lstrip", "normalized", "rstrip", "single_word"], False)
    dump(folder / "tokenizer_config.json", {
        "add_prefix_space": False, "additional_special_tokens": PUBLISHED_SPECIAL[1:],
        "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(token)):
            flags | {"content": token, "special": token in PUBLISHED_SPECIAL}
            for token in PUBLISHED_SPECIAL + plain},
        "clean_up_tokenization_spaces": False, "errors": "replace", "model_max_length": 32768,
        "split_special_tokens": False, "tokenizer_class": "Qwen2Tokenizer", "unk_token": None}
        | ({"padding_side": "left"} if old else {"add_bos_token": False}))
    return tokenizer

def write_published_weights(folder):
    """Random weights in two shards, under the old names, without the tied head."""
    shards, generator = {1: {}, 2: {}}, torch.Generator().manual_seed(0)
    with torch.random.fork_rng():  # building a model draws random numbers
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    for name, value in model.state_dict().items():
        if name != "lm_head.weight":
            noise = torch.randn(value.shape, generator=generator)
            scaled = noise * value[0].numel() ** -0.5 if value.dim() > 1 else value + 0.1 * noise
            name = published_name(name)
            part = 2 if name.startswith(("model.layers.1.", "model.norm.")) else 1
            shards[part][name] = scaled.bfloat16()
    files = {part: f"model-0000{part}-of-00002.safetensors" for part in shards}
    for part, tensors in shards.items():
        save_file(tensors, folder / files[part], metadata={"format": "pt"})
    size = sum(2 * t.numel() for shard in shards.values() for t in shard.values())
    dump(folder / "model.safetensors.index.json", {
        "metadata": {"total_size": size},
        "weight_map": {name: files[part] for part in shards for name in sorted(shards[part])}})

def published_name(name):
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")

def write_published_checkpoint(folder, family):
    """Qwen2-VL's or Qwen2.5-VL's files as they were published, with small random weights."""
    folder, old = Path(folder), family == "qwen2_vl"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = write_published_tokenizer(folder, old)
    ids = {token[2:-2]: tokenizer.token_to_id(token) for token in PUBLISHED_SPECIAL}
    dump(folder / "chat_template.json", {"chat_template": "{{ 'only in this file' }}"})
    dump(folder / "preprocessor_config.json", {
        "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2,
        "merge_size": 2, "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor" if old else "Qwen2_5_VLProcessor"})
    dump(folder / "generation_config.json", {
        "bos_token_id": ids["endoftext"], "pad_token_id": ids["endoftext"], "do_sample": True,
        "eos_token_id": [ids["im_end"], ids["endoftext"]], "repetition_penalty": 1.05,
        "temperature": 0.01, "top_p": 0.001, "top_k": 1, "transformers_version": "4.37.0"})
    vision = {"depth": 2, "num_heads": 4, "in_chans": 3, "patch_size": 14,
              "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2}
    vision |= {"embed_dim": 32, "mlp_ratio": 4, "hidden_size": 64} if old else {
        "hidden_act": "silu", "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64,
        "window_size": 112, "fullatt_block_indexes": [1], "tokens_per_second": 2}
    name = "Qwen2VLForConditionalGeneration" if old else "Qwen2_5_VLForConditionalGeneration"
    dump(folder / "config.json", {
        "architectures": [name], "attention_dropout": 0.0, "bos_token_id": ids["endoftext"],
        "eos_token_id": ids["im_end"], "vision_start_token_id": ids["vision_start"],
        "vision_end_token_id": ids["vision_end"], "vision_token_id": ids["vision_pad"],
        "image_token_id": ids["image_pad"], "video_token_id": ids["video_pad"],
        "hidden_act": "silu", "hidden_size": 64, "initializer_range": 0.02,
        "intermediate_size": 96, "max_position_embeddings": 32768, "max_window_layers": 2,
        "model_type": family, "num_attention_heads": 4, "num_hidden_layers": 2,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
        "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2", "use_cache": True, "use_sliding_window": False,
        "vision_config": vision, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "vocab_size": tokenizer.get_vocab_size() + 6})  # more rows than tokens, as published
    write_published_weights(folder)
    return folder

QUESTIONS = ["How many objects are left?", "What is the area of the triangle? Explain.", "Hi"]

@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Family → folder in the published layout."""
    root = tmp_path_factory.mktemp("published")
    return {family: write_published_checkpoint(root / family, family) for family in FAMILIES}

@pytest.fixture(scope="session")
def loaded(checkpoints):
    """Family → (model, processor), shared: a test that changes the model copies it."""
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
    draw_shapes(folder)
    return folder

def draw_shapes(folder, seed=0):
    flags = f"--train 24 --warmup 48 --test 16 --seed {seed} --out {folder}".split()
    subprocess.run([sys.executable, HERE / "data" / "shapes.py", *flags], check=True,
                   capture_output=True)

def noise_image(width, height, seed=0):
    rng = random.Random(seed)
    return Image.frombytes("RGB", (width, height), rng.randbytes(3 * width * height))

def prompts_of(processor):
    """Three prompts of different length: one image, two images of other grids, text alone."""
    return [processor.prompt(QUESTIONS[0], [noise_image(56, 56, 1)]),
            processor.prompt(QUESTIONS[1], [noise_image(140, 56, 2), noise_image(84, 112, 3)]),
            processor.prompt(QUESTIONS[2])]

def random_ids(processor, lengths, seed=0):
    """Lists of lengths → the same lists of tensors of allowed ids."""
    generator = torch.Generator().manual_seed(seed)
    allowed = (~processor.banned).nonzero()[:, 0]
    return [[allowed[torch.randint(len(allowed), (n,), generator=generator)] for n in group]
            for group in lengths]

def full_logits(model, prompt, ids):
    """Naive: one forward of the plain model over prompt and completion → logits (C, V)."""
    whole = torch.cat([prompt.ids, ids])
    inputs = {"input_ids": whole[None]}
    inputs["mm_token_type_ids"] = (whole == model.config.image_token_id)[None].int()
    if prompt.pixels is not None:
        inputs |= {"pixel_values": prompt.pixels, "image_grid_thw": prompt.grids}
    logits = model(**{name: x.to(model.device) for name, x in inputs.items()}).logits
    return logits[0, len(prompt.ids) - 1:-1].float()

def naive_logps(model, processor, prompt, ids, temperature=1.0):
    logits = full_logits(model, prompt, ids) / temperature
    logps = torch.log_softmax(logits.masked_fill(processor.banned.to(model.device), -torch.inf), -1)
    return logps.gather(1, ids.to(model.device)[:, None])[:, 0]

@torch.no_grad()
def assert_recorded_logps_are_naive(model, processor, prompts, sampled, temperature):
    for prompt, ids, logps in zip(prompts, sampled.ids, sampled.logps):
        for own, logp in zip(ids, logps):
            expected = naive_logps(model, processor, prompt, own, temperature).cpu()
            assert torch.allclose(logp, expected, atol=1e-4), (logp - expected).abs().max()

@pytest.fixture(autouse=True)
def no_page(request, monkeypatch):
    """The page of a run takes a process of seconds: only where a test is about it."""
    run = subprocess.run
    if "page" not in request.node.name:
        monkeypatch.setattr(subprocess, "run", lambda command, **more: (
            more or "report.py" not in str(command)) and run(command, **more))

def run_main(*flags):
    """main() as from the command line → its exit: 0, 130, or the line it stops with."""
    try:
        sg.main([str(flag) for flag in flags])
    except SystemExit as stop:
        return stop.code or 0
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler)
        gc.collect()  # the lock of a run goes with it
    return 0

def run_flags(out, folder, /, **changes):
    """The flags of a run of seconds on the tiny model: 2 warm-up and 4 StepGRPO updates."""
    settings = dict(
        out=out, data=folder / "train.json", warmup_data=folder / "warmup.json", device="cpu",
        warmup_steps=2, warmup_batch=4, steps=4, questions=2, group_size=2, max_new_tokens=8,
        held_out=0, save_every=2, show_every=2, warmup_lr=1e-3, lr=1e-3) | changes
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]

def records(file):
    return [json.loads(line) for line in Path(file).read_text().split("\n")[:-1]]

def metrics(out):
    """The log of a run without what may differ between two runs of the same."""
    return [{name: value for name, value in row.items() if name != "seconds"}
            for row in records(Path(out) / "metrics.jsonl")]

def cpu_seconds(call):
    """CPU time of this thread, which others on the machine do not lengthen: the least of three."""
    times = []
    for _ in range(3):
        for cached in (sg.canonical, ev.read_number):
            cached.cache_clear()
        began = time.thread_time()
        call()
        times.append(time.thread_time() - began)
    return min(times)

def flat(tensors):
    return torch.cat([x.detach().flatten().float() for x in tensors if x is not None])

def flat_weights(model):
    return flat(model.parameters())

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
    """A random model earns nothing, and a flat group teaches nothing: here validity varies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sg, "step_validity_reward", lambda text: zlib.crc32(text.encode()) % 8 / 8)
        yield

def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)

@contextlib.contextmanager
def at_log(phase, step, act=ctrl_c):
    """Calls act(), or presses Ctrl-C, right after the log line of this update."""
    log = sg.Run.log

    def spy(run, file, record):
        log(run, file, record)
        if file == "metrics.jsonl" and (record["phase"], record.get("step")) == (phase, step):
            act()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sg.Run, "log", spy)
        yield

# ─── 2. Template, answers, key steps, rewards ─────────────────────────────────────────────────────

def cases(text):
    """Lines of "a → b; c → d" → [("a", "b"), ("c", "d")]."""
    return [tuple(case.strip().split(" → ")) for case in re.split(r";|\n", text.strip())]

def a_path(description="A triangle.", rationale="Use the sum.", steps=("x = 3", "y = 4"),
           answer="4"):
    numbered = "\n\n".join(f"### Step {i}:\n{step}" for i, step in enumerate(steps, 1))
    return (f"### Image Description:\n{description}\n\n### Rationales:\n{rationale}\n\n"
            f"### Let's think step by step.\n\n{numbered}\n\n### The final answer is: {answer}")

def test_instruction_keeps_braces_of_the_question():
    text = sg.build_instruction(r"What is \frac{1}{2} of {question}?")
    assert text.endswith("### The final answer is: \n\n" + r"What is \frac{1}{2} of {question}?")

def test_sections_of_the_template():
    assert sg.split_sections("hello\n" + a_path()) == sg.Sections(
        "A triangle.", "Use the sum.", ["x = 3", "y = 4"], "4",
        ["description", "rationale", "step 1", "step 2", "answer"])
    assert sg.split_sections("") == sg.Sections(None, None, [], None, [])
    assert sg.split_sections("### Rationales:\n\n### Step 1:\n### The final answer is:") == (
        None, "", [""], "", ["rationale", "step 1", "answer"])

@pytest.mark.parametrize("line, section", cases(r"""
    ### Image Description: a → description; #IMAGE  description a → description
    \n  #####  **Rationales:** a → rationale; ### Rationale:\na → rationale; ###step 3 a → step 3
    ### **Step 12**: a → step 12; \r\n### Step 2:\r\na\r\n → step 2
    ### The final answer is a → answer; the FINAL answer is: a → answer
    **The final answer is:** a → answer; **The final answer is** a → answer
    ### The final answer is:\nThe final answer is: a → answer
    The final answer is found by adding. → none; So the final answer is: 4 → none
    see ### Step 1: a → none; Step 1: a → none; ### Step one → none; ### Steps → none
    ### Something else → none; ### Step 123456: a → none"""))
def test_header_variants(line, section):
    line = line.replace(r"\n", "\n").replace(r"\r", "\r")
    assert sg.split_sections(line).order == ([] if section == "none" else [section])

def test_a_foreign_header_ends_a_section_and_a_sign_in_a_step_does_not():
    text = "### Step 1:\na\n### Note:\nb\n### The final answer is: 4\n### Check\n5"
    parts = sg.split_sections(text)
    assert parts.steps == ["a"] and parts.answer == "4" and parts.order == ["step 1", "answer"]
    assert sg.split_sections("### Step 1:\n# of apples = 5\n* x").steps == ["# of apples = 5\n* x"]

NULL = ("", " ", "**", ".", "$$", r"\boxed{}", "-", "{}", "&nbsp;", "\u200b", "\n### Check\n4")

@pytest.mark.parametrize("answer, expected", [*cases(r"""
    4 → 4; **4** → 4; $4$ → 4; 4. → 4; \(4\) → 4; \[ 4 \] → 4; $\boxed{4}$. → 4; .57 → .57
    \(\boxed{\text{(A)}}.\) → (A); \boxed{\frac{1}{2}} → \frac{1}{2}; "Yes." → Yes; `D` → D
    Answer: 4 → 4; The correct answer is 4 → 4; : 4 → 4; 4, because 1 + 3 = 4 → 4; 5' → 5'
    So, the answer is **4** → 4"""),
    ("\n4\n", "4"), ("4\n\nExplanation: we added.", "4"), *[(empty, None) for empty in NULL]])
def test_final_answer_decoration_and_null(answer, expected):
    assert sg.final_answer("### The final answer is: " + answer) == expected

def test_the_last_header_counts_and_a_right_number_in_a_step_does_not():
    assert sg.final_answer("### The final answer is: 3\n### The final answer is: 5") == "5"
    assert sg.final_answer("### The final answer is: 3\n### The final answer is:") is None
    assert sg.final_answer("### Step 1:\nThe answer is 4. \\boxed{4}") is None

SAME = cases(r"""
    C → (C); C. → c; C: 123 → C; C) 123 → C; option C → C; 123 → C: 123; (b) → B; 5 cm → 5
    C. A careful look shows it → C; A: 0.5 → A: 1/2; C, 58° → C; 5cm → 5 cm; 4.4 m → 4.4 metres
    5\,\mathrm{cm}^2 → 5 cm²; $5 → 5; 5 m/s → 5; 5 °C → 5; 90^\circ → 90 degrees; 90^{\circ} → 90°
    60*\degree → 60; 50% → 50; 50% → 0.5; 50\% → 50; 50 percent → 50%; ∠CED = 140° → 140
    3 + 4 = 7 → 7; x = 10/2 = 5 → 5; \frac12 → 0.5; \dfrac{1}{2} → \tfrac{1}{2}; 3.0 → 3
    -\frac{1}{2} → -0.5; \frac{-1}{2} → -1/2; 00.57 → 0.57; .57 → 0.57; 1e3 → 1000
    1 1/2 → 3/2; 1.35 \times 10^{4} → 13500; 2 \times 10^{-3} → 0.002; -1 1/2 → -1.5; +60 → 60
    2\frac{1}{2} → 2.5; 2½ → 2.5; −3 → -3; - 3 → -3; １２ → 12; 1{,}234 → 1,234; 32,\!349 → 32349
    1,234,567.50 → 1234567.5; \{100,200\} → \{100, 200\}; \left(3, 4\right) → (3,4)
    \left( \frac{1}{3} \right) → 1/3; 2\sqrt{3} → 2√3; sqrt(3) → \sqrt3; 12π cm → 12π
    10\sqrt{3} \text{ m} → 10\sqrt3; 10*pi → 10\pi; \frac{2\pi}{3} → 2π/3; €8 → 8 euro
    5 square centimeters → 5 cm²; 5 cubic feet → 5 ft^3
    \frac{\sqrt{30}}{2} → √30/2; y=-2 x+5 → $y = -2x + 5$; x >= 3 → x ≥ 3; x \ne 3 → x != 3
    \angle ABC → ∠ABC; \theta → θ; AB \perp CD → AB ⊥ CD; x⁴ → x^4; \odot O → ⊙O; yes → Yes.
    Saint Bernard → saint  bernard; Yes, the bars differ → yes; Ｂ → B
    \sqrt{x}y → √x y; AB // CD → AB \parallel CD; A^{\prime\prime} → A''; 5 cm squared → 5 cm²
    C = 2πr = 10π → 10\pi; 3 cm × 4 cm = 12 cm² → 12; 20% of 100 = 20 → 20; ∠A = ∠B = 40° → 40
    The radius is 5 → 5; “Yes” → yes; <answer>7</answer> → 7
    """ + "5\u200b → 5; cafe\u0301 → caf\xe9")
DIFFERENT = cases(r"""
    C: 123 → C: 124; C: 123 → D: 123; A dog → A; A, B → A; A or C → A; (A) 5 (B) 6 → A
    A. x B. y → A; May → a; A: C → C; A' → A; Yes or no → yes; No, yes → no; yes and no → yes
    5% → 5 cm; 5x → 5; 5xy → 5; 3 dozen → 3; 5 million → 5; 2 thirds → 2; 4\sin\theta → 4
    $3 → 3 cents; 5' → 5"; 13² → 13; 60 or 61 → 60; not 5 → 5; the answer is not = 5 → 5
    5 is wrong → 5; 4 → 40; 1,2,3 → 123; 1,2 → 12; \{100,200\} → 100200; x = 3 → y = 3
    y → y = -3; x >= 3 → 3; x != 3 → 3; x + y = 5 → 5; 2x = 6 → 6; x^2 = 9 → 9; AB = CD → CD
    21/2 → 2\frac12; 2(3) → 23; 9**9**9 → 9; 50% → 0.05; \frac{1}{2x} → \frac{1}{2}x; 0.5% → 50
    (ab)^2 → ab^2; (-3)^2 → -3^2; \sqrt{a}b → \sqrt{ab}; \frac{1}{a}b → \frac{1}{ab}; x=/=0 → 0
    \sqrt{3}2 → \sqrt{32}; x^{2}3 → x^{23}; x = 3 \quad y = 4 → 4; x = 3 or y + 2 = 4 → 4
    Italy, France → France; 2ⁿ → 2n; (a) or (b) → A; x = three or x = 4 → 4; ⟨1,2⟩ → ⟨12⟩
    x = 2π y = 4 → 4; Nothing is 7 → 7; B is correct and C is correct → B; \vec{a}b → \vec{ab}
    5 square m → 5 m; 1e999999999 → 1e999999998; -2√3 → 2√3; __import__('os') → A; 5/4 → 4/5""")
DIFFERENT += [("", ""), (" ", " "), ("", "4"), (None, "4"), (None, None)]

@pytest.mark.parametrize("a, b", SAME)
def test_right_answers_are_recognised_both_ways(a, b):
    assert sg.same_answer(a, b) and sg.same_answer(b, a), (sg.canonical(a), sg.canonical(b))

@pytest.mark.parametrize("a, b", DIFFERENT)
def test_wrong_answers_are_not_accepted_either_way(a, b):
    assert not sg.same_answer(a, b) and not sg.same_answer(b, a)

def test_numbers_agree_with_fractions_on_random_pairs():
    rng = random.Random(0)
    for _ in range(300):
        p, q, r, s = (rng.randint(low, high) for low, high in [(-12, 12), (1, 6)] * 2)
        assert sg.same_answer(rf"\frac{{{p}}}{{{q}}}", f"{r}/{s}") == (p * s == r * q), (p, q, r, s)

DISTINCT = [x.strip() for x in r"""
    0; 1; 2; 3; 12; 21; 123; 1234; -1; -3; 0.1; 0.333; 0.33; 2.5; 3.14; -0.5; 0.001; 1e-4; 6.02e23
    1/3; 2/3; 3/4; 4/3; -1/6; 1/12; 2\frac{1}{3}; 3 5/7; 1/0; 2/0; 13%; √2; √3; 2√3; 3√2; -√7
    \sqrt{5}/2; \sqrt[3]{2}; \sqrt[4]{2}; 1+√2; 1-√2; \sqrt{2x}; \sqrt{2}x; √(x+1); √x + 1; π; 2π
    π/2; 2π/3; -π; π^2; 4 - π; π - 4; 2\pi r; \pi r^2; 5 cm; 5 m; 5 kg; 5 s; 5 min; 5 cm^2; 5 cm^3
    5 m/s; 5 m/s^2; 5 km/h; 5 am; 5 pm; 9 °C; 9 °F; 9 radians; 8 dozen; 8 thousand; 8 million
    8 thirds; 8'; 8"; $6; 6 cents; €6; ¥6; £6; x; y; A'; P''; x^2; x^3; x_1; x_2; x_{12}; x_{k-1}
    x_k - 1; xy; x+y; x-y; y-x; 2x; x/2; 1/(2x); 1/2x; (2a)^3; 2a^3; e^{2x}; e^2x; e^x; 2^n
    2^{n+1}; 2^n+1; n!; 4!; 3a + 2b; 3b + 2a; 4 sin θ; 4 cos θ; 4 sin α; sin θ; \sin 2x; \sin^2 x
    2\sin x; \ln 2; \log 3; \log_2 3; f(x); f'(x); f(2); g(x); f(x+1); 2θ; 2α; 2∞; -∞; ∞; |x|; |-x|
    \overline{AB}; \vec{AB}; (1, 2); (2, 1); [1, 2]; (1, 2]; [1, 2); {1, 2}; (1,2,3); (100,200)
    [100,200]; \{100,200\}; 100,200; 1, 2; ∅; \{0\}; 1:2; 2:1; C; D; A and B; B or C; red
    dark red; blue; not blue; triangle; right triangle; right; Peru; Peru and Chile; yes; no; true
    north; northwest; five; twenty five; seven apples; 7 apples; 7 oranges; co-operate; operate
    x = 14; x = 15; y = 14; x > 4; x < 4; x ≥ 4; x ≤ 4; x ≠ 4; x ≈ 4; y = 2x + 1; y = 2x - 1
    x + y = 5; x = 4 or x = 5; AB = CD; AB ∥ CD; AB ⊥ CD; AB ≅ CD; A ∪ B; A ∩ B; △ABC; ∠ABC; ∠1
    ∠1 = ∠2; ⊙O; 12:30; 12:45; 3rd; 5x; 5xy; H2O; CO2; 10^3; 10^{-3}; 9**9; ±3; 3 ± √2; ~5
    50 - 60; 60 or 61; 97; 31; 45°; 54°; 7 oz; 48 h; 19 days; 40 mph; circle; rhombus; acute; kite
    Tuesday; March; Lima; x = -4; y < 0; a^2 + b^2; C_2; O_2; 3x^2; 2/7; 7/2; 1.75; -2.5; 512; 125
    obtuse; Oslo; iron; copper; 77; 88.5; -12; 5/11; a^2 - b^2; 0.375
    """.replace("\n", ";").split(";") if x.strip()]
APPENDED = r"""
    x; θ; sin; dozen; million; '; ''; ^2; +1; - 1; = 8; or 8; and 8; not; /2; √2; !; ?; wrong
    is wrong; %%; ²; °°; × 2; * 2; >; hundred; x^2; \pi; half; (2); (B); a; b; ∞; -; =; {; thirds
    8; e5; .5; _2; |; \; squared; apples""".replace("\n", ";").split(";")[1:]

def test_no_two_of_250_distinct_answers_are_the_same():
    assert len(set(DISTINCT)) >= 250 and all(sg.same_answer(x, x) for x in DISTINCT)
    for a, b in itertools.combinations(dict.fromkeys(DISTINCT), 2):
        assert not sg.same_answer(a, b) and not sg.same_answer(b, a), (a, b)

def test_one_token_appended_makes_a_right_answer_wrong():
    right = ["7", "1/2", "0.25", "5 cm", "√3", "2π", "x = 3", "C", "yes", "(1, 2)", "red", "x^2",
             "50%", "$5", "AB", "12:30", "f(x)", "x > 3", "right triangle"]
    for answer, token, space in itertools.product(right, APPENDED, ("", " ")):
        longer = answer + space + token.strip()
        assert not sg.same_answer(longer, answer), longer

def test_the_labelled_cases_of_public_reports():
    script = SHARED / "cases" / "check_rewards.py"
    if not script.exists():
        pytest.skip("the shared cases are not here")
    done = subprocess.run([sys.executable, script], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout

MATCH = cases(r"""
    so \frac{6}{3} = 2. → 6/3=2; 6 ÷ 3 = 2 → 6/3=2; 6 divided by 3 equals 2 → \frac{6}{3} = 2
    we get x=3 here → x = 3; 3 \times 4 = 12 → 3*4=12; 3 times 4 equals 12 → 3 \cdot 4 = 12
    3 multiplied by 4 is equal to 12 → 3x4=12; 7-3=4 → 3; 7 -3 = 4 → 7-3=4; is -3 → -3
    7 minus 3 equals 4 → 7 - 3 = 4; 2 plus 3 equals 5 → 2+3=5; $x = 3$, so → x=3; - 3 apples → 3
    1,300 kg → 1300; x = 6/3 = 2 → 6/3=2; x = 6/3 = 2 → x = 6/3; x = 3.0 → x = 3; 2*x = 8 → 2x = 8
    \left( 3 + 4 \right) \cdot 2 → (3+4)*2; area = \pi r^2 → πr²; AB-CD=5 → AB - CD = 5
    90 degrees → 90°; **right triangle** here → right triangle; A Right Triangle. → right triangle
    not a right triangle → not a right triangle; It is not small. A right triangle → right triangle
    No, a right triangle → right triangle; we get x = 3 here → x = 3.; 7(3) = 21 → 7 × 3 = 21
    not small, but a right triangle → right triangle; not 5 but 6 objects → 6 objects
    180 - 57 = 123 → 180° - 57° = 123°; 3 km + 4 km = 7 km → 3 + 4 = 7; x = 5 cm → x = 5
    m\angle 4 = 57^{\circ} → m∠4 = 57°; In \triangle ABC → △ABC
    x = 3 (given) → x = 3; $5 + $3 = $8 → 5 + 3 = 8; 5 minutes later → 5 min
    8 × 3 = 24 cm² → 8 cm × 3 cm = 24 cm²; ½(6)(4) = 12 → 1/2 × 6 × 4 = 12; x is 3. → x = 3
    6 divided by 3 is 2 → 6/3 = 2; 9¢ - 4¢ = 5¢ → 9 - 4 = 5; x squared is 9 → x² = 9""")
MATCH += [("- x = 3\n- y = 4", form) for form in ("x=3", "y=4")]
MISS = cases(r"""
    13 → 3; 3.5 → 3; 1,300 → 3; 1,300 → 300; x = -3 → 3; x = - 3 → 3; is -3 → 3; 17 - 3 = 4 → 7-3=4
    7 - 3 = 40 → 7-3=4; 7-3=4.5 → 7-3=4; 7-3=4/2 → 7-3=4; 2x = 3 → x=3; 5 + x = 3 → x=3; x_3 = 1 → 3
    H2O → 2; upright triangles → right triangle; x=4 → x=3; not a right triangle → right triangle
    isn't a right triangle → right triangle; x ≠ 3 → 3; x = 2 mod 3 → x = 2
    it cannot be a right triangle → right triangle; without a right triangle → right triangle
    a right triangle → not a right triangle; y = 2x + 1 → y = 2; x = 3(y + 1) → x = 3
    y = 3 times the width → y = 3; y = 3 × width → y = 3; x = 3% → x = 3; log x = 3 → x = 3
    x = 3 million → x = 3; x = 3 : 4 → x = 3; sin x = 0.5 → x = 0.5; 1/3 cups → 3 cups
    10^3 objects → 3 objects; x < 3/4 → x < 3; co-interior angles → interior angles
    a non-right triangle → right triangle; x = 5 m → x = 5 cm; 6 objects or 7 objects → 6 objects
    6 objects or 7 objects → 7 objects; x = 3 squared → x = 3; x is 3 more than y → x = 3
    A ∪ B = 3 → B = 3; y = 2|x| → y = 2; sinh x = 1 → x = 1; (2/3)x = 6 → x = 6""") + [("", "3")]

@pytest.mark.parametrize("step, form, found", [
    *[(*case, 1.0) for case in MATCH], *[(*case, 0.0) for case in MISS]])
def test_a_key_step_is_found_where_it_stands_and_not_inside_of_something_else(step, form, found):
    canonical = sg.canonical(step), sg.canonical(form)
    assert sg.match_key_steps(a_path(steps=[step]), [[form]]) == found, canonical

def test_only_text_of_the_steps_counts_and_a_group_counts_once():
    text = a_path("alpha", "beta", ["gamma", "gamma"], "delta") + "\n### Note\nepsilon"
    key_steps = [["alpha"], ["beta"], ["zeta", "gamma"], ["delta"], ["epsilon"]]
    assert sg.earned_key_steps(text, key_steps) == [None, None, 0, None, None]
    assert sg.match_key_steps(text, key_steps) == 0.2

def test_dumping_all_key_words_in_one_step_does_not_beat_an_honest_path():
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]
    key_steps = [[word] for word in words]
    honest = a_path(steps=["alpha beta", "gamma delta", "epsilon zeta"])
    dump = a_path(steps=[" ".join(words), "so", "done"])
    assert sg.match_key_steps(honest, key_steps) == 1.0
    assert sg.match_key_steps(dump, key_steps) == pytest.approx(2 / 6)
    assert sg.match_key_steps(dump, key_steps, reference=honest) == pytest.approx(2 / 6)
    again = a_path(steps=["alpha beta gamma"] * 2)  # the second earns what was too much for one
    assert sg.earned_key_steps(again, [["gamma"], ["beta"], ["alpha"]]) == [0, 0, 1]

def test_the_reference_earns_all_of_its_own_key_steps_however_dense():
    dense = a_path(steps=["5 apples, 3 pears, 2 plums", "5 + 3 + 2 = 10"])
    key_steps = [["5 apples"], ["3 pears"], ["2 plums"], ["5 + 3 + 2 = 10"]]
    assert sg.match_key_steps(dense, key_steps) == 0.75
    assert sg.match_key_steps(dense, key_steps, reference=dense) == 1.0
    assert sg.step_accuracy_reward(dense, "4", key_steps, reference=dense) == pytest.approx(1.1)

@pytest.mark.parametrize("value", [
    [["x = 3", "3 = x"], "y"], {"Steps": [["x = 3", "3 = x"], "y"], "Rationales": [1]},
    [{"Steps": (("x = 3", "3 = x"), "y")}]])
def test_key_steps_come_as_users_bring_them(value):
    assert sg.parse_key_steps(value) == [["x = 3", "3 = x"], ["y"]]

@pytest.mark.parametrize("value", [
    [["a"], ["b"], []], [["a"], [5]], {"Rationales": []}, [], [3], None, "x = 3", [["a", "$$"]]])
def test_malformed_key_steps_are_an_error(value):
    with pytest.raises(ValueError, match="key steps: no list of texts"):
        sg.match_key_steps(a_path(), value)

KEYS = [["x = 3"], ["y = 4"], ["z = 5"], ["right triangle"]]

def test_accuracy_reward_is_equation_2_with_its_null_case_and_no_number_in_a_step_rescues_it():
    rewards = {"4": 1.05, "**4.0**": 1.05, "5": 0.05, "": 0.0, "\n### x\n4": 0.0, "-": 0.0}
    for answer, reward in rewards.items():
        assert sg.step_accuracy_reward(a_path(answer=answer), "4", KEYS) == pytest.approx(reward)
    assert sg.step_accuracy_reward(a_path(), "4", KEYS, alpha=0.4) == pytest.approx(1.2)
    rescued = a_path(steps=["the answer is 4"], answer="9")
    assert sg.step_accuracy_reward(rescued, "4", KEYS) == 0.0
    for truth in ("", " ", "$$", None):
        with pytest.raises(ValueError, match="ground-truth"):
            sg.step_accuracy_reward(a_path(), truth, KEYS)

PARTS = {  # small letters: nothing below the header but what follows here
    "D": "### Image Description: d", "R": "### Rationales: r", "L": "### Let's think step by step.",
    "A": "### The final answer is: 4", "1": "### Step 1: a", "2": "### Step 2: b",
    "4": "### Step 4: d", "N": "### Note: n", "d": "### Image Description:", "r": "### Rationales:",
    "s": "### Step 1:", "a": "### The final answer is:", "*": "**", "v": "\u200b"}

def validity(letters):
    return sg.step_validity_reward("".join(PARTS[letter] + "\n" for letter in letters))

@pytest.mark.parametrize("letters", "DRL12A DRL1A DR12A RDL1A DR1AN".split())
def test_validity_reward_pays_complete_paths_in_order(letters):
    assert validity(letters) == 1

@pytest.mark.parametrize("letters", [
    "", "drsa", "RL1A", "DL1A", "DRA", "DRL1", "DRsA", "DRs2A",  # a section lacks or is empty
    "DR1a*", "d*R1A", "DRsvA",  # signs and what is invisible are no content
    "R1DA", "D1RA", "DR1DA", "DR2A", "DR21A", "DR11A", "DR124A", "DR1AA", "DR1A2", "DRA1"])  # order
def test_validity_reward_pays_neither_skeletons_nor_wrong_order(letters):
    assert validity(letters) == 0

HOSTILE = [
    "2" * 100_000, "7" * 5000 + "/" + "3" * 5000, "9**9**9", "1e999999999", "{" * 10_000,
    "(" * 10_000, "x'" * 5000, r"\frac{1}{" * 1000 + "2" + "}" * 1000, r"\boxed{" * 300,
    "1,234" * 20_000, " " * 100_000, "# " * 50_000, "7" + "\n" * 9000 + "x", "\n- " * 7000,
    "not x " * 3000, "x = " * 10_000, "5 cm " * 200, "a " * 499 + "= 5", "\n## " * 5000,
    "### image" + " " * 50_000, "1." * 10_000, "x or " * 2000, "e\u0301" * 1000, "$x " * 4000,
    "\n### Step 1:\nx" * 2000, "," * 10_000, "the answer is " * 700, "&lt;" * 3000,
    r"\text{" * 1500 + "a" + "}" * 1500]

def slowest(text):
    """CPU seconds of the slowest function on a hostile text."""
    keys = [["x = 3"], ["2"], ["right triangle"], ["not x"], ["x"]] * 2
    whole = f"### Step 1:\n{text}\n### The final answer is: {text}"
    return max(map(cpu_seconds, (
        lambda: sg.same_answer(text, "3"), lambda: sg.same_answer(text[:999], text[1:1000]),
        lambda: sg.step_accuracy_reward(whole, "3", keys),
        lambda: sg.step_validity_reward(whole))))

def test_hostile_texts_are_scored_in_50_ms_also_in_another_thread():
    found = []
    thread = threading.Thread(target=lambda: found.extend(map(slowest, HOSTILE)), daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert len(found) == len(HOSTILE) and max(found) < 0.05, HOSTILE[found.index(max(found))][:40]

# ─── 3. Model, sampling, KV cache ─────────────────────────────────────────────────────────────────

def test_only_the_four_packages_are_imported_and_no_eval_or_bare_except_hides_a_bug():
    allowed = {"torch", "transformers", "safetensors", "PIL", "tqdm"} | sys.stdlib_module_names
    for file in PROJECT_FILES:
        own = set() if file.name == "stepgrpo.py" else {"stepgrpo"}
        own |= {"trl", "datasets", "torchvision"} if file.name == "speed.py" else set()  # --trl
        for node in ast.walk(ast.parse(file.read_text())):
            names, kinds = [], []
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [getattr(node, "module", None) or alias.name for alias in node.names]
            elif isinstance(node, ast.ExceptHandler):
                said = {getattr(x, "id", "") for part in node.body for x in ast.walk(part)}
                kinds = [] if node.name in said else ast.walk(node.type or ast.Name("Exception"))
            elif isinstance(node, ast.Call):
                kinds = [node.func]
            refused = {getattr(kind, "id", None) for kind in kinds} & {
                "Exception", "BaseException", "eval", "exec"}
            good = {name.split(".")[0] for name in names} <= allowed | own and not refused
            assert good, (file.name, node.lineno)
    if importlib.util.find_spec("torchvision") is None:
        assert "torchvision" not in sys.modules

@pytest.mark.parametrize("family", FAMILIES)
def test_published_layout_loads_with_every_weight(family, checkpoints, loaded):
    model, processor = loaded[family]
    published = {name: value for file in checkpoints[family].glob("*.safetensors")
                 for name, value in load_file(file).items()}
    ours = {published_name(name): value for name, value in model.state_dict().items()}
    assert set(ours) - set(published) == {"lm_head.weight"} and not set(published) - set(ours)
    assert all(torch.equal(ours[name].cpu(), value.float()) for name, value in published.items())
    assert model.lm_head.weight is model.get_input_embeddings().weight and not model.training
    assert len(processor.banned) == model.config.get_text_config().vocab_size

@pytest.mark.parametrize("family", FAMILIES)
def test_published_layout_trains_one_update_through_main(family, checkpoints, shapes_set, tmp_path):
    flags = run_flags(tmp_path / "run", shapes_set, model=checkpoints[family], device=DEVICE,
                      warmup_steps=0, steps=1, questions=1)
    with varied_rewards():
        assert run_main(*flags, *["--offload_optimizer"] * (family == "qwen2_5_vl")) == 0
    (row,) = metrics(tmp_path / "run")
    assert row["grad_norm"] > 0 and row["flat_groups"] == 0
    assert row["loss"] == pytest.approx(0, abs=1e-5)
    trained, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "run" / "checkpoint", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    before, after = (sg.load_model(folder, torch.device("cpu"), torch.float32, 400_000)[0]
                     for folder in (checkpoints[family], tmp_path / "run"))
    assert not torch.equal(flat_weights(before), flat_weights(after))
    assert torch.equal(flat_weights(trained), flat_weights(after))

def test_the_chat_layout_needs_no_template_file_and_images_keep_their_places(loaded):
    _, processor = loaded["qwen2_vl"]
    images = [noise_image(56, 56), noise_image(84, 56)]
    a, b = (f"<|vision_start|>{'<|image_pad|>' * n}<|vision_end|>" for n in (4, 6))
    for question, user in (("Why?", f"{a}{b}Why?"), ("Is <image> or <image>?", f"Is {a} or {b}?")):
        prompt = processor.prompt(question, images)
        assert processor.tokenizer.decode(prompt.ids) == (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n")
        assert prompt.grids.tolist() == [[1, 4, 4], [1, 4, 6]]

def test_positions_of_an_image_span_a_box_and_text_goes_on_after_its_longest_side(any_model):
    """Qwen2-VL report, section 2.1, naively: for no, one and two images of odd grids."""
    _, processor = any_model
    for sizes in ([], [(140, 84)], [(28, 400)], [(112, 84), (56, 196)]):
        prompt = processor.prompt("Hi", [noise_image(*size) for size in sizes])
        ids, start, i, naive = prompt.ids.tolist(), 0, 0, []
        grids = iter([] if prompt.grids is None else prompt.grids.tolist())
        while i < len(ids):
            if ids[i] != processor.image_token:
                naive.append([start] * 3)
                start, i = start + 1, i + 1
                continue
            _, h, w = next(grids)
            naive += [[start, start + y, start + x] for y in range(h // 2) for x in range(w // 2)]
            start, i = start + max(h, w) // 2, i + h * w // 4
        assert prompt.positions.T.tolist() == naive

def test_special_tokens_in_a_question_are_plain_text(any_model):
    _, processor = any_model
    prompt = processor.prompt("What does <|image_pad|> or <|im_end|> mean?", [noise_image(56, 56)])
    assert (prompt.ids == processor.image_token).sum() == 4
    assert (prompt.ids == processor.eos[0]).sum() == 2
    assert "<|image_pad|> or <|im_end|>" in processor.tokenizer.decode(prompt.ids)

@pytest.mark.parametrize("temperature", [0.7, 1.2])
def test_logps_of_cached_sampling_equal_the_full_forward_with_images_of_two_grids(
        any_model, temperature):
    model, processor = any_model
    prompts = prompts_of(processor)
    sampled = sg.rollout(model, processor, prompts, 3, 12, temperature, range(3))
    assert_recorded_logps_are_naive(model, processor, prompts, sampled, temperature)

def test_greedy_sampling_equals_greedy_by_full_forwards(any_model):
    model, processor = any_model
    prompts = prompts_of(processor)
    for prompt, (own,) in zip(prompts, sg.rollout(model, processor, prompts, 1, 10, 0).ids):
        with torch.no_grad():
            logits = full_logits(model, prompt, own).cpu()
        assert torch.equal(own, logits.masked_fill(processor.banned, -torch.inf).argmax(-1))
        assert len(own) == 10 or own[-1] in processor.eos

def test_rope_deltas_of_the_last_image_do_not_stay(small_model):
    model, processor = small_model
    a, b, _ = prompts_of(processor)
    fresh = sg.rollout(model, processor, [a], 1, 6, 0)
    logps = sg.completion_logps(model, processor, [a], fresh.ids)[0].detach()
    with torch.no_grad():
        full_logits(model, b, torch.tensor([5]))  # the plain forward leaves rope_deltas behind
    again = sg.rollout(model, processor, [a], 1, 6, 0)
    assert same(fresh.ids, again.ids) and same(fresh.logps, again.logps)
    assert torch.equal(logps, sg.completion_logps(model, processor, [a], fresh.ids)[0].detach())

def test_completions_do_not_depend_on_the_batch_its_order_or_its_padding(any_model):
    model, processor = any_model
    prompts = prompts_of(processor)
    together = sg.rollout(model, processor, prompts, 3, 8, 1.2, [5, 6, 7])
    turned = sg.rollout(model, processor, prompts[::-1], 3, 8, 1.2, [7, 6, 5])
    assert same(together.ids, turned.ids[::-1])
    for q in range(3):
        alone = sg.rollout(model, processor, prompts[q:q + 1], 3, 8, 1.2, [5 + q])
        assert same(alone.ids, together.ids[q:q + 1])
        assert torch.allclose(torch.cat(alone.logps[0]), torch.cat(together.logps[q]), atol=CLOSE)
    again = [sg.rollout(model, processor, prompts[:1], 3, 8).ids for _ in range(2)]
    assert not same(*again)  # without seeds: others each time

@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_neither_cache_nor_gradients(family, loaded):
    model, processor = deepcopy(loaded[family][0]), loaded[family][1]
    prompts, ids = prompts_of(processor)[:2], random_ids(processor, [[5, 3], [4, 6]])

    def gradients():
        model.train().zero_grad()
        sg.completion_logps(model, processor, prompts, ids)[0].sum().backward()
        return flat(p.grad for p in model.parameters())

    plain, expected = gradients(), sg.rollout(model, processor, prompts, 2, 8, 1.0, range(2))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert (gradients() - plain).norm() < 1e-5 * plain.norm()
    sampled = sg.rollout(model, processor, prompts, 2, 8, 1.0, range(2))
    assert same(sampled, expected) and not sampled.logps[0][0].requires_grad

def test_rounding_in_the_cumulative_sum_never_samples_a_banned_id(monkeypatch):
    logps = torch.log_softmax(torch.tensor([[0.0, -torch.inf, 2.0, 1.0]]), -1)
    for at in (1, 4):  # a parallel sum may rise where a probability is 0, or end too early
        monkeypatch.setattr(torch, "searchsorted", lambda cdf, values: torch.full((1, 1), at))
        assert sg.sample(logps, torch.tensor([0.5])).tolist() == [2 if at == 1 else 3]

@pytest.mark.parametrize("family", FAMILIES)
def test_fuzz_no_banned_id_is_ever_sampled(family, loaded):
    """A hot random model would emit image tokens and ids past the tokenizer."""
    model, processor = deepcopy(loaded[family][0]), loaded[family][1]
    with torch.no_grad():  # make the banned ids the likeliest of all
        model.get_input_embeddings().weight[processor.banned.to(model.device)] *= 5
    for seeds in (range(3), range(3, 6), range(6, 9)):
        sampled = sg.rollout(model, processor, prompts_of(processor), 8, 24, 5.0, seeds)
        assert not processor.banned[torch.cat(sum(sampled.ids, []))].any()
        assert torch.cat(sum(sampled.logps, [])).isfinite().all()
    assert processor.banned[len(processor.tokenizer):].all()
    assert processor.banned[processor.image_token] and not processor.banned[processor.eos].any()

def test_sampling_follows_the_models_distribution_and_not_its_generation_config(loaded):
    model, processor = loaded["qwen2_vl"]
    assert model.generation_config.top_k == 1  # as published: every completion the same
    prompt, n = processor.prompt("Hi"), 4000
    sampled = sg.rollout(model, processor, [prompt], n, 1, 0.7, [0])
    with torch.no_grad():
        logits = full_logits(model, prompt, torch.tensor([0]))[0].cpu()
    expected = torch.softmax(logits.masked_fill(processor.banned, -torch.inf) / 0.7, -1)
    observed = torch.bincount(torch.cat(sampled.ids[0]), minlength=len(expected)) / n
    assert ((observed - expected).abs() < 5 * (expected / n).sqrt() + 5 / n).all()

def test_either_eos_ends_a_completion_once_and_those_that_ended_disturb_no_other(small_model):
    model, processor = small_model
    with torch.no_grad():  # likelier ends, at different lengths
        model.lm_head.weight[processor.eos] *= 6
    prompts, ends = prompts_of(processor), Counter()
    sampled = sg.rollout(model, processor, prompts, 12, 40, 3.0, range(3))
    for ids, texts, logps in zip(*sampled):
        for own, text, logp in zip(ids, texts, logps):
            at = torch.isin(own, torch.tensor(processor.eos)).nonzero()[:, 0].tolist()
            assert at == [len(own) - 1] or at == [] and len(own) == 40
            assert "<|" not in text and len(logp) == len(own)
            ends[int(own[-1])] += 1
    assert_recorded_logps_are_naive(model, processor, prompts, sampled, 3.0)
    assert all(ends[eos] for eos in processor.eos)  # also the one that pads
    lengths = [[len(own) for own in group] for group in sampled.ids]
    _, mask = sg.completion_logps(model, processor, prompts, sampled.ids)
    assert len(set(sum(lengths, []))) > 3 and mask.sum(-1).tolist() == sum(lengths, [])

def test_two_images_of_one_size_are_paired_with_their_own_questions(any_model):
    model, processor = any_model
    prompts = [processor.prompt("Which?", [Image.new("RGB", (84, 56), colour)])
               for colour in ("red", "blue")]
    ids = random_ids(processor, [[4, 6]])
    with torch.no_grad():
        alone = [sg.completion_logps(model, processor, [prompt], ids)[0] for prompt in prompts]
        assert not torch.allclose(*alone, atol=1e-3)
        together = sg.completion_logps(model, processor, prompts, ids * 2)[0]
    assert torch.allclose(together, torch.cat(alone), atol=CLOSE)

def test_a_small_image_does_not_resize_the_later_ones(any_model):
    _, processor = any_model
    images = [noise_image(28, 28, 1), noise_image(300, 200, 2), noise_image(640, 480, 4)]
    alone = [processor.prompt("Hi", [image]) for image in images]
    mixed = processor.prompt("Hi", images)
    assert mixed.grids.tolist() == [prompt.grids[0].tolist() for prompt in alone]
    assert torch.equal(mixed.pixels, torch.cat([prompt.pixels for prompt in alone]))

def test_the_vision_tower_sees_each_image_once_per_group_and_not_once_per_completion(any_model):
    model, processor = any_model
    prompts, seen = prompts_of(processor), []
    patches = sum(len(prompt.pixels) for prompt in prompts[:2])
    with model.model.visual.register_forward_pre_hook(
            lambda module, args: seen.append(len(args[0]))), torch.no_grad():
        sampled = sg.rollout(model, processor, prompts, 4, 4, seeds=range(3))
        sg.completion_logps(model, processor, prompts, sampled.ids)
    assert seen == [patches, patches]

def test_images_of_any_mode_become_rgb_on_white_and_turned_photos_upright(tmp_path):
    for case in "RGB.png CMYK.jpg P.gif 1.png L.bmp LA.webp".split():
        noise_image(60, 40).convert(case.split(".")[0]).save(tmp_path / case)
        image = sg.load_image(tmp_path / case)
        assert image.mode == "RGB" and image.size == (60, 40)
    image = Image.new("RGBA", (60, 40), (255, 0, 0, 0))  # transparent but for the left half
    image.paste((0, 0, 255, 255), (0, 0, 30, 40))
    image.save(tmp_path / "image.png")
    found = sg.load_image(tmp_path / "image.png")
    assert found.getpixel((59, 0)) == (255, 255, 255) and found.getpixel((0, 0)) == (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown a quarter turn clockwise
    noise_image(100, 48).save(tmp_path / "turned.jpg", exif=exif)
    assert sg.load_image(tmp_path / "turned.jpg").size == (48, 100)

def test_max_pixels_holds_for_large_images_and_small_ones_work(checkpoints):
    for limit in (10_000, 400_000):
        _, processor = sg.load_model(
            checkpoints["qwen2_vl"], torch.device("cpu"), torch.float32, limit)
        for size in ((4000, 3000), (1, 1), (27, 29), (50, 40)):
            ids = processor.prompt("Hi", [Image.new("RGB", size)]).ids
            assert 1 <= (ids == processor.image_token).sum() <= max(4, limit // 784), size

class Strict(torch.utils._python_dispatch.TorchDispatchMode):
    """What a CUDA graph cannot hold raises: another device, or a question to the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves((args, kwargs, out)):
            if isinstance(x, torch.Tensor) and x.device.type != "meta":
                raise AssertionError(f"{function} touches {x.device}")
        if function.overloadpacket._qualified_op_name.removeprefix("aten::") in (
                "_local_scalar_dense", "nonzero", "is_nonzero", "masked_select"):
            raise AssertionError(f"{function} asks the device")
        return out

def test_the_captured_step_touches_one_device_and_asks_it_nothing_in_bf16_at_the_2b_shape():
    model, processor = speed.build("2B", torch.device("meta"), torch.bfloat16)
    prompts = [sg.Prompt(torch.zeros(40).long(), torch.arange(40).expand(3, 40), None, None)] * 2
    with torch.inference_mode():
        decoder = sg.Decoder(model, processor, prompts, torch.rand(2, 3, 16), 1.2)
        with Strict():
            decoder.step(16)
        with pytest.raises((AssertionError, RuntimeError)), Strict():
            decoder.ended.all().item()

def test_a_step_replaces_no_buffer_that_the_next_replay_reads(any_model):
    """A CUDA graph is bound to addresses."""
    model, processor = any_model

    def addresses():
        values = [*vars(decoder).values(), *sum(decoder.prompt_cache + decoder.own_cache, [])]
        return [value.data_ptr() for value in values if isinstance(value, torch.Tensor)]

    expected = sg.rollout(model, processor, prompts_of(processor), 2, 20, 0)
    with torch.inference_mode():
        decoder = sg.Decoder(model, processor, prompts_of(processor), torch.rand(3, 2, 20), 0)
        before = addresses()
        for _ in range(20):
            decoder.step(20)  # full length, as a graph
    assert addresses() == before and len(before) > 15 and int(decoder.c) == 20
    for ids, full in zip(sum(expected.ids, []), decoder.ids.T):
        assert ids.tolist() == full[:len(ids)].tolist()

def test_a_capture_that_fails_prints_one_line_and_decoding_goes_on(loaded, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", refuse)
    model, processor = loaded["qwen2_vl"]
    prompts = prompts_of(processor)
    expected = sg.rollout(model, processor, prompts, 1, 6, 0)
    with torch.inference_mode():
        decoder = sg.Decoder(model, processor, prompts, torch.rand(3, 1, 6), 0)
        decoder.step(1)
        assert not any(map(sg.capture(decoder, 6), range(2, 7)))
    assert re.fullmatch("no CUDA graph.*capturing\n", capsys.readouterr().out)
    assert [ids[0].tolist() for ids in expected.ids] == decoder.ids.T.tolist()

# ─── 4. Log-probs, objective, optimiser ───────────────────────────────────────────────────────────

@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logps_and_gradients_equal_one_forward_per_completion(any_model, temperature):
    model, processor = any_model
    prompts = prompts_of(processor)
    ids = random_ids(processor, [[7, 1, 4], [3, 9, 2], [5, 5, 1]])
    logps, mask = sg.completion_logps(model, processor, prompts, ids, temperature)
    naive = torch.zeros_like(logps)
    for b, own in enumerate(sum(ids, [])):
        naive[b, :len(own)] = naive_logps(model, processor, prompts[b // 3], own, temperature)
        assert mask[b].tolist() == [c < len(own) for c in range(9)]
    assert torch.allclose(logps, naive, atol=CLOSE)
    parameters = [p for p in model.parameters() if p.requires_grad]
    weight = torch.randn(logps.shape, generator=torch.Generator().manual_seed(0)).to(logps.device)
    ours, theirs = (torch.autograd.grad((x * weight).sum(), parameters, allow_unused=True)
                    for x in (logps, naive))
    assert [a is None for a in ours] == [b is None for b in theirs]
    assert (flat(ours) - flat(theirs)).norm() < CLOSE * flat(theirs).norm()

def test_inputs_of_every_function_of_the_method_are_unchanged(loaded):
    model, processor = loaded["qwen2_vl"]
    prompts, ids = prompts_of(processor), random_ids(processor, [[5, 2], [3, 3], [1, 6]])
    hidden, targets = torch.randn(5, 8), torch.tensor([0, 1, 2, 3, 4])
    table = [torch.randn(4, 6) for _ in range(3)] + [torch.randn(4), torch.rand(4, 6) > .3]
    rewards = torch.randn(2, 4)
    inputs = [*map(list, prompts), ids, processor.banned, hidden, targets, table, rewards]
    before = deepcopy(inputs)
    with torch.no_grad():
        sg.completion_logps(model, processor, prompts, ids)
        sg.rollout(model, processor, prompts, 2, 3)
        sg.token_logps(torch.nn.Linear(8, 7), hidden, targets, 0.7, torch.arange(7) == 6)
    sg.grpo_loss(*table)
    sg.group_advantages(rewards)
    assert same(inputs, before)

def test_token_logps_do_not_depend_on_the_chunk():
    head, hidden = torch.nn.Linear(8, 11), torch.randn(23, 8, requires_grad=True)
    targets, banned = torch.arange(23) % 10, torch.arange(11) == 10

    def with_gradients(logps):
        return logps, *torch.autograd.grad(logps.pow(2).sum(), [hidden, *head.parameters()])

    logps = torch.log_softmax((head(hidden) / 0.7)[:, :10], -1)
    naive = with_gradients(logps[torch.arange(23), targets])
    for chunk in (1, 5, 23, 512):
        found = with_gradients(sg.token_logps(head, hidden, targets, 0.7, banned, chunk))
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, naive))

def test_group_advantages_equal_a_naive_z_score():
    rewards = torch.tensor([[0., 1., 2.1, 1.], [0.03, 0., 0., 0.]])
    for row, found in zip(rewards.tolist(), sg.group_advantages(rewards).tolist()):
        mean = sum(row) / len(row)
        std = (sum((r - mean) ** 2 for r in row) / (len(row) - 1)) ** .5  # unbiased
        assert found == pytest.approx([(r - mean) / (std + 1e-4) for r in row], abs=1e-5)

def test_equal_rewards_give_exactly_zero_noise_stays_small_and_a_group_of_one_is_refused():
    assert not sg.group_advantages(torch.full((3, 4), 1.1)).any()
    assert not sg.group_advantages(torch.full((1, 7), 0.1) * 3).any()
    noise = 1 + 1e-7 * torch.tensor([[1., -1., 2., -2.]])
    assert sg.group_advantages(noise).abs().max() < 0.01  # with eps 1e-8 it would be 1.5
    for shape in ((3, 1), (4,), (0,)):  # the std of one is NaN
        with pytest.raises(ValueError, match="G ≥ 2"):
            sg.group_advantages(torch.zeros(shape))

def random_objective(seed=0, B=6, C=7):
    generator = torch.Generator().manual_seed(seed)
    logps, old, ref = (-2 + 0.4 * torch.randn(B, C, generator=generator) for _ in range(3))
    mask = torch.arange(C) < torch.tensor([[7], [1], [3], [5], [2], [7]])
    return logps, old, ref, torch.randn(B, generator=generator), mask

@pytest.mark.parametrize("clip, beta", [(0.2, 0.04), (0.1, 0.0), (0.5, 1.0)])
def test_loss_and_its_statistics_equal_a_naive_loop(clip, beta):
    logps, old, ref, A, mask = inputs = random_objective()
    expected = [0.0] * 4
    for i in range(len(A)):
        n, rows = int(mask[i].sum()), []
        for c in range(n):
            ratio = torch.exp(logps[i, c] - old[i, c]).item()
            bounded = min(max(ratio, 1 - clip), 1 + clip)
            kl = torch.exp(ref[i, c] - logps[i, c]).item() - (ref[i, c] - logps[i, c]).item() - 1
            gain = min(ratio * A[i].item(), bounded * A[i].item())
            rows.append((-(gain - beta * kl), kl, gain != ratio * A[i].item(), ratio))
        for j, column in enumerate(zip(*rows)):
            expected[j] += sum(column) / n / len(A)
    loss, stats = sg.grpo_loss(*inputs, clip, beta)
    found = [loss.item(), stats["kl"], stats["clip_fraction"], stats["ratio"]]
    assert found == pytest.approx(expected, abs=1e-5) and expected[2] > 0

@pytest.mark.parametrize("ratio, advantage, clipped", [
    (1.5, 1, True), (1.5, -1, False), (0.5, 1, False), (0.5, -1, True)])
def test_the_clip_takes_the_gradient_only_where_the_ratio_went_too_far(ratio, advantage, clipped):
    logps = torch.tensor([[ratio]]).log().requires_grad_()
    A = torch.tensor([float(advantage)])
    old = torch.zeros(1, 1)
    loss, stats = sg.grpo_loss(logps, old, old, A, torch.ones(1, 1), beta=0)
    loss.backward()
    assert stats["clip_fraction"] == float(clipped) and stats["ratio"] == pytest.approx(ratio)
    bounded = {1.5: 1.2, 0.5: 0.8}[ratio] if clipped else ratio
    assert loss.item() == pytest.approx(-bounded * advantage)
    assert bool(logps.grad.any()) is not clipped

def test_the_gradient_at_ratio_one_is_that_of_reinforce_and_the_loss_is_beta_times_kl():
    logps, _, ref, _, mask = random_objective()
    A = sg.group_advantages(torch.tensor([[0., 1., 2.], [1., 0., 0.]])).flatten()
    logps.requires_grad_()
    loss, _ = sg.grpo_loss(logps, logps.detach(), ref, A, mask, beta=0)
    (gradient,) = torch.autograd.grad(loss, logps)
    assert torch.allclose(gradient, -(A[:, None] * mask / mask.sum(1, keepdim=True)) / len(A))
    loss, stats = sg.grpo_loss(logps, logps.detach(), ref, A, mask, beta=0.04)
    assert loss.item() == pytest.approx(0.04 * stats["kl"], abs=1e-6)
    moved = [torch.where(mask, x, x - 1) for x in (logps, logps.detach(), ref)]  # padding
    assert sg.grpo_loss(*moved, A, mask)[0].item() == pytest.approx(loss.item())

REWARDS = [[0.0, 0.5, 2.0], [1.5, 2.0, 0.5], [0.5, 1.0, 0.0]]

def one_update(model, processor, rewards=REWARDS, reference=None, offload=False, **settings):
    """One update of `train` on completions and rewards of our choice → record, prompts, ids.

    A completion that is scored with the row of another question raises."""
    prompts, logged = prompts_of(processor), []
    sampled = sg.rollout(model, processor, prompts, 3, 10, 1.2, range(3))
    sampled = sampled._replace(texts=[[f"{q}, {g}" for g in range(3)] for q in range(3)])

    def score(text, row, cfg):
        reward = rewards[row][sampled.texts[row].index(text)]
        return dict.fromkeys(rep.SCORES, 0.0) | {"reward": reward}

    defaults = dict(warmup_steps=0, steps=1, questions=3, group_size=3, lr=1e-3, beta=0.0)
    run = SimpleNamespace(step=0, log=lambda name, record: logged.append(record),
                          end_update=lambda: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sg, "draw", lambda *args: [0, 1, 2])
        patch.setattr(sg, "make_prompt", lambda processor, row, cfg: prompts[row])
        patch.setattr(sg, "rollout", lambda *args: sampled)
        patch.setattr(sg, "score", score)
        patch.setattr(sg, "show", lambda *args, **more: None)
        sg.train(sg.Config(**defaults | settings), run, model, reference, processor, [],
                 sg.MasterAdamW(model, offload))
    return logged[0], prompts, sampled.ids

def test_each_question_is_scored_with_its_own_answer(small_model):
    rewards = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    record, *_ = one_update(*small_model, rewards)  # raises at a text of another question
    assert record["reward"] == pytest.approx(2 / 9) and record["flat_groups"] == 1

def test_the_warm_up_loss_is_the_mean_over_all_tokens_of_the_paths_and_one_eos(small_model):
    model, processor = small_model
    rows = [sg.Row("", "How many?", "4", a_path(steps=["x = 3"] * n), [], []) for n in (1, 4)]
    paths = [torch.tensor([*processor.text_ids(row.reference), processor.eos[0]]) for row in rows]
    prompt, logged = processor.prompt("How many?"), []
    with torch.no_grad():
        logps = [sg.completion_logps(model, processor, [prompt], [[ids]])[0] for ids in paths]
    run = SimpleNamespace(step=0, log=lambda name, record: logged.append(record),
                          end_update=lambda: None)
    cfg = sg.Config(warmup_steps=1, warmup_batch=2, micro_batch=1, instruction=False)
    sg.warm_up(cfg, run, model, processor, rows, sg.MasterAdamW(model))
    expected = -sum(x.sum() for x in logps) / sum(map(len, paths))
    assert logged[0]["loss"] == pytest.approx(expected.item())

def other_reference(model):
    reference = deepcopy(model)
    with torch.no_grad():
        reference.get_input_embeddings().weight.mul_(1.1)  # so that KL is not 0
    return reference

@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_gradient_and_log_are_means_over_all_completions_at_any_micro_batch(loaded, micro_batch):
    """Neither a mean of means nor of all tokens, and the log is not of the last micro-batch."""
    base, processor = loaded["qwen2_vl"]
    model, seen, clip = deepcopy(base), [], torch.nn.utils.clip_grad_norm_
    with torch.no_grad():
        model.lm_head.weight[processor.eos] *= 3  # different lengths
    naive, reference = deepcopy(model), other_reference(model)

    def spy(masters, limit):
        seen.extend(None if m.grad is None else m.grad.clone() for m in masters)
        return clip(masters, limit)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
        record, prompts, ids = one_update(model, processor, reference=reference, beta=0.5,
                                          micro_batch=micro_batch)
    assert len({len(own) for own in sum(ids, [])}) > 1
    A, gain, kl = sg.group_advantages(torch.tensor(REWARDS)), 0, 0
    for q, g in itertools.product(range(3), range(3)):
        logps, ref = (naive_logps(policy, processor, prompts[q], ids[q][g], 1.2)
                      for policy in (naive, reference.requires_grad_(False)))
        gain = gain + A[q, g].item() * logps.mean() / 9
        kl = kl + (torch.exp(ref - logps) - (ref - logps) - 1).mean() / 9
    (0.5 * kl - gain).backward()
    expected = [p.grad for p in naive.parameters()]
    assert [a is None for a in seen] == [b is None for b in expected]
    assert (flat(seen) - flat(expected)).norm() < 10 * CLOSE * flat(expected).norm()
    logged = [record[name] for name in ("kl", "loss", "grad_norm", "ratio")]
    worked = [kl.item(), 0.5 * kl.item(), flat(expected).norm().item(), 1]
    assert logged == pytest.approx(worked, rel=1e-3, abs=1e-5) and worked[0] > 1e-3

def test_flat_groups_give_zero_gradients_are_counted_and_kl_still_pulls(small_model):
    model, processor = small_model
    fresh = deepcopy(model)
    record, *_ = one_update(model, processor, [[1.1] * 3] * 3)
    assert record["grad_norm"] == 0 and record["loss"] == 0 and record["flat_groups"] == 3
    assert torch.equal(flat_weights(model), flat_weights(fresh))
    record, *_ = one_update(fresh, processor, [[1.1] * 3] * 3, other_reference(fresh), beta=0.1)
    assert 0 < record["grad_norm"] < 1e3 and torch.isfinite(flat_weights(fresh)).all()

def test_ids_are_kept_end_to_end_where_encoding_the_text_again_would_change_them(small_model):
    model, processor = small_model
    record, _, ids = one_update(model, processor)
    texts = [processor.tokenizer.decode(own, skip_special_tokens=True) for own in sum(ids, [])]
    assert any([*processor.text_ids(x)] != own.tolist() for x, own in zip(texts, sum(ids, [])))
    assert record["sampling_gap"] < 1e-5 and record["ratio"] == pytest.approx(1, abs=1e-6)

def test_one_step_at_lr_1e_6_moves_the_fp32_masters_of_bf16_weights(small_model):
    model, processor = small_model
    optimizer = sg.MasterAdamW(model.bfloat16())
    ids = random_ids(processor, [[4, 6, 8]] * 3)
    sg.completion_logps(model, processor, prompts_of(processor), ids)[0].sum().backward()
    assert all(p.grad is None for p in model.parameters())  # moved to the masters as they came
    before = [(m, m.clone(), m.grad != 0) for m in optimizer.masters if m.grad is not None]
    optimizer.step(1e-6)
    moved = torch.cat([(new != old)[live] for new, old, live in before])
    assert moved.float().mean() > 0.99 and len(moved) > 10_000
    assert all(torch.equal(p, m.bfloat16()) for p, m in zip(model.parameters(), optimizer.masters))

def test_bf16_updates_add_up_and_a_dropped_optimiser_frees_its_masters():
    linear = torch.nn.Linear(4, 4, bias=False).bfloat16()
    torch.nn.init.constant_(linear.weight, 0.01)
    optimizer, start = sg.MasterAdamW(linear), linear.weight.detach().clone()
    for _ in range(300):  # each step alone is lost in bf16, their sum is not
        linear(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
        optimizer.step(1e-6)
    assert (linear.weight - start).float().mean().item() == pytest.approx(-3e-4, rel=0.15)
    alive = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert alive() is None  # its hooks stay with the parameters: they must not hold 26 GB

def test_master_adamw_equals_torchs_adamw_with_clipped_gradients_also_offloaded():
    for offload in (False, True):
        ours, theirs = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
        theirs.load_state_dict(ours.state_dict())
        optimizer = sg.MasterAdamW(ours, offload)
        adamw = torch.optim.AdamW(theirs.parameters(), weight_decay=0.0)
        for step in range(5):
            x = torch.randn(7, 5, generator=torch.Generator().manual_seed(step))
            for part in x.split(3):  # gradients of micro-batches add up
                ours(part).pow(2).sum().backward()
            theirs(x).pow(2).sum().backward()
            expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0).item()
            adamw.param_groups[0]["lr"] = 0.1 / (step + 1)
            adamw.step()
            adamw.zero_grad()
            assert optimizer.step(0.1 / (step + 1)) == pytest.approx(expected, rel=1e-5)
        assert torch.allclose(flat_weights(ours), flat_weights(theirs), atol=1e-6)

def test_two_inner_updates_differ_from_one_and_only_then_the_clip_acts(loaded):
    base, processor = loaded["qwen2_vl"]
    results = []
    for inner, clip in ((1, 0.2), (2, 0.2), (2, 0.9)):
        model = deepcopy(base)
        record, *_ = one_update(model, processor, lr=5e-3, inner_updates=inner, clip=clip)
        results.append((flat_weights(model), record))
    (one, first), (two, second), (wide, _) = results
    assert first["clip_fraction"] == 0 and first["ratio"] == pytest.approx(1, abs=1e-5)
    assert second["clip_fraction"] > 0.05
    assert not torch.allclose(one, two) and not torch.equal(two, wide)

def test_log_probs_of_sampling_and_update_that_differ_stop_the_run_before_a_step(small_model):
    """A cache that is wrong on purpose: keys of the completions are never written."""
    model, processor = small_model
    before, real = flat_weights(model), torch.Tensor.index_copy_
    with pytest.MonkeyPatch.context() as patch, pytest.raises(sg.UserError, match="--device cpu"):
        patch.setattr(torch.Tensor, "index_copy_", lambda x, dim, *more: (
            x if x.dim() == 5 else real(x, dim, *more)))
        one_update(model, processor)
    assert torch.equal(flat_weights(model), before)

# ─── 5. Training: loop, run folder, stop and resume ───────────────────────────────────────────────

class Killed(BaseException):
    """What kill -9 is to the run: nothing of it is caught."""

def killed(*args, **kwargs):
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
        name = f"{part}/model.safetensors"
        assert (a / name).read_bytes() == (b / name).read_bytes()
    states = (torch.load(run / "state.pt", weights_only=True) for run in (a, b))
    assert same(*(state | {"sizes": None} for state in states))  # of logs that hold seconds
    assert not [file for file in b.iterdir() if file.name.endswith(".new")]

def test_a_run_trains_and_logs_every_update(straight):
    rows = metrics(straight)
    assert [(row["phase"], row["step"]) for row in rows] == [
        *(("warm-up", step) for step in (1, 2)), *(("StepGRPO", step) for step in (1, 2, 3, 4))]
    warm, rl = rows[:2], rows[2:]
    assert warm[0]["lr"] > warm[1]["lr"] > 0 and all(row["loss"] > 0 for row in warm)
    assert [row["lr"] for row in rl] == pytest.approx([1e-3 * (1 - step / 4) for step in range(4)])
    assert rl[0]["kl"] == pytest.approx(0, abs=1e-6) and rl[3]["kl"] > 1e-7
    for row in rl:
        assert row["loss"] == pytest.approx(0.01 * row["kl"], abs=1e-5) and row["grad_norm"] > 0
        assert row["ratio"] == pytest.approx(1, abs=1e-5) and row["clip_fraction"] == 0
        assert row["sampling_gap"] < 1e-5 and row["length"] <= 8
    reference, policy = (load_file(straight / part / "model.safetensors")
                         for part in ("reference", "checkpoint"))
    assert any(not torch.equal(reference[name], policy[name]) for name in policy)
    saved = json.loads((straight / "config.json").read_text())
    assert set(saved) == {f.name for f in fields(sg.Config)} and saved["steps"] == 4
    samples = records(straight / "samples.jsonl")
    assert [row["step"] for row in samples] == [1, 3] and Path(samples[0]["images"][0]).is_file()
    for row in samples:
        rewards = torch.tensor([[c["reward"] for c in row["completions"]]])
        A = sg.group_advantages(rewards)[0].tolist()
        assert [c["advantage"] for c in row["completions"]] == pytest.approx(A) and len(A) == 2
    assert {file.name for file in straight.iterdir()} == {
        "config.json", "metrics.jsonl", "samples.jsonl", "state.pt", "checkpoint", "reference",
        "report.html"}

def test_a_run_is_repeated_by_its_seed_and_differs_by_another(straight, shapes_set, tmp_path):
    with varied_rewards():
        assert run_main(*run_flags(tmp_path / "again", shapes_set)) == 0
        assert run_main(*run_flags(tmp_path / "other", shapes_set, seed=1, steps=1)) == 0
    assert_same_run(straight, tmp_path / "again")
    assert metrics(tmp_path / "other")[0] != metrics(straight)[0]

def test_each_seed_draws_weights_of_its_own(shapes_set, tmp_path):
    runs = [sg.parse_config(run_flags(tmp_path / name, shapes_set, seed=int(name[0])))
            for name in ("0", "0 again", "1")]
    a, b, c = (sg.set_up(cfg, sg.Run(cfg))[0].lm_head.weight for cfg in runs)
    assert torch.equal(a, b) and not torch.equal(a, c)

@pytest.mark.parametrize("phase, step, number", [
    ("StepGRPO", 3, signal.SIGINT), ("warm-up", 1, signal.SIGTERM), ("warm-up", 2, signal.SIGHUP)])
def test_stop_and_resume_go_on_with_the_same_curve_bit_for_bit(phase, step, number, straight,
                                                               shapes_set, tmp_path, capsys):
    out = tmp_path / "run"
    with varied_rewards():
        with at_log(phase, step, lambda: os.kill(os.getpid(), number)):
            assert run_main(*run_flags(out, shapes_set)) == 130
        assert f"--resume --out {out}" in capsys.readouterr().out
        last = metrics(out)[-1]
        assert (last["phase"], last["step"]) == (phase, step)  # not one update more
        assert AutoModelForImageTextToText.from_pretrained(out / "checkpoint")  # and it is saved
        assert run_main("--resume", "--out", out) == 0
    assert_same_run(straight, out)

@pytest.mark.parametrize("moment", (2, 9, 16, 23, 45))
def test_kill_9_at_any_moment_and_resume_lose_nothing(moment, straight, shapes_set, tmp_path):
    """Before a file is put in place, half-written, between two files, while --resume opens the
    folder: killed three times in a row, the run ends as if nothing had been."""
    out, calls = tmp_path / "run", [0]

    def dying(function):
        def call(*args, **kwargs):
            calls[0] += 1
            if calls[0] % moment == 0:
                if function is torch_save:
                    args[1].write_bytes(b"half a file")
                raise Killed
            return function(*args, **kwargs)
        return call

    torch_save = torch.save
    with varied_rewards():
        flags = run_flags(out, shapes_set)
        for _ in range(3):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sg.fcntl, "flock", lambda *args: None)  # this process lives on
                for owner, name in ((os, "replace"), (torch, "save"), (os, "fsync"),
                                    (shutil, "rmtree"), (sg.Run, "log")):
                    patch.setattr(owner, name, dying(getattr(owner, name)))
                with contextlib.suppress(Killed):
                    run_main(*flags)
            if (out / "config.json").exists():
                flags = ["--resume", "--out", out]
            gc.collect()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sg.fcntl, "flock", lambda *args: None)
            assert run_main(*flags) == 0
    assert_same_run(straight, out)

def test_draw_uses_every_row_once_per_epoch():
    rows = list(range(7))
    stream = [row for step in range(7) for row in sg.draw(rows, 3, 5, step)]
    assert [sorted(stream[i:i + 7]) for i in (0, 7, 14)] == [rows] * 3
    assert stream[:7] != stream[7:14]
    assert sg.draw(rows, 3, 6, 0) != stream[:3]

def test_resume_of_a_finished_run_changes_nothing(straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").glob("*.jsonl")}
    assert run_main("--resume", "--out", tmp_path / "run") == 0
    assert_same_run(straight, tmp_path / "run")
    assert before == {file: file.stat().st_mtime_ns for file in before}

def test_other_settings_or_other_data_on_resume_are_one_line(straight, shapes_set, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    for flag in ("--lr=0.5", "--model=R1-VL-2B", "--seed=7", "--group-size=4"):
        refused = run_main("--resume", "--out", out, flag)
        assert f"{flag.split('=')[0]} cannot change on --resume" in refused
    assert "no run" in run_main("--resume", "--out", tmp_path / "absent")
    assert run_main("--resume", "--out", out, "--micro_batch", 1) == 0
    saved = json.loads((out / "config.json").read_text())
    rows = json.loads((shapes_set / "train.json").read_text())
    other = tmp_path / "train.json"
    other.write_text(json.dumps([row | {"image_path": str(shapes_set / row["image_path"])}
                                 for row in rows[1:]]))
    (out / "config.json").write_text(json.dumps(saved | {"data": str(other)}))
    assert "the data are not those" in run_main("--resume", "--out", out)

def test_resume_restores_the_masters_of_bf16_weights(shapes_set, tmp_path):
    model = sg.from_shapes("tiny")  # as a folder, so that it is not made anew in fp32
    flags, load = dict(lr=1e-5, warmup_steps=0, model=model), sg.load_model
    with varied_rewards(), pytest.MonkeyPatch.context() as patch:  # as on CUDA
        patch.setattr(sg, "load_model", lambda name, device, dtype, pixels: load(
            name, device, torch.bfloat16, pixels))
        for name in ("whole", "run"):
            with at_log("StepGRPO", 3) if name == "run" else contextlib.nullcontext():
                run_main(*run_flags(tmp_path / name, shapes_set, **flags))
        assert run_main("--resume", "--out", tmp_path / "run") == 0
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "run")

def test_a_line_separator_in_a_sampled_text_does_not_shift_the_logs_on_resume(shapes_set, tmp_path):
    """str.splitlines also cuts at U+2028 and U+0085, which stand unescaped in the JSON."""
    out, rollout = tmp_path / "run", sg.rollout

    def separated(*args):
        sampled = rollout(*args)
        return sampled._replace(texts=[["a\u2028b\x85c" + x for x in xs] for xs in sampled.texts])

    with varied_rewards(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sg, "rollout", separated)
        with at_log("StepGRPO", 3):
            assert run_main(*run_flags(out, shapes_set)) == 130
        before = records(out / "samples.jsonl")
        assert run_main("--resume", "--out", out) == 0
    assert "\u2028" in before[0]["completions"][0]["text"]
    assert records(out / "samples.jsonl") == before and len(before) == 2

def test_a_stop_during_an_evaluation_goes_on_where_it_was(shapes_set, tmp_path):
    flags = dict(held_out=2, steps=3)
    with varied_rewards():
        assert run_main(*run_flags(tmp_path / "whole", shapes_set, **flags)) == 0
        for phase in ("before", "after"):
            out, evaluate = tmp_path / phase, sg.evaluate

            def stop(*args):
                if args[-1] == phase:
                    ctrl_c()
                return evaluate(*args)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sg, "evaluate", stop)
                assert run_main(*run_flags(out, shapes_set, **flags)) == 130
            for _ in range(2):  # the second time the run is at its end
                assert run_main("--resume", "--out", out) == 0
                assert_same_run(tmp_path / "whole", out)

def test_without_updates_nothing_is_evaluated_twice(shapes_set, tmp_path):
    assert run_main(*run_flags(tmp_path, shapes_set, held_out=2, steps=0)) == 0
    assert [row["name"].split(",")[0] for row in metrics(tmp_path)[2:]] == ["before", "before"]

def test_ctrl_c_in_a_terminal_saves_and_a_second_run_is_refused(shapes_set, tmp_path):
    """The real thing: a process of its own, interrupted once its log shows an update."""
    out = tmp_path / "run"
    flags = run_flags(out, shapes_set, steps=10_000, save_every=10_000, warmup_steps=0)
    process = subprocess.Popen([sys.executable, str(HERE / "stepgrpo.py"), *flags],
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log, deadline = out / "metrics.jsonl", time.monotonic() + 120
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    assert "is in use" in run_main("--resume", "--out", out)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert f"--resume --out {out}" in printed and "Traceback" not in printed
    assert torch.load(out / "state.pt", weights_only=True)["step"] == len(metrics(out)) > 0

def test_an_existing_folder_is_never_overwritten(straight, shapes_set, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    assert "--resume" in run_main(*run_flags(out, shapes_set))
    assert_same_run(straight, out)
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").write_text("years of work")
    assert "not empty" in run_main(*run_flags(tmp_path / "papers", shapes_set))
    assert (tmp_path / "papers" / "thesis.tex").read_text() == "years of work"

def test_a_run_that_failed_before_training_does_not_block_the_next_one(shapes_set, tmp_path):
    """The user mends what the message names, and the same command works."""
    out, flags = tmp_path / "run", dict(warmup_steps=0, steps=1)
    assert "absent.json" in run_main(*run_flags(out, shapes_set, data="absent.json", **flags))
    assert run_main(*run_flags(out, shapes_set, **flags)) == 0

@pytest.mark.parametrize("make", [
    lambda out: (out / "state.pt").write_bytes((out / "state.pt").read_bytes()[:2000]),
    lambda out: torch.save({"step": 3}, out / "state.pt"),
    lambda out: (out / "state.pt").write_bytes(b""),
    lambda out: (out / "config.json").write_text('{"model": "ti'),
    lambda out: (out / "config.json").write_text('{"unknown": 1}'),
    lambda out: (out / "reference" / "tokenizer.json").unlink(),
    lambda out: (out / "reference" / "config.json").write_text("{"),
    lambda out: (out / "reference" / "model.safetensors").write_bytes(b"torn"),
])
def test_a_damaged_run_folder_is_one_line_that_names_the_file(make, straight, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    make(out)
    refused = run_main("--resume", "--out", out)
    assert str(out) in refused and len(refused) < 600 and refused.count("\n") == 0

def test_a_full_disk_is_one_line_and_the_last_state_stands(straight, shapes_set, tmp_path):
    """A limit on the size of files stands for the full disk: the same write fails."""
    out = tmp_path / "run"
    with varied_rewards():
        with at_log("StepGRPO", 3, killed), pytest.raises(Killed):
            run_main(*run_flags(out, shapes_set))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
        try:
            refused = run_main("--resume", "--out", out)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert isinstance(refused, str) and "stepgrpo:" in refused and "\n" not in refused
        assert run_main("--resume", "--out", out) == 0
    assert_same_run(straight, out)
    (tmp_path / "file").write_text("")
    for where in (tmp_path / "file", tmp_path / "file" / "run"):
        assert "stepgrpo:" in run_main(*run_flags(where, shapes_set))

def test_out_of_memory_says_what_to_try(shapes_set, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more")

    monkeypatch.setattr(sg, "completion_logps", full)
    refused = run_main(*run_flags(tmp_path / "run", shapes_set))
    assert "--micro-batch 1" in refused and "and more" not in refused

@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_non_finite_loss_stops_before_the_update(value, straight, shapes_set, tmp_path):
    out, losses, loss = tmp_path / "run", [], sg.grpo_loss

    def bad(*args):
        losses.append(1)
        good, stats = loss(*args)
        return good * float(value) if len(losses) == 3 else good, stats

    with varied_rewards():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sg, "grpo_loss", bad)
            assert "learning rate" in run_main(*run_flags(out, shapes_set))
        assert torch.load(out / "state.pt", weights_only=True)["step"] == 4
        assert run_main("--resume", "--out", out) == 0
    assert_same_run(straight, out)

def test_a_page_that_cannot_be_written_is_a_warning(straight, shapes_set, tmp_path, capfd):
    out = tmp_path / "run"
    with varied_rewards(), at_log("StepGRPO", 4, lambda: (out / "report.html.new").mkdir()):
        assert run_main(*run_flags(out, shapes_set)) == 0
    (out / "report.html.new").rmdir()
    assert "report: " in capfd.readouterr().err
    assert_same_run(straight, out)

@pytest.mark.parametrize("reward, expected", [
    ("step", 2.1), ("outcome", 1), ("accuracy", 1.1), ("validity", 1)])
def test_each_reward_of_the_control_experiments(reward, expected):
    row = sg.Row("", "", "4", a_path(), [["x = 3"], ["y = 4"]], [])
    found = sg.score(a_path(), row, sg.Config(reward=reward))
    assert found["reward"] == pytest.approx(expected)
    assert [found[name] for name in rep.SCORES] == pytest.approx([1, 1.1, 1, 1])

def test_the_group_whose_rewards_differ_most_is_shown_and_logged(capsys):
    logged = []
    run = SimpleNamespace(log=lambda name, record: logged.append(record))
    cfg = sg.Config(steps=9, show_every=2)
    batch = [sg.Row(f"row {q}", f"question {q}", "4", "", [], []) for q in range(3)]
    names = "reward", *rep.SCORES
    scores = [[dict.fromkeys(names, r) for r in group] for group in ([1, 1], [0, 2], [0, 1])]
    record = dict.fromkeys(("step", "reward", "right", "k", "step_validity", "kl", "length",
                            "flat_groups", "seconds"), 1)
    texts = [["a", "b"], ["worst", "best"], ["c", "d"]]
    rewards = torch.tensor([[1., 1], [0, 2], [0, 1]])
    sg.show(cfg, run, record, batch, texts, scores, rewards, sg.group_advantages(rewards))
    assert logged[0]["problem"] == "question 1" and len(logged[0]["completions"]) == 2
    printed = capsys.readouterr().out
    assert printed.index("best") < printed.index("worst") and "question 1" in printed
    assert max(map(len, printed.split("\n"))) <= 100
    sg.show(cfg, run, record | {"step": 2}, batch, texts, scores, None, None)
    assert len(logged) == 1

def test_defaults_are_the_papers_and_tiny_is_a_preset():
    cfg = sg.parse_config(["--model", "Qwen2-VL-2B"])
    assert (cfg.questions, cfg.group_size, cfg.temperature, cfg.max_new_tokens) == (4, 4, 1.2, 1024)
    assert (cfg.alpha, cfg.beta, cfg.lr, cfg.inner_updates) == (0.1, 0.04, 1e-6, 1)
    assert cfg.out == "runs/Qwen2-VL-2B" and cfg.instruction and len(fields(cfg)) <= 30
    tiny = sg.parse_config([])
    assert all(getattr(tiny, name) == value for name, value in sg.TINY.items())
    for form in (["--warmup-steps", "7"], ["--warmup_steps", "7"], ["--warmup-steps=7"]):
        assert sg.parse_config(form).warmup_steps == 7
    assert sg.parse_config(["--instruction"]).instruction and not tiny.instruction

@pytest.mark.parametrize("flags", [
    "--group-size 1", "--temperature 0", "--temperature 1e-30", "--alpha inf", "--alpha nan",
    "--lr -1", "--questions 1000000000", "--seed -1", "--seed 99999999999999999999",
    "--device meta", "--device cuda:99", "--clip -1", "--max-pixels 100", "--steps -2"])
def test_impossible_flags_are_one_line(flags, shapes_set, tmp_path):
    refused = run_main(*run_flags(tmp_path / "run", shapes_set), *flags.split())
    assert refused.startswith("stepgrpo: --" + flags.split()[0][2:]) and "\n" not in refused

@pytest.mark.parametrize("flags", ["--stepz 3", "--step 3", "steps", "--reward best", "--lr a"])
def test_unknown_flags_are_errors(flags, capsys):
    with pytest.raises(SystemExit):
        sg.parse_config(flags.split())
    assert "error" in capsys.readouterr().err

@pytest.mark.parametrize("model, message", [
    ("Qwen2-VL-3B", "Qwen2-VL-2B"), ("no/such", "no/such"), ("EMPTY", "EMPTY"), ("llama", "llama")])
def test_a_model_that_cannot_be_had_is_one_line(model, message, checkpoints, shapes_set):
    Path("EMPTY").mkdir()
    shutil.copytree(checkpoints["qwen2_vl"], "llama")
    config = json.loads(Path("llama/config.json").read_text())
    Path("llama/config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    refused = run_main(*run_flags("run", shapes_set, model=model, warmup_steps=0))
    assert message in refused and "cannot load" in refused and "\n" not in refused

@pytest.mark.parametrize("data, expected", [("shapes", 6), ("data/shapes/train.json", 13125)])
def test_steps_default_to_one_pass_over_the_shapes_and_else_to_the_official_number(
        data, expected, shapes_set, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sg, "HERE", tmp_path)
    Path("data").mkdir()
    Path("data/shapes").symlink_to(shapes_set)
    cfg = sg.Config(data=data, warmup_steps=0, questions=4, held_out=2, instruction=False,
                    out="run", device="cpu")
    sg.set_up(cfg, sg.Run(cfg))
    assert cfg.steps == expected and f"{expected} of StepGRPO" in capsys.readouterr().out

# ─── 6. Data ──────────────────────────────────────────────────────────────────────────────────────

PATH = a_path()

@pytest.fixture
def folder(tmp_path):
    for name in "abc":
        Image.new("RGB", (30, 30), "red").save(tmp_path / f"{name}.png")
    return tmp_path

def read(folder, *records, name="rows.json", **more):
    file = folder / name
    lines = name.endswith(".jsonl")
    file.write_text("\n".join(map(json.dumps, records)) if lines else json.dumps(records))
    return sg.read_rows(str(file), **more)

def ask_four(**more):
    return {"problem": "How many?", "solution": "4", **more}

def chat(question, **more):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": PATH}]
    return {"messages": turns, "images": "a.png", **more}

R1 = ask_four(solution=PATH, image_path="a.png", key_steps={"Steps": [["x = 3"]]})
CHAT = chat("<image>How many?")
SHAREGPT = {"conversations": [{"from": "human", "value": "<image>How many?"},
                              {"from": "gpt", "value": PATH}], "image": ["a.png"]}

@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize("record", [
    R1, CHAT, SHAREGPT, *(ask_four(solution=PATH, **{x: "a.png"}) for x in ("image", "picture"))])
def test_the_usual_formats_and_names_of_the_image_are_read(record, name, folder):
    (row,), complaints = read(folder, record, name=name)
    assert not complaints and row.problem == "How many?" and row.answer == "4"
    assert row.reference == PATH
    assert row.images == [(folder / "a.png").resolve()] and name in row.where

def test_windows_lines_a_mark_and_the_instruction_around_a_question(folder):
    wrapped = "<image>" + sg.build_instruction("What is 3 + 4?").replace("\n", "\r\n")
    file = folder / "rows.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(chat(wrapped)).encode() + b"\r\n\r\n")
    (row,), complaints = sg.read_rows(str(file))
    assert not complaints and row.problem == "What is 3 + 4?"

@pytest.mark.parametrize("question", [
    "What is 3 + 4?\nEnd with:\n### The final answer is: 12",
    "Generate an image description based on the question.\nWhat is 3 + 4?"])
def test_a_question_that_holds_a_part_of_the_instruction_is_kept_whole(question, folder):
    (row,), complaints = read(folder, {"problem": question, "solution": "7"})
    assert row.problem == question and not complaints

def test_images_inside_the_text_keep_their_places(folder):
    inside, before = "Is <image> or <image> larger?", "<image>\n<image> Which?"
    files = ["a.png", "b.png"]
    rows, _ = read(folder, *(ask_four(problem=x, images=files) for x in (inside, before)))
    assert [row.problem for row in rows] == [inside, "Which?"] and len(rows[0].images) == 2

@pytest.mark.parametrize("solution, answer", [
    (4.5, "4.5"), (True, "True"), ("<answer> 4 </answer>", "4"), ("#### 4", "4"), ("ans: 4", "4"),
    ("So it is 4.\nThe answer is: 4", "4"), ("<think>1 or 4?</think><answer>(C)</answer>", "(C)"),
    ("\\text{So} it is \\boxed{\\frac{\\sqrt{3}}{2}}.", "\\frac{\\sqrt{3}}{2}"), (PATH, "4")])
def test_reference_answers_are_read_and_can_be_met(solution, answer, folder):
    (row,), complaints = read(folder, {"problem": "How many?", "solution": solution})
    assert row.answer == answer and not complaints
    assert sg.step_accuracy_reward(a_path(answer=answer), row.answer, [["x = 3"]]) > 1

BAD = {
    "no object": 5, "no problem": {"solution": "4"}, "no solution": {"problem": "?"},
    "null": ask_four(problem=None), "none": ask_four(solution=None), "five": {"messages": 5},
    "nan": ask_four(solution=float("nan")), "list": ask_four(solution=["4"]),
    "empty": ask_four(solution="**"), "prose": ask_four(solution="We add.\nSo four."),
    "no answer": R1 | {"solution": "### Step 1:\nx = 3"}, "empty question": chat("<image>"),
    "two marks": chat("<image><image>How many?"), "mark": ask_four(problem="<image>How many?"),
    "no file": R1 | {"image_path": "z.png"}, "one turn": {"messages": CHAT["messages"][:1]},
    "dict": R1 | {"image_path": {"bytes": "x"}}, "null image": R1 | {"image_path": [None]},
    "turns": CHAT | {"messages": CHAT["messages"] * 2},
    "system": CHAT | {"messages": [{"role": "system", "content": "Be brief."}, *CHAT["messages"]]},
    "null turn": {"messages": [None, CHAT["messages"][1]]}, "null text": chat(None),
    "other name": ask_four(img_file="z.png"), "number": ask_four(image=[5]),
    "emoji": ask_four(problem="\ud83d?"), "key steps": R1 | {"key_steps": [["x = 3"], [5]]}}

@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_by_file_and_row_and_the_others_are_read(name, folder):
    rows, (complaint,) = read(folder, R1, BAD[name], R1)
    assert len(rows) == 2 and "rows.json row 2: " in complaint and len(complaint) < 400

def test_lines_that_are_no_json_are_bad_rows(folder):
    file = folder / "rows.jsonl"
    file.write_text("\n".join(['{"torn', "[" * 100_000, json.dumps(R1), "9" * 5000 + "x"]))
    rows, complaints = sg.read_rows(str(file))
    named = [complaint.split(":")[0][-5:] for complaint in complaints]
    assert len(rows) == 1 and named == ["row 1", "row 2", "row 4"]
    with pytest.raises(sg.UserError, match="rows.jsonl.gz"):
        (folder / "rows.jsonl.gz").write_bytes(gzip.compress(file.read_bytes()))
        sg.read_rows(str(folder / "rows.jsonl.gz"))
    for text in ("[" * 100_000, "5", "{", ""):
        (folder / "rows.json").write_text(text)
        with pytest.raises(sg.UserError, match="rows.json"):
            sg.read_rows(str(folder / "rows.json"))
    with pytest.raises(sg.UserError, match="absent.json"):
        sg.read_rows("absent.json")

def test_all_bad_rows_are_reported_at_once_before_training(folder, shapes_set, tmp_path):
    (folder / "fake.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    data, out = folder / "rows.json", tmp_path / "run"
    rows = [R1, BAD["turns"], R1 | {"image_path": "fake.png"}, R1 | {"problem": "why? " * 3000}]
    data.write_text(json.dumps([*rows, ask_four(), R1 | {"image_path": "."}]))
    refused = run_main(*run_flags(out, shapes_set, data=data, warmup_steps=0))
    assert [f"row {n}:" in refused for n in range(1, 7)] == [False, True, True, True, True, True]
    assert "max-prompt-tokens" in refused and "key_steps" in refused and not any(out.iterdir())

def test_held_out_questions_are_never_trained_on_and_bad_splits_are_one_line(folder):
    rows = [R1 | {"problem": f"How many {n}?"} for n in range(40)]
    chats = [chat(f"<image>How many {n}?") for n in range(50)]
    chats[0]["messages"][1] = {"role": "assistant", "content": PATH.replace("x = 3", sg.REFLECTIVE)}
    files = [folder / "rows.json", folder / "chats.json"]
    for file, records in zip(files, (rows, chats)):
        file.write_text(json.dumps(records))
    cfg = sg.Config(data=str(files[0]), warmup_data=str(files[1]), held_out=4)
    train, warmup, test, complaints = sg.load_data(cfg)
    asked = {row.problem for row in test}
    assert len(asked) == 4 and len(train) == 36 and not complaints
    assert not asked & {row.problem for row in train + warmup} and len(warmup) in (45, 46)
    cfg.held_out = 5
    assert "--held-out" in sg.load_data(cfg)[3][0]

def test_a_reference_that_misses_its_own_key_steps_is_said(folder, capsys):
    rows = [R1, R1 | {"key_steps": [["never said"]]}]
    (folder / "rows.json").write_text(json.dumps(rows))
    sg.load_data(sg.Config(data=str(folder / "rows.json"), warmup_steps=0, held_out=0))
    assert "1 reference paths miss some of their key steps, the first:" in capsys.readouterr().out

def test_every_shapes_row_earns_all_and_a_dump_two_of_three(shapes_set):
    rows, complaints = sg.read_rows(str(shapes_set / "train.json"))
    assert len(rows) == 24 and not complaints
    for row in rows:
        truth = row.answer, row.key_steps
        assert sg.step_accuracy_reward(row.reference, *truth, reference=row.reference) == 1.1
        assert sg.step_validity_reward(row.reference) == 1 and len(row.key_steps) == 3
        dump = "### Step 1:\n" + ", ".join(group[0] for group in row.key_steps)
        assert sg.match_key_steps(dump, row.key_steps, row.reference) == pytest.approx(2 / 3)

def test_shapes_are_the_same_for_the_same_seed_and_held_out_images_occur_nowhere_else(
        shapes_set, tmp_path):
    for seed in (0, 1):
        draw_shapes(tmp_path / str(seed), seed)
        again = (tmp_path / str(seed) / "train.json").read_bytes()
        assert (again == (shapes_set / "train.json").read_bytes()) == (seed == 0)
    images = {split: {file.read_bytes() for file in (shapes_set / "images").glob(f"{split}_*.png")}
              for split in ("train", "test", "warmup")}
    assert images["test"] and not images["test"] & (images["train"] | images["warmup"])

# ─── 7. data/key_steps.py ─────────────────────────────────────────────────────────────────────────

def steps_of(*steps):
    numbered = "".join(f"### Step {n}:\n{step}\n" for n, step in enumerate(steps, 1))
    return (f"### Image Description:\nA picture.\n### Rationales:\nWhy.\n"
            f"### Let's think step by step.\n{numbered}### The final answer is:\n7")

def by_rule(path):
    with contextlib.suppress(ks.RowError):  # for a path without key steps
        return ks.by_rule(sg.Row("row", "", "", path, [], []), None)
    return []

@pytest.mark.parametrize("case", """
log_2 8 = 3 → 8 = 3; \\log_2 8 = 3 → 2 8 = 3; sin 30° = 0.5 → 30° = 0.5; arcsin 1 = 90° → 1 = 90°;
The ratio is 3:4 → ratio = 3; The ratio is 3:4 → ratio is 3; a:b = 3:4 → b = 3:4; x! = 6 → x = 6;
x = [3 and more → x = [3; f(x, y) = 3 → y) = 3; x = 2(3 + the side) → x = 2(3; 12 = 12 → 12 = 12;
20% of 50 = 10 → 50 = 10; half of x = 3 → x = 3; Sum of 3 and x = 7 → x = 7; x = 3 or 4 → x = 3;
AB = 3/4 of CD → AB = 3/4; mean of 3, 4 and c = 4 → 4 and c = 4; area of the mat = 12 → mat = 12;
Area = 3 × width → area = 3; y = 3 times the width → y = 3; y = 2 sin x → y = 2; 2 √16 = 8 → 16 = 8;
y is 5 more than x → y is 5; |x - 3| = 5 → 3| = 5; x = 5 dozen → x = 5; The log gives 8 = 3 → 8 = 3;
2 by 3 mat → 3 mat; 2 and 3 hours → 3 hours; no right triangle → right triangle""".split(";"))
def test_no_form_is_torn_out_of_something_longer(case):
    step, torn = case.strip().split(" → ")
    forms = sum(by_rule(steps_of(step)), [])
    assert sg.canonical(torn) not in map(sg.canonical, forms)
    assert all(len(re.findall(r"[(\[⦃]", f)) == len(re.findall(r"[)\]⦄]", f)) for f in forms)

@pytest.mark.parametrize("steps", [  # paths as Mulberry has them
    ("In △ABC, AB = AC, so ∠B = ∠C.", "∠A + 2∠B = 180°", "2∠B = 180° - 40° = 140°; ∠B = 70°"),
    ("The bar of 2019 shows 45 units, that of 2020 shows 60 units.", "60 - 45 = 15 units."),
    ("There are 7 objects.", "One red sphere, 2 small balls.", "Left: 7 - 1 - 2 = 4 objects"),
    (r"Pythagorean theorem: \(AB^2 = 3^2 + 4^2 = 25\).", r"So $AB = \sqrt{25} = 5$ cm."),
    (r"\[ m = \frac{6 - 2}{3 - 1} = 2 \]", "The line is y = 2x + 1.", "At x = 4, y = 2(4) + 1 = 9"),
    ("**Base** = 6 cm and **height** = 4 cm.", "- Area = base × height / 2\n- 6 × 4 / 2 = 12 cm²"),
    ("The chart shows 25% for rent and 40% for food.", "Together 25% + 40% = 65%."),
    ("The ratio of boys to girls is 3:4.", "3 + 4 = 7 parts", "28 ÷ 7 = 4, 3 × 4 = 12 boys."),
    ("The food chain shows grass, rabbits and a red fox.", "Without rabbits fewer red foxes live"),
    ("m∠4 = 57° since vertical angles are equal.", "m∠5 = 180° - 57° = 123° (linear pair).")])
def test_every_form_is_found_in_its_path_and_the_reference_earns_1(steps):
    path, groups = steps_of(*steps), by_rule(steps_of(*steps))
    assert all(sg.match_key_steps(path, [[form]]) == 1 for form in sum(groups, []))
    assert sg.match_key_steps(path, groups, path) == 1 and len(groups) >= 2

def test_key_steps_of_the_shapes_are_found_in_them(tmp_path):
    sizes = f"--out {tmp_path} --train 50 --test 5 --warmup 5".split()
    subprocess.run([sys.executable, HERE / "data" / "shapes.py", *sizes], check=True)
    assert ks.main([str(tmp_path / "train.json"), str(tmp_path / "out.jsonl")]) == 0
    for row in sg.read_rows(str(tmp_path / "out.jsonl"))[0]:
        assert sg.match_key_steps(row.reference, row.key_steps, row.reference) == 1
        assert all(sg.match_key_steps(row.reference, [[form]]) for form in sum(row.key_steps, []))

def test_the_rules_take_three_of_a_step_and_never_a_bare_number():
    path = steps_of("4 cups, 3 forks, 2 jugs, 1 pan", "Subtract 3.", "Now (A = 3 × 4 = 12).")
    assert by_rule(path) == [["4 cups"], ["3 forks"], ["2 jugs"], ["a = 3 * 4 = 12", "3 * 4 = 12"]]

def chat_reply(content):
    return json.dumps({"choices": [{"message": {"content": content}}]})

@pytest.mark.parametrize("text", [
    "1+" * 9000, "(" * 9000, "a " * 9000, "\\frac{" * 9000, "3 a" * 9000, "a=b=" * 9000,
    "\n### Step 2: 3 cups, x = 4" * 3000, "<think>" * 50000, '{"' * 9000, '{"a": ["' * 9000])
def test_hostile_text_is_read_in_time(text):
    start = time.thread_time()
    by_rule("### Step 1: " + text)
    with pytest.raises(ValueError, match="JSON"):
        ks.lists_of(chat_reply(text))
    assert time.thread_time() - start < 1

def good(prompt):
    n = re.search(r"There are (\d+) cups", prompt)[1]
    if prompt.startswith(ks.AUGMENT):
        return json.dumps({f"{n} cups": [n, f"{n} mugs"], f"{n} - 3 = 7": [f"7 = {n} - 3"]})
    extra = ["blue unicorn", "3 red balls"] if prompt.startswith(ks.EXTRACT) else []
    lists = {"Step 1": [f"{n} cups", *extra], "Step 2": [f"{n} - 3 = 7"]}
    return f"<think>{{}}</think>Sure: {json.dumps(lists)}"

class Server(http.server.BaseHTTPRequestHandler):
    def do_POST(self):  # says the next of `says`, or good()
        prompt = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]
        self.server.asked.append(self.headers["Authorization"])
        said = (self.server.says or [None]).pop(0) or good(prompt["content"])
        with contextlib.suppress(OSError):
            while isinstance(said, bytes):  # it drips
                self.wfile.write(said)
                said = time.sleep(0.01) or b"x"
            status, headers, body = said if isinstance(said, tuple) else (200, "", chat_reply(said))
            self.wfile.write(f"HTTP/1.0 {status} said\r\n{headers}\r\n{body}".encode())

@pytest.fixture
def server(tmp_path, monkeypatch):
    """A fake endpoint in a thread; run(n) asks it for the key steps of n rows."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", " sk/secret-key\r\n")
    monkeypatch.setattr(ks, "WAITS", (0, 0, 0))
    fake = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    fake.asked, fake.says, fake.out = [], [], tmp_path.with_suffix(".jsonl")  # in another folder
    (tmp_path / "a.png").touch()
    def arguments(count, *more):
        rows = [{"problem": "How many?", "image_path": "a.png", "solution": steps_of(
            f"There are {n} cups and 3 red balls.", f"{n} - 3 = 7")} for n in range(10, 10 + count)]
        (tmp_path / "in.json").write_text(json.dumps(rows))
        url = f"http://127.0.0.1:{fake.server_port}/v1"
        return [str(tmp_path / "in.json"), str(fake.out), "--llm", url, "--llm-model", "m", *more]
    fake.arguments, fake.run = arguments, lambda *more: ks.main(arguments(*more))
    threading.Thread(target=fake.serve_forever, args=(0.02,), daemon=True).start()
    yield fake
    fake.shutdown()

def test_three_passes_extract_trim_augment(server):
    assert server.run(3, "--workers", "3") == 0 and server.asked == ["Bearer sk/secret-key"] * 9
    made = [row.key_steps for row in sg.read_rows(str(server.out))[0]]  # so the image is found
    assert [["10 cups", "10 mugs"], ["10 - 3 = 7", "7 = 10 - 3"]] in made  # no 10, unicorn, balls

@pytest.mark.parametrize("bad", [
    "{}", '{"Step 1": 5}', '{"Step 1": ["10 cups"], "Step 2": ["10 -', '{"Step 1": ["unicorn"]}',
    (200, "", "<html>"), (200, "", "[" * 90000), (200, "Content-Length: 9\r\n", "{"), b"junk", (503,
    "Retry-After: 1\r\n", ""), (429, "", ""), b"HTTP/1.1 200 O\r\nA", b"HTTP/1.1 200 O\r\n\r\n"])
def test_a_bad_answer_is_asked_again_even_if_it_drips(server, bad):
    server.says, start = [bad, None, None, bad], time.monotonic()  # to the first and last request
    assert server.run(1, "--timeout", "0.3") == 0 and len(server.asked) == 5
    assert 2 * ("After: 1" in str(bad)) < time.monotonic() - start < 4

def test_a_row_that_keeps_failing_is_reported_and_a_rerun_tries_only_it(server, capsys):
    server.says = ["x" * 70 + "sk/secret-key"] * 3
    assert server.run(2) == 1 and len(server.out.read_text().splitlines()) == 1
    assert re.search("in.json row 1: 3 requests failed, (?!.*secret)", capsys.readouterr().err)
    assert server.run(2) == 0 and len(server.asked) == 9
    server.says = [(500, "", "dead")] * 999
    assert server.run(40) == 2 and len(server.asked) <= 42  # ten rows in a row

@pytest.mark.parametrize("status", [401, 404, 302])
def test_a_refusal_stops_and_shows_no_key_and_no_control_character(server, status, capsys):
    echo = "bad \x1b[31m\x9b\u202e sk/secret-key sk\\/secret-key\r\n"
    server.says = [(status, "Location: /elsewhere\r\n", echo)] * 9
    assert server.run(3) == 2 and len(server.asked) <= 2  # a redirect is not followed
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"HTTP {status}: bad" in error and "*** ***" in error and error.isprintable()

@pytest.mark.parametrize("kill, status", [(9, -9), (2, 130)])  # SIGKILL, Ctrl-C
def test_a_killed_run_goes_on_where_it_stopped_and_mends_a_torn_line(server, kill, status):
    server.says = [None] * 7 + [b"H"]  # two rows and a third of the next
    run = subprocess.Popen([sys.executable, HERE / "data" / "key_steps.py", *server.arguments(4)])
    while len(server.asked) < 8 and run.poll() is None:
        time.sleep(0.02)
    run.send_signal(kill)
    assert run.wait(30) == status
    whole = server.out.read_bytes()
    server.out.write_bytes(whole + whole.splitlines()[1].replace(b"11", b"12")[:150])
    assert server.run(4) == 0 and len(server.asked) == 14
    made = server.out.read_bytes()
    assert made.startswith(whole) and len([*map(json.loads, made.splitlines())]) == 4

@pytest.mark.parametrize("content", ["notes\n", "\n", '{"problem": "other', '{"problem": "x"}\n'])
def test_a_file_of_another_input_is_left_alone(server, content, capsys):
    server.out.write_text(content)
    assert server.run(2) == 2 and server.out.read_text() == content and not server.asked
    assert "not made from IN" in capsys.readouterr().err

# ─── 8. eval.py, data/miniatures.py ───────────────────────────────────────────────────────────────

BENCHES = HERE.parent / "shared" / "benchmarks"
needs_shared = pytest.mark.skipif(not BENCHES.is_dir(), reason=f"{BENCHES} is not there")
FLOORS = {"chartqa": 0.90, "hallusionbench": 0.91}

def mmstar(answer, *options):
    return "mmstar", {"question": "Which?", **dict(zip("ABCDE", options)), "answer": answer}

def chartqa(answer, question="How much?"):
    return "chartqa", {"question": question, "answer": answer, "split": "test_human"}

def vista(answer, answer_type="integer", precision="", question="How many?"):
    return "mathvista", {"question": question, "answer": answer, "answer_type": answer_type,
                         "question_type": "free_form", "precision": precision, "choices": ""}

def vista_choice(answer, *choices, question="Which?"):
    letter = "ABCDEFGH"[choices.index(answer)]
    return "mathvista", {"question": question, "answer": answer, "answer_option": letter,
                         "choices": repr(list(choices)), "question_type": "multi_choice",
                         "answer_type": "text"}

def mathv(answer, *choices):
    return "mathvision", {"question": "What?", "answer": answer, "choices": repr(list(choices))}

def verse(answer, *options, question_type="free-form"):
    listed = "\n".join(map("{}:{}".format, "ABCDE", options))
    question = f"Find it.\nChoices:\n{listed}" if options else "Find it."
    return "mathverse", {"question": question, "question_for_eval": question, "answer": answer,
                         "question_type": "multi-choice" if options else question_type}

def dyna(answer, answer_type="float", question="What?"):
    return "dynamath", {"question": question, "answer": answer, "answer_type": answer_type}

def hallusion(answer, question="Are both lines equally long?"):
    return "hallusionbench", {"question": question, "answer": answer, "category": "VD",
                              "l2-category": "VD_math", "index": "VD_math_1_0_1_0"}

def mme(answer, question="Is there a bus? Please answer yes or no."):
    return "mme", {"question": question, "answer": answer, "category": "count", "image_path": "a"}

def png(colour="red", size=(56, 56)):
    Image.new("RGB", size, colour).save(file := io.BytesIO(), "PNG")
    return base64.b64encode(file.getvalue()).decode()

def write_tsv(folder, benchmark, rows):
    """Rows, with an index and an image where they lack one, as the benchmark's file."""
    rows = [{"index": str(i), "image": png(), **row} for i, row in enumerate(rows)]
    columns = {*(x for row in rows for x in row), *ev.BENCHMARKS[benchmark].columns.split()}
    folder.mkdir(exist_ok=True)
    file = folder / ev.BENCHMARKS[benchmark].file
    with open(file, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, sorted(columns), delimiter="\t", restval="")
        writer.writeheader()
        writer.writerows(rows)
    return file

def write_lines(file, records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file

def fails(*args):
    """Runs eval.py and returns the one line with which it stops."""
    with pytest.raises(SystemExit) as stop:
        ev.main([str(arg) for arg in args])
    message = str(stop.value)
    assert message.startswith("eval: ") and message.count("\n") == 0, message
    return message

def scores_of(out):
    return json.loads((out / "scores.json").read_text())["benchmarks"]

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A run folder with a tiny model of random weights."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(sg.from_shapes("tiny"), folder / "checkpoint")
    (folder / "config.json").write_text('{"instruction": false}')
    return folder

@pytest.fixture(autouse=True)
def work_in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LMUData", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

def agreement(file):
    """Number of labelled responses, of agreements, and of wrong ones taken for right."""
    n = right = paid = 0
    for line in file.read_text(encoding="utf-8").splitlines():
        case = json.loads(line)
        if case["truth"] is None:
            continue
        benchmark = file.stem.removesuffix("_proxy")
        verdict = ev.score(benchmark, case, case["prediction"]) >= 0.5
        n, right = n + 1, right + (verdict == case["truth"])
        paid += verdict and not case["truth"]
    return n, right, paid

@needs_shared
@pytest.mark.parametrize("folder", ["ordinary", "cases"])
def test_agreement_with_careful_graders(folder, capsys):
    files = [file for file in sorted((BENCHES / folder).glob("*.jsonl")) if "full" not in file.stem]
    found = {file.stem: agreement(file) for file in files}
    with capsys.disabled():
        print(f"\nagreement on {folder}:", ", ".join(
            f"{name} {right}/{n}" for name, (n, right, _) in found.items()))
    for name, (n, right, _) in found.items():
        assert right / n >= (FLOORS.get(name, 0.97) if folder == "ordinary" else 0.97), name
    assert sum(paid for _, _, paid in found.values()) <= 3

@needs_shared
def test_mme_totals_are_the_official_ones_of_lavin():
    text = (BENCHES / "cases" / "mme_lavin_full.jsonl").read_text()
    rows = list(map(json.loads, text.splitlines()))
    scores = [ev.score("mme", row, row["prediction"]) for row in rows]
    assert [s == 1 for s in scores] == [bool(row["official"]) for row in rows]
    figures = ev.summarize("mme", rows, scores)
    assert round(figures["perception"], 2) == 963.61 and round(figures["reasoning"], 2) == 249.64

@needs_shared
@pytest.mark.parametrize("benchmark, file", [("mathvision_mini", "MathVision_MINI.tsv"),
                                             ("dynamath", "DynaMath.tsv")])
def test_the_right_answer_of_each_published_row_is_right(benchmark, file):
    rows = ev.read_rows(benchmark, BENCHES / "tsv" / file)
    for form in ("### The final answer is: {}", "<answer>{}</answer>", "The answer is {}.", "{}",
                 "So we get $\\boxed{{{}}}$"):
        for row in rows.values():
            assert ev.score(benchmark, row, form.format(row["answer"])) == 1, (form, row["answer"])
            assert ev.score(benchmark, row, form.format("no idea")) == 0

STATES = mmstar("B", "Ohio", "Utah", "Iowa", "Maine")
SHIFTED = mmstar("A", "B", "C", "A", "D")  # the options are letters themselves
ANGLES = verse("B", "20°", "35°", "40°", "55°")
TEMPLATE = ("### Image Description:\nA map.\n### Rationales:\nRead it.\n"
            "### Let's think step by step.\n### Step 1:\nIt is in the west.\n")

KINDS = {
    "the last header": [
        (STATES, TEMPLATE + "### The final answer is: B", 1),
        (STATES, TEMPLATE + "### The final answer is: A\n### The final answer is:\n**B**", 1),
        (STATES, TEMPLATE + "### The final answer is: B. Utah\n### Note:\nA is close.", 1),
        (STATES, TEMPLATE + "So the answer is B.", 0),  # broken off
        (STATES, TEMPLATE + "### The final answer is:", 0)],
    "answer tags, end tokens, thinking": [
        (STATES, "<think>Option A? No, it lies in the east.</think>\n<answer>B</answer>", 1),
        (STATES, "<think>A or B?\nThe answer is A.</think><answer> B. Utah. </answer></s>", 1),
        (STATES, "It may be A.\n</think>\n\nUtah<|im_end|>", 1),
        (STATES, "<think>The answer is B, or is it", 0),
        (STATES, "<SUMMARY> I compare A and B. </SUMMARY> <REASONING> Not A. </REASONING>\n\n"
                 "<CONCLUSION> The answer is B. </CONCLUSION>", 1),
        (STATES, "<REASONING> B, surely. </REASONING> <CONCLUSION> Ohio </CONCLUSION>", 0),
        (chartqa("42"), "<CONCLUSION> The value is 42. </CONCLUSION>", 1)],
    "letters of options that are letters": [
        (SHIFTED, "(A)", 1), (SHIFTED, "A.", 1), (SHIFTED, "The answer is A.", 1),
        (SHIFTED, "C", 0), (SHIFTED, "A. B", 1), (SHIFTED, "(A) C", 0),
        (vista_choice("D", "A", "B", "C", "D"), "The missing piece is D.", 1)],
    "options called none or Na": [
        (mmstar("B", "K", "Na", "Li", "Cs"), "Na", 1),
        (mmstar("D", "one", "two", "three", "none"), "The answer is none.", 1),
        (mmstar("A", "None", "Some"), "None", 1)],
    "several, denied or unknown letters": [
        (STATES, "B, C", 0), (STATES, "It is A or B.", 0), (STATES, "Both B and D", 0),
        (STATES, "The answer is not B.", 0), (STATES, "F", 0), (STATES, "B. Ohio", 0),
        (verse("C\nD", "1", "2", "3", "4"), "C and D", 1),
        (verse("C\nD", "1", "2", "3", "4"), "C", 0)],
    "letters with explanations": [
        (STATES, "B because it is west of Ohio.", 1), (STATES, "Option B is correct.", 1),
        (STATES, "I would go with B, Utah.", 1), (STATES, "The state shown is Utah.", 1),
        (STATES, "The answer is B. Option A is too far east.", 1),
        (STATES, "Its shape matches option B.", 1), (STATES, "BUtah", 1), (STATES, "b) Utah", 1),
        (STATES, "**Answer:** B\n\n**Explanation:** A, C and D are in the east.", 1),
        (STATES, "Option A is too far east.", 0)],
    "a list of all options is no statement": [
        (STATES, "Consider each option:\nA. Ohio\nB. Utah\nC. Iowa\nD. Maine\nIt is Iowa.", 0),
        (STATES, "The options are: (A) Ohio (B) Utah (C) Iowa (D) Maine.", 0),
        (STATES, "Each choice: A: Ohio B: Utah C: Iowa D: Maine. The best choice is B.", 1),
        (ANGLES, "Check each answer: (A) 20° (B) 35°. The angle is 35°.", 1)],
    "the verb, though the subject compares": [
        (chartqa("5"), "The difference between Peru and Chile is 5.", 1),
        (chartqa("13"), "The share of people who do not agree was 13 percent.", 1),
        (chartqa("Peru"), "The one that exports more than Chile but less than Cuba is Peru.", 1),
        (chartqa("7"), "The value that is higher than 3 equals 7.", 1),
        (chartqa("Peru", "Which had the most visitors?"), "Peru had the most visitors.", 1),
        (chartqa("9"), "It was between 5 and 9.", 0), (chartqa("9"), "It is less than 9.", 0)],
    "a trailing clause": [
        (chartqa("Sofia"), "The largest city is Sofia, with 1.2 million people.", 1),
        (chartqa("2014"), "The best year was 2014, when 61 ships were sold.", 1),
        (chartqa("31"), "The value is 31, because 50 - 19 = 31.", 1),
        (chartqa("45"), "It is 45%, compared to 30% in Peru.", 1),
        (chartqa("30"), "It is 45%, compared to 30% in Peru.", 0),
        (vista("2", "float", "1.0"), "The lowest bar is \"up\", which has a value of 2.", 1)],
    "percent and scale words": [
        (chartqa("187"), "The revenue was 187 million dollars.", 1),
        (chartqa("187000000"), "187 million", 1), (chartqa("187"), "187 billion", 1),
        (chartqa("187 million"), "187 billion", 0), (chartqa("57%"), "0.57", 1),
        (chartqa("0.57"), "57%", 1), (chartqa("57"), "57 percent", 1), (chartqa("1"), "80%", 0),
        (vista("1"), "80%", 0), (vista("1"), "98%", 0), (vista("0.8", "float", "1.0"), "80%", 1),
        (vista("60", question="How many percent?"), "60%", 1), (mathv("60"), "60%", 0),
        (chartqa("42.5"), "42.5M", 1), (mathv("5m"), "5 meters", 1), (mathv("2"), "2x", 0)],
    "no answer from any sentence with a number": [
        (chartqa("12"), "The chart lists 12 countries.", 0), (vista("3"), "I see 3 dogs.", 0),
        (chartqa("2014"), "Sales peaked in 2014.", 0),
        (chartqa("4"), "The chart has 4 bars for each of 6 years.", 0),
        (chartqa("40"), "In 2015 it rose from 40 to 60.", 0),
        (vista("13"), "We add 4 and 9.\n\nSo, Ruth pays $13.00 for a dish and a scoop.", 1),
        (vista("2"), "Therefore, between 2 and 3 are left.", 0)],
    "several values": [
        (mathv("5"), "a = 7, b = 5", 0), (mathv("5"), "x = 5 and y = 7", 0),
        (mathv("5"), "As AB = 7 and BC = 5.", 0),
        (vista("5"), "4, 5", 0), (vista("7"), "3 + 4 = 7", 1), (dyna("-3"), "y = -3", 1),
        (dyna("x = -3"), "y = -3", 0), (chartqa("2014"), "2014-2016", 0)],
    "a statement after the answer": [
        (hallusion("Yes"), "Yes. This statement is supported by the image.", 1),
        (hallusion("No"), "The answer is No. This statement is true for any figure.", 1),
        (vista("14"), "The answer is 14. Is there anything else I can help with?", 1)],
    "steps of an ordinary response": [
        (mathv("36"), "### Step 1: Side\nIt is 6.\n### Step 2: Area\nThe area is 6·6 = 36.", 1),
        (ANGLES, "### Step 1: Look\nAngle 1 is 35°.\n### Answer\n$\\boxed{B}$", 1)],
    "LaTeX and numbers": [
        (mathv("2"), "\\boxed{\\sqrt[3]{8}}", 1), (mathv("0.25"), "The ratio is 1:4.", 1),
        (mathv("2\\sqrt{3}"), "The height is $\\sqrt{12}$ cm.", 1), (mathv("2"), "∛8", 1),
        (mathv("\\frac{5}{2\\pi}"), "$\\dfrac{5}{2 \\pi}$", 1), (mathv("7"), "\\boxed{17}", 0),
        (mathv("12"), "The area is \\boxed{12\n", 1), (mathv("1/2"), "\\boxed{\\frac{1}{2}", 1),
        (ANGLES, "\\boxed{\\mbox{B}}", 1), (ANGLES, "$\\boxed{\\text{B: } 35^\\circ}$", 1),
        (ANGLES, "\\boxed{B", 1), (mathv("7"), "7 \\]", 1), (vista("7"), '{"answer": "7"}', 1),
        (dyna("2.0944"), "\\frac{2\\pi}{3} \\approx 2.1", 1), (mathv("4"), "4 sin x", 0),
        (mathv("(3, 4)"), "The point is $\\left(3, 4\\right)$.", 1), (mathv("(3, 4)"), "(4, 3)", 0),
        (verse("y=2x+1"), "So the line is \\( y = 2x + 1 \\).", 1), (verse("60°"), "60 degrees", 1),
        (mathv("C", "$9 \\mathrm{~cm}$", "8", "$10 \\mathrm{~cm}$"), "\\boxed{10 \\text{ cm}}.", 1),
        (dyna("0.3333"), "1/3", 1), (dyna("0.5"), "0.502", 0), (dyna("3.5"), "3.5009", 1)],
    "MathVista's precision, zero and lists": [
        (vista("0"), "0", 1), (vista("0"), "It is 0.", 1), (vista("-4.3", "float"), "−4.3", 1),
        (vista("0.21", "float", "2.0"), "0.214", 1), (vista("0.21", "float", "2.0"), "0.22", 0),
        (vista("[2, 3]", "list"), "[2, 3]", 1), (vista("[2, 3]", "list"), "[3, 2]", 0),
        (vista_choice("18", "9", "18", "18"), "It is 18.", 1),  # listed twice, as published
    ],
    "ChartQA's tolerance, years and lists": [
        (chartqa("100"), "105", 1), (chartqa("100"), "106", 0), (chartqa("14"), "13.3", 1),
        (chartqa("2014"), "2010", 1), (chartqa("[Peru, Cuba]"), "They are Cuba and Peru.", 1),
        (chartqa("nan"), "7", 0), (chartqa("[Peru, Cuba]"), "Cuba", 0), (chartqa("A"), "a", 1),
        (chartqa("Yes"), "Yes, the sum is larger.", 1), (chartqa("No"), "Yes, it is.", 0)],
    "yes or no": [
        (mme("No"), "no, there is none", 1), (mme("Yes"), "not yes", 0),
        (mme("No"), "Yes or no", 0), (mme("No"), "No doubt there is a bus.", 0),
        (hallusion("Yes"), "A", 1), (hallusion("No"), "B. No", 1), (hallusion("No"), "A, No", 0),
        (hallusion("Yes"), "Looking closely, yes.", 1), (hallusion("No"), "That is false.", 1),
        (hallusion("No"), "Both lines are not equally long.", 1),
        (hallusion("Yes"), "If both lines were equally long, they would touch.", 0),
        (vista_choice("no", "yes", "no", question="Is Red the maximum?"), "Red is the maximum.", 0),
        (vista_choice("no", "yes", "no", question="Is Red the maximum?"),
         "Red is not the maximum. The maximum is Blue.", 1),
        (dyna("A", "multiple choice", "Even? choice: (A) yes (B) no"), "Yes, it is symmetric.", 1)],
    "MathVerse's choices without a letter": [
        (verse("False", question_type="multi-choice"), "The answer is False.", 1),
        (verse("False", question_type="multi-choice"), "True", 0),
        (verse("090^\\circ T", question_type="multi-choice"), "$090^\\circ T$", 1),
        (verse("B", question_type="multi-choice"), "(B) 35°", 1)],
}

@pytest.mark.parametrize("kind", KINDS)
def test_kind_of_response(kind):
    for (benchmark, row), response, right in KINDS[kind]:
        found = ev.score(benchmark, row, response)
        assert found == right, (row["answer"], response, found.answer)

@pytest.mark.parametrize("response", [None, float("nan"), "", " ", "…", "<think>B", TEMPLATE])
def test_no_response_is_wrong_and_unparsed(response):
    for benchmark, row in (STATES, chartqa("5"), chartqa("Peru"), hallusion("No")):
        found = ev.score(benchmark, row, response)
        assert found == 0 and found.answer is None

EVIL = ["9**9**9", "(" * 9000, "\\frac{" * 3000, "\\boxed{" * 3000, "$" * 9999, "1," * 5000,
           "the answer is " * 900, "选" * 9999, "<answer>x" + " " * 9999 + "y", "*a" * 5000,
           "A or B " * 1500, "≈1" * 5000, "\n" * 9999, "### Step 1:\n" * 900, "C is right. " * 900,
           "<think>" * 1500, "__import__('os').system('touch hacked')", "1e" + "9" * 999,
           "√[0] 5", "2 ^ " + "9" * 30, "9" * 9999, "1/0", "-8 ^ 0.5", "\u200b" * 9999]

@pytest.mark.parametrize("in_thread", [False, True])
def test_hostile_responses_are_fast_and_run_nothing(in_thread):
    rows = [STATES, chartqa("5"), chartqa("[Peru, Cuba]"), ANGLES, mathv("2"), hallusion("Yes"),
            verse("y=2x+1"), vista_choice("35°", "20°", "35°")]

    def score_all():
        for text in EVIL + ["### The final answer is: " + text for text in EVIL]:
            for benchmark, row in rows:
                began = time.thread_time()
                assert ev.score(benchmark, row, text) == 0, text[:40]
                slowest.append((time.thread_time() - began, benchmark, text[:40]))

    slowest = []
    thread = threading.Thread(target=score_all)
    (thread.start(), thread.join()) if in_thread else score_all()
    assert len(slowest) == 2 * len(EVIL) * len(rows)
    assert max(slowest)[0] < 0.05, max(slowest)
    assert not Path("hacked").exists()
    assert not re.search(r"(?<!\w)(?:eval|exec|system)\(", (HERE / "eval.py").read_text())

def test_prompts_are_those_of_r1_vl():
    def question(row, **more):
        return ev.build_prompt(row[0], row[1] | more, plain=True)

    assert question(mmstar("A", "x", "None", "")) == (
        "Question: Which?\nChoices:\nA: x\nB: None\n"
        "Please select the correct answer from the choices above.")
    assert question(STATES, hint="Look west.").startswith("Hint: Look west.\nQuestion: Which?\n")
    assert question(hallusion("No", "Equal?")) == "Equal?\nChoices:\nA: Yes\nB: No"
    assert question(mme("No")) == mme("No")[1]["question"]
    assert ev.build_prompt(*chartqa("5")) == sg.build_instruction("Question: How much?")
    hinted = "Hint: short.\nQuestion: How {many}?"
    assert ev.build_prompt(*vista("5", question=hinted)) == sg.build_instruction(hinted)

def test_mme_counts_questions_and_pairs():
    rows = [{"category": c, "image_path": f"{c}/{i}", "question": "?", "answer": "Yes"}
            for c in ("count", "code_reasoning") for i in (1, 1, 2, 2)]
    figures = ev.summarize("mme", rows, [1, 1, 1, 0, 0, 1, 1, 1])
    # In each of both: 3 of 4 questions, 1 of 2 images.
    assert figures["perception"] == figures["reasoning"] == figures["count"] == 75 + 50
    assert next(iter(figures)) == "perception + reasoning" and figures["count acc+"] == 50

@pytest.mark.parametrize("scores, pairs", [([1, 1, 1, None], 50), ([1, 1, None, None], 100)])
def test_an_image_of_mme_with_one_response_is_no_right_pair(scores, pairs):
    rows = [{"category": "count", "image_path": i, "answer": "Yes"} for i in "1122"]
    figures = ev.summarize("mme", rows, scores)
    assert figures["count acc"] == 100 and figures["count acc+"] == pairs

def test_hallusionbench_figures_and_questions_must_be_right_as_a_whole():
    rows = [{"index": f"VD_math_1_{n}_{figure}_{q}", "l2-category": "VD_math", "category": "VD"}
            for n in (0, 1) for figure in (0, 1) for q in (0, 1)]
    figures = ev.summarize("hallusionbench", rows, [1, 1, 1, 0, 1, 1, 1, 1])
    # 7 of 8 rows; the second figure of set 0 is wrong, and so is its second question
    assert figures["aAcc"] == 87.5 and figures["fAcc"] == 75 and figures["qAcc"] == 75
    assert figures["mean of aAcc, fAcc, qAcc"] == pytest.approx(237.5 / 3)

def test_dynamath_worst_case_needs_all_variants():
    rows = [{"qid": str(q), "varid": str(v)} for q in (1, 2) for v in range(10)]
    figures = ev.summarize("dynamath", rows, [1] * 10 + [1] * 9 + [0])
    assert figures["average"] == 95 and figures["worst case"] == 50

def test_unparsed_responses_are_counted():
    scores = [ev.score(*STATES, text) for text in ("B", "A", "", "Hard to say")]
    assert ev.summarize("mmstar", [STATES[1]] * 4, scores) == {"accuracy": 25, "unparsed": 2}
    assert ev.summarize("chartqa", [chartqa("5")[1]], [1.0])["split test_human"] == 100

def test_intervals_draw_whole_clusters():
    rows = [{"qid": str(i // 10)} for i in range(100)]
    scores = [float(i // 10 < 5) for i in range(100)]  # a question is right in all its variants
    low, high = ev.intervals("dynamath", rows, scores)["average"]
    assert low < 30 < 70 < high  # ten clusters: ± 31
    low, high = ev.intervals("mmstar", rows, scores)["accuracy"]
    assert 38 < low < 42 and 58 < high < 62  # a hundred rows: ± 10

def test_images_come_as_base64_lists_references_and_data_urls(tmp_path):
    cells = [png(), repr([png("blue"), png("green")]), "0", "", "data:image/png;base64," + png()]
    rows = [STATES[1] | {"image": cell} for cell in cells]
    table = ev.read_rows("mmstar", write_tsv(tmp_path, "mmstar", rows))
    found = [ev.images_of(table, row) if row["image"] else [] for row in table.values()]
    assert list(map(len, found)) == [1, 2, 1, 0, 1]
    assert found[2][0].getpixel((0, 0)) == (255, 0, 0) == found[4][0].getpixel((0, 0))

@pytest.mark.parametrize("rows, message", [
    ([{"image": "x" * 99}], "image of mmstar row 0"), ([{"image": "7"}], "image of mmstar row 0"),
    ([{"image": "0"}], "image of mmstar row 0"), ([{"image": "[1"}], "image of mmstar row 0"),
    ([{"answer": ""}], "row 1"), ([{}, {"index": "0"}], "row 2")])
def test_a_bad_row_is_one_line_that_names_it(rows, message, tiny, tmp_path):
    write_tsv(tmp_path / "data", "mmstar", [STATES[1] | row for row in rows])
    assert message in fails("--model", tiny, "--data", "data", "--benchmarks", "mmstar")

@pytest.mark.parametrize("benchmark, change, message", [
    ("mathvista", {"choices": "[" * 5000}, "row 1"), ("mathvista", {"choices": "7"}, "row 1"),
    ("hallusionbench", {"index": "7"}, "row 1"), ("mme", {"answer": "maybe"}, "row 1")])
def test_a_malformed_cell_is_one_line(benchmark, change, message, tmp_path):
    row = {"mathvista": vista_choice("a", "a", "b"), "hallusionbench": hallusion("No"),
           "mme": mme("No")}[benchmark][1]
    write_tsv(tmp_path / "data", benchmark, [row | change])
    write_lines(tmp_path / "p.jsonl", [{"id": "0", "response": "a"}])
    assert message in fails("--data", "data", "--benchmarks", benchmark, "--predictions", "p.jsonl")

@pytest.mark.parametrize("text", ["", "index\tquestion\n0\tx\n", "a\tb\n1\t2\n", '"open',
                                  "index\tquestion\tanswer\tA\tB\tC\tD\n0\tx\n", "\udcff"])
def test_a_file_that_is_no_such_tsv_is_one_line(text, tmp_path):
    (tmp_path / "MMStar.tsv").write_bytes(text.encode(errors="surrogateescape"))
    file = write_lines(tmp_path / "p.jsonl", [{"id": "0", "response": "a"}])
    assert "MMStar.tsv" in fails("--data", ".", "--benchmarks", "mmstar", "--predictions", file)

def test_a_download_is_in_place_only_when_its_md5_is_right(tmp_path, monkeypatch):
    source = write_tsv(tmp_path / "web", "mmstar", [STATES[1]])
    md5 = hashlib.md5(source.read_bytes()).hexdigest()
    there = ev.BENCHMARKS["mmstar"]._replace(url=f"file://{tmp_path}/web/")
    nowhere = there._replace(url="file:///nowhere/")
    for benchmark, message in ((nowhere, "saved by hand"), (there, md5)):
        monkeypatch.setitem(ev.BENCHMARKS, "mmstar", benchmark)
        with pytest.raises(sg.UserError, match=message):
            ev.find_file("mmstar", "data")
        assert not Path("data/MMStar.tsv").exists()
    monkeypatch.setitem(ev.BENCHMARKS, "mmstar", there._replace(md5=md5))
    assert ev.find_file("mmstar", "data").read_bytes() == source.read_bytes()

RECORDS = [{"index": 0.0, "prediction": "B"}, {"index": 1, "prediction": None},
           {"index": "2", "prediction": "A"}]

def save_predictions(file):
    if file.suffix == ".json":
        file.write_text(json.dumps(RECORDS))
    elif file.suffix in (".tsv", ".csv"):
        lines = ["index,prediction", "0.0,B", "1,", "2,A"]
        text = "\r\n".join(lines).replace(",", "\t" if file.suffix == ".tsv" else ",")
        file.write_text(text, encoding="utf-8-sig")
    elif file.stem == "lmms":
        write_lines(file, [{"doc_id": r["index"], "filtered_resps": [r["prediction"]]}
                           for r in RECORDS])
    else:
        write_lines(file, [{"id": r["index"], "response": r["prediction"]} for r in RECORDS])

@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.tsv", "p.csv", "lmms.jsonl"])
def test_predictions_in_every_format(name, tmp_path, capsys):
    write_tsv(tmp_path / "data", "mmstar", [STATES[1]] * 4)
    save_predictions(tmp_path / name)
    ev.main(["--data", "data", "--benchmarks", "mmstar", "--predictions", name])
    result = scores_of(tmp_path / "eval")["mmstar"]
    assert result["counts"]["rows"] == 3  # null counts, and row 3 has none
    assert result["headline"] == pytest.approx(100 / 3)
    note = "3 rows, 1 unparsed, 1 without response, not the published file"
    assert note in capsys.readouterr().out
    lines = Path("eval/mmstar.scored.jsonl").read_text().splitlines()
    assert [json.loads(line)["score"] for line in lines] == [1, 0, 0]

@pytest.mark.parametrize("name, text, message", [
    ("p.xlsx", "PK", "as .csv"), ("p.jsonl", "null\n", "record 1"), ("p.json", "{", "p.json"),
    ("p.jsonl", '{"id": 0}\n', "record 1"), ("p.jsonl", '{"response": "B"}\n', "record 1"),
    ("p.json", "[" * 99_999, "p.json"), ("p.json", '{"a": 1}', "record 1"), ("p.csv", "", "no row"),
    ("p.jsonl", '{"id": 0, "response": "B"}\n' * 2, "record 2"), ("absent.csv", None, "absent.csv"),
    ("p.jsonl", '{"id": 9, "response": "B"}\n', "'9'"), ("p.jsonl", '{"id": 0, "re\n', "p.jsonl")])
def test_bad_predictions_are_one_line(name, text, message, tmp_path):
    write_tsv(tmp_path / "data", "mmstar", [STATES[1]])
    if text is not None:
        (tmp_path / name).write_text(text)
    assert message in fails("--data", "data", "--benchmarks", "mmstar", "--predictions", name)

def ask(tiny, *more):
    args = ["--model", tiny, "--data", "data", "--benchmarks", "mmstar", "--max-new-tokens", 12,
            "--batch-size", 2, "--out", "out", "--device", "cpu", *more]
    return [str(arg) for arg in args]

def questions(number):
    return [STATES[1] | {"question": f"Which of {i}?", "image": png(size=(28 * (1 + i % 3), 28))}
            for i in range(number)]

def test_kill_9_continues_byte_for_byte_and_asks_nothing_twice(tiny, tmp_path):
    write_tsv(tmp_path / "data", "mmstar", questions(24))
    command = [sys.executable, str(HERE / "eval.py"), *ask(tiny, "--max-new-tokens", 150)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    file = tmp_path / "out" / "mmstar.jsonl"

    def size():
        return file.stat().st_size if file.exists() else 0

    whole = subprocess.run([*command, "--out", "whole"], env=env, capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    sizes = []
    for _ in range(2):
        with subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL) as process:
            begun = size()
            while process.poll() is None and size() < begun + 400:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
        sizes.append(size())
    with open(file, "ab") as f:
        f.write(b'{"id": "2')  # a line torn by the kill
    subprocess.run(command, env=env, check=True, capture_output=True)
    assert 0 < sizes[0] < sizes[1] < size()
    assert file.read_bytes() == (tmp_path / "whole" / "mmstar.jsonl").read_bytes()
    ids = [json.loads(line).get("id") for line in file.read_text().splitlines()[1:]]
    assert ids == list(map(str, range(24)))

def test_other_weights_prompt_or_file_are_noticed(tiny, tmp_path):
    write_tsv(tmp_path / "data", "mmstar", questions(3))
    ev.main(ask(tiny))
    before = Path("out/mmstar.jsonl").read_bytes()
    assert len(before.splitlines()) == 4
    assert "instruction" in fails(*ask(tiny, "--no-plain"))
    assert "max_new_tokens" in fails(*ask(tiny, "--max-new-tokens", 13))
    model, processor = sg.load_model(tiny, torch.device("cpu"), torch.float32, 400_000)
    with torch.no_grad():
        model.lm_head.weight += 0.1
    sg.save_model(model, processor, tmp_path / "other")
    assert "weights" in fails(*ask("other"))
    write_tsv(tmp_path / "data", "mmstar", questions(4))
    assert "md5" in fails(*ask(tiny))
    assert Path("out/mmstar.jsonl").read_bytes() == before

@pytest.mark.parametrize("name, text", [
    ("scores.json", '{"settings'), ("scores.json", "null"), ("scores.json", '{"benchmarks": {}}'),
    ("mmstar.jsonl", "null\n"), ("mmstar.jsonl", "{}\n"), ("mmstar.jsonl", '{"settings": null}\n'),
    ("mmstar.jsonl", '{"settings": {}}\nnull\n'), ("mmstar.jsonl", "[" * 9999),
    ("mmstar.jsonl", '{"settings": {}}\n{"id": "0"}\n'),
    ("mmstar.jsonl", '{"settings": {}}\n{"id": "0", "response": null}\n')])
def test_a_damaged_result_is_one_line(name, text, tiny, tmp_path):
    write_tsv(tmp_path / "data", "mmstar", questions(1))
    Path("out").mkdir()
    Path("out", name).write_text(text + "\n")
    assert name in fails(*ask(tiny))

def test_full_disk_and_unwritable_folder_are_one_line(tiny, tmp_path):
    write_tsv(tmp_path / "data", "mmstar", questions(8))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        assert "responses so far are kept" in fails(*ask(tiny))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "responses so far are kept" in fails(*ask(tiny, "--out", "data/MMStar.tsv/out"))

@pytest.mark.parametrize("args, message", [
    ([], "run python stepgrpo.py first"), (["--benchmarks", "mmlu"], "mmlu"),
    (["--predictions", "x.jsonl"], "--benchmarks"), (["--batch-size", "0"], "positive")])
def test_wrong_arguments_are_one_line(args, message):
    assert message in fails(*args)

def test_benchmarks_asked_one_by_one_gather_in_one_table(tiny, tmp_path, capsys):
    for benchmark, row in (STATES, chartqa("5"), mme("No")):
        write_tsv(tmp_path / "data", benchmark, [row] * 2)
    for names in ("mmstar", "chartqa,mme"):
        ev.main(ask(tiny, "--benchmarks", names))
    table = Path("out/table.md").read_text()
    assert list(scores_of(Path("out"))) == ["mmstar", "chartqa", "mme"]
    assert "| R1-VL-2B (paper)         |      52.1 |" in table and table in capsys.readouterr().out
    ours = next(line for line in table.splitlines() if line.startswith(f"| {tiny}"))
    assert ours.count("–") == 6  # five benchmarks, and so no average
    assert "|  2048 |    45.8 |" in table
    ev.main(ask(tiny, "--limit", "1"))  # asked otherwise: not in one table
    assert [r["counts"]["rows"] for r in scores_of(Path("out")).values()] == [1]

def draw_miniatures(folder):
    script = HERE / "data" / "miniatures.py"
    subprocess.run([sys.executable, script, "--out", folder], check=True, capture_output=True)
    return {file.name: file.read_bytes() for file in folder.iterdir()}

def test_miniatures_are_always_the_same_and_their_right_answers_are_right(tmp_path):
    files = draw_miniatures(tmp_path / "one")
    assert files == draw_miniatures(tmp_path / "two")
    assert set(files) == {ev.BENCHMARKS[name].file for name in ev.PAPER}
    for name in ev.PAPER:
        rows = ev.read_rows(name, tmp_path / "one" / ev.BENCHMARKS[name].file)
        scores = [ev.score(name, row, f"The final answer is: {row['answer']}")
                  for row in rows.values()]
        assert len(rows) >= 12 and all(scores), name
        images = [ev.images_of(rows, row) for row in rows.values() if row["image"]]
        assert images and (name == "hallusionbench") == (len(images) < len(rows))

def test_a_run_over_all_miniatures_has_an_average(tiny, tmp_path, capsys):
    draw_miniatures(tmp_path / "data")
    ev.main(["--model", str(tiny), "--data", "data", "--out", "out", "--max-new-tokens", "2",
             "--batch-size", "64", "--device", "cpu"])
    table = capsys.readouterr().out
    assert table.count("2 without image") == 1
    ours = next(line for line in table.splitlines() if line.startswith(f"| {tiny}"))
    assert "–" not in ours

# ─── 9. data/report.py ────────────────────────────────────────────────────────────────────────────

def parse(source):
    """A page as a browser takes it → its tags with the names of their attributes, its text."""
    tags, text, parser = [], [], html.parser.HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append([tag, *dict(attributes)])
    parser.handle_data = text.append
    parser.feed(source)
    parser.close()
    return tags, "".join(text)

def a_completion(steps=("There are 7 objects.", "3 balls go.", "7 - 3 = 4"), answer="4", end=""):
    steps = "".join(f"### Step {i}: {step}\n" for i, step in enumerate(steps, 1))
    return (f"### Image Description: Seven.\n### Rationales: Subtract.\n{steps}"
            f"### The final answer is: {answer}{end}")

PAGE_KEYS = [["7 objects", "seven objects"], ["3 balls"], ["7 - 3 = 4", "7 minus 3 is 4"]]

def logged_group(texts, step=1, key_steps=PAGE_KEYS, **changes):
    row = sg.Row("data row 3", "How many?", "4", a_completion(), key_steps, [])
    completions = [{"text": text, "advantage": -1.5, **sg.score(text, row, sg.Config())}
                   for text in texts]
    return {"step": step, **row._asdict(), "completions": completions, **changes}

def an_update(step, kl=0.1):
    names = "reward", "right", "step_accuracy", "step_validity", "k", "length", "flat_groups"
    return {**dict.fromkeys(names, 0.5), "phase": "StepGRPO", "step": step, "kl": kl, "seconds": 2}

def an_evaluation(name, right):
    return {**an_update(1), "phase": "evaluation", "name": name, "questions": 100, "right": right}

def write_page(folder, metrics, groups, **settings):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(vars(sg.Config(**settings))))
    for name, records in (("metrics", metrics), ("samples", groups)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in records))
    return rep.write_report(folder).read_text(encoding="utf-8")

def test_page_shows_gain_curves_and_what_each_completion_earned(tmp_path):
    metrics = [{"phase": "warm-up", "step": 1, "loss": 3.0}, an_evaluation("before, greedy", 0.4),
               *map(an_update, (1, 2, 3)), an_evaluation("after, greedy", 0.65)]
    texts = [a_completion(["not 7 objects"], "5"), a_completion(), "words", a_completion()]
    source = write_page(tmp_path, metrics, [logged_group(texts)], steps=3)
    assert "StepGRPO 3/3, 2 s each" in source and "+0.250" in source and source.count("<svg") == 6
    _, best, wrong, none = (parse(card)[1] for card in source.split("<article>"))
    assert best.startswith("2.10 right 1 key steps 3/3: 0.10 StepRVR 1 2 alike")
    assert "✗ right: 4" in wrong and "missed: 7 objects · 3 balls · 7 - 3 = 4" in wrong
    assert "StepRAR 0: no answer" in none and "Here: no section" in none and "−1.50" in none

@pytest.mark.parametrize("bad", ["<script>1</script>", "</style>", "<!--", "]]>", "' onload='1",
                                 '"><img src=x onerror=1>', "&lt; <b>", "</details></article>"])
def test_no_text_of_model_or_data_becomes_a_tag(bad, tmp_path):
    def page(word):
        steps, end = (f"There are 7 objects. {word}", word), f"\n### Step 9: {word}"
        texts = [a_completion(steps, answer, end) for answer in (word, "4")]
        group = logged_group(texts, key_steps=[["7 objects"], [f"seven {word}"]], problem=word,
                             answer=word, where=word, images=[f"/nowhere/{word}"])
        metrics = [an_evaluation(f"{when}, {word}", 0.5) for when in ("before", "after")]
        return parse(write_page(tmp_path / word.replace("/", ""), metrics, [group], model=word))
    tags, text = page("x" + bad)
    assert tags == page("x")[0] and text.count(bad) > 20

def test_page_needs_nothing_from_elsewhere_and_a_missing_image_is_named(tmp_path):
    sg.Image.effect_noise((1600, 800), 80).save(tmp_path / "a.png")
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n")
    images = [str(tmp_path / name) for name in ("a.png", "gone.png", "torn.png")]
    source = write_page(tmp_path, [an_update(1)], [logged_group([a_completion()], images=images)])
    assert not re.search(r"https?:|url\(|@import|<script|<link|href", source)
    assert re.findall(r"src=(.{23})", source) == ["data:image/webp;base64,"]
    assert "gone.png" in source and "torn.png" in source and "2.10" in source

def test_torn_last_line_is_left_out_but_another_bad_line_is_named(tmp_path):
    write_page(tmp_path, map(an_update, (1, 2)), [logged_group([a_completion()])])
    with open(tmp_path / "samples.jsonl", "ab") as file:
        file.write('{"step": 1, "where": "é'.encode()[:-1])
    assert "StepGRPO 2/" in rep.write_report(tmp_path).read_text(encoding="utf-8")
    (tmp_path / "metrics.jsonl").write_text('{"phase": "St\n[]\n')
    command = [sys.executable, sg.HERE / "data" / "report.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "metrics.jsonl line 1 is no record" in done.stderr
    with pytest.raises(sg.UserError, match="nowhere is no run"):
        rep.write_report(tmp_path / "nowhere")

def test_run_without_updates_or_with_a_kl_that_is_no_number_has_a_page(tmp_path):
    for metrics in ([], [{"phase": "warm-up", "step": 1, "loss": 2.0}],
                    [an_evaluation("before, greedy", 0.4), an_update(1, kl=float("nan"))]):
        source = write_page(tmp_path, metrics, [])
        assert "0 of 0 logged groups" in source and " nan" not in source

def test_marks_stand_in_the_step_that_earned_them_and_change_no_text():
    rng, keys = random.Random(2), PAGE_KEYS + [["6/3 = 2"], ["balls"], ["x <y"]]
    words = "7 objects", "3 balls", "7 - 3 = 4", "not 3 balls", "7 - 3 = 4 / 2", "6÷3=2 cm", "x <y"
    for _ in range(60):
        text = a_completion([", ".join(rng.choices(words, k=rng.randint(1, 5))) for _ in range(3)])
        scored = {"text": text, "right": 1, "earned": sg.earned_key_steps(text, keys)}
        shown = rep.render_sections(scored, {"key_steps": keys}).split("<dd>")[3:6]
        for i, step in enumerate(sg.split_sections(text).steps):
            groups = [forms for forms, by in zip(keys, scored["earned"]) if by == i]
            marks = [parse(part)[1] for part in re.findall("<mark>(.*?)</mark>", shown[i])]
            assert parse(shown[i].split("</span>")[0])[1] == step
            assert len(marks) + shown[i].count("<small") == len(groups)
            assert all(sg.match_key_steps(f"### Step 1: {mark}", groups) for mark in marks)
    step = "not 3 balls, 7 - 3 = 4 / 2, but 3 balls and 7 - 3 = 4."
    assert [rep.find_span(step, forms) for forms in PAGE_KEYS[1:]] == [(32, 39), (44, 53)]

# ─── 10. Rewards in other frameworks, README ──────────────────────────────────────────────────────

def test_trl_rewards_take_what_trl_and_parquet_hand_over():
    right, wrong = a_path(answer="4"), a_path(steps=["x = 3"], answer="5")
    steps = {"Steps": [["x = 3"], ["y = 4"]]}

    class Array:  # as numpy's
        def __init__(self, items):
            self.items = items

        def tolist(self):
            return self.items

    as_arrays = Array([Array(["x = 3"]), Array(["y = 4"])])
    chat = [[{"role": "assistant", "content": right}],
            [{"role": "assistant", "content": [{"type": "text", "text": wrong}]}]]
    for completions in ([right, wrong], chat):
        for keys in (steps, as_arrays, (("x = 3",), ("y = 4",))):
            columns = {"solution": [right, 4], "key_steps": [keys, keys], "image": ["a", "b"],
                       "prompts": ["?", "?"], "completions": completions}
            assert sg.trl_step_accuracy(**columns) == pytest.approx([1.1, 0.05])
            assert sg.trl_step_validity(**columns) == [1, 1]
    with pytest.raises(ValueError, match="empty"):  # sections, but no answer in the reference
        sg.trl_step_accuracy([right], ["### Step 1:\nx = 3"], [steps])
    with pytest.raises(ValueError):  # a column that is too short is no wrong answer
        sg.trl_step_accuracy([right, wrong], ["4"], [steps, steps])

def test_verl_gets_its_score_from_a_file_that_it_loads_by_path():
    spec = importlib.util.spec_from_file_location("custom_module", HERE / "stepgrpo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    extra = {"key_steps": [["x = 3"], ["y = 4"]], "index": 0}
    score = module.verl_compute_score(data_source="mine", solution_str=a_path(), ground_truth="4",
                                      extra_info=extra, reward_router_address=None)
    assert score == pytest.approx({"score": 2.1, "step_accuracy": 1.1, "step_validity": 1})
    assert sg.verl_compute_score("mine", "no answer", a_path(), extra)["score"] == 0

def trl_trainer(tmp_path):
    pytest.importorskip("trl", reason="trl is not installed: its GRPOTrainer was not tried")
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    from trl import GRPOConfig, GRPOTrainer
    published = write_published_checkpoint(tmp_path / "published", "qwen2_vl")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(published / "tokenizer.json"),
                                        eos_token="<|im_end|>", pad_token="<|endoftext|>")
    Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)).save_pretrained(tmp_path / "policy")
    model = Qwen2ForCausalLM.from_pretrained(tmp_path / "policy")  # TRL reads the reference there
    keys = {"Steps": [["x = 3"], ["y = 4"]]}
    data = Dataset.from_list([{"prompt": "How many?", "solution": a_path(), "key_steps": keys}] * 8)
    args = GRPOConfig(output_dir=str(tmp_path / "out"), max_steps=2, num_generations=4, beta=0.04,
                      per_device_train_batch_size=4, max_completion_length=8, report_to=[],
                      logging_steps=1, use_cpu=True, save_strategy="no", loss_type="grpo",
                      use_bias_correction_kl=False)
    return GRPOTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer,
                       reward_funcs=[sg.trl_step_accuracy, sg.trl_step_validity])

def test_a_real_trl_trainer_trains_with_the_step_rewards(tmp_path):
    trainer = trl_trainer(tmp_path)
    trainer.train()
    logged = [x for x in trainer.state.log_history if "rewards/trl_step_validity/mean" in x]
    assert len(logged) == 2 and all("rewards/trl_step_accuracy/mean" in x for x in logged)

def test_trls_grpo_loss_and_gradient_equal_ours_to_the_last_bit(tmp_path):
    """TRL's default is another mean, and a KL that is weighted by the ratio."""
    trainer = trl_trainer(tmp_path)
    logps, old, ref, A, mask = random_objective()
    leaves = [logps.clone().requires_grad_() for _ in range(2)]
    trainer._get_per_token_logps_and_entropies = lambda *args, **more: (
        leaves[0], torch.zeros_like(logps), None)
    trainer.current_gradient_accumulation_steps = 1
    ids = torch.ones_like(mask, dtype=torch.long)
    theirs = trainer._compute_loss(trainer.model, {
        "prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": mask.int(),
        "advantages": A, "old_per_token_logps": old, "ref_per_token_logps": ref,
        "num_items_in_batch": mask.sum()})
    ours, _ = sg.grpo_loss(leaves[1], old, ref, A, mask, clip=0.2, beta=0.04)
    theirs.backward()
    ours.backward()
    assert torch.equal(theirs, ours) and torch.equal(leaves[0].grad, leaves[1].grad)
    rewards = torch.tensor([[1.1, 0.05, 2.1, 0.0], [1.0, 1.0, 0.1, 2.1]])
    text = Path(sys.modules[type(trainer).__module__].__file__).read_text()
    assert "advantages / (std_rewards + 1e-4)" in text  # it is inside a method of 300 lines
    from trl.trainer.utils import nanstd
    std = nanstd(rewards, dim=1)[:, None]
    theirs = (rewards - rewards.mean(1, keepdim=True)) / (std + 1e-4)
    assert torch.allclose(theirs, sg.group_advantages(rewards), atol=1e-6)

README = (HERE / "README.md").read_text(encoding="utf-8")

def readme_blocks(kind):
    return re.findall(rf"```{kind}\n(.*?)```", README, re.S)

def run_python(*args, **more):
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, **more)

def test_the_walk_through_of_the_readme_is_what_explain_prints():
    done = run_python(HERE / "data" / "explain.py")
    printed = done.stdout[done.stdout.index("── 1"):].split("\n\n")
    assert done.returncode == 0 and len(printed) == 8, done.stderr
    shown = [block.strip() for block in readme_blocks("text") if block.startswith("── ")]
    assert shown == [block.strip() for block in printed]

def test_every_command_of_the_readme_starts_a_script_that_knows_its_flags():
    lines = "\n".join(readme_blocks("bash")).split("\n")
    commands = [line.split("#")[0].strip() for line in lines if re.match(r"python \S+\.py", line)]
    assert len(commands) > 8
    for line in commands:
        script, *flags = shlex.split(line)[1:]
        assert (HERE / script).exists(), line
        if script == "stepgrpo.py" and "--resume" not in flags:
            sg.parse_config(flags)

def test_the_python_blocks_of_the_readme_run():
    for block in readme_blocks("python"):
        if "trl" not in block:
            done = run_python("-c", block, cwd=HERE)
            assert done.returncode == 0, done.stderr
            assert done.stdout.split("\n")[:-1] == re.findall(r"# → (.*)", block)

def test_functions_to_copy_together_run_in_an_empty_module(tmp_path):
    """The README's table: each row, pasted with the imports of stepgrpo.py, needs nothing else."""
    text = (HERE / "stepgrpo.py").read_text()
    imports = "\n".join(ast.get_source_segment(text, node) for node in ast.parse(text).body
                        if isinstance(node, (ast.Import, ast.ImportFrom)))
    starts = [m.start() for m in re.finditer(r"^# ─── \d+\.", text, re.M)] + [len(text)]
    table = re.findall(r"^\| `(\w+)`.*? \| sections? ([\d, ]+) \|", README, re.M)
    assert len(table) >= 4
    for name, where in table:
        parts = [text[starts[int(n) - 1]:starts[int(n)]] for n in where.split(", ")]
        code = imports + "\nclass UserError(Exception): pass\n" + "\n".join(parts)
        file = tmp_path / f"{name}.py"
        file.write_text(code.split('if __name__ == "__main__"')[0])
        spec = importlib.util.spec_from_file_location(name, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if name == "step_accuracy_reward":
            assert module.step_accuracy_reward(a_path(), "4", [["x = 3"]]) == 1.1
            assert module.step_validity_reward(a_path()) == 1
        if name == "group_advantages":
            assert torch.isfinite(module.grpo_loss(*random_objective())[0])
        assert callable(getattr(module, name))

# SPDX-License-Identifier: MIT
"""StepGRPO in one file: teach a vision-language model to reason, with step-wise rewards and no judge.

    python stepgrpo.py                                          # ten minutes on a laptop, nothing to download
    python stepgrpo.py --model Qwen2-VL-2B --data my.jsonl      # a real checkpoint on one CUDA GPU
    python stepgrpo.py --resume --out runs/tiny                 # go on where Ctrl-C stopped
    torchrun --nproc-per-node 8 stepgrpo.py --model Qwen2-VL-7B --data my.jsonl --questions 16      # several GPUs
    python stepgrpo.py --explain                                # one question through every step, printed
    python stepgrpo.py --bench                                  # how fast, and what takes the time and memory

The method (R1-VL, arXiv 2503.12937) and the function that does each step. The file goes from the parts to the whole:
template, config, data, segmentation, rewards, model, rollout, objective, optimiser, training, main.

    warm-up     fine-tune on reference paths, so that the policy knows the template             warm_up
    rollout     sample a group of G reasoning paths for each image question                     rollout
    rewards     score each path: key steps and answer (StepRAR), completeness and order (StepRVR)
                                                                step_accuracy_reward, step_validity_reward
    advantages  normalise the rewards inside each group                                         group_advantages
    objective   clipped policy gradient, KL to the frozen warm-up policy (the reference)        grpo_loss

Where this differs from the paper (P) or from its official code (C), and why:

     1. P, C  clip of the ratio at 1 ± 0.2. It acts only for several inner updates per rollout; the default is one,
              as in both, and then the ratio is 1 and the clip never bites.
     2. C     a path without a final answer scores 0 in StepRAR, as the paper says (the code still pays α·k).
     3. C     the final answer is read from its own section; the code searches the whole path, so that a right number
              in a step can rescue a wrong answer.
     4. P, C  key steps match whole words and whole numbers, after LaTeX, spacing and operators are folded; the code
              looks for substrings ("2" in "12"). Ours alone: a negated match does not count, and one step can earn
              only part of the key steps, so that a dump of key words does not beat an honest path.
     5. C     StepRVR asks, as the paper does, that description and rationale come first, that no section is empty, and
              for exactly one answer with no step after it; the code pays an empty skeleton.
     6. C     no prompt is cut: one that is too long is an error which names the row. Images become RGB.
     7. C     log-probs use the sampling temperature (the 7B trainer there samples at another one).
     8. C     one GPU and one process are enough; all G paths of a question share one encoding of image and prompt, in
              sampling (KV cache) and in the update (one packed forward).

Letters in shape comments: Q questions, G paths per question, B = Q·G rows, P prompt tokens, C completion tokens,
N tokens of a packed row, H hidden size, h key-value heads of r query heads each, D size of a head, V vocabulary, K
key-step groups. A path is a reasoning path, the text that the model writes; where a file is meant, it is called file or
folder.
"""
import argparse
import collections
import contextlib
import functools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import weakref
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from PIL import Image, ImageOps
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (AutoConfig, AutoModelForImageTextToText, AutoTokenizer, Qwen2Tokenizer, Qwen2VLConfig,
                          Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil)

HERE = Path(__file__).resolve().parent


# ─── 1. Template ──────────────────────────────────────────────────────────────────────────────────────────────────────

# Word for word from the official evaluation and the warm-up data: the quote that never closes and the space after the
# last header are theirs.
INSTRUCTION = """Generate an image description based on the question.
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
### The final answer is: 

{question}"""


def build_instruction(question):
    """The user's turn for one question, without the image. Needs INSTRUCTION."""
    return INSTRUCTION.replace("{question}", question)  # not str.format: a question may hold braces of its own


# ─── 2. Config ────────────────────────────────────────────────────────────────────────────────────────────────────────

SHORT_NAMES = {
    "Qwen2-VL-2B": "Qwen/Qwen2-VL-2B-Instruct", "Qwen2-VL-7B": "Qwen/Qwen2-VL-7B-Instruct",
    "Qwen2.5-VL-3B": "Qwen/Qwen2.5-VL-3B-Instruct", "R1-VL-2B": "jingyiZ00/R1-VL-2B", "R1-VL-7B": "jingyiZ00/R1-VL-7B",
}


class UserError(Exception):
    """Something the user can mend: says what is wrong, where, and what to do. main() prints it without a traceback."""


class NonFinite(UserError):
    """Numbers have become inf or nan. `harmed`: the weights too, so they must not be saved."""

    def __init__(self, message, harmed):
        super().__init__(f"{message}. The checkpoint holds a state before this; try a lower learning rate")
        self.harmed = harmed


def knob(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """Every setting; each help says whether its default is the paper's, the official code's or ours. This is --help."""
    model: str = knob("tiny", "tiny, a short name (" + ", ".join(SHORT_NAMES) + "), a Hub id or a local folder")
    data: str = knob("shapes", "training questions: shapes, a .json or .jsonl file (R1-VL-10K format), or a Hub id")
    warmup_data: str = knob("", "reference paths for the warm-up (Mulberry or R1-VL-10K format); '' = those of shapes "
                                "with --data shapes, else no warm-up")
    out: str = knob("", "run folder; '' = runs/<name of the model>")
    seed: int = knob(0, "of data order, sampling and the tiny model's initial weights")
    device: str = knob("auto", "auto = cuda when there is one, else cpu")
    dtype: str = knob("auto", "of weights in sampling and training: auto = bfloat16 on cuda, float32 on cpu")
    resume: bool = knob(False, "go on with the run in --out, with the settings saved there")
    overwrite: bool = knob(False, "delete the run in --out first")

    warmup_steps: int = knob(-1, "updates of the warm-up; -1 = two epochs of the data (paper); 0 = none")
    warmup_batch: int = knob(128, "paths per warm-up update (paper)")
    warmup_lr: float = knob(1e-5, "peak learning rate of the warm-up, cosine (paper, 2B; 5e-6 for 7B)")
    warmup_ratio: float = knob(0.03, "share of the warm-up in which its learning rate rises (official code)")

    steps: int = knob(13125, "StepGRPO updates (official code)")
    questions: int = knob(4, "Q, questions per update (official code, 2B; 16 for 7B)")
    group_size: int = knob(4, "G, paths sampled per question (paper: M)")
    temperature: float = knob(1.2, "of sampling, and of every log-prob in the objective (paper)")
    max_new_tokens: int = knob(1024, "completion limit, tokens (paper)")
    reward: str = knob("step", "step = StepRAR + StepRVR | outcome = right answer only (plain GRPO) | "
                               "accuracy = StepRAR alone | validity = StepRVR alone")
    alpha: float = knob(0.1, "weight of the matched key steps in StepRAR (paper)")
    beta: float = knob(0.04, "weight of the KL to the reference (paper); 0 = no reference is held")
    clip: float = knob(0.2, "ε, clip range of the ratio (ours: acts only when --inner-updates > 1)")
    inner_updates: int = knob(1, "μ, optimiser steps per rollout (paper and official code: 1)")
    lr: float = knob(1e-6, "peak learning rate of StepGRPO, linear decay to 0 (paper, official code)")
    max_grad_norm: float = knob(1.0, "gradient norm is clipped to this, here and in the warm-up (official code)")
    skip_flat_groups: bool = knob(False, "draw other questions for groups whose rewards are all equal (ours; as DAPO)")

    instruction: bool = knob(True, "wrap questions in the R1-VL instruction that asks for the template")
    max_pixels: int = knob(400_000, "larger images are shrunk to this, pixels (official code)")
    max_prompt_tokens: int = knob(2048, "longer prompts, image tokens included, are errors; nothing is ever cut (ours)")
    skip_bad_rows: bool = knob(False, "go on without the rows that do not validate")
    held_out: int = knob(200, "questions to evaluate on before and after, never trained on; 0 = no evaluation (ours)")

    micro_batch: int = knob(1, "questions per forward and backward; any number gives the same gradient (memory, speed)")
    gradient_checkpointing: bool = knob(True, "recompute activations in backward: less memory, one more forward")
    cuda_graph: bool = knob(True, "on cuda: capture the decoding step as a CUDA graph (faster sampling, same tokens)")
    offload_optimizer: bool = knob(False, "keep fp32 weights, gradients and moments in host memory (24 GB GPUs)")
    save_every: int = knob(100, "updates between checkpoints")
    show_every: int = knob(10, "updates between two printed sample paths")


# What `--model tiny` changes. A million random weights need larger steps than two billion trained ones, and a task this
# small needs fewer of them; the method is the same.
TINY = dict(
    warmup_steps=3000, warmup_batch=8, warmup_lr=2e-3, warmup_ratio=0.05,    # it must first learn to see
    steps=100, questions=8, group_size=8, lr=3e-4,     # few and fresh weights bear 300 times the paper's rate
    temperature=1.0,                                   # its distribution is broad already
    beta=0.01,                                         # the warm-up policy is a weak anchor: let it go further
    max_new_tokens=192, max_prompt_tokens=256,
    instruction=False,                                 # the warm-up teaches the template, so 130 tokens are saved
    micro_batch=8, gradient_checkpointing=False,       # it all fits in memory
    dtype="float32",                                   # a million weights gain nothing from bf16
    held_out=500, save_every=100,
)


def parse_config(argv):
    """Command line → Config. Flags are the field names; unknown flags and impossible values are errors."""
    def parser(defaults):
        p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                    epilog="; ".join(f"{flag} alone runs data/{file}" for flag, file in TOOLS.items()),
                                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        for f in fields(Config):
            default = defaults.get(f.name, f.default)
            kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
            p.add_argument("--" + f.name.replace("_", "-"), default=default, help=f.metadata["help"], **kind)
        return p

    first = parser({}).parse_args([a for a in argv if a not in ("-h", "--help")])
    defaults = dict(TINY) if first.model == "tiny" else {}
    cfg = Config(**vars(parser(defaults).parse_args(argv)))
    cfg.out = cfg.out or f"runs/{Path(cfg.model).name}"
    if cfg.resume:
        cfg = resumed_config(cfg, parser, argv)
    check_config(cfg)
    return cfg


def resumed_config(cfg, parser, argv):
    """The settings saved in the run folder; flags given beside --resume change them, and are named."""
    file = Path(cfg.out) / "config.json"
    if not file.exists():
        raise UserError(f"nothing to resume: {file} does not exist. Start without --resume, or name the run with --out")
    saved = json.loads(file.read_text())
    new = Config(**(vars(parser(saved).parse_args(argv)) | {"out": cfg.out}))
    for name in ("model", "data", "warmup_data", "seed", "held_out"):
        if getattr(new, name) != saved[name]:
            raise UserError(f"--{name.replace('_', '-')} cannot change on --resume: {file} says {saved[name]!r}")
    for name, value in saved.items():
        if getattr(new, name) != value and name not in ("resume", "overwrite"):
            print(f"resume: {name} {value!r} → {getattr(new, name)!r}")
    return new


def check_config(cfg):
    rules = [
        (cfg.group_size >= 2, "--group-size must be at least 2: a path is judged against the others of its group"),
        (cfg.reward in ("step", "outcome", "accuracy", "validity"), "--reward is step, outcome, accuracy or validity"),
        (cfg.dtype in ("auto", "float32", "bfloat16"), "--dtype is auto, float32 or bfloat16"),
        (cfg.temperature > 0, "--temperature must be above 0: greedy paths of a group are all the same"),
        (not (cfg.resume and cfg.overwrite), "--resume and --overwrite exclude each other"),
        (cfg.warmup_steps >= -1, "--warmup-steps is -1 (two epochs), 0 (none) or a number of updates"),
        (cfg.clip < 1 and 0 <= cfg.warmup_ratio < 1, "--clip and --warmup-ratio lie below 1"),
        (cfg.max_pixels >= 56 * 56, "--max-pixels must be at least 56 × 56 = 3136, the smallest image of Qwen2-VL"),
    ]
    for name in ("questions", "max_new_tokens", "inner_updates", "micro_batch", "warmup_batch", "save_every",
                 "show_every", "lr", "warmup_lr", "max_grad_norm", "clip", "max_prompt_tokens"):
        rules.append((getattr(cfg, name) > 0, f"--{name.replace('_', '-')} must be above 0"))
    for name in ("steps", "held_out", "alpha", "beta", "warmup_ratio"):
        rules.append((getattr(cfg, name) >= 0, f"--{name.replace('_', '-')} must not be negative"))
    wrong = [message for ok, message in rules if not ok]
    if wrong:
        raise UserError("; ".join(wrong))


# ─── 3. Data ──────────────────────────────────────────────────────────────────────────────────────────────────────────

REFLECTIVE = "I think I have made a mistake. Let me rethink it."      # the official warm-up leaves such paths out


class Row(NamedTuple):
    """One question. `where` names file and row, for every message about it."""
    where: str
    problem: str
    answer: str
    path: str                # reference path, or the bare answer if the data holds no paths
    key_steps: list          # groups of equivalent forms, [] if the data holds none
    images: list             # paths of image files


def read_records(file):
    """A .json list or a .jsonl file → list of (where, record); records of .jsonl are still text."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
        if file.suffix == ".jsonl":                            # not splitlines: it also cuts at U+2028 inside a string
            return [(f"{file} line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        records = json.loads(text)
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {file}: {e}") from None
    if not isinstance(records, list):
        raise UserError(f"{file} holds no list of records; data/README.md shows the format")
    return [(f"{file} row {i}", record) for i, record in enumerate(records, 1)]


def parse_record(where, record, folder):
    """A record in R1-VL-10K or Mulberry (ShareGPT) format → Row. ValueError says what is wrong with it."""
    record = json.loads(record) if isinstance(record, str) else record
    if not isinstance(record, dict):
        raise ValueError("is no JSON object")
    if "messages" in record:
        try:
            turns = {m["role"]: m["content"] for m in record["messages"]}
            problem, path, images = turns["user"], turns["assistant"], record.get("images") or []
        except (KeyError, TypeError):
            raise ValueError("'messages' must hold a user and an assistant turn with 'content'") from None
    else:
        missing = {"problem", "solution"} - record.keys()
        if missing:
            raise ValueError(f"has no {' and no '.join(map(repr, sorted(missing)))}")
        problem, path, images = record["problem"], record["solution"], record.get("image_path") or []
    if not isinstance(problem, str) or not isinstance(path, (str, int, float)):
        raise ValueError("problem and solution must be text")
    header = INSTRUCTION.split("{question}")[0].rstrip().split("\n")[-1]      # Mulberry's questions stand below it
    problem, path = problem.replace("<image>", "").split(header)[-1].strip(), str(path).strip()
    answer = solution_answer(path)
    if not problem:
        raise ValueError("the problem is empty")
    if not strip_decoration(answer or ""):
        raise ValueError("the solution holds no answer")
    images = [(folder / str(image)).resolve() for image in (images if isinstance(images, list) else [images])]
    for image in images:
        if not os.path.isfile(image):                          # image.is_file() raises for a name that is too long
            raise ValueError(f"image {image} does not exist")
    key_steps = parse_key_steps(record["key_steps"]) if record.get("key_steps") else []
    return Row(where, problem, answer, path, key_steps, images)


def read_rows(source, needs_key_steps=False):
    """File or Hub id → (rows, complaints); a complaint is '(file) (row): what is wrong'."""
    with first_rank_first():
        file = find_data(source)
    rows, complaints = [], []
    for where, record in read_records(file):
        try:
            row = parse_record(where, record, file.parent)
            if needs_key_steps and not row.key_steps:
                raise ValueError("has no key_steps; data/key_steps.py makes them, or choose --reward outcome")
            rows.append(row)
        except (ValueError, OSError) as e:
            complaints.append(f"{where}: {e}")
    return rows, complaints


def find_data(source):
    """shapes, a file, or a dataset on the Hub → the file to read. Draws the shapes set if it is not there yet."""
    if source in ("shapes", "shapes/test", "shapes/warmup"):
        folder = HERE / "data" / "shapes"
        if not all((folder / f"{split}.json").exists() for split in ("train", "warmup", "test")):
            print("drawing the shapes data set")
            subprocess.run([sys.executable, HERE / "data" / "shapes.py"], check=True)
        return folder / {"shapes": "train.json", "shapes/test": "test.json", "shapes/warmup": "warmup.json"}[source]
    if Path(source).is_file():
        return Path(source)
    if source.count("/") != 1 or Path(source).suffix in (".json", ".jsonl"):
        raise UserError(f"data file {source} does not exist")
    try:
        folder = Path(huggingface_hub.snapshot_download(source, repo_type="dataset"))
    except (OSError, ValueError) as e:
        raise UserError(f"cannot get data set {source} from the Hub ({type(e).__name__}). Download it elsewhere "
                        "and pass the file: --data FILE.json") from None
    files = sorted(f for f in folder.rglob("*") if f.suffix in (".json", ".jsonl"))
    archives = [f.name for f in folder.rglob("*") if f.suffix in (".zip", ".tar", ".gz")]
    if archives:
        print(f"{folder} holds archives ({', '.join(archives[:3])}); unpack them there if images are reported missing")
    if len(files) != 1:
        raise UserError(f"{folder} holds {len(files)} .json files; pass the one to use: --data FILE.json")
    return files[0]


def fitted_size(width, height, max_pixels):
    """(width, height) of an image as the model gets it: at most max_pixels, and at most 100 times as long as wide, by
    margins that `load_image` adds (Qwen2-VL refuses more than 200)."""
    thinnest = math.ceil(max(width, height) / 100)
    width, height = max(width, thinnest), max(height, thinnest)
    shrink = min(1.0, (max_pixels / (width * height)) ** .5)
    return max(1, int(width * shrink)), max(1, int(height * shrink))


def image_size(file, max_pixels):
    """Size that load_image will give, from the file's header."""
    with Image.open(file) as image:
        # EXIF orientation: a quarter turn. Asking a PNG would read all of it; the number of pixels is the same anyway.
        turned = image.format != "PNG" and image.getexif().get(0x0112, 1) >= 5
        return fitted_size(*(image.size[::-1] if turned else image.size), max_pixels)


def load_image(file, max_pixels):
    """Image file of any mode and size → upright RGB image of `fitted_size`. UserError if it cannot be read."""
    try:
        image = ImageOps.exif_transpose(Image.open(file))
        if image.mode.startswith(("I", "F")):                  # 16 bits or floats: to the range of 8
            low, high = image.getextrema()
            scale = 255 / max(high - low, 1e-9)
            image = image.convert("F").point(lambda value: value * scale - low * scale).convert("L")
        if image.has_transparency_data:                        # transparent means white, as on a page
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        image, size = image.convert("RGB"), fitted_size(*image.size, max_pixels)
    except (OSError, SyntaxError, Image.DecompressionBombError) as e:
        raise UserError(f"cannot read image {file}: {e}") from None
    return image if image.size == size else ImageOps.pad(image, size, Image.BICUBIC, color="white")


def validate(splits, complaints, processor, cfg):
    """Lists of rows → the same without rows that cannot be used; or stops and names all of those at once."""
    good = [[] for _ in splits]
    for rows, kept in zip(splits, good):
        for row in tqdm(rows, "validate", unit="row", leave=False, delay=2, mininterval=1):
            try:
                sizes = [image_size(file, cfg.max_pixels) for file in row.images]
                tokens = processor.prompt_length(question_text(row, cfg), sizes)
                if tokens > cfg.max_prompt_tokens:
                    raise ValueError(f"the prompt has {tokens} tokens, --max-prompt-tokens is {cfg.max_prompt_tokens}")
                kept.append(row)
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
                complaints.append(f"{row.where}: {e}")
    if complaints and not cfg.skip_bad_rows:
        shown = complaints[:50] + [f"… and {len(complaints) - 50} more"] * (len(complaints) > 50)
        raise UserError("\n  ".join([f"{len(complaints)} rows cannot be used:", *shown]) +
                      "\nMend them (data/README.md shows the format), or go on without them: --skip-bad-rows")
    if complaints:
        print(f"skipped {len(complaints)} bad rows, the first: {complaints[0]}")
    return good


# ─── 4. Segmentation and answers ──────────────────────────────────────────────────────────────────────────────────────

# A header opens a line. `##` without a known name is a foreign header: it only ends the section before it.
# Linear time on hostile lines: only the leading class can be retried, a line has one start, and the tail never fails.
_HEADER = re.compile(
    r"^(?P<marks>[ \t#*]*)"
    r"(?:(?:(?P<description>image +description)|(?P<rationale>rationales?)|step *(?P<number>\d{1,4})"
    r"|(?P<reasoning>let['’‘]?s +think +step +by +step)|(?P<answer>the +final +answer +is))(?!\w)|(?<=##))"
    r"[ \t]*\**[ \t]*(?:(?P<colon>[:：])|\.(?!\d))?\**",
    re.IGNORECASE | re.MULTILINE,
)


class Sections(NamedTuple):
    """One sampled path, cut at its headers. None: the header is absent. '': nothing stands under it."""

    description: str | None
    rationale: str | None
    steps: list[str]  # texts, in order of appearance
    answer: str | None  # raw text of the LAST final-answer section
    order: list[str]  # headers as they appear: description, rationale, reasoning, step 1, step 2, ..., answer


def split_path(text):
    """Cut a path into the sections of the template. The one place that reads headers.

    Case, spaces, the number of #, bold and a missing colon are forgiven. The answer header also counts without #
    when a colon or bold marks it; a sentence that merely begins 'The final answer is' does not.
    Text before the first header, or under a foreign one, belongs to no section. Needs _HEADER, Sections.
    """
    headers = [
        m for m in _HEADER.finditer(text)
        if "#" in m["marks"] or (m["answer"] and (m["colon"] or "**" in m["marks"]))
    ]
    ends = [m.start() for m in headers[1:]] + [len(text)]
    last, steps, order = {}, [], []
    for header, end in zip(headers, ends):
        body = text[header.end():end].strip()
        name = next((n for n in ("description", "rationale", "reasoning", "answer") if header[n]), None)
        if header["number"]:
            name = f"step {int(header['number'])}"
            steps.append(body)
        if name == "answer" and order[-1:] == ["answer"] and not last["answer"] and "#" not in header["marks"]:
            order.pop()  # the header, said again in its own section, as the instruction's wording suggests
        if name:
            last[name] = body
            order.append(name)
    return Sections(last.get("description"), last.get("rationale"), steps, last.get("answer"), order)


# Answers and key steps are compared in one plain spelling. These tables make it: signs, words that mean signs, LaTeX.
_SYMBOLS = str.maketrans(
    {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # full-width letters and digits
    | {ord(old): new for old, new in zip("−–×·⋅÷⁄—’‘", "--***//;''")}
    | {ord(old): " " for old in '$"“”`&~'}
    | {ord("²"): "^2", ord("³"): "^3", ord("½"): " 1/2", ord("√"): " √", ord("π"): " π "}
)
_WORDS = {  # symbol: the words and LaTeX commands that mean it
    " * ": "times|cdot|multiplied by", " / ": "div|divided by", " + ": "plus", " - ": "minus",
    " = ": "equals|is equal to|equal to", " √": "sqrt|square root of", " π ": "pi", "°": "circ|degrees?",
    " % ": "percent", "≠": "neq", "≤": "leq", "≥": "geq",
}
_ONCE = [  # (pattern, replacement), applied in this order
    (r"\{,\}|\\,(?=\d{3})", ","),  # LaTeX thousands: 1{,}234
    (r"(?<![\d.,(\[])\d{1,3}(?:,\d{3})+(?!,?\d)", lambda m: m[0].replace(",", "")),  # 1,234 but not (100,200) or 1,2,3
    (r"\n[ \t]*[-*•][ \t]+", " ; "),  # a bullet is not a minus
    (r"\*\*+|\\(?:left|right|displaystyle|q?quad)(?![a-z])|\\[\\,;:! ()\[\]]|\s+", " "),  # bold, LaTeX layout
    *((rf"\\?(?<![a-z])(?:{words})(?![a-z])", symbol) for symbol, words in _WORDS.items()),
    (r"(?<=\d) ?x ?(?=\d)", "*"),  # 3 x 4
    (r" ?\^ ?\{? ?° ?\}?", "°"),  # 90^{\circ}
    (r"(?<=\w)'s\b", ""),  # the triangle's area
]
_NESTED = [  # repeated from the innermost braces outwards
    (r"\\[dtc]?frac ?(?:\{([^{}]*)\}|(\d)) ?(?:\{([^{}]*)\}|(\d))", r" (\1\2)/(\3\4)"),  # space: 2\frac12 is 2 1/2
    (r"([√^]) ?\{([^{}]*)\}", r"\1(\2)"),
    (r"_ ?\{([^{}]*)\}", r"_\1"),  # an index belongs to its word: x_1 is one token
    (r"\\(?:text|math|boxed|mbox|operatorname)[a-z]* ?\{([^{}]*)\}", r" \1 "),
    (r"(?<![\w)])\( ?(-? ?√? ?\w+(?:\.\w+)?) ?\)", r" \1 "),  # (3) is 3, but 2(3) is no 23
    (r"(?<![\w)^√/])\(([\w. √]+)\)(?= ?/)", r" \1 "),  # (2√3)/5 is 2√3/5
    (r" +", " "),
]
_TOKEN = re.compile(  # a number, signed after a word ('is -3'); a word with its index or n't; any other sign
    r"(?:(?<=[a-z]{2} )-)?\d+(?:\.\d+)?(?:e[-+]?\d+\b)?|\.\d+|[^\W\d]\w*(?:'\w+)?|[^\w\s\\{}#']"
)


@functools.lru_cache(maxsize=8192)                          # the same forms are asked for with every path of a group
def canonical(text):
    """One plain spelling for all ways to write the same words and formulas: tokens joined by single spaces.

    '\\frac{6}{3} = 2', '6÷3=2' and '6 divided by 3 equals 2' all become '6 / 3 = 2'. A number is one token, so
    whoever compares whole tokens never finds 3 in 13, 3.5, 1,300 or -3. Nothing is evaluated: '9**9**9' is text.
    Time is linear in the text; callers bound its length. Needs _SYMBOLS, _ONCE (from _WORDS), _NESTED, _TOKEN.
    """
    text = text.lower().translate(_SYMBOLS)
    for pattern, plain in _ONCE:
        text = re.sub(pattern, plain, text)
    for _ in range(6):  # honest formulas nest two or three deep; a bound keeps hostile ones from costing more
        before = text
        for pattern, plain in _NESTED:
            text = re.sub(pattern, plain, text)
        if text == before:
            break
    tokens = (t.rstrip("0").rstrip(".") if "." in t[1:] and "e" not in t else t for t in _TOKEN.findall(text))
    text = " ".join(tokens)  # 3.50 has become 3.5
    # Nothing or an operator before + or -: it is the sign of the number, not a sum. '= - 3' gives '= -3'.
    text = re.sub(r"(?<![\w)\]%°!] )(?:(-)|\+) (?=[\d.])", r"\1", text)
    text = re.sub(r" \*(?= [^\W\d]| √| \()|(?<=[^\W\d]) \*", "", text)  # 2 * x is 2x
    return text.rstrip(" .,;:")


def strip_decoration(text):
    """Remove what surrounds an answer: bold, $, quotes, \\( \\), \\[ \\], \\boxed{}, \\text{}, a trailing period."""
    for _ in range(8):  # layers; each round peels at least one
        before = text
        text = text.strip(" \t\r\n*$`\"'“”‘’").rstrip(".")
        if text[:2] + text[-2:] in (r"\(\)", r"\[\]"):
            text = text[2:-2]
        text = re.sub(r"\A\\(?:boxed|text\w*|math\w+) ?\{((?:[^{}]|\{[^{}]*\})*)\}\Z", r"\1", text)
        if text == before:
            break
    return text


def final_answer(text):
    """The answer a path commits to: what stands under its LAST answer header, undecorated; None when there is none.

    Only the header counts. The official code searches the whole completion, so a right number in a step rescues
    a wrong answer. Needs split_path, strip_decoration.
    """
    # The instruction asks for 'The final answer is: xxx', so some paths say it again under the header.
    answer = re.sub(r"\A\W*(?:the )?(?:final )?answer is\b[ :]*", "", split_path(text).answer or "", flags=re.I)
    return strip_decoration(answer) or None


# 'C', '(C)', 'C.', 'C: 123', '(C) 123', 'option C'; 'A dog' is no option. A second marker means no choice was made.
_OPTION = re.compile(r"(?:(?:option|choice) +)?(?:\(([a-h])\)|([a-h])(?=[.:)]|\Z))[.:)]?(.*)", re.I | re.S)
_MARKER = re.compile(r"\([a-h]\)|\b[A-H][.:)]")


def split_option(text):
    """'(C) 123' → ('c', ' 123'); 'C' → ('c', ''); ('', text) when no option is chosen. Needs _OPTION, _MARKER."""
    match = _OPTION.fullmatch(text)
    if not match or _MARKER.search(match[3]):
        return "", text
    return (match[1] or match[2]).lower(), match[3]


# Digits and exponents are bounded: int() refuses 4,301 digits, and 1e999999999 would fill the memory.
_NUM = r"-?(?:\d{1,60}(?:\.\d{1,60})?|\.\d{1,60})(?:e[-+]?\d{1,3})?"
_UNIT_WORD = (  # any longer word may name what is counted, but short ones are often variables: 5x, 2ab
    r"(?!(?:and|not|squared|cubed|hundred|thousand|million|billion)\b)[^\W\d_]{3,}"
    r"|[mgslhvwjcf]|[cdkmn]m|[km]g|ml|ft|in|hr|hz|am|pm|mi|lb|oz|of|°|%|/"
)
_QUANTITY = re.compile(
    rf"(?:(-?\d{{1,60}}) (?=\d+ / ))?({_NUM})(?: / ({_NUM}))?((?: (?:{_UNIT_WORD})(?![^ ])(?: \^ -?[23])?){{0,4}})"
)
_SHORT_UNITS = [("centi", "c"), ("kilo", "k"), ("milli", "m"), ("metre", "m"), ("meter", "m"), ("gram", "g"),
                ("second", "s"), ("hour", "h"), ("litre", "l"), ("liter", "l")]
_NAMED = re.compile(r"(?:([^\d=]*) = )?(.*)")  # 'x = 3': a name and a value


def plain_unit(unit):
    """One spelling of a canonical unit: 'apples' → 'apple', 'square centimetres' → 'square cm'. Needs _SHORT_UNITS."""
    unit = re.sub(r"(?<=\w\w)s\b", "", unit.strip())
    for long, short in _SHORT_UNITS:
        unit = unit.replace(long, short)
    return unit


def parse_quantity(text):
    """Exact value and unit of a canonical text: '3 / 4', '1 1 / 2', '1.5 * 10 ^ 3', '5 cm ^ 2'; None if not a number.

    Needs _QUANTITY (from _NUM and _UNIT_WORD), plain_unit.
    """
    match = _QUANTITY.fullmatch(text.replace(" * 10 ^ ", "e"))
    if not match or (match[3] and Fraction(match[3]) == 0):
        return None
    whole, top, bottom, unit = match.groups()
    value = Fraction(top) / Fraction(bottom or 1)
    if whole:  # a mixed number; its sign covers both parts
        value = Fraction(whole) + (-value if whole.startswith("-") else value)
    return value, plain_unit(unit)


def same_answer(a, b):
    """Whether two answers say the same (ours). Symmetric; empty and None equal nothing, not even each other.

    Option letters decide when both sides have one, and texts behind them must not differ; when one side has none,
    the text behind the other's letter is compared.
    Numbers are compared exactly, as fractions: 0.5 is 1/2, 0.333 is not 1/3. Units may be left out but not differ;
    50% is 50 and 0.5. 'x = 3' is 3. Everything else, also roots and π, is compared as canonical text, whole: never
    by containment, and never by eval. Needs strip_decoration, split_option, canonical, _same_value.
    """
    a, b = strip_decoration(a or ""), strip_decoration(b or "")
    if not a or not b:
        return False
    if max(len(a), len(b)) > 1000:  # no honest answer: do not spend time on it
        return a == b

    (letter_a, value_a), (letter_b, value_b) = split_option(a), split_option(b)
    value_a, value_b = canonical(value_a), canonical(value_b)
    same_value = bool(value_a and value_b) and _same_value(value_a, value_b)
    if letter_a and letter_b:
        return letter_a == letter_b and (same_value or not value_a or not value_b)
    return same_value


def _same_value(a, b):
    """same_answer for two canonical texts without option letters. Needs parse_quantity, _NAMED."""
    (name_a, a), (name_b, b) = (_NAMED.fullmatch(side).groups() for side in (a, b))
    if name_a and name_b and name_a != name_b:  # x = 3 is not y = 3
        return False
    quantity_a, quantity_b = parse_quantity(a), parse_quantity(b)
    if not quantity_a or not quantity_b:
        return a == b
    (number_a, unit_a), (number_b, unit_b) = quantity_a, quantity_b
    if unit_a and unit_b:
        return quantity_a == quantity_b
    percent, plain = (number_a, number_b) if unit_a else (number_b, number_a)
    return number_a == number_b or ("%" in (unit_a, unit_b) and percent == 100 * plain)


# ─── 5. Key steps and rewards ─────────────────────────────────────────────────────────────────────────────────────────

_NEGATION = re.compile(r"not?|never|without|cannot|neither|nor|≠|\w+n't")
_CLAUSE_ENDS = {".", ",", ";", ":", "!", "?", "but"}
_JOINS = {"+", "-", "*", "/", "^", "√"}


def parse_key_steps(value):
    """Key steps as users bring them → groups of equivalent forms. ValueError says what is wrong and where.

    Takes a list of groups (each a list of forms or one bare string), or the dict of R1-VL-10K, also alone in a
    list; of that dict only "Steps" is used. Needs canonical.
    """
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = value[0]
    if isinstance(value, dict):
        value = value.get("Steps")
    if not isinstance(value, list) or not value:
        raise ValueError(f'key steps: expected groups in a list, or in a dict as "Steps", not {str(value)[:60]}')
    groups = [[group] if isinstance(group, str) else group for group in value]
    for i, group in enumerate(groups, start=1):
        if not isinstance(group, list) or not group:
            raise ValueError(f"key steps: group {i} is empty or no list: {group!r}")
        for j, form in enumerate(group, start=1):
            if not isinstance(form, str) or not canonical(form):  # '' or '$$' would be found in every step
                raise ValueError(f"key steps: group {i}, form {j} is no text with a word, number or symbol: {form!r}")
    return groups


def says(step, form):
    """Whether a step says a form, both as canonical tokens. Needs _NEGATION, _CLAUSE_ENDS, _JOINS.

    Not when one of the three words before it, in the same clause, negates it (unless the form is a negation itself),
    and not when an equation is only a part of a longer one: 'x = 3' in '2x = 3', '7 - 3 = 4' in '7 - 3 = 4 / 2'.
    """
    size = len(form)
    for i in range(len(step) - size + 1):
        if step[i] != form[0] or step[i:i + size] != form:
            continue
        before, after = step[max(0, i - 3):i], step[i + size:i + size + 1]
        clause = takewhile(lambda word: word not in _CLAUSE_ENDS, reversed(before))
        if any(map(_NEGATION.fullmatch, clause)) and not any(map(_NEGATION.fullmatch, form)):
            continue
        if "=" in form:
            coefficient = before and before[-1][-1].isdigit() and len(form[0]) == 1 and form[0].isalpha()
            if coefficient or _JOINS & set(before[-1:] + after):
                continue
        return True
    return False


def matched_key_steps(text, key_steps):
    """For each of the K groups, the index of the step that earned it, or None.

    A group can be earned by any step that states one of its forms; text outside the steps does not count. One step
    earns at most max(2, ceil(K/3)) groups (ours): otherwise the best policy is a single step that lists all key
    words, which no reader would call reasoning. Groups go to steps so that as many as possible are earned, so an
    honest path hardly meets the cap. It does not stop a path that spreads the same words over several steps.
    The official code looks for plain substrings, so '2' matches in '12'. Needs parse_key_steps, split_path, canonical,
    says.
    """
    key_steps = parse_key_steps(key_steps)
    text = text[:10_000]  # twice what 1024 tokens of prose fill; bounds the time a hostile path can take
    steps = [canonical("\n" + step).split() for step in split_path(text).steps]  # \n: a bullet may open the step
    groups = [[canonical(form).split() for form in group] for group in key_steps]
    homes = [[i for i, step in enumerate(steps) if any(says(step, form) for form in group)] for group in groups]

    capacity = max(2, -(-len(groups) // 3))
    earned = [None] * len(groups)

    def place(group, tried):
        """Gives `group` a step with room; a full step may pass one of its groups on (Kuhn's bipartite matching)."""
        for step in homes[group]:
            if step not in tried:
                tried.add(step)
                holders = [other for other, s in enumerate(earned) if s == step]
                if len(holders) < capacity or any(place(other, tried) for other in holders):
                    earned[group] = step
                    return True
        return False

    for group in range(len(groups)):
        place(group, set())
    return earned


def match_key_steps(text, key_steps):
    """k of Eq. 2: matched groups / all groups, in [0, 1]. ValueError: malformed key steps. Needs matched_key_steps."""
    earned = matched_key_steps(text, key_steps)
    return sum(step is not None for step in earned) / len(earned)


def step_accuracy_reward(text, answer, key_steps, alpha=0.1):
    """StepRAR (paper, Eq. 2): 1 + alpha * k for the right answer, alpha * k for a wrong one, 0 without an answer.

    The official code forgets the third case and pays alpha * k to a path that never answers.
    ValueError when the ground truth is empty. Needs final_answer, strip_decoration, same_answer, match_key_steps.
    """
    if not strip_decoration(answer or ""):
        raise ValueError(f"the ground-truth answer is empty: {answer!r}")
    prediction = final_answer(text)
    if prediction is None:
        return 0.0
    return float(same_answer(prediction, answer)) + alpha * match_key_steps(text, key_steps)


def step_validity_reward(text):
    """StepRVR (paper, Eq. 3): 1 if the path is complete and logical, else 0. Needs split_path, final_answer.

    Complete: description, rationale, at least one step and an answer, none of them empty. Logical: description and
    rationale first, then steps 1..n in order, then one answer, then nothing. The official code also pays for an
    empty skeleton, a step after the answer and two answers.
    """
    path = split_path(text)
    complete = path.description and path.rationale and path.steps and all(path.steps) and final_answer(text)
    order = [name for name in path.order if name != "reasoning"]  # "Let's think step by step" is only a heading
    steps_then_answer = [f"step {i + 1}" for i in range(len(path.steps))] + ["answer"]
    logical = sorted(order[:2]) == ["description", "rationale"] and order[2:] == steps_then_answer
    return 1.0 if complete and logical else 0.0


# The same rewards as other frameworks ask for them. Columns are those of R1-VL-10K.

def solution_answer(solution):
    """The answer of a reference: of a whole path, what it ends with; else the text itself.

    Needs final_answer, split_path.
    """
    return final_answer(solution) if split_path(solution).order else str(solution).strip()


def completion_text(completion):
    """A completion of TRL, plain text or a conversation whose content may come in parts → text."""
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def step_accuracy(prompts, completions, solution, key_steps, **columns):
    """StepRAR for TRL's GRPOTrainer(reward_funcs=[step_accuracy, step_validity]) → list of floats, one per completion.

    solution and key_steps are columns of the data set. Needs completion_text, solution_answer, step_accuracy_reward.
    """
    return [step_accuracy_reward(completion_text(completion), solution_answer(truth), groups)
            for completion, truth, groups in zip(completions, solution, key_steps, strict=True)]


def step_validity(prompts, completions, **columns):
    """StepRVR for TRL → list of floats. Needs completion_text, step_validity_reward."""
    return [step_validity_reward(completion_text(completion)) for completion in completions]


def compute_score(data_source, solution_str, ground_truth, extra_info):
    """StepRAR + StepRVR for verl (custom_reward_function.path, .name=compute_score) → dict with "score" and its parts.

    ground_truth: answer or whole path; extra_info["key_steps"]: as in R1-VL-10K. Needs solution_answer,
    step_accuracy_reward, step_validity_reward.
    """
    accuracy = step_accuracy_reward(solution_str, solution_answer(ground_truth), extra_info["key_steps"])
    validity = step_validity_reward(solution_str)
    return {"score": accuracy + validity, "step_accuracy": accuracy, "step_validity": validity}


# ─── 6. Model: checkpoints, prompts, M-RoPE positions ─────────────────────────────────────────────────────────────────

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
                  "<|image_pad|>", "<|video_pad|>"]
EOS_TOKENS = ["<|im_end|>", "<|endoftext|>"]            # Qwen2-VL ends a turn with either
SYSTEM_TURN = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


class Prompt(NamedTuple):
    """One question as the model takes it: P prompt tokens, and the patches of its images one after the other."""
    ids: torch.Tensor                # (P,) token ids, <|image_pad|> once per image token
    positions: torch.Tensor          # (3, P) M-RoPE positions: time, height, width
    is_image: torch.Tensor           # (P,) bool, True on image tokens
    pixels: torch.Tensor | None      # (patches, patch_dim); None without images
    grids: torch.Tensor | None       # (images, 3): t, h, w in patches


def mrope_positions(is_image, grids, merge):
    """M-RoPE positions of a prompt: is_image (P,) bool, grids (images, 3) in patches or None → (3, P) long.

    Text counts up in all three axes; an image spans a t × h × w box, and text goes on at its largest coordinate + 1.
    So an image of 100 tokens may advance the position by only 10: a position can never be told from a token's index,
    neither here nor in cached decoding. Source: Qwen2-VL report, section 2.1.
    """
    positions, start, i = torch.empty(3, len(is_image), dtype=torch.long), 0, 0
    for t, h, w in [] if grids is None else grids.tolist():
        h, w = h // merge, w // merge
        first = i + int(is_image[i:].nonzero()[0])
        positions[:, i:first] = torch.arange(start, start + first - i)
        start, i = start + first - i, first + t * h * w
        box = torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")
        positions[:, first:i] = torch.stack(box).reshape(3, -1) + start
        start += max(t, h, w)
    positions[:, i:] = torch.arange(start, start + len(is_image) - i)
    return positions


class Processor:
    """Tokenizer and image processor of a checkpoint. (AutoProcessor, which joins them too, needs torchvision.)"""

    def __init__(self, tokenizer, image_processor, vocabulary):
        self.tokenizer, self.image_processor, self.merge = tokenizer, image_processor, image_processor.merge_size
        self.special = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
        self.eos = [self.special[token] for token in EOS_TOKENS]
        # Ids that no path may hold: an image token would ask for pixels in the next forward, and the embedding has rows
        # past the tokenizer's last id that mean nothing. (V,) True = banned
        self.banned = torch.zeros(vocabulary, dtype=torch.bool)
        self.banned[len(tokenizer):] = True
        self.banned[[self.special[token] for token in SPECIAL_TOKENS if token not in EOS_TOKENS]] = True

    @functools.lru_cache(maxsize=4096)                         # many rows ask the same question
    def token_count(self, text):
        return len(self.prompt(text).ids)

    def text_ids(self, text, layout=False):
        """Token ids of a text. Special tokens count only in our own layout; in user text they are plain characters."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=not layout)["input_ids"]

    def path_ids(self, text):
        """Reference path → (C,) ids, closed by EOS."""
        return torch.tensor(self.text_ids(text) + self.eos[:1])

    def prompt(self, text, images=()):
        """Chat layout of Qwen2-VL: system turn, images and text of the user, the opened assistant turn → Prompt."""
        ids, pixels, grids = self.text_ids(SYSTEM_TURN + "<|im_start|>user\n", layout=True), None, None
        if images:
            features = self.image_processor(images=list(images), return_tensors="pt")
            pixels, grids = features["pixel_values"], features["image_grid_thw"]
            for n in (grids.prod(-1) // self.merge**2).tolist():
                ids += self.text_ids("<|vision_start|>" + "<|image_pad|>" * n + "<|vision_end|>", layout=True)
        ids += self.text_ids(text) + self.text_ids("<|im_end|>\n<|im_start|>assistant\n", layout=True)
        is_image = torch.tensor(ids) == self.special["<|image_pad|>"]
        return Prompt(torch.tensor(ids), mrope_positions(is_image, grids, self.merge), is_image, pixels, grids)

    def prompt_length(self, text, sizes):
        """Tokens of `prompt` for images of these (width, height), without reading their pixels."""
        patches = sum(self.image_processor.get_number_of_image_patches(h, w) for w, h in sizes)
        return self.token_count(text) + patches // self.merge**2 + 2 * len(sizes)

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def question_text(row, cfg):
    return build_instruction(row.problem) if cfg.instruction else row.problem


def make_prompt(processor, row, cfg):
    """Row → Prompt, with its images read."""
    return processor.prompt(question_text(row, cfg), [load_image(file, cfg.max_pixels) for file in row.images])


def load_model(name, device, dtype, max_pixels):
    """Short name, Hub id, checkpoint folder or run folder → (model in eval mode, Processor)."""
    source = SHORT_NAMES.get(name, str(name))
    if (Path(source) / "checkpoint").is_dir():
        source = str(Path(source) / "checkpoint")
    if not Path(source).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise UserError(f"no model {name!r}: pass a folder, a Hub id (owner/name) or one of {', '.join(SHORT_NAMES)}")
    try:
        config = AutoConfig.from_pretrained(source)
        kind = config.model_type
        if kind not in ("qwen2_vl", "qwen2_5_vl"):
            raise UserError(f"{name} is a {kind} model; this script trains qwen2_vl and qwen2_5_vl")
        if "sliding_attention" in config.get_text_config().layer_types:
            raise UserError(f"{name} has sliding-window attention (use_sliding_window); this script knows none")
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(source)
        # max_pixels takes effect only here: set later, some versions ignore it.
        images = Qwen2VLImageProcessorPil.from_pretrained(source, max_pixels=max_pixels)
        if len({*map(tokenizer.convert_tokens_to_ids, SPECIAL_TOKENS)} - {None}) < len(SPECIAL_TOKENS):
            raise ValueError("its tokenizer lacks Qwen2-VL's special tokens")
    except (OSError, ValueError, SafetensorError) as e:
        reason = (str(e).strip() or type(e).__name__).split("\n")[0]
        raise UserError(f"cannot load model {source}: it is no complete checkpoint folder, not in the Hub's cache, and "
                        f"not to be had from the Hub ({reason})") from None
    return model, Processor(tokenizer, images, model.config.get_text_config().vocab_size)


def save_model(model, processor, folder):
    """An ordinary transformers folder, which from_pretrained loads (its max_pixels is the one of training)."""
    for part in (model, processor.tokenizer, processor.image_processor):
        part.save_pretrained(folder)


def build_tiny(folder, texts, seed):
    """Writes a Qwen2-VL checkpoint of about a million random weights, with a tokenizer trained on `texts`."""
    tokenizer = Qwen2Tokenizer(eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=SPECIAL_TOKENS)
    tokenizer = tokenizer.train_new_from_iterator([*texts, SYSTEM_TURN, "user\nassistant\n"], vocab_size=512,
                                                  show_progress=False)
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in
           ("image_pad", "video_pad", "vision_start", "vision_end", "im_end", "endoftext")}
    # With the usual 0.02 a model this small does not learn to see in minutes; with 0.1 it does.
    wide = {"initializer_range": 0.1}
    config = Qwen2VLConfig(
        # Short sequences: a small theta, and most frequencies for the width, let neighbouring cells be told apart.
        text_config=dict(hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=len(tokenizer), tie_word_embeddings=True,
                         rope_parameters={"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1, 2, 13]},
                         bos_token_id=None, eos_token_id=ids["im_end"], pad_token_id=ids["endoftext"], **wide),
        vision_config=dict(depth=2, embed_dim=64, num_heads=4, hidden_size=128, mlp_ratio=2, **wide),
        image_token_id=ids["image_pad"], video_token_id=ids["video_pad"], vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"], tie_word_embeddings=True, **wide)
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(config)
    save_model(model, Processor(tokenizer, Qwen2VLImageProcessorPil(), len(tokenizer)), folder)


def embed(model, ids, is_image, prompts):
    """Token embeddings with image features in their places: ids (N,) → (N, H). One pass of the vision tower."""
    embeds = model.get_input_embeddings()(ids)
    pixels = [p.pixels for p in prompts if p.pixels is not None]
    if pixels:
        grids = torch.cat([p.grids for p in prompts if p.grids is not None]).to(ids.device)
        features = model.model.get_image_features(torch.cat(pixels).to(ids.device, embeds.dtype), grids).pooler_output
        embeds = embeds.masked_scatter(is_image[..., None], torch.cat(tuple(features)).to(embeds.dtype))
    return embeds


def tempered_logps(logits, temperature, banned):
    """log-softmax of logits / T without the banned ids, fp32: what is sampled from, and what log-prob means here."""
    return torch.log_softmax((logits.float() / temperature).masked_fill(banned, -torch.inf), -1)


# ─── 7. The language model's forward: a prompt once, its G paths beside it ────────────────────────────────────────────

# transformers' own forward knows no prompt that G paths share: it would encode it G times, or attend over all N × N
# pairs of a packed row. So the few lines of a Qwen2 layer stand here, over the modules and weights of the loaded model,
# with the attention as an argument. The tests compare it with transformers' forward, image by image and path by path.

class Packed(NamedTuple):
    """Q prompts and the G paths that go on from each, as one row of N tokens without padding: prompts, then paths.

    A path's last token is predicted, never fed: where this section says C, it means the C − 1 tokens that are.
    Attention needs padded tensors: the `_at` tensors say where in the row each of their places is found (padding: at 0,
    and False in the mask).
    """
    ids: torch.Tensor                # (N,)
    positions: torch.Tensor          # (3, N) M-RoPE
    is_image: torch.Tensor           # (N,) bool
    prompt_at: torch.Tensor          # (Q, P)
    prompt_mask: torch.Tensor        # (Q, P) bool
    path_at: torch.Tensor            # (Q, G, C)
    unpad: torch.Tensor              # (N,) where each token stands in the flat padded tensors, prompts then paths


def pack(prompts, paths):
    """Q prompts and Q lists of G paths (C,), or of none → Packed, on the CPU."""
    rows = [p.ids for p in prompts] + [path[:-1] for group in paths for path in group]
    positions = [p.positions for p in prompts]
    for prompt, group in zip(prompts, paths):
        positions += [prompt.positions[:, -1:] + torch.arange(1, len(path)) for path in group]
    is_image = torch.cat([p.is_image for p in prompts])
    Q, ids, lengths = len(prompts), torch.cat(rows), torch.tensor([len(row) for row in rows])
    starts = (lengths.cumsum(0) - lengths)[:, None]

    def places(part):
        columns = torch.arange(max(lengths[part].tolist(), default=0))
        mask = columns < lengths[part, None]
        return torch.where(mask, starts[part] + columns, 0), mask
    prompt_at, prompt_mask = places(slice(Q))                                                       # (Q, P)
    path_at, path_mask = places(slice(Q, None))                                                         # (Q·G, C)
    unpad = torch.cat([prompt_mask.flatten(), path_mask.flatten()]).nonzero()[:, 0]
    return Packed(ids, torch.cat(positions, 1), F.pad(is_image, (0, len(ids) - len(is_image))), prompt_at, prompt_mask,
                  path_at.unflatten(0, (Q, len(paths[0]))), unpad)


def rms_norm(module, x):
    return F.rms_norm(x, x.shape[-1:], module.weight, module.variance_epsilon)


def rope_tables(model, positions, dtype):
    """positions (3, N) → cos, sin (N, 1, D), the signs of `rotate` included in sin."""
    cos, sin = model.model.language_model.rotary_emb(torch.empty(0, device=positions.device), positions[:, None])
    half = sin.shape[-1] // 2
    sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
    return cos[0, :, None].to(dtype), sin[0, :, None].to(dtype)


def rotate(x, cos, sin):
    """RoPE of the pairs (x[i], x[i + D / 2]): x, cos, sin (…, D) → (…, D); sin negated in its first half."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def decoder_layer(layer, x, cos, sin, attend):
    """One layer of Qwen2 on tokens x (N, H) → (N, H). attend(layer, q, k, v): (N, heads, D) each → (N, heads, D)."""
    attention, normed = layer.self_attn, rms_norm(layer.input_layernorm, x)
    D = attention.head_dim
    q, k, v = attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed)
    q_and_k = rotate(torch.cat([q, k], -1).unflatten(-1, (-1, D)), cos, sin)    # one rotation is cheaper than two
    q, k = q_and_k.split([q.shape[-1] // D, k.shape[-1] // D], -2)
    x = x + attention.o_proj(attend(layer, q, k, v.unflatten(-1, (-1, D))).flatten(-2))
    return x + layer.mlp(rms_norm(layer.post_attention_layernorm, x))


def attention(q, k, v, **masking):
    """Softmax attention of queries (B, T, heads, D) over keys and values (B, S, fewer heads, D) → (B, T, heads, D)."""
    repeats = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)))
    return F.scaled_dot_product_attention(q, k, v, **masking).transpose(1, 2)


def packed_attention(packed, path_bias, layer, q, k, v):
    """Prompts see themselves; each path sees its prompt and itself. q (N, heads, D), k and v (N, fewer heads, D).

    P² + G·C·(P + C) scores per question instead of G·(P + C)² path by path. Padding is on the right, where no real
    query looks under a causal mask. path_bias (Q·G, 1, C, P + C) hides the padding of prompts from the paths.
    """
    prompt_k, prompt_v = k[packed.prompt_at], v[packed.prompt_at]                            # (Q, P, fewer heads, D)
    out = attention(q[packed.prompt_at], prompt_k, prompt_v, is_causal=True).flatten(0, 1)   # (Q·P, heads, D)
    if packed.path_at.numel():
        G = packed.path_at.shape[1]
        seen = (torch.cat([prompt[:, None].expand(-1, G, -1, -1, -1), own[packed.path_at]], 2).flatten(0, 1)
                for prompt, own in ((prompt_k, k), (prompt_v, v)))                     # (Q·G, P + C, fewer heads, D)
        paths = attention(q[packed.path_at].flatten(0, 1), *seen, attn_mask=path_bias)       # (Q·G, C, heads, D)
        out = torch.cat([out, paths.flatten(0, 1)])
    return out[packed.unpad]                                                                 # (N, heads, D)


def run_packed(model, packed, prompts, attend=packed_attention):
    """Packed, on the model's device → hidden states (N, H), before the last norm. One pass of the vision tower."""
    x = embed(model, packed.ids, packed.is_image, prompts)
    cos, sin = rope_tables(model, packed.positions, x.dtype)
    (Q, G, C), P = packed.path_at.shape, packed.prompt_at.shape[1]
    visible = torch.cat([packed.prompt_mask[:, None].expand(Q, C, P),
                         packed.prompt_mask.new_ones(C, C).tril().expand(Q, C, C)], -1)             # (Q, C, P + C)
    bias = torch.zeros_like(visible, dtype=x.dtype).masked_fill(~visible, torch.finfo(x.dtype).min)
    attend = functools.partial(attend, packed, bias.repeat_interleave(G, 0)[:, None])
    for layer in model.model.language_model.layers:
        if model.training and layer.gradient_checkpointing:
            x = checkpoint(decoder_layer, layer, x, cos, sin, attend, use_reentrant=False, preserve_rng_state=False)
        else:
            x = decoder_layer(layer, x, cos, sin, attend)
    return x


# ─── 8. Rollout with a KV cache ───────────────────────────────────────────────────────────────────────────────────────

class Rollout(NamedTuple):
    """What `rollout` sampled: for each of Q questions a list of G paths."""
    ids: list        # of G tensors (C,): the sampled ids, up to and including EOS, kept and never re-encoded from text
    texts: list      # of G strings
    logps: list      # of G tensors (C,): log-prob of each token as it was sampled


class Decoder:
    """The KV cache of B = Q·G paths and `step`, which samples one token for each of them.

    Keys and values of a prompt are kept once, for all G paths of its question; those of the paths stand in buffers of
    their full length from the start. `step` reads and writes tensors only, which stay where they are in memory, and
    asks nothing of the device: so on CUDA it can be captured as a graph once and replayed for every token of every
    rollout of this shape. Without that, some 800 kernels per token wait for Python.

    The cache has the axes (Q, h, G, C, D), h key-value heads with r = heads / h query heads each: like this the queries
    of a question, (Q, h, G·r, D), meet its prompt's keys in one matmul that reads them once.
    """

    def __init__(self, model, processor, Q, G, P, C, temperature):
        config, device, dtype, B = model.config.get_text_config(), model.device, model.dtype, Q * G
        h, D = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        self.model, self.layers, self.temperature = model, model.model.language_model.layers, temperature
        self.shape = G, P, h, config.num_attention_heads // h, D

        def zeros(*shape, dtype=dtype):                        # not empty: attention multiplies what it masks by 0
            return torch.zeros(shape, dtype=dtype, device=device)
        self.prompt_cache = [(zeros(Q, h, P, D), zeros(Q, h, P, D)) for _ in self.layers]
        self.path_cache = [(zeros(Q, h, G, C, D), zeros(Q, h, G, C, D)) for _ in self.layers]
        self.prompt_bias = zeros(Q, 1, 1, 1, P)                # hides the padding of shorter prompts
        self.cos, self.sin = zeros(C, B, 1, D), zeros(C, B, 1, D)                  # of each path's positions to come
        self.uniform = zeros(C, B, dtype=torch.float32)        # a random number in (0, 1] for each token to come
        self.hidden = zeros(B, config.hidden_size)             # what the next token is predicted from
        self.c = zeros(1, dtype=torch.long)                    # tokens so far; on the device, for the graph to count up
        self.ended = zeros(B, dtype=torch.bool)
        self.row = torch.arange(B, device=device)              # of the outputs, for each path still in the batch
        self.ids, self.logps = zeros(C, B, dtype=torch.long), zeros(C, B, dtype=torch.float32)     # the outputs
        self.columns = torch.arange(C, device=device)
        self.banned, self.eos = processor.banned.to(device), torch.tensor(processor.eos, device=device)
        # Attention reads the path cache up to c, rounded up: a graph is bound to one length. Few lengths, few graphs.
        self.block = 128 if device.type == "cuda" else 16
        self.graphs = {}

    def prefill(self, prompts, uniform):
        """Encodes the prompts, each once, and starts over. uniform (Q, G, C): a random number in (0, 1] per token."""
        packed = Packed(*(x.to(self.hidden.device) for x in pack(prompts, [[] for _ in prompts])))
        real, at = packed.prompt_mask, packed.prompt_at                                             # (Q, P)

        def attend(packed, bias, layer, q, k, v):
            for cache, new in zip(self.prompt_cache[layer.self_attn.layer_idx], (k, v)):
                cache[:, :, :at.shape[1]] = new[at].transpose(1, 2)
            return packed_attention(packed, bias, layer, q, k, v)
        x, G = run_packed(self.model, packed, prompts, attend), self.shape[0]
        last = torch.tensor([len(p.ids) for p in prompts], device=x.device).cumsum(0) - 1
        self.hidden.copy_(x[last].repeat_interleave(G, 0))                                          # (B, H)
        self.prompt_bias.fill_(torch.finfo(x.dtype).min)[..., :at.shape[1]].masked_fill_(real[:, None, None, None], 0)
        first = packed.positions[:, last].repeat_interleave(G, 1) + 1                               # (3, B)
        positions = first[:, None] + self.columns[:, None]                                          # (3, C, B)
        for table, new in zip((self.cos, self.sin), rope_tables(self.model, positions.flatten(1), x.dtype)):
            table.copy_(new.view_as(table))
        self.uniform.copy_(uniform.flatten(0, 1).T)
        self.c.zero_()
        self.ended.zero_()

    def attend(self, length, bias, layer, q, k, v):
        """One token of each path over its prompt and what the path has said: q (B, heads, D) → (B, heads, D)."""
        (G, P, h, r, D), (own_k, own_v) = self.shape, self.path_cache[layer.self_attn.layer_idx]
        prompt_k, prompt_v = self.prompt_cache[layer.self_attn.layer_idx]
        q = (q * D ** -.5).view(-1, G, h, r, D).transpose(1, 2)                                     # (Q, h, G, r, D)
        for cache, new in ((own_k, k), (own_v, v)):
            cache.index_copy_(3, self.c, new.view(-1, G, h, 1, D).transpose(1, 2))
        own_k, own_v = own_k[..., :length, :], own_v[..., :length, :]                         # (Q, h, G, length, D)
        scores = torch.cat([(q.flatten(2, 3) @ prompt_k.mT).unflatten(2, (G, r)), q @ own_k.mT], -1)
        weights = torch.softmax(scores + bias, -1)                                           # (Q, h, G, r, P + length)
        out = (weights[..., :P].flatten(2, 3) @ prompt_v).unflatten(2, (G, r)) + weights[..., P:] @ own_v
        return out.transpose(1, 2).reshape(len(q) * G, h * r, D)

    def step(self, length):
        """Samples token c of each path and feeds it, with path caches read up to `length` > c. Counts c up."""
        lm, c = self.model.model.language_model, self.c
        logps = tempered_logps(self.model.lm_head(rms_norm(lm.norm, self.hidden)), self.temperature or 1.0, self.banned)
        if self.temperature:                                   # inverse CDF: one random number per path, not V
            cdf = logps.exp().cumsum(-1)                                                            # (B, V)
            token = torch.searchsorted(cdf, self.uniform.index_select(0, c).T * cdf[:, -1:])[:, 0]              # (B,)
            token = token.clamp(max=cdf.shape[1] - 1)          # of a nan the search finds no place; see rollout
            token = torch.where(self.banned[token], self.eos[0], token)        # rounding in a parallel sum may hit one
        else:
            token = logps.argmax(-1)
        at = c * self.ids.shape[1] + self.row
        self.ids.view(-1).index_copy_(0, at, token)
        self.logps.view(-1).index_copy_(0, at, logps.gather(1, token[:, None])[:, 0])
        self.ended |= (token[:, None] == self.eos).any(1)
        future = torch.where(self.columns[:length] > c, torch.finfo(self.hidden.dtype).min, 0.0).to(self.hidden.dtype)
        bias = torch.cat([self.prompt_bias, future.expand(*self.prompt_bias.shape[:-1], length)], -1)
        cos, sin = self.cos.index_select(0, c)[0], self.sin.index_select(0, c)[0]                   # (B, 1, D)
        x, attend = self.model.get_input_embeddings()(token), functools.partial(self.attend, length, bias)
        for layer in self.layers:
            x = decoder_layer(layer, x, cos, sin, attend)
        self.hidden.copy_(x)
        c += 1

    def capture(self):
        """Captures `step` as a CUDA graph for each length. Before the first prefill: it leaves junk in the buffers."""
        pool = torch.cuda.graph_pool_handle()                  # graphs that never run at once can share their memory
        for length in range(self.block, len(self.ids) + self.block, self.block):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):                      # once outside the graph: libraries set themselves up
                self.c.zero_()
                self.step(min(length, len(self.ids)))
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self.step(min(length, len(self.ids)))
            self.graphs[min(length, len(self.ids))] = graph.replay

    def advance(self, c):
        """Token c, by graph if there is one."""
        length = min(len(self.ids), (c // self.block + 1) * self.block)
        self.graphs.get(length, functools.partial(self.step, length))()

    def keep(self, questions):
        """Goes on with these questions only, (number,) indices: the others have ended."""
        G = self.shape[0]
        paths = (questions[:, None] * G + torch.arange(G, device=questions.device)).flatten()
        self.prompt_cache, self.path_cache = ([tuple(x[questions] for x in pair) for pair in cache]
                                              for cache in (self.prompt_cache, self.path_cache))
        self.prompt_bias, self.hidden, self.ended = self.prompt_bias[questions], self.hidden[paths], self.ended[paths]
        self.cos, self.sin, self.uniform = self.cos[:, paths], self.sin[:, paths], self.uniform[:, paths]
        self.row = self.row[paths]


_captured = {}      # the last captured Decoder, for the next rollout of its shape: 0.5 GB for 16 long paths of a 2B


def captured_decoder(model, processor, Q, G, P, C, temperature):
    """A Decoder with its graphs, kept from rollout to rollout, for prompts of up to P tokens or more."""
    key = model, processor, Q, G, C, temperature
    if key not in _captured or _captured[key].shape[1] < P:
        _captured.clear()                                      # its memory first
        _captured[key] = Decoder(model, processor, Q, G, -(-P // 256) * 256, C, temperature)
        if model.device.type == "cuda":                        # elsewhere, in the tests, the same steps run uncaptured
            _captured[key].capture()
    return _captured[key]


def rollout(model, processor, prompts, group_size, max_new_tokens, temperature=1.2, seeds=None, bar=None,
            constant_shape=None):
    """Samples `group_size` paths for each of Q prompts → Rollout. temperature 0 is greedy (log-probs then at 1).

    Image and prompt are encoded once per question. A path ends at either EOS or after max_new_tokens; a question leaves
    the batch when all its paths have ended. seeds: Q numbers, one per question, so that its paths are the same in
    whatever batch it is asked; None: others each time. The checkpoint's generation_config (the published one has top_k
    1) plays no part. constant_shape: no question leaves, so that CUDA can replay a captured step; None: on CUDA only.
    NonFinite when the model has run away. Needs Decoder, captured_decoder, cut_at_eos, NonFinite, chunks and section 7.
    """
    Q, P, was_training = len(prompts), max(len(p.ids) for p in prompts), model.training
    if constant_shape is None:
        constant_shape = model.device.type == "cuda"
    generators = [None] * Q if seeds is None else [torch.Generator().manual_seed(seed) for seed in seeds]
    uniform = torch.stack([1 - torch.rand(group_size, max_new_tokens, generator=g) for g in generators])   # (Q, G, C)
    model.eval()
    with torch.inference_mode():                               # as no_grad, and less to do for each small operation
        make = captured_decoder if constant_shape else Decoder
        decoder = make(model, processor, Q, group_size, P, max_new_tokens, temperature)
        decoder.prefill(prompts, uniform)
        for c in range(max_new_tokens):
            decoder.advance(c)
            if bar is not None:
                bar.update(len(decoder.row))
            if c % 8 == 7:                                     # asking the device is a sync: not at every token
                going = (~decoder.ended).view(-1, group_size).any(1)                                # (Q,)
                if not going.any():
                    break
                if not constant_shape and not going.all():
                    decoder.keep(going.nonzero()[:, 0])
        if decoder.logps.isnan().any():
            raise NonFinite("the policy's log-probs are nan", harmed=True)
    model.train(was_training)
    return cut_at_eos(processor, decoder.ids.T.to("cpu", copy=True), decoder.logps.T.to("cpu", copy=True), group_size)


def cut_at_eos(processor, ids, logps, group_size):
    """ids and log-probs (B, C) → Rollout; each path keeps its tokens up to and including its first EOS."""
    is_eos = torch.isin(ids, torch.tensor(processor.eos))
    lengths = torch.where(is_eos.any(1), is_eos.int().argmax(1) + 1, ids.shape[1]).tolist()
    ids, logps = ([row[:n] for row, n in zip(rows, lengths)] for rows in (ids, logps))
    return Rollout(*(chunks(x, group_size) for x in (ids, [processor.decode(path) for path in ids], logps)))


# ─── 9. Log-probs and the objective ───────────────────────────────────────────────────────────────────────────────────

def path_logps(model, processor, prompts, paths, temperature=1.0):
    """Log-probs of all paths' tokens. prompts: Q of them; paths: Q lists of G tensors (C,) → logps, mask (Q, G, C).

    One packed forward: image and prompt once, then the G paths, each of which sees the prompt and itself and starts at
    the position after it, so the result equals that of G separate forwards. mask is True on tokens, logps is 0
    elsewhere. For fine-tuning on reference paths G is 1. Inputs are left unchanged. Needs token_logps and section 7.
    """
    Q, G, device = len(prompts), len(paths[0]), model.device
    flat, packed = [path for group in paths for path in group], pack(prompts, paths)
    lengths = torch.tensor([len(path) for path in flat])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]                                      # (Q·G, C)
    # The state that predicts a token stands one token before it; that of a path's first token at its prompt's end.
    source = torch.zeros_like(mask, dtype=torch.long)
    source[:, 0] = torch.tensor([len(p.ids) for p in prompts]).cumsum(0).sub(1).repeat_interleave(G)
    source[:, 1:] = packed.path_at.flatten(0, 1)
    source, target, place = (x.to(device) for x in (source[mask], torch.cat(flat), mask.flatten().nonzero()[:, 0]))
    hidden = run_packed(model, Packed(*(x.to(device) for x in packed)), prompts)[source]            # (tokens, H)
    hidden = rms_norm(model.model.language_model.norm, hidden)
    logps = token_logps(model.lm_head, hidden, target, temperature, processor.banned.to(device))    # (tokens,)
    logps = logps.new_zeros(mask.numel()).index_copy(0, place, logps)
    return logps.view(Q, G, -1), mask.view(Q, G, -1).to(device)


def token_logps(head, hidden, targets, temperature, banned, chunk=512):
    """hidden (N, H), targets (N,) → (N,). A vocabulary of 150,000 makes logits the largest tensor of all: they are made
    for path tokens only, `chunk` at a time, and made again in backward instead of kept. Needs tempered_logps."""
    def project(hidden, targets):
        return tempered_logps(head(hidden), temperature, banned).gather(1, targets[:, None])[:, 0]
    return torch.cat([checkpoint(project, h, t, use_reentrant=False, preserve_rng_state=False)
                      for h, t in zip(hidden.split(chunk), targets.split(chunk))])


def group_advantages(rewards):
    """A = (r − mean) / (std + 1e-4) inside each group, unbiased std (official code): rewards (Q, G) → (Q, G).

    Groups whose rewards are all equal get exactly 0. The z-score knows no scale: a difference of 0.03 in key steps,
    alone in its group, weighs as much as right against wrong. ValueError for G < 2.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be (questions, paths) with at least 2 paths, not {tuple(rewards.shape)}")
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    return advantages.masked_fill((rewards == rewards[:, :1]).all(1, keepdim=True), 0.0)


def grpo_loss(logps, old_logps, ref_logps, advantages, mask, clip=0.2, beta=0.04):
    """The clipped GRPO objective, negated (METHOD section 4): a mean over the tokens of a path, then over paths.

        ρ = exp(logp − old),   KL = exp(ref − logp) − (ref − logp) − 1        (k3: unbiased, never negative)
        loss = − mean over paths of mean over tokens of [ min(ρ·A, clip(ρ, 1 − ε, 1 + ε)·A) − β·KL ]

    logps, old_logps, ref_logps, mask: (N, C) for N paths; advantages: (N,), one number for all tokens of a path.
    ref_logps may be None when beta is 0. → loss, and floats averaged the same way: kl, clip_fraction (tokens whose
    gradient the clip takes away), ratio. With one update per rollout old = logp, so ρ = 1 and the loss is β·KL in
    value: it starts at 0 and rises. Only its gradient teaches.
    """
    A = advantages[:, None]
    ratio = torch.exp(logps - old_logps)                                                            # (N, C)
    gain = torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A)
    kl = torch.zeros_like(logps)
    if beta:
        kl = torch.exp(ref_logps - logps) - (ref_logps - logps) - 1
    clipped = ((ratio > 1 + clip) & (A > 0)) | ((ratio < 1 - clip) & (A < 0))

    def mean(x):
        return ((x * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()
    stats = {"kl": mean(kl), "clip_fraction": mean(clipped.float()), "ratio": mean(ratio)}
    return -mean(gain - beta * kl), {name: value.item() for name, value in stats.items()}


# ─── 10. Ranks, optimiser, run folder ─────────────────────────────────────────────────────────────────────────────────

# One process per GPU under torchrun, which sets these variables; without it there is one. A rank takes its share of the
# questions, and a group stays whole. What ranks must agree on goes through `over_ranks`, so all must call it alike.

def ranks():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def over_ranks(numbers, op=dist.ReduceOp.SUM):
    """A list of numbers → their sums (or op) over all ranks."""
    if ranks() == 1:
        return [float(x) for x in numbers]
    numbers = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(numbers, op)
    return numbers.tolist()


def barrier():
    over_ranks([0])


@contextlib.contextmanager
def first_rank_first():
    """The others wait outside until rank 0 has left: what it draws, downloads or renames is then there for them."""
    if rank():
        barrier()
    yield
    if not rank():
        barrier()


def join_ranks(cfg):
    """Joins the other processes of torchrun, if there are any, and keeps all but the first one quiet."""
    N = int(os.environ.get("WORLD_SIZE", 1))
    if N == 1 or dist.is_initialized():
        return
    for name in ("questions", "warmup_batch"):
        if getattr(cfg, name) % N:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)} cannot be shared evenly by {N} processes")
    cuda = torch.cuda.is_available() and cfg.device != "cpu"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    if rank():
        sys.stdout = open(os.devnull, "w")
        tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)


class Masters(torch.optim.Optimizer):
    """AdamW in fp32 over parameters of any dtype, without weight decay (official code).

    A step of 1e-6 vanishes when it is added to a bf16 weight near 1, whose neighbours are 0.008 apart. So the optimiser
    owns fp32 master weights, moments and gradients, and the parameters get the rounded masters after each step. With
    `offload` all of this lives in host memory. An fp32 parameter is its own master, unless `separate` asks for another.
    """

    def __init__(self, params, lr=0.0, offload=False, separate=False):
        super().__init__(params, {"lr": lr})
        own = [p for group in self.param_groups for p in group["params"]]
        self.separate = separate or offload or any(p.dtype != torch.float32 for p in own)
        self.masters = {p: p for p in own}
        if self.separate:
            self.masters = {p: p.detach().to("cpu" if offload else p.device, torch.float32, copy=True) for p in own}
        self.adamw = torch.optim.AdamW(self.masters.values(), lr=lr, weight_decay=0.0, fused=True)

    @torch.no_grad()
    def step(self):
        self.adamw.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        self.adamw.step()
        if self.separate:
            for p, master in self.masters.items():
                p.copy_(master)


class MasterAdamW:
    """`Masters` over a model, on one rank or on several.

    On one, a gradient moves to its master as soon as backward has made it: the bf16 one is freed, and micro-batches add
    up in fp32. On several, torch's ZeroRedundancyOptimizer gives each rank the Masters of its share of the parameters
    and, after a step, each parameter to all; a gradient is summed over the ranks and kept where its master is.
    """

    def __init__(self, model, offload=False):
        self.params = [p for p in model.parameters() if p.requires_grad]
        if ranks() > 1:
            from torch.distributed.optim import ZeroRedundancyOptimizer        # takes a second, and warns of torch.jit
            self.optimizer = ZeroRedundancyOptimizer(self.params, Masters, lr=0.0, offload=offload, separate=True)
            self.local = self.optimizer.optim
        else:
            self.optimizer = self.local = Masters(self.params, offload=offload)
            for p in self.params if self.local.separate else []:
                me = weakref.ref(self)                         # a parameter that held us would never be freed
                p.register_post_accumulate_grad_hook(lambda p: me().take_gradient(p, p.grad))

    @property
    def masters(self):
        return list(self.local.masters.values())

    def take_gradient(self, p, gradient):
        """Adds a parameter's gradient to that of its master, if it is here, and frees it."""
        if p in self.local.masters:
            master = self.local.masters[p]
            gradient = gradient.to(master.device, torch.float32)
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        p.grad = None

    def collect(self):
        """After each backward, on every rank: sums the gradients over the ranks."""
        if ranks() > 1:
            for p in self.params:                              # all of them, for a rank may have seen no image
                gradient = torch.zeros_like(p, dtype=torch.float32) if p.grad is None else p.grad.float()
                dist.all_reduce(gradient)
                self.take_gradient(p, gradient)

    def norm_of(self, tensors):
        return over_ranks([float(torch.nn.utils.get_total_norm(tensors)) ** 2])[0] ** .5

    def gradient_norm(self):
        return self.norm_of([m.grad for m in self.masters if m.grad is not None])

    def step(self, lr, norm, max_norm):
        """One update at learning rate lr with the gradients, of total `norm`, scaled down to max_norm; clears them."""
        for master in self.masters:
            if master.grad is not None:
                master.grad.mul_(min(1.0, max_norm / (norm + 1e-6)))
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        self.clear()
        if not math.isfinite(self.norm_of(self.masters)):
            raise NonFinite("the weights have run away in the last update", harmed=True)

    def clear(self):
        for master in self.masters:
            master.grad = None

    def forget(self):
        """Drops the moments, for a new phase of training."""
        self.local.adamw.state.clear()

    def state_dict(self):
        """Of this rank's share."""
        return {"adamw": self.local.adamw.state_dict(), "masters": self.masters if self.local.separate else None}

    def load_state_dict(self, state):
        self.local.adamw.load_state_dict(state["adamw"])
        with torch.no_grad():
            for master, saved in zip(self.masters, state["masters"] or []):
                master.copy_(saved)


class Run:
    """The run folder: config.json, metrics.jsonl, samples.jsonl, reference/ (the warm-up policy) and checkpoint/."""
    LOGS = ("metrics.jsonl", "samples.jsonl")

    def __init__(self, cfg):
        """Checks that the folder may be used; `open` makes it, once data and model have turned out to be good."""
        self.cfg, self.out, self.stop = cfg, Path(cfg.out), False
        # All that resuming needs beside weights and optimiser, for random numbers are functions of seed and step.
        # drawn: questions taken from the shuffled stream so far; lines: of each log.
        self.state = {"phase": "warm-up", "step": 0, "drawn": 0, "evaluations": {},
                      "lines": dict.fromkeys(self.LOGS, 0), "ranks": ranks()}
        if cfg.resume:
            self.load_state()
        elif self.out.is_file() or self.out.is_dir() and {f.name for f in self.out.iterdir()} - {"eval"}:
            # eval/ alone is no run: eval.py keeps a base model's responses there
            if not cfg.overwrite:
                raise UserError(f"{self.out} exists. Go on with it: --resume; delete it: --overwrite; or choose --out")
            model = Path(cfg.model).resolve()
            if not (self.out / "metrics.jsonl").exists() or self.out.resolve() in (model, *model.parents):
                raise UserError(f"--overwrite does not delete {self.out}: it is no run folder, or holds the --model")

    def open(self):
        barrier()                                              # no rank looks into the folder any more, see __init__
        if rank():
            return
        if self.cfg.overwrite and (self.out / "metrics.jsonl").exists():
            shutil.rmtree(self.out)
        self.out.mkdir(parents=True, exist_ok=True)
        settings = {**asdict(self.cfg), "resume": False, "overwrite": False}
        (self.out / "config.json").write_text(json.dumps(settings, indent=1))
        for file in self.LOGS:                                 # what a resumed run is about to do again is dropped
            lines = (self.out / file).read_text(encoding="utf-8").split("\n") if (self.out / file).exists() else []
            kept = "".join(line + "\n" for line in lines[:self.state["lines"][file]])
            (self.out / file).write_text(kept, encoding="utf-8")

    def load_state(self):
        """Takes up the last checkpoint."""
        old, final = self.out / "checkpoint.old", self.out / "checkpoint"
        with first_rank_first():
            if old.exists() and not final.exists():            # killed between the two renames of `save`
                old.rename(final)
        if final.exists():
            self.state = torch.load(final / "training_state.pt", map_location="cpu", weights_only=True)
            print(f"resuming {self.out} after {self.state['phase']} update {self.state['step']}")
            if self.state.setdefault("ranks", 1) != ranks():
                raise UserError(f"{final} is of a run on {self.state['ranks']} processes, and here are {ranks()}: its "
                                f"optimiser is spread over them. Use torchrun --nproc-per-node {self.state['ranks']}")
        else:
            print(f"{self.out} holds no checkpoint yet: starting from the beginning")

    def log(self, file, record):
        if rank():
            return
        with open(self.out / file, "a", encoding="utf-8") as f:
            f.write(json.dumps(record, ensure_ascii=False) + "\n")
        self.state["lines"][file] += 1

    def save(self, policy, processor, optimizer):
        """Writes checkpoint/ atomically: a process killed at any moment leaves the old one or the new one, whole."""
        new, old, final = (self.out / name for name in ("checkpoint.new", "checkpoint.old", "checkpoint"))
        if not rank():
            shutil.rmtree(new, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
            save_model(policy, processor, new)
            torch.save(self.state, new / "training_state.pt")
        barrier()
        torch.save(optimizer.state_dict(), new / f"optimizer_{rank()}.pt")
        barrier()
        if not rank():
            if final.exists():
                final.rename(old)
            new.rename(final)
            shutil.rmtree(old, ignore_errors=True)
        barrier()

    def load_optimizer(self, optimizer):
        file = self.out / "checkpoint" / f"optimizer_{rank()}.pt"
        if not file.exists():
            raise UserError(f"{file} is missing: this checkpoint cannot be resumed, but serves as a --model")
        optimizer.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))

    def end_update(self, policy, processor, optimizer, step, drawn=0):
        """After each update: note where we are, save every so often, and stop here if that was asked for."""
        self.state.update(step=step, drawn=drawn)
        stop = self.stop_asked()
        if stop or step % self.cfg.save_every == 0:
            self.save(policy, processor, optimizer)
        if stop:
            raise KeyboardInterrupt

    def stop_asked(self):
        """Whether any rank was asked to stop; all ranks call this together."""
        return bool(over_ranks([self.stop])[0])

    @contextlib.contextmanager
    def signals(self):
        """Ctrl-C and SIGTERM ask for a stop after the update in hand; a second one stops at once."""
        def ask(number, frame):
            if self.stop:
                raise KeyboardInterrupt
            self.stop = True
            tqdm.write("stopping: the update in hand is finished and saved first (again: stop at once)")
        before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)


# ─── 11. Warm-up and StepGRPO ─────────────────────────────────────────────────────────────────────────────────────────

def chunks(items, size):
    return [items[i:i + size] for i in range(0, len(items), size)]


@functools.lru_cache(maxsize=2)
def shuffled(n, seed, epoch):
    return random.Random(f"{seed} {epoch}").sample(range(n), n)


def draw(rows, number, seed, drawn):
    """The next `number` rows of an endless stream, shuffled anew in each epoch, of which `drawn` are used up."""
    places = (divmod(n, len(rows)) for n in range(drawn, drawn + number))
    return [rows[shuffled(len(rows), seed, epoch)[i]] for epoch, i in places]


def check_finite(name, value, rows, harmed=False):
    """Stops at inf and nan, with the questions it came from."""
    if not math.isfinite(value):
        raise NonFinite(f"{name} {value} at " + "; ".join(row.where for row in rows), harmed)
    return value


def warm_up(run, cfg, policy, processor, rows, optimizer):
    """Supervised fine-tuning on reference paths: mean negative log-likelihood of their tokens (METHOD, step 1)."""
    policy.train()
    start = run.state["step"]
    bar = tqdm(range(start, cfg.warmup_steps), "warm-up", initial=start, total=cfg.warmup_steps, unit="update")
    for step in bar:
        batch = draw(rows, cfg.warmup_batch, cfg.seed, step * cfg.warmup_batch)
        pairs = sorted(((processor.path_ids(row.path), row) for row in batch), key=lambda pair: len(pair[0]))
        tokens, total = sum(len(path) for path, _ in pairs), 0.0
        for part in chunks(pairs[rank()::ranks()], cfg.micro_batch):           # paths of like length: little padding
            prompts = [make_prompt(processor, row, cfg) for _, row in part]
            logps, _ = path_logps(policy, processor, prompts, [[path] for path, _ in part])
            loss = -logps.sum() / tokens                       # all tokens of the update, whatever the micro-batch
            loss.backward()
            optimizer.collect()
            total += check_finite("loss", loss.item(), [row for _, row in part])
        norm = check_finite("gradient norm", optimizer.gradient_norm(), batch)
        lr = cfg.warmup_lr * warmup_schedule((step + 0.5) / cfg.warmup_steps, cfg.warmup_ratio)
        optimizer.step(lr, norm, cfg.max_grad_norm)
        total = over_ranks([total])[0]
        bar.set_postfix(loss=f"{total:.3f}", lr=f"{lr:.1e}")
        run.log("metrics.jsonl", {"phase": "warm-up", "step": step + 1, "loss": total, "grad_norm": norm, "lr": lr})
        run.end_update(policy, processor, optimizer, step + 1)


def warmup_schedule(progress, ratio):
    """Linear rise over the first `ratio` of the updates, then half a cosine down to 0 (official code)."""
    if progress < ratio:
        return progress / ratio
    return 0.5 * (1 + math.cos(math.pi * (progress - ratio) / (1 - ratio)))


class Group(NamedTuple):
    """A question with its G sampled paths and their scores."""
    row: Row
    prompt: Prompt
    ids: list            # G tensors (C,)
    texts: list          # G strings
    logps: list          # G tensors (C,), as sampled
    scores: list         # G dicts of score_path

    def is_flat(self):
        return len({score["reward"] for score in self.scores}) == 1


SCORES = ("reward", "right", "step_accuracy", "step_validity", "k")


def score_path(text, row, cfg):
    """All scores of one path; `reward` is what the policy is trained on, chosen by --reward."""
    right = float(same_answer(final_answer(text), row.answer))
    k = match_key_steps(text, row.key_steps) if row.key_steps else 0.0
    accuracy = step_accuracy_reward(text, row.answer, row.key_steps, cfg.alpha) if row.key_steps else right
    validity = step_validity_reward(text)
    reward = {"step": accuracy + validity, "outcome": right, "accuracy": accuracy, "validity": validity}[cfg.reward]
    return {"reward": reward, "right": right, "step_accuracy": accuracy, "step_validity": validity, "k": k}


def question_seed(cfg, n):
    """For the random numbers of the n-th question drawn: they depend on no batch, no rank and no earlier question."""
    return cfg.seed * 1_000_003 + n


def sample_groups(cfg, policy, processor, rows, drawn):
    """Draws Q questions, samples G paths for each, scores them → (groups of this rank, number of groups on all ranks,
    questions drawn so far, flat groups seen).

    A flat group, its rewards all equal, teaches nothing. --skip-flat-groups drops it and draws another question in its
    place, in up to four rounds.
    """
    groups, number, flat = [], 0, 0
    for _ in range(4 if cfg.skip_flat_groups else 1):
        wanted = range(drawn, drawn + cfg.questions - number)
        mine, drawn = slice(rank(), None, ranks()), wanted.stop
        batch = draw(rows, len(wanted), cfg.seed, wanted.start)[mine]
        prompts = [make_prompt(processor, row, cfg) for row in batch]
        sampled = Rollout([], [], [])
        with tqdm(desc="rollout", unit=" tokens", leave=False, delay=2) as bar:
            if batch:                                          # a rank may have none left to replace
                sampled = rollout(policy, processor, prompts, cfg.group_size, cfg.max_new_tokens, cfg.temperature,
                                  [question_seed(cfg, n) for n in wanted[mine]], bar,
                                  # a graph for the usual shape only, not for the few that replace flat groups
                                  None if cfg.cuda_graph and len(wanted) == cfg.questions else False)
        new = [Group(row, prompt, ids, texts, logps, [score_path(text, row, cfg) for text in texts])
               for row, prompt, ids, texts, logps in zip(batch, prompts, *sampled)]
        kept = [group for group in new if not (cfg.skip_flat_groups and group.is_flat())]
        groups += kept
        more_flat, more = over_ranks([sum(group.is_flat() for group in new), len(kept)])
        flat, number = flat + int(more_flat), number + int(more)
        if number == cfg.questions:
            break
    return groups, number, drawn, flat


def update(cfg, policy, reference, processor, groups, advantages, optimizer, lr):
    """μ optimiser steps on one set of groups (this rank's), advantages (Q, G) → mean statistics of the objective."""
    policy.train()
    stats, old, ref = dict.fromkeys(("loss", "kl", "clip_fraction", "ratio", "sampling_gap"), 0.0), {}, {}
    parts = chunks(range(len(groups)), cfg.micro_batch)
    number = over_ranks([len(groups)])[0]                      # of all ranks
    rounds = int(over_ranks([len(parts)], dist.ReduceOp.MAX)[0])               # every rank collects gradients as often
    for inner in range(cfg.inner_updates):
        for n, part in enumerate(parts + [()] * (rounds - len(parts))):
            if part:
                prompts, paths = [groups[q].prompt for q in part], [groups[q].ids for q in part]
                logps, mask = path_logps(policy, processor, prompts, paths, cfg.temperature)       # (questions, G, C)
                if inner == 0:
                    old[n] = ref[n] = logps.detach()           # before the first step the old policy is the policy
                    if reference is not None:
                        with torch.no_grad():
                            ref[n] = path_logps(reference, processor, prompts, paths, cfg.temperature)[0]
                A = advantages[part.start:part.stop].to(logps.device)
                by_path = [x.flatten(0, 1) for x in (logps, old[n], ref[n], A, mask)]           # (paths, C), A (paths,)
                loss, part_stats = grpo_loss(*by_path, cfg.clip, cfg.beta)
                share = len(part) / number                     # of the mean over all paths, whatever the micro-batch
                (loss * share).backward()
                part_stats["loss"] = check_finite("loss", loss.item(), [groups[q].row for q in part], inner > 0)
                for name, value in part_stats.items():
                    stats[name] += share * value / cfg.inner_updates
                if inner == 0:                                 # cached sampling against packed forward: rounding only
                    sampled = torch.cat([p for q in part for p in groups[q].logps])
                    stats["sampling_gap"] += share * (old[n][mask].cpu() - sampled).abs().mean().item()
            optimizer.collect()
        norm = check_finite("gradient norm", optimizer.gradient_norm(), [group.row for group in groups], inner > 0)
        optimizer.step(lr, norm, cfg.max_grad_norm)
    return {**dict(zip(stats, over_ranks(list(stats.values())))), "grad_norm": norm}


def train(run, cfg, policy, reference, processor, rows, optimizer):
    """The StepGRPO loop: sample, score, normalise, update, log, save."""
    start = run.state["step"]
    bar = tqdm(range(start, cfg.steps), "StepGRPO", initial=start, total=cfg.steps, unit="update")
    for step in bar:
        began = time.perf_counter()
        groups, number, drawn, flat = sample_groups(cfg, policy, processor, rows, run.state["drawn"])
        lr = cfg.lr * (1 - step / cfg.steps)
        rewards = torch.tensor([[score["reward"] for score in group.scores] for group in groups])
        rewards = rewards.view(-1, cfg.group_size)                                             # (this rank's Q, G)
        record = {"phase": "StepGRPO", "step": step + 1, "questions": number, "flat_groups": flat, "lr": lr}
        if number:                                             # with --skip-flat-groups there may be none left
            advantages = group_advantages(rewards)                                                  # (Q, G)
            stats = update(cfg, policy, reference, processor, groups, advantages, optimizer, lr)
            record.update(stats, **summarize(groups, rewards, processor.eos))
        record["seconds"] = time.perf_counter() - began
        run.log("metrics.jsonl", record)
        tqdm.write(format_update(record, cfg))
        if groups and step % cfg.show_every == 0:
            show_group(run, groups[0], advantages[0].tolist(), step + 1)
            write_report(run)
        run.end_update(policy, processor, optimizer, step + 1, drawn)


def show_group(run, group, advantages, step):
    """Prints the best and the worst path of a group, and logs all of it for the report."""
    paths = [{"text": text, **score, "advantage": advantage}
             for text, score, advantage in zip(group.texts, group.scores, advantages)]
    row, ranking = group.row, sorted(paths, key=lambda path: path["reward"])
    for path in (ranking[-1], ranking[0]):
        tqdm.write(show_path(row, path["text"], path, path["advantage"]))
    run.log("samples.jsonl", {"step": step, "where": row.where, "problem": row.problem, "answer": row.answer,
                              "images": list(map(str, row.images)), "key_steps": row.key_steps, "paths": paths})


def write_report(run):
    """The page to look at, report.html in the run folder: from its logs, at any time."""
    if not rank():
        sys.modules.setdefault("stepgrpo", sys.modules[__name__])              # run as a script, it has another name
        from data.report import write_report as write
        write(run.out)


def summarize(groups, rewards, eos):
    """Means over all paths of an update, on all ranks. groups: those of this rank, with rewards (Q, G)."""
    names = (*SCORES, "reward_std", "length", "cut")
    G, paths = rewards.shape[1], [path for group in groups for path in group.ids]
    sums = [sum(score[name] for group in groups for score in group.scores) / G for name in SCORES]
    sums += [rewards.std(1).sum().item(), sum(map(len, paths)) / G, sum(int(path[-1]) not in eos for path in paths) / G]
    number, *sums = over_ranks([len(groups), *sums])
    return {name: value / number for name, value in zip(names, sums)}


def format_update(record, cfg):
    """One aligned line per update, at most 120 columns."""
    head = f"update {record['step']:5d}/{cfg.steps}"
    tail = f"flat {record['flat_groups']:2d}  lr {record['lr']:.1e}  {record['seconds']:5.1f}s"
    if not record["questions"]:
        return f"{head}  every group was flat: nothing learned  {tail}"
    return (f"{head}  reward {record['reward']:.3f}  right {record['right']:.2f}  k {record['k']:.2f}  "
            f"valid {record['step_validity']:.2f}  KL {record['kl']:.4f}  len {record['length']:4.0f}  {tail}")


def show_path(row, text, score, advantage):
    """A sampled path for people: its sections, the key steps that each step earned, its rewards and its advantage."""
    path = split_path(text)
    earned = matched_key_steps(text, row.key_steps) if row.key_steps else []
    shown, steps, lines = path._asdict(), enumerate(path.steps), [f"┌ {row.where}: {row.problem}"]
    for name in path.order:
        if name == "reasoning":                                # only a heading
            continue
        content = shown.get(name, "")
        if name.startswith("step "):
            i, content = next(steps)
            content += "".join(f"   ✓ {row.key_steps[k][0]}" for k, step in enumerate(earned) if step == i)
        elif name == "answer":
            content += "   ✓" if score["right"] else f"   ✗ (right: {row.answer})"
        lines.append(f"│ {name:12}" + " ".join(content.split()))
    missed = [row.key_steps[k][0] for k, step in enumerate(earned) if step is None]
    lines += ["│ missed      " + ", ".join(missed)] if missed else []
    lines.append(f"└ reward {score['reward']:.2f}: StepRAR {score['step_accuracy']:.2f} with k {score['k']:.2f}, "
                 f"StepRVR {score['step_validity']:.0f}; advantage {advantage:+.2f}")
    return "\n".join(lines)


def evaluate(run, cfg, policy, processor, rows, name, temperature):
    """Mean scores of one path per held-out question; temperature 0 is greedy. Kept in run.state["evaluations"]."""
    if name in run.state["evaluations"] or not rows:
        return
    numbers, sums = range(len(rows)), collections.Counter(dict.fromkeys(SCORES, 0.0))
    with tqdm(desc=f"evaluate, {name}", total=len(rows), unit="question") as bar:
        for batch in chunks(numbers, cfg.questions * cfg.group_size):          # as many paths at once as in training
            if run.stop_asked():
                raise KeyboardInterrupt
            mine = batch[rank()::ranks()]
            if mine:
                prompts = [make_prompt(processor, rows[n], cfg) for n in mine]
                sampled = rollout(policy, processor, prompts, 1, cfg.max_new_tokens, temperature,
                                  [question_seed(cfg, n) for n in mine], None,
                                  None if cfg.cuda_graph else False)
                for n, texts in zip(mine, sampled.texts):
                    sums.update(score_path(texts[0], rows[n], cfg))
            bar.update(len(batch))
    means = {key: value / len(rows) for key, value in zip(SCORES, over_ranks([sums[key] for key in SCORES]))}
    run.state["evaluations"][name] = means
    run.log("metrics.jsonl", {"phase": "evaluation", "name": name, "questions": len(rows), **means})


# ─── 12. Main ─────────────────────────────────────────────────────────────────────────────────────────────────────────

def load_data(cfg):
    """→ training rows, warm-up rows, held-out rows, complaints. The held-out questions are never trained on."""
    train, complaints = read_rows(cfg.data, cfg.reward in ("step", "accuracy"))
    source, warmup, test = cfg.warmup_data or ("shapes/warmup" if cfg.data == "shapes" else ""), [], []
    if source and cfg.warmup_steps:
        rows, more = read_rows(source)
        complaints += more + [f"{row.where}: holds no path" for row in rows if not split_path(row.path).order]
        rows = [row for row in rows if split_path(row.path).order]
        warmup = [row for row in rows if REFLECTIVE not in row.path]
        if len(warmup) < len(rows):
            print(f"warm-up: {len(rows) - len(warmup)} of {len(rows)} paths left out, for they hold: {REFLECTIVE}")
    if cfg.data == "shapes":
        rows, more = read_rows("shapes/test")
        test, complaints = rows[:cfg.held_out], complaints + more
    elif cfg.held_out:
        rows = random.Random(cfg.seed).sample(train, len(train))
        n = min(cfg.held_out, len(rows) // 10)
        test, train = rows[:n], rows[n:]
        asked = {(row.problem, *row.images) for row in test}
        train, warmup = ([row for row in rows if (row.problem, *row.images) not in asked] for rows in (train, warmup))
        print(f"held out: {n} questions of {cfg.data}; {len(train)} are left to train on")
    return train, warmup, test, complaints


def pick_device(cfg):
    """→ torch device and dtype of the weights."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {name} is not there: {str(e).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)                          # streams and graphs are made on the current one
    if cfg.dtype == "auto":
        return device, torch.bfloat16 if device.type == "cuda" else torch.float32
    return device, getattr(torch, cfg.dtype)


def print_curves(run, width=60):
    """The training curves as a line of blocks each, from its lowest to its highest; before and after it, its ends."""
    records = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text(encoding="utf-8").split("\n") if line]
    records = [r for r in records if r["phase"] == "StepGRPO" and r["questions"]]
    if not records:
        return
    print(f"\nStepGRPO, {len(records)} updates, on the training questions as they were sampled")
    for name in ("right", "k", "step_validity", "kl", "length"):
        values = [r[name] for r in records]
        bins = [values[i * len(values) // width:(i + 1) * len(values) // width] for i in range(width)]
        means = [sum(b) / len(b) for b in bins if b]
        low, high = min(means), max(means)
        blocks = "".join("▁▂▃▄▅▆▇█"[round(7 * (m - low) / (high - low or 1))] for m in means)
        print(f"{name:14}{means[0]:8.3f} {blocks} {means[-1]:.3f}")


def print_table(run, questions):
    print(f"\n{'held-out, ' + str(questions) + ' questions':34}{'right':>8}{'StepRAR':>9}{'StepRVR':>9}{'k':>8}")
    for how in ("greedy", "sampled at T = 1"):
        for when in ("before", "after"):
            e = run.state["evaluations"][f"{when}, {how}"]
            label = f"{how}, {'warm-up' if when == 'before' else 'StepGRPO'}"
            print(f"{label:34}{e['right']:8.3f}{e['step_accuracy']:9.3f}{e['step_validity']:9.3f}{e['k']:8.3f}")


def learn(run, cfg, policy, processor, splits, optimizer):
    """Warm-up, StepGRPO against the frozen result of the warm-up, and the evaluations before and after."""
    train_rows, warmup_rows, test_rows = splits
    if run.state["phase"] == "warm-up":
        if cfg.warmup_steps:
            warm_up(run, cfg, policy, processor, warmup_rows, optimizer)
        if not rank():
            save_model(policy, processor, run.out / "reference")
        optimizer.forget()
        run.state.update(phase="StepGRPO", step=0)
        run.save(policy, processor, optimizer)
    reference = None
    if cfg.beta and run.state["step"] < cfg.steps:             # a finished run has no use for it
        reference, _ = load_model(run.out / "reference", policy.device, policy.dtype, cfg.max_pixels)
        reference.requires_grad_(False)
    held_out = {"greedy": 0, "sampled at T = 1": 1.0}
    for name, temperature in held_out.items():
        evaluate(run, cfg, policy, processor, test_rows, f"before, {name}", temperature)
    if run.state["step"] < cfg.steps:
        for name in held_out:                                  # a finished run goes on: its end is another one now
            run.state["evaluations"].pop(f"after, {name}", None)
        train(run, cfg, policy, reference, processor, train_rows, optimizer)
        run.save(policy, processor, optimizer)
    for name, temperature in held_out.items():
        evaluate(run, cfg, policy, processor, test_rows, f"after, {name}", temperature)
    run.save(policy, processor, optimizer)
    write_report(run)


def run_all(run, cfg):
    """Data, model, warm-up, StepGRPO, table."""
    print(textwrap.fill(" ".join(f"{name}={value}" for name, value in asdict(cfg).items()), 120))
    device, dtype = pick_device(cfg)
    train_rows, warmup_rows, test_rows, complaints = load_data(cfg)
    with tempfile.TemporaryDirectory() as folder:
        resuming = run.state["step"] or run.state["phase"] != "warm-up"
        source = run.out / "checkpoint" if resuming else cfg.model
        if source == "tiny":
            shared = [folder]
            if ranks() > 1:
                dist.broadcast_object_list(shared)             # of all ranks' folders, that of rank 0
            source = shared[0]
            if not rank():
                build_tiny(source, [row.problem + "\n" + row.path for row in train_rows + warmup_rows], cfg.seed)
            barrier()
        print(f"loading {cfg.model} on {device}, {dtype}; torch {torch.__version__}, "
              f"transformers {transformers.__version__}")
        policy, processor = load_model(source, device, dtype, cfg.max_pixels)
        barrier()                                              # before rank 0 leaves, and takes the folder with it
    train_rows, warmup_rows, test_rows = validate((train_rows, warmup_rows, test_rows), complaints, processor, cfg)
    if cfg.warmup_steps == -1:
        cfg.warmup_steps = math.ceil(2 * len(warmup_rows) / cfg.warmup_batch)
    if not train_rows:
        raise UserError(f"{cfg.data} holds no questions to train on")
    if cfg.warmup_steps and not warmup_rows:
        raise UserError("--warmup-steps needs reference paths: --warmup-data FILE.json")
    millions = sum(p.numel() for p in policy.parameters()) / 1e6
    print(f"{millions:,.1f} M parameters; {len(train_rows)} questions, {len(warmup_rows)} warm-up paths, "
          f"{len(test_rows)} held-out questions")
    if cfg.gradient_checkpointing:                             # the method's name changed within transformers 5
        enable = getattr(policy, "activation_checkpointing_enable", None) or policy.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    optimizer = MasterAdamW(policy, cfg.offload_optimizer)
    if resuming:
        run.load_optimizer(optimizer)

    run.open()
    with run.signals():
        try:
            learn(run, cfg, policy, processor, (train_rows, warmup_rows, test_rows), optimizer)
        except UserError as e:                                 # a torn image, a non-finite loss: keep what was learned
            if not getattr(e, "harmed", False) and ranks() == 1:               # saving takes all ranks
                optimizer.clear()
                run.save(policy, processor, optimizer)
            raise
    if rank():
        return
    print_curves(run)
    if test_rows:
        print_table(run, len(test_rows))
    print(f"\nthe policy is in {run.out / 'checkpoint'}; look at {run.out / 'report.html'}")


# Asked for by a first argument; they stand in data/.
TOOLS = {"--explain": "explain.py", "--report": "report.py", "--bench": "speed.py"}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in TOOLS:
        sys.exit(subprocess.call([sys.executable, HERE / "data" / TOOLS[argv[0]], *argv[1:]]))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):                     # a terminal without ✓ is no reason to stop
            stream.reconfigure(errors="replace", line_buffering=True)
    transformers.utils.logging.disable_progress_bar()          # of reading weights, but not of downloading them
    huggingface_hub.utils.enable_progress_bars()
    out = None
    try:
        cfg = parse_config(argv)
        out = cfg.out
        join_ranks(cfg)
        run_all(Run(cfg), cfg)
    except UserError as e:
        sys.exit(f"stepgrpo: {e}")
    except KeyboardInterrupt:
        begun = out and (Path(out) / "checkpoint").exists()
        again = f"Go on with: python stepgrpo.py --resume --out {out}" if begun else "Nothing had begun"
        print(f"\nstopped. {again}")
        sys.exit(130)


if __name__ == "__main__":
    main()

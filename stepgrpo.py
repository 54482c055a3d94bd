# SPDX-License-Identifier: MIT
"""StepGRPO in one file: a vision-language model learns to reason from step-wise rewards.

    python stepgrpo.py                                        # a laptop, nothing to download
    python stepgrpo.py --model Qwen2-VL-2B --data my.jsonl    # a real checkpoint, one CUDA GPU
    python stepgrpo.py --resume --out runs/tiny               # go on where Ctrl-C stopped

The method (R1-VL, arXiv 2503.12937), and the function that does each step:

    warm-up     imitate reference paths, to learn the template            warm_up
    rollout     sample a group of G completions for each image question   rollout
    rewards     StepRAR: key steps and answer                             step_accuracy_reward
                StepRVR: complete and in order                            step_validity_reward
    advantages  compare the rewards inside each group                     group_advantages
    objective   clipped policy gradient, KL to the frozen reference       grpo_loss

`train` puts them together. Below a double line stand details that the method calls by name: skip
them at first reading. Three differences from the paper's code change results (README.md has all):

    1. A completion without an answer scores 0, as the paper says; the code pays its key steps.
    2. The answer is read from its own section; the code searches the whole text for it.
    3. Key steps match as whole words, and one step earns only some of them, so a list of all key
       words earns a part of k. The code looks for substrings.

A completion is what the model writes after a prompt; the paper calls it a reasoning path. Letters:

    Q questions      G completions per question    B = Q·G      K key-step groups
    P prompt tokens  C tokens of a completion      N = P + G·C  V vocabulary
    H hidden size    D size of a head              h key-value heads, r query heads for each
"""
import contextlib
import fcntl
import functools
import html
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from PIL import Image, ImageOps
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

HERE = Path(__file__).resolve().parent

class UserError(Exception):
    """What the user can mend. It says what is wrong, where, and what to do; main prints it."""

# ─── 1. Config ────────────────────────────────────────────────────────────────────────────────────

SHORT_NAMES = {x: f"Qwen/{x}-Instruct" for x in ("Qwen2-VL-2B", "Qwen2-VL-7B", "Qwen2.5-VL-3B")}
SHORT_NAMES |= {x: f"jingyiZ00/{x}" for x in ("R1-VL-2B", "R1-VL-7B")}

def knob(default, help):
    return field(default=default, metadata={"help": help})

@dataclass
class Config:
    """Every setting, with its default for a real checkpoint."""
    model: str = knob("tiny", f"tiny, {', '.join(SHORT_NAMES)}, a Hub id or a folder")
    data: str = knob("shapes", "shapes, or a .json or .jsonl file of questions")
    warmup_data: str = knob("", "such a file of paths to imitate; '' = shapes' own, or none")
    out: str = knob("", "run folder; '' = runs/<model>")
    resume: bool = knob(False, "go on with the run in --out")
    seed: int = knob(0, "of data order, sampling and tiny's weights")
    device: str = knob("auto", "auto, cpu or cuda (CUDA_VISIBLE_DEVICES picks the GPU)")
    warmup_steps: int = knob(-1, "updates of imitation; -1 = two epochs (paper), 0 = none")
    warmup_batch: int = knob(128, "reference paths per update (paper)")
    warmup_lr: float = knob(1e-5, "peak learning rate, cosine (paper, 2B; 5e-6 for 7B)")
    steps: int = knob(-1, "StepGRPO updates; -1 = 13,125 (official), shapes: one pass")
    questions: int = knob(4, "Q, questions per update (official, 2B; 16 for 7B)")
    group_size: int = knob(4, "G, completions per question (paper: M)")
    temperature: float = knob(1.2, "of sampling and of StepGRPO's log-probs (paper)")
    max_new_tokens: int = knob(1024, "C, completion limit in tokens (paper)")
    reward: Literal["step", "outcome", "accuracy", "validity"] = knob(
        "step", "both rewards, right answer (plain GRPO), StepRAR or StepRVR")
    alpha: float = knob(0.1, "α, weight of the key steps in StepRAR (paper)")
    beta: float = knob(0.04, "β, weight of the KL to the reference (paper)")
    clip: float = knob(0.2, "ε, clip range of the ratio (ours; acts if μ > 1)")
    inner_updates: int = knob(1, "μ, optimiser steps per rollout (paper)")
    lr: float = knob(1e-6, "peak learning rate, linear decay to 0 (paper, official)")
    instruction: bool = knob(True, "ask for the template in the prompt (official)")
    max_pixels: int = knob(400_000, "larger images are shrunk (official)")
    max_prompt_tokens: int = knob(2048, "longer prompts are errors, never cut (ours)")
    held_out: int = knob(200, "questions to evaluate on, at most a tenth of all (ours)")
    micro_batch: int = knob(1, "questions per forward: for memory and speed")
    offload_optimizer: bool = knob(False, "fp32 weights and moments in host memory")
    save_every: int = knob(100, "updates between checkpoints")
    show_every: int = knob(10, "updates between two printed groups")

# What `python stepgrpo.py` runs. Half a million fresh weights bear larger steps than two billion
# trained ones, and a task this small needs fewer of them. The method is the same.
TINY = dict(
    warmup_steps=1800, warmup_batch=8, warmup_lr=2e-3,
    steps=80, questions=8, group_size=8, lr=3e-4, beta=0.01, temperature=1.0, max_new_tokens=128,
    held_out=300, micro_batch=8, instruction=False)  # the warm-up teaches the template

# ─── 2. Template and sections ─────────────────────────────────────────────────────────────────────

# Word for word from the official evaluation. The quote that never closes is theirs.
INSTRUCTION = """Generate an image description based on the question.
Then, provide a rationale to analyze the question.
Next, generate a step-by-step reasoning process to solve the problem. \
Ensure the steps are logical and concise.
Finally, provide a concise summary of the final answer in the following format: \
'The final answer is: xxx.

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
    return INSTRUCTION.replace("{question}", question)  # not str.format: it may hold braces

class Sections(NamedTuple):
    """A completion cut at its headers. None: no such header; '': nothing stands under it."""
    description: str | None
    rationale: str | None
    steps: list[str]  # their texts, as they appear
    answer: str | None  # of the last answer header
    order: list[str]  # headers as they appear: description, rationale, step 1, answer

# A header opens a line. `##` without a known name only ends the section before it.
HEADER = re.compile(
    r"^(?P<marks>[ \t#*]*)(?:(?P<description>image +description)|(?P<rationale>rationales?)"
    r"|(?P<reasoning>let['’]s +think +step +by +step)|step *(?P<number>\d{1,4})"
    r"|(?P<answer>the +final +answer +is(?:[^\w'\"]{0,9}the +final +answer +is)?)|(?<=##))(?!\w)"
    r"[ \t]*\**[ \t]*(?:(?P<colon>[:：])|\.(?!\d))?\**", re.IGNORECASE | re.MULTILINE)

def split_sections(text):
    """Text → Sections. Case, spaces, the number of #, bold and a missing colon are forgiven, and
    the answer header may lack the #, if a colon or bold marks it."""
    headers = [m for m in HEADER.finditer(text) if "#" in m["marks"]
               or m["answer"] and (m["colon"] or "**" in m[0])]
    ends = [m.start() for m in headers[1:]] + [len(text)]
    last, steps, order = dict.fromkeys(("description", "rationale", "answer")), [], []
    for header, end in zip(headers, ends):
        body = text[header.end():end].strip()
        if header["number"]:
            steps.append(body)
            order.append(f"step {int(header['number'])}")
        for name in last:
            if header[name]:
                last[name] = body
                order.append(name)
    return Sections(steps=steps, order=order, **last)

# ─── 3. Rewards, advantages, objective ────────────────────────────────────────────────────────────

def earned_key_steps(text, key_steps, reference=None):
    """For each of the K key-step groups, the index of the step that earns it, or None.

    It is the first that states it. But one step earns at most max(2, ceil(K/3)) groups, or as many
    as the densest step of a reference path (ours): else one list of all key words would be best."""
    groups = parse_key_steps(key_steps)
    densest = max(map(len, stated_key_steps(reference or "", groups)), default=0)
    cap = max(2, math.ceil(len(groups) / 3), densest)
    earned = [None] * len(groups)
    for step, stated in enumerate(stated_key_steps(text, groups)):
        new = [i for i in stated if earned[i] is None]
        for i in new[:cap]:
            earned[i] = step
    return earned

def match_key_steps(text, key_steps, reference=None):
    """k of Eq. 2: the share of the key-step groups that a completion earns, in [0, 1]."""
    earned = earned_key_steps(text, key_steps, reference)
    return sum(step is not None for step in earned) / len(earned)

def step_accuracy_reward(text, answer, key_steps, alpha=0.1, reference=None):
    """StepRAR (paper, Eq. 2): 1 + α·k for the right answer, α·k for a wrong one, 0 for none.

    answer: the ground truth; key_steps: groups of equivalent forms; reference: the reference path,
    if there is one. ValueError: ground truth or key steps are empty."""
    if not has_content(answer):
        raise ValueError(f"the ground-truth answer is empty: {answer!r}")
    prediction = final_answer(text)
    if prediction is None:
        return 0.0
    right = float(same_answer(prediction, answer))
    k = match_key_steps(text, key_steps, reference)
    return right + alpha * k

def step_validity_reward(text):
    """StepRVR (paper, Eq. 3): 1 if the completion is complete and logical, else 0.

    Complete: description, rationale, at least one step and an answer, each with a letter or digit.
    Logical: description and rationale come first, then steps 1 … n in order, then one answer.
    The official code also pays an empty skeleton, two answers, and a step after the answer."""
    sections = split_sections(text)
    steps, order = sections.steps, sections.order
    needed = [sections.description, sections.rationale, *steps, final_answer(text)]
    complete = bool(steps) and all(map(has_content, needed))
    in_order = [*(f"step {n + 1}" for n in range(len(steps))), "answer"]
    logical = sorted(order[:2]) == ["description", "rationale"] and order[2:] == in_order
    return float(complete and logical)

def group_advantages(rewards):
    """(Q, G) → (Q, G): A = (r − mean) / (std + 1e-4) in each group, unbiased std (official code).

    A flat group, with all rewards equal, gets exactly 0. The z-score knows no scale: a difference
    of 0.03, alone in its group, weighs as much as right against wrong."""
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be (Q, G) with G ≥ 2, not {tuple(rewards.shape)}")
    mean, std = rewards.mean(1, keepdim=True), rewards.std(1, keepdim=True)  # (Q, 1)
    flat = (rewards == rewards[:, :1]).all(1, keepdim=True)  # (Q, 1)
    return ((rewards - mean) / (std + 1e-4)).masked_fill(flat, 0.0)

def grpo_loss(logps, old_logps, ref_logps, advantages, mask, clip=0.2, beta=0.04):
    """The clipped GRPO objective, negated: a mean over tokens, then over completions.

        ρ = exp(logp − old)      KL = exp(ref − logp) − (ref − logp) − 1      (k3, never negative)
        loss = − mean over completions of mean over tokens of [min(ρ·A, clip(ρ, 1±ε)·A) − β·KL]

    logps, old_logps, ref_logps, mask (B, C); advantages (B,), one for all tokens of a completion.
    → loss, and a dict of floats averaged alike: kl, ratio, clip_fraction (tokens whose gradient the
    clip takes away).

    With one update per rollout old = logp. So ρ is 1, the advantages sum to 0, and the loss is β·KL
    in value: it starts at 0 and rises. Its gradient is what teaches."""
    A = advantages[:, None]  # (B, 1)
    ratio = torch.exp(logps - old_logps)  # (B, C)
    gain = torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A)
    clipped = (ratio > 1 + clip) & (A > 0) | (ratio < 1 - clip) & (A < 0)
    kl = torch.exp(ref_logps - logps) - (ref_logps - logps) - 1  # (B, C)

    def mean(x):
        return ((x * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()

    stats = {"kl": mean(kl), "clip_fraction": mean(clipped.float()), "ratio": mean(ratio)}
    return -mean(gain - beta * kl), {name: value.item() for name, value in stats.items()}

# ─── 4. Prompt and forward ────────────────────────────────────────────────────────────────────────

EOS_TOKENS = ["<|im_end|>", "<|endoftext|>"]  # Qwen2-VL ends a turn with either
SPECIAL_TOKENS = [*EOS_TOKENS, "<|im_start|>", "<|vision_start|>", "<|vision_end|>",
                  "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
BEFORE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
AFTER = "<|im_end|>\n<|im_start|>assistant\n"

class Prompt(NamedTuple):
    """One question as the model takes it, on the CPU."""
    ids: torch.Tensor  # (P,) with <|image_pad|> once per image token
    positions: torch.Tensor  # (3, P) M-RoPE: time, height, width
    pixels: torch.Tensor | None  # (patches, values) of all images; None without images
    grids: torch.Tensor | None  # (images, 3): time, height, width in patches

class Processor:
    """Tokenizer and image processor of a checkpoint. (AutoProcessor needs torchvision.)"""
    def __init__(self, tokenizer, image_processor, model):
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.rope_index = model.model.get_rope_index
        self.image_token = model.config.image_token_id
        self.eos = tokenizer.convert_tokens_to_ids(EOS_TOKENS)
        # Ids that no completion may hold: an image token would ask for pixels, and the embedding
        # has rows past the tokenizer's last id that mean nothing.
        vocabulary = model.config.get_text_config().vocab_size
        self.banned = torch.arange(vocabulary) >= len(tokenizer)  # (V,)
        self.banned[tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS)] = True
        self.banned[self.eos] = False

    @functools.lru_cache(maxsize=8192)
    def text_ids(self, text, layout=False):
        """Special tokens count only in our own layout. In a user's text they are characters."""
        return tuple(self.tokenizer(text, add_special_tokens=False,
                                    split_special_tokens=not layout)["input_ids"])

    def prompt(self, text, images=()):
        """Chat layout of Qwen2-VL. Images stand where the text says <image>, or else before it."""
        pixels, grids, sizes = None, None, []  # sizes: tokens of each image
        if images:
            features = self.image_processor(images=list(images), return_tensors="pt")
            pixels, grids = features["pixel_values"], features["image_grid_thw"]
            sizes = (grids.prod(-1) // self.image_processor.merge_size**2).tolist()
        if text.count("<image>") != len(images):
            text = "<image>" * len(images) + text
        ids = [*self.text_ids(BEFORE, layout=True)]
        signs = ["<|vision_start|>" + "<|image_pad|>" * size + "<|vision_end|>" for size in sizes]
        for part, after in zip(text.split("<image>", len(images)), [*signs, AFTER]):
            ids += self.text_ids(part) + self.text_ids(after, layout=True)
        ids = torch.tensor(ids)
        # An image of t × h × w tokens spans a box of positions, and the text goes on after its
        # longest side: 100 image tokens may advance the position by 10.
        is_image = (ids == self.image_token).int()
        positions, _ = self.rope_index(ids[None], is_image[None], image_grid_thw=grids)
        return Prompt(ids, positions[:, 0], pixels, grids)

def stack_prompts(prompts, padding, device):
    """Q prompts, padded right → ids, positions (3, Q, P), is_real (Q, P), last: index tensors."""
    ids = pad_sequence([p.ids for p in prompts], True, padding)  # (Q, P)
    positions = pad_sequence([p.positions.T for p in prompts], True).permute(2, 0, 1)  # (3, Q, P)
    lengths = torch.tensor([len(p.ids) for p in prompts], device=device)  # (Q,)
    is_real = torch.arange(ids.shape[1], device=device) < lengths[:, None]  # (Q, P)
    last = torch.arange(len(prompts), device=device), lengths - 1
    return ids.to(device), positions.to(device), is_real, last

# transformers' forward knows no prompt that G completions share: it would encode it G times. So
# the layer of Qwen2 stands here, over the modules of the loaded model, with attention as argument.

def rms_norm(module, x):
    return F.rms_norm(x, x.shape[-1:], module.weight, module.variance_epsilon)

def rope_tables(model, positions, x):
    """positions (3, Q, N) → cos, sin (Q, N, 1, D), of the dtype and device of x."""
    cos, sin = model.model.language_model.rotary_emb(x, positions)  # (Q, N, D)
    return cos[:, :, None], sin[:, :, None]

def rotate(x, cos, sin):
    """RoPE of the pairs (x[i], x[i + D/2]): (…, D) → (…, D)."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin

def decoder_layer(layer, x, cos, sin, attend):
    """One layer of Qwen2 on x (…, H). Update and decoding differ in attend(layer, q, k, v) alone:
    q (…, h·r, D), k and v (…, h, D) → (…, h·r, D)."""
    own, normed = layer.self_attn, rms_norm(layer.input_layernorm, x)
    q, k, v = (project(normed).unflatten(-1, (-1, own.head_dim))  # (…, heads, D)
               for project in (own.q_proj, own.k_proj, own.v_proj))
    out = attend(layer, rotate(q, cos, sin), rotate(k, cos, sin), v)
    x = x + own.o_proj(out.flatten(-2))  # (…, H)
    return x + layer.mlp(rms_norm(layer.post_attention_layernorm, x))

def forward(model, ids, positions, prompts, attend):
    """ids (Q, N), positions (3, Q, N) → hidden states (Q, N, H), before the last norm."""
    x = model.get_input_embeddings()(ids)  # (Q, N, H)
    seeing = [prompt for prompt in prompts if prompt.pixels is not None]
    if seeing:  # one pass of the vision tower for all images
        pixels = torch.cat([prompt.pixels for prompt in seeing]).to(x.device, x.dtype)
        grids = torch.cat([prompt.grids for prompt in seeing]).to(x.device)
        features = model.model.get_image_features(pixels, grids).pooler_output
        is_image = (ids == model.config.image_token_id)[..., None]  # (Q, N, 1)
        x = x.masked_scatter(is_image, torch.cat(tuple(features)).to(x.dtype))
    cos, sin = rope_tables(model, positions, x)
    for layer in model.model.language_model.layers:
        if layer.gradient_checkpointing and torch.is_grad_enabled():
            x = checkpoint(decoder_layer, layer, x, cos, sin, attend, use_reentrant=False)
        else:
            x = decoder_layer(layer, x, cos, sin, attend)
    return x

def attention(q, k, v, **masking):
    """Softmax attention of q (Q, G, T, h·r, D) over k, v (Q, G, S, h, D) → (Q, G, T, h·r, D)."""
    G, r = q.shape[1], q.shape[3] // k.shape[3]
    k, v = k.repeat_interleave(r, 3), v.repeat_interleave(r, 3)  # (Q, G, S, h·r, D)
    q, k, v = (x.transpose(2, 3).flatten(1, 2) for x in (q, k, v))  # (Q, G·h·r, T or S, D)
    out = F.scaled_dot_product_attention(q, k, v, **masking)
    return out.unflatten(1, (G, -1)).transpose(2, 3)

def prompt_attention(q, k, v):
    """(Q, P, heads, D) → the same. Causal, and padding is on the right: no real token sees it."""
    return attention(q[:, None], k[:, None], v[:, None], is_causal=True)[:, 0]

def group_attention(P, G, visible, layer, q, k, v):
    """Prompts see themselves; each completion sees its prompt and itself: (Q, N, heads, D). Costs
    P² + G·C·(P + C) scores, where G forwards need G·(P + C)². visible (Q, 1, C, P + C) bool."""
    out = prompt_attention(q[:, :P], k[:, :P], v[:, :P])  # (Q, P, h·r, D)
    own_q, own_k, own_v = (x[:, P:].unflatten(1, (G, -1)) for x in (q, k, v))  # (Q, G, C, …)
    k, v = (x[:, None, :P].expand(-1, G, -1, -1, -1) for x in (k, v))  # (Q, G, P, h, D)
    k, v = torch.cat([k, own_k], 2), torch.cat([v, own_v], 2)  # (Q, G, P + C, h, D)
    own_out = attention(own_q, k, v, attn_mask=visible).flatten(1, 2)  # (Q, G·C, h·r, D)
    return torch.cat([out, own_out], 1)

# ─── 5. Log-probs and rollout ─────────────────────────────────────────────────────────────────────

def tempered_logps(logits, temperature, banned):
    """Logits (…, V) → log-probs (…, V) in fp32, at this temperature, without banned ids. Sampling
    and all losses use them."""
    return torch.log_softmax((logits.float() / temperature).masked_fill(banned, -torch.inf), -1)

def token_logps(head, hidden, targets, temperature, banned, chunk=512):
    """hidden (tokens, H), targets (tokens,) → log-probs (tokens,). Logits of 150,000 words are the
    largest tensor of all: they are made for `chunk` tokens at a time, and again in backward."""
    def project(hidden, targets):
        logps = tempered_logps(head(hidden), temperature, banned)  # (chunk, V)
        return logps.gather(1, targets[:, None])[:, 0]  # (chunk,)

    parts = zip(hidden.split(chunk), targets.split(chunk))
    return torch.cat([checkpoint(project, *part, use_reentrant=False) for part in parts])

def completion_logps(model, processor, prompts, completions, temperature=1.0):
    """Log-probs of all tokens of Q·G completions, with image and prompt encoded once per question.

    completions: Q lists of G id tensors (C,) → logps, mask (B, C); mask is True on tokens, logps is
    0 elsewhere. Equal to Q·G separate forwards. In the warm-up G is 1."""
    Q, G, device = len(prompts), len(completions[0]), model.device
    own_ids = [ids for group in completions for ids in group]
    own = pad_sequence(own_ids, True, processor.eos[0]).to(device)  # (B, C)
    C, columns = own.shape[1], torch.arange(own.shape[1], device=device)  # (C,)
    sizes = torch.tensor([len(ids) for ids in own_ids], device=device)  # (B,)
    mask = columns < sizes[:, None]  # (B, C)
    # A row is a prompt, then its G completions. Each goes on at the position after the prompt.
    ids, positions, is_real, last = stack_prompts(prompts, processor.eos[0], device)
    P = ids.shape[1]
    own_positions = (positions[:, *last][..., None] + 1 + columns).repeat(1, 1, G)  # (3, Q, G·C)
    ids = torch.cat([ids, own.view(Q, -1)], 1)  # (Q, N)
    positions = torch.cat([positions, own_positions], 2)  # (3, Q, N)
    # A completion sees the real tokens of its prompt, and its own up to the present one.
    sees_prompt = is_real[:, None, None].expand(Q, 1, C, P)  # (Q, 1, C, P)
    sees_own = (columns <= columns[:, None]).expand(Q, 1, C, C)  # (Q, 1, C, C)
    visible = torch.cat([sees_prompt, sees_own], -1)  # (Q, 1, C, P + C)
    attend = functools.partial(group_attention, P, G, visible)
    hidden = forward(model, ids, positions, prompts, attend)  # (Q, N, H)
    # A token is predicted from the state before it; the first one from the prompt's last.
    first = hidden[last][:, None, None].expand(-1, G, -1, -1)  # (Q, G, 1, H)
    rest = hidden[:, P:].unflatten(1, (G, C))[:, :, :-1]  # (Q, G, C - 1, H)
    before = torch.cat([first, rest], 2).flatten(0, 1)[mask]  # (tokens, H)
    before = rms_norm(model.model.language_model.norm, before)
    banned = processor.banned.to(device)
    logps = token_logps(model.lm_head, before, own[mask], temperature, banned)  # (tokens,)
    return torch.zeros(mask.shape, device=device).masked_scatter(mask, logps), mask

class Rollout(NamedTuple):
    """What `rollout` sampled: for each of Q questions a list of G completions."""
    ids: list  # G tensors (C,), up to and including EOS, kept and never encoded from text
    texts: list  # G strings
    logps: list  # G tensors (C,): log-prob of each token as it was sampled

@torch.no_grad()
def rollout(model, processor, prompts, group_size, max_new_tokens, temperature=1.0, seeds=None):
    """Samples `group_size` completions for each of Q prompts → Rollout. Temperature 0 is greedy.

    A completion ends at either EOS, or after max_new_tokens. seeds: Q numbers; so the completions
    of a question do not depend on the batch. The checkpoint's generation_config plays no part."""
    G, C = group_size, max_new_tokens
    seeds = seeds or [random.getrandbits(60) for _ in prompts]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    uniform = torch.stack([1 - torch.rand(G, C, generator=g) for g in generators])  # (Q, G, C)
    decoder = Decoder(model, processor, prompts, uniform, temperature)
    decoder.step(1)
    step = capture(decoder, C) if model.device.type == "cuda" else decoder.step
    for c in tqdm(range(1, C), "rollout", unit="token", leave=False, delay=5):
        if c % 8 == 0 and decoder.ended.all():  # asking is a sync: not at every token
            break
        step(c + 1)
    ids, logps = decoder.ids.T.cpu(), decoder.logps.T.cpu()  # (B, C)
    # Sampling went on behind the EOS of a completion until all were done: cut there.
    is_eos = torch.isin(ids, torch.tensor(processor.eos))  # (B, C)
    ends = torch.where(is_eos.any(1), is_eos.int().argmax(1) + 1, C).tolist()
    ids, logps = ([row[:end].clone() for row, end in zip(x, ends)] for x in (ids, logps))
    texts = [processor.tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    return Rollout(*(chunks(x, G) for x in (ids, texts, logps)))

class Decoder:
    """The KV cache of B = Q·G completions, and `step`, which samples one token for each.

    Keys and values of a prompt stand once per question, (Q, h, P, D), beside those of its G
    completions, (Q, h, G, C, D). `step` works on tensors that stay in their place and asks nothing
    of the device, so CUDA can capture it as a graph; else 800 kernels per token wait for Python."""
    def __init__(self, model, processor, prompts, uniform, temperature):
        """Encodes each prompt once. uniform (Q, G, C): a number in (0, 1] for each token."""
        (Q, G, C), device = uniform.shape, model.device
        self.model, self.temperature = model, temperature
        self.prompt_cache, self.own_cache = [], []

        def attend(layer, q, k, v):
            self.prompt_cache.append([x.transpose(1, 2).contiguous() for x in (k, v)])
            empty = [x.new_zeros(Q, x.shape[2], G, C, x.shape[3]) for x in (k, v)]
            self.own_cache.append(empty)  # zeros: 0 · nan would be nan
            return prompt_attention(q, k, v)

        ids, positions, is_real, last = stack_prompts(prompts, processor.eos[0], device)
        hidden = forward(model, ids, positions, prompts, attend)  # (Q, P, H)
        self.hidden = hidden[last].repeat_interleave(G, 0)  # (B, H): predicts the next token
        self.columns = torch.arange(C, device=device)
        self.padding = ~is_real[:, None, None, None]  # (Q, 1, 1, 1, P)
        next_position = positions[:, *last].repeat_interleave(G, 1) + 1  # (3, B)
        to_come = next_position[:, None] + self.columns[:, None]  # (3, C, B)
        self.cos, self.sin = rope_tables(model, to_come, hidden)  # (C, B, 1, D)
        self.uniform = uniform.flatten(0, 1).T.to(device)  # (C, B)
        self.c = ids.new_zeros(1)  # tokens so far; on the device, so a graph can count
        self.ids, self.logps = ids.new_zeros(C, Q * G), torch.zeros_like(self.uniform)
        self.ended = is_real.new_zeros(Q * G)
        self.banned = processor.banned.to(device)
        self.eos = torch.tensor(processor.eos, device=device)

    def step(self, length):
        """Samples token c of each completion and feeds it. Own caches are read up to `length`."""
        language_model, c = self.model.model.language_model, self.c
        logits = self.model.lm_head(rms_norm(language_model.norm, self.hidden))  # (B, V)
        logps = tempered_logps(logits, self.temperature or 1.0, self.banned)
        token = logps.argmax(-1)  # (B,)
        if self.temperature:
            token = sample(logps, self.uniform.index_select(0, c)[0])
        self.ids.index_copy_(0, c, token[None])
        self.logps.index_copy_(0, c, logps.gather(1, token[:, None]).T)
        self.ended |= (token[:, None] == self.eos).any(1)
        future = (self.columns[:length] > c).expand(*self.padding.shape[:-1], -1)
        masked = torch.cat([self.padding, future], -1)  # (Q, 1, 1, 1, P + length)
        attend = functools.partial(self.attend, masked)
        cos, sin = self.cos.index_select(0, c)[0], self.sin.index_select(0, c)[0]  # (B, 1, D)
        x = self.model.get_input_embeddings()(token)  # (B, H)
        for layer in language_model.layers:
            x = decoder_layer(layer, x, cos, sin, attend)
        self.hidden.copy_(x)
        c += 1

    def attend(self, masked, layer, q, k, v):
        """One token of each completion over its prompt and itself: q (B, h·r, D) → the same."""
        index = layer.self_attn.layer_idx
        prompt_k, prompt_v = self.prompt_cache[index]  # (Q, h, P, D)
        Q, h, G, _, D = self.own_cache[index][0].shape
        P, T = prompt_k.shape[2], masked.shape[-1] - prompt_k.shape[2]
        for cache, new in zip(self.own_cache[index], (k, v)):
            cache.index_copy_(3, self.c, new.view(Q, G, h, 1, D).transpose(1, 2))
        own_k, own_v = (cache[..., :T, :] for cache in self.own_cache[index])  # (Q, h, G, T, D)
        q = (q * D ** -.5).view(Q, G, h, -1, D).transpose(1, 2)  # (Q, h, G, r, D)
        # All G·r queries of a question meet the keys of its prompt in one matmul.
        scores = (q.flatten(2, 3) @ prompt_k.mT).unflatten(2, (G, -1))  # (Q, h, G, r, P)
        scores = torch.cat([scores, q @ own_k.mT], -1).masked_fill(masked, -torch.inf)
        on_prompt, on_own = torch.softmax(scores, -1).split([P, T], -1)
        out = (on_prompt.flatten(2, 3) @ prompt_v).unflatten(2, (G, -1)) + on_own @ own_v
        return out.transpose(1, 2).reshape(Q * G, -1, D)

def sample(logps, uniform):
    """One token per row by inverse CDF: logps (B, V), uniform (B,) in (0, 1] → (B,). If rounding in
    a parallel sum hits a word of probability 0, the likeliest word is taken."""
    cdf = logps.exp().cumsum(-1)  # (B, V)
    token = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:])  # (B, 1)
    token = token.clamp(max=cdf.shape[1] - 1)  # among nans no place is found
    possible = logps.gather(1, token) > -torch.inf
    return torch.where(possible, token, logps.argmax(-1, keepdim=True))[:, 0]

def capture(decoder, length):
    """`decoder.step` as a CUDA graph of this length, or as it is if CUDA refuses. A step has run
    before, so CUDA's libraries are loaded. The outer `with` leaves a failed capture's stream."""
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
            decoder.step(length)
        return lambda length: graph.replay()
    except (RuntimeError, AssertionError) as e:
        tqdm.write(f"no CUDA graph, so sampling is slower: {str(e).strip().splitlines()[0]}")
        return decoder.step

# ─── 6. Training ──────────────────────────────────────────────────────────────────────────────────

def warm_up(cfg, run, policy, processor, rows, optimizer):
    """Supervised fine-tuning: mean negative log-likelihood of the tokens of reference paths."""
    bar = tqdm(range(run.step, cfg.warmup_steps), "warm-up", unit="update")
    for step in bar:
        batch = draw(rows, cfg.warmup_batch, cfg.seed, step)
        paths = [(row, torch.tensor([*processor.text_ids(row.reference), processor.eos[0]]))
                 for row in batch]
        paths.sort(key=lambda path: len(path[1]))  # of like length: little padding
        tokens, loss_sum = sum(len(ids) for _, ids in paths), 0.0
        for part in chunks(paths, cfg.micro_batch):
            prompts = [make_prompt(processor, row, cfg) for row, _ in part]
            logps, _ = completion_logps(policy, processor, prompts, [[ids] for _, ids in part])
            loss = -logps.sum() / tokens  # of all tokens of the update
            loss.backward()
            loss_sum += loss.item()
        # The learning rate rises over 3 % of the updates (official), then falls as half a cosine.
        progress = (step + 0.5) / cfg.warmup_steps
        fall = max(0.0, progress - 0.03) / 0.97
        lr = cfg.warmup_lr * min(1.0, progress / 0.03) * math.cos(math.pi * fall / 2) ** 2
        record = {"loss": loss_sum, "grad_norm": optimizer.step(lr), "lr": lr}
        run.log("metrics.jsonl", {"phase": "warm-up", "step": step + 1, **record})
        bar.set_postfix(loss=f"{loss_sum:.3f}")
        run.end_update()

def train(cfg, run, policy, reference, processor, rows, optimizer):
    """The StepGRPO loop: sample, score, compare, update, log, save."""
    Q, first = cfg.questions, run.step - cfg.warmup_steps
    for step in range(first, cfg.steps):
        began = time.perf_counter()
        # 1. Draw Q questions and sample G completions for each. Random numbers belong to the
        #    question: neither the batch nor an interruption changes what is sampled.
        batch = draw(rows, Q, cfg.seed, step)
        prompts = [make_prompt(processor, row, cfg) for row in batch]
        seeds = [cfg.seed * 1_000_003 + n for n in range(step * Q, step * Q + Q)]
        sampled = rollout(policy, processor, prompts, cfg.group_size, cfg.max_new_tokens,
                          cfg.temperature, seeds)
        # 2. Score each completion by rule.
        scores = [[score(text, row, cfg) for text in texts]
                  for row, texts in zip(batch, sampled.texts)]
        rewards = torch.tensor([[s["reward"] for s in group] for group in scores])  # (Q, G)
        # 3. Compare the rewards inside each group.
        advantages = group_advantages(rewards)  # (Q, G)
        # 4. Make the better ones likelier: μ steps on the same completions, in parts that fit in
        #    memory. Before the first of these steps the policy is the old policy.
        lr = cfg.lr * (1 - step / cfg.steps)
        old, ref, stats = {}, {}, Counter()
        for inner in range(cfg.inner_updates):
            for part in chunks(range(Q), cfg.micro_batch):  # part: a range of questions
                ids = [sampled.ids[q] for q in part]
                inputs = processor, [prompts[q] for q in part], ids, cfg.temperature
                logps, mask = completion_logps(policy, *inputs)  # (part·G, C)
                share = len(part) / Q  # of the mean over all completions
                if inner == 0:
                    old[part] = ref[part] = logps.detach()  # KL 0 if there is no reference
                    if reference is not None:
                        with torch.no_grad():
                            ref[part], _ = completion_logps(reference, *inputs)
                    seen = torch.cat([x for q in part for x in sampled.logps[q]])
                    gap = (old[part][mask].cpu() - seen).abs().mean().item()
                    stats["sampling_gap"] += share * gap
                A = advantages[part.start:part.stop].flatten().to(logps.device)  # (part·G,)
                loss, more = grpo_loss(logps, old[part], ref[part], A, mask, cfg.clip, cfg.beta)
                (loss * share).backward()
                for name, value in {"loss": loss.item(), **more}.items():
                    stats[name] += share * value / cfg.inner_updates
            if step == first:
                check_sampling_gap(stats["sampling_gap"], policy.dtype)
            stats["grad_norm"] = optimizer.step(lr)
        # 5. Log, show, save.
        record = {"phase": "StepGRPO", "step": step + 1, "lr": lr, **stats,
                  **summarize(scores, rewards, sampled.ids, processor.eos),
                  "seconds": time.perf_counter() - began}
        run.log("metrics.jsonl", record)
        show(cfg, run, record, batch, sampled.texts, scores, rewards, advantages)
        run.end_update()

# ═════ Details: called by name above. Skip them at first reading. ═════════════════════════════════

# ─── 7. Scores, batches, output ───────────────────────────────────────────────────────────────────

def score(text, row, cfg):
    """All scores of a completion. `reward`, chosen by --reward, is what the policy learns from."""
    right = float(same_answer(final_answer(text), row.answer))
    accuracy, validity, k = right, step_validity_reward(text), 0.0
    if row.key_steps:
        k = match_key_steps(text, row.key_steps, row.reference)
        accuracy = step_accuracy_reward(text, row.answer, row.key_steps, cfg.alpha, row.reference)
    reward = {"step": accuracy + validity, "outcome": right,
              "accuracy": accuracy, "validity": validity}[cfg.reward]
    return dict(reward=reward, right=right, step_accuracy=accuracy, step_validity=validity, k=k)

def mean_scores(scores):
    return {name: sum(s[name] for s in scores) / len(scores) for name in scores[0]}

def summarize(scores, rewards, ids, eos):
    """Means over the completions of an update, as they were sampled."""
    ids = sum(ids, [])
    return mean_scores(sum(scores, [])) | {
        "reward_std": rewards.std(1).mean().item(),
        "flat_groups": int((rewards == rewards[:, :1]).all(1).sum()),
        "length": sum(map(len, ids)) / len(ids),
        "cut": sum(int(x[-1]) not in eos for x in ids) / len(ids)}

def check_sampling_gap(gap, dtype):
    """Log-probs from sampling and from the update's forward may differ by rounding only: up to 0.07
    on average in bf16 with 28 layers of random weights. A wrong mask or position makes 0.5."""
    if not gap < (0.05 if dtype == torch.float32 else 0.25):
        raise UserError(f"log-probs of sampling and update differ by {gap:.3f} on average: one is "
                        "wrong here. Try --device cpu, or the versions in requirements.txt")

def chunks(items, size):
    return [items[i:i + size] for i in range(0, len(items), size)]

def draw(rows, size, seed, step):
    """Batch number `step` of an endless stream of rows, which is shuffled anew in each epoch."""
    places = [divmod(n, len(rows)) for n in range(step * size, step * size + size)]
    return [rows[shuffled(len(rows), seed, epoch)[i]] for epoch, i in places]

@functools.lru_cache(maxsize=4)
def shuffled(size, seed, epoch):
    """The order of the rows in an epoch."""
    return random.Random(f"{seed} {epoch}").sample(range(size), size)

def show(cfg, run, record, batch, texts, scores, rewards, advantages):
    """A line per update; every so often, best and worst of the group whose rewards differ most."""
    tqdm.write("update {step:5d}/{of}  reward {reward:.3f}  right {right:.2f}  k {k:.2f}  "
               "valid {step_validity:.2f}  KL {kl:.4f}  len {length:3.0f}  flat {flat_groups}  "
               "{seconds:.1f}s".format(of=cfg.steps, **record))
    if (record["step"] - 1) % cfg.show_every:
        return
    hours = record["seconds"] * (cfg.steps - record["step"]) / 3600
    q = rewards.std(1).argmax().item()
    row, A = batch[q], advantages[q].tolist()
    group = [{"text": text, **s, "advantage": a} for text, s, a in zip(texts[q], scores[q], A)]
    run.log("samples.jsonl", {"step": record["step"], **row._asdict(), "completions": group})
    tqdm.write(f"about {hours:.2f} hours to go\n── {row.where}: {row.problem} ({row.answer})")
    for pick in (max, min):
        tqdm.write("StepRAR {step_accuracy:.2f}, StepRVR {step_validity:.0f}, advantage "
                   "{advantage:+.2f}:\n{text}\n".format(**pick(group, key=lambda c: c["reward"])))

# ─── 8. One spelling, answers, key steps ──────────────────────────────────────────────────────────

# A reward must never pay a wrong answer. So only what is surely the same gets one spelling; what is
# not understood stays in the text and makes it different. Nothing is evaluated.
SIGNS = str.maketrans(
    dict(zip("−–×·⋅∗∙÷∕⁄∆≦⩽≧⩾∼∣⇒’‘′“”", "--*****///δ≤≤≥≥~|→'''\"\"")) | {"—": ";"}
    | {"∛": "√[3]"} | dict.fromkeys("∠∡", " angle ") | dict.fromkeys("△▵", " triangle "))
# By name, typed (90 degrees) or as a LaTeX command (90^\circ).
NAMED = {
    "*": "times|multiplied by|cdot", "/": "divided by", "+": "plus", "-": "minus", "≠": "neq",
    "√": "sqrt|square root of", "π": "pi", "°": "degrees?|circ", "%": "per ?cent", "∞": "infty",
    "^2 ": "squared", "=": r"equals|(?:is )?equal to|is(?= +[-\d√π{])"}
# Nothing else is a unit: '4 sin θ' is not 4 of the unit sin θ. The first name stands for all.
UNITS = {name + s: names[0] for s in ("", "s") for names in map(str.split, """
    m meter metre; cm centimeter centimetre; mm millimeter; km kilometer; in inch inche; mi mile;
    ft foot feet; yd yard; g gram; kg kilogram; oz ounce; lb pound; l liter litre; ml; s sec second;
    min minute; h hr hour; day; week; month; year; mph; °; rad radian; $ dollar; cent ¢; € euro;
    ¥ yen; £; unit""".split(";")) for name in names}
UNIT = rf"(?:{'|'.join(map(re.escape, UNITS))})(?: \^ [23])?"
OPENS = r"(?<![\w)\]⦄%°'!$€] )"  # no operand before

# Rules: a pattern, its replacement, and what it is for. The order counts.
PLAIN = [
    (r"(?i)</?(?:br|[bip]|answer|conclusion)[ /]*>", " "), ("º", "°"),
    (r"[\u00ad\u115f\u1160\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe0f\ufeff]", ""),
    (r"⁻?[⁰¹²³⁴-⁹ⁿ]+", r"^\g<0> "), (r"[₀-₉]+", r"_\g<0> "),  # x⁴ is x^4
    (r"(?<=\d)(?=[¼-¾⅐-⅞])", " "),  # 2½ is 2 1/2
    (r"(?<=[^\W\d_])-(?=[a-z]{2})", "‐")]  # co-interior: no minus
BOX = r"\\(?:boxed|text\w*|math\w+) ?\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"
LATEX = [
    (r"(?:,?\\[,!]|\{,\})(?=\d{3})", ","),  # 1{,}234
    (r"\$\$|`|\\(?:left|right|big|displaystyle|q?quad)\b|\\[,;:!()\[\] ]|(?<=\S)~", " "),
    (r"\$(?! )([^$\n]+)(?<![ \\])\$(?!\d)", r" \1 "),  # $x$, not $5 and $6
    *2 * [(BOX, r" \1 ")], (r"\n\s*(?:[-*•] |\(?\d[.)] (?=[^\W\d]))?|\\\\", " ; "),  # bullets
    (r"\\?([$€£¥]) ?(-?[\d.,]*\d)", r"\2 \1 "),  # $5 is 5 $
    (r"\\([%$&#_|])", r"\1"), (r"\\\{", "⦃"), (r"\\\}", "⦄"),
    (r"\\[dt]?frac(\d)(\d)", r" \1/\2"), (r"\\[dt]?frac ?(?=\{)", " "), (r"\} ?\{", "}/{"),
    *((rf"(?:\\|(?<![a-z]))(?:{names})(?![a-z])", f" {sign}") for sign, names in NAMED.items()),
    # HTML's entities have LaTeX's names: \leq is &leq; is ≤.
    (r"\\([a-z]+)", lambda m: html.entities.html5.get(m[1] + ";", f" {m[1]} ")),
    *3 * [(r"\{ *(-?[\d.]+|[^\W\d]\w*|\W?) *\}", r" \1 "),  # innermost first
          (r"\{([^{}]*,[^{}]*)\}", r" ⦃\1⦄ "), (r"\{([^{}]*)\}", r" (\1) ")]]
TYPED = [
    ("<=", "≤"), (">=", "≥"), (r"!=|=/=|(?:not|¬) ?=", "≠"), (r"\|\||//", "∥"),
    (r"(?<!\d)\"|\*\*+", " "),  # not 5"
    (r"[\^*] *\(? ?([°']+) ?\)?", r"\1"),  # 90^{\circ}
    (r"(?<=\d) ?x ?(?=\d)", "*"), (r"(?<=\d) ?: ?(?=\d)", "∶"),
    (r"(?<![\d.,(\[|⦃])\d{1,3}(?:,\d{3})+(?!,?\d| ?⟩)",
     lambda m: m[0].replace(",", ""))]  # 1,234, not (1,234)
# A number, perhaps with a letter; a Greek letter; a word; any other sign.
TOKEN = re.compile(
    r"\d*\.?\d+(?:e[-+]?\d+\b|[a-z]\b)?|[α-ω]|[^\W\d_α-ω](?:[^\W_α-ω]|')*|[^\s\w]|_")
GRAMMAR = [
    (r" \.(?=\d)", " 0."), (r"(\.\d*?[1-9])0+(?= )|\.0+(?= )", r"\1"),  # .50 is 0.5
    (rf"(?<=[\dπ)]) (sq|square|cubic) ({UNIT}) ", lambda m: f" {m[2]} ^ {2 + (m[1] == 'cubic')} "),
    (rf"(?<=[\dπ)]) ((?:° [cf]|{UNIT})(?: / {UNIT})?)(?= )",
     lambda m: " ~" + "".join(UNITS.get(x, x) for x in m[1].split())),
    (rf"{OPENS}(?:(-)|\+) (?=\d)", r"\1"),  # -3
    (rf"{OPENS}\( (-? ?√? ?(?:[\d.]+|[^\W\d]\w*)) \)(?! [\^!])", r"\1"),  # not f(3)
    (rf"{OPENS}(?<![\^√/] )\( ([\w. √]+) \)(?= /)", r"\1"),  # (2√3)/5
    (r"(?<=[\d)]) \( (\d[\d.]*) \)", r" * \1"),  # 7(3)
    (r"(?<=[\d)π]) \*(?= [√(α-ω]| [a-z] | sin| cos| tan)", ""), (r"(?<=\d) (?=[b-z] )", "")]  # 2x

def replace(rules, text):
    for pattern, new in rules:
        text = re.sub(pattern, new, text)
    return text

def plain(text):
    """Each character as a reader sees it: no entities, tags, full-width Ａ or zero width."""
    return unicodedata.normalize("NFKC", replace(PLAIN, html.unescape(text)))

@functools.lru_cache(8192)
def canonical(text):
    r"""One spelling for all ways to write the same: tokens joined by single spaces (ours).

    '\frac{6}{3} = 2', '6÷3=2' and '6 divided by 3 equals 2' become '6 / 3 = 2'. A number is one
    token, so 3 is not found in 13, 3.5, 1,300 or -3. So is a unit after a number: '5 ~cm^2'."""
    text = replace(LATEX, plain(text).lower()).translate(SIGNS)
    tokens = TOKEN.findall(replace(TYPED, text))
    return replace(GRAMMAR, f" {' '.join(tokens)} ").strip(" .,;:")

def has_content(text):
    """Whether a section or an answer holds a letter or a digit."""
    return bool(re.search(r"[^\W_]|[∅∞]", canonical((text or "")[:1000])))

WRAPPED = re.compile(rf"{BOX}|\\[(\[](.*)\\[)\]]|\$([^$]*)\$|[\"“']([^\"']*)[\"”']", re.S)
ASIDE = [
    (r"(?is)(?<=\S)(?:[,;.(\s]{1,3}(?:because|since)|[,;.(\n][\s*]{,4}(?:as|this|note|reason"
     r"|expl\w+)|, which(?! is [nwi])| is correct(?=\W*$))\b.*", ""),
    (r"(?i)\A[\s:=*`_]*(?:(?:so|thus|hence|therefore|the|my|final|correct|ans|answer|option|choice"
     r"|result|solution|is|[ws]h?ould be)\b[\s,:*]*)*(?=\S)", ""),
    (r"(?<![\s*`_.])[\s*`_.]+\Z", "")]

@functools.lru_cache(8192)
def undecorated(text):
    """An answer without 'the answer is', a reason, bold, dollars, quotes and boxes around it."""
    text = replace(ASIDE, plain(text[:2000]))
    while inner := WRAPPED.fullmatch(text):
        text = replace(ASIDE, inner[inner.lastindex])
    return text

def final_answer(text):
    """The answer that a completion commits to, in its last answer section; None if it is empty."""
    answer = undecorated(split_sections(text).answer or "")
    return answer if has_content(answer) else None

# 'C', '(C)', 'C. 58', 'option C', 'Yes, the bars differ'; not 'A dog', 'A, B', 'A or C'.
CHOICE = re.compile(
    r"(?:\(? ?([a-h]|yes|no|true|false)(?: ?\)|(?=\s?—|[.,:;\n]|\Z))[.,:;)]*"
    r"(?![^\s—])(?!.*(?:\bor\b|\([a-h]\)|(?<!°)(?-i:\b[A-H]\b(?! [a-z]))"
    r"|(?<!\b[A-H][.:)] )\b(?:yes|no|true|false)\W*\Z)))?(.*)", re.I | re.S)
NEGATION = r" (?:not?|non|none|nothing|never|without|cannot|neither|nor|≠|\w+n't) "
NAME = re.compile(r"(?:(?:angle \d+|[^\W\d][\w']*)(?: |\Z)){1,7}(?:\( [\w' ,]+ \))?")
NUMBER = re.compile(r"(?:\( )?(-?)(?:(\d+) (?=\d+ / ))?"  # sign, whole of a mixed number, rest
                    r"(\d+(?: / \d*[1-9]\d*|(?:\.\d+)?(?:e-?\d{1,3})?))(?: \))?")

def read_answer(text):
    """'(C) 58' → ('c', '', 58, None), 'x = 10/2 = 5 cm' → ('', 'x', 5, '~cm'): choice, name, value,
    unit. Of a chain of equalities the last side counts, if the others only compute it."""
    choice, text = CHOICE.fullmatch(undecorated(text or "")).groups("")
    text = re.sub(r"^\( ([^(),]*) \)$", r"\1", canonical(text))
    name, (*sides, value) = "", text.split(" = ")
    if sides and NAME.fullmatch(sides[0]) and not re.search(NEGATION, f" {sides[0]} "):
        name, *sides = sides
    work = re.sub(r" ~\S+|\b(?:sin|cos|tan|of|angle) ", "", " = ".join(sides))
    # '3 or x', '2 y' and '<' say more than a computation. Without a name any letter does.
    more = r"[\w)%] (?:[^\W\d]{2,}|[^\W\drdπ]\Z)|\d[a-z]\Z" if name else r"[^\W\dπ]"
    if not re.search(r"[\dπ]", value) or re.search(rf"[<>≤≥≠≈,;]|{more}", work):
        name, value = "", text
    value, unit = re.fullmatch(r"(.*?)(?: (%|~\S+))?", value).groups()
    if match := NUMBER.fullmatch(value.replace(" * 10 ^ ", "e").replace(" million", "e6")):
        value = Fraction(match[2] or 0) + Fraction(match[3].replace(" ", ""))
        value = -value if match[1] else value
    return choice.lower(), name, value, unit

def same_answer(a, b):
    """Whether two answers say the same (ours): equal texts, or equal numbers with the same unit or
    one without. A letter, yes or no decides if both have one. None and '' equal nothing."""
    if max(len(a or ""), len(b or "")) > 1000:
        return a == b
    (choice, name, a, unit), (choice_b, name_b, b, unit_b) = map(read_answer, (a, b))
    if choice and choice_b and (choice != choice_b or "" in (a, b)):
        return choice == choice_b
    if name and name_b and name != name_b or unit and unit_b and unit != unit_b:
        return False
    if unit != unit_b and "%" in (unit, unit_b):  # 50% is 50 and 0.5
        return a in (b, 100 * b) if unit == "%" else b in (a, 100 * a)
    return a == b != ""

def parse_key_steps(value):
    """Key steps as users bring them → K groups, each a list of equivalent forms. Takes groups or
    bare forms in lists or arrays, or the dict of R1-VL-10K ("Steps"). ValueError: malformed."""
    groups = []
    match json.loads(json.dumps(value, default=lambda array: array.tolist())):
        case [{"Steps": [*found]}, *_] | {"Steps": [*found]} | [*found]:
            groups = [forms if isinstance(forms, list) else [forms] for forms in found]
    texts = sum(groups, [])
    if not all([groups, *groups]) or not all(isinstance(x, str) and canonical(x) for x in texts):
        raise ValueError(f"key steps: no list of texts: {str(value)[:200]}")
    return groups

DENIED = re.compile(NEGATION + r"(?:(?!but )[^ .,;:!?→]+ ){0,2}\Z")  # in the same clause
PART = r"[*/^√‐_%±∶]|or|dozen|hundred|thousand|[mb]illion|log|ln|mod"
# An equation goes on with a unit, a number, an operator, a variable, a function.
MORE = rf"{PART}|[~\d+°!∪∩-]\S*|(?![ai] )[^\W\d]|(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|more|less"

def says(step, form):
    """Whether a step states a form, both canonical. Not if its clause denies it, or "or" offers
    another; not as a part of a fraction, a product or a longer equation: 'y = 2' in 'y = 2x'."""
    def with_or_without_unit(match):  # '180° - 57° = 123°' is '180 - 57 = 123'
        unit = re.escape(match[2]) if match[2] else r" ~\S+"
        return rf"{re.escape(match[1])}(?:{unit})?"
    part, pattern = PART, re.escape(form)
    if re.search("[=<>≤≥≈]", form):
        part = MORE
        pattern = r"(?<!\) )" + re.sub(r"(\S+)( ~\S+)?", with_or_without_unit, form)
    for match in re.finditer(rf"(?<= ){pattern} ", f" {step} "):
        head, tail = match.string[:match.start()][-60:], match.string[match.end():]
        tied = re.search(rf" (?:{part}) \Z", head) or re.match(rf"(?:[(\[|] )?(?:{part}) ", tail)
        if not tied and not DENIED.search(head):
            return True
    return False

def stated_key_steps(text, groups):
    """For each step of a text the groups of which it states a form, as indices in order."""
    steps = [canonical("\n" + step) for step in split_sections(text[:6000]).steps]
    return [[i for i, forms in enumerate(groups) if any(says(step, canonical(x)) for x in forms)]
            for step in steps]

# ─── 9. Data ──────────────────────────────────────────────────────────────────────────────────────

REFLECTIVE = "I think I have made a mistake. Let me rethink it."  # not in the official warm-up
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # others may start another program

class Row(NamedTuple):
    """One question. `where` names file and row, for every message about it."""
    where: str
    problem: str  # <image> marks images inside the text; others stand before it
    answer: str
    reference: str  # the reference path, or the bare answer
    key_steps: list  # groups of equivalent forms; [] if there are none
    images: list  # Path of each image file

@contextlib.contextmanager
def using(what, complaints=None):
    """Any failure inside becomes one line that begins with `what`: an error, or a complaint."""
    try:
        yield
    except Exception as e:
        bare = isinstance(e, (LookupError, TypeError, AttributeError)) or not str(e)
        line = " ".join(f"{what}: {repr(e) if bare else e}".split())[:400]
        if complaints is None:
            raise UserError(line) from None
        complaints.append(line)

def from_shapes(name):
    """Path in data/shapes/, which is drawn if it is not there."""
    path = HERE / "data" / "shapes" / name
    if not path.exists():
        with using("cannot draw the shapes"):
            subprocess.run([sys.executable, HERE / "data" / "shapes.py"], check=True)
    return path

def read_rows(source):
    """shapes, or a .json or .jsonl file as data/README.md describes it → (rows, complaints)."""
    file = from_shapes("train.json") if source == "shapes" else Path(source)
    lines = file.suffix == ".jsonl"
    with using(f"cannot read {file}"):
        text = file.read_text("utf-8-sig").rstrip()  # a byte order mark may open it
        records = text.split("\n") if lines else [*json.loads(text)]  # splitlines cuts strings
    rows, complaints = [], []
    for n, record in enumerate(tqdm(records, "read", leave=False, delay=2), 1):
        where = f"{file} row {n}"
        with using(where, complaints):
            rows.append(read_row(where, json.loads(record) if lines else record, file.parent))
    return rows, complaints

def read_row(where, record, folder):
    """A record → Row. An exception says what is wrong with it."""
    match record:
        case ({"messages": [{"role": "user", "content": str(problem)},
                            {"role": "assistant", "content": str(solution)}]}
              | {"conversations": [{"from": "human", "value": str(problem)},
                                   {"from": "gpt", "value": str(solution)}]}
              | {"problem": str(problem), "solution": (str() | int() | float()) as solution}):
            used = [problem, solution, record.get("key_steps")]
        case _:
            raise ValueError("no problem and solution, and no turns of one question and its answer")
    json.dumps(used, ensure_ascii=False, allow_nan=False).encode()  # fails at half an emoji
    solution = str(solution)
    sign = r"(?i)(?:image|img|picture|photo)\S*\Z|\.(?:png|jpe?g|gif|webp|bmp)\W* \S*\Z"
    names = [x for x in ("image_path", "image", "images") if record.get(x)][:1]
    names = names or [x for x in record if record[x] and re.search(sign, f"{record[x]} {x}")]
    files = [record[x] if isinstance(record[x], list) else [record[x]] for x in names]
    images = [(folder / str(file)).resolve(strict=True) for file in sum(files, [])]
    if problem.count("<image>") not in (0, len(images)) or not all(map(os.path.isfile, images)):
        raise ValueError(f"{len(images)} images: not as many <image> marks, or one is no file")
    # The instruction is cut off where the whole of it stands, and marks if all come first.
    instruction = r"\s+".join(map(re.escape, INSTRUCTION.split("{question}")[0].split()))
    problem = re.sub(rf"\A((?:\s*<image>)*)\s*{instruction}", r"\1", problem)
    problem = re.sub(r"(?s)\A(?:\s*<image>)+(?!.*<image>)", "", problem).strip()
    answer = solution_answer(solution)
    if not problem or not same_answer(final_answer(f"### The final answer is: {answer}"), answer):
        raise ValueError("no question, or no answer that a completion could give")
    key_steps = parse_key_steps(record["key_steps"]) if record.get("key_steps") else []
    return Row(where, problem, answer, solution.strip(), key_steps, images)

def solution_answer(solution):
    """The answer of a reference: of its sections, <answer>, \\boxed{} or ####, or all of it."""
    if split_sections(solution).order:
        return final_answer(solution)
    for pattern in (r"<answer>(.*?)<", BOX, "####(.+)", r"\bans(?:wer)?(?: is\b|[\s*]*[:：])(.+)"):
        solution = (re.findall(pattern, solution, re.I | re.S) or [solution])[-1]
    answer = undecorated(solution)
    return answer if len(answer) <= 200 and "\n" not in answer else None  # prose is no answer

def load_image(file):
    """Image file → upright RGB image, transparency on white. UserError if it cannot be read."""
    with using(f"cannot read image {file}"):
        image = ImageOps.exif_transpose(Image.open(file, formats=FORMATS)).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")

def make_prompt(processor, row, cfg):
    text = build_instruction(row.problem) if cfg.instruction else row.problem
    return processor.prompt(text, [load_image(file) for file in row.images])

def load_data(cfg):
    """→ training, warm-up and held-out rows, complaints. No held-out question is trained on."""
    rows, complaints = read_rows(cfg.data)
    complaints += [f"{row.where}: no key_steps; data/key_steps.py makes them" for row in rows
                   if not row.key_steps and cfg.reward in ("step", "accuracy")]
    source = cfg.warmup_data or (from_shapes("warmup.json") if cfg.data == "shapes" else "")
    paths, more = read_rows(source) if source and cfg.warmup_steps else ([], [])
    complaints += more + [f"{row.where}: no steps to imitate" for row in paths
                          if not split_sections(row.reference).steps]
    if cfg.data == "shapes":
        test = read_rows(from_shapes("test.json"))[0][:cfg.held_out]
    else:
        test = random.Random(cfg.seed).sample(rows, len(rows) // 10)[:cfg.held_out]
        if len(test) < cfg.held_out:
            complaints.append(f"--held-out: at most {len(test)}, a tenth of the rows")
    asked = {(row.problem, *row.images) for row in test}
    rows, paths = ([row for row in x if (row.problem, *row.images) not in asked]
                   for x in (rows, paths))
    short = [row.where for row in rows if row.key_steps and split_sections(row.reference).steps
             and match_key_steps(row.reference, row.key_steps, row.reference) < 1]
    if short:
        print(f"{len(short)} reference paths miss some of their key steps, the first: {short[0]}")
    return rows, [row for row in paths if REFLECTIVE not in row.reference], test, complaints

# ─── 10. Checkpoints, optimiser, run folder ───────────────────────────────────────────────────────

def load_model(name, device, dtype, max_pixels):
    """tiny, short name, Hub id, checkpoint or run folder → (model in eval mode, Processor)."""
    source = str(from_shapes("tiny") if name == "tiny" else SHORT_NAMES.get(name, name))
    if Path(source, "checkpoint").is_dir():
        source += "/checkpoint"
    with using(f"cannot load {source} (short names are {', '.join(SHORT_NAMES)})"):
        model = transformers.AutoModelForImageTextToText.from_pretrained(source, dtype=dtype)
        if model.config.model_type not in ("qwen2_vl", "qwen2_5_vl"):
            raise ValueError(f"a {model.config.model_type} model, not qwen2_vl or qwen2_5_vl")
        images = transformers.Qwen2VLImageProcessorPil.from_pretrained(
            source, max_pixels=max_pixels)  # set later, some versions ignore it
        processor = Processor(transformers.AutoTokenizer.from_pretrained(source), images, model)
        if processor.tokenizer.decode(processor.text_ids(INSTRUCTION)) != INSTRUCTION:
            raise ValueError("text does not survive its tokenizer; is tokenizer.json missing?")
    return model.to(device).eval(), processor

def save_model(model, processor, folder):
    """Writes an ordinary transformers folder."""
    new = Path(f"{folder}.new")
    shutil.rmtree(new, ignore_errors=True)
    for part in (model, processor.tokenizer, processor.image_processor):
        part.save_pretrained(new)
    folder.mkdir(exist_ok=True)
    for file in new.iterdir():
        put(file, folder / file.name)
    new.rmdir()

def put(new, final):
    """Moves a file to its place, where a reader finds the old one or the new one, whole."""
    with open(new, "rb+") as f:
        os.fsync(f.fileno())
    os.replace(new, final)

class MasterAdamW:
    """AdamW in fp32 for weights of any dtype, without weight decay (official code).

    A step of 1e-6 vanishes in a bf16 weight near 1, whose neighbours are 0.008 apart. So fp32
    masters are trained, and the model gets them rounded. A gradient moves to its master as soon as
    backward has made it, so micro-batches add up in fp32."""
    def __init__(self, model, offload=False):
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.masters = [p.detach().to("cpu" if offload else p.device, torch.float32, copy=True)
                        for p in self.params]
        self.adamw = torch.optim.AdamW(self.masters, weight_decay=0.0, fused=True)
        for p, master in zip(self.params, self.masters):
            p.register_post_accumulate_grad_hook(functools.partial(move_gradient, master))

    def step(self, lr):
        """One update, with the gradients scaled down to norm 1 (official) → their norm before."""
        norm = torch.nn.utils.clip_grad_norm_(self.masters, 1.0).item()
        if not math.isfinite(norm):
            raise UserError(f"the gradient norm is {norm}: try a lower learning rate")
        self.adamw.param_groups[0]["lr"] = lr
        self.adamw.step()
        self.adamw.zero_grad()
        self.write_back(self.masters)
        return norm

    def write_back(self, values):
        for p, master, value in zip(self.params, self.masters, values, strict=True):
            p.detach().copy_(master.copy_(value))

def move_gradient(master, p):
    gradient = p.grad.to(master.device, torch.float32)
    master.grad = gradient if master.grad is None else master.grad.add_(gradient)
    p.grad = None

class Run:
    """The run folder: config.json, two logs, state.pt (all that resuming needs), reference/ (the
    frozen policy) and checkpoint/ (the policy), both ordinary transformers folders.

    A kill at any moment leaves each file whole. state.pt comes last: it says where to go on."""
    def __init__(self, cfg):
        # step counts all updates. Random numbers are functions of seed and step: no state.
        self.cfg, self.out, self.step, self.stop = cfg, Path(cfg.out), 0, False
        with using(f"{cfg.out} is in use, or cannot be a run folder"):
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock = os.open(self.out, os.O_RDONLY)
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not cfg.resume and {x.name for x in self.out.iterdir()} - {"eval", "config.json.new"}:
            raise UserError(f"{cfg.out} is not empty. Go on with it: --resume; or choose --out")

    def begin(self, policy, processor, optimizer, data):
        """Once model and data have turned out to be good. data: a fingerprint of all rows."""
        self.policy, self.processor, self.optimizer = policy, processor, optimizer
        self.data, self.sizes = data, {"metrics.jsonl": 0, "samples.jsonl": 0}  # bytes
        state = self.out / "state.pt"
        if state.exists():
            with using(f"{state} cannot be resumed; its checkpoint/ still serves as a --model"):
                saved = torch.load(state, map_location="cpu", weights_only=True)
                if saved["data"] != data:
                    raise ValueError("the data are not those that held-out rows were drawn from")
                self.step, self.sizes = saved["step"], saved["sizes"]
                optimizer.adamw.load_state_dict(saved["adamw"])
                optimizer.write_back(saved["masters"])
        if not self.cfg.resume:
            new = self.out / "config.json.new"
            new.write_text(json.dumps(asdict(self.cfg), indent=1))
            put(new, self.out / "config.json")

    def log(self, name, record):
        """One more line. Behind the length that was saved stands what a resumed run does again."""
        with open(self.out / name, "ab") as f:
            f.truncate(min(self.sizes[name], f.tell()))
            f.write(json.dumps(record, ensure_ascii=False, default=str).encode() + b"\n")
        self.sizes[name] = (self.out / name).stat().st_size

    def save(self, folders=("checkpoint",)):
        new, optimizer = self.out / "state.pt.new", self.optimizer
        state = {"step": self.step, "data": self.data, "sizes": self.sizes,
                 "masters": optimizer.masters, "adamw": optimizer.adamw.state_dict()}
        with using(f"cannot save {new}; what was saved is whole. Disk full? Mend, and --resume"):
            for folder in folders:
                save_model(self.policy, self.processor, self.out / folder)
            torch.save(state, new)
            put(new, self.out / "state.pt")

    def end_update(self):
        """After each update: count it, save every so often, and stop if asked to."""
        self.step += 1
        if self.stop or self.step % self.cfg.save_every == 0:
            self.save()
        if self.stop:
            raise KeyboardInterrupt

    def ask_to_stop(self, number, frame):
        """Signal handler: the update in hand is finished and saved. A second signal: at once."""
        signal.signal(number, signal.default_int_handler)
        self.stop = True
        tqdm.write("stopping after this update (again: at once)")

# ─── 11. Evaluation and main ──────────────────────────────────────────────────────────────────────

def evaluate(cfg, run, policy, processor, rows, when):
    """Logs the mean scores on the held-out questions, each asked both ways."""
    parts = chunks(range(len(rows)), cfg.questions * cfg.group_size)
    for how, temperature, G in (("greedy", 0.0, 1), ("sampled at T = 1", 1.0, 4)):
        name, scores = f"{when}, {how}", []
        for part in tqdm(parts, name, unit="batch", leave=False):
            if run.stop:
                raise KeyboardInterrupt
            prompts = [make_prompt(processor, rows[n], cfg) for n in part]
            seeds = [cfg.seed * 1_000_003 + n for n in part]
            sampled = rollout(policy, processor, prompts, G, cfg.max_new_tokens, temperature, seeds)
            scores += [score(text, rows[n], cfg)
                       for n, texts in zip(part, sampled.texts) for text in texts]
        if scores:
            run.log("metrics.jsonl", {"phase": "evaluation", "name": name, "questions": len(rows),
                                      **mean_scores(scores)})

LIMITS = {  # low, high; other integers: 1 to 65,536, other numbers: 0 to 100
    "seed": (0, 2**31), "steps": (-1, 1e7), "warmup_steps": (-1, 1e7), "held_out": (0, 1e6),
    "group_size": (2, 1024), "max_pixels": (56 * 56, 1e9), "temperature": (0.01, 100)}
CHANGEABLE = {"resume", "out", "device", "micro_batch", "offload_optimizer"}  # on --resume

def parse_config(argv):
    """Command line → Config. On --resume the settings are those of the run folder."""
    parser = transformers.HfArgumentParser(Config, allow_abbrev=False)
    known, _ = parser.parse_known_args([x for x in argv if x not in ("-h", "--help")])
    out = known.out or f"runs/{Path(known.model).name}"
    defaults = TINY if known.model == "tiny" else {}
    if known.resume:
        with using(f"no run of this version to resume in {out}"):
            defaults = asdict(Config(**json.loads(Path(out, "config.json").read_text())))
    parser.set_defaults(**defaults)
    cfg = Config(**{**vars(parser.parse_args(argv)), "out": out})
    for name, value in asdict(cfg).items():
        low, high = LIMITS.get(name, (1, 65536) if isinstance(value, int) else (0, 100))
        if not isinstance(value, (str, bool)) and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} must be from {low:g} to {high:g}")
        if cfg.resume and name not in CHANGEABLE and value != defaults[name]:
            raise UserError(f"--{name.replace('_', '-')} cannot change on --resume")
    return cfg

def pick_device(name):
    there = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    if name not in ("auto", *there):
        raise UserError(f"--device {name} is not there; there is {' and '.join(there)}")
    return torch.device(there[-1] if name == "auto" else name)

def set_up(cfg, run):
    """Data and model → policy, processor, optimizer, (training, warm-up, held-out rows)."""
    device, tiny = pick_device(cfg.device), cfg.model == "tiny"
    dtype = torch.bfloat16 if device.type == "cuda" and not tiny else torch.float32
    *splits, complaints = load_data(cfg)
    (rows, warmup_rows, test_rows), every = splits, sum(splits, [])
    policy, processor = load_model(cfg.model, device, dtype, cfg.max_pixels)
    if tiny:
        torch.manual_seed(cfg.seed)
        policy = type(policy)(policy.config).to(device)  # each seed has weights of its own
    around = BEFORE + AFTER + build_instruction("") * cfg.instruction
    frame, sizer = len(processor.text_ids(around, layout=True)), processor.image_processor
    for row in tqdm(every, "check", leave=False, delay=2):
        with using(row.where, complaints):
            size = frame + len(processor.text_ids(row.problem.replace("<image>", "")))
            for file in row.images:
                with Image.open(file, formats=FORMATS) as image:  # reads the header only
                    patches = sizer.get_number_of_image_patches(image.height, image.width)
                size += patches // sizer.merge_size**2 + 2
            if size > cfg.max_prompt_tokens:
                raise ValueError(f"a prompt of {size} tokens, more than --max-prompt-tokens")
    count = (f"{len(rows)} questions, {len(warmup_rows)} warm-up paths, {len(test_rows)} held out; "
             f"{sum(not row.images for row in every)} of them have no image")
    if cfg.warmup_steps > 0 and not warmup_rows:
        complaints.append("no paths for the warm-up: give --warmup-data, or --warmup-steps 0")
    if complaints or not rows:
        reasons = f"cannot start with {count}. {len(complaints)} faults:"
        raise UserError("\n  ".join([reasons, *complaints[:50]]))
    if cfg.warmup_steps < 0:
        cfg.warmup_steps = math.ceil(2 * len(warmup_rows) / cfg.warmup_batch)
    if cfg.steps < 0:
        cfg.steps = math.ceil(len(rows) / cfg.questions) if cfg.data == "shapes" else 13125
    print(f"{count}\n{cfg.warmup_steps} warm-up updates, then {cfg.steps} of StepGRPO "
          f"({cfg.steps * cfg.questions / len(rows):.1f} passes), {policy.dtype} on {device}")
    if dtype == torch.bfloat16:  # a real model; only in train mode its vision tower recomputes
        policy.train().gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = MasterAdamW(policy, cfg.offload_optimizer)
    content = [row._replace(where="", images=[file.name for file in row.images]) for row in every]
    run.begin(policy, processor, optimizer, zlib.crc32(json.dumps(content).encode()))
    return policy, processor, optimizer, splits

def learn(cfg, run):
    """Warm-up, StepGRPO against its frozen result, and the evaluations before and after."""
    policy, processor, optimizer, (rows, warmup_rows, test_rows) = set_up(cfg, run)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, run.ask_to_stop)
    if run.step <= cfg.warmup_steps:  # equal: StepGRPO has not begun
        warm_up(cfg, run, policy, processor, warmup_rows, optimizer)
        optimizer.adamw.state.clear()  # StepGRPO begins without moments
        run.save(["reference", "checkpoint"])
        evaluate(cfg, run, policy, processor, test_rows, "before")
    reference = None if cfg.beta == 0 else load_model(
        run.out / "reference", policy.device, policy.dtype, cfg.max_pixels)[0]
    if cfg.steps:
        train(cfg, run, policy, reference, processor, rows, optimizer)
        run.save()
        evaluate(cfg, run, policy, processor, test_rows, "after")
    subprocess.run([sys.executable, HERE / "data" / "report.py", run.out])  # it may fail
    print(f"the policy is in {run.out / 'checkpoint'}")

def main(argv=None):
    transformers.utils.logging.disable_progress_bar()  # of reading weights, but of downloads:
    transformers.utils.logging.hf_hub_utils.enable_progress_bars()
    sys.stdout.reconfigure(errors="replace", line_buffering=True)  # a terminal may lack ─
    try:
        cfg = parse_config(sys.argv[1:] if argv is None else argv)
        run = Run(cfg)
        try:
            learn(cfg, run)
        finally:
            os.close(run.lock)
    except UserError as e:
        sys.exit(f"stepgrpo: {e}")
    except torch.OutOfMemoryError:
        sys.exit("stepgrpo: out of memory. Try --micro-batch 1 or --offload-optimizer")
    except OSError as e:
        sys.exit(f"stepgrpo: {e}. What {cfg.out} holds is whole: mend this, and --resume")
    except KeyboardInterrupt:
        how = f"Go on with: python stepgrpo.py --resume --out {cfg.out}"
        print("\nstopped.", how if (run.out / "config.json").exists() else "Nothing was begun")
        sys.exit(130)

# ─── 12. The rewards in TRL and verl ──────────────────────────────────────────────────────────────

def trl_step_accuracy(completions, solution, key_steps, **columns):
    """StepRAR for TRL's GRPOTrainer → floats. Answers may be numbers, lists may be arrays."""
    return [step_accuracy_reward(completion_text(completion), solution_answer(str(truth)), groups,
                                 reference=str(truth))
            for completion, truth, groups in zip(completions, solution, key_steps, strict=True)]

def trl_step_validity(completions, **columns):
    """StepRVR for TRL's GRPOTrainer → floats."""
    return [step_validity_reward(completion_text(completion)) for completion in completions]

def completion_text(completion):
    """A completion of TRL: text, or a conversation whose content may come in parts."""
    content = completion if isinstance(completion, str) else completion[-1]["content"]
    return content if isinstance(content, str) else "".join(x.get("text") or "" for x in content)

def verl_compute_score(data_source, solution_str, ground_truth, extra_info, **ignored):
    """Both rewards for verl → dict with "score". ground_truth: an answer or a reference path."""
    accuracy, = trl_step_accuracy([solution_str], [ground_truth], [extra_info["key_steps"]])
    validity = step_validity_reward(solution_str)
    return {"score": accuracy + validity, "step_accuracy": accuracy, "step_validity": validity}

if __name__ == "__main__":
    main()

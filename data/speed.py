# SPDX-License-Identifier: MIT
"""Measures what a step costs, against the usual way to do each part of it, side by side in one process.

    python stepgrpo.py --bench                  # tiny model on CPU, two minutes; on CUDA the shape of Qwen2-VL-2B
    python stepgrpo.py --bench --size tiny      # or 2B, whatever the device
    python stepgrpo.py --bench --train 20       # and as many updates of the whole loop, to see that it is stable

Weights are random, nothing is downloaded, and paths never end before their limit, so every run does the same work.
Times are medians of --repeats calls, taken in turn after a warm-up of each. What is compared:

    rollout     with `model.generate`, num_return_sequences = G: same prompts, sampling and lengths
    update      with the forward of transformers over image and prompt repeated G times, logits of every token, as the
                official trainer does; the gradients are compared too
    whole step  rollout, rewards, reference, update: where the time goes
    memory      on CUDA the measured peak; elsewhere that of the 2B shape, counted by running its update on the meta
                device, where tensors have sizes but no contents
"""
import argparse
import collections
import contextlib
import copy
import functools
import gc
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForImageTextToText

import stepgrpo as sg

QWEN2_VL_2B = {
    "text_config": dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
                        num_key_value_heads=2, vocab_size=151936, layer_types=["full_attention"] * 28,
                        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
                        initializer_range=0.02),
    "vision_config": dict(depth=32, embed_dim=1280, num_heads=16, hidden_size=1536, mlp_ratio=4,
                          initializer_range=0.02)}
DEFAULT, LARGE = (26, 1), (30, 17)              # images in cells of 28 pixels: 26 and 510 image tokens
QUESTION = "Subtract all red things. How many objects are left?"
PATH = """### Image Description:
From the left: red 1/1 blue 1/2.
### Rationales:
Count all objects, then subtract.
### Let's think step by step.
### Step 1:
4 - 1 = 3
### The final answer is:
3"""


# ─── What is measured on ──────────────────────────────────────────────────────────────────────────────────────────────

def tiny_model(device, dtype):
    with tempfile.TemporaryDirectory() as folder:
        sg.build_tiny(folder, [QUESTION + "\n" + PATH] * 8, 0)
        return sg.load_model(folder, device, dtype, 400_000)


def build(size, device, dtype):
    """Model of random weights → (model, processor that allows no EOS, so that every path has its full length)."""
    model, processor = tiny_model(device, dtype)
    if size == "2B":
        config = copy.deepcopy(model.config)
        for part, sizes in QWEN2_VL_2B.items():
            for name, value in sizes.items():
                setattr(getattr(config, part), name, value)
        config.initializer_range = 0.02                        # the tiny model's 0.1 would saturate every softmax
        with torch.device(device):
            model = AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
        processor = sg.Processor(processor.tokenizer, processor.image_processor, 151936)
    processor.banned[processor.eos] = True
    return model, processor


def noise(cells, seed=0):
    width, height = 28 * cells[0], 28 * cells[1]
    return Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(3 * width * height))


def make_prompts(processor, number, cells, text=QUESTION):
    return [processor.prompt(text, [noise(cells, n)]) for n in range(number)]


def make_paths(processor, G, C):
    allowed = (~processor.banned).nonzero()[:, 0]
    return [allowed[torch.randint(len(allowed), (C,))] for _ in range(G)]


def sync(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def side_by_side(calls, repeats, device):
    """{name: call} → {name: median seconds}: the calls in turn, `repeats` times after a warm-up."""
    times = {name: [] for name in calls}
    for n in range(repeats + 1):
        for name, call in calls.items():
            sync(device)
            began = time.perf_counter()
            call()
            sync(device)
            times[name] += [time.perf_counter() - began] if n else []
    return {name: statistics.median(values) for name, values in times.items()}


class PeakMemory(TorchDispatchMode):
    """Bytes of the tensors made inside it: alive now, and at most. Kernels' own workspace is not seen."""

    def __init__(self, known=()):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.seen:
                    self.seen.add(key)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.free, key, size)
        return result

    def free(self, key, size):
        self.seen.discard(key)
        self.now -= size


def peak_bytes(call, model):
    """Most memory that a call has beyond what was there before it."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    with PeakMemory([*model.parameters(), *model.buffers()]) as memory:
        call()
    return memory.peak


# ─── Rollout ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def generate(model, prompts, G, C, temperature):
    """The usual way: image and prompt once per path, transformers' sampling loop."""
    ids = torch.stack([p.ids for p in prompts])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": torch.stack(
        [p.is_image for p in prompts]).int(), "pixel_values": torch.cat([p.pixels for p in prompts]),
        "image_grid_thw": torch.cat([p.grids for p in prompts])}
    return model.generate(**{name: x.to(model.device) for name, x in inputs.items()}, num_return_sequences=G,
                          do_sample=True, temperature=temperature, top_k=0, top_p=1.0, min_new_tokens=C,
                          max_new_tokens=C)


def copy_bandwidth(device):
    """Bytes per second of a large copy on the device, read and written."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * a.numel() / side_by_side({"copy": lambda: b.copy_(a)}, 9, device)["copy"]


def bytes_per_token(model, Q, G, P, C):
    """What one decoding step must read: weights of the language model and head, each prompt's cache once, half of C."""
    text = model.config.get_text_config()
    weights = sum(p.numel() for p in {*model.model.language_model.layers.parameters(), model.lm_head.weight})
    token = 2 * text.num_hidden_layers * text.num_key_value_heads * (text.hidden_size // text.num_attention_heads)
    return model.dtype.itemsize * (weights + token * Q * (P + G * C / 2))


def bench_rollout(model, processor, cases, repeats):
    """cases: (name, Q, G, cells of the image, C)."""
    print(f"\n1. Rollout, tokens per second{'':19}Q   G    P    C   rollout  generate  ratio")
    for name, Q, G, cells, C in cases:
        prompts = make_prompts(processor, Q, cells)
        P = len(prompts[0].ids)
        t = side_by_side({"ours": lambda: sg.rollout(model, processor, prompts, G, C, 1.0),
                          "generate": lambda: generate(model, prompts, G, C, 1.0)}, repeats, model.device)
        rates = {key: Q * G * C / seconds for key, seconds in t.items()}
        print(f"   {name:44}{Q:4}{G:4}{P:5}{C:5}{rates['ours']:10,.0f}{rates['generate']:10,.0f}"
              f"{t['generate'] / t['ours']:6.1f}×")
        if model.device.type == "cuda":
            first = side_by_side({"first": lambda: sg.rollout(model, processor, prompts, G, 1)},
                                 repeats, model.device)["first"]
            step = (t["ours"] - first) / (C - 1)
            rate, limit = bytes_per_token(model, Q, G, P, C) / step, copy_bandwidth(model.device)
            print(f"   {'':6}one decoding step {1000 * step:.2f} ms: {rate / 1e9:,.0f} GB/s of weights and cache, "
                  f"{100 * rate / limit:.0f} % of the {limit / 1e9:,.0f} GB/s of a copy")
    if model.device.type != "cuda":
        print("   CUDA graph, GB/s and share of the bandwidth: no CUDA here")


def bench_linear(model, processor, G, repeats):
    """Three sizes each: the cost per unit should not grow."""
    print("\n   Cost against size (510 image tokens)")
    for label, sizes in (("questions, 64 tokens", [(Q, 64) for Q in (2, 4, 8)]),
                         ("tokens, 4 questions", [(4, C) for C in (64, 128, 256)])):
        prompts = make_prompts(processor, 8, LARGE)
        calls = {size: functools.partial(sg.rollout, model, processor, prompts[:size[0]], G, size[1], 1.0)
                 for size in sizes}
        # On CUDA each size captures its own graphs, in its first call after another size: so not in turn.
        t = {size: side_by_side({size: call}, repeats, model.device)[size] for size, call in calls.items()}
        print(f"   rollout, {label:22}" + "".join(f"{size[label[0] == 't']:6} → {t[size]:6.2f} s" for size in sizes))


# ─── Update ───────────────────────────────────────────────────────────────────────────────────────────────────────────

def repeated_logps(model, prompt, paths, banned):
    """Log-probs of G paths (G, C) as the official trainer gets them: all repeated G times, logits of every token."""
    G, device = len(paths), model.device
    ids = torch.stack([torch.cat([prompt.ids, path]) for path in paths]).to(device)
    types = torch.cat([prompt.is_image, torch.zeros_like(paths[0], dtype=torch.bool)]).int().repeat(G, 1).to(device)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=types, use_cache=False,
                   pixel_values=prompt.pixels.repeat(G, 1).to(device, model.dtype),
                   image_grid_thw=prompt.grids.repeat(G, 1).to(device)).logits
    rows = [sg.tempered_logps(row[:-1], 1.0, banned).gather(1, path[1:, None])[:, 0] for row, path in zip(logits, ids)]
    return torch.stack(rows)[:, len(prompt.ids) - 1:]


def bench_update(model, processor, C, repeats):
    print("\n2. Update, seconds per group   packed  path by path  ratio    tokens        peak memory         gradients")
    model.train()
    prompt = make_prompts(processor, 1, LARGE, QUESTION * 4)[0]
    for G in (4, 8):
        paths, advantages = make_paths(processor, G, C), torch.linspace(-1, 1, G, device=model.device)

        def backward(logps):
            model.zero_grad()
            logps = logps()
            mask = torch.ones_like(logps)
            sg.grpo_loss(logps, logps.detach(), None, advantages, mask, 0.2, 0.0)[0].backward()
        calls = {"packed": lambda: backward(lambda: sg.path_logps(model, processor, [prompt], [paths])[0][0]),
                 "repeated": lambda: backward(lambda: repeated_logps(model, prompt, paths,
                                                                     processor.banned.to(model.device)))}
        t = side_by_side(calls, repeats, model.device)
        peaks, gradients = {}, {}
        for name, call in calls.items():
            model.zero_grad()
            peaks[name] = peak_bytes(call, model)
            gradients[name] = [p.grad.float().clone() for p in model.parameters() if p.grad is not None]
        norms = [torch.nn.utils.get_total_norm([a - b for a, b in zip(*gradients.values())]),
                 torch.nn.utils.get_total_norm(gradients["repeated"])]
        P = len(prompt.ids)
        tokens, memory = (P + G * (C - 1), G * (P + C)), [peaks[name] / 1e6 for name in calls]
        ratio = t["repeated"] / t["packed"]
        print(f"   P {P}, C {C}, G {G}{'':9}{t['packed']:8.2f}{t['repeated']:14.2f}{ratio:6.1f}×  "
              f"{tokens[0]:5} of {tokens[1]:5}{memory[0]:7,.0f} of {memory[1]:6,.0f} MB"
              f"   differ by {norms[0] / norms[1]:.0e}")
    model.zero_grad()
    model.eval()


# ─── Whole step ───────────────────────────────────────────────────────────────────────────────────────────────────────

@contextlib.contextmanager
def clocks(parts, policy, seconds):
    """Adds to seconds[label] the time spent in each (owner, name, label or function of the arguments)."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in parts]

    def timed(function, label):
        @functools.wraps(function)
        def call(*args, **kwargs):
            sync(policy.device)
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                sync(policy.device)
                seconds[label(*args) if callable(label) else label] += time.perf_counter() - began
        return call
    for (owner, name, function), (*_, label) in zip(before, parts):
        setattr(owner, name, timed(function, label))
    try:
        yield
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def make_rows(folder, number, cells):
    rows = []
    for n in range(number):
        file = Path(folder) / f"{n}.png"
        noise(cells, n).save(file)
        rows.append(sg.Row(f"row {n}", QUESTION, "3", PATH, [["4 - 1 = 3"], ["4 objects"]], [file]))
    return rows


def bench_step(policy, processor, cfg, cells, updates):
    """`updates` whole steps; the first one, in which caches fill and graphs are captured, is not timed."""
    reference, optimizer = copy.deepcopy(policy).requires_grad_(False), sg.MasterAdamW(policy, cfg.offload_optimizer)
    if cfg.gradient_checkpointing:
        (getattr(policy, "activation_checkpointing_enable", None) or policy.gradient_checkpointing_enable)(
            {"use_reentrant": False})
    parts = [(sg, "make_prompt", "images and prompts"), (sg, "rollout", "rollout"), (sg, "score_path", "rewards"),
             (sg, "path_logps", lambda model, *_: "reference" if model is reference else "update: forward"),
             (torch.Tensor, "backward", "update: backward"), (sg.MasterAdamW, "step", "optimiser")]
    seconds, times, drawn = collections.Counter(), [], 0
    if policy.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        rows = make_rows(folder, cfg.questions, cells)
        for n in range(updates + 1):
            with clocks(parts, policy, seconds if n else collections.Counter()):
                began = time.perf_counter()
                groups, _, drawn, _ = sg.sample_groups(cfg, policy, processor, rows, drawn)
                rewards = torch.rand(cfg.questions, cfg.group_size)            # a random model's paths earn nothing
                stats = sg.update(cfg, policy, reference, processor, groups, sg.group_advantages(rewards), optimizer,
                                  cfg.lr)
                times += [time.perf_counter() - began] if n else []
    print(f"   one step {statistics.median(times):.2f} s: Q {cfg.questions}, G {cfg.group_size}, C {cfg.max_new_tokens}"
          f", {cells[0] * cells[1]} image tokens{', optimiser offloaded' if cfg.offload_optimizer else ''}")
    for name, value in sorted(seconds.items(), key=lambda item: -item[1]):
        print(f"      {name:20}{100 * value / sum(times):6.2f} %")
    print(f"      after {updates + 1} updates: KL {stats['kl']:.1e}, gradient norm {stats['grad_norm']:.2f}, "
          f"cached and packed log-probs differ by {stats['sampling_gap']:.1e}")
    return optimizer, reference


def bench_memory(policy, reference, optimizer):
    def gigabytes(tensors):
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e9
    moments = [x for state in optimizer.local.adamw.state.values() for x in state.values()]
    masters = optimizer.masters if optimizer.local.separate else []
    home = "host" if masters and masters[0].device != policy.device else "device"
    peak = f"; peak {torch.cuda.max_memory_allocated() / 1e9:.2f}" if policy.device.type == "cuda" else ""
    print(f"   GB: policy {gigabytes(policy.parameters()):.3f}, reference {gigabytes(reference.parameters()):.3f}, "
          f"moments {gigabytes(moments):.3f}, masters {gigabytes(masters):.3f} ({home}){peak}")


# ─── Memory of the 2B shape, counted ──────────────────────────────────────────────────────────────────────────────────

def efficient_attention(q, k, v, attn_mask=None, is_causal=False):
    """The kernel that CUDA takes for a mask, by name: the meta device would take one that keeps all scores."""
    mask = None if attn_mask is None else attn_mask.expand(*q.shape[:3], k.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, 0.0, is_causal)[0]


def count_2b(G, C, P, patches):
    """Prints the memory of one update of the 2B shape, from tensors without contents."""
    model, processor = build("2B", torch.device("meta"), torch.bfloat16)
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)({})
    model.train()
    gradients = {}

    def keep(p):
        gradients[p], p.grad = p.grad.float(), None
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(keep)
    prompt = sg.Prompt(torch.zeros(P).long(), torch.arange(P).expand(3, P), torch.zeros(P).bool(), None, None)
    sdpa, F.scaled_dot_product_attention = F.scaled_dot_product_attention, efficient_attention
    try:
        with PeakMemory(model.parameters()) as memory:
            decoder = sg.Decoder(model, processor, 4, G, -(-P // 128) * 128, C, 1.2)
            cache = memory.now
            logps, _ = sg.path_logps(model, processor, [prompt], [[torch.zeros(C).long()] * G])
            forward = memory.peak - cache
            logps.sum().backward()
    finally:
        F.scaled_dot_product_attention = sdpa
    parameters = sum(p.numel() for p in model.parameters())
    vision = model.config.vision_config                        # one checkpoint per block, one block made again
    tower = 2 * patches * vision.embed_dim * (vision.depth + 10 + 3 * vision.mlp_ratio)
    parts = {"policy, bf16": 2 * parameters, "reference, bf16": 2 * parameters, "masters, fp32": 4 * parameters,
             "moments, fp32": 8 * parameters, "gradients, fp32": 4 * parameters,
             "cache and buffers of 4 questions": cache, "activations": forward + tower}
    del decoder
    print(f"   Qwen2-VL-2B, counted: {parameters / 1e9:.3f} G parameters, G {G}, C {C}, P {P}, micro-batch 1")
    for name, size in parts.items():
        print(f"      {name:34}{size / 1e9:6.2f} GB")
    host = 16 * parameters
    print(f"      {'sum':34}{sum(parts.values()) / 1e9:6.2f} GB, with --offload-optimizer "
          f"{(sum(parts.values()) - host) / 1e9:.2f} GB and {host / 1e9:.1f} GB in host memory")


def startup():
    """Seconds from the command of the default run to its first line; the second start, with imports warm."""
    for _ in range(2):
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            command = [sys.executable, sg.HERE / "stepgrpo.py", "--out", Path(folder) / "run"]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
                process.stdout.readline()
                seconds = time.perf_counter() - began
                process.kill()
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], prog="stepgrpo.py --bench",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--size", choices=("auto", "tiny", "2B"), default="auto", help="auto = 2B on cuda, else tiny")
    parser.add_argument("--device", default="auto", help="auto = cuda when there is one, else cpu")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each row")
    parser.add_argument("--train", type=int, default=3, help="updates of the whole step")
    args = parser.parse_args()
    try:
        device, dtype = sg.pick_device(sg.Config(device=args.device))
    except sg.UserError as e:
        sys.exit(f"stepgrpo: {e}")
    size = args.size if args.size != "auto" else "2B" if device.type == "cuda" else "tiny"
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    sg.tqdm = functools.partial(sg.tqdm, disable=True)
    torch.manual_seed(0)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; torch {torch.__version__}, transformers "
          f"{transformers.__version__}; {size} model, {str(dtype)[6:]}; medians of {args.repeats}")
    model, processor = build(size, device, dtype)
    if size == "tiny":
        # Paths of the default run have about 90 tokens on the average, 192 at most.
        cases = [(f"{name}, {C} tokens", 8, 8, cells, C) for name, cells in
                 (("default images", DEFAULT), ("images of 510 tokens", LARGE)) for C in (96, 192)]
        cfg = sg.Config(**sg.TINY | dict(beta=0.04, seed=1))
    else:
        cases = [("images of 510 tokens, 16 sequences", 4, 4, LARGE, 256)]
        cfg = sg.Config(instruction=False, max_new_tokens=1024, seed=1)
    with torch.no_grad():
        bench_rollout(model, processor, cases, args.repeats)
        bench_linear(model, processor, 4, args.repeats)
    bench_update(model, processor, 256, args.repeats)
    print("\n3. Whole step")
    step_cells = DEFAULT if size == "tiny" else LARGE
    optimizer, reference = bench_step(model, processor, cfg, step_cells, args.train)
    print("\n4. Memory")
    bench_memory(model, reference, optimizer)
    if device.type == "cuda":
        del optimizer, reference, model
        sg._captured.clear()
        gc.collect()
        torch.cuda.empty_cache()
        model, processor = build(size, device, dtype)
        cfg.offload_optimizer = True
        optimizer, reference = bench_step(model, processor, cfg, step_cells, 1)
        bench_memory(model, reference, optimizer)
    else:
        count_2b(4, 1024, 650, 2040)
    print(f"\n5. Startup: {startup():.1f} s to the first line of the default run")


if __name__ == "__main__":
    main()

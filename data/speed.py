# SPDX-License-Identifier: MIT
"""Measures what a step costs, beside the usual way to do each part, in one process.

    python data/speed.py                     # tiny model on CPU; the 2B shape on CUDA
    python data/speed.py --updates 20        # and so many whole updates: are they stable?
    python data/speed.py --trl runs/tiny     # beside TRL's GRPOTrainer, where trl is installed

Weights are random, and completions never end before their limit, so every run does the same work.
Times are medians of calls taken in turn, after one of each that does not count. Compared are:

    rollout   with `model.generate`: same prompts, sampling and lengths
    update    with transformers' forward over image and prompt repeated G times, logits of every
              token, as the official trainer does it; the gradients are compared too
    memory    of the 2B shape, counted on the meta device, whose tensors have sizes but no contents
"""
import argparse
import copy
import os
import platform
import random
import statistics
import sys
import tempfile
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import stepgrpo as sg

SHAPE_2B = {
    "text_config": dict(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, vocab_size=151936, layer_types=["full_attention"] * 28,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}),
    "vision_config": dict(depth=32, embed_dim=1280, num_heads=16, hidden_size=1536, mlp_ratio=4)}
SMALL, LARGE = (26, 1), (30, 17)  # images in cells of 28 pixels: 26 and 510 image tokens
QUESTION = "Subtract all red objects. How many objects are left?"

def build(size, device, dtype):
    """Model of random weights → (model, processor that allows no EOS)."""
    model, processor = sg.load_model("tiny", "cpu", torch.float32, 400_000)
    if size == "2B":
        config = model.config
        for part in (config, config.text_config, config.vision_config):
            part.initializer_range = 0.02
        for part, sizes in SHAPE_2B.items():
            for name, value in sizes.items():
                setattr(getattr(config, part), name, value)
        with torch.device(device):
            model = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype)
        processor = sg.Processor(processor.tokenizer, processor.image_processor, model)
    processor.banned[processor.eos] = True
    return model.to(device, dtype).eval(), processor

def noise(cells, seed=0):
    width, height = 28 * cells[0], 28 * cells[1]
    pixels = random.Random(seed).randbytes(3 * width * height)
    return Image.frombytes("RGB", (width, height), pixels)

def race(calls, repeats, device):
    """{name: call} → {name: median seconds}: the calls in turn, after one of each."""
    times = {name: [] for name in calls}
    for n in range(repeats + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name] += [time.perf_counter() - began] if n else []
    return {name: statistics.median(values) for name, values in times.items()}

# ─── Rollout ──────────────────────────────────────────────────────────────────────────────────────

def generate(model, prompts, G, C):
    """The usual way: image and prompt once per completion, transformers' sampling loop."""
    ids = torch.stack([prompt.ids for prompt in prompts])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids),
              "mm_token_type_ids": (ids == model.config.image_token_id).int(),
              "pixel_values": torch.cat([prompt.pixels for prompt in prompts]),
              "image_grid_thw": torch.cat([prompt.grids for prompt in prompts])}
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    return model.generate(**inputs, num_return_sequences=G, do_sample=True, temperature=1.0,
                          top_k=0, top_p=1.0, min_new_tokens=C, max_new_tokens=C)

def bench_rollout(model, processor, cases, repeats):
    """cases: (Q, G, image, C)."""
    print(f"\n{'rollout, tokens per second':28}Q    G    P    C      ours  generate  ratio")
    for Q, G, cells, C in cases:
        prompts = [processor.prompt(QUESTION, [noise(cells, n)]) for n in range(Q)]
        t = race({"ours": lambda: sg.rollout(model, processor, prompts, G, C, 1.0),
                  "generate": lambda: generate(model, prompts, G, C)}, repeats, model.device)
        ours, theirs = (Q * G * C / t[name] for name in ("ours", "generate"))
        print(f"{'':25}{Q:4}{G:5}{len(prompts[0].ids):5}{C:5}{ours:10,.0f}{theirs:10,.0f}"
              f"{ours / theirs:6.1f}×")
        if model.device.type == "cuda":
            weights = sum(p.numel() for p in model.model.language_model.parameters())
            a, b = (torch.empty(1 << 30, dtype=torch.uint8, device=model.device) for _ in "ab")
            copy = race({"copy": lambda: a.copy_(b)}, repeats, model.device)["copy"]
            rate = weights * model.dtype.itemsize * C / t["ours"] / 1e9
            print(f"  {1000 * t['ours'] / C:.2f} ms per token: weights read at {rate:,.0f} GB/s, "
                  f"a copy moves {2 * a.numel() / copy / 1e9:,.0f} GB/s")

# ─── Update ───────────────────────────────────────────────────────────────────────────────────────

def repeated_logps(model, prompt, completions, banned):
    """Log-probs (G, C) as the official trainer gets them."""
    G = len(completions)
    ids = torch.stack([torch.cat([prompt.ids, own]) for own in completions]).to(model.device)
    types = (ids == model.config.image_token_id).int()
    pixels = prompt.pixels.repeat(G, 1).to(model.device, model.dtype)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=types,
                   use_cache=False, pixel_values=pixels,
                   image_grid_thw=prompt.grids.repeat(G, 1).to(model.device)).logits
    rows = [sg.tempered_logps(row[:-1], 1.0, banned).gather(1, own[1:, None])[:, 0]
            for row, own in zip(logits, ids)]
    return torch.stack(rows)[:, len(prompt.ids) - 1:]

def bench_update(model, processor, cases, repeats):
    """cases: (G, image, C), one question."""
    print(f"\n{'update, seconds per group':28}G    P    C    ours  repeated  ratio  "
          "gradients differ by")
    model.train()
    allowed, banned = (~processor.banned).nonzero()[:, 0], processor.banned.to(model.device)
    for G, cells, C in cases:
        prompt = processor.prompt(QUESTION * 4, [noise(cells)])
        own = [allowed[torch.randint(len(allowed), (C,))] for _ in range(G)]
        advantages, gradients = torch.linspace(-1, 1, G, device=model.device), {}

        def backward(name):
            model.zero_grad()
            logps = (sg.completion_logps(model, processor, [prompt], [own])[0][0] if name == "ours"
                     else repeated_logps(model, prompt, own, banned))
            mask = torch.ones_like(logps)
            sg.grpo_loss(logps, logps.detach(), None, advantages, mask, beta=0.0)[0].backward()
            gradients[name] = [p.grad for p in model.parameters() if p.grad is not None]

        names = ("ours", "repeated")
        t = race({name: lambda name=name: backward(name) for name in names}, repeats, model.device)
        apart = torch.nn.utils.get_total_norm([a - b for a, b in zip(*gradients.values())])
        apart = apart / torch.nn.utils.get_total_norm(gradients["repeated"])
        print(f"{'':25}{G:4}{len(prompt.ids):5}{C:5}{t['ours']:8.2f}{t['repeated']:10.2f}"
              f"{t['repeated'] / t['ours']:6.1f}×  {apart:.0e}")
    model.zero_grad()
    model.eval()

# ─── Memory of the 2B shape, counted ──────────────────────────────────────────────────────────────

class PeakMemory(TorchDispatchMode):
    """Bytes of the tensors made inside it: alive now, and at most."""

    def __init__(self, known):
        super().__init__()
        self.now, self.peak = 0, 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.seen:
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        return result

    def free(self, key, size):
        self.seen.discard(key)
        self.now -= size

def efficient_attention(q, k, v, attn_mask=None, is_causal=False):
    """The kernel that CUDA takes, by name: the meta device takes one that keeps all scores."""
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*q.shape[:3], k.shape[2])
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    return attend(q, k, v, attn_mask, True, 0.0, is_causal)[0]

def count_2b(Q, G, C, P, patches):
    """Prints the memory of a run of the 2B shape, micro-batch 1, gradient checkpointing."""
    model, processor = build("2B", torch.device("meta"), torch.bfloat16)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({})
    prompts = [sg.Prompt(torch.zeros(P).long(), torch.arange(P).expand(3, P), None, None)] * Q
    with PeakMemory(model.parameters()) as memory, torch.no_grad():
        decoder = sg.Decoder(model, processor, prompts, torch.rand(Q, G, C), 1.2)
        cache = memory.now
    del decoder
    model.train()
    own = [[torch.zeros(C).long()] * G]
    torch.fx.experimental._config.meta_nonzero_assume_all_nonzero = True  # all have C tokens
    sdpa, F.scaled_dot_product_attention = F.scaled_dot_product_attention, efficient_attention
    try:
        with PeakMemory(model.parameters()) as memory:
            sg.completion_logps(model, processor, prompts[:1], own)[0].sum().backward()
            held = sum(2 * p.numel() for p in model.parameters() if p.grad is not None)
    finally:
        F.scaled_dot_product_attention = sdpa
    n, vision = sum(p.numel() for p in model.parameters()), model.config.vision_config
    tower = 2 * patches * vision.embed_dim * (vision.depth + 10 + 3 * vision.mlp_ratio)
    parts = {"policy, bf16": 2 * n, "reference, bf16": 2 * n, "masters, fp32": 4 * n,
             "moments, fp32": 8 * n, "gradients, fp32": 4 * n, "KV cache": cache,
             "activations": max(0, memory.peak - held) + tower}
    print(f"\nQwen2-VL-2B, counted: {n / 1e9:.2f} G parameters; Q {Q}, G {G}, C {C}, P {P}")
    for name, size in parts.items():
        print(f"   {name:18}{size / 1e9:7.2f} GB")
    total = sum(parts.values())
    print(f"   {'sum':18}{total / 1e9:7.2f} GB, with --offload-optimizer "
          f"{(total - 16 * n) / 1e9:.2f}")

# ─── Whole updates, here and in TRL ───────────────────────────────────────────────────────────────

def make_rows(folder, number, cells):
    """Training rows of the shapes data, with images stretched to `cells` image tokens."""
    rows, _ = sg.read_rows("shapes")
    made = []
    for n, row in enumerate(rows[:number]):
        file = Path(folder) / f"{n}.png"
        sg.load_image(row.images[0]).resize((28 * cells[0], 28 * cells[1])).save(file)
        made.append(row._replace(images=[file]))
    return made

def our_updates(model, processor, rows, cfg):
    """(seconds, mean length of a completion) of each update of `train`."""
    records = []
    run = SimpleNamespace(step=0, log=lambda name, record: records.append(record),
                          end_update=lambda *args: None)
    show, sg.show = sg.show, lambda *args: None
    try:
        reference = copy.deepcopy(model).requires_grad_(False)
        optimizer = sg.MasterAdamW(model, cfg.offload_optimizer)
        sg.train(cfg, run, model, reference, processor, rows, optimizer)
    finally:
        sg.show = show
    return [(record["seconds"], record["length"]) for record in records]

def trl_updates(checkpoint, rows, cfg):
    """The same in TRL's GRPOTrainer, with our checkpoint and rewards, and the paper's loss."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    template = ("{% for m in messages %}{% if m.role != 'system' %}" + sg.BEFORE +
                "{% for p in m.content %}{% if p.type == 'image' %}<|vision_start|><|image_pad|>"
                "<|vision_end|>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
                "{% endfor %}" + sg.AFTER)
    tokenizer.chat_template = template
    processor = transformers.Qwen2VLProcessor(
        transformers.Qwen2VLImageProcessor(), tokenizer, transformers.Qwen2VLVideoProcessor(),
        chat_template=template)
    dataset = Dataset.from_list([
        {"prompt": [{"role": "user", "content": row.problem}], "solution": row.reference,
         "image": sg.load_image(row.images[0]), "key_steps": row.key_steps} for row in rows])
    eos = [tokenizer.convert_tokens_to_ids(token) for token in sg.EOS_TOKENS]
    args = GRPOConfig(
        output_dir=tempfile.mkdtemp(), num_generations=cfg.group_size, beta=cfg.beta,
        per_device_train_batch_size=cfg.questions * cfg.group_size, learning_rate=cfg.lr,
        temperature=cfg.temperature, max_completion_length=cfg.max_new_tokens,
        max_steps=cfg.steps, logging_steps=1, loss_type="grpo", report_to=[], bf16=False,
        use_cpu=True, save_strategy="no", disable_tqdm=True, use_bias_correction_kl=False,
        generation_kwargs={"eos_token_id": eos})
    model = transformers.AutoModelForImageTextToText.from_pretrained(checkpoint,
                                                                     dtype=torch.float32)
    trainer = GRPOTrainer(model=model, args=args, train_dataset=dataset, processing_class=processor,
                          reward_funcs=[sg.trl_step_accuracy, sg.trl_step_validity])
    times = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            times.append(time.perf_counter())

        def on_step_end(self, *args, **kwargs):
            times[-1] = time.perf_counter() - times[-1]

    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(Clock())
    trainer.train()
    lengths = [x["completions/mean_length"] for x in trainer.state.log_history if "reward" in x]
    return list(zip(times, lengths))

def beside_trl(checkpoint):
    # torchvision, which Qwen2VLProcessor wants, has no CPU build for every torch. Its compiled
    # operators are not used here, but it asks for their names.
    for name in ("nms qnms roi_align _roi_align_backward ps_roi_align _ps_roi_align_backward "
                 "roi_pool _roi_pool_backward ps_roi_pool _ps_roi_pool_backward qroi_align "
                 "deform_conv2d _deform_conv2d_backward").split():
        torch.library.define(f"torchvision::{name}", "(Tensor x) -> Tensor")
    import trl
    print(f"\n{'whole update, seconds':28}Q    G  image      ours{f'TRL {trl.__version__}':>14}  "
          "ratio")
    for Q, G, cells in ((8, 8, SMALL), (4, 8, (25, 20))):
        cfg = sg.Config(questions=Q, group_size=G, steps=5, temperature=1.0, beta=0.01, lr=1e-5,
                        max_new_tokens=192, instruction=False, micro_batch=Q)
        with tempfile.TemporaryDirectory() as folder:
            rows = make_rows(folder, Q * cfg.steps, cells)
            model, processor = sg.load_model(checkpoint, "cpu", torch.float32, 400_000)
            updates = {"ours": our_updates(model, processor, rows, cfg),
                       "trl": trl_updates(str(Path(checkpoint) / "checkpoint"), rows, cfg)}
        shown = {name: statistics.median(seconds for seconds, _ in found[1:])
                 for name, found in updates.items()}
        tokens = {name: statistics.mean(length for _, length in found)
                  for name, found in updates.items()}
        print(f"{'':25}{Q:4}{G:5}{cells[0] * cells[1]:7}{shown['ours']:10.2f}{shown['trl']:10.2f}"
              f"{shown['trl'] / shown['ours']:12.1f}×   mean tokens of a completion: "
              f"{tokens['ours']:.0f}, {tokens['trl']:.0f}")

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", choices=("tiny", "2B"), help="2B on cuda, else tiny")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each row (5)")
    parser.add_argument("--updates", type=int, default=3, help="whole updates (3)")
    parser.add_argument("--trl", metavar="RUN", help="run folder to go on with, here and in TRL")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device = sg.pick_device("auto")
    cuda = device.type == "cuda"
    size, dtype = args.size or ("2B" if cuda else "tiny"), torch.bfloat16 if cuda else torch.float32
    torch.manual_seed(0)
    name = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    print(f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; torch "
          f"{torch.__version__}, transformers {transformers.__version__}; {size} model, {dtype}")
    if args.trl:
        return beside_trl(args.trl)
    model, processor = build(size, device, dtype)
    small = [(8, 8, SMALL, 96), (8, 8, SMALL, 192), (8, 8, LARGE, 96), (8, 8, LARGE, 192)]
    with torch.no_grad():
        cases = [(4, 4, LARGE, 256)] if size == "2B" else small
        bench_rollout(model, processor, cases, args.repeats)
    bench_update(model, processor, [(4, LARGE, 256), (8, LARGE, 256)], args.repeats)
    settings = {"instruction": False, **(sg.TINY if size == "tiny" else {})}
    cfg = sg.Config(**settings | {"steps": args.updates + 1})
    with tempfile.TemporaryDirectory() as folder:
        rows = make_rows(folder, 64, SMALL if size == "tiny" else LARGE)
        updates = our_updates(model, processor, rows, cfg)
    seconds = statistics.median(seconds for seconds, _ in updates[1:])
    print(f"\nwhole update {seconds:.2f} s: Q {cfg.questions}, G {cfg.group_size}, "
          f"C {cfg.max_new_tokens}" + (f"; peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
                                       if cuda else ""))
    count_2b(4, 4, 1024, 650, 2040)

if __name__ == "__main__":
    main()

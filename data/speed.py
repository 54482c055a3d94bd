# SPDX-License-Identifier: MIT
"""Measures what a step costs, beside the usual way to do each part, in one process.

    python data/speed.py                  # tiny model on CPU; the 2B shape in bf16 on CUDA
    python data/speed.py --updates 20     # so many whole updates, and nothing else
    python data/speed.py --trl runs/tiny  # on CPU, beside TRL's GRPOTrainer

Weights are random, and completions never end before their limit, so every run does the same work.
Times are medians of calls taken in turn, after one of each that does not count. --trl asks for
`pip install trl` and `pip install --no-deps torchvision`, of the version that fits torch.
"""
import argparse
import copy
import sys
import tempfile
import time
import weakref
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, median
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import stepgrpo as sg

SHAPE_2B = {"initializer_range": 0.02, "vision_config": {"hidden_size": 1536}, "text_config": dict(
    hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
    num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]})}
SMALL, LARGE = (26, 1), (30, 17)  # images in cells of 28 pixels: 26 and 510 image tokens

def build(size, device, dtype):
    """Model of random weights → (model, processor that allows no EOS)."""
    model, processor = sg.load_model("tiny", "cpu", torch.float32, 400_000)
    if size == "2B":
        config = type(model.config).from_dict(model.config.to_dict() | SHAPE_2B)
        with torch.device(device):
            model = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype)
        model.gradient_checkpointing_enable({"use_reentrant": False})  # as training does
        processor = sg.Processor(processor.tokenizer, processor.image_processor, model)
    processor.banned[processor.eos] = True
    return model.to(device, dtype).eval(), processor

@contextmanager
def replaced(module, name, new):
    """Inside it `new` stands for a function of a module."""
    old = getattr(module, name)
    setattr(module, name, new)
    try:
        yield
    finally:
        setattr(module, name, old)

def race(model, ours, usual):
    """Median seconds of two calls."""
    times = [], []
    for _ in range(6):
        for call, taken in zip((ours, usual), times):
            began = time.perf_counter()
            call()
            torch.get_device_module(model.device).synchronize()
            taken.append(time.perf_counter() - began)
    return [median(taken[1:]) for taken in times]

def print_row(name, Q, G, cells, C, seconds, tokens=0, note=""):
    """A row of the table: seconds of ours and the usual way, or how many `tokens` per second."""
    ours, usual = (f"{tokens / x:,.0f}" if tokens else f"{x:.2f}" for x in seconds)
    print(f"{name:20}{Q:4}{G:4}{cells[0] * cells[1]:7}{C:6}{ours:>10}{usual:>10}"
          f"{seconds[1] / seconds[0]:7.1f}×{note}")

def noise_prompt(processor, cells):
    image = sg.Image.effect_noise((28 * cells[0], 28 * cells[1]), 80).convert("RGB")
    return processor.prompt("Subtract all red objects. How many objects are left?", [image])

def inputs_of(model, prompts, ids):
    """What transformers' forward takes: ids (B, N) that begin with B prompts."""
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids),
              "mm_token_type_ids": (ids == model.config.image_token_id).int(),
              "pixel_values": torch.cat([prompt.pixels for prompt in prompts]),
              "image_grid_thw": torch.cat([prompt.grids for prompt in prompts])}
    return {name: value.to(model.device) for name, value in inputs.items()}

def race_rollout(model, processor, cells, C, Q=8, G=8):
    """Beside `model.generate`, with image and prompt once per completion, and the same sampling."""
    prompts = [noise_prompt(processor, cells)] * Q
    inputs = inputs_of(model, prompts, torch.stack([prompt.ids for prompt in prompts]))
    sampling = dict(num_return_sequences=G, min_new_tokens=C, max_new_tokens=C, do_sample=True,
                    temperature=1.0, top_k=0, top_p=1.0)
    seconds = race(model, lambda: sg.rollout(model, processor, prompts, G, C, 1.0),
                   lambda: model.generate(**inputs, **sampling))
    print_row("rollout, tokens/s", Q, G, cells, C, seconds, tokens=Q * G * C)

def race_update(model, processor, G, C=256):
    """Beside transformers' forward over image and prompt repeated G times, with logits of every
    token, as the official trainer does it. The gradients are compared too."""
    prompt, allowed = noise_prompt(processor, LARGE), (~processor.banned).nonzero()[:, 0]
    own = allowed[torch.randint(len(allowed), (G, C))]  # (G, C)
    inputs = inputs_of(model, [prompt] * G, torch.cat([prompt.ids.expand(G, -1), own], 1))
    advantages, gradients = torch.linspace(-1, 1, G, device=model.device)[:, None], {}  # (G, 1)

    def ours():
        return sg.completion_logps(model, processor, [prompt], [[*own]])[0]  # (G, C)

    def usual():
        logits = model(**inputs, use_cache=False).logits[:, :-1]  # (G, N - 1, V)
        logps = sg.tempered_logps(logits, 1.0, processor.banned.to(model.device))
        return logps.gather(2, inputs["input_ids"][:, 1:, None])[:, -C:, 0]  # (G, C)

    def update(logps_of):
        model.zero_grad()
        (advantages * logps_of()).mean().backward()
        gradients[logps_of] = torch.cat([p.grad.flatten() for p in model.parameters()])

    model.train()
    seconds = race(model, lambda: update(ours), lambda: update(usual))
    gap = (gradients[ours] - gradients[usual]).norm() / gradients[usual].norm()
    print_row("update, s", 1, G, LARGE, C, seconds, note=f"  gradients differ by {gap:.0e}")

# ─── Memory of the 2B shape, counted ──────────────────────────────────────────────────────────────

class PeakMemory(TorchDispatchMode):
    """Most bytes at a time of the weights and of all tensors made inside it."""

    def __init__(self, model):
        super().__init__()
        self.peak, self.alive = 0, weakref.WeakSet(p.untyped_storage() for p in model.parameters())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, lambda x: self.alive.add(x.untyped_storage()), result)
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.alive))
        return result

def efficient_attention(q, k, v, **masking):
    """The kernel that CUDA takes, by name: the meta device takes one that keeps all scores."""
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[0]

def count_2b(Q, G, C, P, patches):
    """Memory of a run of the 2B shape, counted on tensors that have sizes but no contents."""
    model, processor = build("2B", torch.device("meta"), torch.bfloat16)
    prompts = [sg.Prompt(torch.zeros(P).long(), torch.arange(P).expand(3, P), None, None)] * Q
    decoder = sg.Decoder(model, processor, prompts, torch.rand(Q, G, C), 1.2)
    cache = sum(x.nbytes for x in tree_leaves([decoder.prompt_cache, decoder.own_cache]))
    torch.fx.experimental._config.meta_nonzero_assume_all_nonzero = True  # all have C tokens
    with (replaced(torch.nn.functional, "scaled_dot_product_attention", efficient_attention),
          PeakMemory(model.train()) as memory):
        own = [[torch.zeros(C).long()] * G]
        sg.completion_logps(model, processor, prompts[:1], own)[0].sum().backward()
    n, vision = sum(p.numel() for p in model.parameters()), model.config.vision_config
    held = 2 * n + sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    tower = 2 * patches * vision.embed_dim * (vision.depth + 10 + 3 * vision.mlp_ratio)
    parts = {"policy, bf16": 2 * n, "reference, bf16": 2 * n, "masters, fp32": 4 * n,
             "moments, fp32": 8 * n, "gradients, fp32": 4 * n, "KV cache": cache,
             "activations": max(0, memory.peak - held) + tower}
    total = sum(parts.values())
    parts |= {"sum": total, "with --offload-optimizer": total - 16 * n}
    print(f"\nQwen2-VL-2B, counted: {n / 1e9:.2f} G parameters; Q {Q}, G {G}, C {C}, P {P}")
    for name, size in parts.items():
        print(f"   {name:25}{size / 1e9:7.2f} GB")

# ─── Whole updates, here and in TRL ───────────────────────────────────────────────────────────────

def stretched(cells):
    """Inside it all images are stretched to so many cells."""
    load, size = sg.load_image, (28 * cells[0], 28 * cells[1])
    return replaced(sg, "load_image", lambda file: load(file).resize(size))

def our_updates(model, processor, rows, cfg):
    """Updates of `train` → median seconds, mean length of a completion."""
    reference = copy.deepcopy(model).requires_grad_(False)
    records = []
    run = SimpleNamespace(step=cfg.warmup_steps, log=lambda name, record: records.append(record),
                          end_update=lambda: None)
    with replaced(sg, "show", lambda *args: None):
        sg.train(cfg, run, model, reference, processor, rows, sg.MasterAdamW(model))
    seconds = [record["seconds"] for record in records]
    return median(seconds[1:]), fmean(record["length"] for record in records)

def trl_updates(checkpoint, rows, cfg):
    """The same in TRL's GRPOTrainer, with our checkpoint and rewards, and the paper's loss."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    tokenizer.chat_template = template = (
        "{% for m in messages if m.role != 'system' %}" + sg.BEFORE + "{% for p in m.content %}"
        "{% if p.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% else %}{{ p.text }}{% endif %}{% endfor %}{% endfor %}" + sg.AFTER)
    processor = transformers.Qwen2VLProcessor(
        transformers.Qwen2VLImageProcessor(), tokenizer, transformers.Qwen2VLVideoProcessor(),
        chat_template=template)
    dataset = Dataset.from_list([
        {"prompt": [{"role": "user", "content": row.problem}], "solution": row.reference,
         "image": sg.load_image(row.images[0]), "key_steps": row.key_steps} for row in rows])
    args = GRPOConfig(
        output_dir=tempfile.mkdtemp(), num_generations=cfg.group_size, beta=cfg.beta,
        per_device_train_batch_size=cfg.questions * cfg.group_size, learning_rate=cfg.lr,
        temperature=cfg.temperature, max_completion_length=cfg.max_new_tokens,
        max_steps=cfg.steps, logging_steps=1, loss_type="grpo", report_to=[], bf16=False,
        use_cpu=True, save_strategy="no", disable_tqdm=True, use_bias_correction_kl=False,
        generation_kwargs={"eos_token_id": tokenizer.convert_tokens_to_ids(sg.EOS_TOKENS)})
    model = transformers.AutoModelForImageTextToText.from_pretrained(checkpoint, dtype="float32")
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
    return median(times[1:]), fmean(lengths)

def beside_trl(checkpoint):
    # Qwen2VLProcessor wants torchvision, whose compiled operators serve here by name only.
    for name in ("nms qnms roi_align _roi_align_backward ps_roi_align _ps_roi_align_backward "
                 "roi_pool _roi_pool_backward ps_roi_pool _ps_roi_pool_backward qroi_align "
                 "deform_conv2d _deform_conv2d_backward").split():
        torch.library.define(f"torchvision::{name}", "(Tensor x) -> Tensor")
    import trl
    for Q, G, cells in ((8, 8, SMALL), (4, 8, (25, 20))):
        cfg = sg.Config(questions=Q, group_size=G, steps=5, temperature=1.0, beta=0.01, lr=1e-5,
                        max_new_tokens=192, instruction=False, micro_batch=Q)
        rows = sg.read_rows("shapes")[0][:Q * cfg.steps]
        model, processor = sg.load_model(checkpoint, "cpu", torch.float32, 400_000)
        with stretched(cells):
            ours = our_updates(model, processor, rows, cfg)
            theirs = trl_updates(str(Path(checkpoint) / "checkpoint"), rows, cfg)
        seconds, lengths = zip(ours, theirs)
        print_row(f"update, TRL {trl.__version__}", Q, G, cells, cfg.max_new_tokens, seconds,
                  note=f"  mean length {lengths[0]:.0f}, {lengths[1]:.0f}")

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--updates", type=int, help="so many whole updates, and nothing else")
    parser.add_argument("--trl", metavar="RUN", help="run folder to go on with, here and in TRL")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device, size, dtype, name = sg.pick_device("auto"), "tiny", torch.float32, "CPU"
    if device.type == "cuda":
        size, dtype, name = "2B", torch.bfloat16, torch.cuda.get_device_name()
    print(f"{size} on {name}, torch {torch.__version__}, transformers {transformers.__version__}")
    if not args.updates:
        print(f"\n{'':20}   Q   G  image     C      ours     usual   ratio")
    if args.trl:
        return beside_trl(args.trl)
    model, processor = build(size, device, dtype)
    if args.updates:
        cfg = sg.Config(instruction=False, steps=args.updates + 1)
        with stretched(LARGE):
            seconds, _ = our_updates(model, processor, sg.read_rows("shapes")[0], cfg)
        peak = torch.cuda.max_memory_allocated() / 1e9
        print(f"whole update, default settings: {seconds:.2f} s, peak of GPU memory {peak:.1f} GB")
        return
    for cells in (SMALL, LARGE):
        for C in (96, 192):
            race_rollout(model, processor, cells, C)
    for G in (4, 8):
        race_update(model, processor, G)
    count_2b(4, 4, 1024, 650, 2040)

if __name__ == "__main__":
    main()

# SPDX-License-Identifier: MIT
"""Takes one question of the embedded data through every step of the method and prints what comes out of each.

    python stepgrpo.py --explain

A few seconds: the model has random weights, and the four paths of the group are written here, each with a virtue or a
vice of its own, where a trained policy would sample them. README.md shows the same output, and a test compares the two.
"""
import copy
import math
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import transformers
from PIL import Image

import stepgrpo as sg

ROW = 5                                         # of train.json: yellow, three red, blue
CELL = 28                                       # pixels of an image token


def four_paths(path):
    """The reference path → four paths: flawless, wrong by a slip, right without a rationale, a dump of key words."""
    slip = path.replace("There are 5", "There are 6").replace("5 - 3 = 2", "6 - 3 = 3").replace("is:\n2", "is:\n3")
    start, end = path.index("### Rationales"), path.index("### Let's")
    return {"flawless": path, "a slip": slip, "no rationale": path[:start] + path[end:],
            "only key words": "### Step 1:\n5 objects, 3 red things, 5 - 3 = 2"}


def sketch(file):
    """A row of objects as one letter per image token: r, g, b, y, or a point for background."""
    with Image.open(file) as image:
        cells = image.width // CELL
        middles = [image.getpixel((CELL * i + CELL // 2, CELL // 2)) for i in range(cells)]
    names = {(220, 40, 40): "r", (40, 160, 60): "g", (50, 90, 220): "b", (240, 200, 40): "y"}
    return "".join(names.get(colour, "·") for colour in middles)


def show_question(row, processor, prompt):
    print("── 1. The question")
    print(f"image     {sketch(row.images[0])}   one letter per image token")
    print(f"question  {row.problem}")
    print(f"answer    {row.answer}")
    print(f"prompt    P = {len(prompt.ids)} tokens, {int(prompt.is_image.sum())} of them image; positions 0 to "
          f"{int(prompt.positions.max())}, of which an image takes as many as its longer side has tokens")


def show_warm_up(model, processor, prompt, row):
    print("\n── 2. Warm-up")
    path = processor.path_ids(row.path)
    logps, _ = sg.path_logps(model, processor, [prompt], [[path]])
    print(f"tokens of the reference path that are trained: {len(path)}, its EOS among them; of the prompt: 0")
    allowed = int((~processor.banned).sum())
    print(f"loss of random weights: {-logps.mean():.1f}; of a uniform guess among {allowed} tokens: "
          f"{math.log(allowed):.1f}")


def show_rollout(model, processor, prompt):
    print("\n── 3. Rollout")
    G, C = 4, 12
    sampled = sg.rollout(model, processor, [prompt], G, C, 1.2, [0])
    packed, mask = sg.path_logps(model, processor, [prompt], sampled.ids, 1.2)
    gap = (packed[mask] - torch.cat(sampled.logps[0])).abs().max()
    P = len(prompt.ids)
    first = {int(path[0]) for path in sg.rollout(model, processor, [prompt], 32, 1, 1.2, [0]).ids[0]}
    print(f"{G} paths of {C} tokens: {P} + {G}·{C} = {P + G * C} tokens are fed, not {G}·({P} + {C}) = {G * (P + C)}")
    print(f"32 paths at T = 1.2 begin with more than 10 different tokens: {len(first) > 10}")
    print(f"log-probs from sampling and from the packed forward differ by less than 0.0001: {bool(gap < 1e-4)}")


def show_sections(texts):
    print("\n── 4. Sections of the path with a slip")
    path = sg.split_path(texts["a slip"])
    for name, content in [("description", path.description), ("rationale", path.rationale),
                          *((f"step {i}", step) for i, step in enumerate(path.steps, 1)), ("answer", path.answer)]:
        print(f"{name:12} {content}")
    print(f"order        {', '.join(path.order)}")


def show_key_steps(texts, row):
    print("\n── 5. Key steps, and the step that earned each")
    print(f"{'':16}" + "".join(f"{group[0]:14}" for group in row.key_steps).rstrip())
    for name, text in texts.items():
        earned = sg.matched_key_steps(text, row.key_steps)
        print(f"{name:16}" + "".join(f"{'–' if i is None else f'step {i + 1}':14}" for i in earned).rstrip())
    print(f"one spelling for all: {sg.canonical('$5-3=2$')!r} is {sg.canonical('5 minus 3 equals 2')!r}")


def show_rewards(texts, row):
    print("\n── 6. Rewards and advantages")
    print(f"{'':16}{'right':>7}{'k':>7}{'StepRAR':>9}{'StepRVR':>9}{'r':>7}{'A':>8}{'  A, outcome only':>18}")
    scores = [sg.score_path(text, row, sg.Config()) for text in texts.values()]
    rewards = torch.tensor([[score["reward"] for score in scores], [score["right"] for score in scores]])
    A, outcome = sg.group_advantages(rewards)
    for name, score, a, o in zip(texts, scores, A.tolist(), outcome.tolist()):
        print(f"{name:16}{score['right']:7.0f}{score['k']:7.2f}{score['step_accuracy']:9.2f}"
              f"{score['step_validity']:9.0f}{score['reward']:7.2f}{a:+8.2f}{o:+18.2f}")
    return A


def show_objective(model, processor, prompt, texts, A):
    print("\n── 7. Objective and update")
    reference, optimizer = copy.deepcopy(model).requires_grad_(False), sg.MasterAdamW(model)
    ids = [processor.path_ids(text) for text in texts.values()]

    def mean_logps(policy):
        logps, mask = sg.path_logps(policy, processor, [prompt], [ids])
        return logps[0], mask[0], (logps[0].sum(1) / mask[0].sum(1)).tolist()
    logps, mask, before = mean_logps(model)
    ref = mean_logps(reference)[0]
    loss, stats = sg.grpo_loss(logps, logps.detach(), ref, A, mask)
    loss.backward()
    print(f"before the update   loss {abs(loss.item()):.3f}   KL {stats['kl']:.3f}   ratio {stats['ratio']:.3f}   "
          f"gradient is zero: {optimizer.gradient_norm() == 0}")
    optimizer.step(3e-4, optimizer.gradient_norm(), 1.0)
    logps, mask, after = mean_logps(model)
    _, stats = sg.grpo_loss(logps, logps.detach(), ref, A, mask)
    print(f"after one update    KL to the reference above zero: {stats['kl'] > 0}")
    order = sorted(zip(texts, before, after), key=lambda item: item[1] - item[2])
    print(f"log-prob of a path's tokens rose most for: {order[0][0]}; least for: {order[-1][0]}")


def main():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rows, _ = sg.read_rows("shapes")
    row, texts = rows[ROW], four_paths(rows[ROW].path)
    cfg = sg.Config(**sg.TINY)
    with tempfile.TemporaryDirectory() as folder:
        sg.build_tiny(folder, [r.problem + "\n" + r.path for r in rows], 0)
        model, processor = sg.load_model(folder, torch.device("cpu"), torch.float32, cfg.max_pixels)
    prompt = sg.make_prompt(processor, row, cfg)
    with torch.no_grad():
        show_question(row, processor, prompt)
        show_warm_up(model, processor, prompt, row)
        show_rollout(model, processor, prompt)
    show_sections(texts)
    show_key_steps(texts, row)
    A = show_rewards(texts, row)
    show_objective(model, processor, prompt, texts, A)


if __name__ == "__main__":
    main()

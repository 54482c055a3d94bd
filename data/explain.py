# SPDX-License-Identifier: MIT
"""Takes one question of the embedded data through every step of the method, and prints each.

    python data/explain.py

It takes seconds: the model has random weights, and the four completions of the group are written
here, each with a virtue or a vice of its own, where a trained policy would sample them. README.md
shows the same output, and a test compares the two.
"""
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import transformers

import stepgrpo as sg

CELL = 28  # pixels of an image token
LETTERS = {(220, 40, 40): "r", (40, 160, 60): "g", (50, 90, 220): "b"}

def four_completions(reference):
    """Flawless, wrong by a slip, right without a rationale, and a dump of key words."""
    slip = reference.replace("There are 5", "There are 6").replace("5 - 3 = 2", "6 - 3 = 3")
    slip = slip.replace("is:\n2", "is:\n3")
    start, end = reference.index("### Rationales"), reference.index("### Let's")
    thing = reference.split("Of them 3 ")[1].split(".")[0]
    return {"flawless": reference, "a slip": slip,
            "no rationale": reference[:start] + reference[end:],
            "only key words": f"### Step 1:\n5 objects, 3 {thing}, 5 - 3 = 2"}

def show_question(row, prompt):
    image = sg.load_image(row.images[0])
    middles = [image.getpixel((x, CELL // 2)) for x in range(CELL // 2, image.width, CELL)]
    seen = "".join(LETTERS.get(colour, "·") for colour in middles)
    print(f"── 1. The question\nimage     {seen}   one letter per image token")
    print(f"question  {row.problem}\nanswer    {row.answer}")
    print(f"prompt    P = {len(prompt.ids)} tokens, {len(middles)} of them image")

def show_warm_up(model, processor, prompt, row):
    ids = torch.tensor([*processor.text_ids(row.reference), processor.eos[0]])
    logps, _ = sg.completion_logps(model, processor, [prompt], [[ids]])
    allowed = int((~processor.banned).sum())
    print(f"\n── 2. Warm-up\ntokens of the reference path that are trained: {len(ids)}, its EOS "
          "among them; of the prompt: 0")
    print(f"loss of random weights: {-logps.mean():.1f}; of a uniform guess among {allowed} "
          f"tokens: {math.log(allowed):.1f}")

def show_rollout(model, processor, prompt):
    G, C, P = 4, 12, len(prompt.ids)
    sampled = sg.rollout(model, processor, [prompt], G, C, 1.2, [0])
    logps, mask = sg.completion_logps(model, processor, [prompt], sampled.ids, 1.2)
    gap = (logps[mask] - torch.cat(sampled.logps[0])).abs().max()
    print(f"\n── 3. Rollout\n{G} completions of {C} tokens: {P} + {G}·{C} = {P + G * C} tokens are "
          f"fed, not {G}·({P} + {C}) = {G * (P + C)}")
    print("log-probs from sampling and from the update differ by less than 0.0001:",
          bool(gap < 1e-4))

def show_sections(text):
    print("\n── 4. Sections of the completion with a slip")
    sections = sg.split_sections(text)
    steps = {f"step {n}": step for n, step in enumerate(sections.steps, 1)}
    for name, content in {"description": sections.description, "rationale": sections.rationale,
                          **steps, "answer": sections.answer}.items():
        print(f"{name:12} {content}")

def show_key_steps(texts, row):
    print("\n── 5. Key steps, and the step that earned each")
    print(" " * 16 + "".join(f"{group[0]:20}" for group in row.key_steps).rstrip())
    for name, text in texts.items():
        earned = sg.earned_key_steps(text, row.key_steps, row.reference)
        cells = ["–" if i is None else f"step {i + 1}" for i in earned]
        print(f"{name:16}" + "".join(f"{cell:20}" for cell in cells).rstrip())

def show_rewards(texts, row):
    print("\n── 6. Rewards and advantages\n" + " " * 16 + f"{'right':>6}{'k':>7}{'StepRAR':>9}"
          f"{'StepRVR':>9}{'r':>7}{'A':>8}   A, outcome only")
    scores = [sg.score(text, row, sg.Config()) for text in texts.values()]
    rewards = [[score[name] for score in scores] for name in ("reward", "right")]
    A, outcome = sg.group_advantages(torch.tensor(rewards))
    for name, score, a, o in zip(texts, scores, A.tolist(), outcome.tolist()):
        print(f"{name:16}{score['right']:6.0f}{score['k']:7.2f}{score['step_accuracy']:9.2f}"
              f"{score['step_validity']:9.0f}{score['reward']:7.2f}{a:+8.2f}{o:+18.2f}")
    return A

def show_cheats(texts, row):
    """Completions that reason badly or not at all; all but the first end with a wrong answer."""
    print("\n── 8. What the rewards can be cheated by\n" + " " * 29 + f"{'right':>6}{'k':>7}"
          f"{'StepRAR':>9}{'StepRVR':>9}{'r':>7}")
    thing = row.key_steps[1][0].split(" ", 1)[1]
    head, wrong = row.reference.split("### Step 1:")[0], "\n### The final answer is:\n3"
    dump = ", ".join(forms[0] for forms in row.key_steps)
    seen = sg.split_sections(row.reference).description
    steps = {
        "honest, with a slip": ["There are 6 objects.", f"Of them 3 {thing}.", "6 - 3 = 3"],
        "hedged with or": ["5 objects or 6 objects.", f"3 {thing} or 2 {thing}.", "5 - 3 = 2 or 3"],
        "hedged with commas": ["5 objects, 6 objects.", f"3 {thing}, 2 {thing}.",
                               "5 - 3 = 2, 5 - 2 = 3"],
        "key words in one step": [dump], "key words in two steps": [dump, dump],
        "all numbers": [", ".join(map(str, range(10)))] * 3, "description copied": [seen] * 3}
    cheats = {name: head + "\n".join(f"### Step {n}:\n{step}" for n, step in enumerate(texts, 1))
              + wrong for name, texts in steps.items()}
    for name, text in {"honest, right": texts["flawless"], **cheats}.items():
        s = sg.score(text, row, sg.Config())
        print(f"{name:29}{s['right']:6.0f}{s['k']:7.2f}{s['step_accuracy']:9.2f}"
              f"{s['step_validity']:9.0f}{s['reward']:7.2f}")

def show_objective(model, processor, prompt, texts, A):
    print("\n── 7. Objective and update")
    optimizer = sg.MasterAdamW(model)
    own = [[torch.tensor([*processor.text_ids(text), processor.eos[0]]) for text in texts.values()]]
    logps, mask = sg.completion_logps(model, processor, [prompt], own)  # (G, C)
    ref = logps.detach()
    loss, stats = sg.grpo_loss(logps, ref, ref, A, mask)
    loss.backward()
    print(f"before the update   loss {abs(loss.item()):.3f}   KL {stats['kl']:.3f}   ratio "
          f"{stats['ratio']:.3f}   gradient is zero: {optimizer.step(1e-5) == 0}")
    logps, mask = sg.completion_logps(model, processor, [prompt], own)
    _, stats = sg.grpo_loss(logps, logps.detach(), ref, A, mask)
    print(f"after one update    KL to the reference above zero: {stats['kl'] > 0}")
    gain = ((logps - ref).sum(1) / mask.sum(1)).tolist()
    names = sorted(texts, key=dict(zip(texts, gain)).get)
    print(f"log-prob of a token rose most for: {names[-1]}; least for: {names[0]}")

def main():
    transformers.utils.logging.set_verbosity_error()
    rows, _ = sg.read_rows("shapes")
    row = next(row for row in rows if "5 - 3 = 2" in row.reference and "red" in row.problem)
    texts = four_completions(row.reference)
    model, processor = sg.load_model("tiny", "cpu", torch.float32, 400_000)
    prompt = sg.make_prompt(processor, row, sg.Config(**sg.TINY))
    with torch.no_grad():
        show_question(row, prompt)
        show_warm_up(model, processor, prompt, row)
        show_rollout(model, processor, prompt)
    show_sections(texts["a slip"])
    show_key_steps(texts, row)
    A = show_rewards(texts, row)
    show_objective(model, processor, prompt, texts, A)
    show_cheats(texts, row)

if __name__ == "__main__":
    main()

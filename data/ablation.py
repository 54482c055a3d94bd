# SPDX-License-Identifier: MIT
"""The paper's control experiments (its tables 2 and 4) in miniature, on the embedded data.

    python data/ablation.py                     # five seeds, 75 minutes on two cores; after Ctrl-C: the same again
    python data/ablation.py --quick             # two seeds of a hasty recipe, some ten minutes (estimated)
    python data/ablation.py --table             # only the table, of what is there
    python data/ablation.py --seeing            # and what each policy sees: its descriptions against the reference's

Each seed is warmed up once; every arm starts from that checkpoint and samples the same number of paths. Runs stand in
runs/ablation (or runs/ablation-quick), each an ordinary run folder with its log and its report.html. One line per run
goes to data/ablation.jsonl (with --quick to runs/ablation-quick/ablation.jsonl), the table to the screen.
"""
import argparse
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import stepgrpo as sg
from stepgrpo import HERE, TINY

PATHS = TINY["questions"] * TINY["group_size"]  # sampled per update, in every arm
ARMS = {                                        # name: what differs from the default; None: no reinforcement
    "warm-up only": None,
    "more warm-up, same time": None,
    "outcome reward (GRPO)": {"reward": "outcome"},
    "StepRAR": {"reward": "accuracy"},
    "StepRVR": {"reward": "validity"},
    "both, M = 2": {"group_size": 2, "questions": PATHS // 2},
    "both, M = 4": {"group_size": 4, "questions": PATHS // 4},
    "both, M = 8": {"group_size": 8, "questions": PATHS // 8},
}
FULL, CONTINUED = "both, M = 8", "more warm-up, same time"
QUICK = {"warmup_steps": 1000, "steps": 40, "held_out": 200}
T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}     # Student's, number of seeds


def folder_of(root, seed, arm):
    return root / "-".join([f"seed{seed}", *re.findall(r"\w+", arm)])


def read_metrics(folder):
    """Run folder → records of its updates, evaluations by name. What was evaluated before the last update is old."""
    file = folder / "metrics.jsonl"
    training, evaluations = [], {}
    for line in file.read_text(encoding="utf-8").split("\n") if file.exists() else []:
        record = json.loads(line or "{}")
        if record.get("phase") == "StepGRPO":
            training.append(record)
            evaluations = {name: e for name, e in evaluations.items() if name.startswith("before")}
        elif record.get("phase") == "evaluation":
            evaluations[record["name"]] = record
    return training, evaluations


def is_done(folder, steps):
    training, evaluations = read_metrics(folder)
    return "after, sampled at T = 1" in evaluations and len(training) == steps


def run(folder, steps, settings):
    """Starts or goes on with one run, until it has `steps` updates and its evaluation."""
    if is_done(folder, steps):
        return
    flags = [part for name, value in settings.items()
             for part in ([f"--{'' if value else 'no-'}{name.replace('_', '-')}"] if isinstance(value, bool) else
                          [f"--{name.replace('_', '-')}", str(value)])]
    begun = (folder / "checkpoint").exists()
    command = [sys.executable, HERE / "stepgrpo.py", *flags, "--out", folder, "--steps", steps]
    command += ["--resume"] if begun else ["--overwrite"] if (folder / "metrics.jsonl").exists() else []
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_suffix(".log")
    with open(log, "a", encoding="utf-8") as output:           # one thread each: the same figures for any --jobs
        done = subprocess.run([str(part) for part in command], stdout=output, stderr=output,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode:
        raise SystemExit(f"{folder} ended with an error; the end of {log}:\n{log.read_text(encoding='utf-8')[-1500:]}")


def warm_up(root, seed, recipe):
    run(folder_of(root, seed, "warm-up only"), 0, {"model": "tiny", "seed": seed} | recipe)


def arm_run(root, seed, arm, steps):
    """An arm: a copy of the warmed-up run, gone on with other settings."""
    folder = folder_of(root, seed, arm)
    if not folder.exists():
        new = folder.with_suffix(".new")
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(folder_of(root, seed, "warm-up only"), new)
        new.rename(folder)
    run(folder, steps, ARMS[arm])


def more_warm_up(root, seed, recipe):
    """Imitation goes on for as long as the reinforcement of the full arm took, with the same schedule anew."""
    training, _ = read_metrics(folder_of(root, seed, FULL))
    start = folder_of(root, seed, "warm-up only")
    log = start.with_suffix(".log").read_text(encoding="utf-8")
    rate = statistics.median(map(float, re.findall(r"([\d.]+)update/s", log)))
    updates = round(sum(r["seconds"] for r in training) * rate)
    settings = TINY | {"model": start, "seed": 1000 + seed} | recipe | {"warmup_steps": updates}
    run(folder_of(root, seed, CONTINUED), 0, {name: value for name, value in settings.items() if name != "steps"})


def collect(root, seeds, steps):
    """One dict per finished run."""
    rows = []
    for arm in ARMS:
        for seed in seeds:
            folder = folder_of(root, seed, arm)
            if not is_done(folder, 0 if ARMS[arm] is None else steps):
                continue
            training, evaluations = read_metrics(folder)
            row = {"arm": arm, "seed": seed}
            for how in ("greedy", "sampled at T = 1"):
                e = evaluations[f"after, {how}"]
                row |= {f"{how.split()[0]} {name}": e[name] for name in ("right", "step_validity", "k")}
            if training:
                row |= {"flat groups": sum(r["flat_groups"] for r in training) / sum(r["questions"] for r in training),
                        "reward_std": statistics.mean(r["reward_std"] for r in training if r["questions"]),
                        "seconds": sum(r["seconds"] for r in training)}
            rows.append(row)
    return rows


def seeing(root, seeds, questions=300):
    """Prints, before and after StepGRPO, how often the greedy description is the reference's word for word, and how
    often the answer is right where it is: learning to see, and learning to reason from what is seen."""
    cfg, rows = sg.Config(**TINY), sg.read_rows("shapes/test")[0][:questions]
    print("\n| seed | description right, warm-up | StepGRPO | answer right where it is, warm-up | StepGRPO |")
    print("|---|---|---|---|---|")
    for seed in seeds:
        cells = {}
        for arm in ("warm-up only", FULL):
            policy, processor = sg.load_model(folder_of(root, seed, arm), torch.device("cpu"), torch.float32,
                                              cfg.max_pixels)
            seen = []                                          # of each question seen right: whether answered right
            for batch in sg.chunks(rows, 100):
                prompts = [sg.make_prompt(processor, row, cfg) for row in batch]
                texts = sg.rollout(policy, processor, prompts, 1, cfg.max_new_tokens, temperature=0).texts
                seen += [sg.same_answer(sg.final_answer(text), row.answer) for row, (text,) in zip(batch, texts)
                         if sg.split_path(text).description == sg.split_path(row.path).description]
            cells[arm] = len(seen) / len(rows), sum(seen) / max(1, len(seen))
        shown = [f"{100 * cells[arm][i]:.0f} %" for i in (0, 1) for arm in cells]
        print(f"| {seed} | {' | '.join(shown)} |", flush=True)


def interval(values):
    """Mean and half width of its 95 % interval (Student's t over seeds)."""
    n = len(values)
    half = T.get(n, 1.96) * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return statistics.mean(values), half


def table(rows):
    """Markdown: one line per arm, mean ± half the 95 % interval over its seeds, and the paired difference to GRPO."""
    columns = {"right, sampled": "sampled right", "right, greedy": "greedy right", "valid": "sampled step_validity",
               "k": "sampled k", "flat groups": "flat groups", "spread in a group": "reward_std"}
    lines = ["| arm | seeds | " + " | ".join(columns) + " | against GRPO, sampled |",
             "|---|---|" + "---|" * (len(columns) + 1)]
    plain = {row["seed"]: row["sampled right"] for row in rows if row["arm"] == "outcome reward (GRPO)"}
    for arm in ARMS:
        group = [row for row in rows if row["arm"] == arm]
        if not group:
            continue
        cells = []
        for column in columns.values():
            values = [row[column] for row in group if column in row]
            mean, half = interval(values) if values else (math.nan, math.nan)
            cells.append(f"{100 * mean:.1f} ± {100 * half:.1f}" if values and column != "reward_std" else
                         f"{mean:.2f}" if values else "–")
        pairs = [row["sampled right"] - plain[row["seed"]] for row in group if row["seed"] in plain]
        mean, half = interval(pairs) if pairs else (math.nan, math.nan)
        cells.append(f"{100 * mean:+.1f} ± {100 * half:.1f}" if pairs and arm != "outcome reward (GRPO)" else "–")
        lines.append(f"| {arm} | {len(group)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="two seeds, a third of the warm-up, 40 updates")
    parser.add_argument("--seeds", type=int, help="number of seeds (5; 2 with --quick)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once, one thread each")
    parser.add_argument("--table", action="store_true", help="train nothing: the table of the runs that are there")
    parser.add_argument("--seeing", action="store_true", help="also compare the policies' descriptions; trains nothing")
    args = parser.parse_args()
    root = HERE / "runs" / ("ablation-quick" if args.quick else "ablation")
    recipe = QUICK if args.quick else {}
    steps, seeds = recipe.get("steps", TINY["steps"]), range(args.seeds or (2 if args.quick else 5))
    recipe = {name: value for name, value in recipe.items() if name != "steps"}
    stages = [[(warm_up, root, seed, recipe) for seed in seeds],
              [(arm_run, root, seed, arm, steps) for seed in seeds for arm in ARMS if ARMS[arm] is not None],
              [(more_warm_up, root, seed, recipe) for seed in seeds]]
    try:
        with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=sum(map(len, stages)), unit="run") as bar:
            for stage in [] if args.table or args.seeing else stages:
                for _ in pool.map(lambda task: task[0](*task[1:]), stage):
                    bar.update()
    except KeyboardInterrupt:
        sys.exit("stopped. Go on with the same command")
    rows = collect(root, seeds, steps)
    out = root / "ablation.jsonl" if args.quick else HERE / "data" / "ablation.jsonl"
    if not (args.table or args.seeing):
        out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif not rows and out.exists():                            # the runs are not here: what they came to is
        rows = [json.loads(line) for line in out.read_text(encoding="utf-8").split("\n") if line]
    print(f"{len(rows)} runs, {out}\n\n{table(rows)}")
    if args.seeing:
        transformers.utils.logging.disable_progress_bar()
        seeing(root, seeds)


if __name__ == "__main__":
    main()

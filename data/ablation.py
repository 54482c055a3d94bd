# SPDX-License-Identifier: MIT
"""Control experiments: what each reward does, over five seeds.

    python data/ablation.py             # all arms, two at a time; goes on where it was stopped
    python data/ablation.py --report    # only the tables and the curves, from data/ablation.jsonl

Every arm of a seed starts from the same warm-up and asks the same held-out questions. Each is an
ordinary run of stepgrpo.py in runs/ablation/; its result is a line of data/ablation.jsonl.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import stepgrpo as sg

RUNS, RESULTS = HERE.parent / "runs" / "ablation", HERE / "ablation.jsonl"
WARM_UP, GRPO, BOTH = "warm-up only", "right answer only (GRPO)", "both rewards, M = 8"
# As many updates of imitation as take the time of 100 updates of StepGRPO.
ARMS = {
    WARM_UP: "--steps 0",
    "more imitation": "--warmup_steps 1000 --steps 0",
    GRPO: "--reward outcome",
    "StepRAR alone": "--reward accuracy",
    "StepRVR alone": "--reward validity",
    BOTH: "",
    "both rewards, M = 4": "--group_size 4",
    "both rewards, M = 2": "--group_size 2"}
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # Student's t for a 95 % interval of so many seeds

def run(seed, arm):
    """One arm of one seed, as a run of its own → its line in the results."""
    folder, began = RUNS / f"{seed} {arm}", time.perf_counter()
    settings = {**sg.TINY, "seed": seed, "out": folder, "show_every": 1000}
    if arm != WARM_UP:
        settings |= {"model": RUNS / f"{seed} {WARM_UP}", "warmup_steps": 0}
    flags = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
    if (folder / "config.json").exists():
        flags = ["--resume", "--out", str(folder)]
    subprocess.run([sys.executable, HERE.parent / "stepgrpo.py", *flags, *ARMS[arm].split()],
                   check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                   env=os.environ | {"OMP_NUM_THREADS": "1"})
    with open(folder / "metrics.jsonl", encoding="utf-8") as f:
        records = [json.loads(line) for line in f]
    updates = [record for record in records if record["phase"] == "StepGRPO"]
    held_out = {r["name"].split(", ")[1]: r for r in records if r["phase"] == "evaluation"}  # last
    result = {"seed": seed, "arm": arm, "seconds": round(time.perf_counter() - began, 1)}
    for how, name in (("sampled at T = 1", "sampled"), ("greedy", "greedy")):
        result |= {f"{name} {key}": round(held_out[how][key], 4)
                   for key in ("right", "step_validity", "k")}
    result |= {key: [round(update[key], 4) for update in updates]
               for key in ("right", "step_validity", "flat_groups")}
    with open(RESULTS, "a", encoding="utf-8") as f:
        f.write(json.dumps(result) + "\n")
    print(f"{seed} {arm}: {result['sampled right']:.3f}, {result['seconds']:.0f} s", flush=True)

def interval(values):
    """Mean and half-width of its 95 % interval."""
    half = T95[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), half

def table(results, seeds):
    """The Markdown table: means over the seeds ± half of the 95 % interval."""
    print("| arm | right, sampled | against GRPO | right, greedy | valid form | k | flat groups |")
    print("|---|---|---|---|---|---|---|")
    for arm in ARMS:
        found = [results[seed, arm] for seed in seeds]
        cells = []
        for key in ("sampled right", "against", "greedy right", "sampled step_validity", "sampled k"):
            values = [100 * (r["sampled right"] - results[r["seed"], GRPO]["sampled right"])
                      if key == "against" else 100 * r[key] for r in found]
            mean, half = interval(values)
            cells.append(f"{mean:+.1f} ± {half:.1f}" if key == "against" else f"{mean:.1f} ± {half:.1f}")
        if arm == GRPO:
            cells[1] = "–"
        flat = [x for r in found for x in r["flat_groups"]]
        cells.append(f"{100 * statistics.mean(flat) / sg.TINY['questions']:.0f} %" if flat else "–")
        print(f"| {arm} | {' | '.join(cells)} |")

def curves(results, seeds, file):
    """Accuracy and validity of the sampled completions over the updates, as an SVG."""
    width, height, left, top = 360, 220, 50, 30
    parts = []
    for panel, (key, title) in enumerate((("right", "right answers"), ("step_validity", "valid form"))):
        x0 = left + panel * (width + 70)
        parts.append(f'<text x="{x0}" y="18" font-weight="bold">{title}</text>')
        for tick in (0, 0.25, 0.5, 0.75, 1):
            y = top + height * (1 - tick)
            parts.append(f'<path d="M{x0} {y}h{width}" stroke="#ddd"/>'
                         f'<text x="{x0 - 8}" y="{y + 4}" text-anchor="end">{100 * tick:.0f} %</text>')
        for arm, colour in ((GRPO, "#c0504d"), (BOTH, "#1f6fb4")):
            found = [results[seed, arm][key] for seed in seeds]
            means, halves = zip(*(interval([statistics.mean(run[max(0, n - 4):n + 1]) for run in found])
                                  for n in range(len(found[0]))))  # mean of the last five updates
            xs = [x0 + width * n / (len(means) - 1) for n in range(len(means))]

            def points(values):
                return [f"{x:.1f},{top + height * (1 - min(1, max(0, v))):.1f}"
                        for x, v in zip(xs, values)]

            band = points([m + h for m, h in zip(means, halves)])
            band += points([m - h for m, h in zip(means, halves)])[::-1]
            parts.append(f'<polygon points="{" ".join(band)}" fill="{colour}" opacity="0.2"/>'
                         f'<polyline points="{" ".join(points(means))}" fill="none" '
                         f'stroke="{colour}" stroke-width="2"/>')
            y = top + height - 30 + 18 * (arm == BOTH)
            parts.append(f'<text x="{x0 + 150}" y="{y}" fill="{colour}">{arm}</text>')
        parts.append(f'<text x="{x0 + width / 2}" y="{top + height + 20}" '
                     f'text-anchor="middle">update</text>')
    file.write_text('<svg xmlns="http://www.w3.org/2000/svg" width="860" height="280" '
                    'font-family="sans-serif" font-size="12"><rect width="860" height="280" '
                    f'fill="white"/>{"".join(parts)}</svg>\n')

def read_results():
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    return {(r["seed"], r["arm"]): r for r in map(json.loads, lines)}

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, choices=(2, 3, 4, 5), help="so many seeds")
    parser.add_argument("--report", action="store_true", help="run nothing")
    args = parser.parse_args()
    seeds, done = range(args.seeds), read_results()
    if not args.report:
        with ThreadPoolExecutor(2) as pool:  # one thread each: these models are too small for two
            for arms in ([WARM_UP], [arm for arm in ARMS if arm != WARM_UP]):
                todo = [(seed, arm) for arm in arms for seed in seeds if (seed, arm) not in done]
                list(pool.map(lambda pair: run(*pair), todo))
    results = read_results()
    table(results, seeds)
    curves(results, seeds, HERE / "ablation.svg")

if __name__ == "__main__":
    main()

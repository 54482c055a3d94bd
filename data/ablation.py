# SPDX-License-Identifier: MIT
"""Control experiments: what each reward does, over several seeds.

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
ARMS = {
    WARM_UP: "--steps 0",
    # As many updates of imitation as take the time of 80 updates of StepGRPO.
    "more imitation": "--warmup_steps 670 --steps 0",
    GRPO: "--reward outcome",
    "StepRAR alone": "--reward accuracy",
    "StepRVR alone": "--reward validity",
    BOTH: "",
    "both rewards, M = 4": "--group_size 4",
    "both rewards, M = 2": "--group_size 2"}
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # Student's t for a 95 % interval of so many seeds

def run(job):
    """One arm of one seed, as a run of its own → its line in the results."""
    seed, arm = job
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
    seconds = round(time.perf_counter() - began, 1)
    result = {"seed": seed, "arm": arm, "seconds": seconds}
    for how, name in (("sampled at T = 1", "sampled"), ("greedy", "greedy")):
        result |= {f"{name} {key}": round(held_out[how][key], 4)
                   for key in ("right", "step_validity", "k")}
    result |= {key: [round(update[key], 4) for update in updates]
               for key in ("right", "step_validity", "flat_groups")}
    with open(RESULTS, "a", encoding="utf-8") as f:
        f.write(json.dumps(result) + "\n")
    print(f"{seed} {arm}: {result['sampled right']:.3f}, {seconds:.0f} s", flush=True)

def run_all(seeds, done):
    """Two at a time, one thread each: these models are too small for two."""
    sg.from_shapes("train.json")  # before two runs want to draw it
    jobs = [(seed, arm) for arm in ARMS for seed in seeds if (seed, arm) not in done]
    with ThreadPoolExecutor(2) as pool:
        for first in (True, False):  # all warm-ups, then what starts from them
            list(pool.map(run, [job for job in jobs if (job[1] == WARM_UP) == first]))

def interval(values):
    """Mean and half-width of its 95 % interval."""
    half = T95[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), half

def table(results, seeds):
    """The Markdown table of all finished arms: means over the seeds ± half of the 95 % interval."""
    def show(values, form="{:.1f}"):
        mean, half = interval(values)
        return f"{form.format(mean)} ± {half:.1f}"

    print("\n| | right, sampled | against GRPO | right, greedy | valid form | k | flat groups |\n"
          "|---|---|---|---|---|---|---|")
    for arm in [arm for arm in ARMS if all((seed, arm) in results for seed in seeds)]:
        found, plain = ([results[seed, x] for seed in seeds] for x in (arm, GRPO))
        gains = [100 * (r["sampled right"] - p["sampled right"]) for r, p in zip(found, plain)]
        keys = "sampled right", "greedy right", "sampled step_validity", "sampled k"
        cells = [show([100 * r[key] for r in found]) for key in keys]
        cells.insert(1, "–" if arm == GRPO else show(gains, "{:+.1f}"))
        flat = [100 * n / sg.TINY["questions"] for r in found for n in r["flat_groups"]]
        cells.append(f"{statistics.mean(flat):.0f} %" if flat else "–")
        print(f"| {arm} | {' | '.join(cells)} |")

def panel(x0, title, found_of, key):
    """SVG of one plot: mean of the seeds with its 95 % band; a point is the mean of the last five
    updates. found_of: arm → its results."""
    width, height, top = 240, 200, 30

    def point(x, y):
        return f"{x:.1f},{top + height * (1 - min(1, max(0, y))):.1f}"

    parts = [f'<text x="{x0}" y="18" font-weight="bold">{title}</text>',
             f'<text x="{x0 + 120}" y="{top + height + 20}" text-anchor="middle">update</text>']
    for tick in (0, 0.25, 0.5, 0.75, 1):
        y = top + height * (1 - tick)
        parts.append(f'<path d="M{x0} {y}h{width}" stroke="#ddd"/><text x="{x0 - 6}" y="{y + 4}" '
                     f'text-anchor="end">{100 * tick:.0f} %</text>')
    for arm, colour in ((GRPO, "#c0504d"), (BOTH, "#1f6fb4")):
        runs = [[statistics.mean(values[max(0, n - 4):n + 1]) for n in range(len(values))]
                for values in (result[key] for result in found_of[arm])]
        pairs = [interval(values) for values in zip(*runs)]
        xs = [x0 + width * n / (len(pairs) - 1) for n in range(len(pairs))]
        band = [point(x, mean + half) for x, (mean, half) in zip(xs, pairs)]
        band += [point(x, mean - half) for x, (mean, half) in zip(xs, pairs)][::-1]
        line = [point(x, mean) for x, (mean, _) in zip(xs, pairs)]
        parts += [f'<polygon points="{" ".join(band)}" fill="{colour}" opacity="0.2"/>',
                  f'<polyline points="{" ".join(line)}" fill="none" stroke="{colour}" '
                  'stroke-width="2"/>']
        y = top + height - 26 + 18 * (arm == BOTH)
        parts.append(f'<text x="{x0 + 90}" y="{y}" fill="{colour}">{arm}</text>')
    return "".join(parts)

def curves(results, seeds, file):
    """Both rewards against the right answer alone, over the updates, on training questions."""
    found_of = {arm: [results[seed, arm] for seed in seeds] for arm in (GRPO, BOTH)}
    panels = (panel(45, "right answers", found_of, "right"),
              panel(345, "valid form", found_of, "step_validity"))
    file.write_text('<svg xmlns="http://www.w3.org/2000/svg" width="600" height="260" '
                    'font-family="sans-serif" font-size="12"><rect width="600" height="260" '
                    f'fill="white"/>{"".join(panels)}</svg>\n', encoding="utf-8")

def read_results():
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    return {(r["seed"], r["arm"]): r for r in map(json.loads, lines)}

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, choices=(2, 3, 4, 5))
    parser.add_argument("--report", action="store_true", help="run nothing")
    args = parser.parse_args()
    if not args.report:
        run_all(range(args.seeds), read_results())
    results = read_results()
    table(results, range(args.seeds))
    curves(results, range(args.seeds), HERE / "ablation.svg")

if __name__ == "__main__":
    main()

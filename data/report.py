# SPDX-License-Identifier: MIT
"""Makes runs/NAME/report.html: the curves of a run, and its paths with what each of them earned and why.

    python data/report.py runs/tiny             # at any time, also while the run goes on
    python stepgrpo.py --report runs/tiny       # the same

One page without scripts that needs neither network nor the run folder, made from config.json, metrics.jsonl and
samples.jsonl. A key step is marked where a step says it; if no words can be pinned down, it is listed behind the step.
"""
import base64
import collections
import functools
import html
import io
import itertools
import json
import math
import os
import re
import shlex
import sys
import time
from bisect import bisect_left
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from stepgrpo import Config, UserError, canonical, final_answer, load_image, matched_key_steps, says, split_path

POINTS, GROUPS, WIDTH = 200, 24, 480            # at most: points of a curve, groups shown, pixels of an image's width
PARTS = {"step": ("right", "keys", "valid"), "accuracy": ("right", "keys"), "validity": ("valid",),
         "outcome": ("right",)}                 # what --reward adds up
GROUP_FIELDS = ("step", "where", "problem", "answer", "images", "key_steps", "paths")
PIECE = re.compile(r"\d+(?:[.,]\d+)*|\\[a-zA-Z]+|\w+|\S")      # of a text: what a mark never cuts in two
RANK = {"description": 0, "rationale": 0, "step": 1, "answer": 2}
esc = html.escape


# ─── Logs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

def read_log(file, needs):
    """A .jsonl file → list of records; [] if there is no file. UserError names a line that is no record with `needs`.

    The last line may be torn, where the process was killed: then it is left out.
    """
    lines, records = file.read_bytes().split(b"\n") if file.exists() else [], []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if lacking := [name for name in needs if name not in record]:
                raise ValueError(f"it has no {', '.join(lacking)}")
            records.append(record)
        except (ValueError, TypeError) as e:                   # TypeError: a bare number
            if number < len(lines):
                raise UserError(f"{file} line {number} is no record of a run: {e}") from None
    return records


def read_run(folder):
    """Run folder → settings, warm-up and StepGRPO records, evaluations by name, groups. UserError: it is no run."""
    if not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{folder} holds no metrics.jsonl; name the folder of a run, as in runs/tiny")
    try:
        cfg = asdict(Config()) | json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError) as e:
        raise UserError(f"cannot read {folder / 'config.json'}: {e}") from None
    phases, evaluations = collections.defaultdict(list), {}
    for record in read_log(folder / "metrics.jsonl", ["phase"]):
        phases[record["phase"]].append(record)
        if record["phase"] == "evaluation":
            evaluations[record["name"]] = record
        elif record["phase"] == "StepGRPO":                    # a finished run went on: its end is another one now
            evaluations = {name: e for name, e in evaluations.items() if not name.startswith("after")}
    return cfg, phases["warm-up"], phases["StepGRPO"], evaluations, read_log(folder / "samples.jsonl", GROUP_FIELDS)


# ─── Curves ───────────────────────────────────────────────────────────────────────────────────────────────────────────

def binned(points):
    """(x, y) in any number → at most POINTS of them, by means over neighbours."""
    size = max(1, -(-len(points) // POINTS))
    return [tuple(sum(column) / len(column) for column in zip(*points[i:i + size]))
            for i in range(0, len(points), size)]


def smoothed(values):
    """Centred moving average over a tenth of the curve; the windows shrink towards both ends."""
    windows = [values[max(0, i - len(values) // 20):i + len(values) // 20 + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def ticks(low, high, log=False):
    """At most five round numbers between low < high. On a log axis all of these are exponents of ten."""
    if log:
        exponents = range(math.floor(low), math.ceil(high) + 1)
        marks = [m for e in exponents for m in (e, e + math.log10(2), e + math.log10(5)) if low <= m <= high]
        return marks[::max(1, -(-len(marks) // 5))]
    rough = (high - low) / 4
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(m * scale for m in (1, 2, 2.5, 5, 10) if m * scale >= rough * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6) + 1)]


def curve(title, caption, series, top=None, log=False):
    """A small figure, '' without data. series: label → [(x, y)]. The y axis ends at `top`, else where it is useful."""
    lines = {}
    for label, points in series.items():
        points = [(x, math.log10(y) if log else y) for x, y in points if math.isfinite(y) and (y > 0 or not log)]
        if points := binned(points):
            lines[label] = points, smoothed([y for _, y in points])
    if not lines:
        return ""
    raw, xs = ([point[i] for points, _ in lines.values() for point in points] for i in (1, 0))
    high = max(raw) if log else top or min(max(raw), 1.5 * max(y for _, smooth in lines.values() for y in smooth))
    low, first, last = min(raw) if log else min(0, *raw), min(xs), max(xs)
    high = high if high > low else low + 1

    def at(x, y):                                              # in a view box of 320 × 142
        return (f"{36 + (x - first) / (last - first or 1) * 276:.1f},"
                f"{124 - (min(y, high) - low) / (high - low) * 114:.1f}")

    svg, legend = [], []
    for y in ticks(low, high, log):
        svg.append(f'<path d="M36,{(height := at(first, y).split(",")[1])}H312"/><text x="31" y="{height}" dy="3.5" '
                   f'text-anchor="end">{10 ** y if log else y:.4g}</text>')
    for x in ticks(first, last) if last > first else [first]:
        svg.append(f'<text x="{at(x, low).split(",")[0]}" y="138" text-anchor="middle">{x:g}</text>')
    if max(raw) > high * 1.001 and not log:
        svg.append(f'<text x="312" y="7" text-anchor="end">cut off above; highest {max(raw):.3g}</text>')
    for i, (label, (points, smooth)) in enumerate(lines.items()):
        mean = [at(x, y) for (x, _), y in zip(points, smooth)]
        x, y = mean[-1].split(",")
        svg.append(f'<g class="s{i}"><polyline class="raw" points="{" ".join(at(*point) for point in points)}"/>'
                   f'<polyline points="{" ".join(mean)}"/><circle cx="{x}" cy="{y}" r="2.6"/></g>')
        legend.append(f'<span class="s{i}"><i></i>{label} <b>{10 ** smooth[-1] if log else smooth[-1]:.3g}</b></span>')
    return (f'<figure><h3>{title}</h3><p class="legend">{"".join(legend)}</p><svg viewBox="0 0 320 142" role="img" '
            f'aria-label="{title}">{"".join(svg)}</svg><figcaption>{caption}</figcaption></figure>')


def curves(cfg, warmup, updates):
    """The figures of a run, each with a sentence on how to read it."""
    def of(name, records=updates):
        return [(r["step"], r[name]) for r in records if name in r]

    # `questions` counts the groups that were learned from, so with --skip-flat-groups the flat ones come on top.
    flat = [(r["step"], r["flat_groups"] / max(1, r["questions"] + r["flat_groups"] * cfg["skip_flat_groups"]))
            for r in updates]
    best = {"step": 2 + cfg["alpha"], "accuracy": 1 + cfg["alpha"]}.get(cfg["reward"], 1)
    figures = [
        curve("Reward", f"Means over the paths of an update; the reward that is optimised can reach {best:g}. StepRAR "
              "pays for answer and key steps, StepRVR for a complete path in order.", {
                  "reward": of("reward"), "StepRAR": of("step_accuracy"), "StepRVR": of("step_validity")},
              max(best, 1 + cfg["alpha"])),
        curve("Answers and key steps", "Share of paths with the right answer, and mean share k of the key steps that a "
              "path states: training questions, before the update.", {"right": of("right"), "k": of("k")}, 1),
        curve("KL to the reference", "How far the policy is from the end of the warm-up, per token. It is estimated on "
              "sampled tokens, so it jumps; a slow climb is what learning looks like.",
              {"KL": of("kl")} if cfg["beta"] else {}),
        curve("Length", f"Mean tokens of a path; the limit is {cfg['max_new_tokens']}. A drift to the limit, or to "
              "almost nothing, is a bad sign.", {"tokens": of("length")}),
        curve("Flat groups", "Share of groups whose paths all earn the same, which teach nothing. Near 1 the questions "
              "are too easy or too hard.", {"share": flat}, 1),
        curve("Warm-up loss", "Mean negative log-likelihood of a token of the reference paths, before StepGRPO. The "
              "axis is logarithmic.", {"nats": of("loss", warmup)}, log=True)]
    return f'<div class="grid">{"".join(figures)}</div>' if any(figures) else '<p class="note">Nothing yet.</p>'


# ─── Paths ────────────────────────────────────────────────────────────────────────────────────────────────────────────

@functools.lru_cache(maxsize=8192)                             # as a run goes on, its report is written many times
def find_span(step, form):
    """Where a step says a form (canonical text): (start, end) in characters, or None if no words can be pinned down.

    Cut from the end, then from the start, to the shortest text whose canonical text holds the form. It counts only if
    its neighbours do not undo it, as in 'not 3 objects', which is for `says` to tell; else the next place is tried.
    """
    text, tokens, begin = "\n" + step, form.split(), 0         # \n: a bullet may open the step
    pieces, n = [match.span() for match in PIECE.finditer(text)], len(tokens)

    def holds(first, last):
        return f" {form} " in f" {canonical(text[pieces[first - 1][1] if first else 0:pieces[last][1]])} "

    for _ in range(8):                                         # a text that goes in circles has hundreds of places
        if begin == len(pieces) or not holds(begin, len(pieces) - 1):
            break
        last = begin + bisect_left(range(begin, len(pieces)), True, key=lambda i: holds(begin, i))
        first = next((i for i in range(last, max(begin, last - 50) - 1, -1) if holds(i, last)), begin)
        start, end = pieces[first][0], pieces[last][1]
        before, after = canonical(text[:end]).split(), canonical(text[start:]).split()
        context = ["_" if word == tokens[0] else word for word in before[-n - 3:-n]]            # no earlier place
        if (canonical(text[start:end]) == form and before[-n:] == after[:n] == tokens
                and says(context + after[:n + 1], tokens)):
            return start - 1, end - 1
        begin = first + 1
    return None


def mark(step, groups):
    """Text of a step, the key-step groups it earned → its HTML with marks, and the groups that found no words."""
    step_tokens, spans, unplaced = canonical("\n" + step[:10_000]).split(), [], []
    for group in groups:
        said = [form for form in map(canonical, group) if says(step_tokens, form.split())]
        found = filter(None, (find_span(step[:10_000], form) for form in said))
        free = [(a, b) for a, b in found if all(b <= start or end <= a for start, end, _ in spans)]
        if free:
            spans.append((*free[0], group[0]))
        else:
            unplaced.append(group)
    parts, done = [], 0
    for start, end, name in sorted(spans):
        parts += [esc(step[done:start]), f'<mark title="{esc(name)}">{esc(step[start:end])}</mark>']
        done = end
    return "".join(parts) + esc(step[done:]), unplaced


def why_invalid(text):
    """Why StepRVR is 0, in words; [] if it is 1."""
    path = split_path(text)
    order = [name for name in path.order if name != "reasoning"]
    kinds, numbers = [name.split()[0] for name in order], [name[5:] for name in order if name.startswith("step ")]
    if not order:
        return ["no section of the template"]
    reasons = []
    for kind, full in (("description", path.description), ("rationale", path.rationale), ("step", all(path.steps)),
                       ("answer", final_answer(text))):
        if kind not in kinds or not full:
            reasons.append(f"{kind} is empty" if kind in kinds else f"no {kind}")
        if kinds.count(kind) > 1 and kind != "step":
            reasons.append(f"more than one {kind}")
    if numbers != [str(i + 1) for i in range(len(numbers))]:
        reasons.append(f"steps are numbered {', '.join(numbers)}")
    return reasons + [f"{order[i + 1]} comes after {order[i]}" for i, (kind, following) in
                      enumerate(itertools.pairwise(kinds)) if RANK[following] < RANK[kind]]


def render_sections(path, group, earned):
    """The sections of a path in the order they came, as HTML; key steps are marked in the step that earned them."""
    sections, out = split_path(path["text"]), []
    steps = enumerate(sections.steps)
    for place, name in enumerate(sections.order):
        if name == "reasoning":                                # only a heading
            continue
        chips = []
        if name.startswith("step "):
            i, body = next(steps)
            shown, unplaced = mark(body, [forms for forms, s in zip(group["key_steps"], earned) if s == i])
            chips = [("yes", f"✓ {forms[0]}") for forms in unplaced]
        elif name in sections.order[place + 1:]:
            shown, chips = None, [("", "said again below: that one counts")]
        else:
            shown = esc(getattr(sections, name))
            if name == "answer":
                chips = [("yes", "✓ right") if path["right"] else ("no", f"✗ right: {group['answer']}")]
        shown = "" if shown is None else f'<span class="text">{shown}</span> '
        out.append(f"<h4>{name}</h4><div>{shown}"
                   + "".join(f'<span class="chip {kind}">{esc(chip)}</span>' for kind, chip in chips) + "</div>")
    return "".join(out)


def render_path(path, copies, group, earned, parts):
    """A card: reward and its parts, advantage, sections, what is missing. `copies` paths of the group say just this."""
    A, size, hits = path["advantage"], len(group["paths"]), sum(step is not None for step in earned)
    width = min(50, 50 * abs(A) * size ** .5 / max(1, size - 1))                # no advantage of a group is larger
    paid = f"key steps {hits}/{len(earned)}: {path['step_accuracy'] - path['right']:.2f}" if earned else "no key steps"
    chips = (("right", f"right {path['right']:.0f}"), ("keys", paid), ("valid", f"StepRVR {path['step_validity']:.0f}"))
    chips = "".join(f'<span class="chip {"" if name in parts else "off"}">{chip}</span>' for name, chip in chips)
    missed = " · ".join(esc(forms[0]) for forms, step in zip(group["key_steps"], earned) if step is None)
    notes = f"<p><b>missed</b> {missed}</p>" if missed else ""
    if hits and final_answer(path["text"]) is None:
        notes += "<p><b>StepRAR 0</b> without an answer, key steps do not count</p>"
    if not path["step_validity"]:
        notes += (f"<p><b>StepRVR 0</b> {'; '.join(why_invalid(path['text']))}</p>"
                  f"<details{' open' * (not split_path(path['text']).order)}><summary>as sampled</summary>"
                  f"<pre>{esc(path['text'])}</pre></details>")
    return (f'<article><header><b>{path["reward"]:.2f}</b>{chips}</header><div class="advantage">'
            f'{f"<small>{copies} alike</small>" if copies > 1 else ""}<span><i class="{"neg" if A < 0 else "pos"}" '
            f'style="left:{50 - width * (A < 0):.1f}%;width:{width:.1f}%"></i></span><b>{signed(A, 2)}</b></div>'
            f'<div class="sections">{render_sections(path, group, earned)}</div>{notes}</article>')


@functools.lru_cache(maxsize=2 * GROUPS)
def image_data(file):
    """Image file → (data: URI, width, height), shrunk to WIDTH. UserError if it cannot be read."""
    image, png_or_jpeg = load_image(file, 4 * WIDTH ** 2), io.BytesIO()
    image.thumbnail((WIDTH, 2 * WIDTH))
    kind = "PNG" if image.getcolors(128) else "JPEG"          # few colours: a drawing, which JPEG would smear
    image.save(png_or_jpeg, kind, quality=85)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(png_or_jpeg.getvalue()).decode()}", *image.size


def render_image(file):
    try:
        source, width, height = image_data(file)
    except UserError:
        trouble = "cannot be read" if os.path.isfile(file) else "not found"
        return f'<p class="note">image {trouble}: {esc(Path(file).name)}</p>'
    return f'<img src="{source}" width="{width}" height="{height}" alt="image of the question">'


def render_group(group, parts, is_open):
    """A question with its image and its paths, the best first; equal paths share a card."""
    paths, key_steps = sorted(group["paths"], key=lambda path: -path["reward"]), group["key_steps"]
    copies, unlike = collections.Counter(p["text"] for p in paths), {p["text"]: p for p in paths}
    earned = {text: matched_key_steps(text, key_steps) if key_steps else [] for text in unlike}
    dots = "".join(f'<i class="{"pos" if p["advantage"] > 0 else "neg" if p["advantage"] < 0 else "zero"}"></i>'
                   for p in paths)
    score = f"{sum(p['right'] for p in paths):.0f} of {len(paths)} right"
    items = "".join(f'<li title="{esc(" | ".join(forms))}">{esc(forms[0])} <small>'
                    f'{sum(earned[p["text"]][k] is not None for p in paths)} of {len(paths)}</small></li>'
                    for k, forms in enumerate(key_steps))
    cards = "".join(render_path(p, copies[text], group, earned[text], parts) for text, p in unlike.items())
    return (f'<details class="group"{" open" * is_open}><summary><b>update {group["step"]}</b><span class="dots">{dots}'
            f'</span><span class="line">{score} · {esc(group["problem"])}</span></summary><div class="question">'
            f'{"".join(map(render_image, group["images"]))}<p class="text">{esc(group["problem"])}</p>'
            f'<p>Right answer: <b>{esc(group["answer"])}</b></p>'
            + (f"<p>Key steps, and how many paths earn them:</p><ul>{items}</ul>" if items else "")
            + f'<p class="note">{esc(group["where"])}</p></div><div class="grid">{cards}</div></details>')


def gallery(groups, parts):
    """All groups, or GROUPS of them evenly, always with the first and the last; the last is open."""
    n = len(groups)
    if not n:
        return '<p class="note">No paths are logged yet.</p>'
    if n > GROUPS:
        groups = [groups[round(i * (n - 1) / (GROUPS - 1))] for i in range(GROUPS)]
    shown = f"{len(groups)} of the {n} that were logged" if n > GROUPS else "all that were logged"
    return (f'<p class="note">Questions with their sampled paths, {shown}. A dot is a path: <span class="dots"><i '
            'class="pos"></i>better than its group,</span> so made likelier; <span class="dots"><i class="neg"></i>'
            'worse,</span> made less likely; <span class="dots"><i class="zero"></i>neither.</span> The bar says how '
            "much: the advantage. <mark>Marked</mark> words are key steps, in the step that earned them.</p>"
            + "".join(render_group(group, parts, i == len(groups) - 1) for i, group in enumerate(groups)))


# ─── Page ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

def signed(value, digits):
    return f"{value:+.{digits}f}".replace("-", "−")


def progress(cfg, warmup, updates, evaluations):
    """Where the run stands → words, percent."""
    if not updates:
        done, of = (warmup[-1]["step"] if warmup else 0), max(1, cfg["warmup_steps"])
        return f"warm-up, update {done} of {of}" if done else "nothing is logged yet", min(100, 100 * done / of)
    step, seconds = updates[-1]["step"], sorted(r["seconds"] for r in updates[-50:])
    waits = {name for name in evaluations if name.replace("before", "after") not in evaluations}
    done = step >= cfg["steps"] and not waits
    words = f"finished after {step} updates" if done else f"update {step} of {cfg['steps']}"
    return f"{words}, {seconds[len(seconds) // 2]:.3g} s each", min(100, 100 * step / max(1, cfg["steps"]))


def render_evaluations(evaluations):
    """Held-out scores before and after, a table for each way to decode."""
    tables = []
    for how in dict.fromkeys(name.partition(", ")[2] for name in evaluations):
        before, after = (evaluations.get(f"{when}, {how}") for when in ("before", "after"))
        n, rows = (before or after)["questions"], ""
        for key, label in (("right", "right answers"), ("step_accuracy", "StepRAR"), ("step_validity", "StepRVR"),
                           ("k", "k")):
            gain = after[key] - before[key] if before and after else 0
            cells = "".join(f"<td>{e[key]:.3f}</td>" if e else "<td>–</td>" for e in (before, after))
            rows += (f'<tr><th>{label}</th>{cells}<td class="{"neg" if gain < 0 else "pos"}">'
                     f'{signed(gain, 3) if before and after else ""}</td></tr>')
        tables.append(f"<table><caption>{esc(how)}: {n} held-out questions, standard error of a share at most "
                      f"{.5 / max(1, n) ** .5:.3f}</caption><thead><tr><th></th><th>before</th><th>after</th>"
                      f"<th>gain</th></tr></thead><tbody>{rows}</tbody></table>")
    return f'<div class="grid">{"".join(tables)}</div>'


CSS = """
:root { color-scheme: light dark; --paper: #fcfbf8; --card: #fff; --ink: #23211e; --soft: #6b655d; --line: #e3ded5;
  --pos: #1f6fb4; --neg: #c2540f; --third: #14805e; --mark: #ffe9a3; --chip: #f1eee8; --sans: system-ui, sans-serif; }
@media (prefers-color-scheme: dark) { :root { --paper: #16171a; --card: #1d1f23; --ink: #e3e0da; --soft: #a09b92;
  --line: #33353b; --pos: #6db3ee; --neg: #f0985a; --third: #5cc29d; --mark: #5a4a12; --chip: #2a2c31; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 2.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 17px/1.55 Charter, "Bitstream Charter", "Iowan Old Style", "Palatino Linotype", Georgia, serif;
  overflow-wrap: anywhere; font-variant-numeric: tabular-nums lining-nums; -webkit-text-size-adjust: 100%; }
h1 { font-size: 2.1rem; line-height: 1.15; font-weight: 600; margin: 0 0 .3rem; }
h2 { font-size: 1.3rem; font-weight: 600; margin: 2.4rem 0 .4rem; padding-top: .8rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 0; } p { margin: .3rem 0; } figure { margin: 0; } summary { cursor: pointer; }
.note, .all, footer, figcaption, caption { color: var(--soft); font-size: .87rem; line-height: 1.45; }
.note { max-width: 44rem; margin-bottom: 1rem; } .note mark { color: var(--ink); }
.done { height: 4px; margin: .9rem 0 2rem; border-radius: 2px; background: var(--line); }
.done i { display: block; height: 100%; border-radius: 2px; background: var(--pos); }
.grid { display: grid; gap: 1.3rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr));
  align-items: start; padding-bottom: 1.3rem; }
table { border-collapse: collapse; width: 100%; } caption { text-align: left; padding-bottom: .4rem; }
th, td { text-align: right; font-weight: 400; padding: .18rem .2rem; border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; } thead th { color: var(--soft); font-size: .87rem; }
tbody tr:first-child > * { font-weight: 600; } .pos { color: var(--pos); } .neg { color: var(--neg); }
svg { display: block; width: 100%; margin: .3rem 0; overflow: visible; }
svg text { fill: var(--soft); font: 10px var(--sans); } svg path { stroke: var(--line); } circle { fill: currentColor; }
polyline { fill: none; stroke: currentColor; stroke-width: 1.7; } polyline.raw { stroke-width: 1; opacity: .3; }
.s0 { color: var(--pos); } .s1 { color: var(--neg); } .s2 { color: var(--third); }
.legend { margin: 0; font: .78rem/1.5 var(--sans); } .legend span { margin-right: .8rem; white-space: nowrap; }
.legend i { display: inline-block; width: .7em; height: 2px; background: currentColor; margin: 0 .35em .25em 0; }
.group { border-top: 1px solid var(--line); } .group:last-of-type { border-bottom: 1px solid var(--line); }
.group > summary { display: flex; flex-wrap: wrap; gap: .1rem .8rem; align-items: baseline; padding: .5rem 0; }
.group > summary::before { content: "›"; color: var(--soft); } .group[open] > summary::before { rotate: 90deg; }
.group > summary b { min-width: 6.4rem; font-weight: 600; }
.line { flex: 1 1 16rem; min-width: 0; color: var(--soft); font-size: .92rem; overflow: hidden; white-space: nowrap;
  text-overflow: ellipsis; }
.dots i { display: inline-block; width: .6rem; height: .6rem; border-radius: 50%; margin-right: .25rem; }
i.pos { background: var(--pos); } i.neg { background: var(--neg); } i.zero { background: var(--soft); }
.question { margin: .6rem 0 1.2rem; max-width: 44rem; } small { color: var(--soft); }
.question ul { margin: .2rem 0; padding-left: 1.2rem; }
img { display: block; max-width: 100%; height: auto; margin-bottom: .6rem; border-radius: 3px; }
article { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .8rem .9rem; }
header { display: flex; flex-wrap: wrap; gap: .3rem; align-items: center; }
header b:first-child { font-size: 1.15rem; margin-right: .2rem; }
.chip { display: inline-block; font: .72rem/1.5 var(--sans); padding: .05rem .45rem; border-radius: 1rem;
  background: var(--chip); }
.off { opacity: .5; text-decoration: line-through; } .yes { color: var(--pos); } .no { color: var(--neg); }
.advantage { display: flex; gap: .6rem; align-items: center; margin: .5rem 0 .7rem; font: .8rem var(--sans); }
.advantage span { position: relative; flex: 1; height: 8px; border-radius: 4px; background: linear-gradient(90deg,
  var(--chip) calc(50% - 1px), var(--soft) calc(50% - 1px) calc(50% + 1px), var(--chip) calc(50% + 1px)); }
.advantage i { position: absolute; height: 100%; }
.sections { display: grid; grid-template-columns: auto minmax(0, 1fr); gap: .3rem .8rem; font-size: .93rem;
  line-height: 1.45; }
h4 { margin: 0; font: .72rem/1.9 var(--sans); color: var(--soft); }
.text, pre { white-space: pre-wrap; }
.text:empty::before { content: "empty"; color: var(--soft); font-style: italic; }
mark { background: var(--mark); color: inherit; border-radius: 2px; padding: 0 .12em; }
article > p, article > details { margin: .5rem 0 0; font-size: .85rem; line-height: 1.4; color: var(--soft); }
article > p b { color: var(--ink); font: 600 .74rem var(--sans); margin-right: .3em; } pre { margin: .3rem 0 0; }
"""


def render(folder):
    """Run folder → the page, as text."""
    cfg, warmup, updates, evaluations, groups = read_run(folder)
    words, percent = progress(cfg, warmup, updates, evaluations)
    name, again = esc(folder.resolve().name), esc(shlex.quote(str(folder)))
    line = (f"{cfg['model']} on {cfg['data']} · reward: {cfg['reward']} · {cfg['questions']} questions × "
            f"{cfg['group_size']} paths · temperature {cfg['temperature']:g} · β {cfg['beta']:g} · "
            f"learning rate {cfg['lr']:g} · seed {cfg['seed']}")
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name} – StepGRPO</title><style>{CSS}</style></head><body>
<h1>{name}</h1><p>{esc(line)}</p><details class="all"><summary>all settings</summary>
<p>{esc(" · ".join(f"{key} = {value}" for key, value in cfg.items()))}</p></details>
<p><b>{words}</b></p><div class="done"><i style="width:{percent:.1f}%"></i></div>{render_evaluations(evaluations)}
<h2>Curves</h2><p class="note">Pale: single updates, or means of neighbours where there are more than {POINTS}. Dark: a
moving average; the number is where it ends.</p>{curves(cfg, warmup, updates)}
<h2>Paths</h2>{gallery(groups, PARTS[cfg['reward']])}
<footer>Written {time.strftime('%Y-%m-%d %H:%M')} from the logs of the run. Again: <code>python data/report.py
{again}</code></footer></body></html>
"""


def write_report(folder):
    """Writes report.html into a run folder → its path. Whoever reads it, at whatever moment, finds a whole page.

    UserError if the folder is no run, or if a line of its logs, other than a torn last one, is malformed.
    """
    folder = Path(folder)
    new, page = folder / "report.html.new", folder / "report.html"
    new.write_text(render(folder), encoding="utf-8", errors="replace")
    os.replace(new, page)
    return page


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python data/report.py runs/NAME")
    try:
        print(write_report(sys.argv[1]))
    except UserError as e:
        sys.exit(f"report: {e}")

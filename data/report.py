# SPDX-License-Identifier: MIT
"""Makes report.html of a run: its curves, and completions with what each of them earned and why.

    python data/report.py runs/tiny    # at any time, also while the run goes on

The page is made from config.json, metrics.jsonl and samples.jsonl. It has no scripts, and needs
neither the network nor the run folder. Text of model and data becomes HTML only through `esc`.
"""
import io
import json
import math
import re
import sys
import time
from base64 import b64encode
from html import escape as esc
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from stepgrpo import Config, UserError, earned_key_steps, final_answer, load_image, split_sections

POINTS, GROUPS = 200, 24  # at most: points of a curve, groups on the page
# Scores and their short names.
SCORES = {"right": "right", "step_accuracy": "StepRAR", "step_validity": "StepRVR", "k": "k"}

# ─── Logs ─────────────────────────────────────────────────────────────────────────────────────────

def read_log(file):
    """Records of a .jsonl file; none without a file. UserError names a line that is no record. What
    stands behind the last newline was torn by a kill, and is left out."""
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            yield dict(json.loads(line))
        except (ValueError, TypeError) as e:
            raise UserError(f"{file} line {number} is no record: {e}") from None

def read_run(folder):
    """Run folder → settings, records of warm-up, StepGRPO and evaluation, groups."""
    try:
        cfg = Config(**json.loads((folder / "config.json").read_bytes()))
    except (OSError, ValueError, TypeError) as e:
        raise UserError(f"{folder} is no run of this version: {e}") from None
    phases = {"warm-up": [], "StepGRPO": [], "evaluation": []}
    for record in read_log(folder / "metrics.jsonl"):
        phases[record["phase"]].append(record)
    return cfg, *phases.values(), list(read_log(folder / "samples.jsonl"))

def tag(kind, *inside):
    """tag("p class=note", "text") → '<p class=note>text</p>'. What is inside is HTML already."""
    return f"<{kind}>{''.join(inside)}</{kind.split()[0]}>"

def chip(text, kind=""):
    """A small round label. kind: a CSS class."""
    return " " + tag(f"small class='{kind}'", esc(text))

def coloured(value, text):
    """Blue if a gain or an advantage is above 0, orange if it is below. Minus signs are real."""
    kind = "pos" if value > 0 else "neg" if value < 0 else ""
    return tag(f"span class='{kind}'", text.replace("-", "−"))

# ─── Evaluations and curves ───────────────────────────────────────────────────────────────────────

def render_evaluations(evaluations):
    """Held-out scores before and after StepGRPO, for each way to decode."""
    by_name = {record["name"]: record for record in evaluations}
    n = evaluations[0]["questions"]
    rows = f"<tr><th>{n} questions, standard error ≤ {0.5 / n ** 0.5:.3f}<th>"
    rows += "<th>".join(SCORES.values())
    for name in sorted(by_name, key=lambda name: name.partition(", ")[2]):
        after, before = by_name[name], by_name.get(name.replace("after", "before"))
        scores = "<td>".join(f"{after[key]:.3f}" for key in SCORES)
        rows += f"<tr><th>{esc(name)}<td>{scores}"
        if before not in (None, after):
            gains = (after[key] - before[key] for key in SCORES)
            gains = "<td>".join(coloured(gain, f"{gain:+.3f}") for gain in gains)
            rows += f"<tr><th>gain<td>{gains}"
    return tag("table", rows)

def thinned(points):
    """(x, y) in any number → xs, ys, averages over a tenth of the curve: at most POINTS of each."""
    size = math.ceil(len(points) / POINTS)
    parts = [points[i:i + size] for i in range(0, len(points), size)]
    xs, ys = zip(*[map(fmean, zip(*part)) for part in parts])
    side = len(ys) // 20
    means = (fmean(ys[max(0, i - side):i + side + 1]) for i in range(len(ys)))
    return xs, ys, tuple(means)

def curve(title, caption, records, names, top=None, log=False):
    """A small figure, '' without data. The y axis begins at 0 and ends at `top`, or where the
    averages show well. On a log axis y is an exponent of ten."""
    lines, legend, svg = {}, "", ""
    for name in names:
        points = [(r["step"], math.log10(r[name] + 1e-9) if log else r[name])
                  for r in records if math.isfinite(r[name])]
        if points:
            lines[SCORES.get(name, name)] = thinned(points)
    if not lines:
        return ""
    xs, ys, means = (sum(columns, ()) for columns in zip(*lines.values()))
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)
    if not log:
        low, high = 0, top or min(high, 1.5 * max(means))
    height, width = high - low or 1, right - left or 1

    # From here on in a view box of 320 × 142, with room for the numbers at its left and below.
    def at(x, y):
        y = min(y, high)
        return f"{36 + 276 * (x - left) / width:.1f},{124 - 114 * (y - low) / height:.1f}"

    def polyline(kind, xs, ys):
        return tag(f"polyline class={kind} points='{' '.join(map(at, xs, ys))}'")

    for share in (0, 0.5, 1):
        x, y = left + share * width, low + share * height
        svg += polyline("line", (left, right), (y, y))
        number = 10 ** y if log else y
        svg += tag(f"text class=x transform=translate({at(x, low)})", f"{x:.0f}")
        svg += tag(f"text class=y transform=translate({at(left, y)})", f"{number:.3g}")
    for kind, (name, (xs, ys, means)) in zip(("pos", "neg", "ink"), lines.items()):
        svg += tag(f"g class={kind}", polyline("raw", xs, ys), polyline("mean", xs, means))
        legend += chip(f"{name} {10 ** means[-1] if log else means[-1]:.3g}", kind)
        if max(ys) > high:
            legend += chip(f"highest {max(ys):.3g}")
    return tag("figure", tag("b", title), legend, tag("svg viewBox='0 0 320 142'", svg),
               tag("p class=note", caption))

def render_curves(cfg, warmup, updates):
    """The figures of a run, each with a sentence on how to read it."""
    return tag(
        "section",
        curve("Reward", "Means over an update. StepRAR pays 1 for the right answer and "
              f"{cfg.alpha:g} for all key steps, StepRVR 1 for complete sections in order.",
              updates, ["reward", "step_accuracy", "step_validity"], 2 + cfg.alpha),
        curve("Answers and key steps", "Share of right answers, and mean share k of stated "
              "key steps.", updates, ["right", "k"], 1),
        curve("KL to the reference", "From the end of the warm-up, per token. It is "
              "estimated, so it jumps. A slow climb is learning.",
              updates if cfg.beta else [], ["kl"]),
        curve("Length", f"Mean tokens of a completion, at most {cfg.max_new_tokens}. A drift "
              "to the limit or to nothing is bad.", updates, ["length"]),
        curve("Flat groups", f"Of {cfg.questions} groups, those whose completions all earn "
              "the same. They teach nothing.", updates, ["flat_groups"], cfg.questions),
        curve("Warm-up loss", "Nats per token of the reference paths, on a log axis.",
              warmup, ["loss"], log=True))

# ─── Completions ──────────────────────────────────────────────────────────────────────────────────

PIECE = re.compile(r"\d+(?:[.,]\d+)*|\\[a-zA-Z]+|\w+|\S")  # is never cut in two by a mark

def find_span(step, forms):
    """Where a step first states one of the forms, judged by the reward's own matching: the shortest
    (start, end), or None. The next five pieces must not undo it, as '/ 2' undoes '7 - 3 = 4'."""
    def states(text):
        return earned_key_steps(f"### Step 1: {text}", [forms]) == [0]
    # Not more than 150: a step that rambles costs bounded time.
    pieces = [piece.span() for piece in PIECE.finditer(step)][:150]
    for i, (_, end) in enumerate(pieces):
        if all(states(step[:later]) for _, later in pieces[i:i + 6]):
            return next((start, end) for start, _ in pieces[i::-1] if states(step[start:end]))
    return None

def mark(step, groups):
    """Text of a step, the key-step groups it earned → HTML. A group without own words is a chip."""
    spans, chips, shown, done = [], "", "", 0
    for forms in groups:
        span = find_span(step, forms)
        if span and all(span[1] <= start or end <= span[0] for start, end in spans):
            spans.append(span)
        else:
            chips += chip(f"✓ {forms[0]}", "pos")
    for start, end in sorted(spans):
        shown += esc(step[done:start]) + tag("mark", esc(step[start:end]))
        done = end
    return tag("span class=text", shown, esc(step[done:])) + chips

def render_sections(completion, group):
    """The sections in the order they came; key steps are marked in the step that earned them."""
    sections, rows, i = split_sections(completion["text"]), "", 0
    for place, name in enumerate(sections.order):
        if name.startswith("step "):
            keys = zip(group["key_steps"], completion["earned"])
            shown = mark(sections.steps[i], [forms for forms, by in keys if by == i])
            i += 1
        elif name in sections.order[place + 1:]:
            shown = chip("said again below")
        else:
            shown = mark(getattr(sections, name), [])
        if name == "answer":
            right = completion["right"]
            shown += chip("✓ right", "pos") if right else chip(f"✗ right: {group['answer']}", "neg")
        rows += tag("dt", name) + tag("dd", shown)
    return tag("dl", rows)

def render_notes(completion, missed):
    """What a completion lacks, and its bare text if StepRVR is 0."""
    text, notes = completion["text"], []
    if missed:
        notes.append("missed: " + esc(" · ".join(missed)))
    if final_answer(text) is None:
        notes.append("StepRAR 0: no answer, so key steps do not count")
    if not completion["step_validity"]:
        order = ", ".join(split_sections(text).order) or "no section"
        notes.append("StepRVR 0: it pays for description, rationale, steps 1, 2 …, answer, none "
                     f"empty. Here: {order}")
        notes += [tag("details", "<summary>as sampled</summary>", tag("p class=text", esc(text)))]
    return "".join(tag("div class=note", note) for note in notes)

def render_completion(completion, copies, group):
    """A card: reward and its parts, advantage, sections, what is missing."""
    keys = list(zip(group["key_steps"], completion["earned"]))
    missed = [forms[0] for forms, by in keys if by is None]
    right, A = completion["right"], completion["advantage"]
    head = tag("b", f"{completion['reward']:.2f}") + chip(f"right {right:.0f}")
    head += chip(f"key steps {len(keys) - len(missed)}/{len(keys)}: "
                 f"{completion['step_accuracy'] - right:.2f}")
    head += chip(f"StepRVR {completion['step_validity']:.0f}")
    head += chip(f"{copies} alike") * (copies > 1)
    bar = "▬" * round(6 * abs(A)) + f" {A:+.2f}"
    return tag("article", head, tag("div", "advantage ", coloured(A, bar)),
               render_sections(completion, group), render_notes(completion, missed))

def render_image(file):
    """Image file → a tag that holds its pixels, shrunk. An image that cannot be read is named."""
    try:
        image = load_image(file)
    except UserError as e:
        return tag("p class=note", esc(str(e)))
    image.thumbnail((480, 960))
    data = io.BytesIO()
    image.save(data, "WEBP", quality=90)
    return f"<img alt=image src=data:image/webp;base64,{b64encode(data.getvalue()).decode()}>"

def render_group(group, is_open):
    """A question and its completions, the best first; equal ones share a card."""
    completions = sorted(group["completions"], key=lambda c: -c["reward"])
    keys, G, items, cards = group["key_steps"], len(completions), "", {}
    texts = [c["text"] for c in completions]
    for c in completions:
        c["earned"] = keys and earned_key_steps(c["text"], keys, group["reference"])
        if c["text"] not in cards:
            cards[c["text"]] = render_completion(c, texts.count(c["text"]), group)
    for i, forms in enumerate(keys):
        earners = sum(c["earned"][i] is not None for c in completions)
        items += tag("li", f"{esc(' | '.join(forms))} – {earners} of {G}")
    dots = "".join(coloured(c["advantage"], "●") for c in completions)
    right, problem = sum(c["right"] for c in completions), esc(group["problem"])
    return tag(
        f"details {'open' * is_open}",
        tag("summary", f"update {group['step']} {dots} ",
            tag("span class=note", f"{right:.0f} of {G} right · {problem}")),
        *map(render_image, group["images"]), tag("p class=text", problem),
        tag("p", "Right answer: ", esc(group["answer"])),
        f"{len(keys)} key steps, and how many completions earn them:", tag("ul", items),
        tag("p class=note", esc(group["where"])), tag("section", *cards.values()))

def render_groups(groups):
    """All groups, or GROUPS of them evenly, with the first and the last; the last is open."""
    n, shown = len(groups), groups
    if n > GROUPS:
        shown = [groups[round(i * (n - 1) / (GROUPS - 1))] for i in range(GROUPS)]
    note = (f"{len(shown)} of {n} logged groups: of an update, the one whose rewards differ "
            f"most. A dot is a completion: {coloured(1, '●')} better than its group, so made "
            f"likelier, {coloured(-1, '●')} worse. <mark>Marked</mark> words are key steps, "
            "in the step that earned them.")
    cards = [render_group(group, group is groups[-1]) for group in shown]
    return tag("p class=note", note) + "".join(cards)

# ─── Page ─────────────────────────────────────────────────────────────────────────────────────────

# By light-dark() the page follows the reader's system. #8884 is a grey that shines through.
CSS = """
:root { color-scheme: light dark; }
body { max-width: 70rem; margin: auto; padding: 1rem; overflow-wrap: anywhere;
  background: light-dark(#fcfbf8, #16171a); font: 17px/1.5 Georgia, serif; }
small, dt, svg { font: 12px/1.6 system-ui; }
p, dl, dd, figure { margin: .3rem 0; }
.note, dt { opacity: .7; font-size: .85rem; }
.pos { color: light-dark(#1f6fb4, #6db3ee); }
.neg { color: light-dark(#c2540f, #f0985a); }
section { display: grid; gap: 1.3rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); }
td, th { font-weight: 400; text-align: right; padding: 0 .3rem; overflow-wrap: normal; }
th:first-child { text-align: left; } mark { background: #fd58; color: inherit; }
svg { overflow: visible; text-anchor: middle; fill: currentColor; }
.x { translate: 0 14px; } .y { translate: -5px 3px; text-anchor: end; }
polyline { fill: none; stroke: currentColor; stroke-width: 1.7; }
.raw { opacity: .3; } .line { opacity: .1; }
img { max-width: 100%; }
details, article { padding: .5rem; border: 1px solid #8884; }
small { display: inline-block; padding: 0 .4rem; border-radius: 1rem; background: #8882; }
dl { display: grid; grid-template-columns: auto 1fr; gap: 0 .8rem; align-items: baseline; }
.text { white-space: pre-wrap; } .text:empty::before { content: "(empty)"; }
"""

def render(folder):
    """Run folder → the page, as text."""
    cfg, warmup, updates, evaluations, groups = read_run(folder)
    name = esc(folder.resolve().name)
    settings = " · ".join(f"{key} = {value}" for key, value in vars(cfg).items())
    speed = [r["seconds"] for r in updates[-50:]]
    speed = f", {fmean(speed):.3g} s each" if speed else ""
    return f"""<!DOCTYPE html>
<html lang=en><meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<title>{name} – StepGRPO</title><style>{CSS}</style>
<h1>{name}</h1><p class=note>{esc(settings)}</p>
<b>warm-up {len(warmup)}/{cfg.warmup_steps}, StepGRPO {len(updates)}/{cfg.steps}{speed}</b>
{render_evaluations(evaluations) if evaluations else ""}
<h2>Curves</h2><p class=note>Pale: updates, or means of neighbours if there are more
than {POINTS}. Dark: a moving average; the number is its end.</p>
{render_curves(cfg, warmup, updates)}
<h2>Completions</h2> {render_groups(groups)}
<p class=note>Written {time.ctime()}.</p>
"""

def print_evaluations(folder):
    """The held-out scores of a run, as a table on the screen."""
    records = read_run(folder)[3]
    print(f"\n{'held-out questions':34}" + "".join(map("{:>9}".format, SCORES.values())))
    for record in records:
        scores = "".join(f"{record[key]:9.3f}" for key in SCORES)
        print(f"{record['name']:34}{scores}")

def write_report(folder):
    """Writes report.html into a run folder → its path. A crash leaves the old page, and whole."""
    new = Path(folder, "report.html.new")
    new.write_text(render(new.parent), encoding="utf-8", errors="replace")
    return new.replace(new.with_suffix(""))

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python data/report.py runs/NAME")
    try:
        print_evaluations(Path(sys.argv[1]))
        print(f"\nlook at {write_report(sys.argv[1])}")
    except (UserError, OSError) as e:
        sys.exit(f"report: {e}")

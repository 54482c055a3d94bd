# SPDX-License-Identifier: MIT
"""Draws the embedded data set: coloured objects and small bar charts, with questions, reference paths and key steps.

    python data/shapes.py                       # writes data/shapes/, the same files every time
    python data/shapes.py --out DIR --train 100 --test 50 --warmup 200 --seed 7

What it writes, in the two formats that real data comes in, so that nothing downstream knows it is a toy:

    train.json    questions for StepGRPO, R1-VL-10K format: problem, solution, image_path, key_steps
    test.json     held-out questions, same format; no scene (image and question) of it occurs in the other two
    warmup.json   demonstrations for the warm-up, Mulberry's ShareGPT format: messages, images
    images/       one PNG per scene; a 28-pixel cell holds one object and is one image token of Qwen2-VL

The demonstrations are imperfect on purpose, as real chain-of-thought data is: a share of them (`SLIPS`) holds
one slip. So imitation has a ceiling, and reinforcement can show what it is for. Solutions and key steps in
train.json and test.json are always right.
"""
import argparse
import json
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

CELL = 28                       # pixels: patch size 14 x merge size 2 of Qwen2-VL
# From one object, or bar, to the next. A description that spends as many tokens on each object as the image has cells
# between two of them ("red 1/2" are five) lets a small model read along at a constant M-RoPE offset: it learns to see
# in a minute or two. Objects packed closely it did not see in that time.
OBJECT_PITCH, BAR_PITCH = 5 * CELL, 3 * CELL
OBJECTS = 6                     # largest number of objects in a row
BARS, UNITS = 3, 4              # bars of a chart, largest number of units in a bar
COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (50, 90, 220), "yellow": (240, 200, 40)}
SHAPES = ("circle", "square", "triangle")
BACKGROUND = (122, 116, 104)    # CLIP's mean, which the processor maps to 0: only objects give a signal
FONT = ImageFont.load_default_imagefont()       # a bitmap that comes with Pillow: the same on every machine

# Which slips the demonstrations of each kind of question hold, as (slip, share). What is left is right.
# In "taller" the wrong results are the majority: there even greedy decoding imitates the mistake.
SLIPS = {
    "colour": (("miscount", .20), ("subtrahend", .15), ("no rationale", .10), ("order", .10)),
    "shape":  (("miscount", .20), ("subtrahend", .15), ("no rationale", .10), ("order", .10)),
    "sum":    (("result", .30), ("no rationale", .15), ("order", .10)),
    "taller": (("result", .60), ("no rationale", .05), ("order", .05)),
}


def draw_objects(objects):
    """List of (colour, shape) → RGB image of one row of objects, always as wide as `OBJECTS` of them."""
    image = Image.new("RGB", ((OBJECTS - 1) * OBJECT_PITCH + CELL, CELL), BACKGROUND)
    pen = ImageDraw.Draw(image)
    for i, (colour, shape) in enumerate(objects):
        left, top, right, bottom = box = (i * OBJECT_PITCH + 2, 2, i * OBJECT_PITCH + CELL - 3, CELL - 3)
        if shape == "circle":
            pen.ellipse(box, fill=COLOURS[colour])
        elif shape == "square":
            pen.rectangle(box, fill=COLOURS[colour])
        else:
            pen.polygon([(left, bottom), (right, bottom), ((left + right) / 2, top)], fill=COLOURS[colour])
    return image


def draw_bars(bars):
    """List of (colour, height) → RGB image of a bar chart: one cell per unit, the height written in the bar's foot."""
    image = Image.new("RGB", ((BARS - 1) * BAR_PITCH + CELL, UNITS * CELL), BACKGROUND)
    pen = ImageDraw.Draw(image)
    for i, (colour, height) in enumerate(bars):
        left = i * BAR_PITCH
        for unit in range(height):
            top = (UNITS - 1 - unit) * CELL
            pen.rectangle((left + 2, top + 1, left + CELL - 3, top + CELL - 2), fill=COLOURS[colour])
        pen.text((left + 11, UNITS * CELL - 20), str(height), fill="black", font=FONT)
    return image


def plural(number, noun):
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def write_path(description, rationale, steps, answer):
    """The sections of a reasoning path, in the template's wording (METHOD: Image Description … final answer)."""
    lines = ["### Image Description:", description]
    if rationale:
        lines += ["### Rationales:", rationale]
    lines.append("### Let's think step by step.")
    for number, text in steps:
        lines += [f"### Step {number}:", text]
    return "\n".join(lines + ["### The final answer is:", str(answer)])


class ObjectScene:
    """A row of objects; asks how many are left without those of one colour, or of one shape."""

    def __init__(self, rng):
        self.kind = rng.choice(("colour", "shape"))
        words = list(COLOURS) if self.kind == "colour" else SHAPES
        self.words = [rng.choice(words) for _ in range(rng.randint(3, OBJECTS))]     # what tells the objects apart
        other = rng.choice(SHAPES if self.kind == "colour" else list(COLOURS))  # what they have in common
        self.word = rng.choice(self.words)
        self.total, self.removed = len(self.words), self.words.count(self.word)
        self.thing = f"{self.word} thing" if self.kind == "colour" else self.word
        self.problem = f"Subtract all {self.thing}s. How many objects are left?"
        self.image = draw_objects([(word, other) if self.kind == "colour" else (other, word) for word in self.words])

    def path(self, slip=None, rng=None):
        total, removed = self.total, self.removed
        if slip == "miscount":
            total += rng.choice((-1, 1))
        if slip == "subtrahend":
            removed += 1 if removed == 1 else rng.choice((-1, 1))
        counted = [f"{word} {self.words[:i].count(self.word)}/{i}" for i, word in enumerate(self.words, 1)]
        description = f"From the left, counting {self.thing}s: {' '.join(counted)}."
        rationale = f"Count all objects, count the {self.thing}s, then subtract."
        steps = [f"There are {plural(total, 'object')}.",
                 f"Of them {plural(removed, self.thing)}.",
                 f"{total} - {removed} = {total - removed}"]
        return description, rationale, steps, total - removed

    def key_steps(self):
        n, m, left = self.total, self.removed, self.total - self.removed
        return [[plural(n, "object"), f"total of {n}", f"total is {n}"],
                [plural(m, self.thing), f"{m} are {self.word}"],
                [f"{n} - {m} = {left}", f"{n} minus {m} is {left}"]]


class BarScene:
    """A bar chart; asks for the sum of two bars, or for their difference."""

    def __init__(self, rng):
        self.bars = [(colour, rng.randint(1, UNITS)) for colour in rng.sample(list(COLOURS), BARS)]
        places = zip(("left", "middle", "right"), self.bars)
        # Of each of the two bars: its place, colour and height.
        self.a, self.b = ((place, *bar) for place, bar in rng.sample(list(places), 2))
        self.kind = "sum" if self.a[2] == self.b[2] else rng.choice(("sum", "taller"))
        if self.kind == "taller" and self.a[2] < self.b[2]:
            self.a, self.b = self.b, self.a
        if self.kind == "sum":
            self.problem = f"How many units do the {self.a[0]} bar and the {self.b[0]} bar have together?"
        else:
            self.problem = f"How many units is the {self.a[0]} bar taller than the {self.b[0]} bar?"
        self.image = draw_bars(self.bars)

    def path(self, slip=None, rng=None):
        (a, _, x), (b, _, y) = self.a, self.b
        sign, answer = ("+", x + y) if self.kind == "sum" else ("-", x - y)
        if slip == "result":
            answer += 1                        # counts the fence posts and not the fence, always to the same side
        description = f"From the left: {' '.join(f'{colour} {height}' for colour, height in self.bars)}."
        rationale = f"Read the {a} bar and the {b} bar, then {'add' if self.kind == 'sum' else 'subtract'}."
        steps = [*(f"The {place} bar is {colour} {height}." for place, colour, height in (self.a, self.b)),
                 f"{x} {sign} {y} = {answer}"]
        return description, rationale, steps, answer

    def key_steps(self):
        x, y = self.a[2], self.b[2]
        sign, word, answer = ("+", "plus", x + y) if self.kind == "sum" else ("-", "minus", x - y)
        return [*([f"{place} bar is {colour} {height}", f"{place} bar is {height}", f"{place} bar has {height}"]
                  for place, colour, height in (self.a, self.b)),
                [f"{x} {sign} {y} = {answer}", f"{x} {word} {y} is {answer}"]]


def reference_path(scene, slip=None, rng=None):
    """The path of a scene; with a slip, the demonstration that makes this mistake."""
    description, rationale, steps, answer = scene.path(slip, rng)
    numbered = list(enumerate(steps, 1))
    if slip == "order":
        numbered = [numbered[1], numbered[0], *numbered[2:]]
    return write_path(description, "" if slip == "no rationale" else rationale, numbered, answer)


def draw_slip(kind, rng):
    draw = rng.random()
    for slip, share in SLIPS[kind]:
        draw -= share
        if draw < 0:
            return slip
    return None


def make_shapes(out, train, warmup, test, seed):
    """Writes the three files and the images into folder `out`. No held-out image occurs a second time anywhere."""
    rng, held_out = random.Random(seed), set()
    (out / "images").mkdir(parents=True, exist_ok=True)

    def new_scene(name):
        while True:
            scene = (ObjectScene if rng.random() < .5 else BarScene)(rng)
            identity = (scene.image.size, scene.image.tobytes())
            if identity not in held_out:
                if name.startswith("test"):                    # drawn first, so that the others can avoid them
                    held_out.add(identity)
                scene.image.save(out / "images" / name)
                return scene

    for split, number in (("test", test), ("train", train)):
        rows = []
        for i in range(number):
            name = f"{split}_{i:05d}.png"
            scene = new_scene(name)
            rows.append({"problem": scene.problem, "solution": reference_path(scene), "image_path": f"images/{name}",
                         "key_steps": {"Steps": scene.key_steps()}})
        (out / f"{split}.json").write_text(json.dumps(rows, indent=1))
    rows = []
    for i in range(warmup):
        name = f"warmup_{i:05d}.png"
        scene = new_scene(name)
        path = reference_path(scene, draw_slip(scene.kind, rng), rng)
        rows.append({"messages": [{"role": "user", "content": "<image>" + scene.problem},
                                  {"role": "assistant", "content": path}], "images": f"images/{name}"})
    (out / "warmup.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "shapes")
    parser.add_argument("--train", type=int, default=2000)
    parser.add_argument("--warmup", type=int, default=12000)
    parser.add_argument("--test", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make_shapes(args.out, args.train, args.warmup, args.test, args.seed)
    print(f"{args.train} training questions, {args.warmup} demonstrations, {args.test} held-out questions → {args.out}")

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

CELL = 28                       # pixels; patch size 14 x merge size 2 of Qwen2-VL
COLUMNS = 3                     # objects in a row
BARS, UNITS = 3, 4              # bars of a chart, largest number of units in a bar
COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (50, 90, 220), "yellow": (240, 200, 40)}
BACKGROUND = (122, 116, 104)         # what CLIP's normalisation, and so Qwen2-VL's, maps to 0: only objects give a signal
SHAPES = ("circle", "square", "triangle")
FONT = ImageFont.load_default_imagefont()       # a bitmap that comes with Pillow: the same on every machine

# Which slips the demonstrations of each kind of question hold, as (slip, share). What is left is right.
# In "taller" the wrong ones are the majority: there even greedy decoding imitates the mistake.
SLIPS = {
    "colour": (("miscount", .20), ("subtrahend", .15), ("no rationale", .10), ("order", .10)),
    "shape":  (("miscount", .20), ("subtrahend", .15), ("no rationale", .10), ("order", .10)),
    "sum":    (("result", .30), ("no rationale", .15), ("order", .10)),
    "taller": (("result", .60), ("no rationale", .05), ("order", .05)),
}


def draw_objects(objects):
    """List of (colour, shape) → RGB image, filled row by row; each cell holds the object's number and the object."""
    rows = -(-len(objects) // COLUMNS)
    image = Image.new("RGB", (COLUMNS * CELL, rows * CELL), BACKGROUND)
    pen = ImageDraw.Draw(image)
    for i, (colour, shape) in enumerate(objects):
        x, y = i % COLUMNS * CELL, i // COLUMNS * CELL
        pen.text((x + 1, y), str(i + 1), fill="white", font=FONT)
        box = (x + 8, y + 8, x + CELL - 3, y + CELL - 3)
        if shape == "circle":
            pen.ellipse(box, fill=COLOURS[colour])
        elif shape == "square":
            pen.rectangle(box, fill=COLOURS[colour])
        else:
            pen.polygon([(box[0], box[3]), (box[2], box[3]), ((box[0] + box[2]) / 2, box[1])], fill=COLOURS[colour])
    return image


def draw_bars(bars):
    """List of (colour, height) → RGB image of a bar chart, one cell per unit, bars standing on the lower edge."""
    image = Image.new("RGB", (BARS * CELL, UNITS * CELL), BACKGROUND)
    pen = ImageDraw.Draw(image)
    for column, (colour, height) in enumerate(bars):
        for unit in range(height):
            x, y = column * CELL, (UNITS - 1 - unit) * CELL
            pen.rectangle((x + 4, y + 1, x + CELL - 5, y + CELL - 2), fill=COLOURS[colour])
        pen.text((column * CELL + 11, UNITS * CELL - 20), str(height), fill="black", font=FONT)     # in its foot
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
    """Coloured objects; asks how many are left without those of one colour, or of one shape."""

    def __init__(self, rng):
        self.kind = rng.choice(("colour", "shape"))
        words = list(COLOURS) if self.kind == "colour" else SHAPES
        self.words = [rng.choice(words) for _ in range(rng.randint(3, 6))]     # what tells the objects apart
        other = rng.choice(SHAPES if self.kind == "colour" else list(COLOURS))  # what they have in common
        self.word = rng.choice(self.words)
        self.total, self.removed = len(self.words), self.words.count(self.word)
        things = f"{self.word} things" if self.kind == "colour" else f"{self.word}s"
        self.problem = f"Subtract all {things}. How many objects are left?"
        self.things = things
        self.image = draw_objects([(word, other) if self.kind == "colour" else (other, word) for word in self.words])

    def path(self, slip=None, rng=None):
        total = self.total + (rng.choice((-1, 1)) if slip == "miscount" else 0)
        removed = self.removed
        if slip == "subtrahend":
            removed += 1 if removed == 1 else rng.choice((-1, 1))
        tally = [f"{i} {word} {self.words[:i].count(self.word)}" for i, word in enumerate(self.words, 1)]
        description = f"The objects, with a tally of the {self.things}: {', '.join(tally)}."
        rationale = f"Count all objects, count the {self.things}, then subtract."
        steps = [f"{plural(total, 'object')} in all.",
                 f"{plural(removed, self.things[:-1])} to subtract.",
                 f"{total} - {removed} = {total - removed}"]
        return description, rationale, steps, total - removed

    def key_steps(self):
        n, m, left = self.total, self.removed, self.total - self.removed
        noun = self.things[:-1]
        return [[plural(n, "object"), f"total of {n}", f"total is {n}"],
                [plural(m, noun), f"{m} are {self.word}" if self.kind == "colour" else f"{m} are {self.things}"],
                [f"{n} - {m} = {left}", f"{n} minus {m} is {left}"]]


class BarScene:
    """A bar chart of three bars; asks for the sum of two bars, or for their difference."""

    def __init__(self, rng):
        colours = rng.sample(list(COLOURS), BARS)
        self.bars = [(colour, rng.randint(1, UNITS)) for colour in colours]
        (self.a, self.x), (self.b, self.y) = rng.sample(self.bars, 2)
        self.kind = "sum" if self.x == self.y else rng.choice(("sum", "taller"))
        if self.kind == "taller" and self.x < self.y:
            self.a, self.x, self.b, self.y = self.b, self.y, self.a, self.x
        if self.kind == "sum":
            self.problem = f"How many units do the {self.a} bar and the {self.b} bar have together?"
        else:
            self.problem = f"How many units is the {self.a} bar taller than the {self.b} bar?"
        self.image = draw_bars(self.bars)

    def path(self, slip=None, rng=None):
        sign, answer = ("+", self.x + self.y) if self.kind == "sum" else ("-", self.x - self.y)
        if slip == "result":
            answer += 1                        # counts the fence posts and not the fence, always to the same side
        description = f"Of {BARS} bars, {self.a} is {self.x} high and {self.b} is {self.y} high."
        verb = "add" if self.kind == "sum" else "subtract"
        rationale = f"Read the {self.a} bar and the {self.b} bar, then {verb}."
        steps = [f"The first bar, {self.a} is {self.x} high.",
                 f"The second bar, {self.b} is {self.y} high.",
                 f"{self.x} {sign} {self.y} = {answer}"]
        return description, rationale, steps, answer

    def key_steps(self):
        if self.kind == "sum":
            equation = [f"{self.x} + {self.y} = {self.x + self.y}", f"{self.x} plus {self.y} is {self.x + self.y}"]
        else:
            equation = [f"{self.x} - {self.y} = {self.x - self.y}", f"{self.x} minus {self.y} is {self.x - self.y}"]
        return [[f"{self.a} is {self.x}", f"{self.a} bar is {self.x}", f"{self.a} bar has {plural(self.x, 'unit')}"],
                [f"{self.b} is {self.y}", f"{self.b} bar is {self.y}", f"{self.b} bar has {plural(self.y, 'unit')}"],
                equation]


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
    parser.add_argument("--warmup", type=int, default=4000)
    parser.add_argument("--test", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make_shapes(args.out, args.train, args.warmup, args.test, args.seed)
    print(f"{args.train} training questions, {args.warmup} demonstrations, {args.test} held-out questions → {args.out}")

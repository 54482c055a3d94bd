# SPDX-License-Identifier: MIT
"""Draws the eight benchmarks in small, so that `python eval.py` runs with nothing to download.

    python data/miniatures.py                        # writes data/miniatures/, always the same
    python data/miniatures.py --out DIR --seed 7

Names, columns, kinds of questions and forms of the image cell are those of the published files. The
images are rows of objects as in the embedded data. Most questions are those that the default run
trains on, so its model gets a share of them right. The others it never saw.

A score on these files says that the evaluation works, and nothing about a model.
"""
import argparse
import base64
import csv
import io
import random
from pathlib import Path

from PIL import Image, ImageDraw

# As the default run has seen them: one object in every fifth cell of 28 pixels.
QUESTION = "Subtract all {} objects. How many objects are left?"
CELL, PITCH, MOST = 28, 140, 6
BACKGROUND = (122, 116, 104)
COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (50, 90, 220)}
SHAPES = ("round", "square")
LETTERS = "ABCDE"

class Scene:
    """A row of objects, and the question how many are left without those of a colour or shape."""

    def __init__(self, rng, total=None):
        total = total or rng.randint(3, MOST)
        self.colours = [rng.choice(list(COLOURS)) for _ in range(total)]
        self.shapes = [rng.choice(SHAPES) for _ in range(total)]
        words = rng.choice((self.colours, self.shapes))
        self.word = rng.choice(words)
        self.total, self.left = total, total - words.count(self.word)
        self.question = QUESTION.format(self.word)
        self.image = Image.new("RGB", ((MOST - 1) * PITCH + CELL, CELL), BACKGROUND)
        pen = ImageDraw.Draw(self.image)
        for i, (colour, shape) in enumerate(zip(self.colours, self.shapes)):
            draw = pen.ellipse if shape == "round" else pen.rectangle
            draw((i * PITCH + 2, 2, i * PITCH + CELL - 3, CELL - 3), fill=COLOURS[colour])

def numbers(rng, right):
    """The right number among three wrong ones, as texts."""
    wrong = rng.sample([n for n in range(8) if n != right], 3)
    return list(map(str, rng.sample([right, *wrong], 4)))

def letter_of(right, choices):
    return LETTERS[choices.index(str(right))]

def hinted(hint, question, choices=()):
    """A question as MathVista and MATH-V hold it: the hint first, the options last."""
    lines = [f"Hint: Please answer the question {hint} at the end.", f"Question: {question}"]
    listed = [f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices)]
    return "\n".join(lines + (["Choices:", *listed] if choices else []))

def mathvista(rng):
    for answer_type in ("integer", "integer", "text", "text", "text", "float", "list") * 2:
        scene, choices, precision = Scene(rng), [], ""
        question, answer, hint = scene.question, scene.left, "and give the final value"
        if answer_type == "text":
            choices, hint = numbers(rng, answer), "and give the correct option letter"
            if rng.random() < 0.5:
                question, choices = "What colour is the first object?", list(COLOURS)
                answer = scene.colours[0]
        elif answer_type == "float":
            question, precision = "What share of the objects is red?", 1.0
            answer = round(scene.colours.count("red") / scene.total, 1)
        elif answer_type == "list":
            question = "How many objects are red, green and blue?"
            answer = list(map(scene.colours.count, COLOURS))
        yield {"image": scene.image, "question": hinted(hint, question, choices),
               "answer": answer, "answer_option": choices and letter_of(answer, choices) or "",
               "choices": choices or "", "answer_type": answer_type, "precision": precision,
               "question_type": "multi_choice" if choices else "free_form"}

def mmstar(rng):
    for _ in range(4):
        a, b, c = Scene(rng), Scene(rng), Scene(rng)
        for scene, question, choices, right in (
                (a, a.question, numbers(rng, a.left), a.left),
                (b, "What colour is the last object?", list(COLOURS), b.colours[-1]),
                (c, "What shape has the first object?", list(SHAPES), c.shapes[0])):
            yield {"image": scene.image, "question": question, **dict(zip(LETTERS, choices)),
                   "answer": letter_of(right, choices), "category": "instance reasoning"}

def mathvision(rng):
    for _ in range(3):
        a, b, c, d, e = Scene(rng), Scene(rng), Scene(rng, 5), Scene(rng), Scene(rng)
        colour = rng.choice(c.colours)
        for image, question, answer, choices in (
                (a.image, a.question, a.left, []),
                (b.image, b.question, b.left, numbers(rng, b.left)),
                # The options are names of what the image shows.
                (c.image, f"The objects are A, B, C, D and E. Which is the first {colour} one?",
                 LETTERS[c.colours.index(colour)], list(LETTERS)),
                ([d.image, e.image], "How many objects do both show?", d.total + e.total, [])):
            hint = "and give the correct option letter" if choices else "and give the number"
            yield {"image": image, "question": hinted(hint, question, choices),
                   "choices": choices, "category": "counting", "level": rng.randint(1, 5),
                   "answer": letter_of(answer, choices) if choices else answer}

def chartqa(rng):
    for split in ("test_human", "test_augmented"):
        for n in range(7):
            scene = Scene(rng)
            first, second, *_ = scene.colours
            red = scene.colours.count("red") / scene.total
            question, answer = (
                ("What colour is the first object?", first),
                ("What colours have the first two objects?", f"[{first}, {second}]"),
                ("Are there more than four objects?", ("No", "Yes")[scene.total > 4]),
                ("What share of the objects is red, in percent?", f"{100 * red:.1f}%"),
            )[n] if n < 4 else (scene.question, scene.left)
            yield {"image": scene.image, "question": question, "answer": answer, "split": split}

def dynamath(rng):
    for qid, answer_type in enumerate(("float", "single answer", "multiple choice", "text"), 1):
        for varid in range(1, 11):
            scene = Scene(rng)
            question, answer = scene.question, scene.left
            if answer_type == "multiple choice":
                options = " ".join(f"({x}) {shape}" for x, shape in zip(LETTERS, SHAPES))
                question = f"What shape has the first object? choice: {options}"
                answer = letter_of(scene.shapes[0], SHAPES)
            if answer_type == "text":
                question, answer = "What colour is the first object?", scene.colours[0]
            yield {"image": scene.image, "qid": qid, "varid": varid, "question": question,
                   "answer": answer, "answer_type": answer_type, "subject": "arithmetic"}

def hallusionbench(rng):
    questions = (("Are there more than four objects in the image?", lambda s: s.total > 4),
                 ("Is the first object red?", lambda s: s.colours[0] == "red"))
    for kind, number in (("VD_figure", 0), ("VD_figure", 1), ("VD_math", 0), ("VS_chart", 0)):
        # A set asks the same of two figures. VS also asks without an image: such rows are skipped.
        for figure in range(3 if kind[:2] == "VS" else 2):
            scene, visual = Scene(rng), int(kind[:2] == "VD" or figure > 0)
            name = f"{kind}_{visual}_{number}_{figure}"
            for n, (question, holds) in enumerate(questions):
                # The second question refers to the row of the first for its image.
                image = (scene.image, f"{name}_0")[n] if visual else ""
                answer = "Yes" if holds(scene) else "No"
                yield {"index": f"{name}_{n}", "image": image, "question": question,
                       "answer": answer, "category": kind[:2], "l2-category": kind}

def mathverse(rng):
    for number, kind in enumerate(("multi-choice", "free-form", "free-form", "no option"), 1):
        scene, tail = Scene(rng), ""
        answer = scene.left
        if kind == "multi-choice":
            choices = numbers(rng, answer)
            tail = "\nChoices:\n" + "\n".join(map("{}:{}".format, LETTERS, choices))
            answer = letter_of(answer, choices)
        text = scene.question + tail
        if kind == "no option":  # the published file has such rows
            text, answer = "True or false: there are more than four objects.", str(scene.total > 4)
        for version in ("Text Dominant", "Text Lite", "Vision Dominant", "Vision Only"):
            yield {"image": scene.image, "question": text, "question_for_eval": text,
                   "question_type": "free-form" if kind == "free-form" else "multi-choice",
                   "answer": answer, "problem_index": number, "problem_version": version}

def mme(rng):
    for number in (1, 2):
        for category, question, right in (
                ("existence", "Is there a {} object in this image?", lambda s: s.word),
                ("count", "Are there {} objects in this image?", lambda s: s.total),
                ("color", "Is the first object {}?", lambda s: s.colours[0]),
                ("numerical_calculation", QUESTION + " Is it {}?", lambda s: s.left)):
            scene = Scene(rng)
            # All but the last gap hold the word of the scene.
            question = question.replace("{}", scene.word, question.count("{}") - 1)
            wrong = right(scene) + 1 if isinstance(right(scene), int) else "purple"
            # Of each image two questions: with the word that makes Yes, and one that makes No.
            for word, answer in ((right(scene), "Yes"), (wrong, "No")):
                yield {"image": scene.image, "image_path": f"{category}/{number:04d}.png",
                       "category": category, "answer": answer,
                       "question": f"{question.format(word)} Please answer yes or no."}

FILES = {"MathVista_MINI.tsv": mathvista, "MMStar.tsv": mmstar, "MathVision.tsv": mathvision,
         "ChartQA_TEST.tsv": chartqa, "DynaMath.tsv": dynamath,
         "HallusionBench.tsv": hallusionbench, "testmini.tsv": mathverse, "MME.tsv": mme}

def image_cell(image):
    """Base64 of a PNG, or a list of such texts; a reference to another row stays."""
    if isinstance(image, list):
        return list(map(image_cell, image))
    if isinstance(image, str):
        return image
    image.save(file := io.BytesIO(), "PNG")
    return base64.b64encode(file.getvalue()).decode()

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "miniatures")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, draw in FILES.items():
        # A seed for each: a change to one file leaves the others as they are.
        rows = list(draw(random.Random(f"{name} {args.seed}")))
        columns = dict.fromkeys(["index", *(column for row in rows for column in row)])
        with open(args.out / name, "w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, columns, delimiter="\t", lineterminator="\n")
            writer.writeheader()
            for index, row in enumerate(rows):
                writer.writerow({"index": index, **row, "image": image_cell(row["image"])})
        print(f"{args.out / name}: {len(rows)} rows")

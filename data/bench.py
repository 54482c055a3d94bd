# SPDX-License-Identifier: MIT
"""Writes miniature versions of the eight benchmarks, so that the evaluation runs with nothing to download.

    python data/bench.py                        # writes data/bench/, the same files every time
    python data/bench.py --out DIR --seed 7

Eight TSV files with the names, columns, kinds of question and forms of the image cell of the published ones, but with
scenes of shapes.py and questions about them. Most numbers are asked for in the scene's own words, those that the
embedded data set trains on: a model that learned them gets a share right. The other questions it never saw.

A score on these files says that the evaluation works, and nothing about a model. They are no held-out set either:
shapes are few, and a scene may occur in the training images too.
"""
import argparse
import base64
import csv
import io
import random
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw

from shapes import BACKGROUND, CELL, COLOURS, FONT, SHAPES, BarScene, ObjectScene

LETTERS = "ABCDE"
PLACES = ("left", "middle", "right")
# From the line that the published MathVista puts before a question, by the type of the answer.
MATHVISTA_HINTS = {
    "text": "and provide the correct option letter, e.g., A, B, C, D,",
    "integer": "requiring an integer answer and provide the final value, e.g., 1, 2, 3,",
    "float": "requiring a floating-point number with one decimal place and provide the final value, e.g., 1.2, 1.3, "
             "1.4,",
    "list": "requiring a Python list as an answer and provide the final list, e.g., [1, 2, 3], [1.2, 1.3, 1.4],"}


def solve(scene):
    """The number that answers the scene's own question."""
    return scene.path()[-1]


def heights(scene):
    return [height for _, height in scene.bars]


def scene_where(rng, kind, holds):
    """Draws scenes until one has the property."""
    while not holds(scene := kind(rng)):
        pass
    return scene


def tallest_bar(rng):
    """A bar chart in which one bar is the tallest → chart, place and colour of that bar."""
    scene = scene_where(rng, BarScene, lambda scene: heights(scene).count(max(heights(scene))) == 1)
    place = heights(scene).index(max(heights(scene)))
    return scene, PLACES[place], scene.bars[place][0]


def others(words, word):
    return [other for other in words if other != word]


def near(rng, number, count=3):
    """Wrong options for a number."""
    return rng.sample([number + d for d in (-2, -1, 1, 2, 3, 4) if number + d >= 0], count)


def shuffled(rng, right, wrong):
    """All options as texts, in random order."""
    return [str(option) for option in rng.sample([right, *wrong], 1 + len(wrong))]


def letter_of(right, choices):
    return LETTERS[choices.index(str(right))]


def lettered(choices):
    return [f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices)]


def hinted(hint, question, choices):
    """The question as MathVista and MathVision hold it: hint first, options last."""
    lines = [f"Hint: Please answer the question {hint} at the end.", f"Question: {question}"]
    return "\n".join(lines + ["Choices:", *lettered(choices)] if choices else lines)


def yes_no(truth):
    return "Yes" if truth else "No"


def write_below(image, text):
    """The image with a text under it, for MathVerse's "Vision Only": there the question is nowhere but in the image."""
    # A character of the bitmap font is 6 pixels wide, and a line 12 high.
    lines = [line for part in text.splitlines() for line in textwrap.wrap(part, image.width // 6)]
    taller = Image.new("RGB", (image.width, image.height + -(-12 * len(lines) // CELL) * CELL), BACKGROUND)
    taller.paste(image)
    ImageDraw.Draw(taller).text((0, image.height), "\n".join(lines), fill="black", font=FONT, spacing=1)
    return taller


def mathvista(rng):
    def row(scene, answer_type, question, answer, choices=()):
        chart = isinstance(scene, BarScene)
        return {"image": scene.image, "question": hinted(MATHVISTA_HINTS[answer_type], question, choices),
                "answer": answer, "answer_option": letter_of(answer, choices) if choices else None,
                "choices": choices or None,
                "question_type": "multi_choice" if choices else "free_form", "answer_type": answer_type,
                "precision": 1.0 if answer_type == "float" else None,
                "task": "figure question answering" if chart else "visual question answering",
                "skills": ["statistical reasoning" if chart else "arithmetic reasoning"]}

    for some_left in (False, True):     # the first of the two questions about objects has the answer 0
        objects = scene_where(rng, ObjectScene, lambda scene: bool(solve(scene)) == some_left)
        bars, (chart, _, colour) = BarScene(rng), tallest_bar(rng)
        left, _, right = heights(chart)
        for scene in (objects, bars):
            yield row(scene, "integer", scene.problem, solve(scene))
            other = type(scene)(rng)
            yield row(other, "text", other.problem, solve(other), shuffled(rng, solve(other), near(rng, solve(other))))
        yield row(chart, "text", "What colour is the tallest bar?", colour, list(COLOURS))
        yield row(chart, "text", "Is the left bar taller than the right bar?", yes_no(left > right), ["Yes", "No"])
        yield row(bars, "float", "What is the mean number of units of the three bars?", f"{sum(heights(bars)) / 3:.1f}")
        yield row(chart, "list", "How many units do the bars have, from the left?", heights(chart))


def mmstar(rng):
    for _ in range(4):
        objects, bars, (chart, place, colour) = ObjectScene(rng), BarScene(rng), tallest_bar(rng)
        for scene, question, right, wrong, category, l2_category in (
            (objects, objects.problem, solve(objects), near(rng, solve(objects)), "fine-grained perception",
             "object counting"),
            (bars, bars.problem, solve(bars), near(rng, solve(bars)), "math", "statistical reasoning"),
            (chart, "What colour is the tallest bar?", colour, others(COLOURS, colour), "instance reasoning",
             "cross-instance attribute reasoning"),
            # Three options: the cell of D stays empty.
            (chart, "Which bar is the tallest?", place, others(PLACES, place), "logical reasoning",
             "diagram reasoning"),
        ):
            choices = shuffled(rng, right, wrong)
            yield {"image": scene.image, "question": question, **dict(zip(LETTERS, choices)),
                   "answer": letter_of(right, choices), "category": category, "l2_category": l2_category}


def mathvision(rng):
    def row(image, question, answer, category, choices=()):
        hint = f"and provide the {'correct option letter, e.g., A, B, C, D, E,' if choices else 'final answer'}"
        question += "\n<image1>\n<image2>" if isinstance(image, list) else "\n<image1>"
        return {"image": image, "question": hinted(hint, question, choices), "choices": list(choices),
                "answer": letter_of(answer, choices) if choices else answer,
                "category": category, "level": rng.randint(1, 5)}

    for _ in range(3):
        for kind, category in ((ObjectScene, "counting"), (BarScene, "arithmetic")):
            scene = kind(rng)
            yield row(scene.image, scene.problem, solve(scene), category)
            scene = kind(rng)
            wrong = near(rng, solve(scene), 4)
            yield row(scene.image, scene.problem, solve(scene), category, shuffled(rng, solve(scene), wrong))
    for _ in range(2):
        # As in the published file, the options can be names of what the image shows.
        scene = scene_where(rng, ObjectScene, lambda scene: scene.total <= len(LETTERS))
        last = max(i for i, word in enumerate(scene.words) if word == scene.word)
        names = LETTERS[:scene.total]
        yield row(scene.image, f"From the left, the objects are called {', '.join(names)}. Which is the last "
                  f"{scene.thing}?", names[last], "logic", names)
        first, second = ObjectScene(rng), ObjectScene(rng)
        yield row([first.image, second.image], "How many objects do the two images show together?",
                  first.total + second.total, "counting")


def chartqa(rng):
    for split in ("test_human", "test_augmented"):
        for _ in range(3):
            bars = BarScene(rng)
            yield {"image": bars.image, "question": bars.problem, "answer": solve(bars), "split": split}
        bars, (chart, _, colour) = BarScene(rng), tallest_bar(rng)
        left, _, right = heights(bars)
        for scene, question, answer in (
            (chart, "What colour is the tallest bar?", colour),
            (chart, "What are the colours of the left bar and the right bar?",
             f"[{chart.bars[0][0]}, {chart.bars[2][0]}]"),
            (bars, "Is the left bar taller than the right bar?", yes_no(left > right)),
            (bars, "What is the mean number of units of the three bars?", round(sum(heights(bars)) / 3, 2)),
            (bars, "What share of all units does the left bar have, in percent?",
             f"{round(100 * left / sum(heights(bars)), 1):g}%"),
        ):
            yield {"image": scene.image, "question": question, "answer": answer, "split": split}


def dynamath(rng):
    def own_question(kind, problem):
        scene = scene_where(rng, kind, lambda scene: scene.problem == problem)
        return scene, problem, solve(scene)

    def tallest_place():
        chart, place, _ = tallest_bar(rng)
        return chart, f"Which bar is the tallest? choice: {' '.join(lettered(PLACES))}", letter_of(place, PLACES)

    def tallest_colour():
        chart, _, colour = tallest_bar(rng)
        return chart, "What colour is the tallest bar?", colour

    for qid, (answer_type, draw, *given) in enumerate((
        ("float", own_question, ObjectScene, ObjectScene(rng).problem),
        ("single answer", own_question, BarScene, BarScene(rng).problem),
        ("multiple choice", tallest_place),
        ("text", tallest_colour),
    ), 1):
        images = []
        while len(images) < 10:
            scene, question, answer = draw(*given)
            if scene.image not in images:       # every variant shows something else
                images.append(scene.image)
                yield {"image": scene.image, "qid": qid, "varid": len(images), "question": question, "answer": answer,
                       "answer_type": answer_type, "subject": "arithmetic", "knowledge_level": "elementary school"}


def hallusionbench(rng):
    for kind, number, scenes, questions in (
        ("VD_figure", 0, ObjectScene, (
            ("Are there more than four objects in the image?", lambda scene: scene.total > 4),
            ("Are the first and the last object alike?", lambda scene: scene.words[0] == scene.words[-1]))),
        ("VD_math", 0, BarScene, (
            ("Is the left bar taller than the right bar?", lambda scene: heights(scene)[0] > heights(scene)[2]),
            ("Do the three bars have more than six units in all?", lambda scene: sum(heights(scene)) > 6))),
        ("VD_math", 1, BarScene, (
            ("Do all three bars differ in height?", lambda scene: len(set(heights(scene))) == 3),
            ("Is one of the three bars red?", lambda scene: "red" in dict(scene.bars)))),
        ("VS_chart", 0, BarScene, (
            ("According to the chart, has the middle bar more than two units?", lambda scene: heights(scene)[1] > 2),
            ("According to the chart, are two of the bars equally tall?", lambda scene: len(set(heights(scene))) < 3))),
    ):
        # The figures of a set get the same questions; the answer to the first one changes from figure to figure.
        original = scene_where(rng, scenes, questions[0][1])
        edited = scene_where(rng, scenes, lambda scene: not questions[0][1](scene))
        figures = [(1, original), (1, edited)]
        if kind.startswith("VS"):
            figures.insert(0, (0, original))    # first without the image: rows that an evaluation skips and counts
        for figure, (visual, scene) in enumerate(figures):
            for question, (text, holds) in enumerate(questions):
                name = f"{kind}_{visual}_{number}_{figure}"
                # The second question refers to the row of the first for its image.
                image = (scene.image if question == 0 else f"{name}_0") if visual else None
                yield {"index": f"{name}_{question}", "image": image, "category": kind[:2], "l2-category": kind,
                       "question": text, "answer": yes_no(holds(scene))}


def mathverse(rng):
    for problem_index, (question_type, kind) in enumerate((
        ("multi-choice", ObjectScene), ("free-form", ObjectScene), ("free-form", BarScene),
    ), 1):
        scene = kind(rng)
        fact = f"The image shows {f'{scene.total} objects' if kind is ObjectScene else 'three bars'}. "
        ask, answer, tail = "the final value, e.g., 1, 2.5, 300.", solve(scene), ""
        if question_type == "multi-choice":
            choices = shuffled(rng, answer, near(rng, answer))
            ask, answer = "the correct option letter, e.g., A, B, C, D.", letter_of(answer, choices)
            tail = "\n".join(["\nChoices:", *(f"{letter}:{choice}" for letter, choice in zip(LETTERS, choices))])
        for version in ("Text Dominant", "Text Lite", "Vision Intensive", "Vision Dominant", "Vision Only"):
            text = (fact if version == "Text Dominant" else "") + scene.problem + tail
            # The published file has an instruction everywhere; here free-form questions come bare, as in training.
            question = f"Please directly answer the question and provide {ask}\nQuestion: {text}" if tail else text
            if version == "Vision Only":
                question = f"According to the question shown in the image, please directly answer it and provide {ask}"
            yield {"image": write_below(scene.image, text) if version == "Vision Only" else scene.image,
                   "question": question, "question_for_eval": text, "question_type": question_type, "answer": answer,
                   "problem_index": problem_index, "problem_version": version,
                   "metadata": {"split": "testmini", "source": "shapes", "subject": "Arithmetic"}}


def mme(rng):
    for number in (1, 2):
        objects = scene_where(rng, ObjectScene, lambda scene: scene.kind == "shape" and set(scene.words) != set(SHAPES))
        absent = next(shape for shape in SHAPES if shape not in objects.words)
        counted, bars, (chart, _, colour) = ObjectScene(rng), BarScene(rng), tallest_bar(rng)
        colours = [bar[0] for bar in bars.bars]
        # Of each image two questions, with the word or number that makes the answer Yes and one that makes it No.
        for category, scene, question, right, wrong in (
            ("existence", objects, "Is there a {} in this image?", objects.word, absent),
            ("count", counted, "Are there {} objects in this image?", counted.total, counted.total + 1),
            ("position", bars, "Is the {} bar to the left of the other bars?", colours[0], colours[2]),
            ("color", bars, "Is the middle bar {}?", colours[1], rng.choice(others(COLOURS, colours[1]))),
            ("numerical_calculation", bars, bars.problem + " Is it {}?", solve(bars), solve(bars) + 1),
            ("commonsense_reasoning", chart, "A unit is a coin. Is the {} bar worth most?", colour,
             rng.choice(others(dict(chart.bars), colour))),
        ):
            for word, answer in ((right, "Yes"), (wrong, "No")):
                yield {"image": scene.image, "image_path": f"{category}/{number:04d}.png", "category": category,
                       "question": f"{question.format(word)} Please answer yes or no.", "answer": answer}


# Published name: what draws its rows, its columns.
FILES = {
    "MathVista_MINI.tsv": (mathvista, "index image question answer answer_option choices question_type answer_type "
                                      "precision task skills"),
    "MMStar.tsv": (mmstar, "index image question A B C D answer category l2_category"),
    "MathVision.tsv": (mathvision, "index image question choices answer category level"),
    "ChartQA_TEST.tsv": (chartqa, "index image question answer split"),
    "DynaMath.tsv": (dynamath, "index image qid varid question answer answer_type subject knowledge_level"),
    "HallusionBench.tsv": (hallusionbench, "index image category l2-category question answer"),
    "testmini.tsv": (mathverse, "index image question question_for_eval question_type answer problem_index "
                                "problem_version metadata"),
    "MME.tsv": (mme, "index image image_path question answer category"),
}


def image_cell(image):
    """Image → base64 of its PNG; list of images → list literal of theirs; anything else, as a reference, stays."""
    if isinstance(image, list):
        return [image_cell(one) for one in image]
    if not isinstance(image, Image.Image):
        return image
    image.save(png := io.BytesIO(), "PNG")
    return base64.b64encode(png.getvalue()).decode()


def make_bench(out, seed):
    """Writes the eight files into folder `out` and returns the number of rows. Each file draws from a seed of its own:
    a change to one leaves the others as they are."""
    out.mkdir(parents=True, exist_ok=True)
    number = 0
    for name, (draw_rows, columns) in FILES.items():
        with (out / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns.split(), delimiter="\t", lineterminator="\n")
            writer.writeheader()
            for index, row in enumerate(draw_rows(random.Random(f"{name} {seed}"))):
                writer.writerow({"index": index, **row, "image": image_cell(row["image"])})
                number += 1
    return number


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "bench")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = make_bench(args.out, args.seed)
    print(f"{rows} rows of {len(FILES)} miniature benchmarks → {args.out}")

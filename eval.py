# SPDX-License-Identifier: MIT
"""Evaluates a checkpoint on the eight benchmarks of the R1-VL paper, by rule, without a judge.

    python eval.py                                                 # miniatures, no download
    python eval.py --model R1-VL-2B                                # a Hub id, a folder or a run
    python eval.py --model Qwen2-VL-2B --plain --benchmarks mme    # no reasoning template
    python eval.py --benchmarks mmstar --predictions FILE.jsonl    # of another engine, no model

From a benchmark's file to a figure, and the function that does each step:

    rows        VLMEvalKit's TSV files, found or downloaded               read_rows
    prompt      the row's question in the template of stepgrpo.py         build_prompt
    response    greedy, kept as it comes: a kill loses nothing            predict
    statement   the words in which a response commits to its answer       statements
    score       1 or 0: letter, yes or no, number, text or list           score
    figures     the paper's headline, its parts, bootstrap intervals      summarize, intervals

`score` and `summarize` need no model. They take plain dicts, so any engine's responses can be
scored. A rule that errs should miss a right answer rather than pay a wrong one. A response without
an answer is wrong, and it is counted as unparsed.
"""
import argparse
import ast
import base64
import csv
import hashlib
import io
import json
import math
import os
import re
import subprocess
import sys
from collections import defaultdict
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from stepgrpo import (HERE, SHORT_NAMES, TINY, UserError, build_instruction, canonical, chunks,
                      load_image, load_model, pick_device, put, rollout, split_sections,
                      undecorated, using)

# ─── 1. The eight benchmarks ──────────────────────────────────────────────────────────────────────

class Benchmark(NamedTuple):
    """title: in the table; md5: of the published file; columns: that it must have, beside index,
    image, question and answer."""
    title: str
    file: str
    md5: str
    columns: str
    url: str = "https://opencompass.openxlab.space/utils/VLMEval/"

BENCHMARKS = {
    "mathvista": Benchmark(
        "MathVista", "MathVista_MINI.tsv", "f199b98e178e5a2a20e7048f5dcb0464",
        "answer_option choices question_type answer_type"),
    "mmstar": Benchmark("MMStar", "MMStar.tsv", "e1ecd2140806c1b1bbf54b43372efb9e", "A B C D"),
    "mathvision": Benchmark(
        "Math-V", "MathVision.tsv", "93f6de14f7916e598aa1b7165589831e", "choices"),
    "chartqa": Benchmark(
        "ChartQA", "ChartQA_TEST.tsv", "c902e0aa9be5582a7aad6dcf52734b42", "split"),
    "dynamath": Benchmark(
        "DynaMath", "DynaMath.tsv", "b8425ad9a7114571fc9366e013699494", "qid answer_type"),
    "hallusionbench": Benchmark(
        "HallBench", "HallusionBench.tsv", "0c23ac0dc9ef46832d7a24504f2a0c7c", "l2-category"),
    "mathverse": Benchmark(
        "MathVerse", "testmini.tsv", "5017caca32b7fa110c350a1bea861b65",
        "question_for_eval question_type problem_index",
        "https://huggingface.co/datasets/CaraJ/Mathverse_VLMEvalKit/resolve/main/"),
    "mme": Benchmark("MME", "MME.tsv", "b36b43c3f09801f5d368627fb92187c3", "image_path category"),
}
PAPER = tuple(BENCHMARKS)
BENCHMARKS["mathvision_mini"] = BENCHMARKS["mathvision"]._replace(
    title="Math-V mini", file="MathVision_MINI.tsv", md5="060fe4fa5d868987ce179307bd5f8a33")

# The paper's Table 1, in the order of PAPER.
PUBLISHED = {
    "Qwen2-VL-2B": (43.0, 48.0, 12.4, 73.5, 24.9, 41.7, 19.7, 1872),
    "Qwen2-VL-2B-GRPO": (41.4, 46.2, 16.0, 72.5, 24.2, 42.2, 19.9, 1930),
    "R1-VL-2B": (52.1, 49.8, 17.1, 75.2, 29.4, 44.0, 26.2, 2048),
    "Qwen2-VL-7B": (58.2, 60.7, 16.3, 83.0, 42.1, 50.6, 32.5, 2327),
    "Qwen2-VL-7B-GRPO": (55.1, 59.8, 19.1, 81.3, 33.9, 48.5, 30.9, 2335),
    "R1-VL-7B": (63.5, 60.0, 24.7, 83.9, 45.2, 54.7, 40.0, 2376),
}

# What pandas reads as an empty cell.
MISSING = {"", "na", "n/a", "none", "null", "nan"}

def cell(row, column, missing=MISSING):
    """A cell as text; '' if it is missing: None, nan (which differs from itself) or such a word."""
    value = row.get(column)
    text = "" if value is None or value != value else str(value).strip()
    return "" if text.lower() in missing else text

def is_choice(row):
    return "choice" in cell(row, "question_type") + cell(row, "answer_type")

def options_of(benchmark, row):
    """{letter: text} of a multiple-choice row; {} if it lists no options."""
    if benchmark == "mmstar":
        # An option may be called 'none' or 'Na'.
        texts = {x: cell(row, x, missing=()) for x in "ABCDE"}
        return {x: text for x, text in texts.items() if text}
    if benchmark.startswith(("mathvista", "mathvision")):
        choices = ast.literal_eval(cell(row, "choices") or "[]")
        return dict(zip("ABCDEFGH", map(str, choices)))
    if benchmark == "hallusionbench":
        return {"A": "Yes", "B": "No"}
    question = cell(row, "question_for_eval") or cell(row, "question")
    inline = re.findall(r"\(([A-H])\)\s*(.*?)\s*(?=\([A-H]\)|\Z)", question, re.S)
    lines = re.findall(r"^([A-H])[.:]\s*(.*)$", question.split("Choice")[-1], re.M)
    found = dict(inline or lines)
    return found if is_choice(row) and "A" in found else {}

def build_prompt(benchmark, row, plain=False):
    """The user's turn, as R1-VL's evaluation builds it. plain: without the reasoning template."""
    question = cell(row, "question")
    if benchmark == "hallusionbench":
        question += "\nChoices:\nA: Yes\nB: No"
    if benchmark == "mmstar":
        hint = f"Hint: {cell(row, 'hint')}\n" if cell(row, "hint") else ""
        options = [f"{x}: {text}" for x, text in options_of(benchmark, row).items()]
        question = "\n".join([f"{hint}Question: {question}", "Choices:", *options,
                              "Please select the correct answer from the choices above."])
    if plain:
        return question
    return build_instruction(question if "Question: " in question else f"Question: {question}")

# ─── 2. From response to answer ───────────────────────────────────────────────────────────────────

# `statements` finds the texts in which a response commits to an answer, the best first. `forms`
# takes such a text apart. Most patterns below are lists of words, so they are easy to extend and
# easy to overdo: what a pattern takes for an answer should be one in any response.

ASCII = str.maketrans({code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {"。": ". "})
WRAPPER = re.compile(r"\\(?:text\w*|math\w+|[hm]box) ?\{([^{}]*)\}")
# The end of a turn, as some engines leave it in: </s>, <|im_end|>.
END_TOKEN = re.compile(r"</?s>|<\|\w+\|>|<(?:eos|end_of_turn)>")
# Thinking that never ends is no answer. Its opening tag may stand in the prompt.
THINKING = re.compile(r"<think>.*?(?:</think>|(?=<answer>)|\Z)|\A.*</think>", re.S | re.I)
EMPHASIS = re.compile(r"\*\*+|```\w*|`")
TAG = re.compile(r"<((?:final[ _-]?)?(?:answer|conclusion))>(.*?)(?:</\1>|\Z)", re.S | re.I)
# A box that never closes ends at the end of its line.
BOX = re.compile(r"\\f?box(?:ed)? ?\{(?:((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}|([^\n]*))")
# 'The answer to this question is', 'Answer:', '"answer": ', 'I would go with'.
EXPLICIT = re.compile(
    r"\b(?:answer|option|choice)\b(?! \(?[A-H]\b)(?: (?!is\b)[\w'’-]+){0,8}?"
    r" (?:is|(?:would|must|should) be)\b:?|\b(?:answer|option|choice)\"? ?[:=]"
    r"|(?=\(?\b[A-H]\)? is (?:the |most )*(?:correct|right|best)\b)|答案[应该是为选]*:?|选[项择]?"
    r"|\bI(?: would|['’]d)? (?:go with|choose|pick|select)\b", re.I)
ALL_OPTIONS = re.compile(r"\W*A[).:][^\n]{0,200}?(?<!ption)(?:\n\W*|[ (]+)B[).:]")
# After 'C.' and after a line 'C' no sentence ends.
SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\b[A-Z]\.)\s+(?=[^a-z])|(?<!^[A-H])\n+", re.M)

def fold(text):
    """Full-width signs, LaTeX's \\text{} and U.S. in the spelling of the others."""
    text = WRAPPER.sub(lambda m: m[1].replace("~", " "), text.translate(ASCII))
    return re.sub(r"\b(?:[A-Z]\.){2,}", lambda m: m[0].replace(".", ""), text)

def clean(response):
    """The response without end tokens, thinking and Markdown; of 2,048 tokens, nothing is cut."""
    text = END_TOKEN.sub("", response[-10_000:])
    return fold(EMPHASIS.sub("", THINKING.sub("", text))).strip()

def sentences(text):
    """Sentences and lines that hold a letter or digit. A question states nothing."""
    found = [sentence.strip() for sentence in SENTENCE_END.split(text)]
    return [s for s in found if re.search(r"\w", s) and not s.endswith("?")]

def last_explicit(text):
    """What follows the last 'the answer is', unless that is a list of all options."""
    for match in list(EXPLICIT.finditer(text, max(0, len(text) - 4000)))[:-20:-1]:
        rest = text[match.end():][:1000]
        if sentences(rest) and not ALL_OPTIONS.match(rest):
            return sentences(rest)[0]
    return ""

def statements(response):
    """The texts in which a response may commit to its answer, the best first.

    Where to look: under the last answer header, or else in the last <answer> or the like, or else
    everywhere. What to take there: a box, an explicit statement, the last sentence, the first.
    """
    text = clean(response)
    sections = split_sections(text)
    headed = sections.answer is not None
    # A template that broke off has no answer.
    if not headed and "description" in sections.order:
        return []
    text = sections.answer if headed else text
    *_, text = text, *(inside for _, inside in TAG.findall(text) if inside.strip())
    found, boxes = sentences(text), [a or b for a, b in BOX.findall(text)]
    ends = found[:1] if headed else found[-1:] + found[:1]
    texts = dict.fromkeys([*boxes[-1:], last_explicit(text), *ends])
    return [text[:1000] for text in texts if text]

VERB = re.compile(
    r"\b(?:is|are|was|were|be|had|has|have|(?<!not )(?:equals?|(?:rose|fell|grew"
    r"|(?!compar|exceed)\w+ed)(?: (?:to|by|for|at))?(?= \W?\d)))\b"
    r"|[是为]|(?<![<>≤≥!])=|:(?=\s)", re.I)
CLAUSE = re.compile(
    r",? (?:because|since|which|while|although|but|(?<!left )with|when|where|compared|rounded)\b"
    r"|[,.;] (?:as|and|according|followed|indicating|based|not)\b"
    r"|\s\((?=(?:[a-z]{2}|[\d.]+%?\))[^=]*\Z)", re.I)
LEAD = re.compile(r"\A(?:according|based|after|from|in|as|so|thus|hence|therefore)\b[^,]*, ", re.I)
# What 'which is' adds; the option at the end, or the one number of 'So, Ruth pays $13 for it',
# unless the sentence denies.
LATE = re.compile(
    r"\bwhich (?:is|are|was|were|had|has)\b(.*)"
    r"|\A(?!.*(?:\b(?:not?|n?or|cannot|than)\b|n't))(?:.*(?:\(|option \(?)((?-i:[A-H]))\b\)?\W*"
    r"|(?:so|thus|hence|therefore)\b\D*(\$?\d[\d,.]*%?)\D*)\Z", re.I)
# Words that add nothing to a question, as stems.
FILLER = set("ther the a an this that thes who it he she we they is are was were do did does has"
             " had have of in on at to by with imag char".split())

def bare(text):
    """A text without lead-in, quotes, dollars, boxes and leftover symbols around it."""
    text = undecorated(text).strip(" \t\n*_,;:!$✓✔✅")
    # Quotes, also at the end of a JSON object.
    text = re.sub(r"\"\s*\}?\Z|\A\"", "", text)
    return re.sub(r"\A[\[({]([^\[\](){},]*)[\])}]\Z", r"\1", text).strip()

def stem(word):
    """'Objects,' → obje; 2,014 → 2014."""
    return re.sub(r"(?<=[a-z]{4})[\w'’]+|\W", "", word.lower())

def added(text, question):
    """What a sentence adds to the words of a question: 'France', to 'had the most visitors'."""
    known = {*map(stem, question.split()), *FILLER}
    new = [word.span() for word in re.finditer(r"\S+", text) if stem(word[0]) not in known]
    return text[new[0][0]:new[-1][1]] if new and question else ""

def forms(text, question=""):
    """What a statement may say: the whole of it; the same without its trailing clause; what
    stands after the last verb of that, or after the first; what it adds to the question; LATE.

    After the verb stands the claim. So it does not matter that the subject compares or denies:
    'The difference between 2012 and the year not shown is 5, with 3 left out' says 5.
    """
    late = [match[match.lastindex] for match in LATE.finditer(text)]
    text = bare(LEAD.sub("", text))
    verb = VERB.search(text)
    clause = CLAUSE.search(text, verb.end() if verb else 1)
    short = text[:clause.start()] if clause else text
    after = (VERB.split(short, most)[-1] for most in (0, 1))
    found = map(bare, (text, short, *after, added(short, question), *late))
    return list(filter(None, dict.fromkeys(found)))

# Numbers are read from the tokens of `canonical`: '2 √ 3', '-3', '5 ~cm', '1 ∶ 4'. A number is a
# product of numbers, roots and π. Nothing is evaluated as code.

FACTOR = re.compile(
    r"(?:([*/∶]) |(?=[√π]))(-?) ?(√ (?:\[ (\d) \] )?)?(π|\d{1,30}(?:\.\d{1,30})?(?:e-?\d{1,2})?)"
    r"(?: \^ (-?\d{1,3}))?(?: |(?=[kmb] ))")
NUMBER_WORDS = {word: str(n) for n, word in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve".split())}
SCALES = {"%": 0.01, "k": 1e3, "thousand": 1e3, "m": 1e6, "million": 1e6, "b": 1e9, "bn": 1e9,
          "billion": 1e9}
ABOUT = re.compile(r"\A(?:(?:about|approximately|around|roughly|nearly|almost|exactly|only|just"
                   r"|now|the|at|to|≈|~|an? (?:\w+ ){1,3}of) )+")
# What may follow a number: words and years, and after a comma anything but a number. 'or', 'than'
# and 'sin' make it a choice, a comparison or a formula.
FOLLOWS = re.compile(
    r"(?:(?!(?:not?|than|n?or|and|is|are|was|were|sin|cos|tan|log|ln) )"
    r"(?:[^\W\d_]{2,}|a|~\S+|[‐'%]|(?:1[5-9]|20)\d\d) )*(?:[,;.] (?![-(\[]? ?\d).*)?")

@lru_cache(maxsize=4096)
def read_number(text, loose=False):
    """'5.2 million cm' → value 5.2, scale 1e6 and unit '~cm'; None if a text is no number.

    loose: more may follow, as in '5 cars in 2014, 61 in all'.
    """
    text = ABOUT.sub("", canonical(text[:400]) + " ")
    # 'One of the two' is not 1.
    text = re.sub(r"\A\w+(?= (?!of ))", lambda m: NUMBER_WORDS.get(m[0], m[0]), text)
    value, scale, text = 1.0, 1.0, "* " + text
    try:
        while match := FACTOR.match(text):
            operation, minus, root, degree, x, power = match.groups()
            x = (math.pi if x == "π" else float(x)) ** float(power or 1)
            x = x ** (1 / float(degree or 2)) if root else x
            value *= (-1 if minus else 1) * (1 / x if operation in ("/", "∶") else x)
            text = text[match.end():]
    except ArithmeticError:
        return None
    rest = text.split()
    while rest and rest[0].rstrip("s") in SCALES:
        scale *= SCALES[rest.pop(0).rstrip("s")]
    unit = rest.pop(0) if rest and rest[0].startswith("~") else ""
    fine = not rest or loose and FOLLOWS.fullmatch(" ".join(rest) + " ")
    return (value, scale, unit) if fine and math.isfinite(value) else None

nearly = partial(math.isclose, rel_tol=0, abs_tol=1e-6)

def same_number(p, g, equal=nearly, plain=False):
    """p: the answer, g: the right one. A unit or a scale word may be missing, but not differ.

    60% is 0.6, and if plain also 60. Numbers are compared at the larger scale: 80% is not first
    divided and then rounded to 1.
    """
    (p, p_scale, p_unit), (g, g_scale, g_unit) = p, g
    if p_unit and g_unit and p_unit != g_unit:
        return False
    as_written = plain if 0.01 in (p_scale, g_scale) else 1.0 in (p_scale, g_scale)
    if (p_scale == g_scale or as_written) and equal(p, g):
        return True
    ratio = p_scale / g_scale
    return equal(p * max(1, ratio), g / min(1, ratio))

def words(text):
    """One spelling for equal texts. An article in front does not count."""
    return re.sub(r"\A(?:the|an?) (?=\S)", "", canonical(text[:500]))

def items(text):
    """Items of '[2014, 2016]', "['Yes', 'No']" or '(3, 4)'; [] if a text is no list."""
    match = re.fullmatch(r"[\[(⦃] (.* , .*) [\])⦄]", canonical(text))
    return match[1].split(" , ") if match else []

def same(a, b):
    """Whether an answer a says what the right one b says: word by word, as number or as list."""
    if words(a) == words(b):
        return bool(words(a))
    p, g = read_number(a), read_number(b)
    if p and g:
        return same_number(p, g)
    if not (wanted := items(b)):
        return False
    given = items(a) or items(f"[{re.sub(' and ', ', ', a)}]")
    # Texts may come in any order.
    if not any(map(read_number, wanted)):
        given, wanted = sorted(given, key=words), sorted(wanted, key=words)
    return len(given) == len(wanted) and all(map(same, given, wanted))

# '(C)', 'C.', 'C: 58', 'option C', 'C because', 'c)'; not 'A dog'.
LETTER = re.compile(
    r"(?i:option |choice |letter )?(?:[(\[]([A-Ha-h])[)\]]|([A-H])(?=\Z|[).:,;/&\n\]]"
    r"|\s+[-–(]|\s+(?:and|or|because|since|is|as)\b)|([a-h])(?=\Z|[).:]))")
SEVERAL = re.compile(r"(?:\W*(?:[,/&\n]|\band\b|\bor\b)\W*(?:option )?\(?[A-H]\b(?! [a-z]))+")

def matching(text, options):
    """The letters of the options that say the same as a text."""
    return {x for x, option in options.items() if text and same(text, option)}

def leading_letters(text, options):
    """The letters that open a text: 'B', 'B and C', 'Bno'. Before another option's text: both."""
    if not (match := LETTER.match(text)):
        return {text[:1].upper()} & matching(text[1:], options)
    letter, rest = match[match.lastindex].upper(), text[match.end():]
    if several := SEVERAL.match(rest):
        return {letter, *re.findall(r"\b[A-H]\b", several[0])}
    rest = rest.lstrip(" ).:,;-–(\n")
    said = set().union(*(matching(form, options) for form in forms(rest)))
    return {letter} if letter in said else {letter} | said

def chosen(text, options, question=""):
    """The letters that a statement chooses: by letter, or by the text of an option.

    A letter alone is a letter, even where the options are letters themselves.
    """
    for form in forms(text, question):
        if letters := leading_letters(form, options) or matching(form, options):
            return letters
    return matching(yes_or_no(text, question), options)

YES_NO = re.compile(
    r"\W*(?:(?P<yes>yes|yeah|(?:true|correct|right)(?=\W*\Z|[.,;:!])|是的?|对|正确)"
    r"|no(?:pe)?(?! (?:doubt|idea|information|answer|clear))"
    r"|(?:false|incorrect|wrong|not (?:true|correct|right|yes))(?=\W*\Z|[.,;:!])"
    r"|不是|不对|不正确|否|错误?)(?![a-z])", re.I)

def yes_or_no(text, question):
    """'Yes', 'No' or '': the word before any explanation, or else an echo of the question."""
    text = bare(text)
    found = (YES_NO.match(text), *map(YES_NO.fullmatch, forms(text)),
             re.search(r"\b(?:(?P<yes>yes)|no)\b(?=[,.:;!]|\Z)", text, re.I))
    if not (word := next(filter(None, found), None)):
        return echo(question, text)
    both = re.match(r"\W*(?:or|and|/)\W*(?:yes|no)\b", word.string[word.end():], re.I)
    return "" if both else "Yes" if word["yes"] else "No"

HEDGE = re.compile(r"\b(?:if|whether|unclear|cannot|but|however|may|might)\b|[<>=]", re.I)

def echo(question, text):
    """Yes if a sentence repeats the words of the question in their order, No if it denies them.

    'Is Red the maximum?' 'Red is not the maximum.'
    """
    asked, said = ([stem(word) for word in re.findall(r"[^\W_]{3,}", side)
                    if stem(word) not in FILLER] for side in (LEAD.sub("", question), text))
    said = iter(said)
    if len(asked) < 2 or HEDGE.search(text) or not all(word in said for word in asked):
        return ""
    return "No" if re.search(r"\b(?:not?|never)\b|n't\b", text, re.I) else "Yes"

# ─── 3. Scores ────────────────────────────────────────────────────────────────────────────────────

class Score(float):
    """1.0 or 0.0, and the statement it was given for: None if the response states no answer."""
    answer = None

def grade(response, read, is_right):
    """The first statement in which an answer can be read decides."""
    for text in statements(response):
        if answer := read(text):
            score = Score(is_right(answer))
            score.answer = text
            return score
    return Score(0)

NAME = re.compile(r"(?:\A|[,;]|\band\b)[^=,;]*\b([A-Za-z]{1,2})\W*=")

def grade_value(response, gold, question, equal, plain):
    """A number if the right answer is one; else a text or a list."""
    def says(text):
        return any(same(form, gold) for form in forms(text, question))

    def numbers(text):
        # y = -3 is not x = -3, and 'a = 7, b = 5' states none.
        if len({*NAME.findall(gold), *NAME.findall(text)}) > 1:
            return []
        # Of '2π/3 ≈ 2.094' either side counts.
        found = ((read_number(form, loose=True) for form in forms(side, question))
                 for side in re.split(r"≈|\\approx", text, maxsplit=2))
        return [number for side in found if (number := next(filter(None, side), None))]

    if number := read_number(bare(gold.split("=")[-1])):
        return grade(response, numbers, lambda found: any(
            same_number(n, number, equal, plain) for n in found))
    score = grade(response, says, bool)
    score.answer = score.answer or next(iter(statements(response)), None)
    return score

def closeness(benchmark, row):
    """When a number counts as the right one: a function; and whether 60% may be 60."""
    plain = bool(re.search("percent|%", cell(row, "question"), re.I))
    if benchmark == "chartqa":
        return lambda p, g: abs(p - g) <= 0.05 * abs(g) + 1e-12, True
    if benchmark == "dynamath":
        return lambda p, g: abs(p - g) <= 0.001 + 1e-9, plain
    if benchmark == "mathvista":
        decimals = cell(row, "precision") or len(str(row["answer"]).partition(".")[2])
        decimals = 0 if cell(row, "answer_type") == "integer" else int(float(decimals))
        return lambda p, g: round(p, decimals) == round(g, decimals), plain
    return nearly, plain

def score(benchmark, row, response):
    """Score of a response to a row, a dict of TSV columns. A malformed row is an error."""
    gold = fold(cell(row, "answer", missing=()))
    response = response if isinstance(response, str) else ""
    question = re.split("Choices:|Please", cell(row, "question").split("Question:")[-1])[0]
    options = {x: fold(text) for x, text in options_of(benchmark, row).items()}
    label = benchmark == "mathvista" and cell(row, "answer_option") or gold
    is_letter = re.fullmatch(r"\W*[A-H](?:\W+[A-H])*\W*", label)
    wanted = set(re.findall("[A-H]", label)) if is_letter else matching(gold, options)
    if not gold or benchmark in ("hallusionbench", "mme") and gold.lower() not in ("yes", "no"):
        raise ValueError(f"{gold[:60]!r} is no right answer")
    if wanted and (options or is_choice(row)):
        # Published rows list an option twice. Then its text means the right one.
        right = [options.get(letter) for letter in wanted]
        options = {x: text for x, text in options.items() if x in wanted or text not in right}
        read = partial(chosen, options=options, question=question)
        return grade(response, read, wanted.__eq__)
    if gold.lower() in ("yes", "no"):
        read = partial(yes_or_no, question=question)
        return grade(response, read, gold.capitalize().__eq__)
    # MathVerse has multiple-choice rows without options. The answer to one is 090^\circ T.
    return grade_value(response, gold, question, *closeness(benchmark, row))

# A figure is the share of units whose rows are all right. A unit is a row for accuracy, an image
# for MME's acc+, the ten variants of a question for DynaMath's worst case.

# Columns to break the accuracy down by.
PARTS = "split", "question_type", "answer_type", "category", "subject", "problem_version"
# MME's other ten categories are perception.
REASONING = ("code_reasoning", "commonsense_reasoning", "numerical_calculation",
             "text_translation")

def units_of(benchmark, row, i):
    """{figure: unit} of row number i, the unit of accuracy being i; and its cluster.

    The rows of a cluster are not independent. So the bootstrap draws them together.
    """
    parts = {f"{column} {cell(row, column)}": i for column in PARTS if cell(row, column)}
    if benchmark == "dynamath":
        qid = cell(row, "qid")
        return {"average": i, "worst case": qid, **parts}, qid
    if benchmark == "hallusionbench":
        # The index is {VD or VS}_{subcategory}_{visual}_{set}_{figure}_{question}.
        *_, number, figure, question = cell(row, "index").split("_")
        kind = cell(row, "l2-category")
        return {"aAcc": i, "fAcc": (kind, number, figure), "qAcc": (kind, number, question),
                **parts}, (kind, number)
    if benchmark == "mme":
        category, image = cell(row, "category"), cell(row, "image_path")
        return {f"{category} acc": i, f"{category} acc+": image}, (category, image)
    return {"accuracy": i, **parts}, cell(row, "problem_index") or i

def figures(benchmark, rows, scores, resamples=0):
    """{figure: tensor (B,)}, the paper's first: of all rows, then of each bootstrap resample.

    A score of None is a row without a response. It makes a unit wrong that has other responses.
    """
    units, clusters, shares = defaultdict(lambda: defaultdict(list)), {}, {}
    for i, (row, s) in enumerate(zip(rows, scores, strict=True)):
        names, cluster = units_of(benchmark, row, i)
        if s is not None:
            clusters.setdefault(cluster, len(clusters))
        for name, unit in names.items():
            units[name][unit, cluster].append(s)
    n = len(clusters)
    drawn = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(0))
    # How often each cluster counts. The first draw takes each once.
    counts = [draw.bincount(minlength=n) for draw in (torch.arange(n), *drawn)]
    weights = torch.stack(counts).double()  # (B, clusters)
    for name, found in units.items():
        found = {key: given for key, given in found.items() if set(given) != {None}}
        if not found:
            continue
        # An image of MME has two questions, both to be right for acc+.
        least = 2 if name.endswith("acc+") else 1
        won = torch.tensor([set(given) == {1} and len(given) >= least for given in found.values()])
        weight = weights[:, [clusters[cluster] for _, cluster in found]]  # (B, units)
        shares[name] = 100 * (weight * won).sum(1) / weight.sum(1)
    return totals(benchmark, shares)

def totals(benchmark, shares):
    """The figures that combine others, before them. MME's points are 200 a category at most."""
    if benchmark == "hallusionbench":
        mean = sum(shares[name] for name in ("aAcc", "fAcc", "qAcc")) / 3
        return {"mean of aAcc, fAcc, qAcc": mean, **shares}
    if benchmark != "mme":
        return shares
    points = {name[:-4]: share + shares[name + "+"] for name, share in shares.items()
              if name.endswith(" acc")}
    total = sum(points.values())
    reasoning = sum((points[name] for name in REASONING if name in points), 0 * total)
    return {"perception + reasoning": total, "perception": total - reasoning,
            "reasoning": reasoning, **points, **shares}

def summarize(benchmark, rows, scores):
    """{figure: percent}, the paper's first, of rows and their scores; and `unparsed`, a number.

    MME's figures are points, 2,800 at most.
    """
    summary = {name: x.item() for name, x in figures(benchmark, rows, scores).items()}
    return summary | {"unparsed": sum(getattr(s, "answer", "") is None for s in scores)}

def intervals(benchmark, rows, scores, resamples=1000):
    """{figure: [low, high]}: 95 % bootstrap intervals. A resample may lack a unit: then nan."""
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    found = figures(benchmark, rows, scores, resamples)
    return {name: x[1:].nanquantile(ends).tolist() for name, x in found.items()}

# ─── 4. Asking the model ──────────────────────────────────────────────────────────────────────────

csv.field_size_limit(1 << 30)  # a cell may hold an image

def find_file(name, given):
    """A benchmark's file in --data, $LMUData or ~/LMUData; else it is downloaded to the first."""
    b = BENCHMARKS[name]
    folders = [given, os.environ.get("LMUData"), "~/LMUData"]
    files = [Path(folder).expanduser() / b.file for folder in folders if folder]
    if found := next(filter(Path.is_file, files), None):
        return found
    new, url = Path(f"{files[0]}.new"), b.url + b.file
    print("downloading", url)
    with using(f"{url}, which may also be saved by hand as {files[0]}"):
        new.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, new)
        md5 = hashlib.md5(new.read_bytes()).hexdigest()
        if md5 != b.md5:
            raise ValueError(f"its MD5 is {md5}, not {b.md5}")
        put(new, files[0])
    return files[0]

def read_rows(name, file):
    """TSV file → {index: row}, with images as base64. UserError names the first bad row."""
    needed = {"index", "question", "answer", *BENCHMARKS[name].columns.split()}
    rows = {}
    with using(file), open(file, encoding="utf-8-sig", newline="") as f:
        reader = csv.DictReader(f, delimiter="\t", strict=True)
        if lacks := needed - set(reader.fieldnames or ()):
            raise ValueError(f"it has no column {', '.join(sorted(lacks))}")
        for n, row in enumerate(reader, 1):
            with using(f"row {n}"):
                if None in row or None in row.values():
                    raise ValueError("it has more or fewer cells than the header")
                if row["index"] in rows:
                    raise ValueError(f"a second row has index {row['index']}")
                score(name, row, "")
                units_of(name, row, 0)
                rows[row["index"]] = row
    return rows

def images_of(rows, row):
    """RGB images of a row: base64, a list of it, or the index of another row, 64 signs at most."""
    text, images = row["image"].strip(), []
    for part in ast.literal_eval(text) if text.startswith("[") else [text]:
        if len(part) <= 64:
            images += images_of(rows, rows[part])
            continue
        data = base64.b64decode(part.rpartition("base64,")[2])
        images.append(load_image(io.BytesIO(data)))
    return images

def kept_responses(file, settings):
    """{id: response} of an earlier run. The first line of the file holds its settings."""
    with using(file):
        file.touch()
        data = file.read_bytes()
        lines = data[:data.rfind(b"\n") + 1]
        # A kill may have torn the last line.
        os.truncate(file, len(lines))
        if not lines:
            file.write_text(json.dumps({"settings": settings}) + "\n")
            return {}
        first, *records = map(json.loads, lines.splitlines())
        changed = [key for key in settings if first["settings"].get(key) != settings[key]]
        if changed:
            raise ValueError(f"made with other {', '.join(changed)}. Choose another --out")
        return {record["id"]: "" + record["response"] for record in records}

def predict(args, model, processor, settings, name, rows, asked, md5):
    """Greedy responses to the asked rows, appended batch by batch → {id: response}."""
    file = args.out / f"{name}.jsonl"
    done = kept_responses(file, settings | {"md5": md5})
    for batch in tqdm(chunks(asked, args.batch_size), f"{name:14}", unit="batch"):
        # After a kill the batches are the same, so the responses are the same to the last bit.
        todo = [row for row in batch if row["index"] not in done]
        texts, prompts = [build_prompt(name, row, args.plain) for row in todo], []
        for text, row in zip(texts, todo):
            with using(f"the image of {name} row {row['index']}"):
                prompts.append(processor.prompt(text, images_of(rows, row)))
        if todo:
            sampled = rollout(model, processor, prompts, 1, args.max_new_tokens, temperature=0)
            with open(file, "a") as f:
                for row, text, [response] in zip(todo, texts, sampled.texts):
                    line = {"id": row["index"], "prompt": text, "response": response}
                    f.write(json.dumps(line) + "\n")
                    done[row["index"]] = response
    return done

def first_of(record, *names):
    for name in names:
        if name in record:
            return record[name]
    raise ValueError(f"it has no {' or '.join(names)}")

def read_predictions(file):
    """Responses of another engine → {index: response}. A null response is an empty one.

    .jsonl, .json (a list), .tsv or .csv with id or index, and response or prediction; or samples
    of lmms-eval, with doc_id and filtered_resps.
    """
    if file.suffix == ".xlsx":
        raise UserError(f"{file}: save it as .csv")
    found = {}
    with using(file), open(file, encoding="utf-8-sig", newline="") as f:
        if file.suffix == ".json":
            records = json.load(f)
        elif file.suffix in (".tsv", ".csv"):
            records = csv.DictReader(f, delimiter="\t" if file.suffix == ".tsv" else ",")
        else:
            records = (json.loads(line) for line in f if line.strip())
        for n, record in enumerate(records, 1):
            with using(f"record {n}"):
                index = first_of(record, "id", "index", "doc_id")
                index = re.sub(r"\.0\Z", "", str(index))  # spreadsheets write 0 as 0.0
                response = first_of(record, "response", "prediction", "filtered_resps")
                while isinstance(response, list):
                    response = response[0] if response else None
                if index in found:
                    raise ValueError(f"a second record has index {index}")
                found[index] = "" if response is None else str(response)
    return found

# ─── 5. The table ─────────────────────────────────────────────────────────────────────────────────

def evaluate(args, name, file, respond):
    """Rows, responses, scores → all figures of a benchmark. <name>.scored.jsonl says why."""
    md5 = hashlib.md5(file.read_bytes()).hexdigest()
    rows = read_rows(name, file)
    seen = [row for row in rows.values()
            if "image" not in row or cell(row, "image", MISSING | {"[]"})]
    asked = seen[:args.limit or None]
    responses = respond(name, rows, asked, md5)
    if unknown := sorted(responses.keys() - rows.keys()):
        raise UserError(f"{file} lacks rows that have responses: {unknown[:5]}")
    scores = [score(name, row, responses[row["index"]]) if row["index"] in responses else None
              for row in asked]
    answered = [(row, s) for row, s in zip(asked, scores) if s is not None]
    if not answered:
        raise UserError(f"no row of {name} has an image and a response")
    with open(args.out / f"{name}.scored.jsonl", "w") as f:
        for row, s in answered:
            line = {"id": row["index"], "score": s, "right": row["answer"], "statement": s.answer}
            f.write(json.dumps(line) + "\n")
    summary, spread = summarize(name, asked, scores), intervals(name, asked, scores)
    headline = next(iter(summary))
    counts = {"rows": len(answered), "unparsed": summary["unparsed"],
              "without image": len(rows) - len(seen), "not asked": len(seen) - len(asked),
              "without response": len(asked) - len(answered)}
    return {"headline": summary[headline], "interval": spread[headline], "counts": counts,
            "published file": md5 == BENCHMARKS[name].md5,
            "figures": summary, "intervals": spread}

def table_lines(results, label):
    """The paper's rows and ours, in Markdown that is also aligned; and what ours rest on."""
    table = {f"{model} (paper)": dict(zip(PAPER, row)) for model, row in PUBLISHED.items()}
    table[label] = ours = {name: result["headline"] for name, result in results.items()}
    in_part = any(result["counts"]["not asked"] or result["counts"]["without response"]
                  for result in results.values())
    titles = {name: b.title for name, b in BENCHMARKS.items() if name in {*PAPER, *results}}
    titles["average"] = "Average"
    head = [f"| {'':24}", *(f"{title:>5}" for title in titles.values())]
    lines = [" | ".join(head) + " |", "| --- |" + " --: |" * len(titles)]
    for model, row in table.items():
        # The paper's average takes MME/28 and is cut to one decimal. A part of the rows has none.
        if row.keys() >= set(PAPER) and not (in_part and row is ours):
            total = sum(row[name] / (28 if name == "mme" else 1) for name in PAPER)
            row["average"] = math.floor(total / len(PAPER) * 10 + 1e-9) / 10
        texts = [f"| {model:24}"]
        for name, title in titles.items():
            value = row.get(name)
            text = "–" if value is None else f"{value:.{0 if name == 'mme' else 1}f}"
            texts.append(f"{text:>{max(5, len(title))}}")
        lines.append(" | ".join(texts) + " |")
    lines.append("")
    for name, result in results.items():
        counts = ", ".join(f"{n} {what}" for what, n in result["counts"].items() if n)
        note = "" if result["published file"] else ", not the published file"
        low, high = result["interval"]
        lines.append(f"- {name}: 95 % interval {low:.1f} to {high:.1f}, {counts}{note}")
    return lines

def report(args, label, settings, results):
    """Prints and writes the table. What was asked in the same way before stays in it."""
    file = args.out / "scores.json"
    with using(file):
        before = json.loads(file.read_text()) if file.exists() else {"settings": None}
        if before["settings"] == settings:
            results = before["benchmarks"] | results
        text = "\n".join(table_lines(results, label))
    (args.out / "table.md").write_text(text + "\n", encoding="utf-8")
    new = Path(f"{file}.new")
    all_parts = {"model": label, "settings": settings, "benchmarks": results}
    new.write_text(json.dumps(all_parts, indent=1))
    put(new, file)
    print(f"\n{text}\n\nin {args.out / 'table.md'}; all parts in {file}")

# ─── 6. Main ──────────────────────────────────────────────────────────────────────────────────────

FLAGS = {  # name: default and help
    "--model": ("tiny", f"tiny, {', '.join(SHORT_NAMES)}, a Hub id or a folder"),
    "--data": ("", "folder of the TSV files; else $LMUData or ~/LMUData"),
    "--benchmarks": (",".join(PAPER), "which; also mathvision_mini"),
    "--predictions": ("", "responses of another engine to one benchmark"),
    "--out": ("", "folder; else runs/<model>/eval, or eval/ beside --predictions"),
    "--limit": (0, "only the first N rows of each; 0 = all"),
    "--max-new-tokens": (2048, "completion limit"),
    "--max-pixels": (1_003_520, "larger images are shrunk (1,280 tokens)"),
    "--batch-size": (16, "questions answered at once"),
    "--device": ("auto", "auto, cpu or cuda"),
}

def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    for name, (default, text) in FLAGS.items():
        text += f" ({default!r})"
        parser.add_argument(name, default=default, type=type(default), help=text)
    parser.add_argument("--plain", default=None, action=argparse.BooleanOptionalAction,
                        help="no template; default: as the run was trained")
    args = parser.parse_args(argv)
    args.benchmarks = args.benchmarks.replace(" ", "").strip(",").split(",")
    if wrong := [name for name in args.benchmarks if name not in BENCHMARKS]:
        raise UserError(f"no benchmark {', '.join(wrong)}; there are {', '.join(BENCHMARKS)}")
    if args.predictions and len(args.benchmarks) != 1:
        raise UserError("--predictions needs one name in --benchmarks")
    if min(args.batch_size, args.max_new_tokens, args.limit + 1) < 1:
        raise UserError("numbers must be positive")
    return args

def use_tiny(args):
    """--model tiny: the run of `python stepgrpo.py`, and miniatures as data."""
    if not Path("runs/tiny/checkpoint").is_dir():
        raise UserError("there is no runs/tiny: run python stepgrpo.py first")
    args.model = "runs/tiny"
    args.max_new_tokens = min(args.max_new_tokens, TINY["max_new_tokens"])  # as in training
    if not args.data:
        subprocess.run([sys.executable, HERE / "data" / "miniatures.py"], check=True)
        args.data = HERE / "data" / "miniatures"

def load(args):
    """Model, processor, and the settings on which the responses depend."""
    device = pick_device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, processor = load_model(args.model, device, dtype, args.max_pixels)
    config = Path(args.model) / "config.json"
    if args.plain is None:
        with using(config):
            trained = json.loads(config.read_text()) if config.is_file() else {}
            args.plain = trained.get("instruction") is False
    # A short text that changes with the weights.
    sample = [p.flatten()[::p.numel() // 64 + 1].tolist() for p in model.parameters()]
    return model, processor, {
        "weights": hashlib.md5(repr(sample).encode()).hexdigest(),
        "instruction": "" if args.plain else build_instruction(""),
        "max_new_tokens": args.max_new_tokens, "max_pixels": args.max_pixels}

def run(args):
    """Files, model, responses, scores, table."""
    if args.model == "tiny" and not args.predictions:
        use_tiny(args)
    files = {name: find_file(name, args.data) for name in args.benchmarks}
    # A bad row is named now, and not hours later.
    for name, file in files.items():
        read_rows(name, file)
    if args.predictions:
        label, folder = args.predictions, Path(args.predictions).parent
        given, settings = read_predictions(Path(label)), {"folder": str(folder.resolve())}
        respond = lambda *_: given
    else:
        label, folder = args.model, Path("runs", Path(args.model).name)
        model, processor, settings = load(args)
        respond = partial(predict, args, model, processor, settings)
    args.out = Path(args.out or folder / "eval")
    args.out.mkdir(parents=True, exist_ok=True)
    results = {name: evaluate(args, name, file, respond) for name, file in files.items()}
    report(args, label, settings | {"limit": args.limit}, results)

def main(argv=None):
    sys.stdout.reconfigure(errors="replace", line_buffering=True)
    try:
        run(parse_arguments(argv))
    except UserError as e:
        sys.exit(f"eval: {e}")
    except torch.OutOfMemoryError:
        sys.exit("eval: out of memory. Try a smaller --batch-size")
    except OSError as e:
        sys.exit(f"eval: {e}. The responses so far are kept")
    except KeyboardInterrupt:
        print("\nstopped. The same command goes on from here")
        sys.exit(130)

if __name__ == "__main__":
    main()

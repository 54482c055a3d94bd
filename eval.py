# SPDX-License-Identifier: MIT
"""Evaluates a checkpoint on the eight benchmarks of the R1-VL paper, by rule, and prints the paper's table with it.

    python eval.py                                                  # miniatures of the eight, nothing to download
    python eval.py --model runs/my-run                              # a run of stepgrpo.py, or a Hub id, or a folder
    python eval.py --model Qwen2-VL-2B --plain --benchmarks mme     # the base model's row: no reasoning template
    python eval.py --benchmarks mathvista --predictions FILE.jsonl  # score what another engine answered, no model

From a benchmark's file to a figure, and the function that does each step:

    rows        VLMEvalKit's TSV files, found or downloaded; images are read when they are asked for    read_tsv
    prompt      the row's question in the template of stepgrpo.py                                       build_prompt
    response    greedy decoding, kept in runs/<name>/eval/<benchmark>.jsonl as it comes                 predict
    statement   the words in which the response commits to its answer                                   statements
    score       1 or 0, by rule: letters, yes or no, numbers, texts, lists                              score
    figures     the paper's headline, its parts, and bootstrap intervals                     summarize, intervals

`score` and `summarize` need no model and take plain dicts. Where their verdicts differ from VLMEvalKit's, and why, is
listed in README.md.
"""
import argparse
import ast
import base64
import collections
import csv
import functools
import hashlib
import http.client
import io
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import torch
import transformers
from tqdm import tqdm

import stepgrpo as sg
from data.key_steps import Endpoint, RowError, Stop, TryAgain, chat_url


# ─── 1. Data: find, download, read ────────────────────────────────────────────────────────────────────────────────────

MD5 = functools.partial(hashlib.md5, usedforsecurity=False)    # else machines in FIPS mode refuse it
MISSING = {"", "na", "n/a", "none", "null", "nan"}             # what pandas reads as an empty cell, in lower case


def data_folders(given):
    """Folders in which the files may lie, the first for downloads: --data, then where VLMEvalKit keeps them."""
    folders = [given, os.environ.get("LMUData"), "~/LMUData"]
    return [Path(folder).expanduser() for folder in folders if folder]


def find_tsv(name, url, md5, folders):
    """Path of the file `name` in the first folder that has it, of whatever MD5; else it is downloaded to the first."""
    found = [folder / name for folder in folders if (folder / name).is_file()]
    return found[0] if found else download(url, folders[0] / name, md5)


def download(url, file, md5):
    """Download to `file`, which appears once it is whole and its MD5 right (None: any); returns it. UserError if not.

    What has come stays in `<file>.part`, also after Ctrl-C, and the next try goes on from there."""
    part, drops = Path(f"{file}.part"), 0
    while True:
        before = size_of(part)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            fetch_rest(url, part)
            break
        except (OSError, http.client.HTTPException) as e:      # URLError, HTTPError and timeouts are OSErrors
            if before and getattr(e, "code", None) == 416:     # nothing follows: the part is whole, or not of this file
                if md5_of(part) == md5:
                    break
                part.unlink()
                continue
            drops += 1
            if size_of(part) <= before or drops == 10:
                kept = f", which goes on from {part.name}," if size_of(part) else ""
                raise sg.UserError(f"cannot download {url}: {str(e) or type(e).__name__}. Try again{kept} or get it "
                                   f"elsewhere and save it in {file.parent} as {file.name}") from None
    found = md5_of(part)
    if md5 and found != md5:
        wrong = Path(f"{file}.wrong-md5")
        os.replace(part, wrong)
        raise sg.UserError(f"{url} has MD5 {found}, the published file has {md5}. It is kept as {wrong}: "
                           f"try again, or, if you trust it (a new version?), rename it to {file.name}")
    os.replace(part, file)
    return file


def fetch_rest(url, part):
    """Append to the file `part` what it lacks of `url`. ConnectionError if the connection ends too early."""
    have, headers = size_of(part), {"User-Agent": "stepgrpo"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as response:
        have = have if response.status == 206 else 0           # 200: the server knows no Range and sends all of it
        length = response.headers["Content-Length"]
        total = have + int(length) if length else None
        with (open(part, "ab" if have else "wb") as f,
              tqdm(desc=Path(part).stem, initial=have, total=total, unit="B", unit_scale=True) as bar):
            while block := response.read(1 << 16):
                bar.update(f.write(block))
            if total and f.tell() < total:                     # read() takes a lost connection for the end
                raise ConnectionError(f"the connection ended after {f.tell():,} of {total:,} bytes")


def size_of(file):
    return file.stat().st_size if file.exists() else 0


def md5_of(file):
    with open(file, "rb") as f:
        return hashlib.file_digest(f, MD5).hexdigest()


class TableRow(NamedTuple):
    """One row of a TSV file, without its images: those stay on disk."""
    where: str               # file and line, for every message about it
    offset: int              # byte at which it begins
    cells: dict              # column → text
    has_image: bool


class Table(NamedTuple):
    """A TSV file without its images, which row_images reads."""
    file: Path
    md5: str
    header: list             # names of the columns
    rows: dict               # index → TableRow, in the order of the file
    complaints: list         # '(file) line (number): what is wrong', for the rows that cannot be used


def read_tsv(file, columns=()):
    """TSV file in VLMEvalKit's layout → Table, in one pass that holds one row's images at a time. UserError if the
    file cannot be read or lacks one of `columns`."""
    csv.field_size_limit(1 << 26)    # 64 M characters: images fit, and a quote left open does not eat all memory
    digest, rows, complaints = MD5(), {}, []
    try:
        with open(file, "rb") as f:
            records = csv.reader(decoded_lines(file, f, digest), "excel-tab", strict=True)
            header = next(records, [])
            lacks = [name for name in ("index", *columns) if name not in header]
            if lacks:
                found = ", ".join(header)[:200] or "nothing"
                raise sg.UserError(f"{file} has no column {', '.join(lacks)}; its first line holds: {found}")
            while True:
                # The csv module takes lines one by one, so that the file stands where the next record begins.
                where, offset = f"{file} line {records.line_num + 1}", f.tell()
                try:
                    cells = next(records)
                    if any(map(str.strip, cells)):             # else a blank line
                        row = make_row(where, offset, header, cells, rows)
                        rows[row.cells["index"]] = row
                except StopIteration:
                    return Table(Path(file), digest.hexdigest(), header, rows, complaints)
                except csv.Error as e:
                    complaints.append(f"{where}: {e}, when read up to line {records.line_num}; is a quote left open?")
                except ValueError as e:
                    complaints.append(f"{where}: {e}")
    except (OSError, csv.Error) as e:                          # csv.Error: in the header
        raise sg.UserError(f"cannot read {file}: {e}") from None


def decoded_lines(file, f, digest):
    """Lines of the binary file `f` as text; `digest` gets their bytes. UserError if one is not UTF-8."""
    for number, line in enumerate(f, 1):
        digest.update(line)
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as e:
            raise sg.UserError(f"{file} line {number} is not UTF-8: {e.reason} at its byte {e.start + 1}") from None
        yield text


def make_row(where, offset, header, cells, rows):
    """The cells of a record → TableRow. ValueError says what is wrong with it."""
    if len(cells) != len(header):
        raise ValueError(f"has {len(cells)} cells, the header has {len(header)}")
    cells = dict(zip(header, cells))
    image, index = cells.pop("image", ""), cells["index"].strip()
    if not index:
        raise ValueError("the index is empty")
    if index in rows:
        raise ValueError(f"has the index {index[:64]!r} of {rows[index].where}")
    return TableRow(where, offset, cells | {"index": index}, image.strip().lower() not in {*MISSING, "[]"})


def cell(row, column):
    """A cell as text, numbers as they print; '' when it is missing (None, NaN, '' and what pandas takes for that)."""
    text = str(row.get(column, "")).strip()
    return "" if text.lower() in MISSING else text


def row_images(table, row, max_pixels):
    """RGB images of a row, upright and of at most `max_pixels`; [] if it has none. ValueError says what is wrong."""
    return [decode_image(text, max_pixels) for text in image_texts(table, row)] if row.has_image else []


def image_texts(table, row, seen=()):
    """The image cell of a row, read from disk → list of base64 texts. References to other rows are followed."""
    with open(table.file, "rb") as f:
        f.seek(row.offset)
        record = next(csv.reader(map(bytes.decode, f), "excel-tab", strict=True))
    cell = record[table.header.index("image")].strip()
    try:
        texts = [str(text).strip() for text in ast.literal_eval(cell)] if cell.startswith("[") else [cell]
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise ValueError("the image cell begins like a list, but is none") from None
    found, seen = [], (*seen, row.cells["index"])
    for text in texts:
        if len(text) > 64:                                     # no image is that small, and no index that long
            found.append(text)
        elif text in seen:
            raise ValueError(f"its image is a reference in a circle: {' → '.join((*seen, text))}")
        elif text not in table.rows or not table.rows[text].has_image:
            raise ValueError(f"its image is said to be that of row {text!r}, which does not exist or has none")
        else:
            found += image_texts(table, table.rows[text], seen)
    return found


def decode_image(text, max_pixels):
    """Image in base64, with or without blanks and a data: prefix → RGB image. ValueError if it is none."""
    text = "".join(text.split()).rpartition("base64,")[2]
    try:
        return sg.load_image(io.BytesIO(base64.b64decode(text, validate=True)), max_pixels)
    except (sg.UserError, ValueError) as e:
        why = re.sub(r" '?<_io.BytesIO[^>]*>'?", "", str(e))   # load_image names its file, and there is none
        raise ValueError(f"its image cell holds no base64 of an image: {why}") from None


# ─── 2. From response to statement ────────────────────────────────────────────────────────────────────────────────────

# Full-width letters and digits, and Chinese punctuation, to ASCII.
_ASCII = str.maketrans({code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {"。": ".", "、": ",", "−": "-"})
_WRAPPER = re.compile(r"\\(?:boxed|fbox|text[a-z]*|math[a-z]*) ?\{([^{}]*)\}")
_BREAK = re.compile(r"\n\s*\n")
_SENTENCE = re.compile(r"(?<=[.!?]) +|\n+")
_EXPLICIT = re.compile(                                        # its end is where the answer begins
    r'"[^"\n]{0,30}answer" *:'                                 # JSON
    r"|\b(?:answer|option|choice|statement)\b[^.\n:]{0,60}? (?:is|are|would be|must be|should be)\b *:?"
    r"|\b(?:answer|option|choice) *[:=]|答案[是为选:]*", re.I)
_LEAD_IN = re.compile(
    r"(?:(?:so|thus|hence|therefore|then|okay|sure|finally)\b,? *)?"
    r"(?:(?:it|that|this|there|the statement)(?: is| are|['’]s) +|i (?:would |will )?(?:choose|select|pick) +)?"
    r"(?:(?:(?:the|my) +)?(?:(?:correct|right|best|final) +)*"
    r"(?:answer|option|choice)\b *(?:is\b|[:=])* *(?:option\b)?)? *"
    r"(?:(?:应该?|故)?选[项择]?[是为:]* *|[是为] *(?=[A-Za-z0-9(]))?", re.I)
_REASON = re.compile(r",? +(?:because|since|as|which|although|though|but)\b|, *(?:so|not|it|the|this|they)\b|[.;:] |\n",
                     re.I)


def statements(response):
    """The texts in which a response may commit to its answer, the best first; [] when there are none.

    What stands under the last 'The final answer is' header, or else an explicit statement ('the answer is …',
    \\boxed{…}), or else a short response, its last sentence, last bold words or first sentence. A response in the
    template that was cut off before its answer has given only what it states explicitly.
    """
    response = response[-20_000:].translate(_ASCII)            # twice what 2,048 tokens fill; the answer is at the end
    sections = sg.split_path(response)
    if sections.answer is not None:
        found = [last_explicit(sections.answer), first_paragraph(sections.answer)]
    elif sections.order:
        found = [last_explicit(response)]
    else:
        paragraphs = [p for p in _BREAK.split(response.strip()) if p] or [""]
        found = [last_explicit(response), paragraphs[-1], _SENTENCE.split(paragraphs[-1])[-1],
                 *re.findall(r"\*\*([^*\n]{1,80})\*\*", response)[-1:], _SENTENCE.split(paragraphs[0])[0]]
    return [text for text in dict.fromkeys(plain(text[:1000]) for text in found) if text]


def first_paragraph(text):
    return _BREAK.split(text.strip(), maxsplit=1)[0]


def last_explicit(text):
    """What the last explicit statement of an answer says, or ''."""
    ends = [m.end() for m in _EXPLICIT.finditer(text)]
    start = text.rfind("\\boxed{")
    if start >= 0:                                             # braces of \boxed nest
        depth = 0
        for i, c in enumerate(text[start + 6:start + 1000], start + 6):
            depth += (c == "{") - (c == "}")
            if depth == 0:
                return text[start + 7:i] if not ends or ends[-1] < i else first_paragraph(text[ends[-1]:])
    return first_paragraph(text[ends[-1]:]) if ends else ""


def plain(text):
    """A statement without what surrounds it: JSON, lead-in, decoration, LaTeX's \\text{}, brackets around the whole."""
    for _ in range(6):
        before = text
        text = sg.strip_decoration(re.sub(r"\*\*+", "", text)).strip("_ ,!✓✔✅")
        text = re.sub(r'"\s*\}\Z', "", text)                   # the end of a JSON object
        text = re.sub(r"\A[\[{]([^\[\]{},]*)[\]}]\Z", r"\1", _WRAPPER.sub(r"\1", text))
        text = text[_LEAD_IN.match(text).end():].strip() or text
        if text == before:
            break
    return text


def shortened(text):
    """A statement without the reason that is given after it."""
    return plain(re.sub(r"\s\([^()]*\)\Z", "", _REASON.split(text, maxsplit=1)[0]))


def forms(text):
    """A statement, and what is left of it: without the reason given after it, then what stands after 'is' or '=', then
    what stands before 'is', unless something is denied or compared ('Japan has the highest bar')."""
    short = shortened(text)
    tail = re.split(r"\b(?:is|are|was|were|be|in|equals)\b|=", short)[-1]
    subject = "" if _NO_CLAIM.search(text) else re.split(r"\b(?:is|are|was|were|has|have|had)\b", short)[0]
    return list(dict.fromkeys(t for t in (text, short, plain(tail), plain(subject)) if t))


# ─── 3. Values: numbers, texts, options ───────────────────────────────────────────────────────────────────────────────

_SMALL = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
          "seventeen eighteen nineteen").split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_NUMBER_WORDS = {word: n for n, word in enumerate(_SMALL)} | {word: 20 + 10 * n for n, word in enumerate(_TENS)}
_SCALES = {"hundred": 1e2, "thousand": 1e3, "million": 1e6, "billion": 1e9, "half": 1 / 2, "halves": 1 / 2,
           "third": 1 / 3, "quarter": 1 / 4, "fourth": 1 / 4, "fifth": 1 / 5,
           "sixth": 1 / 6, "seventh": 1 / 7, "eighth": 1 / 8, "ninth": 1 / 9, "tenth": 1 / 10}
_NUMBER = re.compile(r"-?(?:\d{1,400}(?:\.\d{1,400})?|\.\d{1,400})(?:e[-+]?\d{1,3})?")
_RANGE = re.compile(r"\d+(?: - -?\d+)+")                       # 2014-2016, 5-2-3-4-1: codes, not differences
_UNITS = re.compile(rf"(?:(?:{sg._UNIT_WORD})(?: \^ -?[23])?(?: |\Z)){{0,5}}")
_ABOUT = re.compile(r"\A(?:(?:about|approximately|approx\.?|around|roughly|nearly|almost|exactly|only|a total of) +"
                    r"|[≈≃~+€£¥] *)+", re.I)
_NO_CLAIM = re.compile(r"\b(?:not?|never|neither|nor|between|or|from|cannot|than|at least|at most)\b|n't\b", re.I)


def _sum(tokens):
    """Recursive descent over a deque of canonical tokens that ends in ''. ValueError: no expression."""
    value = _product(tokens)
    while tokens[0] in ("+", "-"):
        value += _product(tokens) if tokens.popleft() == "+" else -_product(tokens)
    return value


def _product(tokens):
    value = _power(tokens)
    while tokens[0] in ("*", "/", "√", "π", "("):              # without a sign too: 2√3, 9π, 2(3)
        sign = tokens.popleft() if tokens[0] in ("*", "/") else "*"
        factor = _power(tokens)
        value = value / factor if sign == "/" else value * factor
    return value


def _power(tokens):
    value = _atom(tokens)
    if tokens[0] == "^":
        tokens.popleft()
        value **= min(_atom(tokens), 1000.0)
    return value


def _atom(tokens):
    token = tokens.popleft()
    if token == "-":
        return -_power(tokens)
    if token == "π":
        return math.pi
    if token == "√":
        return math.sqrt(_atom(tokens))
    if token == "(":
        value = _sum(tokens)
        if tokens.popleft() != ")":
            raise ValueError("unbalanced")
        return value
    if not _NUMBER.fullmatch(token):
        raise ValueError("no number")
    value = float(token)
    if len(tokens) > 3 and tokens[1] == "/" and tokens[0].isdigit() and tokens[2].isdigit():       # mixed: 4 4 / 5
        whole, top, _, bottom = value, tokens.popleft(), tokens.popleft(), tokens.popleft()
        value += math.copysign(float(top) / float(bottom), whole)
    return value


def spell_numbers(text):
    """Number words as digits: 'four thousand two hundred and sixty-five' → '4265', 'two and a half' → '2 1/2'."""
    def digits(match):
        total = group = 0
        for word in re.findall("[a-z]+", match[0].lower()):
            if word == "hundred":
                group *= 100
            elif word in _SCALES:
                total, group = total + group * int(_SCALES[word]), 0
            else:
                group += _NUMBER_WORDS.get(word, 0)            # 'and' adds nothing
        return str(total + group)

    text = re.sub(r"\A(?:a )?(half|third|quarter)\b", r"1 \1", text, flags=re.I)
    words = "|".join(_NUMBER_WORDS)
    more = rf"(?:[- ]+(?:and )?(?:{words}|hundred|thousand|million|billion)\b)*"
    text = re.sub(rf"\b(?:{words})\b{more}", digits, text, flags=re.I)
    return re.sub(r"\b(\d+) and a half\b", r"\1 1/2", text)


def quantity(text):
    """'2\\sqrt{3}', '4 4/5 cm', '13.5 thousand', 'x = 3', 'about 60%' → (value, unit), or None if it is no number.

    A number may be followed by words, its unit. Nothing is evaluated as code; what is too long, too deep or too large
    is no number."""
    text = _ABOUT.sub("", spell_numbers(text[:1000])).split("=")[-1]
    text = re.sub(r"\A\s*(\d{1,3}(?: \d{3})+)\b(?! ?/)", lambda m: m[1].replace(" ", ""), text)      # 8 336 817
    tokens = sg.canonical(_ABOUT.sub("", text.strip())).split()
    if not 0 < len(tokens) <= 60 or _RANGE.fullmatch(" ".join(tokens)):
        return None
    rest = collections.deque([*tokens, ""])
    try:
        value = float(_sum(rest))
    except (ValueError, TypeError, IndexError, ArithmeticError):   # TypeError: a root of a negative number is complex
        return None
    words = list(rest)[:-1]
    while words and words[0].rstrip("s") in _SCALES or words[:1] == ["halves"]:
        value *= _SCALES.get(words[0], _SCALES.get(words[0].rstrip("s")))
        words = words[1:]
    unit = " ".join(words)
    return (value, sg.plain_unit(unit)) if math.isfinite(value) and _UNITS.fullmatch(unit) else None


def quantities(text):
    """The quantities that a statement equates ('2π/3 ≈ 2.094'), or the only number of a sentence; [] for none."""
    text = text.replace(r"\approx", "≈")
    found = [quantity(part) for form in (text, shortened(text)) for part in re.split("[≈≃]", form) if part.strip()]
    if any(found):
        return [q for q in found if q]
    halves = re.split(r"\b(?:is|are|was|were|equals)\b", text)  # In 2014, the value was 14
    if len(halves) == 2 and quantity(halves[1]) and not _NO_CLAIM.search(text):
        return [quantity(halves[1])]
    tokens = sg.canonical(spell_numbers(text[:1000])).split()
    numbers = [i for i, token in enumerate(tokens) if _NUMBER.fullmatch(token)]
    if len(numbers) != 1 or _NO_CLAIM.search(text) or not re.search(r"[^\W\d_]{2}", text):       # 12k is no sentence
        return []
    i = numbers[0]
    return [q for q in [quantity(" ".join(tokens[i:i + 2])) or quantity(tokens[i])] if q]


def same_words(a, b):
    """One canonical spelling, articles aside; AM or PM may be left out ('13:18 PM')."""
    a, b = (re.sub(r"\A(?:the|an?) +(?=\S)", "", plain(side[:1000]), flags=re.I) for side in (a, b))
    a, b = (re.sub(r" ?_ ?", "", sg.canonical(side)) for side in (a, b))                           # CO_2 is CO2
    a, b = (re.sub(r"\A0?(\d{1,2}) : 0?(\d{1,2})\b", r"\1 : \2", side) for side in (a, b))          # 04:45 is 4:45
    short_a, short_b = (re.sub(r" [ap]m\Z", "", side) for side in (a, b))
    return bool(a) and (a == b or (short_a == short_b and (a == short_a or b == short_b)))


def same_text(a, b):
    """Whether two texts say the same, in words or as the same quantity."""
    one, other = quantity(a), quantity(b)
    same_quantity = one and other and math.isclose(one[0], other[0], rel_tol=1e-9, abs_tol=1e-9)
    return same_words(a, b) or bool(same_quantity and same_unit(one[1], other[1]))


def same_unit(a, b):
    """Units may be left out but not differ; only the first word counts ('5 m' is '5 m wide')."""
    return not a or not b or a.split()[0] == b.split()[0]


def options_in(question):
    """{letter: text} of the options that a question lists: '(A) yes (B) no', or lines 'A:yes' below 'Choices:'."""
    inline = re.findall(r"\(([A-H])\)\s*(.*?)\s*(?=\([A-H]\)|\Z)", question, re.S)
    lines = re.findall(r"^([A-H])[.:]\s*(.*)$", question.split("Choice")[-1], re.M)
    return next((dict(found) for found in (inline, lines) if found and found[0][0] == "A"), {})


_SEPARATOR = r"(?:\s*[,/&;\n]\s*(?:and |or )?|\s+(?:and|or)\s+|\s*[与和或及]\s*)"
_LETTERS = re.compile(rf"\(?[A-H]\)?(?:{_SEPARATOR}(?:option )?\(?[A-H]\b\)?(?! [a-z]))+|[A-H]{{2,8}}\Z")
_LETTER = re.compile(
    r"[(\[<]?([A-H])[)\]>]?(?:[.:),;项]|\s*[-–—]\s|\s*\n|\s*(?=\()|(?<=[)\]>])\s*|\Z"
    r"|\s+(?=(?:because|since|as|with|is (?:the )?(?:correct|right|best|answer))\b))(.*)", re.S)
_LOWER_LETTER = re.compile(r"(?:\(([a-h])\)|([a-h])(?=[.):]|\Z)[.):]?)(.*)", re.S)
_LAST_LETTER = re.compile(r"(.+?)(?:,? option |, (?:so )?|\s*\((?:option )?)([A-H])\)?", re.S)


def chosen(text, options):
    """Set of the option letters that a statement chooses; empty when it chooses none.

    A letter counts, alone or with a reason, with its option's text or glued to it, and so does the text of an option
    alone. A letter with another option's text chooses both, that is, nothing.
    """
    def equal(text):
        for same in (same_words, same_text):
            found = {letter for letter, option in options.items() if option and text and same(text, option)}
            if found:
                return found
        return set()

    if len(text) == 1 and text.upper() in options:             # before the texts: options may be letters themselves
        return {text.upper()}
    if equal(text):
        return equal(text)
    several = _LETTERS.match(text)
    if several:
        return set(re.findall(r"[A-H]", several[0]))
    glued = text[:1].upper()
    if glued in options and glued in equal(text[1:]):
        return {glued}
    match = _LETTER.match(text) or _LOWER_LETTER.match(text)
    if match:
        letter, rest = (match[1] or match[match.lastindex - 1]).upper(), plain(match[match.lastindex])
        said = equal(rest) | equal(shortened(rest))
        return {letter} if not said or letter in said else {letter} | said
    match = _LAST_LETTER.fullmatch(text)
    if match:
        said = equal(plain(match[1]))
        return {match[2]} | (said if match[2] not in said else set())
    noun = re.fullmatch(r"\w+ ([A-H])", text)                  # Picture E, where the options are only letters
    if noun and all(len(option) < 2 for option in options.values()):
        return {noun[1]}
    return next(filter(None, map(equal, [*forms(text), yes_or_no(text)])), set())


_YES_NO = re.compile(
    r"(?:(yes|yeah|yep)|(no(?:pe)?)(?! (?:doubt|idea|problem|information|answer)\b))(?![a-z])"
    r"|(?:(true|correct|right|是的?|对的?|正确)|(false|incorrect|wrong|not (?:true|correct|right)|否|不是|不对|不正确|没有|错误?))"
    r"(?![a-z]| (?:of|side|answer|to)\b)", re.I)


def yes_or_no(text, options=None):
    """'Yes', 'No' or '' of a statement: its first word, or the first one outside quotes that a sign of punctuation
    follows. With `options`, {"A": "Yes", "B": "No"}, a letter counts too, and must not contradict the word."""
    if re.match(r"neither\b", text, re.I):
        return ""
    letter = re.match(r"\(?([AB])\)?(?![a-z]| [a-z])[.:), ]*", text, re.I)
    text = text[letter.end():].strip("( ") if letter else text
    word = _YES_NO.match(text)
    if not word:
        unquoted = re.sub(r'"[^"]*("|\Z)', "", text)
        word = re.search(r"(?<!not )\b(?:(yes)|(no))\b(?=[,.:;!]|\Z)", unquoted, re.I)
    if word and re.match(r"\W*(?:or|and|/)\W*(?:yes|no)\b", text[word.end():], re.I):          # both
        return ""
    said = "" if not word else "Yes" if word[1] or word.re is _YES_NO and word[3] else "No"
    if letter and options:
        by_letter = options[letter[1].upper()]
        return by_letter if said in ("", by_letter) else ""
    return said


# ─── 4. Scores ────────────────────────────────────────────────────────────────────────────────────────────────────────

class Score(float):
    """1.0 or 0.0, and the `answer` it was given for: None when the response states none (unparsed)."""
    answer = None


def grade(answer, right):
    score = Score(right)
    score.answer = answer or None
    return score


def grade_choice(response, options, gold):
    """Letters. gold: a letter, several ('C\\nD'), or the text of an option."""
    wanted = set(re.findall(r"\b[A-H]\b", gold)) if re.fullmatch(r"[\W_]*[A-H]\b(?:[\W_]+[A-H]\b)*[\W_]*", gold) else {
        letter for letter, option in options.items() if same_text(option, gold)}
    if not wanted:
        raise ValueError(f"the right answer {gold!r} is none of the options {options}")
    # Published rows list an option twice: then its text means the one that is right.
    options = dict.fromkeys(sorted(wanted), "") | {
        letter: option for letter, option in options.items()
        if letter in wanted or not any(same_words(option, options.get(x, "")) for x in wanted)}
    for text in statements(response):
        letters = chosen(text, options)
        if letters:
            return grade(", ".join(sorted(letters)), letters == wanted)
    return grade(None, False)


def grade_yes_no(response, gold, options=None):
    if gold.capitalize() not in ("Yes", "No"):
        raise ValueError(f"the right answer is {gold!r}, neither Yes nor No")
    answer = next(filter(None, (yes_or_no(text, options) for text in statements(response))), None)
    return grade(answer, answer == gold.capitalize())


_NAME = re.compile(r"\W*([A-Za-z])\W*=")                        # y = -3 is not x = -3


def grade_value(response, gold, close, question=""):
    """A free-form answer: a list, a number or a text, as the gold one is. close(predicted, gold) compares numbers."""
    items, number = split_list(gold), quantity(gold)
    if not number and all(map(quantity, split_list(f"[{gold}]"))):         # a list without brackets
        items = items or split_list(f"[{gold}]")
    if items:
        return grade_list(response, items, close)
    if not number:
        return grade_text(response, gold)
    for text in statements(response):
        found = quantities(text)
        if found:
            names = {name[1] for name in map(_NAME.match, (gold, text)) if name}
            right = len(names) < 2 and any(same_number(q, number, close, question) for q in found)
            return grade(text, right or sg.canonical(text) == sg.canonical(gold))
    return grade(None, False)


def same_number(predicted, gold, close, question=""):
    """Quantities (value, unit). A percent sign reads as /100 on both sides or on neither; on neither only where the
    gold answer has one too, or the question asks for percent."""
    (p, p_unit), (g, g_unit) = predicted, gold
    readings = []
    if "%" in (p_unit, g_unit):
        readings.append((p / 100 if p_unit == "%" else p, g / 100 if g_unit == "%" else g))
    if p_unit != "%" or g_unit == "%" or re.search(r"percent|%", question, re.I):
        readings.append((p, g))
    same = "%" in (p_unit, g_unit) or same_unit(p_unit, g_unit)
    return same and any(close(*pair) for pair in readings)


def split_list(text):
    """Items of '[2014, 2016]', "['Yes', 'No']" or '(3, 4)'; [] when a text is no list in brackets."""
    match = re.fullmatch(r"[\[({](.*,.*)[\])}]", re.sub(r"\\left|\\right|[$\s]", " ", text).strip(), re.S)
    return [plain(item) for item in match[1].split(",")] if match else []


def grade_list(response, gold, close):
    """All items, none besides; numbers in their order, texts in any."""
    def same(a, b):
        return same_number(quantity(a), quantity(b), close) if quantity(a) and quantity(b) else same_text(a, b)

    def same_in_any_order(items):
        left = list(items)
        for wanted in gold:
            match = next((n for n, item in enumerate(left) if same(item, wanted)), None)
            if match is None:
                return False
            del left[match]
        return True

    found = statements(response)
    for text in found:
        inside = re.findall(r"[\[(][^\[\]()]*,[^\[\]()]*[\])]", text)                               # in a sentence
        items = split_list(text) or split_list(inside[0] if len(inside) == 1 else f"[{re.sub(' and ', ', ', text)}]")
        if items:
            right = all(map(same, items, gold)) or (not any(map(quantity, gold)) and same_in_any_order(items))
            return grade(text, right and len(items) == len(gold))
    return grade(found[0] if found else None, False)


def grade_text(response, gold):
    found = statements(response)
    right = next((text for text in found if any(same_text(form, gold) for form in forms(text))), None)
    return grade(right or (found[0] if found else None), right is not None)


def mmstar_options(row):
    return {letter: cell(row, letter) for letter in "ABCDEFGH" if cell(row, letter)}


def choices_of(row):
    choices = ast.literal_eval(cell(row, "choices") or "[]")
    if not isinstance(choices, list):
        raise ValueError(f"choices {choices!r} are no list")
    return {chr(ord("A") + i): str(choice) for i, choice in enumerate(choices)}


def score_mathvista(row, response):
    gold, precision = str(row["answer"]), cell(row, "precision")
    if cell(row, "question_type") == "multi_choice":
        return grade_choice(response, choices_of(row), cell(row, "answer_option") or gold)
    if precision and not math.isfinite(float(precision)):
        raise ValueError(f"precision {precision} is no number of decimals")
    decimals = int(float(precision)) if precision else len(gold.partition(".")[2])
    if cell(row, "answer_type") == "integer":
        decimals = 0
    return grade_value(response, gold, lambda p, g: round(p, decimals) == round(g, decimals), cell(row, "question"))


def score_mmstar(row, response):
    return grade_choice(response, mmstar_options(row), str(row["answer"]))


def nearly(p, g):
    return abs(p - g) < 1e-6


def score_mathvision(row, response):
    if choices_of(row):
        return grade_choice(response, choices_of(row), str(row["answer"]))
    return grade_value(response, str(row["answer"]), nearly)


def score_chartqa(row, response):
    def close(p, g):                                           # of the gold answer, years included
        return abs(p - g) <= 0.05 * abs(g) + 1e-12

    return grade_value(response, str(row["answer"]), close, cell(row, "question"))


def score_dynamath(row, response):
    if "choice" in cell(row, "answer_type"):
        return grade_choice(response, options_in(cell(row, "question")), str(row["answer"]))
    return grade_value(response, str(row["answer"]), lambda p, g: abs(p - g) <= 0.001 + 1e-9)


def score_hallusionbench(row, response):
    return grade_yes_no(response, str(row["answer"]), {"A": "Yes", "B": "No"})


def score_mathverse(row, response):
    if cell(row, "question_type") == "multi-choice":
        options = options_in(cell(row, "question_for_eval") or cell(row, "question"))
        return grade_choice(response, options, str(row["answer"]))
    return grade_value(response, str(row["answer"]), nearly)


def score_mme(row, response):
    return grade_yes_no(response, str(row["answer"]))


# ─── 5. Prompts, and the table of benchmarks ──────────────────────────────────────────────────────────────────────────

def mmstar_question(row):
    hint = f"Hint: {cell(row, 'hint')}\n" if cell(row, "hint") else ""
    options = "".join(f"{letter}: {text}\n" for letter, text in mmstar_options(row).items())
    return (f"{hint}Question: {cell(row, 'question')}\nChoices:\n{options}"
            "Please select the correct answer from the choices above.")


def hallusionbench_question(row):
    return f"{cell(row, 'question')}\nChoices:\nA: Yes\nB: No"


def hallusionbench_place(row):
    """l2-category, set, figure and question; index is {VD or VS}_{subcategory}_{visual}_{set}_{figure}_{question}."""
    parts = cell(row, "index").split("_")
    if len(parts) < 6:
        raise ValueError(f"the index {cell(row, 'index')!r} names no set, figure and question")
    return cell(row, "l2-category"), *parts[-3:]


def hallusionbench_units(rows):
    """A figure, and a question, counts as right when all its rows are."""
    places = [hallusionbench_place(row) for row in rows]
    return {"aAcc": range(len(rows)), "fAcc": [(kind, of_set, figure) for kind, of_set, figure, _ in places],
            "qAcc": [(kind, of_set, question) for kind, of_set, _, question in places]}


def dynamath_units(rows):
    """Average over all variants; worst case: a question is right when all its variants are."""
    return {"average": range(len(rows)), "worst case": [cell(row, "qid") for row in rows]}


REASONING = {"code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation"}


def mme_units(rows):
    """acc by question and acc+ by image (both questions right), of each category."""
    units = {}
    for category in dict.fromkeys(cell(row, "category") for row in rows):
        inside = [cell(row, "category") == category for row in rows]
        units[f"{category} acc"] = [i if yes else None for i, yes in enumerate(inside)]
        units[f"{category} acc+"] = [cell(row, "image_path") if yes else None for row, yes in zip(rows, inside)]
    return units


def mme_totals(shares):
    """acc + acc+ by category, 200 at most; perception is the sum of ten categories, reasoning that of four."""
    parts = {name[:-4]: share + shares[name + "+"] for name, share in shares.items() if name.endswith(" acc")}
    zero = 0 * next(iter(parts.values()))
    perception = sum((value for name, value in parts.items() if name not in REASONING), zero)
    reasoning = sum((value for name, value in parts.items() if name in REASONING), zero)
    return {"perception + reasoning": perception + reasoning, "perception": perception, "reasoning": reasoning, **parts}


class Benchmark(NamedTuple):
    """All that sets one benchmark apart from the others."""
    title: str                   # in the table
    file: str
    md5: str
    columns: tuple               # that its file must have, beside index and image
    score: Callable              # row, response → Score
    question: Callable = lambda row: cell(row, "question")
    units: Callable = lambda rows: {"accuracy": range(len(rows))}      # figure: for each row the unit it counts in
    totals: Callable = lambda shares: {}                               # what is computed from the shares of right units
    cluster: Callable = lambda row: cell(row, "index")                 # rows that the bootstrap draws together
    parts: tuple = ()            # columns to break the accuracy down by
    url: str = "https://opencompass.openxlab.space/utils/VLMEval/"


BENCHMARKS = {
    "mathvista": Benchmark(
        "MathVista", "MathVista_MINI.tsv", "f199b98e178e5a2a20e7048f5dcb0464",
        ("question", "answer", "answer_option", "choices", "question_type", "answer_type"), score_mathvista,
        parts=("question_type", "answer_type", "task")),
    "mmstar": Benchmark(
        "MMStar", "MMStar.tsv", "e1ecd2140806c1b1bbf54b43372efb9e", ("question", "A", "B", "C", "D", "answer"),
        score_mmstar, question=mmstar_question, parts=("category", "l2_category")),
    "mathvision": Benchmark(
        "Math-V", "MathVision.tsv", "93f6de14f7916e598aa1b7165589831e", ("question", "choices", "answer"),
        score_mathvision, parts=("category", "level")),
    "chartqa": Benchmark(
        "ChartQA", "ChartQA_TEST.tsv", "c902e0aa9be5582a7aad6dcf52734b42", ("question", "answer", "split"),
        score_chartqa, parts=("split",)),
    "dynamath": Benchmark(
        "DynaMath", "DynaMath.tsv", "b8425ad9a7114571fc9366e013699494",
        ("qid", "varid", "question", "answer", "answer_type"), score_dynamath, units=dynamath_units,
        cluster=lambda row: cell(row, "qid"), parts=("answer_type", "subject", "knowledge_level")),
    "hallusionbench": Benchmark(
        "HallBench", "HallusionBench.tsv", "0c23ac0dc9ef46832d7a24504f2a0c7c", ("question", "answer", "l2-category"),
        score_hallusionbench, question=hallusionbench_question, units=hallusionbench_units,
        totals=lambda shares: {"mean of aAcc, fAcc, qAcc": sum(shares[x] for x in ("aAcc", "fAcc", "qAcc")) / 3},
        cluster=lambda row: hallusionbench_place(row)[:2], parts=("category",)),
    "mathverse": Benchmark(
        "MathVerse", "testmini.tsv", "5017caca32b7fa110c350a1bea861b65",
        ("question", "question_for_eval", "answer", "question_type", "problem_index", "problem_version"),
        score_mathverse, cluster=lambda row: cell(row, "problem_index"), parts=("problem_version", "question_type"),
        url="https://huggingface.co/datasets/CaraJ/Mathverse_VLMEvalKit/resolve/main/"),
    "mme": Benchmark(
        "MME", "MME.tsv", "b36b43c3f09801f5d368627fb92187c3", ("image_path", "question", "answer", "category"),
        score_mme, units=mme_units, totals=mme_totals,
        cluster=lambda row: (cell(row, "category"), cell(row, "image_path"))),
}
PAPER = tuple(BENCHMARKS)                                       # the eight columns of the paper's table
BENCHMARKS["mathvision_mini"] = BENCHMARKS["mathvision"]._replace(
    title="Math-V mini", file="MathVision_MINI.tsv", md5="060fe4fa5d868987ce179307bd5f8a33")


def build_prompt(benchmark, row, plain=False):
    """The user's turn: the row's question in the reasoning template, as R1-VL's evaluation builds it; `plain`: bare."""
    question = BENCHMARKS[benchmark].question(row)
    if plain:
        return question
    return sg.build_instruction(question if "Question: " in question else f"Question: {question}")


def score(benchmark, row, response):
    """Score, 1.0 or 0.0, of a response to a row (a dict of TSV columns). ValueError: the row is malformed.

    By rule, without a judge model. Needs nothing but the row, so other engines' responses can be scored."""
    if row.get("answer") in (None, "") or row["answer"] != row["answer"]:                          # NaN equals nothing
        raise ValueError(f"{benchmark} row: the answer is missing")
    response = response if isinstance(response, str) else ""   # None or NaN: a call that failed
    try:
        return BENCHMARKS[benchmark].score(row, response)
    except (KeyError, SyntaxError) as e:
        raise ValueError(f"{benchmark} row: {type(e).__name__} {e}") from None


def figures(benchmark, rows, scores, weights=None):
    """Name → tensor (B,) of every figure of a benchmark, the paper's first. weights: (B, clusters) for the bootstrap,
    how often each cluster of rows counts; None: once.

    All figures are built from one thing, the share of units whose rows are all right: a unit is a row for accuracy, an
    image for acc+, the ten variants of a question for the worst case."""
    b = BENCHMARKS[benchmark]
    numbers = clusters_of(benchmark, rows)
    if weights is None:
        weights = torch.ones(1, max(numbers) + 1, dtype=torch.float64)
    units = {name: list(keys) for name, keys in b.units(rows).items()}
    for column in b.parts:
        for value in sorted({cell(row, column) for row in rows} - {""}):
            units[f"{column} {value}"] = [i if cell(row, column) == value else None for i, row in enumerate(rows)]
    shares = {}
    for name, keys in units.items():
        right, home = {}, {}
        for key, number, s in zip(keys, numbers, scores):
            if key is not None:
                right[key], home[key] = right.get(key, True) and s == 1.0, number
        weight = weights[:, list(home.values())]                                                    # (B, units)
        shares[name] = 100 * (weight * torch.tensor(list(right.values()))).sum(1) / weight.sum(1)
    return {**b.totals(shares), **shares}


def clusters_of(benchmark, rows):
    """For each row the number of its cluster, from 0."""
    numbers = {}
    if not rows:
        raise ValueError("there are no rows")
    keys = [BENCHMARKS[benchmark].cluster(row) or ("row", i) for i, row in enumerate(rows)]       # no index: by itself
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def summarize(benchmark, rows, scores):
    """rows, and their scores in the same order → {figure: percent}: the paper's headline figure first (of MME points,
    2,800 at most), then its parts, and `unparsed`, the number of responses that state no answer (which the Score
    objects of `score` remember; plain floats count as parsed). ValueError: no rows."""
    values = {name: value.item() for name, value in figures(benchmark, rows, scores).items()}
    return {**values, "unparsed": sum(getattr(s, "answer", "") is None for s in scores)}


def intervals(benchmark, rows, scores, resamples=1000, seed=0):
    """{figure: (low, high)}: 95 % bootstrap intervals. Rows that belong together (the variants of a question, the
    questions on an image) are drawn together, for they are not independent."""
    n = max(clusters_of(benchmark, rows)) + 1
    drawn = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(seed))
    weights = torch.zeros(resamples, n, dtype=torch.float64)
    weights.scatter_add_(1, drawn, torch.ones_like(weights))
    quantiles = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return {name: tuple(value.nanquantile(quantiles).tolist())                     # nan: a draw without any such unit
            for name, value in figures(benchmark, rows, scores, weights).items()}


# ─── 6. Predictions ───────────────────────────────────────────────────────────────────────────────────────────────────

def read_jsonl(file):
    """Records of a .jsonl file, [] if there is none. A last line torn by a kill is cut off the file."""
    if not file.exists():
        return []
    data = file.read_bytes()
    whole = data[:data.rfind(b"\n") + 1]
    if whole != data:
        os.truncate(file, len(whole))
    try:
        return [json.loads(line) for line in whole.decode("utf-8").split("\n") if line]
    except ValueError as e:
        raise sg.UserError(f"{file} is damaged ({e}): mend it, or move it away") from None


def fingerprint(model):
    """A short text that changes with the weights: 64 of each tensor."""
    sample = [p.detach().flatten()[::max(1, p.numel() // 64)].float().tolist() for p in model.parameters()]
    return MD5(repr(sample).encode()).hexdigest()


def check_settings(out, benchmark, settings, overwrite):
    """Predictions are only continued under the settings they were begun with, and on the same file and weights."""
    file, predictions = out / "settings.json", out / f"{benchmark}.jsonl"
    saved = json.loads(file.read_text()) if file.exists() else {}
    if predictions.exists() and saved.get(benchmark) != settings and not overwrite:
        before = saved.get(benchmark, {})
        changed = "; ".join(f"{name} was {before.get(name)!r} and is {value!r}" for name, value in settings.items()
                            if before.get(name) != value)
        raise sg.UserError(f"{predictions} was made otherwise: {changed}. Ask again with --overwrite, or choose "
                           "another folder with --out")
    if overwrite and predictions.exists():
        predictions.replace(out / f"{benchmark}.jsonl.old")
    write_atomically(file, json.dumps({**saved, benchmark: settings}, indent=1))


# Half of an emoji, which a model can emit and UTF-8 cannot hold, becomes an escape, which JSON can.
TEXT = {"encoding": "utf-8", "errors": "backslashreplace"}


def write_atomically(file, text):
    new = file.with_suffix(file.suffix + ".new")
    new.write_text(text, **TEXT)
    new.replace(file)


def predict(args, benchmark, table, rows, model, processor):
    """Greedy responses to the rows that have none yet, appended to <benchmark>.jsonl batch by batch → {id: record}."""
    file = args.out / f"{benchmark}.jsonl"
    done = {record["id"]: record for record in read_jsonl(file)}
    todo = [row for row in rows if row.cells["index"] not in done]
    with (open(file, "a", **TEXT) as out,
          tqdm(total=len(rows), initial=len(rows) - len(todo), desc=f"{benchmark:14}", unit="question") as bar):
        for batch in sg.chunks(todo, args.batch_size):
            asked = []                                         # (row, text of the prompt, Prompt)
            for row in batch:
                text = build_prompt(benchmark, row.cells, args.plain)
                try:
                    asked.append((row, text, processor.prompt(text, row_images(table, row, args.max_pixels))))
                except ValueError as e:
                    complain([f"{row.where}: {e}"], args.skip_bad_rows)
            if asked:
                prompts = [prompt for _, _, prompt in asked]
                graph = args.cuda_graph and len(prompts) == args.batch_size    # not for a smaller one at the end
                sampled = sg.rollout(model, processor, prompts, 1, args.max_new_tokens, temperature=0,
                                     constant_shape=None if graph else False)
                for (row, text, _), [response] in zip(asked, sampled.texts):
                    s = score(benchmark, row.cells, response)
                    record = {"id": row.cells["index"], "prompt": text, "response": response, "answer": s.answer,
                              "score": s}
                    out.write(json.dumps(record, ensure_ascii=False) + "\n")
                    done[record["id"]] = record
                out.flush()
            bar.update(len(batch))
    return done


def read_predictions(file):
    """Responses that another engine wrote → {id: record}. .jsonl with id (or index) and response (or prediction), or a
    .tsv with these columns, such as VLMEvalKit's."""
    if not file.is_file():
        raise sg.UserError(f"--predictions {file}: there is no such file")
    try:
        with open(file, encoding="utf-8-sig", newline="") as f:
            records = list(csv.DictReader(f, delimiter="\t", strict=True)) if file.suffix == ".tsv" else [
                json.loads(line) for line in f if line.strip()]
    except (ValueError, OSError, csv.Error) as e:
        raise sg.UserError(f"{file} is no {file.suffix} file: {e}") from None
    found = {}
    for n, record in enumerate(records, 1):
        record = record if isinstance(record, dict) else {}
        name, response = record.get("id", record.get("index")), record.get("response", record.get("prediction"))
        if name is None or response is None:
            raise sg.UserError(f"{file} record {n}: needs id (or index) and response (or prediction)")
        if str(name) in found:
            raise sg.UserError(f"{file} record {n}: id {name} occurs twice")
        found[str(name)] = {"id": str(name), "response": str(response)}
    return found


# ─── 7. An optional judge ─────────────────────────────────────────────────────────────────────────────────────────────

CHOICE_ONLY = ("mmstar", "hallusionbench", "mme")              # the judge is for the others
JUDGE_PROMPT = """Does the response give the right answer to the question? Judge only the answer it commits to, not \
the reasoning. A response that commits to no answer, or to several, is wrong. Reply with one word: right or wrong.

Question:
{question}

Right answer: {answer}

Response:
{response}
"""


def read_verdict(reply):
    """The judge's last 'right' or 'wrong'."""
    words = re.findall(r"\b(right|wrong)\b", reply.lower())
    if not words:
        raise TryAgain("the reply is neither right nor wrong")
    return words[-1] == "right"


def judge(args, benchmark, rows, responses, scores):
    """Scores, with the judge's verdict where the rules found no answer. Verdicts are kept in <benchmark>.judge.jsonl,
    by judge, row and response, so that nothing is judged twice."""
    file = args.out / f"{benchmark}.judge.jsonl"
    known = {(r["judge"], r["id"], r["response"]): r["right"] for r in read_jsonl(file)}
    key = os.environ.get(args.api_key_env, "")
    endpoint = Endpoint(chat_url(args.judge), args.judge_model, key, temperature=0, timeout=120, retries=4, backoff=1)
    judged, unparsed = list(scores), [n for n, s in enumerate(scores) if s.answer is None]
    with open(file, "a", **TEXT) as out:
        for n in tqdm(unparsed, f"{benchmark:14}", unit="verdict"):
            case = args.judge_model, cell(rows[n], "index"), responses[n]
            if case not in known:
                prompt = JUDGE_PROMPT.format(question=BENCHMARKS[benchmark].question(rows[n]),
                                             answer=gold_answer(rows[n]), response=responses[n][-8000:])
                known[case] = endpoint.ask(prompt, read_verdict)
                record = dict(zip(("judge", "id", "response"), case)) | {"right": known[case]}
                out.write(json.dumps(record, ensure_ascii=False) + "\n")
                out.flush()
            judged[n] = grade("by the judge", known[case])
    return judged


def gold_answer(row):
    """The right answer, as letter and text where both are known."""
    answer, options = str(row["answer"]), choices_of(row)
    letter = cell(row, "answer_option") or (answer if answer in options else "")
    return f"({letter}) {options.get(letter, answer)}" if letter else answer


# ─── 8. The table ─────────────────────────────────────────────────────────────────────────────────────────────────────

# Rows of the paper's Table 1 to stand beside (METHOD section 8), in the order of PAPER.
PUBLISHED = {
    "Qwen2-VL-2B": (43.0, 48.0, 12.4, 73.5, 24.9, 41.7, 19.7, 1872),
    "Qwen2-VL-2B-GRPO": (41.4, 46.2, 16.0, 72.5, 24.2, 42.2, 19.9, 1930),
    "R1-VL-2B": (52.1, 49.8, 17.1, 75.2, 29.4, 44.0, 26.2, 2048),
    "Qwen2-VL-7B": (58.2, 60.7, 16.3, 83.0, 42.1, 50.6, 32.5, 2327),
    "Qwen2-VL-7B-GRPO": (55.1, 59.8, 19.1, 81.3, 33.9, 48.5, 30.9, 2335),
    "R1-VL-7B": (63.5, 60.0, 24.7, 83.9, 45.2, 54.7, 40.0, 2376),
}


def average(headlines):
    """The paper's average: the mean of eight with MME/28, truncated to one decimal; None unless all eight are there."""
    if any(name not in headlines for name in PAPER):
        return None
    mean = sum(headlines[name] / (28 if name == "mme" else 1) for name in PAPER) / len(PAPER)
    return math.floor(mean * 10 + 1e-9) / 10


def table_rows(results, label):
    """The paper's rows, and ours with interval, number of rows and share of unparsed responses → list of rows of text.
    results: {benchmark: dict of `evaluate`}."""
    names = [*PAPER, *(name for name in results if name not in PAPER)]

    def line(title, value, last=""):
        return [title, *(value(name) if name in results else "–" for name in names), last]

    def shown(name, number):
        return f"{number:.0f}" if name == "mme" else f"{number:.1f}"

    rows = [["", *(BENCHMARKS[name].title for name in names), "Average"]]
    for model, numbers in PUBLISHED.items():
        headlines = dict(zip(PAPER, numbers))
        rows.append([f"{model} (paper)", *(shown(n, headlines[n]) if n in headlines else "–" for n in names),
                     f"{average(headlines)}"])
    for with_judge in (False, True)[:1 + any("with judge" in r for r in results.values())]:
        headlines = {n: r.get("with judge", r["headline"]) if with_judge else r["headline"] for n, r in results.items()}
        complete = all(r.get("complete", True) for r in results.values())
        mean = "–" if average(headlines) is None or not complete else str(average(headlines))
        rows.append(line(f"{label}{' + judge' * with_judge}", lambda n: shown(n, headlines[n]), mean))
    rows += [line("  95 % interval, from", lambda n: shown(n, results[n]["interval"][0])),
             line("  to", lambda n: shown(n, results[n]["interval"][1])),
             line("  rows", lambda n: str(results[n]["rows"])),
             line("  unparsed, %", lambda n: f"{100 * results[n]['unparsed'] / results[n]['rows']:.1f}")]
    return rows


def as_text(rows):
    width = max(len(row[0]) for row in rows)
    widths = [max(8, len(title) + 2) for title in rows[0][1:]]
    return "\n".join(row[0].ljust(width) + "".join(f"{text:>{w}}" for text, w in zip(row[1:], widths)) for row in rows)


def as_markdown(rows):
    rule = ["---", *["--:"] * (len(rows[0]) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]]) + "\n"


# ─── 9. Main ──────────────────────────────────────────────────────────────────────────────────────────────────────────

MINIATURES = sg.HERE / "data" / "bench"
MINIATURE_NOTE = ("These are miniatures drawn by data/bench.py, not the published files: the figures show that the "
                  "evaluation works, and cannot be compared with the paper's.")


def parse_arguments(argv):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--model", default="tiny", help="tiny, a short name, a Hub id, a checkpoint folder or a run folder")
    p.add_argument("--data", default="", help="folder of the TSV files; '' = data/bench with --model tiny, else "
                                              "$LMUData and ~/LMUData; what is missing is downloaded")
    p.add_argument("--benchmarks", default=",".join(PAPER), help="which, comma-separated; also mathvision_mini")
    p.add_argument("--limit", type=int, default=0, help="only the first N rows of each; 0 = all")
    p.add_argument("--plain", action=argparse.BooleanOptionalAction, default=None,
                   help="the bare question, without the reasoning template; default: as the run was trained, else no")
    p.add_argument("--max-new-tokens", type=int, default=2048,
                   help="completion limit, tokens (R1-VL's evaluation); with --model tiny at most 192")
    p.add_argument("--max-pixels", type=int, default=1_003_520, help="larger images are shrunk to this: 1,280 tokens")
    p.add_argument("--batch-size", type=int, default=16, help="questions answered at once")
    p.add_argument("--device", default="auto", help="auto = cuda when there is one, else cpu")
    p.add_argument("--cuda-graph", action=argparse.BooleanOptionalAction, default=True,
                   help="on cuda: capture the decoding step as a CUDA graph (faster, same responses)")
    p.add_argument("--dtype", default="auto", help="auto = bfloat16 on cuda, float32 on cpu")
    p.add_argument("--out", default="", help="folder of predictions and table; '' = runs/<name of the model>/eval, "
                                             "or eval/ beside --predictions")
    p.add_argument("--overwrite", action="store_true", help="ask again where there are predictions already")
    p.add_argument("--predictions", default="", help="score these responses of one benchmark, .jsonl or .tsv, no model")
    p.add_argument("--skip-bad-rows", action="store_true", help="go on without malformed rows")
    p.add_argument("--judge", default="", help="OpenAI-compatible server that judges what the rules cannot parse")
    p.add_argument("--judge-model", default="", help="its model")
    p.add_argument("--api-key-env", default="OPENAI_API_KEY", help="environment variable that holds its key")
    args = p.parse_args(argv)
    args.benchmarks = args.benchmarks.replace(" ", "").strip(",").split(",")
    if args.data and Path(args.data).is_file():
        raise sg.UserError(f"--data {args.data} is a file: pass the folder that holds it")
    wrong = [name for name in args.benchmarks if name not in BENCHMARKS]
    if wrong:
        raise sg.UserError(f"no benchmark {', '.join(wrong)}; there are {', '.join(BENCHMARKS)}")
    if args.predictions and len(args.benchmarks) != 1:
        raise sg.UserError("--predictions holds responses to one benchmark: name it with --benchmarks")
    if bool(args.judge) != bool(args.judge_model):
        raise sg.UserError("--judge URL and --judge-model NAME belong together")
    if min(args.batch_size, args.max_new_tokens) < 1 or args.limit < 0:
        raise sg.UserError("--batch-size and --max-new-tokens must be at least 1, --limit not negative")
    if args.dtype not in ("auto", "float32", "bfloat16"):
        raise sg.UserError(f"--dtype is auto, float32 or bfloat16, not {args.dtype}")
    if args.max_pixels < 56 * 56:
        raise sg.UserError("--max-pixels must be at least 56 × 56 = 3136, the smallest image of Qwen2-VL")
    return args


def resolve_tiny(args):
    """--model tiny: the run of `python stepgrpo.py` if there is one, else a hasty one; and the miniatures as data."""
    if not args.data:
        subprocess.run([sys.executable, MINIATURES.parent / "bench.py"], check=True)
        args.data = str(MINIATURES)
    args.max_new_tokens = min(args.max_new_tokens, 192)        # as in its training
    for run in ("runs/tiny", "runs/tiny-hasty"):
        if (Path(run) / "checkpoint").is_dir():
            return run
    print("runs/tiny is not there (python stepgrpo.py makes it, in ten minutes): training a hasty model for a minute")
    os.makedirs("runs", exist_ok=True)
    with tempfile.TemporaryDirectory(dir="runs") as folder:    # moved only when it is done: Ctrl-C leaves nothing half
        sizes = "--train 10 --test 5 --warmup 3200".split()
        subprocess.run([sys.executable, sg.HERE / "data" / "shapes.py", "--out", folder, *sizes], check=True)
        sg.main(["--data", f"{folder}/train.json", "--warmup-data", f"{folder}/warmup.json", "--warmup-steps", "400",
                 "--steps", "0", "--held-out", "0", "--out", f"{folder}/run"])
        os.replace(f"{folder}/run", run)
        print(f"kept as {run}")
    return run


def open_benchmark(args, benchmark):
    """Finds, reads and checks a benchmark's file → Table, rows to ask, number of rows without an image."""
    b = BENCHMARKS[benchmark]
    table = read_tsv(find_tsv(b.file, b.url + b.file, b.md5, data_folders(args.data)), b.columns)
    good, complaints = [], list(table.complaints)
    for row in table.rows.values():
        try:
            score(benchmark, row.cells, "")
            b.cluster(row.cells)
            if not cell(row.cells, "question"):
                raise ValueError("the question is empty")
            good.append(row)
        except ValueError as e:
            complaints.append(f"{row.where}: {e}")
    complain(complaints, args.skip_bad_rows)
    if table.md5 != b.md5 and table.file.parent.resolve() != MINIATURES:
        print(f"{table.file} is not the published file (MD5 {table.md5}, published {b.md5})")
    asked = [row for row in good if row.has_image or "image" not in table.header and args.predictions]
    if not asked:
        raise sg.UserError(f"{table.file} holds no rows with an image")
    return table, asked[:args.limit or None], len(good) - len(asked)


def complain(complaints, skip):
    """Bad rows stop the run, all named at once, or are skipped."""
    if complaints and not skip:
        shown = complaints[:50] + [f"… and {len(complaints) - 50} more"] * (len(complaints) > 50)
        raise sg.UserError("\n  ".join([f"{len(complaints)} rows cannot be used:", *shown]) +
                           "\nMend them, or go on without them: --skip-bad-rows")
    if complaints:
        tqdm.write(f"skipped {len(complaints)} bad rows, the first: {complaints[0]}")


def evaluate(args, benchmark, table, rows, records):
    """Scores the rows that have a response → all figures of one benchmark."""
    rows = [row.cells for row in rows if row.cells["index"] in records]
    if not rows:
        raise sg.UserError(f"there is no response to any row of {table.file}")
    responses = [records[row["index"]]["response"] for row in rows]
    scores = [score(benchmark, row, response) for row, response in zip(rows, responses)]
    for row, s in zip(rows, scores):                           # the rules may be newer than the responses
        records[row["index"]] |= {"answer": s.answer, "score": s}
    file = args.out / f"{benchmark}{'.scored' if args.predictions else ''}.jsonl"
    write_atomically(file, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records.values()))
    summary, spread = summarize(benchmark, rows, scores), intervals(benchmark, rows, scores)
    headline = next(iter(summary))
    result = {"headline": summary[headline], "interval": spread[headline], "rows": len(rows),
              "unparsed": summary["unparsed"], "file": str(table.file), "md5": table.md5,
              "figures": {name: {"value": value, "interval": spread.get(name)} for name, value in summary.items()}}
    if args.judge and benchmark not in CHOICE_ONLY:
        try:
            judged = summarize(benchmark, rows, judge(args, benchmark, rows, responses, scores))
        except (RowError, Stop) as e:                          # the figures by rule stand without it
            tqdm.write(f"{benchmark}: no figure with the judge: {e}")
            return result
        result |= {"with judge": judged[headline], "judge": args.judge_model, "judged": summary["unparsed"]}
    return result


def trained_plain(model):
    """Whether a run was trained on bare questions, without the instruction, as the tiny one is."""
    file = Path(model) / "config.json"
    return file.is_file() and json.loads(file.read_text()).get("instruction") is False


def run(args):
    """Files, model, predictions, scores, table."""
    if args.model == "tiny" and not args.predictions:
        args.model = resolve_tiny(args)
    label = args.predictions or args.model
    folder = Path(args.predictions).parent if args.predictions else Path("runs") / Path(args.model).name
    args.out = Path(args.out or folder / "eval")
    if args.plain is None:
        args.plain = trained_plain(args.model)
        if args.plain and not args.predictions:
            print(f"{args.model} was trained on bare questions: it gets no reasoning template (--no-plain: it does)")
    tables = {name: open_benchmark(args, name) for name in args.benchmarks}
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise sg.UserError(f"cannot write to --out {args.out}: {e}") from None
    # What all responses of one table have in common.
    asked = {"predictions": str(Path(args.predictions).parent.resolve()) if args.predictions else None}
    if not args.predictions:
        device, dtype = sg.pick_device(args)
        print(f"loading {args.model} on {device}, {dtype}; torch {torch.__version__}, "
              f"transformers {transformers.__version__}")
        model, processor = sg.load_model(args.model, device, dtype, args.max_pixels)
        asked = {"weights": fingerprint(model), "plain": args.plain, "max_new_tokens": args.max_new_tokens,
                 "max_pixels": args.max_pixels}
        for name, (table, _, _) in tables.items():
            check_settings(args.out, name, asked | {"md5": table.md5}, args.overwrite)
    asked |= {"limit": args.limit, "folder": str(tables[args.benchmarks[0]][0].file.parent.resolve())}

    results = {}
    for name, (table, rows, skipped) in tables.items():
        if args.predictions:
            records = read_predictions(Path(args.predictions))
            unknown = records.keys() - table.rows.keys()
            if unknown:
                raise sg.UserError(f"{args.predictions} answers rows that {table.file} has not: {sorted(unknown)[:5]}")
        else:
            records = predict(args, name, table, rows, model, processor)
        results[name] = evaluate(args, name, table, rows, records)
        missing = len(rows) - results[name]["rows"]
        results[name] |= {"without image": skipped, "without response": missing,
                          "complete": not missing and not args.limit}
    report(args.out, label, asked, results)


def report(out, label, asked, results):
    """Prints and writes the table. Figures of other benchmarks that were asked in the same way before stay in it."""
    file = out / "scores.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if before.get("asked") == asked:
        results = before["benchmarks"] | results
    rows = table_rows(results, label)
    notes = [MINIATURE_NOTE] if any(Path(r["file"]).parent.resolve() == MINIATURES for r in results.values()) else []
    for name, r in results.items():
        for what in ("without image", "without response"):
            if r[what]:
                notes.append(f"{name}: {r[what]} rows {what} left out")
        if "judge" in r:
            notes.append(f"{name}: {r['judged']} unparsed responses judged by {r['judge']}")
    print("\n" + as_text(rows) + "\n\n" + "\n".join(notes))
    write_atomically(out / "table.md", as_markdown(rows) + "".join(f"\n{note}\n" for note in notes))
    headlines = {name: r["headline"] for name, r in results.items()}
    write_atomically(file, json.dumps({"model": label, "asked": asked, "average": average(headlines),
                                       "benchmarks": results}, indent=1))
    print(f"\nthe table is in {out / 'table.md'}, all parts are in {file}")


def main(argv=None):
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace", line_buffering=True)
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()
    try:
        run(parse_arguments(argv))
    except (sg.UserError, Stop, RowError) as e:
        sys.exit(f"eval: {e}")
    except KeyboardInterrupt:
        print("\nstopped. The responses so far are kept: the same command goes on from there (leave --overwrite out)")
        sys.exit(130)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: MIT
r"""Key steps for data that has only reference paths (StepGRPO, arXiv 2503.12937).

StepGRPO rewards a sampled path for each key step it contains: a few words, numbers and equations that a correct path
cannot do without. This script reads reference paths and writes their key steps, in one of two ways:

    python data/key_steps.py paths.jsonl my.jsonl                                       # A. by rule: free, at once
    python data/key_steps.py mulberry.json my.jsonl --llm https://api.openai.com/v1 --llm-model gpt-4o --workers 8
    python data/key_steps.py --help

IN is .json or .jsonl, in R1-VL-10K or in Mulberry (ShareGPT) format; data/README.md shows both. OUT is .jsonl in
R1-VL-10K format, one row per line, plus `row` (its place in IN, from 1; for .jsonl the line) and `by` (what made it).
A rerun of the same command goes on where the last one stopped and tries the failed rows again. Relative image
paths are rewritten to start from OUT's folder, so OUT may lie anywhere.

Where this differs from the paper and from the official code:
1. The paper's three passes (extract, trim, augment) are three prompts here, all our own wording. Officially only the
   extraction was published, for gpt-4o at temperature 0.9; any OpenAI-compatible server will do here.
2. Elements that the model made up, so that they do not occur in the path, are dropped and counted (ours).
3. The way by rule is ours. It reads English, and is a starting point rather than the paper's quality.

A group of equivalent forms counts as matched when any form is found in the steps. What "found" means is decided in
stepgrpo.py: LaTeX, spacing and operators are folded, numbers match whole, words match whole. So forms here never
list mere spacing or LaTeX variants. Exit status: 0 all rows done, 1 some rows failed, 2 stopped, 130 Ctrl-C.
"""
import argparse
import email.utils
import http.client
import itertools
import json
import os
import random
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

from tqdm import tqdm

PER_STEP = 3                     # key steps per step: each further group makes every other one count for less
FAILURES_IN_A_ROW = 10           # then the endpoint, and not the row, is to blame: stop before it costs days
LONGEST_WAIT = 300               # seconds; the cap of a back-off and of a server's Retry-After
LONGEST_REPLY = 1 << 20          # bytes; a reply beyond it is cut, and so cannot be read
REFLECTIVE = "I think I have made a mistake. Let me rethink it."
ANSWER_LINE = re.compile(r"^###[ \t]*The final answer is:[ \t]*$", re.MULTILINE)
HEADER = re.compile(r"^[ \t]*###[ \t]*(Image Description|Rationales?|Let['’]s think step by step|Step[ \t]*\d{1,4}"
                    r"|The final answer is)[ \t]*[:.]?", re.MULTILINE | re.IGNORECASE)


class RowError(ValueError):
    """One row cannot be done; the run goes on with the others."""


class Stop(Exception):
    """No row can be done: a wrong key, a wrong file. The run ends with this one line."""


class TryAgain(Exception):
    """One request failed in a way that may pass. `wait`: seconds the server asks for; None: no need to wait."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


# ---- The path: its sections, and what occurs in them ----------------------------------------------------------------

def section_name(header: str) -> str:
    """'Step  2' -> 'step 2', 'Rationale' -> 'rationales': one name for what paths and models write differently."""
    name = header.lower()
    return f"step {int(name[4:])}" if name.startswith("step") else re.sub("rationale$", "rationales", name)


def split_path(path: str) -> dict[str, str]:
    """The text of each section by name: 'image description', 'rationales', 'step 1', ... Source: METHOD of the paper.

    Sections that are empty or absent are left out, and so is all that follows the final answer.
    """
    sections = {}
    parts = HEADER.split(path)
    for header, text in zip(parts[1::2], parts[2::2]):
        if header.lower().startswith("the final"):
            break
        if text.strip() and not header.lower().startswith("let"):
            sections[section_name(header)] = (sections.get(section_name(header), "") + "\n" + text).strip()
    return sections


def steps_of(sections: dict[str, str]) -> dict[str, str]:
    """Only the steps, in the order of the path."""
    return {name: text for name, text in sections.items() if name.startswith("step ")}


def fold(text: str) -> str:
    """Words, whole numbers and operators with one space between: '7-3=4' and '$7 - 3 = 4$' become the same."""
    return " ".join(re.findall(r"\d+(?:\.\d+)?|[^\W\d_]+|[^\w\s$\\{}()\"'“”’]", text.lower()))


def unlike(forms: list[str]) -> list[str]:
    """The forms without those that differ from an earlier one in spacing or LaTeX marks only."""
    first: dict[str, str] = {}
    for form in forms:
        first.setdefault(fold(form), form)
    return list(first.values())


def occurs(element: str, text: str) -> bool:
    """Whether the element stands in the text as whole words and numbers."""
    return bool(fold(element)) and f" {fold(element)} " in f" {fold(text)} "


# ---- A. By rule (ours) ----------------------------------------------------------------------------------------------

NUMBER_WORDS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
                "seventeen eighteen nineteen twenty").split()
# Words that carry no content of their own: grammar, and the verbs every reasoning path is full of.
STOP_WORDS = frozenset("""
a about above add adding after again all also among an and another answer any are as at away based be because been
before behind being below beside between both but by calculate can check choice clearly compare conclude confirm
consider contains correct corresponding could count counting counts deduce depicted depicts describes determine did
divide divided do does during each either equal equals evaluate every exactly examine figure final finally find first
following for from front get gets give given gives had has have having hence her here his how however i identify if
image in indeed indicate indicated indicates inside into is it its itself just know known last leave leaves left let
like locate look looking looks made make makes many may means minus more most much multiplied multiply must near need
needed needs next not note now observe obtain of off on once only onto option options or other our out over per picture
plus present problem provided question read reading reads refer remain remaining remains represent represents
respectively same second see seen shall she should show shown shows simply since so solve some start state states step
subtract subtracting such sum take taken than that the their them then there therefore these they think third this
those through thus times to together too total twice under until up use used using verify versus very was we were what
when where whether which while who whose will with within without would yes you your
""".split()) | set(NUMBER_WORDS)
LETTERS = "A-Za-zÀ-ÖØ-öø-ɏ"                                                         # without × and ÷
WORD = rf"[{LETTERS}]++(?:['’-][{LETTERS}]+)*+"
NUMBER = r"\d++(?:,\d{3})*+(?:\.\d++)?+"
BRACES = r"\{(?:[^{}]++|\{[^{}]*+\})*+\}"
OPERATOR_WORD = r"(?:plus|minus|times|multiplied by|divided by|equals|is equal to)\b"
OPERATOR_SIGN = r"[-−+*/×÷·]|\\(?:times|cdot|div)\b"
RELATION = r"[=<>≤≥≠≈]|\\(?:leq?|geq?|neq?|approx)\b|(?:equals|is equal to)\b"
ATOM = (r"[-−]?(?:\(\s*){0,4}+(?:"                                                 # a sign, opening brackets
        rf"\\(?!(?:times|cdot|div|leq?|geq?|neq?|approx)\b)[A-Za-z]++(?:{BRACES})*+(?:\s?[A-Za-z]{{1,3}}\b)?"
        rf"|{NUMBER}(?:\s?(?!{OPERATOR_WORD})[A-Za-z]++[²³]?(?=\s*(?:{OPERATOR_SIGN}|[=<>)])))?[A-Za-z]*+"
        rf"|(?!{OPERATOR_WORD})[A-Za-zα-ω∠△]++\d*+)"
        rf"(?:\^(?:{BRACES}|\\circ|\w++))?[²³°%]?(?:\s*\)){{0,4}}")           # a power, a unit, closing brackets
# The repeats are bounded, so that no text makes the search slow. '2(', '2\pi' and '2 \pi' are products without a sign.
SIDE = rf"{ATOM}(?:(?:\s*(?:{OPERATOR_SIGN}|{OPERATOR_WORD})\s*|(?=[(\\])|(?<=\d)\s*(?=\\)){ATOM}){{0,12}}"
EQUATION = re.compile(rf"(?<![\w\\.^{{]){SIDE}(?:\s*(?:{RELATION})\s*{SIDE}){{1,6}}")
COUNTED = re.compile(rf"(?<![\w.,/^])({NUMBER}(?:/\d+)?|\\[dt]?frac\{{\d+\}}\{{\d+\}}|(?:{'|'.join(NUMBER_WORDS)})\b)"
                     rf"(\s?%|\s?percent\b|°|\^\\circ|\^\{{\\circ\}}|(?:[ \t]+{WORD}){{0,4}})", re.IGNORECASE)
MEASURED = re.compile(rf"(?<!\w)({WORD})[ \t]+(is|are|was|were|of)[ \t]+({NUMBER})(?!\w|[./]\d)", re.IGNORECASE)
NEGATED = re.compile(r"(?:\b(?:not|no|never|neither|cannot)\b|n['’]t\b)[^.,;\n]*", re.IGNORECASE)
SPELLED = {"+": "plus", "-": "minus", "*": "times", "/": "divided by", "=": "equals"}


def is_content(word: str) -> bool:
    return word.lower() not in STOP_WORDS


def plain_step(text: str) -> str:
    """The step without what would break a phrase in two: LaTeX wrappers, list bullets, and clauses that deny.

    'It is not a right triangle' must not make 'right triangle' a key step.
    """
    text = re.sub(r"\$|\\[()\[\],;!]|\\(?:left|right)\b|^\s*[-*•]\s+", "", text, flags=re.MULTILINE)
    text = re.sub(r"\\(?:boxed|text|mathrm|mathbf)\{([^{}]*)\}", r"\1", text)
    return NEGATED.sub(" ; ", text)


def unwrap(equation: str) -> str:
    """Drops brackets that belong to the sentence: '7 - 3 = 4)' and '(7 - 3 = 4)' are both '7 - 3 = 4'."""
    equation = equation.strip()
    while equation.endswith(")") and equation.count(")") > equation.count("("):
        equation = equation[:-1].rstrip()
    while equation.startswith("(") and (equation.count("(") > equation.count(")")
                                        or re.fullmatch(r"\([^()]*\)", equation)):
        equation = equation[1:].removesuffix(")").strip()
    return equation


def equation_forms(equation: str) -> list[str]:
    """An equation as it stands, in signs, in words, without units, and shorter if it is a chain. Source: ours.

    The result alone is never a form: '4' stands in nearly every path, also in one that never did 7 - 3.
    """
    signs = re.sub(rf"\\[dt]?frac({BRACES})({BRACES})", lambda m: f"{m[1][1:-1]} / {m[2][1:-1]}"
                   if re.fullmatch(r"[\w.{}]+", m[1] + m[2]) else m[0], equation)
    for sign, names in (("*", r"×|·|\\times\b|\\cdot\b|\btimes\b|\bmultiplied by\b"), ("-", r"−|\bminus\b"),
                        ("/", r"÷|\\div\b|\bdivided by\b"), ("+", r"\bplus\b"), ("=", r"\bequals\b|\bis equal to\b")):
        signs = re.sub(rf"\s*(?:{names}|{re.escape(sign)})\s*", f" {sign} ", signs)
    signs = re.sub(r"(^|[-+*/=(] )\s*- (?=\S)", r"\1-", signs).strip()        # a sign, not a subtraction: '2 * -3'
    forms = [equation, signs]
    bare = re.sub(rf"({NUMBER}) ?[A-Za-z]{{2,}}\b[²³]?", r"\1", signs)       # '3 km + 4 km' -> '3 + 4'; '2x' stays
    sides = bare.split(" = ")
    if len(sides) > 2:                                                        # area = 3 * 4 = 12: its ends, its end
        forms += [f"{sides[-2]} = {sides[-1]}", f"{sides[0]} = {sides[-1]}"]
    else:
        forms.append(bare)
        simple = re.fullmatch(rf"({NUMBER}) ([-+*/]) ({NUMBER}) = ({NUMBER})", bare)
        if simple:
            forms.append(" ".join(SPELLED.get(part, part) for part in bare.split()))
        if simple and simple[2] in "+*":
            forms.append(f"{simple[3]} {simple[2]} {simple[1]} = {simple[4]}")
    # Two sides that say the same, such as '12 = 12', would ask for nothing.
    return [form for form in forms if len(set(form.split(" = "))) == form.count(" = ") + 1 or form == equation]


def counted_forms(number: str, counted: str) -> list[str]:
    """A number with what it counts: '7 objects' and 'seven objects', '50%' and '50 percent', '1/2' and '0.5'.

    A bare number is no key step (empty list): it would be found by accident.
    """
    number = re.sub(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", number)
    if re.fullmatch(r"\s?(%|percent)", counted):
        return [f"{number}%", f"{number} percent"]
    if counted and not counted[0].isspace():
        return [f"{number}°", f"{number} degrees"]
    noun = " ".join(itertools.takewhile(is_content, counted.split()))
    same = [number]
    fraction = re.fullmatch(r"(\d{1,4})/([1-9]\d{0,3})", number)
    if fraction and 1000 * int(fraction[1]) % int(fraction[2]) == 0:          # only when the decimal form is exact
        same.append(f"{int(fraction[1]) / int(fraction[2]):.7g}")
    elif number.lower() in NUMBER_WORDS:
        same.append(str(NUMBER_WORDS.index(number.lower())))
    elif re.fullmatch(r"1?\d|20", number):
        same.append(NUMBER_WORDS[int(number)])
    return [f"{form} {noun}".strip() for form in same] if noun or "/" in number else []


def phrases(text: str) -> list[list[str]]:
    """Runs of words between stop words, each at most its last three, where the noun stands."""
    runs = []
    for piece in re.split(rf"[^{LETTERS}\s'’-]+|\n\s*\n", text):
        for content, words in itertools.groupby(re.findall(WORD, piece), key=is_content):
            runs += [list(words)[-3:]] if content else []
    return runs


def key_groups(text: str) -> list[list[str]]:
    """All candidates of one section, the most telling first: equations, counted and measured numbers, phrases."""
    text, groups = plain_step(text), []

    def take(pattern: re.Pattern, forms_of) -> str:
        """Collects the forms of each match, and blanks it so that no later pattern reads it again."""
        def visit(match: re.Match) -> str:
            forms = forms_of(match)
            groups.extend([forms] if forms else [])
            return " | " if forms else match[0]
        return pattern.sub(visit, text)

    def equation(match: re.Match) -> list[str]:
        found = unwrap(match[0])
        torn = text[:match.start()].rstrip()[-1:] in tuple("+-−*/×÷=<>^")     # the start of it could not be read
        bare_words = not re.search(r"[\d+*/×÷\\^-]", found) and re.search(r"[A-Za-z]{4}", found)
        return [] if torn or bare_words else equation_forms(found)

    def measured(match: re.Match) -> list[str]:
        noun, verb, number = match.groups()
        return [f"{noun} {verb} {number}", f"{noun} = {number}"] if is_content(noun) else []

    text = take(EQUATION, equation)
    text = take(COUNTED, lambda match: counted_forms(match[1], match[2]))
    text = take(MEASURED, measured)
    runs = phrases(text)
    groups += [[" ".join(run)] for run in runs if len(run) > 1]
    return groups or [run for run in runs if len(run[0]) > 3]                 # a single word says little: last resort


def pick(text: str, seen: set[str]) -> list[list[str]]:
    """The first PER_STEP groups with no form in `seen`, which grows: no element twice in a path."""
    chosen = []
    for group in key_groups(text):
        if len(chosen) < PER_STEP and not seen & {fold(form) for form in group}:
            seen |= {fold(form) for form in group}
            chosen.append(unlike(group))
    return chosen


def extract_key_steps(path: str) -> list[list[str]]:
    """The key steps of a reference path by rule: a list of groups, each a list of equivalent forms. Source: ours.

    Of each '### Step n:' at most PER_STEP groups; the first form is the path's own wording. The same path gives the
    same groups; a path without steps gives none.

    >>> extract_key_steps("### Step 1: There are 7 objects.\\n### Step 2: 7 - 3 = 4, so four are left.")
    [['7 objects', 'seven objects'], ['7 - 3 = 4', '7 minus 3 equals 4']]
    """
    seen: set[str] = set()
    return [group for text in steps_of(split_path(path)).values() for group in pick(text, seen)]


def by_rule(path: str) -> tuple[dict, int]:
    """Key steps of one row by rule, and 0 invented elements. Errors: RowError if the rules find nothing."""
    sections, groups = split_path(path), extract_key_steps(path)
    if not groups:
        raise RowError("the rules found no key step in it (they read English); use --llm, or write them by hand")
    first = {name: [group[0] for group in pick(sections.get(name, ""), set())]
             for name in ("image description", "rationales")}
    return {"Image Description": first["image description"], "Rationales": first["rationales"], "Steps": groups}, 0


# ---- B. By a language model: extract, trim, augment -----------------------------------------------------------------

LINES = 'Image Description: ["a", "b"]; Rationales: ["c"]; Step 1: ["d"], Step 2: ["e", "f"]'
EXTRACT = f"""\
You mark worked solutions, and need to know what a correct one must mention. Read the question and the reference
solution below, and copy out their key elements:
- Image Description: at most three named entities or numbers that the question turns on.
- Rationales: the core concepts, such as the theorem or the quantity to be found.
- each Step: its variables, equations and relations, at most three; write [] for a step that adds none.
Copy word for word from that section. Give an equation whole; any other phrase has at most three words.
List no element twice, not even in two sections. Reply with nothing but lists, with every step named, like this:
{LINES}
"""
TRIM = f"""\
You mark worked solutions. Below are a question, its reference solution and the key elements someone picked from it.
Strike every element that repeats another one, that only restates the question, or that a correct solution could do
without. Keep the others exactly as they are and add none. Write [] for a section or step where none is left.
Reply with nothing but lists, with every step named, like this:
{LINES}
"""
AUGMENT = """\
You mark worked solutions. Below are a question, its reference solution and a list of key elements. Another correct
solution may word them differently: for each element give up to four other forms that mean exactly the same here, such
as an equation in words, a number written out, a common synonym, the sides of an equation swapped.
Do not give the result of an equation alone, nor anything broader than the element.
Reply with one JSON object and nothing else, each element copied as a key, [] where there is no other form:
{"7 - 3 = 4": ["7 minus 3 equals 4", "4 = 7 - 3"], "right angle": ["90 degrees"]}
"""
# Models wrap their lists in prose, code fences, bold type or a JSON object, and use either quote. Reading `label: [
# quoted strings ]` wherever it stands covers all of these; a list that is cut off is no list, and so is noticed.
QUOTED = r"\"(?:[^\"\\]|\\.)*+\"|'(?:[^'\\\n]|\\.)*+'"
QUOTED_LIST = rf"\[\s*+((?:(?:{QUOTED})\s*+(?:,\s*+)?)*+)\]"
SECTION_LIST = re.compile(rf"(Image Description|Rationales?|Step\s*\d{{1,4}})[\"'*\s]*+:[\"'*\s]*?{QUOTED_LIST}", re.I)
FORMS_LIST = re.compile(rf"({QUOTED})\s*+:\s*+{QUOTED_LIST}", re.DOTALL)


def unquote(quoted: str) -> str:
    r"""The text of a quoted string. Not json.loads: that would read the \f of "\frac" and the \t of "\times"."""
    text = re.sub(r"\\u([0-9a-fA-F]{4})", lambda m: chr(int(m[1], 16)), quoted[1:-1])
    return " ".join(re.sub(r"\\([\"'\\/])", r"\1", text).split())


def strings_in(quoted_list: str) -> list[str]:
    """'"a", "b"' -> ['a', 'b'], without the empty ones."""
    return [text for text in map(unquote, re.findall(QUOTED, quoted_list)) if text]


def read_elements(reply: str, sections: dict[str, str], picked: set[str] | None = None) -> tuple[dict, int]:
    """{section: its elements} from a reply in lines, and how many were dropped as invented or too long.

    `picked` holds the folded elements to choose from, if any. Source: the line format and the three words are the
    official ones, the check against the path is ours.
    Errors: TryAgain if a step is missing (a reply cut short), or if no step keeps an element.
    """
    found = {section_name(" ".join(name.split())): strings_in(items) for name, items in SECTION_LIST.findall(reply)}
    missing = [name for name in steps_of(sections) if name not in found]
    if missing:
        raise TryAgain(f"the reply has no list for {', '.join(missing)}: {reply[:80]!r}")
    elements, dropped, seen = {}, 0, set()
    whole = "\n".join(steps_of(sections).values())
    for name in sections:
        elements[name] = []
        for element in found.get(name, []):
            text = whole if name.startswith("step ") else sections[name]
            too_long = len(element.split()) > 3 and not re.search(r"[\d=<>≤≥≠≈+*/×÷\\]", element)
            if too_long or not occurs(element, text) or picked is not None and fold(element) not in picked:
                dropped += 1
            elif fold(element) not in seen:
                seen.add(fold(element))
                elements[name].append(element)
    if not any(steps_of(elements).values()):
        raise TryAgain(f"the reply has no element that stands in the steps: {reply[:80]!r}")
    return elements, dropped


def read_forms(reply: str, elements: list[str]) -> list[list[str]]:
    """One group per element from a JSON reply: the element first, then its other forms. Source: ours.

    A bare number or letter is dropped as a form of anything longer, because nearly every path contains it.
    Errors: TryAgain if an element has no entry.
    """
    found = {fold(unquote(key)): strings_in(forms) for key, forms in FORMS_LIST.findall(reply)}
    missing = [element for element in elements if fold(element) not in found]
    if missing:
        raise TryAgain(f"the reply has no forms for {missing[0]!r}: {reply[:80]!r}")
    groups = []
    for element in elements:
        number = re.fullmatch(r"[\d.,/%\s]+", element)
        groups.append(unlike([element, *(form for form in found[fold(element)][:4]
                                         if number or not re.fullmatch(r"[\d.,]*|.", form))]))
    return groups


def chat_url(url: str) -> str:
    """Where to post: '/v1' is added to a bare host only, '/chat/completions' wherever it is missing.

    >>> [chat_url(u) for u in ("http://localhost:8000/", "https://openrouter.ai/api/v1")]
    ['http://localhost:8000/v1/chat/completions', 'https://openrouter.ai/api/v1/chat/completions']
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise Stop(f"--llm {url}: not a web address; it looks like https://api.openai.com/v1")
    path = parts.path.rstrip("/") or "/v1"
    return parts._replace(path=path if path.endswith("/chat/completions") else path + "/chat/completions").geturl()


def asked_wait(header: str | None) -> float:
    """Seconds of a Retry-After header, which holds a number or a date; 0 if it is absent or unreadable."""
    if re.fullmatch(r"\s*\d{1,9}\s*", header or ""):
        return float(header)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time()) if header else 0.0
    except (TypeError, ValueError):
        return 0.0


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib would turn the redirected POST into a GET, and carry the key to the other host."""

    def redirect_request(self, *_):
        return None


@dataclass(frozen=True)
class Endpoint:
    """One OpenAI-compatible server and how to ask it. The names are those of the command line."""
    url: str
    model: str
    key: str
    temperature: float
    timeout: float
    retries: int
    backoff: float

    def chat(self, prompt: str) -> str:
        """One request. Errors: TryAgain for what may pass (408, 429, 5xx, network, odd replies), Stop for the rest."""
        body = {"model": self.model, "temperature": self.temperature, "messages": [{"role": "user", "content": prompt}]}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        try:
            with urllib.request.build_opener(NoRedirect).open(request, timeout=self.timeout) as response:
                raw = response.read(LONGEST_REPLY)
        except urllib.error.HTTPError as error:
            with error:
                said = " ".join(error.read(2000).decode("utf-8", "replace").split())[:200]
            if error.code in (408, 429) or error.code >= 500:
                raise TryAgain(f"HTTP {error.code}: {said}", asked_wait(error.headers["Retry-After"])) from error
            hint = " (is the key in the variable named by --api-key-env?)" if error.code in (401, 403) else ""
            raise Stop(f"{self.url} refuses with HTTP {error.code}{hint}: {said}") from error
        except (OSError, http.client.HTTPException) as error:                 # URLError and timeouts are OSErrors
            raise TryAgain(f"no answer from {self.url}: {error or type(error).__name__}", 0.0) from error
        try:
            choice = json.loads(raw)["choices"][0]
            text, cut = choice["message"]["content"], choice.get("finish_reason") == "length"
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            raise TryAgain(f"not a chat completion: {raw[:80]!r}") from error
        if cut or not isinstance(text, str):
            raise TryAgain("the reply was cut at the server's token limit" if cut else "the reply holds no text")
        text = text.translate(str.maketrans("“”", '""'))
        return re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL)

    def ask(self, prompt: str, read):
        """read(reply), asking again when it cannot be read. Errors: RowError after `retries` further tries, Stop."""
        for attempt in itertools.count():
            try:
                return read(self.chat(prompt))
            except TryAgain as error:
                if attempt >= self.retries:
                    raise RowError(f"{attempt + 1} requests failed, the last one with: {error}") from error
                if error.wait is not None:
                    # The random part keeps many workers from coming back at the same moment.
                    wait = self.backoff * 2 ** attempt * random.uniform(0.75, 1.25)
                    time.sleep(min(max(wait, error.wait), LONGEST_WAIT))


def by_llm(problem: str, path: str, endpoint: Endpoint) -> tuple[dict, int]:
    """Key steps of one row by three requests, and how many invented elements were dropped. Source: paper."""
    sections = split_path(path)
    material = f"\nQuestion:\n{problem}\n\nReference solution:\n{path}\n"
    elements, dropped = endpoint.ask(EXTRACT + material, lambda reply: read_elements(reply, sections))
    listed = "; ".join(f"{name.title()}: {json.dumps(items, ensure_ascii=False)}" for name, items in elements.items())
    picked = {fold(item) for items in elements.values() for item in items}    # the trim pass may strike, not add
    kept, _ = endpoint.ask(f"{TRIM}{material}\nKey elements:\n{listed}\n",
                           lambda reply: read_elements(reply, sections, picked))
    steps = [item for items in steps_of(kept).values() for item in items]
    listed = json.dumps(steps, ensure_ascii=False)
    groups = endpoint.ask(f"{AUGMENT}{material}\nKey elements:\n{listed}\n", lambda reply: read_forms(reply, steps))
    return {"Image Description": kept.get("image description", []), "Rationales": kept.get("rationales", []),
            "Steps": groups}, dropped


# ---- The files ------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Row:
    number: int                  # its place in IN, from 1
    problem: str                 # the question alone
    solution: str                # the whole reference path
    image_path: str


def read_record(number: int, record) -> Row:
    """One record of IN, in either format, as a Row. Errors: RowError that says what is wrong with it."""
    if isinstance(record, str):
        try:
            record = json.loads(record)
        except (ValueError, RecursionError) as error:
            raise RowError(f"not JSON: {error}") from error
    if not isinstance(record, dict):
        raise RowError("not a JSON object")
    if "messages" in record:
        turns, images = record["messages"], record.get("images")
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise RowError("its messages are not a list of turns")
        said = {role: [turn.get("content") for turn in turns if turn.get("role") == role]
                for role in ("user", "assistant")}
        images = images if isinstance(images, list) else [images]
        if [len(said["user"]), len(said["assistant"]), len(images)] != [1, 1, 1]:
            raise RowError("needs one user turn, one assistant turn and one image")
        problem, solution, image = said["user"][0], said["assistant"][0], images[0]
    else:
        problem, solution, image = (record.get(name) for name in ("problem", "solution", "image_path"))
    for name, value in (("problem", problem), ("solution", solution), ("image_path", image)):
        if not isinstance(value, str) or not value.strip():
            raise RowError(f"has no {name}")
    # The warm-up data carries the instruction around the question, which follows its last line.
    problem = ANSWER_LINE.split(problem.replace("<image>", ""), maxsplit=1)[-1].strip()
    if not problem:
        raise RowError("has no question besides the instruction")
    return Row(number, problem, solution, image)


def read_rows(source: Path) -> tuple[list[Row], int, list[tuple[int, str]]]:
    """The rows of IN, how many were dropped as reflective, and (row, reason) of those that cannot be used.

    Source: the official warm-up data leaves out the reflective rows too. Errors: Stop if IN cannot be read at all.
    """
    try:
        text = source.read_text(encoding="utf-8-sig")
        # Not splitlines(), which also cuts at characters that are allowed inside a JSON string.
        records = json.loads(text) if source.suffix == ".json" else text.split("\n")
    except (OSError, ValueError) as error:
        raise Stop(f"cannot read {source}: {error}") from error
    if not isinstance(records, list):
        raise Stop(f"{source} is not a JSON list of rows")
    rows, reflective, failed = [], 0, []
    for number, record in enumerate(records, 1):
        if isinstance(record, str) and not record.strip():
            continue
        try:
            row = read_record(number, record)
            if REFLECTIVE in row.solution:
                reflective += 1
            elif not steps_of(split_path(row.solution)):
                raise RowError("its solution has no '### Step 1:' with text; key steps need a full path")
            else:
                rows.append(row)
        except RowError as error:
            failed.append((number, str(error)))
    return rows, reflective, failed


def read_done(out: Path, rows: list[Row], by: str) -> dict[int, int]:
    """Rows that OUT already holds, as {row: groups}; a last line torn by a kill is cut off, to be done again.

    Errors: Stop, with OUT left as it is, if any line was not made from this IN in this way.
    """
    if not out.exists():
        return {}
    whole, newline, torn = out.read_bytes().rpartition(b"\n")
    expected = {row.number: row for row in rows}
    done, start = {}, b'{"row": '
    for line_number, line in enumerate(whole.split(b"\n") if newline else [], 1):
        try:
            made = json.loads(line)
            row, groups = expected[made["row"]], len(made["key_steps"]["Steps"])
            same = (row.problem, row.solution) == (made["problem"], made["solution"])
        except (ValueError, KeyError, TypeError):
            same = False
        if not same or made["row"] in done:
            raise Stop(f"{out} line {line_number} is not from this IN, or is there twice; name another OUT, "
                       "or move this one away")
        if made.get("by") != by:
            raise Stop(f"{out} line {line_number} was made by {made.get('by')}, not by {by}; name another OUT")
        done[row.number] = groups
    if torn and not (torn.startswith(start) or start.startswith(torn)):
        raise Stop(f"{out} ends in a line that this script did not write; name another OUT, or move this one away")
    if torn:
        os.truncate(out, len(whole) + len(newline))
    return done


def image_from(image: str, source: Path, out: Path) -> str:
    """The image path as seen from OUT's folder; absolute paths stay as they are. Source: ours."""
    here, there = source.resolve().parent, out.resolve().parent
    return image if os.path.isabs(image) or here == there else os.path.relpath(here / image, there)


# ---- Main -----------------------------------------------------------------------------------------------------------

def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="IN", type=Path, help=".json or .jsonl with reference paths")
    parser.add_argument("out", metavar="OUT", type=Path, help=".jsonl to write; may hold rows of an earlier run")
    parser.add_argument("--llm", metavar="URL", help="OpenAI-compatible server; without it, key steps go by rule. "
                        "/v1 is added to a bare host, /chat/completions to any address")
    parser.add_argument("--llm-model", metavar="NAME", help="model to ask for (the official code: gpt-4o)")
    parser.add_argument("--api-key-env", metavar="NAME", help="environment variable with the key "
                        "(OPENAI_API_KEY if that is set; local servers need none)")
    parser.add_argument("--workers", metavar="N", type=int, default=1, help="rows asked for at once (%(default)s)")
    parser.add_argument("--temperature", metavar="T", type=float, default=0.9, help="official: %(default)s")
    parser.add_argument("--timeout", metavar="SECONDS", type=float, default=120, help="of one request (%(default)s)")
    parser.add_argument("--retries", metavar="N", type=int, default=5, help="further tries of a request that failed "
                        "or whose reply cannot be read (%(default)s)")
    parser.add_argument("--backoff", metavar="SECONDS", type=float, default=1, help="wait after HTTP 408, 429, 5xx or "
                        "no answer; doubles with each try; a longer Retry-After is obeyed (%(default)s)")
    args = parser.parse_args(argv)
    for problem, is_so in (
            ("--llm and --llm-model need each other", bool(args.llm) != bool(args.llm_model)),
            ("IN must end in .json or .jsonl", args.source.suffix not in (".json", ".jsonl")),
            ("OUT must end in .jsonl", args.out.suffix != ".jsonl"),
            ("OUT's folder does not exist", not args.out.resolve().parent.is_dir()),
            ("IN and OUT are the same file", args.source.resolve() == args.out.resolve()),
            ("--workers must be at least 1", args.workers < 1),
            ("--retries, --backoff and --temperature must not be negative",
             not min(args.retries, args.backoff, args.temperature) >= 0),
            ("--timeout must be above 0", not args.timeout > 0),
            (f"--api-key-env: the variable {args.api_key_env} is not set",
             bool(args.api_key_env) and not os.environ.get(args.api_key_env))):
        if is_so:
            parser.error(problem)
    return args


def run(args: argparse.Namespace) -> int:
    """Reads, asks, writes each row as it comes, and reports; returns the exit status. Errors: Stop before the start."""
    endpoint = args.llm and Endpoint(
        chat_url(args.llm), args.llm_model, os.environ.get(args.api_key_env or "OPENAI_API_KEY", ""),
        args.temperature, args.timeout, args.retries, args.backoff)
    by = args.llm_model if args.llm else "rule"
    rows, reflective, failed = read_rows(args.source)
    groups = read_done(args.out, rows, by)                                    # {row: its number of groups}
    todo = [row for row in rows if row.number not in groups]
    before, invented, in_a_row, ending, status = len(groups), 0, 0, "", 0

    def work(row: Row) -> tuple[Row, dict | None, int, str]:
        try:
            made = by_llm(row.problem, row.solution, endpoint) if endpoint else by_rule(row.solution)
            return row, *made, ""
        except RowError as error:
            return row, None, 0, str(error)
        except Stop as error:
            raise Stop(f"{args.source} row {row.number}: {error}") from error

    try:
        # Threads, since they only wait for the server. Leaving the block does not wait for requests under way.
        with open(args.out, "a", encoding="utf-8") as out, ThreadPool(args.workers if endpoint else 1) as pool:
            for row, key_steps, dropped, error in tqdm(pool.imap_unordered(work, todo), "key steps", len(todo)):
                in_a_row = in_a_row + 1 if error else 0
                if error:
                    failed.append((row.number, error))
                    if endpoint and in_a_row == FAILURES_IN_A_ROW:
                        raise Stop(f"{in_a_row} rows in a row failed; see the reasons above, then run again")
                    continue
                made = {"row": row.number, "by": by, "problem": row.problem, "solution": row.solution,
                        "image_path": image_from(row.image_path, args.source, args.out), "key_steps": key_steps}
                out.write(json.dumps(made) + "\n")
                out.flush()
                groups[row.number] = len(key_steps["Steps"])
                invented += dropped
    except Stop as error:
        ending, status = f"stopped: {error}", 2
    except KeyboardInterrupt:
        ending, status = "stopped by Ctrl-C; the same command goes on from here", 130
    for number, reason in sorted(failed):
        print(f"failed: {args.source} row {number}: {reason}", file=sys.stderr)
    print(f"{args.out}: {len(groups)} rows by {by} ({before} from an earlier run), "
          f"{sum(groups.values()) / max(len(groups), 1):.1f} groups per row; {reflective} reflective rows dropped, "
          f"{invented} elements dropped that are not in their path or too long, {len(failed)} rows failed")
    if failed:
        print("failed rows are not in OUT. Mend them in IN and run the same command, it tries only them again, or do "
              "without them; do not delete their lines, since the numbers of later rows would change", file=sys.stderr)
    if ending:
        print(f"key_steps.py {ending}", file=sys.stderr)
    return status or int(bool(failed))


def main(argv: list[str] | None = None) -> int:
    args = read_arguments(argv)
    try:
        return run(args)
    except Stop as error:
        print(f"key_steps.py stopped: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

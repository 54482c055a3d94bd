# SPDX-License-Identifier: MIT
r"""Writes key steps for data that has only reference paths (StepGRPO, arXiv 2503.12937).

    python data/key_steps.py paths.jsonl my.jsonl                 # by rule: free, no network
    python data/key_steps.py mulberry.json my.jsonl --workers 8 \
        --llm https://api.openai.com/v1 --llm-model gpt-4o        # by a language model (paper)

README.md in this folder says what IN may hold. OUT gets one row per line, as in R1-VL-10K, without
reflective paths (official). The same command goes on where the last one stopped or failed.

The rules are ours: they read English, and each form is a wording of the path itself. Of the paper's
three prompts only the first was published, for gpt-4o at temperature 0.9. These are ours: they ask
for the steps alone, because only these are rewarded. What no step of the path states is dropped.
Exit status: 0 all rows done, 1 some rows failed, 2 stopped, 130 Ctrl-C.
"""
import argparse
import json
import os
import re
import sys
import time
import urllib.request
from http.client import HTTPException
from multiprocessing.pool import ThreadPool, TimeoutError
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from stepgrpo import REFLECTIVE, UserError, canonical, read_rows, split_sections, stated_key_steps

PER_STEP = 3  # groups of one step: each further one makes the others count for less

class RowError(Exception):
    """One row cannot be done; the run goes on with the others."""

# ─── By rule ──────────────────────────────────────────────────────────────────────────────────────

# A step in its canonical spelling is a list of tokens. Each token becomes a letter that says what
# it can be part of. On the string of these letters an equation, a counted number and a phrase are
# one short pattern each. A token that no list names is a number n, a variable v or a word w.
WORDS = {
    "r": "= < > ≤ ≥ ≠ ≈ ≅ ∥ ⊥ ∈",  # relations
    "o": "+ - * ⊗ / ^ ±",
    "v": "sin cos tan log",
    "i": "a",  # an article or a variable
    "c": "is are was were",
    "a": "and →",
    "f": "of",
    # These tie a number to its neighbour: '3 to 4', '5 more than x'.
    "b": "to or than per as over out more less fewer least most between squared cubed",
    "p": "for from in on at with by into",
    # A clause starts after one of these, and no phrase holds one.
    "s": "an the this that its each all so thus hence therefore then since because if when"
         " where which who we our you it they there let have has had get gets gives be can must"
         " will do does not no know find see shows also only but means",
    ".": ". ; ! ? ... &",
    ":": ": ∶", ",": ",", "(": "( [ { ⦃", ")": ") ] } ⦄",
}
KINDS = {word: kind for kind, words in WORDS.items() for word in words.split()}
EQUATION = re.compile(  # from the start of a clause to the first relation, then side after side
    r"(?:(?<![^.sc])[pb]*(?![fao])(?P<left>[nvuowpbaf]{1,20}))?"
    r"(?P<right>(?:r(?:[nvou]|(?<=n)w(?=[or])|(?<=[ro])w(?=[ornvs.]|$)){1,40}+(?<!o)){1,9}+)"
    r"(?!w{0,3}(?:[orbfv]|a[nvw]))")
SIDE = re.compile("[^r]+")
# '7 red balls', '1/2 cup', '50%'; not '3 grid' in '2 by 3 grid'. A number alone is in every path.
COUNTED = re.compile(r"(?<![onvurb])(?<!n[apbf.])(?:no)?n(?:u|w{1,3})(?![nou])")
MEASURED = re.compile(r"w{1,2}[cf]n(?:on)*(?![nouvbf]|an)")
PHRASE = re.compile(r"w{2,3}(?!w)")
PROSE = re.compile(r"[.scr]|ww|^w*$")

def kind_of(token, names):
    """The letter of a token. names: what the step writes in capitals, such as AB."""
    if token in KINDS:
        return KINDS[token]
    if token[0] in "~%":  # ~ marks a unit
        return "u"
    if not token.isalpha() or len(token) == 1 or token.upper() in names:
        return "n" if re.fullmatch(r"-?\d+(\.\d+)?", token) else "v"
    return "s" if token.endswith(("ing", "ly")) else "w"

def kinds_of(tokens, names):
    """The letters of a step, as one string."""
    kinds = "".join(kind_of(token, names) for token in tokens)
    kinds = re.sub("i(?=[wsn])", "s", kinds).replace("i", "v")
    kinds = re.sub("(?<=[nv]):(?=[nv])", "o", kinds).replace(":", ".")  # a ratio
    kinds = re.sub("(?<=n),(?=n)", "b", kinds)  # a list
    kinds = re.sub("(?<=[fobpa])s", "p", kinds)  # 'area of the square' is one clause
    for _ in range(3):  # innermost brackets first: mathematics is one variable, prose stands alone
        kinds = re.sub(r"\(([^()]*)\)", lambda m: f".{m[1]}." if PROSE.search(m[1])
                       else "v" * len(m[0]), kinds)
    kinds = re.sub("[(),]", ".", kinds)  # one bracket without the other
    return re.sub("(r[nvouw]+)a(?=[nvouwpf]*r)", r"\1.", kinds)  # 'x = 3 and y = 4'

def candidates(step):
    """Groups of forms from one step, the most telling first: equations, numbers, phrases."""
    # Before a word canonical drops the sign of a product, which would tear '3' from '3 × width'.
    marked = re.sub(r"\b ?(?:[×*·]|\\times|\\cdot|times|multiplied by) ?\b", " ⊗ ", step)
    tokens = canonical("\n" + marked).split()
    names = re.findall(r"\b[A-Z]{2,4}\b", step)
    kinds, groups = kinds_of(tokens, names), {}

    def form(start, end):
        return " ".join(tokens[start:end]).replace("~", "").replace("⊗", "*")
    def equation(match):
        """The whole chain, and its last two sides; never the result alone, which is everywhere."""
        start = match.start("left" if match["left"] else "right")
        sides = [m.span() for m in SIDE.finditer(kinds, start, match.end())]
        # '12 = 12' asks for nothing, and '8 = 3' may be torn from 'root of 8 = 3'.
        return [form(chain[0][0], match.end())
                for chain in (sides, sides[-2:])[:len(sides) - 1]
                if len({form(*side) for side in chain}) == len(chain)
                and not all(re.fullmatch("n[uw]?", kinds[a:b]) for a, b in chain)]
    for pattern in (EQUATION, COUNTED, MEASURED, PHRASE):
        for match in pattern.finditer(kinds):
            forms = equation(match) if pattern is EQUATION else [form(*match.span())]
            if forms:  # and no later pattern reads it again
                groups[forms[0]] = forms
                kinds = kinds[:match.start()] + "." * len(match[0]) + kinds[match.end():]
    return [*groups.values()][:9]

def by_rule(row, args):
    """Row → key steps. Of each step at most PER_STEP groups, none twice in a path.

    Only forms that the rewards find in their own step are kept. So the path earns k = 1.
    """
    found = [candidates(step) for step in split_sections(row.reference[:6000]).steps[:50]]
    forms = [form for groups in found for group in groups for form in group]
    stated = stated_key_steps(row.reference, [[form] for form in forms])
    key_steps, seen = [], set()
    for groups, indices in zip(found, stated):
        here = {forms[i] for i in indices} - seen
        groups = [[form for form in group if form in here] for group in groups]
        key_steps += [group for group in groups if group][:PER_STEP]
        seen |= here
    if not key_steps:
        raise RowError("the rules find no key step in it")
    return key_steps

# ─── By a language model ──────────────────────────────────────────────────────────────────────────

LISTS = """Reply with nothing but one JSON object:
{"Step 1": ["7 objects", "right angle"], "Step 2": ["7 - 3 = 4"]}
"""
EXTRACT = """Copy from each step of this solution what any right solution must state:
variables, numbers, equations, relations; at most three of a step, word for word, none
twice, equations whole, other phrases of at most three words. """ + LISTS
TRIM = """Strike from these key elements of a solution what repeats another one, only
restates the question, or can be done without. """ + LISTS
AUGMENT = """Other right solutions word these key elements of a solution differently.
Give of each up to four forms that mean exactly the same here: a number written out, a
synonym, the sides of an equation swapped; not its result alone, and nothing broader.
Reply with nothing but one JSON object that has every element:
{"7 objects": ["seven objects", "7 things"], "7 - 3 = 4": ["4 = 7 - 3"]}
"""
WAITS = (0, 1, 2, 4, 8, 16)  # seconds before each try of a request
# It follows no redirect, because urllib would send the key to whatever host a server names.
OPENER = urllib.request.OpenerDirector()
for handler in ("ProxyHandler", "HTTPHandler", "HTTPSHandler"):
    OPENER.add_handler(getattr(urllib.request, handler)())

def fetch(request, args):
    """→ status, seconds to wait if it is a refusal, text without the key."""
    with OPENER.open(request, timeout=args.timeout) as response:
        text = response.read(1 << 20).decode("utf-8", "replace").replace("\\/", "/")
        wait = response.headers.get("Retry-After", "")[:6]
        return response.status, int(wait) if wait.isdecimal() else 0, text.replace(args.key, "***")

def lists_of(text):
    """A chat completion → the JSON object in its reply, {text: [text, …]}."""
    reply = text
    try:
        reply = json.loads(text)["choices"][0]["message"]["content"].rpartition("</think>")[2]
        inner = reply[reply.find("{"):reply.rfind("}") + 1][:30_000]
        # A single backslash is that of LaTeX: \frac.
        inner = re.sub(r'\\(["\\/]|u[0-9a-f]{4})|\\', lambda m: m[0] if m[1] else r"\\", inner)
        # Bounded: a key step is short, and the path is searched for each.
        return {name: [text for text in texts if canonical(text) and len(text) <= 100][:9]
                for name, texts in json.loads(inner, strict=False).items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"not the JSON asked for: {reply[:80]!r}") from None

def ask(prompt, read, args):
    """read(lists) of the first reply that can be read. RowError: there is none."""
    body = {"model": args.llm_model, "messages": [{"role": "user", "content": prompt}]}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {args.key}"}
    url = args.llm.rstrip("/") + "/chat/completions"
    least = 0  # what a server asks for
    for wait in WAITS:
        time.sleep(min(300, max(wait, least)))
        said = ""
        try:
            request = urllib.request.Request(url, json.dumps(body).encode(), headers)
            # In a thread, because a socket's own time limit starts anew with each byte.
            with ThreadPool(1) as pool:
                status, least, text = pool.apply_async(fetch, (request, args)).get(args.timeout)
            said = f"HTTP {status}: {' '.join(text[:9000].split())[:200]}"
            if status // 100 == 3 or status in (401, 403, 404):
                raise UserError(f"{url}: {said}")
            return read(lists_of(text))
        except (OSError, HTTPException, TimeoutError, ValueError) as error:
            reason = f"{str(error) or type(error).__name__} {said}"
    raise RowError(f"{len(WAITS)} requests failed, the last one: {reason}")

def by_llm(row, args):
    """Row → key steps, by three requests: extract, trim, augment (paper)."""
    def elements_of(lists):
        """→ {canonical: element}: what the path states, PER_STEP of a step."""
        elements = {}
        for texts in lists.values():
            new = {canonical(text): text for text in texts
                   if any(stated_key_steps(row.reference, [[text]]))}
            elements |= [*new.items()][:PER_STEP]
        if not elements:
            raise ValueError("the path states nothing of it")
        return elements
    def groups_of(lists):
        """→ each element and its other forms. A bare number or letter is none: it is everywhere."""
        lists = {canonical(name): texts for name, texts in lists.items()}
        if not lists.keys() >= elements.keys():
            raise ValueError("an element is missing")
        return [[text, *(form for form in lists[key][:4] if canonical(form) != key
                         and not re.fullmatch(r"[\d.,]*|.", form))]
                for key, text in elements.items()]
    elements = {}
    for task, read in ((EXTRACT, elements_of), (TRIM, elements_of), (AUGMENT, groups_of)):
        listed = "\n".join(elements.values())
        elements = ask(f"{task}\nQuestion: {row.problem}\n\nSolution:\n{row.reference}\n\n"
                       f"Key elements:\n{listed}", read, args)
    return elements

# ─── Files ────────────────────────────────────────────────────────────────────────────────────────

def head_of(row, args):
    """A row of OUT up to its groups. Image paths start from OUT's folder."""
    images = [os.path.relpath(image, args.OUT.resolve().parent) for image in row.images]
    head = {"problem": row.problem, "solution": row.reference,
            "image_path": images[0] if len(images) == 1 else images,
            "key_steps": {"by": args.llm_model or "rule"}}
    return json.dumps(head, ensure_ascii=False)[:-2].encode()

def read_done(out, heads):
    """The heads that OUT already holds. A last line torn by a kill is cut off."""
    out.touch()
    *lines, torn = out.read_bytes().split(b"\n")
    done = {line.partition(b', "Steps": ')[0] for line in lines}
    ours = any(head[:len(torn)] == torn[:len(head)] for head in heads)
    if done - {*heads} or torn and not ours:
        raise UserError(f"{out} has rows not made from IN in this way; name another")
    os.truncate(out, out.stat().st_size - len(torn))
    return done

def run(args, failed):
    """Read, ask, write each row as it comes. What is wrong with a row goes into failed."""
    rows, failed[:] = read_rows(args.IN)
    heads = {head_of(row, args): row for row in rows if REFLECTIVE not in row.reference}
    print(f"{len(rows) - len(heads)} rows are reflective or stand twice")
    done = read_done(args.OUT, heads)
    todo = [(head, row) for head, row in heads.items() if head not in done]
    in_a_row = 0
    def work(job):
        head, row = job
        try:
            if not split_sections(row.reference).steps:
                raise RowError("its solution has no steps")
            return head, by_llm(row, args) if args.llm else by_rule(row, args), ""
        except RowError as error:
            return head, [], f"{row.where}: {error}"
    # Threads, because they only wait. Leaving the block does not wait for open requests.
    with open(args.OUT, "ab", 0) as out, ThreadPool(args.workers) as pool:
        for head, groups, error in tqdm(pool.imap_unordered(work, todo), "rows", len(todo)):
            in_a_row = 0 if groups else in_a_row + 1
            if groups:
                steps = json.dumps(groups, ensure_ascii=False).encode("utf-8", "replace")
                out.write(head + b', "Steps": ' + steps + b"}}\n")
            else:
                failed.append(error)
            if args.llm and in_a_row == 10:
                raise UserError("ten rows in a row failed")

def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("IN")
    add("OUT", type=Path)
    add("--llm", metavar="URL", help="OpenAI-compatible server, up to /v1")
    add("--llm-model")
    add("--api-key-env", help="OPENAI_API_KEY if set")
    add("--workers", type=int, default=1, help="rows at once, 1 to 64")
    add("--timeout", type=float, default=120, help="seconds of one request")
    args = parser.parse_args(argv)
    missing = "" if args.api_key_env else "no-key"
    args.key = os.environ.get(args.api_key_env or "OPENAI_API_KEY", missing).strip()
    for good, rule in (
            (bool(args.llm) == bool(args.llm_model), "--llm and --llm-model need each other"),
            (re.fullmatch("https?://[!-~]+", args.llm or "http://x"), "--llm is no address"),
            (not args.llm or re.fullmatch("[!-~]{4,}", args.key), "the key is empty or has spaces"),
            (1 <= args.workers <= 64, "--workers is 1 to 64"),
            (args.OUT.suffix == ".jsonl", "OUT must end in .jsonl")):
        if not good:
            parser.error(rule)
    return args

def main(argv=None):
    args, failed, ending, status = parse_arguments(argv), [], "", 0
    try:
        run(args, failed)
    except (UserError, OSError) as error:
        ending, status = f"stopped: {error}", 2
    except KeyboardInterrupt:
        ending, status = "stopped; the same command goes on", 130
    for line in [*failed, f"{len(failed)} rows failed. {ending}"]:
        # Neither the key nor a control character of a server or a file reaches the terminal.
        line = line.replace(args.key, "***")
        print("".join(c if c.isprintable() else " " for c in line), file=sys.stderr)
    return status or int(bool(failed))

if __name__ == "__main__":
    sys.exit(main())

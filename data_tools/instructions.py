"""Questions and answers made from documentation entries, as conversations in OpenAI's `messages` form.

Contract: `build_instructions(entries)` is a pure function of the entries: which questions an entry gets and how they
are phrased follows from a hash of its id. Every example's id begins with the id of the one entry it was made from, so
that the split of the documents is the split of the examples: nothing about a held-out document is asked in training.
Answers are the documentation's own words, cut at a sentence, short enough that most conversations fit 256 tokens.
"""

from __future__ import annotations

import ast
import hashlib
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence

from data_tools.python_docs import Entry, is_private, normalized

LONGEST_ANSWER = 480  # characters
LONGEST_SIGNATURE = 200
LONGEST_LIST = 12  # members named in one answer

# Deprecated or machine-made parts of the library that nobody should learn from; their documents stay in the corpus.
NOT_ASKED = ("lib2to3", "distutils", "encodings", "tkinter.tix", "msilib")

# Paragraphs that do not begin an answer: grammar, links, histories
NO_ANSWER = r"::=|^\*\*Source code|^(New|Changed|Deprecated) in version|^(Added|Changed|Deprecated) since"

SYSTEM = "You are a helpful assistant that knows Python's standard library."

WHAT = {
    "function": [
        "What does {name} do?", "What does the function {name} do?", "Explain {name}.", "What is {name} for?",
        "In Python, what does {name} do?", "Tell me about the {name} function.", "When would I use {name}?",
        "Can you describe {name}?",
    ],
    "method": [
        "What does {name} do?", "What does the method {name} do?", "Explain the method {name}.",
        "What happens when I call {name}?", "What does the method {short} of {owner} do?", "Describe {name}.",
        "In Python, what is {name} for?",
    ],
    "class": [
        "What is {name}?", "What is the class {name} for?", "Explain the class {name}.", "Tell me about {name}.",
        "What does {name} represent?", "Describe {name} in Python.", "What can I use {name} for?",
    ],
    "exception": [
        "What does {name} mean?", "When is {name} raised?", "What is {name}?", "Explain the exception {name}.",
        "My program stopped with {name}. What does it mean?",
    ],
    "module": [
        "What is the module {name} for?", "What does the {name} module do?", "Tell me about the {name} module.",
        "What is {name} in Python's standard library?", "Describe the module {name}.", "Why would I import {name}?",
    ],
    "property": [
        "What is {name}?", "What does the attribute {name} hold?", "What does {name} give me?", "Explain {name}.",
    ],
}  # fmt: skip
ARGUMENTS = [
    "How do I call it?", "What is its signature?", "Which arguments does it take?", "What are its parameters?",
    "Show me the signature.", "And how is it called?",
]  # fmt: skip
SIGNATURE = [
    "What is the signature of {name}?", "How do I call {name}?", "Which arguments does {name} take?",
    "What are the parameters of {name}?",
]  # fmt: skip
WHERE = ["Where do I find it?", "Which module is it in?", "How do I import it?"]
REVERSE = [
    "Which {kind} of {parent} does this? {summary}", "I need a {kind} of {parent} for this: {summary}",
    "What is this {kind} of {parent} called? {summary}",
]  # fmt: skip
MEMBERS = {
    "module": ["What is in the module {name}?", "Which functions and classes has {name}?", "What does {name} hold?"],
    "class": ["Which methods does {name} have?", "What can I do with a {name}?", "List methods of {name}."],
}
TOPIC = [
    "Explain this topic of the Python language: {name}.", "What does the Python reference say about {name}?",
    "Tell me about {name} in Python.", "How does Python define {name}?",
]  # fmt: skip
STATEMENT = [
    "What does {name} do in Python?", "Explain {name}.", "How does {name} work?", "When do I use {name}?",
    "What is {name} for in Python?",
]  # fmt: skip
KEYWORD = [
    "What does the keyword {name} do?", "What is the keyword {name} for?", "Explain the Python keyword {name}.",
    "What does {name} mean in Python code?",
]  # fmt: skip
# Keywords whose section is not called after them ('The "if" statement' is)
KEYWORDS_OF_TOPIC = {
    "Boolean operations": ("and", "or", "not"), "Lambdas": ("lambda",), "Membership test operations": ("in", "not in"),
    "Identity comparisons": ("is", "is not"), "Await expression": ("await",), "Function definitions": ("def",),
    "Class definitions": ("class",), 'The "try" statement': ("except", "finally"), 'The "with" statement': ("as",),
    "Coroutine function definition": ("async def",), 'The "if" statement': ("elif", "else"),
    'The "import" statement': ("from",), 'The "match" statement': ("case",),
}  # fmt: skip
GRAMMAR = ["What is its grammar?", "How is it written?", "What is the syntax?"]
GREETINGS = [
    "Hello", "Hello!", "Hi", "Hi there", "Hey", "Good morning", "Good evening", "Who are you?", "What can you do?",
    "What do you know?", "Can you help me?", "What is your job?",
]  # fmt: skip
INTRODUCTIONS = [
    "Hello! I am a small language model. Ask me about Python's standard library.",
    "Hi! I know Python's documentation. Which function, class or module shall I explain?",
    "I am a small model trained on Python's documentation. Ask me what a function or a module does.",
]

Example = dict[str, object]


def build_instructions(entries: Sequence[Entry]) -> list[Example]:
    """Make the instruction set.

    Returns:
        `{"id": "ENTRY_ID/KIND_OF_QUESTION", "messages": [...]}` in the order of the entries, greetings first. Ids are
        unique; `entry_id_of` gives the entry's id back. Of examples with equal messages only the first is kept.
    """
    asked = [entry for entry in entries if entry.kind == "topic" or _is_asked(entry)]
    members = _members_of(asked)
    examples: list[Example] = []
    seen: set[str] = set()
    for example in [*_greetings(), *(e for entry in asked for e in _examples_of(entry, members.get(entry.id, [])))]:
        key = repr(example["messages"])
        if key not in seen:
            seen.add(key)
            examples.append(example)
    return examples


def entry_id_of(example_id: str) -> str:
    """The id of the entry an example was made from."""
    return example_id.rsplit("/", 1)[0]


def _is_asked(entry: Entry) -> bool:
    return not is_private(entry.full_name) and not entry.module.startswith(NOT_ASKED)


def _members_of(entries: Iterable[Entry]) -> dict[str, list[str]]:
    """Names of the functions and classes of each module, and of the methods of each class, by the owner's id."""
    entries = list(entries)
    owners = {e.full_name: e.id for e in entries if e.kind in ("module", "class", "exception")}
    members: dict[str, list[str]] = {}
    for entry in entries:
        if entry.kind in ("function", "class", "method"):
            owner, _, name = f"{entry.module}.{entry.name}".removeprefix("builtins.").rpartition(".")
            if owner in owners:
                members.setdefault(owners[owner], []).append(name)
    return members


def _examples_of(entry: Entry, members: list[str]) -> Iterator[Example]:
    if entry.kind == "topic":
        yield from _topic_examples(entry)
        return
    answer = summary_of(entry.doc, entry.name.rpartition(".")[2])
    if answer is None:
        return
    choose = _Chooser(entry.id)
    owner, _, short = entry.name.rpartition(".")
    words = {"name": f"`{entry.full_name}`", "short": f"`{short}`", "owner": f"`{owner}`"}
    call = f"`{entry.full_name}{entry.signature}`" if entry.signature else None
    if call is not None and len(call) > LONGEST_SIGNATURE:
        call = None

    turns = [choose(WHAT[entry.kind], "what").format(**words), answer]
    system = choose.chance("system", 10)
    if call is not None and choose.chance("talk?", 45):
        turns += [choose(ARGUMENTS, "arguments"), call]
        if entry.kind in ("function", "class") and choose.chance("where?", 50):
            turns += [choose(WHERE, "where"), _where(entry)]
        yield _example(entry, "talk", *turns, system=system)
    else:
        yield _example(entry, "what", *turns, system=system)
        if call is not None and choose.chance("signature?", 35):
            yield _example(entry, "signature", choose(SIGNATURE, "signature").format(**words), call)
    first = _first_sentence(answer)
    if entry.kind in ("function", "method", "class") and 30 <= len(first) <= 200 and choose.chance("reverse?", 20):
        if short.lower() not in first.lower() and (entry.module != "builtins" or owner):
            parent = f"`{entry.full_name.rpartition('.')[0]}`"
            question = choose(REVERSE, "reverse").format(kind=entry.kind, parent=parent, summary=first)
            yield _example(entry, "reverse", question, f"That is `{entry.full_name}`.")
    if len(members) >= 2:
        question = choose(MEMBERS["module" if entry.kind == "module" else "class"], "members").format(**words)
        yield _example(entry, "members", question, _listing(members))


def _where(entry: Entry) -> str:
    if entry.module == "builtins":
        return f"It is built in: no import is needed, `{entry.name}` is always there."
    top, _, inner = entry.name.partition(".")
    use = f", then use `{entry.name}`" if inner else ""
    return f"It is in the module `{entry.module}`: `from {entry.module} import {top}`{use}."


def _listing(members: list[str]) -> str:
    named = [f"`{name}`" for name in members[:LONGEST_LIST]]
    if len(members) > LONGEST_LIST:
        return f"Among others {', '.join(named)}; {len(members)} in all."
    return f"{', '.join(named[:-1])} and {named[-1]}."


def _topic_examples(entry: Entry) -> Iterator[Example]:
    answer = summary_of(entry.doc, "")
    if answer is None:
        return
    statement = re.fullmatch(r'The ("[^"]+") (statement|clause)|("[^"]+") clause', entry.name)
    name = f"the {entry.name.removeprefix('The ')}" if statement else entry.name
    name = name.replace('"', "`")
    blocks = _paragraphs(entry.doc)
    grammar = next((block for block in blocks if "::=" in block and len(block) < LONGEST_ANSWER), None)
    code = next((block for block in blocks if _is_code(block) and len(block) < LONGEST_ANSWER), None)
    choose = _Chooser(entry.id)
    templates = STATEMENT if statement else TOPIC
    first = choose.index("what", len(templates))
    for step in range(3):
        question = templates[(first + step) % len(templates)].format(name=name)
        turns = [question, answer]
        if step == 1 and grammar:
            turns += [choose(GRAMMAR, "grammar"), _fenced(grammar)]
        if step == 2 and code:
            turns += ["Can you show an example?", _fenced(code, "python")]
        yield _example(entry, f"topic{step}", *turns)
    keywords = [statement[1].strip('"')] if statement and statement[1] else []
    for keyword in (*keywords, *KEYWORDS_OF_TOPIC.get(entry.name, ())):
        question = choose(KEYWORD, f"keyword {keyword}").format(name=f"`{keyword}`")
        yield _example(entry, f"keyword {keyword}", question, answer)


def _fenced(block: str, language: str = "") -> str:
    return f"```{language}\n{textwrap.dedent(block).rstrip()}\n```"


def _greetings() -> Iterator[Example]:
    for i, greeting in enumerate(GREETINGS):
        for j, answer in enumerate(INTRODUCTIONS):
            yield {"id": f"greeting:{i}-{j}/hello", "messages": _messages([greeting, answer])}


def _example(entry: Entry, kind: str, *turns: str, system: bool = False) -> Example:
    head = [{"role": "system", "content": SYSTEM}] if system else []
    return {"id": f"{entry.id}/{kind}", "messages": head + _messages(turns)}


def _messages(turns: Sequence[str]) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]


# -- answers from docstrings -------------------------------------------------------------------------------------------


def summary_of(doc: str, name: str) -> str | None:
    """The prose a docstring begins with, unwrapped, in at most LONGEST_ANSWER characters; None where it has none.

    A repeated signature ("sleep(seconds)") in front of it is left out; a first paragraph of a few words is followed by
    the next one; text that announces something not quoted ends before the announcement.
    """
    prose: list[str] = []
    runs_on = False  # into a block that is not quoted: "For example, the statements"
    for block in _paragraphs(doc):
        if not prose and (_is_signature(block, name) or re.search(NO_ANSWER, block)):
            continue
        if not _is_prose(block):
            runs_on = bool(prose) and prose[-1][-1].isalnum()
            break
        prose.append(normalized(_without_markup(re.sub(r"(?<=[a-z])-\n *(?=[a-z])", "-", block))))
        if sum(map(len, prose)) > 160:
            break
    text = " ".join(prose)
    if runs_on and ". " in text:
        text = text[: text.rfind(". ") + 1]
    if len(text) > LONGEST_ANSWER:
        end = max(text.rfind(mark, 0, LONGEST_ANSWER) for mark in (". ", "? ", "! "))
        text = text[: end + 1] if end > 40 else ""
    while text.endswith(":"):
        text = text[: max(text.rfind(". "), -1) + 1]
    return text if len(text) >= 12 and " " in text else None


def _paragraphs(doc: str) -> list[str]:
    return [block.strip("\n") for block in re.split(r"\n\s*\n", doc) if block.strip()]


def _is_signature(block: str, name: str) -> bool:
    first = block.split("\n")[0]
    if not name:  # the language reference: "object.__mro_entries__(self, bases)"
        return re.fullmatch(r"\w+(\.\w+)+(\(.*\))?", first) is not None
    return re.match(rf"(\w+\.)?{re.escape(name)}\s*\(.*?\)\s*(-+>.*)?$", first) is not None


def _is_code(block: str) -> bool:
    """An indented block that Python can read (definition lists are indented too)."""
    if not all(line.startswith("   ") for line in block.split("\n")):
        return False
    if block.lstrip().startswith(">>> "):
        return True
    try:
        return bool(ast.parse(textwrap.dedent(block)).body) and len(block.split()) > 2
    except SyntaxError:
        return False


def _is_prose(block: str) -> bool:
    """Running text: no indented block, no doctest, list, table, underlined heading or parameter list."""
    lines = block.split("\n")
    if len(lines) > 1 and lines[0] and lines[1].startswith((" ", "\t")) and not lines[0].rstrip().endswith((",", "-")):
        # a hanging indent is a parameter ("sep\n  string between") unless the first line runs on
        if len(lines[0]) < 50:
            return False
    if lines[0].startswith(("  ", "\t")):
        return False
    marked = r"\s*(>>>|[-*+o] |@\w|:\w+[^:]*:|\w+ *--? |[*=~^-]{3,}|\||\.\. |#)"
    return not any(re.match(marked, line) for line in lines)


def _without_markup(text: str) -> str:
    """Sphinx roles and double backquotes to plain code quotes: :func:`len` and ``len`` to `len`."""
    text = re.sub(r":\w+(?::\w+)?:`~?([^`]+)`", r"`\1`", text)
    return re.sub(r"``([^`]+)``", r"`\1`", text).rstrip(" :") + (":" if text.rstrip().endswith(":") else "")


def _first_sentence(text: str) -> str:
    end = re.search(r"\.(?=\s+[A-Z])", text)
    return text[: end.end()] if end else text


class _Chooser:
    """Choices that follow from an id: the same for every run, spread evenly over the ids."""

    def __init__(self, identity: str) -> None:
        self.identity = identity

    def index(self, slot: str, count: int) -> int:
        """A number below `count`."""
        return int.from_bytes(hashlib.sha256(f"{self.identity}|{slot}".encode()).digest()[:8], "big") % count

    def __call__(self, options: Sequence[str], slot: str) -> str:
        return options[self.index(slot, len(options))]

    def chance(self, slot: str, percent: int) -> bool:
        """True for `percent` of the ids."""
        return self.index(slot, 100) < percent

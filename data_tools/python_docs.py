"""The built-in corpus: what this Python says about itself, as documents.

Contract: `read_entries()` lists one Entry for each docstring of the standard library and for each section of the
language reference (`pydoc_data.topics`), always in the same order with the same ids, wherever Python is installed; the
content follows the Python release and which modules the distribution ships. No library module is executed: Python
sources are parsed, only built-in and extension modules (machine code, no Python to run) are imported for their docs.
Equal texts are kept once, under the public name, so that no document is in both halves of the split.

`is_held_out(id)` is the fixed split: about HELD_OUT_PERCENT of the ids, by hash, the same on every machine for ever.
"""

from __future__ import annotations

import ast
import builtins
import copy
import hashlib
import importlib.util
import inspect
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from importlib.machinery import BuiltinImporter, ExtensionFileLoader
from pathlib import Path

from minillm.utils.errors import UserError
from minillm.utils.logging import warn

HELD_OUT_PERCENT = 2
SHORTEST_DOC = 15  # characters; below stand "Internal.", "See above."

# Not prose about Python: tests, demos, generated tables, bundled wheels; and the pure-Python twins of C modules, whose
# docstrings say the same in almost the same words and would blur the held-out split.
LEFT_OUT_MODULES = {
    "antigravity", "this", "idlelib", "test", "turtledemo", "pydoc_data", "__phello__", "__hello__",
    "_pydecimal", "_pydatetime", "_pyio", "_sysconfigdata",
}  # fmt: skip
LEFT_OUT_FOLDERS = {"test", "tests", "idle_test", "__pycache__", "_bundled", "site-packages", "encodings"}
UNSAFE_EXTENSIONS = {"readline", "_tkinter"}  # loading them touches the terminal or the display
PRIVATE_TWIN = {"posix": "os", "nt": "os"}  # beside the rule `_name` -> `name`


@dataclass(frozen=True)
class Entry:
    """One documented thing. `id` is "kind:dotted.name"; `doc` the docstring without indentation."""

    kind: str  # module, class, exception, function, method, property, topic
    module: str
    name: str  # within the module: "" for the module, "TextWrapper.fill" for a method; the title of a topic
    signature: str | None  # "(text, width=70)" without self, where it is known
    doc: str

    @property
    def id(self) -> str:
        """Stable identity; the split and the instruction set hang on it."""
        return f"{self.kind}:{self.full_name}"

    @property
    def full_name(self) -> str:
        """How code refers to it: "textwrap.wrap", "len", "textwrap"."""
        if self.kind == "topic" or self.module == "builtins" and self.name:
            return self.name
        return f"{self.module}.{self.name}" if self.name else self.module

    @property
    def text(self) -> str:
        """The document: a heading with name and signature, an empty line, the docstring."""
        if self.kind == "topic":
            return f"{self.name}\n\n{self.doc}"
        built_in = "built-in " if self.module == "builtins" and self.kind == "function" else ""
        return f"{built_in}{self.kind} {self.full_name}{self.signature or ''}\n\n{self.doc}"


def is_held_out(identity: str) -> bool:
    """Whether the document with this id belongs to the validation split."""
    digest = hashlib.sha256(identity.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < HELD_OUT_PERCENT


def read_entries() -> list[Entry]:
    """All entries of this Python: built-ins, then Python modules by name (public ones first), C modules, topics."""
    twins: dict[tuple[str, str], str] = {}
    found = list(_entries_of_c_module(builtins, "builtins", twins))
    for module, path in source_files():
        tree = parse(path)
        if tree is not None:
            found += entries_of_tree(tree, module)
            twins.update(_twins_of_tree(tree, module))
    found += _entries_of_c_modules(twins)
    found += _entries_of_topics()
    return _keep_first(found)


def _keep_first(entries: Iterable[Entry]) -> list[Entry]:
    ids: set[str] = set()
    texts: set[str] = set()
    kept = []
    for entry in entries:
        same = normalized(entry.doc)
        if len(same) >= SHORTEST_DOC and entry.id not in ids and same not in texts:
            ids.add(entry.id)
            texts.add(same)
            kept.append(replace(entry, doc=entry.doc.strip("\n").rstrip()))
    return kept


def normalized(text: str) -> str:
    """Text with every run of white space as one space: what makes two docstrings the same."""
    return " ".join(text.split())


# -- Python sources ----------------------------------------------------------------------------------------------------


def source_files() -> list[tuple[str, Path]]:
    """(module name, file) of the standard library's Python modules, public ones first, then by name."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for top in sorted(sys.stdlib_module_names - LEFT_OUT_MODULES):
        if (root / f"{top}.py").is_file():
            files.append((top, root / f"{top}.py"))
        elif (root / top).is_dir():
            for path in (root / top).rglob("*.py"):
                parts = path.relative_to(root).with_suffix("").parts
                if parts[-1] != "__main__" and not LEFT_OUT_FOLDERS.intersection(parts):
                    files.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    if not files:
        raise UserError(
            f"this Python has no standard library sources in {root}, which the built-in corpus is made of: "
            "use a python.org, conda or Linux distribution Python, or name your own text with data_tools.corpus folder"
        )
    return sorted(files, key=lambda item: (is_private(item[0]), item[0]))


def is_private(dotted: str) -> bool:
    """Whether some part of a dotted name begins with an underscore."""
    return any(part.startswith("_") for part in dotted.split("."))


def parse(path: Path) -> ast.Module | None:
    """Parse a source file; one that does not parse (a distribution's own addition) is named and left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        try:
            return ast.parse(path.read_bytes())
        except (SyntaxError, ValueError) as error:
            warn(f"{path} does not parse and is left out of the corpus: {error}")
            return None


def entries_of_tree(tree: ast.Module, module: str) -> list[Entry]:
    """The documented module, classes, functions and methods of one source, without functions inside functions."""
    entries = []
    if doc := ast.get_docstring(tree):
        entries.append(Entry("module", module, "", None, doc))
    for name, node, parent in _definitions(tree.body, "", None):
        if doc := ast.get_docstring(node):
            kind, signature = _kind_and_signature(node, parent)
            entries.append(Entry(kind, module, name, signature, doc))
    return entries


Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _definitions(
    body: list[ast.stmt], prefix: str, parent: ast.ClassDef | None
) -> Iterator[tuple[str, Definition, ast.ClassDef | None]]:
    """Yield (dotted name, node, class it stands in), looking into classes and into if, try and with blocks."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield prefix + node.name, node, parent
            yield from _definitions(node.body, f"{prefix}{node.name}.", node)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield prefix + node.name, node, parent
        else:
            for field in ("body", "handlers", "orelse", "finalbody"):
                for inner in getattr(node, field, []):
                    yield from _definitions(
                        inner.body if isinstance(inner, ast.ExceptHandler) else [inner], prefix, parent
                    )


def _kind_and_signature(node: Definition, parent: ast.ClassDef | None) -> tuple[str, str | None]:
    if isinstance(node, ast.ClassDef):
        bases = [ast.unparse(base) for base in node.bases]
        kind = "exception" if any(_names_exception(name) for name in [node.name, *bases]) else "class"
        constructor = next(
            (item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"), None
        )
        return kind, constructor and _signature(constructor.args, drop_first=True)
    decorators = {ast.unparse(item).split(".")[-1] for item in node.decorator_list}
    if parent is not None and decorators & {"property", "cached_property"}:
        return "property", None
    signature = _signature(node.args, drop_first=parent is not None and "staticmethod" not in decorators)
    if node.returns is not None:
        signature += f" -> {ast.unparse(node.returns)}"
    return ("function" if parent is None else "method"), signature


def _names_exception(name: str) -> bool:
    return name.endswith(("Error", "Exception", "Warning"))


def _signature(arguments: ast.arguments, drop_first: bool) -> str:
    """The parameter list as written, without self or cls."""
    if drop_first:
        arguments = copy.copy(arguments)  # __init__ is asked for twice, for the class and for itself
        field = "posonlyargs" if arguments.posonlyargs else "args"
        setattr(arguments, field, getattr(arguments, field)[1:])
    return f"({ast.unparse(arguments)})"


# -- modules written in C ----------------------------------------------------------------------------------------------


def _twins_of_tree(tree: ast.Module, module: str) -> dict[tuple[str, str], str]:
    """Which names of C modules this module offers as its own: {("_io", "open"): "io", ("_socket", "*"): "socket"}."""
    twins: dict[tuple[str, str], str] = {}
    if f"_{module}" not in sys.stdlib_module_names and module not in PRIVATE_TWIN.values():
        return twins
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            if node.module == f"_{module}" or PRIVATE_TWIN.get(node.module) == module:
                twins.update({(node.module, alias.name): module for alias in node.names})
    return twins


def _entries_of_c_modules(twins: dict[tuple[str, str], str]) -> Iterator[Entry]:
    names = sys.stdlib_module_names - LEFT_OUT_MODULES - UNSAFE_EXTENSIONS
    for name in sorted(names, key=lambda name: (is_private(name), name)):
        try:
            spec = importlib.util.find_spec(name)
        except ValueError:  # __main__-like modules have no spec
            continue
        loader = getattr(spec, "loader", None)
        if loader is BuiltinImporter or isinstance(loader, ExtensionFileLoader):
            try:
                module = importlib.import_module(name)
            except ImportError as error:  # the distribution ships the module but not the library it needs
                warn(f"the module {name} does not load and is left out of the corpus: {error}")
                continue
            yield from _entries_of_c_module(module, name, twins)


def _entries_of_c_module(module: object, name: str, twins: dict[tuple[str, str], str]) -> Iterator[Entry]:
    if doc := _c_doc(module):
        yield Entry("module", name, "", None, doc)
    own = {name, name.removeprefix("_"), PRIVATE_TWIN.get(name, name)}
    for member, value in sorted(vars(module).items()):
        if not (inspect.isbuiltin(value) or inspect.isclass(value)):
            continue
        if name != "builtins" and (value.__module__ or name) not in own:  # borrowed from another module
            continue
        star = twins.get((name, "*")) if not member.startswith("_") else None
        home = twins.get((name, member)) or star or name
        if inspect.isclass(value):
            if value.__name__ != member:  # a second name: IOError, SocketType
                continue
            kind = "exception" if issubclass(value, BaseException) else "class"
            if doc := _c_doc(value):
                yield Entry(kind, home, member, _c_signature(value, member), doc)
            yield from _entries_of_c_class(value, home)
        elif doc := _c_doc(value):
            yield Entry("function", home, member, _c_signature(value, member), doc)


def _entries_of_c_class(cls: type, home: str) -> Iterator[Entry]:
    for member, value in sorted(vars(cls).items()):
        if member.startswith("__"):  # slots: "Return repr(self)." once more
            continue
        doc = _c_doc(value)
        if doc and (inspect.ismethoddescriptor(value) or inspect.isbuiltin(value)):
            yield Entry("method", home, f"{cls.__name__}.{member}", _c_signature(value, member), doc)
        elif doc and (inspect.isgetsetdescriptor(value) or inspect.ismemberdescriptor(value)):
            yield Entry("property", home, f"{cls.__name__}.{member}", None, doc)


def _c_doc(value: object) -> str | None:
    doc = getattr(value, "__doc__", None)
    # an address in a text would differ from process to process
    return inspect.cleandoc(doc) if isinstance(doc, str) and not re.search(r" at 0x[0-9a-f]+", doc) else None


def _c_signature(value: object, name: str) -> str | None:
    text = getattr(value, "__text_signature__", None)
    if text and "<" not in text:
        return normalized(re.sub(r"^\(\$?(self|type|cls|module)(, /)?(, )?", "(", text).replace("$", ""))
    first = (getattr(value, "__doc__", None) or "").strip().split("\n")[0]
    # what older modules write instead, in the docstring's first line: "sleep(seconds)", "chain(*iterables) --> ..."
    match = re.fullmatch(rf"(?:\w+\.)?{re.escape(name)}(\(.*?\))\s*(?:-+>.*)?", first)
    return match and match[1]


# -- the language reference --------------------------------------------------------------------------------------------


def _entries_of_topics() -> Iterator[Entry]:
    """Sections of the language reference, short topics first: "compound" repeats "if", which keeps its own document."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        warn("this Python ships no pydoc_data.topics: the corpus goes without the language reference")
        return
    for _, text in sorted(topics.items(), key=lambda item: (len(item[1]), item[0])):
        yield from _sections(text)


def _sections(text: str) -> Iterator[Entry]:
    lines = text.strip().splitlines()
    starts = [
        i
        for i in range(len(lines) - 1)
        if lines[i].strip() and re.fullmatch(r"([*=\-~\"^])\1{2,}", lines[i + 1]) and len(lines[i + 1]) >= len(lines[i])
    ]
    for start, end in zip(starts, [*starts[1:], len(lines)]):
        body = "\n".join(lines[start + 2 : end]).strip("\n")
        if body.strip():
            yield Entry("topic", "", lines[start].strip(), None, body)

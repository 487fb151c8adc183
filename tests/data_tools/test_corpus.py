"""Corpora: the built-in one checked against the documentation itself, folders of one's own, and input that is wrong."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_tools.builtin import prepare_builtin
from data_tools.corpus import build_folder
from data_tools.files import PIECE_BYTES
from data_tools.formats import read_text_pieces
from data_tools.instructions import build_instructions
from data_tools.python_docs import Entry, is_held_out, normalized
from data_tools.readers import iterate_documents
from minillm.utils.errors import UserError

ROOT = Path(__file__).parents[2]


def corpus_command(*arguments: object, seed: str = "0") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "data_tools.corpus", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
    )


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def docs(tmp_path_factory) -> Path:
    """The built-in corpus with sources, by the real command."""
    out = tmp_path_factory.mktemp("docs")
    done = corpus_command("python-docs", "--out", out, "--source", seed="1")
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """The built-in corpus as the quickstart makes it."""
    out = tmp_path_factory.mktemp("plain") / "corpus"
    done = corpus_command("python-docs", "--out", out, seed="2")
    assert done.returncode == 0, done.stderr
    return out


def without_source(documents: list[dict]) -> list[dict]:
    return [document for document in documents if not document["id"].startswith("source:")]


# -- the built-in corpus -----------------------------------------------------------------------------------------------


def test_python_docs_hold_the_documentation(plain):
    documents = {d["id"]: d["text"] for half in ("train", "validation") for d in read(plain / f"{half}.jsonl")}
    assert 7_000 < len(documents) < 15_000
    assert 1.8e6 < sum(len(text.encode()) for text in documents.values()) < 5e6
    import textwrap

    assert documents["function:len"] == f"built-in function len(obj, /)\n\n{len.__doc__}"
    assert documents["function:textwrap.wrap"] == (
        f"function textwrap.wrap(text, width=70, **kwargs)\n\n{inspect.getdoc(textwrap.wrap)}"
    )
    assert documents["method:textwrap.TextWrapper.fill"].startswith("method textwrap.TextWrapper.fill(text)\n\n")
    assert documents["function:time.sleep"].startswith("function time.sleep(seconds)\n\n")
    assert 'topic:The "if" statement' in documents and "module:math" in documents
    assert not any(name.startswith(("module:test", "module:idlelib", "module:this")) for name in documents)


def test_the_split_is_fixed_and_no_text_is_in_both_halves(plain):
    train, validation = read(plain / "train.jsonl"), read(plain / "validation.jsonl")
    assert 0.01 < len(validation) / len(train) < 0.03
    # two ids whose halves must never change: runs of different weeks are compared on this split
    assert is_held_out("exception:TimeoutError") and not is_held_out("function:len")
    bodies = [{normalized(d["text"].partition("\n\n")[2]) for d in half} for half in (train, validation)]
    assert not bodies[0] & bodies[1]
    ids = [d["id"] for d in train + validation]
    assert len(ids) == len(set(ids))


def test_the_same_machine_writes_the_same_bytes_and_sources_change_nothing_else(plain, docs):
    for name in ("instructions-train.jsonl", "instructions-validation.jsonl"):
        assert (plain / name).read_bytes() == (docs / name).read_bytes()
    for name in ("train.jsonl", "validation.jsonl"):
        assert read(plain / name) == without_source(read(docs / name))


def test_no_folder_of_this_machine_is_in_the_corpus(plain):
    prefixes = [str(Path(inspect.getfile(os)).parent), str(ROOT), str(Path.home()) + "/"]
    for name in ("train.jsonl", "validation.jsonl"):
        assert not any(prefix in document["text"] for document in read(plain / name) for prefix in prefixes)


def test_sources_do_not_hold_the_held_out_docstrings(docs):
    validation = without_source(read(docs / "validation.jsonl"))
    held_out = {normalized(d["text"].partition("\n\n")[2]) for d in validation}
    sources = {d["id"]: d["text"] for d in read(docs / "train.jsonl") if d["id"].startswith("source:")}
    assert sum(map(len, sources.values())) > 5e6
    names = [d["id"].partition(":")[2] for d in validation]
    modules = {key: key[7:-3].replace("/", ".").removesuffix(".__init__") + "." for key in sources}
    concerned = [sources[key] for key, module in modules.items() if any(f"{n}.".startswith(module) for n in names)]
    assert len(concerned) > 50
    # only the files that held-out docstrings stand in: parsing all of them takes long
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for text in concerned:
        nodes = (node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds))
        assert not held_out & {normalized(ast.get_docstring(node) or "nothing") for node in nodes}


def test_instructions_are_conversations_about_their_own_half(plain):
    train, validation = read(plain / "instructions-train.jsonl"), read(plain / "instructions-validation.jsonl")
    assert 6_000 < len(train) < 12_000 and 0.01 < len(validation) / len(train) < 0.04
    held_out = {f"`{d['id'].partition(':')[2]}`" for d in read(plain / "validation.jsonl") if "topic:" not in d["id"]}
    for example in train:
        roles = [message["role"] for message in example["messages"]]
        assert (roles[1:] if roles[0] == "system" else roles) == ["user", "assistant"] * (len(roles) // 2)
        assert all(message["content"].strip() for message in example["messages"])
        question = next(m["content"] for m in example["messages"] if m["role"] == "user")
        # "What does the method `authenticators` of `netrc` do?" names a class, not the module that is held out
        assert " of `" in question or not any(name in question for name in held_out)
    assert sum(len(e["messages"]) >= 4 for e in train) > 1_000
    assert len({e["messages"][0]["content"].partition("`")[0] for e in train}) > 40
    lengths = sorted(sum(len(m["content"]) for m in e["messages"]) for e in train)
    assert lengths[int(0.95 * len(lengths))] < 600


def test_instructions_of_one_function():
    doc = "Wrap a paragraph,\nreturning lines.\n\nText is reformatted by :func:`fill` so that it\nfits.\n\n    >>> 1"
    examples = build_instructions([Entry("function", "textwrap", "wrap", "(text, width=70)", doc)])
    examples = [example for example in examples if "greeting" not in example["id"]]
    assert all(example["id"].startswith("function:textwrap.wrap/") for example in examples)
    answers = [message["content"] for e in examples for message in e["messages"] if message["role"] == "assistant"]
    assert "Wrap a paragraph, returning lines. Text is reformatted by `fill` so that it fits." in answers
    assert set(answers[1:]) <= {
        "`textwrap.wrap(text, width=70)`",
        "That is `textwrap.wrap`.",
        "It is in the module `textwrap`: `from textwrap import wrap`.",
    }


def test_prepare_builtin_makes_what_is_missing_and_no_more(plain, tmp_path, capsys):
    root = tmp_path / "data" / "python-docs"
    root.mkdir(parents=True)
    shutil.copytree(plain, root / "corpus")
    (root / ".tokenizer.123.tmp").mkdir()  # as a kill leaves it
    prepare_builtin(root)
    shards = ["train", "validation", "instructions-train", "instructions-validation"]
    assert sorted(p.name for p in root.iterdir()) == [".lock", "corpus", "shards", "tokenizer"]
    assert sorted(p.name for p in (root / "shards").iterdir()) == sorted(shards)
    assert all((root / "shards" / name / "index.json").is_file() for name in shards)
    assert "making a corpus" not in capsys.readouterr().out
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}
    prepare_builtin(root)
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()} == before
    assert capsys.readouterr().out == ""


# -- folders -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    source = tmp_path / "语料"
    (source / "sub").mkdir(parents=True)
    (source / "b.txt").write_text("plain text\n")
    (source / "sub" / "a.md").write_bytes("\ufeff# 标题\r\n".encode())
    (source / "c.jsonl").write_text(
        '{"text": "first", "id": "mine", "source": "x"}\n\n{"text": "second"}\n'
        '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "好"}], "id": 7}\n'
    )
    (source / "picture.png").write_bytes(b"\xff\xd8")
    (source / ".hidden.txt").write_text("not read")
    return source


def test_folder_is_read_in_order_with_ids_below_it(folder):
    assert list(iterate_documents(folder)) == [
        {"id": "b.txt", "text": "plain text\n"},
        {"id": "mine", "text": "first"},
        {"id": "c.jsonl:3", "text": "second"},
        {"id": "7", "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "好"}]},
        {"id": "sub/a.md", "text": "# 标题\r\n"},
    ]
    assert [d["id"] for d in iterate_documents([folder / "c.jsonl", folder / "b.txt"])][-1] == "b.txt"


def test_folder_command_splits_by_text_and_loses_nothing(folder, tmp_path):
    for i in range(300):
        (folder / f"{i}.txt").write_text(f"document {i}")
    done = corpus_command("folder", folder, "--out", tmp_path / "out", "--validation-fraction", "0.1")
    assert done.returncode == 0, done.stderr
    halves = [read(tmp_path / "out" / name) for name in ("train.jsonl", "validation.jsonl")]
    assert sorted(d["id"] for half in halves for d in half) == sorted(d["id"] for d in iterate_documents(folder))
    assert 10 < len(halves[1]) < 60
    for document in halves[1]:
        if "text" in document:
            digest = hashlib.sha256(document["text"].encode()).hexdigest()
            assert int(digest[:8], 16) / 2**32 < 0.1
    assert f"{len(halves[0])} documents" in done.stdout


def test_a_small_folder_gets_one_validation_document(folder, tmp_path):
    build_folder(folder, tmp_path / "out")
    assert [len(read(tmp_path / "out" / name)) for name in ("train.jsonl", "validation.jsonl")] == [4, 1]
    build_folder(folder, tmp_path / "all", validation_fraction=0)
    assert [p.name for p in (tmp_path / "all").iterdir()] == ["train.jsonl"]
    assert len(read(tmp_path / "all" / "train.jsonl")) == 5


def halves(out: Path) -> list[str]:
    return ["".join(document["text"] for document in read(out / f"{name}.jsonl")) for name in ("train", "validation")]


def test_the_end_of_a_single_file_is_held_out(tmp_path):
    text = "".join(f"第{i}行\n" + "\n" * (i % 10 == 9) for i in range(1000))
    (tmp_path / "book.txt").write_text(text)
    build_folder(tmp_path / "book.txt", tmp_path / "out")
    train, validation = halves(tmp_path / "out")
    assert train + validation == text
    assert train.endswith("行\n\n") and 0.1 <= len(validation) / len(text) < 0.12
    assert [d["id"] for d in read(tmp_path / "out" / "validation.jsonl")] == ["book.txt#end"]
    build_folder(tmp_path / "book.txt", tmp_path / "half", 0.5)
    assert 0.5 <= len(halves(tmp_path / "half")[1]) / len(text) < 0.52


def test_the_end_of_a_long_single_file_is_held_out(tmp_path, monkeypatch):
    """Longer than a piece: the border falls inside one of them, and all later ones are held out."""
    monkeypatch.setattr("data_tools.corpus.PIECE_BYTES", 700)
    text = "".join(f"line {i}\n" for i in range(1000))
    (tmp_path / "book.txt").write_text(text)
    build_folder(tmp_path, tmp_path.with_name(tmp_path.name + "-out"), 0.25)
    train, validation = halves(tmp_path.with_name(tmp_path.name + "-out"))
    assert train + validation == text and train.endswith("\n")
    assert 0.25 <= len(validation) / len(text) < 0.26


def test_a_single_document_of_a_jsonl_file_is_split_by_place_too(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"id": "one", "text": "a line\n" * 100}) + "\n")
    build_folder(tmp_path / "x.jsonl", tmp_path / "out")
    assert [len(half) for half in halves(tmp_path / "out")] == [90 * 7, 10 * 7]
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    with pytest.raises(UserError, match=r"validation.jsonl would be empty.*1 documents"):
        build_folder(tmp_path / "x.jsonl", tmp_path / "out")


def test_one_long_file_is_split_with_piece_bytes(tmp_path):
    text = "".join(f"第{i}行\n" for i in range(1000))
    (tmp_path / "book.txt").write_text(text)
    build_folder(tmp_path / "book.txt", tmp_path / "out", 0.2, piece_bytes=500)
    documents = [d for name in ("train", "validation") for d in read(tmp_path / "out" / f"{name}.jsonl")]
    documents.sort(key=lambda d: int(d["id"].removeprefix("book.txt#")))
    assert "".join(d["text"] for d in documents) == text
    assert all(d["text"].endswith("\n") and len(d["text"].encode()) <= 1000 for d in documents)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_pieces_join_to_the_file_whatever_their_size(tmp_path, size):
    text = "ab\n好好好好\n\n🙂" * 9
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert "".join(read_text_pieces(tmp_path / "x.txt", size)) == text
    assert len(list(read_text_pieces(tmp_path / "x.txt"))) == 1


# -- input that is wrong -----------------------------------------------------------------------------------------------


def test_text_that_is_not_utf8_names_file_offset_and_fix(folder, tmp_path):
    (folder / "z.txt").write_bytes("好".encode() + b"caf\xe9 au lait")
    done = corpus_command("folder", folder, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "z.txt is not UTF-8: byte 0xe9 at offset 6" in done.stderr and "iconv -f" in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("size", [1, 5, PIECE_BYTES])
@pytest.mark.parametrize(
    ("content", "offset"),
    [(b"abc\xffdef", 3), ("好好".encode()[:-1], 3), (b"\xef\xbb\xbfa\x80", 4), (b"a\n" * 9 + b"\xe5a", 18)],
)
def test_offset_of_a_bad_byte_does_not_depend_on_the_block(tmp_path, size, content, offset):
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(UserError, match=f"byte 0x{content[offset]:02x} at offset {offset}\\."):
        list(read_text_pieces(tmp_path / "x.txt", size))


def test_utf16_is_recognised(tmp_path):
    (tmp_path / "x.txt").write_bytes("text".encode("utf-16"))
    with pytest.raises(UserError, match="iconv -f UTF-16"):
        list(iterate_documents(tmp_path / "x.txt"))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"title": "x"}', r"x.jsonl:2 has neither text nor messages \(keys \['title'\]\)"),
        (b'{"text": 5}', r'x.jsonl:2 has neither text nor messages \("text" of type int\)'),
        (b"[1]", "x.jsonl:2 is list, not an object"),
        (b'{"text": "a"', "x.jsonl:2 is not JSON"),
        (b'{"messages": [{"role": "user"}]}', r'x.jsonl:2: messages\[0\] has no "content"'),
        (b'{"text": "a\xe9"}', r"x.jsonl:2 is not UTF-8: byte 0xe9 at offset 28"),
        (b'{"text": "half \\ud83d"}', "x.jsonl:2 holds half of a surrogate pair"),
    ],
)
def test_bad_lines_name_file_and_line(tmp_path, line, said):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "good"}' + b"\n" + line + b"\n")
    with pytest.raises(UserError, match=said):
        list(iterate_documents(tmp_path / "x.jsonl"))


def test_empty_corpora_and_wrong_paths(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty is empty: no document.*\.txt, \.md, \.jsonl"):
        list(iterate_documents(tmp_path / "empty"))
    (tmp_path / "empty" / "blank.txt").write_text(" \n")
    with pytest.raises(UserError, match="is empty"):
        list(iterate_documents(tmp_path / "empty"))
    assert "1 documents without any text were left out, the first is blank.txt" in capsys.readouterr().err
    with pytest.raises(UserError, match="does not exist"):
        list(iterate_documents(tmp_path / "nothing.txt"))
    (tmp_path / "book.pdf").write_text("x")
    with pytest.raises(UserError, match=r"book\.pdf cannot be read as a corpus"):
        list(iterate_documents(tmp_path / "book.pdf"))


def test_a_failed_run_leaves_the_files_of_the_last_good_one(folder, tmp_path):
    build_folder(folder, tmp_path / "out", 0.5)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    (folder / "zz.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="zz.jsonl:1"):
        build_folder(folder, tmp_path / "out", 0.5)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_folder_arguments_that_cannot_work(folder, tmp_path):
    for fraction in (1.0, -0.1):
        with pytest.raises(UserError, match="--validation-fraction"):
            build_folder(folder, tmp_path / "out", fraction)
    with pytest.raises(UserError, match="lies inside"):
        build_folder(folder, folder / "out")
    with pytest.raises(UserError, match="is a file"):
        build_folder(folder / "c.jsonl", folder / "b.txt")

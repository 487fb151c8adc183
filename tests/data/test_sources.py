"""From a path, pattern or list to token sources: what is found, compiled once, checked, and refused."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from data_tools.shards import build_shards
from minillm.data.chat_template import encode_conversation
from minillm.data.sequence_stream import build_stream
from minillm.data.sources import open_sources, tokenize_shards
from minillm.data.text_encoding import encode_texts
from minillm.data.text_shards import iterate_samples, read_shard_index, text_shards_of_index
from minillm.data.tokenizer import build_char_tokenizer, load_tokenizer, train_bpe_tokenizer
from minillm.utils.errors import UserError

ROOT = Path(__file__).parents[2]
TEXTS = [f"Document {n}: " + "the quick brown fox 跳过 <|im_end|> the lazy dog. " * (n % 7 + 1) for n in range(120)]
CHATS = [
    [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"It is {n}."}] for n in range(20)
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """tokenizer/, other/ (another tokenizer), text/ (four text shards), chat/."""
    root = tmp_path_factory.mktemp("sources")
    train_bpe_tokenizer(TEXTS, 320).save_pretrained(root / "tokenizer")
    build_char_tokenizer(TEXTS).save_pretrained(root / "other")
    (root / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (root / "chat.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    build_shards(root / "text.jsonl", root / "text", shard_size=36_000)
    build_shards(root / "chat.jsonl", root / "chat")
    assert len(list((root / "text").glob("*.tar"))) == 4
    return root


@pytest.fixture
def copy(data, tmp_path) -> Path:
    """A copy of the text shards that a test may damage."""
    (tmp_path / "copy").mkdir()
    for path in (data / "text").iterdir():
        (tmp_path / "copy" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "copy"


def open_in(data, spec, cache, **options):
    return open_sources(spec, tokenizer_path=data / "tokenizer", cache_dir=Path(cache), **options)


def documents_of(source):
    """The token ids of every document of a source, in stored order."""
    rows = build_stream([source], seq_len=2000, packing="none", seed=0, shuffle=False).rows(0, source.num_documents)
    return [ids[:length].tolist() for ids, length in zip(rows["input_ids"], rows["lengths"])]


def texts_in(folder):
    """The texts of text shards, in stored order."""
    for shard in text_shards_of_index(folder, read_shard_index(folder)):
        with open(shard.path, "rb") as file:
            yield from (json.loads(sample.fields["json"])["text"] for sample in iterate_samples(file))


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_text_shards_become_their_tokens(data, tmp_path):
    (source,) = open_in(data, str(data / "text"), tmp_path)
    tokenizer = load_tokenizer(data / "tokenizer")
    texts = list(texts_in(data / "text"))
    assert sorted(texts) == sorted(TEXTS)
    expected = [list(ids) for ids in encode_texts(tokenizer, texts)]
    assert documents_of(source) == expected
    assert source.name == "text" and source.num_documents == 120 and not source.has_loss_mask
    assert source.num_tokens == sum(len(ids) + 1 for ids in expected)
    index = read_shard_index(source.shards[0].path.parent)
    assert index["num_target_bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert index["num_target_tokens"] == source.num_tokens - 120


def test_conversations_carry_their_loss_mask(data, tmp_path):
    (source,) = open_in(data, str(data / "chat"), tmp_path)
    tokenizer = load_tokenizer(data / "tokenizer")
    assert source.has_loss_mask
    rows = build_stream([source], seq_len=128, packing="none", seed=0).rows(0, len(CHATS))
    labels = sorted(row[row != -100].tolist() for row in rows["shift_labels"])
    encoded = [encode_conversation(tokenizer, chat) for chat in CHATS]
    assert labels == sorted([token for token, bit in zip(ids, mask) if bit] for ids, mask in encoded)
    index = read_shard_index(source.shards[0].path.parent)
    assert index["num_target_tokens"] == sum(len(row) for row in labels)
    assert index["num_target_bytes"] == sum(len(chat[1]["content"]) for chat in CHATS)


@pytest.mark.parametrize(
    "pattern, count",
    [
        ("text", 4),
        ("text/index.json", 4),
        ("text/*.tar", 4),
        ("text/text-00000[01].tar", 2),
        ("text/text-{000000..000002}.tar", 3),
        ("text/text-00000{3,0}.tar", 2),
        ("t?xt", 4),
        ("text/text-000001.tar", 1),
    ],
)
def test_what_a_pattern_finds(data, tmp_path, pattern, count):
    (source,) = open_in(data, f"{data}/{pattern}", tmp_path)
    entries = read_shard_index(data / "text")["shards"]
    sizes = [entry["num_samples"] for entry in entries]
    chosen = {4: [0, 1, 2, 3], 3: [0, 1, 2], 2: [0, 1], 1: [1]}[count]
    if "{3,0}" in pattern:
        chosen = [3, 0]
    assert source.num_documents == sum(sizes[n] for n in chosen)
    first = encode_texts(load_tokenizer(data / "tokenizer"), list(texts_in(data / "text")))[sum(sizes[: chosen[0]])]
    assert documents_of(source)[0] == list(first)


def test_tars_of_others_need_no_index(data, tmp_path):
    write_tar(tmp_path / "a.tar", [("x/1.txt", "甲".encode()), ("x/1.jpg", b"?"), ("x/2.json", b'{"text": "two"}')])
    write_tar(tmp_path / "b.tar", [("../../3.txt", b"three")])
    (source,) = open_in(data, str(tmp_path / "*.tar"), tmp_path / "cache")
    tokenizer = load_tokenizer(data / "tokenizer")
    assert [tokenizer.decode(ids) for ids in documents_of(source)] == ["甲", "two", "three"]


def test_compiled_once_and_again_when_something_changed(data, copy, tmp_path, capsys):
    cache = tmp_path / "cache"
    open_in(data, str(copy), cache)
    first = {path: path.stat().st_mtime_ns for path in cache.rglob("*.tar")}
    assert "compiling 4 text shards" in capsys.readouterr().out
    open_in(data, str(copy), cache)
    assert "compiling" not in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.tar")} == first
    open_sources(str(copy), tokenizer_path=data / "other", cache_dir=cache)
    open_in(data, str(copy / "*[12].tar"), cache)
    assert len(list(cache.glob("*/index.json"))) == 3
    assert not list(cache.glob(".*.tmp"))


@pytest.mark.parametrize("workers", [1, 3])
def test_output_is_the_same_for_any_number_of_workers(data, tmp_path, workers, monkeypatch):
    monkeypatch.setattr("minillm.data.compile_shards.UNIT_BYTES", 4000)  # many pieces a shard
    tokenize_shards(str(data / "text"), tokenizer_path=data / "tokenizer", out=tmp_path / "out", workers=workers)
    (source,) = open_in(data, str(data / "text"), tmp_path / "cache")
    reference = source.shards[0].path.parent
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (reference / path.name).read_bytes()
    assert os.environ.get("TOKENIZERS_PARALLELISM") is None


def test_token_shards_are_opened_where_they_are(data, tmp_path):
    out = tmp_path / "out"
    tokenize_shards(str(data / "text"), tokenizer_path=data / "tokenizer", out=out)
    (source,) = open_in(data, str(out), tmp_path / "cache")
    assert source.shards[0].path.parent == out and not (tmp_path / "cache").exists()
    with pytest.raises(UserError, match=r"made with another tokenizer \(fingerprint .{16}\) than .*other"):
        open_sources(str(out), tokenizer_path=data / "other", cache_dir=tmp_path)
    (out / "index.json").rename(out / "index")
    with pytest.raises(UserError, match="no .json or .txt member, only .tokens.npy"):
        open_in(data, str(out), tmp_path / "cache")


def test_several_sources(data, tmp_path):
    spec = [
        {"name": "a", "path": str(data / "text"), "weight": 0.75},
        {"name": "b", "path": str(data / "chat"), "weight": 0.25},
        {"name": "c", "path": str(data / "text/*0.tar")},
    ]
    sources = open_in(data, spec, tmp_path)
    found = [(source.name, source.weight, source.has_loss_mask) for source in sources]
    assert found == [("a", 0.75, False), ("b", 0.25, True), ("c", 1.0, False)]


@pytest.mark.parametrize(
    "spec, message",
    [
        ("{data}/nothing-*.tar", "nothing-.*matches no shard"),
        ("{data}/nothing", "nothing does not exist.*shards build"),
        ("{data}/tokenizer", "holds no shards.*shards build"),
        ("{data}/text.jsonl", "text.jsonl is not an uncompressed .tar shard.*shards build"),
        ("{data}/text/text-{{000003..000004}}.tar", "text-000004.tar is not listed in the index.json"),
        ("{data}/text/text-{{000001,000001}}.tar", "text-000001.tar in .* twice"),
        ("{data}/{{text,chat}}", "mix texts and conversations"),
        ("pipe:cat {data}/text/text-000000.tar", "pipe: is not supported, nothing is run"),
        ("file:///etc/passwd", "file: is not supported"),
        ("s3://bucket/x.tar", "s3: is not supported"),
        ([], "the list is empty"),
        ([{"name": "a", "path": "x", "weigth": 1}], "entry 0 .*weigth.*needs name and path"),
        ([{"name": "a", "path": "x", "weight": 0}], r"entry 0 \(a\) has weight 0: it must be a positive number"),
        ([{"name": "a", "path": "x", "weight": "2"}], "weight '2'"),
        ([{"name": "a", "path": "x"}, {"name": "a", "path": "y"}], "names must differ"),
    ],
)
def test_what_is_refused(data, tmp_path, spec, message):
    spec = spec.format(data=data) if isinstance(spec, str) else spec
    with pytest.raises(UserError, match=message):
        open_in(data, spec, tmp_path)


def test_damaged_text_shards_are_refused_or_counted(data, copy, tmp_path):
    path = copy / "text-000002.tar"
    content = path.read_bytes()
    lost = read_shard_index(copy)["shards"][2]["num_samples"]
    for damaged, reason in (
        (content[:-5000], "text-000002.tar was cut short"),
        (content[:600] + b"?" + content[601:], "text-000002.tar does not match the checksum"),
        (None, "text-000002.tar is missing"),
    ):
        path.unlink(missing_ok=True)
        if damaged is not None:
            path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{reason}.*allowed are 0"):
            open_in(data, str(copy), tmp_path / "cache")
        with pytest.raises(UserError, match=f"allowed are {lost - 1}"):
            open_in(data, str(copy), tmp_path / "cache", max_bad_samples=lost - 1)
        assert not list((tmp_path / "cache").glob("*/index.json"))
    (source,) = open_in(data, str(copy), tmp_path / "cache", max_bad_samples=lost)
    assert source.num_documents == 120 - lost and source.num_bad_samples == lost
    with pytest.raises(UserError, match=f"{lost} bad samples were left out"):
        open_in(data, str(copy), tmp_path / "cache")


def test_a_cut_tar_without_index_is_noticed(data, copy, tmp_path):
    (copy / "index.json").unlink()
    path = copy / "text-000003.tar"
    content = path.read_bytes()
    end = content.rstrip(b"\0")
    path.write_bytes(content[: -(-len(end) // 512) * 512])  # every member whole, the end-of-archive blocks gone
    with pytest.raises(UserError, match="text-000003.tar: it is cut at byte"):
        open_in(data, str(copy), tmp_path / "cache")


def test_bad_samples_are_named_and_counted(data, tmp_path, capsys):
    good = [(f"{n}.txt", f"text {n}".encode()) for n in range(5)]
    bad = [("latin.txt", b"caf\xe9"), ("broken.json", b"{"), ("picture.jpg", b"")]
    write_tar(tmp_path / "a.tar", [*good[:2], *bad, *good[2:]])
    with pytest.raises(UserError, match="a.tar: sample 'latin': not UTF-8 at byte 3.*allowed are 0"):
        open_in(data, str(tmp_path / "a.tar"), tmp_path / "cache")
    with pytest.raises(UserError, match=r"sample 'picture'.*3 bad samples so far"):
        open_in(data, str(tmp_path / "a.tar"), tmp_path / "cache", max_bad_samples=2)
    capsys.readouterr()
    (source,) = open_in(data, str(tmp_path / "a.tar"), tmp_path / "cache", max_bad_samples=3)
    tokenizer = load_tokenizer(data / "tokenizer")
    assert [tokenizer.decode(ids) for ids in documents_of(source)] == [f"text {n}" for n in range(5)]
    said = capsys.readouterr().err
    assert all(name in said for name in ("latin", "broken", "picture"))


def test_bad_conversations_are_bad_samples(data, tmp_path):
    good = json.dumps({"messages": CHATS[0]}).encode()
    bad = json.dumps({"messages": [{"role": "teacher", "content": "x"}]}).encode()
    write_tar(tmp_path / "a.tar", [("1.json", good), ("2.json", bad)])
    with pytest.raises(UserError, match="sample '2': .*teacher"):
        open_in(data, str(tmp_path / "a.tar"), tmp_path / "cache")
    write_tar(tmp_path / "b.tar", [("1.json", good), ("2.txt", b"text")])
    with pytest.raises(UserError, match="sample '2' is a text, the samples before it are not"):
        open_in(data, str(tmp_path / "b.tar"), tmp_path / "cache")


def test_no_document_at_all(data, tmp_path):
    write_tar(tmp_path / "a.tar", [])
    with pytest.raises(UserError, match="holds no document"):
        open_in(data, str(tmp_path / "a.tar"), tmp_path / "cache")


OPEN = """
import sys, time
from pathlib import Path
from minillm.data import compile_shards, sources
slow = float(sys.argv[4])
if slow:  # every piece takes a while, so that others come while it runs
    fast = compile_shards.encode_unit
    def encode_unit(unit): time.sleep(slow); return fast(unit)
    compile_shards.encode_unit, compile_shards.UNIT_BYTES = encode_unit, 8000
    encode_unit.__module__, encode_unit.__qualname__ = "minillm.data.compile_shards", "encode_unit"
source, = sources.open_sources(sys.argv[1], tokenizer_path=Path(sys.argv[2]), cache_dir=Path(sys.argv[3]))
print(source)
"""


def start(data, cache, slow):
    arguments = [sys.executable, "-c", OPEN, str(data / "text"), str(data / "tokenizer"), str(cache), str(slow)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def test_one_compiles_and_the_others_wait(data, tmp_path):
    processes = [start(data, tmp_path, 0.6) for _ in range(3)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    text = "".join(out for out, _ in outputs)
    assert text.count("compiling 4 text shards") == 1
    assert text.count("waiting for another process that compiles") == 2
    assert len({out.splitlines()[-1] for out, _ in outputs}) == 1


def test_a_killed_compilation_leaves_nothing_that_looks_whole(data, tmp_path):
    process = start(data, tmp_path, 1.0)
    deadline = time.monotonic() + 40
    while not list(tmp_path.glob(".*.tmp/tokens-*.tar")) and time.monotonic() < deadline:
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert children and list(tmp_path.glob(".*.tmp")) and not list(tmp_path.glob("*/index.json"))
    time.sleep(0.3)
    assert not [child for child in children if Path(f"/proc/{child}/cmdline").exists() and _alive(child)]
    (source,) = open_in(data, str(data / "text"), tmp_path)
    assert source.num_documents == 120 and not list(tmp_path.glob(".*.tmp"))


def _alive(pid: str) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"

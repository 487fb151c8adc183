"""Damaged and hostile shards, text and tokens, through what a run opens its data with.

Contract: each is one error that names the shard and what to do, or, where samples may be skipped
(data.max_bad_samples), a warning and a count; `data_tools.shards verify` says the same with exit code 2. Nothing is
written beside the cache, a broken compilation leaves nothing in it, and names in shards never become paths.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import sys
import tarfile
from pathlib import Path

import pytest

from data_tools.shards import build_shards
from data_tools.shards import main as shards_main
from minillm.data.sequence_stream import build_stream
from minillm.data.sources import open_sources
from minillm.data.text_encoding import fingerprint
from minillm.data.tokenizer import load_tokenizer, train_bpe_tokenizer
from minillm.utils.errors import UserError
from tests.faults import damage_shards as make
from tests.faults.damage_files import as_nobody, contents, cut, flip, group_of_one
from tests.support.in_process import train
from tests.support.launching import ROOT, command, run
from tests.support.tiny_data import TINY_MODEL, TINY_RUN, sentences
from tests.support.token_data import write_token_folder

pytestmark = pytest.mark.faults
TEXT, FOREIGN, TOKENS = "Damaged text shards", "Damaged tars without an index", "Damaged token shards"
COUNT = 90
MIDDLE = "text-000001.tar"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """text/ (three shards), tokens/ (shards of about 700 tokens), tokenizer/, other/ (another tokenizer)."""
    root = tmp_path_factory.mktemp("whole")
    texts = sentences(3, COUNT)
    tokenizer = train_bpe_tokenizer(texts, 320)
    tokenizer.save_pretrained(root / "tokenizer")
    train_bpe_tokenizer(sentences(4, COUNT), 300).save_pretrained(root / "other")
    (root / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    build_shards([root / "text.jsonl"], root / "text", shard_size=40_000)
    assert len(list((root / "text").glob("*.tar"))) == 3
    tokenizer = load_tokenizer(root / "tokenizer")
    assert tokenizer.eos_token_id == 0
    write_token_folder(root / "tokens", [ids for ids in tokenizer(texts)["input_ids"]])
    make.change_index(
        root / "tokens", lambda index: index.update(tokenizer=fingerprint(tokenizer), vocab_size=len(tokenizer))
    )
    assert len(list((root / "tokens").glob("*.tar"))) > 3
    return root


class Place:
    """A folder `data` that a test damages, in a folder of its own that must not change otherwise."""

    def __init__(self, whole: Path, root: Path):
        self.whole, self.root, self.data, self.cache = whole, root, root / "data", root / "cache"

    def copy(self, kind: str) -> Path:
        shutil.copytree(self.whole / kind, self.data)
        return self.data

    def tar(self, content: bytes, name: str = "a.tar") -> Path:
        self.data.mkdir(exist_ok=True)
        (self.data / name).write_bytes(content)
        return self.data / name

    def open(self, max_bad_samples: int = 0, spec: str | None = None):
        (source,) = open_sources(
            spec or str(self.data),
            tokenizer_path=self.whole / "tokenizer",
            cache_dir=self.cache,
            max_bad_samples=max_bad_samples,
        )
        return source

    def read(self, max_bad_samples: int = 0):
        """(the source, rows of it that cannot be read, what is said of them)."""
        source = self.open(max_bad_samples)
        stream = build_stream([source], seq_len=32, seed=0)
        return source, int(stream.rows(0, stream.num_sequences)["num_bad_rows"]), stream.problems

    def verify(self) -> str:
        """What verify says; its exit code has to be 2."""
        said = io.StringIO()
        with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as end:
            shards_main(["verify", str(self.data)])
        assert end.value.code == 2 and said.getvalue().startswith("error: ")
        return said.getvalue()

    def nothing_new(self, before: dict[str, str]) -> None:
        """Nothing is written but locks in the cache."""
        now = {name: what for name, what in contents(self.root).items() if not name.endswith(".lock")}
        assert {name for name in now if name != "cache"} == set(before), set(now) ^ set(before)
        assert {name: now[name] for name in before} == before


@pytest.fixture
def place(whole, tmp_path) -> Place:
    return Place(whole, tmp_path)


def refused(place: Place, opens: str, verifies: str | None) -> None:
    """One error, one sentence; verify agrees; nothing is written."""
    before = contents(place.root)
    with pytest.raises(UserError) as error:
        place.open()
    assert re.search(opens, str(error.value)), error.value
    assert "\n" not in str(error.value)
    if verifies is not None:
        said = place.verify()
        assert re.search(verifies, said), said
    place.nothing_new(before)


def index(**changes):
    return lambda folder: make.change_index(folder, lambda values: values.update(changes))


def entry(number: int = 1, **changes):
    return lambda folder: make.change_index(folder, lambda values: values["shards"][number].update(changes))


def replace(name: str, content):
    return lambda folder: (folder / name).write_bytes(content((folder / name).read_bytes()))


CHECKSUM = f"{MIDDLE} does not match the checksum in its index.json"
SHORT = f"{MIDDLE} was cut short: it has .* bytes, its index.json says"
LISTED = {
    "cut in half": (lambda f: cut(f / MIDDLE, 0.5), SHORT),
    "cut inside a member's header": (lambda f: os.truncate(f / MIDDLE, 2048 + 100), SHORT),
    "without its last block": (lambda f: os.truncate(f / MIDDLE, (f / MIDDLE).stat().st_size - 512), SHORT),
    "a bit of a header": (lambda f: flip(f / MIDDLE, 100), CHECKSUM),
    "a bit of a header's name": (lambda f: flip(f / MIDDLE, 3), CHECKSUM),
    "a bit of the data": (lambda f: flip(f / MIDDLE, 520), CHECKSUM),
    "empty": (lambda f: cut(f / MIDDLE, 0), "was cut short: it has 0 bytes"),
    "as many zero bytes": (replace(MIDDLE, lambda c: bytes(len(c))), CHECKSUM),
    "a byte longer": (replace(MIDDLE, lambda c: c + b"\0"), f"{MIDDLE} was changed: it has"),
    "gzip under the same name": (replace(MIDDLE, make.gzipped), SHORT),
    "the shard before in its place": (
        lambda f: shutil.copy(f / "text-000000.tar", f / MIDDLE), f"{MIDDLE} (was|does not match)",
    ),
    "missing in the middle": (lambda f: (f / MIDDLE).unlink(), f"{MIDDLE} is missing"),
    "named .tgz": (lambda f: (f / MIDDLE).rename(f / "text-000001.tgz"), f"{MIDDLE} is missing"),
    "a folder in its place": (lambda f: ((f / MIDDLE).unlink(), (f / MIDDLE).mkdir()), f"{MIDDLE} is missing"),
    "a link to itself": (lambda f: ((f / MIDDLE).unlink(), (f / MIDDLE).symlink_to(MIDDLE)), f"{MIDDLE} is missing"),
    "a pipe in its place": (lambda f: ((f / MIDDLE).unlink(), os.mkfifo(f / MIDDLE)), f"{MIDDLE} is missing"),
    "index.json cut": (lambda f: cut(f / "index.json", 0.5), "index.json is not valid JSON"),
    "index.json empty": (lambda f: cut(f / "index.json", 0), "index.json is not valid JSON"),
    "index.json not UTF-8": (lambda f: (f / "index.json").write_bytes(b"\xff\xfe"), "index.json is not valid JSON"),
    "index.json a list": (lambda f: (f / "index.json").write_text("[]"), "index.json has format None"),
    "index.json a folder": (
        lambda f: ((f / "index.json").unlink(), (f / "index.json").mkdir()), "index.json cannot be read",
    ),
    "index.json a link to itself": (
        lambda f: ((f / "index.json").unlink(), (f / "index.json").symlink_to("index.json")), "index.json cannot be",
    ),
    "index.json of another version": (index(format="minillm-text-9"), "has format 'minillm-text-9'"),
    "index.json without shards": (lambda f: make.change_index(f, lambda v: v.pop("shards") and None), "no 'shards'"),
    "index.json with a negative count": (entry(num_samples=-3), "num_samples is -3"),
    "index.json with a negative size": (entry(bytes=-1), "bytes is -1"),
    "index.json with a count that is text": (entry(num_samples="30"), "num_samples is '30'"),
    "index.json with a checksum that is none": (entry(sha256=None), "sha256 is None"),
    "index.json with a wrong checksum": (entry(sha256="0" * 64), CHECKSUM),
    "index.json with a wrong count": (entry(num_samples=7), f"{MIDDLE} holds .* samples, its index.json says 7"),
    "index.json with a shard twice": (
        lambda f: make.change_index(f, lambda v: v["shards"].append(v["shards"][0])), "text-000000.tar is listed twice",
    ),
    "index.json with ../../x.tar": (entry(name="../../x.tar"), "names must be plain"),
    "index.json with /etc/x.tar": (entry(name="/etc/x.tar"), "names must be plain"),
    "index.json with unknown documents": (index(documents="pictures"), "documents is 'pictures'"),
}  # fmt: skip


@pytest.mark.parametrize("what", LISTED)
def test_text_shards_with_an_index(place, fault_table, what):
    damage, said = LISTED[what]
    damage(place.copy("text"))
    refused(place, said, said)
    fault_table.row(TEXT, what, "one error names the file, verify exits 2, nothing compiled")


@pytest.mark.parametrize("what", ["cut in half", "a bit of the data", "missing in the middle", "as many zero bytes"])
def test_a_damaged_text_shard_may_be_skipped_as_a_whole(place, fault_table, capfd, what):
    folder = place.copy("text")
    lost = json.loads((folder / "index.json").read_text())["shards"][1]["num_samples"]
    LISTED[what][0](folder)
    with pytest.raises(UserError, match=f"allowed are {lost - 1}"):
        place.open(max_bad_samples=lost - 1)
    source = place.open(max_bad_samples=lost)
    assert (source.num_documents, source.num_bad_samples) == (COUNT - lost, lost)
    assert f"left out {lost} samples" in capfd.readouterr().err
    fault_table.row(TEXT, f"{what}, max_bad_samples = its samples", f"{lost} left out with a warning, the rest is used")


def test_only_verify_sees_what_a_run_does_not_need(place, fault_table):
    folder = place.copy("text")
    shutil.copy(folder / MIDDLE, folder / "text-000009.tar")
    assert place.open().num_documents == COUNT
    assert "text-000009.tar is not listed in index.json" in place.verify()
    (folder / "text-000009.tar").unlink()
    index(num_samples=5)(folder)
    assert "num_samples is not the sum over its shards" in place.verify()
    fault_table.row(TEXT, "a shard that is not listed; a wrong total", "not used; verify exits 2")


def test_a_shard_that_may_not_be_read(place, fault_table):
    """Root reads everything: what the file is asked runs as nobody."""
    from minillm.data.text_shards import TextShard

    folder = place.copy("text")
    (folder / MIDDLE).chmod(0)
    size = (folder / MIDDLE).stat().st_size
    os.chdir(folder)
    try:
        with as_nobody():
            problem = TextShard(Path(MIDDLE), 1, size, "0" * 64).problem()
    finally:
        os.chdir(ROOT)
    assert problem == f"{MIDDLE} cannot be read (Permission denied)"
    fault_table.row(TEXT, "no permission to read it", "named as a damaged shard")


GOOD = make.documents(sentences(5, 6))
PLAIN = make.tar_of(GOOD)
NO_NUMBER = "has a size that is not a number"
BROKEN_TARS = {
    "cut in half": (PLAIN[: len(PLAIN) // 2], "a.tar: it is cut at byte"),
    "cut inside a header": (PLAIN[: 1024 + 100], "a.tar: it is cut at byte"),
    "whole members, no end": (PLAIN[: 6 * 1024], "a.tar: it is cut at byte .*end-of-archive"),
    "a bit of a header": (PLAIN[:1030] + b"?" + PLAIN[1031:], "there is no tar header at byte 1024"),
    "empty": (b"", "a.tar: it is cut at byte 0"),
    "noise": (bytes(range(256)) * 40, "there is no tar header at byte 0"),
    "a gzip named .tar": (make.gzipped(PLAIN), "a.tar: it is a gzip file, whatever its name"),
    "a zip named .tar": (make.zip_of(GOOD), "a.tar: it is a zip file, whatever its name"),
    "a size beyond the file": (make.with_size(PLAIN, b"77777777777\0"), "cut at byte .* inside the member at byte 0"),
    "a size of 2^70": (make.with_size(PLAIN, make.base256(1 << 70)), "cut at byte .* inside the member at byte 0"),
    "a negative size": (make.with_size(PLAIN, b"-0000000100\0"), NO_NUMBER),
    "a size that is no number": (make.with_size(PLAIN, b"abc"), "there is no tar header at byte 0"),
    "a pax size below zero": (make.with_pax(PLAIN, make.pax_record("size", "-1536")), NO_NUMBER),
    "a pax size that is no number": (make.with_pax(PLAIN, make.pax_record("size", "many")), NO_NUMBER),
    "a pax record longer than its header": (make.with_pax(PLAIN, b"99 path=x\n"), "a pax header in it makes no sense"),
}


@pytest.mark.parametrize("what", BROKEN_TARS)
def test_tars_of_others_that_are_none(place, fault_table, what):
    content, said = BROKEN_TARS[what]
    place.tar(content)
    refused(place, f"{said}.*(write the shards again|data.max_bad_samples)", said)
    fault_table.row(FOREIGN, what, "one error names the file, verify exits 2, nothing compiled")


def one(name: str, content: bytes) -> bytes:
    return make.tar_of([*GOOD[:3], (name, content), *GOOD[3:]])


BAD_SAMPLES = {
    "JSON that is not UTF-8": (one("x.json", b'{"text": "\xff"}'), "sample 'x': not UTF-8 at byte 10"),
    "UTF-16": (one("x.json", '{"text": "a"}'.encode("utf-16")), "sample 'x': not UTF-8 at byte 0"),
    "text that is not UTF-8": (one("x.txt", b"caf\xe9"), "sample 'x': not UTF-8 at byte 3"),
    "not JSON": (one("x.json", b"{"), r"sample 'x': not JSON"),
    "an empty member": (one("x.json", b""), r"sample 'x': not JSON"),
    "JSON nested 100,000 deep": (one("x.json", b"[" * 100_000), r"sample 'x': not JSON"),
    "a number of 5,000 digits": (one("x.json", b'{"text": "a", "n": ' + b"9" * 5000 + b"}"), "sample 'x': not JSON"),
    "half of a surrogate pair": (one("x.json", b'{"text": "\\ud800"}'), "sample 'x': half of a surrogate pair"),
    "a text that is a number": (one("x.json", b'{"text": 7}'), "sample 'x': its json has neither"),
    "a list": (one("x.json", b'["text"]'), "sample 'x': its json has neither"),
    "a picture": (one("x.jpg", b"\xff\xd8"), "sample 'x': no .json or .txt member, only .jpg"),
    "a pickle": (one("x.pkl", b"cos\nsystem\n(S'touch pwned'\ntR."), "sample 'x': no .json or .txt member, only .pkl"),
    "one key twice": (
        make.tar_of([*GOOD[:3], ("x.json", b'{"text": "a"}'), ("x.json", b'{"text": "b"}'), *GOOD[3:]]),
        "sample 'x': it has two members .json",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_SAMPLES)
def test_samples_that_are_no_documents(place, fault_table, capfd, what):
    content, said = BAD_SAMPLES[what]
    place.tar(content)
    refused(place, f"a.tar: {said}.*allowed are 0: write the shards again, or raise data.max_bad_samples", said)
    source = place.open(max_bad_samples=1)
    assert (source.num_documents, source.num_bad_samples) == (len(GOOD), 1)
    assert "left out 1 sample: " in capfd.readouterr().err
    fault_table.row(FOREIGN, what, "one error names the sample, or it is left out with a warning and counted")


def test_bad_conversations(place, fault_table):
    good = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}).encode()
    broken = [[1], [], [{"role": "user"}], [{"role": "teacher", "content": "x"}], [{"role": "user", "content": None}],
              [{"role": ["user"], "content": "x"}]]  # fmt: skip
    for number, messages in enumerate(broken):
        bad = json.dumps({"messages": messages}).encode()
        place.tar(make.tar_of([("1.json", good), ("x.json", bad)]))
        with pytest.raises(UserError, match="sample 'x': .*data.max_bad_samples"):
            place.open()
        shutil.rmtree(place.cache)
        assert place.open(max_bad_samples=1).num_documents == 1, number
        shutil.rmtree(place.cache)
    fault_table.row(FOREIGN, "six kinds of broken conversations", "one error names the sample, or it is left out")


NAMES = ["../../outside.json", "/etc/outside.json", "a/../../b.json", "C:\\x.json", "\n.json", "-rf.json"]


def test_names_are_never_paths(place, fault_table):
    members = [(name, content) for name, (_, content) in zip(NAMES, GOOD * 2)]
    place.tar(make.tar_of(members))
    before = contents(place.root)
    source = place.open()
    assert source.num_documents == len(NAMES)
    now = {name for name in contents(place.root) if not name.startswith("cache")}
    assert now == {name for name in before if not name.startswith("cache")}
    assert {path.name for path in place.cache.rglob("*.tar")} == {"tokens-000000.tar"}
    assert not Path("/etc/outside.json").exists() and not (place.root.parent / "outside.json").exists()
    fault_table.row(FOREIGN, "../../x, /etc/x and the like as names", "read as documents, nothing written outside")


def test_links_devices_and_pipes_are_passed_over(place, fault_table):
    secret = place.root / "secret.json"
    secret.write_text('{"text": "secret"}')
    place.tar(make.with_special_members(GOOD, secret))
    before = contents(place.root)
    source, bad, _ = place.read()
    assert (source.num_documents, bad) == (len(GOOD), 0)
    kept = {name: what for name, what in contents(place.root).items() if not name.startswith("cache")}
    assert kept == {name: what for name, what in before.items() if not name.startswith("cache")}
    place.tar(make.with_special_members([], secret))
    with pytest.raises(UserError, match="holds no document"):
        place.open()
    fault_table.row(FOREIGN, "symlinks, hard links, devices, pipes, folders", "passed over, followed nowhere")


def test_what_is_odd_and_whole(place, fault_table):
    """An empty document, one of 3 MB, the same key again later, names of 300 characters, a BOM in the text."""
    big = json.dumps({"text": " ".join(sentences(6, 24_000))}).encode()
    assert len(big) > 3_000_000
    members = [("e.json", b'{"text": ""}'), ("big.json", big), ("a.json", GOOD[0][1]), ("b.json", GOOD[1][1]),
               ("a.json", GOOD[2][1]), ("n" * 300 + ".json", GOOD[3][1]), ("f.txt", b"\xef\xbb\xbftext")]  # fmt: skip
    place.tar(make.tar_of(members, tarfile.PAX_FORMAT))
    source, bad, problems = place.read()
    assert source.num_documents == len(members) and not bad and not problems
    stream = build_stream([source], seq_len=64, packing="none", seed=0)
    rows = stream.rows(0, len(members))
    assert int(rows["num_bad_rows"]) == 0 and stream.num_truncated >= 1
    fault_table.row(FOREIGN, "an empty document, one of 3 MB, a key again, a long name", "read as they are")


def test_nothing_to_learn_from(place, fault_table):
    place.tar(make.tar_of([(f"{n}.json", b'{"text": ""}') for n in range(5)]))
    refused(place, "holds empty documents only: there is nothing to learn from", None)
    shutil.rmtree(place.cache)
    place.tar(make.tar_of([]))
    refused(place, "holds no document", None)
    fault_table.row(FOREIGN, "empty documents only; no document", "one error")


@pytest.mark.parametrize("name", ["a.tgz", "a.tar.gz", "a.zip", "a.json"])
def test_wrong_extensions(place, fault_table, name):
    path = place.tar(make.gzipped(PLAIN), name)
    before = contents(place.root)
    with pytest.raises(UserError, match=f"{name} is not an uncompressed .tar shard: write shards with"):
        place.open(spec=str(path))
    with pytest.raises(UserError, match="holds no shards"):
        place.open()
    with pytest.raises(UserError, match="matches no shard"):
        place.open(spec=str(place.data / "*"))
    place.nothing_new(before)
    fault_table.row(FOREIGN, f"named {name}", "one error says what a shard is")


FIRST = "tokens-000000.tar"
SECOND = "tokens-000001.tar"
CHUNK = 1024  # bytes of a chunk of 64 uint16 in the tar


def tail_of(folder: Path, shard: int = 0) -> int:
    tokens = json.loads((folder / "index.json").read_text())["shards"][shard]["num_tokens"]
    return -(-tokens // 64) * CHUNK


def unsorted(arrays) -> None:
    arrays["borders"][[0, 1]] = arrays["borders"][[1, 0]]


# what is done, what opening says, what verify says where it is not the same
TOKEN_REFUSED = {
    "cut in half": (lambda f: cut(f / SECOND, 0.5), f"{SECOND} was cut short"),
    "without its last block": (lambda f: os.truncate(f / SECOND, (f / SECOND).stat().st_size - 512), "was cut short"),
    "an odd byte more": (replace(SECOND, lambda c: c + b"\1"), f"{SECOND} was changed"),
    "empty": (lambda f: cut(f / SECOND, 0), f"{SECOND} was cut short: it has 0 bytes"),
    "missing in the middle": (lambda f: (f / SECOND).unlink(), f"{SECOND} is missing"),
    "gzip under the same name": (replace(SECOND, make.gzipped), f"{SECOND} was cut short"),
    "index.json missing": (lambda f: (f / "index.json").unlink(), "token shards are read with their index.json"),
    "index.json cut": (lambda f: cut(f / "index.json", 0.7), "index.json is not valid JSON"),
    "index.json of another version": (index(format="minillm-tokens-9"), "has format 'minillm-tokens-9'"),
    "index.json without a key": (lambda f: make.change_index(f, lambda v: v.pop("dtype") and None), "no 'dtype'"),
    "chunks of no tokens": (index(chunk_tokens=0), "chunk_tokens is 0"),
    "chunks of another size": (index(chunk_tokens=128), "its counts take"),
    "a type that is none": (index(dtype="object"), "dtype is 'object'"),
    "a loss mask that is not there": (index(has_loss_mask=True), "its counts take"),
    "a loss mask called maybe": (index(has_loss_mask="maybe"), "has_loss_mask is 'maybe'"),
    "an end token outside the vocabulary": (index(eos_token_id=5000), "eos_token_id is 5000"),
    "a vocabulary that is text": (index(vocab_size="320"), "vocab_size is '320'"),
    "a negative number of tokens": (entry(num_tokens=-1), "num_tokens is -1"),
    "more tokens than bytes": (entry(num_tokens=10**15), "its counts take"),
    "more documents than tokens": (entry(num_documents=10**6), "tokens in 1000000 documents"),
    "no documents": (entry(num_documents=0), "in 0 documents"),
    "a shard twice": (
        lambda f: make.change_index(f, lambda v: v["shards"].append(v["shards"][0])), f"{FIRST} is listed twice",
    ),
    "bad samples left out before": (index(num_bad_samples=4), "4 bad samples were left out", None),
}  # fmt: skip


@pytest.mark.parametrize("what", TOKEN_REFUSED)
def test_token_shards_that_are_refused_at_once(place, fault_table, what):
    damage, said, *verify = TOKEN_REFUSED[what]
    damage(place.copy("tokens"))
    refused(place, said, verify[0] if verify else said)
    fault_table.row(TOKENS, what, "one error names the file" + (", verify exits 2" if not verify else ""))


def test_another_tokenizers_token_shards(place, whole, fault_table):
    place.copy("tokens")
    before = contents(place.root)
    with pytest.raises(UserError, match="data were made with another tokenizer .fingerprint .* than .*other .*compile"):
        open_sources(str(place.data), tokenizer_path=whole / "other", cache_dir=place.cache)
    place.nothing_new(before)
    fault_table.row(TOKENS, "another tokenizer's", "one error names both")


TOKEN_COUNTED = {
    "a bit of a token": (lambda f: flip(f / SECOND, 2 * CHUNK + 640 + 11), f"{SECOND}: chunk 2 .*does not match"),
    "as many zero bytes": (replace(SECOND, lambda c: bytes(len(c))), f"{SECOND}: the document borders do not match"),
    "a bit of the borders": (
        lambda f: flip(f / FIRST, tail_of(f) + 640 + 5), f"{FIRST}: the document borders do not match",
    ),
    "borders that do not ascend": (lambda f: make.change_tokens(f, unsorted), "borders do not ascend to its"),
    "borders that end too early": (
        lambda f: make.change_tokens(f, lambda a: a["borders"].__setitem__(-1, a["borders"][-1] - 1)),
        "borders do not ascend to its",
    ),
    "a token outside the vocabulary": (
        lambda f: make.change_tokens(f, lambda a: a["tokens"].__setitem__((1, 7), 999)),
        f"{FIRST}: chunk 1 holds token 999, the vocabulary ends at 319",
    ),
    "another type of tokens": (index(dtype="<u4"), f"{FIRST}: chunk 0 .*does not match"),
    "a wrong checksum of the borders": (entry(0, tail_crc32=1), f"{FIRST}: the document borders do not match"),
}  # fmt: skip


@pytest.mark.parametrize("what", TOKEN_COUNTED)
def test_token_shards_whose_rows_are_counted(place, fault_table, capfd, what):
    """Found when they are read: the loop stops above data.max_bad_samples (test_a_run_stops_at_what_it_cannot_read)."""
    damage, said = TOKEN_COUNTED[what]
    damage(place.copy("tokens"))
    before = contents(place.root)
    _, bad, problems = place.read()
    assert bad > 0 and re.search(said, "; ".join(problems)), problems
    assert "the sequences from it are skipped" in capfd.readouterr().err
    assert re.search(said, place.verify())
    place.nothing_new(before)
    fault_table.row(TOKENS, what, f"a warning names the chunk, its {bad} sequences count as bad, verify exits 2")


UNREAD = {
    "a bit of a member's header": lambda f: flip(f / SECOND, 3),
    "a bit of an array's header": lambda f: flip(f / SECOND, 512 + 70),
    "a bit of the padding": lambda f: flip(f / SECOND, CHUNK - 2),
    "a wrong checksum of the file": entry(sha256="0" * 64),
}


@pytest.mark.parametrize("what", UNREAD)
def test_damage_where_a_run_does_not_look(place, fault_table, what):
    UNREAD[what](place.copy("tokens"))
    _, bad, problems = place.read()
    assert not bad and not problems
    assert f"{SECOND} does not match the checksum in its index.json" in place.verify()
    fault_table.row(TOKENS, what, "no token is touched: a run reads them, verify exits 2")


def test_totals_that_lie(place, fault_table):
    index(num_tokens=5, num_documents=7)(place.copy("tokens"))
    said = place.verify()
    assert "num_tokens is not the sum" in said and "num_documents is not the sum" in said
    assert place.open().num_documents == COUNT
    fault_table.row(TOKENS, "wrong totals in index.json", "a run counts for itself, verify exits 2")


@pytest.fixture(scope="module")
def group():
    with group_of_one():
        yield


def run_settings(place: Place, name: str = "r", **more) -> dict:
    return {**TINY_MODEL, **TINY_RUN, "data.train": str(place.data), "data.tokenizer": str(place.whole / "tokenizer"),
            "data.cache_dir": str(place.cache), "run_root": str(place.root / "runs"), "run_name": name,
            "train.max_steps": 4, "train.train_micro_batch_size_per_gpu": 8, "validation.every": 0,
            "checkpoint.every": 1, **{key.replace("__", "."): value for key, value in more.items()}}  # fmt: skip


@pytest.mark.parametrize("what", ["a bit of a token", "a token outside the vocabulary", "as many zero bytes"])
@pytest.mark.usefixtures("group")
def test_a_run_stops_at_what_it_cannot_read(place, fault_table, capfd, what):
    damage, said = TOKEN_COUNTED[what]
    damage(place.copy("tokens"))
    with pytest.raises(UserError, match=r"step \d+: \d+ unreadable sequences so far, data.max_bad_samples = 0"):
        train(run_settings(place, train__max_steps=40))
    assert re.search(said, capfd.readouterr().err)
    assert train(run_settings(place, "skipping", data__max_bad_samples=1000)) == 0
    fault_table.row(TOKENS, f"{what}, in a run", "the run stops there; with max_bad_samples it goes on and counts")


@pytest.mark.parametrize("kind, what", [("text", "cut in half"), ("tokens", "missing in the middle")])
def test_through_the_real_commands(place, fault_table, kind, what):
    (LISTED if kind == "text" else TOKEN_REFUSED)[what][0](place.copy(kind))
    before = contents(place.root)
    json_file = place.whole / "fp32.json"
    json_file.write_text('{"zero_optimization": {"stage": 2}}')
    done = run(command("pretrain.py", json_file, run_settings(place)), check=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    assert re.search((LISTED if kind == "text" else TOKEN_REFUSED)[what][1], errors[0])
    place.nothing_new(before)
    done = run([sys.executable, "-m", "data_tools.shards", "verify", str(place.data)], check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    fault_table.row(TEXT if kind == "text" else TOKENS, f"{what}, launch/pretrain.py and verify", "exit code 2, twice")


@pytest.mark.parametrize("how", ["index.json missing", "index.json cut", "a token shard missing"])
def test_a_damaged_cache_is_named_and_can_be_removed(place, fault_table, how):
    place.copy("text")
    whole = [shard.sha256 for shard in place.open().shards]
    (folder,) = [path for path in place.cache.iterdir() if path.is_dir()]
    if how == "a token shard missing":
        next(folder.glob("*.tar")).unlink()
    elif how == "index.json cut":
        cut(folder / "index.json", 0.5)
    else:
        (folder / "index.json").unlink()
    with pytest.raises(UserError, match=f"{folder}.*remove {folder}, it is compiled again"):
        place.open()
    shutil.rmtree(folder)
    assert [shard.sha256 for shard in place.open().shards] == whole
    fault_table.row(TOKENS, f"the cache, {how}", "one error names the folder; removed, it is compiled again")

"""The formats: tars against tarfile and webdataset, samples that are no documents, indexes that lie."""

from __future__ import annotations

import io
import json
import tarfile
import zlib

import numpy as np
import pytest
import webdataset

from minillm.data.tar import DamagedTar, iterate_members
from minillm.data.text_shards import (
    BadSample,
    FoundShards,
    TextShard,
    check_shard_index,
    decode_sample,
    iterate_samples,
    kind_of_documents,
    read_shard_index,
)
from minillm.data.token_source import open_token_source
from minillm.utils.errors import UserError
from tests.support.token_data import EOS, open_folder, random_documents, write_token_folder

NAMES = ["a.json", "folder/b.json", "中文/键.txt", "d" * 98 + ".x", "p" * 90 + "/" + "q" * 90 + ".txt"]


def write_tar(path, members, format=tarfile.USTAR_FORMAT):
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_what_was_written(tmp_path, format):
    names = NAMES + (["x" * 300 + ".json", "深" * 80 + ".txt"] if format != tarfile.USTAR_FORMAT else [])
    members = [(name, bytes([n]) * (n * 400)) for n, name in enumerate(names)]
    path = write_tar(tmp_path / "a.tar", members, format)
    with open(path, "rb") as file:
        found = list(iterate_members(file))
        assert [(member.name, member.data) for member in found] == members
        scanned = list(iterate_members(file, content=False))
        assert [(m.start, m.end, m.size) for m in scanned] == [(m.start, m.end, m.size) for m in found]
        # a range between two members reads the members in it
        middle = list(iterate_members(file, found[1].start, found[3].start))
        assert [member.name for member in middle] == [members[1][0], members[2][0]]


def test_folders_and_links_are_passed_over(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        link = tarfile.TarInfo("link.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(folder)
        tar.addfile(link)
        info = tarfile.TarInfo("a.json")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"{}"))
    with open(tmp_path / "a.tar", "rb") as file:
        assert [member.name for member in iterate_members(file)] == ["a.json"]


def test_a_cut_tar_is_noticed_wherever_it_is_cut(tmp_path):
    data = write_tar(tmp_path / "a.tar", [(f"{n}.json", b"x" * 700) for n in range(4)]).read_bytes()
    content = 4 * (512 + 1024)
    for size in [0, 1, 100, *range(512, content + 1, 512), content - 1, content + 511]:
        with pytest.raises(DamagedTar, match="cut at byte"):
            list(iterate_members(io.BytesIO(data[:size])))
    assert len(list(iterate_members(io.BytesIO(data[: content + 512])))) == 4


def test_noise_is_no_tar():
    with pytest.raises(DamagedTar, match="no tar header at byte 0"):
        list(iterate_members(io.BytesIO(bytes(range(256)) * 8)))


def test_samples_group_members_by_key_as_webdataset_does(tmp_path):
    members = [("a/1.json", b"{}"), ("a/1.meta.json", b"{}"), ("a/2.txt", b"x"), ("b/2.txt", b"y"), ("3.jpg", b"z")]
    path = write_tar(tmp_path / "a.tar", members)
    with open(path, "rb") as file:
        ours = [(sample.key, sorted(sample.fields)) for sample in iterate_samples(file)]
    theirs = [
        (sample["__key__"], sorted(key for key in sample if not key.startswith("__")))
        for sample in webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
    ]
    assert ours == theirs == [
        ("a/1", ["json", "meta.json"]), ("a/2", ["txt"]), ("b/2", ["txt"]), ("3", ["jpg"])
    ]  # fmt: skip


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"json": b'{"text": "caf\\u00e9", "id": 1}'}, {"text": "café"}),
        ({"txt": "中文".encode()}, {"text": "中文"}),
        ({"json": b'{"caption": 1}', "txt": b"x"}, {"text": "x"}),
        ({"json": b'{"messages": [{"role": "user"}]}'}, {"messages": [{"role": "user"}]}),
    ],
)
def test_documents_in_samples(fields, expected):
    assert decode_sample(fields) == expected


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"json": b"{"}, "not JSON"),
        ({"json": b"[" * 100_000}, "not JSON"),
        ({"json": b'{"text": "\xff"}'}, "not UTF-8 at byte 10"),
        ({"json": '{"text": "x"}'.encode("utf-16")}, "not UTF-8 at byte 0"),
        ({"txt": b"ab\xfe"}, "not UTF-8 at byte 2"),
        ({"json": b'{"text": "ab\\ud800"}'}, "surrogate pair at character 2"),
        ({"json": b'{"text": 3}'}, "neither"),
        ({"json": b"[1]"}, "neither"),
        ({"pyd": b"cos\nsystem\n.", "jpg": b""}, r"no .json or .txt member, only .jpg, .pyd"),
    ],
)
def test_samples_that_are_no_documents(fields, reason):
    with pytest.raises(BadSample, match=reason):
        decode_sample(fields)


def test_kind_is_that_of_the_first_good_sample(tmp_path):
    chat = json.dumps({"messages": [{"role": "user", "content": "x"}]}).encode()
    first = write_tar(tmp_path / "1.tar", [("a.jpg", b""), ("b.json", b"{")])
    second = write_tar(tmp_path / "2.tar", [("c.json", chat)])
    assert kind_of_documents([TextShard(first), TextShard(tmp_path / "none.tar"), TextShard(second)]) == "conversations"


HOSTILE_NAMES = ["../x.tar", "/etc/x.tar", "a/b.tar", ".hidden.tar", "x.tgz", "", "a\x00.tar", "..\\x.tar"]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_an_index_cannot_name_files_outside_its_folder(name):
    index = {"format": "minillm-text-1", "shards": [{"name": name, "bytes": 1, "sha256": "", "num_samples": 1}]}
    with pytest.raises(UserError, match="names must be plain"):
        check_shard_index(index, "index.json")


TEXT = {"format": "minillm-text-1"}
TOKENS = {"format": "minillm-tokens-1", "shards": []}


@pytest.mark.parametrize("index", [[], {}, {"format": "x"}, TEXT, TEXT | {"shards": [{}]}, TOKENS])
def test_an_index_that_is_none_is_refused(index):
    with pytest.raises(UserError, match="index.json"):
        check_shard_index(index, "index.json")


def test_token_shards_are_tars_numpy_and_webdataset_read(tmp_path):
    documents = random_documents(40)
    masks = [[n % 2] * len(document) for n, document in enumerate(documents)]
    folder = write_token_folder(tmp_path / "tokens", documents, masks)
    flat = [token for document in documents for token in [*document, EOS]]
    learned = [bit for mask in masks for bit in [*mask, 0]]
    done = 0
    for entry in read_shard_index(folder)["shards"]:
        with tarfile.open(folder / entry["name"]) as tar:
            arrays = {m.name: np.load(io.BytesIO(tar.extractfile(m).read()), allow_pickle=False) for m in tar}
        stop = done + entry["num_tokens"]
        tokens = np.concatenate([array for name, array in sorted(arrays.items()) if "tokens" in name])
        mask = np.concatenate([array for name, array in sorted(arrays.items()) if "mask" in name])
        assert tokens.dtype == np.uint16 and tokens[: stop - done].tolist() == flat[done:stop]
        assert mask[: stop - done].tolist() == learned[done:stop]
        assert {len(array) for name, array in arrays.items() if "tokens" in name or "mask" in name} == {64}
        ends = [n + 1 for n, token in enumerate(flat[done:stop]) if token == EOS]  # 0 is no token of a document here
        assert arrays["borders.npy"].tolist() == ends
        first = zlib.crc32(arrays["00000000.mask.npy"].tobytes(), zlib.crc32(arrays["00000000.tokens.npy"].tobytes()))
        assert arrays["crc32.npy"][0] == first
        done = stop
    assert done == len(flat)
    shard = str(folder / "tokens-000000.tar")
    samples = list(webdataset.WebDataset(shard, shardshuffle=False, empty_check=False))
    assert samples[0]["__key__"] == "00000000" and {"tokens.npy", "mask.npy"} <= set(samples[0])


def test_token_shards_do_not_depend_on_how_documents_come(tmp_path):
    from minillm.data.token_shards import TokenShardWriter

    documents = random_documents(50)
    one_by_one = write_token_folder(tmp_path / "a", documents)
    (tmp_path / "b").mkdir()
    options = {"eos_token_id": EOS, "has_loss_mask": False, "chunk_tokens": 64, "shard_tokens": 700}
    writer = TokenShardWriter(tmp_path / "b", dtype=np.dtype("<u2"), **options)
    flat = np.array([token for document in documents for token in [*document, EOS]], np.uint16)
    writer.append(flat, np.array([len(document) + 1 for document in documents]))
    assert writer.close() == read_shard_index(one_by_one)["shards"]
    for path in (tmp_path / "b").iterdir():
        assert path.read_bytes() == (one_by_one / path.name).read_bytes()


def test_another_tokenizers_shards_are_refused(tmp_path):
    folder = write_token_folder(tmp_path / "tokens", random_documents(3))
    assert open_folder(folder).num_documents == 3
    index = read_shard_index(folder)
    found = FoundShards(folder, [shard["name"] for shard in index["shards"]], index)
    with pytest.raises(UserError, match=r"tokens were made with another tokenizer \(fingerprint test\) than mine"):
        open_token_source([found], name="x", fingerprint="other", tokenizer_path="mine")

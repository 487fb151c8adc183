"""Readers of all formats: the same records whatever the file, however it is cut; damage is told, never skipped over.

The files are written by the libraries of the formats (csv, pyarrow, gzip, zstandard, webdataset), not by the project.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import subprocess
import sys
import tarfile

import pytest
import webdataset

from data_tools import files, formats
from data_tools.readers import iterate_documents
from data_tools.records import Rejected, TextField, find_units, iterate_records, read_unit
from minillm.utils.errors import UserError
from tests.support.launching import ROOT, environment

pyarrow = pytest.importorskip("pyarrow")
zstandard = pytest.importorskip("zstandard")
ROWS = [{"id": f"d{number}", "text": f"第{number}篇, \"quoted\"\nand a second line", "topic": f"t{number % 3}"} for number in range(40)]  # fmt: skip # noqa: E501


@pytest.fixture(autouse=True)
def csv_limit():
    """The longest field csv reads is one number for the whole process; some tests lower it."""
    before = csv.field_size_limit()
    yield
    csv.field_size_limit(before)


def jsonl(rows=ROWS) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write(folder, suffix: str, rows=ROWS):
    path = folder / f"corpus{suffix}"
    if suffix == ".jsonl":
        path.write_bytes(jsonl(rows))
    elif suffix == ".jsonl.gz":
        path.write_bytes(gzip.compress(jsonl(rows)[:500]) + gzip.compress(jsonl(rows)[500:]))  # two members: one stream
    elif suffix == ".jsonl.zst":
        compress = zstandard.ZstdCompressor().compress
        path.write_bytes(compress(jsonl(rows)[:500]) + compress(jsonl(rows)[500:]))
    elif suffix == ".json":
        path.write_text("\ufeff" + json.dumps(rows), encoding="utf-8")
    elif suffix in (".csv", ".tsv", ".csv.gz"):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]), delimiter="\t" if suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
        data = text.getvalue().encode("utf-8-sig")
        path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    elif suffix == ".parquet":
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
    else:
        with webdataset.TarWriter(str(path)) as tar:
            for row in rows:
                tar.write({"__key__": row["id"], "json": {"id": row["id"], "topic": row["topic"]}, "txt": row["text"]})
    return path


KINDS = [".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".csv", ".tsv", ".csv.gz", ".parquet", ".tar"]


@pytest.mark.parametrize("suffix", KINDS)
@pytest.mark.parametrize("unit_bytes", [1, 700, 1 << 20])
def test_every_format_gives_the_same_records_however_it_is_cut(tmp_path, suffix, unit_bytes):
    units = find_units(write(tmp_path, suffix), unit_bytes)
    if suffix in (".jsonl", ".parquet"):
        assert len(units) == 1 if unit_bytes == 1 << 20 else len(units) > 1
    read = []
    found = [record for unit in units for record in read_unit(unit, TextField(), read.append)]
    assert found == ROWS
    if len(units) == 1:  # a unit that ends inside a file reads a buffer's length past its end
        assert 0.5 * units[0].size <= sum(read) <= units[0].size + 1024
    assert [unit.number for unit in units] == list(range(len(units)))
    assert list(iterate_documents(tmp_path)) == [{"id": row["id"], "text": row["text"]} for row in ROWS]


@pytest.mark.parametrize("suffix", [".csv", ".json", ".parquet"])
def test_ids_are_places_where_the_record_has_none(tmp_path, suffix):
    write(tmp_path, suffix, [{"text": "a"}, {"text": "c"}])
    for unit_bytes in (1, 1 << 20):
        ids = [r["id"] for unit in find_units(tmp_path, unit_bytes) for r in read_unit(unit, TextField())]
        assert ids == [f"corpus{suffix}:1", f"corpus{suffix}:2"]


@pytest.mark.parametrize("ending", [b"\n", b""])
@pytest.mark.parametrize("lines", [1, 2, 17, 300])
def test_cut_lines_have_their_numbers(tmp_path, lines, ending):
    rows = [json.dumps({"text": "x" * (37 * number % 91 + 1)}) for number in range(1, lines + 1)]
    (tmp_path / "x.jsonl").write_bytes("\n".join(rows).encode() + ending)
    for unit_bytes in (1, 2, 13, 64, 100, 1000, 10**6):
        units = find_units(tmp_path, unit_bytes)
        ids = [record["id"] for unit in units for record in read_unit(unit, TextField())]
        assert ids == [f"x.jsonl:{number}" for number in range(1, lines + 1)]
        assert sum(unit.size for unit in units) == (tmp_path / "x.jsonl").stat().st_size


def test_small_files_share_a_unit(tmp_path):
    for number in range(30):
        (tmp_path / f"{number:02d}.txt").write_text(f"text {number}")
    units = find_units(tmp_path, 50)
    assert 5 <= len(units) < 10
    assert [r["id"] for unit in units for r in read_unit(unit, TextField())] == [f"{n:02d}.txt" for n in range(30)]


def test_text_fields(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps([
        {"title": "春", "lines": ["一", "二"]}, {"title": "夏", "lines": []}, {"title": "秋", "lines": [1]},
        {"title": "冬"}, {"title": 5, "lines": ["a"]},
    ]))  # fmt: skip
    found = list(iterate_records(tmp_path, TextField("lines")))
    assert found[0] == {"title": "春", "text": "一\n二", "id": "x.json:1"}
    assert [r.reason for r in found[1:4]] == ["empty", "not_text", "no_text"]
    assert "a list of other things" in found[2].detail and "['title']" in found[3].detail
    found = list(iterate_records(tmp_path, TextField(template="{title}\n{lines}!")))
    assert found[0]["text"] == "春\n一\n二!" and found[0]["lines"] == ["一", "二"]
    assert [r.reason for r in found[1:]] == ["empty", "not_text", "no_text", "not_text"]
    assert [r["title"] for r in iterate_records(tmp_path, None)] == ["春", "夏", "秋", "冬", 5]


def test_what_cannot_be_read_is_counted_in_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "MAX_RECORD_BYTES", 200)
    good = b'{"text": "good"}\n'
    bad = [b"[1]", b'{"text": ', b'{"text": "\xe9"}', b'{"text": "\\ud83d"}', b'{"text": {"a": "nested"}}',
           b'{"text": " "}', b'{"text": "' + b"x" * 1000 + b'"}', b"[" * 100_000]  # fmt: skip
    (tmp_path / "x.jsonl").write_bytes(good + b"".join(line + b"\n" + good for line in bad))
    (tmp_path / "y.txt").write_bytes("好".encode() + b"caf\xe9")
    for unit_bytes in (1, 1 << 20):
        found = [r for unit in find_units(tmp_path, unit_bytes) for r in read_unit(unit, TextField())]
        assert [r["text"] for r in found if not isinstance(r, Rejected)] == ["good"] * 9
        assert [(r.id, r.reason) for r in found if isinstance(r, Rejected)] == [
            ("x.jsonl:2", "not_an_object"), ("x.jsonl:4", "not_json"), ("x.jsonl:6", "not_utf8"),
            ("x.jsonl:8", "not_unicode"), ("x.jsonl:10", "not_text"), ("x.jsonl:12", "empty"),
            ("x.jsonl:14", "too_long"), ("x.jsonl:16", "too_long"), ("y.txt", "not_utf8"),
        ]  # fmt: skip


def test_a_hundred_megabytes_in_one_line_take_no_memory(tmp_path):
    import resource

    with open(tmp_path / "x.jsonl", "wb") as file:
        file.write(b'{"text": "')
        for _ in range(100):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n{"text": "after"}\n')
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = list(iterate_records(tmp_path / "x.jsonl"))
    assert [getattr(r, "reason", None) or r["text"] for r in found] == ["too_long", "after"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 3 * files.PIECE_BYTES / 1024 + 100_000


@pytest.mark.parametrize("content, suffix, said", [
    (gzip.compress(b"x", mtime=0), ".jsonl", r"it is gzip data; its suffix should be \.gz"),
    (gzip.compress(b"x", mtime=0), ".parquet", "it is gzip data"),
    (b"PK\x03\x04 and more", ".jsonl.gz", "a zip archive"),
    (b"%PDF-1.7", ".txt", "a PDF"),
    (b"plain", ".jsonl.zst", r"no zst data; is the download whole\?"),
    (b"plain", ".parquet", "no parquet data"),
    (b"", ".jsonl.gz", "it is empty"),
    (zstandard.ZstdCompressor().compress(b"x"), ".csv", "zstandard data"),
])  # fmt: skip
def test_a_file_is_what_its_name_says(tmp_path, content, suffix, said):
    (tmp_path / f"x{suffix}").write_bytes(content)
    with pytest.raises(UserError, match=said):
        find_units(tmp_path)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".json", ".parquet", ".tar", ".csv.gz"])
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_file_that_breaks_off_is_an_error(tmp_path, suffix, share):
    path = write(tmp_path, suffix)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError, match=r"damaged|not a complete JSON"):
        list(iterate_records(path))


def test_tables_that_are_wrong(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"id,text\n1,good\n2,too,many\n3,caf\xe9\n\n4,fine\n")
    found = list(iterate_records(tmp_path / "x.csv"))
    assert [getattr(r, "reason", None) or r["text"] for r in found] == ["good", "wrong_columns", "not_utf8", "fine"]
    (tmp_path / "y.csv").write_bytes(b"text,text\na,b\n")
    with pytest.raises(UserError, match="names a column twice"):
        list(iterate_records(tmp_path / "y.csv"))
    (tmp_path / "z.json").write_text('{"text": "no list"}')
    with pytest.raises(UserError, match="no JSON list of objects"):
        list(iterate_records(tmp_path / "z.json"))


def test_a_quotation_mark_left_open_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "MAX_RECORD_BYTES", 1000)
    (tmp_path / "x.csv").write_text('id,text\n1,"open\n' + "2,more\n" * 1000)
    with pytest.raises(UserError, match="left open"):
        list(iterate_records(tmp_path / "x.csv"))


def test_outputs_of_tools_and_shards_are_read_by_their_rules(tmp_path):
    (tmp_path / "part-00000.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "duplicates.jsonl").write_text('{"pair": 1}\n')
    (tmp_path / "topic-01").mkdir()
    (tmp_path / "topic-01" / "part-00000.jsonl").write_text('{"text": "b"}\n')
    (tmp_path / "summary.json").write_text('{"tool": "dedup"}')
    (tmp_path / "package.json").write_text('{"name": "x"}')
    assert [r["text"] for r in iterate_records(tmp_path)] == ["a", "b"]


def test_members_of_a_tar_are_data(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in (("../../evil.json", b'{"text": "one"}'), ("/etc/two.txt", b"two"), ("a.b/c.d.txt", b"three"),
                           ("k.json", b"[1]"), ("m.txt", b"\xff")):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    found = list(iterate_records(tmp_path / "x.tar"))
    assert [getattr(r, "reason", None) or r["text"] for r in found][:2] == ["one", "two"]
    assert [r.reason for r in found[-2:]] == ["not_an_object", "not_utf8"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.tar"]


def test_hub_names(tmp_path):
    pytest.importorskip("datasets")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(jsonl(ROWS[:5]))
    found = list(iterate_records(f"hf:{folder}"))
    assert [(r["id"], r["text"]) for r in found] == [(r["id"], r["text"]) for r in ROWS[:5]]
    # offline, so that no try waits for a network; the library reads the variable as it is imported
    code = "from data_tools.records import iterate_records; list(iterate_records('hf:nobody/nothing'))"
    offline = {**environment(), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=offline, cwd=ROOT, capture_output=True, text=True)
    assert re.search(r"UserError: .*nobody/nothing cannot be opened on the Hugging Face hub.*HF_ENDPOINT", done.stderr)

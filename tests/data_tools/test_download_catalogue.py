"""The catalogue of `python -m data_tools.download`, and what `convert` makes of downloaded files."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from data_tools.download import convert_dataset, main
from data_tools.downloading.catalogue import CATALOGUE, Dataset, Source, find_dataset, load_catalogue
from data_tools.downloading.converters import convert
from data_tools.files import Rejected
from minillm.utils.errors import UserError
from tests.data_tools.local_server import Page, run_tool, serving

ROOT = Path(__file__).parents[2]


@pytest.fixture
def server():
    with serving() as running:
        yield running


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_tool("data_tools.download", *arguments)


def run_main(monkeypatch, *arguments: object) -> int:
    """The command in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["download", *map(str, arguments)])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


# -- the catalogue -----------------------------------------------------------------------------------------------------


def test_the_catalogue_has_what_people_use():
    catalogue = load_catalogue()
    wanted = (
        "seq-monkey fineweb-edu-chinese deepctrl-sft belle-3.5m tinystories fineweb-edu-10bt wikitext-2 wikitext-103"
    )
    assert set(wanted.split()) <= set(catalogue) and any(name.startswith("neurips") for name in catalogue)
    minimind = {file.path for name in catalogue for source in catalogue[name].sources for file in source.files
                if "minimind" in source.name}  # fmt: skip
    assert {"pretrain_hq.jsonl", "sft_mini_512.jsonl", "sft_512.jsonl", "sft_1024.jsonl", "sft_2048.jsonl", "dpo.jsonl",
            "r1_mix_1024.jsonl", "lora_identity.jsonl", "lora_medical.jsonl"} <= minimind  # fmt: skip
    assert all(dataset.converter and dataset.checked and dataset.homepage for dataset in catalogue.values())
    assert not any(dataset.verified for dataset in catalogue.values())  # nobody loaded one yet: say so, do not guess


def test_list_and_show(monkeypatch, capsys):
    assert run_main(monkeypatch, "list", "--language", "zh", "--kind", "sft") == 0
    listed = capsys.readouterr().out
    assert "belle-3.5m" in listed and "tinystories" not in listed and "minimind-dpo" not in listed
    assert run_main(monkeypatch, "show", "belle-3.5m") == 0
    shown = capsys.readouterr().out
    assert "gpl-3.0" in shown and "BelleGroup/train_3.5M_CN (main): train_3.5M_CN.json" in shown
    assert "verified            no: never loaded" in shown
    assert run_main(monkeypatch, "show", "bele") == 2
    assert "did you mean belle-3.5m?" in capsys.readouterr().err


ENTRY = """
datasets:
  a:
    title: A
    kind: sft
    languages: [en]
    licence: none
    verified: no
    sources: [{http: [http://h/a.jsonl]}]
    converter: {text: text}
"""


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("title: A", "titel: A", "a.titel: unknown key; did you mean title?"),
        ("title: A", "titel: A", "a: title is missing"),
        ("kind: sft", "kind: chat", "a.kind: 'chat' is none of pretrain, sft, preference, other"),
        ("[en]", "[no]", "a.languages: has to hold strings only"),
        ("[en]", "en", "a.languages: has to be a list, it is a string"),
        ("verified: no", "verified: 3", "a.verified: has to be yes or no, it is a whole number"),
        ("title: A", "title: A\n    bytes: -1", "a.bytes: has to be a number of bytes, it is -1"),
        ("{http: [http://h/a.jsonl]}", "{ftp: x}", "a.sources[0]: needs one of huggingface: OWNER/NAME"),
        ("[http://h/a.jsonl]", "[http://h/a, http://g/a]", "http: two addresses would both become a: give one a path"),
        ("http://h/a.jsonl", "ftp://h/a.jsonl", "a.sources[0].http[0].url: ftp://h/a.jsonl is not an http(s) address"),
        ("http://h/a.jsonl", "{url: http://h/a, path: ../a}", "a.sources[0].http[0].path: '../a' does not name a file"),
        ("http://h/a.jsonl", "{url: http://h/a, sha256: abc}", "sha256: has to be 64 hexadecimal digits"),
        (
            "{http: [http://h/a.jsonl]}",
            "{huggingface: a}",
            "a.sources[0].huggingface: 'a' is not of the form OWNER/NAME",
        ),
        ("[{http: [http://h/a.jsonl]}]", "[]", "a.sources: is empty"),
        ("{text: text}", "{text: text, template: x}", "a.converter: needs one of text, template, messages and nothing"),
        ("{text: text}", "{text: text, replace: {a: 1}}", "a.converter.replace: has to map strings to strings"),
        ("{text: text}", "{messages: {prompt: q, response: a}, replace: {}}", "a.converter: needs one of text"),
        ("{text: text}", "{template: x}", "a.converter.template: 'x' names no column"),
        ("{text: text}", "{messages: {prompt: q}}", "a.converter.messages: response is missing"),
        ("{text: text}", "{messages: {conversations: c, roles: {a: bot}}}", "roles: maps the source's names to user"),
        ("{text: text}", "{messages: {conversations: c, from: x}}", "a.converter.messages.from: unknown key"),
        ("title: A", "title: A\n    title: B", "the key 'title' stands twice"),
        ("datasets:", "data:", 'has no "datasets"'),
        ("  a:", "  a b:", "a b: a name is made of letters"),
        ("[en]", "[en", "is not valid YAML"),
    ],
)
def test_mistakes_in_a_catalogue_are_one_clear_line(tmp_path, old, new, said):
    path = tmp_path / "own.yaml"
    path.write_text(ENTRY.replace(old, new))
    with pytest.raises(UserError) as raised:
        load_catalogue(path)
    assert said in str(raised.value)
    assert 1 <= len([line for line in str(raised.value).splitlines() if line.startswith("  ")] or [1]) <= 2


def test_all_mistakes_come_at_once_and_a_right_catalogue_is_read(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(ENTRY)
    assert load_catalogue(path)["a"].source(None).files[0].path == "a.jsonl"
    path.write_text(ENTRY.replace("kind: sft", "kind: chat").replace("licence: none", "licence: 3"))
    with pytest.raises(UserError, match="has 2 mistakes:"):
        load_catalogue(path)
    with pytest.raises(UserError, match="cannot be read"):
        load_catalogue(tmp_path / "none.yaml")


def test_names_outside_the_catalogue():
    assert find_dataset({}, "hf:a/b").source(None) == Source("huggingface", "a/b", (), "main")
    assert find_dataset({}, "ms:a/b").source(None).revision == "master"
    assert find_dataset({}, "https://h/x%20y.jsonl?download=1").source(None).files[0].path == "x y.jsonl"
    for name, said in [("hf:a", "OWNER/NAME"), ("https://h/", "names no file"), ("nothing", "is not in the catalogue")]:
        with pytest.raises(UserError, match=said):
            find_dataset({}, name)
    with pytest.raises(UserError, match="not known to be on modelscope: --source may be http"):
        find_dataset({}, "http://h/x").source("modelscope")


# -- converters --------------------------------------------------------------------------------------------------------

HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]


@pytest.mark.parametrize(
    "converter, record, expected",
    [
        ({"text": "text"}, {"text": "a", "score": 3}, {"text": "a", "score": 3}),
        ({"text": "page"}, {"page": "诗", "n": 1}, {"text": "诗", "n": 1}),
        ({"text": "lines"}, {"lines": ["床前", "明月光"]}, {"text": "床前\n明月光"}),
        ({"text": "t"}, {"t": ""}, "empty"),
        (
            {"text": "text", "replace": {"</s> <s>": "\n", "<s>": "", "</s>": ""}},
            {"text": "<s>问：你好</s> <s>答：好</s>"},
            {"text": "问：你好\n答：好"},
        ),
        ({"text": "text", "replace": {"<s>": ""}}, {"text": "<s>"}, "empty"),
        ({"text": "t"}, {"u": "x"}, "no_text"),
        ({"template": "{a}: {b}"}, {"a": "x", "b": "y"}, {"text": "x: y", "a": "x", "b": "y"}),
        (  # ShareGPT
            {"messages": {"conversations": "conversations", "role": "from", "content": "value"}},
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}], "category": "x"},
            {"messages": HELLO, "category": "x"},
        ),
        ({"messages": {"conversations": "c"}}, {"c": HELLO}, {"messages": HELLO}),
        ({"messages": {"conversations": "messages"}}, {"messages": HELLO}, {"messages": HELLO}),
        ({"messages": {"conversations": "c"}}, {"c": json.dumps(HELLO)}, {"messages": HELLO}),
        (
            {"messages": {"conversations": "chosen"}},
            {"chosen": HELLO, "rejected": []},
            {"messages": HELLO, "rejected": []},
        ),
        (
            {"messages": {"conversations": "c", "roles": {"机器人": "assistant", "问": "user"}, "system": "s"}},
            {"c": [{"role": "问", "content": "Hi"}, {"role": "机器人", "content": "Hello!"}], "s": "Be kind."},
            {"messages": [{"role": "system", "content": "Be kind."}, *HELLO]},
        ),
        (  # deepctrl
            {"messages": {"prompt": ["instruction", "input"], "response": "output", "history": "history"}},
            {"instruction": "翻译", "input": "cat", "output": "猫", "history": [["Hi", "Hello!"]], "language": "zh"},
            {
                "messages": [
                    *HELLO,
                    {"role": "user", "content": "翻译\ncat"},
                    {"role": "assistant", "content": "猫"},
                ],
                "language": "zh",
            },
        ),
        (
            {"messages": {"prompt": "q", "response": "a"}},
            {"q": "Hi", "a": "Hello!", "history": "kept"},
            {"messages": HELLO, "history": "kept"},
        ),
        ({"messages": {"prompt": "q", "response": "a"}}, {"q": "Hi", "a": ""}, "empty_turn"),
        ({"messages": {"prompt": "q", "response": "a"}}, {"q": "Hi"}, "bad_turn"),
        ({"messages": {"prompt": "q", "response": "a"}}, {"b": 1}, "no_turns"),
        (
            {"messages": {"prompt": "q", "response": "a", "history": "h"}},
            {"q": "x", "a": "y", "h": [["1"]]},
            "bad_turn",
        ),
        ({"messages": {"conversations": "c"}}, {"c": []}, "no_turns"),
        ({"messages": {"conversations": "c"}}, {"c": "not JSON"}, "no_turns"),
        ({"messages": {"conversations": "c"}}, {"c": [{"from": "x", "value": "y"}]}, "bad_turn"),
        ({"messages": {"conversations": "c"}}, {"c": [{"role": "tool", "content": "y"}]}, "unknown_role"),
        ({"messages": {"conversations": "c"}}, {"c": HELLO[:1]}, "no_answer"),
        (
            {"messages": {"conversations": "c"}},
            {"c": [HELLO[0], {"role": "assistant", "content": "\ud800"}]},
            "not_unicode",
        ),
    ],
)
def test_converters(converter, record, expected):
    result = convert({"id": "7", **record}, converter)
    if isinstance(expected, str):
        assert isinstance(result, Rejected) and (result.id, result.reason) == ("7", expected)
    else:
        assert result == {"id": "7", **expected}


def entry(name: str) -> Dataset:
    return load_catalogue(CATALOGUE)[name]


def converted(out: Path) -> list[dict]:
    return [json.loads(line) for part in sorted(out.glob("part-*.jsonl")) for line in part.read_text().splitlines()]


def test_convert_a_belle_file_that_is_json_lines_in_a_json(tmp_path):
    answer = {"from": "assistant", "value": "答"}
    lines = [{"id": str(n), "conversations": [{"from": "human", "value": f"问{n}"}, answer]} for n in range(5)]
    lines.append({"id": "9", "conversations": [{"from": "human", "value": "?"}]})
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "train_3.5M_CN.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "in" / "README.md").write_text("about")
    summary = convert_dataset(entry("belle-3.5m"), tmp_path / "in", tmp_path / "out", workers=1)
    assert (summary["records_in"], summary["records_out"], summary["rejected"]) == (6, 5, {"no_answer": 1})
    assert converted(tmp_path / "out")[1] == {
        "id": "1", "messages": [{"role": "user", "content": "问1"}, {"role": "assistant", "content": "答"}],
    }  # fmt: skip
    from data_tools.readers import iterate_documents

    assert len(list(iterate_documents(tmp_path / "out"))) == 5  # the trainer's own reader takes it


def pack(path: Path, members: dict[str, bytes]) -> None:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        return
    with tarfile.open(path, f"w:{path.suffix[1:]}") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("name", ["mobvoi.jsonl.tar.bz2", "m.tar.gz", "m.zip"])
def test_archives_are_unpacked_once(tmp_path, name):
    folder = tmp_path / "in"
    folder.mkdir()
    lines = "".join(json.dumps({"text": f"文档 {n}"}, ensure_ascii=False) + "\n" for n in range(20)).encode()
    pack(folder / name, {"d/mobvoi.jsonl": lines, "__MACOSX/._x.jsonl": b"\0", "d/notes.pdf": b"x"})
    summary = convert_dataset(entry("seq-monkey"), folder, tmp_path / "out", workers=1)
    assert summary["records_out"] == 20 and converted(tmp_path / "out")[3]["text"] == "文档 3"
    unpacked = folder / ".corpus" / name / "d" / "mobvoi.jsonl"
    before = unpacked.stat().st_mtime_ns
    convert_dataset(entry("seq-monkey"), folder, tmp_path / "out", workers=1)
    assert unpacked.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "name, members, said",
    [
        ("m.tar.gz", {"../x.jsonl": b"{}"}, "would lie outside its folder"),
        ("m.zip", {"/x.jsonl": b"{}"}, "would lie outside its folder"),
        ("m.tar.gz", {"x.exe": b"1"}, "holds no file that can be read as records"),
        ("m.tar.bz2", None, "is damaged or cut off"),
        ("m.zip", None, "is damaged or cut off"),
    ],
)
def test_bad_archives(tmp_path, name, members, said):
    folder = tmp_path / "in"
    folder.mkdir()
    if members is None:
        (folder / name).write_bytes(b"BZh9" + b"?" * 100)
    else:
        pack(folder / name, members)
    with pytest.raises(UserError, match=said):
        convert_dataset(entry("seq-monkey"), folder, tmp_path / "out", workers=1)
    assert not list(tmp_path.rglob("x.jsonl"))


def test_get_and_convert_with_a_catalogue_of_ones_own(server, tmp_path):
    lines = [{"instruction": "Say", "input": f"{n}", "output": "ok", "history": []} for n in range(50)]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    server.pages["/some/file.jsonl"] = Page(content)
    digest = hashlib.sha256(content).hexdigest()
    (tmp_path / "own.yaml").write_text(f"""
datasets:
  mine:
    title: Mine
    kind: sft
    languages: [en]
    licence: mine
    verified: yes
    sources: [{{http: [{{url: "{server.url("/some/file.jsonl")}", sha256: {digest}, bytes: {len(content)}}}]}}]
    converter: {{messages: {{prompt: [instruction, input], response: output, history: history}}}}
""")
    own = ("--catalogue", tmp_path / "own.yaml")
    done = command("get", "mine", *own, "--out", tmp_path / "o", "--convert", "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert len(converted(tmp_path / "o" / "converted")) == 50 and "as its checksum says" in done.stdout
    done = command("get", "mine", *own, "--out", tmp_path / "p", "--limit-bytes", 1000, "--convert", "--workers", 1)
    assert done.returncode == 0, done.stderr
    (first,) = (tmp_path / "p").glob("file.first-1000.jsonl")
    assert content.startswith(first.read_bytes()) and first.read_bytes().endswith(b"\n")
    assert len(converted(tmp_path / "p" / "converted")) == first.read_bytes().count(b"\n")
    two = (tmp_path / "own.yaml").read_text().replace("sources: [", "sources: [{modelscope: a/b}, ")
    (tmp_path / "two.yaml").write_text(two)
    done = command(
        "get", "mine", "--catalogue", tmp_path / "two.yaml", "--endpoint", server.url(), "--out", tmp_path / "q"
    )
    assert done.returncode == 2 and "it is known to be on http too: --source http" in done.stderr
    done = command("convert", "mine", tmp_path / "o", *own, "--out", tmp_path / "again", "--workers", 1)
    assert done.returncode == 0 and len(converted(tmp_path / "again")) == 50
    (tmp_path / "o" / "file.jsonl").unlink()
    done = command("convert", "mine", tmp_path / "o", *own, "--out", tmp_path / "third")
    assert done.returncode == 2 and "is not there: run the same `download get` again" in done.stderr


def test_real_samples_convert_by_their_forms(tmp_path):
    shared = ROOT.parent / "shared" / "data" / "sft-samples"
    if not shared.is_dir():
        pytest.skip("../shared/data/sft-samples is not on this machine")
    alpaca = {"messages": {"prompt": ["instruction", "input"], "response": "output"}}
    dataset = Dataset("x", (), converter=alpaca)
    (tmp_path / "in").mkdir()
    shutil.copy(shared / "alpaca_zh_demo.json", tmp_path / "in")
    summary = convert_dataset(dataset, tmp_path / "in", tmp_path / "out", workers=1)
    assert summary["records_out"] + sum(summary["rejected"].values()) == summary["records_in"] > 900
    assert summary["records_out"] > 0.95 * summary["records_in"]

"""python -m data_tools.clean: what stays, what goes and why, the summary, --explain and --dry-run, wrong input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_tools.clean import clean, dry_run, explained
from data_tools.records import TextField
from minillm.utils.errors import UserError

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")

ENGLISH = (
    "The river begins in the hills to the north of the town, and it has been used by mills for hundreds of years. "
    "People who live beside it say that the water is clear in spring but brown after rain. "
    "In summer children swim below the old bridge, with the older ones keeping watch on the bank. "
    "Nobody would think of a life without it.\n"
)
CHINESE = (
    "这条河发源于城北的山中，几百年来一直被磨坊使用。住在河边的人说，春天的河水是清的，下雨以后就变黄了。"
    "夏天，孩子们在老桥下游泳，大一点的孩子在岸上看着他们。没有人能想象没有这条河的生活。\n"
    "到了秋天，两岸的树叶都红了，许多人从城里来这里散步、拍照，也有人坐在岸边钓鱼。\n"
)
FRENCH = (
    "La rivière prend sa source dans les collines au nord de la ville, et les moulins s'en servent depuis des siècles. "
    "Les habitants disent que l'eau est claire au printemps mais brune après la pluie. "
    "En été, les enfants se baignent sous le vieux pont pendant que les plus grands surveillent la rive.\n"
)
DOCUMENTS = [
    {
        "id": "en",
        "text": ENGLISH + "Home | About us | Contact\n© 2020 River Town. All rights reserved.\n",
        "source": "web",
    },
    {"id": "zh", "text": CHINESE + "上一篇 下一篇\n版权所有 京ICP备12345678号\n"},
    {"id": "fr", "text": FRENCH},
    {"id": "mask", "text": ENGLISH + "You can write to the keeper at keeper@river.example or call +44 20 7946 0958.\n"},
    {"id": "short", "text": "This one is far too short to stay here."},
    {"id": "repeated", "text": ENGLISH + "The same line comes again and again in here.\n" * 20},
    {"id": "braces", "text": ENGLISH + "Then the function { return } was called by somebody.\n"},
    {"id": "broken", "text": ENGLISH.replace("Nobody", "â€œNobody\u200b â€”") + "\r\n\r\n\r\n"},
    {"id": "nothing", "text": "Home\nNext\n"},
]


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def read_parts(folder: Path) -> list[dict]:
    return [json.loads(line) for part in sorted(folder.glob("part-*")) for line in part.open(encoding="utf-8")]


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "data_tools.clean", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def cleaned(tmp_path_factory) -> tuple[Path, dict[str, dict], dict]:
    """The nine documents by the real command: folder, what stays by id, summary."""
    folder = tmp_path_factory.mktemp("clean")
    source = write_jsonl(folder / "in.jsonl", DOCUMENTS)
    done = command(source, "--out", folder / "out", "--language", "en,zh")
    assert done.returncode == 0, done.stderr
    records = {record["id"]: record for record in read_parts(folder / "out")}
    return folder, records, json.loads((folder / "out" / "summary.json").read_text(encoding="utf-8"))


def test_what_stays(cleaned):
    _, records, _ = cleaned
    assert list(records) == ["en", "zh", "mask", "broken"]
    assert records["en"] == {
        "id": "en", "text": ENGLISH.strip(), "source": "web", "language": "en", "language_score": 1.0,
    }  # fmt: skip
    assert records["zh"]["text"] == CHINESE.strip() and records["zh"]["language"] == "zh"
    assert records["mask"]["text"].endswith("You can write to the keeper at <EMAIL> or call <PHONE>.")
    assert records["broken"]["text"] == ENGLISH.replace("Nobody", "“Nobody —").strip()


def test_summary_says_what_went_and_why(cleaned):
    _, _, summary = cleaned
    assert summary["tool"] == "clean" and summary["records_in"] == 9 and summary["records_out"] == 4
    assert summary["rejected"] == {
        "language": 1, "gopher_words": 1, "gopher_duplicate_lines": 1, "c4_curly_brackets": 1, "empty": 1,
    }  # fmt: skip
    example = summary["examples"]["gopher_words"][0]
    assert example == {
        "id": "short",
        "detail": "gopher_words is 9, allowed is 50 to 100000",
        "text": "This one is far too short to stay here.",
    }  # fmt: skip
    assert summary["examples"]["empty"][0]["detail"] == "nothing is left: its lines went to c4_line_words"
    assert "language is fr" in summary["examples"]["language"][0]["detail"]
    statistics = summary["statistics"]
    # every rule is counted by itself: the short one has too few stop words and sentences as well
    assert statistics["rules_failed"]["gopher_words"] == 1 and statistics["rules_failed"]["c4_sentences"] == 1
    assert statistics["rules_failed"]["gopher_duplicate_10_grams"] == 1
    assert statistics["masks"] == {"email": 1, "phone": 1}
    # navigation of two words is shorter than C4's five
    assert statistics["lines_removed"]["boilerplate_notice"] == 2
    assert sum(statistics["lines_removed"].values()) == 6, statistics
    assert statistics["languages"] == {"en": 6, "zh": 1, "fr": 1, "und": 1}
    assert statistics["repaired"] >= 1 and statistics["masked_records"] == 1
    lines = {shown["line"] for found in summary["line_examples"].values() for shown in found}
    assert "© 2020 River Town. All rights reserved." in lines and "上一篇 下一篇" in lines
    assert "line_examples" not in statistics


def test_cleaning_the_output_changes_nothing(cleaned):
    folder, records, _ = cleaned
    summary = clean([str(folder / "out")], folder / "again", {"languages": ["en", "zh"]}, workers=1)
    assert read_parts(folder / "again") == list(records.values())
    assert summary["rejected"] == {} and summary["statistics"]["lines_removed"] == {}
    assert summary["statistics"]["masks"] == {} and summary["statistics"]["repaired"] == 0


def test_the_result_does_not_depend_on_processes(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", [{**d, "id": f"{d['id']}{i}"} for i in range(12) for d in DOCUMENTS])
    one = clean([str(source)], tmp_path / "one", workers=1, unit_bytes=16_000)
    two = clean([str(source)], tmp_path / "two", workers=2, unit_bytes=16_000)
    for key in ("rejected", "statistics", "examples", "line_examples", "records_out"):
        assert one[key] == two[key]
    for part in sorted((tmp_path / "one").glob("part-*")):
        assert part.read_bytes() == (tmp_path / "two" / part.name).read_bytes()
    assert len(list((tmp_path / "two").glob("part-*"))) > 2


def test_conversations_are_cleaned_by_message_and_judged_as_one(tmp_path):
    messages = [
        {"role": "user", "content": "Who keeps\u200b the river?  Write to me@home.example, please."},
        {"role": "assistant", "content": ENGLISH.replace("â", "")},
    ]
    records = [{"id": "long", "messages": messages}, {"id": "short", "messages": messages[:1] + [messages[0]]}]
    records[1]["messages"][1] = {"role": "assistant", "content": "Yes."}
    summary = clean([str(write_jsonl(tmp_path / "in.jsonl", records))], tmp_path / "out", workers=1)
    (kept,) = read_parts(tmp_path / "out")
    assert kept["id"] == "long" and kept["language"] == "en"
    assert [m["content"] for m in kept["messages"]] == [
        "Who keeps the river? Write to <EMAIL>, please.", ENGLISH.strip(),
    ]  # fmt: skip
    assert summary["rejected"] == {"gopher_words": 1}


def test_the_parts_of_a_template_are_masked_too(tmp_path):
    record = {"title": "Ask 13812345678", "lines": [ENGLISH, "me@home.example is where to write, to say so."], "n": 3}
    source = write_jsonl(tmp_path / "in.jsonl", [record])
    clean([str(source)], tmp_path / "out", text=TextField(template="{title}\n{lines}"), workers=1)
    (kept,) = read_parts(tmp_path / "out")
    assert kept["title"] == "Ask <PHONE>" and kept["lines"][1].startswith("<EMAIL> is") and kept["n"] == 3
    assert "<EMAIL>" in kept["text"] and "138" not in json.dumps(kept)


def test_options_of_the_command(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", DOCUMENTS)
    (tmp_path / "rules.yaml").write_text("thresholds:\n  gopher_words: {min: 3}\n", encoding="utf-8")
    (tmp_path / "bad.txt").write_text("# words\nmills\n", encoding="utf-8")
    done = command(
        *(
            source,
            "--out",
            tmp_path / "out",
            "--rules",
            "gopher_words,c4_bad_words",
            "--config",
            tmp_path / "rules.yaml",
        ),
        *("--set", "gopher_words.characters.min=1000", "--bad-words", tmp_path / "bad.txt", "--mask", "none"),
        *("--workers", 1, "--compress", "gz"),
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert summary["rejected"] == {"gopher_words": 2, "c4_bad_words": 5}  # zh below 1000; "Home Next"
    assert (tmp_path / "out" / "part-00000.jsonl.gz").is_file()
    assert summary["statistics"]["masks"] == {} and "c4_bad_words" in done.stdout


def test_long_lines_are_counted_and_left_out(tmp_path):
    source = tmp_path / "in.jsonl"
    with open(source, "w", encoding="utf-8") as file:
        file.write(json.dumps({"id": "a", "text": ENGLISH}) + "\n")
        file.write(json.dumps({"id": "b", "text": "x " * (17 << 20)}) + "\n")
        file.write(json.dumps({"id": "c", "text": ENGLISH}) + "\nno json\n")
    summary = clean([str(source)], tmp_path / "out", workers=1)
    assert summary["rejected"] == {"too_long": 1, "not_json": 1} and summary["records_out"] == 2


# -- looking without writing -------------------------------------------------------------------------------------------


def test_explain_one_document(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", DOCUMENTS)
    done = command(source, "--explain", "zh", "--language", "en,zh")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("zh: 这条河发源于城北的山中") and lines[0].endswith("…")
    assert "language zh" in lines[1] and lines[-1] == "  => kept"
    rows = [line for line in lines if line.strip().startswith(("gopher_", "c4_")) and " ok" in line]
    assert len(rows) == 23  # Gopher's 21 but the word length, and three of C4's documents rules
    assert len({line.index("at most") for line in rows if "at most" in line}) == 1  # aligned
    assert any("boilerplate_notice" in line and "京ICP备" in line for line in lines)
    assert not (tmp_path / "out").exists()


def test_explain_names_the_rule_that_removes(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", DOCUMENTS)
    lines = list(explained([str(source)], "short", {}, TextField()))
    assert lines[-1] == "  => removed, gopher_words: gopher_words is 9, allowed is 50 to 100000"
    assert [line for line in lines if "REMOVE" in line][0].split() == [
        "gopher_words", "9", "50", "to", "100000", "REMOVE",
    ]  # fmt: skip
    assert sum("=> " in line for line in explained([], str(source), {}, TextField())) == 3  # the first of a file
    with pytest.raises(UserError, match="--explain nobody: no file and no id"):
        list(explained([str(source)], "nobody", {}, TextField()))
    with pytest.raises(UserError, match="--explain nobody is not a file"):
        list(explained([], "nobody", {}, TextField()))


def test_dry_run_counts_and_writes_nothing(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", DOCUMENTS)
    lines = dry_run([str(source)], 5, {"languages": ["en", "zh"]}, TextField())
    assert lines[0] == "3 of the first 5 records would stay"
    assert any(line.split()[:2] == ["gopher_words", "1"] for line in lines)
    done = command(source, "--dry-run", 9)
    assert done.returncode == 0 and "5 of the first 9 records would stay" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a PATH"),
        (["IN"], "name a folder for the result: --out DIR"),
        (["IN", "--out", "OUT", "--preset", "wep"], "--preset wep: known are web, short, book, none"),
        (["IN", "--out", "OUT", "--language", "english"], "--language english: known are"),
        (["IN", "--out", "OUT", "--mask", "names"], "--mask names: known are email"),
        (["IN", "--out", "OUT", "--rules", "gofer"], "did you mean gopher"),
        (["IN", "--out", "OUT", "--set", "gopher_words.min=many"], "write it as gopher_words.min=20"),
        (["IN", "--out", "OUT", "--config", "none.yaml"], "--config none.yaml cannot be read"),
        (["IN", "--out", "OUT", "--bad-words", "none.txt"], "--bad-words none.txt cannot be read"),
        (["none.jsonl", "--out", "OUT"], "none.jsonl does not exist"),
    ],
)
def test_wrong_commands_are_one_line(tmp_path, capsys, monkeypatch, arguments, message):
    from data_tools.clean import main

    source = write_jsonl(tmp_path / "in.jsonl", DOCUMENTS)
    places = {"IN": str(source), "OUT": str(tmp_path / "out")}
    monkeypatch.setattr(sys, "argv", ["clean", *(places.get(word, word) for word in arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    said = capsys.readouterr().err
    assert left.value.code == 2 and message in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


# -- real data ---------------------------------------------------------------------------------------------------------


@needs_shared
def test_real_pages(tmp_path):
    """C4's own pages have C4's rules behind them: only Gopher's find more."""
    summary = clean([str(SHARED / "sft-samples" / "c4_demo.jsonl")], tmp_path / "out", workers=1)
    assert summary["records_in"] == 300 and 240 <= summary["records_out"] <= 280
    assert all(reason.startswith("gopher_") for reason in summary["rejected"])
    assert "c4_line_words" not in summary["statistics"]["lines_removed"]
    assert summary["statistics"]["languages"] == {"en": 300}


@needs_shared
def test_tang_poems_survive_the_short_preset(tmp_path):
    poems = json.loads((SHARED / "tang-poems" / "poet.tang.0.json").read_text(encoding="utf-8"))[:300]
    (tmp_path / "poems.json").write_text(json.dumps(poems), encoding="utf-8")
    text = TextField(template="{title}\n{paragraphs}")
    options = {"preset": "short", "languages": ["zh"]}
    summary = clean([str(tmp_path / "poems.json")], tmp_path / "out", options, text=text, workers=1)
    kept = {record["id"]: record for record in read_parts(tmp_path / "out")}
    assert len(kept) >= 297 and summary["statistics"]["languages"] == {"zh": 300}
    first = poems[0]
    assert kept[first["id"]]["text"] == "\n".join([first["title"], *first["paragraphs"]])
    lost = [poem for poem in poems if poem["id"] not in kept]
    assert all("".join(poem["paragraphs"]).count("□") > 5 for poem in lost)  # characters that are not handed down

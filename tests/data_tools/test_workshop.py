"""What all tools share: the same result for any number of processes and after any kill, one writer, honest counts."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from data_tools.parallel import run_units
from data_tools.records import Rejected, TextField, find_units, iterate_records
from data_tools.workshop import Stage, require, run_stage
from minillm.utils.errors import UserError
from tests.support.launching import ROOT, environment
from tests.support.processes import wait_until_alone


class Odd(Stage):
    """Keeps odd numbers, doubles the text of every ninth, leaves out the rest; slow where asked."""

    name = "odd"

    def process(self, record):
        time.sleep(self.options.get("seconds", 0))
        number = int(record["text"])
        self.seen = getattr(self, "seen", 0) + 1
        if number == self.options.get("die"):
            os.kill(os.getpid(), signal.SIGKILL)
        if number % 2 == 0:
            return Rejected(record["id"], "even", f"{number} is even")
        return [record, {**record, "text": f"{number}{number}"}] if number % 9 == 0 else record

    def finish_unit(self):
        return {"seen": self.seen, "by": {"kind": {"a": self.seen}}}


class Same(Stage):
    name = "same"

    def process(self, record):
        return record


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for part in range(4):
        rows = [{"id": f"n{n}", "text": str(n), "extra": n} for n in range(part * 100, part * 100 + 100)]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "[]\n")
    return folder


def parts(out) -> list[dict]:
    return [json.loads(line) for path in sorted(out.glob("part-*.jsonl")) for line in path.read_text().splitlines()]


EXPECTED = [
    {"id": f"n{n}", "text": text, "extra": n}
    for n in range(1, 400, 2)
    for text in ([str(n), f"{n}{n}"] if n % 9 == 0 else [str(n)])
]


def odd(corpus, out, **more):
    options = more.pop("options", {})
    return run_stage(Odd, options, [corpus], out, **{"unit_bytes": 1000, **more})


def test_the_result_does_not_depend_on_the_processes(corpus, tmp_path, capsys):
    one, two = (odd(corpus, tmp_path / f"out{workers}", workers=workers) for workers in (1, 2))
    assert parts(tmp_path / "out1") == parts(tmp_path / "out2") == EXPECTED
    assert {**one, "seconds": 0} == {**two, "seconds": 0}
    assert one["records_in"] == 404 and one["records_out"] == len(EXPECTED)
    assert one["rejected"] == {"even": 200, "not_an_object": 4}
    assert one["statistics"] == {"seen": 400, "by": {"kind": {"a": 400}}}
    assert [e["id"] for e in one["examples"]["even"]] == ["n0", "n2", "n4", "n6", "n8"]
    assert one["bytes_in"] == sum(p.stat().st_size for p in corpus.iterdir())
    assert one["bytes_out"] == sum(p.stat().st_size for p in (tmp_path / "out1").glob("part*"))
    assert json.loads((tmp_path / "out1" / "summary.json").read_text()) == one
    assert odd(corpus, tmp_path / "out1") == one and "finished already" in capsys.readouterr().out
    # tools chain by files
    assert list(iterate_records(tmp_path / "out1")) == EXPECTED


def test_compressed_parts_hold_the_same(corpus, tmp_path):
    for compress, suffix in (("gz", ".jsonl.gz"), ("zst", ".jsonl.zst")):
        odd(corpus, tmp_path / compress, compress=compress, workers=1)
        assert list(iterate_records(tmp_path / compress)) == EXPECTED
        assert all(p.name.endswith(suffix) for p in (tmp_path / compress).glob("part-*"))
    lines = [gzip.open(p).read() for p in sorted((tmp_path / "gz").glob("part-*"))]
    assert [json.loads(line) for part in lines for line in part.splitlines()] == EXPECTED


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_killed_command_goes_on(corpus, tmp_path, workers):
    code = (
        "import sys; from pathlib import Path; from tests.data_tools.test_workshop import Odd; "
        "from data_tools.workshop import run_stage\n"
        "if __name__ == '__main__': run_stage(Odd, {'seconds': 0.003}, [sys.argv[1]], Path(sys.argv[2]), "
        f"unit_bytes=1000, workers={workers})"
    )
    out = tmp_path / "out"
    words = [sys.executable, "-c", code, str(corpus), str(out)]
    for wanted in (2, 5):
        process = subprocess.Popen(
            words, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, start_new_session=True
        )
        while len(list((out / ".work").glob("odd-*.json"))) < wanted:
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
        process.wait()
        wait_until_alone(process)
        assert not (out / "summary.json").exists()
        assert all(path.read_bytes().endswith(b"\n") for path in out.glob("part-*"))
        done = {path: path.stat().st_mtime_ns for path in out.glob("part-*") if wanted == 5}
    finished = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True)
    assert "odd: going on, " in finished.stdout
    assert parts(out) == EXPECTED and not list(out.glob(".part*"))
    unchanged = [path for path, at in done.items() if path.stat().st_mtime_ns == at]
    assert len(unchanged) >= 5
    summary = json.loads((out / "summary.json").read_text())
    assert {**summary, "seconds": 0, "options": {}} == {**odd(corpus, tmp_path / "whole"), "seconds": 0}


def test_a_process_that_dies_is_told(corpus, tmp_path):
    with pytest.raises(UserError, match="a process was killed.*the same command goes on"):
        odd(corpus, tmp_path / "out", options={"die": 250}, workers=2)
    assert not (tmp_path / "out" / "summary.json").exists()


def test_another_command_or_foreign_files_are_refused(corpus, tmp_path):
    odd(corpus, tmp_path / "out", workers=1)
    with pytest.raises(UserError, match=r"holds the work of another command \(different: options\)"):
        odd(corpus, tmp_path / "out", options={"seconds": 1e-9})
    (corpus / "3.jsonl").write_text('{"text": "1"}\n')
    with pytest.raises(UserError, match=r"different: inputs"):
        odd(corpus, tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="exists and holds other files"):
        odd(corpus, tmp_path / "mine")
    for inside in (corpus / "out", corpus, tmp_path):
        with pytest.raises(UserError, match="lie in each other"):
            odd(corpus, inside)
    assert sorted(p.name for p in corpus.iterdir()) == [f"{n}.jsonl" for n in range(4)]
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="there is nothing to read"):
        odd(tmp_path / "nothing", tmp_path / "out2")


def test_an_error_in_a_process_is_the_callers(corpus, tmp_path):
    (corpus / "4.csv").write_text("text,text\n")
    with pytest.raises(UserError, match="names a column twice"):
        odd(corpus, tmp_path / "out", workers=2)


def side_file(unit, arguments, work, progress):
    progress(unit.size)
    (work / f"side-{unit.number}").write_text(arguments["word"])
    return {"number": unit.number}


def test_run_units_gives_results_in_order(corpus, tmp_path):
    units = find_units(corpus, 1)
    found = run_units(side_file, units, {"word": "x"}, tmp_path, workers=2, label="a")
    assert found == [{"number": number} for number in range(len(units))]
    assert len(list(tmp_path.glob("side-*"))) == len(units)


def test_a_missing_package_is_one_line():
    with pytest.raises(UserError, match=r'needs the package nowhere: pip install -e "\.\[workshop\]"'):
        require("nowhere")


def test_values_json_has_no_word_for(tmp_path):
    import datetime

    import pyarrow.parquet

    row = {"text": "x", "at": datetime.date(2026, 11, 21)}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "x.parquet")

    run_stage(Same, {}, [tmp_path / "x.parquet"], tmp_path / "out", text=TextField(), workers=1)
    assert parts(tmp_path / "out") == [{"id": "x.parquet:1", "text": "x", "at": "2026-11-21"}]

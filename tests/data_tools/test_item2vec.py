"""`python -m data_tools.item2vec`: planted clusters found again, better than popularity; bad input."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_tools.item2vec import main
from data_tools.recommendation.evaluation import cooccurrence
from data_tools.recommendation.sequences import Sequences, read_names
from data_tools.recommendation.vectors import Items
from minillm.utils.errors import UserError
from tests.data_tools.planted_playlists import cluster_of, write_playlists

ROOT = Path(__file__).parents[2]


def run_main(*arguments: object) -> int:
    """Exit code of the command line in this process."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code or 0
    return 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path, Path]:
    """(playlists, names, vectors)."""
    folder = tmp_path_factory.mktemp("items")
    playlists, names = write_playlists(folder)
    options = ("--names", names, "--skip-lines", 2, "--epochs", 10, "--text", "--out", folder / "model")
    assert run_main("train", playlists, *options) == 0
    return playlists, names, folder / "model"


def test_planted_clusters_are_found_again(trained):
    items = Items(trained[2])
    assert len(items.entries) == 300 and items.vectors.shape == (300, 32)
    same = []
    for number, entry in enumerate(items.entries):
        found = items.similar([number], 10)
        assert number not in [other for other, _ in found]
        assert [cosine for _, cosine in found] == sorted((cosine for _, cosine in found), reverse=True)
        same += [cluster_of(items.entries[other]["id"]) == cluster_of(entry["id"]) for other, _ in found]
    assert np.mean(same) > 0.9  # by chance 24 / 299 = 0.08


def test_hit_rate_beats_popularity(trained, capsys):
    assert run_main("evaluate", trained[2], "--at", 1, 10) == 0
    said = capsys.readouterr().out
    found = json.loads((trained[2] / "evaluation.json").read_text())
    assert 100 < found["sequences"] < 200  # a tenth of 1,500
    for way in ("item2vec", "cosine", "co-occurrence"):
        assert found[way]["hit@10"] > 0.3 > 5 * found["popularity"]["hit@10"]
        assert found[way]["mrr"] > 4 * found["popularity"]["mrr"]
        assert f"{found[way]['hit@10']:.4f}" in said


def test_held_out_items_are_not_learned_from(trained):
    playlists, _, model = trained
    held = (model / "holdout.txt").read_text().split("\n")[:-1]
    sequences = Sequences(playlists, 2, holdout=0.1, seed=0)
    learned = [" ".join(items) for items in sequences]
    whole = [" ".join(items) for _, items in Sequences(playlists, 2).lines()]
    assert all(line in whole and line not in learned for line in held)
    assert sum(map(len, map(str.split, whole))) == sum(map(len, map(str.split, learned))) + len(held)
    counts = {entry["id"]: entry["count"] for entry in Items(model).entries}
    assert counts["1000"] == sum(line.split().count("1000") for line in learned)


def test_the_same_command_gives_the_same_bytes_whatever_the_hash_seed(tmp_path):
    playlists, names = write_playlists(tmp_path, number=150)
    for seed in ("1", "2"):
        command = [sys.executable, "-m", "data_tools.item2vec", "train", playlists, "--names", names, "--epochs", "2",
                   "--skip-lines", "2", "--out", tmp_path / seed]  # fmt: skip
        subprocess.run(list(map(str, command)), cwd=ROOT, check=True, env={"PYTHONHASHSEED": seed}, capture_output=True)
    for name in ("vectors.npy", "output.npy", "items.jsonl", "holdout.txt"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name


def test_gensim_reads_the_text_file(trained):
    from gensim.models import KeyedVectors

    theirs = KeyedVectors.load_word2vec_format(str(trained[2] / "vectors.txt"))
    items = Items(trained[2])
    assert theirs.index_to_key == [entry["id"] for entry in items.entries]
    best = theirs.most_similar("1000", topn=5)
    mine = [(items.entries[number]["id"], cosine) for number, cosine in items.similar([items.number["1000"]], 5)]
    assert [name for name, _ in best] == [name for name, _ in mine]
    assert [cosine for _, cosine in best] == pytest.approx([cosine for _, cosine in mine], abs=1e-5)


@pytest.mark.parametrize(
    "wanted, title",
    [
        ("1001", "夜曲 1001 - 歌手 0 [1001]"),  # an id
        ("夜曲 1001", "夜曲 1001 - 歌手 0 [1001]"),  # a name
        ("song 1002", "Song 1002 - 歌手 0 [1002]"),  # without case
        ("1102 歌手", "Song 1102 - 歌手 4 [1102]"),  # words of name and artist
        ("Somg 1110", "Song 1110 - 歌手 4 [1110]"),  # most alike
    ],
)
def test_items_are_found_by_id_and_by_name(trained, wanted, title):
    items = Items(trained[2])
    assert items.title(items.find(wanted)) == title


def test_similar_says_names_and_takes_several(trained, capsys):
    assert run_main("similar", trained[2], "夜曲 1001", "1002", "-n", 3) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("[minillm]")]
    assert len(lines) == 3 and all("歌手 0" in line for line in lines)
    assert run_main("similar", trained[2], "zzzzqqqq") == 2
    assert "is not an id or name in" in capsys.readouterr().err


def test_cooccurrence_counts_neighbours_within_five_places():
    counts = cooccurrence([["a", "b", "x", "y", "z", "c", "a"]], {"a": 0, "b": 1, "c": 2, "x": 3, "y": 4, "z": 5})
    dense = counts.toarray()
    # b is one place after the first a, five before the last; c five places after the first, one before the last
    assert dense[0, 1] == dense[1, 0] == 2 and dense[0, 2] == 2 and dense[1, 2] == 1 and dense[0, 0] == 0


def test_names_from_tsv_csv_and_compressed_files(tmp_path):
    (tmp_path / "a.tsv").write_text("id\tname\tartist\n1 \t青花瓷 \t周杰伦\n2\tHey, Jude\n", encoding="utf-8")
    (tmp_path / "b.csv").write_text('1,青花瓷,周杰伦\r\n2,"Hey, Jude",\r\n', encoding="utf-8-sig")
    (tmp_path / "c.tsv.gz").write_bytes(gzip.compress("1\t青花瓷\t周杰伦\n2\tHey, Jude\n".encode()))
    for name in ("a.tsv", "b.csv", "c.tsv.gz"):
        assert read_names(tmp_path / name) == {"1": ("青花瓷", "周杰伦"), "2": ("Hey, Jude", "")}


def test_long_sequences_reach_gensim_in_whole_pieces(tmp_path):
    (tmp_path / "s.txt").write_text("# comment\n\n" + " ".join(["7"] * 25_000) + "\n")
    assert [len(piece) for piece in Sequences(tmp_path / "s.txt")] == [10_000, 10_000, 5_000]


@pytest.mark.parametrize(
    "content, names, message",
    [
        (b"1\n2\n3\n", None, "holds no sequence of two items or more"),
        (b"", None, "holds no sequence of two items"),
        (b"1 2\n3 4\n", None, "0 of 4 items are in"),
        (b"1 2 \xff\n", None, "is not UTF-8"),
        (b"1 2\n1 2\n", b"1 Song\n", "every line is id, name and maybe artist, with tabs between"),
        (b"1 2\n1 2\n", b"1\tA\n1\tB\n", "names.tsv:2: the id 1 has another name above"),
        (b"1 2\n1 2\n", b"\xa1\xa1", "is not UTF-8"),
        (b"1 2\n1 2\n", b"", "names no item"),
    ],
)
def test_bad_input_is_one_clear_error(tmp_path, content, names, message, capsys):
    (tmp_path / "s.txt").write_bytes(content)
    options = []
    if names is not None:
        (tmp_path / "names.tsv").write_bytes(names)
        options = ["--names", tmp_path / "names.tsv"]
    assert run_main("train", tmp_path / "s.txt", *options, "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert message in said and said.count("error:") == 1 and not (tmp_path / "out").exists()


def test_a_folder_in_use_and_folders_without_vectors(trained, tmp_path, capsys):
    playlists, _, model = trained
    assert run_main("train", playlists, "--out", model) == 2
    assert "exists already: remove it or choose another --out" in capsys.readouterr().err
    with pytest.raises(UserError, match="holds no item vectors"):
        Items(tmp_path)
    assert run_main("train", tmp_path / "none.txt", "--out", tmp_path / "x") == 2
    assert "does not exist" in capsys.readouterr().err

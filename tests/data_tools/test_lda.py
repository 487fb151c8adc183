"""`python -m data_tools.lda`: planted topics found again, numbers against gensim's and tomotopy's own, bad input."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_tools.lda import main
from data_tools.topics.coherence import coherence
from data_tools.topics.common import residual_idf
from data_tools.topics.inference import Bags, infer
from data_tools.topics.model import load_model
from data_tools.topics.tokens import as_date
from data_tools.topics.vocabulary import Choices, learn, prepare
from data_tools.topics.words import Tokenizer, choose_mode
from tests.data_tools.planted_topics import CHINESE, ENGLISH, agreement, planted, write_records

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
QUICK = ("--num-topics", 3, "--passes", 10, "--iterations", 100, "--no-pictures", "--no-page")


def run_main(*arguments: object) -> int:
    """Exit code of the command line in this process."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code or 0
    return 0


def table(path: Path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# -- the whole way ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted(tmp_path_factory) -> tuple[Path, Path, list[dict]]:
    """(input, OUT with everything in it, records)."""
    folder = tmp_path_factory.mktemp("lda")
    records = planted(ENGLISH)
    source = write_records(folder / "in.jsonl", records)
    arguments = ("--text-column", "abstract", "--num-topics", "2-4", "--passes", 10, "--out", folder / "out")
    assert run_main(source, *arguments) == 0
    return source, folder / "out", records


def test_the_report_is_whole_and_finds_what_was_planted(fitted):
    _, out, records = fitted
    topics = json.loads((out / "topics.json").read_text())
    assert len(topics) == 3  # of 2, 3 and 4 the planted number has the best coherence
    planted_words = {frozenset(words.split()) for words in ENGLISH.values()}
    assert {frozenset(entry["word"] for entry in topic["words"][:10]) for topic in topics} == planted_words
    assert [topic["topic"] for topic in topics] == [0, 1, 2]
    assert sum(topic["share"] for topic in topics) == pytest.approx(1, abs=1e-3)
    assert sum(topic["documents"] for topic in topics) == len(records)
    truth = {record["id"]: record["truth"] for record in records}
    for topic in topics:
        assert len({truth[example["id"]] for example in topic["examples"]}) == 1
        assert set(topic["coherence"]) == {"c_v", "c_npmi", "u_mass"} and topic["coherence"]["c_npmi"] > 0
    rows = table(out / "document_topics.csv")
    assert [row["id"] for row in rows] == [record["id"] for record in records]
    assert agreement([r["truth"] for r in records], [int(row["topic"]) for row in rows]) > 0.98
    for row in rows:
        shares = [float(row[f"topic_{n}"]) for n in range(3)]
        assert sum(shares) == pytest.approx(1, abs=1e-3) and max(shares) == pytest.approx(float(row["probability"]))
    words = table(out / "topic_words.csv")
    assert [row["word"] for row in words if row["topic"] == "0"] == [entry["word"] for entry in topics[0]["words"]]
    assert [row["num_topics"] for row in table(out / "num_topics.csv")] == ["2", "3", "4"]
    over_time = table(out / "topics_over_time.csv")
    assert {row["period"][:4] for row in over_time} == {"2000", "2001", "2002"}
    assert all(sum(float(row[f"topic_{n}"]) for n in range(3)) == pytest.approx(1, abs=1e-3) for row in over_time)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["records_in"] == summary["records_out"] == 150 and summary["date_column"] == "date"


def test_pictures_and_the_page_need_nothing_from_outside(fitted):
    from matplotlib.image import imread

    _, out, _ = fitted
    for name in ("topics", "topic-00", "topic-02", "num_topics", "topics_over_time"):
        picture = imread(out / f"{name}.png")
        assert min(picture.shape[:2]) > 200 and picture[..., :3].std() > 0.05, name
    page = (out / "topics.html").read_text(encoding="utf-8")
    assert "new LDAvis(" in page and "d3js.org v5" in page.lower()
    assert 'src="http' not in page and 'href="http' not in page  # no script or sheet is loaded
    data = page.split('new LDAvis("#topics", ')[1].split(");</script>")[0]
    assert json.loads(data.replace("<\\/", "</"))["topic.order"] == [1, 2, 3]
    assert all(word in page.split("<table>")[1] for word in ("sailor", "verdict", "onion"))


def test_the_same_command_changes_nothing_and_another_is_refused(fitted, capsys):
    source, out, _ = fitted
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != "lock"}
    arguments = (source, "--text-column", "abstract", "--passes", 10, "--out", out)
    assert run_main(*arguments, "--num-topics", "2-4") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert run_main(*arguments, "--num-topics", "5") == 2
    assert "another command" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != "lock"} == before


def test_apply_labels_new_records_as_the_report_does(fitted, tmp_path):
    source, out, records = fitted
    assert run_main("apply", out, source, "--text-column", "abstract", "--out", tmp_path / "labelled") == 0
    labelled = [json.loads(line) for line in (tmp_path / "labelled/part-00000.jsonl").read_text().splitlines()]
    rows = table(out / "document_topics.csv")
    assert [str(record["topic"]) for record in labelled] == [row["topic"] for row in rows]
    for record, row in zip(labelled, rows, strict=True):
        assert record["topic_probability"] == pytest.approx(float(row["probability"]), abs=2e-3)
    assert labelled[0]["text"] == records[0]["abstract"] and labelled[0]["truth"] == records[0]["truth"]
    new = planted(ENGLISH, number=60, seed=7) + [{"id": "x", "abstract": "xylophone", "truth": 0}]
    path = write_records(tmp_path / "new.jsonl", new)
    assert run_main("apply", out, path, "--text-column", "abstract", "--out", tmp_path / "new", "--field", "t") == 0
    labelled = [json.loads(line) for line in (tmp_path / "new/part-00000.jsonl").read_text().splitlines()]
    assert labelled[-1]["t"] is None and labelled[-1]["t_probability"] == 0
    assert agreement([r["truth"] for r in new[:-1]], [record["t"] for record in labelled[:-1]]) == 1


def test_split_gives_a_mixture_that_shards_and_sources_take(fitted, tmp_path, capsys):
    import yaml

    from data_tools.shards import build_shards
    from minillm.data.sources import open_sources
    from minillm.data.tokenizer import build_char_tokenizer

    source, out, records = fitted
    split = tmp_path / "split"
    assert run_main("apply", out, source, "--text-column", "abstract", "--split", "--out", split) == 0
    said = capsys.readouterr().out
    assert "python -m data_tools.shards build" in said and (split / "mixture.yaml").read_text() in said
    folders = sorted(path for path in split.iterdir() if path.name.startswith("topic-"))
    assert [folder.name for folder in folders] == ["topic-00", "topic-01", "topic-02"]
    truth = {record["id"]: record["truth"] for record in records}
    found = [json.loads(line) for f in folders for line in (f / "part-00000.jsonl").read_text().splitlines()]
    assert sorted(record["id"] for record in found) == sorted(truth)
    assert agreement([truth[r["id"]] for r in found], [r["topic"] for r in found]) > 0.98
    entries = yaml.safe_load((split / "mixture.yaml").read_text())["data"]["train"]
    assert sum(entry["weight"] for entry in entries) == pytest.approx(1, abs=1e-4)
    characters = [sum(len(r["text"]) for r in found if r["topic"] == n) for n in range(3)]
    assert [e["weight"] for e in entries] == pytest.approx([c / sum(characters) for c in characters], abs=1e-5)
    build_char_tokenizer(record["abstract"] for record in records).save_pretrained(tmp_path / "tokenizer")
    for entry, folder in zip(entries, folders, strict=True):
        build_shards(folder, tmp_path / entry["path"])
        entry["path"] = str(tmp_path / entry["path"])
    sources = open_sources(entries, tokenizer_path=tmp_path / "tokenizer", cache_dir=tmp_path / "cache")
    assert [source.name for source in sources] == ["topic-00", "topic-01", "topic-02"]
    assert [source.weight for source in sources] == [entry["weight"] for entry in entries]


@pytest.mark.parametrize("engine", ["gensim", "gibbs"])
@pytest.mark.parametrize("language", ["english", "chinese"])
def test_both_engines_find_planted_topics_twice_the_same(tmp_path, engine, language):
    records = planted(ENGLISH) if language == "english" else planted(CHINESE, glue="，")
    source = write_records(tmp_path / "in.jsonl", records)
    for name in ("a", "b"):
        assert run_main(source, "--text-column", "abstract", *QUICK, "--engine", engine, "--out", tmp_path / name) == 0
    rows = table(tmp_path / "a/document_topics.csv")
    assert agreement([record["truth"] for record in records], [int(row["topic"]) for row in rows]) > 0.98
    for name in ("topics.json", "document_topics.csv", "model/weights.npy", "model/model.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_a_killed_run_goes_on_with_its_tokens_and_models(tmp_path, monkeypatch):
    from data_tools.topics import workflow

    source = write_records(tmp_path / "in.jsonl", planted(ENGLISH))
    arguments = (source, "--text-column", "abstract", "--num-topics", "2-4", "--passes", 5, *QUICK[-2:])
    assert run_main(*arguments, "--out", tmp_path / "whole") == 0
    fit, fitted_numbers = workflow.fit, []

    def dies_at_four(corpus, number, training):
        fitted_numbers.append(number)
        if number == 4 and len(fitted_numbers) == 3:
            raise KeyboardInterrupt
        return fit(corpus, number, training)

    monkeypatch.setattr(workflow, "fit", dies_at_four)
    with pytest.raises(KeyboardInterrupt):
        run_main(*arguments, "--out", tmp_path / "killed")
    monkeypatch.setattr("data_tools.topics.tokens.Tokenizer", None)  # its tokens are there already
    assert run_main(*arguments, "--out", tmp_path / "killed") == 0
    assert fitted_numbers == [2, 3, 4, 4]
    for name in ("topics.json", "document_topics.csv", "model/topics.npy"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


def test_parquet_table_and_limit_over_several_units(tmp_path):
    import pyarrow.parquet

    records = planted(ENGLISH, number=300)
    source = write_records(tmp_path / "in.jsonl", records)
    options = ("--text-column", "abstract", *QUICK, "--limit", 120, "--table", "parquet", "--unit-bytes", "8k")
    assert run_main(source, *options, "--workers", 1, "--out", tmp_path / "out") == 0
    found = pyarrow.parquet.read_table(tmp_path / "out/document_topics.parquet").to_pylist()
    assert [row["id"] for row in found] == [record["id"] for record in records[:120]]
    assert agreement([r["truth"] for r in records[:120]], [row["topic"] for row in found]) > 0.98


# -- numbers against the libraries -------------------------------------------------------------------------------------


def random_corpus(documents: int = 60, words: int = 80) -> tuple[list[list[int]], Bags]:
    random = np.random.default_rng(5)
    sequences = [random.zipf(1.3, size=random.integers(1, 200)) % words for _ in range(documents)]
    pairs = [np.unique(sequence, return_counts=True) for sequence in sequences]
    offsets = np.cumsum([0, *(len(ids) for ids, _ in pairs)])
    ids, counts = (np.concatenate(column).astype(np.int32) for column in zip(*pairs, strict=True))
    return [sequence.tolist() for sequence in sequences], Bags(offsets, ids, counts)


def gensim_corpus(bags: Bags) -> list[list[tuple[int, int]]]:
    parts = [bags.part(n, n + 1) for n in range(len(bags))]
    return [list(zip(part.ids.tolist(), part.counts.tolist(), strict=True)) for part in parts]


def test_inference_is_gensims(monkeypatch):
    from gensim.models import LdaModel

    from data_tools.topics import inference

    _, bags = random_corpus()
    corpus = gensim_corpus(bags)
    model = LdaModel(corpus, num_topics=7, id2word={n: str(n) for n in range(80)}, passes=3, random_state=1)
    start = np.random.default_rng(0).gamma(100, 0.01, (60, 7)).astype(np.float32)

    class Start:
        def gamma(self, *_):
            return start.copy()  # gensim writes its result into it

    model.random_state = Start()
    theirs, theirs_counts = model.inference(corpus, collect_sstats=True)
    weights = np.ascontiguousarray(model.expElogbeta.T)
    for block in (1 << 8, 1 << 19):
        monkeypatch.setattr(inference, "_BLOCK_VALUES", block)
        counts = np.zeros_like(weights)
        gamma = infer(bags, weights, model.alpha, gamma=start, statistics=counts)
        np.testing.assert_allclose(gamma, theirs, rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(counts.T * model.expElogbeta, theirs_counts, rtol=2e-3, atol=2e-3)
    one = infer(bags.part(3, 4), weights, model.alpha, gamma=start[3:4])
    np.testing.assert_allclose(one, theirs[3:4], rtol=2e-3, atol=2e-3)


def test_the_online_engine_is_gensims(tmp_path):
    from gensim.models import LdaModel

    from data_tools.topics.corpus import open_corpus, write_corpus
    from data_tools.topics.engines import Training, fit

    sequences, bags = random_corpus(100)
    write_corpus(sequences, tmp_path / "corpus")
    corpus = open_corpus(tmp_path / "corpus", [str(n) for n in range(80)])
    assert (corpus.bags.ids == bags.ids).all() and (corpus.bags.counts == bags.counts).all()
    settings = {"passes": 4, "alpha": "auto", "eta": 0.1}
    mine = fit(corpus, 5, Training(**settings, chunk=30, start="random", seed=3))
    theirs = LdaModel(gensim_corpus(bags), num_topics=5, id2word=dict(enumerate(corpus.words)), chunksize=30,
                      random_state=3, eval_every=None, **settings)  # fmt: skip
    np.testing.assert_allclose(mine.topics, theirs.get_topics(), rtol=1e-2, atol=1e-4)
    np.testing.assert_allclose(mine.alpha, theirs.alpha, rtol=1e-2)


def test_fold_in_of_gibbs_models_agrees_with_tomotopys_own(tmp_path):
    import tomotopy

    from data_tools.topics.engines import Fitted
    from data_tools.topics.model import shares

    records = planted(ENGLISH, number=120)
    model = tomotopy.LDAModel(k=3, seed=1)
    for record in records:
        model.add_doc(record["abstract"].split())
    model.train(200, workers=1)
    words = list(model.used_vocabs)
    topics = np.array([model.get_topic_word_dist(topic) for topic in range(3)], dtype=np.float32)
    fitted = Fitted(topics, np.ascontiguousarray(topics.T), np.asarray(model.alpha, dtype=np.float32))
    new = [record["abstract"].split() for record in planted(ENGLISH, number=40, seed=9)]
    theirs = np.array(model.infer([model.make_doc(document) for document in new], iterations=200, workers=1)[0])
    pairs = [np.unique([words.index(word) for word in document], return_counts=True) for document in new]
    offsets = np.cumsum([0, *(len(ids) for ids, _ in pairs)])
    ids, counts = (np.concatenate(column) for column in zip(*pairs, strict=True))
    mine = shares(Bags(offsets, ids, counts), fitted)
    assert (mine.argmax(1) == theirs.argmax(1)).all()
    assert np.abs(mine - theirs).mean() < 0.03


def test_coherence_is_gensims():
    from gensim.corpora import Dictionary
    from gensim.models.coherencemodel import CoherenceModel

    # no word twice in a document: a window of gensim's loses a word when one of its occurrences leaves
    random = np.random.default_rng(2)
    sequences = [random.permutation(150)[: random.integers(1, 150)].tolist() for _ in range(60)]
    texts = [[f"w{token}" for token in sequence] for sequence in sequences]
    dictionary = Dictionary(texts)
    topics = np.array([[1, 2, 3, 5, 8], [2, 4, 9, 11, 30], [7, 1, 140, 33, 12]])
    mine = coherence(topics, [np.array(sequence) for sequence in sequences])
    named = [[f"w{word}" for word in topic] for topic in topics]
    for measure in ("c_v", "c_npmi", "u_mass"):
        corpus = [dictionary.doc2bow(text) for text in texts]
        theirs = CoherenceModel(topics=named, texts=texts, corpus=corpus, dictionary=dictionary, coherence=measure,
                                topn=5, processes=1).get_coherence_per_topic()  # fmt: skip
        np.testing.assert_allclose(mine[measure], theirs, rtol=1e-5, atol=1e-7, err_msg=measure)


def test_coherence_counts_windows_that_hold_both_words():
    document = [0, 5, 5, 1] + [5] * 20 + [0, 1, 0]
    windows = [set(document[n : n + 10]) for n in range(len(document) - 9)]
    p0, p1, both = (sum(words <= window for window in windows) / len(windows) for words in ({0}, {1}, {0, 1}))
    expected = np.log(both / (p0 * p1)) / -np.log(both)
    found = coherence(np.array([[0, 1]]), [np.where(np.array(document) == 5, -1, document)])
    assert found["c_npmi"] == pytest.approx([expected])


# -- words -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode, text, runs",
    [
        ("words", "Graph neural networks, and the RNN's gates.", [["graph", "neural", "networks"], ["rnn", "gates"]]),
        ("words", "Zero-shot $\\mathcal{O}(n)$ bounds: https://x.org/y 3D 42", [["zero", "shot"], ["bounds"], ["3d"]]),
        ("jieba", "我们提出深度学习的模型，PyTorch实现", [["提出", "深度", "学习"], ["模型"], ["pytorch", "实现"]]),
        ("characters", "明月幾時有，把酒問青天。", [["明", "月"], ["酒", "問", "青", "天"]]),
        ("words", "ＦＵＬＬ　ｗｉｄｔｈ", [["width"]]),
    ],
)
def test_words_of_a_text(mode, text, runs):
    assert Tokenizer(mode).chunks(text) == runs


@pytest.mark.parametrize(
    "text, mode",
    [("plain English", "words"), ("今天的天气很好，我们去公园", "jieba"), ("秋風萬里動，日暮黃雲高", "characters")],
)
def test_the_tokenizer_is_chosen_by_the_script(text, mode):
    assert choose_mode([text])[0] == mode


def test_plurals_phrases_common_and_rare_words():
    odd = [["filler"], ["alpha"], ["network"], ["deep", "blue", "sea"], ["glass"], ["network"]]
    even = [["filler"], ["networks"], ["series"], ["deep", "blue", "sea"], ["graph"] * 6]
    documents = [[["rare"]], *([odd, even] * 20)]
    vocabulary = learn(lambda: iter(documents), Choices(no_below=2, no_above=0.9, phrase_count=5))
    assert vocabulary.singular == {"networks": "network"}  # "glass" is none, "series" has no "serie"
    assert {"filler", "deep_blue_sea"} <= set(vocabulary.common)  # in all documents, once in each
    assert "graph" in vocabulary.words and "rare" not in vocabulary.words and vocabulary.num_rare == 1
    assert vocabulary.encode([["networks", "graph", "unheard"]])[1:] == [vocabulary.words.index("graph"), -1]
    assert prepare([["明", "月", "夜"]], {}, [frozenset({"明_月"})]) == [["明月", "夜"]]


def test_phrases_are_gensims():
    from gensim.models.phrases import Phrases

    random = np.random.default_rng(4)
    runs = [[f"w{word}" for word in random.zipf(1.4, size=30) % 40] for _ in range(200)]
    choices = Choices(no_below=1, plurals=False, phrases=1, phrase_count=3, phrase_npmi=0.1)
    mine = learn(lambda: iter([run] for run in runs), choices).phrases[0]
    theirs = Phrases(runs, min_count=3, threshold=0.1, scoring="npmi", delimiter="_").export_phrases()
    assert mine == sorted(pair for pair in theirs if len(set(pair.split("_"))) == 2)
    assert len(mine) > 10


def test_residual_idf_of_strewn_and_gathered_words():
    # 1,000 occurrences strewn over 1,000 documents are in 1000 (1 - 1/e) = 632 of them; gathered in 100, log2(6.32)
    assert residual_idf(632, 1000, 1000) == pytest.approx(0, abs=0.01)
    assert residual_idf(100, 1000, 1000) == pytest.approx(np.log2(6.32), abs=0.01)


@pytest.mark.parametrize(
    "value, date",
    [
        (2021, "2021"), ("2021-03-07T10:00:00Z", "2021-03-07"), ("2021/3/7", "2021-03-07"),
        ("2021年3月7日", "2021-03-07"), (1615075200, "2021-03-07"),
        ("1615075200000", "2021-03-07"), ("20210307", "2021-03-07"), ("2021-03", "2021-03"),
        ("2021-13-01", None), ("soon", None), (None, None), (True, None), (3.5, None),
    ],
)  # fmt: skip
def test_dates(value, date):
    assert as_date(value) == date


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, options, message",
    [
        ('{"title": "x", "year": 1}\n', (), "its columns are id, title, year"),
        ('{"abstract": ""}\n{"abstract": "  "}\n', (), "no text to read as 'abstract'"),
        ('{"abstract": {"en": "x"}}\n', (), "of type dict"),
        ('{"abstract": "one ship in the harbour"}\n', (), "1 document with words in it: topics are found by comparing"),
        ('{"abstract": "ship harbour"}\n{"abstract": "judge"}\n', (), "no word is left of 3 in 2 documents"),
        ('{"abstract": "the of and"}\n{"abstract": "is it"}\n', (), "0 document with words in it"),
        ('{"abstract": "ship ship"}\n' * 9, ("--no-above", 1, "--common-words", 0), "1 words are left, too few"),
        ('{"abstract": "ship"}\n' * 9, ("--date-column", "when"), "--date-column when: there is no such column"),
        ("", (), "there is no text to read"),
    ],
)
def test_bad_input_is_one_clear_error(tmp_path, content, options, message, capsys):
    (tmp_path / "in.jsonl").write_text(content)
    arguments = (tmp_path / "in.jsonl", "--text-column", "abstract", *QUICK, *options, "--out", tmp_path / "out")
    assert run_main(*arguments) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("error:") == 1


def test_models_that_are_none_or_damaged(tmp_path, fitted, capsys):
    import shutil

    source, out, _ = fitted
    assert run_main("apply", tmp_path, source, "--text-column", "abstract", "--out", tmp_path / "x") == 2
    assert "holds no topic model" in capsys.readouterr().err
    shutil.copytree(out / "model", tmp_path / "model")
    (tmp_path / "model/topics.npy").write_bytes((out / "model/topics.npy").read_bytes()[:200])
    assert run_main("apply", tmp_path / "model", source, "--text-column", "abstract", "--out", tmp_path / "x") == 2
    assert "damaged topic model" in capsys.readouterr().err


def test_chinese_pictures_without_a_font_are_svg_too(tmp_path, capsys, monkeypatch):
    from data_tools.topics import pictures

    monkeypatch.setattr(pictures, "_CJK_FONTS", ())
    monkeypatch.setattr(pictures.importlib.util, "find_spec", lambda name: None)
    drawn = pictures.Pictures(tmp_path, ["明月"])
    drawn.words([("0: 明月", [("明月", 0.5), ("春風", 0.2)])])
    assert capsys.readouterr().err.count("no font with Chinese") == 1
    assert "明月" in (tmp_path / "topics.svg").read_text(encoding="utf-8") and (tmp_path / "topic-00.png").is_file()


def test_help_is_quick_and_both_commands_are_there():
    for arguments, word in (([], "--num-topics"), (["apply"], "--split")):
        command = [sys.executable, "-X", "importtime", "-m", "data_tools.lda", *arguments, "--help"]
        ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
        assert word in ran.stdout
        assert not any(f" {name}\n" in ran.stderr for name in ("gensim", "tomotopy", "matplotlib", "scipy"))


# -- real text ---------------------------------------------------------------------------------------------------------

KNOWN = {  # words by which a reader knows a topic of NeurIPS 2022
    "reinforcement learning": {"policy", "agent", "reward", "rl", "reinforcement_learning"},
    "optimisation": {"gradient", "convergence", "optimization", "sgd", "stochastic"},
    "graphs": {"graph", "node", "gnn", "graph_neural_network"},
    "vision": {"image", "object", "3d", "visual", "scene"},
    "deep architectures": {"network", "layer", "neural_network", "architecture", "transformer"},
    "online learning": {"regret", "online", "bandit", "optimal"},
}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["gensim", "gibbs"])
def test_known_topics_of_neurips(tmp_path, engine):
    papers = SHARED / "neurips-2022" / "papers.csv"
    if not papers.is_file():
        pytest.skip(f"{papers} is not there")
    template = ("--text-template", "{title}\\n{keywords}\\n{abstract}")
    assert run_main(papers, *template, "--engine", engine, "--no-page", "--no-pictures", "--out", tmp_path / "o") == 0
    topics = json.loads((tmp_path / "o/topics.json").read_text())
    tops = [{entry["word"] for entry in topic["words"][:12]} for topic in topics]
    for name, words in KNOWN.items():
        assert max(len(words & top) for top in tops) >= 3, name
    coherence_found = json.loads((tmp_path / "o/summary.json").read_text())["coherence"]
    assert coherence_found["c_npmi"] > 0.05 and coherence_found["c_v"] > 0.55


@pytest.mark.slow
def test_tang_poems_have_their_themes(tmp_path):
    poems = SHARED / "tang-poems"
    if not poems.is_dir():
        pytest.skip(f"{poems} is not there")
    options = ("--text-column", "paragraphs", "--limit", 5000, "--num-topics", 8, "--passes", 30)
    assert run_main(poems, *options, "--no-page", "--no-pictures", "--out", tmp_path / "o") == 0
    assert json.loads((tmp_path / "o/summary.json").read_text())["tokenizer"] == "characters"
    topics = json.loads((tmp_path / "o/topics.json").read_text())
    tops = [{entry["word"] for entry in topic["words"][:12]} for topic in topics]
    for theme in ({"花", "春", "風"}, {"馬", "軍", "城"}, {"月", "夜", "秋"}, {"江", "舟", "水"}):
        assert any(theme <= top for top in tops), theme


def test_a_model_knows_its_own_labels(fitted):
    model = load_model(fitted[1])
    assert len(model.labels) == model.num_topics == 3
    share = model.distribution("The judge heard the witness, and the jury found a verdict.")
    assert "jury" in ENGLISH["court"] and share.max() > 0.5
    best = {model.vocabulary.words[n] for n in np.argsort(-model.fitted.topics[share.argmax()])[:10]}
    assert best == set(ENGLISH["court"].split())

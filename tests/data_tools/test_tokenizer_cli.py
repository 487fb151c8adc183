"""`python -m data_tools.tokenizer`, run as users run it."""

from __future__ import annotations

import base64
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from data_tools.tokenizer import build_tokenizer, import_tokenizer, inspect_tokenizer, split_text
from minillm.data.text_encoding import encode_texts
from minillm.data.tokenizer import load_tokenizer
from minillm.utils.errors import UserError

ROOT = Path(__file__).parents[2]
ENGLISH = "The cat sat on the mat, and the cat saw that the mat was flat.\n"
CHINESE = "今天天气很好，我们去公园。\n"


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "data_tools.tokenizer", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "english.txt").write_text(ENGLISH * 30)
    (folder / "chinese.md").write_text(CHINESE * 30)
    (folder / "talk.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "Zebra?"}, {"role": "assistant", "content": "Zebra."}]}\n' * 50
    )
    return folder


@pytest.fixture(scope="module")
def bpe(corpus) -> Path:
    done = command("train", "--corpus", corpus, "--out", corpus / "out" / "bpe", "--vocab-size", 320)
    assert done.returncode == 0, done.stderr
    assert "bpe tokenizer, 320 tokens" in done.stdout
    return corpus / "out" / "bpe"


def test_train_writes_a_folder_and_nothing_beside_it(corpus, bpe):
    assert {"tokenizer.json", "tokenizer_config.json"} <= {p.name for p in bpe.iterdir()}
    assert not list(bpe.parent.glob(".*"))
    assert len(load_tokenizer(bpe)) == 320


def test_train_reads_the_contents_of_conversations(corpus, bpe):
    tokenizer = load_tokenizer(bpe)
    assert len(encode_texts(tokenizer, ["Zebra"])[0]) < len("Zebra")


def test_train_char(corpus):
    out = corpus / "out" / "char"
    done = command("train", "--corpus", corpus / "chinese.md", "--out", out, "--kind", "char")
    assert done.returncode == 0, done.stderr
    assert len(load_tokenizer(out)) == 5 + 256 + len(set(CHINESE))


def test_train_refuses_to_write_over_a_tokenizer(corpus, bpe):
    before = (bpe / "tokenizer.json").read_bytes()
    with pytest.raises(UserError, match="is there already"):
        build_tokenizer([corpus], bpe, 400)
    assert (bpe / "tokenizer.json").read_bytes() == before


def test_train_that_fails_leaves_nothing(corpus, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    done = command("train", "--corpus", tmp_path / "bad.txt", "--out", tmp_path / "out")
    assert done.returncode == 2 and "bad.txt is not UTF-8" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["bad.txt"]
    with pytest.raises(UserError, match="--vocab-size"):
        build_tokenizer([corpus], tmp_path / "out", 100)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.txt"]


def test_a_small_corpus_gives_a_smaller_vocabulary_and_says_so(tmp_path, capsys):
    (tmp_path / "x.txt").write_text("ab ab ab")
    build_tokenizer([tmp_path / "x.txt"], tmp_path / "out", 5000)
    # pairs seen twice: "ab" and " ab"
    assert len(load_tokenizer(tmp_path / "out")) == 263
    assert "only 263 tokens" in capsys.readouterr().err


def test_inspect_prints_compression_and_splits(corpus, bpe):
    done = command("inspect", bpe, corpus / "english.txt", corpus / "chinese.md", corpus / "talk.jsonl")
    assert done.returncode == 0, done.stderr
    assert re.search(r"vocabulary +320 tokens\n", done.stdout)
    assert re.search(r"fingerprint +[0-9a-f]{16}\n", done.stdout)
    assert "<|endoftext|> 0, <|im_start|> 1, <|im_end|> 2, <think> 3, </think> 4" in done.stdout
    tokenizer = load_tokenizer(bpe)
    for text in (ENGLISH * 30, CHINESE * 30):
        num_bytes, num_tokens = len(text.encode()), len(encode_texts(tokenizer, [text])[0])
        assert f"{num_bytes:,} bytes, {len(text):,} characters, {num_tokens:,} tokens" in done.stdout
        assert f"{num_bytes / num_tokens:.3f} bytes a token" in done.stdout
    assert "|cat" in done.stdout or "| cat" in done.stdout


def test_splits_show_text_and_lone_bytes(bpe, corpus):
    tokenizer = load_tokenizer(bpe)
    shown = split_text(tokenizer, "the cat\t鱼")  # 鱼 is U+9C7C, UTF-8 e9 b1 bc, and not in the corpus
    assert shown.replace("|", "") == "the cat\\t<E9><B1><BC>"
    assert split_text(tokenizer, "今天天气").replace("|", "") == "今天天气"
    build_tokenizer([corpus / "english.txt"], corpus / "out" / "letters", 300, "char")
    assert split_text(load_tokenizer(corpus / "out" / "letters"), "cat鱼") == "c|a|t|<E9>|<B1>|<BC>"


def test_import_writes_a_folder_with_what_was_missing(tmp_path, corpus):
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"th": 256, b"the": 257}
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    (tmp_path / "x.tiktoken").write_text("".join(lines))
    source = f"tiktoken:cl100k_base:{tmp_path / 'x.tiktoken'}"
    done = command("import", source, "--out", tmp_path / "out", "--chat")
    assert done.returncode == 0, done.stderr
    assert "261 tokens" in done.stdout and "appended <|im_start|> 259, <|im_end|> 260" in done.stdout
    assert "documents end with <|endoftext|>" in done.stdout
    imported = load_tokenizer(tmp_path / "out")
    assert encode_texts(imported, ["the th"])[0] == [257, ord(" "), 256]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "x.tiktoken"]
    shown = [command("inspect", place, corpus / "english.txt") for place in (tmp_path / "out", source)]
    assert "special       <|endoftext|> 258, <|im_start|> 259, <|im_end|> 260" in shown[0].stdout
    assert "end of text   <|endoftext|> 258\nchat template yes" in shown[0].stdout
    assert "chat template no" in shown[1].stdout
    again = command("import", source, "--out", tmp_path / "out")
    assert again.returncode == 2 and "is there already" in again.stderr
    assert command("import", "tiktoken:gpt9", "--out", tmp_path / "none").returncode == 2


def test_import_refuses_tokens_that_spell_no_bytes(tmp_path):
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "words")
    with pytest.raises(UserError, match="byte-level or byte-fallback"):
        import_tokenizer(tmp_path / "words", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["words"]


def test_inspect_errors(bpe, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    for folder, file, said in (
        (tmp_path, tmp_path / "x.txt", "tokenizer.json is missing"),
        (bpe, tmp_path / "x.txt", "there is no file"),
        (bpe, tmp_path / "empty.txt", "no text to measure"),
    ):
        with pytest.raises(UserError, match=said):
            inspect_tokenizer(folder, [file])


def test_help_does_not_wait_for_heavy_imports():
    code = (
        "import sys; sys.argv = ['x', '--help']\nimport data_tools.tokenizer as t, data_tools.corpus as c\n"
        "for module in (t, c):\n  try: module.main()\n  except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'tokenizers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")

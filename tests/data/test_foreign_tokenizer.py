"""Tokenizers of others: the ids of their own libraries, and what this project appends to them."""

from __future__ import annotations

import base64
import json
import random
import sys
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

from minillm.data.chat_template import check_chat_tokenizer, encode_conversation
from minillm.data.foreign_tokenizer import (
    ENCODINGS,
    complete_tokenizer,
    from_ranks,
    in_onigurumas_syntax,
    open_tokenizer,
    read_ranks,
)
from minillm.data.text_encoding import encode_texts, fingerprint, token_byte_lengths, vocabulary_size
from minillm.data.tokenizer import load_tokenizer, save_tokenizer, train_bpe_tokenizer
from minillm.utils.errors import UserError

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
GPT2 = SHARED / "gpt2-vocab"
needs_gpt2 = pytest.mark.skipif(not GPT2.is_dir(), reason=f"{GPT2} with GPT-2's vocabulary is not there")

PIECES = (
    "a b 's 'S 'll 'LL ſ don't DON'T Abc aBC ABC 1 12 1234567 ٣ Ⅷ ½ é e\u0301 你好 的 한국어 🙂 👩‍👩‍👧 ß ﬆ İ ŉ ǅ ʰ ! "
    "?? // / | _ हि ก็ <|endoftext|> <|im_end|> \ufeff \u200d \x00 \x1f"
).split(" ") + [" ", "  ", "     ", "\n", "\r\n", "\n\n", "\t", "\u3000", "\x85", "\xa0"]


RANGES = ((0x80, 0x800), (0x800, 0xD7FF), (0x10000, 0x1FFFF))


def texts() -> list[str]:
    """English, Chinese, code, and 600 strings of what tokenizers disagree about."""
    draw = random.Random(0)
    mixed = ["".join(draw.choice(PIECES) for _ in range(draw.randint(1, 40))) for _ in range(400)]
    rare = ["".join(chr(draw.randrange(*draw.choice(RANGES))) for _ in range(20)) for _ in range(100)]
    repeated = ["".join(draw.choice("ab") for _ in range(draw.randint(1, 60))) for _ in range(100)]
    code = Path(__file__).read_text(encoding="utf-8")
    chinese = "今天天气很好，我们去公园走走吧。人工智能（AI）在2024年发展迅速！\n“是吗？”她问。" * 3
    english = "The year 1984 wasn't over; they'd said so.  Two spaces,\n\n\n    four.   \n" * 3
    return [english, chinese, code, "", "trailing \n ", *mixed, *rare, *repeated]


TEXTS = texts()


@pytest.fixture(scope="module")
def gpt2_ranks() -> dict[bytes, int]:
    load = pytest.importorskip("tiktoken.load")
    return load.data_gym_to_mergeable_bpe_ranks(str(GPT2 / "vocab.bpe"), str(GPT2 / "encoder.json"))


@pytest.fixture(scope="module")
def tiktokens_encodings(gpt2_ranks) -> dict[str, dict]:
    """tiktoken's own encodings, all with GPT-2's ranks in the place of the files it would download."""
    public = pytest.importorskip("tiktoken_ext.openai_public")
    patch = pytest.MonkeyPatch()
    patch.setattr(public, "load_tiktoken_bpe", lambda *_, **__: gpt2_ranks)
    patch.setattr(public, "data_gym_to_mergeable_bpe_ranks", lambda *_, **__: gpt2_ranks)
    encodings = {name: constructor() for name, constructor in public.ENCODING_CONSTRUCTORS.items()}
    patch.undo()
    return encodings


@pytest.fixture(scope="module")
def gpt2() -> PreTrainedTokenizerFast:
    return load_tokenizer(GPT2)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """GPT-2's first 2,000 tokens in the same two files."""
    folder = tmp_path_factory.mktemp("small-gpt2")
    tokens = json.loads((GPT2 / "encoder.json").read_text())
    kept = {token: index for token, index in tokens.items() if index < 2000}
    (folder / "encoder.json").write_text(json.dumps({**kept, "<|endoftext|>": 2000}))
    merges = (GPT2 / "vocab.bpe").read_text().splitlines(keepends=True)
    (folder / "vocab.bpe").write_text("".join(merges[: 1 + 2000 - 256]))
    return folder


# -- GPT-2's two files ---------------------------------------------------------------------------------------------


@needs_gpt2
def test_gpt2_folder_gives_tiktokens_and_transformers_ids(gpt2, tiktokens_encodings):
    import tiktoken

    ids = encode_texts(gpt2, TEXTS)
    assert ids == tiktoken.Encoding(**tiktokens_encodings["gpt2"]).encode_ordinary_batch(TEXTS)
    theirs = GPT2Tokenizer(vocab=str(GPT2 / "encoder.json"), merges=str(GPT2 / "vocab.bpe"))
    plain = [(text, mine) for text, mine in zip(TEXTS, ids) if "<|endoftext|>" not in text]
    assert [mine for _, mine in plain] == [theirs(text)["input_ids"] for text, _ in plain]
    assert len(plain) > 300
    assert (len(gpt2), gpt2.eos_token_id, gpt2.pad_token_id) == (50257, 50256, 50256)
    assert gpt2.decode(ids[0]) == TEXTS[0]


@needs_gpt2
def test_byte_lengths_are_the_texts_bytes(gpt2):
    lengths = token_byte_lengths(gpt2)
    for text, ids in zip(TEXTS, encode_texts(gpt2, TEXTS)):
        assert lengths[ids].sum() == len(text.encode())


@needs_gpt2
def test_the_files_under_transformers_names(small, tmp_path):
    (tmp_path / "vocab.json").write_bytes((small / "encoder.json").read_bytes())
    (tmp_path / "merges.txt").write_bytes((small / "vocab.bpe").read_bytes())
    gpt2 = open_tokenizer(small)
    assert fingerprint(open_tokenizer(tmp_path)) == fingerprint(gpt2)
    # a folder that names its class is transformers' to read
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    assert encode_texts(open_tokenizer(tmp_path), TEXTS[:3]) == encode_texts(gpt2, TEXTS[:3])


@needs_gpt2
def test_saved_like_ours_it_is_the_same_tokenizer(small, tmp_path):
    gpt2 = load_tokenizer(small)
    save_tokenizer(gpt2, tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert fingerprint(again) == fingerprint(gpt2)
    assert encode_texts(again, TEXTS[:50]) == encode_texts(gpt2, TEXTS[:50])


def test_damaged_gpt2_files(tmp_path):
    (tmp_path / "encoder.json").write_text('{"a": 0, "b": 1}')
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\na c\n")
    with pytest.raises(UserError, match=r"encoder\.json and vocab\.bpe do not load"):
        open_tokenizer(tmp_path)
    (tmp_path / "encoder.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        open_tokenizer(tmp_path)


SMALL = {bytes([byte]): byte for byte in range(256)} | {b"th": 256, b"he": 257, b"the": 258, b" the": 259, b"12": 260}


# -- tiktoken ------------------------------------------------------------------------------------------------------


@needs_gpt2
@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base"])
def test_words_and_merges_of_each_encoding(name, gpt2_ranks, tiktokens_encodings):
    """The pattern of the encoding with GPT-2's first ranks, against tiktoken with the same."""
    import tiktoken

    ranks = {token: rank for token, rank in gpt2_ranks.items() if rank < 6000}
    encoding = tiktokens_encodings[name]
    assert ENCODINGS[name].pattern == in_onigurumas_syntax(encoding["pat_str"])
    assert ENCODINGS[name].special_tokens == encoding["special_tokens"]
    special = {"<|endoftext|>": 6001, "<|endofprompt|>": 6010}
    ours = from_ranks(ranks, ENCODINGS[name].pattern, special)
    theirs = tiktoken.Encoding(name, pat_str=encoding["pat_str"], mergeable_ranks=ranks, special_tokens=special)
    assert encode_texts(ours, TEXTS) == theirs.encode_ordinary_batch(TEXTS)
    assert ours.convert_tokens_to_ids(["<|endoftext|>", "<|endofprompt|>"]) == [6001, 6010]
    # the ids between the special tokens are filled, so that nothing new falls in there
    assert len(ours) == vocabulary_size(ours) == 6011
    assert complete_tokenizer(ours, chat=True) == ["<|im_start|>", "<|im_end|>"]
    assert ours.convert_tokens_to_ids("<|im_start|>") == 6011


def test_a_special_token_between_the_ranks():
    """As p50k_edit has them: the end token, then runs of spaces, then other special tokens."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {b" " * (2 + n): 257 + n for n in range(24)}
    ours = from_ranks(ranks, ENCODINGS["gpt2"].pattern, {"<|endoftext|>": 256, "<|fim_prefix|>": 281})
    assert ours.eos_token_id == 256 and vocabulary_size(ours) == len(ours) == 282
    assert ours.convert_tokens_to_ids("<|fim_prefix|>") == 281
    assert encode_texts(ours, [" " * 9]) == [[257 + 7]]
    assert 256 not in encode_texts(ours, ["<|endoftext|>"])[0]


def test_an_encoding_by_name(monkeypatch):
    """The library's own object, with a small vocabulary in the place of the one it would download."""
    tiktoken = pytest.importorskip("tiktoken")
    pattern = r"\p{L}++|\p{N}{1,3}+|\s++$|\s|."
    small = tiktoken.Encoding("small", pat_str=pattern, mergeable_ranks=SMALL, special_tokens={"<|endoftext|>": 261})
    monkeypatch.setattr(tiktoken, "get_encoding", {"cl100k_base": small}.__getitem__)
    ours = load_tokenizer(Path("tiktoken:cl100k_base"))  # a Path, as a run's data.tokenizer becomes
    assert encode_texts(ours, TEXTS) == small.encode_ordinary_batch(TEXTS)
    assert (ours.eos_token_id, len(ours)) == (261, 262)


def test_encodings_that_cannot_be_had(monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")
    with pytest.raises(UserError, match=r"tiktoken:gpt5: .*no such encoding; valid: gpt2, .*cl100k_base"):
        open_tokenizer("tiktoken:gpt5")

    def no_network(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    said = r"cannot be downloaded \(ConnectionError\).*TIKTOKEN_CACHE_DIR.*:cl100k_base:FILE"
    with pytest.raises(UserError, match=said):
        open_tokenizer("tiktoken:cl100k_base")
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(UserError, match="pip install tiktoken"):
        open_tokenizer("tiktoken:gpt2")


def write_ranks(path: Path, ranks: dict[bytes, int]) -> Path:
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))
    return path


def test_a_tiktoken_file_from_disk(tmp_path, monkeypatch):
    """Without the library, and with the words of a named encoding."""
    path = write_ranks(tmp_path / "mine.tiktoken", SMALL)
    assert read_ranks(path) == SMALL
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    ours = load_tokenizer(f"tiktoken:cl100k_base:{path}")
    # " the" is no neighbours' merge, and yet a word that is a token; "12" within 123 merges
    assert encode_texts(ours, ["the the", "123", "好"]) == [[258, 259], [260, ord("3")], list("好".encode())]
    assert (ours.eos_token, ours.eos_token_id) == ("<|endoftext|>", 261)
    assert token_byte_lengths(ours)[[258, 259, 261]].tolist() == [3, 4, 0]
    with pytest.raises(UserError, match="tiktoken:NAME:FILE with one of gpt2, cl100k_base, o200k_base"):
        open_tokenizer(f"tiktoken:{path}")
    named = write_ranks(tmp_path / "o200k_base.tiktoken", SMALL)
    assert encode_texts(open_tokenizer(f"tiktoken:{named}"), ["the"]) == [[258]]


def test_damaged_tiktoken_files(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        open_tokenizer(f"tiktoken:gpt2:{tmp_path / 'none'}")
    path = write_ranks(tmp_path / "x.tiktoken", {b"a": 0})
    with pytest.raises(UserError, match="255 of the 256 bytes have no token"):
        open_tokenizer(f"tiktoken:gpt2:{path}")
    path.write_text("YQ== 0\nnot base64!\n")
    with pytest.raises(UserError, match=r"x\.tiktoken:2 is not `BASE64 RANK`"):
        open_tokenizer(f"tiktoken:gpt2:{path}")


@pytest.mark.parametrize(
    "pattern, expected",
    [
        (r"\p{N}{1,3}+| ?x++$", r"(?>\p{N}{1,3})| ?x++\z"),
        (r"[^\]$]{2}+|a{3,}+", r"(?>[^\]$]{2})|(?>a{3,})"),
        (r"\$\s+(?!\S)|\s*[\r\n]+", r"\$\s+(?!\S)|\s*[\r\n]+"),
    ],
)
def test_patterns_in_the_other_syntax(pattern, expected):
    assert in_onigurumas_syntax(pattern) == expected


# -- what is appended ----------------------------------------------------------------------------------------------


def byte_level(**options) -> PreTrainedTokenizerFast:
    """Someone's byte-level tokenizer without any special token."""
    state = json.loads(train_bpe_tokenizer(["some text of some kind"] * 9, 262).backend_tokenizer.to_str())
    state["added_tokens"] = []
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **options)


def test_what_is_missing_is_said_and_appended_and_saved(tmp_path):
    bare = byte_level()
    bare.save_pretrained(tmp_path / "bare")
    before = encode_texts(bare, TEXTS[:3])
    with pytest.raises(UserError, match=r"names no token with which documents end.*tokenizer import .*bare --out"):
        load_tokenizer(tmp_path / "bare")
    tokenizer = open_tokenizer(tmp_path / "bare")
    with pytest.raises(UserError, match="the tokenizer has no chat template.*--chat"):
        check_chat_tokenizer(byte_level(eos_token="<|end|>"))
    # the vocabulary has the names already: the ids stay, and they become special
    assert complete_tokenizer(tokenizer, chat=True) == []
    save_tokenizer(tokenizer, tmp_path / "whole")
    whole = load_tokenizer(tmp_path / "whole")
    assert (whole.eos_token_id, whole.pad_token_id) == (0, 0)
    assert encode_texts(whole, TEXTS[:3]) == before and fingerprint(whole) == fingerprint(tokenizer)
    check_chat_tokenizer(whole)


@needs_gpt2
def test_chat_on_a_foreign_tokenizer(small, tmp_path):
    tokenizer = open_tokenizer(small)
    with pytest.raises(UserError, match=r"no <\|im_start\|> token, no <\|im_end\|> token, no chat template.*--chat"):
        check_chat_tokenizer(tokenizer)
    before = encode_texts(tokenizer, TEXTS[:20])
    assert complete_tokenizer(tokenizer, chat=True) == ["<|im_start|>", "<|im_end|>"]
    save_tokenizer(tokenizer, tmp_path / "chat")
    for loaded in (load_tokenizer(tmp_path / "chat"), AutoTokenizer.from_pretrained(tmp_path / "chat")):
        assert encode_texts(loaded, TEXTS[:20]) == before
        assert fingerprint(loaded) == fingerprint(tokenizer)
        messages = [{"role": "user", "content": "Hi, 你好"}, {"role": "assistant", "content": "Yes. def f(): pass"}]
        ids, mask = encode_conversation(loaded, messages)
        assert ids == loaded.apply_chat_template(messages, return_dict=False)
        assert [ids[0], ids.count(2001), ids.count(2002)] == [2001, 2, 2]
        said = [index for index, learned in zip(ids, mask) if learned]
        assert loaded.decode(said, skip_special_tokens=True) == "Yes. def f(): pass"


def test_an_end_token_that_is_there_stays():
    tokenizer = byte_level(eos_token=AddedToken("</s>", special=True))
    size = vocabulary_size(tokenizer)
    assert complete_tokenizer(tokenizer, chat=False) == []
    assert (tokenizer.eos_token, tokenizer.pad_token, vocabulary_size(tokenizer)) == ("</s>", "</s>", size)


def test_a_vocabulary_with_gaps_is_refused_before_anything_is_overwritten():
    backend = Tokenizer(models.BPE({"a": 0, "b": 5}, []))
    with pytest.raises(UserError, match=r"leaves ids out.*<\|endoftext\|> 2"):
        complete_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend), chat=False)


def test_folders_that_cannot_be_converted(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"no protobuf")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    said = r"no tokenizer\.json, and its .*tokenizer\.model cannot be converted.*sentencepiece"
    with pytest.raises(UserError, match=said):
        open_tokenizer(tmp_path)

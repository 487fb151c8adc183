"""Streaming: whole characters, the same text as `generate` and `decode` give, stops, seeds, an end in every case."""

import random
import threading

import pytest
import torch
from tokenizers import Tokenizer, decoders, models

from minillm.data.tokenizer import build_char_tokenizer
from minillm.inference.generate import IncrementalDecoder, ReplyStream, Sampling
from minillm.utils.errors import UserError
from tests.support.tiny_run import TEXTS, tiny_model, tiny_tokenizer

CHINESE = "深度学习：模型一个字一个字地说话。😀 ok"
GREEDY = Sampling(temperature=0, max_new_tokens=40)


def pieces_of(decoder, ids):
    return [*(decoder.push(token) for token in ids), decoder.flush()]


def plain_ids(text):
    return tiny_tokenizer()(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("make", [tiny_tokenizer, lambda: build_char_tokenizer(["only ascii"])])
def test_characters_split_over_tokens_come_whole(make):
    tokenizer = make()
    ids = tokenizer(CHINESE, add_special_tokens=False).input_ids
    assert len(ids) > len(CHINESE)
    pieces = pieces_of(IncrementalDecoder(tokenizer), ids)
    assert "".join(pieces) == CHINESE
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(map(bool, pieces)) > len(CHINESE) // 2  # as they come, not all at the end


def test_random_bytes_decode_as_the_tokenizer_decodes_them():
    tokenizer = tiny_tokenizer()
    generator = random.Random(0)
    for length in (1, 2, 3, 10, 300):
        for _ in range(40):
            ids = [generator.randrange(len(tokenizer)) for _ in range(length)]
            expected = tokenizer.decode(ids, skip_special_tokens=False)
            assert "".join(pieces_of(IncrementalDecoder(tokenizer), ids)) == expected


def test_endless_broken_bytes_stay_cheap_and_exact():
    tokenizer = tiny_tokenizer()
    byte = {value: tokenizer.backend_tokenizer.encode(chr(value)).ids for value in (0xE9,)}[0xE9]  # two bytes: C3 A9
    continuation, lead = byte[1], byte[0]
    sizes = []

    class Spy:
        """The tokenizer itself, with a count of how much it is asked to decode."""

        def decode(self, ids, **options):
            sizes.append(len(ids))
            return tokenizer.decode(ids, **options)

    ids = [continuation] * 100 + [lead] * 100 + [*byte] * 3 + [lead]
    assert "".join(pieces_of(IncrementalDecoder(Spy()), ids)) == tokenizer.decode(ids)
    assert max(sizes) <= 25


def test_a_sentencepiece_like_decoder_keeps_its_spaces():
    vocabulary = {"▁Hello": 0, "▁world": 1, "!": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    ids = [0, 1, 2, *(3 + byte for byte in "你好".encode()), 1, 2]
    pieces = pieces_of(IncrementalDecoder(backend), ids)
    assert pieces[:3] == ["Hello", " world", "!"]
    assert "".join(pieces) == "Hello world!你好 world!"
    assert not any("\ufffd" in piece for piece in pieces)


def test_stream_equals_generate():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    prompt = plain_ids("What does len do?")
    output = model.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)
    assert output.shape[1] == len(prompt) + 40
    stream = ReplyStream(model, tokenizer, prompt, GREEDY)
    assert "".join(stream) == tokenizer.decode(output[0, len(prompt) :])
    assert (stream.finish_reason, stream.num_new_tokens) == ("length", 40)


@pytest.mark.parametrize("token", ["<|im_end|>", "<|endoftext|>"])
def test_end_of_turn_ends_the_reply_and_is_not_shown(token):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    prompt = plain_ids("What does len do?")
    with torch.no_grad():
        best = int(model(torch.tensor([prompt])).logits[0, -1].argmax())
        weight = model.get_output_embeddings().weight
        weight[tokenizer.convert_tokens_to_ids(token)] = 1.5 * weight[best]  # its logit was positive, now it wins
    stream = ReplyStream(model, tokenizer, prompt, GREEDY)
    assert list(stream) == []
    assert (stream.finish_reason, stream.num_new_tokens) == ("stop", 0)


def test_a_models_own_end_tokens_count():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    prompt = plain_ids("What does len do?")
    output = model.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False)[0, len(prompt) :].tolist()
    model.generation_config.eos_token_id = [output[4]]
    stream = ReplyStream(model, tokenizer, prompt, GREEDY)
    kept = output[: output.index(output[4])]
    assert "".join(stream) == tokenizer.decode(kept)
    assert (stream.finish_reason, stream.num_new_tokens) == ("stop", len(kept))


def test_the_context_bounds_the_reply():
    model, tokenizer = tiny_model(context=32), tiny_tokenizer()
    stream = ReplyStream(model, tokenizer, plain_ids("len")[:1] * 22, GREEDY)
    list(stream)
    assert (stream.finish_reason, stream.num_new_tokens) == ("context", 10)
    with pytest.raises(UserError, match="32 tokens leaves no room in a context of 32"):
        ReplyStream(model, tokenizer, [5] * 32, GREEDY)
    with pytest.raises(UserError, match="empty"):
        ReplyStream(model, tokenizer, [], GREEDY)


def test_seed_repeats_the_reply_and_leaves_the_random_state_alone():
    model, tokenizer = tiny_model(), tiny_tokenizer()

    def reply(seed):
        return "".join(ReplyStream(model, tokenizer, plain_ids("len"), Sampling(1.0, 1.0, 0, 1.0, 30, seed)))

    torch.manual_seed(7)
    untouched = torch.rand(1)
    torch.manual_seed(7)
    assert reply(1) == reply(1) != reply(2)
    assert torch.equal(torch.rand(1), untouched)


def test_settings_win_over_the_folders_generation_config():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    greedy = "".join(ReplyStream(model, tokenizer, plain_ids("len"), GREEDY))
    model.generation_config.update(do_sample=True, top_k=1, temperature=0.01, max_new_tokens=3)
    warm = Sampling(2.0, 1.0, 0, 1.0, 40, seed=0)
    assert "".join(ReplyStream(model, tokenizer, plain_ids("len"), warm)) != greedy
    model.generation_config.update(top_k=50, temperature=5.0, repetition_penalty=3.0)
    assert "".join(ReplyStream(model, tokenizer, plain_ids("len"), GREEDY)) == greedy


def test_leaving_early_stops_the_generation():
    model, tokenizer = tiny_model(context=100_000), tiny_tokenizer()
    stream = ReplyStream(model, tokenizer, plain_ids("len"), Sampling(temperature=0, max_new_tokens=90_000))
    for _ in stream:
        break
    assert stream.finish_reason == "cancelled"
    assert not any(thread.name == "minillm-reply" for thread in threading.enumerate())


def test_an_error_in_the_model_reaches_the_caller():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with pytest.raises(IndexError):
        list(ReplyStream(model, tokenizer, [len(tokenizer) + 5], GREEDY))


def test_every_wrong_setting_is_named():
    with pytest.raises(UserError) as error:
        Sampling(-1, 0, -2, 0, 0, -5)
    for name in ("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens", "seed"):
        assert f"{name} is" in str(error.value)


def test_the_texts_of_the_tiny_tokenizer_round_trip():
    for text in TEXTS:
        assert "".join(pieces_of(IncrementalDecoder(tiny_tokenizer()), plain_ids(text))) == text

"""From a run configuration to tokenizer, streams and model: what the loop needs before an engine exists."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from minillm.data.loader import BatchLoader
from minillm.data.sequence_stream import build_stream
from minillm.data.sources import TokenSource, open_sources
from minillm.data.tokenizer import fingerprint, load_tokenizer, vocabulary_size
from minillm.interop.convert import load_as_minillm, load_config_as_minillm
from minillm.models import MiniLLMConfig, MiniLLMForCausalLM
from minillm.run_folder import newest_run_checkpoint, resolve_model_folder
from minillm.settings.presets import preset
from minillm.settings.run import RunConfig, Sources, model_overrides
from minillm.training.checkpoint import newest_to_resume
from minillm.utils import distributed
from minillm.utils.errors import UserError
from minillm.utils.logging import say

ANY_NUMBER = 2**62  # the loop adds up all ranks' unreadable rows and stops them together


@dataclass
class Data:
    """What is trained on and validated with, and the model folder a run starts from."""

    tokenizer: object
    train: list[TokenSource]
    validation: list[TokenSource]
    base: Path | None  # resolved `model.init_from`: weights at the first start, architecture and tokenizer always

    @property
    def fingerprint(self) -> dict[str, object]:
        """What has to be the same for a resumed run to see the same batches."""
        digest = hashlib.sha256(json.dumps([[shard.sha256 for shard in s.shards] for s in self.train]).encode())
        return {
            "tokenizer": fingerprint(self.tokenizer),
            "train": [[s.name, s.weight, s.num_tokens, s.num_documents] for s in self.train],
            "sha256": digest.hexdigest()[:16],
        }


def open_data(run: RunConfig) -> Data:
    """Open (compiling or downloading first, where needed) the token shards of a run. No process group is needed.

    Raises:
        UserError: missing or damaged shards, a tokenizer that does not match, nothing in them.
    """
    base = resolve_init_from(run)
    tokenizer_path = Path(run.data.tokenizer or base)
    tokenizer = load_tokenizer(tokenizer_path)
    if base is not None and fingerprint(tokenizer) != fingerprint(load_tokenizer(base)):
        raise UserError(
            f"data.tokenizer = {run.data.tokenizer}: not the tokenizer of the weights in {base}; leave data.tokenizer "
            f"out to use theirs"
        )
    options = {
        "tokenizer_path": tokenizer_path,
        "cache_dir": Path(run.data.cache_dir or "data/cache"),
        "max_bad_samples": run.data.max_bad_samples,
    }
    train = open_sources(_spec(run.data.train), **options)
    validation = open_sources(_spec(run.data.validation), **options) if run.data.validation else []
    return Data(tokenizer, train, validation, base)


def resolve_init_from(run: RunConfig) -> Path | None:
    """The folder that `model.init_from` means: `newest` is the newest pretraining run's newest checkpoint.

    A run that has a checkpoint of its own takes architecture and tokenizer from that, since the folder it began with
    may have been pruned by then, or trained further.
    """
    if run.model.init_from is None:
        return None
    own = newest_to_resume(run.run_dir)
    if own is not None:
        return own
    if run.model.init_from == "newest":
        return newest_run_checkpoint(Path(run.run_root), stage="pretrain")
    return resolve_model_folder(run.model.init_from, run.run_root)


def _spec(sources: Sources) -> str | list[dict[str, object]]:
    return sources if isinstance(sources, str) else [s.model_dump(exclude_none=True) for s in sources]


def build_loader(run: RunConfig, sources: list[TokenSource], *, num_epochs: float | None) -> BatchLoader:
    """The training loader: endless, or masked after `num_epochs`."""
    stream = build_stream(
        sources, seq_len=run.data.seq_len, packing=run.packing, stride=run.data.stride, seed=run.seed
    )
    last = None if num_epochs is None else max(1, round(num_epochs * stream.num_sequences))
    if stream.num_truncated:
        say(f"{stream.num_truncated:,} documents are longer than data.seq_len = {run.data.seq_len} and are cut to it")
    return BatchLoader(
        stream,
        train_batch_size=run.train.train_batch_size,
        micro_batch_size=run.train.train_micro_batch_size_per_gpu,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        max_sequences=last,
        max_bad_rows=ANY_NUMBER,
    )


def build_validation_loaders(run: RunConfig, sources: list[TokenSource]) -> dict[str, BatchLoader]:
    """One loader a source, over its first validation.max_sequences in order.

    Windows never overlap here, whatever data.stride: each target counts once in the validation loss.
    """
    loaders = {}
    micro = run.train.train_micro_batch_size_per_gpu
    for source in sources:
        stream = build_stream([source], seq_len=run.data.seq_len, packing=run.packing, seed=run.seed, shuffle=False)
        loaders[source.name] = BatchLoader(
            stream,
            train_batch_size=micro * distributed.world_size(),
            micro_batch_size=micro,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            max_sequences=min(stream.num_sequences, run.validation.max_sequences or stream.num_sequences),
            max_bad_rows=ANY_NUMBER,
        )
    return loaders


def load_initial_weights(model: MiniLLMForCausalLM, folder: Path) -> None:
    """Weights of a checkpoint, an exported folder, or a Hugging Face folder of a family interop knows."""
    model.load_state_dict(load_as_minillm(folder).state_dict())


def copy_parameters(model: MiniLLMForCausalLM) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def resolve_model_config(run: RunConfig, data: Data) -> MiniLLMConfig:
    """The preset with its overrides, or the config of the base's folder, fitted to the tokenizer and checked.

    Raises:
        UserError: shapes that cannot work, or a vocabulary smaller than the tokenizer's.
    """
    tokenizer = data.tokenizer
    if data.base is not None:
        config = _with_context(load_config_as_minillm(data.base), model_overrides(run))
    else:
        fields = preset(run.model.preset, **model_overrides(run))
        special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
                   "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
        try:
            config = MiniLLMConfig(**{**fields, **special})
        except ValueError as error:
            raise UserError(f"model: {error}") from error
    if vocabulary_size(tokenizer) > config.vocab_size:
        raise UserError(
            f"model.vocab_size = {config.vocab_size}: the tokenizer {run.data.tokenizer} has "
            f"{vocabulary_size(tokenizer)} tokens; set model.vocab_size to at least that, or train a smaller tokenizer"
        )
    if run.data.seq_len > config.max_position_embeddings:
        raise UserError(
            f"data.seq_len = {run.data.seq_len}: the model has {config.max_position_embeddings} positions; "
            f"lower data.seq_len or raise model.max_position_embeddings"
        )
    return config


def _with_context(config: MiniLLMConfig, overrides: dict[str, object]) -> MiniLLMConfig:
    """The base's config with another context length or rotation (what model.init_from leaves to change)."""
    if not overrides:
        return config
    try:
        return MiniLLMConfig(**{**config.to_dict(), **overrides})
    except ValueError as error:
        raise UserError(f"model: {error}") from error


def build_model(run: RunConfig, config: MiniLLMConfig) -> MiniLLMForCausalLM:
    """A freshly initialised fp32 model, the same on every rank; its weights come later where there are any."""
    torch.manual_seed(run.seed)
    model = MiniLLMForCausalLM(config)
    total = sum(p.numel() for p in model.parameters())
    name = run.model.preset if run.model.init_from is None else f"that of {run.model.init_from}"
    say(f"model: {name}, {total:,} parameters, sequence length {run.data.seq_len}")
    return model

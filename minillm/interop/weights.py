"""Named weights from one model to another: rules between two sets of names, and strict reading and filling.

Contract: nothing is dropped and nothing is left at its random initialisation. A missing, extra or misshapen weight, a
damaged file, or a tied output matrix that differs from its embedding is a UserError that names it. Every tensor keeps
its dtype. Only safetensors are read, only from this machine, and no code from a folder is run.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from minillm.utils.errors import UserError

Weights = dict[str, torch.Tensor]
Change = Callable[..., Sequence[torch.Tensor]]  # (the native config, tensors of one side) -> tensors of the other
HEAD = "lm_head.weight"
_EXPERT = re.compile(r"(.+\.experts\.)(\d+)(\..+)")
SHOWN_PROBLEMS = 6


def unchanged(config: PretrainedConfig, *tensors: torch.Tensor) -> Sequence[torch.Tensor]:
    return tensors


@dataclass(frozen=True)
class Rule:
    """Which weights of ours are which of the native class's.

    Attributes:
        ours, theirs: patterns of names, one tensor each; `*` stands for one part between dots, `**` for the rest, and
            every pattern of a rule has the same stars.
        to_theirs, to_ours: what happens to the tensors on the way.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    to_theirs: Change = unchanged
    to_ours: Change = unchanged

    @classmethod
    def rename(cls, ours: str, theirs: str, to_theirs: Change = unchanged, to_ours: Change = unchanged) -> Rule:
        """A rule of one weight, or of a whole module where the patterns end in `**`."""
        return cls((ours,), (theirs,), to_theirs, to_ours)


def to_theirs(weights: Weights, rules: Sequence[Rule], config: PretrainedConfig) -> Weights:
    """Our weights under the native class's names; a name without a rule stays as it is."""
    return _convert(weights, [(rule.ours, rule.theirs, rule.to_theirs) for rule in rules], config)


def to_ours(weights: Weights, rules: Sequence[Rule], config: PretrainedConfig) -> Weights:
    """The native class's weights under our names; a name without a rule stays as it is."""
    return _convert(weights, [(rule.theirs, rule.ours, rule.to_ours) for rule in rules], config)


def _convert(
    weights: Weights, rules: list[tuple[tuple[str, ...], tuple[str, ...], Change]], config: PretrainedConfig
) -> Weights:
    patterns = [(i, j, _pattern(text)) for i, (sources, _, _) in enumerate(rules) for j, text in enumerate(sources)]
    converted: Weights = {}
    groups: dict[tuple[int, tuple[str, ...]], dict[int, str]] = {}  # (rule, what its stars are) -> source -> name
    for name in weights:
        found = next(((i, j, match) for i, j, pattern in patterns if (match := pattern.fullmatch(name))), None)
        if found is None:
            converted[name] = weights[name]
        else:
            index, source, match = found
            groups.setdefault((index, match.groups()), {})[source] = name
    for (index, stars), names in groups.items():
        sources, targets, change = rules[index]
        if len(names) < len(sources):  # the check that follows names what is missing
            converted |= {name: weights[name] for name in names.values()}
            continue
        try:
            changed = change(config, *(weights[names[i]] for i in range(len(sources))))
        except ValueError as error:
            raise UserError(f"{', '.join(names.values())} cannot be converted: {error}") from error
        converted |= {_fill_stars(target, stars): tensor for target, tensor in zip(targets, changed, strict=True)}
    return converted


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(re.escape(text).replace(r"\*\*", "(.+)").replace(r"\*", "([^.]+)"))


def _fill_stars(pattern: str, stars: tuple[str, ...]) -> str:
    parts = iter(stars)
    return re.sub(r"\*+", lambda _: next(parts), pattern)


def fill(model: PreTrainedModel, weights: Weights, place: str) -> PreTrainedModel:
    """`model` with a copy of exactly `weights`, in eval mode; a tied output matrix may be absent, as in saved folders.

    Raises:
        UserError: `place` and the weights that do not fit.
    """
    slots = model.state_dict(keep_vars=True)
    table = next(name for name, slot in slots.items() if slot is model.get_input_embeddings().weight)
    tied = slots[HEAD] is slots[table]
    if tied and table in weights:
        weights = {HEAD: weights[table], **weights}
    problems = [f"missing {name}" for name in sorted(slots.keys() - weights.keys())]
    problems += [f"extra {name}" for name in sorted(weights.keys() - slots.keys())]
    problems += [
        f"{name} has shape {list(weights[name].shape)}, the config says {list(slot.shape)}"
        for name, slot in slots.items()
        if name in weights and weights[name].shape != slot.shape
    ]
    if tied and not problems and not torch.equal(weights[HEAD], weights[table]):
        problems.append(f"{HEAD} differs from {table} though tie_word_embeddings is true")
    _refuse(place, problems)
    for name, slot in slots.items():
        # Each tensor keeps its own dtype: router biases stay fp32 in a bf16 model, and rotary buffers are not rounded.
        slot.data = weights[name].detach().clone(memory_format=torch.contiguous_format)
    return model.to(weights[table].device).eval()


def load_strictly(
    model_class: type[PreTrainedModel], folder: Path, passed_over: tuple[str, ...] = ()
) -> PreTrainedModel:
    """A model from a folder through its class's own loading, which also knows how published checkpoints are laid out.

    Args:
        passed_over: how the names of weights begin that may be there though the class has no place for them.

    Raises:
        UserError: no or damaged safetensors, or weights that do not fit the config.
    """
    stored = stored_tensors(folder)
    _refuse(str(folder), _expert_problems(stored))
    try:
        with _quiet():
            model, info = model_class.from_pretrained(
                folder,
                dtype="auto",
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # so that each is named below
                output_loading_info=True,
            )
    except (ValueError, OSError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be loaded as {model_class.__name__}: {error}") from error
    problems = [f"missing {name}" for name in sorted(info["missing_keys"])]
    problems += [f"extra {name}" for name in sorted(info["unexpected_keys"]) if not name.startswith(passed_over)]
    problems += [
        f"{name} has shape {list(there)}, the config says {list(wanted)}"
        for name, there, wanted in sorted(info["mismatched_keys"])
    ]
    problems += [str(message) for message in info["error_msgs"]]
    if model.config.tie_word_embeddings and not problems:
        problems += _tied_problems(model, stored)
    _refuse(str(folder), problems)
    return model


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: where, and its shape."""

    path: Path
    shape: tuple[int, ...]


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor in a folder's safetensors, by name; UserError where a file is damaged."""
    found: dict[str, Stored] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                found |= {name: Stored(path, tuple(file.get_slice(name).get_shape())) for name in file.keys()}
        except SafetensorError as error:
            raise UserError(f"a weight file in {folder} is damaged ({error}): copy or export it again") from error
    return found


def _expert_problems(stored: dict[str, Stored]) -> list[str]:
    """Published folders hold each expert's matrices apart; transformers fuses them, and does not say which is wrong."""
    layers: dict[str, dict[str, dict[int, Stored]]] = {}  # "...experts." -> ".w1.weight" -> expert -> tensor
    for name, tensor in stored.items():
        if match := _EXPERT.fullmatch(name):
            layers.setdefault(match[1], {}).setdefault(match[3], {})[int(match[2])] = tensor
    problems = []
    for prefix, matrices in layers.items():
        count = 1 + max(max(experts) for experts in matrices.values())
        for suffix, experts in matrices.items():
            usual = Counter(tensor.shape for tensor in experts.values()).most_common(1)[0][0]
            problems += [f"missing {prefix}{i}{suffix}" for i in range(count) if i not in experts]
            problems += [
                f"{prefix}{i}{suffix} has shape {list(tensor.shape)}, the other experts' have {list(usual)}"
                for i, tensor in experts.items()
                if tensor.shape != usual
            ]
    return problems


def _tied_problems(model: PreTrainedModel, stored: dict[str, Stored]) -> list[str]:
    """A folder may hold a tied matrix twice; then both must be the same."""
    table = next(name for name, value in model.named_parameters() if value is model.get_input_embeddings().weight)
    twice = [name for name in stored if table.endswith(name)]  # GPT-2's folders may leave out the first part
    if HEAD not in stored or not twice:
        return []
    with (
        safe_open(stored[HEAD].path, framework="pt") as file,
        safe_open(stored[twice[0]].path, framework="pt") as other,
    ):
        same = torch.equal(file.get_tensor(HEAD), other.get_tensor(twice[0]))
    return [] if same else [f"{HEAD} differs from {twice[0]} though tie_word_embeddings is true"]


def _refuse(place: str, problems: list[str]) -> None:
    if problems:
        more = len(problems) - SHOWN_PROBLEMS
        shown = "; ".join(problems[:SHOWN_PROBLEMS]) + (f"; and {more} more" if more > 0 else "")
        raise UserError(f"{place}: the weights do not fit the config: {shown}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own report of what does not fit: it is raised here."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)

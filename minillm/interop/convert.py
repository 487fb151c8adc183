"""Models and configs to and from transformers' own classes, in memory and from folders.

Contract: strict both ways (see family.py and weights.py). What comes back computes the same logits in the same dtype.
"""

from __future__ import annotations

import copy
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig, PreTrainedModel

from minillm.compat.transformers_api import set_source_folder, source_folder
from minillm.interop.families import FAMILIES, require_known_family, require_native_family
from minillm.interop.family import MULTI_TOKEN, Family
from minillm.interop.weights import fill, load_strictly, stored_tensors, to_ours, to_theirs
from minillm.models import MiniLLMConfig, MiniLLMForCausalLM
from minillm.utils.errors import UserError
from minillm.utils.files import read_json
from minillm.utils.logging import say


def from_transformers(source: PreTrainedModel | str | Path) -> MiniLLMForCausalLM:
    """Our model from a native one, or from a folder `save_pretrained` of one wrote or its authors published.

    Weights are copied, each in its own dtype; the model is in eval mode as after `from_pretrained`. Multi-token
    modules in a folder, which transformers' classes do not hold, are left out, and a line says so.

    Raises:
        UserError: another family, an option this decoder does not have, or weights that do not fit the config.
    """
    if isinstance(source, (str, Path)):
        folder = Path(source)
        family = require_known_family(_model_type(folder), folder / "config.json")
        config = _read_config(family, folder)
        family.config_to_ours(config)  # refuses before gigabytes are read
        passed_over = family.multi_token(config)
        if extra := sum(name.startswith(passed_over) for name in stored_tensors(folder)):
            say(f"left out: {extra} weights of multi-token prediction in {folder}, which {family.model_name} lacks")
        native, place = load_strictly(family.model_class, folder, passed_over), str(folder)
    else:
        native, place = source, type(source).__name__
        family = require_known_family(getattr(getattr(native, "config", None), "model_type", None), place)
        if not isinstance(native, family.model_class):
            raise UserError(f"{place} cannot be converted: pass the whole {family.model_name}")
    config = family.config_to_ours(native.config)
    weights = to_ours(native.state_dict(), family.rules(native.config), native.config)
    model = fill(MiniLLMForCausalLM(config), weights, place)
    model.generation_config = copy.deepcopy(native.generation_config)
    set_source_folder(model.config, source_folder(native.config))
    return model


def to_transformers(model: MiniLLMForCausalLM) -> PreTrainedModel:
    """The native model with a copy of our model's weights, in eval mode.

    Multi-token modules are left out, and a line says so: transformers' classes have no place for them.

    Raises:
        UserError: no native class computes the same; the message names the nearest one and what it lacks.
    """
    family = require_native_family(model.config)
    config = family.config_to_theirs(model.config)
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith(MULTI_TOKEN)}
    if model.config.num_nextn_predict_layers:
        say(
            f"left out: the {model.config.num_nextn_predict_layers} module(s) of multi-token prediction, for which "
            f"{family.model_name} has no place; next-token logits do not change"
        )
    weights = to_theirs(weights, family.rules(config), config)
    converted = fill(family.model_class(config), weights, type(model).__name__)
    converted.generation_config = copy.deepcopy(model.generation_config)
    return converted


def load_config_as_minillm(folder: Path) -> MiniLLMConfig:
    """The architecture in a model folder, ours or a native one."""
    model_type = _model_type(folder)
    if model_type == MiniLLMConfig.model_type:
        return MiniLLMConfig.from_pretrained(folder)
    family = _trainable_family(model_type, folder)
    return family.config_to_ours(_read_config(family, folder))


def load_as_minillm(folder: Path) -> MiniLLMForCausalLM:
    """The model in a model folder, ours or a native one, in fp32."""
    model_type = _model_type(folder)
    if model_type == MiniLLMConfig.model_type:
        return load_strictly(MiniLLMForCausalLM, folder).float()
    _trainable_family(model_type, folder)
    return from_transformers(folder).float()


def _trainable_family(model_type: object, folder: Path) -> Family:
    if model_type not in FAMILIES:
        known = ", ".join(("minillm", *FAMILIES))
        raise UserError(f"{folder} holds a {model_type} model; training can start from: {known}")
    return FAMILIES[model_type]


def _model_type(folder: Path) -> object:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{path} is missing: name a folder that save_pretrained of a model wrote")
    values = read_json(path)
    return values.get("model_type") if isinstance(values, dict) else None


def _read_config(family: Family, folder: Path) -> PretrainedConfig:
    try:
        return family.config_class.from_pretrained(folder, local_files_only=True)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise UserError(f"{folder / 'config.json'} is no {family.config_name}: {error}") from error

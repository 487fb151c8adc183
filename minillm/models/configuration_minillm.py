"""The architecture as data: which mechanism each layer has, and its shapes.

Contract: the fields, their meaning and the rules between them are minillm.settings.architecture's. `rope_theta` and
`rope_scaling` stand flat, as in the config files of published models, and not inside transformers 5's
`rope_parameters`, so that a run can set them as `model.rope_theta`; interop converts. `layer_types` and
`mlp_layer_types` are full lists once the config is built. A shape that cannot work raises ValueError with the field,
its value and the rule.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from transformers import PretrainedConfig

from minillm.settings.architecture import DEFAULTS, Architecture, problems_of


def _plain(annotation: Any) -> Any:
    """The type alone, without the rule or the names that `problems_of` checks."""
    if get_origin(annotation) is Literal:
        return str
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


class MiniLLMConfig(PretrainedConfig):
    """Configuration of MiniLLMForCausalLM: every field of minillm.settings.architecture.Architecture, in that order."""

    __annotations__ = {name: _plain(annotation) for name, annotation in get_type_hints(Architecture).items()}
    locals().update(DEFAULTS)
    model_type = "minillm"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # by the older and the newer transformers

    def __post_init__(self, **kwargs):
        architecture = self.architecture
        if problems := problems_of(architecture):
            raise ValueError("; ".join(problems))
        self.layer_types, self.mlp_layer_types = architecture.layer_types, architecture.mlp_layer_types
        super().__post_init__(**kwargs)

    @property
    def architecture(self) -> Architecture:
        """These fields without what transformers adds to a config."""
        return Architecture(**{name: getattr(self, name) for name in DEFAULTS})

    def layer_type_of(self, layer_idx: int) -> str:
        """The mixer of a layer. A layer past the last (a multi-token module's) is like the last."""
        return self.layer_types[min(layer_idx, self.num_hidden_layers - 1)]

    def is_sparse(self, layer_idx: int) -> bool:
        """Whether a layer has experts; past the last as above."""
        return self.mlp_layer_types[min(layer_idx, self.num_hidden_layers - 1)] == "sparse"

"""The decoder: embedding, layers of residual + norm + mixer and residual + norm + MLP, a last norm, an output product.

Contract: which mixer, MLP, norm and positions a layer has is the config's choice (build_mixer, build_mlp, build_norm,
build_positions); nothing here asks which preset it is. A PreTrainedModel: save_pretrained, from_pretrained, generate
with transformers' Cache, activation checkpointing by gradient_checkpointing_enable(). Balancing terms of the experts
and the loss of multi-token prediction leave as return values, in training only.

Shapes: B batch, T time, S time with cached tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoTokenizer, Cache, DynamicCache, GenerationMixin, PreTrainedModel

from minillm.compat.transformers_api import (
    CACHE_NAME,
    CACHE_NAMES,
    BaseModelOutputWithPast,
    BothCacheNames,
    CausalLMOutputWithPast,
    GradientCheckpointingLayer,
    init,
    source_folder,
    takes_both_cache_names,
    warn_once,
)
from minillm.models.balancing import Routing, routing_by_layer
from minillm.models.chat import context_length, encode_chat, end_of_turn_ids
from minillm.models.configuration_minillm import MiniLLMConfig
from minillm.models.feed_forward import build_mlp
from minillm.models.linear import Linear
from minillm.models.loss import (
    auxiliary_losses,
    count_targets,
    counted_tokens,
    next_token_targets,
    targets_ahead,
    token_loss,
)
from minillm.models.mixers import build_masks, build_mixer
from minillm.models.multi_token import MultiTokenModule
from minillm.models.normalization import build_norm
from minillm.models.positions import build_positions


class MiniLLMDecoderLayer(GradientCheckpointingLayer):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: MiniLLMConfig, layer_idx: int):
        super().__init__()
        self.layer_type = config.layer_type_of(layer_idx)
        self.is_sparse = config.is_sparse(layer_idx)
        self.input_layernorm = build_norm(config)
        self.mixer = build_mixer(config, layer_idx)
        self.post_attention_layernorm = build_norm(config)
        self.mlp = build_mlp(config, layer_idx)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        positions: torch.Tensor | None,
        masks: dict[str, torch.Tensor | None],
        cache: Cache | None = None,
        counted: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Routing | None]:
        """[B, T, D] -> [B, T, D], and what the router did; the other arguments as in mixers and feed_forward."""
        mask = masks[self.layer_type]
        mixed = self.mixer(self.input_layernorm(hidden_states), positions, mask, cache)
        hidden_states = hidden_states + self.dropout(mixed)
        normed = self.post_attention_layernorm(hidden_states)
        fed, routing = self.mlp(normed, counted) if self.is_sparse else (self.mlp(normed), None)
        return hidden_states + self.dropout(fed), routing


@dataclass
class MiniLLMModelOutput(BothCacheNames, BaseModelOutputWithPast):
    """The decoder's hidden states, and in training what its routers did and its multi-token modules made."""

    routings: tuple[Routing, ...] | None = None  # one a sparse layer, multi-token modules last
    multi_token_states: tuple[torch.Tensor, ...] | None = None  # [B, T, D] each, the k-th k tokens further ahead


@dataclass
class MiniLLMCausalLMOutput(BothCacheNames, CausalLMOutputWithPast):
    """Logits and loss, and the parts of the loss by name.

    Attributes:
        loss: what training minimises: cross-entropy and, in training, the auxiliary terms times their coefficients.
        losses: fp32 scalars, `cross_entropy` first, then in training every auxiliary term before its coefficient;
            all of them add up over micro-batches that share one `num_items_in_batch`.
        routing: what the routers did, in training of a model with experts; its rows are the L sparse layers in order,
            multi-token modules last, and everything in it adds up over micro-batches like the losses. `counts` [L, E],
            tokens that chose each expert before any are dropped; `dropped` [L], routes the capacity dropped; `entropy`
            [L], of the routing probabilities, summed over tokens (nats); `tokens` [L]; and each balancing term by its
            name in `losses` [L], which adds up to that.
    """

    losses: dict[str, torch.Tensor] | None = None
    routing: dict[str, torch.Tensor] | None = None


class MiniLLMPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of the architecture."""

    config_class = MiniLLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MiniLLMDecoderLayer"]
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]

    def __init__(self, config: MiniLLMConfig, *arguments, **options):
        super().__init__(config, *arguments, **options)
        # A recurrent state cannot go back over rejected tokens: `generate` refuses assisted decoding then.
        self._is_stateful = "linear_attention" in config.layer_types

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal weights and zero biases; a module with `init_weights(config)` fills its own parameters."""
        super()._init_weights(module)
        if hasattr(module, "init_weights"):
            module.init_weights(self.config)
        if self.config.scale_residual_init and isinstance(module, MiniLLMDecoderLayer):
            # GPT-2 (Radford et al. 2019, section 2.3): what adds to the residual stream starts smaller with depth.
            std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
            for name, parameter in module.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
                    init.normal_(parameter, mean=0.0, std=std)


class MiniLLMModel(MiniLLMPreTrainedModel):
    """The decoder without its output product."""

    def __init__(self, config: MiniLLMConfig):
        super().__init__(config)
        # No padding_idx: padding is <|endoftext|> here, a token with a meaning, whose embedding is trained.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MiniLLMDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = build_norm(config)
        self.positions = build_positions(config)
        self.dropout = nn.Dropout(config.embedding_dropout)
        # Their layers stand after the last: layer_idx gives them a place of their own wherever layers are counted.
        self.multi_token_modules = nn.ModuleList(
            MultiTokenModule(config, MiniLLMDecoderLayer(config, config.num_hidden_layers + i))
            for i in range(config.num_nextn_predict_layers)
        )
        self.gradient_checkpointing = False
        self.post_init()

    @takes_both_cache_names
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        counted: torch.Tensor | None = None,
        return_dict: bool | None = None,
        document_borders: torch.Tensor | None = None,
    ) -> MiniLLMModelOutput | tuple:
        """Hidden states [B, T, D] after the last norm. Arguments as in MiniLLMForCausalLM.forward, and:

        Args:
            counted: bool [B, T], the tokens that balance the experts. Given in training alone; with it come the
                routings and the states of the multi-token modules.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        embeddings = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        computes_again = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if computes_again and (use_cache or cache is not None):
            warn_once("gradient checkpointing computes layers twice, which would extend a cache twice: none is used")
            use_cache, cache = False, None
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        length, device = embeddings.shape[1], embeddings.device
        if position_ids is None:
            position_ids = _default_position_ids(length, device, attention_mask, cache)
        masks = build_masks(self.config, length, device, attention_mask, document_ids, cache, document_borders)
        hidden_states, positions = self.positions(embeddings, position_ids)
        hidden_states = self.dropout(hidden_states)
        routings: list[Routing | None] = []
        for layer in self.layers:
            hidden_states, routing = layer(
                hidden_states, positions=positions, masks=masks, cache=cache, counted=counted
            )
            routings.append(routing)
        hidden_states = self.norm(hidden_states)
        ahead = []
        if counted is not None:
            state = hidden_states
            for module in self.multi_token_modules:
                embeddings = nn.functional.pad(embeddings[:, 1:], (0, 0, 0, 1))  # of the next token; the last has none
                counted = nn.functional.pad(counted[:, 1:], (0, 1))  # False: no token there to route
                state, routing = module(state, embeddings, positions, masks, counted)
                ahead.append(state)
                routings.append(routing)
        output = MiniLLMModelOutput(
            last_hidden_state=hidden_states,
            **{CACHE_NAME: cache},
            routings=tuple(routing for routing in routings if routing is not None) or None,
            multi_token_states=tuple(ahead) or None,
        )
        return output if return_dict is not False else output.to_tuple()


def _default_position_ids(
    length: int, device: torch.device, attention_mask: torch.Tensor | None, cache: Cache | None
) -> torch.Tensor:
    """[1, T] counted on from the cache, or [B, T] counted over the real tokens where a 0/1 mask says which they are."""
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    start = 0 if cache is None else cache.get_seq_length()
    return torch.arange(start, start + length, device=device)[None]


class MiniLLMForCausalLM(MiniLLMPreTrainedModel, GenerationMixin):
    """The decoder with its output product: next-token logits, the training loss, generation and chat."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MiniLLMConfig):
        super().__init__(config)
        self.model = MiniLLMModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.token_loss = token_loss
        self.post_init()

    def compile_regions(self, **options) -> None:
        """torch.compile each layer, the last norm and the loss by itself, for training; in place.

        Regional compilation: layers of a kind share one graph, which takes seconds where a whole model takes minutes.
        Masks are made outside, so that attention over packed documents keeps its kernel; and a layer's gradients are
        there as soon as its own backward pass is, so that reducing them runs beside the next layer's.

        Args:
            options: of torch.compile.
        """
        for layer in (*self.model.layers, *(module.layer for module in self.model.multi_token_modules)):
            layer.compile(**options)
        self.model.norm.compile(**options)
        self.token_loss = torch.compile(token_loss, **options)

    def generate(self, *arguments, **options):
        """GenerationMixin.generate, without cuDNN's attention: the first choice on Hopper, where it builds a plan for
        each new number of keys (tens of milliseconds a token)."""
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            return super().generate(*arguments, **options)

    @takes_both_cache_names
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_logits: bool | None = None,
        return_dict: bool | None = None,
        document_borders: torch.Tensor | None = None,
    ) -> MiniLLMCausalLMOutput | tuple:
        """One pass.

        Args:
            input_ids: [B, T]; or inputs_embeds [B, T, D] in its place.
            attention_mask: 0/1 [B, S], 0 at padding (left or right); or a finished mask [B, 1, T, S],
                alone or in a dictionary by layer type.
            position_ids: [B, T]; counted from the mask and the cache when absent. Packed rows pass their own, which
                begin again at each document.
            document_ids: [B, T], equal within a document: tokens see only their own document.
            cache: transformers' Cache, extended in place; `past_key_values` is its name before transformers 5.24.
            labels: [B, T], shifted here: the logits at t are held against labels[t + 1]. -100 is ignored.
            shift_labels: [B, T], already the targets of their own position. -100 is ignored. Not with `labels`.
            num_items_in_batch: the loss is the sum over targets divided by this; the mean over targets when absent.
                A batch without targets has loss 0 and zero gradients either way.
            use_cache: make a DynamicCache where none is given.
            logits_to_keep: keep the logits of the last so many positions (0: all), or of these positions.
            return_logits: default: everywhere but in training with targets, where only the loss is wanted and the
                logits need not be kept. With False `logits` is None.
            document_borders: int32, where documents begin in the flattened batch, then B * T, once or several times:
                the same as document_ids, for whoever knows it (a GPU has to be waited for to find it out).
        """
        if labels is not None and shift_labels is not None:
            raise ValueError("pass either labels or shift_labels, not both")
        targets = next_token_targets(labels) if labels is not None else shift_labels
        counted = counted_tokens(targets) if self.training and targets is not None else None
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids,
            document_ids,
            cache,
            inputs_embeds,
            use_cache,
            counted,
            document_borders=document_borders,
        )
        hidden_states = outputs.last_hidden_state
        if return_logits is None:
            return_logits = targets is None or not self.training
        kept = logits_to_keep
        if isinstance(kept, int):
            kept = slice(-kept, None) if kept else slice(None)
        loss = losses = logits = routing = None
        if targets is not None:
            if num_items_in_batch is None:
                num_items_in_batch = count_targets(targets)  # of the next token, for the terms further ahead as well
            logits = self.lm_head(hidden_states)
            loss = self.token_loss(logits, targets, num_items_in_batch)
            losses = {"cross_entropy": loss}
            logits = logits[:, kept] if return_logits else None
            for depth, states in enumerate(outputs.multi_token_states or (), 1):
                ahead = targets_ahead(targets, document_ids, depth)
                term = self.token_loss(self.lm_head(states), ahead, num_items_in_batch)
                losses[f"multi_token_{depth}"] = term
                # DeepSeek-V3 (arXiv:2412.19437), equation 25: the mean over depths.
                loss = loss + self.config.mtp_loss_coef / self.config.num_nextn_predict_layers * term
            if outputs.routings:
                balancing, total = auxiliary_losses(self.config, outputs.routings, targets, num_items_in_batch)
                losses |= {name: rows.sum() for name, rows in balancing.items()}
                loss = loss + total
                routing = routing_by_layer(outputs.routings, balancing)
        elif return_logits:
            logits = self.lm_head(hidden_states[:, kept])
        output = MiniLLMCausalLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: outputs.cache},
            losses=losses,
            routing=routing,
        )
        return output if return_dict is not False else output.to_tuple()

    @torch.no_grad()
    def chat(
        self,
        message: str,
        history: list[dict[str, str]] | None = None,
        tokenizer=None,
        **generate_kwargs,
    ) -> str:
        """The model's reply to `message`.

        Args:
            history: earlier turns, {"role", "content"} each, oldest first; left as it is.
            tokenizer: one with a chat template; loaded from the folder the model came from when absent.
            generate_kwargs: for `generate`; by default 256 new tokens, fewer where the context ends.

        Raises:
            ValueError: no tokenizer or no chat template, or a conversation as long as the context.
        """
        if tokenizer is None:
            if not source_folder(self.config):
                raise ValueError("this model was not loaded from a folder: pass chat(..., tokenizer=...)")
            # With the config at hand the loader need not ask whether a folder's own code may run to read it.
            tokenizer = AutoTokenizer.from_pretrained(source_folder(self.config), config=self.config)
        messages = [*(history or []), {"role": "user", "content": message}]
        ids, context = encode_chat(tokenizer, messages), context_length(self.config)
        room = context - len(ids)
        if room < 1:
            raise ValueError(
                f"the conversation has {len(ids)} tokens and the context {context}: shorten the message or drop old "
                "turns of the history"
            )
        if "max_length" not in generate_kwargs:
            generate_kwargs.setdefault("max_new_tokens", min(256, room))
        generate_kwargs.setdefault("eos_token_id", end_of_turn_ids(tokenizer, self.generation_config))
        generate_kwargs.setdefault("pad_token_id", tokenizer.pad_token_id)
        prompt = torch.tensor([ids], device=self.device)
        was_training = self.training
        self.eval()
        try:
            output = self.generate(prompt, attention_mask=torch.ones_like(prompt), **generate_kwargs)
        finally:
            self.train(was_training)
        return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True).strip()

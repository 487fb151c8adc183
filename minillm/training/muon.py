"""Muon for the matrices of the decoder layers, AdamW for the rest: one optimizer, whole or under ZeRO.

Muon (K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024) replaces a matrix's momentum by
the nearest matrix with orthogonal rows or columns, found by five Newton-Schulz steps. The update's size is that of
"Muon is scalable for LLM training" (arXiv:2502.16982, section 2.2): 0.2 sqrt(max(rows, columns)) times it, which has
the root mean square of AdamW's usual updates, so that both share a learning rate, a schedule and a weight decay.

Contract: what is orthogonalised is a matrix and never a stack or a pair: each expert by itself, gate and up of an
expert apart, and q, k and v of a fused projection apart (as dense layers keep them); therefore the update is the same
whoever runs the experts. Under ZeRO the momentum is sharded like AdamW's moments, and of each matrix only what its
owner lacks is sent (training/muon_exchange.py). A gradient is clipped before it enters the momentum, which is where
ZeRO clips; the orthogonalised update is not touched.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from minillm.compat.deepspeed_api import FlatPartition, Slice
from minillm.models.linear import should_widen
from minillm.training.muon_exchange import Exchange, Matrix, Shape, share_out

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's quintic: singular values end between about 0.68 and 1.13
STEPS = 5
RMS = 0.2  # root mean square of an update per learning rate, arXiv:2502.16982
SMALLEST_NORM = 1e-7  # of a matrix that is scaled up to 1; an expert without a token has 0
BUCKET = 2**24  # elements of the matrices that one rank orthogonalises at a time: 32 MB in bf16, and three such buffers

_LAYER = re.compile(r"\.(layers|multi_token_modules)\.\d+\.")
_PROJECTION = re.compile(r"_proj(_with_mqa)?(\.weight)?$")


def is_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether Muon takes a parameter: the projections of decoder layers, [out, in] or stacked [experts, out, in].

    The rest is AdamW's: embeddings, the output product, routers, gates of experts, convolutions, norms and biases.
    """
    return len(shape) >= 2 and bool(_LAYER.search(name)) and bool(_PROJECTION.search(name))


def matrices_of(name: str, shape: Sequence[int], rows: Sequence[int] | None = None, halves: bool = True) -> list[Shape]:
    """The matrices that a parameter consists of, in the order of its elements.

    Args:
        name: as a checkpoint has it.
        rows: of each part of a projection that does the work of several.
        halves: whether a stacked `gate_up_proj` holds gate and up; AutoEP keeps them apart.
    """
    *stack, height, width = shape
    count = math.prod(stack)
    if rows is not None:
        return [(part, width) for part in rows]
    if halves and name.endswith("gate_up_proj"):
        return [(height // 2, width)] * (2 * count)
    return [(height, width)] * count


def orthogonalise(stack: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz: the singular vectors of each matrix stay, its singular values go to about 1.

    Args:
        stack: [B, M, N]; computed in its type. An all-zero matrix stays so.

    Returns:
        [B, M, N].
    """
    a, b, c = COEFFICIENTS
    tall = stack.shape[-2] > stack.shape[-1]
    x = stack.mT if tall else stack  # so that the product with itself is the smaller one
    norms = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    x = x / norms.clamp(min=SMALLEST_NORM).to(x.dtype)
    for _ in range(STEPS):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return x.mT if tall else x


def update_flops(shape: Shape) -> int:
    """Operations of orthogonalising one matrix, two for a multiplication and its addition."""
    small, large = sorted(shape)
    return STEPS * (4 * small * small * large + 2 * small**3)


def iteration_dtype(weights: torch.dtype, device: torch.device) -> torch.dtype:
    """What Newton-Schulz computes in, and sends: bf16 for a model in bf16 or fp16 where the device multiplies it.

    A model in fp32 keeps fp32, so that runs on other ranks agree as closely as with AdamW: the steps enlarge a
    difference in small singular values up to 500 times.
    """
    if weights == torch.float32 or should_widen(torch.empty(0, dtype=torch.bfloat16, device=device)):
        return torch.float32
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float32
    return torch.bfloat16


class Muon(torch.optim.AdamW):
    """Muon for the groups with `muon`, AdamW for the others; see the module's header.

    The state of Muon's parameters is `momentum_buffer`, an exponential average of gradients, as torch.optim.Muon's.

    Args:
        groups: parameter groups. With `muon` true they have `momentum`, `rate_ratio` (their learning rate over `lr`)
            and parameters that are keys of `shapes` alone.
        shapes: the matrices of each of Muon's parameters, in the order of its elements.
        options: AdamW's.
    """

    def __init__(self, groups: Iterable[dict], shapes: Mapping[nn.Parameter, Sequence[Shape]], **options: object):
        super().__init__(groups, **options)
        self._shapes = dict(shapes)
        self._exchanges: dict[tuple[int, ...], Exchange] = {}
        self._partitions: dict[int, FlatPartition] = {}
        self._device: torch.device | None = None
        self._dtype: torch.dtype | None = None

    def bind(self, partitions: Iterable[FlatPartition], device: torch.device, weights: torch.dtype) -> None:
        """Take over what an engine has made of the parameters: from here on every `step` is a collective.

        Args:
            partitions: the tensors that `step` will find in the groups; none where they are the model's parameters.
            device: where matrices are multiplied; offloaded momenta stay in host memory.
            weights: the type of the weights that the model computes with.
        """
        self._partitions = {id(partition.tensor): partition for partition in partitions}
        self._device = device
        self._dtype = iteration_dtype(weights, device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every parameter that has a gradient; under ZeRO, of the groups that it has left in."""
        groups = self.param_groups
        for group in groups:
            tensors = [tensor for tensor in group["params"] if tensor.grad is not None]
            if group.get("muon") and tensors:
                self._update(tensors, group)
        try:
            self.param_groups = [group for group in groups if not group.get("muon")]
            super().step()
        finally:
            self.param_groups = groups

    def _update(self, tensors: list[torch.Tensor], group: dict) -> None:
        rate, momentum = group["lr"] * group["rate_ratio"], group["momentum"]
        averages = []
        for tensor in tensors:
            state = self.state[tensor]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(tensor, memory_format=torch.contiguous_format)
            averages.append(state["momentum_buffer"].lerp_(tensor.grad, 1 - momentum))
            tensor.mul_(1 - rate * group["weight_decay"])
        device = self._device or tensors[0].device
        dtype = self._dtype or iteration_dtype(tensors[0].dtype, device)

        def look_ahead(number: int, start: int, stop: int) -> torch.Tensor:
            """Nesterov's momentum of some elements of a tensor."""
            gradient, average = (x.reshape(-1)[start:stop] for x in (tensors[number].grad, averages[number]))
            return gradient.lerp(average, momentum).to(device=device, dtype=dtype)

        def scaled(stack: torch.Tensor) -> torch.Tensor:
            return orthogonalise(stack).mul_(RMS * math.sqrt(max(stack.shape[1:])))

        def apply(number: int, start: int, stop: int, update: torch.Tensor) -> None:
            target = tensors[number].view(-1)[start:stop]
            target.sub_(update.to(device=target.device, dtype=target.dtype), alpha=rate)

        self._exchange(tensors).run(look_ahead, scaled, apply)

    def _exchange(self, tensors: list[torch.Tensor]) -> Exchange:
        """Who orthogonalises what of these tensors; worked out once, every rank by itself and all the same."""
        key = tuple(map(id, tensors))
        if key not in self._exchanges:
            matrices: list[Matrix] = []
            group = None
            for number, tensor in enumerate(tensors):
                partition = self._partitions.get(id(tensor)) or whole(tensor)
                group = partition.group
                for parameter, slices in partition.pieces:
                    matrices += Matrix.all_of(self._shapes[parameter], slices, number)
            self._exchanges[key] = Exchange(share_out(matrices, update_flops, BUCKET), group)
        return self._exchanges[key]


def whole(parameter: nn.Parameter) -> FlatPartition:
    """A parameter that no engine holds."""
    return FlatPartition(parameter, None, ((parameter, (Slice(0, parameter.numel(), 0),)),))

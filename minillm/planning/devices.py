"""What GPUs can do, as data: peak arithmetic, memory bandwidth, and the rates of links inside and between nodes.

Contract: stdlib only. Arithmetic and memory are the vendors' datasheets (dense, no sparsity). Links and overlap are
assumptions: `launch/preflight.py` measures them, and `minillm.plan --bandwidth --network --overlap` replaces them.
"""

from __future__ import annotations

import re
from typing import NamedTuple

# FLOP/s of dense products, by what stands in the card's name; the first match wins. Low: bf16 and fp16 on tensor cores
# that add in fp32, as PyTorch's products do. fp32: without TF32, PyTorch's default, which this project leaves alone.
_LOW_AND_FP32 = {
    "GH200": (989e12, 67e12), "H200 NVL": (835e12, 60e12), "H200": (989e12, 67e12), "H100 PCIe": (756e12, 51.2e12),
    "H100 NVL": (835e12, 60e12), "H100": (989e12, 67e12), "H800": (989e12, 67e12), "B200": (2250e12, 75e12),
    "A100": (312e12, 19.5e12), "A800": (312e12, 19.5e12), "A40": (149.7e12, 37.4e12), "A30": (165e12, 10.3e12),
    "A10G": (70e12, 35e12), "A10": (125e12, 31.2e12), "RTX 6000 Ada": (364.2e12, 91.1e12), "A6000": (154.8e12, 38.7e12),
    "L40S": (362e12, 91.6e12), "L40": (181e12, 90.5e12), "L4": (121e12, 30.3e12),
    "RTX 3090 Ti": (80e12, 40e12), "RTX 3090": (71e12, 35.6e12), "RTX 3080": (59.5e12, 29.8e12),
    "RTX 4090": (165.2e12, 82.6e12), "RTX 4080": (97.5e12, 48.7e12), "RTX 5090": (209.5e12, 104.8e12),
}  # fmt: skip
_WITHOUT_BF16 = {"V100S": (130e12, 16.4e12), "V100-PCIE": (112e12, 14e12), "V100": (125e12, 15.7e12),
                 "T4": (65e12, 8.1e12)}  # fmt: skip
DATASHEET: dict[str, dict[str, float]] = {
    **{name: {"bf16": low, "fp16": low, "fp32": fp32} for name, (low, fp32) in _LOW_AND_FP32.items()},
    **{name: {"fp16": low, "fp32": fp32} for name, (low, fp32) in _WITHOUT_BF16.items()},
}
_OTHER_CHIPS = re.compile(r"\b(Laptop|Max-Q|MIG)\b")  # the same name on less of a chip
_OTHER_CARDS = r"(?! (?:Ti|SUPER|D)\b)"  # what may follow a card's name and makes it another card


def datasheet_flops(card: str, precision: str) -> float | None:
    """Peak of a card by the name CUDA gives it.

    Args:
        precision: bf16, fp16 or fp32.

    Returns:
        FLOP/s of dense products; None for a card that is not listed, a part of one, or a precision it has no units for.
    """
    if _OTHER_CHIPS.search(card):
        return None
    found = (peak for name, peak in DATASHEET.items() if re.search(rf"\b{name}\b{_OTHER_CARDS}", card))
    return next(found, {}).get(precision)


class Device(NamedTuple):
    """One kind of GPU.

    Attributes:
        name: as CUDA has it, without the vendor.
        flops: peak FLOP/s by precision.
        memory: bytes of it.
        memory_bandwidth: of the card's own memory, bytes/s.
        bus: bytes/s of an all-reduce's bus bandwidth (NCCL's busbw) between the cards of a node.
        link: what the bus is.
        network: bytes/s of bus bandwidth between nodes: of each card's own rail, or where `shared` of the
            one network card that all cards of a node share.
        fabric: what the network is.
        workspace: bytes that cuBLAS takes for each of its handles through PyTorch's allocator (8320 KiB, on compute
            capability 9 32 MiB: pytorch/pytorch pull request 89027).
        overlap: the part of the arithmetic's time in which traffic runs beside it. Without peer-to-peer none is
            assumed: there NCCL copies through main memory by kernels of its own, and eight RTX 3090 trained
            TinyLlama-1.1B at 55 % of eight times one (whyNLP/tinyllama).
    """

    name: str
    flops: dict[str, float]
    memory: float
    memory_bandwidth: float
    bus: float
    link: str
    overlap: float
    network: float
    fabric: str
    shared: bool = False
    workspace: int = 8_519_680

    def node_network(self, gpus_per_node: int) -> float:
        """Bytes/s that leave a node."""
        return self.network if self.shared else self.network * gpus_per_node


_GIB = 2**30
_REACHED = 0.9  # of a network's line rate, by NCCL
_ETHERNET = (_REACHED * 25e9 / 8, "25 Gbit/s Ethernet a node", True)
_HDR = (_REACHED * 200e9 / 8, "200 Gbit/s InfiniBand a card")
_NDR = (_REACHED * 400e9 / 8, "400 Gbit/s InfiniBand a card")
_PCIE, _PEER = "PCIe 4 x16, no peer-to-peer", "PCIe 4 x16, peer-to-peer"
_PCIE_5 = "PCIe 5 x16, no peer-to-peer"
DEVICES = {
    "rtx3090": Device("RTX 3090", DATASHEET["RTX 3090"], 24 * _GIB, 936e9, 12e9, _PCIE, 0.0, *_ETHERNET),
    "rtx4090": Device("RTX 4090", DATASHEET["RTX 4090"], 24 * _GIB, 1008e9, 12e9, _PCIE, 0.0, *_ETHERNET),
    "rtx5090": Device("RTX 5090", DATASHEET["RTX 5090"], 32 * _GIB, 1792e9, 24e9, _PCIE_5, 0.0, *_ETHERNET),
    "a6000": Device("A6000", DATASHEET["A6000"], 48 * _GIB, 768e9, 20e9, _PEER, 0.5, *_ETHERNET),
    "l40s": Device("L40S", DATASHEET["L40S"], 48 * _GIB, 864e9, 20e9, _PEER, 0.5, *_ETHERNET),
    "a100": Device("A100", DATASHEET["A100"], 80 * _GIB, 2039e9, 230e9, "NVLink 3", 0.8, *_HDR),
    "h100": Device("H100", DATASHEET["H100"], 80 * _GIB, 3350e9, 370e9, "NVLink 4", 0.8, *_NDR, workspace=1 << 25),
    "h200": Device("H200", DATASHEET["H200"], 141e9, 4800e9, 370e9, "NVLink 4", 0.8, *_NDR, workspace=1 << 25),
}

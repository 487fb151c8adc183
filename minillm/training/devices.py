"""What GPUs can do, as data: peak arithmetic, memory bandwidth, and the rate of an all-reduce among cards of one node.

Contract: stdlib only. Arithmetic and memory are the vendors' datasheets (dense, no sparsity). Bus and overlap are
assumptions: `launch/preflight.py` measures the one, and `minillm.plan --bandwidth --overlap` replaces both.
"""

from __future__ import annotations

from typing import NamedTuple

# Dense bf16 with fp32 accumulation, FLOP/s. First match wins.
DATASHEET_FLOPS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H200": 989e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12,
    "A800": 312e12, "A40": 149.7e12, "A10": 125e12, "A6000": 154.8e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12,
    "RTX 3090 Ti": 80e12, "RTX 3090": 71e12, "RTX 3080": 59.5e12, "RTX 4090": 165.2e12, "RTX 4080": 97.5e12,
    "RTX 5090": 209.5e12,
}  # fmt: skip


class Device(NamedTuple):
    """One kind of GPU.

    Attributes:
        name: a key of DATASHEET_FLOPS.
        fp32_flops: FLOP/s of fp32 products without TF32 (PyTorch's default).
        memory_bandwidth: of the card's own memory, bytes/s.
        bus: bytes/s of an all-reduce's bus bandwidth (NCCL's busbw) between the cards of a node.
        link: what the bus is.
        overlap: the part of the arithmetic's time in which traffic runs beside it. Without peer-to-peer none is
            assumed: there NCCL copies through main memory by kernels of its own, and eight RTX 3090 trained
            TinyLlama-1.1B at 55 % of eight times one (whyNLP/tinyllama).
    """

    name: str
    fp32_flops: float
    memory_bandwidth: float
    bus: float
    link: str
    overlap: float

    @property
    def flops(self) -> dict[str, float]:
        """Peak by precision."""
        low = DATASHEET_FLOPS[self.name]
        return {"bf16": low, "fp16": low, "fp32": self.fp32_flops}


_PCIE = "PCIe 4 x16, no peer-to-peer"
DEVICES = {
    "rtx3090": Device("RTX 3090", 35.6e12, 936e9, 12e9, _PCIE, 0.0),
    "rtx4090": Device("RTX 4090", 82.6e12, 1008e9, 12e9, _PCIE, 0.0),
    "rtx5090": Device("RTX 5090", 104.8e12, 1792e9, 24e9, "PCIe 5 x16, no peer-to-peer", 0.0),
    "a6000": Device("A6000", 38.7e12, 768e9, 20e9, "PCIe 4 x16, peer-to-peer", 0.5),
    "l40s": Device("L40S", 91.6e12, 864e9, 20e9, "PCIe 4 x16, peer-to-peer", 0.5),
    "a100": Device("A100", 19.5e12, 2039e9, 230e9, "NVLink 3", 0.8),
    "h100": Device("H100", 67e12, 3350e9, 370e9, "NVLink 4", 0.8),
    "h200": Device("H200", 67e12, 4800e9, 370e9, "NVLink 4", 0.8),
}

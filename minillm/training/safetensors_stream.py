"""A safetensors file written one tensor at a time, so that rank 0 never holds the whole model in memory.

Format: https://github.com/huggingface/safetensors (8-byte little-endian header length, JSON header, raw data).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from types import TracebackType

import torch


class SafetensorsWriter:
    """Write fp32 tensors in the order announced; the sha256 of the file is known when it closes.

    Args:
        path: the file to create.
        shapes: name -> shape, in the order in which `write` will be called.
    """

    def __init__(self, path: Path, shapes: dict[str, tuple[int, ...]]):
        self._expected = iter(shapes.items())
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, shape in shapes.items():
            size = 4 * math.prod(shape)
            header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._hash = hashlib.sha256()
        self._file = open(path, "wb")  # closed in __exit__
        self._put(len(text).to_bytes(8, "little") + text)

    def _put(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append the next tensor (contiguous fp32 on the CPU)."""
        expected, shape = next(self._expected)
        if name != expected or tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"expected {expected} {tuple(shape)}, got {name} {tuple(tensor.shape)}")
        self._put(memoryview(tensor.contiguous().numpy()).cast("B"))

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                missing = next(self._expected, None)
                if missing is not None:
                    raise ValueError(f"{missing[0]} was not written")
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

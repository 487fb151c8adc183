"""Random number generators: seeded, captured and put back. Nothing of it is pickled."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def capture_rng() -> dict[str, str]:
    """The state of every generator of this process as text (hex for torch, JSON for Python and numpy)."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    state = {
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "python": json.dumps(random.getstate()),
        "numpy": json.dumps([name, keys.tolist(), position, has_gauss, gauss]),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return state


def restore_rng(state: dict[str, str]) -> None:
    """Put back what `capture_rng` returned; a device's state is left alone where the device is absent."""
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state["torch"]), dtype=torch.uint8))
    version, keys, gauss = json.loads(state["python"])
    random.setstate((version, tuple(keys), gauss))
    name, keys, position, has_gauss, gauss = json.loads(state["numpy"])
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.frombuffer(bytearray.fromhex(state["cuda"]), dtype=torch.uint8))


@contextlib.contextmanager
def rng_untouched() -> Iterator[None]:
    """Whatever the block draws, the generators continue afterwards as if it had not run."""
    state = capture_rng()
    try:
        yield
    finally:
        restore_rng(state)

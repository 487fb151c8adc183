"""minillm: train small language models with DeepSpeed, then talk to them.

Contract: importing this package imports nothing else. `minillm.load` is the three-line way to a model:

    import minillm
    model = minillm.load("runs/sft-demo")
    print(model.chat("What does len do?"))
"""

from __future__ import annotations

import sys

__version__ = "0.1.0"

if sys.version_info < (3, 10):  # noqa: UP036 (what a checkout is started with is not what pip would allow)
    _message = f"minillm needs Python 3.10 or newer; {sys.executable} is {sys.version.split()[0]}"
    if sys.argv[:1] == ["-m"] or "entry" in sys.modules:  # python -m minillm.X, launch/*.py: one line
        sys.stderr.write(f"error: {_message}\n")
        sys.exit(2)
    raise ImportError(_message)


def load(path=None, device="auto", dtype="auto"):
    """Load a model that answers `.chat("...")`, ready for inference.

    Args:
        path: a run's name or folder, a checkpoint folder, an exported folder, or any Hugging Face causal language
            model folder; None takes the newest run under `runs/`.
        device: "auto" (CUDA where there is one), "cpu", "cuda" or a torch device.
        dtype: "auto" (bf16 on CUDA, fp32 elsewhere), "fp32" or "bf16".

    Returns:
        A transformers `PreTrainedModel` in eval mode: `generate`, `save_pretrained` and the rest work as always.

    Raises:
        minillm.utils.errors.UserError: nothing is found at `path`, or what is found is damaged.
    """
    from minillm.interop.load import load_model

    return load_model(path, device=device, dtype=dtype)

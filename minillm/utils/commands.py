"""How the command of this process was started, for its usage line."""

from __future__ import annotations

started_as: str | None = None  # `minillm chat`: set by minillm/__main__.py, None where the module or script was started


def command_name(module: str) -> str:
    """What the user typed to start `module`: `minillm chat`, or `python -m minillm.chat`."""
    return started_as or f"python -m {module}"

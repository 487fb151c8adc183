"""Weights and configs between minillm, its run folders and transformers' own classes.

Importing this imports nothing; `from_transformers` and `to_transformers` bring torch with them when they are asked for.
"""

from __future__ import annotations

__all__ = ["from_transformers", "native_family", "to_transformers"]


def __getattr__(name: str):
    if name in ("from_transformers", "to_transformers"):
        from minillm.interop import convert

        return getattr(convert, name)
    if name == "native_family":
        from minillm.interop import families

        return families.native_family
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""The libraries of the extra `workshop`, asked for where they are used: training installs none of them."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from minillm.utils.errors import UserError


def require(module: str, package: str | None = None) -> ModuleType:
    """Import a library that only the workshop needs.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec(module.split(".")[0]) is None:
        raise UserError(f'this needs the package {package or module}: pip install -e ".[workshop]"')
    return importlib.import_module(module)

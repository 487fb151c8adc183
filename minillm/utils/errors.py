"""The one exception for mistakes a user can mend.

Contract: the message names the thing, the rule and the fix. Entry points print it without a traceback and exit with 2.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


class UserError(Exception):
    """A problem in input, configuration or environment that the user can fix."""


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a UserError into one message on stderr and exit code 2 (used around every entry point)."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)

"""The one exception for mistakes a user can mend.

Contract: the message names the thing, the rule and the fix. Entry points print it without a traceback and exit with 2.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


class UserError(Exception):
    """A problem in input, configuration or environment that the user can fix."""


def nearest(name: str, names: list[str]) -> str:
    """`; did you mean X?` when a valid name is close, else the list of valid names."""
    import difflib  # here: an error is rare, and this is imported at every start

    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean `{close[0]}`?" if close else f"; valid: {', '.join(names)}"


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a UserError into one message on stderr and exit code 2 (used around every entry point).

    Most errors are every rank's; the other ranks print the first line only, so that one rank's own is not lost.
    """
    try:
        yield
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        message = f"error: {error}" if rank == "0" else f"error (rank {rank}): {str(error).splitlines()[0]}"
        print(message, file=sys.stderr, flush=True)
        sys.exit(2)

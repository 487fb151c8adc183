"""The packages of this environment against those that were tested: `python -m minillm.versions`.

Contract: one row a package: installed, admitted by setup.py, tested (launch/constraints.txt), verdict. Exit code 1
where one is missing, too old or too new, or where two minillms are here. Imports none of them.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys

from minillm.compat import versions
from minillm.utils.commands import command_name
from minillm.utils.errors import exit_on_user_error


def table(packages: list[versions.Package]) -> str:
    """Columns, a heading first."""
    lines = [("package", "installed", "admitted", "tested", "verdict")]
    lines.append(("python", platform.python_version(), ">=3.10", "3.10 to 3.13", ""))
    for package in packages:
        verdict = package.verdict + f" (extra {package.extra})" * bool(package.extra and package.installed is None)
        cells = (package.installed or "-", package.admitted or "any", package.tested or "-")
        lines.append((package.name, *cells, verdict))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(word.ljust(width) for word, width in zip(line, widths)).rstrip() for line in lines)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=command_name("minillm.versions"),
        description="Compare this environment's packages with the tested ones.",
    )
    parser.add_argument("--json", action="store_true", help="the rows as JSON")
    arguments = parser.parse_args(argv)
    with exit_on_user_error():
        packages = versions.packages()
        found = versions.distributions()
        if arguments.json:
            print(json.dumps([{**package._asdict(), "verdict": package.verdict} for package in packages]))
        else:
            print(table(packages))
        if not versions.own_distribution(found):
            print("what is admitted is not known: this minillm was not installed here", file=sys.stderr)
        problem = versions.two_minillms(found)
        if problem is None and any(package.verdict in versions.BAD for package in packages):
            bad = [(package.name, package.admitted) for package in packages if package.verdict in versions.BAD]
            problem = f"mend it: {versions.mending_command(bad, versions.tested_versions())}"
        for sentence in filter(None, [problem, versions.strangers(found)]):
            print(sentence, file=sys.stderr)
        return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main())

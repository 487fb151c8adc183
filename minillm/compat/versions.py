"""Which versions are installed, which are admitted, which were tested; and whether one minillm is here or two.

Contract: the installed versions and the admitted ranges are those that installation left behind (setup.py's, whatever
the distribution is called), the tested ones those of launch/constraints.txt; where one of them is not there, nothing is
said about it. `check_environment` is called at every start and costs milliseconds: stdlib only, no package imported.
A release is compared by its numbers alone, so that a vendor's 2.11.0a0+nv counts as 2.11.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from minillm.utils.errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]  # minillm/
MOVING = ("torch", "deepspeed", "transformers", "tokenizers", "safetensors", "webdataset", "pydantic", "numpy")
INFERENCE = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pyyaml")  # what chat and export need
TRAINING = (*INFERENCE, "deepspeed", "webdataset", "pydantic")

AS_TESTED, ADMITTED, TOO_OLD, TOO_NEW, MISSING, OPTIONAL = (
    "as tested", "admitted", "too old", "too new", "missing", "not installed",
)  # fmt: skip
BAD = (TOO_OLD, TOO_NEW, MISSING)


class Distribution(NamedTuple):
    """One installed distribution that provides a package named minillm, and the folder which holds that package."""

    name: str
    version: str
    root: Path
    requires: tuple[str, ...]


class Package(NamedTuple):
    """One row of the table.

    Attributes:
        installed: its version, None without it.
        admitted: the range, such as ">=5.17,<6"; "" for any.
        tested: the version in launch/constraints.txt for this Python, None where it is not there.
        extra: the extra that asks for it, "" where minillm itself does.
    """

    name: str
    installed: str | None
    admitted: str
    tested: str | None
    extra: str = ""

    @property
    def verdict(self) -> str:
        if self.installed is None:
            return OPTIONAL if self.extra else MISSING
        if outside := judge(self.installed, self.admitted):
            return outside
        return AS_TESTED if self.tested and _plain(self.installed) == _plain(self.tested) else ADMITTED


def installed_version(name: str) -> str | None:
    """What importing it would find, by its metadata; None without it."""
    return _installed().get(_normal(name))


def judge(version: str, admitted: str) -> str:
    """TOO_OLD, TOO_NEW, or "" where `version` is inside the range (parts other than >= and < are not looked at)."""
    for part in filter(None, admitted.split(",")):
        operator, bound = re.fullmatch(r"\s*([<>=!~]+)\s*(\S+)\s*", part).groups()
        if operator == ">=" and _release(version) < _release(bound):
            return TOO_OLD
        if operator == "<" and _release(version) >= _release(bound):
            return TOO_NEW
    return ""


def _plain(version: str) -> str:
    return version.partition("+")[0]


def _release(version: str) -> tuple[int, ...]:
    """(2, 13) of 2.13.0+cpu: its numbers without trailing zeros."""
    numbers = [int(number) for number in re.match(r"v?(?:\d+!)?(\d+(?:\.\d+)*|)", version)[1].split(".") if number]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def distributions() -> list[Distribution]:
    """Every installed distribution that provides `minillm`, one for each folder: the one that was installed last."""
    found: dict[Path, tuple[float, Distribution]] = {}
    for place, names in _metadata_folders():
        for name in names:
            info = os.path.join(place, name)
            try:
                with open(os.path.join(info, "top_level.txt"), encoding="utf-8") as file:
                    provides_it = "minillm" in file.read().split()
                if provides_it and name.endswith(".dist-info"):  # an .egg-info is what a build left in a checkout
                    changed = os.stat(os.path.join(info, "METADATA")).st_mtime
                    distribution = _read(Path(info))
                    if changed >= found.get(distribution.root, (0.0,))[0]:
                        found[distribution.root] = (changed, distribution)
            except OSError:
                continue
    return [distribution for _, distribution in found.values()]


@functools.cache
def _metadata_folders() -> list[tuple[str, list[str]]]:
    """For each folder of sys.path the names of what installers left there."""  # importlib.metadata: 10 times as long
    found = []
    for place in dict.fromkeys(sys.path):
        try:
            names = os.listdir(place or ".")
        except OSError:  # not there, or a zip
            continue
        found.append((place, [name for name in names if name.endswith((".dist-info", ".egg-info"))]))
    return found


@functools.cache
def _installed() -> dict[str, str]:
    """Package -> version of everything that is installed."""
    versions: dict[str, str] = {}
    for _, names in _metadata_folders():
        for name in names:
            package, _, version = name.rpartition(".")[0].partition("-")
            if version:
                versions.setdefault(_normal(package), version.partition("-")[0])
    return versions


def _read(info: Path) -> Distribution:
    headers = (info / "METADATA").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    fields: dict[str, list[str]] = {}
    for name, colon, value in (line.partition(": ") for line in headers):
        if colon:
            fields.setdefault(name, []).append(value)
    root = info.parent
    origin = info / "direct_url.json"
    if origin.is_file():
        told = json.loads(origin.read_text(encoding="utf-8"))
        if told.get("dir_info", {}).get("editable"):
            from urllib.parse import unquote, urlsplit  # pathlib has imported it

            root = Path(unquote(urlsplit(told["url"]).path))
    return Distribution(fields["Name"][0], fields["Version"][0], root.resolve(), tuple(fields.get("Requires-Dist", ())))


def own_distribution(found: list[Distribution]) -> Distribution | None:
    """The one whose `minillm` is running; None where a checkout runs that was not installed."""
    return next((distribution for distribution in found if distribution.root == PACKAGE.parent), None)


def admitted_ranges(distribution: Distribution | None) -> dict[str, tuple[str, str]]:
    """Package -> (range, extra), minillm's own requirements first; empty without a distribution."""
    ranges: dict[str, tuple[str, str]] = {}
    for requirement in distribution.requires if distribution else ():
        name, specifier, marker = re.match(r"([\w.-]+)\s*\(?([^;)]*)\)?\s*(.*)", requirement).groups()
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)", marker)
        specifier = ",".join(sorted(filter(None, specifier.replace(" ", "").split(",")), reverse=True))
        ranges.setdefault(_normal(name), (specifier, extra[1] if extra else ""))
    return ranges


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def constraints_file() -> Path | None:
    """launch/constraints.txt: of the checkout, or of a wheel that carries it."""
    places = (PACKAGE / "launch" / "constraints.txt", PACKAGE.parent / "launch" / "constraints.txt")
    return next((place for place in places if place.is_file()), None)


def tested_versions() -> dict[str, str]:
    """Package -> its version in launch/constraints.txt on this Python and system; empty without the file."""
    path = constraints_file()
    try:
        from packaging.markers import Marker  # not at every start; transformers brings it
    except ModuleNotFoundError:
        return {}
    tested = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path else ():
        pin, _, marker = line.partition(";")
        name, equal, version = pin.partition("==")
        if equal and not line.startswith("#") and (not marker or Marker(marker).evaluate()):
            tested[_normal(name.strip())] = version.strip()
    return tested


def packages() -> list[Package]:
    """Every direct requirement, minillm's own first; where nothing says what they are, those that move."""
    tested = tested_versions()
    ranges = admitted_ranges(own_distribution(distributions())) or dict.fromkeys(MOVING, ("", ""))
    return [Package(name, installed_version(name), admitted, tested.get(name), extra)
            for name, (admitted, extra) in ranges.items()]  # fmt: skip


def check_environment(needed: tuple[str, ...] = ()) -> None:
    """Refuse versions that minillm does not admit, and two minillms; called by the entry points before they import.

    Args:
        needed: packages that have to be there; of the others only the versions that are there are looked at.

    Raises:
        UserError: one line; MINILLM_ANY_VERSION=1 makes it a warning.
    """
    problem = environment_problem(needed)
    if problem is None:
        return
    if os.environ.get("MINILLM_ANY_VERSION") != "1":
        raise UserError(problem)
    if os.environ.get("RANK", "0") == "0":
        print(f"[minillm] warning: {problem}", file=sys.stderr, flush=True)


def environment_problem(needed: tuple[str, ...] = ()) -> str | None:
    """What `check_environment` refuses, in one line that ends in the command which mends it; None where all is well."""
    found = distributions()
    return two_minillms(found) or wrong_versions(admitted_ranges(own_distribution(found)), needed)


def two_minillms(found: list[Distribution]) -> str | None:
    """What is wrong where two distributions provide `minillm`: which one runs depends on the current folder."""
    if len(found) < 2:
        return None
    both = " and ".join(f"{one.name} {one.version} in {one.root}" for one in found)
    other = next((one for one in found if one.root != PACKAGE.parent), found[0])
    return (
        f"this environment has two minillms, {both}; {PACKAGE.parent} runs now. "
        f"Remove the other: {_pip()} uninstall {other.name}"
    )


def wrong_versions(ranges: dict[str, tuple[str, str]], needed: tuple[str, ...]) -> str | None:
    """One line: which package, what is admitted, what was tested, the command that mends it."""
    bad = []
    for name in (*MOVING, *needed):
        version, (admitted, _) = installed_version(name), ranges.get(name, ("", ""))
        if version is None and name in needed and not is_installed(name):
            bad.append((name, "is not installed", admitted))
        elif version is not None and (outside := judge(version, admitted)):
            bad.append((name, f"{version} is {outside}", admitted))
    if not bad:
        return None
    return sentence(bad)


def require_installed(needed: tuple[str, ...]) -> None:
    """Where the wrong Python was called, say so before the first import fails.

    Raises:
        UserError: one line that names what is missing.
    """
    missing = [name for name in needed if not is_installed(name)]
    if missing:
        ranges = admitted_ranges(own_distribution(distributions()))
        raise UserError(sentence([(name, "is not installed", ranges.get(name, ("", ""))[0]) for name in missing]))


def is_installed(name: str) -> bool:
    """By its metadata, or, where a build left none, by looking for the module."""
    return installed_version(name) is not None or bool(find_spec({"pyyaml": "yaml"}.get(name, name)))


def sentence(bad: list[tuple[str, str, str]]) -> str:
    """(package, what is wrong, admitted range) of each, in one line that ends in the command which mends it."""
    tested = tested_versions()
    parts = []
    for name, what, admitted in dict.fromkeys(bad):
        known = ", ".join(filter(None, [f"admitted {admitted}" * bool(admitted),
                                        f"tested {tested.get(name)}" * (name in tested)]))  # fmt: skip
        parts.append(f"{name} {what}" + f" ({known})" * bool(known))
    return f"{'; '.join(parts)}. Mend it: {mending_command([(name, admitted) for name, _, admitted in bad], tested)}"


def mending_command(bad: list[tuple[str, str]], tested: dict[str, str]) -> str:
    """In a checkout the whole installation again, with what was tested; else those packages."""
    path = constraints_file()
    if (PACKAGE.parent / "setup.py").is_file():
        constraints = f" -c {shlex.quote(str(path))}" if path else ""
        return f"{_pip()} install -e {shlex.quote(str(PACKAGE.parent))}{constraints}"
    pins = dict((name, f"=={tested[name]}" if name in tested else admitted) for name, admitted in bad)
    return f"{_pip()} install {' '.join(shlex.quote(name + pin) for name, pin in pins.items())}"


def _pip() -> str:
    return f"{shlex.quote(sys.executable)} -m pip"


def strangers(found: list[Distribution]) -> str | None:
    """A sentence where this environment's minillm is another one than the one that runs; None where all is one."""
    if not found or own_distribution(found):
        return None
    return (
        f"{PACKAGE.parent} runs, but this environment has {found[0].name} from {found[0].root}, which runs from other "
        f"folders; to have this one: {_pip()} install -e {shlex.quote(str(PACKAGE.parent))}"
    )

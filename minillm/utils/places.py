"""Where the files of minillm stand that are not modules: launch scripts, run configurations, DeepSpeed's JSON.

Contract: they are beside minillm/ in a checkout, and inside it where a wheel was installed (setup.py puts them there).
What a command line names is first a path, seen from the current folder, and only then one of these files. Stdlib only.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def home() -> Path:
    """The folder that holds launch/ and ds_configs/: the checkout, or the package of an installed wheel."""
    return PACKAGE if (PACKAGE / "launch").is_dir() else PACKAGE.parent


def launch_dir() -> Path:
    """The launch scripts."""
    return home() / "launch"


def configs_dir() -> Path:
    """The run configurations, *.yaml."""
    return launch_dir() / "configs"


def deepspeed_dir() -> Path:
    """DeepSpeed's configurations, *.json."""
    return home() / "ds_configs"


def find_named(given: str | Path, folder: Path, suffix: str) -> Path | None:
    """The file that a command line means: a path, else one of `folder`, named as there, or without its suffix, or as
    its path in the checkout; None where there is none."""
    candidates = (Path(given), folder / given, folder / f"{given}{suffix}", home() / given)
    return next((path for path in candidates if path.is_file()), None)

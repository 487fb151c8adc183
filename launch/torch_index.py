"""Where to take torch from on this machine: prints the address of an extra package index, or nothing.

usage: PYTHON launch/torch_index.py        (PYTHON: of the environment into which torch is to be installed)

Contract: stdlib only, a few seconds, never an error. MINILLM_TORCH_INDEX wins (empty: none). Else, where torch would
come with gigabytes of libraries for a GPU that is not there (x86-64 Linux without an NVIDIA driver, and no other build
of torch installed), PyTorch's own index of CPU builds, if it answers; if not, one line on stderr.
"""

import importlib.metadata
import os
import platform
import shutil
import sys
import urllib.request
from pathlib import Path

CPU_BUILDS = "https://download.pytorch.org/whl/cpu"


def has_nvidia():
    """Whether a driver shows itself, by its tool, its module or its devices."""
    seen = shutil.which("nvidia-smi") or Path("/proc/driver/nvidia").exists() or any(Path("/dev").glob("nvidia*"))
    return bool(seen)


def installed_torch():
    """Its version, None without one."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None


def torch_index():
    """The address, "" for none."""
    if "MINILLM_TORCH_INDEX" in os.environ:
        return os.environ["MINILLM_TORCH_INDEX"]
    here = (platform.system(), platform.machine()) == ("Linux", "x86_64")
    if not here or has_nvidia() or not (installed_torch() or "+cpu").endswith("+cpu"):
        return ""
    try:
        with urllib.request.urlopen(f"{CPU_BUILDS}/torch/", timeout=3):
            return CPU_BUILDS
    except OSError as error:
        print(f"no GPU here, but {CPU_BUILDS} does not answer ({error}): torch comes from the usual index, "
              "perhaps with 3 GB of GPU libraries", file=sys.stderr)  # fmt: skip
        return ""


if __name__ == "__main__":
    print(torch_index())

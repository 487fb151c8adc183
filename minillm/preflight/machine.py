"""The machine before a run: device, driver, cores, memory, limits, and what is installed.

Contract: `look` runs in a child of every rank (child.py): a dead network file system or a driver that hangs
is timed out there. What belongs to a machine is looked at by its first rank only.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import re
import resource
from itertools import combinations
from pathlib import Path

import torch

from minillm.compat.versions import TRAINING, environment_problem
from minillm.preflight.child import Report
from minillm.preflight.disk import disk_row, space
from minillm.preflight.rows import FAIL, OK, WARN, Row
from minillm.run_folder import RunFolder, describe_environment
from minillm.utils import distributed

GIB = 2**30
LEAST_SHM = 1 * GIB  # NCCL takes about 10 MiB a channel and pair; Docker's default of 64 MiB is too little
LEAST_FILES = 4096


def look(
    report: Report,
    hosts: list[str],
    run_root: str,
    cache_dir: str,
    run_dir: str,
    checkpoint_bytes: int | None,
    keep: int,
    precision: str | None,
) -> dict[str, object]:
    """Everything this rank can say by itself.

    Args:
        hosts: the machine of each rank.
        run_dir: the run's folder, whose checkpoints are there already where it resumes.
        checkpoint_bytes: of one checkpoint; None where no run is planned or its model is not known yet.
        precision: of the run, None without one.

    Returns:
        `rows`, `versions` (see compare_versions), `peer_access` of this node's GPUs.
    """
    rows: list[Row] = []
    rank = distributed.rank()
    ranks_on_host, first_on_host = hosts.count(hosts[rank]), hosts.index(hosts[rank]) == rank
    report.stage("looking at the device")
    rows += device_rows(precision, ranks_on_host, first_on_host)
    if rank == 0:
        report.stage(f"writing to run_root {run_root}")
        planned = None
        if checkpoint_bytes is not None:
            files = [file for one in RunFolder(Path(run_dir)).checkpoints() for file in one.path.iterdir()]
            held = sum(file.stat().st_size for file in files)
            planned = (checkpoint_bytes, keep, held)
        rows.append(disk_row("disk run_root", Path(run_root), planned))
    if first_on_host:
        report.stage(f"writing to data.cache_dir {cache_dir}")
        rows.append(disk_row("disk cache_dir", Path(cache_dir), None))
        report.stage("looking at memory and limits")
        rows += host_rows(ranks_on_host)
    report.stage("asking for versions")
    access = peer_access() if first_on_host else None
    return {"rows": [row.as_dict() for row in rows], "versions": versions(), "peer_access": access}


def device_rows(precision: str | None, ranks_on_host: int, first_on_host: bool) -> list[Row]:
    """Device, driver against torch's build, and devices against ranks."""
    driver = nvidia_driver()
    if torch.cuda.is_available():
        return [gpu_count_row(torch.cuda.device_count(), ranks_on_host), gpu_row(precision), cuda_row(driver)]
    return [cpu_row(precision, ranks_on_host), *([no_cuda_row(driver)] if first_on_host else [])]


def gpu_count_row(num_gpus: int, ranks_on_host: int) -> Row:
    """Visible GPUs against the ranks of this machine."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = f"{ranks_on_host} on this machine, {num_gpus} visible GPUs"
    found += f" (CUDA_VISIBLE_DEVICES={visible})" if visible is not None else ""
    if ranks_on_host > num_gpus:
        fix = f"one rank a GPU: start {num_gpus} (deepspeed --num_gpus {num_gpus}), check CUDA_VISIBLE_DEVICES, or "
        fix += "train on CPUs with DS_ACCELERATOR=cpu"
        return Row("ranks", FAIL, found, fix)
    if ranks_on_host < num_gpus:
        fix = f"deepspeed --num_gpus {num_gpus} to use them all; --include localhost:0,1 or CUDA_VISIBLE_DEVICES if not"
        return Row("ranks", WARN, found, fix)
    return Row("ranks", OK, found)


def gpu_row(precision: str | None) -> Row:
    """This rank's GPU: a product on it, its memory, and whether it knows the run's precision."""
    device = distributed.default_device()
    if device.index >= torch.cuda.device_count():
        return Row("device", FAIL, f"there is no GPU {device.index}", "see the row `ranks`")
    torch.cuda.set_device(device)
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    try:
        ones = torch.ones(64, 64, device=device)
        right = bool(((ones @ ones) == 64).all())
    except RuntimeError as error:  # no kernel image, an uncorrectable memory error, a card that fell off the bus
        first = str(error).splitlines()[0]
        fix = (
            f"`no kernel image`: this torch is built for {', '.join(torch.cuda.get_arch_list())}, the card is "
            f"sm_{capability[0]}{capability[1]}: install a torch built for it; else look at `dmesg | grep -i xid`"
        )
        return Row("device", FAIL, f"{name}: {first}", fix)
    free, total = torch.cuda.mem_get_info(device)
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    found = f"{name}, {total / GIB:.1f} GiB ({free / GIB:.1f} free), sm_{capability[0]}{capability[1]}, bf16 " + (
        "yes" if bf16 else "no"
    )
    values = {"name": name, "memory": total, "free": free, "capability": list(capability), "bf16": bf16}
    if not right:
        return Row("device", FAIL, f"{found}; a product of ones is wrong", "this card computes wrongly: take it out")
    if precision == "bf16" and not bf16:
        return Row("device", FAIL, found, "this card has no bf16: use ds_configs/zero2_fp16.json", values)
    if free < 0.9 * total:
        fix = "another process holds memory on it (nvidia-smi shows which): stop it, or expect to run out"
        return Row("device", WARN, found, fix, values)
    return Row("device", OK, found, values=values)


def cuda_row(driver: str | None) -> Row:
    """The driver, what torch was built with, and NCCL."""
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    found = f"driver {driver or 'unknown'}{_newest_cuda()}, "
    found += f"torch {torch.__version__} built with CUDA {torch.version.cuda}, NCCL {nccl}"
    return Row("CUDA", OK, found, values={"driver": driver, "cuda": torch.version.cuda, "nccl": nccl})


def _newest_cuda() -> str:
    """What the driver's own library says it can run, in brackets; nothing where it does not answer."""
    version = ctypes.c_int()
    try:
        status = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return ""
    return "" if status else f" (CUDA up to {version.value // 1000}.{version.value % 1000 // 10})"


def cpu_row(precision: str | None, ranks_on_host: int) -> Row:
    """Cores a rank and whether they multiply bf16."""
    cores = len(os.sched_getaffinity(0))
    share = max(1, cores // ranks_on_host)
    bf16 = cpu_multiplies_bf16()
    found = f"CPU {cpu_name()}, {share} of {cores} cores a rank, bf16 instructions: "
    found += "yes" if bf16 else "no (bf16 is multiplied in fp32)"
    values = {"cores": cores, "cores_a_rank": share, "bf16": bf16}
    if precision == "fp16":
        return Row("device", FAIL, found, "fp16 needs a GPU: use a bf16 JSON, such as ds_configs/zero2.json", values)
    if ranks_on_host > cores:
        return Row("device", WARN, found, f"{ranks_on_host} ranks share {cores} cores: start {cores} at most", values)
    return Row("device", OK, found, values=values)


def cpu_multiplies_bf16() -> bool:
    """models/linear.py's answer, without its package, whose imports (transformers) take longer than all other rows."""
    path = Path(__file__).resolve().parents[1] / "models" / "linear.py"
    spec = importlib.util.spec_from_file_location("minillm_linear", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CPU_MULTIPLIES_BF16


def no_cuda_row(driver: str | None) -> Row:
    """Why torch sees no GPU, where there might be one."""
    build = torch.version.cuda
    found = f"torch {torch.__version__} " + (f"built with CUDA {build}" if build else "is a CPU build")
    if driver is None and build is None:
        return Row("CUDA", OK, f"{found}; no NVIDIA driver here: training runs on the CPU")
    if driver is None:
        fix = "a machine with GPUs: install NVIDIA's driver, or start the container with --gpus all; else nothing"
        return Row("CUDA", WARN, f"{found}, but there is no NVIDIA driver: training runs on the CPU", fix)
    if build is None:
        fix = "install torch's CUDA build: the pip command that https://pytorch.org/get-started shows for this driver"
        return Row("CUDA", FAIL, f"{found}, but the NVIDIA driver {driver} is here", fix)
    fix = (
        "the driver is older than this build needs (CUDA 13 needs driver 580, CUDA 12 needs 525), or "
        "CUDA_VISIBLE_DEVICES is empty, or the container has no GPU (--gpus all): `nvidia-smi` shows which"
    )
    return Row("CUDA", FAIL, f"{found}, driver {driver}, but no GPU can be used", fix)


def nvidia_driver() -> str | None:
    """The kernel driver's version, None where there is none."""
    with contextlib.suppress(OSError):
        return Path("/sys/module/nvidia/version").read_text().strip()
    with contextlib.suppress(OSError):  # some containers show only this one
        found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", Path("/proc/driver/nvidia/version").read_text())
        return found.group() if found else None
    return None


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return "of unknown make"


def peer_access() -> dict[str, bool]:
    """torch.cuda.can_device_access_peer of every pair of visible GPUs, both ways."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        f"{low}-{high}": torch.cuda.can_device_access_peer(low, high) and torch.cuda.can_device_access_peer(high, low)
        for low, high in combinations(range(count), 2)
    }


def host_rows(ranks_on_host: int) -> list[Row]:
    """/dev/shm, memory and open files of this machine."""
    return [shm_row(ranks_on_host), memory_row(), files_row()]


def shm_row(ranks_on_host: int) -> Row:
    """NCCL without peer access, and DeepSpeed's loaders, go through /dev/shm."""
    if not Path("/dev/shm").is_dir():
        fix = "mount it: mount -t tmpfs tmpfs /dev/shm"
        return Row("/dev/shm", WARN if ranks_on_host > 1 else OK, "not there", fix if ranks_on_host > 1 else "")
    free, total = space(Path("/dev/shm"))
    found = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if ranks_on_host > 1 and free < LEAST_SHM:
        fix = "docker run --shm-size=8g (Kubernetes: an emptyDir of medium Memory there); delete stale nccl-* files"
        return Row("/dev/shm", WARN, found, fix, {"free": free})
    return Row("/dev/shm", OK, found, values={"free": free})


def memory_row() -> Row:
    """What this process may still take: of the machine, and of its control group (a container or a SLURM job)."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    found = f"{free / GIB:.1f} of {total / GIB:.1f} GiB available"
    limit = group_memory()
    if limit is not None and limit < total:
        found += f", limited to {limit / GIB:.1f} GiB by the control group"
        free = min(free, limit)
    if free < 2 * GIB:
        fix = "under 2 GiB are left for loading and saving: stop other programs, or ask for more"
        return Row("memory", WARN, found, fix, {"free": free})
    return Row("memory", OK, found, values={"free": free})


def group_memory() -> int | None:
    """The control group's memory limit, None without one."""
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            return int(Path(name).read_text())
    return None


def files_row() -> Row:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = ["unlimited" if value == resource.RLIM_INFINITY else f"{value:,}" for value in (soft, hard)]
    found = f"{shown[0]} may be open at once (at most {shown[1]})"
    if soft != resource.RLIM_INFINITY and soft < LEAST_FILES:
        return Row("open files", WARN, found, f"ulimit -n {LEAST_FILES} (many shards and sockets need it)")
    return Row("open files", OK, found)


def versions() -> dict[str, str]:
    """What has to agree over the ranks, and `host`."""
    environment = describe_environment()
    packages = environment["packages"]
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None
    return {
        "host": str(environment["host"]),
        "python": str(environment["python"]),
        **{name: packages.get(name, "none") for name in ("torch", "deepspeed", "transformers")},
        "NCCL": nccl or "none",
        "minillm commit": (environment["commit"] or "none")[:12],
        "minillm source": source_digest(),
        "problem": environment_problem(TRAINING) or "",
    }


def source_digest() -> str:
    """Of every Python file of the package, so that a checkout with changes is told from one without."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]

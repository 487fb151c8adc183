"""Two hosts: network namespaces on this machine, each with an address and an sshd of its own, a virtual cable between.

One rank on each, started by hand with the variables srun sets, and by DeepSpeed's launcher over pdsh and ssh: the same
weights to the last bit, and the gradients went through the cable. Needs root, iproute2, openssh-server and pdsh.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launching import ROOT, TIMEOUT, checkpoint, environment, losses, same_bits, words

pytestmark = pytest.mark.slurm
ADDRESSES = {"here": "10.77.91.1", "there": "10.77.91.2"}
SPACE, LINK = "minillm-there", "mnl0"
STEPS = 6


def sh(*command: object) -> str:
    return subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def hosts():
    missing = [tool for tool in ("ip", "pdsh", "ssh-keygen") if shutil.which(tool) is None]
    if missing or not Path("/usr/sbin/sshd").exists():
        pytest.skip(f"not installed: {', '.join(missing) or 'openssh-server'}")
    if os.geteuid() != 0 or subprocess.run(["ip", "netns", "add", SPACE], capture_output=True).returncode:
        pytest.skip("network namespaces need root and CAP_SYS_ADMIN")
    try:
        sh("ip", "link", "add", LINK, "type", "veth", "peer", "name", LINK, "netns", SPACE)
        for inside, address in (([], ADDRESSES["here"]), (["ip", "netns", "exec", SPACE], ADDRESSES["there"])):
            sh(*inside, "ip", "addr", "add", f"{address}/24", "dev", LINK)
            sh(*inside, "ip", "link", "set", LINK, "up")
            sh(*inside, "ip", "link", "set", "lo", "up")
        yield
    finally:
        subprocess.run(["ip", "netns", "del", SPACE], check=False)
        subprocess.run(["ip", "link", "del", LINK], check=False, capture_output=True)


def bytes_sent() -> int:
    return int(Path(f"/sys/class/net/{LINK}/statistics/tx_bytes").read_text())


@pytest.fixture
def sshd(hosts, tmp_path):
    """An sshd on each host with a key of its own; how to reach them."""
    Path("/run/sshd").mkdir(exist_ok=True)
    key = tmp_path / "key"
    sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
    started = []
    for inside, address in (([], ADDRESSES["here"]), (["ip", "netns", "exec", SPACE], ADDRESSES["there"])):
        options = [f"ListenAddress={address}", "Port=2291", f"AuthorizedKeysFile={key}.pub", f"HostKey={key}",
                   "StrictModes=no", "UsePAM=no", "PidFile=none"]  # fmt: skip
        flags = [word for option in options for word in ("-o", option)]
        command = [*inside, "/usr/sbin/sshd", "-D", "-f", "/dev/null", *flags]
        started.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))
    yield f"-p 2291 -i {key} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    for process in started:
        process.terminate()
        process.wait()


def test_two_hosts_train_like_one(hosts, sshd, tmp_path, tiny_settings):
    settings = {**tiny_settings, "run_root": str(tmp_path), "train.max_steps": STEPS, "train.train_batch_size": 8}
    json_file = str(ROOT / "ds_configs" / "zero2.json")

    def script(name: str) -> list[str]:
        arguments = ["--deepspeed", json_file, "--config", "demo", *words({**settings, "run_name": name})]
        return [str(ROOT / "launch" / "pretrain.py"), *arguments]

    # as srun starts them: one process a host, with its rank in the environment
    common = {**environment(ranks=2), "GLOO_SOCKET_IFNAME": LINK, "MASTER_ADDR": ADDRESSES["here"],
              "MASTER_PORT": "29917", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}  # fmt: skip
    sent = bytes_sent()
    ranks = []
    for rank, inside in enumerate(([], ["ip", "netns", "exec", SPACE])):
        with open(tmp_path / f"rank{rank}.log", "w") as log:
            command = [*inside, sys.executable, *script("by-hand")]
            ranks.append(subprocess.Popen(command, cwd=ROOT, env={**common, "RANK": str(rank)}, stdout=log, stderr=log))
    for rank, process in enumerate(ranks):
        assert process.wait(timeout=TIMEOUT) == 0, (tmp_path / f"rank{rank}.log").read_text()
    assert bytes_sent() - sent > STEPS * 100_000  # gradients and weights went through the cable

    # as DeepSpeed starts them
    (tmp_path / "hostfile").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES.values()))
    (tmp_path / "exports").write_text(f"GLOO_SOCKET_IFNAME={LINK}\n")
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(tmp_path / "hostfile"),
                "--launcher", "pdsh", "--no_ssh_check", "--master_addr", ADDRESSES["here"], "--master_port", "29918"]  # fmt: skip # noqa: E501
    env = {**environment(ranks=2), "PDSH_SSH_ARGS_APPEND": sshd, "DS_ENV_FILE": str(tmp_path / "exports")}
    done = subprocess.run([*launcher, *script("over-ssh")], cwd=ROOT, env=env, capture_output=True, text=True,
                          timeout=TIMEOUT)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"{address}: " in done.stdout for address in ADDRESSES.values())

    assert losses(tmp_path / "by-hand") == losses(tmp_path / "over-ssh")
    assert same_bits(checkpoint(tmp_path / "by-hand", STEPS), checkpoint(tmp_path / "over-ssh", STEPS))

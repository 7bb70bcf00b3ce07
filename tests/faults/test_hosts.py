"""Several machines, as network and process namespaces of this one; needs root and iproute2."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from faults.launcher import CONFIG, write_rows
from faults.test_signals import SLOW_SAVE
from sft_fast.runtime.manifest import find_damage

ROOT = Path(__file__).parents[2]
HOSTS = ROOT.parent / "shared" / "faults" / "hosts.sh"
CONTAINER = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("ip") is None or not HOSTS.is_file(),
        reason="no namespaces can be made here",
    ),
]


@pytest.fixture
def hosts() -> Iterator[None]:
    subprocess.run(["bash", HOSTS, "up", "2"], check=True)
    yield
    subprocess.run(["bash", HOSTS, "down"], check=True)


def train(folder: Path, name: str, place: list[str], *arguments: str) -> "subprocess.Popen[bytes]":
    """`sft_fast train` of one rank in a namespace; what it says goes to folder/NAME.log."""
    config = folder / "run.yaml"
    if not config.exists():
        write_rows(folder / "rows.jsonl")
        values = {"output": folder / "run", "rows": folder / "rows.jsonl"}
        config.write_text(CONFIG.format(steps=100000, cache=folder / "cache", **values))
    command = [sys.executable, "-m", "sft_fast", "train", str(config), "--nproc-per-node", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (folder / f"{name}.log").open("w") as log:
        return subprocess.Popen(
            [*place, *command, *arguments],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def on_hosts(
    folder: Path, *of_second: str, first: Sequence[str] = ()
) -> "list[subprocess.Popen[bytes]]":
    """One run on both hosts; each has arguments of its own."""
    meet = ("--nnodes", "2", "--master-addr", "10.99.0.1", "--master-port", "29500")
    return [
        train(
            folder,
            f"node{rank}",
            ["bash", str(HOSTS), "run", str(rank + 1)],
            *meet,
            *("--node-rank", str(rank)),
            *(of_second if rank else first),
        )
        for rank in range(2)
    ]


def wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        path = run / "status.json"
        if path.exists() and json.loads(path.read_text()).get("step", 0) >= step:
            return
        time.sleep(0.2)
    raise TimeoutError(run)


@pytest.mark.fault("F35")
def test_hosts_with_another_learning_rate_do_not_begin(hosts: None, tmp_path: Path) -> None:
    nodes = on_hosts(tmp_path, "optim.lr=2e-2")
    assert [node.wait(180) for node in nodes] == [2, 2]
    said = (tmp_path / "node0.log").read_text()
    assert "optim.lr: 0.01 on rank 0 (node1); 0.02 on rank 1 (node2)" in said


@pytest.mark.fault("F42")
def test_a_host_that_is_lost_in_a_save_is_named(hosts: None, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW_SAVE.replace("sleep(4)", "sleep(3600)"))
    nodes = on_hosts(tmp_path, "plugins=[slow.py]", first=("plugins=[slow.py]",))
    try:
        deadline = time.monotonic() + 180
        while "slow save" not in (tmp_path / "node1.log").read_text():
            assert time.monotonic() < deadline and nodes[0].poll() is None
            time.sleep(0.2)
        nodes[1].kill()  # and with it the process namespace of its host
        assert nodes[0].wait(90) == 1
    finally:
        for node in nodes:
            node.kill()
            node.wait()
    error = json.loads((tmp_path / "run/error.json").read_text())
    assert (error["rank"], error["host"], error["reported_by"]) == (1, "node2", 0)
    assert "ranks [1] on node2 give no sign of life" in (tmp_path / "node0.log").read_text()
    (checkpoint,) = (tmp_path / "run/checkpoints").glob("step_*")
    assert not find_damage(checkpoint) and checkpoint.name in error["cause"]


@pytest.mark.fault("F33")
def test_a_container_of_the_same_name_does_not_take_a_live_run(tmp_path: Path) -> None:
    first = train(tmp_path, "first", CONTAINER)
    try:
        wait_for_step(tmp_path / "run", 2)
        second = train(tmp_path, "second", CONTAINER)
        assert second.wait(120) == 2
        assert "is in use by process" in (tmp_path / "second.log").read_text()
        step = json.loads((tmp_path / "run/status.json").read_text())["step"]
        wait_for_step(tmp_path / "run", step + 3)
        (tmp_path / "run" / "STOP").touch()
        assert first.wait(60) == 0
    finally:
        first.kill()
        first.wait()

"""Without Slurm: two hosts with their own addresses, by `deepspeed --no_ssh` and by `torchrun`, and a cable pulled."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from hosts import NAMES, two_hosts
from jobs import ROOT, curve, final_weights, lines_of, trained, wait_until

from trainer.watchdog import EXIT_HUNG

pytestmark = pytest.mark.long

SETTINGS = [
    "train.max_steps=6", "train.global_batch_size=16", "train.micro_batch_size=2", "logging.sample_keys=true",
    "checkpoint.save_steps=3", "data.num_workers=1",
]  # fmt: skip
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with two_hosts(tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts


def deepspeed(node: int, hostfile: Path) -> list[str]:
    return [str(BIN / "deepspeed"), "--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(node), "--master_addr",
            "n1", "--master_port", "29517"]  # fmt: skip


def torchrun(node: int, hostfile: Path) -> list[str]:
    return [str(BIN / "torchrun"), "--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(node), "--master-addr",
            "n1", "--master-port", "29517"]  # fmt: skip


class TwoHostJob:
    """One launcher on each host, as a person starts them."""

    def __init__(self, hosts, launcher, config: Path, run: Path, *settings: str):
        hostfile = run.with_suffix(".hosts")
        hostfile.write_text("n1 slots=1\nn2 slots=1\n")
        self.hosts, self.logs = hosts, [run.with_suffix(f".{host}.log") for host in NAMES]
        self.launchers = []
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as on one host: more threads would add up otherwise
        for node, (host, log) in enumerate(zip(NAMES, self.logs, strict=True)):
            command = [*launcher(node, hostfile), "launch/train.py", "--config", str(config), "--set",
                       f"run.output_dir={run}", *settings]  # fmt: skip
            with log.open("w") as file:
                self.launchers.append(
                    hosts.start(
                        host, *command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
                    )
                )

    def said(self) -> str:
        return "".join(f"== {log.name}\n{log.read_text()[-4000:]}" for log in self.logs)

    def end(self, seconds: float = 90) -> list[int]:
        """The launchers' exit codes, once nothing runs on the hosts any more."""
        try:
            codes = [launcher.wait(seconds) for launcher in self.launchers]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.said()}") from None
        _, alive = psutil.wait_procs(self.hosts.processes(), timeout=20)
        assert not alive, f"left behind: {alive}"
        return codes


@pytest.fixture(scope="module")
def one_host(tiny_run, tmp_path_factory) -> Path:
    return trained(tiny_run, tmp_path_factory.mktemp("one") / "run", *SETTINGS)


@pytest.mark.parametrize("launcher", [deepspeed, torchrun])
def test_two_hosts_train_as_one_does(hosts, one_host, tiny_run, tmp_path, launcher):
    job = TwoHostJob(hosts, launcher, tiny_run, tmp_path / "run", *SETTINGS)
    assert job.end() == [0, 0], job.said()
    assert "2 rank(s) on 2 host(s) fit together" in job.said()
    assert curve(tmp_path / "run") == curve(one_host)
    assert final_weights(tmp_path / "run") == final_weights(one_host)


def test_a_cable_pulled_in_mid_step_ends_both_hosts_and_the_run_goes_on_later(hosts, tiny_run, tmp_path):
    run = tmp_path / "run"
    job = TwoHostJob(hosts, deepspeed, tiny_run, run, *SETTINGS, "train.max_steps=100000", "run.hang_seconds=6")
    wait_until(lambda: len(lines_of(run)) >= 4, 60, job.said)
    hosts.set_cable(False)
    try:
        assert job.end(40) == [EXIT_HUNG, EXIT_HUNG], job.said()
    finally:
        hosts.set_cable(True)
    for log, (rank, peer) in zip(job.logs, [(1, "n2"), (0, "n1")], strict=True):
        text = log.read_text()
        assert "error: the job hangs and is ended. Waited for:" in text, job.said()
        assert f"  rank {rank} (host {peer}, process " in text, job.said()
    saved = int((run / "latest").read_text().strip().rpartition("-")[2])
    again = TwoHostJob(hosts, deepspeed, tiny_run, run, *SETTINGS, f"train.max_steps={saved + 3}")
    assert again.end() == [0, 0], again.said()
    assert [line["step"] for line in lines_of(run)] == list(range(1, saved + 4))


def test_a_host_that_cannot_be_reached_is_named_by_the_others(hosts, tiny_run, tmp_path):
    # The cable is out from the start, and n2's rank never gets to the master.
    hosts.set_cable(False)
    try:
        job = TwoHostJob(hosts, waiting_briefly(deepspeed), tiny_run, tmp_path / "run", *SETTINGS)
        assert job.end(40) == [2, 2], job.said()
    finally:
        hosts.set_cable(True)
    on_n1, on_n2 = (log.read_text() for log in job.logs)
    assert "1 of 2 ranks are missing: rank 1 (host n2). Ranks arrived from n1" in on_n1
    assert "rank 1 on host n2 does not reach the master n1:29517" in on_n2


def test_a_run_folder_that_is_not_shared_is_refused_by_host(hosts, tiny_run, tmp_path):
    run = tmp_path / "run"
    run.mkdir()

    def launcher(node: int, hostfile: Path) -> list[str]:
        own_disk = ["sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(run)]
        return [*(own_disk if node == 1 else []), *deepspeed(node, hostfile)]

    job = TwoHostJob(hosts, launcher, tiny_run, run, *SETTINGS)
    assert job.end(60) == [2, 2], job.said()
    on_n1, on_n2 = (log.read_text() for log in job.logs)
    assert f"error: run.output_dir: {run} of host n1 is not seen on:\n  - n2\nput it on a file system" in on_n1
    assert "Traceback" not in on_n1 + on_n2


def waiting_briefly(launcher):
    return lambda node, hostfile: [
        "env", "TRAINER_RENDEZVOUS_SECONDS=5", "TRAINER_HOSTS=n1,n2", *launcher(node, hostfile),
    ]  # fmt: skip

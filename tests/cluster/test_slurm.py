"""Training under a real Slurm: two nodes, chained stages, time limits, and what goes wrong on a cluster."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from hosts import Hosts, two_hosts
from jobs import ROOT, Job, curve, final_weights, lines_of
from slurm import Slurm, slurm_on

pytestmark = pytest.mark.long

SUBMIT = [sys.executable, str(ROOT / "launch" / "slurm" / "submit.py")]
TWO_NODES = ["--nodes", "2", "--tasks-per-node", "1", "--cpus-per-task", "1"]
SETTINGS = [
    "train.max_steps=6", "train.global_batch_size=16", "train.micro_batch_size=2", "logging.sample_keys=true",
    "checkpoint.save_steps=3", "data.num_workers=1",
]  # fmt: skip
STAGE_1 = [*SETTINGS, "freeze=[vision_tower, language_model]"]
STAGE_2 = [*SETTINGS, "model.language_model=null", "model.vision_tower=null", "deepspeed=ds_configs/zero3.json"]
LONG = [*SETTINGS, "train.max_steps=100000"]
"""Of a run that does not end by itself."""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory) -> Hosts:
    with two_hosts(tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def slurm(hosts, tmp_path_factory) -> Slurm:
    folder = tmp_path_factory.mktemp("slurm")
    with slurm_on(hosts, folder) as slurm:
        yield slurm


def submit(slurm: Slurm, config: Path, run: Path, *settings: str, flags: tuple[str, ...] = (), then: tuple = ()):
    """The numbers of the jobs that submit.py starts."""
    said = slurm.command(
        *SUBMIT, *TWO_NODES, "--time", "10", "--save-seconds", "60", *flags, "--config", str(config),
        "--set", f"run.output_dir={run}", *settings, *then, OMP_NUM_THREADS="1",
    )  # fmt: skip
    return [line.split()[1].rstrip(":") for line in said.splitlines()]


def logs(run: Path) -> str:
    return "".join(f"== {log.name}\n{log.read_text()}" for log in sorted((run / "slurm").glob("*.log")))


def nothing_runs(slurm: Slurm) -> bool:
    names = [process.name() for process in slurm.hosts.processes() if process.is_running()]
    return not set(names) - {"slurmctld", "slurmd", "slurmctld: slurmscriptd", "slurmscriptd"}


def test_chained_stages_on_two_nodes_have_the_losses_of_one_host(slurm, tiny_run, tmp_path):
    one, two = tmp_path / "slurm-1", tmp_path / "slurm-2"
    jobs = submit(
        slurm, tiny_run, one, *STAGE_1,
        then=("--then", str(tiny_run), f"run.output_dir={two}", f"model.init_from={one}", *STAGE_2),
    )  # fmt: skip
    assert slurm.job(jobs[1])["Dependency"] == f"afterok:{jobs[0]}(unfulfilled)"
    assert [slurm.end(job, 120, lambda run=run: logs(run)) for job, run in zip(jobs, (one, two), strict=True)] == [
        "COMPLETED", "COMPLETED",
    ], logs(one) + logs(two)  # fmt: skip
    assert "2 ranks on 2 host(s) fit together" in logs(one)

    local = Job(tiny_run, tmp_path / "local-1", *STAGE_1)
    assert local.end() == 0, local.log.read_text()[-3000:]
    local_2 = Job(tiny_run, tmp_path / "local-2", f"model.init_from={tmp_path / 'local-1'}", *STAGE_2)
    assert local_2.end() == 0, local_2.log.read_text()[-3000:]
    assert len(curve(one)) == len(curve(two)) == 6
    assert curve(one) == curve(tmp_path / "local-1")
    assert curve(two) == curve(tmp_path / "local-2")
    assert final_weights(two) == final_weights(tmp_path / "local-2")

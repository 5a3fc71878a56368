"""Training under a real Slurm: two nodes, chained stages, time limits, and what goes wrong on a cluster."""

import sys
from pathlib import Path

import pytest
from hosts import Hosts, two_hosts
from jobs import ROOT, curve, final_weights, lines_of, trained
from slurm import Slurm, slurm_on

pytestmark = pytest.mark.long

SUBMIT = [sys.executable, str(ROOT / "launch" / "slurm" / "submit.py")]
TWO_NODES = ["--nodes", "2", "--gpus-per-node", "1", "--cpus-per-task", "1"]
SETTINGS = [
    "train.max_steps=6", "train.global_batch_size=16", "train.micro_batch_size=2", "logging.sample_keys=true",
    "checkpoint.save_steps=3", "data.num_workers=1",
]  # fmt: skip
STAGE_1 = [*SETTINGS, "train.max_steps=40", "checkpoint.save_steps=100", "freeze=[vision_tower, language_model]"]
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


def submit(
    slurm: Slurm, config: Path, run: Path, *settings: str, flags: tuple = (), then: tuple = (), **variables: str
) -> list[str]:
    """The numbers of the jobs that submit.py starts."""
    said = slurm.command(
        *SUBMIT, *TWO_NODES, "--time", "10", "--save-seconds", "60", *flags, "--config", str(config),
        "--set", f"run.output_dir={run}", *settings, *then, OMP_NUM_THREADS="1", **variables,
    )  # fmt: skip
    return [line.split()[1].rstrip(":") for line in said.splitlines()]


def logs(run: Path) -> str:
    return "".join(f"== {log.name}\n{log.read_text()}" for log in sorted((run / "slurm").glob("*.log")))


def nothing_runs(slurm: Slurm) -> bool:
    names = [process.name() for process in slurm.hosts.processes() if process.is_running()]
    return not set(names) - {"slurmctld", "slurmd", "slurmctld: slurmscriptd", "slurmscriptd"}


@pytest.fixture(scope="module")
def one_host(tiny_run, tmp_path_factory) -> Path:
    """A run that nothing happens to, on one host."""
    return trained(tiny_run, tmp_path_factory.mktemp("one") / "run", *STAGE_1)


def test_chained_stages_on_two_nodes_have_the_losses_of_one_host(slurm, one_host, tiny_run, tmp_path):
    one, two = tmp_path / "slurm-1", tmp_path / "slurm-2"
    jobs = submit(
        slurm, tiny_run, one, *STAGE_1,
        then=("--then", str(tiny_run), f"run.output_dir={two}", f"model.init_from={one}", *STAGE_2),
    )  # fmt: skip
    assert slurm.job(jobs[1])["Dependency"] == f"afterok:{jobs[0]}(unfulfilled)"
    ends = [slurm.end(job, 120, lambda run=run: logs(run)) for job, run in zip(jobs, (one, two), strict=True)]
    assert ends == ["COMPLETED", "COMPLETED"], logs(one) + logs(two)
    assert "2 rank(s) on 2 host(s) fit together" in logs(one)

    local = trained(tiny_run, tmp_path / "local-2", f"model.init_from={one_host}", *STAGE_2)
    assert (len(curve(one)), len(curve(two))) == (40, 6)
    assert curve(one) == curve(one_host)
    assert curve(two) == curve(local)
    assert final_weights(two) == final_weights(local)


def test_a_job_at_its_time_limit_saves_requeues_itself_and_goes_on(slurm, one_host, tiny_run, tmp_path):
    # Slurm looks at limits every 30 s, and signals up to as much too early: each start lives 18 to 48 s. The first two
    # take 100 s for all steps.
    run = tmp_path / "run"
    slow = f"{Path(__file__).with_name('slow')}:{ROOT}"
    (job,) = submit(slurm, tiny_run, run, *STAGE_1, flags=("--time", "1", "--save-seconds", "12"), PYTHONPATH=slow)
    assert slurm.end(job, 240, lambda: logs(run)) == "COMPLETED", logs(run)
    said, restarts = (run / "slurm" / f"{job}.log").read_text(), int(slurm.job(job)["Restarts"])
    assert said.count("USR1: asking the ranks to save") == said.count("back into the queue") == restarts >= 2
    assert curve(run) == curve(one_host)
    assert final_weights(run) == final_weights(one_host)
    slurm.wait_for(lambda: nothing_runs(slurm), 10)


@pytest.fixture
def in_training(slurm, tiny_run, tmp_path):
    """A job that has trained for some steps, and would go on for ever: (its number, its run folder)."""
    run = tmp_path / "run"
    (job,) = submit(slurm, tiny_run, run, *LONG)
    slurm.wait_for(lambda: len(lines_of(run)) >= 4, 60, lambda: logs(run))
    yield job, run
    slurm.hosts.run("n1", "scancel", "--signal=KILL", job, env=slurm.environment)
    slurm.hosts.run("n1", "scancel", job, env=slurm.environment)
    slurm.wait_for(lambda: nothing_runs(slurm), 30, lambda: logs(run))


def saved_step(run: Path) -> int:
    return int((run / "latest").read_text().strip().rpartition("-")[2])


def rank_on(slurm: Slurm, node: str):
    """The training process on a node, without its data workers."""
    own = [p for p in slurm.hosts.processes() if any(word.endswith("launch/train.py") for word in p.cmdline())]
    ranks = [p for p in own if p.parent() not in own]
    return next(p for p in ranks if p.environ()["SLURMD_NODENAME"] == node)


def test_a_cancelled_job_saves_and_stays_cancelled(slurm, in_training):
    job, run = in_training
    slurm.command("scancel", job)
    assert slurm.end(job, 40, lambda: logs(run)) == "CANCELLED"
    slurm.wait_for(lambda: nothing_runs(slurm), 10, lambda: logs(run))
    assert saved_step(run) == len(lines_of(run))
    assert slurm.job(job)["Restarts"] == "0"


def test_a_killed_task_ends_the_job_as_failed(slurm, in_training):
    job, run = in_training
    rank_on(slurm, "n2").kill()
    assert slurm.end(job, 60, lambda: logs(run)) == "FAILED"
    slurm.wait_for(lambda: nothing_runs(slurm), 10, lambda: logs(run))
    assert saved_step(run) >= 3
    assert "back into the queue" not in logs(run)


def test_a_node_that_is_lost_requeues_the_job_which_goes_on_when_it_is_back(slurm, in_training):
    job, run = in_training
    before = len(lines_of(run))
    slurm.kill_slurmd("n2")
    try:
        slurm.wait_for(lambda: slurm.job(job)["JobState"] != "RUNNING", 60, lambda: logs(run))
        assert slurm.job(job)["JobState"] in ("COMPLETING", "PENDING")
        slurm.wait_for(lambda: nothing_runs(slurm), 30, lambda: logs(run))
    finally:
        slurm.start_slurmd("n2")
    slurm.wait_for(lambda: len(lines_of(run)) > before + 4, 60, lambda: logs(run))
    assert slurm.job(job)["Restarts"] == "1"


def test_a_preempted_job_saves_makes_room_and_comes_back(slurm, in_training):
    job, run = in_training
    urgent = slurm.command("sbatch", "--parsable", "-p", "urgent", "-N", "2", "--exclusive", "--output=/dev/null",
                           "--wrap", "sleep 3").strip()  # fmt: skip
    assert slurm.end(urgent, 60, lambda: logs(run)) == "COMPLETED"
    seen = len(lines_of(run))
    slurm.wait_for(lambda: slurm.job(job)["Restarts"] == "1", 30, lambda: logs(run))
    assert saved_step(run) >= seen
    slurm.command("scontrol", "update", f"jobid={job}", "starttime=now")  # Slurm itself lets it wait for a while
    slurm.wait_for(lambda: len(lines_of(run)) > seen, 60, lambda: logs(run))


def test_a_job_cancelled_while_it_starts_leaves_nothing(slurm, tiny_run, tmp_path):
    run = tmp_path / "run"
    (job,) = submit(slurm, tiny_run, run, *LONG)
    slurm.wait_for((run / "slurm" / f"{job}-rank-0.log").exists, 30)  # its ranks import, or look for one another
    slurm.command("scancel", job)
    assert slurm.end(job, 40, lambda: logs(run)) == "CANCELLED"
    slurm.wait_for(lambda: nothing_runs(slurm), 20, lambda: logs(run))
    assert not (run / "latest").exists()


def test_what_slurm_refuses_is_said_before_anything_is_submitted(slurm, tiny_run, tmp_path):
    command = [*SUBMIT, *TWO_NODES, "--time", "10", "--save-seconds", "60", "--config", str(tiny_run), "--set",
               f"run.output_dir={tmp_path}/run"]  # fmt: skip
    done = slurm.hosts.run("n1", *command, "--partition", "nowhere", env=slurm.environment)
    assert done.returncode == 2
    assert "error: sbatch --test-only" in done.stderr
    assert "invalid partition specified: nowhere" in done.stderr
    assert not slurm.command("squeue", "--noheader")


def test_a_later_stage_does_not_wait_for_one_that_has_failed(slurm, tiny_run, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    then = ("--then", str(tiny_run), f"run.output_dir={two}", *SETTINGS)
    # No learning rate is that high: the numbers end before the stage does.
    jobs = submit(slurm, tiny_run, one, *LONG, "train.max_skipped_steps=1", "optim.learning_rate=1e30", then=then)
    assert slurm.end(jobs[0], 60, lambda: logs(one)) == "FAILED"
    assert slurm.job(jobs[0])["ExitCode"] == "2:0"
    assert slurm.end(jobs[1], 60) == "CANCELLED"
    assert not (two / "latest").exists()

"""SIGKILL at any moment: the job ends, nothing is left running, and the next start goes on as if nothing was."""

import random
import signal
import time
from pathlib import Path

import psutil
import pytest
from jobs import Job, curve, final_weights, trained

from trainer.checkpoint import existing
from trainer.manifest import check_whole
from trainer.watchdog import EXIT_HUNG

pytestmark = pytest.mark.long

SETTINGS = [
    "train.max_steps=14", "train.global_batch_size=16", "train.micro_batch_size=2", "logging.sample_keys=true",
    "checkpoint.save_steps=1", "checkpoint.keep_last=3",
]  # fmt: skip
SECONDS = 60
"""In which a job has to end, once a part of it was killed."""

# In every run each part is killed in training and inside a save: 2 x 3 x 2 = 12 moments in all.
PARTS = ["a rank", "the launcher", "all"]
MOMENTS = ["training", "save"]


def targets(job: Job, part: str) -> list[psutil.Process]:
    if part == "a rank":
        return job.ranks()[-1:]
    if part == "the launcher":
        return [parent for parent in [job.ranks()[0].parent()] if parent]
    return job.everyone()


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_a_run_killed_again_and_again_equals_one_left_alone(tiny_run, tmp_path, fault, stage):
    settings = [*SETTINGS, f"deepspeed=ds_configs/{stage}.json"]
    trained(tiny_run, tmp_path / "alone", *settings)

    rng, run, table = random.Random(stage), tmp_path / "run", []
    for part, moment in [(part, moment) for moment in MOMENTS for part in PARTS]:
        job = Job(tiny_run, run, *settings)
        began = job.steps()
        job.wait_for(lambda job=job, began=began: bool(job.ranks()) and job.steps() > began)
        if moment == "save":
            job.wait_for(lambda: any(run.glob(".checkpoint-*.partial")))
        else:
            time.sleep(rng.uniform(0, 0.3))
        at, everyone, struck = job.steps(), job.everyone(), targets(job, part)
        for process in struck:
            process.kill()
        started = time.monotonic()
        code = job.process.wait(SECONDS)
        _, alive = psutil.wait_procs(everyone, timeout=max(0.0, SECONDS - (time.monotonic() - started)))
        assert not alive, f"{part} in {moment}: left behind: {[process.cmdline() for process in alive]}"
        # DeepSpeed's runner takes a launcher that was killed for one that is done.
        assert code != 0 or part == "the launcher", f"{part} in {moment}"
        for checkpoint in existing(run):
            check_whole(checkpoint)
        table.append((part, moment, at, time.monotonic() - started, code))

    trained(tiny_run, run, *settings)
    assert curve(run) == curve(tmp_path / "alone")  # bit for bit, and no sample lost or repeated
    assert final_weights(run) == final_weights(tmp_path / "alone")
    assert not list(Path(run).glob(".checkpoint-*"))
    for part, moment, at, after, code in table:
        seen = f"at step {at}: ended after {after:.0f} s with {code}, resumed"
        fault(f"{stage}: SIGKILL of {part} in {moment}", seen)


def test_a_second_job_on_the_same_folder_is_refused_by_name(tiny_run, tmp_path, fault):
    first = Job(tiny_run, tmp_path / "run", *SETTINGS, "train.max_steps=400")
    first.wait_for(lambda: first.steps() >= 1)
    log = first.log.read_text()
    second = Job(tiny_run, tmp_path / "run", *SETTINGS)
    assert second.end() == 2
    said = second.log.read_text()[len(log) :]
    assert "is in use by process" in said
    assert "choose another run.output_dir" in said
    assert first.process.poll() is None
    for rank in first.ranks():
        rank.send_signal(signal.SIGTERM)
    assert first.end() == 75
    fault("a second job on one folder", "refused by name, exit code 2; the first goes on", equal="-")


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_a_rank_that_stands_still_ends_the_job_and_is_named(tiny_run, tmp_path, fault, stage):
    settings = [*SETTINGS, f"deepspeed=ds_configs/{stage}.json", "run.hang_seconds=8"]
    job = Job(tiny_run, tmp_path / "run", *settings, "train.max_steps=400")
    job.wait_for(lambda: job.steps() >= 2)
    everyone, (_, second) = job.everyone(), job.ranks()
    second.suspend()  # SIGSTOP: neither it nor its watchdog moves
    code = job.process.wait(SECONDS + 30)  # its end by DeepSpeed's launcher takes 30 s, as a stopped process is deaf
    assert code == EXIT_HUNG, job.log.read_text()[-3000:]
    _, alive = psutil.wait_procs(everyone, timeout=30)
    assert not alive, f"left behind: {[process.cmdline() for process in alive]}"
    said = job.log.read_text()
    assert "error: the job hangs and is ended. Waited for:" in said
    assert "  rank 1 (host " in said
    assert (job.run / "heartbeat" / "rank-0.stacks.txt").stat().st_size > 0
    # And the run goes on from its last checkpoint.
    step = max(int(path.name[-6:]) for path in existing(job.run))
    trained(tiny_run, job.run, *settings, f"train.max_steps={step + 2}")
    fault(f"{stage}: a rank that stands still", "named with its samples, exit code 70, resumed", equal="-")

"""SIGKILL at any moment: the job ends, nothing is left running, and the next start goes on as if nothing was."""

import random
import signal
import time
from pathlib import Path

import psutil
import pytest
from jobs import Job, curve, final_weights

from trainer.checkpoint import check_whole, existing

pytestmark = pytest.mark.long

SETTINGS = [
    "train.max_steps=14", "train.global_batch_size=32", "train.micro_batch_size=2", "logging.sample_keys=true",
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
def test_a_run_killed_again_and_again_equals_one_left_alone(tiny_run, tmp_path, stage):
    settings = [*SETTINGS, f"deepspeed=ds_configs/{stage}.json"]
    alone = Job(tiny_run, tmp_path / "alone", *settings)
    assert alone.end() == 0, alone.log.read_text()[-3000:]

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

    last = Job(tiny_run, run, *settings)
    assert last.end() == 0, last.log.read_text()[-3000:]
    print(f"\n{stage}: killed | in | at step | ended after, s | exit code")
    print("\n".join(f"  {part} | {moment} | {at} | {after:.1f} | {code}" for part, moment, at, after, code in table))
    assert curve(run) == curve(tmp_path / "alone")  # bit for bit, and no sample lost or repeated
    assert final_weights(run) == final_weights(tmp_path / "alone")
    assert not list(Path(run).glob(".checkpoint-*"))


def test_a_second_job_on_the_same_folder_is_refused_by_name(tiny_run, tmp_path):
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

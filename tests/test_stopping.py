"""A run that is asked to stop saves one whole checkpoint, says so by its exit code, and goes on as if nothing was."""

import signal
from pathlib import Path

import psutil
import pytest
from conftest import write_tiny_shards
from jobs import Job, curve, final_weights, trained

from trainer.manifest import check_whole
from trainer.stopping import EXIT_STOPPED

pytestmark = pytest.mark.long

# Eight micro-batches a step, so that most signals come between two of them.
SETTINGS = [
    "train.max_steps=12", "train.global_batch_size=32", "train.micro_batch_size=2", "logging.sample_keys=true",
    "checkpoint.save_steps=5", "checkpoint.keep_last=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tiny_run, tmp_path_factory) -> dict[str, Path]:
    """Runs that nothing happens to, under ZeRO-2 and ZeRO-3."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for stage in ("zero2", "zero3"):
        trained(tiny_run, folder / stage, *SETTINGS, f"deepspeed=ds_configs/{stage}.json")
    return {stage: folder / stage for stage in ("zero2", "zero3")}


def in_training(job: Job) -> None:
    job.wait_for(lambda: job.steps() >= 3)


def before_the_first_step(job: Job) -> None:
    job.wait_for(lambda: "rows an epoch" in job.log.read_text())


def in_a_save(job: Job) -> None:
    job.wait_for(lambda: any(job.run.glob(".checkpoint-*.partial")))


def in_evaluation(job: Job) -> None:
    # Held-out data takes most of the time: the second step follows an evaluation that takes seconds.
    job.wait_for(lambda: job.steps() >= 2)


def in_generation(job: Job) -> None:
    # Answers take most of the time, and the phase is written down every second.
    beats = job.run / "heartbeat" / "rank-1.json"
    job.wait_for(lambda: job.steps() >= 1 and '"phase": "generate"' in beats.read_text())


CASES = [
    ("zero2", in_training, signal.SIGTERM, "one rank"),
    ("zero3", in_training, signal.SIGUSR1, "everyone"),
    ("zero3", in_training, signal.SIGINT, "ranks"),
    ("zero2", in_training, signal.SIGHUP, "command"),
    ("zero3", in_training, signal.SIGTERM, "command"),
    ("zero2", before_the_first_step, signal.SIGTERM, "ranks"),
    ("zero2", in_a_save, signal.SIGUSR1, "one rank"),
    ("zero3", in_a_save, signal.SIGTERM, "ranks"),
    ("zero3", in_evaluation, signal.SIGTERM, "one rank"),
    ("zero3", in_generation, signal.SIGUSR1, "one rank"),
    ("zero2", in_generation, signal.SIGTERM, "ranks"),
]


@pytest.mark.parametrize(("stage", "moment", "number", "whom"), CASES)
def test_a_signal_stops_with_a_checkpoint_and_the_run_goes_on(
    undisturbed, tiny_run, tmp_path, fault, stage, moment, number, whom
):
    settings = [*SETTINGS, f"deepspeed=ds_configs/{stage}.json"]
    if moment is in_evaluation:
        write_tiny_shards(tmp_path / "held-out", (400,))
        settings += [
            f"data.eval=[{{name: e, shards: '{tmp_path}/held-out/*.tar'}}]", "eval.every_steps=1", "eval.samples=0",
        ]  # fmt: skip
    if moment is in_generation:
        write_tiny_shards(tmp_path / "held-out", (8,))
        settings += [
            f"data.eval=[{{name: e, shards: '{tmp_path}/held-out/*.tar'}}]", "eval.every_steps=1", "eval.answers=8",
            "eval.max_new_tokens=220",
        ]  # fmt: skip
    job = Job(tiny_run, tmp_path / "run", *settings)
    moment(job)
    targets = job.ranks()[-1:] if whom == "one rank" else job.ranks()
    if whom == "everyone":  # data workers too, as a scheduler does; DeepSpeed's launchers end by it, so not them
        targets = [worker for rank in targets for worker in [*rank.children(recursive=True), rank]]
    if whom == "command":  # that was typed: it ends at once, by DeepSpeed's habit, and the ranks are to follow
        targets = [psutil.Process(job.process.pid)]
    everyone = job.everyone()
    for process in targets:
        process.send_signal(number)
    code = job.end(known=everyone)
    assert code == EXIT_STOPPED or whom == "command", job.log.read_text()[-3000:]
    assert "asked to stop" in job.log.read_text()
    assert "Traceback" not in job.log.read_text()

    latest = job.run / (job.run / "latest").read_text().strip()
    check_whole(latest)
    stopped_at = int(latest.name.rpartition("-")[2])
    assert stopped_at == job.steps() < 12
    if moment in (in_evaluation, in_generation):
        settings += ["eval.every_steps=0"]
    trained(tiny_run, job.run, *settings)
    assert curve(job.run) == curve(undisturbed[stage])
    assert final_weights(job.run) == final_weights(undisturbed[stage])
    where = moment.__name__.replace("_", " ")
    fault(f"{stage}: {number.name} to {whom}, {where}", f"saved at step {stopped_at}, exit code {code}, resumed")

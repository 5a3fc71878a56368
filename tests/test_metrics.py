"""The record of a run: whole lines, the promised curves, no step twice after a resume."""

import json
import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.metrics import Recorder

TAGS = {
    "train/loss", "train/learning_rate/projector", "train/learning_rate/language_model", "train/grad_norm",
    "train/tokens_per_second", "train/images_per_second", "train/data_wait_seconds", "train/memory_gib", "eval/loss",
    "train/truncated_samples", "train/bad_samples",
}  # fmt: skip


def line(step: int, **changes) -> dict:
    """What a step measures. The loss tells the steps apart."""
    return {
        "step": step, "epoch": step / 10, "loss": 100.0 + step, "grad_norm": 0.5,
        "learning_rate": {"projector": 1e-3, "language_model": 2e-5}, "supervised_tokens": 30, "tokens": 60,
        "images": 6, "truncated_samples": 2, "truncated_tokens": 40, "bad_samples": 1, "skipped_steps": 0,
        "step_time": 1.5, "data_time": 0.25, "forward_time": 0.5, "backward_time": 0.6, "optimizer_time": 0.1,
        "tflops": 0.3, "mfu": 0.25, "hfu": None, **changes,
    }  # fmt: skip


def record(folder, start: int, until: int, loss: float = 100.0, every_steps: int = 1, enabled: bool = True) -> None:
    """Records the steps behind `start` up to `until`, and a held-out loss at each."""
    with Recorder(folder, "test", start, 20, every_steps, enabled) as recorder:
        for step in range(start + 1, until + 1):
            recorder.step(line(step, loss=loss + step))
            recorder.evaluation(step, loss + step)


def lines(folder) -> list[dict]:
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]


def points(folder) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value), as TensorBoard shows it."""
    events = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_every_step_has_its_line_and_its_points(tmp_path):
    record(tmp_path, 0, 3)
    assert lines(tmp_path) == [line(1), line(2), line(3)]
    found = points(tmp_path)
    assert found.keys() >= TAGS
    for tag in ("train/loss", "eval/loss"):
        assert found[tag] == [(1, 101.0), (2, 102.0), (3, 103.0)]
    # 60 tokens and 6 images in 1.5 s
    assert found["train/tokens_per_second"][0] == (1, 40.0)
    assert found["train/images_per_second"][0] == (1, 4.0)
    assert found["train/supervised_tokens_per_second"][0] == (1, 20.0)
    assert [
        found[f"train/share/{part}"][0][1] for part in ("data", "forward", "backward", "optimizer")
    ] == pytest.approx([1 / 6, 1 / 3, 0.4, 1 / 15])
    assert found["train/mfu"][0] == (1, 0.25)
    assert "train/hfu" not in found  # of a device whose peak is not known
    assert found["train/data_wait_seconds"][0] == (1, 0.25)
    assert found["train/truncated_samples"][0] == (1, 2.0)
    assert found["train/bad_samples"][0] == (1, 1.0)
    assert found["train/learning_rate/projector"][0][1] == pytest.approx(1e-3)
    assert found["train/learning_rate/language_model"][0][1] == pytest.approx(2e-5)
    # A Python with torch in it takes some tenths of a GiB, and this machine has less than a TiB.
    assert 0.01 < found["train/memory_gib"][0][1] < 1024


def test_every_weighted_source_has_a_curve_of_its_epochs(tmp_path):
    with Recorder(tmp_path, "test", 0, 20, 1, True) as recorder:
        recorder.step(line(1, epoch=0.25, epochs={"cats": 0.25, "dogs": 1.5}))
    found = points(tmp_path)
    assert found["train/epoch"] == [(1, 0.25)]
    assert (found["train/epoch/cats"], found["train/epoch/dogs"]) == ([(1, 0.25)], [(1, 1.5)])


def test_points_come_every_so_many_steps_and_at_both_ends(tmp_path):
    record(tmp_path, 0, 20, every_steps=8)
    assert [found["step"] for found in lines(tmp_path)] == list(range(1, 21))
    assert [step for step, _ in points(tmp_path)["train/loss"]] == [1, 8, 16, 20]


def test_resume_replaces_what_lies_behind_the_checkpoint(tmp_path):
    # A run got to step 7, its last checkpoint is of step 4: steps 5 to 7 are run again, and go another way.
    record(tmp_path, 0, 7)
    record(tmp_path, 4, 9, loss=200.0)
    expected = [(step, (100.0 if step <= 4 else 200.0) + step) for step in range(1, 10)]
    assert [(found["step"], found["loss"]) for found in lines(tmp_path)] == expected
    found = points(tmp_path)
    assert found["train/loss"] == expected
    assert found["eval/loss"] == expected


def test_run_that_starts_anew_leaves_nothing_of_the_one_before(tmp_path):
    record(tmp_path, 0, 3)  # killed before its first checkpoint
    record(tmp_path, 0, 2, loss=200.0)
    assert [found["loss"] for found in lines(tmp_path)] == [201.0, 202.0]
    assert points(tmp_path)["train/loss"] == [(1, 201.0), (2, 202.0)]


@pytest.mark.parametrize("keys", [["s-1"], ["图-1"]], ids=["ASCII", "Chinese"])
def test_last_line_that_a_kill_cut_short_is_dropped(tmp_path, keys):
    record(tmp_path, 0, 2)
    whole = (json.dumps(line(3, samples=keys), ensure_ascii=False) + "\n").encode()
    file = tmp_path / "metrics.jsonl"
    before = file.read_bytes()
    for cut in range(1, len(whole) - 1):  # also inside a character
        file.write_bytes(before + whole[:cut])
        Recorder(tmp_path, "test", 3, 20, 1, True).__exit__(None, None, None)
        assert file.read_bytes() == before, whole[:cut]


def test_keys_may_be_of_any_letters(tmp_path):
    # U+0085 and U+2028 end a line of text for Python, but not for JSON.
    keys = ["图-1", "a\u2028b", "c\u0085d", 'e"\\\n']
    for start in (0, 1):
        with Recorder(tmp_path, "test", start, 20, 1, True) as recorder:
            recorder.step(line(start + 1, samples=keys))
    found = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    assert [json.loads(text)["samples"] for text in found] == [keys, keys]


def test_loss_that_is_no_number_is_none_in_json(tmp_path):
    with Recorder(tmp_path, "test", 0, 20, 1, True) as recorder:
        recorder.step(line(1, loss=math.nan, grad_norm=math.inf, skipped_steps=1))
    (found,) = lines(tmp_path)
    assert (found["loss"], found["grad_norm"]) == (None, None)
    assert points(tmp_path)["train/skipped_steps"] == [(1, 1.0)]


def test_a_line_is_on_disk_as_soon_as_its_step_is_done(tmp_path):
    with Recorder(tmp_path, "test", 0, 20, 1, True) as recorder:
        recorder.step(line(1))
        assert lines(tmp_path) == [line(1)]


def test_other_ranks_write_nothing(tmp_path):
    record(tmp_path / "run", 0, 3, enabled=False)
    assert list(tmp_path.iterdir()) == []

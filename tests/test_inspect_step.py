"""launch/inspect_step.py names the samples that a run really saw, without the run."""

import io
import json
import re

import pytest
from PIL import Image
from ranks import script

from trainer.data.writer import ShardWriter

MODES = {
    "samples": ["train.epochs=1", "train.max_steps=null"],
    "packs": ["data.packing=true", "train.global_batch_size=2"],
    "token budget": ["train.micro_batch_tokens=200"],
}


@pytest.mark.parametrize("mode", MODES)
def test_the_samples_of_a_step_are_those_that_the_run_saw(tiny_run, tmp_path, mode):
    settings = [*MODES[mode], "data.max_length=90", "logging.sample_keys=true", f"run.output_dir={tmp_path}/run"]
    done = script("launch/train.py", "--config", str(tiny_run), "--set", *settings)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for line in (lines[0], lines[-1]):
        # From the configuration that the run has left.
        done = script("launch/inspect_step.py", "--config", str(tmp_path / "run"), "--step", str(line["step"]))
        assert done.returncode == 0, done.stderr
        rows = [re.split(r"\s+", row.strip(), maxsplit=6) for row in done.stdout.splitlines()[1:]]
        assert [row[6].partition(":")[0].partition(".tar/")[2] for row in rows] == line["samples"]
        assert {row[1] for row in rows} == {"tiny"}
        for column, count in ((2, "tokens"), (3, "truncated_tokens"), (4, "supervised_tokens"), (5, "images")):
            assert sum(int(row[column]) for row in rows) == line[count], count


def test_a_picture_that_cannot_be_decoded_is_left_out_as_in_the_run_and_no_escape_reaches_the_terminal(
    tiny_run, tmp_path
):
    file = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(file, "PNG")
    picture = file.getvalue()
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red \x1b[2J\u202e \x9b blue"}]
    with ShardWriter(tmp_path / "shards", "bad") as writer:
        for key, png in {"cut": picture[:-40], "a\x1b[31m\u202e": picture}.items():
            writer.write(key, {"png": png, "json": {"conversations": turns}})
    settings = [f"data.train=[{{name: bad, shards: '{tmp_path}/shards/*.tar'}}]", "train.global_batch_size=2"]
    settings += ["train.max_steps=1", "data.max_bad_fraction=1", f"run.output_dir={tmp_path}/run"]
    done = script("launch/train.py", "--config", str(tiny_run), "--set", *settings)
    assert done.returncode == 0, done.stderr
    (line,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    done = script("launch/inspect_step.py", "--config", str(tiny_run), "--step", "1", "--set", *settings)
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()[1:]
    (left_out,) = [row for row in rows if "left out: " in row]
    assert re.search(r"left out: \S+\.tar/cut: the picture cannot be decoded", left_out)
    (trained,) = [row for row in rows if row != left_out]
    assert int(trained.split()[2]) == line["tokens"]
    assert trained.endswith(r".tar/a\x1b[31m\u202e: red \x1b[2J\u202e \x9b blue")


def test_a_step_behind_the_end_and_one_before_the_start_are_named(tiny_run):
    # Three steps of eight are an epoch of 24.
    settings = ["--set", "train.epochs=1", "train.max_steps=null"]
    done = script("launch/inspect_step.py", "--config", str(tiny_run), "--step", "4", *settings)
    assert (done.returncode, "--step 4: the run ends with step 3" in done.stderr) == (2, True)
    done = script("launch/inspect_step.py", "--config", str(tiny_run), "--step", "0", *settings)
    assert (done.returncode, "steps count from 1" in done.stderr) == (2, True)

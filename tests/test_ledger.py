"""Bad samples: each is named, a resumed run names the same ones, and too many end the run on all ranks.

Runs are of two real ranks. What is to be in the ledger is known from how the shards are written.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
from commands import command, launcher
from conftest import write_tiny_shards
from pairs import pair, picture
from ranks import TIMINGS, run_ranks

from trainer.config import Config
from trainer.data.samples import Rejected
from trainer.data.writer import ShardWriter
from trainer.errors import EXIT_USER_ERROR, DataError, UserError

MALFORMED, UNDECODABLE = "malformed conversation", "picture cannot be decoded"
NO_ANSWER, MISCOUNTED = "no answer", "images and marks differ in number"

# Members of each sample and what is wrong with it; None: nothing.
MIXED: dict[str, tuple[dict, str | None]] = {
    "good": (pair("good"), None),
    "图-1": ({"png": b"no picture", "json": pair("图-1")["json"]}, UNDECODABLE),
    "cut": ({"png": picture("red")[:40], "json": pair("cut")["json"]}, UNDECODABLE),
    "list": ({"json": b"[]"}, MALFORMED),
    "silent": ({"png": picture("red"), "txt": b" "}, NO_ANSWER),
    "also-good": (pair("also-good"), None),
    "lost": ({"json": pair("lost")["json"]}, MISCOUNTED),
}
BAD = {key: kind for key, (_, kind) in MIXED.items() if kind}


def write_mixed_shard(folder: Path, keys: Iterable[str] = MIXED) -> Path:
    with ShardWriter(folder, "mixed") as writer:
        for key in keys:
            writer.write(key, MIXED[key][0])
    return writer.shards[0]


def json_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


# --- In a run ---

STEPS, STOP = 7, 3


def trained(world, config_file: str, settings: list[str], resume: str, until: int | None) -> str | None:
    """Trains; what a user's error said, if there was one."""
    from trainer.setup import setup
    from trainer.train import train

    config = Config.load(config_file, settings, world.world_size)
    try:
        state = setup(config, world, resume)
        train(state, until)
        state.engine.destroy()
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    return None


def all_runs(world, config_file: str, out: str) -> dict[str, str | None]:
    """A straight run, one that stops and goes on, and one whose held-out samples alone are bad."""
    shards = [f"{out}/shards/*.tar", f"{out}/bad/*.tar"]
    common = ["logging.sample_keys=true", f"train.max_steps={STEPS}", "checkpoint.save_steps=3", "data.num_workers=1"]
    mixed = [*common, f"data.train=[{{name: a, shards: {shards}}}]", "data.max_bad_fraction=0.5"]
    held_out = [
        *common, f"data.train=[{{name: a, shards: '{shards[0]}'}}]", f"data.eval=[{{name: b, shards: {shards}}}]",
        "data.max_bad_fraction=0", "eval.every_steps=3", "eval.samples=0",
    ]  # fmt: skip
    found = {
        "straight": trained(world, config_file, [*mixed, f"run.output_dir={out}/straight"], "none", None),
        "stopped": trained(world, config_file, [*mixed, f"run.output_dir={out}/resumed"], "none", STOP + 1),
        "held-out": trained(world, config_file, [*held_out, f"run.output_dir={out}/held-out"], "none", STOP),
        "held-out, resumed": trained(world, config_file, [*held_out, f"run.output_dir={out}/held-out"], "auto", None),
    }
    if world.is_main:
        # As after a kill: the newest checkpoint is of step 3, and there are lines of step 4 and a half one behind it.
        shutil.rmtree(f"{out}/resumed/checkpoint-000004")
        Path(out, "resumed", "latest").write_text("checkpoint-000003\n")
        with Path(out, "resumed", "bad_samples.jsonl").open("a") as file:
            file.write('{"step": 4, "shard": "x')
        write_mixed_shard(Path(out, "only-bad"), BAD)
    from trainer.dist import barrier

    barrier()
    nothing = [*held_out, f"data.eval=[{{name: b, shards: '{out}/only-bad/*.tar'}}]", f"run.output_dir={out}/nothing"]
    found["nothing held out"] = trained(world, config_file, nothing, "none", None)
    found["resumed"] = trained(world, config_file, [*mixed, f"run.output_dir={out}/resumed"], "auto", None)
    return found


@pytest.fixture(scope="module")
def out(tiny_run, tmp_path_factory) -> Path:
    """The folder of the runs: 24 tiny samples, all good, and 7 of which 5 are bad."""
    out = tmp_path_factory.mktemp("ledger")
    write_tiny_shards(out / "shards")
    write_mixed_shard(out / "bad")
    for found in run_ranks(all_runs, 2, str(tiny_run), str(out), timeout=300):
        # No loss can be taken of held-out samples that are all bad: 0.0000 would look like a perfect model.
        assert found.pop("nothing held out").startswith(
            "DataError: data.eval: no held-out sample has a token to predict"
        )
        assert found == dict.fromkeys(["straight", "stopped", "held-out", "held-out, resumed", "resumed"])
    return out


def test_every_bad_sample_is_named_with_its_step_shard_key_and_kind(out):
    # 7 steps of 8 are 56 samples: an epoch of 31, and 25 of the second.
    steps = json_lines(out / "straight" / "metrics.jsonl")
    expected = [
        (line["step"], key, BAD[key]) for line in steps for key in sorted(key for key in line["samples"] if key in BAD)
    ]
    assert len(expected) > len(BAD)
    entries = json_lines(out / "straight" / "bad_samples.jsonl")
    assert [(entry["step"], entry["key"], entry["kind"]) for entry in entries] == expected
    assert {entry["shard"] for entry in entries} == {str(out / "bad" / "mixed-000000.tar")}
    assert all(entry["reason"] and entry["reason"] != entry["kind"] for entry in entries)
    # In the first epoch each once. Step 4 has samples 25 to 32, so all but its last are of that epoch.
    seen = [key for line in steps for key in line["samples"]]
    assert sorted(key for key in seen[:31] if key in BAD) == sorted(BAD)


def test_metrics_count_the_bad_samples_of_each_step(out):
    steps = json_lines(out / "straight" / "metrics.jsonl")
    assert [line["bad_samples"] for line in steps] == [sum(key in BAD for key in line["samples"]) for line in steps]
    assert [len(line["samples"]) for line in steps] == [8] * STEPS  # their places are kept


def test_a_resumed_run_names_the_same_and_has_the_same_losses(out):
    straight, resumed = out / "straight", out / "resumed"
    assert (resumed / "bad_samples.jsonl").read_text() == (straight / "bad_samples.jsonl").read_text()
    lines = [
        [{k: v for k, v in line.items() if k not in TIMINGS} for line in json_lines(file)]
        for file in (straight / "metrics.jsonl", resumed / "metrics.jsonl")
    ]
    assert lines[0] == lines[1]
    states = [json.loads((run / f"checkpoint-{STEPS:06d}" / "state.json").read_text()) for run in (straight, resumed)]
    assert states[0]["bad_samples"] == states[1]["bad_samples"]
    entries = json_lines(straight / "bad_samples.jsonl")
    assert sum(states[0]["bad_samples"].values()) == len(entries)
    for kind, count in states[0]["bad_samples"].items():
        assert count == sum(entry["kind"] == kind for entry in entries)


def test_bad_held_out_samples_are_listed_once_and_count_for_nothing(out):
    # Held out three times, after steps 3, 6 and 7, stopped after the first; and no bad sample is allowed in training.
    entries = json_lines(out / "held-out" / "bad_samples.jsonl")
    assert sorted((entry["key"], entry["kind"]) for entry in entries) == sorted(BAD.items())
    assert all(entry["held_out"] is True and entry["step"] == 3 for entry in entries)
    state = json.loads((out / "held-out" / f"checkpoint-{STEPS:06d}" / "state.json").read_text())
    assert state["bad_samples"] == {}


# --- The limit ---


def recorded(world, folder: str) -> dict[str, str | None]:
    """What a ledger says to so many bad samples, some of each rank's."""
    from trainer.ledger import Ledger

    def bad(count: int) -> list[Rejected]:
        own = range(count)[world.rank :: world.world_size]
        return [Rejected("a.tar", f"{i:06d}", "odd" if i % 3 else "third", "reason") for i in own]

    found: dict[str, str | None] = {}
    cases = {
        # name: (samples of all shards, counted before, bad now, seen so far)
        "ten of the first sixteen": (100_000, {}, 10, 16),
        "eleven of the first sixteen": (100_000, {}, 11, 16),
        "twenty of two thousand": (100_000, {}, 20, 2000),
        "one more": (100_000, {"odd": 20}, 1, 2000),
        "one of fifty": (50, {}, 1, 8),
        "two of two hundred": (200, {}, 2, 8),
        "three of two hundred": (200, {}, 3, 8),
        "six of three epochs of two hundred": (200, {}, 6, 600),
    }
    for name, (samples, counts, now, seen) in cases.items():
        ledger = Ledger(Path(folder, name), 0, counts, 0.01, samples, world.is_main)
        Path(folder, name).mkdir(exist_ok=True)
        try:
            ledger.record(5, bad(now), seen)
            found[name] = None
        except DataError as error:
            found[name] = str(error) if error.on_all_ranks else "each rank would say it"
    return found


def test_the_limit_is_a_share_of_what_was_seen_but_patient_at_the_start(tmp_path):
    # One in a hundred: of at least 1,000 samples, or of all there are, so that an unlucky first step stops no run, and
    # 10, 20, 0 (of fifty: 0.5), 2 and 6 are allowed.
    first, second = run_ranks(recorded, 2, str(tmp_path))
    assert first == second  # every rank decides alike, or some would wait for the others for ever
    stopped = {"eleven of the first sixteen", "one more", "one of fifty", "three of two hundred"}
    assert {name for name, said in first.items() if said} == stopped
    head, *table, way_out = first["eleven of the first sixteen"].splitlines()
    assert head == "11 bad samples up to step 5, more than data.max_bad_fraction=0.01 of 1000:"
    # The most frequent first, each with an example.
    assert [line.split() for line in table] == [
        ["7", "odd", "(such", "as:", "reason)"],
        ["4", "third", "(such", "as:", "reason)"],
    ]
    assert f"{tmp_path}/eleven of the first sixteen/bad_samples.jsonl names each" in way_out
    assert "raise data.max_bad_fraction" in way_out
    # What is too many is written down all the same, in an order that no rank's share shows in.
    entries = json_lines(tmp_path / "eleven of the first sixteen" / "bad_samples.jsonl")
    assert [entry["key"] for entry in entries] == [f"{i:06d}" for i in range(11)]


def test_too_many_bad_samples_end_both_ranks_with_one_message(tiny_run, tmp_path):
    tar = write_mixed_shard(tmp_path / "shards")
    done = command(
        *launcher(2), "--config", str(tiny_run), "--set", f"run.output_dir={tmp_path}/run",
        f"data.train=[{{name: bad, shards: '{tar}'}}]", timeout=180,
    )  # fmt: skip
    assert done.returncode == EXIT_USER_ERROR == 2, done.stderr
    assert done.stderr.count("error: ") == 1, done.stderr
    assert "bad samples up to step 1, more than data.max_bad_fraction=0.01 of 8:" in done.stderr
    assert f"2  {UNDECODABLE}" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    entries = json_lines(tmp_path / "run" / "bad_samples.jsonl")
    assert {entry["key"] for entry in entries} == BAD.keys()
    assert not list((tmp_path / "run").glob("*checkpoint*"))


# --- A shard that is of no use stops the run, whatever is allowed ---


def trained_on_a_changing_shard(world, config_file: str, out: str) -> str:
    from trainer.dist import barrier
    from trainer.setup import setup
    from trainer.train import train

    settings = [
        f"run.output_dir={out}/run", f"data.train=[{{name: a, shards: '{out}/shards/*.tar'}}]", "data.num_workers=0",
        "data.max_bad_fraction=1",
    ]  # fmt: skip
    state = setup(Config.load(config_file, settings, world.world_size), world, "none")
    train(state, until=1)
    if world.is_main:
        tar = Path(out, "shards", "tiny-3-000000.tar")
        tar.write_bytes(tar.read_bytes() + bytes(10240))
    barrier()
    try:
        train(state)
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    return "trained on"


def test_a_shard_that_changes_during_a_run_ends_all_ranks_by_name(tiny_run, tmp_path):
    write_tiny_shards(tmp_path / "shards")
    said = run_ranks(trained_on_a_changing_shard, 2, str(tiny_run), str(tmp_path))
    changed = f"DataError: {tmp_path}/shards/tiny-3-000000.tar: the shard has changed since this job looked at it"
    assert any(text.startswith(changed) for text in said), said
    assert all(text.startswith(changed) or "another rank found a damaged shard" in text for text in said), said

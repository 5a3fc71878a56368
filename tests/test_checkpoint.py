"""A checkpoint is whole or it is not there, belongs to one stream of samples, and runs no code."""

import hashlib
import json
import pickle
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from trainer.checkpoint import FORMAT, RunState, clear, existing, find_resume, read_state, tidy
from trainer.config import CheckpointConfig, Config
from trainer.errors import CheckpointError
from trainer.saving import note_best, remove_old


class Planted:
    """A pickle that, when it is loaded, writes a file."""

    def __init__(self, file: str):
        self.file = file

    def __reduce__(self):
        return exec, (f"open({self.file!r}, 'w').close()",)


def plant_in_tensors(file: Path, content: Planted) -> None:
    """As a further entry of a file of DeepSpeed's, in the format of `torch.save`."""
    entries = torch.load(file, weights_only=False)
    torch.save({**entries, "planted": content}, file)


def plant_bare(file: Path, content: Planted) -> None:
    file.write_bytes(pickle.dumps(content))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*checkpoint-*"))


def saved_and_attacked(world, config_file: str, out: str) -> dict:
    """What a few steps, each with a checkpoint, leave behind; and what happens to checkpoints with code in them."""
    from trainer import checkpoint
    from trainer.setup import setup
    from trainer.train import train

    def config(folder: Path, keep_last: int, *changes: str) -> Config:
        settings = [f"run.output_dir={folder}", f"checkpoint.keep_last={keep_last}", "checkpoint.save_steps=1",
                    "train.max_steps=5", "train.micro_batch_size=8", "data.num_workers=0"]  # fmt: skip
        return Config.load(config_file, [*settings, *changes], world.world_size)

    run, branch = Path(out, "run"), Path(out, "branch")
    leftover = run / ".checkpoint-000005.partial"  # of a save that was killed
    leftover.mkdir(parents=True)
    (leftover / "half.pt").write_text("half")
    (run / "checkpoint-best-000001").mkdir()  # a name of the user's own
    state = setup(config(run, keep_last=3), world, "none")
    train(state)
    state.engine.destroy()
    found = {"after the run": names(run)}

    # Back to step 3 of 5, and on to step 4, keeping one, with another rate and decay.
    shutil.copytree(run, branch)
    changes = (
        "optim.learning_rate=0.125", "optim.weight_decay=0.25", "optim.betas=[0.5, 0.75]", "optim.max_grad_norm=0.125"
    )  # fmt: skip
    state = setup(config(branch, 1, *changes), world, str(branch / "checkpoint-000003"))
    groups = state.engine.optimizer.param_groups
    found["rates of the branch"] = [(g["part"], g["peak_lr"], g["weight_decay"], tuple(g["betas"])) for g in groups]
    found["clipping of the branch"] = state.engine.optimizer.clip_grad
    train(state, until=4)
    found["after the branch"] = names(branch), (branch / "latest").read_text().strip()

    for file in sorted((run / "checkpoint-000005" / "deepspeed").iterdir()):
        for plant in (plant_in_tensors, plant_bare):
            attacked, sign = Path(out, "attacked"), Path(out, "it-ran")
            shutil.copytree(run / "checkpoint-000005", attacked)
            target = attacked / "deepspeed" / file.name
            plant(target, Planted(str(sign)))
            with target.open("rb") as content:
                armed = pickle.load(content) if plant is plant_bare else torch.load(content, weights_only=False)
            assert sign.exists(), f"nothing was planted: {armed}"
            sign.unlink()
            try:
                checkpoint.load(state.engine, attacked)
                error = None
            except Exception as raised:
                error = f"{type(raised).__name__}: {raised}"
            found[f"{file.name}, {plant.__name__}"] = error, sign.exists()
            shutil.rmtree(attacked)
    state.engine.destroy()
    return found


@pytest.fixture(scope="module")
def outcome(tiny_run, tmp_path_factory) -> tuple[Path, dict]:
    """(the run of five steps, what was found on the way)."""
    out = tmp_path_factory.mktemp("checkpoints")
    (found,) = run_ranks(saved_and_attacked, 1, str(tiny_run), str(out))
    return out / "run", found


@pytest.fixture
def run(outcome, tmp_path) -> Path:
    """A copy of the run, to be damaged. Its newest checkpoint is of step 5."""
    return Path(shutil.copytree(outcome[0], tmp_path / "run"))


# --- Saving ---


def test_oldest_are_removed_and_leftovers_replaced(outcome):
    # Five saves, three kept; of the half save nothing is left, and names that are not ours are left alone.
    assert outcome[1]["after the run"] == [
        "checkpoint-000003", "checkpoint-000004", "checkpoint-000005", "checkpoint-best-000001",
    ]  # fmt: skip


def test_newest_is_kept_even_where_others_have_higher_steps(outcome):
    assert outcome[1]["after the branch"] == (["checkpoint-000004", "checkpoint-best-000001"], "checkpoint-000004")


def test_checkpoint_holds_what_its_manifest_lists(run):
    folder = run / "checkpoint-000005"
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    expected = {name: [len(content), hashlib.sha256(content).hexdigest()] for name, content in files.items()}
    assert manifest == {name: entry for name, entry in expected.items() if name != "manifest.json"}
    assert {
        "state.json",
        "hf/config.json",
        "hf/model-frozen.safetensors",
        "hf/model-trained.safetensors",
    } < manifest.keys()
    assert any(name.startswith("deepspeed/") for name in manifest)
    assert not any("half" in name for name in files)


def test_checkpoints_are_ordered_by_step(tmp_path, fault):
    # As text, a million comes before 999,999.
    for name in ("checkpoint-1000000", "checkpoint-999999", "checkpoint-000010", ".checkpoint-000011.partial"):
        (tmp_path / name).mkdir()
    assert [path.name for path in existing(tmp_path)] == [
        "checkpoint-000010", "checkpoint-999999", "checkpoint-1000000",
    ]  # fmt: skip
    fault("files of any age", "checkpoints are ordered by step", equal="-")


# --- Which checkpoint a run goes on from ---


def test_auto_takes_what_latest_names(run):
    assert find_resume(run, "auto") == run / "checkpoint-000005"
    (run / "latest").write_text("checkpoint-000003\n")
    assert find_resume(run, "auto") == run / "checkpoint-000003"


def test_auto_starts_anew_where_nothing_was_saved(tmp_path):
    assert find_resume(tmp_path / "new", "auto") is None
    (tmp_path / ".checkpoint-000001.partial").mkdir()  # killed in its first save
    assert find_resume(tmp_path, "auto") is None


def test_none_starts_anew_but_not_over_checkpoints(run, tmp_path):
    assert find_resume(tmp_path / "new", "none") is None
    with pytest.raises(CheckpointError, match="holds checkpoints.*--resume auto.*another run.output_dir.*overwrite"):
        find_resume(run, "none")
    assert find_resume(run, "none", overwrite=True) is None
    clear(run)
    assert (existing(run), (run / "latest").exists()) == ([], False)
    assert (run / "checkpoint-best-000001").exists()  # the user's own


def test_path_names_a_checkpoint_of_any_run(run, tmp_path):
    path = run / "checkpoint-000004"
    assert find_resume(tmp_path / "new", str(path)) == path
    for wrong in (run, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=f"{wrong}: (not a whole checkpoint|no such folder).*--resume auto"):
            find_resume(run, str(wrong))


def damage(folder: Path, how: str) -> str:
    """Damages a checkpoint; what is to be said of it."""
    weights, manifest = folder / "hf" / "model-trained.safetensors", folder / "manifest.json"
    size = weights.stat().st_size
    if how == "cut":
        with weights.open("r+b") as content:
            content.truncate(size - 1)
        return f"not whole: hf/model-trained.safetensors should have {size} bytes, found {size - 1} bytes"
    if how == "flipped bit":
        content = bytearray(weights.read_bytes())
        content[-9] ^= 4
        weights.write_bytes(content)
        return "not whole: hf/model-trained.safetensors has other bytes than were written"
    if how == "missing":
        (folder / "state.json").unlink()
        return "not whole: state.json should have"
    if how == "of a rank":
        (file,) = (folder / "deepspeed").glob("*optim_states.pt")
        file.write_bytes(file.read_bytes()[:-1] + b"?")
        return f"not whole: deepspeed/{file.name} has other bytes"
    manifest.write_text({"no list": "[]", "cut list": manifest.read_text()[:50], "empty list": ""}[how])
    return "not a whole checkpoint: its manifest.json cannot be read"


DAMAGES = ["cut", "flipped bit", "missing", "of a rank", "no list", "cut list", "empty list"]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_auto_takes_the_one_before(run, how, caplog):
    newest = run / "checkpoint-000005"
    said = damage(newest, how)
    with pytest.raises(CheckpointError) as raised:
        find_resume(run, str(newest))
    assert f"{newest}: {said}" in str(raised.value)
    assert find_resume(run, "auto") == run / "checkpoint-000004"
    assert f"passed over {newest}: {said}" in caplog.text


def test_auto_never_starts_anew_where_a_checkpoint_was(run, tmp_path):
    for path in existing(run):
        path.rename(tmp_path / path.name)
    with pytest.raises(CheckpointError, match="latest names checkpoint-000005, and no checkpoint is there"):
        find_resume(run, "auto")
    assert find_resume(run, "none") is None


def test_what_killed_saves_have_left_is_put_right(run):
    # Killed between the two renames of a checkpoint that is saved again: its old self is all there is.
    newest = run / "checkpoint-000005"
    newest.rename(run / ".checkpoint-000005.replaced")
    shutil.copytree(run / "checkpoint-000004", run / ".checkpoint-000004.replaced")
    (run / ".checkpoint-000007.partial").mkdir()
    tidy(run)
    assert names(run) == ["checkpoint-000003", "checkpoint-000004", "checkpoint-000005", "checkpoint-best-000001"]
    assert find_resume(run, "auto") == newest


def test_auto_never_starts_anew_where_no_checkpoint_is_whole(run):
    for number in (3, 4, 5):
        damage(run / f"checkpoint-00000{number}", "cut")
    with pytest.raises(CheckpointError, match="none of its 3 checkpoints is whole.*run.overwrite"):
        find_resume(run, "auto")


@pytest.mark.parametrize("content", ["", "\n", "checkpoint-000009\n", None])
def test_a_pointer_that_points_nowhere_loses_nothing(run, content, caplog):
    (run / "latest").unlink()
    if content is not None:
        (run / "latest").write_text(content)
    assert find_resume(run, "auto") == run / "checkpoint-000005"
    assert f"{run / 'latest'} names {(content or '').strip() or 'nothing'}, which is not there" in caplog.text


def test_old_ones_are_removed_but_not_the_best_and_those_kept_for_their_step(tmp_path):
    def kept(newest: int, **retention: int | bool) -> list[int]:
        remove_old(tmp_path, tmp_path / f"checkpoint-{newest:06d}", CheckpointConfig(**retention))
        return [int(path.name[-6:]) for path in existing(tmp_path)]

    for step in range(1, 11):
        (tmp_path / f"checkpoint-{step:06d}").mkdir()
    for step, loss in ((1, 2.0), (3, 1.5), (4, 1.75), (99, 0.1)):  # of step 99 nothing was saved
        note_best(tmp_path, step, loss)
    assert json.loads((tmp_path / "best.json").read_text()) == {"checkpoint": "checkpoint-000003", "held_out_loss": 1.5}
    assert kept(10, keep_last=0) == list(range(1, 11))
    assert kept(10, keep_last=4, keep_every=5) == [3, 5, 7, 8, 9, 10]
    assert kept(7, keep_last=1) == [3, 7]  # after a resume from an older one


def test_rates_are_those_of_the_configuration_that_resumes(outcome):
    # The optimizer in the checkpoint remembers those it was saved with: 0.002 and a decay of 0.01.
    betas = (0.5, 0.75)
    assert outcome[1]["rates of the branch"] == [
        ("projector", 0.005, 0.25, betas), ("projector", 0.005, 0.0, betas),
        ("language_model", 0.125, 0.25, betas), ("language_model", 0.125, 0.0, betas),
    ]  # fmt: skip
    assert outcome[1]["clipping of the branch"] == 0.125


# --- Whose samples ---


@pytest.fixture
def state(run) -> RunState:
    return RunState(**json.loads((run / "checkpoint-000005" / "state.json").read_text()))


def test_state_of_the_same_samples_is_read(run, state):
    assert (state.step, state.seed, state.global_batch_size) == (5, 42, 8)
    assert read_state(run / "checkpoint-000005", replace(state, step=0)) == state


def test_shards_that_were_written_to_behind_their_headers_are_named(run, state, caplog):
    path = run / "checkpoint-000005"
    caplog.set_level("WARNING", "trainer")
    times = [*state.shard_times[:2], state.shard_times[2] + 1, *state.shard_times[3:]]
    assert read_state(path, replace(state, shard_times=times)).shard_times == times
    assert "1 shards were written to, or copied, since" in caplog.text
    assert "tiny-2-000000.tar" in caplog.text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 43}, ["run.seed was 42, is 43"]),
        ({"global_batch_size": 16}, ["train.global_batch_size was 8, is 16"]),
        ({"trained": "2 parameters (ab)"}, ["what trains (freeze, lora) was", "is 2 parameters (ab)"]),
        ({"order": "packs"}, ["order of the samples was samples, is packs"]),
        ({"seed": 1, "global_batch_size": 4}, ["run.seed was 42, is 1", "train.global_batch_size was 8, is 4"]),
    ],
)
def test_other_stream_of_samples_is_refused_by_name(run, state, changes, said):
    path = run / "checkpoint-000005"
    with pytest.raises(CheckpointError) as raised:
        read_state(path, replace(state, **changes))
    assert all(text in str(raised.value) for text in said)
    assert str(raised.value).count(" was ") == len(changes)
    assert f"model.init_from={path}" in str(raised.value)  # the way out


def test_shards_that_differ_are_named(run, state):
    # Four tars, "name hash" each; of more than three that differ, three are named.
    path = run / "checkpoint-000005"
    first, second, third, fourth = state.shards
    assert [shard.partition(" ")[0] for shard in state.shards] == [f"tiny-{n}-000000.tar" for n in range(4)]
    other = [f"tiny-{n}-000000.tar {'0' * 16}" for n in range(4)]
    cases = {
        "shard tiny-1-000000.tar has changed": [first, other[1], third, fourth],
        "shard tiny-3-000000.tar is missing": [first, second, third],
        "shard tiny-4-000000.tar is new": [*state.shards, "tiny-4-000000.tar 00"],
        "the training shards come in another order": [second, first, third, fourth],
        "shard tiny-0-000000.tar has changed; shard tiny-1-000000.tar has changed; shard tiny-2-000000.tar has "
        "changed; and 1 more shards differ": other,
    }
    for said, shards in cases.items():
        with pytest.raises(CheckpointError) as raised:
            read_state(path, replace(state, shards=shards))
        assert str(raised.value).startswith(f"{path}: another run than this one: {said}. Set them back")


def test_a_changed_shard_is_named_though_another_has_its_name(run, state):
    # Sources in folders of their own often have the same names: each is numbered from 0.
    path = run / "checkpoint-000005"
    before = ["shard-000000.tar 11", "shard-000001.tar 22", "shard-000000.tar 33"]
    (path / "state.json").write_text(json.dumps(asdict(replace(state, shards=before))))
    for now in (["shard-000000.tar 44", *before[1:]], [*before[:2], "shard-000000.tar 44"]):
        with pytest.raises(CheckpointError, match="this one: shard shard-000000.tar has changed. Set"):
            read_state(path, replace(state, shards=now))
    with pytest.raises(CheckpointError, match="this one: shard shard-000000.tar is missing. Set"):
        read_state(path, replace(state, shards=before[:2]))


def test_checkpoint_of_another_format_is_named_as_such(run, state):
    # One of the first format, which lacked some of today's fields, and one of a later format.
    path = run / "checkpoint-000005"
    for content in ({"format": 1, "step": 5}, {**asdict(state), "format": FORMAT + 1}):
        (path / "state.json").write_text(json.dumps(content))
        with pytest.raises(
            CheckpointError, match=f"of format {content['format']}, and this version reads {FORMAT}"
        ) as raised:
            read_state(path, state)
        assert f"model.init_from={path}" in str(raised.value)  # the way out


@pytest.mark.parametrize("content", ["", "{}", '{"step": 5, "code": "x"}', "[5]"])
def test_state_that_cannot_be_read(run, state, content):
    (run / "checkpoint-000005" / "state.json").write_text(content)
    with pytest.raises(CheckpointError, match="its state.json cannot be read"):
        read_state(run / "checkpoint-000005", state)


# --- Data is never code ---


def test_pickle_in_a_file_of_deepspeed_is_refused_and_not_run(outcome, fault):
    attacks = {name: result for name, result in outcome[1].items() if "plant" in name}
    assert len(attacks) == 4  # two files, two ways
    for name, (error, it_ran) in attacks.items():
        assert not it_ran, name
        assert error is not None, f"{name}: was loaded"
        assert error.startswith("CheckpointError: "), f"{name}: {error}"
        assert "attacked" in error, f"{name}: {error}"
        assert "weights_only" not in error, f"{name}: advises to load it all the same: {error}"
    fault("a pickle in a checkpoint", "refused, not run", equal="-")

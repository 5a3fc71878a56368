"""What a run folder and its shards may have suffered between two starts: named, and nothing is lost or overwritten."""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from jobs import Job, curve, final_weights, trained
from ranks import train_ranks

from trainer.manifest import MANIFEST, file_hash

pytestmark = pytest.mark.long

SETTINGS = ["train.max_steps=6", "checkpoint.save_steps=2", "checkpoint.keep_last=0", "logging.sample_keys=true"]


def start(config: Path, run: Path, *settings: str) -> tuple[int, str]:
    """Trains on two ranks: the exit code, and all that was said."""
    log = config.parent / f"{run.parent.name}-{run.name}.log"
    code = train_ranks(log, "--config", str(config), "--set", f"run.output_dir={run}", *SETTINGS, *settings)
    return code, log.read_text()


@pytest.fixture(scope="module")
def runs(tiny_run, tmp_path_factory) -> tuple[Path, Path]:
    """(a run that stopped at step 4 of 6, one that did not), with shards of their own."""
    folder = tmp_path_factory.mktemp("damage")
    shutil.copytree(tiny_run.parent / "shards", folder / "shards")
    config = yaml.safe_load(tiny_run.read_text())
    config["data"]["train"][0]["shards"] = str(folder / "shards" / "*.tar")
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    for name, steps in (("stopped", 4), ("alone", 6)):
        trained(folder / "run.yaml", folder / name, *SETTINGS, f"train.max_steps={steps}", "optim.schedule=constant")
    return folder / "stopped", folder / "alone"


def tree(folder: Path) -> dict[str, str]:
    """Every file of a run's checkpoints, and its hash."""
    files = (path for path in folder.glob("checkpoint-*/**/*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def cut_manifest(run: Path) -> str:
    file = run / "checkpoint-000004" / MANIFEST
    file.write_bytes(file.read_bytes()[:-20])
    return "passed over"


def empty_latest(run: Path) -> str:
    (run / "latest").write_text("")
    return "names nothing, which is not there"


def missing_part_of_a_rank(run: Path) -> str:
    next((run / "checkpoint-000004" / "deepspeed").glob("*rank_1*")).unlink()
    return "found missing"


@pytest.mark.parametrize("damage", [cut_manifest, empty_latest, missing_part_of_a_rank])
def test_a_damaged_folder_is_named_and_the_run_goes_on_from_the_last_whole_checkpoint(runs, tmp_path, fault, damage):
    stopped, alone = runs
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    expected = damage(run)
    code, said = start(stopped.parent / "run.yaml", run, "optim.schedule=constant")
    assert code == 0, said[-3000:]
    assert expected in said
    assert curve(run) == curve(alone)
    assert final_weights(run) == final_weights(alone)
    fault(damage.__name__.replace("_", " "), "named; went on from the last whole checkpoint")


def newer_format(run: Path, folder: Path) -> tuple[str, list[str]]:
    file = run / "checkpoint-000004" / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 99}))
    manifest = json.loads((file.parent / MANIFEST).read_text())
    manifest["state.json"] = [file.stat().st_size, file_hash(file)]
    (file.parent / MANIFEST).write_text(json.dumps(manifest))
    return "of format 99, and this version reads", []


def another_stage(run: Path, folder: Path) -> tuple[str, list[str]]:
    return "what trains (freeze, lora) was", ["freeze=[vision_tower, language_model]"]


def another_model(run: Path, folder: Path) -> tuple[str, list[str]]:
    plain = Path(yaml.safe_load((run / "config.yaml").read_text())["model"]["language_model"])
    other = Path(shutil.copytree(plain, folder / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    said = "num_hidden_layers of model.language_model is 1, of the checkpoint 2"
    return said, [f"model.language_model={other}"]


def other_batch(run: Path, folder: Path) -> tuple[str, list[str]]:
    return "train.global_batch_size was 8, is 16", ["train.global_batch_size=16"]


@pytest.mark.parametrize("change", [newer_format, another_stage, another_model, other_batch])
def test_a_checkpoint_of_something_else_is_refused_by_name(runs, tmp_path, fault, change):
    stopped, _ = runs
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    expected, settings = change(run, tmp_path)
    before = tree(run)
    code, said = start(stopped.parent / "run.yaml", run, *settings)
    assert code == 2, said[-3000:]
    assert expected in said
    assert "Traceback" not in said
    assert tree(run) == before
    fault(f"a checkpoint of {change.__name__.replace('_', ' ')}", "refused by name, exit code 2", equal="-")


def test_a_read_only_folder_is_named(runs, tmp_path, fault):
    stopped, _ = runs
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        shutil.copytree(stopped, disk / "run")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        before = tree(disk / "run")
        code, said = start(stopped.parent / "run.yaml", disk / "run")
        assert code == 2, said[-3000:]
        assert f"run.output_dir: {disk / 'run'} cannot be written to (Read-only file system)" in said
        assert tree(disk / "run") == before
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    fault("a read-only run folder", "named, exit code 2; nothing changed", equal="-")


def flip_in_a_picture(shards: Path) -> Path:
    """One bit of a picture's data: no header of the tar shows it."""
    tar = sorted(shards.glob("*.tar"))[-1]
    content = bytearray(tar.read_bytes())
    content[content.index(b"IDAT") + 40] ^= 8
    tar.write_bytes(content)
    return tar


def test_a_flipped_bit_in_a_shard_is_named(runs, tmp_path, fault):
    stopped, _ = runs
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    shards = Path(shutil.copytree(stopped.parent / "shards", tmp_path / "shards"))
    settings = [*SETTINGS, f"data.train=[{{name: tiny, shards: '{shards}/*.tar'}}]"]
    # Under a running job: it stops by the shard's name.
    job = Job(stopped.parent / "run.yaml", run, *settings, "train.max_steps=400", "train.global_batch_size=8")
    job.wait_for(lambda: job.steps() >= 6)
    tar = flip_in_a_picture(shards)
    assert job.end() == 2, job.log.read_text()[-3000:]
    assert f"{tar}: the shard has changed since this job looked at it" in job.log.read_text()
    # Between two jobs: the next one refuses to go on with other data.
    before = tree(run)
    code, said = start(stopped.parent / "run.yaml", run, *settings)
    assert code == 2, said[-3000:]
    assert f"another run than this one: shard {tar.name} has changed" in said
    assert tree(run) == before
    fault("a flipped bit in a shard", "named, exit code 2, under a job and at its next start", equal="-")

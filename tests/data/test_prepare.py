"""`launch/prepare_shards.py`: the same bytes however it is run, killed and restarted; nothing left out in silence.

It runs in processes of its own; the shards are read back by webdataset itself.
"""

import json
import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import webdataset
from conftest import ROOT
from reference import shared
from tiny_sources import entry, picture

from trainer.data.index import open_index
from trainer.data.sources.pictures import NO_PICTURE

PREPARE = ROOT / "launch" / "prepare_shards.py"
FORK = multiprocessing.get_context("fork")


def read_by_webdataset(shards: list[Path]) -> list[dict]:
    samples = list(webdataset.WebDataset([str(shard) for shard in shards], shardshuffle=False))
    return [
        {key: value for key, value in sample.items() if key not in ("__url__", "__local_path__")} for sample in samples
    ]


def contents(folder: Path) -> dict[str, bytes]:
    """All that a preparation leaves but the indexes, which carry the tars' times; hidden files too."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.endswith(".index.npz")}


def _main(arguments: list[str], output: Path) -> None:
    # multiprocessing writes tracebacks, and flushes, to whatever these are.
    sys.stdout, sys.stderr = (output / "stdout").open("w"), (output / "stderr").open("w")
    sys.argv, sys.path = [str(PREPARE), *arguments], [str(PREPARE.parent), *sys.path]
    runpy.run_path(str(PREPARE), run_name="__main__")


def in_fork(arguments: list[str], folder: Path) -> tuple[int, str, str]:
    """Runs the entry point: (exit code, stdout, stderr), which go through files in `folder`.

    In a fork of this process, which has the imports behind it; other tests start a fresh one.
    """
    process = FORK.Process(target=_main, args=(arguments, folder))
    process.start()
    process.join(120)
    process.kill()  # one that hangs has no exit code of its own
    process.join()
    return process.exitcode, (folder / "stdout").read_text(), (folder / "stderr").read_text()


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(picture("red"))
    (folder / "b.jpg").write_bytes(picture("blue", "JPEG"))
    (folder / "broken.png").write_bytes(picture("red")[:40])
    return folder


@pytest.fixture
def prepare(tmp_path):
    """Runs the entry point on entries of LLaVA's, or on those of the last time."""

    def run(entries: list | None, *options: str, out: Path = tmp_path / "shards") -> tuple[int, str, str]:
        file = tmp_path / "cats.json"
        if entries is not None:
            file.write_text(json.dumps(entries))
        arguments = ["llava", str(file), "--images", str(tmp_path / "images"), "--out", str(out), *options]
        return in_fork(arguments, tmp_path)

    return run


def assert_one_message(result: tuple[int, str, str], message: str) -> None:
    code, stdout, stderr = result
    assert code == 2, stderr
    assert stdout == ""
    assert "Traceback" not in stderr
    assert stderr.count("error:") == 1
    assert re.search(message, stderr.strip())
    assert stderr.strip().count("\n") == 0


def good(count: int) -> list[dict]:
    return [entry(i, ["a.png", "b.jpg"][i % 2], answer=f"图像 {i}") for i in range(count)]


# --- What it writes ---


def test_preparing_writes_shards_with_their_indexes_and_reports(prepare, images, tmp_path):
    code, stdout, stderr = prepare(good(7), "--samples-per-shard", "3")
    out = tmp_path / "shards"
    assert (code, stderr) == (0, "")
    assert stdout == f"7 samples in 3 shards in {out}; left out: 0\n"
    shards = [f"cats-00000{i}.tar" for i in range(3)]
    beside = [f"{name}.index.npz" for name in shards] + [f"cats-00000{i}.report.json" for i in range(3)]
    assert sorted(file.name for file in out.iterdir()) == sorted([*shards, *beside, "prepare.json"])
    # 7 entries, 3 a shard: 3, 3 and 1.
    assert [len(open_index(out / name)) for name in shards] == [3, 3, 1]
    found = read_by_webdataset([out / name for name in shards])
    assert [sample["__key__"] for sample in found] == [f"{i:08d}-{i}" for i in range(7)]
    assert [json.loads(sample["json"])["conversations"][1]["value"] for sample in found] == [
        f"图像 {i}" for i in range(7)
    ]


def test_the_number_of_workers_does_not_show(prepare, images, tmp_path):
    # Bad entries in between: a shard's entries do not depend on how many were kept before it.
    entries = good(20)
    entries[4] = entries[11] = entry("x", "none.png")
    one, three = tmp_path / "one", tmp_path / "three"
    options = ("--samples-per-shard", "3", "--skip-bad")
    assert prepare(entries, *options, "--workers", "1", out=one)[0] == 0
    assert prepare(None, *options, "--workers", "3", out=three)[0] == 0
    assert contents(three) == contents(one)
    assert [len(open_index(tar)) for tar in sorted(one.glob("*.tar"))] == [3, 2, 3, 2, 3, 3, 2]


# --- Bad entries ---


def test_a_bad_entry_is_an_error_that_names_it(prepare, images, tmp_path):
    file = tmp_path / "cats.json"
    message = rf"^error: {file}: entry 1 \(id 'x'\): .*/none\.png: no such picture; --skip-bad leaves such entries out$"
    entries = [entry("good", "a.png"), entry("x", "none.png"), *good(6)]
    for workers in ("1", "3"):
        assert_one_message(prepare(entries, "--workers", workers, "--samples-per-shard", "2"), message)
        files = contents(tmp_path / "shards")
        assert "cats-000000.tar" not in files
        assert not [name for name in files if name.startswith(".")]  # no half of a shard either


def test_after_the_error_skipping_goes_on_with_the_same_folder(prepare, images, tmp_path):
    entries = [*good(4), entry("x", "none.png"), *good(3)]
    assert prepare(entries, "--samples-per-shard", "2", "--workers", "1")[0] == 2
    code, stdout, _ = prepare(None, "--samples-per-shard", "2", "--skip-bad")
    assert code == 0
    # Entries 4 and 5 were to be the third of four shards.
    assert "already holds 2 of 4 shards; going on with the rest" in stdout
    assert f"7 samples in 4 shards in {tmp_path / 'shards'}; left out: 1" in stdout
    # Who does not want to leave entries out is not handed shards that do.
    assert_one_message(prepare(None, "--samples-per-shard", "2"), r"entry 4 \(id 'x'\): .*--skip-bad leaves such")


def test_skipping_counts_what_is_left_out_by_kind(prepare, images, tmp_path):
    bad = [entry("x", "none.png"), entry("y", "gone.png"), entry("z\x1b[31m\u202e", "broken.png")]
    code, stdout, stderr = prepare([entry("first", "a.png"), *bad, entry("last", "b.jpg")], "--skip-bad")
    assert (code, stderr) == (0, "")
    lines = stdout.splitlines()
    assert lines[0] == f"2 samples in 1 shards in {tmp_path / 'shards'}; left out: 3"
    assert re.fullmatch(r" +2  no such picture           +entry 1 \(id 'x'\): .*/none\.png: no such picture", lines[1])
    assert re.fullmatch(
        r" +1  picture cannot be decoded  entry 3 \(id 'z\\x1b\[31m\\u202e'\): .*/broken\.png: .*", lines[2]
    )
    assert len(lines) == 3
    # Every single one is named in the report.
    report = json.loads((tmp_path / "shards" / "cats-000000.report.json").read_text())
    assert (report["entries"], report["kept"]) == (5, 2)
    assert [(bad["entry"], bad["kind"]) for bad in report["left_out"]][:2] == [(1, NO_PICTURE), (2, NO_PICTURE)]
    assert "gone.png" in report["left_out"][1]["message"]
    found = read_by_webdataset([tmp_path / "shards" / "cats-000000.tar"])
    assert [sample["__key__"] for sample in found] == ["00000000-first", "00000004-last"]


def test_a_shard_of_bad_entries_alone_has_a_report_and_no_tar(prepare, images, tmp_path):
    entries = [*good(2), entry("x", "none.png"), entry("y", "none.png"), *good(2)]
    code, stdout, _ = prepare(entries, "--skip-bad", "--samples-per-shard", "2")
    assert code == 0
    assert stdout.startswith("4 samples in 2 shards")
    tars = [tar.name for tar in sorted((tmp_path / "shards").glob("*.tar"))]
    assert tars == ["cats-000000.tar", "cats-000002.tar"]
    assert json.loads((tmp_path / "shards" / "cats-000001.report.json").read_text())["kept"] == 0
    # It is not tried again.
    assert "already holds 3 of 3 shards" in prepare(None, "--skip-bad", "--samples-per-shard", "2")[1]


def test_skipping_everything_is_an_error_with_the_reasons(prepare, images, tmp_path):
    code, stdout, stderr = prepare([entry("x", "none.png")] * 2, "--skip-bad")
    assert (code, stdout) == (2, "")
    assert f"error: {tmp_path / 'cats.json'}: no sample was good enough to keep:\n" in stderr
    assert "2  no such picture  entry 0 (id 'x'): " in stderr
    assert "Traceback" not in stderr
    assert not list((tmp_path / "shards").glob("*.tar"))


# --- Killed and restarted ---


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def stuck(images, tmp_path):
    """A real run of two workers over five shards: one waits for ever for a picture of the third, the other is done."""
    entries = good(15)
    entries[7] = entry(7, "slow.png")
    (tmp_path / "cats.json").write_text(json.dumps(entries))
    os.mkfifo(images / "slow.png")  # opening it waits for a writer that never comes
    command = [sys.executable, str(PREPARE), "llava", "cats.json", "--images", "images", "--out", "shards"]
    run = subprocess.Popen(
        [*command, "--samples-per-shard", "3", "--workers", "2"], cwd=tmp_path,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    partial = tmp_path / "shards" / ".cats-000002.tar.tmp"
    wait_for(lambda: len(list((tmp_path / "shards").glob("*.report.json"))) == 4 and partial.exists())
    yield run
    run.kill()
    run.communicate()


def workers_of(run: subprocess.Popen) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]


def unstick(images: Path) -> None:
    (images / "slow.png").unlink()
    (images / "slow.png").write_bytes(picture("green"))


RESUMABLE = ("--samples-per-shard", "3", "--workers", "2")


def test_a_killed_run_restarts_where_it_stopped(stuck, prepare, images, tmp_path):
    workers, out = workers_of(stuck), tmp_path / "shards"
    assert len(workers) == 2
    stuck.kill()  # SIGKILL to the parent alone, as the kernel or an impatient person does
    stuck.wait()
    wait_for(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in workers), 10)  # none stays behind
    # What is there under its name is whole; the rest is hidden from any pattern for shards.
    assert [tar.name for tar in sorted(out.glob("*.tar"))] == [f"cats-00000{i}.tar" for i in (0, 1, 3, 4)]
    assert [len(open_index(tar)) for tar in out.glob("*.tar")] == [3] * 4
    assert [file.name for file in out.glob(".*")] == [".cats-000002.tar.tmp"]
    (out / ".cats-000001.report.json.tmp").write_text("{")  # of a report that was just being written
    times = {tar.name: tar.stat().st_mtime_ns for tar in out.glob("*.tar")}

    unstick(images)
    code, stdout, stderr = prepare(None, *RESUMABLE)
    assert (code, stderr) == (0, "")
    assert stdout == (
        f"{out} already holds 4 of 5 shards; going on with the rest\n15 samples in 5 shards in {out}; left out: 0\n"
    )
    assert {name: (out / name).stat().st_mtime_ns for name in times} == times  # not made again
    assert prepare(None, "--samples-per-shard", "3", "--workers", "1", out=tmp_path / "whole")[0] == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_two_runs_do_not_write_to_one_folder(stuck, prepare, tmp_path):
    assert_one_message(prepare(None, *RESUMABLE), f"--out {tmp_path / 'shards'}: another run is writing there")
    assert stuck.poll() is None
    assert (tmp_path / "shards" / ".cats-000002.tar.tmp").exists()  # the other's half is not touched


def test_a_killed_worker_ends_the_run_with_a_reason(stuck, prepare, images, tmp_path):
    os.kill(workers_of(stuck)[0], signal.SIGKILL)
    _, stderr = stuck.communicate(timeout=30)
    assert stuck.returncode == 2
    assert "error: cats.json: a worker process was killed, as happens when memory runs out" in stderr
    assert "Traceback" not in stderr
    assert not list((tmp_path / "shards").glob(".*"))
    unstick(images)
    assert "15 samples in 5 shards" in prepare(None, *RESUMABLE)[1]


def test_ctrl_c_ends_all_processes(stuck, tmp_path):
    workers = workers_of(stuck)
    os.kill(stuck.pid, signal.SIGINT)
    stuck.communicate(timeout=30)
    assert stuck.returncode != 0
    wait_for(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in workers), 10)
    assert not list((tmp_path / "shards").glob(".*"))


@pytest.mark.parametrize("damage", ["cut", "lost", "report lost"])
def test_a_shard_that_is_not_whole_is_made_again(prepare, images, tmp_path, damage):
    out = tmp_path / "shards"
    assert prepare(good(6), "--samples-per-shard", "3")[0] == 0
    before, tar = contents(out), out / "cats-000001.tar"
    if damage == "cut":
        tar.write_bytes(tar.read_bytes()[:700])
    else:
        (tar if damage == "lost" else out / "cats-000001.report.json").unlink()
    assert "already holds 1 of 2 shards" in prepare(None, "--samples-per-shard", "3")[1]
    assert contents(out) == before


# --- Refused ---


def test_other_options_are_refused_by_name(prepare, images, tmp_path):
    out = tmp_path / "shards"
    assert prepare(good(6), "--samples-per-shard", "3")[0] == 0
    before = contents(out)
    refused = rf"^error: --out {out} holds shards of another preparation: "
    assert_one_message(prepare(None, "--samples-per-shard", "2"), refused + "samples_per_shard was 3, and is now 2")
    (tmp_path / "other").mkdir()
    assert_one_message(
        prepare(None, "--samples-per-shard", "3", "--images", str(tmp_path / "other")),
        refused
        + rf"options.images was .*{images}.*, and is now .*{tmp_path / 'other'}.*; choose another folder, or remove",
    )
    assert_one_message(
        prepare(good(5), "--samples-per-shard", "3"), refused + "source.sha256 was .*; entries was 6, and is now 5;"
    )
    assert contents(out) == before


def test_a_folder_with_shards_of_unknown_origin_is_refused(prepare, images, tmp_path):
    out = tmp_path / "shards"
    out.mkdir()
    (out / "old.tar").write_bytes(b"1")
    message = f"error: --out {out} already holds 1 shards, and no prepare.json .*; choose another folder or remove them"
    assert_one_message(prepare(good(1)), message)
    assert contents(out) == {"old.tar": b"1"}


def test_a_folder_without_any_result_is_free(prepare, images):
    assert prepare([entry("x", "none.png")])[0] == 2
    assert prepare(good(2), "--samples-per-shard", "7")[0] == 0  # the source was mended: nothing is in its way


def test_folders_that_cannot_be_used_are_named(prepare, images, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for out in (file, file / "below"):
        assert_one_message(prepare(good(1), out=out), f"error: --out {out}: cannot be used as a folder")
    message = f"error: --images {tmp_path / 'none'}: no such folder"
    assert_one_message(prepare(good(1), "--images", str(tmp_path / "none")), message)


def test_a_full_disk_is_a_message(prepare, images, tmp_path, monkeypatch):
    # The shard of 3 pictures of some 100 bytes takes 10 KiB; the process may not write a file above 4.
    import resource

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        result = prepare(good(3), "--workers", "1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert_one_message(result, r"cats-000000\.tar: cannot be written \(File too large\); a new run goes on with this")
    assert set(contents(tmp_path / "shards")) == {"prepare.json"}


@pytest.mark.parametrize("option", ["--samples-per-shard", "--workers"])
def test_numbers_are_at_least_one(prepare, images, option):
    code, _, stderr = prepare(good(1), option, "0")
    assert code == 2
    assert f"argument {option}: 0: expected 1 or more" in stderr


def test_each_format_has_its_command(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    caption = {"id": 1, "image_id": 7, "caption": "A cat."}
    coco = {"images": [{"id": 7, "file_name": "a.png"}], "annotations": [caption, {**caption, "caption": "Red."}]}
    Path("captions_val2017.json").write_text(json.dumps(coco))
    Path("aic.json").write_text(json.dumps([{"url": "", "image_id": "b.jpg", "caption": ["一只猫。"]}]))
    Path("lines.jsonl").write_text(json.dumps({"image": "a.png", "text": "A cat."}))
    (images / "broken.png").unlink()
    (images / "metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": name, "note": "A cat."}) + "\n" for name in ("a.png", "b.jpg"))
    )
    runs = {
        "coco": (["captions_val2017.json", "--images", "images", "--captions", "all"], "2 samples in 1 shards"),
        "aic": (["aic.json", "--images", "images"], "1 samples in 1 shards"),
        "jsonl": (["lines.jsonl", "--images", "images"], "1 samples in 1 shards"),
        "hf": (["images", "--text-column", "note", "--samples-per-shard", "1"], "2 samples in 2 shards"),
        "img2dataset": (["coco/captions_val2017-000000.tar"], "2 samples in 1 shards"),
    }
    for name, (arguments, line) in runs.items():
        code, stdout, stderr = in_fork([name, *arguments, "--out", name], tmp_path)
        assert code == 0, stderr
        assert stdout == f"{line} in {name}; left out: 0\n"
    assert (tmp_path / "hf" / "images-000001.tar").is_file()


# --- As users type it: a fresh process, somewhere else ---


def test_the_help_lists_the_formats_and_imports_nothing_slow(tmp_path):
    arguments = [sys.executable, "-X", "importtime", str(PREPARE), "--help"]
    run = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    imported = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines()}
    assert "argparse" in imported
    assert not {"torch", "transformers", "datasets", "webdataset"} & imported
    for name in ("llava", "jsonl", "coco", "aic", "img2dataset", "hf"):
        assert re.search(rf"^ +{name} ", run.stdout, re.MULTILINE)


def test_the_real_data_set_becomes_shards(tmp_path):
    source, folder, out = shared("real/nlvr/conversations.json"), shared("real/nlvr/images"), tmp_path / "shards"
    arguments = ("llava", str(source), "--images", str(folder), "--out", str(out), "--samples-per-shard", "300")
    run = subprocess.run(
        [sys.executable, str(PREPARE), *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"989 samples in 4 shards in {out}; left out: 0\n"

    entries = json.loads(source.read_text())
    for wanted, sample in zip(entries, read_by_webdataset(sorted(out.glob("*.tar"))), strict=True):
        assert sample["png"] == (folder / wanted["image"]).read_bytes()
        assert json.loads(sample["json"])["conversations"] == wanted["conversations"]

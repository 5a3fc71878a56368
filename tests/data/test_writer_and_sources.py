"""Data sets become shards: the same bytes each time, whole or not there, and a bad entry is named and never half kept.

`launch/prepare_shards.py` runs in processes of its own; the shards are read back by webdataset itself.
"""

import io
import json
import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import webdataset
from conftest import ROOT
from PIL import Image
from reference import shared

from trainer.data.index import open_index
from trainer.data.loader import ShardDataset
from trainer.data.order import Slot
from trainer.data.sources import llava_records, read_llava
from trainer.data.writer import ShardWriter
from trainer.errors import DataError

PREPARE = ROOT / "launch" / "prepare_shards.py"
FORK = multiprocessing.get_context("fork")


def picture(colour: str = "red", form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), colour).save(buffer, form)
    return buffer.getvalue()


def entry(name, image=None, question: str = "<image>\nWhat is it?", answer: str = "A cat.") -> dict:
    """One of LLaVA's: with `image`, a file name or several."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, **({} if image is None else {"image": image}), "conversations": turns}


def read_by_webdataset(shards: list[Path]) -> list[dict]:
    samples = list(webdataset.WebDataset([str(shard) for shard in shards], shardshuffle=False))
    return [
        {key: value for key, value in sample.items() if key not in ("__url__", "__local_path__")} for sample in samples
    ]


# --- The writer ---

SAMPLES = {
    f"s{i}": {"png": picture("red"), "json": {"n": i, "text": "图像 é 🙂"}}
    if i % 2
    else {"0.png": picture("red"), "1.jpg": picture("blue", "JPEG"), "txt": f"Pictures {i}: 图像"}
    for i in range(7)
}


def write(folder: Path, samples: dict[str, dict] = SAMPLES, samples_per_shard: int = 3) -> list[Path]:
    with ShardWriter(folder, "cats", samples_per_shard) as writer:
        for key, members in samples.items():
            writer.write(key, members)
    assert writer.samples == len(samples)
    return writer.shards


def test_the_same_samples_give_the_same_bytes(tmp_path, monkeypatch):
    first = write(tmp_path / "first")
    monkeypatch.setenv("USER", "somebody-else")
    second = write(tmp_path / "second")
    # 7 samples, 3 a shard: 3, 3 and 1.
    assert [shard.name for shard in first] == ["cats-000000.tar", "cats-000001.tar", "cats-000002.tar"]
    assert [shard.name for shard in second] == [shard.name for shard in first]
    assert [shard.read_bytes() for shard in second] == [shard.read_bytes() for shard in first]
    assert [len(open_index(shard)) for shard in first] == [3, 3, 1]


def test_webdataset_reads_what_was_written(tmp_path):
    found = read_by_webdataset(write(tmp_path))
    assert [sample.pop("__key__") for sample in found] == list(SAMPLES)
    for sample, written in zip(found, SAMPLES.values(), strict=True):
        assert set(sample) == set(written)
        for extension, content in written.items():
            if extension == "json":
                assert json.loads(sample[extension]) == content
            else:
                assert sample[extension] == (content.encode() if isinstance(content, str) else content)


def test_a_full_last_shard_is_not_followed_by_an_empty_one(tmp_path):
    assert len(write(tmp_path, dict(list(SAMPLES.items())[:6]))) == 2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cats-000000.tar", "cats-000001.tar"]


def test_without_samples_there_is_no_shard(tmp_path):
    assert write(tmp_path, {}) == []
    assert list(tmp_path.iterdir()) == []


def test_a_shard_appears_only_when_it_is_whole(tmp_path):
    seen = []

    def breaking() -> Iterator[tuple[str, dict]]:
        for number, sample in enumerate(SAMPLES.items()):
            if number == 5:
                raise RuntimeError("the source broke")
            yield sample
            seen.append(len(list(tmp_path.glob("*.tar"))))

    def write_all() -> None:
        with ShardWriter(tmp_path, "cats", 3) as writer:
            for key, members in breaking():
                writer.write(key, members)

    with pytest.raises(RuntimeError, match="the source broke"):
        write_all()
    # s0, s1: none is whole; s2 completes the first shard; s3, s4 are in one that never becomes whole.
    assert seen == [0, 0, 1, 1, 1]
    assert [file.name for file in tmp_path.iterdir()] == ["cats-000000.tar"]
    assert [sample["__key__"] for sample in read_by_webdataset([tmp_path / "cats-000000.tar"])] == ["s0", "s1", "s2"]


def _write_and_die(folder: Path) -> None:
    writer = ShardWriter(folder, samples_per_shard=2)
    for key in "abc":
        writer.write(key, {"txt": key * 100_000})
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_writer_leaves_no_shard_but_whole_ones(tmp_path):
    process = FORK.Process(target=_write_and_die, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [shard.name for shard in tmp_path.glob("*.tar")] == ["shard-000000.tar"]
    assert len(open_index(tmp_path / "shard-000000.tar")) == 2
    # What it was writing lies under a name that no glob for shards finds, and is written over by the next try.
    assert len(list(tmp_path.glob(".*.tmp"))) == 1
    with ShardWriter(tmp_path, samples_per_shard=2) as writer:
        for key in "abc":
            writer.write(key, {"txt": key})
    assert not list(tmp_path.glob(".*.tmp"))


# --- LLaVA's JSON ---


@pytest.fixture
def images(tmp_path) -> Path:
    """A folder of pictures: in subfolders and several formats, one broken, one of a format that shards do not hold."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.png").write_bytes(picture("red"))
    (folder / "sub" / "b.JPG").write_bytes(picture("blue", "JPEG"))
    (folder / "c.webp").write_bytes(picture("green", "WEBP"))
    (folder / "broken.png").write_bytes(picture("red")[:40])
    (folder / "text.png").write_text("no picture")
    (folder / "d.gif").write_bytes(picture("red", "GIF"))
    (folder / "folder.png").mkdir()
    return folder


def test_llava_entries_become_samples(images):
    text = {"id": "text/only é", "conversations": entry(0, question="Hi", answer="Hello")["conversations"]}
    entries = [
        entry("one", "a.png"),
        entry("in a folder", "sub/b.JPG"),
        entry("several", ["a.png", "sub/b.JPG", "c.webp"], "<image>, <image> or <image>?"),
        text,
        entry(7, ["c.webp"], "What is it?"),  # no mark: it is put before the question
        {"conversations": text["conversations"], "image": ""},
    ]
    records = list(llava_records(entries, images))
    red, blue, green = ((images / name).read_bytes() for name in ("a.png", "sub/b.JPG", "c.webp"))
    pictures = [{key: value for key, value in record.members.items() if key != "json"} for record in records]
    assert pictures == [
        {"png": red},
        {"jpg": blue},
        {"0.png": red, "1.jpg": blue, "2.webp": green},
        {},
        {"webp": green},
        {},
    ]
    # Keys are unique and fit for a tar; the id itself is kept in the JSON.
    assert [record.key for record in records] == [
        "00000000-one",
        "00000001-in_a_folder",
        "00000002-several",
        "00000003-text_only_",
        "00000004-7",
        "00000005-5",
    ]
    assert [record.members["json"]["id"] for record in records] == [
        "one",
        "in a folder",
        "several",
        "text/only é",
        "7",
        "5",
    ]
    assert records[0].members["json"] == {"id": "one", "conversations": entries[0]["conversations"]}
    assert records[4].members["json"]["conversations"][0] == {"from": "human", "value": "<image>\nWhat is it?"}


def test_entries_with_one_id_are_different_samples(images):
    records = list(llava_records([entry("same", "a.png")] * 3, images))
    assert len({record.key for record in records}) == 3


def test_more_than_ten_images_keep_their_order(images, tmp_path):
    # "10.png" stands before "2.png" in the tar; the reader goes by the number.
    files = ["a.png", *["c.webp"] * 9, "sub/b.JPG", "c.webp"]
    [record] = llava_records([entry("many", files, "<image>" * 12)], images)
    with ShardWriter(tmp_path / "shards") as writer:
        writer.write(record.key, record.members)
    dataset = ShardDataset([open_index(writer.shards[0])], None, None, 1000)
    assert dataset.read(Slot(0, 0)).images == [(images / file).read_bytes() for file in files]


BAD_ENTRIES = {
    "missing": (entry("x", "none.png"), r"images/none\.png: no such picture"),
    "broken": (entry("x", "broken.png"), r"images/broken\.png: the picture cannot be decoded"),
    "no picture": (
        entry("x", "text.png"),
        r"images/text\.png: the picture cannot be decoded \(its format is not known",
    ),
    "a folder": (entry("x", "folder.png"), r"images/folder\.png: .*Is a directory"),
    "format": (entry("x", "d.gif"), r"images/d\.gif: shards hold pictures as jpg, jpeg, png, webp"),
    "no extension": (entry("x", "a"), r"images/a: shards hold pictures as"),
    "too many marks": (entry("x", "a.png", "<image><image>"), "2 image marks '<image>' in the questions, but 1 images"),
    "too few marks": (entry("x", ["a.png", "a.png"]), "1 image marks '<image>' in the questions, but 2 images"),
    "mark without image": (entry("x"), "1 image marks '<image>' in the questions, but 0 images"),
    "image as object": (entry("x", {"bytes": None}), "'image' must be a file name or a list of file names"),
    "image as number": (entry("x", 7), "'image' must be a file name or a list of file names"),
    "images as numbers": (entry("x", ["a.png", 7]), "'image' must be a file name or a list of file names"),
    "no answer": (entry("x", "a.png", answer=""), "has no answer to learn from"),
    "role": ({"id": "x", "conversations": [{"from": "bot", "value": "Hi"}]}, r"conversations\[0\]: unknown role 'bot'"),
    "no turn": ({"id": "x", "conversations": []}, "'conversations' must be a list of turns"),
    "half a character": (entry("x", "a.png", answer="\ud83d"), "a lone surrogate"),
}


@pytest.mark.parametrize(("bad", "message"), BAD_ENTRIES.values(), ids=BAD_ENTRIES)
def test_a_bad_entry_is_named_or_left_out(images, bad, message):
    entries = [entry("good", "a.png"), bad, entry("also good", "c.webp")]
    with pytest.raises(DataError, match=rf"^entry 1 \(id 'x'\): .*{message}.*; --skip-bad leaves such entries out$"):
        list(llava_records(entries, images))
    skipped: list[str] = []
    records = llava_records(entries, images, skipped)
    # The number stays that of the file, so a key says where its entry is.
    assert [record.key for record in records] == ["00000000-good", "00000002-also_good"]
    assert len(skipped) == 1
    assert skipped[0].startswith("entry 1 (id 'x'): ")


NOT_LLAVA = {
    "not JSON": ('[{"id": 1,', r"not JSON \(.*line 1"),
    "not text": (b"\xff\xfe\x00", "not JSON"),
    "JSON lines": ('{"id": 1}\n{"id": 2}\n', "not JSON"),
    "an object": ('{"id": 1}', "expected LLaVA's JSON, a list of samples, found dict"),
    "no entry": ("[]", "expected LLaVA's JSON, a list of samples, found list"),
    "a list of texts": ('["a"]', "entry 0: expected LLaVA's fields 'conversations' and 'image', found str"),
    "COCO": ('[{"image_id": 3, "caption": "A cat."}]', r"entry 0: .*found \['caption', 'image_id'\]"),
    "text for turns": ('[{"conversations": "Hi"}]', r"entry 0: .*found \['conversations'\]"),
}


@pytest.mark.parametrize(("content", "message"), NOT_LLAVA.values(), ids=NOT_LLAVA)
def test_a_file_of_another_form_is_named(tmp_path, content, message):
    file = tmp_path / "data.json"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=rf"/data\.json: .*{message}"):
        read_llava(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"/none\.json: cannot be read \(No such file or directory\)"):
        read_llava(tmp_path / "none.json")


# --- launch/prepare_shards.py ---


def _main(arguments: list[str], output: Path) -> None:
    # multiprocessing writes tracebacks, and flushes, to whatever these are.
    sys.stdout, sys.stderr = (output / "stdout").open("w"), (output / "stderr").open("w")
    sys.argv = [str(PREPARE), *arguments]
    runpy.run_path(str(PREPARE), run_name="__main__")


@pytest.fixture
def prepare(tmp_path):
    """Runs the entry point on entries of LLaVA's, or on a file: (exit code, stdout, stderr).

    In a fork of this process, which has the imports behind it; the last test starts a fresh one.
    """

    def run(source: list | Path, *options: str) -> tuple[int, str, str]:
        file = source
        if isinstance(source, list):
            file = tmp_path / "cats.json"
            file.write_text(json.dumps(source))
        arguments = ["llava", str(file), "--images", str(tmp_path / "images"), "--out", str(tmp_path / "shards")]
        process = FORK.Process(target=_main, args=([*arguments, *options], tmp_path))
        process.start()
        process.join()
        return process.exitcode, (tmp_path / "stdout").read_text(), (tmp_path / "stderr").read_text()

    return run


def assert_one_message(result: tuple[int, str, str], message: str) -> None:
    code, stdout, stderr = result
    assert code == 2
    assert stdout == ""
    assert "Traceback" not in stderr
    assert stderr.count("error:") == 1
    assert re.search(message, stderr.strip())
    assert stderr.strip().count("\n") == 0


def test_preparing_writes_shards_with_their_indexes(prepare, images, tmp_path):
    entries = [entry(i, ["a.png", "sub/b.JPG"][i % 2]) for i in range(7)]
    code, stdout, stderr = prepare(entries, "--samples-per-shard", "3")
    out = tmp_path / "shards"
    assert (code, stderr) == (0, "")
    assert stdout == f"7 samples in 3 shards in {out}; left out: 0\n"
    shards = [f"cats-00000{i}.tar" for i in range(3)]
    assert sorted(file.name for file in out.iterdir()) == sorted([*shards, *(f"{name}.index.npz" for name in shards)])
    assert len(read_by_webdataset([out / name for name in shards])) == 7


@pytest.mark.parametrize(("bad", "message"), BAD_ENTRIES.values(), ids=BAD_ENTRIES)
def test_preparing_stops_at_a_bad_entry(prepare, images, tmp_path, bad, message):
    result = prepare([entry("good", "a.png"), bad, entry("also good", "c.webp")])
    assert_one_message(result, rf"^error: entry 1 \(id 'x'\): .*{message}.*; --skip-bad leaves such entries out$")
    assert list((tmp_path / "shards").iterdir()) == []  # no part of a shard either


@pytest.mark.parametrize(("content", "message"), NOT_LLAVA.values(), ids=NOT_LLAVA)
def test_preparing_refuses_other_files(prepare, images, tmp_path, content, message):
    file = tmp_path / "data.json"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    assert_one_message(prepare(file, "--skip-bad"), rf"error: {file}: .*{message}")
    assert not (tmp_path / "shards").exists()


def test_preparing_refuses_a_folder_with_shards(prepare, images, tmp_path):
    out = tmp_path / "shards"
    out.mkdir()
    (out / "old.tar").write_bytes(b"1")
    assert_one_message(prepare([entry(0, "a.png")]), f"error: {out} already holds 1 shards; choose another folder")
    assert [(file.name, file.read_bytes()) for file in out.iterdir()] == [("old.tar", b"1")]


def test_preparing_needs_a_folder_of_pictures(prepare, tmp_path):
    message = f"error: --images {tmp_path / 'images'}: no such folder"
    assert_one_message(prepare([entry(0, "a.png")]), message)


def test_preparing_needs_a_size_of_shards(prepare, images):
    code, _, stderr = prepare([entry(0, "a.png")], "--samples-per-shard", "0")
    assert code == 2
    assert "--samples-per-shard 0: expected 1 or more" in stderr


def test_skipping_leaves_out_the_bad_and_counts_them(prepare, images, tmp_path):
    bad = [entry for entry, _ in BAD_ENTRIES.values()]
    entries = [entry("first", "a.png"), *bad, entry("last", "c.webp")]
    code, stdout, stderr = prepare(entries, "--skip-bad")
    assert code == 0
    assert stdout == f"2 samples in 1 shards in {tmp_path / 'shards'}; left out: {len(bad)}\n"
    # Every entry that is missing is named, in order.
    lines = stderr.splitlines()
    assert len(lines) == len(bad)
    for number, line in enumerate(lines, start=1):
        assert line.startswith(f"left out: entry {number} (id 'x'): ")
    found = read_by_webdataset([tmp_path / "shards" / "cats-000000.tar"])
    assert [sample["__key__"] for sample in found] == ["00000000-first", f"{len(bad) + 1:08d}-last"]


def test_skipping_everything_is_an_error(prepare, images, tmp_path):
    code, stdout, stderr = prepare([entry("x", "none.png")] * 2, "--skip-bad")
    assert (code, stdout) == (2, "")
    assert "cats.json: no sample was good enough to keep" in stderr
    assert stderr.count("left out: ") == 2
    assert "Traceback" not in stderr
    assert list((tmp_path / "shards").iterdir()) == []


def test_the_real_data_set_becomes_shards(tmp_path):
    # The command as a user types it, in a fresh process, somewhere else.
    source, folder, out = shared("real/nlvr/conversations.json"), shared("real/nlvr/images"), tmp_path / "shards"
    command = [sys.executable, str(PREPARE), "llava", str(source), "--images", str(folder), "--out", str(out)]
    run = subprocess.run(
        [*command, "--samples-per-shard", "300"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"989 samples in 4 shards in {out}; left out: 0\n"

    entries = json.loads(source.read_text())
    dataset = ShardDataset([open_index(shard) for shard in sorted(out.glob("*.tar"))], None, None, 1000)
    slots = [Slot(shard, i) for shard, index in enumerate(dataset.shards) for i in range(len(index))]
    for entry_, slot in zip(entries, slots, strict=True):
        sample = dataset.read(slot)
        assert sample.images == [(folder / entry_["image"]).read_bytes()]
        expected = [(turn["from"], turn["value"]) for turn in entry_["conversations"]]
        speakers = {"user": "human", "assistant": "gpt"}
        assert [(speakers[turn.role], turn.text) for turn in sample.conversation] == expected

"""Shards to look at, and the commands that look at them, run in this process: to import torch takes seconds."""

import contextlib
import io
import json
import sys
from pathlib import Path
from unittest import mock

import prepare_shards
import webdataset
from PIL import Image
from reference import shared

from trainer.data.writer import ShardWriter
from trainer.errors import run_main


def run(*args: str | Path) -> tuple[int, str, str]:
    """`python launch/prepare_shards.py ARGS`: exit code, stdout, stderr."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", ["prepare_shards.py", *map(str, args)]),
    ):
        try:
            run_main(prepare_shards.main)
        except SystemExit as left:
            code = int(left.code or 0)
    return code, out.getvalue(), err.getvalue()


def picture(colour: str = "red", size: tuple[int, int] = (40, 30), form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, form)
    return buffer.getvalue()


def dialogue(*turns: tuple[str, str]) -> dict:
    """(role, text) of each turn -> a sample's JSON."""
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def question(text: str = "<image>What is it?", answer: str = "It is red.") -> dict:
    return dialogue(("user", text), ("assistant", answer))


def write(folder: Path, samples: dict[str, dict], prefix: str = "shard") -> Path:
    """One tar of samples: key -> members."""
    with ShardWriter(folder, prefix) as writer:
        for key, members in samples.items():
            writer.write(key, members)
    (tar,) = writer.shards
    return tar


def write_by_webdataset(folder: Path) -> str:
    """Shards by the library's own writer, its own encoders and its own way of naming: a pattern of them.

    Ten samples in four tars of three: five captions, five conversations.
    """
    folder.mkdir()
    with webdataset.ShardWriter(f"{folder}/set-%06d.tar", maxcount=3, verbose=0) as writer:
        for number in range(10):
            # Pillow pictures and dicts are encoded by the writer itself.
            image = Image.new("RGB", (64, 48), (20 * number, 100, 200))
            text = {"txt": f"A plain picture, number {number}."} if number % 2 else {"json": question()}
            writer.write({"__key__": f"sample{number:04d}", "jpg": image, **text})
    return f"{folder}/set-{{000000..000003}}.tar"


def write_nlvr(folder: Path, samples: int) -> str:
    """Shards of the first of NLVR's real pictures, by the command: a pattern of them. Skips where NLVR is absent."""
    source = shared("real/nlvr/conversations.json")
    subset = folder / "nlvr.json"
    subset.write_text(json.dumps(json.loads(source.read_text())[:samples]))
    arguments = ("--images", source.parent / "images", "--out", folder / "nlvr", "--samples-per-shard", "25")
    code, out, err = run("llava", subset, *arguments, "--workers", "1")
    assert code == 0, out + err
    return f"{folder}/nlvr/*.tar"

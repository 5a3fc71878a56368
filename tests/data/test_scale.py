"""Ten million samples in a thousand shards: what a start costs, and a jump to any step.

The tars are sparse: only their indexes and lengths are there, in the files that indexing and measuring would leave.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import demo_task
import numpy as np
import pytest

from trainer.data.index import VERSION, open_index
from trainer.data.kept import save_kept
from trainer.data.lengths import VERSION as LENGTHS_VERSION
from trainer.data.lengths import Lengths
from trainer.data.reader import ShardReader
from trainer.data.template import ChatTemplate
from trainer.models.tokenization_qwen import IMAGE_PLACEHOLDER, build_tokenizer

pytestmark = pytest.mark.long

SHARDS, SAMPLES = 1000, 10_000
IMAGE_LENGTH = 256
MAX_LENGTH = 2048
TAR_BYTES = 2**30
GLOBAL_BATCH = 128

SECONDS, BYTES = 10, 2**30
"""The limits that the plan is held to. Seconds of the processor: a busy machine is to decide nothing."""

PLAN = f"""
import json, sys, time
from pathlib import Path
from trainer.config import DataConfig, ShardsConfig
from trainer.data.lengths import Lengths
from trainer.data.order import global_batch
from trainer.data.plan import make_stream
from trainer.data.template import ChatTemplate
from trainer.models.tokenization_qwen import IMAGE_PLACEHOLDER, build_tokenizer
from trainer.open_data import open_cache, open_reader, open_sources

folder, mode, step = sys.argv[1], sys.argv[2], int(sys.argv[3])
tokenizer = build_tokenizer(Path(folder, "qwen.tiktoken"))
template = ChatTemplate(tokenizer, tokenizer.convert_tokens_to_ids({IMAGE_PLACEHOLDER!r}), {IMAGE_LENGTH})

def peak():  # not `ru_maxrss`, which begins with the parent's
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

before = peak()

def timed(task):
    start, wall = time.process_time(), time.perf_counter()
    result = task()
    return result, (time.process_time() - start, time.perf_counter() - wall)

def open_stream():
    data = DataConfig()
    sources = open_sources([ShardsConfig("large", folder + "/*.tar")], open_cache(data))
    lengths = Lengths(open_reader(sources, data, open_cache(data)), template) if mode == "packed" else None
    if lengths is not None:
        lengths.build()
    return make_stream(sources, 1, lengths, {MAX_LENGTH}), lengths

(stream, lengths), opening = timed(open_stream)
_, jump = timed(lambda: global_batch(stream, step, {GLOBAL_BATCH}))
rows, thousand = timed(lambda: [stream.row(step * {GLOBAL_BATCH} + i) for i in range(1000)])
fill = sum(min(lengths(slot), {MAX_LENGTH}) for row in rows for slot in row) / {MAX_LENGTH} / 1000 if lengths else 0
print(json.dumps({{
    "opening": opening, "jump": jump, "thousand": thousand, "peak": peak(), "imports": before,
    "rows": stream.sources[0].order.epoch_size, "samples": sum(map(len, rows)), "fill": fill,
}}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A folder of indexed and measured shards: a sample is a picture and 20 to 1,500 tokens of text."""
    folder = tmp_path_factory.mktemp("large")
    demo_task.write_vocabulary(folder / "qwen.tiktoken", seed=0)
    tokenizer = build_tokenizer(folder / "qwen.tiktoken")
    template = ChatTemplate(tokenizer, tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER), IMAGE_LENGTH)
    # As `launch/inspect_step.py` and training have it: with the prompts of a configuration's defaults.
    kind = f"lengths-{Lengths(ShardReader([], 'You are a helpful assistant.'), template).fingerprint}"
    rng = np.random.default_rng(0)
    keys = np.frombuffer(b"".join(b"%09d" % i for i in range(SAMPLES)), np.uint8)
    members = 2 * SAMPLES
    is_image = np.arange(members) % 2 == 0
    for number in range(SHARDS):
        tar = folder / f"large-{number:06d}.tar"
        with tar.open("wb") as file:
            file.truncate(TAR_BYTES)
        stat = tar.stat()
        columns = {
            "samples": np.array(SAMPLES), "digest": np.frombuffer(number.to_bytes(32, "big"), np.uint8),
            "keys": np.frombuffer(number.to_bytes(32, "little"), np.uint8),
            "key_bytes": keys, "key_ends": np.arange(1, SAMPLES + 1) * 9,
            "member_ends": np.arange(1, SAMPLES + 1) * 2, "is_image": is_image, "is_json": ~is_image,
            "offset": np.arange(members) * 50_000, "size": np.full(members, 40_000),
            "width": np.where(is_image, 640, 0).astype(np.int32),
            "height": np.where(is_image, 480, 0).astype(np.int32),
        }  # fmt: skip
        save_kept(tar, "index", [VERSION, stat.st_size, stat.st_mtime_ns], columns)
        text = np.clip(rng.lognormal(5, 0.8, SAMPLES), 20, 1500).astype(np.int32)
        lengths = {"text_tokens": text, "images": np.ones(SAMPLES, np.int32)}
        save_kept(tar, kind, [LENGTHS_VERSION, stat.st_size, stat.st_mtime_ns], lengths)
    assert len(open_index(tar)) == SAMPLES
    # The number of packs is counted once, as indexes are made once: in parallel, at the first start.
    print("first start:", plan(folder, "packed", 0))
    return folder


def plan(folder: Path, mode: str, step: int) -> dict:
    """What a fresh process measures."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PLAN, str(folder), mode, str(step)],
        env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(mode, step, found)
    return found


@pytest.mark.parametrize("mode", ["packed", "plain"])
def test_ten_million_samples_open_and_jump_within_limits(large, mode):
    # 10 million samples of 256 + about 200 tokens make some 2.3 million packs of 2,048, 128 a step: 18,000 steps an
    # epoch. The last step is in the sixth epoch (of packs) or the second (of samples).
    found = {step: plan(large, mode, step) for step in (0, 100, 10_000, 100_000)}
    for step, measured in found.items():
        assert sum(measured[part][0] for part in ("opening", "jump", "thousand")) < SECONDS, (step, found)
        assert measured["peak"] < BYTES, (step, found)
    # A jump reads the window that it lands in, wherever that is.
    jumps = [measured["jump"][0] for measured in found.values()]
    assert max(jumps) < 3 * min(jumps) + 0.1, found
    if mode == "packed":
        assert all(measured["fill"] > 0.95 for measured in found.values()), found
        assert all(measured["samples"] > 3000 for measured in found.values()), found

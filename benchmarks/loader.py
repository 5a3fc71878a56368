"""Pictures from shards to the model's pixels: this loader against the CLIP processor of Transformers.

    python benchmarks/loader.py [--pictures 240] [--rounds 5]

Both read the same JPEGs from the same tars in one worker process of a torch `DataLoader`, in alternating rounds, and
end at the same normalised pixels. Time is processor time, of the worker and of the process it feeds together: other
programs on the machine hardly change it. Prints a Markdown table; leaves with 1 if the loader gets through fewer than
2.5 times the pictures of 640 x 480, or if any pixel differs by more than one level of 255 before normalising. Of larger
pictures a greater part of the time is the JPEG decoder's, which both share: there the factor is lower.
"""

import argparse
import io
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPImageProcessor

from trainer.data.index import open_index
from trainer.data.order import Slot
from trainer.data.reader import ShardReader
from trainer.data.transform import ImageTransform
from trainer.data.writer import ShardWriter

SIZE = 224
BATCH_SIZE = 16
DISTINCT = 48
"""Pictures that are made; rounds go through them again and again, and each is decoded anew."""

SIDES = [(640, 480), (1024, 768)]
"""Width and height of the two sets: COCO's most frequent, and a larger one. The first is judged."""

FEWEST_TIMES = 2.5
MOST_LEVELS = 1


def photo(seed: int, width: int, height: int) -> bytes:
    """A JPEG with the spectrum of a photo, the coarser the stronger, some grain, and the bytes of one."""
    rng = np.random.default_rng(seed)
    levels = np.full((height, width, 3), 128, np.float32)
    for cells, deviation in [(3, 80), (10, 45), (40, 22), (120, 9)]:
        for channel in range(3):
            coarse = Image.fromarray(rng.normal(0, deviation, (cells * height // width, cells)).astype(np.float32))
            levels[..., channel] += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    levels += rng.normal(0, 5, (height, width, 1))
    buffer = io.BytesIO()
    Image.fromarray(levels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


class Pictures(Dataset):
    """Every picture of the shards, `repeats` times, each by offset from its tar and through `transform`."""

    def __init__(self, shards: list[Path], transform: Callable[[bytes], torch.Tensor], repeats: int):
        self.reader = ShardReader([open_index(shard).shard for shard in shards])
        slots = [Slot(s, i) for s, shard in enumerate(self.reader.shards) for i in range(len(shard))]
        self.slots = slots * repeats
        self.transform = transform

    def __len__(self) -> int:
        return len(self.slots)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.transform(self.reader.images(self.slots[i])[0])


class ClipProcessor:
    """What a training script does with the processor of Transformers: encoded -> (3, SIZE, SIZE) fp32, normalised."""

    def __init__(self) -> None:
        self.processor = CLIPImageProcessor()

    def __call__(self, encoded: bytes) -> torch.Tensor:
        image = Image.open(io.BytesIO(encoded))
        return self.processor(image, return_tensors="pt")["pixel_values"][0]


@dataclass
class Round:
    """Seconds a picture: processor time in the worker and in the process that takes its batches, and by the clock."""

    worker: float
    trainer: float
    elapsed: float


def one_thread(_worker: int) -> None:
    torch.set_num_threads(1)


class Arm:
    """One side: its worker lives through all rounds, as in a training of many hours, and rests while the other's works.

    finish: what the training process still does with each batch.
    """

    def __init__(self, name: str, pictures: Pictures, finish: Callable[[torch.Tensor], torch.Tensor]):
        self.name, self.pictures, self.finish = name, pictures, finish
        self.rounds: list[Round] = []
        others = set(multiprocessing.active_children())
        self.loader = DataLoader(
            pictures,
            BATCH_SIZE,
            num_workers=1,
            multiprocessing_context="fork",
            worker_init_fn=one_thread,
            persistent_workers=True,
        )
        for batch in self.loader:  # a round to warm up
            finish(batch)
        (self.worker,) = set(multiprocessing.active_children()) - others

    def run_round(self) -> None:
        started, used, used_by_worker = time.perf_counter(), time.process_time(), self._worker_seconds()
        for batch in self.loader:
            self.finish(batch)
        spent = self._worker_seconds() - used_by_worker, time.process_time() - used, time.perf_counter() - started
        self.rounds.append(Round(*(seconds / len(self.pictures) for seconds in spent)))

    def _worker_seconds(self) -> float:
        # Linux's clock of another process's processor time (clock_getcpuclockid, which Python does not offer).
        assert self.worker.pid is not None
        return time.clock_gettime(~self.worker.pid << 3 | 2)

    def median(self, part: Callable[[Round], float]) -> float:
        return statistics.median(map(part, self.rounds))


def largest_difference(peer: Pictures, ours: Pictures, transform: ImageTransform) -> float:
    """Between the pixels of both before normalising, in levels of 255."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (transform.mean, transform.std))
    largest = 0.0
    for i in range(min(len(ours), DISTINCT)):
        levels = (peer[i] * std + mean) * 255
        # The peer's levels are whole numbers; only the way back from normalised ones is not exact.
        assert (levels - levels.round()).abs().max() < 0.01
        largest = max(largest, float((levels.round() - ours[i].float()).abs().max()))
    return largest


def compare(folder: Path, sides: tuple[int, int], pictures: int, rounds: int) -> tuple[float, float]:
    """Writes the shards of one set, measures, prints its rows. Returns how many times faster, and the difference."""
    jpegs = [photo(seed, *sides) for seed in range(DISTINCT)]
    with ShardWriter(folder, f"{sides[0]}", samples_per_shard=DISTINCT // 2) as writer:
        for number, jpeg in enumerate(jpegs):
            writer.write(f"{number:08d}", {"jpg": jpeg, "txt": f"Picture {number}."})
    transform, repeats = ImageTransform(SIZE), max(1, pictures // DISTINCT)
    processor = ClipProcessor()
    peer, ours = (Pictures(writer.shards, to_pixels, repeats) for to_pixels in (processor, transform))
    difference = largest_difference(peer, ours, transform)
    arms = [
        Arm(f"Transformers' `{type(processor.processor).__name__}`", peer, lambda batch: batch),
        Arm("this loader", ours, lambda batch: transform.normalize(batch, torch.float32)),
    ]
    for _ in range(rounds):
        for arm in arms:
            arm.run_round()
    kilobytes = statistics.mean(map(len, jpegs)) / 1000
    totals = [arm.median(lambda each: each.worker + each.trainer) for arm in arms]
    for arm, total in zip(arms, totals, strict=True):
        worker, trainer, elapsed = (arm.median(attrgetter(part)) for part in ("worker", "trainer", "elapsed"))
        print(
            f"| {sides[0]} x {sides[1]}, {kilobytes:.0f} KB | {arm.name} | {1000 * worker:.2f} | {1000 * trainer:.2f} "
            f"| {1 / total:.0f} | {totals[0] / total:.2f} | {1 / elapsed:.0f} | {difference:.0f} |",
            flush=True,
        )
    return totals[0] / totals[1], difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=240, help=f"a round, in whole sets of {DISTINCT}")
    parser.add_argument("--rounds", type=int, default=5, help="of each side; medians are reported")
    parser.add_argument("--at-least", type=float, default=FEWEST_TIMES, help="times the pictures, or it leaves with 1")
    args = parser.parse_args()
    torch.set_num_threads(1)
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"One worker, one thread, {os.cpu_count()} cores ({capability}); PyTorch {torch.__version__}.\n")
    print("| JPEGs | | worker, ms | trainer, ms | pictures / s and core | times | pictures / s | levels apart |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        results = [compare(Path(folder), sides, args.pictures, args.rounds) for sides in SIDES]
    times, difference = results[0][0], max(difference for _, difference in results)
    if times < args.at_least or difference > MOST_LEVELS:
        print(f"\nexpected at least {args.at_least} times the pictures and at most {MOST_LEVELS} level of difference")
        sys.exit(1)


if __name__ == "__main__":
    main()

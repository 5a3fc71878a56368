"""How well a step uses the machine: where its time goes, and which share of the device's peak its work takes.

MFU counts what the model needs for the real tokens, frozen parts as they are; HFU what is computed, with padding and
with what activation checkpointing computes again. (PaLM, Chowdhery et al. 2022, appendix B)
"""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from operator import mul
from typing import Any

import torch
from torch.profiler import record_function

from trainer.data.samples import Batch
from trainer.errors import ConfigError
from trainer.evaluate import count_supervised
from trainer.flops import BatchShape, flops_of_each
from trainer.models.modeling_mqwen_vl import MQWenForConditionalGeneration

PEAK_TFLOPS = {
    "H100 PCIe": (756, 51), "H100 NVL": (835, 60), "H100": (989, 67), "H800": (989, 67), "H200": (989, 67),
    "H20": (148, 44), "A100": (312, 19.5), "A800": (312, 19.5), "L40S": (362, 91.6), "L40": (181, 90.5),
    "A40": (150, 37.4), "RTX 4090": (165, 82.6), "RTX 3090": (71, 35.6),
}  # fmt: skip
"""By words of the device's name, the first that fit: bf16 with dense matrices and fp32 sums, and fp32. (source:
NVIDIA's data sheets)"""

OTHERS = re.compile(r"\b(MIG|Laptop|Ti|SUPER|Max-Q|D)\b")
"""Words of devices that are less, or more, than their name's other words say."""


def peak_flops(device_name: str, bf16: bool) -> float | None:
    """Operations a second of a device at the most; None where that is not known."""
    if OTHERS.search(device_name):
        return None
    found = next((peaks for words, peaks in PEAK_TFLOPS.items() if re.search(rf"\b{words}\b", device_name)), None)
    return found and found[0 if bf16 else 1] * 1e12


def shape_of(batch: Batch) -> BatchShape:
    """The shape of a batch that a loader has made."""
    rows, width = batch["input_ids"].shape
    images, supervised, ends = len(batch["pixel_values"]), count_supervised(batch), batch["document_ends"]
    if ends is None:
        return BatchShape.padded(rows, width, images, supervised)
    return BatchShape(width, sum((end - start) ** 2 for start, end in pairwise([0, *ends])), images, supervised, True)


class StepMeter:
    """Times the parts of a step and counts its operations, on this rank."""

    def __init__(self, model: MQWenForConditionalGeneration, recompute_every: int, device: torch.device):
        self._on_cuda = device.type == "cuda"
        bf16 = model.multi_modal_projector.linear_1.weight.dtype == torch.bfloat16
        self._peak = peak_flops(torch.cuda.get_device_name(device), bf16) if self._on_cuda else None
        self._parts: list[tuple[str, Any, Any]] = []
        self._needed = self._computed = None
        with suppress(ConfigError):  # of layers of a kind that is not known
            self._needed, self._computed = flops_of_each(model), flops_of_each(model, recompute_every)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Times what is inside as a part of the step; a profile shows it by this name."""
        started = self._now()
        with record_function(part):
            yield
        self._parts.append((part, started, self._now()))

    def _now(self) -> Any:
        # On a GPU, where the host runs ahead, time is what passes between two marks in its own queue of work.
        if not self._on_cuda:
            return time.perf_counter()
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        return mark

    def times(self) -> dict[str, float]:
        """Seconds of the step's parts, as keys of its line. Waits for the device; the next step starts anew."""
        if self._on_cuda:
            torch.cuda.synchronize()
        found: dict[str, float] = {}
        for part, started, ended in self._parts:
            seconds = started.elapsed_time(ended) / 1000 if self._on_cuda else ended - started
            found[f"{part}_time"] = found.get(f"{part}_time", 0.0) + seconds
        self._parts.clear()
        return {name: round(seconds, 4) for name, seconds in found.items()}

    def operations(self, micro: list[Batch]) -> list[float]:
        """Of a step's micro-batches on this rank: operations that its tokens need, and those that are computed."""
        if not self._needed or not self._computed:
            return [0.0, 0.0]
        needed = computed = 0.0
        for batch in micro:
            shape = shape_of(batch)
            others = max(1, shape.images), shape.supervised  # without an image a blank one is computed
            needed += sum(map(mul, self._needed, (batch["tokens"], batch["squares"], *others)))
            computed += sum(map(mul, self._computed, (shape.tokens, shape.squares, *others)))
        return [needed, computed]

    def shares(self, needed: float, computed: float, seconds: float, ranks: int) -> dict[str, float | None]:
        """tflops: needed operations a second and rank, 10^12; mfu and hfu, or None where the peak is not known."""
        if not self._needed:
            return {"tflops": None, "mfu": None, "hfu": None}
        each = [operations / seconds / ranks for operations in (needed, computed)]
        mfu, hfu = (self._peak and round(of_rank / self._peak, 4) for of_rank in each)
        return {"tflops": round(each[0] / 1e12, 4), "mfu": mfu, "hfu": hfu}

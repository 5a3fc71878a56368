"""What a step measures of itself: operations from shapes, shares of a peak, seconds of its parts."""

import json
import time
from itertools import pairwise

import pytest
import torch
from ranks import run_ranks
from shapes import batch_of, small_model

from trainer.config import Config
from trainer.flops import BatchShape, step_flops
from trainer.freeze import freeze
from trainer.meters import StepMeter, peak_flops


def batch(lengths: list[int], width: int | None, images: int, supervised: int) -> dict:
    """What a meter reads of a micro-batch. width: of padded rows; None: packed."""
    ends = None if width else list(torch.tensor(lengths).cumsum(0).tolist())
    ids = torch.zeros(len(lengths) if width else 1, width or sum(lengths), dtype=torch.long)
    labels = torch.full_like(ids, -100)
    labels.view(-1)[1 : 1 + supervised] = 5
    return {
        "input_ids": ids, "labels": labels, "pixel_values": torch.empty(images, 3, 2, 2), "document_ends": ends,
        "tokens": sum(lengths), "squares": sum(n**2 for n in lengths),
    }  # fmt: skip


def test_needed_are_the_real_tokens_once_and_computed_all_that_runs():
    model = small_model()
    freeze(model, ["vision_tower", "language_model"])
    meter = StepMeter(model, 2, torch.device("cpu"))
    needed, computed = meter.operations([batch([200, 100], 200, 1, 30), batch([150, 90, 60], None, 2, 50)])
    padded, packed = BatchShape(300, 200**2 + 100**2, 1, 30), BatchShape(300, 150**2 + 90**2 + 60**2, 2, 50)
    assert needed == pytest.approx(step_flops(model, padded).total + step_flops(model, packed).total)
    of_padded = step_flops(model, BatchShape.padded(2, 200, 1, 30), 2)
    of_packed = step_flops(model, packed, 2)
    both = (of_padded, of_packed)
    assert computed == pytest.approx(sum(work.total + work.recomputed for work in both))
    assert min(work.recomputed for work in both) > 0


def test_frozen_parts_count_as_they_are():
    frozen, trained = small_model(), small_model()
    freeze(frozen, ["vision_tower", "language_model"])
    freeze(trained, ["vision_tower"])
    step = [batch([200], 200, 1, 60)]
    found = [StepMeter(model, 0, torch.device("cpu")).operations(step)[0] for model in (frozen, trained)]
    # Two passes and three, over all but the tower.
    assert 1.35 < found[1] / found[0] < 1.5


def test_shares_are_of_the_peak_of_all_ranks():
    meter = StepMeter(small_model(), 0, torch.device("cpu"))
    assert meter.shares(4e12, 6e12, 2.0, 2) == {"tflops": 1.0, "mfu": None, "hfu": None}  # a CPU's peak is not known
    meter._peak = 10e12
    assert meter.shares(4e12, 6e12, 2.0, 2) == {"tflops": 1.0, "mfu": 0.1, "hfu": 0.15}


def test_peaks_are_those_of_the_data_sheets():
    assert peak_flops("NVIDIA H100 80GB HBM3", bf16=True) == 989e12
    assert peak_flops("NVIDIA H100 PCIe", bf16=True) == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", bf16=False) == 19.5e12
    assert peak_flops("NVIDIA GeForce RTX 4090", bf16=True) == 165e12


@pytest.mark.parametrize(
    "device",
    ["AMD EPYC", "NVIDIA RTX A1000", "NVIDIA RTX A4000", "NVIDIA GH200 480GB", "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
     "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 3090 Ti"],
)  # fmt: skip
def test_a_device_that_only_sounds_like_one_has_no_known_peak(device):
    assert peak_flops(device, bf16=True) is None


def test_parts_are_timed_and_start_anew_with_each_step(monkeypatch):
    meter = StepMeter(small_model(), 0, torch.device("cpu"))
    clock = iter([1.0, 1.25, 2.0, 2.5, 3.0, 3.25] * 2)  # at the start and the end of each part
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    for _ in range(2):
        for part in ("forward", "backward", "forward"):
            with meter.timed(part):
                pass
        assert meter.times() == {"forward_time": 0.5, "backward_time": 0.5}


def run(world, config_file: str, out: str) -> list[dict]:
    from trainer.setup import setup
    from trainer.train import train

    state = setup(Config.load(config_file, [f"run.output_dir={out}"], world.world_size), world, "none")
    train(state, 2)
    state.engine.destroy()
    return [json.loads(line) for line in (state.output_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_says_where_its_time_goes(tiny_run, tmp_path):
    for line in run_ranks(run, 2, str(tiny_run), str(tmp_path / "run"))[0]:
        parts = [line[f"{part}_time"] for part in ("data", "forward", "backward", "optimizer")]
        assert min(parts) >= 0
        assert 0.5 * line["step_time"] < sum(parts) <= line["step_time"]
        assert line["tflops"] > 0


def test_lines_of_a_real_batch_are_as_its_shape():
    model = small_model()
    inputs, shape = batch_of(model, packed=True)
    ends = inputs["cu_seq_lens_q"].tolist()
    lengths = [end - start for start, end in pairwise(ends)]
    made = batch(lengths, None, len(inputs["pixel_values"]), 0)
    made |= {"labels": inputs["labels"]}
    needed, computed = StepMeter(model, 0, torch.device("cpu")).operations([made])
    assert needed == computed == pytest.approx(step_flops(model, shape).total)

"""What only a GPU has: its attention kernel, fused passes in bf16, the loss at the real vocabulary, whole runs."""

import gzip
import json

import pytest
import torch
from commands import deepspeed
from jobs import lines_of
from shapes import batch_of, small_model, write_small_run

from trainer.engine import fuse_elementwise
from trainer.freeze import freeze
from trainer.models.linear_cross_entropy import linear_cross_entropy
from trainer.models.packed_attention import packed_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Length of the difference, as a share of the expected one's."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / expected.norm())


def test_packed_attention_is_that_of_each_document_alone():
    lengths, heads, channels = [700, 1, 37, 310], 4, 128
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, sum(lengths), channels).bfloat16() for _ in range(4)]
    found = []
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float64)):
        query, key, value, upstream = (x.to(device, dtype) for x in inputs)
        leaves = [x.requires_grad_() for x in (query, key, value)]
        output = packed_attention(query, key, value, ends.to(device), max(lengths), channels**-0.5)
        output.backward(upstream.transpose(1, 2))
        found.append([output, *(leaf.grad for leaf in leaves)])
    for own, expected in zip(*found, strict=True):
        assert relative_error(own, expected) < 1e-2


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trains"])
def test_loss_over_the_real_vocabulary_is_the_plain_one(trains):
    torch.manual_seed(0)
    hidden = torch.randn(1, 300, 512, device="cuda").bfloat16()
    weight = (0.02 * torch.randn(151_936, 512, device="cuda")).bfloat16()
    targets = torch.randint(0, 151_936, (300,), device="cuda")
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        rows, head = hidden.to(dtype).clone().requires_grad_(), weight.to(dtype).clone().requires_grad_(trains)
        if dtype == torch.bfloat16:
            loss = linear_cross_entropy(rows, head, targets)
        else:
            loss = torch.nn.functional.cross_entropy((rows @ head.t())[0], targets)
        loss.backward()
        found.append([loss, rows.grad, *([head.grad] if trains else [])])
    for own, expected in zip(*found, strict=True):
        assert relative_error(own, expected) < 1e-2


@pytest.mark.parametrize("frozen", [["vision_tower", "language_model"], ["vision_tower"]], ids=["align", "instruct"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_model_in_bf16_fused_or_not_is_that_of_the_cpu_in_fp32(frozen, packed):
    inputs, _ = batch_of(small_model(), packed, width=512)
    found: list[list[torch.Tensor]] = []
    for device, dtype, fused in (("cpu", torch.float32, False), ("cuda", torch.bfloat16, False),
                                 ("cuda", torch.bfloat16, True)):  # fmt: skip
        model = small_model(torch.bfloat16).to(device, dtype)  # the same weights for all
        freeze(model, frozen)
        if fused:
            fuse_elementwise(model)
        there = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
        there["pixel_values"] = there["pixel_values"].to(dtype)
        loss = model(**there, loss_only=True, use_cache=False).loss
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([loss, torch.cat([grad.flatten().float() for grad in grads])])
    assert not torch.equal(found[1][1], found[2][1])  # what is fused rounds otherwise
    for own in found[1:]:
        assert relative_error(own[0], found[0][0]) < 2e-3
        assert relative_error(own[1], found[0][1]) < 3e-2


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    return write_small_run(tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_a_run_fused_and_packed_is_profiled_and_goes_on_from_its_checkpoint(small_run, tmp_path, zero):
    run = tmp_path / "run"
    settings = [f"run.output_dir={run}", f"deepspeed=ds_configs/{zero}.json", "train.bf16=true",
                "model.fuse_elementwise=true", "data.packing=true", "data.num_workers=2", "train.max_steps=6",
                "checkpoint.save_steps=3", "checkpoint.keep_last=0"]  # fmt: skip
    command = ["--config", str(small_run), "--set", *settings]
    deepspeed("--profile", "2", *command, ranks=1)
    whole = lines_of(run)
    assert [line["step"] for line in whole] == list(range(1, 7))
    assert all(line["loss"] > 0 for line in whole)
    (trace,) = (run / "profile").iterdir()
    with gzip.open(trace, "rt") as file:
        assert any(event.get("cat") == "kernel" for event in json.load(file)["traceEvents"])

    deepspeed("--resume", str(next(run.glob("checkpoint-*3"))), *command, ranks=1)
    again = lines_of(run)
    assert [line["step"] for line in again] == list(range(1, 7))
    for own, expected in zip(again, whole, strict=True):
        # Sums of a GPU's kernels are not the same twice.
        assert own["loss"] == pytest.approx(expected["loss"], rel=1e-3)
        assert own["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2e-2)

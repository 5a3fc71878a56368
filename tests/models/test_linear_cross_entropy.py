"""The chunked loss equals the plain one: value and gradients against `F.cross_entropy` in float64.

Chunks are made so small here that a few rows span several of them.
"""

import pytest
import torch
import torch.nn.functional as F

from trainer.models import linear_cross_entropy as module
from trainer.models.linear_cross_entropy import IGNORE_INDEX, at_positions, linear_cross_entropy, supervised_positions

# B rows, T tokens, D hidden size, V vocabulary. Row 0 supervises 8 targets (1 to 8), row 1 the 3 last ones.
B, T, D, V = 2, 9, 16, 50
SUPERVISED = 8 + 3
TOLERANCE = {"atol": 1e-6, "rtol": 1e-5}
"""fp32 against float64: 24 bits, a few sums of 50."""


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(6)
    hidden = torch.randn(B, T, D, generator=generator)
    weight = torch.randn(V, D, generator=generator)
    labels = torch.randint(0, V, (B, T), generator=generator)
    labels[1, :6] = IGNORE_INDEX
    return hidden, weight, labels


def loss_of(hidden, weight, labels, num_items=None) -> torch.Tensor:
    """As the model has it: hidden states (B, T, D) and labels (B, T)."""
    positions, targets = supervised_positions(labels)
    return linear_cross_entropy(at_positions(hidden, positions), weight, targets, num_items)


def reference(hidden, weight, labels, num_items=None):
    """All logits at once, in float64: the loss and its gradients by hidden states and weight."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logits = (hidden @ weight.T)[:, :-1].flatten(0, 1)
    total = F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    loss = total / (num_items or max(1, (labels[:, 1:] != IGNORE_INDEX).sum()))
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


def assert_close(actual, expected, **tolerance):
    torch.testing.assert_close(actual.detach().double(), expected, **(TOLERANCE | tolerance))


# One row of logits a chunk, two chunks that divide the 11 supervised rows unevenly, exactly one chunk, room to spare;
# and less than a row, which must still be one row.
@pytest.mark.parametrize("rows", [0.5, 1, 4, 6, SUPERVISED, 1000])
@pytest.mark.parametrize("trains", ["both", "hidden", "weight"])
def test_value_and_gradients_equal_the_plain_loss(monkeypatch, rows, trains):
    monkeypatch.setattr(module, "CHUNK_LOGITS", dict.fromkeys((False, True), int(rows * V)))
    hidden, weight, labels = inputs()
    expected, grad_hidden, grad_weight = reference(hidden, weight, labels)
    hidden.requires_grad_(trains != "weight")
    weight.requires_grad_(trains != "hidden")
    loss = loss_of(hidden, weight, labels)
    assert (loss.dtype, loss.shape) == (torch.float32, ())
    loss.backward()
    assert_close(loss, expected)
    for tensor, gradient in ((hidden, grad_hidden), (weight, grad_weight)):
        if tensor.requires_grad:
            assert_close(tensor.grad, gradient)
        else:
            assert tensor.grad is None


def test_a_chunk_is_as_large_as_its_setting_says(monkeypatch):
    # Without this, the cases above could all run in one chunk.
    monkeypatch.setattr(module, "CHUNK_LOGITS", dict.fromkeys((False, True), 4 * V))
    sizes = []
    amax = torch.Tensor.amax
    monkeypatch.setattr(torch.Tensor, "amax", lambda x, dim, **kw: sizes.append(x.shape) or amax(x, dim, **kw))
    loss_of(*inputs())
    assert sizes == [(4, V), (4, V), (3, V)]  # 11 supervised rows, not all 18


@pytest.mark.parametrize("num_items", [1000, torch.tensor(1000), torch.tensor([1000])])
def test_the_divisor_may_be_large_and_a_tensor_and_the_weights_fp16(num_items):
    hidden, weight, labels = inputs()
    hidden, weight = (x.half().requires_grad_() for x in (hidden, weight))
    expected, *gradients = reference(hidden, weight, labels, 1000)
    loss = loss_of(hidden, weight, labels, num_items)
    (1024 * loss).backward()  # as a loss scaler does
    assert_close(loss, expected, rtol=2e-3)
    for tensor, gradient in zip((hidden, weight), gradients, strict=True):
        assert_close(tensor.grad / 1024, gradient, atol=0.01 * gradient.abs().max().item())


def test_in_bf16_the_divisor_is_no_error_common_to_all_gradients():
    # 1/1027 is 0.26 % off in bf16; of 1/1024 nothing is lost. Else the gradients only round, each by itself.
    generator = torch.Generator().manual_seed(7)
    labels = torch.randint(0, V, (B, 257), generator=generator)
    sums = []
    for divisor in (1024, 1027):
        hidden = torch.randn(B, 257, D, generator=torch.Generator().manual_seed(8)).bfloat16().requires_grad_()
        weight = torch.randn(V, D, generator=torch.Generator().manual_seed(9)).bfloat16().requires_grad_()
        loss_of(hidden, weight, labels, divisor).backward()
        sums.append([tensor.grad.double() * divisor for tensor in (hidden, weight)])
    for exact, rounded in zip(*sums, strict=True):
        assert abs((exact * rounded).sum() / (exact * exact).sum() - 1) < 4e-4


def test_without_gradients_only_the_value_is_computed():
    hidden, weight, labels = inputs()
    loss = loss_of(hidden, weight, labels)
    assert not loss.requires_grad
    assert_close(loss, reference(hidden, weight, labels)[0])


def test_upstream_gradient_scales_both(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_LOGITS", dict.fromkeys((False, True), 4 * V))
    hidden, weight, labels = inputs()
    _, grad_hidden, grad_weight = reference(hidden, weight, labels)
    hidden.requires_grad_()
    weight.requires_grad_()
    (loss_of(hidden, weight, labels) * -3).backward()
    assert_close(hidden.grad, -3 * grad_hidden)
    assert_close(weight.grad, -3 * grad_weight)


def test_the_divisor_is_num_items():
    hidden, weight, labels = inputs()
    hidden.requires_grad_()
    expected, grad_hidden, _ = reference(hidden, weight, labels, num_items=40)
    loss = loss_of(hidden, weight, labels, num_items=40)
    loss.backward()
    assert_close(loss, expected)
    assert_close(hidden.grad, grad_hidden)
    # The default divisor is the number of targets: 11.
    assert_close(loss_of(hidden, weight, labels), expected * 40 / SUPERVISED)


def test_micro_batches_add_up_to_the_batch():
    # 8 and 3 targets. Each divided by 11, their sum is the mean over the batch; the mean of means is not.
    hidden, weight, labels = inputs()
    whole = loss_of(hidden, weight, labels)
    rows = [loss_of(hidden[i : i + 1], weight, labels[i : i + 1], SUPERVISED) for i in range(B)]
    torch.testing.assert_close(sum(rows), whole)
    means = [loss_of(hidden[i : i + 1], weight, labels[i : i + 1]) for i in range(B)]
    assert (sum(means) / 2 - whole).abs() > 1e-2


@pytest.mark.parametrize("num_items", [None, 0, 7])
def test_no_supervised_label_gives_zero_with_a_graph(num_items):
    # Every rank has to run backward; a batch may hold prompts only, or have its only label at position 0, which no
    # position predicts.
    hidden, weight, labels = inputs()
    labels[:, 1:] = IGNORE_INDEX
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = loss_of(hidden, weight, labels, num_items)
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad.count_nonzero() == 0
    assert weight.grad.count_nonzero() == 0


def test_unsupervised_positions_have_no_say():
    hidden, weight, labels = inputs()
    loss = loss_of(hidden, weight, labels)
    hidden.requires_grad_()
    loss_of(hidden, weight, labels).backward()
    predicts = torch.zeros(B, T, dtype=torch.bool)
    predicts[:, :-1] = labels[:, 1:] != IGNORE_INDEX
    assert (hidden.grad.abs().sum(-1) > 0).equal(predicts)
    poisoned = hidden.detach().masked_fill(~predicts[..., None], torch.nan)
    assert torch.equal(loss_of(poisoned, weight, labels), loss)


def test_large_logits_do_not_overflow():
    hidden, weight, labels = inputs()
    hidden = (hidden * 1e4).requires_grad_()  # exp(1e4) is beyond fp32
    loss = loss_of(hidden, weight, labels)
    loss.backward()
    expected, grad_hidden, _ = reference(hidden, weight, labels)
    assert_close(loss, expected)
    assert_close(hidden.grad, grad_hidden)


def test_bf16_is_as_accurate_as_its_inputs():
    # 4,000 targets, a vocabulary of 50: sums long enough that adding up in bf16 (8 bits) would lose the late chunks.
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(4, 1001, D, generator=generator).bfloat16()
    weight = (0.3 * torch.randn(V, D, generator=generator)).bfloat16()
    labels = torch.randint(0, V, (4, 1001), generator=generator)
    expected, grad_hidden, grad_weight = reference(hidden, weight, labels)
    hidden.requires_grad_()
    weight.requires_grad_()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(module, "CHUNK_LOGITS", dict.fromkeys((False, True), 10 * V))  # 400 chunks
        loss = loss_of(hidden, weight, labels)
        loss.backward()
    assert loss.dtype == torch.float32
    # Each logit is rounded to 2**-9 of itself; their mean over 4,000 hardly moves.
    assert_close(loss, expected, atol=0, rtol=1e-3)
    assert (hidden.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    # Gradients are rounded a few times, 2**-9 = 0.2% each: 1% of the largest is generous, a bf16 sum gives more.
    for actual, gradient in ((hidden.grad, grad_hidden), (weight.grad, grad_weight)):
        assert_close(actual, gradient, atol=0.01 * gradient.abs().max().item(), rtol=0)

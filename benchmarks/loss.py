"""The loss at Qwen's vocabulary: memory and time of the plain one and of this trainer's.

    python benchmarks/loss.py [--positions 1024] [--supervised 0.25] [--hidden 2048] [--rounds 3]

Forward and backward pass of head and cross-entropy over a vocabulary of 151,936, from the last hidden states to their
gradient, for a head that is frozen and one that trains. Plain: all logits, then PyTorch's cross-entropy in fp32, as the
models of Transformers compute it. Memory is the peak of all tensors beside those that were there before (hidden states,
head) and what both end with (gradients). Leaves with 1 if, with a frozen head, it is above 1/20 of the plain loss's, or
if values or gradients differ, or ours is slower. On a GPU also Liger's and PyTorch's own fused losses, where installed.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from trainer.measure import LiveBytes
from trainer.models.linear_cross_entropy import (
    IGNORE_INDEX,
    at_positions,
    linear_cross_entropy,
    supervised_positions,
)

VOCABULARY = 151_936
LEAST = 20
"""Times less memory, with a frozen head."""

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def plain(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(B, T, D), (V, D), (B, T) -> the mean over what is supervised, of all logits."""
    logits = (hidden @ weight.t()).float()
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)


def losses(device: torch.device) -> dict[str, Loss]:
    """Those that can be compared on a device, by name; the others' as `plain`."""

    def rows_of(hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        positions, targets = supervised_positions(labels)
        return at_positions(hidden, positions), targets

    def own(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        rows, targets = rows_of(hidden, labels)
        return linear_cross_entropy(rows, weight, targets)

    found: dict[str, Loss] = {"plain": plain, "this trainer's": own}
    if device.type != "cuda":
        return found
    fused = getattr(F, "linear_cross_entropy", None)  # torch >= 2.13

    if fused is not None:

        def torchs(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            rows, targets = rows_of(hidden, labels)
            return fused(rows.flatten(0, 1), weight, targets)

        found["PyTorch's, on our rows"] = torchs
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return found

    def ligers(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        rows, targets = rows_of(hidden, labels)
        return LigerFusedLinearCrossEntropyLoss()(weight, rows.flatten(0, 1), targets)

    return found | {"Liger's, on our rows": ligers}


def peak_bytes(step: Callable[[], None], device: torch.device) -> int:
    """Of all tensors, beside those that were there before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as live:
        before = live.peak
        step()
    return live.peak - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=1024)
    parser.add_argument("--supervised", type=float, default=0.25, help="share of the positions; default: a quarter")
    parser.add_argument("--hidden", type=int, default=2048, help="hidden size; default: Qwen-1.8B's")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    start = torch.randn(1, args.positions, args.hidden, device=device).to(dtype)
    weight = (0.02 * torch.randn(VOCABULARY, args.hidden, device=device)).to(dtype)
    labels = torch.randint(0, VOCABULARY, (1, args.positions), device=device)
    labels[:, : round(args.positions * (1 - args.supervised))] = IGNORE_INDEX
    print(f"{args.positions:,} positions, {args.supervised:.0%} supervised, hidden size {args.hidden}, {dtype}\n")
    print("| head | loss | peak memory, MiB | times less | ms | times faster | value |")
    print("|---|---|---|---|---|---|---|")
    failures: list[str] = []
    for trains in (False, True):
        failures += compare(start, weight.requires_grad_(trains), labels, args.rounds)
    if failures:
        sys.exit("\n" + "\n".join(failures))


def compare(start: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, rounds: int) -> list[str]:
    """Prints the lines of a head that is frozen or trains, as `weight` says; what falls short."""
    device, trains = start.device, weight.requires_grad
    head, failures = "trains" if trains else "frozen", list[str]()
    result: dict[str, list[torch.Tensor]] = {}
    peaks: dict[str, int] = {}
    seconds: dict[str, list[float]] = {}
    steps: dict[str, Callable[[], None]] = {}
    for name, loss_of in losses(device).items():

        def step(name: str = name, loss_of: Loss = loss_of) -> None:
            hidden = start.clone().requires_grad_()
            loss = loss_of(hidden, weight, labels)
            loss.backward()
            result[name] = [loss.detach(), hidden.grad, *([weight.grad] if trains else [])]  # type: ignore[list-item]
            weight.grad = None

        steps[name] = step
        owned = start.nbytes * 2 + weight.nbytes * trains  # a copy of the hidden states, and the gradients
        peaks[name] = peak_bytes(step, device) - owned
        if name != "plain":
            for own, expected in zip(result[name], result["plain"], strict=True):
                tolerance = (1e-5 if own.dtype == torch.float32 else 2e-2) * expected.abs().max()
                if not (own - expected).abs().max() <= tolerance:
                    failures.append(f"{head}: '{name}' gives another value or gradient than the plain loss")
                    break
            result[name] = result[name][:1]
    result["plain"] = result["plain"][:1]
    for _ in range(rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.setdefault(name, []).append(time.perf_counter() - started)
            result[name] = result[name][:1]
    for name in steps:
        less = peaks["plain"] / max(1, peaks[name])
        faster = statistics.median(a / b for a, b in zip(seconds["plain"], seconds[name], strict=True))
        print(f"| {head} | {name} | {peaks[name] / 2**20:,.0f} | {less:.1f} | "
              f"{1000 * statistics.median(seconds[name]):,.0f} | {faster:.2f} | {float(result[name][0]):.5f} |",
              flush=True)  # fmt: skip
        if name == "this trainer's" and faster < 1:
            failures.append(f"{head}: expected no more time than the plain loss takes")
        if name == "this trainer's" and not trains and less < LEAST:
            failures.append(f"{head}: expected 1/{LEAST} of the plain loss's memory")
    return failures


if __name__ == "__main__":
    main()

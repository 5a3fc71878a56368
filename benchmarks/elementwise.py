"""Element-wise work of a Qwen layer: plain PyTorch, compiled as this trainer does, and on a GPU Liger's kernels.

    python benchmarks/elementwise.py [--tokens N] [--rounds 20]

Forward and backward pass of the norm, the rotary embedding of query and key, and the gate of the MLP, at Qwen-7B's
sizes, in bf16 on a GPU and in fp32 on a CPU, weights frozen (Liger's norm makes their gradient all the same). Prints
the milliseconds of each, as medians, by turns: on a GPU of so many tokens that it is the kernels that take the time,
not the host. Leaves with 1 where gradients differ.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch

from trainer.models.elementwise import gated, one_pass, rms_norm
from trainer.models.rotary import apply_rotary

WIDTH, HEADS, CHANNELS, MLP, EPS = 4096, 32, 128, 11008, 1e-6
TOLERANCE = 2e-2
"""Length of the difference of two gradients, as a share of one's: they are rounded to bf16 in other places."""

Work = Callable[[list[torch.Tensor]], list[torch.Tensor]]


def works(tokens: int, device: torch.device) -> dict[str, tuple[list[torch.Tensor], dict[str, Work]]]:
    """What is compared: its inputs, and the ways to compute it, the plain one first."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    weight = torch.ones(WIDTH, device=device, dtype=dtype)
    angles = torch.randn(1, 1, tokens, CHANNELS // 2, device=device).repeat(1, 1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    found = {
        "norm": [drawn(1, tokens, WIDTH)],
        "rotary": [drawn(1, tokens, HEADS, CHANNELS) for _ in range(2)],
        "gate": [drawn(1, tokens, MLP) for _ in range(2)],
    }

    def rotations(rotate: Callable) -> Work:
        return lambda x: [rotate(x[0].transpose(1, 2), cos, sin), rotate(x[1].transpose(1, 2), cos, sin)]

    ways: dict[str, dict[str, Work]] = {
        "norm": {
            "plain": lambda x: [rms_norm(x[0], weight, EPS)],
            "compiled": lambda x: [one_pass(rms_norm)(x[0], weight, EPS)],
        },
        "rotary": {"plain": rotations(apply_rotary), "compiled": rotations(one_pass(apply_rotary))},
        "gate": {"plain": lambda x: [gated(*x)], "compiled": lambda x: [one_pass(gated)(*x)]},
    }
    if device.type == "cuda":
        add_ligers(ways, weight, cos[0].to(dtype), sin[0].to(dtype))
    return {name: (inputs, ways[name]) for name, inputs in found.items()}


def add_ligers(ways: dict[str, dict[str, Work]], weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Liger's kernels beside the other ways, where its package is installed. cos, sin: (1, T, C)."""
    try:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.rope import LigerRopeFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    except ImportError:
        print("Liger's kernels are left out: `pip install liger-kernel` has them\n")
        return
    ways["norm"]["Liger's"] = lambda x: [LigerRMSNormFunction.apply(x[0], weight, EPS, 0.0, "llama", False)]
    ways["rotary"]["Liger's"] = lambda x: list(
        LigerRopeFunction.apply(x[0].transpose(1, 2), x[1].transpose(1, 2), cos, sin)
    )
    ways["gate"]["Liger's"] = lambda x: [LigerSiLUMulFunction.apply(x[1], x[0])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, help="default: 65,536 on a GPU, 256 on a CPU")
    parser.add_argument("--rounds", type=int, default=20, help="default: 20")
    args = parser.parse_args()
    if args.rounds < 1 or (args.tokens is not None and args.tokens < 1):
        parser.error("--tokens and --rounds must be at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens = args.tokens or (65_536 if device.type == "cuda" else 256)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{where}, PyTorch {torch.__version__}, {tokens:,} tokens\n")
    compared = works(tokens, device)
    print("| work | way | ms | times faster than plain |\n|---|---|---|---|")
    failures = []
    for name, (inputs, ways) in compared.items():
        failures += compare(name, inputs, ways, args.rounds)
    if failures:
        sys.exit("\n" + "\n".join(failures))


def compare(name: str, inputs: list[torch.Tensor], ways: dict[str, Work], rounds: int) -> list[str]:
    """Prints the lines of one kind of work; what differs."""
    on_cuda, failures = inputs[0].is_cuda, list[str]()
    milliseconds: dict[str, list[float]] = {way: [] for way in ways}
    gradients: dict[str, list[torch.Tensor]] = {}
    with torch.no_grad():
        upstream = [torch.randn_like(output) for output in ways["plain"](inputs)]
    for number in range(rounds + 2):  # the first two to compile and to warm up
        for way, work in ways.items():
            # Copies: Liger's kernels write over what they are given.
            own, given = ([x.detach().clone() for x in of] for of in (inputs, upstream))
            own = [x.requires_grad_() for x in own]
            if on_cuda:
                torch.cuda.synchronize()
            started = time.perf_counter()
            gradients[way] = list(torch.autograd.grad(work(own), own, given))
            if on_cuda:
                torch.cuda.synchronize()
            if number >= 2:
                milliseconds[way].append(1000 * (time.perf_counter() - started))
    for way, times in milliseconds.items():
        median, plain = statistics.median(times), statistics.median(milliseconds["plain"])
        print(f"| {name} | {way} | {median:.3f} | {plain / median:.2f} |", flush=True)
        for found, expected in zip(gradients[way], gradients["plain"], strict=True):
            if not (found - expected).float().norm() <= TOLERANCE * expected.float().norm():
                failures.append(f"{name}: '{way}' has other gradients than the plain functions")
                break
    return failures


if __name__ == "__main__":
    main()

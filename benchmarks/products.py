"""Linears, attention from its projections, and GELU on one thread, at the sizes of a FLUX.1 block.

python3 -m benchmarks.products --json products.json
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxkern import bench, ops, reference

from .runs import Report, options

LIMITS = {"fp32": 1e-5, "bf16": 1e-2, "int8": 2e-2}  # relative L2 against fp64
SLOW, SLOW_ROUNDS = 2.0, 3  # a provider of that many seconds is called that often
HEADS, HEAD_DIM = 24, 128

Calls = dict[str, Callable[[], Tensor]]


@dataclass(frozen=True)
class Row:
    """One provider; `times` says how many times faster it is than each other one."""

    what: str
    dtype: str
    provider: str
    timer: str
    error: float
    seconds: list[float]
    times: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        about = asdict(self)
        return bench.rounded(about | bench.summary(about.pop("seconds")))


def measure(what: str, dtype: str, calls: Calls, truth: Tensor, rounds: int) -> bench.Comparison:
    """Holds each to fp64, then times them in turn; a torch.compile that is wrong is left out."""
    errors, skipped = {}, {}
    for name, call in calls.items():
        error = float((call().double() - truth).norm() / truth.norm())
        if error <= LIMITS[dtype]:
            errors[name] = error
            continue
        why = f"relative L2 must be at most {LIMITS[dtype]:.2g}, got {error:.2g}"
        if name != "compile":
            raise bench.WrongResult(f"{what} by {name}: {why}")
        skipped[name] = why
    if not rounds:
        return bench.Comparison([], errors, skipped)
    calls = {name: calls[name] for name in errors}
    slowest = max(bench.timed(call)[0] for call in calls.values())
    rounds = rounds if slowest < SLOW else min(rounds, SLOW_ROUNDS)
    samples, note = bench.cpu_times(calls, rounds, lambda: None)
    rows = [
        Row(
            *(what, dtype, name, f"host clock{note}", errors[name], seconds),
            {other: bench.ratio(samples[other], seconds) for other in calls if other != name},
        )
        for name, seconds in samples.items()
    ]
    return bench.Comparison(rows, errors, skipped)


def table(rows: list[Row]) -> str:
    lines = [f"{rows[0].what}, {rows[0].dtype}; {rows[0].timer}"] if rows else []
    for row in rows:
        kept = row.as_dict()
        times = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in row.times.items())
        lines.append(
            f"  {row.provider:12} {kept['median'] * 1e3:9.2f} ms, IQR {kept['iqr'] * 1e3:.2f},"
            f" {kept['rounds']} rounds, rel. L2 {row.error:.1g}: {times}"
        )
    return "\n".join(lines)


# what is compared


def linear(tokens: int = 1536, cin: int = 3072, cout: int = 12288) -> Iterator[tuple]:
    """(what, dtype, calls, truth) of a bf16 weight, and of an int8 one."""
    x, weight, bias = torch.randn(tokens, cin), torch.randn(cout, cin), torch.randn(cout)
    weight = (weight * cin**-0.5).bfloat16().float()
    x, bias = x.bfloat16().float(), bias.bfloat16().float()
    half = [t.bfloat16() for t in (x, weight, bias)]
    what = f"linear {cin} -> {cout}, {tokens} tokens"
    truth = F.linear(x.double(), weight.double(), bias.double())
    fp32 = partial(F.linear, x, weight, bias)
    calls = {"torch bf16": partial(F.linear, *half), "torch fp32": fp32}
    yield what, "bf16", calls | {"fluxkern": partial(ops.linear, *half, backend="cpu")}, truth
    values, scale = ops.quantize_int8(weight)
    in_int8 = partial(ops.linear_int8, x, values, scale, bias, backend="cpu")
    yield what, "int8", {"torch fp32": fp32, "fluxkern": in_int8}, truth


def attention(tokens: int = 1280) -> Iterator[tuple]:
    """Norm, rotation and attention of one projection's output."""
    qkv = torch.randn(1, tokens, 3, HEADS, HEAD_DIM)
    weights = torch.rand(2, HEAD_DIM) + 0.5
    angle = 100 * torch.rand(tokens, HEAD_DIM // 2)
    tables = angle.cos(), angle.sin()
    for dtype in ("fp32", "bf16"):
        inputs = [t.to(bench.DTYPES[dtype]) for t in (*qkv.unbind(2), *weights)]
        truth = reference.rope_attention(*(t.double() for t in inputs), *tables)
        calls = {
            "eager": partial(reference.rope_attention, *inputs, *tables),
            "fluxkern": partial(ops.rope_attention, *inputs, *tables, backend="cpu"),
        }
        yield f"norm, rotation, attention, {tokens} tokens", dtype, calls, truth


def gelu(tokens: int = 1280, channels: int = 12288) -> Iterator[tuple]:
    x = 4 * torch.randn(1, tokens, channels)
    calls = {
        "eager": partial(reference.gelu_tanh, x),
        "compile": partial(torch.compile(reference.gelu_tanh, dynamic=False), x),
        "fluxkern": partial(ops.gelu_tanh, x, backend="cpu"),
    }
    yield (
        f"gelu_tanh, {tokens} x {channels}, one thread",
        "fp32",
        calls,
        reference.gelu_tanh(x.double()),
    )


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    args = options("products", __doc__, bench.MIN_ROUNDS).parse_args(argv)
    report = Report("products", args, planned=5)
    for cases, count in ((linear, None), (attention, None), (gelu, 1)):
        with threads(count or torch.get_num_threads()):
            for what, dtype, calls, truth in cases():
                run = partial(measure, what, dtype, calls, truth, args.rounds)
                report.add(f"{what}, {dtype}", run, table)
    return report.close()


if __name__ == "__main__":
    sys.exit(main())

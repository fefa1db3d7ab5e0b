"""Blocks, loops and pictures against diffusers: right or refused, timed in turn, taken apart.

The Amdahl bound of a whole is diffusers' time for its linears and attention alone, all else being
free. It comes from further calls of the same run in which each kind is clocked.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxkern import bench
from fluxkern.cases import CASES

BASELINE, COMPILED, OURS = "diffusers", "diffusers compiled", "fluxkern"
INT8 = "fluxkern int8"  # its linears' weights and inputs
KINDS = ("linears", "attention")
ROUNDS = bench.MIN_ROUNDS
SLOW, SLOW_ROUNDS = 5.0, 3  # a baseline of that many seconds is called that often

Parts = Callable[[], AbstractContextManager[dict[str, float]]]


@contextmanager
def torch_parts() -> Iterator[dict[str, float]]:
    """Seconds of torch's linears and attention, of a model that calls them by their module."""
    seconds = dict.fromkeys(KINDS, 0.0)

    def clocked(kind: str, function: Callable) -> Callable:
        def run(*args: object, **named: object) -> Tensor:
            start = time.perf_counter()
            out = function(*args, **named)
            seconds[kind] += time.perf_counter() - start
            return out

        return run

    before = F.linear, F.scaled_dot_product_attention
    F.linear = clocked("linears", F.linear)
    F.scaled_dot_product_attention = clocked("attention", F.scaled_dot_product_attention)
    try:
        yield seconds
    finally:
        F.linear, F.scaled_dot_product_attention = before


def kind_of(op: str) -> str | None:
    if op.startswith("linear") or op == "modulation":
        return "linears"
    return "attention" if "attention" in op else None


@contextmanager
def our_parts() -> Iterator[dict[str, float]]:
    """The same of our ops; attention that norms and rotates is attention."""
    seconds = dict.fromkeys(KINDS, 0.0)
    with bench.watched() as ran:
        yield seconds
    for (op, _), spent in ran.items():
        if kind_of(op):
            seconds[kind_of(op)] += spent


@contextmanager
def on_the_cpu_backend() -> Iterator[None]:
    """Refuses what ran without a kernel that its op has."""
    with bench.watched() as ran:
        yield
    for op, backend in ran:
        if backend != "cpu" and op in CASES and "cpu" in CASES[op].backends:
            raise bench.WrongResult(f"{op} ran on {backend}, not on cpu")


@dataclass(frozen=True)
class Provider:
    """What is timed: a call without arguments that gives the tensors to be compared.

    Args:
        call: gives them in the order of the truth's.
        limit: of their error.
        parts: clocks the kinds of work inside; None where they are not told apart.
    """

    call: Callable[[], tuple[Tensor, ...]]
    limit: float
    parts: Parts | None = None


@dataclass(frozen=True)
class Truth:
    """The right results, and what they started from: errors are of the change between them."""

    results: tuple[Tensor, ...]
    start: tuple[Tensor, ...]

    def error(self, found: tuple[Tensor, ...]) -> float:
        """Relative L2."""
        off = sum(distance(f, r) for f, r in zip(found, self.results, strict=True))
        change = sum(distance(r, s) for r, s in zip(self.results, self.start, strict=True))
        return (off / change) ** 0.5


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).square().sum())


@dataclass(frozen=True)
class Row:
    """One provider of one whole; `seconds` holds a sample a round.

    Args:
        error: relative L2 of the change, against diffusers in fp32.
        times: baseline -> how many times faster than it, round by round.
        parts: kind -> share of the provider's own time.
        profiled: time of the calls that were taken apart, in terms of the timed ones.
        of_bound: share of the speed that the Amdahl bound allows.
    """

    what: str
    size: str
    dtype: str
    provider: str
    timer: str
    error: float
    seconds: list[float]
    times: dict[str, float]
    parts: dict[str, float] | None
    profiled: float | None
    of_bound: float | None

    def as_dict(self) -> dict[str, Any]:
        about = asdict(self)
        return bench.rounded(about | bench.summary(about.pop("seconds")))


def taken_apart(provider: Provider, calls: int) -> tuple[dict[str, float], float]:
    """Share of the whole of each kind, and seconds of the whole; medians."""
    shares, wholes = [], []
    for _ in range(calls):
        with provider.parts() as seconds:
            start = time.perf_counter()
            provider.call()
            wholes.append(time.perf_counter() - start)
        shares.append({kind: spent / wholes[-1] for kind, spent in seconds.items()})
    found = {kind: statistics.median(s[kind] for s in shares) for kind in KINDS}
    return found | {"rest": 1 - sum(found.values())}, statistics.median(wholes)


def verified(
    what: str, providers: dict[str, Provider], truth: Truth
) -> tuple[dict[str, float], dict[str, str]]:
    """Errors, and why torch.compile is not timed."""
    errors, skipped = {}, {}
    for name, provider in providers.items():
        try:
            with on_the_cpu_backend():
                errors[name] = truth.error(provider.call())
            if not errors[name] <= provider.limit:
                limit = f"at most {provider.limit:.2g}, got {errors[name]:.2g}"
                raise bench.WrongResult(f"{what} by {name}: relative L2 must be {limit}")
        except Exception as failure:
            if name != COMPILED:
                raise
            skipped[name] = f"{type(failure).__name__}: {failure}".partition("\n")[0]
    return errors, skipped


def measure(
    what: str,
    size: str,
    dtype: str,
    providers: dict[str, Provider],
    truth: Truth,
    rounds: int = ROUNDS,
    only: tuple[str, ...] | None = None,
) -> bench.Comparison:
    """Times diffusers and ours in turn and takes both apart.

    Args:
        what: the name of the whole.
        size: its sizes, in words.
        dtype: of the baseline.
        providers: BASELINE among them.
        truth: what they are held to first.
        rounds: samples of each; 0 verifies and times nothing. Three where the baseline is slow.
        only: names of providers; None takes all.

    Raises:
        WrongResult: a result is wrong, or an op of ours ran without its kernel.
    """
    named = {n: p for n, p in providers.items() if only is None or n in only}
    errors, skipped = verified(what, named, truth)
    if not rounds:
        return bench.Comparison([], errors, skipped)
    taken = {name: provider for name, provider in named.items() if name not in skipped}
    seconds, _ = bench.timed(taken[BASELINE].call)
    samples, note = bench.cpu_times(
        {name: provider.call for name, provider in taken.items()},
        rounds if seconds < SLOW else min(rounds, SLOW_ROUNDS),
        lambda: None,
    )
    calls = max(1 if seconds > SLOW else 3, min(round(1 / seconds), bench.ROUNDS))
    parts = {n: taken_apart(p, calls) for n, p in taken.items() if p.parts is not None}
    bound = 1 - parts[BASELINE][0]["rest"] if BASELINE in parts else None

    def row(name: str) -> Row:
        shares, whole = parts.get(name, (None, None))
        times = {
            b: bench.ratio(samples[b], samples[name]) for b in (BASELINE, COMPILED) if b in taken
        }
        return Row(
            *(what, size, dtype, name, f"host clock{note}", errors[name], samples[name], times),
            parts=shares,
            profiled=whole and whole / statistics.median(samples[name]),
            of_bound=bound and bound * times[BASELINE],
        )

    return bench.Comparison([row(name) for name in taken], errors, skipped)


def table(rows: list[Row]) -> str:
    """One line a provider; milliseconds are medians."""
    if not rows:
        return ""
    first = rows[0]
    columns = f"{'ms':>9} {'IQR':>7} {'rounds':>6} {'x':>6} {'of bound':>8} {'rel. L2':>8}"
    lines = [f"{first.what}, {first.dtype}, {first.size}; {first.timer}", f"  {'':20} {columns}"]
    for row in rows:
        kept = row.as_dict()
        bound = "" if row.of_bound is None else f"{row.of_bound:.0%}"
        parts = ", ".join(f"{kind} {share:.0%}" for kind, share in (row.parts or {}).items())
        lines.append(
            f"  {row.provider:20} {kept['median'] * 1e3:9.1f} {kept['iqr'] * 1e3:7.1f}"
            f" {kept['rounds']:6} {row.times[BASELINE]:6.2f} {bound:>8} {row.error:8.1g}  {parts}"
        )
    return "\n".join(lines)


@torch.no_grad()
def without_gradients(call: Callable, *args: object) -> Any:
    return call(*args)

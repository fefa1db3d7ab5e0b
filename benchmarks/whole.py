"""Blocks, loops and pictures against diffusers: right or refused, timed in turn, taken apart.

The Amdahl bound of a whole is diffusers' time for its linears and attention alone, all else being
free. It comes from further calls of the same run in which each kind is clocked.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fluxkern import bench
from fluxkern.cases import CASES

from . import profile

BASELINE, COMPILED, OURS = "diffusers", "diffusers compiled", "fluxkern"
INT8 = "fluxkern int8"  # its linears' weights and inputs
TORCHAO = "diffusers torchao int8"
EAGER = "eager"  # our model on the reference of every op
BASELINES = (BASELINE, COMPILED, EAGER)
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


@contextmanager
def our_parts() -> Iterator[dict[str, float]]:
    """The same of our ops; attention that norms and rotates is attention."""
    seconds = dict.fromkeys(KINDS, 0.0)
    with bench.watched() as ran:
        yield seconds
    for (op, _), spent in ran.items():
        kind = profile.kind_of(f"fluxkern::{op}")
        if kind in KINDS:
            seconds[kind] += spent


def kernels_of(op: str, device: str) -> set[str]:
    """Backends of which one has to run; none where the op has no kernel for the device."""
    case = CASES.get(op.removesuffix("_backward"))
    if case is None or (op.endswith("_backward") and case.moved_backward is None):
        return set()
    found = {"cpu"} if device == "cpu" else {"cuda", "triton"}
    found &= set(case.backends)
    return found | set(case.providers) if found and device != "cpu" else found


@contextmanager
def where_it_should(name: str, provider: "Provider", device: str) -> Iterator[None]:
    """Refuses what did not run where its name says: others run none of our ops."""
    with bench.watched() as ran:
        yield
    if provider.ours and not ran:
        raise bench.WrongResult("none of our ops ran")
    for op, backend in ran if provider.ours else ():
        wanted = kernels_of(op, device)
        if wanted and backend not in wanted:
            raise bench.WrongResult(f"{op} ran on {backend}, not on {' or '.join(sorted(wanted))}")
    said = ", ".join(f"{op} on {backend}" for op, backend in sorted(ran)) or "none of our ops"
    if name == EAGER and {backend for _, backend in ran} != {"reference"}:
        raise bench.WrongResult(f"the reference of every op must run, got {said}")
    if ran and not provider.ours and name != EAGER:
        raise bench.WrongResult(f"{name} must run none of our ops, got {said}")


def best_attention(device: str) -> AbstractContextManager[None]:
    """torch takes cuDNN's where the order of our providers does."""
    if device == "cpu" or torch.cuda.get_device_capability()[0] not in (9, 10):
        return nullcontext()
    names = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
    return sdpa_kernel([getattr(SDPBackend, name) for name in names], set_priority=True)


def draw(module: nn.Module, dtype: torch.dtype, device: str = "cpu") -> nn.Module:
    """Weights that keep the size of what goes through, gates and scales far from zero."""
    module = module.to(dtype).to_empty(device=device)
    for name, parameter in module.named_parameters():
        if parameter.ndim >= 2:
            parameter.data.normal_(std=parameter[0].numel() ** -0.5)
        else:
            norm = "norm" in name and name.endswith(("weight", "scale"))
            parameter.data.normal_(float(norm), 0.1)
        parameter.data.copy_(parameter.data.bfloat16())
    return module.eval()


@dataclass(frozen=True)
class Provider:
    """What is timed: a call without arguments that gives the tensors to be compared.

    Args:
        call: gives them in the order of the truth's.
        limit: of their error.
        parts: clocks the kinds of work inside; None where they are not told apart.
        ours: whether our kernels have to run in it.
    """

    call: Callable[[], tuple[Tensor, ...]]
    limit: float
    parts: Parts | None = None
    ours: bool = False


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
        error: relative L2 of the change, against what the suite holds for the truth.
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
    parts: dict[str, float] | None = None
    profiled: float | None = None
    of_bound: float | None = None

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
    what: str, providers: dict[str, Provider], truth: Truth, device: str
) -> tuple[dict[str, float], dict[str, str], dict[str, str]]:
    """Errors, why torch.compile or a peer is not timed, and who had to be right and is not."""
    errors, skipped, failed = {}, {}, {}
    for name, provider in providers.items():
        try:
            with where_it_should(name, provider, device), best_attention(device):
                error = truth.error(provider.call())
            if not error <= provider.limit:
                limit = f"at most {provider.limit:.2g}, got {error:.2g}"
                raise bench.WrongResult(f"{what} by {name}: relative L2 must be {limit}")
            errors[name] = error
        except Exception as failure:
            wrong = isinstance(failure, bench.WrongResult)
            may_not = name == COMPILED or (name == TORCHAO and wrong)
            said = f"{type(failure).__name__}: {failure}".partition("\n")[0]
            (skipped if may_not else failed)[name] = said
    return errors, skipped, failed


def errors_of(
    what: str, providers: dict[str, Provider], truth: Truth, device: str
) -> dict[str, float]:
    """Of all of them; WrongResult where one has failed."""
    errors, _, failed = verified(what, providers, truth, device)
    for name, why in failed.items():
        raise bench.WrongResult(f"{what} by {name}: {why}")
    return errors


def timed(
    calls: dict[str, Callable[[], object]], rounds: int, device: str
) -> tuple[dict[str, list[float]], str]:
    """Samples, few where the first is slow, and the name of the timer."""
    if device != "cpu":
        torch.cuda.synchronize()
        with best_attention(device):
            return bench.gpu_times(calls, rounds), "CUDA events, cold L2"
    seconds, _ = bench.timed(next(iter(calls.values())))
    rounds = rounds if seconds < SLOW else min(rounds, SLOW_ROUNDS)
    samples, note = bench.cpu_times(calls, rounds, lambda: None)
    return samples, f"host clock{note}"


def measure(
    what: str,
    size: str,
    dtype: str,
    providers: dict[str, Provider],
    truth: Truth,
    rounds: int = ROUNDS,
    only: tuple[str, ...] | None = None,
    device: str = "cpu",
) -> bench.Comparison:
    """Times all in turn and takes apart those that can be.

    Args:
        what: the name of the whole.
        size: its sizes, in words.
        dtype: of the baseline.
        providers: the first is what the bound is of.
        truth: what they are held to first.
        rounds: samples of each; 0 verifies and times nothing. Three where the baseline is slow.
        only: names of providers; None takes all.
        device: "cpu" or "cuda".

    Returns:
        The rows; one whose result is wrong, or that ran elsewhere than it should, has failed and
        is not timed.
    """
    named = {n: p for n, p in providers.items() if only is None or n in only}
    errors, skipped, failed = verified(what, named, truth, device)
    taken = {name: provider for name, provider in named.items() if name in errors}
    if not rounds or not taken:
        return bench.Comparison([], errors, skipped, failed)
    first = next(iter(taken))
    samples, timer = timed({n: provider.call for n, provider in taken.items()}, rounds, device)
    seconds = statistics.median(samples[first])
    calls = max(1 if seconds > SLOW else 3, min(round(1 / seconds), bench.ROUNDS))
    apart = device == "cpu"  # on a GPU the host's clock does not see the kernels
    parts = {n: taken_apart(p, calls) for n, p in taken.items() if apart and p.parts is not None}
    bound = 1 - parts[first][0]["rest"] if first == BASELINE and first in parts else None

    def row(name: str) -> Row:
        shares, whole = parts.get(name, (None, None))
        times = {b: bench.ratio(samples[b], samples[name]) for b in BASELINES if b in taken}
        return Row(
            *(what, size, dtype, name, timer, errors[name], samples[name], times),
            parts=shares,
            profiled=whole and whole / statistics.median(samples[name]),
            of_bound=bound and bound * times[first],
        )

    return bench.Comparison([row(name) for name in taken], errors, skipped, failed)


def table(rows: list[Row]) -> str:
    """One line a provider; milliseconds are medians."""
    if not rows:
        return ""
    first = rows[0]
    against = next(iter(first.times), "")
    columns = f"{'ms':>9} {'IQR':>7} {'rounds':>6} {'x':>6} {'of bound':>8} {'rel. L2':>8}"
    lines = [f"{first.what}, {first.dtype}, {first.size}; {first.timer}; x {against}"]
    lines.append(f"  {'':22} {columns}")
    for row in rows:
        kept = row.as_dict()
        bound = "" if row.of_bound is None else f"{row.of_bound:.0%}"
        parts = ", ".join(f"{kind} {share:.0%}" for kind, share in (row.parts or {}).items())
        lines.append(
            f"  {row.provider:22} {kept['median'] * 1e3:9.1f} {kept['iqr'] * 1e3:7.1f}"
            f" {kept['rounds']:6} {row.times.get(against, 1):6.2f}"
            f" {bound:>8} {row.error:8.1g}  {parts}"
        )
    return "\n".join(lines)


@torch.enable_grad()
def gradients(
    call: Callable[..., tuple[Tensor, ...]], given: tuple[Tensor, ...], dout: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Of what is given, by a forward and a backward."""
    leaves = [tensor.detach().requires_grad_() for tensor in given]
    return torch.autograd.grad(call(*leaves), leaves, dout)


@torch.no_grad()
def without_gradients(call: Callable, *args: object, **named: object) -> Any:
    return call(*args, **named)

"""Providers of one op side by side: right or refused, then how fast and how far from a copy."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

from .. import ops
from ..cases import CASES, SHAPES, TEST_SIZES, Case, Maker, Sizes
from ..testing import (
    assert_accurate,
    copied,
    errors,
    exact_results,
    gradients,
    in_schema_order,
    leaves,
    meaning,
    outputs,
    readable,
    torch_op,
    widened,
)
from . import peers
from .timers import (
    ROUNDS,
    Calls,
    best,
    copies,
    matrix_rate,
    ratio,
    rounded,
    side_stream,
    summary,
    times,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DIRECTIONS = ("forward", "backward", "forward + backward")
BASELINES = ("eager", "compile")


class WrongResult(AssertionError):
    """A provider is not timed: its result is wrong, or another backend gave it."""


# providers


def reasons(op: str, args: dict[str, Any]) -> dict[str, str | None]:
    """Each backend and provider: None, or why it cannot run these arguments here."""
    positional = in_schema_order(op, args, "")[:-1]
    (choice,) = ops.explain(op, *positional)
    ours = {name: choice.reasons[name] for name in CASES[op].backends}
    return ours | {name: ops.why_not(op, name, *positional) for name in CASES[op].providers}


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


@contextmanager
def watched() -> Iterator[dict[tuple[str, str], float]]:
    """Seconds of the ops called inside, by name and backend, there at the end.

    What a kernel calls for a part of its work is its own affair.
    """
    ran: dict[tuple[str, str], float] = defaultdict(float)
    with ops.record() as calls:
        yield ran
    for call in calls:
        if not call.nested:
            ran[call.op, call.backend] += call.seconds


def private_op(op: str, backend: str) -> Callable | None:
    """The compiled kernel behind a backend, which takes its outputs as the last arguments."""
    library = getattr(torch.ops, f"fluxkern_{backend.replace('-', '_')}")
    packet = getattr(library, op, None)
    return packet.default if packet is not None else None


def given(op: str, args: dict[str, Any], backend: str) -> tuple[object, ...]:
    """What the private op of an op takes: its arguments, then its outputs, those of a call."""
    *positional, _ = in_schema_order(op, args, backend)
    out = torch_op(op)(*positional, backend)
    return *positional, *(() if out is None else out if isinstance(out, tuple) else (out,))


def kernels_alone(op: str, args: dict[str, Any], backends: Calls) -> Calls:
    """The forward without Python, checks and allocation: what is held against a copy on a CPU.

    After its caches are emptied a CPU reads the interpreter anew too, some 0.1 ms a call.
    """
    found: Calls = {}
    for name in backends:
        kernel = None if name in BASELINES else private_op(op, name)
        if kernel is not None:
            count = len(torch_op(op)._schema.returns)
            expected, taken = given(op, args, name)[-count:], given(op, args, name)
            found[f"{name} kernel"], out = partial(kernel, *taken), taken[-count:]
            for tensor in out:
                tensor.fill_(float("nan"))
            found[f"{name} kernel"]()
            if not all(torch.equal(o, e) for o, e in zip(out, expected, strict=True)):
                raise WrongResult(f"{op} by the {name} kernel alone: not what the op gives")
    return found


@dataclass(frozen=True)
class Truth:
    """What a right result is for one set of arguments: fp64, and the reference's own result."""

    exact: tuple[Tensor, ...]
    own: tuple[Tensor, ...]
    compute: Callable[[Callable, dict[str, Any]], tuple[Tensor, ...]]
    has_gradients: bool

    @staticmethod
    def of(op: str, args: dict[str, Any], dout: tuple[Tensor, ...] | None) -> "Truth":
        """With gradients where `dout` is given."""

        def compute(run: Callable, args: dict[str, Any]) -> tuple[Tensor, ...]:
            args = copied(args) if op.endswith("_") else args  # written over
            return readable(outputs(run, args)) if dout is None else gradients(run, args, dout)

        plain = meaning(op)
        own = compute(plain, args)
        exact = exact_results(op, args) if dout is None else compute(plain, widened(args))
        return Truth(exact, own, compute, dout is not None)


def checked(out: Tensor, truth: Tensor, own: Tensor, what: str) -> float:
    """The largest error of a result that obeys the 2x rule."""
    try:
        assert_accurate(out, truth, own, what)
    except AssertionError as error:
        raise WrongResult(str(error)) from None
    return errors(out, truth, own)["max"] if out.numel() else 0.0


def verify(op: str, provider: str, run: Callable, args: dict[str, Any], *truths: Truth) -> float:
    """Holds a provider to fp64 and to its name.

    Args:
        op: name of the public op.
        provider: "eager", "compile", a peer, or the backend that has to run.
        run: called with `args` by name.
        truths: of the forward, of the gradients or of both.

    Returns:
        The largest error of all results.

    Raises:
        WrongResult: a result breaks the 2x rule, or another backend ran.
    """
    worst = 0.0
    for truth in truths:
        with watched() as ran:
            found = truth.compute(run, args)
        for i, results in enumerate(zip(found, truth.exact, truth.own, strict=True)):
            error = checked(*results, f"result {i} of {op} by {provider}")
            worst = max(worst, error)
        if not by_the_named_backend(op, provider, ran, truth.has_gradients):
            said = ", ".join(f"{o} on {backend}" for o, backend in sorted(ran)) or "none of ours"
            raise WrongResult(f"{op} by {provider}: {said} ran")
    return worst


def by_the_named_backend(
    op: str, provider: str, ran: Collection[tuple[str, str]], with_gradients: bool
) -> bool:
    if provider in BASELINES or provider in peers.PEERS:
        return not ran
    backward_ran = any(name.endswith("_backward") for name, _ in ran)
    has_backward = with_gradients and CASES[op].moved_backward is not None
    return {backend for _, backend in ran} == {provider} and backward_ran == has_backward


def in_direction(
    run: Callable, args: dict[str, Any], direction: str, dout: tuple[Tensor, ...]
) -> Callable[[], object]:
    """A call without arguments, of which everything that is no part of `direction` is done."""
    if direction == "forward":
        return lambda: run(**args)
    args = args | {n: v.detach().requires_grad_() for n, v in leaves(args).items()}
    wanted = list(leaves(args).values())
    if direction == "forward + backward":
        return lambda: torch.autograd.grad(outputs(run, args), wanted, dout)
    out = outputs(run, args)
    return lambda: torch.autograd.grad(out, wanted, dout, retain_graph=True)


# rows


@dataclass(frozen=True)
class Row:
    """One provider in one comparison; `seconds` holds a sample a round."""

    op: str
    direction: str
    shape: str
    dtype: str
    device: str
    provider: str
    timer: str
    bytes: int
    flops: int
    max_error: float | None
    seconds: list[float]
    share: float | None  # of the ceiling, where it is known
    times: dict[str, float]  # baseline -> how many times faster than it, round by round

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def as_dict(self) -> dict[str, Any]:
        """What is kept of it: the statistics of the samples, all figures to four digits."""
        about = asdict(self)
        return rounded(about | summary(about.pop("seconds")))


@dataclass(frozen=True)
class Comparison:
    rows: list[Row]
    verified: dict[str, float]  # provider -> largest error
    skipped: dict[str, str]  # provider -> why it did not run
    failed: dict[str, str] = field(default_factory=dict)  # the same of those that had to be right

    def row(self, provider: str) -> Row | None:
        return next((row for row in self.rows if row.provider == provider), None)


def unavoidable(case: Case, sizes: Sizes, dtype: torch.dtype, direction: str) -> tuple[int, int]:
    """Bytes and FLOPs; a backward of matrix products takes twice those of the forward."""
    size, passes = 0, 0
    if direction != "backward":
        size += case.moved(sizes) * dtype.itemsize + case.bytes(sizes)
        passes += 1
    if direction != "forward":
        size += case.moved_backward(sizes) * dtype.itemsize
        passes += 2
    flops = case.flops(case.inputs(Maker(sizes, dtype, "meta"))) if passes else 0
    return size, passes * flops


def providers(op: str, args: dict[str, Any]) -> tuple[dict[str, Callable], dict[str, str]]:
    """What can be timed here, and why the rest cannot."""
    plain = meaning(op)
    compiled = torch.compile(plain, fullgraph=True, dynamic=False)
    found: dict[str, Callable] = {"eager": plain, "compile": compiled}
    why = reasons(op, args)
    for name, reason in why.items():
        if reason is None:
            found[name] = partial(getattr(ops, op), backend=name)
    return found, {name: reason for name, reason in why.items() if reason is not None}


def with_peers(
    op: str, args: dict[str, Any], direction: str, only: tuple[str, ...] | None
) -> tuple[dict[str, Callable], dict[str, str]]:
    """The installed libraries that have this op, and why others that should do not load."""
    found, failed = {}, {}
    for name, make in peers.of(op, args, direction):
        if only is not None and name not in only:
            continue
        try:
            run = make(args)
        except Exception as failure:
            failed[name] = first_line(failure)
        else:
            found |= {name: run} if run else {}
    return found, failed


def verified(
    op: str, args: dict[str, Any], direction: str, named: dict[str, Callable]
) -> tuple[Calls, dict[str, float], dict[str, str], dict[str, str]]:
    """Calls of the providers that are right, their errors, why others are not timed, who failed.

    torch.compile may fail and peers may be wrong; all else has failed then, and the rest goes on.
    """
    forward = Truth.of(op, args, None)
    dout = tuple(torch.randn_like(t) for t in forward.own)
    truths = [forward] if direction == "forward" else [forward, Truth.of(op, args, dout)]
    calls, error, skipped, failed = {}, {}, {}, {}
    for name, run in named.items():
        try:
            error[name] = verify(op, name, run, args, *truths)
            calls[name] = in_direction(run, args, direction, dout)
        except Exception as failure:
            wrong = isinstance(failure, WrongResult)
            may_not = name == "compile" or (name in peers.PEERS and wrong)
            (skipped if may_not else failed)[name] = first_line(failure)
    return calls, error, skipped, failed


def measure(
    op: str,
    shape: str,
    dtype: str,
    direction: str = "forward",
    device: str = "cpu",
    rounds: int = ROUNDS,
    only: tuple[str, ...] | None = None,
    more: dict[str, Callable] | None = None,
) -> Comparison:
    """Times every provider of one op, and copies of as many bytes, in turn.

    Args:
        op: a name of `CASES`.
        shape: a name of `SHAPES` or `TEST_SIZES`.
        dtype: "fp32", "bf16" or "fp16".
        direction: one of `DIRECTIONS`.
        device: "cpu" or "cuda".
        rounds: samples of each; 0 verifies and times nothing.
        only: names of providers; None takes all.
        more: further providers, functions with the signature of the public op, by name.

    Returns:
        The rows, that of the fastest copy first, and why other providers are not among them: one
        whose result is wrong, or whose backend did not run, is not timed and ends nothing.

    Raises:
        ValueError: the op has no backward of ours.
    """
    case, sizes = CASES[op], (SHAPES | TEST_SIZES)[shape]
    if direction != "forward" and case.moved_backward is None:
        raise ValueError(f"{op} has no backward of ours, so no {direction}")
    args = case.inputs(Maker(sizes, DTYPES[dtype], device))
    size, flops = unavoidable(case, sizes, DTYPES[dtype], direction)
    # a backward alone runs again and again, which compiled code forbids unless it is told before
    with side_stream(device), torch._functorch.config.patch(donated_buffer=False):
        torch._dynamo.reset()
        found, skipped = providers(op, args)
        others, failed = with_peers(op, args, direction, only)
        found |= others | (more or {})
        named = {n: run for n, run in found.items() if only is None or n in only}
        calls, error, without, broken = verified(op, args, direction, named)
        skipped, failed = skipped | without, failed | broken
        if not rounds or not calls:
            return Comparison([], error, skipped, failed)
        if device == "cpu" and direction == "forward" and not op.endswith("_"):
            calls |= kernels_alone(op, args, calls)
        copy = copies(size, device)
        samples, timer = times(copy | calls, device, rounds)
    ceiling = samples[best({name: samples[name] for name in copy})]
    floor = flops / matrix_rate(device, DTYPES[dtype]) if flops else 0.0
    limit = [max(seconds, floor) for seconds in ceiling]
    in_int8 = any(isinstance(v, Tensor) and v.dtype == torch.int8 for v in args.values())
    rows = [
        Row(
            *(op, direction, shape, dtype, device, name, timer, size, flops),
            max_error=error.get(name),
            seconds=seconds,
            share=None if in_int8 else ratio(limit, seconds),  # whose rate torch does not give
            times={b: ratio(samples[b], seconds) for b in BASELINES if b in samples},
        )
        for name, seconds in ({"copy": ceiling} | {n: samples[n] for n in calls}).items()
    ]
    return Comparison(rows, error, skipped, failed)

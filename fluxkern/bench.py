"""How fast, against what, how far from the machine's limit, and did it really run.

`measure` compares the providers of one op: the plain composition ("eager"), torch.compile of it
("compile") and every backend of ours that runs here. Each is held to fp64 and its backend is seen
running before a clock starts; copies of as many bytes are timed in turn with them, as the ceiling.
"""

import ctypes
import gc
import hashlib
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._functorch.config
from torch import Tensor

from . import ops
from .cases import CASES, SHAPES, TEST_SIZES, Case, Maker, Sizes
from .testing import (
    assert_accurate,
    copied,
    errors,
    gradients,
    in_schema_order,
    leaves,
    meaning,
    outputs,
    torch_op,
    widened,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DIRECTIONS = ("forward", "backward", "forward + backward")
BASELINES = ("eager", "compile")
ROUNDS, MIN_ROUNDS = 15, 7
PATIENCE = 5.0  # seconds of a comparison, after which MIN_ROUNDS are enough
WARM_UP = 3
ROOT = Path(__file__).parents[1]

Calls = dict[Any, Callable[[], object]]  # provider -> what is timed
Samples = dict[Any, list[float]]  # provider -> seconds, one a round


class WrongResult(AssertionError):
    """A provider is not timed: its result is wrong, or another backend gave it."""


# statistics


def spread(samples: list[float]) -> float:
    """Interquartile range."""
    low, high = np.percentile(samples, [25, 75])
    return float(high - low)


def ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median of the ratios of samples of the same round: what slows a whole round cancels."""
    return statistics.median(n / d for n, d in zip(numerator, denominator, strict=True))


# timers


def pin_threads(count: int | None = None) -> int:
    """Sets torch's threads to `count`, or to the cores that this process may use."""
    torch.set_num_threads(count or len(os.sched_getaffinity(0)))
    return torch.get_num_threads()


def keep_pages() -> bool:
    """Tells glibc to keep freed memory: else fresh pages of outputs cost more than the kernels."""
    m_trim_threshold, m_mmap_max = -1, -4
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, 2**31 - 1))


def last_level_cache(device: str = "cpu") -> int:
    """Bytes."""
    if device != "cpu":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [32 * 2**20]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number, unit = re.fullmatch(r"(\d+)([KMG]?)", file.read_text().strip()).groups()
        sizes.append(int(number) << {"": 0, "K": 10, "M": 20, "G": 30}[unit])
    return max(sizes)


def emptied_caches(device: str) -> Callable[[], object]:
    """What leaves nothing of a working set in a cache.

    A CPU reads, so that no dirty line is left to be written back in the time of the next call; a
    GPU writes, which is how its kernels are usually timed.
    """
    if device == "cpu":
        return torch.ones(2 * last_level_cache() // 8, dtype=torch.float64).sum
    return torch.empty(4 * last_level_cache(device), dtype=torch.uint8, device=device).zero_


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def waited_for_cores() -> float:
    """Seconds that the threads of this process have been ready to run and had no core, so far."""
    try:
        files = Path("/proc/self/task").glob("*/schedstat")
        return sum(int(file.read_text().split()[1]) for file in files) / 1e9
    except OSError:  # another system, or a thread has just ended
        return 0.0


def timed(call: Callable[[], object]) -> tuple[float, bool]:
    """Seconds, and whether another program took a core meanwhile."""
    waited = waited_for_cores()
    start = time.perf_counter()
    out = call()
    seconds = time.perf_counter() - start
    del out
    return seconds, waited_for_cores() - waited > 0.05 * seconds + 20e-6


def cpu_times(calls: Calls, rounds: int, before: Callable[[], object]) -> tuple[Samples, str]:
    """Seconds on the host's clock, one call of each in turn with `before` in front of it.

    A round in which another program took a core is done again while there is time: with two
    threads on two cores, every barrier then waits for a time slice. The note says if that failed.
    """
    clean, disturbed, end = [], [], time.monotonic() + PATIENCE
    with no_garbage_collection():
        while len(clean) < rounds:
            if len(clean) + len(disturbed) >= MIN_ROUNDS and time.monotonic() > end:
                break
            found = {}
            for name, call in calls.items():
                before()
                found[name] = timed(call)
            kept = disturbed if any(late for _, late in found.values()) else clean
            kept.append({name: seconds for name, (seconds, _) in found.items()})
    taken, note = clean, ""
    if len(clean) < min(rounds, MIN_ROUNDS):
        taken = clean + disturbed
        note = f"; DISTURBED by other programs in {len(disturbed)} of {len(taken)} rounds"
    return {name: [found[name] for found in taken] for name in calls}, note


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph, which costs the host next to nothing."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        out = call()
    torch.cuda.synchronize()

    def replay(keep_alive: object = out) -> None:
        graph.replay()

    return replay


def gpu_times(calls: Calls, rounds: int = ROUNDS) -> Samples:
    """Seconds between two events on the current stream, in turn, every one with a cold L2."""
    empty_caches = emptied_caches("cuda")
    events = {name: [] for name in calls}
    with no_garbage_collection():
        for _ in range(rounds):
            for name, call in calls.items():
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                empty_caches()
                start.record()
                out = call()
                stop.record()
                del out
                events[name].append((start, stop))
        torch.cuda.synchronize()
    return {name: [a.elapsed_time(b) / 1e3 for a, b in pairs] for name, pairs in events.items()}


def times(calls: Calls, device: str, rounds: int = ROUNDS) -> tuple[Samples, str]:
    """Samples of warm calls, and the name of the timer.

    On a GPU all of them are replayed as CUDA graphs, since the kernels of interest are shorter than
    their launch; where one cannot be captured, none is. Call it on a side stream.
    """
    for call in calls.values():
        for _ in range(WARM_UP):
            call()
    if device == "cpu":
        samples, note = cpu_times(calls, rounds, emptied_caches("cpu"))
        return samples, f"host clock, empty caches{note}"
    torch.cuda.synchronize()
    try:
        graphs = {name: captured(call) for name, call in calls.items()}
    except RuntimeError as error:
        torch.cuda.synchronize()
        reason = str(error).partition("\n")[0]
        return gpu_times(calls, rounds), f"CUDA events, cold L2, no graph ({reason})"
    return gpu_times(graphs, rounds), "CUDA events, cold L2, CUDA graph"


@contextmanager
def side_stream(device: str) -> Iterator[None]:
    """Work inside runs on a stream that can be captured."""
    if device == "cpu":
        yield
        return
    stream, outer = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(outer)
    with torch.cuda.stream(stream):
        yield
    outer.wait_stream(stream)


# ceilings


def copies(size: int, device: str) -> Calls:
    """Copies that read and write `size` bytes in all, with plain and with streaming stores."""
    source = torch.ones(max(round(size / 128), 1) * 16, device=device)  # whole lines of a cache
    target = torch.empty_like(source)
    found: Calls = {"copy (torch)": lambda: target.copy_(source)}
    if device != "cpu":
        found["copy (kernel)"] = lambda: torch.neg(source, out=target)
    else:
        found["copy (numpy)"] = lambda: np.copyto(target.numpy(), source.numpy())
        stream_copy = getattr(torch.ops.fluxkern_cpu, "_stream_copy", None)
        if stream_copy is not None:
            found["copy (streaming)"] = lambda: stream_copy(source, target)
    return found


def best(samples: Samples) -> str:
    return min(samples, key=lambda name: statistics.median(samples[name]))


def copy_bandwidth(device: str, size: int = 2**28, rounds: int = ROUNDS) -> float:
    """Bytes read and written a second, by the fastest copy of a working set of `size` bytes."""
    ops.explain()  # loads what is compiled
    with side_stream(device):
        samples, _ = times(copies(size, device), device, rounds)
    return size / statistics.median(samples[best(samples)])


def timer_floor(device: str) -> float:
    """Seconds that the timer shows for next to nothing; they are part of every sample."""
    one = torch.zeros(1, device=device)
    with side_stream(device):
        samples, _ = times({"one element": one.zero_}, device)
    return statistics.median(samples["one element"])


@cache
def matrix_rate(device: str, dtype: torch.dtype, side: int | None = None) -> float:
    """FLOPs a second of a product of two square matrices."""
    side = side or (1024 if device == "cpu" else 8192)
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    with side_stream(device):
        samples, _ = times({"product": lambda: a @ b}, device, rounds=7)
    return 2 * side**3 / statistics.median(samples["product"])


# providers


def reasons(op: str, args: dict[str, Any]) -> dict[str, str | None]:
    """Each backend of the Case: None, or why it cannot run these arguments here."""
    (choice,) = ops.explain(op, *in_schema_order(op, args, "")[:-1])
    return {name: choice.reasons[name] for name in CASES[op].backends}


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


@contextmanager
def watched() -> Iterator[set[tuple[str, str]]]:
    """Collects which ops were called inside, and which backend ran them.

    What a kernel calls for a part of its work is its own affair.
    """
    ran: set[tuple[str, str]] = set()
    registry, running = ops._dispatch._registry, []

    def recording(name: str, backend: ops.Backend) -> ops.Backend:
        def run(*args: object) -> object:
            if not running:
                ran.add((name, backend.name))
            running.append(name)
            try:
                return backend.run(*args)
            finally:
                running.pop()

        return replace(backend, run=run)

    ops.explain()  # finds all backends
    before = {name: dict(found) for name, found in registry.items()}
    for name, found in before.items():
        registry[name] = {
            n: b if isinstance(b, str) else recording(name, b) for n, b in found.items()
        }
    try:
        yield ran
    finally:
        registry.update(before)


def private_op(op: str, backend: str) -> Callable | None:
    """The compiled kernel behind a backend, which takes its outputs as the last arguments."""
    library = getattr(torch.ops, f"fluxkern_{backend.replace('-', '_')}")
    packet = getattr(library, op, None)
    return packet.default if packet is not None else None


def kernels_alone(op: str, args: dict[str, Any], backends: Calls) -> Calls:
    """The forward without Python, checks and allocation: what is held against a copy on a CPU.

    After its caches are emptied a CPU reads the interpreter anew too, some 0.1 ms a call.
    """
    found: Calls = {}
    for name in backends:
        kernel = None if name in BASELINES else private_op(op, name)
        if kernel is not None:
            expected, out = (outputs(getattr(ops, op), args, backend=name) for _ in range(2))
            found[f"{name} kernel"] = partial(kernel, *in_schema_order(op, args, name)[:-1], *out)
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
            return outputs(run, args) if dout is None else gradients(run, args, dout)

        plain = meaning(op)
        own = compute(plain, args)
        return Truth(compute(plain, widened(args)), own, compute, dout is not None)


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
        provider: "eager", "compile" or the backend that has to run.
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
    op: str, provider: str, ran: set[tuple[str, str]], with_gradients: bool
) -> bool:
    if provider in BASELINES:
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
    share: float  # of the ceiling
    times: dict[str, float]  # baseline -> how many times faster than it, round by round

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def as_dict(self) -> dict[str, Any]:
        rate = self.bytes / self.median / 1e9
        return {
            **asdict(self),
            "median": self.median,
            "iqr": spread(self.seconds),
            "gigabytes_per_second": rate,
        }


@dataclass(frozen=True)
class Comparison:
    rows: list[Row]
    verified: dict[str, float]  # provider -> largest error
    skipped: dict[str, str]  # provider -> why it did not run

    def row(self, provider: str) -> Row | None:
        return next((row for row in self.rows if row.provider == provider), None)


def unavoidable(case: Case, sizes: Sizes, dtype: torch.dtype, direction: str) -> tuple[int, int]:
    """Bytes and FLOPs; a backward of matrix products takes twice those of the forward."""
    moved = case.moved(sizes) if direction != "backward" else 0
    passes = int(direction != "backward")
    if direction != "forward":
        moved += case.moved_backward(sizes)
        passes += 2
    return moved * dtype.itemsize, passes * case.flops(sizes)


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


def verified(
    op: str, args: dict[str, Any], direction: str, named: dict[str, Callable]
) -> tuple[Calls, dict[str, float], dict[str, str]]:
    """Calls of the providers that are right, their errors, and why torch.compile is not timed."""
    forward = Truth.of(op, args, None)
    dout = tuple(torch.randn_like(t) for t in forward.own)
    truths = [forward] if direction == "forward" else [forward, Truth.of(op, args, dout)]
    calls, error, skipped = {}, {}, {}
    for name, run in named.items():
        try:
            error[name] = verify(op, name, run, args, *truths)
            calls[name] = in_direction(run, args, direction, dout)
        except Exception as failure:  # of torch.compile alone also a wrong result
            if name != "compile":
                raise
            skipped[name] = first_line(failure)
    return calls, error, skipped


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
        The rows, that of the fastest copy first, and why other providers are not among them.

    Raises:
        WrongResult: a provider's result is wrong or its backend did not run.
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
        named = {n: run for n, run in (found | (more or {})).items() if only is None or n in only}
        calls, error, without = verified(op, args, direction, named)
        if not rounds:
            return Comparison([], error, skipped | without)
        if device == "cpu" and direction == "forward" and not op.endswith("_"):
            calls |= kernels_alone(op, args, calls)
        copy = copies(size, device)
        samples, timer = times(copy | calls, device, rounds)
    ceiling = samples[best({name: samples[name] for name in copy})]
    floor = flops / matrix_rate(device, DTYPES[dtype]) if flops else 0.0
    limit = [max(seconds, floor) for seconds in ceiling]
    rows = [
        Row(
            *(op, direction, shape, dtype, device, name, timer, size, flops),
            max_error=error.get(name),
            seconds=seconds,
            share=ratio(limit, seconds),
            times={b: ratio(samples[b], seconds) for b in BASELINES if b in samples},
        )
        for name, seconds in ({"copy": ceiling} | {n: samples[n] for n in calls}).items()
    ]
    return Comparison(rows, error, skipped | without)


# from Python to kernel


@dataclass(frozen=True)
class CallCost:
    """What the host spends on one call of a tiny size; nothing waits for a GPU."""

    op: str
    backend: str
    route: str
    microseconds: float
    iqr: float
    note: str


TINY = Sizes(1, 1, 1, 8, 1, 8, skip=0, spare=0)


def routes(op: str, backend: str, args: dict[str, Any]) -> Calls:
    """The ways into one kernel, from the outside in."""
    public, positional = getattr(ops, op), in_schema_order(op, args, backend)
    torch_route = torch_op(op)
    found: Calls = {
        "public function": lambda: public(**args, backend=backend),
        "torch op": lambda: torch_route(*positional),
    }
    private = private_op(op, backend)
    if private is not None:
        found["private op"] = partial(
            private, *positional[:-1], *outputs(public, args, backend=backend)
        )
    return found


def call_costs(
    op: str, dtype: str = "fp32", device: str = "cpu", rounds: int = ROUNDS, calls: int = 200
) -> list[CallCost]:
    """Microseconds from Python to kernel, by route, of every backend that runs here."""
    args = CASES[op].inputs(Maker(TINY, DTYPES[dtype], device))
    here = ["reference", *(name for name, why in reasons(op, args).items() if why is None)]
    ways = {(b, name): call for b in here for name, call in routes(op, b, args).items()}

    def repeated(call: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            for _ in range(calls):
                call()

        return run

    before = (lambda: None) if device == "cpu" else torch.cuda.synchronize
    samples, note = cpu_times({way: repeated(ways[way]) for way in ways}, rounds, before)
    return [
        CallCost(op, *way, statistics.median(s) / calls * 1e6, spread(s) / calls * 1e6, note)
        for way, s in samples.items()
    ]


# the machine


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def said_by(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def commit() -> str | None:
    """Of this checkout, with -dirty where files differ."""
    if not (ROOT / ".git").exists():
        return None
    return said_by("git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty")


def source_hash() -> str:
    """Of the code that runs, also where there is no git."""
    digest = hashlib.sha256()
    for folder, pattern in (("fluxkern", "*.py"), ("csrc", "*")):
        for file in sorted((ROOT / folder).rglob(pattern)):
            if file.is_file():
                digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text() if info.exists() else "", re.M)
    return found[1] if found else platform.processor() or platform.machine()


def gpu() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    query = "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit"
    said = said_by("nvidia-smi", query, "--format=csv,noheader", "--id=0") or ""
    driver, *clocks = [part.strip() for part in said.split(",")]
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "memory": found.total_memory,
        "multiprocessors": found.multi_processor_count,
        "last_level_cache": found.L2_cache_size,
        "driver": driver or None,
        "clocks_and_power_limit": clocks,
        "cuda": torch.version.cuda,
    }


def isa() -> str | None:
    """The instruction set of our CPU kernels; None where they are not built."""
    ops.explain()
    found = getattr(torch.ops.fluxkern_cpu, "_isa", None)
    return found() if found else None


def machine() -> dict[str, Any]:
    """What a figure depends on besides the code, and which code it is."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "cpu_capability": {"torch": torch.backends.cpu.get_cpu_capability(), "fluxkern": isa()},
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "last_level_cache": last_level_cache(),
        "load": os.getloadavg()[0],
        "gpu": gpu(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "triton", "numpy")},
        "commit": commit(),
        "source": source_hash(),
    }


# reports


def write_json(path: Path, data: object) -> None:
    """The file is the old or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def table(rows: list[Row]) -> str:
    """One line a row, a heading for each comparison; times are medians in microseconds."""
    lines, heading = [], None
    columns = f"{'us':>11} {'IQR':>9} {'GB/s':>8} {'share':>6} {'x eager':>8} {'x compile':>9}"
    for row in rows:
        about = (row.op, row.direction, row.dtype, row.shape, row.device)
        if about != heading:
            lines += ["", ", ".join(about) + f"; {row.timer}", f"  {'':12} {columns}  max error"]
            heading = about
        gains = " ".join(
            f"{row.times[b]:{width}.2f}" if b in row.times else " " * width
            for b, width in (("eager", 8), ("compile", 9))
        )
        error = "" if row.max_error is None else f"{row.max_error:.2g}"
        lines.append(
            f"  {row.provider:12} {row.median * 1e6:11.1f} {spread(row.seconds) * 1e6:9.1f}"
            f" {row.bytes / row.median / 1e9:8.1f} {row.share:6.0%} {gains}  {error}"
        )
    return "\n".join(lines[1:])


def cost_table(costs: list[CallCost]) -> str:
    lines = [f"{'op':36} {'backend':10} {'route':16} {'us a call':>10} {'IQR':>7}"]
    for c in costs:
        lines.append(f"{c.op:36} {c.backend:10} {c.route:16} {c.microseconds:10.1f} {c.iqr:7.1f}")
    return "\n".join(lines)

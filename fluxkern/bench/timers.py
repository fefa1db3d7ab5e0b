"""Samples of calls taken in turn, the statistics of them, and the two ceilings of the machine."""

import ctypes
import gc
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import ops

ROUNDS, MIN_ROUNDS = 15, 7
PATIENCE = 5.0  # seconds of a comparison, after which MIN_ROUNDS are enough
WARM_UP, LONG = 3, 0.1  # calls; a call of that many seconds is warm after one

Calls = dict[Any, Callable[[], object]]  # provider -> what is timed
Samples = dict[Any, list[float]]  # provider -> seconds, one a round


# statistics


def spread(samples: list[float]) -> float:
    """Interquartile range."""
    low, high = np.percentile(samples, [25, 75])
    return float(high - low)


def ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median of the ratios of samples of the same round: what slows a whole round cancels."""
    return statistics.median(n / d for n, d in zip(numerator, denominator, strict=True))


def summary(seconds: list[float]) -> dict[str, float | int]:
    return {
        "median": statistics.median(seconds),
        "iqr": spread(seconds),
        "least": min(seconds),
        "rounds": len(seconds),
    }


def rounded(value: Any) -> Any:
    """Every float in it to four digits."""
    if isinstance(value, dict):
        return {name: rounded(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


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

    It reads, so that no dirty line is left to be written back in the time of the next call.
    """
    return torch.ones(2 * last_level_cache(device) // 4, device=device).sum


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
            if len(clean) + len(disturbed) >= min(rounds, MIN_ROUNDS) and time.monotonic() > end:
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
            if timed(call)[0] > LONG:
                break
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

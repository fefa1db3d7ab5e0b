"""Where the time of one transformer step goes: a Chrome trace and a table.

    python3 -m benchmarks.suite --profile out.json.gz

The step is of the compact FLUX.1 at 512 px, or of FLUX.1-dev's size where there is a GPU. In the
trace each op of ours is a range of its own name. *Kernels* are launches on a GPU, calls of
operators that move something on a CPU.
"""

import re
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fluxkern import bench

KINDS = {  # of operators, from the outside in
    "linears": r"fluxkern::(linear|modulation)|aten::(linear|addmm|mm|bmm|matmul)$|mkl",
    "attention": r"fluxkern::(rope_)?attention|aten::_?scaled_dot_product",
    "norm, modulate, gate": r"fluxkern::\w*(norm_modulate|gated_residual)"
    r"|aten::(native_)?layer_norm",
    "QK norm, rotation": r"fluxkern::\w*qk_norm_rope|aten::(_fused_)?rms_norm",
    "GELU": r"(aten|fluxkern)::gelu",
    "fused by torch.compile": r"CompiledFxGraph|Torch-Compiled|triton_",
    "copies": r"aten::(cat|copy_|clone|contiguous|_to_copy|to|stack|repeat)",
    "other elementwise": r"aten::\w+",
}
REST = "Python and the rest"
CALLS = 3


def kind_of(name: str) -> str | None:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), None)


def taken(call: Callable[[], object], device: str) -> tuple[profile, float]:
    """A profile of a warm call, and its seconds."""
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device != "cpu")]
    call()
    with profile(activities=activities, acc_events=True) as found:
        start = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return found, seconds


def by_kind(found: profile, device: str) -> dict[str, float]:
    """Kind -> seconds: of the host on a CPU, of the kernels on a GPU.

    An operator's kind is that of the outermost operator around it but for what torch.compile runs,
    where products and attention keep their own.
    """
    whole, own = ("cpu_time_total", "self_cpu_time_total")
    if device != "cpu":
        whole, own = ("device_time_total", "self_device_time_total")
    seconds: dict[str, float] = defaultdict(float)

    def take(event: Any, around: str | None) -> None:
        kind = kind_of(event.name)
        open_to_more = kind in (None, "fused by torch.compile", "other elementwise")
        if not open_to_more:
            seconds[kind] += getattr(event, whole) / 1e6
            return
        kind = around or kind
        if kind:
            seconds[kind] += getattr(event, own) / 1e6
        for child in event.cpu_children:
            take(child, kind)

    for event in found.events():
        if event.cpu_parent is None and event.device_type == torch.autograd.DeviceType.CPU:
            take(event, None)
    return dict(seconds)


def shares(call: Callable[[], object], device: str) -> dict[str, float]:
    """Kind -> share of the fastest of some calls; what no operator took is Python's on a CPU."""
    found, seconds = min((taken(call, device) for _ in range(CALLS)), key=lambda pair: pair[1])
    kinds = by_kind(found, device)
    whole = seconds if device == "cpu" else sum(kinds.values())
    rest = {REST: max(whole - sum(kinds.values()), 0.0)} if device == "cpu" else {}
    return {kind: spent / whole for kind, spent in (kinds | rest).items()}


def kernels(found: profile, costs: bench.Counted, device: str) -> int:
    if device == "cpu":
        return len(costs.costs)
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in found.events())


def measured(call: Callable[[], object], device: str) -> tuple[profile, dict[str, Any]]:
    costs, found = bench.counted(call), taken(call, device)
    about = {
        "ms, profiled": found[1] * 1e3,
        "kernels": kernels(found[0], costs, device),
        "GB moved": costs.bytes / 1e9,
        "TFLOP": costs.flops / 1e12,
        "peak MB": peak_memory(call, device) / 1e6,
    }
    return found[0], about | {"shares": shares(call, device)}


def peak_memory(call: Callable[[], object], device: str) -> int:
    """Bytes that a call takes at most beside what is there before."""
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    held = peak = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def table(found: dict[str, dict[str, Any]], least: float) -> str:
    """A column a provider."""
    names = [name for name in next(iter(found.values())) if name != "shares"]
    lines = [f"{'':24}" + "".join(f"{provider:>22}" for provider in found)]
    for name in names:
        lines.append(f"{name:24}" + "".join(f"{about[name]:22.4g}" for about in found.values()))
    lines.append(
        f"{'GB moved, x the least':24}"
        + "".join(f"{about['GB moved'] / least:22.2f}" for about in found.values())
    )
    kinds = {kind for about in found.values() for kind in about["shares"]}
    for kind in (kind for kind in (*KINDS, REST) if kind in kinds):
        cells = (about["shares"].get(kind) for about in found.values())
        lines.append(
            f"{kind:24}" + "".join(f"{cell:22.1%}" if cell else " " * 22 for cell in cells)
        )
    return "\n".join(lines)


def write(file: Path, threads: int | None = None) -> int:
    """Profiles one step by ours and by diffusers, writes the trace of ours."""
    from . import step
    from .whole import BASELINE, OURS

    bench.pin_threads(threads)
    bench.limit_isa()
    gpu = torch.cuda.is_available()
    device, config, dtype = ("cuda", "dev", "bf16") if gpu else ("cpu", "compact", "fp32")
    model = step.Model(config, 1024 if gpu else 512, dtype, device)
    theirs = model.diffusers("step", 0.0).get(BASELINE)
    calls = {OURS: model.step} | ({BASELINE: theirs.call} if theirs else {})
    found = {}
    for provider, call in calls.items():
        trace, found[provider] = measured(call, device)
        if provider == OURS:
            file.parent.mkdir(parents=True, exist_ok=True)
            trace.export_chrome_trace(str(file))
    print(f"one step, {model.size}, {dtype}, {device}")
    print(table(found, model.least_bytes() / 1e9))
    print(f"least: {step.WHY_BYTES}")
    print(f"{file}: open it in https://ui.perfetto.dev")
    return 0

"""Peak memory of one block's call, in a process that has done nothing else.

python3 -m benchmarks.memory double bf16 fluxkern flux-512
"""

import ctypes
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fluxkern import bench
from fluxkern.cases import SHAPES, Sizes

from .blocks import Inputs, models, our_block, their_block
from .whole import OURS, draw


def status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) << 10


def block_and_call(
    kind: str, dtype: torch.dtype, provider: str, sizes: Sizes
) -> tuple[nn.Module, Callable]:
    theirs, ours = models(kind, sizes)
    inputs = Inputs.of(kind, sizes, theirs.pos_embed).to(dtype)
    if provider == OURS:
        block = draw(our_block(ours, kind), dtype)
        return block, inputs.call_ours(kind, block)
    block = draw(their_block(theirs, kind), dtype)
    return block, inputs.call_theirs(block)


def give_back() -> None:
    """Freed memory, such as drawing the weights has left, goes to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def peak(kind: str, dtype: str, provider: str, shape: str) -> dict[str, Any]:
    """Of weights, inputs and one call, above what the process took before there were any."""
    to = bench.DTYPES[dtype]
    block_and_call(kind, to, provider, SHAPES["compact"])[1]()  # loads libraries, starts threads
    give_back()
    before = status("VmRSS")
    block, call = block_and_call(kind, to, provider, SHAPES[shape])
    give_back()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    call()
    weights = sum(p.nbytes for p in block.parameters())
    taken = status("VmHWM") - before
    return {
        **{"what": f"{kind} block", "dtype": dtype, "provider": provider, "shape": shape},
        **{"weights": weights, "peak": taken, "ratio": round(taken / weights, 3)},
    }


if __name__ == "__main__":
    bench.pin_threads()
    bench.limit_isa()
    print(json.dumps(peak(*sys.argv[1:])))

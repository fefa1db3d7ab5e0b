"""How fast, against what, how far from the machine's limit, and did it really run.

`measure` compares the providers of one op: the plain composition ("eager"), torch.compile of it
("compile") and every backend of ours that runs here. Each is held to fp64 and its backend is seen
running before a clock starts; copies of as many bytes are timed in turn with them, as the ceiling.
"""

from . import peers, tune
from .calls import CallCost, call_costs
from .compare import (
    BASELINES,
    DIRECTIONS,
    DTYPES,
    Comparison,
    Truth,
    WrongResult,
    kernels_alone,
    measure,
    reasons,
    unavoidable,
    verify,
    watched,
)
from .cost import Counted, counted
from .system import LIMITS, ROOT, gpu, limit_isa, machine, source_hash
from .tables import cost_table, table, write_json
from .timers import (
    MIN_ROUNDS,
    ROUNDS,
    copies,
    copy_bandwidth,
    cpu_times,
    emptied_caches,
    gpu_times,
    keep_pages,
    matrix_rate,
    pin_threads,
    ratio,
    rounded,
    spread,
    summary,
    timed,
    timer_floor,
    waited_for_cores,
)

__all__ = [
    "BASELINES",
    "CallCost",
    "Comparison",
    "Counted",
    "DIRECTIONS",
    "DTYPES",
    "LIMITS",
    "MIN_ROUNDS",
    "ROOT",
    "ROUNDS",
    "Truth",
    "WrongResult",
    "call_costs",
    "copies",
    "copy_bandwidth",
    "cost_table",
    "counted",
    "cpu_times",
    "emptied_caches",
    "gpu",
    "gpu_times",
    "keep_pages",
    "kernels_alone",
    "limit_isa",
    "machine",
    "matrix_rate",
    "measure",
    "peers",
    "pin_threads",
    "ratio",
    "reasons",
    "rounded",
    "source_hash",
    "spread",
    "summary",
    "table",
    "timed",
    "timer_floor",
    "tune",
    "unavoidable",
    "verify",
    "waited_for_cores",
    "watched",
    "write_json",
]

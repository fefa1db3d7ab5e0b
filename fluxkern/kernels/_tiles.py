"""Tiles of the attention kernels: per kernel the candidates of each architecture, default first.

Nothing is tried when a kernel is first called: `fluxkern tune` measures the candidates once and
keeps the fastest by size, which launchers take by name. All are compiled ahead of time by
tests/test_budgets.py and run without spills, within the shared memory, on tensor cores; those of an
architecture count up to the next. For half precision and D <= 128.
"""

from typing import NamedTuple

from torch import Tensor


class Tile(NamedTuple):
    """What a kernel is compiled with."""

    BLOCK_M: int  # queries
    BLOCK_N: int  # keys
    num_warps: int
    num_stages: int
    TMA: bool

    def __str__(self) -> str:
        return f"{self[0]}x{self[1]} {self[2]}w {self[3]}s{' tma' if self.TMA else ''}"


Candidates = dict[int, tuple[Tile, ...]]

ATTENTION: Candidates = {
    80: (Tile(128, 64, 8, 3, False), Tile(128, 64, 8, 2, False), Tile(128, 32, 8, 3, False)),
    86: (  # 99 KiB of shared memory
        Tile(128, 64, 8, 2, False),
        Tile(128, 32, 8, 3, False),
        Tile(128, 32, 8, 2, False),
    ),
    90: (
        Tile(128, 128, 8, 3, True),
        Tile(128, 128, 8, 2, True),
        Tile(128, 64, 8, 3, True),
        Tile(128, 64, 8, 4, True),
    ),
    100: (Tile(128, 128, 8, 2, True), Tile(128, 64, 8, 3, True)),
    120: (Tile(128, 32, 8, 3, True), Tile(128, 32, 8, 2, True)),
}
BACKWARD_KEYS: Candidates = {
    80: (Tile(64, 64, 8, 2, False),),
    90: (  # with 64 queries and 128 keys it spills
        Tile(32, 128, 8, 3, True),
        Tile(32, 128, 8, 2, True),
        Tile(64, 64, 8, 2, True),
    ),
    100: (Tile(64, 128, 8, 2, True),),
    120: (Tile(64, 64, 8, 2, False),),  # with TMA it spills
}
BACKWARD_QUERIES: Candidates = {
    80: (Tile(64, 64, 8, 2, False),),
    90: (Tile(128, 64, 8, 3, True), Tile(64, 64, 8, 2, True)),
    100: (Tile(128, 64, 8, 2, True),),
    120: (Tile(128, 32, 8, 2, False),),  # with TMA it spills
}
TABLE = {
    "attention": ATTENTION,
    "attention_backward_keys": BACKWARD_KEYS,
    "attention_backward_queries": BACKWARD_QUERIES,
}
KEYWORDS = {  # op -> keyword of its launcher for the name of a tile -> kernel
    "attention": {"tile": "attention"},
    "attention_lse": {"tile": "attention"},
    "rope_attention": {"tile": "attention"},
    "attention_backward": {
        "keys_tile": "attention_backward_keys",
        "queries_tile": "attention_backward_queries",
    },
}
BY_POINTERS = {  # instead of a tile with TMA, for views that no descriptor can be made of
    "attention": {90: (Tile(128, 64, 8, 2, False),), 120: (Tile(128, 32, 8, 1, False),)},
    "attention_backward_keys": {90: (Tile(64, 64, 8, 2, False),)},
    "attention_backward_queries": {90: (Tile(64, 64, 8, 2, False),)},
}
SMALL = Tile(32, 32, 4, 1, False)  # fp32 or a wide head: no tensor cores, little shared memory


def _of(table: Candidates, architecture: int) -> tuple[Tile, ...]:
    return table[max(known for known in table if known <= architecture)]


def candidates(kernel: str, architecture: int) -> tuple[Tile, ...]:
    return _of(TABLE[kernel], architecture)


def by_pointers(kernel: str, architecture: int) -> Tile:
    return _of(BY_POINTERS[kernel], architecture)[0]


def chosen(kernel: str, architecture: int, q: Tensor, name: str | None) -> Tile:
    """The named tile where it is a candidate, else the default."""
    if q.dtype.itemsize != 2 or q.shape[-1] > 128:
        return SMALL
    here = candidates(kernel, architecture)
    return next((tile for tile in here if str(tile) == name), here[0])

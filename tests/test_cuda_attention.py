"""Attention in CUDA on a CPU: many tiles, large scores, NaN, and that no wait can go missing."""

import math
from collections.abc import Callable

import pytest
import torch
from planted_kernels import ROOT, planted_programs, source_without
from torch import Tensor

from fluxkern import reference
from fluxkern.ops import _load, attention, attention_lse, rope_attention
from fluxkern.testing import assert_accurate

EMULATOR = "cuda-emulator"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@pytest.fixture
def built() -> None:
    if reason := _load.load_reason(EMULATOR):
        pytest.skip(reason)


def heads(length: int, dim: int, dtype: torch.dtype, scale: float = 1) -> Tensor:
    return (scale * torch.randn(1, length, 2, dim, dtype=torch.float64)).to(dtype)


@every_dtype
@pytest.mark.parametrize("dim", [64, 128, 24, 10, 136])
@pytest.mark.parametrize("scale", [1, 12], ids=["scores of one", "scores of twelve"])
def test_sums_over_many_tiles_of_keys(built, scale: float, dim: int, dtype: torch.dtype):
    """Scores of twelve leave the top behind by more than the slack again and again."""
    q, k, v = heads(40, dim, dtype, scale), heads(201, dim, dtype), heads(201, dim, dtype)
    truth = reference.attention_lse(q.double(), k.double(), v.double())
    own = reference.attention_lse(q, k, v)
    found = attention_lse(q, k, v, backend=EMULATOR)
    for name, *three in zip(("out", "lse"), found, truth, own, strict=True):
        assert_accurate(*three, what=name)


@every_dtype
def test_no_keys_give_zeros(built, dtype: torch.dtype):
    none = heads(0, 64, dtype)
    out, lse = attention_lse(heads(5, 64, dtype), none, none, backend=EMULATOR)
    assert not out.any() and bool((lse == -math.inf).all())


@every_dtype
@pytest.mark.parametrize("dim", [64, 10])
def test_nan_stays_in_its_row_of_queries(built, dim: int, dtype: torch.dtype):
    q, k, v = heads(40, dim, dtype), heads(70, dim, dtype), heads(70, dim, dtype)
    expected = attention(q, k, v, backend=EMULATOR)
    q[:, 7] = math.nan
    out = attention(q, k, v, backend=EMULATOR)
    others = torch.arange(40) != 7
    assert out[:, 7].isnan().all() and torch.equal(out[:, others], expected[:, others])


@every_dtype
@pytest.mark.parametrize("dim", [64, 10])
def test_a_key_of_minus_infinite_score_has_no_weight(built, dim: int, dtype: torch.dtype):
    q, k, v = heads(3, dim, dtype).abs(), heads(99, dim, dtype), heads(99, dim, dtype)
    k[:, :70, :, 0] = -math.inf  # a whole tile, and more
    torch.testing.assert_close(
        attention(q, k, v, backend=EMULATOR),
        attention(q, k[:, 70:], v[:, 70:], backend=EMULATOR),
    )


@every_dtype
def test_rows_that_are_not_aligned_are_taken(built, dtype: torch.dtype):
    """By the kernel without tensor cores; norm and rotation go ahead of it."""
    q, k, v = (heads(37, 65, dtype)[..., 1:] for _ in range(3))
    weights = torch.randn(2, 64, dtype=torch.float64).to(dtype)
    angle = torch.randn(37, 32)
    args = (q, k, v, *weights, angle.cos(), angle.sin())
    truth = reference.rope_attention(*(t.double() for t in args))
    assert_accurate(rope_attention(*args, backend=EMULATOR), truth, reference.rope_attention(*args))


# waits and barriers

WAIT = "wait_for_copies();"
BARRIERS = {
    "after the copies of k": "__syncthreads();  // these k are there, the v before them used",
    "after the copies of v": "__syncthreads();  // these v are there, the k used",
    "between the halves of a store": "__syncwarp();",
}


def without(code: str, which: int = 0) -> str:
    return source_without("attention", code, which)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Callable:
    return planted_programs("attention", tmp_path_factory.mktemp("attention"))


def test_the_kernel_gives_the_sums_in_double(program: Callable):
    done = program((ROOT / "csrc/cuda/attention.cu").read_text())
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("which", [0, 1])
def test_copies_that_are_not_waited_for_are_seen(program: Callable, which: int):
    done = program(without(WAIT, which))
    assert done.returncode == 4 and "leaves an output unwritten" in done.stdout  # NaN


@pytest.mark.sanitize
@pytest.mark.parametrize("barrier", BARRIERS.values(), ids=BARRIERS)
def test_a_removed_barrier_is_a_race(program: Callable, barrier: str):
    done = program(without(barrier), "thread")
    assert done.returncode and "data race" in done.stdout, done.stdout

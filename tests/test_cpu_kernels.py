"""CPU kernels in every instruction set of this machine, and the borders of attention's tiles."""

from collections.abc import Iterator

import pytest
import torch
from test_contract import DIFFERENTIABLE, DTYPES, assert_backward, assert_forward, every_dtype, make

from fluxkern import ops, reference
from fluxkern.cases import CASES, TEST_SIZES, Sizes, tables
from fluxkern.ops import _load
from fluxkern.testing import assert_accurate

KERNELS = torch.ops.fluxkern_cpu
COMPILED = [
    op
    for op in CASES
    if _load.load_reason("cpu") is None and hasattr(KERNELS, op)  # linear is torch's
]
ISAS = ("baseline", "avx2", "avx512", "avx512-vnni")
LENGTHS = [(1, 1), (5, 300), (95, 192), (96, 12), (97, 193), (200, 1)]  # queries, keys
HEAD_DIMS = [1, 2, 31, 64, 66, 128, 160]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    if reason := _load.load_reason("cpu"):
        pytest.skip(reason)
    best = KERNELS._isa()
    try:
        KERNELS._set_isa(request.param)
    except RuntimeError as refusal:
        pytest.skip(str(refusal).splitlines()[0])
    yield request.param
    KERNELS._set_isa(best)


def heads(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[..., H, D], rows of a longer buffer."""
    return torch.randn(*shape[:-1], shape[-1] + 3, dtype=torch.float64).to(dtype)[..., : shape[-1]]


def attention_inputs(queries: int, keys: int, D: int, dtype: torch.dtype = torch.float32) -> tuple:
    q = heads(2, queries, 3, D, dtype=dtype)
    return q, heads(2, keys, 3, D, dtype=dtype), heads(2, keys, 3, D, dtype=dtype)


def assert_attends(*args: torch.Tensor) -> None:
    out, lse = ops.attention_lse(*args, backend="cpu")
    true_out, true_lse = reference.attention_lse(*(t.double() for t in args))
    own_out, own_lse = reference.attention_lse(*args)
    assert_accurate(out, true_out, own_out)
    assert_accurate(lse, true_lse, own_lse, "lse")
    assert torch.equal(ops.attention(*args, backend="cpu"), out)


# every op


@pytest.mark.parametrize("op", COMPILED)
@every_dtype
def test_each_instruction_set_is_accurate(op: str, dtype: str, isa: str):
    for sizes in (Sizes(), TEST_SIZES["FLUX's width"]):
        args = make(op, "cpu", sizes, dtype)
        assert_forward(op, "cpu", args)
        if (op, "cpu") in DIFFERENTIABLE:
            assert_backward(op, "cpu", args)


# linear, in the dtypes that this processor may have no arithmetic for

# tokens, Cin, Cout: at the borders of its tiles, chunks and blocks
PRODUCTS = [(1, 1, 1), (13, 250, 37), (14, 257, 192), (1540, 31, 40), (24, 513, 410)]


@pytest.mark.parametrize("tokens, cin, cout", PRODUCTS)
@pytest.mark.parametrize("epilogue", ["bias", "gelu_tanh", "add"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_linear_at_the_borders_of_its_tiles(
    tokens: int, cin: int, cout: int, epilogue: str, dtype: torch.dtype, isa: str
):
    x = torch.randn(2, tokens, cin + 3, dtype=torch.float64).to(dtype)[..., :cin]
    weight = torch.randn(cout, cin + 5, dtype=torch.float64).div(16).to(dtype)[:, :cin]
    bias = None if epilogue == "add" else torch.randn(cout, dtype=torch.float64).to(dtype)
    more = (epilogue if epilogue == "gelu_tanh" else None, epilogue == "add")
    joint = torch.randn(2, tokens + 7, cout, dtype=torch.float64).to(dtype)
    true_joint, own_joint, before = joint.double(), joint.clone(), joint.clone()
    KERNELS.linear_(joint[:, 4:-3], x, weight, bias, *more)
    wide = (x.double(), weight.double(), None if bias is None else bias.double())
    reference.linear_(true_joint[:, 4:-3], *wide, *more)
    reference.linear_(own_joint[:, 4:-3], x, weight, bias, *more)
    assert_accurate(joint[:, 4:-3], true_joint[:, 4:-3], own_joint[:, 4:-3])
    assert torch.equal(joint[:, :4], before[:, :4]) and torch.equal(joint[:, -3:], before[:, -3:])


def test_linear_without_channels_is_its_bias():
    bias = torch.randn(9).half()
    out = ops.linear(torch.empty(5, 0).half(), torch.empty(9, 0).half(), bias, backend="cpu")
    assert torch.equal(out, bias.expand(5, 9))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("which", ["x", "weight", "bias"])
def test_linear_takes_any_strides(which: str, dtype: torch.dtype):
    given = {"x": torch.randn(2, 9, 40), "weight": torch.randn(24, 40), "bias": torch.randn(24)}
    given = {name: t.to(dtype) for name, t in given.items()}
    t = given[which]
    given[which] = torch.stack([t, t + 1], -1)[..., 0]  # every second element
    out = ops.linear(**given, backend="cpu")
    truth = reference.linear(*(t.double() for t in given.values()))
    assert_accurate(out, truth, reference.linear(*given.values()))


def test_a_nan_reaches_its_row_or_column_of_a_linear_and_no_other(isa: str):
    x, weight = torch.randn(20, 300).bfloat16(), torch.randn(50, 300).bfloat16()
    x[7, 299] = weight[33, 0] = float("nan")
    out = x.new_empty(20, 50)
    KERNELS.linear_(out, x, weight, None, None, False)
    expected = torch.zeros(20, 50, dtype=torch.bool)
    expected[7], expected[:, 33] = True, True
    assert torch.equal(out.isnan(), expected)


# attention


@pytest.mark.parametrize("queries, keys", LENGTHS)
def test_attention_at_the_borders_of_its_tiles(queries: int, keys: int, isa: str):
    assert_attends(*attention_inputs(queries, keys, 10))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_attention_of_any_head_dim(head_dim: int, dtype: torch.dtype, isa: str):
    assert_attends(*attention_inputs(13, 25, head_dim, dtype))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_rope_attention_over_several_tiles(dtype: torch.dtype, isa: str):
    q, k, v = attention_inputs(200, 200, 64, dtype)
    weights = torch.rand(2, 64).to(dtype) + 0.5
    args = (q, k, v, *weights, *tables(100 * torch.rand(200, 32, dtype=torch.float64)))
    wide = (*(t.double() for t in args[:5]), *args[5:])
    truth, own = reference.rope_attention(*wide), reference.rope_attention(*args)
    assert_accurate(ops.rope_attention(*args, backend="cpu"), truth, own)


def test_a_nan_in_a_query_stays_in_its_row(isa: str):
    q, k, v = attention_inputs(100, 50, 16)
    expected = ops.attention(q, k, v, backend="cpu")
    q[1, 70, 2, 3] = float("nan")
    out = ops.attention(q, k, v, backend="cpu")
    assert out[1, 70, 2].isnan().all()
    expected[1, 70, 2] = out[1, 70, 2] = 0
    assert torch.equal(out, expected)


@pytest.mark.parametrize("which", ["k", "v"])
def test_a_nan_in_a_key_or_value_reaches_every_query_of_its_head(which: str, isa: str):
    q, k, v = attention_inputs(100, 50, 16)
    expected = ops.attention(q, k, v, backend="cpu")
    {"k": k, "v": v}[which][0, 49, 1, 15] = float("nan")
    out = ops.attention(q, k, v, backend="cpu")
    reached = out[0, :, 1] if which == "k" else out[0, :, 1, 15]
    assert reached.isnan().all()
    assert torch.equal(out[1], expected[1]) and torch.equal(out[0, :, 0], expected[0, :, 0])


def test_scores_beyond_the_range_of_the_exponential(isa: str):
    q, k, v = attention_inputs(40, 250, 16)
    assert_attends((30 * q).round(), (30 * k).round(), v)  # scores that fp32 holds exactly


def test_no_keys_give_zeros(isa: str):
    ops.attention(*(x * float("nan") for x in attention_inputs(3, 5, 8)), backend="cpu")
    q, k, v = attention_inputs(3, 0, 8)  # in memory that held NaN
    out, lse = ops.attention_lse(q, k, v, backend="cpu")
    assert not out.any() and (lse == -float("inf")).all()


def test_the_number_of_threads_changes_no_bit(isa: str):
    args = attention_inputs(230, 300, 64)
    threads, found = torch.get_num_threads(), []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        found.append(ops.attention(*args, backend="cpu"))
    torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


# numbers

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("step", [0.0, 1e-3, -7.0])
@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
def test_every_16_bit_number_is_widened_and_rounded_as_torch_does(
    dtype: torch.dtype, step: float, isa: str
):
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 64, 1024)
    step = torch.tensor(step, dtype=dtype)
    y, gate = step.expand(x.shape).contiguous(), torch.ones(1, 1, 1024, dtype=dtype)
    out = ops.gated_residual(x, y, gate, backend="cpu")
    expected = (x.float() + step.float()).to(dtype)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(0.0), expected.nan_to_num(0.0))

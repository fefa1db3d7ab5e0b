"""Rows in e4m3: the nearest number of each element, and what happens at the ends of the format."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fluxkern import ops
from fluxkern.cases import CASES, Maker, Sizes
from fluxkern.testing import exact_results, readable

if not torch.cuda.is_available():
    import triton_interpreter

    triton_interpreter.install()

OPS = ("norm_modulate_fp8", "gelu_tanh_fp8")
BACKENDS = ("reference", "cuda-emulator", "triton")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MOST = 448.0  # of e4m3
LEAST = 2.0**-9  # above zero
TINY = torch.finfo(torch.float32).tiny
every_op = pytest.mark.parametrize("op", OPS)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def function(op: str, backend: str) -> Any:
    reason = ops.why_not(op, backend)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    return partial(getattr(ops, op), backend=backend)


def gelu_rows(backend: str, *rows: list[float]) -> tuple[Tensor, Tensor]:
    """Of x far from zero, where GELU is x or 0: the row is quantised as it is."""
    q, row_scale = function("gelu_tanh_fp8", backend)(torch.tensor(rows))
    return q.float(), row_scale[:, 0]


def half_spacing(q: Tensor) -> Tensor:
    """Half the distance to the next number of e4m3, of the normal ones at least."""
    return 2.0 ** (q.abs().clamp(min=2.0**-6).log2().floor() - 4)


@every_op
@pytest.mark.parametrize("backend", ["triton", "cuda-emulator"])  # fp32 inside, rounded once
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [37, 48, 1540, 3088])  # gelu's rows are 4 times as long
def test_every_byte_is_the_nearest_number(op: str, backend: str, hidden: int, dtype: torch.dtype):
    """To what an fp32 sum leaves open; a truncated byte is half a spacing beyond it."""
    spare = 16 * (hidden % 16 == 0)  # else rows are misaligned too
    args = CASES[op].inputs(Maker(Sizes(2, 1, 2, hidden, skip=1, spare=spare or 3), dtype))
    exact, exact_scale = exact_results(op, args)
    q, row_scale = function(op, backend)(**args)
    torch.testing.assert_close(row_scale.double(), exact_scale, rtol=1e-5, atol=0)
    ideal = exact / row_scale.double()
    error = (q.double() - ideal).abs()
    assert (error <= half_spacing(q.double()) * (1 + 1e-4) + 1e-4 * LEAST).all()


@every_op
@every_backend
def test_a_product_of_torch_takes_the_rows(op: str, backend: str):
    args = CASES[op].inputs(Maker(Sizes(1, 3, 29, 64, skip=0, spare=0), torch.bfloat16))
    q, row_scale = function(op, backend)(**args)
    channels = q.shape[-1]
    weight = torch.randn(48, channels)
    weight_scale = weight.abs().amax(1, keepdim=True) / MOST
    weight_fp8 = (weight / weight_scale).to(torch.float8_e4m3fn)
    scales = {"scale_a": row_scale.flatten(0, 1), "scale_b": weight_scale.t()}
    out = torch._scaled_mm(q.flatten(0, 1), weight_fp8.t(), **scales, out_dtype=torch.bfloat16)
    rows = readable((q, row_scale))[0].double().flatten(0, 1)
    wide = weight_fp8.double() * weight_scale.double()
    torch.testing.assert_close(out.double(), rows @ wide.t(), rtol=2**-7, atol=1e-2)
    truth = exact_results(op, args)[0].flatten(0, 1) @ weight.double().t()
    assert (out.double() - truth).norm() < 0.06 * truth.norm()  # of two factors, 1/30 each


@every_backend
def test_the_largest_of_a_row_is_448_and_rows_do_not_meet(backend: str):
    q, row_scale = gelu_rows(backend, [896.0, 448.0, 56.0, 0.0], [0.0, 7.0, 14.0, 28.0])
    assert torch.equal(row_scale, torch.tensor([2.0, 0.0625]))
    assert torch.equal(q[0], torch.tensor([448.0, 224.0, 28.0, 0.0]))
    assert torch.equal(q[1], torch.tensor([0.0, 112.0, 224.0, 448.0]))


@every_backend
def test_small_elements_are_subnormal_and_halves_go_to_even(backend: str):
    halves = [MOST, *((n + 0.5) * 8 for n in range(3)), 17.0 * 8, 19.0 * 8]  # 8: GELU is x
    q, row_scale = gelu_rows(backend, [8 * MOST, *halves[1:], 8 * LEAST * 2.0**10])
    assert row_scale[0] == 8
    assert q[0].tolist() == [MOST, 0.5, 1.5, 2.5, 16.0, 20.0, 2.0]
    rows = torch.tensor(
        [[2.0**20 * MOST, *(2.0**20 * LEAST * n for n in (0.5, 0.75, 1, 1.5, 2.5))]]
    )
    q, row_scale = function("gelu_tanh_fp8", backend)(rows)
    assert row_scale.item() == 2.0**20
    assert (q[0, 1:].float() / LEAST).tolist() == [0, 1, 1, 2, 2]


@every_backend
def test_a_row_of_zeros_has_scale_zero(backend: str):
    q, row_scale = gelu_rows(backend, [0.0, -0.0, -100.0, 0.0], [0.0, 0.0, 0.0, 50.0])
    assert row_scale.tolist() == [0.0, pytest.approx(50 / MOST)]
    assert q.tolist() == [[0.0] * 4, [0.0, 0.0, 0.0, MOST]]


@every_backend
def test_nothing_but_the_tiniest_numbers_counts_as_zeros(backend: str):
    """Of a scale that is subnormal the inverse is infinite."""
    least = MOST * TINY
    q, row_scale = gelu_rows(backend, [1.9 * least, 0.0], [2.2 * least, 0.0])  # GELU halves it
    assert q[:, 0].tolist() == [0.0, MOST]
    assert row_scale[0] == 0 and row_scale[1] >= TINY


@every_backend
def test_nan_and_infinity_spoil_their_row_alone(backend: str):
    nan, inf = float("nan"), float("inf")
    rows = [[1.0, nan, 3.0], [1.0, inf, 3.0], [nan, inf, 3.0], [7.0, 14.0, 28.0]]
    q, row_scale = gelu_rows(backend, *rows)
    assert (q * row_scale[:, None])[:3].isnan().all()
    assert torch.equal((q * row_scale[:, None])[3], torch.tensor(rows[3]))
    args = CASES["norm_modulate_fp8"].inputs(Maker(Sizes(), torch.float32))
    run = function("norm_modulate_fp8", backend)
    clean = readable(run(**args))[0]
    args["x"][0, 1, 5] = nan
    spoilt = readable(run(**args))[0]
    assert spoilt[0, 1].isnan().all()
    spoilt[0, 1] = clean[0, 1]
    assert torch.equal(spoilt, clean)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_huge_rows_keep_their_digits(backend: str, dtype: torch.dtype):
    most = torch.finfo(dtype).max
    x = torch.tensor([[most, most / 2, -most]]).to(dtype)
    q, row_scale = function("gelu_tanh_fp8", backend)(x)
    assert q.tolist() == [[MOST, MOST / 2, 0.0]]
    torch.testing.assert_close(row_scale.double(), x[:, :1].double() / MOST)


@every_op
def test_an_input_that_needs_a_gradient_is_refused(op: str):
    args = CASES[op].inputs(Maker(Sizes(), torch.float32))
    args["x"] = args["x"].requires_grad_()
    with pytest.raises(
        ValueError, match=f"{op} has no gradient: .* has requires_grad=True, expected False"
    ):
        getattr(ops, op)(**args)
    with torch.no_grad():
        assert not any(t.requires_grad for t in getattr(ops, op)(**args))


@every_op
def test_a_row_without_channels_is_refused(op: str):
    args = CASES[op].inputs(Maker(Sizes(hidden=0), torch.float32))
    with pytest.raises(ValueError, match="x must have a channel at least, got shape"):
        getattr(ops, op)(**args)


@every_backend
def test_gelu_takes_any_shape(backend: str):
    run = function("gelu_tanh_fp8", backend)
    for shape in ((5,), (3, 5), (2, 3, 4, 5), (0, 5), (2, 3, 0, 5)):
        x = torch.randn(shape)
        q, row_scale = run(x)
        assert (q.shape, row_scale.shape) == (shape, (*shape[:-1], 1))
        expected = ops.gelu_tanh_fp8(x, backend="reference")
        torch.testing.assert_close(
            readable((q, row_scale))[0], readable(expected)[0], rtol=0.13, atol=0
        )

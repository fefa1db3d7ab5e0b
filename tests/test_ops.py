"""Every public op against its formula, written out in NumPy fp64, and the laws it obeys."""

import math
import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch import library as torch_library

from fluxkern import ops, reference
from fluxkern.cases import CASES, TEST_SIZES, Maker, Sizes, normal, tables
from fluxkern.testing import readable

EPS = 1e-6
LIMITS = {  # relative L2 error: some units of rounding
    torch.float64: 2e-15,
    torch.float32: 1e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}


TINY = Sizes(1, 1, 2, 4, 2, 4)


def make(name: str, sizes: Sizes, dtype: torch.dtype) -> dict[str, Any]:
    return CASES[name].inputs(Maker(sizes, dtype))


# truth: loops over rows, fp64


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def vector_of(vectors, b, row, txt_len):
    """Of a token: that of its stream."""
    return vectors[b, int(len(vectors[b]) == 2 and row >= txt_len)]


def true_norm_modulate(x, scale, shift, txt_len):
    out = np.empty_like(x)
    for b, row in np.ndindex(x.shape[:2]):
        centred = x[b, row] - x[b, row].sum() / x.shape[2]
        n = centred / np.sqrt((centred**2).sum() / x.shape[2] + EPS)
        here = (b, row, txt_len)
        out[b, row] = n * (1 + vector_of(scale, *here)) + vector_of(shift, *here)
    return out


def true_gated_residual(x, y, gate, txt_len):
    out = np.empty_like(x)
    for b, row in np.ndindex(x.shape[:2]):
        out[b, row] = x[b, row] + vector_of(gate, b, row, txt_len) * y[b, row]
    return out


def true_fused(x, y, gate, scale, shift, txt_len):
    x_new = true_gated_residual(x, y, gate, txt_len)
    return x_new, true_norm_modulate(x_new, scale, shift, txt_len)


def true_norm_rope(x, weights, cos, sin):
    """weights: one [D] a token; a pair of channels is a complex number, a rotation a product."""
    out = np.empty_like(x)
    for b, row, head in np.ndindex(x.shape[:3]):
        n = x[b, row, head] / np.sqrt((x[b, row, head] ** 2).mean() + EPS) * weights[row]
        turned = (n[0::2] + 1j * n[1::2]) * (cos[row] + 1j * sin[row])
        out[b, row, head, 0::2], out[b, row, head, 1::2] = turned.real, turned.imag
    return out


def true_qk_norm_rope(q, k, q_weight, k_weight, cos, sin):
    length = q.shape[1]
    return (
        true_norm_rope(q, [q_weight] * length, cos, sin),
        true_norm_rope(k, [k_weight] * length, cos, sin),
    )


def true_in_place(q, k, txt_q_weight, txt_k_weight, img_q_weight, img_k_weight, cos, sin, txt_len):
    img_len = q.shape[1] - txt_len
    return (
        true_norm_rope(q, [txt_q_weight] * txt_len + [img_q_weight] * img_len, cos, sin),
        true_norm_rope(k, [txt_k_weight] * txt_len + [img_k_weight] * img_len, cos, sin),
    )


def true_joint_qk_norm_rope(txt_q, txt_k, txt_v, img_q, img_k, img_v, *weights_and_tables):
    q, k, v = (np.concatenate(pair, 1) for pair in ((txt_q, img_q), (txt_k, img_k), (txt_v, img_v)))
    return *true_in_place(q, k, *weights_and_tables, txt_q.shape[1]), v


def true_attention_lse(q, k, v):
    out, lse = np.empty_like(q), np.empty(q.shape[:3])
    for b, row, head in np.ndindex(q.shape[:3]):
        scores = np.array([q[b, row, head] @ key for key in k[b, :, head]]) / q.shape[3] ** 0.5
        top = scores.max()
        weights = np.exp(scores - top)
        out[b, row, head] = weights @ v[b, :, head] / weights.sum()
        lse[b, row, head] = top + math.log(weights.sum())
    return out, lse


def true_attention(q, k, v):
    return true_attention_lse(q, k, v)[0]


def true_rope_attention(q, k, v, *weights_and_tables):
    return true_attention(*true_qk_norm_rope(q, k, *weights_and_tables), v)


def true_gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def true_linear(x, weight, bias, activation):
    out = np.einsum("blc,oc->blo", x, weight) + bias
    return true_gelu_tanh(out) if activation else out


def true_linear_int8(x, weight, weight_scale, bias, activation, rotation):
    assert not rotation
    out = np.empty((*x.shape[:2], len(weight)))
    for b, token in np.ndindex(x.shape[:2]):
        row = x[b, token].astype(np.float32)  # its 8 bits are chosen in fp32
        low, high = min(row.min(), np.float32(0)), max(row.max(), np.float32(0))
        step = high / np.float32(254) - low / np.float32(254)
        zero = -127 - np.rint(low / step)
        q = np.clip(np.rint(row * (np.float32(1) / step)) + zero, -127, 127)
        out[b, token] = np.float64(step) * weight_scale * (weight @ (q - zero)) + bias
    return true_gelu_tanh(out) if activation else out


def true_modulation(vec, weight, bias, chunks):
    out = (silu(vec) @ weight.T + bias)[..., None, :]
    return tuple(np.split(out, chunks, -1))


def true_group_norm_silu(x, weight, bias, num_groups):
    out, size = np.empty_like(x), x.shape[1] // num_groups
    for b, channel in np.ndindex(x.shape[:2]):
        first = channel // size * size
        group = x[b, first : first + size]
        n = (x[b, channel] - group.mean()) / np.sqrt(group.var() + EPS)
        out[b, channel] = silu(n * weight[channel] + bias[channel])
    return out


def true_rows(out):
    """What e4m3 rows stand for, and their scales."""
    return out, np.abs(out).max(-1, keepdims=True) / 448


TRUTHS = {
    "attention": true_attention,
    "attention_lse": true_attention_lse,
    "gated_residual": true_gated_residual,
    "gated_residual_norm_modulate": true_fused,
    "gelu_tanh": true_gelu_tanh,
    "gelu_tanh_fp8": lambda x: true_rows(true_gelu_tanh(x)),
    "group_norm_silu": true_group_norm_silu,
    "joint_qk_norm_rope": true_joint_qk_norm_rope,
    "linear": true_linear,
    "linear_int8": true_linear_int8,
    "modulation": true_modulation,
    "norm_modulate": true_norm_modulate,
    "norm_modulate_fp8": lambda *args: true_rows(true_norm_modulate(*args)),
    "qk_norm_rope": true_qk_norm_rope,
    "qk_norm_rope_": true_in_place,
    "rope_attention": true_rope_attention,
}
FUNCTIONAL = [name for name in CASES if name != "qk_norm_rope_"]
FP8 = ("norm_modulate_fp8", "gelu_tanh_fp8")
DIFFERENTIABLE = [name for name in FUNCTIONAL if name not in ("linear_int8", *FP8)]
KEYWORD_ONLY = ("activation", "rotation")


def call(name: str, args: dict[str, Any], **more: Any) -> tuple[Tensor, ...]:
    """The op's outputs as a tuple; those of the in-place form are the tensors it wrote."""
    keywords = {key: value for key, value in args.items() if key in KEYWORD_ONLY}
    positional = [value for key, value in args.items() if key not in KEYWORD_ONLY]
    out = getattr(ops, name)(*positional, **keywords, **more)
    if name == "qk_norm_rope_":
        assert out is None
        return args["q"], args["k"]
    return out if isinstance(out, tuple) else (out,)


def truth(name: str, args: dict[str, Any]) -> tuple[np.ndarray, ...]:
    wide = [v.double().numpy().copy() if isinstance(v, Tensor) else v for v in args.values()]
    out = TRUTHS[name](*wide)
    return out if isinstance(out, tuple) else (out,)


def assert_agrees(name: str, args: dict[str, Any], dtype: torch.dtype, least: float = 0.0) -> None:
    expected = truth(name, args)
    limits = [LIMITS[dtype]] * len(expected)
    if name in FP8:  # 3 bits behind the point: errors to 1/16, 1/30 on average; scales are fp32
        limits = [4e-2, max(LIMITS[dtype], LIMITS[torch.float32])]
    for got, wanted, limit in zip(readable(call(name, args)), expected, limits, strict=True):
        assert_accurate(got, wanted, limit, least)


def assert_accurate(out: Tensor, expected: np.ndarray, limit: float, least: float = 0.0) -> None:
    """Relative to the result, or to `least` an element where that is more."""
    assert tuple(out.shape) == expected.shape
    error = np.linalg.norm(out.detach().double().numpy() - expected)
    assert error <= limit * max(np.linalg.norm(expected), least * expected.size**0.5)


def differentiable(args: dict[str, Any]) -> dict[str, Any]:
    """Leaves with the same values and strides, which need a gradient; cos and sin do not."""
    return {
        name: value.detach().requires_grad_()
        if isinstance(value, Tensor) and name not in ("cos", "sin")
        else value
        for name, value in args.items()
    }


# every op


def test_every_public_op_has_a_case_and_a_truth():
    others = {"BACKENDS", "Backend", "Call", "Choice", "compiled_kernels", "explain", "names"}
    others |= {"record", "register", "tile_candidates", "use_backend", "why_not"}
    others |= {"quantize_int8", "timestep_embedding"}
    assert set(CASES) == set(TRUTHS) == set(ops.__all__) - others


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_op_agrees_with_its_formula(name: str, dtype: torch.dtype):
    assert_agrees(name, make(name, Sizes(), dtype), dtype)


@pytest.mark.parametrize("size", TEST_SIZES)
@pytest.mark.parametrize("name", CASES)
def test_op_takes_any_size(name: str, size: str):
    # terms of order one may cancel where a result is a single element
    assert_agrees(name, make(name, TEST_SIZES[size], torch.float32), torch.float32, least=0.1)


@pytest.mark.parametrize("name", CASES)
def test_outputs_keep_the_dtype_and_lse_is_wide(name: str):
    out = call(name, make(name, TINY, torch.bfloat16))
    expected = [torch.bfloat16] * len(out)
    if name == "attention_lse":
        expected[1] = torch.float32
    if name in FP8:
        expected = [torch.float8_e4m3fn, torch.float32]
    assert [t.dtype for t in out] == expected


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_op_leaves_its_inputs_unwritten(name: str):
    args = make(name, Sizes(), torch.float32)
    before = {key: v.clone() for key, v in args.items() if isinstance(v, Tensor)}
    call(name, args)
    for key, value in before.items():
        assert torch.equal(args[key], value), key


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_agree_with_finite_differences(name: str):
    args = differentiable(make(name, TINY, torch.float64))
    leaves = {key: v for key, v in args.items() if isinstance(v, Tensor) and v.requires_grad}

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        return call(name, {**args, **dict(zip(leaves, values, strict=True))})

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


def gradients(out: tuple[Tensor, ...], args: dict[str, Any]) -> list[Tensor]:
    leaves = [v for v in args.values() if isinstance(v, Tensor) and v.requires_grad]
    return list(torch.autograd.grad(sum(t.square().sum() for t in out), leaves))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_compiled_op_equals_eager(name: str):
    args = differentiable(make(name, Sizes(), torch.float32))
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    out, expected = ([*o, *gradients(o, args)] for o in (compiled(name, args), call(name, args)))
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


def test_compiled_in_place_form_equals_eager():
    args = make("qk_norm_rope_", Sizes(), torch.float32)
    same = args | {"q": args["q"].clone(), "k": args["k"].clone()}
    torch._dynamo.reset()
    torch.compile(call, fullgraph=True, backend="aot_eager")("qk_norm_rope_", same)
    call("qk_norm_rope_", args)
    torch.testing.assert_close(same, args, rtol=1e-6, atol=1e-6)


# what an op refuses


def tensor_arguments(*, first: bool = False) -> list[tuple[str, str]]:
    """(op, argument) for each tensor argument, but the first, which the others are held against."""
    return [
        (name, argument)
        for name in CASES
        for i, (argument, value) in enumerate(make(name, TINY, torch.float32).items())
        if isinstance(value, Tensor) and (i == 0) == first
    ]


def refusal(name: str, **changed: Any) -> str:
    """Of a wrong call that follows a right one, whose kernel is then known for this dtype."""
    call(name, make(name, Sizes(), torch.float32))
    args = {**make(name, Sizes(), torch.float32), **changed}
    with pytest.raises(ValueError) as error:
        call(name, args)
    assert "\n" not in str(error.value)
    return str(error.value)


def good(name: str, argument: str) -> Tensor:
    return make(name, Sizes(), torch.float32)[argument]


@pytest.mark.parametrize("name, argument", tensor_arguments())
def test_a_wrong_width_is_refused_by_name_with_both_shapes(name: str, argument: str):
    value = good(name, argument)
    bad = torch.cat((value, value[..., :1]), -1)
    message = refusal(name, **{argument: bad})
    assert message.startswith(f"{argument} must be ")
    assert message.endswith(f"got {list(bad.shape)}")
    assert str(value.shape[-1]) in message.split("got")[0]


@pytest.mark.parametrize("name, argument", tensor_arguments())
def test_a_wrong_rank_is_refused_by_name_with_the_shape(name: str, argument: str):
    bad = good(name, argument)[None, None, None]
    message = refusal(name, **{argument: bad})
    assert message.startswith(f"{argument} must be ")
    assert message.endswith(f"got {list(bad.shape)}")


@pytest.mark.parametrize("name, argument", tensor_arguments())
def test_a_wrong_dtype_is_refused_by_name_with_both_dtypes(name: str, argument: str):
    if (name, argument) == ("linear_int8", "weight"):
        message = refusal(name, weight=good(name, argument).double())
        expected = "weight must be torch.int8, got torch.float64"
    elif argument in ("cos", "sin", "weight_scale"):
        message = refusal(name, **{argument: good(name, argument).bfloat16()})
        expected = f"{argument} must be torch.float32 or torch.float64, got torch.bfloat16"
    else:
        message = refusal(name, **{argument: good(name, argument).double()})
        expected = rf"{argument} must have the dtype of \w+, torch.float32, got torch.float64"
    assert re.fullmatch(expected, message)


@pytest.mark.parametrize("name, argument", tensor_arguments())
def test_another_device_is_refused_by_name_with_both_devices(name: str, argument: str):
    message = refusal(name, **{argument: good(name, argument).to("meta")})
    assert re.fullmatch(rf"{argument} must be on the device of \w+, cpu, got meta", message)


@pytest.mark.parametrize("name, argument", tensor_arguments(first=True))
def test_integers_are_refused(name: str, argument: str):
    message = refusal(name, **{argument: good(name, argument).long()})
    assert message == f"{argument} must be floating point, got torch.int64"


@pytest.mark.parametrize(
    "name, argument",
    [
        (name, argument)
        for name, argument in tensor_arguments() + tensor_arguments(first=True)
        if name != "linear"  # torch takes any strides there
        and argument not in ("cos", "sin")
        and (name, argument) not in (("group_norm_silu", "x"), ("modulation", "vec"))
    ],
)
def test_a_last_axis_with_gaps_is_refused(name: str, argument: str):
    value = good(name, argument)
    message = refusal(name, **{argument: torch.stack((value, value), -1)[..., 0]})
    assert message == f"{argument} must be contiguous on its last axis, got stride 2"


REFUSED = [
    (
        "norm_modulate",
        {"x": torch.zeros(2, 37)},
        "x must be [B, L, C] = [any, any, any], got [2, 37]",
    ),
    (
        "norm_modulate",
        {"scale": torch.zeros(3, 37)},
        "scale must be [B, S, C] or [B, C] = [2, 1, 37], got [3, 1, 37]",
    ),
    (
        "gated_residual",
        {"gate": torch.zeros(2, 8, 37)},
        "gate must be [B, S, C] or [B, C] = [2, 1, 37], got [2, 8, 37]",
    ),
    (
        "norm_modulate",
        {"scale": torch.zeros(2, 1, 37)},
        "shift must be [B, S, C] or [B, C] = [2, 1, 37], got [2, 2, 37]",
    ),
    (
        "gated_residual",
        {"gate": torch.zeros(2, 1, 37)},
        "txt_len must be 0 where vectors have one stream, S = 1, got 3",
    ),
    (
        "gated_residual",
        {"y": torch.zeros(2, 1, 37)},
        "y must be the shape of x = [2, 8, 37], got [2, 1, 37]",
    ),
    *(
        (
            name,
            {"txt_len": txt_len},
            f"txt_len must be between 0 and the tokens of {first}, 8, got {txt_len}",
        )
        for name in CASES
        if "txt_len" in (args := make(name, TINY, torch.float32))
        for first in [next(iter(args))]
        for txt_len in (-1, 9)
    ),
    (
        "attention",
        {"q": torch.zeros(2, 8, 10)},
        "q must be [B, L, H, D] = [any, any, any, any], got [2, 8, 10]",
    ),
    (
        "attention",
        {"v": torch.zeros(2, 7, 3, 10)},
        "v must be [B, L, H, D] of k = [2, 8, 3, 10], got [2, 7, 3, 10]",
    ),
    (
        "attention_lse",
        {"k": torch.zeros(2, 8, 4, 10)},
        "k must be [B, L, H, D] of q = [2, any, 3, 10], got [2, 8, 4, 10]",
    ),
    (
        "qk_norm_rope",
        {"cos": torch.zeros(9, 5)},
        "cos must be [L, D/2] = [8, 5], got [9, 5]",
    ),
    (
        "joint_qk_norm_rope",
        {"sin": torch.zeros(5, 5)},
        "sin must be [L, D/2] = [8, 5], got [5, 5]",
    ),
    (
        "qk_norm_rope",
        {
            "q": torch.zeros(2, 8, 3, 9),
            "k": torch.zeros(2, 8, 3, 9),
            "q_weight": torch.zeros(9),
            "k_weight": torch.zeros(9),
        },
        "the head dim of q must be even, got 9",
    ),
    (
        "linear",
        {"activation": "relu"},
        "activation must be one of (None, 'gelu_tanh'), got 'relu'",
    ),
    ("modulation", {"chunks": 4}, "chunks must divide the rows of weight, 222, got 4"),
    ("modulation", {"chunks": 0}, "chunks must divide the rows of weight, 222, got 0"),
    ("modulation", {"vec": torch.zeros(7)}, "vec must be [B, Cin] or [S, B, Cin], got [7]"),
    ("group_norm_silu", {"num_groups": 5}, "num_groups must divide the channels of x, 12, got 5"),
    ("group_norm_silu", {"num_groups": 0}, "num_groups must divide the channels of x, 12, got 0"),
    (
        "group_norm_silu",
        {"x": torch.zeros(9, 5, 7)},
        "x must be [B, C, H, W] = [any, any, any, any], got [9, 5, 7]",
    ),
]


@pytest.mark.parametrize("name, changed, expected", REFUSED)
def test_a_wrong_argument_is_refused_with_both_values(name: str, changed: dict, expected: str):
    assert refusal(name, **changed) == expected


@pytest.mark.parametrize("name", CASES)
def test_an_unknown_backend_is_refused(name: str):
    with pytest.raises(ValueError, match=r"backend must be one of .*reference.*, got 'rocm'"):
        call(name, make(name, TINY, torch.float32), backend="rocm")


@pytest.mark.parametrize("name", CASES)
def test_a_backend_that_cannot_run_says_why_for_every_backend(name: str):
    args = make(name, TINY, torch.float32)
    (choice,) = ops.explain(name)
    assert choice.reasons["reference"] is None
    refused = {
        b for b, reason in choice.reasons.items() if reason and "only when named" not in reason
    }
    assert refused
    for backend in refused:
        with pytest.raises(NotImplementedError) as error:
            call(name, args, backend=backend)
        assert str(error.value).startswith(f"{name} cannot run on {backend} (")
        for other, reason in choice.reasons.items():
            assert f"{other}: {reason or 'can run'}" in str(error.value)


# modulate, gate


def test_zero_scale_and_shift_is_plain_layer_norm():
    x = Maker(Sizes(), torch.float64).tokens()
    zero = torch.zeros(2, 37, dtype=torch.float64)
    out = ops.norm_modulate(x, zero, zero)
    torch.testing.assert_close(out.mean(-1), torch.zeros(2, 8, dtype=torch.float64))
    expected = x.var(-1, correction=0) / (x.var(-1, correction=0) + EPS)
    torch.testing.assert_close(out.var(-1, correction=0), expected)


@pytest.mark.parametrize("name", ["gated_residual", "gated_residual_norm_modulate"])
def test_zero_gate_returns_the_residual(name: str):
    args = make(name, Sizes(), torch.bfloat16)
    args["gate"] = torch.zeros_like(args["gate"])
    assert torch.equal(call(name, args)[0], args["x"])


def test_zero_text_gate_returns_only_the_text_residual():
    args = make("gated_residual", Sizes(), torch.float32)
    args["gate"] = torch.stack((torch.zeros(2, 37), args["gate"][:, 1]), 1)
    out = ops.gated_residual(*args.values())
    assert torch.equal(out[:, :3], args["x"][:, :3])
    assert not torch.isclose(out[:, 3:], args["x"][:, 3:]).all(-1).any()


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_fused_form_equals_the_composition(dtype: torch.dtype):
    args = make("gated_residual_norm_modulate", Sizes(), dtype)
    x_new, h = ops.gated_residual_norm_modulate(*args.values())
    assert torch.equal(x_new, ops.gated_residual(args["x"], args["y"], args["gate"], 3))
    expected = ops.norm_modulate(x_new, args["scale"], args["shift"], 3)
    assert_accurate(h, expected.double().numpy(), LIMITS[dtype])


@pytest.mark.parametrize(
    "name", ["norm_modulate", "gated_residual", "gated_residual_norm_modulate"]
)
def test_two_streams_are_each_by_itself(name: str):
    args = make(name, Sizes(), torch.float32)
    joint = call(name, args)
    for stream, rows in enumerate((slice(3), slice(3, None))):
        apart = {
            key: value[:, rows] if key in ("x", "y") else value[:, stream]
            for key, value in args.items()
            if key != "txt_len"
        }
        for out, expected in zip(call(name, apart), joint, strict=True):
            assert torch.equal(out, expected[:, rows])


def test_a_vector_that_both_streams_share_is_expanded_and_its_gradient_is_the_sum():
    x, y = (Maker(Sizes(), torch.float64).tokens() for _ in range(2))
    gate = normal(2, 1, 37, dtype=torch.float64).requires_grad_()
    out = ops.gated_residual(x, y, gate.expand(-1, 2, -1), 3)
    assert torch.equal(out, ops.gated_residual(x, y, gate))
    (found,) = torch.autograd.grad(out.sum(), gate)
    torch.testing.assert_close(found, y.sum(1, keepdim=True))


def test_eps_is_added_to_the_variance():
    x = torch.tensor([[[-1.0, 1.0]]], dtype=torch.float64)
    out = ops.norm_modulate(x, torch.zeros_like(x), torch.zeros_like(x), eps=3.0)
    torch.testing.assert_close(out, x / 2)


# norm and rotate


def positions(*values: float) -> tuple[Tensor, Tensor]:
    omega = 10000.0 ** (-torch.arange(5, dtype=torch.float64) / 5)
    return tables(torch.tensor(values, dtype=torch.float64)[:, None] * omega)


def unit_weights() -> tuple[Tensor, Tensor]:
    return torch.ones(10, dtype=torch.float64), torch.ones(10, dtype=torch.float64)


def test_position_zero_is_the_identity_after_the_norm():
    q, k, _ = Maker(Sizes(), torch.float64).qkv(2)
    for out, x in zip(
        ops.qk_norm_rope(q, k, *unit_weights(), *positions(0, 0)), (q, k), strict=True
    ):
        torch.testing.assert_close(out, x / (x.square().mean(-1, keepdim=True) + EPS).sqrt())


def test_rotation_preserves_the_norm_of_every_pair():
    q, k, _ = Maker(Sizes(), torch.float64).qkv(2)
    turned = ops.qk_norm_rope(q, k, *unit_weights(), *positions(17, 4095))
    still = ops.qk_norm_rope(q, k, *unit_weights(), *positions(0, 0))
    for out, expected in zip(turned, still, strict=True):
        pairs = (t.unflatten(-1, (5, 2)).norm(dim=-1) for t in (out, expected))
        torch.testing.assert_close(*pairs, rtol=1e-6, atol=0)
        assert not torch.isclose(out, expected).all(-1).any()


def test_a_quarter_turn_maps_even_channels_to_odd_ones():
    q = torch.arange(1.0, 5.0, dtype=torch.float64).reshape(1, 1, 1, 4)
    cos, sin = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    one = torch.ones(4, dtype=torch.float64)
    out, _ = ops.qk_norm_rope(q, q, one, one, cos, sin)
    expected = torch.tensor([-2.0, 1.0, 3.0, 4.0], dtype=torch.float64) / (7.5 + EPS) ** 0.5
    torch.testing.assert_close(out.flatten(), expected)


def test_scores_depend_on_the_distance_of_positions_alone():
    q, k, _ = Maker(Sizes(), torch.float64).qkv(2)

    def scores(*at: float) -> Tensor:
        new_q, new_k = ops.qk_norm_rope(q, k, *unit_weights(), *positions(*at))
        return torch.einsum("bhd,bhd->bh", new_q[:, 0], new_k[:, 1])

    torch.testing.assert_close(scores(3, 11), scores(103, 111), rtol=0, atol=1e-5)
    assert (scores(3, 11) - scores(3, 12)).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_joint_form_equals_the_streams_apart(dtype: torch.dtype):
    args = make("joint_qk_norm_rope", Sizes(), dtype)
    q, k, v = ops.joint_qk_norm_rope(*args.values())
    for stream, part in (("txt", slice(None, 3)), ("img", slice(3, None))):
        names = (f"{stream}_{name}" for name in ("q", "k", "q_weight", "k_weight"))
        apart = ops.qk_norm_rope(*(args[n] for n in names), args["cos"][part], args["sin"][part])
        assert torch.equal(q[:, part], apart[0])
        assert torch.equal(k[:, part], apart[1])
        assert torch.equal(v[:, part], args[f"{stream}_v"])


@pytest.mark.parametrize("txt_len", [0, 3, 8])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_in_place_form_writes_the_bits_of_the_functional_form(dtype: torch.dtype, txt_len: int):
    args = make("qk_norm_rope_", Sizes(), dtype) | {"txt_len": txt_len}
    q, k, v = normal(2, 8, 90, dtype=dtype).unflatten(-1, (3, 3, 10)).unbind(2)
    v_before = v.clone()
    streams = (t[:, rows] for rows in (slice(txt_len), slice(txt_len, None)) for t in (q, k, v))
    middle = [value for name, value in args.items() if name not in ("q", "k", "txt_len")]
    expected = ops.joint_qk_norm_rope(*streams, *middle)
    ops.qk_norm_rope_(q, k, *middle, txt_len)
    for out, wanted in zip((q, k, v), (*expected[:2], v_before), strict=True):
        assert torch.equal(out, wanted)


@pytest.mark.parametrize("argument", ["q", "k", *Maker(TINY, torch.float32).stream_weights()])
def test_in_place_form_refuses_an_input_that_needs_a_gradient(argument: str):
    args = make("qk_norm_rope_", Sizes(), torch.float32)
    args[argument] = args[argument].detach().requires_grad_()
    before = args["q"].detach().clone()
    with pytest.raises(ValueError, match="requires_grad=True, expected False"):
        call("qk_norm_rope_", args)
    assert torch.equal(args["q"], before)
    with torch.no_grad():
        call("qk_norm_rope_", args)
    assert not torch.equal(args["q"], before)


# attention


@pytest.mark.parametrize("name", ["attention", "attention_lse"])
def test_one_key_returns_its_value(name: str):
    args = make("attention", Sizes(txt=0, img=6), torch.float32)
    args["k"], args["v"] = args["k"][:, :1], args["v"][:, :1]
    torch.testing.assert_close(call(name, args)[0], args["v"].expand(2, 6, 3, 10))


def test_order_of_the_keys_does_not_matter():
    q, k, v = make("attention", Sizes(), torch.float64).values()
    order = torch.randperm(8)
    torch.testing.assert_close(ops.attention(q, k[:, order], v[:, order]), ops.attention(q, k, v))


def test_large_scores_do_not_overflow():
    args = make("attention", Sizes(), torch.float32)
    args["q"] = args["q"] * 1e4
    for name in ("attention", "attention_lse"):
        for out, expected in zip(call(name, args), truth(name, args), strict=True):
            assert_accurate(out, expected, 1e-2)


def test_lse_merges_two_halves_of_the_keys_into_the_whole():
    q, k, v = make("attention", Sizes(), torch.float64).values()
    (left, left_lse), (right, right_lse) = (
        ops.attention_lse(q, k[:, part], v[:, part]) for part in (slice(3), slice(3, None))
    )
    out, lse = ops.attention_lse(q, k, v)
    torch.testing.assert_close(torch.logaddexp(left_lse, right_lse), lse)
    merged = (left_lse - lse).exp()[..., None] * left + (right_lse - lse).exp()[..., None] * right
    torch.testing.assert_close(merged, out)


def test_lse_of_equal_keys_grows_by_the_natural_logarithm_of_their_number():
    q, k, v = make("attention", Sizes(txt=0, img=8), torch.float64).values()
    k = k[:, :1].expand(-1, 8, -1, -1)
    _, lse = ops.attention_lse(q, k, v)
    score = torch.einsum("blhd,bhd->blh", q, k[:, 0]) / 10**0.5
    torch.testing.assert_close(lse, score + math.log(8))


def test_rope_attention_equals_its_steps():
    args = make("rope_attention", Sizes(), torch.float32)
    q, k = ops.qk_norm_rope(*(v for name, v in args.items() if name != "v"))
    torch.testing.assert_close(ops.rope_attention(*args.values()), ops.attention(q, k, args["v"]))


# linear, modulation, activations, embedding


def test_linear_without_activation_or_bias_is_a_product():
    x, weight = normal(2, 3, 4, dtype=torch.float64), normal(5, 4, dtype=torch.float64)
    torch.testing.assert_close(ops.linear(x, weight), torch.einsum("blc,oc->blo", x, weight))
    torch.testing.assert_close(ops.linear(x[0, 0], weight), weight @ x[0, 0])


def test_linear_with_activation_is_gelu_tanh_of_the_linear():
    x, weight, bias, _ = make("linear", Sizes(), torch.float32).values()
    expected = ops.gelu_tanh(ops.linear(x, weight, bias))
    torch.testing.assert_close(ops.linear(x, weight, bias, activation="gelu_tanh"), expected)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("batch", [0, 1, 2])
@pytest.mark.parametrize("activation", [None, "gelu_tanh"])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_linear_into_rows_of_a_longer_tensor_has_the_bits_of_a_new_one(
    dtype: torch.dtype, activation: str | None, batch: int, backend: str | None
):
    joint = torch.full((batch, 9, 8), 7.0, dtype=dtype)
    x, bias = normal(batch, 9, 6, dtype=dtype), normal(8, dtype=dtype)
    weight = normal(8, 11, dtype=dtype)[:, 3:9]  # columns of a longer weight
    rows, more = slice(2, 7), {"activation": activation, "backend": backend}
    out = ops.linear(x[:, rows], weight, bias, out=joint[:, rows], **more)
    assert out.data_ptr() == joint[:, rows].data_ptr()
    assert torch.equal(out, ops.linear(x[:, rows], weight, bias, **more))
    assert (joint[:, :2] == 7).all() and (joint[:, 7:] == 7).all()


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_two_products_added_are_the_product_of_the_joined_rows(
    dtype: torch.dtype, backend: str | None
):
    x, weight, bias = (
        normal(2, 3, 7, dtype=dtype),
        normal(5, 7, dtype=dtype),
        normal(5, dtype=dtype),
    )
    out = torch.full((2, 3, 5), float("nan"), dtype=dtype)
    ops.linear(x[..., :4], weight[:, :4], bias, out=out, backend=backend)
    ops.linear(x[..., 4:], weight[:, 4:], out=out, add=True, backend=backend)
    truth = true_linear(*(t.double().numpy() for t in (x, weight, bias)), None)
    assert_accurate(out, truth, LIMITS[dtype])


@pytest.mark.parametrize(
    "changed, expected",
    [
        ({"out": (2, 3, 4)}, r"out must be [..., Cout] = [2, 3, 5], got [2, 3, 4]"),
        ({"bias": (5,), "add": True}, "add must come with out and without bias and activation"),
        ({"out": None, "add": True}, "add must come with out and without bias and activation"),
        ({"activation": "gelu_tanh", "add": True}, "add must come with out and without"),
    ],
)
def test_linear_refuses_an_out_that_does_not_fit(changed: dict[str, Any], expected: str):
    given = {"x": (2, 3, 7), "weight": (5, 7), "out": (2, 3, 5)} | changed
    args = {k: torch.zeros(v) if isinstance(v, tuple) else v for k, v in given.items()}
    with pytest.raises(ValueError, match=re.escape(expected)):
        ops.linear(**args)


@pytest.mark.parametrize("argument", ["x", "weight", "bias"])
def test_linear_into_out_refuses_an_input_that_needs_a_gradient(argument: str):
    args = {name: torch.ones(s) for name, s in (("x", (2, 3, 7)), ("weight", (5, 7)), ("bias", 5))}
    out = torch.zeros(2, 3, 5)
    args[argument].requires_grad_()
    with pytest.raises(ValueError, match=f"{argument} has requires_grad=True, expected False"):
        ops.linear(**args, out=out)
    assert not out.any()
    with torch.no_grad():
        assert (ops.linear(**args, out=out) == 8).all()


def test_linear_into_out_obeys_torchs_contract_and_compiles():
    x, weight, bias = torch.randn(2, 9, 6), torch.randn(8, 6), torch.randn(8)
    for activation, add in ((None, False), ("gelu_tanh", False), (None, True)):
        args = (x, weight, None if add else bias, activation, add, None)
        torch_library.opcheck(torch.ops.fluxkern.linear_.default, (torch.zeros(2, 9, 8), *args))

    def run(x: Tensor) -> Tensor:
        out = x.new_empty((2, 9, 8))
        ops.linear(x[:, :4], weight, bias, activation="gelu_tanh", out=out[:, :4])
        ops.linear(x[:, 4:], weight, bias, out=out[:, 4:])
        ops.linear(x, weight, out=out, add=True)
        return out

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), run(x))


@pytest.mark.parametrize("lead", [(2,), (4, 2)], ids=["one vector", "a schedule"])
@pytest.mark.parametrize("chunks", [2, 3, 6])
def test_modulation_returns_views_of_one_tensor(chunks: int, lead: tuple[int, ...]):
    vec, weight = normal(*lead, 7, dtype=torch.float64), normal(chunks * 5, 7, dtype=torch.float64)
    out = ops.modulation(vec, weight, None, chunks)
    assert len(out) == chunks
    for i, chunk in enumerate(out):
        assert chunk.shape == (*lead, 1, 5)
        assert chunk.stride(len(lead) - 1) == chunks * 5
        assert chunk.data_ptr() == out[0].data_ptr() + i * 5 * chunk.element_size()
        expected = silu(vec.numpy()) @ weight[5 * i : 5 * (i + 1)].numpy().T
        assert_accurate(chunk.squeeze(-2), expected, 1e-14)


def test_a_whole_schedule_equals_its_steps_one_by_one():
    vec, weight, bias = (normal(*s, dtype=torch.float32) for s in ((4, 2, 7), (15, 7), (15,)))
    table = ops.modulation(vec, weight, bias, 3)
    for step in range(4):
        for row, expected in zip(table, ops.modulation(vec[step], weight, bias, 3), strict=True):
            torch.testing.assert_close(row[step], expected)


def test_gelu_tanh_keeps_any_shape():
    for shape in ((), (0,), (3,), (2, 3, 4, 5)):
        assert ops.gelu_tanh(torch.ones(shape)).shape == shape


def test_group_norm_takes_channels_last():
    args = make("group_norm_silu", Sizes(), torch.float32)
    expected = ops.group_norm_silu(*args.values())
    args["x"] = args["x"].contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ops.group_norm_silu(*args.values()), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_timestep_embedding_is_cosines_then_sines(dtype: torch.dtype):
    t = torch.tensor([0.0, 0.25, 0.5, 1.0]).to(dtype)  # exact, and so are their thousands
    angle = 1000 * t.double().numpy()[:, None] * 10000.0 ** (-np.arange(0, 128) / 128)
    out = ops.timestep_embedding(t, 256)
    assert out.dtype == dtype
    # fp32 frequencies: an angle of 1000 is right to 1e-4
    assert_accurate(out[:, :128], np.cos(angle), 1e-4 + LIMITS[dtype])
    assert_accurate(out[:, 128:], np.sin(angle), 1e-4 + LIMITS[dtype])


@pytest.mark.parametrize("dtype, angle", [(torch.bfloat16, 3504), (torch.float32, 3500)])
def test_guidance_rounds_in_its_own_dtype(dtype: torch.dtype, angle: int):
    out = ops.timestep_embedding(torch.tensor([3.5], dtype=dtype), 2)
    expected = np.array([[math.cos(angle), math.sin(angle)]])
    assert_accurate(out, expected, LIMITS[dtype] + 1e-5)


@pytest.mark.parametrize(
    "t, dim, expected",
    [
        (torch.zeros(2, 1), 8, "t must be [B] = [any], got [2, 1]"),
        (torch.zeros(2, dtype=torch.int64), 8, "t must be floating point, got torch.int64"),
        (torch.zeros(2), 7, "dim must be even and positive, got 7"),
        (torch.zeros(2), 0, "dim must be even and positive, got 0"),
    ],
)
def test_timestep_embedding_refuses(t: Tensor, dim: int, expected: str):
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        ops.timestep_embedding(t, dim)


# a wrong call after a right one


def not_dense(t: Tensor) -> dict[str, Any]:
    """By what it is, all of the type torch.Tensor but the last two."""
    several = t if t.ndim > 1 else t[None]
    with warnings.catch_warnings(action="ignore"):  # quantised and nested ones are to go
        return {
            "sparse": t.clone().to_sparse(),
            "compressed": several.flatten(0, -2).to_sparse_csr(),
            "quantised": torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
            "nested": torch.nested.nested_tensor([one.clone() for one in several]),
            "none": None,
            "array": t.float().numpy(),
        }


@pytest.mark.parametrize("kind", ["sparse", "compressed", "quantised", "nested", "none", "array"])
@pytest.mark.parametrize("name, argument", tensor_arguments())
def test_what_is_not_a_dense_tensor_is_refused_by_name_after_a_right_call(
    name: str, argument: str, kind: str
):
    args = make(name, TINY, torch.float32)
    call(name, dict(args))
    wrong = not_dense(args[argument])[kind]
    if wrong is None and argument == "bias" and name != "group_norm_silu":
        pytest.skip("may be None")
    with pytest.raises(TypeError, match=f"^{argument} must be a (dense )?tensor, got"):
        call(name, args | {argument: wrong})


@pytest.mark.parametrize("name, argument", tensor_arguments())
def test_a_wrong_rank_is_refused_by_name_after_a_right_call(name: str, argument: str):
    args = make(name, TINY, torch.float32)
    call(name, dict(args))
    if name.startswith("gelu_tanh"):
        pytest.skip("takes any rank")
    with pytest.raises(ValueError, match=f"^{argument} must be "):
        call(name, args | {argument: args[argument].new_zeros(())})


@pytest.mark.parametrize("name", ["qk_norm_rope", "joint_qk_norm_rope", "rope_attention"])
def test_fp64_tables_are_taken_after_fp32_ones(name: str):
    args = make(name, TINY, torch.float32)
    expected = call(name, args)
    wide = call(name, args | {"cos": args["cos"].double(), "sin": args["sin"].double()})
    for o, e in zip(wide, expected, strict=True):
        torch.testing.assert_close(o, e)


def test_modulation_refuses_a_vec_with_gaps_on_every_backend():
    args = make("modulation", TINY, torch.float32)
    wide = args["vec"].repeat_interleave(2, -1)[..., ::2]
    for backend in ("reference", None):
        with pytest.raises(ValueError, match=r"^vec must be contiguous on its last axis, got"):
            call("modulation", args | {"vec": wide}, backend=backend)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (5, 0), (4,)], ids=str)
@pytest.mark.parametrize("activation", [None, "gelu_tanh"])
def test_gradients_of_a_linear_of_any_rank_and_of_nothing(shape: tuple, activation: str | None):
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(3, shape[-1]).requires_grad_()
    bias = torch.randn(3, requires_grad=True)
    found = torch.autograd.grad(
        ops.linear(x, weight, bias, activation=activation).sum(), (x, weight, bias)
    )
    expected = torch.autograd.grad(
        reference.linear(x, weight, bias, activation).sum(), (x, weight, bias)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("calls", [0, 1])
@pytest.mark.parametrize("other", ["k", "txt_q_weight", "img_k_weight", "cos", "sin"])
@pytest.mark.parametrize("written", ["q", "k"])
def test_in_place_form_refuses_operands_that_share_memory(written: str, other: str, calls: int):
    args = make("qk_norm_rope_", TINY, torch.float32)
    for _ in range(calls):
        call("qk_norm_rope_", dict(args))
    if written == other:
        other = "q"
    args[written] = args[written].contiguous()
    shape = args[other].shape
    args[other] = args[written].flatten()[: shape.numel()].view(shape)
    with pytest.raises(ValueError, match=r"must not overlap"):
        call("qk_norm_rope_", args)


def test_q_and_k_that_are_the_same_rows_of_a_projection_are_refused_after_a_right_call():
    args = make("qk_norm_rope_", TINY, torch.float32)
    call("qk_norm_rope_", dict(args))
    with pytest.raises(ValueError, match=r"^q must not overlap k, got memory of both"):
        call("qk_norm_rope_", args | {"k": args["q"]})


@pytest.mark.parametrize("calls", [0, 1])
@pytest.mark.parametrize("argument", ["x", "weight_scale", "bias"])
def test_linear_int8_refuses_an_out_that_overlaps_an_input(argument: str, calls: int):
    weight, weight_scale = ops.quantize_int8(torch.randn(8, 8))
    args = {"x": torch.randn(8, 8), "weight": weight, "weight_scale": weight_scale}
    args["bias"] = torch.randn(8)
    for _ in range(calls):
        ops.linear_int8(**args, out=torch.empty(8, 8))
    out = torch.ones(8, 8)
    args[argument] = out if argument == "x" else out[2]
    with pytest.raises(ValueError, match=rf"^out must not overlap {argument}, got memory of both"):
        ops.linear_int8(**args, out=out)


@pytest.mark.parametrize("calls", [0, 1])
def test_a_parameter_that_is_written_over_its_own_input_is_refused(calls: int):
    x, weight = torch.nn.Parameter(torch.randn(64, 8)), torch.randn(8, 8)
    with torch.no_grad():
        for _ in range(calls):
            ops.linear(x, weight, out=torch.nn.Parameter(torch.empty(64, 8)))
        with pytest.raises(ValueError, match=r"^out must not overlap x, got memory of both"):
            ops.linear(x, weight, out=x)


@pytest.mark.parametrize("calls", [0, 1])
@pytest.mark.parametrize("value", [None, 1.0, "1"], ids=repr)
@pytest.mark.parametrize(
    "name, argument",
    [
        (n, a)
        for n in CASES
        for a in ("txt_len", "num_groups", "chunks")
        if a in make(n, TINY, torch.float32)
    ],
)
def test_what_is_no_integer_is_refused_by_name(name: str, argument: str, value: Any, calls: int):
    args = make(name, TINY, torch.float32)
    for _ in range(calls):
        call(name, dict(args))
    expected = f"^{argument} must be an integer, got {type(value).__name__}$"
    with pytest.raises(TypeError, match=expected):
        call(name, args | {argument: value})
    call(name, args | {argument: np.int64(args[argument])})

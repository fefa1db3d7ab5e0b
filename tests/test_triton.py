"""What the contract does not reach of the Triton kernels on a machine without a GPU."""

from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import triton_interpreter

from fluxkern import ops, reference
from fluxkern.cases import CASES, Maker, Sizes
from fluxkern.kernels import _rows
from fluxkern.kernels import attention as kernels
from fluxkern.testing import assert_accurate, gradients, outputs

triton_interpreter.install()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="TMA needs its architecture")


def heads(length: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """q, k, v [1, length, 2, 16] of one projection, as a descriptor takes them."""
    packed = torch.randn(1, length, 3 * 2 * 16, dtype=torch.float64).to(dtype)
    return packed.unflatten(-1, (3, 2, 16)).unbind(2)


def spied_configurations(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What attention's kernels are launched with, as it is launched."""
    taken, real = [], kernels.sources

    def spy(kernel: str, config: dict[str, Any], *tiles: Any) -> list:
        inputs = real(kernel, config, *tiles)
        taken.append(config)
        return inputs

    monkeypatch.setattr(kernels, "sources", spy)
    return taken


@interpreted
@pytest.mark.parametrize("architecture", [90, 100, 120])
def test_attention_by_tma_equals_the_reference(architecture: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "architecture", lambda: architecture)
    taken = spied_configurations(monkeypatch)
    inputs = [t.requires_grad_() for t in heads(150, torch.bfloat16)]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    out, own = ops.attention(*inputs, backend="triton"), reference.attention(*inputs)
    truth = reference.attention(*wide)
    assert_accurate(out.detach(), truth.detach(), own.detach())
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, dout)
    own = torch.autograd.grad(own, inputs, dout)
    for name, found, exact, plain in zip(
        "qkv", grads, torch.autograd.grad(truth, wide, dout.double()), own, strict=True
    ):
        assert_accurate(found, exact, plain, f"d{name}")
    assert [config["TMA"] for config in taken] == [True, architecture != 120, architecture != 120]


@pytest.mark.parametrize(
    "view, taken",
    [
        (lambda t: t, True),
        (lambda t: t[:, 1:], True),
        (lambda t: t[..., 1:], False),  # pointer
        (lambda t: t[..., :15], True),
        (lambda t: torch.empty(1, 8, 2, 15, dtype=t.dtype), False),  # strides
        (lambda t: t.expand(3, -1, -1, -1), False),  # batch stride 0
    ],
    ids=["whole", "later token", "odd column", "narrow", "odd width", "expanded"],
)
def test_tma_is_taken_only_where_a_descriptor_can_be_made(view, taken: bool):
    t = view(torch.empty(1, 8, 2, 16, dtype=torch.bfloat16))
    assert kernels.takes_tma(t) is taken


@interpreted
@pytest.mark.parametrize("op", ["attention", "rope_attention"])
def test_a_tile_is_taken_by_name_and_an_unknown_name_is_the_default(
    op: str, monkeypatch: pytest.MonkeyPatch
):
    taken = spied_configurations(monkeypatch)
    args = CASES[op].inputs(Maker(Sizes(1, 30, 70, heads=2, head_dim=16), torch.bfloat16))
    truth = getattr(reference, op)(**{name: t.double() for name, t in args.items()})
    own = getattr(reference, op)(**args)
    launch = getattr(import_module(f"fluxkern.kernels.{op}"), op)
    for tile in ("128x32 8w 3s", "512x512 4w 9s", None):
        out = torch.full_like(own, float("nan"))
        launch(*args.values(), *([1e-6] * (op == "rope_attention")), out, tile=tile)
        assert_accurate(out, truth, own)
    assert [config["BLOCK_N"] for config in taken] == [32, 64, 64]


STREAMED = ("norm_modulate", "norm_modulate_fp8", "gated_residual", "gated_residual_norm_modulate")


def one_stream(args: dict[str, Any], txt_len: int, stream: int) -> dict[str, Any]:
    rows = slice(None, txt_len) if stream == 0 else slice(txt_len, None)
    return {
        name: v[:, rows] if name in ("x", "y") else v[:, stream : stream + 1]
        for name, v in args.items()
    }


@pytest.mark.parametrize("txt_len", [0, _rows.ROWS + 1, 20])
@pytest.mark.parametrize("op", STREAMED)
def test_two_streams_in_one_launch_have_the_bits_of_two_launches(op: str, txt_len: int):
    """Backward too, where a program adds up rows of one stream; a stream without rows gets 0."""
    args = CASES[op].inputs(Maker(Sizes(1, txt_len, 20 - txt_len), torch.bfloat16))
    del args["txt_len"]
    run = partial(getattr(ops, op), backend="triton")
    halves = [one_stream(args, txt_len, stream) for stream in (0, 1)]
    joint, apart = outputs(run, args, txt_len=txt_len), [outputs(run, half) for half in halves]
    for out, parts in zip(joint, zip(*apart, strict=True), strict=True):
        assert torch.equal(out.float(), torch.cat(parts, 1).float())
    if op.endswith("_fp8"):
        return
    dout = tuple(torch.randn_like(o) for o in joint)
    found = gradients(partial(run, txt_len=txt_len), args, dout)
    douts = ([d[:, :txt_len] for d in dout], [d[:, txt_len:] for d in dout])
    apart = [gradients(run, half, d) for half, d in zip(halves, douts, strict=True)]
    for name, grad, parts in zip(args, found, zip(*apart, strict=True), strict=True):
        assert torch.equal(grad, torch.cat(parts, 1)), name


def test_the_stride_of_an_axis_of_one_is_not_read():
    """Torch leaves it arbitrary; a kernel that multiplied by it would leave the tensor."""
    x, y = torch.randn(2, 1, 6, 37).unbind()
    gate = torch.randn(37).as_strided((1, 1, 37), (2**40, 2**41, 1))
    assert _rows.view(gate)[1:] == (0, 0)
    out = ops.gated_residual(x, y, gate, backend="triton")
    torch.testing.assert_close(out, x + gate * y)


def test_every_kernel_file_begins_with_its_card():
    for file in Path(kernels.__file__).parent.glob("[a-z]*.py"):
        card = file.read_text().split('"""')[1].strip().splitlines()
        assert 6 <= len(card) <= 8 and card[1] == "", file.name


def test_half_a_bf16_unit_is_rounded_to_even_as_on_a_gpu():
    """The interpreter truncates unless tests repair it."""
    one = torch.tensor([[[1, 1 + 2**-7, 1 + 2**-6]]], dtype=torch.bfloat16, device=DEVICE)
    half = torch.full_like(one, 2**-8)
    out = ops.gated_residual(one, half, torch.ones_like(one), backend="triton")
    assert torch.equal(out, (one.double() + half.double()).to(torch.bfloat16))
    assert out[0, 0].tolist() == [1, 1 + 2**-6, 1 + 2**-6]

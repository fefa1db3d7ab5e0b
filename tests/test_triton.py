"""What the contract does not reach of the Triton kernels on a machine without a GPU."""

from pathlib import Path

import pytest
import torch
import triton_interpreter

from fluxkern import ops, reference
from fluxkern.kernels import attention as kernels
from fluxkern.testing import assert_accurate

triton_interpreter.install()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="TMA needs its architecture")


def heads(length: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """q, k, v [1, length, 2, 16] of one projection, as a descriptor takes them."""
    packed = torch.randn(1, length, 3 * 2 * 16, dtype=torch.float64).to(dtype)
    return packed.unflatten(-1, (3, 2, 16)).unbind(2)


@interpreted
@pytest.mark.parametrize("architecture", [90, 100, 120])
def test_attention_by_tma_equals_the_reference(architecture: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "architecture", lambda: architecture)
    taken = []
    real = kernels.sources

    def spy(kernel, config, *tiles):
        inputs = real(kernel, config, *tiles)
        taken.append(config["TMA"])
        return inputs

    monkeypatch.setattr(kernels, "sources", spy)
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
    assert taken == [True, architecture != 120, architecture != 120]


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


def test_every_kernel_file_begins_with_its_card():
    for file in Path(kernels.__file__).parent.glob("[a-z]*.py"):
        if file.name != "attention_lse.py":
            card = file.read_text().split('"""')[1].strip().splitlines()
            assert 6 <= len(card) <= 8 and card[1] == "", file.name


def test_half_a_bf16_unit_is_rounded_to_even_as_on_a_gpu():
    """The interpreter truncates unless tests repair it."""
    one = torch.tensor([[[1, 1 + 2**-7, 1 + 2**-6]]], dtype=torch.bfloat16, device=DEVICE)
    half = torch.full_like(one, 2**-8)
    out = ops.gated_residual(one, half, torch.ones_like(one), backend="triton")
    assert torch.equal(out, (one.double() + half.double()).to(torch.bfloat16))
    assert out[0, 0].tolist() == [1, 1 + 2**-6, 1 + 2**-6]

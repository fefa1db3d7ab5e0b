"""Attention without a mask."""

from dataclasses import replace

import torch
from torch import Tensor

from ... import reference
from .. import _backends, _checks
from .._op import Op, empty, empty_each
from . import providers


def _check(a: _checks.Args) -> None:
    _checks.heads(a, "q")
    _checks.same_heads(a, "q", "k", any_length=True)
    _checks.same_heads(a, "k", "v")


def attention_flops(q: Tensor, k: Tensor, *_: object) -> int:
    return 4 * q.numel() * k.shape[1]


def _out_and_lse(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return empty(q), empty(q, q.shape[:3], wide)


def _by_lse(q: Tensor, k: Tensor, v: Tensor, backend: str | None) -> Tensor:
    return _lse_op(q, k, v, backend)[0]


_op = Op(
    "attention(Tensor q, Tensor k, Tensor v) -> (Tensor out)",
    reference.attention,
    lambda q, *_: empty(q),
    _check,
    composed=_by_lse,
    autocast="lower",
    flops=attention_flops,
    triton="attention",
)
_backward = Op(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out,"
    " Tensor lse) -> (Tensor dq, Tensor dk, Tensor dv)",
    reference.attention_backward,
    lambda dout, dlse, q, k, v, *_: empty_each(q, k, v),
    autocast=None,
    flops=lambda dout, dlse, q, k, *_: (
        10 * q.numel() * k.shape[1]
    ),  # five GEMMs of the forward's two
    triton="attention",
)
_lse_op = Op(
    "attention_lse(Tensor q, Tensor k, Tensor v) -> (Tensor out, Tensor lse)",
    reference.attention_lse,
    _out_and_lse,
    _check,
    gradient=_backward,
    autocast="lower",
    flops=attention_flops,
    triton="attention",
)


def attention(q: Tensor, k: Tensor, v: Tensor, *, backend: str | None = None) -> Tensor:
    """Scaled dot-product attention, non-causal, without a mask.

    out = softmax(q k^T / sqrt(D)) v

    Args:
        q: [B, L, H, D], floating point, last axis contiguous; any view.
        k, v: [B, M, H, D], dtype of q.
        backend: one of `fluxkern.ops.BACKENDS`, or "cudnn", "flash3" or "flash": attention by
            kernels of others, on a GPU (the backward of the first and the last adds in no fixed
            order), "sdpa", torch's choice among its own, without a backward here, or "cuda-wgmma",
            ours for Hopper; None takes the first that can run.

    Returns:
        [B, L, H, D], dtype of q.

    Raises:
        TypeError: an argument is not a dense tensor; names it.
        ValueError: a shape, dtype, device or stride disagrees; names the argument and both values.
        NotImplementedError: the named backend cannot run this; gives every backend's reason.

    Gradients: q, k, v, to any order.
    Source: Vaswani et al.; black-forest-labs/flux, math.py, attention.
    """
    return _op(q, k, v, backend)


def attention_lse(
    q: Tensor, k: Tensor, v: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """`attention` and the log-sum-exp of its scores, with which parts over split keys are merged.

    lse = log(sum(exp(q k^T / sqrt(D))));  out = exp(q k^T / sqrt(D) - lse) v

    Args:
        q: [B, L, H, D], floating point, last axis contiguous; any view.
        k, v: [B, M, H, D], dtype of q.
        backend: as in `attention`.

    Returns:
        (out [B, L, H, D] in the dtype of q, lse [B, L, H] in fp32 (fp64 for fp64 inputs), natural
        logarithm).

    Raises:
        TypeError, ValueError, NotImplementedError: as `attention`.

    Gradients: q, k, v, from both outputs, to any order.
    Source: Dao et al., FlashAttention.
    """
    return _lse_op(q, k, v, backend)


# backwards that are made of others' kernels


def _backward_on_cpu(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if not q.numel() or not k.numel():
        return tuple(torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    if dlse is not None and dlse.any():  # torch's takes no gradient of lse
        gradients = reference.attention_backward(dout, dlse, q, k, v, out, lse)
        return tuple(t.contiguous() for t in gradients)
    dtype, tensors = q.dtype, (dout, q, k, v, out)
    if not torch.cpu._is_amx_tile_supported():  # 96 tokens in bf16: 11 ms, 5 ms by way of fp32
        tensors = (t.to(lse.dtype) for t in tensors)
    heads_first = (t.transpose(1, 2) for t in (*tensors, lse))
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    gradients = backward(*heads_first, 0.0, False)
    return tuple(t.transpose(1, 2).to(dtype).contiguous() for t in gradients)


def _backward_on_cuda(*args: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return _backends.run("attention_backward", "triton", *args)


def _against_cuda(*args: Tensor | None) -> str | None:
    return _ON_CUDA.unsupported(*args) or _backends.why_not("attention_backward", "triton", *args)


def _cpu_alone(*_: object) -> str:
    return "it is the cpu backend's"


_ON_CPU, _ON_CUDA = _backends.on_cpu(_backward_on_cpu), _backends.on_cuda(_backward_on_cuda)
for _backend in (
    _ON_CPU,
    *(replace(_ON_CPU, name=name, unnamed=_cpu_alone) for name in _backends.EMULATORS),
    replace(_ON_CUDA, unsupported=_against_cuda, by_dtype=False),
    replace(_ON_CUDA, name="cuda-wgmma", unsupported=_against_cuda, by_dtype=False),
):
    _backends.register("attention_backward", _backend)
providers.register()

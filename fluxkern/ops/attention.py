"""Attention over the joint sequence, without a mask."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import reference
from . import _attention_providers as providers
from . import _checks, _dispatch, _probe


def _out_and_lse(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=wide)


_forward = _dispatch.define(
    "attention(Tensor q, Tensor k, Tensor v, str? backend) -> Tensor",
    reference.attention,
    lambda q, *_: q.new_empty(q.shape),
)
_forward_lse = _dispatch.define(
    "attention_lse(Tensor q, Tensor k, Tensor v, str? backend) -> (Tensor, Tensor)",
    reference.attention_lse,
    _out_and_lse,
)
_backward = _dispatch.define(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out,"
    " Tensor lse, str? backend) -> (Tensor, Tensor, Tensor)",
    reference.attention_backward,
    lambda dout, dlse, q, k, v, *_: _dispatch.empty_like_each(q, k, v),
)


def _backward_on_cpu(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if not q.numel():
        return _dispatch.empty_like_each(q, k, v)
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
    return _dispatch.run("attention_backward", "triton", *args)


def _against_cuda(*args: Tensor | None) -> str | None:
    return _ON_CUDA.unsupported(*args) or _dispatch._reason(
        "attention_backward", "triton", args, named=True
    )


def _against_wgmma_emulator(*args: Tensor) -> str | None:
    """Against what csrc/cuda/attention_wgmma.cu does not take: TMA finds rows by 16 bytes."""
    if not args:
        return None
    q, k, v = args[:3]
    if q.dtype not in providers.HALF:
        return f"takes bfloat16 and float16, got {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"takes D of 8, 16, ... 128, got {q.shape[-1]}"
    if not k.shape[1]:
        return "takes at least one key"
    loaded = {"q": q, "k": k, "v": v} if len(args) == 3 else {"v": v}  # or after norm and rotation
    for name, t in loaded.items():
        if providers.misaligned(t):
            return f"takes rows at multiples of 16 bytes, got {name} with strides {t.stride()}"
    return None


def _against_wgmma(*args: Tensor) -> str | None:
    capability = providers.capability(args[0].device if args else None)
    if capability != (9, 0):
        return f"takes compute capability 9.0, got {'.'.join(map(str, capability))}"
    if not _probe.has_architecture("9.0a", _dispatch.architectures()):
        return "_C_cuda.so was built without 9.0a"
    return _against_wgmma_emulator(*args)


_dispatch.limits |= {"cuda-wgmma": _against_wgmma, "cuda-wgmma-emulator": _against_wgmma_emulator}
_ON_CPU, _ON_CUDA = _dispatch.on_cpu(_backward_on_cpu), _dispatch.on_cuda(_backward_on_cuda)
for _backend in (
    _ON_CPU,
    replace(_ON_CPU, name="cuda-emulator", only_named="it is the cpu backend's"),
    replace(_ON_CPU, name="cuda-wgmma-emulator", only_named="it is the cpu backend's"),
    replace(_ON_CUDA, unsupported=_against_cuda),
    replace(_ON_CUDA, name="cuda-wgmma", unsupported=_against_cuda),
):
    _dispatch.register("attention_backward", _backend)


for _name in providers.NAMES:
    for _op, _unsupported in (
        (providers.attention, providers.unsupported),
        (providers.attention_lse, providers.lse_unsupported),
    ):
        _backend = _dispatch.Backend(_name, partial(_op, _name), partial(_unsupported, _name))
        _dispatch.register(_op.__name__, _backend)
    _backend = _dispatch.Backend(
        _name,
        partial(providers.backward, _name),
        partial(providers.backward_unsupported, _name),
        "its sums have no fixed order" if _name in providers.UNORDERED else None,
    )
    _dispatch.register("attention_backward", _backend)
_dispatch.set_order("attention", lambda *args: providers.order(*args[:1]))
_dispatch.set_order("attention_lse", lambda *args: providers.order(*args[:1]))
_dispatch.set_order("attention_backward", providers.backward_order)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, backend):
        out, lse = _forward_lse(q, k, v, backend)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.backend = backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        (dout,) = _dispatch.rows(dout)
        return *_backward(dout, None, *ctx.saved_tensors, ctx.backend), None


class _AttentionLse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, backend):
        out, lse = _forward_lse(q, k, v, backend)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.backend = backend
        ctx.set_materialize_grads(False)  # a backward that takes no dlse runs where there is none
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        dout = torch.zeros_like(ctx.saved_tensors[3]) if dout is None else dout
        dlse = None if dlse is None else dlse.contiguous()
        return *_backward(*_dispatch.rows(dout), dlse, *ctx.saved_tensors, ctx.backend), None


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    _checks.heads("q", q)
    _checks.same_heads("k", k, "q", q, any_length=True)
    _checks.same_heads("v", v, "k", k)


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
        ValueError: a shape, dtype, device or stride disagrees; names the argument and both values.
        NotImplementedError: the named backend cannot run this; gives every backend's reason.

    Gradients: q, k, v.
    Source: Vaswani et al.; black-forest-labs/flux, math.py, attention.
    """
    _check(q, k, v)
    if _dispatch.needs_gradient(q, k, v):
        return _Attention.apply(q, k, v, backend)
    return _forward(q, k, v, backend)


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
        ValueError, NotImplementedError: as `attention`.

    Gradients: q, k, v, from both outputs.
    Source: Dao et al., FlashAttention.
    """
    _check(q, k, v)
    if _dispatch.needs_gradient(q, k, v):
        return _AttentionLse.apply(q, k, v, backend)
    return _forward_lse(q, k, v, backend)

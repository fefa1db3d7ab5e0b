"""Layers for `kernels.kernelize`: the `forward` of a diffusers or transformers class on the ops.

Each has the signature of the class whose place it takes, and that class's parameters and children
behind `self`; every Linear is called. What the ops cannot take is refused by name.
"""

import torch
from torch import Tensor, nn

from .ops import (
    attention,
    gated_residual,
    gated_residual_norm_modulate,
    gelu_tanh,
    joint_qk_norm_rope,
    norm_modulate,
    qk_norm_rope,
)


class GeluTanh(nn.Module):
    """transformers' GELUTanh, and torch's GELU with approximate="tanh"."""

    has_backward = True
    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        if getattr(self, "approximate", "tanh") != "tanh":
            raise ValueError(f"approximate must be 'tanh', got {self.approximate!r}")
        return gelu_tanh(input)


class GELU(nn.Module):
    """diffusers' GELU with approximate="tanh": a projection before it."""

    has_backward = True
    can_torch_compile = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.approximate != "tanh":
            raise ValueError(f"approximate must be 'tanh', got {self.approximate!r}")
        return gelu_tanh(self.proj(hidden_states))


# LayerNorm, scale and shift


def _check_hooks(norm: nn.Module) -> None:
    """An op computes the norm without calling it: what stands on it would not run."""
    if norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks:
        raise ValueError(f"a norm must have no hook, got one on {norm}")


def _eps(norm: nn.Module) -> float:
    if type(norm) is not nn.LayerNorm or norm.weight is not None or norm.bias is not None:
        raise ValueError(f"the norm must be a LayerNorm without weights, got {norm}")
    _check_hooks(norm)
    return norm.eps


def _modulated(norm: nn.Module, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return norm_modulate(x, scale, shift, eps=_eps(norm))


class AdaLayerNormZero(nn.Module):
    """diffusers' AdaLayerNormZero: x [B, L, C] normed and modulated, and four vectors."""

    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        x: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        hidden_dtype: torch.dtype | None = None,
        emb: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        if self.emb is not None:
            emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
        shift, scale, gate, *mlp = self.linear(self.silu(emb)).chunk(6, dim=1)
        return _modulated(self.norm, x, scale, shift), gate, *mlp


class AdaLayerNormZeroSingle(nn.Module):
    """diffusers' AdaLayerNormZeroSingle: x [B, L, C] normed and modulated, and the gate."""

    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor, emb: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shift, scale, gate = self.linear(self.silu(emb)).chunk(3, dim=1)
        return _modulated(self.norm, x, scale, shift), gate


class AdaLayerNormContinuous(nn.Module):
    """diffusers' AdaLayerNormContinuous: x [B, L, C] normed and modulated, scale before shift."""

    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        emb = self.linear(self.silu(conditioning_embedding).to(x.dtype))
        scale, shift = emb.chunk(2, dim=1)
        return _modulated(self.norm, x, scale, shift)


# attention


NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


def _check_attention(attn: nn.Module, mask: Tensor | None, rope: object, kwargs: dict) -> None:
    processor = type(attn.processor).__name__
    if processor != "FluxAttnProcessor":
        raise ValueError(f"the attention processor must be FluxAttnProcessor, got {processor}")
    if attn.processor._parallel_config is not None:
        raise ValueError("attention cannot be split over devices")
    if attn.processor._attention_backend is not None:
        raise ValueError(f"attention has no backend {attn.processor._attention_backend!r}")
    norms = [norm for name in NORMS if (norm := getattr(attn, name, None)) is not None]
    for norm in norms:
        if type(norm) is not nn.RMSNorm or norm.weight is None or norm.eps != norms[0].eps:
            raise ValueError(f"the norms of q and k must be RMSNorms with one eps, got {norm}")
        _check_hooks(norm)
    if rope is None:
        raise ValueError("image_rotary_emb must be cos and sin, got None")
    if mask is not None:
        raise ValueError("attention takes no mask")
    if kwargs:
        raise ValueError(f"attention takes no {', '.join(sorted(kwargs))}")


def _heads(x: Tensor, head_dim: int, separate: list, fused: nn.Module | None) -> list[Tensor]:
    """q, k, v [B, L, H, D]"""
    projected = [linear(x) for linear in separate] if fused is None else fused(x).chunk(3, dim=-1)
    return [t.unflatten(-1, (-1, head_dim)) for t in projected]


class FluxAttention(nn.Module):
    """diffusers' FluxAttention of image [B, L, C], and of text [B, Lt, C] where that is given."""

    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        **kwargs,
    ) -> Tensor | tuple[Tensor, Tensor]:
        _check_attention(self, attention_mask, image_rotary_emb, kwargs)
        cos, sin = (table[:, ::2] for table in image_rotary_emb)  # diffusers holds each angle twice
        fused = self.to_qkv if self.fused_projections else None
        img = _heads(hidden_states, self.head_dim, [self.to_q, self.to_k, self.to_v], fused)
        weights, eps = (self.norm_q.weight, self.norm_k.weight), self.norm_q.eps
        if encoder_hidden_states is None:
            q, k, v = img
            q, k = qk_norm_rope(q, k, *weights, cos, sin, eps=eps)
            return attention(q, k, v).flatten(2)
        separate = [self.add_q_proj, self.add_k_proj, self.add_v_proj]
        fused = self.to_added_qkv if self.fused_projections else None
        txt = _heads(encoder_hidden_states, self.head_dim, separate, fused)
        weights = (self.norm_added_q.weight, self.norm_added_k.weight, *weights)
        q, k, v = joint_qk_norm_rope(*txt, *img, *weights, cos, sin, eps=eps)
        lengths = [encoder_hidden_states.shape[1], hidden_states.shape[1]]
        txt_out, img_out = attention(q, k, v).flatten(2).split(lengths, dim=1)
        img_out = self.to_out[1](self.to_out[0](img_out.contiguous()))
        return img_out, self.to_add_out(txt_out.contiguous())


# the blocks: residuals


def _clipped(x: Tensor) -> Tensor:
    """fp16 streams stay finite, as in diffusers."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def _branches(x: Tensor, attn: Tensor, vectors: list[Tensor], norm: nn.Module, ff: nn.Module):
    """A stream with its attention and its MLP added."""
    gate, shift_mlp, scale_mlp, gate_mlp = vectors
    x, h = gated_residual_norm_modulate(x, attn, gate, scale_mlp, shift_mlp, eps=_eps(norm))
    return gated_residual(x, ff(h), gate_mlp)


class FluxTransformerBlock(nn.Module):
    """diffusers' double-stream block: image [B, L, C] and text [B, Lt, C], text returned first."""

    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict | None = None,
    ) -> tuple[Tensor, Tensor]:
        img_h, *img_vectors = self.norm1(hidden_states, emb=temb)
        txt_h, *txt_vectors = self.norm1_context(encoder_hidden_states, emb=temb)
        img_attn, txt_attn, *ip_attn = self.attn(
            hidden_states=img_h,
            encoder_hidden_states=txt_h,
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
        img = _branches(hidden_states, img_attn, img_vectors, self.norm2, self.ff)
        for added in ip_attn:
            img = img + added
        txt = _branches(
            encoder_hidden_states, txt_attn, txt_vectors, self.norm2_context, self.ff_context
        )
        return _clipped(txt), img


class FluxSingleTransformerBlock(nn.Module):
    """diffusers' single-stream block: image [B, L, C] and text [B, Lt, C], text returned first."""

    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict | None = None,
    ) -> tuple[Tensor, Tensor]:
        x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        h, gate = self.norm(x, emb=temb)
        mlp = self.act_mlp(self.proj_mlp(h))
        kwargs = joint_attention_kwargs or {}
        attn = self.attn(hidden_states=h, image_rotary_emb=image_rotary_emb, **kwargs)
        x = _clipped(gated_residual(x, self.proj_out(torch.cat([attn, mlp], dim=2)), gate))
        lengths = [encoder_hidden_states.shape[1], hidden_states.shape[1]]
        txt, img = x.split(lengths, dim=1)
        return txt, img

"""diffusers' FLUX.1 modules with their elementwise chains and attention on `fluxkern.ops`.

Each class is one of diffusers' or torch's with another `forward`: same name, parameters, children
and signature, so an instance becomes one by its `__class__` alone. Every Linear is called, its
weight is never read. A call that the ops cannot take goes to the original forward, with a reason.
"""

from dataclasses import replace
from functools import partial

import torch
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.models import activations, normalization
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    _templated_context_parallel_attention,
    dispatch_attention_fn,
)
from diffusers.models.transformers import transformer_flux
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack

from .. import ops
from .._modules import autocast_dtype, hooked
from ._fused import Fused, differ

# children are taken from _modules: getattr of a module costs several times that

# LayerNorm, scale and shift


def _layer_norm(norm: nn.Module) -> str | None:
    if type(norm) is not nn.LayerNorm:
        return f"a norm is {type(norm).__name__}, not LayerNorm"
    if norm.weight is not None or norm.bias is not None:
        return "a LayerNorm has weights"
    return hooked(norm)


def _why_not_linear(x: Tensor) -> str | None:
    """Known before it is called: the original code would call it again."""
    if autocast_dtype(x) not in (None, x.dtype):
        return "autocast gives a Linear another dtype than its input's"
    return None


_OF_LAYER_NORM = (nn.LayerNorm, "forward")


class _AdaLayerNorm(Fused):
    stands_for = (_OF_LAYER_NORM,)

    def why_not(self) -> str | None:
        return super().why_not() or _layer_norm(self._modules["norm"])

    def chunks(self, x: Tensor, emb: Tensor | None, count: int) -> tuple[Tensor, ...] | None:
        """`count` vectors [B, C] of the modulation; None where the original code is to run."""
        reason = self.why_not() or differ(x, emb) or _why_not_linear(x)
        if reason is None:
            modules = self._modules
            emb = modules["linear"](modules["silu"](emb))
            if emb.dtype != x.dtype:
                reason = differ(x, emb)
            if emb.shape[0] != x.shape[0]:
                emb = emb.expand(x.shape[0], -1)
        return None if self.runs_original(reason) else emb.chunk(count, dim=1)

    def modulated(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        eps = self._modules["norm"].eps
        return ops.norm_modulate(x, scale, shift, eps=eps, backend=self._fluxkern.backend)


class AdaLayerNormZero(_AdaLayerNorm, normalization.AdaLayerNormZero):
    original = normalization.AdaLayerNormZero

    def why_not(self) -> str | None:
        if self.emb is not None:
            return "a norm embeds timesteps of its own"
        return super().why_not()

    def forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor | None = None,
        class_labels: torch.LongTensor | None = None,
        hidden_dtype: torch.dtype | None = None,
        emb: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        vectors = self.chunks(x, emb, 6)
        if vectors is None:
            return super().forward(x, timestep, class_labels, hidden_dtype, emb)
        shift, scale, gate, *mlp = vectors
        return self.modulated(x, scale, shift), gate, *mlp


class AdaLayerNormZeroSingle(_AdaLayerNorm, normalization.AdaLayerNormZeroSingle):
    original = normalization.AdaLayerNormZeroSingle

    def forward(
        self, x: torch.Tensor, emb: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        vectors = self.chunks(x, emb, 3)
        if vectors is None:
            return super().forward(x, emb)
        shift, scale, gate = vectors
        return self.modulated(x, scale, shift), gate


class AdaLayerNormContinuous(_AdaLayerNorm, normalization.AdaLayerNormContinuous):
    original = normalization.AdaLayerNormContinuous

    def forward(self, x: torch.Tensor, conditioning_embedding: torch.Tensor) -> torch.Tensor:
        vectors = self.chunks(x, conditioning_embedding, 2)
        if vectors is None:
            return super().forward(x, conditioning_embedding)
        scale, shift = vectors
        return self.modulated(x, scale, shift)


# the MLPs' activation


def _not_tanh(activation: nn.Module) -> str | None:
    return None if activation.approximate == "tanh" else "a GELU is not in its tanh form"


class GELU(Fused, activations.GELU):
    original = activations.GELU
    stands_for = ((activations.GELU, "gelu"),)

    def why_not(self) -> str | None:
        if "gelu" in self.__dict__:
            return "the gelu of a GELU was replaced on the instance"
        return super().why_not() or _not_tanh(self)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.runs_original(self.why_not()):
            return super().forward(hidden_states)
        proj = self._modules["proj"]
        return ops.gelu_tanh(proj(hidden_states), backend=self._fluxkern.backend)


class TanhGELU(Fused, nn.GELU):
    original = nn.GELU

    def why_not(self) -> str | None:
        return super().why_not() or _not_tanh(self)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.runs_original(self.why_not()):
            return super().forward(input)
        return ops.gelu_tanh(input, backend=self._fluxkern.backend)


# attention

_QK_NORMS = ("norm_added_q", "norm_added_k", "norm_q", "norm_k")  # text first, as in the sequence


def _intercepted() -> bool:
    """Someone waits for torch's own attention to be called, as ParaAttention does, or replaced it,
    as is done for SageAttention."""
    if F.scaled_dot_product_attention is not torch._C._nn.scaled_dot_product_attention:
        return True
    modes = _get_current_function_mode_stack()  # torch's own are those of devices and of export
    others = any(not type(mode).__module__.startswith("torch.") for mode in modes)
    return others and not torch._C._is_torch_function_all_disabled()


class FluxAttention(Fused, transformer_flux.FluxAttention):
    original = transformer_flux.FluxAttention
    stands_for = (
        (transformer_flux.FluxAttnProcessor, "__call__"),
        (nn.RMSNorm, "forward"),
        (transformer_flux, "apply_rotary_emb"),
        (transformer_flux, "dispatch_attention_fn"),
    )

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        joint = encoder_hidden_states is not None
        norms = self.norms()
        reason = self._why_not(norms) or self._why_not_call(
            hidden_states, joint, image_rotary_emb, kwargs, norms
        )
        if self.runs_original(reason):
            return super().forward(
                hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, **kwargs
            )
        q, k, v = self._qkv(hidden_states, encoder_hidden_states, image_rotary_emb, norms)
        if not torch.compiler.is_compiling():
            self._fluxkern.tokens = q.shape[1]
        out = self._attend(q, k, v, attention_mask).flatten(2)  # [B, L, C]
        if not joint:
            return out
        txt_len = encoder_hidden_states.shape[1]
        txt, img = out[:, :txt_len], out[:, txt_len:]
        modules = self._modules
        to_out = modules["to_out"]
        return to_out[1](to_out[0](img.contiguous())), modules["to_add_out"](txt.contiguous())

    def norms(self) -> list[nn.Module]:
        modules = self._modules
        return [modules[name] for name in _QK_NORMS if name in modules]

    def why_not(self) -> str | None:
        return self._why_not(self.norms())

    def _why_not(self, norms: list[nn.Module]) -> str | None:
        if type(self.processor) is not transformer_flux.FluxAttnProcessor:
            return f"the attention processor is {type(self.processor).__name__}"
        if reason := super().why_not():
            return reason
        eps = getattr(norms[-1], "eps", None)
        for norm in norms:
            if type(norm) is not nn.RMSNorm or norm.weight is None:
                return f"the norm of q and k is {type(norm).__name__}, not RMSNorm with weights"
            if norm.eps is None or norm.eps != eps:
                return "the norms of q and k differ in eps"
            if reason := hooked(norm):
                return reason
        return None

    def _why_not_call(
        self,
        x: Tensor,
        joint: bool,
        rotation: tuple[Tensor, Tensor] | None,
        kwargs: dict,
        norms: list[nn.Module],
    ) -> str | None:
        if kwargs:
            return f"joint_attention_kwargs hold {', '.join(sorted(kwargs))}"
        if joint != (self.added_kv_proj_dim is not None):
            return "attention is called with one stream where it has two, or two where it has one"
        if not isinstance(rotation, tuple) or len(rotation) != 2 or rotation[0].ndim != 2:
            return "attention is called without a table of rotations"
        return differ(x, *[norm.weight for norm in norms])

    def _qkv(
        self,
        img: Tensor,
        txt: Tensor | None,
        rotation: tuple[Tensor, Tensor],
        norms: list[nn.Module],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Joint q, k, v [B, L, H, D], text first, q and k normed and rotated."""
        projected = transformer_flux._get_qkv_projections(self, img, txt)
        streams = projected[:3] if txt is None else (*projected[3:], *projected[:3])
        heads = [t.unflatten(-1, (-1, self.head_dim)) for t in streams]
        weights = [norm.weight for norm in norms]
        cos, sin = rotation[0][:, ::2], rotation[1][:, ::2]  # diffusers holds each angle twice
        settings = {"eps": norms[-1].eps, "backend": self._fluxkern.backend}
        if txt is not None:
            return ops.joint_qk_norm_rope(*heads, *weights, cos, sin, **settings)
        q, k, v = heads
        return *ops.qk_norm_rope(q, k, *weights, cos, sin, **settings), v

    def why_not_attention(self, mask: Tensor | None = None) -> str | None:
        """The reason why diffusers' dispatch attends, behind our norm and rotation."""
        processor, native = self.processor, AttentionBackendName.NATIVE
        chosen = processor._attention_backend or _AttentionBackendRegistry._active_backend
        if chosen != native:
            return f"diffusers' attention backend {AttentionBackendName(chosen).value} is set"
        if mask is not None:
            return "attention has a mask"
        return "another package intercepts torch's attention" if _intercepted() else None

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        backend = self._fluxkern.backend
        config = self.processor._parallel_config
        if self.runs_original(self.why_not_attention(mask), "attention_reason"):
            chosen = self.processor._attention_backend
            return dispatch_attention_fn(
                q, k, v, attn_mask=mask, backend=chosen, parallel_config=config
            )
        if config is None:
            return ops.attention(q, k, v, backend=backend)
        return _templated_context_parallel_attention(
            q,
            k,
            v,
            forward_op=partial(_on_a_device, backend=backend),
            backward_op=partial(_gradients_on_a_device, backend=backend),
            _parallel_config=config,
        )


def _on_a_device(
    ctx: torch.autograd.function.FunctionCtx,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: None,
    dropout_p: float,
    is_causal: bool,
    scale: None,
    enable_gqa: bool,
    return_lse: bool,
    *,
    backend: str | None,
    _save_ctx: bool,
    **_: object,
) -> Tensor | tuple[Tensor, Tensor]:
    """What diffusers' Ulysses and ring call on each device between their exchanges."""
    if not return_lse and not any(ctx.needs_input_grad):
        return ops.attention(q, k, v, backend=backend)
    out, lse = ops.attention_lse(q, k, v, backend=backend)
    if _save_ctx:
        ctx.save_for_backward(q, k, v, out, lse)
    return (out, lse) if return_lse else out


def _gradients_on_a_device(
    ctx: torch.autograd.function.FunctionCtx,
    dout: Tensor,
    *,
    backend: str | None,
    **of_a_ring: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same on the way back; a ring gives q, all keys' out and lse, and the k, v of its turn."""
    names = ("query", "key", "value", "out", "lse")
    tensors = [of_a_ring[n] for n in names] if of_a_ring else ctx.saved_tensors
    backward = torch.ops.fluxkern.attention_backward
    return backward(dout, torch.zeros_like(tensors[-1]), *tensors, backend)


# the blocks: residuals


def _of_one_batch(img: Tensor, txt: Tensor, temb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Several pictures may share a prompt: diffusers broadcasts it in its first norm."""
    if img.shape[0] == txt.shape[0] == temb.shape[0]:
        return img, txt, temb
    batch = max(img.shape[0], txt.shape[0], temb.shape[0])
    return img.expand(batch, -1, -1), txt.expand(batch, -1, -1), temb.expand(batch, -1)


def _clipped(x: Tensor) -> Tensor:
    """fp16 streams stay finite, as in diffusers."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


class FluxSingleTransformerBlock(Fused, transformer_flux.FluxSingleTransformerBlock):
    original = transformer_flux.FluxSingleTransformerBlock

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        joint_attention_kwargs: dict | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        reason = self.why_not() or _why_not_block(hidden_states, encoder_hidden_states, temb)
        if self.runs_original(reason):
            return super().forward(
                hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
            )
        hidden_states, encoder_hidden_states, temb = _of_one_batch(
            hidden_states, encoder_hidden_states, temb
        )
        txt_len = encoder_hidden_states.shape[1]
        modules = self._modules
        x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        h, gate = modules["norm"](x, emb=temb)
        mlp = modules["act_mlp"](modules["proj_mlp"](h))
        attn = modules["attn"](
            hidden_states=h, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {})
        )
        y = modules["proj_out"](torch.cat([attn, mlp], dim=2))
        x = _clipped(ops.gated_residual(x, y, gate, backend=self._fluxkern.backend))
        return x[:, :txt_len], x[:, txt_len:]


class FluxTransformerBlock(Fused, transformer_flux.FluxTransformerBlock):
    original = transformer_flux.FluxTransformerBlock
    stands_for = (_OF_LAYER_NORM,)

    def why_not(self) -> str | None:
        norms = self._modules["norm2"], self._modules["norm2_context"]
        return super().why_not() or _layer_norm(norms[0]) or _layer_norm(norms[1])

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        joint_attention_kwargs: dict | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        reason = self.why_not() or _why_not_block(hidden_states, encoder_hidden_states, temb)
        if self.runs_original(reason):
            return super().forward(
                hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
            )
        hidden_states, encoder_hidden_states, temb = _of_one_batch(
            hidden_states, encoder_hidden_states, temb
        )
        modules = self._modules
        img_h, *img_vectors = modules["norm1"](hidden_states, emb=temb)
        txt_h, *txt_vectors = modules["norm1_context"](encoder_hidden_states, emb=temb)
        img_attn, txt_attn, *ip_attn = modules["attn"](
            hidden_states=img_h,
            encoder_hidden_states=txt_h,
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
        norm, ff = modules["norm2"], modules["ff"]
        img = self._branches(hidden_states, img_attn, img_vectors, norm, ff)
        for added in ip_attn:
            img = img + added
        norm, ff = modules["norm2_context"], modules["ff_context"]
        txt = self._branches(encoder_hidden_states, txt_attn, txt_vectors, norm, ff)
        return _clipped(txt), img

    def _branches(
        self, x: Tensor, attn: Tensor, vectors: list[Tensor], norm: nn.LayerNorm, ff: nn.Module
    ) -> Tensor:
        """A stream with its attention and its MLP added."""
        gate, shift_mlp, scale_mlp, gate_mlp = vectors
        backend = self._fluxkern.backend
        x, h = ops.gated_residual_norm_modulate(
            x, attn, gate, scale_mlp, shift_mlp, eps=norm.eps, backend=backend
        )
        return ops.gated_residual(x, ff(h), gate_mlp, backend=backend)


def _why_not_block(img: Tensor, txt: Tensor, temb: Tensor) -> str | None:
    if autocast_dtype(img) is not None:
        return "autocast gives residuals and branches dtypes of their own"
    return differ(img, txt, temb)


FUSED = {
    fused.original: fused
    for fused in (
        AdaLayerNormZero,
        AdaLayerNormZeroSingle,
        AdaLayerNormContinuous,
        GELU,
        TanhGELU,
        FluxAttention,
        FluxSingleTransformerBlock,
        FluxTransformerBlock,
    )
}
for fused in (FluxSingleTransformerBlock, FluxTransformerBlock):  # looked up by exact class
    metadata = replace(TransformerBlockRegistry.get(fused.original))
    TransformerBlockRegistry.register(fused, metadata)

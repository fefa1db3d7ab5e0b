"""The ops of FLUX.1: meaning in `fluxkern.reference`, backends behind one call."""

from ._backends import (
    BACKENDS,
    Backend,
    Call,
    Choice,
    explain,
    names,
    record,
    register,
    use_backend,
    why_not,
)
from ._load import compiled_kernels, tile_candidates
from .attention import attention, attention_lse
from .gated_residual import gated_residual
from .gated_residual_norm_modulate import gated_residual_norm_modulate
from .gelu_tanh import gelu_tanh
from .gelu_tanh_fp8 import gelu_tanh_fp8
from .group_norm_silu import group_norm_silu
from .linear import linear
from .linear_int8 import linear_int8, quantize_int8
from .modulation import modulation
from .norm_modulate import norm_modulate
from .norm_modulate_fp8 import norm_modulate_fp8
from .qk_norm_rope import joint_qk_norm_rope, qk_norm_rope, qk_norm_rope_
from .rope_attention import rope_attention
from .timestep_embedding import timestep_embedding

__all__ = [
    "BACKENDS",
    "Backend",
    "Call",
    "Choice",
    "attention",
    "attention_lse",
    "compiled_kernels",
    "explain",
    "gated_residual",
    "gated_residual_norm_modulate",
    "gelu_tanh",
    "gelu_tanh_fp8",
    "group_norm_silu",
    "joint_qk_norm_rope",
    "linear",
    "linear_int8",
    "modulation",
    "names",
    "norm_modulate",
    "norm_modulate_fp8",
    "qk_norm_rope",
    "qk_norm_rope_",
    "quantize_int8",
    "record",
    "register",
    "rope_attention",
    "tile_candidates",
    "timestep_embedding",
    "use_backend",
    "why_not",
]

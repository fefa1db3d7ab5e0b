"""RMSNorm and rotation of q and k, then attention: two launches, q is never written back.

Grid: k by a token a program, into a buffer; attention as in attention.py, which norms and rotates
its tile of q as it loads it. Rotating k there too would repeat it for every tile of queries.
Moves q, k, v and out once, the new k twice more, k and v again for every tile of queries, from L2.
fp32 norm, rotation, softmax and sums; q and k rounded before the products. D <= 256.
"""

from torch import Tensor

from . import qk_norm_rope
from .attention import forward, unsupported

__all__ = ["rope_attention", "unsupported"]


def rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    out: Tensor,
    *,
    tile: str | None = None,
) -> None:
    new_k = k.new_empty(k.shape)
    weights = (k_weight,)
    qk_norm_rope.launch((k,), (k,), (new_k,), weights, weights, cos, sin, 0, 0, eps)
    forward(q, new_k, v, out, None, q_weight, cos, sin, eps, tile)

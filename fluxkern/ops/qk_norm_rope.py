"""RMSNorm of queries and keys over the head dim, then the rotation by position."""

from torch import Tensor

from .. import reference
from . import _checks
from ._op import Op, empty, empty_each

# one stream


def _check(a: _checks.Args) -> None:
    _checks.heads(a, "q")
    _checks.same_heads(a, "q", "k")
    _checks.head_weights(a, "q", "q_weight", "k_weight")
    _checks.rope_tables(a, "q", a["q"].shape[1])


_backward = Op(
    "qk_norm_rope_backward(Tensor dq_out, Tensor dk_out, Tensor q, Tensor k, Tensor q_weight,"
    " Tensor k_weight, Tensor cos, Tensor sin, float eps)"
    " -> (Tensor dq, Tensor dk, Tensor dq_weight, Tensor dk_weight)",
    reference.qk_norm_rope_backward,
    lambda dq_out, dk_out, *args: empty_each(*args[:4]),
    triton="qk_norm_rope",
)
_op = Op(
    "qk_norm_rope(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin,"
    " float eps) -> (Tensor q_out, Tensor k_out)",
    reference.qk_norm_rope,
    lambda q, k, *_: empty_each(q, k),
    _check,
    gradient=_backward,
    triton="qk_norm_rope",
)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Norms q and k over the head dim and rotates their pairs (2i, 2i+1).

    n = x / sqrt(mean(x^2) + eps) * weight
    out[2i] = cos[i] n[2i] - sin[i] n[2i+1];  out[2i+1] = sin[i] n[2i] + cos[i] n[2i+1]

    Args:
        q, k: [B, L, H, D], floating point, D even, last axis contiguous; any views.
        q_weight, k_weight: [D], dtype of q, contiguous.
        cos, sin: [L, D/2], fp32, any strides; the product is rounded once to the dtype of q.
        eps: added to the mean square.
        backend: one of `fluxkern.ops.BACKENDS`; None takes the first that can run.

    Returns:
        (q, k), each [B, L, H, D], dtype of q.

    Raises:
        TypeError: an argument is not a dense tensor; names it.
        ValueError: a shape, dtype, device or stride disagrees; names the argument and both values.
        NotImplementedError: the named backend cannot run this; gives every backend's reason.

    Gradients: q, k and both weights, to any order.
    Source: Zhang and Sennrich, RMSNorm; Su et al., RoFormer;
        black-forest-labs/flux, modules/layers.py, QKNorm, and math.py, apply_rope.
    """
    return _op(q, k, q_weight, k_weight, cos, sin, eps, backend)


# two streams into one


STREAM_WEIGHTS = ("txt_q_weight", "txt_k_weight", "img_q_weight", "img_k_weight")


def _check_joint(a: _checks.Args) -> None:
    _checks.heads(a, "txt_q")
    _checks.same_heads(a, "txt_q", "txt_k", "txt_v")
    _checks.same_heads(a, "txt_q", "img_q", any_length=True)
    _checks.same_heads(a, "img_q", "img_k", "img_v")
    _checks.head_weights(a, "txt_q", *STREAM_WEIGHTS)
    _checks.rope_tables(a, "txt_q", a["txt_q"].shape[1] + a["img_q"].shape[1])


def _joined(txt: Tensor, img: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, txt_len, *heads = txt.shape
    first = empty(txt, (batch, txt_len + img.shape[1], *heads))
    return first, empty(first), empty(first)


_joint_backward = Op(
    "joint_qk_norm_rope_backward(Tensor dq_out, Tensor dk_out, Tensor txt_q, Tensor txt_k,"
    " Tensor img_q, Tensor img_k, Tensor txt_q_weight, Tensor txt_k_weight, Tensor img_q_weight,"
    " Tensor img_k_weight, Tensor cos, Tensor sin, float eps)"
    " -> (Tensor dtxt_q, Tensor dtxt_k, Tensor dimg_q, Tensor dimg_k, Tensor dtxt_q_weight,"
    " Tensor dtxt_k_weight, Tensor dimg_q_weight, Tensor dimg_k_weight)",
    reference.joint_qk_norm_rope_backward,
    lambda dq_out, dk_out, *args: empty_each(*args[:8]),
    triton="qk_norm_rope",
)


def _dv(dv_out: Tensor, txt_q: Tensor) -> dict[str, Tensor]:
    txt_len = txt_q.shape[1]
    return {"txt_v": dv_out[:, :txt_len], "img_v": dv_out[:, txt_len:]}


_joint_op = Op(
    "joint_qk_norm_rope(Tensor txt_q, Tensor txt_k, Tensor txt_v, Tensor img_q, Tensor img_k,"
    " Tensor img_v, Tensor txt_q_weight, Tensor txt_k_weight, Tensor img_q_weight,"
    " Tensor img_k_weight, Tensor cos, Tensor sin, float eps)"
    " -> (Tensor q_out, Tensor k_out, Tensor v_out)",
    reference.joint_qk_norm_rope,
    lambda txt_q, txt_k, txt_v, img_q, *_: _joined(txt_q, img_q),
    _check_joint,
    gradient=_joint_backward,
    passed_on=_dv,
    triton="qk_norm_rope",
)


def joint_qk_norm_rope(
    txt_q: Tensor,
    txt_k: Tensor,
    txt_v: Tensor,
    img_q: Tensor,
    img_k: Tensor,
    img_v: Tensor,
    txt_q_weight: Tensor,
    txt_k_weight: Tensor,
    img_q_weight: Tensor,
    img_k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Text and image projections to the joint q, k, v that attention takes, text first.

    q = cat(txt, img) of qk_norm_rope, k likewise; v = cat(txt_v, img_v)

    Args:
        txt_q, txt_k, txt_v: [B, Lt, H, D], floating point, last axis contiguous; any views.
        img_q, img_k, img_v: [B, Li, H, D], dtype of txt_q.
        txt_q_weight, txt_k_weight, img_q_weight, img_k_weight: [D], dtype of txt_q, contiguous.
        cos, sin: [Lt + Li, D/2], fp32, any strides.
        eps: added to the mean square.
        backend: as in `qk_norm_rope`.

    Returns:
        (q, k, v), each [B, Lt + Li, H, D], dtype of txt_q.

    Raises:
        TypeError, ValueError, NotImplementedError: as `qk_norm_rope`.

    Gradients: the six projections and four weights, to any order.
    Source: black-forest-labs/flux, modules/layers.py, DoubleStreamBlock.forward.
    """
    streams = (txt_q, txt_k, txt_v, img_q, img_k, img_v)
    weights = (txt_q_weight, txt_k_weight, img_q_weight, img_k_weight)
    return _joint_op(*streams, *weights, cos, sin, eps, backend)


# in place


def _check_in_place(a: _checks.Args) -> None:
    _checks.heads(a, "q")
    _checks.same_heads(a, "q", "k")
    _checks.head_weights(a, "q", *STREAM_WEIGHTS)
    _checks.rope_tables(a, "q", a["q"].shape[1])
    _checks.txt_len(a, "q")
    for name, other in (("q", "k"), ("k", "q")):
        _checks.written(a, name, other, *STREAM_WEIGHTS, "cos", "sin")


_in_place_op = Op(
    "qk_norm_rope_(Tensor(a!) q, Tensor(b!) k, Tensor txt_q_weight, Tensor txt_k_weight,"
    " Tensor img_q_weight, Tensor img_k_weight, Tensor cos, Tensor sin, SymInt txt_len, float eps)"
    " -> ()",
    reference.qk_norm_rope_,
    check=_check_in_place,
    autocast=None,
    triton="qk_norm_rope",
)


def qk_norm_rope_(
    q: Tensor,
    k: Tensor,
    txt_q_weight: Tensor,
    txt_k_weight: Tensor,
    img_q_weight: Tensor,
    img_k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    txt_len: int,
    *,
    eps: float = 1e-6,
    backend: str | None = None,
) -> None:
    """`qk_norm_rope` in place on joint views: the first txt_len tokens take the text weights.

    q, k = qk_norm_rope(q, k, ...), written over q and k

    Args:
        q, k: [B, L, H, D], text first, last axis contiguous; overwritten; any views that do not
            overlap.
        txt_q_weight, txt_k_weight, img_q_weight, img_k_weight: [D], dtype of q, contiguous.
        cos, sin: [L, D/2], fp32, any strides.
        txt_len: text tokens, 0 to L; 0 gives all rows the image weights.
        eps: added to the mean square.
        backend: as in `qk_norm_rope`.

    Returns:
        None.

    Raises:
        TypeError, NotImplementedError: as `qk_norm_rope`.
        ValueError: as `qk_norm_rope`; also when an input needs a gradient, or q and k overlap.

    Gradients: none; inference only.
    Source: as `joint_qk_norm_rope`.
    """
    weights = (txt_q_weight, txt_k_weight, img_q_weight, img_k_weight)
    _in_place_op(q, k, *weights, cos, sin, txt_len, eps, backend)

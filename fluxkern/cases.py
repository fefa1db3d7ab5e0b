"""One Case per op: sizes to inputs, and the bytes and FLOPs that no implementation can avoid.

Tests and benchmarks read it. The inputs are the views that a model hands over: chunks of one
modulation, heads of one projection, rows of a longer sequence.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    batch: int = 2
    txt: int = 3
    img: int = 5
    hidden: int = 37
    heads: int = 3
    head_dim: int = 10
    skip: int = 2  # tokens in front of the view
    spare: int = 5  # columns behind the view: rows of the buffer are that much longer
    streams: int = 2  # S of the vectors: text and image, or one for both

    @property
    def tokens(self) -> int:
        return self.txt + self.img

    @property
    def txt_len(self) -> int:
        """That of an op with vectors."""
        return self.txt if self.streams == 2 else 0

    @property
    def stream(self) -> int:
        """Elements of [B, L, C]."""
        return self.batch * self.tokens * self.hidden

    @property
    def heads_of_all(self) -> int:
        """Elements of [B, L, H, D]."""
        return self.batch * self.tokens * self.heads * self.head_dim


def _flux(pixels: int, batch: int = 1) -> Sizes:
    return Sizes(batch, 512, (pixels // 16) ** 2, 3072, 24, 128, skip=0, spare=0)


PIXELS = (512, 1024, 2048)
SHAPES = {  # of benchmarks
    **{f"flux-{pixels}": _flux(pixels) for pixels in PIXELS},
    **{f"flux-{pixels}-batch-4": _flux(pixels, 4) for pixels in PIXELS},
    "compact": Sizes(2, 64, 64, 192, 3, 64, skip=0, spare=0),
}
TEST_SIZES = {
    "odd": Sizes(),
    "odd, to the end of its memory": Sizes(skip=0, spare=0),
    "one of each": Sizes(1, 1, 1, 1, 1, 2),
    "empty batch": Sizes(batch=0),
    "empty text": Sizes(txt=0),
    "no image": Sizes(img=0),
    "FLUX's width": Sizes(1, 2, 3, 3072, 24, 128, skip=0, spare=0),
    "one stream": Sizes(streams=1),
    "one stream of FLUX's width": Sizes(1, 2, 3, 3072, 24, 128, skip=0, spare=0, streams=1),
    "a wide odd row": Sizes(1, 1, 2, 3077, 2, 64, skip=1, spare=3),
}


# the views


def normal(*shape: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    return torch.randn(shape, dtype=torch.float64, device=device).to(dtype)


@dataclass(frozen=True)
class Maker:
    """Draws the inputs of one call."""

    sizes: Sizes
    dtype: torch.dtype
    device: str = "cpu"

    def normal(self, *shape: int) -> Tensor:
        return normal(*shape, dtype=self.dtype, device=self.device)

    def tokens(self) -> Tensor:
        """[B, L, C], rows of a longer and wider buffer."""
        s = self.sizes
        return self.normal(s.batch, s.tokens + s.skip, s.hidden + s.spare)[:, s.skip :, : s.hidden]

    def vectors(self) -> tuple[Tensor, ...]:
        """shift, scale, gate twice, [B, S, C]: chunks of the modulations of all streams."""
        s = self.sizes
        return self.normal(s.batch, s.streams, 6 * s.hidden).chunk(6, -1)

    def qkv(self, length: int) -> tuple[Tensor, ...]:
        """Three [B, length, H, D] of one projection."""
        s = self.sizes
        width = 3 * s.heads * s.head_dim
        projected = self.normal(s.batch, length, width + s.spare)[..., :width]
        return projected.unflatten(-1, (3, s.heads, s.head_dim)).unbind(2)

    def rotations(self) -> dict[str, Tensor]:
        """fp32 [L, D/2], stride-2 views of repeat-interleaved [L, D]."""
        s = self.sizes
        angle = 100 * normal(s.tokens, s.head_dim // 2, dtype=torch.float64, device=self.device)
        return dict(zip(("cos", "sin"), tables(angle), strict=True))

    def stream_weights(self) -> dict[str, Tensor]:
        names = ("txt_q_weight", "txt_k_weight", "img_q_weight", "img_k_weight")
        return dict(zip(names, self.normal(4, self.sizes.head_dim), strict=True))


def tables(angle: Tensor) -> tuple[Tensor, Tensor]:
    """[L, D/2] -> cos and sin, stride-2 views of repeat-interleaved fp32 [L, D]."""
    return tuple(t.repeat_interleave(2, -1).float()[:, ::2] for t in (angle.cos(), angle.sin()))


def _norm_modulate(m: Maker) -> dict[str, Any]:
    shift, scale, *_ = m.vectors()
    return {"x": m.tokens(), "scale": scale, "shift": shift, "txt_len": m.sizes.txt_len}


def _gated_residual(m: Maker) -> dict[str, Any]:
    return {"x": m.tokens(), "y": m.tokens(), "gate": m.vectors()[2], "txt_len": m.sizes.txt_len}


def _fused(m: Maker) -> dict[str, Any]:
    shift, scale, gate, *_ = m.vectors()
    vectors = {"gate": gate, "scale": scale, "shift": shift}
    return {"x": m.tokens(), "y": m.tokens(), **vectors, "txt_len": m.sizes.txt_len}


def _qk_norm_rope(m: Maker) -> dict[str, Any]:
    q, k, _ = m.qkv(m.sizes.tokens)
    q_weight, k_weight = m.normal(2, m.sizes.head_dim)
    return {"q": q, "k": k, "q_weight": q_weight, "k_weight": k_weight, **m.rotations()}


def _joint_qk_norm_rope(m: Maker) -> dict[str, Any]:
    txt = dict(zip(("txt_q", "txt_k", "txt_v"), m.qkv(m.sizes.txt), strict=True))
    img = dict(zip(("img_q", "img_k", "img_v"), m.qkv(m.sizes.img), strict=True))
    return {**txt, **img, **m.stream_weights(), **m.rotations()}


def _in_place(m: Maker) -> dict[str, Any]:
    q, k, _ = m.qkv(m.sizes.tokens)
    return {"q": q, "k": k, **m.stream_weights(), **m.rotations(), "txt_len": m.sizes.txt}


def _attention(m: Maker) -> dict[str, Any]:
    _, k, v = m.qkv(m.sizes.tokens)
    return {"q": m.qkv(m.sizes.tokens)[0], "k": k, "v": v}


def _rope_attention(m: Maker) -> dict[str, Any]:
    args = _qk_norm_rope(m)
    return {"q": args.pop("q"), "k": args.pop("k"), "v": m.qkv(m.sizes.tokens)[2], **args}


def _linear(m: Maker) -> dict[str, Any]:
    hidden = m.sizes.hidden
    weight = m.normal(4 * hidden, hidden) * hidden**-0.5
    bias = m.normal(4 * hidden)
    return {"x": m.tokens(), "weight": weight, "bias": bias, "activation": "gelu_tanh"}


def _linear_int8(m: Maker) -> dict[str, Any]:
    args = _linear(m)
    weight = args.pop("weight").float()
    scale = weight.abs().amax(1) / 127
    quantised = (weight / scale[:, None]).round().to(torch.int8)
    x = args.pop("x")
    return {"x": x, "weight": quantised, "weight_scale": scale, **args, "rotation": 0}


def _modulation(m: Maker) -> dict[str, Any]:
    hidden = m.sizes.hidden
    weight = m.normal(6 * hidden, hidden) * hidden**-0.5
    vec, bias = m.normal(m.sizes.batch, hidden), m.normal(6 * hidden)
    return {"vec": vec, "weight": weight, "bias": bias, "chunks": 6}


def _gelu_tanh(m: Maker) -> dict[str, Any]:
    s = m.sizes
    x = 4 * m.normal(s.batch, s.tokens + s.skip, 4 * s.hidden + s.spare)
    return {"x": x[:, s.skip :, : 4 * s.hidden]}


def _group_norm_silu(m: Maker) -> dict[str, Any]:
    s = m.sizes
    weight, bias = m.normal(2, 4 * s.heads)
    x = 3 + m.normal(s.batch, 4 * s.heads, s.tokens, 7)
    return {"x": x, "weight": weight, "bias": bias, "num_groups": s.heads}


# the ops


@dataclass(frozen=True)
class Case:
    """One op.

    Args:
        inputs: the arguments of the public function, by name and in its order, but for eps.
        moved: elements read and written once each, of the forward.
        moved_backward: the same of the backward; None where there is no backward of ours.
        why: the sentence that derives them.
        flops: of the matrix products, from the arguments.
        backends: those that have a kernel of their own.
        providers: others, in half precision on a GPU; the op names them.
        bytes: moved beside the elements, whatever the dtype.
    """

    inputs: Callable[[Maker], dict[str, Any]]
    moved: Callable[[Sizes], int]
    moved_backward: Callable[[Sizes], int] | None
    why: str
    flops: Callable[[dict[str, Any]], int] = lambda args: 0
    backends: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    bytes: Callable[[Sizes], int] = lambda s: 0


_NORMS = ("cpu", "triton", "cuda")
_FP8 = ("triton", "cuda")  # no product of a CPU takes e4m3 as it is
_PROVIDERS = ("cudnn", "flash3", "flash", "sdpa", "cuda-wgmma")


def _attention_flops(args: dict[str, Any]) -> int:
    return 4 * args["q"].numel() * args["k"].shape[1]


def _product_flops(args: dict[str, Any]) -> int:
    x = args["x"] if "x" in args else args["vec"]
    return 2 * x.numel() * args["weight"].shape[0]


CASES = {
    "norm_modulate": Case(
        _norm_modulate,
        lambda s: 2 * s.stream,
        lambda s: 3 * s.stream,
        "reads x, writes h; backward reads dh and x, writes dx; the vectors are a row each",
        backends=_NORMS,
    ),
    "gated_residual": Case(
        _gated_residual,
        lambda s: 3 * s.stream,
        lambda s: 3 * s.stream,
        "reads x and y, writes x_new; backward reads dx_new and y, writes dy (dx is dx_new)",
        backends=_NORMS,
    ),
    "gated_residual_norm_modulate": Case(
        _fused,
        lambda s: 4 * s.stream,
        lambda s: 6 * s.stream,
        "reads x and y, writes x_new and h; backward reads dx_new, dh, x_new, y, writes dx, dy",
        backends=_NORMS,
    ),
    "qk_norm_rope": Case(
        _qk_norm_rope,
        lambda s: 4 * s.heads_of_all,
        lambda s: 6 * s.heads_of_all,
        "reads and writes q and k; backward reads both gradients and inputs, writes two",
        backends=("cpu", "triton", "cuda"),
    ),
    "joint_qk_norm_rope": Case(
        _joint_qk_norm_rope,
        lambda s: 6 * s.heads_of_all,
        lambda s: 6 * s.heads_of_all,
        "reads and writes q, k and v; backward as qk_norm_rope, dv is a view",
        backends=("cpu", "triton", "cuda"),
    ),
    "qk_norm_rope_": Case(
        _in_place,
        lambda s: 4 * s.heads_of_all,
        None,
        "reads and writes q and k",
        backends=("cpu", "triton", "cuda"),
    ),
    "attention": Case(
        _attention,
        lambda s: 4 * s.heads_of_all,
        lambda s: 8 * s.heads_of_all,
        "reads q, k, v, writes out; backward reads out and dout too and writes three;"
        " two products of L x L x D a head",
        _attention_flops,
        ("cpu", "triton", "cuda"),
        _PROVIDERS,
    ),
    "attention_lse": Case(
        _attention,
        lambda s: 4 * s.heads_of_all,
        lambda s: 8 * s.heads_of_all,
        "as attention",
        _attention_flops,
        ("cpu", "triton", "cuda"),
        _PROVIDERS,
    ),
    "rope_attention": Case(
        _rope_attention,
        lambda s: 4 * s.heads_of_all,
        None,
        "as attention: norm and rotation need no pass of their own",
        _attention_flops,
        ("cpu", "triton", "cuda"),
        _PROVIDERS,
    ),
    "linear": Case(
        _linear,
        lambda s: 5 * s.stream + 4 * s.hidden**2,
        None,
        "reads x and the weight, writes 4 C a token; 2 x 4 C x C a token",
        _product_flops,
        ("cpu", "cuda"),
    ),
    "linear_int8": Case(
        _linear_int8,
        lambda s: 5 * s.stream,
        None,
        "as linear; the weight's elements are a byte each",
        _product_flops,
        ("cpu",),
        bytes=lambda s: 4 * s.hidden**2,
    ),
    "modulation": Case(
        _modulation,
        lambda s: 6 * s.hidden**2,
        None,
        "reads the weight, 6 C x C",
        _product_flops,
        ("cpu", "triton", "cuda"),
    ),
    "gelu_tanh": Case(
        _gelu_tanh,
        lambda s: 8 * s.stream,
        lambda s: 12 * s.stream,
        "reads and writes the MLP's 4 C a token; backward reads two and writes one",
        backends=("cpu", "triton", "cuda"),
    ),
    "group_norm_silu": Case(
        _group_norm_silu,
        lambda s: 2 * s.batch * 4 * s.heads * s.tokens * 7,
        lambda s: 3 * s.batch * 4 * s.heads * s.tokens * 7,
        "reads x, writes the same; backward reads two and writes one",
        backends=("cpu", "triton", "cuda"),
    ),
    "norm_modulate_fp8": Case(
        _norm_modulate,
        lambda s: s.stream,
        None,
        "reads x, writes h in bytes and a float a token",
        backends=_FP8,
        bytes=lambda s: s.stream + 4 * s.batch * s.tokens,
    ),
    "gelu_tanh_fp8": Case(
        _gelu_tanh,
        lambda s: 4 * s.stream,
        None,
        "reads the MLP's 4 C a token, writes them in bytes and a float a token",
        backends=_FP8,
        bytes=lambda s: 4 * s.stream + 4 * s.batch * s.tokens,
    ),
}

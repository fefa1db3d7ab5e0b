"""The FLUX.1 transformer, built on `fluxkern.ops`; parameters carry BFL's names."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .. import ops

TIME_DIM = 256  # sinusoids of timestep and guidance


@dataclass(frozen=True)
class FluxConfig:
    """The sizes of a FLUX.1 transformer.

    Args:
        in_channels: channels of an image token as the model takes it; more than out_channels where
            a condition is concatenated (Fill 384, Control 128).
        out_channels: channels of the predicted velocity.
        vec_in_dim: width of the pooled CLIP vector.
        context_in_dim: width of a T5 token.
        hidden_size: num_heads times the head dim.
        mlp_ratio: MLP width over hidden_size.
        num_heads: attention heads.
        depth: double-stream blocks.
        depth_single_blocks: single-stream blocks.
        axes_dim: head dims given to each position axis; they sum to the head dim.
        theta: base of the rotation frequencies.
        qkv_bias: bias in the double blocks' QKV projections.
        guidance_embed: guidance is an input (guidance-distilled models).

    Raises:
        ValueError: sizes that do not fit together; names both.

    Source: black-forest-labs/flux, model.py, FluxParams.
    """

    in_channels: int = 64
    out_channels: int = 64
    vec_in_dim: int = 768
    context_in_dim: int = 4096
    hidden_size: int = 3072
    mlp_ratio: float = 4.0
    num_heads: int = 24
    depth: int = 19
    depth_single_blocks: int = 38
    axes_dim: tuple[int, ...] = (16, 56, 56)
    theta: int = 10000
    qkv_bias: bool = True
    guidance_embed: bool = True

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_heads, "
                f"got {self.hidden_size} and {self.num_heads}"
            )
        if sum(self.axes_dim) != self.head_dim or any(d % 2 for d in self.axes_dim):
            raise ValueError(
                f"axes_dim must be even and sum to the head dim, {self.head_dim}, "
                f"got {list(self.axes_dim)}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def mlp_size(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)


_DEV = FluxConfig()
CONFIGS = {
    "dev": _DEV,
    "schnell": replace(_DEV, guidance_embed=False),
    "fill": replace(_DEV, in_channels=384),
    "control": replace(_DEV, in_channels=128),
    "kontext": _DEV,
    "compact": FluxConfig(
        vec_in_dim=128,
        context_in_dim=128,
        hidden_size=192,
        num_heads=3,
        depth=2,
        depth_single_blocks=4,
        axes_dim=(16, 24, 24),
        guidance_embed=False,
    ),
}


def rope_tables(ids: Tensor, axes_dim: tuple[int, ...], theta: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every token's rotation.

    angle = position * theta^(-2k / d), k = 0 .. d/2 - 1, axis after axis

    Args:
        ids: [L, axes], positions of the tokens.
        axes_dim: head dims of each axis.
        theta: base of the frequencies.

    Returns:
        (cos, sin), fp32 [L, D/2], computed in fp64.

    Source: Su et al., RoFormer; black-forest-labs/flux, math.py, rope.
    """
    angles = []
    for axis, dim in enumerate(axes_dim):
        k = torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device)
        angles.append(ids[:, axis, None].double() * theta ** (-k / dim))
    angle = torch.cat(angles, -1)  # [L, D/2]
    return angle.cos().float(), angle.sin().float()


class MLPEmbedder(nn.Module):
    """Linear, SiLU, linear: timestep, guidance and pooled text to the width of the model."""

    def __init__(self, in_dim: int, hidden_size: int):
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden_size)
        self.out_layer = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return _linear(torch.nn.functional.silu(_linear(x, self.in_layer)), self.out_layer)


class RMSScale(nn.Module):
    """The weight of an RMSNorm over the head dim; the norm itself is part of the fused ops."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(head_dim))


class QKNorm(nn.Module):
    def __init__(self, head_dim: int):
        super().__init__()
        self.query_norm = RMSScale(head_dim)
        self.key_norm = RMSScale(head_dim)

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        return self.query_norm.scale, self.key_norm.scale


class Modulation(nn.Module):
    """(shift, scale, gate) once or twice, from vec."""

    def __init__(self, hidden_size: int, chunks: int):
        super().__init__()
        self.chunks = chunks
        self.lin = nn.Linear(hidden_size, chunks * hidden_size)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        return ops.modulation(vec, self.lin.weight, self.lin.bias, self.chunks)


class SelfAttention(nn.Module):
    """The projections of one stream of a double block."""

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.norm = QKNorm(config.head_dim)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)


def _linear(x: Tensor, layer: nn.Linear, activation: str | None = None) -> Tensor:
    return ops.linear(x, layer.weight, layer.bias, activation=activation)


def _split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    return qkv.unflatten(-1, (3, num_heads, -1)).unbind(2)  # 3 views [B, L, H, D]


def _mlp(config: FluxConfig) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(config.hidden_size, config.mlp_size),
        nn.GELU(approximate="tanh"),
        nn.Linear(config.mlp_size, config.hidden_size),
    )


class DoubleStreamBlock(nn.Module):
    """Text and image, each with its own weights, attend to each other; then each its own MLP."""

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.num_heads = config.num_heads
        for stream in ("img", "txt"):
            self.add_module(f"{stream}_mod", Modulation(config.hidden_size, 6))
            self.add_module(f"{stream}_attn", SelfAttention(config))
            self.add_module(f"{stream}_mlp", _mlp(config))

    def forward(
        self, img: Tensor, txt: Tensor, vec: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        img_mod, txt_mod = self.img_mod(vec), self.txt_mod(vec)
        img_qkv = self._qkv(self.img_attn, img, img_mod)
        txt_qkv = self._qkv(self.txt_attn, txt, txt_mod)
        q, k, v = ops.joint_qk_norm_rope(
            *txt_qkv, *img_qkv, *self.txt_attn.norm.weights, *self.img_attn.norm.weights, cos, sin
        )
        attn = ops.attention(q, k, v).flatten(2)  # [B, Lt + Li, C]
        txt_attn, img_attn = attn[:, : txt.shape[1]], attn[:, txt.shape[1] :]
        img = self._close(img, img_attn, self.img_attn, self.img_mlp, img_mod)
        txt = self._close(txt, txt_attn, self.txt_attn, self.txt_mlp, txt_mod)
        return img, txt

    def _qkv(self, attn: SelfAttention, x: Tensor, mod: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        shift1, scale1 = mod[:2]
        return _split_heads(_linear(ops.norm_modulate(x, scale1, shift1), attn.qkv), self.num_heads)

    def _close(
        self,
        x: Tensor,
        y: Tensor,
        attn: SelfAttention,
        mlp: nn.Sequential,
        mod: tuple[Tensor, ...],
    ) -> Tensor:
        _, _, gate1, shift2, scale2, gate2 = mod
        x, h = ops.gated_residual_norm_modulate(x, _linear(y, attn.proj), gate1, scale2, shift2)
        h = _linear(_linear(h, mlp[0], "gelu_tanh"), mlp[2])
        return ops.gated_residual(x, h, gate2)


class SingleStreamBlock(nn.Module):
    """Attention and MLP in parallel on the joint sequence, one projection in and one out."""

    def __init__(self, config: FluxConfig):
        super().__init__()
        hidden, mlp = config.hidden_size, config.mlp_size
        self.num_heads = config.num_heads
        self.split = (3 * hidden, mlp)
        self.linear1 = nn.Linear(hidden, 3 * hidden + mlp)
        self.linear2 = nn.Linear(hidden + mlp, hidden)
        self.norm = QKNorm(config.head_dim)
        self.modulation = Modulation(hidden, 3)

    def forward(self, x: Tensor, vec: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(vec)
        h = _linear(ops.norm_modulate(x, scale, shift), self.linear1)
        qkv, mlp = h.split(self.split, -1)
        q, k, v = _split_heads(qkv, self.num_heads)
        attn = ops.rope_attention(q, k, v, *self.norm.weights, cos, sin).flatten(2)
        h = _linear(torch.cat((attn, ops.gelu_tanh(mlp)), -1), self.linear2)
        return ops.gated_residual(x, h, gate)


class LastLayer(nn.Module):
    """Norm, modulate, project to the velocity."""

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.linear = nn.Linear(config.hidden_size, config.out_channels)
        # BFL's name for the layer is adaLN_modulation.1: 0 is its SiLU
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), nn.Linear(config.hidden_size, 2 * config.hidden_size)
        )

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        lin = self.adaLN_modulation[1]
        shift, scale = ops.modulation(vec, lin.weight, lin.bias, 2)
        return _linear(ops.norm_modulate(x, scale, shift), self.linear)


class Flux(nn.Module):
    """The FLUX.1 transformer: image tokens, text tokens and conditions to a velocity.

    Source: black-forest-labs/flux, model.py, Flux.
    """

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        self.img_in = nn.Linear(config.in_channels, hidden)
        self.txt_in = nn.Linear(config.context_in_dim, hidden)
        self.time_in = MLPEmbedder(TIME_DIM, hidden)
        self.vector_in = MLPEmbedder(config.vec_in_dim, hidden)
        if config.guidance_embed:
            self.guidance_in = MLPEmbedder(TIME_DIM, hidden)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(config) for _ in range(config.depth))
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(config) for _ in range(config.depth_single_blocks)
        )
        self.final_layer = LastLayer(config)

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """The velocity at a point of the straight path from noise (timestep 1) to picture (0).

        Args:
            img: [B, Li, in_channels], packed latents, dtype of the weights.
            img_ids: [Li, axes], their positions.
            txt: [B, Lt, context_in_dim], T5 tokens.
            txt_ids: [Lt, axes], zeros.
            timesteps: [B], 0 to 1.
            y: [B, vec_in_dim], pooled CLIP vector.
            guidance: [B], for a model with config.guidance_embed.

        Returns:
            [B, Li, out_channels], dtype of img.

        Raises:
            ValueError: a shape or dtype disagrees with the config or another argument; a guidance
                that is missing, or that the model does not take.

        Gradients: all tensors but ids, and every parameter.
        Source: black-forest-labs/flux, model.py, Flux.forward.
        """
        self._check(img, img_ids, txt, txt_ids, timesteps, y, guidance)
        vec = self._embed(timesteps, y, guidance, img.dtype)
        cos, sin = rope_tables(
            torch.cat((txt_ids, img_ids)), self.config.axes_dim, self.config.theta
        )
        img, txt = _linear(img, self.img_in), _linear(txt, self.txt_in)
        for block in self.double_blocks:
            img, txt = block(img, txt, vec, cos, sin)
        x = torch.cat((txt, img), 1)
        for block in self.single_blocks:
            x = block(x, vec, cos, sin)
        return self.final_layer(x[:, txt.shape[1] :], vec)

    def _embed(
        self, timesteps: Tensor, y: Tensor, guidance: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        vec = self.time_in(ops.timestep_embedding(timesteps.to(dtype), TIME_DIM))
        if guidance is not None:
            vec = vec + self.guidance_in(ops.timestep_embedding(guidance.to(dtype), TIME_DIM))
        return vec + self.vector_in(y)

    def _check(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y: Tensor,
        guidance: Tensor | None,
    ) -> None:
        config, axes = self.config, len(self.config.axes_dim)
        if img.ndim != 3 or txt.ndim != 3:
            raise ValueError(
                f"img and txt must be [B, L, C], got {list(img.shape)} and {list(txt.shape)}"
            )
        batch = img.shape[0]
        expected = {
            "img": (img, (batch, img.shape[1], config.in_channels)),
            "img_ids": (img_ids, (img.shape[1], axes)),
            "txt": (txt, (batch, txt.shape[1], config.context_in_dim)),
            "txt_ids": (txt_ids, (txt.shape[1], axes)),
            "timesteps": (timesteps, (batch,)),
            "y": (y, (batch, config.vec_in_dim)),
        }
        if config.guidance_embed != (guidance is not None):
            wanted, found = ("[B]", None) if config.guidance_embed else (None, "a tensor")
            raise ValueError(f"guidance must be {wanted} for this model, got {found}")
        if guidance is not None:
            expected["guidance"] = (guidance, (batch,))
        for name, (tensor, shape) in expected.items():
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")

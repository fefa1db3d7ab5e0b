"""The FLUX.1 autoencoder: pixels to latents with 16 channels at an eighth of the size, and back."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .layers import Places, compute_dtype, conv1x1, execution_device, group_norm_silu

NORM_EPS = 1e-6
LOGVAR_RANGE = (-30.0, 20.0)


@dataclass(frozen=True)
class AutoEncoderConfig:
    """Sizes of an autoencoder; the defaults are those of every FLUX.1 model.

    Args:
        in_channels, out_channels: channels of the picture taken and of the picture made.
        ch: channels at full resolution; ch_mult multiplies it, level by level downwards.
        num_res_blocks: residual blocks a level in the encoder; the decoder has one more.
        z_channels: channels of the latents.
        norm_num_groups: groups of every GroupNorm.
        scale_factor, shift_factor: latents are (z - shift_factor) * scale_factor.
    Raises:
        ValueError: a size that is not a positive integer, channels that the groups do not
            divide, or a scale_factor of zero.
    Source: AutoEncoderParams of black-forest-labs/flux.
    """

    in_channels: int = 3
    out_channels: int = 3
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    norm_num_groups: int = 32
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159

    def __post_init__(self) -> None:
        object.__setattr__(self, "ch_mult", tuple(self.ch_mult))
        sizes = ("in_channels", "out_channels", "ch", "num_res_blocks", "z_channels")
        for name in (*sizes, "norm_num_groups"):
            _check_positive(name, getattr(self, name))
        if not self.ch_mult:
            raise ValueError("ch_mult must name at least 1 level, got 0")
        for mult in self.ch_mult:
            _check_positive("ch_mult", mult)
            if self.ch * mult % self.norm_num_groups:
                raise ValueError(
                    f"norm_num_groups {self.norm_num_groups} does not divide "
                    f"the {self.ch * mult} channels of ch * ch_mult"
                )
        if not self.scale_factor:
            raise ValueError(f"scale_factor must not be 0, got {self.scale_factor}")

    @property
    def downscale(self) -> int:
        """Pixels a latent cell covers along one side."""
        return 2 ** (len(self.ch_mult) - 1)


def _check_positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def _norm(config: AutoEncoderConfig, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(config.norm_num_groups, channels, eps=NORM_EPS)


def _conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


class ResnetBlock(nn.Module):
    """Two norm-SiLU-convolution steps beside a shortcut."""

    def __init__(self, config: AutoEncoderConfig, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = _norm(config, in_channels)
        self.conv1 = _conv3x3(in_channels, out_channels)
        self.norm2 = _norm(config, out_channels)
        self.conv2 = _conv3x3(out_channels, out_channels)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        else:
            self.nin_shortcut = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(group_norm_silu(x, self.norm1))
        h = self.conv2(group_norm_silu(h, self.norm2))
        return self.nin_shortcut(x) + h

    def places(self) -> Places:
        return {name: ("group_norm_silu", getattr(self, name)) for name in ("norm1", "norm2")}


class AttnBlock(nn.Module):
    """Attention with one head over all pixels of the coarsest level."""

    def __init__(self, config: AutoEncoderConfig, channels: int) -> None:
        super().__init__()
        self.norm = _norm(config, channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x).flatten(2).transpose(1, 2).contiguous()  # [B, H*W, C]
        q, k, v = (conv1x1(h, conv).unsqueeze(2) for conv in (self.q, self.k, self.v))
        h = conv1x1(ops.attention(q, k, v).squeeze(2), self.proj_out)
        return x + h.transpose(1, 2).reshape(x.shape)

    def places(self) -> Places:
        return {name: ("conv1x1", getattr(self, name)) for name in ("q", "k", "v", "proj_out")}


class Downsample(nn.Module):
    """Halves both sides: one row and column of zeros at the far edges, then a stride of 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles both sides by repeating pixels, then convolves."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Mid(nn.Module):
    """The coarsest level: residual block, attention, residual block."""

    def __init__(self, config: AutoEncoderConfig, channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(config, channels, channels)
        self.attn_1 = AttnBlock(config, channels)
        self.block_2 = ResnetBlock(config, channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """The residual blocks of one resolution, then the change to the next, if there is one."""

    def __init__(
        self, config: AutoEncoderConfig, in_channels: int, out_channels: int, count: int
    ) -> None:
        super().__init__()
        sizes = [in_channels] + [out_channels] * count
        self.block = nn.ModuleList(
            ResnetBlock(config, before, after) for before, after in pairwise(sizes)
        )
        self.downsample: nn.Module = nn.Identity()
        self.upsample: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return self.upsample(self.downsample(x))


class Encoder(nn.Module):
    """Picture [B, in, H, W] -> mean and log-variance [B, 2 z, H/8, W/8] (8: config.downscale)."""

    def __init__(self, config: AutoEncoderConfig) -> None:
        super().__init__()
        widths = [config.ch * mult for mult in config.ch_mult]
        self.conv_in = _conv3x3(config.in_channels, config.ch)
        self.down = nn.ModuleList(
            Level(config, before, width, config.num_res_blocks)
            for before, width in zip([config.ch, *widths], widths, strict=False)
        )
        for level, width in zip(self.down[:-1], widths, strict=False):
            level.downsample = Downsample(width)
        self.mid = Mid(config, widths[-1])
        self.norm_out = _norm(config, widths[-1])
        self.conv_out = _conv3x3(widths[-1], 2 * config.z_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(group_norm_silu(self.mid(h), self.norm_out))

    def places(self) -> Places:
        return {"norm_out": ("group_norm_silu", self.norm_out)}


class Decoder(nn.Module):
    """Latents [B, z, H/8, W/8] -> picture [B, out, H, W]; up.0 is the full resolution."""

    def __init__(self, config: AutoEncoderConfig) -> None:
        super().__init__()
        widths = [config.ch * mult for mult in config.ch_mult]
        self.conv_in = _conv3x3(config.z_channels, widths[-1])
        self.mid = Mid(config, widths[-1])
        self.up = nn.ModuleList(
            Level(config, before, width, config.num_res_blocks + 1)
            for before, width in zip([*widths[1:], widths[-1]], widths, strict=True)
        )
        for level, width in zip(self.up[1:], widths[1:], strict=True):
            level.upsample = Upsample(width)
        self.norm_out = _norm(config, widths[0])
        self.conv_out = _conv3x3(widths[0], config.out_channels)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(group_norm_silu(h, self.norm_out))

    def places(self) -> Places:
        return {"norm_out": ("group_norm_silu", self.norm_out)}


class AutoEncoder(nn.Module):
    """FLUX's variational autoencoder, with parameters named as in `ae.safetensors`.

    Pictures and latents with a side above `tile_latent` latent cells (1024 px) go through the
    networks tile by tile, so memory is bounded by one tile and the picture itself: for 1024 px in
    fp32 about 5.5 GB to decode and 3.5 GB to encode, besides 0.3 GB of weights. Neighbouring tiles
    share at least `tile_overlap` cells and are blended linearly there; as GroupNorm and attention
    see one tile at a time, the result is near that of the whole picture, not equal to it.

    Args:
        config: the sizes.
    Source: AutoEncoder of black-forest-labs/flux.
    """

    def __init__(self, config: AutoEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.tile_latent = 128
        self.tile_overlap = 32
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return execution_device(self)

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return compute_dtype(self, nn.GroupNorm)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior of a picture, neither scaled nor shifted.

        Args:
            x: [B, 3, H, W] in -1..1; H and W multiples of 8 (of `config.downscale`).
        Returns:
            mean, logvar: each [B, 16, H/8, W/8]; logvar is clamped to -30..20.
        Raises:
            ValueError: x has the wrong rank, channels or sides.
        Source: Encoder and DiagonalGaussian of black-forest-labs/flux.
        """
        _check_picture("x", x, self.config.in_channels)
        cell = self.config.downscale
        if x.shape[2] % cell or x.shape[3] % cell:
            raise ValueError(f"x must have sides that are multiples of {cell}, got {_sides(x)}")
        mean, logvar = self._tiled(self.encoder, x, cell, 1).chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Scaled latents of a picture.

        z = (mean + exp(logvar / 2) * noise - shift_factor) * scale_factor

        Args:
            x: [B, 3, H, W] in -1..1; H and W multiples of 8 (of `config.downscale`).
            generator: draws the noise, on its own device; None takes the mean.
        Returns:
            [B, 16, H/8, W/8], the latents that the transformer denoises.
        Raises:
            ValueError: x has the wrong rank, channels or sides.
        Source: AutoEncoder.encode of black-forest-labs/flux.
        """
        z, logvar = self.moments(x)
        if generator is not None:
            noise = torch.randn(
                z.shape, generator=generator, device=generator.device, dtype=z.dtype
            )
            z = z + torch.exp(0.5 * logvar) * noise.to(z.device)
        return (z - self.config.shift_factor) * self.config.scale_factor

    def decode(self, z: Tensor) -> Tensor:
        """The picture of scaled latents.

        x = decoder(z / scale_factor + shift_factor)

        Args:
            z: [B, 16, H/8, W/8], as `encode` returns them; any sides.
        Returns:
            [B, 3, H, W], about -1..1, not clamped.
        Raises:
            ValueError: z has the wrong rank, channels or sides, or the tile sizes make no sense.
        Source: AutoEncoder.decode of black-forest-labs/flux.
        """
        _check_picture("z", z, self.config.z_channels)
        z = z / self.config.scale_factor + self.config.shift_factor
        return self._tiled(self.decoder, z, 1, self.config.downscale)

    def _tiled(
        self, run: Callable[[Tensor], Tensor], x: Tensor, in_cell: int, out_cell: int
    ) -> Tensor:
        # in_cell, out_cell: side of one latent cell in x and in the result
        rows, cols = x.shape[2] // in_cell, x.shape[3] // in_cell
        if max(rows, cols) <= self.tile_latent:
            return run(x)
        row_spans, col_spans = (
            tile_spans(n, self.tile_latent, self.tile_overlap) for n in (rows, cols)
        )
        row_weights, col_weights = (
            blend_weights(spans, self.tile_overlap, out_cell).to(x.device)
            for spans in (row_spans, col_spans)
        )
        out: Tensor | None = None
        for (top, bottom), row_weight in zip(row_spans, row_weights, strict=True):
            for (left, right), col_weight in zip(col_spans, col_weights, strict=True):
                inside = _window(in_cell, top, bottom, left, right)
                outside = _window(out_cell, top, bottom, left, right)
                tile = run(x[inside])
                if out is None:
                    accumulator = torch.promote_types(tile.dtype, torch.float32)
                    size = (x.shape[0], tile.shape[1], rows * out_cell, cols * out_cell)
                    out = torch.zeros(size, dtype=accumulator, device=x.device)
                out[outside] += tile * row_weight[outside[2], None] * col_weight[outside[3]]
        return out.to(x.dtype)


def tile_spans(length: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """The (start, stop) of the fewest equal tiles that cover a side, evenly spread.

    Args:
        length: cells to cover.
        tile: largest length of a tile.
        overlap: cells that neighbours share at least.
    Returns:
        Spans from 0 to length, in order.
    Raises:
        ValueError: overlap is below 1 or above half a tile.
    """
    if not 1 <= overlap <= tile // 2:
        raise ValueError(
            f"tile_overlap must be 1..{tile // 2} (half of tile_latent), got {overlap}"
        )
    if length <= tile:
        return [(0, length)]
    count = -(-(length - overlap) // (tile - overlap))
    size = -(-(length + (count - 1) * overlap) // count)
    starts = [i * (length - size) // (count - 1) for i in range(count)]
    return [(start, start + size) for start in starts]


def blend_weights(spans: list[tuple[int, int]], overlap: int, cell: int) -> Tensor:
    """Share of every tile in every element of one side; the shares of an element sum to 1.

    A tile counts for nothing in the quarter of the overlap next to an edge that it does not share
    with the picture, where its padding shows, and rises linearly over the following half.

    Args:
        spans: the tiles, in cells, from `tile_spans`.
        overlap: cells that neighbours share at least.
        cell: elements a cell.
    Returns:
        [tiles, elements], fp32.
    """
    length = spans[-1][1]
    f64_on_cpu = {"dtype": torch.float64, "device": "cpu"}
    position = (torch.arange(length * cell, **f64_on_cpu) + 0.5) / cell
    weights = torch.ones(len(spans), length * cell, **f64_on_cpu)
    for weight, (start, stop) in zip(weights, spans, strict=True):
        if start > 0:
            weight *= _ramp(position - start, overlap)
        if stop < length:
            weight *= _ramp(stop - position, overlap)
    return (weights / weights.sum(0)).float()


def _ramp(distance: Tensor, overlap: int) -> Tensor:
    return ((distance - overlap / 4) / (overlap / 2)).clamp(0, 1)


def _window(cell: int, top: int, bottom: int, left: int, right: int) -> tuple[slice, ...]:
    everything = slice(None)
    rows, cols = slice(top * cell, bottom * cell), slice(left * cell, right * cell)
    return everything, everything, rows, cols


def _sides(x: Tensor) -> str:
    return f"{x.shape[2]} x {x.shape[3]}"


def _check_picture(name: str, x: Tensor, channels: int) -> None:
    if x.dim() != 4:
        raise ValueError(f"{name} must be [B, {channels}, H, W], got shape {tuple(x.shape)}")
    if x.shape[1] != channels:
        raise ValueError(f"{name} must have {channels} channels, got {x.shape[1]}")
    if not x.shape[2] or not x.shape[3]:
        raise ValueError(f"{name} must have sides of at least 1, got {_sides(x)}")

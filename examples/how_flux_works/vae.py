"""Convolution, pooling and equivariance, on the shipped VAE."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fluxkern import FluxPipeline
from fluxkern.compact.drawings import Scene
from fluxkern.compact.evaluate import to_pictures
from fluxkern.model.autoencoder import AutoEncoder, AutoEncoderConfig

from . import plotting
from .common import Size, drawings, parameters, power

SHIFTS = range(17)
SCENES = [
    Scene("star", "yellow", "medium", "centre", "blue"),
    Scene("cross", "red", "medium", "centre", "white"),
    Scene("ring", "green", "medium", "centre", "black"),
    Scene("triangle", "cyan", "medium", "centre", "purple"),
]


@torch.no_grad()
def features(vae: AutoEncoder, x: Tensor) -> dict[str, Tensor]:
    """What each part of the encoder gives, by the part's name."""
    encoder = vae.encoder
    found = {"conv_in": encoder.conv_in(x)}
    h = found["conv_in"]
    for i, level in enumerate(encoder.down):
        for block in level.block:
            h = block(h)
        found[f"down.{i}.block"] = h
        h = level.downsample(h)
        if i < len(encoder.down) - 1:
            found[f"down.{i}.downsample"] = h
    found["mid"] = encoder.mid(h)
    found["encode"] = vae.encode(x)
    return found


def convolution(pipe: FluxPipeline, size: Size, folder: Path) -> dict:
    """One output pixel of conv_in by hand, then all of them."""
    conv, picture = pipe.vae.encoder.conv_in, drawings(SCENES[:1])
    with torch.no_grad():
        out = conv(picture)[0]
    channel = int(out.std((1, 2)).argmax())
    weight, bias = conv.weight[channel].detach(), float(conv.bias[channel].detach())
    places = [(20, 20), (51, 64), (78, 50)]
    by_hand = []
    fig, axes = plotting.figure(9.2, 3.1, 1, 4, width_ratios=[1, 0.5, 1, 0.8])
    plotting.tile(axes[0, 0], to_pictures(picture)[0], "the picture, with three windows")
    colours = (plotting.ORANGE, plotting.GREEN, plotting.PURPLE)
    for (row, column), colour in zip(places, colours, strict=True):
        window = picture[0, :, row - 1 : row + 2, column - 1 : column + 2]
        by_hand.append(float((window * weight).sum()) + bias)
        for axis in axes[0, [0, 2]]:
            axis.plot(column, row, "s", ms=9, mfc="none", mec="white", mew=3.6)
            axis.plot(column, row, "s", ms=9, mfc="none", mec=colour, mew=1.8)
    plotting.signed(axes[0, 1], weight.flatten(0, 1), "its 27 weights")
    axes[0, 1].set_yticks([1, 4, 7], ["red", "green", "blue"])
    axes[0, 1].tick_params(length=0)
    for y in (2.5, 5.5):
        axes[0, 1].axhline(y, color="white", lw=4)
    plotting.numbers(axes[0, 1], weight.flatten(0, 1).numpy())
    plotting.signed(axes[0, 2], out[channel], f"channel {channel} of conv_in")
    lines = ["sum(window * weights) + bias", f"{'row, col':8}{'by hand':>9}{'conv_in':>9}"]
    for (row, column), value in zip(places, by_hand, strict=True):
        lines.append(f"{row:3}, {column:3}{value:9.4f}{float(out[channel, row, column]):9.4f}")
    plotting.empty(axes[0, 3], 1, 1)
    for i, line in enumerate(lines):
        colour = (plotting.INK, plotting.INK, *colours)[i]
        font = {"family": "monospace", "fontsize": 8, "fontweight": "bold"}
        axes[0, 3].text(0, 0.25 + 0.12 * i, line, color=colour, **font)
    plotting.save(fig, folder, "convolution")
    error = max(
        abs(value - float(out[channel, row, column]))
        for (row, column), value in zip(places, by_hand, strict=True)
    )
    dense = picture[0].numel() * out.numel()
    return {
        "conv_weights": f"{conv.weight.numel() + conv.bias.numel():,}",
        "conv_dense": f"{dense:,}",
        "conv_error": power(error),
    }


def feature_maps(pipe: FluxPipeline, size: Size, folder: Path) -> dict:
    """Eight channels at each level of the encoder, then the picture from the latents."""
    vae, picture = pipe.vae, drawings(SCENES[:1])
    found = features(vae, picture)
    shown = ("conv_in", "down.0.downsample", "down.1.downsample", "down.2.downsample", "encode")
    fig, axes = plotting.figure(9.2, 6.0, len(shown), 8)
    for row, name in zip(axes, shown, strict=True):
        maps = found[name][0]
        loudest = maps.std((1, 2)).argsort(descending=True)[:8].sort().values
        for axis, channel in zip(row, loudest.tolist(), strict=True):
            plotting.tile(axis, maps[channel], f"{channel}", cmap=plotting.POSITIVE)
        plotting.row_label(row[0], f"{name}\n{' x '.join(map(str, maps.shape))}")
    plotting.save(fig, folder, "feature-maps")
    with torch.no_grad():
        pictures = drawings(SCENES)
        back = vae.decode(vae.encode(pictures))
    with torch.device("meta"):
        flux = AutoEncoder(AutoEncoderConfig())
    return {
        "vae_parameters": f"{parameters(vae) / 1e6:.2f}",
        "vae_psnr": f"{float(psnr(back, pictures).mean()):.1f}",
        "flux_vae_parameters": f"{parameters(flux) / 1e6:.1f}",
        "scale_factor": f"{vae.config.scale_factor:.4f}",
        "shift_factor": f"{vae.config.shift_factor:.4f}",
    }


def psnr(found: Tensor, picture: Tensor) -> Tensor:
    """[B], in dB."""
    error = ((found.clamp(-1, 1) - picture) / 2).square().mean((1, 2, 3))
    return -10 * error.log10()


def middle(x: Tensor) -> Tensor:
    """The middle half of both sides."""
    n = x.shape[-1] // 4
    return x[..., n:-n, n:-n]


def shift_error(moved: Tensor, still: Tensor, ground: Tensor, shift: int, stride: int) -> float:
    """|f(shift x) - shift f(x)| against what the object adds, at the better whole number of cells.

    moved is f(shift x), still f(x), ground f(background), each [B, C, H, W]; shift in pixels.
    """
    cells = {shift // stride, -(-shift // stride)}
    pairs = ((middle(moved), middle(torch.roll(still, n, -1))) for n in cells)
    return min(float((a - b).norm() / middle(still - ground).norm()) for a, b in pairs)


def on_canvas(pictures: Tensor, side: int) -> Tensor:
    """The drawings in the middle of a larger plain background."""
    margin = (side - pictures.shape[-1]) // 2
    out = pictures[:, :, :1, :1].repeat(1, 1, side, side)
    out[:, :, margin : side - margin, margin : side - margin] = pictures
    return out


def equivariance(pipe: FluxPipeline, size: Size, folder: Path) -> dict:
    """Shifts of the picture against shifts of what the encoder makes of it."""
    vae = pipe.vae
    count = min(size.pictures, len(SCENES))
    x = on_canvas(drawings(SCENES[:count]), size.canvas)
    still, ground = features(vae, x), features(vae, x[:, :, :1, :1].expand_as(x))
    parts = {
        "conv_in": ("conv_in, stride 1", plotting.INK, "o"),
        "down.0.downsample": ("down.0.downsample, 2 px a cell", plotting.ORANGE, "s"),
        "down.1.downsample": ("down.1.downsample, 4 px a cell", plotting.GREEN, "^"),
        "encode": ("encode, 8 px a cell", plotting.BLUE, "D"),
    }
    errors: dict[str, list[float]] = {name: [] for name in parts}
    for shift in SHIFTS:
        moved = features(vae, torch.roll(x, shift, -1))
        for name in parts:
            stride = size.canvas // still[name].shape[-1]
            error = shift_error(moved[name], still[name], ground[name], shift, stride)
            errors[name].append(error)
    near = drawings(SCENES[:count])
    kept = []
    for shift in SHIFTS:
        moved = torch.roll(near, shift, -1)
        with torch.no_grad():
            kept.append(float(psnr(vae.decode(vae.encode(moved)), moved).mean()))
    fig, axes = plotting.figure(9.2, 3.6, 1, 2, width_ratios=[1.7, 1])
    left, right = axes[0]
    for name, (label, colour, marker) in parts.items():
        y = np.maximum(errors[name], 1e-8)
        left.semilogy(list(SHIFTS), y, marker=marker, color=colour, ms=4.5, lw=1.2, label=label)
    left.set_ylim(4e-9, 60)
    left.set_yticks([10.0**p for p in range(-8, 1)])
    left.set_xticks(list(SHIFTS)[::2])
    left.set_xlabel("shift of the picture, px")
    left.set_ylabel("equivariance error (0 drawn at 1e-8)")
    left.legend(loc="upper center", ncols=2, fontsize=8)
    right.plot(list(SHIFTS), kept, "o-", color=plotting.BLUE, ms=4.5, lw=1.2)
    right.set_ylim(min(kept) - 3, max(kept) + 3)
    right.set_xticks(list(SHIFTS)[::2])
    right.set_xlabel("shift of the picture, px")
    right.set_ylabel("decode(encode(shifted)), PSNR in dB")
    plotting.save(fig, folder, "equivariance")
    odd = [e for shift, e in zip(SHIFTS, errors["encode"], strict=True) if shift % 2]
    return {
        "equivariance_8": power(max(errors["encode"][8::8])),
        "equivariance_odd_least": f"{min(odd):.2f}",
        "equivariance_odd_most": f"{max(odd):.2f}",
        "equivariance_4": f"{errors['encode'][4]:.2f}",
        "equivariance_border": power(border_error(vae, near)),
        "shift_psnr_least": f"{min(kept):.1f}",
        "shift_psnr_most": f"{max(kept):.1f}",
    }


@torch.no_grad()
def border_error(vae: AutoEncoder, x: Tensor) -> float:
    """The error of a shift by one cell at the size of the model's own pictures."""
    moved, ground = (vae.encode(t) for t in (torch.roll(x, 8, -1), x[:, :, :1, :1].expand_as(x)))
    return shift_error(moved, vae.encode(x), ground, 8, 8)


def pooling(pipe: FluxPipeline, size: Size, folder: Path) -> dict:
    """The learned Downsample beside two poolings of the same feature maps."""
    downsample = pipe.vae.encoder.down[0].downsample
    ways = {
        "Downsample": downsample,
        "max pooling": lambda h: F.max_pool2d(h, 2),
        "mean pooling": lambda h: F.avg_pool2d(h, 2),
    }
    x = on_canvas(drawings(SCENES[:1]), size.canvas)
    ground, *by_shift = (
        features(pipe.vae, pixels)["down.0.block"]
        for pixels in (x[:, :, :1, :1].expand_as(x), *(torch.roll(x, s, -1) for s in range(3)))
    )
    fig, axes = plotting.figure(9.2, 5.4, 3, 5, width_ratios=[1.25, 1, 1, 1, 1.25])
    channel, figures = int(middle(by_shift[0]).std((2, 3)).argmax()), {}
    for row, (name, way) in zip(axes, ways.items(), strict=True):
        with torch.no_grad():
            plain, still, *moved = (way(h) for h in (ground, *by_shift))
        errors = [shift_error(h, still, plain, i + 1, 2) for i, h in enumerate(moved)]
        compared(row[1:], crop(still[0, channel], 40), crop(moved[0][0, channel], 40), errors)
        row[1].set_ylabel(name, fontsize=9)
        key = name.split()[0].lower()
        figures |= {f"{key}_1": f"{errors[0]:.2f}", f"{key}_2": power(errors[1])}
    source = crop(by_shift[0][0, channel], 80)
    plotting.tile(axes[0, 0], source, f"down.0.block, channel {channel}", cmap=plotting.POSITIVE)
    weight = downsample.conv.weight.detach()  # [C, C, 3, 3]
    plotting.signed(axes[1, 0], as_sheet(weight), f"Downsample: {weight.numel():,} weights")
    one = F.pad(torch.full((2, 2), 0.25), (0, 1, 0, 1))
    mean = torch.eye(weight.shape[0])[:, :, None, None] * one
    plotting.signed(axes[2, 0], as_sheet(mean), "mean pooling, written so")
    plotting.save(fig, folder, "pooling")
    own = torch.diagonal(weight, dim1=0, dim2=1).square().sum() / weight.square().sum()
    return figures | {
        "downsample_weights": f"{parameters(downsample):,}",
        "downsample_cross": f"{100 * (1 - float(own)):.0f}",
    }


def compared(axes: np.ndarray, still: Tensor, moved: Tensor, errors: list[float]) -> None:
    """Two maps, their difference, and the errors of shifts by 1 and 2 pixels as bars."""
    plotting.tile(axes[0], still, "of the picture", cmap=plotting.POSITIVE)
    plotting.tile(axes[1], moved, "shifted by 1 px", cmap=plotting.POSITIVE)
    plotting.signed(axes[2], moved - still, "difference")
    bars = axes[3].barh(["1 px", "2 px"], errors, color=plotting.ORANGE, height=0.6)
    axes[3].bar_label(bars, [f" {e:.2f}" for e in errors], fontsize=8)
    axes[3].set_xlim(0, 0.23)
    axes[3].set_xticks([0, 0.1, 0.2])
    axes[3].invert_yaxis()
    axes[3].set_title("equivariance error", fontsize=8)


def as_sheet(weight: Tensor) -> Tensor:
    """Kernels [Cout, Cin, 3, 3] side by side, a row for each output."""
    return weight.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)


def crop(x: Tensor, side: int) -> Tensor:
    """The middle of a map."""
    top = (x.shape[-1] - side) // 2
    return x[..., top : top + side, top : top + side]

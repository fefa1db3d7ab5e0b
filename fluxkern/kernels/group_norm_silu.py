"""GroupNorm with weights, then SiLU, on contiguous or channels-last pixels.

Grid: statistics over runs of pixels of a group, merged; then 2048 elements a program; backward the
same with sums per channel in between.
Moves x twice and the result once; backward x three times, dy twice and dx once.
fp32; mean and squares of a tile in two passes, tiles merged after Chan et al. in fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._rows import MAX_B, sum_partials

TILE = 2048  # 4 warps, 16 elements a thread
MAX_RUNS = 512  # of a group or channel; one program adds them up
PROGRAMS = 2048  # that fill a GPU: with many groups or channels their runs are few and long


def channels_last(x: Tensor) -> bool:
    last = x.is_contiguous(memory_format=torch.channels_last)
    return last and not x.is_contiguous()


def unsupported(name: str, *args: object) -> str | None:
    images = [t for t in args if isinstance(t, Tensor) and t.ndim == 4]
    batch, channels = images[0].shape[:2]
    if not (all(map(channels_last, images)) or all(t.is_contiguous() for t in images)):
        return f"takes contiguous or channels-last images, got strides {images[0].stride()}"
    if batch > MAX_B or not 0 < channels <= MAX_B:
        return f"takes {MAX_B} batch elements and 1 to {MAX_B} channels, got {batch}, {channels}"
    return None


def split(pixels: int, block_p: int, others: int) -> tuple[int, int]:
    """-> (runs of tiles, tiles of a run) for each of `others` programs."""
    tiles = triton.cdiv(pixels, block_p)
    length = max(1, triton.cdiv(tiles, max(1, min(MAX_RUNS, PROGRAMS // others))))
    return triton.cdiv(tiles, length), length


# statistics of groups


@triton.jit
def group_tile_stats(x, mask, count):
    """[pixels, groups, channels] -> mean and sum of squares about it, [groups]"""
    mean = tl.sum(tl.sum(tl.where(mask, x, 0.0), 2), 0) / tl.maximum(count, 1)
    centred = tl.where(mask, x - mean[None, :, None], 0.0)
    return mean, tl.sum(tl.sum(centred * centred, 2), 0)


@triton.jit(do_not_specialize=("tiles",))
def group_stats_kernel(
    x_ptr,
    runs_ptr,  # [B, runs, 3, G] fp32: count, mean, sum of squares
    stride_b,
    stride_p,
    stride_g,
    P,
    G,
    tiles,  # of a run
    CHANNELS: tl.constexpr,  # of a group, contiguous
    BLOCK_P: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    run, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    groups = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    c = tl.arange(0, BLOCK_C)
    x_ptr += b * stride_b + (groups.to(tl.int64) * stride_g)[:, None] + c[None, :]
    inside = (groups < G)[:, None] & (c < CHANNELS)[None, :]
    total = tl.zeros((1,), tl.float32)
    mean, squares = tl.zeros((BLOCK_G,), tl.float32), tl.zeros((BLOCK_G,), tl.float32)
    for i in range(tiles):
        start = (run.to(tl.int64) * tiles + i) * BLOCK_P
        p = start + tl.arange(0, BLOCK_P)
        mask = (p < P)[:, None, None] & inside[None, :, :]
        at = (p * stride_p)[:, None, None] + x_ptr[None, :, :]
        x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        count = tl.minimum(tl.maximum(P - start, 0), BLOCK_P).to(tl.float32) * CHANNELS
        tile_mean, tile_squares = group_tile_stats(x, mask, count)
        delta, share = tile_mean - mean, count / tl.maximum(total + count, 1)
        squares += tile_squares + delta * delta * (total * share)
        mean += delta * share
        total += count
    out_ptr = runs_ptr + (b * tl.num_programs(0) + run) * 3 * G + groups
    tl.store(out_ptr, tl.broadcast_to(total, (BLOCK_G,)), mask=groups < G)
    tl.store(out_ptr + G, mean, mask=groups < G)
    tl.store(out_ptr + 2 * G, squares, mask=groups < G)


@triton.jit(do_not_specialize=("runs",))
def merge_stats_kernel(
    runs_ptr,
    stats_ptr,  # [B, 2, G] fp32: mean, 1 / std
    runs,
    eps,
    BLOCK_R: tl.constexpr,
):
    g, G, b = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    run = tl.arange(0, BLOCK_R)
    ptr, mask = runs_ptr + (b * runs + run) * 3 * G + g, run < runs
    count = tl.load(ptr, mask=mask, other=0.0)
    means = tl.load(ptr + G, mask=mask, other=0.0)
    squares = tl.load(ptr + 2 * G, mask=mask, other=0.0)
    total = tl.maximum(tl.sum(count, 0), 1)
    mean = tl.sum(count * means, 0) / total
    delta = means - mean
    variance = tl.sum(squares + count * delta * delta, 0) / total
    tl.store(stats_ptr + b * 2 * G + g, mean)
    tl.store(stats_ptr + (b * 2 + 1) * G + g, tl.rsqrt(variance + eps))


def group_stats(x: Tensor, num_groups: int, eps: float) -> Tensor:
    """[B, 2, G] fp32: mean and 1 / std."""
    batch, channels, height, width = x.shape
    size, pixels = channels // num_groups, height * width
    if channels_last(x):
        block_g, block_c = triton.next_power_of_2(num_groups), triton.next_power_of_2(size)
        layout = (channels * pixels, channels, size, pixels)
    else:  # a group is one run of numbers
        block_g, block_c, layout = 1, 1, (channels * pixels, 1, size * pixels, size * pixels)
    block_p = max(1, TILE // (block_g * block_c))
    columns = triton.cdiv(num_groups, block_g)
    runs, tiles = split(layout[3], block_p, max(1, batch * columns))
    partials = x.new_empty((batch, runs, 3, num_groups), dtype=torch.float32)
    group_stats_kernel[(runs, columns, batch)](
        x,
        partials,
        *layout,
        num_groups,
        tiles,
        CHANNELS=size if channels_last(x) else 1,
        BLOCK_P=block_p,
        BLOCK_G=block_g,
        BLOCK_C=block_c,
        num_warps=4,
    )
    stats = x.new_empty((batch, 2, num_groups), dtype=torch.float32)
    merge_stats_kernel[(num_groups, batch)](
        partials, stats, runs, eps, BLOCK_R=MAX_RUNS, num_warps=1
    )
    return stats


# tiles of pixels and channels


@triton.jit
def tile_at(
    start, stride_b, stride_p, stride_c, P, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """-> (channels of this program, offsets [BLOCK_P, BLOCK_C] from pixel `start`, mask)"""
    p = start + tl.arange(0, BLOCK_P).to(tl.int64)
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    at = (
        (p * stride_p)[:, None] + (c * stride_c)[None, :] + tl.program_id(2).to(tl.int64) * stride_b
    )
    return c, at, (p < P)[:, None] & (c < C)[None, :]


@triton.jit
def load_channels(weight_ptr, bias_ptr, c, C):
    weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    return weight[None, :], bias[None, :]


@triton.jit
def load_group_pair(ptr, c, C, SIZE):
    """Two numbers of the group of each channel, from [B, 2, G] -> two [1, BLOCK_C]"""
    G = C // SIZE
    ptr += tl.program_id(2).to(tl.int64) * 2 * G + c // SIZE
    first, second = tl.load(ptr, mask=c < C, other=0.0), tl.load(ptr + G, mask=c < C, other=0.0)
    return first[None, :], second[None, :]


@triton.jit
def silu_backward(dy, z):
    s = tl.sigmoid(z)
    return dy * s * (1 + z * (1 - s))


@triton.jit
def group_norm_silu_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    stats_ptr,
    out_ptr,
    stride_b,
    stride_p,
    stride_c,
    P,
    C,
    SIZE,  # channels of a group
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK_P
    c, at, mask = tile_at(start, stride_b, stride_p, stride_c, P, C, BLOCK_P, BLOCK_C)
    mean, rstd = load_group_pair(stats_ptr, c, C, SIZE)
    weight, bias = load_channels(weight_ptr, bias_ptr, c, C)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    z = (x - mean) * rstd * weight + bias
    tl.store(out_ptr + at, (z * tl.sigmoid(z)).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=("tiles",))
def channel_sums_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    stats_ptr,
    sums_ptr,  # [B, runs, 2, C] fp32: of dz n and of dz, z = n weight + bias
    stride_b,
    stride_p,
    stride_c,
    P,
    C,
    SIZE,
    tiles,  # of a run
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, rstd = load_group_pair(stats_ptr, c, C, SIZE)
    weight, bias = load_channels(weight_ptr, bias_ptr, c, C)
    dz_n_sum = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    dz_sum = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for i in range(tiles):
        start = (tl.program_id(0).to(tl.int64) * tiles + i) * BLOCK_P
        _, at, mask = tile_at(start, stride_b, stride_p, stride_c, P, C, BLOCK_P, BLOCK_C)
        n = (tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dz = silu_backward(dy, n * weight + bias)
        dz_n_sum += dz * n
        dz_sum += dz
    run = tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    out_ptr = sums_ptr + run * 2 * C + c
    tl.store(out_ptr, tl.sum(dz_n_sum, 0), mask=c < C)
    tl.store(out_ptr + C, tl.sum(dz_sum, 0), mask=c < C)


@triton.jit(do_not_specialize=("runs",))
def group_means_kernel(
    sums_ptr,
    weight_ptr,
    means_ptr,  # [B, 2, G] fp32: over a group, of dn n and of dn = dz weight
    runs,
    count,  # of a group, a float
    SIZE,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    g, G, b = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    i, run = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R)
    c = (g * SIZE + i).to(tl.int64)
    mask = (run < runs)[:, None] & (i < SIZE)[None, :]
    weight = tl.load(weight_ptr + c, mask=i < SIZE, other=0.0).to(tl.float32)
    ptr = sums_ptr + ((b * runs + run) * 2 * SIZE * G)[:, None] + c[None, :]
    for which in tl.static_range(2):
        sums = tl.load(ptr + which * SIZE * G, mask=mask, other=0.0)
        total = tl.sum(tl.sum(sums, 0) * weight, 0)
        tl.store(means_ptr + (b * 2 + which) * G + g, total / count)


@triton.jit
def group_norm_silu_backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    stats_ptr,
    means_ptr,
    dx_ptr,
    stride_b,
    stride_p,
    stride_c,
    P,
    C,
    SIZE,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK_P
    c, at, mask = tile_at(start, stride_b, stride_p, stride_c, P, C, BLOCK_P, BLOCK_C)
    mean, rstd = load_group_pair(stats_ptr, c, C, SIZE)
    dn_n_mean, dn_mean = load_group_pair(means_ptr, c, C, SIZE)
    weight, bias = load_channels(weight_ptr, bias_ptr, c, C)
    n = (tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
    dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
    dn = silu_backward(dy, n * weight + bias) * weight
    dx = rstd * (dn - dn_mean - n * dn_n_mean)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def tiled(x: Tensor) -> tuple[tuple[int, ...], dict[str, int]]:
    """-> (strides of batch, pixel and channel, pixels), blocks"""
    _, channels, height, width = x.shape
    pixels = height * width
    if channels_last(x):
        block_c = min(256, triton.next_power_of_2(channels))
        layout = (channels * pixels, channels, 1, pixels)
    else:
        block_c, layout = 1, (channels * pixels, 1, pixels, pixels)
    block_p = min(max(1, triton.next_power_of_2(pixels)), TILE // block_c)
    return layout, {"BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": 4}


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, out: Tensor
) -> None:
    batch, channels = x.shape[:2]
    stats = group_stats(x, num_groups, eps)
    layout, blocks = tiled(x)
    grid = (triton.cdiv(layout[3], blocks["BLOCK_P"]), triton.cdiv(channels, blocks["BLOCK_C"]))
    group_norm_silu_kernel[(*grid, batch)](
        x, weight, bias, stats, out, *layout, channels, channels // num_groups, **blocks
    )


def group_norm_silu_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    dx: Tensor,
    dweight: Tensor,
    dbias: Tensor,
) -> None:
    batch, channels = x.shape[:2]
    size = channels // num_groups
    stats = group_stats(x, num_groups, eps)
    layout, blocks = tiled(x)
    pixels = layout[3]
    inputs, sizes = (dy, x, weight, bias, stats), (*layout, channels, size)
    columns = triton.cdiv(channels, blocks["BLOCK_C"])
    runs, tiles = split(pixels, blocks["BLOCK_P"], max(1, batch * columns))
    sums = x.new_empty((batch, runs, 2, channels), dtype=torch.float32)
    means = x.new_empty((batch, 2, num_groups), dtype=torch.float32)
    channel_sums_kernel[(runs, columns, batch)](*inputs, sums, *sizes, tiles, **blocks)
    group_means_kernel[(num_groups, batch)](
        sums,
        weight,
        means,
        runs,
        float(max(1, size * pixels)),
        size,
        BLOCK_R=MAX_RUNS,
        BLOCK_C=triton.next_power_of_2(size),
        num_warps=4,
    )
    group_norm_silu_backward_kernel[(triton.cdiv(pixels, blocks["BLOCK_P"]), columns, batch)](
        *inputs, means, dx, *sizes, **blocks
    )
    sum_partials(sums.view(1, batch * runs, 2, channels), 0, (dweight, dbias))

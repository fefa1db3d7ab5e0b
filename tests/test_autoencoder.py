import dataclasses
import json
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxkern import checkpoint
from fluxkern.model.autoencoder import AutoEncoder, AutoEncoderConfig, blend_weights, tile_spans

TWO_LEVELS = AutoEncoderConfig(ch=8, ch_mult=(1, 2), norm_num_groups=4)
FOUR_LEVELS = AutoEncoderConfig(ch=8, ch_mult=(1, 2, 4, 4), num_res_blocks=1, norm_num_groups=4)
CONFIGS = pytest.mark.parametrize("config", [TWO_LEVELS, FOUR_LEVELS], ids=["2", "4"])


def build(config, seed=0):
    torch.manual_seed(seed)
    ae = AutoEncoder(config)
    for name, parameter in ae.named_parameters():
        if "norm" in name:  # affine parameters away from 1 and 0, so that they count
            parameter.data += 0.3 * torch.randn_like(parameter)
    return ae.eval().requires_grad_(False)


def rand(*shape, seed=1):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def build_diffusers(config):
    diffusers = pytest.importorskip("diffusers")
    fields = checkpoint.autoencoder_config_to_diffusers(config)
    return diffusers.AutoencoderKL.from_config(fields).eval()


def diffusers_twin(ae):
    twin = build_diffusers(ae.config)
    twin.load_state_dict(checkpoint.autoencoder_to_diffusers(ae.state_dict()), strict=True)
    return twin


@CONFIGS
@torch.no_grad()
def test_moments_agree_with_diffusers(config):
    ae = build(config)
    x = rand(2, 3, 48, 40)
    posterior = diffusers_twin(ae).encode(x).latent_dist
    mean, logvar = ae.moments(x)
    assert relative(mean, posterior.mean) <= 1e-5
    assert relative(logvar, posterior.logvar) <= 1e-5


@CONFIGS
@torch.no_grad()
def test_decode_agrees_with_diffusers(config):
    ae = build(config)
    z = torch.randn(2, 16, 5, 7)
    expected = diffusers_twin(ae).decode(z / config.scale_factor + config.shift_factor).sample
    assert relative(ae.decode(z), expected) <= 1e-5


@torch.no_grad()
def test_weights_written_by_diffusers_decode_alike():
    torch.manual_seed(3)
    twin = build_diffusers(FOUR_LEVELS)
    ae = AutoEncoder(FOUR_LEVELS).eval()
    ae.load_state_dict(checkpoint.autoencoder_from_diffusers(twin.state_dict()), strict=True)
    z = torch.randn(1, 16, 4, 6)
    expected = twin.decode(z / FOUR_LEVELS.scale_factor + FOUR_LEVELS.shift_factor).sample
    assert relative(ae.decode(z), expected) <= 1e-5


def test_full_size_has_the_tensors_and_parameters_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        ours = AutoEncoder(AutoEncoderConfig())
        theirs = diffusers.AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[128, 256, 512, 512],
            layers_per_block=2,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    sizes = [sorted(p.numel() for p in model.parameters()) for model in (ours, theirs)]
    assert sizes[0] == sizes[1]
    assert len(sizes[0]) == 244
    assert sum(sizes[0]) == 83_819_683


def test_parameters_carry_the_names_and_shapes_of_ae_safetensors():
    with torch.device("meta"):
        shapes = {
            k: tuple(v.shape) for k, v in AutoEncoder(AutoEncoderConfig()).state_dict().items()
        }
    expected = {
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "encoder.down.0.block.0.norm1.weight": (128,),
        "encoder.down.0.downsample.conv.weight": (128, 128, 3, 3),
        "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "encoder.down.3.block.1.conv2.bias": (512,),
        "encoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
        "encoder.norm_out.weight": (512,),
        "encoder.conv_out.weight": (32, 512, 3, 3),
        "decoder.conv_in.weight": (512, 16, 3, 3),
        "decoder.mid.block_2.conv1.weight": (512, 512, 3, 3),
        "decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "decoder.up.1.block.0.nin_shortcut.weight": (256, 512, 1, 1),
        "decoder.up.3.block.2.conv2.weight": (512, 512, 3, 3),
        "decoder.up.1.upsample.conv.weight": (256, 256, 3, 3),
        "decoder.conv_out.bias": (3,),
    }
    assert {name: shapes.get(name) for name in expected} == expected
    absent = {"encoder.down.3.downsample.conv.weight", "decoder.up.0.upsample.conv.weight"}
    assert not absent & shapes.keys()


def picture_with_object(left):
    x = torch.full((1, 3, 384, 384), -0.4, dtype=torch.float64)
    x[:, :, 184:200, left : left + 16] = rand(1, 3, 16, 16).double()
    return x


@torch.no_grad()
def test_shifting_the_picture_by_8_pixels_shifts_interior_latents_by_one_cell():
    # the object's receptive field ends before the border's begins, and GroupNorm and attention see
    # the same values in another order, so that equality holds to rounding
    ae = build(FOUR_LEVELS).double()
    here, one_cell, half_cell = (ae.encode(picture_with_object(left)) for left in (184, 192, 188))
    interior = (..., slice(12, 36), slice(12, 35))
    shifted = torch.roll(here, 1, dims=3)
    assert (shifted - one_cell)[interior].abs().max() < 1e-9
    assert (shifted - half_cell)[interior].abs().max() > 1e-3
    assert (here - one_cell)[interior].abs().max() > 1e-3


@pytest.mark.parametrize("sides", [(8, 8), (24, 56), (88, 40)])
@torch.no_grad()
def test_odd_and_oblong_latents_keep_their_sides(sides):
    ae = build(FOUR_LEVELS)
    z = ae.encode(rand(2, 3, *sides))
    assert z.shape == (2, 16, sides[0] // 8, sides[1] // 8)
    assert ae.decode(z).shape == (2, 3, *sides)


@torch.no_grad()
def test_a_batch_equals_its_singles():
    ae = build(FOUR_LEVELS)
    x = rand(3, 3, 32, 24)
    z = ae.encode(x)
    assert relative(z, torch.cat([ae.encode(one[None]) for one in x])) <= 1e-5
    singles = torch.cat([ae.decode(one[None]) for one in z])
    assert relative(ae.decode(z), singles) <= 1e-5


@torch.no_grad()
def test_encode_without_a_generator_is_the_scaled_mean():
    ae = build(TWO_LEVELS)
    x = rand(1, 3, 16, 16)
    mean, _ = ae.moments(x)
    torch.testing.assert_close(ae.encode(x), (mean - 0.1159) * 0.3611)


@torch.no_grad()
def test_encode_with_a_generator_samples_the_posterior_repeatably():
    ae = build(TWO_LEVELS)
    x = rand(1, 3, 16, 16).expand(256, -1, -1, -1)
    first, again = (ae.encode(x, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, again)
    mean, logvar = ae.moments(x[:1])
    noise = ((first / 0.3611 + 0.1159) - mean) / torch.exp(logvar / 2)
    assert abs(noise.mean().item()) < 0.01
    assert abs(noise.std().item() - 1) < 0.01


@torch.no_grad()
def test_extreme_log_variances_are_clamped():
    ae = build(TWO_LEVELS)
    ae.encoder.conv_out.bias[16:] = torch.tensor([1e4, -1e4]).repeat(8)
    _, logvar = ae.moments(rand(1, 3, 8, 8))
    assert logvar.unique().tolist() == [-30.0, 20.0]


def test_gradient_flows_to_every_parameter():
    ae = build(FOUR_LEVELS).requires_grad_(True)
    x = rand(1, 3, 32, 32).requires_grad_()
    mean, logvar = ae.moments(x)
    picture = ae.decode(mean + torch.exp(0.5 * logvar))
    (picture - 0.3).square().mean().backward()
    # the bias of the keys shifts all scores of a query alike, which softmax does not see
    unseen = {"encoder.mid.attn_1.k.bias", "decoder.mid.attn_1.k.bias"}
    flat = {n for n, p in ae.named_parameters() if p.grad is None or not p.grad.any()}
    assert flat <= unseen
    assert x.grad.abs().sum() > 0


@settings(deadline=None)
@given(st.integers(1, 700), st.integers(2, 128), st.data())
def test_tiles_cover_a_side_with_at_least_the_overlap(length, tile, data):
    overlap = data.draw(st.integers(1, tile // 2))
    spans = tile_spans(length, tile, overlap)
    assert spans[0][0] == 0 and spans[-1][1] == length
    assert all(0 < stop - start <= tile for start, stop in spans)
    for (_, stop), (start, _) in pairwise(spans):
        assert stop - start >= overlap


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(2, 64), st.sampled_from([1, 2, 8]), st.data())
def test_blending_weights_sum_to_one_and_stay_inside_their_tile(length, tile, cell, data):
    overlap = data.draw(st.integers(1, tile // 2))
    spans = tile_spans(length, tile, overlap)
    weights = blend_weights(spans, overlap, cell)
    assert weights.shape == (len(spans), length * cell)
    assert (weights.sum(0) - 1).abs().max() <= 2e-7
    assert weights.min() >= 0
    for weight, (start, stop) in zip(weights, spans, strict=True):
        assert not weight[: start * cell].any() and not weight[stop * cell :].any()


def test_weights_of_two_tiles_cross_in_the_middle_of_their_overlap():
    weights = blend_weights([(0, 8), (4, 12)], overlap=4, cell=1)
    assert weights[0].tolist() == [1, 1, 1, 1, 1, 0.75, 0.25, 0, 0, 0, 0, 0]
    assert weights[1].tolist() == [0, 0, 0, 0, 0, 0.25, 0.75, 1, 1, 1, 1, 1]


def small_tiles(ae, tile=24, overlap=8):
    ae.tile_latent, ae.tile_overlap = tile, overlap
    return ae


def test_tiling_a_local_map_changes_nothing():
    ae = small_tiles(AutoEncoder(FOUR_LEVELS))
    z = torch.randn(2, 5, 61, 30)
    out = ae._tiled(lambda t: F.interpolate(t, scale_factor=8.0), z, 1, 8)
    torch.testing.assert_close(out, F.interpolate(z, scale_factor=8.0))
    x = torch.randn(1, 3, 61 * 8, 30 * 8)
    pooled = ae._tiled(lambda t: F.avg_pool2d(t, 8), x, 8, 1)
    torch.testing.assert_close(pooled, F.avg_pool2d(x, 8))


def test_tiles_of_different_levels_blend_in_equal_small_steps():
    # each tile's result depends on its own statistics, as with GroupNorm
    ae = small_tiles(AutoEncoder(FOUR_LEVELS))
    z = torch.linspace(-1, 1, 40).expand(1, 1, 10, 40)
    levels = [z[..., start:stop].mean() for start, stop in tile_spans(40, 24, 8)]
    out = ae._tiled(lambda t: t.mean() + torch.zeros(1, 1, 80, t.shape[3] * 8), z, 1, 8)
    steps = out.diff(dim=3)
    assert len(levels) == 2
    torch.testing.assert_close(steps.amax(), (levels[1] - levels[0]) / (8 / 2 * 8))
    assert steps.min() >= -1e-6


def whole(ae, run, x):
    tile, ae.tile_latent = ae.tile_latent, 10**6
    out = run(x)
    ae.tile_latent = tile
    return out


@torch.no_grad()
def test_a_tiled_picture_is_near_the_whole_one():
    ae = build(FOUR_LEVELS)
    z = torch.randn(1, 16, 24, 200, generator=torch.Generator().manual_seed(2))
    assert 0 < relative(ae.decode(z), whole(ae, ae.decode, z)) < 0.15
    x = F.interpolate(rand(1, 3, 48, 400), scale_factor=4, mode="bicubic")
    assert 0 < relative(ae.encode(x), whole(ae, ae.encode, x)) < 0.05


@torch.no_grad()
def test_constant_latents_give_no_seam():
    ae = build(FOUR_LEVELS)
    z = torch.randn(1, 16, 1, 1, generator=torch.Generator().manual_seed(4))
    picture = ae.decode(z.expand(-1, -1, 24, 200))
    # between the borders every cell repeats its neighbour
    cells = picture[..., 96:104, 160:-160].unflatten(3, (-1, 8))
    assert cells.std() > 0.01
    assert (cells[..., 1:, :] - cells[..., :-1, :]).abs().max() < 1e-3 * cells.std()


@torch.no_grad()
def test_only_sides_above_the_tile_are_tiled():
    ae = build(FOUR_LEVELS)
    seen = []
    ae.decoder.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[2:])))
    ae.tile_latent = 16
    ae.tile_overlap = 4
    ae.decode(torch.randn(1, 16, 16, 16))
    assert seen == [(16, 16)]
    seen.clear()
    ae.decode(torch.randn(1, 16, 5, 17))
    assert seen == [(5, 11), (5, 11)]


def test_tiling_starts_above_1024_pixels():
    ae = AutoEncoder(AutoEncoderConfig(ch=4, norm_num_groups=4, num_res_blocks=1))
    assert ae.tile_latent * ae.config.downscale == 1024


def test_gradient_flows_through_tiles():
    ae = small_tiles(build(FOUR_LEVELS), tile=8, overlap=2)
    z = torch.randn(1, 16, 4, 20, requires_grad=True)
    ae.decode(z).sum().backward()
    assert (z.grad.abs().sum(dim=(0, 1)) > 0).all()


@torch.no_grad()
def test_bfloat16_stays_bfloat16_tiled_or_whole():
    ae = small_tiles(build(FOUR_LEVELS), tile=8, overlap=2).bfloat16()
    for sides in ((6, 6), (6, 12)):
        z = torch.randn(1, 16, *sides, dtype=torch.bfloat16)
        assert ae.decode(z).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 24, 20), r"x must have sides that are multiples of 8, got 24 x 20"),
        ((1, 4, 24, 24), r"x must have 3 channels, got 4"),
        ((3, 24, 24), r"x must be \[B, 3, H, W\], got shape \(3, 24, 24\)"),
        ((1, 3, 0, 8), r"x must have sides of at least 1, got 0 x 8"),
    ],
)
def test_a_wrong_picture_is_refused_by_name(shape, message):
    with pytest.raises(ValueError, match=message):
        AutoEncoder(FOUR_LEVELS).encode(torch.zeros(shape))


def test_wrong_latents_are_refused_by_name():
    with pytest.raises(ValueError, match="z must have 16 channels, got 4"):
        AutoEncoder(FOUR_LEVELS).decode(torch.zeros(1, 4, 8, 8))


def test_an_overlap_above_half_a_tile_is_refused():
    ae = small_tiles(AutoEncoder(FOUR_LEVELS), tile=8, overlap=5)
    with pytest.raises(ValueError, match=r"tile_overlap must be 1\.\.4 .*got 5"):
        ae.decode(torch.zeros(1, 16, 9, 9))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("ch", 0, "ch must be an integer of at least 1, got 0"),
        ("z_channels", 2.5, "z_channels must be an integer of at least 1, got 2.5"),
        ("ch_mult", (), "ch_mult must name at least 1 level, got 0"),
        ("ch_mult", (1, -2), "ch_mult must be an integer of at least 1, got -2"),
        ("norm_num_groups", 48, "norm_num_groups 48 does not divide the 128 channels"),
        ("scale_factor", 0.0, "scale_factor must not be 0"),
    ],
)
def test_a_wrong_config_is_refused_by_name(field, value, message):
    with pytest.raises(ValueError, match=message):
        AutoEncoderConfig(**{field: value})


def test_a_config_survives_json():
    fields = json.loads(json.dumps(dataclasses.asdict(FOUR_LEVELS)))
    assert AutoEncoderConfig(**fields) == FOUR_LEVELS

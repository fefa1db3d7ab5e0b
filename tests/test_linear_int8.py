"""The int8 linear layer: its laws, its error on what a model feeds it, and the model in int8."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cpu_kernels import isa  # noqa: F401, a fixture
from torch import Tensor

from fluxkern import FluxPipeline, ops, reference
from fluxkern.compact.drawings import caption, random_scene
from fluxkern.compact.judge import Verdict, judge
from fluxkern.model.int8 import Int8Linear, block_linears
from fluxkern.testing import assert_accurate

PROMPT = "a red circle on a blue background"
# rows, Cin, Cout: few rows and many, borders of tiles, panels and lines
SIZES = [(1, 64, 33), (8, 65, 16), (9, 63, 31), (12, 1, 1), (13, 130, 97), (25, 3072, 32)]
every_isa = pytest.mark.usefixtures("isa")
every_size = pytest.mark.parametrize("rows, cin, cout", SIZES)


def inputs(rows: int, cin: int, cout: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, weight_scale, bias; x is rows of a longer buffer, the weight columns of one."""
    x = torch.randn(2, rows + 1, cin + 3)[:, 1:, :cin]
    weight, scale = ops.quantize_int8(torch.randn(cout, cin + 5))
    weight[:, ::7] = -128  # no quantised weight has it, but int8 does
    return x, weight[:, 5:], scale, torch.randn(cout)


def assert_agrees(out: Tensor, *args: Tensor | str | None) -> None:
    wide = (a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
    assert_accurate(out, reference.linear_int8(*wide), reference.linear_int8(*args))


# the weight


def test_a_quantised_weight_is_within_half_a_step():
    weight = torch.randn(20, 300)
    values, scale = ops.quantize_int8(weight)
    assert (values.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert (values.abs().amax(1) == 127).all()
    assert ((values * scale[:, None] - weight).abs() <= 0.5001 * scale[:, None]).all()


def test_a_weight_of_zeros_and_one_that_is_not_finite():
    weight = torch.randn(4, 9)
    weight[0], weight[1, 3], weight[2, 5] = 0, float("nan"), float("inf")
    values, scale = ops.quantize_int8(weight)
    assert scale[0] == 0 and scale[1].isnan() and scale[2].isnan()
    out = ops.linear_int8(torch.randn(3, 9), values, scale)
    assert not out[:, 0].any() and out[:, 1:3].isnan().all() and out[:, 3].isfinite().all()


# the product


@every_isa
@every_size
def test_any_rows_and_widths_by_strides(rows: int, cin: int, cout: int):
    args = inputs(rows, cin, cout)
    assert_agrees(ops.linear_int8(*args, backend="cpu"), *args)


@every_isa
@every_size
def test_the_product_is_written_and_added_into_rows_of_a_joint_tensor(
    rows: int, cin: int, cout: int
):
    x, weight, scale, bias = inputs(rows, cin, cout)
    joint = torch.randn(2, rows + 4, cout + 2)
    before, out = joint.clone(), joint[:, 3:-1, :cout]
    assert ops.linear_int8(x, weight, scale, bias, out=out, backend="cpu") is out
    first = ops.linear_int8(x, weight, scale, bias, backend="cpu")
    assert torch.equal(out, first)
    ops.linear_int8(x, weight, scale, out=out, add=True, backend="cpu")
    torch.testing.assert_close(out, first + ops.linear_int8(x, weight, scale, backend="cpu"))
    out.copy_(before[:, 3:-1, :cout])
    assert torch.equal(joint, before)  # and nothing beside it


@every_isa
@pytest.mark.parametrize("rows", [5, 30])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_longest_sum_of_the_largest_products_fits(rows: int, sign: int):
    x = torch.ones(rows, 65536)
    weight = torch.full((3, 65536), 127 if sign > 0 else -128, dtype=torch.int8)
    out = ops.linear_int8(x, weight, torch.ones(3), backend="cpu")
    expected = torch.full((rows, 3), 65536.0 * int(weight[0, 0]))
    torch.testing.assert_close(out, expected)
    x[:, ::2] = -1  # both ends of the 8 bits, zero in the middle
    torch.testing.assert_close(
        ops.linear_int8(x, weight, torch.ones(3), backend="cpu"),
        reference.linear_int8(x, weight, torch.ones(3), None),
    )


@every_isa
@pytest.mark.parametrize("rows", [4, 40])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_gives_nan_and_leaves_the_others(rows: int, bad: float):
    x, weight, scale, bias = inputs(rows, 70, 50)
    expected = ops.linear_int8(x, weight, scale, bias, backend="cpu")
    x[1, 2, 33] = bad
    out = ops.linear_int8(x, weight, scale, bias, backend="cpu")
    assert out[1, 2].isnan().all()
    assert reference.linear_int8(x, weight, scale, bias)[1, 2].isnan().all()
    expected[1, 2] = out[1, 2] = 0
    assert torch.equal(out, expected)


@every_isa
@pytest.mark.parametrize("rows", [4, 40])
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-40])
def test_a_row_of_nothing_gives_the_bias(rows: int, value: float):
    x, weight, scale, bias = inputs(rows, 70, 50)
    x[0, 1] = value
    out = ops.linear_int8(x, weight, scale, bias, backend="cpu")
    assert torch.equal(out[0, 1], bias)
    assert torch.equal(reference.linear_int8(x, weight, scale, bias)[0, 1], bias)


@every_isa
@pytest.mark.parametrize("value", [3e38, -3e38])
def test_the_range_of_a_row_may_be_beyond_that_of_fp32(value: float):
    x = torch.full((20, 64), value)
    x[:, ::2] *= -1
    args = (x, *inputs(1, 64, 5)[1:3], None)
    torch.testing.assert_close(ops.linear_int8(*args, backend="cpu"), reference.linear_int8(*args))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (5,), (2, 1, 3, 5)])
def test_no_rows_one_row_and_more_axes(shape: tuple[int, ...]):
    x, (weight, scale) = torch.randn(shape), ops.quantize_int8(torch.randn(7, 5))
    out = ops.linear_int8(x, weight, scale, backend="cpu")
    assert out.shape == (*shape[:-1], 7)
    torch.testing.assert_close(out, reference.linear_int8(x, weight, scale, None))
    assert ops.linear_int8(x, weight[:0], scale[:0], backend="cpu").shape == (*shape[:-1], 0)


def test_the_number_of_threads_changes_no_bit():
    args = inputs(800, 200, 150)
    threads, found = torch.get_num_threads(), []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        found.append(ops.linear_int8(*args, backend="cpu"))
    torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("name", ["x", "weight_scale", "bias"])
def test_an_input_that_needs_a_gradient_is_refused(name: str):
    args = dict(zip(("x", "weight", "weight_scale", "bias"), inputs(3, 8, 4), strict=True))
    args[name].requires_grad_()
    with pytest.raises(ValueError, match="linear_int8 has no gradient"):
        ops.linear_int8(**args)
    with torch.no_grad():
        ops.linear_int8(**args)


@pytest.mark.parametrize("cin", [0, 65537])
def test_widths_that_int32_cannot_sum_are_refused(cin: int):
    x, weight = torch.zeros(1, cin), torch.zeros(2, cin, dtype=torch.int8)
    with pytest.raises(ValueError, match=f"x must have 1 to 65536 channels, got {cin}"):
        ops.linear_int8(x, weight, torch.zeros(2))


# the model


@pytest.fixture(scope="module")
def fp32() -> FluxPipeline:
    return FluxPipeline.from_pretrained("compact")


@pytest.fixture(scope="module")
def int8() -> FluxPipeline:
    return FluxPipeline.from_pretrained("compact", dtype="int8")


def draw(pipeline: FluxPipeline, prompts: str | list[str] = PROMPT, steps: int = 16) -> np.ndarray:
    """fp32 [N, H, W, 3] in 0..1."""
    seed = torch.Generator().manual_seed(7)
    options = {"true_cfg_scale": 3.0, "output_type": "np", "progress": False}
    return pipeline(prompts, num_inference_steps=steps, generator=seed, **options).images


def verdict(picture: np.ndarray) -> Verdict:
    return judge((picture * 255).round().astype(np.uint8))


def kind(name: str, shape: tuple[int, ...], hidden: int) -> str:
    """double qkv, single linear2 columns of the MLP, ..."""
    block, _, *rest = name.split(".")
    part = ".".join(rest).removeprefix("img_").removeprefix("txt_")
    of = " of GELU" if shape[1] > hidden else ""
    return f"{block.removesuffix('_blocks')} {part} [{shape[0]}, {shape[1]}]{of}"


def captured_errors(
    pipeline: FluxPipeline, monkeypatch: pytest.MonkeyPatch
) -> dict[str, tuple[float, float]]:
    """Per kind of linear layer the error and the size of its outputs, squared, summed over a run.

    The layers compute in fp32, so that each sees the inputs that it has there.
    """
    model, real, found = pipeline.transformer, ops.linear, {}
    layers = {name: model.get_submodule(name).weight for name in block_linears(model)}

    def measured(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: object):
        for name, whole in layers.items():
            first = (weight.data_ptr() - whole.data_ptr()) // 4
            if 0 <= first < whole.numel():
                row, column = divmod(first, whole.shape[1])
                values, scale = ops.quantize_int8(whole)
                rows = slice(row, row + weight.shape[0])
                values = values[rows, column : column + weight.shape[1]]
                out = ops.linear_int8(x, values, scale[rows]).double()
                true = x.double() @ weight.double().t()
                key = kind(name, tuple(weight.shape), model.config.hidden_size)
                error, size = found.get(key, (0.0, 0.0))
                squared = (float(t.square().sum()) for t in (out - true, true))
                found[key] = error + next(squared), size + next(squared)
        return real(x, weight, bias, **options)

    monkeypatch.setattr(ops, "linear", measured)
    draw(pipeline)
    return found


def test_the_error_on_what_the_blocks_are_fed_is_at_most_2_per_cent(fp32, monkeypatch):
    found = captured_errors(fp32, monkeypatch)
    assert len(found) == 8  # four of the double blocks, each half of the single blocks' two
    relative = {name: math.sqrt(error / size) for name, (error, size) in sorted(found.items())}
    for name, error in relative.items():
        print(f"{name:44} {100 * error:.2f} %")
    assert max(relative.values()) <= 0.02


def test_int8_draws_what_fp32_draws(fp32, int8):
    """Of eight drawings no verdict differs; of 128 at another time both had 57.0 % right."""
    rng = np.random.default_rng(7)
    prompts = [caption(random_scene(rng, held_out=False), rng) for _ in range(8)]
    for one, other in zip(*(draw(pipe, prompts) for pipe in (fp32, int8)), strict=True):
        psnr = -10 * math.log10(float(np.square(one - other).mean()))
        assert 40 < psnr < 90  # close, and not the same weights
        assert verdict(one) == verdict(other)


def test_the_blocks_are_int8_and_the_rest_is_not(fp32, int8):
    names = block_linears(fp32.transformer)
    assert len(names) == 2 * 10 + 4 * 3
    for name, module in int8.transformer.named_modules():
        assert isinstance(module, Int8Linear) == (name in names)
    layer, source = (p.transformer.get_submodule(names[0]) for p in (int8, fp32))
    values, scale = ops.quantize_int8(source.weight)
    assert torch.equal(layer.values, values) and torch.equal(layer.scale, scale)
    assert torch.equal(layer.bias, source.bias)
    x = torch.randn(3, source.in_features)
    assert (layer(x) - source(x)).norm() < 0.02 * source(x).norm()


def test_a_cast_of_an_int8_pipeline_leaves_its_scales(int8):
    before = {n: t.clone() for n, t in int8.transformer.named_buffers() if n.endswith("scale")}
    try:
        int8.to(dtype=torch.bfloat16)
        after = dict(int8.transformer.named_buffers())
        assert all(torch.equal(after[name], scale) for name, scale in before.items())
        assert draw(int8, steps=1).std() > 0
    finally:
        int8.to(dtype=torch.float32)


def test_an_int8_pipeline_is_not_saved_nor_put_on_another_device(int8, tmp_path: Path):
    with pytest.raises(ValueError, match="format must be 'bfl'.*for a model in int8"):
        int8.save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="device must be cpu where dtype is 'int8', got cuda"):
        FluxPipeline.from_pretrained("compact", dtype="int8", device="cuda")


# ConvRot


def outlying(rows: int, columns: int) -> Tensor:
    """Normal, but for two channels that are 300 times the others."""
    x = torch.randn(rows, columns, dtype=torch.float64)
    x[:, [5, columns // 2]] *= 300
    return x


@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize(("rotation", "columns"), [(4, 20), (16, 48), (64, 192), (256, 1024)])
def test_a_rotated_weight_is_multiplied_by_rotated_inputs(dtype, rows, rotation, columns):
    x, weight = outlying(rows, columns).to(dtype), torch.randn(30, columns)
    values, scale = ops.quantize_int8(reference.rotate(weight, rotation))
    out = ops.linear_int8(x, values, scale, rotation=rotation, backend="cpu")
    own = ops.linear_int8(x, values, scale, rotation=rotation, backend="reference")
    numbers = values.double() * scale.double()[:, None]
    true = x.double() @ reference.rotate(numbers, rotation).t()
    assert_accurate(out, true, own)
    into = torch.ones(rows, 30, dtype=dtype)
    ops.linear_int8(x, values, scale, out=into, add=True, rotation=rotation, backend="cpu")
    assert (into - out - 1).abs().max() <= torch.finfo(dtype).eps * (out.abs().max() + 1)


def test_a_rotation_spreads_outliers():
    """The error of a product in 8 bits, two channels 300 times the others: 6.7 % without."""
    x, weight = outlying(64, 3072), torch.randn(512, 3072, dtype=torch.float64)
    true = x @ weight.t()

    def error(rotation: int) -> float:
        turned = reference.rotate(weight, rotation) if rotation else weight
        out = ops.linear_int8(x.float(), *ops.quantize_int8(turned), rotation=rotation)
        return float((out - true).norm() / true.norm())

    print(f"{100 * error(0):.2f} %, {100 * error(256):.2f} % rotated")
    assert error(256) <= 0.03


@pytest.mark.parametrize("rotation", [-4, 2, 8, 256, 4.0, True, 4**9])
def test_what_is_no_rotation_of_its_columns_is_refused(rotation):
    x, weight = torch.randn(2, 64), torch.zeros(3, 64, dtype=torch.int8)
    with pytest.raises(ValueError, match="rotation must be 0 or a power of 4 that divides Cin, 64"):
        ops.linear_int8(x, weight, torch.ones(3), rotation=rotation)

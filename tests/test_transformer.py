"""The transformer against diffusers' on the same weights, and the properties of its parts."""

import math
import re
from collections import Counter
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fluxkern import ops
from fluxkern.checkpoint import flux_to_diffusers
from fluxkern.model.transformer import (
    CONFIGS,
    DoubleStreamBlock,
    Flux,
    FluxConfig,
    SingleStreamBlock,
    Stream,
    rope_tables,
)

TINY = FluxConfig(
    in_channels=12,
    out_channels=12,
    vec_in_dim=20,
    context_in_dim=24,
    hidden_size=48,
    num_heads=3,
    depth=2,
    depth_single_blocks=2,
    axes_dim=(4, 6, 6),
)
SMALLEST = replace(TINY, depth=1, depth_single_blocks=1)


def random_flux(config: FluxConfig) -> Flux:
    """Every parameter random, so that none is hidden by a zero or a one."""
    model = Flux(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            wide = 0.3 if parameter.ndim == 1 else parameter.shape[1] ** -0.5
            parameter.normal_(1.0 if name.endswith("norm.scale") else 0.0, wide)
    return model


def grid(height: int, width: int, picture: int = 0) -> Tensor:
    """[height * width, 3]: picture, row, column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack((torch.full_like(rows, picture), rows, columns), -1).flatten(0, 1).float()


def inputs(config: FluxConfig, batch: int = 2, txt: int = 5, ids: Tensor | None = None) -> dict:
    ids = grid(3, 4) if ids is None else ids
    args = {
        "img": torch.randn(batch, len(ids), config.in_channels),
        "img_ids": ids,
        "txt": torch.randn(batch, txt, config.context_in_dim),
        "txt_ids": torch.zeros(txt, 3),
        "timesteps": torch.rand(batch),
        "y": torch.randn(batch, config.vec_in_dim),
    }
    if config.guidance_embed:
        args["guidance"] = 1 + 4 * torch.rand(batch)
    return args


def theirs(model: Flux) -> FluxTransformer2DModel:
    """diffusers' model with the same weights."""
    config = model.config
    other = FluxTransformer2DModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.depth,
        num_single_layers=config.depth_single_blocks,
        attention_head_dim=config.head_dim,
        num_attention_heads=config.num_heads,
        joint_attention_dim=config.context_in_dim,
        pooled_projection_dim=config.vec_in_dim,
        guidance_embeds=config.guidance_embed,
        axes_dims_rope=config.axes_dim,
    )
    other.load_state_dict(flux_to_diffusers(model.state_dict()), strict=True)
    return other.to(model.img_in.weight.dtype)


NAMES = {
    "img": "hidden_states",
    "txt": "encoder_hidden_states",
    "timesteps": "timestep",
    "y": "pooled_projections",
}


def run_theirs(other: FluxTransformer2DModel, args: dict[str, Tensor]) -> Tensor:
    renamed = {NAMES.get(name, name): value for name, value in args.items()}
    return other(**renamed, return_dict=False)[0]


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative L2."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


# against diffusers


@pytest.mark.parametrize(
    "changed, more",
    [
        ({}, {}),
        ({"guidance_embed": False}, {}),
        ({"in_channels": 28}, {}),
        ({"num_heads": 1, "axes_dim": (16, 16, 16)}, {}),
        ({"depth": 0}, {}),
        ({"depth_single_blocks": 0}, {}),
        ({"depth": 0, "depth_single_blocks": 0}, {}),
        ({}, {"batch": 1, "ids": grid(1, 7)}),
        ({}, {"batch": 3, "ids": grid(5, 2), "txt": 9}),
        ({}, {"ids": torch.cat((grid(3, 4), grid(2, 5, picture=1)))}),
        ({}, {"ids": 1000 * grid(3, 4)}),
    ],
    ids=[
        "guidance", "no guidance", "condition channels", "one head", "no double block",
        "no single block", "no block", "a single row", "tall, batch of 3", "a reference picture",
        "far positions",
    ],
)  # fmt: skip
@torch.no_grad()
def test_velocity_agrees_with_diffusers(changed: dict[str, Any], more: dict[str, Any]):
    model = random_flux(replace(TINY, **changed))
    args = inputs(model.config, **more)
    velocity = model(**args)
    assert velocity.shape == (*args["img"].shape[:2], model.config.out_channels)
    assert distance(velocity, run_theirs(theirs(model), args)) <= 1e-5


@torch.no_grad()
def test_velocity_without_text_agrees_with_diffusers():
    model = random_flux(TINY)
    args = inputs(TINY, txt=0)
    assert distance(model(**args), run_theirs(theirs(model), args)) <= 1e-5


def test_gradients_of_every_parameter_agree_with_diffusers():
    model = random_flux(TINY)
    other, args = theirs(model), inputs(TINY)
    ours = {**args, "img": args["img"].clone().requires_grad_()}
    mirrored = {**args, "img": args["img"].clone().requires_grad_()}
    model(**ours).square().sum().backward()
    run_theirs(other, mirrored).square().sum().backward()
    assert distance(ours["img"].grad, mirrored["img"].grad) <= 1e-4
    gradients = flux_to_diffusers({name: p.grad for name, p in model.named_parameters()})
    for name, parameter in other.named_parameters():
        assert parameter.grad.norm() > 0, name
        assert distance(gradients[name], parameter.grad) <= 1e-4, name


@torch.no_grad()
def test_bf16_is_as_accurate_as_diffusers():
    model = random_flux(TINY).bfloat16()
    args = inputs(TINY, batch=4)
    args["timesteps"] = torch.tensor([1.0, 0.75, 0.5, 0.125])  # their thousands are exact in bf16
    args["guidance"] = torch.tensor([1.0, 2.0, 4.0, 0.5])
    half = {k: v if k.endswith("ids") else v.bfloat16() for k, v in args.items()}
    wide = {k: v if k.endswith("ids") else v.float() for k, v in half.items()}
    ours, other = model(**half), run_theirs(theirs(model), half)
    assert ours.dtype == torch.bfloat16
    truth = model.float()(**wide)
    assert distance(ours, truth) <= 2 * distance(other, truth)


@torch.no_grad()
def test_without_qkv_bias_equals_a_zero_bias():
    model = random_flux(TINY)
    for block in model.double_blocks:
        block.img_attn.qkv.bias.zero_()
        block.txt_attn.qkv.bias.zero_()
    bare = Flux(replace(TINY, qkv_bias=False))
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("qkv.bias")}
    bare.load_state_dict(state, strict=True)
    args = inputs(TINY)
    assert distance(bare(**args), model(**args)) <= 1e-6


# properties


def block_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """img, txt, vec, cos, sin."""
    ids = torch.cat((torch.zeros(5, 3), grid(3, 4)))
    hidden = TINY.hidden_size
    img, txt, vec = torch.randn(2, 12, hidden), torch.randn(2, 5, hidden), torch.randn(2, hidden)
    return img, txt, vec, *rope_tables(ids, TINY.axes_dim, TINY.theta)


def run_double(
    block: DoubleStreamBlock, img: Tensor, txt: Tensor, vec: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    stream = Stream(torch.cat((txt, img), 1), txt.shape[1])
    block(stream, block.vectors(vec), cos, sin)
    txt, img = stream.split(stream.sum())
    return img, txt


def run_single(
    block: SingleStreamBlock, x: Tensor, vec: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    stream = Stream(x, 5)
    block(stream, block.vectors(vec), cos, sin)
    return stream.sum()


@torch.no_grad()
def test_each_stream_reaches_the_other_in_one_double_block():
    block = random_flux(SMALLEST).double_blocks[0]
    img, txt, *rest = block_inputs()
    _, txt_before = run_double(block, img, txt, *rest)
    _, txt_after = run_double(block, torch.randn_like(img), txt, *rest)
    img_before, _ = run_double(block, img, txt, *rest)
    img_after, _ = run_double(block, img, torch.randn_like(txt), *rest)
    for before, after in ((txt_before, txt_after), (img_before, img_after)):
        assert ((before - after).abs().amax(-1) > 1e-4).all()  # every token


@torch.no_grad()
def test_samples_of_a_batch_do_not_reach_each_other():
    model = random_flux(TINY)
    args = inputs(TINY, batch=3)
    whole = model(**args)
    for i in range(3):
        one = {k: v if k.endswith("ids") else v[i : i + 1] for k, v in args.items()}
        torch.testing.assert_close(model(**one), whole[i : i + 1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_blocks_with_a_zero_modulation_are_the_identity():
    model = random_flux(SMALLEST)
    double, single = model.double_blocks[0], model.single_blocks[0]
    for modulation in (double.img_mod, double.txt_mod, single.modulation):
        modulation.lin.weight.zero_()
        modulation.lin.bias.zero_()
    img, txt, *rest = block_inputs()
    img_out, txt_out = run_double(double, img, txt, *rest)
    assert torch.equal(img_out, img)
    assert torch.equal(txt_out, txt)
    joint = torch.cat((txt, img), 1)
    assert torch.equal(run_single(single, joint, *rest), joint)


@torch.no_grad()
def test_image_tokens_permuted_with_their_ids_permute_the_velocity():
    model = random_flux(TINY)
    args = inputs(TINY)
    order = torch.randperm(12)
    permuted = args | {"img": args["img"][:, order], "img_ids": args["img_ids"][order]}
    expected = model(**args)[:, order]
    assert distance(model(**permuted), expected) <= 1e-5
    unmoved = args | {"img": args["img"][:, order]}
    assert distance(model(**unmoved), expected) > 1e-3  # positions do matter


@torch.no_grad()
def test_shifting_all_positions_together_changes_nothing():
    model = random_flux(TINY)
    args = inputs(TINY)
    shifted = args | {k: args[k] + torch.tensor([1.0, 20.0, 30.0]) for k in ("img_ids", "txt_ids")}
    assert distance(model(**shifted), model(**args)) <= 1e-4


@pytest.mark.parametrize("name", ["timesteps", "guidance", "y", "txt"])
@torch.no_grad()
def test_every_condition_changes_the_velocity(name: str):
    model = random_flux(TINY)
    args = inputs(TINY)
    assert distance(model(**args | {name: args[name] / 2}), model(**args)) > 1e-4


@torch.no_grad()
def test_same_input_twice_gives_the_same_bits():
    model, args = random_flux(TINY), inputs(TINY)
    assert torch.equal(model(**args), model(**args))


@pytest.mark.parametrize("guidance", [True, False])
def test_gradient_reaches_every_parameter_and_input(guidance: bool):
    model = random_flux(replace(TINY, guidance_embed=guidance))
    args = inputs(model.config)
    leaves = {k: v.requires_grad_() for k, v in args.items() if not k.endswith("ids")}
    model(**args).square().sum().backward()
    for name, tensor in (*model.named_parameters(), *leaves.items()):
        assert tensor.grad is not None and tensor.grad.abs().sum() > 0, name


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
def test_compiled_model_equals_eager_and_is_not_compiled_again_for_another_picture_size(
    gradients: bool,
):
    torch._dynamo.reset()
    model = random_flux(SMALLEST)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    more = torch._dynamo.config.patch(error_on_recompile=True)
    with more, torch.set_grad_enabled(gradients):
        for ids in (grid(3, 5), grid(5, 4)):
            args = inputs(SMALLEST, ids=ids)
            torch._dynamo.mark_dynamic(args["img"], 1)
            torch._dynamo.mark_dynamic(args["img_ids"], 0)
            velocity = compiled(**args)
            assert velocity.requires_grad == gradients
            assert distance(velocity.detach(), model(**args).detach()) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 3])
def test_writing_into_joint_buffers_gives_the_bits_of_the_path_with_gradients(
    batch: int, dtype: torch.dtype
):
    block = random_flux(SMALLEST).double_blocks[0].to(dtype)
    ids = torch.cat((torch.zeros(5, 3), grid(3, 4)))
    cos, sin = rope_tables(ids, TINY.axes_dim, TINY.theta)
    stream = Stream(torch.randn(batch, 17, TINY.hidden_size, dtype=dtype), 5)
    h = torch.randn_like(stream.x)
    attn = block._attend(stream, h, cos, sin)
    assert not stream.buffers
    with torch.no_grad():
        functional = attn, block._mlp(stream, h)
        attn = block._attend_in_place(stream, h, cos, sin).clone()  # the MLP takes the same buffer
        in_place = attn, block._mlp_in_place(stream, h)
    assert stream.buffers.keys() == {"wide", "branch"}
    for found, expected in zip(in_place, functional, strict=True):
        assert torch.equal(found, expected)


@torch.no_grad()
def test_inference_and_training_agree():
    model, args = random_flux(TINY), inputs(TINY)
    velocity = model(**args)
    with torch.enable_grad():
        assert distance(velocity, model(**args).detach()) <= 1e-6


class Launches(TorchDispatchMode):
    """What runs on the device beside matrix products and attention, by name.

    GELU counts although a product can have it as its epilogue, and so does what norms and rotates
    before the attention of a single block.
    """

    SILENT = re.compile(r"prim::device|aten::(new_)?empty(\.|$)")
    PRODUCTS = {"fluxkern::linear", "fluxkern::linear_", "fluxkern::modulation"}

    def __init__(self):
        super().__init__()
        self.counts, self.memory = Counter(), 0

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        name, arguments = op.name(), op._schema.arguments
        is_view = any(r.alias_info and not r.alias_info.is_write for r in op._schema.returns)
        named = dict(zip((a.name for a in arguments), args, strict=False))
        if name in self.PRODUCTS:
            self.counts["gelu_tanh"] += named.get("activation") == "gelu_tanh"
        elif name == "fluxkern::rope_attention":
            self.counts["qk_norm_rope"] += 1
        elif name != "fluxkern::attention" and not is_view and not self.SILENT.match(name):
            self.counts[name] += 1
        self.memory += name == "aten::new_empty"
        return op(*args, **kwargs or {})


@torch.no_grad()
def launches(depth: int, singles: int) -> Launches:
    """Of one step of a model of FLUX.1's size at 1024 x 1024 pixels."""
    config = replace(CONFIGS["dev"], depth=depth, depth_single_blocks=singles)
    with FakeTensorMode():
        model = Flux(config)
        args = inputs(config, batch=1, txt=512, ids=torch.zeros(64 * 64, 3))
        ids, times = (args["img_ids"], args["txt_ids"]), args["timesteps"][None]
        (workspace,) = model.workspaces(*ids, times, args["y"], args["guidance"])
        with Launches() as found:
            model(**args, workspace=workspace)
    return found


def test_every_launch_beside_products_and_attention_is_ours_and_they_are_few():
    one = launches(1, 1)
    double = launches(2, 1).counts - one.counts
    single = launches(1, 2).counts - one.counts
    residual_and_norm = "fluxkern::gated_residual_norm_modulate"
    assert double == {residual_and_norm: 2, "fluxkern::qk_norm_rope_": 1, "gelu_tanh": 2}
    assert single == {residual_and_norm: 1, "qk_norm_rope": 1, "gelu_tanh": 1}
    rest = one.counts - double - single
    assert rest == {"fluxkern::norm_modulate": 1}  # the first; the last one is with its residual


def test_further_blocks_take_no_memory_for_their_products():
    assert launches(3, 1).memory == launches(1, 3).memory == launches(1, 1).memory > 0


# what is computed ahead

every_row_alone = pytest.mark.skipif(
    ops.explain("modulation")[0].chosen == "reference",
    reason="torch's product sums in another order for another number of rows",
)


@every_row_alone
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_modulation_of_a_schedule_is_within_one_ulp_of_step_by_step(dtype: torch.dtype):
    model = random_flux(replace(TINY, hidden_size=768, num_heads=48)).to(dtype)
    args = inputs(TINY, batch=3)
    ids, y = (args["img_ids"], args["txt_ids"]), args["y"].to(dtype)
    timesteps = torch.rand(5, 3).to(dtype)
    ahead = model.workspaces(*ids, timesteps, y, args["guidance"])
    for step, workspace in enumerate(ahead):
        (alone,) = model.workspaces(*ids, timesteps[step, None], y, args["guidance"])
        assert len(workspace.modulation) == 2 + 2 + 1
        for found, expected in zip(
            chain(*workspace.modulation), chain(*alone.modulation), strict=True
        ):
            assert found.shape == expected.shape and found.shape[1] in (1, 2)
            ulp = torch.finfo(dtype).eps * expected.abs().clamp(min=torch.finfo(dtype).tiny)
            assert ((found - expected).abs() <= ulp).all()


@every_row_alone
@torch.no_grad()
def test_velocity_with_a_workspace_of_the_schedule_has_the_same_bits():
    model, args = random_flux(TINY), inputs(TINY)
    ids = (args["img_ids"], args["txt_ids"])
    timesteps = torch.stack((torch.rand(2), args["timesteps"]))
    workspace = model.workspaces(*ids, timesteps, args["y"], args["guidance"])[1]
    expected = model(**args)
    for _ in range(2):  # it serves any number of calls
        assert torch.equal(model(**args, workspace=workspace), expected)


@torch.no_grad()
def test_modulation_layers_are_a_quarter_of_a_flux_and_not_needed_beside_a_workspace():
    model, args = random_flux(TINY), inputs(TINY)
    ids = (args["img_ids"], args["txt_ids"])
    (workspace,) = model.workspaces(*ids, args["timesteps"][None], args["y"], args["guidance"])
    expected = model(**args)
    model.modulation_to("meta")
    assert torch.equal(model(**args, workspace=workspace), expected)
    gone = {name for name, p in model.named_parameters() if p.is_meta}
    assert gone == {name for name in model.state_dict() if re.search(r"_?mod(ulation)?\.", name)}
    with torch.device("meta"):
        full = Flux(CONFIGS["dev"])
    sizes = {name: p.numel() for name, p in full.named_parameters() if "mod" in name}
    vectors = 2 * 19 * 6 + 38 * 3 + 2  # of a double block's streams, a single block, the last layer
    assert sum(sizes.values()) == vectors * 3072 * (3072 + 1) == 3_247_448_064


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@torch.no_grad()
def test_released_modulation_waits_in_pinned_memory_and_comes_back_as_it_was():
    model = random_flux(TINY).to("cuda", torch.bfloat16)
    before = {name: p.cpu() for name, p in model.named_parameters()}
    model.modulation_to("cpu")
    away = {name for name, p in model.named_parameters() if not p.is_cuda}
    assert away and all(p.is_pinned() for p in model.parameters() if not p.is_cuda)
    model.modulation_to("cuda")
    assert all(torch.equal(p.cpu(), before[name]) for name, p in model.named_parameters())


# sizes


@pytest.mark.parametrize(
    "name, tensors, parameters",
    [
        ("dev", 780, 11_901_408_320),
        ("kontext", 780, 11_901_408_320),
        ("schnell", 776, 11_891_178_560),
        ("fill", 780, 11_902_391_360),
        ("control", 780, 11_901_604_928),
    ],
)
def test_full_size_models_have_the_published_sizes(name: str, tensors: int, parameters: int):
    with torch.device("meta"):
        state = Flux(CONFIGS[name]).state_dict()
    assert len(state) == tensors
    assert sum(t.numel() for t in state.values()) == parameters


def test_compact_model_has_4_to_6_million_parameters():
    with torch.device("meta"):
        model = Flux(CONFIGS["compact"])
    assert 4_000_000 < sum(p.numel() for p in model.parameters()) < 6_000_000
    assert set(CONFIGS) == {"dev", "schnell", "fill", "control", "kontext", "compact"}


# positions


def test_rope_tables_hold_the_published_frequencies_axis_after_axis():
    ids = torch.tensor([[0, 0, 0], [1, 63, 127], [0, 4095, 1], [2, 12345, 65535], [0, 0.5, -3]])
    cos, sin = rope_tables(ids.float(), (16, 56, 56), 10000)
    assert cos.shape == sin.shape == (5, 64)
    assert cos.dtype == sin.dtype == torch.float32
    for token, position in enumerate(ids.tolist()):
        angles = [
            position[axis] / 10000 ** (2 * k / dim)
            for axis, dim in enumerate((16, 56, 56))
            for k in range(dim // 2)
        ]
        # rounded once to fp32, at any distance
        np.testing.assert_allclose(cos[token], [math.cos(a) for a in angles], rtol=0, atol=6e-8)
        np.testing.assert_allclose(sin[token], [math.sin(a) for a in angles], rtol=0, atol=6e-8)


def test_rope_tables_at_the_origin_are_the_identity():
    cos, sin = rope_tables(torch.zeros(3, 3), (4, 6, 6), 10000)
    assert torch.equal(cos, torch.ones(3, 8))
    assert torch.equal(sin, torch.zeros(3, 8))


# refusals


@pytest.mark.parametrize(
    "changed, expected",
    [
        ({"img": torch.zeros(2, 12, 11)}, "img must be [2, 12, 12], got [2, 12, 11]"),
        (
            {"img": torch.zeros(12, 12)},
            "img and txt must be [B, L, C], got [12, 12] and [2, 5, 24]",
        ),
        ({"img_ids": torch.zeros(11, 3)}, "img_ids must be [12, 3], got [11, 3]"),
        ({"img_ids": torch.zeros(12, 2)}, "img_ids must be [12, 3], got [12, 2]"),
        ({"txt": torch.zeros(2, 5, 23)}, "txt must be [2, 5, 24], got [2, 5, 23]"),
        ({"txt": torch.zeros(3, 5, 24)}, "txt must be [2, 5, 24], got [3, 5, 24]"),
        ({"txt_ids": torch.zeros(6, 3)}, "txt_ids must be [5, 3], got [6, 3]"),
        ({"timesteps": torch.tensor(1.0)}, "timesteps must be [2], got []"),
        ({"y": torch.zeros(2, 21)}, "y must be [2, 20], got [2, 21]"),
        ({"guidance": torch.zeros(1)}, "guidance must be [2], got [1]"),
        ({"guidance": None}, "guidance must be [B] for this model, got None"),
    ],
)
def test_a_wrong_input_is_refused_with_both_values(changed: dict[str, Any], expected: str):
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        Flux(SMALLEST)(**inputs(SMALLEST) | changed)


@pytest.mark.parametrize("name", ["img", "txt", "y"])
def test_a_wrong_dtype_is_refused_with_both_dtypes(name: str):
    args = inputs(SMALLEST)
    with pytest.raises(ValueError, match=r"torch.float32.*torch.float64|torch.float64.*float32"):
        Flux(SMALLEST)(**args | {name: args[name].double()})


def test_guidance_is_refused_by_a_model_that_does_not_take_it():
    model = Flux(replace(SMALLEST, guidance_embed=False))
    with pytest.raises(ValueError, match="guidance must be None for this model, got a tensor"):
        model(**inputs(SMALLEST))


@pytest.mark.parametrize(
    "changed, expected",
    [
        ({"num_heads": 5}, "hidden_size must be a multiple of num_heads, got 48 and 5"),
        (
            {"axes_dim": (4, 6, 8)},
            "axes_dim must be even and sum to the head dim, 16, got [4, 6, 8]",
        ),
        (
            {"axes_dim": (5, 5, 6)},
            "axes_dim must be even and sum to the head dim, 16, got [5, 5, 6]",
        ),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused(changed: dict[str, Any], expected: str):
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        replace(TINY, **changed)

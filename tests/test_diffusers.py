"""fluxkern.accelerate on diffusers' FluxTransformer2DModel: same results, everything kept."""

import copy
import json
import logging
import pickle
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.modeling_utils import no_init_weights
from diffusers.models.transformers import transformer_flux
from diffusers_models import distance, fused, inputs, run, tiny_transformer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import fluxkern
from fluxkern import compact
from fluxkern.integrations import _fused
from fluxkern.integrations import diffusers as drop_in
from fluxkern.ops import measured
from fluxkern.ops.measured import size_class


@pytest.fixture(autouse=True)
def _warn_anew() -> None:
    _fused.warn_once.cache_clear()


@pytest.fixture
def model() -> FluxTransformer2DModel:
    return tiny_transformer()


# the same results


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("layers", [(1, 1), (2, 0), (0, 2)])
def test_fp32_results_are_the_originals(layers: tuple[int, int], guidance: bool):
    model = tiny_transformer(
        num_layers=layers[0], num_single_layers=layers[1], guidance_embeds=guidance
    )
    given = inputs(model)
    expected = run(model, given)
    found = run(fluxkern.accelerate(model, strict=True), given)
    assert distance(found, expected) < 1e-5
    assert not torch.equal(found, torch.zeros_like(found))


@pytest.mark.parametrize("batch, side, txt_len", [(1, 6, 1), (3, 1, 7)])
def test_any_size_gives_the_originals_result(model, batch: int, side: int, txt_len: int):
    given = inputs(model, batch, side, txt_len)
    expected = run(model, given)
    assert distance(run(fluxkern.accelerate(model, strict=True), given), expected) < 1e-5


@pytest.mark.parametrize(
    "shared",
    [("encoder_hidden_states", "pooled_projections"), ("timestep", "pooled_projections")],
    ids=["prompt", "conditions"],
)
def test_what_a_batch_shares_is_given_once(model, shared: tuple[str, ...]):
    given = inputs(model)
    given |= {name: given[name][:1] for name in shared}
    expected = run(model, given)
    assert expected.shape[0] == 2
    assert distance(run(fluxkern.accelerate(model, strict=True), given), expected) < 1e-5


def test_the_compact_checkpoint_gives_the_originals_result():
    folder = Path(compact.__file__).parent / "weights" / "transformer"
    model = FluxTransformer2DModel.from_pretrained(folder).float().eval()
    given = inputs(model, 1, 8, 16)
    expected = run(model, given)
    assert distance(run(fluxkern.accelerate(model, strict=True), given), expected) < 1e-5


def test_bf16_is_as_near_to_fp32_as_the_original(seed: int):
    ours, theirs = 0.0, 0.0
    for n in range(8):
        torch.manual_seed(seed + n)
        model = tiny_transformer(num_attention_heads=4)
        given = inputs(model)
        exact = run(model, given)
        model, given = model.bfloat16(), _cast(given, torch.bfloat16)
        theirs += (run(model, given).float() - exact).square().mean().sqrt().item()
        found = run(fluxkern.accelerate(model, strict=True), given)
        ours += (found.float() - exact).square().mean().sqrt().item()
    assert ours <= 1.05 * theirs


def _cast(given: dict, dtype: torch.dtype) -> dict:
    return {n: t if n.endswith("_ids") else t.to(dtype) for n, t in given.items()}


def test_fp16_streams_are_clipped_as_the_originals(model):
    model = model.half()
    img, txt, temb = (torch.randn(size).half() for size in ((1, 4, 32), (1, 3, 32), (1, 32)))
    rotation = model.pos_embed(torch.arange(21.0).view(7, 3))
    blocks = (model.transformer_blocks[0], model.single_transformer_blocks[0])
    with torch.no_grad():
        for bias in (blocks[0].ff_context.net[2].bias, blocks[1].proj_out.bias):
            bias.fill_(6e4)
        expected = [block(img, txt, 9 * temb, rotation) for block in blocks]
        fluxkern.accelerate(model, strict=True)
        found = [block(img, txt, 9 * temb, rotation) for block in blocks]
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs[0].abs().max() == 65504
        assert all(distance(a.float(), b.float()) < 0.01 for a, b in zip(ours, theirs, strict=True))


def test_gradients_of_all_parameters_and_inputs_are_the_originals(model):
    given = inputs(model)
    given["hidden_states"].requires_grad_()
    expected = _gradients(model, given)
    found = _gradients(fluxkern.accelerate(model, strict=True), given)
    assert found.keys() == expected.keys() and len(found) == len(list(model.parameters())) + 1
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-7, name


def _gradients(model: FluxTransformer2DModel, given: dict) -> dict[str, torch.Tensor]:
    out = model(**given, return_dict=False)[0]
    leaves = {**dict(model.named_parameters()), "hidden_states": given["hidden_states"]}
    wave = torch.arange(out.numel()).sin().view(out.shape)
    return dict(zip(leaves, torch.autograd.grad((out * wave).sum(), leaves.values()), strict=True))


def test_gradient_checkpointing_gives_the_same_gradients(model):
    given = inputs(model)
    given["hidden_states"].requires_grad_()
    expected = _gradients(fluxkern.accelerate(model, strict=True), given)
    model.train().enable_gradient_checkpointing()
    found = _gradients(model, given)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# what is there, and what runs


def test_every_norm_gate_attention_and_gelu_of_a_whole_model_runs_on_ops():
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    sites = fluxkern.explain(fluxkern.accelerate(model, strict=True))
    kinds = Counter(site.kind for site in sites)
    assert kinds == {"norm": 115, "gate": 114, "attention": 57, "gelu": 76}
    assert not any(site.runs == "original" or site.reason for site in sites)
    assert len({site.name for site in sites}) == len(sites)


def test_a_model_on_meta_runs():
    with torch.device("meta"):
        model = tiny_transformer()
        given = inputs(model)
    assert run(fluxkern.accelerate(model, strict=True), given).shape == (2, 16, 16)


def test_the_table_has_one_line_for_blocks_that_are_alike(model):
    lines = str(fluxkern.explain(fluxkern.accelerate(model))).splitlines()
    assert len(lines) == 1 + 11 + 4
    assert any(line.startswith("transformer_blocks.0-1.attn ") for line in lines)


def test_the_backend_of_the_table_is_what_the_ops_choose(model):
    backends = {site.backend for site in fluxkern.explain(fluxkern.accelerate(model))}
    chosen = fluxkern.ops.explain("norm_modulate")[0].chosen
    assert backends == {chosen}
    fluxkern.accelerate(model, backend="reference")
    assert {site.backend for site in fluxkern.explain(model)} == {"reference"}


def test_the_backend_of_the_table_is_that_of_as_many_tokens_as_the_last_call_had(
    model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if fluxkern.ops.explain("gated_residual")[0].reasons["cpu"]:
        pytest.skip("no second backend on this machine")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    few, many = (size_class(torch.empty(tokens, 32)) for tokens in (21, drop_in.TOKENS))
    sizes = {few: {"reference": 1.0, "cpu": 2.0}, many: {"cpu": 1.0, "reference": 2.0}}
    name = measured.device_name(torch.device("cpu"))
    digest = {"gated_residual": measured.digests("gated_residual", ["cpu"])}
    table = {"order": {"gated_residual": {"float32": sizes}}, "digest": digest}
    measured.user_folder().mkdir(parents=True)
    (measured.user_folder() / measured.file_name(name)).write_text(json.dumps(table))
    fluxkern.accelerate(model)
    measured.forget()
    try:
        assert fluxkern.explain(model)[-1].backend == "cpu"
        run(model, inputs(model))
        assert fluxkern.explain(model)[-1].backend == "reference"
    finally:
        measured.forget()


def test_a_named_backend_that_cannot_run_is_said_in_the_table(model):
    given = inputs(model)
    fluxkern.accelerate(model.double(), backend="cpu")
    cells = {site.backend for site in fluxkern.explain(model)}
    assert len(cells) == 1 and "which cannot run" in cells.pop()
    with pytest.raises(NotImplementedError, match="cannot run on cpu"):
        run(model, {name: t.double() for name, t in given.items()})


def test_a_model_without_blocks_has_its_last_norm():
    model = tiny_transformer(num_layers=0, num_single_layers=0)
    given = inputs(model)
    expected = run(model, given)
    assert [site.name for site in fluxkern.explain(fluxkern.accelerate(model))] == ["norm_out"]
    assert distance(run(model, given), expected) < 1e-5


def test_a_named_backend_runs(model):
    with fluxkern.ops.record() as calls:
        run(fluxkern.accelerate(model, backend="reference"), inputs(model))
    assert {call.named for call in calls} == {"reference"}
    assert Counter(call.op for call in calls) == {
        "norm_modulate": 7,
        "gated_residual_norm_modulate": 4,
        "gated_residual": 6,
        "gelu_tanh": 6,
        "joint_qk_norm_rope": 2,
        "qk_norm_rope": 2,
        "attention": 4,
    }


def test_the_triton_kernels_take_what_the_modules_hand_them():
    model = tiny_transformer(num_layers=1, num_single_layers=1)
    given = inputs(model, 1, 2, 3)
    if torch.cuda.is_available():
        model, given = model.cuda(), {name: t.cuda() for name, t in given.items()}
    expected = run(model, given)
    fluxkern.accelerate(model, strict=True, backend="triton")
    assert distance(run(model, given), expected) < 1e-5


def test_an_untouched_model_is_explained(model):
    assert {site.reason for site in fluxkern.explain(model)} == {"not accelerated"}


def test_explain_still_answers_for_ops():
    assert fluxkern.explain("gelu_tanh") == fluxkern.ops.explain("gelu_tanh")
    assert len(fluxkern.explain()) == len(fluxkern.ops.explain())


@pytest.mark.parametrize("nothing", [nn.Linear(2, 2), nn.Sequential()])
def test_nothing_to_accelerate_is_an_error(nothing: nn.Module):
    with pytest.raises(ValueError, match="nothing to accelerate in"):
        fluxkern.accelerate(nothing)


@pytest.mark.parametrize("wrong", [3, "flux", None])
def test_what_is_no_model_is_refused(wrong: object):
    with pytest.raises(ValueError, match="must be a diffusers pipeline or a torch module"):
        fluxkern.accelerate(wrong)


def test_an_unknown_backend_is_refused(model):
    with pytest.raises(ValueError, match="backend must be one of .*got 'gpu'"):
        fluxkern.accelerate(model, backend="gpu")


# what is not known runs as it was


class OtherAttention(transformer_flux.FluxAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def test_an_unknown_class_keeps_its_code_and_says_so(model, caplog: pytest.LogCaptureFixture):
    for block in model.transformer_blocks:
        block.attn.__class__ = OtherAttention
    given = inputs(model)
    expected = run(model, given)
    with caplog.at_level(logging.WARNING, "fluxkern"):
        fluxkern.accelerate(model)
    assert [r.message for r in caplog.records if "OtherAttention" in r.message] == [
        r.message for r in caplog.records
    ]
    assert len(caplog.records) == 1
    original = {site.name for site in fluxkern.explain(model) if site.runs == "original"}
    assert original == {f"transformer_blocks.{n}.attn" for n in (0, 1)}
    assert distance(run(model, given), expected) < 1e-5


def test_strict_refuses_an_unknown_class_and_changes_nothing(model):
    model.transformer_blocks[1].attn.__class__ = OtherAttention
    before = snapshot(model)
    with pytest.raises(NotImplementedError, match="OtherAttention"):
        fluxkern.accelerate(model, strict=True)
    assert snapshot(model) == before


def of_another_diffusers(
    monkeypatch: pytest.MonkeyPatch, cls: type, name: str, function: Callable
) -> None:
    """As the package itself would define it."""
    own = dict(vars(transformer_flux))
    new = FunctionType(function.__code__, own, name, function.__defaults__, function.__closure__)
    new.__kwdefaults__, new.__qualname__ = function.__kwdefaults__, f"{cls.__qualname__}.{name}"
    monkeypatch.setattr(cls, name, new)


def test_a_block_that_computes_something_else_is_found(model, monkeypatch: pytest.MonkeyPatch):
    forward = transformer_flux.FluxSingleTransformerBlock.forward

    def doubled(self, *args, **kwargs):
        txt, img = forward(self, *args, **kwargs)
        return txt, 2 * img  # the last norm hides the last block's

    block = transformer_flux.FluxSingleTransformerBlock
    of_another_diffusers(monkeypatch, block, "forward", doubled)
    given = inputs(model)
    expected = run(model, given)
    fluxkern.accelerate(model)
    reasons = {s.reason for s in fluxkern.explain(model) if s.kind == "gate" and s.reason}
    assert reasons == {"FluxSingleTransformerBlock of this diffusers computes something else"}
    assert distance(run(model, given), expected) < 1e-5


def test_a_processor_of_another_signature_is_found(model, monkeypatch: pytest.MonkeyPatch):
    def other(self, attn, hidden_states, *, everything_else_is_new):
        raise AssertionError

    of_another_diffusers(monkeypatch, transformer_flux.FluxAttnProcessor, "__call__", other)
    monkeypatch.setattr(drop_in, "_verdicts", {})
    with pytest.raises(ValueError, match="this diffusers could not be tried"):
        fluxkern.accelerate(model)


class Mode(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@contextmanager
def bf16_by_default():
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def attention_of_a_gpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", None)
        yield


SURROUNDINGS = [
    bf16_by_default,
    attention_of_a_gpu,
    Mode,
    torch.inference_mode,
    lambda: torch.device("meta"),
    lambda: torch.autocast("cpu", torch.bfloat16),
    lambda: attention_backend("_native_math"),
    FakeTensorMode,
    init_empty_weights,
    lambda: init_empty_weights(include_buffers=True),
    no_init_weights,
]


@pytest.mark.parametrize("surrounding", SURROUNDINGS)
def test_what_a_program_has_set_makes_no_class_unknown(
    surrounding: Callable, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(drop_in, "_verdicts", {})
    state = torch.get_rng_state()
    with surrounding():
        assert {drop_in._why_not_this_diffusers(cls) for cls in drop_in.FUSED} == {None}
    assert torch.equal(torch.get_rng_state(), state)


# taken back


def snapshot(model: nn.Module) -> dict:
    """Every attribute of every module: class, dictionary, hooks, identity of tensors."""
    found = {}
    for name, module in model.named_modules():
        own = {
            k: (id(v) if not isinstance(v, dict) else {n: id(x) for n, x in v.items()})
            for k, v in vars(module).items()
        }
        found[name] = (type(module), own, module.forward.__func__, module.extra_repr())
    return found


def test_restore_takes_every_attribute_back(model):
    model.transformer_blocks[0].norm1.linear.register_forward_hook(lambda *_: None)
    before, text = snapshot(model), repr(model)
    given = inputs(model)
    expected = run(model, given)
    assert fluxkern.restore(fluxkern.accelerate(model)) is model
    assert snapshot(model) == before and repr(model) == text
    assert torch.equal(run(model, given), expected)


def test_restore_of_what_is_not_accelerated_changes_nothing(model):
    before = snapshot(model)
    fluxkern.restore(model)
    assert snapshot(model) == before


def test_accelerate_twice_is_once(model):
    given = inputs(model)
    before = snapshot(model)
    first = run(fluxkern.accelerate(model), given)
    assert torch.equal(run(fluxkern.accelerate(model), given), first)
    fluxkern.restore(model)
    assert snapshot(model) == before


def test_tree_names_and_isinstance_stay(model):
    names = [(n, type(m).__name__) for n, m in model.named_modules() if not isinstance(m, nn.GELU)]
    keys = {n: p.data_ptr() for n, p in model.state_dict().items()}
    fluxkern.accelerate(model)
    after = [(n, type(m).__name__) for n, m in model.named_modules() if not isinstance(m, nn.GELU)]
    assert after == names
    assert {n: p.data_ptr() for n, p in model.state_dict().items()} == keys
    block = model.transformer_blocks[0]
    assert isinstance(block, transformer_flux.FluxTransformerBlock)
    assert isinstance(block.attn, transformer_flux.FluxAttention)
    assert type(model) is FluxTransformer2DModel
    assert set(model._no_split_modules) == {type(b).__name__ for b in (block, *_singles(model))}


def _singles(model: FluxTransformer2DModel) -> nn.ModuleList:
    return model.single_transformer_blocks


# what a user does with a model


def test_what_is_saved_loads_without_us(model, tmp_path: Path):
    given = inputs(model)
    expected = run(model, given)
    fluxkern.accelerate(model).save_pretrained(tmp_path)
    assert "fluxkern" not in (tmp_path / "config.json").read_text()
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path).eval()
    assert torch.equal(run(loaded, given), expected)


def test_a_copy_is_accelerated_and_its_own(model):
    given = inputs(model)
    expected = run(fluxkern.accelerate(model), given)
    copied = copy.deepcopy(model)
    assert torch.equal(run(copied, given), expected)
    fluxkern.restore(model)
    assert len(fused(fluxkern.explain(copied))) > 0 == len(fused(fluxkern.explain(model)))
    assert type(fluxkern.restore(copied).norm_out).__module__.startswith("diffusers")


def test_pickled_and_back(model):
    given = inputs(model)
    expected = run(fluxkern.accelerate(model), given)
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(run(loaded, given), expected)
    assert fused(fluxkern.explain(loaded)) == fused(fluxkern.explain(model))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_moved_to_another_dtype(model, dtype: torch.dtype):
    given = inputs(model)
    exact = run(fluxkern.accelerate(model, strict=True), given)
    given = _cast(given, dtype)
    found = run(model.to(dtype), given)
    theirs = run(fluxkern.restore(model), given)
    assert found.dtype == dtype
    assert distance(found, exact) <= 2 * distance(theirs, exact) + 1e-5


def test_parts_of_other_dtypes_run_the_original_code(model, caplog: pytest.LogCaptureFixture):
    for block in model.transformer_blocks:
        block.attn.norm_q.double()
    given = inputs(model)
    expected = run(model, given)
    fluxkern.accelerate(model)
    with caplog.at_level(logging.WARNING, "fluxkern"):
        found = run(model, given)
    assert distance(found, expected) < 1e-5
    assert [r.message.count("float32 and torch.float64 meet") for r in caplog.records] == [1]
    reasons = {s.name: s.reason for s in fluxkern.explain(model) if s.reason}
    assert reasons.keys() == {f"transformer_blocks.{n}.attn" for n in (0, 1)}


def test_autocast_gives_the_originals_dtype_and_result(model):
    given = inputs(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected = run(model, given)
        found = run(fluxkern.accelerate(model), given)
    exact = run(fluxkern.restore(model), given)
    assert found.dtype == expected.dtype
    assert distance(found.float(), exact) < 2 * distance(expected.float(), exact) + 1e-3


def test_a_linear_that_autocast_changes_is_called_once(model):
    norm, calls = model.transformer_blocks[0].norm1, []
    norm.linear.register_forward_hook(lambda *_: calls.append(1))
    x, emb = torch.randn(1, 4, 32), torch.randn(1, 32)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = norm(x, emb=emb)
        fluxkern.accelerate(model)
        found = norm(x, emb=emb)
    assert len(calls) == 2 and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("where", ["norm2", "attn.norm_k", "norm1.norm", "attn", "ff.net.0"])
def test_a_hook_on_a_module_still_sees_its_output(model, where: str):
    given, seen = inputs(model), []
    module = model.transformer_blocks[0].get_submodule(where)
    handle = module.register_forward_hook(lambda _module, _args, out: seen.append(out))
    expected = run(model, given)
    found = run(fluxkern.accelerate(model), given)
    assert distance(found, expected) < 1e-5 and len(seen) == 2
    handle.remove()
    run(model, given)
    assert len(seen) == 2 and len(fused(fluxkern.explain(model))) == len(fluxkern.explain(model))


def test_every_linear_is_called_and_only_called(model):
    given, called = inputs(model), Counter()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    fluxkern.accelerate(model, strict=True)
    for name, linear in linears.items():
        linear.register_forward_hook(lambda *_, name=name: called.update([name]))
    run(model, given)
    assert called == dict.fromkeys(linears, 1)


# compiled


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiles_as_one_graph_and_once_for_two_resolutions(model):
    fluxkern.accelerate(model, strict=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((3, 5, 7), (3, 6, 7), (3, 3, 11)):  # no length is a width of the model
        given = inputs(model, *size)
        with torch._dynamo.config.patch(error_on_recompile=size[1] != 5):
            assert distance(run(compiled, given), run(model, given)) < 1e-6


@pytest.mark.usefixtures("_fresh_compiler")
def test_repeated_blocks_compile(model):
    given = inputs(model)
    expected = run(fluxkern.accelerate(model, strict=True), given)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert distance(run(model, given), expected) < 1e-6


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_gradients_are_the_eager_ones(model):
    given = inputs(model)
    given["hidden_states"].requires_grad_()
    expected = _gradients(fluxkern.accelerate(model, strict=True), given)
    model.compile(fullgraph=True, backend="aot_eager")
    found = _gradients(model, given)
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max() + 1e-8, name


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_reason_met_while_compiling_is_told(model, caplog: pytest.LogCaptureFixture):
    mask = torch.rand(2, 1, 1, 21) > 0.3
    given = inputs(model) | {"joint_attention_kwargs": {"attention_mask": mask}}
    expected = run(model, given)
    fluxkern.accelerate(model)
    with caplog.at_level(logging.WARNING, "fluxkern"):
        found = run(torch.compile(model, fullgraph=True, backend="aot_eager"), given)
    assert distance(found, expected) < 1e-5
    assert [r.message for r in caplog.records if "attention has a mask" in r.message]


def test_exports(model):
    given = inputs(model)
    expected = run(fluxkern.accelerate(model, strict=True), given)
    program = torch.export.export(model, (), given | {"return_dict": False}, strict=False)
    assert distance(program.module()(**given, return_dict=False)[0], expected) < 1e-6

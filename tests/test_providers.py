"""Attention by kernels of others: what they are given, what they give back, and which is chosen."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_gpu import Called, Chosen, fake_gpu, model_on_gpu, packed
from torch import Tensor

from fluxkern import ops, reference
from fluxkern.model.transformer import CONFIGS
from fluxkern.ops import Backend, _backends, measured
from fluxkern.ops.attention import providers
from fluxkern.testing import assert_accurate

TORCHS = ("cudnn", "flash")
WITH_LSE = (*TORCHS, "flash3")
ATTEND = {
    "cudnn": "_scaled_dot_product_cudnn_attention",
    "flash": "_scaled_dot_product_flash_attention",
}


@pytest.fixture(autouse=True)
def _no_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use_backend: Callable) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(measured, "PACKAGE", tmp_path / "package")
    use_backend(None)


def of(op: str, name: str) -> Backend:
    return _backends.find(op, name)


def assert_like(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for f, e in zip(found, expected, strict=True):
        assert (f.shape, f.dtype, f.device) == (e.shape, e.dtype, e.device)
        assert f.is_contiguous() and e.is_contiguous()


# torch's: aten ops on tensors without memory


@pytest.mark.parametrize("length", [96, 77, 1])
@pytest.mark.parametrize("name", TORCHS)
def test_what_torchs_providers_give_is_what_the_op_promises(name: str, length: int):
    with fake_gpu():
        q, k, v = packed(length=length)
        args = (q, *packed(length=50)[1:])
        assert_like(
            (of("attention", name).run(*args),), (torch.ops.fluxkern.attention(*args, None),)
        )
        found = of("attention_lse", name).run(*args)
        assert_like(found, torch.ops.fluxkern.attention_lse(*args, None))
        backward = (torch.empty_like(found[0]), None, *args, *found)
        expected = torch.ops.fluxkern.attention_backward(*backward, None)
        assert_like(of("attention_backward", name).run(*backward), expected)


@pytest.mark.parametrize("name", TORCHS)
def test_a_packed_projection_is_attended_without_a_copy(name: str):
    with fake_gpu():
        q, k, v = packed()
        with Called() as called:
            of("attention", name).run(q, k, v)
        assert called.names == [ATTEND[name]]
        with Called() as called:
            out, lse = of("attention_lse", name).run(q, k, v)
        assert called.names == [ATTEND[name], "clone"]  # lse, to [B, L, H]
        with Called() as called:
            of("attention_backward", name).run(out, None, q, k, v, out, lse)
        made = [n for n in called.names if not n.startswith("new_empty")]
        assert made == ["clone", f"{ATTEND[name]}_backward"]


# FlashAttention 3: a package with the signatures of its flash_attn_interface.py

FLASH3 = '''
import torch
from fluxkern import reference

calls = []


def flash_attn_func(
    q, k, v, softmax_scale=None, causal=False, qv=None,
    q_descale=None, k_descale=None, v_descale=None,
    window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None,
    deterministic=False, sm_margin=0, return_attn_probs=False,
):
    """[B, L, H, D] -> out, or with return_attn_probs (out, lse [B, H, L])"""
    assert softmax_scale is None and not causal and window_size == (-1, -1) and softcap == 0.0
    out, lse = reference.attention_lse(q, k, v)
    calls.append("forward")
    return (out, lse.transpose(1, 2).contiguous()) if return_attn_probs else out


def _flash_attn_backward(
    dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None,
    sequed_q=None, sequed_k=None, max_seqlen_q=None, max_seqlen_k=None,
    dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
    window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
):
    assert deterministic and softmax_scale == q.shape[-1] ** -0.5 and not is_causal
    assert softmax_lse.is_contiguous() and dq.is_contiguous()
    lse = softmax_lse.transpose(1, 2)
    found = reference.attention_backward(dout, None, q, k, v, out, lse)
    for into, gradient in zip((dq, dk, dv), found):
        into.copy_(gradient)
    calls.append("backward")
    return softmax_lse
'''


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Installs a flash_attn_interface of this source."""

    def install(source: str) -> None:
        (tmp_path / "flash_attn_interface.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "flash_attn_interface", raising=False)
        providers._flash3.cache_clear()

    yield install
    sys.modules.pop("flash_attn_interface", None)
    providers._flash3.cache_clear()


def test_flash3_is_called_as_its_signature_asks_and_its_lse_is_turned(plant: Callable):
    plant(FLASH3)
    q, k, v = (t.normal_() for t in packed(length=9, device="cpu", dtype=torch.float32))
    out, lse = reference.attention_lse(q, k, v)
    assert torch.equal(of("attention", "flash3").run(q, k, v), out)
    found = of("attention_lse", "flash3").run(q, k, v)
    assert torch.equal(found[0], out) and torch.equal(found[1], lse)
    assert found[1].is_contiguous() and found[1].shape == (2, 9, 3)
    dout = torch.randn_like(out)
    gradients = of("attention_backward", "flash3").run(dout, None, q, k, v, *found)
    expected = reference.attention_backward(dout, None, q, k, v, out, lse)
    assert all(torch.equal(g, e) for g, e in zip(gradients, expected, strict=True))
    assert sys.modules["flash_attn_interface"].calls == ["forward", "forward", "backward"]


@pytest.mark.parametrize(
    "source, op, said",
    [
        (FLASH3.replace("return_attn_probs=False", "**_"), "attention", "is older than return_att"),
        ("import no_such_module_of_theirs", "attention", "is not installed"),
        ("raise ImportError('undefined symbol')", "attention", "not import (undefined symbol)"),
        (FLASH3.replace("deterministic=False, sm_margin=0,\n):\n    assert", "x=0):\n    assert"),
         "attention_backward", "takes other arguments"),
    ],
    ids=["older", "broken", "does not import", "another backward"],
)  # fmt: skip
def test_another_flash3_is_refused_with_its_reason(
    plant: Callable, source: str, op: str, said: str
):
    plant(source)
    with fake_gpu():
        assert said in of(op, "flash3").unsupported()


# what is refused

H100, A100, RTX_4090, B200, RTX_5090 = (9, 0), (8, 0), (8, 9), (10, 0), (12, 0)


def odd_rows() -> tuple[Tensor, ...]:
    wide = torch.empty(2, 96, 3 * 64 * 3 + 1, dtype=torch.bfloat16, device="cuda")[..., :-1]
    return wide.unflatten(-1, (3, 3, 64)).unbind(2)


REFUSED = {
    "fp32": (lambda: packed(dtype=torch.float32), H100, "takes bfloat16 and float16"),
    "an odd head": (lambda: packed(dim=20), H100, "multiples of 8 up to 256, got 20"),
    "a wide head": (lambda: packed(dim=264), H100, "multiples of 8 up to 256, got 264"),
    "no tokens": (lambda: packed(length=0), H100, "takes no empty tensors"),
    "odd rows": (odd_rows, H100, "begin at multiples of 16 bytes"),
    "a later element": (lambda: tuple(t[..., 1:] for t in packed(dim=65)), H100, "16 bytes"),
    "one for all": (
        lambda: tuple(t.expand(3, -1, -1, -1) for t in packed(batch=1)),
        H100,
        "do not overlap",
    ),
    "on a CPU": (lambda: packed(device="cpu"), H100, "takes tensors on cuda, got cpu"),
}


@pytest.mark.parametrize("name", TORCHS)
@pytest.mark.parametrize("case", REFUSED)
def test_a_provider_says_what_it_does_not_take(case: str, name: str):
    make, capability, said = REFUSED[case]
    with fake_gpu(capability):
        for op in ("attention", "attention_lse"):
            assert said in of(op, name).unsupported(*make())


def test_cudnn_takes_wide_heads_on_hopper_only():
    for capability, refused in ((H100, False), (A100, True)):
        with fake_gpu(capability):
            assert (
                "up to 128" in str(of("attention", "cudnn").unsupported(*packed(dim=256)))
            ) is refused


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_each_says_so_and_a_named_one_is_an_error():
    (choice,) = ops.explain("attention")
    assert [choice.reasons[name] for name in providers.NAMES] == ["no CUDA device"] * 4
    q, k, v = packed(device="cpu")
    with pytest.raises(
        NotImplementedError, match="attention cannot run on cudnn .*flash3: no CUDA"
    ):
        ops.attention(q, k, v, backend="cudnn")
    with pytest.raises(
        ValueError, match="backend must be one of cuda, triton, cpu, reference, got"
    ):
        ops.gelu_tanh(q, backend="cudnn")


def test_a_gradient_of_lse_and_an_order_that_is_not_fixed_are_refused():
    with fake_gpu():
        q, k, v = packed()
        out, lse = torch.ops.fluxkern.attention_lse(q, k, v, None)
        for name in TORCHS:
            backward = of("attention_backward", name)
            assert backward.unsupported(out, lse, q, k, v, out, lse) == "takes no gradient of lse"
            assert backward.unsupported(out, None, q, k, v, out, lse) is None
        (choice,) = ops.explain("attention_backward", out, None, q, k, v, out, lse)
        assert choice.chosen == "triton"
        assert choice.reasons["cudnn"] == choice.reasons["flash"] == "its sums have no fixed order"


# which is chosen


@pytest.mark.parametrize(
    "capability, chosen",
    [(H100, "cudnn"), (B200, "cudnn"), (A100, "flash"), (RTX_4090, "flash"), (RTX_5090, "flash")],
)
def test_without_a_table_the_published_fastest_of_a_gpu_is_chosen(capability: tuple, chosen: str):
    with fake_gpu(capability):
        heads = packed(1, 4608, 24, 128)
        vectors = torch.empty(2, 128, dtype=torch.bfloat16, device="cuda").unbind()
        tables = torch.empty(2, 4608, 64, device="cuda").unbind()
        assert ops.explain("attention", *heads)[0].chosen == chosen
        assert ops.explain("attention_lse", *heads)[0].chosen == chosen
        assert ops.explain("rope_attention", *heads, *vectors, *tables, 1e-6)[0].chosen == chosen
        assert ops.explain("attention", *(t.float() for t in heads))[0].chosen == "sdpa"
        assert ops.explain("attention_lse", *(t.float() for t in heads))[0].chosen == "triton"


@pytest.mark.parametrize("capability", [A100, H100, RTX_5090])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_ours_multiply_without_tensor_cores_is_left_to_torch(capability: tuple, dtype):
    """The autoencoder's attention: one head of 512."""
    with fake_gpu(capability):
        q, k, v = packed(1, 16384, 1, 512, dtype=dtype)
        assert ops.explain("attention", q, k, v)[0].chosen == "sdpa"
        (choice,) = ops.explain("attention_lse", q, k, v)
        assert choice.chosen != "sdpa" and choice.reasons["sdpa"] == "gives no lse"
        assert ops.explain("attention", *packed(dim=128))[0].chosen != "sdpa"
        empty = ops.explain("attention", *packed(0, dim=512, dtype=dtype))[0]
        assert empty.reasons["sdpa"] == "takes no empty tensors"


@pytest.mark.parametrize("dim", [40, 512])
def test_what_sdpa_gives_is_what_the_op_promises(dim: int):
    q, k, v = (t.normal_() for t in packed(2, 33, 3, dim, dtype=torch.float32, device="cpu"))
    out = providers.attention("sdpa", q, k, v)
    assert out.is_contiguous()
    truth = reference.attention(q.double(), k.double(), v.double())
    assert_accurate(out, truth, reference.attention(q, k, v), "attention by sdpa")


def test_an_installed_flash3_is_taken_on_hopper_alone(plant: Callable):
    plant(FLASH3)
    for capability, chosen in ((H100, "flash3"), (B200, "cudnn"), (A100, "flash")):
        with fake_gpu(capability):
            assert ops.explain("attention", *packed())[0].chosen == chosen


def test_what_was_measured_fastest_comes_before_what_was_published():
    table = {"attention": {"bfloat16": {"24": {"triton": 400.0, "cudnn": 450.0}}}}
    measured.user_folder().mkdir(parents=True)
    digest = {"attention": measured.digests("attention", ["triton"])}
    text = json.dumps({"order": table, "digest": digest})
    (measured.user_folder() / "fake-h100.json").write_text(text)
    with fake_gpu():
        (choice,) = ops.explain("attention", *packed(1, 4608, 24, 128))
    assert choice.chosen == "triton" and "measured: triton 400 us, cudnn 450 us" in str(choice)


@torch.no_grad()
def chosen_in_a_model(capability: tuple[int, int]) -> tuple[list[str], dict[str, set]]:
    """Of a step of one double and one single block of FLUX.1's width in bf16 at 1024 x 1024."""
    config = replace(CONFIGS["dev"], depth=1, depth_single_blocks=1)
    with fake_gpu(capability):
        model = model_on_gpu(config)
        bf16 = {"dtype": torch.bfloat16, "device": "cuda"}
        img, txt = torch.empty(1, 4096, 64, **bf16), torch.empty(1, 512, 4096, **bf16)
        ids = torch.empty(4096, 3, device="cuda"), torch.empty(512, 3, device="cuda")
        step = (torch.empty(1, device="cuda", dtype=torch.bfloat16), torch.empty(1, 768, **bf16))
        with Chosen() as found:
            model(img, ids[0], txt, ids[1], *step, torch.empty(1, device="cuda"))
    by_op: dict[str, set] = {}
    for op, backend in found.calls:
        by_op.setdefault(op, set()).add(backend)
    return [op for op, _ in found.calls], by_op


@pytest.mark.parametrize("capability, attends", [(H100, "cudnn"), (A100, "flash")])
def test_our_model_runs_on_the_fused_ops_and_the_best_attention(capability: tuple, attends: str):
    calls, by_op = chosen_in_a_model(capability)
    blocks = [op for op in calls if op not in ("linear_", "linear", "modulation")]
    assert blocks == [
        "norm_modulate", "qk_norm_rope_", "attention",
        "gated_residual_norm_modulate", "gated_residual_norm_modulate",
        "rope_attention", "gated_residual_norm_modulate",
    ]  # fmt: skip
    assert by_op["attention"] == by_op["rope_attention"] == {attends}
    assert by_op["linear_"] == by_op["linear"] == {"cuda"}
    for op in ("norm_modulate", "qk_norm_rope_", "gated_residual_norm_modulate"):
        assert by_op[op] == {"triton"}  # no object of the CUDA sources is loaded here
    assert "reference" not in set().union(
        *(by_op[op] for op in by_op if op != "timestep_embedding")
    )


# GELU in the epilogue of a product


def gelu_calls(dtype: torch.dtype, bias: bool, batch: int = 1) -> list[str]:
    with fake_gpu():
        x = torch.empty(batch, 7, 64, dtype=dtype, device="cuda")
        weight, b = x.new_empty(256, 64), x.new_empty(256) if bias else None
        out = x.new_empty(batch, 9, 256)[:, 2:]
        with Called() as called:
            of("linear_", "cuda").run(out, x, weight, b, "gelu_tanh", False)
        return called.names


def test_gelu_is_the_epilogue_of_a_half_precision_product_with_a_bias(
    monkeypatch: pytest.MonkeyPatch,
):
    apart = []
    monkeypatch.setattr(_backends, "run_into", lambda out, op, *_: apart.append(op))
    for dtype in providers.HALF:
        assert gelu_calls(dtype, True) == ["_addmm_activation"]
        assert gelu_calls(dtype, True, batch=3) == 3 * ["_addmm_activation"]
    assert apart == []
    assert gelu_calls(torch.float32, True) == ["addmm"]
    assert gelu_calls(torch.bfloat16, False) == ["mm"]
    assert apart == 2 * ["gelu_tanh"]


def test_a_cpus_addmm_activation_is_the_other_gelu_so_it_is_not_taken_there():
    x, weight, bias = torch.randn(5, 7), torch.randn(6, 7), torch.randn(6)
    product = torch.addmm(bias, x, weight.t())
    found = torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
    assert torch.equal(found, torch.nn.functional.gelu(product))
    expected = reference.gelu_tanh(product)
    assert not torch.allclose(found, expected, atol=1e-5)
    out = ops.linear(x, weight, bias, activation="gelu_tanh")
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)


# on a GPU

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
LENGTHS = {"odd": (2, 77, 3), "one tile and a row": (1, 129, 2), "longer": (1, 1100, 4)}


def here(op: str, name: str, *args: Tensor) -> None:
    if reason := ops.why_not(op, name, *args):
        pytest.skip(f"{name}: {reason}")


@GPU
@pytest.mark.parametrize("size", LENGTHS)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", providers.HALF, ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", WITH_LSE)
def test_a_provider_agrees_with_the_reference(name: str, dtype: torch.dtype, dim: int, size: str):
    batch, length, heads = LENGTHS[size]
    q, k, v = (t.normal_() for t in packed(batch, length, heads, dim, dtype=dtype))
    here("attention", name, q, k, v)
    truth = reference.attention_lse(q.double(), k.double(), v.double())
    own = reference.attention_lse(q, k, v)
    found = ops.attention_lse(q, k, v, backend=name)
    for f, t, o in zip(found, truth, own, strict=True):
        assert_accurate(f, t, o, f"attention_lse by {name}")
    assert torch.equal(ops.attention(q, k, v, backend=name), found[0])


@GPU
@pytest.mark.parametrize("dtype", providers.HALF, ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", WITH_LSE)
def test_the_gradients_of_a_provider_agree_with_the_reference(name: str, dtype: torch.dtype):
    heads = [t.normal_() for t in packed(2, 130, 3, 128, dtype=dtype)]
    here("attention", name, *heads)
    dout = torch.randn(heads[0].shape, device="cuda").to(dtype)

    def gradients(run: Callable, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in heads]
        return torch.autograd.grad(run(*leaves), leaves, dout.to(dtype))

    truth = gradients(reference.attention, torch.float64)
    own = gradients(reference.attention, dtype)
    found = gradients(lambda *t: ops.attention(*t, backend=name), dtype)
    for tensor, f, t, o in zip("qkv", found, truth, own, strict=True):
        assert_accurate(f, t, o, f"d{tensor} by {name}")


@GPU
@pytest.mark.parametrize("dtype", [torch.float32, *providers.HALF], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("dim", [128, 512])
def test_sdpa_agrees_with_the_reference(dim: int, dtype: torch.dtype):
    q, k, v = (t.normal_() for t in packed(1, 300, 2, dim, dtype=dtype))
    truth = reference.attention(q.double(), k.double(), v.double())
    own = reference.attention(q, k, v)
    assert_accurate(ops.attention(q, k, v, backend="sdpa"), truth, own, "attention by sdpa")


@GPU
def test_cudnn_ran_by_the_name_of_its_kernel():
    q, k, v = (t.normal_() for t in packed(1, 512, 4, 128))
    here("attention", "cudnn", q, k, v)
    ops.attention(q, k, v, backend="cudnn")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ops.attention(q, k, v, backend="cudnn")
        torch.cuda.synchronize()
    kernels = [event.key for event in profile.key_averages()]
    assert any("cudnn" in key.lower() for key in kernels), kernels

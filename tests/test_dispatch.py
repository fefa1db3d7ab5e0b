"""Choosing a backend: the order, the reasons, the names that are refused, the variable."""

import inspect
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

import fluxkern
from fluxkern import ops
from fluxkern.ops import BACKENDS, Backend, _dispatch, explain, register

OP = "private_op_of_this_test"


@pytest.fixture(autouse=True)
def _private_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_dispatch._registry, OP, {})
    monkeypatch.setattr(_dispatch, "DEFAULT_BACKEND", None)


def backend(name: str, reason: str | None = None) -> Backend:
    return Backend(name, lambda *args: (name, args), lambda *args: reason)


def odd_refused(*args: int) -> str | None:
    return "odd numbers are not taken" if args and args[0] % 2 else None


def test_order_is_cuda_triton_cpu_reference_whatever_the_order_of_registration():
    assert BACKENDS == ("cuda", "triton", "cpu", "reference")
    for i in range(len(BACKENDS) - 1, -1, -1):
        register(OP, backend(BACKENDS[i]))
        assert _dispatch.run(OP, None, 1, "two") == (BACKENDS[i], (1, "two"))


def test_first_backend_without_a_reason_runs():
    register(OP, backend("reference"))
    register(OP, backend("cuda", "no GPU"))
    register(OP, Backend("cpu", lambda x: "cpu", odd_refused))
    assert _dispatch.run(OP, None, 2) == "cpu"
    assert _dispatch.run(OP, None, 3) == ("reference", (3,))


def test_a_named_backend_runs_even_when_another_comes_first():
    register(OP, backend("cpu"))
    register(OP, backend("reference"))
    assert _dispatch.run(OP, "reference")[0] == "reference"


def test_the_variable_names_a_backend_of_the_ops_that_have_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_dispatch, "DEFAULT_BACKEND", "triton")
    register(OP, backend("cpu"))
    register(OP, backend("reference"))
    assert _dispatch.run(OP, None)[0] == "cpu" == explain(OP)[0].chosen
    register(OP, backend("triton", "no such GPU"))
    with pytest.raises(NotImplementedError, match="cannot run on triton .*triton: no such GPU"):
        _dispatch.run(OP, None)
    assert explain(OP)[0].chosen is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter takes CPU tensors")
def test_a_model_of_triton_has_linears_of_another(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_dispatch, "DEFAULT_BACKEND", "triton")
    if reason := _dispatch.why_not("gelu_tanh", "triton"):
        pytest.skip(reason)
    x, weight = torch.randn(1, 2, 8), torch.randn(8, 8)
    assert explain("gelu_tanh", x)[0].chosen == "triton"
    torch.testing.assert_close(ops.linear(x, weight, weight[0]), x @ weight.T + weight[0])


def test_a_named_backend_that_cannot_run_gives_every_reason_and_nothing_runs():
    register(OP, Backend("cpu", pytest.fail, odd_refused))
    register(OP, Backend("reference", pytest.fail))
    with pytest.raises(NotImplementedError) as error:
        _dispatch.run(OP, "cpu", 3)
    assert str(error.value) == (
        f"{OP} cannot run on cpu (cuda: no cuda kernel in this version; triton: no triton kernel "
        "in this version; cpu: odd numbers are not taken; reference: can run)"
    )


def test_no_backend_at_all_gives_every_reason():
    register(OP, backend("reference", "too large"))
    with pytest.raises(NotImplementedError, match=f"{OP} cannot run on any backend .*too large"):
        _dispatch.run(OP, None)


def test_the_default_backend_is_used_unless_a_call_names_another(monkeypatch: pytest.MonkeyPatch):
    register(OP, backend("cpu"))
    register(OP, backend("reference"))
    monkeypatch.setattr(_dispatch, "DEFAULT_BACKEND", "reference")
    assert _dispatch.run(OP, None)[0] == "reference"
    assert _dispatch.run(OP, "cpu")[0] == "cpu"
    assert explain(OP)[0].chosen == "reference"


@pytest.mark.parametrize(
    "call",
    [lambda name: _dispatch.run(OP, name), lambda name: register(OP, backend(name))],
    ids=["run", "register"],
)
def test_an_unknown_backend_is_refused_with_the_known_ones(call: Callable[[str], object]):
    with pytest.raises(ValueError) as error:
        call("rocm")
    expected = "backend must be one of cuda, triton, cpu, reference, got 'rocm'"
    assert str(error.value) == expected


def test_registering_again_replaces():
    register(OP, backend("cpu", "old"))
    register(OP, backend("cpu"))
    assert explain(OP)[0].reasons["cpu"] is None


def test_explain_says_what_would_run_for_arguments_and_for_the_machine():
    register(OP, Backend("cpu", pytest.fail, odd_refused))
    register(OP, backend("reference"))
    for args, chosen, reason in (
        ((), "cpu", None),
        ((2,), "cpu", None),
        ((3,), "reference", "odd numbers are not taken"),
    ):
        (choice,) = explain(OP, *args)
        assert (choice.op, choice.chosen, choice.reasons["cpu"]) == (OP, chosen, reason)
        assert list(choice.reasons) == list(BACKENDS)


def test_explain_of_an_op_that_nothing_can_run_chooses_none():
    register(OP, backend("reference", "too large"))
    (choice,) = explain(OP)
    assert choice.chosen is None
    assert "reference: too large" in str(choice)


def test_explain_prints_the_op_its_backend_and_only_the_reasons():
    register(OP, backend("reference"))
    text = str(explain(OP)[0])
    assert text.split()[:2] == [OP, "reference"]
    assert "cpu: no cpu kernel in this version" in text
    assert "reference:" not in text


def test_explain_refuses_an_unknown_op_with_the_known_ones():
    with pytest.raises(ValueError, match=r"op must be one of .*norm_modulate.*, got 'softmax'"):
        explain("softmax")


WITH_OUT = ("linear_", "linear_int8_")  # the forms that write into a tensor of the caller


def test_explain_has_a_row_for_every_op_that_takes_a_backend():
    takes_backend = {
        name
        for name in ops.__all__
        if inspect.isfunction(getattr(ops, name))
        and "backend" in inspect.signature(getattr(ops, name)).parameters
        and name not in ("register", "why_not")
    }
    rows = fluxkern.explain()
    names = [row.op for row in rows]
    backward = {name for name in names if name.endswith("_backward")}
    assert names == sorted(takes_backend | backward | {OP, *WITH_OUT})
    assert {name.removesuffix("_backward") for name in backward} <= takes_backend
    assert len(takes_backend) >= 16
    for row in rows:
        assert row.op == OP or row.reasons["reference"] is None


def test_what_explain_chooses_is_what_runs(monkeypatch: pytest.MonkeyPatch):
    x = torch.randn(3)
    (choice,) = explain("gelu_tanh", x)
    monkeypatch.setitem(
        _dispatch._registry["gelu_tanh"], choice.chosen, Backend(choice.chosen, lambda x: x + 7)
    )
    assert torch.equal(ops.gelu_tanh(x), x + 7)


SCRIPT = """
import torch, fluxkern
from fluxkern.ops import _dispatch
fluxkern.ops.register("private", fluxkern.ops.Backend("reference", lambda: "ran"))
broken = fluxkern.ops.Backend("triton", None, lambda *args: "no such GPU")
fluxkern.ops.register("private", broken)
print(fluxkern.explain("private")[0].chosen)
print(_dispatch.run("private", None))
"""


def run_with_variable(value: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"FLUXKERN_BACKEND": value}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True
    )


def test_an_empty_variable_means_any_backend(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FLUXKERN_BACKEND", "")
    assert _dispatch._default_backend() is None
    monkeypatch.delenv("FLUXKERN_BACKEND")
    assert _dispatch._default_backend() is None


def test_the_variable_names_the_backend():
    done = run_with_variable("reference")
    assert (done.returncode, done.stdout.split()) == (0, ["reference", "ran"])


def test_the_variable_is_as_strict_as_an_argument():
    done = run_with_variable("triton")
    assert done.returncode == 1
    assert done.stdout.split() == ["None"]
    assert done.stderr.splitlines()[-1] == (
        "NotImplementedError: private cannot run on triton (cuda: no cuda kernel in this version; "
        "triton: no such GPU; cpu: no cpu kernel in this version; reference: can run)"
    )


def test_a_wrong_variable_is_refused_at_import_with_the_known_values():
    done = run_with_variable("tritn")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == (
        "ValueError: FLUXKERN_BACKEND must be one of cuda, triton, cpu, reference, got 'tritn'"
    )

"""Choosing a backend: the order, the reasons, the names that are refused, the variable."""

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack

import pytest
import torch

import fluxkern
from fluxkern import ops
from fluxkern.ops import BACKENDS, Backend, _backends, explain, register

OP = "private_op_of_this_test"


@pytest.fixture(autouse=True)
def _private_op(monkeypatch: pytest.MonkeyPatch, use_backend: Callable) -> None:
    monkeypatch.setitem(_backends._registry, OP, {})
    use_backend(None)


def backend(name: str, reason: str | None = None) -> Backend:
    return Backend(name, lambda *args: (name, args), lambda *args: reason)


def odd_refused(*args: int) -> str | None:
    return "odd numbers are not taken" if args and args[0] % 2 else None


def test_order_is_cuda_triton_cpu_reference_whatever_the_order_of_registration():
    assert BACKENDS == ("cuda", "triton", "cpu", "reference")
    for i in range(len(BACKENDS) - 1, -1, -1):
        register(OP, backend(BACKENDS[i]))
        assert _backends.run(OP, None, 1, "two") == (BACKENDS[i], (1, "two"))


def test_first_backend_without_a_reason_runs():
    register(OP, backend("reference"))
    register(OP, backend("cuda", "no GPU"))
    register(OP, Backend("cpu", lambda x: "cpu", odd_refused))
    assert _backends.run(OP, None, 2) == "cpu"
    assert _backends.run(OP, None, 3) == ("reference", (3,))


def test_a_named_backend_runs_even_when_another_comes_first():
    register(OP, backend("cpu"))
    register(OP, backend("reference"))
    assert _backends.run(OP, "reference")[0] == "reference"


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter takes CPU tensors")
def test_a_model_of_triton_has_linears_of_another(use_backend: Callable):
    use_backend("triton")
    if reason := ops.why_not("gelu_tanh", "triton"):
        pytest.skip(reason)
    x, weight = torch.randn(1, 2, 8), torch.randn(8, 8)
    assert explain("gelu_tanh", x)[0].chosen == "triton"
    torch.testing.assert_close(ops.linear(x, weight, weight[0]), x @ weight.T + weight[0])


def test_a_named_backend_that_cannot_run_gives_every_reason_and_nothing_runs():
    register(OP, Backend("cpu", pytest.fail, odd_refused))
    register(OP, Backend("reference", pytest.fail))
    with pytest.raises(NotImplementedError) as error:
        _backends.run(OP, "cpu", 3)
    assert str(error.value) == (
        f"{OP} cannot run on cpu (cuda: no cuda kernel in this version; triton: no triton kernel "
        "in this version; cpu: odd numbers are not taken; reference: can run)"
    )


def test_no_backend_at_all_gives_every_reason():
    register(OP, backend("reference", "too large"))
    with pytest.raises(NotImplementedError, match=f"{OP} cannot run on any backend .*too large"):
        _backends.run(OP, None)


def test_use_backend_holds_inside_it_unless_a_call_names_another():
    register(OP, backend("cpu"))
    register(OP, backend("reference"))
    with ops.use_backend("reference"):
        assert _backends.run(OP, None)[0] == "reference"
        assert _backends.run(OP, "cpu")[0] == "cpu"
        assert explain(OP)[0].chosen == "reference"
        with ops.use_backend(None):
            assert _backends.run(OP, None)[0] == "cpu"
    assert _backends.run(OP, None)[0] == "cpu"


def test_use_backend_means_that_backend_where_the_op_has_it():
    register(OP, backend("cpu", "too small"))
    register(OP, backend("reference"))
    with ops.use_backend("triton"):  # which has no kernel of it
        assert _backends.run(OP, None)[0] == "reference"
    with ops.use_backend("cpu"), pytest.raises(NotImplementedError, match="cpu: too small"):
        _backends.run(OP, None)


def test_use_backend_is_seen_by_calls_that_were_made_before():
    x = torch.ones(1, 2, 8)
    for name in (None, "reference", None):
        with ops.use_backend(name), ops.record() as calls:
            ops.gelu_tanh(x)
        assert [call.backend == "reference" for call in calls] == [
            explain("gelu_tanh", x)[0].chosen == "reference" or name == "reference"
        ]


def test_use_backend_refuses_an_unknown_name():
    with pytest.raises(ValueError, match="name must be one of cuda, .*reference, got 'rocm'"):
        with ops.use_backend("rocm"):
            pass


def test_record_has_what_ran_with_its_arguments_and_not_what_ran_after():
    register(OP, backend("cpu"))
    with ops.record() as calls:
        _backends.run(OP, None, 1)
        with ops.record() as inner:
            _backends.run(OP, "cpu", 2)
    _backends.run(OP, None, 3)
    found = [(call.op, call.named, call.backend, call.args, call.nested) for call in calls]
    assert found == [(OP, None, "cpu", (1,), False), (OP, "cpu", "cpu", (2,), False)]
    assert inner == calls[1:] and all(call.seconds >= 0 for call in calls)


def test_record_tells_what_a_kernel_calls_for_a_part_of_its_work():
    register(OP, Backend("cpu", lambda x: ops.gelu_tanh(x)))
    with ops.record() as calls:
        _backends.run(OP, None, torch.ones(3))
    assert [(call.op, call.nested) for call in calls] == [("gelu_tanh", True), (OP, False)]


def test_an_unknown_backend_is_refused_with_the_known_ones():
    with pytest.raises(ValueError) as error:
        _backends.run(OP, "rocm")
    expected = "backend must be one of cuda, triton, cpu, reference, got 'rocm'"
    assert str(error.value) == expected


def test_a_backend_of_another_name_runs_when_it_is_named():
    register(OP, backend("rocm"))
    register(OP, backend("reference"))
    assert _backends.run(OP, None)[0] == "reference"
    assert _backends.run(OP, "rocm")[0] == "rocm"
    assert explain(OP)[0].reasons["rocm"] is None


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


def test_what_explain_chooses_is_what_runs(plant: Callable):
    x = torch.randn(3)
    ops.gelu_tanh(x)  # what was chosen before is chosen anew
    (choice,) = explain("gelu_tanh", x)
    plant("gelu_tanh", Backend(choice.chosen, lambda x: x + 7))
    assert torch.equal(ops.gelu_tanh(x), x + 7)


SCRIPT = """
import torch, fluxkern
from fluxkern.ops import _backends
fluxkern.ops.register("private", fluxkern.ops.Backend("reference", lambda: "ran"))
broken = fluxkern.ops.Backend("triton", None, lambda *args: "no such GPU")
fluxkern.ops.register("private", broken)
print(fluxkern.explain("private")[0].chosen)
print(_backends.run("private", None))
"""


def run_with_variable(value: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"FLUXKERN_BACKEND": value}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True
    )


def test_an_empty_variable_means_any_backend(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FLUXKERN_BACKEND", "")
    assert _backends._of_environment() is None
    monkeypatch.delenv("FLUXKERN_BACKEND")
    assert _backends._of_environment() is None


def test_the_variable_names_the_backend():
    done = run_with_variable("reference")
    assert (done.returncode, done.stdout.split()) == (0, ["reference", "ran"])


def test_the_variable_is_as_strict_as_an_argument_where_the_op_has_the_backend():
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


def test_a_choice_that_another_thread_changes_meanwhile_is_not_kept(
    plant: Callable[[str, Backend], None],
):
    """The other thread comes between the choice and its keeping: here, inside `unsupported`."""
    x, stack, changes = torch.randn(4), ExitStack(), [ops.use_backend("reference")]

    def change(*_: object) -> None:
        if changes:
            stack.enter_context(changes.pop())

    plant("gelu_tanh", Backend("cpu", lambda x: x + 7, change, by_dtype=True, checks=True))
    with stack:
        assert torch.equal(ops.gelu_tanh(x), x + 7)
        assert torch.equal(ops.gelu_tanh(x), ops.gelu_tanh(x, backend="reference"))

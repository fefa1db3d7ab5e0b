"""What every op obeys on every backend, in every dtype, forward and backward.

What this machine cannot run is skipped with the backend's own reason. Of backends that the table
of `fluxkern.cases` promises, the coverage table at the end of the run has no empty cell.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import coverage_table
import pytest
import torch
from torch import Tensor
from torch import library as torch_library

from fluxkern import ops
from fluxkern.cases import CASES, TEST_SIZES, Maker, Sizes
from fluxkern.testing import (
    assert_accurate,
    copied,
    exact_results,
    gradients,
    in_schema_order,
    leaves,
    meaning,
    outputs,
    readable,
    torch_op,
    widened,
)

GPU = torch.cuda.is_available()
if not GPU and find_spec("triton"):
    import triton_interpreter

    triton_interpreter.install()
DEVICES = {
    "reference": "cuda" if GPU else "cpu",
    "cpu": "cpu",
    "triton": "cuda" if GPU else "cpu",  # interpreted where there is no GPU
    "cuda": "cuda",
    "cuda-emulator": "cpu",
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FEW = 8  # numbers of a row: of fewer that are nearly equal, rounding decides the gradient
BY_LSE = ("attention", "attention_lse")  # exp(score - lse) again in the backward
VECTORS = ("gate", "scale", "shift")
BY_CUBLAS = ("linear",)  # no source of ours to run on a CPU
PAIRS = [
    (op, backend)
    for op, case in CASES.items()
    for backend in (
        *("reference", *case.backends),
        *(["cuda-emulator"] * ("cuda" in case.backends and op not in BY_CUBLAS)),
    )
]
DIFFERENTIABLE = [(op, backend) for op, backend in PAIRS if CASES[op].moved_backward]
every_pair = pytest.mark.parametrize("op, backend", PAIRS)
every_differentiable = pytest.mark.parametrize("op, backend", DIFFERENTIABLE)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """New memory is filled with NaN: what a kernel does not write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def function(op: str, backend: str) -> Callable:
    """The public op on this backend; skips where the machine has none."""
    reason = ops.why_not(op, backend)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    return partial(getattr(ops, op), backend=backend)


def make(op: str, backend: str, sizes: Sizes, dtype: str = "fp32") -> dict[str, Any]:
    function(op, backend)  # before memory is taken on a device that is not there
    return CASES[op].inputs(Maker(sizes, DTYPES[dtype], DEVICES[backend]))


def assert_forward(op: str, backend: str, args: dict[str, Any]) -> None:
    own = readable(outputs(meaning(op), copied(args)))
    out = readable(outputs(function(op, backend), copied(args)))
    for i, (o, t, r) in enumerate(zip(out, exact_results(op, args), own, strict=True)):
        assert_accurate(o, t, r, f"output {i} of {op} on {backend}")


def assert_backward(op: str, backend: str, args: dict[str, Any]) -> None:
    dtype = next(iter(leaves(args).values())).dtype
    truth_out = outputs(meaning(op), widened(copied(args)))
    dout = tuple(torch.randn_like(t.contiguous()).to(dtype) for t in truth_out)
    truth = gradients(meaning(op), widened(args), tuple(d.double() for d in dout))
    own = gradients(meaning(op), args, dout)
    found = gradients(function(op, backend), args, dout)
    for name, o, t, r in zip(leaves(args), found, truth, own, strict=True):
        assert_accurate(o, t, r, f"gradient of {name}, {op} on {backend}")


# accuracy: dtypes at an odd size, sizes in fp32


@every_dtype
@every_pair
def test_forward_is_accurate(op: str, backend: str, dtype: str, request: pytest.FixtureRequest):
    assert_forward(op, backend, make(op, backend, Sizes(), dtype))
    coverage_table.record(request.config, op, backend, dtype, "forward")


@every_dtype
@every_differentiable
def test_backward_is_accurate(op: str, backend: str, dtype: str, request: pytest.FixtureRequest):
    assert_backward(op, backend, make(op, backend, Sizes(), dtype))
    coverage_table.record(request.config, op, backend, dtype, "backward")


@pytest.mark.parametrize("size", TEST_SIZES)
@every_pair
def test_any_size_is_taken(op: str, backend: str, size: str):
    args = make(op, backend, TEST_SIZES[size])
    assert_forward(op, backend, args)
    if (op, backend) in DIFFERENTIABLE:
        assert_backward(op, backend, args)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@every_pair
def test_flux_width_is_taken_in_half_precision(op: str, backend: str, dtype: str):
    args = make(op, backend, TEST_SIZES["FLUX's width"], dtype)
    assert_forward(op, backend, args)
    if (op, backend) in DIFFERENTIABLE:
        assert_backward(op, backend, args)


@every_pair
def test_any_size_and_stride_drawn_at_random_is_taken(op: str, backend: str, seed: int):
    hypothesis = pytest.importorskip("hypothesis")
    function(op, backend)
    st = hypothesis.strategies
    small = st.integers(0, 4)

    @hypothesis.settings(
        max_examples=3 if backend in ("triton", "reference") else 20,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(
        st.builds(
            Sizes,
            batch=st.integers(0, 3),
            txt=small,
            img=st.integers(1, 6),
            hidden=st.integers(1, 150),
            heads=st.integers(1, 3),
            head_dim=st.integers(1, 40).map(lambda n: 2 * n),
            skip=small,
            spare=st.integers(0, 9),
            streams=st.sampled_from([1, 2]),
        ),
        st.sampled_from(sorted(DTYPES)),
    )
    def holds(sizes: Sizes, dtype: str) -> None:
        args = make(op, backend, sizes, dtype)
        if op in BY_LSE:
            args["q"].mul_(0.25)  # scores, and products of dout and v, of order one
            args["v"].mul_(0.25)
        if "norm_modulate" in op and sizes.hidden < FEW:
            args["x"][..., ::2] += 3
            args["x"][..., 1::2] -= 3
        assert_forward(op, backend, args)
        if (op, backend) in DIFFERENTIABLE:
            assert_backward(op, backend, args)

    holds()


# strides, memory, bits


def without_stream_axis(args: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: v.squeeze(1) if name in names else v for name, v in args.items()}


@pytest.mark.parametrize("flat", [1, 2, 3], ids=["the first", "the last", "all"])
@every_pair
def test_vectors_of_one_stream_may_lack_its_axis(op: str, backend: str, flat: int):
    """[B, C] beside [B, 1, C] too, and their gradients have their ranks."""
    args = make(op, backend, Sizes(streams=1))
    vectors = [name for name in args if name in VECTORS]
    if not vectors:
        pytest.skip("no vector among the arguments")
    chosen = {1: vectors[:1], 2: vectors[-1:], 3: vectors}[flat]
    flat_args = without_stream_axis(args, tuple(chosen))
    run = function(op, backend)
    expected, out = outputs(run, args), outputs(run, flat_args)
    assert all(torch.equal(o, e) for o, e in zip(out, expected, strict=True))
    if (op, backend) in DIFFERENTIABLE:
        dout = tuple(torch.randn_like(t.contiguous()) for t in out)
        found = gradients(run, flat_args, dout)
        for name, o, e in zip(leaves(args), found, gradients(run, args, dout), strict=True):
            assert o.shape == flat_args[name].shape
            assert torch.equal(o.view_as(e), e)


@every_pair
def test_batch_of_one_expanded_is_taken(op: str, backend: str):
    """Stride 0 over the batch: one set of inputs for three pictures."""
    if op == "qk_norm_rope_":
        pytest.skip("overlapping views cannot be written")
    if op == "group_norm_silu":
        pytest.skip("takes contiguous or channels-last images")
    args = make(op, backend, replace(Sizes(), batch=1))
    wide = {
        name: v.expand(3, *v.shape[1:]) if name in leaves(args) and v.shape[0] == 1 else v
        for name, v in args.items()
    }
    run = function(op, backend)
    for one, three in zip(outputs(run, args), outputs(run, wide), strict=True):
        torch.testing.assert_close(three, one.expand(three.shape))


@every_pair
def test_inputs_are_left_unwritten(op: str, backend: str):
    if op == "qk_norm_rope_":
        pytest.skip("writes over q and k, as its schema says")
    args = make(op, backend, Sizes())
    before = copied(args)
    run = function(op, backend)
    outputs(run, args)
    for name in leaves(args):
        assert torch.equal(args[name], before[name]), name


@every_differentiable
def test_the_same_bits_twice(op: str, backend: str):
    run, args = function(op, backend), make(op, backend, TEST_SIZES["a wide odd row"], "bf16")
    first, second = (outputs(run, copied(args)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    dout = tuple(torch.randn_like(t.contiguous()) for t in first)
    first, second = (gradients(run, args, dout) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_pair
def test_nan_in_one_batch_element_stays_there(op: str, backend: str):
    args = make(op, backend, Sizes())
    batched = [v for n, v in leaves(args).items() if v.ndim > 1 and v.shape[0] == 2]
    run = function(op, backend)
    expected = [t[1].clone() for t in outputs(run, copied(args)) if t.shape[0] == 2]
    batched[0][0].fill_(float("nan"))
    out = [t for t in outputs(run, args) if t.shape[0] == 2]
    if "attention" not in op or backend != "reference":  # torch gives 0 for a row of NaN
        assert out[0][0].isnan().any()
    assert all(torch.equal(t[1], e) for t, e in zip(out, expected, strict=True))


@every_differentiable
def test_only_the_asked_for_gradients_are_given_and_none_is_lost(op: str, backend: str):
    """An op without a formula returns requires_grad=True and leaves .grad None."""
    run, args = function(op, backend), copied(make(op, backend, Sizes()))
    name, leaf = list(leaves(args).items())[-1]
    leaf.requires_grad_()
    out = outputs(run, args)
    sum(o.sum() for o in out).backward()
    assert leaf.grad is not None and leaf.grad.abs().sum() > 0, name
    assert all(v.grad is None for n, v in leaves(args).items() if n != name)


@every_pair
def test_a_named_backend_is_the_one_that_runs_with_gradients_too(op: str, backend: str):
    if op in ("qk_norm_rope_", "linear_int8") or op.endswith("_fp8"):
        pytest.skip("has no gradient")
    run, args = function(op, backend), make(op, backend, Sizes())
    out = outputs(run, copied(args))
    with ops.record() as calls:
        gradients(run, args, tuple(torch.randn_like(t.contiguous()) for t in out))
    assert {call.named for call in calls if not call.nested} == {backend}


# torch's own contract


@every_pair
def test_opcheck_is_clean(op: str, backend: str):
    function(op, backend)
    args = make(op, backend, Sizes())
    torch_library.opcheck(torch_op(op), in_schema_order(op, args, backend))


@every_differentiable
def test_opcheck_of_the_backward_is_clean(op: str, backend: str):
    """With the very arguments that autograd hands to it."""
    run, args = function(op, backend), make(op, backend, Sizes())
    out = outputs(run, copied(args))
    with ops.record() as calls:
        gradients(run, args, tuple(torch.randn_like(t.contiguous()) for t in out))
    backward = [call for call in calls if call.op.endswith("_backward") and not call.nested]
    assert backward
    for call in backward:
        assert call.named == backend
        detached = (a.detach() if isinstance(a, Tensor) else a for a in call.args)
        torch_library.opcheck(torch_op(call.op), (*detached, backend))


@every_pair
def test_compiles_whole_and_only_once_for_all_sizes(op: str, backend: str):
    run = function(op, backend)
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    sizes = (Sizes(6, 11, 13), Sizes(8, 14, 17), Sizes(9, 2, 19))  # no two axes alike
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in sizes:
            args = make(op, backend, size)
            expected = outputs(run, copied(args))
            for o, e in zip(outputs(compiled, args), expected, strict=True):
                assert torch.equal(o, e)


@every_differentiable
def test_compiles_whole_with_gradients(op: str, backend: str):
    run, args = function(op, backend), make(op, backend, Sizes())
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    dout = tuple(torch.randn_like(t.contiguous()) for t in outputs(run, copied(args)))
    expected = gradients(run, args, dout)
    for o, e in zip(gradients(compiled, args, dout), expected, strict=True):
        assert torch.equal(o, e)


# on a GPU


@pytest.mark.skipif(not GPU, reason="no CUDA device")
@every_pair
def test_runs_in_a_cuda_graph_and_on_a_side_stream(op: str, backend: str):
    if DEVICES[backend] != "cuda":
        pytest.skip(f"{backend} does not run on a GPU")
    run, args = function(op, backend), make(op, backend, Sizes(), "bf16")
    if op == "qk_norm_rope_":
        pytest.skip("a replay would write over its own result")
    expected = [t.clone() for t in outputs(run, args)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        aside = outputs(run, args)
    torch.cuda.synchronize()
    assert all(torch.equal(a, e) for a, e in zip(aside, expected, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = outputs(run, args)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(c, e) for c, e in zip(captured, expected, strict=True))


# the table


@pytest.mark.parametrize("backend", list(DEVICES))
def test_the_coverage_table_has_no_empty_cell(backend: str, request: pytest.FixtureRequest):
    """Last in this file, so that it sees what the tests above have recorded of its backend."""
    if not coverage_table.whole_file_ran(request):
        pytest.skip("a part of this file was run")
    promised = coverage_table.promised(request.config)
    for op in (op for op, promised in PAIRS if promised == backend):
        if ops.why_not(op, backend) is None:
            both = ("forward", "backward") if (op, backend) in DIFFERENTIABLE else ("forward",)
            for direction in both:
                for dtype in DTYPES:
                    promised.add((op, backend, dtype, direction))
        elif backend not in ("cuda", "triton") or GPU:
            pytest.fail(f"{op} is promised on {backend}, which cannot run it here")
    if not hasattr(request.config, "workerinput"):  # else where all processes' cells come together
        assert coverage_table.empty(request.config) == []

"""Every differentiable op under what torch does with derivatives and graphs, held to its meaning.

In fp64, where the plain composition is exact to rounding, on the op's own Autograd key whatever
backend would run; the fused backward is tested in test_contract.py.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fluxkern import ops, reference
from fluxkern.cases import CASES, Maker, Sizes
from fluxkern.testing import leaves, meaning, outputs

SIZES = Sizes(2, 2, 3, 6, 2, 4)
DIFFERENTIABLE = [
    n for n in CASES if n not in ("qk_norm_rope_", "linear_int8") and not n.endswith("_fp8")
]
WITHOUT_TORCHS_KERNEL = {  # its attention on a CPU has no second and no forward derivative
    "attention": lambda q, k, v: reference.attention_lse(q, k, v)[0],
    "rope_attention": lambda q, k, v, *rest, **args: reference.attention_lse(
        *reference.qk_norm_rope(q, k, *rest, **args), v
    )[0],
}
every_op = pytest.mark.parametrize("name", DIFFERENTIABLE)
Function = Callable[..., tuple[Tensor, ...]]
quiet = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")


class Pair:
    """An op and its meaning as functions of the tensors that have a gradient."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float64):
        self.args = CASES[name].inputs(Maker(SIZES, dtype))
        self.names = list(leaves(self.args))
        self.tensors = tuple(self.args[n].detach().clone() for n in self.names)
        self.op = self._of_tensors(getattr(ops, name))
        self.plain = self._of_tensors(WITHOUT_TORCHS_KERNEL.get(name) or meaning(name))

    def _of_tensors(self, function: Callable) -> Function:
        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            return outputs(function, self.args | dict(zip(self.names, tensors, strict=True)))

        return run

    def assert_same(self, transform: Callable[[Function], Callable], *args: object) -> None:
        """The op and its meaning give the same when they are transformed."""
        args = args or self.tensors
        found, expected = transform(self.op)(*args), transform(self.plain)(*args)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def total(run: Function) -> Callable[..., Tensor]:
    """A number of all outputs, to which every element adds its own."""

    def number(*tensors: Tensor) -> Tensor:
        return sum(((o + 0.1).sin() * (1 + 0.1 * i)).sum() for i, o in enumerate(run(*tensors)))

    return number


def grad_of_all(run: Function) -> Callable:
    return lambda *tensors: torch.func.grad(total(run), tuple(range(len(tensors))))(*tensors)


def backward(run: Function, order: int = 1) -> Callable:
    """Gradients of all, of their squares' sum, and so on."""

    def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        number = total(run)(*leaves)
        for _ in range(order):
            found = torch.autograd.grad(number, leaves, create_graph=True)
            number = sum(g.square().sum() for g in found)
        return tuple(g.detach() for g in found)

    return gradients


def batched(pair: Pair, dim: int) -> tuple[Tensor, ...]:
    return tuple(torch.stack((t, 2 * t, t - 1), dim) for t in pair.tensors)


def compiled(run: Callable) -> Callable:
    torch._dynamo.reset()
    return torch.compile(run, backend="aot_eager", fullgraph=True)


# torch.func


@every_op
def test_func_grad(name: str):
    Pair(name).assert_same(grad_of_all)


@pytest.mark.parametrize("dim", [0, -1])
@every_op
def test_per_sample_gradients(name: str, dim: int):
    """Stacked on the last axis every tensor has strides that no kernel takes."""
    pair = Pair(name)
    pair.assert_same(lambda run: torch.vmap(grad_of_all(run), dim), *batched(pair, dim))


@every_op
def test_vmap_over_one_argument_alone(name: str):
    pair = Pair(name)
    for i, t in enumerate(pair.tensors):
        dims = tuple(0 if j == i else None for j in range(len(pair.tensors)))
        some = [torch.stack((t, -t)) if j == i else u for j, u in enumerate(pair.tensors)]
        pair.assert_same(lambda run, dims=dims: torch.vmap(run, dims), *some)


@every_op
def test_jvp(name: str):
    pair = Pair(name)
    tangents = tuple(map(torch.randn_like, pair.tensors))
    pair.assert_same(lambda run: lambda *t: torch.func.jvp(run, t, tangents))


@every_op
def test_hessian(name: str):
    Pair(name).assert_same(lambda run: torch.func.hessian(total(run)))


# forward mode and higher orders


@every_op
def test_dual_numbers_of_one_argument_alone(name: str):
    pair = Pair(name)

    def tangents(run: Function, i: int) -> Callable:
        def push(*tensors: Tensor) -> list[Tensor | None]:
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(tensors[i], torch.ones_like(tensors[i]))
                out = run(*tensors[:i], dual, *tensors[i + 1 :])
                return [forward_ad.unpack_dual(o).tangent for o in out]

        return push

    for i in range(len(pair.tensors)):
        pair.assert_same(lambda run, i=i: tangents(run, i))


@every_op
def test_double_backward(name: str):
    Pair(name).assert_same(lambda run: backward(run, 2))


def layer_norm_by_hand(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    return centred * rstd * (1 + scale) + shift


def test_the_fourth_derivative_of_a_norm_is_right():
    """That of torch's own layer_norm is not, from the third on."""
    pair = Pair("norm_modulate")
    x, scale, shift = pair.tensors[0], *(t[:, :1].clone() for t in pair.tensors[1:])
    found = backward(lambda *t: (ops.norm_modulate(*t),), 4)(x, scale, shift)
    expected = backward(lambda *t: (layer_norm_by_hand(*t),), 4)(x, scale, shift)
    for f, e in zip(found, expected, strict=True):
        assert (f - e).norm() <= 1e-9 * e.norm()


@every_op
def test_gradients_of_many_vectors_at_once(name: str):
    """As torch.autograd.functional.jacobian(vectorize=True) asks for them."""
    pair = Pair(name)

    def many(run: Function) -> Callable:
        def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
            leaves = [t.detach().requires_grad_() for t in tensors]
            out = run(*leaves)
            vectors = [torch.stack((o.detach().sin(), o.detach().cos())) for o in out]
            return torch.autograd.grad(out, leaves, vectors, is_grads_batched=True)

        return gradients

    pair.assert_same(many)


@every_op
def test_gradient_of_one_argument_alone(name: str):
    pair = Pair(name)

    def alone(run: Function, i: int) -> Callable:
        def gradient(*tensors: Tensor) -> Tensor:
            leaf = tensors[i].detach().requires_grad_()
            out = run(*tensors[:i], leaf, *tensors[i + 1 :])
            return torch.autograd.grad([o.sum() for o in out if o.requires_grad], leaf)[0]

        return gradient

    for i in range(len(pair.tensors)):
        pair.assert_same(lambda run, i=i: alone(run, i))


@every_op
def test_checkpointed_again_and_with_hooks(name: str):
    pair = Pair(name)
    leaves = [t.detach().requires_grad_() for t in pair.tensors]
    for leaf in leaves:
        leaf.register_hook(lambda g: 2 * g)
    number = total(lambda *t: checkpoint(pair.op, *t, use_reentrant=False))(*leaves)
    first = torch.autograd.grad(number, leaves, retain_graph=True)
    again = torch.autograd.grad(number, leaves)
    expected = tuple(2 * g for g in backward(pair.plain)(*pair.tensors))
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(again, expected)


# graphs


@every_op
def test_compiled_func_grad(name: str):
    pair = Pair(name)
    pair.assert_same(lambda run: compiled(grad_of_all(run)) if run is pair.op else grad_of_all(run))


@every_op
def test_compiled_jvp_is_not_zero(name: str):
    pair = Pair(name)
    tangents = tuple(map(torch.randn_like, pair.tensors))

    def push(run: Function) -> Callable:
        transformed = lambda *t: torch.func.jvp(run, t, tangents)  # noqa: E731
        return compiled(transformed) if run is pair.op else transformed

    pair.assert_same(push)


@every_op
def test_traced_gradients(name: str):
    pair = Pair(name)
    pair.assert_same(
        lambda run: make_fx(grad_of_all(run))(*pair.tensors) if run is pair.op else grad_of_all(run)
    )


class Layer(torch.nn.Module):
    """An op whose other tensors are parameters."""

    def __init__(self, pair: Pair):
        super().__init__()
        self.others = torch.nn.ParameterList(t.clone() for t in pair.tensors[1:])
        self.run = pair.op

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.run(x, *self.others)


@quiet
@pytest.mark.parametrize("strict", [True, False])
@every_op
def test_an_exported_op_trains(name: str, strict: bool):
    pair = Pair(name)
    x = pair.tensors[0].clone().requires_grad_()
    program = torch.export.export(Layer(pair), (x.detach(),), strict=strict)
    for exported in (program.module(), program.run_decompositions().module()):
        parameters = list(exported.parameters())
        found = torch.autograd.grad(total(exported)(x), [x, *parameters])
        torch.testing.assert_close(found, backward(pair.plain)(*pair.tensors))


# autocast, FLOPs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_op
def test_autocast_gives_the_same_with_and_without_gradients(name: str, dtype: torch.dtype):
    pair = Pair(name, torch.float32)
    leaves = [t.clone().requires_grad_() for t in pair.tensors]
    with torch.autocast("cpu", dtype):
        plain = outputs(meaning(name), pair.args | dict(zip(pair.names, pair.tensors, strict=True)))
        without, out = pair.op(*pair.tensors), pair.op(*leaves)
    exact = pair.plain(*pair.tensors)
    for o, w, p, e in zip(out, without, plain, exact, strict=True):
        assert o.dtype == w.dtype
        assert name == "attention_lse" or o.dtype == p.dtype  # whose lse stays wide
        torch.testing.assert_close(o.float(), e, rtol=0.05, atol=0.05)
    found = torch.autograd.grad(sum(o.float().sum() for o in out), leaves)
    expected = torch.autograd.grad(sum(o.sum() for o in pair.plain(*leaves)), leaves)
    for f, e in zip(found, expected, strict=True):
        assert f.dtype == torch.float32
        assert (f - e).norm() <= 0.05 * e.norm() + 0.05


@every_op
def test_flops_are_those_of_the_products(name: str):
    """Backward: two products to one of a linear layer, five to two of attention."""
    pair = Pair(name)
    forward = CASES[name].flops(pair.args)
    leaves = [t.clone().requires_grad_() for t in pair.tensors]
    with FlopCounterMode(display=False) as counter:
        out = pair.op(*pair.tensors)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        out = pair.op(*leaves)
        torch.autograd.grad(sum(o.sum() for o in out), leaves)
    times = 3.5 if "attention" in name else 3
    assert counter.get_total_flops() == times * forward


@pytest.fixture
def autocast_of_a_gpu() -> Iterator[None]:
    """Also on a machine without one; for tensors without memory."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.autocast_increment_nesting()
    with FakeTensorMode():
        yield
    torch.autocast_decrement_nesting()
    torch.set_autocast_enabled("cuda", False)


def test_activations_and_residuals_stay_in_half_precision_under_a_gpus_autocast(
    autocast_of_a_gpu: None,
):
    """As torch's linear, gelu and sums; with a gradient a linear calls gelu_tanh."""
    x, y, gate = (torch.empty(2, n, 8, dtype=torch.bfloat16, device="cuda") for n in (5, 5, 1))
    weight = torch.empty(8, 8, device="cuda")
    assert ops.linear(x, weight, activation=None).dtype == torch.bfloat16
    assert ops.gelu_tanh(x).dtype == torch.bfloat16
    assert ops.gated_residual(x, y, gate).dtype == torch.bfloat16
    assert ops.gated_residual(x, y, gate.float()).dtype == torch.float32
    assert ops.norm_modulate(x, gate, gate).dtype == torch.float32  # as torch's layer_norm


@pytest.mark.parametrize("name", ["linear", "linear_int8", "qk_norm_rope_", "gelu_tanh_fp8"])
def test_what_has_no_gradient_says_so_under_a_transform(name: str):
    args = CASES[name].inputs(Maker(SIZES, torch.float32))
    first = next(iter(args))
    if "linear" in name:
        args["out"] = torch.empty(2, 5, 24)

    def run(t: Tensor) -> Tensor:
        return outputs(getattr(ops, name), args | {first: t})[0]

    with pytest.raises(ValueError, match="has no gradient: expected no transform of torch.func"):
        torch.func.jvp(run, (args[first],), (args[first],))

"""What follows from the declaration of an op: the torch op, its gradient, autocast, FLOPs.

An op is declared once: a schema with named results, a reference, a fake and its checks. From that
follow `fluxkern::<op>`, which chooses a backend when it runs, and the destination-passing form that
compiled backends implement under the same name: the arguments, then the results. The gradient is a
kernel of the op's own Autograd key, so that exported and compiled graphs have it too. Where a
transform of torch.func, a level of forward-mode AD or `create_graph` asks for more than a fused
backward gives, the reference runs, which torch differentiates to any order.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from inspect import signature
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch import library as torch_library
from torch.autograd import forward_ad

from .. import _ops
from . import _backends, _flops, _load

AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}
PLAIN = frozenset({Tensor, torch.nn.Parameter})
WRONG_ARGUMENTS = (RuntimeError, TypeError, ValueError, AttributeError, IndexError)
FP32 = ("cos", "sin", "weight_scale")  # whatever the other dtypes, also under autocast
library = torch_library.Library(_ops.add_op_namespace_prefix("").rstrip(":"), "FRAGMENT")
is_grad_enabled = torch.is_grad_enabled
dispatch_modes = torch._C._len_torch_dispatch_stack
function_modes = torch._C._len_torch_function_stack
transforms = torch._C._functorch.peek_interpreter_stack
autocasting = torch._C._is_any_autocast_enabled
profiling = torch._C._autograd._profiler_enabled


def empty(
    x: Tensor, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Contiguous, without values; the shape, dtype and device of x unless given."""
    if shape is not None:
        return x.new_empty(shape, dtype=dtype)
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)  # the faster


def empty_each(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(map(empty, tensors))


def dense(t: Tensor) -> Tensor:
    """A gradient as kernels take it: autograd may hand over any strides, also on the last axis."""
    last = t.shape[-1] == 1 or t.stride(-1) == 1 if t.ndim else True
    return t if last and t.numel() else t.clone(memory_format=torch.contiguous_format)


def matrix(t: Tensor) -> Tensor:
    """[..., C] -> [rows, C], of any size; by the one view that batched gradients know."""
    return t.reshape(prod(t.shape[:-1]), t.shape[-1])


def needs_gradient(*args: object) -> bool:
    return is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args)


def transformed() -> bool:
    """Whether a transform of torch.func or a level of forward-mode AD is active."""
    return transforms() is not None or forward_ad._current_level >= 0


class Op:
    """One op; called with all arguments of its schema and `backend`.

    Args:
        schema: as torch writes it, without `backend`, which every op has last; results are named.
        reference: the op's meaning, the backend that is always there.
        fake: called with the arguments, gives contiguous results of the right shapes without
            values.
        check: called with the arguments by name; raises where one is wrong.
        gradient: an op that takes d<result>, arguments and results of this one by these names, and
            gives d<argument>; or a function of such parameters, and `needs` (the arguments whose
            gradient is asked for) and `backend`, that gives them by the argument's name. False
            refuses inputs that need a gradient. None: that of `composed`.
        passed_on: gives, by the argument's name, gradients that are those of a result or a part of
            it; its parameters are as those of `gradient`.
        composed: called with the arguments and `backend` where a gradient is needed, gives the same
            by other ops; or None, where `gradient` is to be taken after all. The reference if
            neither is given.
        autocast: "lower" as torch's linear, "widest" as its layer_norm, "promote" as its
            addcmul, None casts nothing.
        flops: called with the arguments, gives those of the matrix products.
        triton: module of fluxkern/kernels with a launcher of the op's name. Kernels of the compiled
            objects are found by the name alone.
    """

    def __init__(
        self,
        schema: str,
        reference: Callable,
        fake: Callable = lambda *_: None,
        check: Callable[[dict[str, Any]], None] = lambda _: None,
        *,
        gradient: "Op | Callable | bool | None" = None,
        passed_on: Callable | None = None,
        composed: Callable | None = None,
        autocast: str | None = "widest",
        flops: Callable[..., int] | None = None,
        triton: str | None = None,
    ):
        self.name, _, rest = schema.partition("(")
        arguments, _, results = rest.rpartition(") -> ")
        library.define(f"{self.name}({arguments}, str? backend) -> {results}")
        self.torch_op = getattr(_ops.ops, self.name).default
        declared = self.torch_op._schema
        self.arguments = tuple(a.name for a in declared.arguments[:-1])
        self.results = tuple(r.name for r in declared.returns)
        kinds = {a.name: str(a.type) for a in declared.arguments[:-1]}
        self.tensors = tuple(i for i, kind in enumerate(kinds.values()) if "Tensor" in kind)
        self.optional = {name for name, kind in kinds.items() if kind.startswith("Optional")}
        self.may_lack = {i for i, name in enumerate(kinds) if name in self.optional}
        self.written = [i for i, a in enumerate(declared.arguments) if a.is_write]
        self.reference, self.fake, self.check = reference, fake, check
        self.composed, self.autocast, self.passed_on = composed, autocast, passed_on
        self.gradient = False if self.written else gradient
        self.taken, self.taken_too = _taken(self.gradient), _taken(passed_on)  # by the gradients
        taken = {*self.taken, *self.taken_too}
        kept = [i for i, name in enumerate(self.arguments) if name in taken]
        self.kept_tensors = [i for i in kept if i in self.tensors]
        self.kept_results = [i for i, name in enumerate(self.results) if name in taken]
        self.kept_rest = [i for i in kept if i not in self.tensors]
        self.kept_names = [self.arguments[i] for i in self.kept_tensors]
        self.kept_names += [self.results[i] for i in self.kept_results]
        self.ready: dict[tuple[torch.dtype, torch.device], Callable] = {}
        self._register(arguments, triton)
        if flops:
            _flops.register(self.torch_op.overloadpacket, lambda *args, **_: flops(*args[:-1]))

    def _register(self, arguments: str, triton: str | None) -> None:
        outs = [f"Tensor({chr(97 + i)}!) {name}" for i, name in enumerate(self.results)]
        private = f"{self.name}({', '.join([arguments, *outs])}) -> ()"
        _load.declare(self.name, private.replace("SymInt", "int"), self.fake, triton)
        _backends.register(self.name, _backends.Backend("reference", self._dense_reference))
        _backends.when_changed(self._forget)
        qualified = _ops.add_op_namespace_prefix(self.name)
        torch_library.impl(qualified, "default", self._run)
        torch_library.register_fake(qualified, lambda *args: self.fake(*args[:-1]))
        library.impl(self.name, self._autograd, "Autograd", with_keyset=True)
        for device, key in AUTOCAST_KEYS.items() if self.autocast else ():
            library.impl(self.name, self._autocast(device, key), key)

    def _forget(self) -> None:
        self.ready = {}  # another one: what a thread is about to keep goes into the old

    # a call

    def __call__(self, *args: object) -> Any:
        if not torch.compiler.is_compiling() and (run := self._direct(args)):
            try:
                return run(*args[:-1])
            except WRONG_ARGUMENTS:  # of a kernel's own checks or the fake: those below
                pass  # name the argument, or let it be raised again
        args = self._cast(args)
        self.check(dict(zip(self.arguments, args, strict=False)))
        if torch.compiler.is_compiling():  # what is active is seen below, by the Autograd key
            return self.torch_op(*args)
        self._refuse_gradient(args)
        if transformed():
            return self._to_any_order(*args)
        return self.torch_op(*args)

    def _direct(self, args: tuple) -> Callable | None:
        """What was chosen before for this dtype and device, if nothing else sees the call."""
        if (
            args[-1] is not None
            or dispatch_modes()
            or function_modes()
            or autocasting()
            or profiling()
            or transforms() is not None
            or forward_ad._current_level >= 0
        ):
            return None
        needed, grad = False, is_grad_enabled()
        for i in self.tensors:
            t = args[i]
            if type(t) in PLAIN:
                needed = needed or (grad and t.requires_grad)
            elif t is not None or i not in self.may_lack:
                return None
        first = args[self.tensors[0]]
        run = self.ready.get((first.dtype, first.device))
        if not needed or run is None:
            return run
        return partial(self._with_gradient, run) if self.gradient else None

    def _with_gradient(self, run: Callable, *given: object) -> Any:
        args = *given, None
        if self.composed and (out := self.composed(*args)) is not None:
            return out
        return _Gradient.apply(self, run, *args)

    def _run(self, *args: object) -> Any:
        """The torch op's kernel, below autograd."""
        *given, named = args
        first = given[self.tensors[0]]
        ready, key = self.ready, (first.dtype, first.device)
        if named is None and (run := ready.get(key)):
            with suppress(RuntimeError):  # of what this backend does not take, such as fp64 tables
                return run(*given)
        backend = _backends.choose(self.name, named, given)
        if named is None and _backends.settled(self.name, backend, given):
            if backend.checks and not self.written:
                ready[key] = backend.run
            else:
                ready[key] = partial(self._again, backend)
        self._count_as_written(given)
        return _backends.execute(self.name, named, backend, given)

    def _again(self, backend: _backends.Backend, *args: object) -> Any:
        if not backend.checks:
            self.check(dict(zip(self.arguments, args, strict=True)))
        out = backend.run(*args)
        self._count_as_written(args)
        return out

    def _count_as_written(self, args: Sequence) -> None:
        for i in self.written:
            if not args[i].is_inference():
                torch.autograd.graph.increment_version(args[i])

    def _dense_reference(self, *args: object) -> Any:
        """With the strides of the fake."""
        out = self.reference(*args)
        if isinstance(out, tuple):
            return tuple(map(_dense, out))
        return out if out is None else _dense(out)

    # gradients

    def _refuse_gradient(self, args: tuple) -> None:
        if self.gradient is not False:
            return
        names = [n for n, t in zip(self.arguments, args, strict=False) if needs_gradient(t)]
        if not names and not transformed():
            return
        over = " and ".join(self.arguments[i] for i in self.written)
        how = f"{self.name} {f'writes over {over} and ' if over else ''}has no gradient"
        if names:
            raise ValueError(f"{how}: {names[0]} has requires_grad=True, expected False")
        raise ValueError(f"{how}: expected no transform of torch.func and no forward-mode AD")

    def _autograd(self, keyset: torch._C.DispatchKeySet, *args: object) -> Any:
        if not (transformed() or needs_gradient(*args)):
            return self.torch_op.redispatch(keyset & torch._C._after_autograd_keyset, *args)
        self._refuse_gradient(args)
        if self.gradient is None or transformed():
            return self._to_any_order(*args)
        if self.composed and (out := self.composed(*args)) is not None:
            return out
        below = partial(self.torch_op.redispatch, keyset & torch._C._after_autograd_keyset)
        return _Gradient.apply(self, lambda *given: below(*given, args[-1]), *args)

    def _to_any_order(self, *args: object) -> Any:
        """By what torch differentiates."""
        out = self.composed(*args) if self.composed else None
        return self.reference(*args[:-1]) if out is None else out

    def gradients(self, values: dict[str, Any]) -> dict[str, Tensor | None]:
        """By argument, from all that the gradient takes, by name, and `needs` and `backend`."""
        found = self.gradient(*(values[name] for name in self.taken))
        if isinstance(self.gradient, Op):
            found = found if isinstance(found, tuple) else (found,)
            names = (name[1:] for name in self.gradient.results)
            found = dict(zip(names, found, strict=True))
        if self.passed_on:
            found |= self.passed_on(*(values[name] for name in self.taken_too))
        return found

    # autocast

    def _autocast(self, device: str, key: str) -> Callable:
        below = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def run(*args: object) -> Any:
            args = self._cast(args)
            with torch._C._ExcludeDispatchKeyGuard(below):
                return self.torch_op(*args)

        return run

    def _cast(self, args: tuple) -> tuple:
        """The arguments in one dtype, where autocast is on."""
        if self.autocast is None or not (torch.compiler.is_compiling() or autocasting()):
            return args
        floats = {
            i: args[i]
            for i in self.tensors
            if self.arguments[i] not in FP32
            and isinstance(args[i], Tensor)
            and args[i].is_floating_point()
        }
        device = next((t.device.type for t in floats.values()), None)
        if device not in AUTOCAST_KEYS or not torch.is_autocast_enabled(device):
            return args
        dtype = self._autocast_dtype(device, [t.dtype for t in floats.values()])
        return tuple(a.to(dtype) if i in floats else a for i, a in enumerate(args))

    def _autocast_dtype(self, device: str, dtypes: list[torch.dtype]) -> torch.dtype:
        if self.autocast == "lower" and torch.float64 not in dtypes:
            return torch.get_autocast_dtype(device)
        wide = device == "cuda" and self.autocast == "widest"  # as torch's layer_norm
        widest = torch.float32 if wide else dtypes[0]
        for dtype in dtypes:
            widest = torch.promote_types(widest, dtype)
        return widest


def _taken(gradient: Op | Callable | None) -> tuple[str, ...]:
    if isinstance(gradient, Op):
        return *gradient.arguments, "backend"
    return tuple(signature(gradient).parameters) if gradient else ()


def _dense(t: Tensor) -> Tensor:
    channels_last = t.ndim == 4 and t.is_contiguous(memory_format=torch.channels_last)
    return t if channels_last else t.contiguous()


class _Gradient(torch.autograd.Function):
    """An op and its fused backward; under `create_graph` the latter is the reference."""

    @staticmethod
    def forward(ctx: Any, op: Op, run: Callable, *args: object) -> Any:
        out = run(*args[:-1])
        results = out if isinstance(out, tuple) else (out,)
        ctx.op, ctx.args = op, {op.arguments[i]: args[i] for i in op.kept_rest}
        ctx.args["backend"] = args[-1]
        tensors = [args[i] for i in op.kept_tensors]
        ctx.save_for_backward(*tensors, *(results[i] for i in op.kept_results))
        optional = isinstance(op.gradient, Op) and op.gradient.optional
        ctx.set_materialize_grads(not optional)  # a backward that takes no dlse runs without one
        return out

    @staticmethod
    def backward(ctx: Any, *douts: Tensor | None) -> tuple:
        op = ctx.op
        saved = ctx.saved_tensors  # once: a checkpointed block unpacks no more often
        values = ctx.args | dict(zip(op.kept_names, saved, strict=True))
        for name, dout in zip(op.results, douts, strict=True):
            values["d" + name] = _given(op, name, dout, values)
        needs = ctx.needs_input_grad[2:-1]
        values["needs"] = {n for n, needed in zip(op.arguments, needs, strict=True) if needed}
        found = op.gradients(values)
        gradients = (found.get(name) if name in values["needs"] else None for name in op.arguments)
        return None, None, *gradients, None


def _given(op: Op, name: str, dout: Tensor | None, values: dict[str, Any]) -> Tensor | None:
    """A gradient as the backward takes it; zeros where there is none and it asks for one."""
    if dout is not None:
        return dense(dout)
    return None if "d" + name in op.gradient.optional else torch.zeros_like(values[name])

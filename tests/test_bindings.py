"""What stands before the compiled kernels: every wrong argument is refused there, by its name."""

from collections.abc import Callable, Iterator

import pytest
import torch
from guard_pages import SHAPES, dtype_of
from torch import Tensor

from fluxkern.ops import _load

FP8 = {
    "norm_modulate_fp8": "x=BLC scale=BSC shift=BSC h=BLC row_scale=BL1!",
    "gelu_tanh_fp8": "x=BLC y=BLC row_scale=BL1!",
}
OF = {"cpu": SHAPES, "cuda-emulator": SHAPES | FP8}
SIZES = {
    **{"A": 2, "B": 2, "S": 2, "T": 3, "I": 4, "L": 7, "C": 12, "M": 5, "H": 2, "D": 8, "F": 4},
    **{"X": 2, "Y": 3, "N": 6, "K": 64, "E": 36, "Q": 0, "R": 2, "1": 1},
}
SCALARS = {"txt_len": 3, "eps": 1e-6, "num_groups": 3, "activation": "gelu_tanh", "add": False,
           "encoding": "q4_0", "rotation": 0}  # fmt: skip
WRONG_SCALARS = {"txt_len": (-1, 8), "num_groups": (0, 5), "activation": ("relu",),
                 "encoding": ("q9_9",), "rotation": (3, 128)}  # fmt: skip


def kernel_of(backend: str, op: str) -> Callable:
    if reason := _load.load_reason(backend):
        pytest.skip(reason)
    return getattr(getattr(torch.ops, _load.OBJECTS[backend].namespace), op).default


def runs(backend: str, op: str) -> bool:
    name = f"{_load.OBJECTS[backend].namespace}::{op}"
    known = _load.load_reason(backend) is None and name in torch._C._dispatch_get_all_op_names()
    return known and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")


CALLS = [(backend, op) for backend, shapes in OF.items() for op in shapes if runs(backend, op)]
every_call = pytest.mark.parametrize(("backend", "op"), CALLS)


def shapes_of(backend: str, op: str) -> dict[str, str]:
    return dict(item.split("=") for item in OF[backend][op].split())


def tensor(op: str, name: str, axes: str, dtype: torch.dtype) -> Tensor:
    shape = [SIZES[axis] for axis in axes.rstrip("!:~")]
    if (op, name) in (("norm_modulate_fp8", "h"), ("gelu_tanh_fp8", "y")):
        return torch.zeros(shape).to(torch.float8_e4m3fn)
    kind = torch.float32 if name == "row_scale" else dtype_of(op, name, dtype)
    if not kind.is_floating_point:
        return torch.randint(0, 100, shape, dtype=kind)
    return torch.randn(shape).to(kind)


def arguments(backend: str, op: str, dtype: torch.dtype = torch.float32) -> dict[str, object]:
    axes = shapes_of(backend, op)
    names = [a.name for a in kernel_of(backend, op)._schema.arguments]
    found = {n: tensor(op, n, axes[n], dtype) if n in axes else SCALARS[n] for n in names}
    return found | ({"table": None} if "table" in found else {})


def wrong_tensors(
    op: str, name: str, t: Tensor, kind: str, written: bool
) -> Iterator[tuple[str, Tensor]]:
    yield "dtype", t.to(torch.float64)
    if (op, name) not in (("dequantise", "out"), ("gelu_tanh_fp8", "x")):
        yield "dtype", t.to(torch.bfloat16)
    yield "rank", t.unsqueeze(0)
    yield "rank", t[0]
    for axis in range(t.ndim) if name != "scale" else range(t.ndim - 1):
        yield f"axis {axis}", torch.cat((t, t.narrow(axis, 0, 1)), axis)
    if kind != ":" and t.shape[-1] > 1:
        yield "stride", torch.stack((t, t), -1)[..., 0]
    if written:
        yield "overlap", t[:1].expand(t.shape)
    freed = t.clone()
    freed.untyped_storage().resize_(freed.untyped_storage().nbytes() - t.element_size())
    yield "storage", freed
    freed = t.clone()
    freed.untyped_storage().resize_(0)
    yield "storage", freed


@every_call
def test_what_is_right_is_taken(backend, op):
    kernel_of(backend, op)(*arguments(backend, op).values())


@every_call
def test_a_wrong_tensor_is_refused(backend, op):
    kernel, axes = kernel_of(backend, op), shapes_of(backend, op)
    right = arguments(backend, op)
    by_inputs = op[-1] == "_" or op == "dequantise"  # whose other arguments are held against out
    for declared in kernel._schema.arguments:
        name = declared.name
        if not isinstance(right[name], Tensor):
            continue
        kind = axes[name].lstrip("ABCDEFHIKLMNQRSTXY1")
        for what, wrong in wrong_tensors(op, name, right[name], kind, declared.is_write):
            args = right | {name: wrong}
            before = {n: t.clone() for n, t in args.items() if isinstance(t, Tensor) and n != name}
            said = rf"\b{name}\b" if declared.is_write and not by_inputs else None
            with pytest.raises(RuntimeError, match=said):
                kernel(*args.values())
                pytest.fail(f"{name}: a wrong {what} was taken")
            assert all(torch.equal(args[n].float(), t.float()) for n, t in before.items()), what


@every_call
def test_a_wrong_number_is_refused_by_its_name(backend, op):
    right = arguments(backend, op)
    for name in right.keys() & WRONG_SCALARS.keys():
        for wrong in WRONG_SCALARS[name]:
            with pytest.raises(RuntimeError, match=name):
                kernel_of(backend, op)(*(right | {name: wrong}).values())


@every_call
def test_one_stream_takes_no_text(backend, op):
    vectors = [n for n, axes in shapes_of(backend, op).items() if axes.rstrip("!") == "BSC"]
    args = arguments(backend, op)
    args |= {n: args[n][:, :1].clone() for n in vectors}
    if vectors:
        with pytest.raises(RuntimeError, match="txt_len must be between 0 and 0"):
            kernel_of(backend, op)(*args.values())
        kernel_of(backend, op)(*(args | {"txt_len": 0}).values())


@pytest.mark.parametrize("op", ["linear_", "linear_int8_"])
def test_a_product_over_its_own_input_is_refused(op):
    args = arguments("cpu", op)
    square = torch.randn(2, 2, 7, 12)
    args |= {"x": square, "weight": args["weight"].repeat(2, 1), "bias": None}
    if "weight_scale" in args:
        args["weight_scale"] = args["weight_scale"].repeat(2)
    kernel_of("cpu", op)(*(args | {"out": torch.empty_like(square)}).values())
    with pytest.raises(RuntimeError, match="out must not overlap x"):
        kernel_of("cpu", op)(*(args | {"out": square}).values())
    with pytest.raises(RuntimeError, match="out must not overlap x"):
        both = torch.randn(2 * 2 * 7 * 12 + 12)
        args |= {"x": both[:-12].view(2, 2, 7, 12), "out": both[12:].view(2, 2, 7, 12)}
        kernel_of("cpu", op)(*args.values())


@pytest.mark.parametrize("backend", OF)
def test_keys_over_queries_are_refused(backend):
    args = arguments(backend, "qk_norm_rope_")
    with pytest.raises(RuntimeError, match="k must not overlap q"):
        kernel_of(backend, "qk_norm_rope_")(*(args | {"k": args["q"]}).values())
    interleaved = torch.randn(2, 7, 3, 2, 8)  # slices of one projection
    args |= {"q": interleaved[:, :, 0], "k": interleaved[:, :, 1]}
    kernel_of(backend, "qk_norm_rope_")(*args.values())


def test_a_stream_of_more_tokens_than_a_grid_has_blocks_is_refused():
    args = arguments("cuda-emulator", "gated_residual_backward")
    long = {n: args[n][:1, :1].expand(1, 2**31, 12) for n in ("dx_new", "y", "dy")}
    args |= long | {"gate": args["gate"][:1], "dgate": args["dgate"][:1]}
    with pytest.raises(RuntimeError, match="y must have at most 2147483647 tokens"):
        kernel_of("cuda-emulator", "gated_residual_backward")(*args.values())

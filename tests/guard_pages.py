"""Every op of _C_cpu on tensors that begin where memory begins or end where it ends.

    python tests/guard_pages.py --seed 1 --seconds 60
    python tests/guard_pages.py --seed 1 --case 17    one case again

Each tensor lies alone between two pages that nothing may touch. Sizes and strides are odd. The gaps
between rows hold NaN and must keep it, inputs must keep their bits, and the results must be those
on ordinary memory. A case is printed before it runs, for a wrong access ends the process.
"""

import argparse
import ctypes
import faulthandler
import mmap
import os
import random
import resource
import signal
import time

import torch
from torch import Tensor

from fluxkern import ops

PAGE = mmap.PAGESIZE
DTYPES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}  # and what may differ
ISAS = ("baseline", "avx2", "avx512", "avx512-vnni")
BLOCKS = {  # columns of a block of an encoding, bytes, entries of its table
    "f32": (1, 4, 0), "bf16": (1, 2, 0), "codes8": (1, 1, 256), "codes4": (2, 1, 16),
    "q4_0": (32, 18, 0), "q5_1": (32, 24, 0), "q8_0": (32, 34, 0), "q2_k": (256, 84, 0),
    "q3_k": (256, 110, 0), "q4_k": (256, 144, 0), "q6_k": (256, 210, 0),
}  # fmt: skip
JOINT = "txt_q=BTHD txt_k=BTHD img_q=BIHD img_k=BIHD cos=LF: sin=LF:"
WEIGHTS = "txt_q_weight=D txt_k_weight=D img_q_weight=D img_k_weight=D"
SHAPES = {  # a letter an axis; ! without gaps, : any strides on the last axis too, ~ a picture
    "norm_modulate": "x=BLC scale=BSC shift=BSC h=BLC",
    "norm_modulate_backward": "dh=BLC x=BLC scale=BSC dx=BLC dscale=BSC! dshift=BSC!",
    "gated_residual": "x=BLC y=BLC gate=BSC x_new=BLC",
    "gated_residual_backward": "dx_new=BLC y=BLC gate=BSC dy=BLC dgate=BSC!",
    "gated_residual_norm_modulate": "x=BLC y=BLC gate=BSC scale=BSC shift=BSC x_new=BLC h=BLC",
    "gated_residual_norm_modulate_backward": "dx_new=BLC dh=BLC x_new=BLC y=BLC gate=BSC scale=BSC"
    " dx=BLC dy=BLC dgate=BSC! dscale=BSC! dshift=BSC!",
    "qk_norm_rope": "q=BLHD k=BLHD q_weight=D k_weight=D cos=LF: sin=LF: q_out=BLHD k_out=BLHD",
    "qk_norm_rope_": f"q=BLHD k=BLHD {WEIGHTS} cos=LF: sin=LF:",
    "qk_norm_rope_backward": "dq_out=BLHD dk_out=BLHD q=BLHD k=BLHD q_weight=D k_weight=D cos=LF:"
    " sin=LF: dq=BLHD dk=BLHD dq_weight=D dk_weight=D",
    "joint_qk_norm_rope": f"{JOINT} {WEIGHTS} txt_v=BTHD img_v=BIHD q_out=BLHD k_out=BLHD"
    " v_out=BLHD",
    "joint_qk_norm_rope_backward": f"dq_out=BLHD dk_out=BLHD {JOINT} {WEIGHTS} dtxt_q=BTHD"
    " dtxt_k=BTHD dimg_q=BIHD dimg_k=BIHD dtxt_q_weight=D dtxt_k_weight=D dimg_q_weight=D"
    " dimg_k_weight=D",
    "attention": "q=BLHD k=BMHD v=BMHD out=BLHD",
    "attention_lse": "q=BLHD k=BMHD v=BMHD out=BLHD lse=BLH!",
    "rope_attention": "q=BLHD k=BLHD v=BLHD q_weight=D k_weight=D cos=LF: sin=LF: out=BLHD",
    "gelu_tanh": "x=ABLC y=ABLC",
    "gelu_tanh_backward": "dy=ABLC x=ABLC dx=ABLC",
    "group_norm_silu": "x=BCYX~ weight=C bias=C y=BCYX~",
    "group_norm_silu_backward": "dy=BCYX~ x=BCYX~ weight=C bias=C dx=BCYX~ dweight=C dbias=C",
    "modulation": "vec=SBC weight=NC bias=N out=SB1N!",
    "linear_": "out=ABLN x=ABLC weight=NC bias=N",
    "linear_int8": "x=ABLC weight=NC weight_scale=N bias=N out=ABLN",
    "linear_int8_": "out=ABLN x=ABLC weight=NC weight_scale=N bias=N",
    "dequantise": "stored=NE table=Q! scale=NR! out=NK largest=N",
}
FP32 = ("cos", "sin", "lse", "weight_scale", "table", "largest")

_libc = ctypes.CDLL(None, use_errno=True)


def extent(shape: tuple, strides: tuple) -> int:
    """Elements from the first to behind the last."""
    return 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if all(shape) else 0


class Guarded:
    """A tensor between two pages without access, where what lies between them begins or ends.

    `given` is what a kernel gets of it: the same, or to plant a fault a view one element on.
    """

    def __init__(
        self, shape: tuple, strides: tuple, dtype: torch.dtype, at_end: bool, planted: bool
    ):
        size = extent(shape, strides) * dtype.itemsize
        inner = -(-max(size, 1) // PAGE) * PAGE
        memory = mmap.mmap(-1, inner + 2 * PAGE)
        begin = PAGE + inner - size if at_end else PAGE
        self.tensor = self.given = torch.empty(shape, dtype=dtype)
        self.inner = torch.frombuffer(memory, dtype=torch.uint8)[PAGE : PAGE + inner].fill_(255)
        gaps = torch.ones(inner + 2 * PAGE, dtype=torch.uint8)
        if size:
            count = (len(memory) - begin) // dtype.itemsize
            flat = torch.frombuffer(memory, dtype=dtype, count=count, offset=begin)
            self.tensor = flat.as_strided(shape, strides)
            self.given = flat[int(planted) :].as_strided(shape, strides)
            gaps[begin:][: count * dtype.itemsize].view(dtype).as_strided(shape, strides).zero_()
        self.gaps = gaps[PAGE : PAGE + inner].bool()
        self.fence(memory, inner)

    def fence(self, memory: mmap.mmap, inner: int) -> None:
        self.first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for page in (self.first, self.first + PAGE + inner):
            if _libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), 0):
                raise OSError(ctypes.get_errno(), "mprotect")

    def gaps_are_kept(self) -> bool:
        return bool((self.inner[self.gaps] == 255).all())


def dtype_of(op: str, name: str, dtype: torch.dtype) -> torch.dtype:
    """That of an argument where the op runs in `dtype`."""
    if name == "stored":
        return torch.uint8
    if name == "weight" and op.startswith("linear_int8"):
        return torch.int8
    return torch.float32 if name in FP32 or (op, name) == ("dequantise", "scale") else dtype


class Case:
    """The arguments of one call, drawn from a seed and a number."""

    def __init__(self, seed: int, number: int, planted: bool = False):
        self.draw = random.Random(f"{seed} {number}")
        self.numbers = torch.Generator().manual_seed(self.draw.getrandbits(60))
        self.op = self.draw.choice(sorted(SHAPES))
        self.planted = planted
        self.dtype = self.draw.choice(list(DTYPES))
        self.channels_last = self.draw.random() < 0.5
        self.sizes = self.draw_sizes()
        pairs = (item.split("=") for item in SHAPES[self.op].split())
        self.shapes = {name: axes for name, axes in pairs}
        self.scalars = self.draw_scalars()
        taken = {axis: n for axis, n in self.sizes.items() if axis in "".join(self.shapes.values())}
        self.name = f"{self.op} {self.dtype} {taken} {self.scalars}"

    def size(self, most: int) -> int:
        """0 now and then, often a whole number of vectors or one beside it."""
        if self.draw.random() < 0.03:
            return 0
        n = self.draw.randint(1, most)
        return n if most < 32 or self.draw.random() < 0.5 else max(n // 16 * 16, 1)

    def draw_sizes(self) -> dict[str, int]:
        n = {axis: self.size(3) for axis in "ABH"} | {axis: self.size(9) for axis in "XY"}
        n |= {"T": self.size(12), "I": self.size(30), "S": self.draw.randint(1, 2)}
        n |= {"C": max(self.size(330), 1), "M": self.size(260), "N": self.size(70)}
        n |= {"L": n["T"] + n["I"], "1": 1}
        rope = "sin=" in SHAPES[self.op]
        n["D"] = max(self.size(160), 1) * (2 if rope else 1)
        n["F"] = n["D"] // 2
        if "BCYX" in SHAPES[self.op]:
            n["G"] = self.draw.randint(1, 5)
            n["C"] = n["G"] * max(n["C"] // 8, 1)
        if self.op == "dequantise":
            self.encoding = self.draw.choice(list(BLOCKS))
            columns, size, n["Q"] = BLOCKS[self.encoding]
            blocks = self.size(max(300 // columns, 3))
            n |= {
                "K": blocks * columns,
                "E": blocks * size,
                "R": self.draw.choice((1, blocks or 1)),
            }
        return n

    def draw_scalars(self) -> dict[str, object]:
        n = self.sizes
        streams = self.op == "qk_norm_rope_" or ("S" in SHAPES[self.op] and n["S"] == 2)
        return {
            "txt_len": n["T"] if streams else 0,
            "eps": 1e-6,
            "num_groups": n.get("G"),
            "activation": self.draw.choice((None, "gelu_tanh")),
            "add": self.draw.random() < 0.5,
            "encoding": getattr(self, "encoding", None),
            "rotation": 4 if n.get("K", n["C"]) % 4 == 0 and self.draw.random() < 0.3 else 0,
        }

    def strides_of(self, shape: tuple, kind: str, written: bool) -> tuple[int, ...]:
        order = list(range(len(shape) - 1, -1, -1))  # from the inner axis
        if kind == "~" and self.channels_last:
            order = [1, 3, 2, 0]
        loose = kind not in ("!", "~")
        if loose:
            order[1:] = self.draw.sample(order[1:], len(order) - 1)
        strides, step = [0] * len(shape), self.draw.choice((1, 2, 3)) if kind == ":" else 1
        for axis in order:
            if loose and not written and axis != order[0] and self.draw.random() < 0.1:
                continue  # expanded
            strides[axis] = step
            step *= max(shape[axis], 1)
            if loose:
                step += self.draw.choice((0, 0, 1, 5, 16))
        return tuple(strides)

    def fill(self, tensor: Tensor) -> None:
        values = torch.randn(tensor.shape, generator=self.numbers)
        if not tensor.is_floating_point():
            values = torch.randint(-127, 128, tensor.shape, generator=self.numbers)
        once = tuple(slice(None) if s else slice(0, 1) for s in tensor.stride())  # expanded
        tensor[once] = values[once].to(tensor.dtype)

    def absent(self, name: str) -> bool:
        if name == "table":
            return not self.sizes["Q"]
        return name in ("bias", "scale") and self.draw.random() < 0.3

    def argument(self, declared: torch._C.Argument) -> "Guarded | object":
        name = declared.name
        if name not in self.shapes:
            return self.scalars[name]
        if "Optional" in str(declared.type) and self.absent(name):
            return None
        axes = self.shapes[name].rstrip("!:~")
        shape = tuple(self.sizes[axis] for axis in axes)
        strides = self.strides_of(shape, self.shapes[name][len(axes) :], declared.is_write)
        to_int8 = (self.op, name) == ("dequantise", "out") and self.scalars["add"]
        dtype = torch.int8 if to_int8 else dtype_of(self.op, name, self.dtype)
        at_end = self.draw.random() < 0.7
        guarded = Guarded(shape, strides, dtype, at_end, self.planted)
        if not declared.is_write or self.op.endswith("_"):
            self.fill(guarded.tensor)
        return guarded


def ordinary(value: object) -> object:
    """On memory of its own, in the same memory format."""
    if not isinstance(value, Guarded):
        return value
    t = value.tensor
    keep = t.ndim == 4 and t.is_contiguous(memory_format=torch.channels_last)
    return t.clone(memory_format=torch.preserve_format if keep else torch.contiguous_format)


def bits(t: Tensor) -> Tensor:
    return t.new_empty(t.shape).copy_(t).flatten().view(torch.uint8)


def run(case: Case) -> None:
    """Raises AssertionError where the case goes wrong; or ends the process."""
    kernel = getattr(torch.ops.fluxkern_cpu, case.op).default
    declared = kernel._schema.arguments
    given = [case.argument(argument) for argument in declared]
    before, expected = list(map(ordinary, given)), list(map(ordinary, given))
    kernel(*expected)
    kernel(*(value.given if isinstance(value, Guarded) else value for value in given))
    for i, guarded in enumerate(given):
        if isinstance(guarded, Guarded):
            name, written = declared[i].name, declared[i].is_write
            assert guarded.gaps_are_kept(), f"{name}: a gap was written"
            assert written or torch.equal(bits(guarded.tensor), bits(before[i])), f"{name}: written"
            check_close(name, guarded.tensor, expected[i], DTYPES[case.dtype])


def check_close(name: str, found: Tensor, expected: Tensor, allowed: float) -> None:
    if not torch.equal(bits(found), bits(expected)):
        torch.testing.assert_close(
            found,
            expected,
            rtol=allowed,
            atol=allowed,
            equal_nan=True,
            msg=lambda m: f"{name}: {m}",
        )


def run_all(seed: int, seconds: float) -> int:
    kernels, best = torch.ops.fluxkern_cpu, torch.ops.fluxkern_cpu._isa()
    here = ISAS[: ISAS.index(best) + 1]
    end, number = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        for isa in here:
            kernels._set_isa(isa)
            case = Case(seed, number)
            print(f"--seed {seed} --case {number} ({isa}) {case.name}", flush=True)
            run(case)
            number += 1
    return number


def dies(case: Case) -> bool:
    """Whether a process of its own that runs the case ends by a wrong access."""
    process = os.fork()
    if process == 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        run(case)
        os._exit(0)
    return os.waitpid(process, 0)[1] == signal.SIGSEGV


def plant(seed: int) -> int:
    """One element too far in a call of every op; raises AssertionError where it is not caught."""
    waiting, number = set(SHAPES), 0
    while waiting and number < 100 * len(SHAPES):
        case, number = Case(seed, number, planted=True), number + 1
        if case.op in waiting and dies(case):
            waiting.remove(case.op)
    assert not waiting, f"planted faults were not caught in {sorted(waiting)}"
    return len(SHAPES)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--case", type=int, help="runs that one alone")
    parser.add_argument("--isa", choices=ISAS)
    parser.add_argument("--plant", action="store_true", help="a fault in a call of every op")
    args = parser.parse_args()
    ops.explain()  # loads the object
    torch.ops.fluxkern_cpu._set_isa(args.isa or torch.ops.fluxkern_cpu._isa())
    if args.plant:
        print(f"{plant(args.seed)} faults caught")
        return
    faulthandler.enable()
    if args.case is not None:
        run(Case(args.seed, args.case))
    else:
        print(f"{run_all(args.seed, args.seconds)} cases, seed {args.seed}")


if __name__ == "__main__":
    main()

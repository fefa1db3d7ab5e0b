"""Reads what a GPU would run, without one: registers, spills, widths of accesses, tensor cores.

Triton's kernels are compiled ahead of time by calling the launchers themselves, on tensors without
memory and with a driver that names an architecture: the configurations are those that run. CUDA's
are read from a compiled object. `python tests/machine_code.py --json [--only KERNEL]`,
`... --tiles` for what `fluxkern tune` may choose, `... --planted` for kernels that must not pass,
`... --object FILE.so` for CUDA.

This process must not interpret: TRITON_INTERPRET is read when a kernel is made.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

ARCHS = (80, 89, 90, 100, 120)
MORE_SIZES_ON = 90  # what a kernel is specialised on is the same everywhere
SHARED_PER_BLOCK = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
SHARED_PER_SM = {80: 164, 89: 100, 90: 228, 100: 228, 120: 100}  # KiB
WARPS_PER_SM = {80: 64, 89: 48, 90: 64, 100: 64, 120: 48}
BLOCKS_PER_SM = {80: 32, 89: 24, 90: 32, 100: 32, 120: 24}
REGISTERS_PER_SM = 65536
TENSOR_CORES = {"HMMA": r"HMMA|IMMA", "HGMMA": r"HGMMA|IGMMA", "UTCMMA": r"UTC\w*MMA"}


def tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# one cubin


def functions(listing: str, heading: str) -> dict[str, str]:
    """Text of cuobjdump by function; `heading` captures the name."""
    parts = re.split(heading, listing)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def bits(instruction: str) -> int:
    """Width of one thread's access, from LDG.E.128.CONSTANT and the like."""
    width = re.search(r"\.U?(8|16|32|64|128|256)\b", instruction.replace(".S", ".U"))
    return int(width[1]) if width else 32


def instructions(sass: str) -> dict[str, Any]:
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass, re.M)
    opcodes = Counter(name.partition(".")[0] for name in names)
    loads = [bits(n) for n in names if n.startswith(("LDG.", "LDGSTS."))]
    stores = [bits(n) for n in names if n.startswith("STG.")]
    return {
        "spills": opcodes["STL"] + opcodes["LDL"],
        "loads": sum(width >= 128 for width in loads),
        "narrow_loads": sum(width < 128 for width in loads),
        "stores": sum(width >= 128 for width in stores),
        "narrow_stores": sum(width < 128 for width in stores),
        "tma": opcodes["UTMALDG"],
        "product_waits": sum(name.startswith("WARPGROUP.DEPBAR") for name in names),
        "highest_register": max(map(int, re.findall(r"\bR(\d+)\b", sass)), default=0),
        "tensor_cores": [
            kind for kind, names in TENSOR_CORES.items() if any(re.match(names, o) for o in opcodes)
        ],
    }


def read_cubin(file: Path) -> dict[str, dict[str, Any]]:
    """What each function of a cubin uses; `shared` is the static part."""
    usage = functions(
        output_of(tool("cuobjdump"), "-res-usage", str(file)), r"Function (\S+?):\s*\n"
    )
    sass = functions(output_of(tool("cuobjdump"), "-sass", str(file)), r"Function : (\S+)")
    found = {}
    for name, text in usage.items():
        used = {key: int(n) for key, n in re.findall(r"(REG|STACK|SHARED):(\d+)", text)}
        numbers = {"registers": used["REG"], "stack": used["STACK"], "shared": used["SHARED"]}
        found[name] = numbers | instructions(sass[name])
        # setmaxnreg gives more than a kernel starts with
        found[name]["registers"] = max(used["REG"], found[name].pop("highest_register") + 1)
    return found


def warps_on_a_sm(row: dict[str, Any]) -> int:
    """Warps that registers, shared memory and the block limit leave room for."""
    arch, warps = row["arch"], row["warps"]
    registers = -(-row["registers"] * 32 // 256) * 256 * warps
    shared = row["shared"] + 1024  # reserved for each block
    blocks = min(
        REGISTERS_PER_SM // registers,
        SHARED_PER_SM[arch] * 1024 // shared,
        WARPS_PER_SM[arch] // warps,
        BLOCKS_PER_SM[arch],
    )
    return blocks * warps


# Triton, ahead of time


class NamedArchitecture:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, arch: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def launches_compiled_only(arch: int) -> Iterator[list]:
    """Inside, launching a kernel compiles it for `arch` and adds it to the list."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    run, compiled = JITFunction.run, []

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled.append(run(kernel, *args, grid=grid, warmup=True, **options))
        return compiled[-1]

    driver.set_active(NamedArchitecture(arch))
    with patch.object(JITFunction, "run", compile_only):
        yield compiled


def read_compiled(kernel: Any, arch: int, op: str) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        ((name, found),) = read_cubin(Path(file.name)).items()
    meta = kernel.metadata
    row = {"kernel": name, "arch": arch, "op": op, "warps": meta.num_warps} | found
    row["shared"] = meta.shared
    return row | {"warps_per_sm": warps_on_a_sm(row)}


def launcher(op: str) -> Callable:
    from fluxkern.ops import _load

    return getattr(import_module(f"fluxkern.kernels.{_load.triton_modules()[op]}"), op)


def kernel_ops() -> list[str]:
    """Those with a Triton launcher, forward first: a kernel of both has its budget there; the joint
    form where there is one: same kernels."""
    from fluxkern.ops import _load

    known = _load.triton_modules()
    ops = [op for op in known if f"joint_{op.rstrip('_')}" not in known]
    return sorted(ops, key=lambda op: op.endswith("_backward"))


VARIANTS = ("rope_attention",)  # ops that launch the kernels of others, specialised otherwise
GRADIENT_OF = {"dh": "x", "dx_new": "x", "x_new": "x", "dy": "x", "dout": "q", "out": "q"}
GRADIENT_OF |= {"dq_out": "q", "dk_out": "k"}


def call_sizes() -> list:
    """Those of one model: resolutions, batches, prompts; the first is what budgets speak of."""
    from fluxkern.cases import SHAPES, Sizes

    names = ("flux-1024", "flux-512", "flux-2048", "flux-1024-batch-4")
    odd = Sizes(3, 77, 1085, 3072, 24, 128, skip=0, spare=0)
    return [*(SHAPES[name] for name in names), odd]


def arguments(op: str, sizes: Any = None) -> list:
    """Those of a call in bf16, on the meta device, in the order of the op's schema."""
    import torch

    import fluxkern.ops  # noqa: F401  (defines the torch ops)
    from fluxkern.cases import CASES, Maker

    case = op.removesuffix("_backward")
    case = "attention_lse" if case == "attention" else case
    values = CASES[case].inputs(Maker(sizes or call_sizes()[0], torch.bfloat16, "meta"))
    values |= {"eps": 1e-6}
    values |= {t: values[t].contiguous() for t in ("cos", "sin") if t in values}  # as our model's
    for name, of in GRADIENT_OF.items():
        if of in values:
            values.setdefault(name, values[of].new_empty(values[of].shape))
    if "q" in values:
        lse = values["q"].new_empty(values["q"].shape[:3], dtype=torch.float32)
        values |= {"lse": lse, "dlse": lse}
    elif "txt_q" in values:
        joint = values["txt_q"].shape[1] + values["img_q"].shape[1]
        shape = (values["txt_q"].shape[0], joint, *values["txt_q"].shape[2:])
        values |= {"dq_out": values["txt_q"].new_empty(shape)}
        values |= {"dk_out": values["dq_out"]}
    schema = getattr(torch.ops.fluxkern, op).default._schema
    return [values[argument.name] for argument in schema.arguments[:-1]]  # without backend


def launch(op: str, args: list, **tiles: str) -> None:
    from fluxkern.ops import _load

    out = _load.allocator(op)(*args)
    outs = () if out is None else out if isinstance(out, tuple) else (out,)
    launcher(op)(*args, *outs, **tiles)


def rows_of(arch: int, ops: list[str], only: str | None = None) -> list[dict[str, Any]]:
    """A row a kernel, as it is launched first, and how often sizes made it compile again."""
    rows = {}
    with launches_compiled_only(arch) as compiled:
        for op in ops:
            compiled.clear()
            for sizes in call_sizes()[: None if arch == MORE_SIZES_ON else 1]:
                launch(op, arguments(op, sizes))
            for kernel in compiled:
                name = kernel.metadata.name + f" in {op}" * (op in VARIANTS)
                if name not in rows and only in (None, name):
                    row = read_compiled(kernel, arch, op)
                    same = {k.hash for k in compiled if k.metadata.name == kernel.metadata.name}
                    rows[name] = row | {"kernel": name, "specialisations": len(same)}
    return list(rows.values())


def all_rows(only: str | None = None) -> list[dict[str, Any]]:
    """Of every kernel for every architecture, two processes at a time."""
    ops = kernel_ops()
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        found = pool.map(partial(rows_of, ops=ops, only=only), ARCHS)
        return [row for rows in found for row in rows]


# tiles that may be chosen


def tile_rows_of(arch: int) -> list[dict[str, Any]]:
    """A row for every candidate but the default, and for what runs without TMA from 90 on."""
    from fluxkern.kernels import _tiles
    from fluxkern.kernels import attention as kernels

    rows = []
    with launches_compiled_only(arch) as compiled:

        def add(op: str, kernel: str, name: str, /, **tiles: str) -> None:
            compiled.clear()
            launch(op, arguments(op), **tiles)
            (found,) = (k for k in compiled if k.metadata.name == f"{kernel}_kernel")
            rows.append(read_compiled(found, arch, op) | {"tile": name})

        for op, keywords in _tiles.KEYWORDS.items():
            for keyword, kernel in keywords.items() if op != "attention_lse" else ():  # attention's
                for tile in map(str, _tiles.candidates(kernel, arch)[1:]):
                    add(op, kernel, tile, **{keyword: tile})
                if arch >= 90:
                    with patch.object(kernels, "takes_tma", lambda t: False):
                        add(op, kernel, f"{_tiles.by_pointers(kernel, arch)}")
    return rows


def tile_rows() -> list[dict[str, Any]]:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return [row for rows in pool.map(tile_rows_of, ARCHS) for row in rows]


# kernels that must not pass


def planted_rows(arch: int = 90) -> list[dict[str, Any]]:
    """A backward with a row of 3072 in one warp, which spills; a norm whose x is off by one."""
    from fluxkern.kernels import _rows

    op = "gated_residual_norm_modulate_backward"
    one_warp = {"C": 3072, "BLOCK_C": 1024, "num_warps": 1}
    with patch.object(_rows, "row_config", lambda C: one_warp):
        with launches_compiled_only(arch) as spilling:
            launch(op, arguments(op))
    op = "norm_modulate"
    x, *rest = arguments(op)
    with launches_compiled_only(arch) as scalar:
        launch(op, [x.new_empty(*x.shape[:2], x.shape[2] + 1)[..., 1:], *rest])
    return [read_compiled(kernel, arch, "planted") for kernel in (spilling[0], scalar[0])]


# CUDA


def object_rows(file: Path) -> list[dict[str, Any]]:
    """Of every function and architecture in a compiled object; warps are not known here."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [tool("cuobjdump"), "-xelf", "all", str(file.resolve())],
            check=True,
            capture_output=True,
            cwd=folder,
        )
        for cubin in sorted(Path(folder).glob("*.cubin")):
            arch = int(re.search(r"sm_(\d+)", cubin.name)[1])
            for name, found in read_cubin(cubin).items():
                rows.append({"kernel": name, "arch": arch} | found)
    return rows


# the budget of a kernel


def violations(row: dict[str, Any], budget: dict[str, Any]) -> list[str]:
    """What `row` breaks of its entry in budgets.json; a sentence each.

    An entry holds upper limits `registers`, `shared`, `narrow_loads`, `narrow_stores` (0 unless
    given), `specialisations` (1 unless given), `product_waits` (for asynchronous products, of which
    a compiler that serialises them puts in one each), lower limits `loads`, `stores`, `tma`,
    `warps_per_sm`, the `tensor_cores`, and under `sm_<arch>` what differs there. Spills and stack
    are always refused. What a row does not hold (a CUDA object has no `warps`) is not checked.
    """
    limits = {"spills": 0, "stack": 0, "narrow_loads": 0, "narrow_stores": 0}
    limits |= {"specialisations": 1} | budget
    limits |= budget.get(f"sm_{row['arch']}", {})
    upper = ("spills", "stack", "registers", "shared", "narrow_loads", "narrow_stores")
    upper += ("specialisations", "product_waits")
    lower = ("loads", "stores", "tma", "warps_per_sm")
    where = f"{row['kernel']} on sm_{row['arch']}"
    found = [
        f"{where}: {name} must be <= {limits[name]}, got {row[name]}"
        for name in upper
        if name in limits and name in row and row[name] > limits[name]
    ]
    found += [
        f"{where}: {name} must be >= {limits[name]}, got {row[name]}"
        for name in lower
        if name in limits and name in row and row[name] < limits[name]
    ]
    cores = limits.get("tensor_cores", [])
    if row["tensor_cores"] != cores:
        found.append(f"{where}: tensor_cores must be {cores}, got {row['tensor_cores']}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", help="name of one Triton kernel")
    parser.add_argument("--json", action="store_true", help="rows as JSON instead of a table")
    parser.add_argument("--planted", action="store_true", help="the kernels that must not pass")
    parser.add_argument("--tiles", action="store_true", help="all tiles that may be chosen")
    parser.add_argument("--object", type=Path, help="read this CUDA object instead")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set: interpreted kernels have no machine code")
    if args.object:
        rows = object_rows(args.object)
    elif args.tiles:
        rows = tile_rows()
    else:
        rows = planted_rows() if args.planted else all_rows(args.only)
    if args.json:
        print(json.dumps(rows))
        return
    for row in rows:
        print(*(f"{key}={value}" for key, value in row.items()))


if __name__ == "__main__":
    main()

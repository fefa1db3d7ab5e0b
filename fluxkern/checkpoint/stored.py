"""Tensors in files: described by the header alone, read through a map of their bytes."""

import math
import mmap
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import ops
from .names import ALL_ROWS

CODES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)  # of 8 bits, each a number
PLAUSIBLE = (1e-6, 1e4)  # the largest weight of a typical row, in any model that works
FLOATS = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are
_ENCODINGS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def mapped(file: Path, offset: int, nbytes: int) -> Tensor:
    """Bytes of a file as uint8 [nbytes], without reading them; a write changes this copy alone."""
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    try:
        with open(file, "rb") as opened:
            window = mmap.mmap(
                opened.fileno(), offset - start + nbytes, access=mmap.ACCESS_COPY, offset=start
            )
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be mapped: {error}") from None
    return torch.frombuffer(window, dtype=torch.uint8, offset=offset - start, count=nbytes)


class Maps(dict):
    """File -> all of its bytes, mapped once: each map has a descriptor for as long as it lives."""

    def __missing__(self, file: Path) -> Tensor:
        self[file] = mapped(file, 0, file.stat().st_size)
        return self[file]


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Args:
        file: the file.
        key: its name there.
        shape: its sizes.
        dtype: of an element.
        offset: where it begins, bytes from the beginning of the file.
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def map(self) -> Tensor:
        """The tensor, whose memory is that of the file, until the last view of it is gone."""
        return mapped(self.file, self.offset, self.nbytes).view(self.dtype).view(self.shape)

    def numbers(self, out: Tensor, rows: slice = ALL_ROWS) -> bool:
        """Writes rows into a tensor of any floating dtype, on any device.

        Returns:
            whether they are all finite.
        """
        out.copy_(self.map()[rows].view(out.shape))
        return all(torch.isfinite(extreme) for extreme in torch.aminmax(out))

    def int8(self, values: Tensor, scale: Tensor, rows: slice = ALL_ROWS) -> bool:
        """Writes rows as `ops.quantize_int8` gives them, each page of the file touched once."""
        source = self.map()[rows]
        if source.dtype not in _ENCODINGS:
            source = source.float()
        if ops.compiled_kernels()["_C_cpu"] is None:
            _read_by_kernel(_ENCODINGS[source.dtype], source.view(torch.uint8), values, scale)
        else:
            for to, part in zip((values, scale), ops.quantize_int8(source), strict=True):
                to.copy_(part)
        return bool(scale.isfinite().all())


@dataclass(frozen=True)
class Nested:
    """Block scales of bitsandbytes that are themselves codes: table[code] * scale + offset."""

    table: Stored
    scale: Stored
    size: int  # codes that share a scale
    offset: float


@dataclass(frozen=True)
class Quantised:
    """A tensor in a file as codes with scales.

    Args:
        codes: the codes, of `CODES` or as uint8 [N, bytes of a row].
        shape: the sizes of the numbers.
        format: the name that people have for it.
        encoding: the kernel's.
        scale: one, one a row, or one for each run of a row.
        table: what each of 16 codes stands for.
        nested: what `scale` is made of, where it is codes itself.
        rotation: inputs that ConvRot has turned together; 0 where it has not.
    """

    codes: Stored
    shape: tuple[int, ...]
    format: str
    encoding: str
    scale: Stored | None = None
    table: Stored | None = None
    nested: Nested | None = None
    rotation: int = 0

    @property
    def file(self) -> Path:
        return self.codes.file

    @property
    def key(self) -> str:
        return self.codes.key

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16  # where no other is asked for

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes

    def numbers(self, out: Tensor, rows: slice = ALL_ROWS) -> bool:
        """Writes rows into a tensor of any floating dtype, on any device; True.

        Raises:
            ValueError: a damaged block or scale, or scales that no model has.
        """
        if len(self.shape) == 1 and rows != ALL_ROWS:
            whole = torch.empty(self.shape, **FLOATS)
            self.numbers(whole)
            out.copy_(whole[rows])
        elif out.dtype in _ENCODINGS and out.device.type == "cpu" and out.is_contiguous():
            self._read(out.view(1, -1) if out.ndim == 1 else out.flatten(1), rows)
        else:
            dtype = out.dtype if out.dtype in _ENCODINGS else torch.float32
            near = torch.empty(out.shape, dtype=dtype, device="cpu")
            self.numbers(near, rows)
            out.copy_(near)
        return True

    def int8(self, values: Tensor, scale: Tensor, rows: slice = ALL_ROWS) -> bool:
        """Writes rows as int8 with a scale each: those of the file, or made of its numbers; True.

        Raises:
            ValueError: as `numbers`.
        """
        if self.is_int8 and not self.rotation:
            values.copy_(self.codes.map()[rows])
            scale.copy_(self._scales(rows).expand(len(scale), 1)[:, 0])
        else:
            self._read(values, rows, scale)
        return True

    @property
    def is_int8(self) -> bool:
        """Whether the codes are the weight of `ops.linear_int8` as they lie."""
        return self.codes.dtype == torch.int8

    def mapped_int8(self, maps: Maps) -> tuple[Tensor, Tensor]:
        """The weight and the scales of `ops.linear_int8`, where `is_int8`: the weight's
        memory is that of the file."""
        begin = self.codes.offset
        values = maps[self.file][begin : begin + self.nbytes].view(torch.int8).view(self.shape)
        return values, self._scales(ALL_ROWS).expand(self.shape[0], 1)[:, 0].clone()

    def _scales(self, rows: slice) -> Tensor | None:
        """fp32 [N, runs] or [1, 1]."""
        if self.scale is None:
            return None
        scale = self.scale.map()
        if self.nested is not None:
            of_codes = self.nested.scale.map().float().repeat_interleave(self.nested.size)
            scale = self.nested.table.map().float()[scale.int()] * of_codes[: scale.numel()]
            scale = scale + self.nested.offset
        scale = scale.float()
        if not (scale >= 0).all() or not scale.isfinite().all():
            raise ValueError(f"{self.file}: {self.scale.key:.200} must be finite and positive")
        return scale.reshape(1, 1) if scale.numel() == 1 else scale.view(self.shape[0], -1)[rows]

    def _read(self, out: Tensor, rows: slice, largest: Tensor | None = None) -> None:
        codes = self.codes.map()
        table = None if self.table is None else self.table.map().float()
        if codes.dtype in CODES:
            table = torch.arange(256, dtype=torch.uint8, device="cpu").view(codes.dtype).float()
        codes = (codes.view(1, -1) if codes.ndim == 1 else codes.flatten(1)).view(torch.uint8)[rows]
        largest = torch.empty(len(out), **FLOATS) if largest is None else largest
        _read_by_kernel(
            self.encoding, codes, out, largest, table, self._scales(rows), self.rotation
        )
        self._check(largest * 127 if out.dtype == torch.int8 else largest)

    def _check(self, largest: Tensor) -> None:
        """Refuses rows by the largest number in each."""
        damaged = largest.isfinite().logical_not().nonzero()
        where = f"{self.file}: {self.key:.200} in {self.format}"
        if len(damaged):
            raise ValueError(f"{where} has a damaged block in row {int(damaged[0])}: not finite")
        typical = float(largest[largest > 0].median()) if largest.any() else 1.0
        if not PLAUSIBLE[0] <= typical <= PLAUSIBLE[1]:
            raise ValueError(
                f"{where}: half of its rows have no weight above {typical:.1e}, "
                f"so its scales are damaged or in another layout"
            )


def _read_by_kernel(
    encoding: str,
    codes: Tensor,
    out: Tensor,
    largest: Tensor,
    table: Tensor | None = None,
    scale: Tensor | None = None,
    rotation: int = 0,
) -> None:
    if reason := ops.compiled_kernels()["_C_cpu"]:
        raise ValueError(f"quantised weights need the compiled kernels of a CPU: {reason}")
    torch.ops.fluxkern_cpu.dequantise(encoding, codes, table, scale, rotation, out, largest)

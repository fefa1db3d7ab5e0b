"""Which tensors a GGUF file holds, from its header; every size is checked before memory is taken.

Source: gguf of llama.cpp (`gguf/constants.py`, `gguf_reader.py`).
"""

import math
import mmap
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from .stored import Quantised, Stored

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MOST_TENSORS = 2**16
MOST_TEXTS = 2**21  # a vocabulary has less than an eighth of it
MOST_AXES = 4
MOST_ELEMENTS = 2**40
NAME_LIMIT = 2**12  # bytes; of values of metadata only the end of the file is the limit
ALIGNMENTS = [2**n for n in range(3, 17)]
NUMBERS = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16, 28: torch.float64}


class Block(NamedTuple):
    """A type of ggml: its name, and the elements and bytes of a block."""

    name: str
    size: int
    nbytes: int


BLOCKS = {
    2: Block("Q4_0", 32, 18),
    3: Block("Q4_1", 32, 20),
    6: Block("Q5_0", 32, 22),
    7: Block("Q5_1", 32, 24),
    8: Block("Q8_0", 32, 34),
    10: Block("Q2_K", 256, 84),
    11: Block("Q3_K", 256, 110),
    12: Block("Q4_K", 256, 144),
    13: Block("Q5_K", 256, 176),
    14: Block("Q6_K", 256, 210),
}
OTHERS = {  # types of ggml that are not read, to be refused by their names
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
    41: "Q1_0",
}
STRING, ARRAY = 8, 9
VALUES = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # struct's letters


class _Cursor:
    """Little-endian values one after another, none of them from behind the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def bytes(self, count: int, most: int | None = None) -> bytes:
        if count > len(self.data) - self.at or (most is not None and count > most):
            raise ValueError(f"{count} bytes at byte {self.at} of {len(self.data)}")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, letter: str) -> int | float | bool:
        return struct.unpack("<" + letter, self.bytes(struct.calcsize("<" + letter)))[0]

    def count(self, least: int) -> int:
        """A count of things that take at least so many bytes each."""
        count = self.number("Q")
        if count > (len(self.data) - self.at) // least:
            raise ValueError(f"{count} entries at byte {self.at} of {len(self.data)}")
        return count

    def text(self, most: int = NAME_LIMIT) -> str:
        return self.bytes(self.number("Q"), most).decode()

    def value(self) -> object:
        """A value of metadata; an array is passed over."""
        kind = self.number("I")
        if kind != ARRAY:
            return self.text(len(self.data)) if kind == STRING else self.number(VALUES[kind])
        kind = self.number("I")
        if kind == STRING:
            if (count := self.count(8)) > MOST_TEXTS:
                raise ValueError(f"more than {MOST_TEXTS} texts in an array: {count}")
            for _ in range(count):
                self.bytes(self.number("Q"))
        else:
            size = struct.calcsize("<" + VALUES[kind])
            self.bytes(self.count(size) * size)
        return None


def read_gguf(path: Path) -> dict[str, Stored | Quantised]:
    """Reads which tensors a GGUF file holds, without their values.

    Args:
        path: the file.
    Returns:
        name -> what is known of the tensor, in the order of the file.
    Raises:
        ValueError: another version, damaged or cut short, one of several pieces, or a type of
            tensor that is not read.
    """
    try:
        with (
            open(path, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            return _read(path, _Cursor(data))
    except (struct.error, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged or cut short: {error!r:.200}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error!s:.300}") from None


def _read(path: Path, cursor: _Cursor) -> dict[str, Stored | Quantised]:
    cursor.at = len(MAGIC)
    if (version := cursor.number("I")) not in VERSIONS:
        raise ValueError(f"not a little-endian GGUF file of version 2 or 3, got {version}")
    tensors, fields = cursor.count(24), cursor.count(13)
    if tensors > MOST_TENSORS:
        raise ValueError(f"more than {MOST_TENSORS} tensors: {tensors}")
    metadata = {cursor.text(): cursor.value() for _ in range(fields)}
    if metadata.get("split.count", 1) not in (0, 1):
        raise ValueError(f"one of {metadata['split.count']!r:.20} pieces; they must be merged")
    alignment = metadata.get("general.alignment", 32)
    if alignment not in ALIGNMENTS:
        raise ValueError(f"general.alignment must be of {ALIGNMENTS}, got {alignment!r:.80}")
    infos = [_tensor(cursor) for _ in range(tensors)]
    begin = -(-cursor.at // alignment) * alignment
    stored = {}
    for name, make, offset in infos:
        if name in stored or offset % alignment:
            raise ValueError(f"{name:.200} is there twice or lies at {offset}, not in line")
        stored[name] = make(path, name, begin + offset)
    _check_places(stored, begin, len(cursor.data), alignment)
    return stored


Make = Callable[[Path, str, int], Stored | Quantised]


def _tensor(cursor: _Cursor) -> tuple[str, Make, int]:
    name = cursor.text()
    axes = cursor.number("I")
    if not 1 <= axes <= MOST_AXES:
        raise ValueError(f"{name:.200} must have 1 to {MOST_AXES} axes, got {axes}")
    shape = tuple(cursor.number("Q") for _ in range(axes))[::-1]  # ggml's innermost is first
    if not 0 < math.prod(shape) <= MOST_ELEMENTS:
        raise ValueError(f"{name:.200} must have 1 to {MOST_ELEMENTS} elements, got {shape}")
    return name, _made(name, cursor.number("I"), shape), cursor.number("Q")


def _made(name: str, kind: int, shape: tuple[int, ...]) -> Make:
    if kind in NUMBERS:
        return lambda path, key, at: Stored(path, key, shape, NUMBERS[kind], at)
    if kind not in BLOCKS:
        known = ", ".join([*(block.name for block in BLOCKS.values()), "F16, BF16, F32, F64"])
        found = OTHERS.get(kind, f"type {kind}")
        raise ValueError(f"{name:.200} is {found}, which is not read; those read are {known}")
    block = BLOCKS[kind]
    if shape[-1] % block.size:
        raise ValueError(f"{name:.200} has rows of {shape[-1]}, not of blocks of {block.size}")
    rows = (*shape[:-1], shape[-1] // block.size * block.nbytes)

    def make(path: Path, key: str, at: int) -> Quantised:
        codes = Stored(path, key, rows, torch.uint8, at)
        return Quantised(codes, shape, f"GGUF {block.name}", block.name.lower())

    return make


def _extents(stored: dict[str, Stored | Quantised]) -> Iterator[tuple[int, int, str]]:
    for name, entry in stored.items():
        codes = entry.codes if isinstance(entry, Quantised) else entry
        yield codes.offset, codes.offset + codes.nbytes, name


def _check_places(
    stored: dict[str, Stored | Quantised], begin: int, size: int, alignment: int
) -> None:
    """Tensors lie behind one another up to the end of the file, with padding alone between."""
    for start, end, name in sorted(_extents(stored)):
        if not 0 <= start - begin < alignment or end > size:
            raise ValueError(
                f"{name:.200} at bytes {start} to {end} does not follow byte {begin} of {size}"
            )
        begin = end
    if size - begin >= alignment:
        raise ValueError(f"{size - begin} bytes at the end belong to no tensor")

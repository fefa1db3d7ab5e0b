"""Weights as files hold them become numbers: to the bit what others read in the same bytes."""

import numpy as np
import pytest
import torch
from test_cpu_kernels import isa  # noqa: F401
from torch import Tensor

from fluxkern import ops

pytestmark = pytest.mark.usefixtures("isa")
KERNELS = torch.ops.fluxkern_cpu
FORMATS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
NF4 = torch.linspace(-1, 1, 16)


def read(
    encoding: str,
    stored: Tensor,
    columns: int,
    dtype: torch.dtype = torch.float32,
    table: Tensor | None = None,
    scale: Tensor | None = None,
    rotation: int = 0,
) -> tuple[Tensor, Tensor]:
    out = torch.empty(len(stored), columns, dtype=dtype)
    largest = torch.full((len(stored),), torch.nan)
    KERNELS.dequantise(encoding, stored, table, scale, rotation, out, largest)
    return out, largest


def hadamard(size: int) -> Tensor:
    four = torch.ones(4, 4, dtype=torch.float64) - 2 * torch.eye(4, dtype=torch.float64).flip(0)
    turned = torch.ones(1, 1, dtype=torch.float64)
    while len(turned) < size:
        turned = torch.kron(turned, four / 2)
    return turned


@pytest.mark.parametrize("name", FORMATS)
def test_blocks_of_ggml_are_what_gguf_reads(name):
    blocks = pytest.importorskip("ggml_blocks")
    raw = blocks.random_blocks(name, 37, 768)
    expected = blocks.read_by_gguf(name, raw)
    assert expected.std() > 1e-3
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        out, largest = read(name.lower(), torch.from_numpy(raw), 768, dtype)
        assert torch.equal(out, expected.to(dtype))
        assert torch.equal(largest, expected.abs().amax(1))


@pytest.mark.parametrize("name", FORMATS)
def test_blocks_become_the_int8_of_their_numbers(name):
    blocks = pytest.importorskip("ggml_blocks")
    raw = blocks.random_blocks(name, 37, 256, seed=1)
    values, scale = read(name.lower(), torch.from_numpy(raw), 256, torch.int8)
    expected, expected_scale = ops.quantize_int8(blocks.read_by_gguf(name, raw))
    assert torch.equal(values, expected) and torch.equal(scale, expected_scale)


@pytest.mark.parametrize("columns", [1, 3, 17, 100, 515])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_numbers_become_the_int8_of_quantize_int8(dtype, columns):
    x = torch.randn(40, columns).to(dtype)
    x[3], x[4, 0], x[5, -1] = 0, torch.nan, torch.inf
    encoding = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[str(dtype)[6:]]
    values, scale = read(encoding, x.view(torch.uint8), columns, torch.int8)
    expected, expected_scale = ops.quantize_int8(x)
    assert torch.equal(values, expected)
    assert torch.equal(scale.nan_to_num(-1), expected_scale.nan_to_num(-1))


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("rows", [1, 9])
def test_codes_are_looked_up_and_scaled(rows, groups):
    codes = torch.randint(0, 256, (9, 64), dtype=torch.uint8)
    scale = torch.rand(rows, groups) + 0.5
    out, largest = read("codes8", codes, 64, table=E4M3, scale=scale)
    expected = E4M3[codes.int()] * scale.repeat_interleave(64 // groups, 1)
    assert torch.equal(out.nan_to_num(-1), expected.nan_to_num(-1))
    assert torch.equal(largest.isnan(), expected.isnan().any(1))  # 0x7f and 0xff
    out, _ = read("codes4", codes, 128, table=NF4, scale=scale)
    nibbles = torch.stack((codes >> 4, codes & 15), -1).flatten(1)
    assert torch.equal(out, NF4[nibbles.int()] * scale.repeat_interleave(128 // groups, 1))


@pytest.mark.parametrize("group", [1, 4, 16, 64, 256])
def test_a_rotation_is_undone(group):
    weight = torch.randn(5, 512, dtype=torch.float64)
    turned = (weight.unflatten(1, (-1, group)) @ hadamard(group)).flatten(1).float()
    out, _ = read("f32", turned.view(torch.uint8), 512, rotation=group)
    assert (out - weight).abs().max() < 2e-6


@pytest.mark.parametrize(("name", "at"), [("q8_0", 0), ("q4_1", 2), ("q6_k", 208), ("q2_k", 82)])
def test_a_scale_that_is_no_number_shows_in_its_row_alone(name, at):
    blocks = pytest.importorskip("ggml_blocks")
    raw = blocks.random_blocks(name.upper(), 6, 512)
    raw[2, at : at + 2] = np.array([np.nan], np.float16).view(np.uint8)
    raw[4, at : at + 2] = np.array([-np.inf], np.float16).view(np.uint8)
    for dtype in (torch.float32, torch.int8):
        _, largest = read(name, torch.from_numpy(raw), 512, dtype)
        assert largest.isnan().tolist() == [False, False, True, False, True, False]


def test_rows_of_a_longer_buffer_are_read_and_written():
    stored = torch.randn(8, 100).bfloat16()
    out, largest = torch.full((3, 50), -9.0), torch.empty(3)
    inner = stored[2:5, :40].view(torch.uint8)
    KERNELS.dequantise("bf16", inner, None, None, 0, out[:, :40], largest)
    assert torch.equal(out[:, :40], stored[2:5, :40].float()) and (out[:, 40:] == -9).all()


def test_what_does_not_fit_is_refused():
    codes, out, largest = torch.zeros(2, 34, dtype=torch.uint8), torch.empty(2, 32), torch.empty(2)
    good = ["q8_0", codes, None, None, 0, out, largest]
    KERNELS.dequantise(*good)
    wrong = {
        "encoding": (0, "q9_0"),
        "stored": (1, codes[:, :33]),
        "table": (2, torch.zeros(256)),
        "scale": (3, torch.ones(2, 5)),
        "rotation": (4, 8),
        "out": (5, torch.empty(2, 32, 1)),
        "largest": (6, torch.empty(3)),
    }
    for name, (at, value) in wrong.items():
        with pytest.raises(RuntimeError, match=name):
            KERNELS.dequantise(*good[:at], value, *good[at + 1 :])

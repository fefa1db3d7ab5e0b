"""Paths of the CUDA kernels that the sizes of the contract do not reach, on a CPU."""

import pytest
import torch

from fluxkern import ops, reference
from fluxkern.ops import _load
from fluxkern.testing import assert_accurate, gradients, widened

pytestmark = pytest.mark.skipif(
    _load.load_reason("cuda-emulator") is not None,
    reason="no _C_cuda_emulator: make build-emulator",
)
DTYPES = [torch.float32, torch.bfloat16]
PICTURES = {  # B, C, H, W, groups
    "several pictures": (2, 64, 16, 16, 8),
    "odd pixels": (1, 96, 13, 8, 32),
    "odd channels": (2, 15, 9, 7, 3),
    "more channels than a block has threads": (1, 264, 5, 1, 1),
    "more vectors than a block has threads": (1, 2080, 2, 4, 32),
    "several runs of a group": (1, 4, 150, 151, 1),
    "several runs in vectors": (1, 8, 136, 136, 1),
    "one pixel": (3, 64, 1, 1, 4),  # of two values to a group the gradient is a difference alone
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", PICTURES)
def test_group_norm_silu_of_any_picture(name: str, layout: torch.memory_format, dtype: torch.dtype):
    *shape, groups = PICTURES[name]
    x = 5 + torch.randn(shape)  # far from zero, where a sum of squares loses its digits
    x = x.to(dtype).contiguous(memory_format=layout)
    weight, bias = torch.randn(2, shape[1]).to(dtype)
    args = {"x": x, "weight": weight, "bias": bias, "num_groups": groups}

    def run(**args: object) -> torch.Tensor:
        return ops.group_norm_silu(**args, backend="cuda-emulator")

    plain = reference.group_norm_silu
    out = run(**args)
    assert out.is_contiguous(memory_format=layout)
    assert_accurate(out, plain(**widened(args)), plain(**args))
    dout = (torch.randn_like(x),)
    truth = gradients(plain, widened(args), tuple(d.double() for d in dout))
    found, own = (gradients(f, args, dout) for f in (run, plain))
    for name, g, t, r in zip(("x", "weight", "bias"), found, truth, own, strict=True):
        assert_accurate(g, t, r, f"gradient of {name}")

"""Offsets beyond 2^31 elements: rows far apart in a sparse file give the bits of a dense copy."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_contract import PAIRS, make
from torch import Tensor

from fluxkern import ops
from fluxkern.cases import SHAPES, Sizes
from fluxkern.testing import leaves, outputs

FAR = {0: 2**31 + 64, 1: 2**29 + 64}  # axis -> a stride that takes its last index over 2^31
ROOM = 2**33  # elements of a file that nothing but these rows is written to
GPU_ONLY = ("triton", "cuda")
COMPARED = [  # torch's own code may choose by alignment; images are contiguous or channels-last
    (op, backend) for op, backend in PAIRS if backend != "reference" and op != "group_norm_silu"
]


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    path = tmp_path_factory.mktemp("sparse") / "half"
    with path.open("wb") as file:
        try:
            file.truncate(2 * ROOM)
        except OSError as refusal:
            pytest.skip(f"no sparse file of {2 * ROOM} bytes: {refusal}")
    yield torch.from_file(str(path), shared=True, size=ROOM, dtype=torch.float16)
    Path(path).unlink()


def spread(args: dict[str, Any], axis: int, sparse: Tensor) -> dict[str, Any]:
    """The same values, every tensor of tokens with its rows, or batch elements, far apart."""
    far, free = dict(args), 0
    for name, v in leaves(args).items():
        if v.ndim < 3 or v.shape[axis] < 2 or v.shape[0] != 2:
            continue
        strides = [v.shape[i + 1 :].numel() for i in range(v.ndim)]
        strides[axis] = FAR[axis]
        if axis == 1:
            strides[0] = v[0, 0].numel()  # batch elements side by side in each far row
        far[name] = sparse.as_strided(v.shape, strides, free).copy_(v)
        free += v[:, 0].numel() if axis == 1 else v[0].numel()
        assert free < FAR[1]
    return far


@pytest.mark.parametrize("axis", FAR)
@pytest.mark.parametrize("op, backend", COMPARED)
def test_far_strides_give_the_same_bits(op: str, backend: str, axis: int, sparse: Tensor):
    if torch.cuda.is_available() and backend in GPU_ONLY:
        pytest.skip("a file is not in the memory of a GPU")
    args = make(op, backend, Sizes(), "fp16")
    far = spread(args, axis, sparse)
    if all(far[name] is args[name] for name in args):
        pytest.skip("no tensor of tokens among the arguments")
    run = partial(getattr(ops, op), backend=backend)
    for out, expected in zip(outputs(run, far), outputs(run, args), strict=True):
        assert torch.equal(out, expected)


PICTURES = {"flux-512": 66, "flux-1024": 22, "flux-2048": 6}  # a batch that needs 64 bits


@pytest.mark.parametrize("shape", PICTURES)
def test_which_batches_need_64_bits(shape: str):
    """The widest rows of FLUX are those of a single block's first projection, 7 C."""
    sizes = SHAPES[shape]
    for pictures, needed in ((PICTURES[shape], True), (PICTURES[shape] - 1, False)):
        rows = torch.empty(pictures, sizes.tokens, 7 * sizes.hidden, device="meta")
        assert (rows.numel() > 2**31) == needed

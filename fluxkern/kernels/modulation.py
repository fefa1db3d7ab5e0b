"""silu(vec) weight^T + bias for a few rows: a product that only reads the weight.

Grid: 32 outputs and up to 64 rows a program, so that a schedule of 50 steps reads the weight once.
Moves the weight once for every 64 rows; vec and the result are small.
silu in fp32, rounded to the dtype as the product takes it; fp32 sums; bias added before rounding.
weight and bias are contiguous on their last axis; fp32 without TF32.
"""

import triton
import triton.language as tl
from torch import Tensor

MAX_ROWS = 64  # of a program


@triton.jit(do_not_specialize=("R", "B"))
def modulation_kernel(
    vec_ptr,
    weight_ptr,
    bias_ptr,  # or None
    out_ptr,  # [R, O]
    vec_stride_s,
    vec_stride_b,
    vec_stride_k,
    weight_stride_o,
    R,
    B,
    O,  # noqa: E741
    K,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = (tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    o = (tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)).to(tl.int64)
    vec_ptr += ((rows // B) * vec_stride_s + (rows % B) * vec_stride_b)[:, None]
    total = tl.zeros((BLOCK_R, BLOCK_O), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        vec_mask = (rows < R)[:, None] & (k < K)[None, :]
        vec = tl.load(vec_ptr + k[None, :] * vec_stride_k, mask=vec_mask, other=0.0)
        x = vec.to(tl.float32)
        x = (x * tl.sigmoid(x)).to(vec.dtype)
        mask = (k < K)[:, None] & (o < O)[None, :]
        at = weight_ptr + k[:, None] + o[None, :] * weight_stride_o
        weight = tl.load(at, mask=mask, other=0.0)
        total = tl.dot(x, weight, total, input_precision="ieee")
    if bias_ptr is not None:
        total += tl.load(bias_ptr + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
    out = total.to(out_ptr.dtype.element_ty)
    mask = (rows < R)[:, None] & (o < O)[None, :]
    tl.store(out_ptr + rows[:, None] * O + o[None, :], out, mask=mask)


def modulation(vec: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    *steps, batch, inputs = vec.shape
    rows, outputs = batch * (steps[0] if steps else 1), weight.shape[0]
    block_r = min(MAX_ROWS, max(16, triton.next_power_of_2(rows)))
    modulation_kernel[(triton.cdiv(outputs, 32), triton.cdiv(rows, block_r))](
        vec,
        weight,
        bias,
        out,
        vec.stride(0) if steps else 0,
        *vec.stride()[-2:],
        weight.stride(0),
        rows,
        batch,
        outputs,
        inputs,
        BLOCK_R=block_r,
        BLOCK_O=32,
        BLOCK_K=128,
        num_warps=4,
        num_stages=4,
    )

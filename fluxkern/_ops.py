"""The namespace of the torch ops; a build for the Hugging Face hub has a name of its own."""

import torch

ops = torch.ops.fluxkern


def add_op_namespace_prefix(op_name: str) -> str:
    return f"fluxkern::{op_name}"

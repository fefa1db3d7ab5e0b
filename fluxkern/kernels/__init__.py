"""Triton kernels, one file per op; a launcher has the op's name, its arguments and its outputs."""

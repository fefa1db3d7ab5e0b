"""Whether the CUDA object runs on a GPU of this machine: CUDA itself is asked."""

import ctypes
from pathlib import Path

import torch


def cuda_object_reason(file: Path, architectures: tuple[str, ...], index: int) -> str | None:
    """Why the object cannot run on a GPU.

    Args:
        file: the object, which loads.
        architectures: what it was built for, as TORCH_CUDA_ARCH_LIST has them.
        index: of the GPU.
    """
    with torch.cuda.device(index):
        driver, runtime, error = _asked(file)
    if error == "cudaSuccess":
        return None
    if error == "cudaErrorInsufficientDriver":
        return f"{file.name} takes a driver of CUDA {_version(runtime)}, got {_version(driver)}"
    if error == "cudaErrorNoKernelImageForDevice":
        built = " ".join(architectures) or "unknown architectures"
        capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
        return f"{file.name} was built for {built}, not for compute capability {capability}"
    return f"{file.name} does not run here ({error})"


def _asked(file: Path) -> tuple[int, int, str]:
    """Version of the driver, of the runtime in the object, and the name of an error."""
    driver, runtime = ctypes.c_int(), ctypes.c_int()
    probe = ctypes.CDLL(str(file)).fluxkern_probe
    probe.restype = ctypes.c_char_p
    error = probe(ctypes.byref(driver), ctypes.byref(runtime))
    return driver.value, runtime.value, error.decode()


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}" if number else "none"


def has_architecture(name: str, architectures: tuple[str, ...]) -> bool:
    """Whether machine code for an architecture such as 9.0a is among them, with PTX or without."""
    return name in (built.removesuffix("+PTX") for built in architectures)

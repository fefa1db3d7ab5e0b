"""Our second CUDA attention, for Hopper: WGMMA fed by TMA, in csrc/cuda/attention_wgmma.cu."""

from functools import partial

from torch import Tensor

from .. import _backends, _load, _probe, measured
from . import providers

NAME, EMULATED = "cuda-wgmma", "cuda-wgmma-emulator"
OPS = ("attention", "attention_lse", "rope_attention")


def _refused_by_kernel(*args: Tensor) -> str | None:
    """Against what csrc/cuda/attention_wgmma.cu does not take: TMA finds rows by 16 bytes."""
    if not args:
        return None
    q, k, v = args[:3]
    if q.dtype not in providers.HALF:
        return f"takes bfloat16 and float16, got {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"takes D of 8, 16, ... 128, got {q.shape[-1]}"
    if not k.shape[1]:
        return "takes at least one key"
    loaded = {"q": q, "k": k, "v": v} if len(args) == 3 else {"v": v}  # or after norm and rotation
    for name, t in loaded.items():
        if providers.misaligned(t):
            return f"takes rows at multiples of 16 bytes, got {name} with strides {t.stride()}"
    return None


def _refused(*args: Tensor) -> str | None:
    capability = providers.capability(args[0].device if args else None)
    if capability != (9, 0):
        return f"takes compute capability 9.0, got {'.'.join(map(str, capability))}"
    if not _probe.has_architecture("9.0a", _load.architectures()):
        return "_C_cuda.so was built without 9.0a"
    return _refused_by_kernel(*args)


def not_shown_faster(op: str, *args: object) -> str | None:
    if measured.shown_faster(op, args, NAME, "cuda"):
        return None
    return "no result of this device in the package shows it right and faster than cuda"


def register() -> None:
    """The kernel and its emulation for the ops that it serves; loaded when asked for."""
    for op in OPS:
        for name, refused in ((NAME, _refused), (EMULATED, _refused_by_kernel)):
            make = partial(_backends.compiled, op, name, refused, partial(not_shown_faster, op))
            _backends.register_when_asked(op, name, make)

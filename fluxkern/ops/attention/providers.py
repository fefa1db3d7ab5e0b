"""Attention by kernels of others, on a GPU: cuDNN, FlashAttention 3 where installed, torch's flash,
and torch's SDPA for what these do not take.

cuDNN and flash are called by their aten ops, so that no other can run in their place. The first
three take half precision alone and give the log-sum-exp as [B, H, L], natural logarithm, as ours
is. SDPA takes fp32 and wide heads, by a kernel of torch's choice, and gives no log-sum-exp.
"""

import inspect
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _backends, _load
from .._backends import Backend
from .._op import empty_each

NAMES = ("cudnn", "flash3", "flash", "sdpa")
HALF = (torch.bfloat16, torch.float16)
FLASH3_MODULES = ("flash_attn_interface", "flash_attn_3.flash_attn_interface")
aten = torch.ops.aten


def ours(backend: str | None) -> str | None:
    """The backend for the ops beside attention, where attention's was named."""
    if backend in NAMES:
        return None
    return {"cuda-wgmma": "cuda", "cuda-wgmma-emulator": "cuda-emulator"}.get(backend, backend)


# what they cannot take


def capability(device: torch.device | None = None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def misaligned(t: Tensor) -> bool:
    """Whether a row does not begin at 16 bytes, or two rows lie in the same place."""
    steps = [step for size, step in zip(t.shape[:3], t.stride()[:3], strict=True) if size > 1]
    bytes_to = [step * t.itemsize for step in (*steps, t.storage_offset())]
    return any(step % 16 for step in bytes_to) or not all(steps)


def _shapes_refused(tensors: tuple[Tensor, ...], limit: int) -> str | None:
    q = tensors[0]
    if wrong := next((t for t in tensors if not t.is_cuda), None):
        return f"takes tensors on cuda, got {wrong.device}"
    if q.dtype not in HALF:
        return f"takes bfloat16 and float16, got {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > limit:
        return f"takes head dims that are multiples of 8 up to {limit}, got {q.shape[-1]}"
    if not all(t.numel() for t in tensors):
        return "takes no empty tensors"
    if any(misaligned(t) for t in tensors):
        return "takes rows that begin at multiples of 16 bytes and do not overlap"
    return None


def _torch_takes(name: str, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """What torch itself says of this machine, its build and the user's switches."""
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    params = torch.backends.cuda.SDPAParams(*heads_first, None, 0.0, False, False)
    return getattr(torch.backends.cuda, f"can_use_{name}_attention")(params, False)


def _no_cudnn(_: torch.device | None) -> str | None:
    if not torch.backends.cudnn.is_available():
        return "torch has no cuDNN here"
    if torch.backends.cudnn.version() < 90000:
        return f"takes cuDNN from 9.0, got {torch.backends.cudnn.version()}"
    return None


def _no_flash(_: torch.device | None) -> str | None:
    found = torch.backends.cuda.is_flash_attention_available()
    return None if found else "torch was built without flash attention"


@cache
def _flash3() -> ModuleType | str:
    """The module of the package, or why there is none."""
    for name in FLASH3_MODULES:
        try:
            module = import_module(name)
        except ModuleNotFoundError:
            continue
        except (ImportError, OSError) as error:
            return f"{name} does not import ({error})"
        taken = inspect.signature(module.flash_attn_func).parameters
        if "return_attn_probs" not in taken:
            return f"{name} is older than return_attn_probs of flash_attn_func"
        return module
    return "the package flash_attn_interface (FlashAttention 3) is not installed"


def _no_flash3(device: torch.device | None) -> str | None:
    if capability(device) != (9, 0):
        return f"takes compute capability 9.0, got {'.'.join(map(str, capability(device)))}"
    found = _flash3()
    return found if isinstance(found, str) else None


def _head_dim_limit(name: str, q: Tensor) -> int:
    return 128 if name == "cudnn" and capability(q.device)[0] < 9 else 256


MACHINE = {
    "cudnn": _no_cudnn,
    "flash3": _no_flash3,
    "flash": _no_flash,
    "sdpa": lambda _: None,  # torch always has a kernel for it
}


def unsupported(name: str, *tensors: Tensor) -> str | None:
    """Why a provider does not take q, k, v and, for its backward, dout and out."""
    if reason := _load.no_cuda():
        return reason
    device = tensors[0].device if tensors else None
    if device is not None and device.type != "cuda":
        return f"takes tensors on cuda, got {device}"
    if reason := MACHINE[name](device):
        return reason
    if not tensors:
        return None
    if name == "sdpa":
        return None if all(t.numel() for t in tensors) else "takes no empty tensors"
    if reason := _shapes_refused(tensors, _head_dim_limit(name, tensors[0])):
        return reason
    if name != "flash3" and not _torch_takes(name, *tensors[:3]):
        return "torch does not take these with the settings in force"
    return None


# forward: q, k, v -> out [B, L, H, D], lse [B, H, L]

Forward = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]


def _cudnn(q: Tensor, k: Tensor, v: Tensor, with_lse: bool) -> tuple[Tensor, Tensor | None]:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, with_lse)
    return out.transpose(1, 2), lse.reshape(q.shape[:3]) if with_lse else None


def _flash(q: Tensor, k: Tensor, v: Tensor, with_lse: bool) -> tuple[Tensor, Tensor | None]:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v)
    return out.transpose(1, 2), lse


def _flash_3(q: Tensor, k: Tensor, v: Tensor, with_lse: bool) -> tuple[Tensor, Tensor | None]:
    if not with_lse:
        return _flash3().flash_attn_func(q, k, v), None
    out, lse, *_ = _flash3().flash_attn_func(q, k, v, return_attn_probs=True)
    return out, lse


def _sdpa(q: Tensor, k: Tensor, v: Tensor, with_lse: bool) -> tuple[Tensor, None]:
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first).transpose(1, 2), None


def _dense(t: Tensor) -> Tensor:
    return t if t.is_contiguous() else t.clone(memory_format=torch.contiguous_format)


FORWARD: dict[str, Forward] = {
    "cudnn": _cudnn,
    "flash3": _flash_3,
    "flash": _flash,
    "sdpa": _sdpa,
}


def attention(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _dense(FORWARD[name](q, k, v, False)[0])


def attention_lse(name: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = FORWARD[name](q, k, v, True)
    return _dense(out), _dense(lse.transpose(1, 2))


# backward: lse as [B, H, L], contiguous

Gradients = tuple[Tensor, Tensor, Tensor]


def _cudnn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> Gradients:
    heads_first = (t.transpose(1, 2) for t in (dout, q, k, v, out))
    unused = q.new_empty((), dtype=torch.int64)  # of the dropout: seed and offset
    rest = (unused, unused, None, None, None, q.shape[1], k.shape[1], 0.0, False)
    backward = aten._scaled_dot_product_cudnn_attention_backward
    return tuple(t.transpose(1, 2) for t in backward(*heads_first, lse[..., None], *rest))


def _flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> Gradients:
    heads_first = (t.transpose(1, 2) for t in (dout, q, k, v, out))
    unused = (q.new_empty(2, dtype=torch.uint64), q.new_empty((), dtype=torch.uint64))
    rest = (None, None, q.shape[1], k.shape[1], 0.0, False, *unused)
    backward = aten._scaled_dot_product_flash_attention_backward
    return tuple(t.transpose(1, 2) for t in backward(*heads_first, lse, *rest))


def _flash_3_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> Gradients:
    gradients = empty_each(q, k, v)
    dq, dk, dv = gradients
    named = _flash_3_backward_options(dq, dk, dv, q.shape[-1] ** -0.5)
    _flash3()._flash_attn_backward(dout, q, k, v, out, lse, **named)
    return gradients


def _flash_3_backward_options(dq: object, dk: object, dv: object, scale: object) -> dict:
    return {"dq": dq, "dk": dk, "dv": dv, "softmax_scale": scale, "deterministic": True}


BACKWARD = {"cudnn": _cudnn_backward, "flash3": _flash_3_backward, "flash": _flash_backward}
UNORDERED = ("cudnn", "flash")  # their backward adds by atomics


def backward(
    name: str,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
) -> Gradients:
    heads_first = _dense(lse.transpose(1, 2))
    gradients = BACKWARD[name](_dense(dout), q, k, v, _dense(out), heads_first)
    return tuple(_dense(t) for t in gradients)


def _flash3_backward_refused() -> str | None:
    call = _flash3()._flash_attn_backward
    signature = inspect.signature(getattr(call, "_init_fn", call))
    try:
        signature.bind(*[None] * 6, **_flash_3_backward_options(*[None] * 4))
    except TypeError as error:
        return f"_flash_attn_backward of this flash_attn_interface takes other arguments ({error})"
    return None


def lse_unsupported(name: str, *tensors: Tensor) -> str | None:
    return unsupported(name, *tensors) or ("gives no lse" if name == "sdpa" else None)


def backward_unsupported(name: str, *args: Tensor | None) -> str | None:
    if reason := lse_unsupported(name):
        return reason
    if name == "flash3" and (reason := _flash3_backward_refused()):
        return reason
    if not args:
        return None
    dout, dlse, q, k, v, *_ = args
    if dlse is not None:
        return "takes no gradient of lse"
    return unsupported(name, q, k, v)


# the order without a measured table


def plain_of_ours(q: Tensor) -> bool:
    """Whether our kernels multiply these without tensor cores."""
    return q.dtype not in HALF or q.shape[-1] > 256


def order(q: Tensor | None = None) -> tuple[str, ...]:
    """Which is tried first, from the published rates of docs/backends.md; then all backends.

    Args:
        q: of the call; None asks for the current device.
    """
    cuda = torch.cuda.is_available() if q is None else q.is_cuda
    if not cuda:
        return (*_backends.BACKENDS, *NAMES)
    major, minor = capability(None if q is None else q.device)
    wgmma = (major, minor) == (9, 0) or major == 10
    providers = ("flash3", "cudnn", "flash") if wgmma else ("flash", "cudnn", "flash3")
    providers += ("sdpa",) * (q is not None and plain_of_ours(q))
    ours = ("triton", "cuda") if major >= 9 and (q is None or q.dtype in HALF) else ()
    return (*providers, *ours, *(name for name in _backends.BACKENDS if name not in ours))


def backward_order(*args: Tensor | None) -> tuple[str, ...]:
    return order(*args[2:3])


def _unordered(*_: object) -> str:
    return "its sums have no fixed order"


def register() -> None:
    """The providers of attention, its lse and its backward, and their order."""
    for name in NAMES:
        for op, refused in ((attention, unsupported), (attention_lse, lse_unsupported)):
            backend = Backend(name, partial(op, name), partial(refused, name))
            _backends.register(op.__name__, backend)
        refused = partial(backward_unsupported, name)
        more = {"unnamed": _unordered} if name in UNORDERED else {}
        backend = Backend(name, partial(backward, name), refused, **more)
        _backends.register("attention_backward", backend)
    _backends.set_order("attention", lambda *args: order(*args[:1]))
    _backends.set_order("attention_lse", lambda *args: order(*args[:1]))
    _backends.set_order("attention_backward", backward_order)

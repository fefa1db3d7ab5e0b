"""What the stages of training share: updates, gradients, states that survive a stop."""

from __future__ import annotations

import math
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .._files import read_tensor_header, write_files, write_tensors


class Diverged(RuntimeError):
    """Training met a loss, a gradient or a weight that is not finite."""


def check_finite(where: str, what: str, values: float | Iterable[Tensor]) -> None:
    """Raises Diverged where a number, or one in tensors of one device, is not finite."""
    if not isinstance(values, float):
        values = float(torch.stack(torch._foreach_norm([t.detach() for t in values])).norm())
    if not math.isfinite(values):
        raise Diverged(f"{where}: the {what} is {values}")


@dataclass
class Optimised:
    """Parameters under training, their running mean, and where their state is kept.

    AdamW moves all of them, but the matrices of the blocks where Muon has a learning rate: half of
    them on each of two threads, since its products take a third of a step on one.
    """

    path: Path
    parameters: dict[str, nn.Parameter]
    learning_rate: float
    steps: int
    decay: float
    muon_learning_rate: float | None = None

    def __post_init__(self) -> None:
        self.step, self.saved = 0, None
        self.mean = {name: p.detach().clone() for name, p in self.parameters.items()}
        rates, matrices = {"lr": self.learning_rate, "weight_decay": 0.01}, {}
        if self.muon_learning_rate is not None:
            matrices = {n: p for n, p in self.parameters.items() if p.ndim == 2 and "blocks." in n}
        rest = [p for n, p in self.parameters.items() if n not in matrices]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, betas=(0.9, 0.98), **rates)
        ]
        if matrices:
            rates["lr"] = self.muon_learning_rate
            largest_first = sorted(matrices.values(), key=nn.Parameter.numel, reverse=True)
            for i in range(2):
                half = largest_first[i::4] + largest_first[3 - i :: 4]
                muon = torch.optim.Muon(half, adjust_lr_fn="match_rms_adamw", **rates)
                self.optimizers.append(muon)
        self.threads = ThreadPoolExecutor(2)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["highest"] = group["lr"]
        if self.path.exists():
            self._load()

    def update(self) -> None:
        """One step down the parameters' gradients, which are then cleared.

        Raises:
            Diverged: a gradient is not finite, or after the step a parameter. What was saved before
                stays; nothing can be saved any more.
        """
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.check("norm of the gradients", float(norm))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["highest"] * self._schedule()
        list(self.threads.map(lambda optimizer: optimizer.step(), reversed(self.optimizers)))
        self.check("norm of the weights", self.parameters.values())
        for p in self.parameters.values():
            p.grad = None
        self.step += 1
        keep = min(0.999, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.mean.values()), [p.detach() for p in self.parameters.values()], 1 - keep
            )

    def check(self, what: str, values: float | Iterable[Tensor]) -> None:
        """Raises Diverged, with the step and what the last state on the disk is."""
        kept = "no state was saved"
        if self.saved is not None:
            kept = f"{self.path} holds the state after step {self.saved}"
        try:
            check_finite(f"{self.path.stem} stopped in step {self.step + 1}", what, values)
        except Diverged as error:
            raise Diverged(f"{error}; {kept}") from None

    def _schedule(self) -> float:
        left = (self.steps - self.step) / max(self.decay * self.steps, 1)
        return min(1.0, (self.step + 1) / 100, left)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the parameters are their running means."""
        now = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._assign(self.mean)
        try:
            yield
        finally:
            self._assign(now)

    def keep_mean(self) -> None:
        self._assign(self.mean)

    @torch.no_grad()
    def _assign(self, values: dict[str, Tensor]) -> None:
        for name, p in self.parameters.items():
            p.copy_(values[name])

    def save(self) -> None:
        tensors = {}
        for name, p in self.parameters.items():
            tensors[f"parameter.{name}"] = p.detach().contiguous()
            tensors[f"mean.{name}"] = self.mean[name].contiguous()
            for optimizer in self.optimizers:
                for key, value in optimizer.state.get(p, {}).items():
                    tensors[f"{key}.{name}"] = torch.as_tensor(value).contiguous()
        save_tensors(self.path, tensors, {"step": str(self.step)})
        self.saved = self.step

    def _load(self) -> None:
        device = next(iter(self.parameters.values())).device
        self.step = self.saved = step_of(self.path)
        tensors = read_tensors(self.path, device)
        self._assign({name: tensors[f"parameter.{name}"] for name in self.parameters})
        self.mean = {name: tensors[f"mean.{name}"] for name in self.parameters}
        for optimizer in self.optimizers:
            of_muon = isinstance(optimizer, torch.optim.Muon)
            keys = ("momentum_buffer",) if of_muon else ("step", "exp_avg", "exp_avg_sq")
            moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
            for name, p in self.parameters.items():
                if id(p) in moved:
                    optimizer.state[p] = {key: tensors[f"{key}.{name}"] for key in keys}
                    if "step" in keys:
                        optimizer.state[p]["step"] = tensors[f"step.{name}"].cpu()


class _Named(dict):
    """The tensors of a file; one that it lacks is a ValueError."""

    def __init__(self, path: Path, tensors: dict[str, Tensor]) -> None:
        super().__init__(tensors)
        self.path = path

    def __missing__(self, name: str) -> Tensor:
        raise ValueError(f"{self.path} holds no {name}")


def read_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The tensors of a file that training wrote; a damaged one and one it lacks: ValueError."""
    read_tensor_header(path)
    return _Named(path, load_file(path, str(device)))


def step_of(path: Path) -> int:
    """The step after which a state was saved; ValueError where it is none."""
    step = read_tensor_header(path)[1].get("step", "")
    if not re.fullmatch(r"\d{1,9}", step):
        raise ValueError(f"{path} is no state of a training")
    return int(step)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes what training keeps; Diverged where a number of it is not finite."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise Diverged(f"{path} is not written: {name} is not finite")
    write_files(path.parent, {path.name: lambda file: write_tensors(file, tensors, metadata)})


@contextmanager
def asked_to_stop() -> Iterator[list[int]]:
    """Gives a list that a first Ctrl-C or SIGTERM fills; a second one does what it always does."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked  # signals reach the main thread alone
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _: object) -> None:
        asked.append(number)
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, note)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def workers(device: torch.device) -> int:
    """Threads that each compute a part of a batch."""
    return 2 if device.type == "cpu" else 1


class Gradients:
    """Gradients of a mean loss, of copies of a model that compute in a dtype of their own.

    On a CPU each half of a batch has a thread and a copy: at this size two threads of one core each
    are faster than two cores on every op. On a GPU there is one copy.

    Args:
        model: gets the gradients; its device is where the copies compute.
        dtype: of the copies.
        loss: called with a copy and a part of each argument of `backward`, tensors on the device.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, loss: Callable[..., Tensor]):
        self.model, self.loss = model, loss
        self.device = next(model.parameters()).device
        self.copies = [deepcopy(model).to(dtype) for _ in range(workers(self.device))]
        self.threads = ThreadPoolExecutor(len(self.copies))

    def backward(self, *batch: list | Tensor) -> float:
        """Leaves the gradients of the mean loss in the model's parameters; returns the loss."""
        total, count = len(batch[0]), len(self.copies)
        ends = [total * i // count for i in range(count + 1)]
        parts = [[whole[i:j] for whole in batch] for i, j in pairwise(ends)]
        shares = [len(part[0]) / total for part in parts]
        with self._attention():
            losses = list(self.threads.map(self._part, self.copies, parts, shares))
        twins = zip(*(copy.parameters() for copy in self.copies), strict=True)
        for parameter, same in zip(self.model.parameters(), twins, strict=True):
            gradients = [twin.grad.float() for twin in same if twin.grad is not None]
            parameter.grad = sum(gradients) if gradients else None
        return float(sum(losses))

    def _attention(self) -> AbstractContextManager:
        if self.device.type == "cpu":  # one core, bf16: 1.2 s a step, flash 1.4
            return sdpa_kernel(SDPBackend.MATH)
        return nullcontext()

    def _part(self, copy: nn.Module, part: list, share: float) -> Tensor | float:
        with torch.no_grad():
            for ours, theirs in zip(copy.parameters(), self.model.parameters(), strict=True):
                ours.copy_(theirs)
                ours.grad = None
        if not share:
            return 0.0
        part = [p.to(self.device) if isinstance(p, Tensor) else p for p in part]
        loss = share * self.loss(copy, *part)
        loss.backward()
        return loss.detach()

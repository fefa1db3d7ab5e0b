"""A step of the model as a CUDA graph, at sizes where Python would keep the GPU waiting."""

import logging
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from .._modules import autocast_dtype
from .layers import must_be_called
from .transformer import Flux, Workspace

LAUNCH = 40e-6  # seconds of the host for an op of ours; an estimate, docs/backends.md
RATE = 600e12  # FLOPs a second of a large GPU in bf16
MOST = 2  # graphs at a time: those of a prompt and of a negative prompt of another length

Run = Callable[[], Tensor]


def launches(model: Flux) -> int:
    """Of a step: 8 products, 2 norms, a rotation and an attention; 4, 1, 1 and 1."""
    return 12 * len(model.double_blocks) + 7 * len(model.single_blocks)


def flops(model: Flux, batch: int, tokens: int) -> int:
    """Of a step: a block of either kind has 12 C^2 + 2 C tokens multiply-adds a token and MLP 4."""
    c, blocks = model.config.hidden_size, len(model.double_blocks) + len(model.single_blocks)
    weights = (4 * c + 2 * model.config.mlp_size) * c
    return 2 * blocks * batch * tokens * (weights + 2 * tokens * c)


def gains(model: Flux, batch: int, tokens: int) -> bool:
    """Whether the host could keep the GPU waiting: its time is not small against the GPU's."""
    return flops(model, batch, tokens) / RATE < 1.5 * launches(model) * LAUNCH


def captured(run: Run) -> tuple[Callable[[], None], Tensor]:
    """What runs it again on the memory that it has read and written, and that memory."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph.replay, out


def _tensors(img: Tensor, txt: Tensor, workspace: Workspace) -> list[list[Tensor]]:
    """All that changes from call to call, by dtype: torch copies lists of one dtype at once."""
    vectors = [vector for layer in workspace.modulation for vector in layer]
    return [[img], [txt], [workspace.cos, workspace.sin], vectors]


def _own(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format)


class StepGraph:
    """One captured step and the tensors that it reads."""

    def __init__(
        self, step: Callable[[Tensor, Tensor, Workspace], Tensor], *args: Tensor | Workspace
    ) -> None:
        img, txt, workspace = args
        layers = tuple(tuple(_own(vector) for vector in layer) for layer in workspace.modulation)
        own = _own(img), _own(txt), Workspace(_own(workspace.cos), _own(workspace.sin), layers)
        self.inputs = _tensors(*own)
        self.replay, self.out = captured(lambda: step(*own))

    def __call__(self, *args: Tensor | Workspace) -> Tensor:
        for into, tensors in zip(self.inputs, _tensors(*args), strict=True):
            torch._foreach_copy_(into, tensors)
        self.replay()
        return self.out.clone()  # the next replay writes over it


class Weights:
    """Where the weights of a step are, which does not read the modulation layers.

    The modules are walked once: a walk at each step would take longer than its launches. One that
    is put in the place of another is seen by its identity, as the old one is kept until then.
    """

    def __init__(self, model: Flux) -> None:
        self.model = model
        self._walk()

    def _walk(self) -> None:
        named = list(self.model.named_modules())
        self.modules = [module for _, module in named]
        self.below = [m._modules for m in self.modules if m._modules]
        self.held = [
            held
            for name, m in named
            for held in (m._parameters, m._buffers)
            if held and "mod" not in name
        ]
        self.known = self._identities()

    def _identities(self) -> list[int]:
        return [id(module) for modules in self.below for module in modules.values()]

    def places(self) -> tuple[int, ...]:
        if self._identities() != self.known:
            self._walk()
        return tuple(t.data_ptr() for held in self.held for t in held.values() if t is not None)


class StepGraphs:
    """The graphs of one sampling run; its memory goes when it goes.

    The first step of a shape runs as always, which also compiles what it needs; the second is
    captured. Weights may be written in place meanwhile; where they move, a new graph is captured.
    A model with a layer or block that must be called, or under autocast, is never captured.

    Args:
        model: a Flux.
        wanted: None captures where `gains` says so; False never, True wherever it can be.
    """

    def __init__(self, model: Flux, wanted: bool | None) -> None:
        self.model, self.wanted = model, wanted
        self.graphs: dict[tuple, StepGraph | None] = {}  # None: seen once

    @cached_property
    def weights(self) -> Weights:
        return Weights(self.model)

    def takes(self, img: Tensor, txt: Tensor) -> bool:
        if self.wanted is False or not capturable(img):
            return False
        tokens = img.shape[1] + txt.shape[1]
        wanted = self.wanted is True or gains(self.model, img.shape[0], tokens)
        return wanted and autocast_dtype(img) is None and not self._must_be_called

    @cached_property
    def _must_be_called(self) -> bool:
        return must_be_called(self.model)

    def run(
        self,
        step: Callable[[Tensor, Tensor, Workspace], Tensor],
        img: Tensor,
        txt: Tensor,
        workspace: Workspace,
    ) -> Tensor:
        if not self.takes(img, txt):
            return step(img, txt, workspace)
        key = img.shape, txt.shape, img.dtype, self.weights.places()
        if key not in self.graphs:
            self._add(key, None)
            return step(img, txt, workspace)
        if self.graphs[key] is None:
            try:
                self._add(key, StepGraph(step, img, txt, workspace))
            except RuntimeError as error:
                self.wanted = False
                logging.getLogger("fluxkern").warning("no CUDA graph of a step: %s", error)
                return step(img, txt, workspace)
        return self.graphs[key](img, txt, workspace)

    def _add(self, key: tuple, graph: StepGraph | None) -> None:
        self.graphs.pop(key, None)
        while len(self.graphs) >= MOST:
            self.graphs.pop(next(iter(self.graphs)))
        self.graphs[key] = graph


def capturable(img: Tensor) -> bool:
    """Whether a capture can begin here."""
    no_gradients = not torch.is_grad_enabled()
    return img.is_cuda and no_gradients and not torch.cuda.is_current_stream_capturing()

"""Steps as CUDA graphs: what is captured, copied, kept and let go.

Without a GPU the capture alone is replaced: what it returns runs the step again on the memory that
the graph would read and write.
"""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from test_transformer import TINY, random_flux
from torch import Tensor

from fluxkern.model import step_graph
from fluxkern.model.sampling import Conditioning, Step, denoise, get_img_ids, get_schedule
from fluxkern.model.transformer import CONFIGS, Flux

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
CONFIG = replace(TINY, guidance_embed=False)


class Captures:
    """Counts captures and replays, and keeps no graph alive."""

    def __init__(self) -> None:
        self.captured, self.replayed = 0, 0
        self.outs: list[weakref.ref] = []
        self.real = step_graph.captured

    def __call__(self, run: step_graph.Run) -> tuple[step_graph.Callable, Tensor]:
        replay, out = self.real(run) if GPU else self.on_a_cpu(run)
        self.captured += 1
        self.outs.append(weakref.ref(out))

        def counted() -> None:
            self.replayed += 1
            replay()

        return counted, out

    @staticmethod
    def on_a_cpu(run: step_graph.Run) -> tuple[step_graph.Callable, Tensor]:
        out = run()
        out.fill_(float("nan"))  # a capture computes nothing
        return lambda: out.copy_(run()), out


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Captures:
    found = Captures()
    monkeypatch.setattr(step_graph, "captured", found)
    if not GPU:
        monkeypatch.setattr(step_graph, "capturable", lambda img: not torch.is_grad_enabled())
    return found


@pytest.fixture(scope="module")
def model() -> Flux:
    return random_flux(CONFIG).to(DEVICE, DTYPE).eval()


def text(length: int, batch: int = 1) -> Conditioning:
    context, vec = CONFIG.context_in_dim, CONFIG.vec_in_dim
    drawn = torch.randn(batch, length, context), torch.randn(batch, vec)
    return Conditioning(*(t.to(DEVICE, DTYPE) for t in drawn))


@torch.no_grad()
def sampled(model: Flux, cond: Conditioning, side: int = 4, steps: int = 5, **options) -> Tensor:
    noise = torch.randn(
        len(cond.txt), side * side, CONFIG.in_channels, generator=torch.Generator().manual_seed(0)
    )
    ids, sigmas = get_img_ids(16 * side, 16 * side, DEVICE), get_schedule(steps, side * side)
    return denoise(model, noise.to(DEVICE, DTYPE), ids, cond, sigmas, **options)


def test_replayed_steps_give_the_bits_of_steps_that_run(model: Flux, captures: Captures):
    for side, batch, length in ((4, 1, 3), (5, 2, 7)):
        cond = text(length, batch)
        expected = sampled(model, cond, side, cuda_graph=False)
        assert torch.equal(sampled(model, cond, side, cuda_graph=True), expected)
    assert (captures.captured, captures.replayed) == (2, 2 * 4)  # the first step runs as always


@pytest.mark.parametrize("length, captured", [(3, 1), (6, 2)], ids=["one batch", "two passes"])
def test_two_pass_guidance_has_a_graph_a_pass(
    model: Flux, captures: Captures, length: int, captured: int
):
    cond, guidance = text(3), {"uncond": text(length), "true_cfg_scale": 2.0}
    expected = sampled(model, cond, cuda_graph=False, **guidance)
    assert torch.equal(sampled(model, cond, cuda_graph=True, **guidance), expected)
    assert captures.captured == captured


@pytest.mark.parametrize("length, captured", [(3, 1), (6, 2)], ids=["as long", "longer"])
def test_another_prompt_on_the_way_is_taken(
    model: Flux, captures: Captures, length: int, captured: int
):
    cond, other = text(3), text(length)

    def change(step: Step) -> None:
        if step.index == 2:
            step.cond = other

    expected = sampled(model, cond, steps=7, cuda_graph=False, on_step=change)
    assert torch.equal(sampled(model, cond, steps=7, cuda_graph=True, on_step=change), expected)
    assert captures.captured == captured


def test_weights_written_in_place_are_seen_and_moved_ones_captured_anew(captures: Captures):
    model, cond = random_flux(CONFIG).to(DEVICE, DTYPE), text(3)
    weight = model.single_blocks[0].linear2.weight
    before = weight.detach().clone()

    def change(step: Step) -> None:
        if step.index == 2:
            weight.data.mul_(0.5)
        if step.index == 4:
            weight.data = weight.data * 3

    expected = sampled(model, cond, steps=8, cuda_graph=False, on_step=change)
    weight.data = before
    assert torch.equal(sampled(model, cond, steps=8, cuda_graph=True, on_step=change), expected)
    assert captures.captured == 2


def test_released_modulation_leaves_the_graph_as_it_is(model: Flux, captures: Captures):
    cond = text(3)
    expected = sampled(model, cond, cuda_graph=False)
    found = sampled(model, cond, cuda_graph=True, release_modulation=True)
    assert torch.equal(found, expected) and captures.captured == 1


def test_no_graph_outlives_its_run_and_two_at_most_live(model: Flux, captures: Captures):
    alive = []

    def change(step: Step) -> None:
        step.cond = text(3 + step.index // 2)
        alive.append(sum(out() is not None for out in captures.outs))

    sampled(model, text(3), steps=9, cuda_graph=True, on_step=change)
    gc.collect()
    assert captures.captured >= 3 and max(alive) <= step_graph.MOST
    assert all(out() is None for out in captures.outs)


def test_a_step_that_cannot_be_captured_runs_as_always(
    model: Flux, monkeypatch: pytest.MonkeyPatch, captures: Captures, caplog
):
    def refuse(run: step_graph.Run) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(step_graph, "captured", refuse)
    cond = text(3)
    expected = sampled(model, cond, cuda_graph=False)
    assert torch.equal(sampled(model, cond, cuda_graph=True), expected)
    assert caplog.text.count("no CUDA graph of a step: operation not permitted") == 1


def test_gradients_and_sizes_that_gain_nothing_are_left_alone(model: Flux, captures: Captures):
    with torch.enable_grad():
        denoise_with_gradients = sampled.__wrapped__
        denoise_with_gradients(model, text(3), cuda_graph=True)
    assert captures.captured == 0
    sampled(model, text(3))
    assert captures.captured == 1  # a small model gains


@pytest.mark.skipif(GPU, reason="says what a CPU does")
def test_a_cpu_captures_nothing(model: Flux):
    cond = text(3)
    assert torch.equal(sampled(model, cond, cuda_graph=True), sampled(model, cond))


def test_small_pictures_of_flux_gain_from_a_graph_and_large_ones_do_not():
    with torch.device("meta"):
        dev, compact = Flux(CONFIGS["dev"]), Flux(CONFIGS["compact"])
    assert step_graph.launches(dev) == 19 * 12 + 38 * 7
    assert 74.3e12 < step_graph.flops(dev, 1, 4608) < 74.6e12
    assert step_graph.gains(dev, 1, 256 + 512)
    assert not step_graph.gains(dev, 1, 4096 + 512)
    assert step_graph.gains(compact, 4, 256 + 64)


@pytest.mark.parametrize("where", ["img_in", "single_blocks.0", "double_blocks.1.img_mlp.2", ""])
def test_a_model_with_a_hook_is_never_captured(captures: Captures, where: str):
    hooked, seen = random_flux(CONFIG).to(DEVICE, DTYPE).eval(), []
    cond = text(5)
    expected = sampled(hooked, cond, cuda_graph=False)
    handle = hooked.get_submodule(where).register_forward_hook(lambda *_: seen.append(1))
    found = sampled(hooked, cond, cuda_graph=True)
    assert captures.captured == 0 and len(seen) == 5
    torch.testing.assert_close(found, expected)
    handle.remove()
    sampled(hooked, cond, cuda_graph=True)
    assert captures.captured == 1


def test_nothing_is_captured_under_autocast(model: Flux, captures: Captures):
    with torch.autocast(DEVICE, torch.bfloat16):
        sampled(model, text(5), cuda_graph=True)
    assert captures.captured == 0


def test_weights_that_move_are_seen_and_one_look_is_no_walk():
    model = random_flux(CONFIG)
    weights = step_graph.Weights(model)
    before = weights.places()
    assert weights.places() == before
    layer = model.single_blocks[0].linear2
    layer.weight.data.mul_(2)  # in place
    model.single_blocks[0].modulation.lin.weight.data = torch.zeros(1)  # read ahead of the steps
    assert weights.places() == before
    layer.weight.data = layer.weight.data.clone()
    assert weights.places() != before
    before = weights.places()
    other = torch.nn.Linear(layer.in_features, layer.out_features)
    model.single_blocks[0].linear2 = other
    assert weights.places() != before and other.weight.data_ptr() in weights.places()

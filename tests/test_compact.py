"""The shipped compact checkpoint: what it draws, as the judge sees it, and in diffusers."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from fluxkern import ops
from fluxkern.compact import FEW_STEPS, GUIDANCE, STEPS
from fluxkern.compact.drawings import Scene
from fluxkern.compact.evaluate import adherence, reconstruction
from fluxkern.compact.judge import judge, matches
from fluxkern.compact.text import T5_LENGTH
from fluxkern.model.sampling import get_noise, pack
from fluxkern.pipeline import COMPACT, COMPACT_WEIGHTS, FluxPipeline

COUNT = 64  # pictures
# one object, of the cards
RIGHT = {"compact-base": 0.87, "compact-dev": 0.86, "compact-schnell": 0.83}


@pytest.fixture(scope="module")
def pipe() -> FluxPipeline:
    return FluxPipeline.from_pretrained("compact-base")


@pytest.fixture(scope="module")
def figures(pipe: FluxPipeline, seed: int, tmp_path_factory: pytest.TempPathFactory) -> dict:
    sheet = tmp_path_factory.mktemp("compact") / "sheet.png"
    figures = adherence(pipe, COUNT, seed, sheet, objects=1, texture="plain")
    print(f"seed {seed}: {figures}, pictures in {sheet}")
    return figures


def shipped() -> list[str]:
    return [name for name, folder in COMPACT.items() if folder.is_dir() and name != "compact"]


def test_all_weights_take_at_most_40_megabytes() -> None:
    files = [path for path in COMPACT_WEIGHTS.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".md"}
    assert sum(path.stat().st_size for path in files) <= 40e6


def test_the_weights_are_half_precision() -> None:
    from safetensors import safe_open

    for path in COMPACT_WEIGHTS.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}


@pytest.mark.parametrize(("field", "share"), [("background", 0.95), ("colour", 0.75)])
def test_pictures_have_the_colours_that_fresh_prompts_ask_for(
    figures: dict, field: str, share: float
) -> None:
    assert figures[field] >= share, figures


def least(name: str) -> float:
    """A guard: the card's share less three standard errors of a sample."""
    return RIGHT[name] - 3 * (RIGHT[name] * (1 - RIGHT[name]) / COUNT) ** 0.5


def test_pictures_have_not_lost_what_the_model_card_says(figures: dict) -> None:
    assert figures["all"] >= least("compact-base"), figures


@pytest.mark.parametrize(("name", "steps"), [("dev", STEPS), ("schnell", FEW_STEPS)])
def test_students_have_not_lost_what_their_model_cards_say(
    name: str, steps: int, seed: int
) -> None:
    student = FluxPipeline.from_pretrained(f"compact-{name}")
    found = adherence(
        student, COUNT, seed, objects=1, texture="plain", steps=steps, true_cfg_scale=1.0
    )
    assert found["all"] >= least(f"compact-{name}"), found


def test_reconstructions_show_what_was_drawn(pipe: FluxPipeline, seed: int) -> None:
    figures = reconstruction(pipe.vae, 200, seed)
    assert figures["right"] >= 0.95, figures


def test_the_demo_prompt_is_right_for_four_of_five_seeds(pipe: FluxPipeline) -> None:
    scene = Scene("circle", "red", "medium", "centre", "blue")
    generators = [torch.Generator().manual_seed(seed) for seed in range(5)]
    pictures = pipe(
        "a red circle on a blue background",
        num_images_per_prompt=5,
        true_cfg_scale=GUIDANCE,
        num_inference_steps=STEPS,
        generator=generators,
        output_type="np",
        progress=False,
    ).images
    verdicts = [judge((picture * 255).round().astype(np.uint8)) for picture in pictures]
    assert sum(matches(verdict, scene) for verdict in verdicts) >= 4, verdicts


@pytest.mark.parametrize("name", shipped())
def test_diffusers_draws_the_same_picture_from_a_shipped_folder(name: str, seed: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.FluxPipeline.from_pretrained(COMPACT[name], dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    noise = pack(get_noise(1, 128, 128, torch.float32, torch.Generator().manual_seed(seed)))
    call = {
        "prompt": "a small yellow star at the top left, on a purple background",
        "num_inference_steps": 4,
        "height": 128,
        "width": 128,
        "max_sequence_length": T5_LENGTH,
        "latents": noise,
        "output_type": "np",
    }
    if name == "compact-base":
        call |= {"negative_prompt": "", "true_cfg_scale": GUIDANCE}
    ours = FluxPipeline.from_pretrained(name)(**call, progress=False).images[0]
    assert np.abs(ours - theirs(**call).images[0]).max() <= 1 / 255


def test_the_kernels_draw_the_picture_of_the_reference(
    pipe: FluxPipeline, seed: int, use_backend: Callable
) -> None:
    (choice,) = ops.explain("gated_residual_norm_modulate")
    if choice.chosen == "reference":
        pytest.skip(str(choice))

    def draw() -> np.ndarray:
        out = pipe(
            "a large green ring on the right, on white",
            true_cfg_scale=GUIDANCE,
            num_inference_steps=8,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
            progress=False,
        )
        return out.images[0]

    ours = draw()
    use_backend("reference")
    assert np.abs(ours - draw()).max() <= 1 / 255


@pytest.mark.parametrize("name", shipped())
def test_the_model_card_stands_beside_the_weights(name: str) -> None:
    card = (COMPACT[name] / "README.md").read_text()
    for words in ("Training data", "Training time", "Figures", "fluxkern train"):
        assert words in card

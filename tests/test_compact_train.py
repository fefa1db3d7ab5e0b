"""Training of the compact model: its gradients, its loss curves, its distillation."""

import json
import resource
import shutil
import signal
import tomllib
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checkpoint_files import same_bits
from diffusers import FluxPipeline as DiffusersPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from fluxkern import ops, pipeline
from fluxkern.checkpoint import weights_hash
from fluxkern.cli import main
from fluxkern.compact import distill, optimise, ship, text, train
from fluxkern.compact.drawings import Scene
from fluxkern.compact.optimise import Diverged, Optimised, save_tensors
from fluxkern.compact.recipe import FOLDER, RECIPES, FlowRecipe, read_recipe
from fluxkern.model.autoencoder import AutoEncoder, AutoEncoderConfig
from fluxkern.model.sampling import (
    Conditioning,
    ScheduleConfig,
    denoise,
    get_img_ids,
    get_schedule,
)
from fluxkern.model.text_encoder import TextEncoder
from fluxkern.model.transformer import CONFIGS, Flux
from fluxkern.pipeline import FluxPipeline

SIZES = {"hidden_size": 64, "num_heads": 1, "depth": 1, "depth_single_blocks": 1}
TINY = replace(CONFIGS["compact"], **SIZES)


def random_flux(seed: int) -> Flux:
    torch.manual_seed(seed)
    return Flux(TINY)


def encode(captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of each caption's own."""
    rngs = [torch.Generator().manual_seed(sum(map(ord, caption))) for caption in captions]
    txt = torch.stack([torch.randn(4, 128, generator=rng) for rng in rngs])
    return txt, torch.stack([torch.randn(128, generator=rng) for rng in rngs])


CAPTIONS = ["a red circle", "a blue star", "a ring", "a cross", "a white square"]


def batch(seed: int) -> tuple[list[str], torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    img, target = torch.randn(2, 5, 64, 64, generator=rng).unbind()
    return CAPTIONS, img, torch.rand(5, generator=rng), target


def flow_loss(flux: Flux, *rest: object) -> torch.Tensor:
    return train.flow_loss(encode, torch.float32, flux, *rest)


def test_gradients_of_two_halves_are_those_of_the_whole_batch(seed: int) -> None:
    model = nn.Linear(3, 2)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))

    def loss(copy: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return copy(x).square().mean()

    value = optimise.Gradients(model, torch.float32, loss).backward(x)
    twin = nn.Linear(3, 2)
    twin.load_state_dict(model.state_dict())
    expected = loss(twin, x)
    expected.backward()
    assert value == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(model.weight.grad, twin.weight.grad)
    torch.testing.assert_close(model.bias.grad, twin.bias.grad)


def test_one_sample_is_half_a_batch_too() -> None:
    model = nn.Linear(3, 2)
    gradients = optimise.Gradients(model, torch.float32, lambda copy, x: copy(x).square().mean())
    assert gradients.backward(torch.ones(1, 3)) > 0
    assert model.weight.grad.abs().sum() > 0


def loss_curve(folder, seed: int, steps: int) -> list[float]:
    flux = random_flux(seed)
    path = folder / "state.safetensors"
    optimised = optimise.Optimised(path, dict(flux.named_parameters()), 1e-3, steps, 0.5, 2e-3)
    gradients = optimise.Gradients(flux, torch.float32, flow_loss)
    losses = []
    for step in range(steps):
        losses.append(gradients.backward(*batch(step % 4)))
        optimised.update()
    return losses


def test_fused_and_reference_ops_train_along_the_same_curve(tmp_path, seed: int) -> None:
    curves = []
    for backend in ("cpu", "reference"):
        with ops.use_backend(backend):
            curves.append(loss_curve(tmp_path, seed, 40))
    fused, reference = map(torch.tensor, curves)
    assert fused[-1] < 0.9 * fused[0] and not torch.equal(fused, reference)
    assert ((fused - reference).abs() / reference).max() <= 1e-3


@pytest.mark.parametrize("command", RECIPES)
def test_every_command_has_its_recipe(command: str) -> None:
    recipe = read_recipe(RECIPES[command], FOLDER / f"{command}.toml")
    assert recipe.start == "" and recipe.seed == 0


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seed = 0", "seed = -1", "seed must be int from 0 to .*, got -1"),
        ("seed = 0", "seeds = 0", "must hold"),
        ('start = ""', "start = 1", "start must be a string, got 1"),
        ('"bfloat16"', '"int8"', r"\[flow\]: dtype must be one of .* got 'int8'"),
        ("decay = 0.4", "decay = true", r"\[flow\]: decay must be float from 0 to 1, got True"),
        ("batch_size = 64", "batch_size = 6.4", r"\[text\]: batch_size must be int from 1"),
        (
            "evaluate_every = ",
            "evaluate_every = 0 # ",
            r"\[flow\]: evaluate_every must be int from 1 to",
        ),
    ],
)
def test_a_bad_recipe_is_refused_by_name(tmp_path, old: str, new: str, message: str) -> None:
    (tmp_path / "bad.toml").write_text((FOLDER / "flow.toml").read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        read_recipe(FlowRecipe, tmp_path / "bad.toml")


NUMBERS = [
    (command, stage, name)
    for command in RECIPES
    for stage, numbers in tomllib.loads((FOLDER / f"{command}.toml").read_text()).items()
    for name in (numbers if isinstance(numbers, dict) else [None])
    if name not in ("dtype", "start") and stage != "start"
]


@pytest.mark.parametrize(("command", "stage", "name"), NUMBERS)
def test_every_number_of_a_recipe_is_bounded(tmp_path, command, stage, name) -> None:
    recipe = tomllib.loads((FOLDER / f"{command}.toml").read_text())
    for value in ("1" + "0" * 400, "-1e9", "inf", "nan", "1e300", "[]", "9223372036854775808"):
        lines = [f"{key} = {json.dumps(recipe[key])}" for key in ("seed", "start")]
        if name is None:
            lines[0] = f"seed = {value}"
        for part, numbers in recipe.items():
            if isinstance(numbers, dict):
                shown = {key: json.dumps(number) for key, number in numbers.items()}
                shown |= {name: value} if part == stage else {}
                lines += [f"[{part}]", *(f"{key} = {text}" for key, text in shown.items())]
        (tmp_path / "bad.toml").write_text("\n".join(lines))
        with pytest.raises(ValueError, match=rf"{name or 'seed'} must be \w+ from .* to ") as error:
            read_recipe(RECIPES[command], tmp_path / "bad.toml")
        assert len(str(error.value)) < 400 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    ["a = " + "[" * 100_000, "a = " + "1" * 5000, "\x00", "seed = 1" + "\n#" * 600_000, "a = '"],
    ids=["nested", "digits", "zero", "large", "open"],
)
def test_a_recipe_that_is_none_is_refused_in_one_line(tmp_path, text) -> None:
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(ValueError, match=r"bad\.toml( is not a TOML file|: larger than)") as error:
        read_recipe(FlowRecipe, tmp_path / "bad.toml")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "student_steps = 4",
            "student_steps = 3",
            "student_steps must divide teacher_steps 16, got 3",
        ),
        ("most = 5.0", "most = 0.5", "least must be at most 0.5, got 1.0"),
        (
            "student_steps = 4",
            "student_steps = 16\npaths = 90000\n#",
            r"paths times student_steps \+ 1 must be at most 1000000, got 90000 times 17",
        ),
    ],
)
def test_numbers_that_do_not_fit_each_other_are_refused(tmp_path, old, new, message) -> None:
    recipe = (FOLDER / "distill.toml").read_text()
    assert old in recipe
    if "paths = " in new:
        recipe = recipe.replace("paths = 6000\n", "")
    (tmp_path / "bad.toml").write_text(recipe.replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        read_recipe(RECIPES["distill"], tmp_path / "bad.toml")


@pytest.mark.parametrize("fine", [0.0, 1.0, 4.0])
def test_small_outlines_are_drawn_as_often_as_the_recipe_says(fine: float) -> None:
    words = {"size": "small", "position": "centre", "background": "white"}
    scenes = [Scene(shape, "red", **words) for shape in ("star", "circle", "square")]
    numbers = replace(read_recipe(FlowRecipe, FOLDER / "flow.toml").flow, fine=fine, batch_size=999)
    captions, *_ = train.Batches(scenes, torch.zeros(3, 64, 64), numbers)(
        np.random.default_rng(0), dropped=0.0
    )
    stars = sum("star" in caption for caption in captions)
    share = fine / (fine + 2)
    assert abs(stars / 999 - share) <= 4 * (share * (1 - share) / 999) ** 0.5


# distillation


def velocities(flux: Flux, w: float | None = None) -> torch.Tensor:
    captions, img, t, _ = batch(1)
    txt, vec = encode(captions)
    guidance = None if w is None else torch.full((5,), w)
    with torch.no_grad():
        return train.velocity(flux, torch.float32, img, txt, t, vec, guidance)


def test_a_guided_student_begins_as_its_teacher(seed: int) -> None:
    teacher = random_flux(seed)
    student = distill.guided(teacher, seed)
    assert student.config.guidance_embed
    for w in (1.0, 4.0):
        torch.testing.assert_close(velocities(student, w), velocities(teacher))


def test_a_student_without_guidance_keeps_that_of_its_bias(seed: int) -> None:
    student = distill.guided(random_flux(seed), seed)
    nn.init.normal_(student.guidance_in.out_layer.weight, std=0.5)
    fixed = distill.unguided(student, 2.5)
    assert not fixed.config.guidance_embed
    torch.testing.assert_close(velocities(fixed), velocities(student, 2.5), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(velocities(fixed), velocities(student, 1.0), atol=1e-3)


def guidance_loss(teacher: Flux, student: Flux, w: torch.Tensor) -> torch.Tensor:
    captions, img, t, _ = batch(2)
    return distill.guidance_loss(teacher, encode, torch.float32, student, captions, img, t, w)


def test_guidance_1_is_the_teachers_own_velocity(seed: int) -> None:
    teacher = random_flux(seed)
    student = distill.guided(teacher, seed)
    assert guidance_loss(teacher, student, torch.ones(5)).item() < 1e-10
    loss = guidance_loss(teacher, student, torch.full((5,), 3.0)).item()
    no_txt, no_vec = (a.expand(5, *a.shape[1:]) for a in encode([""]))
    _, img, t, _ = batch(2)
    with torch.no_grad():
        txt, vec = encode(CAPTIONS)
        cond = train.velocity(teacher, torch.float32, img, txt, t, vec)
        uncond = train.velocity(teacher, torch.float32, img, no_txt, t, no_vec)
    assert loss == pytest.approx(4 / 9 * F.mse_loss(cond, uncond).item(), rel=1e-3)


def test_a_student_learns_to_guide(tmp_path, seed: int) -> None:
    teacher = random_flux(seed)
    student = distill.guided(teacher, seed)
    frozen = distill.frozen(teacher, torch.float32)
    loss = partial(distill.guidance_loss, frozen, encode, torch.float32)
    gradients = optimise.Gradients(student, torch.float32, loss)
    parameters = dict(student.named_parameters())
    optimised = optimise.Optimised(tmp_path / "s.safetensors", parameters, 2e-3, 60, 0.5, 2e-3)
    captions, img, t, _ = batch(3)
    w = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    losses = []
    for _ in range(60):
        losses.append(gradients.backward(captions, img, t, w))
        optimised.update()
    assert losses[-1] < 0.3 * losses[0]


class Straight(nn.Module):
    """A model whose velocity is the same everywhere: the first token of the text."""

    def forward(self, img, img_ids, txt, txt_ids, t, vec, guidance=None):
        return txt[:, :1, : img.shape[-1]].expand_as(img)


FEW_STEPS = read_recipe(RECIPES["distill"], FOLDER / "distill.toml").few_steps
EXACT = replace(FEW_STEPS, dtype="float32")


def test_a_straight_path_needs_no_learning(seed: int) -> None:
    noise = torch.randn(5, 64, 64)
    txt, vec = encode(CAPTIONS)
    places = distill.follow(Straight(), EXACT, noise, txt, vec)
    assert places.shape == (5, 5, 64, 64)
    end = noise - txt[:, :1, :64]
    torch.testing.assert_close(places[:, -1], end, rtol=1e-4, atol=1e-5)
    drawn = distill.pieces(CAPTIONS, places, 9, np.random.default_rng(seed))
    assert train.flow_loss(encode, torch.float32, Straight(), *drawn).item() < 1e-8


def test_the_pieces_of_paths_join_and_end_where_the_teacher_does(seed: int) -> None:
    dev = distill.guided(random_flux(seed), seed)
    nn.init.normal_(dev.guidance_in.out_layer.weight, std=0.5)
    noise, text = torch.randn(5, 64, 64), encode(CAPTIONS)
    places = distill.follow(dev, EXACT, noise, *text)
    sigmas = get_schedule(EXACT.teacher_steps, distill.TOKENS, distill.EVEN)
    ids = get_img_ids(128, 128), Conditioning(*text)
    with torch.no_grad():
        end = denoise(dev, noise, *ids, sigmas, guidance_scale=EXACT.guidance)
    torch.testing.assert_close(places[:, -1], end, rtol=1e-3, atol=1e-4)
    captions, start, t, flow = distill.pieces(CAPTIONS, places, 40, np.random.default_rng(seed))
    assert t.unique(return_counts=True)[1].tolist() == [10, 10, 10, 10]
    for i, caption in enumerate(captions):
        path, piece = CAPTIONS.index(caption), round(4 * (1 - t[i].item()))
        torch.testing.assert_close(start[i], places[path, piece])
        torch.testing.assert_close(start[i] - flow[i] / 4, places[path, piece + 1])


def test_the_error_of_a_velocity_is_that_of_guidance_alone_before_training(
    teacher_folder: Path, seed: int
) -> None:
    teacher = FluxPipeline.from_pretrained(teacher_folder)
    student = distill.guided(teacher.transformer, seed)
    pipe = FluxPipeline(student, teacher.vae, teacher.text_encoder, teacher.schedule)
    errors = distill.velocity_error(pipe, teacher, 2, seed)
    assert errors[1.0] < 1e-5 < errors[2.0] < errors[3.5] < errors[5.0]


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    tokenizers = text.build_tokenizers(folder / "text")
    clip, t5 = text.build_encoders(tokenizers, 0)
    encoder = TextEncoder(clip, tokenizers.clip, t5, tokenizers.t5)
    vae = AutoEncoder(AutoEncoderConfig(**train.VAE_SIZES, scale_factor=1.0, shift_factor=0.0))
    pipe = FluxPipeline(random_flux(0), vae, encoder, ScheduleConfig(), train.BASE)
    pipe.to(dtype=torch.float16).save_pretrained(folder / "weights")
    return folder / "weights"


def distilled(folder: Path, start: Path) -> Path:
    recipe = read_recipe(RECIPES["distill"], FOLDER / "distill.toml")
    small = {"steps": 3, "batch_size": 3}
    recipe = replace(
        recipe,
        start=str(start),
        guidance=replace(recipe.guidance, pictures=4, **small),
        few_steps=replace(EXACT, paths=3, teacher_steps=4, **small),
    )
    return distill.DistillRun(folder, recipe)()


TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def whole(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.JUDGED, "flow", 1)
        return distilled(tmp_path_factory.mktemp("distilled") / "whole", teacher_folder)


def test_distillation_moves_the_teachers_matrices(whole: Path, teacher_folder: Path) -> None:
    teacher = load_file(teacher_folder / TRANSFORMER)
    matrices = [key for key, value in teacher.items() if value.ndim == 2]
    for name in ("dev", "schnell"):
        student = load_file(whole / name / TRANSFORMER)
        assert all((student[key] != teacher[key].half()).any() for key in matrices)


@pytest.mark.parametrize("stage", ["guidance", "few_steps"])
def test_a_distillation_stopped_and_resumed_is_the_one_that_was_not_to_the_bit(
    whole: Path, tmp_path: Path, teacher_folder: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(train.JUDGED, "flow", 1)
    update, asked = optimise.Optimised.update, []

    def update_and_ask(optimised: optimise.Optimised) -> None:
        update(optimised)
        if optimised.path.stem == stage and optimised.step == 2 and not asked:
            asked.append(stage)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(optimise.Optimised, "update", update_and_ask)
    with pytest.raises(KeyboardInterrupt):
        distilled(tmp_path / "parted", teacher_folder)
    with safe_open(tmp_path / "parted" / f"{stage}.safetensors", "pt") as state:
        assert state.metadata()["step"] == "2"
    assert not (tmp_path / "parted" / "dev").exists()
    distilled(tmp_path / "parted", teacher_folder)
    for name in ("dev", "schnell"):
        states = (load_file(run / name / TRANSFORMER) for run in (whole, tmp_path / "parted"))
        assert same_bits(*states)


# shipping

FIGURES = {
    "machine": {"cpu": "a CPU", "gpu": None, "threads": 2, "commit": "0123456789"},
    "count": 500,
    "seed": 7,
    "rows": [
        {"measure": "base: one", "value": 0.5, "bound": 0.97, "at_least": True},
        {"measure": "dev: error", "value": 0.07, "bound": 0.08, "at_least": False},
    ],
}


@pytest.fixture
def run(tmp_path: Path, whole: Path, teacher_folder: Path) -> Path:
    """The folder of a run with the teacher, its students, log and recipes."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.copytree(teacher_folder, run / "weights")
    for command in ("vae", "flow"):
        recipe = asdict(read_recipe(RECIPES[command], FOLDER / f"{command}.toml"))
        (run / f"{command}.json").write_text(json.dumps(recipe))
    with open(run / "log.jsonl", "a") as log:
        for i in range(1, 4):
            entry = {"time": 72.0 * i, "stage": "flow", "step": 100 * i, "loss": 0.5, "all": 0.25}
            log.write(json.dumps(entry) + "\n")
    return run


def test_shipped_checkpoints_share_all_but_their_transformers(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shipped").mkdir()
    (tmp_path / "shipped" / "old").touch()
    ship.ship(run, tmp_path / "shipped", FIGURES, "one core")
    shutil.rmtree(run)
    files = [path for path in (tmp_path / "shipped").rglob("*.safetensors")]
    assert len(files) == 6 and not (tmp_path / "shipped" / "old").exists()
    for name in ("base", "dev", "schnell"):
        folder = tmp_path / "shipped" / ("" if name == "base" else name)
        monkeypatch.setitem(pipeline.COMPACT, f"compact-{name}", folder)
        assert_diffusers_draws_the_same(folder, name)
        copied = tmp_path / name
        assert main(["convert", f"compact-{name}", str(copied), "--to", "diffusers"]) == 0
        assert not any(path.is_symlink() for path in copied.rglob("*"))
        assert {p.name for p in copied.iterdir()} == {
            *(p.name for p in folder.iterdir() if p.name not in ship.STUDENTS)
        }
        assert weights_hash(copied) == weights_hash(folder)
        for path in copied.rglob("*.safetensors"):
            assert {t.dtype for t in load_file(path).values()} == {torch.float16}


def assert_diffusers_draws_the_same(folder: Path, name: str) -> None:
    theirs = DiffusersPipeline.from_pretrained(folder, dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    call = {"prompt": "a red circle", "num_inference_steps": 2, "height": 32, "width": 32}
    call |= {"latents": torch.randn(1, 4, 64), "max_sequence_length": 64, "output_type": "np"}
    call |= {"guidance_scale": 2.0, "true_cfg_scale": 2.0 if name == "base" else 1.0}
    call |= {"negative_prompt": ""} if name == "base" else {}
    ours = FluxPipeline.from_pretrained(f"compact-{name}")(**call, progress=False).images
    assert np.abs(ours - theirs(**call).images).max() <= 1 / 255


def test_a_card_says_how_long_training_took_and_what_was_measured(run: Path) -> None:
    ship.ship(run, run / "shipped", FIGURES, "one core")
    cards = {name: (run / "shipped" / name / "README.md").read_text() for name in (".", "dev")}
    flow = read_recipe(RECIPES["flow"], FOLDER / "flow.toml").flow
    hours = 0.72 * flow.steps / 3600
    row = f"| flow | {flow.steps} | {flow.batch_size} | 0.72 | {hours:.1f} | loss 0.5, all 0.25 |"
    assert row in cards["."] and "| one | 0.5 | >= 0.97 | no |" in cards["."]
    assert "| error | 0.07 | <= 0.08 | yes |" in cards["dev"] and "| one |" not in cards["dev"]
    for card in cards.values():
        assert "One core. By `fluxkern train" in card and str(run) not in card
        for heading in ("Training data", "Training time", "Figures", "Limits"):
            assert f"## {heading}\n" in card


def test_a_student_of_other_encoders_is_not_shipped_and_what_was_there_stays(run: Path) -> None:
    pipe = FluxPipeline.from_pretrained(run / "schnell").to(dtype=torch.float16)
    nn.init.zeros_(pipe.text_encoder.t5.shared.weight)
    shutil.rmtree(run / "schnell")
    pipe.save_pretrained(run / "schnell")
    (run / "shipped").mkdir()
    (run / "shipped" / "mine").touch()
    with pytest.raises(ValueError, match="schnell was distilled with another text_encoder.t5"):
        ship.ship(run, run / "shipped", FIGURES, "one core")
    assert [path.name for path in (run / "shipped").iterdir()] == ["mine"]
    assert not list(run.glob(".shipped*"))


def test_a_newer_decoder_is_shipped_with_every_student(run: Path) -> None:
    pipe = FluxPipeline.from_pretrained(run / "weights").to(dtype=torch.float16)
    nn.init.zeros_(pipe.vae.decoder.conv_out.weight)
    shutil.rmtree(run / "weights")
    pipe.save_pretrained(run / "weights")
    shutil.rmtree(run / "schnell")
    ship.ship(run, run / "shipped", FIGURES, "one core")
    assert not FluxPipeline.from_pretrained(run / "shipped/dev").vae.decoder.conv_out.weight.any()
    assert not (run / "shipped" / "schnell").exists()


# another device: "meta" stands for a GPU, where tensors of two devices do not meet either


def test_model_data_and_gradients_are_on_the_device_that_is_asked_for() -> None:
    flux = Flux(TINY).to("meta")
    seen = set()

    def loss(copy: Flux, captions: list[str], *tensors: torch.Tensor) -> torch.Tensor:
        img, t, target = tensors
        txt, vec = (a.to("meta") for a in encode(captions))
        velocity = train.velocity(copy, torch.bfloat16, img, txt, t, vec)
        seen.update((velocity.dtype, copy.img_in.weight.dtype))
        seen.update(a.device.type for a in (velocity, img, t, target))
        return F.mse_loss(velocity.float(), target)

    gradients = optimise.Gradients(flux, torch.bfloat16, loss)
    assert len(gradients.copies) == 1
    gradients._part(gradients.copies[0], list(batch(1)), 1.0)
    assert seen == {torch.bfloat16, "meta"}
    assert {p.grad.device.type for p in gradients.copies[0].parameters()} == {"meta"}


def test_text_encoders_and_their_classifiers_are_on_one_device(tmp_path) -> None:
    tokenizers = text.build_tokenizers(tmp_path)
    clip, t5 = (encoder.to("meta") for encoder in text.build_encoders(tokenizers, 0))
    with pytest.raises(RuntimeError, match="meta tensors"):  # which have no value to report
        text.pretrain_encoders(clip, t5, tokenizers, steps=1, batch_size=2)
    assert any(p.grad is not None for p in t5.parameters())


# what is not finite


def optimised_at(folder: Path, steps: int = 10) -> tuple[torch.nn.Parameter, Optimised]:
    weight = torch.nn.Parameter(torch.ones(3))
    return weight, Optimised(folder / "state.safetensors", {"w": weight}, 0.1, steps, 0.5)


def run_at(folder: Path) -> train.VaeRun:
    return train.VaeRun(folder, read_recipe(RECIPES["vae"], FOLDER / "vae.toml"))


@pytest.mark.parametrize("spoilt", ["loss", "gradients", "weights"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_training_stops_where_something_is_not_finite_and_keeps_the_good_state(
    tmp_path, monkeypatch, spoilt: str, value: float
) -> None:
    monkeypatch.setattr(train, "SAVE_EVERY", 0.0)
    weight, optimised = optimised_at(tmp_path)

    def backward(step: int) -> float:
        weight.grad = torch.ones(3)
        if step == 4 and spoilt == "gradients":
            weight.grad[1] = value
        if step == 4 and spoilt == "weights":
            weight.data[2] = value
        return value if step == 4 and spoilt == "loss" else 1.0

    says = rf"state stopped in step 5: the .*{spoilt} is (nan|inf); .* the state after step 4"
    with pytest.raises(Diverged, match=says):
        run_at(tmp_path / "run").fit("stage", optimised, backward, dict, 100)
    kept = load_file(tmp_path / "state.safetensors")
    assert all(t.isfinite().all() for t in kept.values())
    resumed, again = optimised_at(tmp_path)
    assert again.step == 4 and torch.equal(resumed, kept["parameter.w"])


def test_nothing_that_is_not_finite_is_kept(tmp_path) -> None:
    with pytest.raises(Diverged, match="latents.safetensors is not written: z is not finite"):
        save_tensors(tmp_path / "latents.safetensors", {"z": torch.tensor([1.0, torch.nan])}, {})
    assert list(tmp_path.iterdir()) == []


def test_weights_that_half_precision_does_not_hold_are_not_written() -> None:
    pipe = FluxPipeline.from_pretrained("compact")
    train.in_half(pipe)
    pipe.to(dtype=torch.float32)
    next(pipe.vae.parameters()).data.fill_(1e6)
    with pytest.raises(Diverged, match="the vae does not fit in float16"):
        train.in_half(pipe)


@pytest.mark.parametrize("rate", [1e12, 1e15])
def test_the_text_encoders_stop_too(tmp_path, rate: float) -> None:
    tokenizers = text.build_tokenizers(tmp_path)
    clip, t5 = text.build_encoders(tokenizers)
    with pytest.raises(
        Diverged, match=r"text stopped in step \d+: the (loss|norm of the weights) is"
    ):
        text.pretrain_encoders(clip, t5, tokenizers, steps=30, batch_size=2, learning_rate=rate)


def test_a_second_training_in_a_folder_is_refused(tmp_path) -> None:
    first, second = run_at(tmp_path), run_at(tmp_path)
    first.train = lambda: second()
    with pytest.raises(ValueError, match="another training writes there"):
        first()
    second.train = lambda: tmp_path
    assert second() == tmp_path


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "other"])
def test_a_damaged_state_is_refused_in_one_line(tmp_path, damage: str) -> None:
    _, optimised = optimised_at(tmp_path)
    optimised.save()
    path = optimised.path
    whole = path.read_bytes()
    other = {"metadata": b"", "cut": whole[:-7], "empty": b"", "text": b"x" * 100}.get(damage)
    if damage == "other":
        save_file({"x": torch.ones(2)}, path)
    else:
        path.write_bytes(other)
    with pytest.raises(ValueError, match=r"state\.safetensors") as error:
        optimised_at(tmp_path)
    assert "\n" not in str(error.value)


def test_a_state_of_other_parameters_is_refused_by_name(tmp_path) -> None:
    _, optimised = optimised_at(tmp_path)
    save_tensors(optimised.path, {"parameter.v": torch.ones(3)}, {"step": "3"})
    with pytest.raises(ValueError, match="state.safetensors holds no parameter.w"):
        optimised_at(tmp_path)


def test_a_full_disk_ends_a_log_without_half_a_line(tmp_path) -> None:
    run = run_at(tmp_path)
    run.log(stage="a", step=1)
    before = (tmp_path / "log.jsonl").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, limits[1]))
    try:
        with pytest.raises(OSError, match="No space left"):
            run.log(stage="b", step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "log.jsonl").read_bytes() == before

"""The whole picture against diffusers.FluxPipeline, and what every argument of a call does."""

import json
import os
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline as DiffusersPipeline
from tiny_flux import write_tiny_flux

from fluxkern.compact.text import T5_LENGTH
from fluxkern.model import memory
from fluxkern.model.sampling import unpack
from fluxkern.model.transformer import CONFIGS, Flux
from fluxkern.pipeline import FluxPipeline, default_dtype

PROMPT = "a red circle on a blue background"
QUICK = {"num_inference_steps": 2, "height": 32, "width": 48, "progress": False}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", params=[True, False], ids=["guidance", "no guidance"])
def both(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    theirs = write_tiny_flux(folder, guidance=request.param)
    return FluxPipeline.from_pretrained(folder / "flux"), theirs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    write_tiny_flux(folder, guidance=False, seed=1)
    return folder / "flux"


@pytest.fixture(scope="module")
def pipe(folder):
    return FluxPipeline.from_pretrained(folder)


def draw(pipe, *arguments, **options):
    return pipe(*arguments, **(QUICK | {"output_type": "pt"} | options)).images


def draw_in_both(both, **options):
    ours, theirs = both
    options = QUICK | {"max_sequence_length": 64} | options
    expected_options = {key: value for key, value in options.items() if key != "progress"}
    picture = ours(generator=seeded(), **options).images
    expected = theirs(generator=seeded(), **expected_options).images
    return picture, expected


def assert_same_pictures(pictures, expected):
    assert len(pictures) == len(expected)
    for ours, theirs in zip(pictures, expected, strict=True):
        ours, theirs = np.asarray(ours).astype(int), np.asarray(theirs).astype(int)
        assert ours.shape == theirs.shape
        assert ours.std() > 5  # a picture, not one grey
        assert np.abs(ours - theirs).max() <= 1


@pytest.mark.parametrize(
    "options",
    [
        {"prompt": PROMPT},
        {"prompt": "", "num_inference_steps": 1},
        {"prompt": PROMPT, "prompt_2": "a star", "num_inference_steps": 5},
        {"prompt": PROMPT, "guidance_scale": 30.0},
        {"prompt": [PROMPT, "圆 and круг 🟢"], "num_images_per_prompt": 2},
        {"prompt": PROMPT, "negative_prompt": "a star", "true_cfg_scale": 4.0},
        {
            "prompt": [PROMPT, "a ring"],
            "negative_prompt": ["a star", ""],
            "negative_prompt_2": ["black", "white"],
            "true_cfg_scale": 2.0,
        },
        {"prompt": PROMPT, "height": 16, "width": 80},
        {"prompt": PROMPT, "height": 112, "width": 48},
        {"prompt": PROMPT, "max_sequence_length": 512},
    ],
    ids=lambda options: ", ".join(f"{key}={str(value)[:30]}" for key, value in options.items()),
)
def test_picture_is_within_one_level_of_diffusers(both, options):
    assert_same_pictures(*draw_in_both(both, **options))
    latents, expected = draw_in_both(both, **options, output_type="latent")
    assert (latents - expected).norm() <= 1e-5 * expected.norm()


def test_picture_of_a_prompt_of_more_than_512_tokens_is_that_of_diffusers(both):
    with pytest.warns(UserWarning, match="this was cut") as said:
        pictures = draw_in_both(both, prompt="a red star " * 200, max_sequence_length=512)
    assert [str(warning.message).split()[0] for warning in said] == ["CLIP", "T5"]
    assert_same_pictures(*pictures)


@pytest.mark.parametrize("output_type", ["np", "pt"])
def test_output_types_are_those_of_diffusers(both, output_type):
    ours, theirs = draw_in_both(both, prompt=PROMPT, output_type=output_type)
    assert type(ours) is type(theirs)
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert abs(ours - theirs).max() <= 1 / 255


def test_picture_from_given_noise_is_that_of_diffusers(both):
    noise = torch.randn(2, 6, 64, generator=seeded(3))
    assert_same_pictures(*draw_in_both(both, prompt=PROMPT, num_images_per_prompt=2, latents=noise))


def test_noise_is_drawn_in_the_dtype_of_the_pipeline(both):
    for pipeline in both:
        pipeline.to(dtype=torch.bfloat16)
    drawn = {}

    def keep(name):
        def callback(pipeline, step, timestep, tensors):
            drawn[name] = (timestep, tensors["latents"])
            return {}

        return callback

    ours, theirs = both
    options = {"prompt": PROMPT, "num_inference_steps": 1, "height": 32, "width": 48}
    ours(**options, generator=seeded(), callback_on_step_end=keep("ours"), progress=False)
    theirs(
        **options, generator=seeded(), callback_on_step_end=keep("theirs"), max_sequence_length=64
    )
    for pipeline in both:
        pipeline.to(dtype=torch.float32)
    (our_t, our_latents), (their_t, their_latents) = drawn["ours"], drawn["theirs"]
    assert our_latents.dtype == torch.bfloat16
    assert torch.equal(our_t, their_t)
    # noise of another dtype would be unrelated; rounding alone stays small
    difference = (our_latents - their_latents).float().norm() / their_latents.float().norm()
    assert difference < 0.02


def test_diffusers_draws_the_same_picture_from_a_folder_that_we_saved(both, tmp_path):
    ours, _ = both
    ours.save_pretrained(tmp_path / "saved")
    theirs = DiffusersPipeline.from_pretrained(tmp_path / "saved", local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    again = FluxPipeline.from_pretrained(tmp_path / "saved")
    assert_same_pictures(*draw_in_both((again, theirs), prompt=PROMPT))
    assert torch.equal(
        draw(again, PROMPT, generator=seeded()), draw(ours, PROMPT, generator=seeded())
    )
    assert again.default_size == ours.default_size == 32
    assert again.schedule == ours.schedule


@pytest.mark.parametrize("options", [{}, {"negative_prompt": "a star", "true_cfg_scale": 3.0}])
def test_same_seed_gives_the_same_picture_to_the_bit(pipe, options):
    first = draw(pipe, PROMPT, generator=seeded(8), **options)
    assert torch.equal(first, draw(pipe, PROMPT, generator=seeded(8), **options))
    assert not torch.equal(first, draw(pipe, PROMPT, generator=seeded(9), **options))


def test_pictures_change_with_the_prompt_and_with_the_negative_prompt(pipe):
    one, other = (draw(pipe, text, generator=seeded()) for text in ("a red star", "a blue ring"))
    assert not torch.allclose(one, other, atol=1e-3)
    one, other = (
        draw(pipe, PROMPT, generator=seeded(), negative_prompt=text, true_cfg_scale=5.0)
        for text in ("a red star", "a blue ring")
    )
    assert not torch.allclose(one, other, atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"negative_prompt": "a star", "true_cfg_scale": 3.0}])
def test_a_batch_equals_its_singles(pipe, options):
    prompts = [PROMPT, "", "a large white cross at the top"]
    together = draw(pipe, prompts, generator=[seeded(i) for i in range(3)], **options)
    for i, prompt in enumerate(prompts):
        single = draw(pipe, prompt, generator=seeded(i), **options)
        torch.testing.assert_close(together[i : i + 1], single, atol=1e-4, rtol=1e-4)


def test_pictures_of_one_prompt_come_together(pipe):
    generators = [seeded(i) for i in range(4)]
    pictures = draw(pipe, ["a star", "a ring"], num_images_per_prompt=2, generator=generators)
    for i, prompt in enumerate(["a star", "a star", "a ring", "a ring"]):
        single = draw(pipe, prompt, generator=seeded(i))
        torch.testing.assert_close(pictures[i : i + 1], single, atol=1e-4, rtol=1e-4)


def test_two_passes_at_scale_one_equal_one_pass(pipe):
    one_pass = draw(pipe, PROMPT, generator=seeded())
    barely_above_one = 1 + 1e-7
    two_passes = draw(
        pipe,
        PROMPT,
        generator=seeded(),
        negative_prompt="a blue star",
        true_cfg_scale=barely_above_one,
    )
    torch.testing.assert_close(two_passes, one_pass, atol=1e-5, rtol=1e-5)


def test_two_passes_without_a_negative_prompt_take_the_empty_one(pipe):
    unsaid = draw(pipe, PROMPT, generator=seeded(), true_cfg_scale=3.0)
    said = draw(pipe, PROMPT, generator=seeded(), true_cfg_scale=3.0, negative_prompt="")
    assert torch.equal(unsaid, said)


def test_one_negative_prompt_stands_for_all(pipe):
    options = {"true_cfg_scale": 3.0, "latents": torch.randn(2, 6, 64, generator=seeded())}
    one = draw(pipe, ["a star", "a ring"], negative_prompt="black", **options)
    each = draw(pipe, ["a star", "a ring"], negative_prompt=["black", "black"], **options)
    assert torch.equal(one, each)


@pytest.mark.parametrize("name", ["negative_prompt", "negative_prompt_2"])
def test_a_negative_prompt_without_two_passes_warns_and_changes_nothing(pipe, name):
    with pytest.warns(UserWarning, match="no effect without true_cfg_scale above 1, got 1.0"):
        warned = draw(pipe, PROMPT, generator=seeded(), **{name: "a star"})
    assert torch.equal(warned, draw(pipe, PROMPT, generator=seeded()))


def test_embeddings_stand_for_their_prompts(pipe):
    txt, vec = pipe.text_encoder.encode([PROMPT, "a ring"])
    negative_txt, negative_vec = pipe.text_encoder.encode(["a star", "a star"])
    from_embeddings = draw(
        pipe,
        prompt_embeds=txt,
        pooled_prompt_embeds=vec,
        negative_prompt_embeds=negative_txt,
        negative_pooled_prompt_embeds=negative_vec,
        true_cfg_scale=2.0,
        num_images_per_prompt=2,
        generator=seeded(),
    )
    from_text = draw(
        pipe,
        [PROMPT, "a ring"],
        negative_prompt="a star",
        true_cfg_scale=2.0,
        num_images_per_prompt=2,
        generator=seeded(),
    )
    torch.testing.assert_close(from_embeddings, from_text, atol=1e-4, rtol=1e-4)


def test_latents_out_decode_to_the_picture(pipe):
    latents = draw(pipe, PROMPT, generator=seeded(), output_type="latent")
    decoded = pipe.vae.decode(unpack(latents, 32, 48)) / 2 + 0.5
    torch.testing.assert_close(decoded.clamp(0, 1), draw(pipe, PROMPT, generator=seeded()))


def test_the_size_left_out_is_that_of_the_checkpoint(pipe):
    (picture,) = pipe(PROMPT, num_inference_steps=1, progress=False).images
    assert picture.size == (32, 32)
    assert picture.mode == "RGB"


def test_height_and_width_are_not_mixed_up(pipe):
    (picture,) = draw(pipe, PROMPT, height=48, width=80, output_type="pil")
    assert (picture.height, picture.width) == (48, 80)


def test_gradients_are_not_kept(pipe):
    assert not draw(pipe, PROMPT).requires_grad
    with torch.inference_mode():
        assert torch.equal(
            draw(pipe, PROMPT, generator=seeded()).clone(), draw(pipe, PROMPT, generator=seeded())
        )


def test_callback_sees_each_step_and_may_change_the_latents(pipe):
    seen = []

    def callback(pipeline, step, timestep, tensors):
        assert pipeline is pipe
        assert tensors["prompt_embeds"].shape == (1, T5_LENGTH, 32)
        seen.append((step, float(timestep)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    latents = draw(
        pipe,
        PROMPT,
        num_inference_steps=3,
        output_type="latent",
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    )
    assert not latents.any()
    assert [step for step, _ in seen] == [0, 1, 2]
    assert seen[0][1] == 1000
    assert seen[0][1] > seen[1][1] > seen[2][1] > 0


def test_callback_may_change_the_prompt(both):
    def callback(pipeline, step, timestep, tensors):
        return {"prompt_embeds": -tensors["prompt_embeds"]}

    changed = draw_in_both(
        both,
        prompt=PROMPT,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
    )
    assert_same_pictures(*changed)


def test_callback_may_return_nothing(pipe):
    watched = draw(pipe, PROMPT, generator=seeded(), callback_on_step_end=lambda *_: None)
    assert torch.equal(watched, draw(pipe, PROMPT, generator=seeded()))


def test_interrupt_ends_a_call_and_not_the_next_one(pipe):
    steps = []

    def callback(pipeline, step, timestep, tensors):
        steps.append(step)
        pipeline.interrupt = step == 1
        return {}

    draw(pipe, PROMPT, num_inference_steps=5, callback_on_step_end=callback)
    assert steps == [0, 1]
    steps.clear()
    draw(pipe, PROMPT, num_inference_steps=5, callback_on_step_end=lambda *_: steps.append(0))
    assert len(steps) == 5


def test_progress_bar_counts_the_steps(pipe, capfd):
    draw(pipe, PROMPT, progress=True)
    assert "2/2" in capfd.readouterr().err
    draw(pipe, PROMPT)
    assert capfd.readouterr().err == ""


def test_values_that_are_not_finite_are_said_aloud(pipe):
    with pytest.warns(UserWarning, match="not finite"):
        (picture,) = draw(
            pipe, PROMPT, latents=torch.full((1, 6, 64), torch.nan), output_type="pil"
        )
    assert not np.asarray(picture).any()


TXT, VEC = torch.zeros(1, 8, 32), torch.zeros(1, 24)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": None}, "prompt must be given where prompt_embeds is not, got neither"),
        ({"prompt": []}, r"prompt must be a list of at least one text, got \[\]"),
        ({"prompt": 3}, "prompt must be a list of at least one text, got 3"),
        ({"prompt": ["a", None]}, "prompt must be text, got NoneType"),
        ({"prompt_2": ["a", "b"]}, "prompt_2 must be 1 or 1 texts, got 2"),
        ({"prompt": "\udcff"}, "prompt: not valid Unicode"),
        ({"height": 100}, "height must be a multiple of 16 from 16 to 8192, got 100"),
        ({"width": 0}, "width must be a multiple of 16 from 16 to 8192, got 0"),
        ({"width": -16}, "got -16"),
        ({"height": 8208}, "got 8208"),
        ({"height": 32.0}, "got 32.0"),
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number from 1 to 1000"),
        ({"num_inference_steps": -3}, "got -3"),
        ({"num_inference_steps": 10**9}, "got 1000000000"),
        (
            {"num_images_per_prompt": 0},
            "num_images_per_prompt must be a whole number from 1 to 1000",
        ),
        ({"max_sequence_length": 513}, "max_sequence_length must be .* from 1 to 512, got 513"),
        ({"max_sequence_length": 0}, "max_sequence_length must be .* from 1 to 512, got 0"),
        ({"output_type": "jpg"}, "output_type must be of pil, np, pt, latent, got 'jpg'"),
        (
            {"callback_on_step_end_tensor_inputs": ["vae"]},
            "callback_on_step_end_tensor_inputs must be of latents, prompt_embeds, got 'vae'",
        ),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number, got nan"),
        ({"true_cfg_scale": float("inf")}, "true_cfg_scale must be a finite number, got inf"),
        ({"generator": [seeded(), seeded()]}, "generator: 2 given for 1 pictures"),
        ({"latents": torch.zeros(1, 6, 16)}, r"latents must be \[1, 6, 64\], got \[1, 6, 16\]"),
        ({"latents": np.zeros((1, 6, 64))}, "latents must be a torch.Tensor, got ndarray"),
        ({"prompt_embeds": TXT}, "prompt_embeds and pooled_prompt_embeds must be given together"),
        (
            {"prompt": None, "prompt_embeds": TXT.numpy(), "pooled_prompt_embeds": VEC},
            "^prompt_embeds must be a torch.Tensor, got ndarray",
        ),
        (
            {"prompt_embeds": TXT, "pooled_prompt_embeds": VEC},
            "prompt must not be given with prompt_embeds, got both",
        ),
        (
            {"prompt": None, "prompt_embeds": TXT[..., :5], "pooled_prompt_embeds": VEC},
            r"prompt_embeds must be \[1, 8, 32\], got \[1, 8, 5\]",
        ),
        (
            {"prompt": None, "prompt_embeds": TXT, "pooled_prompt_embeds": VEC.expand(2, -1)},
            r"pooled_prompt_embeds must be \[1, 24\], got \[2, 24\]",
        ),
        (
            {"negative_prompt": ["a", "b"], "true_cfg_scale": 2.0},
            "negative_prompt must be 1 or 1 texts, got 2",
        ),
        (
            {
                "negative_prompt_embeds": TXT.expand(3, -1, -1),
                "negative_pooled_prompt_embeds": VEC.expand(3, -1),
                "true_cfg_scale": 2.0,
            },
            r"negative_prompt_embeds must be \[1, 8, 32\], got \[3, 8, 32\]",
        ),
    ],
)
def test_bad_arguments_are_refused_in_one_line(pipe, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        pipe(**({"prompt": PROMPT} | QUICK | options))
    assert "\n" not in str(caught.value)


@pytest.fixture
def broken(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "broken")
    return tmp_path / "broken"


def change_config(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", ["FluxFillPipeline", "FluxKontextPipeline", "FluxControlPipeline"])
def test_a_variant_without_a_pipeline_is_refused_by_name(broken, name):
    change_config(broken / "model_index.json", _class_name=name)
    with pytest.raises(ValueError, match=f"{name}.* has no pipeline in fluxkern yet"):
        FluxPipeline.from_pretrained(broken)


def test_a_fill_transformer_in_the_folder_is_refused_by_name(broken):
    from diffusers import FluxTransformer2DModel

    config = FluxTransformer2DModel.load_config(broken / "transformer")
    config |= {"in_channels": 384, "out_channels": 64}
    shutil.rmtree(broken / "transformer")
    FluxTransformer2DModel.from_config(config).save_pretrained(broken / "transformer")
    with pytest.raises(ValueError, match="FLUX.1 Fill has no pipeline in fluxkern yet"):
        FluxPipeline.from_pretrained(broken)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("scheduler/scheduler_config.json", {"use_karras_sigmas": True}, "use_karras_sigmas"),
        ("vae/config.json", {"sample_size": 100}, "sample_size must be a multiple of 16"),
        ("model_index.json", {"_class_name": ["x"]}, "model_index.json"),
    ],
)
def test_a_folder_with_other_settings_is_refused(broken, part, change, message):
    change_config(broken / part, **change)
    with pytest.raises(ValueError, match=message):
        FluxPipeline.from_pretrained(broken)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="model_index.json"):
        FluxPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="neither a file or folder here nor an id"):
        FluxPipeline.from_pretrained(tmp_path / "absent")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vec_in_dim": 25}, "CLIP's width must be 25, got 24"),
        ({"context_in_dim": 33}, "T5's width must be 33, got 32"),
        ({"in_channels": 32, "out_channels": 32}, "in_channels must be 64, got 32"),
    ],
)
def test_parts_that_do_not_fit_are_refused(pipe, change, message):
    with torch.device("meta"):
        transformer = Flux(replace(pipe.transformer.config, **change))
    with pytest.raises(ValueError, match=message):
        FluxPipeline(transformer, pipe.vae, pipe.text_encoder, pipe.schedule)


def test_a_default_size_that_cannot_be_drawn_is_refused(pipe):
    with pytest.raises(ValueError, match="default_size must be a multiple of 16.* got 65"):
        FluxPipeline(pipe.transformer, pipe.vae, pipe.text_encoder, pipe.schedule, 65)


def test_saving_does_not_touch_a_folder_in_use(pipe, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="folder must be new or empty"):
        pipe.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_full_disk_leaves_nothing_behind(pipe, tmp_path, monkeypatch):
    def full(folder):
        (folder / "tokenizer").mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pipe.text_encoder, "save", full)
    with pytest.raises(OSError, match="No space left"):
        pipe.save_pretrained(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_loading_says_nothing(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FluxPipeline.from_pretrained(folder, dtype=torch.float32, device="cpu")


# memory of a GPU


def test_half_precision_is_what_a_gpu_is_given():
    assert default_dtype("cuda:1") == torch.bfloat16
    assert default_dtype("cpu") == torch.float32


@pytest.fixture
def room(folder, monkeypatch):
    """A pipeline on a device of this much free memory, and where T5 went."""

    def of(free: int) -> tuple[FluxPipeline, list[str]]:
        pipe, went = FluxPipeline.from_pretrained(folder), []
        monkeypatch.setattr(memory, "free_memory", lambda device: free)
        monkeypatch.setattr(pipe.text_encoder.t5, "to", lambda device: went.append(str(device)))
        return pipe, went

    return of


def test_t5_leaves_where_a_picture_has_no_room_beside_it_and_comes_back_when_it_has(
    room, monkeypatch
):
    pipe, went = room(10**8)
    expected = draw(pipe, PROMPT, generator=seeded())
    assert went == ["cpu"] and pipe._t5_home is not None
    assert torch.equal(draw(pipe, PROMPT, generator=seeded()), expected)  # still no room
    monkeypatch.setattr(memory, "free_memory", lambda device: 10**12)
    draw(pipe, PROMPT)
    assert went[-1] == str(pipe.device) and pipe._t5_home is None


def test_t5_stays_where_there_is_room(room):
    pipe, went = room(10**12)
    draw(pipe, PROMPT)
    assert went == []


def test_embeddings_bring_no_t5_back(room):
    pipe, went = room(0)
    txt, vec = pipe.text_encoder.encode([PROMPT])
    draw(pipe, prompt_embeds=txt, pooled_prompt_embeds=vec)
    assert went == ["cpu"]


@pytest.mark.parametrize("batch, passes", [(1, 1), (4, 1), (1, 2)])
def test_memory_grows_with_pictures_passes_and_pixels(batch: int, passes: int):
    config = CONFIGS["dev"]
    one = memory.step_bytes(config, 4096 + 512, 1, 2)
    assert memory.step_bytes(config, 4096 + 512, batch * passes, 2) == batch * passes * one
    assert memory.decode_bytes(2048, 1024, batch, 2) == 2 * batch * memory.decode_bytes(
        1024, 1024, 1, 2
    )


def test_the_documented_memory_of_flux_is_what_is_derived():
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Flux(CONFIGS["dev"]).parameters())
    text = (Path(__file__).parents[1] / "docs/on-a-gpu.md").read_text()
    assert f"| transformer | {2 * parameters / 1e9:.1f} |" in text
    for side in (1024, 2048):
        step = memory.step_bytes(CONFIGS["dev"], (side // 16) ** 2 + 512, 1, 2) / 1e9
        decoding = memory.decode_bytes(side, side, 1, 2) / 1e9
        assert f"| {side} px | {step:.1f} | {decoding:.1f} |" in text


@pytest.mark.skipif(os.geteuid() != 0, reason="gives folders to another user")
@pytest.mark.parametrize("name", ["transformer", "vae", "tokenizer_2", "scheduler"])
def test_a_component_that_is_a_link_to_another_users_folder_is_refused(folder, tmp_path, name):
    model, theirs = tmp_path / "model", tmp_path / "theirs"
    shutil.copytree(folder, model)
    (model / name).rename(theirs)
    (model / name).symlink_to("../theirs")
    FluxPipeline.from_pretrained(model)
    os.chown(theirs, 54321, -1)
    with pytest.raises(ValueError, match=f"{name}: leads out of its folder, to a folder of anoth"):
        FluxPipeline.from_pretrained(model)
    os.chown(model / name, 54321, -1, follow_symlinks=False)  # the link is theirs as well
    FluxPipeline.from_pretrained(model)

"""Noise, packing, ids, schedule and Euler steps, against diffusers where it has the same thing."""

import json
import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from diffusers.utils.torch_utils import randn_tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxkern.model.sampling import (
    Conditioning,
    ScheduleConfig,
    combine_cfg,
    denoise,
    euler_step,
    get_img_ids,
    get_noise,
    get_schedule,
    get_txt_ids,
    model_time,
    pack,
    shift_mu,
    time_shift,
    unpack,
)

DEV = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.30.0.dev0",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
SCHNELL = DEV | {"shift": 1.0, "use_dynamic_shifting": False}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def saved_config(scheduler, folder) -> dict:
    scheduler.save_config(folder)
    return json.loads((folder / "scheduler_config.json").read_text())


def diffusers_scheduler(config: dict, num_steps: int, tokens: int):
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    even = [1 - step / num_steps for step in range(num_steps)]
    keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    mu = calculate_shift(tokens, *(config[key] for key in keys))
    retrieve_timesteps(scheduler, num_steps, "cpu", sigmas=even, mu=mu)
    return scheduler


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 5), st.integers(1, 7), st.integers(1, 7), st.integers(0, 99)
)
def test_unpack_undoes_pack(batch, channels, rows, columns, seed):
    latent = torch.randn(batch, channels, 2 * rows, 2 * columns, generator=seeded(seed))
    img = pack(latent)
    assert img.shape == (batch, rows * columns, 4 * channels)
    assert torch.equal(unpack(img, 16 * rows, 16 * columns), latent)


def test_pack_puts_channels_outermost_and_rows_before_columns():
    latent = torch.arange(2 * 2 * 4).reshape(1, 2, 2, 4)
    assert pack(latent).tolist() == [[[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]]]


def test_pack_agrees_with_diffusers_on_strided_input():
    latent = torch.randn(2, 6, 10, 16, generator=seeded(0)).transpose(2, 3)[:, :, :12]
    expected = FluxPipeline._pack_latents(latent.contiguous(), 2, 6, 12, 10)
    assert torch.equal(pack(latent), expected)
    assert torch.equal(unpack(expected, 96, 80), FluxPipeline._unpack_latents(expected, 96, 80, 8))


def test_pack_refuses_an_odd_side():
    with pytest.raises(ValueError, match="latent height and width must be even, got 3 and 4"):
        pack(torch.zeros(1, 16, 3, 4))


def test_unpack_refuses_tokens_of_another_size():
    with pytest.raises(ValueError, match="img: 6 tokens, but 32x32 pixels have 4"):
        unpack(torch.zeros(1, 6, 64), 32, 32)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (48, 80), (1024, 16)])
def test_img_ids_agree_with_diffusers(height, width):
    ids = get_img_ids(height, width)
    rows, columns = height // 16, width // 16
    expected = FluxPipeline._prepare_latent_image_ids(1, rows, columns, "cpu", torch.float32)
    assert ids.dtype == torch.float32
    assert torch.equal(ids, expected)


def test_txt_ids_are_zero():
    assert torch.equal(get_txt_ids(5), torch.zeros(5, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_noise_is_that_of_diffusers(dtype):
    shape = (3, 16, 6, 10)
    expected = randn_tensor(shape, generator=seeded(7), device=torch.device("cpu"), dtype=dtype)
    assert torch.equal(get_noise(3, 48, 80, dtype, seeded(7)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_of_a_list_of_generators_equals_singles_to_the_bit(dtype):
    together = get_noise(3, 48, 80, dtype, [seeded(seed) for seed in range(3)])
    singles = [get_noise(1, 48, 80, dtype, seeded(seed)) for seed in range(3)]
    assert torch.equal(together, torch.cat(singles))


@pytest.mark.parametrize(("height", "width"), [(16, 16), (48, 80), (128, 128)])
def test_noise_of_a_batch_equals_singles_drawn_in_turn(height, width):
    generator = seeded(5)
    singles = [get_noise(1, height, width, torch.float32, generator) for _ in range(3)]
    assert torch.equal(get_noise(3, height, width, torch.float32, seeded(5)), torch.cat(singles))


def test_noise_rounds_a_size_up_to_whole_tokens():
    assert get_noise(2, 17, 33, torch.float32, seeded(0)).shape == (2, 16, 4, 6)


def test_noise_wants_a_generator_for_each_picture():
    with pytest.raises(ValueError, match="generator: 2 given for 3 pictures"):
        get_noise(3, 16, 16, torch.float32, [seeded(0), seeded(1)])


@pytest.mark.parametrize("config", [DEV, SCHNELL, SCHNELL | {"shift": 3.0}])
@pytest.mark.parametrize("num_steps", [1, 2, 4, 28, 50])
@pytest.mark.parametrize("tokens", [1, 64, 256, 1024, 4096, 16384])
def test_schedule_equals_that_of_diffusers(config, num_steps, tokens):
    expected = diffusers_scheduler(config, num_steps, tokens).sigmas
    sigmas = get_schedule(num_steps, tokens, ScheduleConfig.from_diffusers(config))
    assert sigmas.dtype == torch.float32
    torch.testing.assert_close(sigmas, expected, rtol=2e-7, atol=0)


def test_schedule_without_shift_is_even():
    even = ScheduleConfig(use_dynamic_shifting=False, shift=1.0)
    assert get_schedule(4, 64, even).tolist() == [1, 0.75, 0.5, 0.25, 0]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 200), st.integers(1, 70000), st.floats(0.1, 10))
def test_schedule_falls_from_one_to_zero(num_steps, tokens, shift):
    for config in (ScheduleConfig(), ScheduleConfig(use_dynamic_shifting=False, shift=shift)):
        sigmas = get_schedule(num_steps, tokens, config)
        assert len(sigmas) == num_steps + 1
        assert sigmas[0] == pytest.approx(1, abs=1e-6)
        assert sigmas[-1] == 0
        assert (sigmas.diff() <= 0).all()
        if tokens <= 16384:  # at more, the shift brings levels together to the last bit of fp32
            assert (sigmas.diff() < 0).all()


def test_schedule_refuses_no_steps():
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        get_schedule(0, 64)


def test_mu_goes_through_the_two_points_of_the_config():
    assert shift_mu(256) == pytest.approx(0.5)
    assert shift_mu(4096) == pytest.approx(1.15)
    assert shift_mu(1024) == pytest.approx(0.63)


def test_time_shift_agrees_with_a_hand_computed_value_and_leaves_one_alone():
    # e^mu = 3: 3 / (3 + 1/0.5 - 1) = 0.75
    shifted = time_shift(math.log(3), torch.tensor([0.5, 1.0]))
    torch.testing.assert_close(shifted, torch.tensor([0.75, 1.0]))


def test_schedule_config_survives_the_way_through_diffusers(tmp_path):
    for config in (DEV, SCHNELL):
        schedule = ScheduleConfig.from_diffusers(config)
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(schedule.to_diffusers())
        assert ScheduleConfig.from_diffusers(saved_config(scheduler, tmp_path)) == schedule


def test_schedule_config_reads_what_is_left_out_as_diffusers_does(tmp_path):
    scheduler = FlowMatchEulerDiscreteScheduler.from_config({"shift": 2.0})
    assert ScheduleConfig.from_diffusers({"shift": 2.0}) == ScheduleConfig.from_diffusers(
        saved_config(scheduler, tmp_path)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "DDIMScheduler"}, "got 'DDIMScheduler'"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas must be off, got 'True'"),
        ({"time_shift_type": "linear"}, "must be 'exponential', got 'linear'"),
        ({"num_train_timesteps": 50}, "num_train_timesteps must be 1000, got 50"),
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"shift": "3"}, "shift must be a number between -100 and 100, got '3'"),
        ({"shift": 0}, "shift must be above 0, got 0"),
        ({"max_shift": float("nan")}, "max_shift must be a number"),
        ({"base_image_seq_len": 0}, "base_image_seq_len must be a positive integer, got 0"),
        ({"base_image_seq_len": 4096}, "both are 4096"),
        ({"use_dynamic_shifting": "yes"}, "must be true or false, got 'yes'"),
    ],
)
def test_schedule_config_refuses_what_it_does_not_mean(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        ScheduleConfig.from_diffusers(DEV | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_and_model_times_are_those_of_diffusers_to_the_bit(dtype):
    scheduler = diffusers_scheduler(DEV, 5, 64)
    img = expected = torch.randn(2, 4, 8, generator=seeded(1)).to(dtype)
    for index, t in enumerate(scheduler.timesteps):
        sigma, sigma_next = scheduler.sigmas[index : index + 2]
        assert torch.equal(model_time(sigma, img), t.expand(2).to(dtype) / 1000)
        velocity = torch.randn(2, 4, 8, generator=seeded(index)).to(dtype)
        expected = scheduler.step(velocity, t, expected, return_dict=False)[0]
        img = euler_step(img, velocity, sigma, sigma_next)
        assert img.dtype == dtype
        assert torch.equal(img, expected)


def test_guidance_at_scale_one_is_the_prompt_and_at_zero_the_negative_prompt():
    cond, uncond = torch.randn(2, 3, 4, 5, generator=seeded(2))
    torch.testing.assert_close(combine_cfg(cond, uncond, 1.0), cond)
    assert torch.equal(combine_cfg(cond, uncond, 0.0), uncond)


class StraightFlow(torch.nn.Module):
    """A field whose exact flow is known: it points from the picture `vec` to the noise."""

    def __init__(self, noise):
        super().__init__()
        self.noise = noise
        self.calls, self.prepared = [], []

    def workspaces(self, img_ids, txt_ids, timesteps, y, guidance):
        self.prepared.append(y)
        return list(timesteps)

    def modulation_to(self, device):
        pass

    def forward(self, img, img_ids, txt, txt_ids, timesteps, y, guidance, workspace):
        assert torch.equal(workspace, timesteps)
        assert len(img) == len(txt) == len(timesteps) == len(y)
        self.calls.append((timesteps, guidance))
        return self.noise.repeat(len(y) // 2, 1, 1) - y[:, None, :]


def straight_flow(**options):
    noise = torch.randn(2, 4, 8, generator=seeded(0))
    model = StraightFlow(noise)
    cond = Conditioning(torch.zeros(2, 3, 8), torch.randn(2, 8, generator=seeded(1)))
    img = denoise(model, noise, get_img_ids(32, 32), cond, get_schedule(7, 4), **options)
    return img, cond, model


def test_denoise_follows_a_straight_flow_to_its_end():
    img, cond, model = straight_flow()
    torch.testing.assert_close(img, cond.vec[:, None].expand(2, 4, 8), atol=1e-5, rtol=1e-5)
    assert len(model.calls) == 7
    assert all(guidance is None for _, guidance in model.calls)


def test_denoise_gives_each_picture_the_time_and_the_guidance():
    _, _, model = straight_flow(guidance_scale=3.5)
    times = torch.stack([t for t, _ in model.calls])
    assert times.shape == (7, 2)
    torch.testing.assert_close(times[:, 0], get_schedule(7, 4)[:-1])
    assert all(torch.equal(guidance, torch.full((2,), 3.5)) for _, guidance in model.calls)


def test_denoise_in_two_passes_extrapolates_from_the_negative_prompt():
    uncond = Conditioning(torch.zeros(2, 5, 8), torch.randn(2, 8, generator=seeded(3)))
    img, cond, model = straight_flow(uncond=uncond, true_cfg_scale=2.0)
    end = (2 * cond.vec - uncond.vec)[:, None].expand(2, 4, 8)
    torch.testing.assert_close(img, end, atol=1e-5, rtol=1e-5)
    assert len(model.calls) == 14


def test_denoise_takes_prompts_of_one_length_together():
    uncond = Conditioning(torch.zeros(2, 3, 8), torch.randn(2, 8, generator=seeded(3)))
    img, cond, model = straight_flow(uncond=uncond, true_cfg_scale=2.0, guidance_scale=3.5)
    end = (2 * cond.vec - uncond.vec)[:, None].expand(2, 4, 8)
    torch.testing.assert_close(img, end, atol=1e-5, rtol=1e-5)
    assert len(model.calls) == 7
    assert all(torch.equal(guidance, torch.full((4,), 3.5)) for _, guidance in model.calls)


def test_denoise_prepares_all_steps_before_the_first_and_again_for_another_prompt():
    other = Conditioning(torch.zeros(2, 3, 8), torch.randn(2, 8, generator=seeded(4)))

    def on_step(step):
        if step.index == 3:
            step.cond = other

    _, cond, model = straight_flow(on_step=on_step)
    assert [id(y) for y in model.prepared] == [id(cond.vec), id(other.vec)]
    assert len(model.calls) == 7


class Diary(torch.nn.Module):
    """What is asked of a model, in order."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def modulation_to(self, device):
        self.lines.append(f"modulation to {device}")

    def workspaces(self, img_ids, txt_ids, timesteps, y, guidance):
        self.lines.append("prepare")
        return [None] * len(timesteps)

    def forward(self, img, *rest):
        self.lines.append("step")
        return img


def test_denoise_releases_the_modulation_between_its_use_and_the_first_step():
    model, noise = Diary(), torch.zeros(1, 4, 8, device="meta")  # of an accelerator, as it were
    cond = Conditioning(torch.zeros(1, 3, 8, device="meta"), torch.zeros(1, 8, device="meta"))
    ids = get_img_ids(32, 32, "meta")
    for release in (True, False):
        denoise(model, noise, ids, cond, get_schedule(2, 4), release_modulation=release)
    released = ["modulation to meta", "prepare", "modulation to cpu", "step", "step"]
    assert model.lines == released + ["modulation to meta", "prepare", "step", "step"]


def test_denoise_stops_and_takes_changes_when_told():
    seen = []

    def on_step(step):
        seen.append((step.index, step.timestep.item()))
        step.img = torch.full_like(step.img, 9.0)
        step.stop = step.index == 2

    img, _, model = straight_flow(on_step=on_step)
    assert torch.equal(img, torch.full((2, 4, 8), 9.0))
    assert seen == list(enumerate((1000 * get_schedule(7, 4)[:3]).tolist()))
    assert len(model.calls) == 3

"""`sampling_steps` and `GaussianDDPMPipeline.sample_steps`: every step, the same bits as a call."""

from itertools import pairwise

import pytest
import torch
from checkpoints import tiny_pipeline, tiny_scheduler, tiny_unet
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler
from torch.testing import assert_close

from ddpm_hf.diffusion.sampling_loop import sampling_steps


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def scheduler_with(num_steps, kind=None, **config):
    scheduler = tiny_scheduler(**config)
    scheduler = scheduler if kind is None else kind.from_config(scheduler.config)
    scheduler.set_timesteps(num_steps)
    return scheduler


@pytest.fixture
def pipeline():
    return tiny_pipeline()


@pytest.mark.slow
@pytest.mark.parametrize(
    "call",
    [
        {},
        {"num_inference_steps": 5, "eta": 0.0},
        {"class_labels": [0, 2], "guidance_scale": 2.0, "guidance_interval": (-3, 4)},
        {"class_labels": 1, "guidance_scale": 2.0, "guide": tiny_unet(seed=7)},
    ],
    ids=["defaults", "DDIM", "classifier-free", "autoguidance"],
)
def test_the_last_step_has_the_bits_of_a_call(call):
    pipeline = tiny_pipeline(tiny_unet(num_class_embeds=4 if "class_labels" in call else None))
    expected = pipeline(2, seeded(), output_type="latent", **call).images
    *_, last = pipeline.sample_steps(2, seeded(), **call)
    assert torch.equal(last.prev_sample, expected)
    images = pipeline(2, seeded(), output_type="np", **call).images
    assert (pipeline.decode_images(last.prev_sample, "np") == images).all()


def test_each_step_starts_from_the_result_of_the_previous_one(pipeline):
    steps = list(pipeline.sample_steps(2, seeded(), num_inference_steps=5))
    assert [step.index for step in steps] == [0, 1, 2, 3, 4]
    assert [step.timestep.item() for step in steps] == pipeline.scheduler.timesteps.tolist()
    assert [step.is_last for step in steps] == [False] * 4 + [True]
    for before, after in pairwise(steps):
        assert after.sample is before.prev_sample
    for step in steps:
        with torch.no_grad():
            output = pipeline.unet(step.sample, step.timestep).sample
        assert_close(step.model_output, output, rtol=0, atol=1e-6)
    # The mean of the last step is the estimate itself (eq. 7 with alpha_bar_prev = 1).
    assert_close(steps[-1].pred_original_sample, steps[-1].prev_sample, rtol=0, atol=1e-6)


def test_any_shape_and_any_callable_can_be_sampled():
    """The exact denoiser of the number 1 in every place: eps = (x_t - sqrt(alpha_bar)) / ..."""
    scheduler = scheduler_with(20, clip_sample=False)
    alpha_bar = scheduler.alphas_cumprod.double()

    def denoiser(x_t, t):
        assert t.shape == (3,)
        a = alpha_bar[t][:, None]
        return ((x_t - a.sqrt()) / (1 - a).sqrt()).to(x_t.dtype)

    *_, last = sampling_steps(denoiser, scheduler, torch.randn(3, 5), generator=seeded())
    assert_close(last.prev_sample, torch.ones(3, 5), rtol=0, atol=1e-4)  # float32 over 20 steps


def test_a_sequence_of_denoisers_has_one_per_step():
    calls = []

    def denoiser(name):
        return lambda x_t, t: calls.append((name, t[0].item())) or torch.zeros_like(x_t)

    list(sampling_steps([denoiser("a"), denoiser("b")], scheduler_with(2), torch.randn(1, 4)))
    assert calls == [("a", 19), ("b", 9)]


def test_an_assigned_prev_sample_is_the_next_x_t(pipeline):
    for step in pipeline.sample_steps(1, seeded(), num_inference_steps=3):
        if step.index == 1:
            assert step.sample.abs().max() == 0.5
        if step.index == 0:
            step.prev_sample = torch.full_like(step.prev_sample, 0.5)
    assert step.index == 2


def test_is_last_ends_sampling(pipeline):
    visited = []
    for step in pipeline.sample_steps(1, seeded(), num_inference_steps=10):
        visited.append(step.index)
        step.is_last = step.index == 3
    assert visited == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler])
def test_every_scheduler_of_diffusers_gives_an_estimate_of_x_0(pipeline, kind):
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    *_, step = pipeline.sample_steps(1, seeded(), num_inference_steps=8)
    assert step.pred_original_sample.shape == step.sample.shape


def test_the_network_is_in_eval_mode_until_the_iterator_ends_or_is_closed(pipeline):
    pipeline.unet.train()
    for _ in pipeline.sample_steps(num_inference_steps=2):
        assert not pipeline.unet.training
    assert pipeline.unet.training
    steps = pipeline.sample_steps(num_inference_steps=2)
    next(steps)
    assert not pipeline.unet.training
    steps.close()
    assert pipeline.unet.training


def test_only_the_network_runs_without_gradients(pipeline):
    weight = torch.ones((), requires_grad=True)
    for step in pipeline.sample_steps(num_inference_steps=2):
        assert not step.prev_sample.requires_grad
        assert (step.prev_sample * weight).requires_grad


def test_bad_arguments_are_refused_before_the_first_step(pipeline):
    with pytest.raises(ValueError, match=r"num_inference_steps.*21"):
        pipeline.sample_steps(num_inference_steps=21)
    with pytest.raises(ValueError, match=r"`latents` must be a tensor of shape .*, got .*9, 9"):
        pipeline.sample_steps(latents=torch.zeros(1, 1, 9, 9))


@pytest.mark.parametrize(
    ("method", "images"),
    [
        ("sample_steps", {}),
        ("inpaint", {"image": None, "mask_image": None}),
        ("image_to_image", {"image": None}),
        ("invert", {"image": None}),
        ("interpolate", {"a": None, "b": None}),
        ("combine", {"images": [], "weights": []}),
    ],
)
def test_an_unknown_argument_is_refused_at_once_under_the_name_of_the_method(
    pipeline, method, images
):
    pipeline.scheduler.set_timesteps(7)
    with pytest.raises(TypeError, match=rf"^{method}\(\) got an unexpected .* argument 'steps'$"):
        getattr(pipeline, method)(**images, steps=3)
    assert len(pipeline.scheduler.timesteps) == 7


def test_a_non_finite_value_is_reported_after_the_last_step_with_its_step(pipeline):
    visited = []
    with pytest.raises(ValueError, match=r"step 1 of 3 \(timestep"):  # noqa: PT012
        for step in pipeline.sample_steps(num_inference_steps=3):
            visited.append(step.index)
            if step.index == 0:
                pipeline.unet.conv_out.bias.data.fill_(float("nan"))
    assert visited == [0, 1, 2]

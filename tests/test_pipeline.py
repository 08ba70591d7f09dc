"""GaussianDDPMPipeline: samples, callbacks, image formats, classes, guidance and errors."""

import copy
import re
from functools import partial

import numpy as np
import pytest
import torch
from checkpoints import (
    SHORT_CHAIN,
    TWO_LEVELS,
    image_facts_of,
    quiet,
    tiny_pipeline,
    tiny_scheduler,
    tiny_unet,
)
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepInverseScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    RePaintScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback, SDCFGCutoffCallback
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch.testing import assert_close

from ddpm_hf.diffusion.conditioning import class_numbers
from ddpm_hf.diffusion.image_format import ImageFacts, image_facts
from ddpm_hf.diffusion.pipeline import GaussianDDPMPipeline
from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler
from ddpm_hf.diffusion.timestep_spacings import usual_num_steps

SCHEDULERS = (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)


def seeded(*seeds):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generators if len(generators) > 1 else generators[0]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed))


def ends_at(x_0):
    """Arguments with a callback that replaces the last x_t, so that the result is known."""
    return {"timesteps": [0], "callback_on_step_end": lambda *_: {"latents": x_0}}


def reverse_chain(unet, scheduler, x_t, generator, denoise):
    """Algorithm 2 of 2006.11239; `denoise` takes the input of the network and t."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(scheduler.config.num_train_timesteps)
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = denoise(x_t, t).float()
            x_t = scheduler.step(output, t, x_t, generator=generator).prev_sample
    return x_t


class GaussianData(UNet2DModel):
    """Exact network for normal pixels with mean 0 and standard deviation 0.5."""

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        alpha_bar = (1 - np.linspace(1e-4, 0.02, 1000)).cumprod()
        log_sigma = np.log((1 - alpha_bar) / alpha_bar) / 2
        # Some samplers have fractional timesteps, defined by this interpolation.
        sigma_squared = np.exp(2 * np.interp(float(timestep[0]), np.arange(1000), log_sigma))
        a = 1 / (1 + sigma_squared)  # alpha_bar
        return UNet2DOutput(sample=sample * float(np.sqrt(1 - a) / (a * 0.25 + 1 - a)))


class Zeros(UNet2DModel):
    """Exact network for images of zeros and any schedule."""

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        log_snr = np.log(self.alpha_bar) - np.log1p(-self.alpha_bar)
        # Some samplers have fractional timesteps, defined by this interpolation.
        at_t = np.interp(float(timestep[0]), np.arange(len(self.alpha_bar)), log_snr)
        return UNet2DOutput(sample=sample * float(np.sqrt(1 + np.exp(at_t))))


@pytest.fixture(scope="module")
def pipeline():
    """Pipeline shared by tests that do not change it."""
    return tiny_pipeline()


# ----------------------------------------------------------------------------------------------
# Sampling


def test_a_stock_scheduler_is_converted_with_all_values():
    scheduler = DDPMScheduler(50, 0.001, 0.5, "scaled_linear", clip_sample=False)
    upgraded = GaussianDDPMPipeline(tiny_unet(), scheduler).scheduler
    assert type(upgraded).__name__ == "GaussianDDPMScheduler"
    for key, value in scheduler.config.items():
        assert key.startswith("_") or upgraded.config[key] == value, key


@pytest.mark.slow
def test_samples_are_close_to_those_of_the_stock_pipeline_with_the_same_generator():
    unet, scheduler = tiny_unet(), DDPMScheduler(**SHORT_CHAIN)
    stock = quiet(DDPMPipeline(unet=unet, scheduler=scheduler))
    ours = tiny_pipeline(unet, scheduler)
    call = {"batch_size": 3, "num_inference_steps": 20, "output_type": "np"}
    want = stock(**call, generator=seeded(7)).images
    # 1e-4: stock's tables are float32 and lose up to 5e-4 relative at small t.
    assert_close(ours(**call, generator=seeded(7)).images, want, rtol=0, atol=1e-4)


def test_the_default_number_of_steps_is_that_of_the_training_timesteps():
    visited = []
    pipeline = tiny_pipeline(scheduler=tiny_scheduler(num_train_timesteps=7))
    pipeline(callback_on_step_end=lambda p, i, t, _: visited.append((i, int(t))))
    assert visited == [(i, 6 - i) for i in range(7)]


@pytest.mark.slow
def test_a_sample_does_not_depend_on_its_batch(pipeline):
    batch = pipeline(3, [*seeded(1, 2, 3)], output_type="pt").images
    alone = pipeline(1, seeded(3), output_type="pt").images
    # 1e-5: another batch size may change the order of sums in convolutions.
    assert_close(batch[2:], alone, rtol=0, atol=1e-5)
    assert (batch[0] - batch[1]).abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("kind", [EulerAncestralDiscreteScheduler, DDIMScheduler])
def test_schedulers_of_diffusers_accept_a_list_of_generators(kind):
    pipeline = tiny_pipeline()
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    options = {"num_inference_steps": 5, "output_type": "pt"}
    options |= {"eta": 1.0} if kind is DDIMScheduler else {}
    batch = pipeline(2, [*seeded(1, 2)], **options).images
    assert_close(batch[1:], pipeline(1, seeded(2), **options).images, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SCHEDULERS, ids=lambda kind: kind.__name__)
def test_every_scheduler_of_diffusers_samples_the_data_with_the_exact_network(kind):
    scheduler = kind.from_config(GaussianDDPMScheduler(clip_sample=False).config)
    pipeline = tiny_pipeline(GaussianData(**tiny_unet().config), scheduler)
    x_0 = pipeline(
        batch_size=64, generator=seeded(0), num_inference_steps=100, output_type="latent"
    ).images
    # 4096 values: the standard error of the deviation is 0.0055, and 100 steps of DDPM give 0.468
    # in theory. Without scale_model_input or init_noise_sigma, Euler's is 0.42 or over 1.
    assert abs(x_0.std().item() - 0.49) < 0.035


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_every_dtype_supports_every_output_type(dtype, output_type):
    pipeline = tiny_pipeline(tiny_unet().to(dtype))
    images = pipeline(2, num_inference_steps=2, output_type=output_type).images
    if output_type == "pil":
        assert [(image.mode, image.size) for image in images] == [("L", (8, 8))] * 2
    elif output_type == "np":
        assert (images.dtype, images.shape) == (np.float32, (2, 8, 8, 1))
    else:
        chain = dtype if output_type == "latent" and dtype == torch.float64 else torch.float32
        assert (images.dtype, tuple(images.shape)) == (chain, (2, 1, 8, 8))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_x_t_of_a_half_precision_model_is_float32(dtype):
    pipeline = tiny_pipeline(tiny_unet().to(dtype))
    unet, scheduler = pipeline.unet, pipeline.scheduler
    x_T = torch.randn(2, 1, 8, 8, generator=(generator := seeded(5)))
    denoise = lambda x, t: unet(x.to(dtype), t).sample  # noqa: E731
    want = reverse_chain(unet, scheduler, x_T, generator, denoise)
    got = pipeline(2, seeded(5), output_type="latent").images
    assert_close(got, want, rtol=0, atol=0)


@pytest.mark.slow
def test_noise_does_not_depend_on_the_memory_format():
    plain = tiny_pipeline(tiny_unet(in_channels=3))
    strided = tiny_pipeline(tiny_unet(in_channels=3).to(memory_format=torch.channels_last))
    images = [p(2, seeded(1), output_type="pt").images for p in (plain, strided)]
    # 1e-4: the other layout changes the order of sums; permuted noise would differ by 0.1 or more.
    assert_close(*images, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_compiled_network_samples_and_saves_like_a_plain_one(tmp_path):
    pipeline = tiny_pipeline()
    call = {"generator": seeded(0), "timesteps": [19, 9, 0], "output_type": "pt"}
    want = pipeline(**call).images
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    pipeline.save_pretrained(tmp_path)
    call["generator"] = seeded(0)
    # 1e-5: other kernels and weights at other addresses change the order of sums.
    assert_close(pipeline(**call).images, want, rtol=0, atol=1e-5)
    call["generator"] = seeded(0)
    loaded = quiet(GaussianDDPMPipeline.from_pretrained(tmp_path))
    assert_close(loaded(**call).images, want, rtol=0, atol=1e-5)


def test_with_eta_0_samples_are_a_function_of_the_latents(pipeline):
    x_T = normal(2, 1, 8, 8)
    run = partial(pipeline, 2, latents=x_T, num_inference_steps=5, output_type="pt")
    first, second = run(eta=0.0).images, run(eta=0.0).images
    assert_close(first, second, rtol=0, atol=0)
    assert (run(eta=1.0).images - first).abs().max() > 0.01


@pytest.mark.slow
def test_eta_0_equals_the_ddim_scheduler():
    scheduler = tiny_scheduler(clip_sample=False)  # stock's DDIM keeps epsilon when it clips x_0
    ours = tiny_pipeline(scheduler=scheduler)
    ddim = tiny_pipeline(scheduler=DDIMScheduler.from_config(scheduler.config))
    call = {"latents": normal(2, 1, 8, 8), "num_inference_steps": 10, "output_type": "pt"}
    # DDIM's own default is deterministic here as well. 1e-4: its tables are float32.
    assert_close(ours(2, **call, eta=0.0).images, ddim(2, **call).images, rtol=0, atol=1e-4)


def test_custom_timesteps_are_visited(pipeline):
    visited = []
    pipeline(timesteps=[17, 4, 3], callback_on_step_end=lambda p, i, t, _: visited.append(int(t)))
    assert visited == [17, 4, 3]


@pytest.mark.slow
def test_no_step_reads_a_value_from_the_device():
    """On the "meta" device any read raises; the only read comes after the last step."""
    steps = []
    pipeline = tiny_pipeline(scheduler=tiny_scheduler(num_train_timesteps=3)).to("meta")
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        pipeline(callback_on_step_end=lambda p, i, *_: steps.append(i))
    assert steps == [0, 1, 2]


def test_non_finite_weights_raise_an_error_with_the_step():
    pipeline = tiny_pipeline()

    def damage(p, i, t, tensors):
        if i == 3:
            p.unet.conv_out.bias.data.fill_(float("nan"))

    with pytest.raises(ValueError, match=r"step 4 of 20 \(timestep 15\)"):
        pipeline(callback_on_step_end=damage)


def test_an_infinity_hidden_by_clipping_raises_an_error():
    pipeline = tiny_pipeline()
    pipeline.unet.conv_out.bias.data.fill_(float("inf"))
    with pytest.raises(ValueError, match="step 0 of 20"):
        pipeline()


# ----------------------------------------------------------------------------------------------
# Modes and gradients


@pytest.mark.slow
def test_sampling_runs_in_eval_mode_and_restores_the_mode_of_each_module():
    pipeline = tiny_pipeline(tiny_unet(dropout=0.5))
    pipeline.unet.train()
    pipeline.unet.mid_block.eval()
    modes = [module.training for module in pipeline.unet.modules()]
    first, second = (pipeline(1, seeded(0), output_type="pt").images for _ in range(2))
    assert_close(first, second, rtol=0, atol=0)
    assert [module.training for module in pipeline.unet.modules()] == modes


def test_modes_are_restored_after_an_error():
    pipeline = tiny_pipeline()
    pipeline.unet.train()
    pipeline.unet.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="non-finite"):
        pipeline()
    assert pipeline.unet.training


@pytest.mark.slow
@pytest.mark.parametrize("output_type", ["pt", "latent"])
def test_the_network_can_be_trained_on_its_samples(output_type):
    pipeline = tiny_pipeline()
    x_0 = pipeline(2, output_type=output_type).images
    t = torch.tensor([3, 17])
    x_t = pipeline.scheduler.add_noise(x_0, torch.randn_like(x_0), t)
    network = pipeline.unet.train()
    (network(x_t, t).sample - network(x_0, t).sample).square().mean().backward()
    assert pipeline.unet.conv_in.weight.grad.isfinite().all()


# ----------------------------------------------------------------------------------------------
# Callbacks


@pytest.mark.slow
def test_the_callback_gets_x_t_and_the_estimate_of_x_0_at_every_step(pipeline):
    strip = []
    images = pipeline(
        2,
        output_type="latent",
        callback_on_step_end=lambda p, i, t, tensors: strip.append(tensors),
        callback_on_step_end_tensor_inputs=["latents", "pred_original_sample"],
    ).images
    assert len(strip) == 20
    assert_close(strip[-1]["latents"], images, rtol=0, atol=0)
    # The mean of the last step is the estimate itself (eq. 7 with alpha_bar_prev = 1).
    assert_close(strip[-1]["pred_original_sample"], images, rtol=0, atol=1e-6)
    assert set(strip[0]) == {"latents", "pred_original_sample"}
    assert not any(x.requires_grad for tensors in strip for x in tensors.values())


@pytest.mark.slow
def test_a_callback_can_guide_by_a_gradient(pipeline):
    """Towards grey, by a gradient through the network."""
    weights, greys = [p.clone() for p in pipeline.unet.parameters()], []

    def towards_grey(p, i, t, tensors):
        with torch.enable_grad():
            x = tensors["latents"].detach().requires_grad_()
            grey = p.unet(x, t).sample.square().mean() + x.square().mean()
            (gradient,) = torch.autograd.grad(grey, x)
            greys.append(grey.item())
            return {"latents": x - 8 * gradient}

    call = {"output_type": "latent", "num_inference_steps": 10}
    images = pipeline(1, seeded(0), callback_on_step_end=towards_grey, **call).images
    assert not images.requires_grad
    assert len(greys) == 10
    plain = pipeline(1, seeded(0), **call).images
    assert images.square().mean() < 0.9 * plain.square().mean()
    for before, after in zip(weights, pipeline.unet.parameters(), strict=True):
        assert torch.equal(before, after)


class Recorder(PipelineCallback):
    """A `PipelineCallback` of diffusers, which names its tensors."""

    tensor_inputs = ["pred_original_sample"]  # noqa: RUF012

    def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
        if step_index == int(pipeline.num_timesteps * self.config.cutoff_step_ratio) - 1:
            self.seen = dict(callback_kwargs)
        return callback_kwargs


@pytest.mark.parametrize("several", [False, True])
def test_a_pipeline_callback_gets_its_own_tensor_inputs(pipeline, several):
    recorder = Recorder(cutoff_step_ratio=1.0)
    callback = MultiPipelineCallbacks([recorder]) if several else recorder
    call = {"output_type": "latent", "num_inference_steps": 4, "callback_on_step_end": callback}
    images = pipeline(1, seeded(0), **call).images
    assert set(recorder.seen) == {"pred_original_sample"}
    assert_close(recorder.seen["pred_original_sample"], images, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SCHEDULERS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_callbacks_get_all_declared_tensors_with_any_scheduler(kind, prediction_type):
    """With the exact network for images of 0.25, every estimate of x_0 is 0.25."""
    scheduler = GaussianDDPMScheduler(prediction_type=prediction_type, clip_sample=False)
    pipeline = tiny_pipeline(scheduler=kind.from_config(scheduler.config))
    names, estimates = GaussianDDPMPipeline._callback_tensor_inputs, []
    assert names == ["latents", "pred_original_sample"]
    alpha_bar = scheduler.alphas_cumprod.double().numpy()

    def exact(x_t, t, class_labels=None):
        at_t = np.interp(t[0].item(), np.arange(1000), alpha_bar)
        eps = (x_t - 0.25 * at_t**0.5) / (1 - at_t) ** 0.5
        v = at_t**0.5 * eps - (1 - at_t) ** 0.5 * 0.25
        return UNet2DOutput(sample=eps if prediction_type == "epsilon" else v)

    pipeline.unet.forward = exact
    pipeline(
        num_inference_steps=10,
        output_type="latent",
        callback_on_step_end=lambda p, i, t, tensors: estimates.append(tensors[names[1]]),
        callback_on_step_end_tensor_inputs=names,
    )
    # KDPM2 starts its second evaluations between timesteps: interpolation of alpha_bar.
    for estimate in estimates:
        assert_close(estimate, torch.full_like(estimate, 0.25), rtol=0, atol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["guidance_scale", "_guidance_scale"])
@pytest.mark.parametrize("scales", [(3.0, 1.0), (1.0, 3.0), (3.0, 0.0), (2.0, -1.5)])
def test_a_guidance_scale_that_a_callback_changes_counts_from_the_next_step(
    conditional, name, scales
):
    unet, scheduler, visited = conditional.unet, conditional.scheduler, []
    x_T = torch.randn(2, 1, 8, 8, generator=(generator := seeded(5)))

    def denoise(x, t):
        of_class, of_null = (unet(x, t, class_labels=torch.tensor([n, n])).sample for n in (1, 3))
        visited.append(t)
        return of_null + scales[len(visited) > 2] * (of_class - of_null)

    def change(pipe, i, t, tensors):
        if i == 1:
            setattr(pipe, name, scales[1])
        return tensors

    want = reverse_chain(unet, scheduler, x_T, generator, denoise)
    call = {"class_labels": 1, "guidance_scale": scales[0], "output_type": "latent"}
    got = conditional(2, seeded(5), callback_on_step_end=change, **call).images
    assert_close(got, want, rtol=0, atol=1e-4)  # as without a change
    assert conditional.guidance_scale == scales[1]
    again = conditional(2, seeded(5), **call).images
    assert not torch.allclose(again, got, atol=1e-3)


def test_a_guidance_scale_that_a_callback_cannot_set_is_reported(pipeline):
    def change(pipe, i, t, tensors):
        pipe.guidance_scale = 2.0

    with pytest.raises(ValueError, match="`guidance_scale` must be 1: this model has no numbered"):
        pipeline(callback_on_step_end=change)


def test_a_pipeline_callback_for_prompts_is_refused(pipeline):
    with pytest.raises(ValueError, match=r"tensor_inputs.*prompt_embeds"):
        pipeline(callback_on_step_end=SDCFGCutoffCallback())


def test_samples_share_no_memory_with_tensors_of_a_callback(pipeline):
    x_0 = normal(1, 1, 8, 8)
    pipeline(output_type="latent", **ends_at(x_0)).images.zero_()
    assert x_0.abs().sum() > 0


def test_the_callback_can_replace_x_t(pipeline):
    x_0 = normal(1, 1, 8, 8)
    assert_close(pipeline(output_type="latent", **ends_at(x_0)).images, x_0, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_latents_of_a_callback_are_cast_to_the_dtype_of_x_t(pipeline, dtype):
    x_0 = torch.full((1, 1, 8, 8), 0.5, dtype=dtype)
    images = pipeline(output_type="latent", **ends_at(x_0)).images
    assert images.dtype == torch.float32
    assert torch.equal(images, x_0.float())


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        ({"latents": torch.zeros(1, 1, 4, 4)}, ValueError, r"shape \(1, 1, 8, 8\).*4, 4"),
        ({"latents": None}, ValueError, "must be a tensor.*NoneType"),
        ([1], TypeError, "a dict or None"),
    ],
)
def test_an_invalid_result_of_a_callback_is_reported(pipeline, returned, error, message):
    with pytest.raises(error, match=message):
        pipeline(callback_on_step_end=lambda *_: returned)


def test_a_callback_that_is_not_callable_is_refused(pipeline):
    with pytest.raises(TypeError, match="`callback_on_step_end` must be a function, got 5"):
        pipeline(callback_on_step_end=5)


def test_numpy_integers_are_accepted():
    unet = tiny_unet(num_class_embeds=3)
    call = {"num_inference_steps": np.int64(2), "class_labels": [np.int64(1), np.int32(2)]}
    assert len(tiny_pipeline(unet)(batch_size=np.int64(2), **call).images) == 2


@pytest.mark.slow
def test_a_callback_can_end_sampling(pipeline):
    seen = []

    def stop(p, i, t, tensors):
        seen.append(tensors["latents"])
        p._interrupt = i == 2

    images = pipeline(output_type="latent", callback_on_step_end=stop).images
    assert len(seen) == 3
    assert_close(images, seen[-1], rtol=0, atol=0)
    pipeline(callback_on_step_end=lambda *_: seen.append(None))
    assert len(seen) == 23  # the next call is complete


# ----------------------------------------------------------------------------------------------
# Image formats


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "channels", "bit_depth"),
    [("L", 1, 8), ("LA", 2, 8), ("RGB", 3, 8), ("RGBA", 4, 8), ("L", 1, 16)],
)
def test_images_have_mode_and_bit_depth_of_the_training_images(mode, channels, bit_depth):
    """Levels 0..max, mapped to [-1, 1] by hand, are decoded to the same levels."""
    levels = np.linspace(0, 2**bit_depth - 1, channels * 64).round().reshape(1, channels, 8, 8)
    x_0 = torch.from_numpy(levels / (2**bit_depth - 1) * 2 - 1).float()
    facts = image_facts_of(mode, 8, 8, bit_depth)
    image = tiny_pipeline(tiny_unet(in_channels=channels), facts=facts)(**ends_at(x_0)).images[0]
    assert image.mode == ("I;16" if bit_depth == 16 else mode)
    pixels = np.asarray(image).reshape(8, 8, channels).transpose(2, 0, 1)
    assert np.array_equal(pixels, levels[0])


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_without_facts_the_channels_determine_the_mode(channels, mode):
    pipeline = tiny_pipeline(tiny_unet(in_channels=channels))
    assert pipeline(num_inference_steps=1).images[0].mode == mode


@pytest.mark.parametrize("channels", [2, 5])
def test_channels_without_a_pil_mode_are_returned_as_arrays_only(channels):
    pipeline = tiny_pipeline(tiny_unet(in_channels=channels))
    images = pipeline(num_inference_steps=1, output_type="np").images
    assert images.shape == (1, 8, 8, channels)
    with pytest.raises(ValueError, match=f"output_type.*'np'.*{channels} channels"):
        pipeline(num_inference_steps=1)


@pytest.mark.parametrize(("mode", "channels"), [("LA", 2), ("RGB", 3), ("RGBA", 4)])
def test_16_bit_colour_has_16_bits_as_array_and_8_bits_as_pil(mode, channels):
    """257 levels of 16 bits are one of 8 bits: 65535 = 255 * 257."""
    levels = (np.arange(channels * 64) % 255 * 257).reshape(1, channels, 8, 8) + 1
    x_0 = torch.from_numpy(levels / 65535 * 2 - 1).float()
    facts = image_facts_of(mode, 8, 8, bit_depth=16)
    pipeline = tiny_pipeline(tiny_unet(in_channels=channels), facts=facts)
    image = pipeline(**ends_at(x_0)).images[0]
    assert image.mode == mode
    pixels = np.asarray(image).reshape(8, 8, channels).transpose(2, 0, 1)
    assert np.array_equal(pixels, levels[0] // 257)
    array = pipeline(**ends_at(x_0), output_type="np").images[0]
    assert np.array_equal((array.transpose(2, 0, 1) * 65535).round(), levels[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sample_size", "native"),
    [(8, (5, 6)), ((8, 12), (8, 12)), ((8, 12), (7, 9)), (9, (9, 9)), ((6, 7), (6, 7))],
)
def test_padding_is_cropped_to_the_window_of_the_training_images(sample_size, native):
    """Training pads (padded - native) // 2 at top and left, the pipeline pads odd sizes."""
    pair = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    height, width = (n + n % 2 for n in pair)  # one down-sampling: even sizes
    top, left = (height - native[0]) // 2, (width - native[1]) // 2
    image = normal(1, 1, *native).clamp(-1, 1)
    x_0 = torch.full((1, 1, height, width), 9.0)
    x_0[..., top : top + native[0], left : left + native[1]] = image
    pipeline = tiny_pipeline(tiny_unet(sample_size=sample_size, **TWO_LEVELS))
    if native != pair:
        pipeline.unet.register_to_config(_ddpm_hf=image_facts_of("L", *native))
    call = ends_at(x_0)
    assert pipeline(**call, output_type="latent").images.shape == x_0.shape
    got = pipeline(**call, output_type="pt").images
    assert_close(got, image / 2 + 0.5, rtol=0, atol=1e-6)
    assert pipeline(**call).images[0].size == native[::-1]


def test_a_network_with_four_levels_samples_28_pixel_images():
    levels = {
        "block_out_channels": (8, 8, 8, 8),
        "down_block_types": ("DownBlock2D",) * 4,
        "up_block_types": ("UpBlock2D",) * 4,
    }
    pipeline = tiny_pipeline(tiny_unet(sample_size=28, **levels))
    assert pipeline(num_inference_steps=2).images[0].size == (28, 28)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"mode": "RGB"}, "mode"),
        ({"mode": "CMYK"}, "mode"),
        ({"height": 9}, "height, width"),
        ({"width": 0}, "width"),
        ({"width": "8"}, "width"),
        ({"bit_depth": 12}, "bit_depth"),
    ],
)
def test_facts_that_do_not_fit_the_network_are_reported(change, named):
    facts = image_facts_of("L", 8, 8)
    facts["image"] |= change
    with pytest.raises(ValueError, match=named):
        tiny_pipeline(facts=facts)(num_inference_steps=1)


@pytest.mark.parametrize("facts", [{}, "L", {"format_version": 1}, {"image": {}}])
def test_facts_without_a_format_version_are_refused(facts):
    with pytest.raises(ValueError, match="_ddpm_hf"):
        tiny_pipeline(facts=facts)(num_inference_steps=1)


def test_facts_of_a_newer_format_are_ignored_with_a_warning():
    facts = image_facts_of("L", 5, 5) | {"format_version": 2}
    with pytest.warns(UserWarning, match="format 2"):
        image = tiny_pipeline(facts=facts)(num_inference_steps=1).images[0]
    assert image.size == (8, 8)


def test_image_facts_are_read_from_the_configuration():
    unet = tiny_unet()
    assert image_facts(unet) is None
    facts = image_facts_of("L", 5, 6, class_names=["cat", "dog"])
    unet.register_to_config(_ddpm_hf=facts)
    assert image_facts(unet) == ImageFacts("L", 5, 6, class_names=("cat", "dog"))


# ----------------------------------------------------------------------------------------------
# Classes and guidance


@pytest.fixture(scope="module")
def conditional():
    """Pipeline with three classes and the null class as last embedding."""
    unet, scheduler = tiny_unet(num_class_embeds=4), tiny_scheduler(num_train_timesteps=5)
    facts = image_facts_of("L", 8, 8, class_names=["a", "b", "c"])
    return tiny_pipeline(unet, scheduler, facts)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("labels", "numbers"),
    [
        (2, [2, 2]),
        ("b", [1, 1]),
        ([0, 2], [0, 2]),
        (("c", "a"), [2, 0]),
        (torch.tensor([1, 2]), [1, 2]),
        (torch.tensor(2), [2, 2]),
        (np.int64(2), [2, 2]),
        (np.array([1, 2]), [1, 2]),
        ("2", [2, 2]),
        (["\uff42", "0"], [1, 0]),  # a full-width b
    ],
)
def test_classes_are_given_as_numbers_or_names(conditional, labels, numbers):
    unet, scheduler = conditional.unet, conditional.scheduler
    x_T = torch.randn(2, 1, 8, 8, generator=(generator := seeded(5)))
    denoise = lambda x, t: unet(x, t, class_labels=torch.tensor(numbers)).sample  # noqa: E731
    want = reverse_chain(unet, scheduler, x_T, generator, denoise)
    got = conditional(2, seeded(5), class_labels=labels, output_type="latent").images
    assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_classifier_free_guidance_extrapolates_from_the_null_class(conditional, scale):
    unet, scheduler = conditional.unet, conditional.scheduler
    x_T = torch.randn(2, 1, 8, 8, generator=(generator := seeded(5)))

    def denoise(x, t):
        of_class, of_null = (
            unet(x, t, class_labels=torch.tensor(n)).sample for n in ([0, 2], [3, 3])
        )
        return of_null + scale * (of_class - of_null)

    want = reverse_chain(unet, scheduler, x_T, generator, denoise)
    call = {"class_labels": [0, 2], "guidance_scale": scale, "output_type": "latent"}
    # 1e-4: rounding of two networks, enlarged three times at each step.
    assert_close(conditional(2, seeded(5), **call).images, want, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_guidance_is_limited_to_the_interval_of_log_snr(conditional):
    unet, scheduler = conditional.unet, conditional.scheduler
    x_T = torch.randn(1, 1, 8, 8, generator=(generator := seeded(5)))
    alpha_bar = scheduler.alphas_cumprod.double()
    log_snr = (alpha_bar / (1 - alpha_bar)).log()
    low, high = log_snr[-2].item() - 0.01, log_snr[2].item() + 0.01

    def denoise(x, t):
        of_class, of_null = (unet(x, t, class_labels=torch.tensor([n])).sample for n in (1, 3))
        inside = low <= log_snr[t] <= high
        return of_null + 3 * (of_class - of_null) if inside else of_class

    want = reverse_chain(unet, scheduler, x_T, generator, denoise)
    call = {"class_labels": 1, "guidance_scale": 3.0, "output_type": "latent"}
    got = conditional(1, seeded(5), guidance_interval=(low, high), **call).images
    assert_close(got, want, rtol=0, atol=1e-4)  # as above
    everywhere = conditional(1, seeded(5), **call).images
    assert not torch.allclose(got, everywhere, atol=1e-2)
    infinite = (-float("inf"), float("inf"))
    assert torch.equal(
        conditional(1, seeded(5), guidance_interval=infinite, **call).images, everywhere
    )


@pytest.mark.slow
@pytest.mark.parametrize("as_pipeline", [True, False])
@pytest.mark.parametrize("knows_classes", [True, False])
def test_autoguidance_extrapolates_from_the_weaker_model(conditional, as_pipeline, knows_classes):
    unet, scheduler = conditional.unet, conditional.scheduler
    weak = tiny_unet(seed=7, num_class_embeds=4 if knows_classes else None).train()
    x_T = torch.randn(1, 1, 8, 8, generator=(generator := seeded(5)))
    label = torch.tensor([1])

    def denoise(x, t):
        strong = unet(x, t, class_labels=label).sample
        weak_one = weak.eval()(x, t, class_labels=label if knows_classes else None).sample
        return weak_one + 2 * (strong - weak_one)

    want = reverse_chain(unet, scheduler, x_T, generator, denoise)
    guide = tiny_pipeline(weak.train(), scheduler) if as_pipeline else weak.train()
    call = {"class_labels": 1, "guidance_scale": 2.0, "output_type": "latent"}
    assert_close(conditional(1, seeded(5), guide=guide, **call).images, want, rtol=0, atol=1e-4)
    assert weak.training


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"guidance_interval": (3, -3)}, ValueError, "guidance_interval.*lowest and the highest"),
        ({"guidance_interval": 3}, ValueError, "guidance_interval"),
        (
            {"guide": "user/model"},
            TypeError,
            "`guide` must be a pipeline or a UNet2DModel, got str",
        ),
        ({"guide": tiny_unet(in_channels=3, out_channels=3)}, ValueError, "guide.*1 channels"),
        (
            {"guide": tiny_unet(num_class_embeds=7)},
            ValueError,
            "got num_class_embeds=7 instead of 4",
        ),
        ({"guide": tiny_unet(), "guidance_scale": 1.0}, ValueError, "no effect"),
        (
            {"guide": tiny_pipeline(scheduler=tiny_scheduler(prediction_type="sample"))},
            ValueError,
            "`guide` must have the prediction_type of this model, 'epsilon', got 'sample'",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_invalid_guide_or_interval_is_refused(conditional, call, error, message):
    with pytest.raises(error, match=message):
        conditional(**{"class_labels": 1, "guidance_scale": 2.0, **call})


@pytest.mark.slow
def test_guidance_keeps_the_learned_variance_of_the_conditional_prediction():
    unet = tiny_unet(num_class_embeds=4, out_channels=2)
    scheduler = tiny_scheduler(num_train_timesteps=5, variance_type="learned_range")
    x_T = torch.randn(1, 1, 8, 8, generator=(generator := seeded(5)))

    def denoise(x, t):
        of_class, of_null = (unet(x, t, class_labels=torch.tensor([n])).sample for n in (1, 3))
        mean = of_null + 2 * (of_class - of_null)
        return torch.cat([mean[:, :1], of_class[:, 1:]], dim=1)

    want = reverse_chain(unet, scheduler, x_T, generator, denoise)
    call = {"class_labels": 1, "guidance_scale": 2, "output_type": "latent"}
    got = tiny_pipeline(unet, scheduler)(1, seeded(5), **call).images
    assert_close(got, want, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_schedulers_without_learned_variance_get_the_channels_of_the_mean():
    unet = tiny_unet(out_channels=2)
    scheduler = DDIMScheduler(**SHORT_CHAIN)
    x_T = normal(1, 1, 8, 8)
    want = reverse_chain(unet, scheduler, x_T, None, lambda x, t: unet(x, t).sample[:, :1])
    call = {"latents": x_T, "output_type": "latent"}
    assert_close(tiny_pipeline(unet, scheduler)(**call).images, want, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("embedding", "labels"),
    [
        ({"class_embed_type": "timestep"}, torch.tensor([0.5, 7.0])),
        ({"class_embed_type": "identity"}, normal(2, 32)),
    ],
)
def test_other_class_embeddings_get_the_tensor_unchanged(embedding, labels):
    pipeline = tiny_pipeline(tiny_unet(**embedding))
    call = {"num_inference_steps": 3, "output_type": "pt"}
    images = [pipeline(2, seeded(0), class_labels=c, **call).images for c in (labels, -labels)]
    assert (images[0] - images[1]).abs().max() > 1e-3


# ----------------------------------------------------------------------------------------------
# Errors


STEPS = "`num_inference_steps` must be an int in [1, 20]"
CLASSES = "`class_labels` must be in [0, 2] or one of 'a', 'b', 'c'"
NO_CLASS = "; for images of no class set `guidance_scale` to 0"
BAD_CALLS = [
    ({"batch_size": 0}, ValueError, "`batch_size` must be an int in [1, 1048576], got 0"),
    ({"batch_size": -1}, ValueError, "`batch_size` must be an int in [1, 1048576], got -1"),
    ({"batch_size": 1.5}, TypeError, "`batch_size` must be an int in [1, 1048576], got 1.5"),
    ({"batch_size": True}, TypeError, "`batch_size` must be an int in [1, 1048576], got True"),
    (
        {"num_inference_steps": 0},
        ValueError,
        f"{STEPS}, got 0",
    ),
    (
        {"num_inference_steps": -2},
        ValueError,
        f"{STEPS}, got -2",
    ),
    (
        {"num_inference_steps": 2.5},
        TypeError,
        f"{STEPS}, got 2.5",
    ),
    (
        {"num_inference_steps": 21},
        ValueError,
        f"{STEPS}, got 21",
    ),
    (
        {"num_inference_steps": "10"},
        TypeError,
        f"{STEPS}, got '10'",
    ),
    (
        {"num_inference_steps": 3, "timesteps": [2, 1, 0]},
        ValueError,
        "pass either `num_inference_steps` or `timesteps`, not both",
    ),
    ({"timesteps": []}, ValueError, "integers in [0, 19], at least one, got []"),
    (
        {"timesteps": [5, -3]},
        ValueError,
        "integers in [0, 19], at least one, got [5, -3]",
    ),
    ({"timesteps": [0, 5]}, ValueError, "integers in [0, 19], at least one, got [0, 5]"),
    ({"timesteps": 5}, TypeError, "`timesteps` must be a sequence of integers, got 5"),
    ({"output_type": "foo"}, ValueError, "one of 'pil', 'np', 'pt', 'latent', got 'foo'"),
    ({"output_type": None}, ValueError, "one of 'pil', 'np', 'pt', 'latent', got None"),
    ({"generator": 42}, TypeError, "list with one per image, got 42; create one with"),
    ({"generator": "g"}, TypeError, "list with one per image, got 'g'; create one with"),
    ({"generator": [42]}, TypeError, "list with one per image, got [42]; create one with"),
    ({"generator": seeded(1, 2, 3)}, ValueError, "a list of 1, one per image, got a list of 3"),
    (
        {"batch_size": 4, "generator": seeded(1, 2)},
        ValueError,
        "`generator` must be a single generator or a list of 4, one per image, got a list of 2",
    ),
    ({"eta": -0.1}, ValueError, "`eta` must be a number in [0, 1], got -0.1"),
    ({"eta": 2}, ValueError, "`eta` must be a number in [0, 1], got 2"),
    ({"eta": "1"}, TypeError, "`eta` must be a number in [0, 1], got '1'"),
    (
        {"latents": torch.zeros(1, 1, 9, 9)},
        ValueError,
        "`latents` must be a tensor of shape (1, 1, 8, 8), got (1, 1, 9, 9)",
    ),
    ({"latents": torch.zeros(2, 1, 8, 8)}, ValueError, "of shape (1, 1, 8, 8), got (2, 1, 8, 8)"),
    ({"latents": [0.0]}, ValueError, "`latents` must be a tensor of shape (1, 1, 8, 8), got list"),
    ({"class_labels": 1}, ValueError, "must be None for this unconditional model, got 1"),
    ({"guidance_scale": 2.0}, ValueError, "`guidance_scale` must be 1: this model has no numbered"),
    (
        {"guidance_scale": float("nan")},
        ValueError,
        "number that is finite, got nan",
    ),
    (
        {"guidance_scale": "2"},
        TypeError,
        "number that is finite, got '2'",
    ),
    (
        {"callback_on_step_end_tensor_inputs": ["x"]},
        ValueError,
        "must contain only names of ('latents', 'pred_original_sample'), got ['x']",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS, ids=lambda v: str(v)[:40])
def test_an_invalid_argument_is_reported_with_value_and_valid_range(pipeline, call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        pipeline(**call)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "`class_labels` is required: this model is class-conditional; name a class"),
        ({"class_labels": 4}, f"{CLASSES}, got 4"),
        ({"class_labels": 3}, f"{CLASSES}, got 3{NO_CLASS}"),
        ({"class_labels": torch.tensor([3])}, f"{CLASSES}, got 3{NO_CLASS}"),
        ({"class_labels": -1}, f"{CLASSES}, got -1{NO_CLASS}"),
        ({"class_labels": [None]}, f"{CLASSES}, got None{NO_CLASS}"),
        (
            {"class_labels": "d"},
            f"{CLASSES}, got 'd'",
        ),
        (
            {"class_labels": [0.5]},
            f"{CLASSES}, got 0.5",
        ),
        (
            {"class_labels": 0.5},
            f"{CLASSES}, got 0.5",
        ),
        ({"class_labels": [0, 1, 2]}, "one per image, got shape (3,) for `batch_size` 1"),
    ],
)
def test_an_unknown_class_is_reported_with_the_known_ones(conditional, call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        conditional(**call)


@pytest.mark.parametrize(
    ("labels", "numbers"),
    [
        ("007", 0), ("1", 1), ("2", 4), ("cafe\u0301", 3), (1, 1), ("3", 3), ("CAT", 2), ("4", 4)
    ],
)  # fmt: skip
def test_a_class_is_found_by_its_exact_name_its_normalized_name_and_its_number(labels, numbers):
    names = ("007", "1", "CAT", "caf\u00e9", "2")
    assert class_numbers(labels, 6, names) == [numbers]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (100, r'in \[0, 1\], got 100; the name of a class is text: "100"$'),
        ("7", r"in \[0, 1\] or one of '007', '100', got '7'$"),
    ],
)
def test_an_error_does_not_offer_the_label_that_was_asked_for(label, message):
    with pytest.raises(ValueError, match=message):
        class_numbers(label, 3, ("007", "100"))


def test_guidance_scale_0_samples_without_a_class(conditional):
    call = {"num_inference_steps": 3, "guidance_scale": 0, "output_type": "np"}
    draws = [
        conditional(1, torch.Generator().manual_seed(0), **call, **labels).images
        for labels in ({}, {"class_labels": "a"}, {"class_labels": "b"})
    ]
    np.testing.assert_array_equal(draws[0], draws[1])
    np.testing.assert_array_equal(draws[0], draws[2])


@pytest.mark.slow
@pytest.mark.parametrize(
    "call", [{"guidance_scale": 2.0, "class_labels": 0}, {"guidance_scale": 0}]
)
def test_guidance_of_a_model_that_saw_every_label_is_refused(call):
    unet = tiny_unet(num_class_embeds=3)
    facts = {**image_facts_of("L", 8, 8, class_names=["a", "b"]), "has_null_class": False}
    pipeline = tiny_pipeline(unet, facts=facts)
    with pytest.raises(ValueError, match="trained with `class_dropout` 0"):
        pipeline(**call)
    assert len(pipeline(class_labels=0).images) == 1


@pytest.mark.slow
def test_guidance_without_a_null_class_is_refused():
    unet = tiny_unet(num_class_embeds=2)
    pipeline = tiny_pipeline(unet, facts=image_facts_of("L", 8, 8, class_names=["a", "b"]))
    with pytest.raises(ValueError, match="without a null class"):
        pipeline(class_labels=0, guidance_scale=2.0)
    assert len(pipeline(class_labels=0).images) == 1


@pytest.mark.parametrize("size", [None, 0, -8, (8,), (8, 0), 8.0, "8"])
def test_an_invalid_sample_size_is_refused(size):
    pipeline = tiny_pipeline()
    pipeline.unet.register_to_config(sample_size=size)
    with pytest.raises(ValueError, match="sample_size"):
        pipeline()


@pytest.mark.parametrize(
    ("channels", "variance_type"), [(2, "fixed_small"), (3, "fixed_small"), (1, "learned_range")]
)
def test_output_channels_must_fit_the_variance_type(channels, variance_type):
    scheduler = tiny_scheduler(variance_type=variance_type)
    with pytest.raises(ValueError, match=f"out_channels.*{variance_type}.*got {channels}"):
        tiny_pipeline(tiny_unet(out_channels=channels), scheduler)()


@pytest.mark.parametrize(
    ("unet", "scheduler", "message"),
    [
        (torch.nn.Linear(2, 2), DDPMScheduler(**SHORT_CHAIN), "`unet` must be.*Linear"),
        (None, DDPMScheduler(**SHORT_CHAIN), "`unet` must be.*NoneType"),
        (tiny_unet(), None, "`scheduler` must be.*NoneType"),
        (tiny_unet(), tiny_unet(), "`scheduler` must be.*UNet2DModel"),
        (tiny_unet(), FlowMatchEulerDiscreteScheduler(), "`scheduler` must be.*FlowMatchEuler"),
        # Accepts our configuration, but has other noise levels.
        (
            tiny_unet(),
            EDMEulerScheduler.from_config(tiny_scheduler().config),
            "`scheduler` must be.*EDMEuler",
        ),
        (tiny_unet(), DDIMInverseScheduler(), "DDIMInverseScheduler inverts"),
        (tiny_unet(), DPMSolverMultistepInverseScheduler(), "MultistepInverseScheduler inverts"),
        (tiny_unet(), RePaintScheduler(), "RePaintScheduler requires mask and original_image"),
    ],
)
def test_unsuitable_networks_and_schedulers_are_refused(unet, scheduler, message):
    with pytest.raises(TypeError, match=message):
        GaussianDDPMPipeline(unet, scheduler)


@pytest.mark.parametrize(
    ("kind", "call", "message"),
    [
        (
            EulerDiscreteScheduler,
            {"eta": 0.5},
            "eta.*EulerDiscreteScheduler, got 0.5",
        ),
        (
            DDIMScheduler,
            {"timesteps": [3, 1]},
            r"timesteps.*DDIMScheduler, got \[3, 1\]",
        ),
        (
            DPMSolverMultistepScheduler,
            {"num_inference_steps": 20},
            r"num_inference_steps` 20 is too many for DPMSolver.*would be 0, 0.*fewer steps$",
        ),
        (
            PNDMScheduler,
            {"num_inference_steps": 2},
            "PNDMScheduler.*`num_inference_steps` 2",
        ),
        (EulerDiscreteScheduler, {"timesteps": [9, 5, 5]}, "timesteps.*strictly descending"),
        (EulerDiscreteScheduler, {"timesteps": [5, 9]}, "timesteps.*strictly descending"),
    ],
)
def test_unsupported_arguments_of_other_schedulers_are_reported(kind, call, message):
    scheduler = kind.from_config(tiny_scheduler(timestep_spacing="leading").config)
    with pytest.raises(ValueError, match=message):
        tiny_pipeline(scheduler=scheduler)(**call)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SCHEDULERS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    ("T", "spacing"),
    [(5, "leading"), (20, "leading"), (20, "linspace"), (20, "trailing"), (1000, "leading")],
)
def test_the_default_number_of_steps_of_other_schedulers_works(kind, spacing, T):
    """With the exact network for images of zeros, samples are close to zero."""
    config = {"num_train_timesteps": T, "beta_schedule": "squaredcos_cap_v2"}
    scheduler = GaussianDDPMScheduler(**config, clip_sample=False)
    pipeline = tiny_pipeline(scheduler=kind.from_config(scheduler.config, timestep_spacing=spacing))
    pipeline.unet = Zeros(**pipeline.unet.config)
    pipeline.unet.alpha_bar = scheduler.alphas_cumprod.double().numpy()
    images = pipeline(output_type="latent", generator=seeded(0)).images
    assert pipeline.scheduler.num_inference_steps == usual_num_steps(kind.__name__, T)
    # Five steps have a large discretisation error. PNDM extrapolates from the start of the cosine
    # schedule, where no signal is left, and diverges in any number of steps.
    if T > 5 and (kind is not PNDMScheduler or spacing == "leading"):
        assert images.abs().max() < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("option", ["use_karras_sigmas", "use_exponential_sigmas"])
@pytest.mark.parametrize(
    "kind", [DPMSolverMultistepScheduler, UniPCMultistepScheduler, DEISMultistepScheduler]
)
def test_repeated_timesteps_of_sigma_spacings_raise_one_error(kind, option):
    """Most of Karras' noise levels are between the last timesteps of the cosine schedule."""
    scheduler = GaussianDDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)
    pipeline = tiny_pipeline(scheduler=kind.from_config(scheduler.config, **{option: True}))
    with pytest.raises(ValueError, match=f"too many for {kind.__name__}.*turn off {option}"):
        pipeline(num_inference_steps=25)
    linear = GaussianDDPMScheduler(clip_sample=False)
    pipeline.scheduler = kind.from_config(linear.config, **{option: True})
    assert len(pipeline(num_inference_steps=25).images) == 1


def test_a_wrapped_network_is_refused_with_a_hint_to_unwrap_it():
    scheduler = DDPMScheduler(**SHORT_CHAIN)
    with pytest.raises(TypeError, match=r"take it out of the DataParallel \(.*unwrap_model"):
        GaussianDDPMPipeline(torch.nn.DataParallel(tiny_unet()), scheduler)
    with pytest.raises(TypeError, match=r"got Linear$"):
        GaussianDDPMPipeline(torch.nn.Linear(2, 2), scheduler)


def test_return_dict_false_returns_a_tuple(pipeline):
    (images,) = pipeline(num_inference_steps=1, return_dict=False)
    assert len(images) == 1

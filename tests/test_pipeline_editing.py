"""Editing methods of the pipeline: images in and out, batches, classes, schedulers, bad input."""

import numpy as np
import pytest
import torch
from checkpoints import TWO_LEVELS, image_facts_of, save_stock, tiny_scheduler, tiny_unet
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image
from processes import run_forked

from ddpm_hf import GaussianDDPMPipeline, load
from ddpm_hf.editing import expected_gain, invert
from ddpm_hf.sampling import use_recommended

NAMES = ("cat", "dog")


def pipeline_of(mode="RGB", size=(8, 8), class_names=None, **scheduler) -> GaussianDDPMPipeline:
    channels = {"L": 1, "RGB": 3, "RGBA": 4}[mode]
    classes = None if class_names is None else len(class_names) + 1
    levels = {} if size == (8, 8) else TWO_LEVELS  # which need an even height and width
    unet = tiny_unet(in_channels=channels, num_class_embeds=classes, **levels)
    unet.register_to_config(_ddpm_hf=image_facts_of(mode, *size, class_names=class_names))
    pipeline = GaussianDDPMPipeline(unet, tiny_scheduler(**scheduler))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline():
    return pipeline_of()


def picture(mode="RGB", size=(8, 8), seed=0) -> Image.Image:
    shape = size if mode == "L" else (*size, len(mode))
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def half_mask(size=(8, 8)) -> Image.Image:
    mask = np.zeros(size, np.uint8)
    mask[:, size[1] // 2 :] = 255
    return Image.fromarray(mask)


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["covariance", "repaint"])
@pytest.mark.parametrize(("mode", "size"), [("RGB", (8, 8)), ("L", (7, 6)), ("RGBA", (8, 8))])
def test_the_known_half_comes_back_bit_by_bit_and_the_white_half_is_drawn(method, mode, size):
    pipeline, image = pipeline_of(mode, size), picture(mode, size)
    output = pipeline.inpaint(
        image, half_mask(size), num_images=2, num_inference_steps=4, method=method,
        jump_length=2, jump_n_sample=2, generator=seeded(0, 1), return_std=True,
    )  # fmt: skip
    before, first, second = (np.asarray(x) for x in (image, *output.images))
    known = size[1] // 2
    for drawn in (first, second):
        assert (drawn[:, :known] == before[:, :known]).all()
        assert (drawn[:, known:] != before[:, known:]).any()
    assert output.std.shape == (1, *size, len(mode))
    assert (output.std[:, :, :known] == 0).all()
    gap = first.astype(float) - second
    spread = np.abs(gap).reshape(output.std.shape[1:]) / 255 / np.sqrt(2)
    assert np.allclose(output.std[0], spread, atol=1 / 255)  # of images rounded to 8 bits


@pytest.mark.slow
@pytest.mark.parametrize("call", ["inpaint", "image_to_image"])
def test_an_edited_image_depends_on_its_generator_and_not_on_its_batch(pipeline, call):
    def edit(images, seeds):
        masks = {"mask_image": half_mask()} if call == "inpaint" else {"strength": 0.6}
        return getattr(pipeline, call)(
            images, **masks, generator=seeded(*seeds), num_inference_steps=5, output_type="pt"
        ).images

    images = [picture(seed=i) for i in range(3)]
    # Convolutions over another batch size round differently.
    torch.testing.assert_close(edit(images[1:2], [7]), edit(images, [5, 7, 9])[1:2])


@pytest.mark.slow
def test_image_to_image_keeps_more_at_a_lower_strength(pipeline):
    image = picture()

    def edited(strength):
        return pipeline.image_to_image(
            image, strength=strength, generator=seeded(0), num_inference_steps=20, output_type="np"
        )

    weak, strong = edited(0.1), edited(0.9)
    before = np.asarray(image) / 255
    assert np.abs(weak.images[0] - before).mean() < np.abs(strong.images[0] - before).mean() / 2
    gain = expected_gain(pipeline.scheduler, strength=0.1, num_inference_steps=20)
    assert weak.expected_gain == pytest.approx(gain)
    assert 1 > weak.expected_gain > 0.8 > 0.1 > strong.expected_gain >= 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [DDIMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler]
)
def test_image_to_image_runs_on_any_scheduler_of_the_pipeline(kind):
    pipeline = pipeline_of()
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    output = pipeline.image_to_image(
        picture(), log_snr=0.0, generator=seeded(0), num_inference_steps=10
    )
    assert output.images[0].size == (8, 8)
    assert 0 < output.expected_gain < 1


def test_at_full_strength_image_to_image_samples_from_the_noisiest_timestep(pipeline):
    output = pipeline.image_to_image(
        picture(), strength=1.0, generator=seeded(3), num_inference_steps=6, output_type="pt"
    )
    x_0 = pipeline.encode_images(picture())
    generator = torch.Generator().manual_seed(3)
    t = pipeline.scheduler.timesteps[0]
    x_t = pipeline.scheduler.add_noise(x_0, torch.randn(x_0.shape, generator=generator), t)
    plain = pipeline(1, [generator], 6, output_type="pt", latents=x_t).images
    torch.testing.assert_close(output.images, plain)


def test_a_grey_image_of_16_bits_is_refused_without_advice_that_clips_it():
    deep = Image.fromarray(np.full((8, 8), 1000, np.uint16))
    with pytest.raises(ValueError, match="got uint16; divide by 257"):
        pipeline_of("L", (8, 8)).encode_images(deep)


def test_inversion_is_that_of_the_network_and_the_padded_image():
    pipeline, image = pipeline_of("L", (7, 6)), picture("L", (7, 6))
    noise = pipeline.invert([image, picture("L", (7, 6), 1)], num_inference_steps=5)
    assert noise.shape == (2, 1, 8, 8)
    x_0 = pipeline.encode_images(image)
    want = invert(pipeline.unet, pipeline.scheduler, x_0, num_inference_steps=5, progress=False)
    torch.testing.assert_close(noise[:1], want)
    with pytest.raises(ValueError, match="`num_inference_steps` must be at least 2"):
        pipeline.invert(image, num_inference_steps=1)


@pytest.mark.slow
def test_interpolation_takes_images_or_noise_and_ends_at_both(pipeline):
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    output = pipeline.interpolate(
        noise[:1], noise[1:], 5, num_inference_steps=6, output_type="pt"
    ).images
    ends = pipeline(2, latents=noise, num_inference_steps=6, eta=0.0, output_type="pt").images
    assert output.shape == (5, 3, 8, 8)
    torch.testing.assert_close(output[[0, -1]], ends)
    of_images = pipeline.interpolate(picture(), picture(seed=1), 3, num_inference_steps=6)
    assert [image.size for image in of_images.images] == [(8, 8)] * 3


def test_a_combination_of_three_noises_with_one_weight_is_that_noise(pipeline):
    noise = list(torch.randn(3, 1, 3, 8, 8, generator=torch.Generator().manual_seed(1)))
    output = pipeline.combine(
        noise, [[0.0, 2.0, 0.0], [1.0, 1.0, 1.0]], num_inference_steps=4, output_type="pt"
    ).images
    alone = pipeline(1, latents=noise[1], num_inference_steps=4, eta=0.0, output_type="pt").images
    torch.testing.assert_close(output[:1], alone, rtol=0, atol=1e-4)  # rounding of the batch


@pytest.mark.slow
def test_classes_and_guidance_reach_the_network():
    pipeline = pipeline_of(class_names=NAMES)
    call = {"num_inference_steps": 4, "generator": seeded(0)[0], "output_type": "pt"}

    def edited(**conditioning):
        call["generator"].manual_seed(0)
        return pipeline.inpaint(picture(), half_mask(), **call, **conditioning).images

    cat, dog = edited(class_labels="cat"), edited(class_labels="dog")
    assert not torch.equal(cat, dog)
    assert not torch.equal(cat, edited(class_labels="cat", guidance_scale=3.0))
    towards_white = {"guidance": lambda x_t, x_0, t: x_t.sum((1, 2, 3)), "guidance_weight": 5.0}
    assert edited(class_labels="cat", **towards_white).mean() > cat.mean()
    with pytest.raises(ValueError, match="`class_labels` is required"):
        edited()


@pytest.mark.parametrize(
    "kind",
    [
        None,
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        UniPCMultistepScheduler,
        EulerDiscreteScheduler,
        HeunDiscreteScheduler,
    ],
)
def test_the_call_itself_is_guided_by_a_likelihood_with_any_scheduler(kind):
    pipeline = pipeline_of(num_train_timesteps=100, clip_sample=False)
    if kind is not None:
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    images = [
        pipeline(
            2, seeded(0, 1), 4, output_type="latent", guidance_weight=0.1,
            guidance=None if sign == 0 else lambda x_t, x_0, t, s=sign: s * x_t.sum((1, 2, 3)),
        ).images.mean()
        for sign in (-1, 0, 1)
    ]  # fmt: skip
    assert images[0] < images[1] < images[2]


def test_callbacks_see_every_step_and_can_end_the_edit(pipeline):
    steps = []

    def stop_at_2(pipe, i, t, tensors):
        steps.append((i, int(t)))
        pipe._interrupt = i == 2

    pipeline.inpaint(picture(), half_mask(), num_inference_steps=6, callback_on_step_end=stop_at_2)
    assert [i for i, _ in steps] == [0, 1, 2]


@pytest.mark.slow
def test_callbacks_read_the_number_of_steps_of_the_edit(pipeline):
    numbers = []

    def read(pipe, i, t, tensors):
        numbers.append(pipe.num_timesteps)

    options = {"num_inference_steps": 6, "callback_on_step_end": read}
    pipeline.inpaint(picture(), half_mask(), jump_length=1, jump_n_sample=2, **options)
    pipeline.image_to_image(picture(), strength=0.5, **options)
    pipeline.interpolate(picture(), picture(seed=1), 2, **options)
    assert numbers == [11] * 11 + [3] * 3 + [6] * 6


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Image.new("L", (8, 8)), "`mask_image` is empty"),
        (Image.new("L", (8, 8), 255), "`mask_image` is full"),
        (Image.new("L", (9, 8), 255), r"`mask_image` must have the size.*\(8, 8\), got \(8, 9\)"),
        (np.zeros((8, 8, 3, 2)), r"`mask_image` must be .* got shape \(8, 8, 3, 2\)"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(pipeline, mask, message):
    with pytest.raises(ValueError, match=message):
        pipeline.inpaint(picture(), mask)


def test_interpolation_takes_single_images_and_noise_of_the_models_shape(pipeline):
    with pytest.raises(ValueError, match="`b` must be one image, got a batch of 2"):
        pipeline.interpolate(picture(), [picture(), picture()], num_inference_steps=2)
    with pytest.raises(
        ValueError, match=r"`a` as noise must have shape \(1, 3, 8, 8\), got \(3, 8"
    ):
        pipeline.interpolate(torch.randn(3, 8, 8), picture(), num_inference_steps=2)


@pytest.mark.slow
def test_noise_of_the_steps_makes_interpolations_vary_with_the_generator(pipeline):
    def draw(seeds, **options):
        return pipeline.interpolate(
            picture(), picture(seed=1), 2, generator=seeded(*seeds), num_inference_steps=5,
            output_type="pt", **options,
        ).images  # fmt: skip

    assert torch.equal(draw((0, 1)), draw((2, 3)))
    varied = draw((0, 1), eta=1.0)
    assert torch.equal(varied, draw((0, 1), eta=1.0))
    assert not torch.equal(varied, draw((2, 3), eta=1.0))
    with pytest.raises(ValueError, match="generator"):
        draw((0, 1, 2))


def test_masks_of_other_kinds_sizes_and_numbers_are_refused(pipeline):
    small = Image.new("L", (7, 8), 255)
    for masks, message in (
        ([half_mask(), small], r"must have the size of the image.*got \(8, 7\)"),
        ([half_mask()] * 3, ".*got 3 masks for 2 images"),
        ([], ".*got 0 masks for 2 images"),
        (np.zeros((8, 8), np.int64), "must be boolean, uint8 or floating point, got torch.int64"),
        (None, "must be a PIL image, an array or a tensor, got NoneType"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"`mask_image` {message}"):
            pipeline.inpaint([picture(), picture()], masks)


def test_images_of_another_size_or_mode_are_refused(pipeline):
    with pytest.raises(ValueError, match=r"\(3, 8, 8\).*got \(3, 9, 8\)"):
        pipeline.image_to_image(picture(size=(9, 8)))
    with pytest.raises(ValueError, match=r"mode RGB.*got L.*convert"):
        pipeline.image_to_image(picture("L"))


def test_masks_are_read_from_arrays_and_tensors_alike(pipeline):
    mask = np.asarray(half_mask())
    forms = [
        half_mask(), mask, mask > 127, mask / 255.0, mask[..., None],
        torch.from_numpy(mask > 127)[None],
    ]  # fmt: skip
    images = [
        pipeline.inpaint(
            picture(), form, num_inference_steps=3, generator=seeded(0), output_type="pt"
        ).images
        for form in forms
    ]
    assert all(torch.equal(image, images[0]) for image in images)


def test_one_label_for_each_image_serves_all_of_its_draws():
    pipeline = pipeline_of(class_names=NAMES)
    call = {"num_inference_steps": 4, "output_type": "pt", "strength": 0.8}
    images = [picture(), picture(seed=1)]
    both = pipeline.image_to_image(
        images, class_labels=["cat", "dog"], num_images=2, generator=seeded(0, 1, 2, 3), **call
    ).images
    dog = pipeline.image_to_image(
        images[1], class_labels="dog", num_images=2, generator=seeded(2, 3), **call
    ).images
    torch.testing.assert_close(both[2:], dog, rtol=0, atol=1e-4)  # rounding of the batch


@pytest.mark.slow
def test_a_class_is_changed_by_inversion_and_the_same_class_gives_the_image_back():
    options = {"num_train_timesteps": 200, "prediction_type": "v_prediction", "clip_sample": False}
    pipeline = pipeline_of(class_names=NAMES, **options)
    latents = pipeline.invert(picture(), class_labels="cat")
    before = np.asarray(picture()) / 255
    cat, dog = (
        np.abs(
            pipeline(1, latents=latents, class_labels=name, eta=0.0, output_type="np").images[0]
            - before
        ).mean()
        for name in NAMES
    )
    assert cat < 0.01 < 0.03 < dog  # the error of inversion is of first order in the step


def test_the_standard_deviation_of_one_draw_is_refused(pipeline):
    with pytest.raises(ValueError, match="`return_std` needs `num_images` of at least 2, got 1"):
        pipeline.inpaint(picture(), half_mask(), return_std=True)


def test_the_recommended_setting_edits_with_its_scheduler_and_steps():
    recommended = {"scheduler": "DPMSolverMultistep", "num_inference_steps": 8}
    pipeline = pipeline_of(recommended=recommended)
    call = use_recommended(pipeline)
    assert isinstance(pipeline.scheduler, DPMSolverMultistepScheduler)
    steps = []
    varied = pipeline.image_to_image(
        picture(), **call, callback_on_step_end=lambda pipe, i, t, tensors: steps.append(i) or {}
    )
    assert varied.images[0].size == (8, 8)
    assert steps == [0, 1, 2, 3]  # half of the 8
    drawn = pipeline.inpaint(picture(), half_mask(), **call).images[0]
    assert (np.asarray(drawn)[:, :4] == np.asarray(picture())[:, :4]).all()


def test_the_recommended_noise_is_an_argument_of_every_method():
    recommended = {"scheduler": "DDIM:eta=0.5", "num_inference_steps": 4}
    pipeline = pipeline_of(recommended=recommended)
    call = use_recommended(pipeline)
    assert call == {"num_inference_steps": 4, "eta": 0.5}
    latents = pipeline.invert(picture(), **call)
    outputs = [
        pipeline.inpaint(picture(), half_mask(), **call),
        pipeline.image_to_image(picture(), **call),
        pipeline.interpolate(picture(), picture(seed=1), 2, **call),
        pipeline.combine([latents, picture()], [1.0, 2.0], **call),
    ]
    assert [len(output.images) for output in outputs] == [1, 1, 2, 1]


@pytest.mark.slow
def test_a_network_with_a_learned_variance_edits():
    unet = tiny_unet(in_channels=3, out_channels=6)
    unet.register_to_config(_ddpm_hf=image_facts_of("RGB", 8, 8))
    pipeline = GaussianDDPMPipeline(unet, tiny_scheduler(variance_type="learned_range"))
    pipeline.set_progress_bar_config(disable=True)
    for method in ("covariance", "repaint"):
        drawn = pipeline.inpaint(picture(), half_mask(), method=method, num_inference_steps=3)
        assert (np.asarray(drawn.images[0])[:, :4] == np.asarray(picture())[:, :4]).all()
    guidance = {"guidance": lambda x_t, x_0, t: x_0.sum((1, 2, 3)), "num_inference_steps": 3}
    assert pipeline.image_to_image(picture(), **guidance).images[0].size == (8, 8)
    assert len(pipeline.interpolate(picture(), picture(seed=1), 2, **guidance).images) == 2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["covariance", "repaint"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_networks_of_16_bits_edit_and_keep_the_known_pixels(method, dtype):
    pipeline = pipeline_of()
    pipeline.unet.to(dtype)
    output = pipeline.inpaint(picture(), half_mask(), method=method, num_inference_steps=3)
    assert (np.asarray(output.images[0])[:, :4] == np.asarray(picture())[:, :4]).all()
    assert pipeline.invert(picture(), num_inference_steps=3).dtype == torch.float32


def test_grey_images_of_16_bits_keep_every_known_bit():
    unet = tiny_unet()
    unet.register_to_config(_ddpm_hf=image_facts_of("L", 8, 8, bit_depth=16))
    pipeline = GaussianDDPMPipeline(unet, tiny_scheduler())
    image = Image.fromarray(np.random.default_rng(0).integers(0, 2**16, (8, 8), np.uint16))
    drawn = pipeline.inpaint(image, half_mask(), num_inference_steps=3).images[0]
    assert drawn.mode == image.mode
    assert (np.asarray(drawn)[:, :4] == np.asarray(image)[:, :4]).all()


def test_a_stock_repository_is_edited_through_load(tmp_path):
    save_stock(tmp_path / "stock")
    pipeline = load(str(tmp_path / "stock"))
    drawn = pipeline.inpaint(picture("L"), half_mask(), num_inference_steps=3).images[0]
    assert (np.asarray(drawn)[:, :4] == np.asarray(picture("L"))[:, :4]).all()
    assert pipeline.image_to_image(picture("L"), num_inference_steps=4).images[0].size == (8, 8)


WITHOUT_PACKAGE = """
import sys
sys.modules["ddpm_hf"] = None  # from here on `import ddpm_hf` fails
import diffusers, numpy, torch
from PIL import Image
folder = sys.argv[1]
pipe = diffusers.DiffusionPipeline.from_pretrained(
    folder, custom_pipeline=folder, trust_remote_code=True
)
image, mask = Image.open(folder + "/image.png"), Image.open(folder + "/mask.png")
options = {"num_inference_steps": 4, "output_type": "np"}
generator = torch.Generator().manual_seed(0)
images = [
    pipe.inpaint(image, mask, num_images=2, generator=generator, **options).images,
    pipe.image_to_image(image, strength=0.5, generator=generator, **options).images,
    pipe.interpolate(image, image.rotate(90), 3, **options).images,
]
noise = pipe.invert(image, num_inference_steps=4)
assert noise.shape == (1, 3, 8, 8)
guided = pipe(1, generator, guidance=lambda x_t, x_0, t: x_0.sum((1, 2, 3)), **options)
numpy.save(folder + "/images.npy", numpy.concatenate([*images, guided.images]))
"""


@pytest.mark.slow
def test_a_checkpoint_edits_without_the_package(tmp_path, pipeline):
    pipeline.save_pretrained(tmp_path)
    picture().save(tmp_path / "image.png")
    half_mask().save(tmp_path / "mask.png")
    run_forked(["-c", WITHOUT_PACKAGE, tmp_path]).check_returncode()
    options = {"num_inference_steps": 4, "output_type": "np"}
    generator = torch.Generator().manual_seed(0)
    images = [
        pipeline.inpaint(picture(), half_mask(), num_images=2, generator=generator, **options),
        pipeline.image_to_image(picture(), strength=0.5, generator=generator, **options),
        pipeline.interpolate(picture(), picture().rotate(90), 3, **options),
        pipeline(1, generator, guidance=lambda x_t, x_0, t: x_0.sum((1, 2, 3)), **options),
    ]
    want = np.concatenate([output.images for output in images])
    np.testing.assert_allclose(np.load(tmp_path / "images.npy"), want, rtol=0, atol=1e-5)


def test_image_to_image_refuses_a_scheduler_of_other_noise_levels():
    pipeline = pipeline_of()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(TypeError, match="over the betas that the network was trained with"):
        pipeline.image_to_image(picture(), num_inference_steps=2)
    with pytest.raises(TypeError, match="over the betas that the network was trained with"):
        pipeline.image_to_image_gain(num_inference_steps=2)

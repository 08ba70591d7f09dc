"""`encode_images`: the inverse of `decode_images` for every mode, bit depth and padding."""

import numpy as np
import pytest
import torch
from checkpoints import image_facts_of, tiny_pipeline, tiny_unet
from PIL import Image
from torch.testing import assert_close

from ddpm_hf.data import TrainingImages

CHANNELS = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}
# Four levels: height and width are multiples of 8, so that 28 x 20 pixels become 32 x 24.
BLOCKS = {
    "block_out_channels": (8, 8, 8, 8),
    "down_block_types": ("DownBlock2D",) * 4,
    "up_block_types": ("UpBlock2D",) * 4,
}


def pipeline_of(mode, bit_depth=8, **facts):
    unet = tiny_unet(in_channels=CHANNELS[mode], sample_size=(28, 20), **BLOCKS)
    return tiny_pipeline(unet, facts=image_facts_of(mode, 28, 20, bit_depth, **facts))


def random_pixels(mode, bit_depth=8, num_images=2):
    """All kinds of levels, with 0 and the maximum, (B, H, W, C)."""
    dtype = np.uint16 if bit_depth == 16 else np.uint8
    shape = (num_images, 28, 20, CHANNELS[mode])
    pixels = np.random.default_rng(0).integers(2**bit_depth, size=shape, dtype=dtype)
    pixels[:, 0, 0], pixels[:, 0, 1] = 0, 2**bit_depth - 1
    return pixels


@pytest.mark.slow
@pytest.mark.parametrize("bit_depth", [8, 16])
@pytest.mark.parametrize("mode", CHANNELS)
def test_pixels_survive_encoding_and_decoding(mode, bit_depth):
    pipeline, pixels = pipeline_of(mode, bit_depth), random_pixels(mode, bit_depth)
    x_0 = pipeline.encode_images(pixels)
    assert (x_0.dtype, tuple(x_0.shape)) == (torch.float32, (2, CHANNELS[mode], 32, 24))
    assert (x_0.min(), x_0.max()) == (-1, 1)
    decoded = pipeline.decode_images(x_0, "np")
    assert np.array_equal((decoded * (2**bit_depth - 1)).round(), pixels)
    # Floating point is rounded once more: 1 bit in 24.
    assert_close(pipeline.encode_images(decoded), x_0, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("mode", "bit_depth"), [("L", 8), ("LA", 8), ("RGB", 8), ("RGBA", 8), ("L", 16)]
)
def test_pil_images_survive_encoding_and_decoding(mode, bit_depth):
    pipeline, pixels = pipeline_of(mode, bit_depth), random_pixels(mode, bit_depth)
    images = [Image.fromarray(p[..., 0] if mode == "L" else p) for p in pixels]
    x_0 = pipeline.encode_images(images)
    assert torch.equal(x_0, pipeline.encode_images(pixels))
    for image, decoded in zip(images, pipeline.decode_images(x_0), strict=True):
        assert decoded.mode == image.mode
        assert np.array_equal(decoded, image)


def test_every_kind_of_image_gives_the_same_x_0():
    pipeline, pixels = pipeline_of("RGB"), random_pixels("RGB")
    tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    expected = pipeline.encode_images(pixels)
    for images in (tensor, list(tensor), list(pixels), [pixels[:1], tensor[1]]):
        assert torch.equal(pipeline.encode_images(images), expected)
    for images in (pixels / 255.0, (pixels / 255.0).astype(np.float16), tensor / 255.0):
        atol = 1e-3 if images.dtype == np.float16 else 1e-6  # 11 bits, 24 bits
        assert_close(pipeline.encode_images(images), expected, rtol=0, atol=atol)
    one = pipeline.encode_images(Image.fromarray(pixels[1]))
    assert torch.equal(one, expected[1:])


def test_x_0_is_what_training_sees():
    pipeline, pixels = pipeline_of("RGB"), random_pixels("RGB")
    tensors = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    training = TrainingImages(list(tensors), size_multiple=8)
    expected = torch.stack([training[0, i] for i in range(2)])
    assert torch.equal(pipeline.encode_images(pixels), expected)


def test_8_bit_images_fit_a_model_of_16_bits():
    pipeline, pixels = pipeline_of("RGB", 16), random_pixels("RGB")
    images = [Image.fromarray(p) for p in pixels]
    expected = pipeline.encode_images(pixels.astype(np.uint16) * 257)
    assert_close(pipeline.encode_images(images), expected, rtol=0, atol=1e-6)


def test_a_model_without_facts_takes_the_mode_of_its_channels():
    pipeline, image = tiny_pipeline(tiny_unet(in_channels=3)), Image.new("RGB", (8, 8))
    assert pipeline.encode_images(image).shape == (1, 3, 8, 8)
    with pytest.raises(ValueError, match=r"mode RGB.*got L; use image.convert\("):
        pipeline.encode_images(image.convert("L"))
    five = tiny_pipeline(tiny_unet(in_channels=5))
    assert five.encode_images(np.zeros((8, 8, 5), np.uint8)).shape == (1, 5, 8, 8)


def test_grey_arrays_need_no_channel_axis():
    pipeline, pixels = pipeline_of("L"), random_pixels("L")
    assert torch.equal(pipeline.encode_images(pixels[0, ..., 0]), pipeline.encode_images(pixels[0]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (Image.new("RGBA", (20, 28)), ValueError, "mode RGB for this model, got RGBA"),
        (Image.new("RGB", (28, 20)), ValueError, r"\(3, 28, 20\).*got \(3, 20, 28\)"),
        (np.zeros((28, 20, 1), np.uint8), ValueError, r"\(3, 28, 20\).*got \(1, 28, 20\)"),
        (np.zeros((28, 20), np.uint8), ValueError, r"\(3, 28, 20\).*got \(1, 28, 20\)"),
        (torch.zeros(28, 20, 3), ValueError, r"\(3, 28, 20\).*got \(28, 20, 3\)"),
        (np.zeros((28, 20, 3), np.uint16), ValueError, "8 bits.*got uint16"),
        (np.zeros((28, 20, 3), np.int64), TypeError, "uint8, uint16 or floating.*got torch.int64"),
        (np.full((28, 20, 3), -1.0), ValueError, r"in \[0, 1\], got values in -1..-1"),
        (torch.full((3, 28, 20), 255.0), ValueError, r"in \[0, 1\], got values in 255..255"),
        (torch.full((3, 28, 20), float("nan")), ValueError, r"in \[0, 1\], got values in nan"),
        (torch.zeros(28, 20), TypeError, r"got shape \(28, 20\)"),
        ("image.png", TypeError, "got str"),
        (None, TypeError, "got NoneType"),
        ([], ValueError, "at least one image"),
        (np.zeros((0, 28, 20, 3), np.float32), ValueError, "at least one image"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_an_image_that_does_not_fit_is_named(images, error, message):
    with pytest.raises(error, match=f"`images`.*{message}"):
        pipeline_of("RGB").encode_images(images)

"""Edit of a picture: its pictures, its sampler, and the draws."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from ddpm_hf.diffusion.atomic_files import check_regular
from ddpm_hf.diffusion.denoising_pipeline import EditingOutput
from ddpm_hf.diffusion.image_format import image_facts, size_and_window
from ddpm_hf.diffusion.pipeline import GaussianDDPMPipeline
from ddpm_hf.pictures import Pixels
from ddpm_hf.randomness import seed_of
from ddpm_hf.sampling.edit_options import EditOptions, is_ddpm_or_ddim
from ddpm_hf.sampling.sampler_choice import SamplerSetting, choose_setting

DEFAULT_STEPS = 50
# Modes that a picture can be converted to without loss.
_LOSSLESS = {"1": ("L", "RGB", "RGBA"), "L": ("RGB", "RGBA"), "P": ("RGBA",), "RGB": ("RGBA",)}
_LOSSLESS_IF_OPAQUE = {"P": ("RGB",), "LA": ("L", "RGB"), "RGBA": ("RGB",)}


@dataclass(frozen=True)
class EditPictures:
    """The pictures of an edit, upright."""

    image: Image.Image
    mask: Image.Image | None
    between: Image.Image | None

    @classmethod
    def read(cls, image: Path, options: EditOptions) -> "EditPictures":
        """The pictures of the files that the options name."""
        paths = (options.mask_image, options.between)
        return cls(_open(image), *(None if path is None else _open(path) for path in paths))

    def digest(self) -> str:
        """Digest of their pixels."""
        pixels = hashlib.sha256()
        for picture in (self.image, self.mask, self.between):
            if picture is not None:
                pixels.update(repr((picture.mode, picture.size)).encode() + picture.tobytes())
        return pixels.hexdigest()


def _open(path: Path) -> Image.Image:
    try:
        check_regular(path)
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).copy()
    except OSError as error:
        is_unknown = isinstance(error, UnidentifiedImageError)
        reason = "not a picture that Pillow can read" if is_unknown else error.strerror or error
        raise ValueError(f"{path} cannot be read: {reason}") from None


class PictureEdit:
    """Draws batches of an edit.

    Args:
        pipeline: its scheduler is replaced by that of the setting.
        pictures: the pictures.
        options: kind of the edit and its sampler.
    Attributes:
        setting: the sampler.
    Raises:
        ValueError: for pictures that do not fit the model, and as `choose_setting`.
    """

    def __init__(
        self, pipeline: GaussianDDPMPipeline, pictures: EditPictures, options: EditOptions
    ) -> None:
        self.pipeline, self.pictures, self.options = pipeline, pictures, options
        self.setting = _edit_setting(pipeline, options)
        pipeline.scheduler = self.setting.scheduler
        self._image = _fitted("image", pictures.image, pipeline)
        self._between = pictures.between and _fitted("between", pictures.between, pipeline)

    def batches(self) -> list[range]:
        """Indices of the draws in each batch; one batch for edits without noise."""
        number, size = self.options.num_images, self.options.batch_size
        if self.options.kind in ("interpolate", "change class"):
            return [range(number if self.options.kind == "interpolate" else 1)]
        return [range(first, min(first + size, number)) for first in range(0, number, size)]

    def draw(self, indices: range) -> Pixels:
        """Images (B, H, W, C), float32 in [0, 1]."""
        options, device = self.options, self.pipeline.device
        edits = {
            "inpaint": self._inpaint,
            "image to image": self._image_to_image,
            "interpolate": self._interpolate,
            "change class": self._change_class,
        }
        seeds = [seed_of(options.seed, "edit", i) for i in indices]
        output = edits[options.kind](
            len(indices),
            generator=[torch.Generator(device).manual_seed(seed) for seed in seeds],
            class_labels=options.class_labels[0] if options.class_labels else None,
            guidance_scale=options.guidance_scale,
            output_type="np",
            **self.setting.arguments(),
        )
        images: Pixels = output.images
        return images

    def _inpaint(self, num_images: int, **call: Any) -> EditingOutput:
        return self.pipeline.inpaint(
            self._image,
            self.pictures.mask,
            num_images=num_images,
            method=self.options.method,
            jump_length=self.options.jump_length,
            jump_n_sample=self.options.jump_n_sample,
            **call,
        )

    def _image_to_image(self, num_images: int, **call: Any) -> EditingOutput:
        return self.pipeline.image_to_image(
            self._image,
            strength=self.options.strength,
            log_snr=self.options.log_snr,
            num_images=num_images,
            **call,
        )

    def _interpolate(self, num_images: int, **call: Any) -> EditingOutput:
        return self.pipeline.interpolate(self._image, self._between, num_images, **call)

    def _change_class(self, num_images: int, **call: Any) -> EditingOutput:
        """DDIM inversion with the class of the picture, DDIM with the new one."""
        latents = self.pipeline.invert(
            self._image, class_labels=self.options.source_class, **self.setting.arguments()
        )
        return self.pipeline.combine([latents], [1.0], **call)

    def expected_gain(self) -> float | None:
        """See `edited_images.EditedImages`; computed without the network."""
        if self.options.kind != "image to image":
            return None
        return self.pipeline.image_to_image_gain(
            strength=self.options.strength,
            log_snr=self.options.log_snr,
            **self.setting.arguments(),
        )


def _edit_setting(pipeline: GaussianDDPMPipeline, options: EditOptions) -> SamplerSetting:
    """The sampler of an edit: as `choose_setting`, with 50 steps where no number is chosen.

    Only image to image runs on any scheduler. Other edits run the steps of DDPM or DDIM: they use
    the recommended setting if it is one of these.

    Raises:
        ValueError: as `choose_setting`.
    """
    setting = choose_setting(pipeline, options)
    is_bound = options.kind != "image to image"
    if is_bound and setting.recommended and not is_ddpm_or_ddim(setting.recommended):
        setting = SamplerSetting(pipeline.scheduler)
    if options.thorough or setting.num_inference_steps or setting.timesteps:
        return setting
    number = min(DEFAULT_STEPS, pipeline.scheduler.config.num_train_timesteps)
    return replace(setting, num_inference_steps=number)


def _fitted(name: str, picture: Image.Image, pipeline: GaussianDDPMPipeline) -> Image.Image:
    """The picture in the model's mode, where the conversion loses nothing.

    Raises:
        ValueError: for a picture of another size or mode; `name` is the option that it comes from.
    """
    unet = pipeline.unet
    _, window = size_and_window(unet, image_facts(unet))
    height, width = (side.stop - side.start for side in window)
    if picture.size != (width, height):
        raise ValueError(
            f"`{name}` must have {width}x{height} pixels, as the images of this model, got"
            f" {picture.width}x{picture.height}: resize it"
        )
    mode = {1: "L", 3: "RGB", 4: "RGBA"}.get(unet.config.in_channels)
    if mode in (None, picture.mode) or (mode, picture.mode) == ("L", "I;16"):
        return picture  # the pipeline checks the bit depth
    if mode in _LOSSLESS.get(picture.mode, ()):
        return picture.convert(mode)
    if mode in _LOSSLESS_IF_OPAQUE.get(picture.mode, ()) and _is_opaque(picture):
        return picture.convert(mode)
    is_transparent = " with transparency" if picture.has_transparency_data else ""
    raise ValueError(
        f"`{name}` must have mode {mode}, as the images of this model, got {picture.mode}"
        f"{is_transparent}: convert it"
    )


def _is_opaque(picture: Image.Image) -> bool:
    lowest, _ = picture.convert("RGBA").getchannel("A").getextrema()
    return lowest == 255

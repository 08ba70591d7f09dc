"""Edits of a picture file into a folder, drawn in batches and resumed after an interruption."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image, ImageOps

from ddpm_hf.diffusion.atomic_files import (
    check_regular,
    read_json,
    remove_folder,
    replacing_file,
    write_text,
)
from ddpm_hf.diffusion.image_format import image_facts, size_and_window
from ddpm_hf.diffusion.pipeline import GaussianDDPMPipeline
from ddpm_hf.diffusion.pipeline_editing import Conditioning, EditingOutput
from ddpm_hf.digests import weights_digest
from ddpm_hf.locks import exclusive_folder
from ddpm_hf.pictures import Pixels, image_grid, to_pil
from ddpm_hf.randomness import seed_of
from ddpm_hf.sampling.edit_options import EditOptions, is_ddpm_or_ddim
from ddpm_hf.sampling.sampler_choice import SamplerSetting, choose_setting
from ddpm_hf.shared_work import (
    array_bytes,
    compute_missing_files,
    distributed_state,
    on_main_process,
    read_array,
)

RECORD_NAME = "edit.json"
DEFAULT_STEPS = 50
_PARTS = ".batches"
# Modes that a picture can be converted to without loss.
_LOSSLESS = {"1": ("L", "RGB", "RGBA"), "L": ("RGB", "RGBA"), "P": ("RGBA",), "RGB": ("RGBA",)}


@dataclass(frozen=True)
class EditedImages:
    """Result of `edit_images`.

    Attributes:
        folder: its folder, with 000.png, ..., grid.png, edit.json and, for draws, std.png.
        images: (N, H, W, C), float32 in [0, 1].
        std: standard deviation over the draws, (H, W, C); None for fewer than 2 draws.
        expected_gain: share of the contrast of the picture that image to image keeps, for Gaussian
            data; None for other edits.
    """

    folder: Path
    images: Pixels
    std: Pixels | None
    expected_gain: float | None


def edit_setting(pipeline: GaussianDDPMPipeline, options: EditOptions) -> SamplerSetting:
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


def edit_images(
    pipeline: GaussianDDPMPipeline,
    image: Path,
    folder: Path,
    options: EditOptions,
    *,
    setting: SamplerSetting | None = None,
    overwrite: bool = False,
    model: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> EditedImages:
    """Edit a picture, or draw the images that are missing in `folder`.

    All processes of `accelerate launch` call this function and share the draws.

    Args:
        pipeline: on the device of this process; its scheduler is replaced by that of the setting.
        image: file of the picture.
        folder: for the images, a grid and the record; created if missing.
        options: kind of the edit and its sampler.
        setting: result of `edit_setting`, which is the default.
        overwrite: replace images of other options.
        model: name of the model and further JSON values for the record.
        progress: show progress bars on the main process.
    Returns:
        the images, on all processes.
    Raises:
        ValueError: for pictures or options that do not fit the model or each other, a folder with
            images of other options or other files, or one that another process uses.
        OSError: if a file cannot be read or written.
    """
    state = distributed_state()
    pictures = EditPictures.read(image, options)
    edit = PictureEdit(pipeline, pictures, options, setting)
    record = _record(pipeline, pictures, options.to_dict() | edit.sampler, options.kind, model)
    with exclusive_folder(state, folder, "output"):
        on_main_process(state, lambda: _prepare_folder(folder, record, overwrite))
        images = _draw(state, edit, folder / _PARTS, progress)
        std = None
        if options.kind in ("inpaint", "image to image") and len(images) > 1:
            std = images.std(axis=0, ddof=1)
        on_main_process(state, lambda: _write(folder, images, std, pictures.image))
    return EditedImages(folder, images, std, edit.expected_gain())


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
        others = (path if path is None else _open(path) for path in paths)
        return cls(_open(image), *others)

    def digest(self) -> str:
        """Digest of their pixels."""
        pixels = hashlib.sha256()
        for picture in (self.image, self.mask, self.between):
            if picture is not None:
                pixels.update(repr((picture.mode, picture.size)).encode() + picture.tobytes())
        return pixels.hexdigest()


def _open(path: Path) -> Image.Image:
    try:
        check_regular(Path(path))
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).copy()
    except OSError as error:
        reason = error.strerror or "not a picture that Pillow can read"
        raise ValueError(f"{path} cannot be read: {reason}") from None


class PictureEdit:
    """Draws batches of an edit.

    Args:
        pipeline: its scheduler is replaced by that of the setting.
        pictures: the pictures.
        options: kind of the edit and its sampler.
        setting: result of `edit_setting`, which is the default.
    Raises:
        ValueError: as `edit_setting`.
    """

    def __init__(
        self,
        pipeline: GaussianDDPMPipeline,
        pictures: EditPictures,
        options: EditOptions,
        setting: SamplerSetting | None = None,
    ) -> None:
        setting = edit_setting(pipeline, options) if setting is None else setting
        pipeline.scheduler = setting.scheduler
        self.sampler = dict(setting.arguments())
        self._pipeline, self._pictures, self._options = pipeline, pictures, options
        labels = options.class_labels
        self._conditioning: Conditioning = {
            "class_labels": labels[0] if labels else None,
            "guidance_scale": options.guidance_scale,
        }
        self._image = _fitted("image", pictures.image, pipeline)
        self._between = pictures.between and _fitted("between", pictures.between, pipeline)

    def batches(self) -> list[range]:
        """Indices of the draws in each batch; one batch for edits without noise."""
        number, size = self._options.num_images, self._options.batch_size
        if self._options.kind in ("interpolate", "change class"):
            return [range(number if self._options.kind == "interpolate" else 1)]
        return [range(first, min(first + size, number)) for first in range(0, number, size)]

    def draw(self, indices: range) -> Pixels:
        """Images (B, H, W, C), float32 in [0, 1]."""
        edits = {
            "inpaint": self._inpaint,
            "image to image": self._image_to_image,
            "interpolate": self._interpolate,
            "change class": self._change_class,
        }
        seeds = [seed_of(self._options.seed, "edit", i) for i in indices]
        device = self._pipeline.device
        generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        images: Pixels = edits[self._options.kind](generators).images
        return images

    def _inpaint(self, generators: list[torch.Generator]) -> EditingOutput:
        return self._pipeline.inpaint(
            self._image,
            self._pictures.mask,
            num_images=len(generators),
            generator=generators,
            method=self._options.method,
            jump_length=self._options.jump_length,
            jump_n_sample=self._options.jump_n_sample,
            output_type="np",
            **self.sampler,
            **self._conditioning,
        )

    def _image_to_image(self, generators: list[torch.Generator]) -> EditingOutput:
        return self._pipeline.image_to_image(
            self._image,
            strength=self._options.strength,
            log_snr=self._options.log_snr,
            num_images=len(generators),
            generator=generators,
            output_type="np",
            **self.sampler,
            **self._conditioning,
        )

    def _interpolate(self, generators: list[torch.Generator]) -> EditingOutput:
        return self._pipeline.interpolate(
            self._image,
            self._between,
            len(generators),
            generator=generators,
            output_type="np",
            **self.sampler,
            **self._conditioning,
        )

    def _change_class(self, generators: list[torch.Generator]) -> EditingOutput:
        """DDIM inversion with the class of the picture, DDIM with the new one."""
        latents = self._pipeline.invert(
            self._image, class_labels=self._options.source_class, **self.sampler
        )
        return self._pipeline.combine(
            [latents],
            [1.0],
            generator=generators,
            output_type="np",
            **self.sampler,
            **self._conditioning,
        )

    def expected_gain(self) -> float | None:
        """See `EditedImages`; computed without the network."""
        if self._options.kind != "image to image":
            return None
        return self._pipeline.image_to_image_gain(
            strength=self._options.strength, log_snr=self._options.log_snr, **self.sampler
        )


def _fitted(name: str, picture: Image.Image, pipeline: GaussianDDPMPipeline) -> Image.Image:
    """The picture in the model's mode, where the conversion loses nothing.

    Raises:
        ValueError: for a picture of another size; `name` is the option that it comes from.
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
    is_lossless = mode in _LOSSLESS.get(picture.mode, ())
    return picture.convert(mode) if is_lossless else picture


def _draw(state: PartialState, edit: PictureEdit, folder: Path, progress: bool) -> Pixels:
    batches = edit.batches()
    paths = [folder / f"batch-{i:04}.npy" for i in range(len(batches))]

    def content(number: int) -> bytes:
        return array_bytes(edit.draw(batches[number]))

    sizes = list(map(len, batches))
    try:
        compute_missing_files(state, paths, sizes, content, read_array, progress=progress)
    except (ValueError, OSError):
        if state.is_main_process and not any(path.exists() for path in paths):
            (folder.parent / RECORD_NAME).unlink()  # nothing to resume
            remove_folder(folder)
        raise
    return np.concatenate([read_array(path) for path in paths])


def _record(
    pipeline: GaussianDDPMPipeline,
    pictures: EditPictures,
    options: Mapping[str, Any],
    kind: str,
    model: Mapping[str, Any] | None,
) -> Mapping[str, Any]:
    chosen = {name: value for name, value in options.items() if value is not None}
    return {
        "format_version": 1,
        "kind": kind,
        "model": dict(model or {}),
        "settings": {
            **{k: v for k, v in chosen.items() if k not in ("mask_image", "between")},
            "pictures": pictures.digest(),
            "weights": weights_digest(pipeline.unet),
            "scheduler_config": json.loads(pipeline.scheduler.to_json_string()),
        },
    }


def _prepare_folder(folder: Path, record: Mapping[str, Any], overwrite: bool) -> None:
    """Write the record, unless an equal one is there.

    Raises:
        ValueError: if the folder has images of other options, or other files.
    """
    existing = read_json(folder / RECORD_NAME)
    if existing.get("settings") == json.loads(json.dumps(record["settings"])):
        return
    others = [path for path in folder.iterdir() if not path.name.startswith(".")]
    if others and not existing:
        raise ValueError(f"{folder} contains other files: choose another `output`")
    if others and not overwrite:
        before, now = existing.get("settings") or {}, record["settings"]
        changed = next((k for k in {**before, **now} if before.get(k) != now.get(k)), "settings")
        raise ValueError(
            f"{folder} contains an edit with another `{changed}`: pass `overwrite=True` to replace"
            " it, or choose another `output`"
        )
    for path in others:
        path.unlink()
    remove_folder(folder / _PARTS)
    write_text(folder / RECORD_NAME, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def _write(folder: Path, images: Pixels, std: Pixels | None, image: Image.Image) -> None:
    """The pictures: each image, all of them in a grid after the original, and the spread."""
    width = max(3, len(str(len(images) - 1)))
    drawn = [to_pil(pixels) for pixels in images]
    for i, picture in enumerate(drawn):
        _save(picture, folder / f"{i:0{width}}.png")
    _save(image_grid([image, *drawn]), folder / "grid.png")
    if std is not None:
        _save(image_grid([std.mean(-1, keepdims=True) / max(std.max(), 1e-6)]), folder / "std.png")


def _save(picture: Image.Image, path: Path) -> None:
    with replacing_file(path) as temporary:
        picture.save(temporary, format="PNG")

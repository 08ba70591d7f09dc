"""Edits of a picture, as `ddpm-hf edit` makes them."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ddpm_hf.app.request_errors import RequestError
from ddpm_hf.app.requests import (
    MAX_GUIDANCE,
    MAX_SEED,
    RECOMMENDED,
    class_of,
    number,
    short,
    whole,
)
from ddpm_hf.app.served_models import ServedModel
from ddpm_hf.app.working import watched
from ddpm_hf.pictures import Pixels
from ddpm_hf.sampling.edit_options import EditOptions
from ddpm_hf.sampling.picture_edit import EditPictures, PictureEdit

KINDS = ("inpaint", "vary", "between", "class")
METHODS = ("repaint", "covariance")
OWN_STEPS, THOROUGH = "steps", "thorough"
DEFAULT_STEPS = 25
MAX_REPETITIONS = 20
# Names of the visitor's pictures in lines of code.
PICTURE, MASK, SECOND = (Path(name) for name in ("picture.png", "mask.png", "second.png"))


@dataclass(frozen=True)
class EditRequest:
    """An edit with all values in range.

    Attributes:
        options: as of `ddpm-hf edit`, with placeholders for the names of pictures.
        pictures: the pictures.
    """

    options: EditOptions
    pictures: EditPictures

    @classmethod
    def of(
        cls,
        model: ServedModel,
        kind: Any,
        picture: Image.Image,
        *,
        mask: Image.Image | None = None,
        second: Image.Image | None = None,
        strength: Any = 0.5,
        method: Any = METHODS[0],
        repetitions: Any = 5,
        source_class: Any = None,
        class_label: Any = None,
        guidance_scale: Any = 1.0,
        num_images: Any = 6,
        seed: Any = 0,
        sampler: Any = OWN_STEPS,
        num_inference_steps: Any = None,
    ) -> "EditRequest":
        """The request for a model.

        Args:
            model: the model.
            kind: one of `KINDS`.
            picture: in the format of the model.
            mask: for "inpaint": white where the picture is drawn anew.
            second: for "between": the other end.
            strength: for "vary": share of the steps.
            method: for "inpaint": one of `METHODS`.
            repetitions: passes of "repaint".
            source_class: for "class": class of the picture.
            class_label: class of the result.
            guidance_scale, num_images, seed: as of `ddpm-hf edit`.
            sampler: "recommended" for that of `ddpm-hf edit` without options, "thorough" for all
                steps of DDPM, "steps" for `num_inference_steps` of the model's scheduler.
            num_inference_steps: number of steps; None for 25.
        Raises:
            ValueError: for a value out of range, and for a missing picture.
        """
        _check_choice("kind", kind, KINDS)
        _check_choice("sampler", sampler, (RECOMMENDED, OWN_STEPS, THOROUGH))
        is_conditional = model.class_labels is not None
        labels: list[int | str] | None = None
        if is_conditional:
            labels = [model.class_name(class_of(model, class_label))]
        steps = _num_steps(model, num_inference_steps) if sampler == OWN_STEPS else None
        options = EditOptions(
            num_images=whole("num_images", num_images, 1, model.max_images),
            seed=whole("seed", seed, 0, MAX_SEED),
            guidance_scale=number("guidance_scale", guidance_scale, 0, MAX_GUIDANCE),
            thorough=sampler == THOROUGH,
            num_inference_steps=steps,
            class_labels=labels,
        )
        if kind == "inpaint":
            options = _inpainting(options, method, repetitions)
        elif kind == "vary":
            options = replace(options, strength=number("strength", strength, 0, 1))
        elif kind == "between":
            if second is None:
                raise RequestError("no_second")
            options = replace(options, between=SECOND)
        else:
            if not is_conditional:
                raise RequestError("no_classes")
            old_class = model.class_name(class_of(model, source_class))
            options = replace(options, num_images=1, source_class=old_class)
        return cls(options, EditPictures(picture, mask, second))


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise RequestError("choice", name=name, choices=", ".join(choices), value=short(value))


def _num_steps(model: ServedModel, number: Any) -> int:
    T = model.num_train_timesteps
    steps = min(DEFAULT_STEPS, T) if number is None else number
    return whole("num_inference_steps", steps, 1, T)


def _inpainting(options: EditOptions, method: Any, repetitions: Any) -> EditOptions:
    """The options with those of a method of inpainting."""
    _check_choice("method", method, METHODS)
    options = replace(options, mask_image=MASK, method=method)
    if method != METHODS[0]:
        return options
    passes = whole("repetitions", repetitions, 1, MAX_REPETITIONS)
    return replace(options, jump_length=1, jump_n_sample=passes)


@dataclass(frozen=True)
class EditResult:
    """Result of an edit.

    Attributes:
        images: (N, H, W, C), float32 in [0, 1].
        std: standard deviation over the draws, (H, W, C); None for edits without noise or draws.
        expected_gain: see `ddpm_hf.sampling.edited_images.EditedImages`.
    """

    images: Pixels
    std: Pixels | None
    expected_gain: float | None


def edit_picture(model: ServedModel, request: EditRequest) -> Generator[int, None, EditResult]:
    """Edit a picture; yields the number of network calls so far, a few times a second.

    The images are those of `ddpm-hf edit` with these options and a batch of all images.
    """
    pipeline = model.working_pipeline(model.pipeline.scheduler)
    edit = PictureEdit(pipeline, request.pictures, request.options)
    indices = range(request.options.num_images)
    images = yield from watched(model.pipeline.unet, lambda: edit.draw(indices))
    has_noise = request.options.kind in ("inpaint", "image to image")
    std = images.std(axis=0, ddof=1) if has_noise and len(images) > 1 else None
    return EditResult(images, std, edit.expected_gain())

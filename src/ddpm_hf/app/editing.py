"""Edits of a picture, as `ddpm-hf edit` makes them."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
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
        is_conditional = model.class_labels is not None
        values: dict[str, Any] = {
            "num_images": whole("num_images", num_images, 1, model.max_images),
            "seed": whole("seed", seed, 0, MAX_SEED),
            "guidance_scale": number("guidance_scale", guidance_scale, 0, MAX_GUIDANCE),
            **_sampler(model, sampler, num_inference_steps),
        }
        if is_conditional:
            values["class_labels"] = [model.class_name(class_of(model, class_label))]
        if kind == "inpaint":
            values |= {"mask_image": MASK, **_inpainting(method, repetitions)}
        elif kind == "vary":
            values["strength"] = number("strength", strength, 0, 1)
        elif kind == "between":
            values["between"] = SECOND
            if second is None:
                raise RequestError("no_second")
        elif not is_conditional:
            raise RequestError("no_classes")
        else:
            values |= {"num_images": 1}
            values["source_class"] = model.class_name(class_of(model, source_class))
        return cls(EditOptions(**values), EditPictures(picture, mask, second))


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise RequestError("choice", name=name, choices=", ".join(choices), value=short(value))


def _sampler(model: ServedModel, sampler: Any, num_steps: Any) -> dict[str, Any]:
    """Options of the sampler."""
    _check_choice("sampler", sampler, (RECOMMENDED, OWN_STEPS, THOROUGH))
    if sampler != OWN_STEPS:
        return {"thorough": sampler == THOROUGH}
    T = model.num_train_timesteps
    steps = min(DEFAULT_STEPS, T) if num_steps is None else num_steps
    return {"num_inference_steps": whole("num_inference_steps", steps, 1, T)}


def _inpainting(method: Any, repetitions: Any) -> dict[str, Any]:
    """Options of a method of inpainting."""
    _check_choice("method", method, METHODS)
    if method != METHODS[0]:
        return {"method": method}
    passes = whole("repetitions", repetitions, 1, MAX_REPETITIONS)
    return {"jump_length": 1, "jump_n_sample": passes}


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

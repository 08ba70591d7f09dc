"""Functions for gradio_client: draw, compare, inpaint, image_to_image, interpolate."""

from collections.abc import Callable, Generator, Mapping
from typing import Any

import gradio as gr
from PIL import Image

from ddpm_hf.app.comparison import ComparedSetting, compare_settings
from ddpm_hf.app.drawing import drawing_steps
from ddpm_hf.app.editing import EditRequest, EditResult, edit_picture
from ddpm_hf.app.request_errors import RequestError
from ddpm_hf.app.requests import ALL_CLASSES, RECOMMENDED, DrawRequest, short
from ddpm_hf.app.served_models import ServedModel
from ddpm_hf.app.site import Site
from ddpm_hf.app.snippets import command_line, python_lines
from ddpm_hf.app.uploads import open_mask, open_upload
from ddpm_hf.app.working import Pace, with_progress
from ddpm_hf.pictures import Pixels, to_pil

# Default of options whose default depends on the model; gradio_client requires an option without a
# default.
AUTO = "auto"


class Endpoints:
    """The functions, which check all of their arguments.

    Args:
        models: the models by name.
    """

    def __init__(self, models: Mapping[str, ServedModel]) -> None:
        self._models = models

    def draw(
        self, model: Any, num_images: Any, seed: Any, class_label: Any, guidance_scale: Any,
        sampler: Any, num_inference_steps: Any, eta: Any,
    ) -> Generator[Any]:  # fmt: skip
        """Images, and the lines of Python and of the command line that draw them."""
        served = self._model(model)
        request = DrawRequest.of(
            served,
            num_images=num_images,
            seed=seed,
            class_label=class_label,
            guidance_scale=guidance_scale,
            sampler=sampler,
            num_inference_steps=_optional("num_inference_steps", num_inference_steps),
            eta=_optional("eta", eta),
        )
        pace = Pace()
        for step in drawing_steps(served, request):
            if step.images is not None:
                lines = python_lines(served, request), command_line(served, request)
                yield _pictures(served, step.images), *lines
            elif pace.is_due():
                yield gr.skip(), gr.skip(), gr.skip()

    def compare(
        self, model: Any, samplers: Any, steps: Any, num_images: Any, seed: Any, class_label: Any
    ) -> Generator[Any]:
        """One image per setting, and a list with the cost of each setting."""
        served = self._model(model)
        done: list[ComparedSetting] = []
        options = {"num_images": num_images, "seed": seed, "class_label": class_label}
        for setting in compare_settings(served, samplers, steps, **options):
            if setting is None:
                yield gr.skip(), gr.skip()
            else:
                done.append(setting)
        images = [
            (picture, f"{s.sampler}, K = {s.num_inference_steps}")
            for s in done
            if s.images is not None
            for picture in _pictures(served, s.images)
        ]
        yield (
            images,
            [
                {
                    "sampler": s.sampler,
                    "num_inference_steps": s.num_inference_steps,
                    "seconds": s.seconds,
                    "network_calls": s.num_calls,
                    "bits_per_dim": s.bits_per_dim,
                    "problem": s.problem and str(s.problem),
                }
                for s in done
            ],
        )

    def inpaint(
        self, model: Any, image: Any, mask: Any, num_images: Any, seed: Any, class_label: Any,
        num_inference_steps: Any, repetitions: Any,
    ) -> Generator[Any]:  # fmt: skip
        """Draws of the white part of the mask, and their standard deviation as an image."""
        served = self._model(model)
        request = EditRequest.of(
            served, "inpaint", open_upload(image, served), mask=open_mask(mask, served),
            num_images=num_images, seed=seed, class_label=_label(class_label),
            num_inference_steps=_optional("num_inference_steps", num_inference_steps),
            repetitions=repetitions,
        )  # fmt: skip
        result = yield from with_progress(edit_picture(served, request), _two_unchanged)
        yield _pictures(served, result.images), _std_picture(result)

    def image_to_image(
        self, model: Any, image: Any, strength: Any, num_images: Any, seed: Any,
        class_label: Any, num_inference_steps: Any,
    ) -> Generator[Any]:  # fmt: skip
        """Variations of the image, and the share of its contrast that is kept."""
        served = self._model(model)
        request = EditRequest.of(
            served, "vary", open_upload(image, served), strength=strength,
            num_images=num_images, seed=seed, class_label=_label(class_label),
            num_inference_steps=_optional("num_inference_steps", num_inference_steps),
        )  # fmt: skip
        result = yield from with_progress(edit_picture(served, request), _two_unchanged)
        yield _pictures(served, result.images), result.expected_gain

    def interpolate(
        self, model: Any, first: Any, second: Any, num_images: Any, class_label: Any,
        num_inference_steps: Any,
    ) -> Generator[Any]:  # fmt: skip
        """Images from the first to the second."""
        served = self._model(model)
        request = EditRequest.of(
            served, "between", open_upload(first, served), second=open_upload(second, served),
            num_images=num_images, class_label=_label(class_label),
            num_inference_steps=_optional("num_inference_steps", num_inference_steps),
        )  # fmt: skip
        result = yield from with_progress(edit_picture(served, request), lambda _: gr.skip())
        yield _pictures(served, result.images)

    def _model(self, name: Any) -> ServedModel:
        if isinstance(name, str) and name in self._models:
            return self._models[name]
        raise RequestError(
            "choice", name="model", choices=", ".join(self._models), value=short(name)
        )


def add_endpoints(site: Site) -> None:
    """Add the functions to the page, with invisible components that describe their values."""
    endpoints = Endpoints(site.models)
    with gr.Row(visible=False):
        model = gr.Textbox(site.first.name, label="model")
        number = gr.Number(6, label="num_images")
        seed = gr.Number(0, label="seed")
        label = gr.Textbox(ALL_CLASSES, label="class_label")
        one_class = gr.Textbox(AUTO, label="class_label")
        guidance = gr.Number(1, label="guidance_scale")
        sampler = gr.Textbox(RECOMMENDED, label="sampler")
        samplers = gr.JSON(["DDPM", "DDIM", "DPMSolverMultistep"], label="samplers")
        several_steps = gr.JSON([10, 25], label="steps")
        steps = gr.Textbox(AUTO, label="num_inference_steps")
        eta = gr.Textbox(AUTO, label="eta")
        strength = gr.Number(0.5, label="strength")
        repetitions = gr.Number(5, label="repetitions")
        image, other = (gr.File(label=name, type="filepath") for name in ("image", "second"))
        images, std = gr.Gallery(format="png", label="images"), gr.Image(format="png", label="std")
        python, command = gr.Textbox(label="python"), gr.Textbox(label="command")
        settings, gain = gr.JSON(label="settings"), gr.Number(label="expected_gain")

    def add(function: Callable[..., Any], inputs: list[Any], outputs: list[Any]) -> None:
        button = gr.Button(visible=False)
        site.on_click(button, function, inputs, outputs, api_name=function.__name__)

    add(endpoints.draw, [model, number, seed, label, guidance, sampler, steps, eta],
        [images, python, command])  # fmt: skip
    add(endpoints.compare, [model, samplers, several_steps, number, seed, label],
        [images, settings])  # fmt: skip
    add(endpoints.inpaint, [model, image, other, number, seed, one_class, steps, repetitions],
        [images, std])  # fmt: skip
    add(endpoints.image_to_image, [model, image, strength, number, seed, one_class, steps],
        [images, gain])  # fmt: skip
    add(endpoints.interpolate, [model, image, other, number, one_class, steps], [images])


def _optional(name: str, value: Any) -> float | None:
    """A number that may be given as text; None for "auto"."""
    if value in (None, AUTO, ""):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        raise RequestError("auto", name=name, value=short(value)) from None


def _label(label: Any) -> Any:
    return None if label == AUTO else label


def _pictures(model: ServedModel, images: Pixels) -> list[Image.Image]:
    return [to_pil(image, model.bit_depth) for image in images]


def _std_picture(result: EditResult) -> Image.Image | None:
    return None if result.std is None else to_pil(result.std.mean(-1, keepdims=True))


def _two_unchanged(_: int) -> tuple[Any, Any]:
    """Progress that changes neither of two outputs."""
    return gr.skip(), gr.skip()

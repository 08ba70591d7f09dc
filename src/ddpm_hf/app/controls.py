"""Controls of sampling, shared by tabs."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ddpm_hf.app.requests import (
    ALL_CLASSES,
    RECOMMENDED,
    SAMPLERS,
    DrawRequest,
    default_eta,
    usual_steps,
)
from ddpm_hf.app.served_models import ServedModel
from ddpm_hf.app.site import QUICK, Site
from ddpm_hf.app.translations import translated as t
from ddpm_hf.scheduler_spec import readable_names

SLIDER_GUIDANCE = 8.0


@dataclass(frozen=True)
class SamplingControls:
    """Components with the options of `DrawRequest.of`; `low` and `high` are its interval."""

    num_images: gr.Slider
    seed: gr.Number
    class_label: gr.Dropdown
    guidance_scale: gr.Slider
    low: gr.Number
    high: gr.Number
    sampler: gr.Dropdown
    num_inference_steps: gr.Slider
    eta: gr.Slider

    @classmethod
    def build(cls, model: ServedModel) -> "SamplingControls":
        """Create the components, with the values of a model."""
        given = _values(model)
        num_images = gr.Slider(1, label=t("num_images"), step=1, **given["num_images"])
        class_label = gr.Dropdown(label=t("class"), **given["class_label"])
        guidance_scale = gr.Slider(
            0, SLIDER_GUIDANCE, step=0.25, label=t("guidance"), info=t("guidance_info"),
            **given["guidance_scale"],
        )  # fmt: skip
        sampler = gr.Dropdown(label=t("sampler"), info=t("sampler_info"), **given["sampler"])
        steps = gr.Slider(1, step=1, label=t("num_steps"), **given["num_inference_steps"])
        with gr.Row(elem_classes="field-with-button"):
            seed = gr.Number(0, label=t("seed"), min_width=100, elem_id="seed")
            another = gr.Button(t("another"), min_width=80, size="md", elem_id="another")
        with gr.Accordion(t("more"), open=False):
            eta = gr.Slider(0, 1, step=0.05, label=t("eta"), info=t("eta_info"), **given["eta"])
            with gr.Row():
                low = gr.Number(label=t("low"), min_width=100, **given["low"])
                high = gr.Number(label=t("high"), min_width=100, **given["high"])
        another.click(lambda: random.randrange(10_000), None, seed, **QUICK)
        return cls(num_images, seed, class_label, guidance_scale, low, high, sampler, steps, eta)

    def components(self) -> list[Any]:
        """The components, in the order of the fields."""
        return [getattr(self, name) for name in self.__dataclass_fields__]

    def follow(self, site: Site, model: gr.Dropdown) -> None:
        """Adapt the components to the chosen model and sampler."""

        def for_model(name: str) -> list[Any]:
            return [gr.update(**given) for given in _values(site.models[name]).values()]

        def for_sampler(name: str, sampler: str) -> list[Any]:
            given = _values(site.models[name], sampler)
            return [gr.update(**given[key]) for key in ("num_inference_steps", "eta")]

        outputs = [getattr(self, name) for name in _values(site.first)]
        model.change(for_model, model, outputs, **QUICK)
        self.sampler.change(
            for_sampler, [model, self.sampler], [self.num_inference_steps, self.eta], **QUICK
        )


def request_of(model: ServedModel, values: Sequence[Any]) -> DrawRequest:
    """The request that the values of `SamplingControls.components` describe."""
    options = dict(zip(SamplingControls.__dataclass_fields__, values, strict=True))
    low, high = options.pop("low"), options.pop("high")
    interval = None if low is None and high is None else (low, high)
    return DrawRequest.of(model, guidance_interval=interval, **options)


def _values(model: ServedModel, sampler: str = RECOMMENDED) -> dict[str, dict[str, Any]]:
    """Properties of the components for a model."""
    labels = model.class_labels
    eta = default_eta(model, sampler)
    number = 6 if labels is None or len(labels) > 12 else len(labels)
    return {
        "num_images": {"maximum": model.max_images, "value": min(number, model.max_images)},
        "class_label": class_choices(model),
        "guidance_scale": {"value": 1.0, "visible": labels is not None},
        "low": {"value": None, "visible": labels is not None},
        "high": {"value": None, "visible": labels is not None},
        "sampler": {"choices": _samplers(model), "value": RECOMMENDED},
        "num_inference_steps": {
            "maximum": model.num_train_timesteps,
            "value": usual_steps(model, sampler),
        },
        "eta": {"value": eta or 0.0, "visible": eta is not None},
    }


def class_choices(model: ServedModel, all_classes: bool = True) -> dict[str, Any]:
    """Properties of a dropdown of classes, hidden for an unconditional model."""
    labels = model.class_labels
    # Numbers, not text: a class may have the number of another one as its name.
    classes = [] if labels is None else [(model.class_name(n), n) for n in labels]
    choices: list[tuple[str, str | int]] = [*classes]
    if all_classes:
        choices.insert(0, (_in_turn(classes), ALL_CLASSES))
    first = choices[0][1] if choices else None
    return {"choices": choices, "value": first, "visible": labels is not None}


def _in_turn(classes: Sequence[tuple[str, int]]) -> str:
    names = [name for name, _ in classes]
    return ", ".join(names[:3]) + ", ..." * (len(names) > 3)


def _samplers(model: ServedModel) -> list[tuple[str, str]]:
    """Labels and values of the choices, the recommended one first, or DDIM without one."""
    setting = model.recommended
    first = setting.recommended if setting and setting.recommended else "DDIM"
    readable = readable_names([first, *SAMPLERS])
    star = "\u2605 " if model.recommended else ""
    label = f"{star}{readable[first]}, {usual_steps(model, RECOMMENDED)}"
    return [(label, RECOMMENDED), *((readable[name], name) for name in SAMPLERS)]

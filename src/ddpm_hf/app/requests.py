"""Requests of visitors, checked on the server: types, ranges, and the limits of a model.

Values come from browsers and from gradio_client, so any of them may be of any type.
"""

import math
from dataclasses import dataclass
from typing import Any, Self

from ddpm_hf.app.served_models import USUAL_STEPS, ServedModel
from ddpm_hf.diffusion.class_choice import class_numbers
from ddpm_hf.options import Options, option
from ddpm_hf.sampling.class_labels import class_names_of
from ddpm_hf.sampling.options import SamplerOptions
from ddpm_hf.sampling.sampler_choice import SamplerSetting, choose_setting
from ddpm_hf.scheduler_spec import SchedulerSpec

ALL_CLASSES = "all"
RECOMMENDED = "recommended"
SAMPLERS = (
    "DDIM", "DDPM", "DPMSolverMultistep", "DPMSolverMultistep:algorithm_type=sde-dpmsolver++",
    "UniPCMultistep", "DEISMultistep", "PNDM", "HeunDiscrete", "EulerDiscrete",
    "EulerAncestralDiscrete",
)  # fmt: skip
"""Samplers of the page. `SchedulerSpec.parse_foreign` says which others are accepted."""
WITH_ETA = ("DDPM", "DDIM")
MAX_SEED = 2**63 - 1
MAX_GUIDANCE = 20.0
MAX_LOG_SNR = 100.0


@dataclass(frozen=True, kw_only=True)
class DrawRequest(Options):
    """Images to draw, with all values resolved and in range.

    Raises:
        OptionError: for a value out of range or of the wrong type.
    """

    num_images: int = option(6, "number of images", minimum=1)
    seed: int = option(0, "seed of the noise", minimum=0, maximum=MAX_SEED)
    class_labels: list[int] | None = option(None, "numbers of classes, taken in turn")
    guidance_scale: float = option(1.0, "scale of guidance", minimum=0, maximum=MAX_GUIDANCE)
    guidance_interval: tuple[float, float] | None = option(
        None,
        "range of the log signal-to-noise ratio with guidance",
        minimum=-MAX_LOG_SNR,
        maximum=MAX_LOG_SNR,
    )
    scheduler: str | None = option(None, "specification of the scheduler; None for the model's")
    num_inference_steps: int = option(USUAL_STEPS, "number of steps K", minimum=1)
    eta: float | None = option(None, "noise of each step", minimum=0, maximum=1)

    @classmethod
    def of(
        cls,
        model: ServedModel,
        *,
        num_images: Any = 6,
        seed: Any = 0,
        class_label: Any = ALL_CLASSES,
        guidance_scale: Any = 1.0,
        guidance_interval: Any = None,
        sampler: Any = RECOMMENDED,
        num_inference_steps: Any = None,
        eta: Any = None,
    ) -> Self:
        """The request for a model.

        Args:
            model: the model.
            num_images, seed: as of `ddpm-hf sample`.
            class_label: name or number of a class, or "all" for all classes in turn.
            guidance_scale: scale of classifier-free guidance.
            guidance_interval: (low, high), or None for all steps.
            sampler: "recommended" or the specification of a scheduler.
            num_inference_steps: K; None for the sampler's usual number.
            eta: noise of each step; None for the sampler's own.
        Raises:
            ValueError: for any value out of range, and for a combination that does not work.
        """
        spec, steps = _sampler(model, sampler)
        request = cls(
            num_images=whole("num_images", num_images),
            seed=whole("seed", seed),
            class_labels=_classes(model, class_label),
            guidance_scale=1.0
            if guidance_scale is None
            else number("guidance_scale", guidance_scale),
            guidance_interval=_interval(guidance_interval),
            scheduler=str(SchedulerSpec(spec.scheduler, spec.options)),
            num_inference_steps=(
                steps
                if num_inference_steps is None
                else whole("num_inference_steps", num_inference_steps)
            ),
            eta=_eta(spec, eta),
        )
        check_at_most("num_images", request.num_images, model.max_images)
        check_at_most("num_inference_steps", request.num_inference_steps, model.num_train_timesteps)
        request.setting(model)
        return request

    def setting(self, model: ServedModel) -> SamplerSetting:
        """The scheduler with its arguments, as `ddpm-hf sample` chooses it."""
        return choose_setting(model.pipeline, SamplerOptions(**self.sampler_options()))

    def sampler_options(self) -> dict[str, Any]:
        """Keyword arguments of `SamplerOptions`, without those that are None."""
        names = ("scheduler", "num_inference_steps", "eta")
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    def labels(self) -> list[int] | None:
        """Class number of each image."""
        cycle = self.class_labels
        return None if cycle is None else [cycle[i % len(cycle)] for i in range(self.num_images)]

    def guidance(self) -> dict[str, Any]:
        """Keyword arguments of guidance that differ from the defaults."""
        if self.guidance_scale == 1:
            return {}
        interval = self.guidance_interval
        return {"guidance_scale": self.guidance_scale} | (
            {"guidance_interval": interval} if interval else {}
        )


def whole(name: str, value: Any) -> int:
    """An integer; ValueError for another value, such as NaN or a fraction."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"`{name}` must be an integer, got {_short(value)}")
    return value


def number(name: str, value: Any) -> float:
    """A finite number; ValueError for another value."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise ValueError(f"`{name}` must be a finite number, got {_short(value)}")
    return float(value)


def check_at_most(name: str, value: float, limit: float) -> None:
    """Check that the value is at most the limit of a model; ValueError if it is not."""
    if value > limit:
        raise ValueError(f"`{name}` must be at most {limit} for this model, got {value}")


def usual_steps(model: ServedModel, sampler: str) -> int:
    """Number of steps that a sampler needs with a model."""
    T = model.num_train_timesteps
    if sampler == RECOMMENDED:
        setting = model.recommended
        return min(T, (setting and setting.num_inference_steps) or USUAL_STEPS)
    spec = SchedulerSpec.parse(sampler)
    if spec.scheduler == "DDPM" and spec.eta != 0:
        return min(T, 5 * USUAL_STEPS)
    return min(T, USUAL_STEPS)


def _sampler(model: ServedModel, sampler: Any) -> tuple[SchedulerSpec, int]:
    """Specification and usual number of steps; without a recommended setting that of DDIM."""
    if not isinstance(sampler, str):
        raise ValueError(f"`sampler` must be the name of a sampler, got {_short(sampler)}")
    if sampler != RECOMMENDED:
        return SchedulerSpec.parse_foreign(sampler), usual_steps(model, sampler)
    setting = model.recommended
    text = setting.recommended if setting and setting.recommended else "DDIM"
    return SchedulerSpec.parse_foreign(text), usual_steps(model, RECOMMENDED)


def default_eta(model: ServedModel, sampler: str) -> float | None:
    """Noise of the steps of a sampler; None if it has no such option."""
    spec, _ = _sampler(model, sampler)
    if not _has_eta(spec):
        return None
    return float(spec.scheduler == "DDPM") if spec.eta is None else spec.eta


def _eta(spec: SchedulerSpec, eta: Any) -> float | None:
    eta = spec.eta if eta is None else eta
    return None if eta is None or not _has_eta(spec) else number("eta", eta)


def _has_eta(spec: SchedulerSpec) -> bool:
    return spec.scheduler in WITH_ETA


def _interval(value: Any) -> tuple[float, float] | None:
    """Lowest and highest log-SNR with guidance; an open end is far away."""
    if value is None:
        return None
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"`guidance_interval` must be two numbers, got {_short(value)}")
    low, high = value
    return (
        -MAX_LOG_SNR if low is None else number("guidance_interval", low),
        MAX_LOG_SNR if high is None else number("guidance_interval", high),
    )


def _classes(model: ServedModel, label: Any) -> list[int] | None:
    labels = model.class_labels
    if labels is None or label in (None, ALL_CLASSES):
        return labels
    if isinstance(label, float):
        label = whole("class_label", label)
    if not isinstance(label, int | str):
        raise ValueError(f"`class_label` must be a class, got {_short(label)}")
    unet = model.pipeline.unet
    return class_numbers(label, unet.config.num_class_embeds, class_names_of(unet))


def class_of(model: ServedModel, label: Any) -> int:
    """Number of one class; the first one for None."""
    labels = model.class_labels or [0]
    return labels[0] if label is None else (_classes(model, label) or labels)[0]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."

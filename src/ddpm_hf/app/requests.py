"""Requests of visitors, checked on the server: types, ranges, and the limits of a model.

Values come from browsers and from gradio_client, so any of them may be of any type.
"""

import math
from dataclasses import dataclass
from typing import Any, Self

from ddpm_hf.app.request_errors import RequestError
from ddpm_hf.app.served_models import USUAL_STEPS, ServedModel
from ddpm_hf.diffusion.class_choice import class_numbers
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
"""Samplers of the page. `gradio_client` may name all that `SchedulerSpec.parse_foreign` accepts."""
WITH_ETA = ("DDPM", "DDIM")
MAX_SEED = 2**63 - 1
MAX_GUIDANCE = 20.0
MAX_LOG_SNR = 100.0


@dataclass(frozen=True, kw_only=True)
class DrawRequest:
    """Images to draw, with all values resolved and in range.

    Attributes:
        num_images: number of images.
        seed: seed of the noise.
        class_labels: numbers of classes, taken in turn; None for an unconditional model.
        guidance_scale: scale of classifier-free guidance.
        guidance_interval: range of the log signal-to-noise ratio with guidance; None for all steps,
            and without guidance.
        scheduler: specification of the scheduler.
        num_inference_steps: number of steps K.
        eta: noise of each step; None for a scheduler without it.
    """

    num_images: int
    seed: int
    class_labels: list[int] | None
    guidance_scale: float
    guidance_interval: tuple[float, float] | None
    scheduler: str
    num_inference_steps: int
    eta: float | None

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
        spec, usual = _sampler(model, sampler)
        given_scale = 1.0 if guidance_scale is None else guidance_scale
        scale = number("guidance_scale", given_scale, 0, MAX_GUIDANCE)
        interval = _interval(guidance_interval)
        steps = usual if num_inference_steps is None else num_inference_steps
        request = cls(
            num_images=whole("num_images", num_images, 1, model.max_images),
            seed=whole("seed", seed, 0, MAX_SEED),
            class_labels=_classes(model, class_label),
            guidance_scale=scale,
            guidance_interval=None if scale == 1 else interval,
            scheduler=str(SchedulerSpec(spec.scheduler, spec.options)),
            num_inference_steps=whole("num_inference_steps", steps, 1, model.num_train_timesteps),
            eta=_eta(spec, eta),
        )
        request.setting(model)
        return request

    def setting(self, model: ServedModel) -> SamplerSetting:
        """The scheduler with its arguments, as `ddpm-hf sample` chooses it."""
        options = SamplerOptions(
            scheduler=self.scheduler, num_inference_steps=self.num_inference_steps, eta=self.eta
        )
        return choose_setting(model.pipeline, options)

    def sampler_options(self) -> dict[str, object]:
        """The values of `setting` by the name of the option, without those that are None."""
        names = ("scheduler", "num_inference_steps", "eta")
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    def labels(self) -> list[int] | None:
        """Class number of each image."""
        cycle = self.class_labels
        return None if cycle is None else [cycle[i % len(cycle)] for i in range(self.num_images)]

    def guidance_options(self) -> dict[str, object]:
        """The values of guidance by the name of the option; none without guidance."""
        if self.guidance_scale == 1:
            return {}
        interval = {"guidance_interval": self.guidance_interval} if self.guidance_interval else {}
        return {"guidance_scale": self.guidance_scale, **interval}


def whole(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> int:
    """An integer in [low, high]; RequestError for another value, such as NaN or a fraction."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError("whole", name=name, value=short(value))
    _check_range(name, value, low, high)
    return value


def number(name: str, value: Any, low: float, high: float) -> float:
    """A number in [low, high]; RequestError for another value, such as NaN."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise RequestError("number", name=name, value=short(value))
    _check_range(name, value, low, high)
    return float(value)


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise RequestError("range", name=name, low=low, high=high, value=value)


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
        raise RequestError("sampler", value=short(sampler))
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
    return None if eta is None or not _has_eta(spec) else number("eta", eta, 0, 1)


def _has_eta(spec: SchedulerSpec) -> bool:
    return spec.scheduler in WITH_ETA


def _interval(value: Any) -> tuple[float, float] | None:
    """Lowest and highest log-SNR with guidance; an open end is far away."""
    if value is None:
        return None
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise RequestError("interval", value=short(value))
    low, high = (
        end if bound is None else number("guidance_interval", bound, -MAX_LOG_SNR, MAX_LOG_SNR)
        for bound, end in zip(value, (-MAX_LOG_SNR, MAX_LOG_SNR), strict=True)
    )
    return low, high


def _classes(model: ServedModel, label: Any) -> list[int] | None:
    labels = model.class_labels
    if labels is None or label in (None, ALL_CLASSES):
        return labels
    if isinstance(label, float):
        label = whole("class_label", label)
    if not isinstance(label, int | str):
        raise RequestError("class", value=short(label))
    unet = model.pipeline.unet
    return class_numbers(label, unet.config.num_class_embeds, class_names_of(unet))


def class_of(model: ServedModel, label: Any) -> int:
    """Number of one class; the first one for None."""
    labels = model.class_labels or [0]
    return labels[0] if label is None else (_classes(model, label) or labels)[0]


def short(value: Any) -> str:
    """Beginning of a value, for a message."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."

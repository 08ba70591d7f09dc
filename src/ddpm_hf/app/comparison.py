"""The same noise drawn by several samplers and numbers of steps."""

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from ddpm_hf.app.drawing import drawing_steps
from ddpm_hf.app.request_errors import RequestError
from ddpm_hf.app.requests import DrawRequest
from ddpm_hf.app.served_models import ServedModel
from ddpm_hf.app.working import Pace, check_time
from ddpm_hf.diffusion.atomic_files import read_json
from ddpm_hf.diffusion.config_extension import extension_of
from ddpm_hf.paths import ModelPaths
from ddpm_hf.pictures import Pixels
from ddpm_hf.scheduler_spec import SchedulerSpec

MAX_SETTINGS = 30
STEP_CHOICES = (5, 10, 25, 50, 100, 250, 500, 1000)


@dataclass(frozen=True)
class ComparedSetting:
    """Images of one setting.

    Attributes:
        sampler: specification of the scheduler.
        num_inference_steps: K.
        images: (N, H, W, C) in [0, 1]; None after an error.
        seconds: duration.
        num_calls: evaluations of the network per image.
        bits_per_dim: bound of K steps, if the model is calibrated and the sampler is DDPM.
        problem: the error; None if there are images.
    """

    sampler: str
    num_inference_steps: int
    images: Pixels | None = None
    seconds: float = 0.0
    num_calls: int = 0
    bits_per_dim: float | None = None
    problem: ValueError | None = None


def step_choices(model: ServedModel) -> list[int]:
    """Numbers of steps to choose from."""
    T = model.num_train_timesteps
    return [K for K in STEP_CHOICES if K < T] + [T]


def compare_settings(
    model: ServedModel, samplers: Any, steps: Any, **options: Any
) -> Generator[ComparedSetting | None]:
    """Draw the same images with every sampler and number of steps.

    Args:
        model: the model.
        samplers: names or specifications of samplers, or "recommended".
        steps: numbers of steps.
        **options: further options of `DrawRequest.of`, such as `seed`.
    Yields:
        a setting when its images are drawn, and None a few times a second.
    Raises:
        ValueError: for values out of range, and after the time limit of a request.
    """
    samplers, steps = _checked_list("samplers", samplers), _checked_list("steps", steps)
    if len(samplers) * len(steps) > MAX_SETTINGS:
        number = len(samplers) * len(steps)
        raise RequestError("settings", most=MAX_SETTINGS, number=number)
    DrawRequest.of(model, **options)
    start, pace = time.monotonic(), Pace()
    for sampler in samplers:
        for K in steps:
            try:
                request = DrawRequest.of(model, sampler=sampler, num_inference_steps=K, **options)
                yield from _drawn(model, request, start, pace)
            except ValueError as error:
                check_time(start)
                yield ComparedSetting(str(sampler), K, problem=error)


def _drawn(
    model: ServedModel, request: DrawRequest, start: float, pace: Pace
) -> Generator[ComparedSetting | None]:
    calls = 0

    def count(_: Any, inputs: tuple[Any, ...]) -> None:
        nonlocal calls
        calls += len(inputs[0])

    hook = model.pipeline.unet.register_forward_pre_hook(count)
    began = time.monotonic()
    try:
        for step in drawing_steps(model, request, start):
            images = step.images
            if pace.is_due():
                yield None
    finally:
        hook.remove()
    yield ComparedSetting(
        str(request.scheduler),
        request.num_inference_steps,
        images,
        time.monotonic() - began,
        round(calls / request.num_images),
        _bound(model, request),
    )


def _bound(model: ServedModel, request: DrawRequest) -> float | None:
    """Bits/dim that the calibration of the model predicts for K steps of DDPM."""
    spec = SchedulerSpec.parse(str(request.scheduler))
    is_calibrated = extension_of(model.pipeline.scheduler.config).get("x_0_mse") is not None
    if (
        not is_calibrated
        or spec.scheduler != "DDPM"
        or spec.options
        or request.eta not in (None, 1)
    ):
        return None
    calibration = read_json(ModelPaths(model.folder).facts).get("calibration")
    rows = calibration.get("rows") if isinstance(calibration, dict) else None
    for row in rows if isinstance(rows, list) else []:
        if row.get("num_inference_steps") == request.num_inference_steps:
            return float(row["bits_per_dim"])
    return None


def _checked_list(name: str, values: Any) -> Sequence[Any]:
    if not isinstance(values, list | tuple) or not values:
        raise RequestError("none_chosen", name=name)
    return list(dict.fromkeys(map(_hashable, values)))


def _hashable(value: Any) -> Any:
    return value if isinstance(value, int | float | str) else str(value)

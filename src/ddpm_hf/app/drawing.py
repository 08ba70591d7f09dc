"""Drawing of images, step by step."""

import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass

from torch import Tensor

from ddpm_hf.app.films import Frame, reduction, rgb_pixels
from ddpm_hf.app.requests import DrawRequest
from ddpm_hf.app.served_models import ServedModel
from ddpm_hf.app.working import check_time
from ddpm_hf.diffusion.pipeline import GaussianDDPMPipeline, SamplingStep
from ddpm_hf.pictures import Pixels
from ddpm_hf.sampling.batches import image_generators


@dataclass(frozen=True)
class DrawingStep:
    """A step of sampling.

    Attributes:
        index: number of the step, from 1.
        total: number of steps.
        images: the images (N, H, W, C), float32 in [0, 1], after the last step; else None.
    """

    index: int
    total: int
    images: Pixels | None
    _pipeline: GaussianDDPMPipeline
    _step: SamplingStep

    def frame(self) -> Frame:
        """x_t and the estimate of x_0 at this step; after the last step, both are the images."""
        if self.images is not None:
            pixels = self._reduced(rgb_pixels(self.images))
            return Frame(self.index, 0.0, pixels, pixels)
        step, x_0_hat = self._step, self._step.pred_original_sample
        x_t = step.sample.float()
        # Schedulers with sigmas scale x_t by up to the largest sigma.
        x_t = x_t / x_t.std().clamp(min=1)
        return Frame(
            self.index,
            float(step.timestep),
            self._picture(x_t),
            self._picture(step.prev_sample if x_0_hat is None else x_0_hat),
        )

    def _picture(self, x: Tensor) -> Pixels:
        return self._reduced(rgb_pixels(self._pipeline.decode_images(x.float(), "np")))

    def _reduced(self, images: Pixels) -> Pixels:
        num_images, height, width, _ = images.shape
        factor = reduction(num_images, (width, height))
        reduced: Pixels = images[:, ::factor, ::factor]
        return reduced


def drawing_steps(
    model: ServedModel, request: DrawRequest, start: float | None = None
) -> Generator[DrawingStep]:
    """Steps of sampling the images of a request, each computed when it is asked for.

    The images are those of `ddpm_hf.sampling.draw_images` and `ddpm-hf sample` with these options
    and a batch of all images.

    Args:
        model, request: the model, and the images to draw.
        start: value of `time.monotonic()` from which the time limit counts; None for this call.
    Raises:
        ValueError: for options that do not work together, for values that are not finite, and
            after the time limit.
    """
    start = time.monotonic() if start is None else start
    setting = request.setting(model)
    pipeline = model.working_pipeline(setting.scheduler)
    steps = pipeline.sample_steps(
        request.num_images,
        image_generators(pipeline.device, request.seed, range(request.num_images)),
        class_labels=request.labels(),
        guidance_scale=request.guidance_scale,
        guidance_interval=request.guidance_interval,
        **setting.arguments(),
    )
    total = pipeline.num_timesteps
    with closing(steps):
        for step in steps:
            check_time(start)
            if not step.is_last:
                yield DrawingStep(step.index + 1, total, None, pipeline, step)
    images = pipeline.decode_images(step.prev_sample, "np")
    yield DrawingStep(step.index + 1, total, images, pipeline, step)

"""Drawn images beside real ones while training goes on: what `ddpm-hf evaluate` does, on few."""

import dataclasses
import logging
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from ddpm_hf.data import ImageDataset, ImageFacts
from ddpm_hf.evaluation.features import DEFAULT_FEATURES, Features, features_of, load_features
from ddpm_hf.evaluation.metrics import measure
from ddpm_hf.pictures import Pixels, quantised
from ddpm_hf.sampling import DrawnImages
from ddpm_hf.text import counted
from ddpm_hf.training.dataset_setup import HeldOut, Selection
from ddpm_hf.training.ema_sampling import draw_share
from ddpm_hf.training.rank_coordination import main_first, on_main
from ddpm_hf.training.run import Run

T = TypeVar("T")

logger = logging.getLogger(__name__)

MAX_REAL = 10_000  # so many of the real images, evenly spread, are compared with
_BATCH = 64  # images that the network of the features sees at once, as in `ddpm-hf evaluate`


class Evaluation:
    """The Frechet distance of images from the averaged weights to the training images.

    Every process draws its share, by the run's seed: two measurements differ by the weights alone.
    The floor comes from held-out images, or from halves of the training images without any.

    Args:
        run: its network and diffusion draw.
        features: what images are compared by, on the device of this process.
        every: updates between two measurements.
    """

    def __init__(self, run: Run, features: Features, every: int) -> None:
        def network(x: Tensor) -> Tensor:
            if run.stop.received is not None:
                raise InterruptedError("the run was asked to stop")
            return features.network(x)

        self.run, self.features = run, dataclasses.replace(features, network=network)
        self.every = every
        self._real: list[Tensor | None] | None = None

    def measure(self) -> dict[str, float]:
        """The distance and its floor, on the main process; nothing where the run shall stop.

        Raises:
            ValueError: on all processes, if one of them fails.
        """
        run = self.run
        self._real = self._real or [self._features_of(images) for images in self._sets()]
        failure, drawn = None, torch.empty(0)
        try:
            drawn = self._features_of_share()
        except Exception as error:  # the others wait for this process
            failure = f"{error}"
        is_stopped = run.stop.received is not None
        failures, shares, stopped = zip(*gather_object([(failure, drawn, is_stopped)]), strict=True)
        if any(stopped):
            return {}
        if said := next(filter(None, failures), None):
            raise ValueError(said)
        of_real = [features for features in self._real if features is not None]
        y = torch.cat(shares)[: run.config.evaluate_num_images]

        def figures() -> dict[str, float]:
            x, *z = of_real
            device, seed = run.accelerator.device, run.config.seed
            (fd,) = _as_value_errors(lambda: measure("fd", x, y, *z, seed=seed, device=device))
            return {
                "evaluation_fd": fd["value"],
                "evaluation_fd_standard_error": fd["standard_error"],
                "evaluation_fd_half": fd["floor"]["drawn"],
                "evaluation_fd_half_real": fd["floor"]["real"],
            }

        return on_main(run.accelerator, figures, run.config.ddp_timeout) or {}

    def _sets(self) -> list[DrawnImages]:
        parts = self.run.components
        sources = [parts.images, *([parts.held_out] if parts.held_out else [])]
        return [as_pixels(images, parts.facts) for images in sources]

    def _features_of(self, images: DrawnImages) -> Tensor | None:
        """Features of real images: kept on disk, so that a resumed run finds them."""
        rows, progress = _evenly(len(images)), self.run.accelerator.is_main_process
        return features_of(
            images, self.features, PartialState(), rows=rows, batch_size=_BATCH, progress=progress
        )

    def _features_of_share(self) -> Tensor:
        """Features of what this process draws."""
        run, names = self.run, self.run.components.facts.class_names
        labels = list(range(len(names))) if names else None
        images = draw_share(run, run.config.evaluate_num_images, labels)
        pixels = quantised(np.stack(images), run.components.facts.bit_depth)
        batches = (pixels[i : i + _BATCH] for i in range(0, len(pixels), _BATCH))
        return torch.cat([self.features(batch, run.accelerator.device) for batch in batches])

    def describe(self) -> str:
        """What is measured, and what drawing costs beside the updates."""
        config, parts = self.run.config, self.run.components
        every = self.every
        K = min(config.sample_inference_steps, len(parts.scheduler))
        # An update calls the network forwards and backwards: about three times a call alone.
        cost = config.evaluate_num_images * K / (3 * every * config.batch_size)
        beside = "held-out images" if parts.held_out else "their halves"
        return (
            f"evaluation FD of {counted(config.evaluate_num_images, 'image')} of {K} steps to "
            f"{len(_evenly(len(parts.images))):,} training images, beside that of {beside}, "
            f"by {self.features.name}, every {counted(every, 'update')}: "
            f"about {cost:.0%} of the time on top"
        )


def build_evaluation(run: Run) -> Evaluation | None:
    """What measures drawn images, if that was asked for and the features can be had."""
    config, accelerator = run.config, run.accelerator
    if config.evaluate_steps is None:
        return None
    name, features, failure = config.evaluate_features or DEFAULT_FEATURES, None, None

    def load() -> Features:
        return _as_value_errors(lambda: load_features(name, accelerator.device))

    try:
        features = main_first(accelerator, load, config.ddp_timeout)
    except (ValueError, OSError) as error:
        failure = f"{error}"
    said = next(filter(None, gather_object([failure])), None)
    if said is None and features is not None:
        return Evaluation(run, features, config.evaluate_steps)
    if accelerator.is_main_process:
        logger.warning("this run is not evaluated: %s", said)
    return None


def as_pixels(images: HeldOut, facts: ImageFacts) -> DrawnImages:
    """The images of a run as they were prepared: not flipped, not padded, cut in the middle."""
    indices = images.indices if isinstance(images, Selection) else range(len(images))
    source = images.images.images if isinstance(images, Selection) else images.images

    def pixels(index: int) -> Pixels:
        if isinstance(source, ImageDataset):
            return source.window(index).transpose(1, 2, 0)
        x_0 = source[index].float().permute(1, 2, 0).numpy(force=True)
        return quantised((x_0.clip(-1, 1) + 1) / 2, facts.bit_depth)

    shape = (len(indices), facts.height, facts.width, facts.num_channels)
    return DrawnImages(shape, lambda rows: np.stack([pixels(indices[row]) for row in rows]))


def _evenly(count: int) -> range:
    """Of so many real images those that are looked at."""
    return range(0, count, -(-count // MAX_REAL))


def _as_value_errors(action: Callable[[], T]) -> T:
    """Whatever fails, such as the memory or the algebra, is told to the other processes."""
    try:
        return action()
    except Exception as error:
        raise ValueError(f"{error}") from error

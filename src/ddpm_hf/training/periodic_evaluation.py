"""Comparison of samples with real images during training, as `ddpm-hf evaluate` does."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from ddpm_hf.data import ImageFacts
from ddpm_hf.evaluation.features import Features, features_of, load_features
from ddpm_hf.evaluation.metrics import MIN_IMAGES, measure
from ddpm_hf.evaluation_options import DEFAULT_FEATURES
from ddpm_hf.pictures import Pixels, quantised
from ddpm_hf.run_record import SampleSetup
from ddpm_hf.sampling import DrawnImages
from ddpm_hf.training.dataset_setup import RunImages, in_few_shards
from ddpm_hf.training.ema_sampling import draw_share
from ddpm_hf.training.errors import ConfigError
from ddpm_hf.training.rank_coordination import main_first, on_main_process
from ddpm_hf.training.run import Run
from ddpm_hf.training.sample_figures import SampleFigures
from ddpm_hf.utils.text import counted

T = TypeVar("T")

logger = logging.getLogger(__name__)

_METRICS = ("fd", "memorisation")
_MIN_REAL = max(MIN_IMAGES[metric] for metric in _METRICS)
MAX_REAL = 10_000  # real images to compare with, evenly spread
_BATCH_SIZE = 64  # of the feature network, as in `ddpm-hf evaluate`


class PeriodicEvaluation:
    """Compares samples of the EMA weights with the training images.

    Measures the Frechet distance and the share of copies. Every rank draws a share, seeded by the
    run: two measurements differ by the weights alone. The floor comes from held-out images, or from
    halves of the training images if there are fewer than four.

    Args:
        run: its network and diffusion draw the samples.
        features: feature network, on the device of this rank.
        every: updates between two measurements.
    """

    def __init__(self, run: Run, features: Features, every: int) -> None:
        def network(x: Tensor) -> Tensor:
            if run.stop.received is not None:
                raise InterruptedError("the run was asked to stop")
            return features.network(x)

        self.run, self.features = run, dataclasses.replace(features, network=network)
        self.every = every
        held_out = run.components.held_out
        self._held_out = held_out if held_out and len(held_out) >= _MIN_REAL else None
        self._real: list[Tensor | None] | None = None

    def measure(self) -> SampleFigures | None:
        """The figures, on the main process; None on other ranks and when stopped.

        Raises:
            ValueError: on all ranks, if one of them fails.
        """
        run = self.run
        self._real = self._real or [self._real_features(images) for images in self._real_images()]
        failure, drawn = None, torch.empty(0)
        try:
            drawn = self._sample_features()
        except Exception as error:  # the other ranks wait for this one
            failure = f"{error}"
        is_stopped = run.stop.received is not None
        failures, shares, stopped = zip(*gather_object([(failure, drawn, is_stopped)]), strict=True)
        if any(stopped):
            return None
        if reason := next(filter(None, failures), None):
            raise ValueError(reason)
        real = [features for features in self._real if features is not None]
        y = torch.cat(shares)[: run.config.evaluate_num_images]

        def compare() -> SampleFigures:
            x, *z = real
            device, seed = run.accelerator.device, run.config.seed
            results = _as_value_errors(
                lambda: measure(_METRICS, x, y, *z, seed=seed, device=device)
            )
            return SampleFigures.of(results, self._setup())

        return on_main_process(run.accelerator, compare, run.config.ddp_timeout)

    def logged(self, entry: Mapping[str, object]) -> SampleFigures | None:
        """The figures in an entry of the log; None without them."""
        return SampleFigures.logged(entry, self._setup())

    def describe_copies(self, figures: SampleFigures, best: int | None) -> str:
        """A warning that samples are copies: figures, and what to do.

        Args:
            figures: of the current weights.
            best: update of the model in best/, if any.
        """
        config, copies = self.run.config, figures.copies
        others = "held-out" if self._held_out else "other training"
        again = ["`keep_best`"] * (config.kept_by is None)
        again += ["`random_flip`"] * (not config.random_flip)
        options = f"{', '.join(again)} and dropout" if again else "dropout"
        return (
            f"update {self.run.state.step:,}: {copies.value:.0%} of "
            f"{counted(figures.setup.num_images, 'sample')} are copies of training images "
            f"({copies.half_real:.0%} of {others} images are as close to one); "
            + (f"best/ has the model of update {best:,}; " if best is not None else "")
            + f"stop here, add training images, or train again with {options} in "
            "`unet_config`: see docs/few_images.md"
        )

    def _setup(self) -> SampleSetup:
        return SampleSetup(
            self.run.config.evaluate_num_images, self._num_inference_steps, self.features.name
        )

    @property
    def _num_inference_steps(self) -> int:
        config, scheduler = self.run.config, self.run.components.scheduler
        return min(config.sample_inference_steps, len(scheduler))

    def _real_images(self) -> list[DrawnImages]:
        """The training images, and the held-out images if the floor comes from them."""
        components = self.run.components
        sources = [components.images, *([self._held_out] if self._held_out else [])]
        parts = [in_few_shards(images, MAX_REAL) for images in sources]
        return [as_pixels(images, components.facts) for images in parts]

    def _real_features(self, images: DrawnImages) -> Tensor | None:
        """Features of real images, cached on disk for resumed runs; None on other ranks."""
        rows, progress = _evenly(len(images)), self.run.accelerator.is_main_process
        return features_of(
            images,
            self.features,
            PartialState(),
            rows=rows,
            batch_size=_BATCH_SIZE,
            progress=progress,
        )

    def _sample_features(self) -> Tensor:
        """Features of this rank's samples."""
        run, labels = self.run, self.run.components.facts.trained_classes or None
        images = draw_share(run, run.config.evaluate_num_images, labels)
        pixels = quantised(np.stack(images), run.components.facts.bit_depth)
        batches = (pixels[i : i + _BATCH_SIZE] for i in range(0, len(pixels), _BATCH_SIZE))
        return torch.cat([self.features(batch, run.accelerator.device) for batch in batches])

    @property
    def relative_cost(self) -> float:
        """Time of sampling relative to that of the updates."""
        num_calls = self.run.config.evaluate_num_images * self._num_inference_steps
        return self.run.relative_cost(num_calls, self.every)

    def describe(self) -> str:
        """A line of the plan: what is measured, and the cost of sampling relative to training."""
        config, components = self.run.config, self.run.components
        floor = "held-out images" if self._held_out else "halves of the training images"
        return (
            f"evaluation FD and copies: {counted(config.evaluate_num_images, 'sample')} of "
            f"{self._num_inference_steps} steps against "
            f"{counted(len(_evenly(len(components.images))), 'training image')}, with the floor of "
            f"{floor}, "
            f"features {self.features.name}, every {counted(self.every, 'update')}: adds about "
            f"{self.relative_cost:.0%} of the time"
        )


def build_evaluation(run: Run) -> PeriodicEvaluation | None:
    """The evaluation that the options request, or None.

    Features that do not load are a warning if they are the default ones, or if the run is resumed.

    Raises:
        ConfigError: on all ranks, for too few training images, and for other features that do not
            load.
    """
    config, accelerator = run.config, run.accelerator
    every = config.evaluate_steps
    if every is None:
        return None
    if (num_images := len(run.components.images)) < _MIN_REAL:
        raise ConfigError(
            f"`evaluate_steps` needs at least {_MIN_REAL} training images, got {num_images}; add "
            "images, or leave it out"
        )
    name, features, failure = config.evaluate_features or DEFAULT_FEATURES, None, None

    def load() -> Features:
        return _as_value_errors(lambda: load_features(name, accelerator.device))

    try:
        features = main_first(accelerator, load, config.ddp_timeout)
    except (ValueError, OSError) as error:
        failure = f"{error}"
    reason = next(filter(None, gather_object([failure])), None)
    if reason is None and features is not None:
        return PeriodicEvaluation(run, features, every)
    if config.evaluate_features is not None and run.checkpoint is None:
        raise ConfigError(f"`evaluate_features` must be a feature network: {reason}")
    if accelerator.is_main_process:
        lacking = " and keeps no best model" * (config.kept_by == "fd")
        logger.warning("this run is not evaluated%s: %s", lacking, reason)
    return None


def as_pixels(images: RunImages, facts: ImageFacts) -> DrawnImages:
    """The images of a run as prepared: center-cropped, without flips and padding."""

    def read(rows: Sequence[int]) -> Pixels:
        x_0 = images.unaugmented(rows).permute(0, 2, 3, 1).numpy(force=True)
        return quantised((x_0.clip(-1, 1) + 1) / 2, facts.bit_depth)

    return DrawnImages((len(images), facts.height, facts.width, facts.num_channels), read)


def _evenly(count: int) -> range:
    """Indices of at most `MAX_REAL` of `count` images, evenly spread."""
    return range(0, count, -(-count // MAX_REAL))


def _as_value_errors(action: Callable[[], T]) -> T:
    """Turn every error, such as out of memory, into a ValueError, which reaches all ranks."""
    try:
        return action()
    except Exception as error:
        raise ValueError(f"{error}") from error

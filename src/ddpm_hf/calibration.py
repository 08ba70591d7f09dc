"""Calibration of the reverse variances: the denoising error at every t, measured once.

m_t = E (x_0 - x_0_hat(x_t))^2, mean over images and values, determines for any number of steps K

    the optimal variance              sigma^2 = beta~ + coef_x_0^2 m_t         2201.06503, eq. 7
    the bound's term from t to s      log(1 + (SNR_s - SNR_t) m_t) / 2 nats
    the K timesteps with the lowest bound, by dynamic programming              2106.03802

For an exact network m_t equals the quantity that Analytic-DPM estimates from the second moment of
eps. For a trained network it is the error in the bound, and has a much lower variance: 64 images
give 4 % accuracy at every t.

result = calibrate(unet, scheduler, images)                    # 256 images are plenty
result.bits_per_dim(25).value                                  # predicted bound of 25 steps
result.apply(pipeline)                                         # sample with these variances
"""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler, as_gaussian_scheduler
from ddpm_hf.diffusion.tensor_ops import Denoiser, Generators
from ddpm_hf.likelihood import BitsPerDim, bits_per_dim, prior_bits_per_dim, standard_error

P = TypeVar("P", bound=DiffusionPipeline)

# With this relative error of m_t, the bound of any K is accurate to a few thousandths.
STABLE_RELATIVE_ERROR = 0.1
# Smallest plausible ratio of m_t to the error at a timestep with less noise.
_SMALLEST_ERROR_RATIO = 0.9
# Largest plausible ratio of m_t to the error of the best linear denoiser.
_LARGEST_LINEAR_RATIO = 1.5


@dataclass(frozen=True)
class PredictedBound:
    """The bound of a trajectory, predicted from the error curve; float64, bits/dim.

    Attributes:
        value: the bound.
        standard_error: standard error of `value`, over images and noise.
        timesteps: (K,), descending.
        prior: prior term of the bound.
        terms: (K,) in sampling order; the last is the decoder's.
    """

    value: float
    standard_error: float
    timesteps: Tensor
    prior: float
    terms: Tensor


@dataclass(frozen=True)
class Calibration:
    """Denoising error at every t, measured on N images; float64 on the CPU.

    Attributes:
        scheduler: the scheduler with the error curve in its configuration.
        x_0_mse: error curve m_t, (T,).
        standard_error: standard error of m_t over images and noise, (T,); NaN for one image.
        errors: m_t of each image, (N, T).
        x_0_square: mean of x_0^2 of each image, (N,).
        decoder: decoder term at t = 0 with variance m_0, per image, bits/dim, (N,).
        measured: bound of all T steps with the published variances, from the same network calls.
    """

    scheduler: GaussianDDPMScheduler
    x_0_mse: Tensor
    standard_error: Tensor
    errors: Tensor
    x_0_square: Tensor
    decoder: Tensor
    measured: BitsPerDim

    def apply(self, pipeline: P) -> P:
        """Replace the scheduler of a pipeline by one with the calibrated variances.

        Returns:
            the same pipeline.
        """
        pipeline.scheduler = copy.deepcopy(self.scheduler)
        return pipeline

    @property
    def relative_error(self) -> Tensor:
        """Standard error of m_t divided by m_t, (T,); 0 where m_t is 0."""
        return (self.standard_error / self.x_0_mse).where(self.x_0_mse > 0, 0.0)

    def num_images_for(self, relative_error: float = STABLE_RELATIVE_ERROR) -> int:
        """Number of images that brings the relative error of m_t to this value at every t.

        Raises:
            ValueError: if one image was measured.
        """
        if len(self.errors) == 1:
            raise ValueError("one image gives no standard error; calibrate with at least 2 images")
        worst = self.relative_error.max().item()
        return math.ceil(len(self.errors) * (worst / relative_error) ** 2)

    def mismatch_warnings(self) -> list[str]:
        """Significant signs that the network was trained with other betas or prediction type.

        The error of x_0 cannot fall as noise is added, and the best linear denoiser has the error
        E x_0^2 / (1 + SNR E x_0^2).
        """
        return self._falling_error() + self._worse_than_linear()

    def _falling_error(self) -> list[str]:
        highest, argmax = self.x_0_mse.cummax(0)
        t = int((self.x_0_mse / highest.clamp(min=1e-12)).argmin())
        previous = int(argmax[t])
        excess = self.errors[:, t] - _SMALLEST_ERROR_RATIO * self.errors[:, previous]
        if len(excess) < 2 or excess.mean() >= -4 * standard_error(excess):
            return []
        return [
            f"the error of x_0 falls from {self.x_0_mse[previous]:.3g} at t={previous} to"
            f" {self.x_0_mse[t]:.3g} at t={t}, although noise is added; check that the network was"
            " trained with these betas and this `prediction_type`"
        ]

    def _worse_than_linear(self) -> list[str]:
        x_0_square = self.x_0_square.mean()
        t, margin = torch.arange(len(self.x_0_mse)), 4 * self.standard_error.nan_to_num()
        linear = x_0_square / (1 + self.scheduler.snr(t, torch.float64) * x_0_square)
        ratio = (self.x_0_mse - margin) / linear
        if ratio.max() <= _LARGEST_LINEAR_RATIO:
            return []
        worst = int(ratio.argmax())
        return [
            f"the error of x_0 at t={worst} is {ratio[worst]:.1f} times that of a linear denoiser;"
            " check that the network was trained with these betas and this `prediction_type`"
        ]

    def bits_per_dim(
        self,
        num_inference_steps: int | None = None,
        *,
        timesteps: Sequence[int] | None = None,
        timestep_spacing: str | None = None,
        published: bool = False,
    ) -> PredictedBound:
        """Predict the bound of a trajectory that ends at t = 0, without network calls.

        Args:
            num_inference_steps: K; None for all T steps.
            timesteps: explicit timesteps, descending, instead of `num_inference_steps`.
            timestep_spacing: as in `set_timesteps`; by default the scheduler's.
            published: use the variance of `variance_type` in all but the last step.
        Raises:
            ValueError: if the trajectory does not end at t = 0, the only timestep at which the
                decoder was measured; if `published` variances are learned, which the curve does not
                determine.
        """
        scheduler = copy.deepcopy(self.scheduler)
        if num_inference_steps is None and timesteps is None:
            timesteps = range(len(scheduler) - 1, -1, -1)
        scheduler.set_timesteps(
            num_inference_steps, timesteps=timesteps, timestep_spacing=timestep_spacing
        )
        t = scheduler.timesteps
        if t[-1] != 0:
            raise ValueError(
                f"`timesteps` must end at 0, where the decoder was measured, got {t[-1]}; set"
                " `timestep_spacing` to 'linspace', or pass timesteps that end at 0"
            )
        log_snr = scheduler.log_snr(t, torch.float64)
        gain = log_snr[1:].exp() - log_snr[:-1].exp()  # SNR_s - SNR_t
        m_t, r = self.x_0_mse[t[:-1]], _log_ratio(scheduler, gain, self.x_0_mse[t[:-1]], published)
        terms = ((r.expm1() - r) + gain * m_t * r.exp()) / 2 / math.log(2)
        prior = prior_bits_per_dim(self.x_0_square, scheduler.snr(t[0], torch.float64))
        terms = torch.cat([terms, self.decoder.mean()[None]])
        # Bound of each image, to first order in its errors.
        slopes = gain * r.exp() / 2 / math.log(2)
        of_images = prior + self.errors[:, t[:-1]] @ slopes + self.decoder
        return PredictedBound(
            value=(prior.mean() + terms.sum()).item(),
            standard_error=standard_error(of_images),
            timesteps=t,
            prior=prior.mean().item(),
            terms=terms,
        )


def _log_ratio(
    scheduler: GaussianDDPMScheduler, gain: Tensor, m_t: Tensor, published: bool
) -> Tensor:
    """log(beta~ / sigma^2) of all steps but the last; the optimum is beta~ (1 + gain m_t)."""
    if not published:
        return -(gain * m_t).log1p()
    kind = scheduler.config.variance_type
    if scheduler.learns_variance:
        raise ValueError(
            f"`published` must be False for `variance_type` {kind!r}, which the error curve does"
            " not determine; measure it with ddpm_hf.bits_per_dim"
        )
    if kind.startswith("fixed_small"):
        return torch.zeros_like(gain)
    log_var = -scheduler.snr(scheduler.timesteps, torch.float64).log1p()  # log(1 - alpha_bar)
    return log_var[1:] - log_var[:-1]  # log(beta~ / beta)


def calibrate(
    denoiser: Denoiser,
    scheduler: Any,
    images: Tensor | Iterable[Tensor],
    *,
    generator: Generators = None,
    decoder: str = "exact",
    bit_depth: int | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> Calibration:
    """Measure a denoiser on a tensor of images: its error at every t, from T + 1 calls per image.

    `calibrate_checkpoint`, behind `ddpm-hf calibrate`, does this for a saved model and a dataset.

    Args:
        denoiser: any callable `(x_t, t)` with t of shape (B,) that returns a tensor or an object
            with `.sample`; bind class labels in a closure.
        scheduler: the diffusion process, with its clipping of x_0. An error curve in its
            configuration is ignored.
        images: held-out images in [-1, 1], (N, C, ...), or a sequence of such batches, which is
            read twice.
        generator: one generator, or one per image, which makes the noise of an image independent of
            the batch.
        decoder: "exact", "tanh" or "continuous", as for `bits_per_dim`; affects only predicted
            bounds.
        bit_depth: bits per channel of the images, 8 or 16; by default the model's.
        batch_size: images per batch; None for 64, or for the given batches.
        progress: show a progress bar.
    Returns:
        error curve with standard errors, a scheduler that uses it, and predicted bounds.
    Raises:
        TypeError: if `images` is an iterator, which can be read only once; as `bits_per_dim`.
        ValueError: as `bits_per_dim`.
    """
    if isinstance(images, Iterator):
        raise TypeError(
            "`images` must be a tensor or a collection that can be read twice, such as a list of"
            f" batches or a DataLoader, got {type(images).__name__}"
        )
    scheduler = without_curve(scheduler)

    def measure(scheduler: GaussianDDPMScheduler, timesteps: list[int] | None) -> BitsPerDim:
        return bits_per_dim(
            denoiser,
            scheduler,
            images,
            timesteps=timesteps,
            generator=generator,
            decoder=decoder,
            bit_depth=bit_depth,
            batch_size=batch_size,
            progress=progress,
        )

    chain = measure(scheduler, None)
    return calibration_of(scheduler, chain, measure(with_curve(scheduler, chain), [0]))


def without_curve(scheduler: Any) -> GaussianDDPMScheduler:
    """A scheduler with the same configuration and no error curve: published variances."""
    return GaussianDDPMScheduler.from_config(as_gaussian_scheduler(scheduler).config, x_0_mse=None)


def with_curve(scheduler: GaussianDDPMScheduler, chain: BitsPerDim) -> GaussianDDPMScheduler:
    """A scheduler with the error curve measured in the bound of all T steps."""
    return GaussianDDPMScheduler.from_config(scheduler.config, x_0_mse=chain.x_0_mse.flip(0))


def calibration_of(
    scheduler: GaussianDDPMScheduler, chain: BitsPerDim, end: BitsPerDim
) -> Calibration:
    """The calibration from two measured bounds.

    Args:
        scheduler: result of `without_curve`.
        chain: its bound on all T steps.
        end: bound of `with_curve(scheduler, chain)` on the trajectory [0].
    """
    errors = chain.errors.flip(1)
    spread = errors.std(0) if len(errors) > 1 else torch.full_like(errors[0], math.nan)
    return Calibration(
        scheduler=with_curve(scheduler, chain),
        x_0_mse=chain.x_0_mse.flip(0),
        standard_error=spread / math.sqrt(len(errors)),
        errors=errors,
        x_0_square=chain.x_0_square,
        decoder=end.terms[:, -1],
        measured=chain,
    )

"""Calibration: the error of a network at every t, measured once, and what follows for any K.

m_t = E (x_0 - x_0_hat(x_t))^2, mean over images and values. From it alone follow

    the variance of the least bound   sigma^2 = beta~ + coef_x_0^2 m_t         2201.06503, eq. 8
    the bound's term from t to s      log(1 + (SNR_s - SNR_t) m_t) / 2 nats
    the K timesteps of the least bound, by dynamic programming                 2106.03802

For an exact network m_t is what Analytic-DPM measures by the second moment of eps; for a trained
one it is the error that the bound asks for, and far steadier: to 4 % from 64 images at every t.

result = calibrate(unet, scheduler, images)                    # 256 images are plenty
result.bits_per_dim(25).value                                  # what 25 steps would have
pipeline.scheduler = result.scheduler                          # samples with these variances
"""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler, as_gaussian_scheduler
from ddpm_hf.diffusion.tensor_ops import Denoiser, Generators
from ddpm_hf.likelihood import BitsPerDim, bits_per_dim, prior_of, standard_error

# Where m_t is known to this share of itself, the bound of any K is known to a few thousandths.
STABLE = 0.1
# More than this share of an error must be left where there is more noise.
LARGEST_FALL = 0.9


@dataclass(frozen=True)
class PredictedBound:
    """The bound of a trajectory, predicted from the curve; float64, bits/dim.

    Attributes:
        value: the bound.
        standard_error: of it, over the images and their noise.
        timesteps: (K,), descending.
        prior: its first part.
        terms: (K,) in visiting order; the decoder's last.
    """

    value: float
    standard_error: float
    timesteps: Tensor
    prior: float
    terms: Tensor


@dataclass(frozen=True)
class Calibration:
    """The error of a network at every t, on N images; float64 on the CPU.

    Attributes:
        scheduler: as it was given, with the curve.
        x_0_mse: m_t, the curve, (T,).
        standard_error: of m_t, over images and noise, (T,); NaN for one image.
        errors: m_t of each image, (N, T).
        x_0_square: mean of x_0^2 of each image, (N,).
        decoder: bits/dim of each image for the decoder at t = 0, its variance m_0, (N,).
        measured: the bound of the whole chain as it was met on the way, with published variances.
    """

    scheduler: GaussianDDPMScheduler
    x_0_mse: Tensor
    standard_error: Tensor
    errors: Tensor
    x_0_square: Tensor
    decoder: Tensor
    measured: BitsPerDim

    @property
    def relative_error(self) -> Tensor:
        """The standard error of m_t over m_t, (T,); 0 where nothing errs."""
        return (self.standard_error / self.x_0_mse).where(self.x_0_mse > 0, 0.0)

    def num_images_for(self, relative_error: float = STABLE) -> int:
        """How many images would make m_t known to this share of itself at every t."""
        worst = self.relative_error.max().item()
        return math.ceil(len(self.errors) * (worst / relative_error) ** 2)

    def doubts(self) -> list[str]:
        """Signs, beyond chance, that the network was trained on another schedule or prediction.

        More noise cannot make x_0 better known, and a straight line through 0 has the error
        E x_0^2 / (1 + SNR E x_0^2).
        """
        said = []
        highest, where = self.x_0_mse.cummax(0)
        at = int((self.x_0_mse / highest.clamp(min=1e-12)).argmin())
        before = int(where[at])
        fall = self.errors[:, at] - LARGEST_FALL * self.errors[:, before]
        if len(fall) > 1 and fall.mean() < -4 * standard_error(fall):
            said.append(
                f"the error of x_0 falls from {self.x_0_mse[before]:.3g} at t={before} to"
                f" {self.x_0_mse[at]:.3g} at t={at}, where there is more noise: was the network"
                " trained with these betas and this prediction_type?"
            )
        square = self.x_0_square.mean()
        t, error = torch.arange(len(self.x_0_mse)), 4 * self.standard_error.nan_to_num()
        line = square / (1 + self.scheduler.snr(t, torch.float64) * square)
        excess = (self.x_0_mse - error) / line
        if excess.max() > 1.5:
            at = int(excess.argmax())
            said.append(
                f"the error of x_0 at t={at} is {excess[at]:.1f} times that of a straight line: was"
                " the network trained with these betas and this prediction_type?"
            )
        return said

    def bits_per_dim(
        self,
        num_inference_steps: int | None = None,
        *,
        timesteps: Sequence[int] | None = None,
        timestep_spacing: str | None = None,
        published: bool = False,
    ) -> PredictedBound:
        """The bound of a trajectory that ends at t = 0, at no cost.

        Args:
            num_inference_steps: K; None for the whole chain.
            timesteps: in place of that the timesteps themselves, descending.
            timestep_spacing: as in `set_timesteps`; by default that of the scheduler.
            published: with the variance that `variance_type` stands for, in all but the last step.
        Raises:
            ValueError: if the trajectory ends elsewhere, where the decoder was not measured; or for
                a published variance that is learned: it is not known from the curve.
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
                f"timesteps end at {t[-1]}, and the decoder was measured at 0 alone: pass"
                " timestep_spacing='linspace', or timesteps that end at 0"
            )
        log_snr = scheduler.log_snr(t, torch.float64)
        gain = log_snr[1:].exp() - log_snr[:-1].exp()  # of SNR in each step
        m_t, r = self.x_0_mse[t[:-1]], _log_ratio(scheduler, gain, self.x_0_mse[t[:-1]], published)
        terms = ((r.expm1() - r) + gain * m_t * r.exp()) / 2 / math.log(2)
        prior = prior_of(self.x_0_square, scheduler.snr(t[0], torch.float64))
        # How each image's own errors move the sum, to first order.
        slopes = gain * r.exp() / 2 / math.log(2)
        each = prior + self.errors[:, t[:-1]] @ slopes + self.decoder
        terms = torch.cat([terms, self.decoder.mean()[None]])
        return PredictedBound(
            (prior.mean() + terms.sum()).item(),
            standard_error(each),
            t,
            prior.mean().item(),
            terms,
        )


def _log_ratio(
    scheduler: GaussianDDPMScheduler, gain: Tensor, m_t: Tensor, published: bool
) -> Tensor:
    """log(beta~ / sigma^2) of all steps but the last: sigma^2 is beta~ (1 + gain m_t) at best."""
    if not published:
        return -(gain * m_t).log1p()
    kind = scheduler.config.variance_type
    if scheduler.learns_variance:
        raise ValueError(
            f"published must be False: what variance_type {kind!r} gives is not known from the"
            " curve; ddpm_hf.bits_per_dim measures it"
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
    """Measure the error of a network at every t: T + 1 network calls per image.

    Args:
        denoiser: any callable `(x_t, t)`, t (B,), that returns a tensor or an object with
            `.sample`; class labels by a closure. The images should not be those of its training.
        scheduler: the diffusion. What it clips in sampling is clipped here; a curve that it has is
            measured anew.
        images: in [-1, 1], (N, C, ...), or a sequence of such batches; gone through twice.
        generator: one, or one per image, which gives an image the same noise in any batch.
        decoder: "exact", "tanh" or "continuous", as for `bits_per_dim`: of predicted bounds alone.
        bit_depth: of the images, 8 or 16; by default the model's.
        batch_size: images at once; None for 64, or for batches as they come.
        progress: show a progress bar.
    Returns:
        the curve with its standard error, the scheduler that has it, and predictions.
    Raises:
        TypeError, ValueError: as `bits_per_dim` does; and for images that can be read only once.
    """
    if isinstance(images, Iterator):
        raise TypeError(
            "images must be a tensor, or what can be gone through twice, such as a list of batches"
            f" or a DataLoader, got {type(images).__name__}"
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
    """The scheduler with its published variances."""
    return GaussianDDPMScheduler.from_config(as_gaussian_scheduler(scheduler).config, x_0_mse=None)


def with_curve(scheduler: GaussianDDPMScheduler, chain: BitsPerDim) -> GaussianDDPMScheduler:
    """The scheduler with the errors that were met in the bound of its whole chain."""
    return GaussianDDPMScheduler.from_config(scheduler.config, x_0_mse=chain.x_0_mse.flip(0))


def calibration_of(
    scheduler: GaussianDDPMScheduler, chain: BitsPerDim, end: BitsPerDim
) -> Calibration:
    """What was measured, put together.

    Args:
        scheduler: of `without_curve`.
        chain: its bound on the whole chain.
        end: that of `with_curve`, on t = 0 alone.
    """
    errors = chain.errors.flip(1)
    return Calibration(
        scheduler=with_curve(scheduler, chain),
        x_0_mse=chain.x_0_mse.flip(0),
        standard_error=errors.std(0) / math.sqrt(len(errors)),
        errors=errors,
        x_0_square=chain.x_0_square,
        decoder=end.terms[:, -1],
        measured=chain,
    )

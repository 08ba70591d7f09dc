"""The variational bound of images, term by term, in bits per dimension (2006.11239, eq. 5).

-log p(x_0) <= KL(q(x_T | x_0) || N(0, I))                                       prior
             + sum over t of KL(q(x_prev | x_t, x_0) || p(x_prev | x_t))         terms
             - log p(x_0 | x_t) at the last step                                 decoder

result = bits_per_dim(unet, scheduler, images)                       # all T terms
result = bits_per_dim(unet, scheduler, images, num_timesteps=32)     # unbiased, from 32 terms
print(f"{result.mean:.3f} +- {result.standard_error:.3f} bits/dim")
"""

import copy
import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ddpm_hf.decoders import check_images, decoder_of
from ddpm_hf.diffusion.checks import check_generators, to_int
from ddpm_hf.diffusion.eval_mode import evaluating
from ddpm_hf.diffusion.scheduler_outputs import StepKL
from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler, as_gaussian_scheduler
from ddpm_hf.diffusion.tensor_ops import Denoiser, Generators, at_least_float32, draw_noise
from ddpm_hf.image_batches import batches_of, check_batch, num_batches, recorded_bit_depth, unet_of
from ddpm_hf.losses import denoise, nats_to_bits_per_dim


@dataclass(frozen=True)
class BitsPerDim:
    """The bound of N images on K timesteps, in float64 on the CPU and in bits/dim.

    If only some timesteps were measured per image, a term is the sum of its measurements, often
    none, divided by `num_expected`. Sums over timesteps and means over images are then unbiased.

    Attributes:
        total: bound of each image, (N,): prior plus terms.
        prior: KL(q(x_t | x_0) || N(0, I)) at the first timestep, (N,).
        terms: (N, K) in sampling order, from the noisiest timestep; the last is the decoder's.
        errors: mean of (x_0 - x_0_hat)^2 over the values of each image, summed over its
            measurements at the timestep, (N, K); no unit.
        x_0_square: mean of x_0^2 over the values of each image, (N,); no unit.
        timesteps: (K,), descending, int64.
        snr: alpha_bar / (1 - alpha_bar) at the timesteps, (K,).
        num_measured: number of measurements of all images at each timestep, (K,), int64.
        num_expected: expected number of measurements per image, (K,); 1 for the full bound.
    """

    total: Tensor
    prior: Tensor
    terms: Tensor
    errors: Tensor
    x_0_square: Tensor
    timesteps: Tensor
    snr: Tensor
    num_measured: Tensor
    num_expected: Tensor

    @property
    def x_0_mse(self) -> Tensor:
        """Mean of (x_0 - x_0_hat)^2 over images and values, (K,); NaN where never measured."""
        return self.errors.sum(0) / self.num_measured

    @property
    def eps_mse(self) -> Tensor:
        """Mean of (eps - eps_hat)^2, (K,): eps - eps_hat = sqrt(SNR) (x_0_hat - x_0)."""
        return self.snr * self.x_0_mse

    @property
    def mean(self) -> float:
        """Mean bound of the images."""
        return self.total.mean().item()

    @property
    def standard_error(self) -> float:
        """Standard error of `mean` over images, timesteps and noise; NaN for one image."""
        return standard_error(self.total)

    @staticmethod
    def concatenate(parts: Sequence["BitsPerDim"]) -> "BitsPerDim":
        """The results of several sets of images on the same timesteps as one result."""
        per_image = {
            name: torch.cat([getattr(part, name) for part in parts])
            for name in ("total", "prior", "terms", "errors", "x_0_square")
        }
        shared = {name: getattr(parts[0], name) for name in ("timesteps", "snr", "num_expected")}
        num_measured = torch.stack([part.num_measured for part in parts]).sum(0)
        return BitsPerDim(**per_image, **shared, num_measured=num_measured)


def bits_per_dim(
    denoiser: Denoiser,
    scheduler: GaussianDDPMScheduler,
    images: Tensor | Iterable[Tensor],
    *,
    num_inference_steps: int | None = None,
    timesteps: Sequence[int] | None = None,
    num_timesteps: int | None = None,
    generator: Generators = None,
    decoder: str = "exact",
    bit_depth: int | None = None,
    eta: float = 1.0,
    batch_size: int | None = None,
    progress: bool = True,
) -> BitsPerDim:
    """The variational bound on -log2 p(x_0) per dimension, from one noise draw per image and term.

    The estimate is unbiased: accurate for a set of images, to `standard_error`, and noisy for a
    single image. The arguments are not modified; a module is in eval mode during the call.

    Args:
        denoiser: any callable `(x_t, t)` with t of shape (B,) that returns a tensor or an object
            with `.sample`; bind class labels in a closure. Images are moved to the device and dtype
            of a model.
        scheduler: the diffusion process. Ignores the timesteps currently set on it; applies its
            clipping of x_0.
        images: in [-1, 1], (N, C, ...), or an iterable of such batches, which need not fit in
            memory.
        num_inference_steps: K, for the bound of sampling in K steps with the scheduler's spacing;
            None for all T timesteps.
        timesteps: explicit timesteps, descending, instead of `num_inference_steps`.
        num_timesteps: importance-sample this many terms per image, 2 to K, instead of all K: the
            decoder, and KL terms drawn in proportion to the change of the noise's log-variance,
            which bounds the weight of every term for a reasonable network.
        generator: one generator, or one per image, which makes the noise of an image independent of
            the batch.
        decoder: "exact", "tanh" (as in the papers) or "continuous" (data without a grid); see
            `decoders.decoder_of`.
        bit_depth: bits per channel of the images, 8 or 16; None for the bit depth recorded in the
            model, else 8.
        eta: noise of the sampler, in (0, 1], as in `step`; a deterministic sampler has no bound.
        batch_size: images per batch; None for 64, or for the given batches.
        progress: show a progress bar.
    Returns:
        bound per image and term; the only memory that grows with the number of images.
    Raises:
        TypeError: if `scheduler` is not a DDPM scheduler, or `images` does not contain tensors.
        ValueError: if images are missing, not finite, out of range, off the decoder's grid or of a
            shape that a `UNet2DModel` does not accept, if the output has the wrong shape or is not
            finite, or if an option is out of range.
    Source: 2006.11239, eq. 5 and 13; for eta below 1 2010.02502, eq. 11.
    """
    scheduler = _with_trajectory(scheduler, num_inference_steps, timesteps)
    if bit_depth is None:
        bit_depth = recorded_bit_depth(denoiser)
    if batch_size is not None:
        batch_size = to_int("batch_size", batch_size, 1, 2**31)
    bound = _BoundEstimator(denoiser, scheduler, decoder, bit_depth, eta, num_timesteps)
    total = num_batches(images, batch_size)
    if isinstance(images, Tensor):
        check_generators(generator, len(images))
    parts, start = [], 0
    with (
        torch.no_grad(),
        evaluating(denoiser) if isinstance(denoiser, torch.nn.Module) else nullcontext(),
        tqdm(
            total=total and total * bound.num_calls,
            desc="bits/dim",
            unit="call",
            leave=False,
            disable=None if progress else True,  # None: disabled without a terminal
        ) as bar,
    ):
        for batch in batches_of(images, batch_size):
            stop = start + len(batch)
            of_batch = generator[start:stop] if isinstance(generator, Sequence) else generator
            parts.append(bound.estimate(batch, of_batch, bar))
            start = stop
    if not start:
        raise ValueError("`images` must contain at least one image, got none")
    check_generators(generator, start)  # of an iterable, whose length is known only now
    return BitsPerDim.concatenate(parts)


class _BoundEstimator:
    """The bound on one trajectory, batch by batch."""

    def __init__(
        self,
        denoiser: Denoiser,
        scheduler: GaussianDDPMScheduler,
        decoder: str,
        bit_depth: int,
        eta: float,
        num_timesteps: int | None,
    ) -> None:
        self.denoiser, self.scheduler, self.eta = denoiser, scheduler, eta
        self.device, self.dtype = (getattr(denoiser, name, None) for name in ("device", "dtype"))
        self.unet = unet_of(denoiser)
        self.decoder, self.bit_depth = decoder, bit_depth
        self.decoder_nll = decoder_of(decoder, bit_depth)
        self.timesteps = scheduler.timesteps.cpu()
        self.snr = scheduler.snr(self.timesteps, torch.float64)
        K = len(self.timesteps)
        self.num_calls = K
        if num_timesteps is not None:
            self.num_calls = to_int("num_timesteps", num_timesteps, min(2, K), K)
        self.num_expected = torch.ones(K, dtype=torch.float64)
        if self.num_calls < K:
            log_var = -self.snr.log1p()  # log(1 - alpha_bar)
            falls = log_var[:-1] - log_var[1:]
            self.num_expected[:-1] = (self.num_calls - 1) * falls / falls.sum()

    def estimate(self, batch: Tensor, generator: Generators, bar: "tqdm[Any]") -> BitsPerDim:
        """The bound of images (B, C, ...)."""
        check_batch(batch, self.unet)
        check_images(batch, self.decoder, self.bit_depth)
        x_0 = at_least_float32(batch.to(self.device or batch.device))
        positions = self._positions(len(x_0), generator)
        t_of_calls = self.timesteps[positions]
        bits, errors = [], []
        for t, t_on_device in zip(t_of_calls, t_of_calls.to(x_0.device), strict=True):
            is_shared = bool((t == t[0]).all())  # the scheduler is faster for an int
            scheduler_t = int(t[0]) if is_shared else t_on_device
            step = self._step(x_0, t_on_device, scheduler_t, generator)
            is_decoder = t[0] == self.timesteps[-1]
            bits.append(nats_to_bits_per_dim(self._nll(x_0, step) if is_decoder else step.kl))
            errors.append((x_0 - step.pred_original_sample).square().flatten(1).mean(1))
            bar.update()
        return self._result(x_0, positions, torch.stack(bits), torch.stack(errors))

    def _positions(self, num_images: int, generator: Generators) -> Tensor:
        """Position in the trajectory of each call, (calls, B); the last call is the decoder's."""
        K = len(self.timesteps)
        if self.num_calls == K:
            return torch.arange(K)[:, None].expand(K, num_images)
        # Systematic sampling: evenly spaced in the cumulative expectation, one offset per image.
        edges = self.num_expected[:-1].cumsum(0)
        points = torch.arange(self.num_calls - 1)[:, None] + _uniform(num_images, generator)
        drawn = torch.searchsorted(edges, points, right=True).clamp(max=K - 2)
        return torch.cat([drawn, torch.full((1, num_images), K - 1)])

    def _step(
        self, x_0: Tensor, t: Tensor, scheduler_t: int | Tensor, generator: Generators
    ) -> StepKL:
        scheduler = self.scheduler
        x_t = scheduler.add_noise(x_0, draw_noise(x_0, generator), scheduler_t)
        output = denoise(self.denoiser, scheduler, x_t.to(self.dtype or x_t.dtype), t)
        return scheduler.step_kl(output, x_0, x_t, scheduler_t, eta=self.eta)

    def _nll(self, x_0: Tensor, step: StepKL) -> Tensor:
        return self.decoder_nll(x_0, step.pred_original_sample, step.log_variance)

    def _result(self, x_0: Tensor, positions: Tensor, bits: Tensor, errors: Tensor) -> BitsPerDim:
        """The result from the bits and errors of each call, (calls, B)."""
        bits, errors = bits.cpu().double(), errors.cpu().double()
        if not bits.isfinite().all():
            t = self.timesteps[positions[~bits.isfinite()]].max()
            raise ValueError(
                f"the bound is not finite at timestep {t}: the weights of the network are damaged,"
                " or too large for its dtype; try torch.float32"
            )
        K = len(self.timesteps)
        weighted = (bits / self.num_expected[positions]).T
        terms = torch.zeros(len(x_0), K, dtype=torch.float64)
        terms.scatter_add_(1, positions.T, weighted)
        x_0_square = x_0.square().flatten(1).mean(1).cpu().double()
        prior = prior_bits_per_dim(x_0_square, self.snr[0])
        return BitsPerDim(
            total=prior + terms.sum(1),
            prior=prior,
            terms=terms,
            errors=torch.zeros_like(terms).scatter_add_(1, positions.T, errors.T),
            x_0_square=x_0_square,
            timesteps=self.timesteps,
            snr=self.snr,
            num_measured=positions.flatten().bincount(minlength=K),
            num_expected=self.num_expected,
        )


def standard_error(values: Tensor) -> float:
    """Standard error of the mean of independent values, (N,); NaN for one value."""
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan


def prior_bits_per_dim(x_0_square: Tensor, snr: Tensor) -> Tensor:
    """KL(N(sqrt(alpha_bar) x_0, (1 - alpha_bar) I) || N(0, I)) in bits/dim, (N,).

    Args:
        x_0_square: mean of x_0^2 over the values of each image, (N,).
        snr: signal-to-noise ratio at the first timestep.
    """
    alpha_bar = snr / (1 + snr)
    return nats_to_bits_per_dim((alpha_bar * (x_0_square - 1) - (-alpha_bar).log1p())[:, None] / 2)


def _with_trajectory(
    scheduler: Any, num_inference_steps: int | None, timesteps: Sequence[int] | None
) -> GaussianDDPMScheduler:
    """A copy of the scheduler with these timesteps, by default all T."""
    own = copy.deepcopy(as_gaussian_scheduler(scheduler))
    if num_inference_steps is None and timesteps is None:
        timesteps = range(len(own) - 1, -1, -1)
    own.set_timesteps(num_inference_steps, timesteps=timesteps)
    return own


def _uniform(count: int, generator: Generators) -> Tensor:
    """Uniform numbers in [0, 1), (count,) float64 on the CPU; one from each generator of a list."""
    if isinstance(generator, Sequence):
        return torch.cat([_uniform(1, one) for one in generator])
    device = generator.device if generator else None
    return torch.randint(2**53, (count,), generator=generator, device=device).cpu().double() / 2**53

"""The variational bound of images, term by term, in bits per dimension (2006.11239, eq. 5).

-log p(x_0) <= KL(q(x_T | x_0) || N(0, I))                                       prior
             + sum over t of KL(q(x_prev | x_t, x_0) || p(x_prev | x_t))         terms
             - log p(x_0 | x_t) at the last step                                 decoder

result = bits_per_dim(unet, scheduler, images)                       # every step of the chain
result = bits_per_dim(unet, scheduler, images, num_timesteps=32)     # unbiased, from 32 of them
print(f"{result.mean:.3f} +- {result.standard_error:.3f} bits/dim")
"""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor
from tqdm.auto import tqdm

from ddpm_hf.decoders import check_images, decoder_of
from ddpm_hf.diffusion.checks import check_tensor, to_int
from ddpm_hf.diffusion.image_processor import image_facts
from ddpm_hf.diffusion.pipeline import evaluating
from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler, StepKL, as_gaussian_scheduler
from ddpm_hf.diffusion.tensor_ops import Denoiser, Generators, at_least_float32, draw_noise
from ddpm_hf.losses import bits_per_dim as to_bits_per_dim
from ddpm_hf.losses import denoise

_BATCH_SIZE = 64


@dataclass(frozen=True)
class BitsPerDim:
    """The bound of N images on K timesteps; all float64 on the CPU, in bits/dim but for the errors.

    Where only some timesteps of an image were measured, these terms are divided by `num_expected`,
    and the others are 0: sums and means over images are unbiased.

    Attributes:
        total: the bound of each image, (N,): prior and terms.
        prior: KL(q(x_t | x_0) || N(0, I)) at the first timestep, (N,).
        terms: (N, K) in visiting order, from the noisiest; the decoder's last.
        errors: mean of (x_0 - x_0_hat)^2 over the values of each image, (N, K).
        x_0_square: mean of x_0^2 over the values of each image, (N,).
        timesteps: (K,), descending, int64.
        snr: alpha_bar / (1 - alpha_bar) there, (K,).
        num_measured: images that each timestep was measured on, (K,), int64.
        num_expected: how many of one image that is in expectation, (K,); 1 for the whole bound.
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
        """The same of eps, (K,): eps - eps_hat is sqrt(SNR) (x_0_hat - x_0)."""
        return self.snr * self.x_0_mse

    @property
    def mean(self) -> float:
        """The bound of the set."""
        return self.total.mean().item()

    @property
    def standard_error(self) -> float:
        """Of `mean`, over images, timesteps and noise; NaN for one image."""
        return standard_error(self.total)

    @staticmethod
    def concatenate(parts: Sequence["BitsPerDim"]) -> "BitsPerDim":
        """The result for the images of all parts, which have the same timesteps."""
        per_image = {
            name: torch.cat([getattr(part, name) for part in parts])
            for name in ("total", "prior", "terms", "errors", "x_0_square")
        }
        shared = {name: getattr(parts[0], name) for name in ("timesteps", "snr", "num_expected")}
        num_measured = torch.stack([part.num_measured for part in parts]).sum(0)
        return BitsPerDim(**per_image, **shared, num_measured=num_measured)


def standard_error(values: Tensor) -> float:
    """Of the mean of independent values, (N,)."""
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan


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
    """The variational bound on -log2 p(x_0) per dimension, one draw of noise per image and term.

    An unbiased estimate of the bound: no image has the exact value, a set has it within
    `standard_error`. Nothing that is passed is changed; a module is in eval mode meanwhile.

    Args:
        denoiser: any callable `(x_t, t)`, t (B,), that returns a tensor or an object with
            `.sample`; class labels by a closure. A model gets images on its device, in its dtype.
        scheduler: the diffusion; of a trajectory that sampling chose nothing is taken over. What it
            clips in sampling is clipped here.
        images: in [-1, 1], (N, C, ...), or anything that yields such batches, so that the set need
            not be in memory.
        num_inference_steps: K, for the bound of a model that samples in K steps, spaced as the
            scheduler is configured; None for its whole chain, T.
        timesteps: in place of that the timesteps themselves, descending.
        num_timesteps: network calls per image, 2 to K, for an unbiased estimate where K are too
            dear: one for the decoder, the others for KLs drawn in proportion to what the noise's
            log-variance changes by, which no single term of a fair network outweighs.
        generator: one, or one per image, which gives an image the same noise in any batch.
        decoder: "exact", "tanh" (the papers' approximation) or "continuous" (data without a grid):
            see `decoders.decoder_of`.
        bit_depth: of the images, 8 or 16; None for what the model was trained on, where it says so,
            else 8.
        eta: of the sampler that is bounded, in (0, 1]: without noise there is no bound.
        batch_size: images at once; None for 64, or for batches as they come.
        progress: show a progress bar.
    Returns:
        the bound per image and term. Memory grows with the number of images by these alone.
    Raises:
        TypeError, ValueError: for a scheduler that is not DDPM's, images that are not finite, out
            of range or off the decoder's grid, no images, an output of the wrong shape or not
            finite, or an option out of its range.
    Source: 2006.11239, eq. 5 and 13; for eta below 1 2010.02502, eq. 11.
    """
    scheduler = _on_trajectory(scheduler, num_inference_steps, timesteps)
    if bit_depth is None:
        bit_depth = _bit_depth_of(denoiser)
    if batch_size is not None:
        batch_size = to_int("batch_size", batch_size, 1, 2**31)
    bound = _Bound(denoiser, scheduler, decoder, bit_depth, eta, num_timesteps)
    num_batches = _num_batches(images, batch_size)
    parts, start = [], 0
    with (
        torch.no_grad(),
        evaluating(denoiser) if isinstance(denoiser, torch.nn.Module) else nullcontext(),
        tqdm(
            total=num_batches and num_batches * bound.num_calls,
            desc="bits/dim",
            unit="call",
            leave=False,
            disable=None if progress else True,  # None: where nobody watches
        ) as bar,
    ):
        for batch in _batches(images, batch_size):
            rows = range(start, start + len(batch))
            parts.append(bound.of_batch(batch, _of_rows(generator, rows), bar))
            start = rows.stop
    if not start:
        raise ValueError("images is empty: a bound needs at least one image")
    return BitsPerDim.concatenate(parts)


class _Bound:
    """The bound on one trajectory, a batch at a time."""

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
        self.decoder, self.bit_depth = decoder, bit_depth
        self.nll_of = decoder_of(decoder, bit_depth)
        self.timesteps = scheduler.timesteps.cpu()
        self.snr = scheduler.snr(self.timesteps, torch.float64)
        K = len(self.timesteps)
        self.num_calls = K
        if num_timesteps is not None:
            self.num_calls = to_int("num_timesteps", num_timesteps, min(2, K), K)
        # How often each timestep of an image is expected to be measured.
        self.expected = torch.ones(K, dtype=torch.float64)
        if self.num_calls < K:
            log_var = -self.snr.log1p()  # log(1 - alpha_bar)
            falls = log_var[:-1] - log_var[1:]
            self.expected[:-1] = (self.num_calls - 1) * falls / falls.sum()

    def of_batch(self, batch: Tensor, generator: Generators, bar: Any) -> BitsPerDim:
        """The bound of images (B, C, ...)."""
        _check_batch(batch)
        check_images(batch, self.decoder, self.bit_depth)
        x_0 = at_least_float32(batch.to(self.device or batch.device))
        positions = self._positions(len(x_0), generator)
        each_t = self.timesteps[positions]
        bits, errors = [], []
        for t, on_device in zip(each_t, each_t.to(x_0.device), strict=True):
            is_shared = bool((t == t[0]).all())  # an int then, for which the scheduler is faster
            step = self._step(x_0, on_device, int(t[0]) if is_shared else on_device, generator)
            is_decoder = t[0] == self.timesteps[-1]
            bits.append(to_bits_per_dim(self._decode(x_0, step) if is_decoder else step.kl))
            errors.append((x_0 - step.pred_original_sample).square().flatten(1).mean(1))
            bar.update()
        return self._result(x_0, positions, torch.stack(bits), torch.stack(errors))

    def _positions(self, num_images: int, generator: Generators) -> Tensor:
        """Which elements of the trajectory each call measures, (calls, B); the last is the last."""
        K = len(self.timesteps)
        if self.num_calls == K:
            return torch.arange(K)[:, None].expand(K, num_images)
        # Evenly spaced in the cumulative expectation, from a start of each image's own.
        edges = self.expected[:-1].cumsum(0)
        places = torch.arange(self.num_calls - 1)[:, None] + _uniform(num_images, generator)
        drawn = torch.searchsorted(edges, places, right=True).clamp(max=K - 2)
        return torch.cat([drawn, torch.full((1, num_images), K - 1)])

    def _step(
        self, x_0: Tensor, t: Tensor, scheduler_t: int | Tensor, generator: Generators
    ) -> StepKL:
        scheduler = self.scheduler
        x_t = scheduler.add_noise(x_0, draw_noise(x_0, generator), scheduler_t)
        output = denoise(self.denoiser, scheduler, x_t.to(self.dtype or x_t.dtype), t)
        return scheduler.step_kl(output, x_0, x_t, scheduler_t, eta=self.eta)

    def _decode(self, x_0: Tensor, step: StepKL) -> Tensor:
        return self.nll_of(x_0, step.pred_original_sample, step.log_variance)

    def _result(self, x_0: Tensor, positions: Tensor, bits: Tensor, errors: Tensor) -> BitsPerDim:
        """What `bits` and `errors`, (calls, B), amount to."""
        bits, errors = bits.cpu().double(), errors.cpu().double()
        if not bits.isfinite().all():
            t = self.timesteps[positions[~bits.isfinite()]].max()
            raise ValueError(
                f"the bound is not finite at timestep {t}: the weights of the network are damaged,"
                " or too large for its dtype"
            )
        K = len(self.timesteps)
        weighted = (bits / self.expected[positions]).T
        terms = torch.zeros(len(x_0), K, dtype=torch.float64)
        terms.scatter_add_(1, positions.T, weighted)
        x_0_square = x_0.square().flatten(1).mean(1).cpu().double()
        prior = prior_of(x_0_square, self.snr[0])
        return BitsPerDim(
            total=prior + terms.sum(1),
            prior=prior,
            terms=terms,
            errors=torch.zeros_like(terms).scatter_add_(1, positions.T, errors.T),
            x_0_square=x_0_square,
            timesteps=self.timesteps,
            snr=self.snr,
            num_measured=positions.flatten().bincount(minlength=K),
            num_expected=self.expected,
        )


def prior_of(x_0_square: Tensor, snr: Tensor) -> Tensor:
    """KL(N(sqrt(alpha_bar) x_0, (1 - alpha_bar) I) || N(0, I)) in bits/dim, (N,).

    Args:
        x_0_square: mean of x_0^2 over the values of each image, (N,).
        snr: of the first timestep.
    """
    alpha_bar = snr / (1 + snr)
    return to_bits_per_dim((alpha_bar * (x_0_square - 1) - (-alpha_bar).log1p())[:, None] / 2)


def _on_trajectory(
    scheduler: Any, num_inference_steps: int | None, timesteps: Sequence[int] | None
) -> GaussianDDPMScheduler:
    """A copy that visits these timesteps, all of the chain unless told otherwise."""
    own = copy.deepcopy(as_gaussian_scheduler(scheduler))
    if num_inference_steps is None and timesteps is None:
        timesteps = range(len(own) - 1, -1, -1)
    own.set_timesteps(num_inference_steps, timesteps=timesteps)
    return own


def _bit_depth_of(denoiser: Any) -> int:
    """What a model says about its images; 8 for other callables."""
    model = getattr(denoiser, "_orig_mod", denoiser)  # of torch.compile
    facts = image_facts(model) if isinstance(model, UNet2DModel) else None
    return facts.bit_depth if facts else 8


def _uniform(count: int, generator: Generators) -> Tensor:
    """Numbers in [0, 1), (count,) float64 on the CPU; one of each generator of several."""
    if isinstance(generator, Sequence):
        return torch.cat([_uniform(1, one) for one in generator])
    device = generator.device if generator else None
    return torch.randint(2**53, (count,), generator=generator, device=device).cpu().double() / 2**53


def _batches(images: Tensor | Iterable[Tensor], batch_size: int | None) -> Iterator[Tensor]:
    is_tensor = isinstance(images, Tensor)
    size = batch_size or (_BATCH_SIZE if is_tensor else None)
    for batch in [images] if is_tensor else images:
        if not isinstance(batch, Tensor):
            raise TypeError(
                "images must be a tensor, or yield tensors (N, C, ...), got"
                f" {type(batch).__name__}; of a loader of pairs pass (x for x, _ in loader)"
            )
        for start in range(0, len(batch), size or max(1, len(batch))):
            yield batch[start : start + size] if size else batch


def _num_batches(images: Any, batch_size: int | None) -> int | None:
    """How many there will be; None where only the end will tell."""
    if isinstance(images, Tensor):
        return math.ceil(len(images) / (batch_size or _BATCH_SIZE))
    return len(images) if batch_size is None and hasattr(images, "__len__") else None


def _of_rows(generator: Generators, rows: range) -> Generators:
    if not isinstance(generator, Sequence):
        return generator
    return generator[rows.start : rows.stop]


def _check_batch(batch: Tensor) -> None:
    check_tensor("images", batch)
    if batch.ndim < 2:
        raise ValueError(f"images must be (N, C, ...), got shape {tuple(batch.shape)}")

"""Gaussian diffusion, the mathematics of DDPM (2006.11239), as a diffusers scheduler.

Notation. Steps are counted from 0, as in diffusers: `t` here is the paper's t + 1, and "-1" stands
for the clean image. "prev" is the previous element of the current trajectory: t - 1 while
training, the next smaller chosen timestep after `set_timesteps`.

    q(x_t | x_0)         = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)                    eq. 4
    q(x_prev | x_t, x_0) = N(coef_x_0 x_0 + coef_x_t x_t, posterior_var I)                  eq. 7
    p(x_prev | x_t)      = the same with x_0 estimated by the network                       eq. 11

Every coefficient is derived in float64 from log alpha_bar, where nothing cancels, and rounded once.
This file travels with the weights: it imports nothing from the package around it.
"""

import hashlib
import json
import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from torch import Tensor

Array = np.ndarray[Any, np.dtype[np.float64]]
Timestep = int | Tensor
Generators = torch.Generator | Sequence[torch.Generator] | None

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
FIXED_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")
VARIANCE_TYPES = (*FIXED_VARIANCES, "learned", "learned_range")
TIMESTEP_SPACINGS = ("leading", "linspace", "trailing")
EXTENSION_FORMAT = 1


class Gaussian(NamedTuple):
    """A diagonal normal distribution; `variance` and `log_variance` broadcast against `mean`."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor


class ReverseGaussian(NamedTuple):
    """p(x_prev | x_t): `Gaussian` and the (clipped) estimate of x_0 that its mean is made of."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    pred_original_sample: Tensor


# ----------------------------------------------------------------------------------------------
# Noise schedules: betas, (T,) float64


def linear_betas(num_train_timesteps: int, beta_start: float, beta_end: float) -> Array:
    """Betas on a straight line (2006.11239, section 4)."""
    return np.linspace(beta_start, beta_end, num_train_timesteps)


def scaled_linear_betas(num_train_timesteps: int, beta_start: float, beta_end: float) -> Array:
    """Square roots of the betas on a straight line (2112.10752)."""
    return np.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps) ** 2


def cosine_betas(num_train_timesteps: int, offset: float = 0.008, cap: float = 0.999) -> Array:
    """alpha_bar ~ cos^2((t/T + s) / (1 + s) pi/2), betas capped (2102.09672, eq. 17).

    Written with sin u, u = (1 - t/T) / (1 + s) pi/2, and sin^2 a - sin^2 b = sin(a - b) sin(a + b):
    1 - alpha_bar_t / alpha_bar_prev as it stands loses 11 digits at small t.
    """
    u = np.arange(num_train_timesteps, -1, -1) / num_train_timesteps / (1 + offset) * math.pi / 2
    betas = np.sin(u[:-1] - u[1:]) * np.sin(u[:-1] + u[1:]) / np.sin(u[:-1]) ** 2
    return np.minimum(betas, cap)


def rescale_zero_terminal_snr(betas: Array) -> Array:
    """Betas whose last alpha_bar is 0 and whose first is unchanged (2305.08891, algorithm 1).

    The shift of sqrt(alpha_bar) leaves its differences as they are, so the new betas follow from
    `drop` = 1 - sqrt(alpha) without a difference of nearly equal numbers.
    """
    half_log = np.log1p(-betas).cumsum() / 2
    root_prev = np.exp(half_log[:-1])
    drop = -np.expm1(np.log1p(-betas[1:]) / 2) * root_prev / (root_prev - np.exp(half_log[-1]))
    drop[-1] = 1.0
    return np.concatenate([betas[:1], drop * (2 - drop)])


# ----------------------------------------------------------------------------------------------
# Trajectories


def spaced_timesteps(spacing: str, num_steps: int, num_train_timesteps: int, offset: int) -> Any:
    """`num_steps` distinct timesteps, ascending (2305.08891, table 2)."""
    if spacing == "leading":
        steps = np.arange(num_steps) * (num_train_timesteps // num_steps)
        return steps + min(offset, num_train_timesteps - 1 - steps[-1])
    if spacing == "linspace":
        return np.linspace(0, num_train_timesteps - 1, num_steps).round().astype(np.int64)
    # Cut to num_steps: the float grid may hold one more, which would be t = -1.
    grid = np.arange(num_train_timesteps, 0, -num_train_timesteps / num_steps)[:num_steps]
    return grid.round().astype(np.int64)[::-1] - 1


class Row(NamedTuple):
    """The coefficients of one reverse step: plain numbers, or tensors that broadcast per image."""

    x_0_from_output: Any
    x_0_from_x_t: Any
    coef_x_0: Any
    coef_x_t: Any
    std: Any
    log_std_slope: Any
    log_std: Any


class Trajectory:
    """Float64 coefficients of the reverse process along descending `timesteps`.

    Args:
        log_alphas: log(1 - beta) of the training schedule, (T,).
        timesteps: ascending, distinct, in [0, T); (K,).
        prediction_type: what the network predicts.
        variance_type: which reverse variance is wanted.
    """

    def __init__(
        self, log_alphas: Array, timesteps: Any, prediction_type: str, variance_type: str
    ) -> None:
        self.timesteps = timesteps
        self.prev = np.concatenate([[-1], timesteps[:-1]])
        self.num_train_timesteps = len(log_alphas)
        self.prediction_type, self.variance_type = prediction_type, variance_type
        log_alpha_bar = log_alphas.cumsum()[timesteps]
        self.log_alpha_bar = log_alpha_bar
        self.log_alpha_bar_prev = np.concatenate([[0.0], log_alpha_bar[:-1]])
        # Summed per segment: a difference of two log alpha_bar loses digits where both are large.
        self.log_alpha = np.add.reduceat(log_alphas[: timesteps[-1] + 1], self.prev + 1)
        self.beta = -np.expm1(self.log_alpha)
        self.noise_ratio = np.expm1(self.log_alpha_bar_prev) / np.expm1(log_alpha_bar)
        self.posterior_var = self.noise_ratio * self.beta  # eq. 7
        self._rows: dict[float, dict[int, Row]] = {}
        self._tables: dict[Any, Tensor] = {}

    @property
    def log_posterior_var(self) -> Array:
        """Log of `posterior_var`, the last step's 0 replaced by its neighbour's (2102.09672)."""
        clipped = self.posterior_var.copy()
        clipped[0] = clipped[1] if len(clipped) > 1 else self.beta[0]
        return np.log(clipped)

    def posterior_coefficients(self, eta: float = 1.0) -> tuple[Array, Array]:
        """coef_x_0 and coef_x_t of eq. 7, or of 2010.02502 eq. 12 with sigma by its eq. 16."""
        r = self.noise_ratio
        g = np.exp(self.log_alpha) * r
        coef_x_t_squared = (1 - eta**2) + eta**2 * g
        # 1 - g = beta_t / (1 - alpha_bar_t); at eta = 1 the last factor is 1.
        one_minus_g = self.beta / -np.expm1(self.log_alpha_bar)
        coef_x_0 = np.exp(self.log_alpha_bar_prev / 2) * one_minus_g
        coef_x_0 *= (1 + eta**2 * g) / (1 + np.sqrt(g * coef_x_t_squared))
        return coef_x_0, np.sqrt(r * coef_x_t_squared)

    def x_0_coefficients(self) -> tuple[Array, Array]:
        """x_0 = first * model_output + second * x_t (eq. 15; v: 2202.00512, appendix D)."""
        alpha_bar_root = np.exp(self.log_alpha_bar / 2)
        sigma = np.sqrt(-np.expm1(self.log_alpha_bar))
        if self.prediction_type == "epsilon":
            return -sigma / alpha_bar_root, 1 / alpha_bar_root
        if self.prediction_type == "v_prediction":
            return -sigma, alpha_bar_root
        return np.ones_like(sigma), np.zeros_like(sigma)

    def reverse_log_variance(self) -> tuple[Array, Array]:
        """Reverse log-variance as slope * network's v + value: learned_range is 2102.09672 eq. 15."""
        low, high = self.log_posterior_var, np.log(self.beta)
        zero = np.zeros_like(low)
        if self.variance_type.startswith("fixed_small"):
            return zero, low
        if self.variance_type.startswith("fixed_large"):
            return zero, np.concatenate([low[:1], high[1:]])
        if self.variance_type == "learned":
            return np.ones_like(low), zero
        return (high - low) / 2, (high + low) / 2

    def columns(self, eta: float) -> Array:
        """The fields of `Row` for every timestep, (7, K) float64."""
        slope, log_var = self.reverse_log_variance()
        learned = self.variance_type.startswith("learned")
        std = np.ones_like(log_var) if learned else np.exp(log_var / 2)
        std = eta * std
        std[0] = 0.0  # no noise on the last step of the trajectory
        return np.stack(
            [
                *self.x_0_coefficients(),
                *self.posterior_coefficients(eta),
                std,
                slope / 2,
                log_var / 2,
            ]
        )

    def row(self, t: int, eta: float) -> Row:
        """Plain numbers for a timestep known on the host."""
        rows = self._rows.get(eta)
        if rows is None:
            columns = self.columns(eta).T.tolist()
            rows = {int(t): Row(*values) for t, values in zip(self.timesteps, columns, strict=True)}
            self._rows[eta] = rows
        return rows[t]

    def gathered_row(self, t: Tensor, like: Tensor, eta: float) -> Row:
        """Tensors that broadcast against `like`, gathered on its device; NaN off the trajectory."""
        key = (eta, like.device, like.dtype)
        if key not in self._tables:
            self._tables[key] = self._table(eta, like)
        return Row(*gather(self._tables[key], t, like))

    @torch.inference_mode(False)
    def _table(self, eta: float, like: Tensor) -> Tensor:
        columns = self.columns(eta)
        table = np.full((len(columns), self.num_train_timesteps), np.nan)
        table[:, self.timesteps] = columns
        return torch.from_numpy(table).to(like.device, like.dtype)


def gather(table: Tensor, t: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """Columns `t` of an (n, T) table as n tensors (B, 1, ..., 1) or (1, ..., 1)."""
    index = t.to(like.device).reshape(-1)
    if index.dtype not in (torch.int32, torch.int64):
        index = index.long()
    rows = table.index_select(1, index)
    return rows.reshape(len(table), -1, *(1,) * (like.ndim - 1)).unbind(0)


def add_scaled_(total: Tensor, scale: Any, x: Tensor) -> Tensor:
    """total += scale * x, in place, in one pass."""
    return total.add_(x, alpha=scale) if isinstance(scale, float) else total.addcmul_(x, scale)


def scaled_noise(like: Tensor, std: Any, generator: Generators) -> Tensor:
    """std times standard normal noise, contiguous, so that it does not depend on x's strides."""
    noise = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    if isinstance(std, float) and std == 0.0:
        return noise.zero_()
    scale = std if isinstance(std, float) else 1.0
    if generator is None or isinstance(generator, torch.Generator):
        noise.normal_(0.0, scale, generator=generator)
    else:
        for image, its_generator in zip(noise, generator, strict=True):
            image.normal_(0.0, scale, generator=its_generator)
    return noise if isinstance(std, float) else noise.mul_(std)


class GaussianDDPMScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Drop-in for diffusers' `DDPMScheduler`: same configuration keys, meaning and defaults.

    Args:
        num_train_timesteps: T, the length of the training chain, 1 to 100000.
        beta_start: first beta of the linear schedules, in (0, 1).
        beta_end: last beta of the linear schedules, in (0, 1).
        beta_schedule: "linear", "scaled_linear" or "squaredcos_cap_v2".
        trained_betas: T betas in (0, 1], instead of a named schedule.
        variance_type: reverse variance. "fixed_small" is the posterior's, "fixed_large" is beta_t;
            the "_log" forms are the same distributions. With "learned" the network's second half of
            channels is the log-variance, with "learned_range" an interpolation (2102.09672 eq. 15).
        clip_sample: clamp the estimate of x_0 to [-clip_sample_range, clip_sample_range].
        prediction_type: what the network predicts: "epsilon", "sample" (x_0) or "v_prediction".
        thresholding: dynamic thresholding of the estimate of x_0 (2205.11487), instead of clipping.
        dynamic_thresholding_ratio: the quantile of abs(x_0) that is thresholded at, in (0, 1].
        clip_sample_range: see `clip_sample`.
        sample_max_value: upper bound of the dynamic threshold, at least 1.
        timestep_spacing: "leading", "linspace" or "trailing" (2305.08891, table 2).
        steps_offset: added to "leading" timesteps, as far as they stay below T.
        rescale_betas_zero_snr: rescale so that the last step holds no signal (2305.08891).
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]  # noqa: RUF012
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | Array | Tensor | None = None,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        for name, value, choices in (
            ("variance_type", variance_type, VARIANCE_TYPES),
            ("prediction_type", prediction_type, PREDICTION_TYPES),
            ("timestep_spacing", timestep_spacing, TIMESTEP_SPACINGS),
            ("beta_schedule", beta_schedule, ("linear", "scaled_linear", "squaredcos_cap_v2")),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
        if trained_betas is not None:
            betas = np.asarray(trained_betas, dtype=np.float64)
            self.register_to_config(trained_betas=betas.tolist())
        elif beta_schedule == "linear":
            betas = linear_betas(num_train_timesteps, beta_start, beta_end)
        elif beta_schedule == "scaled_linear":
            betas = scaled_linear_betas(num_train_timesteps, beta_start, beta_end)
        else:
            betas = cosine_betas(num_train_timesteps)
        if betas.shape != (num_train_timesteps,):
            raise ValueError(
                f"trained_betas must hold num_train_timesteps={num_train_timesteps} values,"
                f" got shape {betas.shape}"
            )
        if rescale_betas_zero_snr:
            betas = rescale_zero_terminal_snr(betas)
        with np.errstate(divide="ignore"):
            self._log_alphas = np.log1p(-betas)
        self._register_tables(betas)
        # Nothing counts as "left at its default": else a swap by from_config drops the value.
        self.register_to_config(_use_default_values=[])
        self.init_noise_sigma = 1.0
        self.custom_timesteps = False
        self.num_inference_steps: int | None = None
        self._follow(np.arange(num_train_timesteps))

    @torch.inference_mode(False)
    def _register_tables(self, betas: Array) -> None:
        """float32 tables for stock tools, and the (2, T) table of eq. 4."""
        log_alpha_bar = self._log_alphas.cumsum()
        self.betas = torch.from_numpy(betas).float()
        self.alphas = torch.from_numpy(1 - betas).float()
        self.alphas_cumprod = torch.from_numpy(np.exp(log_alpha_bar)).float()
        eq_4 = np.stack([np.exp(log_alpha_bar / 2), np.sqrt(-np.expm1(log_alpha_bar))])
        self._eq_4 = torch.from_numpy(eq_4)
        self._eq_4_on: dict[Any, Tensor] = {}

    def _follow(self, ascending: Any, device: Any = None) -> None:
        config = self.config
        self._trajectory = Trajectory(
            self._log_alphas, ascending, config.prediction_type, config.variance_type
        )
        self.timesteps = torch.from_numpy(ascending[::-1].astype(np.int64)).to(device)

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    def scale_model_input(self, sample: Tensor, timestep: Timestep | None = None) -> Tensor:
        """The sample as it is: DDPM does not scale the network's input."""
        return sample

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
        timestep_spacing: str | None = None,
    ) -> None:
        """Choose the trajectory: which of the T timesteps sampling visits, in descending order.

        Args:
            num_inference_steps: K, in [1, T]: exactly K distinct timesteps are visited.
            device: where `self.timesteps` shall live; None leaves it on the CPU.
            timesteps: the timesteps themselves, strictly descending, instead of a number.
            timestep_spacing: overrides the configuration's.
        """
        T = len(self)
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("pass one of num_inference_steps and timesteps")
        if timesteps is not None:
            ascending = np.array(timesteps, dtype=np.int64)[::-1]
        elif not isinstance(num_inference_steps, int) or not 1 <= num_inference_steps <= T:
            raise ValueError(
                f"num_inference_steps must be an int in 1..{T}, got {num_inference_steps!r}"
            )
        else:
            spacing = timestep_spacing or self.config.timestep_spacing
            ascending = spaced_timesteps(spacing, num_inference_steps, T, self.config.steps_offset)
        self.custom_timesteps = timesteps is not None
        self.num_inference_steps = len(ascending)
        self._follow(ascending, device)

    def step(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
        *,
        variance_noise: Tensor | None = None,
        eta: float = 1.0,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """One step of the reverse process: x_prev from x_t.

        Args:
            model_output: the network's output at (sample, timestep), shaped like `sample`; twice
                the channels for the learned variances.
            timestep: t, an element of the trajectory; an int or a tensor, 0-dim or (B,).
            sample: x_t, (B, ...).
            generator: one generator, or one per image, so that an image gets the same noise in
                any batch.
            return_dict: return a `DDPMSchedulerOutput`, else the tuple of its two fields.
            variance_noise: standard normal noise to use instead of drawing it, shaped like `sample`.
            eta: 1 is DDPM, 0 is deterministic DDIM (2010.02502 eq. 12 and 16), in [0, 1].

        Returns:
            `prev_sample` (x_prev) and `pred_original_sample` (the estimate of x_0), in the dtype of
            `sample`; the arithmetic is at least float32.
        """
        dtype = sample.dtype
        x_t = sample if dtype == torch.float64 else sample.float()
        row = self._row(timestep, x_t, eta)
        output, v = self._split(model_output, x_t)
        x_0_hat = self._predict_x_0(output, x_t, row)  # eq. 15
        if variance_noise is None:
            x_prev = scaled_noise(x_t, row.std, generator)
        else:
            x_prev = variance_noise.to(x_t.dtype) * row.std
        if v is not None:
            x_prev *= torch.exp(v * row.log_std_slope + row.log_std)  # 2102.09672 eq. 15
        add_scaled_(x_prev, row.coef_x_0, x_0_hat)  # eq. 7
        add_scaled_(x_prev, row.coef_x_t, x_t)
        x_prev, x_0_hat = x_prev.to(dtype), x_0_hat.to(dtype)
        if not return_dict:
            return x_prev, x_0_hat
        return DDPMSchedulerOutput(prev_sample=x_prev, pred_original_sample=x_0_hat)

    def _row(self, t: Timestep, x_t: Tensor, eta: float) -> Row:
        if isinstance(t, Tensor):
            if t.ndim or t.device.type != "cpu" or torch.compiler.is_compiling():
                return self._trajectory.gathered_row(t, x_t, eta)
            t = int(t)
        try:
            return self._trajectory.row(t, eta)
        except KeyError:
            raise ValueError(f"timestep {t} is not in scheduler.timesteps") from None

    def _split(self, model_output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.config.variance_type.startswith("learned"):
            if model_output.shape != x_t.shape:
                raise ValueError(
                    f"model_output has shape {tuple(model_output.shape)}, sample {tuple(x_t.shape)}"
                )
            return model_output.to(x_t.dtype), None
        output, v = model_output.to(x_t.dtype).chunk(2, dim=1)
        return output, v

    def _predict_x_0(self, output: Tensor, x_t: Tensor, row: Row) -> Tensor:
        x_0_hat = output * row.x_0_from_output
        add_scaled_(x_0_hat, row.x_0_from_x_t, x_t)
        if self.config.thresholding:
            return self._threshold(x_0_hat)
        if self.config.clip_sample:
            return x_0_hat.clamp_(-self.config.clip_sample_range, self.config.clip_sample_range)
        return x_0_hat

    def _threshold(self, x_0_hat: Tensor) -> Tensor:
        """Dynamic thresholding: clamp to a quantile s of abs(x_0) per image, divide by s (2205.11487)."""
        magnitude = x_0_hat.flatten(1).abs()
        s = torch.quantile(magnitude, self.config.dynamic_thresholding_ratio, dim=1)
        s = s.clamp(1.0, self.config.sample_max_value).reshape(-1, *(1,) * (x_0_hat.ndim - 1))
        return x_0_hat.clamp(-s, s) / s

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Timestep) -> Tensor:
        """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise (eq. 4).

        Args:
            original_samples: x_0, (B, ...), floating point.
            noise: standard normal noise, same shape.
            timesteps: t in [0, T), an int or (B,).

        Returns:
            x_t, in the dtype of `original_samples`; the arithmetic is at least float32.
        """
        x_0 = original_samples
        signal, sigma = self._signal_and_sigma(timesteps, x_0)
        return (x_0 * signal).addcmul_(noise.to(signal.dtype), sigma).to(x_0.dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Timestep) -> Tensor:
        """v = sqrt(alpha_bar_t) noise - sqrt(1 - alpha_bar_t) x_0 (2202.00512, section 4)."""
        signal, sigma = self._signal_and_sigma(timesteps, sample)
        return (noise * signal).sub_(sample * sigma).to(sample.dtype)

    def _signal_and_sigma(self, t: Timestep, like: Tensor) -> tuple[Tensor, ...]:
        dtype = torch.promote_types(like.dtype, torch.float32)
        key = (like.device, dtype)
        if key not in self._eq_4_on:
            self._eq_4_on[key] = self._eq_4.to(*key)
        t = torch.as_tensor(t)
        if t.device.type == "cpu" and not torch.compiler.is_compiling():
            if t.numel() and not (0 <= int(t.min()) and int(t.max()) < len(self)):
                raise ValueError(f"timesteps must be in [0, {len(self)}), got {t.tolist()}")
        return gather(self._eq_4_on[key], t, like)

    # ------------------------------------------------------------------------------------------
    # Configuration

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in diffusers, but no given value is dropped, and unknown keys are named."""
        config = {k: v for k, v in config_dict.items() if k != "_use_default_values"}
        return super().extract_init_dict(config, **kwargs)

    @classmethod
    def from_config(
        cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """As in diffusers; an extension made for other betas or predictions is dropped."""
        result = super().from_config(config, return_unused_kwargs, **kwargs)
        scheduler: Self = result[0] if return_unused_kwargs else result
        scheduler._drop_stale_extension()
        return result

    def fingerprint(self) -> str:
        """What an extension belongs to: betas and prediction type."""
        digest = hashlib.sha256(self.betas.numpy().tobytes())
        digest.update(self.config.prediction_type.encode())
        return digest.hexdigest()[:16]

    def _drop_stale_extension(self) -> None:
        extension = dict(self.config).get("_ddpm_hf")
        if extension is None or extension.get("fingerprint") in (None, self.fingerprint()):
            return
        config = {k: v for k, v in self.config.items() if k != "_ddpm_hf"}
        del self._internal_dict
        self.register_to_config(**config)
        warnings.warn("the extension in `_ddpm_hf` was dropped: betas changed", stacklevel=3)

    def to_json_string(self) -> str:
        """The configuration as JSON, under the class name that stock diffusers loads."""
        config = json.loads(super().to_json_string())
        return (
            json.dumps(config | {"_class_name": "DDPMScheduler"}, indent=2, sort_keys=True) + "\n"
        )

"""Timestep samplers: the distribution of t in training, and weights of the losses.

The timesteps of a global batch are drawn at once from one generator. Every process draws the same
and takes its rows, so that t depends on (seed, update, row) and not on the number of processes.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

Generator = torch.Generator | None
Device = torch.device | str | None


class TimestepSampler(ABC):
    """Distribution of the timesteps of a batch, over [0, T).

    Args:
        num_train_timesteps: T.
    Attributes:
        needs_losses: whether `update` must be called after every batch.
    """

    needs_losses = False

    def __init__(self, num_train_timesteps: int) -> None:
        if num_train_timesteps < 1:
            raise ValueError(
                f"`num_train_timesteps` must be at least 1, got {num_train_timesteps!r}"
            )
        self.num_train_timesteps = num_train_timesteps

    @abstractmethod
    def sample(
        self, batch_size: int, generator: Generator = None, device: Device = None
    ) -> tuple[Tensor, Tensor]:
        """Timesteps of a global batch, and weights of their losses.

        Weights 1 / (T p(t)) keep the expected loss of uniform timesteps.

        Args:
            batch_size: B, rows of the global batch.
            generator: generator on `device`.
            device: device of the results; None for the CPU.
        Returns:
            t, (B,) int64, and weights, (B,) float32, with expectation 1.
        """

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Update the distribution with the losses of a global batch.

        Args:
            t: timesteps, (B,); the same on all processes.
            losses: losses before the weights, (B,); the same on all processes.
        """
        del t, losses

    def state_dict(self) -> dict[str, Tensor]:
        """State of the distribution; empty for a fixed one."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a state from `state_dict`.

        Raises:
            ValueError: if the state belongs to another sampler or another T.
        """
        expected = {name: tensor.shape for name, tensor in self.state_dict().items()}
        shapes = {name: tensor.shape for name, tensor in state.items()}
        if shapes != expected:
            raise ValueError(
                f"`state` must be a state of {type(self).__name__} with shapes {expected}, got"
                f" {shapes}"
            )
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])


class UniformTimesteps(TimestepSampler):
    """Uniform timesteps, independent between rows (2006.11239, algorithm 1)."""

    def sample(
        self, batch_size: int, generator: Generator = None, device: Device = None
    ) -> tuple[Tensor, Tensor]:
        """t uniform in [0, T); weights 1."""
        T = self.num_train_timesteps
        t = torch.randint(T, (batch_size,), generator=generator, device=device)
        return t, torch.ones(batch_size, device=device)


class LowDiscrepancyTimesteps(TimestepSampler):
    """Uniform timesteps, evenly spaced in a batch, which lowers the variance of its loss.

    Source: VDM (2107.00630).
    """

    def sample(
        self, batch_size: int, generator: Generator = None, device: Device = None
    ) -> tuple[Tensor, Tensor]:
        """t = floor(T ((u + i / B) mod 1)), with one uniform u for all rows i; weights 1."""
        u = torch.rand((), generator=generator, device=device)
        fractions = (u + torch.arange(batch_size, device=device) / batch_size) % 1
        T = self.num_train_timesteps
        t = (fractions * T).long().clamp(max=T - 1)  # float32 may round up to T
        return t, torch.ones(batch_size, device=device)


class AsymmetricTimesteps(TimestepSampler):
    """More of the timesteps with little noise.

    The losses are not weighted, so that these timesteps also count more in the training loss.

    Source: 2405.17403, eq. (5), with its tau = 0.7 T and k = 5, and without its weights.
    """

    SHARE, FACTOR = 0.7, 5.0

    def sample(
        self, batch_size: int, generator: Generator = None, device: Device = None
    ) -> tuple[Tensor, Tensor]:
        """p(t) is 5 times as high for t < 0.7 T as for the others; weights 1."""
        T = self.num_train_timesteps
        tau = round(self.SHARE * T)
        early = self.FACTOR * tau / (self.FACTOR * tau + T - tau)  # P(t < tau)
        u = torch.rand(batch_size, generator=generator, device=device)
        t = torch.where(u < early, u / early * tau, tau + (u - early) / (1 - early) * (T - tau))
        return t.long().clamp(max=T - 1), torch.ones(batch_size, device=device)


class LossSecondMomentTimesteps(TimestepSampler):
    """Importance sampling with p(t) proportional to sqrt(E[L_t^2]).

    Intended for L_vlb, whose terms differ by orders of magnitude. Uniform until every t has a full
    history. State and sampling are on the CPU, where equal histories give equal timesteps on every
    machine; `update` therefore synchronises with the device.

    Args:
        num_train_timesteps: T.
        history_size: number of losses kept per timestep; 10 in the paper.
        uniform_probability: share of uniformly drawn timesteps, so that every t is visited.
    Source: Improved DDPM (2102.09672), section 3.3.
    """

    needs_losses = True

    def __init__(
        self, num_train_timesteps: int, history_size: int = 10, uniform_probability: float = 1e-3
    ) -> None:
        super().__init__(num_train_timesteps)
        if history_size < 1 or not 0 < uniform_probability <= 1:
            raise ValueError(
                "`history_size` must be at least 1 and `uniform_probability` in (0, 1], got"
                f" {history_size!r} and {uniform_probability!r}"
            )
        self.uniform_probability = uniform_probability
        self.history = torch.zeros(num_train_timesteps, history_size, dtype=torch.float64)
        self.counts = torch.zeros(num_train_timesteps, dtype=torch.int64)

    def probabilities(self) -> Tensor:
        """p(t), (T,) float64."""
        T, history_size = self.history.shape
        uniform = torch.full((T,), 1 / T, dtype=torch.float64)
        if self.counts.min() < history_size:
            return uniform
        magnitude = self.history.square().mean(1).sqrt()
        if not magnitude.sum() > 0:
            return uniform
        return torch.lerp(magnitude / magnitude.sum(), uniform, self.uniform_probability)

    def sample(
        self, batch_size: int, generator: Generator = None, device: Device = None
    ) -> tuple[Tensor, Tensor]:
        """t distributed as p(t); weights 1 / (T p(t))."""
        # Integers: not every device has float64, and float32 is too coarse for the rarest t.
        u = torch.randint(2**53, (batch_size,), generator=generator, device=device).cpu().double()
        p, T = self.probabilities(), self.num_train_timesteps
        t = torch.searchsorted(p.cumsum(0), u / 2**53, right=True).clamp(max=T - 1)
        return t.to(device), (1 / (T * p[t])).float().to(device)

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Replace the oldest losses of each timestep, in row order.

        Non-finite losses are ignored: one would dominate all later draws.
        """
        history_size = self.history.shape[1]
        for step, loss in zip(t.tolist(), losses.tolist(), strict=True):
            if math.isfinite(loss):
                self.history[step, self.counts[step] % history_size] = loss
                self.counts[step] += 1

    def state_dict(self) -> dict[str, Tensor]:
        """Recent losses, (T, history_size), and number of losses so far, (T,)."""
        return {"history": self.history, "counts": self.counts}


# By the name in the training configuration.
TIMESTEP_SAMPLERS: dict[str, type[TimestepSampler]] = {
    "uniform": UniformTimesteps,
    "low_discrepancy": LowDiscrepancyTimesteps,
    "asymmetric": AsymmetricTimesteps,
    "loss_second_moment": LossSecondMomentTimesteps,
}

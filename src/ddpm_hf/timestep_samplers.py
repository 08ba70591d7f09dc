"""Which t the rows of a batch train: a distribution, and the weights that keep a loss unbiased.

All rows of a batch are drawn at once, from one generator: every process draws the same and takes
its share, so that t depends on (seed, update, row) and not on who asks.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor


class TimestepSampler(ABC):
    """Draws t in [0, T).

    Args:
        num_train_timesteps: T.
    Attributes:
        needs_losses: whether `update` wants to be called with every batch.
    """

    needs_losses = False

    def __init__(self, num_train_timesteps: int) -> None:
        if num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps must be at least 1, got {num_train_timesteps!r}")
        self.num_train_timesteps = num_train_timesteps

    @abstractmethod
    def sample(
        self,
        batch_size: int,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The t of a whole batch, and 1 / (T p(t)), by which to multiply the losses.

        Args:
            batch_size: B, rows of the whole batch.
            generator: on `device`.
            device: where t is wanted; None for the CPU.
        Returns:
            t, (B,) int64, and weights, (B,) float32, whose mean is 1 in expectation.
        """

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Learn from the losses of a whole batch, which must be the same on all processes.

        Args:
            t: (B,).
            losses: (B,), not yet multiplied by the weights.
        """
        del t, losses

    def state_dict(self) -> dict[str, Tensor]:
        """What `sample` depends on besides its arguments: nothing, unless the class says so."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a state that `state_dict` gave.

        Raises:
            ValueError: for a state of another sampler, or of another T.
        """
        known = {name: tensor.shape for name, tensor in self.state_dict().items()}
        given = {name: tensor.shape for name, tensor in state.items()}
        if given != known:
            raise ValueError(f"this is no state of {type(self).__name__}: {given} is not {known}")
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])


class UniformTimesteps(TimestepSampler):
    """Every t alike, rows independent (2006.11239, algorithm 1)."""

    def sample(
        self,
        batch_size: int,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """t uniform in [0, T); the weights are 1."""
        T = self.num_train_timesteps
        t = torch.randint(T, (batch_size,), generator=generator, device=device)
        return t, torch.ones(batch_size, device=device)


class LowDiscrepancyTimesteps(TimestepSampler):
    """Every t alike, rows evenly spaced: batches have losses of less variance (2107.00630)."""

    def sample(
        self,
        batch_size: int,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """t = floor(T ((u + i / B) mod 1)) with one u for all rows i; the weights are 1."""
        u = torch.rand((), generator=generator, device=device)
        places = (u + torch.arange(batch_size, device=device) / batch_size) % 1
        T = self.num_train_timesteps
        t = (places * T).long().clamp(max=T - 1)  # float32 may round up to T
        return t, torch.ones(batch_size, device=device)


class LossSecondMomentTimesteps(TimestepSampler):
    """Importance sampling: p(t) in proportion to sqrt(E[L_t^2]) (2102.09672, section 3.3).

    For L_vlb, whose terms differ by orders of magnitude; uniform until every t has a full history.
    State and draw are on the CPU, where equal histories give equal draws on every machine: `update`
    waits for the device.

    Args:
        num_train_timesteps: T.
        history_size: losses that are kept for each t; 10 in the paper.
        uniform_probability: share of t that are drawn uniformly, so that none is forgotten.
    """

    needs_losses = True

    def __init__(
        self,
        num_train_timesteps: int,
        history_size: int = 10,
        uniform_probability: float = 1e-3,
    ) -> None:
        super().__init__(num_train_timesteps)
        if history_size < 1 or not 0 < uniform_probability <= 1:
            raise ValueError(
                "history_size must be at least 1 and uniform_probability in (0, 1], got"
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
        self,
        batch_size: int,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """t from p(t); the weights are 1 / (T p(t))."""
        # Integers, for not every device has float64, and float32 is too coarse for the rarest t.
        u = torch.randint(2**53, (batch_size,), generator=generator, device=device).cpu().double()
        p, T = self.probabilities(), self.num_train_timesteps
        t = torch.searchsorted(p.cumsum(0), u / 2**53, right=True).clamp(max=T - 1)
        return t.to(device), (1 / (T * p[t])).float().to(device)

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Put the losses in the place of the oldest of their t, in the order of the rows.

        A loss that is not finite is left out: it would decide every draw to come.
        """
        history_size = self.history.shape[1]
        for step, loss in zip(t.tolist(), losses.tolist(), strict=True):
            if math.isfinite(loss):
                self.history[step, self.counts[step] % history_size] = loss
                self.counts[step] += 1

    def state_dict(self) -> dict[str, Tensor]:
        """The losses seen last, (T, history_size), and how many were seen, (T,)."""
        return {"history": self.history, "counts": self.counts}


# By the name that a command or a configuration gives.
TIMESTEP_SAMPLERS: dict[str, type[TimestepSampler]] = {
    "uniform": UniformTimesteps,
    "low_discrepancy": LowDiscrepancyTimesteps,
    "loss_second_moment": LossSecondMomentTimesteps,
}

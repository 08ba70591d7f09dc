"""Loss weightings: weights of L_simple per noise level.

A weighting is defined by its weight for the squared error of x_0, as a function of the
signal-to-noise ratio (SNR). The weights for eps and v follow, so that a weighted objective is the
same for every prediction type:

    |eps - eps_hat|^2 = SNR |x_0 - x_0_hat|^2,   |v - v_hat|^2 = (SNR + 1) |x_0 - x_0_hat|^2
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"`{name}` must be positive, got {value!r}")


class Weighting(ABC):
    """Weight of the squared prediction error, as a function of the timestep."""

    @abstractmethod
    def of_x_0(self, snr: Tensor) -> Tensor:
        """Weight of the squared error of x_0 at this signal-to-noise ratio."""

    def __call__(
        self, scheduler: GaussianDDPMScheduler, t: Tensor, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Weights of the scheduler's prediction target at `t`.

        Args:
            scheduler: defines the signal-to-noise ratios and the prediction type.
            t: step index per sample, (B,), in [0, T).
            dtype: dtype of the weights.
        Returns:
            weights, (B,).
        """
        snr = scheduler.snr(t, dtype)
        match scheduler.config.prediction_type:
            case "epsilon":
                snr = snr.clamp(min=torch.finfo(dtype).tiny)  # underflows to 0 in long chains
                return self.of_x_0(snr) / snr
            case "sample":
                return self.of_x_0(snr)
            case _:
                return self.of_x_0(snr) / (snr + 1)


@dataclass(frozen=True)
class MinSNR(Weighting):
    """min(SNR, gamma): lowers the weight of steps with little noise (2303.09556, sec. 3.4).

    Attributes:
        gamma: positive; 5 in the paper.
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        _check_positive("gamma", self.gamma)

    def of_x_0(self, snr: Tensor) -> Tensor:
        """min(SNR, gamma)."""
        return snr.clamp(max=self.gamma)


@dataclass(frozen=True)
class P2(Weighting):
    """SNR / (k + SNR)^gamma: lowers the weight of imperceptible detail (2204.00227, sec. 3).

    Attributes:
        gamma: at least 0; 0 gives eps-prediction weight 1 at every step; 0.5 or 1 in the paper.
        k: positive; 1 in the paper.
    """

    gamma: float = 1.0
    k: float = 1.0

    def __post_init__(self) -> None:
        _check_positive("k", self.k)
        if not self.gamma >= 0:
            raise ValueError(f"`gamma` must be at least 0, got {self.gamma!r}")

    def of_x_0(self, snr: Tensor) -> Tensor:
        """SNR / (k + SNR)^gamma."""
        return snr / (self.k + snr) ** self.gamma


@dataclass(frozen=True)
class TruncatedSNR(Weighting):
    """max(SNR, 1): keeps the weight of steps with hardly any signal (2202.00512, sec. 4)."""

    def of_x_0(self, snr: Tensor) -> Tensor:
        """max(SNR, 1)."""
        return snr.clamp(min=1)


# By the name in the training configuration; "none" gives every step weight 1.
WEIGHTINGS: dict[str, Weighting | None] = {
    "none": None,
    "min_snr": MinSNR(),
    "p2": P2(),
    "truncated_snr": TruncatedSNR(),
}

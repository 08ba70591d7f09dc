"""Timesteps for deterministic samplers, by dynamic programming against a fine trajectory.

Few steps follow a trajectory of many the better the closer they are where it bends. Which ones to
keep is searched for with the network itself: of all ways to come to a fine timestep in k steps the
one is kept whose x is nearest to that of the fine trajectory there (2503.21774).

found = find_timesteps(unet, scheduler, torch.randn(32, 1, 32, 32))    # {5: [999, ...], 6: ...}
pipeline(timesteps=found[10], eta=0.0)
"""

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ddpm_hf.diffusion.checks import check_choice, to_int
from ddpm_hf.diffusion.pipeline import evaluating
from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler
from ddpm_hf.diffusion.tensor_ops import Denoiser
from ddpm_hf.losses import denoise

SAMPLERS = ("DDIM", "DPM-Solver++ 2M")
FEWEST = 5


def find_timesteps(
    denoiser: Denoiser,
    scheduler: GaussianDDPMScheduler,
    noise: Tensor,
    *,
    sampler: str = "DDIM",
    max_num_steps: int = 25,
    num_fine_steps: int = 100,
    progress: bool = True,
) -> dict[int, list[int]]:
    """For each number of steps from 5 on the timesteps that end nearest to the fine trajectory.

    Good for the sampler that they were found on and this network; of others nothing is promised.

    Args:
        denoiser: any callable `(x_t, t)`, t (B,), that returns a tensor or an object with
            `.sample`; class labels by a closure.
        scheduler: the diffusion; DDIM clips as it does, diffusers' DPM-Solver++ does not clip.
        noise: standard normal, (B, C, ...), where the trajectories start: 32 are enough. Memory
            holds some 4 `num_fine_steps` times as much.
        sampler: "DDIM" (`step(..., eta=0)`) or "DPM-Solver++ 2M" (diffusers'
            `DPMSolverMultistepScheduler`).
        max_num_steps: up to so many.
        num_fine_steps: of the fine trajectory, evenly spaced from T - 1.
        progress: show a progress bar.
    Returns:
        by number of steps the timesteps, descending from T - 1.
    Raises:
        ValueError: for another sampler, or numbers that do not fit.
    Source: 2503.21774, section 3.
    """
    check_choice("sampler", sampler, SAMPLERS)
    M = to_int("num_fine_steps", num_fine_steps, FEWEST, len(scheduler))
    max_num_steps = to_int("max_num_steps", max_num_steps, FEWEST, M)
    search = _Search(denoiser, scheduler, M, is_second_order=sampler != "DDIM")
    with (
        torch.no_grad(),
        evaluating(denoiser) if isinstance(denoiser, torch.nn.Module) else nullcontext(),
        tqdm(
            total=M + sum(M - k for k in range(1, max_num_steps)) + 1,
            desc=f"timesteps for {sampler}",
            unit="call",
            leave=False,
            disable=None if progress else True,
        ) as bar,
    ):
        return search.run(noise, max_num_steps, bar)


class _Search:
    """Nodes 0..M-1 are the fine timesteps, descending; node M is the clean image."""

    def __init__(
        self,
        denoiser: Denoiser,
        scheduler: GaussianDDPMScheduler,
        num_fine_steps: int,
        is_second_order: bool,
    ) -> None:
        changes: dict[str, Any] = {"x_0_mse": None}
        if is_second_order:
            changes |= {"clip_sample": False, "thresholding": False}
        self.denoiser, self.is_second_order = denoiser, is_second_order
        self.scheduler = GaussianDDPMScheduler.from_config(scheduler.config, **changes)
        fine = GaussianDDPMScheduler.from_config(self.scheduler.config)
        fine.set_timesteps(num_fine_steps, timestep_spacing="trailing")
        self.timesteps: list[int] = fine.timesteps.tolist()
        log_snr = fine.log_snr(fine.timesteps, torch.float64)
        alpha_bar = np.append(torch.special.expit(log_snr).numpy(), 1.0)
        self.signal, self.sigma = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
        self.half_log_snr = np.append(log_snr.numpy() / 2, np.inf)

    def run(self, noise: Tensor, max_num_steps: int, bar: "tqdm[None]") -> dict[int, list[int]]:
        """Of states (k, j), at node j after k steps, the nearest to the fine trajectory's."""
        M = len(self.timesteps)
        target = self._fine_trajectory(noise, bar)  # (M + 1, B, ...)
        x: dict[int, Tensor] = {0: noise}  # by node, after k - 1 steps
        before: dict[int, tuple[int, Tensor]] = {}  # of each the node before, and x_0_hat there
        came_from: list[dict[int, int]] = []
        found = {}
        for k in range(1, max_num_steps + 1):
            error = torch.full((M + 1,), torch.inf, device=noise.device)
            source = torch.full((M + 1,), -1, device=noise.device)
            best, x_0_hats = torch.empty_like(target), {}
            for i in x:
                x_0_hats[i] = self._predict(x[i], i)
                bar.update()
                reached = self._step(x[i], x_0_hats[i], i, range(i + 1, M + 1), before.get(i))
                distance = (reached - target[i + 1 :]).square().flatten(1).mean(1)
                nearer = distance < error[i + 1 :]
                error[i + 1 :] = torch.where(nearer, distance, error[i + 1 :])
                source[i + 1 :] = torch.where(nearer, i, source[i + 1 :])
                shape = (-1, *(1,) * noise.ndim)
                best[i + 1 :] = torch.where(nearer.reshape(shape), reached, best[i + 1 :])
            sources = source.tolist()
            came_from.append({j: i for j, i in enumerate(sources) if i >= 0})
            if k >= FEWEST:
                found[k] = self._path(came_from)
            x = {j: best[j] for j in came_from[-1] if j < M}
            before = {j: (i, x_0_hats[i]) for j, i in came_from[-1].items()}
        return found

    def _fine_trajectory(self, noise: Tensor, bar: "tqdm[None]") -> Tensor:
        states, before = [noise], None
        for i in range(len(self.timesteps)):
            x_0_hat = self._predict(states[-1], i)
            bar.update()
            (x,) = self._step(states[-1], x_0_hat, i, range(i + 1, i + 2), before)
            states.append(x)
            before = (i, x_0_hat)
        return torch.stack(states)

    def _predict(self, x: Tensor, i: int) -> Tensor:
        t = self.timesteps[i]
        output = denoise(
            self.denoiser, self.scheduler, x, torch.full((len(x),), t, device=x.device)
        )
        x_0_hat: Tensor = self.scheduler.step(output, t, x, eta=0.0).pred_original_sample
        return x_0_hat

    def _step(
        self, x: Tensor, x_0_hat: Tensor, i: int, to: range, before: tuple[int, Tensor] | None
    ) -> Tensor:
        """From node i to each of the nodes `to`, (J, B, ...): 2010.02502, eq. 12 at sigma = 0.

        The second order puts x_0 on the line through its last two estimates, over log SNR, but for
        the step to the clean image: 2211.01095, algorithm 2, as diffusers has it.
        """
        j = np.array(to)
        of_x = self.sigma[j] / self.sigma[i]
        of_x_0 = self.signal[j] - of_x * self.signal[i]
        shape = (-1, *(1,) * x.ndim)

        def each(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values).to(x).reshape(shape)

        reached = each(of_x) * x + each(of_x_0) * x_0_hat
        if self.is_second_order and before is not None:
            h = self.half_log_snr[j] - self.half_log_snr[i]
            h_before = self.half_log_snr[i] - self.half_log_snr[before[0]]
            slope = np.where(np.isfinite(h), of_x_0 * h / (2 * h_before), 0.0)
            reached += each(slope) * (x_0_hat - before[1])
        return reached

    def _path(self, came_from: list[dict[int, int]]) -> list[int]:
        node, path = len(self.timesteps), []
        for sources in reversed(came_from):
            node = sources[node]
            path.append(self.timesteps[node])
        return path[::-1]

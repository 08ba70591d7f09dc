"""Optimal timesteps of deterministic samplers for few steps, by dynamic programming.

The timesteps are chosen so that a trajectory of few steps stays close to one of many (the fine
trajectory), computed by the same network. For each fine timestep and each number of steps k, the
search keeps the path whose x is nearest to the fine trajectory (2503.21774).

timesteps = trajectory_matching_timesteps(unet, scheduler, torch.randn(32, 1, 32, 32))
pipeline(timesteps=timesteps[10], eta=0.0)
"""

from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ddpm_hf.diffusion.checks import check_choice, to_int
from ddpm_hf.diffusion.eval_mode import evaluating
from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler
from ddpm_hf.diffusion.tensor_ops import Denoiser
from ddpm_hf.losses import denoise

SAMPLERS = ("DDIM", "DPM-Solver++ 2M")
_MIN_NUM_STEPS = 5


def trajectory_matching_timesteps(
    denoiser: Denoiser,
    scheduler: GaussianDDPMScheduler,
    noise: Tensor,
    *,
    sampler: str = "DDIM",
    max_num_steps: int = 25,
    num_fine_steps: int = 100,
    progress: bool = True,
) -> dict[int, list[int]]:
    """Timesteps that end nearest to the fine trajectory, for each number of steps from 5.

    They depend on the network and on the sampler.

    Args:
        denoiser: any callable `(x_t, t)` with t of shape (B,) that returns a tensor or an object
            with `.sample`; bind class labels in a closure.
        scheduler: the diffusion process. Its clipping applies to DDIM; diffusers' DPM-Solver++ does
            not clip.
        noise: standard normal start of the trajectories, (B, C, ...); B = 32 is enough. Memory is
            about 4 `num_fine_steps` times its size.
        sampler: "DDIM" (`step(..., eta=0)`) or "DPM-Solver++ 2M" (diffusers'
            `DPMSolverMultistepScheduler`).
        max_num_steps: largest number of steps.
        num_fine_steps: steps of the fine trajectory, evenly spaced from T - 1.
        progress: show a progress bar.
    Returns:
        timesteps by number of steps, descending from T - 1.
    Raises:
        ValueError: if the sampler is unknown or a number of steps is out of range.
    Source: 2503.21774, section 3.
    """
    check_choice("sampler", sampler, SAMPLERS)
    M = to_int("num_fine_steps", num_fine_steps, _MIN_NUM_STEPS, len(scheduler))
    max_num_steps = to_int("max_num_steps", max_num_steps, _MIN_NUM_STEPS, M)
    search = _TrajectorySearch(denoiser, scheduler, M, is_second_order=sampler != "DDIM")
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


class _TrajectorySearch:
    """Dynamic programming over nodes: 0..M-1 are the fine timesteps, descending; M is x_0."""

    def __init__(
        self,
        denoiser: Denoiser,
        scheduler: GaussianDDPMScheduler,
        num_fine_steps: int,
        is_second_order: bool,
    ) -> None:
        self.denoiser, self.is_second_order = denoiser, is_second_order
        config = dict(scheduler.config)
        if is_second_order:
            config |= {"clip_sample": False, "thresholding": False}
        self.scheduler = GaussianDDPMScheduler.from_config(config, x_0_mse=None)
        fine = GaussianDDPMScheduler.from_config(self.scheduler.config)
        fine.set_timesteps(num_fine_steps, timestep_spacing="trailing")
        self.timesteps: list[int] = fine.timesteps.tolist()
        log_snr = fine.log_snr(fine.timesteps, torch.float64)
        alpha_bar = np.append(torch.special.expit(log_snr).numpy(), 1.0)
        self.signal, self.sigma = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
        self.half_log_snr = np.append(log_snr.numpy() / 2, np.inf)

    def run(self, noise: Tensor, max_num_steps: int, bar: "tqdm[None]") -> dict[int, list[int]]:
        """Best path for each k: for every node j, the x after k steps nearest to the fine one."""
        M = len(self.timesteps)
        target = self._fine_trajectory(noise, bar)  # (M + 1, B, ...)
        x: dict[int, Tensor] = {0: noise}  # best x at each node after k - 1 steps
        previous: dict[int, tuple[int, Tensor]] = {}  # previous node on its path, and x_0_hat there
        sources_of_k: list[dict[int, int]] = []  # for each k, previous node of each node
        timesteps = {}
        for k in range(1, max_num_steps + 1):
            error = torch.full((M + 1,), torch.inf, device=noise.device)
            source = torch.full((M + 1,), -1, device=noise.device)
            best, x_0_hats = torch.empty_like(target), {}
            for i in x:
                x_0_hats[i] = self._predict(x[i], i)
                bar.update()
                reached = self._step(x[i], x_0_hats[i], i, range(i + 1, M + 1), previous.get(i))
                distance = (reached - target[i + 1 :]).square().flatten(1).mean(1)
                nearer = distance < error[i + 1 :]
                error[i + 1 :] = torch.where(nearer, distance, error[i + 1 :])
                source[i + 1 :] = torch.where(nearer, i, source[i + 1 :])
                shape = (-1, *(1,) * noise.ndim)
                best[i + 1 :] = torch.where(nearer.reshape(shape), reached, best[i + 1 :])
            sources = {j: i for j, i in enumerate(source.tolist()) if i >= 0}
            sources_of_k.append(sources)
            if k >= _MIN_NUM_STEPS:
                timesteps[k] = self._path(sources_of_k)
            x = {j: best[j] for j in sources if j < M}
            previous = {j: (i, x_0_hats[i]) for j, i in sources.items()}
        return timesteps

    def _fine_trajectory(self, noise: Tensor, bar: "tqdm[None]") -> Tensor:
        states, previous = [noise], None
        for i in range(len(self.timesteps)):
            x_0_hat = self._predict(states[-1], i)
            bar.update()
            (x,) = self._step(states[-1], x_0_hat, i, range(i + 1, i + 2), previous)
            states.append(x)
            previous = (i, x_0_hat)
        return torch.stack(states)

    def _predict(self, x: Tensor, i: int) -> Tensor:
        t = self.timesteps[i]
        output = denoise(
            self.denoiser, self.scheduler, x, torch.full((len(x),), t, device=x.device)
        )
        x_0_hat: Tensor = self.scheduler.step(output, t, x, eta=0.0).pred_original_sample
        return x_0_hat

    def _step(
        self, x: Tensor, x_0_hat: Tensor, i: int, to: range, previous: tuple[int, Tensor] | None
    ) -> Tensor:
        """Steps from node i to each node in `to`, (J, B, ...): 2010.02502, eq. 12 at sigma = 0.

        The second order extrapolates x_0 linearly in log SNR from its last two estimates, except in
        the step to x_0 itself: 2211.01095, algorithm 2, as in diffusers.
        """
        j = np.array(to)
        coef_x = self.sigma[j] / self.sigma[i]
        coef_x_0 = self.signal[j] - coef_x * self.signal[i]

        def column(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values).to(x).reshape(-1, *(1,) * x.ndim)

        reached = column(coef_x) * x + column(coef_x_0) * x_0_hat
        if self.is_second_order and previous is not None:
            h = self.half_log_snr[j] - self.half_log_snr[i]
            previous_h = self.half_log_snr[i] - self.half_log_snr[previous[0]]
            slope = np.where(np.isfinite(h), coef_x_0 * h / (2 * previous_h), 0.0)
            reached += column(slope) * (x_0_hat - previous[1])
        return reached

    def _path(self, sources_of_k: list[dict[int, int]]) -> list[int]:
        node, path = len(self.timesteps), []
        for sources in reversed(sources_of_k):
            node = sources[node]
            path.append(self.timesteps[node])
        return path[::-1]

"""denoising-diffusion-pytorch with the same network, if it is installed.

Only the benchmark needs it: `pip install denoising-diffusion-pytorch`, with a torchvision that fits
the installed torch.
"""

from contextlib import redirect_stderr
from io import StringIO
from typing import Any

import torch
from diffusers import UNet2DModel

NAME = "denoising-diffusion"
try:
    from denoising_diffusion_pytorch import GaussianDiffusion
    from ema_pytorch import EMA

    missing = None
except (ImportError, RuntimeError) as error:  # raised by a torchvision for another torch
    missing = f"{type(error).__name__}: {error}"


class Network(torch.nn.Module):
    """A UNet2DModel with the interface of networks in that package."""

    self_condition = random_or_learned_sinusoidal_cond = False

    def __init__(self, unet: UNet2DModel) -> None:
        super().__init__()
        self.unet, self.channels = unet, unet.config.in_channels
        self.out_dim = unet.config.out_channels

    def forward(self, x: torch.Tensor, t: torch.Tensor, x_self_cond: Any = None) -> torch.Tensor:
        return self.unet(x, t).sample


def diffusion(unet: UNet2DModel, num_steps: int = 1000) -> Any:
    return GaussianDiffusion(
        Network(unet), image_size=unet.config.sample_size, timesteps=num_steps,
        objective="pred_noise", beta_schedule="linear", auto_normalize=False,
    ).to(unet.device)  # fmt: skip


class Sampler:
    """Sampler with the interface of a pipeline; it uses the global generator of torch."""

    def __init__(self, unet: UNet2DModel, num_steps: int) -> None:
        self.diffusion = diffusion(unet, num_steps)

    def __call__(self, batch_size: int) -> Any:
        with redirect_stderr(StringIO()):
            images = self.diffusion.sample(batch_size)
        return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()


class Loop:
    """The training update of its Trainer."""

    def __init__(self, unet: UNet2DModel) -> None:
        self.diffusion = diffusion(unet).train()
        self.optimizer = torch.optim.Adam(self.diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))
        self.ema = EMA(self.diffusion, beta=0.995, update_every=10)

    def update(self, images: torch.Tensor) -> None:
        loss = self.diffusion(images)
        loss.item()  # shown at each step
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.diffusion.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update()

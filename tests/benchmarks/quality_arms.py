"""Training settings that bench_quality compares: of other projects, ours, and single factors.

The settings of other projects are restated from their public scripts, with the sources below, and
run in one plain loop. All arms train the network that `ddpm-hf train` proposes unless noted.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.optimization import get_scheduler
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ddpm_hf import GaussianDDPMPipeline, GaussianDDPMScheduler, simple_loss
from ddpm_hf.data import ImageFacts
from ddpm_hf.diffusion.tensor_ops import Denoiser
from ddpm_hf.losses import Loss
from ddpm_hf.training import build_unet

Changes = Callable[[Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """Settings of a plain training loop.

    Attributes:
        ema_decay: decay of the moving average, a function of the number of updates so far.
        ema_every: updates between two steps of the moving average.
        lr_scheduler: of `diffusers.optimization.get_scheduler`.
        max_grad_norm: None for no clipping.
    """

    batch_size: int
    ema_decay: Callable[[int], float]
    ema_every: int = 1
    beta_schedule: str = "linear"
    prediction_type: str = "epsilon"
    learning_rate: float = 1e-4
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 0
    adam: Mapping[str, Any] = field(default_factory=dict)
    max_grad_norm: float | None = 1.0
    random_flip: bool = False


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One setting: options of `TrainingConfig`, or a plain loop.

    Attributes:
        network: maps the configuration of the proposed network to the arguments that change.
        loss: training loss in place of that of the options.
        multiple: image sides that the network can process are multiples of this.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    loop: LoopSettings | None = None
    network: Changes | None = None
    loss: Loss | None = None
    multiple: int = 1

    def build_unet(self, facts: ImageFacts, seed: int) -> UNet2DModel:
        """A new network; the same initial weights for the same seed."""
        torch.manual_seed(seed)
        unet = build_unet(facts, "cpu")
        if self.network is None:
            return unet
        torch.manual_seed(seed)
        return UNet2DModel.from_config(unet.config, **self.network(unet.config))


class Loop:
    """A plain training loop; like those of the other projects it logs the loss of every update.

    Args:
        unet: network to train.
        settings: of the loop.
        num_updates: length of the run, for the learning rate.
        seed: of images, timesteps and noise.
    """

    def __init__(
        self, unet: UNet2DModel, settings: LoopSettings, num_updates: int, seed: int = 0
    ) -> None:
        self.unet, self.settings, self.num_done = unet.train(), settings, 0
        self.scheduler = GaussianDDPMScheduler(
            beta_schedule=settings.beta_schedule, prediction_type=settings.prediction_type
        )
        self.optimizer = torch.optim.AdamW(
            unet.parameters(), settings.learning_rate, **{"weight_decay": 0.0, **settings.adam}
        )
        self.rates = get_scheduler(
            settings.lr_scheduler,
            self.optimizer,
            num_warmup_steps=settings.lr_warmup_steps,
            num_training_steps=num_updates,
        )
        self.ema = [parameter.detach().clone() for parameter in unet.parameters()]
        self.generator = torch.Generator().manual_seed(seed)

    def update(self, images: torch.Tensor) -> None:
        """One update with images drawn from all of them, (N, C, H, W)."""
        settings, generator = self.settings, self.generator
        rows = torch.randint(len(images), (settings.batch_size,), generator=generator)
        x_0 = images[rows]
        if settings.random_flip:
            flips = torch.rand(len(x_0), generator=generator) < 0.5
            x_0 = torch.where(flips[:, None, None, None], x_0.flip(-1), x_0)
        noise = torch.randn(x_0.shape, generator=generator)
        t = torch.randint(1000, (len(x_0),), generator=generator)
        is_v = settings.prediction_type == "v_prediction"
        target = self.scheduler.get_velocity(x_0, noise, t) if is_v else noise
        output = self.unet(self.scheduler.add_noise(x_0, noise, t), t).sample
        loss = F.mse_loss(output, target)
        loss.backward()
        if settings.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.unet.parameters(), settings.max_grad_norm)
        self.optimizer.step()
        self.rates.step()
        self.optimizer.zero_grad()
        self._average()
        loss.item()

    @torch.no_grad()
    def _average(self) -> None:
        self.num_done += 1
        if self.num_done % self.settings.ema_every == 0:
            weight = 1 - self.settings.ema_decay(self.num_done)
            torch._foreach_lerp_(self.ema, list(self.unet.parameters()), weight)

    def pipeline(self) -> GaussianDDPMPipeline:
        """A pipeline with a copy of the averaged weights."""
        unet = UNet2DModel.from_config(self.unet.config)
        for parameter, average in zip(unet.parameters(), self.ema, strict=True):
            parameter.data.copy_(average)
        return GaussianDDPMPipeline(unet.eval(), self.scheduler)


def stock_network(config: Mapping[str, Any]) -> dict[str, Any]:
    """The network of train_unconditional.py: 114M parameters, 6 levels."""
    down = ["DownBlock2D"] * 6
    up = ["UpBlock2D"] * 6
    down[4], up[1] = "AttnDownBlock2D", "AttnUpBlock2D"
    return {
        "block_out_channels": (128, 128, 256, 256, 512, 512), "layers_per_block": 2,
        "down_block_types": tuple(down), "up_block_types": tuple(up), "attention_head_dim": 8,
    }  # fmt: skip


def wider(config: Mapping[str, Any]) -> dict[str, Any]:
    """One and a half times the channels; they must be multiples of the groups."""
    widths = tuple(width * 3 // 2 for width in config["block_out_channels"])
    return {"block_out_channels": widths, "norm_num_groups": 16}


def two_layers(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"layers_per_block": 2}


def with_dropout(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"dropout": 0.1}


def attention(config: Mapping[str, Any]) -> dict[str, Any]:
    """Attention at the second level."""
    down, up = list(config["down_block_types"]), list(config["up_block_types"])
    down[1], up[-2] = "AttnDownBlock2D", "AttnUpBlock2D"
    return {"down_block_types": tuple(down), "up_block_types": tuple(up), "attention_head_dim": 32}


def x_0_weighted(
    denoiser: Denoiser, scheduler: GaussianDDPMScheduler, x_0: Tensor, t: Tensor, noise: Tensor
) -> Tensor:
    """The squared error of the estimate of x_0 for a network that predicts v.

    It is 1 - alpha_bar times that of v (2202.00512, appendix D).
    """
    loss = simple_loss(denoiser, scheduler, x_0, t, noise)
    return loss * (1 - scheduler.alphas_cumprod[t]).to(loss)


def assigned_noise(
    denoiser: Denoiser, scheduler: GaussianDDPMScheduler, x_0: Tensor, t: Tensor, noise: Tensor
) -> Tensor:
    """The simple loss with the noise of a batch assigned to its nearest images (2406.12303)."""
    _, columns = linear_sum_assignment(torch.cdist(x_0.flatten(1), noise.flatten(1)).cpu())
    return simple_loss(denoiser, scheduler, x_0, t, noise[torch.as_tensor(columns)])


# examples/unconditional_image_generation/train_unconditional.py of diffusers, with --use_ema as in
# its README.
STOCK = LoopSettings(
    batch_size=16,
    lr_scheduler="cosine",
    lr_warmup_steps=500,
    adam={"betas": (0.95, 0.999), "weight_decay": 1e-6},
    ema_decay=lambda step: min(0.9999, 1 - (1 + step) ** -0.75),
)
# README of improved-diffusion (CIFAR-10, without learned variances); its 4,000 cosine steps are
# 1,000 here. Its average has no warm-up.
IMPROVED_DIFFUSION = LoopSettings(
    batch_size=128,
    beta_schedule="squaredcos_cap_v2",
    max_grad_norm=None,
    ema_decay=lambda step: 0.9999,
)
# Defaults of `GaussianDiffusion`, `Trainer` and ema-pytorch.
DENOISING_DIFFUSION = LoopSettings(
    batch_size=16,
    beta_schedule="chen_sigmoid",
    prediction_type="v_prediction",
    adam={"betas": (0.9, 0.99)},
    random_flip=True,
    ema_decay=lambda step: 0.0 if step <= 101 else min(0.995, 1 - (step - 100) ** (-2 / 3)),
    ema_every=10,
)
PEERS = {
    "stock": Arm(loop=STOCK),
    "improved-diffusion": Arm(loop=IMPROVED_DIFFUSION),
    "denoising-diffusion-pytorch": Arm(loop=DENOISING_DIFFUSION),
    "ours": Arm(),
}
STOCK_NETWORK = {"stock, own network": Arm(loop=STOCK, network=stock_network, multiple=32)}


def changed(*, network: Changes | None = None, loss: Loss | None = None, **options: Any) -> Arm:
    """The proposals of `ddpm-hf train` for a CPU, with uniform timesteps and these changes."""
    options = {"timestep_sampling": "uniform", **options}
    return Arm(options=options, network=network, loss=loss)


ASYMMETRIC = {"timestep_sampling": "asymmetric"}
# One change each; the last ones have several.
FACTORS = {
    "uniform t": changed(),
    "epsilon": changed(prediction_type="epsilon"),
    "x_0": changed(prediction_type="sample"),
    "sigmoid": changed(beta_schedule="chen_sigmoid"),
    "linear": changed(beta_schedule="linear"),
    "min-SNR": changed(loss_weighting="min_snr"),
    "P2": changed(loss_weighting="p2"),
    "truncated SNR": changed(loss_weighting="truncated_snr"),
    "x_0 weights": changed(loss=x_0_weighted),
    "low-discrepancy t": changed(timestep_sampling="low_discrepancy"),
    "noise assignment": changed(loss=assigned_noise),
    "rate 1e-3": changed(learning_rate=1e-3),
    "rate 4e-3": changed(learning_rate=4e-3),
    "constant rate": changed(lr_scheduler="constant"),
    "EMA 0.98": changed(ema_decay=0.98),
    "batch 8": changed(batch_size=8),
    "batch 32": changed(batch_size=32),
    "1.5 x the width": changed(network=wider),
    "2 layers per block": changed(network=two_layers),
    "attention": changed(network=attention),
    "dropout 0.1": changed(network=with_dropout),
    "flips": changed(random_flip=True),
    "asymmetric t": changed(**ASYMMETRIC),
    "epsilon, asymmetric t": changed(prediction_type="epsilon", **ASYMMETRIC),
    "x_0, asymmetric t": changed(prediction_type="sample", **ASYMMETRIC),
    "sigmoid, asymmetric t": changed(beta_schedule="chen_sigmoid", **ASYMMETRIC),
    "min-SNR, asymmetric t": changed(loss_weighting="min_snr", **ASYMMETRIC),
}
ARMS = PEERS | STOCK_NETWORK | FACTORS

"""A minimal DDPM (2006.11239): an MLP on flattened 28x28 digits.

The program shows the forward process, trains the network without and with the timestep as an input,
and samples digits with both, in one or two minutes on a CPU. Scheduler and loss accept any callable
`(x_t, t) -> prediction`; no UNet, trainer or pipeline is needed.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from diffusers.models.embeddings import get_timestep_embedding
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm.auto import trange

from ddpm_hf import GaussianDDPMScheduler
from ddpm_hf.losses import simple_loss
from ddpm_hf.utils.timing import fastest_num_threads

T = 1000
scheduler = GaussianDDPMScheduler(T, beta_start=1e-4, beta_end=0.02, prediction_type="sample")


def digits() -> Tensor:
    """The 8x8 digits of scikit-learn, enlarged to 28x28 and flattened: (1797, 784) in [-1, 1]."""
    images = torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1
    return nn.functional.interpolate(images, size=28, mode="bilinear").flatten(1)


class MLP(nn.Module):
    """Estimate x_0 from x_t; `uses_t` adds 32 sines and cosines of t to the input of each layer."""

    def __init__(self, uses_t: bool, width: int = 256, depth: int = 3) -> None:
        super().__init__()
        self.uses_t = uses_t
        self.first = nn.Linear(784 + 32 * uses_t, width)
        self.layers = nn.ModuleList(nn.Linear(width + 32 * uses_t, width) for _ in range(depth))
        self.last = nn.Linear(width, 784)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        embedding = [get_timestep_embedding(t.expand(len(x_t)), 32)] if self.uses_t else []
        h = self.first(torch.cat([x_t, *embedding], dim=1)).relu()
        for layer in self.layers:
            h = h + layer(torch.cat([h, *embedding], dim=1)).relu()
        return self.last(h)


def diffuse(x_0: Tensor) -> dict[int, tuple[float, float]]:
    """Add noise step by step (eq. 2); return the factor of x_0 and the noise variance at some t."""
    x_t, measured = x_0, {}
    for t in range(T):
        x_t = scheduler.diffuse_one_step(x_t, t, torch.randn_like(x_t))
        if t in (9, 99, 299, 999):
            factor = (x_t * x_0).sum() / x_0.square().sum()
            measured[t] = (factor.item(), (x_t - factor * x_0).square().mean().item())
    return measured


def train(mlp: MLP, x_0: Tensor, steps: int) -> None:
    """Minimise the squared error of the estimate of x_0, at a random t for each image."""
    optimizer = torch.optim.Adam(mlp.parameters(), lr=2e-3)
    learning_rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)  # to 0
    for _ in trange(steps, desc="training"):
        batch, t = x_0[torch.randint(len(x_0), (128,))], torch.randint(T, (128,))
        loss = simple_loss(mlp, scheduler, batch, t, torch.randn_like(batch)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        learning_rate.step()


@torch.no_grad()
def errors(mlp: MLP, x_0: Tensor) -> dict[int, float]:
    """The loss at some timesteps, with the same noise for every network."""
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
    at = {t: torch.full((len(x_0),), t) for t in (0, 50, 100, 200, 400, 600, 800, 999)}
    return {n: simple_loss(mlp, scheduler, x_0, t, noise).mean().item() for n, t in at.items()}


@torch.no_grad()
def sample(mlp: MLP, num_images: int) -> Tensor:
    """Samples of the reverse process, (num_images, 784), from the same noise at every call."""
    rng = torch.Generator().manual_seed(0)
    x_t = torch.randn(num_images, 784, generator=rng)
    for t in scheduler.timesteps:
        x_t = scheduler.step(mlp(x_t, t), t, x_t, rng).prev_sample  # eq. 11
    return x_t


def main(steps: int = 4000, picture: Path = Path("runs/mlp_digits.png")) -> None:
    """Train both networks for `steps` updates each and compare them."""
    torch.manual_seed(0)
    x_0 = digits()[torch.randperm(1797)]
    known, held_out = x_0[:1500], x_0[1500:]

    print("x_t = factor * x_0 + noise: measured after single steps, and in closed form (eq. 4)")
    for t, (factor, variance) in diffuse(held_out).items():
        alpha_bar = scheduler.alphas_cumprod[t].item()
        print(f"t {t:3d}   factor {factor:.4f} and {alpha_bar**0.5:.4f}", end="   ")
        print(f"noise variance {variance:.4f} and {1 - alpha_bar:.4f}")
    print(f"(standard error of the factor at t 999: {1 / held_out.norm().item():.4f})")

    networks = {"without t": MLP(uses_t=False), "with t": MLP(uses_t=True)}
    # One thread is faster than several where another program keeps a core busy.
    t, mlp = torch.tensor(T // 2), networks["with t"]
    torch.set_num_threads(fastest_num_threads(lambda: mlp(known[:128], t).sum().backward()))
    figure, axes = plt.subplots(1, 3, figsize=(15, 5), layout="constrained")
    for (name, mlp), axis in zip(networks.items(), axes, strict=False):
        train(mlp, known, steps)
        axis.set(title=f"samples of the network {name}", xticks=[], yticks=[])
        tiles = nn.functional.pad(sample(mlp, 36).view(6, 6, 28, 28), (1, 1, 1, 1), value=1)
        axis.imshow(tiles.transpose(1, 2).reshape(180, 180).numpy(), cmap="gray", vmin=-1, vmax=1)

    print(
        "error of the estimate of x_0 on held-out digits, without t -> with t. The change is small:"
    )
    print("the network can estimate the noise level from the 784 pixels")
    without_t, with_t = (errors(mlp, held_out) for mlp in networks.values())
    change = {t: 100 * (with_t[t] / without_t[t] - 1) for t in without_t}
    for t in without_t:
        print(f"t {t:3d}   {without_t[t]:.4f} -> {with_t[t]:.4f}   {change[t]:+.1f} %")
    axes[2].bar([str(t) for t in change], change.values())
    axes[2].set(title="change of the error with t as an input, in %", xlabel="t")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture)
    plt.close(figure)
    print(f"samples of both networks: {picture}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=4000, help="updates (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/mlp_digits.png"), help="picture")
    options = parser.parse_args()
    main(options.steps, options.output)

"""Post-hoc EMA: error of reconstructed averages by the precision of snapshots, and the cost.

    python tests/benchmarks/bench_post_hoc_ema.py [--updates N] [--json FILE]

Trains a small network on digits (8x8, scikit-learn) at a constant learning rate. Running averages
of all lengths are kept; those of sigma_rel .05 and .10 are stored at 32 times, and the others
reconstructed. Columns:

    profile           norm of the difference to the exact profile, relative to that of the profile
    float32 ...       norm of the difference to the kept average, relative to that of the average,
                      for snapshots of this precision; in brackets the change of the loss of 512
                      digits with fixed noise
    averages differ   the same norm for the difference between the kept average and the last weights

Then CPU milliseconds of an update, of both averages and of writing both snapshots, and their share
of the time if snapshots are written at 32 times.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from common import keep, machine, make_unet, parser_of
from sklearn.datasets import load_digits
from torch import Tensor

from ddpm_hf import GaussianDDPMScheduler, simple_loss
from ddpm_hf.post_hoc_ema.profiles import SIGMA_RELS, PowerFunctionEMA, gamma_of, solve_weights
from ddpm_hf.post_hoc_ema.snapshots import save_snapshot

LENGTHS = (0.03, 0.07, 0.2)
NUM_TIMES, BATCH_SIZE = 32, 32
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Experiment:
    """Network, data and averages of the benchmark."""

    def __init__(self, num_updates: int) -> None:
        self.num_updates = num_updates
        self.digits = torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1
        self.unet = make_unet("small", size=8)
        self.scheduler = GaussianDDPMScheduler(
            beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"
        )
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=4e-4, fused=True)
        lengths = (*SIGMA_RELS, *LENGTHS)
        self.averages = [PowerFunctionEMA(self.unet.parameters(), s) for s in lengths]
        self.generator = torch.Generator().manual_seed(0)

    def loss(self, x_0: Tensor, seed: int | None = None) -> Tensor:
        generator = self.generator if seed is None else torch.Generator().manual_seed(seed)
        t = torch.randint(0, 1000, (len(x_0),), generator=generator)
        noise = torch.randn(x_0.shape, generator=generator)
        return simple_loss(self.unet, self.scheduler, x_0, t, noise).mean()

    def update(self) -> None:
        rows = torch.randint(0, len(self.digits), (BATCH_SIZE,), generator=self.generator)
        self.loss(self.digits[rows]).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def train(self) -> list[tuple[int, float, Tensor]]:
        """Update, length and weights in one vector of each snapshot."""
        snapshots = []
        for t in range(1, self.num_updates + 1):
            self.update()
            for average in self.averages:
                average.update(self.unet.parameters(), t)
            if t % (self.num_updates // NUM_TIMES) == 0:
                stored = self.averages[: len(SIGMA_RELS)]
                snapshots += [(t, a.sigma_rel, flat(a.averages)) for a in stored]
        return snapshots

    @torch.no_grad()
    def loss_of(self, weights: Tensor) -> float:
        kept = flat(self.unet.parameters())
        torch.nn.utils.vector_to_parameters(weights, self.unet.parameters())
        loss = float(self.loss(self.digits[:512], seed=1))
        torch.nn.utils.vector_to_parameters(kept, self.unet.parameters())
        return loss


def flat(tensors) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def print_errors(experiment: Experiment) -> list[dict[str, float | str]]:
    snapshots, rows = experiment.train(), []
    times, lengths, weights = zip(*snapshots, strict=True)
    gammas = [gamma_of(sigma_rel) for sigma_rel in lengths]
    last = flat(experiment.unet.parameters())
    for average in experiment.averages[len(SIGMA_RELS) :]:
        exact = flat(average.averages)
        x, error = solve_weights(times, gammas, experiment.num_updates, average.gamma)
        row: dict[str, float | str] = {
            "sigma_rel": average.sigma_rel, "profile": f"{error:.1e}",
            "loss": f"{experiment.loss_of(exact):.4f}",
        }  # fmt: skip
        for dtype in DTYPES:
            pairs = zip(x.tolist(), weights, strict=True)
            total = sum(a * w.to(dtype).double() for a, w in pairs).float()
            change = experiment.loss_of(total) - experiment.loss_of(exact)
            row[str(dtype)[6:]] = f"{distance(total, exact):.1e} ({change:+.0e})"
        row["averages differ"] = f"{distance(last, exact):.1e}"
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        rows.append(row)
    return rows


def cpu_ms(function: Callable[[], None], turns: int) -> float:
    """Median CPU milliseconds of a call."""
    seconds = []
    for _ in range(turns):
        start = time.process_time()
        function()
        seconds.append(time.process_time() - start)
    return 1000 * median(seconds)


def print_cost(experiment: Experiment, turns: int) -> dict[str, float]:
    stored = experiment.averages[: len(SIGMA_RELS)]
    names = [name for name, _ in experiment.unet.named_parameters()]

    def average() -> None:
        for running in stored:
            running.update(experiment.unet.parameters(), experiment.num_updates)

    with tempfile.TemporaryDirectory() as folder:

        def write() -> None:
            for a in stored:
                weights = dict(zip(names, a.averages, strict=True))
                save_snapshot(Path(folder), 1, a.sigma_rel, weights)

        cost = {
            "parameters": sum(p.numel() for p in experiment.unet.parameters()),
            "update_ms": cpu_ms(experiment.update, turns),
            "averages_ms": cpu_ms(average, turns),
            "snapshots_ms": cpu_ms(write, turns),
            "bytes": sum(path.stat().st_size for path in Path(folder).iterdir()),
        }
    added = cost["averages_ms"] + cost["snapshots_ms"] * NUM_TIMES / experiment.num_updates
    cost["share"] = added / cost["update_ms"]
    print("  ".join(f"{key} {value:.4g}" for key, value in cost.items()))
    return cost


def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads or 1)
    experiment = Experiment(options.updates)
    errors = print_errors(experiment)
    cost = print_cost(experiment, options.turns)
    keep({"machine": machine(options), "errors": errors, "cost": cost}, options)


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("--updates", type=int, default=640, help="updates (default: 640)")
    main(parser.parse_args())

"""Inpainting of half-hidden digits: quality and cost of `covariance` and `repaint`.

    python tests/benchmarks/bench_editing.py [--model FOLDER] [--json FILE]

Hides the lower half of held-out digits (8x8, scikit-learn) and draws it several times with each
method. Without `--model`, trains the model of training/digits.py first. Columns, with the standard
error over the digits:

    class     share of draws that a classifier of digits reads as the true class
    MSE       of the mean of the draws, on hidden pixels in [0, 1]
    energy    energy score of the hidden half, a proper score: lower is better
    coverage  share of hidden pixels in the 95 % interval of the mean and standard deviation of the
              draws (Student's t), widened by half a grey level of 17
    calls     network calls of each draw; VJP: vector-Jacobian products
    ms        CPU milliseconds of each draw, on one thread

Energy is also compared with that of the first method, digit by digit. A classifier of the visible
halves alone gives the share of the class that is possible: the mean of its probability of the true
class. `--num-calibrated` training digits give the calibration.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import keep, machine, parser_of
from scipy.stats import t as student
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from ddpm_hf import GaussianDDPMPipeline, calibrate, load
from ddpm_hf.diffusion import inpainting
from ddpm_hf.editing import inpaint

sys.path.insert(0, str(Path(__file__).parents[2] / "training"))
from digits import NUM_UPDATES, fit_judge, to_images, train_model

HALF_LEVEL = 1 / 32
SCORES = ("class", "MSE", "energy", "coverage")


@dataclass(frozen=True)
class Method:
    """A way to inpaint."""

    num_inference_steps: int
    method: str
    jump_length: int = 1
    jump_n_sample: int = 1
    is_calibrated: bool = False

    @property
    def name(self) -> str:
        if self.method == "covariance":
            return "covariance"
        passes = f"repaint {self.jump_length} x {self.jump_n_sample}"
        return passes + ", calibrated" * self.is_calibrated


def methods(numbers: list[int]) -> Iterator[Method]:
    for num_steps in numbers:
        yield Method(num_steps, "covariance")
        yield Method(num_steps, "repaint", 1, 1)
        yield Method(num_steps, "repaint", 1, 10)
        yield Method(num_steps, "repaint", 1, 10, is_calibrated=True)
        if num_steps > 10:
            yield Method(num_steps, "repaint", 10, 10)


@dataclass(frozen=True)
class Problem:
    """Digits with a hidden lower half, and a classifier of digits."""

    x_0: Tensor
    labels: np.ndarray
    num_draws: int
    classifier: Any

    @property
    def mask(self) -> Tensor:
        mask = torch.zeros(8, 8)
        mask[4:] = 1
        return mask

    def scores(self, samples: Tensor) -> dict[str, np.ndarray]:
        """Scores of each digit, (N,), from (N * num_draws, 1, 8, 8)."""
        draws = (samples.clamp(-1, 1).numpy() + 1) / 2
        draws = draws.reshape(len(self.labels), self.num_draws, 64)
        named = self.classifier.predict(draws.reshape(-1, 64) * 16).reshape(draws.shape[:2])
        hidden = draws[..., 32:]
        truth = (self.x_0.numpy().reshape(-1, 1, 64)[..., 32:] + 1) / 2
        mean, std = hidden.mean(1, keepdims=True), hidden.std(1, ddof=1, keepdims=True)
        factor = student.ppf(0.975, self.num_draws - 1) * math.sqrt(1 + 1 / self.num_draws)
        pairs = np.linalg.norm(hidden[:, :, None] - hidden[:, None], axis=-1).sum((1, 2))
        spread = pairs / (self.num_draws * (self.num_draws - 1))
        return {
            "class": (named == self.labels[:, None]).mean(1),
            "MSE": np.square(mean - truth).mean((1, 2)),
            "energy": np.linalg.norm(hidden - truth, axis=-1).mean(1) - spread / 2,
            "coverage": (abs(truth - mean) <= factor * std + HALF_LEVEL).mean((1, 2)),
        }


@contextmanager
def counted_products() -> Iterator[list[int]]:
    """Count of the vector-Jacobian products of the estimates."""
    count, plain = [0], inpainting.LinearisedEstimate.covariance

    def counting(self: Any, x: Tensor) -> Tensor:
        count[0] += 1
        return plain(self, x)

    inpainting.LinearisedEstimate.covariance = counting  # type: ignore[method-assign]
    try:
        yield count
    finally:
        inpainting.LinearisedEstimate.covariance = plain  # type: ignore[method-assign]


def measure(
    pipeline: GaussianDDPMPipeline, problem: Problem, method: Method, mse: Any
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Scores of each digit, and the cost of a draw."""
    calls = 0

    def denoiser(x_t: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        output: Tensor = pipeline.unet(x_t, t).sample
        return output

    scheduler = pipeline.scheduler.from_config(
        pipeline.scheduler.config, x_0_mse=mse if method.is_calibrated else None
    )
    x_0 = problem.x_0.repeat_interleave(problem.num_draws, dim=0)
    start = time.process_time()
    with counted_products() as products:
        samples = inpaint(
            denoiser, scheduler, x_0, problem.mask, method=method.method, progress=False,
            num_inference_steps=method.num_inference_steps, jump_length=method.jump_length,
            jump_n_sample=method.jump_n_sample, generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
    ms = (time.process_time() - start) / len(x_0) * 1e3
    return problem.scores(samples), {"calls": calls, "VJP": products[0], "ms": ms}


def summary(values: np.ndarray) -> dict[str, float]:
    """Mean and standard error over the digits."""
    return {"mean": float(values.mean()), "error": float(values.std(ddof=1) / len(values) ** 0.5)}


def row_text(method: Method, row: dict[str, Any]) -> str:
    cells = [f"{row[name]['mean']:.4f}+-{row[name]['error']:.4f}" for name in SCORES]
    cells.append(f"{row['difference']['mean']:+.3f}+-{row['difference']['error']:.3f}")
    cost = f"{row['calls']:6}{row['VJP']:6}{row['ms']:7.0f}"
    left = f"{method.name:26}{method.num_inference_steps:3} "
    return left + "".join(f"{cell:>16}" for cell in cells) + cost


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--model", help="checkpoint of the digits (default: train one)")
    parser.add_argument("--updates", type=int, default=NUM_UPDATES, help="of the training")
    parser.add_argument("--num-digits", type=int, default=80, help="half-hidden digits")
    parser.add_argument("--num-draws", type=int, default=4, help="draws of each digit")
    parser.add_argument("--num-calibrated", type=int, default=8, help="digits of the calibration")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 25, 50], help="values of K")
    options: argparse.Namespace = parser.parse_args()
    torch.set_num_threads(options.threads or 1)
    values, labels = load_digits(return_X_y=True)
    known, held_out, known_labels, held_out_labels = train_test_split(
        values, labels, test_size=0.2, stratify=labels, random_state=0
    )
    folder = Path("runs/bench/digits")
    model = options.model or train_model(to_images(known), folder, options.updates).model_dir
    pipeline = load(str(model))
    pipeline.unet.eval()
    number = options.num_digits
    true = held_out_labels[:number]
    visible = fit_judge(known[:, :32], known_labels).predict_proba(held_out[:number, :32])
    possible = float(visible[np.arange(number), true].mean())
    x_0 = torch.from_numpy(held_out[:number].reshape(-1, 1, 8, 8) / 8 - 1).float()
    problem = Problem(x_0, true, options.num_draws, fit_judge(known, known_labels))
    print(", ".join(f"{key} {value}" for key, value in machine(options).items()))
    print(f"share of the true class that the visible half allows: {possible:.3f}")
    columns = "".join(f"{name:>16}" for name in (*SCORES, "energy - first"))
    print(f"\n{'':26}{'K':>3} {columns}{'calls':>6}{'VJP':>6}{'ms':>7}", flush=True)
    generator = torch.Generator().manual_seed(0)
    clean = torch.from_numpy(known[: options.num_calibrated].reshape(-1, 1, 8, 8) / 8 - 1).float()
    calibrated = calibrate(
        pipeline.unet, pipeline.scheduler, clean, generator=generator, decoder="continuous",
        progress=False,
    )  # fmt: skip
    table, first = [], None
    for method in methods(options.steps):
        scores, cost = measure(pipeline, problem, method, calibrated.scheduler.x_0_mse)
        first = scores["energy"] if first is None else first
        row = {name: summary(scores[name]) for name in SCORES} | cost
        row["difference"] = summary(scores["energy"] - first)
        print(row_text(method, row), flush=True)
        table.append({"name": method.name, "K": method.num_inference_steps, **row})
    results = {
        "machine": machine(options), "digits": number, "draws": options.num_draws,
        "possible_share": possible, "rows": table,
    }  # fmt: skip
    keep(results, options)


if __name__ == "__main__":
    main()

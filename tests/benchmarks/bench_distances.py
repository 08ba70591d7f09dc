"""Speed of metrics on features, compared with scikit-learn and torchmetrics.

    python tests/benchmarks/bench_distances.py [--threads 1] [--json FILE]

Equal numbers of real and generated images with 1,280 features, as of EfficientNet-Lite0. The
references compute the kernel distance (torchmetrics) or coverage (scikit-learn) of the full sets;
"all with intervals" computes six pairwise figures with 20 half-sets and floors.
"""

from functools import partial

import torch
from common import keep, machine, parser_of, race, ratio
from sklearn.neighbors import NearestNeighbors
from torchmetrics.image.kid import maximum_mean_discrepancy

from ddpm_hf.evaluation import density_coverage, kernel_distance
from ddpm_hf.evaluation.metrics import measure

DIMS, SIZES = 1280, (1000, 4000)
RACES = (
    ("kernel distance", "torchmetrics"),
    ("density and coverage", "scikit-learn"),
    ("all with intervals", "torchmetrics"),
)
METRICS = ["kid", "precision-recall", "coverage", "memorisation"]


def draw(num: int, seed: int) -> torch.Tensor:
    """Non-negative features with a decaying spectrum."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(64, DIMS, generator=torch.Generator().manual_seed(0)) / 8
    noise = torch.randn(num, DIMS, generator=generator) / 2
    return (torch.randn(num, 64, generator=generator) @ mixing + noise).relu()


def their_kernel_distance(real: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    x, y = real.double(), drawn.double()
    pairs = ((x, x), (x, y), (y, y))
    return maximum_mean_discrepancy(*((a @ b.T / DIMS + 1) ** 3 for a, b in pairs))


def their_coverage(real: torch.Tensor, drawn: torch.Tensor) -> float:
    x, y = real.double().numpy(), drawn.double().numpy()
    radii = NearestNeighbors(n_neighbors=5, algorithm="brute").fit(x).kneighbors()[0][:, -1]
    gaps = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(y).kneighbors(x)[0][:, 0]
    return (gaps <= radii).mean()


def main() -> None:
    options = parser_of(__doc__).parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    results = {"machine": machine(options)}
    for num in SIZES:
        sets = draw(num, 1), draw(num, 2)
        calls = {
            "torchmetrics": partial(their_kernel_distance, *sets),
            "kernel distance": partial(kernel_distance, *sets),
            "scikit-learn": partial(their_coverage, *sets),
            "density and coverage": partial(density_coverage, *sets),
            "all with intervals": partial(measure, METRICS, *sets),
        }
        times = race(calls, options.turns)
        for ours, theirs in RACES:
            name = f"{num:,} images, {ours}: over {theirs}"
            results[name] = ratio(times, ours, theirs)
            print(f"{name}: {results[name]:.2f}x", flush=True)
    keep(results, options)


if __name__ == "__main__":
    main()

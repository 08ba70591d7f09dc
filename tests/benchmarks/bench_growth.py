"""Scaling of time and memory with batch size, steps, resolution, threads and processes.

    python tests/benchmarks/bench_growth.py [--device cuda] [--json FILE]

Uses the small network of bench_speed and one CPU thread unless noted, with alternating runs of this
package and stock diffusers. Memory is the growth of the peak of a new process. Training on several
processes splits one batch under torchrun. With --json, also saves a plot next to FILE.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch
from common import keep, machine, make_unet, memory, parser_of, race, random_images, train_ours
from diffusers import DDPMPipeline, DDPMScheduler

from ddpm_hf import GaussianDDPMPipeline, simple_loss

KINDS = {"stock": DDPMPipeline, "ours": GaussianDDPMPipeline}
CASES = {  # batch size, steps, image size
    "batch size": [(batch_size, 4, 32) for batch_size in (1, 2, 4, 8, 16, 32, 64)],
    "steps": [(4, num_steps, 32) for num_steps in (2, 8, 32)],
    "image size": [(1, 4, size) for size in (32, 64, 128)],
}
WORKERS = ((1, 1), (1, 2), (2, 1))  # processes, threads per process
NUM_UPDATES = 12
Row = dict[str, Any]


def draw(kind: str, batch_size: int, num_steps: int, size: int, device: str) -> None:
    pipeline = KINDS[kind](make_unet("small", device, size), DDPMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    pipeline(batch_size, num_inference_steps=num_steps, output_type="np")


def sampling(options: argparse.Namespace) -> dict[str, list[Row]]:
    """Seconds and peak MiB of sampling, for every case and pipeline."""
    # Memory first: a process forked later would reuse memory that was freed before.
    rows = {
        what: [
            {
                "case": case,
                "mib": {
                    kind: memory(partial(draw, kind, *case, options.device), options.device)
                    for kind in KINDS
                },
            }
            for case in cases
        ]
        for what, cases in CASES.items()
    }
    for row in chain.from_iterable(rows.values()):
        calls = {kind: partial(draw, kind, *row["case"], options.device) for kind in KINDS}
        times = race(calls, options.turns)
        row["s"] = {kind: statistics.median(t) for kind, t in times.items()}
    return rows


def training(num_processes: int, num_threads: int) -> Row:
    """Seconds of an update of 16 images on several processes."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc_per_node", f"{num_processes}", __file__, "--worker", f"{num_threads}"),
    ]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    out = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=300
    ).stdout
    return {"processes": num_processes, "threads": num_threads, "s": json.loads(out)}


def work(num_threads: int) -> None:
    """Train in one process of a launch; rank 0 prints the median time of an update."""
    torch.set_num_threads(num_threads)
    unet, marks = make_unet("small"), []

    def loss(*inputs: Any) -> torch.Tensor:
        marks.append(time.perf_counter())
        return simple_loss(*inputs)

    train_ours(unet, random_images(unet, 16), NUM_UPDATES, loss)
    if os.environ.get("RANK", "0") == "0":
        between = [b - a for a, b in pairwise(marks[1:])]
        print(json.dumps(statistics.median(between)))


def plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
    for number, (axis, label) in enumerate(zip(axes, CASES, strict=False)):
        rows, memories = results["sampling"][label], axis.twinx()
        for kind, style in (("stock", "--"), ("ours", "-")):
            places = [row["case"][number] for row in rows]
            times = [row["s"][kind] for row in rows]
            axis.loglog(places, times, f"o{style}", color="C0", label=f"{kind}, seconds")
            peaks = [row["mib"][kind] for row in rows]
            memories.loglog(places, peaks, f"s{style}", color="C1", label=f"{kind}, MiB")
        axis.set(xlabel=label, title=f"sampling by {label}")
        axis.set_ylabel("seconds", color="C0")
        memories.set_ylabel("peak memory, MiB", color="C1")
        memories.set_ylim(10, 2000)
        axis.set_xticks(places, [f"{place}" for place in places], minor=False)
        axis.minorticks_off()
    axes[0].legend(fontsize=8)
    rows = results["training"]
    names = [f"{row['processes']} x {row['threads']}" for row in rows]
    axes[3].bar(names, [1 / row["s"] for row in rows], color="C0")
    axes[3].set(xlabel="processes x threads", ylabel="updates/s", title="training")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.worker:
        work(options.worker)
        return
    torch.set_num_threads(options.threads or 1)
    results: dict[str, Any] = {
        "machine": machine(options),
        "sampling": sampling(options),
        "training": [training(*each) for each in WORKERS],
    }
    print(
        f"{'batch':>6} {'steps':>6} {'size':>6} {'s, stock':>9} {'ours':>7} {'MiB, stock':>11} ours"
    )
    for row in chain.from_iterable(results["sampling"].values()):
        batch_size, num_steps, size = row["case"]
        print(
            f"{batch_size:6} {num_steps:6} {size:6} {row['s']['stock']:9.2f} "
            f"{row['s']['ours']:7.2f} {row['mib']['stock']:11.0f} {row['mib']['ours']:4.0f}"
        )
    for row in results["training"]:
        print(
            f"training, {row['processes']} x {row['threads']} threads: {row['s']:.3f} s an update"
        )
    keep(results, options)
    if options.json:
        plot(results, options.json.with_suffix(".png"))


if __name__ == "__main__":
    main()

"""One call that checks and times a GPU: training killed and resumed, memory, sampling.

    python tests/benchmarks/bench_gpu.py --device cuda [--minutes 9] [--json FILE]

Trains the 35.7M network of DDPM (2006.11239, appendix B) in bf16, compiled, and in fp16 with its
gradient scaler: uninterrupted, and killed and resumed. Doubles the batch until the memory is full.
Compares updates and sampling steps with stock diffusers (`bench_speed.py`). What does not fit into
the minutes is left out and named. On a CPU the network is small, and fp16 is left out.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_speed import HEAD, sampling, show, training
from common import keep, limits, machine, make_unet, parser_of
from PIL import Image
from safetensors.torch import load_file

LIMIT_S = 200  # of a run
TRAIN = [sys.executable, "-m", "ddpm_hf", "train"]


class Trainer:
    """`ddpm-hf train` on random images, in new processes.

    Args:
        folder: of the images, the network and the runs.
        network: name of the network.
        device: cpu or cuda.

    Attributes:
        num_updates: length of a run that is killed after a third of it.
    """

    def __init__(self, folder: Path, network: str, device: str) -> None:
        self.folder, self.num_updates = folder, 60 if device == "cuda" else 12
        self.env = os.environ | ({"ACCELERATE_USE_CPU": "true"} if device == "cpu" else {})
        unet = make_unet(network)
        mode = {1: "L", 3: "RGB"}[unet.config.in_channels]
        (folder / "images").mkdir()
        for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3))):
            image = Image.fromarray(pixels.astype(np.uint8)).convert(mode)
            image.save(folder / "images" / f"{i}.png")
        public = {name: value for name, value in unet.config.items() if name[0] != "_"}
        (folder / "unet.json").write_text(json.dumps(public))

    def start(self, name: str, batch_size: int, *options: str) -> Any:
        """A running process, which writes to the folder `name`."""
        command = [
            *TRAIN, str(self.folder / "images"), "--unet-config", str(self.folder / "unet.json"),
            "--output-dir", str(self.folder / name), "--batch-size", str(batch_size),
            "--max-train-steps", str(self.num_updates),
            "--checkpointing-steps", str(self.num_updates // 3),
            "--num-samples", "0", "--lr-warmup-steps", "1", "--num-threads", "1",
            "--logging-steps", "4", "--report-to", "none", *options,
        ]  # fmt: skip
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=self.env, stdout=pipe, stderr=pipe, text=True)

    def finish(self, *arguments: Any) -> str:
        """Everything that a run prints; "" if it failed, whose reason is printed."""
        with self.start(*arguments) as process:
            try:
                output, errors = process.communicate(timeout=LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                output, errors = "", f"took more than {LIMIT_S} s"
        if "done " in output:
            return f"{output}{errors}"
        print(f"  {arguments[0]} failed: {errors.strip().splitlines()[-1]}")
        return ""

    def images_per_s(self, name: str) -> float:
        """Speed of the last entry of the log, which leaves out compilation."""
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        return float(json.loads(lines[-1])["images_per_s"])

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        checkpoint = self.folder / name / "checkpoints" / f"step-{self.num_updates:08d}"
        return load_file(checkpoint / "unet.safetensors")


def resumed(trainer: Trainer, batch_size: int, *options: str) -> dict[str, Any]:
    """Speed of a run, and the largest difference of one that is killed and resumed."""
    name = "-".join(word.strip("-") for word in options) or "default"
    straight, killed = f"straight-{name}", f"killed-{name}"
    row: dict[str, Any] = {"options": " ".join(options)}
    if not trainer.finish(straight, batch_size, *options):
        return row
    with trainer.start(killed, batch_size, *options) as process:
        while not list(trainer.folder.glob(f"{killed}/checkpoints/step-*")):
            if process.poll() is not None:
                break
            time.sleep(0.01)
        process.kill()
    if "resuming after" not in trainer.finish(killed, batch_size, *options):
        return row
    first, second = trainer.weights(straight), trainer.weights(killed)
    differences = [float((first[key] - second[key]).abs().max()) for key in first]
    return row | {"images_per_s": trainer.images_per_s(straight), "difference": max(differences)}


def ladder(trainer: Trainer, batch_size: int, *options: str) -> list[dict[str, Any]]:
    """Images per second of doubled batches, until the trainer splits a batch to fit the memory."""
    rows: list[dict[str, Any]] = []
    while True:
        name = f"ladder-{batch_size}"
        output = trainer.finish(name, batch_size, *options)
        if not output:
            return rows
        speed = trainer.images_per_s(name)
        is_split = re.search(r"in \d+ micro-batches", output) is not None
        rows.append({"batch_size": batch_size, "images_per_s": speed, "is_split": is_split})
        shutil.rmtree(trainer.folder / name)
        if is_split or (batch_size >= 32 and trainer.env.get("ACCELERATE_USE_CPU")):
            return rows
        batch_size *= 2


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit (default: 9)")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads or torch.get_num_threads())
    until = time.monotonic() + 60 * options.minutes
    on_gpu = options.device == "cuda"
    network, batch_size = ("cifar", 128) if on_gpu else ("small", 8)
    fast = ["--mixed-precision", "bf16", "--compile"] if on_gpu else []
    about, rows = machine(options), {}
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(Path(folder), network, options.device)
        options.full = False
        parts: dict[str, Callable[[], Any]] = {
            "killed and resumed": lambda: resumed(trainer, batch_size, *fast),
            "killed and resumed, fp16": lambda: resumed(
                trainer, batch_size, "--mixed-precision", "fp16"
            ),
            "batch sizes": lambda: ladder(trainer, batch_size, *fast[:2]),
            "sampling, batch 1": lambda: sampling(network, 1, options),
            "sampling, batch 64": lambda: sampling(network, 64, options),
            "training": lambda: training(network, 16, options),
        }
        if not on_gpu:
            del parts["killed and resumed, fp16"], parts["sampling, batch 64"]
        peak = limits(options.device)
        for part, measure in parts.items():
            if time.monotonic() > until:
                print(f"{part}: left out after {options.minutes:g} minutes")
                continue
            found = rows[part] = measure()
            if part.startswith(("sampling", "training")):
                print(f"\n{part}\n{HEAD}")
                show(found, peak)
            else:
                print(f"\n{part}")
                for row in [found] if isinstance(found, dict) else found:
                    print("  " + ", ".join(f"{key} {value}" for key, value in row.items()))
    keep({"machine": about, "gflop_per_s": peak, "rows": rows}, options)


if __name__ == "__main__":
    main()

# /// script
# requires-python = ">=3.11"
# dependencies = ["ddpm-hf[eval]"]
#
# [tool.uv]
# find-links = ["/package"]
#
# [tool.hf-jobs]
# flavor = "a10g-small"
# timeout = "6h"
# secrets = ["HF_TOKEN"]
# ///
"""A training run as a job on the machines of Hugging Face, which resumes in its next attempt.

    python -m build --wheel
    hf buckets create runs
    hf jobs uv run --attempts 3 -v ./dist:/package -v hf://buckets/YOU/runs:/runs \\
        training/hf_job.py YOU/photos --push-to-hub YOU/photos-ddpm

The options after the file are those of `ddpm-hf train`. The folder of the run is in the bucket, so
that another attempt, or the same command later, resumes it. All GPUs of the machine train;
`--flavor` and `--timeout` before the file choose another machine and time limit. `--dry-run` before
the file shows what would be submitted; after it, the job prints its plan and needs, and ends.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.run import main as torchrun

from ddpm_hf import TrainingConfig, train
from ddpm_hf.cli import run_command
from ddpm_hf.training import ConfigError, parse_config

RUNS = Path("/runs")


def main(argv: list[str]) -> int:
    """Train with the options in `argv`, on all GPUs, and return the exit status."""
    config = parse_config(argv, prog="hf_job.py")
    if config.output_dir is None:
        if not RUNS.is_mount():
            raise ConfigError(
                f"there is no volume at {RUNS}, and other files end with the job; start it with"
                f" -v hf://buckets/YOU/NAME:{RUNS}, or give `output_dir`"
            )
        config = replace(config, output_dir=str(RUNS / Path(config.run_folder()).name))
    num_gpus = torch.cuda.device_count()
    if num_gpus > 1 and "WORLD_SIZE" not in os.environ:
        launch = ["--standalone", f"--nproc-per-node={num_gpus}", "--max-restarts=3"]
        torchrun([*launch, __file__, *argv])
        return 0
    return train(config).exit_status


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:], TrainingConfig))

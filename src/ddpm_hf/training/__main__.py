"""`accelerate launch -m ddpm_hf.training ...`: the program of `ddpm-hf train`."""

import sys

from ddpm_hf.cli import run_command, train_command

sys.exit(run_command(train_command, None))

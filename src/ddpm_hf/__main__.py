"""Entry point of `python -m ddpm_hf`, and of `accelerate launch -m ddpm_hf train ...`."""

import sys

from ddpm_hf.cli import main

sys.exit(main())

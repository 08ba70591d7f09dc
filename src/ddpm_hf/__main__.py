"""`python -m ddpm_hf` is `ddpm-hf`; under a launcher, `accelerate launch -m ddpm_hf train ...`."""

import sys

from ddpm_hf.cli import main

sys.exit(main())

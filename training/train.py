"""The whole training program in one view: data, network, diffusion, training.

    python training/train.py ./photos
    accelerate launch --multi_gpu training/train.py ./photos --batch-size 256

Every part may be swapped: any UNet2DModel, scheduler or data set. `ddpm-hf train` runs the same
program without this file; `--help` lists the options, which a recipe (`--config`) can hold too.
"""

import sys

from accelerate.utils import set_seed

from ddpm_hf import TrainingConfig, train
from ddpm_hf.cli import run_command
from ddpm_hf.training import (
    build_images,
    build_scheduler,
    build_unet,
    join_processes,
    main_first,
    parse_config,
)


def main(argv: list[str]) -> int:
    """Train as the command line `argv` says, and return the exit status."""
    config = parse_config(argv, prog="train.py")
    if config.pretrained:  # brings its own network, diffusion and size of images
        return train(config).exit_status

    # Any data set: a folder, parquet files, a name on the Hub. Decoded and resized once.
    state = join_processes(config)
    images = main_first(state, lambda: build_images(config))

    # The diffusion; put GaussianDDPMScheduler(beta_schedule=..., ...) in its place for your own.
    scheduler = build_scheduler(config)

    # A network for images of this size and mode; put your own UNet2DModel(...) in its place.
    set_seed(config.seed)
    unet = build_unet(images.facts, state.device.type, config.unet_config, scheduler)

    # Resumes by itself when the run was interrupted. `model_dir` holds the portable checkpoint.
    result = train(config, unet=unet, scheduler=scheduler, dataset=images)
    return result.exit_status


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:], TrainingConfig))

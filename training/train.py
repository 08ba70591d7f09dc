"""A training script with replaceable parts: data, scheduler, network, training.

    python training/train.py ./photos
    accelerate launch --multi_gpu training/train.py ./photos --batch-size 256

`ddpm-hf train` runs the same program without this file. `--help` lists the options, which a recipe
(`--config`) can set, too.
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
    """Train with the options in `argv` and return the exit status."""
    config = parse_config(argv, prog="train.py")
    # A pretrained model defines network, scheduler and image size; a stream is read by `train`.
    if config.pretrained or config.streaming:
        return train(config).exit_status

    # Any dataset: a folder, parquet files or a dataset on the Hub, decoded and resized once.
    state = join_processes(config)
    images = main_first(state, lambda: build_images(config))

    # Replace this by your own GaussianDDPMScheduler(beta_schedule=..., ...).
    scheduler = build_scheduler(config)

    # A network for the size and mode of the images; replace it by your own UNet2DModel(...).
    set_seed(config.seed)
    classes = images.facts.class_names if config.class_conditional else None
    unet = build_unet(
        images.facts, state.device.type, config.unet_config, scheduler, classes and len(classes)
    )

    # Resumes an interrupted run. The portable checkpoint is in `result.model_dir`.
    result = train(config, unet=unet, scheduler=scheduler, dataset=images)
    return result.exit_status


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:], TrainingConfig))

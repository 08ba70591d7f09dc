"""The whole training program in one view: data, network, diffusion, training, sharing.

    python training/train.py ./photos
    accelerate launch --multi_gpu training/train.py ./photos --batch-size 256

Every part may be swapped: any UNet2DModel, scheduler or data set. `ddpm-hf train` runs the same
program without this file; `--help` lists the options, which a recipe (`--config`) can hold too.
"""

import sys

from accelerate import PartialState

from ddpm_hf import GaussianDDPMScheduler, train
from ddpm_hf.cli import run_command
from ddpm_hf.data import load_images, prepare_images
from ddpm_hf.training import build_unet, parse_config


def main(argv: list[str]) -> int:
    """Train as the command line `argv` says, and return the exit status."""
    config = parse_config(argv, prog="train.py")

    # Any data set: a folder, parquet files, a name on the Hub. Decoded and resized once.
    with PartialState().main_process_first():
        images = prepare_images(
            load_images(config.dataset, split=config.split),
            resolution=config.resolution,
            image_mode=config.image_mode,
            crop=config.crop,
        )

    # A network for images of this size and mode; replace it with your own UNet2DModel(...).
    unet = build_unet(images.facts, PartialState().device.type, config.unet_config)

    # The diffusion: T steps, their noise schedule, and what the network predicts.
    scheduler = GaussianDDPMScheduler(
        num_train_timesteps=config.num_train_timesteps or 1000,
        beta_schedule=config.beta_schedule or "squaredcos_cap_v2",
        prediction_type=config.prediction_type or "v_prediction",
    )

    # Resumes by itself when the run was interrupted. `model_dir` holds the portable checkpoint.
    result = train(config, unet=unet, scheduler=scheduler, dataset=images)
    return 0 if result.stopped_by is None else 128 + result.stopped_by


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

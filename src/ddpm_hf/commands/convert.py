"""`ddpm-hf convert`."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from ddpm_hf.commands.messages import command_options
from ddpm_hf.diffusion.atomic_files import read_text
from ddpm_hf.openai_conversion.flags import PRESETS
from ddpm_hf.options import REQUIRED, OptionError, Options, option
from ddpm_hf.paths import output_folder

HELP = "convert improved-diffusion and guided-diffusion weights to a portable checkpoint"
DESCRIPTION = """
convert weights of improved-diffusion and guided-diffusion

  ddpm-hf convert cifar10_uncond_50M_500K.pt --preset iddpm-cifar10 --output models/cifar10
  ddpm-hf convert lsun_bedroom.pt --preset adm-lsun --output models/bedroom
  ddpm-hf convert ema_0.9999_200000.pt --config flags.json --output models/mine
  ddpm-hf convert runs/openai --config flags.json --output models/mine     newest EMA weights

The output is a checkpoint like those of `ddpm-hf train`: sample, evaluate, calibrate, fine-tune
(`ddpm-hf train --pretrained`) and push it. flags.json holds the flags of the training script, such
as {"image_size": 32, "num_channels": 128, "learn_sigma": true}. Networks that UNet2DModel cannot
express, such as a fixed number of heads at several widths, are refused.
"""


@dataclass(frozen=True, kw_only=True)
class ConvertCommand(Options):
    """Options of `ddpm-hf convert`."""

    weights: Path = option(
        REQUIRED,
        "`.pt` file of weights, or folder of a training run",
        metavar="WEIGHTS",
        is_path=True,
        is_positional=True,
    )
    output: Path = option(
        REQUIRED,
        "folder for the checkpoint",
        metavar="FOLDER",
        is_path=True,
        convert=output_folder,
    )
    preset: str | None = option(
        None,
        f"published model: {', '.join(PRESETS)}",
        choices=tuple(PRESETS),
        metavar="NAME",
    )
    config: Path | None = option(
        None, "JSON file with the flags of the model, instead of `preset`", metavar="FILE",
        is_path=True,
    )  # fmt: skip
    class_names: Path | None = option(
        None,
        "text file with one class name per line, in the order of their numbers",
        metavar="FILE",
        is_path=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.preset is None) == (self.config is None):
            raise OptionError(f"pass either `preset` or `config`; presets: {', '.join(PRESETS)}")


def run(argv: list[str]) -> int:
    """Convert weights."""
    usage = "WEIGHTS --output FOLDER [--preset NAME | --config FILE]"
    with command_options(ConvertCommand, argv, "convert", usage, DESCRIPTION) as options:
        convert(options)
    return 0


def convert(options: ConvertCommand) -> None:
    """Convert the weights, write the checkpoint and print what it is."""
    if not options.weights.exists():
        raise ValueError(f"{options.weights} does not exist")
    if options.output.exists() and any(options.output.iterdir()):
        raise ValueError(f"{options.output} is not empty: choose another `output`")
    names = None
    if options.class_names is not None:
        lines = read_text(options.class_names).splitlines()
        names = [line.strip() for line in lines if line.strip()]
    from ddpm_hf.hub.card import write_model_card
    from ddpm_hf.openai_conversion.convert import convert

    pipeline = convert(
        options.weights, preset=options.preset, config=options.config, class_names=names
    )
    pipeline.save_pretrained(options.output)
    write_model_card(options.output)
    size = sum(weight.numel() for weight in pipeline.unet.parameters())
    print(
        f"{size:,} parameters, {len(pipeline.scheduler):,} timesteps, in {options.output}\n"
        f"next: ddpm-hf sample {shlex.quote(str(options.output))} --num-inference-steps 50"
    )

"""`ddpm-hf train`."""

from dataclasses import fields

from ddpm_hf.commands.messages import flags_in_messages

HELP = "train on a folder of images or any data set, or go on with a run that was interrupted"


def run(argv: list[str]) -> int:
    """Train as `argv` says; 0, or the status of a run that was stopped or could not be pushed."""
    from ddpm_hf.training import TrainingConfig, parse_config, train

    with flags_in_messages(option.name for option in fields(TrainingConfig)):
        return train(parse_config(argv, prog="ddpm-hf train")).exit_status

"""`ddpm-hf train`."""

from collections.abc import Iterator
from itertools import pairwise

from ddpm_hf.commands.messages import command_messages
from ddpm_hf.utils.text import check_local_path

HELP = "train on a folder of images or any dataset, or resume an interrupted run"


def run(argv: list[str]) -> int:
    """Train a model; returns 0, or the status of a run that was stopped or could not be pushed."""
    for text in _dataset_names(argv):
        check_local_path(text)
    from ddpm_hf.training import TrainingConfig, parse_config

    with command_messages(TrainingConfig):
        config = parse_config(argv, prog="ddpm-hf train")
        from ddpm_hf.training.early_checks import check_before_loading

        check_before_loading(config)
        from ddpm_hf.training import train  # takes seconds, so invalid options are reported before

        return train(config).exit_status


def _dataset_names(argv: list[str]) -> Iterator[str]:
    """Values of `--dataset`, before the options are parsed."""
    yield from (value for flag, value in pairwise(argv) if flag == "--dataset")
    yield from (word.partition("=")[2] for word in argv if word.startswith("--dataset="))

"""`ddpm-hf train`."""

from collections.abc import Iterator
from itertools import pairwise

from ddpm_hf.commands.messages import flags_in_messages
from ddpm_hf.text import check_local_path

HELP = "train on a folder of images or any data set, or go on with a run that was interrupted"


def run(argv: list[str]) -> int:
    """Train as `argv` says; 0, or the status of a run that was stopped or could not be pushed."""
    for text in _data_sets(argv):
        check_local_path(text)
    from ddpm_hf.training import TrainingConfig, parse_config

    with flags_in_messages(vars(TrainingConfig())):
        config = parse_config(argv, prog="ddpm-hf train")
        from ddpm_hf.training import train  # many seconds of imports, after what can be refused

        return train(config).exit_status


def _data_sets(argv: list[str]) -> Iterator[str]:
    """What certainly names a data set, before the options are parsed."""
    if argv and not argv[0].startswith("-"):
        yield argv[0]
    yield from (after for word, after in pairwise(argv) if word == "--dataset")
    yield from (word.partition("=")[2] for word in argv if word.startswith("--dataset="))

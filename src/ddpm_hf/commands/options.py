"""What the parsers of the commands share."""

import argparse
from pathlib import Path


def command_parser(name: str, usage: str, text: str) -> argparse.ArgumentParser:
    """A parser for `ddpm-hf NAME`; its text is shown as it is written."""
    return argparse.ArgumentParser(
        prog=f"ddpm-hf {name}",
        usage=f"ddpm-hf {name} {usage}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def positive_int(text: str) -> int:
    """`type=` of an option that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def path(text: str) -> Path:
    """`type=` of a path: `~` is home in `--output=~/x` too, where no shell expands it."""
    return Path(text).expanduser()


def model_name(text: str) -> str:
    """`type=` of a repository on the Hub or a folder."""
    return str(path(text)) if text.startswith("~") else text

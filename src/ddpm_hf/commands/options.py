"""What the parsers of the commands share."""

import argparse


def command_parser(name: str, text: str) -> argparse.ArgumentParser:
    """A parser for `ddpm-hf NAME`."""
    return argparse.ArgumentParser(prog=f"ddpm-hf {name}", description=text, allow_abbrev=False)


def positive_int(text: str) -> int:
    """`type=` of an option that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value

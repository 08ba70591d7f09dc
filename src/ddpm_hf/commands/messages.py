"""What a command says: in one line, and with flags where the Python interface has arguments."""

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

Speller = Callable[[str], str]
# What has no value on the command line.
FLAGS = {"use_safetensors=False": "--allow-pickle", "overwrite=True": "--overwrite"}


def say(text: str, for_all: bool = False) -> None:
    """A line on stderr; the first of a machine's processes, or this one, speaks for all of them."""
    if os.environ.get("LOCAL_RANK", "0") != "0" and not for_all:
        return
    tqdm = sys.modules.get("tqdm")
    if tqdm is None:
        print(text, file=sys.stderr)
    else:
        tqdm.tqdm.write(text, file=sys.stderr)  # above the progress bars, not in the midst of them


@contextmanager
def one_line_warnings(spell: Speller = str) -> Iterator[None]:
    """Inside, a warning is one line, without the place in the source that raised or logged it."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        say(f"ddpm-hf: warning: {spell(' '.join(str(message).split()))}")

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            show(record.getMessage())

    logger = logging.getLogger("ddpm_hf")
    before = warnings.showwarning, logger.handlers, logger.propagate
    warnings.showwarning, logger.handlers, logger.propagate = show, [Handler("WARNING")], False
    try:
        yield
    finally:
        warnings.showwarning, logger.handlers, logger.propagate = before


@contextmanager
def flags_in_messages(names: Iterable[str]) -> Iterator[None]:
    """Inside, what is said about the arguments `names` is said about the flags of that name."""
    spell = flag_speller(names)
    with one_line_warnings(spell):
        try:
            yield
        except (ValueError, RuntimeError) as error:
            error.args = (spell(str(error)),)
            raise


def flag_speller(names: Iterable[str]) -> Speller:
    """A function that writes `max_train_steps` as `--max-train-steps`, and `eta=2` as `--eta 2`.

    A name that is also a plain word is one where a message begins with it, or gives its value.
    What is quoted, or part of a path or of another name, stays.
    """
    given = sorted(set(names), key=len, reverse=True)
    compound = "|".join(name for name in given if "_" in name) or "(?!)"
    plain = "|".join(name for name in given if "_" not in name) or "(?!)"
    pattern = re.compile(
        rf"(?<![\w./'\"-])({compound})(?![\w'\"/(]|\.\w)(=)?"
        rf"|^({plain})(?= must | is | and )"
        rf"|(?<![\w./'\"-])({plain})(=)"
    )

    def flag(match: re.Match[str]) -> str:
        name = next(group for group in match.groups() if group and group != "=")
        return "--" + name.replace("_", "-") + (" " if "=" in match.groups() else "")

    def spell(message: str) -> str:
        for argument, switch in FLAGS.items():
            message = message.replace(argument, switch)
        for name in given:
            message = message.replace(f"`{name}`", "--" + name.replace("_", "-"))
        return pattern.sub(flag, message)

    return spell

"""The `ddpm-hf` command: list of commands, and their exit statuses."""

import argparse
import atexit
import gc
import os
import signal
import sys
from collections.abc import Callable, Sequence
from itertools import takewhile

from ddpm_hf import __version__
from ddpm_hf.commands import app, calibrate, convert, edit, ema, evaluate, push, sample, train
from ddpm_hf.commands.messages import (
    command_messages,
    escape_unencodable_output,
    hidden_secrets,
    is_stdout_closed,
    print_traceback,
    say,
)
from ddpm_hf.utils.connection import check_endpoint
from ddpm_hf.utils.process_watch import watch_launcher
from ddpm_hf.utils.text import check_local_path

COMMANDS = {
    "train": train,
    "sample": sample,
    "edit": edit,
    "calibrate": calibrate,
    "ema": ema,
    "evaluate": evaluate,
    "app": app,
    "push": push,
    "convert": convert,
}
# Exit statuses: 0; 2 for invalid input; 128 + N after signal N; 1 for other failures. A command may
# define more.
BAD_INPUT = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return the exit status.

    Args:
        argv: the arguments, by default those of this process.
    """
    # How long idle threads of GNU OpenMP spin; read when torch is loaded. On a busy CPU, a long
    # spin makes an update take several times as long; on a quiet CPU, no spin makes it take almost
    # twice as long. A short spin suits both.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    return run_command(_dispatch, argv)


def _dispatch(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="ddpm-hf",
        description="Train, sample and share denoising diffusion probabilistic models.",
        epilog="`ddpm-hf COMMAND --help` explains a command.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"ddpm-hf {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.HELP, add_help=False)
    chosen, arguments = parser.parse_known_args(argv)
    status: int = COMMANDS[chosen.command].run(arguments)
    return status


def run_command(
    command: Callable[[list[str]], int],
    argv: Sequence[str] | None,
    options: type | None = None,
) -> int:
    """Run a command and return its exit status; failures are reported in one line.

    Invalid input gives status 2, and a failure of the disk or the Hub status 1. A closed output, as
    after `| head`, gives the status of SIGPIPE, without a message.

    Args:
        command: takes its arguments and returns the exit status.
        argv: the arguments, by default those of this process.
        options: dataclass of the options that messages name as flags; commands of `ddpm-hf` set
            their own.
    """
    escape_unencodable_output()
    # The interpreter then ends without a last garbage collection, which takes a second or two for
    # the half million objects of torch and diffusers.
    atexit.register(gc.freeze)
    watch_launcher()
    with hidden_secrets():
        return _status_of(command, argv, options)


def _status_of(
    command: Callable[[list[str]], int], argv: Sequence[str] | None, options: type | None
) -> int:
    try:
        with command_messages(options):
            words = list(sys.argv[1:] if argv is None else argv)
            check_endpoint()
            # Before the parser of options, whose import takes a second.
            for word in takewhile(lambda word: not word.startswith("-"), words):
                check_local_path(word)
            status = command(words)
            sys.stdout.flush()
            return status
    except Exception as error:
        if isinstance(error, BrokenPipeError) and is_stdout_closed():
            return 128 + signal.SIGPIPE
        if (text := _one_line(error)) is None:
            sys.excepthook = print_traceback
            raise
        # If the first process hangs, another one reports the error.
        say(f"ddpm-hf: error: {text}", for_all=getattr(error, "is_reporting_rank", False))
        return BAD_INPUT if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        say("ddpm-hf: interrupted")
        return 128 + signal.SIGINT


def _one_line(error: Exception) -> str | None:
    """The message of a failure that the user can mend; None for an error in the program."""
    if isinstance(error, ValueError | OSError):
        return f"{error}"
    from ddpm_hf.utils.backend_settings import is_out_of_memory

    if is_out_of_memory(error):
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        return f"out of memory: {reason}; use a smaller `batch_size`"
    if type(error).__name__ == "SafetensorError":  # a full disk, or damaged weights
        return f"{error}"
    from ddpm_hf.training import TrainingError

    return f"{error}" if isinstance(error, TrainingError) else None


if __name__ == "__main__":
    sys.exit(main())

"""The `ddpm-hf` command: which commands there are, and how each of them ends."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence

from ddpm_hf import __version__
from ddpm_hf.commands import calibrate, evaluate, push, sample, train
from ddpm_hf.commands.messages import flags_in_messages, say

COMMANDS = {
    "train": train,
    "sample": sample,
    "calibrate": calibrate,
    "evaluate": evaluate,
    "push": push,
}
# Exit statuses besides 0: 2 for bad input, 128 + N after signal N, 1 for the rest; a command may
# have its own.
BAD_INPUT = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (by default this process's) and return the exit status."""
    # Read when torch is loaded. Threads that spin for long while they wait for each other make an
    # update several times as long on a CPU that is busy with other work too; threads that sleep at
    # once, almost twice as long on one that is not. A short spin (GNU OpenMP's) suits both.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
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
    chosen, rest = parser.parse_known_args(argv)
    return run_command(COMMANDS[chosen.command].run, rest)


def run_command(
    command: Callable[[list[str]], int],
    argv: Sequence[str] | None,
    option_names: Iterable[str] = (),
) -> int:
    """Run one command; bad input becomes a line and status 2, a failing disk or Hub status 1.

    Args:
        command: takes its arguments, returns the exit status.
        argv: the arguments, by default those of this process.
        option_names: arguments in Python that messages name as flags, where it has not said so.
    """
    try:
        with flags_in_messages(option_names):
            return command(list(sys.argv[1:] if argv is None else argv))
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError):
            from ddpm_hf.training import TrainingError

            if not isinstance(error, TrainingError):
                raise
        # Where the first process is the one that hangs, another one says so.
        say(f"ddpm-hf: error: {error}", for_all=getattr(error, "speaks", False))
        return BAD_INPUT if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        say("ddpm-hf: interrupted")
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())

"""The `ddpm-hf` command. Each subcommand imports what it needs when it runs."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ddpm_hf import __version__

# Exit statuses besides 0: 2 for bad input, 3 for a model that was made but not pushed, 128 + N
# after signal N, 1 for the rest.
_BAD_INPUT, _NOT_PUSHED = 2, 3


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
    for name, run in _COMMANDS.items():
        commands.add_parser(name, help=str(run.__doc__).splitlines()[0], add_help=False)
    chosen, rest = parser.parse_known_args(argv)
    return run_command(_COMMANDS[chosen.command], rest)


def run_command(command: Callable[[list[str]], int], argv: Sequence[str] | None) -> int:
    """Run one command; bad input becomes a line and status 2, a failing disk or Hub status 1."""
    try:
        return command(list(sys.argv[1:] if argv is None else argv))
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError):
            from ddpm_hf.training import TrainingError

            if not isinstance(error, TrainingError):
                raise
        if os.environ.get("LOCAL_RANK", "0") == "0":  # the processes of one machine say it once
            print(f"ddpm-hf: error: {error}", file=sys.stderr)
        return _BAD_INPUT if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        print("ddpm-hf: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def train_command(argv: list[str]) -> int:
    """train on a folder of images or any data set, or go on with a run that was interrupted"""
    from ddpm_hf.training import parse_config, train

    return train(parse_config(argv, prog="ddpm-hf train")).exit_status


def sample_command(argv: list[str]) -> int:
    """draw images from a model on the Hub or in a folder"""
    parser = _parser("sample", sample_command)
    parser.add_argument("model", metavar="MODEL", help="Hub repository or folder of a model")
    parser.add_argument(
        "--num-images",
        type=_positive,
        default=16,
        metavar="N",
        help="how many to draw (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("samples.png"),
        metavar="PATH",
        help="an image file for one grid of all, else a folder for one file each "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--num-inference-steps",
        type=_positive,
        metavar="K",
        help="denoising steps (default: as many as the model was trained with)",
    )
    parser.add_argument(
        "--eta",
        type=float,
        default=1.0,
        help="1: DDPM; 0: deterministic DDIM, for few steps (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="image i depends on the seed and on i alone (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=_positive,
        default=16,
        metavar="N",
        help="images drawn at once (default: %(default)s)",
    )
    parser.add_argument("--revision", help="branch, tag or commit on the Hub (default: main)")
    options = parser.parse_args(argv)
    options.output.parent.mkdir(parents=True, exist_ok=True)  # fails before the work, if at all
    from ddpm_hf.hub.load import load
    from ddpm_hf.pictures import best_device, draw_images, save_images

    pipeline = load(options.model, revision=options.revision).to(best_device())
    images = draw_images(
        pipeline,
        options.num_images,
        batch_size=options.batch_size,
        seed=options.seed,
        num_inference_steps=options.num_inference_steps,
        eta=options.eta,
    )
    print(f"{options.num_images} images in {save_images(images, options.output)}")
    return 0


def push_command(argv: list[str]) -> int:
    """share a model folder on the Hub, in one commit, private unless --public"""
    parser = _parser("push", push_command)
    parser.add_argument("folder", type=Path, metavar="CHECKPOINT", help="folder of a model")
    parser.add_argument("repo_id", metavar="USER/REPO", help="repository, made if missing")
    parser.add_argument("--public", action="store_true", help="a new repository is public")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to push to (default: main)")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    parser.add_argument("--dry-run", action="store_true", help="only list what would be uploaded")
    options = parser.parse_args(argv)
    from ddpm_hf.hub.push import HubError, push

    try:
        print(push(**vars(options)))
    except HubError as error:
        print(f"ddpm-hf: not pushed: {error}", file=sys.stderr)
        return _NOT_PUSHED
    return 0


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train_command,
    "sample": sample_command,
    "push": push_command,
}


def _parser(name: str, command: Callable[[list[str]], int]) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"ddpm-hf {name}",
        description=str(command.__doc__),
        allow_abbrev=False,
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())

"""`ddpm-hf push`."""

import argparse
import sys

from ddpm_hf.commands.messages import flags_in_messages
from ddpm_hf.commands.options import command_parser, path

HELP = "share a model folder on the Hub, in one commit, private unless --public"
EXAMPLES = """
share a model folder on the Hub

  ddpm-hf push runs/photos/model YOU/photos --dry-run     say what would go, and stop
  ddpm-hf push runs/photos/model YOU/photos               in one commit, privately
  ddpm-hf push runs/photos/model YOU/photos --public      for everyone to see

Log in first (`hf auth login`, or a token in HF_TOKEN). What goes is the model: weights,
configurations, the card with its pictures, the record of the training. Checkpoints for
going on, data and other files in the folder stay here.
"""
NOT_PUSHED = 3


def run(argv: list[str]) -> int:
    """Push as `argv` says; 0, or NOT_PUSHED if the Hub did not take it."""
    options = parser().parse_args(argv)
    from ddpm_hf.hub.push import HubError, push

    try:
        with flags_in_messages(vars(options)):
            print(push(**vars(options)))
    except HubError as error:
        print(f"ddpm-hf: not pushed: {error}", file=sys.stderr)
        return NOT_PUSHED
    return 0


def parser() -> argparse.ArgumentParser:
    """What `ddpm-hf push` understands."""
    parser = command_parser("push", "FOLDER USER/REPO [--option ...]", EXAMPLES)
    add = parser.add_argument
    add("folder", type=path, metavar="FOLDER", help="folder of a model, such as runs/photos/model")
    add("repo_id", metavar="USER/REPO", help="repository, made if missing")
    add("--public", action="store_true", help="a new repository is public (default: private)")
    add("--revision", metavar="BRANCH", help="branch to push to (default: main)")
    add("--create-pr", action="store_true", help="open a pull request instead of a commit")
    add("--license", metavar="NAME", help="licence for the card, such as apache-2.0")
    add("--dry-run", action="store_true", help="only list what would be uploaded, with the card")
    return parser

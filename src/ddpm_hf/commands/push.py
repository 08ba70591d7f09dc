"""`ddpm-hf push`."""

import sys
from pathlib import Path

from ddpm_hf.commands.options import command_parser

HELP = "share a model folder on the Hub, in one commit, private unless --public"
NOT_PUSHED = 3


def run(argv: list[str]) -> int:
    """Push as `argv` says; 0, or NOT_PUSHED if the Hub did not take it."""
    parser = command_parser("push", HELP)
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
        return NOT_PUSHED
    return 0

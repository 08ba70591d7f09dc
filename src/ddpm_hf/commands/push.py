"""`ddpm-hf push`."""

import sys

from ddpm_hf.commands.messages import command_options
from ddpm_hf.hub.options import PushOptions
from ddpm_hf.paths import ModelPaths, not_a_model
from ddpm_hf.utils.connection import HubError
from ddpm_hf.utils.text import close_paths

HELP = "share a model folder on the Hub, in one commit, private unless --public"
DESCRIPTION = """
share a model folder on the Hub

  ddpm-hf push runs/photos/model YOU/photos --dry-run     only list the files
  ddpm-hf push runs/photos/model YOU/photos               one commit to a private repository
  ddpm-hf push runs/photos/model YOU/photos --public      visible to everyone
  ddpm-hf push runs/photos/model YOU/photos --space YOU/photos-page
                                                          also a page to play with the model

Log in first (`hf auth login`, or a token in HF_TOKEN). The commit contains the model: weights,
configurations, the card with its pictures, and the record of the training. Checkpoints for
resuming, data and other files in the folder are not uploaded.
"""
NOT_PUSHED = 3


def run(argv: list[str]) -> int:
    """Push a model; the exit status is NOT_PUSHED if the Hub did not accept it."""
    usage = "FOLDER USER/REPO [--option ...]"
    with command_options(PushOptions, argv, "push", usage, DESCRIPTION) as options:
        if not options.folder.is_dir():
            raise ValueError(f"{options.folder} is not a folder{close_paths(str(options.folder))}")
        if not ModelPaths(options.folder).index.is_file():
            raise ValueError(not_a_model(options.folder, f"{options.folder}"))
        from ddpm_hf.hub.push import push

        try:
            print(push(**options.keywords()))
        except HubError as error:
            print(f"ddpm-hf: not pushed: {error}", file=sys.stderr)
            return NOT_PUSHED
    return 0

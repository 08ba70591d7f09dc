"""Options of pushing a model."""

from dataclasses import dataclass
from pathlib import Path

from ddpm_hf.options import REQUIRED, Options, option


@dataclass(frozen=True, kw_only=True)
class PushOptions(Options):
    """Options of `ddpm-hf push`."""

    folder: Path = option(
        REQUIRED,
        "folder of a model, such as runs/photos/model",
        metavar="FOLDER",
        is_path=True,
        is_positional=True,
    )
    repo_id: str = option(
        REQUIRED, "repository, created if missing", metavar="USER/REPO", is_positional=True
    )
    public: bool = option(False, "make a new repository public (default: private)")
    revision: str | None = option(None, "branch to push to (default: main)", metavar="BRANCH")
    create_pr: bool = option(False, "open a pull request instead of a commit")
    license: str | None = option(None, "licence for the card, such as apache-2.0")
    space: str | None = option(
        None,
        "also create or update a Space with the page of `ddpm-hf app` for this model; a new one is"
        " private unless `public` (needs the extra `app`)",
        metavar="USER/NAME",
    )
    dry_run: bool = option(False, "list the files and print the card, without a connection")

"""Pushing a checkpoint to the Hub: files of a fixed list and nothing else, in a single commit."""

import json
import os
import shlex
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import RepositoryNotFoundError

from ddpm_hf.diffusion.atomic_files import read_json
from ddpm_hf.diffusion.config_extension import GAUSSIAN_SCHEDULER
from ddpm_hf.diffusion.portable_checkpoint import commit
from ddpm_hf.hub.card import card_to_share, check_metadata
from ddpm_hf.hub.card_merge import Merged
from ddpm_hf.hub.load import check_repo_id, refuse_links, scheduler_class
from ddpm_hf.hub.retry import TOKEN_HELP, WAITS_S, HubError, retry, shorten
from ddpm_hf.hub.secrets import find_leak
from ddpm_hf.text import counted

__all__ = ["HubError", "PushResult", "push", "push_command"]

UNET_CONFIG, SCHEDULER_CONFIG = "unet/config.json", "scheduler/scheduler_config.json"

# All that is ever uploaded, as glob patterns in a checkpoint's folder. The first group is replaced
# as a whole: a weight file or a code folder that a push no longer brings is deleted on the Hub.
REPLACED = (
    "unet/diffusion_pytorch_model*.safetensors",
    "unet/diffusion_pytorch_model*.json",
    "ddpm_hf_*/*.py",
)
SHARED = (
    *REPLACED,
    *("model_index.json", UNET_CONFIG, SCHEDULER_CONFIG, "pipeline.py"),
    *("README.md", "LICENSE*", "training.json", "recipe.yaml", "metrics.jsonl", "*.png"),
)


# ----------------------------------------------------------------------------------------------
# What is shared


def prepare(folder: Path, repo_id: str) -> dict[str, Path | bytes]:
    """What to upload besides the card, by path there, after all checks that need no connection.

    Raises:
        ValueError: if the folder is not a checkpoint, is incomplete, damaged or not finite, holds
            links, or would give away a secret or a local path.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    if scheduler_class(folder, str(folder)) == GAUSSIAN_SCHEDULER:
        raise ValueError(
            f"{folder} was saved by a stock pipeline, so that nobody without ddpm_hf could load it;"
            " ddpm_hf.load(...).save_pretrained(...) writes the form for everyone"
        )
    files: dict[str, Path | bytes] = {
        path.relative_to(folder).as_posix(): path for path in shared_files(folder)
    }
    _check_weights(folder, list(files))
    files.pop("README.md", None)
    _checked_card(folder, repo_id)
    for name in (UNET_CONFIG, SCHEDULER_CONFIG):
        config = read_json(folder / name)
        if config.pop("_name_or_path", None):  # where diffusers had loaded it from
            files[name] = (json.dumps(config, indent=2) + "\n").encode()
    for name, data in files.items():
        _refuse_leaks(name, data)
    return files


def _checked_card(
    folder: Path, repo_id: str, remote: str | None = None, license: str | None = None
) -> Merged:
    """The README.md to upload, checked; merged with the one on the Hub, if that is given."""
    card = card_to_share(folder, repo_id, remote, license)
    if not card.is_theirs:  # what is on the Hub already is no leak of this push
        _refuse_leaks("README.md", card.text.encode())
        check_metadata(card.text)
    return card


def shared_files(folder: Path) -> list[Path]:
    """The files of a checkpoint that may be uploaded; ValueError if one is a link."""
    found = {path for pattern in SHARED for path in folder.glob(pattern) if path.is_file()}
    refuse_links(folder, found)
    return sorted(found)


def _check_weights(folder: Path, names: list[str]) -> None:
    from safetensors import SafetensorError, safe_open

    weights = [name for name in names if name.endswith(".safetensors")]
    for needed in (UNET_CONFIG, SCHEDULER_CONFIG):
        if needed not in names:
            raise ValueError(f"{folder} is not a complete checkpoint: no {needed}")
    if not weights:
        raise ValueError(f"{folder} has no safetensors weights; save_pretrained(...) writes them")
    for name in weights:
        try:
            with safe_open(folder / name, framework="pt") as file:
                tensors = {key: bool(file.get_tensor(key).isfinite().all()) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is damaged: {error}") from error
        if broken := [key for key, finite in tensors.items() if not finite]:
            raise ValueError(f"weight {broken[0]} in {folder / name} is not finite")


def _refuse_leaks(name: str, data: Path | bytes) -> None:
    if name.endswith((".safetensors", ".png")):
        return
    text = (data if isinstance(data, bytes) else data.read_bytes()).decode(errors="replace")
    if leak := find_leak(text, paths=not name.endswith(".py")):
        raise ValueError(f"{name} holds {leak}: take it out before sharing")


# ----------------------------------------------------------------------------------------------
# Pushing


@dataclass(frozen=True)
class PushResult:
    """What a push did, or in a dry run would do; `str()` of it is what a person wants to read.

    Attributes:
        repo_id: "user/name".
        files: bytes per path in the repository.
        card: README.md as it is uploaded.
        url: of the commit or pull request, None in a dry run.
        private: whether the repository is, None in a dry run.
        card_kept: whether a person's edits of the card on the Hub were kept.
    """

    repo_id: str
    files: dict[str, int]
    card: str
    url: str | None = None
    private: bool | None = None
    card_kept: bool = False

    def __str__(self) -> str:
        if self.url is None:
            lines = [f"{size:>13,}  {path}" for path, size in sorted(self.files.items())]
            total = f"{sum(self.files.values()):>13,}  bytes in {counted(len(self.files), 'file')}"
            listing = [f"Would upload to {self.repo_id}:", *lines, total]
            return "\n".join([*listing, "", "With this card, unless there is one:", "", self.card])
        note = "; the card there has a person's edits, which were kept" if self.card_kept else ""
        return f"Pushed to {self.url} ({'private' if self.private else 'public'}{note})"


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    public: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    token: str | None = None,
    commit_message: str = "Upload checkpoint",
    license: str | None = None,
    waits_s: Sequence[float] = WAITS_S,
) -> PushResult:
    """Upload a checkpoint to the Hub in one commit, with a model card.

    Only files that match `SHARED` leave the machine. Doing it again changes nothing. What a person
    wrote in the card on the Hub stays; the generated parts of it are renewed.

    Args:
        folder: a checkpoint as `save_pretrained` or the trainer wrote it.
        repo_id: "user/name"; made if it is missing.
        public: make a new repository public. One that exists stays what it is.
        revision: branch to commit to, made if it is missing; the default branch if None.
        create_pr: open a pull request instead; the repository must exist.
        dry_run: check and list only, without any connection.
        token: by default that of `hf auth login` or HF_TOKEN.
        commit_message: title of the commit.
        license: for the card: an identifier of the Hub, such as "apache-2.0".
        waits_s: seconds before each further attempt after a failure that may pass.
    Raises:
        ValueError: if the folder is not a checkpoint, is not finite or would leak a secret or a
            local path, if the name is bad, or if the token is missing or may not write there.
        HubError: if the Hub still failed at the last attempt.
    """
    check_repo_id(repo_id)
    folder = Path(folder).expanduser()
    files = prepare(folder, repo_id)
    if dry_run:
        card = _checked_card(folder, repo_id, license=license)
        return PushResult(repo_id, _sizes(files, card.text), card.text)
    target = Target(repo_id, public, revision, create_pr, token, tuple(waits_s), license=license)
    target.check_access()
    return target.upload(folder, files, commit_message)


def push_command(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    public: bool = False,
    revision: str | None = None,
) -> str:
    """The command line that pushes `folder` by hand."""
    options = ["--public"] * public + (["--revision", revision] if revision else [])
    return shlex.join(["ddpm-hf", "push", os.fspath(folder), repo_id, *options])


def _sizes(files: dict[str, Path | bytes], card: str) -> dict[str, int]:
    contents = {**files, "README.md": card.encode(errors="surrogateescape")}
    return {
        name: len(data) if isinstance(data, bytes) else data.stat().st_size
        for name, data in contents.items()
    }


@dataclass(frozen=True)
class Target:
    """Where to push, and how patiently; arguments as for `push`."""

    repo_id: str
    public: bool
    revision: str | None
    create_pr: bool
    token: str | None
    waits_s: tuple[float, ...]
    stop: threading.Event | None = None
    license: str | None = None

    @property
    def api(self) -> HfApi:
        """The client, with our token."""
        return HfApi(token=self.token, library_name="ddpm_hf")

    def check_access(self) -> None:
        """Make the repository where it is missing, and prove the right to write to it."""
        if not (self.token or get_token()):
            raise ValueError(f"pushing to {self.repo_id} needs a token: {TOKEN_HELP}")
        retry(self._check_access, self.repo_id, self.waits_s, stop=self.stop)

    def _check_access(self) -> None:
        try:
            present = self.api.list_repo_files(self.repo_id)
        except RepositoryNotFoundError:
            if self.create_pr:
                raise
            self._create()
        else:
            _refuse_other_model(self.repo_id, present)
        # The Hub tells who may write only when somebody tries: this asks how a file would go up.
        probe = [CommitOperationAdd("README.md", b"probe")]
        self.api.preupload_lfs_files(self.repo_id, probe, create_pr=self.create_pr)
        if self.revision and not self.create_pr and not self.revision.startswith("refs/"):
            self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)

    def _create(self) -> None:
        for kind in ("dataset", "space"):
            if self.api.repo_exists(self.repo_id, repo_type=kind):
                raise ValueError(f"{self.repo_id} is a {kind} on the Hub: choose another name")
        self.api.create_repo(self.repo_id, private=not self.public, exist_ok=True)

    def upload(
        self, folder: Path, files: dict[str, Path | bytes], commit_message: str
    ) -> PushResult:
        """Commit `files` and the card of `folder`; the repository must exist."""
        return retry(
            lambda: self._commit(folder, files, commit_message),
            self.repo_id,
            self.waits_s,
            stop=self.stop,
            repeat_unanswered=not self.create_pr,  # it might open a second pull request
        )

    def _commit(
        self, folder: Path, files: dict[str, Path | bytes], commit_message: str
    ) -> PushResult:
        card = Merged("")

        def write(remote: str | None) -> str:
            nonlocal card
            card = _checked_card(folder, self.repo_id, remote, self.license)
            return card.text

        made, head = commit(
            self.api,
            self.repo_id,
            files,
            lambda name: any(fnmatchcase(name, pattern) for pattern in REPLACED),
            write,
            commit_message=commit_message,
            revision=self.revision,
            create_pr=self.create_pr,
        )
        sizes = _sizes(files, card.text)
        url = made.pr_url or str(made.commit_url)
        return PushResult(
            self.repo_id, sizes, card.text, url, head.private, card_kept=card.is_theirs
        )


def _refuse_other_model(repo_id: str, present: list[str]) -> None:
    """Refuse a repository with another kind of model in it; one with only texts is free."""
    rest = [name for name in present if not name.startswith((".git", "README", "LICENSE"))]
    if rest and "model_index.json" not in rest:
        listing = shorten(", ".join(sorted(rest)), 100)
        raise ValueError(f"{repo_id} holds something else ({listing}): choose another name")

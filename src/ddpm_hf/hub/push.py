"""Upload of a checkpoint to the Hub in one commit."""

import os
import shlex
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelInfo, get_token
from huggingface_hub.errors import RepositoryNotFoundError

from ddpm_hf.diffusion.atomic_files import read_json
from ddpm_hf.diffusion.portable_checkpoint import commit
from ddpm_hf.hub.download import check_repo_id
from ddpm_hf.hub.model_files import PIPELINES
from ddpm_hf.hub.published_files import REPLACED_FILES, Files, checked_card, prepare
from ddpm_hf.hub.retry import TOKEN_HELP, WAITS_S, retry, shorten
from ddpm_hf.hub.space import check_gradio, push_space
from ddpm_hf.utils.connection import check_connection
from ddpm_hf.utils.text import counted


@dataclass(frozen=True)
class PushResult:
    """Result of a push or of a dry run; `str` describes it.

    Attributes:
        repo_id: "user/name".
        files: size in bytes, by path in the repository.
        card: the uploaded README.md.
        url: of the commit or pull request; None in a dry run.
        private: whether the repository is private; None in a dry run.
        is_new: whether a commit was made; False if the repository had the same files.
        card_kept: whether the card on the Hub differed from the local one, and its text was kept.
        space_url: of the Space, if one was pushed.
    """

    repo_id: str
    files: dict[str, int]
    card: str
    url: str | None = None
    private: bool | None = None
    is_new: bool = True
    card_kept: bool = False
    space_url: str | None = None

    def __str__(self) -> str:
        if self.url is None:
            lines = [f"{size:>13,}  {path}" for path, size in sorted(self.files.items())]
            total = f"{sum(self.files.values()):>13,}  bytes in {counted(len(self.files), 'file')}"
            listing = [f"Would upload to {self.repo_id}:", *lines, total]
            title = "Model card, if there is none on the Hub:"
            return "\n".join([*listing, "", title, "", self.card])
        kept = "; the text of the card on the Hub was kept, edit it there" if self.card_kept else ""
        done = "Pushed to" if self.is_new else "No changes since"
        pushed = f"{done} {self.url} ({'private' if self.private else 'public'}{kept})"
        return pushed if self.space_url is None else f"{pushed}\nSpace: {self.space_url}"


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
    space: str | None = None,
    waits_s: Sequence[float] = WAITS_S,
) -> PushResult:
    """Upload a checkpoint and its model card to the Hub in one commit.

    Uploads only the files of `published_files.PUBLISHED_FILES`. A second push without changes makes
    no commit. If the Hub has a card, only its generated sections and metadata are updated.

    Args:
        folder: a checkpoint written by `save_pretrained` or by the trainer.
        repo_id: "user/name"; created if it does not exist.
        public: make a new repository public. Does not change an existing one.
        revision: branch, created if it does not exist; None for the default branch.
        create_pr: open a pull request; the repository must exist.
        dry_run: check and list the files without a connection.
        token: by default that of `hf auth login` or HF_TOKEN.
        commit_message: title of the commit.
        license: licence in the card: an identifier of the Hub, such as "apache-2.0".
        space: name of a Space, "user/name", to create or update: the page of `ddpm-hf app` for this
            model. The card links it. Needs the extra `app`.
        waits_s: seconds before each retry.
    Raises:
        ValueError: if the checkpoint is invalid or contains a secret or a local path, the name is
            invalid, the repository contains another kind of model, or the token is missing or may
            not write to the repository.
        HubError: if the Hub fails after all retries.
    """
    check_repo_id(repo_id)
    if space is not None:
        check_repo_id(space)
        check_gradio()
    folder = Path(folder).expanduser()
    files = prepare(folder, repo_id)
    if dry_run:
        card = checked_card(folder, repo_id, license=license, space=space)
        return PushResult(repo_id, _sizes(files, card.text), card.text)
    target = Target(
        repo_id, public, revision, create_pr, token, tuple(waits_s), license=license, space=space
    )
    target.check_access()
    result = target.upload(folder, files, commit_message)
    if space is None:
        return result
    url = push_space(space, repo_id, public=public, token=token, waits_s=waits_s)
    return replace(result, space_url=url)


def push_command(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    public: bool = False,
    revision: str | None = None,
) -> str:
    """The command that pushes `folder`."""
    options = ["--public"] * public + (["--revision", revision] if revision else [])
    return shlex.join(["ddpm-hf", "push", os.fspath(folder), repo_id, *options])


def _sizes(files: Files, card: str) -> dict[str, int]:
    contents = {**files, "README.md": card.encode(errors="surrogateescape")}
    return {
        name: len(content) if isinstance(content, bytes) else content.stat().st_size
        for name, content in contents.items()
    }


@dataclass(frozen=True)
class Target:
    """A repository to push to, and the retries; see `push`. `stop` ends the retries."""

    repo_id: str
    public: bool
    revision: str | None
    create_pr: bool
    token: str | None
    waits_s: tuple[float, ...]
    stop: threading.Event | None = None
    license: str | None = None
    space: str | None = None

    @property
    def api(self) -> HfApi:
        """Client with the token."""
        return HfApi(token=self.token, library_name="ddpm_hf")

    def check_access(self) -> None:
        """Create the repository if it does not exist, and check the right to write to it."""
        if not (self.token or get_token()):
            raise ValueError(f"pushing to {self.repo_id} needs a token: {TOKEN_HELP}")
        check_connection(self.repo_id)
        retry(self._check_access, self.repo_id, self.waits_s, stop=self.stop)

    def _check_access(self) -> None:
        try:
            head = self.api.model_info(self.repo_id)
        except RepositoryNotFoundError:
            if self.create_pr:
                raise
            self._create()
        else:
            self._refuse_other_model(head)
        # The Hub has no query for the right to write; asking how to upload a file requires it.
        probe = [CommitOperationAdd("README.md", b"probe")]
        self.api.preupload_lfs_files(self.repo_id, probe, create_pr=self.create_pr)
        if self.revision and not self.create_pr and not self.revision.startswith("refs/"):
            self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)

    def _refuse_other_model(self, head: ModelInfo) -> None:
        """Raise ValueError if the repository contains another kind of model."""
        names = sorted(file.rfilename for file in head.siblings or [])
        others = [name for name in names if not name.startswith((".git", "README", "LICENSE"))]
        if not others:
            return
        if "model_index.json" not in others:
            listing = shorten(", ".join(others), 100)
            raise ValueError(
                f"{self.repo_id} contains other files ({listing}): choose another name"
            )
        path = self.api.hf_hub_download(self.repo_id, "model_index.json", revision=head.sha)
        kind = read_json(Path(path)).get("_class_name")
        if kind not in PIPELINES:
            raise ValueError(f"{self.repo_id} contains a {kind!s:.100}: choose another name")

    def _create(self) -> None:
        for kind in ("dataset", "space"):
            if self.api.repo_exists(self.repo_id, repo_type=kind):
                raise ValueError(f"{self.repo_id} is a {kind} on the Hub: choose another name")
        self.api.create_repo(self.repo_id, private=not self.public, exist_ok=True)

    def upload(self, folder: Path, files: Files, commit_message: str) -> PushResult:
        """Commit `files` and the card of `folder`; the repository must exist."""
        return retry(
            lambda: self._commit(folder, files, commit_message),
            self.repo_id,
            self.waits_s,
            stop=self.stop,
            repeat_unanswered=not self.create_pr,  # it could open a second pull request
        )

    def _commit(self, folder: Path, files: Files, commit_message: str) -> PushResult:
        cards = []

        def card_text(remote: str | None) -> str:
            cards.append(checked_card(folder, self.repo_id, remote, self.license, self.space))
            return cards[-1].text

        new_commit, head = commit(
            self.api,
            self.repo_id,
            files,
            lambda name: any(fnmatchcase(name, pattern) for pattern in REPLACED_FILES),
            card_text,
            commit_message=commit_message,
            revision=self.revision,
            create_pr=self.create_pr,
        )
        card = cards[-1]
        sizes, url = _sizes(files, card.text), new_commit.pr_url or str(new_commit.commit_url)
        return PushResult(
            self.repo_id,
            sizes,
            card.text,
            url,
            head.private,
            is_new=bool(new_commit.pr_url) or new_commit.oid != head.sha,
            card_kept=card.is_from_hub,
        )

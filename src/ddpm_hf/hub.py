"""Sharing checkpoints: load one from the Hub or a folder, push one in a single commit.

All traffic is huggingface_hub's. A push sends files of a fixed list and nothing else.
"""

import json
import os
import shlex
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
    snapshot_download,
)
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ddpm_hf import model_card
from ddpm_hf.hub_retry import TOKEN_HELP, WAITS_S, HubError, retry, shorten

if TYPE_CHECKING:
    import torch
    from diffusers import UNet2DModel

    from ddpm_hf.pipeline_ddpm_hf import GaussianDDPMPipeline

__all__ = [
    "HubError",
    "PushResult",
    "fetch",
    "load",
    "open_pipeline",
    "open_unet",
    "push",
    "push_command",
]

PIPELINES = ("DDPMPipeline", "DDIMPipeline", "GaussianDDPMPipeline")
OUR_SCHEDULER = ["ddpm_hf.scheduling_ddpm_hf", "GaussianDDPMScheduler"]
UNET_CONFIG, SCHEDULER_CONFIG = "unet/config.json", "scheduler/scheduler_config.json"

# All that is ever uploaded, as glob patterns in a checkpoint's folder. The first group is replaced
# as a whole: a weight file or a code folder that a push no longer brings is deleted on the Hub.
REPLACED = (
    "unet/diffusion_pytorch_model*.safetensors",
    "unet/diffusion_pytorch_model*.json",
    "ddpm_hf_*/*_ddpm_hf.py",
)
SHARED = (
    *REPLACED,
    *("model_index.json", UNET_CONFIG, SCHEDULER_CONFIG, "pipeline.py"),
    *("README.md", "LICENSE*", "training.json", "recipe.yaml", "metrics.jsonl", "*.png"),
)


# ----------------------------------------------------------------------------------------------
# Loading


def load(
    repo_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    dtype: "torch.dtype | None" = None,
    use_safetensors: bool = True,
) -> "GaussianDDPMPipeline":
    """A pipeline from the Hub or from a folder: ours, or any other `DDPMPipeline`'s.

    Never runs code from the repository. Offline it loads what an earlier call left in the cache.

    Args:
        repo_or_path: a folder, or "user/name" on the Hub.
        revision: branch, tag or commit on the Hub.
        token: for a private repository; by default that of `hf auth login` or HF_TOKEN.
        dtype: of the weights; torch.float32 by default, whatever they were saved in.
        use_safetensors: False opens weights in pickled `.bin` files, which could carry code.
    Raises:
        ValueError: if there is no such checkpoint or revision, the token may not read it, it is of
            another kind, or its weights are incomplete or not finite.
        HubError: if the Hub fails and the cache has no copy.
    """
    name = os.fspath(repo_or_path)
    folder = fetch(name, revision=revision, token=token, use_safetensors=use_safetensors)
    return open_pipeline(folder, name, dtype=dtype, use_safetensors=use_safetensors)


def fetch(
    name: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    use_safetensors: bool = True,
) -> Path:
    """The folder of a checkpoint: the one of that name, or the cache's copy of a repository.

    Raises:
        ValueError: if there is neither, or the folder holds links to other places.
        HubError: if the Hub fails and the cache has no copy.
    """
    patterns, folder = _loaded_files(use_safetensors), Path(name)
    if name and folder.is_dir():
        _refuse_links(folder, (path for pattern in patterns for path in folder.glob(pattern)))
        return folder
    if folder.is_file():
        raise ValueError(f"{name} is a file: give the folder of the checkpoint")
    check_repo_id(name, may_be_folder=True)

    def download() -> str:
        return snapshot_download(name, revision=revision, token=token, allow_patterns=patterns)

    return Path(retry(download, name, WAITS_S))


def _loaded_files(use_safetensors: bool) -> list[str]:
    """The files that a pipeline is made of: no code, and no pickles unless asked."""
    names = ["*config.json", "diffusion_pytorch_model*.json"]
    names.append("diffusion_pytorch_model*." + ("safetensors" if use_safetensors else "bin"))
    folders = ("", "unet/", "scheduler/")  # early repositories are flat
    return ["model_index.json", *(folder + name for folder in folders for name in names)]


def _scheduler_class(folder: Path, name: str) -> str:
    """The scheduler's class; ValueError unless the index is of a pipeline of our kind.

    All parts must be of diffusers, but for our scheduler, which a stock `DDPMPipeline` that was
    given one saves under its own name.
    """
    index = model_card.read_json(folder / "model_index.json")
    if not index:
        inner = folder / "model"
        hint = f"; did you mean {inner}?" if (inner / "model_index.json").is_file() else ""
        raise ValueError(f"{name} is not a checkpoint of a pipeline: no model_index.json{hint}")
    kind, parts = index.get("_class_name"), {k: v for k, v in index.items() if k[0] != "_"}
    known = [["diffusers", *part[1:]] for part in parts.values() if isinstance(part, list)]
    if parts.get("scheduler") == OUR_SCHEDULER:
        parts["scheduler"] = ["diffusers", OUR_SCHEDULER[1]]
    if isinstance(kind, list) or list(parts.values()) != known:
        raise ValueError(
            f"{name} needs code of its own, which is never run here: read it, then use "
            "DiffusionPipeline.from_pretrained(..., trust_remote_code=True)"
        )
    if kind not in PIPELINES or parts.get("unet") != ["diffusers", "UNet2DModel"]:
        raise ValueError(f"{name} holds a {kind}; only {PIPELINES} with a UNet2DModel work here")
    return str(parts.get("scheduler", [None, None])[-1])


def open_pipeline(
    folder: Path, name: str, *, dtype: "torch.dtype | None" = None, use_safetensors: bool = True
) -> "GaussianDDPMPipeline":
    """The pipeline in a folder that `fetch` gave.

    Args:
        folder: holds the checkpoint.
        name: what errors call it.
        dtype, use_safetensors: as for `load`.
    Raises:
        ValueError: if it cannot be opened, or its weights are incomplete or not finite.
    """
    import diffusers

    from ddpm_hf.pipeline_ddpm_hf import GaussianDDPMPipeline, image_facts
    from ddpm_hf.scheduling_ddpm_hf import GaussianDDPMScheduler

    with _one_line_about(name):
        kind = _scheduler_class(folder, name)
        ours = kind in ("DDPMScheduler", OUR_SCHEDULER[1])
        if not ours and kind not in GaussianDDPMScheduler._compatibles:
            raise ValueError(f"{name} has a {kind}, which does not sample DDPMs")
        scheduler = GaussianDDPMScheduler if ours else getattr(diffusers, kind)
        unet = open_unet(_part(folder, "unet"), name, dtype=dtype, use_safetensors=use_safetensors)
        image_facts(unet)
        return GaussianDDPMPipeline(unet, scheduler.from_pretrained(_part(folder, "scheduler")))


def _part(folder: Path, name: str) -> Path:
    """Where a part of a pipeline lies: early repositories are flat."""
    return folder / name if (folder / name).is_dir() else folder


def open_unet(
    folder: Path, name: str, *, dtype: "torch.dtype | None" = None, use_safetensors: bool = True
) -> "UNet2DModel":
    """The network whose configuration and weights lie in a folder; arguments and errors as above.

    Raises:
        ValueError: if it cannot be opened, or its weights are incomplete or not finite.
    """
    from diffusers import UNet2DModel

    from ddpm_hf.portable_ddpm_hf import check_finite

    if use_safetensors and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{name} has no safetensors weights. Old repositories hold them in pickled .bin files, "
            "a format that can carry code; if you trust the author, load it once with "
            "use_safetensors=False and save_pretrained() it: that writes safetensors"
        )
    with _one_line_about(name):
        # Where a file lacks weights, diffusers makes up random ones and only logs it.
        unet, report = UNet2DModel.from_pretrained(
            folder, dtype=dtype, use_safetensors=use_safetensors, output_loading_info=True
        )
    if wrong := {kind: keys for kind, keys in report.items() if keys}:
        raise ValueError(f"the weights of {name} do not fit its config.json: {shorten(str(wrong))}")
    check_finite(unet.state_dict(), name)
    return unet


@contextmanager
def _one_line_about(name: str) -> Iterator[None]:
    """Whatever the libraries raise about a damaged or foreign checkpoint, as one ValueError."""
    try:
        yield
    except ValueError:
        raise
    except (OSError, TypeError, AttributeError, LookupError, NotImplementedError) as error:
        raise ValueError(f"{name} cannot be opened: {shorten(str(error))}") from error


def check_repo_id(repo_id: str, *, may_be_folder: bool = False) -> None:
    """Raise ValueError unless it can be the name of a repository; to push, with its owner."""
    wrong = "neither a folder here nor" if may_be_folder else "not"
    try:
        validate_repo_id(repo_id)
        if may_be_folder or "/" in repo_id:
            return
    except HFValidationError:
        pass
    raise ValueError(f"{repo_id!r} is {wrong} a name on the Hub (user/name)")


# ----------------------------------------------------------------------------------------------
# What is shared


def prepare(folder: Path, repo_id: str) -> dict[str, Path | bytes]:
    """What to upload, by path in the repository, after all checks that need no connection.

    Raises:
        ValueError: if the folder is not a checkpoint, is incomplete, damaged or not finite, holds
            links, or would give away a secret or a local path.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    if _scheduler_class(folder, str(folder)) == OUR_SCHEDULER[1]:
        raise ValueError(
            f"{folder} was saved by a stock pipeline, so that nobody without ddpm_hf could load it;"
            " ddpm_hf.load(...).save_pretrained(...) writes the form for everyone"
        )
    files: dict[str, Path | bytes] = {
        path.relative_to(folder).as_posix(): path for path in shared_files(folder)
    }
    _check_weights(folder, list(files))
    files["README.md"] = model_card.card_to_share(folder, repo_id).encode()
    for name in (UNET_CONFIG, SCHEDULER_CONFIG):
        config = model_card.read_json(folder / name)
        if config.pop("_name_or_path", None):  # where diffusers had loaded it from
            files[name] = (json.dumps(config, indent=2) + "\n").encode()
    for name, data in files.items():
        _refuse_leaks(name, data)
    model_card.check_metadata(bytes(files["README.md"]).decode())
    return files


def shared_files(folder: Path) -> list[Path]:
    """The files of a checkpoint that may be uploaded; ValueError if one is a link."""
    found = {path for pattern in SHARED for path in folder.glob(pattern) if path.is_file()}
    _refuse_links(folder, found)
    return sorted(found)


def _refuse_links(folder: Path, paths: Iterable[Path]) -> None:
    """Refuse links, except those of huggingface_hub's cache, where every file is one."""
    root = folder.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else None
    for path in paths:
        real = path.resolve()
        if real != root / path.relative_to(folder) and real.parent != blobs:
            raise ValueError(f"{path} is a link to another place: put the file itself there")


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
    if leak := model_card.find_leak(text, paths=not name.endswith(".py")):
        raise ValueError(f"{name} holds {leak}: take it out before sharing")


# ----------------------------------------------------------------------------------------------
# Pushing


@dataclass(frozen=True)
class PushResult:
    """What a push did, or in a dry run would do; `str()` of it is what a person wants to read.

    Attributes:
        repo_id: "user/name".
        files: bytes per path in the repository.
        url: of the commit or pull request, None in a dry run.
        private: whether the repository is, None in a dry run.
        card_kept: whether a card with a person's edits was left as it is on the Hub.
    """

    repo_id: str
    files: dict[str, int]
    url: str | None = None
    private: bool | None = None
    card_kept: bool = False

    def __str__(self) -> str:
        if self.url is None:
            lines = [f"{size:>13,}  {path}" for path, size in sorted(self.files.items())]
            total = f"{sum(self.files.values()):>13,}  bytes in {len(self.files)} files"
            return "\n".join([f"Would upload to {self.repo_id}:", *lines, total])
        note = "; the card there has a person's edits and was kept" if self.card_kept else ""
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
    waits_s: Sequence[float] = WAITS_S,
) -> PushResult:
    """Upload a checkpoint to the Hub in one commit, with a model card.

    Only files that match `SHARED` leave the machine. Doing it again changes nothing. A card that a
    person edited on the Hub is never replaced.

    Args:
        folder: a checkpoint as `save_pretrained` or the trainer wrote it.
        repo_id: "user/name"; made if it is missing.
        public: make a new repository public. One that exists stays what it is.
        revision: branch to commit to, made if it is missing; the default branch if None.
        create_pr: open a pull request instead; the repository must exist.
        dry_run: check and list only, without any connection.
        token: by default that of `hf auth login` or HF_TOKEN.
        commit_message: title of the commit.
        waits_s: seconds before each further attempt after a failure that may pass.
    Raises:
        ValueError: if the folder is not a checkpoint, is not finite or would leak a secret or a
            local path, if the name is bad, or if the token is missing or may not write there.
        HubError: if the Hub still failed at the last attempt.
    """
    check_repo_id(repo_id)
    files = prepare(Path(folder), repo_id)
    if dry_run:
        return PushResult(repo_id, {name: _size(data) for name, data in files.items()})
    target = Target(repo_id, public, revision, create_pr, token, tuple(waits_s))
    target.claim()
    return target.upload(files, commit_message)


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


def _size(data: Path | bytes) -> int:
    return len(data) if isinstance(data, bytes) else data.stat().st_size


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

    @property
    def api(self) -> HfApi:
        """The client, with our token."""
        return HfApi(token=self.token, library_name="ddpm_hf")

    def claim(self) -> None:
        """Make the repository where it is missing, and prove the right to write to it."""
        if not (self.token or get_token()):
            raise ValueError(f"pushing to {self.repo_id} needs a token: {TOKEN_HELP}")
        retry(self._claim, self.repo_id, self.waits_s, stop=self.stop)

    def _claim(self) -> None:
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

    def upload(self, files: dict[str, Path | bytes], commit_message: str) -> PushResult:
        """Commit `files`; the repository must exist."""
        return retry(
            lambda: self._commit(files, commit_message),
            self.repo_id,
            self.waits_s,
            stop=self.stop,
            repeat_unanswered=not self.create_pr,  # it might open a second pull request
        )

    def _commit(self, files: dict[str, Path | bytes], commit_message: str) -> PushResult:
        """One attempt upon the head as it is now; a commit by someone else in between fails it."""
        info = self.api.model_info(self.repo_id, revision=self.revision)
        present = {file.rfilename for file in info.siblings or []}
        card = self._card_at(info.sha) if "README.md" in present else None
        keep = not model_card.may_replace(card, bytes(files["README.md"]).decode())
        stale = [
            CommitOperationDelete(name)
            for name in sorted(present - set(files))
            if any(fnmatchcase(name, pattern) for pattern in REPLACED)
        ]
        added = [
            CommitOperationAdd(name, data)
            for name, data in sorted(files.items())
            if not (keep and name == "README.md")
        ]
        # Not upload_folder: with Xet it commits in batches, and a reader would find half a model.
        made = self.api.create_commit(
            self.repo_id,
            [*added, *stale],
            commit_message=commit_message,
            revision=self.revision,
            create_pr=self.create_pr,
            parent_commit=info.sha,
        )
        sizes = {name: _size(data) for name, data in files.items()}
        url = made.pr_url or str(made.commit_url)
        return PushResult(self.repo_id, sizes, url, info.private, card_kept=keep)

    def _card_at(self, commit: str | None) -> str:
        path = self.api.hf_hub_download(self.repo_id, "README.md", revision=commit)
        return Path(path).read_bytes().decode(errors="replace")


def _refuse_other_model(repo_id: str, present: list[str]) -> None:
    """Refuse a repository with another kind of model in it; one with only texts is free."""
    rest = [name for name in present if not name.startswith((".git", "README", "LICENSE"))]
    if rest and "model_index.json" not in rest:
        listing = shorten(", ".join(sorted(rest)), 100)
        raise ValueError(f"{repo_id} holds something else ({listing}): choose another name")

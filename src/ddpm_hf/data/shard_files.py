"""Where the shards of a stream are: folders, globs, URLs, the Hub, and streaming datasets."""

import glob
import re
from dataclasses import dataclass
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import datasets
from huggingface_hub import HfFileSystem, hf_hub_url

from ddpm_hf.data.errors import DataError
from ddpm_hf.data.hub_datasets import hub_dataset
from ddpm_hf.data.remote_files import is_url
from ddpm_hf.data.splits import split_by_name, unknown_split

_SUFFIXES = (".parquet", ".tar")
_PASS_FILES = (
    "pass load_dataset(..., streaming=True) without map, filter, shuffle and similar methods, "
    "because training reads the files of its shards in an order of its own; write other rows to "
    "parquet files, and name those in the option `dataset`, with `streaming`"
)


@dataclass(frozen=True)
class ShardFiles:
    """The files of a stream.

    Attributes:
        locations: paths or URLs, all of .parquet or all of .tar files.
        revision: commit of a dataset of the Hub; None for other files.
    """

    locations: tuple[str, ...]
    revision: str | None = None

    def __post_init__(self) -> None:
        kinds = {PurePosixPath(location).suffix for location in self.locations}
        if kinds not in ({".parquet"}, {".tar"}):
            found = ", ".join(sorted(kind or "no suffix" for kind in kinds)) or "no files"
            raise DataError(f"a stream needs .parquet or .tar files, got {found}")


def find_shards(
    source: str, config_name: str | None = None, split: str = "train", revision: str | None = None
) -> ShardFiles:
    """The shards of a dataset, sorted by name.

    Args:
        source: a folder or a glob of .parquet or .tar files, a URL with `{000..123}` for a range of
            numbers, or a dataset of the Hub that consists of such files.
        config_name, revision: of a dataset of the Hub.
        split: split of a dataset of the Hub or of the file names in a folder.
    Raises:
        DataError: if there are none, or of several kinds.
    """
    path = Path(source).expanduser()
    if is_url(source):
        return ShardFiles(tuple(map(_web_address, _expand_braces(source))))
    if path.is_dir():
        found = sorted(p.relative_to(path) for p in path.rglob("*") if p.is_file())
        files = [str(p) for p in found if p.suffix in _SUFFIXES and not _is_hidden(p)]
        if not files:
            raise DataError(f"a stream needs .parquet or .tar files, {source!r} has none")
        chosen = _of_split(split_by_name(files), split)
        return ShardFiles(tuple(str(path / file) for file in chosen))
    if path.is_file() or any(char in source for char in "*?["):
        return ShardFiles(tuple(sorted(glob.glob(str(path), recursive=True))))
    return _on_the_hub(source, config_name, split, revision)


def shards_of(dataset: datasets.IterableDataset) -> ShardFiles:
    """The shards that a dataset of `load_dataset(..., streaming=True)` reads.

    Args:
        dataset: the rows of parquet or WebDataset files, without transforms.
    Raises:
        DataError: if its rows are not those of such files.
    """
    # datasets 5 has no public access to the files; `kwargs` are arguments of the dataset builder.
    rows: Any = dataset._ex_iterable
    attributes = ("generate_tables_fn", "generate_examples_fn")
    functions = (getattr(rows, name, None) for name in attributes)
    builder = getattr(next(filter(None, functions), None), "__self__", None)
    arguments = rows.kwargs if isinstance(builder, datasets.DatasetBuilder) else {}
    files = arguments.get("files") or arguments.get("tar_paths") or []
    config = getattr(builder, "config", None)
    is_part = (
        dataset._distributed
        or any(arguments.get("row_groups_list") or [])
        or any(getattr(config, name, None) for name in ("filters", "columns"))
    )
    if not files or is_part or not all(isinstance(file, str) for file in files):
        raise DataError(f"the files of this IterableDataset are unknown: {_PASS_FILES}")
    return ShardFiles(tuple(_web_address(str(file)) for file in files))


def _is_hidden(path: Path) -> bool:
    """Whether a name in a relative path begins with a dot, as in the folders of some systems."""
    return any(part.startswith(".") for part in path.parts)


def _web_address(location: str) -> str:
    """The https address of a file of the Hub; other locations unchanged."""
    if not is_url(location):
        return location
    url = urlsplit(location)
    if url.query or url.username or url.password:
        raise DataError(
            "URLs with a user, a password or a query string are not read, because messages and "
            "records would show them; use a server that needs none, or the Hub with HF_TOKEN"
        )
    if url.scheme not in ("https", "http", "hf"):
        raise DataError(
            f"a stream reads https, http and hf addresses, got {location!r}; download the shards, "
            "and pass their folder"
        )
    return _hub_address(_resolved(location)) if url.scheme == "hf" else location


def _resolved(url: str) -> Any:
    """Repository, revision and path of a file of the Hub."""
    try:
        return HfFileSystem().resolve_path(url)
    except Exception as error:  # the client raises errors of every kind
        reason = " ".join(f"{error}".split()) or type(error).__name__
        raise DataError(f"{url} is not found: {reason:.500}") from error


def _hub_address(file: Any) -> str:
    kind = file.repo_type
    return hf_hub_url(file.repo_id, file.path_in_repo, repo_type=kind, revision=file.revision)


def _expand_braces(url: str) -> list[str]:
    """URLs for every number in {first..last}."""
    parts = re.split(r"\{(\d+)\.\.(\d+)\}", url)
    ranges = [
        [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
        for first, last in zip(parts[1::3], parts[2::3], strict=True)
    ]
    texts = parts[::3]
    return [
        texts[0] + "".join(number + text for number, text in zip(numbers, texts[1:], strict=True))
        for numbers in product(*ranges)
    ]


def _of_split(splits: dict[str, list[str]], split: str) -> list[str]:
    if split not in splits:
        raise unknown_split(split, splits)
    return splits[split]


def _on_the_hub(name: str, config: str | None, split: str, revision: str | None) -> ShardFiles:
    builder = hub_dataset(name, config, revision)
    files = {str(key): list(value) for key, value in (builder.config.data_files or {}).items()}
    found = [_resolved(path) for path in _of_split(files, split)]
    return ShardFiles(tuple(map(_hub_address, found)), found[0].revision if found else None)

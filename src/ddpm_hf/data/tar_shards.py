"""WebDataset shards (.tar): number of images, their labels, and the encoded images.

Every image file is one image. Files of a sample share the path up to the first dot of the name.
"""

import json
import re
import tarfile
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from ddpm_hf.data.decoding import EXTENSIONS, Cell
from ddpm_hf.data.errors import DataError
from ddpm_hf.data.remote_files import BrokenTransfer, is_url, read_end, read_through

CLASS_EXTENSION = "cls"
"""Extension of the files with the class of a sample."""
_INDEX_BYTES = 2**26
_LABEL_BYTES = 2**20  # a larger file holds no label


def listed_rows(location: str) -> dict[str, int]:
    """Rows by file name from the index.json next to a .tar file; {} without one."""
    try:
        text, _ = read_end(location.rpartition("/")[0] + "/index.json", _INDEX_BYTES)
        shards = json.loads(text)["shardlist"]
        return {PurePosixPath(shard["url"]).name: int(shard["nsamples"]) for shard in shards}
    except (DataError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def read_tar_labels(location: str, key: str | None) -> list[Any]:
    """The label of each image of a .tar file, None for an image without one.

    Args:
        location: path or URL.
        key: of the .json files; "" for .cls files; None reads no labels.
    Raises:
        DataError: if the file cannot be read.
    """
    if is_url(location):
        return read_through(location, partial(_read_labels, key=key))
    try:
        with open(location, "rb") as file:
            return _read_labels(file, key)
    except OSError as error:
        raise DataError(f"{location} cannot be read: {error}") from error


def _read_labels(file: Any, key: str | None) -> list[Any]:
    # "r|" reads without seeking, as the answer of a server requires.
    mode: Any = "r:" if hasattr(file, "seek") else "r|"
    extension = "json" if key else CLASS_EXTENSION
    images: list[str] = []
    labels: dict[str, object] = {}
    try:
        with tarfile.open(fileobj=file, mode=mode) as tar:
            for member in tar:
                sample, kind = _sample_of(member)
                if _is_image(member):
                    images.append(sample)
                elif key is not None and kind == extension and member.size <= _LABEL_BYTES:
                    labels[sample] = _parse_label(_content(tar, member), key)
    except tarfile.TarError as error:
        raise BrokenTransfer(f"no .tar file, or an incomplete one: {error}") from error
    return [labels.get(sample) for sample in images]


def _sample_of(member: tarfile.TarInfo) -> tuple[str, str]:
    """The sample of a file, and the rest of its name."""
    path = PurePosixPath(member.name)
    name, _, kind = path.name.partition(".")
    return str(path.parent / name), kind


def _parse_label(content: bytes, key: str) -> Any:
    """The label in a .json or .cls file; None if there is none."""
    text = content.decode(errors="replace").strip()
    if not key:
        return int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else text
    try:
        return json.loads(text).get(key)
    except (ValueError, AttributeError, RecursionError):
        return None


def _is_image(member: tarfile.TarInfo) -> bool:
    path = PurePosixPath(member.name)
    return member.isfile() and path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return file.read() if file else b""


def tar_cells(path: Path, max_rows: int) -> Iterator[list[Cell]]:
    """The encoded images of a .tar file, at most `max_rows` at a time."""
    with tarfile.open(path, "r:") as tar:
        images = (member for member in tar if _is_image(member))
        while members := list(islice(images, max_rows)):
            yield [{"bytes": _content(tar, member), "path": None} for member in members]

"""Cache of prepared images: one folder per set of rows, files and options."""

import hashlib
import json
import logging
import os
from pathlib import Path

import datasets
from filelock import FileLock

from ddpm_hf.data.encoded_images import EncodedImages
from ddpm_hf.data.errors import DataError
from ddpm_hf.data.preprocessing import Plan, prepare_into
from ddpm_hf.diffusion.atomic_files import read_json, replacing_folder
from ddpm_hf.utils.digests import file_digest

logger = logging.getLogger(__name__)

_CACHE_VERSION = 5
_CHECKSUMS = "checksums.json"
_MAX_HASHED_BYTES = 2**30


def prepared_folder(
    images: EncodedImages, plan: Plan, on_bad_image: str, cache_dir: str | os.PathLike[str] | None
) -> Path:
    """The folder with the prepared images, which are prepared if the cache does not have them.

    Args:
        images: encoded images.
        plan: requested format.
        on_bad_image: of `prepare_into`.
        cache_dir: parent folder; None for a folder in the cache of `datasets`.
    Raises:
        DataError: if the images cannot be used, the folder cannot be written, or a process was
            killed.
    """
    cache = Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE, "ddpm_hf")).expanduser()
    folder = cache / _key(images, plan)
    if _is_intact(folder):
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # a second process waits here, then uses the folder
            if not _is_intact(folder):
                if folder.exists():
                    logger.warning("%s is damaged: the images are prepared again", folder)
                with replacing_folder(folder) as temporary:
                    prepare_into(temporary, images, plan, on_bad_image)
                    (temporary / _CHECKSUMS).write_text(json.dumps(_checksums(temporary)))
    except OSError as error:
        raise DataError(
            f"the images cannot be prepared in {str(cache)!r}: {error}; set HF_DATASETS_CACHE to a"
            " writable folder"
        ) from None
    except RuntimeError as error:
        if "abruptly died" not in str(error):  # message of `datasets`
            raise
        raise DataError(
            "a process that prepares the images was killed, perhaps because memory ran out: free"
            " memory, or limit the processes, one per CPU, with `taskset -c 0 COMMAND`"
        ) from None
    return folder


def _is_intact(folder: Path) -> bool:
    """Whether a folder exists and its files equal their checksums.

    Folders of older versions have no checksums.
    """
    try:
        expected = read_json(folder / _CHECKSUMS)
        return folder.exists() and expected in ({}, _checksums(folder))
    except (OSError, ValueError):
        return False


def _checksums(folder: Path) -> dict[str, object]:
    """Size and SHA-256 of each file; the sizes alone if SHA-256 would take seconds."""
    files = [path for path in sorted(folder.iterdir()) if path.name != _CHECKSUMS]
    sizes = {path.name: path.stat().st_size for path in files}
    is_large = sum(sizes.values()) > _MAX_HASHED_BYTES
    return dict(sizes) if is_large else {path.name: file_digest(path) for path in files}


def _key(images: EncodedImages, plan: Plan) -> str:
    """Hash of the rows, the options and the state of files that rows refer to."""
    rows = (images.cells._fingerprint, images.named_files())
    text = repr((_CACHE_VERSION, plan, rows))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]

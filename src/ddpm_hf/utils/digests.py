"""Digests of files, of a network's weights and of JSON values, kept in records on disk."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def weights_digest(unet: "torch.nn.Module") -> str:
    """SHA-256 of the names and values of all weights, as hexadecimal text."""
    import torch  # commands compare files before it is loaded

    digest = hashlib.sha256()
    for name, tensor in sorted(unet.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def file_digest(path: Path) -> dict[str, int | str]:
    """Size and SHA-256 of a file, as JSON values."""
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def json_digest(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys, as hexadecimal text."""
    value = json.loads(json.dumps(value))  # keys that are numbers become text
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

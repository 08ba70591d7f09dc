"""Datasets of small images, as rows and as files, prepared without progress bars."""

from functools import partial

import datasets
import image_zoo as zoo
import numpy as np
import pyarrow as pa

from ddpm_hf.data import prepare_images

IMAGE = datasets.Features({"image": datasets.Image()})
CLASSES = {
    f"{name}/{i}.png": zoo.encode(zoo.grey(8, 8) // 2 + i) for name in "ba" for i in range(3)
}

prepare = partial(prepare_images, progress=False)


def rows(*files, names=None):
    """A dataset with the bytes of files; None is a null cell."""
    names = names or [f"{i}.png" for i in range(len(files))]
    cells = [
        None if data is None else {"bytes": data, "path": name}
        for data, name in zip(files, names, strict=True)
    ]
    return datasets.Dataset.from_dict({"image": cells}, features=IMAGE)


def greys(*shapes):
    """A dataset of grey images with these heights and widths."""
    return rows(*(zoo.encode(zoo.grey(h, w)) for h, w in shapes))


def folder_of(root, files):
    """`root`, filled with these files: bytes by relative name."""
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def as_numpy(images):
    """All images of a dataset, (N, C, H, W)."""
    return np.stack([image.numpy() for image in images])


def naming(path):
    """An Arrow table of two rows: an encoded image, and only a path."""
    cells = [{"bytes": zoo.encode(zoo.GREY), "path": "good.png"}, {"bytes": None, "path": path}]
    table = pa.table({"image": pa.array(cells, type=datasets.Image().pa_type)})
    return table.replace_schema_metadata(IMAGE.arrow_schema.metadata)

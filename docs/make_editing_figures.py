"""Pictures of docs/editing.md, drawn by the model of training/demo.py.

python docs/make_editing_figures.py runs/demo/model [FACES.parquet]
"""

import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image

from ddpm_hf import GaussianDDPMPipeline, load
from ddpm_hf.pictures import image_grid

FOLDER = Path(__file__).parent
FACES = FOLDER.parent / "training" / "faces16" / "test.parquet"
STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)
HIDDEN_ROWS = 7  # hair and forehead
HIDDEN_COLOUR = (110, 110, 110)
WITHOUT_CLASS = {"guidance_scale": 0.0}

Cell = Image.Image | np.ndarray[Any, Any] | None


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def inpainting(pipeline: GaussianDDPMPipeline, faces: list[Image.Image]) -> Image.Image:
    """A row for each face: the face, its visible part, six draws, the standard deviation."""
    box = (0, 0, 16, HIDDEN_ROWS)
    mask = Image.new("L", (16, 16))
    mask.paste(255, box)
    cells: list[Cell] = []
    for face in faces:
        visible = face.copy()
        visible.paste(HIDDEN_COLOUR, box)
        output = pipeline.inpaint(
            face, mask, num_images=6, num_inference_steps=50, jump_length=1, generator=seeded(),
            return_std=True, **WITHOUT_CLASS,
        )  # fmt: skip
        spread = np.clip(2 * output.std[0].mean(-1, keepdims=True), 0, 1)
        cells += [face, visible, *output.images, spread]
    names = ["held out", "visible", *(f"draw {i}" for i in range(1, 7)), "std"]
    return image_grid(cells, 9, column_names=names)


def image_to_image(
    pipeline: GaussianDDPMPipeline, faces: list[Image.Image]
) -> tuple[Image.Image, list[float]]:
    """A row for each face: the face, and a draw at each strength; and the gain of each."""
    outputs = [
        pipeline.image_to_image(
            faces, strength=strength, num_inference_steps=50, generator=seeded(), **WITHOUT_CLASS
        )
        for strength in STRENGTHS
    ]
    rows = zip(faces, *(output.images for output in outputs), strict=True)
    names = ["held out", *(f"strength {strength:g}" for strength in STRENGTHS)]
    grid = image_grid([cell for row in rows for cell in row], len(names), column_names=names)
    return grid, [output.expected_gain or 0.0 for output in outputs]


def interpolation(pipeline: GaussianDDPMPipeline, faces: list[Image.Image]) -> Image.Image:
    """A row for each pair of faces: nine images from one to the other."""
    pairs = zip(faces[::2], faces[1::2], strict=True)
    rows = [
        pipeline.interpolate(a, b, 9, num_inference_steps=100, **WITHOUT_CLASS).images
        for a, b in pairs
    ]
    return image_grid([cell for row in rows for cell in row], 9)


def class_editing(
    pipeline: GaussianDDPMPipeline, faces: list[Image.Image], classes: list[int]
) -> Image.Image:
    """A row for each face: the face, and the face drawn with each class."""
    names = pipeline.class_names or ()
    steps = {"num_inference_steps": 100}
    latents = pipeline.invert(faces, class_labels=classes, **steps)
    drawn = [
        pipeline(len(faces), latents=latents, class_labels=name, eta=0.0, **steps).images
        for name in names
    ]
    rows = zip(faces, *drawn, strict=True)
    cells = [cell for row in rows for cell in row]
    return image_grid(cells, len(names) + 1, column_names=["held out", *names])


def main(model: str, faces_file: str = str(FACES)) -> None:
    pipeline = load(model)
    pipeline.set_progress_bar_config(disable=True)
    faces = datasets.load_dataset("parquet", data_files=faces_file, split="train")[:6]
    images, classes = [face.convert("RGB") for face in faces["image"]], faces["hair_color"]
    inpainting(pipeline, images[:4]).save(FOLDER / "editing_inpainting.png")
    varied, gains = image_to_image(pipeline, images[:4])
    varied.save(FOLDER / "editing_strength.png")
    print("expected gain:", *(f"{gain:.3f}" for gain in gains))
    interpolation(pipeline, images).save(FOLDER / "editing_interpolation.png")
    class_editing(pipeline, images[:4], classes[:4]).save(FOLDER / "editing_classes.png")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Pictures of docs/editing.md, drawn by the model of training/digits.py.

python docs/make_editing_figures.py runs/bench/digits/model  # trained by bench_editing.py
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from ddpm_hf import GaussianDDPMPipeline, load
from ddpm_hf.pictures import image_grid

FOLDER = Path(__file__).parent
NUM_STEPS = 25
STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)
HIDDEN_LEVEL = 110  # grey of the hidden half


def held_out_digits(count: int) -> list[Image.Image]:
    """Digits that training did not see, 8x8."""
    values, labels = load_digits(return_X_y=True)
    _, held_out = train_test_split(values, test_size=0.2, stratify=labels, random_state=0)
    pixels = (held_out[:count].reshape(-1, 8, 8) * 255 / 16).round().astype(np.uint8)
    return [Image.fromarray(image) for image in pixels]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def inpainting(pipeline: GaussianDDPMPipeline, digits: list[Image.Image]) -> Image.Image:
    """A row for each digit: the digit, its visible half, six draws, the standard deviation."""
    mask = Image.new("L", (8, 8))
    mask.paste(255, (0, 4, 8, 8))
    cells: list[Image.Image | np.ndarray | None] = []
    for digit in digits:
        visible = digit.copy()
        visible.paste(HIDDEN_LEVEL, (0, 4, 8, 8))
        output = pipeline.inpaint(
            digit, mask, num_images=6, num_inference_steps=NUM_STEPS, generator=seeded(),
            return_std=True,
        )  # fmt: skip
        cells += [digit, visible, *output.images, np.clip(2 * output.std[0], 0, 1)]
    return image_grid(cells, 9)


def image_to_image(
    pipeline: GaussianDDPMPipeline, digits: list[Image.Image]
) -> tuple[Image.Image, list[float]]:
    """A row for each digit: the digit, and a draw at each strength; and the gain of each."""
    outputs = [
        pipeline.image_to_image(
            digits, strength=strength, num_inference_steps=50, generator=seeded()
        )
        for strength in STRENGTHS
    ]
    rows = zip(digits, *(output.images for output in outputs), strict=True)
    grid = image_grid([cell for row in rows for cell in row], len(STRENGTHS) + 1)
    return grid, [output.expected_gain or 0.0 for output in outputs]


def interpolation(pipeline: GaussianDDPMPipeline, digits: list[Image.Image]) -> Image.Image:
    """A row for each pair of digits: nine images from one to the other."""
    pairs = zip(digits[::2], digits[1::2], strict=True)
    rows = [pipeline.interpolate(a, b, 9, num_inference_steps=100).images for a, b in pairs]
    return image_grid([cell for row in rows for cell in row], 9)


def main(model: str) -> None:
    pipeline = load(model)
    pipeline.set_progress_bar_config(disable=True)
    digits = held_out_digits(8)
    inpainting(pipeline, digits[:4]).save(FOLDER / "editing_inpainting.png")
    varied, gains = image_to_image(pipeline, digits[:4])
    varied.save(FOLDER / "editing_strength.png")
    print("expected gain:", *(f"{gain:.3f}" for gain in gains))
    interpolation(pipeline, digits[:6]).save(FOLDER / "editing_interpolation.png")


if __name__ == "__main__":
    main(sys.argv[1])

"""Pictures as HTML, enlarged by the browser without interpolation."""

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from PIL import Image

from ddpm_hf.app.films import columns_of, data_url, rgb_pixels
from ddpm_hf.pictures import Pixels


def picture_tag(picture: Image.Image, alt: str, side: int) -> str:
    """An image element, enlarged by an integer to at most `side` pixels, or reduced to it."""
    longer = max(picture.size)
    scale = side // longer if longer <= side else side / longer
    width = round(picture.width * scale)
    return f'<img class="pixelated" src="{data_url(picture)}" alt="{escape(alt)}" width="{width}">'


def figure(picture: Image.Image, caption: str, side: int) -> str:
    """A picture with its caption."""
    text = escape(caption)
    return f"<figure>{picture_tag(picture, caption, side)}<figcaption>{text}</figcaption></figure>"


def tiled(images: Pixels) -> Image.Image:
    """One picture of images (N, H, W, C) in [0, 1], side by side in rows."""
    pixels = rgb_pixels(images)
    columns = columns_of(len(pixels))
    missing = -len(pixels) % columns
    blank = np.full((missing, *pixels.shape[1:]), 255, np.uint8)
    grid = np.concatenate([pixels, blank])
    rows = grid.reshape(-1, columns, *pixels.shape[1:]).transpose(0, 2, 1, 3, 4)
    return Image.fromarray(rows.reshape(rows.shape[0] * rows.shape[1], -1, 3))


def table(rows: Mapping[str, str]) -> str:
    """A table of names and values."""
    cells = (f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in rows.items())
    return f'<table class="facts">{"".join(cells)}</table>'


def section(title: str, parts: Sequence[str]) -> str:
    """A titled row of figures."""
    return f'<section><h4>{escape(title)}</h4><div class="figures">{"".join(parts)}</div></section>'


def progress_html(calls: int, words: Mapping[str, str]) -> str:
    """The number of network calls so far, in the texts of a language."""
    return f"<p>{words['calls_so_far'].format(num=calls)}</p>"

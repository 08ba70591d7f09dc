"""Screenshots of docs/app.md: python docs/make_app_screenshots.py MODEL

Needs the extras app and dev, and chromium. MODEL should draw small colour images of classes.
"""

import sys
from pathlib import Path
from typing import Any

from PIL import Image

from ddpm_hf.app.served_models import load_models
from ddpm_hf.app.server import start

DOCS = Path(__file__).parent
sys.path.append(str(DOCS.parent / "tests"))
from browser import Visitor, open_browser  # noqa: E402

SIZE = {"width": 1120, "height": 600}


def save(page: Any, name: str) -> None:
    """Write docs/NAME.png with a palette, which halves the file."""
    path = DOCS / f"{name}.png"
    page.screenshot(path=path, full_page=True)
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


def draw(visitor: Visitor) -> None:
    """The film at a third of its steps."""
    page = visitor.page
    visitor.draw()
    slider = page.locator("#film input")
    slider.fill(str(int(slider.get_attribute("max")) // 3))
    save(page, "app_draw")


def edit(visitor: Visitor) -> None:
    """The hair of a drawn face is drawn anew."""
    page = visitor.page
    page.click("#film .film-x0", position={"x": 30, "y": 30})
    page.wait_for_selector("#picture .painter[data-ready=true]")
    canvas = page.locator("#picture canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    pixel = box["width"] / 16
    page.mouse.move(box["x"] + 3 * pixel, box["y"] + 2.5 * pixel)
    page.mouse.down()
    for row in (2.5, 3.5):
        for column in (3, 12):
            page.mouse.move(box["x"] + column * pixel, box["y"] + row * pixel, steps=9)
    page.mouse.up()
    page.click("#run-edit")
    page.wait_for_selector("#edited section:nth-of-type(3)")
    save(page, "app_edit")


def steps(visitor: Visitor) -> None:
    """Three samplers with 5 to 50 steps."""
    page = visitor.page
    page.get_by_role("tab", name="Steps").click()
    page.click("#compare")
    page.wait_for_selector("#comparison section:nth-of-type(3) figure:nth-of-type(4)")
    save(page, "app_steps")


def main(model: str) -> None:
    """Serve the model and write all screenshots."""
    page = start(load_models([model]))
    with open_browser() as browser:
        visitor = Visitor(browser, page.local_url, viewport=SIZE)
        for take in (draw, edit, steps):
            take(visitor)
    page.close(verbose=False)


if __name__ == "__main__":
    main(sys.argv[1])

"""The web application in a real browser."""

import base64
import io

import numpy as np
import pytest
from browser import Visitor, open_browser, require_browser
from checkpoints import image_facts_of, save_ours, tiny_scheduler, tiny_unet
from PIL import Image

require_browser()
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A class-conditional model of colour images that recommends 5 steps."""
    from ddpm_hf.app.served_models import load_models

    recommended = {"scheduler": "DDPM:eta=0", "num_inference_steps": 5}
    folder = save_ours(
        tmp_path_factory.mktemp("app") / "hair" / "model",
        unet=tiny_unet(in_channels=3, num_class_embeds=4),
        scheduler=tiny_scheduler(recommended=recommended),
        facts=image_facts_of("RGB", 8, 8, class_names=["black", "blond", "red"]),
    )
    return load_models([str(folder)])


@pytest.fixture(scope="module")
def address(models):
    from ddpm_hf.app.server import start

    page = start(models)
    yield page.local_url
    page.close()


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


@pytest.fixture
def visit(browser, address):
    """Open the page; at the end, no page may have had an error or asked another server."""
    visitors = []

    def open_page(**context):
        visitors.append(Visitor(browser, address, **context))
        return visitors[-1]

    yield open_page
    for visitor in visitors:
        visitor.context.close()
    assert [error for visitor in visitors for error in visitor.errors] == []
    assert [url for visitor in visitors for url in visitor.outside] == []


def drawn_png(visitor):
    url = visitor.page.get_attribute("#film .film-png", "href")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))))


def test_a_click_draws_and_the_slider_moves_over_the_film(visit, models):
    from ddpm_hf import image_grid
    from ddpm_hf.app.drawing import drawing_steps
    from ddpm_hf.app.requests import DrawRequest

    visitor = visit()
    visitor.draw()
    *_, last = drawing_steps(models[0], DrawRequest.of(models[0], num_images=3))
    grid = image_grid(list((last.images * 255).round().astype("uint8")), 3)
    assert np.array_equal(drawn_png(visitor), np.asarray(grid))
    slider = visitor.page.locator("#film input")
    assert slider.input_value() == "4"
    end = visitor.pixels("#film .film-xt")
    slider.press("Home")
    assert visitor.pixels("#film .film-xt") != end
    assert visitor.page.inner_text("#film output").startswith("step 1 of 5")


def test_the_film_is_offered_as_gif_and_as_lines_of_code(visit):
    visitor = visit()
    visitor.draw()
    url = visitor.page.get_attribute("#film .film-gif", "href")
    assert Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).n_frames == 5
    visitor.page.get_by_text("The same images in Python").click()
    code = visitor.page.locator("#command .cm-content").inner_text()
    assert code.startswith("ddpm-hf sample")


def test_two_visitors_at_once_get_their_own_images(visit):
    visitors = [visit(), visit()]
    for visitor, seed in zip(visitors, "12", strict=True):
        visitor.page.fill("#seed input", seed)
        visitor.page.click("#draw")
    for visitor in visitors:
        visitor.page.wait_for_selector("#film .film[data-done=true]")
    names = [v.page.get_attribute("#film .film-png", "download") for v in visitors]
    assert names == ["hair-seed1.png", "hair-seed2.png"]
    assert not np.array_equal(*map(drawn_png, visitors))


def test_an_invalid_value_shows_its_message(visit):
    visitor = visit()
    visitor.page.fill("#seed input", "-1")
    visitor.page.click("#draw")
    toast = visitor.page.wait_for_selector(".toast-body")
    assert "`seed` must be in" in toast.inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_the_page_without_overflow_in_its_language(visit, scheme):
    visitor = visit(
        viewport={"width": 390, "height": 844}, locale="zh-CN", color_scheme=scheme, has_touch=True
    )
    assert "\u7ed8\u5236" in visitor.page.inner_text("#draw")
    visitor.draw()
    assert visitor.overflow() == 0

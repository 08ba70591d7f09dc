"""The web application in a real browser."""

import base64
import io
import time

import numpy as np
import pytest
from browser import Visitor, open_browser, require_browser
from checkpoints import image_facts_of, save_ours, tiny_scheduler, tiny_unet
from PIL import Image

require_browser()
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A class-conditional model of colour images that recommends 5 steps, and one of grey ones."""
    from ddpm_hf.app.served_models import load_models

    recommended = {"scheduler": "DDPM:eta=0", "num_inference_steps": 5}
    folder = save_ours(
        tmp_path_factory.mktemp("app") / "hair" / "model",
        unet=tiny_unet(in_channels=3, num_class_embeds=4),
        scheduler=tiny_scheduler(recommended=recommended),
        facts=image_facts_of("RGB", 8, 8, class_names=["black", "blond", "red"]),
    )
    grey = tmp_path_factory.mktemp("app") / "grey" / "model"
    return load_models([str(folder), str(save_ours(grey, facts=image_facts_of("L", 8, 8)))])


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


def test_a_click_draws_a_film_with_a_slider_a_gif_and_lines_of_code(visit, models):
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
    assert opened(visitor.page.get_attribute("#film .film-gif", "href")).n_frames == 5
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


@pytest.mark.parametrize(
    ("locale", "scheme", "button", "message"),
    [
        ("en-US", "light", "Draw", "`seed` must be in"),
        ("zh-CN", "dark", "\u751f\u6210", "`seed` \u5fc5\u987b\u5728"),
    ],
)
def test_a_phone_shows_page_and_messages_in_its_language_without_overflow(
    visit, locale, scheme, button, message
):
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True}
    visitor = visit(**phone, locale=locale, color_scheme=scheme)
    assert button in visitor.page.inner_text("#draw")
    visitor.draw()
    assert visitor.overflow() == 0
    visitor.page.fill("#seed input", "-1")
    visitor.page.click("#draw")
    assert message in visitor.page.wait_for_selector(".toast-body").inner_text()


def test_the_guidance_interval_is_that_of_the_chosen_model(visit):
    page = visit().page
    page.get_by_role("button", name="More options").first.click()
    bounds = [page.get_by_label(f"{end} log SNR") for end in ("Lowest", "Highest")]
    for bound in bounds:
        bound.fill("-2")
    choose_model(page, "grey")
    for bound in bounds:
        bound.wait_for(state="hidden")
    choose_model(page, "hair")
    for bound in bounds:
        bound.wait_for(state="visible")
        assert bound.input_value() == ""


def test_every_sampler_and_number_of_steps_is_compared_with_its_cost(visit):
    page = visit().page
    page.get_by_role("tab", name="Steps").click()
    page.click("#compare")
    page.wait_for_selector("#comparison section:nth-of-type(3) figure:nth-of-type(2)")
    assert page.locator("#comparison h4").all_inner_texts() == [
        "DDPM",
        "DDIM",
        "DPMSolverMultistep",
    ]
    assert "5 network calls" in page.inner_text("#comparison figure")


def test_the_brush_draws_a_part_of_a_drawn_image_anew(visit):
    visitor = visit()
    visitor.draw()
    page = visitor.page
    page.click("#film .film-x0", position={"x": 20, "y": 20})
    page.wait_for_selector("#picture .painter[data-ready=true]")
    canvas = page.locator("#picture canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 5, box["y"] + 5)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 3, box["y"] + 5, steps=4)
    page.mouse.up()
    page.click("#run-edit")
    page.wait_for_selector("#edited section:nth-of-type(3)")
    links = [a.get_attribute("href") for a in page.locator("#edited a").all()]
    picture, _, mask = (np.asarray(opened(link)) for link in links)
    draw = np.asarray(
        opened(page.get_attribute("#edited section:nth-of-type(2) img", "src")).convert("RGB")
    )
    assert mask.any()
    assert not mask[-1].any()
    assert np.array_equal(draw[mask == 0], picture[mask == 0])
    assert not np.array_equal(draw, picture)


def test_a_picture_is_measured_and_a_file_that_is_none_shows_a_message(visit, tmp_path):
    page = visit().page
    page.get_by_role("tab", name="Inside").click()
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    Image.new("RGB", (30, 20), "red").save(tmp_path / "good.png")
    upload = page.locator("#measured-upload").locator("xpath=..").locator("input[type=file]")
    upload.set_input_files(tmp_path / "bad.png")
    toast = page.wait_for_selector(".toast-body")
    assert "not a picture in one of the formats" in toast.inner_text()
    upload.set_input_files(tmp_path / "good.png")
    page.wait_for_selector("#measured .painter[data-ready=true]")
    page.click("#measure")
    page.wait_for_selector("#bound b")
    assert "bits/dim" in page.inner_text("#bound")


def test_stop_or_closing_the_page_ends_the_work_within_a_step(visit, models):
    calls = []
    hook = models[0].pipeline.unet.register_forward_hook(lambda *_: calls.append(time.sleep(0.3)))
    page = visit().page
    page.get_by_role("tab", name="Steps").click()
    for stop in (page.locator("#stop-steps").click, page.close):
        calls.clear()
        page.click("#compare")
        while len(calls) < 2:
            page.wait_for_timeout(50)
        stop()
        before = None
        while before != len(calls):  # until no step in a second
            before = len(calls)
            time.sleep(1)
        assert before < 45
    hook.remove()


def choose_model(page, name):
    page.locator("#model input").click()
    page.get_by_role("option", name=name).click()


def opened(url):
    return Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))

"""Requests of the web application: bounds on the server, and the lines that repeat them."""

import math

import numpy as np
import pytest
from checkpoints import image_facts_of, save_ours, tiny_scheduler, tiny_unet

from ddpm_hf.app.drawing import drawing_steps
from ddpm_hf.app.films import columns_of, film_sheet, kept_steps, reduction
from ddpm_hf.app.page_texts import LANGUAGES, language_of, texts
from ddpm_hf.app.request_errors import RequestError, message_of
from ddpm_hf.app.requests import SAMPLERS, DrawRequest
from ddpm_hf.app.served_models import load_models
from ddpm_hf.app.snippets import command_line, python_lines
from ddpm_hf.cli import main

NAMES = ["black", "blond", "red"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Class-conditional RGB model whose scheduler recommends DDIM in 5 steps."""
    recommended = {"scheduler": "DDPM:eta=0", "num_inference_steps": 5}
    return save_ours(
        tmp_path_factory.mktemp("app") / "hair" / "model",
        unet=tiny_unet(in_channels=3, num_class_embeds=4),
        scheduler=tiny_scheduler(recommended=recommended),
        facts=image_facts_of("RGB", 8, 8, class_names=NAMES),
    )


@pytest.fixture(scope="module")
def model(folder):
    return load_models([str(folder)])[0]


@pytest.mark.slow
def test_a_model_is_named_after_its_run_and_names_are_unique(folder):
    assert [m.name for m in load_models([str(folder), str(folder)])] == ["hair", "hair 2"]


def test_local_paths_are_hidden_from_other_machines(folder):
    assert load_models([str(folder)], hide_paths=True)[0].source == "model"


def test_the_default_request_is_what_the_model_recommends(model):
    request = DrawRequest.of(model)
    assert (request.scheduler, request.num_inference_steps, request.eta) == ("DDPM", 5, 0.0)
    assert request.class_labels == [0, 1, 2]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_images": 0}, r"`num_images` must be in \[1, 64\], got 0"),
        ({"num_images": 65}, r"`num_images` must be in \[1, 64\], got 65"),
        ({"num_images": math.nan}, "`num_images` must be an integer, got nan"),
        ({"num_images": "8"}, "`num_images` must be an integer, got '8'"),
        ({"num_images": True}, "`num_images` must be an integer, got True"),
        ({"seed": 2**63}, "`seed` must be in"),
        ({"seed": 1.5}, "`seed` must be an integer, got 1.5"),
        ({"seed": ["x" * 1000]}, "`seed` must be an integer, got ..x{30,40}[.]{3}$"),
        ({"num_inference_steps": 21}, r"`num_inference_steps` must be in \[1, 20\], got 21"),
        ({"num_inference_steps": 0}, r"`num_inference_steps` must be in \[1, 20\], got 0"),
        ({"guidance_scale": math.inf}, "`guidance_scale` must be a finite number, got inf"),
        ({"guidance_scale": 21}, "`guidance_scale` must be in"),
        ({"guidance_scale": "x"}, "`guidance_scale` must be a finite number"),
        ({"guidance_interval": (math.nan, 1)}, "`guidance_interval` must be a finite number"),
        ({"guidance_interval": [1]}, "`guidance_interval` must be two numbers"),
        ({"eta": 2}, "`eta` must be in"),
        ({"class_label": "green"}, "`class_labels` must be in .* got 'green'"),
        ({"class_label": 3}, "`class_labels` must be in"),
        ({"class_label": {}}, "`class_label` must be a class"),
        ({"sampler": None}, "`sampler` must be the name of a sampler"),
        ({"sampler": "Nonsense"}, "unknown scheduler 'Nonsense'"),
        ({"sampler": "DDIM:num_train_timesteps=1000000000"}, "not an option of a sampler that"),
    ],
)
def test_a_hostile_value_is_refused_by_name(model, values, message):
    with pytest.raises(ValueError, match=message):
        DrawRequest.of(model, **values)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_of_the_page_draws_finite_images(model, sampler):
    request = DrawRequest.of(model, num_images=2, sampler=sampler, num_inference_steps=4)
    *steps, last = drawing_steps(model, request)
    assert np.isfinite(last.images).all()
    assert all(step.frame().x_t.shape == (2, 8, 8, 3) for step in steps)


def test_a_closed_drawing_stops_calling_the_network(model):
    calls = []
    hook = model.pipeline.unet.register_forward_hook(lambda *_: calls.append(1))
    steps = drawing_steps(model, DrawRequest.of(model, num_inference_steps=20))
    next(steps)
    steps.close()
    hook.remove()
    assert len(calls) == 1


def cases(model):
    yield DrawRequest.of(model, num_images=3, seed=5)
    yield DrawRequest.of(
        model, num_images=2, class_label="red", guidance_scale=2.5, guidance_interval=(-3, None),
        sampler="DDIM", num_inference_steps=7, eta=0.5,
    )  # fmt: skip
    yield DrawRequest.of(model, num_images=17, sampler="DPMSolverMultistep", num_inference_steps=3)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(3))
def test_the_lines_of_python_draw_the_same_pixels(model, index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    request = list(cases(model))[index]
    *_, last = drawing_steps(model, request)
    namespace = {}
    exec(python_lines(model, request), namespace)
    assert np.array_equal(np.stack(namespace["images"]), last.images)
    assert (tmp_path / "samples.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("index", range(3))
def test_the_command_draws_the_same_pixels(model, index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    request = list(cases(model))[index]
    *_, last = drawing_steps(model, request)
    words = command_line(model, request).split()
    assert words[:2] == ["ddpm-hf", "sample"]
    assert main([*words[1:], "--output", "drawn.npz"]) == 0
    with np.load("drawn.npz") as drawn:
        assert np.array_equal(drawn["arr_0"], (last.images * 255).round().astype("uint8"))


def test_a_film_keeps_both_ends_and_stays_small(model):
    *_, last = drawing_steps(model, DrawRequest.of(model, num_images=4))
    frame = last.frame()
    kept = kept_steps(1000, frame)
    assert {1, 1000} <= kept
    assert len(kept) == 60
    assert kept_steps(5, frame) == {1, 2, 3, 4, 5}
    assert film_sheet([frame, frame]).size == (2 * 4 * 8, 2 * 8)


def test_large_images_are_reduced_in_films():
    assert reduction(4, (16, 16)) == 1
    assert reduction(16, (256, 256)) == 4
    assert [columns_of(n) for n in (1, 3, 4, 6, 16)] == [1, 3, 2, 3, 4]


def test_both_languages_have_the_same_texts_with_the_same_gaps():
    english, chinese = (texts(language) for language in LANGUAGES)
    assert english.keys() == chinese.keys()
    for key in english:
        gaps = [
            sorted(part.split("}")[0] for part in t[key].split("{")[1:]) for t in (english, chinese)
        ]
        assert gaps[0] == gaps[1], key


@pytest.mark.parametrize(
    ("header", "language"), [("zh-CN,zh;q=0.9", "zh"), ("fr, en;q=0.5", "en"), ("", "en")]
)
def test_the_language_is_that_of_the_browser(header, language):
    request = type("Request", (), {"headers": {"accept-language": header}})()
    assert language_of(request) == language
    assert language_of(None) == "en"


def test_an_error_is_in_the_language_of_the_page(model):
    with pytest.raises(RequestError) as raised:
        DrawRequest.of(model, num_images=65)
    english, chinese = (message_of(raised.value, texts(language)) for language in LANGUAGES)
    assert english == str(raised.value) == "`num_images` must be in [1, 64], got 65"
    assert chinese.startswith("`num_images` \u5fc5\u987b")
    assert chinese.endswith(" 65")


def test_an_error_of_the_package_is_introduced_in_the_language_of_the_page(model):
    with pytest.raises(ValueError, match="unknown scheduler") as raised:
        DrawRequest.of(model, sampler="Nonsense")
    english, chinese = (message_of(raised.value, texts(language)) for language in LANGUAGES)
    assert english == str(raised.value)
    assert chinese == f"\u65e0\u6cd5\u5b8c\u6210\u8fd9\u4e2a\u8bf7\u6c42\uff1a{english}"

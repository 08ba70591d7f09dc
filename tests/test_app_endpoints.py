"""The web application through gradio_client, and its pictures from visitors."""

import io
import json
import os
import signal
import socket
import threading
import time
import urllib.request

import numpy as np
import pytest
import torch
from checkpoints import image_facts_of, save_ours, save_stock, tiny_scheduler, tiny_unet
from PIL import Image
from processes import LIMIT_S

pytest.importorskip("gradio")
from ddpm_hf.app.comparison import compare_settings
from ddpm_hf.app.controls import class_choices
from ddpm_hf.app.drawing import drawing_steps
from ddpm_hf.app.editing import EditRequest, edit_picture
from ddpm_hf.app.inspection import card_text, error_curve, picture_bound, snr_curve
from ddpm_hf.app.nearest_images import TrainingSet
from ddpm_hf.app.page import build_page
from ddpm_hf.app.picture_input import Drawn, choose_drawn, label_update
from ddpm_hf.app.requests import DrawRequest
from ddpm_hf.app.served_models import load_models
from ddpm_hf.app.site import Site
from ddpm_hf.app.snippets import edit_command
from ddpm_hf.app.uploads import mask_picture, open_mask, open_upload
from ddpm_hf.app.working import WorkStopped, watched
from ddpm_hf.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A calibrated class-conditional model of colour images."""
    folder = save_ours(
        tmp_path_factory.mktemp("app") / "hair" / "model",
        unet=tiny_unet(in_channels=3, num_class_embeds=3),
        scheduler=tiny_scheduler(x_0_mse=np.linspace(0.01, 0.3, 20)),
        facts=image_facts_of("RGB", 8, 8, class_names=["black", "red"]),
    )
    (folder / "README.md").write_text(
        "---\nlicense: mit\n---\n# A card\n\n![x](https://example.com/x.png)<img src='https://a.b/c'>"
    )
    return load_models([str(folder)])[0]


def result_of(work):
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def picture(seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def edits(model):
    mask = Image.new("L", (8, 8))
    mask.paste(255, (0, 4, 8, 8))
    common = {"num_inference_steps": 4, "num_images": 2, "seed": 3}
    yield EditRequest.of(model, "inpaint", picture(), mask=mask, repetitions=2, **common)
    yield EditRequest.of(model, "vary", picture(), strength=0.7, class_label="red", **common)
    yield EditRequest.of(model, "between", picture(), second=picture(1), **common)
    yield EditRequest.of(model, "class", picture(), source_class="black", class_label="red")
    yield EditRequest.of(model, "inpaint", picture(), mask=mask, method="covariance", **common)
    few = {"num_images": 2, "seed": 3}
    yield EditRequest.of(model, "vary", picture(), sampler="thorough", **few)
    yield EditRequest.of(model, "vary", picture(), sampler="recommended", **few)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(7))
def test_the_command_makes_the_same_edit(model, index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    request = list(edits(model))[index]
    pictures = request.pictures
    files = {"picture": pictures.image, "mask": pictures.mask, "second": pictures.between}
    for name, image in files.items():
        if image is not None:
            image.save(f"{name}.png")
    result = result_of(edit_picture(model, request))
    assert main(edit_command(model, request).split()[1:]) == 0
    for i, drawn in enumerate(result.images):
        saved = np.asarray(Image.open(f"edited/{i:03}.png"))
        assert np.array_equal(saved, (drawn * 255).round().astype("uint8"))
    assert (result.std is None) == (request.options.kind in ("interpolate", "change class"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "paint"}, "`kind` must be one of"),
        ({"num_images": 100}, r"`num_images` must be in \[1, 64\]"),
        ({"strength": float("nan")}, "`strength` must be a finite number"),
        ({"strength": -1}, r"`strength` must be in \[0, 1\], got -1"),
        ({"repetitions": 21, "kind": "inpaint"}, r"`repetitions` must be in \[1, 20\]"),
        ({"method": "paint", "kind": "inpaint"}, "`method` must be one of repaint, covariance"),
        ({"sampler": "DDIM"}, "`sampler` must be one of recommended, steps, thorough"),
        ({"kind": "between"}, "choose the second picture"),
        ({"class_label": "blue"}, "`class_labels` must be in"),
    ],
)
def test_a_hostile_edit_is_refused(model, values, message):
    values = {"kind": "vary", **values}
    with pytest.raises(ValueError, match=message):
        result_of(
            edit_picture(model, EditRequest.of(model, values.pop("kind"), picture(), **values))
        )


def test_an_upload_is_cropped_and_resized_to_the_model(model, tmp_path):
    halves = Image.new("RGB", (64, 16), "white")
    halves.paste("red", (24, 0, 40, 16))
    halves.save(tmp_path / "x.png")
    fitted = open_upload(tmp_path / "x.png", model)
    assert fitted.size == (8, 8)
    assert (np.asarray(fitted) == (255, 0, 0)).all()
    assert open_mask(tmp_path / "x.png", model).mode == "L"


@pytest.mark.parametrize("bit_depth", [8, 16])
def test_an_upload_of_16_bits_keeps_its_brightness(tmp_path, bit_depth):
    facts = image_facts_of("L", 8, 8, bit_depth=bit_depth)
    model = load_models([str(save_ours(tmp_path / "grey" / "model", facts=facts))])[0]
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1001
    Image.fromarray(values).save(tmp_path / "x.png")
    fitted = np.asarray(open_upload(tmp_path / "x.png", model))
    assert np.array_equal(fitted, values if bit_depth == 16 else (values // 257).astype(np.uint8))
    mask = np.asarray(open_mask(tmp_path / "x.png", model))
    assert np.array_equal(mask == 255, values // 257 > 127)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not a picture"),
    ],
)
def test_a_file_that_is_no_picture_is_refused(model, tmp_path, content, message):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_upload(tmp_path / "x.png", model)
    with pytest.raises(ValueError, match="upload a picture first"):
        open_upload(None, model)


def test_a_huge_picture_is_refused_by_its_header(model, tmp_path):
    content = io.BytesIO()
    Image.new("1", (8000, 8000)).save(content, "PNG")
    (tmp_path / "x.png").write_bytes(content.getvalue())
    with pytest.raises(ValueError, match="at most 33,554,432 pixels, got 8,000 x 8,000"):
        open_upload(tmp_path / "x.png", model)


def test_a_mask_has_a_bit_for_each_pixel(model):
    mask = mask_picture({"mask": "1" + "0" * 63}, model)
    assert np.asarray(mask)[0, 0] == 255
    assert np.asarray(mask).sum() == 255
    for value in (None, {}, {"mask": "0" * 64}, {"mask": 5}):
        with pytest.raises(ValueError, match="paint over the part"):
            mask_picture(value, model)
    for text in ("1" * 63, "x1" * 32):
        with pytest.raises(ValueError, match="must have 8 x 8 pixels"):
            mask_picture({"mask": text}, model)


def test_a_class_is_chosen_even_if_its_name_is_the_number_of_another(tmp_path):
    facts = image_facts_of("L", 8, 8, class_names=["1", "2", "3"])
    unet = tiny_unet(num_class_embeds=4)
    model = load_models([str(save_ours(tmp_path / "digits" / "model", unet=unet, facts=facts))])[0]
    (_, every), *classes = class_choices(model)["choices"]
    assert DrawRequest.of(model, class_label=every).class_labels == [0, 1, 2]
    chosen = {name: DrawRequest.of(model, class_label=value) for name, value in classes}
    assert {name: request.class_labels for name, request in chosen.items()} == {
        "1": [0],
        "2": [1],
        "3": [2],
    }
    drawn = Drawn(model.name, np.zeros((2, 8, 8, 1)), [1, 2])
    assert label_update(choose_drawn(model, drawn, 0)) == dict(classes)["2"]


def test_drawn_images_of_another_model_are_not_taken(model):
    images = np.stack([np.asarray(picture(i)) / 255 for i in range(2)])
    assert choose_drawn(model, Drawn("hair", images, None), 3).index == 1
    with pytest.raises(ValueError, match="draw images with this model first"):
        choose_drawn(model, Drawn("other", images, None), 0)


def test_work_in_a_thread_ends_at_the_next_call_when_its_generator_is_closed():
    network, problems = torch.nn.Identity(), []

    def work():
        try:
            while True:
                network(torch.zeros(1))
                time.sleep(0.01)
        except WorkStopped as error:
            problems.append(error)
            raise

    running = watched(network, work)
    next(running)
    running.close()
    assert len(problems) == 1
    assert threading.active_count() == 1 or not network._forward_pre_hooks


def test_the_card_loads_nothing(model):
    text = card_text(model)
    assert text.strip().startswith("# A card")
    assert "![" not in text
    assert "<img" not in text


@pytest.mark.slow
def test_curves_and_the_bound_of_a_picture_follow_from_the_model(model):
    snr = snr_curve(model)
    assert (snr["log SNR"].diff()[1:] < 0).all()
    assert error_curve(model)["RMSE"].iloc[0] == pytest.approx(0.1)
    bound = result_of(picture_bound(model, picture(), "red", 20))
    scheduler, x_0 = model.pipeline.scheduler, model.pipeline.encode_images(picture())
    from ddpm_hf import bits_per_dim

    def denoiser(x_t, t):
        return model.pipeline.unet(x_t, t, class_labels=torch.ones(len(x_t), dtype=torch.long))

    whole = bits_per_dim(denoiser, scheduler, x_0.repeat(64, 1, 1, 1), progress=False)
    error = np.hypot(bound.standard_error, whole.standard_error)
    assert abs(bound.value - whole.mean) < 4 * error  # z bound for fixed seeds


def test_a_training_image_is_found_as_its_own_nearest(model, tmp_path):
    for i in range(5):
        picture(i).save(tmp_path / f"{i}.png")
    images = TrainingSet.load(model, str(tmp_path))
    first, second = images.nearest(model, picture(2), 2)
    assert first.distance == pytest.approx(0, abs=1e-6)
    assert second.distance > 0.2
    assert images.share_closer(first.distance) == 0
    assert np.array_equal((first.image * 255).round(), np.asarray(picture(2)))


def test_the_limit_of_training_images_counts_the_channels_of_the_model(tmp_path, monkeypatch):
    model = load_models([str(save_ours(tmp_path / "grey" / "model"))])[0]
    (tmp_path / "images").mkdir()
    for i in range(4):
        picture(i).convert("L").save(tmp_path / "images" / f"{i}.png")
    monkeypatch.setattr("ddpm_hf.app.nearest_images.MAX_VALUES", 4 * 64)
    assert TrainingSet.load(model, str(tmp_path / "images")).pixels.shape == (4, 1, 8, 8)
    monkeypatch.setattr("ddpm_hf.app.nearest_images.MAX_VALUES", 4 * 64 - 1)
    with pytest.raises(ValueError, match="256 pixel values, more than 255"):
        TrainingSet.load(model, str(tmp_path / "images"))


@pytest.mark.slow
def test_gradio_client_calls_the_named_functions(model, tmp_path):
    from gradio_client import Client, handle_file

    from ddpm_hf.app.server import start

    page = start([model])
    client = Client(page.local_url, verbose=False, download_files=str(tmp_path))
    few = {"num_images": 2, "num_inference_steps": 3}
    images, python, command = client.predict(api_name="/draw", seed=4, class_label="red", **few)
    assert python.startswith("from ddpm_hf import")
    assert "--seed 4" in command
    paths = [item["image"] for item in images]
    assert Image.open(paths[0]).size == (8, 8)
    _, settings = client.predict(
        samplers=["DDIM", "HeunDiscrete"], steps=[3], num_images=1, api_name="/compare"
    )
    assert [s["network_calls"] for s in settings] == [3, 5]
    files = [handle_file(path) for path in paths]
    Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save(tmp_path / "mask.png")
    drawn, std = client.predict(
        image=files[0], mask=handle_file(tmp_path / "mask.png"), repetitions=1,
        api_name="/inpaint", **few,
    )  # fmt: skip
    assert len(drawn) == 2
    assert (np.asarray(Image.open(std).convert("L"))[~np.eye(8, dtype=bool)] == 0).all()
    varied, gain = client.predict(image=files[0], api_name="/image_to_image", **few)
    assert len(varied) == 2
    assert 0 < gain < 1
    few["num_images"] = 3
    between = client.predict(first=files[0], second=files[1], api_name="/interpolate", **few)
    assert len(between) == 3
    with pytest.raises(Exception, match=r"`num_images` must be in \[1, 64\]"):
        client.predict(num_images=10**9, api_name="/draw")
    with pytest.raises(Exception, match="`model` must be one of hair"):
        client.predict(model="/etc", api_name="/draw")
    page.close()


@pytest.mark.slow
def test_functions_that_call_a_network_get_the_gpu_of_a_space(model):
    """The decorator gets generator functions of plain values, as `spaces.GPU` does."""
    import inspect

    decorated = []

    def gpu(function):
        decorated.append(function)
        return function

    build_page(Site({model.name: model}, {}, gpu))
    assert len(decorated) == 9
    assert all(inspect.isgeneratorfunction(function) for function in decorated)


def test_the_bound_of_a_setting_is_that_of_the_card(model):
    row = {"num_inference_steps": 4, "bits_per_dim": 5.25, "standard_error": 0.1}
    facts = json.dumps({"calibration": {"rows": [row]}})
    (model.folder / "training.json").write_text(facts)
    options = {"num_images": 1, "seed": 0, "class_label": "red"}
    compared = compare_settings(model, ["DDPM", "DDIM"], [4, 5], **options)
    bounds = [setting.bits_per_dim for setting in compared if setting is not None]
    assert bounds == [5.25, None, None, None]


def test_a_setting_that_does_not_work_does_not_end_a_comparison(model):
    compared = compare_settings(model, ["DDIM", "Nonsense"], [3], num_images=1)
    first, second = [setting for setting in compared if setting is not None]
    assert first.images is not None
    assert "unknown scheduler" in str(second.problem)
    with pytest.raises(ValueError, match="at most 30 settings, got 40"):
        list(compare_settings(model, ["DDIM", "DDPM"], list(range(1, 21)), num_images=1))
    with pytest.raises(ValueError, match="choose at least one of `steps`"):
        list(compare_settings(model, ["DDIM"], None))


@pytest.mark.slow
def test_the_command_prints_the_address_when_the_page_answers(model, capsys):
    printed, answers = ["", ""], []

    def visit_and_press_ctrl_c():
        until = time.monotonic() + LIMIT_S
        while "Ctrl-C" not in printed[1] and time.monotonic() < until:
            printed[:] = map(str.__add__, printed, capsys.readouterr())
            time.sleep(0.05)
        try:
            with urllib.request.urlopen(printed[0].strip(), timeout=60) as answer:
                answers.append(answer.status)
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    visitor = threading.Thread(target=visit_and_press_ctrl_c)
    visitor.start()
    assert main(["app", str(model.folder)]) == 0
    visitor.join()
    assert answers == [200]
    assert printed[0].startswith("http://127.0.0.1:")
    assert printed[1] == "ddpm-hf: press Ctrl-C to stop\n"


@pytest.mark.slow
def test_a_port_in_use_is_named(model, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["app", str(model.folder), "--port", str(port)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"cannot listen on --host 127.0.0.1 and --port {port}" in line


def test_without_gradio_the_command_names_the_extra(model, monkeypatch, capsys):
    monkeypatch.setattr("ddpm_hf.commands.app.find_spec", lambda name: None)
    assert main(["app", str(model.folder)]) == 2
    assert "pip install '.[app]'" in capsys.readouterr().err
    assert main(["app", "/no/model"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stock", "grey, 16 bits", "unnamed classes"])
def test_any_model_that_loads_is_served(kind, tmp_path):
    if kind == "stock":
        save_stock(tmp_path / "model", tiny_unet(in_channels=3))
    elif kind == "grey, 16 bits":
        save_ours(tmp_path / "model", facts=image_facts_of("L", 8, 8, bit_depth=16))
    else:
        save_ours(tmp_path / "model", unet=tiny_unet(num_class_embeds=4))
    (served,) = load_models([str(tmp_path / "model")])
    build_page(Site({served.name: served}, {}))
    request = DrawRequest.of(served, num_images=2, num_inference_steps=3)
    *_, last = drawing_steps(served, request)
    picture().save(tmp_path / "x.png")
    image = open_upload(tmp_path / "x.png", served)
    assert image.mode == {"stock": "RGB", "grey, 16 bits": "I;16"}.get(kind, "L")
    edit = EditRequest.of(served, "vary", image, num_images=2, num_inference_steps=3)
    assert result_of(edit_picture(served, edit)).images.shape == last.images.shape
    taken = choose_drawn(served, Drawn(served.name, last.images, request.labels()), 1)
    assert taken.picture.mode == image.mode
    assert taken.label == (1 if kind == "unnamed classes" else None)
    assert np.isfinite(result_of(picture_bound(served, taken.picture, None, 4)).value)

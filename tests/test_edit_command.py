"""`ddpm-hf edit`: every kind of edit, resumed, and refused with one line."""

import json

import numpy as np
import pytest
from checkpoints import image_facts_of, tiny_scheduler, tiny_unet
from PIL import Image

from ddpm_hf import GaussianDDPMPipeline
from ddpm_hf.cli import main
from ddpm_hf.sampling.edit_options import EditOptions
from ddpm_hf.sampling.picture_edit import EditPictures, PictureEdit

NAMES = ("cat", "dog")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, class_names, recommended in (
        ("plain", None, None),
        ("pets", NAMES, None),
        ("swept", None, {"scheduler": "DPMSolverMultistep", "num_inference_steps": 6}),
    ):
        classes = None if class_names is None else len(class_names) + 1
        unet = tiny_unet(in_channels=3, num_class_embeds=classes)
        unet.register_to_config(_ddpm_hf=image_facts_of("RGB", 8, 8, class_names=class_names))
        scheduler = tiny_scheduler(recommended=recommended)
        GaussianDDPMPipeline(unet, scheduler).save_pretrained(folder / name)
    return folder


@pytest.fixture
def files(tmp_path):
    """A folder with photo.png, other.png and mask.png, of 8x8 pixels."""
    random = np.random.default_rng(0)
    for name in ("photo", "other"):
        pixels = random.integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 4:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path


def edit(models, files, *options, model="plain", output="edited", steps=4):
    words = [str(models / model), str(files / "photo.png"), "--output", str(files / output)]
    words += [] if steps is None else ["--num-inference-steps", str(steps)]
    return main(["edit", *words, *map(str, options)])


def pixels_of(path):
    return np.asarray(Image.open(path))


@pytest.mark.slow
def test_inpainting_keeps_the_black_part_and_shows_where_draws_differ(models, files, capsys):
    assert edit(models, files, "--mask", files / "mask.png", "--num-images", 3) == 0
    output = files / "edited"
    assert sorted(path.name for path in output.iterdir() if path.name[0] != ".") == [
        "000.png", "001.png", "002.png", "edit.json", "grid.png", "std.png",
    ]  # fmt: skip
    photo, std = pixels_of(files / "photo.png"), pixels_of(output / "std.png")
    for i in range(3):
        assert (pixels_of(output / f"00{i}.png")[:, :4] == photo[:, :4]).all()
    half = std.shape[1] // 2
    assert std[:, :half].max() == 0 < std[:, half:].max()
    record = json.loads((output / "edit.json").read_text())
    assert record["kind"] == "inpaint"
    assert record["settings"]["method"] == "repaint"
    assert record["settings"]["device"] == "cpu"
    assert str(files) not in (output / "edit.json").read_text()
    printed = capsys.readouterr().out
    assert "3 images in" in printed
    assert "standard deviation of a pixel: 0." in printed


def test_variations_state_how_much_of_the_picture_is_kept(models, files, capsys):
    assert edit(models, files, "--strength", 0.5, "--num-images", 2) == 0
    assert "% of the picture's contrast is kept" in capsys.readouterr().out
    assert (files / "edited" / "std.png").is_file()


@pytest.mark.slow
def test_an_interpolation_has_as_many_images_as_asked_for(models, files):
    assert edit(models, files, "--between", files / "other.png", "--num-images", 5) == 0
    assert len(list((files / "edited").glob("00*.png"))) == 5
    assert not (files / "edited" / "std.png").exists()


@pytest.mark.slow
def test_a_picture_is_drawn_as_another_class(models, files):
    options = ("--source-class", "dog", "--class-labels")
    for name in NAMES:
        assert edit(models, files, *options, name, model="pets", output=name) == 0
    cat, dog = (pixels_of(files / name / "000.png") for name in NAMES)
    assert (cat != dog).any()


@pytest.mark.slow
def test_the_same_command_again_draws_only_what_is_missing(models, files, monkeypatch):
    options = ("--mask", files / "mask.png", "--num-images", 4, "--batch-size", 2)
    assert edit(models, files, *options, output="whole") == 0
    calls = []
    inpaint = GaussianDDPMPipeline.inpaint

    def interrupted(self, *args, **kwargs):
        calls.append(kwargs["num_images"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return inpaint(self, *args, **kwargs)

    monkeypatch.setattr(GaussianDDPMPipeline, "inpaint", interrupted)
    assert edit(models, files, *options) == 130
    assert edit(models, files, *options) == 0
    assert calls == [2, 2, 2]  # the first batch was kept
    assert edit(models, files, *options) == 0
    assert len(calls) == 3
    for i in range(4):
        name = f"00{i}.png"
        assert (pixels_of(files / "edited" / name) == pixels_of(files / "whole" / name)).all()


@pytest.mark.slow
def test_draws_depend_on_the_seed_and_their_number_alone(models, files):
    options = ("--strength", 0.8, "--num-images", 3)
    assert edit(models, files, *options, "--batch-size", 3, output="a") == 0
    assert edit(models, files, *options, "--batch-size", 1, output="b") == 0
    assert edit(models, files, *options, "--seed", 1, output="c") == 0
    for i in range(3):
        a, b, c = (pixels_of(files / x / f"00{i}.png").astype(int) for x in "abc")
        assert np.abs(a - b).max() <= 1  # rounding of another batch size
        assert np.abs(a - c).max() > 1


@pytest.mark.slow
def test_another_edit_in_the_same_folder_is_refused_unless_told(models, files, capsys):
    assert edit(models, files, "--strength", 0.5, "--num-images", 2) == 0
    capsys.readouterr()
    assert edit(models, files, "--strength", 0.6, "--num-images", 2) == 2
    message = capsys.readouterr().err
    assert "contains an edit with another --strength" in message
    assert "--overwrite" in message
    assert edit(models, files, "--strength", 0.6, "--num-images", 2, "--overwrite") == 0


@pytest.mark.slow
def test_a_folder_with_other_files_is_left_alone(models, files, capsys):
    (files / "edited").mkdir()
    (files / "edited" / "mine.txt").write_text("mine")
    assert edit(models, files, "--strength", 0.5) == 2
    assert "contains other files: choose another --output" in capsys.readouterr().err
    assert (files / "edited" / "mine.txt").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--strength", 1.5], "--strength must be at most 1, got 1.5"),
        (["--strength", 0], "strength must be"),
        (["--strength", 0.1], "less than one step; pass at least 0.25"),
        (["--strength", 0.5, "--log-snr", 0], "--strength and --log-snr exclude each other"),
        (["--mask", "nothing.png"], "nothing.png is not a file"),
        (["--source-class", "dog"], "--source-class needs --class-labels"),
        (["--class-labels", "cat", "dog"], "--class-labels must be one class"),
        (["--class-labels", "cat"], "was not trained on classes: leave out --class-labels"),
    ],
)
def test_bad_options_are_one_line_with_the_fix(models, files, capsys, options, message):
    assert edit(models, files, *options) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "Traceback" not in error
    assert not (files / "edited").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (
            Image.new("RGB", (9, 8)),
            "PICTURE must have 8x8 pixels, as the images of this model, got",
        ),
        (
            Image.new("RGBA", (8, 8)),
            "PICTURE must have mode RGB, as the images of this model, got RGBA with transparency",
        ),
    ],
)
def test_a_picture_that_does_not_fit_the_model_is_refused(models, files, capsys, picture, message):
    picture.save(files / "photo.png")
    assert edit(models, files) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["P", "RGBA"])
def test_an_opaque_picture_is_converted_without_loss(mode):
    pipeline = GaussianDDPMPipeline(tiny_unet(in_channels=3), tiny_scheduler())
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8))
    photo = photo.quantize(64) if mode == "P" else photo.convert(mode)
    edit = PictureEdit(pipeline, EditPictures(photo, None, None), EditOptions())
    assert edit._image.mode == "RGB"
    assert edit._image.convert("RGBA").tobytes() == photo.convert("RGBA").tobytes()


def test_a_file_that_is_no_picture_is_named(models, files, capsys):
    (files / "mask.png").write_text("<html>")
    assert edit(models, files, "--mask", files / "mask.png") == 2
    assert "mask.png cannot be read: not a picture" in capsys.readouterr().err


def test_a_truncated_picture_is_named_as_such(models, files, capsys):
    Image.effect_noise((64, 64), 50).save(files / "cut.jpg")
    (files / "cut.jpg").write_bytes((files / "cut.jpg").read_bytes()[:-200])
    assert edit(models, files, "--mask", files / "cut.jpg") == 2
    assert "cut.jpg cannot be read: image file is truncated" in capsys.readouterr().err


@pytest.mark.slow
def test_an_empty_mask_and_a_full_one_are_refused(models, files, capsys):
    for value, word in ((0, "empty"), (255, "full")):
        Image.new("L", (8, 8), value).save(files / "mask.png")
        assert edit(models, files, "--mask", files / "mask.png") == 2
        assert f"--mask is {word}" in capsys.readouterr().err
    Image.new("L", (9, 8), 255).save(files / "mask.png")
    assert edit(models, files, "--mask", files / "mask.png") == 2
    assert "--mask must have the size of the image" in capsys.readouterr().err


def settings_of(folder):
    return json.loads((folder / "edit.json").read_text())["settings"]


def test_the_recommended_setting_is_used_and_printed(models, files, capsys):
    options = {"model": "swept", "steps": None}
    assert edit(models, files, "--num-images", 1, **options) == 0
    printed = capsys.readouterr().err
    assert "DPMSolverMultistep in 6 steps, as recommended" in printed
    assert "--thorough" in printed
    settings = settings_of(files / "edited")
    assert settings["num_inference_steps"] == 6
    assert settings["scheduler_config"]["_class_name"] == "DPMSolverMultistepScheduler"
    thorough = {"output": "thorough", **options}
    assert edit(models, files, "--num-images", 1, "--thorough", **thorough) == 0
    assert "recommended" not in capsys.readouterr().err
    settings = settings_of(files / "thorough")
    assert settings["scheduler_config"]["_class_name"] == "DDPMScheduler"


def test_a_recommended_solver_leaves_inpainting_to_ddpm(models, files, capsys):
    options = ("--mask", files / "mask.png", "--num-images", 1, "--jump-n-sample", 1)
    assert edit(models, files, *options, model="swept", steps=None) == 0
    assert "recommended" not in capsys.readouterr().err
    assert settings_of(files / "edited")["num_inference_steps"] == 20
    assert edit(models, files, *options, "--scheduler", "UniPCMultistep", "--overwrite") == 2
    assert "--scheduler must be DDPM or DDIM to inpaint, got UniPC" in capsys.readouterr().err


def test_ddim_inpaints_with_deterministic_steps_unless_told(models, files):
    options = ("--mask", files / "mask.png", "--num-images", 1, "--jump-n-sample", 1)
    drawn = {}
    for name in ("DDIM", "DDIM:eta=0", "DDIM:eta=1", "DDPM", "DDPM:eta=1"):
        folder = name.replace(":", "-")
        assert edit(models, files, *options, "--scheduler", name, output=folder) == 0
        drawn[name] = pixels_of(files / folder / "000.png")
    assert (drawn["DDIM"] == drawn["DDIM:eta=0"]).all()
    assert (drawn["DDIM"] != drawn["DDIM:eta=1"]).any()
    assert (drawn["DDPM"] == drawn["DDPM:eta=1"]).all()


def test_variations_run_on_the_scheduler_of_the_command(models, files):
    assert edit(models, files, "--num-images", 1, "--scheduler", "UniPCMultistep") == 0
    config = settings_of(files / "edited")["scheduler_config"]
    assert config["_class_name"] == "UniPCMultistepScheduler"


def test_a_grey_picture_is_edited_by_a_colour_model(models, files):
    Image.open(files / "photo.png").convert("L").save(files / "photo.png")
    assert edit(models, files, "--strength", 0.5, "--num-images", 1) == 0
    assert pixels_of(files / "edited" / "000.png").shape == (8, 8, 3)

"""`ddpm-hf sample`: kinds of models, schedulers, file formats and error messages."""

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from diffusers.utils.import_utils import is_torchsde_available
from PIL import Image

from ddpm_hf import GaussianDDPMPipeline, GaussianDDPMScheduler
from ddpm_hf.cli import main
from ddpm_hf.pictures import quantised
from ddpm_hf.sampling import draw_images
from ddpm_hf.sampling.options import OutputOptions
from ddpm_hf.scheduler_spec import SCHEDULERS

T = 60


def build_unet(num_channels=3, facts=None, **config):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=num_channels,
        out_channels=num_channels,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        **config,
    )
    if facts is not None:
        unet.register_to_config(_ddpm_hf={"format_version": 1, **facts})
    return unet


def save(folder, unet, **options):
    scheduler = GaussianDDPMScheduler(
        num_train_timesteps=T, beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing"
    )
    GaussianDDPMPipeline(unet, scheduler).save_pretrained(folder, **options)
    return folder


def image_of(mode, bit_depth=8):
    return {"mode": mode, "height": 8, "width": 8, "bit_depth": bit_depth}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of models by the kind of their images."""
    root = tmp_path_factory.mktemp("models")
    classes = {"image": image_of("RGB"), "class_names": ["cat", "7"]}
    unets = {
        "two channels": build_unet(2),
        "LA": build_unet(2, {"image": image_of("LA")}),
        "RGB": build_unet(3),
        "five channels": build_unet(5),
        "16-bit grey": build_unet(1, {"image": image_of("L", 16)}),
        "16-bit RGB": build_unet(3, {"image": image_of("RGB", 16)}),
        "classes": build_unet(3, classes, num_class_embeds=3),  # the last one is the null class
    }
    return {name: save(root / name, unet) for name, unet in unets.items()}


def sample(model, *options, steps="2"):
    assert main(["sample", str(model), "--num-inference-steps", steps, *options]) == 0


def error_of(capsys, model, *options):
    """The error line of a command with invalid options."""
    assert main(["sample", str(model), *options]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:PNG files keep 8")
@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("two channels", "LA"),
        ("LA", "LA"),
        ("RGB", "RGB"),
        ("16-bit grey", "I;16"),
        ("16-bit RGB", "RGB"),
    ],
)
def test_image_files_and_arrays_hold_the_pixels_of_each_model(models, tmp_path, kind, mode):
    sample(models[kind], "--num-images", "2", "--output", str(tmp_path / "all"))
    sample(models[kind], "--num-images", "2", "--output", str(tmp_path / "all.npz"))
    sample(models[kind], "--num-images", "2", "--output", str(tmp_path / "all.npy"))
    pictures = [Image.open(path) for path in sorted((tmp_path / "all").iterdir())]
    assert [picture.mode for picture in pictures] == [mode, mode]
    with np.load(tmp_path / "all.npz") as file:
        pixels = file["arr_0"]
    exact = np.load(tmp_path / "all.npy")
    bit_depth = 16 if "16" in kind else 8
    assert (pixels.dtype, exact.dtype) == (np.dtype(f"uint{bit_depth}"), np.float32)
    np.testing.assert_array_equal(pixels, quantised(exact, bit_depth))
    if kind != "16-bit RGB":
        read = np.stack([np.asarray(picture) for picture in pictures]).reshape(pixels.shape)
        np.testing.assert_array_equal(read, pixels)


@pytest.mark.slow
def test_five_channels_are_saved_as_a_grid_or_an_array(models, tmp_path, capsys):
    five = models["five channels"]
    error = error_of(capsys, five, "--output", str(tmp_path / "folder"))
    assert "the 5 channels of this model" in error
    assert "choose a path that ends in .npz" in error
    sample(five, "--num-images", "1", "--output", str(tmp_path / "grid.png"))
    assert Image.open(tmp_path / "grid.png").size == (5 * 48, 48)  # the channels side by side
    sample(five, "--num-images", "2", "--output", str(tmp_path / "x"), "--format", "npz")
    with np.load(tmp_path / "x.npz") as file:
        assert file["arr_0"].shape == (2, 8, 8, 5)


@pytest.mark.slow
@pytest.mark.filterwarnings("always:PNG files keep 8")
def test_png_files_of_16_bit_colour_give_a_warning(models, tmp_path, capsys):
    sample(models["16-bit RGB"], "--num-images", "1", "--output", str(tmp_path / "all"))
    assert "an output that ends in .npz keeps all" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_samples_in_its_usual_number_of_steps(models, tmp_path, name):
    output = tmp_path / "x.npy"
    arguments = ["--scheduler", name, "--num-images", "1", "--output", str(output)]
    assert main(["sample", str(models["RGB"]), *arguments]) == 0
    assert np.isfinite(np.load(output)).all()


def test_every_compatible_scheduler_of_diffusers_is_listed():
    names = set(GaussianDDPMScheduler._compatibles) - {"EDMEulerScheduler"}  # has its own noise
    if not is_torchsde_available():
        names -= {"DPMSolverSDEScheduler"}
    assert {name.removesuffix("Scheduler") for name in names} <= set(SCHEDULERS)
    assert all(hasattr(diffusers, f"{name}Scheduler") for name in SCHEDULERS)


@pytest.mark.slow
def test_scheduler_and_spacing_give_the_images_of_the_python_interface(models, tmp_path):
    options = ("--scheduler", "DDIM", "--timestep-spacing", "linspace", "--num-images", "1")
    sample(models["RGB"], *options, "--output", str(tmp_path / "x.npy"), steps="7")
    pipeline = GaussianDDPMPipeline.from_pretrained(models["RGB"])
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="linspace"
    )
    (image,) = draw_images(pipeline, 1, num_inference_steps=7, progress=False)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy")[0], image)


@pytest.mark.slow
def test_calibrated_timesteps_give_the_images_of_the_python_interface(models, tmp_path, capsys):
    pipeline = GaussianDDPMPipeline.from_pretrained(models["RGB"])
    mse = torch.linspace(0.01, 0.5, T)
    pipeline.scheduler = GaussianDDPMScheduler.from_config(pipeline.scheduler.config, x_0_mse=mse)
    pipeline.save_pretrained(tmp_path / "model")
    chosen, output = ("--timestep-spacing", "likelihood"), str(tmp_path / "x.npy")
    sample(tmp_path / "model", *chosen, "--num-images", "1", "--output", output, steps="4")
    pipeline.scheduler.set_timesteps(4, timestep_spacing="likelihood")
    timesteps = pipeline.scheduler.timesteps.tolist()
    (image,) = draw_images(pipeline, 1, timesteps=timesteps, progress=False)
    np.testing.assert_array_equal(np.load(output)[0], image)
    without_steps = ["sample", str(tmp_path / "model"), *chosen]
    assert main(without_steps) == 2
    needs_steps = "--timestep-spacing likelihood needs --num-inference-steps"
    assert needs_steps in capsys.readouterr().err
    chosen = (*chosen, "--num-inference-steps", "4")
    for options, message in (
        (chosen, "ddpm-hf calibrate"),
        ((*chosen, "--scheduler", "DDIM"), "DDIMScheduler does not support --timestep-spacing"),
    ):
        output = ("--output", str(tmp_path / "y.npy"))
        assert message in error_of(capsys, models["RGB"], *options, *output)


def drawn(model, output, *options):
    sample(model, "--output", str(output), *options)
    return np.load(output)


@pytest.mark.slow
def test_class_labels_are_names_or_numbers(models, tmp_path):
    model, files = models["classes"], iter(tmp_path / f"{i}.npy" for i in range(9))
    four = ("--num-images", "4")
    every = drawn(model, next(files), *four)
    by_name = drawn(model, next(files), *four, "--class-labels", "cat", "7")
    by_number = drawn(model, next(files), *four, "--class-labels", "0", "1")
    np.testing.assert_array_equal(every, by_name)  # the null class is not one of them
    np.testing.assert_array_equal(every, by_number)
    cats = drawn(model, next(files), *four, "--class-labels", "cat")
    is_equal = [np.array_equal(a, b) for a, b in zip(cats, every, strict=True)]
    assert is_equal == [True, False, True, False]
    in_parts = drawn(model, next(files), *four, "--batch-size", "3")
    # Convolutions of another batch size may round the last bit of float32 differently.
    np.testing.assert_allclose(in_parts, every, atol=1e-5)


@pytest.mark.slow
def test_guidance_changes_the_images(models, tmp_path):
    model, two = models["classes"], ("--num-images", "2", "--class-labels", "cat")
    plain = drawn(model, tmp_path / "a.npy", *two)
    guided = drawn(model, tmp_path / "b.npy", *two, "--guidance-scale", "3")
    assert not np.array_equal(plain, guided)
    drawn(model, tmp_path / "c.npy", *two, "--scheduler", "EulerDiscrete")  # it has no eta


@pytest.mark.slow
def test_guide_and_guidance_interval_and_a_grid_with_a_row_per_class(models, tmp_path):
    model, two = models["classes"], ("--num-images", "2", "--class-labels", "cat")
    plain = drawn(model, tmp_path / "a.npy", *two)
    guided = drawn(model, tmp_path / "b.npy", *two, "--guide", str(models["classes"]))
    # A model guided by itself gives its own images, up to rounding.
    np.testing.assert_allclose(guided, plain, atol=1e-4)
    scale = ("--guidance-scale", "3")
    outside = drawn(model, tmp_path / "c.npy", *two, *scale, "--guidance-interval", "90", "99")
    np.testing.assert_array_equal(outside, plain)
    inside = drawn(model, tmp_path / "d.npy", *two, *scale, "--guidance-interval", "-90", "90")
    assert not np.allclose(inside, plain, atol=1e-4)
    three = ("--num-images", "3", "--class-labels", "cat", "0", "--num-inference-steps", "2")
    assert main(["sample", str(model), "--output", str(tmp_path / "x.png"), *three]) == 0
    with Image.open(tmp_path / "x.png") as grid:
        assert grid.width > grid.height  # two rows of two images, one empty, with names


@pytest.mark.slow
def test_variant_selects_the_weights(models, tmp_path, capsys):
    model = save(tmp_path / "half", build_unet(), variant="fp16")
    output = ("--output", str(tmp_path / "x.npy"))
    assert "no weights without a variant: pass --variant 'fp16'" in error_of(capsys, model, *output)
    missing = error_of(capsys, models["RGB"], *output, "--variant", "fp16")
    assert "has no --variant 'fp16': leave out --variant" in missing
    images = drawn(model, tmp_path / "x.npy", "--variant", "fp16")
    np.testing.assert_array_equal(images, drawn(models["RGB"], tmp_path / "y.npy"))


@pytest.mark.slow
def test_allow_pickle_loads_pickled_weights(models, tmp_path, capsys):
    model = save(tmp_path / "old", build_unet())
    (model / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(build_unet().state_dict(), model / "unet" / "diffusion_pytorch_model.bin")
    assert "--allow-pickle" in error_of(capsys, model, "--output", str(tmp_path / "x.npy"))
    images = drawn(model, tmp_path / "x.npy", "--allow-pickle")
    np.testing.assert_array_equal(images, drawn(models["RGB"], tmp_path / "y.npy"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("RGB", ["--class-labels", "cat"], "leave out --class-labels"),
        ("RGB", ["--guidance-scale", "2"], "--guidance-scale"),
        ("classes", ["--guidance-interval", "-3", "4"], "needs --guidance-scale or --guide"),
        ("classes", ["--class-labels", "dog"], "'cat', '7'"),
        ("classes", ["--class-labels", "3"], "[0, 1]"),
        ("RGB", ["--scheduler", "EulerDiscrete", "--eta", "0"], "--eta"),
        ("RGB", ["--num-inference-steps", "61"], "--num-inference-steps must be"),
        ("RGB", ["--num-inference-steps", "0"], "--num-inference-steps must be at least 1, got 0"),
        ("RGB", ["--num-images", "0"], "--num-images must be at least 1, got 0"),
        (
            "RGB",
            ["--scheduler", "DIM"],
            "--scheduler: unknown scheduler 'DIM'",
        ),
        ("RGB", ["--thorough", "--eta", "0"], "--thorough cannot be combined with --eta"),
        (
            "RGB",
            ["--scheduler", "DPMSolverSinglestep", "--timestep-spacing", "trailing"],
            "DPMSolverSinglestepScheduler does not support --timestep-spacing=trailing",
        ),
        (
            "RGB",
            ["--scheduler", "DDIM", "--timestep-spacing", "quadratic"],
            "DDIMScheduler does not support --timestep-spacing=quadratic",
        ),
        (
            "RGB",
            ["--scheduler", "DPMSolverMultistep:solver_ordr=1"],
            "does not support `solver_ordr`=1 (did you mean 'solver_order'",
        ),
        ("RGB", ["--format", "npz"], "--format npz does not match --output"),
    ],
)
def test_errors_name_flags(models, tmp_path, capsys, kind, options, message):
    assert message in error_of(capsys, models[kind], "--output", str(tmp_path / "x.npy"), *options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("output", "file_format", "expected"),
    [
        (None, None, "samples.png"),
        (None, "npz", "samples.npz"),
        ("folder", None, "folder"),
        ("folder", "png", "folder"),
        ("grid.jpg", "png", "grid.jpg"),
        ("run.v1", "npy", "run.v1.npy"),
        ("x.npz", None, "x.npz"),
        ("x.npz", "npz", "x.npz"),
    ],
)
def test_output_and_format_determine_the_path(output, file_format, expected):
    assert OutputOptions(output=output, format=file_format).output_path() == Path(expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grid.png", "x.npz", "folder"])
def test_existing_images_are_replaced_only_with_overwrite(models, tmp_path, capsys, name):
    output = tmp_path / name
    options = ("--num-images", "1", "--output", str(output))
    sample(models["RGB"], *options)
    file = output if output.is_file() else output / "00000.png"
    before = file.read_bytes()
    error = error_of(capsys, models["RGB"], *options, "--seed", "1")
    assert "pass --overwrite to replace them" in error
    assert file.read_bytes() == before
    sample(models["RGB"], *options, "--seed", "1", "--overwrite")
    assert file.read_bytes() != before


def test_existing_images_are_reported_before_the_model_is_loaded(tmp_path, capsys):
    (tmp_path / "x.png").touch()
    assert "pass --overwrite" in error_of(capsys, "no/model", "--output", str(tmp_path / "x.png"))


def test_a_tilde_is_the_home_directory(models, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").symlink_to(models["RGB"])
    sample("~/model", "--num-images", "1", "--output=~/x.png")
    assert (tmp_path / "x.png").is_file()


@pytest.mark.slow
@pytest.mark.filterwarnings("always:`timestep_spacing`")
def test_a_warning_is_one_line_without_source_location(models, tmp_path, capsys):
    output = ("--output", str(tmp_path / "x.png"))
    sample(models["RGB"], "--timestep-spacing", "leading", *output)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert line.lstrip().startswith("ddpm-hf: warning: --timestep-spacing 'leading' starts at")

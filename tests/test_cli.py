"""The command line: option parser, recipes, error messages, exit statuses and image grids."""

import inspect
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image

from ddpm_hf import GaussianDDPMPipeline, GaussianDDPMScheduler
from ddpm_hf.cli import main, run_command
from ddpm_hf.commands.messages import command_messages
from ddpm_hf.data import ImageFacts
from ddpm_hf.diffusion.image_format import size_multiple
from ddpm_hf.option_parser import parse_options
from ddpm_hf.options import (
    REQUIRED,
    OptionError,
    Options,
    flags_in_message,
    option,
    takes_options,
)
from ddpm_hf.pictures import image_grid
from ddpm_hf.training import ConfigError, TrainingError, build_unet, parse_config
from ddpm_hf.utils.text import counted


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    folder = tmp_path_factory.mktemp("model")
    scheduler = GaussianDDPMScheduler(num_train_timesteps=12, beta_schedule="squaredcos_cap_v2")
    GaussianDDPMPipeline(unet, scheduler).save_pretrained(folder)
    return folder


def sampled(model, output, *more):
    assert main(["sample", str(model), "--output", str(output), *more]) == 0
    return [np.asarray(Image.open(path)) for path in sorted(output.glob("*.png"))]


@pytest.mark.slow
def test_an_image_does_not_depend_on_the_batch_size(model, tmp_path):
    five = sampled(model, tmp_path / "a", "--num-images", "5", "--batch-size", "5")
    three = sampled(model, tmp_path / "b", "--num-images", "3", "--batch-size", "2")
    assert len(five) == 5
    for one, other in zip(five[:3], three, strict=True):
        # Convolutions of another batch size may round to another 8-bit level.
        assert np.abs(one.astype(int) - other).max() <= 1


# With few steps, the scheduler warns about the gap before the first one.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`timestep_spacing`")
def test_seed_steps_and_eta_change_the_images(model, tmp_path):
    few = ("--num-images", "1")
    base = sampled(model, tmp_path / "base", *few)[0]
    for i, more in enumerate((["--seed", "1"], ["--num-inference-steps", "3"], ["--eta", "0"])):
        assert not np.array_equal(base, sampled(model, tmp_path / str(i), *few, *more)[0])


@pytest.mark.slow
def test_a_png_output_is_an_enlarged_grid(model, tmp_path):
    path = tmp_path / "new" / "grid.png"
    assert main(["sample", str(model), "--num-images", "4", "--output", str(path)]) == 0
    assert Image.open(path).size == (2 * 256 + 2, 2 * 256 + 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "MODEL/unet"], "it has no model_index.json; did you mean MODEL?"),
        (["sample", "MODEL", "--eta", "2"], "--eta must be in [0, 1], got 2"),
        (["sample", "MODEL", "--num-inference-steps", "13"], "got 13"),
        (["push", "MODEL", "not/a/repo"], "not/a/repo"),
        (["push", "MODEL/unet", "user/repo"], "model_index.json"),
    ],
)
def test_invalid_input_gives_one_line_and_status_2(model, capsys, arguments, message):
    assert main([a.replace("MODEL", str(model)) for a in arguments]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("ddpm-hf: error:")
    assert message.replace("MODEL", str(model)) in last


def test_a_dry_run_lists_the_files_without_a_connection(model, capsys):
    assert main(["push", str(model), "user/repo", "--dry-run"]) == 0
    listing = capsys.readouterr().out
    assert "unet/diffusion_pytorch_model.safetensors" in listing
    assert "model_index.json" in listing


# Options


RECIPES = sorted(Path(__file__).parents[1].glob("training/recipes/*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_of_the_project_can_be_read(recipe, monkeypatch):
    monkeypatch.chdir(recipe.parents[2])  # paths in recipes are relative to the project
    config = parse_config(["photos", "--config", str(recipe)])
    if config.unet_config is not None:
        assert json.loads(Path(config.unet_config).read_text())


@pytest.mark.slow
def test_the_cifar10_recipe_trains_the_network_of_the_paper():
    unet = build_unet(
        ImageFacts("RGB", 32, 32), "cuda", str(RECIPES[0].parent / "cifar10_unet.json")
    )
    # 2006.11239, appendix B: "Our CIFAR10 model has 35.7 million parameters"
    assert round(sum(p.numel() for p in unet.parameters()) / 1e6, 1) == 35.7


@pytest.mark.slow
@pytest.mark.parametrize("size", [8, 12, 28, 32, 64, 100, 256])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_proposed_network_supports_images_of_any_size(size, device):
    with torch.device("meta"):
        unet = build_unet(ImageFacts("L", size, size + 4), device)
        height, width = (
            -(-n // size_multiple(unet)) * size_multiple(unet) for n in (size, size + 4)
        )
        output = unet(torch.zeros(1, 1, height, width), torch.zeros(1)).sample
    assert output.shape == (1, 1, height, width)
    assert (height - size) * 8 <= max(size, 8) * 2  # little padding


def test_flags_override_the_recipe_and_the_recipe_overrides_defaults(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rate: 2e-4\nbatch_size: 8\nrandom_flip: true\n")
    config = parse_config(["photos", "--config", str(recipe), "--batch-size", "16"])
    assert (config.dataset, config.learning_rate, config.batch_size) == ("photos", 2e-4, 16)
    assert config.random_flip is True
    assert config.ema_decay == 0.9999


def test_a_configuration_is_equal_after_a_round_trip_through_yaml(tmp_path):
    config = parse_config(["photos", "--resolution", "32", "--crop", "random", "--random-flip"])
    (tmp_path / "recipe.yaml").write_text(config.to_yaml())
    assert parse_config(["--config", str(tmp_path / "recipe.yaml")]) == config


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("lerning_rate: 1\n", "learning_rate"),
        ("learning_rate: [1]\n", "learning_rate"),
        ("batch_size: 2.5\n", "batch_size"),
        ("crop: left\n", "center"),
        ("ema_decay: 1.0\n", "ema_decay"),
        ("- a list\n", "option: value"),
        ("a: b: c\n", "recipe.yaml"),
    ],
)
def test_an_invalid_recipe_raises_an_error_with_the_reason(tmp_path, recipe, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    with pytest.raises((ConfigError, SystemExit), match=message):
        parse_config(["photos", "--config", str(path)])


TINY = {
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
}


@pytest.mark.slow
def test_a_resume_error_ends_with_options_for_a_new_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for value in (0, 128, 255):
        Image.new("RGB", (8, 8), (value, 0, 0)).save(f"photos/{value}.png")
    Path("unet.json").write_text(json.dumps(TINY))
    network = ["--unet-config", "unet.json", "--beta-schedule", "chen_sigmoid"]
    length = ["--batch-size", "1", "--num-samples", "0", "--lr-warmup-steps", "0"]
    command = ["train", "photos", *network, *length]
    assert main([*command, "--max-train-steps", "1"]) == 0
    assert "1 update of 1 image (0 epochs)" in capsys.readouterr().out
    # Another learning rate needs a new run, also if the options come from the saved recipe.
    same = ["train", "--config", "runs/photos/config.yaml", "--learning-rate", "3e-3"]
    assert main(same) == 2
    *_, hint = capsys.readouterr().err.strip().split(": add ")
    assert hint == (
        "--output-dir runs/photos-2 for a new network, and also --pretrained runs/photos/model to"
        " fine-tune the weights"
    )
    fine_tuned = ["--output-dir", "runs/photos-2", "--pretrained", "runs/photos/model"]
    assert main([*same, *fine_tuned]) == 0
    assert Path("runs/photos-2/model/model_index.json").is_file()
    # More images need a new run, too.
    Image.new("RGB", (8, 8), (50, 0, 0)).save("photos/more.png")
    assert main([*command, "--max-train-steps", "1"]) == 2
    assert capsys.readouterr().err.strip().endswith(hint)
    Path("photos/more.png").unlink()
    # A longer run resumes; its learning rate rises again: 2e-3 (1 + cos(pi / 2)) / 2.
    assert main([*command, "--max-train-steps", "2"]) == 0
    assert "the learning rate goes from 0.002 to 0.001" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "recipe"),
    [("pretrained", "unet_config"), ("unet_config", "pretrained")],
)
def test_a_flag_removes_the_excluded_option_of_the_recipe(tmp_path, flag, recipe):
    (tmp_path / "r.yaml").write_text(f"dataset: x\n{recipe}: a\n")
    option = "--" + flag.replace("_", "-")
    config = parse_config(["--config", str(tmp_path / "r.yaml"), option, "b"])
    assert (getattr(config, flag), getattr(config, recipe)) == ("b", None)


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 images"), (1, "1 image"), (2000, "2,000 images")]
)
def test_counted_nouns_are_singular_or_plural(number, text):
    assert counted(number, "image") == text


@pytest.mark.parametrize(
    ("argv", "flip"),
    [
        (["--random-flip", "./photos"], True),
        (["./photos", "--random-flip"], True),
        (["--random-flip", "--seed", "1", "./photos"], True),
        (["--random-flip", "false", "./photos"], False),
        (["./photos"], False),
    ],
)
def test_a_switch_does_not_take_the_dataset_as_its_value(argv, flip):
    config = parse_config(argv)
    assert (config.dataset, config.random_flip) == ("./photos", flip)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["x", "--output-dir", ""], "`output_dir` must not be empty"),
        (["x", "--seed", str(2**32)], r"`seed` must be in \[0, 4294967295\]"),
    ],
)
def test_a_training_option_out_of_range_is_named(argv, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(argv)


def test_no_in_a_recipe_is_a_mixed_precision_mode(tmp_path):
    (tmp_path / "r.yaml").write_text("dataset: x\nmixed_precision: no\n")
    assert parse_config(["--config", str(tmp_path / "r.yaml")]).mixed_precision == "no"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "must hold a JSON object"),
        ('{"blok_out_channels": [8, 8]}', "did you mean 'block_out_channels'"),
        ('{"in_channels": "3"}', "unet_config"),
        ("{", "unet_config"),
    ],
)
def test_an_invalid_network_file_raises_an_error_with_the_reason(tmp_path, content, message):
    file = tmp_path / "unet.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        build_unet(ImageFacts("L", 8, 8), "cpu", str(file))


def test_missing_channels_and_classes_of_a_network_file_follow_the_images(tmp_path):
    file = tmp_path / "unet.json"
    levels = {"block_out_channels": [32, 32], "down_block_types": ["DownBlock2D"] * 2}
    levels["up_block_types"] = ["UpBlock2D"] * 2
    learned = GaussianDDPMScheduler(
        20, beta_schedule="squaredcos_cap_v2", variance_type="learned_range"
    )
    file.write_text(json.dumps({**levels, "num_class_embeds": None}))
    config = build_unet(ImageFacts("RGB", 8, 8), "cpu", str(file), learned, 4).config
    assert (config.in_channels, config.out_channels, config.num_class_embeds) == (3, 6, 5)
    file.write_text(json.dumps({**levels, "in_channels": 1, "num_class_embeds": 9}))
    config = build_unet(ImageFacts("RGB", 8, 8), "cpu", str(file), learned, 4).config
    assert (config.in_channels, config.num_class_embeds) == (
        1,
        9,
    )  # an error later


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (TrainingError("lost"), 1, "error: lost"),
        (OSError("disk"), 1, "error: disk"),
        (ConfigError("bad"), 2, "error: bad"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_a_failed_command_prints_one_line(error, status, message, capsys):
    def command(argv):
        raise error

    assert run_command(command, []) == status
    assert capsys.readouterr().err.strip().endswith(message)


@dataclass(frozen=True, kw_only=True)
class Source(Options):
    folder: Path = option(REQUIRED, "where", is_positional=True, is_path=True, metavar="FOLDER")


@dataclass(frozen=True, kw_only=True)
class Command(Source):
    num_images: int = option(16, "number of images", minimum=1)
    eta: float | None = option(None, "noise", minimum=0, maximum=1)
    class_labels: list[str] | None = option(None, "classes", metavar="CLASS")
    interval: tuple[float, float] | None = option(None, "range", metavar=("LOW", "HIGH"))
    bit_depth: Literal[8, 16] | None = option(None, "95 % of images have 8 bits")
    use_safetensors: bool = option(True, "load pickled weights", flag="--allow-pickle")
    overwrite: bool = option(False, "replace `folder`; see `num_images`")
    compile: bool | None = option(None, "compile the network")


def parsed(*argv):
    return parse_options(Command, argv, prog="command", usage="FOLDER", description="text")


@pytest.mark.parametrize(
    ("argv", "values"),
    [
        ([], {}),
        (["--num-images", "3", "--eta", "1"], {"num_images": 3, "eta": 1.0}),
        (["--class-labels", "cat", "7", "--eta", "0"], {"class_labels": ["cat", "7"], "eta": 0}),
        (["--interval", "-3", "4"], {"interval": (-3.0, 4.0)}),
        (["--bit_depth", "16"], {"bit_depth": 16}),
        (["--allow-pickle", "--overwrite"], {"use_safetensors": False, "overwrite": True}),
        (["--overwrite", "false", "--compile=no"], {"compile": False}),
        (["--no-overwrite", "--no-compile"], {"compile": False}),
    ],
)
@pytest.mark.parametrize("is_first", [True, False], ids=["folder first", "folder last"])
def test_a_command_line_is_parsed_into_the_dataclass_of_options(argv, values, is_first):
    words = ["~/x", *argv] if is_first else [*argv, "~/x"]
    assert parsed(*words) == Command(folder="~/x", **values)
    assert parsed(*words).folder == Path.home() / "x"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num-images", "0"], "--num-images must be at least 1, got 0"),
        (["--eta", "1.5"], "--eta must be in [0, 1], got 1.5"),
        (["--eta", "nan"], "--eta must be in [0, 1], got nan"),
        (["--bit-depth", "12"], "--bit-depth must be one of [8, 16], got '12'"),
    ],
)
def test_the_dataclass_checks_the_values_of_the_command_line(argv, message):
    with pytest.raises(OptionError) as caught:
        parsed("x", *argv)
    assert flags_in_message(str(caught.value), Command) == message


@pytest.mark.parametrize("argv", [[], ["x", "y"], ["x", "--num", "1"], ["x", "--num-images", "a"]])
def test_missing_and_unknown_arguments_end_with_status_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        parsed(*argv)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: command FOLDER")


def test_an_unparsable_value_is_reported_with_the_dashed_flag(capsys):
    with pytest.raises(SystemExit):
        parsed("x", "--num-images", "a")
    assert "error: argument --num-images: invalid int value: 'a'" in capsys.readouterr().err


def test_the_help_shows_dashed_flags_choices_and_defaults(capsys):
    with pytest.raises(SystemExit) as caught:
        parsed("--help")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "--num-images N number of images (default: 16)",
        "--interval LOW HIGH range",
        "--bit-depth {8,16} 95 % of images have 8 bits",
        "--overwrite replace FOLDER; see --num-images",
        "--compile, --no-compile compile the network",
        "--allow-pickle load pickled weights",
    ):
        assert part in text
    assert "_" not in text


@pytest.mark.parametrize(
    ("message", "with_flags"),
    [
        ("`num_images` must be at least 1", "--num-images must be at least 1"),
        ("pass `use_safetensors=False`", "pass --allow-pickle"),
        ("`overwrite=True` or `compile`", "--overwrite or --compile"),
        ("choose another `folder`", "choose another FOLDER"),
        ("num_images and `unknown`", "num_images and `unknown`"),
        ("", ""),
    ],
)
def test_options_in_backticks_become_flags(message, with_flags):
    assert flags_in_message(message, Command) == with_flags
    with pytest.raises(ConfigError) as caught, command_messages(Command):
        raise ConfigError(message)
    assert str(caught.value) == with_flags


@pytest.mark.parametrize(
    ("given", "values"),
    [
        ({"num_images": np.int64(3), "eta": np.float32(0.5)}, {"num_images": 3, "eta": 0.5}),
        ({"class_labels": ("cat", "dog")}, {"class_labels": ["cat", "dog"]}),
        ({"interval": [-3, 4]}, {"interval": (-3, 4)}),
        ({"folder": "~/x"}, {"folder": Path.home() / "x"}),
    ],
)
def test_options_convert_values_without_loss(given, values):
    options = Command(**{"folder": "x"} | given).keywords()
    assert {name: options[name] for name in values} == values
    assert all(type(options[name]) is type(value) for name, value in values.items())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_images": 2.5}, "`num_images` must be of type int, got 2.5"),
        ({"num_images": True}, "`num_images` must not be a boolean, got True"),
        ({"class_labels": "cat"}, "`class_labels` must be of type list, got 'cat'"),
        ({"overwrite": 1}, "`overwrite` must be of type bool, got 1"),
        ({"eta": float("inf")}, "`eta` must be in [0, 1], got inf"),
    ],
)
def test_options_of_a_wrong_type_raise_an_error(given, message):
    with pytest.raises(OptionError) as caught:
        Command(folder="x", **given)
    assert str(caught.value) == message


def test_python_functions_show_the_options_in_their_signature():
    @takes_options(Command)
    def function(folder, **options):
        return Command(folder=folder, **options)

    parameters = inspect.signature(function).parameters
    assert parameters["num_images"].default == 16
    assert list(parameters)[:2] == ["folder", "num_images"]
    assert function("x", eta=1) == Command(folder="x", eta=1.0)
    with pytest.raises(TypeError, match="'num_image'; did you mean num_images"):
        function("x", num_image=1)


def test_training_errors_name_flags(capsys):
    assert main(["train", "user/photos", "--max-train-steps", "0"]) == 2
    assert "--max-train-steps must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.filterwarnings("always:a folder without labels")
def test_a_repeated_warning_is_printed_once(capsys):
    def command(argv):
        for _ in range(2):
            warnings.warn("a folder without labels", stacklevel=1)
        return 0

    assert run_command(command, []) == 0
    assert capsys.readouterr().err == "ddpm-hf: warning: a folder without labels\n"


def test_an_unexpected_error_keeps_its_traceback():
    def command(argv):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run_command(command, [])


def test_a_grid_shows_the_images_in_rows():
    images = [Image.new("L", (256, 256), value) for value in (10, 20, 30)]
    grid = image_grid(images, columns=2)
    assert grid.size == (514, 514)
    assert [grid.getpixel(at)[0] for at in ((32, 32), (290, 32), (32, 290))] == [10, 20, 30]


@pytest.mark.parametrize(
    ("image", "color"),
    [
        (Image.new("RGBA", (64, 64), (255, 0, 0, 0)), (235, 235, 235)),
        (Image.new("RGBA", (64, 64), (255, 0, 0, 255)), (255, 0, 0)),
        (Image.new("LA", (64, 64), (0, 0)), (235, 235, 235)),
        (Image.fromarray(np.full((64, 64), 257 * 100, dtype=np.uint16)), (100, 100, 100)),
    ],
    ids=["transparent", "opaque", "transparent grey", "16 bit"],
)
def test_a_grid_shows_each_image_mode_as_rgb(image, color):
    assert image_grid([image]).getpixel((32, 32)) == color


@pytest.mark.parametrize("num_channels", range(1, 8))
def test_a_grid_shows_more_than_four_channels_side_by_side(num_channels):
    image = np.broadcast_to(
        np.linspace(0.2, 1, num_channels, dtype=np.float32), (256, 256, num_channels)
    )
    grid = image_grid([image, image])
    tiles = num_channels if num_channels > 4 else 1
    assert grid.size == (2 * tiles * 256 + 2, 256)
    colors = [grid.getpixel((256 * i + 32, 32)) for i in range(tiles)]
    if num_channels in (1, 3):
        assert colors == [
            tuple(np.round(255 * image[0, 0]).astype(int).tolist() * (3 // num_channels))
        ]
    if tiles > 1:
        assert [grey[0] for grey in colors] == np.round(255 * image[0, 0]).astype(int).tolist()


@pytest.mark.parametrize(("images", "columns"), [([], None), ([Image.new("L", (8, 8))], 0)])
def test_a_grid_needs_images_and_columns(images, columns):
    with pytest.raises(ValueError, match=r"images|columns"):
        image_grid(images, columns)

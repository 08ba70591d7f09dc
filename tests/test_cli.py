"""The command line in this process: what it writes, and what it says to bad input."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image

from ddpm_hf import GaussianDDPMPipeline, GaussianDDPMScheduler
from ddpm_hf.cli import main, run_command
from ddpm_hf.commands.messages import flag_speller, flags_in_messages
from ddpm_hf.data import ImageFacts
from ddpm_hf.diffusion.image_processor import size_multiple
from ddpm_hf.pictures import image_grid
from ddpm_hf.text import counted
from ddpm_hf.training import ConfigError, TrainingError, build_unet, parse_config


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


def test_image_i_is_the_same_in_whatever_batch_it_is_drawn(model, tmp_path):
    whole = sampled(model, tmp_path / "a", "--num-images", "5", "--batch-size", "5")
    parts = sampled(model, tmp_path / "b", "--num-images", "3", "--batch-size", "2")
    assert len(whole) == 5
    for one, other in zip(whole[:3], parts, strict=True):
        # Convolutions of another batch size may round the last bit of 8 differently.
        assert np.abs(one.astype(int) - other).max() <= 1


# Few steps leave a gap before the first one, which the scheduler says.
@pytest.mark.filterwarnings("ignore:timestep_spacing")
def test_seed_steps_and_eta_change_the_images(model, tmp_path):
    few = ("--num-images", "1")
    base = sampled(model, tmp_path / "base", *few)[0]
    for i, more in enumerate((["--seed", "1"], ["--num-inference-steps", "3"], ["--eta", "0"])):
        assert not np.array_equal(base, sampled(model, tmp_path / str(i), *few, *more)[0])


def test_a_png_output_is_one_grid_enlarged_for_people(model, tmp_path):
    path = tmp_path / "new" / "grid.png"
    assert main(["sample", str(model), "--num-images", "4", "--output", str(path)]) == 0
    assert Image.open(path).size == (2 * 64 + 2, 2 * 64 + 2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sample", "MODEL/unet"], "model_index.json"),
        (["sample", "MODEL", "--eta", "2"], "eta"),
        (["sample", "MODEL", "--num-inference-steps", "13"], "12"),
        (["push", "MODEL", "not/a/repo"], "not/a/repo"),
        (["push", "MODEL/unet", "user/repo"], "model_index.json"),
    ],
)
def test_bad_input_is_one_line_and_status_2(model, capsys, arguments, said):
    assert main([a.replace("MODEL", str(model)) for a in arguments]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("ddpm-hf: error:")
    assert said in last


def test_a_dry_push_lists_what_would_go_and_contacts_nobody(model, capsys):
    assert main(["push", str(model), "user/repo", "--dry-run"]) == 0
    listing = capsys.readouterr().out
    assert "unet/diffusion_pytorch_model.safetensors" in listing
    assert "model_index.json" in listing


# Options


RECIPES = sorted(Path(__file__).parents[1].glob("training/recipes/*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_can_be_read(recipe, monkeypatch):
    monkeypatch.chdir(recipe.parents[2])  # paths in recipes start at the top of the project
    config = parse_config(["photos", "--config", str(recipe)])
    if config.unet_config is not None:
        assert json.loads(Path(config.unet_config).read_text())


def test_the_cifar10_recipe_trains_the_network_of_the_paper():
    unet = build_unet(
        ImageFacts("RGB", 32, 32), "cuda", str(RECIPES[0].parent / "cifar10_unet.json")
    )
    # 2006.11239, appendix B: "Our CIFAR10 model has 35.7 million parameters"
    assert round(sum(p.numel() for p in unet.parameters()) / 1e6, 1) == 35.7


@pytest.mark.parametrize("size", [8, 12, 28, 32, 64, 100, 256])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_proposed_network_takes_images_of_any_size(size, device):
    with torch.device("meta"):
        unet = build_unet(ImageFacts("L", size, size + 4), device)
        height, width = (
            -(-n // size_multiple(unet)) * size_multiple(unet) for n in (size, size + 4)
        )
        output = unet(torch.zeros(1, 1, height, width), torch.zeros(1)).sample
    assert output.shape == (1, 1, height, width)
    assert (height - size) * 8 <= max(size, 8) * 2  # little of what it sees is padding


def test_flags_win_over_the_recipe_and_the_recipe_over_defaults(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rate: 2e-4\nbatch_size: 8\nrandom_flip: true\n")
    config = parse_config(["photos", "--config", str(recipe), "--batch-size", "16"])
    assert (config.dataset, config.learning_rate, config.batch_size) == ("photos", 2e-4, 16)
    assert config.random_flip is True
    assert config.ema_decay == 0.9999


def test_a_configuration_survives_the_way_through_its_recipe(tmp_path):
    config = parse_config(["photos", "--resolution", "32", "--crop", "random", "--random-flip"])
    (tmp_path / "recipe.yaml").write_text(config.to_yaml())
    assert parse_config(["--config", str(tmp_path / "recipe.yaml")]) == config


@pytest.mark.parametrize(
    ("recipe", "said"),
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
def test_a_bad_recipe_is_explained(tmp_path, recipe, said):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    with pytest.raises((ConfigError, SystemExit), match=said):
        parse_config(["photos", "--config", str(path)])


TINY = {
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
}


@pytest.mark.slow
def test_a_refusal_to_resume_ends_with_the_command_that_does_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for value in (0, 128, 255):
        Image.new("RGB", (8, 8), (value, 0, 0)).save(f"photos/{value}.png")
    Path("unet.json").write_text(json.dumps(TINY))
    network = ["--unet-config", "unet.json", "--beta-schedule", "chen_sigmoid"]
    length = ["--batch-size", "1", "--num-samples", "0", "--lr-warmup-steps", "0"]
    command = ["train", "photos", *network, *length]
    assert main([*command, "--max-train-steps", "1"]) == 0
    said = capsys.readouterr().out
    assert "1 update of 1 image (0 epochs)" in said
    # Another learning rate is another run, which the saved options begin, too.
    same = ["train", "--config", "runs/photos/config.yaml", "--learning-rate", "2e-3"]
    assert main(same) == 2
    *_, hint = capsys.readouterr().err.strip().split(": add ")
    assert hint == "--pretrained runs/photos/model --output-dir runs/photos-2"
    assert main([*same, *hint.split()]) == 0
    assert Path("runs/photos-2/model/model_index.json").is_file()
    # So are more images.
    Image.new("RGB", (8, 8), (50, 0, 0)).save("photos/more.png")
    assert main([*command, "--max-train-steps", "1"]) == 2
    assert capsys.readouterr().err.strip().endswith(hint)
    Path("photos/more.png").unlink()
    # A longer run is the same one, whose learning rate rises again: 4e-4 (1 + cos(pi / 2)) / 2.
    assert main([*command, "--max-train-steps", "2"]) == 0
    assert "the learning rate goes from 0.0004 to 0.0002" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "recipe"),
    [("pretrained", "unet_config"), ("unet_config", "pretrained")],
)
def test_a_flag_wins_over_what_it_excludes_in_the_recipe(tmp_path, flag, recipe):
    (tmp_path / "r.yaml").write_text(f"dataset: x\n{recipe}: a\n")
    option = "--" + flag.replace("_", "-")
    config = parse_config(["--config", str(tmp_path / "r.yaml"), option, "b"])
    assert (getattr(config, flag), getattr(config, recipe)) == ("b", None)


@pytest.mark.parametrize(
    ("number", "said"), [(0, "0 images"), (1, "1 image"), (2000, "2,000 images")]
)
def test_one_thing_is_singular(number, said):
    assert counted(number, "image") == said


# Pictures


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
def test_a_switch_leaves_the_data_set_alone(argv, flip):
    config = parse_config(argv)
    assert (config.dataset, config.random_flip) == ("./photos", flip)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["x", "--output-dir", ""], "`output_dir` must not be empty"),
        (["x", "--seed", str(2**32)], "`seed` must be at most 4294967295"),
    ],
)
def test_an_option_out_of_range_is_named(argv, said):
    with pytest.raises(ConfigError, match=said):
        parse_config(argv)


def test_a_bare_no_in_a_recipe_is_the_precision(tmp_path):
    (tmp_path / "r.yaml").write_text("dataset: x\nmixed_precision: no\n")
    assert parse_config(["--config", str(tmp_path / "r.yaml")]).mixed_precision == "no"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[1]", "must hold a JSON object"),
        ('{"blok_out_channels": [8, 8]}', "did you mean 'block_out_channels'"),
        ('{"in_channels": "3"}', "unet_config"),
        ("{", "unet_config"),
    ],
)
def test_a_network_file_that_makes_no_network_is_explained(tmp_path, content, said):
    file = tmp_path / "unet.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=said):
        build_unet(ImageFacts("L", 8, 8), "cpu", str(file))


def test_a_network_from_a_file_gets_the_channels_and_classes_that_the_file_leaves_out(tmp_path):
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
    assert (config.in_channels, config.num_class_embeds) == (1, 9)  # to be refused, not changed


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (TrainingError("lost"), 1, "error: lost"),
        (OSError("disk"), 1, "error: disk"),
        (ConfigError("bad"), 2, "error: bad"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_the_end_of_a_command_is_one_line(error, status, said, capsys):
    def command(argv):
        raise error

    assert run_command(command, []) == status
    assert capsys.readouterr().err.strip().endswith(said)


@pytest.mark.parametrize(
    ("python", "command_line"),
    [
        ("max_train_steps must be at least 1", "--max-train-steps must be at least 1"),
        ("eta must be in [0, 1], got 2", "--eta must be in [0, 1], got 2"),
        ("eta=2.0: it has no eta", "--eta 2.0: it has no eta"),
        ("pass max_train_steps=9 or eta=0.", "pass --max-train-steps 9 or --eta 0."),
        ("(max_train_steps: 1 -> 2)", "(--max-train-steps: 1 -> 2)"),
        ("unet.config.max_train_steps stays", "unet.config.max_train_steps stays"),
        (
            "'max_train_steps' and my_max_train_steps_2",
            "'max_train_steps' and my_max_train_steps_2",
        ),
        ("runs/max_train_steps/x", "runs/max_train_steps/x"),
        ("a beta and an eta", "a beta and an eta"),
        ("", ""),
    ],
)
def test_what_python_calls_an_argument_the_command_line_calls_a_flag(python, command_line):
    names = ("eta", "max_train_steps")
    assert flag_speller(names)(python) == command_line
    with pytest.raises(ConfigError, match=f"^{re.escape(command_line)}$"), flags_in_messages(names):
        raise ConfigError(python)


@pytest.mark.parametrize("message", ["", "eta=2 is left alone"])
def test_without_option_names_messages_stay(message):
    assert flag_speller([])(message) == message


def test_training_errors_name_flags(capsys):
    assert main(["train", "user/photos", "--max-train-steps", "0"]) == 2
    assert "--max-train-steps must be at least 1, got 0" in capsys.readouterr().err


def test_an_error_nobody_foresaw_keeps_its_traceback():
    def command(argv):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run_command(command, [])


def test_a_grid_shows_every_image_in_its_place():
    images = [Image.new("L", (64, 64), value) for value in (10, 20, 30)]
    grid = image_grid(images, columns=2)
    assert grid.size == (130, 130)
    assert [grid.getpixel(at)[0] for at in ((32, 32), (98, 32), (32, 98))] == [10, 20, 30]


@pytest.mark.parametrize(
    ("image", "seen"),
    [
        (Image.new("RGBA", (64, 64), (255, 0, 0, 0)), (235, 235, 235)),
        (Image.new("RGBA", (64, 64), (255, 0, 0, 255)), (255, 0, 0)),
        (Image.new("LA", (64, 64), (0, 0)), (235, 235, 235)),
        (Image.fromarray(np.full((64, 64), 257 * 100, dtype=np.uint16)), (100, 100, 100)),
    ],
    ids=["transparent", "opaque", "transparent grey", "16 bit"],
)
def test_a_grid_shows_every_mode_as_a_person_would_see_it(image, seen):
    assert image_grid([image]).getpixel((32, 32)) == seen


@pytest.mark.parametrize("num_channels", range(1, 8))
def test_a_grid_shows_pixels_of_any_number_of_channels(num_channels):
    image = np.broadcast_to(
        np.linspace(0.2, 1, num_channels, dtype=np.float32), (64, 64, num_channels)
    )
    grid = image_grid([image, image])
    tiles = num_channels if num_channels > 4 else 1
    assert grid.size == (2 * tiles * 64 + 2, 64)
    seen = [grid.getpixel((64 * i + 32, 32)) for i in range(tiles)]
    if num_channels in (1, 3):
        assert seen == [
            tuple(np.round(255 * image[0, 0]).astype(int).tolist() * (3 // num_channels))
        ]
    if tiles > 1:
        assert [grey[0] for grey in seen] == np.round(255 * image[0, 0]).astype(int).tolist()


@pytest.mark.parametrize(("images", "columns"), [([], None), ([Image.new("L", (8, 8))], 0)])
def test_a_grid_of_nothing_is_refused(images, columns):
    with pytest.raises(ValueError, match=r"images|columns"):
        image_grid(images, columns)

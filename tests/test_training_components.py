"""Components of a run: exported and pretrained models, and components that cannot be trained."""

import json
import re

import pytest
import torch
from checkpoints import TWO_LEVELS
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file
from tiny_runs import (
    Images,
    assert_equal_bits,
    checkpoint,
    few_steps,
    metrics,
    run,
    tiny_config,
    tiny_images,
    tiny_unet,
)

from ddpm_hf import GaussianDDPMPipeline, GaussianDDPMScheduler, load, train
from ddpm_hf.data import DataError
from ddpm_hf.losses import simple_loss
from ddpm_hf.training import ConfigError

pytestmark = pytest.mark.slow


def test_the_model_loads_in_stock_diffusers_with_the_ema_weights(tmp_path):
    result = run(tmp_path)
    stock = DDPMPipeline.from_pretrained(result.model_dir)
    averages = load_file(tmp_path / "checkpoints" / "step-00000006" / "ema.safetensors")
    got = stock.unet.state_dict()
    assert got.keys() == averages.keys()
    assert all(torch.equal(got[name], averages[name]) for name in averages)
    assert stock(batch_size=2, num_inference_steps=2, output_type="np").images.shape == (2, 8, 8, 1)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (
            {"layers_per_block": 1_000_000},
            "`layers_per_block` must be an int in [1, 16], got 1000000",
        ),
        ({"in_channels": 10**9}, "of memory"),
        ({"block_out_channels": [8192] * 4, "layers_per_block": 16}, "of memory"),
    ],
)
def test_an_invalid_network_file_raises_before_images_are_read(tmp_path, arguments, why):
    (tmp_path / "unet.json").write_text(json.dumps(arguments))
    unread = Images(tiny_images(), 1, lambda: pytest.fail("an image was read"))
    config = tiny_config(tmp_path / "run", unet_config=str(tmp_path / "unet.json"))
    with pytest.raises(ConfigError, match=re.escape(why)):
        train(config, dataset=unread)


def test_the_card_is_updated_around_user_edits(tmp_path):
    run(tmp_path, max_train_steps=2)
    card = tmp_path / "model" / "README.md"
    generated = card.read_text()
    assert "| optimizer updates | 2 |" in generated
    card.write_text(generated.replace("---\n", "---\nlicense: mit\n", 1) + "By Jane.\n")
    run(tmp_path, max_train_steps=4)
    text = card.read_text()
    assert "license: mit\n" in text
    assert "By Jane.\n" in text
    assert "| optimizer updates | 4 |" in text
    run(tmp_path, max_train_steps=5, license="apache-2.0")
    assert "license: apache-2.0\n" in card.read_text()
    card.write_text("# By hand\n")
    run(tmp_path, max_train_steps=6)
    assert card.read_text() == "# By hand\n"


def test_a_failed_card_warns_and_the_model_is_written(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("ddpm_hf.hub.card_rendering.TEMPLATE", tmp_path / "nothing.md")
    run(tmp_path / "run", max_train_steps=2)
    assert "model card" in caplog.text
    assert (tmp_path / "run/model/unet/config.json").is_file()


def test_the_card_of_a_fine_tuned_model_describes_its_base(tmp_path):
    run(tmp_path / "base", max_train_steps=2)
    config = tiny_config(
        tmp_path / "tuned", max_train_steps=2, pretrained=str(tmp_path / "base/model")
    )
    train(config, dataset=tiny_images())
    text = (tmp_path / "tuned/model/README.md").read_text()
    assert "Base: model. Its data: images passed in Python" in text
    assert "Its training: 2 optimizer updates." in text


@few_steps
def test_sample_grids_are_drawn_when_due(tmp_path):
    run(tmp_path, num_samples=4, sample_steps=2, sample_inference_steps=3)
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == [f"step-0000000{step}.png" for step in (2, 4, 6)]


def test_the_seed_determines_the_weights(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run(tmp_path / name, seed=seed)
    a, b, c = (checkpoint(tmp_path / name, 6) for name in "abc")
    assert_equal_bits(a, b)
    assert any(not torch.equal(a[name], c[name]) for name in a)


@pytest.fixture(params=["ours", "stock pipeline", "bare network"])
def pretrained(request, tmp_path):
    unet, folder = tiny_unet(), tmp_path / "pretrained"
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.5)
    scheduler = GaussianDDPMScheduler(
        num_train_timesteps=50,
        beta_schedule="squaredcos_cap_v2",
        x_0_mse=[0.1] * 50,
        calibrated_timesteps={"DDIM": {2: [49, 20]}},
        recommended={"scheduler": "DDIM", "num_inference_steps": 5},
    )
    if request.param == "ours":
        GaussianDDPMPipeline(unet, scheduler).save_pretrained(folder)
    elif request.param == "stock pipeline":
        from diffusers import DDPMScheduler

        stock = DDPMScheduler(num_train_timesteps=50, beta_schedule="squaredcos_cap_v2")
        DDPMPipeline(unet, stock).save_pretrained(folder)
    else:
        unet.save_pretrained(folder)
    return request.param, folder, unet


def test_fine_tuning_starts_from_the_pretrained_weights_and_diffusion(tmp_path, pretrained):
    kind, folder, unet = pretrained
    # With warmup the first update has learning rate 0, which keeps the pretrained weights.
    result = train(
        tiny_config(
            tmp_path / "run",
            pretrained=str(folder),
            max_train_steps=1,
            lr_warmup_steps=1,
            learning_rate=None,
        ),
        dataset=tiny_images(),
    )
    # A pretrained network gets 1e-4 whatever its width.
    assert "learning_rate: 0.0001\n" in (tmp_path / "run" / "config.yaml").read_text()
    got = DDPMPipeline.from_pretrained(result.model_dir)
    want = unet.state_dict()
    assert all(torch.equal(value, want[name]) for name, value in got.unet.state_dict().items())
    expected_steps = 1000 if kind == "bare network" else 50
    assert got.scheduler.config.num_train_timesteps == expected_steps
    assert "_ddpm_hf" not in got.scheduler.config  # calibration of other weights


def test_fine_tuning_on_images_with_other_channels_suggests_image_mode(tmp_path, pretrained):
    images = [torch.zeros(3, 8, 8)] * 4
    with pytest.raises(ConfigError, match="image_mode"):
        train(tiny_config(tmp_path / "run", pretrained=str(pretrained[1])), dataset=images)


def test_pretrained_and_unet_exclude_each_other(tmp_path, pretrained):
    with pytest.raises(ConfigError, match="`pretrained` and `unet` exclude each other"):
        run(tmp_path / "run", pretrained=str(pretrained[1]))


def test_a_pretrained_folder_without_a_model_raises(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"`pretrained` .*empty' cannot be loaded: .* no weights"):
        train(tiny_config(tmp_path / "run", pretrained=str(tmp_path / "empty")), dataset=[])


@few_steps
@pytest.mark.parametrize("size", [16, 6])
def test_fine_tuning_at_another_size_exports_a_model_of_that_size(tmp_path, pretrained, size):
    images = [torch.zeros(1, size, size)] * 4
    config = tiny_config(
        tmp_path / "run", pretrained=str(pretrained[1]), max_train_steps=1, num_samples=1,
        sample_inference_steps=2, lr_warmup_steps=0,
    )  # fmt: skip
    pipe = DDPMPipeline.from_pretrained(train(config, dataset=images).model_dir)
    assert pipe.unet.config.sample_size == size
    assert pipe(num_inference_steps=2, output_type="np").images.shape == (1, size, size, 1)


class Failing(UNet2DModel):
    """A network whose forward pass fails."""

    def __init__(self, unet):
        super().__init__(**{k: v for k, v in unet.config.items() if k[0] != "_"})

    def forward(self, sample, timestep, class_labels=None):
        return super().forward(sample[:, :, 1:], timestep)


@pytest.mark.parametrize(
    ("components", "message"),
    [
        ({"unet": torch.nn.Linear(2, 2)}, "must be a diffusers UNet2DModel, got Linear"),
        ({"unet": tiny_unet().bfloat16()}, "float32"),
        ({"unet": tiny_unet().requires_grad_(False)}, "require gradients"),
        ({"unet": tiny_unet(out_channels=2)}, "or `variance_type` to learned_range"),
        (
            {"scheduler": GaussianDDPMScheduler(variance_type="learned_range")},
            "set out_channels of the network to 2",
        ),
        (
            {"scheduler": DDIMScheduler()},
            "`scheduler` must be .* got DDIMScheduler, .* does not train",
        ),
        ({"unet": tiny_unet(time_embedding_type="fourier")}, "use 'positional'"),
        (
            {"unet": tiny_unet(time_embedding_type="learned", num_train_timesteps=10)},
            "learned embeddings of 10 timesteps, but the scheduler has 1000",
        ),
        ({"unet": Failing(tiny_unet(**TWO_LEVELS))}, "does not run on 8x8 images"),
        ({"dataset": []}, "at least one float tensor"),
        ({"dataset": [(torch.zeros(1, 8, 8), 3)]}, "float tensors .* image 0 is tuple"),
        ({"dataset": [torch.zeros(5, 8, 8)]}, "1 to 4 channels, got 5"),
        ({"dataset": iter([])}, "list_iterator"),
    ],
)
def test_untrainable_components_raise_before_the_first_update(tmp_path, components, message):
    components = {"unet": tiny_unet(), "dataset": tiny_images()} | components
    with pytest.raises((ConfigError, DataError), match=message):
        train(tiny_config(tmp_path / "run"), **components)
    assert not (tmp_path / "run").exists()


def test_a_stock_ddpm_scheduler_can_be_trained(tmp_path):
    stock = DDPMScheduler(num_train_timesteps=50, beta_schedule="squaredcos_cap_v2")
    result = train(
        tiny_config(tmp_path, max_train_steps=2),
        unet=tiny_unet(),
        scheduler=stock,
        dataset=tiny_images(),
    )
    assert load(result.model_dir).scheduler.config.num_train_timesteps == 50


def test_a_path_instead_of_a_config_raises_with_an_example():
    with pytest.raises(ConfigError, match=r"TrainingConfig\(dataset="):
        train("./photos")


def test_resuming_with_other_components_names_the_differences(tmp_path):
    run(tmp_path, max_train_steps=2)
    for components, message in (
        ({"unet": tiny_unet(dropout=0.5)}, r"network dropout: 0.0 -> 0.5"),
        ({"unet": tiny_unet(block_out_channels=(16,))}, "network block_out_channels"),
        (
            {"scheduler": GaussianDDPMScheduler(50, beta_schedule="squaredcos_cap_v2")},
            "diffusion num_train_timesteps: 1000 -> 50",
        ),
        ({"dataset": tiny_images()[::-1]}, "images digest"),
        ({"dataset": tiny_images(12)}, "images number: 11 -> 12"),
    ):
        components = {"unet": tiny_unet(), "dataset": tiny_images()} | components
        with pytest.raises(ConfigError, match=message):
            train(tiny_config(tmp_path, max_train_steps=4), **components)
    assert run(tmp_path, max_train_steps=4, dataset=tiny_images()).num_steps == 4


def halved(denoiser, scheduler, x_0, t, noise):
    return simple_loss(denoiser, scheduler, x_0, t, noise) / 2


def test_a_custom_loss_is_trained_and_must_match_on_resume(tmp_path):
    parts = {"dataset": tiny_images(), "max_train_steps": 2, "checkpointing_steps": 2}
    config = {k: parts.pop(k) for k in ("max_train_steps", "checkpointing_steps")}
    for name, loss in (("whole", None), ("half", halved)):
        train(tiny_config(tmp_path / name, **config), unet=tiny_unet(), loss=loss, **parts)
    whole, half = (metrics(tmp_path / name)[0]["loss"] for name in ("whole", "half"))
    assert half == pytest.approx(whole / 2)
    with pytest.raises(ConfigError, match=r"objective name: .*halved' -> 'simple'"):
        train(tiny_config(tmp_path / "half", max_train_steps=4), unet=tiny_unet(), **parts)


def test_fewer_updates_than_already_done_raise(tmp_path):
    run(tmp_path, max_train_steps=4)
    with pytest.raises(ConfigError, match=r"`max_train_steps` is 3.*4 updates already"):
        run(tmp_path, max_train_steps=3)


def only_pickles(folder):
    unet = UNet2DModel.from_pretrained(folder)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(unet.state_dict(), folder / "diffusion_pytorch_model.bin")


def lacking(folder):
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    weights.pop("conv_in.weight")
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})


def with_nan(folder):
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    weights["conv_in.weight"][0] = float("nan")
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [(only_pickles, "can run code"), (lacking, "do not fit"), (with_nan, "not finite")],
)
def test_a_bare_network_is_checked_like_a_pipeline(tmp_path, damage, message):
    tiny_unet().save_pretrained(tmp_path / "bare")
    damage(tmp_path / "bare")
    config = tiny_config(tmp_path / "run", pretrained=str(tmp_path / "bare"))
    with pytest.raises(ConfigError, match=message):
        train(config, dataset=tiny_images())
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_pickled_weights_can_be_fine_tuned(tmp_path):
    tiny_unet().save_pretrained(tmp_path / "bare")
    only_pickles(tmp_path / "bare")
    config = tiny_config(
        tmp_path / "run",
        pretrained=str(tmp_path / "bare"),
        use_safetensors=False,
        max_train_steps=2,
    )
    assert train(config, dataset=tiny_images()).num_steps == 2

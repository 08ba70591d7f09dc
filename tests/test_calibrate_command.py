"""`calibrate_checkpoint` and `ddpm-hf calibrate`: the curve, the files, and the output."""

import json
import warnings

import numpy as np
import pandas
import pytest
import torch
from checkpoints import SHORT_CHAIN, tiny_unet
from diffusers import DDIMScheduler, DDPMScheduler
from PIL import Image
from processes import finish_ranks

import ddpm_hf
from ddpm_hf import GaussianDDPMPipeline, GaussianDDPMScheduler, calibrate, load
from ddpm_hf.cli import main
from ddpm_hf.data import ImageFacts
from ddpm_hf.evaluation import checkpoint_calibration, dataset_likelihood
from ddpm_hf.evaluation.calibration_results import CheckpointCalibration
from ddpm_hf.randomness import seed_of

# A warning lists the images of the other split.
pytestmark = pytest.mark.filterwarnings("ignore:.* left out .split")
NUM_IMAGES = 5


@pytest.fixture
def model(tmp_path):
    unet = tiny_unet()
    unet.register_to_config(_ddpm_hf=ImageFacts(mode="L", height=8, width=8).to_config())
    GaussianDDPMPipeline(unet, GaussianDDPMScheduler(**SHORT_CHAIN)).save_pretrained(
        tmp_path / "model"
    )
    return tmp_path / "model"


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        (tmp_path / "photos" / split).mkdir(parents=True)
        for i in range(NUM_IMAGES):
            pixels = rng.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / split / f"{i}.png")
    return tmp_path / "photos"


def command(model, photos, output, *more):
    return ["calibrate", str(model), str(photos), "--output", str(output), *more]


def read(folder):
    return CheckpointCalibration.from_dict(json.loads((folder / "calibration.json").read_text()))


def calibrated_by_hand(model, photos, batch_size):
    """The expected curve, from `ddpm_hf.calibrate`."""
    pipeline = load(model)
    pixels = [np.asarray(Image.open(path)) for path in sorted((photos / "test").iterdir())]
    images = torch.from_numpy(np.stack(pixels))[:, None].float() / 127.5 - 1
    generators = [torch.Generator().manual_seed(seed_of(3, "bound", i)) for i in range(NUM_IMAGES)]
    return calibrate(
        pipeline.unet, pipeline.scheduler, images, generator=generators, batch_size=batch_size
    )


@pytest.mark.slow
def test_the_command_writes_the_curve_into_the_model_and_prints_the_loss_of_few_steps(
    model, photos, tmp_path, capsys
):
    want = calibrated_by_hand(model, photos, 2)
    config = model / "scheduler" / "scheduler_config.json"
    before = json.loads(config.read_text())
    options = ["--seed", "3", "--batch-size", "2", "--card"]
    assert main(command(model, photos, tmp_path / "out", *options)) == 0
    printed = capsys.readouterr()

    calibration = read(tmp_path / "out")
    assert list(calibration.curve.x_0_mse) == want.x_0_mse.tolist()
    assert list(calibration.curve.standard_error) == want.standard_error.tolist()
    of_5, of_10, of_20 = calibration.curve.steps
    assert [row.num_inference_steps for row in (of_5, of_10, of_20)] == [5, 10, 20]
    predicted = want.bits_per_dim(10, timestep_spacing="linspace")
    assert of_10.at_best_timesteps <= of_10.bits_per_dim
    assert of_20.at_best_timesteps == pytest.approx(of_20.bits_per_dim)
    # The decoder is measured last and with other noise.
    loss = predicted.value - want.bits_per_dim().value
    row = of_10.bits_per_dim
    assert row - of_20.bits_per_dim == pytest.approx(loss, rel=1e-9)
    assert printed.out.startswith(str(calibration))
    assert f"{row:9.3f} {loss:+8.3f}" in printed.out
    assert "5 images are few" in printed.out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "calibration.json",
        "calibration.png",
    ]

    card = (model / "README.md").read_text()
    assert f"| 10 | {row:.3f} ({loss:+.3f}) |" in card
    assert "predicted from 5 images of photos, test" in card
    # The configuration has the curve to the bit and no other change.
    after = json.loads(config.read_text())
    assert after.pop("_ddpm_hf")["x_0_mse"] == want.x_0_mse.tolist()
    assert after == before
    assert torch.equal(load(model).scheduler.x_0_mse, want.x_0_mse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stock = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
    assert stock.config.variance_type == "fixed_small"


@pytest.mark.slow
def test_calibrate_checkpoint_returns_what_it_writes(model, photos, tmp_path):
    calibration = ddpm_hf.calibrate_checkpoint(
        model, photos, output=tmp_path / "out", num_images=3, progress=False
    )
    assert read(tmp_path / "out").to_dict() == calibration.to_dict()
    assert calibration.file == tmp_path / "out" / "calibration.json"
    assert calibration.scheduler_config == model / "scheduler" / "scheduler_config.json"
    assert list(calibration.curve.x_0_mse) == load(model).scheduler.x_0_mse.tolist()
    frame = pandas.DataFrame(calibration.rows())
    assert frame["num_inference_steps"].tolist() == [5, 10, 20]
    assert (frame["published"] > frame["bits_per_dim"]).all()


@pytest.mark.slow
def test_an_interrupted_calibration_resumes(model, photos, tmp_path, monkeypatch, capsys):
    real, calls = dataset_likelihood.bits_per_dim, []

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:  # three shards of the chain, then one of the decoder
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    want = calibrated_by_hand(model, photos, 2).x_0_mse
    monkeypatch.setattr(dataset_likelihood, "bits_per_dim", stopping)
    arguments = command(model, photos, tmp_path / "out", "--seed", "3", "--batch-size", "2")
    assert main(arguments) == 130
    assert "repeat the command to resume" in capsys.readouterr().err
    assert main(arguments) == 0
    assert len(calls) == 4 + 3
    assert torch.equal(load(model).scheduler.x_0_mse, want)


@pytest.mark.slow
def test_a_model_with_another_scheduler_keeps_it_and_gets_timesteps(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_calibration, "NUM_TRAJECTORIES", 2)
    folder = tmp_path / "stock"
    tiny_unet().save_pretrained(folder / "unet")
    DDIMScheduler(num_train_timesteps=20, beta_end=0.5).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "DDPMPipeline",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    options = ["--num-images", "3", "--timesteps"]
    assert main(command(folder, photos, tmp_path / "out", *options)) == 0
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert config["_class_name"] == "DDIMScheduler"
    assert len(config["_ddpm_hf"]["x_0_mse"]) == 20
    timesteps = config["_ddpm_hf"]["calibrated_timesteps"]
    assert list(timesteps) == ["DDIM", "DPM-Solver++ 2M"]
    assert timesteps["DDIM"].keys() == {str(K) for K in range(5, 21)}
    own = GaussianDDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    own.set_timesteps(6, timestep_spacing="calibrated")
    assert own.timesteps.tolist() == timesteps["DDIM"]["6"]
    assert isinstance(load(folder).scheduler, DDIMScheduler)


def test_the_configuration_for_a_hub_model_goes_to_the_output_folder(tmp_path, capsys):
    scheduler = GaussianDDPMScheduler(**SHORT_CHAIN, x_0_mse=[0.1] * 20)
    path = checkpoint_calibration.write_scheduler_config(
        scheduler, tmp_path / "someone" / "model", tmp_path
    )
    assert torch.equal(
        GaussianDDPMScheduler.from_pretrained(path.parent).x_0_mse, scheduler.x_0_mse
    )
    (photos := tmp_path / "photos").mkdir()
    assert main(command("someone/model", photos, tmp_path / "out", "--card")) == 2
    assert "'someone/model'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [{"sweep_images": 5}, {"features": "pixels"}, {"reference_split": "other"}]
)
def test_options_of_the_sweep_need_a_sweep(options, model, photos, tmp_path):
    (name,) = options
    with pytest.raises(ValueError, match=f"`{name}` needs `sweep`"):
        ddpm_hf.calibrate_checkpoint(model, photos, output=tmp_path / "out", **options)


def test_invalid_options_end_with_one_line_and_status_2(model, photos, tmp_path, capsys):
    for more, message in (
        (["--sweep-images", "5"], "--sweep-images needs --sweep"),
        (["--split", "valid"], "must be one of t"),
    ):
        assert main(command(model, photos, tmp_path / "out", *more)) == 2
        assert message in capsys.readouterr().err
    assert main(command(model, "./nothere", tmp_path / "out")) == 2
    errors = capsys.readouterr().err
    assert "'./nothere' does not exist" in errors
    assert "no split" not in errors


def test_a_network_trained_on_another_schedule_is_detected():
    """A network that underestimates the noise, and the best linear one."""
    scheduler = GaussianDDPMScheduler(50, beta_schedule="iddpm_linear", clip_sample=False)
    images = torch.randint(0, 256, (40, 16), generator=torch.Generator().manual_seed(0)) / 127.5 - 1
    images = images.double()

    def linear(x_t, t, factor=1.0):
        """The best linear denoiser of white noise, except for the variance that it assumes."""
        snr = scheduler.snr(t, torch.float64)[:, None]
        signal = (snr / (1 + snr)).sqrt()
        square = 1 / 3
        x_0 = x_t * signal * square / (signal**2 * square + factor * (1 - signal**2))
        return (x_t - signal * x_0) / (1 - signal**2).sqrt()

    right = calibrate(linear, scheduler, images, generator=torch.Generator().manual_seed(0))
    assert right.mismatch_warnings() == []
    wrong = calibrate(
        lambda x_t, t: linear(x_t, t, 0.05), scheduler, images, generator=torch.Generator()
    )
    assert any("times that of a linear denoiser" in doubt for doubt in wrong.mismatch_warnings())


@pytest.mark.slow
def test_two_processes_match_one_process(model, photos, tmp_path):
    options = ["--seed", "3", "--batch-size", "1"]
    assert main(command(model, photos, tmp_path / "one", *options)) == 0
    want = load(model).scheduler.x_0_mse
    swept = ["--sweep", "--sweep-images", "4", "--features", "pixels"]
    two = command(model, photos, tmp_path / "two", *options, *swept)
    finish_ranks(["-m", "ddpm_hf", *two], tmp_path)
    assert torch.equal(load(model).scheduler.x_0_mse, want)
    result, sweep = json.loads((tmp_path / "two" / "calibration.json").read_text())["results"]
    assert result["num_images"] == NUM_IMAGES
    assert len(sweep["settings"]) == 7 * 2 + 1  # all samplers in 5 and 10 steps, DDPM in 20
    assert load(model).scheduler.recommended == sweep["recommended"]

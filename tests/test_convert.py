"""Conversion of improved-diffusion and guided-diffusion networks, against their own code.

golden/openai_unets.json holds outputs of both repositories (openai/improved-diffusion and
openai/guided-diffusion, as of 2026-11) for random weights, which follow from the shapes and a seed.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline
from PIL import Image
from torch import Tensor

from ddpm_hf import TrainingConfig, calibrate, convert, evaluate, load, train
from ddpm_hf.cli import main
from ddpm_hf.losses import vlb_term
from ddpm_hf.openai_conversion.flags import PRESETS, OpenAIFlags
from ddpm_hf.openai_conversion.network import scheduler_of, unet_config
from ddpm_hf.openai_conversion.weights import flags_of_weights, read_state

CASES = json.loads((Path(__file__).parent / "golden/openai_unets.json").read_text())
CHAINS = [name for name, case in CASES.items() if "chain" in case]


def random_weights(name: str) -> dict[str, Tensor]:
    """The weights that the outputs are of: normal by a seed, norms around 1."""
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for key, shape in CASES[name]["shapes"].items():
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else 1
        scale = 0.3 / fan_in**0.5 if len(shape) > 1 else 0.1
        is_norm = len(shape) == 1 and key.endswith("weight")
        weights[key] = torch.randn(shape, generator=generator) * scale + float(is_norm)
    return weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("openai")
    for name, case in CASES.items():
        torch.save(random_weights(name), folder / f"{name}.pt")
        (folder / f"{name}.json").write_text(json.dumps(case["flags"]))
    return folder


@pytest.fixture(scope="module")
def converted(folder):
    """Pipelines by name, each converted once."""
    found = {}

    def get(name):
        if name not in found:
            found[name] = convert(folder / f"{name}.pt", config=folder / f"{name}.json")
        return found[name]

    return get


def labels_of(name: str) -> Tensor | None:
    labels = CASES[name]["labels"]
    return None if labels is None else torch.tensor(labels)


def denoiser_of(name, pipeline):
    return lambda x_t, t: pipeline.unet(x_t, t, class_labels=labels_of(name)).sample


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_converted_network_has_the_outputs_of_the_original(name, converted):
    case, pipeline = CASES[name], converted(name)
    size = case["flags"]["image_size"]
    x_t = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        output = denoiser_of(name, pipeline)(x_t, torch.tensor(case["timesteps"]))
    want = torch.tensor(case["output"])
    gap = (output[:, :, ::4, ::4].flatten() - want).abs().max().item()
    assert gap < 1e-5 * case["std"] + 1e-6  # the golden is rounded to 6 decimals


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAINS)
def test_the_bound_of_the_converted_model_is_that_of_the_original(name, converted):
    pipeline = converted(name)
    size = CASES[name]["flags"]["image_size"]
    generator = torch.Generator().manual_seed(3)
    x_0 = torch.rand(2, 3, size, size, generator=generator) * 2 - 1
    x_0 = ((x_0 + 1) * 127.5).round() / 127.5 - 1
    for t, want in zip((0, 1, 500, 999), CASES[name]["vb_terms"], strict=True):
        noise = torch.randn(x_0.shape, generator=generator)
        with torch.no_grad():
            term = vlb_term(
                denoiser_of(name, pipeline), pipeline.scheduler, x_0, torch.tensor([t, t]), noise,
                decoder="tanh" if t == 0 else "exact",
            )  # fmt: skip
        # At t = 999 the original subtracts nearly equal means in float32.
        torch.testing.assert_close(term, torch.tensor(want), rtol=1e-5, atol=3e-7)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_of_50_steps_is_that_of_the_original(name, converted):
    pipeline, size = converted(name), CASES[name]["flags"]["image_size"]
    shape = (2, 3, size, size)
    x_t = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    noise = torch.randn(50, *shape, generator=torch.Generator().manual_seed(6))
    scheduler, denoiser = pipeline.scheduler, denoiser_of(name, pipeline)
    scheduler.set_timesteps(timestep_spacing="50")
    with torch.no_grad():
        for t, eps in zip(scheduler.timesteps, noise, strict=True):
            output = denoiser(x_t, t.expand(2))
            x_t = scheduler.step(output, t, x_t, variance_noise=eps).prev_sample
    want = torch.tensor(CASES[name]["chain"])
    torch.testing.assert_close(x_t[:, :, ::4, ::4].flatten(), want, rtol=0, atol=2e-5)


def test_every_fourth_of_4000_timesteps_is_kept_where_the_network_sees_a_thousand(converted):
    scheduler = converted("iddpm").scheduler
    assert len(scheduler) == 1000
    t = np.arange(4000)
    f = lambda s: np.cos((s / 4000 + 0.008) / 1.008 * np.pi / 2) ** 2  # noqa: E731
    betas = np.minimum(1 - f(t + 1) / f(t), 0.999)
    alpha_bar = np.cumprod(1 - betas)[::4]
    snr = scheduler.snr(torch.arange(1000), torch.float64).numpy()
    np.testing.assert_allclose(snr, alpha_bar / (1 - alpha_bar), rtol=1e-6)


@pytest.mark.slow
def test_the_checkpoint_loads_in_stock_diffusers_and_here_with_the_same_bits(folder, tmp_path):
    output = tmp_path / "model"
    words = [str(folder / "adm.pt"), "--config", str(folder / "adm.json"), "--output", str(output)]
    assert main(["convert", *words]) == 0
    ours = load(output)
    stock = DDPMPipeline.from_pretrained(output)
    x_t = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = (pipe.unet(x_t, torch.tensor([9])).sample for pipe in (ours, stock))
    assert torch.equal(a, b)
    assert ours.scheduler.config.variance_type == "learned_range"
    assert len(ours(1, num_inference_steps=3).images) == 1
    assert "# " in (output / "README.md").read_text()


@pytest.mark.slow
def test_class_names_come_from_a_file(folder, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\nfish\nbird\nfrog\n")
    words = [str(folder / "iddpm-cond.pt"), "--config", str(folder / "iddpm-cond.json")]
    output = tmp_path / "model"
    assert main(["convert", *words, "--output", str(output), "--class-names", str(names)]) == 0
    pipeline = load(output)
    image = pipeline(1, class_labels="dog", num_inference_steps=2, output_type="pt").images
    assert image.shape == (1, 3, 16, 16)


@pytest.mark.slow
def test_the_newest_ema_weights_of_a_training_run_are_used(folder, tmp_path):
    for name in ("ema_0.9999_010000.pt", "ema_0.9999_200000.pt", "model300000.pt"):
        weights = random_weights("iddpm")
        weights["out.2.bias"] = torch.full((6,), float(name.split("_")[-1][:2] == "20"))
        torch.save(weights, tmp_path / name)
    pipeline = convert(tmp_path, config=folder / "iddpm.json")
    assert (pipeline.unet.conv_out.bias == 1).all()


def test_weights_of_pytorch_before_1_6_are_read(tmp_path):
    weights = {"input_blocks.0.0.weight": torch.ones(2)}
    torch.save(weights, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    assert (read_state(tmp_path / "w.pt")["input_blocks.0.0.weight"] == 1).all()


class Executed:
    def __reduce__(self):
        return (print, ("executed",))


def test_no_code_in_a_file_is_run(folder, tmp_path, capsys):
    torch.save({"input_blocks.0.0.weight": Executed()}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="not a state dict that is safe to read") as caught:
        convert(tmp_path / "bad.pt", config=folder / "adm.json")
    assert "weights_only" not in str(caught.value)  # torch advises to run the code
    assert "executed" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_resolutions": "8"}, r"do not fit these flags: .*unknown"),
        ({"attention_resolutions": "16,8,4"}, r"do not fit these flags: .*missing"),
        ({"num_channels": 64}, r"shape \(.*\) instead of"),
        ({"learn_sigma": False}, r"out.*shape \(6, 32, 3, 3\) instead of \(3, 32, 3, 3\)"),
        ({"class_cond": True}, "has no classes, but class_cond is True"),
        ({"num_head_channels": -1, "num_heads": 4}, "4 heads in layers of 64, 128 channels"),
        ({"channel_mult": "0.5,1,2"}, "channel_mult must begin with 1"),
        ({"rescale_timesteps": True, "diffusion_steps": 1500}, "multiple of 1000"),
        ({"num_headz": 4}, "unknown flag 'num_headz'.*num_heads"),
        ({"noise_schedule": "sqrt"}, "`noise_schedule` must be one of.*'sqrt'"),
        ({"num_head_channels": -1, "num_heads": 1, "num_heads_upsample": 2}, "must equal num_head"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(folder, tmp_path, change, message):
    flags = CASES["adm"]["flags"] | change
    (tmp_path / "flags.json").write_text(json.dumps(flags))
    with pytest.raises(ValueError, match=message):
        convert(folder / "adm.pt", config=tmp_path / "flags.json")


def test_flags_of_training_and_sampling_are_ignored(tmp_path):
    flags = {"image_size": 32, "lr": 1e-4, "use_fp16": True, "timestep_respacing": "250"}
    (tmp_path / "flags.json").write_text(json.dumps(flags))
    assert OpenAIFlags.read(tmp_path / "flags.json") == {"image_size": 32}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_flags_that_the_weights_determine_can_be_left_out(name, folder, tmp_path, converted):
    state = random_weights(name)
    flags = CASES[name]["flags"]
    told = flags_of_weights(state, flags["image_size"])
    assert {key: flags[key] for key in told if key in flags} == {
        key: value for key, value in told.items() if key in flags
    }
    (tmp_path / "flags.json").write_text(
        json.dumps({key: value for key, value in flags.items() if key not in told})
    )
    pipeline = convert(folder / f"{name}.pt", config=tmp_path / "flags.json")
    assert dict(pipeline.unet.config) == dict(converted(name).unet.config)


@pytest.mark.slow
def test_a_converted_model_is_evaluated_calibrated_and_fine_tuned(folder, tmp_path):
    output, flags = tmp_path / "model", tmp_path / "flags.json"
    short = {"diffusion_steps": 40, "rescale_timesteps": False}
    flags.write_text(json.dumps(CASES["iddpm"]["flags"] | short))
    words = [str(folder / "iddpm.pt"), "--config", str(flags), "--output", str(output)]
    assert main(["convert", *words]) == 0
    images = tmp_path / "images"
    images.mkdir()
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(images / f"{i}.png")
    bound = evaluate(output, images, split="train", num_images=4, num_timesteps=4)
    assert math.isfinite(bound.rows()[0]["value"])
    pipeline = load(output)
    x_0 = pipeline.encode_images([Image.open(path) for path in sorted(images.glob("*.png"))[:2]])
    calibration = calibrate(pipeline.unet, pipeline.scheduler, x_0, progress=False)
    assert calibration.x_0_mse.isfinite().all()
    config = TrainingConfig(
        dataset=str(images), pretrained=str(output), max_train_steps=1, batch_size=2,
        output_dir=str(tmp_path / "run"), num_samples=0,
    )  # fmt: skip
    result = train(config)
    assert load(result.model_dir).scheduler.learns_variance


EXPRESSIBLE = {
    "iddpm-cifar10", "iddpm-lsun-bedroom", "adm-imagenet64", "adm-imagenet256",
    "adm-imagenet256-uncond", "adm-lsun", "adm-lsun-horse-nodropout",
}  # fmt: skip
PARAMETERS = {"iddpm-cifar10": 52_546_438, "adm-imagenet256-uncond": 552_814_086}


@pytest.mark.slow
def test_the_published_models_are_expressed_or_refused_with_a_reason():
    from diffusers import UNet2DModel

    for name, flags in PRESETS.items():
        parsed = OpenAIFlags(**flags)
        scheduler_of(parsed)
        num_classes = 1000 if parsed.class_cond else None
        if name not in EXPRESSIBLE:
            with pytest.raises(ValueError, match="UNet2DModel"):
                unet_config(parsed, num_classes)
            continue
        config = unet_config(parsed, num_classes)
        with torch.device("meta"):
            unet = UNet2DModel(**config)
        if name in PARAMETERS:
            assert sum(weight.numel() for weight in unet.parameters()) == PARAMETERS[name]
    assert set(PRESETS) >= EXPRESSIBLE


def test_the_command_needs_a_preset_or_flags(folder, tmp_path, capsys):
    words = ["convert", str(folder / "adm.pt"), "--output", str(tmp_path / "model")]
    assert main(words) == 2
    assert "either --preset or --config" in capsys.readouterr().err
    assert main([*words, "--preset", "iddpm-cifar"]) == 2
    assert "iddpm-cifar10" in capsys.readouterr().err
    assert main(["convert", "nothing.pt", *words[2:], "--preset", "adm-lsun"]) == 2
    assert "nothing.pt does not exist" in capsys.readouterr().err

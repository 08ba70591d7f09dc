"""Training objectives: learned variances, variational bound, timesteps by importance."""

import functools
import os
import signal

import pytest
import torch
from tiny_runs import (
    Images,
    assert_equal_bits,
    checkpoint,
    metrics,
    tiny_config,
    tiny_images,
    tiny_unet,
)
from torch.testing import assert_close

from ddpm_hf import ConfigError, GaussianDDPMPipeline, GaussianDDPMScheduler, load, train
from ddpm_hf.losses import hybrid_loss
from ddpm_hf.timestep_samplers import TIMESTEP_SAMPLERS, UniformTimesteps
from ddpm_hf.training.objective import in_order_of_rows

# T = 4: the loss history is full after a few updates and then determines the sampling.
HYBRID = {"variance_type": "learned_range", "num_train_timesteps": 4}
BY_LOSS = {**HYBRID, "timestep_sampling": "loss_second_moment"}
VLB = {"objective": "vlb", "num_train_timesteps": 4}


def on_grid(count=11):
    """Images with 8-bit pixel values, as the decoder term of the bound requires."""
    return [((image + 1) * 127.5).round() / 127.5 - 1 for image in tiny_images(count)]


def run(folder, *, unet=None, dataset=None, **options):
    channels = 2 if options.get("variance_type") == "learned_range" else 1
    return train(
        tiny_config(folder, **{"checkpointing_steps": 100, **options}),
        unet=unet or tiny_unet(out_channels=channels),
        dataset=dataset or on_grid(),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "accumulation"),
    [(HYBRID, 1), (BY_LOSS, 2), (VLB, 1)],
    ids=["hybrid", "by loss, accumulated", "vlb"],
)
def test_a_resumed_run_of_any_objective_is_bit_equal(tmp_path, options, accumulation):
    options = {**options, "max_train_steps": 26, "gradient_accumulation_steps": accumulation}
    run(tmp_path / "straight", **options)
    stop = Images(on_grid(), 4 * 21, lambda: os.kill(os.getpid(), signal.SIGTERM))
    stopped = run(tmp_path / "resumed", dataset=stop, **options)
    assert 18 <= stopped.num_steps < 26
    run(tmp_path / "resumed", **options)
    straight, resumed = (checkpoint(tmp_path / name, 26) for name in ("straight", "resumed"))
    assert_equal_bits(straight, resumed)
    if options.get("timestep_sampling"):
        assert straight["timesteps.safetensors:counts"].min() >= 10


class Gathered:
    """`gather` of two processes: the tensors of each, concatenated."""

    def __init__(self, *shares):
        self.shares = shares

    def gather(self, mine):
        return torch.cat([torch.stack(share) for share in self.shares])


def test_gathered_losses_are_in_the_order_of_the_rows():
    # Two processes with two micro-batches of three rows; the first has rows 0-2 and 6-8.
    rows = torch.arange(12.0).split(3)
    first, second = [rows[0], rows[2]], [rows[1], rows[3]]
    for mine in (first, second):
        assert torch.equal(in_order_of_rows(mine, Gathered(first, second)), torch.arange(12.0))


class Thrice(UniformTimesteps):
    """Uniform timesteps with importance weights of 3."""

    def sample(self, *args):
        t, weights = super().sample(*args)
        return t, 3 * weights


@pytest.mark.slow
def test_losses_are_multiplied_by_the_importance_weights_of_their_timesteps(tmp_path, monkeypatch):
    first = {}
    for name, sampler in (("once", UniformTimesteps), ("thrice", Thrice)):
        monkeypatch.setitem(TIMESTEP_SAMPLERS, "uniform", sampler)
        run(tmp_path / name, max_train_steps=2, logging_steps=1)
        first[name] = metrics(tmp_path / name)[0]
    for value in ("loss", "grad_norm"):  # float32
        assert first["thrice"][value] == pytest.approx(3 * first["once"][value], rel=1e-5)


@pytest.mark.slow
def test_every_objective_option_changes_the_loss(tmp_path):
    one = {"max_train_steps": 1, "lr_warmup_steps": 1}
    seen = {}
    for name, options in {
        "simple": {},
        "min_snr": {"loss_weighting": "min_snr"},
        "p2": {"loss_weighting": "p2"},
        "truncated_snr": {"loss_weighting": "truncated_snr"},
        "vlb": {"objective": "vlb"},
        "hybrid": HYBRID,
        "low_discrepancy": {"timestep_sampling": "low_discrepancy"},
        "asymmetric": {"timestep_sampling": "asymmetric"},
    }.items():
        run(tmp_path / name, **options, **one)
        seen[name] = metrics(tmp_path / name)[0]["loss"]
    assert len(set(seen.values())) == len(seen)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "hybrid"}, "set `variance_type` to learned_range"),
        ({**HYBRID, "objective": "simple"}, "'simple' does not train the variance"),
        (
            {"objective": "vlb", "loss_weighting": "p2"},
            "`loss_weighting` 'p2' weights the squared error",
        ),
        (
            {"objective": "vlb", "timestep_sampling": "asymmetric"},
            "'asymmetric' weights the timesteps, so that the loss of `objective` 'vlb'",
        ),
    ],
)
def test_contradicting_objective_options_raise(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_proposed_network_has_output_channels_for_a_learned_variance(tmp_path):
    result = train(
        tiny_config(tmp_path, **HYBRID, max_train_steps=1, lr_warmup_steps=0), dataset=on_grid()
    )
    pipeline = load(result.model_dir)
    assert pipeline.unet.config.out_channels == 2
    assert pipeline.scheduler.config.variance_type == "learned_range"
    assert pipeline(num_inference_steps=4, output_type="np").images.shape == (1, 8, 8, 1)


@pytest.mark.slow
@pytest.mark.parametrize("fixed", ["fixed_small", "fixed_large"])
def test_a_pretrained_network_widened_for_a_learned_variance_samples_as_before(
    tmp_path, fixed, capsys
):
    scheduler = GaussianDDPMScheduler(8, beta_schedule="squaredcos_cap_v2", variance_type=fixed)
    GaussianDDPMPipeline(tiny_unet(), scheduler).save_pretrained(tmp_path / "fixed")
    config = tiny_config(
        tmp_path / "run",
        pretrained=str(tmp_path / "fixed"),
        variance_type="learned_range",
        max_train_steps=1,
        lr_warmup_steps=1,  # the first update has learning rate 0
    )
    result = train(config, dataset=on_grid())
    assert f"initialized to sample as with {fixed}" in capsys.readouterr().out
    before, after = (
        load(folder)(2, torch.Generator().manual_seed(0), output_type="pt").images
        for folder in (tmp_path / "fixed", result.model_dir)
    )
    # float32: exp(log variance / 2) is computed from v after, and from a table before
    assert_close(after, before, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_partial_function_can_be_the_loss_and_has_the_name_of_the_function(tmp_path, capsys):
    half = functools.partial(hybrid_loss, vlb_weight=0.5)
    config = tiny_config(tmp_path, **HYBRID, max_train_steps=2)
    result = train(config, unet=tiny_unet(out_channels=2), dataset=on_grid(), loss=half)
    assert result.num_steps == 2
    assert "ddpm_hf.losses.hybrid_loss" in capsys.readouterr().out

"""Interface that code for diffusers relies on: tables, configuration files, repr and help."""

import json
import math
import pydoc

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from oracles import randn
from torch.testing import assert_close

from ddpm_hf.diffusion.schedules import BETA_SCHEDULES
from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler

TABLES = ("betas", "alphas", "alphas_cumprod")
STOCK_KEYS = {key for key in DDPMScheduler().config if key[0] != "_"}
# DPMSolverSDEScheduler needs a library that is not a dependency.
FOREIGN = sorted(
    {kind.__name__ for kind in DDPMScheduler().compatibles}
    - {"DDPMScheduler", "DPMSolverSDEScheduler"}
)


@pytest.mark.parametrize("timesteps", [None, [100, 87, 50, 1, 0]])
def test_the_previous_timestep_is_a_tensor(timesteps):
    scheduler = GaussianDDPMScheduler()
    if timesteps:
        scheduler.set_timesteps(timesteps=timesteps)
    steps = timesteps or [999, 500, 1, 0]
    after = [*timesteps[1:], -1] if timesteps else [998, 499, 0, -1]
    assert [scheduler.previous_timestep(t).item() for t in steps] == after
    assert scheduler.previous_timestep(torch.tensor(1)).shape == ()


@pytest.mark.parametrize(
    "kind", ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned_range"]
)
@pytest.mark.parametrize("t", [1, 487, 999])
def test_get_variance_matches_diffusers(kind, t):
    predicted = randn(2, 1, 3, 3, dtype=torch.float32) if kind == "learned_range" else None
    ours = GaussianDDPMScheduler()._get_variance(t, predicted, kind)
    stock = DDPMScheduler()._get_variance(t, predicted, kind)
    assert_close(
        ours, stock, rtol=2e-3, atol=1e-7
    )  # precision of diffusers' float32 tables at t = 1
    assert_close(GaussianDDPMScheduler(variance_type=kind)._get_variance(t, predicted), ours)


def test_get_variance_returns_a_learned_variance_unchanged():
    predicted = torch.zeros(1)
    assert GaussianDDPMScheduler()._get_variance(5, predicted, "learned") is predicted
    assert GaussianDDPMScheduler()._get_variance(0) == 0
    with pytest.raises(ValueError, match=r"`predicted_variance` must be a tensor .* got None"):
        GaussianDDPMScheduler()._get_variance(5, None, "learned_range")
    with pytest.raises(ValueError, match=r"`variance_type` must be one of .* got 'other'"):
        GaussianDDPMScheduler()._get_variance(5, None, "other")


@pytest.mark.parametrize("name", TABLES)
def test_a_table_can_be_moved_and_cast(name):
    scheduler = GaussianDDPMScheduler()
    before = getattr(scheduler, name).clone()
    for move in (torch.Tensor.clone, torch.Tensor.double, torch.Tensor.half):
        setattr(scheduler, name, move(before))
        assert getattr(scheduler, name).dtype == move(before).dtype
    setattr(scheduler, name, before.to("meta"))
    assert getattr(scheduler, name).device.type == "meta"


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize(
    "change",
    [
        lambda table: table * 0.999,
        lambda table: table[:500],
        lambda table: table.numpy(),
        lambda table: table.tolist(),
        lambda table: table > 0.5,
        lambda table: None,
    ],
)
def test_the_values_of_a_table_cannot_be_changed(name, change):
    scheduler = GaussianDDPMScheduler()
    before = getattr(scheduler, name)
    with pytest.raises(ValueError, match=rf"`{name}` must keep its values.*pass `trained_betas`"):
        setattr(scheduler, name, change(before))
    assert getattr(scheduler, name) is before


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}),
        ({"beta_schedule": "chen_sigmoid"}, {"beta_schedule": "chen_sigmoid", "tau": 1.0}),
        ({"trained_betas": np.linspace(1e-4, 0.02, 1000)}, {"beta_schedule": "trained_betas"}),
    ],
)
def test_repr_has_the_settings_without_the_betas(config, expected):
    text = repr(GaussianDDPMScheduler(**config, variance_type="fixed_large"))
    name, _, settings = text.partition(" ")
    assert name == "GaussianDDPMScheduler"
    assert expected.items() <= json.loads(settings).items()
    assert json.loads(settings)["variance_type"] == "fixed_large"
    assert len(text) < 1000
    assert 'trained_betas": ' not in text


def test_help_lists_every_schedule():
    text = pydoc.plain(pydoc.render_doc(GaussianDDPMScheduler))
    assert [name for name in BETA_SCHEDULES if f'"{name}"' not in text] == []
    assert "beta_schedule_params: dict[str, float] | None = None" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", FOREIGN)
def test_keys_of_other_schedulers_are_dropped(name, tmp_path):
    other = getattr(diffusers, name)()
    other.save_pretrained(tmp_path / "other")
    for ours in (
        GaussianDDPMScheduler.from_config(other.config),
        GaussianDDPMScheduler.from_pretrained(tmp_path / "other"),
    ):
        assert {key for key in ours.config if key[0] != "_"} == STOCK_KEYS
        json.dumps({k: v for k, v in ours.config.items()}, allow_nan=False)
        ours.save_pretrained(tmp_path / "ours")
        again = GaussianDDPMScheduler.from_pretrained(tmp_path / "ours")
        assert torch.equal(again.betas, ours.betas)
        stock = DDPMScheduler.from_pretrained(tmp_path / "ours")
        assert_close(stock.betas, ours.betas, rtol=1e-4, atol=0)  # diffusers rounds in float32


def test_an_infinite_value_of_another_scheduler_is_dropped():
    config = diffusers.DPMSolverMultistepScheduler().config
    assert config["lambda_min_clipped"] == -math.inf
    assert "lambda_min_clipped" not in GaussianDDPMScheduler.from_config(config).config


def test_unused_keywords_are_returned():
    with pytest.warns(UserWarning, match="'revision' is not a configuration key"):
        ours, unused = GaussianDDPMScheduler.from_config(
            DDIMScheduler().config, return_unused_kwargs=True, revision="main"
        )
    assert isinstance(ours, GaussianDDPMScheduler)
    assert unused["revision"] == "main"


def test_a_loaded_configuration_equals_the_saved_one(tmp_path):
    scheduler = GaussianDDPMScheduler(50, beta_schedule="chen_sigmoid")
    scheduler.save_pretrained(tmp_path)
    loaded = GaussianDDPMScheduler.from_pretrained(tmp_path)
    assert dict(loaded.config) == {
        key: value for key, value in scheduler.config.items() if key != "_use_default_values"
    }


GOOD = json.loads(GaussianDDPMScheduler(5, beta_schedule="chen_sigmoid").to_json_string())
MALFORMED = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"5",
    b'"linear"',
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    *(
        json.dumps(GOOD | change).encode()
        for change in (
            {"num_train_timesteps": "5"},
            {"num_train_timesteps": None},
            {"num_train_timesteps": 10**30},
            {"num_train_timesteps": [5]},
            {"num_train_timesteps": 6},
            {"beta_start": {}},
            {"beta_end": math.nan},
            {"beta_schedule": 7},
            {"beta_schedule": ["linear"]},
            {"beta_schedule": {}},
            {"trained_betas": "abc"},
            {"trained_betas": {"0": 0.1}},
            {"trained_betas": [[0.1] * 5]},
            {"trained_betas": [None] * 5},
            {"trained_betas": [10**400] * 5},
            {"trained_betas": [math.inf] * 5},
            {"variance_type": []},
            {"prediction_type": {}},
            {"timestep_spacing": 3},
            {"steps_offset": "1"},
            {"clip_sample": "yes"},
            {"_class_name": 5},
            {"_class_name": {}},
        )
    ),
]


@pytest.mark.parametrize("content", MALFORMED, ids=lambda content: content[:30].decode("latin1"))
def test_a_malformed_configuration_is_a_value_error(content, tmp_path):
    (tmp_path / "scheduler_config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"scheduler_config\.json"):
        GaussianDDPMScheduler.from_pretrained(tmp_path)


@pytest.mark.filterwarnings("ignore:.*_ddpm_hf")
@pytest.mark.parametrize(
    "extension",
    [
        5,
        [],
        "x",
        {},
        {"fingerprint": 5},
        {"fingerprint": GOOD["_ddpm_hf"]["fingerprint"]},
        GOOD["_ddpm_hf"] | {"beta_schedule_params": 5},
        GOOD["_ddpm_hf"] | {"beta_schedule": []},
        GOOD["_ddpm_hf"] | {"beta_schedule_params": None},
        GOOD["_ddpm_hf"] | {"beta_schedule_params": {"tau": "1"}},
    ],
)
def test_a_malformed_extension_does_not_affect_the_betas(extension, tmp_path):
    (tmp_path / "scheduler_config.json").write_text(json.dumps(GOOD | {"_ddpm_hf": extension}))
    loaded = GaussianDDPMScheduler.from_pretrained(tmp_path)
    assert loaded.config.trained_betas == GOOD["trained_betas"]
    assert '"beta_schedule": "trained_betas"' in repr(loaded)
    with pytest.raises(ValueError, match=r"`num_train_timesteps` must be an int .* got 0"):
        GaussianDDPMScheduler.from_pretrained(tmp_path, num_train_timesteps=0)


def test_a_folder_without_a_configuration_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match=r"scheduler_config\.json"):
        GaussianDDPMScheduler.from_pretrained(tmp_path)

"""Name and parameters of the beta schedule of a configuration, as shown by plan, card and repr."""

import json

import pytest
from diffusers import DDIMScheduler, DDPMScheduler

from ddpm_hf.diffusion.config_extension import beta_schedule_of
from ddpm_hf.diffusion.schedules import BETA_RANGE, BETA_SCHEDULES, named_betas
from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler
from ddpm_hf.hub.card_facts import card_facts
from ddpm_hf.hub.card_rendering import render_model_card

ENDS = {"beta_start": 0.0001, "beta_end": 0.02}
CHEN = {"start": -3.0, "end": 3.0, "tau": 0.7}
NAMED = [
    ({}, ("linear", ENDS)),
    ({"beta_end": 0.03}, ("linear", ENDS | {"beta_end": 0.03})),
    ({"beta_schedule": "squaredcos_cap_v2"}, ("squaredcos_cap_v2", {})),
    ({"beta_schedule": "const"}, ("const", {"beta_end": 0.02})),
    ({"beta_schedule": "quad", "beta_end": 0.05}, ("quad", ENDS | {"beta_end": 0.05})),
    (
        {"beta_schedule": "chen_sigmoid", "beta_schedule_params": {"tau": 0.7}},
        ("chen_sigmoid", CHEN),
    ),
    ({"trained_betas": [0.5] * 100}, ("trained_betas", {})),
]
V = {"num_train_timesteps": 100, "prediction_type": "v_prediction"}
pytestmark = pytest.mark.filterwarnings("ignore:.*signal amplitude at the last")


@pytest.mark.parametrize(("config", "named"), NAMED)
def test_a_schedule_keeps_its_name_in_every_saved_form(config, named, tmp_path):
    scheduler = GaussianDDPMScheduler(**V, **config)
    scheduler.save_pretrained(tmp_path / "ours")
    DDPMScheduler.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "stock")
    for read in (
        scheduler.config,
        json.loads((tmp_path / "ours" / "scheduler_config.json").read_text()),
        json.loads((tmp_path / "stock" / "scheduler_config.json").read_text()),
        DDIMScheduler.from_config(scheduler.config).config,
    ):
        assert beta_schedule_of(read) == named


def test_a_schedule_rescaled_to_zero_snr_keeps_its_name():
    config = V | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler = GaussianDDPMScheduler(beta_schedule="quad", **config)
    assert beta_schedule_of(scheduler.config)[0] == "quad"
    shorter = GaussianDDPMScheduler.from_config(scheduler.config, num_train_timesteps=50)
    assert beta_schedule_of(shorter.config)[0] == "quad"
    assert len(shorter.betas) == 50


@pytest.mark.parametrize(
    "change",
    [
        {"trained_betas": [0.1] * 100},
        {"trained_betas": ["a"] * 100},
        {"trained_betas": 5},
        {"prediction_type": "sample"},
        {"_ddpm_hf": "chen_sigmoid"},
    ],
)
def test_the_name_of_other_betas_is_ignored(change):
    scheduler = GaussianDDPMScheduler(beta_schedule="chen_sigmoid", **V)
    assert beta_schedule_of(dict(scheduler.config) | change) == ("trained_betas", {})


@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_beta_range_lists_the_parameters_that_affect_the_betas(name):
    moved = {}
    for key, value in (("beta_start", 0.001), ("beta_end", 0.1)):
        betas = [
            named_betas(name, 100, **(ENDS | change), params={}) for change in ({}, {key: value})
        ]
        moved[key] = bool((betas[0] != betas[1]).any())
    assert BETA_RANGE.get(name, ()) == tuple(key for key, does in moved.items() if does)


def test_the_model_card_names_the_schedule(tmp_path):
    scheduler = GaussianDDPMScheduler(
        beta_schedule="chen_sigmoid", beta_schedule_params={"tau": 0.7}, **V
    )
    scheduler.save_pretrained(tmp_path / "scheduler")
    card = render_model_card(card_facts(tmp_path))
    assert "| `beta_schedule` | chen\\_sigmoid |" in card
    assert "| `tau` | 0.7 |" in card
    assert "beta_end" not in card

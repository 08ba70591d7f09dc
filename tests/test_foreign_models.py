"""Models of strangers: what their files choose is bounded, and never costs time or memory."""

import json
import time

import numpy as np
import pytest
from test_evaluation import save_images, save_model
from test_sweep import drawn_by
from test_sweep import save_model as save_swept

from ddpm_hf import load
from ddpm_hf.cli import main
from ddpm_hf.data import ImageFacts

pytestmark = pytest.mark.filterwarnings("ignore:`timestep_spacing`", "always:the recommended")


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheduler",
    [
        "DDIM:num_train_timesteps=1000000000",
        "DDIM:num_train_timesteps=19",
        "DPMSolverMultistep:solver_order=1000000000",
        "DPMSolverMultistep:solver_order=true",
        "UniPCMultistep:solver_order=0",
        "SASolver:predictor_order=1000000000",
        "SASolver:corrector_order=9",
        "DDIM:trained_betas=null",
        "DDPM:beta_start=0.5",
        "DDPM:beta_schedule=linear",
        "DDPM:x_0_mse=1",
        "DDIM:rescale_betas_zero_snr=true",
        "DDIM:prediction_type=sample",
        "DDIM:steps_offset=1000000000",
        "DDIM:timestep_spacing=unknown",
        "EulerDiscrete:sigma_max=1e30",
    ],
)
def test_a_recommended_setting_may_only_choose_the_options_of_a_sweep(scheduler, tmp_path, capsys):
    model = save_swept(tmp_path / "m", {"scheduler": scheduler, "num_inference_steps": 4})
    start = time.monotonic()
    command = ["sample", str(model), "--num-images", "1", "--output", str(tmp_path / "x.npz")]
    assert main(command) == 0
    assert time.monotonic() - start < 20
    assert "the recommended setting is not used" in capsys.readouterr().err
    assert drawn_by(tmp_path)["num_inference_steps"] == 20


@pytest.mark.slow
def test_a_recommended_setting_that_its_scheduler_cannot_run_is_ignored(tmp_path):
    model = save_swept(tmp_path / "m", {"scheduler": "PNDM", "num_inference_steps": 1})
    (tmp_path / "m" / "scheduler").mkdir(exist_ok=True)
    assert (
        main(["sample", str(model), "--num-images", "1", "--output", str(tmp_path / "x.npz")]) == 0
    )


@pytest.mark.slow
@pytest.mark.parametrize("order", ["solver_order", "predictor_order", "corrector_order"])
@pytest.mark.parametrize("value", [10**9, 11, 0, -1, True, "2", None, 1e9])
def test_the_order_of_a_models_own_solver_is_bounded(order, value, tmp_path):
    folder = save_swept(tmp_path / "m")
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text()) | {"_class_name": "SASolverScheduler", order: value}
    path.write_text(json.dumps(config))
    index = folder / "model_index.json"
    names = json.loads(index.read_text())
    index.write_text(json.dumps(names | {"scheduler": ["diffusers", "SASolverScheduler"]}))
    with pytest.raises(ValueError, match=f'"{order}" must be'):
        load(folder)


def test_images_are_not_enlarged_to_the_size_that_a_model_claims(tmp_path, capsys):
    model = save_model(tmp_path / "m", ImageFacts(mode="L", height=8192, width=8192))
    save_images(tmp_path / "photos" / "test", np.zeros((2, 7, 7), np.uint8))
    command = ["evaluate", str(model), str(tmp_path / "photos"), "--output", str(tmp_path / "out")]
    assert main(command) == 2
    assert (
        "8192x8192 would enlarge them more than 8 times; the largest one has 7 pixels per side"
        in capsys.readouterr().err
    )

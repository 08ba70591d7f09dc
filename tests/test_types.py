"""The public types, checked by `mypy --strict` on calls and on the README."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
CALLS = """
from typing import assert_type

import torch
from ddpm_hf import GaussianDDPMPipeline, GaussianDDPMScheduler
from diffusers import UNet2DModel
from torch import Tensor

x = torch.zeros(1, 1, 8, 8)
scheduler = GaussianDDPMScheduler(100, beta_schedule="jsd", beta_schedule_params={})
assert_type(scheduler.step(x, 5, x).prev_sample, Tensor)
assert_type(scheduler.step(x, 5, x, return_dict=False), tuple[Tensor, Tensor])
assert_type(scheduler.betas, Tensor)
assert_type(scheduler.timesteps, Tensor)
assert_type(scheduler.previous_timestep(5), Tensor)
assert_type(scheduler.p_mean_variance(x, 5, x).mean, Tensor)
assert_type(scheduler.add_noise(x, x, torch.tensor([5])), Tensor)
assert_type(GaussianDDPMScheduler.from_config(scheduler.config), GaussianDDPMScheduler)
assert_type(GaussianDDPMScheduler.from_pretrained("folder"), GaussianDDPMScheduler)

pipe = GaussianDDPMPipeline(UNet2DModel(), scheduler)
pipe(batch_size=4, num_inference_steps=50, eta=0.0).images[0].save("first.png")
(images,) = pipe(return_dict=False)
assert_type(GaussianDDPMPipeline.from_pretrained("folder"), GaussianDDPMPipeline)

GaussianDDPMScheduler(num_train_timestep=5)  # type: ignore[call-arg]
GaussianDDPMScheduler(beta_start="0.1")  # type: ignore[arg-type]
GaussianDDPMPipeline(unet=UNet2DModel())  # type: ignore[call-arg]
pipe(num_steps=5)  # type: ignore[call-overload]
scheduler.step(x, 5)  # type: ignore[call-overload]
"""


def snippets() -> list[str]:
    """Python blocks of the README; a block may use names of earlier ones."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


def test_readme_snippets_and_typical_calls_pass_mypy_strict(tmp_path):
    assert len(snippets()) > 0
    (tmp_path / "readme.py").write_text("\n".join(snippets()), encoding="utf-8")
    (tmp_path / "calls.py").write_text(CALLS, encoding="utf-8")
    # The project's configuration is strict, and ignores libraries without type hints.
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
    done = subprocess.run(
        [*command, str(tmp_path / "readme.py"), str(tmp_path / "calls.py")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr

"""What a type checker sees of the package, as the person who calls it: `mypy --strict`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

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
    """The Python blocks of the README; one may use what an earlier one defined."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


@pytest.mark.slow
def test_the_readmes_snippets_and_calls_of_every_kind_pass_a_strict_type_checker(tmp_path):
    assert len(snippets()) > 0
    (tmp_path / "readme.py").write_text("\n".join(snippets()), encoding="utf-8")
    (tmp_path / "calls.py").write_text(CALLS, encoding="utf-8")
    # The project's configuration is strict, and skips the libraries that it reads no hints of.
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
    done = subprocess.run(
        [*command, str(tmp_path / "readme.py"), str(tmp_path / "calls.py")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr

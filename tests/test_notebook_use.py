"""Use from Python and notebooks: names of classes, dtypes, grids of samples, next steps."""

import sys
from types import SimpleNamespace

import pytest
import torch
from checkpoints import image_facts_of, save_ours, tiny_pipeline, tiny_unet
from PIL import Image
from tiny_runs import run

import ddpm_hf
from ddpm_hf.scheduler_spec import readable_names
from ddpm_hf.utils.text import is_notebook


def test_a_pipeline_has_the_names_of_its_classes():
    facts = image_facts_of("L", 8, 8, class_names=["cat", "dog"])
    assert tiny_pipeline(tiny_unet(num_class_embeds=3), None, facts).class_names == ("cat", "dog")
    assert tiny_pipeline().class_names is None


@pytest.mark.slow
def test_load_accepts_the_old_name_of_dtype(tmp_path):
    model = save_ours(tmp_path / "model")
    assert ddpm_hf.load(model, torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    assert ddpm_hf.load(model).dtype == torch.float32
    with pytest.raises(ValueError, match="pass `dtype` or `torch_dtype`"):
        ddpm_hf.load(model, dtype=torch.float16, torch_dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"`dtype` must be a torch.dtype.*, got 'float16'"):
        ddpm_hf.load(model, dtype="float16")


@pytest.mark.parametrize(
    ("side", "count", "size"),
    [(32, 16, 4 * 192 + 6), (28, 64, 8 * 84 + 14), (8, 1, 256), (64, 400, 20 * 64 + 38)],
)
def test_grids_of_small_images_are_enlarged_by_whole_factors(side, count, size):
    images = [Image.new("L", (side, side), i % 256) for i in range(count)]
    grid = ddpm_hf.image_grid(images)
    assert grid.size == (size, size)


def test_an_empty_first_cell_and_column_names_are_drawn():
    image = Image.new("L", (64, 64))
    plain = ddpm_hf.image_grid([image, image], 2)
    grid = ddpm_hf.image_grid([None, image], 2, column_names=["a", "b"])
    assert grid.size == (plain.width, plain.height + 24)
    assert grid.getpixel((10, 100)) != (0, 0, 0)
    assert grid.getpixel((grid.width - 10, 100)) == (0, 0, 0)


@pytest.mark.slow
def test_train_without_options_asks_for_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ddpm_hf.ConfigError, match="`dataset`"):
        ddpm_hf.train()


@pytest.mark.slow
def test_a_run_returns_its_samples_and_writes_pictures_of_its_progress(tmp_path):
    result = run(tmp_path, num_samples=4, sample_steps=2, sample_inference_steps=3)
    newest = max((result.model_dir.parent / "samples").glob("*.png"))
    assert result.samples.tobytes() == Image.open(newest).convert("RGB").tobytes()
    assert min(result.samples.size) > 256
    for name in ("loss.png", "denoising.png"):
        assert Image.open(result.model_dir.parent / name).width > 256


@pytest.mark.slow
def test_a_run_without_samples_has_no_grid(tmp_path):
    assert run(tmp_path, num_samples=0).samples is None


@pytest.mark.slow
@pytest.mark.parametrize("in_kernel", [False, True])
def test_next_steps_are_python_in_a_notebook(tmp_path, monkeypatch, capsys, in_kernel):
    shell = SimpleNamespace(kernel=None) if in_kernel else None
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert is_notebook() == in_kernel
    result = run(tmp_path / "my run", num_samples=0)
    printed = capsys.readouterr().out
    assert (f"ddpm_hf.load({str(result.model_dir)!r})" in printed) == in_kernel
    assert (f"ddpm-hf sample '{result.model_dir}'" in printed) != in_kernel


def test_schedulers_have_readable_names_in_plots():
    names = [
        "DDPM:x_0_mse=null,timestep_spacing=trailing",
        "DDPM:timestep_spacing=trailing,eta=0",
        "DPMSolverMultistep:algorithm_type=sde-dpmsolver++,timestep_spacing=trailing",
    ]
    assert list(readable_names(names).values()) == [
        "DDPM, uncalibrated",
        "DDPM, eta 0",
        "DPMSolverMultistep, SDE",
    ]
    assert readable_names(["DDIM", "DDIM:timestep_spacing=trailing"]) == {
        "DDIM": "DDIM",
        "DDIM:timestep_spacing=trailing": "DDIM, trailing",
    }

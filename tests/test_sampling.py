"""Sampling to disk: resume, records of the options, and the reader."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from tiny_runs import tiny_unet

from ddpm_hf import GaussianDDPMPipeline, GaussianDDPMScheduler
from ddpm_hf.sampling import draw_images, draw_to, open_drawn
from ddpm_hf.utils.locks import exclusive_folder
from ddpm_hf.utils.shared_work import distributed_state


def build_pipeline(**config):
    scheduler = GaussianDDPMScheduler(
        num_train_timesteps=20, beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing"
    )
    return GaussianDDPMPipeline(tiny_unet(**config), scheduler)


CALL = {"num_inference_steps": 2, "batch_size": 4, "progress": False}


def all_of(drawn, batch_size=64):
    return np.concatenate(list(drawn.batches(batch_size)))


@pytest.mark.slow
def test_draw_to_gives_the_images_of_draw_images(tmp_path):
    pipeline = build_pipeline()
    drawn = draw_to(pipeline, tmp_path / "x", 10, seed=3, **CALL)
    assert (len(drawn), drawn.shape, drawn.labels) == (10, (10, 8, 8, 1), None)
    exact = np.stack(draw_images(pipeline, 10, seed=3, **CALL))
    np.testing.assert_array_equal(all_of(drawn), (exact * 255).round())
    np.testing.assert_array_equal(all_of(drawn, 3), all_of(open_drawn(tmp_path / "x")))
    np.testing.assert_array_equal(drawn.read(range(3, 9)), all_of(drawn)[3:9])
    assert next(drawn.batches(2, range(5, 8))).shape == (2, 8, 8, 1)
    assert drawn.options["seed"] == 3
    floats = draw_to(pipeline, tmp_path / "floats", 10, seed=3, dtype="float32", **CALL)
    np.testing.assert_array_equal(floats.stored(range(10)), exact)


def test_an_image_does_not_depend_on_the_number_of_images():
    pipeline = build_pipeline()
    many = draw_images(pipeline, 9, **CALL)
    few = draw_images(pipeline, 5, **CALL)
    np.testing.assert_array_equal(few, many[:5])


def test_resume_samples_missing_batches_only(tmp_path):
    pipeline = build_pipeline()
    complete = all_of(draw_to(pipeline, tmp_path / "x", 10, **CALL))
    (tmp_path / "x" / "part-000001.npy").unlink()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "x").iterdir()}
    with pytest.raises(ValueError, match="1 of 3 batches are missing"):
        open_drawn(tmp_path / "x")
    np.testing.assert_array_equal(all_of(draw_to(pipeline, tmp_path / "x", 10, **CALL)), complete)
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"seed": 1}, "`seed` 0 instead of 1"),
        ({"num_inference_steps": 3}, "`num_inference_steps` 2 instead of 3"),
        ({"eta": 0.5}, "`eta` unset instead of 0.5"),
        ({"batch_size": 5}, "`batch_size` 4 instead of 5"),
        ({"num_images": 11}, "`num_images` 10 instead of 11"),
        ({"dtype": "float32"}, "`dtype` uint8 instead of float32"),
    ],
)
def test_other_options_in_a_used_folder_raise_an_error_with_both_values(
    tmp_path, change, difference
):
    pipeline, options = build_pipeline(), {"num_images": 10, "seed": 0, **CALL}
    before = all_of(draw_to(pipeline, tmp_path / "x", **options))
    with pytest.raises(ValueError, match=f"{difference}.*overwrite=True"):
        draw_to(pipeline, tmp_path / "x", **options | change)
    np.testing.assert_array_equal(all_of(open_drawn(tmp_path / "x")), before)
    anew = draw_to(pipeline, tmp_path / "x", overwrite=True, **options | change)
    assert len(list((tmp_path / "x").glob("part-*"))) == -(-len(anew) // anew.options["batch_size"])


def test_a_change_of_weights_or_scheduler_is_detected_on_resume(tmp_path):
    pipeline = build_pipeline()
    draw_to(pipeline, tmp_path / "x", 4, **CALL)
    own = pipeline.scheduler
    for config, difference in [
        ({"timestep_spacing": "leading"}, "`timestep_spacing` trailing instead of leading"),
        ({"clip_sample": False}, "`clip_sample` True instead of False"),
    ]:
        pipeline.scheduler = GaussianDDPMScheduler.from_config(own.config, **config)
        with pytest.raises(ValueError, match=difference):
            draw_to(pipeline, tmp_path / "x", 4, **CALL)
    pipeline.scheduler = DDIMScheduler.from_config(own.config)
    with pytest.raises(ValueError, match="instead of DDIMScheduler"):
        draw_to(pipeline, tmp_path / "x", 4, **CALL)
    pipeline.scheduler = own
    with torch.no_grad():
        pipeline.unet.conv_in.bias += 1
    with pytest.raises(ValueError, match="`weights`"):
        draw_to(pipeline, tmp_path / "x", 4, **CALL)


def test_other_files_are_kept_and_a_failure_leaves_no_files(tmp_path):
    pipeline = build_pipeline()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="other files: choose another `folder`"):
        draw_to(pipeline, tmp_path, 4, overwrite=True, **CALL)
    with pytest.raises(ValueError, match="num_inference_steps"):
        draw_to(pipeline, tmp_path / "x", 4, **CALL | {"num_inference_steps": 21})
    with pytest.raises(ValueError, match="`num_images` must be at least 1, got 0"):
        draw_to(pipeline, tmp_path / "x", 0, **CALL)
    with (
        exclusive_folder(distributed_state(), tmp_path / "x", "folder"),
        pytest.raises(ValueError, match=r"x is in use by process .*, or choose another `folder`"),
    ):
        draw_to(pipeline, tmp_path / "x", 4, **CALL)
    with pytest.raises(TypeError, match="callback_on_step_end"):
        draw_to(pipeline, tmp_path / "x", 4, callback_on_step_end=print, **CALL)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_images_get_the_class_labels_in_turn(tmp_path):
    pipeline = build_pipeline(num_class_embeds=3)
    drawn = draw_to(pipeline, tmp_path / "x", 5, class_labels=[2, 0], **CALL)
    assert drawn.labels.tolist() == [2, 0, 2, 0, 2]
    again = draw_images(pipeline, 5, class_labels=[2, 0], **CALL)
    np.testing.assert_array_equal(all_of(drawn), (np.stack(again) * 255).round())


def test_open_drawn_reads_files_of_other_programs(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (5, 6, 9, 3), dtype=np.uint8)
    np.savez(tmp_path / "plain.npz", pixels, np.arange(5))
    np.savez_compressed(tmp_path / "small.npz", pixels)
    np.save(tmp_path / "x.npy", (pixels / 255).astype(np.float32))
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "folder" / f"{i}.png")
    for name in ("plain.npz", "small.npz", "x.npy", "folder"):
        drawn = open_drawn(tmp_path / name)
        np.testing.assert_array_equal(all_of(drawn, 2), pixels)
        np.testing.assert_array_equal(drawn.read(range(1, 5, 2)), pixels[1:5:2])
    assert open_drawn(tmp_path / "plain.npz").labels.tolist() == [0, 1, 2, 3, 4]
    np.savez(tmp_path / "other.npz", mu=np.zeros(3))
    with pytest.raises(ValueError, match="arr_0, but holds mu"):
        open_drawn(tmp_path / "other.npz")

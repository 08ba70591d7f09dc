"""Notes of the plan about images that set the mode of a model, or lose their colours to it."""

import pytest
from datasets import Dataset
from PIL import Image
from tiny_runs import tiny_config, tiny_unet

from ddpm_hf import GaussianDDPMPipeline, GaussianDDPMScheduler, train

pytestmark = pytest.mark.slow

GREY, RED, CLEAR = (
    Image.new("L", (8, 8), 90), Image.new("RGB", (8, 8), "red"), Image.new("RGBA", (8, 8), "#f008")
)  # fmt: skip


def plan_of(capsys, folder, images, **options):
    steps = {"max_train_steps": 1, "lr_warmup_steps": 0, "num_train_timesteps": 20}
    config = tiny_config(folder, **steps, **options)
    unet = None if "pretrained" in options else tiny_unet(**channels_of(images, options))
    train(config, unet=unet, dataset=Dataset.from_dict({"image": images}))
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]


def channels_of(images, options):
    count = len(options.get("image_mode") or max((image.mode for image in images), key=len))
    return {"in_channels": count, "out_channels": count}


@pytest.mark.parametrize(
    ("images", "options", "note"),
    [
        ([RED] * 8 + [CLEAR], {}, "1 of 9 images has transparent pixels"),
        ([CLEAR] * 6, {}, "6 of 6 images have transparent pixels"),
        ([RED] * 8 + [CLEAR], {"image_mode": "RGB"}, None),
        ([GREY] * 30 + [RED], {}, "1 of 31 images has colours, so the model gets colour"),
        ([GREY] * 2 + [RED] * 4, {}, None),
    ],
)
def test_the_plan_counts_the_images_that_set_the_mode(capsys, tmp_path, images, options, note):
    notes = plan_of(capsys, tmp_path, images, **options)
    assert len(notes) == (note is not None)
    if note:
        assert note in notes[0]
        assert ("`image_mode` RGB" if "transparent" in note else "`image_mode` L") in notes[0]


def test_a_grayscale_model_that_is_trained_on_colour_images_is_mentioned(capsys, tmp_path):
    scheduler = GaussianDDPMScheduler(20, beta_schedule="squaredcos_cap_v2")
    GaussianDDPMPipeline(tiny_unet(), scheduler).save_pretrained(tmp_path / "grey")
    grey = {"pretrained": str(tmp_path / "grey")}
    (note,) = plan_of(capsys, tmp_path / "a", [RED] * 3 + [GREY] * 2, **grey)
    assert "3 of 5 images have colours, which are removed" in note
    assert plan_of(capsys, tmp_path / "b", [GREY] * 4, **grey) == []

"""Pictures of the guides, drawn by the model of training/demo.py and by one that is trained here.

python docs/make_guide_figures.py runs/demo/model [NAME ...]     # the names of functions below
"""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from PIL import Image, ImageDraw

from ddpm_hf import (
    GaussianDDPMPipeline,
    GaussianDDPMScheduler,
    TrainingConfig,
    bits_per_dim,
    compare,
    evaluate,
    image_grid,
    load,
    train,
)
from ddpm_hf.evaluation.plots import plot_terms

DOCS = Path(__file__).parent
TRAINING = DOCS.parent / "training"
sys.path.append(str(TRAINING))
from demo import build_unet  # noqa: E402

FACES = TRAINING / "faces16"
RUNS = DOCS.parent / "runs" / "guides"
COLUMNS = 9
NUM_UPDATES, SHOWN_UPDATES = 500, (25, 50, 100, 200, 500)
NUM_NEW_FACES, NUM_TUNING_UPDATES = 100, 75
SKY = (150, 200, 240)


def test_faces(count: int) -> list[Image.Image]:
    """The first held-out faces."""
    faces = datasets.load_dataset("parquet", data_files=str(FACES / "test.parquet"), split="train")
    return [face.convert("RGB") for face in faces[:count]["image"]]


def seeds(count: int) -> list[torch.Generator]:
    """A generator for each image."""
    return [torch.Generator().manual_seed(i) for i in range(count)]


def save_rows(rows: Mapping[str, Iterable[Image.Image]], name: str, **options: Any) -> None:
    """Write docs/NAME.png with a named row of images for each item."""
    cells = [image for row in rows.values() for image in row]
    image_grid(cells, len(cells) // len(rows), list(rows), 48, **options).save(DOCS / f"{name}.png")


def quiet(pipeline: Any) -> Any:
    """The pipeline without progress bars."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# ----------------------------------------------------------------------------------------------
# A model that is trained here


def trained(name: str, dataset: Path, num_updates: int, **options: Any) -> Path:
    """Folder of a run in runs/guides with the network of the demo, without classes."""
    unet = None
    if "pretrained" not in options:
        torch.manual_seed(0)
        unet = UNet2DModel.from_config(build_unet(0).config, num_class_embeds=None)
    config = TrainingConfig(
        dataset=str(dataset),
        output_dir=str(RUNS / name),
        max_train_steps=num_updates,
        batch_size=16,
        learning_rate=2e-3,
        ema_decay=0.99,
        num_samples=COLUMNS,
        sample_steps=25,
        sample_inference_steps=25,
        **options,
    )
    train(config, unet=unet)
    return RUNS / name


def samples_at(run: Path, update: int) -> list[Image.Image]:
    """The images of a grid that a run wrote, in their own size."""
    with Image.open(run / "samples" / f"step-{update:08}.png") as grid:
        side = round(COLUMNS**0.5)
        step = (grid.width + 2) // side  # 2 pixels between cells
        boxes = [(i % side * step, i // side * step) for i in range(COLUMNS)]
        cells = [grid.crop((x, y, x + step - 2, y + step - 2)) for x, y in boxes]
    return [cell.resize((16, 16), Image.Resampling.NEAREST) for cell in cells]


def small_run() -> Path:
    """The run of train.md."""
    return trained("train", FACES, NUM_UPDATES)


def progress(_: Path) -> None:
    """Samples during training, from the same noise."""
    run = small_run()
    rows = {f"update {update}": samples_at(run, update) for update in SHOWN_UPDATES}
    save_rows(rows, "train_progress")


def fine_tuning(_: Path) -> None:
    """A few pictures of a new kind: trained from scratch, and from a pretrained model."""
    folder = RUNS / "faces-outdoors"
    folder.mkdir(parents=True, exist_ok=True)
    faces = test_faces(NUM_NEW_FACES)
    for i, face in enumerate(faces):
        for corner in ((0, 0), (15, 0), (0, 15), (15, 15)):
            if face.getpixel(corner) == (255, 255, 255):
                ImageDraw.floodfill(face, corner, SKY)
        face.save(folder / f"{i:03}.png")
    pretrained = str(small_run() / "model")
    scratch = trained("scratch", folder, NUM_TUNING_UPDATES)
    tuned = trained("tuned", folder, NUM_TUNING_UPDATES, pretrained=pretrained)
    rows = {
        "pictures": faces[:COLUMNS],
        "from scratch": samples_at(scratch, NUM_TUNING_UPDATES),
        "fine-tuned": samples_at(tuned, NUM_TUNING_UPDATES),
    }
    save_rows(rows, "fine_tune")


def likelihood(_: Path) -> None:
    """Bound of held-out faces by timestep, and the faces with the lowest and highest one."""
    model, output = small_run() / "model", RUNS / "likelihood"
    options = {"num_timesteps": 64, "num_images": 64}
    measured = evaluate(str(model), str(FACES), metrics=["bits-per-dim"], output=output, **options)
    plot_terms(measured.bound, DOCS / "likelihood_terms.png")
    pipeline, faces = load(str(model)), test_faces(64)
    x_0, generator = pipeline.encode_images(faces), torch.Generator().manual_seed(0)
    bound = bits_per_dim(
        pipeline.unet, pipeline.scheduler, x_0, num_timesteps=64, generator=generator
    )
    order = bound.total.argsort().tolist()
    shown = [*order[:5], *order[-5:]]
    titles = [f"{bound.total[i]:.2f}" for i in shown]
    save_rows({"bits/dim": [faces[i] for i in shown]}, "likelihood_faces", column_names=titles)


def three_ways(_: Path) -> None:
    """The same noise drawn by a checkpoint that is loaded in three ways."""
    model = str(small_run() / "model")
    custom = {"custom_pipeline": model, "trust_remote_code": True}
    pipelines = {
        "DiffusionPipeline": DiffusionPipeline.from_pretrained(model),
        "with custom_pipeline": DiffusionPipeline.from_pretrained(model, **custom),
        "ddpm_hf.load": load(model),
    }
    rows = {
        name: quiet(pipeline)(COLUMNS, seeds(COLUMNS), num_inference_steps=50).images
        for name, pipeline in pipelines.items()
    }
    first, *others = (np.stack([np.asarray(x) for x in row]).astype(int) for row in rows.values())
    print("largest differences of 255:", [int(abs(other - first).max()) for other in others])
    save_rows(rows, "checkpoints")


# ----------------------------------------------------------------------------------------------
# The model of the demo


def demo_pipeline(model: Path) -> GaussianDDPMPipeline:
    """The pipeline of the demo's model, without progress bars."""
    pipeline: GaussianDDPMPipeline = quiet(load(str(model)))
    return pipeline


def samplers(model: Path) -> None:
    """Samplers and numbers of steps: their samples, and their distances with a floor."""
    output = RUNS / "samplers"
    compare(
        [str(model)],
        str(FACES),
        schedulers=["DDPM", "DDPM:x_0_mse=null", "DDPM:eta=0", "DPMSolverMultistep"],
        num_inference_steps=[3, 5, 10, 25],
        metrics=["fd"],
        features="pixels",
        num_images=128,
        output=output,
    )
    for name, source in {"few_steps_samplers": "samples", "evaluate_fd": "comparison"}.items():
        (DOCS / f"{name}.png").write_bytes((output / f"{source}.png").read_bytes())


def copies(model: Path) -> None:
    """Drawn faces next to the nearest training faces, as `evaluate` writes them."""
    options = {"num_images": 128, "num_inference_steps": 25, "features": "pixels"}
    output = RUNS / "copies"
    print(evaluate(str(model), str(FACES), metrics=["memorisation"], output=output, **options))
    (DOCS / "evaluate_pairs.png").write_bytes((output / "closest-pairs.png").read_bytes())


def film(model: Path) -> None:
    """The film of notebook.md."""
    pipeline = demo_pipeline(model)
    steps = list(pipeline.sample_steps(1, seeds(1), num_inference_steps=8, class_labels=2, eta=0.0))
    rows = {
        "x_t": [pipeline.decode_images(step.sample)[0] for step in steps],
        "estimate of x_0": [pipeline.decode_images(step.pred_original_sample)[0] for step in steps],
    }
    save_rows(rows, "notebook", column_names=[f"t = {int(step.timestep)}" for step in steps])


def symptoms(model: Path) -> None:
    """The symptoms of troubleshooting.md, from the same noise."""
    pipeline = demo_pipeline(model)
    own = pipeline.scheduler
    labels = [i % 6 for i in range(COLUMNS)]

    def drawn(num_steps: int = 25, guidance_scale: float = 1.0, **changes: Any) -> list[Any]:
        changes = {"x_0_mse": None, **changes} if changes else {}
        pipeline.scheduler = GaussianDDPMScheduler.from_config(own.config, **changes)
        noise = seeds(COLUMNS)
        options = {"class_labels": labels, "guidance_scale": guidance_scale}
        return pipeline(COLUMNS, noise, num_steps, **options).images

    rows = {
        "none": drawn(),
        "1: another prediction type": drawn(prediction_type="epsilon"),
        "2: other betas": drawn(beta_schedule="linear"),
        "3: starts too late": drawn(3, timestep_spacing="leading"),
        "4: too few steps": drawn(3, timestep_spacing="linspace"),
        "5: guidance scale 12": drawn(guidance_scale=12),
        "6: 25 updates": samples_at(small_run(), SHOWN_UPDATES[0]),
    }
    save_rows(rows, "troubleshooting")


PICTURES = (progress, fine_tuning, likelihood, three_ways, samplers, copies, film, symptoms)


def main(model: str, *names: str) -> None:
    """Draw the pictures with these names, or all."""
    pictures = {picture.__name__: picture for picture in PICTURES}
    for name in names or pictures:
        pictures[name](Path(model))


if __name__ == "__main__":
    main(*sys.argv[1:])

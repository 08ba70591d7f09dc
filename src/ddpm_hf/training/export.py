"""Export of a run's portable checkpoint: EMA weights, training record and model card."""

import copy
import dataclasses
import logging
import os
import platform
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ddpm_hf.diffusion.atomic_files import replacing_folder
from ddpm_hf.diffusion.pipeline import GaussianDDPMPipeline
from ddpm_hf.hub.card import write_model_card
from ddpm_hf.paths import ModelPaths
from ddpm_hf.run_record import DatasetRecord, MetricRecord, RunRecord
from ddpm_hf.training.config import ResolvedConfig
from ddpm_hf.training.run import Run
from ddpm_hf.training.run_folder import write_json
from ddpm_hf.utils.text import public_name

logger = logging.getLogger(__name__)

# Local paths and names are private.
_LOCAL_OPTIONS = (
    "dataset", "output_dir", "pretrained", "push_to_hub", "unet_config", "evaluate_features",
    "report_to", "tracker_project_name", "run_name",
)  # fmt: skip


def export_model(
    run: Run, target: ModelPaths, metrics: Sequence[MetricRecord], kept_by: str | None = None
) -> None:
    """Write a model that loads with `DiffusionPipeline.from_pretrained` and is ready to be pushed.

    Args:
        run: its EMA weights are written.
        target: folder that is replaced; its other files, such as a licence, are kept.
        metrics: values measured with these weights.
        kept_by: figure by which these weights are the best of the run, if they are.
    """
    config = run.config
    with run.state.ema_weights() as unet, replacing_folder(target.root) as folder:
        model = ModelPaths(folder)
        scheduler = copy.deepcopy(run.components.scheduler)
        GaussianDDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(folder)
        write_json(model.facts, run_record(run, metrics, kept_by).to_dict())
        network = "# --unet-config unet/config.json\n" * (config.unet_config is not None)
        model.recipe.write_text(network + _public_config(config).to_yaml(), encoding="utf-8")
        shutil.copy2(run.paths.metrics, model.metrics)
        if grid := run.paths.newest_sample_grid():
            shutil.copy2(grid, model.samples)
        if target.card.exists():
            shutil.copy2(target.card, folder)  # keeps what was written by hand
        try:
            write_model_card(folder)
        except Exception as error:  # the model matters more than its card
            logger.warning("the model card was not renewed: %s", error)
        _copy_other_files(target.root, folder)


def _copy_other_files(source: Path, folder: Path) -> None:
    for path in source.iterdir() if source.exists() else ():
        if path.is_file() and not path.is_symlink() and not (folder / path.name).exists():
            shutil.copy2(path, folder)


def run_record(run: Run, metrics: Sequence[MetricRecord], kept_by: str | None = None) -> RunRecord:
    """The record of `run` for `training.json` and the model card; see `export_model`."""
    config, step = run.config, run.state.step
    base_keys = ("base_model", "dataset", "steps", "num_images_seen")
    base = {key: value for key, value in run.components.base.items() if key in base_keys}
    return RunRecord(
        dataset=_dataset_record(run),
        config=_public_config(config).to_dict(),
        steps=step,
        num_images_seen=step * config.batch_size,
        duration_s=round(run.total_elapsed_s, 1),
        hardware=_hardware(run.accelerator),
        computation=run.computation,
        versions={name: version(name) for name in ("ddpm-hf", "diffusers", "torch")},
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        metrics=tuple(metrics),
        kept_by=kept_by,
        base_model=public_name(config.pretrained) if config.pretrained is not None else None,
        base=base if config.pretrained is not None else None,
        license=config.license,
    )


def _dataset_record(run: Run) -> DatasetRecord:
    config, components = run.config, run.components
    source = config.dataset or "images passed in Python"
    name = public_name(source)
    is_hub_id = config.dataset is not None and name == source and "/" in source
    return DatasetRecord(
        name=name,
        config_name=config.dataset_config,
        split=config.split,
        num_images=len(components.images),
        num_skipped=components.num_skipped,
        left_out=components.left_out,
        image=components.facts.to_config()["image"],
        held_out=components.hold_out,
        hub_id=source if is_hub_id else None,
    )


def _public_config(config: ResolvedConfig) -> ResolvedConfig:
    hidden: Any = dict.fromkeys(_LOCAL_OPTIONS)
    return dataclasses.replace(config, **hidden)


def _hardware(accelerator: Accelerator) -> str:
    count = accelerator.num_processes
    if accelerator.device.type == "cuda":
        return f"{count} x {torch.cuda.get_device_name(accelerator.device)}"
    processes = f"{count} process" + "es" * (count > 1)
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), {processes}"

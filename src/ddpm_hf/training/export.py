"""The portable checkpoint of a run: averaged weights, and what a reader of its card should know."""

import copy
import dataclasses
import logging
import os
import platform
import shutil
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
from ddpm_hf.text import public_name
from ddpm_hf.training.config import ResolvedConfig, TrainingConfig
from ddpm_hf.training.run import Run
from ddpm_hf.training.run_folder import write_json

logger = logging.getLogger(__name__)

# Names of people's folders are nobody else's business.
_LOCAL_OPTIONS = (
    "dataset", "output_dir", "pretrained", "push_to_hub", "unet_config", "evaluate_features",
)  # fmt: skip


def export_model(target: ModelPaths, run: Run, facts: dict[str, Any]) -> None:
    """Write a model that loads with `DiffusionPipeline.from_pretrained`, ready to be pushed.

    Args:
        target: where; the folder is replaced as a whole.
        run: its averaged weights are written, with its newest metrics and samples.
        facts: what `training.json` says.
    """
    shared = _shareable(run.config)
    with run.state.ema_weights() as unet, replacing_folder(target.root) as folder:
        model = ModelPaths(folder)
        scheduler = copy.deepcopy(run.components.scheduler)
        GaussianDDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(folder)
        write_json(model.facts, facts)
        network = "# --unet-config unet/config.json\n" * (run.config.unet_config is not None)
        model.recipe.write_text(network + shared.to_yaml(), encoding="utf-8")
        shutil.copy2(run.paths.metrics, model.metrics)
        if grid := run.paths.newest_sample_grid():
            shutil.copy2(grid, model.samples)
        if target.card.exists():
            shutil.copy2(target.card, folder)  # what a person wrote in it stays
        try:
            write_model_card(folder)
        except Exception as error:  # the model matters more than its card
            logger.warning("the model card was not renewed: %s", error)
        _keep_files_of_others(target.root, folder)


def _keep_files_of_others(before: Path, folder: Path) -> None:
    """A licence, say, that a person put beside the model."""
    for path in before.iterdir() if before.exists() else ():
        if path.is_file() and not path.is_symlink() and not (folder / path.name).exists():
            shutil.copy2(path, folder)


def training_facts(run: Run, metrics: list[Any]) -> dict[str, Any]:
    """What happened, for `training.json` and the model card."""
    config, step = run.config, run.state.step
    facts = {
        "format_version": 1,
        "dataset": _dataset_facts(run),
        "config": _shareable(config).to_dict(),
        "steps": step,
        "num_images_seen": step * config.batch_size,
        "duration_s": round(run.total_elapsed_s, 1),
        "hardware": _hardware(run.accelerator),
        "computation": run.computation(),
        "versions": {name: version(name) for name in ("ddpm-hf", "diffusers", "torch")},
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "metrics": metrics,
    }
    if config.pretrained is not None:
        facts["base_model"] = public_name(config.pretrained)
        known = ("base_model", "dataset", "steps", "num_images_seen")
        facts["base"] = {key: value for key, value in run.components.base.items() if key in known}
    if config.license is not None:
        facts["license"] = config.license
    return facts


def _dataset_facts(run: Run) -> dict[str, Any]:
    config, components = run.config, run.components
    name = config.dataset or "images passed in Python"
    dataset = {
        "name": public_name(name),
        "config_name": config.dataset_config,
        "split": config.split,
        "num_images": len(components.images),
        "num_skipped": components.num_skipped,
        "left_out": components.left_out,
        "image": components.facts.to_config()["image"],
    }
    if components.hold_out is not None:
        dataset["held_out"] = components.hold_out
    if config.dataset is not None and public_name(name) == name and "/" in name:
        dataset["hub_id"] = name
    return dataset


def _shareable(config: ResolvedConfig) -> TrainingConfig:
    without: dict[str, Any] = dict.fromkeys(_LOCAL_OPTIONS)
    return dataclasses.replace(config, **without)


def _hardware(accelerator: Accelerator) -> str:
    count = accelerator.num_processes
    if accelerator.device.type == "cuda":
        return f"{count} x {torch.cuda.get_device_name(accelerator.device)}"
    processes = f"{count} process" + "es" * (count > 1)
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), {processes}"

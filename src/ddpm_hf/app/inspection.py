"""Inspection of a model: facts, schedule, calibrated error, bits/dim of a picture."""

import re
from collections.abc import Generator, Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from PIL import Image

from ddpm_hf.app.requests import class_of, whole
from ddpm_hf.app.served_models import ServedModel
from ddpm_hf.app.working import watched
from ddpm_hf.diffusion.conditioning import denoiser_of
from ddpm_hf.diffusion.config_extension import beta_schedule_of
from ddpm_hf.diffusion.scheduler_interface import num_outputs
from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler
from ddpm_hf.likelihood import BitsPerDim, bits_per_dim
from ddpm_hf.paths import ModelPaths
from ddpm_hf.sampling.sampler_choice import build_scheduler
from ddpm_hf.scheduler_spec import SchedulerSpec

MAX_CARD_CHARACTERS = 100_000
MAX_POINTS = 250
# Independent estimates of the bound of one picture.
COPIES, MAX_TERMS = 16, 256
_LOADING_TAG = re.compile(
    r"<\s*/?\s*(audio|base|embed|iframe|image|img|input|link|meta|object|picture|script|source|style"
    r"|svg|track|video)\b[^>]*>",
    re.IGNORECASE,
)


def diffusion_of(model: ServedModel) -> GaussianDDPMScheduler:
    """The diffusion process of a model, independent of the scheduler that it samples with."""
    scheduler: GaussianDDPMScheduler = build_scheduler(model.pipeline, SchedulerSpec("DDPM"))
    return scheduler


def model_facts(model: ServedModel, words: Mapping[str, str]) -> dict[str, str]:
    """Names and values of the properties of a model, in the language of `words`."""
    unet, config = model.pipeline.unet, diffusion_of(model).config
    width, height = model.size
    channels = unet.config.in_channels
    facts = {
        words["fact_images"]: f"{width} x {height}, {channels} x {model.bit_depth} bit",
        words["fact_parameters"]: f"{sum(p.numel() for p in unet.parameters()):,}",
        words["fact_schedule"]: f"{beta_schedule_of(config)[0]}, T = {model.num_train_timesteps:,}",
        words["fact_prediction"]: str(config.prediction_type),
        words["fact_variance"]: str(config.variance_type),
    }
    if model.class_labels is not None:
        names = [model.class_name(label) for label in model.class_labels]
        facts[words["class"]] = ", ".join(names[:20]) + ", ..." * (len(names) > 20)
    if model.recommended is not None:
        setting = model.recommended
        facts[words["recommended"]] = f"{setting.recommended}, K = {setting.num_inference_steps}"
    return facts


def card_text(model: ServedModel) -> str:
    """The model card as Markdown that loads nothing: images become links."""
    path = ModelPaths(model.folder).card
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        text = file.read(MAX_CARD_CHARACTERS).decode("utf-8", "replace")
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    return _LOADING_TAG.sub("", text).replace("![", "[")


def snr_curve(model: ServedModel) -> pd.DataFrame:
    """Log signal-to-noise ratio over t: columns t and log SNR."""
    t = _timesteps(model.num_train_timesteps)
    log_snr = diffusion_of(model).log_snr(t, torch.float64)
    return pd.DataFrame({"t": t.numpy(), "log SNR": log_snr.numpy()})


def error_curve(model: ServedModel) -> pd.DataFrame | None:
    """Root mean squared error of the estimate of x_0 over t; None without a calibration."""
    mse = diffusion_of(model).x_0_mse
    if mse is None:
        return None
    t = _timesteps(len(mse))
    return pd.DataFrame({"t": t.numpy(), "RMSE": mse[t].double().sqrt().numpy()})


def _timesteps(T: int) -> torch.Tensor:
    return torch.linspace(0, T - 1, min(T, MAX_POINTS)).round().long()


@dataclass(frozen=True)
class PictureBound:
    """Bound on -log2 p of one picture, bits/dim.

    Attributes:
        value: mean of independent estimates.
        standard_error: of the mean.
        num_calls: evaluations of the network per estimate.
    """

    value: float
    standard_error: float
    num_calls: int


def picture_bound(
    model: ServedModel, picture: Image.Image, class_label: object = None, num_terms: object = 32
) -> Generator[int, None, PictureBound]:
    """Measure the bound of a picture; yields the number of network calls so far.

    Args:
        model: the model.
        picture: in the format of the model.
        class_label: its class.
        num_terms: terms of the bound that each estimate samples.
    Raises:
        ValueError: for a value out of range.
    """
    terms = min(whole("num_terms", num_terms, 2, MAX_TERMS), model.num_train_timesteps)
    pipeline, scheduler = model.pipeline, diffusion_of(model)
    x_0 = pipeline.encode_images(picture)
    generators = [torch.Generator(x_0.device).manual_seed(i) for i in range(COPIES)]
    labels = None
    if model.class_labels is not None:
        labels = torch.full((COPIES,), class_of(model, class_label), device=x_0.device)
    outputs = num_outputs(pipeline.unet.config, scheduler)
    denoiser = denoiser_of(pipeline.unet, labels, outputs)

    def measure() -> BitsPerDim:
        return bits_per_dim(
            denoiser,
            scheduler,
            x_0.repeat(COPIES, 1, 1, 1),
            num_timesteps=terms,
            generator=generators,
            bit_depth=model.bit_depth,
            progress=False,
        )

    bound = yield from watched(pipeline.unet, measure)
    return PictureBound(bound.mean, bound.standard_error, terms)

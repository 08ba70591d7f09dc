"""The recorded settings distinguish everything that changes the images."""

import copy

import torch
from test_sampling import build_pipeline

from ddpm_hf.sampling.options import DrawOptions
from ddpm_hf.sampling.sampling_record import sampling_settings


def other_weights(pipeline):
    other = copy.deepcopy(pipeline.unet)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    return other


def settings(pipeline, **options):
    return sampling_settings(pipeline, DrawOptions(num_images=2, progress=False, **options))


def test_another_guide_is_another_setting():
    pipeline = build_pipeline()
    first = settings(pipeline, guide=pipeline.unet, guidance_scale=2.0)
    second = settings(pipeline, guide=other_weights(pipeline), guidance_scale=2.0)
    assert first.difference(second).startswith("`guide` ")
    assert first.difference(settings(pipeline, guidance_scale=2.0)).startswith("`guide` ")


def test_another_dtype_of_the_network_is_another_setting():
    pipeline = build_pipeline()
    first = settings(pipeline)
    pipeline.unet.to(torch.bfloat16)
    assert settings(pipeline).unet_dtype == "bfloat16"
    assert first.difference(settings(pipeline)) is not None

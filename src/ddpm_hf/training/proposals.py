"""What is proposed from the images and the machine, where the options leave it open."""

import dataclasses

import torch

from ddpm_hf.training.config import ConfigError, TrainingConfig


def propose(
    config: TrainingConfig, num_images: int, size: int, device: str, num_shares: int = 1
) -> TrainingConfig:
    """`config` with every option about the course of the training that was left open filled in.

    Args:
        config: the options as given.
        num_images: how many images there are.
        size: their longer side in pixels.
        device: "cpu" or the kind of accelerator; a CPU gets a shorter run.
        num_shares: processes x accumulation steps, which share a batch equally.
    Returns:
        a complete configuration: the recipe that gives the same run again.
    Raises:
        ConfigError: if the batch does not divide into equal shares.
    """
    on_cpu = device == "cpu"
    usual = (32 if size <= 32 else 16) if on_cpu else (64 if size <= 64 else 32)
    batch_size = config.batch_size or max(usual // num_shares, 1) * num_shares
    if batch_size % num_shares:
        raise ConfigError(
            f"batch_size {batch_size} does not divide into {num_shares} equal shares (processes x "
            f"gradient_accumulation_steps); {batch_size // num_shares * num_shares or num_shares} "
            f"and {(batch_size // num_shares + 1) * num_shares} do"
        )
    # 400 passes over a small set, within what an evening (CPU) or a night (GPU) allows.
    passes = max(400 * num_images // batch_size, 2000)
    longest = (5000 if size <= 32 else 3000) if on_cpu else 50_000
    steps = config.max_train_steps or min(passes, longest)
    warmup = config.lr_warmup_steps
    return dataclasses.replace(
        config,
        max_train_steps=steps,
        batch_size=batch_size,
        lr_warmup_steps=min(steps // 20, 1000) if warmup is None else warmup,
        sample_steps=config.sample_steps or (250 if on_cpu else 1000),
        checkpointing_steps=config.checkpointing_steps or (250 if on_cpu else 1000),
        validation_steps=config.validation_steps
        or config.checkpointing_steps
        or (250 if on_cpu else 1000),
    )


def rate_from_scratch(unet: torch.nn.Module) -> float:
    """The peak learning rate of a new network.

    DDPM's networks, of 128 channels, took 1e-4 to 2e-4 (2006.11239, appendix B); Adam's best rate
    falls with the width (2203.03466). The bound is what was tried, with 32 channels.
    """
    channels = getattr(getattr(unet, "config", None), "block_out_channels", (128,))
    return float(min(max(1e-4 * 128 / channels[0], 1e-4), 4e-4))

"""One optimizer update: loss, gradients, AdamW and EMA."""

from typing import Any

import torch
from torch import Tensor

from ddpm_hf.data.labels import NO_LABEL
from ddpm_hf.randomness import dropped_labels, noise_of_rows, seed_of, timestep_generator
from ddpm_hf.training.learning_rate import learning_rate
from ddpm_hf.training.objective import in_order_of_rows
from ddpm_hf.training.run import Run


def train_step(run: Run, micro_batches: list[Any], step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Make update `step`; without a finite gradient the weights stay as they are.

    Args:
        run: its weights, moments and EMA weights change.
        micro_batches: this rank's images of the update, or pairs of images and class labels.
        step: number of the update, from 0; images, timesteps and noise depend on it and the seed.
    Returns:
        loss and gradient norm, as scalars on the device, and the timesteps of the whole batch.
    """
    config, accelerator, batches = run.config, run.accelerator, run.batches
    scheduler, objective = run.components.scheduler, run.components.objective
    generator = timestep_generator(config.seed, step, accelerator.device)
    # Of the whole batch, on every rank. The weights correct for non-uniform timesteps.
    all_t, weights = objective.timesteps.sample(batches.batch_size, generator, accelerator.device)
    total_loss, all_losses = torch.zeros((), device=accelerator.device), []
    for micro_step, batch in enumerate(micro_batches):
        rows = batches.rows(micro_step)
        mine = slice(rows.start, rows.stop)
        x_0, labels = _to_device(run, batch, step, mine)
        noise, t = noise_of_rows(config.seed, step, rows, like=x_0), all_t[mine]
        # Dropout draws from the global generator.
        torch.manual_seed(seed_of(config.seed, "dropout", step, batches.rank, micro_step))
        with accelerator.accumulate(run.model):
            losses = objective.loss(run.denoiser(labels), scheduler, x_0, t, noise)  # (B,)
            loss = (losses * weights[mine]).mean()
            accelerator.backward(loss)
        total_loss += loss.detach() / config.gradient_accumulation_steps
        all_losses.append(losses.detach())
    # The gradients are summed over all ranks, so all ranks skip the same updates.
    grad_norm = accelerator.clip_grad_norm_(run.model.parameters(), config.max_grad_norm)
    if accelerator.scaler is None:
        # Fused AdamW skips the update if this is 1, a mechanism for gradient scalers. Unlike an
        # `if`, it does not make the host wait for the device.
        found_inf = 1 - torch.isfinite(grad_norm).float()
        run.state.optimizer.found_inf = found_inf  # type: ignore[attr-defined]
    run.state.optimizer.param_groups[0]["lr"] = learning_rate(config, step)
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.state.ema.step(run.state.unet.parameters())
    for average in run.state.averages:
        average.update(run.state.unet.parameters(), step + 1)
    if objective.timesteps.needs_losses:
        objective.timesteps.update(all_t, in_order_of_rows(all_losses, accelerator))
    return total_loss, grad_norm, all_t


def _to_device(run: Run, batch: Any, step: int, rows: slice) -> tuple[Tensor, Tensor | None]:
    """Images and class labels on the device; label dropout replaces labels by NO_LABEL."""
    device, config = run.accelerator.device, run.config
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True), None
    x_0, labels = (part.to(device, non_blocking=True) for part in batch)
    dropped = dropped_labels(
        config.seed, step, run.batches.batch_size, config.class_dropout, device
    )
    return x_0, torch.where(dropped[rows], NO_LABEL, labels)

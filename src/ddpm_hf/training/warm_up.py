"""Before the first update: what the memory holds, which threads compute, how long it will take."""

import time
from functools import partial

import torch

from ddpm_hf.data.labels import NO_LABEL
from ddpm_hf.training.config import TrainingError
from ddpm_hf.training.run import Run

# A run of fewer updates on a CPU ends before what is measured would pay.
_FEW_UPDATES = 100


def warm_up(run: Run) -> float | None:
    """Fit the micro-batches to the memory, and choose the threads.

    Returns:
        seconds of an update; None for a short run on a CPU, where nothing is tried.
    Raises:
        TrainingError: if not even one image at once fits the memory.
    """
    updates = run.batches.stop - run.state.step
    if updates == 0 or (updates <= _FEW_UPDATES and run.accelerator.device.type == "cpu"):
        return None
    while not _fits_memory(run):
        size = len(run.batches.rows(0))
        if size == 1:
            raise TrainingError(
                "out of memory with one image at once: choose a smaller resolution or network, or "
                "gradient_checkpointing"
            )
        factor = next(n for n in range(2, size + 1) if size % n == 0)
        run.split_micro_batches(factor)
        run.accelerator.print(
            f"memory     {size} images at once do not fit: {size // factor} in each of "
            f"{run.config.gradient_accumulation_steps} passes, the same batch"
        )
    if run.threads.is_open:
        run.threads.choose(partial(trial_pass, run))
    return trial_pass(run) * run.config.gradient_accumulation_steps


def _fits_memory(run: Run) -> bool:
    """Whether all processes have the memory for a micro-batch and the optimizer's moments."""
    parameters = list(run.state.unet.parameters())
    moments, fits = [], True
    try:
        if not run.state.optimizer.state:
            moments = [torch.empty_like(p) for p in parameters for _ in range(2)]
        trial_pass(run)
    except torch.OutOfMemoryError:
        fits = False
    del moments
    run.state.unet.zero_grad(set_to_none=True)
    everywhere = torch.tensor(int(fits), device=run.accelerator.device)
    return bool(run.accelerator.reduce(everywhere) == run.accelerator.num_processes)


def trial_pass(run: Run) -> float:
    """Seconds of a forward and a backward pass of a micro-batch, which leave no trace."""
    size, device = len(run.batches.rows(0)), run.accelerator.device
    parts, first = run.parts, run.parts.images[0, 0]
    has_labels = not isinstance(first, torch.Tensor)
    shape = first[0].shape if has_labels else first.shape
    x_0 = torch.full((size, *shape), -1.0, device=device)
    labels = torch.full((size,), NO_LABEL) if has_labels else None
    noise, t = torch.randn_like(x_0), torch.zeros(size, dtype=torch.long, device=device)
    start = time.monotonic()
    with run.accelerator.no_sync(run.model):
        losses = parts.objective.loss(run.denoiser(labels), parts.scheduler, x_0, t, noise)
        torch.autograd.backward(losses.mean())
    run.state.unet.zero_grad(set_to_none=True)
    losses[0].item()  # waits for the device
    return time.monotonic() - start

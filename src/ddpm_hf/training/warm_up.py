"""Before the first update: what fits the memory, what is compiled, how many threads, how fast."""

import time
from functools import partial

import torch
from torch import Tensor

from ddpm_hf.data.labels import NO_LABEL
from ddpm_hf.training.errors import TrainingError
from ddpm_hf.training.run import Run

# A run of fewer updates on a CPU ends before what is measured would pay.
_FEW_UPDATES = 100
# Kernels that add in another order give gradients within 1e-5 of each other, in half precision
# within some percent; wrong ones were off by a third.
_SAME_GRADIENT = {"no": 1e-3, "bf16": 0.1, "fp16": 0.1}


def warm_up(run: Run) -> float | None:
    """Fit the micro-batches to the memory, check what is compiled, and choose the threads.

    Returns:
        seconds of an update; None for a short run on a CPU, where little is tried.
    Raises:
        TrainingError: if not even one image at once fits the memory, or the network is compiled
            wrongly.
    """
    updates = run.batches.stop - run.state.step
    is_short = updates <= _FEW_UPDATES and run.accelerator.device.type == "cpu"
    if updates and not is_short:
        _fit_to_memory(run)
    if updates and run.computation()["compile"]:
        _check_compiled(run)
    if updates == 0 or is_short:
        return None
    if run.threads.is_open:
        run.threads.choose(partial(trial_pass, run))
    return trial_pass(run) * run.config.gradient_accumulation_steps


def _fit_to_memory(run: Run) -> None:
    """Make the micro-batches smaller until one fits."""
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


def _check_compiled(run: Run) -> None:
    """Refuse compiled kernels whose gradients are not those of the network itself.

    Dropout draws other masks when it is compiled. To switch it off is to compile the network once
    more, in half the time that the first one takes: too long for a check.
    """
    if any(isinstance(part, torch.nn.Dropout) and part.p > 0 for part in run.state.unet.modules()):
        run.accelerator.print("compile    gradients are not checked: the network has dropout")
        return
    run.accelerator.print("compile    the network, which takes a minute or more")
    run.model.train()  # as it will be: for the other mode it would be compiled anew
    compiled = _gradient(run)
    with torch.compiler.set_stance("force_eager"):
        plain = _gradient(run)
    error = float((compiled - plain).norm() / plain.norm())
    if error > _SAME_GRADIENT[run.accelerator.mixed_precision]:
        raise TrainingError(
            f"torch {torch.__version__} compiles this network wrongly: its gradients are off by "
            f"{error:.0%}; train it with compile=False"
        )


def _gradient(run: Run) -> Tensor:
    """That of a micro-batch, of all weights in one vector."""
    torch.manual_seed(0)
    _backward(run)
    gradients = [
        torch.zeros_like(weight) if weight.grad is None else weight.grad
        for weight in run.state.unet.parameters()
    ]
    run.state.unet.zero_grad(set_to_none=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


def trial_pass(run: Run) -> float:
    """Seconds of a forward and a backward pass of a micro-batch, which leave no trace."""
    start = time.monotonic()
    losses = _backward(run)
    run.state.unet.zero_grad(set_to_none=True)
    losses[0].item()  # waits for the device
    return time.monotonic() - start


def _backward(run: Run) -> Tensor:
    """The losses of a micro-batch of black images, whose gradients are then those of the weights.

    Returns:
        losses, (B,).
    """
    size, device = len(run.batches.rows(0)), run.accelerator.device
    components, first = run.components, run.components.images[0, 0]
    has_labels = not isinstance(first, torch.Tensor)
    shape = first[0].shape if has_labels else first.shape
    x_0 = torch.full((size, *shape), -1.0, device=device)
    labels = torch.full((size,), NO_LABEL) if has_labels else None
    noise, t = torch.randn_like(x_0), torch.zeros(size, dtype=torch.long, device=device)
    with run.accelerator.no_sync(run.model):
        losses = components.objective.loss(
            run.denoiser(labels), components.scheduler, x_0, t, noise
        )
        torch.autograd.backward(losses.mean())
    return losses.detach()

"""Trials before the first update: memory, compiled kernels, CPU threads, and speed."""

import time
from functools import partial

import torch
from torch import Tensor

from ddpm_hf.data.labels import NO_LABEL
from ddpm_hf.diffusion.checkpoint_limits import memory_bytes
from ddpm_hf.training.errors import TrainingError
from ddpm_hf.training.run import Run
from ddpm_hf.utils.backend_settings import is_out_of_memory
from ddpm_hf.utils.text import counted

# A shorter run on a CPU ends before the trials pay.
_FEW_UPDATES = 100
# Relative difference of gradients. Kernels that sum in another order differ by 1e-5, in half
# precision by some percent; wrong ones differed by a third.
_GRADIENT_TOLERANCE = {"no": 1e-3, "bf16": 0.1, "fp16": 0.1}


def warm_up(run: Run) -> float | None:
    """Fit micro-batches to the memory, check compiled kernels, choose the number of CPU threads.

    Returns:
        seconds per update; None for a short run on a CPU, which makes few trials.
    Raises:
        TrainingError: if a single image does not fit into the memory, or the compiled network has
            wrong gradients.
    """
    updates = run.num_updates_left
    on_cpu, is_dry = run.accelerator.device.type == "cpu", run.config.dry_run
    is_short = updates <= _FEW_UPDATES and on_cpu and not is_dry
    if updates and not is_short:
        run.accelerator.print("measuring  memory and speed of an update, before the plan")
        _fit_to_memory(run)
    if updates and run.computation.compile:
        _check_compiled(run)
    if updates:
        _settle_threads(run, measure=not is_short)
    if updates == 0 or is_short:
        return None
    return trial_pass(run) * run.config.gradient_accumulation_steps


def _settle_threads(run: Run, measure: bool) -> None:
    """Choose the number of CPU threads if it is open, and report a choice or a change."""
    if run.threads.is_unmeasured and measure:
        number = run.threads.choose(partial(trial_pass, run))
        run.accelerator.print(f"threads    {counted(number, 'CPU thread')}, chosen by timing")
    if change := run.threads.new_change:
        run.accelerator.print(
            f"threads    {change.num_threads} instead of {change.num_threads_before} from update "
            f"{change.step:,} on: the weights differ in their last bits from a run without this "
            "change"
        )


def _fit_to_memory(run: Run) -> None:
    """Split the micro-batches until one fits into the memory."""
    while not _fits_memory(run):
        size = run.micro_batch_size
        if size == 1:
            raise TrainingError(
                "out of memory with a batch of one image: choose a smaller `resolution` or "
                "network, or set `gradient_checkpointing`"
            )
        factor = next(n for n in range(2, size + 1) if size % n == 0)
        run.split_micro_batches(factor)
        run.accelerator.print(
            f"memory     {size:,} images at once do not fit: {size // factor:,} in each of "
            f"{run.config.gradient_accumulation_steps:,} passes, the same batch"
        )


def _fits_memory(run: Run) -> bool:
    """Whether a micro-batch and the optimizer's moments fit into the memory of every rank."""
    parameters = list(run.state.unet.parameters())
    moments, fits = [], True
    try:
        if _exceeds_cpu_memory(run):
            raise MemoryError
        if not run.state.optimizer.state:
            moments = [torch.empty_like(p) for p in parameters for _ in range(2)]
        trial_pass(run)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        fits = False
    del moments
    run.state.unet.zero_grad(set_to_none=True)
    num_fits = torch.tensor(int(fits), device=run.accelerator.device)
    return bool(run.accelerator.reduce(num_fits) == run.accelerator.num_processes)


def _exceeds_cpu_memory(run: Run) -> bool:
    """Whether the activations of a micro-batch need more than the physical memory of the machine.

    They are measured with a few images: Linux grants too much memory and then kills the process.
    """
    few = 2
    on_cpu = run.accelerator.device.type == "cpu"
    if run.micro_batch_size <= few or not on_cpu or run.computation.compile:
        return False
    weights = {weight.untyped_storage().data_ptr() for weight in run.state.unet.parameters()}
    sizes: dict[int, int] = {}

    def measured(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(measured, lambda saved: saved):
        _forward_and_backward(run, few)
    return sum(sizes.values()) * run.micro_batch_size / few > memory_bytes()


def _check_compiled(run: Run) -> None:
    """Compare the gradients of the compiled network with those of the eager network.

    Skipped with dropout, which draws other masks when compiled. Compiling the network again
    without dropout would add half of the compile time.
    """
    if any(isinstance(part, torch.nn.Dropout) and part.p > 0 for part in run.state.unet.modules()):
        run.accelerator.print("compile    gradients are not checked: the network has dropout")
        return
    run.accelerator.print("compile    the network, which takes a minute or more")
    run.model.train()  # in eval mode it would be compiled a second time
    compiled = _gradient(run)
    with torch.compiler.set_stance("force_eager"):
        eager = _gradient(run)
    error = float((compiled - eager).norm() / eager.norm())
    if error > _GRADIENT_TOLERANCE[run.accelerator.mixed_precision]:
        raise TrainingError(
            f"torch {torch.__version__} compiles this network wrongly: its gradients are off by "
            f"{error:.0%}; train it without `compile`"
        )


def _gradient(run: Run) -> Tensor:
    """Gradient of a micro-batch, all weights in one vector."""
    torch.manual_seed(0)
    _forward_and_backward(run)
    gradients = [
        torch.zeros_like(weight) if weight.grad is None else weight.grad
        for weight in run.state.unet.parameters()
    ]
    run.state.unet.zero_grad(set_to_none=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


def trial_pass(run: Run) -> float:
    """Seconds of a forward and backward pass of a micro-batch; the gradients are cleared."""
    start = time.monotonic()
    losses = _forward_and_backward(run)
    run.state.unet.zero_grad(set_to_none=True)
    losses[0].item()  # waits for the device
    return time.monotonic() - start


def _forward_and_backward(run: Run, size: int | None = None) -> Tensor:
    """Losses (B,) of black images, by default a micro-batch; leaves gradients in the network."""
    size, device = size or run.micro_batch_size, run.accelerator.device
    components = run.components
    x_0 = torch.full((size, *components.images.shape), -1.0, device=device)
    labels = None if components.images.labels is None else torch.full((size,), NO_LABEL)
    noise, t = torch.randn_like(x_0), torch.zeros(size, dtype=torch.long, device=device)
    with run.accelerator.no_sync(run.model):
        losses = components.objective.loss(
            run.denoiser(labels), components.scheduler, x_0, t, noise
        )
        torch.autograd.backward(losses.mean())
    return losses.detach()

"""The learning rate as a function of the update, so that there is nothing to save or restore."""

import math

from ddpm_hf.training.config import TrainingConfig, required


def learning_rate(config: TrainingConfig, step: int) -> float:
    """The learning rate of update `step`, counted from 0.

    Equals `get_scheduler` of transformers ("cosine", "constant_with_warmup"), which keeps it as the
    state of an object instead.

    Args:
        config: complete: peak rate, warm-up, number of updates and the form of the decay.
        step: the update, in [0, max_train_steps).
    """
    peak, warmup = required(config.learning_rate), required(config.lr_warmup_steps)
    if step < warmup:
        return peak * (step / max(1, warmup))
    if config.lr_scheduler == "constant":
        return peak
    progress = (step - warmup) / max(1, required(config.max_train_steps) - warmup)
    return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))

"""Learning rate as a function of the update, so that there is no scheduler state to save."""

import math

from ddpm_hf.training.config import ResolvedConfig


def learning_rate(config: ResolvedConfig, step: int) -> float:
    """Learning rate of update `step`, counted from 0: linear warmup, then cosine decay or constant.

    Equal to `get_scheduler` of transformers ("cosine", "constant_with_warmup").

    Args:
        config: peak rate, warmup, number of updates and decay.
        step: the update, in [0, max_train_steps).
    """
    peak, warmup = config.learning_rate, config.lr_warmup_steps
    if step < warmup:
        return peak * (step / max(1, warmup))
    if config.lr_scheduler == "constant":
        return peak
    progress = (step - warmup) / max(1, config.max_train_steps - warmup)
    return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))

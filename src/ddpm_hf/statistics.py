"""Statistics of measured values."""

import math

from torch import Tensor


def standard_error(values: Tensor) -> float:
    """Standard error of the mean of independent values, (N,); NaN for one value."""
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan

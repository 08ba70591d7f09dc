# SPDX-License-Identifier: Apache-2.0
"""Eval mode of a network for the duration of a context."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def evaluating(network: torch.nn.Module) -> Iterator[None]:
    """Context in which a network is in eval mode; each module then gets its previous mode back."""
    # A loaded network has no module in training mode; setting all of them takes as long as a step.
    in_training = [module for module in network.modules() if module.training]
    for module in in_training:
        module.training = False
    try:
        yield
    finally:
        for module in in_training:
            module.training = True

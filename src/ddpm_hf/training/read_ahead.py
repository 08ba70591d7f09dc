"""Micro-batches read one update ahead, so that unreadable images end a run with its state saved."""

import traceback
from collections.abc import Generator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader

from ddpm_hf.data import read_batches
from ddpm_hf.training.run import Run


class ReadAhead:
    """The micro-batches of the next update.

    Args:
        batches: the micro-batches of all updates.
        num_per_update: number of micro-batches per update.

    Attributes:
        micro_batches: those of the next update; empty after the last one.
        failure: the error that reading them raised, or None.
    """

    def __init__(self, batches: Generator[Any], num_per_update: int) -> None:
        self._source, self._num_per_update = batches, num_per_update
        self.micro_batches: list[Any] = []
        self.failure: Exception | None = None
        self.advance()

    def advance(self) -> None:
        """Read the micro-batches of the next update."""
        try:
            self.micro_batches = list(islice(self._source, self._num_per_update))
        except Exception as error:  # a dataset may raise anything; the state is saved first
            self.failure = error
            # Tracebacks keep the DataLoader workers alive, which inherit the lock of the run.
            for each in (error, error.__cause__):
                traceback.clear_frames(each.__traceback__ if each else None)

    def close(self) -> None:
        """End the DataLoader workers."""
        self._source.close()


def read_ahead(run: Run) -> ReadAhead:
    """Read this rank's share of all remaining micro-batches, in order."""
    on_cpu = run.accelerator.device.type == "cpu"
    workers = run.config.dataloader_num_workers
    loader = DataLoader(
        run.components.images,
        batch_sampler=run.batches,
        num_workers=(0 if on_cpu else 4) if workers is None else workers,
        pin_memory=not on_cpu,
    )
    return ReadAhead(read_batches(loader), run.config.gradient_accumulation_steps)

"""Images read one update ahead, so that what cannot be read stops a run in order."""

import traceback
from collections.abc import Generator
from itertools import islice
from typing import Any

import torch


class ReadAhead:
    """The micro-batches of the next update.

    Args:
        batches: the micro-batches of all updates.
        num_per_update: how many of them an update takes.

    Attributes:
        batches: those of the next update; fewer after the last one.
        failure: why they could not be read, or None.
    """

    def __init__(self, batches: Generator[Any], num_per_update: int) -> None:
        self._source, self._num_per_update = batches, num_per_update
        self.batches: list[Any] = []
        self.failure: Exception | None = None
        self.advance()

    def advance(self) -> None:
        """Read what the next update takes."""
        try:
            self.batches = list(islice(self._source, self._num_per_update))
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a data set raises, what was learned is saved first
            self.failure = error
            # They hold the processes that read, which hold the lock of the run's folder.
            for each in (error, error.__cause__):
                traceback.clear_frames(each.__traceback__ if each else None)

    def close(self) -> None:
        """End the processes that read."""
        self._source.close()

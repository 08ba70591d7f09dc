"""The main process goes first; what fails for it fails for all, with one error."""

from collections.abc import Callable
from typing import TypeVar

from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list

T = TypeVar("T")


def on_main(process: Accelerator | PartialState, action: Callable[[], T]) -> T | None:
    """`action()` on the main process, None on the others; bad input there is an error on all.

    Without that the others would wait, until the launcher ends them with a page of tracebacks.
    """
    result, failure = None, None
    if process.is_main_process:
        try:
            result = action()
        except (ValueError, OSError) as error:
            failure = error
    failure = broadcast_object_list([failure])[0]
    if failure is not None:
        raise failure
    return result


def main_first(process: Accelerator | PartialState, action: Callable[[], T]) -> T:
    """`action()` on the main process and then on the others, which find what it has cached."""
    result = on_main(process, action)
    return action() if result is None else result

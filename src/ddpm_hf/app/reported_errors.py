"""Errors of invalid requests as messages on the page."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr

from ddpm_hf.backend_settings import is_out_of_memory
from ddpm_hf.text import without_secrets


def reported(function: Callable[..., Any]) -> Callable[..., Any]:
    """Show a ValueError or a lack of memory to the visitor, without a traceback on the server.

    Args:
        function: a function or generator function of an event.
    """
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def generate(*args: Any, **kwargs: Any) -> Any:
            with _shown():
                yield from function(*args, **kwargs)

        return generate

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _shown():
            return function(*args, **kwargs)

    return call


@contextmanager
def _shown() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise gr.Error(without_secrets(str(error)), print_exception=False) from error
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise gr.Error("out of memory: ask for fewer images", print_exception=False) from error

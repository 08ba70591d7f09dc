"""Errors of invalid requests as messages on the page."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr
from gradio.context import LocalContext

from ddpm_hf.app.page_texts import language_of, texts
from ddpm_hf.app.request_errors import RequestError, message_of
from ddpm_hf.utils.backend_settings import is_out_of_memory


def reported(function: Callable[..., Any]) -> Callable[..., Any]:
    """Show a ValueError or a lack of memory to the visitor, without a traceback on the server.

    The message is in the language of the visitor's browser.

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
        raise _message(error) from error
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise _message(RequestError("memory")) from error


def _message(error: ValueError) -> gr.Error:
    words = texts(language_of(LocalContext.request.get(None)))
    return gr.Error(message_of(error, words), title=words["error"], print_exception=False)

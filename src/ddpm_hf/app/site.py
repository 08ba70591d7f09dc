"""Shared by all tabs of a page: the models, and the components of a visitor's session."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ddpm_hf.app.nearest_images import TrainingSet
from ddpm_hf.app.reported_errors import reported
from ddpm_hf.app.served_models import ServedModel

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
# Not a function for gradio_client: `endpoints` has those.
PRIVATE: Mapping[str, Any] = {"api_visibility": "private"}
QUICK: Mapping[str, Any] = {**PRIVATE, "queue": False, "show_progress": "hidden"}


def unchanged(function: Callable[..., Any]) -> Callable[..., Any]:
    """The decorator that does nothing."""
    return function


@dataclass(frozen=True)
class Site:
    """The models and functions of the page, shared by all visitors.

    Attributes:
        models: the models by name.
        training: training images by the name of the model, for models that have them.
        gpu: decorator of the functions that call a network, such as `spaces.GPU`.
    """

    models: Mapping[str, ServedModel]
    training: Mapping[str, TrainingSet]
    gpu: Decorator = unchanged

    @property
    def first(self) -> ServedModel:
        """The initially selected model."""
        return next(iter(self.models.values()))

    def on_click(
        self,
        button: gr.Button,
        function: Callable[..., Any],
        inputs: Sequence[Any],
        outputs: Sequence[Any],
        **options: Any,
    ) -> Any:
        """Call a function that uses a network on a click; one such function runs at a time.

        Args:
            button: the button.
            function: a generator function of plain values, which can run in another process.
            inputs, outputs: components.
            **options: of the event.
        Returns:
            the event, to be cancelled.
        """
        return button.click(
            self.gpu(reported(function)),
            list(inputs),
            list(outputs),
            show_progress="minimal",
            concurrency_id="model",
            concurrency_limit=1,
            **options,
        )


@dataclass(frozen=True)
class Session:
    """Components whose values belong to one visitor.

    Attributes:
        model: name of the chosen model.
        drawn: images that the visitor drew, as `Drawn`.
        language: key of the language.
        loaded: event that follows the opening of the page, after `language` is known.
    """

    model: gr.Dropdown
    drawn: gr.State
    language: gr.State
    loaded: Any

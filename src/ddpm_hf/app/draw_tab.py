"""Tab that draws images and shows how they appear."""

import time
from collections.abc import Generator
from typing import Any

import gradio as gr

from ddpm_hf.app import films
from ddpm_hf.app.browser_components import film_player
from ddpm_hf.app.controls import SamplingControls, request_of
from ddpm_hf.app.drawing import drawing_steps
from ddpm_hf.app.films import Frame
from ddpm_hf.app.picture_input import Drawn
from ddpm_hf.app.requests import DrawRequest
from ddpm_hf.app.served_models import ServedModel
from ddpm_hf.app.site import PRIVATE, Session, Site
from ddpm_hf.app.snippets import command_line, python_lines
from ddpm_hf.app.translations import translated as t
from ddpm_hf.app.working import Pace
from ddpm_hf.pictures import Pixels, image_grid, to_pil

FILM_INTERVAL_S = 0.1


def draw_tab(site: Site, session: Session) -> gr.HTML:
    """Build the tab.

    Returns:
        the film player; it sends "select" with the index of an image.
    """
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            controls = SamplingControls.build(site.first)
            with gr.Row():
                draw = gr.Button(t("draw_button"), variant="primary", min_width=100, elem_id="draw")
                stop = gr.Button(t("stop"), min_width=100, elem_id="stop")
        with gr.Column(scale=2, min_width=300):
            film = film_player(elem_id="film")
            with gr.Accordion(t("code"), open=False):
                python = gr.Code(
                    language="python", show_label=False, wrap_lines=True, elem_id="python"
                )
                shell = gr.Code(
                    language="shell", show_label=False, wrap_lines=True, lines=2, elem_id="command"
                )
    controls.follow(site, session.model)

    def run(name: str, *values: Any) -> Generator[tuple[Any, ...]]:
        served = site.models[name]
        request = request_of(served, values)
        lines = python_lines(served, request), command_line(served, request)
        for value, images in film_updates(served, request):
            kept = gr.skip() if images is None else Drawn(name, images, request.labels())
            yield value, *lines, kept

    event = site.on_click(
        draw,
        run,
        [session.model, *controls.components()],
        [film, python, shell, session.drawn],
        **PRIVATE,
    )
    stop.click(None, cancels=[event], **PRIVATE)
    return film


def film_updates(
    model: ServedModel, request: DrawRequest
) -> Generator[tuple[dict[str, Any], Pixels | None]]:
    """Values of the film player: steps about ten times a second, then the film and the images."""
    start, pace = time.monotonic(), Pace(FILM_INTERVAL_S)
    kept: set[int] = set()
    frames: list[Frame] = []
    captions = _captions(model, request)
    for step in drawing_steps(model, request, start):
        is_due = pace.is_due()
        if step.images is None and not (is_due or not kept or step.index in kept):
            continue
        frame = step.frame()
        kept = kept or films.kept_steps(step.total, frame)
        if step.index in kept:
            frames.append(frame)
        if step.images is not None:
            seconds = time.monotonic() - start
            yield _finished(model, request, frames, step.images, seconds, captions), step.images
        elif is_due or step.index == 1:
            yield films.film_value([frame], step.total, done=False, captions=captions), None


def _finished(
    model: ServedModel,
    request: DrawRequest,
    frames: list[Frame],
    images: Pixels,
    seconds: float,
    captions: list[str] | None,
) -> dict[str, Any]:
    """The whole film with its files."""
    pictures = [to_pil(image) for image in images]
    is_reduced = films.reduction(len(images), model.size) > 1
    final = films.sheet_of(films.rgb_pixels(images)) if is_reduced else None
    return films.film_value(
        frames,
        frames[-1].step,
        done=True,
        captions=captions,
        final=final and films.data_url(final),
        png=films.data_url(image_grid(pictures, films.columns_of(len(images)))),
        gif=films.data_url(films.film_gif(frames), "image/gif"),
        name=f"{model.name.replace('/', '-')}-seed{request.seed}",
        seconds=f"{seconds:.1f}",
    )


def _captions(model: ServedModel, request: DrawRequest) -> list[str] | None:
    labels = request.labels()
    return [model.class_name(label) for label in labels] if labels else None

"""Tab that edits a picture."""

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ddpm_hf.app.controls import SLIDER_GUIDANCE, class_choices
from ddpm_hf.app.editing import (
    DEFAULT_STEPS,
    KINDS,
    MAX_REPETITIONS,
    METHODS,
    OWN_STEPS,
    THOROUGH,
    EditRequest,
    EditResult,
    edit_picture,
)
from ddpm_hf.app.films import data_url
from ddpm_hf.app.page_texts import texts
from ddpm_hf.app.picture_input import (
    Chosen,
    PictureInput,
    choose_drawn,
    chosen_picture,
    label_update,
    painter_value,
)
from ddpm_hf.app.reported_errors import reported
from ddpm_hf.app.requests import RECOMMENDED, whole
from ddpm_hf.app.result_html import figure, picture_tag, progress_html, section
from ddpm_hf.app.served_models import ServedModel
from ddpm_hf.app.site import PRIVATE, QUICK, Session, Site
from ddpm_hf.app.snippets import edit_command
from ddpm_hf.app.translations import translated as t
from ddpm_hf.app.uploads import mask_picture
from ddpm_hf.app.working import with_progress
from ddpm_hf.pictures import image_grid, to_pil, to_rgb

SIDE_PIXELS = 144
MAX_DRAWS = 16
EDIT_TAB = "edit"


@dataclass(frozen=True)
class EditControls:
    """Components with the options of `EditRequest.of`."""

    strength: gr.Slider
    method: gr.Dropdown
    repetitions: gr.Slider
    source_class: gr.Dropdown
    class_label: gr.Dropdown
    guidance_scale: gr.Slider
    num_images: gr.Slider
    seed: gr.Number
    sampler: gr.Dropdown
    num_inference_steps: gr.Slider

    @classmethod
    def build(cls, model: ServedModel) -> "EditControls":
        """Create the components for a model."""
        given = _properties(model)
        source = gr.Dropdown(label=t("source_class"), visible=False, **given["source_class"])
        label = gr.Dropdown(label=t("target_class"), **given["class_label"])
        strength = gr.Slider(
            0.05, 1, 0.5, step=0.05, label=t("strength"), info=t("strength_info"), visible=False
        )
        method = gr.Dropdown(
            list(METHODS), value=METHODS[0], label=t("method"), info=t("method_info")
        )
        repetitions = gr.Slider(
            1, MAX_REPETITIONS, 5, step=1, label=t("repetitions"), info=t("repetitions_info")
        )
        number = gr.Slider(1, step=1, label=t("num_draws"), **given["num_images"])
        sampler = gr.Dropdown(label=t("edit_sampler"), elem_id="edit-sampler", **given["sampler"])
        is_own = given["sampler"]["value"] == OWN_STEPS
        steps = gr.Slider(
            1, step=1, label=t("num_steps"), visible=is_own, **given["num_inference_steps"]
        )
        with gr.Accordion(t("more"), open=False):
            guidance = gr.Slider(
                0, SLIDER_GUIDANCE, 1, step=0.25, label=t("guidance"), **given["guidance_scale"]
            )
            seed = gr.Number(0, label=t("seed"))
        return cls(
            strength, method, repetitions, source, label, guidance, number, seed, sampler, steps
        )

    def components(self) -> list[Any]:
        """The components, in the order of the fields."""
        return [getattr(self, name) for name in self.__dataclass_fields__]


def _properties(model: ServedModel) -> dict[str, dict[str, Any]]:
    """Properties of the components that depend on the model."""
    classes, T = class_choices(model, all_classes=False), model.num_train_timesteps
    number = min(MAX_DRAWS, model.max_images)
    samplers = [(t("edit_own"), OWN_STEPS), (t("edit_thorough"), THOROUGH)]
    if model.recommended is not None:
        samplers.insert(0, (t("edit_recommended"), RECOMMENDED))
    return {
        "source_class": {name: classes[name] for name in ("choices", "value")},
        "class_label": classes,
        "guidance_scale": {"visible": model.class_labels is not None},
        "num_images": {"maximum": number, "value": min(6, number)},
        "sampler": {"choices": samplers, "value": samplers[0][1]},
        "num_inference_steps": {"maximum": T, "value": min(DEFAULT_STEPS, T)},
    }


def edit_tab(site: Site, session: Session, film: gr.HTML, tabs: gr.Tabs) -> None:
    """Build the tab.

    Args:
        site, session: of the page.
        film: film player; a click on one of its images opens it here.
        tabs: all tabs of the page.
    """
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            kinds = [(t(f"kind_{kind}"), kind) for kind in KINDS]
            kind = gr.Radio(kinds, value=KINDS[0], label=t("kind"), elem_id="kind")
            picture = PictureInput.build("picture")
            with gr.Group(visible=False) as more:
                second = PictureInput.build("second")
            controls = EditControls.build(site.first)
            with gr.Row():
                run = gr.Button(
                    t("edit_button"), variant="primary", min_width=100, elem_id="run-edit"
                )
                stop = gr.Button(t("stop"), min_width=100)
        with gr.Column(scale=2, min_width=300):
            result = gr.HTML(elem_id="edited", elem_classes="result", apply_default_css=False)
            with gr.Accordion(t("code_edit"), open=False):
                command = gr.Code(language="shell", show_label=False, wrap_lines=True, lines=2)
    picture.connect(site, session, kind, controls.source_class)
    second.connect(site, session)
    _follow(site, session.model, kind, controls, picture, more)

    def work(
        language: str, name: str, kind: str, chosen: Any, board: Any, other: Any, *values: Any
    ) -> Generator[Any]:
        served, words = site.models[name], texts(language)
        edit = EditRequest.of(
            served,
            kind,
            chosen_picture(served, chosen),
            mask=mask_picture(board, served) if kind == "inpaint" else None,
            second=chosen_picture(served, other) if kind == "between" else None,
            **dict(zip(EditControls.__dataclass_fields__, values, strict=True)),
        )
        result = yield from with_progress(
            edit_picture(served, edit), lambda calls: (progress_html(calls, words), gr.skip())
        )
        yield result_html(edit, result, words), edit_command(served, edit)

    inputs = [session.language, session.model, kind, picture.chosen, picture.board, second.chosen]
    event = site.on_click(
        run, work, [*inputs, *controls.components()], [result, command], **PRIVATE
    )
    stop.click(None, cancels=[event], **PRIVATE)

    @reported
    def open_image(click: gr.EventData, name: str, drawn: Any, kind: str) -> Any:
        index = click._data.get("index") if isinstance(click._data, dict) else None
        image = choose_drawn(site.models[name], drawn, whole("index", index))
        label = label_update(image)
        return *picture.shown(image, kind), gr.update(selected=EDIT_TAB), label, label

    film.select(
        open_image,
        [session.model, session.drawn, kind],
        [picture.chosen, picture.board, tabs, controls.source_class, controls.class_label],
        **PRIVATE,
    )


def _follow(
    site: Site,
    model: gr.Dropdown,
    kind: gr.Radio,
    controls: EditControls,
    picture: PictureInput,
    second: gr.Group,
) -> None:
    """Show the components that a kind of edit needs, with the limits of the model."""
    kinds_with = {
        controls.strength: ("vary",),
        controls.method: ("inpaint",),
        controls.repetitions: ("inpaint",),
        controls.num_images: ("inpaint", "vary", "between"),
        second: ("between",),
    }

    def for_kind(name: str, kind: str, chosen: Any) -> list[Any]:
        has_classes = site.models[name].class_labels is not None
        is_chosen = isinstance(chosen, Chosen)
        board = painter_value(chosen.picture, kind == "inpaint") if is_chosen else None
        shown = [gr.update(visible=kind in kinds) for kinds in kinds_with.values()]
        return [*shown, gr.update(visible=kind == "class" and has_classes), board]

    outputs = [*kinds_with, controls.source_class, picture.board]
    kind.change(for_kind, [model, kind, picture.chosen], outputs, **QUICK)

    def for_model(name: str) -> list[Any]:
        return [gr.update(**given) for given in _properties(site.models[name]).values()]

    outputs = [getattr(controls, name) for name in _properties(site.first)]
    model.change(for_model, model, outputs, **QUICK)
    controls.sampler.change(
        lambda sampler: gr.update(visible=sampler == OWN_STEPS),
        controls.sampler, controls.num_inference_steps, **QUICK,
    )  # fmt: skip


def result_html(edit: EditRequest, result: EditResult, words: Mapping[str, str]) -> str:
    """The picture, its edits and their standard deviation, with links to files."""
    original = picture_tag(to_rgb(edit.pictures.image), words["original"], SIDE_PIXELS)
    images = [to_rgb(image) for image in result.images]
    sections = [section(words["original"], [original])]
    draws = [figure(image, str(i + 1), SIDE_PIXELS) for i, image in enumerate(images)]
    sections.append(section(words["results"], draws))
    if result.std is not None:
        spread = result.std.mean(-1, keepdims=True)
        heat = to_rgb(to_pil(spread / max(float(spread.max()), 1e-6)))
        caption = words["std_info"].format(largest=f"{float(spread.max()):.2f}")
        sections.append(section(words["std"], [figure(heat, caption, SIDE_PIXELS)]))
    if result.expected_gain is not None:
        gain = words["gain"].format(share=f"{result.expected_gain:.0%}")
        sections.append(f"<p>{gain}</p>")
    files = {"picture.png": edit.pictures.image, "edited.png": image_grid(images)}
    if edit.pictures.mask is not None:
        files["mask.png"] = edit.pictures.mask
    if edit.pictures.between is not None:
        files["second.png"] = edit.pictures.between
    links = (
        f'<a href="{data_url(picture)}" download="{name}">{name}</a>'
        for name, picture in files.items()
    )
    return "".join(sections) + f'<p class="film-foot">{"".join(links)}</p>'

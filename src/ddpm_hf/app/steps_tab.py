"""Tab that compares samplers and numbers of steps on the same noise."""

from collections.abc import Generator, Mapping, Sequence
from html import escape
from typing import Any

import gradio as gr

from ddpm_hf.app.comparison import ComparedSetting, compare_settings, step_choices
from ddpm_hf.app.controls import class_choices
from ddpm_hf.app.page_texts import texts
from ddpm_hf.app.request_errors import message_of
from ddpm_hf.app.requests import SAMPLERS
from ddpm_hf.app.result_html import picture_tag, section, tiled
from ddpm_hf.app.served_models import ServedModel
from ddpm_hf.app.site import PRIVATE, QUICK, Session, Site
from ddpm_hf.app.translations import translated as t
from ddpm_hf.scheduler_spec import readable_names

DEFAULT_SAMPLERS = ("DDPM", "DDIM", "DPMSolverMultistep")
DEFAULT_STEPS = (5, 10, 25, 50)
CELL_PIXELS = 144
MAX_IMAGES = 9


def steps_tab(site: Site, session: Session) -> None:
    """Build the tab."""
    first = site.first
    readable = readable_names(SAMPLERS)
    gr.Markdown(t("steps_help"))
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            samplers = gr.Dropdown(
                [(readable[name], name) for name in SAMPLERS], value=list(DEFAULT_SAMPLERS),
                multiselect=True, label=t("samplers"),
            )  # fmt: skip
            steps = gr.CheckboxGroup(
                step_choices(first), value=_default_steps(first), label=t("num_steps"),
                elem_id="compared-steps",
            )  # fmt: skip
            number = gr.Slider(1, MAX_IMAGES, 4, step=1, label=t("num_images"))
            label = gr.Dropdown(label=t("class"), **class_choices(first))
            seed = gr.Number(0, label=t("seed"))
            with gr.Row():
                compare = gr.Button(
                    t("compare"), variant="primary", min_width=100, elem_id="compare"
                )
                stop = gr.Button(t("stop"), min_width=100, elem_id="stop-steps")
        with gr.Column(scale=3, min_width=300):
            result = gr.HTML(elem_id="comparison", elem_classes="result", apply_default_css=False)

    def for_model(name: str) -> list[Any]:
        chosen = site.models[name]
        update = gr.update(choices=step_choices(chosen), value=_default_steps(chosen))
        return [update, gr.update(**class_choices(chosen))]

    session.model.change(for_model, session.model, [steps, label], **QUICK)

    def run(
        language: str, name: str, samplers: Any, steps: Any, number: Any, label: Any, seed: Any
    ) -> Generator[str]:
        words, done = texts(language), list[ComparedSetting]()
        options = {"num_images": number, "class_label": label, "seed": seed}
        for setting in compare_settings(site.models[name], samplers, steps, **options):
            if setting is None:
                yield gr.skip()
            else:
                done.append(setting)
                yield comparison_html(done, words)

    inputs = [session.language, session.model, samplers, steps, number, label, seed]
    event = site.on_click(compare, run, inputs, [result], **PRIVATE)
    stop.click(None, cancels=[event], **PRIVATE)


def _default_steps(model: ServedModel) -> list[int]:
    choices = step_choices(model)
    return [K for K in choices if K in DEFAULT_STEPS] or choices[:2]


def comparison_html(settings: Sequence[ComparedSetting], words: Mapping[str, str]) -> str:
    """One row per sampler, with images, cost and bound of each number of steps."""
    rows: dict[str, list[str]] = {}
    names = readable_names(setting.sampler for setting in settings if not setting.problem)
    for setting in settings:
        row = rows.setdefault(names.get(setting.sampler, setting.sampler), [])
        row.append(_cell(setting, words))
    return "".join(section(name, cells) for name, cells in rows.items())


def _cell(setting: ComparedSetting, words: Mapping[str, str]) -> str:
    title = f"K = {setting.num_inference_steps}"
    if setting.images is None:
        problem = message_of(setting.problem, words) if setting.problem else ""
        return f"<figure><b>{title}</b><figcaption>{escape(problem)}</figcaption></figure>"
    facts = [f"{setting.seconds:.2f} s", words["calls"].format(num=setting.num_calls)]
    if setting.bits_per_dim is not None:
        facts.append(words["bound"].format(bits=f"{setting.bits_per_dim:.3f}"))
    picture = picture_tag(tiled(setting.images), f"{setting.sampler}, {title}", CELL_PIXELS)
    return (
        f"<figure>{picture}<figcaption><b>{title}</b><br>{'<br>'.join(facts)}</figcaption></figure>"
    )

"""Choice of a picture: an upload, or one of the images that the visitor drew."""

from dataclasses import dataclass
from typing import Any

import gradio as gr
from PIL import Image

from ddpm_hf.app.browser_components import painter
from ddpm_hf.app.films import data_url
from ddpm_hf.app.reported_errors import reported
from ddpm_hf.app.request_errors import RequestError
from ddpm_hf.app.served_models import ServedModel
from ddpm_hf.app.site import PRIVATE, QUICK, Session, Site
from ddpm_hf.app.translations import translated as t
from ddpm_hf.app.uploads import open_upload
from ddpm_hf.pictures import Pixels, to_pil, to_rgb

LIFETIME_S = 3600


@dataclass(frozen=True)
class Drawn:
    """Images that a visitor drew; kept in the session only.

    Attributes:
        model: name of the model.
        images: (N, H, W, C), float in [0, 1].
        labels: class number of each image.
    """

    model: str
    images: Pixels
    labels: list[int] | None

    def picture(self, index: int, bit_depth: int) -> Image.Image:
        """An image in the format of the model."""
        return to_pil(self.images[index % len(self.images)], bit_depth)


@dataclass(frozen=True)
class Chosen:
    """A picture in the format of a model; kept in the session only.

    Attributes:
        model: name of the model.
        picture: the picture.
        index: number of the drawn image; -1 for an upload.
        label: class of the drawn image, if it has one.
    """

    model: str
    picture: Image.Image
    index: int = -1
    label: int | None = None


@dataclass(frozen=True)
class PictureInput:
    """A picture with its buttons.

    Attributes:
        chosen: the `Chosen` picture of the session.
        board: shows it.
        upload, take: buttons.
    """

    chosen: gr.State
    board: gr.HTML
    upload: gr.UploadButton
    take: gr.Button

    @classmethod
    def build(cls, elem_id: str) -> "PictureInput":
        """Create the components."""
        chosen = gr.State(time_to_live=LIFETIME_S)
        board = painter(elem_id=elem_id)
        with gr.Row():
            upload = gr.UploadButton(
                t("upload"),  # type: ignore[arg-type]  # annotated as str, but translated, too
                file_types=["image"],
                min_width=100,
                size="sm",
                elem_id=f"{elem_id}-upload",
            )
            take = gr.Button(t("take_drawn"), size="sm", min_width=100, elem_id=f"{elem_id}-take")
        return cls(chosen, board, upload, take)

    def connect(
        self, site: Site, session: Session, paint: Any = None, label: gr.Dropdown | None = None
    ) -> None:
        """React to the buttons and to the choice of another model.

        Args:
            site, session: of the page.
            paint: component whose value "inpaint" turns the brush on; None for no brush.
            label: gets the class of a drawn image.
        """
        model = session.model
        inputs = [] if paint is None else [paint]
        outputs = [self.chosen, self.board]

        @reported
        def take_upload(path: Any, name: str, *kind: str) -> Any:
            return self.shown(Chosen(name, open_upload(path, site.models[name])), *kind)

        @reported
        def take_drawn(name: str, drawn: Any, chosen: Any, *kind: str) -> Any:
            index = chosen.index + 1 if isinstance(chosen, Chosen) else 0
            drawn_image = choose_drawn(site.models[name], drawn, index)
            shown = self.shown(drawn_image, *kind)
            return shown if label is None else (*shown, label_update(drawn_image))

        self.upload.upload(take_upload, [self.upload, model, *inputs], outputs, **PRIVATE)
        with_label = outputs if label is None else [*outputs, label]
        drawn = [model, session.drawn, self.chosen, *inputs]
        self.take.click(take_drawn, drawn, with_label, **PRIVATE)
        model.change(lambda: (None, None), None, outputs, **QUICK)

    @staticmethod
    def shown(chosen: Chosen, kind: str = "") -> tuple[Chosen, dict[str, Any]]:
        """Values of `chosen` and `board`."""
        return chosen, painter_value(chosen.picture, kind == "inpaint")


def painter_value(picture: Image.Image, paint: bool) -> dict[str, Any]:
    """Value of the painter.

    Args:
        picture: the picture.
        paint: whether the visitor can paint a mask.
    """
    rgb = to_rgb(picture)
    return {"picture": data_url(rgb), "size": list(rgb.size), "paint": paint, "mask": ""}


def choose_drawn(model: ServedModel, drawn: Any, index: int) -> Chosen:
    """One of the drawn images.

    Raises:
        ValueError: if the visitor has drawn none with this model.
    """
    if not isinstance(drawn, Drawn) or drawn.model != model.name:
        raise RequestError("no_drawn")
    index %= len(drawn.images)
    label = drawn.labels[index] if drawn.labels else None
    return Chosen(model.name, drawn.picture(index, model.bit_depth), index, label)


def label_update(chosen: Chosen) -> Any:
    """Update of a dropdown of classes to the class of a picture."""
    return gr.skip() if chosen.label is None else chosen.label


def chosen_picture(model: ServedModel, chosen: Any) -> Image.Image:
    """The picture of a session.

    Raises:
        ValueError: if there is none for this model.
    """
    if not isinstance(chosen, Chosen) or chosen.model != model.name:
        raise RequestError("no_picture")
    return chosen.picture

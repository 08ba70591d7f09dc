"""Start of the web server."""

import os
import threading
from collections.abc import Mapping, Sequence

# Gradio reads these on import. After this number of calls, it summarises them with pandas.
os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_ANALYTICS_CACHE_FREQUENCY": "1000000"}
import gradio as gr

from ddpm_hf.app.nearest_images import TrainingSet
from ddpm_hf.app.page import build_page
from ddpm_hf.app.page_texts import static_file
from ddpm_hf.app.served_models import ServedModel
from ddpm_hf.app.site import Decorator, Site, unchanged
from ddpm_hf.app.translations import translations

MAX_UPLOAD = "16mb"
# The browser refuses requests to other servers, such as for pictures in a model card.
_CONTENT_POLICY = (
    '<meta http-equiv="Content-Security-Policy" content="'
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'\">"
)
MAX_SESSIONS = 200


def theme() -> gr.themes.Base:
    """Theme with fonts of the system, so that a page asks no other server for them."""
    sans = ("system-ui", "sans-serif")
    mono = ("ui-monospace", "Consolas", "monospace")
    return gr.themes.Default(
        primary_hue="indigo", secondary_hue="indigo", neutral_hue="slate", font=sans, font_mono=mono
    )


def start(
    models: Sequence[ServedModel],
    training: Mapping[str, TrainingSet] | None = None,
    *,
    gpu: Decorator = unchanged,
    host: str | None = None,
    port: int | None = None,
    share: bool = False,
    open_browser: bool = False,
) -> gr.Blocks:
    """Start the application; returns when it answers, with `.local_url` and `.share_url`.

    Args:
        models: the models.
        training: training images by the name of the model, for models that have them.
        gpu: decorator of the functions that call a network, such as `spaces.GPU`.
        host: address to listen on; by default that of `GRADIO_SERVER_NAME`, else 127.0.0.1.
        port: port; None for a free one, from 7860.
        share: also open a public address at gradio.live.
        open_browser: open the page in a browser.
    Raises:
        ValueError: if the address is not one of this machine, or the port is taken.
    """
    page = build_page(Site({model.name: model for model in models}, training or {}, gpu))
    try:
        page.launch(
            server_name=host,
            server_port=port,
            share=share,
            inbrowser=open_browser,
            prevent_thread_lock=True,
            quiet=True,
            show_error=True,
            max_file_size=MAX_UPLOAD,
            state_session_capacity=MAX_SESSIONS,
            enable_monitoring=False,
            run_history=False,
            mcp_server=False,
            ssr_mode=False,
            pwa=False,
            footer_links=["api", "settings"],
            i18n=translations(),
            theme=theme(),
            css=static_file("page.css"),
            head=_CONTENT_POLICY,
            # Skips a second check that the page answers, which fails after 3 s on a busy machine.
            _frontend=False,
        )
    except OSError as error:
        where = f"`host` {host}" + (f" and `port` {port}" if port else "")
        raise ValueError(
            f"cannot listen on {where}: use an address of this machine and a free port"
        ) from error
    return page


def wait(page: gr.Blocks) -> None:
    """Serve until the process is interrupted; raises KeyboardInterrupt then."""
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)

"""`ddpm-hf app`."""

from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar

from ddpm_hf.commands.messages import command_options, say
from ddpm_hf.model_options import LoadOptions
from ddpm_hf.options import REQUIRED, Options, option
from ddpm_hf.utils.text import check_local_path, how_to_install

HELP = "open models in the browser: draw, compare, edit, look inside"
DESCRIPTION = """
open models in the browser: draw, compare, edit, look inside

  ddpm-hf app runs/photos/model                      prints the address of the page
  ddpm-hf app runs/photos/model --open               opens it in a browser
  ddpm-hf app runs/a/model runs/b/model user/repo    choose among several models on the page
  ddpm-hf app runs/photos/model --host 0.0.0.0       for other machines of the network, too

The page sends nothing to other servers. Visitors wait in a queue. Press Ctrl-C to stop.
"""


@dataclass(frozen=True, kw_only=True)
class ServerOptions(Options):
    """Address of the page."""

    _argument_group_name: ClassVar[str] = "server"

    host: str = option(
        "127.0.0.1", "address to listen on; 0.0.0.0 for all of this machine", metavar="ADDRESS"
    )
    port: int | None = option(
        None, "port (default: the first free one from 7860)", minimum=1, maximum=65535
    )
    share: bool = option(
        False,
        "also open a public address for 7 days, through a server of Gradio; everyone who knows it"
        " can use the models",
    )
    open: bool = option(False, "open the page in a browser")


@dataclass(frozen=True, kw_only=True)
class TrainingDataOptions(Options):
    """Training images, to compare pictures with."""

    _argument_group_name: ClassVar[str] = "training images"

    data: str | None = option(
        None,
        "training images of the models, to show the nearest ones to a picture: a folder, files or"
        " a Hub dataset",
        metavar="DATASET",
        is_path=True,
    )
    split: str = option("train", "split of `data`", metavar="NAME")


@dataclass(frozen=True, kw_only=True)
class AppCommand(LoadOptions, TrainingDataOptions, ServerOptions):
    """Options of `ddpm-hf app`."""

    models: list[str] = option(
        REQUIRED,
        "Hub repositories or folders of models",
        metavar="MODEL",
        is_path=True,
        is_positional=True,
    )


def run(argv: list[str]) -> int:
    """Serve the page until it is interrupted."""
    usage = "MODEL [MODEL ...] [--option VALUE ...]"
    with command_options(AppCommand, argv, "app", usage, DESCRIPTION) as options:
        from ddpm_hf.commands.model_checks import downloaded_models

        for name in [*options.models, *filter(None, [options.data])]:
            check_local_path(name)
        if find_spec("gradio") is None:
            raise ValueError(f"`ddpm-hf app` needs the extra `app`: {how_to_install('app')}")
        with downloaded_models(options.models, options):
            serve(options)
    return 0


def serve(options: AppCommand) -> None:
    """Load the models, start the server, print its address and wait."""
    from ddpm_hf.app.nearest_images import training_sets
    from ddpm_hf.app.served_models import load_models
    from ddpm_hf.app.server import start, wait

    is_local = options.host in ("127.0.0.1", "localhost") and not options.share
    models = load_models(options.models, **options.keywords(LoadOptions), hide_paths=not is_local)
    training = None
    if options.data is not None:
        training = training_sets(models, options.data, options.split)
    page = start(
        models,
        training,
        host=options.host,
        port=options.port,
        share=options.share,
        open_browser=options.open,
    )
    print(page.local_url, flush=True)
    if page.share_url:
        print(page.share_url, flush=True)
    say("ddpm-hf: press Ctrl-C to stop")
    with suppress(KeyboardInterrupt):
        wait(page)

"""Messages of the commands: one line each, with flags in place of Python arguments."""

import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from ddpm_hf.options import Options, for_user, naming_flags_of
from ddpm_hf.scheduler_spec import readable_names
from ddpm_hf.utils.text import counted, visible, without_secrets

if TYPE_CHECKING:
    from ddpm_hf.sampling import SamplerSetting

Kind = TypeVar("Kind", bound=Options)


def say(text: str, for_all: bool = False) -> None:
    """Print a line to stderr, on the first process of each machine only unless `for_all`."""
    if os.environ.get("LOCAL_RANK", "0") != "0" and not for_all:
        return
    text = visible(text)
    tqdm = sys.modules.get("tqdm")
    if tqdm is None:
        print(text, file=sys.stderr)
    else:
        tqdm.tqdm.write(text, file=sys.stderr)  # prints above progress bars


def say_recommended(setting: "SamplerSetting") -> None:
    """Print the setting if it is the recommended one of the model."""
    if setting.recommended is not None and setting.num_inference_steps is not None:
        T = setting.scheduler.config.num_train_timesteps
        (name,) = readable_names([setting.recommended]).values()
        say(
            f"ddpm-hf: {name} in {counted(setting.num_inference_steps, 'step')}, as"
            f" recommended by `ddpm-hf calibrate --sweep`; --thorough uses DDPM in all {T:,} steps"
        )


class _WithoutSecrets:
    """A text stream that hides passwords and tokens in what is written to another stream."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(without_secrets(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def hidden_secrets() -> Iterator[None]:
    """Hide passwords and tokens in everything that the block prints."""
    with open(os.devnull, "w") as null:  # Python has no stream for a closed descriptor
        out: Any = _WithoutSecrets(sys.stdout or null)
        err: Any = _WithoutSecrets(sys.stderr or null)
        with redirect_stdout(out), redirect_stderr(err):
            yield


def print_traceback(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """`sys.excepthook` that hides passwords and tokens."""
    lines = traceback.format_exception(kind, error, trace)
    print(without_secrets("".join(lines)), end="", file=sys.stderr)


def escape_unencodable_output() -> None:
    r"""Print characters that the encoding of stdout lacks as escapes, such as \u732b.

    stderr does so by default; for stdout, Python raises UnicodeEncodeError.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def is_stdout_closed() -> bool:
    """Whether the reader of stdout has closed it; if so, further output is dropped silently."""
    try:
        print(flush=True)  # without a buffer, the first failure leaves nothing to flush
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


@contextmanager
def resume_hint(finished: str) -> Iterator[None]:
    """On an interrupt, print that `finished` work is kept, and how to resume."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"ddpm-hf: finished {finished} are kept; repeat the command to resume")
        raise


@contextmanager
def command_messages(options: type | None = None) -> Iterator[None]:
    """Print each warning of the block once, in one line, and name flags in messages.

    Args:
        options: dataclass of the options whose names in backticks become flags, in warnings and in
            the text of a ValueError, RuntimeError or OSError.
    """

    shown = set[str]()

    def show(message: str) -> None:
        say(f"ddpm-hf: warning: {for_user(' '.join(str(message).split()))}")

    def show_once(message: Warning | str, *_: object, **__: object) -> None:
        if f"{message}" not in shown:
            shown.add(f"{message}")
            show(f"{message}")

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            show(record.getMessage())

    logger = logging.getLogger("ddpm_hf")
    before = warnings.showwarning, logger.handlers, logger.propagate
    warnings.showwarning, logger.handlers, logger.propagate = show_once, [Handler("WARNING")], False
    try:
        with naming_flags_of(options):
            try:
                yield
            except (ValueError, RuntimeError, OSError) as error:
                if getattr(error, "errno", None) is None:  # not of the operating system
                    error.args = (for_user(str(error)),)
                raise
    finally:
        warnings.showwarning, logger.handlers, logger.propagate = before


@contextmanager
def command_options(
    kind: type[Kind], argv: list[str], name: str, usage: str, description: str
) -> Iterator[Kind]:
    """Parse the options of `ddpm-hf NAME`; for messages see `command_messages`.

    Args:
        kind: dataclass of the options.
        argv: the arguments.
        name: name of the command.
        usage: the arguments in one line.
        description: text above the options in `--help`.
    """
    with command_messages(kind):
        from ddpm_hf.option_parser import parse_options

        prog = f"ddpm-hf {name}"
        yield parse_options(kind, argv, prog=prog, usage=usage, description=description)

"""Tokens and passwords in arguments are never printed."""

import contextlib
import dataclasses
import sys
import typing

import pytest

from ddpm_hf.cli import main, run_command
from ddpm_hf.commands import app, calibrate, convert, edit, ema, evaluate, sample
from ddpm_hf.hub.options import PushOptions
from ddpm_hf.hub.retry import TOKEN_HELP
from ddpm_hf.options import flag_of, kinds_of
from ddpm_hf.training import TrainingConfig
from ddpm_hf.utils.text import without_secrets

CANARY = "hf_" + "CaNaRy" * 6
COMMANDS = {
    "train": (TrainingConfig, ["."]),
    "sample": (sample.SampleCommand, ["m"]),
    "edit": (edit.EditCommand, ["m", "x.png"]),
    "calibrate": (calibrate.CalibrateCommand, ["m", "."]),
    "ema": (ema.EmaCommand, ["r"]),
    "evaluate": (evaluate.EvaluateCommand, ["m", "."]),
    "app": (app.AppCommand, ["m"]),
    "push": (PushOptions, [".", "user/name"]),
    "convert": (convert.ConvertCommand, ["w.pt", "--output", "o"]),
}


def command_lines():
    """One command line for each option of each command, with the canary as its value."""
    for name, (kind, arguments) in COMMANDS.items():
        hints = typing.get_type_hints(kind)
        for place in range(len(arguments)):
            yield [name, *arguments[:place], CANARY, *arguments[place + 1 :]]
        for field in dataclasses.fields(kind):
            if bool in kinds_of(hints[field.name]) or field.metadata.get("is_positional"):
                continue
            count = len(m) if isinstance(m := field.metadata.get("metavar"), tuple) else 1
            yield [name, *arguments, flag_of(field), *[CANARY] * count]
        yield [name, *arguments, f"--{CANARY}"]
        yield [name, *arguments, f"https://user:{CANARY}@host/x"]
    yield [CANARY]
    yield [f"--{CANARY}"]
    yield ["train", ".", "--config", f"./{CANARY}.yaml"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_no_option_of_a_command_prints_a_secret(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    lines = list(command_lines())
    assert len(lines) > 120
    shown = []
    for arguments in lines:
        with contextlib.suppress(SystemExit):  # of argparse
            main(arguments)
        printed = capfd.readouterr()
        if CANARY in printed.out + printed.err:
            shown.append(arguments)
    assert shown == []


def test_a_traceback_and_the_output_hide_secrets_too(monkeypatch, capsys):
    def fail(argv):
        print(f"out {CANARY}")
        raise RuntimeError(f"a bug with {CANARY}")

    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    with pytest.raises(RuntimeError) as failure:
        run_command(fail, [])
    sys.excepthook(failure.type, failure.value, failure.tb)  # as at the end of a process
    printed = capsys.readouterr()
    assert printed.out == "out [hidden]\n"
    assert printed.err.endswith("RuntimeError: a bug with [hidden]\n")
    assert CANARY not in printed.err


@pytest.mark.parametrize(
    "text",
    [
        f"pushing to user/name needs a token: {TOKEN_HELP}",
        "the password: ask your administrator",
        "secrets and tokens",
    ],
)
def test_advice_about_tokens_is_not_hidden(text):
    assert without_secrets(text) == text

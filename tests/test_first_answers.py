"""Answers of the commands to impossible requests: at once, in one line, without loading torch."""

import json
import os
import shlex
import sys

import pytest
from checkpoints import image_facts_of, save_ours, tiny_unet
from PIL import Image
from processes import run_process

from ddpm_hf import cli
from ddpm_hf.options import OptionError
from ddpm_hf.sampling.options import OutputOptions
from ddpm_hf.sampling.output_paths import check_output
from ddpm_hf.training.checkpoint_record import RECORD, CheckpointRecord

# Ends the process like the command would, and fails if torch was loaded.
RUN = """
import sys
from ddpm_hf.cli import main
status = main(sys.argv[1:])
print("torch" if "torch" in sys.modules else "no torch", file=sys.stderr)
sys.exit(status)
"""


def answer(*words, cwd, **environment):
    """Exit status and lines of stderr of a command in a new process."""
    done = run_process(
        [sys.executable, "-c", RUN, *words], cwd=cwd, env={**os.environ, **environment}
    )
    return done.returncode, done.stderr.splitlines()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_ours(tmp_path_factory.mktemp("model"))


# Runs command lines one after the other; prints status and stderr of each, and whether torch came.
RUN_ALL = """
import contextlib, io, json, sys
from ddpm_hf.cli import main
answers = []
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        status = main(words)
    answers.append((status, stderr.getvalue().splitlines(), "torch" in sys.modules))
print(json.dumps(answers))
"""
REFUSALS = [
    ("sample ./model", "'./model' does not exist"),
    ("sample --seed 1 ./model", "'./model' does not exist"),
    ("sample photos", "photos is not a pipeline checkpoint"),
    ("sample there.png", "there.png is a file; pass the folder of the checkpoint"),
    ("edit there.png there.png", "there.png is a file; pass the folder of the checkpoint"),
    ("edit ./model there.png", "'./model' does not exist"),
    ("edit MODEL missing.png", "missing.png is not a file"),
    ("edit MODEL ther.png", "ther.png is not a file (did you mean 'there.png' or 'there'?)"),
    ("edit PETS there.png --source-class cow --class-labels cat", "one of 'cat', 'dog', got 'cow'"),
    ("edit PETS there.png", "--class-labels must be in [0, 1] or one of 'cat', 'dog', got None"),
    ("sample MODEL --revision v2", "--revision v2 applies to models on the Hub, but "),
    ("calibrate ./model photos", "'./model' does not exist"),
    ("calibrate photos photos", "photos is not a pipeline checkpoint"),
    ("calibrate MODEL ./photo", "'./photo' does not exist"),
    ("ema photos --std 0.05", "photos has no snapshots in ema_snapshots/: train with"),
    ("evaluate MODEL ./a/b photos", "'./a/b' does not exist"),
    ("push model user/name", "model is not a folder"),
    ("push photos user/name", "photos is not a pipeline checkpoint: it has no model_index.json"),
    ("sample MODEL --guidance-scale 2", "--guidance-scale must be 1: this model has no numbered"),
    ("sample MODEL --num-inference-steps 21", "--num-inference-steps must be in [1, 20], got 21"),
    ("edit MODEL there.png --num-inference-steps 21", "--num-inference-steps must be in [1, 20]"),
    ("edit MODEL there.png --guidance-scale 2", "--guidance-scale must be 1"),
    ("evaluate MODEL photos --num-inference-steps 21", "--num-inference-steps must be in [1, 20]"),
    *(
        (line, "HF_HUB_OFFLINE is set and the cache has no complete copy")
        for line in (
            "sample user/nothere",
            "edit user/nothere there.png",
            "evaluate user/nothere photos",
            "calibrate user/nothere photos",
            "app user/nothere",
        )
    ),
    *(
        (
            f"{command} user/nothere",
            "'user/nothere' is not a local path; as a Hub dataset: HF_HUB",
        )
        for command in ("train", "calibrate MODEL", "evaluate MODEL")
    ),
    ("train photo", "'photo' is not a local path (did you mean 'photos'?); as a Hub dataset: "),
    ("sample MODEL --guide ./weak", "'./weak' does not exist"),
    ("sample MODEL --output there.png", "there.png exists already"),
    ("sample MODEL --output .", "--output must name a file or folder"),
    ("sample MODEL --output ''", "--output must not be empty"),
    ("sample MODEL --output x.zip", ".zip is not a format"),
    ("sample MODEL --class-labels cat", "not trained on classes: leave out --class-labels"),
    ("sample PETS --class-labels cow", "--class-labels must be in [0, 1] or one of 'cat', 'dog'"),
    ("train ./photo", "'./photo' does not exist (did you mean 'photos'?)"),
    ("train --seed 1 --dataset ~/nothing", "'~/nothing' does not exist"),
    ("train --dataset=/no/such/folder", "'/no/such/folder' does not exist"),
    ("train photos --pretrained ./weak", "--pretrained: './weak' does not exist"),
    ("train photos --unet-config net.json", "--unet-config: 'net.json' is not a file"),
    (
        "train photos --class-conditional",
        "the dataset has no class labels; in a folder, put the images",
    ),
    ("train photos --class-column breed", "there is no column 'breed'; the columns are image"),
    ("train photos --keep-best", "--keep-best needs --validation-split, for bits/dim, or"),
    ("train photos --validation-split 1.5", "--validation-split: a fraction must be in (0, 1)"),
    ("train photos --beta-schedule cosin", "--beta-schedule must be one of ["),
    ("train photos --output-dir RUN --seed 3", "other options (--seed: 0 -> 3); resume with"),
    ("train photos --output-dir foreign", "foreign contains metrics.jsonl, which no training run"),
    ("convert no.pt --output x --preset adm-lsun", "no.pt does not exist"),
    ("convert there.png --output photos --preset adm-lsun", "photos is not empty"),
    ("convert there.png --output x", "pass either --preset or --config; presets: iddpm-cifar10"),
    ("convert there.png --output x --preset lsun", "--preset must be one of ['iddpm-cifar10'"),
    *(
        (f"{command} {flag} {output}", f"{flag}{message}")
        for command, flag in (
            ("train photos", "--output-dir"),
            ("evaluate MODEL photos", "--output"),
            ("calibrate MODEL photos", "--output"),
            ("edit MODEL there.png", "--output"),
            ("convert there.png --preset adm-lsun", "--output"),
        )
        for output, message in (
            ("''", " must not be empty"),
            (".", ": name an output folder, such as results, got '.'"),
            ("x.zip", ": the output is a folder, but x.zip has the suffix of an archive"),
            ("there", ": there is a file, not a folder"),
        )
    ),
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Status, lines of stderr and whether torch is loaded, by command line."""
    folder = tmp_path_factory.mktemp("answers")
    facts = image_facts_of("L", 8, 8, class_names=["cat", "dog"])
    pets = save_ours(folder / "pets", unet=tiny_unet(num_class_embeds=3), facts=facts)
    paths = {"MODEL": save_ours(folder / "model_8"), "PETS": pets, "RUN": folder / "run"}
    for name in ("there.png", "there", "photos/0.png", "foreign/metrics.jsonl"):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("L", (8, 8)).save(folder / name, format="PNG")
    checkpoint = paths["RUN"] / "checkpoints" / "step-00000002"
    checkpoint.mkdir(parents=True)
    record = CheckpointRecord(
        config={"seed": 0}, parts={}, elapsed_s=1.0, num_processes=1, num_threads=1, step=2,
        ema_step=2, scaler=None,
    )  # fmt: skip
    (checkpoint / RECORD).write_text(json.dumps(record.to_dict()))
    lines = [line for line, _ in REFUSALS]
    words = [[str(paths.get(word, word)) for word in shlex.split(line)] for line in lines]
    done = run_process([sys.executable, "-c", RUN_ALL, json.dumps(words)], cwd=folder)
    return dict(zip(lines, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize(("line", "message"), REFUSALS)
@pytest.mark.slow
def test_impossible_requests_are_refused_in_one_line_before_torch_is_loaded(answers, line, message):
    status, lines, has_torch = answers[line]
    assert status == 2
    assert not has_torch
    assert len(lines) == 1
    assert lines[0].startswith("ddpm-hf: error: ")
    assert message in lines[0]


@pytest.mark.slow
def test_an_endpoint_without_scheme_is_named_before_any_request(tmp_path):
    for command in (("sample", "user/model"), ("evaluate", "user/model", "user/photos")):
        status, lines = answer(*command, cwd=tmp_path, HF_ENDPOINT="huggingface.co")
        assert status == 2
        assert len(lines) == 2
        assert "HF_ENDPOINT must start with https://" in lines[0]


@pytest.mark.slow
def test_a_dataset_without_connection_is_refused_in_one_line(tmp_path):
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    status, lines = answer("train", "user/name", cwd=tmp_path, NO_PROXY="127.0.0.1", **environment)
    assert status == 2
    assert len(lines) == 2
    assert "no connection to http://127.0.0.1:9 for user/name" in lines[0]
    assert lines[1] == "no torch"


@pytest.mark.slow
def test_a_push_without_connection_is_refused_in_one_line(tmp_path, model):
    environment = {"HF_TOKEN": "hf_" + "x" * 30, "HF_ENDPOINT": "http://127.0.0.1:9"}
    environment |= {"HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    status, lines = answer("push", str(model), "user/name", cwd=tmp_path, **environment)
    assert status == 3
    assert len(lines) == 2
    assert "no connection to http://127.0.0.1:9 for user/name" in lines[0]


@pytest.mark.parametrize("name", ["x.zip", "x.pt", "x.h5", "x.tar.gz", "x.csv", "X.ZIP", "x.mp4"])
def test_an_output_of_another_file_format_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"is not a format of images here.*\.npz"):
        check_output(tmp_path / name)
    (tmp_path / name).mkdir()
    check_output(tmp_path / name)  # a folder of that name exists


@pytest.mark.parametrize("name", ["images", "run-1.5", "v0.3", "x.npz", "x.PNG", "x.jpg", "a.old"])
def test_folders_and_known_formats_are_accepted(tmp_path, name):
    check_output(tmp_path / name)


def test_an_empty_path_is_refused():
    with pytest.raises(OptionError, match="`output` must not be empty"):
        OutputOptions(output="")


@pytest.mark.slow
def test_characters_that_the_output_cannot_encode_are_escaped(tmp_path):
    code = (
        "from ddpm_hf.cli import run_command; run_command(lambda _: print('\\u732b tea') or 0, [])"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    done = run_process([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    assert done.returncode == 0
    assert done.stdout.splitlines() == ["\\u732b tea"]


@pytest.mark.slow
def test_a_command_runs_without_standard_streams(tmp_path):
    line = f"{sys.executable} -m ddpm_hf sample ./none >&- 2>&-; echo $? > status"
    run_process(["bash", "-c", line], cwd=tmp_path)
    assert (tmp_path / "status").read_text() == "2\n"


@pytest.mark.slow
@pytest.mark.parametrize("is_unbuffered", ["", "1"])
@pytest.mark.parametrize("num_lines", [1, 100_000])
def test_a_closed_pipe_ends_a_command_quietly(tmp_path, num_lines, is_unbuffered):
    """With 1 line the buffer is written at the end, with many in between."""
    code = f"""
import sys, time
from ddpm_hf.cli import run_command
def command(_):
    sys.stdin.read()
    print(*["a table"] * {num_lines}, sep="\\n")
    return 0
sys.exit(run_command(command, []))
"""
    (tmp_path / "command.py").write_text(code)
    # The reader closes its end, then opens the named pipe, for which the command waits.
    reader = "(exec <&-; : > go)"
    line = f"mkfifo go; {sys.executable} command.py < go 2> errors | {reader}; echo ${{PIPESTATUS}}"
    environment = {**os.environ, "PYTHONUNBUFFERED": is_unbuffered}
    done = run_process(["bash", "-c", line], cwd=tmp_path, env=environment)
    assert (tmp_path / "errors").read_text() == ""
    assert done.stdout == "141\n"


def test_broken_pipes_of_other_files_are_reported(capsys):
    def command(_):
        raise BrokenPipeError(32, "Broken pipe of a socket")

    assert cli.run_command(command, []) == 1
    assert "Broken pipe of a socket" in capsys.readouterr().err

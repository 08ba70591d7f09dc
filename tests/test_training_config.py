"""Options of a run: checks, resume, and the complete configuration that follows from them."""

import dataclasses

import pytest
import torch
from tiny_runs import resolved, tiny_config
from transformers import get_scheduler

from ddpm_hf import ConfigError, TrainingConfig
from ddpm_hf.training import parse_config
from ddpm_hf.training.learning_rate import learning_rate
from ddpm_hf.training.resolve import Machine, resolve, resume_options

CPU, GPU = Machine("cpu"), Machine("cuda")


@pytest.mark.parametrize(
    ("machine", "num_images", "image_size", "options", "expected"),
    [
        # batch_size, max_train_steps, lr_warmup_steps, learning_rate, sample_steps
        (CPU, 1000, 32, {}, (16, 10_000, 500, 2e-3, 250)),
        (CPU, 100, 32, {}, (16, 2500, 125, 2e-3, 250)),
        (CPU, 1000, 64, {}, (16, 3000, 150, 2e-3, 250)),
        (GPU, 5000, 64, {}, (64, 31250, 1000, 1e-4, 1000)),
        (GPU, 50_000, 256, {}, (32, 50_000, 1000, 1e-4, 1000)),
        (GPU, 50_000, 256, {"batch_size": 8, "max_train_steps": 60}, (8, 60, 3, 1e-4, 1000)),
        (CPU, 1000, 32, {"pretrained": "x"}, (16, 10_000, 500, 1e-4, 250)),
        (CPU, 1000, 32, {"learning_rate": 1e-3, "sample_steps": 7}, (16, 10_000, 500, 1e-3, 7)),
        (CPU, 1000, 32, {"lr_warmup_steps": 0}, (16, 10_000, 0, 2e-3, 250)),
        (CPU, 1000, 32, {"gradient_accumulation_steps": 3}, (15, 10_000, 500, 2e-3, 250)),
        (Machine("cuda", 8), 5000, 64, {}, (64, 31250, 1000, 1e-4, 1000)),
        (Machine("cuda", 100), 5000, 64, {}, (100, 20_000, 1000, 1e-4, 1000)),
    ],
)
def test_open_options_are_proposed_from_images_and_machine(
    machine, num_images, image_size, options, expected
):
    config = resolve(
        TrainingConfig(**options),
        machine,
        num_images=num_images,
        image_size=image_size,
        learns_variance=False,
        num_channels=32 if machine is CPU else 128,
        prediction_type="v_prediction",
        has_custom_loss=False,
    )
    assert (
        config.batch_size,
        config.max_train_steps,
        config.lr_warmup_steps,
        config.learning_rate,
        config.sample_steps,
    ) == expected


@pytest.mark.parametrize(
    ("machine", "num_channels", "rate"),
    [
        (CPU, 8, 2e-3),
        (CPU, 64, 1e-3),
        (CPU, 1024, 1e-4),
        (GPU, 8, 4e-4),
        (GPU, 64, 2e-4),
        (GPU, 128, 1e-4),
        (GPU, 192, 1e-4),
    ],
)
def test_a_new_network_gets_a_learning_rate_by_its_width(machine, num_channels, rate):
    config = resolved(TrainingConfig(), machine, num_channels=num_channels)
    assert config.learning_rate == rate


@pytest.mark.parametrize(
    ("options", "learns_variance", "objective"),
    [
        ({}, False, "simple"),
        ({}, True, "hybrid"),
        ({"objective": "vlb"}, True, "vlb"),
    ],
)
def test_the_objective_follows_the_variance_unless_given(options, learns_variance, objective):
    config = resolved(TrainingConfig(**options), learns_variance=learns_variance)
    assert config.objective == objective


@pytest.mark.parametrize(
    ("options", "machine", "facts", "expected"),
    [
        ({}, CPU, {}, "asymmetric"),
        ({}, GPU, {}, "uniform"),
        ({"pretrained": "x"}, CPU, {}, "uniform"),
        ({}, CPU, {"learns_variance": True}, "uniform"),
        ({"objective": "vlb"}, CPU, {}, "uniform"),
        ({}, CPU, {"prediction_type": "sample"}, "asymmetric"),
        ({}, CPU, {"prediction_type": "epsilon"}, "uniform"),
        ({}, CPU, {"has_custom_loss": True}, "uniform"),
        ({"timestep_sampling": "low_discrepancy"}, CPU, {}, "low_discrepancy"),
    ],
)
def test_a_new_network_on_a_cpu_gets_asymmetric_timesteps(options, machine, facts, expected):
    config = resolved(TrainingConfig(**options), machine, **facts)
    assert config.timestep_sampling == expected


@pytest.mark.parametrize(
    ("options", "validation_steps", "checkpointing_steps"),
    [
        ({}, 250, 250),
        ({"checkpointing_steps": 40}, 40, 40),
        ({"validation_steps": 9}, 9, 250),
        ({"validation_steps": 9, "checkpointing_steps": 40}, 9, 40),
    ],
)
def test_validation_is_due_with_the_checkpoints_unless_given(
    options, validation_steps, checkpointing_steps
):
    config = resolved(TrainingConfig(**options))
    assert config.validation_steps == validation_steps
    assert config.checkpointing_steps == checkpointing_steps


def test_a_resolved_configuration_is_a_recipe_of_itself(tmp_path):
    config = resolved(TrainingConfig(dataset="./photos", class_column="breed"))
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    again = resolved(parse_config(["--config", str(tmp_path / "config.yaml")]))
    assert again == config
    assert config.to_yaml().splitlines() == [
        "dataset: ./photos",
        "split: train",
        "class_conditional: true",
        "class_column: breed",
        "crop: center",
        "random_flip: false",
        "on_bad_image: error",
        "streaming: false",
        "streaming_cache_gb: 20.0",
        "use_safetensors: true",
        "objective: simple",
        "loss_weighting: none",
        "timestep_sampling: asymmetric",
        "class_dropout: 0.1",
        "max_train_steps: 2500",
        "batch_size: 16",
        "gradient_accumulation_steps: 1",
        "learning_rate: 0.002",
        "lr_scheduler: cosine",
        "lr_warmup_steps: 125",
        "weight_decay: 0.0",
        "max_grad_norm: 1.0",
        "ema_decay: 0.9999",
        "post_hoc_ema: false",
        "mixed_precision: 'no'",
        "gradient_checkpointing: false",
        "ddp_timeout: 300",
        "seed: 0",
        "validation_steps: 250",
        "validation_images: 64",
        "validation_timesteps: 16",
        "keep_best: false",
        "evaluate_num_images: 256",
        "logging_steps: 20",
        "sample_steps: 250",
        "num_samples: 16",
        "sample_inference_steps: 50",
        "checkpointing_steps: 250",
        "checkpoints_total_limit: 2",
        "calibrate: false",
        "public: false",
    ]


def test_options_of_earlier_recipes_are_read(tmp_path):
    (tmp_path / "config.yaml").write_text("dataset: x\nallow_pickle: true\n")
    assert not parse_config(["--config", str(tmp_path / "config.yaml")]).use_safetensors


def test_the_flag_allow_pickle_turns_use_safetensors_off():
    assert parse_config(["x"]).use_safetensors
    assert not parse_config(["--allow-pickle", "x"]).use_safetensors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"batch_size": 2.5}, "`batch_size` must be of type int, got 2.5"),
        ({"crop": "left"}, r"`crop` must be one of \['center', 'random', 'none'\], got 'left'"),
        ({"learning_rate": 0.0}, r"`learning_rate` must be in \(0, 1\], got 0.0; start with 1e-4"),
        ({"learning_rate": 2}, r"`learning_rate` must be in \(0, 1\], got 2.0"),
        ({"ema_decay": 1.0}, r"`ema_decay` must be in \[0, 1\), got 1.0"),
        ({"class_dropout": -0.1}, "`class_dropout` must be at least 0, got -0.1"),
        ({"max_grad_norm": 0}, "`max_grad_norm` must be positive, got 0.0"),
        ({"max_grad_norm": float("inf")}, "`max_grad_norm` must be finite, got inf"),
        ({"seed": 2**32}, r"`seed` must be in \[0, 4294967295\], got 4294967296"),
        ({"pretrained": "a", "unet_config": "b"}, "`pretrained` and `unet_config` exclude"),
        (
            {"lr_warmup_steps": 9, "max_train_steps": 8},
            "`lr_warmup_steps` must not exceed `max_train_steps`, got 9 and 8",
        ),
    ],
)
def test_an_invalid_option_raises_with_its_value_and_the_valid_ones(options, message):
    with pytest.raises(ConfigError, match=message):
        TrainingConfig(**options)


def test_a_configuration_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainingConfig().seed = 1


def test_a_resumed_run_keeps_the_options_that_the_new_command_leaves_open():
    before = resolved(TrainingConfig(resolution=32, batch_size=8, num_threads=3)).to_dict()
    options = resume_options(TrainingConfig(max_train_steps=9000), before)
    assert options == TrainingConfig(**before | {"max_train_steps": 9000})


def test_options_that_a_run_does_not_know_are_ignored_or_had_their_default():
    before = resolved(TrainingConfig()).to_dict() | {"allow_pickle": False, "retired": 1}
    del before["loss_weighting"], before["num_threads"]
    assert resume_options(TrainingConfig(), before).loss_weighting == "none"
    with pytest.raises(ConfigError, match="`loss_weighting`: 'none' -> 'p2'"):
        resume_options(TrainingConfig(loss_weighting="p2"), before)


def test_changed_options_of_a_resumed_run_raise_with_old_and_new_value():
    before = resolved(TrainingConfig(output_dir="a")).to_dict()
    message = r"^a holds a run with other options \(`seed`: 0 -> 1\); .* add `output_dir` a-2 for"
    with pytest.raises(ConfigError, match=message):
        resume_options(TrainingConfig(output_dir="a", seed=1, logging_steps=3), before)


def test_a_resumed_run_may_not_be_shorter_than_its_warmup():
    before = resolved(TrainingConfig(output_dir="a", lr_warmup_steps=50)).to_dict()
    message = r"^`max_train_steps` must be at least 50, the number of warmup updates .* a, got 49;"
    with pytest.raises(ConfigError, match=message):
        resume_options(TrainingConfig(output_dir="a", max_train_steps=49), before)
    assert resume_options(TrainingConfig(output_dir="a", max_train_steps=50), before)


def test_commands_in_messages_quote_paths_with_spaces():
    hint = TrainingConfig(output_dir="my run").resume_hint()
    assert "`output_dir` 'my run-2' for a new network" in hint
    assert "`pretrained` 'my run/model' to fine-tune" in hint


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["photos", "--resoluton=8"], "--resoluton=8 (did you mean '--resolution' or"),
        (["my", "photos"], "photos; quote paths that contain spaces"),
    ],
)
def test_unknown_arguments_end_with_a_hint(words, hint, capsys):
    with pytest.raises(SystemExit):
        parse_config(words)
    assert hint in capsys.readouterr().err


def test_an_unknown_keyword_raises_with_close_matches():
    message = r"unexpected keyword argument 'resoluton'; did you mean resolution"
    with pytest.raises(TypeError, match=message):
        TrainingConfig(resoluton=32)


@pytest.mark.parametrize(("batch_size", "choices"), [(10, "9 or 12"), (2, "3"), (7, "6 or 9")])
def test_an_indivisible_batch_size_raises_with_valid_sizes(batch_size, choices):
    options = TrainingConfig(batch_size=batch_size, gradient_accumulation_steps=3)
    message = (
        rf"`batch_size` must be a multiple of 3 .*, got {batch_size}; set it to {choices}\. A run"
    )
    with pytest.raises(ConfigError, match=message):
        resolved(options)


def test_another_precision_of_accelerate_than_that_of_the_resumed_run_raises():
    message = r"`mixed_precision` 'no', but accelerate is configured for 'bf16'"
    with pytest.raises(ConfigError, match=message):
        resolved(TrainingConfig(mixed_precision="no"), Machine("cpu", mixed_precision="bf16"))


@pytest.mark.parametrize("warmup", [0, 1, 7, 40])
@pytest.mark.parametrize("kind", ["cosine", "constant"])
def test_the_learning_rate_equals_the_scheduler_of_transformers(tmp_path, kind, warmup):
    options = {"lr_scheduler": kind, "lr_warmup_steps": warmup, "learning_rate": 3e-4}
    config = resolved(tiny_config(tmp_path, **options, max_train_steps=40))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    name = {"constant": "constant_with_warmup"}.get(kind, kind)
    schedule = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=40)
    for step in range(40):
        assert learning_rate(config, step) == schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()

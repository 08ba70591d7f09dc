"""The options of a training run, in groups.

The same fields are the flags of `ddpm-hf train`, the keys of a YAML recipe and the keyword
arguments of `TrainingConfig`.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from ddpm_hf.diffusion.schedules import BETA_SCHEDULES
from ddpm_hf.options import Options, option
from ddpm_hf.paths import output_folder

TRACKERS = (
    "tensorboard", "trackio", "wandb", "mlflow", "swanlab", "aim", "clearml", "comet_ml", "dvclive",
)  # fmt: skip
"""Experiment trackers of accelerate, by its names."""

MIN_SIZE = 3
"""Smallest image side in pixels: a smaller image cannot be downsampled."""


@dataclass(frozen=True, kw_only=True)
class DataOptions(Options):
    """Training images and their preprocessing."""

    _argument_group_name: ClassVar[str] = "images"

    dataset: str | None = option(
        None,
        "folder of images, Hub dataset, parquet or arrow files (a file, a glob or a folder), or a "
        "save_to_disk folder",
        is_path=True,
    )
    dataset_config: str | None = option(None, "configuration of a Hub dataset that has several")
    dataset_revision: str | None = option(None, "branch, tag or commit of a Hub dataset")
    split: str = option("train", "split to train on; slices such as 'train[:1000]' work")
    image_column: str | None = option(
        None, "column that holds the images (default: the only image column)"
    )
    resolution: int | None = option(
        None,
        "resize images to this many pixels per side (default: their own size if all images agree)",
        minimum=MIN_SIZE,
        limit=8192,
    )
    image_mode: Literal["L", "LA", "RGB", "RGBA"] | None = option(
        None, "convert images to this mode: 1, 2, 3 or 4 channels (default: their own mode)"
    )
    bit_depth: Literal[8, 16] | None = option(
        None,
        "bits per channel (default: 16 if all images are grayscale and some have 16 bits, else 8)",
    )
    class_conditional: bool = option(
        False, "train a class-conditional model on the labels of the dataset"
    )
    class_column: str | None = option(
        None,
        "column of the class labels (default: the declared label column; in a folder, the first "
        "folders below the root or the labels in dataset.json); implies `class_conditional`",
    )
    crop: Literal["center", "random", "none"] = option(
        "center",
        "how images become square: a center crop, a random crop that changes every epoch, or "
        "'none', which keeps the full image and needs images of one shape",
    )
    random_flip: bool = option(
        False, "flip images horizontally with probability 1/2 (leave off for digits and text)"
    )
    on_bad_image: Literal["error", "skip"] = option(
        "error", "unreadable images: list them and stop before training, or skip them"
    )
    streaming: bool = option(
        False,
        "fetch parquet or .tar shards while training, for datasets larger than the disk; they may "
        "be URLs, such as 'https://host/train-{000..123}.tar' (see docs/streaming.md)",
    )
    streaming_cache_gb: float = option(
        20.0, "disk space in GB for the images of a stream", minimum=0
    )
    dataloader_num_workers: int | None = option(
        None,
        "worker processes that load batches (default: 4 with a GPU, else 0)",
        minimum=0,
        limit=1024,
    )


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """Network and diffusion process."""

    _argument_group_name: ClassVar[str] = "network and diffusion"

    pretrained: str | None = option(
        None,
        "fine-tune the weights of this Hub repository or folder (a pipeline or a bare UNet2DModel)",
        is_path=True,
    )
    use_safetensors: bool = option(
        True,
        "open the pickled .bin weights of an old pretrained repository; they can execute code, so "
        "use it only for authors you trust",
        flag="--allow-pickle",
    )
    unet_config: str | None = option(
        None,
        "JSON file with the arguments of a UNet2DModel; channels and classes that are not in the "
        "file follow the images (default: proposed)",
        is_path=True,
    )
    num_train_timesteps: int | None = option(
        None,
        "number of diffusion steps T (default: 1000, or the pretrained model's)",
        minimum=1,
        limit=100_000,
    )
    beta_schedule: str | None = option(
        None,
        "noise schedule (default: squaredcos_cap_v2, or the pretrained model's)",
        choices=sorted(BETA_SCHEDULES),
    )
    prediction_type: Literal["epsilon", "sample", "v_prediction"] | None = option(
        None, "target of the network (default: v_prediction, or the pretrained model's)"
    )
    variance_type: Literal["fixed_small", "fixed_large", "learned_range"] | None = option(
        None,
        "variance of a reverse step; with learned_range the network predicts it, which improves "
        "likelihoods (default: fixed_small, or the pretrained model's)",
    )


@dataclass(frozen=True, kw_only=True)
class OptimizationOptions(Options):
    """Loss, optimizer, schedule and precision."""

    _argument_group_name: ClassVar[str] = "optimization"

    objective: Literal["simple", "hybrid", "vlb"] | None = option(
        None,
        "loss: squared error, squared error plus the variational bound for a learned variance, or "
        "the variational bound (default: hybrid with a learned variance, else simple)",
    )
    loss_weighting: Literal["none", "min_snr", "p2", "truncated_snr"] = option(
        "none", "weight of the squared error by noise level"
    )
    timestep_sampling: (
        Literal["uniform", "low_discrepancy", "asymmetric", "loss_second_moment"] | None
    ) = option(
        None,
        "timesteps of a batch: independent, evenly spaced, the first 70% 5 times as likely, or in "
        "proportion to the loss, for `objective` vlb (default: asymmetric for a new network on a "
        "CPU with `objective` simple and another `prediction_type` than epsilon, else uniform)",
    )
    class_dropout: float = option(
        0.1,
        "probability of hiding a label from the network, so that it also learns to sample without "
        "a class, as classifier-free guidance needs",
        minimum=0,
    )
    max_train_steps: int | None = option(
        None,
        "total number of optimizer updates (default: proposed)",
        minimum=1,
        limit=1_000_000_000,
    )
    batch_size: int | None = option(
        None,
        "images per optimizer update, summed over all processes and accumulation steps, so that a "
        "recipe trains the same model on one GPU and on eight (default: proposed)",
        minimum=1,
        limit=1_000_000,
    )
    gradient_accumulation_steps: int = option(
        1, "micro-batches per process in an optimizer update", minimum=1, limit=1_000_000
    )
    learning_rate: float | None = option(
        None,
        "peak learning rate of AdamW (default: 1e-4; more for a new network with few channels, up "
        "to 4e-4, or 2e-3 on a CPU)",
    )
    lr_scheduler: Literal["cosine", "constant"] = option(
        "cosine", "learning rate after the warmup: cosine decay to 0, or constant"
    )
    lr_warmup_steps: int | None = option(
        None,
        "updates of linear learning rate warmup (default: a twentieth of the run, at most 1000)",
        minimum=0,
    )
    weight_decay: float = option(0.0, "weight decay of AdamW", minimum=0)
    max_grad_norm: float = option(1.0, "norm to which gradients are clipped")
    ema_decay: float = option(
        0.9999,
        "maximum decay of the exponential moving average (EMA) of the weights, which is sampled "
        "and exported; the decay at update n is at most (1 + n) / (10 + n)",
        minimum=0,
    )
    post_hoc_ema: bool = option(
        False,
        "also keep two averages with power-function profiles and write snapshots of them, from "
        "which `ddpm-hf ema` makes the average of any length after training",
    )
    post_hoc_ema_steps: int | None = option(
        None,
        "updates between two snapshots of both averages, together as large as the model (default: "
        "a 32nd of the run); implies `post_hoc_ema`",
        minimum=1,
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None, "mixed precision (default: the configuration of accelerate)"
    )
    compile: bool | None = option(
        None,
        "compile the network with torch.compile, which takes minutes before the first update and "
        "pays off in long runs; --no-compile turns it off (default: the configuration of "
        "accelerate)",
    )
    gradient_checkpointing: bool = option(
        False,
        "recompute activations in the backward pass: identical results in a fraction of the "
        "memory, about a third slower",
    )
    num_threads: int | None = option(
        None,
        "CPU threads per operation (default: the number of cores, or 1 if that is faster because "
        "other programs use a core)",
        minimum=1,
        limit=4096,
    )
    ddp_timeout: int = option(
        300,
        "seconds to wait for a process of the run that does not respond",
        minimum=1,
        limit=10_000_000,
    )
    seed: int = option(0, "seed of all random numbers of the run", minimum=0, maximum=2**32 - 1)


def _split_or_fraction(value: str | float) -> str:
    """The name of a split, or the text of a fraction in (0, 1)."""
    try:
        is_valid = 0 < float(value) < 1
    except ValueError:
        return str(value)
    if not is_valid:
        raise ValueError(f"a fraction must be in (0, 1), got {value}")
    return str(value)


@dataclass(frozen=True, kw_only=True)
class ValidationOptions(Options):
    """Bits/dim of held-out images during training; `ddpm-hf evaluate` has the full bound."""

    _argument_group_name: ClassVar[str] = "validation"

    validation_split: str | float | None = option(
        None,
        "measure bits/dim on this split, such as 'test', or on a fraction of the training images, "
        "such as 0.05, which is then held out of training (default: no validation)",
        convert=_split_or_fraction,
    )
    validation_steps: int | None = option(
        None, "updates between two validations (default: `checkpointing_steps`)", minimum=1
    )
    validation_images: int = option(
        64,
        "number of validation images, the same at every validation",
        minimum=2,
        limit=100_000_000,
    )
    validation_timesteps: int = option(
        16,
        "network calls per image, at timesteps sampled for an unbiased estimate",
        minimum=2,
        limit=100_000,
    )
    keep_best: bool = option(
        False, "keep the best model measured during training in the folder best/"
    )
    best_metric: Literal["bits-per-dim", "fd"] | None = option(
        None,
        "the best model has the lowest bits/dim, or the lowest Frechet distance among those that "
        "draw no copies of training images; implies `keep_best` (default: bits-per-dim with "
        "`validation_split`, else fd)",
    )


@dataclass(frozen=True, kw_only=True)
class PeriodicEvaluationOptions(Options):
    """Frechet distance and copies during training; `ddpm-hf evaluate` has more metrics."""

    _argument_group_name: ClassVar[str] = "evaluation"

    evaluate_steps: int | None = option(
        None,
        "updates between two measurements of the Frechet distance of generated images to the "
        "training images and of the share of copies of these, with standard errors and the values "
        "of held-out images; a warning says when generated images become copies (default: none)",
        minimum=1,
    )
    evaluate_num_images: int = option(
        256,
        "number of images generated for it, in `sample_inference_steps` steps",
        minimum=4,
        limit=1_000_000,
    )
    evaluate_features: str | None = option(
        None,
        "feature extractor: a vision model of transformers by name or folder; efficientnet-lite0, "
        "which needs no download (extra eval); or pixels (default: facebook/dinov2-base)",
        is_path=True,
    )


@dataclass(frozen=True, kw_only=True)
class OutputOptions(Options):
    """Logs, samples, checkpoints and exported model."""

    _argument_group_name: ClassVar[str] = "output"

    dry_run: bool = option(
        False,
        "print the plan with facts about the data, time, memory and disk space; nothing is written "
        "but downloads",
        is_recorded=False,
    )
    output_dir: str | None = option(
        None,
        "folder of the run (default: runs/NAME with the name of the dataset)",
        is_path=True,
        convert=output_folder,
    )
    logging_steps: int = option(20, "updates between two log entries", minimum=1)
    report_to: list[str] | None = option(
        None,
        "experiment trackers for the log and the sample grids, separated by commas or spaces; all "
        "for all that are installed, none for none (default: tensorboard, if installed)",
        choices=("all", "none", *TRACKERS),
    )
    tracker_project_name: str | None = option(
        None, "name of the project in the trackers (default: ddpm-hf)"
    )
    run_name: str | None = option(
        None, "name of the run in the trackers (default: the name of its folder, with an id)"
    )
    sample_steps: int | None = option(
        None, "updates between two sample grids (default: proposed)", minimum=1
    )
    num_samples: int = option(
        16,
        "images in a sample grid, with classes equally many of each and at least one, of up to 64 "
        "classes; 0 turns grids off",
        minimum=0,
        limit=10_000,
    )
    sample_inference_steps: int = option(
        50, "denoising steps of a sample grid, with deterministic DDIM", minimum=1, limit=100_000
    )
    checkpointing_steps: int | None = option(
        None, "updates between two checkpoints (default: proposed)", minimum=1
    )
    checkpoints_total_limit: int = option(2, "number of newest checkpoints to keep", minimum=1)
    calibrate: bool = option(
        False,
        "calibrate the finished model for sampling in few steps, like `ddpm-hf calibrate` on 64 "
        "images",
    )
    push_to_hub: str | None = option(
        None, "push every checkpoint to this Hub repository, 'user/name'"
    )
    public: bool = option(False, "make a new Hub repository public (default: private)")
    license: str | None = option(
        None, "license of the model for its card: an identifier of the Hub, such as 'apache-2.0'"
    )

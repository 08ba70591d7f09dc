"""The options of a run, in groups: what each is for, its choices and its default.

The same fields are the flags of `ddpm-hf train`, the keys of a YAML recipe and the arguments of
`TrainingConfig` in Python.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class DataOptions:
    """Which images, and how they become tensors."""

    _argument_group_name: ClassVar[str] = "images"

    dataset: str | None = _option(
        None,
        "folder of images, Hub data set, parquet/arrow files (a file, a glob or a folder), or a "
        "save_to_disk folder",
    )
    dataset_config: str | None = _option(None, "configuration of a Hub data set that has several")
    dataset_revision: str | None = _option(None, "branch, tag or commit of a Hub data set")
    split: str = _option("train", "split to train on; slices such as 'train[:1000]' work")
    image_column: str | None = _option(
        None, "column that holds the images (default: the only image column)"
    )
    resolution: int | None = _option(
        None,
        "images are resized to this many pixels a side (default: their own size when all agree)",
    )
    image_mode: Literal["L", "LA", "RGB", "RGBA"] | None = _option(
        None, "convert images to this mode: 1, 2, 3 or 4 channels (default: their own)"
    )
    bit_depth: Literal[8, 16] | None = _option(
        None, "bits per channel (default: 16 where all images are grey and some have 16, else 8)"
    )
    class_conditional: bool = _option(
        False, "train on the class labels, too, so that a class can be drawn"
    )
    class_column: str | None = _option(
        None,
        "column of the class labels (default: the one that is declared as such, or the sub-folders "
        "of a folder); implies class_conditional",
    )
    crop: Literal["center", "random", "none"] = _option(
        "center",
        "images of unequal size become square: cut the middle, or another part in every epoch; "
        "'none' keeps the whole image and needs one shape",
    )
    random_flip: bool = _option(
        False, "mirror every second image left to right (leave off for digits and text)"
    )
    on_bad_image: Literal["error", "skip"] = _option(
        "error", "unreadable images: list them and stop before training, or leave them out"
    )
    dataloader_num_workers: int | None = _option(
        None, "processes that load batches (default: 4 with a GPU, else none)"
    )


@dataclass
class ModelOptions:
    """Which network, and which diffusion."""

    _argument_group_name: ClassVar[str] = "network and diffusion"

    pretrained: str | None = _option(
        None,
        "fine-tune: start from the weights of this Hub repository or folder (a pipeline or a bare "
        "UNet2DModel)",
    )
    allow_pickle: bool = _option(
        False,
        "open the pickled .bin weights of an old pretrained repository; they could run code, so "
        "only for authors you trust",
    )
    unet_config: str | None = _option(
        None,
        "JSON file with the arguments of a UNet2DModel; channels and classes that it leaves out "
        "are those of the images (default: proposed)",
    )
    num_train_timesteps: int | None = _option(
        None, "steps T of the diffusion (default: 1000, or the pretrained model's)"
    )
    beta_schedule: str | None = _option(
        None, "noise schedule (default: squaredcos_cap_v2, or the pretrained model's)"
    )
    prediction_type: Literal["epsilon", "sample", "v_prediction"] | None = _option(
        None, "what the network predicts (default: v_prediction, or the pretrained model's)"
    )
    variance_type: Literal["fixed_small", "fixed_large", "learned_range"] | None = _option(
        None,
        "variance of a reverse step; learned_range: the network predicts it, which gives better "
        "likelihoods (default: fixed_small, or the pretrained model's)",
    )


@dataclass
class OptimizationOptions:
    """How long, and how fast."""

    _argument_group_name: ClassVar[str] = "optimization"

    objective: Literal["simple", "hybrid", "vlb"] | None = _option(
        None,
        "what an update minimises: the squared error, the variational bound, or the squared error "
        "with the bound for a learned variance (default: hybrid if the variance is learned, else "
        "simple)",
    )
    loss_weighting: Literal["none", "min_snr", "p2", "truncated_snr"] = _option(
        "none", "weights of the squared error by noise level"
    )
    timestep_sampling: Literal["uniform", "low_discrepancy", "loss_second_moment"] = _option(
        "uniform",
        "timesteps of a batch: independent, evenly spaced, or more of those with large losses (for "
        "objective vlb)",
    )
    class_dropout: float = _option(
        0.1,
        "share of the labels that are hidden from the network, so that it learns to draw without "
        "one, which guidance needs",
    )
    max_train_steps: int | None = _option(None, "optimizer updates in all (default: proposed)")
    batch_size: int | None = _option(
        None,
        "images per optimizer update, over all processes and accumulation steps together, so that "
        "a recipe means the same on one GPU and on eight (default: proposed)",
    )
    gradient_accumulation_steps: int = _option(
        1, "forward and backward passes that each process splits its share of a batch into"
    )
    learning_rate: float | None = _option(
        None,
        "peak learning rate of AdamW (default: 1e-4; more, up to 4e-4, for a network that starts "
        "from scratch with fewer than 128 channels)",
    )
    lr_scheduler: Literal["cosine", "constant"] = _option(
        "cosine", "after the warm-up: fall to 0 along a cosine, or stay"
    )
    lr_warmup_steps: int | None = _option(
        None, "updates over which the learning rate rises (default: a twentieth, at most 1000)"
    )
    weight_decay: float = _option(0.0, "AdamW's weight decay")
    max_grad_norm: float = _option(1.0, "gradients are clipped to this norm")
    ema_decay: float = _option(
        0.9999,
        "highest decay of the moving average of the weights, which is what is sampled and shared; "
        "at update n it is at most (1 + n) / (10 + n)",
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = _option(
        None, "precision of the network's arithmetic (default: accelerate's configuration)"
    )
    compile: bool | None = _option(
        None,
        "compile the network by torch.compile, which takes minutes before the first update and "
        "pays in long runs; --no-compile: not (default: accelerate's configuration)",
    )
    gradient_checkpointing: bool = _option(
        False,
        "compute activations anew in the backward pass: the same bits, about a third slower, in a "
        "fraction of the memory",
    )
    num_threads: int | None = _option(
        None,
        "threads of the CPU that share an operation (default: as many as the cores, or one where "
        "that is faster, because something else keeps a core busy)",
    )
    ddp_timeout: int = _option(
        300, "seconds that the processes of a run wait for one that does not answer"
    )
    seed: int = _option(0, "every random number of the run follows from it")


@dataclass
class ValidationOptions:
    """Bits/dim of held-out images on the way; for the whole bound see `ddpm-hf evaluate`."""

    _argument_group_name: ClassVar[str] = "validation"

    validation_split: str | None = _option(
        None,
        "measure bits/dim on these images: a split such as 'test', or a share of the training "
        "images such as 0.05, which is then not trained on (default: no measurement)",
    )
    validation_steps: int | None = _option(
        None, "updates between two measurements (default: as checkpointing_steps)"
    )
    validation_images: int = _option(64, "how many of the images are measured, always the same")
    validation_timesteps: int = _option(
        16, "network calls per image, at timesteps drawn such that the measurement is unbiased"
    )
    keep_best: bool = _option(
        False, "also keep the model with the lowest bits/dim so far, in the folder best/"
    )


@dataclass
class EvaluationOptions:
    """Drawn images beside real ones on the way; for more see `ddpm-hf evaluate`."""

    _argument_group_name: ClassVar[str] = "evaluation"

    evaluate_steps: int | None = _option(
        None,
        "updates between two measurements of the Frechet distance of drawn images to the training "
        "images, with its interval and beside what held-out images get (default: none)",
    )
    evaluate_num_images: int = _option(
        256, "images that are drawn for it, in sample_inference_steps as those of a sample grid"
    )
    evaluate_features: str | None = _option(
        None,
        "what images are compared by: a vision model of transformers by name or folder; "
        "efficientnet-lite0, which needs no download (extra eval); or pixels (default: "
        "facebook/dinov2-base)",
    )


@dataclass
class OutputOptions:
    """What is written, where and when."""

    _argument_group_name: ClassVar[str] = "output"

    output_dir: str | None = _option(None, "folder of the run (default: runs/NAME of the data set)")
    logging_steps: int = _option(20, "updates between two log entries")
    sample_steps: int | None = _option(None, "updates between two sample grids (default: proposed)")
    num_samples: int = _option(16, "images in a sample grid; 0 draws none")
    sample_inference_steps: int = _option(
        50, "denoising steps of a sample grid (deterministic DDIM, which needs few)"
    )
    checkpointing_steps: int | None = _option(
        None, "updates between two checkpoints (default: proposed)"
    )
    checkpoints_total_limit: int = _option(2, "newest checkpoints that are kept")
    calibrate: bool = _option(
        False,
        "in the end measure what the model loses in few steps, and the best variances for them, as "
        "`ddpm-hf calibrate` does on 64 images",
    )
    push_to_hub: str | None = _option(
        None, "also push to this Hub repository, 'user/name', at every checkpoint"
    )
    public: bool = _option(False, "make a new Hub repository public (default: private)")
    license: str | None = _option(
        None, "licence of the model, for its card: a name that the Hub knows, such as 'apache-2.0'"
    )

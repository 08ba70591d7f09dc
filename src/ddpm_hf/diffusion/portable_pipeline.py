# SPDX-License-Identifier: Apache-2.0
"""Loading, saving and pushing of a pipeline with a `UNet2DModel` and a scheduler."""

import json
import os
from pathlib import Path
from typing import Any, Self

from diffusers.models import UNet2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from . import checkpoint_limits, config_extension, portable_checkpoint


class PortablePipeline(DiffusionPipeline):  # type: ignore[misc]
    """Pipeline whose checkpoints open in stock diffusers, with their own code, and here."""

    unet: UNet2DModel

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> Self:
        """Pipeline of a checkpoint of this class or of `DDPMPipeline`.

        Args:
            pretrained_model_name_or_path: a local folder, or "user/name" on the Hub.
            **kwargs: as in `DiffusionPipeline.from_pretrained`. `use_safetensors` is True by
                default: pickled weights (`.bin`) are opened only with `use_safetensors=False`.
        Raises:
            OSError: if the checkpoint does not exist, has only pickled weights, or lacks weights.
            ValueError: for a configuration that cannot be loaded here.
        """
        if kwargs.get("use_safetensors") is None:
            kwargs["use_safetensors"] = True
        if os.path.isdir(pretrained_model_name_or_path):
            checkpoint_limits.check_checkpoint(Path(pretrained_model_name_or_path))
        try:
            pipeline: Self = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except OSError as error:
            if not portable_checkpoint.has_only_pickles(pretrained_model_name_or_path, error):
                raise
            raise OSError(
                f"{pretrained_model_name_or_path} has only pickled weights (.bin), a format that "
                "can run code; if you trust the author, pass `use_safetensors=False` and save the "
                "pipeline, which writes safetensors"
            ) from None
        absent = [name for name, p in pipeline.unet.named_parameters() if p.is_meta]
        if absent and kwargs.get("device_map") is None:  # a device map may leave weights on disk
            raise OSError(f"{pretrained_model_name_or_path} lacks weights: {', '.join(absent)}")
        portable_checkpoint.move_into_memory(pipeline.unet)
        return pipeline

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str | os.PathLike[str]:
        """As in diffusers, with a check of the configurations."""
        try:
            folder: str | os.PathLike[str] = super().download(pretrained_model_name, **kwargs)
        except RecursionError as error:
            raise ValueError(f"model_index.json of {pretrained_model_name}: {error}") from None
        checkpoint_limits.check_checkpoint(Path(folder))
        return folder

    def to_json_string(self) -> str:
        """`model_index.json` for stock diffusers, however this pipeline was loaded."""
        index = json.loads(super().to_json_string())
        index.pop("_name_or_path", None)  # usually a path of this machine
        index["_class_name"] = "DDPMPipeline"
        if index["scheduler"][1] == config_extension.GAUSSIAN_SCHEDULER:
            index["scheduler"] = ["diffusers", "DDPMScheduler"]
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write the portable checkpoint: stock index, safetensors, configurations and source files.

        All files are written to a staging folder first. A new folder then appears at once; in an
        existing one, files are replaced one by one, the index last. A full disk or a crash while
        writing changes nothing. Other files in the folder are kept; links are not followed.

        Args:
            save_directory: folder to write, created if missing.
            safe_serialization: must be True: pickled weights are not written.
            variant: suffix of the weight file, such as "fp16", as in diffusers.
            max_shard_size: size above which weights are split, as in diffusers.
            push_to_hub: whether to push the checkpoint afterwards, see `push_to_hub`.
            **kwargs: arguments of the push: `repo_id` (by default the name of the folder),
                `private`, `token`, `commit_message`, `create_pr`.
        Raises:
            ValueError: for an invalid `save_directory`, and for non-finite weights.
            TypeError: for an unknown argument.
        """
        if not safe_serialization:
            raise ValueError(
                f"`safe_serialization` must be True (only safetensors are written), got "
                f"{safe_serialization}"
            )
        unknown = set(kwargs) - {"repo_id", "private", "token", "commit_message", "create_pr"}
        if unknown:
            names = ", ".join(f"`{name}`" for name in sorted(unknown))
            raise TypeError(f"save_pretrained() got unknown arguments: {names}")
        folder = portable_checkpoint.checked_folder(save_directory)
        portable_checkpoint.check_finite(self.unet.state_dict(), "the unet (nothing was written)")
        with portable_checkpoint.saving(folder, variant) as staging:
            super().save_pretrained(staging, variant=variant, max_shard_size=max_shard_size)
            portable_checkpoint.remove_origin(staging / "unet" / "config.json")
            portable_checkpoint.write_source(staging)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), variant=variant, **kwargs)

    def _upload_folder(
        self,
        working_dir: str | os.PathLike[str],
        repo_id: str,
        token: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        subfolder: str | None = None,
    ) -> Any:
        """Upload of `push_to_hub`, in one commit."""
        return portable_checkpoint.upload(
            Path(working_dir),
            repo_id,
            f"{subfolder}/" if subfolder else "",
            token=token,
            commit_message=commit_message or f"Upload {type(self).__name__}",
            create_pr=create_pr,
        )

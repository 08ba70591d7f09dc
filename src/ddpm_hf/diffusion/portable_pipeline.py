# SPDX-License-Identifier: Apache-2.0
"""How a pipeline of a `UNet2DModel` and a scheduler is loaded, saved and pushed.

Travels with the weights, beside `pipeline.py`.
"""

import json
import os
from pathlib import Path
from typing import Any, Self

from diffusers.models import UNet2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from . import checkpoint_limits, config_extension, portable_checkpoint


class PortablePipeline(DiffusionPipeline):  # type: ignore[misc]
    """A pipeline whose checkpoints open in plain diffusers, with the code beside them, and here."""

    unet: UNet2DModel

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> Self:
        """The pipeline from a folder or a repository of the Hub: its own, or any `DDPMPipeline`'s.

        Args:
            pretrained_model_name_or_path: a local folder or "user/name".
            **kwargs: as in `DiffusionPipeline.from_pretrained`. `use_safetensors` is True unless
                given: pickled weights (`.bin`) are opened only with `use_safetensors=False`.
        Raises:
            OSError: if there is no such checkpoint, it holds only pickled weights, or lacks some.
            ValueError: if a configuration is of nothing that can be loaded here.
        """
        if kwargs.get("use_safetensors") is None:
            kwargs["use_safetensors"] = True
        if os.path.isdir(pretrained_model_name_or_path):
            checkpoint_limits.check_checkpoint(Path(pretrained_model_name_or_path))
        try:
            pipeline: Self = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except OSError as error:
            if not portable_checkpoint.holds_only_pickles(pretrained_model_name_or_path, error):
                raise
            raise OSError(
                f"{pretrained_model_name_or_path} holds its weights only as pickled .bin files, "
                "a format that can carry code and is therefore not opened by itself; if you trust "
                "the author, pass use_safetensors=False, then save_pretrained() writes safetensors"
            ) from error
        absent = [name for name, p in pipeline.unet.named_parameters() if p.is_meta]
        if absent and kwargs.get("device_map") is None:  # a device map may leave weights on disk
            raise OSError(f"{pretrained_model_name_or_path} lacks weights: {', '.join(absent)}")
        portable_checkpoint.move_into_memory(pipeline.unet)
        return pipeline

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str | os.PathLike[str]:
        """As in diffusers; refuses configurations of nothing that can be loaded here."""
        try:
            folder: str | os.PathLike[str] = super().download(pretrained_model_name, **kwargs)
        except RecursionError as error:
            raise ValueError(f"model_index.json of {pretrained_model_name}: {error}") from None
        checkpoint_limits.check_checkpoint(Path(folder))
        return folder

    def to_json_string(self) -> str:
        """`model_index.json` as stock diffusers reads it, whatever way this pipeline was loaded."""
        index = json.loads(super().to_json_string())
        index.pop("_name_or_path", None)  # a path of this machine, as a rule
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

        All of it is on disk before the first file takes its place: a new folder appears at once, in
        an existing one file after file is replaced, the index last. So a full disk or a crash while
        writing leaves the folder as it was. Other files there stay, and links are not followed.

        Args:
            save_directory: the folder to write; made where it is missing.
            safe_serialization: must be True: pickled weights are not written.
            variant: as in diffusers, a suffix of the weight file, such as "fp16".
            max_shard_size: as in diffusers, the size above which weights are split.
            push_to_hub: push it afterwards, see `push_to_hub`.
            **kwargs: for the push: `repo_id` (the folder's name by default), `private`, `token`,
                `commit_message`, `create_pr`.
        Raises:
            ValueError: for an unusable `save_directory`, and if a weight is not finite.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization must be True: only safetensors are written")
        unknown = set(kwargs) - {"repo_id", "private", "token", "commit_message", "create_pr"}
        if unknown:
            raise TypeError(f"save_pretrained() knows no {', '.join(sorted(unknown))}")
        folder = portable_checkpoint.checked_folder(save_directory)
        portable_checkpoint.check_finite(self.unet.state_dict(), "unet (nothing was written)")
        with portable_checkpoint.saving(folder, variant) as staging:
            super().save_pretrained(staging, variant=variant, max_shard_size=max_shard_size)
            portable_checkpoint.forget_origin(staging / "unet" / "config.json")
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
        """What `push_to_hub` uploads by, in one commit."""
        return portable_checkpoint.upload(
            Path(working_dir),
            repo_id,
            f"{subfolder}/" if subfolder else "",
            token=token,
            commit_message=commit_message or f"Upload {type(self).__name__}",
            create_pr=create_pr,
        )

"""State dicts of a `UNetModel`: read, described by flags, and renamed for `UNet2DModel`."""

import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor

from ddpm_hf.diffusion.atomic_files import check_regular
from ddpm_hf.openai_conversion.flags import OpenAIFlags

_RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
_ENDS = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding", "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out",
    "out.2": "conv_out",
}  # fmt: skip


def weights_file(path: Path) -> Path:
    """The file itself, or the newest EMA weights in the folder of a training run.

    Raises:
        ValueError: if the folder has no weights.
    """
    if not path.is_dir():
        return path
    for pattern in (r"ema_[\d.]+_(\d+)\.pt", r"model(\d+)\.pt"):
        found = {file: re.fullmatch(pattern, file.name) for file in path.iterdir()}
        steps = {file: int(match[1]) for file, match in found.items() if match}
        if steps:
            return max(steps, key=lambda file: steps[file])
    raise ValueError(f"{path} has no ema_RATE_STEP.pt and no modelSTEP.pt: pass a `.pt` file")


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict in a `.pt` file.

    Raises:
        ValueError: if it is not one of a `UNetModel`.
        OSError: if the file cannot be read.
    """
    check_regular(path)
    try:
        # Files of PyTorch before 1.6 are not zip archives, which can be memory-mapped.
        mmap = zipfile.is_zipfile(path)
        state: Any = torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # unpickling errors of many kinds
        reason = str(error).split("\n")[0]
        if "weights_only" in reason:  # torch advises to run the code in the file
            reason = "it is no file of PyTorch, or holds other objects than tensors"
        raise ValueError(f"{path} is not a state dict that is safe to read: {reason}") from None
    are_tensors = isinstance(state, dict) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    )
    if not are_tensors or "input_blocks.0.0.weight" not in state:
        raise ValueError(
            f"{path} is not a UNetModel of improved-diffusion or guided-diffusion: it has no"
            " input_blocks.0.0.weight"
        )
    return dict(state)


def flags_of_weights(state: Mapping[str, Tensor], image_size: int) -> Mapping[str, Any]:
    """The flags that the weights determine, read off the decoder; none if it is incomplete.

    Args:
        state: state dict of a `UNetModel`.
        image_size: pixels per side, which no weight depends on.
    """
    changes = re.compile(r"output_blocks\.(\d+)\.[12]\.(conv|in_layers\.2)\.weight")
    upsamplers = {int(m[1]): m[2] for m in map(changes.fullmatch, state) if m}
    num_blocks = len({name.split(".")[1] for name in state if name.startswith("output_blocks.")})
    per_level = min(upsamplers, default=num_blocks - 1) + 1
    firsts = [f"output_blocks.{i}" for i in range(0, num_blocks, per_level)][::-1]
    try:
        widths = [len(state[f"{first}.0.out_layers.3.weight"]) for first in firsts]
        num_channels = len(state["time_embed.0.weight"]) // 4
        embedding = len(state[f"{firsts[-1]}.0.emb_layers.1.weight"])
        num_outputs = len(state["out.2.weight"])
    except KeyError:
        return {}
    attended = [
        image_size // 2**level
        for level, first in enumerate(firsts)
        if f"{first}.1.qkv.weight" in state
    ]
    return {
        "num_channels": num_channels,
        "num_res_blocks": per_level - 1,
        "channel_mult": ",".join(f"{width / num_channels:g}" for width in widths),
        "attention_resolutions": ",".join(map(str, attended)) or "0",
        "class_cond": "label_emb.weight" in state,
        "learn_sigma": num_outputs == 6,
        "use_scale_shift_norm": embedding == 2 * widths[-1],
        "resblock_updown": "in_layers.2" in upsamplers.values(),
    }


def converted(
    state: Mapping[str, Tensor], unet: UNet2DModel, flags: OpenAIFlags
) -> dict[str, Tensor]:
    """The state dict of `unet`, in float32.

    Raises:
        ValueError: for missing, unknown or ill-shaped weights; names the first of them.
    """
    renamed: dict[str, Tensor] = {}
    blocks = dict(_block_names(unet))
    unknown = []
    for name, weight in state.items():
        target = _new_name(name, blocks)
        if target is None:
            unknown.append(name)
        elif ".qkv." in target:
            prefix, kind = target.split(".qkv.")
            heads = unet.get_submodule(prefix).heads
            parts = _split_heads(weight, heads, flags.use_new_attention_order)
            for part, rows in zip(("to_q", "to_k", "to_v"), parts, strict=True):
                renamed[f"{prefix}.{part}.{kind}"] = rows
        else:
            renamed[target] = weight[..., 0] if ".to_out.0.weight" in target else weight
    expected = unet.state_dict()
    missing = [name for name in expected if name not in renamed]
    unknown += [name for name in renamed if name not in expected]
    shapes = [
        f"{name} has shape {tuple(renamed[name].shape)} instead of {tuple(weight.shape)}"
        for name, weight in expected.items()
        if name in renamed and renamed[name].shape != weight.shape
    ]
    if missing or unknown or shapes:
        problems = [
            *([f"{len(missing)} missing, such as {missing[0]}"] if missing else []),
            *([f"{len(unknown)} unknown, such as {unknown[0]}"] if unknown else []),
            *shapes[:1],
        ]
        raise ValueError(
            f"the weights do not fit these flags: {'; '.join(problems)}. Check `preset` or `config`"
        )
    return {name: renamed[name].float() for name in expected}


def _block_names(unet: UNet2DModel) -> Iterator[tuple[str, str]]:
    """(their name, our name) of every residual block, attention layer and change of resolution."""
    number = 1  # input_blocks.0 is the first convolution
    for level, block in enumerate(unet.down_blocks):
        for layer in range(len(block.resnets)):
            yield from _layer(f"input_blocks.{number}", f"down_blocks.{level}", block, layer)
            number += 1
        if block.downsamplers is not None:
            yield f"input_blocks.{number}.0", f"down_blocks.{level}.downsamplers.0"
            number += 1
    for theirs, ours in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        yield f"middle_block.{theirs}", f"mid_block.{ours}"
    number = 0
    for level, block in enumerate(unet.up_blocks):
        for layer in range(len(block.resnets)):
            names = list(_layer(f"output_blocks.{number}", f"up_blocks.{level}", block, layer))
            yield from names
            is_last = layer == len(block.resnets) - 1
            if is_last and block.upsamplers is not None:
                yield f"output_blocks.{number}.{len(names)}", f"up_blocks.{level}.upsamplers.0"
            number += 1


def _layer(theirs: str, ours: str, block: Any, layer: int) -> Iterator[tuple[str, str]]:
    yield f"{theirs}.0", f"{ours}.resnets.{layer}"
    if getattr(block, "attentions", None):
        yield f"{theirs}.1", f"{ours}.attentions.{layer}"


def _new_name(name: str, blocks: Mapping[str, str]) -> str | None:
    module, _, kind = name.rpartition(".")
    if module in _ENDS:
        return f"{_ENDS[module]}.{kind}"
    parts = module.split(".")
    theirs = ".".join(parts[: 2 if parts[0] == "middle_block" else 3])
    rest = module[len(theirs) + 1 :]
    ours = blocks.get(theirs)
    if ours is None:
        return None
    if ".attentions." in ours:
        attention = {"norm": "group_norm", "qkv": "qkv", "proj_out": "to_out.0"}
        return f"{ours}.{attention[rest]}.{kind}" if rest in attention else None
    if rest in ("op", "conv"):  # a convolution that changes the resolution
        return f"{ours}.conv.{kind}"
    return f"{ours}.{_RESNET[rest]}.{kind}" if rest in _RESNET else None


def _split_heads(weight: Tensor, heads: int, is_new_order: bool) -> tuple[Tensor, ...]:
    """q, k and v of a layer: interleaved per head, or one after the other in the new order."""
    weight = weight[..., 0] if weight.ndim == 3 else weight  # a convolution of width 1
    if is_new_order:
        return weight.chunk(3)
    by_head = weight.reshape(heads, 3, -1, *weight.shape[1:])
    return tuple(by_head[:, part].flatten(0, 1) for part in range(3))

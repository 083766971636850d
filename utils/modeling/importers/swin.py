"""Swin under the names of timm and Microsoft, and SOLIDER's, whose names are those of mmdetection."""

import math
import re

import torch
import torch.nn.functional as F
from transformers import SwinConfig

from utils.modeling.importers.imported import HALVES_BILINEAR, IMAGENET_BICUBIC, Imported
from utils.modeling.networks.solider import SoliderSwinConfig

# SOLIDER's setting for Re-ID; the file does not hold it.
SEMANTIC_WEIGHT = 0.2
TIMM = {"attn": "attn", "table": "attn.relative_position_bias_table", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
MMDET = {
    "attn": "attn.w_msa",
    "table": "attn.w_msa.relative_position_bias_table",
    "fc1": "ffn.layers.0.0",
    "fc2": "ffn.layers.1",
}
UNKNOWN_PARTS = {
    "logit_scale": "the cosine attention of Swin V2",
    "cpb_mlp.": "the position network of Swin V2",
    "absolute_pos_embed": "absolute positions",
}


def read_network(tensors, prefix, stages, names, config_class):
    """(configuration, state) of patches and blocks; norms at the end and reductions are left in `tensors`."""
    tensors.refuse_parts(UNKNOWN_PARTS)
    pattern = re.compile(rf"{re.escape(prefix)}{stages}\.(\d+)\.blocks\.(\d+)\.norm1\.weight$")
    blocks = sorted((int(match[1]), int(match[2])) for name in tensors if (match := pattern.match(name)))
    depths = [sum(stage == number for stage, _ in blocks) for number in range(1 + max(blocks)[0])]
    if blocks != [(stage, block) for stage, depth in enumerate(depths) for block in range(depth)]:
        tensors.refuse(f"its stages have the blocks {blocks}, so some are missing")
    first = f"{prefix}{stages}.0.blocks.0."
    rows, heads = tensors.shape_of(first + names["table"])
    window = (math.isqrt(rows) + 1) // 2
    width = tensors.shape_of(f"{first}norm1.weight")[0]
    if (2 * window - 1) ** 2 != rows:
        tensors.refuse(f"its table of {rows} relative positions is that of no square window")
    state, all_heads = {}, []
    for stage, block in blocks:
        old, new = f"{prefix}{stages}.{stage}.blocks.{block}.", f"encoder.layers.{stage}.blocks.{block}."
        table = tensors.take(old + names["table"])
        state[f"{new}attention.relative_position_bias.relative_position_bias_table"] = table
        for kind in ("weight", "bias"):
            for theirs, ours in (
                ("norm1", "layernorm_before"), ("norm2", "layernorm_after"), (names["fc1"], "mlp.fc1"),
                (names["fc2"], "mlp.fc2"), (f"{names['attn']}.proj", "attention.o_proj"),
            ):  # fmt: skip
                state[f"{new}{ours}.{kind}"] = tensors.take(f"{old}{theirs}.{kind}")
            for letter, part in zip("qkv", tensors.take(f"{old}{names['attn']}.qkv.{kind}").chunk(3), strict=True):
                state[f"{new}attention.{letter}_proj.{kind}"] = part
        # Tables that follow from the window.
        tensors.drop(f"{old}attn_mask", f"{old}{names['attn']}.relative_position_index")
        if block == 0:
            all_heads.append(table.shape[1])
            if table.shape[1] * (width // heads) != width * 2**stage:
                tensors.refuse(f"stage {stage} has {table.shape[1]} heads for a width of {width * 2**stage}")
    config = config_class(
        embed_dim=width,
        depths=depths,
        num_heads=all_heads,
        window_size=window,
        mlp_ratio=len(state["encoder.layers.0.blocks.0.mlp.fc1.weight"]) / width,
    )
    return config, state


def take_norm(tensors, old, new):
    return {f"{new}.{kind}": tensors.take(f"{old}.{kind}") for kind in ("weight", "bias")}


def plain(tensors, image_size):
    """timm and Microsoft: timm counts a reduction to the stage after it, Microsoft to the stage before."""
    config, state = read_network(tensors, "", "layers", TIMM, SwinConfig)
    state |= take_norm(tensors, "patch_embed.proj", "embeddings.patch_embeddings.projection")
    state |= take_norm(tensors, "patch_embed.norm", "embeddings.norm")
    shift = 0 if "layers.0.downsample.norm.weight" in tensors else 1
    for stage in range(len(config.depths) - 1):
        old, new = f"layers.{stage + shift}.downsample.", f"encoder.layers.{stage}.downsample."
        state |= take_norm(tensors, f"{old}norm", f"{new}norm")
        state[f"{new}reduction.weight"] = tensors.take(f"{old}reduction.weight")
    state |= take_norm(tensors, "norm", "layernorm")
    notes = tensors.drop_classifier("head.weight", "head.fc.weight")
    tensors.done()
    return Imported(config, image_size or (256, 128), IMAGENET_BICUBIC, state, notes=tuple(notes))


def unfolded(tensor):
    """mmdetection's four neighbours, channel by channel and row by row, in Swin's order: column by column outside."""
    tensor = tensor.unflatten(-1, (-1, 4))[..., [0, 2, 1, 3]]
    return tensor.transpose(-1, -2).flatten(-2)


def solider(tensors, image_size, semantic_weight=SEMANTIC_WEIGHT):
    """SOLIDER, pre-trained or fine-tuned; the feature is that before the BNNeck, as published.

    The semantic weight w scales and shifts the map after a reduction: x softplus(A (w, 1 - w)) + B (w, 1 - w). Both
    are fixed with w, so they become part of the reduction.
    """
    if not 0 <= semantic_weight <= 1:
        raise ValueError(f"semantic_weight must be within 0 and 1, got {semantic_weight}")
    prefix = next(p for p in ("base.", "backbone.", "") if f"{p}patch_embed.projection.weight" in tensors)
    notes = tensors.drop_classifier("classifier.weight")
    tensors.drop("bottleneck.", "head.")
    config, state = read_network(tensors, prefix, "stages", MMDET, SoliderSwinConfig)
    state |= take_norm(tensors, f"{prefix}patch_embed.projection", "embeddings.patch_embeddings.projection")
    state |= take_norm(tensors, f"{prefix}patch_embed.norm", "embeddings.norm")
    last = len(config.depths) - 1
    controlled = f"{prefix}semantic_embed_w.0.weight" in tensors
    semantic = torch.tensor([semantic_weight, 1 - semantic_weight])
    for stage in range(last):
        old, new = f"{prefix}stages.{stage}.downsample.", f"encoder.layers.{stage}.downsample."
        state |= {f"{new}norm.{kind}": unfolded(tensors.take(f"{old}norm.{kind}")) for kind in ("weight", "bias")}
        weight = unfolded(tensors.take(f"{old}reduction.weight")).float()
        scale, shift = torch.ones(len(weight)), torch.zeros(len(weight))
        if controlled:
            values = {}
            for letter in "wb":
                linear = f"{prefix}semantic_embed_{letter}.{stage}."
                values[letter] = tensors.take(f"{linear}weight").float() @ semantic + tensors.take(f"{linear}bias")
            scale, shift = F.softplus(values["w"]), values["b"]
        state[f"{new}reduction.weight"], state[f"{new}reduction.bias"] = scale[:, None] * weight, shift
    state |= take_norm(tensors, f"{prefix}norm{last}", "layernorm")
    # The norms of earlier stages and the last control do not reach the feature.
    tensors.drop(*(f"{prefix}norm{stage}." for stage in range(last)))
    tensors.drop(f"{prefix}semantic_embed_w.{last}.", f"{prefix}semantic_embed_b.{last}.")
    options, head = {"norm": False}, {}
    if "fcneck.weight" in tensors:
        head["head.neck.linear.weight"] = tensors.take("fcneck.weight")
        options["embedding"] = len(head["head.neck.linear.weight"])
    tensors.done()
    if controlled:
        notes.append(f"semantic weight {semantic_weight}; another: convert with --semantic_weight")
    notes.append("features before the BNNeck")
    return Imported(config, image_size or (384, 128), HALVES_BILINEAR, state, "embedding", options, head, tuple(notes))

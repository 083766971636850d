"""CLIP's image encoder under OpenAI's and OpenCLIP's names; the text encoder is left out."""

import math
import re

from transformers import CLIPVisionConfig

from utils.modeling.backbones import ClipBackbone, resize_position_table
from utils.modeling.importers.dcac import BLOCK_NAMES, HEAD_WIDTH, NAMES
from utils.modeling.importers.imported import Imported

CLIP_NORMALISATION = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
    "resample": "bicubic",
}
ACTIVATIONS = ("gelu", "quick_gelu")
# OpenCLIP's ViT-H, g and bigG, and others that are as wide, have 16 heads.
HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104, 1792: 112}
TEXT = ("transformer.", "text.", "token_embedding.", "ln_final.", "logit_", "attn_mask")
# Numbers that OpenAI's archives hold beside the weights.
OPENAI_NUMBERS = ("input_resolution", "context_length", "vocab_size")
UNKNOWN_PARTS = {
    "visual.layer1.": "CLIP's ResNet as image encoder",
    "visual.trunk.": "an image encoder of timm inside OpenCLIP",
    "visual.attn_pool.": "an attention pooler, as CoCa has",
    ".ls_1.": "layer scales",
    "patchnorm_pre_ln": "a norm before the patches",
}


def read(tensors, image_size, activation=None):
    """OpenAI's weights use QuickGELU, OpenCLIP's own GELU; neither is in the file.

    OpenAI's are told by the numbers in their archives, or by half precision; `activation` overrules it.
    """
    if activation not in (None, *ACTIVATIONS):
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    tensors.refuse_parts(UNKNOWN_PARTS)
    openai = any(name in tensors for name in OPENAI_NUMBERS) or "float16" in str(tensors["visual.proj"].dtype)
    used = activation or ("quick_gelu" if openai else "gelu")
    for name in ("positional_embedding", "text_projection", *OPENAI_NUMBERS):
        tensors.pop(name, None)
    left_out = tensors.drop(*TEXT)
    positions = tensors.shape_of("visual.positional_embedding")[0] - 1
    side = math.isqrt(positions)
    if side * side != positions:
        tensors.refuse(f"its {positions} positions are no square grid")
    options, state = read_tower(tensors, "visual.")
    config = CLIPVisionConfig(**options, image_size=side * options["patch_size"], hidden_act=used)
    tensors.done()
    notes = [f"{left_out} tensors of the text encoder are left out"] if left_out else []
    if activation is None:
        why = "OpenAI's" if openai else "OpenCLIP's own"
        notes.append(
            f"activation {used}, as in {why} weights; another: "
            "python -m utils.modeling.convert FILE DIR --activation NAME"
        )
    return Imported(config, image_size or (256, 128), CLIP_NORMALISATION, state, notes=tuple(notes))


def read_tower(tensors, prefix):
    """(options of the configuration, state) of an image encoder whose names start with `prefix`."""
    width, _, patch, _ = tensors.shape_of(f"{prefix}conv1.weight")
    pattern = re.compile(rf"{re.escape(prefix)}transformer\.resblocks\.(\d+)\.")
    blocks = {match[1] for name in tensors if (match := pattern.match(name))}
    options = {
        "hidden_size": width,
        "intermediate_size": tensors.shape_of(f"{prefix}transformer.resblocks.0.mlp.c_fc.weight")[0],
        "num_hidden_layers": len(blocks),
        "num_attention_heads": heads_of(tensors, width),
        "patch_size": patch,
        "projection_dim": tensors.shape_of(f"{prefix}proj")[1],
    }
    state = {f"vision_model.{ours}": tensors.take(f"{prefix}{theirs}") for theirs, ours in NAMES.items()}
    state["visual_projection.weight"] = tensors.take(f"{prefix}proj").T
    for block in range(len(blocks)):
        old, new = f"{prefix}transformer.resblocks.{block}.", f"vision_model.encoder.layers.{block}."
        for kind in ("weight", "bias"):
            for theirs, ours in BLOCK_NAMES.items():
                state[f"{new}{ours}.{kind}"] = tensors.take(f"{old}{theirs}.{kind}")
            for letter, part in zip("qkv", tensors.take(f"{old}attn.in_proj_{kind}").chunk(3), strict=True):
                state[f"{new}self_attn.{letter}_proj.{kind}"] = part
    return options, state


def heads_of(tensors, width):
    head = HEAD_WIDTHS.get(width, HEAD_WIDTH)
    if width % head or width > max(HEAD_WIDTHS):
        tensors.refuse(f"its width {width} is not a multiple of {HEAD_WIDTH}, the width of a head of CLIP")
    return width // head


def square_positions(backbone, state):
    """Position tables of a file are for a square; ClipBackbone has resized its own to the images."""
    if not isinstance(backbone, ClipBackbone):
        return state
    name = "vision_model.embeddings.position_embedding.weight"
    return state | {name: resize_position_table(state[name].float(), backbone.stored_grid, backbone.grid)}

"""Plain ViTs under timm's names: timm, DINO, DINOv2; TransReID and TransReID-SSL with cameras, jigsaw branch, stem."""

import math
import re

from utils.modeling.backbones import HALVES, IMAGENET
from utils.modeling.importers.imported import HALVES_BILINEAR, Imported, grid_size
from utils.modeling.networks.plain_vit import PlainViTConfig, resized_positions

HEAD_WIDTH = 64
# ViT-H's heads are wider.
HEAD_WIDTHS = {1280: 80}
UNKNOWN_PARTS = {
    "dist_token": "a distillation token, as DeiT has",
    "fc_norm.": "a norm after mean pooling",
    "norm_pre.": "a norm before the blocks, as CLIP in timm has",
    "reg_token": "register tokens",
    "register_tokens": "register tokens",
    "attn.q_norm.": "norms of queries and keys",
    "mlp.w12.": "SwiGLU layers",
    "attn_pool.": "an attention pooler",
    "rope.": "rotary positions",
    "gating_param": "the gates of ConViT",
}
# The strides of TransReID and CLIP-ReID, and the image sizes of their published settings.
STRIDES, SIZES = (16, 12, 14, 11), ((256, 128), (384, 128), (256, 256), (224, 224))
CAMERAS = (
    "it knows {} cameras (or views) of its training set: images take the mean of them, unless evaluate.py "
    "--camera_embeddings or model.backbone.seen_by(cameras) says which"
)


def read_blocks(tensors, old, new, state, number):
    """One block: `old` and `new` are what stands before its names."""
    for theirs, ours in (
        ("norm1", "norm1"), ("norm2", "norm2"), ("attn.qkv", "attention.qkv"), ("attn.proj", "attention.out"),
        ("mlp.fc1", "fc1"), ("mlp.fc2", "fc2"),
    ):  # fmt: skip
        for kind in ("weight", "bias"):
            if theirs == "attn.qkv" and kind == "bias" and f"{old}attn.qkv.bias" not in tensors:
                tensors.refuse(
                    f"block {number} has no qkv.bias, as the old ViT-S of TransReID, which is not supported"
                )
            state[f"{new}{ours}.{kind}"] = tensors.take(f"{old}{theirs}.{kind}")
    for theirs, ours in (("ls1.gamma", "scale1"), ("ls2.gamma", "scale2")):
        if f"{old}{theirs}" in tensors:
            state[f"{new}{ours}"] = tensors.take(f"{old}{theirs}")


def read_network(tensors, prefix):
    """(options of the configuration, state) of everything but positions and cameras."""
    tensors.refuse_parts(UNKNOWN_PARTS)
    width, _, patch, _ = tensors.shape_of(f"{prefix}patch_embed.proj.weight")
    stem = f"{prefix}patch_embed.conv.0.weight" in tensors
    head = HEAD_WIDTHS.get(width, HEAD_WIDTH)
    if width % head:
        tensors.refuse(f"its width {width} is not a multiple of {head}, the width of a head of ViT")
    pattern = re.compile(rf"{re.escape(prefix)}blocks\.(\d+)\.norm1\.weight$")
    numbers = sorted(int(match[1]) for name in tensors if (match := pattern.match(name)))
    if numbers != list(range(len(numbers))) or not numbers:
        tensors.refuse(f"its blocks are {numbers}, so some are missing")
    options = {
        "hidden_size": width,
        "num_hidden_layers": len(numbers),
        "num_attention_heads": width // head,
        "intermediate_size": tensors.shape_of(f"{prefix}blocks.0.mlp.fc1.weight")[0],
        "patch_size": 2 * patch if stem else patch,
        "stem": stem,
        "layer_scale": f"{prefix}blocks.0.ls1.gamma" in tensors,
    }
    state = {"class_token": tensors.take(f"{prefix}cls_token")}
    for kind in ("weight", "bias"):
        state[f"patches.{kind}"] = tensors.take(f"{prefix}patch_embed.proj.{kind}")
        state[f"layernorm.{kind}"] = tensors.take(f"{prefix}norm.{kind}")
    for number in numbers:
        read_blocks(tensors, f"{prefix}blocks.{number}.", f"layers.{number}.", state, number)
    if stem:
        read_stem(tensors, f"{prefix}patch_embed.conv.", state)
    return options, state


def read_stem(tensors, old, state):
    """Three times a convolution and a norm, the first two with instance norm for half of the channels."""
    for place in (0, 3, 6):
        state[f"stem.{place}.weight"] = tensors.take(f"{old}{place}.weight")
    for place in (1, 4):
        for kind in ("weight", "bias"):
            state[f"stem.{place}.instance.{kind}"] = tensors.take(f"{old}{place}.IN.{kind}")
        state |= tensors.take_norm(f"{old}{place}.BN.", f"stem.{place}.batch.")
    state |= tensors.take_norm(f"{old}7.", "stem.7.")


def plain(tensors, image_size, prefix=""):
    """timm, DINO and DINOv2: the table of positions, square or twice as high as wide, is resized to the images.

    Upright ones are of people: TransReID-SSL's, pre-trained by DINO on LUPerson.
    """
    options, state = read_network(tensors, prefix)
    notes = tensors.drop_classifier("head.weight")
    tensors.pop("mask_token", None)
    tensors.drop("head.")
    table = tensors.take(f"{prefix}pos_embed")[0]
    tensors.done()
    positions = len(table) - 1
    columns = math.isqrt(positions)
    if upright := columns**2 != positions:
        columns = math.isqrt(positions // 2)
    grid = (2 * columns, columns) if upright else (columns, columns)
    if math.prod(grid) != positions:
        tensors.refuse(f"its {positions} positions are no grid that is square or twice as high as wide")
    patch = options["patch_size"]
    size = image_size or tuple(side // patch * patch for side in (256, 128))
    config = PlainViTConfig(**options, stride=patch, image_size=list(size))
    # As the projects themselves do; TransReID's, which are upright, bilinearly.
    state["position_embedding"] = resized_positions(table, grid, config, "bilinear" if upright else "bicubic")
    usual = HALVES if upright or notes and not options["layer_scale"] else IMAGENET
    why = "as TransReID-SSL fine-tunes" if upright else "a file does not say it, a folder of timm does"
    notes.append(f"normalised by mean {usual['image_mean']}: {why}")
    return Imported(config, size, {**usual, "resample": "bicubic"}, state, notes=tuple(notes))


def dino(tensors, image_size):
    """The whole file of a training by DINO, with its head."""
    return plain(tensors, image_size, "backbone.")


def transreid(tensors, image_size):
    """TransReID, its features before the BNNeck, as published; with cameras (SIE) and jigsaw branch where they are."""
    notes = tensors.drop_classifier("classifier.weight", *(f"classifier_{n}.weight" for n in range(1, 5)))
    tensors.drop("base.fc.", "bottleneck")
    jigsaw = "b1.0.norm1.weight" in tensors
    if jigsaw:
        # The branches hold their own copies of the last block; the first copy, in the base, is not used.
        last = max(int(match[1]) for name in tensors if (match := re.match(r"base\.blocks\.(\d+)\.", name)))
        tensors.drop(f"base.blocks.{last}.", "base.norm.")
        for name in [name for name in tensors if name.startswith(("b1.0.", "b1.1."))]:
            new = f"base.blocks.{last}." if name.startswith("b1.0.") else "base.norm."
            tensors[new + name.split(".", 2)[2]] = tensors.pop(name)
    options, state = read_network(tensors, "base.")
    table = tensors.take("base.pos_embed")[0]
    cameras = tensors.pop("base.sie_embed", None)
    head = {}
    if jigsaw:
        read_blocks(tensors, "b2.0.", "head.block.", head, "b2")
        head |= {f"head.norm.{kind}": tensors.take(f"b2.1.{kind}") for kind in ("weight", "bias")}
    tensors.done()

    stride, _, size = published_grid(tensors, len(table) - 1, options["patch_size"], image_size)
    if cameras is not None:
        options["num_cameras"] = len(cameras)
        state["camera_embedding"] = cameras[:, 0]
        notes.append(CAMERAS.format(len(cameras)))
    state["position_embedding"] = table
    config = PlainViTConfig(**options, stride=stride, image_size=list(size))
    method, head_options = ("jigsaw", {}) if jigsaw else ("embedding", {"norm": False})
    notes.insert(0, f"images of {size[0]} x {size[1]}, patches every {stride} pixels; features before the BNNeck")
    return Imported(config, size, HALVES_BILINEAR, state, method, head_options, head, tuple(notes))


def published_grid(tensors, positions, patch, image_size):
    """(stride, grid, image size) that a table of `positions` patches is of: `image_size`, or a published one."""
    for stride in STRIDES:
        grid, size = grid_size(positions, patch, stride, image_size, SIZES)
        if grid:
            return stride, grid, size
    wanted = f"images of {tuple(image_size)}" if image_size else "a published image size; give it"
    tensors.refuse(f"its {positions} positions do not fit {wanted}, at strides {STRIDES}")

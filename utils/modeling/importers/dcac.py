"""The checkpoints released by DCAC's authors, renamed for our model. Only weights are read: no code is unpickled."""

import math
import re

import torch
from transformers import CLIPVisionConfig

from utils.modeling.backbones import checked_image_size
from utils.modeling.importers.files import read_content

# OpenAI's CLIP names on the left, those of transformers on the right.
NAMES = {
    "conv1.weight": "embeddings.patch_embedding.weight",
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}
BLOCK_NAMES = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
HEAD_WIDTH = 64


def read_dcac_checkpoint(path, image_size=None):
    """(CLIPVisionConfig, image_size, num_ids, state dict for ReIDModel) from a file of the authors.

    Width, depth and patch follow from the shapes. The grid is twice as high as wide unless `image_size` is given.
    """
    tensors = encoder_tensors(path)
    encoder = {
        name.removeprefix("image_encoder."): tensor
        for name, tensor in tensors.items()
        if name.startswith("image_encoder.")
    }
    neck = {name: tensor for name, tensor in tensors.items() if not name.startswith("image_encoder.")}
    blocks = {int(match[1]) for name in encoder if (match := re.match(r"transformer\.resblocks\.(\d+)\.", name))}
    depth = max(blocks, default=-1) + 1
    check_shapes(path, encoder, neck, depth)

    width, _, patch, _ = encoder["conv1.weight"].shape
    positions = encoder["positional_embedding"].shape[0] - 1
    image_size = grid_image_size(path, positions, patch, image_size)
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=encoder["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        num_hidden_layers=depth,
        num_attention_heads=width // HEAD_WIDTH,
        patch_size=patch,
        projection_dim=encoder["proj"].shape[1],
        hidden_act="quick_gelu",
    )

    tower = {our_name: encoder[dcac_name] for dcac_name, our_name in NAMES.items()}
    for block in range(depth):
        old, new = f"transformer.resblocks.{block}.", f"encoder.layers.{block}."
        for kind in ("weight", "bias"):
            for dcac_name, our_name in BLOCK_NAMES.items():
                tower[f"{new}{our_name}.{kind}"] = encoder[f"{old}{dcac_name}.{kind}"]
            for letter, part in zip("qkv", encoder[f"{old}attn.in_proj_{kind}"].chunk(3), strict=True):
                tower[f"{new}self_attn.{letter}_proj.{kind}"] = part
    state = {f"backbone.model.vision_model.{name}": tensor for name, tensor in tower.items()}
    state["backbone.model.visual_projection.weight"] = encoder["proj"].T
    state |= {name.replace("fc.weight", "classifier.weight"): tensor for name, tensor in neck.items()}
    state.setdefault("bnneck.num_batches_tracked", torch.tensor(0))
    num_ids = neck["fc.weight"].shape[0] if "fc.weight" in neck else 0
    return config, image_size, num_ids, state


def encoder_tensors(path):
    """The tensors under `encoder.` in the file; `denoiser.` and everything else is left out."""
    content = read_content(path)
    tensors = {}
    for name, value in content.items():
        name = str(name).removeprefix("module.")
        if name.startswith("encoder."):
            if not isinstance(value, torch.Tensor):
                raise ValueError(f"{name} in {str(path)!r} is a {type(value).__name__}, not a tensor")
            tensors[name.removeprefix("encoder.")] = value
    if not tensors:
        names = ", ".join(sorted(map(str, content))[:5]) or "nothing"
        raise ValueError(
            f"{str(path)!r} is not a DCAC checkpoint: it has no tensors under 'encoder.' (found: {names})"
        )
    return tensors


def check_shapes(path, encoder, neck, depth):
    """ValueError unless the tensors are exactly those of a CLIP image encoder with BNNeck, in their shapes."""

    def refuse(reason):
        raise ValueError(f"{str(path)!r} is not a DCAC checkpoint of a CLIP ViT encoder: {reason}")

    patches = encoder.get("conv1.weight")
    if patches is None or patches.dim() != 4 or patches.shape[1] != 3 or patches.shape[2] != patches.shape[3]:
        refuse("image_encoder.conv1.weight is absent or no square RGB patch projection")
    width = patches.shape[0]
    if width % HEAD_WIDTH:
        refuse(f"its width {width} is not a multiple of {HEAD_WIDTH}")
    if not depth:
        refuse("it has no image_encoder.transformer.resblocks")
    mlp = tuple(getattr(encoder.get("transformer.resblocks.0.mlp.c_fc.weight"), "shape", ()))[:1]
    projection = tuple(getattr(encoder.get("proj"), "shape", ()))[1:]
    # -1 stands for any length.
    shapes = dict.fromkeys(NAMES, (width,)) | {
        "conv1.weight": tuple(patches.shape),
        "positional_embedding": (-1, width),
        "proj": (width, -1),
    }
    for block in range(depth):
        shapes |= {
            f"transformer.resblocks.{block}.{name}": shape
            for name, shape in {
                "ln_1.weight": (width,),
                "ln_1.bias": (width,),
                "attn.in_proj_weight": (3 * width, width),
                "attn.in_proj_bias": (3 * width,),
                "attn.out_proj.weight": (width, width),
                "attn.out_proj.bias": (width,),
                "ln_2.weight": (width,),
                "ln_2.bias": (width,),
                "mlp.c_fc.weight": (*mlp, width),
                "mlp.c_fc.bias": mlp,
                "mlp.c_proj.weight": (width, *mlp),
                "mlp.c_proj.bias": (width,),
            }.items()
        }
    neck_shapes = {f"bnneck.{name}": projection for name in ("weight", "bias", "running_mean", "running_var")}
    optional = {"bnneck.num_batches_tracked": (), "fc.weight": (-1, *projection)}

    for tensors, expected, optional_shapes in ((encoder, shapes, {}), (neck, neck_shapes, optional)):
        if missing := [name for name in expected if name not in tensors]:
            refuse(f"{len(missing)} tensors are missing, such as {missing[0]}")
        for name, tensor in tensors.items():
            shape = expected.get(name, optional_shapes.get(name))
            if shape is None:
                refuse(f"{name} is not part of one")
            fits = len(shape) == tensor.dim() and all(a in (-1, b) for a, b in zip(shape, tensor.shape, strict=True))
            if not fits:
                refuse(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")


def grid_image_size(path, positions, patch, image_size):
    if image_size is None:
        columns = math.isqrt(positions // 2)
        if positions < 2 or 2 * columns * columns != positions:
            raise ValueError(
                f"the {positions} positions in {str(path)!r} are no grid twice as high as wide; "
                "give image_size=(height, width)"
            )
        return 2 * columns * patch, columns * patch
    height, width = checked_image_size(image_size)
    if (height // patch) * (width // patch) != positions:
        raise ValueError(
            f"{str(path)!r} has {positions} positions of {patch} x {patch} pixels, which is not the grid of "
            f"image_size {(height, width)}: {height // patch} x {width // patch}"
        )
    return height, width

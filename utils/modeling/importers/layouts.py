"""The layouts of weights that are known, each by the names of its tensors; opens a file of any of them.

`python -m utils.modeling.importers` prints the table of the README, made from this list.
"""

import importlib
import json
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import snapshot_download

from utils.modeling.backbones import MODELS, backbone_from_config, model_class_of, wrap
from utils.modeling.importers.clip import square_positions
from utils.modeling.importers.files import read_content, read_tensors
from utils.modeling.importers.imported import Tensors


class Layout(NamedTuple):
    """A layout: what it is called, the names that tell it, what comes of it, and its reader (file, function)."""

    title: str
    marks: tuple
    gives: str
    reader: tuple

    def fits(self, names):
        return all(any(name.startswith(mark) for name in names) for mark in self.marks)


RESNETS = "torchvision, timm, LUPerson, LUPerson-NL ResNet"
FAST_REID = "fast-reid BoT, AGW, SBS, MGN on ResNet"
BASELINES = "torchreid ResNet, Person_reID_baseline_pytorch"
OSNETS = "torchreid OSNet, OSNet-IBN, OSNet-AIN"
PARTS = "ResNet, also IBN-a; non-local blocks, pooling, branches, necks"
TRANSREID = "ViT, overlapping patches, cameras (SIE), jigsaw branch, convolutional stem (ICS)"
VITS, UPRIGHT = "timm, DINO, DINOv2 ViT; TransReID-SSL on LUPerson", "ViT, also with ICS"
CLIP_REID = "CLIP ViT, both features, overlapping patches, cameras (SIE)"
BLOCK = "blocks.0.attn.qkv."
# Looked through in this order.
LAYOUTS = (
    Layout("DCAC's authors", ("encoder.image_encoder.",), "CLIP ViT, BNNeck", ("dcac", "")),
    Layout(
        "CLIP-ReID",
        ("image_encoder.transformer.", "image_encoder.conv1.", "bottleneck_proj."),
        CLIP_REID,
        ("clip_reid", "read"),
    ),
    Layout(FAST_REID, ("b1_head.bottleneck.", "b1.", "backbone."), PARTS, ("fastreid", "mgn")),
    Layout(FAST_REID, ("backbone.conv1.", "heads."), PARTS, ("fastreid", "baseline")),
    Layout(
        "reid-strong-baseline",
        ("base.layer1.0.conv1.", "base.conv1."),
        "ResNet, also IBN-a; BNNeck",
        ("resnet", "strong_baseline"),
    ),
    Layout("TransReID, TransReID-SSL", (f"base.{BLOCK}", "base.patch_embed.proj."), TRANSREID, ("vit", "transreid")),
    Layout("SOLIDER", ("base.stages.", "base.patch_embed.projection."), "Swin", ("swin", "solider")),
    Layout("SOLIDER", ("backbone.stages.", "backbone.patch_embed.projection."), "Swin", ("swin", "solider")),
    Layout("SOLIDER", ("stages.0.blocks.", "patch_embed.projection."), "Swin", ("swin", "solider")),
    Layout(OSNETS, ("conv2.0.conv2a.", "conv1.conv."), "OSNet of any width", ("osnet", "read")),
    Layout(OSNETS, ("conv2.0.conv2.0.", "conv1.conv."), "OSNet of any width", ("osnet", "read")),
    Layout("OpenAI's CLIP, OpenCLIP", ("visual.conv1.weight", "visual.proj"), "CLIP ViT, no text", ("clip", "read")),
    Layout(RESNETS, ("encoder_q.layer1.", "encoder_q.conv1."), "ResNet, last stride 1", ("resnet", "moco")),
    Layout(RESNETS, ("base_encoder.layer1.", "base_encoder.conv1."), "ResNet, last stride 1", ("resnet", "moco")),
    Layout(BASELINES, ("classifier.", "layer1.0.conv1.", "conv1."), "ResNet, its stride", ("resnet", "torchreid")),
    Layout(
        BASELINES,
        ("classifier.add_block.", "model.layer1.0.conv1."),
        "ResNet, its stride",
        ("resnet", "baseline_pytorch"),
    ),
    Layout(RESNETS, ("layer1.0.conv1.", "conv1.weight"), "ResNet, last stride 1", ("resnet", "plain")),
    Layout("timm, Microsoft Swin", (f"layers.0.{BLOCK}", "patch_embed.proj."), "Swin", ("swin", "plain")),
    Layout(VITS, (f"backbone.{BLOCK}", "backbone.cls_token"), UPRIGHT, ("vit", "dino")),
    Layout(VITS, (BLOCK, "cls_token", "patch_embed.proj."), UPRIGHT, ("vit", "plain")),
)
# What Lightning and other trainers put before all names.
WRAPPED = ("model.", "net.", "network.", "module.")
# Layouts that are refused by name: (what stands before a name, why).
REFUSED = (
    ("image_encoder.layer1.", "CLIP-ReID with CLIP's ResNet as image encoder"),
    ("visual.layer1.", "CLIP's ResNet as image encoder"),
    ("visual.trunk.", "an image encoder of timm inside OpenCLIP"),
)


def table():
    """The README's table of what loads: each kind once, with the first mark of each of its layouts."""
    rows = {}
    for layout in LAYOUTS:
        rows.setdefault((layout.title, layout.gives), []).append(f"`{layout.marks[0]}`")
    lines = ["| weights of | recognised by | becomes |", "|---|---|---|"]
    return "\n".join(lines + [f"| {title} | {' '.join(marks)} | {gives} |" for (title, gives), marks in rows.items()])


def layout_of(names, path):
    """The layout of a file by the names of its tensors; ValueError if none is known."""
    for layout in LAYOUTS:
        if layout.fits(names):
            return layout
    for prefix, what in REFUSED:
        if any(name.startswith(prefix) for name in names):
            raise ValueError(f"{str(path)!r} is {what}: this layout is not supported")
    first = ", ".join(list(names)[:5]) or "no tensors"
    known = ", ".join(dict.fromkeys(layout.title for layout in LAYOUTS))
    raise ValueError(
        f"{str(path)!r} has a layout that is not known: its first names are {first}. Known are {known}; and folders "
        "of transformers"
    )


def tensors_of(path):
    """({name: tensor}, layout) of a file, where no layout fits without a word of WRAPPED before all names."""
    tensors = read_tensors(path)
    while tensors and not any(layout.fits(tensors) for layout in LAYOUTS):
        word = next((word for word in WRAPPED if all(name.startswith(word) for name in tensors)), None)
        if word is None:
            break
        tensors = {name.removeprefix(word): tensor for name, tensor in tensors.items()}
    return tensors, layout_of(tensors, path)


def check_weights(path):
    """ValueError unless a file has a layout that is known."""
    tensors_of(path)


def open_weights(model_class, name_or_path, image_size=None, **options):
    """A model of `model_class` (ReIDModel) from a file of weights, or from a folder or repository of timm."""
    path, timm = weights_of(name_or_path)
    if any(str(name).removeprefix("module.").startswith("encoder.image_encoder.") for name in read_content(path)):
        if options:
            raise ValueError(f"{str(path)!r} is a file of DCAC's authors, which takes no {', '.join(options)}")
        model = model_class.from_dcac_checkpoint(path, image_size)
        model.notes = [f"{Path(path).name}: weights of DCAC's authors"]
        return model
    tensors, layout = tensors_of(path)
    file, function = layout.reader
    read = getattr(importlib.import_module(f"utils.modeling.importers.{file}"), function)
    try:
        imported = read(Tensors(tensors, path, layout.title), image_size and tuple(image_size), **options)
    except TypeError as error:
        if options and "unexpected keyword" in str(error):
            raise ValueError(f"{str(path)!r} is {layout.title}, which takes no {', '.join(options)}") from error
        raise
    model = built(model_class, imported, path, timm)
    model.notes = [f"{Path(path).name}: weights of {layout.title}", *imported.notes]
    return model


def built(model_class, imported, path, preprocessing):
    """The model with the tensors of a file; ValueError unless they are exactly those of its architecture."""
    config = imported.config
    network = model_class_of(config.model_type)(config) if config.model_type not in MODELS else None
    backbone = (
        wrap(network, imported.image_size, None) if network else backbone_from_config(config, imported.image_size)
    )
    backbone.preprocessing = imported.preprocessing | preprocessing
    state = imported.network
    if config.model_type == "clip_vision_model":
        state = square_positions(backbone, state)
    model = model_class(backbone, method=imported.method, head_options=imported.head_options, **backbone.preprocessing)
    state = {f"backbone.model.{name}": value for name, value in state.items()} | (imported.head or {})
    expected = model.state_dict()
    if imported.method == "bot" and not imported.head:
        state |= {name: value for name, value in expected.items() if name.startswith("bnneck.")}
    wrong = [f"{name} is missing" for name in expected if name not in state]
    wrong += [f"{name} is not part of it" for name in state if name not in expected]
    wrong += [
        f"{name} has shape {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if wrong:
        raise ValueError(f"the tensors of {str(path)!r} do not fit together: {'; '.join(wrong[:3])}")
    model.load_state_dict({name: value.to(expected[name].dtype) for name, value in state.items()})
    return model.eval()


def weights_of(name_or_path):
    """(file, preprocessing that lies beside it): a file, or a folder or Hub repository of timm."""
    path = Path(name_or_path)
    if path.is_file():
        return path, {}
    try:
        wanted = ["config.json", "model.safetensors"]
        folder = path if path.is_dir() else Path(snapshot_download(str(name_or_path), allow_patterns=wanted))
        entries = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # The Hub's client raises its own error classes and those of its HTTP library.
    except Exception as error:
        raise ValueError(f"no weights at {str(name_or_path)!r}: {error}") from error
    if not (folder / "model.safetensors").is_file():
        raise ValueError(f"{str(name_or_path)!r} has no model.safetensors; only such weights of timm are read")
    architecture = str(entries.get("architecture", ""))
    if architecture.startswith(("resnetaa", "resnetblur")):
        raise ValueError(
            f"{str(name_or_path)!r} is {architecture}: a ResNet that blurs before its strides is not known"
        )
    entries = entries.get("pretrained_cfg", entries)
    preprocessing = {f"image_{key}": tuple(entries[key]) for key in ("mean", "std") if key in entries}
    if entries.get("interpolation") in ("bilinear", "bicubic"):
        preprocessing["resample"] = entries["interpolation"]
    return folder / "model.safetensors", preprocessing

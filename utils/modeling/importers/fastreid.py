"""fast-reid on ResNets: BoT, AGW, SBS and MGN. Images are RGB in 0..255 there, so mean and deviation are divided."""

import re

import torch

from utils.modeling.importers.imported import IMAGENET_BICUBIC, Imported
from utils.modeling.importers.resnet import read_network

SIZE, LARGE_SIZE = (256, 128), (384, 128)
# fast-reid's names of MGN's heads, in the order of its feature, which is that of GranularHead.
MGN_HEADS = ("b1", "b2", "b3", "b21", "b22", "b31", "b32", "b33")
UNKNOWN_PARTS = {
    "heads.bnneck.": "the head of a fast-reid before 1.0, whose network differs",
    "heads.cls_layer.": "a classifier layer with weights of its own",
}


def preprocessing_of(tensors):
    mean, std = tensors.pop("pixel_mean", None), tensors.pop("pixel_std", None)
    if mean is None or std is None:
        return IMAGENET_BICUBIC
    in_255 = float(std.max()) > 2
    mean, std = (tuple((value.flatten().double() / (255 if in_255 else 1)).tolist()) for value in (mean, std))
    return {"image_mean": mean, "image_std": std, "resample": "bicubic"}


def take_head(tensors, old, neck, pooling):
    """(options, state, notes) of one of its heads: pooling, convolution to fewer channels, BatchNorm."""
    state, options = {}, {}
    power = tensors.pop(f"{old}pool_layer.p", None)
    if power is not None:
        state[f"{pooling}power"] = power.reshape(1)
    first = f"{old}bottleneck.0.weight"
    if first not in tensors:
        tensors.refuse(f"{first} is missing: a head without BNNeck, which is not supported")
    number = 0
    if tensors[first].dim() == 4:
        weight = tensors.take(first)
        state[f"{neck}linear.weight"], options["embedding"], number = weight[:, :, 0, 0], len(weight), 1
    state |= tensors.take_norm(f"{old}bottleneck.{number}.", f"{neck}norm.")
    notes = tensors.drop_classifier(f"{old}weight", f"{old}classifier.weight")
    return options, state, notes


def baseline(tensors, image_size):
    """BoT: mean, BNNeck. AGW: non-local blocks, generalised mean. SBS: the same, its power learned, larger images."""
    tensors.refuse_parts(UNKNOWN_PARTS)
    preprocessing = preprocessing_of(tensors)
    config, network = read_network(tensors, prefix="backbone.", ceil_pooling=True)
    options, head, notes = take_head(tensors, "heads.", "head.neck.", "head.pooling.")
    tensors.done()
    learned = "head.pooling.power" in head
    if learned or config.non_local:
        options["pooling"] = "gem"
        # AGW's power is fixed at 3 and is not in the file.
        head.setdefault("head.pooling.power", torch.tensor([3.0]))
    name = "SBS" if learned or options.get("embedding") else "AGW" if config.non_local else "BoT"
    if name == "AGW":
        notes.append("the power of its pooling is not in the file: 3, as in AGW")
    size = image_size or (LARGE_SIZE if name == "SBS" else SIZE)
    notes.insert(0, f"fast-reid {name}{' on IBN-a' if config.ibn else ''}; images of {size[0]} x {size[1]}")
    if name == "BoT" and not options:
        head = {new_name(key): value for key, value in head.items()}
        return Imported(config, size, preprocessing, network, "bot", None, head, tuple(notes))
    return Imported(config, size, preprocessing, network, "embedding", options, head, tuple(notes))


def new_name(name):
    return name.replace("head.neck.norm.", "bnneck.")


def mgn(tensors, image_size):
    """MGN: a stem in one Sequential, then three branches with the rest of stage 3 and stage 4."""
    preprocessing = preprocessing_of(tensors)
    head, notes = {}, []
    for number, name in enumerate(MGN_HEADS):
        options, state, notes = take_head(
            tensors, f"{name}_head.", f"head.necks.{number}.", f"head.poolings.{number}."
        )
        if f"head.poolings.{number}.power" not in state or "embedding" not in options:
            tensors.refuse(f"{name}_head has no learned pooling power or no reduction, so its pooling is not known")
        head |= state
    branches = []
    for branch in ("b1.", "b2.", "b3."):
        renamed = {whole_name(name, branch): name for name in tensors if name.startswith((branch, "backbone."))}
        names = {new: tensors[old] for new, old in renamed.items()}
        part = type(tensors)(names, tensors.path, tensors.layout)
        config, network = read_network(part, ceil_pooling=True)
        part.done()
        branches.append(network)
        tensors.drop(branch)
    tensors.drop("backbone.")
    tensors.done()
    for number, network in enumerate(branches[1:]):
        head |= tail_names(network, config, f"head.branches.{number}.")
    size = image_size or LARGE_SIZE
    notes.insert(0, f"fast-reid MGN{' on IBN-a' if config.ibn else ''}; images of {size[0]} x {size[1]}")
    return Imported(config, size, preprocessing, branches[0], "granular", options, head, tuple(notes))


def whole_name(name, branch):
    """MGN's names as those of one ResNet: `backbone.6` is stage 3's first block, `b1.0` the others, `b1.1` stage 4."""
    stem = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3.0"}
    if match := re.match(r"backbone\.(\d)\.(.*)", name):
        return f"{stem.get(match[1], name)}.{match[2]}"
    part, rest = name.removeprefix(branch).split(".", 1)
    if part == "1":
        return f"layer4.{rest}"
    block, rest = rest.split(".", 1)
    return f"layer3.{int(block) + 1}.{rest}"


def tail_names(network, config, new):
    """The tensors of a branch under the names of `tail`: a Sequential of blocks, then stage 4."""
    state = {}
    last = config.depths[2] - 1
    for name, value in network.items():
        if match := re.match(r"encoder\.stages\.2\.layers\.(\d+)\.(.*)", name):
            if int(match[1]):
                state[f"{new}{int(match[1]) - 1}.{match[2]}"] = value
        elif name.startswith("encoder.stages.3."):
            state[f"{new}{last}.{name.removeprefix('encoder.stages.3.')}"] = value
    return state

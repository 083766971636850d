"""torchreid's OSNet and OSNet-IBN, of any width."""

import re

from utils.modeling.importers.imported import IMAGENET_BILINEAR, Imported
from utils.modeling.importers.resnet import take_linear_and_norm
from utils.modeling.networks.osnet import OSNetConfig

# torchreid's names of a block's parts, and ours.
CONV_NORMS = {"conv1": "reduce", "conv3": "expand", "downsample": "shortcut"}
STREAMS = {"conv2a": 0, "conv2b": 1, "conv2c": 2, "conv2d": 3}


def read(tensors, image_size):
    if any(re.match(r"conv\d\.\d\.conv2\.\d\.layers\.", name) for name in tensors):
        tensors.refuse("it is an OSNet-AIN, whose blocks differ; OSNet and OSNet-IBN load")
    notes = tensors.drop_classifier("classifier.weight")
    head, method, options = {}, "bot", None
    if "fc.0.weight" in tensors:
        head, method = take_linear_and_norm(tensors, "fc."), "embedding"
        options = {"embedding": len(head["head.neck.linear.weight"]), "bias": True, "relu": True}
    instance_norm = "conv1.bn.running_mean" not in tensors
    depths = [
        len({match[1] for name in tensors if (match := re.match(rf"conv{stage}\.(\d+)\.gate\.", name))})
        for stage in (2, 3, 4)
    ]
    state = take_conv(tensors, "conv1.", "stem.", instance_norm)
    for stage, depth in zip((2, 3, 4), depths, strict=True):
        for block in range(depth):
            old, new = f"conv{stage}.{block}.", f"stages.{stage - 2}.{block}."
            for theirs, ours in CONV_NORMS.items():
                if theirs != "downsample" or f"{old}downsample.conv.weight" in tensors:
                    state |= take_conv(tensors, f"{old}{theirs}.", f"{new}{ours}.")
            for theirs, number in STREAMS.items():
                for place in range(number + 1):
                    # The first stream is a single layer, not a sequence of one.
                    layer = f"{old}{theirs}." if number == 0 else f"{old}{theirs}.{place}."
                    light = f"{new}streams.{number}.{place}."
                    state[f"{light}across.weight"] = tensors.take(f"{layer}conv1.weight")
                    state[f"{light}within.weight"] = tensors.take(f"{layer}conv2.weight")
                    state |= tensors.take_norm(f"{layer}bn.", f"{light}norm.")
            for theirs, ours in (("fc1", "down"), ("fc2", "up")):
                for kind in ("weight", "bias"):
                    state[f"{new}gate.{ours}.{kind}"] = tensors.take(f"{old}gate.{theirs}.{kind}")
            if instance_norm and stage == 2:
                state |= {f"{new}norm.{kind}": tensors.take(f"{old}IN.{kind}") for kind in ("weight", "bias")}
        if stage < 4:
            state |= take_conv(tensors, f"conv{stage}.{depth}.0.", f"stages.{stage - 2}.{depth}.")
    state |= take_conv(tensors, "conv5.", "last.")
    tensors.done()
    widths = [len(state[f"stages.{stage}.0.expand.conv.weight"]) for stage in range(3)]
    config = OSNetConfig(
        channels=[len(state["stem.conv.weight"]), *widths], depths=depths, instance_norm=instance_norm
    )
    size = image_size or (256, 128)
    return Imported(config, size, IMAGENET_BILINEAR, state, method, options, head, tuple(notes))


def take_conv(tensors, old, new, instance_norm=False):
    state = {f"{new}conv.weight": tensors.take(f"{old}conv.weight")}
    if instance_norm:
        return state | {f"{new}norm.{kind}": tensors.take(f"{old}bn.{kind}") for kind in ("weight", "bias")}
    return state | tensors.take_norm(f"{old}bn.", f"{new}norm.")

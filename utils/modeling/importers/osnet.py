"""torchreid's OSNet, OSNet-IBN and OSNet-AIN, of any width."""

import re

from utils.modeling.importers.imported import IMAGENET_BILINEAR, Imported, Tensors
from utils.modeling.importers.resnet import take_linear_and_norm
from utils.modeling.networks.osnet import OSNetConfig

STREAMS = ("conv2a", "conv2b", "conv2c", "conv2d")


def read(tensors, image_size):
    notes = tensors.drop_classifier("classifier.weight")
    head, method, options = {}, "bot", None
    if "fc.0.weight" in tensors:
        head, method = take_linear_and_norm(tensors, "fc."), "embedding"
        options = {"embedding": len(head["head.neck.linear.weight"]), "bias": True, "relu": True}
    instance_norm = "conv1.bn.running_mean" not in tensors
    # OSNet-AIN's streams are a list with layers in each, and its instance norms stand inside some of the blocks.
    ain = "conv2.0.conv2.0.layers.0.conv1.weight" in tensors
    depths = [
        len({match[1] for name in tensors if (match := re.match(rf"conv{stage}\.(\d+)\.gate\.", name))})
        for stage in (2, 3, 4)
    ]
    inside = [
        [ain and f"conv{stage}.{block}.IN.weight" in tensors for block in range(depth)]
        for stage, depth in zip((2, 3, 4), depths, strict=True)
    ]
    state = take_conv(tensors, "conv1.", "stem.", instance_norm)
    for stage, norms in zip((2, 3, 4), inside, strict=True):
        for block, norm in enumerate(norms):
            after = instance_norm and not ain and stage == 2
            state |= take_block(tensors, f"conv{stage}.{block}.", f"stages.{stage - 2}.{block}.", ain, norm, after)
        if stage < 4:
            old = f"pool{stage}.0." if ain else f"conv{stage}.{len(norms)}.0."
            state |= take_conv(tensors, old, f"stages.{stage - 2}.{len(norms)}.")
    state |= take_conv(tensors, "conv5.", "last.")
    tensors.done()
    widths = [len(state[f"stages.{stage}.0.expand.conv.weight"]) for stage in range(3)]
    config = OSNetConfig(
        channels=[len(state["stem.conv.weight"]), *widths],
        depths=depths,
        instance_norm=instance_norm,
        inner_norms=inside if ain else None,
    )
    size = image_size or (256, 128)
    return Imported(config, size, IMAGENET_BILINEAR, state, method, options, head, tuple(notes))


def take_block(tensors, old, new, ain, norm_inside, norm_after):
    state = take_conv(tensors, f"{old}conv1.", f"{new}reduce.")
    for number, name in enumerate(STREAMS):
        for place in range(number + 1):
            layer = f"{old}conv2.{number}.layers.{place}." if ain else f"{old}{name}.{place}."
            # OSNet's first stream is a single layer, not a sequence of one.
            layer = f"{old}{name}." if not ain and number == 0 else layer
            light = f"{new}streams.{number}.{place}."
            state[f"{light}across.weight"] = tensors.take(f"{layer}conv1.weight")
            state[f"{light}within.weight"] = tensors.take(f"{layer}conv2.weight")
            state |= tensors.take_norm(f"{layer}bn.", f"{light}norm.")
    for theirs, ours in (("fc1", "down"), ("fc2", "up")):
        state |= take_values(tensors, f"{old}gate.{theirs}.", f"{new}gate.{ours}.")
    if norm_inside:
        state[f"{new}expand.conv.weight"] = tensors.take(f"{old}conv3.conv.weight")
        state |= take_values(tensors, f"{old}IN.", f"{new}expand.norm.")
    else:
        state |= take_conv(tensors, f"{old}conv3.", f"{new}expand.")
    if f"{old}downsample.conv.weight" in tensors:
        state |= take_conv(tensors, f"{old}downsample.", f"{new}shortcut.")
    return state | (take_values(tensors, f"{old}IN.", f"{new}norm.") if norm_after else {})


def take_conv(tensors, old, new, instance_norm=False):
    """A convolution and its norm."""
    state = {f"{new}conv.weight": tensors.take(f"{old}conv.weight")}
    take_norm = take_values if instance_norm else Tensors.take_norm
    return state | take_norm(tensors, f"{old}bn.", f"{new}norm.")


def take_values(tensors, old, new):
    """A weight and a bias."""
    return {f"{new}{kind}": tensors.take(f"{old}{kind}") for kind in ("weight", "bias")}

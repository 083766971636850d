"""ResNets under torchvision's names: torchvision, timm, LUPerson's MoCo, torchreid, two baselines, fast-reid's."""

import re

from transformers import ResNetConfig

from utils.modeling.importers.imported import IMAGENET_BICUBIC, IMAGENET_BILINEAR, Imported
from utils.modeling.networks.resnet import ResNetVariantConfig

UNKNOWN_PARTS = {
    ".se.": "squeeze-and-excitation blocks",
    "conv1.0.": "a deep stem of three convolutions",
    ".conv2.0.": "split convolutions",
    "attnpool.": "CLIP's attention pooling",
}


def read_network(tensors, *, prefix="", **options):
    """(configuration, state) of a ResNet; takes its tensors, and non-local blocks and IBN-a norms where they are."""
    tensors.refuse_parts(UNKNOWN_PARTS)
    blocks = [re.match(rf"{re.escape(prefix)}layer(\d)\.(\d+)\.conv1\.weight$", name) for name in tensors]
    blocks = sorted((int(match[1]), int(match[2])) for match in blocks if match)
    depths = [sum(stage == number for stage, _ in blocks) for number in range(1, 5)]
    if min(depths) < 1 or blocks != [(n + 1, b) for n, depth in enumerate(depths) for b in range(depth)]:
        tensors.refuse(f"its stages have the blocks {blocks}, so some are missing")
    if tensors.shape_of(f"{prefix}conv1.weight")[1:] != (3, 7, 7):
        tensors.refuse(f"its first convolution is {tensors.shape_of(f'{prefix}conv1.weight')}, not 7 x 7 on RGB")
    bottleneck = f"{prefix}layer1.0.conv3.weight" in tensors
    last = 3 if bottleneck else 2
    widths = [tensors.shape_of(f"{prefix}layer{stage}.0.conv{last}.weight")[0] for stage in range(1, 5)]
    for stage, width in enumerate(widths, start=1):
        inner = tensors.shape_of(f"{prefix}layer{stage}.0.conv2.weight")
        if inner[0] != inner[1] and stage == 1 or (bottleneck and inner[:2] != (width // 4, width // 4)):
            tensors.refuse(
                f"layer{stage}.0.conv2.weight is {inner}: a ResNeXt or a wide ResNet, which is not supported"
            )
    non_local = [inner_widths(tensors, prefix, stage) for stage in range(1, 5)]
    ibn = f"{prefix}layer1.0.bn1.IN.weight" in tensors

    state = {"embedder.embedder.convolution.weight": tensors.take(f"{prefix}conv1.weight")}
    state |= tensors.take_norm(f"{prefix}bn1.", "embedder.embedder.normalization.")
    for stage, block in blocks:
        old, new = f"{prefix}layer{stage}.{block}.", f"encoder.stages.{stage - 1}.layers.{block}."
        first = depths[stage - 1] - len(non_local[stage - 1])
        if block >= first:
            state |= read_non_local(tensors, f"{prefix}NL_{stage}.{block - first}.", f"{new}1.")
            new = f"{new}0."
        for number in range(1, last + 1):
            layer = f"{new}layer.{number - 1}."
            state[f"{layer}convolution.weight"] = tensors.take(f"{old}conv{number}.weight")
            if ibn and number == 1 and stage < 4:
                for name in ("weight", "bias"):
                    state[f"{layer}normalization.instance.{name}"] = tensors.take(f"{old}bn1.IN.{name}")
                tensors.drop(f"{old}bn1.IN.")
                state |= tensors.take_norm(f"{old}bn1.BN.", f"{layer}normalization.batch.")
            else:
                state |= tensors.take_norm(f"{old}bn{number}.", f"{layer}normalization.")
        if f"{old}downsample.0.weight" in tensors:
            state[f"{new}shortcut.convolution.weight"] = tensors.take(f"{old}downsample.0.weight")
            state |= tensors.take_norm(f"{old}downsample.1.", f"{new}shortcut.normalization.")
    sizes = {
        "embedding_size": len(state["embedder.embedder.convolution.weight"]),
        "hidden_sizes": widths,
        "depths": depths,
        "layer_type": "bottleneck" if bottleneck else "basic",
    }
    options |= {"ibn": ibn} if ibn else {}
    options |= {"non_local": non_local} if any(non_local) else {}
    return (ResNetVariantConfig(**sizes, **options) if options else ResNetConfig(**sizes)), state


def inner_widths(tensors, prefix, stage):
    """The inner width of each non-local block of a stage."""
    pattern = re.compile(rf"{re.escape(prefix)}NL_{stage}\.(\d+)\.theta\.weight$")
    return [len(tensors[name]) for name in sorted(filter(pattern.match, tensors))]


def read_non_local(tensors, old, new):
    state = {}
    for theirs, ours in {"theta": "theta", "phi": "phi", "g": "g", "W.0": "out"}.items():
        for kind in ("weight", "bias"):
            state[f"{new}{ours}.{kind}"] = tensors.take(f"{old}{theirs}.{kind}")
    return state | tensors.take_norm(f"{old}W.1.", f"{new}norm.")


def plain(tensors, image_size):
    """torchvision, timm and other classifiers, used with the last stride 1, as Re-ID models are."""
    config, state = read_network(tensors)
    notes = tensors.drop_classifier("fc.weight")
    tensors.done()
    notes.append("the last stride is set to 1, as in Re-ID models")
    return Imported(config, image_size or (256, 128), IMAGENET_BILINEAR, state, notes=tuple(notes))


def moco(tensors, image_size):
    """LUPerson and LUPerson-NL: the query encoder of a MoCo checkpoint; its projection is left out."""
    tensors.drop("encoder_k.", "queue", "momentum_encoder.", "predictor.")
    prefix = next(name for name in ("encoder_q.", "base_encoder.") if any(key.startswith(name) for key in tensors))
    others = sorted(name for name in tensors if not name.startswith(prefix))
    for name in others:
        del tensors[name]
    config, state = read_network(tensors, prefix=prefix)
    head = tensors.drop(prefix + "fc.", prefix + "head.", prefix + "projector.", prefix + "classifier.")
    tensors.done()
    notes = [f"the query encoder of a MoCo checkpoint; {head} tensors of its projection are left out"]
    if others:
        notes.append(f"{len(others)} tensors beside the encoder are left out, such as {others[0]}")
    notes.append("the last stride is set to 1, as in Re-ID models")
    return Imported(config, image_size or (256, 128), IMAGENET_BICUBIC, state, notes=tuple(notes))


def torchreid(tensors, image_size):
    """torchreid: the last stride is 2, or 1 where a layer of 512 numbers follows."""
    notes = tensors.drop_classifier("classifier.weight")
    head, options, method = {}, {}, "bot"
    if "fc.0.weight" in tensors:
        head, method = take_linear_and_norm(tensors, "fc."), "embedding"
        options = {"embedding": len(head["head.neck.linear.weight"]), "bias": True, "relu": True}
    stride = {} if method == "embedding" else {"last_stride": 2}
    config, state = read_network(tensors, **stride)
    tensors.done()
    size = image_size or (256, 128)
    return Imported(config, size, IMAGENET_BILINEAR, state, method, options, head, tuple(notes))


def take_linear_and_norm(tensors, prefix):
    """A Linear and a BatchNorm in a Sequential after the pooling."""
    head = {f"head.neck.linear.{kind}": tensors.take(f"{prefix}0.{kind}") for kind in ("weight", "bias")}
    return head | tensors.take_norm(f"{prefix}1.", "head.neck.norm.")


def strong_baseline(tensors, image_size, stem_relu=None):
    """reid-strong-baseline, its features after the BNNeck. Its ResNet has no ReLU after the first norm, IBN-a has one;
    projects built on it differ, and a file does not show it: `stem_relu` overrules this."""
    with_relu = "base.layer1.0.bn1.IN.weight" in tensors if stem_relu is None else stem_relu
    notes = tensors.drop_classifier("classifier.weight")
    tensors.drop("base.fc.")
    config, state = read_network(tensors, prefix="base.", stem_relu=with_relu)
    head = tensors.take_norm("bottleneck.", "bnneck.")
    tensors.done()
    if stem_relu is None:
        what, other = ("a", "no") if with_relu else ("no", "yes")
        notes.append(
            f"{what} ReLU after the first norm, as in reid-strong-baseline; of projects that changed it: "
            f"python -m utils.modeling.convert FILE DIR --stem_relu {other}"
        )
    return Imported(config, image_size or (256, 128), IMAGENET_BILINEAR, state, head=head, notes=tuple(notes))


def baseline_pytorch(tensors, image_size, last_stride=None):
    """Person_reID_baseline_pytorch: Linear and BatchNorm after the mean, or the norm alone. The last stride is 2, if
    its training had no --stride 1; a file does not show it."""
    tensors.drop("model.fc.")
    notes = tensors.drop_classifier("classifier.classifier.0.weight")
    options, block = {}, "classifier.add_block."
    if f"{block}1.weight" in tensors:
        head = take_linear_and_norm(tensors, block)
        options = {"embedding": len(head["head.neck.linear.bias"]), "bias": True}
    else:
        head = tensors.take_norm(f"{block}0.", "head.neck.norm.")
    config, state = read_network(tensors, prefix="model.", last_stride=last_stride or 2)
    tensors.done()
    if last_stride is None:
        notes.append(
            "last stride 2; of a training with --stride 1: python -m utils.modeling.convert FILE DIR --last_stride 1"
        )
    size = image_size or (256, 128)
    return Imported(config, size, IMAGENET_BICUBIC, state, "embedding", options, head, tuple(notes))

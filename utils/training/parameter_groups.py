"""Groups of parameters with rates and weight decays of their own: by layer for pre-training, biases apart."""

import re

# Parameters that are tables of biases or positions, or a class token.
TABLES = ("relative_position_bias_table", "position_embedding", "class_embedding", "cls_token", "class_token")
BLOCKS = re.compile(r"\b(?:stages|layers|layer)\.(\d+)(?:\.(?:layers|blocks)\.(\d+))?")
# Of CLIP and ViT; of SigLIP, whose head pools; of OSNet.
AFTER_ALL_BLOCKS = ("post_layernorm", "visual_projection", "layernorm", "head", "last")


def bias_groups(named_parameters, **of_biases):
    """Two groups, weights and biases, with options for the biases."""
    weights, biases = [], []
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            (biases if name.endswith("bias") else weights).append(parameter)
    return [{"params": weights}, {"params": biases, **of_biases}]


def decays(name, parameter):
    """Whether a parameter has weight decay: weights of layers do; norms, biases and tables of positions do not."""
    return parameter.ndim > 1 and not any(table in name for table in TABLES)


def block_sizes(names):
    """Number of blocks in each stage of a backbone, from its parameter names; a stage without blocks counts as one."""
    sizes = {}
    for name in names:
        if match := BLOCKS.search(name):
            stage, block = int(match[1]), int(match[2] or 0)
            sizes[stage] = max(sizes.get(stage, 0), block + 1)
    return [sizes[stage] for stage in sorted(sizes)]


def depths(backbone):
    """({parameter name: depth}, depth of what comes after all blocks); what comes before the blocks has depth 0."""
    names = [name for name, _ in backbone.named_parameters()]
    sizes = block_sizes(names)
    last = sum(sizes) + 1
    depth_of = {}
    for name in names:
        match = BLOCKS.search(name)
        if match:
            stage = int(match[1])
            # Layers between two stages belong to the last block of the first one.
            block = int(match[2]) if match[2] is not None else sizes[stage] - 1
            depth_of[name] = sum(sizes[:stage]) + block + 1
        else:
            depth_of[name] = last if any(part in AFTER_ALL_BLOCKS for part in name.split(".")) else 0
    return depth_of, last


def parameter_groups(model, *, learning_rate, weight_decay, layer_decay=1.0):
    """Groups for an optimiser over a model with a `backbone`; parameters outside it have the full rate.

    The rate of each block of the backbone is `layer_decay` times that of the block after it.
    """
    depth, last = depths(model.backbone)
    names = {id(parameter): name for name, parameter in model.backbone.named_parameters()}
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        below = last - depth[names[id(parameter)]] if id(parameter) in names else 0
        key = below if layer_decay != 1 else 0, decays(name, parameter)
        groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": learning_rate * layer_decay**below,
            "weight_decay": weight_decay if decaying else 0.0,
        }
        for (below, decaying), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]

"""Which parameters decay, and how fast each layer learns: the groups of an optimiser."""

import re

# Biases and positions that are stored as tables.
TABLES = ("relative_position_bias_table", "position_embedding", "class_embedding")
BLOCKS = re.compile(r"\b(?:stages|layers|layer)\.(\d+)(?:\.(?:layers|blocks)\.(\d+))?")
AFTER_ALL_BLOCKS = ("post_layernorm", "visual_projection", "layernorm")


def decays(name, parameter):
    """Weights of layers do; norms, biases and tables of positions do not."""
    return parameter.ndim > 1 and not any(table in name for table in TABLES)


def block_sizes(names):
    """Blocks in each stage of a backbone, by its parameter names; a stage without inner blocks is one."""
    found = {}
    for name in names:
        if match := BLOCKS.search(name):
            stage, block = int(match[1]), int(match[2] or 0)
            found[stage] = max(found.get(stage, 0), block + 1)
    return [found[stage] for stage in sorted(found)]


def depths(backbone):
    """({name: depth of its block, from 0 for what comes before the blocks}, depth of what comes after them)."""
    names = [name for name, _ in backbone.named_parameters()]
    sizes = block_sizes(names)
    last = sum(sizes) + 1
    found = {}
    for name in names:
        match = BLOCKS.search(name)
        if match:
            stage = int(match[1])
            # What leads from a stage to the next belongs to its last block.
            block = int(match[2]) if match[2] is not None else sizes[stage] - 1
            found[name] = sum(sizes[:stage]) + block + 1
        else:
            found[name] = last if any(part in AFTER_ALL_BLOCKS for part in name.split(".")) else 0
    return found, last


def parameter_groups(model, *, learning_rate, weight_decay, layer_decay=1.0):
    """Groups for an optimiser over a model with a `backbone`; all else learns at the full rate.

    The rate of a backbone's parameter is `layer_decay` times that of the block after it.
    """
    depth, last = depths(model.backbone)
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        below = last - depth.get(name.removeprefix("backbone."), last) if name.startswith("backbone.") else 0
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

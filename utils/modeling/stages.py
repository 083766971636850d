"""Stages of a backbone: its modules in order, and features of a map before the last one."""

import torch

from utils.modeling.backbones import ClipBackbone, ResNetBackbone, SwinBackbone


def stages_of(backbone, need="this method uses"):
    """The embedding before the blocks, then the stages of blocks; `need` starts the error for other backbones."""
    model = backbone.model
    if isinstance(backbone, ClipBackbone):
        return [backbone.tower.pre_layrnorm, *backbone.tower.encoder.layers]
    if isinstance(backbone, ResNetBackbone):
        return [model.embedder, *model.encoder.stages]
    if isinstance(backbone, SwinBackbone):
        return [model.embeddings, *model.encoder.layers]
    raise ValueError(f"{need} stages of CLIP, ResNet or Swin; this backbone is a {backbone.config.model_type}")


def summary_and_earlier(backbone, images, need="this method uses"):
    """The backbone's features, and features of the last stage but one: (B, C) and (B, C').

    Its map is pooled as the last one is. Of CLIP, whose last map is not pooled, the tokens are averaged.
    """
    seen = []
    # Only for this pass: a copy of the model must not write into this list.
    hook = stages_of(backbone, need)[-2].register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        summary = backbone(images)
    finally:
        hook.remove()
    earlier = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    if earlier.ndim == 3:
        earlier = earlier.transpose(1, 2)[..., None]
    pooled = earlier.mean(dim=(2, 3)) if backbone.pooling is None else backbone.pooling(earlier)
    return summary, pooled


@torch.no_grad()
def widths_of(backbone, need="this method uses"):
    """The widths of both of these features, by a pass with an empty image."""
    was_training = backbone.training
    both = summary_and_earlier(backbone.eval(), torch.zeros(1, 3, *backbone.image_size), need)
    backbone.train(was_training)
    return [side.shape[1] for side in both]


def compile_blocks(backbone, head=None):
    """Compile the blocks of a backbone and of a head of branches.

    Not the backbone as a whole: heads and losses call its parts, SOLIDER changes what is between a Swin's stages, and
    a ResNet recomputes its stages one by one.
    """
    inner = getattr(backbone.model, "vision_model", backbone.model)
    encoder = getattr(inner, "encoder", inner)
    blocks = encoder.layers if isinstance(backbone, SwinBackbone) else getattr(encoder, "stages", [encoder])
    for block in (*blocks, *(getattr(head, "branches", None) or ())):
        block.compile()

"""Where a model looks: attention rollout for CLIP, feature maps for other backbones."""

import torch

from utils.modeling.backbones import ClipBackbone


@torch.no_grad()
def attention_maps(model, images):
    """Where the model looks: (B, h, w) float32 on the grid of its last map, each image's largest value 1.

    CLIP: attention rollout from the class token (attention averaged over heads, mixed half and half with the identity
    matrix for the skip connection, multiplied over the layers). Other backbones with BNNeck: how much each place adds
    to the length of the test feature. This is Grad-CAM of that length in closed form, since mean pooling and BatchNorm
    are linear. With another head, or a class
    token: the length of the feature map at each place.
    """
    was_training = model.training
    model.eval()
    try:
        if isinstance(model.backbone, ClipBackbone):
            heat = attention_rollout(model.backbone, images)
        else:
            # A head may make its map of several of the backbone's.
            maps_of = getattr(model.head, "feature_map", lambda backbone, images: backbone.feature_map(images))
            feature_map = maps_of(model.backbone, images).float()
            if model.head is None and model.backbone.summary == "mean":
                neck = model.bnneck
                bn_features = neck(feature_map.mean(dim=(2, 3)))
                slope = neck.weight * torch.rsqrt(neck.running_var + neck.eps)
                heat = torch.einsum("bc,bchw->bhw", bn_features * slope, feature_map).clamp(min=0)
            else:
                heat = feature_map.norm(dim=1)
    finally:
        model.train(was_training)
    return heat / heat.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)


def attention_rollout(backbone, images):
    layers = backbone.tower.encoder.layers
    weights = []
    hooks = [layer.self_attn.register_forward_hook(lambda *call: weights.append(call[2][1])) for layer in layers]
    usual = backbone.config._attn_implementation
    try:
        # Only the eager implementation returns its attention weights.
        backbone.set_attention("eager")
        backbone.tokens(images)
    finally:
        backbone.set_attention(usual)
        for hook in hooks:
            hook.remove()
    rollout = None
    for weight in weights:
        # [B, heads, T, T] -> [B, T, T], rows sum to 1
        mixed = 0.5 * weight.float().mean(dim=1)
        mixed = mixed + 0.5 * torch.eye(mixed.shape[-1], device=mixed.device)
        rollout = mixed if rollout is None else mixed @ rollout
    # Part tokens may stand between the class token and the patches.
    return rollout[:, 0, -backbone.grid[0] * backbone.grid[1] :].unflatten(1, backbone.grid)

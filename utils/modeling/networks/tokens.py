"""Vision transformers of `transformers`: ViT, DINOv2, DINOv3 and SigLIP, for images of any shape."""

from itertools import chain

from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from utils.modeling.backbones import Backbone

__all__ = [
    "DINOv3ViTConfig", "DINOv3ViTModel", "Dinov2Config", "Dinov2Model", "Dinov2WithRegistersConfig",
    "Dinov2WithRegistersModel", "SiglipVisionConfig", "SiglipVisionModel", "TokenBackbone", "ViTConfig", "ViTModel",
]  # fmt: skip
# Families whose positions are resized to the image only where asked; DINO's models always do it.
RESIZED_IF_ASKED = ("vit", "siglip_vision_model")


class TokenBackbone(Backbone):
    """The class token after the last norm; SigLIP, which has none, gives its attention-pooled feature.

    Position tables are resized to the patch grid of the images, bicubically, in every pass; DINOv3 has none.
    """

    summary = "token"

    def __init__(self, model, image_size):
        config = model.config
        super().__init__(model, image_size, config.hidden_size)
        if config.model_type == "vit":
            # ViTModel has a layer on its class token, which classifiers are saved without.
            model.pooler = None
        for name, parameter in model.named_parameters():
            # It stands for hidden patches in pre-training only; DDP waits for gradients of all that can have one.
            if name.endswith("mask_token"):
                parameter.requires_grad_(False)
        patch = config.patch_size
        self.patch = patch if isinstance(patch, int) else patch[0]
        if min(image_size) < self.patch:
            raise ValueError(f"image_size {self.image_size} is smaller than one patch of {patch} x {patch} pixels")
        first = 0 if config.model_type == "siglip_vision_model" else 1
        self.first_patch = first + getattr(config, "num_register_tokens", 0)
        if first == 0 and not config.vision_use_head:
            raise ValueError("this SigLIP has no pooling head (vision_use_head is false); use one that has")

    def dtype(self):
        """That of the weights; a teacher's are buffers."""
        tensors = chain(self.model.parameters(), self.model.buffers())
        return next(tensor.dtype for tensor in tensors if tensor.is_floating_point())

    def summary_and_map(self, images):
        options = {"interpolate_pos_encoding": True} if self.config.model_type in RESIZED_IF_ASKED else {}
        output = self.model(pixel_values=images.to(self.dtype()), **options)
        tokens = output.last_hidden_state
        grid = images.shape[-2] // self.patch, images.shape[-1] // self.patch
        feature_map = tokens[:, self.first_patch :].transpose(1, 2).unflatten(2, grid)
        # SigLIP's attention pooling stands where others have the class token.
        return tokens[:, 0] if self.first_patch else output.pooler_output, feature_map

    def feature_map(self, images):
        return self.summary_and_map(images)[1]

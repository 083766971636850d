"""CLIP with part tokens, as in MUVA: beside the class token one token for each part of a body, kept apart by masks.

A part token attends to the class token, to itself, and to the patches of its part; a patch attends to all patches,
to the class token, and to the parts that it belongs to. Which patches these are is given, or predicted anew before
each block. The feature is [class | part 1 | part 2 | ...], each after the last norm and the projection.
"""

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from utils.modeling.backbones import ClipBackbone

PARTS = ("head", "upper body", "legs")


class PartTokenConfig(CLIPVisionConfig):
    """`grid`: rows and columns of patches; `mask_heads`: heads of the attention inside a mask predictor."""

    model_type = "part_token_clip"

    grid: list[int] | tuple[int, ...] = (16, 8)
    num_parts: int = len(PARTS)
    mask_heads: int = 2


class MaskPredictor(nn.Module):
    """Logits of the patches of each part, from the input of a block: part tokens look at patches.

    y = parts + attention(LN parts, LN' patches); logits = linear(QuickGELU(linear(LN'' y))): (B, parts, patches). All
    biases start at 0; the authors leave that of the attention's output as torch draws it.
    """

    def __init__(self, width, num_patches, heads, epsilon):
        super().__init__()
        self.heads = heads
        self.norm_parts, self.norm_patches, self.norm = (nn.LayerNorm(width, eps=epsilon) for _ in range(3))
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.hidden, self.logits = nn.Linear(width, num_patches), nn.Linear(num_patches, num_patches)
        for layer in (self.query, self.key, self.value, self.out, self.hidden, self.logits):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, parts, patches):
        seen = self.norm_patches(patches)
        # [B, heads, tokens, width / heads]
        query, key, value = (
            layer(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer, tokens in ((self.query, self.norm_parts(parts)), (self.key, seen), (self.value, seen))
        )
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        hidden = self.hidden(self.norm(parts + self.out(attended.transpose(1, 2).flatten(2))))
        return self.logits(hidden * (1.702 * hidden).sigmoid())


class PartTokenCLIP(CLIPVisionModelWithProjection):
    config_class = PartTokenConfig

    def __init__(self, config):
        super().__init__(config)
        width, (rows, columns) = config.hidden_size, config.grid
        self.part_tokens = nn.Parameter(torch.empty(config.num_parts, width))
        self.part_positions = nn.Parameter(torch.zeros(config.num_parts, width))
        nn.init.trunc_normal_(self.part_tokens, std=0.02)
        sizes = width, rows * columns, config.mask_heads, config.layer_norm_eps
        self.predictors = nn.ModuleList(MaskPredictor(*sizes) for _ in range(config.num_hidden_layers))


class PartTokenBackbone(ClipBackbone):
    """`forward(images)` predicts the masks; `forward(images, masks)` takes them, bool (B, parts, patches)."""

    def __init__(self, model, image_size):
        super().__init__(model, image_size)
        if list(self.grid) != list(model.config.grid):
            rows, columns = model.config.grid
            raise ValueError(
                f"these part tokens were trained on {rows} x {columns} patches, and images of "
                f"{' x '.join(map(str, image_size))} have {' x '.join(map(str, self.grid))}"
            )
        # They have no gradient but from losses of the masks: `on` lets them train.
        model.predictors.requires_grad_(False)
        self.num_parts, self.num_patches = model.config.num_parts, self.grid[0] * self.grid[1]
        self.num_grains = 1 + self.num_parts
        self.num_features = self.num_grains * model.config.projection_dim

    @classmethod
    def on(cls, backbone, mask_heads):
        """On the weights of a CLIP: part tokens and predictors are drawn by torch's global generator."""
        if isinstance(backbone, cls):
            backbone.model.predictors.requires_grad_(True)
            return backbone
        if type(backbone) is not ClipBackbone or not backbone.config.projection_dim:
            raise ValueError(
                f"part tokens stand in a CLIP ViT with a projection, not in a {backbone.config.model_type}: give "
                "--backbone of a whole CLIP"
            )
        if backbone.config.hidden_size % mask_heads:
            raise ValueError(f"--mask_heads {mask_heads} does not divide the width {backbone.config.hidden_size}")
        entries = backbone.config.to_diff_dict()
        for name in ("model_type", "architectures", "transformers_version", "dtype", "_name_or_path"):
            entries.pop(name, None)
        model = PartTokenCLIP(PartTokenConfig(**entries, grid=list(backbone.grid), mask_heads=mask_heads))
        made = cls(model, backbone.image_size)
        model.predictors.requires_grad_(True)
        model.load_state_dict(backbone.model.state_dict(), strict=False)
        with torch.no_grad():
            model.part_positions.copy_(
                made.tower.embeddings.position_embedding.weight[:1].expand_as(model.part_tokens)
            )
        return made

    def embedded(self, images):
        """The input of the first block: class token, part tokens, patches."""
        if images.shape[-2:] != self.image_size:
            raise ValueError(
                f"this model takes images of {self.image_size} (height, width) and got {tuple(images.shape)}; "
                "resize the images"
            )
        embeddings, count = self.tower.embeddings, images.shape[0]
        patches = embeddings.patch_embedding(images.to(embeddings.patch_embedding.weight.dtype))
        positions = embeddings.position_embedding.weight
        parts = (self.model.part_tokens + self.model.part_positions).expand(count, -1, -1)
        class_token = (embeddings.class_embedding + positions[0]).expand(count, 1, -1)
        patches = patches.flatten(2).transpose(1, 2) + positions[1:]
        return self.tower.pre_layrnorm(torch.cat([class_token, parts, patches], dim=1))

    def blocks(self, images, masks=None):
        """(tokens after the last block, logits of the masks of each block: blocks x (B, parts, patches), float32).

        Under given masks nothing is predicted and the list is empty.
        """
        hidden, logits = self.embedded(images), []
        first = self.num_grains
        for layer, predictor in zip(self.tower.encoder.layers, self.model.predictors, strict=True):
            seen = masks
            if masks is None:
                now = predictor(hidden[:, 1:first], hidden[:, first:]).float()
                logits.append(now + logits[-1] if logits else now)
                # Hard: the loss of the masks alone trains the predictors.
                seen = logits[-1].detach().sigmoid() > 0.5
            hidden = layer(hidden, additive(seen, mask_dtype(hidden)))
        return hidden, logits

    def tokens(self, images, masks=None):
        return self.blocks(images, masks)[0]

    def features_of(self, tokens):
        return self.project(tokens[:, : self.num_grains]).flatten(1)

    def forward(self, images, masks=None, with_logits=False):
        """Features; with the logits of the predicted masks (blocks, B, parts, patches) beside them where asked for."""
        tokens, logits = self.blocks(images, masks)
        features = self.features_of(tokens)
        return (features, torch.stack(logits)) if with_logits else features

    def map_of(self, tokens):
        return self.project(tokens[:, self.num_grains :]).transpose(1, 2).unflatten(2, self.grid)

    def feature_map(self, images):
        return self.map_of(self.tokens(images))

    def summary_and_map(self, images):
        tokens = self.tokens(images)
        return self.features_of(tokens), self.map_of(tokens)

    def predicted_masks(self, images):
        """The masks of the last block: bool (B, parts, rows, columns)."""
        return (self.blocks(images)[1][-1].sigmoid() > 0.5).unflatten(2, self.grid)


def additive(masks, dtype):
    """0 where a token may look, -inf elsewhere: (B, parts, patches) -> (B, 1, tokens, tokens).

    The class token and the token itself are open in every row, so that no row is -inf throughout.
    """
    count, num_parts, num_patches = masks.shape
    alone = torch.eye(num_parts, dtype=torch.bool, device=masks.device).expand(count, -1, -1)
    patches = torch.ones(count, num_patches, num_patches, dtype=torch.bool, device=masks.device)
    lower = torch.cat([torch.cat([alone, masks], 2), torch.cat([masks.transpose(1, 2), patches], 2)], 1)
    # A row and a column for the class token.
    visible = nn.functional.pad(lower, (1, 0, 1, 0), value=True)
    closed = torch.zeros(visible.shape, dtype=dtype, device=masks.device).masked_fill(~visible, -torch.inf)
    return closed[:, None]


def mask_dtype(hidden):
    """The type that attention computes in: autocast does not convert its mask."""
    kind = hidden.device.type
    in_half = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if in_half else hidden.dtype

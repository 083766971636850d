"""Networks of other projects written from the names and shapes in their files, small: references for the readers."""

import copy

import torch
import torch.nn.functional as F
from torch import nn


def shaken(model, seed=0):
    """The model with values in which a mistake shows: nothing is left at 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                if name.endswith("running_var"):
                    tensor.copy_(1 + 0.2 * noise.abs())
                elif tensor.dim() <= 1:
                    tensor.add_(0.2 * noise)
                elif any(part in name for part in ("embed", "table", "token")) and "proj" not in name:
                    tensor.add_(0.3 * noise)
    return model.eval()


def images_of(height, width):
    """Two images of few large patches, which differ more in their features than noise does."""
    few = torch.randn(2, 3, 8, 4, generator=torch.Generator().manual_seed(1))
    return F.interpolate(few, (height, width), mode="bicubic")


# TransReID


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.qkv, self.proj, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), width // 64

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).split(x.shape[-1], -1))
        weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = Attention(width), Mlp(width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TransReID(nn.Module):
    """`base`, `bottleneck`, `classifier`; with the jigsaw branch `b1`, `b2` and four more necks.

    Overlapping patches: 16 x 16 pixels every 12 give 21 x 10 of a 256 x 128 image. With the stem of TransReID-SSL,
    patches of 8 x 8 pixels of its maps, 16 x 8 of them.
    """

    def __init__(self, width=128, depth=3, cameras=0, jigsaw=False, num_ids=9, stem=False):
        super().__init__()
        self.base = nn.Module()
        self.base.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.base.pos_embed = nn.Parameter(torch.zeros(1, 1 + (16 * 8 if stem else 21 * 10), width))
        if cameras:
            self.base.sie_embed = nn.Parameter(torch.zeros(cameras, 1, width))
        self.base.patch_embed = nn.Module()
        self.base.patch_embed.proj = nn.Conv2d(64, width, 8, 8) if stem else nn.Conv2d(3, width, 16, 12)
        if stem:
            self.base.patch_embed.conv = nn.Sequential(
                *(nn.Conv2d(3, 64, 7, 2, 3, bias=False), IBN(64), nn.ReLU()),
                *(nn.Conv2d(64, 64, 3, 1, 1, bias=False), IBN(64), nn.ReLU()),
                *(nn.Conv2d(64, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
            )
        self.base.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.base.norm = nn.LayerNorm(width, eps=1e-6)
        self.base.fc = nn.Linear(width, 1000)
        self.bottleneck, self.classifier = nn.BatchNorm1d(width), nn.Linear(width, num_ids, bias=False)
        self.jigsaw = jigsaw
        if jigsaw:
            for name in ("b1", "b2"):
                last = nn.Sequential(copy.deepcopy(self.base.blocks[-1]), copy.deepcopy(self.base.norm))
                setattr(self, name, last)
            for number in range(1, 5):
                setattr(self, f"bottleneck_{number}", nn.BatchNorm1d(width))
                setattr(self, f"classifier_{number}", nn.Linear(width, num_ids, bias=False))

    def forward(self, images, cameras=None):
        x = getattr(self.base.patch_embed, "conv", nn.Identity())(images)
        x = self.base.patch_embed.proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.base.cls_token.expand(len(x), -1, -1), x], 1) + self.base.pos_embed
        if cameras is not None:
            x = x + 3.0 * self.base.sie_embed[cameras]
        if not self.jigsaw:
            for block in self.base.blocks:
                x = block(x)
            return self.base.norm(x)[:, 0]
        for block in self.base.blocks[:-1]:
            x = block(x)
        # Patches from the fifth on, then the first four; then one of the first half, one of the second, and so on.
        order = [*range(5, 211), *range(1, 5)]
        half = len(order) // 2
        order = [place for pair in zip(order[:half], order[half:], strict=True) for place in pair]
        length = 210 // 4
        features = [self.b1(x)[:, 0]]
        for part in range(4):
            places = order[part * length : (part + 1) * length]
            features.append(self.b2(x[:, [0, *places]])[:, 0] / 4)
        return torch.cat(features, 1)


# CLIP-ReID


class ClipBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, width // 64, batch_first=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Module()
        self.mlp.c_fc, self.mlp.c_proj = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        seen = self.ln_1(x)
        x = x + self.attn(seen, seen, seen, need_weights=False)[0]
        hidden = self.mlp.c_fc(self.ln_2(x))
        return x + self.mlp.c_proj(hidden / (1 + torch.exp(-1.702 * hidden)))


class ClipReID(nn.Module):
    """`image_encoder`, two necks and classifiers, prompts and text encoder; a camera's vector for the class token.

    Patches of 16 x 16 pixels of a 256 x 128 image, 16 x 8 of them, or 21 x 10 where they overlap.
    """

    def __init__(self, width=128, depth=3, projection=48, cameras=0, stride=16, num_ids=9, prompts=True):
        super().__init__()
        tower = self.image_encoder = nn.Module()
        tower.conv1 = nn.Conv2d(3, width, 16, stride, bias=False)
        tower.class_embedding = nn.Parameter(torch.zeros(width))
        tower.positional_embedding = nn.Parameter(torch.zeros(1 + {16: 16 * 8, 12: 21 * 10}[stride], width))
        tower.ln_pre, tower.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        tower.transformer = nn.Module()
        tower.transformer.resblocks = nn.ModuleList(ClipBlock(width) for _ in range(depth))
        tower.proj = nn.Parameter(torch.randn(width, projection) / width**0.5)
        self.bottleneck, self.bottleneck_proj = nn.BatchNorm1d(width), nn.BatchNorm1d(projection)
        self.classifier = nn.Linear(width, num_ids, bias=False)
        self.classifier_proj = nn.Linear(projection, num_ids, bias=False)
        if cameras:
            self.cv_embed = nn.Parameter(torch.randn(cameras, width))
        if prompts:
            self.prompt_learner, self.text_encoder = nn.Module(), nn.Module()
            self.prompt_learner.cls_ctx = nn.Parameter(torch.zeros(num_ids, 4, 8))
            self.text_encoder.ln_final = nn.LayerNorm(8)

    def forward(self, images, cameras=None):
        tower = self.image_encoder
        patches = tower.conv1(images).flatten(2).transpose(1, 2)
        first = tower.class_embedding.expand(len(images), -1)
        if cameras is not None:
            first = first + self.cv_embed[cameras]
        x = tower.ln_pre(torch.cat([first[:, None], patches], 1) + tower.positional_embedding)
        for block in tower.transformer.resblocks:
            x = block(x)
        feature = tower.ln_post(x)[:, 0]
        return torch.cat([feature, feature @ tower.proj], 1)


# SOLIDER


class WindowAttention(nn.Module):
    def __init__(self, width, heads, window):
        super().__init__()
        self.w_msa = nn.Module()
        self.w_msa.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.w_msa.register_buffer("relative_position_index", torch.zeros(window**2, window**2, dtype=torch.long))
        self.w_msa.qkv, self.w_msa.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads, self.window = heads, window

    def forward(self, x, shift):
        """(B, h, w, C); written out over all places of the padded map: who sees whom, and at which offset."""
        height, width, channels = x.shape[1:]
        window = self.window
        padded = [-(-side // window) * window for side in (height, width)]
        x = F.pad(x, (0, 0, 0, padded[1] - width, 0, padded[0] - height))
        q, k, v = self.w_msa.qkv(x).flatten(1, 2).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        rolled, region = [], []
        for side in padded:
            at = (torch.arange(side) - shift) % side
            rolled.append(at)
            region.append(at // window * 2 + ((shift > 0) & (torch.arange(side) < shift)).long())
        rows, columns = (values.flatten() for values in torch.meshgrid(*rolled, indexing="ij"))
        group_rows, group_columns = (values.flatten() for values in torch.meshgrid(*region, indexing="ij"))
        same = (group_rows[:, None] == group_rows) & (group_columns[:, None] == group_columns)
        down, right = (values[:, None] - values + window - 1 for values in (rows, columns))
        index = (down * (2 * window - 1) + right).clamp(0, (2 * window - 1) ** 2 - 1)
        bias = self.w_msa.relative_position_bias_table[index].permute(2, 0, 1)
        scores = q @ k.transpose(2, 3) / (channels / self.heads) ** 0.5 + bias
        mixed = scores.masked_fill(~same, float("-inf")).softmax(-1) @ v
        mixed = mixed.transpose(1, 2).flatten(2).unflatten(1, padded)
        return self.w_msa.proj(mixed)[:, :height, :width]


class SwinBlock(nn.Module):
    def __init__(self, width, heads, window):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads, window)
        self.ffn = nn.Module()
        first = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.0))
        self.ffn.layers = nn.Sequential(first, nn.Linear(4 * width, width), nn.Dropout(0.0))

    def forward(self, x, shift):
        x = x + self.attn(self.norm1(x), shift)
        return x + self.ffn.layers(self.norm2(x))


class Merging(nn.Module):
    """mmdetection's: the four neighbours come from `unfold`, channel by channel."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x):
        grid = x.shape[1] // 2, x.shape[2] // 2
        x = F.unfold(x.permute(0, 3, 1, 2), 2, stride=2).transpose(1, 2)
        return self.reduction(self.norm(x)).unflatten(1, grid)


class Solider(nn.Module):
    def __init__(self, semantic=True, reduced=False, width=32, depths=(2, 2), window=7):
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.projection, self.patch_embed.norm = nn.Conv2d(3, width, 4, 4), nn.LayerNorm(width)
        self.stages = nn.ModuleList()
        for number, depth in enumerate(depths):
            stage, wide = nn.Module(), width * 2**number
            stage.blocks = nn.ModuleList(SwinBlock(wide, wide // 16, window) for _ in range(depth))
            if number < len(depths) - 1:
                stage.downsample = Merging(wide)
            self.stages.append(stage)
            setattr(self, f"norm{number}", nn.LayerNorm(wide))
        if semantic:
            last = width * 2 ** (len(depths) - 1)
            for letter in "wb":
                controls = [nn.Linear(2, min(2 * width * 2**number, last)) for number in range(len(depths))]
                setattr(self, f"semantic_embed_{letter}", nn.ModuleList(controls))
        if reduced:
            self.fcneck = nn.Linear(width * 2 ** (len(depths) - 1), 24, bias=False)
        self.semantic, self.reduced = semantic, reduced

    def forward(self, images, weight):
        x = self.patch_embed.norm(self.patch_embed.projection(images).permute(0, 2, 3, 1))
        control = torch.tensor([weight, 1 - weight])
        for number, stage in enumerate(self.stages):
            for place, block in enumerate(stage.blocks):
                x = block(x, 3 if place % 2 else 0)
            if number < len(self.stages) - 1:
                x = stage.downsample(x)
                if self.semantic:
                    scale = F.softplus(self.semantic_embed_w[number](control))
                    x = x * scale + self.semantic_embed_b[number](control)
        x = getattr(self, f"norm{len(self.stages) - 1}")(x).mean(dim=(1, 2))
        return self.fcneck(x) if self.reduced else x


# fast-reid


class IBN(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.IN, self.BN = nn.InstanceNorm2d(channels // 2, affine=True), nn.BatchNorm2d(channels - channels // 2)

    def forward(self, x):
        first, second = x.tensor_split(2, dim=1)
        return torch.cat([self.IN(first), self.BN(second)], 1)


class Bottleneck(nn.Module):
    def __init__(self, inputs, inner, stride=1, ibn=False):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, inner, 1, bias=False), IBN(inner) if ibn else nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, 4 * inner, 1, bias=False), nn.BatchNorm2d(4 * inner)
        if stride != 1 or inputs != 4 * inner:
            conv = nn.Conv2d(inputs, 4 * inner, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(4 * inner))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(out)))))
        return F.relu(out + (self.downsample(x) if hasattr(self, "downsample") else x))


class NonLocal(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.g, self.theta, self.phi = (nn.Conv2d(channels, 1, 1) for _ in range(3))
        self.W = nn.Sequential(nn.Conv2d(1, channels, 1), nn.BatchNorm2d(channels))

    def forward(self, x):
        theta, phi, g = (part(x).flatten(1) for part in (self.theta, self.phi, self.g))
        mixed = torch.einsum("bi,bj,bj->bi", theta, phi, g) / phi.shape[1]
        return x + self.W(mixed.unflatten(1, (1, *x.shape[2:])))


class Pool(nn.Module):
    """Mean (no power), or the generalised mean, whose power is in the file where it is learned."""

    def __init__(self, power=None, learned=False):
        super().__init__()
        self.fixed = power
        if learned:
            self.p = nn.Parameter(torch.tensor([power]))

    def forward(self, x):
        power = getattr(self, "p", self.fixed)
        if power is None:
            return x.mean(dim=(2, 3), keepdim=True)
        return x.clamp(min=1e-6).pow(power).mean(dim=(2, 3), keepdim=True).pow(1 / power)


class NeckHead(nn.Module):
    def __init__(self, channels, embedding, pool, num_ids=9):
        super().__init__()
        self.pool_layer = pool
        convs = [nn.Conv2d(channels, embedding, 1, bias=False)] if embedding else []
        self.bottleneck = nn.Sequential(*convs, nn.BatchNorm2d(embedding or channels))
        self.weight = nn.Parameter(torch.randn(num_ids, embedding or channels))

    def forward(self, x):
        return self.bottleneck(self.pool_layer(x))[..., 0, 0]


class FastReid(nn.Module):
    """bot, agw, sbs: `backbone` and `heads`. mgn: the stem in a Sequential, branches `b1` to `b3`, and eight heads."""

    INNER = (8, 12, 16, 20)
    MGN = ("b1", "b2", "b3", "b21", "b22", "b31", "b32", "b33")

    def __init__(self, kind, ibn=False):
        super().__init__()
        self.kind, channels = kind, 4 * self.INNER[-1]
        stages, inputs = [], 16
        for number, (inner, depth) in enumerate(zip(self.INNER, (1, 2, 3, 1), strict=True)):
            with_ibn = ibn and number < 3
            blocks = [Bottleneck(inputs, inner, 2 if number in (1, 2) else 1, with_ibn)]
            blocks += [Bottleneck(4 * inner, inner, 1, with_ibn) for _ in range(depth - 1)]
            stages.append(nn.Sequential(*blocks))
            inputs = 4 * inner
        conv, norm = nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16)
        pooling = nn.MaxPool2d(3, 2, ceil_mode=True)
        if kind == "mgn":
            self.backbone = nn.Sequential(conv, norm, nn.ReLU(), pooling, stages[0], stages[1], stages[2][0])
            rest = nn.Sequential(*list(stages[2])[1:])
            for name in ("b1", "b2", "b3"):
                setattr(self, name, nn.Sequential(copy.deepcopy(rest), copy.deepcopy(stages[3])))
            for name in self.MGN:
                setattr(self, f"{name}_head", NeckHead(channels, 12, Pool(3.0, learned=True)))
            return
        self.backbone = nn.Module()
        self.backbone.conv1, self.backbone.bn1, self.pooling = conv, norm, [pooling]
        for number, stage in enumerate(stages, start=1):
            setattr(self.backbone, f"layer{number}", stage)
        if kind in ("agw", "sbs"):
            # After the last block of stages 2 and 3.
            self.backbone.NL_2, self.backbone.NL_3 = (
                nn.ModuleList([NonLocal(4 * inner)]) for inner in self.INNER[1:3]
            )
        pool = {"bot": Pool(), "agw": Pool(3.0), "sbs": Pool(3.0, learned=True)}[kind]
        self.heads = NeckHead(channels, 0, pool)

    def forward(self, images):
        if self.kind == "mgn":
            x = self.backbone(images)
            whole, two, three = (branch(x) for branch in (self.b1, self.b2, self.b3))
            parts = [whole, two, three, *two.chunk(2, 2), *three.chunk(3, 2)]
            heads = (getattr(self, f"{name}_head") for name in self.MGN)
            return torch.cat([head(part) for head, part in zip(heads, parts, strict=True)], 1)
        net = self.backbone
        x = net.layer1(self.pooling[0](F.relu(net.bn1(net.conv1(images)))))
        x = net.layer2(x)
        x = net.NL_2[0](x) if hasattr(net, "NL_2") else x
        x = net.layer3(x)
        x = net.NL_3[0](x) if hasattr(net, "NL_3") else x
        return self.heads(net.layer4(x))


# torchreid's OSNet


class OSLayer(nn.Module):
    def __init__(self, inputs, outputs, size=1, stride=1, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
        self.bn = norm(outputs)

    def forward(self, x):
        return self.bn(self.conv(x))


class OSLight(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, groups=width, bias=False)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x):
        return F.relu(self.bn(self.conv2(self.conv1(x))))


def affine_instance_norm(channels):
    return nn.InstanceNorm2d(channels, affine=True)


class OSBlock(nn.Module):
    """`norm`: None, "after" the sum with the shortcut (IBN), or "inside", before it and without a batch norm (AIN)."""

    def __init__(self, inputs, outputs, norm, listed):
        super().__init__()
        inner = outputs // 4
        self.conv1, self.norm = OSLayer(inputs, inner), norm
        streams = [nn.Sequential(*(OSLight(inner) for _ in range(depth))) for depth in (1, 2, 3, 4)]
        if listed:
            self.conv2 = nn.ModuleList(nn.Module() for _ in streams)
            for stream, layers in zip(self.conv2, streams, strict=True):
                stream.layers = layers
        else:
            self.conv2a, self.conv2b, self.conv2c, self.conv2d = streams[0][0], *streams[1:]
        self.gate = nn.Module()
        self.gate.fc1, self.gate.fc2 = nn.Conv2d(inner, inner // 16, 1), nn.Conv2d(inner // 16, inner, 1)
        self.conv3 = OSLayer(inner, outputs, norm=lambda _: None) if norm == "inside" else OSLayer(inner, outputs)
        if inputs != outputs:
            self.downsample = OSLayer(inputs, outputs)
        if norm:
            self.IN = affine_instance_norm(outputs)

    def forward(self, x):
        first, mixed = F.relu(self.conv1(x)), 0
        if hasattr(self, "conv2"):
            streams = [stream.layers for stream in self.conv2]
        else:
            streams = [self.conv2a, self.conv2b, self.conv2c, self.conv2d]
        for stream in streams:
            seen = stream(first)
            mixed = mixed + seen * self.gate.fc2(F.relu(self.gate.fc1(F.adaptive_avg_pool2d(seen, 1)))).sigmoid()
        out = self.IN(self.conv3.conv(mixed)) if self.norm == "inside" else self.conv3(mixed)
        out = out + (self.downsample(x) if hasattr(self, "downsample") else x)
        return F.relu(self.IN(out) if self.norm == "after" else out)


class OSNet(nn.Module):
    """`conv1` to `conv5`, `fc` and `classifier`. `kind`: "plain", or with instance norms "ibn" and "ain"."""

    def __init__(self, kind, embedding=24, widths=(16, 64, 96, 128), num_ids=9):
        super().__init__()
        none, after, inside = [None, None], ["after", "after"], ["inside", "inside"]
        norms = {
            "plain": [none, none, none],
            "ibn": [after, none, none],
            "ain": [inside, [None, "inside"], ["inside", None]],
        }[kind]
        self.conv1 = OSLayer(3, widths[0], 7, 2, nn.BatchNorm2d if kind == "plain" else affine_instance_norm)
        for number, stage_norms in enumerate(norms):
            wide, blocks = widths[number + 1], []
            for norm in stage_norms:
                blocks.append(OSBlock(wide if blocks else widths[number], wide, norm, listed=kind == "ain"))
            pool = nn.Sequential(OSLayer(wide, wide), nn.ReLU(), nn.AvgPool2d(2))
            if number < 2 and kind == "ain":
                setattr(self, f"pool{number + 2}", pool)
            elif number < 2:
                blocks.append(pool)
            setattr(self, f"conv{number + 2}", nn.Sequential(*blocks))
        self.conv5 = OSLayer(widths[-1], widths[-1])
        if embedding:
            self.fc = nn.Sequential(nn.Linear(widths[-1], embedding), nn.BatchNorm1d(embedding), nn.ReLU())
        self.classifier = nn.Linear(embedding or widths[-1], num_ids)

    def forward(self, images):
        x = F.max_pool2d(F.relu(self.conv1(images)), 3, 2, 1)
        for stage in (2, 3, 4):
            x = getattr(self, f"conv{stage}")(x)
            x = getattr(self, f"pool{stage}", nn.Identity())(x)
        x = F.relu(self.conv5(x)).mean(dim=(2, 3))
        return self.fc(x) if hasattr(self, "fc") else x

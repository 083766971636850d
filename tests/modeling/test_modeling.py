"""ReIDModel: architectures, counts, numbers against independent references, saving, loading, refusing."""

import json
import math
import os
import pickle
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    SwinConfig,
    SwinForImageClassification,
    SwinModel,
)

from tests.modeling.test_heads import REAL, trainable
from utils.modeling import backbones, reid_model
from utils.modeling import folder as model_folder
from utils.modeling.attention import attention_maps
from utils.modeling.backbones import backbone_from_config, resize_position_table
from utils.modeling.reid_model import ReIDModel
from utils.modeling.stages import compile_blocks

SIZE = (48, 32)
FAMILIES = ["clip", "resnet", "swin"]


def tiny_config(family):
    if family == "clip":
        return CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
            projection_dim=20,
        )
    if family == "resnet":
        return ResNetConfig(embedding_size=8, hidden_sizes=[16, 24, 32], depths=[1, 2, 1])
    return SwinConfig(
        image_size=32, patch_size=4, embed_dim=12, depths=[2, 2], num_heads=[2, 3], window_size=4, drop_path_rate=0.0
    )


def tiny_model(family, num_ids=5, seed=0, size=SIZE, **options):
    torch.manual_seed(seed)
    model = ReIDModel(backbone_from_config(tiny_config(family), size), num_ids, **options)
    with torch.no_grad():
        # Trained-looking values: nothing left at 0 or 1, where a mistake would not show.
        for name, tensor in model.named_parameters():
            if tensor.dim() == 1 and not name.startswith("bnneck"):
                tensor.add_(0.1 * torch.randn_like(tensor))
        model.bnneck.weight.uniform_(0.5, 1.5)
        model.bnneck.running_mean.normal_(std=0.1)
        model.bnneck.running_var.uniform_(0.5, 2.0)
    return model


def people(count, size=SIZE, seed=1):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def same_state(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


# Sizes of the real architectures


def test_vit_b16_counts():
    config = REAL["clip-b16"]
    with torch.device("meta"):
        backbone = backbone_from_config(config, (256, 128))
        model = ReIDModel(backbone, 751)
        features = backbone(torch.empty(2, 3, 256, 128))
        feature_map = backbone.feature_map(torch.empty(2, 3, 256, 128))
        with FlopCounterMode(display=False) as counter:
            model.eval()(torch.empty(64, 3, 256, 128))
    assert trainable(backbone) == 85_550_592
    assert trainable(model) == 85_935_616
    assert backbone.tower.embeddings.position_embedding.weight.shape == (129, 768)
    assert features.shape == (2, 512) and feature_map.shape == (2, 512, 16, 8)
    assert round(counter.get_total_flops() / 1e12, 2) == 1.45


@pytest.mark.parametrize(
    "config, parameters, shape",
    [
        (ResNetConfig(), 23_508_032, (2048, 16, 8)),
        (SwinConfig(embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24]), 27_519_354, (768, 8, 4)),
        (SwinConfig(embed_dim=96, depths=[2, 2, 18, 2], num_heads=[3, 6, 12, 24]), 48_837_258, (768, 8, 4)),
        (SwinConfig(embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32]), 86_743_224, (1024, 8, 4)),
    ],
    ids=["resnet-50", "swin-t", "swin-s", "swin-b"],
)
def test_resnet_and_swin_counts(config, parameters, shape):
    with torch.device("meta"):
        backbone = backbone_from_config(config, (256, 128))
        images = torch.empty(2, 3, 256, 128)
        assert backbone.feature_map(images).shape == (2, *shape)
        assert backbone(images).shape == (2, shape[0])
    assert trainable(backbone) == parameters
    assert backbone.num_features == shape[0]


# CLIP


def clip_reference(images, state, heads, eps=1e-5):
    """The image encoder written down from OpenAI's definition; `state` has OpenAI's names."""
    width = state["conv1.weight"].shape[0]
    x = F.conv2d(images, state["conv1.weight"], stride=state["conv1.weight"].shape[-1]).flatten(2).transpose(1, 2)
    x = torch.cat([state["class_embedding"].expand(len(x), 1, width), x], dim=1) + state["positional_embedding"]
    x = F.layer_norm(x, (width,), state["ln_pre.weight"], state["ln_pre.bias"], eps)
    block = 0
    while f"transformer.resblocks.{block}.ln_1.weight" in state:
        layer = {
            name.removeprefix(f"transformer.resblocks.{block}."): value
            for name, value in state.items()
            if name.startswith(f"transformer.resblocks.{block}.")
        }
        y = F.layer_norm(x, (width,), layer["ln_1.weight"], layer["ln_1.bias"], eps)
        q, k, v = F.linear(y, layer["attn.in_proj_weight"], layer["attn.in_proj_bias"]).split(width, dim=-1)
        q, k, v = (part.unflatten(-1, (heads, width // heads)).transpose(1, 2) for part in (q, k, v))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(width // heads)).softmax(-1)
        y = (weights @ v).transpose(1, 2).flatten(2)
        x = x + F.linear(y, layer["attn.out_proj.weight"], layer["attn.out_proj.bias"])
        y = F.layer_norm(x, (width,), layer["ln_2.weight"], layer["ln_2.bias"], eps)
        y = F.linear(y, layer["mlp.c_fc.weight"], layer["mlp.c_fc.bias"])
        y = y * torch.sigmoid(1.702 * y)
        x = x + F.linear(y, layer["mlp.c_proj.weight"], layer["mlp.c_proj.bias"])
        block += 1
    return F.layer_norm(x, (width,), state["ln_post.weight"], state["ln_post.bias"], eps) @ state["proj"]


def dcac_state(width=128, depth=2, grid=(6, 3), patch=8, projection=24, num_ids=7, seed=0):
    """A checkpoint as DCAC's authors write them, with random values."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, std=0.05, mean=0.0):
        return mean + std * torch.randn(*shape, generator=generator)

    encoder = {
        "class_embedding": normal(width),
        "positional_embedding": normal(1 + grid[0] * grid[1], width),
        "proj": normal(width, projection),
        "conv1.weight": normal(width, 3, patch, patch),
    }
    for norm in ("ln_pre", "ln_post"):
        encoder |= {f"{norm}.weight": normal(width, mean=1.0), f"{norm}.bias": normal(width)}
    for block in range(depth):
        for name, value in {
            "attn.in_proj_weight": normal(3 * width, width),
            "attn.in_proj_bias": normal(3 * width),
            "attn.out_proj.weight": normal(width, width),
            "attn.out_proj.bias": normal(width),
            "ln_1.weight": normal(width, mean=1.0),
            "ln_1.bias": normal(width),
            "mlp.c_fc.weight": normal(4 * width, width),
            "mlp.c_fc.bias": normal(4 * width),
            "mlp.c_proj.weight": normal(width, 4 * width),
            "mlp.c_proj.bias": normal(width),
            "ln_2.weight": normal(width, mean=1.0),
            "ln_2.bias": normal(width),
        }.items():
            encoder[f"transformer.resblocks.{block}.{name}"] = value
    state = {f"encoder.image_encoder.{name}": value for name, value in encoder.items()}
    return encoder, state | {
        "encoder.bnneck.weight": normal(projection, mean=1.0),
        "encoder.bnneck.bias": torch.zeros(projection),
        "encoder.bnneck.running_mean": normal(projection),
        "encoder.bnneck.running_var": normal(projection).abs() + 0.5,
        "encoder.bnneck.num_batches_tracked": torch.tensor(11),
        "encoder.fc.weight": normal(num_ids, projection),
        "denoiser.model.prompt_emb.prompt_emb": normal(num_ids, 768),
        "denoiser.model.unet.conv_in.weight": normal(4, 4),
    }


def test_square_clip_equals_transformers(tmp_path):
    torch.manual_seed(0)
    theirs = CLIPVisionModelWithProjection(tiny_config("clip")).eval()
    theirs.save_pretrained(tmp_path)
    ours = ReIDModel.from_backbone(tmp_path, image_size=(32, 32))
    images = people(3, (32, 32))
    torch.testing.assert_close(ours.backbone(images), theirs(images).image_embeds)


def bilinear(table, height, width):
    """Half-pixel bilinear resizing of an (h, w, C) table, one value at a time."""
    rows, columns, _ = table.shape
    out = torch.empty(height, width, table.shape[2])
    for i in range(height):
        for j in range(width):
            y = min(max((i + 0.5) * rows / height - 0.5, 0), rows - 1)
            x = min(max((j + 0.5) * columns / width - 0.5, 0), columns - 1)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
            upper = table[top, left] * (1 - (x - left)) + table[top, right] * (x - left)
            lower = table[bottom, left] * (1 - (x - left)) + table[bottom, right] * (x - left)
            out[i, j] = upper * (1 - (y - top)) + lower * (y - top)
    return out


@pytest.mark.parametrize("grid", [(16, 8), (7, 3), (1, 1), (14, 14)])
def test_position_table_is_resized_bilinearly(grid):
    table = torch.randn(1 + 14 * 14, 5)
    resized = resize_position_table(table, (14, 14), grid)
    assert resized.shape == (1 + grid[0] * grid[1], 5)
    assert torch.equal(resized[0], table[0])
    want = bilinear(table[1:].reshape(14, 14, 5), *grid)
    torch.testing.assert_close(resized[1:].reshape(*grid, 5), want, rtol=1e-5, atol=1e-6)


def test_from_backbone_resizes_positions_and_keeps_every_other_weight(tmp_path):
    torch.manual_seed(0)
    theirs = CLIPVisionModelWithProjection(tiny_config("clip"))
    theirs.half().save_pretrained(tmp_path)
    # 50 is no multiple of the patch: the rest is cut off, as the convolution does.
    model = ReIDModel.from_backbone(tmp_path, num_ids=3, image_size=(50, 16))
    ours, name = model.backbone.model.state_dict(), "vision_model.embeddings.position_embedding.weight"
    for key, value in theirs.state_dict().items():
        assert ours[key].dtype == torch.float32
        if key == name:
            assert ours[key].shape == (1 + 6 * 2, 32)
            want = bilinear(value[1:].float().reshape(4, 4, 32), 6, 2).reshape(12, 32)
            torch.testing.assert_close(ours[key][1:], want)
        else:
            assert torch.equal(ours[key], value.float()), key
    assert model(people(2, (50, 16))).shape == (2, 20)


def test_patch_projection_is_frozen_and_the_rest_learns():
    model = tiny_model("clip").train()
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["backbone.model.vision_model.embeddings.patch_embedding.weight", "bnneck.bias"]
    output = model(people(4))
    F.cross_entropy(output.logits, torch.arange(4)).backward()
    assert all(
        (parameter.grad is not None and parameter.grad.abs().sum() > 0) == parameter.requires_grad
        for name, parameter in model.named_parameters()
        # A shift of all keys changes no attention, so their bias has no gradient to speak of.
        if not name.endswith("k_proj.bias")
    )


@pytest.mark.parametrize("layout", ["whole", "projected", "bare", "bare, prefixed", "bare, prefixed, unnamed"])
def test_every_layout_of_clip_on_disk(tmp_path, layout):
    torch.manual_seed(0)
    config = tiny_config("clip")
    if layout == "whole":
        text = CLIPTextConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
        )
        # The width of the projection is the parent's to say; the tower's own entry is wrong on purpose.
        model = CLIPModel(CLIPConfig(vision_config=config.to_dict(), text_config=text.to_dict(), projection_dim=24))
        model = model.eval()
        want = model.visual_projection(model.vision_model(people(2, (32, 32))).pooler_output)
    elif layout == "projected":
        model = CLIPVisionModelWithProjection(config).eval()
        want = model(people(2, (32, 32))).image_embeds
    else:
        model = CLIPVisionModel(config).eval()
        want = model(people(2, (32, 32))).pooler_output
    model.save_pretrained(tmp_path)
    if "unnamed" in layout:
        config = json.loads((tmp_path / "config.json").read_text())
        del config["architectures"]
        (tmp_path / "config.json").write_text(json.dumps(config))
    if "prefixed" in layout:
        weights = load_file(tmp_path / "model.safetensors")
        weights = {f"vision_model.{name.removeprefix('vision_model.')}": value for name, value in weights.items()}
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours = ReIDModel.from_backbone(tmp_path, image_size=(32, 32), num_ids=4)
    assert ours.num_features == want.shape[1] == {"whole": 24, "projected": 20}.get(layout, 32)
    torch.testing.assert_close(ours.backbone(people(2, (32, 32))), want)
    # The same tower through our own folder.
    ours.save_pretrained(tmp_path / "reid")
    assert same_state(ReIDModel.from_pretrained(tmp_path / "reid"), ours)


# ResNet and Swin


@pytest.mark.parametrize("layer_type, in_bottleneck", [("bottleneck", False), ("bottleneck", True), ("basic", False)])
def test_resnet_without_the_last_stride(tmp_path, layer_type, in_bottleneck):
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[16, 24, 32],
        depths=[1, 2, 1],
        layer_type=layer_type,
        downsample_in_bottleneck=in_bottleneck,
    )
    theirs = ResNetForImageClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = ReIDModel.from_backbone(tmp_path, image_size=(64, 32))
    images = people(2, (64, 32))
    feature_map = ours.backbone.feature_map(images)
    assert feature_map.shape == (2, 32, 8, 4)
    if layer_type == "bottleneck" and not in_bottleneck:
        # The stride in the last but one convolution only drops every second place.
        torch.testing.assert_close(feature_map[:, :, ::2, ::2], theirs.resnet(images).last_hidden_state)
    torch.testing.assert_close(ours.backbone(images), feature_map.flatten(2).sum(2) / 32)


@pytest.mark.parametrize("size", [(32, 32), (64, 32), (32, 64)])
def test_swin_equals_transformers_where_it_runs(tmp_path, size):
    """Maps of whole windows, the last as narrow as one window: no padding, no shift in the last stage."""
    torch.manual_seed(0)
    theirs = SwinForImageClassification(tiny_config("swin")).eval()
    for block in theirs.swin.encoder.layers.modules():
        if hasattr(block, "relative_position_bias_table"):
            torch.nn.init.normal_(block.relative_position_bias_table)
    theirs.save_pretrained(tmp_path)
    ours = ReIDModel.from_backbone(tmp_path, image_size=size)
    want = theirs.swin(images := people(2, size))
    got = ours.backbone.feature_map(images)
    assert got.shape == (2, 24, size[0] // 8, size[1] // 8)
    torch.testing.assert_close(got.flatten(2).transpose(1, 2), want.last_hidden_state)
    torch.testing.assert_close(ours.backbone(images), want.pooler_output)


def swin_block_reference(block, hidden, window, shift):
    """One Swin block on an (h, w, C) map, place by place: who sees whom follows from the windows after the shift."""
    height, width, channels = hidden.shape
    attention, heads = block.attention, block.attention.num_attention_heads
    padded = [-(-size // window) * window for size in (height, width)]
    x = F.pad(block.layernorm_before(hidden), (0, 0, 0, padded[1] - width, 0, padded[0] - height))
    q, k, v = (
        linear(x).reshape(-1, heads, channels // heads).transpose(0, 1)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    places = [(i, j) for i in range(padded[0]) for j in range(padded[1])]
    scores = q @ k.transpose(1, 2) / math.sqrt(channels // heads)
    table = attention.relative_position_bias.relative_position_bias_table
    bias = torch.full_like(scores, -math.inf)

    def window_of(place):
        # Rolled by the shift, what wraps around the edge is a region of its own.
        return [
            ((at - shift) % size // window, shift > 0 and at < shift) for at, size in zip(place, padded, strict=True)
        ]

    for a, first in enumerate(places):
        for b, second in enumerate(places):
            if window_of(first) == window_of(second):
                # Inside a rolled window coordinates count from the roll.
                down = (first[0] - shift) % padded[0] - (second[0] - shift) % padded[0]
                right = (first[1] - shift) % padded[1] - (second[1] - shift) % padded[1]
                bias[:, a, b] = table[(down + window - 1) * (2 * window - 1) + right + window - 1]
    y = ((scores + bias).softmax(-1) @ v).transpose(0, 1).reshape(*padded, channels)
    hidden = hidden + attention.o_proj(y[:height, :width])
    return hidden + block.mlp(block.layernorm_after(hidden))


@pytest.mark.parametrize("size", [(56, 24), (50, 30), (24, 8)])
def test_swin_on_maps_that_are_no_whole_windows(size):
    """Where SwinModel fails: narrower than a window, odd, padded. Against attention written out place by place."""
    model = tiny_model("swin", size=size).eval()
    for module in model.modules():
        if hasattr(module, "relative_position_bias_table"):
            torch.nn.init.normal_(module.relative_position_bias_table)
    images = people(1, size)
    with torch.no_grad():
        hidden, grid = model.backbone.model.embeddings(images)
        assert grid == (math.ceil(size[0] / 4), math.ceil(size[1] / 4))
        hidden = hidden[0].unflatten(0, grid)
        for stage in model.backbone.model.encoder.layers:
            one_window = max(grid) <= 4 or min(grid) == 4
            for number, block in enumerate(stage.blocks):
                hidden = swin_block_reference(block, hidden, 4, 0 if one_window or number % 2 == 0 else 2)
            if stage.downsample is not None:
                hidden = stage.downsample(hidden.flatten(0, 1)[None], grid)[0]
                grid = (math.ceil(grid[0] / 2), math.ceil(grid[1] / 2))
                hidden = hidden.unflatten(0, grid)
        want = model.backbone.model.layernorm(hidden).permute(2, 0, 1)
        torch.testing.assert_close(model.backbone.feature_map(images)[0], want, rtol=1e-4, atol=1e-5)


# The neck and what the model returns


@pytest.mark.parametrize("family", FAMILIES)
def test_training_output_and_test_features(family):
    model = tiny_model(family, num_ids=5)
    images = people(4)
    running_mean, running_var = model.bnneck.running_mean.clone(), model.bnneck.running_var.clone()
    output = model.train()(images)
    # The same batch once more, so that a ResNet's own BatchNorm sees the same statistics.
    features = model.backbone(images).double()
    torch.testing.assert_close(output.features.double(), features)
    mean, var = features.mean(0), features.var(0, unbiased=False)
    want = (features - mean) / (var + 1e-5).sqrt() * model.bnneck.weight.double()
    torch.testing.assert_close(output.bn_features.double(), want, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(output.logits, output.bn_features @ model.classifier.weight.T)
    torch.testing.assert_close(
        model.bnneck.running_mean.double(), 0.9 * running_mean.double() + 0.1 * mean, rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        model.bnneck.running_var.double(),
        0.9 * running_var.double() + 0.1 * features.var(0, unbiased=True),
        rtol=1e-5,
        atol=1e-6,
    )

    model.eval()
    features = model.backbone(images).double()
    neck = model.bnneck
    want = (features - neck.running_mean) / (neck.running_var + 1e-5).sqrt() * neck.weight
    want = want / want.norm(dim=1, keepdim=True)
    got = model(images)
    assert got.dtype == torch.float32 and got.shape == (4, model.num_features)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)


def test_classifier_and_neck_as_published():
    torch.manual_seed(0)
    model = ReIDModel(backbone_from_config(tiny_config("clip"), SIZE), 5000)
    assert model.classifier.bias is None and model.classifier.weight.shape == (5000, 20)
    assert abs(model.classifier.weight.mean()) < 2e-5
    assert abs(model.classifier.weight.std() / 0.001 - 1) < 0.01
    assert not model.bnneck.bias.requires_grad and not model.bnneck.bias.any()
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    F.cross_entropy(model.train()(people(4)).logits, torch.arange(4)).backward()
    optimizer.step()
    assert not model.bnneck.bias.any()


@pytest.mark.parametrize("num_ids", [0, None])
def test_without_classifier(num_ids):
    model = tiny_model("clip", num_ids=num_ids)
    assert model.classifier is None and model.num_ids == 0
    assert model.train()(people(2)).logits is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_neck_stays_in_float32(dtype):
    model = tiny_model("clip")
    statistics = {name: tensor.clone() for name, tensor in model.bnneck.state_dict().items()}
    model.to(dtype)
    assert model.backbone.tower.post_layernorm.weight.dtype == dtype
    assert all(torch.equal(statistics[name], tensor) for name, tensor in model.bnneck.state_dict().items())
    # Squares of these overflow float16 and are coarse in bfloat16.
    features = (3000 + 100 * torch.randn(64, 20)).to(dtype)
    model.bnneck.weight.data.fill_(1)
    got, logits = model.train().neck(features)
    exact = features.double()
    want = (exact - exact.mean(0)) / (exact.var(0, unbiased=False) + 1e-5).sqrt()
    assert got.dtype == torch.float32 and logits.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3)
    features = model.eval()(people(3))
    assert features.dtype == torch.float32
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast(family):
    model = tiny_model(family).train()
    images = people(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(images)
        loss = F.cross_entropy(output.logits, torch.arange(6) % 5)
    loss.backward()
    assert output.bn_features.dtype == torch.float32
    bn = output.bn_features / model.bnneck.weight
    torch.testing.assert_close(bn.mean(0), torch.zeros_like(bn[0]), atol=1e-4, rtol=0)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    exact = model.eval()(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(images)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough.norm(dim=1), torch.ones(6), rtol=1e-6, atol=1e-6)
    assert F.cosine_similarity(exact, rough).min() > 0.99


def test_images_the_model_cannot_take():
    model = tiny_model("clip").eval()
    with pytest.raises(ValueError, match=r"\(48, 32\).*\(1, 3, 32, 48\)"):
        model(people(1, (32, 48)))
    with pytest.raises(ValueError, match="uint8"):
        model(torch.zeros(1, 3, *SIZE, dtype=torch.uint8))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_nothing(family):
    plain, saving = tiny_model(family).train(), tiny_model(family).train()
    saving.enable_gradient_checkpointing()
    kept = []
    for model in (plain, saving):
        count = 0

        def pack(tensor):
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = F.cross_entropy(model(people(4)).logits, torch.arange(4))
        loss.backward()
        kept.append(count)
    assert kept[1] < 0.7 * kept[0]
    for (name, first), (_, second) in zip(plain.named_parameters(), saving.named_parameters(), strict=True):
        if first.requires_grad:
            torch.testing.assert_close(first.grad, second.grad, rtol=1e-4, atol=1e-7, msg=name)
    # BatchNorm averages too: the recomputed forward must not count twice.
    assert same_state(plain, saving)


@pytest.mark.parametrize("sync", [False, True])
def test_recomputed_norms_count_once(sync):
    """A SyncBatchNorm, as several GPUs have them, wants a counter while it recomputes."""
    model = tiny_model("resnet").train()
    if sync:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.enable_gradient_checkpointing()
    model(people(4)).logits.sum().backward()
    counts = [value for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")]
    assert len(counts) > 5 and all(int(count) == 1 for count in counts)


@pytest.mark.parametrize("family", ["resnet", "swin", "clip"])
def test_what_compiles_is_what_is_called(family):
    """Each block of a ResNet, also where it is recomputed, and of a Swin; of a CLIP its encoder."""
    plain, compiled = tiny_model(family).train(), tiny_model(family).train()
    for model in (plain, compiled):
        model.enable_gradient_checkpointing()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with pytest.MonkeyPatch.context() as patch:
        compile_module = torch.nn.Module.compile
        patch.setattr(torch.nn.Module, "compile", lambda self: compile_module(self, backend=backend))
        # A whole ResNet compiles by its stages too.
        compiled.backbone.compile() if family == "resnet" else compile_blocks(compiled.backbone, compiled.head)
    images = people(4)
    for model in (plain, compiled):
        model(images).logits.square().sum().backward()
    assert len(graphs) >= {"resnet": 4, "swin": 2, "clip": 1}[family]
    for first, second in zip(plain.parameters(), compiled.parameters(), strict=True):
        if first.grad is not None:
            torch.testing.assert_close(first.grad, second.grad, rtol=1e-4, atol=1e-6)


def test_attention_implementation_is_passed_on(tmp_path):
    tiny_model("clip", size=(32, 32)).backbone.save_pretrained(tmp_path)
    eager = ReIDModel.from_backbone(tmp_path, image_size=SIZE, attn_implementation="eager")
    usual = ReIDModel.from_backbone(tmp_path, image_size=SIZE)
    assert eager.backbone.tower.encoder.layers[0].self_attn.config._attn_implementation == "eager"
    assert usual.backbone.tower.encoder.layers[0].self_attn.config._attn_implementation == "sdpa"
    torch.testing.assert_close(eager(people(2)), usual(people(2)))
    eager.save_pretrained(tmp_path / "reid")
    for implementation in ("eager", "sdpa"):
        again = ReIDModel.from_pretrained(tmp_path / "reid", attn_implementation=implementation)
        assert again.backbone.tower.encoder.layers[0].self_attn.config._attn_implementation == implementation
    with pytest.raises(ValueError, match="nonsense"):
        ReIDModel.from_backbone(tmp_path, attn_implementation="nonsense")


@pytest.mark.parametrize("family", FAMILIES)
def test_export_with_any_batch_size(family):
    model = tiny_model(family).eval()
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (people(2),), dynamic_shapes=({0: batch},)).module()
    for count in (1, 2, 5):
        torch.testing.assert_close(program(people(count)), model(people(count)), rtol=1e-4, atol=1e-5)


# Where the model looks


def test_attention_rollout_against_its_definition():
    model = tiny_model("clip")
    encoder, images = model.backbone.tower.encoder, people(2)
    before = model.eval()(images)
    model.train()
    heat = attention_maps(model, images)
    assert model.training
    assert torch.equal(model.eval()(images), before)
    assert encoder.layers[0].self_attn.config._attn_implementation == "sdpa"

    inputs = []
    hooks = [layer.layer_norm1.register_forward_hook(lambda *call: inputs.append(call[2])) for layer in encoder.layers]
    model.backbone.tokens(images)
    for hook in hooks:
        hook.remove()
    rollout = torch.eye(25).expand(2, 25, 25)
    for layer, x in zip(encoder.layers, inputs, strict=True):
        q, k = (
            linear(x).unflatten(-1, (2, 16)).transpose(1, 2)
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj)
        )
        attention = (q @ k.transpose(-1, -2) / 4).softmax(-1).mean(1)
        rollout = (attention + torch.eye(25)) / 2 @ rollout
    want = rollout[:, 0, 1:].reshape(2, 6, 4)
    torch.testing.assert_close(heat, want / want.amax(dim=(1, 2), keepdim=True), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["resnet", "swin"])
def test_heat_is_grad_cam_of_the_feature_length(family):
    model, images = tiny_model(family).eval(), people(3)
    heat = attention_maps(model, images)
    feature_map = model.backbone.feature_map(images).detach().requires_grad_()
    model.bnneck(feature_map.mean(dim=(2, 3))).norm(dim=1).sum().backward()
    weights = feature_map.grad.sum(dim=(2, 3), keepdim=True)
    want = (weights * feature_map.detach()).sum(1).clamp(min=0)
    assert heat.shape == want.shape == (3, *feature_map.shape[2:])
    torch.testing.assert_close(heat, want / want.amax(dim=(1, 2), keepdim=True), rtol=1e-4, atol=1e-5)


# Saving and loading


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_round_trip_is_exact(tmp_path, family, dtype):
    model = (
        tiny_model(family, image_mean=(0.1, 0.2, 0.3), image_std=(0.4, 0.5, 0.6), resample="bicubic").to(dtype).eval()
    )
    model.save_pretrained(tmp_path / "model")
    again = ReIDModel.from_pretrained(tmp_path / "model")
    assert same_state(model, again)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in again.parameters()]
    assert torch.equal(model(people(2)), again(people(2)))
    assert (again.image_size, again.image_mean, again.image_std, again.resample, again.num_ids) == (
        SIZE,
        (0.1, 0.2, 0.3),
        (0.4, 0.5, 0.6),
        "bicubic",
        5,
    )
    again.save_pretrained(tmp_path / "again")
    for name in model_folder.FILES:
        assert (tmp_path / "model" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    assert sorted(os.listdir(tmp_path / "model")) == sorted(model_folder.FILES)


def test_written_files(tmp_path):
    tiny_model("resnet").save_pretrained(tmp_path)
    preprocessor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert preprocessor["size"] == {"height": 48, "width": 32}
    assert preprocessor["image_mean"] == [0.485, 0.456, 0.406]
    assert preprocessor["image_std"] == [0.229, 0.224, 0.225]
    # Pillow's number of bilinear
    assert preprocessor["resample"] == 2
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["backbone"]["model_type"] == "resnet" and config["num_ids"] == 5
    assert str(tmp_path) not in (tmp_path / "config.json").read_text()
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\n") and "48 x 32" in card and "32 numbers" in card and "Made with" not in card
    tiny_model("clip").save_pretrained(tmp_path, card="# Mine")
    assert (tmp_path / "README.md").read_text() == "# Mine"
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["image_mean"] == [0.5, 0.5, 0.5]


def test_the_card_of_a_folder_opens_in_transformers(tmp_path):
    from transformers import AutoImageProcessor

    tiny_model("clip").save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    pixels = processor(torch.full((3, 96, 64), 255, dtype=torch.uint8), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(torch.as_tensor(pixels), torch.ones(1, 3, 48, 32))


def test_another_number_of_identities(tmp_path):
    model = tiny_model("clip", num_ids=5)
    model.save_pretrained(tmp_path)
    assert torch.equal(ReIDModel.from_pretrained(tmp_path, num_ids=5).classifier.weight, model.classifier.weight)
    without = ReIDModel.from_pretrained(tmp_path, num_ids=0)
    assert without.classifier is None and without.num_ids == 0
    assert torch.equal(without(people(2)), model.eval()(people(2)))
    more = ReIDModel.from_pretrained(tmp_path, num_ids=9)
    assert more.classifier.weight.shape == (9, 20) and more.num_ids == 9
    without.save_pretrained(tmp_path)
    assert ReIDModel.from_pretrained(tmp_path).num_ids == 0


def test_loading_into_another_precision(tmp_path):
    model = tiny_model("clip")
    model.save_pretrained(tmp_path)
    half = ReIDModel.from_pretrained(tmp_path, dtype=torch.float16)
    assert half.classifier.weight.dtype == torch.float16 and half.bnneck.weight.dtype == torch.float32
    assert same_state(half, model.half())


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_backbone_folder(tmp_path, family):
    """What transformers itself reads again: ResNet and Swin exactly, CLIP with its positions back on the square."""
    model = tiny_model(family, size=(32, 32))
    model.backbone.save_pretrained(tmp_path)
    again = ReIDModel.from_backbone(tmp_path, image_size=(32, 32))
    assert same_state(again.backbone, model.backbone)
    theirs = {"clip": CLIPVisionModelWithProjection, "resnet": ResNetModel, "swin": SwinModel}[family]
    theirs, report = theirs.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tiny_model(family).backbone.save_pretrained(tmp_path)
    assert ReIDModel.from_backbone(tmp_path, image_size=SIZE)(people(2)).shape == (2, model.num_features)


class Killed(BaseException):
    pass


def test_a_kill_at_any_moment_leaves_one_whole_model(tmp_path, monkeypatch):
    """The old and the new model differ in shape, so that a mixture of their files could not be opened."""
    old, new = tiny_model("clip", num_ids=5).eval(), tiny_model("resnet", num_ids=3, seed=4).eval()
    steps = [(os, "replace"), (model_folder.Path, "rename"), (model_folder.Path, "rmdir"), (os, "fsync")]
    steps += [(model_folder.Path, "write_text"), (model_folder, "save_file"), (model_folder.tempfile, "mkdtemp")]
    seen, outcomes = 1, []
    while seen:
        folder = tmp_path / str(len(outcomes))
        old.save_pretrained(folder)
        calls = 0
        with monkeypatch.context() as patch:

            def watched(original):
                def call(*args, **options):
                    nonlocal calls
                    calls += 1
                    if calls > len(outcomes):
                        raise Killed
                    return original(*args, **options)

                return call

            for owner, name in steps:
                patch.setattr(owner, name, watched(getattr(owner, name)))
            try:
                new.save_pretrained(folder)
                seen = 0
            except Killed:
                seen = calls
        found = ReIDModel.from_pretrained(folder)
        outcomes.append("new" if same_state(found, new) else "old")
        assert same_state(found, new) or same_state(found, old)
        # The next save clears up after the killed one.
        new.save_pretrained(folder)
        assert sorted(os.listdir(folder)) == sorted(model_folder.FILES)
        assert same_state(ReIDModel.from_pretrained(folder), new)
    assert len(outcomes) > 12 and outcomes[0] == "old" and outcomes[-1] == "new"


def test_saving_leaves_other_files_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    tiny_model("clip").save_pretrained(tmp_path)
    tiny_model("clip").save_pretrained(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="is a file"):
        tiny_model("clip").save_pretrained(tmp_path / "notes.txt")


def test_hub(tmp_path, monkeypatch):
    uploaded = {}

    class Hub:
        def __init__(self, token=None):
            self.token = token

        def create_repo(self, repo_id, *, private, exist_ok):
            assert exist_ok and private
            return type("Repo", (), {"repo_id": f"someone/{repo_id}"})

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, tmp_path / repo_id)
            uploaded[repo_id] = self.token
            return "address"

    def download(repo_id, *, revision, token, allow_patterns):
        # The calibration of a model is not among the files of a save, and comes with them all the same.
        assert set(allow_patterns) == {*model_folder.FILES, "calibration.json"}
        return tmp_path / repo_id

    monkeypatch.setattr(reid_model, "HfApi", Hub)
    monkeypatch.setattr(model_folder, "snapshot_download", download)
    model = tiny_model("swin")
    assert model.push_to_hub("people", private=True, token="secret") == "address"
    assert uploaded == {"someone/people": "secret"}
    assert same_state(ReIDModel.from_pretrained("someone/people"), model)


# Bad folders


def break_folder(folder, how):
    weights = folder / "model.safetensors"
    if how == "no weights":
        weights.unlink()
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "empty":
        weights.write_bytes(b"")
    elif how == "pickle instead":
        torch.save(load_file(weights), folder / "pytorch_model.bin")
        weights.unlink()
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "broken config":
        (folder / "config.json").write_text("{")
    elif how == "no preprocessor":
        (folder / "preprocessor_config.json").unlink()
    else:
        config = json.loads((folder / "config.json").read_text())
        if how == "other width":
            config["backbone"]["intermediate_size"] = 48
        elif how == "other depth":
            config["backbone"]["num_hidden_layers"] = 2
        elif how == "no identities":
            del config["num_ids"]
        elif how == "strange backbone":
            config["backbone"]["model_type"] = "bert"
        elif how == "other size":
            config["image_size"] = [64, 32]
        (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "how, message",
    [
        ("no weights", "model.safetensors"),
        ("truncated", "model.safetensors.*whole safetensors"),
        ("empty", "model.safetensors"),
        ("pickle instead", "model.safetensors"),
        ("no config", "no config.json.*model.safetensors"),
        ("broken config", "config.json"),
        ("no preprocessor", "preprocessor_config.json"),
        ("other width", r"layers.0.mlp.fc1.weight is \(64, 32\) in the file and \(48, 32\) in the model.* more"),
        ("other depth", "layers.2.* is not part of the model"),
        ("no identities", "num_ids"),
        ("strange backbone", "bert.*supported"),
        ("other size", "image_size"),
    ],
)
def test_a_damaged_folder_is_refused(tmp_path, how, message):
    tiny_model("clip").save_pretrained(tmp_path)
    break_folder(tmp_path, how)
    with pytest.raises(ValueError, match=f"(?s){message}") as error:
        ReIDModel.from_pretrained(tmp_path)
    assert tmp_path.name in str(error.value)


def test_folders_of_another_kind(tmp_path):
    backbone, reid, bert, empty = (tmp_path / name for name in ("backbone", "reid", "bert", "empty"))
    tiny_model("clip").backbone.save_pretrained(backbone)
    tiny_model("clip").save_pretrained(reid)
    BertConfig().save_pretrained(bert)
    empty.mkdir()
    with pytest.raises(ValueError, match="clip_vision_model.*from_backbone"):
        ReIDModel.from_pretrained(backbone)
    with pytest.raises(ValueError, match="found: nothing"):
        ReIDModel.from_pretrained(empty)
    with pytest.raises(ValueError, match="no Re-ID model at"):
        ReIDModel.from_pretrained(tmp_path / "absent")
    with pytest.raises(ValueError, match="from_pretrained"):
        ReIDModel.from_backbone(reid)
    with pytest.raises(ValueError, match="'bert'.*CLIP.*ResNet.*Swin"):
        ReIDModel.from_backbone(bert)
    with pytest.raises(ValueError, match="no config.json"):
        ReIDModel.from_backbone(empty)
    with pytest.raises(ValueError, match="no model at"):
        ReIDModel.from_backbone(tmp_path / "absent")
    with pytest.raises(ValueError, match="'bert'.*CLIP.*ResNet.*Swin"):
        backbone_from_config(BertConfig())


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing", "./nothing", "out/of/reach", "/out/of/reach"])
def test_an_absent_name_is_refused_at_once(name, monkeypatch):
    """Without the retries of transformers, which take half a minute where there is no network."""

    def unreachable(self, repo_id, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(model_folder.HfApi, "model_info", unreachable)
    monkeypatch.setattr(backbones.PreTrainedConfig, "get_config_dict", None)
    with pytest.raises(ValueError, match=f"no model at '{name}'"):
        ReIDModel.from_backbone(name)


def test_without_network_the_cache_will_do(monkeypatch):
    def unreachable(self, repo_id, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(model_folder.HfApi, "model_info", unreachable)
    monkeypatch.setattr(model_folder, "try_to_load_from_cache", lambda *args, **options: "a file")
    monkeypatch.setattr(backbones.PreTrainedConfig, "get_config_dict", lambda *args, **options: ({}, {}))
    with pytest.raises(ValueError, match="'someone/clip' has model_type None"):
        ReIDModel.from_backbone("someone/clip")


class Malicious:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("how", ["pickle", "malicious pickle", "truncated", "other width", "incomplete"])
def test_a_damaged_backbone_is_refused(tmp_path, how):
    tiny_model("clip", size=(32, 32)).backbone.save_pretrained(tmp_path)
    weights, message = tmp_path / "model.safetensors", "no clip_vision_model weights.*safetensors"
    if how in ("pickle", "malicious pickle"):
        content = load_file(weights) if how == "pickle" else Malicious(tmp_path / "owned")
        torch.save(content, tmp_path / "pytorch_model.bin")
        weights.unlink()
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "other width":
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
        message = r"layers.0.mlp.fc1.bias is \(64,\), not \(48,\).* more"
    else:
        tensors = load_file(weights)
        del tensors["vision_model.pre_layrnorm.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
        message = "pre_layrnorm.weight is missing$"
    with pytest.raises(ValueError, match=f"(?s){message}"):
        ReIDModel.from_backbone(tmp_path, image_size=(32, 32))
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image_size": (4, 32)}, "smaller than one patch"),
        ({"image_size": (0, 32)}, "image_size"),
        ({"image_size": 256}, "image_size"),
        ({"num_ids": -1}, "num_ids"),
        ({"resample": "magic"}, "resample.*bicubic.*magic"),
        ({"image_std": (0.5, 0.5, 0.0)}, "image_std"),
        ({"image_mean": (0.5,)}, "image_mean"),
    ],
)
def test_bad_options(tmp_path, options, message):
    tiny_model("clip", size=(32, 32)).backbone.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        ReIDModel.from_backbone(tmp_path, **({"image_size": (32, 32)} | options))


def test_swin_with_absolute_positions_is_refused():
    config = tiny_config("swin")
    config.use_absolute_embeddings = True
    with pytest.raises(ValueError, match="use_absolute_embeddings"):
        backbone_from_config(config, SIZE)


# The authors' checkpoints


def wrapped(state, how):
    if how == "data parallel":
        return {f"module.{name}": value for name, value in state.items()}
    if how == "in half":
        return {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    if how == "without classifier":
        return {name: value for name, value in state.items() if name != "encoder.fc.weight"}
    if how in ("state_dict", "model"):
        return {how: state, "epoch": 60}
    if how == "both":
        return {"state_dict": {f"module.{name}": value for name, value in state.items()}, "optimizer": {"lr": 1.0}}
    return state


@pytest.mark.parametrize(
    "how", ["plain", "state_dict", "model", "data parallel", "both", "in half", "without classifier"]
)
def test_dcac_checkpoint_against_a_reference(tmp_path, how):
    encoder, state = dcac_state()
    torch.save(wrapped(state, how), tmp_path / "checkpoint.pth")
    model = ReIDModel.from_dcac_checkpoint(tmp_path / "checkpoint.pth")
    if how == "in half":
        encoder = {name: value.half().float() for name, value in encoder.items()}
    assert not model.training and model.image_size == (48, 24) and model.image_mean == (0.5, 0.5, 0.5)
    assert model.backbone.config.num_attention_heads == 2 and model.backbone.config.num_hidden_layers == 2
    assert model.num_ids == (0 if how == "without classifier" else 7)
    images = people(3, (48, 24))
    features = clip_reference(images, encoder, heads=2)[:, 0]
    torch.testing.assert_close(model.backbone(images), features, rtol=1e-5, atol=1e-5)
    neck = {name: state[f"encoder.bnneck.{name}"] for name in ("weight", "running_mean", "running_var")}
    want = (features - neck["running_mean"]) / (neck["running_var"] + 1e-5).sqrt() * neck["weight"]
    want = want / want.norm(dim=1, keepdim=True)
    tolerance = 2e-3 if how == "in half" else 1e-5
    torch.testing.assert_close(model(images), want, rtol=tolerance, atol=tolerance)
    if how == "plain":
        torch.testing.assert_close(
            model.train().neck(features)[1], model.bnneck(features) @ state["encoder.fc.weight"].T
        )
    model.save_pretrained(tmp_path / "model")
    assert same_state(ReIDModel.from_pretrained(tmp_path / "model"), model)


def test_dcac_feature_map_is_row_by_row(tmp_path):
    encoder, state = dcac_state(grid=(6, 3))
    torch.save(state, tmp_path / "checkpoint.pth")
    model, images = ReIDModel.from_dcac_checkpoint(tmp_path / "checkpoint.pth"), people(2, (48, 24))
    tokens = clip_reference(images, encoder, heads=2)
    want = torch.stack([tokens[:, 1 + 3 * row : 4 + 3 * row] for row in range(6)], dim=1).permute(0, 3, 1, 2)
    torch.testing.assert_close(model.backbone.feature_map(images), want, rtol=1e-5, atol=1e-5)


def test_dcac_image_size(tmp_path):
    encoder, state = dcac_state(grid=(4, 5))
    torch.save(state, path := tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match="20 positions.*image_size"):
        ReIDModel.from_dcac_checkpoint(path)
    with pytest.raises(ValueError, match=r"20 positions.*\(48, 24\): 6 x 3"):
        ReIDModel.from_dcac_checkpoint(path, image_size=(48, 24))
    model, images = ReIDModel.from_dcac_checkpoint(path, image_size=(32, 40)), people(2, (32, 40))
    torch.testing.assert_close(
        model.backbone(images), clip_reference(images, encoder, heads=2)[:, 0], rtol=1e-5, atol=1e-5
    )


def test_dcac_full_size():
    """A real file's shapes: ViT-B/16 at 256x128, which is the encoder of 85.55 M trainable parameters."""
    from utils.modeling.importers.dcac import grid_image_size

    assert grid_image_size("file", 128, 16, None) == (256, 128)
    assert grid_image_size("file", 21 * 10, 16, (336, 160)) == (336, 160)


def broken_dcac(state, how):
    state = dict(state)
    block = "encoder.image_encoder.transformer.resblocks.1"
    if how == "missing tensor":
        del state[f"{block}.ln_2.bias"]
    elif how == "missing block":
        state = {name: value for name, value in state.items() if "resblocks.0" not in name}
    elif how == "no neck":
        del state["encoder.bnneck.running_mean"]
    elif how == "wrong shape":
        state[f"{block}.mlp.c_fc.weight"] = torch.zeros(512, 64)
    elif how == "unknown tensor":
        state["encoder.image_encoder.attnpool.weight"] = torch.zeros(3)
    elif how == "not a tensor":
        state["encoder.fc.weight"] = [1, 2, 3]
    elif how == "odd width":
        state = dcac_state(width=72)[1]
    elif how == "denoiser only":
        state = {name: value for name, value in state.items() if name.startswith("denoiser.")}
    elif how == "a resnet":
        state = ResNetModel(tiny_config("resnet")).state_dict()
    elif how == "a list":
        state = [1, 2]
    return state


@pytest.mark.parametrize(
    "how, message",
    [
        ("missing tensor", "missing.*resblocks.1.ln_2.bias"),
        ("missing block", "missing.*resblocks.0"),
        ("no neck", "missing.*bnneck.running_mean"),
        ("wrong shape", r"c_fc.weight has shape \(512, 64\), expected \(512, 128\)"),
        ("unknown tensor", "attnpool.weight"),
        ("not a tensor", "fc.weight.*list"),
        ("odd width", "width 72"),
        ("denoiser only", "no tensors under 'encoder.'.*denoiser"),
        ("a resnet", "not a DCAC checkpoint of a CLIP ViT.*conv1.weight"),
        ("a list", "list, not a state dict"),
    ],
)
def test_other_state_dicts_are_refused(tmp_path, how, message):
    torch.save(broken_dcac(dcac_state()[1], how), tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match=message) as error:
        ReIDModel.from_dcac_checkpoint(tmp_path / "checkpoint.pth")
    assert "checkpoint.pth" in str(error.value)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", ["zip", "legacy", "plain pickle", "truncated", "text", "empty", "absent", "folder"])
def test_files_that_are_not_tensors_are_refused_and_not_run(tmp_path, how):
    path, owned = tmp_path / "checkpoint.pth", tmp_path / "owned"
    if how in ("zip", "legacy"):
        content = dcac_state()[1] | {"extra": Malicious(owned)}
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    elif how == "plain pickle":
        path.write_bytes(pickle.dumps(Malicious(owned)))
    elif how == "truncated":
        torch.save(dcac_state()[1], path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "text":
        path.write_text("<html>404</html>")
    elif how == "empty":
        path.touch()
    elif how == "folder":
        path.mkdir()
    with pytest.raises(ValueError, match="checkpoint.pth") as error:
        ReIDModel.from_dcac_checkpoint(path)
    assert not owned.exists()
    assert "weights_only" not in str(error.value)
    if how == "plain pickle":
        # The file is a real threat: read carelessly, it acts.
        pickle.loads(path.read_bytes())
        assert owned.exists()

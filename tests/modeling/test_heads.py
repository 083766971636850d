"""Heads of the fine-tuning methods: sizes with real backbones, numbers against plain references, folders, refusals."""

import copy
import math
import random

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPVisionConfig, ResNetConfig, ResNetModel, SwinConfig

from utils.modeling.attention import attention_maps
from utils.modeling.backbones import backbone_from_config
from utils.modeling.heads import METHODS, GeM, NonLocal, check_rows
from utils.modeling.reid_model import ReIDModel
from utils.modeling.stages import compile_blocks

SIZE = (96, 64)
NUM_IDS = 5
HEADS = METHODS[1:]
REAL = {
    "resnet-50": ResNetConfig(),
    "swin-t": SwinConfig(embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24]),
    "clip-b16": CLIPVisionConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        image_size=224,
        patch_size=16,
        projection_dim=512,
    ),
}
TINY = {
    "resnet": ResNetConfig(embedding_size=8, hidden_sizes=[16, 24, 32], depths=[1, 2, 2]),
    "swin": SwinConfig(
        image_size=32, patch_size=4, embed_dim=12, depths=[2, 2], num_heads=[2, 3], window_size=4, drop_path_rate=0.0
    ),
    "clip": CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=20,
    ),
}


def tiny(family, method, num_ids=NUM_IDS, size=SIZE, seed=0):
    torch.manual_seed(seed)
    model = ReIDModel(backbone_from_config(copy.deepcopy(TINY[family]), size), num_ids, method=method)
    with torch.no_grad():
        # Trained-looking values: nothing left at 0 or 1, where a mistake would not show.
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0)
            elif tensor.is_floating_point() and tensor.dim() == 1 and "bnneck.bias" not in name:
                tensor.add_(0.1 * torch.randn_like(tensor))
    return model


def people(count, size=SIZE, seed=1):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def trainable(module):
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


# Sizes


def non_local_count(channels):
    inner = channels // 2
    return 3 * (channels * inner + inner) + inner * channels + channels + 2 * channels


def bottleneck_count(wide, narrow, shortcut_from=None):
    norms = 2 * narrow + 2 * narrow + 2 * wide
    shortcut = 0 if shortcut_from is None else shortcut_from * wide + 2 * wide
    return (shortcut_from or wide) * narrow + 9 * narrow * narrow + narrow * wide + norms + shortcut


# A ResNet-50 from the second block of its fourth stage on.
BRANCH = 5 * bottleneck_count(1024, 256) + bottleneck_count(2048, 512, 1024) + 2 * bottleneck_count(2048, 512)
BODY = {"resnet-50": 23_508_032, "swin-t": 27_519_354, "clip-b16": 85_550_592}
WIDTH = {"resnet-50": 2048, "swin-t": 768, "clip-b16": 512}


def head_count(name, method, ids=751):
    width = WIDTH[name]
    if method in ("bot", "agw", "sbs"):
        neck = width + width * ids
        if method == "bot" or name == "clip-b16":
            return neck
        blocks = 2 * non_local_count(512) + 3 * non_local_count(1024) if name == "resnet-50" else 0
        return neck + blocks + 1
    if method == "mgn":
        reductions = 8 * (width * 256 + 2 * 256)
        classifiers = (3 * width + 5 * 256) * ids
        return reductions + classifiers + (2 * BRANCH if name == "resnet-50" else 0)
    whole, part = min(512, width), min(1024, width)
    reductions = width * (whole + part) + 3 * (whole + part)
    return reductions + (whole + part + 2) * ids + bottleneck_count(width, width // 4)


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("method", METHODS)
def test_counts_and_shapes_with_real_backbones(name, method):
    width = WIDTH[name]
    with torch.device("meta"):
        model = ReIDModel(backbone_from_config(copy.deepcopy(REAL[name]), (256, 128)), 751, method=method).train()
        images = torch.empty(4, 3, 256, 128)
        output = model.outputs(model.pool(images))
        features = model.eval()(images)
    assert trainable(model) == BODY[name] + head_count(name, method)
    whole, part = min(512, width), min(1024, width)
    compared, wanted = {
        "mgn": ([256] * 3, 8 * 256),
        "bdb": ([whole, part], whole + part),
    }.get(method, ([width], width))
    assert [tuple(one.shape) for one in output.compared] == [(4, size) for size in compared]
    assert [tuple(one.shape) for one in output.logits] == [(4, 751)] * {"mgn": 8, "bdb": 2}.get(method, 1)
    assert features.shape == (4, wanted) and model.num_features == wanted


def test_mgn_parts_after_the_first_block_and_only_its_global_branch_downsamples():
    with torch.device("meta"):
        model = ReIDModel(backbone_from_config(ResNetConfig(), (384, 128)), method="mgn")
        maps = model.head.maps(model.backbone, torch.empty(2, 3, 384, 128))
    assert [tuple(one.shape) for one in maps] == [(2, 2048, 12, 4), (2, 2048, 24, 8), (2, 2048, 24, 8)]
    stages = model.backbone.model.encoder.stages
    branch = model.head.branches[0]
    assert len(branch) == len(stages[2].layers) - 1 + 1
    assert sum(parameter.numel() for parameter in branch.parameters()) == BRANCH


def test_non_local_blocks_stand_where_agw_has_them():
    with torch.device("meta"):
        backbone = ReIDModel(backbone_from_config(ResNetConfig(), (256, 128)), method="agw").backbone
    found = [
        [isinstance(layer, torch.nn.Sequential) for layer in stage.layers] for stage in backbone.model.encoder.stages
    ]
    assert found == [[False] * 3, [False, False, True, True], [False] * 3 + [True] * 3, [False] * 3]


# Numbers


def test_gem_against_its_definition():
    feature_map = people(2, (4, 3)).double()
    pooling = GeM()
    with torch.no_grad():
        pooling.power.fill_(2.5)
    found = pooling(feature_map)
    for image in range(2):
        for channel in range(3):
            values = [max(value, 1e-6) for value in feature_map[image, channel].flatten().tolist()]
            wanted = (sum(value**2.5 for value in values) / 12) ** (1 / 2.5)
            assert found[image, channel].item() == pytest.approx(wanted, rel=1e-4)
    signed = GeM(signed=True)
    positive = feature_map.abs()
    torch.testing.assert_close(signed(positive), GeM()(positive), rtol=0, atol=2e-6)
    torch.testing.assert_close(signed(-feature_map), -signed(feature_map))
    # A power of one is the plain mean, a large one the maximum.
    torch.testing.assert_close(GeM(power=1.0)(positive), positive.mean((2, 3)).float())
    torch.testing.assert_close(GeM(power=100.0)(positive), positive.amax((2, 3)).float(), rtol=0.05, atol=0)


def test_gem_keeps_a_gradient_on_maps_of_zeros():
    for signed in (False, True):
        pooling, feature_map = GeM(signed), torch.zeros(2, 3, 4, 2, requires_grad=True)
        pooling(feature_map).sum().backward()
        assert feature_map.grad.isfinite().all() and pooling.power.grad.isfinite().all()


def test_non_local_block_against_loops():
    torch.manual_seed(0)
    block = NonLocal(6).double().eval()
    feature_map = torch.randn(2, 6, 3, 2).double()
    assert torch.equal(block(feature_map), feature_map)
    torch.nn.init.normal_(block.norm.weight)
    found = block(feature_map)

    def at(layer, column):
        return layer.weight[:, :, 0, 0] @ column + layer.bias

    for image in range(2):
        columns = feature_map[image].flatten(1).t()
        for place, column in enumerate(columns):
            mixed = sum(
                (at(block.theta, column) @ at(block.phi, other)) / len(columns) * at(block.g, other)
                for other in columns
            )
            wanted = column + at(block.out, mixed) / math.sqrt(1 + block.norm.eps) * block.norm.weight
            torch.testing.assert_close(found[image].flatten(1).t()[place], wanted)


def batch_norm(values, layer):
    """As in training: by the batch's own mean and variance."""
    centred = values - values.mean(0)
    return centred / (values.var(0, correction=0) + layer.eps).sqrt() * layer.weight + layer.bias


def reduced(values, reduction):
    linear, norm, _ = reduction
    bias = 0 if linear.bias is None else linear.bias
    return batch_norm(values @ linear.weight.t() + bias, norm).clamp(min=0)


@pytest.mark.parametrize("family", ["resnet", "clip"])
def test_mgn_against_its_definition(family):
    model, images = tiny(family, "mgn").train(), people(6)
    backbone, head = model.backbone, model.head
    with torch.no_grad():
        output = model(images)
        if family == "resnet":
            stages = backbone.model.encoder.stages
            hidden = stages[1].layers[0](stages[0](backbone.model.embedder(images)))
            own = stages[2](stages[1].layers[1](hidden))
            maps = [own, *(branch(hidden) for branch in head.branches)]
            assert [tuple(one.shape[2:]) for one in maps] == [(6, 4), (12, 8), (12, 8)]
            whole = [one.flatten(2).amax(2) for one in maps]
        else:
            feature_map = backbone.feature_map(images)
            maps = [feature_map] * 3
            whole = [backbone(images), *(one.flatten(2).amax(2) for one in maps[1:])]
        rows = maps[1].shape[2]
        halves = [maps[1][:, :, part * rows // 2 : (part + 1) * rows // 2].flatten(2).amax(2) for part in range(2)]
        thirds = [maps[2][:, :, part * rows // 3 : (part + 1) * rows // 3].flatten(2).amax(2) for part in range(3)]
        parts = [reduced(one, by) for one, by in zip(whole + halves + thirds, head.reductions, strict=True)]
        # Before the reduction where the whole body is seen, after it for the stripes.
        scored = [values @ layer.weight.t() for values, layer in zip(whole + parts[3:], head.classifiers, strict=True)]
    for found, wanted in zip(output.compared + output.logits, parts[:3] + scored, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.features, torch.cat(parts, 1), rtol=1e-4, atol=1e-4)


def test_mgn_s_global_branch_is_the_untouched_resnet():
    torch.manual_seed(0)
    plain = ResNetModel(TINY["resnet"]).eval()
    model = tiny("resnet", "mgn").eval()
    model.backbone.model.load_state_dict(plain.state_dict())
    with torch.no_grad():
        wanted = plain(people(2)).last_hidden_state
        found = model.head.maps(model.backbone, people(2))[0]
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("family", ["resnet", "swin", "clip"])
def test_bdb_against_its_definition(family):
    model, images = tiny(family, "bdb").train(), people(6)
    head = model.head
    with torch.no_grad():
        output = model.outputs(model.pool(images, random.Random(3)))
        whole, feature_map = model.backbone(images), model.backbone.feature_map(images)
        part = head.bottleneck(feature_map)
        height = part.shape[2]
        tall = max(1, round(0.33 * height))
        top = random.Random(3).randint(0, height - tall)
        # One rectangle over the whole width, the same of all images.
        part[:, :, top : top + tall] = 0
        parts = [
            reduced(values, by) for values, by in zip((whole, part.flatten(2).amax(2)), head.reductions, strict=True)
        ]
        scored = [
            values @ layer.weight.t() + layer.bias for values, layer in zip(parts, head.classifiers, strict=True)
        ]
    for found, wanted in zip(output.compared + output.logits, parts + scored, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        model.eval()
        assert torch.equal(model.pool(images, random.Random(3)), model.pool(images))


def test_a_third_of_the_published_map_is_lost():
    """384 x 128 pixels give 24 x 8 places, of which the authors' code drops 8 rows."""
    head = tiny("resnet", "bdb").head
    for number in range(4):
        kept = head.kept((24, 8), random.Random(number))
        assert kept.sum() == 16 * 8 and (kept.sum(1) == 0).sum() == 8


@pytest.mark.parametrize("family", ["resnet", "swin", "clip"])
@pytest.mark.parametrize("method", ["agw", "sbs"])
def test_agw_and_sbs_against_their_definition(family, method):
    model, images = tiny(family, method).train(), people(6)
    with torch.no_grad():
        output = model(images)
        if family == "clip":
            pooled = model.backbone(images)
        else:
            values = model.backbone.feature_map(images)
            power = model.head.pooling.power
            pooled = values.clamp(min=1e-6).pow(power).mean((2, 3)).pow(1 / power)
            if family == "swin":
                pooled = pooled - (-values).clamp(min=1e-6).pow(power).mean((2, 3)).pow(1 / power)
        bn_features = batch_norm(pooled, model.head.bnneck)
        weight = model.head.classifiers[0].weight
        logits = bn_features @ weight.t()
        if method == "sbs":
            logits = logits / bn_features.norm(dim=1)[:, None] / weight.norm(dim=1)
    # As in FastReID, whose method SBS is, its triplets look at what the classifier sees.
    compared = bn_features if method == "sbs" else pooled
    for found, wanted in ((output.compared[0], compared), (output.features, bn_features), (output.logits[0], logits)):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["agw", "mgn", "bdb"])
def test_recomputed_activations_change_neither_gradients_nor_averages(method):
    plain, again = tiny("resnet", method).train(), tiny("resnet", method).train()
    again.enable_gradient_checkpointing()
    for model in (plain, again):
        output = model.outputs(model.pool(people(6), random.Random(0)))
        sum(one.square().sum() for one in output.compared + output.logits).backward()
    for (name, one), (_, other) in zip(plain.named_parameters(), again.named_parameters(), strict=True):
        if one.requires_grad:
            tolerance = 1e-4 * one.grad.abs().max().item()
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=tolerance, msg=name)
    for (name, one), (_, other) in zip(plain.named_buffers(), again.named_buffers(), strict=True):
        torch.testing.assert_close(other, one, msg=name)


@pytest.mark.parametrize("family", ["resnet", "clip"])
@pytest.mark.parametrize("method", METHODS)
def test_every_weight_is_trained(family, method):
    model = tiny(family, method).train()
    output = model.outputs(model.pool(people(8), random.Random(0)))
    labels = torch.arange(8) % NUM_IDS
    loss = sum(F.cross_entropy(logits, labels) for logits in output.logits)
    (loss + sum(one.square().mean() for one in output.compared)).backward()
    idle = [name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]
    assert idle == []


# Folders


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("method", HEADS)
def test_saved_and_opened_again(family, method, tmp_path):
    model = tiny(family, method).eval()
    model.save_pretrained(tmp_path)
    again = ReIDModel.from_pretrained(tmp_path)
    assert again.method == method and again.num_ids == NUM_IDS
    wanted = model.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in again.state_dict().items())
    with torch.no_grad():
        features = model(people(3))
        assert torch.equal(again(people(3)), features)
        torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
        # As evaluate.py opens it: without classifiers, and with convolutions that sum in another order.
        opened = ReIDModel.open(str(tmp_path))
        torch.testing.assert_close(opened(people(3)), features, rtol=0, atol=1e-6)
        assert opened.num_ids == 0
        assert not any("classifiers" in name for name in opened.state_dict())
        heat = attention_maps(opened, people(3))
    assert heat.shape[0] == 3 and heat.amax().item() == pytest.approx(1)


def test_a_model_of_bot_is_the_plain_one():
    torch.manual_seed(0)
    model = ReIDModel(backbone_from_config(TINY["clip"], SIZE), NUM_IDS)
    assert model.head is None and "method" not in model.configuration()
    output = model.outputs(model.train().pool(people(4)))
    features, bn_features, logits = model(people(4))
    assert torch.equal(output.compared[0], features) and torch.equal(output.logits[0], logits)
    torch.testing.assert_close(output.features, bn_features)


def test_starts_of_a_method(tmp_path):
    for method in ("bot", "agw"):
        tiny("resnet", method).save_pretrained(tmp_path / method)
    options = {"num_ids": 7, "image_size": SIZE}
    started = ReIDModel.for_training(tmp_path / "bot", method="mgn", **options)
    wanted = ReIDModel.from_pretrained(tmp_path / "bot").backbone.state_dict()
    found = started.backbone.state_dict()
    assert started.method == "mgn" and all(torch.equal(found[name], wanted[name]) for name in wanted)
    # The branches start from the backbone's own weights.
    own = started.backbone.model.encoder.stages[-1].state_dict()
    for branch in started.head.branches:
        assert all(torch.equal(branch[-1].state_dict()[name], own[name]) for name in own)
    assert ReIDModel.for_training(tmp_path / "agw", method="agw", **options).num_ids == 7
    for method in ("bot", "sbs"):
        with pytest.raises(ValueError, match="is a model of method agw"):
            ReIDModel.for_training(tmp_path / "agw", method=method, **options)


def test_a_map_of_exactly_as_many_rows_as_are_needed():
    backbone = tiny("resnet", "bot").backbone
    rows = backbone.feature_map(torch.zeros(1, 3, *backbone.image_size)).shape[2]
    check_rows("mgn", backbone, rows)
    with pytest.raises(ValueError, match=f"needs a map of {rows + 1} rows or more, .* this backbone's {rows}:"):
        check_rows("mgn", backbone, rows + 1)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="needs a map of 3 rows or more, and images of 16 x 64 give .* 2"):
        tiny("resnet", "mgn", size=(16, 64))
    one_stage = ResNetConfig(embedding_size=8, hidden_sizes=[16], depths=[2])
    with pytest.raises(ValueError, match="one stage only"):
        ReIDModel(backbone_from_config(one_stage, SIZE), method="mgn")
    with pytest.raises(ValueError, match="method 'pcb' is unknown; known are bot, agw"):
        tiny("clip", "pcb")
    with pytest.raises(ValueError, match="has a head instead of a BNNeck"):
        tiny("clip", "agw").neck(torch.zeros(2, 20))


def test_halved_models_keep_their_direction():
    for method in HEADS:
        model = tiny("clip", method).eval()
        with torch.no_grad():
            wanted = model(people(3))
            found = copy.deepcopy(model).to(torch.bfloat16)(people(3).bfloat16())
        assert found.dtype == torch.float32 and (found * wanted).sum(1).min() > 0.99, method


@pytest.mark.parametrize("family, method", [("resnet", "bot"), ("resnet", "mgn"), ("clip", "mgn")])
def test_compiled_blocks_run_in_every_head_and_change_nothing(family, method, monkeypatch):
    plain, compiled = (tiny(family, method) for _ in range(2))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def compile_as(module):
        module._compiled_call_impl = torch.compile(module._call_impl, backend=backend)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_as)
    torch._dynamo.reset()
    compile_blocks(compiled.backbone, compiled.head)
    images = torch.randn(2, 3, *SIZE)
    features = [model.eval().pool(images, random.Random(0)) for model in (plain, compiled)]
    assert graphs and torch.equal(*features)
    assert list(plain.state_dict()) == list(compiled.state_dict())

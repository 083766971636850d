"""MUVA: encoder, losses and texts against written-out float64; masks, files, and runs of train_dcac.py."""

import functools
import json
import math
import random
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig

import train_dcac
from methods.muva import prompts, settings
from methods.muva.losses import extract_under, with_parts
from methods.muva.prompts import BEFORE, NUM_WORDS, Texts, rate_of, text_loss
from methods.muva.training import Parts, dice
from tests import runs
from tests.runs import launch, log_of, same_weights, weights_of
from train_dcac import DCAC, Condition
from utils.batches.part_images import WithMasks
from utils.batches.samplers import IdentitySampler
from utils.batches.transforms import ReIDImages, test_transform, train_transform
from utils.datasets import part_masks
from utils.datasets.load import load_reid
from utils.datasets.part_masks import PARTS, PartMasks, fixed_rows, masks_of, patches_in
from utils.datasets.portable import save
from utils.flags import RESNET_DIR
from utils.modeling.attention import attention_maps
from utils.modeling.backbones import backbone_from_config
from utils.modeling.memories import PrototypeMemory
from utils.modeling.networks.part_tokens import PartTokenBackbone
from utils.modeling.reid_model import ReIDModel
from utils.synthetic.parts import boxes_of
from utils.synthetic.world import render

NUM_IDS, BATCH, HEADS = 5, 6, 2
train, refused = (functools.partial(one, train_dcac) for one in (runs.run, runs.refused))


def part_model(clip, num_ids=NUM_IDS):
    """A model of 32 x 24 pixels in 4 x 3 patches, whose predictors and norms are not at their start."""
    torch.manual_seed(0)
    plain = ReIDModel.from_backbone(clip, num_ids=num_ids, image_size=(32, 24))
    model = ReIDModel(PartTokenBackbone.on(plain.backbone, HEADS), num_ids)
    for parameter in [*model.backbone.model.predictors.parameters(), model.classifier.weight]:
        torch.nn.init.normal_(parameter, std=0.2)
    return model


# The encoder


def layer_norm(x, norm):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def linear(x, layer):
    return x @ layer.weight.t() + (0 if layer.bias is None else layer.bias)


def attention(q, k, v, heads, visible):
    """Head by head, image by image: sums over the visible tokens only."""
    width = q.shape[-1] // heads
    rows = []
    for image in range(len(q)):
        columns = []
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            scores = q[image, :, part] @ k[image, :, part].t() / math.sqrt(width)
            weights = scores.exp() * visible[image]
            columns.append(weights / weights.sum(1, keepdim=True) @ v[image, :, part])
        rows.append(torch.cat(columns, 1))
    return torch.stack(rows)


def visible_tokens(masks):
    """Who sees whom, token by token."""
    count, num_parts, num_patches = masks.shape
    size = 1 + num_parts + num_patches
    visible = torch.zeros(count, size, size, dtype=torch.double)
    for image in range(count):
        for a in range(size):
            for b in range(size):
                kinds = sorted((0 if one == 0 else 1 if one <= num_parts else 2) for one in (a, b))
                low, high = min(a, b), max(a, b)
                if kinds[0] == 0 or kinds == [2, 2]:
                    visible[image, a, b] = 1
                elif kinds == [1, 1]:
                    visible[image, a, b] = a == b
                else:
                    visible[image, a, b] = masks[image, low - 1, high - 1 - num_parts]
    return visible


def reference(backbone, images, masks=None):
    """(features, logits of each block) by the written formulas, of a backbone in float64."""
    model, tower = backbone.model, backbone.tower
    embeddings, positions = tower.embeddings, tower.embeddings.position_embedding.weight
    patches = F.conv2d(images, embeddings.patch_embedding.weight, stride=backbone.config.patch_size)
    patches = patches.flatten(2).transpose(1, 2) + positions[1:]
    first = (embeddings.class_embedding + positions[0]).expand(len(images), 1, -1)
    parts = (model.part_tokens + model.part_positions).expand(len(images), -1, -1)
    x, logits = layer_norm(torch.cat([first, parts, patches], 1), tower.pre_layrnorm), []
    num_parts = model.config.num_parts
    for layer, predictor in zip(tower.encoder.layers, model.predictors, strict=True):
        seen = masks
        if masks is None:
            now, others = x[:, 1 : 1 + num_parts], layer_norm(x[:, 1 + num_parts :], predictor.norm_patches)
            q = linear(layer_norm(now, predictor.norm_parts), predictor.query)
            everything = torch.ones(len(x), num_parts, others.shape[1], dtype=torch.double)
            values = linear(others, predictor.key), linear(others, predictor.value)
            y = now + linear(attention(q, *values, HEADS, everything), predictor.out)
            hidden = linear(layer_norm(y, predictor.norm), predictor.hidden)
            m = linear(hidden / (1 + (-1.702 * hidden).exp()), predictor.logits)
            logits.append(m + (logits[-1] if logits else 0))
            seen = logits[-1].detach() > 0
        visible, block = visible_tokens(seen), layer.self_attn
        normal = layer_norm(x, layer.layer_norm1)
        q, k, v = (linear(normal, part) for part in (block.q_proj, block.k_proj, block.v_proj))
        x = x + linear(attention(q, k, v, backbone.config.num_attention_heads, visible), block.out_proj)
        hidden = linear(layer_norm(x, layer.layer_norm2), layer.mlp.fc1)
        x = x + linear(hidden / (1 + (-1.702 * hidden).exp()), layer.mlp.fc2)
    grains = layer_norm(x[:, : 1 + num_parts], tower.post_layernorm) @ model.visual_projection.weight.t()
    return grains.flatten(1), logits


def test_the_encoder_is_the_one_that_is_written_down(clip):
    backbone = part_model(clip).backbone.double()
    images = torch.randn(BATCH, 3, 32, 24, dtype=torch.double)
    given = torch.rand(BATCH, 3, 12) > 0.6
    given[0, 1] = False
    wanted, _ = reference(backbone, images, given)
    torch.testing.assert_close(backbone(images, given), wanted, rtol=1e-9, atol=1e-9)
    wanted, logits = reference(backbone, images)
    tokens, found = backbone.blocks(images)
    torch.testing.assert_close(backbone.features_of(tokens), wanted, rtol=1e-4, atol=1e-5)
    for one, other in zip(found, logits, strict=True):
        # Masks differ between images and parts, or nothing is tested.
        assert 0.1 < (other > 0).double().mean() < 0.9
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)
    assert backbone(images).shape == (BATCH, 4 * 16) and backbone.feature_map(images).shape == (BATCH, 16, 4, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_no_token_is_nan_where_masks_are_empty(clip, dtype):
    model = part_model(clip).eval()
    images, empty = torch.randn(2, 3, 32, 24), torch.zeros(2, 3, 12, dtype=torch.bool)
    wanted = model.backbone(images, empty)
    with torch.autocast("cpu", dtype=dtype):
        found = model.backbone(images, empty)
        assert found.dtype == dtype and model(images).isfinite().all()
    torch.testing.assert_close(found.float(), wanted, rtol=0.05, atol=0.05)
    assert model.to(dtype).backbone(images.to(dtype), empty).isfinite().all()


def test_parameters_and_operations_of_the_page():
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    with torch.device("meta"):
        clip = backbone_from_config(CLIPVisionConfig(**sizes, image_size=224, patch_size=16, projection_dim=512))
        model = ReIDModel(PartTokenBackbone.on(clip, 2), 751)

    def millions(module):
        return sum(one.numel() for one in module.parameters() if one.requires_grad) / 1e6

    assert millions(model) == pytest.approx(116.9, abs=0.05)
    assert millions(model.backbone) == pytest.approx(115.3, abs=0.05)
    assert millions(model.backbone.model.predictors) == pytest.approx(29.76, abs=0.005)
    # Of 64 images, in 10^12: a multiplication and an addition are two.
    images, masks = (
        torch.zeros(64, 3, 256, 128, device="meta"),
        torch.zeros(64, 3, 128, dtype=torch.bool, device="meta"),
    )
    counts = []
    for call in (lambda: clip(images), lambda: model.backbone(images, masks), lambda: model.backbone(images)):
        with FlopCounterMode(display=False) as counter:
            call()
        counts.append(counter.get_total_flops() / 1e12)
    assert counts[0] == pytest.approx(1.45, abs=0.005) and counts[2] - counts[0] == pytest.approx(0.27, abs=0.005)
    assert counts[2] - counts[1] == pytest.approx(0.24, abs=0.005)
    assert model.num_features == 2048


@pytest.mark.slow
def test_an_exported_encoder_takes_any_batch(clip):
    model = part_model(clip).eval()
    model.backbone.set_attention("eager")
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (torch.randn(3, 3, 32, 24),), dynamic_shapes=shapes)
    for count in (1, 2, 5):
        images = torch.randn(count, 3, 32, 24)
        torch.testing.assert_close(program.module()(images), model(images))


def test_where_it_looks(clip):
    maps = attention_maps(part_model(clip), torch.randn(2, 3, 32, 24))
    assert maps.shape == (2, 4, 3) and maps.amax((1, 2)).tolist() == pytest.approx([1, 1])


def test_a_folder_keeps_part_tokens_and_predictors(clip, tmp_path):
    model = part_model(clip).eval()
    model.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 32, 24)
    opened = ReIDModel.from_pretrained(tmp_path)
    assert torch.equal(opened(images), model(images))
    assert opened.backbone.config.mask_heads == HEADS


# The losses


def test_a_trained_model_goes_on_with_what_it_has(clip, tmp_path):
    """Without losses of masks its predictors rest, which DDP wants; by MUVA they train, and tokens and neck stay."""
    model = part_model(clip)
    with torch.no_grad():
        model.backbone.model.part_tokens.fill_(7.0)
        model.bnneck.weight.fill_(3.0)
    model.save_pretrained(tmp_path)
    opened = ReIDModel.for_training(str(tmp_path), num_ids=NUM_IDS, image_size=(32, 24))
    assert not any(one.requires_grad for one in opened.backbone.model.predictors.parameters())
    parts = Parts.__new__(Parts)
    parts.args, parts.given, parts.grid = SimpleNamespace(mask_heads=2, muva_stage="both"), None, opened.backbone.grid
    trained = parts.encoder(opened)
    assert all(one.requires_grad for one in trained.backbone.model.predictors.parameters())
    assert (trained.bnneck.weight == 3).all()
    texts = {"part_tokens": torch.zeros_like(trained.backbone.model.part_tokens), "text_features": torch.ones(2)}
    said = []
    parts.given, parts.say = texts, said.append
    parts.start(SimpleNamespace(encoder=trained, texts=torch.zeros(2)), None, None, None)
    assert (trained.backbone.model.part_tokens == 7).all() and "those of --backbone" in said[0]


def module(clip, probabilities="classifier", **options):
    encoder = part_model(clip).train()
    memory = PrototypeMemory(torch.randn(NUM_IDS, encoder.num_features), 0.05)
    sizes = {"num_ids": NUM_IDS, "num_features": encoder.num_features, "width": 8, "tau": 0.6}
    condition = Condition(
        "correlation", probabilities, "none", **sizes, num_tokens=4 if probabilities == "parts" else 1
    )
    more = {"ldm_weight": 0.7, "label_smoothing": 0.1, "pass_size": BATCH, "text_tau": 0.3, "tau": 0.6}
    more |= {
        "probabilities": probabilities,
        "text_weight": 1.0,
        "mask_weight": 1.0,
        "mask_lr_multiplier": 10.0,
        "text_temperature": 2.0,
    }
    model = with_parts(DCAC)(encoder, memory, condition, None, None, **more | options)
    model.texts.normal_(std=0.3)
    return model


def smoothed(logits, labels):
    target = torch.full_like(logits, 0.1 / logits.shape[1])
    target[range(len(labels)), labels] += 0.9
    return -(target * logits.log_softmax(1)).sum(1).mean()


@pytest.mark.parametrize("text_weight", [1.0, 0.25])
def test_a_step_in_float64(clip, text_weight):
    """Losses and gradients of encoder, part tokens and predictors."""
    model = module(clip, text_weight=text_weight)
    images, labels = torch.randn(BATCH, 3, 32, 24), torch.tensor([0, 0, 1, 1, 4, 4])
    masks = torch.rand(BATCH, 3, 12) > 0.5
    masks[2, 0] = False
    loss, values, _, _ = model(images, labels, masks)
    loss.backward()
    twin = part_model(clip).double()
    feature, logits = reference(twin.backbone, images.double())
    centred = feature - feature.mean(0)
    b = centred / (feature.var(0, correction=0) + twin.bnneck.eps).sqrt() * twin.bnneck.weight
    unit = b / b.norm(dim=1, keepdim=True)
    m, g = torch.stack(logits), masks.double().expand(len(logits), -1, -1, -1)
    s = 1 / (1 + (-m).exp())
    dice = (2 * (s * g).sum(3) / 1000 + 1e-6) / ((s.sum(3) + g.sum(3)) / 1000 + 1e-6)
    wanted = {
        "loss_id": smoothed(b @ twin.classifier.weight.t(), labels),
        "loss_pcl": F.cross_entropy(unit @ model.memory.prototypes.double().t() / 0.05, labels),
        "loss_text": text_weight * smoothed(feature @ model.texts.double().t() / 2, labels),
        "loss_bce": -(g * s.log() + (1 - g) * (1 - s).log()).mean(),
        "loss_dice": 1 - dice.mean(),
    }
    for name, value in wanted.items():
        assert values[name].item() == pytest.approx(value.item(), rel=1e-4), name
    assert list(values) == ["loss", *wanted, "loss_ldm"]
    sum(wanted.values()).backward()
    others = dict(twin.named_parameters())
    for name, parameter in model.encoder.named_parameters():
        if parameter.requires_grad:
            scale = others[name].grad.abs().max().item() + 1e-12
            torch.testing.assert_close(parameter.grad.double(), others[name].grad, rtol=2e-3, atol=2e-4 * scale + 1e-7)
    # The losses of the masks reach the encoder through the blocks' inputs, and nothing else reaches the predictors.
    assert others["backbone.model.part_tokens"].grad.abs().max() > 0
    model.zero_grad()
    model = module(clip, mask_weight=0.0)
    model(images, labels, masks)[0].backward()
    assert all(not one.grad.any() for one in model.encoder.backbone.model.predictors.parameters())


@pytest.mark.parametrize("probabilities", ["text", "text-mean", "parts"])
def test_conditions_of_texts_and_parts(clip, probabilities):
    model = module(clip, probabilities)
    features, labels = torch.randn(BATCH, 64), torch.arange(BATCH) % NUM_IDS
    bn_features, logits = model.encoder.neck(features)
    found = model.condition(*model.scored(features, logits, bn_features), labels, model.memory)
    rows = model.condition.prompts
    by_text, by_classifier = (features @ model.texts.t() / 2 / 0.3).softmax(1), (logits / 0.6).softmax(1)
    if probabilities == "parts":
        weight = model.encoder.classifier.weight
        wanted = []
        for grain in range(4):
            columns = slice(16 * grain, 16 * (grain + 1))
            p = (bn_features[:, columns] @ weight[:, columns].t() / 0.6).softmax(1)
            wanted.append(p @ rows[:, grain])
        wanted = torch.stack(wanted, 1)
    else:
        p = by_text if probabilities == "text" else (by_text + by_classifier) / 2
        wanted = (p @ rows)[:, None]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_predictors_have_a_rate_of_their_own_without_decay(clip):
    model = module(clip)
    args = train_dcac.parse_args(["--encoder", "muva", "--learning_rate", "0.5"])
    groups = train_dcac.parameter_groups(args, model)
    assert [group["lr"] for group in groups] == [0.5, 5.0] and groups[1]["weight_decay"] == 0
    count = sum(len(group["params"]) for group in groups)
    assert count == sum(parameter.requires_grad for parameter in model.parameters())


# The texts


def test_texts_are_those_of_the_text_encoder(standins):
    torch.manual_seed(0)
    texts = Texts(standins / "clip", 3)
    from methods.muva.prompts import GRAINS, load_text_side

    tokenizer, encoder = load_text_side(standins / "clip")
    words = "red blue green black"
    ids = tokenizer(words).input_ids[1:-1]
    assert len(ids) == NUM_WORDS
    with torch.no_grad():
        texts.words[1] = encoder.text_model.embeddings.token_embedding(torch.tensor(ids))
        found = texts(torch.tensor([1])).view(len(GRAINS), -1)
        for grain, row in zip(GRAINS, found, strict=True):
            tokens = tokenizer(f"{BEFORE} {words} {grain}", return_tensors="pt").input_ids
            torch.testing.assert_close(row, encoder(tokens).text_embeds[0], rtol=1e-4, atol=1e-5)
    centres = F.normalize(torch.randn(3, found.numel()), dim=1)
    raw, labels = torch.randn(4, found.numel()), torch.tensor([0, 2, 2, 1])
    similar = raw.double() / raw.double().norm(dim=1, keepdim=True) @ centres.double().t()
    wanted = -similar.log_softmax(1)[range(4), labels].mean()
    assert text_loss(raw, centres, labels).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_rates_of_the_prompts():
    for epoch in range(1, 121):
        wanted = 1e-5 + 6.8e-5 * epoch if epoch < 5 else 1e-6 + 1.745e-4 * (1 + math.cos(math.pi * epoch / 120))
        assert rate_of(epoch, 120, 3.5e-4) == pytest.approx(wanted)


@pytest.mark.parametrize("resume", [True, False])
def test_a_killed_first_stage_goes_on(standins, tmp_path, monkeypatch, resume):
    monkeypatch.setattr(prompts, "KEPT_EVERY", 2)
    labels = torch.arange(12) // 4
    sampler = IdentitySampler(labels.tolist(), 8, 4, 0)

    def learn(folder, stop=None, settings="5 epochs", **begun):
        torch.manual_seed(0)
        texts = Texts(standins / "clip", 3)
        centres = F.normalize(torch.randn(3, texts(labels[:1]).shape[1]), dim=1)
        begun = prompts.Begun(folder, settings, writes=True, **begun)
        batches, done = sampler.global_batches, []

        def until(epoch):
            done.append(epoch)
            if epoch == stop:
                raise KeyboardInterrupt
            return batches(epoch)

        numbers = SimpleNamespace(global_batches=until)
        try:
            lines = prompts.learn_words(texts, centres, labels, numbers, epochs=5, rate=0.01, begun=begun)
        except KeyboardInterrupt:
            return None
        return lines, texts.words.detach(), done

    lines, words, _ = learn(tmp_path / "one", resume=False)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert learn(tmp_path / "killed", stop=4, resume=False) is None
    again, found, done = learn(tmp_path / "killed", resume=resume)
    assert done == ([3, 4, 5] if resume else [1, 2, 3, 4, 5])
    assert again == lines and torch.equal(found, words)
    assert learn(tmp_path / "other", stop=4, settings="another set", resume=False) is None
    assert learn(tmp_path / "other", resume=resume)[2] == [1, 2, 3, 4, 5]


def test_words_that_explode_are_said(standins, tmp_path):
    labels = torch.arange(12) // 4
    sampler, texts = IdentitySampler(labels.tolist(), 8, 4, 0), Texts(standins / "clip", 3)
    begun = prompts.Begun(tmp_path, "", resume=False, writes=False)
    centres = torch.full((3, texts(labels[:1]).shape[1]), torch.nan)
    with pytest.raises(ValueError, match="loss of the prompts is nan at step 1: lower --muva_rate"):
        prompts.learn_words(texts, centres, labels, sampler, epochs=1, rate=0.01, begun=begun)


def test_the_words_start_from_the_seed_alone(standins):
    found = []
    for seed in (3, 3, 4):
        torch.randn(len(found))
        found.append(Texts(standins / "clip", 2, seed).words.detach())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_gradient_of_the_words_in_float64(standins):
    texts = Texts(standins / "clip", 3)
    labels = torch.tensor([0, 2, 2, 1])
    centres = F.normalize(torch.randn(3, texts(labels[:1]).shape[1]), dim=1)
    text_loss(texts(labels), centres, labels).backward()
    twin = Texts(standins / "clip", 3).double()
    raw = twin(labels)
    similar = raw / raw.norm(dim=1, keepdim=True) @ centres.double().t()
    (-similar.log_softmax(1)[range(4), labels].mean()).backward()
    scale = twin.words.grad.abs().max().item()
    torch.testing.assert_close(texts.words.grad.double(), twin.words.grad, rtol=1e-3, atol=1e-4 * scale)
    assert scale > 0


def test_a_clip_without_texts(standins, tmp_path):
    shutil.copytree(standins / "clip", tmp_path / "clip")
    (file,) = (tmp_path / "clip").glob("*.safetensors")
    save_file({name: one for name, one in load_file(file).items() if not name.startswith("text_")}, file)
    with pytest.raises(ValueError, match="no weights of a text encoder: text_"):
        Texts(str(tmp_path / "clip"), 2)
    for file in (tmp_path / "clip").glob("*token*"):
        file.unlink()
    with pytest.raises(ValueError, match="has no vocabulary"):
        prompts.load_tokenizer(str(tmp_path / "clip"))


# Masks


@pytest.mark.parametrize("rule", part_masks.RULES)
def test_patches_in_a_box(rule):
    """Against small squares that are counted."""
    rng = random.Random(0)
    fine = 240
    for _ in range(20):
        left, right = sorted(rng.sample(range(fine + 1), 2))
        top, bottom = sorted(rng.sample(range(fine + 1), 2))
        drawn = np.zeros((fine, fine), dtype=bool)
        drawn[top:bottom, left:right] = True
        tiles = drawn.reshape(8, 30, 4, 60).transpose(0, 2, 1, 3)
        wanted = {"centre": tiles[:, :, 15, 30], "half": tiles.mean((2, 3)) >= 0.5, "touched": tiles.any((2, 3))}[rule]
        found = patches_in((left / fine, top / fine, right / fine, bottom / fine), (8, 4), rule)
        # An edge on a centre itself is rounded.
        if rule == "centre" and {left, right, top, bottom} & {15 + 30 * one for one in range(8)}:
            continue
        assert (found.reshape(8, 4) == wanted).all()
    assert fixed_rows((16, 8)).reshape(3, 16, 8).all(2).sum(1).tolist() == [3, 6, 7]


def test_true_boxes_hold_their_part():
    """In the image, with an area, and the head above the body above the legs."""
    for index in range(12):
        path = f"synthetic-a/s0/{index:04d}_c1_{index:04d}.png"
        boxes = boxes_of(path)
        head, body, legs = (boxes[part] for part in PARTS)
        assert head[1] < body[1] < legs[1] and head[3] < body[3] < legs[3]
        assert all(0 <= one[0] < one[2] <= 1 and 0 <= one[1] < one[3] <= 1 for one in boxes.values())


def test_a_file_of_masks(tmp_path, monkeypatch, capsys):
    spec = "synthetic:domain=a,num_ids=4,images_per_id=4"
    data = load_reid(spec)["train"]
    file = tmp_path / "masks.safetensors"
    monkeypatch.setattr(part_masks, "CHUNK", 6)
    compute, done = part_masks.compute, []

    def killed(dataset, rows, *more):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(rows)
        return compute(dataset, rows, *more)

    arguments = [spec, "--out", str(file), "--grid", "16", "8"]
    with pytest.raises(KeyboardInterrupt):
        monkeypatch.setattr(part_masks, "compute", killed)
        part_masks.main(arguments)
    assert not file.exists()
    monkeypatch.setattr(part_masks, "compute", lambda *given: done.append(given[1]) or compute(*given))
    part_masks.main(arguments)
    # Each chunk once.
    assert [rows.start for rows in done] == [0, 6, 12] and not list(tmp_path.glob("*.parts"))
    assert load_file(file)["masks"].shape == (16, 48)
    masks, missing = PartMasks.read([file]).of(data)
    for row, path in enumerate(data["path"]):
        assert np.array_equal(masks[row].numpy(), masks_of(boxes_of(path), (16, 8)))
    assert missing == 0 and torch.equal(masks, PartMasks.true(data, (16, 8)).of(data)[0])
    sizes = ", ".join(
        f"{part} {100 * share:.0f} %" for part, share in zip(PARTS, masks.float().mean((0, 2)), strict=True)
    )
    assert f"mean share of the patches: {sizes}\n" in capsys.readouterr().out
    whole = PartMasks((16, 8), {b"1": np.packbits(np.repeat([True, False, True], 128))})
    assert part_masks.sizes_words(whole).endswith(
        "head and legs: nearly the whole image; look at some, and try another --detector"
    )
    larger = load_reid("synthetic:domain=a,num_ids=6,images_per_id=4")["train"]
    masks, missing = PartMasks.read([file]).of(larger)
    assert missing == 8 and masks[-8:].all() and not masks[:16].flatten(1).all(1).any()
    with pytest.raises(ValueError, match="none of the 16 images.*another set"):
        PartMasks.read([file]).of(load_reid("synthetic:domain=b,num_ids=4,images_per_id=4")["train"])
    with pytest.raises(ValueError, match="are of 16 x 8 patches, and the encoder has 4 x 2"):
        PartMasks.read([file]).check_grid((4, 2))
    (tmp_path / "broken").write_bytes(b"no masks")
    with pytest.raises(ValueError, match="cannot be read"):
        PartMasks.read([tmp_path / "broken"])


def test_people_who_are_not_drawn(tmp_path, capsys):
    """A copy with its images inside has no true boxes; fixed rows and files of the drawn ones fit it."""
    spec, copy, file = (
        "synthetic:domain=a,num_ids=3,images_per_id=4",
        tmp_path / "copy",
        tmp_path / "masks.safetensors",
    )
    save(load_reid(spec), copy)
    with pytest.raises(SystemExit) as stop:
        part_masks.main([str(copy), "--out", str(file)])
    assert "only drawn people have true boxes" in str(stop.value) and "--detector rows" in str(stop.value)
    with pytest.raises(SystemExit) as stop:
        part_masks.main([str(copy), "--out", str(file), "--detector", str(tmp_path / "none")])
    assert "cannot be loaded" in str(stop.value) and "\n" not in str(stop.value)
    with pytest.raises(SystemExit) as stop:
        part_masks.main([str(copy), "--out", str(file), "--splits", "dev"])
    assert "has no split dev" in str(stop.value) and not file.exists()
    data = load_reid(str(copy))["train"]
    part_masks.main([str(copy), "--out", str(file), "--detector", "rows", "--grid", "16", "8"])
    masks, missing = PartMasks.read([file]).of(data)
    assert missing == 0 and all(np.array_equal(one.numpy(), fixed_rows((16, 8))) for one in masks)
    part_masks.main([spec, "--out", str(file)])
    assert torch.equal(
        PartMasks.read([file]).of(data)[0], PartMasks.true(load_reid(spec)["train"], (16, 8)).of(data)[0]
    )
    # Two files of different patches.
    part_masks.main([spec, "--out", str(tmp_path / "other"), "--grid", "8", "4"])
    with pytest.raises(ValueError, match="different patches: .* on 16 x 8, .* on 8 x 4"):
        PartMasks.read([file, tmp_path / "other"])
    capsys.readouterr()


def test_masks_are_mirrored_with_their_images():
    data = load_reid("synthetic:domain=a,num_ids=2,images_per_id=3")["train"]
    # Left and right halves of an image as its masks.
    masks = torch.zeros(len(data), 3, 16, 8, dtype=torch.bool)
    masks[:, :, :, :4] = True
    transform = train_transform((128, 64), padding=0, erasing=0.0)
    images = WithMasks(ReIDImages(data, transform), masks.flatten(2), (16, 8), transform)
    plain = test_transform((128, 64), resample="bicubic")
    seen = set()
    for key in range(8):
        item = images[0, f"0/1/{key}"]
        mirrored = not torch.equal(item["images"], plain(data[0]["image"]))
        assert mirrored == bool(item["masks"].unflatten(1, (16, 8))[:, :, 4:].all())
        seen.add(mirrored)
    assert seen == {True, False}


class White:
    """A white box of whole patches on black, through a transform."""

    def __init__(self, transform):
        self.transform, self.picture = transform, Image.new("RGB", (64, 128))
        self.picture.paste("white", (16, 40, 48, 96))

    def __len__(self):
        return 1

    def __getitem__(self, item):
        return {"images": self.transform(self.picture, random.Random(str(item[1])))}


def test_masks_move_with_their_images():
    transform = train_transform((128, 64), padding=10, erasing=0.0)
    white = White(transform)
    box = (test_transform((128, 64))(white.picture)[0] > 0)[::8, ::8].reshape(1, 1, -1).expand(1, 3, -1)
    images, moved = WithMasks(white, box, (16, 8), transform), 0
    for key in range(40):
        draw = random.Random(str(key))
        draw.random()
        # A patch of which half has moved is white or black.
        if any(draw.randint(0, 20) - 10 in (-4, 4) for _ in range(2)):
            continue
        item = images[0, key]
        # The middles of the patches.
        wanted = (item["images"][0] > 0)[4::8, 4::8]
        assert all(torch.equal(mask.unflatten(0, (16, 8)), wanted) for mask in item["masks"])
        moved += not torch.equal(wanted, box[0, 0].unflatten(0, (16, 8)))
    assert moved > 10


def test_agreement_of_masks():
    seen = torch.tensor([[[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]]).bool()
    truth = torch.tensor([[[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1]]]).bool()
    assert dice(seen, truth) == pytest.approx((2 / 3 + 1 + 0) / 3)


def test_features_under_given_masks(clip, accelerator):
    model = part_model(clip).eval()
    data = load_reid("synthetic:domain=a,num_ids=2,images_per_id=3")["train"]
    masks = torch.rand(len(data), 3, 12) > 0.5
    transform = test_transform((32, 24))
    options = {"accelerator": accelerator, "batch_size": 4, "num_workers": 0, "desc": ""}
    found = extract_under(masks, model, data, transform, neck=False, **options)
    with torch.no_grad():
        wanted = model.backbone(torch.stack([transform(row["image"]) for row in data]), masks)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


# Runs


SMALL = ["--source", "synthetic:domain=a,num_ids=6,images_per_id=4", "--target", "synthetic:domain=b,num_ids=3"]
SMALL += [
    "--train_batch_size",
    "8",
    "--num_train_epochs",
    "2",
    "--eval_every",
    "9",
    "--diffusion_resolution",
    "64",
    "64",
]
SMALL += ["--encoder", "muva", "--muva_epochs", "2", "--validation_ids", "2"]


@pytest.fixture(scope="module")
def small(standins):
    folder = str(standins / "stable-diffusion")
    return [*SMALL, "--backbone", str(standins / "clip"), "--pretrained_model_name_or_path", folder]


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("muva")
    train(*small, "--probabilities", "text", "--output_dir", folder / "out", "--cache_dir", folder / "cache")
    return folder


@pytest.mark.slow
def test_what_a_run_leaves(finished, small, tmp_path, capsys):
    out = finished / "out"
    lines, words = log_of(out), [json.loads(line) for line in (out / "muva_log.jsonl").read_text().splitlines()]
    assert (
        len(lines) == 6 and len(words) == 6 and all(line["loss_text"] > 0 and line["loss_ldm"] > 0 for line in lines)
    )
    learned = load_file(out / "muva_prompts.safetensors")
    assert learned["words"].shape[:3] == (6, 4, NUM_WORDS) and learned["part_tokens"].shape[0] == 3
    notes = json.loads((out / "metrics.json").read_text())["masks"]
    assert [note["epoch"] for note in notes] == [0, 2] and notes[1]["dice source"] > notes[0]["dice source"]
    assert "Part masks" in (out / "report.html").read_text()
    assert ReIDModel.from_pretrained(out / "model").backbone.num_parts == 3
    # The same prompts from a file, and made alone, give the same training.
    common = [*small, "--probabilities", "text", "--cache_dir", finished / "cache"]
    train(*common, "--muva_stage", "prompts", "--output_dir", tmp_path / "alone")
    file = tmp_path / "alone" / "muva_prompts.safetensors"
    assert same_weights(load_file(file), learned) and not (tmp_path / "alone" / "log.jsonl").exists()
    assert json.loads((tmp_path / "alone" / "args.json").read_text())["arguments"]["diffusion"] == "none"
    train(*common, "--muva_prompts", file, "--output_dir", tmp_path / "given")
    assert (tmp_path / "given" / "log.jsonl").read_text() == (out / "log.jsonl").read_text()
    # A run that was killed after its first stage does not learn them again.
    capsys.readouterr()
    train(*common, "--output_dir", tmp_path / "alone", "--resume_from_checkpoint", "latest")
    assert "were learned before" in capsys.readouterr().out
    assert (tmp_path / "alone" / "log.jsonl").read_text() == (out / "log.jsonl").read_text()
    other = [*common, "--muva_epochs", "1", "--muva_stage", "prompts", "--resume_from_checkpoint", "latest"]
    prompts_alone = shutil.ignore_patterns("checkpoint-*")
    train(*other, "--output_dir", shutil.copytree(tmp_path / "alone", tmp_path / "other", ignore=prompts_alone))
    assert "were learned before" not in capsys.readouterr().out


@pytest.mark.slow
def test_resume_and_two_processes(finished, small, tmp_path):
    common = [*small, "--probabilities", "text", "--cache_dir", finished / "cache"]
    train(*common, "--max_train_steps", "4", "--output_dir", tmp_path / "cut")
    train(*common, "--resume_from_checkpoint", "latest", "--output_dir", tmp_path / "cut")
    assert (tmp_path / "cut" / "log.jsonl").read_text() == (finished / "out" / "log.jsonl").read_text()
    assert same_weights(weights_of(tmp_path / "cut"), weights_of(finished / "out"))
    launch(
        "train_dcac.py", *common, "--train_batch_size", "4", "--mixed_precision", "no", "--output_dir",
        tmp_path / "two", processes=2,
    )  # fmt: skip
    for left, right in zip(log_of(finished / "out"), log_of(tmp_path / "two"), strict=True):
        assert left == pytest.approx(right, rel=2e-3, abs=1e-4)


@pytest.mark.parametrize("flag, value", [("--memory_masks", "predicted"), ("--memory_resample", "bicubic")])
def test_the_memory_is_made_as_its_flags_say(small, tmp_path, capsys, flag, value):
    """One step: of the losses only the contrast with the memory is another."""
    common = [
        *small, "--diffusion", "none", "--resolution", "64", "32", "--muva_epochs", "1", "--max_train_steps", "1",
    ]  # fmt: skip
    train(*common, "--output_dir", tmp_path / "plain")
    # Prompts are learned from the memory's features too.
    prompts = tmp_path / "plain" / "muva_prompts.safetensors"
    train(*common, "--muva_prompts", prompts, flag, value, "--output_dir", tmp_path / "other")
    said = "The prompts of --muva_prompts were learned with --memory_resample bilinear, not bicubic"
    assert (said in capsys.readouterr().out) == (flag == "--memory_resample")
    (wanted,), (found,) = log_of(tmp_path / "plain"), log_of(tmp_path / "other")
    assert {name for name in wanted if found[name] != wanted[name]} == {"loss", "loss_pcl", "grad_norm"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["--diffusion", "none", "--part_masks", "rows", "--memory_masks", "predicted", "--mixed_precision", "bf16"],
        ["--probabilities", "parts", "--ldm_balance", "0.1", "--gradient_accumulation_steps", "2"],
        ["--probabilities", "text-mean", "--padding", "5", "--erasing", "0.5", "--gradient_checkpointing"],
        ["--condition", "instance"],
        ["--condition", "class"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_controls_and_conditions(finished, small, tmp_path, more):
    train(*small, *more, "--max_train_steps", "2", "--output_dir", tmp_path, "--cache_dir", finished / "cache")
    assert len(log_of(tmp_path)) == 2


@pytest.mark.slow
def test_bad_input(small, standins, finished, tmp_path, capsys):
    out, file = ["--output_dir", tmp_path / "out"], tmp_path / "masks.safetensors"
    part_masks.main(["synthetic:domain=b,num_ids=4", "--out", str(file)])
    assert "of another set" in refused(*small, *out, "--part_masks", file)
    part_masks.main([small[1], "--out", str(file), "--grid", "8", "4"])
    assert "are of 8 x 4 patches, and the encoder has 16 x 8" in refused(*small, *out, "--part_masks", file)
    words = finished / "out" / "muva_prompts.safetensors"
    other = ["--source", "synthetic:domain=a,num_ids=7,images_per_id=4"]
    assert "of 6 identities of other images" in refused(*small, *other, *out, "--muva_prompts", words)
    tensors, changed = load_file(words), tmp_path / "changed.safetensors"
    with safe_open(words, "pt") as opened:
        about = opened.metadata()
    save_file(tensors | {"part_tokens": torch.zeros(2, 8)}, changed, metadata=about)
    assert "has part tokens of 2 x 8, and the encoder's are of" in refused(*small, *out, "--muva_prompts", changed)
    changed.write_bytes(file.read_bytes())
    assert "has another format" in refused(*small, *out, "--muva_prompts", changed)

    assert "puts part tokens in a CLIP ViT" in refused(*small, *out, "--backbone", RESNET_DIR)
    tower = tmp_path / "tower"
    ReIDModel.from_backbone(standins / "clip", image_size=(128, 64)).backbone.save_pretrained(tower)
    assert "has no text encoder to learn prompts with" in refused(*small, *out, "--backbone", tower)
    part_masks.main(["synthetic:domain=a,num_ids=3,images_per_id=4", "--out", str(file)])
    train(*small, *out, "--part_masks", file, "--muva_stage", "prompts")
    assert "12 of 24 images have no part masks: every part is the whole image there" in capsys.readouterr().out
    assert not (tmp_path / "out" / "log.jsonl").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--probabilities", "text"], "give --encoder muva"),
        (["--encoder", "muva", "--muva_stage", "prompts", "--muva_prompts", "file"], "give one of them"),
        (["--encoder", "muva", "--part_masks", "rows", "file"], "give it alone"),
        (["--encoder", "muva", "--recipe", "ma-ms"], "--recipe ma-ms has DCAC's images and rates: give one of MUVA's"),
    ],
)
def test_arguments_that_cannot_be(arguments, words, capsys):
    with pytest.raises(SystemExit):
        train_dcac.parse_args(arguments)
    assert words in capsys.readouterr().err


def test_recipes_and_controls():
    args = train_dcac.parse_args(["--recipe", "muva-ms-ma", "--data_root", "/data"])
    assert (args.encoder, args.mask_heads, args.muva_epochs, args.diffusion) == ("muva", 8, 120, "none")
    assert (args.padding, args.erasing, args.memory_resample, args.test_resample) == (0, 0.0, "bilinear", "bilinear")
    assert (args.text_temperature, args.text_weight, args.mask_weight, args.mask_lr_multiplier) == (
        1.0,
        1.0,
        1.0,
        10.0,
    )
    args = train_dcac.parse_args(["--encoder", "muva", "--padding", "10"])
    assert (args.padding, args.erasing) == (10, 0.0)
    args = train_dcac.parse_args([])
    assert (args.padding, args.erasing, args.memory_resample) == (5, 0.5, "bicubic")
    assert set(settings.recipes(train_dcac.RECIPES)) <= set(train_dcac.RECIPES)
    # The demo's captions are no prompts of parts.
    args = train_dcac.parse_args(["--encoder", "muva", "--probabilities", "parts"])
    assert (args.demo, args.prompt_init, args.prompt_tokens) == (True, "random", "end")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["owlv2", "grounding-dino"])
def test_a_detector_by_name(kind, standins, tmp_path):
    from tests.methods.detectors import save_detector
    from utils.datasets.part_detector import PartDetector

    save_detector(kind, standins / "clip", tmp_path / kind)
    file = tmp_path / "masks.safetensors"
    spec = "synthetic:domain=a,num_ids=2,images_per_id=3"
    part_masks.main([spec, "--out", str(file), "--detector", str(tmp_path / kind), "--threshold", "0"])
    detector, data = PartDetector(str(tmp_path / kind), threshold=0.0), load_reid(spec)["train"]
    masks, _ = PartMasks.read([file]).of(data)
    for row, boxes in enumerate(detector([image["image"] for image in data])):
        for part, mask in zip(PARTS, masks[row].numpy(), strict=True):
            # Where it sees no part, that is the whole image.
            assert np.array_equal(mask, patches_in(boxes[part] or (0, 0, 1, 1), (16, 8)))
    if kind == "grounding-dino":
        scored_by_part(detector, data[0]["image"])
    # Nothing is sure enough: every part is the whole image.
    part_masks.main([spec, "--out", str(file), "--detector", str(tmp_path / kind), "--threshold", "1"])
    assert PartMasks.read([file]).of(data)[0].all()
    assert all(
        value is None
        for value in PartDetector(str(tmp_path / kind), threshold=1.0)([render("a", 0, 0, 0)])[0].values()
    )


def scored_by_part(detector, image):
    """The best box of the part's own words, not of those of the whole person."""
    processor, model, found = detector.processor, detector.model, detector([image])[0]
    for part in PARTS:
        inputs = processor(images=image, text=f"the {part} of the person.", return_tensors="pt")
        with torch.no_grad():
            outputs = model(**inputs)
        words = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
        own = [place for place, word in enumerate(words) if word in part.split()]
        assert len(own) == len(part.split())
        best = outputs.logits[0][:, own].max(1).values.argmax()
        x, y, wide, tall = outputs.pred_boxes[0, best].tolist()
        wanted = [x - wide / 2, y - tall / 2, x + wide / 2, y + tall / 2]
        assert found[part] == pytest.approx([min(max(edge, 0), 1) for edge in wanted], abs=1e-4)


def masks_in_chunks_of_two(*arguments):
    part_masks.CHUNK, compute = 2, part_masks.compute
    part_masks.compute = lambda images, rows, *more: print("computed", rows.start) or compute(images, rows, *more)
    part_masks.main([*map(str, arguments)])


@pytest.mark.slow
def test_two_processes_share_a_detector_s_work(standins, tmp_path):
    from tests.methods.detectors import save_detector

    save_detector("owlv2", standins / "clip", tmp_path / "owlv2")
    words = ("synthetic:domain=a,num_ids=2,images_per_id=5", "--detector", tmp_path / "owlv2", "--threshold", 0)
    alone, together = tmp_path / "alone", tmp_path / "together"
    runs.launch(masks_in_chunks_of_two, *words, "--out", alone)
    done = runs.launch(masks_in_chunks_of_two, *words, "--out", together, processes=2)
    ours, others = load_file(together), load_file(alone)
    assert all(torch.equal(ours[name], others[name]) for name in ("keys", "masks"))
    assert not list(tmp_path.glob("*.parts"))
    # Each chunk once, by one of them.
    assert sorted(re.findall("computed ([0-9])", done.stdout)) == list("02468")
    assert done.stdout.count("wrote ") == 1 and "10 images" in done.stdout

"""What the authors' code has beside the papers: norms of groups, earlier batches, capped losses, pooling, resizing."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import nn
from transformers import ResNetConfig, ResNetModel

from adapt_reid import parse_args
from methods.idm import IDM
from methods.spcl import HybridMemory
from tests.methods.reference import close, unit
from utils.batches.augmentation import view_transform
from utils.batches.transforms import test_transform
from utils.modeling.backbones import recompute
from utils.modeling.domain_norms import group_batch_statistics
from utils.modeling.heads import add_gem
from utils.modeling.reid_model import BNNeck, ReIDModel
from utils.training.contrast import FeatureQueue


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resnet")
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    ResNetModel(ResNetConfig(**sizes)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("make, shape", [(nn.BatchNorm2d, (6, 4, 3, 2)), (BNNeck, (6, 4))])
def test_norms_of_groups_by_formulas(make, shape):
    torch.manual_seed(0)
    norm, images = make(4), 2 + 3 * torch.randn(shape)
    nn.init.normal_(norm.weight)
    model = nn.Sequential(norm)
    group_batch_statistics(model, 2)
    found = model(images)
    groups = images.double().split(2)
    others = tuple(dim for dim in range(len(shape)) if dim != 1)
    form = [-1 if dim == 1 else 1 for dim in range(len(shape))]
    wanted, means, variances = [], [], []
    for group in groups:
        mean, variance = group.mean(others, keepdim=True), group.var(others, correction=0, keepdim=True)
        normed = (group - mean) / (variance + norm.eps).sqrt()
        wanted.append(normed * norm.weight.detach().double().view(form) + norm.bias.detach().double().view(form))
        means.append(mean.flatten())
        variances.append(group.var(others))
    close("norms of groups", found, torch.cat(wanted))
    close("their average", norm.running_mean, 0.1 * torch.stack(means).mean(0))
    close("their variance", norm.running_var, 0.9 + 0.1 * torch.stack(variances).mean(0))
    assert norm.num_batches_tracked == 1
    # Activations that are computed a second time move nothing.
    before = copy.deepcopy(norm.state_dict())
    with recompute(model)[1] if make is nn.BatchNorm2d else torch.no_grad():
        model(images) if make is nn.BatchNorm2d else None
    assert all(torch.equal(before[name], tensor) for name, tensor in norm.state_dict().items())
    plain = make(4)
    plain.load_state_dict(norm.state_dict())
    assert torch.equal(model.eval()(images), plain.eval()(images))
    with pytest.raises(ValueError, match="5 images cannot be normalised in groups of 2"):
        model.train()(images[:5])


def test_triplets_with_earlier_batches_by_formulas(resnet):
    arguments = ["--setting", "adaptation", "--source", "x", "--target", "y", "--method", "idm", "--margin", "0.4"]
    args = parse_args([*arguments, "--earlier_weight", "0.7"])
    encoder = ReIDModel.for_training(resnet, num_ids=0, image_size=(64, 32))
    model = IDM(encoder, args, 3, torch.zeros(6), source_size=5)
    queue = []
    for step in range(3):
        # Labels move from epoch to epoch; the queue keeps those of its time.
        model.pseudo_labels.copy_(torch.tensor([0, 0, 1, 1, 2, 2]).roll(step))
        rows = torch.tensor([0, 1, 3, 5]) if step % 2 else torch.tensor([2, 2, 4, 8])
        features = 3 * unit(6, 16, seed=step).float()
        loss, values = model.bridged_losses(
            features, unit(6, 9, seed=9).float(), rows, torch.tensor([[0.3, 0.7], [0.6, 0.4]])
        )
        classes = [row if row < 3 else 3 + int(model.pseudo_labels[row - 3]) for row in rows.tolist()]
        queue = [*queue, *zip(features.double(), classes, strict=False)][-11:]
        terms = []
        for feature, label in zip(features[:4].double(), classes, strict=True):
            apart = [(float((feature - other).norm()), name == label) for other, name in queue]
            farthest = max(distance for distance, same in apart if same)
            nearest = min(distance for distance, same in apart if not same)
            terms.append(max(0.0, farthest - nearest + 0.4))
        close("earlier batches", values["loss_earlier"], sum(terms) / 4)
        rest = sum(
            weight * values[f"loss_{name}"]
            for name, weight in (("id", 0.3), ("mixed", 0.7), ("triplet", 1), ("bridge", 0.1), ("diversity", 1))
        )
        close("with them", loss, rest + 0.7 * values["loss_earlier"])
    assert len(model.earlier.labels) == 11 and int(model.earlier.place) == 12 % 11


def test_a_queue_holds_the_last_ones():
    queue = FeatureQueue(5, 2)
    for start in (0, 3, 6):
        queue.add(torch.full((3, 2), float(start)), torch.arange(start, start + 3))
    assert sorted(queue.labels.tolist()) == [4, 5, 6, 7, 8] and int(queue.place) == 4
    assert all(
        float(row[0]) == label // 3 * 3 for row, label in zip(queue.features, queue.labels.tolist(), strict=True)
    )


def test_the_capped_loss_of_spcl_by_formulas():
    rows, features = unit(9, 16).float(), 2 * unit(6, 16, seed=2).float()
    memory = HybridMemory(rows, 0.01, 0.4, floor=1e-6)
    memory.labels.copy_(torch.tensor([0, 1, 2, 2, 3, 6, 3, 2, 7]))
    asked = torch.tensor([0, 5, 2, 0, 8, 2])
    similar = F.normalize(features.double(), dim=1) @ rows.double().t() / 0.01
    present = memory.labels.unique().tolist()
    means = torch.stack([similar[:, memory.labels == label].mean(1) for label in present], dim=1)
    places = torch.tensor([present.index(label) for label in memory.labels[asked].tolist()])
    own = means.softmax(1)[torch.arange(6), places]
    assert own.min() < 1e-6 < own.max()
    close("loss with a floor", memory(features, asked), -(own + 1e-6).log().mean())
    memory.floor = 0.0
    close("loss without", memory(features, asked), -means.log_softmax(1)[torch.arange(6), places].mean())


def test_a_learned_pooling_is_saved_with_the_model(resnet, standins, tmp_path):
    model = ReIDModel.for_training(resnet, num_ids=0, image_size=(64, 32), resample="bicubic")
    add_gem(model.backbone)
    with torch.no_grad():
        model.backbone.pooling.power.fill_(2.5)
    images = torch.randn(2, 3, 64, 32)
    maps = model.backbone.feature_map(images).double().clamp(min=1e-6)
    close("GeM", model.backbone(images), maps.pow(2.5).mean((2, 3)).pow(1 / 2.5))
    model.eval().save_pretrained(tmp_path)
    opened = ReIDModel.from_pretrained(tmp_path)
    assert torch.equal(opened(images), model(images)) and opened.resample == "bicubic"
    with pytest.raises(ValueError, match="GeM pools maps, and a clip_vision_model gives its class token"):
        add_gem(ReIDModel.for_training(standins / "clip", num_ids=0, image_size=(64, 32)).backbone)


def test_views_of_an_image():
    image = Image.effect_noise((32, 64), 80).convert("RGB")
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    views = view_transform(
        ("changed", "plain"), (64, 32), mean, std, flip=0.0, padding=0, erasing=1.0, erasing_value=[0.1, 0.2, 0.3],
        blur=1.0,
    )(image, random.Random(0))  # fmt: skip
    plain = test_transform((64, 32), mean, std, "bicubic")
    assert torch.equal(views[1], plain(image))
    sigma = random.Random(0)
    # Draws: the flip, whether to blur, how much.
    sigma = [sigma.random(), sigma.random(), sigma.uniform(0.1, 2.0)][2]
    blurred = plain(image.filter(ImageFilter.GaussianBlur(sigma)))
    erased = (views[0] == torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)).all(0)
    assert 40 <= erased.sum() <= 820
    assert torch.equal(views[0][:, ~erased], blurred[:, ~erased]) and not torch.equal(blurred, plain(image))


def test_recipes_have_what_the_authors_have():
    for name, pooling, jaccard, group in (
        ("cluster-contrast", "gem", "faiss", 64), ("spcl", "mean", "faiss", 16), ("idm", "mean", "paper", 16),
    ):  # fmt: skip
        args = parse_args(["--recipe", name])
        assert (args.pooling, args.jaccard, args.norm_group, args.test_resample) == (
            pooling,
            jaccard,
            group,
            "bicubic",
        )
        assert args.erasing_value == [0.485, 0.456, 0.406]
    assert parse_args(["--recipe", "idm"]).earlier_weight == 1 and parse_args([]).earlier_weight == 0
    assert parse_args(["--recipe", "spcl"]).probability_floor == 1e-6

"""ICE: teacher, centres, proxies and every loss by formulas in float64."""

import random

import pytest
import torch

from adapt_reid import parse_args
from methods.ice import ICE
from tests.methods.reference import close, unit
from tests.methods.test_pplr import CAMERAS, LABELS, contrast_of, proxies_of
from utils.batches.pseudo_batches import of_every_camera
from utils.modeling.domain_norms import group_batch_statistics
from utils.modeling.reid_model import ReIDModel
from utils.training.checkpoints import changing_tensors


def module(standins, *more):
    torch.manual_seed(0)
    args = parse_args(["--target", "x", "--method", "ice", "--centre_temperature", "0.4", "--view_temperature", "0.2",
                       "--proxy_temperature", "0.2", "--hard_proxies", "3", "--camera_weight", "0.7",
                       "--consistency_temperature", "0.3", "--consistency_weight", "4", "--label_smoothing", "0.2",
                       "--teacher_momentum", "0.9", *more])  # fmt: skip
    encoder = ReIDModel.for_training(standins / "clip", num_ids=0, image_size=(64, 32))
    return ICE(encoder, args, 0, CAMERAS)


@pytest.mark.parametrize("scale", ["unit", "columns"])
@torch.no_grad()
def test_losses_by_formulas(standins, scale):
    model = module(standins, "--proxy_scale", scale)
    known = unit(14, model.encoder.num_features)
    model.pseudo_labels.copy_(model.relabel(1, lambda: known.float(), None, lambda features: LABELS))
    centres = torch.stack([known[label == LABELS].mean(0) for label in range(4)])
    close("ICE centres", model.centres, centres)
    rows = torch.tensor([0, 1, 4, 5, 7, 8, 10, 12])
    q, k, w = (4 * unit(8, known.shape[1], seed=seed) for seed in (1, 2, 3))
    loss, values = model.losses(q.float(), k.float(), w.float(), rows)
    y, cameras, proxies = LABELS[rows].tolist(), CAMERAS[rows].tolist(), proxies_of(known)
    if scale == "columns":
        lengths = torch.stack(list(proxies.values())).norm(dim=0)
        proxies = {key: proxy / lengths for key, proxy in proxies.items()}
    by_centre, by_view, by_camera, apart = [], [], {}, 0.0
    odds = (q @ centres.t() / 0.4).log_softmax(1)
    q1, k1, w1 = (side / side.norm(dim=1, keepdim=True) for side in (q, k, w))
    likeness = q1 @ k1.t()
    student, teacher = ((side / 0.3).log_softmax(1) for side in (likeness, w1 @ w1.t()))
    for row, label in enumerate(y):
        by_centre.append(-(0.8 * odds[row][label] + 0.2 * odds[row].mean()))
        hardest = min(likeness[row, other] for other in range(8) if y[other] == label)
        others = [likeness[row, other] for other in range(8) if y[other] != label]
        by_view.append(-(torch.stack([hardest, *others]) / 0.2).log_softmax(0)[0])
        contrast = contrast_of(q[row], label, cameras[row], proxies, 3, 0.2, own_too=True)
        by_camera.setdefault(cameras[row], []).append(contrast)
        apart += sum(teacher[row, other].exp() * (teacher[row, other] - student[row, other]) for other in range(8))
    wanted = {
        "centres": sum(by_centre) / 8,
        "views": sum(by_view) / 8,
        "cameras": 0.7 * sum(sum(found) / len(found) for found in by_camera.values()),
        "same": 4 * apart / 8,
    }
    for name, want in wanted.items():
        close(f"ICE loss_{name}", values[f"loss_{name}"], want)
    close("ICE loss", loss, sum(wanted.values()))


@pytest.mark.parametrize("kind", ["clip", "resnet", "swin"])
def test_teacher_by_formulas(standins, tmp_path, kind):
    """A running mean of parameters alone; it normalises by itself, and a checkpoint holds it whole."""
    from transformers import ResNetConfig, ResNetModel, SwinConfig, SwinModel

    place = standins / "clip"
    if kind == "resnet":
        ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])).save_pretrained(tmp_path)
        place = tmp_path
    if kind == "swin":
        SwinModel(SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=4)).save_pretrained(tmp_path)
        place = tmp_path
    args = parse_args(["--target", "x", "--method", "ice", "--teacher_momentum", "0.9"])
    encoder = ReIDModel.for_training(place, num_ids=0, image_size=(64, 32))
    model = ICE(encoder, args, 0, CAMERAS).train()
    assert not list(model.teacher.parameters())
    wanted = {name: value.detach().double() for name, value in encoder.named_parameters()}
    for step in range(3):
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        model.after_step()
        wanted = {name: 0.9 * wanted[name] + 0.1 * value.double() for name, value in encoder.named_parameters()}
        assert int(model.num_steps) == step + 1
    found = model.teacher.state_dict()
    close(f"ICE teacher ({kind})", *(torch.cat([side[name].flatten() for name in wanted]) for side in (found, wanted)))
    # The three views pass through one after the other: the student's norms see two, the teacher's two others.
    model.pseudo_labels.copy_(LABELS.clamp(min=0))
    model.centres, model.proxies = torch.randn(4, encoder.num_features), torch.randn(5, encoder.num_features)
    model.proxy_labels = torch.arange(5) % 4
    images = torch.randn(4, 3, 3, 64, 32)
    before = {name: value.clone() for name, value in model.teacher.state_dict().items() if "running" in name}
    loss, _, seen = model(images, torch.tensor([0, 1, 4, 5]))
    loss.backward()
    assert seen == () and all(weight.grad is not None for weight in encoder.backbone.model.parameters()
                              if weight.requires_grad and weight.grad_fn is None and kind == "resnet")  # fmt: skip
    assert int(encoder.bnneck.num_batches_tracked) == int(model.teacher.bnneck.num_batches_tracked) == 2
    assert all(not torch.equal(model.teacher.state_dict()[name], value) for name, value in before.items())
    kept = changing_tensors(model)
    assert {f"teacher.{name}" for name in found} <= kept.keys()
    # What is tested is whole: saved, and opened as a model.
    model.tested().eval().save_pretrained(tmp_path / "out")
    opened = ReIDModel.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(opened(images[:, 0]), model.teacher(images[:, 0]))


def test_shuffled_images_come_back(standins):
    model = module(standins, "--norm_group", "4")
    group_batch_statistics(model.encoder, 4)
    images = torch.arange(8.0).view(8, 1)
    shuffled, back = model.shuffled(images)
    assert not torch.equal(shuffled, images) and torch.equal(shuffled[back], images)
    assert torch.equal(model.shuffled(images)[0], shuffled)
    model.num_steps += 1
    assert not torch.equal(model.shuffled(images)[0], shuffled)
    assert module(standins).shuffled(images)[1] is None


def test_a_group_has_as_many_cameras_as_there_are():
    cameras = [0, 0, 0, 1, 1, 2, 3, 3, 0, 0]
    rng = random.Random(0)
    seen = set()
    for _ in range(50):
        many = of_every_camera(rng, list(range(8)), 3, cameras)
        assert len({cameras[row] for row in many}) == 3
        seen.update(many)
        few = of_every_camera(rng, [0, 1, 2, 3], 3, cameras)
        assert {cameras[row] for row in few} == {0, 1} and len(set(few)) == 3
        short = of_every_camera(rng, [3, 5, 4], 5, cameras)
        assert {3, 4, 5} == set(short) and len(short) == 5
        assert set(of_every_camera(rng, [3, 5], 4, cameras)) <= {3, 5}
    assert seen == set(range(8))

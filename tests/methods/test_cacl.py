"""CaCL: stages, MMD, entropies and the loss by formulas in float64."""

import math

import pytest
import torch

from adapt_reid import parse_args
from methods.cacl import CaCL, camera_entropy, stage_of
from tests.methods.reference import close, unit
from tests.methods.test_pplr import CAMERAS, LABELS
from utils.modeling.reid_model import ReIDModel
from utils.training.discrepancy import mean_discrepancy

ARGUMENTS = ["--setting", "adaptation", "--source", "x", "--target", "y", "--method", "cacl"]


def test_discrepancy_by_formulas():
    first, second = unit(9, 5), unit(7, 5, seed=1) + 0.3
    both = [*first, *second]
    apart = sorted(float((both[i] - both[j]).norm()) for i in range(16) for j in range(i))
    median = apart[(len(apart) - 1) // 2]

    def kernel(one, other):
        return sum(math.exp(-(float((one - other).norm()) ** 2) / (2 * (2.0**j * median) ** 2)) for j in range(-2, 3))

    def mean(some, others):
        return sum(kernel(one, other) for one in some for other in others) / len(some) / len(others)

    wanted = mean(first, first) + mean(second, second) - 2 * mean(first, second)
    close("CaCL discrepancy", mean_discrepancy(first.float(), second.float()), wanted)
    assert wanted > 0.01 and mean_discrepancy(first, first) == pytest.approx(0, abs=1e-12)


def test_entropy_of_cameras_by_formulas():
    inside = LABELS >= 0
    wanted = []
    for label in range(4):
        seen = CAMERAS[label == LABELS].tolist()
        shares = [seen.count(camera) / len(seen) for camera in set(seen)]
        wanted.append(-sum(share * math.log(share) for share in shares))
    close("CaCL weights", camera_entropy(LABELS[inside], CAMERAS[inside], 4), wanted)
    assert camera_entropy(torch.tensor([0, 0]), torch.tensor([1, 1]), 1).tolist() == [0]


def test_stages():
    assert [stage_of(epoch, 50, 6) for epoch in (1, 5, 6, 25, 26, 50)] == [1, 1, 2, 5, 6, 6]
    assert [stage_of(epoch, 5, 4) for epoch in range(1, 6)] == [1, 2, 3, 4, 4]
    assert [stage_of(epoch, 3, 1) for epoch in range(1, 4)] == [1, 1, 1]
    assert stage_of(1, 1, 8) == 1


def module(standins, *more):
    args = parse_args([*ARGUMENTS, "--cluster_k1", "1", "--label_smoothing", "0.2", *more])
    encoder = ReIDModel.for_training(standins / "clip", num_ids=0, image_size=(64, 32))
    return CaCL(encoder, args, 3, CAMERAS, source_size=8)


@torch.no_grad()
def test_cameras_come_by_their_distance_and_the_loss_by_formulas(standins):
    model = module(standins, "--num_train_epochs", "4")
    known, features = unit(8, model.encoder.num_features), unit(14, model.encoder.num_features, seed=1)
    # Camera 1 is like the source, 0 less so.
    features[CAMERAS == 1] = known[0] + 0.3 * features[CAMERAS == 1]
    features[CAMERAS == 0] = known[1] + 0.9 * features[CAMERAS == 0]
    features = features / features.norm(dim=1, keepdim=True)
    asked = []

    def source(rows=None):
        return known.float()[:3] if rows is None else known.float()[rows]

    def cluster(some, rows):
        asked.append(rows.tolist())
        torch.testing.assert_close(some, features[rows].float())
        return LABELS[rows]

    apart = [mean_discrepancy(known, features[camera == CAMERAS]) for camera in range(3)]
    order = sorted(range(3), key=apart.__getitem__)
    seen = []
    for epoch in range(1, 5):
        labels = model.relabel(epoch, lambda: features.float(), source, cluster)
        seen.append(sorted(model.active.nonzero().flatten().tolist()))
        assert asked[-1] == [row for row in range(14) if CAMERAS[row] in seen[-1]]
        assert ((labels >= 0) <= torch.isin(CAMERAS, torch.tensor(seen[-1]))).all()
        if epoch == 1:
            assert (model.weights == 1).all()
    assert seen == [order[:1], sorted(order[:2]), [0, 1, 2], [0, 1, 2]]
    weight = model.encoder.classifier.weight
    means = torch.stack([features[label == LABELS].mean(0) for label in range(4)])
    close("CaCL classifier", weight[:7], torch.cat([known[:3], means / means.norm(dim=1, keepdim=True)]))

    model.pseudo_labels.copy_(labels)
    rows = torch.tensor([0, 2, 1, 1, 3, 4, 10, 13])
    logits = 3 * unit(8, 17)
    loss, values = model.losses(logits.float(), rows)
    odds = logits[:, :7].log_softmax(1)
    classes = [0, 2, 1, 1, *(3 + int(LABELS[row - 3]) for row in rows[4:].tolist())]
    each = [-(0.8 * odds[row][label] + 0.2 * odds[row].mean()) for row, label in enumerate(classes)]
    inside = LABELS >= 0
    entropy = camera_entropy(LABELS[inside], CAMERAS[inside], 4).double()
    shares = [float(entropy[label - 3]) for label in classes[4:]]
    wanted = sum(each[:4]) / 4, sum(s * one for s, one in zip(shares, each[4:], strict=True)) / sum(shares)
    close("CaCL loss_source", values["loss_source"], wanted[0])
    close("CaCL loss_target", values["loss_target"], wanted[1])
    close("CaCL loss", loss, sum(wanted))
    # No cluster of two cameras: the source alone.
    model.weights = torch.zeros(4)
    assert model.losses(logits.float(), rows)[1]["loss_target"] == 0


@torch.no_grad()
def test_a_camera_with_too_few_images_does_not_start_alone(standins):
    model = module(standins, "--num_train_epochs", "40", "--cluster_k1", "4")
    features = unit(14, model.encoder.num_features).float()
    model.relabel(1, lambda: features, lambda rows=None: features[:3] if rows is None else features[rows],
                  lambda some, rows: LABELS[rows])  # fmt: skip
    counts = CAMERAS.bincount()
    assert int(model.active.sum()) == 2 and counts[model.active].sum() > 8

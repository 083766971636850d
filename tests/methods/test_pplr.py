"""PPLR: agreement, proxies and every loss by formulas in float64."""

import math

import pytest
import torch

from adapt_reid import parse_args
from methods.pplr import PPLR, PartFeatures
from tests.methods.reference import close, unit
from utils.modeling.reid_model import ReIDModel
from utils.training.agreement import neighbour_agreement
from utils.training.contrast import camera_proxies, proxy_contrast

CAMERAS = torch.tensor([0, 1, 2, 0, 0, 1, 0, 2, 1, 1, 0, 2, 2, 0])
LABELS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, -1, 3, 3, 3, -1])


def nearest(features, row, count):
    cosines = features @ features[row]
    return set(sorted((other for other in range(len(features)) if other != row), key=lambda o: -cosines[o])[:count])


def test_agreement_by_formulas():
    whole, parts = unit(40, 6), [unit(40, 6, seed=1) + unit(40, 6), unit(40, 6, seed=2)]
    wanted = torch.zeros(40, 2, dtype=torch.float64)
    for row in range(40):
        for number, part in enumerate(parts):
            a, b = nearest(whole, row, 7), nearest(part / part.norm(dim=1, keepdim=True), row, 7)
            wanted[row, number] = len(a & b) / len(a | b)
    found = neighbour_agreement(whole.float(), [part.float() for part in parts], 7)
    close("PPLR agreement", found, wanted)
    assert len(wanted.unique()) > 4 and wanted[:, 0].mean() > wanted[:, 1].mean()
    # Fewer images than neighbours: all of them, on both sides.
    assert (neighbour_agreement(whole[:5].float(), [parts[0][:5].float()], 20) == 1).all()


def proxies_of(features):
    found = {}
    for label in range(4):
        for camera in range(3):
            rows = features[(label == LABELS) & (camera == CAMERAS)]
            if len(rows):
                mean = rows.mean(0)
                found[label, camera] = mean / mean.norm()
    return found


def contrast_of(feature, label, camera, proxies, hard, temperature, own_too=False):
    """-log softmax of each positive, against the positives and the hardest of others; 0 without positives."""
    feature = feature / feature.norm()
    scores = {key: float(feature @ proxy) / temperature for key, proxy in proxies.items()}
    positives = [scores[key] for key in scores if key[0] == label and (own_too or key[1] != camera)]
    others = sorted((scores[key] for key in scores if key[0] != label), reverse=True)[:hard]
    if not positives:
        return 0.0
    total = sum(math.exp(score) for score in positives + others)
    return -sum(score - math.log(total) for score in positives) / len(positives)


@pytest.mark.parametrize("hard", [2, 50])
def test_proxies_and_their_contrast_by_formulas(hard):
    known = unit(14, 6)
    proxies, proxy_labels, proxy_cameras = camera_proxies(known.float(), LABELS, CAMERAS)
    wanted = proxies_of(known)
    assert list(wanted) == list(zip(proxy_labels.tolist(), proxy_cameras.tolist(), strict=True))
    close("camera proxies", proxies, torch.stack(list(wanted.values())))
    features = 3 * unit(14, 6, seed=3)[:9]
    own = LABELS[:9, None] == proxy_labels
    positive = own & (CAMERAS[:9, None] != proxy_cameras)
    asked = features.float().requires_grad_()
    found = proxy_contrast(asked, proxies, own, positive, hard, 0.2)
    places = zip(features, LABELS.tolist(), CAMERAS.tolist(), strict=False)
    close("camera contrast", found, [contrast_of(*place, wanted, hard, 0.2) for place in places])
    # Without a proxy of another camera nothing is asked, and the gradient is 0.
    alone = proxy_contrast(asked, proxies, own, torch.zeros_like(own), hard, 0.2)
    assert (alone == 0).all() and (torch.autograd.grad(alone.sum(), asked)[0] == 0).all()


@pytest.fixture
def model(standins):
    torch.manual_seed(0)
    args = parse_args(["--target", "x", "--method", "pplr", "--label_weight", "0.6", "--proxy_temperature", "0.2",
                       "--agreement_neighbours", "4", "--hard_proxies", "3", "--camera_weight", "0.7"])  # fmt: skip
    encoder = ReIDModel.for_training(standins / "clip", num_ids=0, image_size=(64, 32))
    return PPLR(encoder, args, 0, CAMERAS)


@pytest.mark.parametrize("epoch", [1, 2])
@torch.no_grad()
def test_losses_by_formulas(model, epoch):
    width = model.encoder.num_features
    sides = [unit(14, width, seed=seed).float() for seed in range(4)]
    labels = model.relabel(epoch, lambda extractor: torch.cat(sides, 1), None, lambda features: LABELS)
    model.pseudo_labels.copy_(labels)
    for classifier, side in zip([model.encoder.classifier, *model.classifiers], sides, strict=True):
        means = torch.stack([side[label == LABELS].double().mean(0) for label in range(4)])
        close("PPLR classifiers", classifier.weight[:4], means / means.norm(dim=1, keepdim=True))
    rows = torch.tensor([0, 1, 4, 5, 7, 8, 10, 12])
    features = [5 * unit(8, width, seed=10 + seed) for seed in range(4)]
    logits = [3 * unit(8, 4, seed=20 + seed) for seed in range(4)]
    loss, values = model.losses([side.float() for side in features], [side.float() for side in logits], rows)

    y, a = LABELS[rows].tolist(), model.agreement[rows].double()
    odds = [side.log_softmax(1) for side in logits]
    whole, parts, cameras = [], [], []
    proxies = [proxies_of(side.double()) for side in sides]
    for row, label in enumerate(y):
        shares = a[row].exp() / a[row].exp().sum()
        wanted = 0.6 * torch.eye(4, dtype=torch.float64)[label]
        wanted = wanted + 0.4 * sum(share * part[row].exp() for share, part in zip(shares, odds[1:], strict=True))
        whole.append(-(wanted * odds[0][row]).sum())
        for number, part in enumerate(odds[1:]):
            if epoch == 1:
                parts.append(-(0.9 * part[row][label] + 0.1 * part[row].mean()))
            else:
                apart = sum(0.25 * (math.log(0.25) - float(value)) for value in part[row])
                parts.append(-a[row, number] * part[row][label] + (1 - a[row, number]) * apart)
        place = label, int(CAMERAS[rows[row]])
        found = [contrast_of(side[row], *place, own, 3, 0.2) for side, own in zip(features, proxies, strict=True)]
        cameras.append(found[0] + sum(found[1:]) / 3)
    triplet = []
    for row, label in enumerate(y):
        apart = [(float((features[0][row] - other).norm()), label == y[number]) for number, other in
                 enumerate(features[0])]  # fmt: skip
        gap = max(d for d, same in apart if same) - min(d for d, same in apart if not same)
        triplet.append(math.log(1 + math.exp(gap)))
    mean = [sum(map(float, side)) / len(side) for side in (whole, parts, triplet, cameras)]
    for name, want in zip(("whole", "parts", "triplet", "cameras"), mean, strict=True):
        close(f"PPLR loss_{name} (epoch {epoch})", values[f"loss_{name}"], want)
    close("PPLR loss", loss, mean[0] + mean[1] + mean[2] + 0.7 * mean[3])


def test_features_and_parts(model):
    """The features that are clustered are those of the tested model; stripes are means of the map's rows."""
    images = torch.randn(3, 3, 64, 32)
    model.eval()
    with torch.no_grad():
        sides = PartFeatures(model)(images).chunk(4, 1)
        torch.testing.assert_close(sides[0], model.encoder(images))
        feature_map = model.encoder.backbone.feature_map(images)
        rows = feature_map.shape[2]
        for number, side in enumerate(sides[1:]):
            first, last = rows * number // 3, -(-rows * (number + 1) // 3)
            stripe = feature_map[:, :, first:last].mean((2, 3))
            torch.testing.assert_close(side, torch.nn.functional.normalize(stripe / (1 + 1e-5) ** 0.5, dim=1))


def test_more_clusters_than_rows(model):
    model.encoder.reset_classifier(3)
    with pytest.raises(ValueError, match="4 clusters, and the classifiers have 3 rows: raise --class_rows"):
        sides = torch.randn(14, 4 * model.encoder.num_features)
        model.relabel(1, lambda extractor: sides, None, lambda features: LABELS)

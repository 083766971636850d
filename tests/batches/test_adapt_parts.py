"""Parts of training on pseudo labels against their definitions: memories, criteria, norms of domains, batches."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from methods.cluster_contrast import ClusterMemory
from methods.spcl import HybridMemory
from utils.batches.pseudo_batches import PseudoBatches, in_groups
from utils.datasets.load import load_reid
from utils.evaluation.groups.clusters import NOISE
from utils.modeling.domain_norms import DomainNorm, join_norms, split_norms
from utils.reporting.report import Report
from utils.training.cluster_report import add_contact_sheet
from utils.training.clustering import Clusters, reliable


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


# Memories


@pytest.mark.parametrize("mode", ["momentum", "hard", "mean"])
def test_update_of_cluster_memory(mode):
    start, features = unit(5, 16), 3 * unit(12, 16, seed=1)
    labels = torch.tensor([0, 0, 0, 3, 3, 3, 3, 4, 0, 4, 3, 4])
    memory = ClusterMemory(start, 0.05, 0.3, mode)
    memory.update(features, labels)
    want = start.double().clone()
    rows = (features.double() / features.double().norm(dim=1, keepdim=True)).split(1)
    for label in (0, 3, 4):
        own = [row[0] for row, one in zip(rows, labels.tolist(), strict=True) if one == label]
        if mode == "mean":
            own = [torch.stack(own).mean(0)]
        if mode == "hard":
            own = [min(own, key=lambda row: float(row @ want[label]))]
        for row in own:
            moved = 0.3 * want[label] + 0.7 * row
            want[label] = moved / moved.norm()
    torch.testing.assert_close(memory.prototypes.double(), want, rtol=1e-5, atol=1e-6)


def test_loss_and_renewal_of_cluster_memory():
    memory = ClusterMemory(torch.zeros(1, 8), 0.1, 0.1)
    features, labels = unit(10, 8), torch.tensor([0, 0, -1, 1, 1, 1, 2, 2, -1, 2])
    memory.renew(features, labels)
    means = torch.stack([features[labels == label].mean(0) for label in range(3)])
    torch.testing.assert_close(memory.prototypes, F.normalize(means, dim=1))
    asked = (2 * unit(4, 8, seed=3)).requires_grad_()
    loss = memory(asked, torch.tensor([2, 0, 1, 1]))
    scores = (F.normalize(asked, dim=1) @ memory.prototypes.t() / 0.1).log_softmax(1)
    torch.testing.assert_close(loss, -scores[range(4), [2, 0, 1, 1]].mean())
    loss.backward()
    assert asked.grad.abs().sum() > 0 and not memory.prototypes.requires_grad


def hybrid_loss(memory, features, rows, temperature):
    """As it is written: similarities with all rows, their mean over each label, a softmax over labels that are."""
    similar = F.normalize(features.double(), dim=1) @ memory.prototypes.double().t() / temperature
    present = memory.labels.unique()
    means = torch.stack([similar[:, memory.labels == label].mean(1) for label in present.tolist()], dim=1)
    places = torch.searchsorted(present, memory.labels[rows])
    return -means.log_softmax(1)[torch.arange(len(rows)), places].mean()


def test_hybrid_memory():
    memory = HybridMemory(unit(9, 16), 0.07, 0.4)
    # Two source identities, three clusters, and labels that nobody has in between.
    memory.labels.copy_(torch.tensor([0, 1, 2, 2, 3, 6, 3, 2, 7]))
    features, rows = 2 * unit(6, 16, seed=2), torch.tensor([0, 5, 2, 0, 8, 2])
    torch.testing.assert_close(memory(features, rows).double(), hybrid_loss(memory, features, rows, 0.07))
    want = memory.prototypes.clone()
    for feature, row in zip(F.normalize(features, dim=1), rows.tolist(), strict=True):
        want[row] = F.normalize(0.4 * want[row] + 0.6 * feature, dim=0)
    memory.update(features, rows)
    torch.testing.assert_close(memory.prototypes, want)


# Self-paced criteria


def by_the_definition(middle, tight, loose, quantile=0.9):
    """Sets, image by image; the quantile of all clusters of several images, by sorting."""

    def sets(labels):
        return [
            {j for j in range(len(labels)) if j == i or labels[i] == labels[j] != NOISE} for i in range(len(labels))
        ]

    ours, tighter, looser = sets(middle), sets(tight), sets(loose)
    independence = [1 - len(a & b) / len(a | b) for a, b in zip(ours, looser, strict=True)]
    compactness = [1 - len(a & b) / len(a | b) for a, b in zip(ours, tighter, strict=True)]
    clusters = sorted(set(middle) - {NOISE})
    best = {c: min(independence[i] for i in range(len(middle)) if middle[i] == c) for c in clusters}
    ordered = sorted(value for label, value in best.items() if middle.count(label) > 1)
    threshold = ordered[min(len(ordered) - 1, round(quantile * len(ordered)))]
    kept = []
    for i, label in enumerate(middle):
        own = [compactness[j] for j in range(len(middle)) if middle[j] == label]
        kept.append(label != NOISE and best[label] <= threshold and compactness[i] <= min(own))
    left = [label if keep else NOISE for label, keep in zip(middle, kept, strict=True)]
    left = [label if left.count(label) > 1 else NOISE for label in left]
    names = {label: number for number, label in enumerate(sorted(set(left) - {NOISE}))}
    return [names.get(label, NOISE) for label in left], threshold


def clusters_of(labels):
    return Clusters(torch.tensor(labels), torch.zeros(len(labels)), 0.5, 4)


def test_unreliable_clusters_are_dissolved():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        loose = torch.randint(-1, 5, (60,), generator=generator)
        middle = torch.where(torch.rand(60, generator=generator) < 0.8, 2 * loose, NOISE)
        middle = torch.where(loose == 2, middle + torch.arange(60) % 2, middle)
        middle[loose < 0] = NOISE
        tight = torch.where(torch.rand(60, generator=generator) < 0.8, middle, NOISE)
        numbered = [number(one.tolist()) for one in (middle, tight, loose)]
        want, threshold = by_the_definition(*numbered)
        labels, found = reliable(*map(clusters_of, numbered))
        assert labels.tolist() == want and found == pytest.approx(threshold, abs=1e-12)
        assert reliable(*map(clusters_of, numbered), threshold=-1.0)[0].unique().tolist() == [NOISE]


def number(labels):
    names = {}
    return [NOISE if label < 0 else names.setdefault(label, len(names)) for label in labels]


def test_clusters_that_hold_at_all_scales_stay():
    labels = [0, 0, 1, 1, 1, NOISE, 2, 2]
    found, threshold = reliable(*[clusters_of(labels)] * 3)
    assert found.tolist() == labels and threshold == 0


# Norms of domains


def test_each_domain_has_its_own_norm():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4), nn.BatchNorm1d(4))
    plain = [copy.deepcopy(model) for _ in range(2)]
    split_norms(model, 2)
    assert isinstance(model[1], DomainNorm) and isinstance(model[4], DomainNorm)
    source, target = torch.randn(10, 6), 3 + torch.randn(10, 6)
    found = model(torch.cat([source, target]))
    want = torch.cat([one(images) for one, images in zip(plain, (source, target), strict=True)])
    torch.testing.assert_close(found, want)
    model.eval()
    plain[1].eval()
    torch.testing.assert_close(model(source), plain[1](source))
    join_norms(model)
    assert type(model[1]) is nn.BatchNorm1d
    torch.testing.assert_close(model(source), plain[1](source))
    with pytest.raises(ValueError, match="no 2 equal parts"):
        split_norms(plain[0], 2)
        plain[0].train()(torch.randn(7, 6))


def test_norms_differ_in_their_number_of_domains():
    model = nn.ModuleDict({"a": nn.BatchNorm1d(2), "b": nn.Sequential(nn.BatchNorm1d(2))})
    split_norms(model, lambda name: {"a": 2, "b.0": 3}[name])
    assert len(model["a"].norms) == 2 and len(model["b"][0].norms) == 3


# Batches


def batches(labels, epoch=1, done=0, images_per_id=2, steps=5, camids=(0,) * 99, **options):
    made = PseudoBatches(8, images_per_id, steps, camids, **options)
    made.set_epoch(epoch, done)
    made.take(torch.tensor(labels))
    return made, list(made)


LABELS = [0, 0, 0, 1, 1, NOISE, 2, 2, 2, 2, 3, 3, NOISE, 4, 4, 4]


def test_batches_hold_clusters_and_no_noise():
    made, found = batches(LABELS)
    assert len(made) == len(found) == 5
    for batch in found:
        rows = [row for row, _ in batch]
        labels = [LABELS[row] for row in rows]
        assert len(rows) == 8 and NOISE not in labels
        assert labels[::2] == labels[1::2] and len(set(labels)) == 4
    assert batches(LABELS)[1] == found and batches(LABELS, epoch=2)[1] != found
    # All draws of an epoch are different.
    assert len({key for batch in found for _, key in batch}) == 40
    assert len({row for batch in found for row, _ in batch}) > 10


def test_batches_go_on_where_they_were():
    assert batches(LABELS, done=3)[1] == batches(LABELS)[1][3:]


def test_processes_share_the_batches_of_one():
    source = [0, 0, 0, 1, 1, 2, 2, 3, 3, 3]
    _, whole = batches(LABELS, source_labels=source)
    shares = [batches(LABELS, source_labels=source, rank=rank, num_processes=2)[1] for rank in (0, 1)]
    for one, first, second in zip(whole, *shares, strict=True):
        assert first[:4] + second[:4] == one[:8] and first[4:] + second[4:] == one[8:]
        assert max(row for row, _ in one[:8]) < 10 <= min(row for row, _ in one[8:])
        labels = [source[row] for row, _ in one[:8]]
        assert labels[::2] == labels[1::2] and len(set(labels)) == 4


def test_fewer_clusters_than_a_batch_has_groups():
    labels = [0] * 5 + [1] * 3
    for batch in batches(labels)[1]:
        assert sorted(labels[row] for row, _ in batch) == [0] * 4 + [1] * 4


def test_a_group_is_seen_by_different_cameras():
    camids = [0] * 6 + [1, 2, 3] + [1] * 8 + [0, 1, 2, 3] + [0, 0, 1]
    labels = [0] * 9 + [1] * 8 + [2] * 4 + [3] * 3
    first, alike = set(), 0
    for batch in batches(labels, images_per_id=4, steps=60, camids=camids)[1]:
        for group in ([row for row, _ in batch[:4]], [row for row, _ in batch[4:]]):
            label, seen = labels[group[0]], [camids[row] for row in group]
            assert {labels[row] for row in group} == {label}
            if label == 0:
                first.add(group[0])
                assert seen[0] not in seen[1:]
                assert len(set(group)) == 4
            elif label == 1:
                assert len(set(group)) == 4
            else:
                # As many as a group, or fewer: all of them.
                assert set(group) == {row for row, one in enumerate(labels) if one == label}
                alike += 1
    assert first == set(range(9)) and alike


def test_clusters_count_the_same_whatever_their_size():
    labels = [0] * 40 + [1] * 4 + [2] * 4 + [3] * 12
    found = batches(labels, images_per_id=4, steps=20)[1]
    groups = [labels[batch[start][0]] for batch in found for start in (0, 4)]
    assert torch.tensor(groups).bincount().tolist() == [10, 10, 10, 10]


def test_noise_in_groups():
    grouped = in_groups(torch.tensor(LABELS), 2, "seed")
    kept = torch.tensor(LABELS) >= 0
    assert grouped[kept].tolist() == [label for label in LABELS if label >= 0]
    assert grouped[~kept].tolist() == [5, 5]
    alone = torch.full((9,), NOISE)
    assert in_groups(alone, 4, "a").bincount().tolist() == [4, 4, 1]
    assert in_groups(alone, 4, "a").tolist() != in_groups(alone, 4, "b").tolist()


def test_batches_that_cannot_be():
    with pytest.raises(ValueError, match="batch of 8 cannot be split"):
        PseudoBatches(8, 3, 5, [0] * 9)
    with pytest.raises(ValueError, match="there are only 2"):
        PseudoBatches(8, 2, 5, [0] * 9, source_labels=[0, 0, 1, 1])
    with pytest.raises(ValueError, match="all 9 images are in no cluster"):
        PseudoBatches(8, 2, 5, [0] * 9).take(torch.full((9,), NOISE))


# The page


def test_clusters_on_a_page_are_called_what_they_are():
    data = load_reid("synthetic:domain=b,num_ids=5,images_per_id=4")["train"]
    truth = torch.arange(5).repeat_interleave(4)
    labels, features = truth.clone(), unit(20, 8)
    features[16:] = features[16] + 0.01 * features[16:]

    def titles(*arguments):
        page = Report("Clusters")
        add_contact_sheet(page, data, *arguments)
        return [card["title"] for block in page.blocks if block["kind"] == "cards" for card in block["cards"]]

    # All of one person: none is mixed.
    assert titles(labels, features, truth.numpy()) == ["Good: cluster 0", "Good: cluster 1", "Good: cluster 2"]
    labels[19] = 3
    labels[0] = NOISE
    good = ["Good: cluster 1", "Good: cluster 2", "Good: cluster 0"]
    assert titles(labels, features, truth.numpy()) == [*good, "Mixed: cluster 3", "In no cluster"]
    # Where nobody knows, they are close or loose.
    names = titles(labels, features)
    assert names[0] == "Close: cluster 4" and [name.split(":")[0] for name in names[3:]] == ["Loose"] * 2 + [
        "In no cluster"
    ]

"""HHCL: both forms of its loss and their memories by formulas; the data of the two published forms in a run."""

import torch

from methods.cluster_contrast import HybridClusterMemory, InstanceMemory
from tests.methods.reference import close, unit

LABELS = torch.tensor([0, 0, 0, 2, 2, 1, 2, 0])
ROWS = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 2, -1])


def cross_entropy(scores, labels, temperature):
    return -(scores / temperature).log_softmax(1)[torch.arange(len(labels)), labels].mean()


def moved(row, others, momentum=0.3):
    row = momentum * row + (1 - momentum) * others
    return row / row.norm()


def means_of(features):
    means = torch.stack([features[label == ROWS].mean(0) for label in range(3)])
    return means / means.norm(dim=1, keepdim=True)


def test_released_form_by_formulas():
    memory = HybridClusterMemory(12, 0.07, 0.3, 0.5, 0.25)
    known = unit(11, 12)
    memory.renew(known.float(), ROWS, 1)
    hard, mean = means_of(known), means_of(known)
    for step in range(3):
        features = 4 * unit(8, 12, seed=step + 1)
        batch = features / features.norm(dim=1, keepdim=True)
        asked = features.float().requires_grad_()
        loss = memory(asked, LABELS)
        true = features.clone().requires_grad_()
        rows = true / true.norm(dim=1, keepdim=True)
        wanted = 0.5 * cross_entropy(rows @ hard.t(), LABELS, 0.07)
        wanted = wanted + 0.25 * cross_entropy(rows @ mean.t(), LABELS, 0.07)
        close("HHCL loss", loss, wanted)
        close("HHCL gradient", *torch.autograd.grad(loss, asked), *torch.autograd.grad(wanted, true))
        memory.update(features.float(), LABELS)
        for label in range(3):
            own = batch[label == LABELS]
            hard[label] = moved(hard[label], own[(own @ hard[label]).argmin()])
            mean[label] = moved(mean[label], own.mean(0))
        close("HHCL hard memory", memory.hard.prototypes, hard)
        close("HHCL mean memory", memory.mean.prototypes, mean)


def test_the_paper_s_form_by_formulas():
    memory = InstanceMemory(12, 0.07, 0.3, 3, 0.5, seed=0)
    known = unit(11, 12)
    memory.renew(known.float(), ROWS, 1)
    first = memory.instances.clone()
    # Images of each cluster; the same for the same epoch.
    likeness = first.double() @ known.t()
    assert ((likeness - 1).abs() < 1e-6).any(2).all() and (ROWS[likeness.argmax(2)] == torch.arange(3)[:, None]).all()
    memory.renew(known.float(), ROWS, 2)
    assert not torch.equal(memory.instances, first)
    memory.renew(known.float(), ROWS, 1)
    assert torch.equal(memory.instances, first)
    instances, mean = first.double(), means_of(known)
    for step in range(3):
        features = 4 * unit(8, 12, seed=step + 1)
        batch = features / features.norm(dim=1, keepdim=True)
        scores = torch.empty(8, 3, dtype=torch.float64)
        for row, own in enumerate(LABELS.tolist()):
            for label in range(3):
                cosines = instances[label] @ batch[row]
                scores[row, label] = cosines.min() if label == own else cosines.max()
        wanted = 0.5 * cross_entropy(scores, LABELS, 0.07) + 0.5 * cross_entropy(batch @ mean.t(), LABELS, 0.07)
        close("HHCL (paper) loss", memory(features.float(), LABELS), wanted)
        memory.update(features.float(), LABELS)
        for label in range(3):
            own = batch[label == LABELS]
            # Three places: the fourth image of a cluster has none.
            instances[label, : min(3, len(own))] = own[:3]
            mean[label] = moved(mean[label], own.mean(0))
        close("HHCL (paper) instances", memory.instances, instances)
        close("HHCL (paper) memory", memory.mean.prototypes, mean)

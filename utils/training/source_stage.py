"""The first epochs of some adaptations: the source alone, with labels; the target's images only move averages.

A network here has `pool(images)`, features of each image by itself, and `heads(pooled)`, of the whole batch, with
`compared` and `logits`: the features and the logits of each head.
"""

import torch
import torch.nn.functional as F
from torch import nn

from utils.batches.pseudo_batches import gather_by_domain
from utils.modeling.domain_norms import SOURCE, group_batch_statistics, train_alone
from utils.modeling.losses import hard_triplet
from utils.training.optimizer import warmup_multistep


def source_losses(network, images, labels, num_source, smoothing):
    """(cross-entropy with smoothed labels, soft triplets of hard pairs), each the sum over the heads.

    `images`: [source, target] of this process; `labels`: those of the whole batch's source images. All images pass
    through the source's norms: first those of the source, then, for the averages alone, the others.
    """
    own, others = images.chunk(2)
    # Not only for this call: activations may be computed a second time in the backward pass.
    train_alone(network, SOURCE)
    pooled = gather_by_domain(network.pool(own), 1)
    with torch.autocast(images.device.type, enabled=False):
        outputs = network.heads(pooled.float())
        logits = [side[:, :num_source] for side in outputs.logits]
        classes = sum(F.cross_entropy(side, labels, label_smoothing=smoothing) for side in logits)
        triplets = sum(hard_triplet(side, labels) for side in outputs.compared)
    with torch.no_grad():
        rest = gather_by_domain(network.pool(others), 1)
        with torch.autocast(images.device.type, enabled=False):
            network.heads(rest.float())
    return classes, triplets


def adapting(args, epoch):
    """Whether the epochs of the source are over."""
    return epoch > args.source_epochs


def erasing_of(args, epoch):
    """The source's epochs have no random erasing."""
    return args.erasing if adapting(args, epoch) else 0.0


def staged_rate(source_epochs, warmup, later):
    """Factor on the rate by epoch and step: `warmup_multistep` with epochs from 0, then `later(epoch)` from 1 on."""

    def factor(epoch, step):
        return warmup_multistep(epoch - 1, *warmup) if epoch <= source_epochs else later(epoch - source_epochs)

    return factor


def queue_head(width, group_size=0):
    """A linear layer and BatchNorm, whose unit-length output is what a queue holds."""
    head = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width))
    if group_size:
        group_batch_statistics(head, group_size)
    return head


@torch.no_grad()
def reset_linear(layers, seed):
    """Linear layers without bias get weights as torch draws them at first, from a seed."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        bound = layer.weight.shape[1] ** -0.5
        layer.weight.copy_(torch.rand(layer.weight.shape, generator=generator).mul_(2 * bound).sub_(bound))

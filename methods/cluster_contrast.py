"""Cluster contrast and HHCL: cross-entropy with prototypes of the clusters, updated after every step; no noise.

L = CE(u M^T / temperature, cluster)          u: unit-length BNNeck features; M: a prototype of each cluster

HHCL, as its authors released it, has two memories of prototypes, moved by hard images and by means:

L = .5 CE(u H^T / temperature, cluster) + .25 CE(u M^T / temperature, cluster)

In its paper H is another memory (`--memory_update instances`), of K images of each cluster: z is the least similar of
the own cluster's, and the most similar of each other cluster's.

L = .5 CE(z / temperature, cluster) + .5 CE(u M^T / temperature, cluster)
"""

import random

import torch
import torch.nn.functional as F
from torch import nn

from utils.batches.pseudo_batches import gather_by_domain
from utils.evaluation.groups.clusters import NOISE
from utils.modeling.hybrid_memory import move_in_turn
from utils.modeling.memories import PrototypeMemory, class_means


class ClusterContrast(nn.Module):
    """Encoder, memory and pseudo labels; `forward` is the loss of one batch of the target.

    With several processes, each passes its share of the images through the backbone. The features are gathered, so
    that BatchNorm and memory see the whole batch, as in a run with one process.
    """

    under_deepspeed = True

    def __init__(self, encoder, args, num_source, cameras, source_size=0):
        super().__init__()
        self.encoder, self.num_source = encoder, num_source
        self.register_buffer("pseudo_labels", torch.full((len(cameras),), NOISE))
        options = encoder.num_features, args.memory_temperature, args.memory_momentum
        if args.memory_update == "hybrid":
            self.memory = HybridClusterMemory(*options, args.hard_weight, args.mean_weight)
        elif args.memory_update == "instances":
            self.memory = InstanceMemory(*options, args.images_per_id, args.hard_weight, args.seed)
        else:
            self.memory = ClusterMemory(torch.zeros(1, options[0]), *options[1:], args.memory_update)

    def tested(self):
        """The model that is clustered with, measured and saved."""
        return self.encoder

    def relabel(self, epoch, target, source, cluster):
        """Cluster for an epoch; every prototype becomes the mean direction of its cluster."""
        features = target()
        labels = cluster(features)
        self.memory.renew(features, labels, epoch)
        return labels

    def forward(self, images, rows):
        """`rows`: the numbers of the images."""
        features, rows = gather_by_domain(self.encoder.backbone(images), 1), gather_by_domain(rows, 1)
        with torch.autocast(images.device.type, enabled=False):
            bn_features, _ = self.encoder.neck(features.float())
            loss = self.memory(bn_features, self.pseudo_labels[rows])
        return loss, {"loss": loss.detach(), "loss_target": loss.detach()}, (bn_features.detach(), rows)

    @torch.no_grad()
    def after_step(self, bn_features, rows):
        self.memory.update(bn_features, self.pseudo_labels[rows])


UPDATES = ("momentum", "hard", "mean")


class ClusterMemory(PrototypeMemory):
    """A prototype of each cluster. The update is `m <- momentum m + (1 - momentum) u`, unit length. `mode` sets u:

    momentum: every image of the cluster in the batch, one after the other;
    hard: the image least similar to the prototype;
    mean: the mean of the cluster's images in the batch.
    """

    def __init__(self, prototypes, temperature=0.05, momentum=0.1, mode="momentum"):
        super().__init__(prototypes, temperature, momentum)
        if mode not in UPDATES:
            raise ValueError(f"mode must be one of {', '.join(UPDATES)}, got {mode!r}")
        self.mode = mode

    @torch.no_grad()
    def update(self, features, labels):
        if self.mode == "hard":
            super().update(features, labels)
            return
        with torch.autocast(features.device.type, enabled=False):
            unit = F.normalize(features.float(), dim=1)
            if self.mode == "momentum":
                move_in_turn(self.prototypes, labels, unit, self.momentum)
                return
            same_label = (labels[:, None] == labels[None, :]).float()
            means = same_label @ unit / same_label.sum(1, keepdim=True)
            # All images of one cluster write the same row.
            self.prototypes[labels] = F.normalize(torch.lerp(means, self.prototypes[labels], self.momentum), dim=1)

    @torch.no_grad()
    def renew(self, features, labels, epoch=1):
        """Replace the prototypes after a new clustering: each is the mean direction of a cluster's rows."""
        labels = labels.to(features.device)
        in_cluster = labels >= 0
        means = class_means(features[in_cluster], labels[in_cluster], int(labels.max()) + 1)
        self.prototypes = means.to(self.prototypes.device)


class HybridClusterMemory(nn.Module):
    """HHCL's two memories: `hard` is moved by the image least similar to it, `mean` by the mean of the images."""

    def __init__(self, width, temperature, momentum, hard_weight, mean_weight):
        super().__init__()
        self.hard, self.mean = (
            ClusterMemory(torch.zeros(1, width), temperature, momentum, mode) for mode in ("hard", "mean")
        )
        self.weights = hard_weight, mean_weight

    def forward(self, features, labels):
        return self.weights[0] * self.hard(features, labels) + self.weights[1] * self.mean(features, labels)

    def update(self, features, labels):
        self.hard.update(features, labels)
        self.mean.update(features, labels)

    def renew(self, features, labels, epoch):
        self.hard.renew(features, labels)
        self.mean.renew(features, labels)


class InstanceMemory(nn.Module):
    """HHCL as in its paper: prototypes, moved by means, and `count` images of each cluster, `instances` (C, count, D).

    The images are drawn before an epoch, with replacement; those of a batch overwrite the first ones of their cluster.
    By its author's word a training with it is unstable.
    """

    def __init__(self, width, temperature, momentum, count, hard_weight, seed):
        super().__init__()
        self.mean = ClusterMemory(torch.zeros(1, width), temperature, momentum, "mean")
        self.register_buffer("instances", torch.zeros(1, count, width))
        self.count, self.hard_weight, self.seed = count, hard_weight, seed

    def forward(self, features, labels):
        with torch.autocast(features.device.type, enabled=False):
            # A copy: `update` changes the instances while a graph may still need the old ones. [B, C, count]
            instances = self.instances.clone().flatten(0, 1)
            cosines = F.normalize(features.float(), dim=1) @ instances.t()
            cosines = cosines.unflatten(1, self.instances.shape[:2])
            is_own = F.one_hot(labels, cosines.shape[1]).bool()
            scores = torch.where(is_own, cosines.amin(2), cosines.amax(2))
            hard = F.cross_entropy(scores / self.mean.temperature, labels)
        return self.hard_weight * hard + (1 - self.hard_weight) * self.mean(features, labels)

    @torch.no_grad()
    def update(self, features, labels):
        unit = F.normalize(features.float(), dim=1)
        # [B]: how many earlier images of the batch are of the same cluster.
        place = (labels[:, None] == labels[None, :]).tril(-1).sum(1)
        fits = place < self.count
        self.instances[labels[fits], place[fits]] = unit[fits]
        self.mean.update(features, labels)

    def renew(self, features, labels, epoch):
        self.mean.renew(features, labels)
        rows = [(labels == label).nonzero().flatten().tolist() for label in range(int(labels.max()) + 1)]
        # Seeded by the epoch: a run that resumes draws the same images.
        rng = random.Random(f"instances/{self.seed}/{epoch}")
        drawn = torch.tensor([rng.choices(own, k=self.count) for own in rows])
        self.instances = F.normalize(features[drawn].float(), dim=2).to(self.instances.device)

"""Cluster contrast: cross-entropy with a prototype of each cluster, updated after every step. Noise is left out.

L = CE(u M^T / temperature, cluster)          u: unit-length BNNeck features; M: a prototype of each cluster
"""

import torch
import torch.nn.functional as F
from torch import nn

from utils.batches.pseudo_batches import of_other_cameras
from utils.evaluation.groups.clusters import NOISE
from utils.launch import gather_by_domain
from utils.modeling.memories import PrototypeMemory, class_means, move_in_turn


class ClusterContrast(nn.Module):
    """Encoder, prototypes and pseudo labels; `forward` is the loss of one batch of the target.

    With several processes, each passes its share of the images through the backbone. The features are gathered, so
    that BatchNorm and memory see the whole batch, as in a run with one process.
    """

    under_deepspeed = True
    views = ("changed",)
    draw = staticmethod(of_other_cameras)

    def __init__(self, encoder, args, num_source, cameras, source_size=0):
        super().__init__()
        self.encoder, self.num_source = encoder, num_source
        self.register_buffer("pseudo_labels", torch.full((len(cameras),), NOISE))
        self.memory = ClusterMemory(
            torch.zeros(1, encoder.num_features), args.memory_temperature, args.memory_momentum, args.memory_update
        )

    @staticmethod
    def scales(args):
        """The values of eps to cluster with."""
        return [args.eps]

    @staticmethod
    def least_cameras(args):
        return 1

    @staticmethod
    def labels_of(clusters, threshold):
        return clusters[0].labels, threshold

    @staticmethod
    def labels_for_batches(labels, key):
        return labels

    def tested(self):
        """The model that is clustered with, measured and saved."""
        return self.encoder

    def relabel(self, epoch, target, source, cluster):
        """Cluster for an epoch; every prototype becomes the mean direction of its cluster."""
        features = target()
        labels = cluster(features)
        self.memory.renew(features, labels)
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
    def renew(self, features, labels):
        """Replace the prototypes after a new clustering: each is the mean direction of a cluster's rows."""
        labels = labels.to(features.device)
        in_cluster = labels >= 0
        means = class_means(features[in_cluster], labels[in_cluster], int(labels.max()) + 1)
        self.prototypes = means.to(self.prototypes.device)

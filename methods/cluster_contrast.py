"""Cluster contrast: cross-entropy with a prototype of each cluster, moved after every step. Noise is left out.

L = CE(u M^T / temperature, cluster)          u: unit-length BNNeck features; M: a prototype of each cluster
"""

import torch
from torch import nn

from utils.launch import gather_by_domain
from utils.modeling.memories import ClusterMemory
from utils.training.clustering import NOISE


class ClusterContrast(nn.Module):
    """Encoder, prototypes and pseudo labels; `forward` is the loss of one batch of the target.

    With several processes each passes its share of the images through the backbone. The features are gathered, so that
    BatchNorm and memory see the whole batch, as one process would.
    """

    under_deepspeed = True

    def __init__(self, encoder, args, num_source, num_images):
        super().__init__()
        self.encoder, self.num_source = encoder, num_source
        self.register_buffer("pseudo_labels", torch.full((num_images,), NOISE))
        self.memory = ClusterMemory(
            torch.zeros(1, encoder.num_features), args.memory_temperature, args.memory_momentum, args.memory_update
        )

    @staticmethod
    def scales(args):
        """The values of eps of a clustering."""
        return [args.eps]

    @staticmethod
    def labels_of(clusters, threshold):
        return clusters[0].labels, threshold

    @staticmethod
    def labels_for_batches(labels, key):
        return labels

    def make_room(self, num_clusters):
        """For a checkpoint that is about to be read."""
        self.memory.make_room(num_clusters)

    def relabel(self, first, target, source, cluster):
        """Clusters of an epoch; every prototype becomes the mean direction of its cluster."""
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

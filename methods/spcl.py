"""SpCL: self-paced contrast with a memory that has a row for each source identity and each target image.

    L = CE(u C^T / temperature, class)            u: unit-length BNNeck features; C: mean of the rows of each class

Clusters that change too much at a looser or a tighter scale are dissolved. Each image in no cluster is its own class.
"""

import torch
from torch import nn

from utils.batches.pseudo_batches import gather_by_domain, in_groups
from utils.evaluation.groups.clusters import NOISE, singled_out
from utils.modeling.domain_norms import split_norms
from utils.modeling.hybrid_memory import HybridMemory
from utils.training.clustering import reliable


class SpCL(nn.Module):
    """Encoder, memory and pseudo labels; `forward` is the loss of one batch of source (where there is one) and target.

    With several processes, each passes its share of the images through the backbone. The features are gathered, one
    domain after the other, so that BatchNorm and memory see the whole batch, as in a run with one process.
    """

    under_deepspeed = True

    def __init__(self, encoder, args, num_source, cameras, source_size=0):
        super().__init__()
        self.encoder, self.num_source, self.images_per_id = encoder, num_source, args.images_per_id
        self.num_domains = 2 if num_source else 1
        # -1: in no cluster.
        self.register_buffer("pseudo_labels", torch.full((len(cameras),), NOISE))
        self.memory = HybridMemory(
            torch.zeros(num_source + len(cameras), encoder.num_features),
            args.memory_temperature,
            args.memory_momentum,
            args.probability_floor,
        )
        if num_source:
            split_norms(encoder, lambda name: 2)

    @staticmethod
    def scales(args):
        """The values of eps to cluster with: --eps, a tighter and a looser one."""
        return [args.eps + gap for gap in (0, -args.eps_gap, args.eps_gap)]

    @staticmethod
    def labels_of(clusters, threshold):
        """Labels of the reliable clusters; the threshold of the first epoch is used in all epochs."""
        if not clusters[0].num_clusters:
            return clusters[0].labels, threshold
        return reliable(*clusters, threshold)

    def labels_for_batches(self, labels, key):
        """Labels in which images in no cluster form random groups, so that they are trained on too."""
        return in_groups(labels, self.images_per_id, key)

    def tested(self):
        """The model that is clustered with, measured and saved."""
        return self.encoder

    def relabel(self, epoch, target, source, cluster):
        """Cluster for an epoch: the model's features before the first epoch, the memory's rows before later ones."""
        device = self.memory.prototypes.device
        features = target() if epoch == 1 else self.memory.prototypes[self.num_source :]
        labels = cluster(features)
        if epoch == 1:
            rows = [features.to(device)]
            if self.num_source:
                rows = [source().to(device), *rows]
            self.memory.prototypes.copy_(torch.cat(rows))
        source_labels = torch.arange(self.num_source, device=device)
        self.memory.labels.copy_(torch.cat([source_labels, self.num_source + singled_out(labels).to(device)]))
        return labels

    def forward(self, images, rows):
        """`rows`: labels for source images; for target images `num_source` plus the number of the image."""
        features = gather_by_domain(self.encoder.backbone(images), self.num_domains)
        rows = gather_by_domain(rows, self.num_domains)
        with torch.autocast(images.device.type, enabled=False):
            bn_features, _ = self.encoder.neck(features.float())
            domains = zip(bn_features.chunk(self.num_domains), rows.chunk(self.num_domains), strict=True)
            losses = [self.memory(*domain) for domain in domains]
        names = ("loss_source", "loss_target") if self.num_source else ("loss_target",)
        loss = torch.stack(losses).sum()
        values = {"loss": loss, **dict(zip(names, losses, strict=True))}
        return loss, {name: value.detach() for name, value in values.items()}, (bn_features.detach(), rows)

    @torch.no_grad()
    def after_step(self, bn_features, rows):
        self.memory.update(bn_features, rows)

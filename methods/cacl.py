"""CaCL: adaptation camera by camera, those whose images are most like the source's first. A reconstruction.

There is no public code. What its project page and abstract tell is followed: the stages, the order by MMD, and

    L = CE(source) + mean_i w_i CE(target_i) / mean_i w_i        one classifier over identities and clusters

with w the entropy of the cameras in the image's cluster: a cluster of one camera does not count. Chosen here: while
only one camera is trained on all w are 1; MMD with the features of the current model, at the start of a stage; half of
the epochs for all stages but the last; the classifier of IDM; neither triplets nor norms of domains. Numbers of a
training with it are not those of the paper.
"""

import math
import random

import torch
import torch.nn.functional as F
from torch import nn

from utils.batches.pseudo_batches import gather_by_domain
from utils.evaluation.groups.clusters import NOISE
from utils.modeling.memories import class_means
from utils.training.discrepancy import mean_discrepancy

# Images of each side whose features are compared.
COMPARED = 2000


class CaCL(nn.Module):
    """Encoder with a classifier of both domains, cameras in training and pseudo labels; `forward` is a batch's loss.

    With several processes, each passes its share of the images through the backbone. The features are gathered, one
    domain after the other, so that norms see the whole batch, as in a run with one process.
    """

    def __init__(self, encoder, args, num_source, cameras, source_size=0):
        super().__init__()
        self.encoder, self.args, self.num_source, self.source_size = encoder, args, num_source, source_size
        encoder.reset_classifier(num_source + len(cameras))
        self.register_buffer("pseudo_labels", torch.full((len(cameras),), NOISE))
        self.register_buffer("cameras", cameras)
        self.register_buffer("active", torch.zeros(int(cameras.max()) + 1, dtype=torch.bool))
        self.register_buffer("weights", torch.ones(1))

    @staticmethod
    def least_cameras(args):
        return max(2, args.stages)

    def tested(self):
        """The model that is clustered with, measured and saved."""
        return self.encoder

    def relabel(self, epoch, target, source, cluster):
        """Cluster the images of the stage's cameras; a cluster's mean direction becomes its row of the classifier."""
        features, cameras = target(), self.cameras.cpu()
        self.add_cameras(epoch, features, source)
        rows = self.active.cpu()[cameras].nonzero().flatten()
        labels = torch.full((len(cameras),), NOISE)
        labels[rows] = cluster(features[rows], rows)
        weight, inside, count = self.encoder.classifier.weight, labels >= 0, int(labels.max()) + 1
        if epoch == 1:
            weight[: self.num_source] = source().to(weight.device)
        means = class_means(features[inside], labels[inside], count)
        weight[self.num_source : self.num_source + count] = means.to(weight.device)
        entropy = camera_entropy(labels[inside], cameras[inside], count)
        self.weights = (entropy if int(self.active.sum()) > 1 else torch.ones(count)).to(weight.device)
        return labels

    def add_cameras(self, epoch, features, source):
        """Add the cameras of this epoch's stage, those nearest to the source first."""
        args, num_cameras = self.args, len(self.active)
        stages = args.stages or num_cameras
        wanted = math.ceil(stage_of(epoch, args.num_train_epochs, stages) * num_cameras / stages)
        counts = self.cameras.bincount(minlength=num_cameras)

        def enough():
            # In a small set one camera may have too few images to be clustered.
            return int(self.active.sum()) >= wanted and int(counts[self.active].sum()) > 2 * args.cluster_k1

        if enough() or self.active.all():
            return
        rng, cameras = random.Random(f"cameras/{args.seed}/{epoch}"), self.cameras.cpu()
        known = source(sorted(rng.sample(range(self.source_size), min(COMPARED, self.source_size))))
        apart = {}
        for camera in (~self.active).nonzero().flatten().tolist():
            rows = (cameras == camera).nonzero().flatten().tolist()
            apart[camera] = mean_discrepancy(known, features[rng.sample(rows, min(COMPARED, len(rows)))])
        for camera in sorted(apart, key=apart.get):
            if not enough():
                self.active[camera] = True

    def forward(self, images, rows):
        """`rows`: labels for source images; for target images `num_source` plus the number of the image."""
        features, rows = gather_by_domain(self.encoder.backbone(images), 2), gather_by_domain(rows, 2)
        with torch.autocast(images.device.type, enabled=False):
            _, logits = self.encoder.neck(features.float())
            loss, values = self.losses(logits, rows)
        return loss, {name: value.detach() for name, value in {"loss": loss, **values}.items()}, ()

    def losses(self, logits, rows):
        source, target = rows.chunk(2)
        clusters = self.pseudo_labels[target - self.num_source]
        logits = logits[:, : self.num_source + len(self.weights)]
        classes = torch.cat([source, clusters + self.num_source])
        each = F.cross_entropy(logits, classes, label_smoothing=self.args.label_smoothing, reduction="none")
        by_source, by_target = each.chunk(2)
        weights = self.weights[clusters]
        # Where no cluster of the batch has two cameras, the target has no part in it.
        weights = weights / weights.mean().clamp(min=1e-12)
        values = {"loss_source": by_source.mean(), "loss_target": (weights * by_target).mean()}
        return sum(values.values()), values

    def after_step(self):
        """Nothing to do: gradients update everything."""


def stage_of(epoch, epochs, stages):
    """The stage, from 1, of an epoch, from 1: half of the epochs for all stages but the last, which has the rest."""
    half = epochs / 2
    return stages if epoch - 1 >= half else 1 + math.floor((epoch - 1) * (stages - 1) / half)


def camera_entropy(labels, cameras, count):
    """The entropy, in nats, of the cameras of each cluster's images: (count,) float32, 0 for a single camera."""
    table = torch.zeros(count, int(cameras.max()) + 1)
    table.index_put_((labels, cameras), torch.ones(len(labels)), accumulate=True)
    return torch.special.entr(table / table.sum(1, keepdim=True)).sum(1)

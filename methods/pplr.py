"""PPLR: labels of the whole body and of its parts refine each other, as far as their neighbours agree.

    L = CE(W h, t) + mean_p L_p + soft triplet(h) + c (contrast of h + mean_p contrast of h_p with cameras' proxies)

h: BNNeck features of the map's mean, h_p of its stripes; W, W_p: classifiers, set to the clusters' means every epoch.

    t    half the cluster, half the parts' predictions, weighed by the softmax of their agreement
    L_p  cross-entropy with smoothed labels in the first epochs, then a CE + (1 - a) KL(uniform || prediction)
    a    share of the nearest images that whole and part have in common
    contrast   -log softmax(u proxy / temperature) of the cluster's proxies of other cameras, against these and the
               most similar proxies of other clusters; a proxy is the mean of a cluster's images of one camera
"""

import torch
import torch.nn.functional as F
from torch import nn

from utils.batches.pseudo_batches import gather_by_domain
from utils.evaluation.groups.clusters import NOISE
from utils.modeling.domain_norms import group_batch_statistics
from utils.modeling.losses import hard_triplet
from utils.modeling.memories import class_means
from utils.modeling.reid_model import BNNeck
from utils.training.agreement import neighbour_agreement
from utils.training.contrast import camera_proxies, proxy_contrast


class PPLR(nn.Module):
    """Encoder, necks and classifiers of the parts, agreement and pseudo labels; `forward` is the loss of one batch.

    With several processes, each passes its share of the images through the backbone. The features are gathered, so
    that norms and losses see the whole batch, as in a run with one process.
    """

    def __init__(self, encoder, args, num_source, cameras, source_size=0):
        super().__init__()
        self.encoder, self.args, self.num_source = encoder, args, num_source
        if encoder.backbone.config.model_type == "part_token_clip":
            raise ValueError("--method pplr parts a map as wide as the features; those of part tokens are wider")
        width, rows = encoder.num_features, min(args.class_rows, len(cameras) // 2)
        encoder.reset_classifier(rows)
        self.necks = nn.ModuleList(BNNeck(width) for _ in range(args.num_parts))
        self.classifiers = nn.ModuleList(nn.Linear(width, rows, bias=False) for _ in range(args.num_parts))
        if args.norm_group:
            group_batch_statistics(self.necks, args.norm_group)
        self.register_buffer("pseudo_labels", torch.full((len(cameras),), NOISE))
        self.register_buffer("cameras", cameras)
        self.register_buffer("agreement", torch.zeros(len(cameras), args.num_parts))
        # [whole and parts, proxies, D]; their clusters and cameras.
        self.register_buffer("proxies", torch.zeros(1 + args.num_parts, 1, width))
        self.register_buffer("proxy_labels", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("proxy_cameras", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64))

    @staticmethod
    def least_cameras(args):
        """The proxies are of cameras; without their weight one camera is enough."""
        return 2 if args.camera_weight else 1

    def tested(self):
        """The model that is clustered with, measured and saved: of the whole body only."""
        return self.encoder

    def relabel(self, epoch, target, source, cluster):
        """Cluster for an epoch by the whole body; classifiers, agreement and proxies follow."""
        device = self.pseudo_labels.device
        whole, *parts = (side.clone() for side in target(PartFeatures(self)).chunk(1 + len(self.necks), 1))
        labels = cluster(whole)
        count, inside = int(labels.max()) + 1, labels >= 0
        classifiers = [self.encoder.classifier, *self.classifiers]
        if count > len(classifiers[0].weight):
            raise ValueError(
                f"{count} clusters, and the classifiers have {len(classifiers[0].weight)} rows: raise --class_rows"
            )
        for classifier, side in zip(classifiers, (whole, *parts), strict=True):
            classifier.weight[:count] = class_means(side[inside], labels[inside], count).to(device)
        sides = whole.to(device), [side.to(device) for side in parts]
        self.agreement.copy_(neighbour_agreement(*sides, self.args.agreement_neighbours))
        cameras = self.cameras.cpu()
        found = [camera_proxies(side, labels, cameras) for side in (whole, *parts)]
        self.proxies = torch.stack([proxies for proxies, *_ in found]).to(device)
        self.proxy_labels, self.proxy_cameras = (numbers.to(device) for numbers in found[0][1:])
        self.epoch.fill_(epoch)
        return labels

    def pool(self, images):
        """Features before the necks, of the whole and of each part: (B, 1 + parts, D)."""
        whole, feature_map = self.encoder.backbone.summary_and_map(images)
        stripes = F.adaptive_avg_pool2d(feature_map, (len(self.necks), 1)).squeeze(3).transpose(1, 2)
        return torch.cat([whole[:, None], stripes], dim=1)

    def forward(self, images, rows):
        """`rows`: the numbers of the images."""
        pooled, rows = gather_by_domain(self.pool(images), 1), gather_by_domain(rows, 1)
        with torch.autocast(images.device.type, enabled=False):
            pooled = pooled.float().unbind(1)
            necks = [self.encoder.bnneck, *self.necks]
            features = [neck(side) for neck, side in zip(necks, pooled, strict=True)]
            count = int(self.pseudo_labels.max()) + 1
            classifiers = [self.encoder.classifier, *self.classifiers]
            logits = [layer(side)[:, :count] for layer, side in zip(classifiers, features, strict=True)]
            loss, values = self.losses(features, logits, rows)
        return loss, {name: value.detach() for name, value in {"loss": loss, **values}.items()}, ()

    def losses(self, features, logits, rows):
        """`features`, `logits`: of the whole, then of each part."""
        args, labels, agreement = self.args, self.pseudo_labels[rows], self.agreement[rows]
        wanted = args.label_weight * F.one_hot(labels, logits[0].shape[1])
        predicted = torch.stack([part.detach().softmax(1) for part in logits[1:]], dim=1)
        wanted = wanted + (1 - args.label_weight) * (agreement.softmax(1)[:, :, None] * predicted).sum(1)
        values = {
            "loss_whole": F.cross_entropy(logits[0], wanted),
            "loss_parts": torch.stack(
                [self.part_loss(part, labels, agreement[:, number]) for number, part in enumerate(logits[1:])]
            ).mean(),
            "loss_triplet": hard_triplet(features[0], labels),
        }
        loss = sum(values.values())
        if args.camera_weight:
            own = labels[:, None] == self.proxy_labels
            positive = own & (self.cameras[rows][:, None] != self.proxy_cameras)
            options = own, positive, args.hard_proxies, args.proxy_temperature
            contrasts = [
                proxy_contrast(side, proxies, *options).mean()
                for side, proxies in zip(features, self.proxies, strict=True)
            ]
            values["loss_cameras"] = contrasts[0] + torch.stack(contrasts[1:]).mean()
            loss = loss + args.camera_weight * values["loss_cameras"]
        return loss, values

    def part_loss(self, logits, labels, agreement):
        if int(self.epoch) <= self.args.smoothing_epochs:
            return F.cross_entropy(logits, labels, label_smoothing=self.args.label_smoothing)
        log_odds = logits.log_softmax(1)
        # KL of the uniform distribution and the prediction, summed over the classes.
        apart = -log_odds.mean(1) - log_odds.new_tensor(logits.shape[1]).log()
        return (agreement * F.cross_entropy(logits, labels, reduction="none") + (1 - agreement) * apart).mean()

    def after_step(self):
        """Nothing to do: proxies and agreement are fixed in an epoch."""


class PartFeatures(nn.Module):
    """Unit-length features of the whole and of each part, one after the other, for clustering."""

    def __init__(self, method):
        super().__init__()
        self.method = method
        self.num_features = method.encoder.num_features * (1 + len(method.necks))

    def forward(self, images):
        necks = [self.method.encoder.bnneck, *self.method.necks]
        sides = zip(necks, self.method.pool(images).unbind(1), strict=True)
        return torch.cat([F.normalize(neck(side).float(), dim=1) for neck, side in sides], dim=1)

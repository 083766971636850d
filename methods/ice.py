"""ICE: a student learns from a teacher's views of the same images: hard positives, cameras' proxies, equal likenesses.

    L = CE(q c^T / t_c, cluster) + L_view + L_cameras + 10 L_same

q: the student's BNNeck features of a changed view, k and w: the teacher's of another one and of the plain image.

    c          means of the clusters' unit-length features by the teacher, not of unit length; nor is q in that term
    L_view     -log softmax(q k^T / t_v) of the least similar k of the own cluster, against all k of other clusters
    L_cameras  for each camera in the batch half the mean of its images' contrasts with proxies: the positives are all
               of the own cluster, the others the most similar of other clusters; a proxy is the mean of a cluster's
               images of one camera
    L_same     KL(softmax(w w^T / t_s) || softmax(q k^T / t_s)), rows of the batch, all of unit length

The authors' code gives each column of the matrix of unit-length proxies the length 1 before it compares features with
them: `--proxy_scale columns`, which the recipes have.

The teacher is the running mean of the student's weights, with norms of its own that see the batch. It is clustered
with, measured and saved. The authors' teacher passes the first view too and uses nothing of it; here it does not, so
that its averages hold less of changed views.
"""

import torch
import torch.nn.functional as F
from torch import nn

from utils.batches.pseudo_batches import gather_by_domain, of_every_camera
from utils.evaluation.groups.clusters import NOISE
from utils.launch import gather_with_gradient
from utils.training.contrast import camera_proxies, proxy_contrast
from utils.training.teacher import move_teacher, teacher_of


class ICE(nn.Module):
    """Student, teacher, centres, proxies and pseudo labels; `forward` is the loss of one batch of three views.

    With several processes, each passes its share of the images through the backbones. The features are gathered, so
    that norms and losses see the whole batch, as in a run with one process.
    """

    views = ("changed", "changed", "plain")
    draw = staticmethod(of_every_camera)

    def __init__(self, encoder, args, num_source, cameras, source_size=0):
        super().__init__()
        self.encoder, self.args, self.num_source = encoder, args, num_source
        self.teacher = teacher_of(encoder)
        width = encoder.num_features
        self.register_buffer("pseudo_labels", torch.full((len(cameras),), NOISE))
        self.register_buffer("cameras", cameras)
        self.register_buffer("centres", torch.zeros(1, width))
        self.register_buffer("proxies", torch.zeros(1, width))
        self.register_buffer("proxy_labels", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))

    @staticmethod
    def least_cameras(args):
        return 2 if args.camera_weight else 1

    def tested(self):
        """The model that is clustered with, measured and saved."""
        return self.teacher

    def relabel(self, epoch, target, source, cluster):
        """Cluster for an epoch by the teacher; centres and proxies follow, and are fixed until the next."""
        device, features = self.pseudo_labels.device, target()
        labels = cluster(features)
        inside, count = labels >= 0, int(labels.max()) + 1
        sums = features.new_zeros(count, features.shape[1]).index_add_(0, labels[inside], features[inside])
        self.centres = (sums / labels[inside].bincount(minlength=count)[:, None]).to(device)
        proxies, proxy_labels, _ = camera_proxies(features, labels, self.cameras.cpu())
        if self.args.proxy_scale == "columns":
            proxies = F.normalize(proxies, dim=0)
        self.proxies, self.proxy_labels = proxies.to(device), proxy_labels.to(device)
        return labels

    def forward(self, images, rows):
        """`images` (B, 3 views, 3, H, W); `rows`: the numbers of the images."""
        first, second, plain = images.unbind(1)
        student = features_of(self.encoder, first)
        with torch.no_grad():
            # The student's norms see the second view too; nothing else of it counts.
            features_of(self.encoder, second)
            teacher, calm = (features_of(self.teacher, *self.shuffled(view)) for view in (second, plain))
        with torch.autocast(images.device.type, enabled=False):
            loss, values = self.losses(student, teacher, calm, gather_by_domain(rows, 1))
        return loss, {name: value.detach() for name, value in {"loss": loss, **values}.items()}, ()

    def shuffled(self, images):
        """This process's share of the batch in another order, and the way back.

        A teacher whose norms see groups would tell from the statistics which images are of one cluster.
        """
        if not self.args.norm_group:
            return images, None
        whole = gather_with_gradient(images)
        generator = torch.Generator().manual_seed(self.args.seed * 2**31 + int(self.num_steps))
        order = torch.randperm(len(whole), generator=generator)
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        share = order[rank * len(images) : (rank + 1) * len(images)].to(images.device)
        return whole[share], order.argsort().to(images.device)

    def losses(self, student, teacher, calm, rows):
        args, labels, cameras = self.args, self.pseudo_labels[rows], self.cameras[rows]
        logits = student @ self.centres.t() / args.centre_temperature
        unit, k, w = (F.normalize(side, dim=1) for side in (student, teacher, calm))
        likeness, same = unit @ k.t(), labels[:, None] == labels[None, :]
        hardest = likeness.masked_fill(~same, torch.inf).amin(1, keepdim=True)
        others = likeness.masked_fill(same, -torch.inf)
        views = torch.cat([hardest, others], dim=1) / args.view_temperature
        wanted = (w @ w.t() / args.consistency_temperature).softmax(1)
        log_odds = (likeness / args.consistency_temperature).log_softmax(1)
        values = {
            "loss_centres": F.cross_entropy(logits, labels, label_smoothing=args.label_smoothing),
            "loss_views": F.cross_entropy(views, torch.zeros_like(labels)),
            "loss_same": args.consistency_weight * F.kl_div(log_odds, wanted, reduction="batchmean"),
        }
        if args.camera_weight:
            own = labels[:, None] == self.proxy_labels
            contrast = proxy_contrast(student, self.proxies, own, own, args.hard_proxies, args.proxy_temperature)
            # The sum over the batch's cameras of the means over their images.
            shares = 1 / (cameras[:, None] == cameras[None, :]).sum(1)
            values["loss_cameras"] = args.camera_weight * (shares * contrast).sum()
        return sum(values.values()), values

    def after_step(self):
        """The teacher follows the student."""
        move_teacher(self.teacher, self.encoder, self.args.teacher_momentum)
        self.num_steps += 1


def features_of(model, images, order=None):
    """BNNeck features of the whole batch, float32; `order` puts shuffled images back."""
    features = gather_by_domain(model.backbone(images), 1)
    with torch.autocast(images.device.type, enabled=False):
        features, _ = model.neck(features.float())
    return features if order is None else features[order]

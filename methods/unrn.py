"""UNRN: a student learns from pseudo labels as far as its mean teacher agrees, beside the source's centres.

First the source alone: CE + soft triplets of both heads, on features f of the last map and of the one before. Then
student and teacher (marked ') see the same images of both domains, x of the source, t of the target:

    L = mean_t r (CE + CE_3) + triplets + mean_t v + w_c mean_x circle(f C^T) + w_q mean_t circle(m Q^T)

    v          KL(d' || d), d = softmax over [W_3 h_3, f C^T]; the second part has no gradient
    r          exp(-v), with its gradient; CE are those of both heads, averaged over the batch before r weighs them
    triplets   mean of -b log s_an, s = softmax over the distances to the farthest image of the own cluster and to the
               nearest of another; b: the mean of r of the image and of that other one, without gradient
    C          centres of the source's identities: mean u at first, then moved by unit-length f of each image
    Q          a queue of unit m = BN(Linear(h)) of earlier target images; those of the own cluster are positives

The classes are the source's identities, which the target's clusters follow; both classifiers start anew with every
clustering, the student's and the teacher's each from a draw of its own, and the queue starts empty.

*As corrected*: the released triplets have a second term, -a log s_ap, which pulls against the first; its author takes
it for an error, and it is left out. CE is as in the released code; the paper weighs the CE of each image by its own r.
Chosen here: both networks see one view of an image, m is the student's, the queue is filled only while it is used, and
its contrast has the queue alone as negatives, without the source's centres.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from utils.batches.pseudo_batches import gather_by_domain
from utils.evaluation.groups.clusters import NOISE
from utils.modeling.domain_norms import copy_source_norms, group_batch_statistics, split_norms, train_alone
from utils.modeling.hybrid_memory import move_in_turn
from utils.modeling.losses import distances
from utils.modeling.reid_model import BNNeck
from utils.modeling.stages import summary_and_earlier, widths_of
from utils.training.contrast import FeatureQueue, circle_contrast
from utils.training.source_stage import adapting, erasing_of, queue_head, reset_linear, source_losses, staged_rate
from utils.training.teacher import move_teacher, teacher_of, warmed_momentum

NEED = "--method unrn uses"


class UNRN(nn.Module):
    """Student, teacher, centres, queue and pseudo labels; `forward` is the loss of one batch of source and target.

    With several processes, each passes its share of the images through the backbones. The features are gathered, one
    domain after the other, so that norms and losses see the whole batch, as in a run with one process.
    """

    rests_weights = True
    fresh_optimizer, erasing = staticmethod(adapting), staticmethod(erasing_of)

    def __init__(self, encoder, args, num_source, cameras, source_size=0):
        super().__init__()
        self.args, self.num_source = args, num_source
        # A cluster has two images or more.
        self.student = TwoHeads(encoder, num_source + len(cameras) // 2, args.norm_group)
        split_norms(self.student, 2)
        self.teacher = teacher_of(self.student)
        self.queue = FeatureQueue(args.queue_size, encoder.num_features)
        self.register_buffer("pseudo_labels", torch.full((len(cameras),), NOISE))
        self.register_buffer("centres", torch.zeros(num_source, encoder.num_features))
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64))
        # Of the teacher.
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))

    @staticmethod
    def rate(args, steps):
        warmup = args.lr_warmup_epochs, args.lr_warmup_factor, args.lr_milestones, args.lr_gamma
        return staged_rate(args.source_epochs, warmup, later=lambda epoch: 1.0)

    @staticmethod
    def all_steps(args, steps):
        own = args.source_steps or steps
        return args.source_epochs * own + (args.num_train_epochs - args.source_epochs) * steps

    def epoch_steps(self, epoch, steps, batch_size):
        return self.args.source_steps or steps if epoch <= self.args.source_epochs else steps

    def labels_for_batches(self, labels, key):
        """While there are no clusters, batches of any images: one label."""
        return labels if (labels >= 0).any() else torch.zeros_like(labels)

    @property
    def adapts(self):
        """Whether the epochs of the source are over."""
        return int(self.epoch) > self.args.source_epochs

    @property
    def queues(self):
        return bool((int(self.epoch) - 1 - self.args.source_epochs) % self.args.cluster_every)

    def tested(self):
        """The model that is clustered with, measured and saved."""
        return (self.teacher if self.adapts else self.student).encoder

    def relabel(self, epoch, target, source, cluster):
        """Cluster by the teacher in every n-th epoch; the classifiers and the queue start anew."""
        args = self.args
        self.epoch.fill_(epoch)
        number = epoch - 1 - args.source_epochs
        if number < 0:
            return torch.full((len(self.pseudo_labels),), NOISE)
        if number == 0:
            self.teacher.load_state_dict(self.student.state_dict())
            self.centres.copy_(source())
        if number % args.cluster_every:
            return self.pseudo_labels.cpu()
        labels = cluster(target())
        layers = [network.classifiers for network in (self.student, self.teacher)]
        reset_linear([layer for both in layers for layer in both], args.seed * 2**31 + epoch)
        self.queue.empty(args.seed * 2**31 + epoch)
        return labels

    def forward(self, images, rows):
        """`rows`: labels for source images; for target images `num_source` plus the number of the image."""
        rows, seen = gather_by_domain(rows, 2), ()
        if self.adapts:
            train_alone(self.student, None)
            student = features_of(self.student, images)
            with torch.no_grad():
                teacher = features_of(self.teacher, images)
            with torch.autocast(images.device.type, enabled=False):
                loss, values = self.losses(student, teacher, rows)
                source, target = (F.normalize(side, dim=1).detach() for side in (student.features, student.queued))
                half = len(rows) // 2
                seen = source[:half], rows[:half], target[half:], rows[half:] - self.num_source
        else:
            labels, smoothing = rows.chunk(2)[0], self.args.label_smoothing
            found = source_losses(self.student, images, labels, self.num_source, smoothing)
            values = dict(zip(NAMES, [*found, *[torch.zeros_like(found[0])] * 3], strict=True))
            loss = sum(values.values())
        return loss, {name: value.detach() for name, value in {"loss": loss, **values}.items()}, seen

    def losses(self, student, teacher, rows):
        """`student`, `teacher`: Outputs of [source, target]; `rows` as in `forward`."""
        args, count = self.args, self.num_source + int(self.pseudo_labels.max()) + 1
        source, images = rows[: len(rows) // 2], rows[len(rows) // 2 :] - self.num_source
        clusters = self.pseudo_labels[images]
        features, own = student.features.chunk(2)
        centres = self.centres.clone()

        def described(outputs):
            identities = outputs.features.detach().chunk(2)[1] @ centres.t()
            return torch.cat([outputs.logits[1].chunk(2)[1][:, :count], identities], dim=1).log_softmax(1)

        wanted, log_odds = described(teacher), described(student)
        apart = (wanted.exp() * (wanted - log_odds)).sum(1)
        trust = (-apart).exp()
        classes = clusters + self.num_source
        each = [F.cross_entropy(side.chunk(2)[1][:, :count], classes) for side in student.logits]
        is_own = F.one_hot(source, self.num_source).bool()
        by_centre = circle_contrast(F.normalize(features, dim=1) @ centres.t(), is_own)
        values = [trust.mean() * sum(each), trusted_triplet(own, clusters, trust.detach()), apart.mean()]
        values += [args.centre_weight * by_centre.mean(), torch.zeros_like(by_centre[0])]
        if self.queues and args.queue_weight:
            queue = self.queue
            same = (queue.labels >= 0) & (self.pseudo_labels[queue.labels.clamp(min=0)] == clusters[:, None])
            cosines = F.normalize(student.queued.chunk(2)[1], dim=1) @ queue.features.clone().t()
            values[-1] = args.queue_weight * circle_contrast(cosines, same).mean()
        return sum(values), dict(zip(NAMES, values, strict=True))

    @torch.no_grad()
    def after_step(self, *seen):
        """Centres, queue and teacher follow; in the source's epochs the target's norms."""
        if not seen:
            copy_source_norms(self.student)
            return
        features, identities, queued, images = seen
        move_in_turn(self.centres, identities, features, self.args.centre_momentum)
        if self.queues:
            self.queue.add(queued, images)
        move_teacher(self.teacher, self.student, warmed_momentum(self.args.teacher_momentum, int(self.num_steps)))
        self.num_steps += 1


NAMES = ("loss_classes", "loss_triplet", "loss_apart", "loss_centres", "loss_queue")


class Outputs(NamedTuple):
    """Of the whole batch: pooled features; those of each head that triplets compare; logits; the queue's features."""

    features: torch.Tensor
    compared: list
    logits: list
    queued: torch.Tensor


class TwoHeads(nn.Module):
    """A Re-ID model with a second neck and classifier for the map before the last, and a head for the queue."""

    def __init__(self, encoder, num_classes, group_size=0):
        super().__init__()
        self.encoder = encoder
        encoder.reset_classifier(num_classes)
        widths = widths_of(encoder.backbone, NEED)
        self.widths = [encoder.num_features, widths[1]]
        self.neck, self.classifier = BNNeck(widths[1]), nn.Linear(widths[1], num_classes, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.001)
        if group_size:
            group_batch_statistics(self.neck, group_size)
        self.queue_head = queue_head(encoder.num_features, group_size)

    @property
    def classifiers(self):
        return [self.encoder.classifier, self.classifier]

    def pool(self, images):
        """Both features of each image, side by side."""
        return torch.cat([side.float() for side in summary_and_earlier(self.encoder.backbone, images, NEED)], dim=1)

    def heads(self, pooled):
        whole, earlier = pooled.split(self.widths, 1)
        features, logits = self.encoder.neck(whole)
        return Outputs(
            whole, [whole, earlier], [logits, self.classifier(self.neck(earlier))], self.queue_head(features)
        )


def features_of(network, images):
    """Outputs of the whole batch, one domain after the other, float32."""
    pooled = gather_by_domain(network.pool(images), 2)
    with torch.autocast(images.device.type, enabled=False):
        return network.heads(pooled.float())


def trusted_triplet(features, labels, trust):
    """Soft triplets of hard pairs, each weighed by the mean trust in the image and in the nearest of another label."""
    distance = distances(features)
    same = labels[:, None] == labels[None, :]
    farthest = distance.masked_fill(~same, -torch.inf).amax(1)
    nearest, place = distance.masked_fill(same, torch.inf).min(1)
    return ((trust + trust[place]) / 2 * F.softplus(farthest - nearest)).mean()

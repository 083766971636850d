"""GLT: k-means groups of several numbers, refined after every epoch so that images are shared out evenly.

First the source alone: CE + soft triplets. Then a student learns from source x and target t, with the labels of every
number n of groups in the first term, of the middle number in the others:

    L = mean_n CE(W_n h, group) + soft triplets of f + w_c mean_x circle(f C^T) + w_q mean_t circle(m Q^T)

f: pooled features, h: BNNeck features, of whose numbers the classifiers W_n and m miss a random share.

    C, Q       centres of the source's identities and queue of earlier target images, as in UNRN
    labels     k-means of the mean teacher's u; after every epoch P = softmax(u W_n^T)^power over all target images,
               scaled to uniform rows and columns, whose largest entry is an image's group

A round starts from the model of the source, with k-means groups of the teacher at the end of the round before.

*A reconstruction*: the released code does not run the published loss. This is that loss put together from its parts:
the contrasts of an older version, and CE of all numbers as in the paper; the code has that of the first. Chosen here:
the classifiers start as the groups' mean directions, the refinement takes the teacher's, m is the student's, and
student and teacher see one view of an image.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from utils.batches.pseudo_batches import gather_by_domain
from utils.evaluation.groups.clusters import NOISE
from utils.modeling.domain_norms import copy_source_norms, split_norms, train_alone
from utils.modeling.hybrid_memory import move_in_turn
from utils.modeling.losses import hard_triplet
from utils.modeling.memories import class_means
from utils.training.balance import balanced_labels
from utils.training.clustering import from_main, k_means
from utils.training.contrast import FeatureQueue, circle_contrast
from utils.training.source_stage import adapting, erasing_of, queue_head, source_losses, staged_rate
from utils.training.teacher import move_teacher, teacher_of, warmed_momentum


class GLT(nn.Module):
    """Student, teacher, centres, queue and groups; `forward` is the loss of one batch of source and target.

    With several processes, each passes its share of the images through the backbones. The features are gathered, one
    domain after the other, so that norms and losses see the whole batch, as in a run with one process.
    """

    rests_weights = True
    fresh_optimizer, erasing = staticmethod(adapting), staticmethod(erasing_of)

    def __init__(self, encoder, args, num_source, cameras, source_size=0):
        super().__init__()
        self.args, self.num_source = args, num_source
        self.student = ManyHeads(encoder, num_source, args.group_counts, args.norm_group)
        split_norms(self.student, 2)
        self.teacher = teacher_of(self.student)
        # The model of the source, for later rounds.
        self.start = teacher_of(self.student) if args.rounds > 1 else None
        self.queue = FeatureQueue(args.queue_size, encoder.num_features)
        self.register_buffer("pseudo_labels", torch.full((len(cameras),), NOISE))
        self.register_buffer("group_labels", torch.zeros(len(args.group_counts), len(cameras), dtype=torch.int64))
        self.register_buffer("centres", torch.zeros(num_source, encoder.num_features))
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64))
        # Of the teacher, in this round.
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))

    @staticmethod
    def check_images(args, count):
        if max(args.group_counts) > count:
            raise ValueError(
                f"{count} images cannot be divided into {max(args.group_counts)} groups (--group_counts "
                f"{' '.join(map(str, args.group_counts))}): give more images, or lower the numbers"
            )

    @staticmethod
    def clusterings(features, args, group):
        return [k_means(features, args.group_counts[middle(args)], seed=args.seed)]

    @staticmethod
    def rate(args, steps):
        warmup = args.lr_warmup_epochs, args.lr_warmup_factor, args.lr_milestones, args.lr_gamma

        def later(epoch):
            _, place = round_of(epoch, args)
            return args.lr_gamma ** sum(place >= milestone for milestone in args.round_milestones)

        return staged_rate(args.source_epochs, warmup, later)

    @staticmethod
    def all_steps(args, steps):
        own = args.source_steps or steps
        return args.source_epochs * own + (args.num_train_epochs - args.source_epochs) * steps

    def epoch_steps(self, epoch, steps, batch_size):
        return self.args.source_steps or steps if epoch <= self.args.source_epochs else steps

    def labels_for_batches(self, labels, key):
        """While there are no groups, batches of any images: one label."""
        return labels if (labels >= 0).any() else torch.zeros_like(labels)

    @property
    def adapts(self):
        """Whether the epochs of the source are over."""
        return int(self.epoch) > self.args.source_epochs

    def tested(self):
        """The model that is clustered with, measured and saved."""
        return (self.teacher if self.adapts else self.student).encoder

    def relabel(self, epoch, target, source, cluster):
        """k-means at the start of a round, then the refinement of the groups."""
        args = self.args
        self.epoch.fill_(epoch)
        if not self.adapts:
            return torch.full((len(self.pseudo_labels),), NOISE)
        number, place = round_of(epoch - args.source_epochs, args)
        if number == 0 and place == 1:
            for copy in (self.teacher, self.start):
                if copy is not None:
                    copy.load_state_dict(self.student.state_dict())
        device = self.pseudo_labels.device
        features = target().to(device)
        if place > 1:
            weights = [layer.weight for layer in self.teacher.classifiers]
            self.group_labels.copy_(from_main(lambda: refined(features, weights, args.balance_power).cpu()))
            return cluster(labels=self.group_labels[middle(args)].cpu())
        for which, count in enumerate(args.group_counts):
            if which != middle(args):
                labels = from_main(lambda count=count: k_means(features, count, seed=args.seed).labels)
                self.group_labels[which] = labels.to(device)
        labels = cluster(features)
        self.group_labels[middle(args)] = labels.to(device)
        if number:
            self.student.load_state_dict(self.start.state_dict())
            self.teacher.load_state_dict(self.start.state_dict())
            features = target().to(device)
        # On the CPU, where sums have one order: every process starts from the same bits.
        for network in (self.student, self.teacher):
            for layer, groups in zip(network.classifiers, self.group_labels, strict=True):
                layer.weight.copy_(class_means(features.cpu(), groups.cpu(), len(layer.weight)))
        self.centres.copy_(source())
        self.queue.empty(args.seed * 2**31 + epoch)
        self.num_steps.zero_()
        return labels

    def forward(self, images, rows):
        """`rows`: labels for source images; for target images `num_source` plus the number of the image."""
        rows, seen = gather_by_domain(rows, 2), ()
        if self.adapts:
            train_alone(self.student, None)
            pooled = gather_by_domain(self.student.pool(images), 2)
            with torch.no_grad():
                # For the averages of its norms alone.
                averaged = gather_by_domain(self.teacher.pool(images), 2)
            with torch.autocast(images.device.type, enabled=False):
                with torch.no_grad():
                    self.teacher.heads(averaged.float())
                student = self.student.grouped(pooled.float(), self.kept_numbers(pooled))
                loss, values = self.losses(student, rows)
                source, target = (F.normalize(side, dim=1).detach() for side in (student.features, student.queued))
                half = len(rows) // 2
                seen = source[:half], rows[:half], target[half:], rows[half:] - self.num_source
        else:
            labels, smoothing = rows.chunk(2)[0], self.args.label_smoothing
            found = source_losses(self.student, images, labels, self.num_source, smoothing)
            values = dict(zip(NAMES, [*found, *[torch.zeros_like(found[0])] * 2], strict=True))
            loss = sum(values.values())
        return loss, {name: value.detach() for name, value in {"loss": loss, **values}.items()}, seen

    def kept_numbers(self, pooled):
        """Dropout's factors, the same on every process."""
        share = self.args.dropout
        generator = torch.Generator().manual_seed(
            self.args.seed * 2**31 + int(self.epoch) * 2**20 + int(self.num_steps)
        )
        return ((torch.rand(pooled.shape, generator=generator) >= share) / (1 - share)).to(pooled.device)

    def losses(self, student, rows):
        """`student`: Outputs of [source, target]; `rows` as in `forward`."""
        args = self.args
        source, images = rows[: len(rows) // 2], rows[len(rows) // 2 :] - self.num_source
        labels = self.pseudo_labels[images]
        features, own = student.features.chunk(2)
        each = [
            F.cross_entropy(logits.chunk(2)[1], groups[images])
            for logits, groups in zip(student.logits, self.group_labels, strict=True)
        ]
        is_own = F.one_hot(source, self.num_source).bool()
        by_centre = circle_contrast(F.normalize(features, dim=1) @ self.centres.clone().t(), is_own)
        queue = self.queue
        same = (queue.labels >= 0) & (self.pseudo_labels[queue.labels.clamp(min=0)] == labels[:, None])
        cosines = F.normalize(student.queued.chunk(2)[1], dim=1) @ queue.features.clone().t()
        by_queue = circle_contrast(cosines, same)
        values = [torch.stack(each).mean(), hard_triplet(own, labels)]
        values += [args.centre_weight * by_centre.mean(), args.queue_weight * by_queue.mean()]
        return sum(values), dict(zip(NAMES, values, strict=True))

    @torch.no_grad()
    def after_step(self, *seen):
        """Centres, queue and teacher follow; in the source's epochs the target's norms."""
        if not seen:
            copy_source_norms(self.student)
            return
        features, identities, queued, images = seen
        move_in_turn(self.centres, identities, features, self.args.centre_momentum)
        self.queue.add(queued, images)
        move_teacher(self.teacher, self.student, warmed_momentum(self.args.teacher_momentum, int(self.num_steps)))
        self.num_steps += 1


NAMES = ("loss_classes", "loss_triplet", "loss_centres", "loss_queue")


class Outputs(NamedTuple):
    """Of the whole batch: pooled features; those that triplets compare; logits; the queue's features."""

    features: torch.Tensor
    compared: list
    logits: list
    queued: torch.Tensor


class ManyHeads(nn.Module):
    """A Re-ID model of the source's identities, a classifier for each number of groups, and a head for the queue."""

    def __init__(self, encoder, num_source, groups, group_size=0):
        super().__init__()
        self.encoder = encoder
        encoder.reset_classifier(num_source)
        self.classifiers = nn.ModuleList(nn.Linear(encoder.num_features, count, bias=False) for count in groups)
        self.queue_head = queue_head(encoder.num_features, group_size)

    def pool(self, images):
        return self.encoder.backbone(images)

    def heads(self, pooled):
        """For the source's epochs: logits of the identities."""
        features, logits = self.encoder.neck(pooled)
        return Outputs(pooled, [pooled], [logits], self.queue_head(features))

    def grouped(self, pooled, kept):
        """Logits of the groups, from features times `kept`."""
        features = self.encoder.neck(pooled)[0] * kept
        return Outputs(pooled, [pooled], [layer(features) for layer in self.classifiers], self.queue_head(features))


def middle(args):
    return len(args.group_counts) // 2


def round_of(epoch, args):
    """(round from 0, epoch in it from 1) of an epoch of the target, from 1; the last round has the rest."""
    number = min((epoch - 1) // args.round_epochs, args.rounds - 1)
    return number, epoch - number * args.round_epochs


def refined(features, weights, power):
    """The groups of all images by each classifier, shared out evenly: (numbers, N)."""
    return torch.stack([balanced_labels(F.normalize(features, dim=1) @ weight.t(), power) for weight in weights])

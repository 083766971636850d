"""HCD: SpCL's contrast with labels that move after every step, of clusters and of their parts.

    L = CE(u C^T / temperature, cluster)        u: unit-length BNNeck features; C: mean of the rows of each cluster

The memory has a row for each source identity and each target image. Target rows have two labels, a cluster and a part
of it, equal at first: of DBSCAN, where each image in none is alone. Nothing is clustered again. From the second epoch
on, after a step has moved the memory, for the batch's target images t and the memory's rows nearest to each:

    graph    W = exp(2 cos - 2) between mutual neighbours that are similar enough, S = D^-1/2 W D^-1/2 with diagonal 0;
             the scores of t are row 0 of (I - a S)^-1, its own set to 0
    image    all t leave their clusters and parts; then each joins those of the row n with the highest score, if that
             is high enough, n is of the target and among the nearest. n may be a t too, and have joined another
    parts    t's part is split at its peaks of density, if it has more than 4 rows; then t's part and the parts in
             t's cluster whose score is high enough become one, provided n's is among them. The nodes of the graph are
             t and the parts near it, with their means as features, not of unit length; as neighbours, their rows
             nearest to t have to be mutual and similar
    clusters the same with t's cluster, if it has more than 2 parts, which are the rows of the split, and more than 4
             images; and with the target's clusters near t

Labels that are joined for several t, one by way of another, become one. The first epoch has --steps_per_epoch; a later
one as many as its clusters fill, --images_per_id for each and one for each image alone, and the training ends after
--num_train_epochs x --steps_per_epoch steps.

Of too many peaks, those most similar to a denser row are kept. Peak numbers are rows here, a part's W is exponentiated
once, and the parts of a cluster that is split have the means that they have after parts were joined: the released code
differs in these three by mistake.
"""

import torch
from torch import nn

from utils.batches.pseudo_batches import LeastDrawn, gather_by_domain, in_groups
from utils.evaluation.groups.clusters import NOISE, singled_out
from utils.modeling.domain_norms import split_norms
from utils.modeling.hybrid_memory import HybridMemory
from utils.training.clustering import from_main, renumbered
from utils.training.optimizer import warmup_multistep
from utils.training.propagation import Joined, graph_of, mutual, parts_of, scores_of_first

# Clusters of fewer parts and parts of fewer images are not split.
LEAST_PARTS, LEAST_IMAGES = 3, 5


class HCD(nn.Module):
    """Encoder, memory, labels of clusters and parts; `forward` is the loss of one batch of source and target.

    With several processes, each passes its share of the images through the backbone. The features are gathered, one
    domain after the other, so that BatchNorm and memory see the whole batch, as in a run with one process.
    """

    def __init__(self, encoder, args, num_source, cameras, source_size=0):
        super().__init__()
        self.encoder, self.args, self.num_source, self.source_size = encoder, args, num_source, source_size
        # Of the epoch: -1 is an image alone. The memory's labels move.
        self.register_buffer("pseudo_labels", torch.full((len(cameras),), NOISE))
        self.memory = HybridMemory(
            torch.zeros(num_source + len(cameras), encoder.num_features),
            args.memory_temperature,
            args.memory_momentum,
            args.probability_floor,
        )
        self.register_buffer("parts", torch.arange(num_source + len(cameras)))
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64))
        # How often each target image was drawn, and that and the parts as they were before the epoch.
        self.register_buffer("draws", torch.zeros(len(cameras), dtype=torch.int64))
        self.register_buffer("draws_before", torch.zeros(len(cameras), dtype=torch.int64))
        self.register_buffer("parts_before", torch.zeros(len(cameras), dtype=torch.int64))
        split_norms(encoder, lambda name: 2)

    @staticmethod
    def all_steps(args, steps):
        return args.num_train_epochs * steps

    @staticmethod
    def rate(args, steps):
        """Its epochs differ in length: the rate is of as many steps as the first has."""
        warmup = args.lr_warmup_epochs, args.lr_warmup_factor, args.lr_milestones, args.lr_gamma
        return lambda epoch, step: warmup_multistep(1 + step // steps, *warmup)

    def epoch_steps(self, epoch, steps, batch_size):
        if epoch == 1:
            return steps
        labels = self.pseudo_labels
        images = self.args.images_per_id * (int(labels.max()) + 1) + int((labels == NOISE).sum())
        return images // batch_size + 1

    def draw_of_epoch(self):
        return LeastDrawn(self.draws_before.tolist(), self.parts_before.tolist(), self.source_size)

    def labels_for_batches(self, labels, key):
        """Labels in which images in no cluster form random groups, so that they are trained on too."""
        return in_groups(labels, self.args.images_per_id, key)

    def labels_of(self, clusters, threshold):
        """Only the first clustering counts; after it the labels have moved."""
        labels = self.moved() if self.epoch else clusters[0].labels
        return labels, threshold

    def moved(self):
        """The target's clusters as they are now, from 0; -1 for an image alone."""
        labels = self.memory.labels[self.num_source :].cpu()
        alone = labels.bincount(minlength=len(self.memory.labels))[labels] == 1
        return renumbered(labels.masked_fill(alone, NOISE))

    def tested(self):
        """The model that is clustered with, measured and saved."""
        return self.encoder

    def relabel(self, epoch, target, source, cluster):
        """DBSCAN before the first epoch; later epochs have the labels as they have moved."""
        memory, first = self.memory, self.num_source
        device = memory.prototypes.device
        if epoch == 1:
            features = target()
            labels = cluster(features)
            memory.prototypes.copy_(torch.cat([source(), features]).to(device))
            memory.labels.copy_(torch.cat([torch.arange(first), first + singled_out(labels)]))
            self.parts.copy_(memory.labels)
        else:
            labels = cluster(labels=self.moved())
            if (labels == 0).all():
                raise ValueError(
                    f"before epoch {epoch}: the clusters collapsed: all {len(labels)} images were joined into one. "
                    f"Raise --least_score {self.args.least_score:g} or --least_similarity "
                    f"{self.args.least_similarity:g}; or start from a better model"
                )
        self.epoch.fill_(epoch)
        self.draws_before.copy_(self.draws)
        self.parts_before.copy_(self.parts[first:])
        return labels

    def forward(self, images, rows):
        """`rows`: labels for source images; for target images `num_source` plus the number of the image."""
        features, rows = gather_by_domain(self.encoder.backbone(images), 2), gather_by_domain(rows, 2)
        with torch.autocast(images.device.type, enabled=False):
            bn_features, _ = self.encoder.neck(features.float())
            domains = zip(bn_features.chunk(2), rows.chunk(2), strict=True)
            losses = [self.memory(*domain) for domain in domains]
        values = {"loss": sum(losses), "loss_source": losses[0], "loss_target": losses[1]}
        seen = bn_features.detach(), rows
        return values["loss"], {name: value.detach() for name, value in values.items()}, seen

    @torch.no_grad()
    def after_step(self, bn_features, rows):
        self.memory.update(bn_features, rows)
        targets = rows[len(rows) // 2 :]
        self.draws += (targets - self.num_source).bincount(minlength=len(self.draws))
        if int(self.epoch) > 1:
            targets = list(dict.fromkeys(targets.tolist()))
            # One process decides for all: rounding may differ.
            clusters, parts = from_main(lambda: self.moved_labels(targets))
            self.memory.labels.copy_(clusters)
            self.parts.copy_(parts)

    def moved_labels(self, targets):
        """Labels of clusters and of parts after those of `targets`, rows of the memory, have followed the memory."""
        args, rows = self.args, self.memory.prototypes
        near = self.nearest_rows(targets)
        beside = rows[near]
        cosines = beside @ beside.transpose(1, 2)
        similar = cosines > args.least_similarity
        graph = graph_of(cosines, similar & mutual(cosines, args.point_neighbours))
        scores, places = scores_of_first(graph, args.spread).max(1)
        near, clusters, parts = near.cpu(), Labels(self.memory.labels), Labels(self.parts)
        best = near.gather(1, places.cpu()[:, None]).flatten().tolist()
        moves = [
            (row, other)
            for row, other, score, place in zip(targets, best, scores.tolist(), places.tolist(), strict=True)
            if score > args.least_score and place < args.point_neighbours and other >= self.num_source
        ]
        for labels in (clusters, parts):
            labels.follow(targets, moves, rounds=1 + len(set(best) & set(targets)))
        tied = similar & mutual(cosines, args.part_neighbours)
        around = list(zip(targets, near.tolist(), best, tied, strict=True))

        whole = set()
        for row in targets:
            members = parts.rows(parts.of(row))
            if len(members) >= LEAST_IMAGES and parts.of(row) not in whole:
                self.split(parts, [[member] for member in members], rows[members], whole)
        self.join(parts, around, lambda row, other: clusters.of(row) == clusters.of(other))

        whole = set()
        for row in targets:
            inside = clusters.rows(clusters.of(row))
            names = list(dict.fromkeys(parts.of(one) for one in inside))
            if len(names) >= LEAST_PARTS and len(inside) >= LEAST_IMAGES and clusters.of(row) not in whole:
                members = [parts.rows(part) for part in names]
                self.split(clusters, members, torch.stack([rows[some].mean(0) for some in members]), whole)
        self.join(clusters, around, lambda row, other: other >= self.num_source)
        return clusters.labels, parts.labels

    def nearest_rows(self, targets):
        """The memory's rows nearest to each, itself first."""
        rows = self.memory.prototypes
        cosines = rows[targets] @ rows.t()
        cosines[torch.arange(len(targets)), targets] = torch.inf
        return cosines.topk(min(self.args.graph_rows, len(rows)), dim=1).indices

    def split(self, labels, members, features, whole):
        """The first of the parts that `features` fall into keeps its label; one that stays `whole` is noted there."""
        args = self.args
        numbers = parts_of(features, args.part_neighbours, args.peak_similarity, args.most_peaks, args.spread).tolist()
        for number in sorted(set(numbers) - {0}):
            some = [row for own, found in zip(members, numbers, strict=True) if found == number for row in own]
            labels.move(some, labels.free())
        if not any(numbers):
            whole.add(labels.of(members[0][0]))

    def join(self, labels, around, fits):
        """For each (t, rows near it, n, which of them are tied): t's label and those near t with a high score become
        one, where n's is among them.

        `fits(t, row)`: whether a label, by its row nearest to t, may be joined.
        """
        args, rows, joined = self.args, self.memory.prototypes, Joined()
        means = labels.means(rows)
        for row, near, best, tied in around:
            first = {}
            for place, other in enumerate(near[1:], 1):
                first.setdefault(labels.of(other), place)
            places = [0, *first.values()]
            nodes = torch.cat([rows[row : row + 1], means[list(first)]])
            graph = graph_of(nodes @ nodes.t(), tied[places][:, places])
            scores = scores_of_first(graph, args.spread)[1:].tolist()
            high = {labels.of(row)}
            for (label, place), score in zip(first.items(), scores, strict=True):
                if score > args.least_score and fits(row, near[place]):
                    high.add(label)
            if labels.of(best) in high:
                joined.join(high)
        for label in joined.parents:
            labels.move(labels.rows(label), joined.name(label))


class Labels:
    """Labels of rows, on the CPU, and how many rows each label has; a label is below the number of rows."""

    def __init__(self, labels):
        self.labels = labels.cpu().clone()
        self.counts = self.labels.bincount(minlength=len(self.labels))

    def of(self, row):
        return int(self.labels[row])

    def rows(self, label):
        return (self.labels == label).nonzero().flatten().tolist()

    def free(self):
        """The smallest label that no row has."""
        return int((self.counts == 0).nonzero()[0])

    def means(self, rows):
        """The mean of the rows of each label, not of unit length; 0 of those that no row has."""
        sums = torch.zeros_like(rows).index_add_(0, self.labels.to(rows.device), rows)
        return sums / self.counts.clamp(min=1).to(rows)[:, None]

    def take_out(self, row):
        """Leave a row alone."""
        if int(self.counts[self.of(row)]) > 1:
            self.move([row], self.free())

    def follow(self, rows, moves, rounds):
        """Take the rows out; then, in each round, give a row the label that the other one of its move has."""
        for row in rows:
            self.take_out(row)
        for _ in range(rounds):
            names = [self.of(other) for _, other in moves]
            for (row, _), name in zip(moves, names, strict=True):
                self.move([row], name)

    def move(self, rows, label):
        self.counts -= self.labels[rows].bincount(minlength=len(self.counts))
        self.labels[rows] = label
        self.counts[label] += len(rows)

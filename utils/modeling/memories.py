"""Memories of features: a row an identity, a cluster or an image; unit length, float32, no gradient."""

import torch
import torch.nn.functional as F
from torch import nn

UPDATES = ("momentum", "hard", "mean")


def class_means(features, labels, num_ids):
    """Unit-length mean of the unit-length features (N, D) of each label 0..num_ids-1: (num_ids, D) float32."""
    sums = torch.zeros(num_ids, features.shape[1], dtype=torch.float32, device=features.device)
    sums.index_add_(0, labels, F.normalize(features.float(), dim=1))
    return F.normalize(sums, dim=1)


class PrototypeMemory(nn.Module):
    """One unit-length prototype an identity, compared with features by cosine and moved by the batch's hardest ones.

    loss = memory(features, labels)       # raw BNNeck features (B, D), labels 0..N-1; gradient to the features only
    memory.update(features, labels)       # after the backward pass

    The loss is the cross-entropy of `u M^T / temperature` with u the unit-length features. The update takes, of each
    identity in the batch, the sample least like its prototype m: `m <- momentum m + (1 - momentum) u`, unit length.
    With several processes, give every one of them the whole batch: the prototypes then stay equal.
    """

    def __init__(self, prototypes, temperature=0.01, momentum=0.2):
        super().__init__()
        if prototypes.ndim != 2:
            raise ValueError(f"prototypes must be (identities, width), got {tuple(prototypes.shape)}")
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be between 0 and 1, got {momentum}")
        self.temperature, self.momentum = temperature, momentum
        self.register_buffer("prototypes", F.normalize(prototypes.detach().float(), dim=1))

    def similarities(self, features):
        """Cosine of each feature with each prototype: (B, N) float32."""
        with torch.autocast(features.device.type, enabled=False):
            # The update writes into the prototypes, also while a graph still needs the old ones.
            return F.normalize(features.float(), dim=1) @ self.prototypes.clone().t()

    def forward(self, features, labels):
        return F.cross_entropy(self.similarities(features) / self.temperature, labels)

    @torch.no_grad()
    def update(self, features, labels):
        with torch.autocast(features.device.type, enabled=False):
            unit = F.normalize(features.float(), dim=1)
            old = self.prototypes[labels]
            # [B, B]: for each sample, the similarities of those of its identity, and the first lowest of them.
            own = (unit * old).sum(1).expand(len(labels), -1)
            own = own.masked_fill(labels[:, None] != labels[None, :], torch.inf)
            hardest = unit[own.argmin(1)]
            # Samples of one identity all write the same row.
            self.prototypes[labels] = F.normalize(torch.lerp(hardest, old, self.momentum), dim=1)

    def _apply(self, fn, recurse=True):
        # model.half() and DeepSpeed would round the prototypes.
        def keep_precision(tensor):
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_precision, recurse)

    @torch.no_grad()
    def rebuild(self, features, labels):
        """Every prototype anew: the mean direction of its identity's features."""
        self.prototypes.copy_(class_means(features, labels, len(self.prototypes)))


class ClusterMemory(PrototypeMemory):
    """A prototype of each cluster. The update moves `m <- momentum m + (1 - momentum) u`, unit length, with u

    momentum: every image of the cluster in the batch, one after the other;
    hard: the image least like the prototype;
    mean: the mean of the cluster's images.
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
            same = (labels[:, None] == labels[None, :]).float()
            means = same @ unit / same.sum(1, keepdim=True)
            # Images of one cluster all write the same row.
            self.prototypes[labels] = F.normalize(torch.lerp(means, self.prototypes[labels], self.momentum), dim=1)

    @torch.no_grad()
    def renew(self, features, labels):
        """Other clusters: their prototypes are the mean directions of the rows with labels 0 and up."""
        labels = labels.to(features.device)
        known = labels >= 0
        means = class_means(features[known], labels[known], int(labels.max()) + 1)
        self.prototypes = means.to(self.prototypes.device)

    def make_room(self, num_clusters):
        """For a checkpoint that is about to be read."""
        self.prototypes = self.prototypes.new_zeros(num_clusters, self.prototypes.shape[1])


class HybridMemory(PrototypeMemory):
    """A row of each source identity and of each target image, and a label of each row, from 0.

    A label's prototype is the mean of its rows, not brought to unit length: `loss = CE(u means^T / temperature)`. In
    the update every image of the batch moves its own row, one after the other.
    """

    def __init__(self, rows, temperature=0.05, momentum=0.2):
        super().__init__(rows, temperature, momentum)
        self.register_buffer("labels", torch.arange(len(rows)))

    def forward(self, features, rows):
        with torch.autocast(features.device.type, enabled=False):
            sums, counts = self.sums()
            # Labels without rows are no class.
            empty = counts == 0
            means = sums / counts.clamp(min=1)[:, None]
            logits = F.normalize(features.float(), dim=1) @ means.t() / self.temperature
            return F.cross_entropy(logits.masked_fill(empty, -torch.inf), self.labels[rows])

    @torch.no_grad()
    def sums(self):
        """Of each label below the number of rows: the sum of its rows, and how many they are."""
        sums = torch.zeros_like(self.prototypes).index_add_(0, self.labels, self.prototypes)
        return sums, self.labels.bincount(minlength=len(sums)).to(sums.dtype)

    @torch.no_grad()
    def update(self, features, rows):
        with torch.autocast(features.device.type, enabled=False):
            move_in_turn(self.prototypes, rows, F.normalize(features.float(), dim=1), self.momentum)


def move_in_turn(memory, rows, unit, momentum):
    """In place: `memory[row] <- momentum memory[row] + (1 - momentum) u`, unit length, one image after the other."""
    # [B, B]: how many earlier images of the batch move the same row.
    turn = (rows[:, None] == rows[None, :]).tril(-1).sum(1)
    for number in range(int(turn.max()) + 1):
        now = turn == number
        memory[rows[now]] = F.normalize(torch.lerp(unit[now], memory[rows[now]], momentum), dim=1)

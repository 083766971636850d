"""SOLIDER: DINO of a controlled Swin, and parts of the body that its features must tell, the more the weight is 1.

A step, of two crops of the whole and several of parts of each image:

1.  teacher(whole), weight 1, gives a map of tokens. Two-means of the tokens' lengths: the longer ones are the person.
    Three-means of these: parts, numbered from top to bottom; the rest is 0. A crop whose person has at most half of
    the tokens has no parts.
2.  A weight, 0 or 1, is drawn for each image, for all its crops. teacher(whole), weight, gives DINO's scores.
3.  student(all crops, weight), and student(crops with parts, one of the three parts blank, weight).
4.  L = DINO + factor mean over tokens of weight CE(head(token), part), over crops with parts, blank or not; 0 where no
    crop of the batch has any.

The head that tells the parts is fixed and random: in the authors' code, from which the released weights come, no
optimiser has it. Its gradient reaches the student.
"""

import random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

NUM_PARTS = 3
RESTARTS, ROUNDS = 10, 100


# The parts


def semantic_parts(maps):
    """(N, C, h, w) -> parts (N, h, w), 0 for what is not the person, and which crops have any (N,)."""
    tokens = maps.detach().double().flatten(2).transpose(1, 2)
    person = longer_tokens(tokens)
    has_parts = (person.sum(1) > 0.5 * person.shape[1]) & (person.sum(1) >= NUM_PARTS)
    parts = torch.zeros(person.shape, dtype=torch.int64, device=maps.device)
    if has_parts.any():
        tokens, person = tokens[has_parts], person[has_parts]
        found = from_top(k_means(tokens, person, NUM_PARTS), person, maps.shape[3])
        parts[has_parts] = torch.where(person, found + 1, 0)
    return parts.unflatten(1, maps.shape[2:]), has_parts


def longer_tokens(tokens):
    """Two-means of the lengths of each image's tokens (N, T, C), exactly: which are among the longer ones (N, T)."""
    lengths, order = tokens.norm(dim=2).sort(dim=1)
    count = lengths.shape[1]
    left = torch.arange(1, count, device=tokens.device, dtype=tokens.dtype)
    sums = lengths.cumsum(1)
    total, sums = sums[:, -1:], sums[:, :-1]
    # The larger it is, the nearer the lengths of both sides are to their means.
    between = sums.square() / left + (total - sums).square() / (count - left)
    first = between.argmax(1, keepdim=True) + 1
    is_longer = torch.arange(count, device=tokens.device)[None, :] >= first
    # Where all are equal, nothing stands out.
    is_longer &= lengths[:, -1:] > lengths[:, :1]
    return torch.zeros_like(is_longer).scatter(1, order, is_longer)


def k_means(tokens, mask, num_clusters):
    """Cluster of each token (N, T, C) of `mask`, the best of some starts; the same for an image in any batch."""
    # [N, R, K, C]
    centres = first_centres(tokens, mask, num_clusters)
    labels = None
    for _ in range(ROUNDS):
        distance = distances(tokens, centres)
        new = distance.argmin(2)
        if labels is not None and torch.equal(new, labels):
            break
        labels = new
        is_in = F.one_hot(labels, num_clusters) * mask[:, None, :, None]
        counts = is_in.sum(2)
        means = torch.einsum("nrtk,ntc->nrkc", is_in.to(tokens.dtype), tokens) / counts.clamp(min=1)[..., None]
        centres = torch.where(counts[..., None] > 0, means, centres)
    spread = (distance.amin(2) * mask[:, None]).sum(2)
    best = spread.argmin(1)
    return labels[torch.arange(len(labels), device=labels.device), best]


def first_centres(tokens, mask, num_clusters):
    """k-means++ with the same random numbers for every image, as the authors' code has them."""
    draws = torch.rand(RESTARTS, num_clusters, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draws = draws.to(tokens)
    images = torch.arange(len(tokens), device=tokens.device)[:, None]
    share = mask[:, None].to(tokens.dtype).expand(-1, RESTARTS, -1)
    chosen = []
    for number in range(num_clusters):
        passed = share.cumsum(2)
        place = (passed <= draws[:, number, None] * passed[..., -1:]).sum(2).clamp(max=passed.shape[2] - 1)
        chosen.append(tokens[images, place])
        nearest = distances(tokens, torch.stack(chosen, dim=2)).amin(2)
        # Tokens that are all equal: any of them.
        share = torch.where((nearest * mask[:, None]).sum(2, keepdim=True) > 0, nearest, 1.0) * mask[:, None]
    return torch.stack(chosen, dim=2)


def distances(tokens, centres):
    """Squared distances: (N, T, C), (N, R, K, C) -> (N, R, K, T)."""
    num_clusters = centres.shape[2]
    gaps = torch.cdist(centres.flatten(1, 2), tokens, compute_mode="donot_use_mm_for_euclid_dist").square()
    return gaps.unflatten(1, (-1, num_clusters))


def from_top(labels, mask, width):
    """The clusters (N, T) of the tokens of `mask` numbered by the mean of their rows."""
    rows = torch.arange(labels.shape[1], device=labels.device) // width
    is_in = (F.one_hot(labels, NUM_PARTS) * mask[..., None]).double()
    means = (is_in * rows[:, None]).sum(1) / is_in.sum(1)
    # A cluster without tokens comes last.
    place = means.nan_to_num(nan=torch.inf).argsort(dim=1, stable=True).argsort(dim=1)
    return place.gather(1, labels)


# The training


class Draws(NamedTuple):
    """Of a step: the weight of each of this process's images, and the part that is blank."""

    weights: torch.Tensor
    blank: int


def sum_over_processes(count, device):
    """(sum of a number over all processes, number of processes)."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return count, 1
    total = torch.tensor(count, device=device)
    torch.distributed.all_reduce(total)
    return total.item(), torch.distributed.get_world_size()


def drawn(seed, step, batch_size, share, device):
    """The same for an image of the batch with any number of processes; `share` is this one's slice of the batch."""
    rng = random.Random(f"semantic/{seed}/{step}")
    blank = rng.randint(1, NUM_PARTS)
    weights = torch.tensor([float(rng.randint(0, 1)) for _ in range(batch_size)])
    return Draws(weights[share].to(device), blank)


class Solider(nn.Module):
    """DINO's student or teacher (`distillation`) with a controlled Swin, and the fixed head of the parts."""

    def __init__(self, distillation, width, factor=1.0):
        super().__init__()
        self.distillation, self.factor = distillation, factor
        bottleneck = max(2, width // 8)
        self.part_head = nn.Sequential(
            *(nn.Linear(distillation.backbone.num_features, width), nn.GELU()),
            *(nn.Linear(width, width), nn.GELU()),
            nn.Linear(width, bottleneck),
        )
        for layer in self.part_head:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.part_vectors = nn.Linear(bottleneck, NUM_PARTS + 1, bias=False)
        # Buffers: a checkpoint holds them, and no optimiser finds them.
        for layer in (*self.part_head, self.part_vectors):
            for name, parameter in list(layer.named_parameters()):
                delattr(layer, name)
                layer.register_buffer(name, parameter.detach())

    @property
    def backbone(self):
        return self.distillation.backbone

    @property
    def prototypes(self):
        return self.distillation.prototypes

    @property
    def centre(self):
        return self.distillation.centre

    def part_logits(self, maps):
        """(N, C, h, w) -> cosines with a vector of each part and of the rest (N, 4, h, w)."""
        code = F.normalize(self.part_head(maps.float().movedim(1, -1)), dim=-1)
        return F.linear(code, F.normalize(self.part_vectors.weight, dim=1)).movedim(-1, 1)

    @torch.no_grad()
    def teach(self, whole, weights):
        """Of a teacher: DINO's scores of the whole crops, and their parts, for `forward`."""
        maps = self.backbone.feature_map(whole.flatten(0, 1), weights.new_ones(2 * len(weights)))
        parts, has_parts = semantic_parts(maps)
        return self.distillation.scores(whole, weights), (parts, has_parts)

    def forward(self, crops, teacher_scores, teacher_temperature, weights, blank, parts, has_parts):
        student, whole = self.distillation, crops["whole"]
        images, of_image = whole.flatten(0, 1), weights.repeat_interleave(whole.shape[1])
        features, maps = self.backbone.summary_and_map(images, of_image)
        scores = [student.scores_of(features, whole.shape[:2]), student.scores(crops["parts"], weights)]
        loss, values = student.loss_of(torch.cat(scores), teacher_scores, teacher_temperature)
        semantic = self.semantic_loss(images, of_image, maps, blank, parts, has_parts)
        loss = loss + self.factor * semantic
        values |= {"loss": loss.detach(), "loss_semantic": semantic.detach(), "with_parts": has_parts.float().mean()}
        return loss, values

    def semantic_loss(self, images, weights, maps, blank, parts, has_parts):
        """With several processes, each one's share of the mean over all tokens."""
        count, processes = sum_over_processes(2 * parts[has_parts].numel(), maps.device)
        if not has_parts.any():
            return maps.new_zeros((), dtype=torch.float32)
        parts, weights = parts[has_parts], weights[has_parts]
        kept = F.interpolate((parts != blank).float()[:, None], size=images.shape[2:], mode="nearest")
        blanked = self.backbone.feature_map(images[has_parts] * kept, weights)
        with torch.autocast(images.device.type, enabled=False):
            logits = [self.part_logits(one) for one in (blanked, maps[has_parts])]
            losses = sum(F.cross_entropy(one, parts, reduction="none") for one in logits)
        return (weights[:, None, None] * losses).sum() * processes / count

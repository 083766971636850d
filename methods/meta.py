"""META: an expert for each source domain in one network, and a mixture of the others that must do as well.

A batch has images of one domain d, domains in turn. Only the norms of expert d learn, those of the others stay; the
network itself is shared (see `utils.modeling.experts`). With expert d, the branch that all domains share, and the
mixture F of the other experts' maps, weighed by gates,

    L = CE(expert d) + triplet(expert d) + CE(branch) + triplet(branch) + L_mix
    L_mix = mean max(0, d_ap(F) - d_ap(expert d)) + mean max(0, d_an(expert d) - d_an(F))

where d_ap and d_an are the distances to the hardest pair of each image. L_mix has a gradient to the gates only: they
learn to make of the others what the expert of the domain can do itself. Expert d has classes of its domain, the branch
of all domains. A class has 1 - eps of the smoothed labels and each other class eps / (classes - 1).

As corrected: in a test, the gates of all experts weigh them by how near the image is to their domains. The authors'
code leaves the gates out there; `--meta_gate code` does as it does.
"""

import itertools
import math
import random

import torch
import torch.nn.functional as F
from torch import nn

from utils.batches.samplers import KeyedBatches
from utils.launch import gather_with_gradient
from utils.modeling.experts import expert_norms
from utils.modeling.losses import distances, hard_triplet

# The losses


def smoothed_loss(logits, labels, smoothing):
    """Cross-entropy with labels of 1 - smoothing, and smoothing / (classes - 1) for each other class."""
    listed = logits.float().log_softmax(1)
    own = listed.gather(1, labels[:, None])[:, 0]
    others = (listed.sum(1) - own) / (logits.shape[1] - 1)
    return -((1 - smoothing) * own + smoothing * others).mean()


def mixture_loss(mixture, expert, labels):
    """How much farther the mixture's hardest positives are, and how much nearer its hardest negatives."""
    positive, negative = hardest(mixture, labels)
    wanted_positive, wanted_negative = hardest(expert.detach(), labels)
    return F.relu(positive - wanted_positive).mean() + F.relu(wanted_negative - negative).mean()


def hardest(features, labels):
    """For each feature, the distance to the farthest of its identity and to the nearest of another."""
    distance, same_identity = distances(features), labels[:, None] == labels[None, :]
    farthest = distance.masked_fill(~same_identity, -torch.inf).amax(1)
    nearest = distance.masked_fill(same_identity, torch.inf).amin(1)
    return farthest, nearest


# The training


class Meta(nn.Module):
    """A Re-ID model of method meta and its losses; `forward` is the loss of one batch of one domain.

    With several processes each passes its share of the images through the network. The features are gathered, so that
    necks, classifiers and triplets see the whole batch, as in a run with one process.
    """

    centres = None

    def __init__(self, model, args, id_domains):
        super().__init__()
        self.model, self.args = model, args
        # Of each identity: its domain, and its number among those of the domain.
        local = torch.zeros_like(id_domains)
        for domain in range(int(id_domains.max()) + 1):
            mine = id_domains == domain
            local[mine] = torch.arange(int(mine.sum()))
        self.register_buffer("id_domains", id_domains.clone(), persistent=False)
        self.register_buffer("local", local, persistent=False)
        self.num_domains = int(id_domains.max()) + 1
        self.trained = [parameter for parameter in model.backbone.parameters() if parameter.requires_grad]

    def forward(self, images, labels, rng=None, frozen=False):
        domain = int(self.id_domains[labels[0]])
        head, args = self.model.head, self.args
        self.learn_only(domain, frozen)
        pooled = head.pool_of_domain(self.model.backbone, images, domain)
        pooled, labels = gather_with_gradient(pooled), gather_with_gradient(labels)
        local = self.local[labels]
        margin = None if args.margin == "soft" else args.margin
        with torch.autocast(images.device.type, enabled=False):
            expert, branch, mixture = pooled.unbind(1)
            losses = {}
            for name, features, place, ids in (
                ("expert", expert, domain, local),
                ("branch", branch, self.num_domains, labels),
            ):
                logits = head.classifiers[place](head.necks[place](features))
                losses[f"loss_{name}"] = smoothed_loss(logits, ids, args.label_smoothing)
                losses[f"loss_{name}_triplet"] = args.triplet_weight * hard_triplet(features, ids, margin)
            losses["loss_mixture"] = mixture_loss(mixture, expert, local)
            with torch.no_grad():
                # For the averages of a test.
                head.mixture_neck(mixture)
        loss = torch.stack(list(losses.values())).sum()
        values = {"loss": loss, **losses}
        return loss, {name: value.detach() for name, value in values.items()}, None, labels

    def learn_only(self, domain, frozen):
        """Only the norms of one expert learn, and in frozen steps nothing else of the ResNet; until `learn_all`."""
        norms = expert_norms(self.model.backbone)
        for norm in norms:
            for place, one in enumerate(norm.norms):
                one.train(place == domain or (place == self.num_domains and not frozen))
        own = {id(parameter) for norm in norms for parameter in norm.norms[domain].parameters()}
        for parameter in self.trained:
            parameter.requires_grad_(not frozen or id(parameter) in own)

    def learn_all(self):
        """After a step: a checkpoint holds what learns."""
        for parameter in self.trained:
            parameter.requires_grad_(True)


def cosine_after_warmup(epoch, step, args, steps_per_epoch):
    """Factor on the learning rate: rises by steps, then falls by epochs, by half a cosine to --lr_final_factor."""
    if step < args.lr_warmup_steps:
        return args.lr_warmup_factor + (1 - args.lr_warmup_factor) * step / args.lr_warmup_steps
    # Epochs in which the rate still rises.
    rising = -(-args.lr_warmup_steps // steps_per_epoch)
    passed = max(0, epoch - rising) / max(1, args.num_train_epochs - rising)
    return args.lr_final_factor + (1 - args.lr_final_factor) * (1 + math.cos(math.pi * passed)) / 2


class DomainBatches(KeyedBatches):
    """Batches of K images of each of P identities of one domain, domains in turn, in one order from the first step on.

    An identity's images are used up before one comes again: shuffled, K at a time, a rest of fewer than K left out.
    A domain starts anew when fewer than P of its identities have K images left. An identity of fewer than K images is
    drawn with replacement. An epoch has as many batches as all images fill.
    """

    def __init__(self, labels, domains, batch_size, images_per_id=4, seed=0, rank=0, num_processes=1):
        super().__init__(batch_size, seed, rank, num_processes)
        if batch_size % images_per_id:
            raise ValueError(
                f"a batch of {batch_size} cannot be split into identities with {images_per_id} images each: make it a "
                f"multiple of {images_per_id}"
            )
        self.ids_per_batch, self.images_per_id = batch_size // images_per_id, images_per_id
        people = {}
        for row, (label, domain) in enumerate(zip(labels, domains, strict=True)):
            people.setdefault(domain, {}).setdefault(label, []).append(row)
        self.people = [people[domain] for domain in sorted(people)]
        for domain, ids in sorted(people.items()):
            if len(ids) < self.ids_per_batch:
                raise ValueError(
                    f"a batch takes {self.ids_per_batch} identities of one domain ({batch_size} images, "
                    f"{images_per_id} of each); domain {domain} has {len(ids)}: use a smaller batch, or leave it out"
                )
        self.steps = len(labels) // batch_size
        if not self.steps:
            raise ValueError(f"a batch of {batch_size} images cannot be made of {len(labels)}: use a smaller batch")
        # Batches from the first step on, and how many were taken.
        self.stream, self.taken = self.all_batches(), 0

    def all_batches(self):
        rng = random.Random(f"batches/{self.seed}")
        ids, images = [[] for _ in self.people], [{} for _ in self.people]
        for domain in itertools.cycle(range(len(self.people))):
            if len(ids[domain]) < self.ids_per_batch:
                ids[domain], images[domain] = sorted(self.people[domain]), {}
            batch = []
            for label in rng.sample(ids[domain], self.ids_per_batch):
                if label not in images[domain]:
                    images[domain][label] = self.shuffled(rng, self.people[domain][label])
                rows = images[domain][label]
                batch += [rows.pop() for _ in range(self.images_per_id)]
                if len(rows) < self.images_per_id:
                    ids[domain].remove(label)
            yield batch

    def shuffled(self, rng, rows):
        size = self.images_per_id
        return rng.choices(rows, k=size) if len(rows) < size else rng.sample(rows, len(rows))

    def global_batches(self, epoch):
        first = (epoch - 1) * self.steps
        if self.taken > first:
            self.stream, self.taken = self.all_batches(), 0
        # Of a run that resumes.
        for _ in range(first - self.taken):
            next(self.stream)
        self.taken = max(self.taken, first)
        for _ in range(self.steps):
            self.taken += 1
            yield next(self.stream)

    def steps_of(self, epochs, first=1):
        return epochs * self.steps

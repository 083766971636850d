"""MetaBIN: learns the mixture of batch and instance normalisation that works best on unseen domains.

    add_batch_instance_norms(backbone)             # y = rho BN(x) + (1 - rho) IN(x), one rho in [0, 1] per channel
    values = meta_step(backbone, images, labels, domains, held_in, inner_factor=b, rate=g)

An ordinary step trains everything except rho. After it, a meta-step on images of all source domains trains rho only.
The domains are divided into known ones and test ones. The losses on the known domains give a trial update, with the
rate g of rho and a factor b that goes up and down,

    rho' = clip(rho - b g grad(scatter + shuffle + triplet))

and the triplet loss of rho' on the test domains gives the update: rho <- clip(rho - g grad triplet(rho')).

As in the authors' code, biases learn at twice the rate, and the first meta-step comes after ten ordinary steps.
"""

import functools
import random
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.func import functional_call

from utils.modeling.norms import BatchInstanceNorm

# Margin of the triplet losses in both halves of the meta-step.
MARGIN = 0.3
# Of the rate of biases against that of weights.
BIAS_RATE = 2.0
LOSSES = ("loss_scatter", "loss_shuffle", "loss_inner_triplet", "loss_meta_test")


# The losses


def scatter_loss(features, domains):
    """Mean cosine of features to the centre of their domain: a lower value means that each domain spreads out."""
    unit = F.normalize(features, dim=1)
    parts = [unit[domains == domain] for domain in domains.unique()]
    return torch.stack([(part @ F.normalize(part.mean(0), dim=0)).mean() for part in parts]).mean()


def shuffle_loss(features, labels, domains):
    """mean log(1 + exp(farthest of other domains - nearest other identity of its domain)): domains mix."""
    distance, same_domain = distances(features), domains[:, None] == domains[None, :]
    farthest = distance.masked_fill(same_domain, -torch.inf).amax(1)
    nearest = distance.masked_fill(~same_domain | (labels[:, None] == labels[None, :]), torch.inf).amin(1)
    return F.softplus(farthest - nearest).mean()


def triplet_loss(features, labels):
    distance, same_identity = distances(features), labels[:, None] == labels[None, :]
    farthest = distance.masked_fill(~same_identity, -torch.inf).amax(1)
    nearest = distance.masked_fill(same_identity, torch.inf).amin(1)
    return F.relu(farthest - nearest + MARGIN).mean()


def distances(features):
    """Euclidean, (N, N). torch.cdist has no second derivative."""
    return (features[:, None] - features[None, :]).square().sum(2).clamp(min=1e-12).sqrt()


# The meta-step


def balance(training, model, batch, domains):
    """The second half of a step: every norm's mixture moves, and nothing else. Its losses.

    The images of the meta-step come after those of the batch; `domains` is that of each training image.
    """
    args, accelerator = training.args, training.accelerator
    number = training.step + 1 - args.meta_first_steps
    if number < 0:
        return no_meta_step(model.backbone)
    images, labels, rows = (batch[name][args.train_batch_size :] for name in ("images", "labels", "indices"))
    period = max(2, round(args.meta_period * training.sampler.steps_of_an_epoch))
    return meta_step(
        model.backbone,
        images.to(accelerator.device, non_blocking=True),
        labels.to(accelerator.device, non_blocking=True),
        domains[rows].to(accelerator.device),
        domains_held_in(int(domains.max()) + 1, f"{args.seed}/{training.step}"),
        inner_factor=inner_factor(number, period, *args.meta_inner_rates),
        rate=args.meta_rate,
        first_order=args.meta_first_order,
        reduce=lambda slopes: accelerator.reduce(slopes, reduction="mean"),
    )


def meta_step(backbone, images, labels, domains, held_in, *, inner_factor, rate, first_order=False, reduce=None):
    """Updates every rho once; returns the losses and the mean of rho, as tensors without gradient.

    `rate` is that of rho, `inner_factor` times it that of the trial update. `held_in` are the domains used as known
    ones; the other domains of the batch are the test domains. `first_order` ignores that the inner gradient depends
    on rho too, as the authors' code does. `reduce` averages the gradient over processes that all have the same batch,
    so that their rho stay exactly equal.
    """
    rho = {name: tensor.detach().requires_grad_() for name, tensor in balances(backbone).items()}
    weights = {name: parameter.detach() for name, parameter in backbone.named_parameters()}
    is_held_in = torch.isin(domains, torch.as_tensor(held_in, device=domains.device))
    with held_averages(backbone):
        features = functional_call(backbone, weights | rho, (images[is_held_in],))
        scatter = scatter_loss(features, domains[is_held_in])
        # A single domain has no others to mix with.
        shuffle = scatter.new_zeros(())
        if len(held_in) > 1:
            shuffle = shuffle_loss(features, labels[is_held_in], domains[is_held_in])
        triplet = triplet_loss(features, labels[is_held_in])
        slopes = torch.autograd.grad(scatter + shuffle + triplet, list(rho.values()), create_graph=not first_order)
        moved = {
            name: clipped(old - inner_factor * rate * slope)
            for (name, old), slope in zip(rho.items(), slopes, strict=True)
        }
        features = functional_call(backbone, weights | moved, (images[~is_held_in],))
        test = triplet_loss(features, labels[~is_held_in])
        slopes = torch.cat(torch.autograd.grad(test, list(rho.values())))
    if reduce is not None:
        slopes = reduce(slopes)
    with torch.no_grad():
        current = balances(backbone)
        for tensor, slope in zip(
            current.values(), slopes.split([len(value_of_norm) for value_of_norm in current.values()]), strict=True
        ):
            tensor.sub_(rate * slope).clamp_(0, 1)
        losses = dict(zip(LOSSES, (scatter, shuffle, triplet, test), strict=True))
        return {name: loss.detach() for name, loss in losses.items()} | {"rho": mean_balance(backbone)}


def no_meta_step(backbone):
    """What `meta_step` returns, for a step without it: losses of 0."""
    rho = mean_balance(backbone)
    return dict.fromkeys(LOSSES, torch.zeros_like(rho)) | {"rho": rho}


def balances(backbone):
    """{name: rho} of every batch-instance norm."""
    return {
        f"{name}.rho": module.rho for name, module in backbone.named_modules() if isinstance(module, BatchInstanceNorm)
    }


def mean_balance(backbone):
    return torch.cat(list(balances(backbone).values())).mean()


def clipped(values):
    """Values clipped to [0, 1]. The gradient ignores the clipping, otherwise a rho at its bound would stay there."""
    return values + (values.clamp(0, 1) - values).detach()


@contextmanager
def held_averages(backbone):
    """Norms use batch statistics and keep their averages; no gradient checkpointing, as `functional_call` needs."""
    norms = [module for module in backbone.modules() if isinstance(module, BatchInstanceNorm)]
    usual, backbone.gradient_checkpointing = getattr(backbone, "gradient_checkpointing", False), False
    for norm in norms:
        norm.held = True
    try:
        yield
    finally:
        backbone.gradient_checkpointing = usual
        for norm in norms:
            norm.held = False


def inner_factor(step, period, low, high):
    """A factor that goes linearly from `low` at step 0 up to `high` and back, once in `period` steps."""
    place = step % period / period
    return low + (high - low) * (1 - abs(2 * place - 1))


def domains_held_in(num_domains, seed):
    """Half of the domains (rounded up), drawn from a seed."""
    return sorted(random.Random(f"held in/{seed}").sample(range(num_domains), (num_domains + 1) // 2))


class MetaBatches:
    """A batch sampler that adds a meta-step's images to each batch of another sampler.

    The added images are K of each of P identities of each domain. Every process gets all of them, after its share of
    the other sampler's batch. `set_epoch` and `steps_of` are passed on.
    """

    def __init__(self, sampler, labels, domains, ids_per_domain, images_per_id, seed=0):
        self.sampler, self.ids, self.size, self.seed = sampler, ids_per_domain, images_per_id, seed
        self.people = {}
        for row, (label, domain) in enumerate(zip(labels, domains, strict=True)):
            self.people.setdefault(domain, {}).setdefault(label, []).append(row)
        self.people = dict(sorted(self.people.items()))
        for domain, people in self.people.items():
            if len(people) < ids_per_domain:
                raise ValueError(
                    f"a meta-step takes {ids_per_domain} identities of each domain; domain {domain} has "
                    f"{len(people)}: lower --train_batch_size, or leave it out"
                )

    @property
    def count(self):
        """Images of a meta-step."""
        return len(self.people) * self.ids * self.size

    def set_epoch(self, epoch, done=0):
        self.sampler.set_epoch(epoch, done)

    def steps_of(self, epochs):
        return self.sampler.steps_of(epochs)

    @functools.cached_property
    def steps_of_an_epoch(self):
        """Of the first; counting them draws all its batches."""
        return self.steps_of(1)

    def drawn(self, key):
        rng = random.Random(f"meta/{key}")
        for people in self.people.values():
            for label in rng.sample(sorted(people), self.ids):
                rows = people[label]
                yield from rng.sample(rows, self.size) if len(rows) >= self.size else rng.choices(rows, k=self.size)

    def __iter__(self):
        for number, batch in enumerate(self.sampler, self.sampler.done):
            key = f"{self.seed}/{self.sampler.epoch}/{number}"
            yield batch + [(row, f"meta/{key}/{place}") for place, row in enumerate(self.drawn(key))]

    def __len__(self):
        return len(self.sampler)

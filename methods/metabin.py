"""MetaBIN: how much of batch and of instance normalisation a network takes, learned so that unseen domains profit.

    add_batch_instance_norms(backbone)             # y = rho BN(x) + (1 - rho) IN(x), a rho in [0, 1] for each channel
    values = meta_step(backbone, images, labels, domains, held_in, inner_rate=b, outer_rate=g)

After every ordinary step, which leaves rho alone, a meta-step on images of all source domains moves rho alone. In it
some domains stand for those that are known. Their losses would move rho by a rate b that goes up and down,

    rho' = clip(rho - b grad(scatter + shuffle + triplet))

and how well rho' tells people of the other domains apart decides: rho <- clip(rho - g grad triplet(rho')).
"""

import random
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.func import functional_call

from utils.modeling.norms import BatchInstanceNorm, balances

# Hard triplets of both halves of the meta-step.
MARGIN = 0.3


# The losses


def scatter_loss(features, domains):
    """Mean cosine of features to the centre of their domain: minimised, each domain spreads out."""
    unit = F.normalize(features, dim=1)
    parts = [unit[domains == domain] for domain in domains.unique()]
    return torch.stack([(part @ F.normalize(part.mean(0), dim=0)).mean() for part in parts]).mean()


def shuffle_loss(features, labels, domains):
    """mean log(1 + exp(farthest of other domains - nearest other person of the own domain)): domains mingle."""
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


def meta_step(backbone, images, labels, domains, held_in, *, inner_rate, outer_rate, first_order=False, reduce=None):
    """Moves every rho once; returns the losses and the mean of rho, as tensors without gradient.

    `held_in` are the domains that are taken for known ones, the other domains of the batch test. `first_order`
    leaves out that the inner gradient depends on rho too, as the authors' code does. `reduce` averages the gradient
    over processes that all have the same batch: their rho stay equal to the last bit.
    """
    rho = {name: tensor.detach().requires_grad_() for name, tensor in balances(backbone).items()}
    weights = {name: parameter.detach() for name, parameter in backbone.named_parameters()}
    is_held_in = torch.isin(domains, torch.as_tensor(held_in, device=domains.device))
    with held_averages(backbone):
        features = functional_call(backbone, weights | rho, (images[is_held_in],))
        scatter = scatter_loss(features, domains[is_held_in])
        # One domain has no others to mingle with.
        shuffle = scatter.new_zeros(())
        if len(held_in) > 1:
            shuffle = shuffle_loss(features, labels[is_held_in], domains[is_held_in])
        triplet = triplet_loss(features, labels[is_held_in])
        slopes = torch.autograd.grad(scatter + shuffle + triplet, list(rho.values()), create_graph=not first_order)
        moved = {
            name: clipped(old - inner_rate * slope) for (name, old), slope in zip(rho.items(), slopes, strict=True)
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
            tensor.sub_(outer_rate * slope).clamp_(0, 1)
        values = {"loss_scatter": scatter, "loss_shuffle": shuffle, "loss_inner_triplet": triplet}
        values |= {"loss_meta_test": test, "rho": torch.cat(list(current.values())).mean()}
    return {name: value.detach() for name, value in values.items()}


def clipped(values):
    """To [0, 1]; the gradient passes as if not, else a rho at its bound could never leave it."""
    return values + (values.clamp(0, 1) - values).detach()


@contextmanager
def held_averages(backbone):
    """Norms by the batch that leave their averages alone; activations are kept, as `functional_call` needs."""
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


def inner_rate(step, period, low, high):
    """Up and down between two rates in a straight line, once in `period` steps; lowest at step 0."""
    place = step % period / period
    return low + (high - low) * (1 - abs(2 * place - 1))


def domains_held_in(num_domains, seed):
    """Half of the domains, of an odd number the larger half, drawn from a seed."""
    return sorted(random.Random(f"held in/{seed}").sample(range(num_domains), (num_domains + 1) // 2))


class MetaBatches:
    """A batch sampler with what a meta-step takes after each batch of another: P people with K images of each domain.

    Every process gets these whole, after its share of the other batch. `set_epoch` and `steps_of` are passed on.
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

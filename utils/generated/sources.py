"""The sources of generated images: their images, their identities, and the images held out of training."""

import random
from dataclasses import dataclass

import datasets
import numpy as np
import torch

from utils.datasets.images import check_images
from utils.datasets.load import load_reid


@dataclass
class Source:
    """The training images of one domain. `labels` are indices into `pids`; `held_out` marks images for calibration.

    `place` is that among the domains as they were named.
    """

    domain: str
    train: datasets.Dataset
    pids: list
    labels: torch.Tensor
    held_out: torch.Tensor
    place: int = 0


def open_sources(specs, root=None, *, holdout_fraction=0.0, seed=0, skip_unreadable=False):
    """{domain: Source}, in order of domains. Images are decoded only for `skip_unreadable`."""
    sources = {}
    for spec in specs:
        data = load_reid(spec, root, skip_unreadable=skip_unreadable)
        if "train" not in data:
            raise ValueError(f"--source {spec} has no train split, only {', '.join(data)}")
        domains = np.array(data["train"]["domain"][:])
        for domain in sorted(set(domains.tolist())):
            if domain in sources:
                raise ValueError(f"two of the sources are {domain}; name each once")
            train = data["train"].select(np.flatnonzero(domains == domain))
            sources[domain] = make_source(domain, train, holdout_fraction, seed, len(sources))
    return dict(sorted(sources.items()))


def make_source(domain, train, holdout_fraction, seed, place):
    row_pids = train["pid"][:]
    pids = sorted(set(row_pids))
    label_of = {pid: label for label, pid in enumerate(pids)}
    labels = np.array([label_of[pid] for pid in row_pids])
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    rng = random.Random(f"held out/{seed}/{domain}")
    order = np.argsort(labels, kind="stable")
    for rows in np.split(order, np.cumsum(np.bincount(labels))[:-1]) if holdout_fraction else ():
        # At least two images of each identity remain for training.
        count = min(len(rows) - 2, max(1, round(holdout_fraction * len(rows))))
        held_out[rng.sample(rows.tolist(), max(count, 0))] = True
    return Source(domain, train, pids, torch.from_numpy(labels), held_out, place)


def check_sources(sources):
    """ValueError if an image cannot be read."""
    for domain, source in sources.items():
        check_images(source.train, where=domain)


def check_calibration(generated, sources, flag="--false_match_rate"):
    """ValueError if a domain has no impostor scores: they compare held-out images with those of other identities."""
    domains = sorted({domain for domain, _ in generated.counts})
    few = [name for name in domains if not sources[name].held_out.any() or len(sources[name].pids) < 2]
    if few:
        raise ValueError(
            f"{flag} cannot be calibrated on {', '.join(few)}: it takes two people, and of one of them "
            "three images and a --holdout_fraction above 0; give --threshold, --keep_fraction or --target_per_id"
        )


def check_identities(generated, sources):
    unknown_domains = sorted({domain for domain, _ in generated.counts} - set(sources))
    if unknown_domains:
        raise ValueError(
            f"{generated.name} has images of {', '.join(unknown_domains[:5])}, --source only {', '.join(sources)}; "
            "name every set they were made from"
        )
    known = {(domain, pid) for domain, source in sources.items() for pid in source.pids}
    unknown = sorted(set(generated.counts) - known)
    if unknown:
        shown = ", ".join(f"{domain}/{pid}" for domain, pid in unknown[:5])
        raise ValueError(
            f"{generated.name} has {len(unknown)} identities that the source does not have: {shown}"
            f"{', ...' if len(unknown) > 5 else ''}; give the very --source they were made from"
        )

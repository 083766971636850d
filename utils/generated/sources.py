"""The sources that generated images were made from: their images, identities, and what is held out of training."""

import random
from dataclasses import dataclass

import datasets
import numpy as np
import torch

from utils.datasets.images import check_images
from utils.datasets.load import load_reid


@dataclass
class Source:
    """The training images of one domain. `labels` number `pids` in order; `held_out` marks what is kept for tests."""

    domain: str
    train: datasets.Dataset
    pids: list
    labels: torch.Tensor
    held_out: torch.Tensor


def open_sources(specs, root=None, *, holdout_fraction=0.0, seed=0, skip_unreadable=False):
    """{domain: Source}, in order of domains; no image is looked at unless unreadable ones are to be left out."""
    found = {}
    for spec in specs:
        data = load_reid(spec, root, skip_unreadable=skip_unreadable)
        if "train" not in data:
            raise ValueError(f"--source {spec} has no train split, only {', '.join(data)}")
        domains = np.array(data["train"]["domain"][:])
        for domain in sorted(set(domains.tolist())):
            if domain in found:
                raise ValueError(f"two of the sources are {domain}; name each once")
            train = data["train"].select(np.flatnonzero(domains == domain))
            found[domain] = make_source(domain, train, holdout_fraction, seed)
    return dict(sorted(found.items()))


def make_source(domain, train, holdout_fraction, seed):
    numbers = train["pid"][:]
    pids = sorted(set(numbers))
    place = {pid: label for label, pid in enumerate(pids)}
    labels = np.array([place[pid] for pid in numbers])
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    rng = random.Random(f"held out/{seed}/{domain}")
    order = np.argsort(labels, kind="stable")
    for rows in np.split(order, np.cumsum(np.bincount(labels))[:-1]) if holdout_fraction else ():
        # Two at least are left to learn from.
        count = min(len(rows) - 2, max(1, round(holdout_fraction * len(rows))))
        held_out[rng.sample(rows.tolist(), max(count, 0))] = True
    return Source(domain, train, pids, torch.from_numpy(labels), held_out)


def check_sources(sources):
    """ValueError where an image cannot be read."""
    for domain, source in sources.items():
        check_images(source.train, where=domain)


def check_calibration(generated, sources):
    """ValueError where no scores of other people can be had: from held-out images, against those of somebody else."""
    domains = sorted({domain for domain, _ in generated.counts})
    few = [one for one in domains if not sources[one].held_out.any() or len(sources[one].pids) < 2]
    if few:
        raise ValueError(
            f"--false_match_rate cannot be calibrated on {', '.join(few)}: it takes two people, and of one of them "
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

"""The identities of labelled sources, each with the image sequence that represents it."""

import re
from dataclasses import dataclass

import datasets

from utils.datasets.images import check_images
from utils.datasets.load import load_reid

FOLDER = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True)
class Identity:
    """One identity of one data set: its number there, and its images from the camera that has most of them."""

    domain: str
    pid: int
    camid: int
    paths: tuple
    dataset: datasets.Dataset
    rows: tuple

    @property
    def name(self):
        return f"{self.domain}/{self.pid:04d}"

    def images(self):
        return [self.dataset[row]["image"] for row in self.rows]


def open_identities(specs, data_root=None, *, max_images=32, skip_unreadable=False):
    """All identities of the training splits of `specs`, sorted by domain and number."""
    identities = {}
    for spec in specs:
        data = load_reid(spec, data_root, skip_unreadable=skip_unreadable)
        if "train" not in data:
            raise ValueError(f"{spec} has no train split, only {', '.join(data)}; images are made of training people")
        if not skip_unreadable:
            check_images(data["train"], where=spec)
        for identity in identities_of(data["train"], max_images):
            if identity.name in identities:
                raise ValueError(f"two of the sources have an identity {identity.name}; name each source once")
            if not FOLDER.fullmatch(identity.domain):
                raise ValueError(
                    f"{spec!r}: the domain {identity.domain!r} cannot name a folder; rename it to letters, digits, . "
                    "_ and -, or give such names in a column `domain` of its metadata"
                )
            identities[identity.name] = identity
    return [
        identities[name]
        for name in sorted(identities, key=lambda name: (identities[name].domain, identities[name].pid))
    ]


def identities_of(dataset, max_images=32):
    """Each identity of a split with its image sequence, in file order, from the camera with most images of it.

    Of cameras with equally many images the one with the lowest number is taken.
    """
    cameras = {}
    columns = (dataset[name][:] for name in ("domain", "pid", "camid", "path"))
    for row, (domain, pid, camid, path) in enumerate(zip(*columns, strict=True)):
        cameras.setdefault((domain, pid), {}).setdefault(camid, []).append((path, row))
    for (domain, pid), images_of_camera in sorted(cameras.items()):
        camid = min(images_of_camera, key=lambda camid: (-len(images_of_camera[camid]), camid))
        paths, rows = zip(*sorted(images_of_camera[camid])[:max_images], strict=True)
        yield Identity(domain, pid, camid, paths, dataset, rows)


def chosen_identities(identities, words):
    """The identities named by numbers, ranges or DOMAIN/NUMBER: `2 4-8 market1501/12`."""
    chosen = set()
    for word in words:
        match = re.fullmatch(r"(?:(.+)/)?(\d+)(?:-(\d+))?", word)
        if match is None:
            raise ValueError(f"--ids {word!r} is neither a number, a range such as 4-8, nor DOMAIN/NUMBER")
        first, last = int(match[2]), int(match[3] or match[2])
        names = {
            identity.name
            for identity in identities
            if first <= identity.pid <= last and match[1] in (None, identity.domain)
        }
        if not names:
            raise ValueError(f"--ids {word}: the source has no images of such an identity; {known(identities)}")
        chosen |= names
    return [identity for identity in identities if identity.name in chosen]


def known(identities):
    pids = sorted({identity.pid for identity in identities})
    shown = ", ".join(map(str, pids[:8])) + (", ..." if len(pids) > 8 else "")
    return f"it has {len(identities)} identities: {shown}"

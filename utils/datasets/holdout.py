"""Query and gallery from a labelled set that has none: identities are held out of training to measure on.

Which identities and which images is drawn from a seed and the names of the images, the same on every machine.
"""

from collections import Counter

import datasets

from utils.datasets.load import draw, known_names, load_reid, parse_spec, people_of
from utils.datasets.schema import features, names_of, put

# With one, the gallery would hold one person only.
LEAST_HELD_OUT = 2


def hold_out(data, fraction, seed, where, own_camera=False):
    """The splits train, query and gallery from `train`; with fraction 1 there is no train left.

    Held out is this fraction of the identities, of those that can be found again: seen by two cameras, or in two
    images where the set has one camera only. Of each, one image a camera becomes a query and the others the gallery.
    Without cameras one in four images does, and the gallery counts as another camera. With `own_camera` (protocol
    `all`), images of one camera can match.
    """
    number = isinstance(fraction, (int, float)) and not isinstance(fraction, bool)
    if not number or not 0 < fraction <= 1:
        raise ValueError(f"{where}: holdout must be above 0 and at most 1, not {fraction!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"{where}: holdout_seed must be a whole number, not {seed!r}")
    if set(data) != {"train"}:
        raise ValueError(f"{where} has {', '.join(data)} already: holdout={fraction} has no effect; leave it out")
    train = data["train"]
    with_cameras = len(set(train["camid"][:])) > 1
    images = {}
    rows = zip(people_of(train), train["camid"][:], train["path"][:], strict=True)
    for row, (person, camid, path) in enumerate(rows):
        images.setdefault(person, {}).setdefault(camid, []).append((draw(seed, person[1], path), row))
    divided = {person: divide(cameras, with_cameras, own_camera) for person, cameras in images.items()}
    people = sorted(images, key=lambda person: draw(seed, *person))
    findable = [person for person in people if divided[person][0]]
    if not findable:
        raise ValueError(
            f"{where}: no identity was seen by two cameras, so nobody can be searched; measure inside cameras with "
            "camid_column=none, or with evaluate.py --protocol all"
            if with_cameras
            else f"{where}: no identity has two images, so nobody can be searched"
        )
    held_out = people if fraction == 1 else findable[: max(1, round(fraction * len(people)))]
    if fraction < 1 and len(held_out) == len(people):
        raise ValueError(f"{where}: holdout={fraction} leaves none of {len(people)} identities to train on")
    chosen = set(held_out)
    query = sorted(row for person in held_out for row in divided[person][0])
    gallery = sorted(row for person in held_out for row in divided[person][1])
    rule = "one of each identity and camera" if with_cameras else "one in four of each identity"
    note = (
        f"{where} has no query and gallery: {f'all {len(people)}' if fraction == 1 else f'{len(held_out)} held-out'} "
        f"identities are measured, {len(query)} images as queries ({rule}) and {len(gallery)} as gallery"
    )
    if fraction == 1:
        joint = "," if parse_spec(str(where))[1] else ":"
        note += f". If the model was trained on them, measure those held out instead, as in {where}{joint}holdout=0.3"
    rest = [
        row
        for person, cameras in images.items()
        if person not in chosen
        for part in cameras.values()
        for _, row in part
    ]
    parts = {"train": train.select(sorted(rest))} if rest else {}
    for split, rows in (("query", query), ("gallery", gallery)):
        part = train.select(rows)
        if not with_cameras:
            # As plain numbers on both sides: the name of the one camera is none of the gallery's.
            part = put(part, "camid", [camid + int(split == "gallery") for camid in part["camid"][:]])
        part.info.description = note
        parts[split] = part
    return told_apart(datasets.DatasetDict(parts))


def told_apart(data):
    """The data with a pid for each identity of query and gallery: those of two domains may have the same one.

    Where the two sides are not of the same domains, a pid is taken to be one identity in all of them.
    """
    sides = [split for split in ("query", "gallery") if split in data]
    domains = [{*data[split].unique("domain")} for split in sides]
    if not domains or len(domains[0]) < 2 or domains[0] != domains[-1]:
        return data
    people = sorted({person for split in sides for person in people_of(data[split])}, key=lambda one: (one[1], one[0]))
    if len({pid for pid, _ in people}) == len(people):
        return data
    known = names_of(data[sides[0]], "pid")
    numbers = {person: number for number, person in enumerate(people)}
    schema = features([f"{domain}/{known[pid] if known else pid}" for pid, domain in people])
    parts = dict(data)
    for split in sides:
        pids = [numbers[person] for person in people_of(data[split])]
        parts[split] = put(data[split], "pid", pids, schema["pid"])
        parts[split].info.description = data[split].info.description
    return datasets.DatasetDict(parts)


def divide(cameras, with_cameras, own_camera):
    """(query rows, gallery rows) of one identity, from {camera: [(drawn order, row)]}."""
    images = {camid: [row for _, row in sorted(part)] for camid, part in cameras.items()}
    if not with_cameras or (own_camera and len(images) == 1):
        rows = [row for _, row in sorted(entry for part in cameras.values() for entry in part)]
        count = min(len(rows) - 1, max(1, len(rows) // 4))
        return rows[:count], rows[count:]
    if len(images) == 1:
        # Nobody can find it in another camera, but it can be mistaken for others.
        return [], [row for part in images.values() for row in part]
    queries, gallery = [], []
    singles = [camid for camid, part in images.items() if len(part) == 1]
    # A camera's only image is a query too, as long as each query keeps an image of another camera to find.
    keep = max(0, 2 - (len(images) - len(singles))) if len(images) > len(singles) else 1
    kept = {camid for _, camid in sorted((cameras[camid][0], camid) for camid in singles)[:keep]}
    for camid, rows in images.items():
        count = 0 if camid in kept else 1
        queries += rows[:count]
        gallery += rows[count:]
    return queries, gallery


def hold_out_of(specs, root, fraction, *, least_left, say, skip_unreadable=False):
    """(the specs, your own sets without query and gallery with `holdout=` behind them; those that are measurable).

    `least_left` identities of each remain to train on; a set that is too small for that stays whole. `say` prints
    what was done. Of several sets, those with query and gallery are measurable too, also benchmarks.
    """
    named, measurable = [], []
    for spec in specs:
        name, options = parse_spec(spec)
        if "holdout" in options:
            measurable.append(spec)
        elif name not in known_names() or len(specs) > 1:
            data = load_reid(spec, root, skip_unreadable=skip_unreadable)
            if {"query", "gallery"} <= set(data):
                measurable.append(spec)
            elif name not in known_names():
                share, words = held_out_share(data, fraction, spec, least_left)
                say(words)
                if share:
                    spec = f"{spec}{',' if options else ':'}holdout={share:g}"
                    measurable.append(spec)
        named.append(spec)
    return named, measurable


def held_out_share(data, fraction, spec, least_left):
    """(the share of the identities to hold out, 0 for none; a sentence about it)."""
    num_images = Counter(people_of(data["train"]))
    num_ids, usable = len(num_images), sum(count > 1 for count in num_images.values())
    wanted = max(LEAST_HELD_OUT, round(fraction * num_ids))
    count = min(wanted, usable - least_left)
    if count < LEAST_HELD_OUT:
        return 0, (
            f"{spec}: no identity is held out to measure on, all {num_ids} are needed for training; a smaller "
            "--train_batch_size leaves some, or name a --target"
        )
    share = fraction if count == round(fraction * num_ids) else round(count / num_ids, 4)
    try:
        count = len(set(people_of(hold_out(data, share, 0, spec)["query"])))
    except ValueError as error:
        return 0, f"No identity is held out to measure on: {error}"
    return share, (
        f"{spec}: {count} of {num_ids} identities are held out of training and measured; --holdout 0 trains on all"
    )

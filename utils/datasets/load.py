"""Opens every source of labelled people with one schema.

    python -m utils.datasets market1501 --root /data/reid
    python -m utils.datasets viper:split=3 --root /data/reid --save_to viper3

`load_reid` gives a `datasets.DatasetDict` with the splits train, query and gallery (those the source has) and the
columns image, pid, camid (from 0), domain and path (below the source's folder). Images are decoded on access.
"""

import difflib
import hashlib
import inspect
import json
import os
import re

import datasets
import numpy as np
import torch

from utils.datasets import published
from utils.datasets.images import check_files, check_images
from utils.datasets.schema import SPLITS, Row, dense, features, leaving_out, put, rows_to_dataset

COLUMN_OPTIONS = ("image_column", "pid_column", "camid_column", "domain_column", "split_column")
COMMON_OPTIONS = (
    "image_fraction",
    "identity_fraction",
    "fraction_seed",
    "skip_unreadable",
    "holdout",
    "holdout_seed",
)
# An option of a spec, and those of which it needs one to have an effect.
NEEDS = {"fraction_seed": ("image_fraction", "identity_fraction"), "holdout_seed": ("holdout",)}


def known_names():
    return ("synthetic", *published.BENCHMARKS)


def parse_spec(spec):
    """`viper:split=3` -> ("viper", {"split": 3}), and so `./people:pid_column=label` for a path or Hub id.

    If the words after the colon are no options, the whole text is a path, unless only the part before it exists.
    """
    name, colon, text = spec.partition(":")
    if colon and name in known_names():
        return name, read_options(text.split(","), spec)
    path, _, text = spec.rpartition(":")
    words = {item.partition("=")[0].strip() for item in text.split(",")}
    own = {*COLUMN_OPTIONS, *COMMON_OPTIONS, "domain", "names", "revision"}
    known = words <= own or "=" in text and os.path.exists(path)
    return (path, read_options(text.split(","), spec)) if path and known and not os.path.exists(spec) else (spec, {})


def read_options(items, where):
    """Options from `key=value` items, each key once; values that look like int, float or bool become it, not names."""
    options = {}
    for item in items:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not key.isidentifier() or not value or key in options:
            raise ValueError(f"{where!r}: {item!r} is not as expected; a spec is NAME or NAME:key=value,key=value")
        options[key] = value if key in (*COLUMN_OPTIONS, "domain", "names", "revision") else typed(value)
    return options


def typed(text):
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def load_reid(
    name,
    root=None,
    *,
    image_fraction=None,
    identity_fraction=None,
    fraction_seed=0,
    skip_unreadable=False,
    holdout=None,
    holdout_seed=0,
    **options,
):
    """Labelled people as a `DatasetDict`; `name` is a known data set or spec, a path, a Hub id, or a list of these.

    `root` is the data set's folder or its parent. The fractions keep a part of `train`, see `subset`. `holdout` makes
    query and gallery from this fraction of the identities of a set that has none, see `utils.datasets.holdout`. A file
    that is missing or empty is an error here, and `check_images` finds damaged ones; with `skip_unreadable` both are
    dropped and listed in the log, and so are files whose names do not parse. Other options belong to the source: see
    the readers in `utils.datasets.published`, `utils.synthetic.world.rows`, and for your own tables `image_column`,
    `pid_column` ("none" if identities are unknown), `camid_column` ("none" if there are no cameras, in folders too),
    `domain_column`, `split_column` and `domain`, or `names`, see `read_named`. Options in a spec override these here.
    """
    common = {
        "image_fraction": image_fraction,
        "identity_fraction": identity_fraction,
        "fraction_seed": fraction_seed,
        "skip_unreadable": skip_unreadable,
        "holdout": holdout,
        "holdout_seed": holdout_seed,
    }
    if isinstance(name, (list, tuple)):
        return load_sources(name, root, **common, **options)
    data, name, common = open_spec(name, root, common, options)
    if common["skip_unreadable"]:
        data, skipped = check_images(data, skip_unreadable=True, where=name)
        if skipped:
            check_splits(data, name)
    else:
        check_files(data, name)
    fractions = {key: common[key] for key in ("image_fraction", "identity_fraction") if common[key] is not None}
    return subset(data, **fractions, seed=common["fraction_seed"]) if fractions else data


def open_spec(spec, root, common, options=(), own_camera=False):
    """(data, name, common options) of one spec, before its images are looked at and before it is cut to fractions.

    With `own_camera`, an image of the query's own camera counts as a match.
    """
    name, spec_options = parse_spec(os.fspath(spec))
    for option, partners in NEEDS.items():
        if option in spec_options and not any(
            {**common, **spec_options}.get(partner) is not None for partner in partners
        ):
            raise ValueError(f"{spec}: {option} has no effect without {' or '.join(partners)}; leave it out")
    common = common | {key: spec_options.pop(key) for key in list(spec_options) if key in COMMON_OPTIONS}
    if not isinstance(common["skip_unreadable"], bool):
        raise ValueError(f"{name}: skip_unreadable must be true or false, not {common['skip_unreadable']!r}")
    with leaving_out(name, common["skip_unreadable"]):
        data = read_source(name, root, dict(options) | spec_options)
    from utils.datasets import hold_out, told_apart

    data = told_apart(data)
    check_splits(data, name, own_camera)
    if common.get("holdout") is not None:
        data = hold_out(data, common["holdout"], common.get("holdout_seed", 0), name, own_camera)
    return data, name, common


def read_source(name, root, options):
    if name == "synthetic":
        from utils import synthetic

        check_options(name, synthetic.rows, options)
        domain = f"{name}-{options.get('domain', 'a')}"
        return datasets.DatasetDict(
            {
                split: rows_to_dataset([Row(*row) for row in rows], f"{synthetic.PROTOCOL}://", domain, split)
                for split, rows in synthetic.rows(**options).items()
            }
        )
    if name in published.BENCHMARKS:
        if root is None:
            raise ValueError(f"{name} needs a root (--data_root, --root): its folder, or the one it lies in")
        check_options(name, published.BENCHMARKS[name].read, options)
        rows, note, folder = published.read_benchmark(name, root, options)
        return datasets.DatasetDict({split: rows_to_dataset(rows[split], folder, name, split, note) for split in rows})
    return read_own(name, root, options)


def read_own(name, root, options):
    """Your own folder or table, or a set from the Hub."""
    from utils.datasets import Columns, read_hub, read_local

    places = [name] if root is None else [name, os.path.join(root, name)]
    path = next((place for place in places if os.path.exists(place)), None)
    if path and "::" in os.path.abspath(path):
        raise ValueError(f"{path}: rename the folder, as `::` in a path is read as a chain of addresses")
    if path is None and not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise ValueError(unknown_name(name))
    accepted = [*COLUMN_OPTIONS, "domain", "names" if path else "revision"]
    unknown = sorted(set(options) - set(accepted))
    if unknown:
        raise ValueError(f"{name} does not know the option {unknown[0]!r}; it accepts {', '.join(accepted)}")
    columns = Columns(**{key.removesuffix("_column"): options.pop(key) for key in COLUMN_OPTIONS if key in options})
    data = read_local(path, columns, **options) if path else read_hub(name, columns, **options)
    if "domain" in options and not any(str(options["domain"]) in part.unique("domain") for part in data.values()):
        raise ValueError(f"{name}: domain={options['domain']} has no effect, its table names a domain in every row")
    return data


def unknown_name(name):
    if ":names=" in name:
        return f"{name}: a pattern of names has no colon and no comma; write * in their place"
    if "/" in name or os.sep in name:
        return f"{name} does not exist; give the path of a folder or a parquet file, or a Hub id such as user/name"
    near = difflib.get_close_matches(name.split(":")[0].lower(), known_names(), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"the known sets are {', '.join(known_names())}"
    return f"{name!r} is neither a known set nor an existing path; {hint}"


def check_options(name, function, options):
    """ValueError unless options are parameters of the source's reader and have the type of their defaults."""
    accepted = {key: value.default for key, value in inspect.signature(function).parameters.items() if key != "root"}
    for key, value in options.items():
        if key not in accepted:
            words = ", ".join(f"{word}={default!r}" for word, default in accepted.items())
            raise ValueError(f"{name} does not know the option {key!r}; it accepts {words}")
        default = accepted[key]
        whole = type(default) is float and type(value) is int
        if default is not None and type(value) is not type(default) and not whole:
            raise ValueError(f"{name}: {key} must be of type {type(default).__name__}, not {value!r}")


def check_splits(data, where, own_camera=False):
    """Check what holds for every source: no empty split, no image twice, at least one query with a match.

    With `own_camera` a match may be an image from the query's own camera.
    """
    empty = [split for split in data if not len(data[split])]
    if empty or not data:
        raise ValueError(f"{where} has no images in {', '.join(empty) or 'any split'}")
    split_of = {}
    for split, dataset in data.items():
        for key in zip(dataset["domain"][:], dataset["path"][:], strict=True):
            if key in split_of:
                again = f", in {split_of[key]} and in {split}"
                if split == split_of[key]:
                    again += "; of two sources of one name, give one another: DIR:domain=NAME"
                raise ValueError(f"{where} lists {key[1]} of {key[0]} twice{again}")
            split_of[key] = split
    if ("query" in data) != ("gallery" in data):
        raise ValueError(f"{where} has {' and '.join(data)} only; query and gallery go together")
    if "query" in data:
        check_queries(data["query"], data["gallery"], where, own_camera)


def check_queries(query, gallery, where, own_camera):
    """At least one query must have an image of its identity from another camera, or from any with `own_camera`."""
    cameras = {}
    for pid, camid in zip(gallery["pid"][:], gallery["camid"][:], strict=True):
        cameras.setdefault(pid, set()).add(camid)
    query_keys = sorted(set(zip(query["pid"][:], query["camid"][:], strict=True)))
    if any(cameras.get(pid, set()) - (set() if own_camera else {camid}) for pid, camid in query_keys):
        return
    shown_queries = ", ".join(f"{pid} (camera {camid})" for pid, camid in query_keys[:5])
    in_gallery = ", ".join(f"{pid} (cameras {sorted(cameras[pid])[:5]})" for pid in sorted(cameras)[:5])
    if any(pid in cameras for pid, _ in query_keys):
        raise ValueError(
            f"{where}: query identities are in the gallery only under the query's own camera, which does not count. "
            f"pids of queries: {shown_queries}; of the gallery: {in_gallery}. Correct the cameras; for data "
            "without any write SPEC:camid_column=none; evaluate.py --protocol all counts images of one camera too"
        )
    raise ValueError(
        f"{where}: no query identity appears in the gallery. "
        f"pids of queries: {shown_queries}; of the gallery: {in_gallery}. Check the pids"
    )


def load_sources(specs, data_root=None, **common):
    """Several sources as one: identities and cameras of each are numbered after those of the source before it.

    A single source keeps its own numbers. Identities of `train` are numbered separately from those of query and
    gallery.
    """
    specs = [os.fspath(spec) for spec in specs]
    if not specs:
        raise ValueError("no data set is named")
    loaded = [load_reid(spec, data_root, **common) for spec in specs]
    if len(loaded) == 1:
        return loaded[0]
    parts = {split: [] for split in SPLITS}
    num_people, num_cameras = {"train": 0, "test": 0}, 0
    for data in loaded:
        cameras = dense(camid for dataset in data.values() for camid in dataset["camid"][:])
        for group, splits in {"train": ("train",), "test": ("query", "gallery")}.items():
            present = [split for split in splits if split in data]
            people = dense(key for split in present for key in people_of(data[split]))
            for split in present:
                pids = [num_people[group] + people[key] for key in people_of(data[split])]
                camids = [num_cameras + cameras[camid] for camid in data[split]["camid"][:]]
                dataset = put(put(data[split], "pid", pids), "camid", camids)
                parts[split].append(dataset.select_columns(list(features())))
            num_people[group] += len(people)
        num_cameras += len(cameras)
    merged = {
        split: datasets.concatenate_datasets(group, split=datasets.NamedSplit(split))
        for split, group in parts.items()
        if group
    }
    check_splits(merged, " + ".join(specs))
    return datasets.DatasetDict(merged)


def people_of(dataset):
    """The identity of each image as (pid, domain): the same pid in two domains is two identities."""
    return list(zip(dataset["pid"][:], dataset["domain"][:], strict=True))


def labels_of(dataset):
    """int64 labels 0..N-1 of a split's rows, numbered in the order of (pid, domain): the same on every machine."""
    people = people_of(dataset)
    labels = dense(people)
    return np.array([labels[key] for key in people], dtype=np.int64)


def subset(data, *, image_fraction=None, identity_fraction=None, min_images=None, seed=0):
    """A part of the training images: `image_fraction` for few-shot, `identity_fraction` for small-scale.

    A part is the beginning of one seeded order, so that larger parts contain smaller ones. Every identity that stays
    keeps its share of images, but at least one; together they are the fraction of all images. With `min_images` every
    identity keeps the fraction of its own images, but at least `min_images` (or all it has). Only `train` of a
    `DatasetDict` is reduced.
    """
    for name, value in (("image_fraction", image_fraction), ("identity_fraction", identity_fraction)):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (number and 0 < value <= 1):
            raise ValueError(f"{name} must be above 0 and at most 1, not {value!r}")
    if isinstance(data, dict):
        if "train" not in data:
            raise ValueError(f"a fraction is one of train, and the data has only {', '.join(data)}")
        fractions = {"image_fraction": image_fraction, "identity_fraction": identity_fraction}
        part = subset(data["train"], **fractions, min_images=min_images, seed=seed)
        return datasets.DatasetDict({**data, "train": part})
    images = {}
    for row, (person, path) in enumerate(zip(people_of(data), data["path"][:], strict=True)):
        images.setdefault(person, []).append((draw(seed, person[1], path), row))
    people = sorted(images, key=lambda person: draw(seed, *person))
    if identity_fraction is not None:
        people = people[: max(1, round(identity_fraction * len(people)))]
    order, least = [], []
    for person in people:
        # Each identity's images are spread over the order with a random phase, so that rounding favours no identity.
        phase = int.from_bytes(draw(seed, *person)[:6], "big") / 2**48
        rows = [row for _, row in sorted(images[person])]
        order += [((rank + phase) / len(rows), rank, row) for rank, row in enumerate(rows)]
        least += rows[: min_images or 1]
    if image_fraction is None:
        return data.select(sorted(row for *_, row in order))
    if min_images is None:
        # The first image of every identity comes before all others.
        order.sort(key=lambda entry: (entry[1] > 0, entry))
        chosen = order[: max(len(people), round(image_fraction * len(order)))]
    else:
        chosen = [entry for entry in order if entry[0] < image_fraction]
    return data.select(sorted({row for *_, row in chosen} | set(least)))


def draw(seed, *words):
    return hashlib.sha256(" ".join(map(str, (seed, *words))).encode()).digest()


def open_source(specs, root=None, *, single_image_ids="error", skip_unreadable=False):
    """(training rows of one or several data sets, their labels 0..N-1, the whole data sets).

    An identity with a single image has no other image to compare with: `single_image_ids` says what to do with it.
    """
    name = " + ".join(specs)
    data = load_sources(specs, root, skip_unreadable=skip_unreadable)
    if "train" not in data:
        raise ValueError(f"--source {name} has no train split, only {', '.join(data)}; give a training set")
    train = data["train"]
    if not skip_unreadable:
        train, _ = check_images(train, where=name)
    labels = torch.from_numpy(labels_of(train))
    is_single = labels.bincount()[labels] == 1
    if is_single.any() and single_image_ids != "repeat":
        if single_image_ids == "error":
            paths = [train["path"][row] for row in is_single.nonzero().flatten()[:3].tolist()]
            more = ", ..." if is_single.sum() > 3 else ""
            raise ValueError(
                f"{name}: {int(is_single.sum())} identities have one image only ({', '.join(paths)}{more}); give "
                "more, or choose --single_image_ids repeat or drop"
            )
        train = train.select((~is_single).nonzero().flatten().tolist())
        labels = torch.from_numpy(labels_of(train))
    return train, labels, data


def digest_of(train, labels):
    """A digest that changes with any image's name, label or place in the data set."""
    return hashlib.sha256(json.dumps([train["path"][:], labels.tolist()]).encode()).hexdigest()

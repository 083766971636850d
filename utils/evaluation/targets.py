"""Data sets a training is measured on: opened and checked before it, evaluated during it."""

from typing import NamedTuple

import datasets
import torch

from kernels import k_reciprocal_rerank
from utils import evaluation
from utils.datasets.images import check_images
from utils.datasets.load import load_reid, parse_spec
from utils.datasets.ten_splits import NUM_SPLITS, SMALL_SETS
from utils.evaluation.features import extract
from utils.evaluation.metrics import Side


class Target(NamedTuple):
    """A data set with query and gallery, under the very name it was asked for; `more` of a set's further splits."""

    spec: str
    query: datasets.Dataset
    gallery: datasets.Dataset
    more: tuple = ()


def open_targets(specs, root=None, *, skip_unreadable=False, all_splits=False):
    """ValueError for a set without query and gallery, with a damaged image, or none of whose queries has a match.

    `all_splits` opens the ten splits of a small set whose name does not say which one.
    """
    targets = []
    for spec in dict.fromkeys(specs):
        name, options = parse_spec(spec)
        several = all_splits and name in SMALL_SETS and "split" not in options
        pairs = []
        for chosen in [{"split": number} for number in range(NUM_SPLITS)] if several else [{}]:
            data = load_reid(spec, root, skip_unreadable=skip_unreadable, **chosen)
            if not {"query", "gallery"} <= set(data):
                raise ValueError(f"--target {spec} has no query and gallery, only {', '.join(data)}; choose another")
            sides = {split: data[split] for split in ("query", "gallery")}
            if not skip_unreadable:
                sides, _ = check_images(sides, where=spec)
            pairs.append((sides["query"], sides["gallery"]))
        targets.append(Target(spec, *pairs[0], tuple(pairs[1:])))
    return targets


def evaluate_target(model, target, transform, *, accelerator, batch_size=64, num_workers=0, rerank=None):
    """mAP, mINP, Rank-k and the rest; `rerank` is None or the options of `kernels.k_reciprocal_rerank`.

    Of several splits their means, the standard deviations under `std`, and each split's own numbers under `splits`.
    """
    pairs = [(target.query, target.gallery), *target.more]
    images, rows = distinct(pairs)
    features = extract(
        model,
        images,
        transform,
        accelerator=accelerator,
        batch_size=batch_size,
        num_workers=num_workers,
        desc=f"evaluating {target.spec}",
    ).to(accelerator.device)
    found = [
        compare(*(side_of(part, features[its]) for part, its in zip(pair, places, strict=True)), rerank)
        for pair, places in zip(pairs, rows, strict=True)
    ]
    if len(found) == 1:
        return found[0]
    metrics = averaged([{key: one[key] for key in one if key != "reranked"} for one in found])
    if rerank is not None:
        metrics["reranked"] = averaged([one["reranked"] for one in found])
    return metrics | {"splits": found}


def averaged(found):
    mean, deviation = evaluation.mean_and_deviation(found)
    return mean | {"std": deviation}


def distinct(pairs):
    """The images of several splits, each once, and for each split the rows of its query and of its gallery."""
    if len(pairs) == 1:
        cut, end = len(pairs[0][0]), len(pairs[0][0]) + len(pairs[0][1])
        return datasets.concatenate_datasets(list(pairs[0])), [(slice(cut), slice(cut, end))]
    numbers, parts, rows = {}, [], []
    for pair in pairs:
        rows.append([])
        for part in pair:
            paths = part["path"][:]
            fresh = [row for row, path in enumerate(paths) if path not in numbers]
            numbers.update({paths[row]: len(numbers) + place for place, row in enumerate(fresh)})
            if fresh:
                parts.append(part.select(fresh))
            rows[-1].append(torch.tensor([numbers[path] for path in paths]))
    return datasets.concatenate_datasets(parts), rows


def side_of(part, features):
    pids, camids = (torch.tensor(part[name][:], device=features.device) for name in ("pid", "camid"))
    return Side(features, pids, camids, list(part["path"]))


def compare(queries, gallery, rerank):
    """The numbers of one query against one gallery."""
    evaluation.check_sides(queries, gallery)
    has_cameras = bool((queries.camids >= 0).any() and (gallery.camids >= 0).any())
    protocol = "market" if has_cameras else "all"
    metrics = evaluation.summary(evaluation.rank(queries, gallery, protocol=protocol))
    if rerank is not None:
        reranking = k_reciprocal_rerank(queries.features, gallery.features, **rerank)
        ids = queries.pids, gallery.pids, queries.camids, gallery.camids
        reranked = reranking.metrics(*ids, max_rank=evaluation.MAX_RANK, protocol=protocol)
        metrics["reranked"] = evaluation.summary(reranked)
    return metrics


def results(history):
    """The content of metrics.json: the newest numbers of each target, and all of them."""
    newest = {one["target"]: {key: one[key] for key in one if key != "target"} for one in history}
    return {"targets": newest, "history": history}

"""Target data sets of a training: opened and checked before it, evaluated during it."""

from typing import NamedTuple

import datasets
import torch

from kernels import k_reciprocal_rerank
from kernels.ring.processes import all_processes, shares_of
from utils import evaluation
from utils.datasets import hold_out_of
from utils.datasets.images import check_images
from utils.datasets.load import load_reid, open_source, parse_spec
from utils.datasets.ten_splits import NUM_SPLITS, SMALL_SETS
from utils.evaluation.features import extract
from utils.evaluation.metrics import Side, kept_labels


class Target(NamedTuple):
    """A data set with query and gallery, and its spec as given; `more` holds the pairs of further splits."""

    spec: str
    query: datasets.Dataset
    gallery: datasets.Dataset
    more: tuple = ()


def open_sets(source, target, *, holdout, least_left, single_image_ids, say, all_splits=False, **reading):
    """(source, training rows, labels, targets) of a training; `reading` are the root and `skip_unreadable`.

    Without targets, a share `holdout` of the identities of one's own sets is kept out of the training and measured:
    see `hold_out_of`. A single source with query and gallery is a target itself.
    """
    held_out = []
    if holdout and not target:
        source, held_out = hold_out_of(source, fraction=holdout, least_left=least_left, say=say, **reading)
    train, labels, data = open_source(source, single_image_ids=single_image_ids, **reading)
    own = source if len(source) == 1 and {"query", "gallery"} <= set(data) else held_out
    # Identities of another split of a set may be trained on.
    trained = {parse_spec(spec)[0] for spec in source}
    return source, train, labels, open_targets(target or own, **reading, all_splits=all_splits, trained=trained)


def open_targets(specs, root=None, *, skip_unreadable=False, all_splits=False, trained=()):
    """Open the targets; ValueError for one without query and gallery, with a damaged image, or without any match.

    `all_splits` opens all ten splits of a small set if its spec does not choose one, and it is none of `trained`.
    """
    targets = []
    for spec in dict.fromkeys(specs):
        name, options = parse_spec(spec)
        has_splits = all_splits and name in SMALL_SETS and "split" not in options and name not in trained
        pairs = []
        for split_options in [{"split": number} for number in range(NUM_SPLITS)] if has_splits else [{}]:
            data = load_reid(spec, root, skip_unreadable=skip_unreadable, **split_options)
            if not {"query", "gallery"} <= set(data):
                raise ValueError(f"--target {spec} has no query and gallery, only {', '.join(data)}; choose another")
            sides = {split: data[split] for split in ("query", "gallery")}
            if not skip_unreadable:
                sides, _ = check_images(sides, where=spec)
            pairs.append((sides["query"], sides["gallery"]))
        targets.append(Target(spec, *pairs[0], tuple(pairs[1:])))
    return targets


def evaluate_target(model, target, transform, *, accelerator, rerank=None, **options):
    """The metrics of a target; `rerank` is None or the options of `kernels.k_reciprocal_rerank`.

    Several splits give their means, the standard deviations under `std` and the metrics of each under `splits`.
    `options` are those of `extract`.
    """
    pairs = [(target.query, target.gallery), *target.more]
    images, rows = distinct(pairs)
    options |= {"accelerator": accelerator, "desc": f"evaluating {target.spec}"}
    features = extract(model, images, transform, **options).to(accelerator.device)
    results = []
    for pair, pair_rows in zip(pairs, rows, strict=True):
        sides = [side_of(part, features[part_rows]) for part, part_rows in zip(pair, pair_rows, strict=True)]
        results.append(compare(*sides, rerank, all_processes()))
    if len(results) == 1:
        return results[0]
    metrics = averaged([{key: result[key] for key in result if key != "reranked"} for result in results])
    if rerank is not None:
        metrics["reranked"] = averaged([result["reranked"] for result in results])
    return metrics | {"splits": results}


def averaged(results):
    mean, deviation = evaluation.mean_and_deviation(results)
    return mean | {"std": deviation}


def distinct(pairs):
    """The distinct images of several splits, and for each split the rows of its query and of its gallery."""
    if len(pairs) == 1:
        num_queries, end = len(pairs[0][0]), len(pairs[0][0]) + len(pairs[0][1])
        return datasets.concatenate_datasets(list(pairs[0])), [(slice(num_queries), slice(num_queries, end))]
    row_of, parts, rows = {}, [], []
    for pair in pairs:
        rows.append([])
        for part in pair:
            paths = part["path"][:]
            new = [row for row, path in enumerate(paths) if path not in row_of]
            row_of.update({paths[row]: len(row_of) + index for index, row in enumerate(new)})
            if new:
                parts.append(part.select(new))
            rows[-1].append(torch.tensor([row_of[path] for path in paths]))
    return datasets.concatenate_datasets(parts), rows


def side_of(part, features):
    pids, camids = (torch.tensor(part[name][:], device=features.device) for name in ("pid", "camid"))
    return Side(features, pids, camids, list(part["path"]))


def compare(queries, gallery, rerank, group=None):
    """The metrics of one pair of query and gallery, which all processes of the `group` have."""
    evaluation.check_sides(queries, gallery)
    has_cameras = bool((queries.camids >= 0).any() and (gallery.camids >= 0).any())
    protocol = "market" if has_cameras else "all"
    metrics = evaluation.summary(evaluation.rank(queries, gallery, protocol=protocol, group=group))
    if rerank is not None:
        reranking = k_reciprocal_rerank(*shares_of(group, queries.features, gallery.features), **rerank, group=group)
        labels, protocol = kept_labels(queries, gallery, protocol)
        reranked = reranking.metrics(*shares_of(group, *labels), max_rank=evaluation.MAX_RANK, protocol=protocol)
        metrics["reranked"] = evaluation.summary(reranked)
    return metrics


def results(history):
    """The content of metrics.json: the newest metrics of each target, and the whole history."""
    newest = {entry["target"]: {key: entry[key] for key in entry if key != "target"} for entry in history}
    return {"targets": newest, "history": history}

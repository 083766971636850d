"""Scores of held-out source images, as the Re-ID filter scores generated ones: by them a threshold is set."""

import random

import torch

from kernels import cosine_topk

# A score is the mean of so many cosines.
BEST = 3
MOST_QUERIES = 2000


def calibrate(source, features, labels, seed):
    """Genuine and impostor scores, and scores and leads across cameras, of at most `MOST_QUERIES` held-out
    images; empty without any."""
    rows = source.held_out.nonzero().flatten().tolist()
    is_query = torch.zeros(len(labels), dtype=torch.bool)
    is_query[sorted(random.Random(f"calibration/{seed}").sample(rows, min(len(rows), MOST_QUERIES)))] = True
    # Held-out images that are no queries are not in the gallery either.
    is_used = (is_query | ~source.held_out).to(features.device)
    names = ("genuine", "impostor", "across", "across_lead")
    values = [torch.zeros(0)] * 4
    if rows:
        used = features[is_used], labels[is_used]
        camids = torch.tensor(source.train["camid"][:], device=features.device)[is_used]
        is_query = is_query.to(features.device)[is_used]
        values = [*calibration_scores(*used, is_query), *scores_across_cameras(*used, camids, is_query)]
    return {f"{source.domain}/{name}": value.contiguous() for name, value in zip(names, values, strict=True)}


def cameras_missing(sources):
    """A line for each source whose held-out images nobody else's camera saw: its threshold is that of one camera."""
    lines = []
    for source in sources.values():
        cameras = {}
        for label, camid in zip(source.labels.tolist(), source.train["camid"][:], strict=True):
            cameras.setdefault(label, set()).add(camid)
        if source.held_out.any() and max(map(len, cameras.values())) == 1:
            lines.append(
                f"WARNING: no identity of {source.domain} is seen by two cameras: the threshold is that of images of "
                "one camera, and right images in new scenes may fall below it. A lower --true_match_rate keeps more"
            )
    return lines


def calibration_scores(features, labels, held_out):
    """Scores of held-out source images against the others: genuine (own identity) and impostor (any other)."""
    gallery, gallery_labels = features[~held_out], labels[~held_out]
    queries, query_labels = features[held_out], labels[held_out]
    genuine, impostor = [], []
    for label in gallery_labels.unique():
        own_gallery = gallery[gallery_labels == label]
        scores = cosine_topk(queries, own_gallery, min(BEST, len(own_gallery))).scores.mean(1)
        genuine.append(scores[query_labels == label])
        impostor.append(scores[query_labels != label])
    return torch.cat(genuine).cpu(), torch.cat(impostor).cpu()


def scores_across_cameras(features, labels, camids, held_out):
    """(scores, leads) of held-out source images against those of other cameras, as `reid_scores` has them.

    Images of identities that no other camera has seen are left out. Without any other, all cameras count.
    """
    gallery, gallery_labels, gallery_cameras = features[~held_out], labels[~held_out], camids[~held_out]
    for across in (True, False):
        scores, leads = [], []
        for row in held_out.nonzero().flatten().tolist():
            seen = gallery_cameras != camids[row] if across else torch.ones_like(gallery_cameras, dtype=torch.bool)
            own = seen & (gallery_labels == labels[row])
            if own.any():
                best = cosine_topk(features[row : row + 1], gallery[own], min(BEST, int(own.sum()))).scores[0]
                nearest = cosine_topk(features[row : row + 1], gallery[seen], 1).scores[0, 0]
                scores.append(best.mean())
                leads.append((nearest - best[0]).clamp(min=0))
        if scores:
            return torch.stack(scores).cpu(), torch.stack(leads).cpu()
    return torch.zeros(0), torch.zeros(0)

"""Features of models that were trained with cameras, as TransReID's SIE is: each image with its own camera."""

import torch

from utils.evaluation.features import extract


def extract_by_camera(model, dataset, transform, *, store=None, **options):
    """`extract` for a model that was trained with cameras: each image goes through it with its own `camid`."""
    camids = torch.tensor(dataset["camid"][:])
    features = None
    for camid in camids.unique():
        rows = (camids == camid).nonzero().flatten()
        with model.backbone.seen_by(camid[None]):
            part = extract(
                model,
                dataset.select(rows.tolist()),
                transform,
                store=store and store.part(f"camera{int(camid)}"),
                desc=f"extracting camera {int(camid)}",
                **options,
            )
        if features is None:
            features = part.new_empty(len(dataset), part.shape[1])
        features[rows] = part
    return features


def check_cameras(model, name, camids):
    """ValueError if the model `name` cannot be given these cameras."""
    known = getattr(model.backbone.config, "num_cameras", 0)
    if not known:
        raise ValueError(f"{name} was not trained with cameras, as TransReID's SIE is; leave out --camera_embeddings")
    if min(camids) < 0 or max(camids) >= known:
        raise ValueError(
            f"{name} knows cameras 0 to {known - 1} of its training set, the images have {min(camids)} to "
            f"{max(camids)} (-1 is unknown); leave out --camera_embeddings to use the mean of its cameras"
        )

"""A learned vector for each camera of the training set: SIE, as in TransReID and CLIP-ReID.

Without the cameras of the images, a model takes the mean of all:

    with model.backbone.seen_by(torch.tensor([0, 2])):
        features = model(images)
"""

from contextlib import contextmanager


class SeesCameras:
    """Of a backbone: `cameras` are those of the next batches, None where they are not known."""

    cameras = None

    @contextmanager
    def seen_by(self, cameras):
        """Give the cameras of the next batches, numbered as in training."""
        known = self.config.num_cameras
        if not known:
            raise ValueError("this model has no camera embedding")
        if int(cameras.min()) < 0 or int(cameras.max()) >= known:
            raise ValueError(f"cameras are {sorted(set(cameras.tolist()))}; the model knows 0 to {known - 1}")
        self.cameras = cameras
        try:
            yield
        finally:
            self.cameras = None


def camera_offset(table, cameras):
    """What is added to the tokens, from the table of all cameras: (B or 1, 1, width)."""
    return table.mean(dim=0)[None, None] if cameras is None else table[cameras.to(table.device)][:, None]

"""What a batch is contrasted with: proxies of clusters in cameras, features of earlier batches."""

import torch
import torch.nn.functional as F
from torch import nn

from utils.modeling.memories import class_means


def camera_proxies(features, labels, cameras):
    """Unit-length mean direction of each cluster's images of each camera: (proxies, their labels, their cameras).

    Rows with a negative label are left out. The order is that of the labels, then that of the cameras.
    """
    inside = labels >= 0
    features, labels, cameras = features[inside], labels[inside], cameras[inside]
    num_cameras = int(cameras.max()) + 1
    pairs, pair = (labels * num_cameras + cameras).unique(return_inverse=True)
    return class_means(features, pair, len(pairs)), pairs // num_cameras, pairs % num_cameras


def proxy_contrast(features, proxies, own, positive, hard=50, temperature=0.07):
    """The contrast of each feature with proxies, (B,): the mean over its positives of

        -log softmax(u p / temperature) over its positives and the `hard` most similar proxies that are not `own`

    `own` and `positive` are masks (B, proxies); a feature without positives has 0.
    """
    cosines = F.normalize(features.float(), dim=1) @ proxies.t()
    hardest = cosines.detach().masked_fill(own, -torch.inf).topk(min(hard, len(proxies)), dim=1).indices
    chosen = torch.zeros_like(own).scatter_(1, hardest, True) & ~own | positive
    count = positive.sum(1)
    # A row without positives keeps all entries, so that its gradient is 0 and not NaN.
    logits = (cosines / temperature).masked_fill(~chosen & (count > 0)[:, None], -torch.inf)
    total = logits.logsumexp(1)
    mean = (cosines * positive).sum(1) / count.clamp(min=1) / temperature
    return torch.where(count > 0, total - mean, 0.0)


def circle_contrast(cosines, positive, scale=128.0, margin=0.25):
    """The circle form of a contrast, (B,): with s the cosines and m the margin,

        softplus( LSE over positives of -scale [1 + m - s]+ (s - 1 + m)  +  LSE over others of scale [s + m]+ (s - m) )

    The brackets have no gradient. A row without positives, or without others, has 0.
    """
    fixed = cosines.detach()
    near = -scale * (1 + margin - fixed).clamp(min=0) * (cosines - 1 + margin)
    far = scale * (fixed + margin).clamp(min=0) * (cosines - margin)
    # A row with 0 keeps all entries, so that its gradient is 0 and not NaN.
    both = (positive.any(1) & ~positive.all(1))[:, None]
    near = near.masked_fill(~positive & both, -torch.inf).logsumexp(1)
    far = far.masked_fill(positive & both, -torch.inf).logsumexp(1)
    return torch.where(both.squeeze(1), F.softplus(near + far), 0.0)


class FeatureQueue(nn.Module):
    """The last `size` features and their labels, as they were when they were added; -1 marks an empty place."""

    def __init__(self, size, width):
        super().__init__()
        self.register_buffer("features", torch.zeros(size, width))
        self.register_buffer("labels", torch.full((size,), -1))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def empty(self, seed):
        """Remove everything; the places hold random directions until they are filled."""
        vectors = torch.randn(self.features.shape, generator=torch.Generator().manual_seed(seed))
        self.features.copy_(F.normalize(vectors, dim=1))
        self.labels.fill_(-1)
        self.place.zero_()

    @torch.no_grad()
    def add(self, features, labels):
        # Of more than there are places for, the last.
        features, labels = features[-len(self.labels) :], labels[-len(self.labels) :]
        places = (self.place + torch.arange(len(labels), device=labels.device)) % len(self.labels)
        self.features[places], self.labels[places] = features.float(), labels
        self.place.copy_((self.place + len(labels)) % len(self.labels))

"""From a data set to batches of tensors: transforms, augmentation, samplers, streaming.

For use in other projects: `ReIDImages`, `IdentitySampler`, `train_transform`, `test_transform`.
"""

from utils import opened_when_used

__getattr__ = opened_when_used(
    __name__,
    {
        "samplers": "IdentitySampler",
        "shuffled": "ShuffleSampler",
        "transforms": "ReIDImages test_transform train_transform",
    },
)

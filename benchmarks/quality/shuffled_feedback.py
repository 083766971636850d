"""`train_dcac.py` with the gradient of L_ldm at the features going to the images of another identity of the batch.

    python -m benchmarks.quality.shuffled_feedback --source ./people --output_dir output/shuffled

The gradient keeps its size and loses its meaning: what it still gives is regularisation.
"""

import sys

from train_dcac import DCAC, parse_args, run_script


def shuffled(features, places):
    """The features, whose gradient arrives `places` rows further down."""
    features = features.view_as(features)
    features.register_hook(lambda gradient: gradient.roll(places, 0))
    return features


def shuffle_feedback(images_per_id):
    """Change DCAC: batches have `images_per_id` images of an identity in a row."""

    def condition_inputs(self, features, bn_features, logits, warmup):
        if warmup:
            return logits.detach(), bn_features.detach()
        features = features if self.balance is None else self.balance(features)
        return self.neck_again(shuffled(features, images_per_id))

    DCAC.condition_inputs = condition_inputs


if __name__ == "__main__":
    args = parse_args(sys.argv[1:])
    shuffle_feedback(args.images_per_id)
    run_script(args)

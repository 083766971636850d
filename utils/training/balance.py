"""Labels that share images out evenly: probabilities scaled to uniform rows and columns (Sinkhorn)."""

import math

import torch

CHECKED_EVERY = 10
MOST_ROUNDS = 10_000


@torch.no_grad()
def balanced_labels(logits, power=25.0, tolerance=0.01):
    """The group of each image, (N,), from logits (N, K).

    P = softmax(logits)^power gets factors for its images and for its groups, such that every image sums to 1 / N and
    every group to 1 / K; an image's group is then its largest entry. Each round sets the groups' factors, then the
    images', until the sum of the relative changes of the images' factors, looked at in every tenth round, is below
    `tolerance`.
    """
    # As logarithms: a small probability to a high power would be 0.
    scores = power * logits.double().log_softmax(1)
    per_image, per_group = (-math.log(size) for size in scores.shape)
    by_image = torch.full_like(scores[:, 0], per_image)
    for number in range(MOST_ROUNDS):
        by_group = per_group - (scores + by_image[:, None]).logsumexp(0)
        before, by_image = by_image, per_image - (scores + by_group).logsumexp(1)
        if number % CHECKED_EVERY == 0 and float(((by_image - before).exp() - 1).abs().sum()) < tolerance:
            break
    return (scores + by_group).argmax(1)

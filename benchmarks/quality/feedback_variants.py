"""`train_dcac.py` with a changed feedback, for the arms of `benchmarks.quality.dcac_feedback`.

    python -m benchmarks.quality.feedback_variants shuffled --source ./people --output_dir output/shuffled
    python -m benchmarks.quality.feedback_variants others --source ./people --output_dir output/others
    python -m benchmarks.quality.feedback_variants timesteps --source ./people --output_dir output/timesteps

shuffled     the gradient of L_ldm at the features goes to the images of another identity of the batch, and none to
             neck and classifier. It keeps its size and loses its meaning: what it still gives is regularisation.
others       the condition is made of the other identities' probabilities, without the image's own: of those that it
             looks like. By the own one alone every code of the identities, captions or not, would do.
timesteps    L_ldm is weighted by how much worse another image's condition denoises than the own one at a timestep.
"""

import sys

import torch
import torch.nn.functional as F
from torch import nn

import train_dcac
from train_dcac import DCAC, Condition
from utils.diffusion.schedule import noise_loss


class Shuffled(DCAC):
    IMAGES_PER_ID = 4

    def condition_inputs(self, features, bn_features, logits, warmup):
        if warmup:
            return logits.detach(), bn_features.detach()
        features = (features if self.balance is None else self.balance(features)).clone()
        # A batch has the images of an identity in a row.
        features.register_hook(lambda gradient: gradient.roll(self.IMAGES_PER_ID, 0))
        norm, classifier = self.encoder.bnneck, self.encoder.classifier
        neck = norm.weight.detach(), norm.bias.detach()
        bn_features = F.batch_norm(features, None, None, *neck, training=True, eps=norm.eps)
        return F.linear(bn_features, classifier.weight.detach()), bn_features


class OfOthers(Condition):
    """The condition of the probabilities of all identities but the image's own."""

    def forward(self, logits, bn_features, labels, memory):
        own = F.one_hot(labels, logits.shape[-1]).bool()
        return super().forward(logits.masked_fill(own, -torch.inf), bn_features, labels, memory)


class TimestepWeights(nn.Module):
    """Weights of timesteps, 1 in the mean over the schedule: half the same everywhere, half by how much worse another
    condition is.

    Measured in parts of the schedule, with sums that forget; 1 everywhere while no part says anything.
    """

    PARTS, KEPT = 10, 0.95

    def __init__(self, num_steps):
        super().__init__()
        self.num_steps = num_steps
        # Sum over images and their number.
        self.register_buffer("worse", torch.zeros(2, self.PARTS))

    def parts_of(self, timesteps):
        return timesteps * self.PARTS // self.num_steps

    def forward(self, timesteps):
        total, count = self.worse
        worse = (total / count.clamp(min=1e-3)).clamp(min=0)
        weights = (1 + worse / worse.mean()) / 2 if worse.any() else torch.ones_like(worse)
        return weights[self.parts_of(timesteps)]

    def update(self, timesteps, worse):
        parts = F.one_hot(self.parts_of(timesteps), self.PARTS).float()
        self.worse.mul_(self.KEPT).add_(torch.stack([worse @ parts, parts.sum(0)]))


class Weighted(DCAC):
    EVERY = 4

    def __init__(self, *parts, **options):
        super().__init__(*parts, **options)
        if self.schedule is not None:
            self.timestep_weights = TimestepWeights(self.schedule.num_steps)
            self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def denoise(self, latents, noise, timesteps, condition):
        if not self.training:
            return noise_loss(self.unet, self.schedule, latents, noise, timesteps, condition).view(1)
        losses = self.losses(latents, noise, timesteps, condition)
        if self.steps % self.EVERY == 0:
            with torch.no_grad():
                another = condition.roll(len(condition) // 2, 0)
                worse = self.losses(latents, noise, timesteps, another) - losses
                self.timestep_weights.update(timesteps, worse)
        self.steps += 1
        return (self.timestep_weights(timesteps) * losses).mean().view(1)

    def losses(self, latents, noise, timesteps, condition):
        """The noise loss of each image."""
        noised = self.schedule.add_noise(latents, noise, timesteps)
        prediction = self.unet(noised, timesteps, encoder_hidden_states=condition).sample
        return (prediction - self.schedule.target(latents, noise, timesteps)).square().flatten(1).mean(1)


# What takes the place of what in `train_dcac.py`.
VARIANTS = {"shuffled": {"DCAC": Shuffled}, "others": {"Condition": OfOthers}, "timesteps": {"DCAC": Weighted}}


def main(variant, input_args):
    for name, changed in VARIANTS[variant].items():
        if not issubclass(changed, getattr(train_dcac, name)):
            raise ValueError(f"train_dcac.{name} is not what {changed.__name__} changes")
        setattr(train_dcac, name, changed)
    args = train_dcac.parse_args(input_args)
    if args.encoder != "clip":
        raise ValueError(f"--encoder {args.encoder} has a feedback of its own, which these variants do not change")
    if args.images_per_id != Shuffled.IMAGES_PER_ID:
        raise ValueError(f"--images_per_id {args.images_per_id}: the batches of these variants have 4")
    train_dcac.run_script(args)


if __name__ == "__main__":
    main(sys.argv.pop(1), None)

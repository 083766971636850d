"""Augmentations that change camera and place but not the person: for a Re-ID model that meets scenes it never saw.

They take and give batches (B, 3, H, W) of values between 0 and 1, and draw from a `torch.Generator`.
"""

import torch
import torch.nn.functional as F

# Exposure and the colour of light as logarithms, contrast lost, grain; share of images.
EXPOSURE, CAST, HAZE, GRAIN = 0.7, 0.3, 0.08, 0.1
OTHER_PLACE, COARSE = 0.6, 0.3
# Light of another place, as a logarithm: a night is farther from a day than two cameras are from each other.
DARKEST, BRIGHTEST, PLACE_CAST = -1.2, 0.3, 0.25
# At most these shares of the width left and right, of the height above and below, are of another image.
SIDES, TOP, BOTTOM = 0.28, 0.08, 0.04
COARSEST = 2.5


def change_scene(images, generator):
    """Another place, another camera, and of some images a coarser picture."""
    images = other_camera(other_place(images, generator), generator)
    return coarser(images, generator)


def other_camera(images, generator):
    def drawn(channels):
        return torch.rand(len(images), channels, 1, 1, generator=generator)

    gain = (EXPOSURE * (2 * drawn(1) - 1) + CAST * (2 * drawn(3) - 1)).exp()
    haze, grain = HAZE * drawn(1), GRAIN * drawn(1)
    seen = haze + (1 - 2 * haze) * (images * gain).clamp(0, 1)
    return (seen + grain * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def other_place(images, generator):
    """The margins of some images are another's of the batch, in another light; the middle stays: the person's."""
    count, _, height, width = images.shape
    others = other_light(images[torch.randperm(count, generator=generator)], generator)
    shares = torch.rand(count, 4, generator=generator)
    chosen = torch.rand(count, generator=generator) < OTHER_PLACE
    left, right = shares[:, 0] * SIDES * width, (1 - shares[:, 1] * SIDES) * width
    top, bottom = shares[:, 2] * TOP * height, (1 - shares[:, 3] * BOTTOM) * height
    across, down = torch.arange(width) + 0.5, torch.arange(height) + 0.5
    inside = (across >= left[:, None]) & (across <= right[:, None])
    within = (down >= top[:, None]) & (down <= bottom[:, None])
    # [B, 1, H, W]
    kept = (within[:, :, None] & inside[:, None, :])[:, None] | ~chosen.view(-1, 1, 1, 1)
    return torch.where(kept, images, others)


def other_light(images, generator):
    """Places at another time of day, and under other lamps."""
    level = BRIGHTEST + (DARKEST - BRIGHTEST) * torch.rand(len(images), 1, 1, 1, generator=generator)
    cast = PLACE_CAST * (2 * torch.rand(len(images), 3, 1, 1, generator=generator) - 1)
    return (images * (level + cast).exp()).clamp(0, 1)


def coarser(images, generator):
    """Some images through a smaller size and back."""
    images = images.clone()
    size = images.shape[2:]
    for place in (torch.rand(len(images), generator=generator) < COARSE).nonzero().flatten().tolist():
        factor = 1 + (COARSEST - 1) * torch.rand(1, generator=generator).item()
        small = [max(1, int(side / factor)) for side in size]
        one = F.interpolate(images[place : place + 1], size=small, mode="bilinear", antialias=True)
        images[place] = F.interpolate(one, size=size, mode="bilinear")[0]
    return images

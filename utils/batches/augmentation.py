"""Stronger augmentation: RandAugment, several views and crops, and changes of camera and place."""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torchvision.transforms import v2

from utils.batches.transforms import (
    HALF,
    ReIDImages,
    TestTransform,
    TrainTransform,
    loader_of,
    to_tensor,
    train_transform,
)

# Range of the shares of the width that noise covers on each side; the person is in the middle.
SIDES = (0.1, 0.35)
# The range of the standard deviation of a blur, in pixels.
BLUR = (0.1, 2.0)


@contextmanager
def drawn_by(rng):
    """Seed torch's generator from `rng` inside the context, and restore it afterwards."""
    # torch.manual_seed would seed every other device too, which takes longer than some of the changes.
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(rng.getrandbits(63))
    try:
        yield
    finally:
        torch.set_rng_state(state)


def as_bytes(mean):
    return [round(255 * value) for value in mean]


class RandAugmentTransform:
    """RandAugment on the picture, then `TrainTransform`: PIL image and `random.Random` -> (3, H, W)."""

    def __init__(self, image_size=(256, 128), mean=HALF, std=HALF, *, num_ops=2, magnitude=9, **options):
        self.usual = TrainTransform(image_size, mean, std, **options)
        self.first = None
        if num_ops:
            bilinear = v2.InterpolationMode.BILINEAR
            self.first = v2.RandAugment(num_ops, magnitude, interpolation=bilinear, fill=as_bytes(mean))

    def __call__(self, image, rng):
        if self.first is not None:
            with drawn_by(rng):
                image = self.first(image)
        return self.usual(image, rng)


class Blur:
    """A Gaussian blur of a share of the pictures, as `after_crop` of `TrainTransform`."""

    def __init__(self, share):
        self.share = share

    def __call__(self, image, rng):
        return image.filter(ImageFilter.GaussianBlur(rng.uniform(*BLUR))) if rng.random() < self.share else image


class Views:
    """Several transforms of one image: PIL image and `random.Random` -> (transforms, 3, H, W)."""

    def __init__(self, transforms):
        self.transforms = transforms

    def __call__(self, image, rng):
        return torch.stack([transform(image, rng) for transform in self.transforms])


def view_transform(views, image_size, mean, std, blur=0.0, **options):
    """The transform of a training's images: "changed" views, drawn by `options`, and "plain" ones, only resized.

    `blur` is the share of the changed views that are blurred. (3, H, W) for a single view, else (views, 3, H, W).
    """
    kinds = {
        "changed": TrainTransform(image_size, mean, std, after_crop=Blur(blur) if blur else None, **options),
        "plain": TestTransform(image_size, mean, std, "bicubic"),
    }
    return kinds[views[0]] if len(views) == 1 else Views([kinds[view] for view in views])


class AutoAugmentTransform:
    """AutoAugment of a share of the pictures, then `TrainTransform` with other colours of a share of the crops."""

    def __init__(self, image_size=(256, 128), mean=HALF, std=HALF, *, auto=0.1, jitter=0.5, **options):
        self.usual = TrainTransform(image_size, mean, std, after_crop=self.recolour, **options)
        bicubic = v2.InterpolationMode.BICUBIC
        self.auto = v2.RandomApply([v2.AutoAugment(interpolation=bicubic, fill=[128] * 3)], auto)
        self.jitter = v2.RandomApply([v2.ColorJitter(brightness=0.15, contrast=0.1)], jitter)

    def recolour(self, image, rng):
        with drawn_by(rng):
            return self.jitter(image)

    def __call__(self, image, rng):
        with drawn_by(rng):
            image = self.auto(image.convert("RGB"))
        return self.usual(image, rng)


class MultiCrop:
    """Two crops of most of a person and several of parts: {"whole": (2, 3, H, W), "parts": (n, 3, h, w)}.

    Crops have about the aspect ratio of a person. With `colours` 1 and `hidden` 0 they are augmented as in DINO. With
    smaller changes of hue, features distinguish people better. `hidden` is the probability that noise covers both
    sides of a crop, drawn for each crop. All crops of an image share its scene: without the noise, the model would
    learn scenes before people.
    """

    def __init__(
        self,
        image_size,
        part_size,
        mean=HALF,
        std=HALF,
        *,
        num_parts=8,
        whole_area=(0.4, 1.0),
        part_area=(0.05, 0.4),
        aspects=None,
        colours=1.0,
        hidden=0.0,
    ):
        self.mean, self.std, self.num_parts = mean, std, num_parts
        # Width to height of a crop before it is resized; None for a range around that of its size.
        self.aspects = aspects
        self.colours, self.hidden = colours, hidden
        blur = v2.GaussianBlur(kernel_size=_odd(image_size[0] // 16), sigma=(0.1, 2.0))
        first, second, part = (
            [blur],
            [v2.RandomApply([blur], 0.1), v2.RandomSolarize(128, 0.2 * colours)],
            [v2.RandomApply([blur], 0.5)],
        )
        self.wholes = [self.crop(image_size, whole_area, last) for last in (first, second)]
        self.part = self.crop(part_size, part_area, part)

    def crop(self, size, area, last):
        aspect, jitter = size[1] / size[0], (0.4, 0.4, 0.2 * self.colours, 0.1 * self.colours)
        return v2.Compose(
            [
                v2.RandomResizedCrop(
                    size,
                    area,
                    self.aspects or (aspect * 3 / 4, aspect * 4 / 3),
                    interpolation=v2.InterpolationMode.BICUBIC,
                ),
                v2.RandomHorizontalFlip(),
                v2.RandomApply([v2.ColorJitter(*jitter)], 0.8),
                v2.RandomGrayscale(0.2 * self.colours),
                *last,
            ]
        )

    def __call__(self, image, rng):
        image = image.convert("RGB")
        with drawn_by(rng):
            wholes = [crop(self.with_hidden_sides(image, rng)) for crop in self.wholes]
            parts = [self.part(self.with_hidden_sides(image, rng)) for _ in range(self.num_parts)]
        crops = {"whole": torch.stack([to_tensor(crop, self.mean, self.std) for crop in wholes])}
        if parts:
            crops["parts"] = torch.stack([to_tensor(crop, self.mean, self.std) for crop in parts])
        return crops

    def with_hidden_sides(self, image, rng):
        if rng.random() >= self.hidden:
            return image
        image = image.copy()
        for side in (0, 1):
            width = round(rng.uniform(*SIDES) * image.width)
            noise = Image.frombytes("RGB", (width, image.height), rng.randbytes(3 * width * image.height))
            image.paste(noise, (side * (image.width - width), 0))
        return image


def _odd(size):
    return max(3, size // 2 * 2 + 1)


def to_picture(tensor, mean, std):
    """The inverse of `to_tensor`: (3, H, W) -> PIL."""
    mean, std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
    pixels = (tensor.detach().cpu().float() * std + mean).mul(255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


# Exposure and colour of the light as logarithms, lost contrast, grain.
EXPOSURE, CAST, HAZE, GRAIN = 0.7, 0.3, 0.08, 0.1
# Shares of the images that get another place, and a coarser picture.
OTHER_PLACE, COARSE = 0.6, 0.3
# Light of another place, as a logarithm: day and night differ more than two cameras do.
DARKEST, BRIGHTEST, PLACE_CAST = -1.2, 0.3, 0.25
# The largest shares of the width (left and right) and of the height (top, bottom) that come from another image.
SIDE, TOP, BOTTOM = 0.28, 0.08, 0.04
COARSEST = 2.5


def change_scene(images, generator):
    """Changes the place of some images, the camera of all, and makes some coarser."""
    images = other_camera(other_place(images, generator), generator)
    return coarser(images, generator)


def other_camera(images, generator):
    def drawn(channels):
        return torch.rand(len(images), channels, 1, 1, generator=generator)

    gain = (EXPOSURE * (2 * drawn(1) - 1) + CAST * (2 * drawn(3) - 1)).exp()
    haze, grain = HAZE * drawn(1), GRAIN * drawn(1)
    exposed = haze + (1 - 2 * haze) * (images * gain).clamp(0, 1)
    return (exposed + grain * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def other_place(images, generator):
    """Replaces the margins of some images by those of another image, in another light; the middle stays."""
    count, _, height, width = images.shape
    others = other_light(images[torch.randperm(count, generator=generator)], generator)
    shares = torch.rand(count, 4, generator=generator)
    chosen = torch.rand(count, generator=generator) < OTHER_PLACE
    left, right = shares[:, 0] * SIDE * width, (1 - shares[:, 1] * SIDE) * width
    top, bottom = shares[:, 2] * TOP * height, (1 - shares[:, 3] * BOTTOM) * height
    across, down = torch.arange(width) + 0.5, torch.arange(height) + 0.5
    inside = (across >= left[:, None]) & (across <= right[:, None])
    within = (down >= top[:, None]) & (down <= bottom[:, None])
    # [B, 1, H, W]
    is_kept = (within[:, :, None] & inside[:, None, :])[:, None] | ~chosen.view(-1, 1, 1, 1)
    return torch.where(is_kept, images, others)


def other_light(images, generator):
    """Changes exposure and colour as another time of day and other lamps would."""
    level = BRIGHTEST + (DARKEST - BRIGHTEST) * torch.rand(len(images), 1, 1, 1, generator=generator)
    cast = PLACE_CAST * (2 * torch.rand(len(images), 3, 1, 1, generator=generator) - 1)
    return (images * (level + cast).exp()).clamp(0, 1)


def coarser(images, generator):
    """Reduces some images and enlarges them again."""
    images = images.clone()
    size = images.shape[2:]
    for place in (torch.rand(len(images), generator=generator) < COARSE).nonzero().flatten().tolist():
        factor = 1 + (COARSEST - 1) * torch.rand(1, generator=generator).item()
        small = [max(1, int(side / factor)) for side in size]
        reduced = F.interpolate(images[place : place + 1], size=small, mode="bilinear", antialias=True)
        images[place] = F.interpolate(reduced, size=size, mode="bilinear")[0]
    return images


def training_loader(
    model, dataset, labels, sampler, *, padding=10, erasing=0.5, num_workers=0, pin_memory=False, transform=None
):
    """A loader of augmented batches, resized and normalised for a model; `sampler` yields (row, key) pairs."""
    transform = transform or train_transform(
        model.image_size, model.image_mean, model.image_std, padding=padding, erasing=erasing
    )
    return loader_of(ReIDImages(dataset, transform, labels), sampler, num_workers, pin_memory)

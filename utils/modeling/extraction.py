"""Features of images as people have them: paths, PIL images, arrays or tensors; in the batches of `batches.chunks`."""

import os
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from utils.batches.chunks import computed_in_chunks
from utils.batches.transforms import test_transform
from utils.datasets.images import as_rgb

KINDS = (
    "a path, a PIL image, an array (H, W, 3) uint8 RGB, a tensor (3, H, W) uint8, or a normalised tensor "
    "(3, height, width) of floats"
)


class OneProcess(NamedTuple):
    """What the batch loop asks of an accelerator."""

    device: torch.device
    process_index: int = 0
    num_processes: int = 1
    is_main_process: bool = True


class Prepared(torch.utils.data.Dataset):
    """Images of any kind as input for a model."""

    def __init__(self, model, images):
        self.images, self.size = images, tuple(model.image_size)
        self.transform = test_transform(model.image_size, model.image_mean, model.image_std, model.resample)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, number):
        return self.prepared(self.images[number], number)

    def prepared(self, image, number):
        def refuse(reason):
            raise ValueError(f"image {number}: {reason}; it must be {KINDS}")

        if isinstance(image, (str, os.PathLike)):
            if not Path(image).is_file():
                raise ValueError(f"image {number}: there is no file {os.fspath(image)!r}")
            try:
                with Image.open(image) as opened:
                    return self.transform(upright(opened))
            # Pillow raises many classes of its own and of Python on a damaged file.
            except Exception as error:
                raise ValueError(f"image {number}: {os.fspath(image)!r} cannot be read: {error}") from error
        if isinstance(image, Image.Image):
            return self.transform(upright(image))
        if isinstance(image, torch.Tensor) and image.is_floating_point():
            if tuple(image.shape) != (3, *self.size):
                refuse(f"its shape is {tuple(image.shape)}, and this model takes (3, {self.size[0]}, {self.size[1]})")
            if image.min() >= 0 and image.max() <= 1:
                # A bright image may lie there after it is normalised.
                warnings.warn(
                    f"image {number}: its values lie in 0..1. If it is not normalised yet, do so by the model's "
                    "image_mean and image_std, or give uint8",
                    stacklevel=2,
                )
            return image.detach().float().cpu()
        shape = tuple(getattr(image, "shape", ()))
        if isinstance(image, torch.Tensor):
            if image.dtype != torch.uint8 or len(shape) != 3 or shape[0] != 3:
                refuse(f"it is a tensor of {image.dtype} and shape {shape}")
            image = image.permute(1, 2, 0).cpu().numpy()
        elif isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or len(shape) != 3 or shape[2] != 3:
                refuse(f"it is an array of {image.dtype} and shape {shape}")
        else:
            refuse(f"it is a {type(image).__name__}")
        return self.transform(Image.fromarray(np.ascontiguousarray(image)))


def upright(image):
    """RGB pixels, turned as the file says: what data sets give."""
    return as_rgb(ImageOps.exif_transpose(image))


def listed(images):
    """A list of images; a single one becomes a list of one."""
    if isinstance(images, (torch.Tensor, np.ndarray)):
        if images.ndim not in (3, 4):
            raise ValueError(f"an image has 3 dimensions and a batch 4, got shape {tuple(images.shape)}")
        return list(images) if images.ndim == 4 else [images]
    return [images] if isinstance(images, (str, os.PathLike, Image.Image)) else list(images)


@torch.no_grad()
def extract_features(model, images, batch_size=64):
    """See `ReIDModel.extract`."""
    images = listed(images)
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    if not images:
        return torch.zeros(0, model.num_features)
    was_training = model.training
    model.eval()
    try:
        ((_, features),) = computed_in_chunks(
            Prepared(model, images),
            [range(len(images))],
            model,
            accelerator=OneProcess(next(model.parameters()).device),
            batch_size=min(batch_size, len(images)),
            num_workers=0,
            total=len(images),
            desc="extracting",
            leave=False,
        )
    finally:
        model.train(was_training)
    return features


def features_of(model, side):
    """Features as they are, (N, D) or (D,); anything else is taken for images."""
    if isinstance(side, np.ndarray) and side.ndim <= 2:
        side = torch.from_numpy(side)
    if isinstance(side, torch.Tensor) and side.ndim <= 2:
        side = side[None] if side.ndim == 1 else side
        if side.shape[1] != model.num_features:
            raise ValueError(f"features of this model have {model.num_features} numbers, got {side.shape[1]}")
        return side.float().cpu()
    return extract_features(model, side)

"""The augmentation of `RandAugmentTransform` on the device, for a whole batch at once.

Workers decode and resize, and draw what happens to each image, from the same keys as the transform that does it all in
the worker; so the images depend neither on the number of processes and workers nor on a resume. RandAugment changes
images after they are resized here, before it there: images that have the training size already get the same changes.

    augment = BatchAugmentation(image_size, mean, std, num_ops=2, magnitude=9, padding=10, erasing=0.25)
    loader = OnDevice(DataLoader(ReIDImages(data, augment.draw, labels), batch_sampler=sampler), augment, "cuda")
"""

import math

import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from utils.batches.augmentation import as_bytes
from utils.batches.transforms import HALF, TrainTransform, resized, to_bytes

# The operations in the order in which torchvision's RandAugment draws them; whether half of them go the other way.
OPERATIONS = {
    "Identity": False, "ShearX": True, "ShearY": True, "TranslateX": True, "TranslateY": True, "Rotate": True,
    "Brightness": True, "Color": True, "Contrast": True, "Sharpness": True, "Posterize": False, "Solarize": False,
    "AutoContrast": False, "Equalize": False,
}  # fmt: skip
SIGNED = list(OPERATIONS.values())
STRONGEST = 30
# Mirrored or not; left and top of the crop; top, left, height and width of the erased rectangle.
NUMBERS = 7


class BatchAugmentation:
    """`draw`: PIL image and `random.Random` -> {"pixels", "draws"}; a call makes float images (B, 3, H, W) of a batch
    of them: RandAugment, mirroring, padded crop, normalisation, erasing."""

    def __init__(self, image_size=(256, 128), mean=HALF, std=HALF, *, num_ops=2, magnitude=9, **options):
        self.usual = TrainTransform(image_size, mean, std, **options)
        self.num_ops, self.magnitude = num_ops, magnitude
        self.fill = as_bytes(mean)

    def draw(self, image, rng):
        """Resized bytes (3, H, W), and in `draws` an operation (its number, twice, plus 1 the other way) for each of
        `num_ops`, then `NUMBERS` numbers."""
        numbers = []
        if self.num_ops:
            # The numbers of torch's own generator after the same seed, without the time to save and restore it.
            generator = torch.Generator().manual_seed(rng.getrandbits(63))
            numbers = [draw_operation(generator) for _ in range(self.num_ops)]
        usual = self.usual
        numbers.append(rng.random() < usual.flip)
        both = 2 * usual.padding
        numbers += [rng.randint(0, both), rng.randint(0, both)] if usual.padding else [0, 0]
        is_erased = rng.random() < usual.erasing
        numbers += (usual.rectangle(rng) if is_erased else None) or (0, 0, 0, 0)
        pixels = to_bytes(resized(image, usual.image_size, usual.resample))
        return {"pixels": pixels, "draws": torch.tensor(numbers, dtype=torch.int32)}

    def __call__(self, batch, device):
        """`batch`: {"pixels" (B, 3, H, W) bytes, "draws" (B, numbers)}, both on the CPU."""
        pixels, draws = batch["pixels"].to(device, non_blocking=True), batch["draws"]
        for place in range(self.num_ops):
            pixels = self.changed(pixels, draws[:, place])
        numbers = draws[:, self.num_ops :].to(device, non_blocking=True).long()
        images = cropped(pixels, numbers[:, 0] > 0, numbers[:, 1], numbers[:, 2], self.usual.padding)
        mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (self.usual.mean, self.usual.std))
        images = images.float().div_(255.0).sub_(mean).div_(std)
        return erased(images, numbers[:, 3:], self.usual.erasing_value.to(device))

    def changed(self, pixels, operations):
        """Each image after its operation: images of one operation lie side by side and change together."""
        order = operations.argsort(stable=True)
        numbers, counts = operations[order].unique_consecutive(return_counts=True)
        parts = pixels[order.to(pixels.device)].split(counts.tolist())
        parts = [self.operate(part, int(number)) for part, number in zip(parts, numbers, strict=True)]
        return torch.cat(parts)[order.argsort().to(pixels.device)]

    def operate(self, pixels, number):
        """One operation on bytes (B, 3, H, W), by torchvision's functions; see v2.RandAugment for their strengths."""
        name, sign = list(OPERATIONS)[number // 2], -1 if number % 2 else 1
        height, width = pixels.shape[-2:]

        def strength(strongest, weakest=0.0):
            return sign * torch.linspace(weakest, strongest, STRONGEST + 1)[self.magnitude].item()

        still = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
        filled = {"interpolation": v2.InterpolationMode.BILINEAR, "fill": self.fill}
        match name:
            case "ShearX" | "ShearY":
                angle = math.degrees(math.atan(strength(0.3)))
                shear = [angle, 0.0] if name == "ShearX" else [0.0, angle]
                return functional.affine(pixels, **still | {"shear": shear}, **filled, center=[0, 0])
            case "TranslateX":
                moved = [int(strength(150 / 331 * width)), 0]
                return functional.affine(pixels, **still | {"translate": moved}, **filled)
            case "TranslateY":
                moved = [0, int(strength(150 / 331 * height))]
                return functional.affine(pixels, **still | {"translate": moved}, **filled)
            case "Rotate":
                return functional.rotate(pixels, strength(30.0), **filled)
            case "Brightness":
                return functional.adjust_brightness(pixels, 1.0 + strength(0.9))
            case "Color":
                return functional.adjust_saturation(pixels, 1.0 + strength(0.9))
            case "Contrast":
                return functional.adjust_contrast(pixels, 1.0 + strength(0.9))
            case "Sharpness":
                return functional.adjust_sharpness(pixels, 1.0 + strength(0.9))
            case "Posterize":
                return functional.posterize(pixels, bits=8 - round(strength(4.0)))
            case "Solarize":
                return functional.solarize(pixels, threshold=255 * strength(0.0, 1.0))
            case "AutoContrast":
                return functional.autocontrast(pixels)
            case "Equalize":
                return functional.equalize(pixels)
        return pixels


def draw_operation(generator):
    number = int(torch.randint(len(OPERATIONS), (), generator=generator))
    return 2 * number + (SIGNED[number] and bool(torch.rand((), generator=generator) <= 0.5))


def cropped(pixels, is_mirrored, left, top, padding):
    """Bytes (B, 3, H, W), mirrored where `is_mirrored`, then cut out of a black frame of `padding` pixels."""
    height, width = pixels.shape[-2:]
    # [B, H] and [B, W]
    down = torch.arange(height, device=pixels.device) + top[:, None] - padding
    across = torch.arange(width, device=pixels.device) + left[:, None] - padding
    is_inside = ((down >= 0) & (down < height))[:, :, None] & ((across >= 0) & (across < width))[:, None, :]
    across = torch.where(is_mirrored[:, None], width - 1 - across, across).clamp(0, width - 1)
    rows = torch.arange(len(pixels), device=pixels.device)[:, None, None]
    # [B, H, W, 3] -> [B, 3, H, W]
    moved = pixels[rows, :, down.clamp(0, height - 1)[:, :, None], across[:, None, :]].permute(0, 3, 1, 2)
    # In memory as the loader has them: the order of sums in a convolution depends on it.
    return (moved * is_inside[:, None]).contiguous()


def erased(images, boxes, value):
    """Images (B, 3, H, W) with `value` in their boxes (B, 4): top, left, height, width; no height, no box."""
    top, left, tall, wide = (boxes[:, place, None] for place in range(4))
    height, width = images.shape[-2:]
    down, across = (torch.arange(size, device=images.device) for size in (height, width))
    is_hit = ((down >= top) & (down < top + tall))[:, :, None] & ((across >= left) & (across < left + wide))[:, None]
    return torch.where(is_hit[:, None], value, images)


class OnDevice:
    """Batches of a loader whose transform is `augment.draw`, with their images made on the device."""

    def __init__(self, loader, augment, device):
        self.loader, self.augment, self.device = loader, augment, device

    def __iter__(self):
        for batch in self.loader:
            yield batch | {"images": self.augment(batch["images"], self.device)}

    def __len__(self):
        return len(self.loader)

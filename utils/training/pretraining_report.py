"""The picture of a pre-training's first batch, drawn and in the report."""

from pathlib import Path

import torch
import torch.nn.functional as F

from utils.batches.augmentation import to_picture
from utils.batches.mixing import mix_images
from utils.files import write_together
from utils.reporting.report import sheet

BATCH = Path("samples", "batch.png")


def draw_batch(output_dir, images, mix, mean, std):
    """Draw the first images as the network sees them, mixed, or each with its crops: `samples/batch.png`."""
    if isinstance(images, dict):
        size = images["whole"].shape[-2:]
        parts = [F.interpolate(crops, size=size, mode="bilinear") for crops in images["parts"][:4]]
        rows = [torch.cat(pair) for pair in zip(images["whole"][:4], parts, strict=True)]
    else:
        rows = mix_images(images[:16], mix).split(8)
        rows = [row for row in rows if len(row) == len(rows[0])]
    pictures = [[to_picture(image, mean, std) for image in row] for row in rows]
    with write_together(Path(output_dir) / BATCH.parent) as part:
        sheet(pictures).save(part(BATCH.name), "PNG")


def first_batch(output_dir):
    """That picture as samples of a report."""
    path = Path(output_dir) / BATCH
    words = "Images as the network sees them: augmented and mixed, or each with its crops."
    return {"samples": [("first batch", path)] if path.exists() else [], "sample_words": words}

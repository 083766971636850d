"""Scores a large set in pieces. A piece is written whole or not at all, so that a killed run can resume."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from utils.batches.transforms import resized, test_transform
from utils.datasets.images import as_rgb, reason_of
from utils.files import write_together
from utils.generated import choosing
from utils.generated import images as generated_images
from utils.generated.images import ANSWERED, SCORED
from utils.generated.kept_set import write_scores
from utils.worklist import differences

PIECES, SCORES, FEATURES, SETTINGS = ".pieces", "scores.parquet", "features.npy", "scoring.json"
CALIBRATION = "calibration.safetensors"


def is_scored(folder, settings):
    """Whether the scores of these settings are complete; ValueError if the folder has scores of other settings."""
    try:
        before = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = None
    scored = is_table(folder / SCORES) and is_array(folder / FEATURES) and is_safetensors(folder / CALIBRATION)
    has_scores = scored or any((folder / PIECES).glob("*.parquet")) or (folder / "models").is_dir()
    if has_scores and not isinstance(before, dict):
        raise ValueError(
            f"{folder / SETTINGS}, which says what the scores there are of, is missing or damaged; give another "
            "--output_dir"
        )
    if has_scores and before != settings:
        changed = "; ".join(differences(before, settings))
        raise ValueError(
            f"{folder} holds scores of other models or images: {changed}. Give the same, or another --output_dir"
        )
    return scored


def is_table(path):
    """Whether the file is a readable table; a damaged file is not."""
    try:
        pq.read_metadata(path)
    except (OSError, pa.ArrowException):
        return False
    return True


def is_array(path):
    try:
        np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return True


def is_safetensors(path):
    try:
        with safe_open(path, "np"):
            return True
    except (OSError, SafetensorError):
        return False


def score_pieces(folder, generated, score_piece, *, accelerator):
    """Write scores.parquet and features.npy. `score_piece(table, readers)` gives columns and features; the columns are
    those of `SCORED`, and of `ANSWERED` where images are asked about.

    Each of n processes scores every n-th piece that is missing. All processes must see `folder`.
    """
    size = generated_images.PIECE
    pieces = folder / PIECES
    pieces.mkdir(parents=True, exist_ok=True)
    starts = list(range(0, len(generated), size))
    names = {start: pieces / f"{start:08d}" for start in starts}
    missing = {start for start, name in names.items() if not (is_table(f"{name}.parquet") and is_array(f"{name}.npy"))}
    # All processes list the missing pieces before any of them writes.
    accelerator.wait_for_everyone()
    own_starts = missing & set(starts[accelerator.process_index :: accelerator.num_processes])
    bar = tqdm(
        total=len(generated),
        initial=sum(min(size, len(generated) - start) for start in starts if start not in own_starts),
        desc="scoring",
        unit="image",
        disable=None if accelerator.is_main_process else True,
    )
    for start, table, readers in generated.pieces(own_starts):
        if table is None:
            continue
        columns, features = score_piece(table, readers)
        for field in (*SCORED, *ANSWERED):
            if field.name in columns:
                table = table.append_column(field.name, pa.array(columns[field.name], field.type))
        with write_together(pieces) as part:
            # Given a path, np.save would append an ending to the temporary name.
            with open(part(f"{start:08d}.npy"), "wb") as file:
                np.save(file, features)
            pq.write_table(table, part(f"{start:08d}.parquet"))
        bar.update(len(table))
    bar.close()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        gather_pieces(folder, list(names.values()), len(generated))
        shutil.rmtree(pieces)
    accelerator.wait_for_everyone()


def gather_pieces(folder, names, size):
    """Join the pieces to scores.parquet and features.npy, one in memory at a time; scores.parquet comes last."""
    with write_together(folder) as part:
        width = np.load(f"{names[0]}.npy", mmap_mode="r").shape[1]
        start = 0
        with open(part(FEATURES), "wb") as file:
            header = {"descr": "<f2", "fortran_order": False, "shape": (size, width)}
            np.lib.format.write_array_header_1_0(file, header)
            for name in names:
                rows = np.load(f"{name}.npy")
                file.write(rows.astype("<f2").tobytes())
                start += len(rows)
        assert start == size
        write_scores(part(SCORES), (pq.read_table(f"{name}.parquet") for name in names))


class View(NamedTuple):
    """The input of a model: (height, width), resampling, mean and standard deviation of the channels."""

    size: tuple
    resample: str
    mean: tuple
    std: tuple

    def transform(self):
        return test_transform(self.size, self.mean, self.std, self.resample)

    def scaled(self, images):
        """(B, 3, height, width) between 0 and 1, normalized in place."""
        mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (self.mean, self.std))
        return images.sub_(mean).div_(std)

    def normalised(self, pixels):
        """Bytes (B, height, width, 3) -> normalized (B, 3, height, width), equal to `transform`."""
        return self.scaled(pixels.permute(0, 3, 1, 2).contiguous().float().div_(255.0))


def view_of(model):
    return View(tuple(model.image_size), model.resample, model.image_mean, model.image_std)


class Preparation:
    """Decodes an image once for all models: row -> (row, {(size, resample): bytes}, hash) or (row, None, reason)."""

    def __init__(self, readers, views):
        self.readers = readers
        self.shapes = {(view.size, view.resample) for view in views.values()}

    def __call__(self, row):
        try:
            # Decoders raise all kinds of errors.
            image = as_rgb(open_image(self.readers[row]()))
        except Exception as error:
            return row, None, reason_of(error)
        pixels = {shape: np.asarray(resized(image, *shape)) for shape in self.shapes}
        return row, pixels, choosing.perceptual_hash(image)


def open_image(encoded):
    """Decode an image and turn it upright by its EXIF data, as the readers of data sets do."""
    image = Image.open(pa.BufferReader(encoded))
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    return image


def batch_of(rows, views, size, device):
    """{name: images} of prepared rows. The last row pads the batch to `size`, so that all batches round alike."""
    rows = rows + rows[-1:] * (size - len(rows))
    pixels = {shape: torch.from_numpy(np.stack([row[shape] for row in rows])).to(device) for shape in rows[0]}
    # Models with the same view share one batch.
    images = {view: view.normalised(pixels[view.size, view.resample]) for view in set(views.values())}
    return {name: images[view] for name, view in views.items()}


def batches_ahead(prepare, rows, *, batch_size, num_threads):
    """Yield batches of prepared images; threads prepare the next batch while the models score this one."""
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    with ThreadPoolExecutor(max(1, num_threads)) as pool:
        waiting = [pool.submit(prepare, row) for row in batches[0]] if batches else []
        for number in range(len(batches)):
            following = batches[number + 1] if number + 1 < len(batches) else []
            current, waiting = waiting, [pool.submit(prepare, row) for row in following]
            yield [future.result() for future in current]

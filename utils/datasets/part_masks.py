"""Which patches of each image belong to the head, the upper body and the legs of its person.

    python -m utils.datasets.part_masks market1501 --root DATA --detector google/owlv2-base-patch16 --out FILE
    python -m utils.datasets.part_masks synthetic:domain=a --out FILE

The first asks an open-vocabulary detector of transformers, the second has the true boxes of drawn people. One bit for
each part and patch: 48 bytes an image on 16 x 8 patches, and 8 bytes of its name's digest. A killed run goes on where
it was.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from utils.datasets.images import DRAWN, storage_of
from utils.files import one_line, write_together
from utils.launch import start_accelerator
from utils.ranges import at_least, fraction
from utils.synthetic.parts import PARTS, boxes_of
from utils.worklist import share

RULES = ("centre", "half", "touched")
ROWS = "rows"
# Of 16 rows of patches: the first of the upper body, the first of the legs.
FIXED = (3, 9, 16)
FORMAT = "diffreid part masks 1"
KEY_BYTES, CHUNK = 8, 256


# From boxes to patches


def patches_in(box, grid, rule="centre"):
    """The patches (rows * columns) bool inside a box (left, top, right, bottom) in shares of the image.

    centre: a patch's centre is in the box; half: at least half of its area is; touched: any of it is.
    """
    left, top, right, bottom = box
    shares = []
    for low, high, count in ((top, bottom, grid[0]), (left, right, grid[1])):
        edges = np.arange(count + 1) / count
        if rule == "centre":
            middles = (edges[:-1] + edges[1:]) / 2
            shares.append(((middles >= low) & (middles < high)).astype(float))
        else:
            shares.append((np.minimum(edges[1:], high) - np.maximum(edges[:-1], low)).clip(0) * count)
    covered = np.outer(*shares).reshape(-1)
    # Shares of an image are rounded.
    return covered > 1e-9 if rule == "touched" else covered >= 0.5 - 1e-9


def masks_of(boxes, grid, rule="centre"):
    """Masks (parts, patches) of {part: box or None}; a part without a box has no patch."""
    empty = np.zeros(grid[0] * grid[1], dtype=bool)
    return np.stack([empty if boxes[part] is None else patches_in(boxes[part], grid, rule) for part in PARTS])


def fixed_rows(grid):
    """The same masks for all images, the control: of 16 rows 0-2 head, 3-8 upper body, 9-15 legs."""
    edges = [0, *(edge / FIXED[-1] for edge in FIXED)]
    parts = zip(PARTS, edges[:-1], edges[1:], strict=True)
    return masks_of({part: (0.0, top, 1.0, bottom) for part, top, bottom in parts}, grid)


def image_keys(dataset):
    """A digest of each image's domain and path (N, 8) uint8: the same wherever the data set lies."""
    names = zip(dataset["domain"][:], dataset["path"][:], strict=True)
    digests = [hashlib.sha256(json.dumps(name).encode()).digest()[:KEY_BYTES] for name in names]
    return np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, KEY_BYTES)


def is_drawn(dataset):
    # Whole sets have images of megabytes inside: only their names are made into objects.
    names = pc.struct_field(storage_of(dataset, "image"), "path")
    return all(str(name).startswith(DRAWN) for name in names.to_pylist())


# The file


class PartMasks:
    """The masks of one or several files, or fixed rows for every image."""

    def __init__(self, grid, masks=None, name=ROWS):
        """`masks`: {key: packed bits}, or None for fixed rows."""
        self.grid, self.masks, self.name = tuple(grid), masks, name

    @classmethod
    def read(cls, paths):
        masks, grids = {}, {}
        for path in paths:
            try:
                grid, keys, packed = read_tensors(path)
            except (OSError, SafetensorError, ValueError) as error:
                raise ValueError(
                    f"--part_masks {path} cannot be read: {one_line(error)}; make it with python -m "
                    "utils.datasets.part_masks"
                ) from None
            grids[grid] = path
            masks |= {key.tobytes(): row for key, row in zip(keys, packed, strict=True)}
        if len(grids) > 1:
            listed = ", ".join(f"{path} on {rows} x {columns}" for (rows, columns), path in grids.items())
            raise ValueError(f"--part_masks are of different patches: {listed}")
        return cls(next(iter(grids)), masks, " ".join(map(str, paths)))

    @classmethod
    def true(cls, dataset, grid, rule="centre"):
        """Of drawn people."""
        rows = [np.packbits(masks_of(boxes_of(path), grid, rule)) for path in dataset["path"][:]]
        keys = (key.tobytes() for key in image_keys(dataset))
        return cls(grid, dict(zip(keys, rows, strict=True)), "the true boxes of drawn people")

    def check_grid(self, grid):
        if self.masks is not None and self.grid != tuple(grid):
            have, need = (" x ".join(map(str, one)) for one in (self.grid, grid))
            raise ValueError(
                f"--part_masks {self.name} are of {have} patches, and the encoder has {need}: make them with --grid "
                f"{' '.join(map(str, grid))}, or set --resolution"
            )

    def of(self, dataset):
        """(masks (N, parts, patches) bool, number of images without any); these have all patches in every part."""
        size = len(PARTS) * self.grid[0] * self.grid[1]
        if self.masks is None:
            return torch.from_numpy(fixed_rows(self.grid)).expand(len(dataset), -1, -1), 0
        whole = np.packbits(np.ones(size, dtype=bool))
        rows = [self.masks.get(key.tobytes()) for key in image_keys(dataset)]
        missing = sum(row is None for row in rows)
        if missing == len(rows):
            raise ValueError(
                f"--part_masks {self.name} have none of the {len(rows)} images, such as {dataset[0]['path']} of "
                f"{dataset[0]['domain']}: they are of another set"
            )
        bits = np.unpackbits(np.stack([whole if row is None else row for row in rows]), axis=1, count=size)
        return torch.from_numpy(bits.astype(bool).reshape(len(rows), len(PARTS), -1)), missing


def read_tensors(path):
    """(grid, keys (N, 8) uint8, packed masks (N, bytes) uint8) of a file; ValueError for other content."""
    with safe_open(path, "np") as file:
        about = file.metadata() or {}
        if about.get("format") != FORMAT:
            raise ValueError("it has another format")
        parts, grid = (json.loads(about.get(name, "null")) for name in ("parts", "grid"))
        if parts != list(PARTS):
            raise ValueError(f"its parts are {parts}, not {', '.join(PARTS)}")
        if not (isinstance(grid, list) and len(grid) == 2 and all(type(size) is int and size > 0 for size in grid)):
            raise ValueError(f"its grid is {grid}, not two numbers of patches")
        tensors = [file.get_tensor(name) for name in ("keys", "masks")]
    sizes = KEY_BYTES, (len(PARTS) * grid[0] * grid[1] + 7) // 8
    rows = tensors[0].shape[:1]
    for name, tensor, size in zip(("keys", "masks"), tensors, sizes, strict=True):
        if tensor.dtype != np.uint8 or tensor.shape != (*rows, size):
            raise ValueError(
                f"its {name} are {tensor.dtype} of shape {tensor.shape}, expected uint8 in {size} columns"
            )
    return tuple(grid), *tensors


def write(path, packed, keys, *, grid, rule, made_by):
    path = Path(path)
    about = {"format": FORMAT, "parts": json.dumps(list(PARTS)), "grid": json.dumps(list(grid))}
    with write_together(path.parent) as part:
        tensors = {"masks": torch.from_numpy(packed), "keys": torch.from_numpy(keys.copy())}
        save_file(tensors, part(path.name), metadata=about | {"rule": rule, "made_by": made_by})


# Making it


def make(dataset, out, *, grid, rule="centre", detector=None, made_by, batch_size=16, accelerator=None):
    """Write the masks of a data set to `out`; returns the number of images in which each part has no box.

    `detector(images)`: a list of {part: box or None}; None takes the true boxes of drawn people. Where a detector sees
    no part, its mask is the whole image. Finished chunks lie in `OUT.parts` until the file is whole; the processes of
    an accelerator share them, and only the main one writes the file and returns numbers.
    """
    out, keys = Path(out), image_keys(dataset)
    settings = json.dumps([list(grid), rule, made_by]).encode()
    digest = hashlib.sha256(settings + keys.tobytes()).hexdigest()[:16]
    folder = out.with_name(f"{out.name}.parts") / digest
    starts = range(0, len(dataset), CHUNK)
    chunks = {f"{start:08d}.safetensors": range(start, min(start + CHUNK, len(dataset))) for start in starts}
    places = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    mine = share(chunks, num_processes=places[0], process=places[1])
    with tqdm(
        total=sum(len(chunks[name]) for name in mine), desc="part masks", unit="image", disable=places[1]
    ) as bar:
        for name in mine:
            if read_chunk(folder / name, len(chunks[name])) is None:
                chunk = compute(dataset, chunks[name], grid, rule, detector, batch_size)
                with write_together(folder) as part:
                    save_file({key: torch.from_numpy(array) for key, array in chunk.items()}, part(name))
            bar.update(len(chunks[name]))
    if accelerator:
        accelerator.wait_for_everyone()
        if not accelerator.is_main_process:
            return None
    chunks = [read_chunk(folder / name, len(rows)) for name, rows in chunks.items()]
    write(out, np.concatenate([chunk["masks"] for chunk in chunks]), keys, grid=grid, rule=rule, made_by=made_by)
    shutil.rmtree(folder.parent, ignore_errors=True)
    return dict(zip(PARTS, sum(chunk["unseen"] for chunk in chunks).tolist(), strict=True))


def compute(dataset, rows, grid, rule, detector, batch_size):
    if detector is None:
        boxes = [boxes_of(path) for path in dataset.select(rows)["path"][:]]
    else:
        batches = (rows[first : first + batch_size] for first in range(0, len(rows), batch_size))
        boxes = [found for batch in batches for found in detector([dataset[row]["image"] for row in batch])]
    unseen = np.array([[image[part] is None for part in PARTS] for image in boxes])
    masks = np.stack([masks_of(image, grid, rule) for image in boxes])
    if detector is not None:
        masks |= unseen[:, :, None]
    return {"masks": np.packbits(masks.reshape(len(masks), -1), axis=1), "unseen": unseen.sum(0)}


def read_chunk(path, count):
    try:
        with safe_open(path, "np") as file:
            chunk = {name: file.get_tensor(name) for name in ("masks", "unseen")}
    except (OSError, SafetensorError):
        return None
    return chunk if len(chunk["masks"]) == count else None


def main(input_args=None):
    parser = argparse.ArgumentParser(
        prog="python -m utils.datasets.part_masks",
        description="Which patches of each image belong to which part of a person.",
    )
    parser.add_argument("source", nargs="+", metavar="SPEC", help="data sets, as in --source of the training scripts")
    parser.add_argument("--out", required=True, help="file to write")
    parser.add_argument("--root", "--data_root", help="folder of the set, or the one it lies in")
    words = (
        "an open-vocabulary detector of transformers, such as google/owlv2-base-patch16; `rows`: the same rows for "
    )
    words += "all images; default: the true boxes, which drawn people have"
    parser.add_argument("--detector", help=words)
    parser.add_argument("--threshold", type=fraction, default=0.05, help="least score of a box; default 0.05")
    words = "a patch belongs to a box if its centre is inside, half of its area, or any of it"
    parser.add_argument("--rule", choices=RULES, default=RULES[0], help=f"{words}; default centre")
    words = "patches of the encoder; default 16 8, those of 256 x 128 pixels with patches of 16"
    parser.add_argument("--grid", type=at_least(1), nargs=2, default=[16, 8], metavar=("ROWS", "COLUMNS"), help=words)
    parser.add_argument("--splits", nargs="+", default=["train"], help="splits to make masks of; default train")
    parser.add_argument("--batch_size", type=at_least(1), default=16, help="images of a detector's pass; default 16")
    parser.add_argument("--skip_unreadable", action="store_true", help="leave out images that do not decode")
    args = parser.parse_args(input_args)
    try:
        run(args)
    # A full disk is an error of safetensors.
    except (ValueError, OSError, SafetensorError) as error:
        sys.exit(f"error: {one_line(error)}")


def run(args):
    import datasets

    from utils.datasets.load import load_sources

    data = load_sources(args.source, args.root, skip_unreadable=args.skip_unreadable)
    if absent := [split for split in args.splits if split not in data]:
        raise ValueError(f"{' + '.join(args.source)} has no split {', '.join(absent)}, only {', '.join(data)}")
    images = datasets.concatenate_datasets([data[split] for split in args.splits])
    detector = accelerator = None
    if args.detector is None and not is_drawn(images):
        raise ValueError(
            f"only drawn people have true boxes, and {' + '.join(args.source)} are others: give --detector NAME, such "
            "as google/owlv2-base-patch16 or IDEA-Research/grounding-dino-tiny, or --detector rows"
        )
    if args.detector == ROWS:
        packed = np.packbits(fixed_rows(args.grid).reshape(1, -1), axis=1).repeat(len(images), 0)
        # Of several processes one is enough.
        unseen = {} if os.environ.get("RANK", "0") == "0" else None
        if unseen is not None:
            write(args.out, packed, image_keys(images), grid=args.grid, rule=args.rule, made_by=ROWS)
    else:
        if args.detector is not None or "WORLD_SIZE" in os.environ:
            accelerator = start_accelerator(patient=True)
        if args.detector is not None:
            from utils.datasets.part_detector import PartDetector

            detector = PartDetector(args.detector, threshold=args.threshold, device=accelerator.device)
        made_by = f"{args.detector} above {args.threshold}" if args.detector else "true boxes"
        options = {"rule": args.rule, "detector": detector, "made_by": made_by, "batch_size": args.batch_size}
        unseen = make(images, args.out, grid=args.grid, accelerator=accelerator, **options)
    if unseen is not None:
        print(f"wrote {args.out}: {len(images)} images, {images_words(unseen, len(images), detector)}")
        print(sizes_words(PartMasks.read([args.out])))


def images_words(unseen, count, detector):
    if not any(unseen.values()):
        return "every part has a box"
    named = ", ".join(f"{part} {number} ({100 * number / count:.1f} %)" for part, number in unseen.items())
    return f"without a box: {named}; " + ("there the part is the whole image" if detector else "outside of the image")


def sizes_words(masks):
    """How large the parts are, with a warning where one is nearly the whole image."""
    packed = np.stack(list(masks.masks.values()))
    bits = np.unpackbits(packed, axis=1, count=len(PARTS) * masks.grid[0] * masks.grid[1])
    shares = dict(zip(PARTS, bits.reshape(len(bits), len(PARTS), -1).mean((0, 2)), strict=True))
    words = "mean share of the patches: " + ", ".join(f"{part} {100 * size:.0f} %" for part, size in shares.items())
    if large := [part for part, size in shares.items() if size > 0.9]:
        words += f". {' and '.join(large)}: nearly the whole image; look at some, and try another --detector"
    return words


if __name__ == "__main__":
    main()

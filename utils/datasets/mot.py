"""Tracks of a MOT file as images: boxes that are cut from the frames when they are read.

A sequence is a folder of one camera: `SEQ/img1/000001.jpg` and so on, and beside them `SEQ/NAME.txt`, or
`SEQ/gt/gt.txt`, or `SEQ/det/det.txt`, the first of these that is there. A line is
`frame,id,left,top,width,height,conf,...` in pixels. In gt.txt, lines with conf 0 are ignored, and of its nine columns
the eighth is a class: only 1, pedestrians, is read. An id of -1 is a detection without a track.
"""

import functools
import math
import os
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from fsspec.spec import AbstractFileSystem
from PIL import Image

from utils.datasets.images import as_rgb
from utils.datasets.schema import ENDINGS, listing

FRAMES, NO_TRACK = "img1", -1
PROTOCOL = "crop://"


class Box(NamedTuple):
    """A person in a frame, by whole pixels inside it; `line` is that of the file."""

    frame: int
    track: int
    image: str
    left: int
    top: int
    right: int
    bottom: int
    line: int

    @property
    def crop(self):
        """The address of its pixels for an image column."""
        return f"{PROTOCOL}{self.image}#{self.left},{self.top},{self.right},{self.bottom}"


def frame_of(address):
    """The file of a crop's frame; of other images the address itself."""
    return address.removeprefix(PROTOCOL).rpartition("#")[0] if address.startswith(PROTOCOL) else address


class CropFileSystem(AbstractFileSystem):
    """Boxes of images as files: crop:///folder/000001.jpg#LEFT,TOP,RIGHT,BOTTOM."""

    protocol = "crop"

    def _open(self, path, mode="rb", **_):
        name, _, box = path.removeprefix(PROTOCOL).rpartition("#")
        # Some fsspec calls remove the first slash.
        name = name if os.path.exists(name) else f"/{name.lstrip('/')}"
        buffer = BytesIO()
        # Other formats lose pixels or spend time on compression.
        opened_frame(name).crop(tuple(map(int, box.split(",")))).save(buffer, format="BMP")
        return BytesIO(buffer.getvalue())


@functools.lru_cache(maxsize=2)
def opened_frame(path):
    """A frame's pixels. Boxes are read in the order of frames, so that each frame is decoded once."""
    with Image.open(path) as image:
        # A copy does not depend on the file, which is closed here.
        return as_rgb(image).copy()


def track_file(folder):
    """The MOT file of a sequence's folder, or None if the folder is no sequence; ValueError for half a sequence."""
    folder = Path(folder)
    own = sorted(path for path in folder.glob("*.txt") if not path.name.startswith("."))
    truth, detections = folder / "gt" / "gt.txt", folder / "det" / "det.txt"
    if not (folder / FRAMES).is_dir():
        for path in (truth, detections):
            if path.is_file():
                raise ValueError(f"{path} has no frames: expected {folder / FRAMES}/000001.jpg and so on")
        return None
    if len(own) > 1:
        raise ValueError(f"{folder} holds {len(own)} result files ({own[0].name}, {own[1].name}, ...); leave one")
    for path in (*own, truth, detections):
        if path.is_file():
            return path
    raise ValueError(f"{folder / FRAMES} holds frames without a MOT file; expected {truth} or {folder}/NAME.txt")


def read_boxes(path, sequence, *, skip=None):
    """`Box`es of a MOT file, in order of frames; ValueError for frames that are missing and boxes outside of theirs.

    `skip(name, reason)` is called for each box outside its frame instead, where given.
    """
    frames = numbered_frames(Path(sequence) / FRAMES)
    rows = read_lines(path)
    missing = sorted({frame for _, frame, *_ in rows} - set(frames))
    if missing:
        raise ValueError(
            f"{path} has boxes in {len(missing)} frames that are not in {Path(sequence) / FRAMES}, the first is "
            f"frame {missing[0]}; add them, or remove their lines"
        )
    sizes, boxes = {}, []
    for line, frame, track, left, top, width, height in rows:
        if frame not in sizes:
            sizes[frame] = size_of(frames[frame])
        # A frame that cannot be read is found when the images are checked.
        limits = sizes[frame] or (math.inf, math.inf)
        left_top = max(0, round(left)), max(0, round(top))
        right_bottom = min(limits[0], round(left + width)), min(limits[1], round(top + height))
        if left_top[0] >= right_bottom[0] or left_top[1] >= right_bottom[1]:
            name = f"{path}, line {line}"
            reason = (
                f"the box {left:g},{top:g},{width:g},{height:g} has no pixel inside frame {frame}, which is "
                f"{limits[0]} x {limits[1]} pixels"
            )
            if skip is None:
                raise ValueError(f"{name}: {reason}; correct it, or leave out such boxes with --skip_unreadable")
            skip(name, reason)
            continue
        boxes.append(Box(frame, track, frames[frame], *left_top, *right_bottom, line))
    return sorted(boxes)


def numbered_frames(folder):
    """{number: path} of the frames of a sequence."""
    files = [entry for entry in listing(folder) if entry.name.lower().endswith(ENDINGS)]
    odd = next((entry.name for entry in files if not Path(entry.name).stem.isdecimal()), None)
    if odd is not None:
        raise ValueError(f"{folder}: {odd!r} is not named by its frame's number, like 000001.jpg")
    return {int(Path(entry.name).stem): entry.path for entry in files}


def size_of(path):
    """(width, height) from the header of an image, or None if it cannot be read."""
    try:
        with Image.open(path) as image:
            return image.size
    # Decoders raise errors of many classes.
    except Exception:
        return None


def read_lines(path):
    """(line, frame, track, left, top, width, height) of every line that counts."""
    is_truth = Path(path).name == "gt.txt"
    rows, known = [], {}
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text file; expected lines of frame,id,left,top,width,height,conf") from None
    for line, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            values = [float(word) for word in text.replace(",", " ").split()]
            frame, track, *box = values[:6]
            sums = box[0] + box[2], box[1] + box[3]
            fits = all(map(math.isfinite, (frame, track, *box, *sums))) and frame % 1 == track % 1 == 0
        except (ValueError, IndexError):
            fits = False
        if not fits:
            raise ValueError(f"{path}, line {line}: expected frame,id,left,top,width,height,conf, got {text[:60]!r}")
        if is_truth and (values[6:7] == [0] or (len(values) == 9 and values[7] != 1)):
            continue
        frame, track = int(frame), int(track)
        if track != NO_TRACK and (frame, track) in known:
            raise ValueError(
                f"{path}, line {line}: track {track} has a second box in frame {frame}, after line "
                f"{known[frame, track]}; a track is one person at one place"
            )
        known[frame, track] = line
        rows.append((line, frame, track, *box))
    if not rows:
        raise ValueError(f"{path} has no boxes; expected lines of frame,id,left,top,width,height,conf")
    return rows

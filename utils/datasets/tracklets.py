"""Items to group: images, folders that hold a tracklet each, and tracks of MOT files, with what their names tell.

    tracklets = read_tracklets("cameras")
    tracklets.items[0]        # Item(path="cam2/track7", rows=[0, 1, 2], camera="2", moments=[...], identity=None)
    tracklets.images          # the data set that the rows belong to; boxes of a MOT file are cut when they are read

Images directly in the folder are items of their own. Every other folder that holds images is one item.

- Camera: the number after `c` or `cam`, in the item's name, else in all of its images' names, else in a folder above;
  of a MOT file the name of the sequence.
- Time: a frame number, in Market's form `0001_c2s1_000123_00.jpg` (camera 2, sequence 1, frame 123) or as `_f123` in
  names with a camera; of a MOT file the frame. A folder of such images is seen from its first to its last frame.
- Identity, only to measure with: `0001_c2...` in the item's name or in all of its images' names, else the folder in
  which a tracklet's folder lies, unless it names a camera. A MOT file has none: its ids hold in one camera.

What names do not tell stays unknown.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import datasets

from utils.datasets.images import check_images
from utils.datasets.mot import NO_TRACK, frame_of, read_boxes, track_file
from utils.datasets.own.folders import camera_of_folder
from utils.datasets.schema import CAMERA, UNKNOWN, Row, dense, rows_to_dataset
from utils.datasets.search_folders import LABELLED, levels_of

MARKET_TIME = re.compile(r"_c(\d+)s(\d+)_(\d+)")
FRAME = re.compile(r"(?:^|[_.-])f(?:rame)?_?(\d+)", re.IGNORECASE)
CAMERA_FOLDER = re.compile(r"(?:^|[_.-])c(?:am|amera)?[_-]?(\d+)(?![a-z])", re.IGNORECASE)
# A part of it may look like a camera.
UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)


@dataclass
class Item:
    """An image or a tracklet: the `rows` of its images, and what is known of it.

    `moments` lists (clock, first frame, last frame). Frames of one clock can be compared; a camera may have several.
    """

    path: str
    rows: list
    camera: str | None = None
    moments: list = field(default_factory=list)
    identity: str | None = None


@dataclass
class Tracklets:
    """All items in order of their paths, their images, and (path, reason) of what was left out."""

    items: list
    images: datasets.Dataset
    files: datasets.Dataset
    skipped: list

    @property
    def pids(self):
        """Numbers of the true identities, -1 where unknown; names that are numbers keep theirs."""
        if self.pid_names is None:
            return [UNKNOWN if item.identity is None else int(item.identity) for item in self.items]
        numbers = dense(self.pid_names)
        return [numbers.get(item.identity, UNKNOWN) for item in self.items]

    @property
    def pid_names(self):
        """The names of the identities in order of number, None where all are numbers."""
        names = {item.identity for item in self.items} - {None}
        return None if all(name.isdecimal() and len(name) <= 18 for name in names) else sorted(names)

    @property
    def camids(self):
        numbers = dense({item.camera for item in self.items} - {None})
        return [numbers.get(item.camera, UNKNOWN) for item in self.items]

    def described(self):
        """A line that says what was read, and what of it is known."""
        several = sum(len(item.rows) > 1 for item in self.items)
        known = [
            (sum(item.camera is not None for item in self.items), "camera"),
            (sum(bool(item.moments) for item in self.items), "time"),
            (sum(item.identity is not None for item in self.items), "true identity"),
        ]
        words = ", ".join(f"{name} of {'none' if not count else f'{count:,}'}" for count, name in known)
        total = len(self.images)
        return f"{len(self.items):,} items of {total:,} images, {several:,} of them tracklets; known: {words}"


def read_tracklets(folder, *, skip_unreadable=False):
    """`Tracklets` of a folder; ValueError for empty folders, missing frames, and images that cannot be read.

    With `skip_unreadable` these are left out and listed, missing frames excepted.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give one that holds images, tracklet folders or MOT sequences")
    # A list of (item, addresses of its images).
    read, skipped = [], []
    for level, inner, images in levels_of(folder):
        inner.sort()
        place = level.relative_to(folder)
        file = track_file(level)
        if file is not None:
            inner.clear()
            skip = (lambda name, reason: skipped.append((name, reason))) if skip_unreadable else None
            read += tracks_of(read_boxes(file, level, skip=skip), level.name if place == Path() else place.as_posix())
        elif level == folder:
            read += [(single(path.relative_to(folder)), [path.as_posix()]) for path in images]
        elif images:
            read.append((tracklet(place, sorted(images)), [path.as_posix() for path in sorted(images)]))
        elif not inner:
            if not skip_unreadable:
                raise ValueError(
                    f"{level} is a folder without images; remove it, or leave out such folders with --skip_unreadable"
                )
            skipped.append((level.as_posix(), "a folder without images"))
    if not read:
        raise ValueError(f"{folder} holds no images, tracklet folders or MOT sequences")
    return checked(folder, read, skipped, skip_unreadable)


def checked(folder, read, skipped, skip_unreadable):
    """`Tracklets` whose images can be read."""
    addresses = sorted({address for _, images in read for address in images}, key=lambda name: (frame_of(name), name))
    files = data_of(sorted({frame_of(address) for address in addresses}))
    files, unreadable = check_images(files, skip_unreadable=skip_unreadable, where=str(folder))
    lost = {path for _, path, _ in unreadable}
    skipped += [(path, reason) for _, path, reason in unreadable]
    addresses = [address for address in addresses if frame_of(address) not in lost]
    numbers = {address: row for row, address in enumerate(addresses)}
    items = []
    for item, images in read:
        item.rows = [numbers[address] for address in images if address in numbers]
        if item.rows:
            items.append(item)
        else:
            skipped.append((item.path, "no readable image is left"))
    return Tracklets(sorted(items, key=lambda item: item.path), data_of(addresses), files, skipped)


def data_of(addresses):
    return rows_to_dataset([Row(address, UNKNOWN, UNKNOWN) for address in addresses], "", "group", "gallery")


def tracks_of(boxes, sequence):
    """[(Item, addresses)] of a sequence's tracks; a box without a track is an item of its own."""
    tracks = {}
    for box in boxes:
        name = f"{sequence}#{box.track}" if box.track != NO_TRACK else f"{sequence}#line{box.line}"
        tracks.setdefault(name, []).append(box)
    return [
        (Item(name, [], sequence, [(sequence, *run) for run in runs([box.frame for box in parts])]), crops(parts))
        for name, parts in tracks.items()
    ]


def crops(boxes):
    return [box.crop for box in boxes]


def runs(frames):
    """[first, last] of each stretch of ascending frames without a gap: while a track is lost, it may be another."""
    stretches = []
    for frame in frames:
        if stretches and frame == stretches[-1][1] + 1:
            stretches[-1][1] = frame
        else:
            stretches.append([frame, frame])
    return stretches


def single(path):
    camera = camera_in(path.name)
    time = time_in(path.name)
    return Item(path.as_posix(), [], camera, [] if time is None else [(*time, time[-1])], identity_in(path.name))


def tracklet(place, images):
    """The item of a tracklet's folder, relative to the folder of all."""
    names = [path.name for path in images]
    above = place.parts[:-1][::-1]
    cameras = [camera_in(place.name, CAMERA_FOLDER), shared(map(camera_in, names))]
    cameras += map(camera_above, above)
    camera = next((number for number in cameras if number is not None), None)
    identity = identity_in(place.name) or shared(map(identity_in, names))
    if identity is None and above and camera_above(above[0]) is None:
        identity = plain(above[0])
    return Item(place.as_posix(), [], camera, span(map(time_in, names)), identity)


def camera_above(name):
    """The camera that a folder above a tracklet names, as text, or None."""
    number = camera_of_folder(name)
    return camera_in(name, CAMERA_FOLDER) or (None if number is None else str(number))


def camera_in(name, form=CAMERA):
    match = LABELLED.match(name)
    if match:
        return str(int(match[2]))
    match = form.search(UUID.sub("", name))
    return str(int(match[1])) if match else None


def identity_in(name):
    """The identity of a name like 0001_c2_x.jpg, without leading zeros; -1 is nobody."""
    match = LABELLED.match(name)
    return plain(match[1]) if match else None


def plain(name):
    if name == str(UNKNOWN):
        return None
    return str(int(name)) if name.isdecimal() else name


def time_in(name):
    """(clock, frame) of an image's name, or None."""
    market = MARKET_TIME.search(name)
    if market:
        return f"{int(market[1])}s{int(market[2])}", int(market[3])
    camera, frame = camera_in(name), FRAME.search(name)
    return (camera, int(frame[1])) if camera is not None and frame else None


def shared(values):
    """What all values have in common, or None."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else None


def span(times):
    """[(clock, first, last)] if every image has a time on one clock, else []."""
    times = list(times)
    if None in times or len({clock for clock, _ in times}) != 1:
        return []
    frames = [frame for _, frame in times]
    return [(times[0][0], min(frames), max(frames))]

"""Frames and rough tracks of a clip, with OpenCV, in an environment that has nothing else of this repository.

    venv/bin/python benchmarks/evaluation/real_clip.py vtest.avi FOLDER

It writes FOLDER/img1/000001.jpg and so on, and FOLDER/rough.txt with a line `frame,track,left,top,width,height` for
each box. A box is a blob of moving pixels that is as large as a person and taller than wide; the background is
learned from every third frame first. A track goes on with the box of the next frame that overlaps it most, one missed
frame is allowed. Two people who cross can be taken for one, and whoever is hidden for longer begins another track.
"""

import sys
from pathlib import Path

# Of boxes, in pixels: area, height, width, and how many times as high as wide.
LEAST_AREA, HEIGHTS, WIDTHS, LEAST_ASPECT = 450, (45, 170), (14, 75), 1.3
LEAST_OVERLAP, MISSED = 0.45, 1
FEWEST_BOXES = 10


def overlap(box, other):
    """Intersection over union of (left, top, width, height)."""
    width = min(box[0] + box[2], other[0] + other[2]) - max(box[0], other[0])
    height = min(box[1] + box[3], other[1] + other[3]) - max(box[1], other[1])
    shared = max(0, width) * max(0, height)
    return shared / (box[2] * box[3] + other[2] * other[3] - shared)


def linked(boxes_of_frames):
    """Tracks, lists of (frame, box), from the boxes of each frame; frames count from 1."""
    tracks, running = [], []
    for frame, boxes in enumerate(boxes_of_frames, start=1):
        running = [track for track in running if frame - track[-1][0] <= MISSED + 1]
        pairs = [
            (overlap(track[-1][1], box), place, number)
            for place, track in enumerate(running)
            for number, box in enumerate(boxes)
        ]
        used_tracks, used_boxes = set(), set()
        for shared, place, number in sorted(pairs, reverse=True):
            if shared >= LEAST_OVERLAP and place not in used_tracks and number not in used_boxes:
                used_tracks.add(place)
                used_boxes.add(number)
                running[place].append((frame, boxes[number]))
        started = [[(frame, box)] for number, box in enumerate(boxes) if number not in used_boxes]
        running += started
        tracks += started
    return [track for track in tracks if len(track) >= FEWEST_BOXES]


def moving_boxes(frames):
    """The boxes of each frame."""
    import cv2
    import numpy as np

    background = cv2.createBackgroundSubtractorMOG2(history=400, varThreshold=25, detectShadows=True)
    for frame in frames[::3]:
        background.apply(frame)
    for frame in frames:
        # 255 is foreground, 127 shadow.
        mask = (background.apply(frame, learningRate=0.002) == 255).astype(np.uint8)
        mask = cv2.morphologyEx(mask, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
        mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, np.ones((9, 5), np.uint8))
        _, _, blobs, _ = cv2.connectedComponentsWithStats(mask)
        # The first one is the background.
        yield [tuple(map(int, blob[:4])) for blob in blobs[1:] if is_person(*blob[2:5])]


def is_person(width, height, area):
    return (
        area > LEAST_AREA
        and HEIGHTS[0] < height < HEIGHTS[1]
        and WIDTHS[0] < width < WIDTHS[1]
        and height > LEAST_ASPECT * width
    )


def main(clip, folder):
    import cv2

    frames, video = [], cv2.VideoCapture(clip)
    while True:
        is_frame, frame = video.read()
        if not is_frame:
            break
        frames.append(frame)
    if not frames:
        sys.exit(f"{clip} has no frames that OpenCV can read")
    (folder / "img1").mkdir(parents=True, exist_ok=True)
    for number, frame in enumerate(frames, start=1):
        cv2.imwrite(str(folder / "img1" / f"{number:06d}.jpg"), frame, [cv2.IMWRITE_JPEG_QUALITY, 95])
    lines = [
        (frame, number, *box)
        for number, track in enumerate(linked(moving_boxes(frames)), start=1)
        for frame, box in track
    ]
    (folder / "rough.txt").write_text("".join(f"{','.join(map(str, line))}\n" for line in sorted(lines)))
    print(f"{len(frames)} frames, {len({line[1] for line in lines})} rough tracks")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

"""Images, tracklet folders and MOT files as items: what names tell, boxes against pixels, bad input."""

import numpy as np
import pytest
from PIL import Image

from utils.datasets.tracklets import read_tracklets


def put(path, seed=0, size=(8, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def sequence(folder, text, frames=(1, 2, 3), file="gt/gt.txt"):
    """A MOT sequence of 40 x 30 frames; {frame: pixels}."""
    pixels = {frame: put(folder / "img1" / f"{frame:06d}.png", frame, (40, 30)) for frame in frames}
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(text)
    return pixels


def known(item):
    return item.camera, item.moments, item.identity


@pytest.mark.parametrize(
    "names, camera, moments, identity",
    [
        (["0001_c2s1_000123_00.jpg"], "2", [("2s1", 123, 123)], "1"),
        (["0017_c5_f0046182.jpg"], "5", [("5", 46182, 46182)], "17"),
        (["-1_c3s2_000007_00.jpg"], "3", [("3s2", 7, 7)], None),
        (["holiday.jpg"], None, [], None),
        (["frame_12.jpg"], None, [], None),
        (["1f6c1c2e-c123-4a5b-8c11-0a1b2c3d4e5f.jpg"], None, [], None),
        (["track7_c2/f1.jpg", "track7_c2/f2.jpg"], "2", [], None),
        (["track7/x_c2_f11.jpg", "track7/x_c2_f4.jpg"], "2", [("2", 4, 11)], None),
        (["track7/x_c2_f11.jpg", "track7/x_c3_f4.jpg"], None, [], None),
        (["track7/x_c2_f11.jpg", "track7/x_c2.jpg"], "2", [], None),
        (["t/0004_c1s1_000002_00.jpg", "t/0004_c1s2_000009_00.jpg"], "1", [], "4"),
        (["t/0004_c1s1_000002_00.jpg", "t/0005_c1s1_000009_00.jpg"], "1", [("1s1", 2, 9)], None),
        (["0003_c4_a/1.jpg"], "4", [], "3"),
        (["cam2/track1/a.jpg"], "2", [], None),
        (["c2/day/track1/a.jpg"], "2", [], "day"),
        (["anna/t1/a.jpg"], None, [], "anna"),
        (["cam_a/person_0001/a.jpg"], "1", [], None),
        (["camera b/t1/a.jpg"], "2", [], None),
        (["cafe12/a.jpg"], None, [], None),
    ],
)
def test_what_names_tell_and_nothing_else(names, camera, moments, identity, tmp_path):
    for name in names:
        put(tmp_path / name)
    (item,) = read_tracklets(tmp_path).items
    assert known(item) == (camera, moments, identity) and len(item.rows) == len(names)


def test_every_folder_is_one_item_and_numbers_keep_their_order(tmp_path):
    for name in ("b.png", "a.png", "t2/2.png", "t2/1.png", "t2/deep/3.png", ".hidden/4.png"):
        put(tmp_path / name)
    tracklets = read_tracklets(tmp_path)
    assert [item.path for item in tracklets.items] == ["a.png", "b.png", "t2", "t2/deep"]
    files = tracklets.images["path"]
    assert [[files[row].rsplit("/", 1)[1] for row in item.rows] for item in tracklets.items] == [
        ["a.png"], ["b.png"], ["1.png", "2.png"], ["3.png"],
    ]  # fmt: skip
    assert "4 items of 5 images, 1 of them tracklets; known: camera of none" in tracklets.described()


def test_boxes_are_cut_from_the_pixels_of_their_frames(tmp_path):
    text = "1,7,3,4,10,12,1,-1,-1,-1\n2,7,-5,20.4,9.2,30,1,-1,-1,-1\n3,7,38,2,50,6,1,-1,-1,-1\n\n1,2,0,0,40,30,1\n"
    pixels = sequence(tmp_path / "hall", text)
    tracklets = read_tracklets(tmp_path)
    first, second = tracklets.items
    assert (first.path, second.path) == ("hall#2", "hall#7")
    assert known(second) == ("hall", [("hall", 1, 3)], None)
    want = [pixels[1][4:16, 3:13], pixels[2][20:30, 0:4], pixels[3][2:8, 38:40]]
    for row, piece in zip(second.rows, want, strict=True):
        assert np.array_equal(np.asarray(tracklets.images[row]["image"]), piece)
    assert np.array_equal(np.asarray(tracklets.images[first.rows[0]]["image"]), pixels[1])
    # Rows follow the frames: each frame is decoded once.
    assert [path.rpartition("#")[0][-5:-4] for path in tracklets.images["path"]] == ["1", "1", "2", "3"]


def test_the_folder_itself_may_be_a_sequence_and_gaps_are_no_presence(tmp_path):
    text = "".join(f"{frame},1,5,5,6,6,1,-1,-1,-1\n" for frame in (1, 2, 3, 7, 8))
    sequence(tmp_path / "gate", text + "5,4,0,0,9,9,1,-1,-1,-1\n", frames=range(1, 9), file="gate.txt")
    one, four = read_tracklets(tmp_path / "gate").items
    assert one.moments == [("gate", 1, 3), ("gate", 7, 8)] and four.moments == [("gate", 5, 5)]


def test_detections_without_a_track_are_items_of_their_own(tmp_path):
    text = "1,-1,1,1,9,9,0.8\n1,-1,12,1,9,9,0.7\n2,-1,1,1,9,9,0.9\n"
    sequence(tmp_path / "s", text, file="det/det.txt")
    items = read_tracklets(tmp_path).items
    assert [item.path for item in items] == ["s#line1", "s#line2", "s#line3"]
    assert [item.moments for item in items] == [[("s", frame, frame)] for frame in (1, 1, 2)]


def test_truth_files_ignore_what_does_not_count(tmp_path):
    text = "1,1,1,1,9,9,1,1,0.9\n1,2,1,1,9,9,0,1,0.9\n1,3,1,1,9,9,1,8,0.9\n"
    sequence(tmp_path / "s", text)
    assert [item.path for item in read_tracklets(tmp_path).items] == ["s#1"]


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "1,1,1,1,9,9,1\n9,1,1,1,9,9,1\n",
            "gt.txt has boxes in 1 frames that are not in .*img1, the first is frame 9",
        ),
        ("1,1,50,1,9,9,1\n", r"line 1: the box 50,1,9,9 has no pixel inside frame 1, which is 40 x 30"),
        ("1,1,5,1,0,9,1\n", "line 1: the box 5,1,0,9 has no pixel"),
        ("1,1,1,1,9,9,1\n1,1,3,1,9,9,1\n", "line 2: track 1 has a second box in frame 1, after line 1"),
        ("1,1,1,1,9\n", "line 1: expected frame,id,left,top,width,height,conf, got '1,1,1,1,9'"),
        ("frame,id,x,y,w,h\n", "line 1: expected frame,id"),
        ("1,1,1,nan,9,9\n", "line 1: expected frame,id"),
        ("", "has no boxes"),
    ],
)
def test_bad_mot_files_are_refused_in_one_line(text, message, tmp_path):
    sequence(tmp_path / "s", text)
    with pytest.raises(ValueError, match=message) as stop:
        read_tracklets(tmp_path)
    assert "\n" not in str(stop.value)


def test_boxes_outside_can_be_left_out(tmp_path):
    sequence(tmp_path / "s", "1,1,50,1,9,9,1\n2,1,5,1,9,9,1\n")
    tracklets = read_tracklets(tmp_path, skip_unreadable=True)
    assert len(tracklets.images) == 1 and tracklets.items[0].moments == [("s", 2, 2)]
    ((name, reason),) = tracklets.skipped
    assert name.endswith("gt.txt, line 1") and "no pixel inside frame 1" in reason


def test_half_a_sequence_is_refused(tmp_path):
    (tmp_path / "s" / "gt").mkdir(parents=True)
    (tmp_path / "s" / "gt" / "gt.txt").write_text("1,1,1,1,9,9,1\n")
    with pytest.raises(ValueError, match="gt.txt has no frames: expected .*img1/000001.jpg"):
        read_tracklets(tmp_path)
    put(tmp_path / "t" / "img1" / "000001.png")
    (tmp_path / "s" / "gt" / "gt.txt").unlink()
    (tmp_path / "s" / "gt").rmdir()
    put(tmp_path / "s" / "x.png")
    with pytest.raises(ValueError, match="img1 holds frames without a MOT file"):
        read_tracklets(tmp_path)
    for name in ("a.txt", "b.txt"):
        (tmp_path / "t" / name).write_text("1,1,1,1,9,9,1\n")
    with pytest.raises(ValueError, match=r"holds 2 result files \(a.txt, b.txt, ...\)"):
        read_tracklets(tmp_path)


def test_an_unreadable_image_is_named_or_left_out(tmp_path):
    for name in ("t1/a.png", "t1/b.png", "t2/a.png", "c.png"):
        put(tmp_path / name)
    (tmp_path / "t1" / "b.png").write_bytes(b"no image")
    (tmp_path / "t2" / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match="2 of 4 images cannot be read: .*t1/b.png"):
        read_tracklets(tmp_path)
    tracklets = read_tracklets(tmp_path, skip_unreadable=True)
    assert [(item.path, len(item.rows)) for item in tracklets.items] == [("c.png", 1), ("t1", 1)]
    assert [name.removeprefix(f"{tmp_path}/") for name, _ in tracklets.skipped] == ["t1/b.png", "t2/a.png", "t2"]


def test_a_damaged_frame_takes_its_boxes_along(tmp_path):
    sequence(tmp_path / "s", "1,1,1,1,9,9,1\n2,1,1,1,9,9,1\n2,5,1,1,9,9,1\n")
    (tmp_path / "s" / "img1" / "000002.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="1 of 2 images cannot be read: .*000002.png"):
        read_tracklets(tmp_path)
    tracklets = read_tracklets(tmp_path, skip_unreadable=True)
    assert [(item.path, len(item.rows)) for item in tracklets.items] == [("s#1", 1)]


def test_empty_folders(tmp_path):
    with pytest.raises(ValueError, match="holds no images|without images"):
        read_tracklets(tmp_path)
    put(tmp_path / "a.png")
    (tmp_path / "t1").mkdir()
    with pytest.raises(ValueError, match="t1 is a folder without images; remove it"):
        read_tracklets(tmp_path)
    assert read_tracklets(tmp_path, skip_unreadable=True).skipped == [(f"{tmp_path}/t1", "a folder without images")]
    with pytest.raises(ValueError, match="none is not a folder"):
        read_tracklets(tmp_path / "none")

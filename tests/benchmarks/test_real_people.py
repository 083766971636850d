"""Real people: the parts of the benchmark on made data, and the whole of it where the clip has been fetched."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from benchmarks.common import ROOT
from benchmarks.evaluation import real_clip, real_people, real_sources

CACHE = os.environ.get("DIFFREID_REAL_PEOPLE")
HOW = (
    "python -m benchmarks.evaluation.real_people && "
    "DIFFREID_REAL_PEOPLE=~/.cache/diffreid/real_people pytest -m slow tests/benchmarks/test_real_people.py"
)


def walk(start, step, frames):
    return {frame: (start + step * frame, 50, 30, 80) for frame in frames}


def test_boxes_of_following_frames_become_tracks():
    """One walks through, is missed in one frame and then hidden for two; one stays for a moment."""
    first, second = walk(0, 4, [*range(1, 12), *range(13, 20), *range(22, 40)]), walk(400, 0, range(5, 12))
    boxes = [[person[frame] for person in (second, first) if frame in person] for frame in range(1, 40)]
    tracks = real_clip.linked(boxes)
    # Seven boxes are no track.
    assert [[frame for frame, _ in track] for track in tracks] == [
        [*range(1, 12), *range(13, 20)],
        list(range(22, 40)),
    ]
    assert all(box == first[frame] for track in tracks for frame, box in track)
    assert real_clip.overlap((0, 0, 10, 10), (5, 0, 10, 10)) == pytest.approx(1 / 3)


def test_pieces_of_a_track_have_gaps():
    boxes = [SimpleNamespace(frame=frame) for frame in range(100, 160)]
    pieces = [[box.frame for box in piece] for piece in real_people.pieces_of(boxes, 5)]
    assert pieces == [[100, 105, 110, 115], [120, 125, 130, 135], [140, 145, 150, 155]]
    every = [[box.frame for box in piece] for piece in real_people.pieces_of(boxes, 1)]
    assert [(piece[0], piece[-1]) for piece in every] == [(100, 115), (120, 135), (140, 155)]


def test_rates_are_those_of_loops_over_pairs():
    features = F.normalize(torch.randn(30, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    side = SimpleNamespace(features=features, pids=torch.arange(30) % 4, camids=torch.arange(30) // 4 % 3)
    others, own = [], []
    for row in range(30):
        for other in range(30):
            is_match = float((features[row] - features[other]).square().sum()) <= 1.5
            if side.pids[row] != side.pids[other]:
                others.append(is_match)
            elif side.camids[row] != side.camids[other]:
                own.append(is_match)
    found = real_people.rates_at(side, 1.5)
    assert found["false_match_rate"] == pytest.approx(sum(others) / len(others))
    assert found["right_match_rate"] == pytest.approx(sum(own) / len(own)) and 0 < sum(own) < len(own)


def test_visits_of_one_person_are_searched_for_in_each_other(tmp_path):
    """Of five tracks two show one person; tracks 3 and 4 are new."""
    for number in range(1, 81):
        path = tmp_path / "img1" / f"{number:06d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (60, 40), (number, 0, 0)).save(path)
    starts = {1: 1, 2: 5, 3: 45, 4: 50, 5: 41}
    lines = [f"{start + step},{track},{10 * track},5,8,20" for track, start in starts.items() for step in range(30)]
    (tmp_path / "boxes.txt").write_text("\n".join([*lines, "7,6,20,5,8,20"]))
    tracks = real_people.tracks_of(tmp_path / "boxes.txt", tmp_path)
    # A track of one box is none.
    assert list(tracks) == list(starts)
    real_people.write_crops(tracks, tmp_path / "crops", 4, lambda track, boxes: track in (3, 4))

    def person_of(track):
        return {4: 3}.get(track, track)

    real_people.write_training_set(tmp_path / "crops", tmp_path / "training", 40, person_of)
    # The frames of track 5 come later.
    assert sorted(path.name for path in (tmp_path / "training").iterdir()) == ["1", "2"]
    for by_visit, camids in ((True, {1, 2, 3, 4, 5}), (False, {0, 1, 2})):
        people = real_people.People(tmp_path / "crops", person_of, by_visit)
        assert len(people.pids) == 15 and set(people.pids) == {1, 2, 3, 5} and set(people.camids) == camids
        new, others = people.parts["new"]
        assert {people.tracklets.pids[item] for item in new} == {3, 4} and people.count("new") == 1
        assert {people.tracklets.pids[item] for item in others} == {1, 2, 5}
        side = real_people.side_of(people, torch.eye(len(people.tracklets.images)), new)
        assert set(side.pids.tolist()) == {3} and set(side.camids.tolist()) == ({3, 4} if by_visit else {0, 1, 2})
        # Two of eight kept boxes of a piece.
        assert len(side) == 2 * 3 * 2


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("size", [(8, 7), (9, 12), (1, 2)])
def test_padding_halves_the_size(kernel_size, size):
    """TensorFlow's rule: as many zeros as the last place of the kernel needs, the odd one behind."""
    images = torch.randn(1, 2, *size)
    layer = nn.Conv2d(2, 3, kernel_size, stride=2)
    found = layer(real_sources.SamePadding(kernel_size)(images))
    places = [-(-length // 2) for length in size]
    assert list(found.shape[2:]) == places
    wide = F.pad(images, [kernel_size] * 4)
    for row, column in [(0, 0), (places[0] - 1, places[1] - 1)]:
        missing = [
            max(0, (count - 1) * 2 + kernel_size - length) // 2 for count, length in zip(places, size, strict=True)
        ]
        top, left = (kernel_size + 2 * place - before for place, before in zip((row, column), missing, strict=True))
        patch = wide[:, :, top : top + kernel_size, left : left + kernel_size]
        torch.testing.assert_close(found[:, :, row, column], layer(patch)[:, :, 0, 0])


def test_pictures_of_people_stay_out_of_the_repository():
    with pytest.raises(ValueError, match="lies in the repository, where no picture may lie"):
        real_sources.check_cache(ROOT / "cache")
    assert not (ROOT / "cache").exists()


def test_a_program_that_is_not_there():
    with pytest.raises(ValueError, match="apt-fetch is not on this machine, which `apt-fetch x` needs"):
        real_sources.run("apt-fetch", "x")


@pytest.mark.slow
@pytest.mark.skipif(not CACHE, reason=f"needs a clip and weights that this fetches: {HOW}")
def test_better_networks_rank_real_people_better(tmp_path, capsys):
    real_people.main(["--cache_dir", CACHE, "--seeds", "0", "--json", str(tmp_path / "real.json")])
    raw = json.loads((tmp_path / "real.json").read_text())["raw"]
    assert raw["people"]["all"] >= 25 and raw["images"] > 200 and raw["training_images"] > 100

    def number(name, key, part="new"):
        return raw["features"][name][part][0][key]

    for key in ("mAP", "rank1"):
        for name in ("MobileNetV2 of a tracker", "EfficientNet-Lite0, ImageNet"):
            assert number(real_people.RANDOM, key) < number("pixels", key) < number(name, key)
        assert number("stand-in", key) < number(real_people.TUNED, key)
    # The threshold was fixed on others: 1 % is asked for.
    for name in raw["features"]:
        assert 0 < number(name, "false_match_rate") < 0.1
    assert "Two images: false-match rate 0.1 at score" in capsys.readouterr().out

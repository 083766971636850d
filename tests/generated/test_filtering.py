"""Choosing among scored images, and reading generated sets, against hand-made cases and brute force."""

import io
import shlex

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import filter_generated
from utils.batches import augmentation
from utils.batches.transforms import resized
from utils.datasets.load import load_reid
from utils.generated import choosing
from utils.generated import images as generated_images
from utils.generated.drawn_set import (
    FIRST_INDEX,
    NEW,
    TRUTHS,
    WRONG_SOURCE,
    World,
    cameras_of,
    draw,
    write_drawn,
    write_source,
)
from utils.generated.images import open_generated
from utils.generated.kept_report import against_truth, truth_table
from utils.generated.kept_set import Origin, write_files
from utils.generated.kept_set import resized as smaller
from utils.generated.score_models import given
from utils.generated.scoring import View, open_image
from utils.generated.sources import Source, check_calibration, open_sources
from utils.synthetic.world import render


def scores(person, values, *, sound=None, match=None, lead=None, source=None, hashes=None):
    count = len(person)
    given = {"clip": np.full(count, np.nan, np.float32), "cctf": np.full(count, np.nan, np.float32)}
    source = np.zeros(count, np.int16) if source is None else np.array(source, np.int16)
    domains = [f"d{number}" for number in range(source.max() + 1)]
    return choosing.Scores(
        people=[("d0", number) for number in range(max(person) + 1)],
        domains=domains,
        person=np.array(person, np.int32),
        source=source,
        sound=np.ones(count, bool) if sound is None else np.array(sound),
        match=np.ones(count, bool) if match is None else np.array(match),
        lead=np.zeros(count, np.float32) if lead is None else np.array(lead, np.float32),
        hashes=np.zeros(count, np.uint64) if hashes is None else np.array(hashes, np.uint64),
        values=given | {"reid": np.array(values, np.float32)},
    )


def test_reasons_come_in_order():
    found = scores([0] * 6, [0.9, 0.8, 0.7, 0.1, 0.6, 0.5], sound=[0, 1, 1, 1, 1, 1], match=[1, 0, 1, 1, 1, 1])
    found.sound = found.sound.astype(bool)
    found.match = found.match.astype(bool)
    choice = choosing.choose_images(found, "reid", {"d0": 0.4}, target_per_id=2)
    words = [choosing.REASONS[number] for number in choice.reason]
    assert words == [choosing.UNREADABLE, choosing.STRANGER, "", choosing.BELOW, "", choosing.SURPLUS]
    assert choice.kept.tolist() == [False, False, True, False, True, False]


def test_doubles_go_before_the_count_and_small_identities_last():
    hashes = [0b0, 0b1, 0b111111, 0b0, 0b0]
    found = scores([0, 0, 0, 1, 1], [0.5, 0.9, 0.4, 0.3, 0.2], hashes=hashes)
    duplicates = choosing.duplicate_finder(found, "perceptual", 1, None)
    choice = choosing.choose_images(found, "reid", {"d0": 0.0}, min_per_id=2, duplicates=duplicates)
    words = [choosing.REASONS[number] for number in choice.reason]
    assert words == [choosing.DOUBLE, "", "", choosing.FEW, choosing.DOUBLE]


def test_feature_doubles():
    features = np.array([[1, 0], [1, 0.01], [0, 1]], np.float16)
    found = scores([0, 0, 0], [0.5, 0.6, 0.7])
    duplicates = choosing.duplicate_finder(found, "feature", None, features)
    choice = choosing.choose_images(found, "reid", {"d0": 0.0}, duplicates=duplicates)
    assert choice.kept.tolist() == [False, True, True]


def test_the_very_same_feature_is_at_no_distance():
    features = np.random.default_rng(0).normal(size=(1, 64)).astype(np.float16).repeat(40, 0)
    found = scores([0] * 40, [0.5] * 40)
    double = choosing.duplicate_finder(found, "feature", 0.0, features)(np.arange(40))
    assert double.tolist() == [False, *[True] * 39]


def test_a_double_of_a_dropped_double_stays():
    distances = np.array([[0, 1, 2], [1, 0, 1], [2, 1, 0]])
    assert choosing.repeated(distances, 1).tolist() == [False, True, False]


@pytest.mark.parametrize("pids, held, fits", [([1, 2], True, True), ([1, 2], False, False), ([1], True, False)])
def test_calibration_takes_somebody_else(tmp_path, pids, held, fits):
    generated = open_generated(str(write_drawn(tmp_path / "set", World(num_ids=1)).parent))
    sources = {"synthetic-a": Source("synthetic-a", None, pids, None, torch.tensor([held, False]))}
    if fits:
        return check_calibration(generated, sources)
    with pytest.raises(ValueError, match="cannot be calibrated on synthetic-a: it takes two people"):
        check_calibration(generated, sources)


def test_models_are_in_the_order_in_which_sources_were_named():
    sources = open_sources([f"synthetic:domain={domain},num_ids=2" for domain in "ca"])
    assert list(sources) == ["synthetic-a", "synthetic-c"]
    assert given(["for c", "for a"], sources, "--reid_model") == {"synthetic-c": "for c", "synthetic-a": "for a"}
    assert set(given(["one"], sources, "--reid_model").values()) == {"one"} and given(None, sources, "") is None
    with pytest.raises(ValueError, match="--reid_model names 3 models for 2 sources; give one, or one for each"):
        given(["x", "y", "z"], sources, "--reid_model")


def test_a_score_that_is_no_number_sets_no_threshold():
    found = scores([0] * 4, [np.nan, 0.9, 0.8, np.nan])
    limits = choosing.thresholds_of(found, "reid", keep_fraction={"d0": 0.25})
    assert limits == {"d0": pytest.approx(0.9)}
    assert choosing.choose_images(found, "reid", limits).kept.tolist() == [False, True, False, False]


@pytest.mark.parametrize(
    "values", [[0.5, 0.9], [0.99991, 0.99994, 0.99996, 0.99998], [1e-12, 2e-12, 3e-12], [-0.2, -0.1]]
)
def test_the_advised_threshold_keeps_half(values):
    found = scores([0] * len(values), values)
    nothing = choosing.choose_images(found, "reid", {"d0": 2.0})
    words = choosing.nothing_left(found, nothing, "reid").split("--threshold ")[1].split(" ")[0]
    kept = choosing.choose_images(found, "reid", {"d0": float(words)}).kept
    assert kept.sum() == len(values) // 2 and len(words) <= 30


def test_an_advised_threshold_can_be_typed():
    found = scores([0, 0], [0.5, 0.9], source=[0, 1])
    found.domains[0] = "my people"
    words = choosing.nothing_left(
        found, choosing.choose_images(found, "reid", dict.fromkeys(found.domains, 2.0)), "reid"
    )
    typed = shlex.split(words.split("--threshold ")[1].split(" would keep")[0])
    assert filter_generated.numbers_by_name(typed) == {"my people": 0.5, "d1": pytest.approx(0.9, abs=1e-4)}


def test_who_asks_for_too_many_of_everybody_is_told_so():
    found = scores([0, 0, 1], [0.5, 0.9, 0.8])
    nothing = choosing.choose_images(found, "reid", {"d0": 0.0}, min_per_id=3)
    words = choosing.nothing_left(found, nothing, "reid")
    assert "(3 too few left of its identity)" in words and words.endswith(" Lower --min_per_id")


def test_thresholds_of_each_source():
    found = scores([0] * 8, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8], source=[0, 0, 0, 0, 1, 1, 1, 1])
    shares = {"d0": 0.5, "d1": 0.25}
    limits = choosing.thresholds_of(found, "reid", keep_fraction=shares)
    choice = choosing.choose_images(found, "reid", limits)
    assert choice.kept.tolist() == [False, False, True, True, False, False, False, True]


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.1, 0.5, 1.0])
def test_calibrated_threshold_is_the_least_that_keeps_the_rate(rate):
    impostors = np.random.default_rng(0).normal(size=203).round(1).astype(np.float32)
    threshold = choosing.calibrated(impostors, rate)
    assert (impostors >= threshold).mean() <= rate
    lower = impostors[impostors < threshold]
    assert not len(lower) or (impostors >= lower.max()).mean() > rate


def test_area_under_curve_by_counting_pairs():
    rng = np.random.default_rng(1)
    values, good = rng.integers(0, 9, 60).astype(float), rng.random(60) < 0.4
    pairs = [(one > other) + 0.5 * (one == other) for one in values[good] for other in values[~good]]
    assert choosing.area_under_curve(values, good) == pytest.approx(np.mean(pairs))
    assert choosing.area_under_curve(values, np.ones(60, bool)) is None


def test_ranking_puts_strangers_behind_by_their_lead_and_what_is_broken_last():
    found = scores(
        [0] * 6,
        [0.9, 0.2, 0.5, -0.5, 0.95, 0.1],
        sound=[True] * 4 + [False, True],
        match=[False, True, True, True, True, False],
        lead=[0.3, 0, 0, 0, np.nan, 0.2],
    )
    assert np.argsort(-choosing.ranking(found, "reid"), kind="stable").tolist() == [2, 1, 3, 5, 0, 4]
    found.values["clip"] = np.array([0.1, 0.9, np.nan, 0.3, 0.8, 0.2], np.float32)
    assert np.argsort(-choosing.ranking(found, "clip"), kind="stable").tolist() == [1, 3, 5, 0, 2, 4]


def test_a_small_lead_may_count_as_a_match(tmp_path):
    columns = {
        "domain": ["d"] * 4,
        "pid": [1, 1, 2, 2],
        "error": [None, None, None, "cut off"],
        "reid_match": [True, False, False, None],
        "reid_lead": pa.array([0.0, 0.04, 0.06, None], pa.float32()),
        "perceptual_hash": pa.array([1, 2, 3, None], pa.uint64()),
        "clip_score": pa.nulls(4, pa.float32()),
        "cctf_score": pa.nulls(4, pa.float32()),
        "reid_score": pa.array([0.5, 0.6, 0.7, None], pa.float32()),
    }
    pq.write_table(pa.table(columns), tmp_path / "scores.parquet")
    for margin, wanted in ((None, [1, 0, 0, 0]), (0.05, [1, 1, 0, 0]), (0.1, [1, 1, 1, 0])):
        found = choosing.read_scores(tmp_path / "scores.parquet", margin)
        assert found.match.tolist() == [bool(one) for one in wanted]
        assert choosing.choose_images(found, "reid", {"d": 0.0}).kept.tolist() == found.match.tolist()


def test_what_filters_keep_of_every_kind(tmp_path):
    truths = ["right, new scene", "broken", "right, as in the source", "broken", "nobody"]
    pq.write_table(pa.table({"truth": truths}), tmp_path / "scores.parquet")
    found = scores([0] * 5, [0.9, 0.8, 0.7, 0.1, 0.2])
    told = against_truth(tmp_path / "scores.parquet", found)
    assert list(told) == ["reid"]
    assert told["reid"]["auc"] == pytest.approx(5 / 6)
    kept = {"right, new scene": 1.0, "broken": 0.5, "right, as in the source": 0.0, "nobody": 0.0}
    assert told["reid"]["kept"] == kept
    assert truth_table(told)[1] == [["Re-ID CTF", "0.833", "100 %", "50 %", "0 %", "0 %"]]
    pq.write_table(pa.table({"path": truths}), tmp_path / "scores.parquet")
    assert against_truth(tmp_path / "scores.parquet", found) is None
    pq.write_table(pa.table({"truth": ["right, new scene"] * 5}), tmp_path / "scores.parquet")
    assert truth_table(against_truth(tmp_path / "scores.parquet", found))[1] == [["Re-ID CTF", "", "100 %"]]
    # A column of that name may be anybody's.
    pq.write_table(pa.table({"truth": range(5)}), tmp_path / "scores.parquet")
    assert against_truth(tmp_path / "scores.parquet", found) is None


@pytest.mark.parametrize(
    "rows, words",
    [
        ([{"model": "drawn", "steps": 0, "synthetic": True}] * 2, "drawn by code"),
        ([{"model": "464feff0", "steps": 30, "synthetic": True}] * 2, "made by a diffusion model"),
        ([{"model": "464feff0", "steps": 30}, {"synthetic": True}], "generated"),
        ([{"pid": 3}], "generated"),
    ],
)
def test_how_images_were_made_is_taken_from_their_rows(rows, words):
    origin = Origin()
    assert [row for row, _ in origin.noted((row, b"") for row in rows)] == rows
    assert origin.words() == words
    assert origin.synthetic == sum(bool(row.get("synthetic")) for row in rows)


def test_a_view_sees_what_the_transform_of_its_model_gives():
    picture, _ = draw(World(), 4, 0)
    view = View((96, 48), "bicubic", (0.4, 0.5, 0.6), (0.2, 0.3, 0.1))
    pixels = torch.from_numpy(np.array(resized(picture, view.size, view.resample)))
    torch.testing.assert_close(view.normalised(pixels[None])[0], view.transform()(picture))


def test_other_places_leave_the_middle_and_other_cameras_the_order_of_brightness():
    generator = torch.Generator().manual_seed(0)
    images = torch.arange(64).view(64, 1, 1, 1).expand(64, 3, 50, 40) / 64
    moved = augmentation.other_place(images.contiguous(), generator)
    assert torch.equal(moved[:, :, 4:48, 12:28], images[:, :, 4:48, 12:28])
    changed = (moved != images).flatten(1).any(1)
    assert 0.4 < changed.float().mean() < 0.8
    # One place and one light each: all margins of an image have one colour.
    assert all(len(image.flatten(1).unique(dim=1).T) <= 2 for image in moved)
    assert not torch.isin(moved, images).all()
    grey = torch.full((500, 3, 2, 2), 0.5)
    lit = augmentation.other_light(grey, generator)
    levels = (lit[:, :, 0, 0] / 0.5).log()
    assert torch.equal(lit, lit[:, :, :1, :1].expand_as(lit)) and lit.max() <= 1
    assert -1.45 <= levels.min() < -1.2 and levels.max() > 0.3 and (levels.amax(1) - levels.amin(1)).max() <= 0.5
    ramp = torch.linspace(0, 1, 40).expand(8, 3, 50, 40).contiguous()
    seen = augmentation.other_camera(ramp, generator).mean(2)
    assert (seen[..., 30] > seen[..., 5]).all() and seen.min() >= 0 and seen.max() <= 1
    again = [augmentation.change_scene(ramp, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*again) and again[0].shape == ramp.shape


def test_share_below():
    assert choosing.share_below([3, 1, 5, 5], [1, 2, 5, 6]) == [0.0, 0.25, 0.5, 1.0]


def test_perceptual_hash_knows_a_smaller_copy_from_another_picture():
    (one, _), (other, _) = (draw(World(), pid, 1) for pid in (0, 2))
    codes = [choosing.perceptual_hash(image) for image in (one, one.resize((48, 96), Image.Resampling.BOX), other)]
    bits = choosing.hash_distances(np.array(codes, np.uint64))
    assert bits[0, 1] <= 4 < bits[0, 2]
    assert bits[0, 2] == bin(codes[0] ^ codes[2]).count("1")


def test_pieces_do_not_depend_on_groups_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(generated_images, "PIECE", 7)
    file = write_drawn(tmp_path / "set", World(num_ids=2))
    table = pq.read_table(file)
    pq.write_table(table, file, row_group_size=3)
    opened = open_generated(str(tmp_path / "set"))
    pieces = list(opened.pieces())
    assert [(start, len(part)) for start, part, _ in pieces] == [(0, 7), (7, 7), (14, 6)]
    names = [name for _, part, _ in pieces for name in part["path"].to_pylist()]
    assert names == table["path"].to_pylist() and len(opened) == 20
    read = [one() for _, _, readers in opened.pieces({7}) for one in readers or ()]
    assert read == [(tmp_path / "set" / name).read_bytes() for name in names[7:14]]
    assert opened.counts == {("synthetic-a", 0): 10, ("synthetic-a", 2): 10}


def put(table, name, values):
    return table.set_column(table.column_names.index(name), name, pa.array(values))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda table: table.drop_columns(["pid"]), "needs the columns path"),
        (lambda table: pa.concat_tables([table, table.slice(0, 1)]), "names an image twice"),
        (lambda table: table.slice(0, 0), "holds no images"),
        (lambda table: table.set_column(2, "pid", pa.array(["x"] * len(table))), "must hold whole numbers"),
        (lambda table: table.drop_columns(["domain"]), "there are 0 sources"),
        (lambda table: put(table, "domain", [5] * len(table)), "'domain' must hold text, it is int64"),
        (lambda table: put(table, "camid", pa.nulls(len(table), pa.int64())), "'camid' is empty in 10 rows"),
    ],
)
def test_tables_that_are_not_as_expected(tmp_path, change, words):
    file = write_drawn(tmp_path / "set", World(num_ids=1))
    pq.write_table(change(pq.read_table(file)), file)
    with pytest.raises(ValueError, match=words):
        open_generated(str(tmp_path / "set"))


def test_a_folder_that_names_no_domain_is_of_the_only_source(tmp_path):
    folder = write_drawn(tmp_path / "set", World(num_ids=2)).parent
    rows = pq.read_table(folder / "metadata.parquet").to_pylist()
    lines = [f"{row['file_name']},{row['pid']},-1" for row in rows if (folder / row["file_name"]).is_file()]
    (folder / "metadata.parquet").unlink()
    (folder / "metadata.csv").write_text("\n".join(["file_name,pid,camid", *lines]))
    opened = open_generated(str(folder), domains=["market1501"])
    assert opened.counts == {("market1501", 0): 10, ("market1501", 2): 10}
    assert {one for table in opened.tables() for one in table["domain"].to_pylist()} == {"market1501"}
    assert set(open_generated(str(folder), domains=["set"]).counts) == {("set", 0), ("set", 2)}
    assert set(open_generated(str(folder), domains=["a", "b"]).counts) == {("set", 0), ("set", 2)}
    (folder / "metadata.csv").write_text(
        "\n".join(["file_name,pid,camid,domain", *(f"{one},msmt17" for one in lines)])
    )
    assert set(open_generated(str(folder), domains=["market1501"]).counts) == {("msmt17", 0), ("msmt17", 2)}


def test_two_images_of_one_path_do_not_become_one_file(tmp_path):
    held = io.BytesIO()
    Image.new("RGB", (8, 16)).save(held, "PNG")
    rows = [({"path": path, "pid": pid}, held.getvalue()) for pid, path in enumerate(["a/0.png", "a/./0.png"])]
    features = datasets.Features({"image": datasets.Image(), "path": datasets.Value("string")})
    features["pid"] = datasets.Value("int64")
    with pytest.raises(ValueError, match="two of the images have the path a/0.png.*--format parquet"):
        write_files(tmp_path, rows, 2, features)


def test_files_without_an_ending_get_one_and_no_folder_is_a_split(tmp_path):
    rows = []
    for number, (folder, kind) in enumerate((("query", "PNG"), ("other", "JPEG"))):
        held = io.BytesIO()
        Image.new("RGB", (8, 16), (90 * number, 0, 0)).save(held, kind)
        rows.append(({"path": f"{folder}/{number:07d}", "pid": number, "camid": 0}, held.getvalue()))
    whole = {"image": datasets.Image(), "path": datasets.Value("string"), "pid": datasets.Value("int64")}
    (tmp_path / "set").mkdir()
    write_files(tmp_path / "set", rows, 2, datasets.Features(whole | {"camid": datasets.Value("int64")}))
    # As the card says.
    options = {"data_files": {"train": "**"}, "split": "train", "cache_dir": str(tmp_path / "cache")}
    opened = datasets.load_dataset(str(tmp_path / "set"), **options)
    assert opened["path"][:] == ["query/0000000", "other/0000001"]
    assert [image.getpixel((3, 3))[0] for image in opened["image"][:]] == [0, pytest.approx(90, abs=2)]
    assert load_reid(str(tmp_path / "set"))["train"]["path"][:] == ["query/0000000.png", "other/0000001.jpeg"]


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "I;16"])
def test_another_size_keeps_the_notes_of_the_file(mode):
    held, exif = io.BytesIO(), Image.Exif()
    exif[0x010E] = "synthetic"
    Image.new(mode, (32, 64), 90 if mode != "I;16" else 90 << 8).save(held, "PNG", exif=exif)
    if mode == "RGB":
        held = io.BytesIO()
        Image.new(mode, (32, 64), (90, 0, 0)).save(held, "JPEG", exif=exif)
    for size in ((16, 8), (64, 32)):
        with Image.open(io.BytesIO(smaller(held.getvalue(), size))) as image:
            assert image.size == size[::-1] and image.mode == "RGB" and image.getexif()[0x010E] == "synthetic"
            assert abs(image.getpixel((3, 3))[0] - 90) <= 3


def test_a_picture_that_lies_is_stood_up():
    held, exif = io.BytesIO(), Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "synthetic"
    lying = Image.new("RGB", (64, 32), (0, 0, 90))
    lying.paste((200, 0, 0), (0, 0, 32, 32))
    lying.save(held, "JPEG", quality=95, exif=exif)
    upright = open_image(held.getvalue())
    # The left side of what lies is the top of what stands.
    assert upright.size == (32, 64) and upright.getpixel((16, 8))[0] > 150 > upright.getpixel((16, 56))[0]
    with Image.open(io.BytesIO(smaller(held.getvalue(), (32, 16)))) as image:
        assert image.size == (16, 32) and image.getpixel((8, 4))[0] > 150 > image.getpixel((8, 28))[0]
        assert image.getexif()[0x010E] == "synthetic" and 0x0112 not in image.getexif()


def test_another_seed_is_another_set(tmp_path):
    file = write_drawn(tmp_path / "set", World(num_ids=1))
    table = pq.read_table(file)
    before = open_generated(str(tmp_path / "set")).digest
    pq.write_table(table, file, row_group_size=3)
    assert open_generated(str(tmp_path / "set")).digest == before
    pq.write_table(put(table, "seed", [*table["seed"].to_pylist()[:-1], 99]), file)
    assert open_generated(str(tmp_path / "set")).digest != before


def test_files_outside_the_folder_are_refused(tmp_path):
    file = write_drawn(tmp_path / "set", World(num_ids=1))
    table = pq.read_table(file)
    names = pa.array(["../secret.jpg", *table["file_name"].to_pylist()[1:]])
    pq.write_table(table.set_column(0, "file_name", names), file)
    with pytest.raises(ValueError, match="secret"):
        list(open_generated(str(tmp_path / "set")).pieces())


def test_drawn_images_are_the_same_everywhere_and_of_every_kind():
    found = [draw(World(num_ids=3), 2, number) for number in range(10)]
    again = [draw(World(num_ids=3), 2, number) for number in range(10)]
    assert {truth for _, truth in found} == set(TRUTHS)
    assert all(one[0].tobytes() == other[0].tobytes() for one, other in zip(found, again, strict=True))


def test_an_identity_is_seen_by_few_cameras_and_so_is_what_is_drawn_as_in_the_source(tmp_path):
    world = World(num_ids=6, images_per_id=10, few_cameras=True)
    rows = load_reid(str(write_source(tmp_path / "few", world, 6)))["train"]
    seen = {pid: set() for pid in range(0, 12, 2)}
    for pid, camid in zip(rows["pid"], rows["camid"], strict=True):
        seen[pid].add(camid)
    assert seen == {pid: set(cameras_of(world, pid)) for pid in seen}
    assert {len(cameras) for cameras in seen.values()} == {1, 2} and len(set.union(*seen.values())) > 2
    for pid in seen:
        for number in range(10):
            picture, truth = draw(world, pid, number)
            if truth == NEW:
                other, _ = draw(World(num_ids=6, images_per_id=10), pid, number)
                assert picture.tobytes() == other.tobytes()
            if truth == WRONG_SOURCE:
                possible = [
                    render(world.domain, other, camid, FIRST_INDEX + number).tobytes()
                    for other in seen
                    for camid in seen[pid]
                    if other != pid
                ]
                assert picture.tobytes() in possible


def test_a_written_source_is_that_of_the_spec(tmp_path):
    written = load_reid(str(write_source(tmp_path / "all", World(num_ids=2, seed=3), 5)))["train"]
    spec = load_reid("synthetic:domain=a,num_ids=2,images_per_id=5,seed=3")["train"]
    columns = ("pid", "camid", "domain", "path")
    found, wanted = (
        {row["path"]: [*(row[name] for name in columns), row["image"].tobytes()] for row in data}
        for data in (written, spec)
    )
    assert found == wanted

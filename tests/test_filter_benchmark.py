"""Benchmarks of filtering: the set of links is what it says, and small runs leave whole files of figures."""

import json

import pyarrow.parquet as pq
import pytest

from benchmarks import filter_truth, filtering
from utils.drawn_generated import World, write_drawn


def test_links_are_the_drawn_files(tmp_path):
    drawn = write_drawn(tmp_path / "drawn", World(num_ids=1), size=(64, 32), num_damaged=0).parent
    filtering.write_links(drawn, tmp_path / "set", 23)
    rows = pq.read_table(tmp_path / "set" / "metadata.parquet").to_pylist()
    originals = pq.read_table(drawn / "metadata.parquet").to_pylist()
    assert len({row["path"] for row in rows}) == 23
    for number, row in enumerate(rows):
        want = originals[number % 10]
        assert row["pid"] == want["pid"]
        assert (tmp_path / "set" / row["path"]).read_bytes() == (drawn / want["path"]).read_bytes()


@pytest.mark.slow
def test_a_small_run(tmp_path):
    filtering.main(["--sizes", "200", "--json", str(tmp_path / "figures.json")])
    report = json.loads((tmp_path / "figures.json").read_text())
    (row,) = report["rows"]
    assert row["images"] == 200 and row["images_a_second"] > 0 and row["peak_mib"] > 100
    assert report["command"] == "python -m benchmarks.filtering --sizes 200"


@pytest.mark.slow
def test_a_small_run_against_the_truth(tmp_path):
    quick = [
        "--num_train_epochs",
        "1",
        "--classifier_epochs",
        "1",
        "--resolution",
        "64",
        "32",
        "--keep_fraction",
        "0.5",
    ]
    file = tmp_path / "truth.json"
    filter_truth.main(["--seeds", "3", "--num_ids", "3", "--json", str(file), "--flags", *quick])
    report = json.loads(file.read_text())
    assert set(report["auc"]) == {"clip", "cctf", "reid"} and report["flags"] == quick
    found = report["seeds"]["3"]
    # Of 30 images 15 are right, so every filter keeps 15.
    sizes = dict(zip(found["clip"]["kept"], (9, 6, 6, 7, 2), strict=True))
    for one in found.values():
        assert sum(share * sizes[kind] for kind, share in one["kept"].items()) == pytest.approx(15)

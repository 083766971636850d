"""benchmarks.filtering: the set of links is what it says, and a small run leaves a whole file of figures."""

import json

import pyarrow.parquet as pq
import pytest

from benchmarks import filtering
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

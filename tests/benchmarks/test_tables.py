"""The tables of benchmarks/README.md and the headline of the README are those of the files in benchmarks/results."""

import json
import re
import shutil

import pytest

from benchmarks import tables
from benchmarks.memory.cards import training_cards

README = (tables.ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
HEADLINE = "Before.\n<!-- table: headline -->\n<!-- end -->\nAfter.\n"


def test_readme_says_what_the_files_say():
    assert tables.with_tables(README) == README, "run python -m benchmarks.tables"
    assert set(re.findall(r"<!-- table: ([\w-]+) -->", README)) == set(tables.TABLES) - {"headline"}


def test_another_number_in_a_file_is_another_readme(monkeypatch, tmp_path):
    shutil.copytree(tables.RESULTS, tmp_path, dirs_exist_ok=True)
    counted = json.loads((tmp_path / "dcac_memory.json").read_text())
    counted["raw"]["counted"]["lora"]["ours"]["64"] = 10.6
    counted["table"] = training_cards(counted["raw"]["counted"])[1]
    (tmp_path / "dcac_memory.json").write_text(json.dumps(counted))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    made = tables.with_tables(README)
    (line,) = set(made.splitlines()) - set(README.splitlines())
    # 10.6 GiB and what CUDA takes are more than a 12 GB card has.
    assert line.startswith("| `lora` |  | 10.6 | 32 | 32 | 64 |")


def test_check_and_write(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    readme = tmp_path / "benchmarks" / "README.md"
    readme.parent.mkdir()
    (tmp_path / "README.md").write_text("No marks.\n")
    readme.write_text("Before.\n<!-- table: dcac-cost -->\nold\n<!-- end -->\nAfter.\n")
    with pytest.raises(SystemExit, match="python -m benchmarks.tables"):
        tables.main(["--check"])
    tables.main([])
    text = readme.read_text()
    assert text.startswith("Before.\n<!-- table: dcac-cost -->\n| what trains |") and text.endswith(
        "<!-- end -->\nAfter.\n"
    )
    assert "old" not in text
    with pytest.raises(SystemExit) as stop:
        tables.main(["--check"])
    assert stop.value.code == 0 and (tmp_path / "README.md").read_text() == "No marks.\n"


def test_a_mark_nobody_knows():
    with pytest.raises(ValueError, match="'nothing'; known are headline, benchmarks"):
        tables.with_tables("<!-- table: nothing -->\n<!-- end -->")


def test_a_table_is_that_of_its_file(monkeypatch, tmp_path):
    columns = ["start", "training", "measured on", "mAP %"]
    content = {"columns": columns, "table": [["pre-trained", "labels of b", "b", "33.2 ± 1.0"]]}
    (tmp_path / "generalisation.json").write_text(json.dumps(content))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    made = tables.with_tables("<!-- table: generalisation -->\n<!-- end -->").splitlines()
    assert made[1:4] == [
        "| start | training | measured on | mAP % |",
        "| --- | --- | --- | ---: |",
        "| pre-trained | labels of b | b | 33.2 ± 1.0 |",
    ]


def test_the_headline_of_the_readme():
    text = (tables.ROOT / "README.md").read_text(encoding="utf-8")
    assert tables.with_tables(text) == text, "run python -m benchmarks.tables"
    assert tables.with_tables("No marks.\n") == "No marks.\n"
    before, first, columns, _, *rows, last, after = tables.with_tables(HEADLINE).splitlines()
    assert [before, first, last, after] == HEADLINE.splitlines()
    assert columns == "| what | ours | compared with |" and 1 < len(rows) <= 5
    # The figures are those of the files.
    large = tables.ranked_by("ours", "L")
    assert f"| {large['seconds']:.0f} s, {large['gib']:.2f} GiB |" in rows[0]
    assert "| 2.26 x the baseline | the paper's way: 3.26 x |" in rows[1]
    assert "| -0.3 ± 0.4 (a -> c) to +1.1 ± 0.7 (a+c+d -> b) |" in rows[2]
    assert "| lost: nothing |" in rows[4]


def test_a_loss_is_in_the_headline(monkeypatch, tmp_path):
    shutil.copytree(tables.RESULTS, tmp_path, dirs_exist_ok=True)
    found = json.loads((tmp_path / "faults.json").read_text())
    found["table"][2][-1] = "a checkpoint"
    (tmp_path / "faults.json").write_text(json.dumps(found))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert any("| lost: finetune |" in line for line in tables.headline())

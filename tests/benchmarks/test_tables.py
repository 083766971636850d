"""README's tables are those of the files in benchmarks/results."""

import json
import re

import pytest

from benchmarks import tables

README = "\n".join((tables.ROOT / name).read_text(encoding="utf-8") for name in tables.FILES)


def test_readme_says_what_the_files_say():
    assert tables.with_tables(README) == README, "run python -m benchmarks.tables"
    assert set(re.findall(r"<!-- table: ([\w-]+) -->", README)) == set(tables.TABLES)


def test_another_number_in_a_file_is_another_readme(monkeypatch, tmp_path):
    for path in tables.RESULTS.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    counted = json.loads((tmp_path / "dcac_memory.json").read_text())
    counted["counted"]["lora"]["ours"]["64"] = 10.6
    (tmp_path / "dcac_memory.json").write_text(json.dumps(counted))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    made = tables.with_tables(README)
    (line,) = set(made.splitlines()) - set(README.splitlines())
    # 10.6 GiB and what CUDA takes are more than a 12 GB card has.
    assert line.startswith("| `lora` |  | 10.6 | 32 | 32 | 64 |")


def test_check_and_write(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "README.md").write_text("No table.\n")
    (tmp_path / "README.md").write_text("Before.\n<!-- table: dcac-cost -->\nold\n<!-- end -->\nAfter.\n")
    with pytest.raises(SystemExit, match="python -m benchmarks.tables"):
        tables.main(["--check"])
    tables.main([])
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("Before.\n<!-- table: dcac-cost -->\n| what trains |") and text.endswith(
        "<!-- end -->\nAfter.\n"
    )
    assert "old" not in text
    with pytest.raises(SystemExit) as stop:
        tables.main(["--check"])
    assert stop.value.code == 0


def test_a_mark_nobody_knows():
    with pytest.raises(ValueError, match="'nothing'; known are headline"):
        tables.with_tables("<!-- table: nothing -->\n<!-- end -->")


def test_adaptation_is_the_table_of_its_file(monkeypatch, tmp_path):
    columns = ["start", "training", "measured on", "mAP %"]
    content = {"columns": columns, "table": [["pre-trained", "b, SpCL", "b", "33.2 ± 1.0"]]}
    (tmp_path / "adaptation.json").write_text(json.dumps(content))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    made = tables.with_tables("<!-- table: adaptation -->\n<!-- end -->").splitlines()
    assert made[1:4] == [
        "| start | training | measured on | mAP % |",
        "| --- | --- | --- | ---: |",
        "| pre-trained | b, SpCL | b | 33.2 ± 1.0 |",
    ]

"""benchmarks.robustness.project: what it counts."""

import json

from benchmarks.robustness import project


def test_lines_and_files():
    assert set(project.scripts()) >= {"train_dcac.py", "evaluate.py", "app.py"}
    assert project.largest_folders().keys() >= {"kernels", "methods"}
    for name, count in project.longest_files().items():
        assert count == project.lines_of(project.ROOT / name) > 100


def test_what_an_import_loads():
    found = project.loaded_by("evaluate.py")
    assert found["files"] > 20 and found["lines"] > 50 * found["files"]


def test_the_table():
    raw = {
        "help": {"a.py": 0.5}, "scripts": {"a.py": 100}, "files": {"utils/b.py": 380, "tests/c.py": 900},
        "folders": {"utils/d": 3}, "loaded": {"a.py": {"files": 3, "lines": 4000}}, "tests": {"fast": 10, "all": 2000},
        "coverage": {"utils": 0.917},
    }  # fmt: skip
    rows = project.rows_of(json.loads(json.dumps(raw)))
    assert ["--help, seconds", "a.py", "0.50", "1.5"] in rows
    assert ["lines of the longest file", "tests/c.py", "900", "-"] in rows
    assert ["loaded by an import", "a.py", "3 files, 4,000 lines", "-"] in rows
    assert rows[-1] == ["coverage of the fast tests", "utils", "92 %", "-"]

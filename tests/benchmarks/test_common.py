"""What all benchmarks share: one way to run a script, one form of result, means and tables."""

import json
import sys

import pytest

from benchmarks import common

SCRIPT = """
import json, os, sys
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("--output_dir") + 1])
folder.mkdir(exist_ok=True)
code = {"git": os.environ["CODE"]}
(folder / "args.json").write_text(json.dumps({"command": ["script.py", *sys.argv[1:]], "versions": code}))
print("started", os.environ.get("WORD"))
if "--fail" in sys.argv:
    sys.exit("no such model")
(folder / "done").touch()
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return str(path)


def test_a_script_is_measured_alone_and_its_output_kept(tmp_path):
    words = ["-c", "import sys; held = bytearray(100 << 20); print('out'); print('err', file=sys.stderr); sys.exit(3)"]
    run = common.run_script(*words, logs=tmp_path / "logs", environment={"WORD": "x"})
    assert (run.code, run.output, run.errors, run.last_line) == (3, "out\n", "err\n", "err")
    # The memory of this process is not counted.
    assert 0.09 < run.peak_gib < 0.3 and run.cpu_seconds > 0 and run.seconds > 0
    assert (tmp_path / "logs" / "output.log").read_text() == "out\n"
    with pytest.raises(ValueError, match="script failed with 3: err"):
        common.checked(run, "script")


def test_a_time_limit_ends_a_script():
    run = common.run_script("-c", "import time; print('here', flush=True); time.sleep(60)", limit=1.5)
    assert run.code == common.TIME_LIMIT and run.output == "here\n" and run.seconds < 30


def test_a_run_is_made_once_and_an_other_one_refused(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CODE", f"{common.revision()}-dirty")
    folder = tmp_path / "run"
    run = common.run_once(script, folder, ["--seed", 1], "done")
    assert run.code == 0 and "started" in run.output and common.finished(run, "script.py") is None
    assert common.run_once(script, folder, ["--seed", 1], "done") is None
    with pytest.raises(ValueError, match="run holds a run of other arguments, --seed 1 .* give another --output_dir"):
        common.run_once(script, folder, ["--seed", 2], "done")
    monkeypatch.setenv("CODE", "another")
    common.run_once(script, tmp_path / "other", ["--seed", 1], "done")
    with pytest.raises(ValueError, match="other holds a run of revision another, the code here is .*; give another"):
        common.run_once(script, tmp_path / "other", ["--seed", 1], "done")
    failed = common.run_once(script, tmp_path / "failed", ["--fail"], "done")
    with pytest.raises(ValueError, match="script.py stopped: no such model; the same command continues"):
        common.finished(failed, "script.py")
    assert "stopped: no such model" in capsys.readouterr().out


def test_what_was_measured_is_kept_for_its_settings_alone(tmp_path):
    calls, file = [], tmp_path / "new" / "kept.json"

    def measure():
        calls.append(1)
        return {"seconds": 2.5}

    for _ in range(2):
        assert common.kept(file, {"sizes": (3, 4)}, measure) == {"seconds": 2.5}
    assert len(calls) == 1
    with pytest.raises(ValueError, match="give another folder"):
        common.kept(file, {"sizes": (3, 5)}, measure)


def test_a_worker_answers_in_json():
    words = ["--size", "tiny"]
    with pytest.raises(ValueError, match="benchmarks.nothing --size tiny failed with 1: .*No module named"):
        common.run_worker("benchmarks.nothing", *words)
    assert common.run_worker("json.tool", "benchmarks/results/faults.json", "--compact")["raw"]["seed"] == 0


def test_a_result_has_five_parts_and_no_path_of_this_disk(tmp_path, monkeypatch):
    file = tmp_path / "deep" / "found.json"
    command = common.command_line("benchmarks.speed.x", ["--json", str(file), "--words", "a b"])
    assert command == "python -m benchmarks.speed.x --json found.json --words 'a b'"
    monkeypatch.setattr(sys, "argv", ["x.py", "--seed", "1"])
    assert common.command_line("benchmarks.speed.x") == "python -m benchmarks.speed.x --seed 1"
    common.write_result(file, command, ["a"], [[1]], {"a": float("nan")}, card="none")
    found = json.loads(file.read_text())
    assert list(found) == ["environment", "command", "columns", "table", "raw"] and found["raw"] == {"a": None}
    assert found["environment"]["card"] == "none" and found["environment"]["revision"]
    assert str(tmp_path) not in file.read_text() and str(common.ROOT) not in file.read_text()


def test_means_and_tables():
    # The deviation of two values is their difference by the root of 2.
    assert common.mean_and_deviation([1.0, 3.0], 2) == "2.00 ± 1.41"
    assert common.in_percent([0.5, 0.52], "+") == "+51.0 ± 1.4" and common.in_percent([0.5]) == "50.0"
    assert common.cell(None) == "-" and common.cell(1.005, 1) == "1.0"
    assert common.markdown_table(["a", "b"], [["x", 1]]) == ["| a | b |", "| --- | ---: |", "| x | 1 |"]

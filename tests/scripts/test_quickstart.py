"""quickstart.ipynb: its commands are ones the scripts take, its outputs are of its cells, and it runs."""

import importlib
import json
import os
import re
import shlex

import pytest
from PIL import Image

from tests import notebook
from tests.runs import ROOT

CELLS = notebook.code_of(notebook.read())
COMMANDS = [command for code in CELLS for command in notebook.commands_of(code)]
# The same with few people and few steps.
SMALLER = {
    "--num_ids 100": "--num_ids 16 --images_per_id 6",
    "--eval_every 4": "--eval_every 4 --num_train_epochs 1 --train_batch_size 8 --resolution 64 32",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_understood(command, tmp_path, capsys):
    options = "--false_alarm_rate 0.1 --output_dir {search}"
    assert f'options = f"{options}"' in "".join(CELLS)
    command = command.replace("{options}", options).replace("{weights}", str(tmp_path))
    program, *words = shlex.split(command)
    assert program == "{python}"
    if words[0] == "-m":
        module = importlib.import_module(f"{words[1]}.__main__")
        with pytest.raises(SystemExit):
            module.main(["--help"])
        flags = {word for word in words if word.startswith("--")}
        assert flags and flags <= set(re.findall(r"--\w+", capsys.readouterr().out))
    else:
        importlib.import_module(words[0].removesuffix(".py")).parse_args(words[1:])


def test_what_a_reader_types_is_there():
    text = "".join("".join(cell["source"]) for cell in notebook.read()["cells"] if cell["cell_type"] == "markdown")
    for line in re.findall(r"`python (app\.py .*?)`", text, flags=re.DOTALL):
        importlib.import_module("app").parse_args(shlex.split(line)[1:])
    for module in re.findall(r"python -m ([\w.]+)", text):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file()
    assert all((ROOT / link).is_file() for link in re.findall(r"\]\((.*?)\)", text))
    assert "`quickstart.ipynb`" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_its_outputs_are_those_of_its_cells():
    """After a change of a cell: python -m tests.notebook."""
    content = notebook.read()
    assert content["metadata"]["code_of_outputs"] == notebook.digest(content)
    assert notebook.QUICKSTART.stat().st_size < 300_000
    outputs = [one for cell in content["cells"] if cell["cell_type"] == "code" for one in cell["outputs"]]
    assert sum("image/jpeg" in one.get("data", {}) for one in outputs) == 4
    text = json.dumps(outputs)
    assert str(ROOT) not in text and "Traceback" not in text and "Results: output/quickstart/groups" in text


def test_the_runner_does_what_jupyter_does(capsys):
    names = {"word": "two"}
    code = "count = 1\nif count:\n    !echo {word} {count + 1}\nprint('three')\ncount + 3"
    assert notebook.run_cell(code, names) == ("two 2\nthree\n", 4) and names["count"] == 1
    assert notebook.run_cell("count = 5", names) == ("", None)
    with pytest.raises(ValueError, match="ended with 3: no"):
        notebook.run_cell("!echo no >&2; exit 3", names)
    picture = notebook.outputs_of("said\n", Image.new("RGB", (4, 4), "red"), 7)
    assert [one["output_type"] for one in picture] == ["stream", "execute_result"]
    assert picture[1]["data"]["image/jpeg"].startswith("/9j/") and picture[1]["execution_count"] == 7
    assert notebook.outputs_of("", None, 1) == []


@pytest.mark.slow
def test_it_runs(tmp_path, monkeypatch):
    """All cells in a folder with links to this one, of fewer people."""
    for path in (*ROOT.glob("*.py"), *(ROOT / name for name in ("kernels", "methods", "utils"))):
        os.symlink(path, tmp_path / path.name)
    monkeypatch.chdir(tmp_path)
    content = notebook.read()
    replaced = 0
    for cell in content["cells"]:
        for words, fewer in SMALLER.items():
            replaced += any(words in line for line in cell["source"])
            cell["source"] = [line.replace(words, fewer) for line in cell["source"]]
    assert replaced == len(SMALLER)
    cells = [cell for cell in notebook.run(content)["cells"] if cell["cell_type"] == "code"]
    text = "".join(line for cell in cells for one in cell["outputs"] for line in one.get("text", []))
    assert text.startswith("wrote 96 images in output/quickstart/own/people") and "16 people: anna bert chloe" in text
    for words in ("Rank-1", "Calibrated: ", "Decisions of 6 queries: ", "40 items", "identity 1 "):
        assert words in text, words
    assert [any("data" in one for one in cell["outputs"]) for cell in cells] == [
        False, True, False, False, False, True, True, False, True,
    ]  # fmt: skip
    reports = sorted(path.parent.name for path in (tmp_path / "output" / "quickstart").glob("*/report.html"))
    assert reports == ["calibrated", "groups", "search", "trained"]

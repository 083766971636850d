"""The README's commands are ones the scripts take."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
LINES = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if line and line[0] != "#"]


def script_of(line):
    """(name, its arguments) where a line starts one of the scripts."""
    words = shlex.split(line)
    place = next((number for number, word in enumerate(words) if word.endswith(".py")), None)
    if place is None or words[0] not in ("accelerate", "python") and "accelerate" not in words:
        return None
    return words[place].removesuffix(".py"), words[place + 1 :]


COMMANDS = [(line, *script_of(line)) for line in LINES if script_of(line)]


@pytest.mark.parametrize("line, name, arguments", COMMANDS, ids=[line for line, *_ in COMMANDS])
def test_a_command_is_understood(line, name, arguments):
    importlib.import_module(name).parse_args(arguments)
    for config in re.findall(r"--config_file (\S+)", line):
        assert (ROOT / config).is_file()


def test_every_script_is_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in ROOT.glob("*.py"):
        assert f"| `{path.name}` |" in text, path.name
    assert {name for _, name, _ in COMMANDS} == {path.stem for path in ROOT.glob("*.py")}


@pytest.mark.parametrize("name", ["README.md", "benchmarks/README.md"])
def test_every_module_is_there(name):
    """`python -m benchmarks.memory.dcac_overhead` is a file, `python -m utils.datasets` a folder with __main__.py."""
    modules = re.findall(r"python -m ((?:benchmarks|utils)(?:\.\w+)+)", (ROOT / name).read_text(encoding="utf-8"))
    assert modules
    for module in modules:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module

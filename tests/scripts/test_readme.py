"""The README's commands are ones the scripts take, and what it says of this folder is so."""

import ast
import importlib
import re
import shlex

import pytest

from tests.runs import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
LINES = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if line and line[0] != "#"]
OURS = ("kernels", "methods", "utils")


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
    for path in ROOT.glob("*.py"):
        assert f"| `{path.name}` |" in README, path.name
    assert {name for _, name, _ in COMMANDS} == {path.stem for path in ROOT.glob("*.py")}
    for module in re.findall(r"python -m ((?:benchmarks|utils)(?:\.\w+)+)", README):
        place = ROOT / module.replace(".", "/")
        assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), module


def test_flags_in_the_text_are_flags_of_a_script(capsys):
    known = set()
    for path in ROOT.glob("*.py"):
        with pytest.raises(SystemExit):
            importlib.import_module(path.stem).parse_args(["--help"])
        known |= set(re.findall(r"--\w+", capsys.readouterr().out))
    other = {"--config_file", "--root", "--save_to", "--check", "--pid", "--folders"}
    assert set(re.findall(r"`[^`\n]*?(--\w+)", README)) - known <= other


def test_folders_and_pictures_are_there():
    text = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    for folder in re.findall(r"`((?:utils|kernels|methods|benchmarks|tests|accelerate_configs)/[\w/]*)`", text):
        assert (ROOT / folder).is_dir(), folder
    for file in re.findall(r"`(requirements[\w-]*\.txt|accelerate_config\.yaml)`", text):
        assert (ROOT / file).is_file(), file
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (ROOT / picture).stat().st_size < 150_000


def test_length_and_the_two_commands_of_a_fresh_machine():
    lines = README.splitlines()
    assert len(lines) <= 220
    assert sum(line.startswith("python3 -m venv .venv && ") for line in lines) == 2
    assert "<!-- table: headline -->" in lines


def test_python_finds_what_it_imports():
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in OURS:
            for alias in node.names:
                assert hasattr(importlib.import_module(node.module), alias.name)


def imported(file, seen):
    """Files of ours that a file imports, at whatever place in it, and theirs."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            above = file.relative_to(ROOT).parent.parts
            base = ".".join(
                [*(above[: len(above) - node.level + 1] if node.level else ()), *filter(None, [node.module])]
            )
            modules = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        for parts in (module.split(".") for module in modules if module.split(".")[0] in OURS):
            for depth in range(1, len(parts) + 1):
                place = ROOT.joinpath(*parts[:depth])
                for path in (place.with_suffix(".py"), place / "__init__.py"):
                    if path.is_file() and path not in seen:
                        seen.add(path)
                        imported(path, seen)
    return seen


def test_what_a_copy_of_a_script_takes_along():
    said = re.search(
        r"imports (\d+) files of `utils/` \(([\d,]+) lines\), (\d+) of `methods/` and (\d+) of `kernels/` "
        r"\(([\d,]+) lines\)",
        README,
    )
    files = imported(ROOT / "train_dcac.py", set())
    assert sum(path.relative_to(ROOT).parts[0] == "methods" for path in files) == int(said[3])
    for room, count, lines in (("utils", said[1], said[2]), ("kernels", said[4], said[5])):
        held = [path for path in files if path.relative_to(ROOT).parts[0] == room]
        length = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in held)
        assert len(held) == int(count), (room, len(held))
        assert length == pytest.approx(int(lines.replace(",", "")), rel=0.03), (room, length)

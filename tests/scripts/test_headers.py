"""`uv run SCRIPT` reads a script's own header (PEP 723): it asks for what requirements.txt asks for."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(ROOT.glob("*.py"))
# The pattern of the PEP.
BLOCK = re.compile(r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$")


def header_of(text):
    (block,) = [match for match in BLOCK.finditer(text) if match["type"] == "script"]
    return tomllib.loads("".join(line[2:] for line in block["content"].splitlines(keepends=True)))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_header_asks_for_the_requirements(script):
    header = header_of(script.read_text(encoding="utf-8"))
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert header["dependencies"] == [line for line in lines if line and not line.startswith("#")]
    assert header["requires-python"] == ">=3.11"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_header_stands_before_the_docstring(script):
    text = script.read_text(encoding="utf-8")
    assert text.startswith("# /// script\n")
    assert ast.get_docstring(ast.parse(text))


def test_seven_scripts():
    assert len(SCRIPTS) == 7

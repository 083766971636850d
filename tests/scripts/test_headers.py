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


def requirements(kind=None):
    """The lines of requirements.txt, and those that requirements-KIND.txt adds to them."""
    text = (ROOT / f"requirements{f'-{kind}' if kind else ''}.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    if lines[0] == "-r requirements.txt":
        return requirements() + lines[1:]
    assert kind is None
    return lines


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_header_asks_for_the_requirements(script):
    header = header_of(script.read_text(encoding="utf-8"))
    assert header["dependencies"] == requirements("app" if script.name == "app.py" else None)
    assert header["requires-python"] == ">=3.11"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_header_stands_before_the_docstring(script):
    text = script.read_text(encoding="utf-8")
    assert text.startswith("# /// script\n")
    assert ast.get_docstring(ast.parse(text))


def test_the_page_adds_gradio_alone():
    assert [line.split(">=")[0] for line in requirements("app") if line not in requirements()] == ["gradio"]


def test_eight_scripts():
    assert len(SCRIPTS) == 8

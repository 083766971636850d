"""Runs a notebook's cells without Jupyter: in order, in one process, lines that begin with `!` by a shell.

    python -m tests.notebook

runs `quickstart.ipynb` and writes what its cells print and show into it, as Jupyter would. Pictures are those of a
cell's last expression. What the commands write to stderr, such as progress bars, is left out.
"""

import ast
import base64
import contextlib
import hashlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "quickstart.ipynb"
SHELL = re.compile(r"^([ \t]*)!(.*)$", flags=re.MULTILINE)


def read(path=QUICKSTART):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def code_of(notebook):
    """The source of each code cell."""
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def commands_of(code):
    """The lines of a cell that a shell runs."""
    return [match[2] for match in SHELL.finditer(code)]


def digest(notebook):
    return hashlib.sha256("\0".join(code_of(notebook)).encode()).hexdigest()


def shell(command):
    """Run a command and print its output; ValueError with its last words if it fails."""
    # Without the last, DeepSpeed prints a line with the time where it is installed.
    more = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=os.environ | more)
    print(done.stdout, end="")
    if done.returncode:
        raise ValueError(f"{command} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")


def run_cell(code, names):
    """(what a cell prints, the value of its last expression or None); `names` are the notebook's variables."""
    names["_shell"] = shell
    # As in IPython, {x} in a command is the variable x.
    tree = ast.parse(SHELL.sub(lambda match: f"{match[1]}_shell(f{match[2]!r})", code))
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "cell", "exec"), names)
        value = eval(compile(ast.Expression(last.value), "cell", "eval"), names) if last else None
    return printed.getvalue(), value


def outputs_of(printed, value, number):
    """A cell's outputs in the form of a notebook file."""
    outputs = []
    if printed:
        outputs.append({"name": "stdout", "output_type": "stream", "text": printed.splitlines(keepends=True)})
    if value is not None:
        data = {"text/plain": [repr(value)]}
        if hasattr(value, "_repr_png_"):
            buffer = io.BytesIO()
            # A tenth of the bytes of a PNG.
            value.convert("RGB").save(buffer, "JPEG", quality=65, optimize=True)
            data = {"image/jpeg": base64.b64encode(buffer.getvalue()).decode() + "\n", "text/plain": ["<picture>"]}
        outputs.append({"data": data, "execution_count": number, "metadata": {}, "output_type": "execute_result"})
    return outputs


def run(notebook):
    """Run all cells; returns the notebook with their outputs."""
    names = {"__name__": "__main__"}
    number = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            number += 1
            printed, value = run_cell("".join(cell["source"]), names)
            cell |= {"execution_count": number, "outputs": outputs_of(printed, value, number)}
    notebook["metadata"]["code_of_outputs"] = digest(notebook)
    return notebook


def main():
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    text = json.dumps(run(read()), indent=1, ensure_ascii=False) + "\n"
    part = QUICKSTART.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(QUICKSTART)
    print(f"wrote {QUICKSTART.name}, {len(text) // 1000} kB")


if __name__ == "__main__":
    main()

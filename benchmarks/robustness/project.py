"""What a newcomer meets, in numbers: seconds of `--help`, lines and files, what a script loads, tests, coverage.

    python -m benchmarks.robustness.project
    python -m benchmarks.robustness.project --coverage     # runs the fast tests once more; pip install pytest-cov

Seconds are of the processor, the least of three runs. A script loads the files of ours that are open after its import,
without those that it opens later, where they are asked for.
"""

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path

from benchmarks.common import RESULTS, ROOT, checked, command_line, run_script, write_result
from utils.reporting.report import text_table

FOLDERS = ("kernels", "utils", "methods", "benchmarks", "tests")
COVERED = FOLDERS[:3]
# House rules: processor seconds of --help, lines of a script and of any other file, files of code in a folder.
AIMS = {"help": 1.5, "script": 620, "file": 380, "folder": 16}
LOADED = """
import importlib, json, sys
from pathlib import Path
importlib.import_module(sys.argv[1])
root = Path.cwd()
files = {Path(module.__file__) for module in list(sys.modules.values()) if getattr(module, "__file__", None)}
ours = sorted(str(file.relative_to(root)) for file in files if root in file.parents and ".venv" not in file.parts)
print(json.dumps(ours))
"""
COLUMNS = ["what", "of", "number", "aim"]


def scripts():
    return sorted(path.name for path in ROOT.glob("*.py"))


def lines_of(path):
    return len(path.read_text(encoding="utf-8").splitlines())


def help_seconds(script):
    return min(checked(run_script(script, "--help"), script).cpu_seconds for _ in range(3))


def code(folder):
    return sorted((ROOT / folder).rglob("*.py"))


def largest_folders():
    """{folder: files of code}, of each part the fullest one."""
    found = {}
    for part in FOLDERS:
        counts = {}
        for path in code(part):
            if path.name != "__init__.py":
                counts[path.parent] = counts.get(path.parent, 0) + 1
        folder = max(counts, key=counts.get)
        found[str(folder.relative_to(ROOT))] = counts[folder]
    return found


def longest_files():
    """{file: lines}, of each part the longest one."""
    found = {}
    for part in FOLDERS:
        path = max(code(part), key=lines_of)
        found[str(path.relative_to(ROOT))] = lines_of(path)
    return found


def loaded_by(script):
    """{files, lines} of ours that an import of the script opens, without the script."""
    run = checked(run_script("-c", LOADED, Path(script).stem), script)
    files = [name for name in json.loads(run.output.splitlines()[-1]) if name not in (script, "<string>")]
    return {"files": len(files), "lines": sum(lines_of(ROOT / name) for name in files)}


def tests():
    """{fast, all}: number of tests."""
    found = {}
    for kind, words in (("fast", []), ("all", ["-m", "slow or not slow"])):
        run = run_script("-m", "pytest", "--collect-only", "-q", "-p", "no:xdist", *words)
        found[kind] = int(re.findall(r"(\d+)(?:/\d+)? tests", checked(run, "pytest").output)[-1])
    return found


def coverage():
    """{folder: share of its lines that the fast tests run}."""
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "coverage.json"
        words = [f"--cov={name}" for name in COVERED]
        checked(run_script("-m", "pytest", "-q", *words, f"--cov-report=json:{file}"), "pytest --cov")
        content = json.loads(file.read_text())["files"]
    found = {}
    for name in COVERED:
        rows = [one["summary"] for path, one in content.items() if path.startswith(f"{name}/")]
        statements = sum(one["num_statements"] for one in rows)
        found[name] = sum(one["covered_lines"] for one in rows) / statements
    return found


def rows_of(raw):
    rows = [["--help, seconds", name, f"{value:.2f}", f"{AIMS['help']}"] for name, value in raw["help"].items()]
    rows += [["lines of a script", name, str(value), str(AIMS["script"])] for name, value in raw["scripts"].items()]
    for what, key, aim in (("lines of the longest file", "files", "file"), ("files in a folder", "folders", "folder")):
        of_tests = {"tests", "benchmarks"} if key == "files" else {"tests"}
        for name, value in raw[key].items():
            # The rule is for what a user reads.
            rows.append([what, name, str(value), "-" if Path(name).parts[0] in of_tests else str(AIMS[aim])])
    for name, found in raw["loaded"].items():
        rows.append(["loaded by an import", name, f"{found['files']} files, {found['lines']:,} lines", "-"])
    rows += [["tests", kind, f"{count:,}", "-"] for kind, count in raw["tests"].items()]
    for name, share in raw["coverage"].items():
        rows.append(["coverage of the fast tests", name, f"{100 * share:.0f} %", "-"])
    return rows


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coverage", action="store_true", help="run the fast tests under coverage too")
    parser.add_argument("--json", type=Path, default=RESULTS / "project.json", help="default benchmarks/results")
    args = parser.parse_args(input_args)
    raw = {
        "help": {name: help_seconds(name) for name in scripts()},
        "scripts": {name: lines_of(ROOT / name) for name in scripts()},
        "files": longest_files(),
        "folders": largest_folders(),
        "loaded": {name: loaded_by(name) for name in scripts()},
        "tests": tests(),
        "coverage": coverage() if args.coverage else {},
    }
    print(text_table(COLUMNS, rows_of(raw)))
    write_result(args.json, command_line(__spec__.name, input_args), COLUMNS, rows_of(raw), raw)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"benchmarks.robustness.project: {error}")

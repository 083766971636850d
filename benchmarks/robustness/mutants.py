"""Small random changes of the code, each of which a test should notice.

    python -m benchmarks.robustness.mutants
    python -m benchmarks.robustness.mutants --count 60 --minutes 30

A change replaces a comparison, an operator, a number or a truth value, or swaps two arguments. It is made in a copy of
the tree, and the tests of its file run until one fails: those in the mirror folder of `tests` that import the file,
else any that do, else those that name it. A test that fails must pass without the change. What survives is either
equivalent, and `raw.notes` of the result says why, or wants a test.

Every run is a fork of this process, which has imported the libraries. Finished changes stay in the result and are not
run again; those of code that is no longer there leave it.
"""

import argparse
import ast
import contextlib
import importlib
import io
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tokenize
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import RESULTS, ROOT, command_line, write_result
from utils.reporting.report import text_table

FOLDERS = ("kernels", "methods", "utils/modeling", "utils/batches", "utils/evaluation")
FILES = (
    *(f"utils/training/{name}.py" for name in (
        "agreement", "balance", "clustering", "contrast", "discrepancy", "optimizer", "parameter_groups",
        "propagation", "teacher",
    )),
    *(f"utils/diffusion/{name}.py" for name in (
        "families/flow", "families/solvers", "feedback", "few_steps", "latents", "schedule", "tuning", "unet",
    )),
    *(f"utils/generated/{name}.py" for name in ("calibration", "choosing", "measures", "scoring")),
    "utils/sharding.py",
)  # fmt: skip
# Kernels for a GPU, pages, flags, and what only measures.
LEFT_OUT = re.compile(
    r"_triton\.py|report\.py|settings\.py|__\w+__\.py|build_table\.py|measured\.py|names\.py|convert\.py"
)
SWAPS = {
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "+": "-", "-": "+", "*": "/", "/": "*",
    "//": "/", "%": "*", "&": "|", "|": "&", "and": "or", "or": "and", "True": "False", "False": "True", "not": "",
    "min": "max", "max": "min", "amin": "amax", "amax": "amin", "argmin": "argmax", "argmax": "argmin",
}  # fmt: skip
OURS = ("utils", "kernels", "methods", "benchmarks", "tests", "evaluate", "adapt_reid", "finetune_reid")
LIBRARIES = (
    "pytest",
    "hypothesis",
    "torch",
    "numpy",
    "scipy",
    "sklearn",
    "pyarrow.parquet",
    "datasets",
    "safetensors",
)
LIBRARIES += ("accelerate", "transformers.models.clip", "transformers.models.resnet", "PIL.Image", "torchvision")
LIBRARIES += ("diffusers",)
COLUMNS = ["file", "line", "change", "result", "by", "seconds"]
KILLED, SURVIVED, TIMEOUT = "killed", "survived", "timeout"


@dataclass(frozen=True)
class Mutant:
    """The text from `begin` to `end` of a file becomes `text`."""

    file: str
    line: int
    begin: int
    end: int
    old: str
    text: str

    @property
    def change(self):
        return f"column {self.begin}: {self.old} -> {self.text or 'nothing'}"


def mutants_of(file, source):
    """All changes of a file, in order."""
    tree, starts = ast.parse(source), [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    lines = source.splitlines()

    def place(line, column):
        # The columns of a syntax tree count bytes.
        return starts[line - 1] + len(lines[line - 1].encode()[:column].decode())

    silent = [
        (place(node.lineno, node.col_offset), place(node.end_lineno, node.end_col_offset))
        for node in no_behaviour(tree)
    ]

    def counts(begin):
        return not any(first <= begin < last for first, last in silent)

    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        begin, end = starts[token.start[0] - 1] + token.start[1], starts[token.end[0] - 1] + token.end[1]
        for text in others(token) if counts(begin) else ():
            yield Mutant(file, token.start[0], token.start[1], end - begin, token.string, text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and len(node.args) > 1 and node.lineno == node.args[1].end_lineno:
            one, two = (ast.get_source_segment(source, part) for part in node.args[:2])
            begin, end = place(node.lineno, node.args[0].col_offset), place(node.lineno, node.args[1].end_col_offset)
            plain = not any(isinstance(part, (ast.Starred, ast.Constant)) for part in node.args[:2])
            if counts(begin) and plain and one != two:
                between = source[begin + len(one) : end - len(two)]
                old = source[begin:end]
                yield Mutant(file, node.lineno, begin - starts[node.lineno - 1], end - begin, old, two + between + one)


def no_behaviour(tree):
    """Nodes whose changes tests need not see: types, words of errors, decorators, imports."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Raise, ast.Import, ast.ImportFrom, ast.Assert)):
            yield node
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield from node.decorator_list
        yield from (
            part for name in ("annotation", "returns") if isinstance(part := getattr(node, name, None), ast.AST)
        )


def others(token):
    """What a token may become."""
    if token.type in (tokenize.OP, tokenize.NAME) and token.string in SWAPS:
        return [SWAPS[token.string]]
    if token.type != tokenize.NUMBER:
        return []
    if re.fullmatch(r"\d+", token.string):
        number = int(token.string)
        return [str(number + 1)] + ([str(number - 1)] if number else [])
    return [f"({token.string} * 2)"]


def mutated(source, mutant):
    lines = source.splitlines(keepends=True)
    begin = sum(map(len, lines[: mutant.line - 1])) + mutant.begin
    assert source[begin : begin + mutant.end] == mutant.old, mutant
    return source[:begin] + mutant.text + source[begin + mutant.end :]


def code_files(root):
    files = [path for folder in FOLDERS for path in (root / folder).rglob("*.py") if not LEFT_OUT.search(path.name)]
    return sorted({path.relative_to(root).as_posix() for path in files} | set(FILES))


def drawn(root, count, seed):
    """The first `count` changes in an order of this seed that visits every file before any twice."""
    draw, piles = random.Random(seed), []
    for file in code_files(root):
        found = list(mutants_of(file, (root / file).read_text(encoding="utf-8")))
        draw.shuffle(found)
        piles.append(found)
    draw.shuffle(piles)
    ordered = (pile[turn] for turn in range(max(map(len, piles))) for pile in piles if turn < len(pile))
    return list(itertools.islice((mutant for mutant in ordered if is_code(root, mutant)), count))


def is_code(root, mutant):
    """Whether Python can read the changed file: the sign before a list of arguments is no product."""
    try:
        ast.parse(mutated((root / mutant.file).read_text(encoding="utf-8"), mutant))
    except SyntaxError:
        return False
    return True


def tests_of(root, file):
    """The test files of a file of code, the shortest first."""
    module = file.removesuffix(".py").replace("/", ".")
    package, _, name = module.rpartition(".")
    parts = file.removeprefix("utils/").split("/")
    folder = root / "tests" / parts[0]
    imported = re.compile(rf"\b{re.escape(module)}\b|from {re.escape(package)} import .*\b{name}\b")
    # Whole runs of scripts take too long for every change.
    everywhere = [
        path for path in (root / "tests").rglob("test_*.py") if not {"scripts", "benchmarks"} & {*path.parts}
    ]
    everywhere = sorted((path for path in everywhere if "fuzz" not in path.name), key=lambda path: path.stat().st_size)
    tests = [path for path in everywhere if path.parent == folder]
    texts = {path: path.read_text(encoding="utf-8") for path in everywhere}
    near = [path for path in tests if imported.search(texts[path])]
    near = near or [path for path in everywhere if imported.search(texts[path])]
    near = near or [path for path in tests if re.search(rf"\b{name}\b", texts[path])]
    near = near or [path for path in tests if any(f"_{part}" in path.stem for part in parts[1:-1])]
    return [path.relative_to(root).as_posix() for path in near or tests]


# Running


def copy_tree(folder):
    """A copy of all files that git knows or does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def run_tests(root, tests, limit):
    """(exit code of pytest or None, what it printed, processor seconds); None after `limit` processor seconds."""
    log = root / ".log"
    log.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        child(root, tests, log, limit)
    end = time.monotonic() + 20 * limit
    while True:
        ended, status, used = os.wait4(pid, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > end:
            os.killpg(pid, signal.SIGKILL)
            _, status, used = os.wait4(pid, 0)
            break
        time.sleep(0.05)
    # What the tests started and left.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(status)
    printed = log.read_text(errors="replace") if log.is_file() else ""
    return (None if code in (-signal.SIGXCPU, -signal.SIGKILL) else code), printed, used.ru_utime + used.ru_stime


def child(root, tests, log, limit):
    """Run pytest on the copy, with none of our modules of the tree itself; never returns."""
    code = 70
    try:
        os.setsid()
        said = os.open(log, os.O_WRONLY | os.O_CREAT)
        for stream in (1, 2):
            os.dup2(said, stream)
        sys.stdout = sys.stderr = os.fdopen(said, "w", buffering=1)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
        os.chdir(root)
        for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
            del sys.modules[name]
        sys.path[:] = [str(root), *(path for path in sys.path if path and Path(path).resolve() != ROOT)]
        os.environ["PYTHONPATH"] = str(root)
        # A change may keep the size and the second of a file, by which Python knows its compiled form.
        sys.dont_write_bytecode, os.environ["PYTHONDONTWRITEBYTECODE"] = True, "1"
        code = int(sys.modules["pytest"].main(["-x", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", *tests]))
        sys.stdout.flush()
    finally:
        os._exit(code)


def result_of(code, printed):
    """(killed, survived or timeout; the test that failed)."""
    if code is None:
        return TIMEOUT, ""
    failed = re.search(r"^(?:FAILED|ERROR) (tests/.*?)(?: - .*)?$", printed, re.MULTILINE)
    return (SURVIVED if code == 0 else KILLED), failed[1] if failed else ""


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="changes; default 200")
    parser.add_argument("--seed", type=int, default=0, help="of their choice; default 0")
    parser.add_argument("--limit", type=int, default=120, help="processor seconds of a change's tests; default 120")
    parser.add_argument("--minutes", type=float, help="stop after so long; the same command goes on")
    parser.add_argument("--json", type=Path, default=RESULTS / "mutants.json", help="default benchmarks/results")
    return parser.parse_args(input_args)


def main(input_args=None):
    args = parse_args(input_args)
    end = time.monotonic() + 60 * (args.minutes or 1e9)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    for name in LIBRARIES:
        importlib.import_module(name)
    before = json.loads(args.json.read_text(encoding="utf-8")) if args.json.is_file() else {"table": [], "raw": {}}
    notes, known = before["raw"].get("notes", {}), {tuple(row[:3]): row for row in before["table"]}
    with tempfile.TemporaryDirectory(prefix="mutants-") as place:
        root = copy_tree(Path(place))
        mutants = drawn(root, args.count, args.seed)
        names = [(mutant.file, mutant.line, mutant.change) for mutant in mutants]
        rows, whole = {name: known[name] for name in names if name in known}, set()
        for mutant, name in zip(mutants, names, strict=True):
            if time.monotonic() > end:
                break
            if name in rows:
                continue
            tests = tests_of(root, mutant.file)
            path = root / mutant.file
            source = path.read_text(encoding="utf-8")
            path.write_text(mutated(source, mutant), encoding="utf-8")
            code, printed, seconds = run_tests(root, tests, args.limit)
            path.write_text(source, encoding="utf-8")
            result, by = result_of(code, printed)
            if by and by not in whole:
                code, printed, _ = run_tests(root, [by], args.limit)
                if code != 0:
                    sys.exit(f"{by} fails without any change, or exceeds --limit: {printed[-1500:]}")
                whole.add(by)
            rows[name] = [
                *name,
                result,
                by.partition("::")[0].rpartition("/")[2] + by[by.find("::") :] if "::" in by else by,
                round(seconds, 1),
            ]
            print(*rows[name], flush=True)
            kept = [rows[one] for one in names if one in rows]
            raw = {"seed": args.seed, "counts": Counter(row[3] for row in kept), "notes": notes}
            write_result(args.json, command_line(__spec__.name, input_args), COLUMNS, kept, raw)
    print(text_table(COLUMNS, [row for row in rows.values() if row[3] != KILLED]))
    print(dict(Counter(row[3] for row in rows.values())))


if __name__ == "__main__":
    main()

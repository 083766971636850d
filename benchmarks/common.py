"""What all benchmarks share: result files, the machine, running scripts, timing, mean and deviation, tables.

Every result file holds the same five things:

    environment   machine, load, versions, device, commit
    command       the command that measures it again
    columns       names of the columns of `table`
    table         the rows as printed
    raw           all numbers that were measured
"""

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from utils.files import to_json, versions, write_together

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
GIB = 2**30
# What `timeout` ends with too.
TIME_LIMIT = 124
# A process counts the memory of the process that started it as its own, so a small process stands between.
MEASURED = f"""
import json, resource, subprocess, sys
record, limit, *command = sys.argv[1:]
try:
    code = subprocess.call(command, timeout=float(limit) if limit else None)
except subprocess.TimeoutExpired:
    code = {TIME_LIMIT}
used = resource.getrusage(resource.RUSAGE_CHILDREN)
with open(record, "w") as file:
    json.dump([used.ru_utime + used.ru_stime, used.ru_maxrss], file)
sys.exit(code if code >= 0 else 128 - code)
"""


# Result files


def environment():
    """Machine, load, versions, device and commit, without any path of this disk."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    found = versions()
    revision = found.pop("git")
    return {
        "machine": f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, {platform.system()}",
        "load_average": os.getloadavg(),
        **found,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "revision": revision,
    }


def revision():
    """The commit of the code; a result file that was written meanwhile makes no other code of it."""
    return str(versions()["git"]).removesuffix("-dirty")


def command_line(module, arguments=None):
    """`python -m MODULE ARGUMENTS`, by default those of this process; of an absolute path only the last name."""
    words = sys.argv[1:] if arguments is None else arguments
    return shlex.join(["python", "-m", module, *(Path(w).name if Path(w).is_absolute() else w for w in words)])


def write_result(path, command, columns, table, raw, **environment_too):
    """Write one result file; `environment_too` adds to the environment."""
    content = {"environment": environment() | environment_too, "command": command}
    write_json(path, content | {"columns": columns, "table": table, "raw": raw})


def write_json(path, content):
    with write_together(path.parent) as part:
        part(path.name).write_text(to_json(content), encoding="utf-8")


def read_result(name, folder=None):
    return json.loads(((folder or RESULTS) / f"{name}.json").read_text(encoding="utf-8"))


# Running scripts


@dataclass
class Run:
    """How a process ended: exit code, what it printed, and what it used."""

    code: int
    output: str
    errors: str
    seconds: float
    cpu_seconds: float
    peak_gib: float

    @property
    def last_line(self):
        return (self.errors.strip() or self.output.strip()).rpartition("\n")[2]


def run_script(*words, logs=None, limit=None, folder=ROOT, environment=None, python=sys.executable):
    """Run `python WORDS` in a process of its own from the root of the repository.

    The output goes to `output.log` and `errors.log` in the folder `logs`, where it can be followed. After `limit`
    seconds the process is killed and the code is TIME_LIMIT. `environment` adds to the variables; `python` may be that
    of another environment.
    """
    with tempfile.TemporaryDirectory() as place:
        logs = Path(logs or place)
        logs.mkdir(parents=True, exist_ok=True)
        record, output, errors = Path(place) / "usage.json", logs / "output.log", logs / "errors.log"
        command = [sys.executable, "-S", "-c", MEASURED, record, "" if limit is None else limit, python]
        start = time.perf_counter()
        with open(output, "wb") as printed, open(errors, "wb") as warned:
            code = subprocess.call(
                [str(word) for word in (*command, *words)],
                cwd=folder,
                stdout=printed,
                stderr=warned,
                env=os.environ | (environment or {}),
            )
        seconds = time.perf_counter() - start
        used, kilobytes = json.loads(record.read_text()) if record.exists() else (0.0, 0)
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in (output, errors)]
    return Run(code, *texts, seconds, used, kilobytes / 2**20)


def checked(run, name):
    """The run; ValueError with the end of what it printed if it failed."""
    if run.code:
        raise ValueError(f"{name} failed with {run.code}: {(run.errors or run.output).strip()[-2000:]}")
    return run


def run_worker(module, *words, environment=None):
    """Run `python -m MODULE WORDS` and return the JSON in its last line."""
    name = " ".join(map(str, (module, *words[:4])))
    run = checked(run_script("-m", module, *words, environment=environment), name)
    return json.loads(run.output.splitlines()[-1])


def run_once(script, folder, arguments, done, environment=None):
    """Run a script (`SCRIPT.py` or `-m MODULE`) into `folder`, resuming, unless its result file `done` exists.

    None if it does. ValueError if the folder holds a run with other arguments, or of another revision of the code.
    """
    command = [*map(str, arguments), "--output_dir", str(folder), "--resume_from_checkpoint", "latest"]
    record = folder / "args.json"
    if record.exists():
        content = json.loads(record.read_text(encoding="utf-8"))
        before, code = content["command"][1:], str(content["versions"]["git"]).removesuffix("-dirty")
        if before != command:
            raise ValueError(
                f"{folder} holds a run of other arguments, {shlex.join(before)}; give another --output_dir"
            )
        if code != revision():
            raise ValueError(
                f"{folder} holds a run of revision {code}, the code here is {revision()}; give another --output_dir"
            )
    if (folder / done).exists():
        return None
    print(f"{script} {folder.name}", end=" ", flush=True)
    more = {"environment": environment} if environment else {}
    run = run_script(*script.split(), *command, logs=folder / "logs", **more)
    print(f"{run.seconds:.0f} s" if run.code == 0 else f"stopped: {run.last_line}", flush=True)
    return run


def finished(run, script):
    """ValueError if a run of `run_once` did not end well."""
    if run is not None and run.code:
        raise ValueError(f"{script} stopped: {run.last_line}; the same command continues")


def kept(file, settings, measure):
    """The result of `measure`, read from `file` if it was measured before with the same settings.

    ValueError if the file has the result of other settings.
    """
    settings = json.loads(to_json(settings))
    if not file.is_file():
        write_json(file, {"settings": settings, "result": measure()})
    before = json.loads(file.read_text(encoding="utf-8"))
    if before["settings"] != settings:
        raise ValueError(f"{file} was measured with {before['settings']}, not {settings}; give another folder")
    return before["result"]


# Timing


def wait(cuda):
    if cuda:
        import torch

        torch.cuda.synchronize()


def step_text(times):
    return f"{statistics.median(times):.1f} ms a step"


def step_numbers(times, batch, memory, loss):
    """Median and quartiles of the milliseconds of a step, images a second, peak memory."""
    middle = statistics.median(times)
    low, _, high = statistics.quantiles(times, n=4)
    row = {"ms": round(middle, 3), "ms_quartiles": [round(low, 3), round(high, 3)], "steps": len(times)}
    row |= {"images_per_second": round(1000 * batch / middle, 2), "loss": loss}
    if memory is not None:
        row |= {"peak_gib": round(memory[0], 3), "reserved_gib": round(memory[1], 3)}
    return row


# Mean and deviation, tables


def mean_and_deviation(values, digits=1, sign="", scale=1):
    """`44.5 ± 4.7`; of a single value the value alone."""
    values = [scale * value for value in values]
    mean = f"{statistics.fmean(values):{sign}.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def in_percent(values, sign=""):
    return mean_and_deviation(values, sign=sign, scale=100)


def cell(value, digits=2):
    """A number as text, `-` for a missing one."""
    return "-" if value is None else f"{value:.{digits}f}"


def markdown_table(columns, rows, *, words=1):
    """Lines of a Markdown table; all but the first `words` columns are numbers."""
    marks = ["---"] * words + ["---:"] * (len(columns) - words)
    return [f"| {' | '.join(map(str, row))} |" for row in (columns, marks, *rows)]

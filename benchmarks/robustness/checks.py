"""What must be true of a job's folder and of its last words after a run was stopped."""

import csv
import hashlib
import json
import signal

from benchmarks.robustness.jobs import JOBS


def digests(job, out):
    """SHA-256 of every file of a job's result; AssertionError if one is missing."""
    found = {}
    for pattern in JOBS[job].result:
        paths = sorted(out.glob(pattern))
        assert paths, f"{job} ended without {pattern}"
        found |= {str(path.relative_to(out)): hashlib.sha256(content(path)).hexdigest() for path in paths}
    return found


def content(path):
    """The bytes of a file; the header of a safetensors file, which has no fixed order, is sorted."""
    whole = path.read_bytes()
    if path.suffix != ".safetensors":
        return whole
    size = int.from_bytes(whole[:8], "little")
    return json.dumps(json.loads(whole[8 : 8 + size]), sort_keys=True).encode() + whole[8 + size :]


def progress(job, out):
    """How much is finished: the step of the newest checkpoint, or the number of finished parts."""
    found = list(out.glob(JOBS[job].done))
    if JOBS[job].trains:
        return max((int(path.parent.name.split("-")[1]) for path in found), default=0)
    return len(found)


def half_written(out):
    """Files with a final name that cannot be read to the end."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from PIL import Image
    from safetensors import safe_open

    def read_tensors(path):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                file.get_tensor(name)

    def read_page(path):
        assert path.read_text().rstrip().endswith("</html>")

    def read_image(path):
        with Image.open(path) as image:
            image.load()

    def read_lines(path):
        *lines, rest = path.read_text().split("\n")
        for line in lines:
            json.loads(line)
        # A training writes whole lines, but not at once: a kill may leave one, which a resume cuts off.
        assert not rest or path.name == "log.jsonl"

    def read_table(path):
        lengths = {len(row) for row in csv.reader(path.open(newline=""))}
        assert len(lengths) == 1

    def read_arrow(path):
        pa.ipc.open_stream(path).read_all()

    readers = {
        ".json": lambda path: json.loads(path.read_text()),
        ".jsonl": read_lines,
        ".csv": read_table,
        ".npy": np.load,
        ".pt": lambda path: torch.load(path, weights_only=True),
        ".arrow": read_arrow,
        ".parquet": pq.read_table,
        ".safetensors": read_tensors,
        ".html": read_page,
        **dict.fromkeys((".png", ".jpg"), read_image),
    }
    bad = []
    for path in sorted(out.rglob("*")) if out.is_dir() else ():
        if any(part.startswith(".") for part in path.relative_to(out).parts) or path.suffix not in readers:
            continue
        try:
            readers[path.suffix](path)
        except Exception as error:
            bad.append(f"{path.relative_to(out)}: {type(error).__name__}")
    return bad


def check_end(job, code, said, sign):
    """A killed run must end by the signal or, after SIGTERM, with a checkpoint and the exit code for it."""
    if code in (0, -sign):
        return
    assert sign == signal.SIGTERM and JOBS[job].trains and code == 128 + sign, f"{job}: {code}\n{said[-2000:]}"
    assert "--resume_from_checkpoint latest" in said


def check_words(job, said):
    """The last line must be an error message that a person can read; returns it."""
    assert "Traceback" not in said, f"{job}: {said[-3000:]}"
    line = said.strip().splitlines()[-1]
    assert len(line) > 20, f"{job} said only {line!r}"
    return line

"""Many independent pieces of work in one folder: shares for processes, atomic commits, resuming after a kill.

    work = Worklist("out", ["market1501/0002", "market1501/0007"])
    for piece in share(work.pieces, num_shards=4, shard=1):
        if work.read(piece, "done") is None:
            with work.scratch() as part:
                (part / "0.txt").write_text("...")
                work.commit(piece, "done", {"files": 1}, {part: f"files/{piece}"})

Processes, hosts and shards share only the folder, and none waits for another. A piece is done when its record exists;
the record is written last. Files are written under `.work/` and moved when they are complete.
"""

import errno
import hashlib
import json
import os
import shutil
import socket
import sys
import time
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from tqdm.auto import tqdm

from utils.files import to_json

SCRATCH = ".work"
RECORDS = "identities"
A_DAY = 24 * 3600


def seed_of(*words):
    """A seed that depends only on `words`, and not on the process or the order of the work."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, words)).encode()).digest()[:6], "big")


def share(pieces, *, num_shards=1, shard=0, num_processes=1, process=0):
    """The pieces of a process: every n-th piece goes to a shard, and every n-th of these to a process of the shard."""
    for name, number, count in (("shard", shard, num_shards), ("process", process, num_processes)):
        if count < 1 or not 0 <= number < count:
            raise ValueError(f"{name} {number} of {count} does not exist; they count from 0")
    return list(pieces)[shard::num_shards][process::num_processes]


class Worklist:
    """Pieces of work, named by relative paths. Their records are the files `folder/identities/PIECE/NAME.json`."""

    def __init__(self, folder, pieces):
        self.folder, self.pieces = Path(folder), list(pieces)

    def record_path(self, piece, name):
        return self.folder / RECORDS / piece / f"{name}.json"

    def read(self, piece, name):
        """The record of a piece, or None if it is missing or damaged. Records are always written whole."""
        try:
            return json.loads(self.record_path(piece, name).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None

    def has(self, piece, name):
        return self.record_path(piece, name).is_file()

    def recorded(self, name):
        """All pieces with a record of this name, sorted; also those that are not in `pieces`."""
        root = self.folder / RECORDS
        return sorted(path.parent.relative_to(root).as_posix() for path in root.glob(f"*/*/{name}.json"))

    @contextmanager
    def scratch(self):
        """A new temporary folder on the same disk, removed at the end of the block."""
        part = self.folder / SCRATCH / f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}"
        part.mkdir(parents=True)
        try:
            yield part
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def write(self, path, content):
        """Write a file below the folder, whole or not at all."""
        path = self.folder / path
        with self.scratch() as part:
            (part / path.name).write_bytes(content if isinstance(content, bytes) else content.encode())
            self.move(part / path.name, path)

    def move(self, part, path):
        """Move a file from a scratch folder to its final path."""
        # safetensors writes files that only the owner can read.
        os.chmod(part, 0o644)
        sync(part)
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(part, path)

    def commit(self, piece, name, record, folders=None):
        """Move `folders` ({scratch folder: path below the work folder}) to their paths, then write the record.

        Folders that an earlier, unfinished commit left at these paths are replaced.
        """
        self.forget(piece, name)
        for part, path in (folders or {}).items():
            path = self.folder / path
            for file in Path(part).rglob("*"):
                if file.is_file():
                    os.chmod(file, 0o644)
                    sync(file)
            path.parent.mkdir(parents=True, exist_ok=True)
            # No test whether the folder exists: another process at the same piece may move it in between.
            with self.scratch() as old, suppress(FileNotFoundError):
                os.rename(path, old / "old")
            try:
                os.rename(part, path)
            except OSError as error:
                # Another process has done the same piece, with the same result.
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
        self.write(self.record_path(piece, name).relative_to(self.folder), to_json(record))

    def extend(self, piece, name, record, files):
        """Move `files` ({scratch file: path below the work folder}) to their paths, then replace the record.

        Other files stay. A kill before the end leaves the old record, which does not know the new files.
        """
        for part, path in files.items():
            self.move(part, self.folder / path)
        self.write(self.record_path(piece, name).relative_to(self.folder), to_json(record))

    def forget(self, piece, name):
        self.record_path(piece, name).unlink(missing_ok=True)

    def tidy(self):
        """Remove what killed runs left behind, and empty folders. Others may still write."""
        for part in (self.folder / SCRATCH).glob("*"):
            if is_abandoned(part):
                shutil.rmtree(part, ignore_errors=True)
        with suppress(OSError):
            (self.folder / SCRATCH).rmdir()
        root = self.folder / RECORDS
        for folder in sorted(root.glob("*/*")) + sorted(root.glob("*")):
            with suppress(OSError):
                folder.rmdir()


class Progress:
    """A live progress bar for the whole folder in a terminal; elsewhere a line for each piece."""

    def __init__(self, work, name, unit, units_per_piece, *, main=True):
        self.work, self.name, self.unit, self.units_per_piece = work, name, unit, units_per_piece
        self.said, self.main = set(), main
        self.began, self.before = time.monotonic(), self.done()
        live = main and sys.stderr.isatty()
        self.bar = tqdm(total=len(work.pieces), initial=self.before, unit="identity", disable=not live)

    def done(self):
        return sum(self.work.has(piece, self.name) for piece in self.work.pieces)

    def once(self, topic, message):
        """Print a message, once for each topic."""
        if self.main and topic not in self.said:
            tqdm.write(message)
        self.said.add(topic)

    def stage(self, piece, what):
        self.bar.set_description_str(f"{piece} {what}")

    def finished(self, piece, failure=None):
        done, minutes = self.done(), (time.monotonic() - self.began) / 60
        new = max(done - self.before, 1)
        rate, left = new * self.units_per_piece / minutes, (len(self.work.pieces) - done) * minutes / new
        self.bar.n = done
        self.bar.set_postfix_str(f"{rate:.0f} {self.unit} a minute")
        if failure:
            tqdm.write(f"{piece} failed: {failure}", file=sys.stderr)
        elif self.bar.disable and self.main:
            status = f"{done} of {len(self.work.pieces)} done, {rate:.0f} {self.unit} a minute, {left:.0f} min left"
            print(f"{piece}: {status}", flush=True)


def is_abandoned(part):
    """Whether nobody writes to a scratch folder any more: its process is gone, or on another host, for a day."""
    host, _, process = part.name.rsplit("-", 1)[0].rpartition("-")
    if host == socket.gethostname() and process.isdecimal():
        return int(process) == os.getpid() or not psutil.pid_exists(int(process))
    with suppress(FileNotFoundError):
        return time.time() - part.stat().st_mtime > A_DAY
    return False


def sync(path):
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def differences(before, now):
    """The differences between two dicts of settings, as text."""
    return [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in sorted(set(before) | set(now))
        if before.get(name) != now.get(name)
    ]

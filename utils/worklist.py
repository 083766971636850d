"""Many independent pieces of work, one folder: shares of them, atomic commits, continuing after a kill.

    work = Worklist("out", ["market1501/0002", "market1501/0007"])
    for piece in share(work.pieces, num_shards=4, shard=1):
        if work.read(piece, "done") is None:
            with work.scratch() as part:
                (part / "0.txt").write_text("...")
                work.commit(piece, "done", {"files": 1}, {part: f"files/{piece}"})

Processes, hosts and shards meet in the folder alone: nobody waits for anybody. A piece is done when its record is
there, and a record is written last. What is being written lies under `.work/` until it is whole.
"""

import errno
import hashlib
import json
import os
import shutil
import sys
import time
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm.auto import tqdm

from utils.files import to_json

SCRATCH = ".work"
RECORDS = "identities"


def seed_of(*words):
    """A seed that depends on nothing but `words`, so not on who draws, when, or after what."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, words)).encode()).digest()[:6], "big")


def share(pieces, *, num_shards=1, shard=0, num_processes=1, process=0):
    """Every n-th piece for a shard, and of those every n-th for a process of it."""
    for name, number, count in (("shard", shard, num_shards), ("process", process, num_processes)):
        if count < 1 or not 0 <= number < count:
            raise ValueError(f"{name} {number} of {count} does not exist; they count from 0")
    return list(pieces)[shard::num_shards][process::num_processes]


class Worklist:
    """Pieces, named by relative paths, whose records lie in `folder/identities/PIECE/NAME.json`."""

    def __init__(self, folder, pieces):
        self.folder, self.pieces = Path(folder), list(pieces)

    def record_path(self, piece, name):
        return self.folder / RECORDS / piece / f"{name}.json"

    def read(self, piece, name):
        """A piece's record, or None. Only whole records are ever there; one damaged since counts as none."""
        try:
            return json.loads(self.record_path(piece, name).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None

    def has(self, piece, name):
        return self.record_path(piece, name).is_file()

    def recorded(self, name):
        """All pieces that have such a record, listed here or not, sorted."""
        root = self.folder / RECORDS
        return sorted(path.parent.relative_to(root).as_posix() for path in root.glob(f"*/*/{name}.json"))

    @contextmanager
    def scratch(self):
        """A new folder on the same disk, gone when the block ends."""
        part = self.folder / SCRATCH / uuid.uuid4().hex
        part.mkdir(parents=True)
        try:
            yield part
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def write(self, path, content):
        """A file, below the folder, that is whole or not there."""
        path = self.folder / path
        with self.scratch() as part:
            (part / path.name).write_bytes(content if isinstance(content, bytes) else content.encode())
            self.move(part / path.name, path)

    def move(self, part, path):
        """A file written in a scratch folder takes its place."""
        # safetensors makes its files readable for the owner alone.
        os.chmod(part, 0o644)
        sync(part)
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(part, path)

    def commit(self, piece, name, record, folders=None):
        """Folders written in a scratch folder take their places ({from: to, below the work folder}), then the record.

        What an earlier, unfinished commit left in these places is replaced.
        """
        self.forget(piece, name)
        for part, place in (folders or {}).items():
            place = self.folder / place
            for file in Path(part).rglob("*"):
                if file.is_file():
                    os.chmod(file, 0o644)
                    sync(file)
            place.parent.mkdir(parents=True, exist_ok=True)
            # Another process at the same piece may have taken it away: so never "if it is there, then".
            with self.scratch() as old, suppress(FileNotFoundError):
                os.rename(place, old / "old")
            try:
                os.rename(part, place)
            except OSError as error:
                # Another process did the same piece, with the same result.
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
        self.write(self.record_path(piece, name).relative_to(self.folder), to_json(record))

    def forget(self, piece, name):
        self.record_path(piece, name).unlink(missing_ok=True)

    def tidy(self):
        """Remove what killed runs left behind; only when nobody writes any more."""
        shutil.rmtree(self.folder / SCRATCH, ignore_errors=True)
        root = self.folder / RECORDS
        for folder in sorted(root.glob("*/*")) + sorted(root.glob("*")):
            with suppress(OSError):
                folder.rmdir()


class Progress:
    """One live line for the whole folder, or where nobody looks a line a piece."""

    def __init__(self, work, name, unit, units_per_piece, *, main=True):
        self.work, self.name, self.unit, self.units_per_piece = work, name, unit, units_per_piece
        self.said, self.main = set(), main
        self.began, self.before = time.monotonic(), self.done()
        live = main and sys.stderr.isatty()
        self.bar = tqdm(total=len(work.pieces), initial=self.before, unit="identity", disable=not live)

    def done(self):
        return sum(self.work.has(piece, self.name) for piece in self.work.pieces)

    def once(self, topic, words):
        """Say something the first time it comes up."""
        if self.main and topic not in self.said:
            tqdm.write(words)
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
            word = f"{done} of {len(self.work.pieces)} done, {rate:.0f} {self.unit} a minute, {left:.0f} min left"
            print(f"{piece}: {word}", flush=True)


def sync(path):
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def differences(before, now):
    """What differs between two dicts of settings, as words."""
    return [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in sorted(set(before) | set(now))
        if before.get(name) != now.get(name)
    ]

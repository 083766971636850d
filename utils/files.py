"""Files that are written whole or not at all, JSON and CSV, and the record of a run: arguments, versions, revision."""

import csv
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

# Entries of the parsed arguments that are not flags: scripts use them internally.
NO_ARGUMENTS = ("free_on_resume", "notes")
PACKAGES = ("torch", "torchvision", "transformers", "diffusers", "accelerate", "peft", "datasets", "numpy")


@contextmanager
def write_together(folder):
    """Files that appear together: `with write_together(out) as part: part("a.json").write_text(...)`.

    `part(name)` is the temporary file to write `name` to. When the block ends without an error, the files are renamed.
    After an error, such as a full disk, the temporary files are removed and older files stay as they were.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = []

    def path_of(name):
        names.append(name)
        return folder / f"{name}.part"

    try:
        yield path_of
        for name in names:
            part = folder / f"{name}.part"
            # safetensors makes its files readable by the owner only.
            os.chmod(part, 0o666 & ~_umask())
            with open(part, "rb+") as file:
                os.fsync(file.fileno())
    except BaseException:
        for name in names:
            (folder / f"{name}.part").unlink(missing_ok=True)
        raise
    for name in names:
        os.replace(folder / f"{name}.part", folder / name)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def to_json(value):
    """Indented JSON that any parser reads: NaN and infinity become null, tensors become lists, paths become text.

    Lists of plain values stay on one line.
    """
    return _indented(_plain(value), "") + "\n"


def _indented(value, margin):
    inner = margin + "  "
    if isinstance(value, dict) and value:
        items = (f"{inner}{json.dumps(key)}: {_indented(item, inner)}" for key, item in value.items())
        return "{\n" + ",\n".join(items) + f"\n{margin}}}"
    if isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        return "[\n" + ",\n".join(inner + _indented(item, inner) for item in value) + f"\n{margin}]"
    return json.dumps(value, allow_nan=False)


def _plain(value):
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value not in (float("inf"), float("-inf")) and value == value:
        return value
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return None if isinstance(value, float) else str(value)


def write_csv(path, columns, rows):
    """Write CSV. Text that starts with `= + - @`, tab or return gets a leading `'`: spreadsheets read no formulas."""

    def safe(cell):
        return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell

    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([safe(cell) for cell in row] for row in rows)


def versions():
    """Versions of Python and of the packages that affect results, the device's name, the repository's revision."""
    values = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            values[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    # A run that has not loaded torch used no GPU.
    torch = sys.modules.get("torch")
    with_gpu = torch is not None and torch.cuda.is_available()
    values["device"] = torch.cuda.get_device_name() if with_gpu else platform.processor() or "cpu"
    values["git"] = git_revision()
    return values


def git_revision():
    """Commit of this file's checkout, with `-dirty` if tracked files were changed; None outside of git."""

    def git(*command):
        # Without its lock: a status that is killed would leave the repository locked.
        words, place = ("git", "--no-optional-locks", *command), Path(__file__).parent
        return subprocess.run(words, cwd=place, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def run_record(args):
    """The content of `args.json`: the command, its arguments, versions."""
    arguments = {name: value for name, value in vars(args).items() if name not in NO_ARGUMENTS}
    return {"command": [Path(sys.argv[0]).name, *sys.argv[1:]], "arguments": arguments, "versions": versions()}


def portable(value):
    """A setting without paths of this machine: only the last part of a path is kept."""
    if isinstance(value, (list, tuple)):
        return [portable(item) for item in value]
    if isinstance(value, str) and value.startswith("--") and "=" in value:
        flag, _, word = value.partition("=")
        return f"{flag}={portable(word)}"
    place, _, options = str(value).rpartition(":")
    if "=" in options and os.path.exists(place):
        return f"{portable(place)}:{options}"
    # Unlike Path.exists, os.path.exists does not raise for words that are too long for a file name.
    if isinstance(value, (str, Path)) and os.path.exists(value):
        return Path(value).resolve().name
    return value


def one_line(error):
    """The message of an error in one line, or its type where it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

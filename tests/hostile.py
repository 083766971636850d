"""What a reader may meet: odd names, values, bytes and JSON; and what every reader owes its user.

outcome(lambda: load_reid(folder), folder.name)     # (data, None), or (None, the line of its ValueError)
fuzz(check, strategy, cases=30)                     # check(value) for so many drawn values
"""

import functools
import json
import os
import struct
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tables import image_bytes
from utils.files import one_line

CASES = [30, pytest.param(2000, marks=pytest.mark.slow)]
PICTURE = image_bytes((200, 30, 60))
# Names that are no valid text stand for bytes, as the file system gives them.
NOT_TEXT = "\udcff.png"
# Contents by the word that stands for them in a drawn layout.
CONTENTS = {"image": PICTURE, "empty": b"", "cut": PICTURE[:40], "text": b"nothing\n", "bytes": b"\xff\xfe\x00\x80,\n"}
HUGE = 10**25
NUMBERS = [0, 1, 7, -1, 2**31, 2**63, 2**64 - 1, HUGE, -HUGE, 0.0, 2.5, 1e30, float("nan"), float("inf")]
WORDS = ["", " ", "7", "0007", "Anna", "anna ", "nan", "None", "9" * 30, "a\nb", "\x00", "人", "true", "1e5", "½", "²"]
SCALARS = st.sampled_from([*NUMBERS, *WORDS, None, True, False])
VALUES = st.one_of(
    SCALARS, st.lists(SCALARS, max_size=2), st.dictionaries(st.sampled_from(WORDS), SCALARS, max_size=2)
)


def fuzz(check, *strategies, cases):
    """Run check(*values) for `cases` drawn values; few of them are always the same, many are others each time."""
    ran = 0

    @functools.wraps(check)
    def counted(*values, **named):
        nonlocal ran
        ran += 1
        return check(*values, **named)

    given(*strategies)(settings(max_examples=cases, derandomize=cases < 100, database=None)(counted))()
    # `pytest -rP -m slow` shows it.
    print(f"{check.__module__}.{check.__qualname__}: {ran} cases")
    assert ran >= cases


def outcome(call, *names):
    """(what a reader returns, None), or (None, the line of its ValueError), which must name one of these.

    Errors of other classes, and ValueErrors of libraries, are no answer to a user.
    """
    try:
        return call(), None
    except ValueError as error:
        line = one_line(error)
        ours = type(error) is ValueError or type(error).__module__.startswith("utils.")
        assert ours and any(str(name) in str(error) for name in names), f"{type(error).__name__}: {error}"
        return None, line


def snapshot(folder):
    """All files below a folder with sizes and times of change: equal as long as nothing is written."""
    found = []
    for level, _, names in os.walk(os.fsencode(folder)):
        for name in names:
            entry = os.lstat(os.path.join(level, name))
            found.append((level, name, entry.st_size, entry.st_mtime_ns))
    return sorted(found)


def write_tree(root, layout):
    """Write drawn (path, word of `CONTENTS`, or "folder"); a file or folder that stands in the way stays."""
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    for path, content in layout:
        place = root / path
        try:
            (place if content == "folder" else place.parent).mkdir(parents=True, exist_ok=True)
            if content != "folder" and not place.exists():
                place.write_bytes(CONTENTS[content] if isinstance(content, str) else content)
        except (FileExistsError, NotADirectoryError):
            continue
    return root


def damaged(draw, content):
    """Bytes, as they are or cut short, changed in one place, doubled, or with something before them."""
    how = draw(st.sampled_from(["whole", "whole", "whole", "cut", "changed", "doubled", "before", "mark"]))
    place = draw(st.integers(0, max(len(content) - 1, 0)))
    if how == "cut":
        return content[:place]
    if how == "changed":
        return content[:place] + bytes([draw(st.integers(0, 255))]) + content[place + 1 :]
    if how == "doubled":
        return content + content
    return {"before": b"\xff\x00", "mark": "\ufeff".encode()}.get(how, b"") + content


def places_in(value, here=()):
    """The address of every value inside JSON."""
    yield here
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        # Of a long list a few places stand for all.
        if not isinstance(key, int) or key < 3:
            yield from places_in(item, (*here, key))


def changed_json(draw, value):
    """A copy of JSON with up to two values replaced, removed or added."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(0, 2))):
        *above, key = (None, *draw(st.sampled_from(list(places_in(value)))))
        if key is None:
            return draw(VALUES)
        inner = value
        for step in above[1:]:
            inner = inner[step]
        how = draw(st.sampled_from(["replace", "replace", "remove", "double"]))
        if how == "replace":
            inner[key] = draw(VALUES)
        elif how == "remove":
            del inner[key]
        elif isinstance(inner, list):
            inner.append(inner[key])
    return value


def safetensors_bytes(header, content):
    """A safetensors file with any header."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content


def case_folder():
    """A new folder for one case, in memory where there is such a disk: thousands of cases write small files."""
    return tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)

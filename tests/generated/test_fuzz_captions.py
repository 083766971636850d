"""Drawn files of captions: every row is read, or the file is refused in one line."""

import csv
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from tests.hostile import CASES, SCALARS, VALUES, case_folder, damaged, fuzz, outcome, snapshot
from utils.datasets.identities import Identity
from utils.generated.texts.captions import QUESTIONS, check_rows, read_captions, row_of
from utils.generated.texts.identity_texts import text_of, texts_from

PEOPLE = [Identity("a", pid, 0, (f"{pid}.jpg",), None, (0,)) for pid in (1, 2)]
COLUMNS = ["pid", "domain", "prompt", "caption", "images", *list(QUESTIONS)[:2]]
WORDS = st.sampled_from(["red coat", "a photo of a person", "  two  words ", "x" * 500, "none", "nothing"])


def answers():
    """What the column `images` may hold."""
    image = st.dictionaries(st.sampled_from(["path", "caption", *QUESTIONS]), st.one_of(WORDS, SCALARS), max_size=3)
    return st.one_of(st.lists(image, max_size=2), VALUES)


@st.composite
def files(draw):
    """(ending, number of rows, bytes, whether they are whole)."""
    columns = ["pid", "prompt"] + draw(st.lists(st.sampled_from(COLUMNS), max_size=3))
    columns = list(dict.fromkeys(columns[draw(st.sampled_from([0, 0, 0, 1])) :]))
    good = {"pid": st.sampled_from([1, 2, "1", "2"]), "domain": st.sampled_from(["a", None, ""]), "images": answers()}
    odd, rows = draw(st.sampled_from([None, None, *columns])), []
    for _ in range(draw(st.integers(0, 3))):
        rows.append({one: draw(VALUES if one == odd else good.get(one, WORDS)) for one in columns})
    kind = draw(st.sampled_from([".csv", ".jsonl", ".parquet", ".parquet", ".txt"]))
    file = io.BytesIO()
    if kind == ".parquet":
        try:
            pq.write_table(pa.Table.from_pylist(rows), file)
        except (pa.ArrowException, OverflowError):
            rows = [{name: str(value) for name, value in row.items()} for row in rows]
            pq.write_table(pa.Table.from_pylist(rows), file)
    elif kind == ".csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(rows)
        file.write(text.getvalue().encode())
    else:
        lines = [json.dumps(row) for row in rows] + draw(
            st.sampled_from([[], [], [], ["7"], ["[1]"], ["{"], ["null"]])
        )
        file.write("\n".join(lines).encode())
    content = damaged(draw, file.getvalue())
    return kind, len(rows), content, content == file.getvalue()


@pytest.mark.parametrize("cases", CASES)
def test_captions(cases):
    def check(drawn):
        kind, count, content, whole = drawn
        with case_folder() as folder:
            path = Path(folder) / f"captions{kind}"
            path.write_bytes(content)
            before = snapshot(folder)
            rows, _ = outcome(lambda: read_captions(path), path)
            if rows is not None:
                assert not whole or len(rows) == count
                for (domain, pid), row in rows.items():
                    assert type(pid) is int and (domain is None or isinstance(domain, str)) and text_of(row).strip()
                outcome(lambda: check_rows(rows, PEOPLE, PEOPLE, path), path)
                texts, _ = outcome(lambda: texts_from(path, PEOPLE, "synthetic"), path)
                if texts is not None:
                    assert texts == [text_of(row_of(rows, identity)) for identity in PEOPLE]
            assert snapshot(folder) == before

    fuzz(check, files(), cases=cases)


def test_a_domain_that_is_no_text(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"pid": 1, "prompt": "red coat", "domain": ["a"]}))
    with pytest.raises(ValueError, match="`domain` of identity 1 must be text"):
        read_captions(tmp_path / "x.jsonl")

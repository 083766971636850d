"""Drawn files of a search: calibrations, kept galleries and features, read rightly or refused in one line."""

import io
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from safetensors.numpy import save
from safetensors.torch import save_file

from kernels import rank_metrics
from tests.evaluation.test_evaluation import people
from tests.hostile import CASES, case_folder, changed_json, damaged, fuzz, outcome, snapshot
from utils.evaluation.calibration import calibrate, read_calibration
from utils.evaluation.decisions import decide, limits, summary
from utils.evaluation.index.search import open_kept, sides_of
from utils.evaluation.index.store import Index, Rows
from utils.evaluation.kept_features import load_features
from utils.evaluation.metrics import check_sides
from utils.evaluation.thresholds import pair_statistics
from utils.files import to_json


@pytest.mark.parametrize("cases", CASES)
def test_calibrations(cases):
    queries, gallery = people(20, 40, num_ids=12)
    whole = calibrate(queries, gallery, pair_statistics(queries, gallery), replicates=20) | {"fingerprint": "f"}
    text = to_json(whole)
    lists = torch.tensor([[0], [3], [-1]]), torch.tensor([[0.2], [1.5], [0.0]])

    def check(data):
        content = damaged(data.draw, json.dumps(changed_json(data.draw, json.loads(text))).encode())
        with case_folder() as folder:
            path = Path(folder) / "calibration.json"
            path.write_bytes(content)
            found, problem = read_calibration(path, "f")
            # A ranking does not need it: a file that cannot be used is a reason, never an error.
            assert (found is None) != (problem is None)
            if problem:
                assert str(path) in problem and "\n" not in problem
                return
        for size in (1, 10**6):
            decisions = decide(found, lists, size)
            assert [one.column for one in decisions] == [0, 3, -1]
            for one in decisions:
                rates = [one.false_match_rate, one.false_alarm_rate, one.miss_rate or 0]
                assert all(math.isfinite(rate) and 0 <= rate <= 1 for rate in rates) and one.describe()
            assert (
                sum(summary(decisions, queries.take(range(3)), gallery)[word] for word in ("yes", "unsure", "nobody"))
                == 3
            )
            limits(found, size, 0.01)

    fuzz(check, st.data(), cases=cases)


ROWS = Rows(["1_c1.jpg", "2_c1.jpg", "x.jpg"], ["1", "2", None], [1, 1, -1], [9, 9, 9], [0, 0, 0], ["aa", "bb", "cc"])
ABOUT = {"model": "m", "weights": "w", "transform": [[64, 32], [0.5], [0.5], 3, "no"], "width": 4}


@pytest.fixture
def kept(tmp_path):
    index = Index(tmp_path / "kept", ABOUT)
    for part in ([0, 1], [2]):
        index.add(torch.eye(4)[part], ROWS.take(part))
    return tmp_path / "kept"


@pytest.mark.parametrize("cases", CASES)
def test_kept_galleries(kept, cases):
    manifest = json.loads((kept / "manifest.json").read_text())

    def search(folder):
        index = open_kept(folder, None, append=False)
        index.check_model(ABOUT)
        queries, gallery, copies = sides_of(torch.eye(4)[:1], ROWS.take([0]), index)
        found = gallery.features[torch.arange(len(gallery))]
        return len(index), gallery, copies, found, index.pids()

    def check(data):
        with case_folder() as place:
            folder = Path(place) / "kept"
            shutil.copytree(kept, folder)
            files = sorted(folder.glob("*.safetensors"))
            what = data.draw(st.sampled_from(["manifest", "manifest", "bytes", "rows", "features", "gone"]))
            changed = manifest
            if what == "manifest":
                changed = changed_json(data.draw, manifest)
                text = damaged(data.draw, json.dumps(changed).encode())
                (folder / "manifest.json").write_bytes(text)
            elif what == "bytes":
                files[0].write_bytes(damaged(data.draw, files[0].read_bytes()))
            elif what == "gone":
                files[1].unlink()
            else:
                rows = (
                    json.dumps(changed_json(data.draw, vars(ROWS.take([0, 1]))))
                    if what == "rows"
                    else json.dumps(vars(ROWS.take([0, 1])))
                )
                features = torch.eye(4)[:2]
                if what == "features":
                    features = data.draw(
                        st.sampled_from([torch.eye(4)[:1], torch.eye(5)[:2], torch.zeros(8), features.half()])
                    )
                tensors = {
                    "features": features.clone(),
                    "rows": torch.frombuffer(bytearray(rows.encode()), dtype=torch.uint8),
                }
                if data.draw(st.sampled_from([False, False, False, True])):
                    tensors.popitem()
                save_file(tensors, files[0])
                size = files[0].stat().st_size
                records = [
                    record | {"bytes": size} if record["file"] == files[0].name else record
                    for record in manifest["files"]
                ]
                (folder / "manifest.json").write_text(json.dumps(manifest | {"files": records}))
            before = snapshot(place)
            found, _ = outcome(lambda: search(folder), folder)
            if found is not None:
                count, gallery, copies, features, pids = found
                assert (
                    count
                    == len(gallery)
                    == len(gallery.pids)
                    == len(gallery.camids)
                    == len(gallery.paths)
                    == len(features)
                )
                assert features.dtype == torch.float32 and features.shape[1] == 4 and len(copies[1]) == count
            assert snapshot(place) == before

    fuzz(check, st.data(), cases=cases)


def ids_of(queries, gallery):
    return queries.pids, gallery.pids, queries.camids, gallery.camids


ARRAYS = [np.eye(4, dtype=np.float32)[:3], np.eye(4)[:2], np.eye(5)[:3], np.zeros(3), np.array(7.0), np.zeros((0, 4))]
ARRAYS += [
    np.array([1, 2, 3]),
    np.array([0, 1, -1]),
    np.array([1.0, 2.0, 3.0]),
    np.array([1.5, 2, 3]),
    np.array([1, 2]),
]
ARRAYS += [
    np.array(["a", "b", "c"]),
    np.full((3, 4), np.nan, dtype=np.float32),
    np.array([[1], [2], [3]]),
    np.array([1e30] * 3),
]
ARRAYS += [
    np.array([2**63] * 3, dtype=np.uint64),
    np.array([True, False, True]),
    np.array([None] * 3),
    np.eye(4)[:3] * 1j,
]
NAMES = ["qf", "gf", "q_pid", "g_pid", "q_cam", "g_cam", "query_features", "0.q_row", "0.q_pid", "features", "g_path"]


@pytest.mark.parametrize("cases", CASES)
def test_features_of_others(cases):
    def check(data):
        good = {"qf": ARRAYS[0], "gf": ARRAYS[0], "q_pid": ARRAYS[6], "g_pid": ARRAYS[6]}
        changes = data.draw(st.dictionaries(st.sampled_from(NAMES), st.sampled_from([None, *ARRAYS]), max_size=3))
        arrays = {name: array for name, array in (good | changes).items() if array is not None}
        kind = data.draw(st.sampled_from(["npz", "npz", "safetensors"]))
        if kind == "npz":
            file = io.BytesIO()
            np.savez(file, **arrays)
            content = file.getvalue()
        else:
            plain = {name: np.ascontiguousarray(array) for name, array in arrays.items() if array.dtype.kind in "fiub"}
            texts = ["[1]", '["a", "b", "c"]', "7", "{", "null", '{"a": 1}', "[[1, 2]]"]
            header = data.draw(
                st.dictionaries(
                    st.sampled_from([*NAMES, "g_path", "q_path", "key"]), st.sampled_from(texts), max_size=2
                )
            )
            content = save(plain, header)
        content = damaged(data.draw, content)
        with case_folder() as folder:
            path = Path(folder) / f"features.{kind}"
            path.write_bytes(content)
            before = snapshot(folder)
            found, _ = outcome(lambda: load_features(path), path)
            for queries, gallery in found[0] if found else ():
                _, refusal = outcome(lambda sides=(queries, gallery): check_sides(*sides), "features", "feature row")
                if refusal is None:
                    sides = queries.features, gallery.features, *ids_of(queries, gallery)
                    outcome(lambda sides=sides: rank_metrics(*sides), "no query identity")
            assert snapshot(folder) == before

    fuzz(check, st.data(), cases=cases)


# Found by drawing


@pytest.mark.parametrize(
    "change",
    [
        b"\xff\xfe",
        b"[]",
        {"format": 2},
        {"about": {}},
        {"about": {**ABOUT, "transform": None}},
        {"files": {}},
        {"files": [{"file": "00000.safetensors", "bytes": 1}]},
        {"files": [{"file": "../00000.safetensors", "rows": 1, "bytes": 1}]},
        {"files": [{"file": "00000.safetensors", "rows": 2**70, "bytes": 1}]},
    ],
)
def test_a_manifest_that_is_none(kept, change):
    path = kept / "manifest.json"
    whole = json.loads(path.read_text())
    path.write_bytes(change if isinstance(change, bytes) else json.dumps(whole | change).encode())
    with pytest.raises(ValueError, match=r"manifest\.json is no manifest of a gallery: .*; remove the folder, or"):
        Index.open(kept)


@pytest.mark.parametrize(
    "rows, features",
    [
        (7, torch.eye(4)[:2]),
        ({"paths": ["a"]}, torch.eye(4)[:2]),
        ({"identities": [{}, None]}, torch.eye(4)[:2]),
        ({"cameras": [2**70, 1]}, torch.eye(4)[:2]),
        ({"digests": {"0": 1, "1": 2}}, torch.eye(4)[:2]),
        ({}, torch.eye(4)[:1]),
        ({}, torch.eye(4)[:2].half()),
        ({}, torch.eye(5)[:2]),
    ],
)
def test_files_of_a_gallery_that_are_not_as_its_manifest_says(kept, rows, features):
    text = json.dumps(rows if rows == 7 else vars(ROWS.take([0, 1])) | rows)
    text = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    save_file({"features": features.clone(), "rows": text}, kept / "00000.safetensors")
    path = kept / "manifest.json"
    content = json.loads(path.read_text())
    content["files"][0]["bytes"] = (kept / "00000.safetensors").stat().st_size
    path.write_text(json.dumps(content))
    index = Index.open(kept)
    with pytest.raises(ValueError, match="00000.safetensors (holds|does not tell)"):
        (index.rows(), index.features())


@pytest.mark.parametrize(
    "arrays, words",
    [
        ({"qf": np.array(7.0)}, "expected .rows, width."),
        ({"qf": None, "0.q_row": np.array([0])}, "does not give rows of features"),
        ({"qf": None, "0.q_row": np.array([9]), "features": np.eye(2)}, "does not give rows of features"),
    ],
)
def test_arrays_that_are_no_features(tmp_path, arrays, words):
    arrays = {"qf": np.eye(2), "gf": np.eye(2)} | arrays
    np.savez(tmp_path / "x.npz", **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(ValueError, match=words):
        load_features(tmp_path / "x.npz")


def test_identities_are_no_text_in_a_header(tmp_path):
    eye = np.eye(2, dtype=np.float32)
    (tmp_path / "x.safetensors").write_bytes(save({"qf": eye, "gf": eye}, {"q_pid": "[1, 2]"}))
    ((queries, _),), _ = load_features(tmp_path / "x.safetensors")
    assert queries.pids.tolist() == [-1, -1]

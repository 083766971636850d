"""A gallery on disk: the same search as of folders, additions, kills, refusals, consent withdrawn."""

import csv
import functools
import json
import shutil

import pytest
import torch

import evaluate
from kernels import rank_metrics
from tests import runs
from tests.runs import launch
from utils import files
from utils.datasets.load import load_reid
from utils.evaluation.forget import forget
from utils.evaluation.index.store import MANIFEST, Index

run = functools.partial(runs.run, evaluate)
refused = functools.partial(runs.refused, evaluate)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("people")
    data = load_reid("synthetic", domain="b", num_ids=5)
    for split in ("query", "gallery"):
        for number, row in enumerate(data[split]):
            path = root / split / f"{row['pid']:04d}_c{row['camid'] + 1}_{number}.png"
            path.parent.mkdir(exist_ok=True)
            row["image"].save(path)
    # The same file on both sides must not find itself.
    first = sorted((root / "query").iterdir())[0]
    shutil.copy(first, root / "gallery" / f"{first.stem}_copy.png")
    return root


@pytest.fixture(scope="module")
def search(folders, clip):
    return ["--model", clip, "--resolution", 64, 32, "--query_dir", folders / "query"]


@pytest.fixture(scope="module")
def kept(folders, search, tmp_path_factory):
    """A gallery of all images but three, and what the run that made it returned."""
    folder = tmp_path_factory.mktemp("kept")
    part = folder / "images"
    shutil.copytree(folders / "gallery", part)
    for path in sorted(part.iterdir())[3:6]:
        path.unlink()
    index = folder / "index"
    metrics = run(*search, "--gallery_dir", part, "--gallery_features", index, "--output_dir", folder / "out")
    return index, metrics


def copy_of(kept, folder):
    shutil.copytree(kept[0], folder)
    return folder


def rankings(folder, name="rankings.csv"):
    with open(folder / name, newline="") as file:
        rows = list(csv.DictReader(file))
    return [(row["query"], row["gallery"], row["match"]) for row in rows], [float(row["distance"]) for row in rows]


def test_a_kept_gallery_is_searched_as_its_folder_is(folders, search, kept, tmp_path):
    index = copy_of(kept, tmp_path / "index")
    common = [*search, "--rerank", "--k1", 5, "--topk", 9]
    run(*common, "--gallery_dir", folders / "gallery", "--output_dir", tmp_path / "folder")
    more = ["--gallery_dir", folders / "gallery", "--append", "--gallery_features", index]
    metrics = run(*common, *more, "--output_dir", tmp_path / "added")
    records = json.loads((index / "manifest.json").read_text())["files"]
    assert [record["rows"] for record in records] == [kept[1]["num_gallery"], 3]
    run(*common, "--gallery_features", index, "--output_dir", tmp_path / "again")
    wanted = json.loads((tmp_path / "folder" / "metrics.json").read_text())
    for name in ("mAP", "mINP", "rank1", "num_valid", "num_gallery", "num_same_files", "protocol"):
        assert metrics[name] == wanted[name]
    assert metrics["num_same_files"] == 1 and metrics["reranked"]["mAP"] == wanted["reranked"]["mAP"]
    for name in ("rankings.csv", "rankings_reranked.csv"):
        pairs, distances = rankings(tmp_path / "folder", name)
        for folder in ("added", "again"):
            other_pairs, others = rankings(tmp_path / folder, name)
            # Additions are further files: equal distances may change places, and batches differ in rounding.
            assert sorted(other_pairs) == sorted(pairs)
            assert max(abs(one - other) for one, other in zip(distances, others, strict=True)) < 1e-4


def test_metrics_from_the_disk_are_those_of_the_rows(kept):
    index = Index.open(kept[0])
    features, rows = index.features(), index.rows()
    pids, cams = torch.tensor([int(name) for name in rows.identities]), torch.tensor(rows.cameras)
    found = rank_metrics(features, features, pids, pids, cams, cams)
    wanted = rank_metrics(features[:], features[:], pids, pids, cams, cams)
    assert found.mAP == wanted.mAP and torch.equal(found.first_match, wanted.first_match)


def test_a_killed_addition_leaves_the_gallery_as_it_was(folders, search, kept, tmp_path, monkeypatch):
    index = copy_of(kept, tmp_path / "index")
    before = (index / "manifest.json").read_bytes()
    real = files.os.replace

    def replace(source, target):
        if str(target).endswith("manifest.json"):
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(files.os, "replace", replace)
    more = ["--gallery_dir", folders / "gallery", "--append", "--gallery_features", index]
    with pytest.raises(KeyboardInterrupt):
        run(*search, *more, "--output_dir", tmp_path / "out")
    monkeypatch.undo()
    # The new file is there, but the gallery does not have it.
    assert (index / "00001.safetensors").is_file() and (index / "manifest.json").read_bytes() == before
    assert len(Index.open(index)) == kept[1]["num_gallery"]
    run(*search, "--gallery_features", index, "--output_dir", tmp_path / "out")
    metrics = run(*search, *more, "--output_dir", tmp_path / "out")
    assert metrics["num_gallery"] == kept[1]["num_gallery"] + 3 == len(Index.open(index).rows())


def test_what_does_not_fit_is_refused_in_one_line(folders, search, kept, tmp_path):
    index = copy_of(kept, tmp_path / "index")
    out, gallery = ["--output_dir", tmp_path / "out"], ["--gallery_dir", folders / "gallery"]
    kept_in = ["--gallery_features", index]
    assert "holds no gallery; give its images by --gallery_dir" in refused(
        *search, "--gallery_features", tmp_path / "none", *out
    )
    assert "holds no gallery to add to" in refused(
        *search, *gallery, "--append", "--gallery_features", tmp_path / "none", *out
    )
    assert "add those of --gallery_dir that are new by --append" in refused(*search, *gallery, *kept_in, *out)
    other = [*search[:2], "--resolution", 32, 32, *search[5:]]
    assert "was extracted with size" in refused(*other, *kept_in, *out)
    half = refused(*search, *kept_in, *out, "--mixed_precision", "bf16")
    assert "was extracted with size" in half and "bf16" in half
    manifest = json.loads((index / "manifest.json").read_text())
    manifest["about"]["weights"] = "0" * 64
    (index / "manifest.json").write_text(json.dumps(manifest))
    assert "has other weights; give its model by --model" in refused(*search, *kept_in, *out)
    (index / "manifest.json").write_text("{}")
    assert "is no manifest of a gallery" in refused(*search, *kept_in, *out)
    shutil.copy(kept[0] / "manifest.json", index)
    path = index / "00000.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "it was cut short or replaced" in refused(*search, *kept_in, *out)
    changed = tmp_path / "changed"
    shutil.copytree(folders / "gallery", changed)
    first, *_, last = sorted(changed.iterdir())
    shutil.copy(last, first)
    shutil.copy(kept[0] / "00000.safetensors", index)
    more = ["--gallery_dir", changed, "--append"]
    assert f"{first.name} in {changed} is another image" in refused(*search, *more, *kept_in, *out)


def test_an_identity_leaves_the_kept_gallery(kept, search, tmp_path):
    index = copy_of(kept, tmp_path / "index")
    rows = Index.open(index).rows()
    pid = int(rows.identities[0])
    wanted = rows.identities.count(str(pid))
    (line,) = forget(index, pid=pid, dry_run=True)
    assert line.endswith(f"{wanted} rows removed") and len(Index.open(index)) == len(rows)
    # A file that a kill left after the manifest was written without it.
    shutil.copy(next(index.glob("0*.safetensors")), index / "00099.safetensors")
    assert Index.open(index).without("nobody", {"gallery": set()}, dry_run=False) == [
        f"{index / '00099.safetensors'}: deleted, as {MANIFEST} does not name it"
    ]
    assert not (index / "00099.safetensors").exists() and len(Index.open(index)) == len(rows)
    forget(index, pid=pid, paths=[rows.paths[-1]])
    left = Index.open(index)
    assert str(pid) not in left.rows().identities and len(left) == len(rows) - wanted - 1
    assert [path.name for path in index.glob("*.safetensors")] == ["00001.safetensors"]
    kept_rows = [row for row in range(len(rows) - 1) if rows.identities[row] != str(pid)]
    assert torch.equal(left.features()[:], Index.open(kept[0]).features()[torch.tensor(kept_rows)])


@pytest.mark.slow
def test_two_processes_search_as_one(folders, search, kept, tmp_path):
    for folder, processes in (("one", 1), ("two", 2)):
        index = copy_of(kept, tmp_path / f"index {folder}")
        more = ["--gallery_dir", folders / "gallery", "--append", "--gallery_features", index, "--rerank", "--k1", 5]
        launch("evaluate.py", *search, *more, "--output_dir", tmp_path / folder, processes=processes)
    for name in ("rankings.csv", "rankings_reranked.csv"):
        one, two = ((tmp_path / folder / name).read_bytes() for folder in ("one", "two"))
        assert one == two


def test_two_additions_at_once_do_not_lose_images(kept, tmp_path):
    place = copy_of(kept, tmp_path / "kept")
    first, second = Index.open(place), Index.open(place)
    rows = first.rows().take([0])
    first.add(first.features()[[0]], rows)
    with pytest.raises(ValueError, match="was changed by another command meanwhile; run this one again"):
        second.add(second.features()[[0]], rows)
    assert len(Index.open(place)) == len(first) == len(second) + 1
    assert not list(place.glob("*.part"))


def test_a_search_without_labels(folders, clip, tmp_path):
    """Nobody is known on either side: ranked lists by name, in a report without pictures."""
    for side in ("query", "gallery"):
        for number, path in enumerate(sorted((folders / side).iterdir())[:4]):
            (tmp_path / side).mkdir(exist_ok=True)
            shutil.copy(path, tmp_path / side / f"{side}{number}.png")
    words = ["--model", clip, "--resolution", 64, 32, "--query_dir", tmp_path / "query"]
    words += ["--gallery_dir", tmp_path / "gallery", "--gallery_features", tmp_path / "kept"]
    assert run(*words, "--output_dir", tmp_path / "out")["mAP"] is None
    assert len(rankings(tmp_path / "out")[0]) >= 4 * 3
    report = (tmp_path / "out" / "report.html").read_text()
    assert "query0.png" in report and "gallery3.png" in report

"""The same file on both sides is no match: against dense rankings with those pairs taken out."""

import functools
import re
import shutil

import datasets
import pytest
import torch
import torch.nn.functional as F

import evaluate
from kernels import k_reciprocal_rerank, rank_metrics
from tests import runs
from tests.tables import paint
from utils.datasets.load import load_reid
from utils.datasets.search_folders import read_folders
from utils.evaluation.kept_features import load_features
from utils.evaluation.lists import can_match, ranked_lists
from utils.evaluation.metrics import Side, kept_labels, rank
from utils.evaluation.self_matches import check_labels, same_files, share_labels
from utils.evaluation.thresholds import pair_statistics

run = functools.partial(runs.run, evaluate)


@pytest.fixture
def sides():
    """24 queries in a gallery of 60: of every second one a copy is there, of some two."""
    generator = torch.Generator().manual_seed(3)
    features = F.normalize(torch.randn(60, 8, generator=generator), dim=1)
    pids, camids = torch.arange(60) % 7, torch.arange(60) // 7 % 3
    gallery = Side(features, pids, camids, [f"g{row}" for row in range(60)], torch.full((60,), -1))
    rows = torch.arange(24)
    contents = torch.where(rows % 2 == 0, rows, -1)
    gallery.contents[rows] = contents
    gallery.contents[7 * 8 :] = torch.tensor([0, -1, 2, -1])
    gallery.pids[[56, 58]] = gallery.pids[[0, 2]]
    queries = Side(features[rows] + 0.05 * torch.randn(24, 8, generator=generator), pids[rows], camids[rows],
                   [f"q{row}" for row in range(24)], contents)  # fmt: skip
    return queries, gallery


def kept_by_hand(queries, gallery, row):
    return torch.tensor(
        [queries.contents[row] < 0 or content != queries.contents[row] for content in gallery.contents]
    )


def precisions(scores, queries, gallery):
    for row in range(len(queries)):
        kept = kept_by_hand(queries, gallery, row)
        order = scores[row][kept].argsort(descending=True)
        matches = (gallery.pids[kept][order] == queries.pids[row]).nonzero().flatten() + 1.0
        yield (torch.arange(1, len(matches) + 1) / matches).mean().item(), int(matches[0])


def test_metrics_and_lists_leave_the_same_file_out(sides):
    queries, gallery = sides
    scores = F.normalize(queries.features, dim=1) @ gallery.features.T
    wanted, firsts = zip(*precisions(scores, queries, gallery), strict=True)
    result = rank(queries, gallery, protocol="all")
    assert result.ap.tolist() == pytest.approx(wanted, abs=1e-6) and result.first_match.tolist() == list(firsts)
    columns, _ = ranked_lists(queries, gallery, 60, protocol="all")
    for row, listed in enumerate(columns.tolist()):
        kept = kept_by_hand(queries, gallery, row)
        order = kept.nonzero().flatten()[scores[row][kept].argsort(descending=True)]
        assert [column for column in listed if column >= 0] == order.tolist()
    pairs = pair_statistics(queries, gallery, protocol="all")
    same = queries.pids[:, None] == gallery.pids
    kept = torch.stack([kept_by_hand(queries, gallery, row) for row in range(24)])
    assert (pairs.num_matches, pairs.num_non_matches) == (int((same & kept).sum()), int((~same).sum()))
    # Without `contents`, and in the kernels themselves, nothing is dropped.
    ids = queries.pids, gallery.pids, None, None
    whole = rank_metrics(queries.features, gallery.features, *ids, protocol="all")
    assert whole.mAP > result.mAP and float(whole.cmc[0]) > float(result.cmc[0])
    queries.contents = gallery.contents = None
    assert rank(queries, gallery, protocol="all").mAP == whole.mAP


def test_re_ranked_metrics_too(sides):
    queries, gallery = sides
    reranking = k_reciprocal_rerank(queries.features, gallery.features, k1=5, k2=2)
    wanted = [precision for precision, _ in precisions(-reranking.dense(), queries, gallery)]
    labels, protocol = kept_labels(queries, gallery, "all")
    assert reranking.metrics(*labels, protocol=protocol).ap.tolist() == pytest.approx(wanted, abs=1e-6)


def test_nobody_but_oneself():
    side = Side(torch.eye(2), torch.tensor([1, 2]), torch.tensor([0, 0]), ["a", "b"], torch.tensor([0, 1]))
    assert not can_match(side, side, "all")
    assert ranked_lists(side, side, 2, protocol="all")[0].tolist() == [[1, -1], [0, -1]]


def test_files_are_compared_by_content(tmp_path):
    for name, colour in (("query/a", 1), ("query/b", 2), ("gallery/other", 1), ("gallery/again", 1), ("gallery/c", 3)):
        paint(tmp_path / f"{name}.png", (colour, 0, 0))
    query, gallery = read_folders(tmp_path / "query", tmp_path / "gallery")
    images = datasets.concatenate_datasets([query, gallery])
    split = ([0, 1], [], []), ([2, 3, 4], [], [])
    queries, others, count = same_files(images, split)
    assert list(gallery["path"]) == ["again.png", "c.png", "other.png"]
    assert (queries.tolist(), others.tolist(), count) == ([0, -1], [0, -1, 0], 2)


def test_a_copy_without_a_label_has_that_of_the_query():
    def side(pids, camids, contents):
        return Side(torch.eye(3)[: len(pids)], *map(torch.tensor, (pids, camids)), list("abc"), torch.tensor(contents))

    queries, gallery = side([4, 5, -1], [0, -1, -1], [0, 1, 2]), side([-1, 7, 9], [2, 1, 1], [0, 1, 2])
    assert share_labels(queries, gallery) == 1
    assert (queries.pids.tolist(), gallery.pids.tolist()) == ([4, 5, 9], [4, 5, 9])
    assert queries.camids.tolist() == gallery.camids.tolist() == [0, 1, 1]


def test_a_folder_searched_in_itself(clip, tmp_path, capsys):
    """With labels, without, and against a copy under other names, whose labels are those of the same files."""
    data = load_reid("synthetic:domain=b,num_ids=4,images_per_id=4")
    for number, row in enumerate(data["gallery"]):
        path = tmp_path / "mine" / f"{row['pid']:04d}_c{row['camid'] + 1}_{number}.png"
        path.parent.mkdir(exist_ok=True)
        row["image"].save(path)
    shutil.copytree(tmp_path / "mine", tmp_path / "copy")
    for number, path in enumerate(sorted((tmp_path / "copy").iterdir())):
        path.rename(tmp_path / "copy" / f"{number}.png")
    common = ("--model", clip, "--resolution", 64, 32, "--output_dir", tmp_path / "out")
    count, measured = len(data["gallery"]), []
    for gallery in ("mine", "copy"):
        folders = ("--query_dir", tmp_path / "mine", "--gallery_dir", tmp_path / gallery)
        metrics = run(*common, *folders, "--protocol", "all", "--rerank", "--k1", 5)
        assert metrics["num_same_files"] == count and metrics["rank1"] < 1 and metrics["reranked"]["rank1"] < 1
        assert f"{count} pairs of query and gallery are the same file" in capsys.readouterr().out
        assert "pairs of query and gallery, dropped" in (tmp_path / "out/report.html").read_text()
        measured.append(metrics["mAP"])
    assert measured[0] == pytest.approx(measured[1])
    # Names tell nothing: no metrics, and nobody finds the very same file.
    run(*common, "--query_dir", tmp_path / "copy", "--gallery_dir", tmp_path / "copy", "--topk", 3)
    rows = (tmp_path / "out/rankings.csv").read_text().splitlines()[1:]
    assert len(rows) == 3 * count
    assert not any(row.split(",")[0] == row.split(",")[2] for row in rows)


def test_published_protocols_stay(clip, tmp_path):
    common = ("--model", clip, "--resolution", 64, 32, "--data", "synthetic:domain=b,num_ids=4")
    metrics = run(*common, "--output_dir", tmp_path / "out")
    assert "num_same_files" not in metrics
    assert run(*common, "--protocol", "all", "--output_dir", tmp_path / "out")["num_same_files"] == 0


def test_an_own_folder_without_cameras_holds_copies(clip, tmp_path):
    """Its gallery counts as another camera: nothing else would keep a copy from being found first."""
    data = load_reid("synthetic:domain=b,num_ids=4,images_per_id=8")
    names = {pid: f"person{pid}" for pid in data["gallery"]["pid"]}
    for number, row in enumerate(data["gallery"]):
        path = tmp_path / "people" / names[row["pid"]] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        row["image"].save(path)
    for path in sorted((tmp_path / "people").glob("*/*.png")):
        shutil.copy(path, path.with_name(f"again{path.name}"))
    options = "--model", clip, "--resolution", 64, 32, "--data", tmp_path / "people", "--output_dir", tmp_path / "out"
    metrics = run(*options)
    (queries, gallery), *_ = load_features(tmp_path / "out" / "features.safetensors")[0]
    scores, same = queries.features @ gallery.features.T, queries.pids[:, None] == gallery.pids
    copies = scores > 1 - 1e-6
    assert metrics["num_same_files"] == int((copies & same).sum()) > 4
    nearest = scores.masked_fill(copies, -2).argmax(1)
    wanted = float(same[range(len(queries)), nearest].double().mean())
    # With its copies every query would find itself.
    assert metrics["rank1"] == pytest.approx(wanted) and wanted < 1 and metrics["protocol"] == "market"

    other = sorted(names.values())[0]
    query = next(path for path in queries.paths if not path.startswith(f"{other}/"))
    for number in range(4):
        shutil.copy(tmp_path / "people" / query, tmp_path / "people" / other / f"wrong{number}.png")
    with pytest.raises(ValueError, match=rf"same file as a query of another identity, such as .*{other}.*correct"):
        run(*options, "--protocol", "all")


@pytest.mark.parametrize(
    "names, shown", [(None, "(3) and q/1.png (2)"), (["a", "b", "c", "d"], "(d) and q/1.png (c)")]
)
def test_a_file_with_two_identities_is_named_on_both_sides(names, shown):
    images = {"path": ["q/0.png", "q/1.png", "g/0.png", "g/1.png", "g/2.png"]}
    split = ([0, 1], [1, 2], [0, 0]), ([2, 3, 4], [2, 1, 3], [1, 1, 1])
    query, gallery = torch.tensor([-1, 7]), torch.tensor([7, -1, 7])
    with pytest.raises(ValueError, match=r"set: 1 gallery images .* such as g/2.png " + re.escape(shown)):
        check_labels(query, gallery, split, images, names, "set")


def test_the_same_file_is_dropped_where_its_camera_is_unknown(sides):
    """Beside cameras that are known and shared; other images without a camera stay."""
    queries, gallery = sides
    queries.camids[::3], gallery.camids[::3] = -1, -1
    result = rank(queries, gallery, protocol="market")
    scores = F.normalize(queries.features, dim=1) @ gallery.features.T
    for row in range(len(queries)):
        same = gallery.pids == queries.pids[row]
        dropped = same & (gallery.camids == queries.camids[row]) & (gallery.camids >= 0)
        kept = kept_by_hand(queries, gallery, row) & ~dropped
        order = scores[row][kept].argsort(descending=True)
        assert int(result.first_match[row]) == int(same[kept][order].nonzero().flatten()[0]) + 1


def test_reranked_distances_are_none_below_zero():
    """Rounding would give equal rows some, which a table would take for formulas."""
    gallery = Side(F.normalize(torch.randn(20, 8, generator=torch.Generator().manual_seed(0)), dim=1),
                   torch.arange(20), torch.ones(20).long(), [str(row) for row in range(20)])  # fmt: skip
    queries = Side(gallery.features.clone(), gallery.pids, torch.zeros(20).long(), gallery.paths)
    for weight in (0.0, 0.3, 1.0):
        reranking = k_reciprocal_rerank(queries.features, gallery.features, k1=5, k2=1, lambda_value=weight)
        assert ranked_lists(queries, gallery, 5, reranking=reranking)[1].min() >= 0

"""app.py without its page: the gallery it opens, the results it shows, what it refuses. And the page in a browser."""

import asyncio
import base64
import json
import re
import shutil
import sys
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import app
from kernels.disk.rows import RowsOnDisk
from kernels.reranking import k_reciprocal_rerank_reference
from tests.runs import refused
from utils.batches.transforms import test_transform as make_transform
from utils.datasets.load import load_reid
from utils.datasets.search_folders import read_folders
from utils.evaluation import gallery_search
from utils.evaluation.calibration import calibrate, fingerprint, write_calibration
from utils.evaluation.features import extract
from utils.evaluation.forget import forget
from utils.evaluation.gallery_search import Query, picked_query, search, uploaded_query
from utils.evaluation.index.search import rows_of
from utils.evaluation.index.store import Index, about_model
from utils.evaluation.metrics import Side
from utils.evaluation.thresholds import pair_statistics
from utils.flags import CLIP_DIR
from utils.modeling.reid_model import ReIDModel


@pytest.fixture(scope="module")
def cameras(tmp_path_factory):
    """A folder of drawn people: 6 identities, 24 images, 4 cameras."""
    folder = tmp_path_factory.mktemp("cameras")
    for row in load_reid("synthetic", domain="b", num_ids=6)["gallery"]:
        row["image"].save(folder / Path(row["path"]).name)
    return folder


@pytest.fixture
def arguments(clip, cameras, tmp_path):
    return ["--model", clip, "--resolution", "64", "32", "--gallery_dir", str(cameras), "--output_dir", str(tmp_path)]


@pytest.fixture
def gallery(arguments, accelerator):
    return app.open_gallery(app.parse_args(arguments), accelerator)


@pytest.fixture(scope="module")
def wanted():
    """The file of an image that the gallery does not have."""
    return as_png(load_reid("synthetic", domain="b", num_ids=6)["query"][2]["image"])


def as_png(image):
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


# The gallery


def test_features_are_those_of_the_model_and_are_kept(arguments, accelerator, clip, cameras, monkeypatch, capsys):
    gallery = app.open_gallery(app.parse_args(arguments), accelerator)
    model = ReIDModel.from_backbone(clip, image_size=(64, 32)).eval()
    transform = make_transform(model.image_size, model.image_mean, model.image_std, model.resample)
    paths = sorted(path.name for path in cameras.iterdir())
    with torch.no_grad():
        expected = torch.cat([model(transform(Image.open(cameras / path).convert("RGB"))[None]) for path in paths])
    assert gallery.side.paths == paths and gallery.cameras() == {0: 6, 1: 6, 2: 6, 3: 6}
    assert gallery.side.pids.tolist() == [int(path[:4]) for path in paths]
    torch.testing.assert_close(gallery.side.features, expected, rtol=0, atol=1e-5)
    assert "extracted before" not in capsys.readouterr().out

    called = []
    monkeypatch.setattr(app, "extract", lambda *words, **options: called.append(1) or extract(*words, **options))
    again = app.open_gallery(app.parse_args(arguments), accelerator)
    assert "extracted before" in capsys.readouterr().out and not called
    assert torch.equal(again.side.features, gallery.side.features) and again.image_of(3).size == (64, 128)
    app.open_gallery(app.parse_args([*arguments, "--eval_batch_size", "7"]), accelerator)
    assert called


def test_people_with_names_are_shown_by_name(arguments, accelerator, cameras, tmp_path):
    """Also when the features were stored under another name of the folder."""
    words = [*arguments, "--gallery_dir", str(tmp_path / "people")]
    files = sorted(cameras.iterdir())
    for name, file in zip(("anna", "bert"), files, strict=False):
        (tmp_path / "people" / name).mkdir(parents=True)
        shutil.copy(file, tmp_path / "people" / name / "1.png")
    for renamed in ("anna", "anke"):
        if renamed == "anke":
            (tmp_path / "people/anna").rename(tmp_path / "people/anke")
        gallery = app.open_gallery(app.parse_args(words), accelerator)
        page = app.Page(gallery, app.parse_args(words))
        page.pick("one", 0)
        assert "identity bert" in page.results("one", [], 3, False)
        assert gallery.side.identity_name(0) == renamed


def test_an_unreadable_image_is_left_out_on_every_start(arguments, accelerator, cameras, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(cameras, folder)
    (folder / "0001_c1_bad.png").write_bytes(b"no image")
    words = [*arguments, "--gallery_dir", str(folder), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="1 of 25 images cannot be read"):
        app.open_gallery(app.parse_args(words), accelerator)
    for _ in range(2):
        gallery = app.open_gallery(app.parse_args([*words, "--skip_unreadable"]), accelerator)
        assert len(gallery) == 24 and all(gallery.image_of(row) is not None for row in range(24))


def test_kept_features_open_with_their_images_and_their_model(gallery, accelerator, cameras, clip, tmp_path):
    words = ["--features", str(tmp_path / "features.safetensors"), "--output_dir", str(tmp_path / "page")]
    words += ["--resolution", "64", "32"]
    named = app.open_gallery(app.parse_args(words), accelerator)
    assert named.model_name == clip and named.image_of(0) is None and len(named) == 24
    pictured = app.open_gallery(app.parse_args([*words, "--image_root", str(cameras)]), accelerator)
    assert torch.equal(pictured.side.features, gallery.side.features) and pictured.image_of(5).size == (64, 128)
    other = tmp_path / "other"
    CLIPVisionModelWithProjection(CLIPVisionConfig.from_pretrained(clip)).save_pretrained(other)
    for changed, problem in (
        (["--image_root", str(tmp_path)], "has no image of .*, such as 0001_c1"),
        (["--image_root", str(cameras), "--model", str(other)], r"holds other features of .* \(cosine -?0\."),
        (["--model", CLIP_DIR], "holds features 16 wide, those of .* are 128"),
    ):
        with pytest.raises(ValueError, match=problem):
            app.open_gallery(app.parse_args([*words, *changed]), accelerator)
    tensors = load_file(tmp_path / "features.safetensors")
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="does not say which model its features are of; give it by --model"):
        app.open_gallery(app.parse_args(["--features", str(tmp_path / "other.safetensors")]), accelerator)
    save_file(tensors, tmp_path / "leaving.safetensors", metadata={"g_path": json.dumps(["../x.png"] * 24)})
    words = ["--features", str(tmp_path / "leaving.safetensors"), "--model", clip, "--image_root", str(cameras)]
    with pytest.raises(ValueError, match="leaves"):
        app.open_gallery(app.parse_args(words), accelerator)


@pytest.fixture
def kept(gallery, cameras, clip, tmp_path):
    """A gallery as `evaluate.py --gallery_features` keeps it, in two files."""
    index = Index(tmp_path / "kept")
    index.check_model(about_model(clip, gallery.model, "no"))
    images = read_folders(cameras, cameras)[1]
    for rows in (range(15), range(15, 24)):
        index.add(3 * gallery.side.features[list(rows)], rows_of(images.select(rows), index))
    return tmp_path / "kept"


def test_a_gallery_on_disk_is_searched_as_one_in_memory(gallery, kept, accelerator, cameras, wanted, monkeypatch):
    words = ["--gallery_features", str(kept), "--resolution", "64", "32", "--output_dir", str(kept.parent)]
    # Blocks that end inside a file.
    monkeypatch.setattr(gallery_search, "BLOCK_ROWS", 7)
    named = app.open_gallery(app.parse_args(words), accelerator)
    assert isinstance(named.side.features, RowsOnDisk) and named.image_of(0) is None
    pictured = app.open_gallery(app.parse_args([*words, "--image_root", str(cameras)]), accelerator)
    assert pictured.image_of(20).size == (64, 128) and pictured.cameras() == gallery.cameras()
    assert pictured.side.paths == gallery.side.paths and pictured.side.pids.tolist() == gallery.side.pids.tolist()
    copy = (cameras / gallery.side.paths[17]).read_bytes()
    for content in (wanted, copy):
        for options in ({}, {"cameras": [1, 3]}, {"rerank": True, "k1": 4, "k2": 2}):
            expected, *found = (
                search(place, uploaded_query(place, "x.png", content), count=9, **options)
                for place in (gallery, named, pictured)
            )
            for results in found:
                assert (results.rows, results.same, results.searched) == (
                    expected.rows, expected.same, expected.searched
                )  # fmt: skip
                assert results.scores == pytest.approx(expected.scores, abs=1e-6)
    assert search(pictured, picked_query(pictured, 17), count=9).same == [gallery.side.paths[17]]


def test_a_gallery_on_disk_that_does_not_fit(gallery, kept, accelerator, clip, tmp_path):
    words = ["--gallery_features", str(kept), "--output_dir", str(tmp_path / "out")]
    for changed, problem in (
        (["--resolution", "32", "32"], "was extracted with size"),
        (["--model", CLIP_DIR, "--resolution", "64", "32"], "holds features of .*, .* has other weights"),
        (["--resolution", "64", "32", "--image_root", str(tmp_path / "kept")], "has no image of"),
    ):
        with pytest.raises(ValueError, match=problem):
            app.open_gallery(app.parse_args([*words, *changed]), accelerator)
    with pytest.raises(ValueError, match="holds no gallery; give its images"):
        app.open_gallery(app.parse_args(["--gallery_features", str(tmp_path / "none")]), accelerator)
    index = Index.open(kept)
    index.add(torch.full((1, 16), torch.nan), index.rows().take([0]))
    damaged = app.open_gallery(app.parse_args([*words, "--resolution", "64", "32"]), accelerator)
    with pytest.raises(ValueError, match="kept holds features that are NaN, infinite or zero"):
        damaged.cosines(torch.ones(16))
    for more in (["--gallery_dir", "x"], ["--features", "y"]):
        with pytest.raises(SystemExit):
            app.parse_args(["--gallery_features", "kept", *more])


def test_an_identity_can_be_taken_out_of_the_kept_features(gallery, tmp_path):
    assert forget(tmp_path, pid=3) == [f"{tmp_path / 'features.safetensors'}: 4 rows removed"]
    assert 3 not in load_file(tmp_path / "features.safetensors")["g_pid"].tolist()


# A search


@pytest.fixture
def spread(gallery):
    """A gallery with features of clusters, 4 images each: those of a model without training are nearly equal."""
    random = torch.Generator().manual_seed(0)
    centres, noise = torch.randn(6, 1, 16, generator=random), torch.randn(6, 4, 16, generator=random)
    gallery.side.features = torch.nn.functional.normalize((centres + 0.6 * noise).flatten(0, 1), dim=1)
    wanted = torch.nn.functional.normalize(centres[2] + 0.6 * torch.randn(1, 16, generator=random), dim=1)
    return gallery, Query(wanted, "wanted", None)


def dense(gallery, query, rows):
    """(rows, cosines) of these gallery rows, best first, in float64."""
    features, wanted = gallery.side.features.double(), query.feature.double()[0]
    cosines = torch.stack([(features[row] * wanted).sum() / (features[row].norm() * wanted.norm()) for row in rows])
    order = cosines.argsort(descending=True, stable=True)
    return [rows[place] for place in order.tolist()], cosines[order]


@pytest.mark.parametrize("cameras_kept", [(), (1,), (0, 3)])
def test_the_ranking_is_by_cosine_among_the_chosen_cameras(spread, cameras_kept):
    gallery, query = spread
    rows = [row for row in range(24) if not cameras_kept or int(gallery.side.camids[row]) in cameras_kept]
    expected, cosines = dense(gallery, query, rows)
    for count in (1, 5, 100):
        results = search(gallery, query, cameras=cameras_kept, count=count)
        assert results.rows == expected[:count] and results.searched == len(rows) and results.same == []
        torch.testing.assert_close(torch.tensor(results.scores).double(), cosines[:count], rtol=0, atol=1e-6)
    assert search(gallery, query, cameras=[9]).rows == []


@pytest.mark.parametrize("reranked", [7, 1000])
def test_reranking_is_that_of_the_definition_among_the_nearest(spread, monkeypatch, reranked):
    gallery, query = spread
    monkeypatch.setattr(gallery_search, "RERANKED", reranked)
    options = {"k1": 4, "k2": 2, "lambda_value": 0.3}
    for kept in ((), (0, 2)):
        rows = [row for row in range(24) if not kept or int(gallery.side.camids[row]) in kept]
        near = sorted(dense(gallery, query, rows)[0][:reranked])
        features = gallery.side.features.double()[near]
        distances = k_reciprocal_rerank_reference(query.feature.double(), features, **options)[0]
        order = distances.argsort(stable=True)[:5]
        results = search(gallery, query, cameras=kept, count=5, rerank=True, **options)
        assert results.rows == [near[place] for place in order.tolist()]
        torch.testing.assert_close(torch.tensor(results.distances).double(), distances[order], rtol=0, atol=1e-5)
        assert results.reranked == min(reranked, len(rows)) and results.searched == len(rows)
        # The nearest of all, whatever is shown.
        for count in (1, 5):
            nearest = search(gallery, query, cameras=kept, count=count, rerank=True, **options).nearest
            assert nearest == pytest.approx(float(dense(gallery, query, rows)[1][0]), abs=1e-6)


def test_equal_features_are_ranked_by_their_place(spread):
    gallery, query = spread
    gallery.side.features[[4, 9, 20]] = query.feature[0]
    for count in (2, 3):
        assert search(gallery, query, count=count).rows == [4, 9, 20][:count]


def test_the_file_of_the_query_is_no_result(arguments, accelerator, cameras, tmp_path):
    folder = tmp_path / "copies"
    shutil.copytree(cameras, folder)
    name = sorted(path.name for path in folder.iterdir())[5]
    shutil.copy(folder / name, folder / f"{name[:-4]}_copy.png")
    words = [*arguments, "--gallery_dir", str(folder), "--output_dir", str(tmp_path / "out")]
    gallery = app.open_gallery(app.parse_args(words), accelerator)
    same = [name, f"{name[:-4]}_copy.png"]
    row = gallery.side.paths.index(name)
    for query in (uploaded_query(gallery, "x.png", (folder / name).read_bytes()), picked_query(gallery, row)):
        results = search(gallery, query, count=100)
        assert sorted(results.same) == sorted(same) and results.searched == len(results.rows) == 23
        assert not set(same) & {gallery.side.paths[row] for row in results.rows}
    # The same pixels in another file are a result.
    other = as_png(Image.open(folder / name).convert("RGBA"))
    assert search(gallery, uploaded_query(gallery, "x.png", other), count=100).same == []


# The decision


def calibrate_for(model, folder):
    """A calibration by 60 invented people of two images, whose features are far apart, in the model's folder."""
    rows = torch.nn.functional.normalize(torch.randn(60, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    sides = [
        Side(rows, torch.arange(60), torch.full((60,), camera), [str(pid) for pid in range(60)]) for camera in (0, 1)
    ]
    content = calibrate(*sides, pair_statistics(*sides, protocol="all"), protocol="all", replicates=20)
    write_calibration({"fingerprint": fingerprint(model)} | content, folder)
    return content


def test_decisions_are_those_of_evaluate(gallery, arguments, tmp_path):
    folder = tmp_path / "model"
    gallery.model.save_pretrained(folder)
    gallery.model_name = str(folder)
    page = app.Page(gallery, app.parse_args(arguments))
    assert page.calibration is None and "calibration.json does not exist" in page.no_calibration
    content = calibrate_for(gallery.model, folder)
    page = app.Page(gallery, app.parse_args(arguments))
    assert page.no_calibration is None
    assert app.decision_of(0.99, page.calibration, 24).startswith("same person: unsure, score 0.990")
    assert app.decision_of(0.99, page.calibration, 24, accepted=0.9).startswith("same person: yes")
    assert app.decision_of(-0.5, page.calibration, 24).startswith("nobody: no gallery image passes")
    page.pick("one", 7)
    score = search(gallery, page.queries["one"], count=1).scores[0]
    expected = app.decision_of(score, content, 23)
    assert expected in page.results("one", [], 3, False)
    gallery.model.backbone.requires_grad_(False)
    next(gallery.model.parameters()).add_(1)
    page = app.Page(gallery, app.parse_args(arguments))
    assert page.calibration is None and "is of another model" in page.no_calibration


# What the page shows


@pytest.fixture
def page(gallery, arguments):
    return app.Page(gallery, app.parse_args([*arguments, "--k1", "4"]))


def test_uploads_and_picks_of_one_session_are_its_own(page, wanted):
    assert page.upload("one", "/home/x/wanted.png", base64.b64encode(wanted).decode()) == ""
    assert page.queries["one"].name == "wanted.png" and list(page.queries) == ["one"]
    html = page.results("one", [1], 3, True)
    rows = [int(row) for row in re.findall(r'data-row="(\d+)"', html)]
    results = search(page.gallery, page.queries["one"], cameras=[1], count=3, rerank=True, k1=4, k2=6)
    assert rows == results.rows and "6 gallery images of camera 2 searched" in html
    assert "Re-ranked with all 6 of them" in html and f"re-ranked {results.distances[0]:.3f}" in html
    assert "No decision" in html and "--calibrate" in html
    # Another page that is open has no query: it shows the gallery.
    assert "Upload a query" in page.results("two", [], 3, False)
    assert page.pick("two", 7) == "" and page.gallery.side.paths[7] in page.query("two")
    assert "Left out, the same file as the query" in page.results("two", [], 3, False)
    assert 'aria-label="same identity"' in page.results("two", [], 24, False)
    page.forget("one")
    assert list(page.queries) == ["two"]
    found = page.results("one", [], 3, False, "0003_C")
    assert len(re.findall("data-row", found)) == 4


def test_what_is_no_image_and_no_row_is_refused_in_words(page, monkeypatch):
    assert "x.png cannot be read as an image" in page.upload("one", "x.png", base64.b64encode(b"text").decode())
    assert page.upload("one", "x.png", "%%%") and page.upload("one", "x.png", None)
    monkeypatch.setattr(app, "MOST_BYTES", 10)
    assert "too large, at most 10 bytes" in page.upload("one", "x.png", "A" * 40)
    for row in (24, -1, "3", None, 2.0):
        assert "the gallery has rows 0 to 23" in page.pick("one", row)
    assert page.queries == {}


def test_names_of_files_are_text_in_the_page(page, wanted):
    name = "<img src=x onerror=alert(1)>{{7*7}}${1+1}.png"
    page.gallery.side.paths[:] = [f"{number}{name}" for number in range(24)]
    assert page.upload("one", name, base64.b64encode(wanted).decode()) == ""
    for html in (page.query("one"), page.results("one", [], 5, False), page.results("two", [], 5, False)):
        assert "<img src=x" not in html and "{" not in html and "$" not in html
        assert "&lt;img src=x" in html and "&#123;&#123;7*7" in html


# What is refused


def test_only_this_computer_is_listened_on(capsys, tmp_path):
    for name in ("0.0.0.0", "192.168.0.7", "example.org", "::"):
        with pytest.raises(SystemExit):
            app.parse_args(["--server_name", name])
        assert "has no login, so it listens on 127.0.0.1 only" in capsys.readouterr().err
    assert app.parse_args(["--server_name", "localhost"])
    with pytest.raises(SystemExit):
        app.parse_args(["--features", "x.npz", "--gallery_dir", "y"])
    assert "leave out --gallery_dir" in capsys.readouterr().err


def test_without_gradio_one_line_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(app, "open_gallery", lambda *_: pytest.fail("the gallery was opened"))
    assert "pip install -r requirements-app.txt" in refused(app, "--output_dir", tmp_path)


def asked(path, host):
    """(status, headers) that the guard lets through, of an app that always answers."""
    sent = []

    async def inner(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": path, "headers": [(b"host", host.encode())] if host else []}
    asyncio.run(app.Guard(inner)(scope, None, send))
    return sent[0]["status"], dict(sent[0]["headers"])


def test_the_guard_closes_what_the_page_does_not_use():
    status, headers = asked("/gradio_api/queue/join", "127.0.0.1:7860")
    assert status == 200 and headers[b"content-security-policy"].startswith(b"default-src 'self' data:")
    assert asked("/", "localhost:7860")[0] == 200
    for path, host in (
        ("/", "rebound.example:7860"),
        ("/", "127.0.0.1.example.org:7860"),
        ("/", ""),
        ("/gradio_api/upload", "127.0.0.1:7860"),
        ("/gradio_api/file=/etc/passwd", "127.0.0.1:7860"),
        ("/gradio_api/proxy=http://example.org", "127.0.0.1:7860"),
        ("/file/x", "127.0.0.1:7860"),
    ):
        assert asked(path, host)[0] == 403, (path, host)

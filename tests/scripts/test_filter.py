"""filter_generated.py: scores against formulas, the choice, interruptions, processes, what comes out, bad input."""

import json
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPProcessor

import filter_generated as script
from tests import runs
from tests.runs import ROOT, launch
from utils import synthetic
from utils.datasets.load import load_reid
from utils.flags import CAPTIONER_DIR, CLIP_DIR
from utils.generated import choosing
from utils.generated import images as generated_images
from utils.generated.calibration import calibration_scores, cameras_missing, scores_across_cameras
from utils.generated.drawn_set import BROKEN, World, write_drawn
from utils.generated.texts.agreement import agreements
from utils.modeling.reid_model import ReIDModel

SOURCE = "synthetic:domain=a,num_ids=4,images_per_id=6"
PIECE = 8
SMALL = ["--source", SOURCE, "--resolution", "64", "32", "--num_train_epochs", "1", "--train_batch_size", "8"]
SMALL += ["--eval_batch_size", "8", "--dataloader_num_workers", "0", "--classifier_epochs", "1"]
COLUMNS = [
    "path",
    "clip_score",
    "cctf_score",
    "reid_score",
    "reid_match",
    "reid_lead",
    "nearest",
    "perceptual_hash",
    "error",
]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(generated_images, "PIECE", PIECE)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return write_drawn(tmp_path_factory.mktemp("drawn") / "set", World(num_ids=4)).parent


def run(generated, output_dir, *more):
    return runs.run(script, "--generated", generated, "--output_dir", output_dir, *SMALL, *more)


@pytest.fixture(scope="module")
def whole(drawn, tmp_path_factory):
    """An unbroken run that trains its models."""
    folder = tmp_path_factory.mktemp("whole")
    before, generated_images.PIECE = generated_images.PIECE, PIECE
    run(drawn, folder, "--keep_fraction", "0.5")
    generated_images.PIECE = before
    return folder


def trained(whole):
    names = {"reid_model": "reid-synthetic-a", "classifier_model": "classifier-synthetic-a"}
    return [word for flag, name in names.items() for word in (f"--{flag}", str(whole / "models" / name))]


def table(folder, columns=None):
    return pq.read_table(folder / "scores.parquet", columns=columns)


def same_scores(one, other):
    for name in COLUMNS:
        left, right = (table(folder)[name] for folder in (one, other))
        if pa.types.is_floating(left.type):
            left, right = (np.array(side.to_pylist(), float) for side in (left, right))
            np.testing.assert_allclose(left, right, atol=1e-5)
        else:
            assert left.equals(right), name


def test_scores_are_those_of_the_formulas(drawn, whole):
    rows = [row for row in table(whole).to_pylist() if row["error"] is None]
    pictures = [Image.open(drawn / row["path"]).convert("RGB") for row in rows]
    train = load_reid(SOURCE)["train"]
    pids = np.array(train["pid"][:])
    clip, processor = CLIPModel.from_pretrained(CLIP_DIR), CLIPProcessor.from_pretrained(CLIP_DIR)
    sentences = ["a photo of a person", *script.OTHER_SENTENCES]
    reid = ReIDModel.from_pretrained(whole / "models" / "reid-synthetic-a").eval()
    classifier = ReIDModel.from_pretrained(whole / "models" / "classifier-synthetic-a").eval()

    def seen_by(model, images):
        transform = script.view_of(model).transform()
        return torch.stack([transform(image.convert("RGB")) for image in images])

    with torch.no_grad():
        size = {"height": 128, "width": 64}
        inputs = processor(text=sentences, images=pictures, padding=True, return_tensors="pt", size=size)
        person = clip(**inputs, interpolate_pos_encoding=True).logits_per_image.softmax(1)[:, 0]
        raw = classifier.backbone(seen_by(classifier, pictures))
        shares = classifier.neck(raw)[1].softmax(1)
        cosines = reid(seen_by(reid, pictures)) @ reid(seen_by(reid, train["image"][:])).T
    for number, row in enumerate(rows):
        own = sorted((cosines[number].numpy())[pids == row["pid"]])[-3:]
        label = sorted(set(pids)).index(row["pid"])
        assert row["clip_score"] == pytest.approx(person[number].item(), abs=1e-4)
        assert row["cctf_score"] == pytest.approx(shares[number, label].item(), abs=1e-4)
        assert row["reid_score"] == pytest.approx(float(np.mean(own)), abs=1e-4)
        top = train["path"][:].index(row["nearest"])
        assert cosines[number, top] == pytest.approx(cosines[number].max().item(), abs=1e-4)
        assert row["reid_match"] == (pids[top] == row["pid"])
        assert row["reid_lead"] == pytest.approx(cosines[number].max().item() - float(own[-1]), abs=1e-4)


def test_reid_scores_of_made_up_features():
    generator = torch.Generator().manual_seed(0)
    features, gallery = (F.normalize(torch.randn(n, 16, generator=generator), dim=1) for n in (7, 11))
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 2])
    gallery_labels = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2, 1, 1, 1])
    scores, nearest, match, lead = script.reid_scores(features, labels, gallery, gallery_labels)
    for row, label in enumerate(labels.tolist()):
        cosines = [float(features[row] @ one) for one in gallery]
        own = sorted(one for one, its in zip(cosines, gallery_labels.tolist(), strict=True) if its == label)
        assert scores[row].item() == pytest.approx(np.mean(own[-3:]), abs=1e-5)
        assert nearest[row] == np.argmax(cosines)
        assert match[row] == (gallery_labels[nearest[row]] == label)
        assert lead[row].item() == pytest.approx(max(cosines) - own[-1], abs=1e-5)
        assert not match[row] or lead[row] == 0
    assert 0 < match.sum() < len(match)


def test_calibration_scores_of_made_up_features():
    generator = torch.Generator().manual_seed(1)
    features = F.normalize(torch.randn(12, 8, generator=generator), dim=1)
    labels, held_out = torch.arange(12) % 3, torch.arange(12) >= 9
    genuine, impostor = calibration_scores(features, labels, held_out)
    want = {True: [], False: []}
    for query in range(9, 12):
        for label in range(3):
            own = [float(features[query] @ features[row]) for row in range(9) if labels[row] == label]
            want[bool(labels[query] == label)].append(np.mean(sorted(own)[-3:]))
    np.testing.assert_allclose(sorted(genuine), sorted(want[True]), atol=1e-5)
    np.testing.assert_allclose(sorted(impostor), sorted(want[False]), atol=1e-5)


def test_sources_of_one_camera_each_are_said():
    def source(camids):
        labels = torch.tensor([0, 0, 1, 1])
        return SimpleNamespace(domain="own", train={"camid": camids}, labels=labels, held_out=labels == 1)

    assert cameras_missing({"own": source([0, 1, 0, 0])}) == []
    (line,) = cameras_missing({"own": source([0, 0, 1, 1])})
    assert line.startswith("WARNING: no identity of own is seen by two cameras")


@pytest.mark.parametrize("cameras", [3, 1])
def test_scores_across_cameras_of_made_up_features(cameras):
    """Query 9 has no image of its identity in another camera; where there is one camera, it counts."""
    generator = torch.Generator().manual_seed(1)
    features = F.normalize(torch.randn(12, 8, generator=generator), dim=1)
    labels, held_out = torch.arange(12) % 3, torch.arange(12) >= 9
    camids = torch.arange(12) // 3 % cameras
    camids[labels == 0] = 0
    scores, leads = scores_across_cameras(features, labels, camids, held_out)
    wanted = []
    for query in range(9, 12):
        seen = [row for row in range(9) if cameras == 1 or camids[row] != camids[query]]
        cosine = {row: float(features[query] @ features[row]) for row in seen}
        own = sorted(cosine[row] for row in seen if labels[row] == labels[query])[-3:]
        if own:
            wanted.append((np.mean(own), max(cosine.values()) - own[-1]))
    assert len(wanted) == (3 if cameras == 1 else 2)
    np.testing.assert_allclose(torch.stack([scores, leads], 1), wanted, atol=1e-5)


def test_the_default_threshold_is_that_of_other_cameras(drawn, whole):
    """95 % of the held-out images reach it; a nearer stranger costs twice its lead, and rejects by itself no more."""
    run(drawn, whole)
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["choice"]["true_match_rate"] == 0.95 and summary["choice"]["false_match_rate"] is None
    stored = load_file(whole / "calibration.safetensors")
    across = (stored["synthetic-a/across"] - 2 * stored["synthetic-a/across_lead"]).numpy()
    threshold = summary["sources"]["synthetic-a"]["threshold"]
    assert threshold == pytest.approx(sorted(across)[int(0.05 * len(across))])
    for row in table(whole).to_pylist():
        assert row["kept"] == (row["error"] is None and row["reid_score"] - 2 * row["reid_lead"] >= threshold - 1e-6)
    chosen = summary["against_truth"]["reid"]["chosen"]
    rows = table(whole).to_pylist()
    for truth, share in chosen.items():
        kept = [row["kept"] for row in rows if row["truth"] == truth]
        assert share == pytest.approx(sum(kept) / len(kept))


def test_changed_clothes_are_no_evidence_of_an_identity(drawn, tmp_path, whole):
    """They set no threshold, fill no --min_per_id, and are fewer than the images in own clothes."""
    source = tmp_path / "set"
    shutil.copytree(drawn, source)
    rows = pq.read_table(source / "metadata.parquet").to_pylist()
    for row in rows:
        # Of the first identity all but one image, of the others every second.
        changed = row["seed"] > 0 if row["pid"] == 0 else row["seed"] % 2
        row["changed"] = "upper" if changed else None
    schema = pq.read_schema(source / "metadata.parquet")
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), source / "metadata.parquet")
    out = tmp_path / "out"
    run(source, out, *trained(whole), "--threshold", "-9", "--match_margin", "9", "--min_per_id", "2")
    scored = table(out).to_pylist()
    for pid in (0, 2, 4, 6):
        kept = [row["changed"] for row in scored if row["pid"] == pid and row["kept"]]
        assert pid == 0 and not kept or 0 < sum(map(bool, kept)) < len(kept) / 2
    assert {row["rejected"] for row in scored if row["pid"] == 0 and row["changed"] and not row["error"]} == {
        choosing.CHANGED
    }
    run(source, out, *trained(whole), "--keep_fraction", "0.5", "--match_margin", "9")
    scored = table(out).to_pylist()
    own = sorted((row["reid_score"] for row in scored if not row["changed"] and not row["error"]), reverse=True)
    count = sum(not row["changed"] for row in scored)
    threshold = json.loads((out / "summary.json").read_text())["sources"]["synthetic-a"]["threshold"]
    assert threshold == pytest.approx(own[round(0.5 * count) - 1])


def test_what_does_not_decode_is_rejected_with_its_reason(whole):
    rows = table(whole).to_pylist()
    bad = [row for row in rows if row["error"]]
    assert len(bad) == 2 and all(row["truth"] == BROKEN and not row["kept"] for row in bad)
    assert {row["rejected"] for row in bad} == {choosing.UNREADABLE}
    assert json.loads((whole / "summary.json").read_text())["rejected"][choosing.UNREADABLE] == 2


def test_choosing_again_loads_no_model(drawn, whole, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a model is loaded")

    before = table(whole, COLUMNS)
    for kind in (ReIDModel, CLIPModel):
        monkeypatch.setattr(kind, "from_pretrained", refuse)
    run(drawn, whole, "--filter", "clip", "--threshold", "0.0", "--target_per_id", "3")
    rows = table(whole).to_pylist()
    for pid in (0, 2, 4, 6):
        mine = [row for row in rows if row["pid"] == pid and row["error"] is None]
        best = sorted(mine, key=lambda row: -row["clip_score"])[:3]
        assert {row["path"] for row in mine if row["kept"]} == {row["path"] for row in best}
    assert table(whole, COLUMNS).equals(before)
    assert len(load_reid(str(whole / "dataset"))["train"]) == 12


def test_a_margin_lets_strangers_in_by_their_lead(drawn, whole):
    leads = sorted(row["reid_lead"] for row in table(whole).to_pylist() if row["reid_match"] is False)
    assert len(leads) > 2
    margin = (leads[0] + leads[1]) / 2
    run(drawn, whole, "--threshold", "-1", "--match_margin", margin)
    for row in table(whole).to_pylist():
        assert row["kept"] == (row["error"] is None and (row["reid_match"] or row["reid_lead"] <= margin))
    assert json.loads((whole / "summary.json").read_text())["choice"]["match_margin"] == margin


def test_choosing_again_waits_for_no_library_of_models(drawn, whole):
    command = ["--generated", drawn, "--output_dir", whole, *SMALL, "--keep_fraction", "0.3"]
    code = (
        "import sys, filter_generated as script; from utils.generated import images as generated_images\n"
        f"generated_images.PIECE = {PIECE}\n"
        "script.main(script.parse_args(sys.argv[1:]))\n"
        "print([name for name in ('transformers', 'diffusers', 'accelerate') if name in sys.modules])"
    )
    done = subprocess.run(
        list(map(str, [sys.executable, "-c", code, *command])), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "choosing from" in done.stdout and done.stdout.rstrip().endswith("[]")


def put_together(folder, *sets):
    """One generated folder of several."""
    folder.mkdir()
    tables = []
    for one in sets:
        shutil.copytree(one / "images", folder / "images", dirs_exist_ok=True)
        tables.append(pq.read_table(one / "metadata.parquet"))
    pq.write_table(pa.concat_tables(tables), folder / "metadata.parquet")
    return folder


def test_two_sources_each_with_its_models_and_threshold(drawn, tmp_path):
    other = write_drawn(tmp_path / "c", World(domain="c", num_ids=3), num_damaged=0).parent
    both = put_together(tmp_path / "both", drawn, other)
    models = {}
    for place, (domain, count) in enumerate((("a", 4), ("c", 3))):
        torch.manual_seed(place)
        model = ReIDModel.for_training(CLIP_DIR, num_ids=count, image_size=(64, 32)).eval()
        models[domain] = model
        model.save_pretrained(tmp_path / "models" / domain)
    # In the order of --source.
    names = [str(tmp_path / "models" / domain) for domain in "ca"]
    more = ["--source", "synthetic:domain=c,num_ids=3,images_per_id=6", SOURCE]
    more += ["--reid_model", *names, "--classifier_model", *names, "--clip_model", "none"]
    limits = {"synthetic-a": 0.9, "synthetic-c": 0.8}
    folder = tmp_path / "out"
    run(both, folder, *more, "--threshold", *(f"{domain}={limit}" for domain, limit in limits.items()))
    rows = table(folder).to_pylist()
    assert len(rows) == 70
    for row in rows:
        wanted = row["error"] is None and row["reid_match"] and row["reid_score"] >= limits[row["domain"]]
        assert row["kept"] == wanted and row["clip_score"] is None
    for domain, spec in (("a", SOURCE), ("c", more[1])):
        train = load_reid(spec)["train"]
        transform = script.view_of(models[domain]).transform()
        gallery = torch.stack([transform(image.convert("RGB")) for image in train["image"][:]])
        row = next(row for row in rows if row["domain"] == f"synthetic-{domain}" and row["error"] is None)
        with torch.no_grad(), Image.open(both / row["path"]) as image:
            cosines = models[domain](transform(image.convert("RGB"))[None]) @ models[domain](gallery).T
        own = cosines[0][torch.tensor(train["pid"][:]) == row["pid"]]
        assert row["reid_score"] == pytest.approx(own.topk(3).values.mean().item(), abs=1e-4)
        assert row["nearest"].startswith(f"synthetic-{domain}/")
    kept = [row for row in rows if row["kept"]]
    opened = load_reid(str(folder / "dataset"))["train"]
    assert sorted(zip(opened["domain"], opened["path"], strict=True)) == sorted(
        (row["domain"], row["path"]) for row in kept
    )
    summary = json.loads((folder / "summary.json").read_text())
    assert {domain: one["threshold"] for domain, one in summary["sources"].items()} == limits
    assert summary["identities"] == len({(row["domain"], row["pid"]) for row in kept})


@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_the_set_opens_everywhere_and_holds_the_very_files(drawn, whole, kind):
    run(drawn, whole, "--keep_fraction", "0.5", "--format", kind)
    kept = {row["path"]: row for row in table(whole).to_pylist() if row["kept"]}
    opened = load_reid(str(whole / "dataset"))["train"]
    assert sorted(opened["path"][:]) == sorted(kept)
    for row in opened:
        assert row["pid"] == kept[row["path"]]["pid"] and row["domain"] == "synthetic-a"
        with Image.open(drawn / row["path"]) as image:
            np.testing.assert_array_equal(np.array(row["image"]), np.array(image.convert("RGB")))
    plain = datasets.load_dataset(str(whole / "dataset"), split="train", cache_dir=str(whole / "cache" / kind))
    assert len(plain) == len(kept) and all(plain["synthetic"][:])
    card = (whole / "dataset" / "README.md").read_text()
    assert f"{len(kept)} images" in card and str(whole.parent) not in card
    assert "drawn by code" in card and "diffusion model" not in card
    assert "Disagreements" in (whole / "report.html").read_text()


CHILD = """
import os, signal, sys
from utils.generated import images as generated_images, scoring as filter_scoring
import filter_generated
generated_images.PIECE = {piece}
write, left = filter_scoring.pq.write_table, [{stop}]
def write_table(*args, **options):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(*args, **options)
filter_scoring.pq.write_table = write_table
filter_generated.main(filter_generated.parse_args(sys.argv[1:]))
"""


def child(tmp_path, generated, output_dir, *more, stop=0, **options):
    code = tmp_path / "child.py"
    code.write_text(CHILD.format(piece=PIECE, stop=stop))
    return launch(code, "--generated", generated, "--output_dir", output_dir, *SMALL, *more, **options)


def test_killed_in_the_middle_it_goes_on_to_the_same_scores(drawn, whole, tmp_path):
    folder = tmp_path / "out"
    more = [*trained(whole), "--keep_fraction", "0.5"]
    killed = child(tmp_path, drawn, folder, *more, stop=3, check=False)
    assert killed.returncode == -signal.SIGKILL
    pieces = sorted(path.name for path in (folder / ".pieces").glob("*.parquet"))
    assert pieces == ["00000000.parquet", "00000008.parquet"] and not (folder / "scores.parquet").exists()
    # Those that were damaged since are made again.
    for name in ("00000000.npy", "00000008.parquet"):
        (folder / ".pieces" / name).write_bytes((folder / ".pieces" / name).read_bytes()[:40])
    run(drawn, folder, *more)
    same_scores(whole, folder)
    assert not (folder / ".pieces").exists()


def test_two_processes_give_the_same_scores(drawn, whole, tmp_path):
    folder = tmp_path / "out"
    child(tmp_path, drawn, folder, *trained(whole), "--keep_fraction", "0.5", processes=2)
    same_scores(whole, folder)


def test_no_domain_puts_a_model_elsewhere(tmp_path):
    domain, rows = "x/../../../elsewhere\n# <b>|", []
    for number in range(9):
        Image.new("RGB", (32, 64), (40 * number, 0, 0)).save(tmp_path / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "path": f"{number}.png", "pid": number // 3, "camid": 0})
    (tmp_path / "set").mkdir()
    for folder in ("source", "generated"):
        (tmp_path / "set" / folder).mkdir()
        # Of the third person nothing is generated.
        its = rows if folder == "source" else rows[:6]
        for row in its:
            shutil.copy(tmp_path / row["file_name"], tmp_path / "set" / folder)
        written = pa.Table.from_pylist([row | {"domain": domain} for row in its])
        pq.write_table(written, tmp_path / "set" / folder / "metadata.parquet")
    more = ["--clip_model", "none", "--classifier_model", "none", "--keep_fraction", "1"]
    run(tmp_path / "set" / "generated", tmp_path / "set" / "out", "--source", tmp_path / "set" / "source", *more)
    assert [path.name for path in (tmp_path / "set" / "out" / "models").iterdir()] == [
        "reid-x%2F..%2F..%2F..%2Felsewhere%0A%23%20%3Cb%3E%7C"
    ]
    lines = (tmp_path / "set" / "out" / "dataset" / "README.md").read_text().splitlines()
    told = [line for line in lines if "elsewhere" in line]
    assert told[0].startswith("| x/../../../elsewhere # &lt;b>\\| | 6 | 6 | 2 | 9 |")
    assert "elsewhere # &lt;b>\\|: images made from 2 of its identities, 0 of them with none kept" in told[1]
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["generated", "out", "source"]
    assert set(load_reid(str(tmp_path / "set" / "out" / "dataset"))["train"]["domain"]) == {domain}


def test_another_size_is_that_of_every_image(drawn, whole):
    run(drawn, whole, "--keep_fraction", "0.5", "--resize", "32", "16")
    opened = load_reid(str(whole / "dataset"))["train"]
    assert {image.size for image in opened["image"][:]} == {(16, 32)}
    assert "| 32 x 16 |" in (whole / "dataset" / "README.md").read_text()


def test_nothing_left_keeps_the_scores_and_names_a_threshold(drawn, whole, tmp_path):
    folder = tmp_path / "out"
    with pytest.raises(ValueError, match="nothing is left of 40 images") as error:
        run(drawn, folder, *trained(whole), "--threshold", "1.5")
    same_scores(whole, folder)
    assert not (folder / "dataset").exists()
    words = str(error.value).split("--threshold ")[1].split(" ")[0]
    run(drawn, folder, *trained(whole), "--threshold", words)
    rows = table(folder).to_pylist()
    could = sum(bool(row["reid_match"]) for row in rows)
    assert sum(row["kept"] for row in rows) == max(1, could // 2)


def test_scores_of_other_models_are_refused(drawn, whole):
    with pytest.raises(ValueError, match="scores of other models or images: reid_model was 'trained'"):
        run(drawn, whole, *trained(whole)[:2], "--keep_fraction", "0.5")
    with pytest.raises(ValueError, match="seed was 0 and is 3"):
        run(drawn, whole, "--seed", "3", "--keep_fraction", "0.5")


@pytest.mark.parametrize("name", ["scores.parquet", "features.npy", "calibration.safetensors"])
def test_damaged_results_are_made_again(drawn, whole, tmp_path, name):
    folder, more = tmp_path / "out", [*trained(whole), "--keep_fraction", "0.5"]
    run(drawn, folder, *more)
    (folder / name).write_bytes((folder / name).read_bytes()[:40])
    run(drawn, folder, *more)
    same_scores(whole, folder)
    assert (folder / name).stat().st_size > 40


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_damaged_clip_is_known_before_anything_is_trained(drawn, tmp_path, name):
    shutil.copytree(CLIP_DIR, tmp_path / "clip")
    (tmp_path / "clip" / name).write_bytes((tmp_path / "clip" / name).read_bytes()[:2000])
    with pytest.raises(ValueError, match="--clip_model: .*/clip' cannot be loaded: "):
        run(drawn, tmp_path / "out", "--clip_model", tmp_path / "clip")
    assert not (tmp_path / "out" / "models").exists()


def test_scores_that_are_no_numbers_stop_it(drawn, whole, tmp_path):
    model = ReIDModel.from_pretrained(whole / "models" / "classifier-synthetic-a")
    with torch.no_grad():
        next(parameter for name, parameter in model.named_parameters() if "classifier" in name).fill_(torch.nan)
    model.save_pretrained(tmp_path / "classifier")
    more = [*trained(whole)[:2], "--classifier_model", tmp_path / "classifier", "--keep_fraction", "0.5"]
    with pytest.raises(ValueError, match="scores of images/.*0.jpg are not finite"):
        run(drawn, tmp_path / "out", *more)


def test_the_source_is_found_in_the_generated_folder(drawn, tmp_path):
    (drawn / "args.json").write_text(json.dumps({"arguments": {"source": ["synthetic:domain=b,num_ids=4"]}}))
    args = script.parse_args(["--generated", str(drawn), "--output_dir", str(tmp_path)])
    with pytest.raises(ValueError, match="has images of synthetic-a, --source only synthetic-b"):
        script.main(args)
    (drawn / "args.json").write_text(json.dumps({"arguments": {"source": ["people"]}}))
    args = script.parse_args(["--generated", str(drawn / "metadata.parquet"), "--output_dir", str(tmp_path)])
    with pytest.raises(ValueError, match="'people' is neither a known set nor .*last names only: give --source"):
        script.main(args)
    for source in (None, [], [3], "market1501"):
        (drawn / "args.json").write_text(json.dumps({"arguments": {"source": source}}))
        args = script.parse_args(["--generated", str(drawn), "--output_dir", str(tmp_path)])
        with pytest.raises(ValueError, match="does not say what it was made from; give --source"):
            script.main(args)
    (drawn / "args.json").unlink()


def test_a_generated_folder_without_images_is_named(drawn, tmp_path):
    """What is missing, and what to do: before anything else is looked at."""
    nowhere = tmp_path / "nowhere"
    with pytest.raises(ValueError, match=f"--generated {nowhere}: there is no such folder; give one that train_dream"):
        script.main(script.parse_args(["--generated", str(nowhere), "--output_dir", str(tmp_path / "out")]))
    captioned = tmp_path / "captioned"
    (captioned / "identities" / "synthetic-a" / "0000").mkdir(parents=True)
    (captioned / "args.json").write_text(json.dumps({"arguments": {"source": [SOURCE]}}))
    for more in ([], ["--source", SOURCE]):
        args = script.parse_args(["--generated", str(captioned), "--output_dir", str(tmp_path / "out"), *more])
        with pytest.raises(ValueError, match="holds captions and no images; run .* again, without --captions_only"):
            script.main(args)
    shutil.copytree(drawn / "images", captioned / "images")
    with pytest.raises(ValueError, match="no metadata.parquet yet: run train_dreambooth_reid.py there to its end, or"):
        script.main(args)
    assert not (tmp_path / "out").exists()


def test_answers_are_scored_against_prompts(whole, tmp_path):
    """Scores are those of the answers in the table; the same models without a captioner give the same other scores."""
    attributes = {pid: synthetic.attributes("a", pid) for pid in (0, 2)}
    prompts = {pid: synthetic.caption(words) for pid, words in attributes.items()}
    drawn = write_drawn(tmp_path / "drawn", World(num_ids=2), prompts=prompts, num_damaged=1).parent
    with pytest.raises(ValueError, match="is a clip model .*, which does not turn images into text"):
        run(drawn, tmp_path / "other", "--captioner", CLIP_DIR)
    models = ["--reid_model", whole / "models" / "reid-synthetic-a", "--classifier_model", "none"]
    models += ["--clip_model", "none", "--captioner", CAPTIONER_DIR]
    run(drawn, tmp_path / "out", *models, "--filter", "attributes", "--threshold", "0.6")
    rows = table(tmp_path / "out").to_pylist()
    assert [row["attribute_score"] is None for row in rows] == [row["error"] is not None for row in rows]
    for row in rows[:-1]:
        found = agreements(prompts[row["pid"]], json.loads(row["attribute_answers"]))
        assert row["attribute_score"] == pytest.approx(np.mean(list(found.values())))
        assert row["kept"] == (row["attribute_score"] >= 0.6)
    auc = json.loads((tmp_path / "out" / "summary.json").read_text())["against_truth"]["attributes"]["auc"]
    assert auc > 0.8
    run(drawn, tmp_path / "out", *models, "--keep_fraction", "1", "--match_margin", "2", "--min_agreement", "0.6")
    assert [row["kept"] for row in table(tmp_path / "out").to_pylist()] == [row["kept"] for row in rows]


def test_filters_of_the_flags_are_those_of_the_choice():
    assert tuple(choosing.FILTERS) == script.FILTERS


def test_somebody_elses_data_set_is_not_replaced(drawn, tmp_path):
    mine = tmp_path / "out" / "dataset" / "mine.jpg"
    mine.parent.mkdir(parents=True)
    mine.write_text("precious")
    with pytest.raises(ValueError, match="out/dataset is not of this script, which would replace it"):
        run(drawn, tmp_path / "out")
    assert mine.read_text() == "precious" and [path.name for path in (tmp_path / "out").iterdir()] == ["dataset"]


def test_settings_of_scores_that_are_gone_are_named(drawn, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out", ignore=shutil.ignore_patterns("models", "cache"))
    (tmp_path / "out" / "scoring.json").write_text('{"seed"')
    with pytest.raises(
        ValueError, match="scoring.json, which says what the scores there are of, is missing or damaged"
    ):
        run(drawn, tmp_path / "out", "--keep_fraction", "0.5")


def test_an_upload_leaves_nothing_of_an_earlier_choice(drawn, whole, monkeypatch):
    before = ["README.md", "LICENSE", "data/train-00001-of-00002.parquet", "metadata.parquet", "images/a/0.jpg"]
    pushed = []

    class Hub:
        def whoami(self):
            return {}

        def create_repo(self, name, **options):
            assert options == {"repo_type": "dataset", "private": True, "exist_ok": True}
            return type("Repo", (), {"repo_id": f"someone/{name}"})

        def upload_folder(self, *, repo_id, repo_type, folder_path, allow_patterns, delete_patterns):
            assert allow_patterns is None
            gone = set(filter_repo_objects(before, allow_patterns=delete_patterns))
            pushed.append((repo_id, repo_type, folder_path, sorted(gone)))

    for module in ("utils.launch", "utils.datasets.portable"):
        monkeypatch.setattr(f"{module}.HfApi", Hub)
    run(drawn, whole, "--keep_fraction", "0.5", "--push_to_hub", "--hub_dataset_id", "people")
    assert pushed == [("someone/people", "dataset", whole / "dataset", sorted(before[2:]))]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--source", "synthetic:domain=a,num_ids=2"], "2 identities that the source does not have"),
        (["--threshold", "other=0.5"], "--threshold: 'other' is no source; they are synthetic-a"),
        (["--reid_model", "a", "b", "c"], "names 3 models for 1 sources"),
        (["--clip_model", "nowhere/at/all"], "--clip_model: no model at 'nowhere/at/all'"),
        (["--reid_model", str(CLIP_DIR)], "is a clip model, expected"),
        (["--classifier_model", "{models}/reid-synthetic-a"], "is a model of method mgn with several classifiers"),
        (["--captioner", str(CAPTIONER_DIR)], "no prompt of .* names clothes"),
        (["--holdout_fraction", "0"], "--true_match_rate cannot be calibrated on synthetic-a"),
        (["--output_dir", "{drawn}"], "holds generated images; give another --output_dir"),
    ],
)
def test_bad_data_and_models(drawn, whole, tmp_path, flags, words):
    flags = [flag.format(models=whole / "models", drawn=drawn) for flag in flags]
    before = sorted(drawn.iterdir())
    with pytest.raises(ValueError, match=words):
        run(drawn, tmp_path / "out", *flags)
    assert sorted(drawn.iterdir()) == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--source", SOURCE], "without --generated"),
        (["--threshold", "0.5", "--keep_fraction", "0.5"], "both set the threshold"),
        (["--threshold", "much"], "'much' is not as expected"),
        (["--threshold", "0.5", "a=0.4"], "give one kind"),
        (["--keep_fraction", "1.5"], "at most 1"),
        (["--filter", "clip"], "needs --threshold"),
        (["--filter", "clip", "--clip_model", "none", "--threshold", "0"], "cannot choose without its model"),
        (["--filter", "cctf", "--false_match_rate", "0.1"], "is calibrated for --filter reid"),
        (["--filter", "clip", "--true_match_rate", "0.9"], "--true_match_rate is calibrated for --filter reid"),
        (["--true_match_rate", "0"], "--true_match_rate must be above 0"),
        (["--true_match_rate", "0.9", "--false_match_rate", "0.1"], "both set the threshold"),
        (["--filter", "cctf", "--threshold", "0.1", "--match_margin", "0.1"], "is part of --filter reid"),
        (["--match_margin", "-0.1"], "--match_margin must be 0 or more"),
        (["--holdout_fraction", "1"], "below 1"),
        (["--train_batch_size", "6"], "no multiple"),
        (["--min_per_id", "0"], "--min_per_id must be 1 or more"),
        (["--min_per_id", "3", "--target_per_id", "2"], "--target_per_id 2 is below --min_per_id 3"),
        (["--duplicate_distance", "4"], "goes with --near_duplicates"),
        (["--filter", "attributes", "--threshold", "0.5"], "cannot choose without its model, --captioner is none"),
        (["--min_agreement", "0.5"], "give the --captioner that answers"),
    ],
)
def test_bad_flags(flags, words, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(flags)
    assert words in capsys.readouterr().err

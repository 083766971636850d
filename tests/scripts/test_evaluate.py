"""evaluate.py from data to page: numbers, files, resuming, several processes, search, export, bad input."""

import csv
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    ResNetConfig,
    ResNetModel,
    SwinConfig,
    SwinModel,
)

import evaluate
from kernels.ring.processes import Ring
from tests import runs
from tests.evaluation.test_evaluation import average_precision, dense, people
from tests.modeling import references
from tests.reporting.test_reporting import Page, needs_chromium, seen_in_chromium
from tests.runs import ROOT, environment, launch, start, stopped
from utils.batches.transforms import TransformedImages
from utils.batches.transforms import test_transform as make_transform
from utils.datasets.load import load_reid
from utils.datasets.search_folders import read_folders
from utils.evaluation import metrics
from utils.evaluation.kept_features import load_features
from utils.modeling.reid_model import ReIDModel

DATA = "synthetic:domain=b,num_ids=6"
SCRIPT = "evaluate.py"
run = functools.partial(runs.run, evaluate)


@pytest.fixture(scope="module")
def evaluated(clip, tmp_path_factory):
    """An ordinary run with re-ranking: its folder and what it returned."""
    folder = tmp_path_factory.mktemp("evaluated")
    metrics = run(
        "--model", clip, "--resolution", 64, 32, "--data", DATA, "--rerank", "--k1", 5, "--output_dir", folder
    )
    return folder, metrics


def read_rankings(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_features_are_those_of_the_model(evaluated, clip):
    folder, _ = evaluated
    data = load_reid("synthetic", domain="b", num_ids=6)
    model = ReIDModel.from_backbone(clip, image_size=(64, 32)).eval()
    transform = make_transform(model.image_size, model.image_mean, model.image_std, model.resample)
    kept = load_file(folder / "features.safetensors")
    for split, name in (("query", "q"), ("gallery", "g")):
        with torch.no_grad():
            expected = torch.cat([model(transform(image)[None]) for image in data[split]["image"]])
        torch.testing.assert_close(kept[f"{name}f"], expected, rtol=0, atol=1e-5)
        assert kept[f"{name}_pid"].tolist() == list(data[split]["pid"])
        assert kept[f"{name}_cam"].tolist() == list(data[split]["camid"])


def test_numbers_rankings_and_record_agree(evaluated):
    folder, returned = evaluated
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["mAP"] == returned["mAP"] and metrics["backend"] == "torch"
    (queries, gallery), *_ = load_features(folder / "features.safetensors")[0]
    distances, same, kept = dense(queries, gallery, "market")
    orders = [row.argsort(stable=True) for row in distances]
    matches = [same[row][order[kept[row][order]]].numpy() for row, order in enumerate(orders)]
    precisions = [average_precision(one) for one in matches]
    assert metrics["mAP"] == pytest.approx(np.mean([one for one in precisions if one is not None]), abs=1e-3)
    assert metrics["num_valid"] + metrics["num_skipped"] == metrics["num_queries"] == len(queries)
    assert metrics["num_skipped"] == sum(one is None for one in precisions)

    for name, numbers in (("rankings.csv", metrics), ("rankings_reranked.csv", metrics["reranked"])):
        rows = read_rankings(folder / name)
        assert list(rows[0]) == ["query", "rank", "gallery", "distance", "match"]
        for k in (1, 5, 10, 20):
            hit = {row["query"] for row in rows if int(row["rank"]) <= k and row["match"] == "1"}
            assert numbers[f"rank{k}"] == pytest.approx(len(hit) / metrics["num_valid"])
        values = [float(row["distance"]) for row in rows if row["query"] == queries.paths[0]]
        assert values == sorted(values)
    assert metrics["reranked"]["k1"] == 5 and set(metrics["thresholds"]) == {"0.01", "0.001", "0.0001"}
    record = json.loads((folder / "args.json").read_text())
    assert record["arguments"]["rerank"] is True and record["versions"]["torch"]
    assert not list(folder.glob("*.part")) and not list(folder.glob("chunks-*"))


def test_report_shows_queries_with_attention_and_every_section(evaluated):
    page = Page((evaluated[0] / "report.html").read_text())
    for words in (
        "Distances and thresholds",
        "Hardest confusions",
        "Worst queries",
        "Best queries",
        "Cameras",
        "re-ranked",
    ):
        assert words in page.text
    assert any(image["alt"].startswith("attention on") for image in page.images)


@needs_chromium
def test_report_in_chromium(evaluated, tmp_path):
    html = (evaluated[0] / "report.html").read_text()
    count = len(Page(html).images)
    assert seen_in_chromium(tmp_path, html, 390) == f"loaded {count} of {count}, width 390"


def test_same_command_extracts_nothing_again(evaluated, clip, capsys, monkeypatch):
    folder, before = evaluated
    monkeypatch.setattr(evaluate, "extract", pytest.fail)
    common = ("--model", clip, "--resolution", 64, 32, "--data", DATA, "--output_dir", folder)
    again = run(*common, "--rerank", "--k1", 5)
    assert "extracted before" in capsys.readouterr().out
    assert again["mAP"] == before["mAP"] and again["reranked"]["mAP"] == before["reranked"]["mAP"]
    other = run(*common, "--protocol", "all")
    assert other["mAP"] != before["mAP"] and not (folder / "rankings_reranked.csv").exists()
    run(*common, "--rerank", "--k1", 5)


def test_other_preprocessing_or_data_extracts_again(evaluated, clip, tmp_path):
    shutil.copy(evaluated[0] / "features.safetensors", tmp_path)
    before = load_file(tmp_path / "features.safetensors")
    run("--model", clip, "--resolution", 32, 32, "--data", DATA, "--output_dir", tmp_path)
    after = load_file(tmp_path / "features.safetensors")
    assert before["qf"].shape == after["qf"].shape and not torch.equal(before["qf"], after["qf"])


def test_features_of_a_file_give_the_same_numbers(evaluated, tmp_path):
    folder, metrics = evaluated
    kept = load_file(folder / "features.safetensors")
    long_names = {"q_pid": "query_pids", "g_pid": "gallery_pids", "q_cam": "query_camids", "g_cam": "gallery_cams"}
    long_names |= {"qf": "query_features", "gf": "gallery_features"}
    np.savez(tmp_path / "short.npz", **{name: tensor.numpy() for name, tensor in kept.items()})
    np.savez(
        tmp_path / "long.npz", **{long_names[name]: tensor.numpy().astype(">f8") for name, tensor in kept.items()}
    )
    save_file(kept, tmp_path / "plain.safetensors")
    for name in ("short.npz", "long.npz", "plain.safetensors"):
        again = run("--features", tmp_path / name, "--output_dir", tmp_path / "out", "--report_queries", 1)
        for key in ("mAP", "mINP", "rank1", "rank10", "thresholds"):
            assert again[key] == metrics[key], (name, key)
    shown = run("--features", tmp_path / "short.npz", "--data", DATA, "--output_dir", tmp_path / "out")
    assert shown["mAP"] == metrics["mAP"]
    assert len(Page((tmp_path / "out" / "report.html").read_text()).images) > 50


@pytest.mark.skipif(not evaluate.DEMO_MODEL.is_dir(), reason="the stand-in CLIP is not in this checkout")
def test_demo_says_that_it_is_one_and_finds_people(tmp_path, capsys):
    metrics = run("--output_dir", tmp_path)
    first = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Demo"))
    assert "--model" in first and "--data" in first
    # By chance 1 in 16 people would be right.
    assert metrics["rank1"] > 0.2


def test_saved_model_and_its_backbone_agree(clip, evaluated, tmp_path):
    ReIDModel.from_backbone(clip, image_size=(64, 32), num_ids=3).save_pretrained(tmp_path / "model")
    metrics = run(
        "--model", tmp_path / "model", "--data", DATA, "--output_dir", tmp_path / "out", "--report_queries", 0
    )
    assert metrics["mAP"] == pytest.approx(evaluated[1]["mAP"], abs=1e-6)


def test_bfloat16_stays_near(clip, evaluated, tmp_path):
    common = ("--model", clip, "--resolution", 64, 32, "--data", DATA, "--output_dir", tmp_path, "--report_queries", 0)
    run(*common, "--mixed_precision", "bf16")
    half, full = (load_file(Path(folder) / "features.safetensors")["qf"] for folder in (tmp_path, evaluated[0]))
    assert half.dtype == torch.float32 and not torch.equal(half, full)
    assert (half * full).sum(1).min() > 0.999


# Extraction: batches, processes, interruption


def resnet(folder):
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1], layer_type="bottleneck"
    )
    ResNetModel(config).save_pretrained(folder)
    return folder


def swin(folder):
    torch.manual_seed(0)
    sizes = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4}
    SwinModel(SwinConfig(image_size=64, **sizes)).save_pretrained(folder)
    return folder


def test_two_processes_give_the_same_bits(tmp_path):
    """A ResNet, since its convolutions round differently in batches of another size."""
    model = resnet(tmp_path / "resnet")
    common = ("--model", model, "--resolution", 64, 32, "--data", DATA, "--batch_size", 5, "--report_queries", 0)
    common += ("--rerank", "--k1", 5)
    # One thread everywhere: with more, oneDNN may sum a convolution in another order.
    run(*common, "--output_dir", tmp_path / "one")
    launch(SCRIPT, *common, "--output_dir", tmp_path / "two", processes=2)
    one, two = (load_file(tmp_path / name / "features.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    for name in ("metrics.json", "rankings.csv", "rankings_reranked.csv", "calibration.json"):
        first, second = ((tmp_path / folder / name).read_text() for folder in ("one", "two"))
        assert first == second and len(first) > 400


def evaluate_until_lost(arguments):
    """evaluate.py in a process that ends in the middle of the ranking if it is the second."""
    if os.environ["RANK"] == "1":
        Ring.exchange = lambda *given: os._exit(1)
    evaluate.run_script(evaluate.parse_args(arguments))


@pytest.mark.slow
def test_a_process_lost_while_ranking_is_named(clip, tmp_path):
    arguments = ["--model", str(clip), "--resolution", "64", "32", "--data", DATA, "--output_dir", str(tmp_path)]
    done = launch(evaluate_until_lost, arguments, processes=2, check=False)
    assert done.returncode
    (line,) = [line for line in done.stderr.splitlines() if "is gone" in line]
    assert line.startswith("evaluate.py: process 1 of the group is gone") and "Traceback" not in done.stderr


def test_killed_extraction_goes_on_to_the_same_numbers(clip, tmp_path):
    common = ("--model", clip, "--resolution", 64, 32, "--data", "synthetic:domain=b,num_ids=64", "--batch_size", 4)
    common += ("--report_queries", 0)
    started = start(SCRIPT, *common, "--output_dir", tmp_path / "killed")
    stopped(started, lambda: len(list(tmp_path.glob("killed/chunks-*/*.safetensors"))) >= 3)
    chunks = {path: path.stat().st_mtime_ns for path in tmp_path.glob("killed/chunks-*/*.safetensors")}
    assert 3 <= len(chunks) < 16 and not (tmp_path / "killed" / "features.safetensors").exists()

    # What a kill in the middle of a write leaves, and a chunk of a broken disk.
    some = sorted(chunks)[0]
    some.with_name(f"{some.name}.part").write_bytes(b"half")
    sorted(chunks)[1].write_bytes(b"damaged")
    read = []
    original = TransformedImages.__getitem__
    try:
        TransformedImages.__getitem__ = lambda self, row: (read.append(row), original(self, row))[1]
        resumed = run(*common, "--output_dir", tmp_path / "killed")
    finally:
        TransformedImages.__getitem__ = original
    whole = run(*common, "--output_dir", tmp_path / "whole")
    assert not set(range(32)) & set(read) and set(range(32, 64)) <= set(read)
    assert resumed.keys() == whole.keys()
    for name in ("mAP", "mINP", "rank1", "thresholds"):
        assert resumed[name] == whole[name]
    killed, fresh = (load_file(tmp_path / name / "features.safetensors") for name in ("killed", "whole"))
    assert all(torch.equal(killed[name], fresh[name]) for name in fresh)
    assert not list(tmp_path.glob("*/chunks-*"))


def test_features_that_are_not_finite_name_the_image(clip, tmp_path):
    model = ReIDModel.from_backbone(clip, image_size=(64, 32))
    with torch.no_grad():
        next(model.backbone.parameters()).fill_(float("nan"))
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"features of synthetic-b/s0/\S+\.png are not finite"):
        run("--model", tmp_path / "model", "--data", DATA, "--output_dir", tmp_path / "out")


# Splits and search


def small_viper(root, num_ids=632):
    """VIPeR's true names and counts, every image a link to one of eight."""
    for number in range(8):
        image = Image.fromarray(np.random.default_rng(number).integers(0, 255, (16, 8, 3), dtype=np.uint8))
        image.save(root / f"{number}.bmp")
    for camera in ("a", "b"):
        (root / "VIPeR" / f"cam_{camera}").mkdir(parents=True)
        for pid in [*range(400), *range(642, 874)]:
            os.link(
                root / f"{(pid + (camera == 'b') * (pid % 3 == 0)) % 8}.bmp",
                root / f"VIPeR/cam_{camera}/{pid:03d}_0.bmp",
            )


def test_splits_are_averaged_and_each_image_extracted_once(clip, tmp_path, capsys):
    small_viper(tmp_path)
    common = ("--model", clip, "--resolution", 32, 16, "--data_root", tmp_path, "--report_queries", 1)
    mean = run(*common, "--data", "viper", "--splits", 3, "--output_dir", tmp_path / "mean")
    said = capsys.readouterr().out
    for split in range(3):
        assert said.count(f"viper: split {split} of 10, drawn from the seed") == 1
    kept = load_file(tmp_path / "mean" / "features.safetensors")
    assert len(kept["features"]) <= 2 * 632 and kept["0.q_pid"].shape == (316,)
    single = run(*common, "--data", "viper:split=1", "--output_dir", tmp_path / "single")
    assert mean["splits"][1]["mAP"] == pytest.approx(single["mAP"], abs=1e-4)
    values = [one["rank5"] for one in mean["splits"]]
    assert mean["rank5"] == pytest.approx(np.mean(values)) and mean["std"]["rank5"] == pytest.approx(
        np.std(values, ddof=1)
    )
    assert set(mean["thresholds"]["0.01"]) == {"distance", "true_match_rate", "false_match_rate", "std"}
    again = run("--features", tmp_path / "mean" / "features.safetensors", "--output_dir", tmp_path / "again")
    assert again["mAP"] == mean["mAP"] and again["std"] == mean["std"]
    # The same people ten times are no ten splits.
    (tmp_path / "one.txt").write_text("3 5 7")
    data = f"viper:split_file={tmp_path / 'one.txt'}"
    with pytest.raises(ValueError, match="--splits 10: viper:split_file=.* has one split only; leave it out"):
        run(*common, "--data", data, "--splits", 10, "--output_dir", tmp_path / "one")


def folders_of_people(root, name):
    """Query and gallery folders whose files are named by `name(pid, camid, number)`."""
    data = load_reid("synthetic", domain="b", num_ids=4)
    for split in ("query", "gallery"):
        for number, row in enumerate(data[split]):
            path = root / split / name(row["pid"], row["camid"], number)
            path.parent.mkdir(parents=True, exist_ok=True)
            row["image"].save(path)
    return ("--query_dir", root / "query", "--gallery_dir", root / "gallery", "--resolution", 64, 32)


def test_search_without_labels(clip, tmp_path):
    search = folders_of_people(tmp_path, lambda pid, camid, number: f"=<b>{number} x.png")
    (tmp_path / "query" / ".hidden.png").write_bytes(b"")
    metrics = run("--model", clip, *search, "--output_dir", tmp_path / "out", "--topk", 5)
    assert metrics["mAP"] is None and metrics["protocol"] == "all"
    rows = read_rankings(tmp_path / "out" / "rankings.csv")
    assert len(rows) == 5 * metrics["num_queries"] and {row["match"] for row in rows} == {""}
    assert all(row["query"].startswith("'=<b>") for row in rows)
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert "=<b>0 x.png" in page.text and "✓" not in page.text and "b" not in page.tags[20:21]


@pytest.mark.parametrize(
    "name, protocol",
    [
        (lambda pid, camid, number: f"{pid:04d}_c{camid + 1}_{number}.png", "market"),
        (lambda pid, camid, number: f"somebody {pid}/{number}.png", "all"),
    ],
)
def test_search_reads_labels_of_files_and_folders(clip, tmp_path, name, protocol):
    search = folders_of_people(tmp_path, name)
    metrics = run("--model", clip, *search, "--output_dir", tmp_path / "out", "--report_queries", 1)
    data = load_reid("synthetic", domain="b", num_ids=4)
    features = load_file(tmp_path / "out" / "features.safetensors")
    assert metrics["protocol"] == protocol and metrics["num_valid"] == len(data["query"])
    for split, letter in (("query", "q"), ("gallery", "g")):
        # Files are sorted by name, so only the counts of the identities can be compared.
        assert sorted(Counter(features[f"{letter}_pid"].tolist()).values()) == sorted(
            Counter(data[split]["pid"]).values()
        )


@pytest.mark.parametrize("option", ["image_fraction=0.5", "identity_fraction=0.5"])
def test_a_share_of_the_training_images_is_refused(clip, tmp_path, option):
    with pytest.raises(ValueError, match=f"{option.split('=')[0]} is of training images, and has no effect here"):
        run("--model", clip, "--data", f"synthetic:domain=b,num_ids=4,{option}", "--output_dir", tmp_path / "out")


def test_what_names_leave_out_is_said_by_pairs(clip, tmp_path, capsys):
    """A copy of a query is left out by every protocol, and is not counted."""
    for place in ("query/0001_c1_a.png", "gallery/0001_c1_b.png", "gallery/0001_c2_a.png", "gallery/0002_c1_a.png"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        Image.effect_noise((24, 48), 90).convert("RGB").save(tmp_path / place)
    shutil.copy(tmp_path / "query/0001_c1_a.png", tmp_path / "gallery/0001_c1_copy.png")
    places = ["--query_dir", tmp_path / "query", "--gallery_dir", tmp_path / "gallery"]
    run("--model", clip, *places, "--output_dir", tmp_path / "out")
    assert (
        ": 1 pairs of a query and a gallery image of its own identity and camera are left out"
        in capsys.readouterr().out
    )


def test_a_single_image_is_looked_for(clip, tmp_path):
    search = folders_of_people(tmp_path, lambda pid, camid, number: f"{pid:04d}_c{camid + 1}_{number}.png")
    first, *others = sorted((tmp_path / "query").iterdir())
    for path in others:
        path.unlink()
    lists = []
    for query in (first, tmp_path / "query"):
        run("--model", clip, *search[2:], "--query_dir", query, "--output_dir", tmp_path / "out", "--rerank")
        lists.append((tmp_path / "out" / "rankings.csv").read_text())
    assert lists[0] == lists[1] and lists[0].splitlines()[1].startswith(f"{first.name},1,")


def test_a_report_counts_cameras_as_file_names_do(clip, evaluated, tmp_path):
    search = folders_of_people(tmp_path, lambda pid, camid, number: f"{pid:04d}_c{camid + 1}_{number}.png")
    run("--model", clip, *search, "--output_dir", tmp_path / "out")
    for folder in (evaluated[0], tmp_path / "out"):
        html = (folder / "report.html").read_text()
        shown = re.findall(r'camera (\d+)</span><span class="name" title="[^"]*_c(\d+)_', html)
        assert shown and all(said == named for said, named in shown)
        heads = re.search(r"query . gallery</th>(.*?)</tr>", html)[1]
        assert re.findall(r">(\d+)</th>", heads) == ["1", "2", "3", "4"]


def test_cameras_of_folders_count_from_0_as_those_of_other_sets(tmp_path):
    for side, names in {"query": ["1_c1_0.png", "2_c3_0.png"], "gallery": ["1_c2_0.png", "x.png"]}.items():
        (tmp_path / side).mkdir()
        for name in names:
            Image.new("RGB", (4, 8)).save(tmp_path / side / name)
    queries, gallery = read_folders(tmp_path / "query", tmp_path / "gallery")
    assert queries["camid"][:] == [0, 2] and gallery["camid"][:] == [1, -1]
    Image.new("RGB", (4, 8)).save(tmp_path / "gallery" / "3_c0_0.png")
    queries, gallery = read_folders(tmp_path / "query", tmp_path / "gallery")
    assert queries["camid"][:] == [1, 3] and gallery["camid"][:] == [2, 0, -1]


def test_protocols_of_the_flags_are_those_of_the_metrics():
    assert metrics.PROTOCOLS == evaluate.PROTOCOLS


def test_a_number_too_long_for_an_identity_is_a_name(tmp_path):
    for path in ("query/20231122334455667788/a.png", "gallery/20231122334455667788/b.png", "gallery/7/c.png"):
        (tmp_path / path).parent.mkdir(parents=True)
        Image.new("RGB", (4, 8)).save(tmp_path / path)
    queries, gallery = read_folders(tmp_path / "query", tmp_path / "gallery")
    assert queries["pid"][:] == [0] and gallery["pid"][:] == [0, 1]


def test_search_follows_links_and_never_in_circles(tmp_path):
    for path in ("query/1/a.png", "gallery/1/b.PNG", "gallery/.hidden/c.png", "elsewhere/deep/c.png"):
        (tmp_path / path).parent.mkdir(parents=True)
        Image.new("RGB", (4, 8)).save(tmp_path / path)
    (tmp_path / "gallery/2").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "gallery/round").symlink_to(tmp_path / "gallery")
    _, gallery = read_folders(tmp_path / "query", tmp_path / "gallery")
    assert gallery["path"][:] == ["1/b.PNG", "2/deep/c.png"]


def test_search_whose_labels_leave_no_match_still_ranks(clip, tmp_path):
    """All of one camera: the protocol drops every match, so there are lists and no numbers."""
    search = folders_of_people(tmp_path, lambda pid, camid, number: f"{pid:04d}_c1_{number}.png")
    metrics = run("--model", clip, *search, "--output_dir", tmp_path / "out", "--report_queries", 1)
    assert metrics["mAP"] is None and metrics["protocol"] == "market"
    rows = read_rankings(tmp_path / "out" / "rankings.csv")
    assert rows and {row["match"] for row in rows} == {"0"}


def test_protocol_all_ranks_what_one_camera_took(clip, tmp_path):
    data = load_reid("synthetic:domain=b,num_ids=2")
    lines = ["file_name,pid,camid,split\n"]
    for split in ("query", "gallery"):
        for number, row in enumerate(data[split]):
            row["image"].save(tmp_path / f"{split}{number}.png")
            lines.append(f"{split}{number}.png,{row['pid']},0,{split}\n")
    (tmp_path / "metadata.csv").write_text("".join(lines))
    arguments = ["--model", clip, "--resolution", 64, 32, "--data", tmp_path, "--report_queries", 0, "--output_dir"]
    metrics = run(*arguments, tmp_path / "out", "--protocol", "all")
    assert metrics["num_valid"] == len(data["query"]) and metrics["num_skipped"] == 0
    with pytest.raises(ValueError, match="only under the query's own camera"):
        run(*arguments, tmp_path / "out")


def test_unreadable_images_are_listed_and_left_out(clip, tmp_path):
    search = folders_of_people(tmp_path, lambda pid, camid, number: f"{pid:04d}_c{camid + 1}_{number}.png")
    broken = sorted((tmp_path / "gallery").iterdir())[1]
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(ValueError, match=broken.name):
        run("--model", clip, *search, "--output_dir", tmp_path / "out")
    metrics = run(
        "--model", clip, *search, "--output_dir", tmp_path / "out", "--skip_unreadable", "--report_queries", 1
    )
    assert len(metrics["skipped_images"]) == 1 and broken.name in metrics["skipped_images"][0]
    assert metrics["num_gallery"] == len(list((tmp_path / "gallery").iterdir())) - 1
    assert broken.name in Page((tmp_path / "out" / "report.html").read_text()).text


# Export


@pytest.mark.parametrize("family", ["clip", "resnet", "swin"])
def test_onnx_export_takes_any_batch(family, clip, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install onnx onnxscript onnxruntime")
    pytest.importorskip("onnxscript", reason="pip install onnx onnxscript onnxruntime")
    backbone = {"clip": lambda folder: clip, "resnet": resnet, "swin": swin}[family](tmp_path / "backbone")
    run("--model", backbone, "--resolution", 64, 32, "--export", "onnx", tmp_path / "onnx" / "model.onnx")
    assert [path.name for path in (tmp_path / "onnx").iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    model = ReIDModel.from_backbone(backbone, image_size=(64, 32)).eval()
    for batch in (1, 2, 7):
        images = torch.randn(batch, 3, 64, 32)
        with torch.no_grad():
            expected = model(images).numpy()
        np.testing.assert_allclose(session.run(None, {"images": images.numpy()})[0], expected, atol=1e-5)


# Bad input


def good_arrays():
    queries, gallery = people(6, 20)
    return {
        "qf": queries.features.numpy(), "gf": gallery.features.numpy(),
        "q_pid": queries.pids.numpy(), "g_pid": gallery.pids.numpy(),
        "q_cam": queries.camids.numpy(), "g_cam": gallery.camids.numpy(),
    }  # fmt: skip


def change(name, function):
    def apply(arrays):
        arrays[name] = function(arrays[name].copy())

    return apply


def put(value):
    def function(array):
        array[3] = value
        return array

    return function


@pytest.mark.parametrize(
    "spoil, message",
    [
        (change("gf", lambda array: array[:, :9]), "query features are 16 wide, gallery features 9"),
        (change("qf", put(np.nan)), r"1 query feature rows, 3 \(query 3\), hold NaN"),
        (change("gf", put(np.inf)), r"1 gallery feature rows, 3 \(gallery 3\), hold NaN or infinity"),
        (change("gf", put(0)), r"3 \(gallery 3\), are zero"),
        (change("q_pid", lambda array: array[:-1]), "6 query features come with 5 identities"),
        (change("g_cam", lambda array: array[:2]), "20 gallery features come with 2 cameras"),
        (change("q_pid", lambda array: array + 0.5), "fractions"),
        (change("q_pid", lambda array: array + 100), "pids"),
        (change("qf", lambda array: array[0]), r"qf in .* has shape \(16,\)"),
        (change("qf", lambda array: array[:0]), "at least one row"),
        (change("qf", lambda array: array.astype(object)), "cannot be read"),
        (change("q_pid", lambda array: np.array([f"p{one}" for one in array])), "q_pid in .* expected numbers"),
        (change("qf", lambda array: array.astype(np.int64)), "floating-point"),
        (change("qf", lambda array: array.astype(np.longdouble)), "qf in .* holds .*; expected numbers"),
        (lambda arrays: arrays.pop("gf"), "has no gf or gallery_features"),
        (lambda arrays: arrays.update(q_path=np.array(5)), "q_path in .* is no list of names"),
    ],
)
def test_bad_features_are_refused_in_one_line(tmp_path, spoil, message):
    arrays = good_arrays()
    spoil(arrays)
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        run("--features", tmp_path / "bad.npz", "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["nothing", "half", "flipped", "one array"])
def test_damaged_files_of_features_are_refused_in_one_line(tmp_path, content):
    file = tmp_path / "bad.npz"
    np.savez(file, **good_arrays())
    whole = file.read_bytes()
    flipped = whole[:200] + bytes([whole[200] ^ 255]) + whole[201:]
    if content == "one array":
        with open(file, "wb") as opened:
            np.save(opened, good_arrays()["qf"])
    else:
        file.write_bytes({"nothing": b"", "half": whole[: len(whole) // 2], "flipped": flipped}[content])
    with pytest.raises(ValueError, match="bad.npz cannot be read as features: "):
        run("--features", file, "--output_dir", tmp_path / "out")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rerank", "--k1", "-3"], "--k1 must be 1 or more, got -3"),
        (["--rerank", "--k2", "0"], "--k2 must be 1 or more, got 0"),
        (["--rerank", "--lambda_value", "1.2"], "--lambda_value must be between 0 and 1, got 1.2"),
        (["--rerank", "--lambda_value", "nan"], "--lambda_value must be between 0 and 1, got nan"),
        (["--topk", "0"], "--topk"),
        (["--batch_size", "0"], "--eval_batch_size must be 1 or more"),
        (["--query_dir", "q"], "belong together"),
        (["--query_dir", "q", "--gallery_dir", "g", "--data", "viper"], "leave out --data"),
        (["--features", "f.npz", "--model", "m"], "--features needs no model"),
        (["--data", "viper:split=2", "--splits", "10"], "leave split= out"),
        (["--splits", "0"], "--splits must be 1 or more"),
        (["--export", "torchscript", "m.pt"], "--export takes `onnx FILE.onnx`"),
        (["--resolution", "0", "128"], "--resolution must be at least 8 pixels, got 0"),
    ],
)
def test_bad_arguments_stop_in_the_parser(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.parse_args(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "{tmp}"], "is no model folder: it has no config.json"),
        (["--model", "{tmp}/none"], "does not exist"),
        (["--model", "{clip}", "--data", "markt1501"], "did you mean market1501"),
        (["--model", "{clip}", "--data", "market1501", "--data_root", "{tmp}"], "market1501"),
        (["--model", "{clip}", "--data", DATA, "--topk", "9999"], "--topk 9999 is more than the gallery's"),
        (["--model", "{clip}", "--query_dir", "{tmp}", "--gallery_dir", "{tmp}"], "holds no images"),
        (["--model", "{clip}", "--query_dir", "{tmp}/x", "--gallery_dir", "{tmp}"], "is not a folder"),
        (["--features", "{tmp}/none.npz"], "there is no such file"),
        (["--features", "{clip}/config.json"], "neither .safetensors nor .npz"),
    ],
)
def test_bad_input_stops_before_a_model_loads(arguments, message, clip, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.ReIDModel, "open", pytest.fail)
    arguments = [argument.format(tmp=tmp_path, clip=clip) for argument in arguments]
    with pytest.raises(ValueError, match=message):
        run(*arguments, "--output_dir", tmp_path / "out")


@pytest.mark.slow
def test_a_hub_out_of_reach_is_said_at_once():
    """Without the retries of transformers, which take half a minute; nothing listens at this port."""
    code = "import sys, time, evaluate; start = time.monotonic()\n"
    code += "try:\n    evaluate.model_kind('nobody/nothing')\n"
    code += "except ValueError as error:\n    print(time.monotonic() - start, error)"
    settings = environment(HF_ENDPOINT="http://127.0.0.1:9")
    del settings["HF_HUB_OFFLINE"]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=settings)
    seconds, message = done.stdout.split(" ", 1)
    assert float(seconds) < 5 and message.startswith("no model at nobody/nothing, neither a local folder nor")


def test_user_errors_end_in_one_line_without_a_traceback(tmp_path):
    arrays = good_arrays()
    arrays["q_pid"] += 100
    np.savez(tmp_path / "strangers.npz", **arrays)
    features = ["--features", tmp_path / "strangers.npz"]
    done = launch(SCRIPT, *features, "--output_dir", tmp_path / "out", check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("evaluate.py: ") and "10" in last and "pids" in last


def test_full_disk_keeps_the_old_results(tmp_path):
    """A limit on the size of files stands for the full disk."""
    np.savez(tmp_path / "features.npz", **good_arrays())
    run("--features", tmp_path / "features.npz", "--output_dir", tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert set(before) == {"metrics.json", "rankings.csv", "args.json", "calibration.json", "report.html"}
    again = ["--features", tmp_path / "features.npz", "--output_dir", tmp_path / "out", "--seed", 3]
    done = launch(SCRIPT, *again, limit=9000, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "as they were before" in done.stderr.strip().splitlines()[-1]
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_cameras_reach_a_model_that_was_trained_with_them(tmp_path, capsys):
    """TransReID with three cameras: the features of a direct call with each image's camera."""
    net = references.shaken(references.TransReID(cameras=4, width=64, depth=2))
    weights = tmp_path / "transreid.pth"
    torch.save(net.state_dict(), weights)
    data = "synthetic:domain=b,num_ids=3,images_per_id=5"
    options = ("--model", weights, "--data", data, "--report_queries", 0, "--eval_batch_size", 4)
    run(*options, "--output_dir", tmp_path / "mean")
    run(*options, "--output_dir", tmp_path / "seen", "--camera_embeddings")
    (mean, _), (seen, _) = (load_features(tmp_path / name / "features.safetensors") for name in ("mean", "seen"))
    model, sets = ReIDModel.open(weights), load_reid(data)
    transform = make_transform(model.image_size, model.image_mean, model.image_std, model.resample)
    for split, side, other in zip(("query", "gallery"), seen[0], mean[0], strict=True):
        assert set(side.camids.tolist()) == {0, 1, 2, 3}
        images = torch.stack([transform(row["image"]) for row in sets[split]])
        with torch.no_grad(), model.backbone.seen_by(side.camids):
            torch.testing.assert_close(side.features, model(images), rtol=0, atol=1e-5)
        assert float((side.features - other.features).abs().max()) > 1e-3
    assert len(list((tmp_path / "seen").glob("chunks-*"))) == 0
    with pytest.raises(ValueError, match="knows cameras 0 to 1 of its training set, the images have 0 to 3"):
        few = references.shaken(references.TransReID(cameras=2, width=64, depth=2))
        torch.save(few.state_dict(), weights)
        run(*options, "--output_dir", tmp_path / "few", "--camera_embeddings")
    with pytest.raises(ValueError, match="was not trained with cameras"):
        run("--data", data, "--output_dir", tmp_path / "clip", "--camera_embeddings")

"""Targets: opened before training, features against a plain loop and on two processes, evaluate.py's numbers."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import evaluate
from tests.runs import launch, run
from tests.tables import ROWS, paint, write_images, write_table
from utils import flags
from utils.batches.shuffled import ShuffleSampler
from utils.batches.transforms import test_transform as make_transform
from utils.datasets.load import load_reid
from utils.evaluation.features import extract
from utils.evaluation.targets import Target, evaluate_target, open_targets, results
from utils.modeling.reid_model import ReIDModel
from utils.training.loop import Training

DATA = "synthetic:domain=b,num_ids=6"
SIZE = (32, 16)


@pytest.fixture(scope="module")
def folder(clip, tmp_path_factory):
    """A small Re-ID model with random weights whose neck changes directions."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = ReIDModel.from_backbone(clip, num_ids=4, image_size=SIZE)
    model.bnneck.running_mean.normal_(std=0.1)
    model.bnneck.running_var.uniform_(0.5, 2.0)
    model.save_pretrained(folder / "model")
    return folder


@pytest.fixture
def model(folder):
    return ReIDModel.from_pretrained(folder / "model").train()


def transform_of(model):
    return make_transform(model.image_size, model.image_mean, model.image_std, model.resample)


# Opening


def set_of_ones_own(folder):
    write_images(folder)
    for split in ("train", "query", "gallery"):
        its = [(part, pid, camid, Path(path).name) for part, pid, camid, path in ROWS if part == split]
        write_table(folder / split / "metadata.csv", its)
    return folder


def test_targets_are_opened_once_under_their_names(tmp_path):
    own = str(set_of_ones_own(tmp_path / "own"))
    targets = open_targets([DATA, own, DATA])
    assert [target.spec for target in targets] == [DATA, own]
    assert [len(target.query) for target in targets] == [24, 1] and len(targets[1].gallery) == 2
    assert open_targets([]) == []


def test_a_set_without_query_and_gallery_is_refused(tmp_path):
    paint(tmp_path / "a.png"), paint(tmp_path / "b.png")
    write_table(tmp_path / "metadata.csv", [("train", 1, 0, "a.png"), ("train", 1, 1, "b.png")])
    with pytest.raises(ValueError, match=f"--target {tmp_path} has no query and gallery, only train; choose another"):
        open_targets([str(tmp_path)])


def test_a_damaged_image_is_found_before_training(tmp_path):
    own = set_of_ones_own(tmp_path)
    (own / "gallery" / "f.png").write_bytes((own / "gallery" / "f.png").read_bytes()[:40])
    with pytest.raises(ValueError, match=r"1 of 3 images cannot be read: .*f\.png"):
        open_targets([str(own)])
    (target,) = open_targets([str(own)], skip_unreadable=True)
    assert list(target.gallery["path"]) == ["gallery/e.png"] and len(target.query) == 1


# Features


def test_features_are_those_of_a_plain_loop(model, accelerator):
    rows = load_reid("synthetic", domain="b", num_ids=5)["gallery"]
    transform = transform_of(model)
    model.eval()
    with torch.no_grad():
        want = torch.cat([model(transform(image)[None]) for image in rows["image"]])
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for batch_size in (1, 7, 64):
        got = extract(model, rows, transform, accelerator=accelerator, batch_size=batch_size)
        assert got.dtype == torch.float32 and got.shape == (len(rows), 16)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert model.training and model.bnneck.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_features_in_float32_under_a_half_precision_training(model):
    AcceleratorState._reset_state(reset_partial_state=True)
    half = Accelerator(cpu=True, mixed_precision="bf16")
    rows = load_reid("synthetic", domain="a", num_ids=2, images_per_id=4)["query"]
    options = {"accelerator": half, "batch_size": 4}
    rounded, exact = (
        extract(model, rows, transform_of(model), in_float32=chosen, **options) for chosen in (False, True)
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    wanted = extract(model, rows, transform_of(model), accelerator=Accelerator(cpu=True), batch_size=4)
    assert torch.equal(exact, wanted) and not torch.equal(rounded, wanted)


def test_features_can_be_computed_with_afterwards(model, accelerator):
    rows = load_reid("synthetic", domain="b", num_ids=2)["query"]
    features = extract(model, rows, transform_of(model), accelerator=accelerator)
    weight = torch.nn.Parameter(torch.ones(16))
    (features * weight).sum().backward()
    torch.testing.assert_close(weight.grad, features.sum(0))


TWO = """
import sys
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from utils.batches.transforms import test_transform
from utils.datasets.load import load_reid
from utils.modeling.reid_model import ReIDModel
from utils.evaluation.targets import evaluate_target, open_targets; from utils.evaluation.features import extract

torch.set_num_threads(1)
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == int(sys.argv[3])
model = ReIDModel.from_pretrained(sys.argv[1])
transform = test_transform(model.image_size, model.image_mean, model.image_std, model.resample)
rows = load_reid("synthetic", domain="b", num_ids=4)["gallery"]
found = {}
# One batch for two processes, three with the last one full and not.
for count in (1, 9, 12):
    features = extract(model, rows.select(range(count)), transform, accelerator=accelerator, batch_size=4)
    found[str(count)] = features.clone()
(target,) = open_targets(["synthetic:domain=b,num_ids=3"])
options = {"accelerator": accelerator, "rerank": {"k1": 4, "k2": 2, "lambda_value": 0.3}}
metrics = evaluate_target(model, target, transform, **options)
metrics |= {f"reranked {name}": value for name, value in metrics.pop("reranked").items()}
found |= {name: torch.tensor(value, dtype=torch.float64) for name, value in metrics.items()}
save_file(found, f"{sys.argv[2]}/{sys.argv[3]}-{accelerator.process_index}.safetensors")
accelerator.end_training()
"""


def test_two_processes_have_the_bits_of_one(tmp_path, folder, monkeypatch):
    script = tmp_path / "two.py"
    script.write_text(TWO)
    arguments = [str(script), str(folder / "model"), str(tmp_path)]
    launch(*arguments, "2", processes=2)
    monkeypatch.setattr(sys, "argv", [*arguments, "1"])
    AcceleratorState._reset_state(reset_partial_state=True)
    runpy.run_path(str(script))
    one, *two = (load_file(tmp_path / f"{name}.safetensors") for name in ("1-0", "2-0", "2-1"))
    assert {"1", "9", "12", "mAP", "rank1", "reranked mAP"} <= set(one)
    for other in two:
        assert set(other) == set(one)
        assert [name for name in one if not torch.equal(one[name], other[name])] == []


# Numbers


def test_the_numbers_are_those_of_evaluate(tmp_path, folder, model, accelerator):
    (target,) = open_targets([DATA])
    rerank = {"k1": 5, "k2": 3, "lambda_value": 0.4}
    got = evaluate_target(model, target, transform_of(model), accelerator=accelerator, rerank=rerank)
    plain = evaluate_target(model, target, transform_of(model), accelerator=accelerator)
    flags = ["--rerank", "--k1", "5", "--k2", "3", "--lambda_value", "0.4", "--report_queries", "0"]
    want = run(evaluate, "--model", folder / "model", "--data", DATA, "--output_dir", tmp_path, *flags)
    reranked = got.pop("reranked")
    assert got == plain and 0 < got["mAP"] < 1 and got["mAP"] != reranked["mAP"]
    assert set(got) == {"mAP", "mINP", "rank1", "rank5", "rank10", "rank20", "num_valid", "num_skipped"}
    assert got == pytest.approx({name: want[name] for name in got}, abs=1e-9)
    assert reranked == pytest.approx({name: want["reranked"][name] for name in reranked}, abs=1e-9)
    assert model.training


def test_without_cameras_nothing_is_dropped(model, accelerator):
    data = load_reid("synthetic", domain="b", num_ids=4)
    without = [data[split].map(lambda row: {"camid": -1}) for split in ("query", "gallery")]
    metrics = evaluate_target(model, Target("x", *without), transform_of(model), accelerator=accelerator)
    assert metrics["num_skipped"] == 0 and metrics["num_valid"] == len(data["query"])
    one_camera = [data[split].map(lambda row: {"camid": 1}) for split in ("query", "gallery")]
    with pytest.raises(ValueError, match="no query identity appears in the gallery seen by another camera"):
        evaluate_target(model, Target("x", *one_camera), transform_of(model), accelerator=accelerator)


def test_features_that_are_not_finite_name_the_image(model, accelerator):
    (target,) = open_targets([DATA])
    with torch.no_grad():
        model.bnneck.running_var.fill_(float("nan"))
    with pytest.raises(ValueError, match=f"24 query feature rows, 0 \\({target.query['path'][0]}\\)"):
        evaluate_target(model, target, transform_of(model), accelerator=accelerator)


def test_history_and_the_file_follow_the_epochs(tmp_path, model, accelerator, capsys):
    targets = open_targets([DATA, "synthetic:domain=c,num_ids=3"])
    words = ["--recipe", "x", "--output_dir", str(tmp_path / "new")]
    parser = flags.Parser("x", recipes={"x": {"eval_batch_size": 32}})
    flags.add_recipe(parser, "none")
    flags.add_data(parser, source="none")
    flags.add_training(parser, batch=8, epochs=2, accumulation="none")
    flags.add_evaluation(parser, every=1)
    flags.add_output(parser, "output/x")
    args = parser.parse(words)
    training = Training(args, accelerator, ShuffleSampler(9, 4), targets[0].query, script="x.py", data="x")
    training.model, state = model, training.state

    def measure(epoch):
        training.measure(epoch, model, targets)
        return json.loads((tmp_path / "new" / "metrics.json").read_text())

    first = measure(0)
    assert first == results(state["history"]) and [one["epoch"] for one in first["history"]] == [0, 0]
    assert list(first["targets"]) == [target.spec for target in targets]
    assert first["targets"][DATA]["epoch"] == 0 and "target" not in first["targets"][DATA]
    assert f"epoch 0: {DATA} mAP {100 * first['targets'][DATA]['mAP']:.1f} %, Rank-1 " in capsys.readouterr().out
    # An epoch measured in its middle is measured again at its end.
    measure(2)
    with torch.no_grad():
        for weight in model.backbone.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
    again = measure(2)
    assert [(one["epoch"], one["target"]) for one in again["history"]] == [
        (epoch, target.spec) for epoch in (0, 2) for target in targets
    ]
    want = evaluate_target(model, targets[0], transform_of(model), accelerator=accelerator)
    assert again["targets"][DATA] == {"epoch": 2} | want and want["mAP"] != first["targets"][DATA]["mAP"]
    assert again["history"][2] == {"epoch": 2, "target": DATA} | want
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["metrics.json"]


def test_results_of_nothing():
    assert results([]) == {"targets": {}, "history": []}

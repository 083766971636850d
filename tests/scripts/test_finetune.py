"""finetune_reid.py: losses against their definition, settings, the loop against interruptions, bad input."""

import functools
import json
import os
import signal
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPVisionModelWithProjection, ResNetModel, SwinModel

import evaluate
import finetune_reid
from finetune_reid import FineTuning, delayed_cosine, parse_args
from tests import runs
from tests.modeling.test_heads import NUM_IDS, SIZE, TINY, people, tiny
from tests.runs import launch, lines_written, log_of, same_weights, weights_of
from utils.datasets.load import labels_of, load_reid, people_of, subset
from utils.modeling.heads import METHODS
from utils.modeling.reid_model import ReIDModel

SPEC = "synthetic:domain=a,num_ids=6,images_per_id=4"
SMALL = ["--source", SPEC, "--resolution", *map(str, SIZE), "--train_batch_size", "8", "--eval_every", "9"]
CLASSES = {"resnet": ResNetModel, "swin": SwinModel, "clip": CLIPVisionModelWithProjection}

train, refused = (functools.partial(one, finetune_reid) for one in (runs.run, runs.refused))


@pytest.fixture(scope="session")
def starts(tmp_path_factory):
    """Plain backbones with random weights, as pretrain_backbone.py leaves them."""
    folder = tmp_path_factory.mktemp("starts")
    for family, kind in CLASSES.items():
        torch.manual_seed(0)
        kind(TINY[family]).save_pretrained(folder / family)
    return folder


# Arguments


def test_published_values_and_flags_that_win():
    wanted = {
        # resolution, batch, K, epochs, optimiser, rate, decay, erasing
        "bot": ([256, 128], 64, 4, 120, "adam", 3.5e-4, 5e-4, 0.5),
        "agw": ([256, 128], 64, 4, 120, "adam", 3.5e-4, 5e-4, 0.5),
        "sbs": ([384, 128], 64, 16, 60, "adam", 3.5e-4, 5e-4, 0.5),
        "mgn": ([384, 128], 64, 4, 80, "sgd", 0.01, 5e-4, 0.0),
        "bdb": ([384, 128], 128, 4, 100, "adam", 1e-3, 5e-4, 0.5),
    }
    losses = {
        "bot": ("hard", 0.3, 0.1, "sum", 5e-4),
        "agw": ("weighted", "soft", 0.1, "sum", 5e-4),
        "sbs": ("hard", "soft", 0.1, "sum", 0),
        "mgn": ("hard", 1.2, 0.0, "mean", 0),
        "bdb": ("hard", "soft", 0.1, "sum", 0),
    }
    for method in METHODS:
        args = parse_args(["--recipe", "published", "--method", method])
        found = (
            args.resolution, args.train_batch_size, args.images_per_id, args.num_train_epochs, args.optimizer,
            args.learning_rate, args.adam_weight_decay, args.erasing,
        )  # fmt: skip
        assert found == wanted[method]
        assert (args.source, args.backbone) == (["market1501"], "microsoft/resnet-50")
        # What a method compares is the same without its recipe.
        for one in (args, parse_args(["--method", method])):
            found = one.triplet, one.margin, one.label_smoothing, one.groups, one.centre_weight
            assert found == losses[method]
    starts = {"bot": 0.01, "agw": 0.01, "sbs": 0.1, "bdb": 0.1}
    for method, factor in starts.items():
        assert parse_args(["--recipe", "published", "--method", method]).lr_warmup_factor == factor
    args = parse_args(["--method", "bdb", "--recipe", "published", "--learning_rate", "0.5", "--margin", "0.7"])
    assert (args.learning_rate, args.margin, args.lr_warmup_epochs, args.lr_milestones) == (0.5, 0.7, 13, [50, 75])
    assert args.origin["learning_rate"] == "flag" and args.origin["lr_milestones"] == "recipe"


def test_delayed_cosine_by_hand():
    args = parse_args(["--method", "sbs", "--recipe", "published"])
    assert delayed_cosine(1, 0, args) == pytest.approx(0.1)
    assert delayed_cosine(5, 1000, args) == pytest.approx(0.55)
    for epoch in (11, 30, 31):
        assert delayed_cosine(epoch, 2000, args) == pytest.approx(1)
    assert delayed_cosine(46, 9000, args) == pytest.approx(0.5 * (1 + 0.002))
    # 1 + cos(180 - 6 degrees), half of it.
    assert delayed_cosine(60, 9000, args) == pytest.approx(0.002 + 0.998 * 0.00273905, rel=1e-5)
    rates = [delayed_cosine(epoch, 9000, args) for epoch in range(30, 61)]
    assert all(one >= other for one, other in zip(rates, rates[1:], strict=False)) and rates[-1] < 0.005


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--setting", "few-shot", "--fraction", "0"], "--fraction must be above 0"),
        (["--setting", "small-scale", "--fraction", "1.5"], "at most 1, got 1.5"),
        (["--setting", "few-shot", "--fraction", "nan"], "got nan"),
        (["--fraction", "0.5"], "belongs to --setting few-shot or small-scale"),
        (["--train_batch_size", "1", "--images_per_id", "1"], "BatchNorm has no statistics of one image"),
        (["--images_per_id", "1"], "--images_per_id must be 2 or more"),
        (["--margin", "-1"], "--margin must be 0 or more"),
        (["--margin", "wide"], "--margin must be a number, got 'wide'"),
        (["--method", "agw", "--margin", "0.3"], "the weighted one has none"),
        (["--method", "mgn", "--centre_weight", "0.1"], "is for one feature an image; mgn has several"),
        (["--method", "pcb"], "invalid choice: 'pcb'"),
        (["--lr_scheduler", "delayed_cosine", "--lr_delay_epochs", "8"], "leaves no epoch of 8"),
        (["--use_8bit_adam", "--optimizer", "sgd"], "not sgd"),
        (["--method", "meta", "--torch_compile"], "--torch_compile: meta changes its norms from step to step"),
    ],
)
def test_arguments_that_cannot_be(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(arguments)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


# Settings


def test_smaller_parts_lie_inside_larger_ones():
    train = load_reid("synthetic", domain="a", num_ids=12, images_per_id=10)["train"]

    def part(setting, fraction, seed=0):
        args = parse_args(["--setting", setting, "--fraction", str(fraction), "--fraction_seed", str(seed)])
        return finetune_reid.part_of(args, train, torch.from_numpy(labels_of(train)))

    before, ids = set(), set()
    for fraction in (0.1, 0.3, 0.5, 1.0):
        rows, labels = part("few-shot", fraction)
        # 10 % of 10 images is one: at least two are kept, as a triplet takes.
        assert labels.bincount().tolist() == [max(2, round(10 * fraction))] * 12
        assert before <= set(rows["path"])
        before = set(rows["path"])
        rows, labels = part("small-scale", fraction)
        assert labels.bincount().tolist() == [10] * max(1, round(12 * fraction))
        assert ids <= set(people_of(rows))
        ids = set(people_of(rows))
    assert len(before) == 120 and len(ids) == 12
    for setting in ("few-shot", "small-scale"):
        assert set(part(setting, 0.3)[0]["path"]) != set(part(setting, 0.3, seed=1)[0]["path"])
    assert parse_args(["--setting", "few-shot"]).fraction == 0.1


def test_two_images_are_kept_of_those_that_have_two():
    train = load_reid("synthetic", domain="a", num_ids=3, images_per_id=4)["train"]
    labels = labels_of(train)
    # One, two, and four images.
    rows = [*(labels == 0).nonzero()[0][:1], *(labels == 1).nonzero()[0][:2], *(labels == 2).nonzero()[0]]
    kept = subset(train.select(rows), image_fraction=0.01, min_images=2)
    assert sorted(torch.from_numpy(labels_of(kept)).bincount().tolist()) == [1, 2, 2]
    assert len(subset(train.select(rows), image_fraction=0.01)) == 3


def test_many_identities_of_few_images_take_nothing_from_one_of_many():
    train = load_reid("synthetic", domain="a", num_ids=13, images_per_id=40)["train"]
    labels = labels_of(train)
    rows = [row for label in range(13) for row in (labels == label).nonzero()[0][: 40 if label == 0 else 3]]
    kept = subset(train.select(rows), image_fraction=0.25, min_images=2)
    assert torch.from_numpy(labels_of(kept)).bincount().tolist() == [10] + [2] * 12


# The method


def smoothed(logits, labels, smoothing):
    target = torch.full_like(logits, smoothing / logits.shape[1])
    target[range(len(labels)), labels] += 1 - smoothing
    return -(target * logits.log_softmax(1)).sum(1).mean()


def triplets(features, labels, kind, margin):
    total = 0
    for number, feature in enumerate(features):
        gaps = (features - feature).norm(dim=1)
        own, others = labels == labels[number], labels != labels[number]
        if kind == "weighted":
            own = own & (torch.arange(len(labels)) != number)
            gap = (gaps[own].softmax(0) * gaps[own]).sum() - ((-gaps[others]).softmax(0) * gaps[others]).sum()
        else:
            gap = gaps[own].max() - gaps[others].min()
        total = total + (torch.log1p(gap.exp()) if margin == "soft" else (gap + margin).clamp(min=0))
    return total / len(features)


@pytest.mark.parametrize("method", METHODS)
def test_loss_is_the_one_that_is_written_down(method):
    weight = 0.05 if method in ("bot", "agw") else 0
    args = parse_args(["--method", method, "--triplet_weight", "0.7", "--centre_weight", str(weight)])
    model = tiny("resnet", method)
    for layer in [model.classifier] if method == "bot" else model.head.classifiers:
        torch.nn.init.normal_(layer.weight, std=0.3)
    training = FineTuning(model, args).train()
    images, labels = people(8), torch.arange(8) // 2
    loss, values, compared, _ = training(images, labels)
    loss_centre = torch.tensor(0.0)
    if weight:
        loss_centre = (compared[0] - training.centres.centres[labels]).double().square().sum(1).mean()
    with torch.no_grad():
        output = model.outputs(model.pool(images))
        scores = [logits.double() for logits in output.logits]
        if method == "sbs":
            mine = F.one_hot(labels, NUM_IDS).bool()
            (cosines,) = scores
            own, other = (1.35 - cosines).clamp(min=0) * (cosines - 0.65), (cosines + 0.35).clamp(min=0)
            scores = [64 * torch.where(mine, own, other * (cosines - 0.35))]
        by_class = [smoothed(one, labels, 0.0 if method == "mgn" else 0.1) for one in scores]
        kind, limit = ("weighted" if method == "agw" else "hard"), {"bot": 0.3, "mgn": 1.2}.get(method, "soft")
        by_pairs = [triplets(one.double(), labels, kind, limit) for one in output.compared]
        assert (len(by_class), len(by_pairs)) == {"mgn": (8, 3), "bdb": (2, 2)}.get(method, (1, 1))
        loss_id, loss_triplet = sum(by_class), sum(by_pairs)
        if method == "mgn":
            loss_id, loss_triplet = loss_id / 8, loss_triplet / 3
    assert values["loss_id"].item() == pytest.approx(loss_id.item(), rel=1e-4)
    assert values["loss_triplet"].item() == pytest.approx(loss_triplet.item(), rel=1e-4)
    assert values["loss_centre"].item() == pytest.approx(loss_centre.item(), rel=1e-4)
    assert loss.item() == pytest.approx((loss_id + 0.7 * loss_triplet + weight * loss_centre).item(), rel=1e-4)


def test_a_frozen_backbone_stays_as_it_is(starts, tmp_path):
    common = [*SMALL, "--backbone", starts / "resnet", "--method", "sbs", "--lr_delay_epochs", "1"]
    common += ["--freeze_steps", "2", "--output_dir", tmp_path, "--lr_warmup_steps", "0"]
    train(*common, "--max_train_steps", "2")
    args = parse_args(list(map(str, common)))
    for line in log_of(tmp_path):
        rate = args.learning_rate * delayed_cosine(line["epoch"], line["step"] - 1, args)
        assert line["lr"] == pytest.approx(rate) and rate > 0
    wanted = ResNetModel.from_pretrained(starts / "resnet").state_dict()

    def moved():
        found = weights_of(tmp_path)
        # Non-local blocks stand in between: the other names are the backbone's own, or one level deeper.
        plain = {name.removeprefix("backbone.model."): tensor for name, tensor in found.items()}
        return [name for name in wanted if name in plain and not torch.equal(plain[name], wanted[name])]

    assert moved() == []
    assert found_in(tmp_path, "head.pooling.power") != 3 and weights_of(tmp_path)["head.bnneck.running_mean"].any()
    train(*common, "--max_train_steps", "3", "--resume_from_checkpoint", "latest")
    names = moved()
    assert "embedder.embedder.convolution.weight" in names
    assert "embedder.embedder.normalization.running_mean" in names


def found_in(folder, name):
    return weights_of(folder)[name].item()


# Whole runs


@pytest.fixture(scope="session")
def finished(starts, tmp_path_factory):
    """A whole small run of BDB, whose rectangles are drawn, on a Swin, whose paths are dropped at random."""
    folder = tmp_path_factory.mktemp("finished")
    assert train(*whole_run(starts), "--eval_every", "1", "--output_dir", folder) == 0
    return folder


def whole_run(starts):
    path = starts / "swin" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"drop_path_rate": 0.3}))
    return [*SMALL, "--method", "bdb", "--backbone", str(starts / "swin"), "--num_train_epochs", "2", "--rerank"]


def test_what_a_run_leaves(finished, tmp_path, capsys):
    lines = log_of(finished)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)) and len(lines) == 6
    keys = ["step", "epoch", "lr", "grad_norm", "loss", "loss_id", "loss_triplet", "loss_centre"]
    assert all(list(line) == keys and line["grad_norm"] > 0 for line in lines)
    metrics = json.loads((finished / "metrics.json").read_text())
    assert [(one["epoch"], one["target"]) for one in metrics["history"]] == [(epoch, SPEC) for epoch in range(3)]
    assert 0 < metrics["targets"][SPEC]["reranked"]["mAP"] <= 1
    page = (finished / "report.html").read_text()
    assert "mAP by epoch" in page and "Fine-tuning: BDB" in page
    assert "finetune_reid.py" in (finished / "model" / "README.md").read_text()
    assert json.loads((finished / "model" / "config.json").read_text())["method"] == "bdb"
    # evaluate.py opens the folder and finds the same numbers.
    arguments = ["--model", finished / "model", "--data", SPEC, "--output_dir", tmp_path]
    found = runs.run(evaluate, *arguments, "--report_queries", "1")
    assert found["mAP"] == pytest.approx(metrics["targets"][SPEC]["mAP"], abs=1e-6)
    assert found["rank1"] == metrics["targets"][SPEC]["rank1"]


def test_a_cut_training_goes_on_to_the_same_numbers(starts, finished, tmp_path, capsys):
    common = [*whole_run(starts), "--eval_every", "1", "--output_dir", tmp_path, "--checkpointing_steps", "2"]
    train(*common, "--max_train_steps", "1")
    assert len(log_of(tmp_path)) == 1
    train(*common, "--resume_from_checkpoint", "latest")
    assert "Resuming from" in capsys.readouterr().out
    assert (tmp_path / "log.jsonl").read_text() == (finished / "log.jsonl").read_text()
    assert same_weights(weights_of(finished), weights_of(tmp_path))
    one_piece, metrics = (json.loads((folder / "metrics.json").read_text()) for folder in (finished, tmp_path))
    assert metrics["targets"] == one_piece["targets"]
    # And once more, after its end.
    assert train(*common, "--resume_from_checkpoint", "latest") == 0
    assert (tmp_path / "log.jsonl").read_text() == (finished / "log.jsonl").read_text()


def test_sigterm_writes_a_checkpoint(starts, tmp_path, capsys):
    deadline = time.monotonic() + 240

    def watch():
        while time.monotonic() < deadline:
            if lines_written(tmp_path):
                return os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = train(*SMALL, "--backbone", starts / "clip", "--num_train_epochs", "1000", "--output_dir", tmp_path)
    watcher.join()
    assert code == 128 + signal.SIGTERM
    assert "--resume_from_checkpoint latest" in capsys.readouterr().out
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    assert json.loads((checkpoint / "state.json").read_text())["step"] == len(log_of(tmp_path))


def test_bf16_and_few_images(starts, tmp_path):
    common = [*SMALL, "--backbone", starts / "resnet", "--max_train_steps", "1", "--setting", "few-shot"]
    for method in ("sbs", "mgn", "bdb"):
        logs = []
        for precision in ("no", "bf16"):
            out = tmp_path / f"{method}-{precision}"
            train(*common, "--method", method, "--mixed_precision", precision, "--output_dir", out)
            logs.append(log_of(out)[0])
            weights = weights_of(out)
            assert all(tensor.dtype == torch.float32 for tensor in weights.values() if tensor.is_floating_point())
        for key in ("loss_id", "loss_triplet"):
            assert logs[1][key] == pytest.approx(logs[0][key], rel=0.1), (method, key)
            assert logs[1][key] != logs[0][key], (method, key)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, family, more",
    [
        ("bot", "clip", ["--freeze_steps", "1"]),
        ("mgn", "resnet", ["--gradient_checkpointing"]),
        ("bdb", "resnet", []),
        ("agw", "resnet", []),
    ],
)
def test_two_processes_train_as_one(starts, tmp_path, method, family, more):
    """The same global batch: BatchNorm, classifiers, triplets and dropped rectangles of all."""
    common = [*SMALL, "--method", method, "--backbone", starts / family, "--max_train_steps", "3", *more]
    train(*common, "--output_dir", tmp_path / "one")
    two = [*common, "--train_batch_size", "4", "--output_dir", tmp_path / "two"]
    launch("finetune_reid.py", *two, processes=2)
    for left, right in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        assert left == pytest.approx(right, rel=1e-3, abs=1e-4)
    one, two = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    assert max(float((one[name].float() - two[name].float()).abs().max()) for name in one) < 3e-3


# Bad input


def test_bad_input_is_told_in_one_line_before_a_model_loads(starts, tmp_path, monkeypatch):
    tiny("resnet", "agw").save_pretrained(tmp_path / "agw")
    monkeypatch.setattr(ReIDModel, "for_training", None)
    out = ["--output_dir", tmp_path / "out"]
    common = [*SMALL, *out, "--backbone", starts / "clip"]
    assert "10" in refused(*common, "--train_batch_size", "10")
    few = refused(*common, "--setting", "small-scale", "--fraction", "0.2")
    assert "2 identities" in few and "only 1" in few
    assert "holds one identity" in refused(*common, "--train_batch_size", "4")
    assert "of method agw; it can start --method agw only" in refused(*common, "--backbone", tmp_path / "agw")
    assert "no config.json" in refused(*common, "--backbone", tmp_path)
    assert "does not exist" in refused(*common, "--backbone", tmp_path / "none")
    bert = tmp_path / "bert"
    bert.mkdir()
    (bert / "config.json").write_text('{"model_type": "bert"}')
    assert "supported backbones are" in refused(*common, "--backbone", bert)
    assert "did you mean" in refused(*common, "--source", "market1502")
    assert "no checkpoint 'checkpoint-7'" in refused(*common, "--resume_from_checkpoint", "checkpoint-7")


def test_backbones_that_do_not_fit(starts, tmp_path):
    common = [*SMALL, "--output_dir", tmp_path / "out", "--method", "mgn"]
    small = refused(*common, "--backbone", starts / "resnet", "--resolution", "16", "64")
    assert "needs a map of 3 rows" in small and "16 x 64" in small
    torch.manual_seed(0)
    ResNetModel(TINY["resnet"].__class__(embedding_size=8, hidden_sizes=[16], depths=[2])).save_pretrained(
        tmp_path / "one"
    )
    assert "one stage" in refused(*common, "--backbone", tmp_path / "one")


def test_going_on_with_another_part_names_it(starts, tmp_path):
    common = [*SMALL, "--backbone", starts / "clip", "--output_dir", tmp_path, "--setting", "few-shot"]
    train(*common, "--fraction", "0.5", "--max_train_steps", "1")
    more = ["--resume_from_checkpoint", "latest"]
    assert "fraction was 0.5, is 1.0" in refused(*common, "--fraction", "1", *more)
    assert "method was 'bot', is 'agw'" in refused(*common, "--fraction", "0.5", "--method", "agw", *more)


def test_a_loss_that_is_not_finite_stops_and_names_the_images(starts, tmp_path):
    found = refused(
        *SMALL, "--backbone", starts / "clip", "--learning_rate", "1e20", "--lr_warmup_epochs", "0",
        "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert "not finite at step" in found and "synthetic-a/s0/" in found


def test_images_are_changed_for_meta_alone(clip):
    """--auto_augment and --colour_jitter are META's: they have no effect elsewhere, and that is said."""
    model = ReIDModel.from_backbone(clip, image_size=(64, 32), num_ids=3)
    for method in ("bot", "meta"):
        args = parse_args(["--method", method, "--auto_augment", "1", "--colour_jitter", "1"])
        assert (finetune_reid.transform_of(args, model) is None) == (method == "bot")

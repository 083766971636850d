"""adapt_reid.py: the losses against their definitions, whole runs against interruptions, data without labels."""

import functools
import json
import shutil
import signal
import subprocess

import datasets
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from transformers import ResNetConfig, ResNetModel

import adapt_reid
from adapt_reid import MODULES, parse_args
from methods.idm import IDM, Mixer
from tests import runs
from tests.methods.reference import close, same_steps
from tests.runs import ROOT, environment, launch, lines_written, log_of, same_weights, start, stopped, weights_of
from utils.batches.pseudo_batches import gather_by_domain
from utils.datasets.load import load_reid
from utils.datasets.unlabelled import open_unlabelled
from utils.modeling.domain_norms import DomainNorm
from utils.modeling.heads import add_gem
from utils.modeling.reid_model import ReIDModel
from utils.training.clustering import cluster, reliable

SCRIPT = "adapt_reid.py"

TARGET = "synthetic:domain=b,num_ids=6,images_per_id=8"
SOURCE = ["--setting", "adaptation", "--source", "synthetic:domain=a,num_ids=5,images_per_id=4"]
SMALL = [
    "--train_batch_size", "8", "--images_per_id", "2", "--steps_per_epoch", "3", "--num_train_epochs", "2",
    "--cluster_k1", "6", "--cluster_k2", "2",
    "--eps", "0.5", "--min_samples", "2", "--eval_every", "9", "--lr_warmup_epochs", "0",
    "--learning_rate", "1e-4", "--resolution", "64", "32",
]  # fmt: skip
KINDS = {
    "cluster-contrast": [],
    "spcl": ["--method", "spcl"],
    "spcl-adaptation": SOURCE,
    "idm": [*SOURCE, "--method", "idm", "--mix_stage", "1"],
}


def kinds(*quick):
    """All methods as parameters; those that are not named are slow."""
    slow = pytest.mark.slow
    return pytest.mark.parametrize("kind", [pytest.param(one, marks=[] if one in quick else slow) for one in KINDS])


train, refused = (functools.partial(one, adapt_reid) for one in (runs.run, runs.refused))


@pytest.fixture(scope="session")
def standin(standins):
    return standins / "clip"


@pytest.fixture(scope="session")
def small(standin):
    return ["--target", TARGET, *SMALL, "--backbone", str(standin)]


# The losses


def module(standin, *arguments, num_source=5, num_images=12):
    torch.manual_seed(0)
    encoder = ReIDModel.for_training(standin, num_ids=0, image_size=(64, 32))
    args = parse_args(["--target", TARGET, *map(str, arguments)])
    model = MODULES[args.method](encoder, args, num_source, torch.zeros(num_images), source_size=9).train()
    model.pseudo_labels.copy_(torch.arange(num_images) // 4)
    return model


def test_joint_loss_of_spcl(standin):
    model = module(standin, *SOURCE, "--memory_temperature", "0.1")
    model.memory.prototypes.copy_(F.normalize(torch.randn(17, model.encoder.num_features), dim=1))
    model.memory.labels.copy_(torch.cat([torch.arange(5), 5 + model.pseudo_labels]))
    images, rows = torch.randn(8, 3, 64, 32), torch.tensor([0, 0, 3, 3, 5, 6, 12, 16])
    loss, values, (bn_features, seen) = model(images, rows)
    with torch.no_grad():
        features = model.encoder.backbone(images)
        parts = []
        for part in features.chunk(2):
            # Each domain by its own mean and variance.
            normed = (part - part.mean(0)) / (part.var(0, correction=0) + model.encoder.bnneck.norms[0].eps).sqrt()
            parts.append(F.normalize(normed, dim=1))
        classes = torch.tensor([0, 1, 2, 3, 4, 5, 5, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7])
        want = {}
        for name, unit, asked in zip(("loss_source", "loss_target"), parts, rows.chunk(2), strict=True):
            similar = unit @ model.memory.prototypes.t() / 0.1
            logits = torch.stack([similar[:, classes == label].mean(1) for label in range(8)], dim=1)
            want[name] = F.cross_entropy(logits, classes[asked])
    for name, value in want.items():
        close(f"SpCL {name}", values[name], value)
    close("SpCL loss", loss, sum(want.values()))
    assert torch.equal(seen, rows) and not bn_features.requires_grad


def test_losses_of_idm(standin):
    weights = ["--mix_weight", "0.6", "--bridge_weight", "0.2", "--diversity_weight", "0.5", "--margin", "0.4"]
    model = module(standin, *SOURCE, "--method", "idm", *weights)
    classes = torch.tensor([0, 0, 3, 3, 5, 5, 7, 7])
    rows = torch.tensor([0, 0, 3, 3, 5, 8, 13, 14])
    features, logits = torch.randn(12, 16, requires_grad=True), torch.randn(12, 17, requires_grad=True)
    ratios = torch.rand(4, 1) * torch.tensor([[1.0, -1.0]]) + torch.tensor([[0.0, 1.0]])
    inputs = features, logits, ratios.requires_grad_()
    loss, values = model.bridged_losses(features, logits, rows, ratios)
    log_odds = logits[:, :8].double().log_softmax(1)
    soft = 0.1 / 8 + 0.9 * F.one_hot(classes, 8).double()
    source, target, mixed = features.double().chunk(3)
    # The mixed label is given, not learned: this loss moves the ratios through the mixed logits alone.
    known = ratios.detach()
    blend = known[:, :1] * soft[:4] + known[:, 1:] * soft[4:]
    distance = torch.cdist(features[:8].double(), features[:8].double())
    same = classes[:, None] == classes[None]
    far, near = (distance * same).amax(1), distance.masked_fill(same, 1e9).amin(1)
    want = {
        "loss_id": -(soft * log_odds[:8]).sum(1).mean(),
        "loss_mixed": -(blend * log_odds[8:]).sum(1).mean(),
        "loss_triplet": (far - near + 0.4).clamp(min=0).mean(),
        "loss_bridge": (
            ratios[:, 0] * (mixed - source).norm(dim=1) + ratios[:, 1] * (mixed - target).norm(dim=1)
        ).mean(),
        "loss_diversity": -ratios.double().std(0, correction=0).sum(),
    }
    for name, value in want.items():
        close(f"IDM {name}", values[name], value)
    shares = {"loss_id": 0.4, "loss_mixed": 0.6, "loss_triplet": 1, "loss_bridge": 0.2, "loss_diversity": 0.5}
    whole = sum(share * want[name] for name, share in shares.items())
    close("IDM loss", loss, whole)
    for found, wanted in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(whole, inputs), strict=True):
        close("IDM gradient", found, wanted)


def ratios_of(mixer, source, target):
    """Softmax of three linear maps, one after the other: the first is of each image's means and maxima, and added."""
    first, second, third = (part for part in mixer.modules() if isinstance(part, torch.nn.Linear))
    added = 0
    for tokens in (source, target):
        added = added + torch.cat([tokens.mean(1), tokens.max(1).values], dim=1) @ first.weight.t() + first.bias
    return F.softmax((added @ second.weight.t() + second.bias) @ third.weight.t() + third.bias, dim=1)


@pytest.mark.parametrize("stage", [0, 1])
def test_mixed_maps(standin, stage):
    """Features of the mixed third are those of maps put together by hand; ratios sum to 1 and learn."""
    model = module(standin, *SOURCE, "--method", "idm", "--mix_stage", stage)
    images, rows = torch.randn(4, 3, 64, 32), torch.tensor([0, 0, 5, 6])
    place, seen = model.mixer.place(model.encoder.backbone), []
    hook = place.register_forward_hook(lambda module, inputs, output: seen.append(output))
    features = model.encoder.backbone(images)
    hook.remove()
    ratios = model.mixer.ratios
    assert features.shape[0] == 6 and ratios.shape == (2, 2)
    torch.testing.assert_close(ratios.sum(1), torch.ones(2))
    whole = seen[0]
    source, target, mixed = whole.chunk(3)
    shares = ratios.view(2, 2, 1, 1)
    torch.testing.assert_close(mixed, shares[:, 0] * source + shares[:, 1] * target)
    torch.testing.assert_close(ratios, ratios_of(model.mixer, source, target), rtol=1e-4, atol=1e-5)
    # They do not change what they are made of.
    weights = [one for one in model.encoder.parameters() if one.requires_grad]
    assert not any(
        one is not None
        for one in torch.autograd.grad(ratios[:, 0].sum(), weights, retain_graph=True, allow_unused=True)
    )
    model(images, rows)[0].backward()
    assert all(float(parameter.grad.abs().sum()) > 0 for parameter in model.mixer.parameters() if parameter.ndim > 1)
    model.eval()
    assert model.encoder(images).shape[0] == 4


def resnet(folder):
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(folder)
    return folder


def test_norms_after_the_mixture_have_three_domains(tmp_path):
    encoder = ReIDModel.for_training(resnet(tmp_path), num_ids=0, image_size=(64, 32))
    args = parse_args(["--target", TARGET, *SOURCE, "--method", "idm", "--mix_stage", "1"])
    model = IDM(encoder, args, 5, torch.zeros(12))
    counts = {name: len(one.norms) for name, one in encoder.named_modules() if isinstance(one, DomainNorm)}
    assert {name: count for name, count in counts.items() if "embedder" in name or "stages.0" in name}
    for name, count in counts.items():
        assert count == (2 if "embedder" in name or "stages.0" in name else 3), name
    assert counts["bnneck"] == 3
    model.train()
    model.pseudo_labels.copy_(torch.arange(12) // 4)
    loss, *_ = model(torch.randn(8, 3, 64, 32), torch.tensor([0, 0, 3, 3, 5, 6, 12, 16]))
    loss.backward()
    with pytest.raises(ValueError, match="--mix_stage 3 is past the last stage of the backbone, 2"):
        Mixer(encoder.backbone, 3)


def test_activations_computed_twice_give_the_same_gradients(tmp_path):
    """With the mixture inside a stage that is computed again in the backward pass."""
    grads, means = [], []
    for again in (False, True):
        encoder = ReIDModel.for_training(resnet(tmp_path), num_ids=0, image_size=(64, 32))
        if again:
            encoder.enable_gradient_checkpointing()
        args = parse_args(["--target", TARGET, *SOURCE, "--method", "idm", "--mix_stage", "1"])
        torch.manual_seed(1)
        model = IDM(encoder, args, 5, torch.zeros(12)).train()
        model.pseudo_labels.copy_(torch.arange(12) // 4)
        model(torch.randn(8, 3, 64, 32), torch.tensor([0, 0, 3, 3, 5, 6, 12, 16]))[0].backward()
        grads.append({name: one.grad for name, one in model.named_parameters() if one.grad is not None})
        means.append({name: one for name, one in model.named_buffers() if "running" in name})
    for one, other in (grads, means):
        assert one.keys() == other.keys() and any("mixer" in name or "norms.2" in name for name in one)
        for name in one:
            torch.testing.assert_close(other[name], one[name], rtol=1e-4, atol=1e-6)


def test_domains_are_put_one_after_the_other(monkeypatch):
    shares = [torch.tensor([0, 1, 10, 11]), torch.tensor([2, 3, 12, 13])]
    monkeypatch.setattr("utils.batches.pseudo_batches.gather_with_gradient", lambda tensor: torch.cat(shares))
    assert gather_by_domain(shares[0], 2).tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
    assert gather_by_domain(shares[0], 1).tolist() == [0, 1, 10, 11, 2, 3, 12, 13]


# Whole runs


@pytest.fixture(scope="session")
def finished(small, tmp_path_factory):
    """A whole small run of each method: its folder."""
    folder = tmp_path_factory.mktemp("finished")
    for kind, more in KINDS.items():
        more = [*small, *more, "--checkpointing_steps", "2", "--output_dir", folder / kind]
        more += ["--rerank", "--k1", "5", "--k2", "3"] if kind == "spcl" else []
        assert train(*more) == 0
    return folder


LOSSES = {
    "cluster-contrast": ["loss_target"],
    "spcl": ["loss_target"],
    "spcl-adaptation": ["loss_source", "loss_target"],
    "idm": ["loss_id", "loss_mixed", "loss_triplet", "loss_bridge", "loss_diversity"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_run_leaves(finished, kind):
    out = finished / kind
    lines = log_of(out)
    assert [(line["step"], line["epoch"]) for line in lines] == [(n, 1 + (n - 1) // 3) for n in range(1, 7)]
    assert all(list(line) == ["step", "epoch", "lr", "grad_norm", "loss", *LOSSES[kind]] for line in lines)
    records = json.loads((out / "clusters.json").read_text())
    assert [record["epoch"] for record in records] == [0, 1, 2]
    assert all(record["clusters"] >= 2 and 0 <= record["noise"] < 1 for record in records)
    assert all(-1 <= record["ari"] <= 1 and 0 <= record["nmi"] <= 1 for record in records)
    metrics = json.loads((out / "metrics.json").read_text())
    assert [(one["epoch"], one["target"]) for one in metrics["history"]] == [(0, TARGET), (2, TARGET)]
    assert ("reranked" in metrics["targets"][TARGET]) == (kind == "spcl")
    model = ReIDModel.from_pretrained(out / "model")
    assert model.num_ids == 0 and not any("norms" in name for name in model.state_dict())
    page = (out / "report.html").read_text()
    for words in ("What the clusters hold", "Before and after", "eps 0.5", "data:image/jpeg", "Mixed: cluster"):
        assert words in page, words
    assert not list(out.glob("**/*.part")) and not list(out.glob(".checkpoint*"))
    assert json.loads((out / "args.json").read_text())["arguments"]["method"] in kind


def test_the_saved_model_is_the_one_that_was_measured(finished):
    """BatchNorm of the target among them: the test features of the saved model give the last number again."""
    from utils.evaluation.targets import evaluate_target, open_targets

    for kind in ("cluster-contrast", "idm"):
        model = ReIDModel.from_pretrained(finished / kind / "model")
        AcceleratorState._reset_state(True)
        from accelerate import Accelerator

        target = open_targets([TARGET])[0]
        found = evaluate_target(model, target, adapt_reid.transform_of(model), accelerator=Accelerator(cpu=True))
        told = json.loads((finished / kind / "metrics.json").read_text())["targets"][TARGET]
        assert found["mAP"] == pytest.approx(told["mAP"], abs=1e-4)


@kinds("cluster-contrast")
def test_a_cut_training_goes_on_to_the_same_numbers(small, finished, tmp_path, kind):
    """Cut in the middle of the second epoch, whose pseudo labels and memory are the checkpoint's."""
    common = [*small, *KINDS[kind], "--checkpointing_steps", "2", "--output_dir", tmp_path]
    train(*common, "--max_train_steps", "4")
    (checkpoint,) = (path for path in tmp_path.glob("checkpoint-4"))
    assert json.loads((checkpoint / "state.json").read_text())["batch"] == 1
    train(*common, "--resume_from_checkpoint", "latest")
    assert (tmp_path / "log.jsonl").read_text() == (finished / kind / "log.jsonl").read_text()
    assert (tmp_path / "clusters.json").read_text() == (finished / kind / "clusters.json").read_text()
    assert same_weights(weights_of(tmp_path), weights_of(finished / kind))


def test_spcl_clusters_its_memory_by_the_first_threshold(small, tmp_path, monkeypatch):
    """Before the second epoch only rows of images in its one batch have moved; the last clusters are the model's."""
    clustered, thresholds = [], []

    def spy_cluster(features, **settings):
        clustered.append(features.clone())
        return cluster(features, **settings)

    def spy_reliable(*arguments):
        labels, threshold = reliable(*arguments)
        thresholds.append((arguments[-1], threshold))
        return labels, threshold

    monkeypatch.setattr(adapt_reid, "cluster", spy_cluster)
    monkeypatch.setattr("methods.spcl.reliable", spy_reliable)
    train(*small, *KINDS["spcl-adaptation"], "--steps_per_epoch", "1", "--output_dir", tmp_path)
    first, second, last = clustered
    moved = (first != second).any(1)
    assert len(first) == 48 and 1 <= moved.sum() <= 8 and (last != second).any(1).all()
    torch.testing.assert_close(second.norm(dim=1), torch.ones(48))
    assert thresholds[0][0] is None
    assert thresholds[1:] == [(thresholds[0][1], thresholds[0][1])] * 2


@pytest.mark.slow
def test_kill_and_go_on(small, finished, tmp_path):
    """SIGKILL in an epoch, then continue: the log file is the unbroken run's, byte by byte."""
    common = [*small, *KINDS["spcl-adaptation"], "--checkpointing_steps", "1", "--output_dir", str(tmp_path)]
    killed = stopped(start(SCRIPT, *common), lambda: lines_written(tmp_path) >= 2)
    assert killed.returncode == -signal.SIGKILL
    launch(SCRIPT, *common, "--resume_from_checkpoint", "latest")
    assert (tmp_path / "log.jsonl").read_text() == (finished / "spcl-adaptation" / "log.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_as_one(small, finished, tmp_path, kind):
    """The same global batch on two processes: BatchNorm of each domain, memory, batches, mixture, clusters."""
    launch(SCRIPT, *small, *KINDS[kind], "--train_batch_size", "4", "--output_dir", tmp_path, processes=2)
    one, two = log_of(finished / kind), log_of(tmp_path)
    assert len(one) == len(two) == 6
    same_steps(f"{kind}, two processes", one, two, rest=4e-3)
    first, second = weights_of(finished / kind), weights_of(tmp_path)
    assert max(float((first[name].float() - second[name].float()).abs().max()) for name in first) < 2e-3


@pytest.mark.slow
def test_a_resnet_on_two_processes(small, tmp_path):
    """Norms of two and of three domains inside the backbone, each over both processes."""
    common = [*small, *KINDS["idm"], "--num_train_epochs", "1", "--backbone", resnet(tmp_path / "resnet")]
    train(*common, "--output_dir", tmp_path / "one")
    launch(SCRIPT, *common, "--train_batch_size", "4", "--output_dir", tmp_path / "two", processes=2)
    for left, right in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        assert left == pytest.approx(right, rel=1e-3, abs=1e-3)


def test_half_precision(small, finished, tmp_path):
    train(*small, *KINDS["idm"], "--mixed_precision", "bf16", "--max_train_steps", "1", "--output_dir", tmp_path)
    (line,), wanted = log_of(tmp_path), log_of(finished / "idm")[0]
    for name in LOSSES["idm"]:
        assert line[name] == pytest.approx(wanted[name], rel=0.1, abs=0.02), name
    assert line["loss"] != wanted["loss"]
    assert all(tensor.dtype == torch.float32 for tensor in weights_of(tmp_path).values() if tensor.is_floating_point())


def test_updates_of_the_memory_differ(small, finished, tmp_path):
    train(*small, "--memory_update", "hard", "--max_train_steps", "3", "--output_dir", tmp_path)
    lines, wanted = log_of(tmp_path), log_of(finished / "cluster-contrast")[:3]
    assert lines[0] == wanted[0] and lines[2]["loss"] != wanted[2]["loss"]


# Data without labels, cameras or enough of anything


def images_in(folder, count=40):
    folder.mkdir(parents=True)
    for number, row in enumerate(load_reid(TARGET)["train"].select(range(count))):
        row["image"].save(folder / f"{number:03d}.png")
    return folder


def test_a_folder_of_images_is_enough(small, tmp_path):
    """No labels, no cameras, no query: nothing is measured, and the report says nothing of truth."""
    images_in(tmp_path / "set" / "train")
    out = tmp_path / "out"
    train(*small, "--target", tmp_path / "set", "--max_train_steps", "2", "--output_dir", out)
    assert len(log_of(out)) == 2
    record = json.loads((out / "clusters.json").read_text())[-1]
    assert record["ari"] is None and record["clusters"] >= 2
    assert ReIDModel.from_pretrained(out / "model").num_ids == 0
    page = (out / "report.html").read_text()
    assert "Close: cluster" in page and "ARI" not in page and "mean cosine to their centre" in page


def test_a_table_without_pids_is_enough(tmp_path):
    """Names of files, images in parquet, a saved data set: without pids, and without cameras too."""
    for kind in ("csv", "parquet", "saved"):
        (tmp_path / kind).mkdir()
    train = images_in(tmp_path / "csv" / "images", 6)
    names = "".join(f"images/{path.name}\n" for path in sorted(train.iterdir()))
    (tmp_path / "csv" / "metadata.csv").write_text("file_name\n" + names)
    data = datasets.Dataset.from_dict({"image": load_reid(TARGET)["train"][:6]["image"], "camid": [0, 1, 2, 0, 1, 2]})
    data.to_parquet(tmp_path / "parquet" / "train.parquet")
    data.remove_columns("camid").save_to_disk(tmp_path / "saved" / "set")
    for place in ("csv", "parquet", "saved/set"):
        rows, truth, measurable = open_unlabelled([str(tmp_path / place)])
        assert truth is None and measurable == []
        cameras = data["camid"][:] if place == "parquet" else [0] * 6
        assert rows["pid"][:] == [0] * 6 and rows["camid"][:] == cameras
        assert [one.tobytes() for one in rows["image"][:]] == [one.tobytes() for one in data["image"][:]]
        with pytest.raises(ValueError, match="no column 'person' for the pid"):
            open_unlabelled([f"{tmp_path / place}:pid_column=person"])
    labelled = tmp_path / "parquet" / "query.parquet"
    data.to_parquet(labelled)
    with pytest.raises(ValueError, match="train, query, which need a column of pids"):
        open_unlabelled([str(labelled.parent)])


def test_one_camera_is_enough(small, tmp_path):
    for row_number, row in enumerate(load_reid(TARGET)["train"]):
        folder = tmp_path / "set" / f"{row['pid']:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        row["image"].save(folder / f"{row_number}_c1.png")
    train(*small, "--target", tmp_path / "set", "--max_train_steps", "2", "--output_dir", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "clusters.json").read_text())[-1]["ari"] is not None


def test_bad_data_is_told_before_a_model_loads(small, tmp_path, monkeypatch):
    monkeypatch.setattr(ReIDModel, "for_training", None)
    out = ["--output_dir", tmp_path / "out"]
    assert "48 images cannot be clustered by their --cluster_k1 48 nearest" in refused(
        *small, *out, "--cluster_k1", "48"
    )
    assert "48 images cannot be averaged over their --cluster_k2 48 nearest" in refused(
        *small, *out, "--cluster_k2", "48"
    )
    assert "cannot be split" in refused(*small, *out, "--train_batch_size", "9")
    assert "there are only 5" in refused(*small, *out, *SOURCE, "--train_batch_size", "16")
    assert "did you mean" in refused(*small, *out, "--target", "market1502")
    assert "no checkpoint 'checkpoint-7'" in refused(*small, *out, "--resume_from_checkpoint", "checkpoint-7")


def test_clusters_that_collapse_say_what_to_turn(small, tmp_path):
    out = ["--output_dir", tmp_path / "out"]
    noise = refused(*small, *out, "--eps", "0.01", "--min_samples", "6")
    assert "before epoch 1" in noise and "are in no cluster" in noise and "Raise --eps 0.01" in noise
    assert "50 % of them within 0." in noise
    one = refused(*small, *out, "--eps", "0.99", "--cluster_k1", "40", "--cluster_k2", "6")
    assert "fell into 1" in one and "Lower --eps 0.99 or --cluster_k1" in one


def test_a_learned_pooling_is_not_dropped_silently(small, tmp_path):
    model = ReIDModel.from_backbone(resnet(tmp_path / "resnet"), image_size=(64, 32))
    add_gem(model.backbone)
    model.save_pretrained(tmp_path / "gem")
    words = ["--backbone", tmp_path / "gem", "--pooling", "mean", "--output_dir", tmp_path / "out"]
    assert "--pooling mean" in refused(*small, *words) and "learned another pooling" in refused(*small, *words)


@pytest.mark.slow
def test_idm_does_not_start_under_deepspeed(small, tmp_path):
    """DeepSpeed trains weights of its own, into which the means of the clusters would not come."""
    pytest.importorskip("deepspeed")
    config = ROOT / "accelerate_configs" / "deepspeed_zero2.yaml"
    command = ["accelerate", "launch", "--config_file", config, "--num_processes", "1", ROOT / "adapt_reid.py"]
    run = subprocess.run(
        [*map(str, command), *small, *KINDS["idm"], "--output_dir", str(tmp_path / "out")],
        env=environment(DS_ACCELERATOR="cpu"),
        capture_output=True,
        text=True,
    )
    assert (
        run.returncode and "--method idm writes weights" in run.stderr and "start it without DeepSpeed" in run.stderr
    )


def test_going_on_with_other_arguments_names_them(small, finished, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(finished / "spcl", folder)
    common = [*small, *KINDS["spcl"], "--checkpointing_steps", "2", "--output_dir", folder]
    assert "eps_gap was 0.02, is 0.1" in refused(*common, "--eps_gap", "0.1", "--resume_from_checkpoint", "latest")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--method", "idm"], "--method idm is not one of --setting unsupervised"),
        (["--setting", "adaptation", "--method", "cluster-contrast"], "not one of --setting adaptation"),
        (["--source", "market1501"], "has labels, which --setting unsupervised does not use"),
        (["--setting", "adaptation", "--target", "msmt17"], "needs a labelled --source"),
        (["--eps", "1.2"], "--eps 1.2 must be above 0 and below 1"),
        (["--method", "spcl", "--eps", "0.1", "--eps_gap", "0.1"], "--eps 0.1 with --eps_gap 0.1 must be above 0"),
        (["--min_samples", "1"], "--min_samples must be 2 or more"),
        (["--memory_update", "soft"], "invalid choice"),
        (["--gradient_accumulation_steps", "2"], "look at a whole batch at once"),
        (["--k1", "0"], "--k1 must be 1 or more"),
        (["--k1", "9"], "--k1 is of re-ranking, without --rerank; for the clustering give --cluster_k1"),
        (["--cluster_k1", "0"], "--cluster_k1 must be 1 or more"),
    ],
)
def test_arguments_that_cannot_be(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(arguments)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_only_a_run_without_sets_is_the_demo():
    assert parse_args([]).demo and parse_args(["--setting", "adaptation"]).demo
    assert not parse_args(["--setting", "adaptation", "--source", "market1501"]).demo
    assert not parse_args(["--target", "market1501"]).demo


def test_recipes_set_the_published_values_and_flags_win():
    args = parse_args(["--recipe", "cluster-contrast", "--target", "msmt17", "--eps", "0.7"])
    assert (args.method, args.setting, args.target, args.eps, args.cluster_k1) == (
        "cluster-contrast", "unsupervised", ["msmt17"], 0.7, 30,
    )  # fmt: skip
    assert (args.train_batch_size, args.images_per_id, args.memory_momentum) == (256, 16, 0.1)
    assert (args.steps_per_epoch, parse_args(["--recipe", "spcl"]).steps_per_epoch) == (200, 400)
    args = parse_args(["--recipe", "idm"])
    assert (args.method, args.setting, args.source) == ("idm", "adaptation", ["msmt17"])
    assert (args.learning_rate, args.steps_per_epoch, args.num_train_epochs) == (3.5e-4, 400, 50)
    assert (args.mix_weight, args.bridge_weight, args.diversity_weight, args.margin) == (0.7, 0.1, 1.0, 0.3)

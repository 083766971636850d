"""Whole runs of the methods of adapt_reid.py: resumed, on two processes, on data they cannot use."""

import functools
import json

import datasets
import pytest
import torch
from safetensors.torch import load_file

import adapt_reid
from tests import runs
from tests.methods.reference import same_steps
from tests.runs import launch, log_of, same_weights, weights_of
from utils.datasets.load import load_reid
from utils.datasets.portable import save
from utils.modeling.reid_model import ReIDModel

SCRIPT = "adapt_reid.py"
# As many images as the smallest set that has to do: 12 identities x 8 images, half of the identities for training.
SETS = {"a": "synthetic:domain=a,num_ids=5,images_per_id=4", "b": "synthetic:domain=b,num_ids=6,images_per_id=8"}
SOURCE = ["--setting", "adaptation", "--source", "a"]
SMALL = [
    "--train_batch_size", "8", "--images_per_id", "2", "--steps_per_epoch", "3", "--num_train_epochs", "2",
    "--cluster_k1", "6", "--cluster_k2", "2", "--jaccard", "faiss",
    "--eps", "0.5", "--min_samples", "2", "--eval_every", "9", "--lr_warmup_epochs", "0",
    "--learning_rate", "1e-4", "--resolution", "64", "32", "--test_resample", "bicubic", "--blur", "0.5",
]  # fmt: skip
STAGES = ["--source_steps", "1", "--num_train_epochs", "4", "--steps_per_epoch", "2"]
KINDS = {
    "hhcl": ["--method", "hhcl"],
    "pplr": ["--method", "pplr"],
    "ice": ["--method", "ice", "--norm_group", "4"],
    "cacl": [*SOURCE, "--method", "cacl", "--num_train_epochs", "3", "--steps_per_epoch", "2"],
    "unrn": [*SOURCE, "--method", "unrn", *STAGES, "--queue_size", "12", "--norm_group", "4"],
    "hcd": [*SOURCE, "--method", "hcd", "--steps_per_epoch", "2", "--num_train_epochs", "4"],
    "glt": [*SOURCE, "--method", "glt", *STAGES, "--group_counts", "4", "6", "8"],
}
SLOW_KINDS = {
    "glt-rounds": [*SOURCE, "--method", "glt", *STAGES, "--rounds", "2", "--round_epochs", "1"],
    "hhcl-instances": ["--method", "hhcl", "--memory_update", "instances"],
    "pplr-without-cameras": ["--method", "pplr", "--camera_weight", "0"],
    "idm-earlier": [*SOURCE, "--method", "idm", "--earlier_weight", "1", "--norm_group", "4"],
    "spcl-floor": ["--method", "spcl", "--probability_floor", "1e-6"],
}
# Of the records in clusters.json; others have three.
EPOCHS = {"cacl": [0, 1, 2, 3], "hcd": [0, 1, 2, 3], "unrn": [1, 3, 4]}
EPOCHS |= {"glt": [1, 2, 3, 4], "glt-rounds": [1, 2, 3, 4]}
COMMANDS = KINDS | SLOW_KINDS
# Those whose checkpoints hold the most: a teacher and two networks, groups and a queue, labels that move.
ALL = [kind if kind in ("pplr", "glt", "hcd") else pytest.param(kind, marks=pytest.mark.slow) for kind in COMMANDS]
LOSSES = {
    "hhcl": ["loss_target"],
    "pplr": ["loss_whole", "loss_parts", "loss_triplet", "loss_cameras"],
    "ice": ["loss_centres", "loss_views", "loss_same", "loss_cameras"],
    "cacl": ["loss_source", "loss_target"],
    "unrn": ["loss_classes", "loss_triplet", "loss_apart", "loss_centres", "loss_queue"],
    "hcd": ["loss_source", "loss_target"],
    "glt": ["loss_classes", "loss_triplet", "loss_centres", "loss_queue"],
}
train, refused = (functools.partial(one, adapt_reid) for one in (runs.run, runs.refused))


@pytest.fixture(scope="session")
def stored(tmp_path_factory):
    """{name: folder} of the sets, drawn once at the size of training."""
    folder = tmp_path_factory.mktemp("sets")
    for name, spec in SETS.items():
        splits = load_reid(spec).items()
        small = {split: data.map(lambda row: {"image": row["image"].resize((32, 64))}) for split, data in splits}
        save(datasets.DatasetDict(small), folder / name)
    return {name: str(folder / name) for name in SETS}


@pytest.fixture(scope="session")
def command(stored, standins):
    """The words of a run of a method: its sets by their folders."""

    def words(kind, *more):
        start = ["--target", "b", *SMALL, "--backbone", str(standins / "clip")]
        return [stored.get(word, word) for word in map(str, [*start, *COMMANDS[kind], *more])]

    return words


@pytest.fixture(scope="session")
def straight(command, tmp_path_factory):
    """The folder of a whole run of a method, once for all tests."""

    @functools.cache
    def folder(kind):
        place = tmp_path_factory.mktemp(kind)
        assert train(*command(kind), "--checkpointing_steps", "4", "--output_dir", place) == 0
        return place

    return folder


@pytest.mark.parametrize("kind", ALL)
def test_a_run_and_the_same_cut_and_resumed(command, straight, tmp_path, kind):
    """Cut in the middle of an epoch: every number and every weight is that of the straight run."""
    whole = straight(kind)
    if kind in LOSSES:
        assert all(list(line) == ["step", "epoch", "lr", "grad_norm", "loss", *LOSSES[kind]] for line in log_of(whole))
    epochs = [record["epoch"] for record in json.loads((whole / "clusters.json").read_text())]
    assert epochs == EPOCHS.get(kind, [0, 1, 2])
    model = ReIDModel.from_pretrained(whole / "model")
    assert model.num_ids == 0 and model.resample == "bicubic"
    common = command(kind, "--checkpointing_steps", "4", "--output_dir", tmp_path)
    train(*common, "--max_train_steps", "4")
    train(*common, "--resume_from_checkpoint", "latest")
    assert (tmp_path / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()
    assert (tmp_path / "clusters.json").read_bytes() == (whole / "clusters.json").read_bytes()
    assert same_weights(weights_of(tmp_path), weights_of(whole))


def test_the_source_is_learned_without_erasing_and_by_one_adam(command, straight, tmp_path, monkeypatch):
    """The first epoch, of the source alone, is that of a run without erasing; later ones are not."""
    plain, cleared = log_of(straight("glt")), []
    fresh = adapt_reid.GLT.fresh_optimizer
    monkeypatch.setattr(
        adapt_reid.GLT, "fresh_optimizer", lambda args, epoch: cleared.append(fresh(args, epoch)) or cleared[-1]
    )
    more = ["--source_epochs", "2", "--erasing", "1", "--max_train_steps", "3", "--output_dir", tmp_path]
    train(*command("glt"), *more)
    assert [line["epoch"] for line in log_of(tmp_path)] == [1, 2, 3] and cleared == [False, False, True]
    assert log_of(tmp_path)[0] == plain[0]
    more[3] = "0"
    train(*command("glt"), *more[:-1], tmp_path / "plain")
    erased, plain = log_of(tmp_path), log_of(tmp_path / "plain")
    assert [left == right for left, right in zip(erased, plain, strict=True)] == [True, True, False]


@pytest.mark.slow
@pytest.mark.parametrize("kind", COMMANDS)
def test_two_processes_train_as_one(command, straight, tmp_path, kind):
    launch(SCRIPT, *command(kind), "--train_batch_size", "4", "--output_dir", tmp_path, processes=2)
    one, two = log_of(straight(kind)), log_of(tmp_path)
    # Sums in another order; Adam and a low temperature enlarge their rounding errors from step to step.
    same_steps(f"{kind}, two processes", one, two, rest=2e-2)
    first, second = weights_of(straight(kind)), weights_of(tmp_path)
    weights = max(float((first[name].float() - second[name].float()).abs().max()) for name in first)
    print(f", weights {weights:.1e}")
    assert len(one) >= 6 and weights < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("kind", COMMANDS)
def test_the_loss_falls(command, tmp_path, kind):
    more = ["--num_train_epochs", "1", "--steps_per_epoch", "30", "--learning_rate", "1e-3", "--output_dir", tmp_path]
    more += ["--source_epochs", "0", "--rounds", "1"] if STAGES[0] in COMMANDS[kind] else []
    train(*command(kind), *more)
    # A queue that fills is contrasted with more and more; centres move with every image.
    moving = ("loss_queue", "loss_centres") if "loss_queue" in LOSSES.get(kind.removesuffix("-rounds"), ()) else ()
    losses = [line["loss"] - sum(line[name] for name in moving) for line in log_of(tmp_path)]
    first, last = sum(losses[:6]) / 6, sum(losses[-6:]) / 6
    print(f"\n{kind}: loss of the first six steps {first:.3f}, of the last six {last:.3f}")
    assert last < 0.95 * first


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(command, tmp_path, kind):
    """Clusters of features in half precision are others, and so are the losses; weights and memories stay whole."""
    train(*command(kind), "--mixed_precision", "bf16", "--max_train_steps", "3", "--output_dir", tmp_path)
    lines = log_of(tmp_path)
    assert len(lines) == 3 and all(0 <= line[name] < 100 for line in lines for name in LOSSES[kind])
    state = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in state.values() if tensor.is_floating_point())


def test_data_without_cameras_is_refused_before_a_model_loads(command, stored, tmp_path, monkeypatch):
    monkeypatch.setattr(ReIDModel, "for_training", None)
    for number, row in enumerate(load_reid(stored["b"])["train"]):
        folder = tmp_path / "set" / f"{row['pid']:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        row["image"].save(folder / f"{number}_c1.png")
    for kind in ("pplr", "ice", "cacl"):
        words = refused(*command(kind), "--target", tmp_path / "set", "--output_dir", tmp_path / "out")
        assert f"--method {kind} needs images of 2 cameras or more" in words and "shows 1" in words


def test_more_groups_than_images_are_refused_before_a_model_loads(command, tmp_path, monkeypatch):
    monkeypatch.setattr(ReIDModel, "for_training", None)
    words = refused(*command("glt"), "--group_counts", "4", "99", "--output_dir", tmp_path / "out")
    assert "48 images cannot be divided into 99 groups (--group_counts 4 99)" in words


# k-means always gives as many groups as asked for.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "glt"])
def test_collapsed_clusters_say_what_to_turn(command, tmp_path, kind):
    words = refused(*command(kind), "--eps", "0.01", "--min_samples", "6", "--output_dir", tmp_path / "out")
    assert (
        f"before epoch {2 if kind == 'unrn' else 1}: the clusters collapsed" in words and "Raise --eps 0.01" in words
    )


def test_groups_of_norms_that_do_not_divide_a_batch(command, tmp_path):
    words = refused(*command("hhcl"), "--norm_group", "3", "--output_dir", tmp_path / "out")
    assert "the 8 images of a process and domain" in words and "groups of 3" in words


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--method", "hhcl", "--memory_update", "mean"], "--memory_update mean is not of --method hhcl"),
        (["--memory_update", "instances"], "is not of --method cluster-contrast, which has momentum, hard and mean"),
        (["--setting", "adaptation", "--method", "ice"], "--method ice is not one of --setting adaptation"),
        (["--erasing_value", "0.1", "0.2"], "--erasing_value takes 1 number or 3, got 2"),
    ],
)
def test_arguments_that_cannot_be(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        adapt_reid.parse_args(arguments)
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_help_lists_the_flags_of_one_method(capsys):
    def listed(*arguments):
        with pytest.raises(SystemExit):
            adapt_reid.parse_args([*arguments, "--help"])
        return capsys.readouterr().out

    own = {"--num_parts": "pplr", "--teacher_momentum": "ice", "--mix_stage": "idm", "--eps_gap": "spcl"}
    everything = listed()
    assert all(flag in everything for flag in (*own, "--camera_weight", "--learning_rate"))
    for words in (["--method", "pplr"], ["--recipe", "pplr-msmt17"]):
        shown = listed(*words)
        assert [flag for flag in own if flag in shown] == ["--num_parts"]
        assert "--camera_weight" in shown and "--learning_rate" in shown and "--memory_update" not in shown
    # Hidden flags still work.
    assert adapt_reid.parse_args(["--method", "pplr", "--mix_stage", "1"]).mix_stage == 1


def test_recipes_hold_the_published_values():
    args = adapt_reid.parse_args(["--recipe", "hhcl"])
    assert (args.eps, args.num_train_epochs, args.steps_per_epoch, args.memory_update) == (0.45, 60, 200, "hybrid")
    assert (args.train_batch_size, args.images_per_id, args.pooling, args.memory_momentum) == (256, 16, "mean", 0.1)
    args = adapt_reid.parse_args(["--recipe", "hhcl-msmt17"])
    assert (args.eps, args.steps_per_epoch, args.target) == (0.7, 300, ["msmt17"])
    args = adapt_reid.parse_args(["--recipe", "pplr-msmt17"])
    assert (args.eps, args.camera_weight, args.resolution, args.smoothing_epochs) == (0.6, 1.0, [384, 128], 5)
    args = adapt_reid.parse_args(["--recipe", "ice"])
    assert (args.eps, args.train_batch_size, args.num_train_epochs, args.norm_group) == (0.55, 32, 40, 8)
    rates = [adapt_reid_rate(args, epoch) for epoch in (1, 2, 11, 40)]
    assert rates == pytest.approx([0.1, 0.19, 1, 1])


def adapt_reid_rate(args, epoch):
    from utils.training.optimizer import warmup_multistep

    return warmup_multistep(epoch, args.lr_warmup_epochs, args.lr_warmup_factor, args.lr_milestones, args.lr_gamma)

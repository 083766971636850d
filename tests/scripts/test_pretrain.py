"""pretrain_backbone.py: the objectives against their definitions, whole runs, interruptions, who opens the result."""

import functools
import json
import math
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel, SwinConfig, SwinModel

import evaluate
import finetune_reid
import pretrain_backbone
import train_dcac
from methods.dino import SelfDistillation, distillation_loss
from methods.pretraining import share_batch_of_recipe
from pretrain_backbone import Classification, momentum, parse_args
from tests import runs
from tests.runs import calls_of, launch, lines_written, log_of, same_weights, start, stopped, weights_of
from utils.batches.mixing import Mix
from utils.batches.shuffled import ShuffleSampler
from utils.batches.transforms import ReIDImages
from utils.batches.transforms import test_transform as picture_transform
from utils.flags import CLIP_DIR
from utils.launch import start_training
from utils.modeling.backbones import ResNetBackbone, load_backbone
from utils.modeling.export import write_backbone_folder
from utils.modeling.names import open_backbone
from utils.modeling.reid_model import ReIDModel

TARGET = "synthetic:domain=b,num_ids=3,images_per_id=4"
SMALL = [
    *("--source", "synthetic:domain=a,num_ids=6,images_per_id=4", "--resolution", "64", "32"),
    *("--train_batch_size", "8", "--num_train_epochs", "2", "--checkpointing_steps", "2", "--eval_every", "9"),
]
MIXED = ["--mixup", "0.8", "--cutmix", "1", "--randaugment_ops", "1"]
DINO = [*("--objective", "dino", "--local_crops", "2", "--prototypes", "32", "--head_width", "32")]
EVERY_STEP = ["--checkpointing_steps", "1", "--checkpoints_total_limit", "9"]
FINISHED = [*SMALL, *MIXED, *EVERY_STEP, "--ema_decay", "0.3", "--layer_decay", "0.9", "--target", TARGET]
DISTILLED = [*SMALL, *DINO, *EVERY_STEP, "--adam_weight_decay", "0.04", "--weight_decay_end", "0.4"]
TINY_SWIN = {"image_size": 32, "embed_dim": 12, "depths": [2, 2], "num_heads": [2, 3], "window_size": 4}
CONVOLUTION = "backbone.model.embedder.embedder.convolution.weight"

SCRIPT = "pretrain_backbone.py"
train, refused = (functools.partial(one, pretrain_backbone) for one in (runs.run, runs.refused))


def tensors_of(folder, step):
    return load_file(Path(folder) / f"checkpoint-{step}" / "model.safetensors")


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A whole small run: its folder."""
    out = tmp_path_factory.mktemp("finished") / "out"
    train(*FINISHED, "--output_dir", out)
    return out


@pytest.fixture(scope="session")
def distilled(tmp_path_factory):
    out = tmp_path_factory.mktemp("distilled") / "out"
    train(*DISTILLED, "--output_dir", out)
    return out


# The objectives


def test_classification_is_cross_entropy_with_mixed_and_smoothed_labels():
    torch.manual_seed(0)
    model = Classification(open_backbone("resnet-small", (64, 32), from_scratch=True), 5, label_smoothing=0.1)
    images, labels = torch.randn(6, 3, 64, 32), torch.tensor([0, 1, 2, 3, 4, 4])
    for mix in (Mix(), Mix(0.3), Mix(0.75, (0, 32, 0, 16))):
        loss, values = model(images, labels, mix)
        swapped = [1, 0, 3, 2, 5, 4]
        mixed = images.clone() if mix.box else mix.share * images + (1 - mix.share) * images[swapped]
        if mix.box:
            mixed[:, :, 0:32, 0:16] = images[swapped][:, :, 0:32, 0:16]
        with torch.no_grad():
            logits = model.classifier(model.backbone(mixed)).double()
        own, other = (F.one_hot(one, 5).double() for one in (labels, labels[swapped]))
        soft = 0.9 * (mix.share * own + (1 - mix.share) * other) + 0.1 / 5
        assert loss.item() == pytest.approx(-(soft * logits.log_softmax(1)).sum(1).mean().item(), rel=1e-5)
        hits = [(logits.argmax(1) == one).double().mean().item() for one in (labels, labels[swapped])]
        assert values["accuracy"].item() == pytest.approx(mix.share * hits[0] + (1 - mix.share) * hits[1])


def test_distillation_loss_is_dinos():
    """As DINO's authors write it: over teacher's crops, over student's other crops."""
    torch.manual_seed(0)
    student, teacher, centre = torch.randn(5, 4, 7), torch.randn(2, 4, 7), torch.randn(7)
    loss, entropy = distillation_loss(student, teacher, centre, 0.1, 0.04)
    total, terms, entropies = 0.0, 0, []
    for place, scores in enumerate(teacher.double()):
        wanted = ((scores - centre.double()) / 0.04).softmax(1)
        entropies.append(-(wanted * wanted.log()).sum(1).mean())
        for number, told in enumerate(student.double()):
            if number != place:
                total += -(wanted * (told / 0.1).log_softmax(1)).sum(1).mean()
                terms += 1
    assert terms == 8
    assert loss.item() == pytest.approx((total / terms).item(), rel=1e-5)
    assert entropy.item() == pytest.approx(torch.stack(entropies).mean().item(), rel=1e-4)


def test_scores_are_cosines_with_the_prototypes():
    torch.manual_seed(0)
    model = SelfDistillation(open_backbone("resnet-small", (64, 32), from_scratch=True), 9, 16).eval()
    crops = torch.randn(4, 3, 3, 32, 16)
    with torch.no_grad():
        scores = model.scores(crops)
        code = model.head(model.backbone(crops[2, 1:2]))
        wanted = F.cosine_similarity(code, model.prototypes.weight)
    assert scores.shape == (3, 4, 9)
    torch.testing.assert_close(scores[1, 2], wanted, rtol=1e-4, atol=1e-5)


def test_schedules_of_the_running_mean_and_the_temperature():
    args = parse_args([*SMALL, *DINO, "--teacher_momentum", "0.9", "--teacher_temperature", "0.07"])
    assert [momentum(args, step, 10) for step in (0, 5, 10)] == pytest.approx([0.9, 0.95, 1.0])
    assert momentum(args, 3, 10) == pytest.approx(1 - 0.1 * (math.cos(math.pi * 0.3) + 1) / 2)
    args.teacher_warmup_epochs = 4
    told = [pretrain_backbone.teacher_temperature(args, epoch) for epoch in (1, 2, 3, 4, 50)]
    assert told == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07])
    for short in (0, 1):
        args.teacher_warmup_epochs = short
        assert pretrain_backbone.teacher_temperature(args, 1) == 0.07
    args = parse_args([*SMALL, "--ema_decay", "0.99"])
    assert [momentum(args, step, 10) for step in (0, 8, 5000)] == pytest.approx([0.1, 0.5, 0.99])


def test_weight_decay_of_all_steps(finished, distilled):
    """Where it rises it does so by half a cosine, and what has none gets none."""

    def decays(folder, step):
        kept = torch.load(folder / f"checkpoint-{step}" / "optimizer.pt", weights_only=True)
        return sorted({group["weight_decay"] for group in kept["optimizer"]["param_groups"]})

    assert [decays(finished, step) for step in (3, 6)] == [[0.0, 0.05]] * 2
    for step in (3, 4, 5, 6):
        rise = (1 - math.cos(math.pi * (step - 1) / 6)) / 2
        assert decays(distilled, step) == pytest.approx([0.0, 0.04 + 0.36 * rise])


@pytest.mark.parametrize("name", ["finished", "distilled"])
def test_running_mean_of_all_steps(name, request):
    """Each checkpoint's mean follows from the one before and its own weights; the result is the mean."""
    folder, common = request.getfixturevalue(name), {"finished": FINISHED, "distilled": DISTILLED}[name]
    states = {step: tensors_of(folder, step) for step in (3, 4, 5, 6)}
    parsed, moved = parse_args(common), 0.0
    norm = "backbone.model.encoder.stages.3.layers.0.layer.1.normalization.running_var"
    for step in (3, 4, 5):
        keep = momentum(parsed, step, 6)
        # The teacher's own forward moves its BatchNorm too.
        for key in (CONVOLUTION, *([norm] if name == "finished" else [])):
            before, now = (states[place][f"average.module.{key}"] for place in (step, step + 1))
            weights = states[step + 1][f"model.{key}"]
            torch.testing.assert_close(now, keep * before + (1 - keep) * weights, rtol=1e-4, atol=1e-6)
            moved += float((now - weights).abs().max())
    assert moved > 0
    saved = load_file(folder / "backbone" / "model.safetensors")
    assert torch.equal(saved[CONVOLUTION.removeprefix("backbone.model.")], states[6][f"average.module.{CONVOLUTION}"])


def test_prototypes_rest_and_the_centre_follows_the_teacher(distilled):
    states = [tensors_of(distilled, step) for step in range(1, 5)]
    prototypes = [state["model.prototypes.weight"] for state in states]
    # The rate of the first step is 0 anyway; the first epoch has three.
    assert torch.equal(prototypes[0], prototypes[2]) and not torch.equal(prototypes[2], prototypes[3])
    centres = [state["model.centre"] for state in states]
    assert all(0 < float(centre.abs().max()) < 1 for centre in centres)
    # Of the first step: a tenth of what the teacher, then the student's twin, says of the first batch.
    args = parse_args(DISTILLED)
    AcceleratorState._reset_state(True)
    accelerator = start_training(args)
    rows, labels, _ = pretrain_backbone.open_train(args)
    model, average = pretrain_backbone.build_model(args, accelerator, 6)
    sampler = ShuffleSampler(len(rows), 8, args.seed)
    sampler.set_epoch(1)
    images = ReIDImages(
        rows, pretrain_backbone.build_transform(args, model.backbone, accelerator.device), labels.tolist()
    )
    batch = next(iter(torch.utils.data.DataLoader(images, batch_sampler=sampler)))
    AcceleratorState._reset_state(True)
    with torch.no_grad():
        scores = average.module.scores(batch["images"]["whole"])
    torch.testing.assert_close(centres[0], 0.1 * scores.mean((0, 1)), rtol=1e-3, atol=1e-5)
    assert batch["images"]["whole"].shape == (8, 2, 3, 64, 32) and batch["images"]["parts"].shape == (8, 2, 3, 32, 16)


@pytest.mark.slow
def test_dino_does_not_collapse(tmp_path):
    """Teachers that say the same of every image, or nothing of any, are where DINO ends when it fails."""
    most = math.log(128)
    train(
        *("--source", "synthetic:domain=a,num_ids=128", "--objective", "dino", "--prototypes", "128"),
        *("--local_crops", "2", "--learning_rate", "1e-3", "--num_train_epochs", "16", "--max_train_steps", "80"),
        *("--output_dir", tmp_path),
    )
    last = log_of(tmp_path)[-8:]
    assert all(0.1 * most < line["teacher_entropy"] < 0.8 * most for line in last)
    # A student that tells no image from another has at least this loss.
    assert all(line["loss"] < 0.9 * most for line in last)


# Arguments


def test_recipe_sets_the_published_values_and_flags_win():
    args = parse_args(["--recipe", "diff-person", "--source", "somewhere", "--no-from_scratch", "--cutmix", "0.5"])
    assert (args.backbone, args.num_train_epochs, args.learning_rate) == ("resnet50", 300, 4e-3)
    assert (args.adam_weight_decay, args.train_batch_size, args.lr_warmup_epochs) == (0.05, 512, 20)
    assert (args.lr_scheduler, args.resolution, args.objective) == ("cosine", [256, 128], "classification")
    assert args.mixup > 0 and args.randaugment_ops > 0 and args.erasing > 0 and args.label_smoothing > 0
    assert args.cutmix == 0.5 and args.from_scratch is False and args.target == []
    assert parse_args(["--recipe", "diff-person", "--source", "x"]).from_scratch is True
    assert parse_args([]).from_scratch is True and parse_args(["--backbone", "resnet50"]).from_scratch is False
    assert parse_args(["--recipe", "diff-person-dino", "--source", "x"]).objective == "dino"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--image_fraction", "1.5"], "--image_fraction must be above 0 and at most 1, got 1.5"),
        (["--identity_fraction", "0"], "--identity_fraction must be above 0"),
        (["--train_batch_size", "1"], "BatchNorm needs two images or more"),
        (["--train_batch_size", "7", "--mixup", "1"], "must be even"),
        (["--lr_warmup_epochs", "12"], "leaves nothing of --num_train_epochs 12"),
        (["--randaugment_magnitude", "31"], "0 to 30"),
        (["--recipe", "diff-person"], "needs --source"),
        (["--objective", "dino", "--ema_decay", "0.9"], "--teacher_momentum"),
        (["--objective", "dino", "--local_crops", "0"], "--local_crops must be 1 or more"),
        (["--adam_weight_decay", "0", "--weight_decay_end", "0.4"], "must be above 0"),
        (["--layer_decay", "1.2"], "above 0 and at most 1"),
        (["--local_area", "0.5", "0.3"], "--local_area must be two shares of an image"),
    ],
)
def test_arguments_that_cannot_be(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(arguments)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


# Whole runs


def test_what_a_run_leaves(finished):
    lines = log_of(finished)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(list(line) == ["step", "epoch", "lr", "grad_norm", "loss", "accuracy"] for line in lines)
    # One epoch of rise, one of half a cosine; of the classifier, which learns at the full rate.
    factors = [0, 1 / 3, 2 / 3, 1, 0.75, 0.25]
    assert [line["lr"] for line in lines] == pytest.approx([2e-3 * factor for factor in factors])
    metrics = json.loads((finished / "metrics.json").read_text())
    assert [(one["epoch"], one["target"]) for one in metrics["history"]] == [(0, TARGET), (2, TARGET)]
    assert 0 < metrics["targets"][TARGET]["mAP"] <= 1
    page = (finished / "report.html").read_text()
    assert "Before and after" in page and "identity classification" in page
    assert json.loads((finished / "args.json").read_text())["arguments"]["ema_decay"] == 0.3
    names = {"args.json", "backbone", "log.jsonl", "metrics.json", "report.html", "samples"}
    assert {path.name for path in finished.iterdir()} == names | {f"checkpoint-{step}" for step in range(1, 7)}
    assert "data:image/jpeg" in page and all(f">{name}</text>" in page for name in ("accuracy", "loss", "lr"))
    card = (finished / "backbone" / "README.md").read_text()
    assert "pretrain_backbone.py" in card and "| ema_decay | 0.3 |" in card and "origin" not in card
    assert str(finished.parent) not in card
    with Image.open(finished / "samples" / "batch.png") as sheet:
        assert sheet.size == (8 * 32 + 7 * 4, 64)


def test_plain_transformers_opens_the_backbone(finished):
    """Weights, image processor and, but for the last stride, the features."""
    folder = finished / "backbone"
    assert AutoConfig.from_pretrained(folder).model_type == "resnet"
    model, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    ours = load_backbone(folder, (64, 32)).eval()
    for name, tensor in model.state_dict().items():
        assert torch.equal(ours.model.state_dict()[name], tensor), name
    processor = AutoImageProcessor.from_pretrained(folder)
    row = pretrain_backbone.open_train(parse_args(SMALL))[0][0]["image"]
    seen = processor(row, return_tensors="pt")["pixel_values"]
    encoder = ReIDModel(ours)
    wanted = picture_transform((64, 32), encoder.image_mean, encoder.image_std)(row)[None]
    assert seen.shape == (1, 3, 64, 32) and (seen - wanted).abs().mean() < 0.02
    model.encoder.stages[-1].layers[0].shortcut.convolution.stride = (1, 1)
    model.encoder.stages[-1].layers[0].layer[0].convolution.stride = (1, 1)
    with torch.no_grad():
        plain = model.eval()(seen).pooler_output.flatten(1)
        torch.testing.assert_close(ours(seen), plain, rtol=1e-4, atol=1e-5)


def test_evaluate_finds_the_numbers_of_the_training(finished, tmp_path):
    model = ["--model", finished / "backbone", "--resolution", "64", "32"]
    runs.run(evaluate, *model, "--data", TARGET, "--output_dir", tmp_path)
    found = json.loads((tmp_path / "metrics.json").read_text())
    wanted = json.loads((finished / "metrics.json").read_text())["targets"][TARGET]
    for name in ("mAP", "rank1", "rank5", "mINP"):
        assert found[name] == pytest.approx(wanted[name], abs=1e-4), name


@pytest.mark.parametrize("script", [train_dcac, finetune_reid], ids=lambda script: script.__name__)
def test_other_trainings_start_from_the_backbone(finished, tmp_path, script):
    """They measure, before their first step, what the pre-training measured last."""
    own = ["--diffusion", "none", "--validation_ids", "0"] if script is train_dcac else []
    runs.run(
        script,
        *("--source", "synthetic:domain=a,num_ids=6,images_per_id=4", "--backbone", finished / "backbone"),
        *("--resolution", "64", "32", "--train_batch_size", "8", "--max_train_steps", "1"),
        *("--target", TARGET, "--output_dir", tmp_path, *own),
    )
    assert len(log_of(tmp_path)) == 1
    first = json.loads((tmp_path / "metrics.json").read_text())["history"][0]
    ended = json.loads((finished / "metrics.json").read_text())["targets"][TARGET]
    assert first["epoch"] == 0 and first["mAP"] == pytest.approx(ended["mAP"], abs=1e-4)


def test_a_reid_model_is_a_start_too(tmp_path):
    """A saved Re-ID model gives its backbone; `--from_scratch` its shape only."""
    torch.manual_seed(1)
    model = ReIDModel(open_backbone("resnet-small", (64, 32), from_scratch=True), num_ids=3)
    model.save_pretrained(tmp_path)
    kept = open_backbone(str(tmp_path), (64, 32))
    name = "embedder.embedder.convolution.weight"
    assert torch.equal(kept.model.state_dict()[name], model.backbone.model.state_dict()[name])
    fresh = open_backbone(str(tmp_path), (64, 32), from_scratch=True)
    assert not torch.equal(fresh.model.state_dict()[name], model.backbone.model.state_dict()[name])
    with pytest.raises(ValueError, match="takes images of 64 x 32, not of 128 x 64; set --resolution"):
        open_backbone(str(tmp_path), (128, 64))


def test_a_cut_training_goes_on_to_the_same_numbers(finished, tmp_path, capsys):
    common = [*FINISHED, "--output_dir", tmp_path]
    train(*common, "--max_train_steps", "1")
    assert len(log_of(tmp_path)) == 1
    train(*common, "--resume_from_checkpoint", "latest")
    assert "Resuming from" in capsys.readouterr().out
    assert (tmp_path / "log.jsonl").read_text() == (finished / "log.jsonl").read_text()
    assert same_weights(weights_of(tmp_path, "backbone"), weights_of(finished, "backbone"))
    assert train(*common, "--resume_from_checkpoint", "latest") == 0


@pytest.fixture(scope="session")
def dropping(tmp_path_factory):
    """A Swin with random weights in a folder, which drops paths at random."""
    folder = tmp_path_factory.mktemp("dropping")
    torch.manual_seed(0)
    SwinModel(SwinConfig(**TINY_SWIN, drop_path_rate=0.5)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("more", [["--objective", "classification"], DINO], ids=["classification", "dino"])
def test_what_drops_out_belongs_to_seed_and_step(dropping, tmp_path, more):
    """Whether it was measured, and where it was cut, changes nothing."""
    common = [*SMALL, *more, "--backbone", dropping]
    train(*common, "--output_dir", tmp_path / "whole")
    train(*common, "--target", TARGET, "--max_train_steps", "2", "--output_dir", tmp_path / "cut")
    cut = [*common, "--target", TARGET, "--output_dir", tmp_path / "cut"]
    train(*cut, "--resume_from_checkpoint", "latest")
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")


@pytest.mark.parametrize("more", [["--ema_decay", "0.999"], DINO], ids=["ema", "dino"])
def test_the_mean_of_a_swin_keeps_its_table_of_places(dropping, more):
    """Whole numbers that no file holds: the mean would be measured with others than it is opened with."""
    args = parse_args([*SMALL, *more, "--backbone", str(dropping)])
    AcceleratorState._reset_state(True)
    model, average = pretrain_backbone.build_model(args, start_training(args), 6)
    AcceleratorState._reset_state(True)
    tables = [name for name, _ in model.named_buffers() if name.endswith("relative_position_index")]
    for step in range(4):
        average.multi_avg_fn = pretrain_backbone.running_mean(momentum(args, step, 6))
        average.update_parameters(model)
    assert tables
    for name in tables:
        assert torch.equal(average.module.get_buffer(name), model.get_buffer(name)), name


def test_nothing_drops_out_of_a_teacher(dropping):
    args = parse_args([*SMALL, *DINO, "--backbone", str(dropping)])
    AcceleratorState._reset_state(True)
    model, average = pretrain_backbone.build_model(args, start_training(args), 6)
    AcceleratorState._reset_state(True)
    pretrain_backbone.set_modes(args, model, average)
    crops = torch.randn(4, 2, 3, 64, 32)
    with torch.no_grad():
        assert torch.equal(average.module.scores(crops), average.module.scores(crops))
        assert not torch.equal(model.scores(crops), model.scores(crops))


def test_a_teacher_s_norms_look_at_the_batch(tmp_path):
    """Whatever mode a backbone with published weights comes in, and whether it was measured before."""
    open_backbone("resnet-small", (64, 32), from_scratch=True).save_pretrained(tmp_path / "start")
    common = [*SMALL, *DINO, "--max_train_steps", "2", "--backbone", tmp_path / "start"]
    train(*common, "--output_dir", tmp_path / "plain")
    train(*common, "--target", TARGET, "--output_dir", tmp_path / "measured")
    assert log_of(tmp_path / "plain") == log_of(tmp_path / "measured")
    average = tensors_of(tmp_path / "plain", 2)
    counts = [int(value) for name, value in average.items() if name.endswith("num_batches_tracked")]
    assert counts and min(counts) > 0


def test_another_run_s_checkpoint_goes_on_in_a_new_folder(finished, tmp_path):
    train(*FINISHED, "--resume_from_checkpoint", finished / "checkpoint-3", "--output_dir", tmp_path)
    assert (tmp_path / "log.jsonl").read_text() == (finished / "log.jsonl").read_text()


def test_kill_and_go_on(distilled, tmp_path):
    """SIGKILL after some step of DINO, then continue: the log file is the unbroken run's, byte by byte."""
    common = [*DISTILLED, "--output_dir", tmp_path]
    killed = stopped(start(SCRIPT, *common), lambda: lines_written(tmp_path) >= 2)
    assert killed.returncode == -signal.SIGKILL
    train(*common, "--resume_from_checkpoint", "latest")
    assert (tmp_path / "log.jsonl").read_text() == (distilled / "log.jsonl").read_text()
    assert same_weights(weights_of(tmp_path, "backbone"), weights_of(distilled, "backbone"))


@pytest.mark.slow
def test_sigterm_writes_a_checkpoint(tmp_path):
    common = [*SMALL, "--num_train_epochs", "50", "--output_dir", tmp_path]
    ended = stopped(start(SCRIPT, *common), lambda: lines_written(tmp_path) >= 1, signal.SIGTERM)
    printed = ended.stdout + ended.stderr
    assert ended.returncode == 128 + signal.SIGTERM, printed[-2000:]
    assert "SIGTERM" in printed and "--resume_from_checkpoint latest" in printed
    assert list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("name", ["finished", "distilled"])
def test_two_processes_train_as_one(name, request, tmp_path):
    """The same global batch: BatchNorm of backbone and head, mixing, centre, running mean, losses and gradients."""
    one, common = request.getfixturevalue(name), {"finished": FINISHED, "distilled": DISTILLED}[name]
    few = [*common, "--train_batch_size", "4", "--max_train_steps", "3", "--output_dir", tmp_path]
    launch(SCRIPT, *few, processes=2)
    for left, right in zip(log_of(one)[:3], log_of(tmp_path), strict=True):
        assert left == pytest.approx(right, rel=1e-3, abs=1e-4)
    first, second = (tensors_of(folder, 3) for folder in (one, tmp_path))
    assert max(float((first[key].float() - second[key].float()).abs().max()) for key in first) < 1e-3


class Processes:
    """The part of an Accelerator that shares a batch."""

    def __init__(self, number):
        self.num_processes, self.said = number, []

    def print(self, words):
        self.said.append(words)


@pytest.mark.parametrize("processes, passes, share", [(1, 1, 512), (8, 1, 64), (4, 2, 64), (1, 4, 128)])
def test_the_published_batch_is_of_all_processes_together(processes, passes, share):
    args = parse_args(["--recipe", "diff-person", "--source", "x", "--gradient_accumulation_steps", str(passes)])
    accelerator = Processes(processes)
    share_batch_of_recipe(args, accelerator, multiple_of=2)
    assert args.train_batch_size == share and args.train_batch_size * processes * passes == 512
    assert (processes * passes == 1) == (accelerator.said == [])
    assert all(
        f"--train_batch_size {share}: the share of {processes} processes" in words for words in accelerator.said
    )
    given = parse_args(["--recipe", "diff-person", "--source", "x", "--train_batch_size", "96"])
    share_batch_of_recipe(given, accelerator := Processes(8))
    assert given.train_batch_size == 96 and "768 together" in accelerator.said[0]
    uneven = parse_args(["--recipe", "diff-person", "--source", "x"])
    with pytest.raises(ValueError, match="512 images, cannot be shared by 3 processes.*give --train_batch_size"):
        share_batch_of_recipe(uneven, Processes(3))


def test_batches_augmented_on_the_device_train_as_those_of_the_loader(tmp_path):
    """Without RandAugment, which Pillow and torchvision round differently, to the same numbers; with it, elsewhere."""
    logs = {}
    for where in ("loader", "device"):
        for ops in ("0", "2"):
            out = tmp_path / f"{where}{ops}"
            plain = [*SMALL, "--cutmix", "1", "--erasing", "0.5", "--max_train_steps", "3", "--randaugment_ops", ops]
            train(*plain, "--augment_on", where, "--output_dir", out)
            logs[where, ops] = [line["loss"] for line in log_of(out)]
    assert logs["loader", "0"] == logs["device", "0"] and logs["loader", "2"] != logs["loader", "0"]
    assert logs["device", "2"] not in (logs["device", "0"], logs["loader", "2"])
    assert all(abs(one - other) < 0.5 for one, other in zip(logs["loader", "2"], logs["device", "2"], strict=True))
    assert (tmp_path / "device2" / "samples" / "batch.png").is_file()


@pytest.mark.parametrize("more", [MIXED, DINO], ids=["classification", "dino"])
def test_two_passes_train_as_one(tmp_path, more):
    """With a backbone that looks at each image by itself."""
    common = [*SMALL, *more, "--max_train_steps", "2", "--backbone", CLIP_DIR, "--resolution", "32", "32"]
    train(*common, "--output_dir", tmp_path / "one")
    passes = ["--train_batch_size", "4", "--gradient_accumulation_steps", "2"]
    train(*common, *passes, "--output_dir", tmp_path / "two")
    for left, right in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        assert left == pytest.approx(right, rel=1e-3, abs=1e-4)


def test_precisions_and_recomputation(tmp_path, monkeypatch):
    common = [*SMALL, "--max_train_steps", "3", "--lr_warmup_epochs", "0"]
    train(*common, "--output_dir", tmp_path / "plain")
    asked = calls_of(monkeypatch, ResNetBackbone, "enable_gradient_checkpointing")
    wanted = log_of(tmp_path / "plain")
    for name, more, tolerance in (
        ("bf16", ["--mixed_precision", "bf16"], 0.02),
        ("recomputed", ["--gradient_checkpointing"], 1e-5),
        ("8bit", ["--use_8bit_adam"], 1e-5),
    ):
        train(*common, *more, "--output_dir", tmp_path / name)
        found = log_of(tmp_path / name)
        assert found[0]["loss"] == pytest.approx(wanted[0]["loss"], rel=tolerance), name
        weights = load_file(tmp_path / name / "backbone" / "model.safetensors")
        assert all(tensor.dtype == torch.float32 for tensor in weights.values() if tensor.is_floating_point())
        if name == "recomputed":
            assert found == [pytest.approx(line, rel=1e-4) for line in wanted]
        else:
            # The first update is the same with a state of 8 bits.
            assert found[-1]["loss"] != wanted[-1]["loss"], name
        assert len(asked) == (name != "bf16")


def test_fractions_are_seeded_and_nested():
    def rows(**more):
        flags = [word for name, value in more.items() for word in (f"--{name}", str(value))]
        train, labels, _ = pretrain_backbone.open_train(parse_args([*SMALL, *flags]))
        assert labels.unique().tolist() == list(range(len(labels.unique())))
        return set(train["path"][:]), len(labels.unique())

    whole, half, quarter = (rows(image_fraction=share) for share in (1, 0.5, 0.25))
    assert [len(paths) for paths, _ in (whole, half, quarter)] == [24, 12, 6]
    assert quarter[0] < half[0] < whole[0] and quarter[1] == half[1] == whole[1] == 6
    few, fewer = (rows(identity_fraction=share) for share in (0.5, 0.34))
    assert few[1] == 3 and fewer[1] == 2 and fewer[0] < few[0] < whole[0] and len(few[0]) == 12
    assert rows(image_fraction=0.5) == half and rows(image_fraction=0.5, fraction_seed=1) != half


def test_clip_and_swin_are_pretrained_and_open_again(tmp_path):
    """Their folders are plain transformers ones; positions of CLIP go back to its square grid."""
    swin = SwinModel(SwinConfig(image_size=64, embed_dim=16, depths=[1, 1], num_heads=[1, 2], window_size=4))
    swin.save_pretrained(tmp_path / "swin")
    for name, backbone in (("swin", tmp_path / "swin"), ("clip", CLIP_DIR)):
        out = tmp_path / f"{name}-out"
        more = ["--backbone", backbone, "--layer_decay", "0.8", "--max_train_steps", "2", "--output_dir", out]
        train(*SMALL, *MIXED, *more)
        before, after = (load_backbone(folder, (64, 32)) for folder in (backbone, out / "backbone"))
        moved = [
            float((old - new).detach().abs().max())
            for old, new in zip(before.parameters(), after.parameters(), strict=True)
            if old.requires_grad
        ]
        assert all(math.isfinite(value) for value in moved) and max(moved) > 1e-5
        AutoModel.from_pretrained(out / "backbone")


# Bad input


def test_bad_input_is_told_in_one_line(tmp_path, monkeypatch):
    out = ["--output_dir", tmp_path / "out"]
    (tmp_path / "empty").mkdir()
    # Within which no model is built.
    monkeypatch.setattr(pretrain_backbone, "open_backbone", None)
    assert "a batch of 32 images cannot be made of 24" in refused(*SMALL, *out, "--train_batch_size", "32")
    assert "did you mean" in refused(*SMALL, *out, "--source", "market1502")
    assert "the short names are" in refused(*SMALL, *out, "--backbone", "resnet51")
    assert "no config.json" in refused(*SMALL, *out, "--backbone", tmp_path / "empty")
    assert "needs two identities" in refused(*SMALL, *out, "--identity_fraction", "0.1", "--train_batch_size", "2")
    assert "no checkpoint 'checkpoint-7'" in refused(*SMALL, *out, "--resume_from_checkpoint", "checkpoint-7")


def test_crops_of_clip_have_its_size(tmp_path):
    clip = ["--backbone", CLIP_DIR, "--local_resolution", "32", "16", "--output_dir", tmp_path / "out"]
    assert "CLIP and ViT take images of one size" in refused(*SMALL, *DINO, *clip)


def test_weights_of_another_memory_layout_are_saved_alike(tmp_path):
    backbone = open_backbone("resnet-small", (64, 32), from_scratch=True)
    wanted = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    write_backbone_folder(backbone.to(memory_format=torch.channels_last), tmp_path / "backbone", {}, "card")
    found = load_backbone(tmp_path / "backbone", (64, 32)).model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_going_on_with_other_arguments_names_them(finished, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(finished, folder)
    common = [*FINISHED, "--output_dir", folder, "--resume_from_checkpoint", "latest"]
    assert "layer_decay was 0.9, is 1.0" in refused(*common, "--layer_decay", "1")
    weights = folder / "checkpoint-6" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert "damaged" in refused(*common)


def test_a_loss_that_is_not_finite_stops_and_names_the_images(tmp_path):
    found = refused(*SMALL, "--learning_rate", "1e25", "--output_dir", tmp_path / "out")
    assert "not finite at step" in found and "synthetic-a/s0/" in found
    assert not (tmp_path / "out" / "backbone").exists()


def test_the_last_backbone_stays_until_the_new_one_is_whole(tmp_path):
    backbone = open_backbone("resnet-small", (64, 32), from_scratch=True)
    write_backbone_folder(backbone, tmp_path / "backbone", {}, "first")
    with pytest.raises(TypeError):
        write_backbone_folder(backbone, tmp_path / "backbone", {}, card=None)
    assert (tmp_path / "backbone" / "README.md").read_text() == "first"
    write_backbone_folder(backbone, tmp_path / "backbone", {}, "third")
    assert (tmp_path / "backbone" / "README.md").read_text() == "third"
    assert [path.name for path in tmp_path.iterdir()] == ["backbone"]

"""MetaBIN: norms and losses against plain references, the meta-step against differences, what moves in which phase."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import ResNetModel

import evaluate
from finetune_reid import FineTuning, domains_of, parse_args
from methods import metabin
from methods.metabin import MetaBatches, balances, meta_step
from tests import runs
from tests.methods.reference import close, same_steps
from tests.modeling.test_heads import TINY, people, tiny
from tests.runs import launch, log_of, same_weights, weights_of
from tests.scripts.test_finetune import SMALL, refused, train
from utils.batches.samplers import IdentitySampler
from utils.datasets.load import load_reid, load_sources
from utils.flags import CLIP_DIR
from utils.modeling.norms import BatchInstanceNorm, add_batch_instance_norms
from utils.modeling.reid_model import ReIDModel
from utils.training.parameter_groups import bias_groups

SOURCES = [f"synthetic:domain={name},num_ids=4,images_per_id=4" for name in "abc"]
TARGET = "synthetic:domain=d,num_ids=3,images_per_id=4"
GENERAL = [*SMALL, "--setting", "generalisation", "--source", *SOURCES, "--target", TARGET, "--num_train_epochs", "2"]


@pytest.fixture(scope="session")
def resnet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resnet")
    torch.manual_seed(0)
    ResNetModel(TINY["resnet"]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def metabin_run(resnet):
    metabin = ["--method", "metabin", "--meta_first_steps", "2"]
    return [*GENERAL, *metabin, "--backbone", str(resnet), "--checkpointing_steps", "2"]


# The norm


def a_norm(channels=3):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(channels)
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.normal_(norm.bias)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm


@pytest.mark.parametrize("training", [True, False])
def test_at_its_bounds_it_is_one_of_both(training):
    norm = a_norm()
    plain, mixed = copy.deepcopy(norm).train(training), BatchInstanceNorm(norm).train(training)
    maps = torch.randn(4, 3, 5, 2)
    torch.testing.assert_close(mixed(maps), plain(maps))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(mixed.batch, name), getattr(plain, name))
    mixed.rho.zero_()
    want = torch.empty_like(maps)
    for image in range(4):
        for channel in range(3):
            values = maps[image, channel]
            unit = (values - values.mean()) / (values.var(correction=0) + 1e-5).sqrt()
            want[image, channel] = unit
    # The weights of the batch norm are not copied: scale 1 and shift 0.
    torch.testing.assert_close(mixed(maps), want)
    mixed.rho.copy_(torch.tensor([0.0, 0.3, 1.0]))
    shares = mixed.rho.view(3, 1, 1)
    torch.testing.assert_close(mixed(maps), shares * plain(maps) + (1 - shares) * want)


def test_every_norm_of_a_resnet_is_replaced_once():
    model = tiny("resnet", "bot")
    count = sum(isinstance(one, nn.BatchNorm2d) for one in model.backbone.modules())
    images = people(4)
    wanted = model.eval()(images)
    add_batch_instance_norms(model.backbone)
    add_batch_instance_norms(model.backbone)
    assert len(balances(model.backbone)) == count > 5
    assert sum(isinstance(one, nn.BatchNorm2d) for one in model.backbone.modules()) == count
    torch.testing.assert_close(model.eval()(images), wanted)
    with pytest.raises(ValueError, match="a clip_vision_model has no BatchNorm"):
        add_batch_instance_norms(tiny("clip", "bot").backbone)


def test_a_saved_model_has_its_norms_again(tmp_path):
    model = tiny("resnet", "bot")
    add_batch_instance_norms(model.backbone)
    for rho in balances(model.backbone).values():
        rho.uniform_()
    model.eval().save_pretrained(tmp_path)
    images = people(3)
    again = ReIDModel.from_pretrained(tmp_path)
    torch.testing.assert_close(again(images), model(images))
    for rho in balances(again.backbone).values():
        rho.fill_(1)
    assert (again(images) - model(images)).abs().max() > 0.01
    assert "norms" not in tiny("resnet", "bot").configuration()


# The losses


def test_losses_are_those_of_plain_loops():
    torch.manual_seed(0)
    features = torch.randn(24, 6, dtype=torch.float64)
    labels, domains = torch.arange(24) // 2, torch.arange(24) // 8
    scatter = []
    for domain in range(3):
        its = [feature / feature.norm() for feature in features[8 * domain : 8 * domain + 8]]
        centre = sum(its) / 8
        scatter.append(sum(float(one @ centre) / float(centre.norm()) for one in its) / 8)
    shuffle, triplet = 0.0, 0.0
    for one in range(24):
        gaps = [float((features[one] - other).norm()) for other in features]
        others = [gap for row, gap in enumerate(gaps) if domains[row] != domains[one]]
        near = [gap for row, gap in enumerate(gaps) if domains[row] == domains[one] and labels[row] != labels[one]]
        shuffle += float(torch.tensor(max(others) - min(near)).exp().log1p()) / 24
        own = [gap for row, gap in enumerate(gaps) if labels[row] == labels[one]]
        rest = [gap for row, gap in enumerate(gaps) if labels[row] != labels[one]]
        triplet += max(0.0, max(own) - min(rest) + 0.3) / 24
    close("MetaBIN scatter", metabin.scatter_loss(features, domains), sum(scatter) / 3)
    close("MetaBIN shuffle", metabin.shuffle_loss(features, labels, domains), shuffle)
    close("MetaBIN triplet", metabin.triplet_loss(features, labels), triplet)


# The meta-step


class Small(nn.Module):
    """Two convolutions, in float64 so that differences can be taken."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), a_norm(4), nn.Tanh(), nn.Conv2d(4, 5, 3), a_norm(5))

    def forward(self, images):
        return self.layers(images).tanh().mean((2, 3))


def small_case(rho=0.5):
    torch.manual_seed(1)
    backbone = Small()
    add_batch_instance_norms(backbone)
    backbone.double().train()
    for tensor in balances(backbone).values():
        tensor.fill_(rho)
    return backbone, torch.randn(24, 3, 8, 6, dtype=torch.float64), torch.arange(24) // 2, torch.arange(24) // 8


def at(backbone, rho, images):
    """Features with a vector of all rho, written without functional_call: by hand from batch and instance norms."""
    first, norm, _, second, last = backbone.layers
    maps, start = first(images), 0
    for layer, mixed in ((None, norm), (second, last)):
        maps = maps if layer is None else layer(maps)
        share = rho[start : start + len(mixed.rho)].view(-1, 1, 1)
        start += len(mixed.rho)
        by_batch = F.batch_norm(maps, None, None, mixed.batch.weight, mixed.batch.bias, training=True)
        by_image = F.instance_norm(maps, weight=mixed.instance.weight, bias=mixed.instance.bias)
        maps = (share * by_batch + (1 - share) * by_image).tanh()
    return maps.mean((2, 3))


def inner(features, labels, domains):
    return (
        metabin.scatter_loss(features, domains)
        + metabin.shuffle_loss(features, labels, domains)
        + metabin.triplet_loss(features, labels)
    )


@pytest.mark.parametrize("first_order", [False, True])
def test_the_step_follows_the_slope_of_the_test_loss(first_order):
    """Against differences of the whole two-step loss; to the first order, of a loss whose inner slope stays.

    The inner rate is the factor times rho's own rate: 20 x 0.01.
    """
    backbone, images, labels, domains = small_case()
    known, rate = domains != 1, 0.2
    old = torch.cat(list(balances(backbone).values()))

    def slope_at(rho):
        rho = rho.clone().requires_grad_()
        return torch.autograd.grad(inner(at(backbone, rho, images[known]), labels[known], domains[known]), rho)[0]

    fixed = slope_at(old)

    def loss(rho):
        moved = rho - rate * (fixed if first_order else slope_at(rho))
        assert moved.min() > 0 and moved.max() < 1
        return metabin.triplet_loss(at(backbone, moved, images[~known]), labels[~known]).item()

    step = 1e-5
    want = [(loss(old + step * one) - loss(old - step * one)) / (2 * step) for one in torch.eye(len(old)).double()]
    values = meta_step(
        backbone, images, labels, domains, [0, 2], inner_factor=20.0, rate=0.01, first_order=first_order
    )
    got = (old - torch.cat(list(balances(backbone).values()))) / 0.01
    scale = got.abs().max()
    close("MetaBIN slope", got / scale, torch.tensor(want, dtype=torch.float64) / scale)
    close("MetaBIN loss_meta_test", values["loss_meta_test"], loss(old))
    assert scale > 1e-3


def test_second_derivatives_make_a_difference():
    found = []
    for first_order in (False, True):
        backbone, *batch = small_case()
        meta_step(backbone, *batch, [0, 2], inner_factor=20.0, rate=0.01, first_order=first_order)
        found.append(torch.cat(list(balances(backbone).values())))
    assert not torch.allclose(*found, rtol=0, atol=1e-6)


def test_a_meta_step_moves_the_mixtures_alone():
    model = tiny("resnet", "bot").train()
    add_batch_instance_norms(model.backbone)
    before = copy.deepcopy(model.state_dict())
    batch = people(24), torch.arange(24) // 2, torch.arange(24) // 8
    values = meta_step(model.backbone, *batch, [0, 1], inner_factor=0.5, rate=0.1)
    moved = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert moved and all(name.endswith(".rho") for name in moved)
    assert all(parameter.grad is None for parameter in model.parameters())
    shares = torch.cat(list(balances(model.backbone).values()))
    assert shares.min() >= 0 and shares.max() == 1 and values["rho"].item() == pytest.approx(shares.mean().item())
    # Large steps end at the bounds, and come back from there.
    for _ in range(4):
        meta_step(model.backbone, *batch, [0, 1], inner_factor=5e-4, rate=100.0)
        after = torch.cat(list(balances(model.backbone).values()))
        assert after.min() == 0 and after.max() == 1 and not torch.equal(after, shares)
        shares = after
    # With one domain held in, there is none to mingle with.
    assert meta_step(model.backbone, *batch, [2], inner_factor=0.5, rate=0.1)["loss_shuffle"] == 0


def test_activations_computed_twice_change_nothing():
    found = []
    for twice in (False, True):
        model = tiny("resnet", "bot").train()
        add_batch_instance_norms(model.backbone)
        if twice:
            model.enable_gradient_checkpointing()
        meta_step(
            model.backbone, people(24), torch.arange(24) // 2, torch.arange(24) // 8, [0, 1],
            inner_factor=0.05, rate=1.0,
        )  # fmt: skip
        assert model.backbone.gradient_checkpointing == twice
        found.append(torch.cat(list(balances(model.backbone).values())))
    torch.testing.assert_close(*found)


def test_an_ordinary_step_leaves_the_mixtures_alone():
    model = tiny("resnet", "bot").train()
    add_batch_instance_norms(model.backbone)
    for rho in balances(model.backbone).values():
        rho.fill_(0.5)
    training = FineTuning(model, parse_args(["--setting", "generalisation", "--method", "metabin"])).train()
    before = copy.deepcopy(model.state_dict())
    loss, *_ = training(people(8), torch.arange(8) // 2)
    loss.backward()
    torch.optim.SGD(training.parameters(), lr=0.1).step()
    still = [name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])]
    assert set(still) == {f"backbone.{name}" for name in balances(model.backbone)} | {"bnneck.bias"}


def test_the_inner_rate_goes_up_and_down():
    rates = [metabin.inner_factor(step, 10, 0.001, 0.1) for step in range(21)]
    assert rates[0] == rates[10] == rates[20] == pytest.approx(0.001) and rates[5] == rates[15] == pytest.approx(0.1)
    assert rates[1] == pytest.approx(0.001 + 0.0198) and rates[1:10] == pytest.approx(rates[9:0:-1])


def test_biases_learn_at_twice_the_rate():
    """A step of plain gradient descent on a model of the method."""
    model = tiny("resnet", "bot").train()
    add_batch_instance_norms(model.backbone)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(bias_groups(model.named_parameters(), lr=metabin.BIAS_RATE * 0.1), lr=0.1)
    model.pool(people(8)).square().sum().backward()
    optimizer.step()
    moved = {True: 0, False: 0}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            rate = 0.2 if name.endswith(".bias") else 0.1
            torch.testing.assert_close(parameter.data, before[name] - rate * parameter.grad)
            moved[name.endswith(".bias")] += int(parameter.grad.abs().max() > 0)
    assert moved[True] > 5 and moved[False] > 5 and metabin.BIAS_RATE == 2


def test_the_run_uses_them(finished):
    kept = torch.load(finished / "checkpoint-12" / "optimizer.pt", weights_only=True)["optimizer"]["param_groups"]
    first, second = (group["initial_lr"] for group in kept)
    assert second == 2 * first and len(kept[1]["params"]) > 5


def test_half_of_the_domains_is_held_in():
    for count, half in ((2, 1), (3, 2), (4, 2), (5, 3)):
        drawn = [tuple(metabin.domains_held_in(count, f"0/{step}")) for step in range(40)]
        assert {len(set(one)) for one in drawn} == {half} and set().union(*drawn) == set(range(count))
        assert drawn == [tuple(metabin.domains_held_in(count, f"0/{step}")) for step in range(40)]


# Batches


def test_batches_of_every_domain_the_same_on_every_process():
    labels = [row // 3 for row in range(36)]
    domains = [0] * 18 + [1] * 9 + [2] * 9
    parts = []
    for rank in (0, 1):
        batches = MetaBatches(IdentitySampler(labels, 8, 2, 5, rank, 2), labels, domains, 2, 4, seed=5)
        batches.set_epoch(3)
        assert batches.count == 24
        parts.append(list(batches))
    assert len(parts[0]) == len(parts[1]) == len(batches) > 2
    for first, second in zip(*parts, strict=True):
        assert len(first) == 4 + 24 and first[4:] == second[4:] and first[:4] != second[:4]
        rows = [row for row, _ in first[4:]]
        assert [domains[row] for row in rows] == [0] * 8 + [1] * 8 + [2] * 8
        for start in range(0, 24, 4):
            # Three images each: the fourth is drawn again.
            assert len({labels[row] for row in rows[start : start + 4]}) == 1
        assert len({labels[row] for row in rows}) == 6
    assert parts[0][0][4:] != parts[0][1][4:] and len({key for batch in parts[0] for _, key in batch}) == 28 * len(
        parts[0]
    )
    assert batches.steps_of(3) == IdentitySampler(labels, 8, 2, 5).steps_of(3) > 0
    # A step asks for it, and counting draws a whole epoch.
    drawn = []
    batches.sampler.global_batches = lambda epoch: drawn.append(epoch) or [[0]]
    assert batches.steps_of_an_epoch == batches.steps_of_an_epoch == 1 and drawn == [1]
    with pytest.raises(ValueError, match="takes 4 identities of each domain; domain 1 has 3"):
        MetaBatches(None, labels, domains, 4, 4)


# Whole runs


@pytest.fixture(scope="session")
def finished(metabin_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    assert train(*metabin_run, "--output_dir", folder) == 0
    return folder


def test_what_a_run_leaves(finished):
    lines = log_of(finished)
    losses = ["loss_scatter", "loss_shuffle", "loss_inner_triplet", "loss_meta_test"]
    keys = ["step", "epoch", "lr", "grad_norm", "loss", "loss_id", "loss_triplet", "loss_centre", *losses, "rho"]
    assert len(lines) == 12 and all(list(line) == keys for line in lines)
    # The first meta-step comes after the second step.
    assert lines[0]["rho"] == 1 and [lines[0][name] for name in losses] == [0] * 4 and lines[1]["loss_meta_test"] > 0
    assert 0 < lines[-1]["rho"] < lines[1]["rho"] < 1
    model = ReIDModel.from_pretrained(finished / "model")
    shares = torch.cat(list(balances(model.backbone).values()))
    assert shares.mean().item() == pytest.approx(lines[-1]["rho"]) and 0 <= shares.min() < shares.max() <= 1
    page = (finished / "report.html").read_text()
    assert "Mean share of batch normalisation" in page and "generalisation" in page
    history = json.loads((finished / "metrics.json").read_text())["history"]
    assert [(one["epoch"], one["target"]) for one in history] == [(0, TARGET), (2, TARGET)]


def test_a_cut_training_goes_on_to_the_same_numbers(metabin_run, finished, tmp_path):
    """Cut between two meta-steps of one epoch: rho is the checkpoint's, its rate that of the step."""
    common = [*metabin_run, "--output_dir", tmp_path]
    train(*common, "--max_train_steps", "3")
    train(*common, "--resume_from_checkpoint", "latest")
    assert (tmp_path / "log.jsonl").read_text() == (finished / "log.jsonl").read_text()
    assert same_weights(weights_of(tmp_path), weights_of(finished))


@pytest.mark.slow
def test_two_processes_train_as_one(metabin_run, finished, tmp_path):
    """Few steps: a hardest pair that changes with the last bit would part the two."""
    few = [*metabin_run, "--train_batch_size", "4", "--max_train_steps", "4", "--output_dir", tmp_path]
    launch("finetune_reid.py", *few, processes=2)
    same_steps("metabin, two processes", log_of(finished)[:4], log_of(tmp_path))


def test_plain_training_on_several_domains(resnet, tmp_path):
    train(*GENERAL, "--backbone", resnet, "--max_train_steps", "1", "--output_dir", tmp_path)
    (line,) = log_of(tmp_path)
    assert "rho" not in line and not any("rho" in name for name in weights_of(tmp_path))


def test_what_generalisation_refuses(resnet, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ReIDModel, "for_training", None)
    out = ["--output_dir", tmp_path / "out", "--backbone", resnet]
    one = refused(*GENERAL, *out, "--source", SOURCES[0])
    assert "learns from several domains" in one and "has one, synthetic-a" in one
    metabin_on = [*GENERAL, *out, "--method", "metabin"]
    assert "a clip: it has no BatchNorm" in refused(*metabin_on, "--backbone", CLIP_DIR)
    few = "synthetic:domain=a,num_ids=1,images_per_id=4"
    told = refused(*metabin_on, "--source", few, *SOURCES[1:])
    assert "takes 2 identities of each domain; domain synthetic-a has 1" in told
    for arguments, words in (
        (["--method", "metabin", "--setting", "supervised"], "belongs to --setting generalisation"),
        (["--setting", "generalisation", "--fraction", "0.5"], "belongs to --setting few-shot or small-scale"),
        (["--meta_inner_rates", "0.1", "0.01"], "the lower one first, got 0.1 0.01"),
        (["--meta_rate", "0"], "--meta_rate must be above 0"),
    ):
        with pytest.raises(SystemExit):
            parse_args(arguments)
        assert words in capsys.readouterr().err


def test_demo_and_published_values():
    args = parse_args(["--setting", "generalisation"])
    assert args.demo and len(args.source) == 3 and len(args.target) == 2 and args.fraction is None
    args = parse_args(["--recipe", "published", "--method", "metabin"])
    assert (args.setting, args.target) == ("generalisation", ["prid", "grid", "viper", "ilids"])
    assert (args.train_batch_size, args.optimizer, args.learning_rate, args.meta_rate) == (80, "sgd", 0.01, 0.1)
    assert args.meta_first_order and args.meta_inner_rates == [0.001, 0.1] and args.meta_period == 5
    assert args.meta_first_steps == 10


def test_a_domain_with_one_camera(resnet, tmp_path):
    for number, row in enumerate(load_reid(SOURCES[0])["train"]):
        folder = tmp_path / "one" / f"{row['pid']:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        row["image"].save(folder / f"{number}_c1.png")
    specs = [str(tmp_path / "one"), SOURCES[1]]
    data = load_sources(specs)["train"]
    assert domains_of(parse_args(["--setting", "generalisation"]), data).unique().tolist() == [0, 1]
    common = [*GENERAL, "--source", *specs, "--method", "metabin", "--backbone", resnet, "--max_train_steps", "1"]
    common += ["--meta_first_steps", "1"]
    train(*common, "--output_dir", tmp_path / "out")
    assert log_of(tmp_path / "out")[0]["loss_shuffle"] == 0


def test_small_sets_are_measured_on_ten_splits(resnet, tmp_path, capsys):
    """The means of ten splits with their deviations, as evaluate.py --splits 10 finds them."""
    for number, row in enumerate(load_reid("synthetic:domain=b,num_ids=16,images_per_id=4")["train"]):
        path = tmp_path / "viper" / ("cam_a", "cam_b")[number % 2] / f"{row['pid']:03d}_{90 * (number % 2)}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        row["image"].save(path)
    common = [*GENERAL, "--target", "viper", "--data_root", tmp_path, "--backbone", resnet, "--max_train_steps", "1"]
    train(*common, "--output_dir", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["targets"]["viper"]
    assert len(found["splits"]) == 10
    where = ["--model", tmp_path / "out" / "model", "--data", "viper", "--data_root", tmp_path]
    more = ["--splits", "10", "--output_dir", tmp_path / "evaluated", "--report_queries", "0"]
    wanted = runs.run(evaluate, *where, *more)
    for key in ("mAP", "rank1", "mINP"):
        assert found[key] == pytest.approx(wanted[key], abs=1e-6)
        assert found["std"][key] == pytest.approx(wanted["std"][key], abs=1e-6)
    assert found["std"]["mAP"] > 0
    shown = f"{100 * found['mAP']:.1f} ± {100 * found['std']['mAP']:.1f} %"
    assert shown in (tmp_path / "out" / "report.html").read_text() and shown in capsys.readouterr().out
    # A split that is named stays alone.
    train(*common, "--target", "viper:split=3", "--output_dir", tmp_path / "three")
    alone = json.loads((tmp_path / "three" / "metrics.json").read_text())["targets"]["viper:split=3"]
    assert "std" not in alone and alone["mAP"] == pytest.approx(found["splits"][3]["mAP"], abs=1e-6)

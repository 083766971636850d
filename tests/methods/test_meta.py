"""META: network, gates and losses against plain ResNets and loops in float64, what learns, batches, whole runs."""

import copy
import json
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import ResNetModel

import evaluate
from finetune_reid import parse_args
from methods import meta
from methods.meta import DomainBatches, Meta, cosine_after_warmup
from tests import runs
from tests.methods.reference import close, same_steps
from tests.modeling.test_heads import SIZE, TINY, people
from tests.runs import calls_of, launch, log_of, same_weights, weights_of
from tests.scripts.test_finetune import SMALL, refused, train
from utils.flags import CLIP_DIR, RESNET_DIR
from utils.modeling.backbones import backbone_from_config
from utils.modeling.experts import ExpertNorm, expert_norms
from utils.modeling.names import not_plain
from utils.modeling.reid_model import ReIDModel

DOMAINS = [3, 2, 4]
# Identity -> domain; labels of one domain do not stand together.
ID_DOMAINS = torch.tensor([0, 1, 2, 0, 2, 1, 0, 2, 2])
SOURCES = [f"synthetic:domain={name},num_ids=4,images_per_id=4" for name in "abc"]
TARGET = "synthetic:domain=d,num_ids=3,images_per_id=4"
RUN = [
    *SMALL, "--method", "meta", "--setting", "generalisation", "--source", *SOURCES, "--target", TARGET,
    "--num_train_epochs", "2", "--checkpointing_steps", "2", "--optimizer", "sgd", "--nesterov", "--freeze_steps", "2",
    "--lr_scheduler", "epoch_cosine", "--lr_warmup_steps", "3", "--auto_augment", "0.5", "--colour_jitter", "0.5",
]  # fmt: skip


def trained_looking(model):
    """Nothing is left at 0 or 1, and no two experts are alike."""
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0)
            elif name.endswith("running_mean"):
                tensor.add_(0.3 * torch.randn_like(tensor))
            elif tensor.is_floating_point() and tensor.dim() == 1 and not name.endswith(("power", "bias")):
                tensor.add_(0.1 * torch.randn_like(tensor))
            elif "gates" in name:
                # Gates that are neither equal nor 0 and 1.
                tensor.copy_(0.02 * torch.randn_like(tensor))
    return model


def a_model(gate="learned", seed=0):
    torch.manual_seed(seed)
    backbone = backbone_from_config(copy.deepcopy(TINY["resnet"]), SIZE)
    plain = copy.deepcopy(backbone)
    model = ReIDModel(backbone, sum(DOMAINS), method="meta", head_options={"domains": DOMAINS, "gate": gate})
    return trained_looking(model), plain


def plain_resnet(model, plain, expert):
    """A ResNet as `transformers` has it, in float64, with the weights and norms of one expert."""
    state, norms = model.backbone.state_dict(), {}
    for name, tensor in state.items():
        if ".norms." not in name:
            norms[name] = tensor
        elif f".norms.{expert}." in name:
            norms[name.replace(f".norms.{expert}.", ".")] = tensor
    network = copy.deepcopy(plain)
    missing = network.load_state_dict(norms, strict=False).missing_keys
    # The branch has no norms in the last part of the network.
    assert not missing if expert < len(DOMAINS) else missing
    return network.double().eval()


def expected_map(network, images):
    """Map and E of one expert, from what each of its norms sees."""
    seen = []
    hooks = [
        norm.register_forward_hook(lambda norm, inputs, output: seen.append((norm, inputs[0])))
        for norm in network.modules()
        if isinstance(norm, nn.BatchNorm2d)
    ]
    maps = network.feature_map(images.double())
    for hook in hooks:
        hook.remove()
    order = [norm for norm in network.modules() if isinstance(norm, nn.BatchNorm2d)]
    inputs = dict(seen)
    rows = []
    for number in range(len(images)):
        row = []
        for norm in order:
            total = 0.0
            for channel in range(norm.num_features):
                values = inputs[norm][number, channel].detach()
                total += (values.mean() - norm.running_mean[channel]) ** 2
                total += (values.std() - norm.running_var[channel].sqrt()) ** 2
            row.append(total.sqrt())
        rows.append(torch.stack(row))
    return maps, torch.stack(rows)


def expected_branch(model, plain, images):
    network = plain_resnet(model, plain, len(DOMAINS))
    stages = network.model.encoder.stages
    maps = network.model.embedder(images.double())
    for part in (*stages[:-2], stages[-2].layers[0], *copy.deepcopy(model.head.branch).double()):
        maps = part(maps)
    return maps


def gem(maps):
    return maps.clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3)


def gates_of(model, distances, experts):
    scores = []
    for expert, distance in zip(experts, distances, strict=True):
        first, second = copy.deepcopy(model.head.gates[expert]).double()
        hidden = distance @ first.weight.T + first.bias
        scores.append((hidden @ second.weight.T + second.bias)[:, 0])
    scores = torch.stack(scores, 1)
    return scores.exp() / scores.exp().sum(1, keepdim=True)


def neck(layer, features):
    unit = (features - layer.running_mean.double()) / (layer.running_var.double() + 1e-5).sqrt()
    return unit * layer.weight.double() + layer.bias.double()


# The network


@pytest.mark.parametrize("gate", ["learned", "code"])
def test_the_feature_is_that_of_plain_resnets(gate):
    model, plain = a_model(gate)
    model.eval()
    images = people(5)
    with torch.no_grad():
        found = [expected_map(plain_resnet(model, plain, expert), images) for expert in range(3)]
        for expert, (maps, distances) in enumerate(found):
            ours, ours_distances = model.head.expert_map(model.backbone, images, expert)
            close(f"META map ({gate})", ours, maps)
            close(f"META distances ({gate})", ours_distances, distances)
        distances = [one for _, one in found]
        if gate == "learned":
            shares = gates_of(model, distances, range(3))
        else:
            # As released: with the sign that makes far domains heavier.
            shares = torch.stack([one.sum(1) for one in distances], 1).softmax(1)
        # With the released rule one expert has nearly all; more about its sign below.
        assert (gate == "code" or shares.std(0).min() > 1e-4) and len(distances[0][0]) == 19
        mixture = gem(sum(shares[:, expert, None, None, None] * found[expert][0] for expert in range(3)))
        branch = gem(expected_branch(model, plain, images))
        neck_of_mixture = neck(model.head.mixture_neck, mixture)
        if gate == "code":
            neck_of_mixture = mixture / math.sqrt(1 + 1e-5)
        wanted = F.normalize(torch.cat([neck_of_mixture, neck(model.head.necks[3], branch)], 1), dim=1)
        close(f"META features ({gate})", model(images), wanted)
    assert wanted.shape == (5, 64)


def test_the_released_rule_prefers_far_domains_and_only_in_a_test():
    model, _ = a_model("code")
    near, far = torch.full((2, 19), 0.1), torch.full((2, 19), 0.2)
    wanted = torch.tensor([1.9, 3.8, 1.9]).softmax(0).expand(2, 3)
    torch.testing.assert_close(model.eval().head.weights([near, far, near], range(3)), wanted)
    assert not torch.allclose(model.train().head.weights([near, far, near], range(3)), wanted, atol=1e-3)


def test_what_the_branch_shares_and_copies():
    torch.manual_seed(0)
    backbone = backbone_from_config(copy.deepcopy(TINY["resnet"]), SIZE)
    for norm in backbone.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.normal_(norm.bias)
    before = copy.deepcopy(backbone)
    model = ReIDModel(backbone, 9, method="meta", head_options={"domains": DOMAINS})
    stages, old = backbone.model.encoder.stages, before.model.encoder.stages
    counts = {name: len(module.norms) for name, module in backbone.named_modules() if isinstance(module, ExpertNorm)}
    own = [name for name, count in counts.items() if count == 3]
    assert own and all(name.startswith(("model.encoder.stages.1.layers.1", "model.encoder.stages.2")) for name in own)
    assert set(counts.values()) == {3, 4} and "model.encoder.stages.1.layers.0.layer.0.normalization" not in own
    first, last = model.head.branch
    assert not any(isinstance(module, nn.InstanceNorm2d) for module in first.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in last.modules())
    norms = [module for module in last.modules() if isinstance(module, nn.InstanceNorm2d)]
    wanted = [module for module in old[-1].modules() if isinstance(module, nn.BatchNorm2d)]
    for one, other in zip(norms, wanted, strict=True):
        assert torch.equal(one.weight, other.weight) and torch.equal(one.bias, other.bias)
        assert not one.track_running_stats
    for name, norm in before.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            for copied in backbone.get_submodule(name).norms:
                assert torch.equal(copied.weight, norm.weight) and torch.equal(copied.bias, norm.bias)
    # A branch of its own: training it changes nothing in the shared network.
    assert last.layers[0] is not stages[-1].layers[0] and len(expert_norms(backbone)) == 19


def test_a_saved_model_is_opened_again(tmp_path):
    for gate in ("learned", "code"):
        model = a_model(gate)[0].eval()
        model.save_pretrained(tmp_path / gate)
        images = people(3)
        again = ReIDModel.from_pretrained(tmp_path / gate, num_ids=0)
        torch.testing.assert_close(again(images), model(images))
        assert again.head.gate == gate and again.num_ids == 0
    config = json.loads((tmp_path / "code" / "config.json").read_text())
    assert config["head"] == {"domains": DOMAINS, "gate": "code"} and "norms of several domains" in not_plain(config)


# The losses


def test_losses_are_those_of_loops():
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, 0])
    total = 0.0
    for row, label in zip(logits, labels.tolist(), strict=True):
        share = row.exp() / row.exp().sum()
        total -= sum((0.9 if place == label else 0.1 / 4) * math.log(share[place]) for place in range(5)) / 6
    close("META smoothed", meta.smoothed_loss(logits, labels, 0.1), total)
    mixture, expert = torch.randn(2, 12, 4, dtype=torch.float64)
    labels, total = torch.arange(12) // 3, 0.0

    def hardest(features, one):
        gaps = [float((features[one] - other).norm()) for other in features]
        own = [gap for gap, label in zip(gaps, labels, strict=True) if label == labels[one]]
        return max(own), min(gap for gap, label in zip(gaps, labels, strict=True) if label != labels[one])

    for one in range(12):
        (far, near), (wanted_far, wanted_near) = hardest(mixture, one), hardest(expert, one)
        total += (max(0.0, far - wanted_far) + max(0.0, wanted_near - near)) / 12
    assert total > 0.1
    close("META mixture", meta.mixture_loss(mixture, expert, labels), total)
    expert.requires_grad_(True)
    mixture.requires_grad_(True)
    meta.mixture_loss(mixture, expert, labels).backward()
    assert expert.grad is None and mixture.grad.abs().max() > 0


def args_of(*more):
    return parse_args(["--method", "meta", "--setting", "generalisation", *more])


def reference_step(model, plain, images, labels, domain):
    """The losses of a step in float64, from plain ResNets, and their gradients by the names of our parameters."""
    networks = [plain_resnet(model, plain, expert) for expert in range(4)]
    own, head = networks[domain].train(), copy.deepcopy(model.head).double().train()
    # One network: shared convolutions, so their gradients add up.
    local = torch.tensor([[i for i in range(9) if ID_DOMAINS[i] == domain].index(label) for label in labels.tolist()])
    others = [expert for expert in range(3) if expert != domain]
    with torch.no_grad():
        found = [expected_map(networks[expert].eval(), images) for expert in others]
    shares = gates_of_head(head, [one for _, one in found], others)
    mixture = gem(sum(shares[:, place, None, None, None] * maps for place, (maps, _) in enumerate(found)))
    expert = gem(own.feature_map(images.double()))
    network = networks[3].train()
    stages = network.model.encoder.stages
    maps = network.model.embedder(images.double())
    for part in (*stages[:-2], stages[-2].layers[0], *head.branch):
        maps = part(maps)
    branch = gem(maps)
    losses = []
    for features, place, ids in ((expert, domain, local), (branch, 3, labels)):
        mean, variance = features.mean(0), features.var(0, correction=0)
        normed = (features - mean) / (variance + 1e-5).sqrt() * head.necks[place].weight
        logits = normed @ head.classifiers[place].weight.T
        count = logits.shape[1]
        soft = torch.full_like(logits, 0.1 / (count - 1)).scatter(1, ids[:, None], 0.9)
        losses.append(-(soft * logits.log_softmax(1)).sum(1).mean())
        gaps = torch.cdist(features, features)
        same = ids[:, None] == ids[None, :]
        far, near = (gaps * same).amax(1), gaps.masked_fill(same, torch.inf).amin(1)
        losses.append(F.relu(far - near + 0.3).mean())
    gaps, wanted = torch.cdist(mixture, mixture), torch.cdist(expert, expert).detach()
    same = local[:, None] == local[None, :]
    losses.append(
        F.relu((gaps * same).amax(1) - (wanted * same).amax(1)).mean()
        + F.relu(wanted.masked_fill(same, torch.inf).amin(1) - gaps.masked_fill(same, torch.inf).amin(1)).mean()
    )
    sum(losses).backward()
    slopes = {}
    for name, _ in model.backbone.named_parameters():
        place = next((int(part) for before, part in zip(name.split("."), name.split(".")[1:], strict=False)
                      if before == "norms"), None)  # fmt: skip
        key = name if place is None else name.replace(f"norms.{place}.", "")
        takes = [own, network] if place is None else [{domain: own, 3: network}.get(place)]
        slopes[f"backbone.{name}"] = sum(
            one.get_parameter(key).grad
            for one in takes
            if one is not None and has(one, key) and one.get_parameter(key).grad is not None
        )
    slopes |= {f"head.{name}": parameter.grad for name, parameter in head.named_parameters()}
    return losses, slopes, (own, network, mixture.detach(), head)


def has(module, name):
    return name in dict(module.named_parameters())


def gates_of_head(head, distances, experts):
    scores = torch.cat([head.gates[e](distance) for e, distance in zip(experts, distances, strict=True)], 1)
    return scores.softmax(1)


@pytest.mark.parametrize("domain", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_step_is_the_reference_s(domain):
    model, plain = a_model()
    training = Meta(model, args_of(), ID_DOMAINS).train()
    ids = [label for label in range(9) if ID_DOMAINS[label] == domain]
    images, labels = people(6), torch.tensor(ids)[torch.arange(6) % len(ids)]
    # The reference starts from the same weights.
    losses, slopes, (own, network, mixture, head) = reference_step(copy.deepcopy(model), plain, images, labels, domain)
    before = copy.deepcopy(model.state_dict())
    loss, values, _, _ = training(images, labels)
    loss.backward()
    names = ["loss_expert", "loss_expert_triplet", "loss_branch", "loss_branch_triplet", "loss_mixture"]
    assert list(values) == ["loss", *names] and values["loss_mixture"] > 0
    for name, wanted in zip(names, losses, strict=True):
        close(f"META {name}", values[name], wanted)
    close("META loss", loss, sum(losses))
    compared = 0
    for name, parameter in model.named_parameters():
        wanted = slopes[name]
        if isinstance(wanted, int) or wanted is None:
            assert parameter.grad is None, name
            continue
        scale = wanted.abs().max().clamp(min=1e-3)
        close("META gradient", parameter.grad / scale, wanted / scale, limit=2e-4)
        compared += 1
    assert compared > 40
    # What has no gradient: norms of other experts, their gates' other half, necks and classifiers of other domains.
    none = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert {name for name in none if ".norms." in name} == {
        name for name in dict(model.named_parameters()) if any(f".norms.{e}." in name for e in {0, 1, 2} - {domain})
    }
    assert {name.split(".")[2] for name in none if name.startswith("head.gates")} == {str(domain)}
    # Only the averages of the own expert, the branch and three necks move.
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    allowed = (
        f".norms.{domain}.",
        ".norms.3.",
        "head.branch.",
        f"head.necks.{domain}.",
        "head.necks.3.",
        "mixture_neck",
    )
    assert moved and all(any(part in name for part in allowed) for name in moved)
    where = "model.encoder.stages.0.layers.0.layer.0.normalization"
    for place, network_of in ((domain, own), (3, network)):
        found = model.backbone.get_submodule(f"{where}.norms.{place}").running_mean
        torch.testing.assert_close(found.double(), network_of.get_submodule(where).running_mean, rtol=1e-4, atol=1e-5)
    found = model.head.mixture_neck.running_mean.double()
    wanted = 0.9 * before["head.mixture_neck.running_mean"].double() + 0.1 * mixture.mean(0)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_frozen_steps_train_the_own_norms_branch_and_heads():
    model, _ = a_model()
    training = Meta(model, args_of(), ID_DOMAINS).train()
    labels = torch.tensor([1, 5, 1, 5])
    before = copy.deepcopy(model.state_dict())
    loss, *_ = training(people(4), labels, frozen=True)
    loss.backward()
    having = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    of_backbone = {name for name in having if name.startswith("backbone.")}
    assert of_backbone and all(".norms.1." in name for name in of_backbone)
    assert any(name.startswith("head.branch.") for name in having)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert not any(".norms.3." in name for name in moved) and any(".norms.1." in name for name in moved)
    # The next step trains all again.
    loss, *_ = training(people(4), labels)
    loss.backward()
    assert model.backbone.model.embedder.embedder.convolution.weight.grad is not None


def test_activations_computed_twice_change_nothing():
    found = []
    for twice in (False, True):
        model, _ = a_model()
        if twice:
            model.enable_gradient_checkpointing()
        training = Meta(model, args_of(), ID_DOMAINS).train()
        loss, *_ = training(people(4), torch.tensor([0, 3, 0, 3]))
        loss.backward()
        slopes = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        found.append((loss, slopes, model.state_dict()))
    (one, slopes, state), (other, again, other_state) = found
    assert torch.equal(one, other) and slopes.keys() == again.keys() and same_weights(state, other_state)
    for name in slopes:
        torch.testing.assert_close(slopes[name], again[name])


# Batches and rate


def test_batches_of_one_domain_in_turn_use_images_up():
    labels, domains = [], []
    for domain, sizes in (("b", [9, 5, 4, 2, 8]), ("a", [4, 4, 4]), ("c", [8, 8, 8, 8])):
        for size in sizes:
            labels += [len(set(labels))] * size
            domains += [domain] * size
    batches = DomainBatches(labels, domains, 12, 4, seed=5)
    drawn = []
    for epoch in (1, 2, 3, 4, 5):
        batches.set_epoch(epoch)
        part = [[row for row, _ in batch] for batch in batches]
        assert len(part) == len(batches) == batches.steps_of(1) == len(labels) // 12
        drawn += part
    for number, batch in enumerate(drawn):
        assert {domains[row] for row in batch} == {"abc"[number % 3]}
        for start in range(0, 12, 4):
            assert len({labels[row] for row in batch[start : start + 4]}) == 1
        assert len({labels[row] for row in batch}) == 3
    # All three identities of a: every image once in each of its batches.
    assert all(len(set(batch)) == 12 for batch in drawn[::3])
    # Before an image of the identity of 9 comes a third time, all but one have come once.
    assert max(Counter(row for batch in drawn[1:7:3] for row in batch if labels[row] == 0).values(), default=0) <= 1
    # An identity of two images is drawn with replacement.
    small = [row for batch in drawn[1::3] for row in batch if labels[row] == 3]
    assert set(small) <= set(range(18, 20)) and len(small) % 4 == 0
    # A run that resumes, or another process, gets the same batches.
    again = DomainBatches(labels, domains, 12, 4, seed=5)
    again.set_epoch(3, done=2)
    per_epoch = len(labels) // 12
    assert [[row for row, _ in batch] for batch in again] == drawn[2 * per_epoch + 2 : 3 * per_epoch]
    again.set_epoch(2)
    assert [[row for row, _ in batch] for batch in again] == drawn[per_epoch : 2 * per_epoch]
    halves = [DomainBatches(labels, domains, 12, 4, 5, rank, 2) for rank in (0, 1)]
    for half in halves:
        half.set_epoch(1)
    for one, other, batch in zip(*halves, drawn, strict=False):
        assert [row for row, _ in one + other] == batch
    with pytest.raises(ValueError, match="takes 4 identities of one domain .* domain a has 3"):
        DomainBatches(labels, domains, 16, 4)


def test_the_rate_rises_by_steps_and_falls_by_epochs():
    args = parse_args(["--recipe", "meta"])
    # 150 steps an epoch: 500 steps of rise end in the fourth epoch.
    rates = [cosine_after_warmup(1, 0, args, 150), cosine_after_warmup(2, 250, args, 150)]
    assert rates == pytest.approx([0.1, 0.55])
    assert cosine_after_warmup(4, 500, args, 150) == 1
    wanted = [1e-3 + (1 - 1e-3) * (1 + math.cos(math.pi * k / 116)) / 2 for k in (1, 58, 116)]
    assert [cosine_after_warmup(epoch, 9999, args, 150) for epoch in (5, 62, 120)] == pytest.approx(wanted)
    assert args.learning_rate * wanted[-1] == pytest.approx(4e-5)


# Arguments


def test_published_values():
    args = parse_args(["--recipe", "meta"])
    assert (args.method, args.setting, args.target) == ("meta", "generalisation", ["prid", "grid", "viper", "ilids"])
    assert [spec.split(":")[0] for spec in args.source] == ["market1501", "cuhk02", "cuhk03np", "cuhksysu"]
    assert (args.optimizer, args.nesterov, args.learning_rate, args.adam_beta1) == ("sgd", True, 0.04, 0.9)
    assert (args.train_batch_size, args.images_per_id, args.num_train_epochs) == (64, 4, 120)
    assert (args.lr_warmup_steps, args.lr_warmup_factor, args.freeze_steps) == (500, 0.1, 500)
    assert (args.auto_augment, args.colour_jitter, args.erasing, args.padding) == (0.1, 0.5, 0.0, 10)
    assert (args.margin, args.label_smoothing, args.meta_gate, args.test_resample) == (0.3, 0.1, "learned", "bicubic")
    assert vars(args) | {"recipe": "published", "origin": None, "notes": None} == vars(
        parse_args(["--recipe", "published", "--method", "meta"])
    ) | {"origin": None, "notes": None}
    assert parse_args(["--recipe", "meta", "--learning_rate", "0.01"]).learning_rate == 0.01
    demo = parse_args(["--method", "meta"])
    assert demo.demo and (demo.setting, demo.backbone, len(demo.source)) == ("generalisation", RESNET_DIR, 3)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--method", "meta", "--setting", "supervised"], "belongs to --setting generalisation"),
        (["--recipe", "meta", "--method", "agw"], "--recipe meta is of --method meta, not of agw"),
        (["--recipe", "meta", "--triplet", "weighted"], "whose triplets are hard"),
        (["--recipe", "meta", "--centre_weight", "0.1"], "which has no centres"),
        (["--recipe", "meta", "--adam_beta1", "0"], "--nesterov needs momentum"),
    ],
)
def test_arguments_that_cannot_be(arguments, words, capsys):
    with pytest.raises(SystemExit):
        parse_args(arguments)
    assert words in capsys.readouterr().err


# Whole runs


@pytest.fixture(scope="session")
def resnet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resnet")
    torch.manual_seed(0)
    ResNetModel(TINY["resnet"]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def finished(resnet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    assert train(*RUN, "--backbone", resnet, "--output_dir", folder) == 0
    return folder


@pytest.mark.slow
def test_what_a_run_leaves_and_evaluate_opens(finished, tmp_path):
    lines = log_of(finished)
    losses = [f"loss_{name}" for name in ("expert", "expert_triplet", "branch", "branch_triplet", "mixture")]
    assert len(lines) == 12 and all(
        list(line) == ["step", "epoch", "lr", "grad_norm", "loss", *losses] for line in lines
    )
    for line in lines:
        assert line["loss"] == pytest.approx(sum(line[name] for name in losses), rel=1e-5)
    kept = torch.load(finished / "checkpoint-12" / "optimizer.pt", weights_only=True)["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in kept] == [5e-4, 0.0] and all(group["nesterov"] for group in kept)
    wanted = json.loads((finished / "metrics.json").read_text())["targets"][TARGET]
    where = ["--model", finished / "model", "--data", TARGET, "--output_dir", tmp_path, "--report_queries", "0"]
    assert runs.run(evaluate, *where)["mAP"] == pytest.approx(wanted["mAP"], abs=1e-6)
    model = ReIDModel.from_pretrained(finished / "model")
    assert model.head.domains == [4, 4, 4] and model.num_ids == 12


@pytest.mark.slow
def test_a_cut_training_goes_on_to_the_same_numbers(resnet, finished, tmp_path):
    common = [*RUN, "--backbone", resnet, "--output_dir", tmp_path]
    # In a frozen step, whose checkpoint holds the norms of all experts too.
    train(*common, "--max_train_steps", "2")
    names = runs.load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert sum(".norms.0." in name for name in names) == sum(".norms.2." in name for name in names) > 0
    train(*common, "--resume_from_checkpoint", "latest")
    assert (tmp_path / "log.jsonl").read_text() == (finished / "log.jsonl").read_text()
    assert same_weights(weights_of(tmp_path), weights_of(finished))


@pytest.mark.slow
def test_two_processes_train_as_one(resnet, finished, tmp_path):
    few = [*RUN, "--backbone", resnet, "--train_batch_size", "4", "--max_train_steps", "4", "--output_dir", tmp_path]
    launch("finetune_reid.py", *few, processes=2)
    same_steps("meta, two processes", log_of(finished)[:4], log_of(tmp_path))


@pytest.mark.slow
def test_precisions_and_recomputation(resnet, finished, tmp_path, monkeypatch):
    wanted, asked = log_of(finished)[0], calls_of(monkeypatch, ReIDModel, "enable_gradient_checkpointing")
    for name, more, tolerance in (
        ("bf16", ["--mixed_precision", "bf16"], 0.02), ("twice", ["--gradient_checkpointing"], 1e-5),
    ):  # fmt: skip
        train(*RUN, "--backbone", resnet, *more, "--max_train_steps", "2", "--output_dir", tmp_path / name)
        found = log_of(tmp_path / name)[0]["loss"]
        assert found == pytest.approx(wanted["loss"], rel=tolerance), name
        assert len(asked) == (name == "twice") and (name == "twice" or found != wanted["loss"])


def test_what_is_refused(resnet, tmp_path, monkeypatch):
    a_model()[0].save_pretrained(tmp_path / "model")
    monkeypatch.setattr(ReIDModel, "for_training", None)
    out = ["--output_dir", tmp_path / "out", "--backbone", resnet]
    one = refused(*RUN, *out, "--source", SOURCES[0])
    assert "learns from several domains" in one and "has one, synthetic-a" in one
    few = "synthetic:domain=a,num_ids=1,images_per_id=4"
    told = refused(*RUN, *out, "--source", few, *SOURCES[1:])
    assert "takes 2 identities of one domain" in told and "domain synthetic-a has 1" in told
    assert "has experts of its sources" in refused(*RUN, *out[:2], "--backbone", tmp_path / "model")
    assert "a clip" in refused(*RUN, *out[:2], "--backbone", CLIP_DIR)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["meta", "metabin"])
def test_the_demo_starts_from_a_small_resnet(method, tmp_path, capsys):
    """12 identities of 8 images in each domain are enough."""
    sources = [f"synthetic:domain={name},num_ids=12,images_per_id=8" for name in "abc"]
    more = ["--source", *sources, "--target", TARGET, "--max_train_steps", "2", "--output_dir", tmp_path]
    assert train("--method", method, *more) == 0
    assert "shipped stand-in ResNet, trained on domains f, g and h" in capsys.readouterr().out
    assert len(log_of(tmp_path)) == 2


def test_a_map_of_one_place_is_refused():
    backbone = backbone_from_config(copy.deepcopy(TINY["resnet"]), (8, 8))
    with pytest.raises(ValueError, match="images of 8 x 8 give this ResNet a map of one place"):
        ReIDModel(backbone, 9, method="meta", head_options={"domains": DOMAINS})
    with pytest.raises(ValueError, match="experts are of two domains or more, got 1"):
        ReIDModel(backbone, 9, method="meta", head_options={"domains": [9]})

"""UNRN: its network, the source's epochs, every loss with its gradients, and what follows a step, in float64."""

import pytest
import torch
import torch.nn.functional as F
from transformers import ResNetConfig, ResNetModel

from adapt_reid import of, parse_args
from methods.unrn import UNRN, Outputs
from tests.methods.reference import close, unit
from utils.modeling.domain_norms import DomainNorm
from utils.modeling.heads import NonLocal, add_gem
from utils.modeling.networks.resnet import as_sbs
from utils.modeling.norms import add_batch_instance_norms
from utils.modeling.reid_model import ReIDModel
from utils.training.contrast import FeatureQueue, circle_contrast

ARGUMENTS = ["--setting", "adaptation", "--source", "x", "--target", "y", "--method", "unrn"]
LABELS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, -1, 3, 3, 3, -1])
NAMES = ["classes", "triplet", "apart", "centres", "queue"]


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resnet")
    torch.manual_seed(0)
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 12, 16], depths=[1, 2, 4, 1])).save_pretrained(
        folder
    )
    return folder


def module(folder, *more):
    torch.manual_seed(0)
    args = parse_args([*ARGUMENTS, "--queue_size", "6", "--centre_weight", "0.3", "--queue_weight", "0.7",
                       "--centre_momentum", "0.4", "--teacher_momentum", "0.7", "--label_smoothing", "0.2",
                       "--num_train_epochs", "9", *more])  # fmt: skip
    encoder = ReIDModel.for_training(folder, num_ids=0, image_size=(64, 32))
    return UNRN(encoder, args, 3, torch.zeros(14)).train()


def circle(scores, positives):
    """Of one row: the bracketed factors are constants."""
    near = [-128 * max(0.0, 1.25 - s.item()) * (s - 0.75) for s, own in zip(scores, positives, strict=True) if own]
    far = [128 * max(0.0, s.item() + 0.25) * (s - 0.25) for s, own in zip(scores, positives, strict=True) if not own]
    if not near or not far:
        return scores.sum() * 0
    return F.softplus(torch.stack(near).logsumexp(0) + torch.stack(far).logsumexp(0))


def both(what, found, wanted, inputs, doubles):
    """Values and gradients."""
    close(what, found, wanted)
    ours = torch.autograd.grad(found, inputs, retain_graph=True, allow_unused=True)
    theirs = torch.autograd.grad(wanted, doubles, retain_graph=True, allow_unused=True)
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        zero = torch.zeros_like(inputs[number])
        close(f"{what}, gradient {number}", zero if one is None else one, zero if other is None else other, 1e-4)


def test_circle_by_formulas():
    cosines = (unit(6, 5) @ unit(9, 5, seed=1).t()).float().requires_grad_()
    positives = torch.rand(6, 9, generator=torch.Generator().manual_seed(0)) < 0.3
    positives[0], positives[1] = False, True
    doubles = cosines.detach().double().requires_grad_()
    wanted = torch.stack([circle(*pair) for pair in zip(doubles, positives, strict=True)])
    found = circle_contrast(cosines, positives)
    assert found[:2].tolist() == [0, 0] and found[2:].min() > 0
    both("circle", found.sum(), wanted.sum(), [cosines], [doubles])


def outputs(seed, width, dtype=torch.float32):
    parts = [
        4 * unit(8, width, seed=seed),
        *(3 * unit(8, 10, seed=seed + n) for n in (1, 2)),
        unit(8, width, seed=seed + 3),
    ]
    parts[0] = parts[0].abs() if seed else parts[0]
    parts = [part.to(dtype).requires_grad_() for part in parts]
    return Outputs(parts[0], [], parts[1:3], parts[3]), parts


def test_losses_by_formulas(resnet):
    model = module(resnet, "--source_epochs", "1", "--cluster_every", "3")
    model.pseudo_labels.copy_(LABELS)
    model.epoch.fill_(3)
    width = model.student.encoder.num_features
    model.centres.copy_(unit(3, width, seed=20))
    model.queue.empty(5)
    model.queue.add(unit(4, width, seed=21).float(), torch.tensor([2, 12, 5, 4]))
    rows = torch.tensor([0, 0, 2, 2, 3, 5, 8, 10])
    (student, inputs), (teacher, _) = outputs(1, width), outputs(5, width)
    (_, doubles), (_, calm) = outputs(1, width, torch.float64), outputs(5, width, torch.float64)
    loss, values = model.losses(student, teacher, rows)

    # 3 identities and 4 clusters of 14 // 2 + 3 rows of the classifiers.
    y = [3, 3, 4, 5]
    features, four, three, queued = doubles
    queue, centres = model.queue.features.double(), model.centres.double()
    v = []
    for row in range(4, 8):
        p = torch.cat([three[row, :7], centres @ features[row].detach()]).log_softmax(0)
        t = torch.cat([calm[2][row, :7], centres @ calm[0][row]]).log_softmax(0).detach()
        v.append(sum(t[k].exp() * (t[k] - p[k]) for k in range(10)))
    r = [torch.exp(-one) for one in v]
    entropies = [-sum(side[4 + n, :7].log_softmax(0)[y[n]] for n in range(4)) / 4 for side in (four, three)]
    triplet = 0
    for n in range(4):
        apart = [(features[4 + n] - features[4 + k]).norm() if n != k else torch.zeros(()).double() for k in range(4)]
        far = max((k for k in range(4) if y[k] == y[n]), key=lambda k: apart[k].item())
        near = min((k for k in range(4) if y[k] != y[n]), key=lambda k: apart[k].item())
        s = torch.stack([apart[far], apart[near]]).softmax(0)[1]
        triplet = triplet - (r[n].item() + r[near].item()) / 2 * s.log() / 4
    u, m = (side / side.norm(dim=1, keepdim=True) for side in (features, queued))
    by_centre = sum(circle(u[n] @ centres.t(), [k == int(rows[n]) for k in range(3)]) for n in range(4)) / 4
    # Images of the queue: 2 of cluster 0, 12 of 3, 5 and 4 of 1; two places are empty.
    held = [0, 3, 1, 1, None, None]
    by_queue = sum(circle(m[4 + n] @ queue.t(), [place == y[n] - 3 for place in held]) for n in range(4)) / 4
    wanted = [sum(r) / 4 * sum(entropies), triplet, sum(v) / 4, 0.3 * by_centre, 0.7 * by_queue]
    for name, want in zip(NAMES, wanted, strict=True):
        assert want.item() > 1e-3, name
        both(f"UNRN loss_{name}", values[f"loss_{name}"], want, inputs, doubles)
    both("UNRN loss", loss, sum(wanted), inputs, doubles)
    # In the first epoch of a clustering the queue rests.
    for epoch, rests in ((2, True), (4, False), (5, True)):
        model.epoch.fill_(epoch)
        assert (model.losses(student, teacher, rows)[1]["loss_queue"] == 0) == rests


@torch.no_grad()
def test_what_follows_a_step_by_formulas(resnet):
    model = module(resnet, "--source_epochs", "0")
    model.epoch.fill_(2)
    model.centres.copy_(unit(3, 16))
    model.queue.empty(3)
    known, places = (
        {n: w.double().clone() for n, w in model.student.named_parameters()},
        model.queue.features.double().clone(),
    )
    centres, held = model.centres.double().clone(), [-1] * 6
    for step in range(4):
        for parameter in model.student.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        features, queued = unit(4, 16, seed=step), unit(4, 16, seed=9 + step)
        identities, images = torch.tensor([2, 0, 2, 2]), torch.tensor([3, 4, 7, 3]) + step
        model.after_step(features.float(), identities, queued.float(), images)
        for feature, label in zip(features, identities.tolist(), strict=True):
            moved = 0.4 * centres[label] + 0.6 * feature
            centres[label] = moved / moved.norm()
        for number in range(4):
            places[(4 * step + number) % 6], held[(4 * step + number) % 6] = queued[number], int(images[number])
        keep = min(1 - 1 / (step + 1), 0.7)
        known = {n: keep * known[n] + (1 - keep) * w.double() for n, w in model.student.named_parameters()}
    close("UNRN centres", model.centres, centres)
    close("UNRN queue", model.queue.features, places)
    assert model.queue.labels.tolist() == held and int(model.queue.place) == 16 % 6
    found = dict(model.teacher.named_buffers())
    close("UNRN teacher", *(torch.cat([side[name].flatten() for name in known]) for side in (found, known)))
    model.epoch.fill_(3)
    model.after_step(features.float(), identities, queued.float(), images + 50)
    assert int(model.queue.labels.max()) == 10


def test_a_queue_smaller_than_a_batch_holds_its_last():
    queue = FeatureQueue(3, 2)
    queue.add(torch.arange(10.0).view(5, 2), torch.arange(5))
    assert sorted(queue.labels.tolist()) == [2, 3, 4]
    queue.empty(0)
    torch.testing.assert_close(queue.features.norm(dim=1), torch.ones(3))
    assert queue.labels.tolist() == [-1] * 3


def test_source_epochs_by_formulas(resnet):
    """Both domains pass through the source's norms, the loss is of the source alone, the target's norms follow."""
    model = module(resnet, "--source_epochs", "2")
    model.epoch.fill_(1)
    images, rows = torch.randn(8, 3, 64, 32), torch.tensor([0, 0, 2, 2, 3, 5, 8, 10])
    loss, values, seen = model(images, rows)
    loss.backward()
    assert seen == ()
    student = model.student
    bare = ReIDModel.for_training(resnet, num_ids=0, image_size=(64, 32)).train().double()
    hidden = [bare.backbone.model.embedder(images.double()[:4])]
    for stage in bare.backbone.model.encoder.stages:
        hidden.append(stage(hidden[-1]))
    classes, triplets = 0, 0
    for maps, layer in ((hidden[-1], student.encoder.classifier), (hidden[-2], student.classifier)):
        f = maps.mean((2, 3))
        h = (f - f.mean(0)) / (f.var(0, correction=0) + 1e-5).sqrt()
        odds = (h @ layer.weight.double().t())[:, :3].log_softmax(1)
        classes = classes - sum(0.8 * odds[n, int(rows[n])] + 0.2 * odds[n].mean() for n in range(4)) / 4
        apart = [[(one - other).norm().item() for other in f] for one in f]
        for n in range(4):
            own = max(apart[n][k] for k in range(4) if rows[k] == rows[n])
            other = min(apart[n][k] for k in range(4) if rows[k] != rows[n])
            triplets += F.softplus(torch.tensor(own - other).double()) / 4
    close("UNRN source classes", values["loss_classes"], classes)
    close("UNRN source triplets", values["loss_triplet"], triplets)
    close("UNRN source loss", loss, classes + triplets)
    norms = [norm for norm in student.modules() if isinstance(norm, DomainNorm)]
    assert all(
        int(norm.norms[0].num_batches_tracked) == 2 and int(norm.norms[1].num_batches_tracked) == 0 for norm in norms
    )
    assert all(parameter.grad is None for norm in norms for parameter in norm.norms[1].parameters())
    model.after_step()
    assert all(torch.equal(norm.norms[0].running_mean, norm.norms[1].running_mean) for norm in norms)
    assert model.tested() is student.encoder


@torch.no_grad()
def test_stages_labels_and_classifiers(resnet):
    model = module(resnet, "--source_epochs", "2", "--cluster_every", "2", "--source_steps", "5",
                   "--lr_warmup_epochs", "0", "--lr_milestones", "2", "--erasing", "0.4")  # fmt: skip
    asked = []

    def cluster(features):
        asked.append(int(model.epoch))
        return LABELS

    def relabel(epoch):
        labels = model.relabel(epoch, lambda: None, lambda: unit(3, 16).float(), cluster)
        model.pseudo_labels.copy_(labels)
        layers = [*model.student.classifiers, *model.teacher.classifiers]
        return labels, [layer.weight.clone() for layer in layers]

    assert (relabel(1)[0] == -1).all() and model.labels_for_batches(model.pseudo_labels, "").eq(0).all()
    model.student.encoder.bnneck.norms[0].weight.fill_(3)
    labels, first = relabel(3)
    assert torch.equal(labels, LABELS) and model.tested() is model.teacher.encoder
    assert (model.teacher.encoder.bnneck.norms[0].weight == 3).all()
    close("UNRN centres at first", model.centres, unit(3, 16))
    # Each from a draw of its own, as torch draws a linear layer.
    assert all(0.2 < float(layer.abs().max()) <= layer.shape[1] ** -0.5 + 1e-6 for layer in first)
    assert len({float(layer.flatten()[0]) for layer in first}) == 4
    assert all(torch.equal(*pair) for pair in zip(first, relabel(4)[1], strict=True))
    assert not any(torch.equal(*pair) for pair in zip(first, relabel(5)[1], strict=True))
    assert asked == [3, 5]
    args = model.args
    assert [model.epoch_steps(epoch, 7, 8) for epoch in (1, 2, 3, 9)] == [5, 5, 7, 7]
    assert of(model, "all_steps")(args, 7) == 2 * 5 + 7 * 7
    assert [of(model, "rate")(args, 7)(epoch, 0) for epoch in (1, 2, 3, 9)] == pytest.approx([1, 1, 1, 1])
    assert [of(model, "erasing")(args, epoch) for epoch in (1, 2, 3, 9)] == [0, 0, 0.4, 0.4]
    # The authors' schedule moves after an epoch: 0.01 in the first, all of it from the eleventh to the fortieth.
    rate = of(model, "rate")(parse_args(["--recipe", "unrn"]), 300)
    rates = [rate(epoch, 0) for epoch in (1, 6, 11, 40, 41, 70, 71, 80, 81, 280)]
    assert rates == pytest.approx([0.01, 0.505, 1, 1, 0.1, 0.1, 0.01, 0.01, 1, 1])


def test_the_network_of_sbs(resnet, standins, tmp_path):
    encoder = ReIDModel.for_training(resnet, num_ids=0, image_size=(64, 32))
    images = torch.randn(2, 3, 64, 32)
    with torch.no_grad():
        plain = encoder.backbone
        changed = as_sbs(plain).eval()
        places = {name for name, part in changed.named_modules() if isinstance(part, NonLocal)}
        start = "model.encoder.stages."
        assert places == {
            f"{start}{place}.1" for place in ("1.layers.0", "1.layers.1", *(f"2.layers.{n}" for n in (1, 2, 3)))
        }
        assert all(part.theta.out_channels == 1 for part in changed.modules() if isinstance(part, NonLocal))
        # The blocks do nothing yet: all that differs is the ReLU before the first pooling.
        stem = plain.model.embedder
        hidden = stem.pooler(stem.embedder.normalization(stem.embedder.convolution(images)))
        for stage in plain.model.encoder.stages:
            hidden = stage(hidden)
        torch.testing.assert_close(changed.feature_map(images), hidden)
        assert as_sbs(changed) is changed
        encoder.backbone = changed
        add_gem(encoder.backbone)
        encoder.eval().save_pretrained(tmp_path)
        torch.testing.assert_close(ReIDModel.from_pretrained(tmp_path)(images), encoder(images))
    with pytest.raises(ValueError, match="--network sbs changes a ResNet, and the backbone is a clip_vision_model"):
        as_sbs(ReIDModel.for_training(standins / "clip", num_ids=0, image_size=(64, 32)).backbone)
    with pytest.raises(ValueError, match="--network sbs adds blocks to a plain ResNet; this one has MetaBIN's norms"):
        mixed = ReIDModel.for_training(resnet, num_ids=0, image_size=(64, 32)).backbone
        add_batch_instance_norms(mixed)
        as_sbs(mixed)


def test_recipe():
    args = parse_args(["--recipe", "unrn-msmt17"])
    assert (args.source, args.target, args.setting, args.network, args.pooling) == (
        ["market1501"],
        ["msmt17"],
        "adaptation",
        "sbs",
        "gem",
    )
    assert (args.source_epochs, args.source_steps, args.steps_per_epoch, args.num_train_epochs) == (80, 200, 300, 280)
    rate = UNRN.rate(args, 300)
    assert [rate(epoch, 0) for epoch in (1, 11, 40, 41, 71, 81, 280)] == pytest.approx([0.01, 1, 1, 0.1, 0.01, 1, 1])

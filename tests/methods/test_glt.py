"""GLT: k-means, shared-out labels, rounds, and every loss with its gradients, in float64."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans

from adapt_reid import of, parse_args
from methods.glt import GLT, Outputs, refined, round_of
from tests.methods.reference import close, unit
from tests.methods.test_unrn import both, circle
from utils.modeling.reid_model import ReIDModel
from utils.training.balance import balanced_labels
from utils.training.clustering import from_main, k_means

ARGUMENTS = ["--setting", "adaptation", "--source", "x", "--target", "y", "--method", "glt"]
GROUPS = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 0, 0, 1, 0, 1], [0, 0, 1, 1, 2, 2, 2, 0, 0, 1, 2, 1],
                       [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 4, 3]])  # fmt: skip


def module(folder, *more):
    torch.manual_seed(0)
    args = parse_args([*ARGUMENTS, "--group_counts", "2", "3", "5", "--queue_size", "6", "--centre_weight", "0.3",
                       "--queue_weight", "0.7", "--centre_momentum", "0.4", "--teacher_momentum", "0.7",
                       "--balance_power", "4", *more])  # fmt: skip
    encoder = ReIDModel.for_training(folder / "clip", num_ids=0, image_size=(64, 32))
    return GLT(encoder, args, 3, torch.zeros(12)).train()


@pytest.mark.parametrize("count, groups, power", [(60, 5, 25), (47, 7, 3), (9, 9, 25)])
def test_shared_out_labels_by_formulas(count, groups, power):
    logits = 0.5 * unit(count, 8) @ unit(groups, 8, seed=1).t() + 0.4 * unit(1, groups, seed=2)
    p = logits.softmax(1) ** power
    c, r = torch.full((count,), 1 / count).double(), None
    for number in range(5000):
        r = (1 / groups) / (p * c[:, None]).sum(0)
        new = (1 / count) / (p * r).sum(1)
        change, c = float((new / c - 1).abs().sum()), new
        if number % 10 == 0 and change < 0.01:
            break
    shares = p * r * c[:, None]
    assert (shares.sum(1) - 1 / count).abs().max() < 1e-9 and (shares.sum(0) - 1 / groups).abs().max() < 0.02
    wanted = shares.argmax(1)
    assert torch.equal(balanced_labels(logits.float(), power), wanted)
    # Without the sharing out, groups are larger and smaller.
    assert count == groups or not torch.equal(logits.argmax(1), wanted)


def test_k_means_beside_another_one():
    features = unit(120, 6)
    for count in (2, 9, 30):
        found = k_means(features, count, seed=3)
        assert found.noise == 0 and sorted(set(found.labels.tolist())) == list(range(count))
        centres = torch.stack([features[found.labels == label].mean(0) for label in range(count)])
        # A fixed point: each row is with its nearest centre.
        assert torch.equal(torch.cdist(features, centres).argmin(1), found.labels)
        spread = float((features - centres[found.labels]).square().sum())
        other = KMeans(count, n_init=10, random_state=0).fit(features.numpy()).inertia_
        print(f"\nk-means {count}: {spread:.3f}, sklearn's {other:.3f}", end="")
        assert spread < 1.04 * other
    assert torch.equal(k_means(features, 9, seed=3).labels, k_means(features, 9, seed=3).labels)
    with pytest.raises(
        ValueError, match="the clusters collapsed: 120 images have 4 different features.*Lower --group_counts"
    ):
        k_means(features[:4].repeat(30, 1), 5)
    assert from_main(lambda: 3) == 3


def test_losses_by_formulas(standins):
    model = module(standins)
    width = model.student.encoder.num_features
    model.group_labels.copy_(GROUPS)
    model.pseudo_labels.copy_(GROUPS[1])
    model.centres.copy_(unit(3, width, seed=20))
    model.queue.empty(5)
    model.queue.add(unit(4, width, seed=21).float(), torch.tensor([2, 10, 5, 4]))
    rows = torch.tensor([0, 0, 2, 2, 3, 5, 8, 10])

    def parts(dtype):
        sizes = [
            (4 * unit(8, width), 0),
            *((3 * unit(8, count, seed=count), 0) for count in (2, 3, 5)),
            (unit(8, width, seed=9), 0),
        ]
        return [part.to(dtype).requires_grad_() for part, _ in sizes]

    inputs, doubles = parts(torch.float32), parts(torch.float64)
    loss, values = model.losses(Outputs(inputs[0], [], inputs[1:4], inputs[4]), rows)
    f, *logits, m = doubles
    images = [0, 2, 5, 7]
    y = [int(GROUPS[1, image]) for image in images]
    entropies = [-sum(side[4 + n].log_softmax(0)[int(groups[image])] for n, image in enumerate(images)) / 4
                 for side, groups in zip(logits, GROUPS, strict=True)]  # fmt: skip
    triplet = 0
    for n in range(4):
        apart = [(f[4 + n] - f[4 + k]).norm() if n != k else torch.zeros(()).double() for k in range(4)]
        far = max((k for k in range(4) if y[k] == y[n]), key=lambda k: apart[k].item())
        near = min((k for k in range(4) if y[k] != y[n]), key=lambda k: apart[k].item())
        triplet = triplet + torch.log(1 + torch.exp(apart[far] - apart[near])) / 4
    u, m = (side / side.norm(dim=1, keepdim=True) for side in (f, m))
    by_centre = sum(circle(u[n] @ model.centres.double().t(), [k == int(rows[n]) for k in range(3)]) for n in range(4))
    held = [1, 2, 2, 2, None, None]
    by_queue = sum(
        circle(m[4 + n] @ model.queue.features.double().t(), [one == y[n] for one in held]) for n in range(4)
    )
    wanted = {
        "classes": sum(entropies) / 3,
        "triplet": triplet,
        "centres": 0.3 * by_centre / 4,
        "queue": 0.7 * by_queue / 4,
    }
    for name, want in wanted.items():
        assert want.item() > 1e-3, name
        both(f"GLT loss_{name}", values[f"loss_{name}"], want, inputs, doubles)
    both("GLT loss", loss, sum(wanted.values()), inputs, doubles)


@torch.no_grad()
def test_rounds_and_refinement(standins):
    more = ["--source_epochs", "1", "--rounds", "2", "--round_epochs", "2", "--round_milestones", "2"]
    model = module(standins, *more, "--num_train_epochs", "7", "--source_steps", "5", "--lr_warmup_epochs", "0")
    student, width = model.student, model.student.encoder.num_features
    seen = []

    def target():
        # Another model gives other features.
        scale = float(model.tested().backbone.model.vision_model.pre_layrnorm.weight[0])
        seen.append(round(scale, 3))
        return F.normalize(unit(12, width).float() + scale * unit(12, width, seed=5).float(), dim=1)

    def cluster(features=None, labels=None):
        return model.clusterings(features, model.args, None)[0].labels if labels is None else labels

    def relabel(epoch):
        labels = model.relabel(epoch, target, lambda: unit(3, width).float(), cluster)
        model.pseudo_labels.copy_(labels)
        return labels

    def stem(network):
        return network.encoder.backbone.model.vision_model.pre_layrnorm.weight

    assert (relabel(1) == -1).all() and model.labels_for_batches(model.pseudo_labels, "").eq(0).all()
    stem(student).fill_(3.0)
    labels = relabel(2)
    assert seen == [3.0] and torch.equal(labels, model.group_labels[1])
    assert [len(set(groups.tolist())) for groups in model.group_labels] == [2, 3, 5]
    features = target()
    for layer, other, groups in zip(student.classifiers, model.teacher.classifiers, model.group_labels, strict=True):
        means = torch.stack([features[groups == number].double().mean(0) for number in groups.unique()])
        close("GLT classifiers", layer.weight, means / means.norm(dim=1, keepdim=True))
        assert torch.equal(layer.weight, other.weight)
    # Training moves student and teacher; the groups follow the teacher's classifiers.
    stem(student).fill_(9.0)
    stem(model.teacher).fill_(7.0)
    for layer in model.teacher.classifiers:
        layer.weight.copy_(torch.randn(layer.weight.shape))
    model.num_steps.fill_(4)
    labels = relabel(3)
    features = target()
    wanted = refined(features, [layer.weight for layer in model.teacher.classifiers], 4)
    assert torch.equal(model.group_labels, wanted) and torch.equal(labels, wanted[1])
    plain = [balanced_labels(features @ layer.weight.t(), 4) for layer in model.teacher.classifiers]
    assert torch.equal(wanted, torch.stack(plain)) and int(model.num_steps) == 4
    # The next round: groups of that teacher, weights of the source.
    before = k_means(target(), 5).labels
    relabel(4)
    assert torch.equal(model.group_labels[2], before)
    assert (stem(student) == 3).all() and (stem(model.teacher) == 3).all() and int(model.num_steps) == 0
    features = target()
    means = torch.stack([features[before == number].mean(0) for number in range(5)])
    torch.testing.assert_close(student.classifiers[2].weight, F.normalize(means, dim=1))
    args = model.args
    assert [round_of(epoch, args) for epoch in (1, 2, 3, 4, 6)] == [(0, 1), (0, 2), (1, 1), (1, 2), (1, 4)]
    assert [of(model, "rate")(args, 7)(epoch, 0) for epoch in range(1, 8)] == pytest.approx(
        [1, 1, 0.1, 1, 0.1, 0.1, 0.1]
    )
    assert [model.epoch_steps(epoch, 7, 8) for epoch in (1, 2)] == [5, 7] and of(model, "all_steps")(args, 7) == 47


def test_a_step_moves_everything_and_drops_numbers(standins):
    model = module(standins, "--source_epochs", "0", "--dropout", "0.4")
    model.epoch.fill_(1)
    model.group_labels.copy_(GROUPS)
    model.pseudo_labels.copy_(GROUPS[1])
    model.centres.copy_(unit(3, model.student.encoder.num_features))
    model.queue.empty(0)
    kept = model.kept_numbers(torch.zeros(50, 100))
    assert kept.unique().tolist() == pytest.approx([0, 1 / 0.6]) and 0.55 < float((kept > 0).float().mean()) < 0.65
    assert torch.equal(kept, model.kept_numbers(torch.zeros(50, 100)))
    images, rows = torch.randn(8, 3, 64, 32), torch.tensor([0, 0, 2, 2, 3, 5, 8, 10])
    before = {name: value.clone() for name, value in model.named_buffers()}
    loss, _, seen = model(images, rows)
    loss.backward()
    with torch.no_grad():
        h = model.student.encoder.bnneck
        pooled = model.student.pool(images)
        u = torch.cat([(half - half.mean(0)) / (half.var(0, correction=0) + 1e-5).sqrt() for half in pooled.chunk(2)])
        kept = model.kept_numbers(pooled)
        wanted = [-((u * kept)[4:] @ layer.weight.t()).log_softmax(1)[torch.arange(4), groups[rows[4:] - 3]].mean()
                  for layer, groups in zip(model.student.classifiers, GROUPS, strict=True)]  # fmt: skip
        close("GLT classes with dropout", model(images, rows)[1]["loss_classes"], sum(wanted) / 3, 1e-4)
        assert int(h.norms[1].num_batches_tracked) == 2
        # What the queue is asked with misses the same numbers.
        asked = []
        model.student.queue_head.register_forward_pre_hook(lambda module, given: asked.append(given[0]))
        model.student.grouped(pooled, kept)
        assert torch.equal(asked[0] == 0, (kept == 0).expand_as(asked[0])) and (asked[0] == 0).any()
    model.after_step(*seen)
    moved = {name for name, value in model.named_buffers() if not torch.equal(value, before[name])}
    assert {"centres", "queue.features", "queue.labels", "num_steps"} <= moved
    assert (
        "teacher.encoder.bnneck.norms.1.running_mean" in moved
        and "teacher.encoder.bnneck.norms.0.running_mean" in moved
    )
    assert not torch.equal(model.kept_numbers(pooled), kept)


def test_what_cannot_be(standins, capsys):
    args = parse_args([*ARGUMENTS, "--group_counts", "2", "30"])
    with pytest.raises(
        ValueError, match=r"12 images cannot be divided into 30 groups \(--group_counts 2 30\): give more"
    ):
        GLT.check_images(args, 12)
    for words, problem in (
        (
            ["--rounds", "3", "--num_train_epochs", "5"],
            "--source_epochs 1 and 2 rounds of --round_epochs 2 are all of",
        ),
        (
            ["--method", "unrn", "--source_epochs", "5"],
            "--source_epochs 5 are all of --num_train_epochs 5: give more than 5",
        ),
        (["--group_counts", "1"], "--group_counts must be 2 or more, got 1"),
    ):
        with pytest.raises(SystemExit):
            parse_args([*ARGUMENTS, *words])
        assert problem in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse_args(["--method", "glt"])
    assert "it needs labels: --setting adaptation --source SPEC" in capsys.readouterr().err


def test_recipe():
    args = parse_args(["--recipe", "glt"])
    assert (args.source_epochs, args.source_steps, args.num_train_epochs, args.group_counts) == (
        80,
        200,
        160,
        [600, 700, 800],
    )
    rate = GLT.rate(args, 300)
    assert [rate(epoch, 0) for epoch in (81, 121, 122, 151, 152, 160)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    args = parse_args(["--recipe", "glt", "--rounds", "11", "--num_train_epochs", "560"])
    assert GLT.rate(args, 300)(121, 0) == 1 and round_of(400, args) == (9, 40) and round_of(480, args) == (10, 80)

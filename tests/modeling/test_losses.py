"""The losses against their definitions, written out as plain loops in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from utils.modeling.hybrid_memory import move_in_turn
from utils.modeling.losses import CentreLoss, circle_logits, distances, hard_triplet, weighted_triplet
from utils.modeling.memories import PrototypeMemory, class_means

SIZES = [(1, 1, 3), (8, 5, 16), (16, 40, 33), (64, 16, 128)]


def rows(count, width, seed):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def batch_of(size, num_ids, width, seed=0):
    """Features and labels; some identities come once, some often, most not at all where there are many."""
    generator = torch.Generator().manual_seed(seed + 100)
    return 3 * rows(size, width, seed), torch.randint(num_ids, (size,), generator=generator)


def unit(row):
    length = math.sqrt(sum(value * value for value in row))
    return [value / length for value in row]


def dot(one, other):
    return sum(a * b for a, b in zip(one, other, strict=True))


def loss_and_gradient(features, labels, prototypes, temperature):
    """Mean cross-entropy of cosines / temperature, and its gradient to the features, derived by hand."""
    memory = [unit(row) for row in prototypes.double().tolist()]
    total, gradient = 0.0, []
    for raw, label in zip(features.double().tolist(), labels.tolist(), strict=True):
        direction = unit(raw)
        logits = [dot(direction, prototype) / temperature for prototype in memory]
        top = max(logits)
        weights = [math.exp(value - top) for value in logits]
        total += math.log(sum(weights)) + top - logits[label]
        shares = [weight / sum(weights) - (number == label) for number, weight in enumerate(weights)]
        pull = [dot(shares, column) / temperature / len(labels) for column in zip(*memory, strict=True)]
        # Only what is across the feature changes its direction.
        along, length = dot(pull, direction), math.sqrt(dot(raw, raw))
        gradient.append([(a - along * u) / length for a, u in zip(pull, direction, strict=True)])
    return total / len(labels), gradient


def updated(features, labels, prototypes, momentum):
    memory = [unit(row) for row in prototypes.double().tolist()]
    hardest = {}
    for raw, label in zip(features.double().tolist(), labels.tolist(), strict=True):
        direction = unit(raw)
        likeness = dot(direction, memory[label])
        if label not in hardest or likeness < hardest[label][0]:
            hardest[label] = (likeness, direction)
    for label, (_, direction) in hardest.items():
        mixed = zip(memory[label], direction, strict=True)
        memory[label] = unit([momentum * old + (1 - momentum) * new for old, new in mixed])
    return memory


def assert_close(got, want, tolerance=2e-5):
    want = torch.as_tensor(want, dtype=torch.float64)
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * max(1, want.abs().max()))


@pytest.mark.parametrize("size, num_ids, width", SIZES)
@pytest.mark.parametrize("temperature, momentum", [(0.01, 0.2), (0.5, 0.9)])
def test_loss_gradient_and_update_follow_the_definition(size, num_ids, width, temperature, momentum):
    features, labels = batch_of(size, num_ids, width)
    prototypes = 5 * rows(num_ids, width, 7)
    memory = PrototypeMemory(prototypes, temperature, momentum)
    features.requires_grad_()
    loss = memory(features, labels)
    loss.backward()
    value, gradient = loss_and_gradient(features.detach(), labels, prototypes, temperature)
    assert loss.dtype == torch.float32 and loss.ndim == 0
    assert_close(loss, value)
    assert_close(features.grad, gradient)
    memory.update(features, labels)
    assert_close(memory.prototypes, updated(features.detach(), labels, prototypes, momentum))


def test_several_updates_drift_no_further_than_rounding():
    prototypes = rows(6, 12, 1)
    memory, want = PrototypeMemory(prototypes), prototypes
    for seed in range(20):
        features, labels = batch_of(24, 6, 12, seed)
        memory.update(features, labels)
        want = torch.tensor(updated(features, labels, want, 0.2), dtype=torch.float64)
    assert_close(memory.prototypes, want)
    assert_close(memory.prototypes.norm(dim=1), torch.ones(6))


def test_one_two_and_all_samples_of_an_identity():
    memory = PrototypeMemory(torch.eye(4))
    features = torch.tensor([[5.0, 1, 0, 0], [1, 1, 0, 0], [0, 3, 0, 1], [2, 2, 0, 0]])
    memory.update(features, torch.tensor([0, 0, 1, 0]))
    diagonal, other = unit([0.2 + 0.8 * 0.5**0.5, 0.8 * 0.5**0.5, 0, 0]), unit([0, 3, 0, 1])
    want = [diagonal, unit([0.8 * b + 0.2 * (n == 1) for n, b in enumerate(other)]), [0, 0, 1, 0], [0, 0, 0, 1]]
    # Rows 1 and 3 have one direction: a tie that changes nothing.
    assert_close(memory.prototypes, want)


def test_the_first_of_equally_hard_samples_is_taken():
    features = torch.tensor([[0.0, 1, 0], [0, 0, 1], [0, -1, 0]])
    memory = PrototypeMemory(torch.tensor([[1.0, 0, 0]]))
    memory.update(features, torch.zeros(3, dtype=torch.int64))
    assert_close(memory.prototypes, [unit([0.2, 0.8, 0])])
    memory = PrototypeMemory(torch.tensor([[1.0, 0, 0]]))
    memory.update(features.flip(0), torch.zeros(3, dtype=torch.int64))
    assert_close(memory.prototypes, [unit([0.2, -0.8, 0])])


def test_only_the_batch_s_identities_move_and_order_does_not_matter():
    features, labels = batch_of(12, 30, 8)
    memory, shuffled = PrototypeMemory(rows(30, 8, 3)), PrototypeMemory(rows(30, 8, 3))
    before = memory.prototypes.clone()
    memory.update(features, labels)
    moved = (memory.prototypes != before).any(1)
    assert moved.nonzero().flatten().tolist() == sorted(set(labels.tolist()))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    shuffled.update(features[order], labels[order])
    assert torch.equal(memory.prototypes, shuffled.prototypes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_compared_in_float32(dtype):
    features, labels = batch_of(16, 10, 32)
    features = features.to(dtype).requires_grad_()
    memory = PrototypeMemory(rows(10, 32, 2))
    loss = memory(features, labels)
    loss.backward()
    value, gradient = loss_and_gradient(features.detach(), labels, rows(10, 32, 2), 0.01)
    assert loss.dtype == torch.float32 and features.grad.dtype == dtype
    assert_close(loss, value)
    assert_close(features.grad, gradient, 2e-2)
    memory.update(features, labels)
    assert_close(memory.prototypes, updated(features.detach(), labels, rows(10, 32, 2), 0.2))


def test_autocast_changes_no_bit():
    features, labels = batch_of(16, 10, 32)
    got = []
    for enabled in (False, True):
        memory, mine = PrototypeMemory(rows(10, 32, 2)), features.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = memory(mine, labels)
            memory.update(mine, labels)
            means = class_means(mine.detach(), labels, 10)
        loss.backward()
        got.append((loss.detach(), mine.grad, memory.prototypes, memory.similarities(features), means))
    for plain, cast in zip(*got, strict=True):
        assert cast.dtype == torch.float32 and torch.equal(plain, cast)


def test_an_update_before_the_backward_pass_does_not_change_the_gradient():
    features, labels = batch_of(16, 10, 32)
    first, second = features.clone().requires_grad_(), features.clone().requires_grad_()
    memory = PrototypeMemory(rows(10, 32, 2))
    memory(first, labels).backward()
    loss = memory(second, labels)
    memory.update(second, labels)
    loss.backward()
    assert torch.equal(first.grad, second.grad)


def test_prototypes_take_no_gradient_and_are_kept_with_the_model():
    given = rows(3, 4, 0).requires_grad_()
    memory = PrototypeMemory(given)
    features = rows(3, 4, 1).requires_grad_()
    memory(features, torch.arange(3)).backward()
    memory.update(features, torch.arange(3))
    assert given.grad is None and not list(memory.parameters())
    assert not memory.prototypes.requires_grad and memory.prototypes.grad_fn is None
    assert list(memory.state_dict()) == ["prototypes"]
    with torch.no_grad():
        given.zero_()
    assert memory.prototypes.any()


@pytest.mark.parametrize("change", [torch.nn.Module.half, torch.nn.Module.bfloat16, torch.nn.Module.double])
def test_prototypes_stay_float32_in_a_model_of_another_precision(change):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), PrototypeMemory(rows(3, 4, 0)))
    exact = model[1].prototypes.clone()
    change(model)
    assert model[0].weight.dtype != torch.float32
    assert model[1].prototypes.dtype == torch.float32 and torch.equal(model[1].prototypes, exact)
    model[1](rows(3, 4, 1), torch.arange(3))
    assert model.to("meta")[1].prototypes.device.type == "meta"


def test_no_step_copies_from_the_device_or_branches_on_a_value():
    with FakeTensorMode():
        # A fake tensor has no values: whatever asked for one would raise.
        features, labels = torch.randn(8, 16, requires_grad=True), torch.zeros(8, dtype=torch.int64)
        memory = PrototypeMemory(torch.randn(5, 16))
        memory(features, labels).backward()
        memory.update(features, labels)
        memory.rebuild(features.detach(), labels)


def test_it_compiles_without_a_break():
    features, labels = batch_of(16, 10, 32)
    plain, compiled = PrototypeMemory(rows(10, 32, 2)), PrototypeMemory(rows(10, 32, 2))

    def step(memory):
        loss = memory(features, labels)
        memory.update(features, labels)
        return loss

    graph = torch.compile(step, fullgraph=True, backend="eager")
    for _ in range(2):
        assert torch.equal(graph(compiled), step(plain))
    assert torch.equal(plain.prototypes, compiled.prototypes)


def test_a_feature_without_direction_is_unlike_all_alike():
    memory = PrototypeMemory(torch.eye(3))
    features = torch.zeros(2, 3, requires_grad=True)
    loss = memory(features, torch.tensor([0, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(3)) and features.grad.isfinite().all()
    memory.update(features, torch.tensor([0, 1]))
    assert torch.equal(memory.prototypes, torch.eye(3))


@pytest.mark.parametrize(
    "prototypes, options, words",
    [
        (torch.zeros(3), {}, r"\(identities, width\), got \(3,\)"),
        (torch.zeros(2, 3), {"temperature": 0}, "temperature must be above 0, got 0"),
        (torch.zeros(2, 3), {"temperature": float("nan")}, "temperature must be above 0, got nan"),
        (torch.zeros(2, 3), {"momentum": 1.5}, "momentum must be between 0 and 1, got 1.5"),
    ],
)
def test_impossible_settings_are_refused(prototypes, options, words):
    with pytest.raises(ValueError, match=words):
        PrototypeMemory(prototypes, **options)


def test_momentum_bounds():
    features, labels = batch_of(6, 3, 5)
    kept, replaced = PrototypeMemory(rows(3, 5, 2), momentum=1), PrototypeMemory(rows(3, 5, 2), momentum=0)
    before = kept.prototypes.clone()
    kept.update(features, labels)
    replaced.update(features, labels)
    torch.testing.assert_close(kept.prototypes, before)
    assert_close(replaced.prototypes, updated(features, labels, rows(3, 5, 2), 0.0))


def test_means_of_directions_and_rebuilding():
    features, labels = batch_of(40, 7, 16)
    features[0] *= 1000
    labels[labels == 4] = 3
    want = []
    for label in range(7):
        its = [
            unit(row) for row, owner in zip(features.double().tolist(), labels.tolist(), strict=True) if owner == label
        ]
        mean = [sum(column) / len(its) for column in zip(*its, strict=True)] if its else [0.0] * 16
        want.append(unit(mean) if its else mean)
    got = class_means(features, labels, 7)
    assert got.dtype == torch.float32 and not got[4].any()
    assert_close(got, want)
    assert torch.equal(class_means(features.half(), labels, 7), class_means(features.half().float(), labels, 7))
    memory = PrototypeMemory(rows(7, 16, 0))
    address = memory.prototypes.data_ptr()
    memory.rebuild(features, labels)
    assert torch.equal(memory.prototypes, got) and memory.prototypes.data_ptr() == address


# Losses of the fine-tuning methods


def grouped(ids, images, width=7, seed=0):
    """P x K features, some of them alike, and their labels in mixed order."""
    features = rows(ids * images, width, seed)
    labels = torch.arange(ids * images) % ids
    return features + rows(ids, width, seed + 1)[labels], labels


def far(one, other):
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(one, other, strict=True)))


def softplus(value):
    return max(value, 0) + math.log1p(math.exp(-abs(value)))


def triplet_by_hand(features, labels, margin):
    features, total = features.double().tolist(), 0.0
    for anchor, label in zip(features, labels.tolist(), strict=True):
        pairs = list(zip(features, labels.tolist(), strict=True))
        farthest = max(far(anchor, other) for other, its in pairs if its == label)
        nearest = min(far(anchor, other) for other, its in pairs if its != label)
        gap = farthest - nearest
        total += softplus(gap) if margin is None else max(0.0, gap + margin)
    return total / len(features)


def weighted_by_hand(features, labels):
    features, labels, total = features.double().tolist(), labels.tolist(), 0.0
    for number, anchor in enumerate(features):
        sums = []
        for own, sign in ((True, 1), (False, -1)):
            pairs = [
                far(anchor, other)
                for place, other in enumerate(features)
                if place != number and (labels[place] == labels[number]) == own
            ]
            weights = [math.exp(sign * distance) for distance in pairs]
            sums.append(sum(w * d for w, d in zip(weights, pairs, strict=True)) / sum(weights))
        total += softplus(sums[0] - sums[1])
    return total / len(features)


def circle_by_hand(cosines, labels, scale, margin):
    total = 0.0
    for row, label in zip(cosines.double().tolist(), labels.tolist(), strict=True):
        own = scale * max(0.0, 1 + margin - row[label]) * (row[label] - (1 - margin))
        others = [
            math.exp(scale * max(0.0, s + margin) * (s - margin)) for place, s in enumerate(row) if place != label
        ]
        # Circle loss as in its paper: log(1 + sum exp(other) exp(-own)).
        total += math.log1p(sum(others) * math.exp(-own))
    return total / len(cosines)


def numeric_gradient(function, features, step=1e-5):
    features = features.double()
    gradient = torch.zeros_like(features)
    for place in range(features.numel()):
        shift = torch.zeros_like(features).view(-1)
        shift[place] = step
        shift = shift.view_as(features)
        gradient.view(-1)[place] = (function(features + shift) - function(features - shift)) / (2 * step)
    return gradient


@pytest.mark.parametrize("margin", [None, 0.3, 1.2])
@pytest.mark.parametrize("ids, images", [(2, 2), (3, 4), (5, 3)])
def test_hard_triplet_against_loops(ids, images, margin):
    features, labels = grouped(ids, images)
    mine = features.clone().requires_grad_()
    loss = hard_triplet(mine, labels, margin)
    loss.backward()
    assert_close(loss, triplet_by_hand(features, labels, margin))
    assert_close(mine.grad, numeric_gradient(lambda x: triplet_by_hand(x, labels, margin), features), 1e-4)


@pytest.mark.parametrize("ids, images", [(2, 2), (3, 4), (5, 3)])
def test_weighted_triplet_against_loops(ids, images):
    features, labels = grouped(ids, images)
    mine = features.clone().requires_grad_()
    loss = weighted_triplet(mine, labels)
    loss.backward()
    assert_close(loss, weighted_by_hand(features, labels))
    assert_close(mine.grad, numeric_gradient(lambda x: weighted_by_hand(x, labels), features), 1e-4)


@pytest.mark.parametrize("scale, margin", [(64.0, 0.35), (8.0, 0.25)])
def test_circle_loss_against_its_paper(scale, margin):
    features, labels = grouped(4, 3, width=5)
    cosines = (F.normalize(features, dim=1) @ F.normalize(rows(6, 5, 9), dim=1).t()).requires_grad_()
    loss = F.cross_entropy(circle_logits(cosines, labels, scale, margin), labels)
    loss.backward()
    assert_close(loss, circle_by_hand(cosines.detach(), labels, scale, margin))
    # The gradient of the paper: the weights count as constants.
    shares = circle_logits(cosines.detach(), labels, scale, margin).softmax(1) - F.one_hot(labels, 6)
    mine = F.one_hot(labels, 6).bool()
    fixed = cosines.detach()
    weights = torch.where(mine, (1 + margin - fixed).clamp(min=0), (fixed + margin).clamp(min=0))
    assert_close(cosines.grad, scale * weights * shares / len(labels))


def test_triplets_of_equal_features_and_lone_identities_stay_finite():
    for loss in (hard_triplet, weighted_triplet):
        features = torch.ones(6, 4, requires_grad=True)
        value = loss(features, torch.tensor([0, 0, 1, 1, 2, 2]))
        value.backward()
        assert_close(value, math.log(2))
        assert features.grad.isfinite().all()
        for labels in (torch.zeros(6, dtype=torch.int64), torch.arange(6)):
            features = rows(6, 4, 0).requires_grad_()
            value = loss(features, labels)
            value.backward()
            assert value.isfinite() and features.grad.isfinite().all()


def test_triplets_compute_in_float32_under_autocast():
    features, labels = grouped(3, 4)
    for loss in (hard_triplet, weighted_triplet):
        plain = loss(features, labels)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(loss(features, labels), plain)


def test_near_features_keep_their_distance():
    one = torch.full((1, 64), 3.0)
    pair = torch.cat([one, one + 1e-3])
    assert_close(distances(pair)[0, 1], 1e-3 * 8, 1e-3)


def test_centres_follow_as_by_gradient_descent():
    features, labels = grouped(4, 3)
    torch.manual_seed(0)
    loss = CentreLoss(6, features.shape[1])
    centres = loss.centres.double().clone().requires_grad_()
    descent = torch.optim.SGD([centres], lr=0.5)
    for step in range(3):
        mine = (features + step).requires_grad_()
        value = loss(mine, labels)
        value.backward()
        loss.update(mine, labels)
        wanted = 0
        for feature, label in zip(mine.detach().double(), labels.tolist(), strict=True):
            wanted = wanted + (feature - centres[label]).square().sum() / len(labels)
        assert_close(value, wanted.detach())
        assert_close(mine.grad, 2 * (mine.detach().double() - centres.detach()[labels]) / len(labels))
        descent.zero_grad()
        wanted.backward()
        descent.step()
        assert_close(loss.centres, centres.detach())
    assert not list(loss.parameters()) and list(loss.state_dict()) == ["centres"]


@pytest.mark.parametrize("momentum", [0.0, 0.2, 1.0])
def test_rows_of_a_memory_move_one_image_after_the_other(momentum):
    memory, images = F.normalize(rows(5, 6, 1), dim=1), F.normalize(rows(7, 6, 2), dim=1)
    places = [3, 0, 3, 3, 1, 0, 4]
    wanted = memory.double().tolist()
    for place, image in zip(places, images.double().tolist(), strict=True):
        moved = [momentum * old + (1 - momentum) * new for old, new in zip(wanted[place], image, strict=True)]
        wanted[place] = unit(moved)
    move_in_turn(memory, torch.tensor(places), images, momentum)
    torch.testing.assert_close(memory.double(), torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("margin", [None, 0.3])
def test_triplets_with_a_memory_keep_little_for_the_gradient(margin):
    """The gradient is that of all distances, and what it needs does not grow with the memory."""
    features, labels = rows(6, 16, 0), torch.tensor([0, 0, 1, 1, 2, 9])
    others, other_labels = rows(4000, 16, 1), torch.arange(4000) % 7 - 1
    mine, plain = features.clone().requires_grad_(), features.clone().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one.numel()) or one, lambda one: one):
        loss = hard_triplet(mine, labels, margin, others, other_labels)
    loss.backward()
    apart = torch.cdist(plain, others, compute_mode="donot_use_mm_for_euclid_dist")
    same = labels[:, None] == other_labels
    farthest = apart.masked_fill(~same, -torch.inf).amax(1)
    nearest = apart.masked_fill(same | (other_labels < 0), torch.inf).amin(1)
    wanted = F.softplus(farthest - nearest) if margin is None else F.relu(farthest - nearest + margin)
    wanted.mean().backward()
    # The last image has nobody of its identity in the memory.
    assert farthest[-1] == -torch.inf and torch.equal(loss, wanted.mean()) and torch.equal(mine.grad, plain.grad)
    assert max(kept) <= 2 * features.numel()

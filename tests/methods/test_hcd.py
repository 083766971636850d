"""HCD: graphs, scores, peaks, labels that move, draws and the loss, beside the same ones written out in float64."""

import random

import numpy as np
import pytest
import torch

from adapt_reid import of, parse_args
from methods.hcd import HCD, Labels
from tests.methods.reference import close, unit
from utils.batches.pseudo_batches import LeastDrawn, PseudoBatches
from utils.modeling.reid_model import ReIDModel
from utils.training.propagation import Joined, graph_of, mutual, parts_of, propagated, scores_of_first

ARGUMENTS = ["--setting", "adaptation", "--source", "x", "--target", "y", "--method", "hcd"]


def written_graph(rows, nearest, allowed=None, itself=True):
    """S by its definition: D has a node's own weight or not."""
    n = len(rows)
    cosines = rows @ rows.T
    near = [set(np.argsort(-cosines[i], kind="stable")[:nearest].tolist()) for i in range(n)]
    w = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            if j in near[i] and i in near[j] and (allowed is None or allowed[i, j]):
                w[i, j] = np.exp(-(2 - 2 * cosines[i, j]))
    d = w.sum(1) if itself else w.sum(1) - w.diagonal()
    s = np.array([[w[i, j] / np.sqrt(d[i] * d[j]) if i != j and w[i, j] else 0 for j in range(n)] for i in range(n)])
    return s


def scores_to(rows, nearest, alpha, allowed):
    y = np.eye(len(rows))
    y[0, 0] = 0
    return (np.linalg.inv(np.eye(len(rows)) - alpha * written_graph(rows, nearest, allowed)) @ y)[0]


def parts_by_peaks(rows, nearest, low, high, most, alpha):
    n = len(rows)
    cosines = rows @ rows.T
    density = cosines.sum(1)
    order = sorted(range(n), key=lambda i: -density[i])
    reach = {i: max(cosines[i, j] for j in order[:place]) for place, i in enumerate(order) if place}
    others = sorted((i for i in reach if low < reach[i] < high), key=lambda i: -reach[i])
    peaks = [order[0], *others[: most - 1]]
    if len(peaks) < 2:
        return [0] * n
    y = np.zeros((n, len(peaks)))
    for number, peak in enumerate(peaks):
        y[peak, number] = 1
    return (np.linalg.inv(np.eye(n) - alpha * written_graph(rows, nearest, itself=False)) @ y).argmax(1).tolist()


def people(count, images, width, spread, seed=0):
    centres = unit(count, width, seed=seed)
    rows = centres.repeat_interleave(images, 0) + spread * unit(count * images, width, seed=seed + 1)
    return rows / rows.norm(dim=1, keepdim=True)


def test_graphs_and_scores_by_formulas():
    rows = people(4, 6, 8, 0.9)
    cosines = rows @ rows.t()
    allowed = cosines > 0.3
    kept = mutual(cosines, 7)
    close("HCD graph", graph_of(cosines, kept & allowed), written_graph(rows.numpy(), 7, allowed.numpy()))
    own = graph_of(cosines, kept, itself=False)
    close("HCD graph of a split", own, written_graph(rows.numpy(), 7, itself=False))
    found = scores_of_first(graph_of(cosines.float(), kept & allowed), 0.9)
    close("HCD scores", found, scores_to(rows.numpy(), 7, 0.9, allowed.numpy()))
    assert found[0] == 0 and (found > 0.05).sum() > 3
    several = torch.stack([cosines, cosines.flip(0, 1)])
    close("HCD scores of several", scores_of_first(graph_of(several, mutual(several, 7)), 0.9)[0],
          scores_to(rows.numpy(), 7, 0.9, None))  # fmt: skip
    seeds = unit(24, 3)
    inverse = np.linalg.inv(np.eye(24) - 0.9 * written_graph(rows.numpy(), 7)) @ seeds.numpy()
    close("HCD propagation", propagated(graph_of(cosines, kept), 0.9, seeds), inverse)


@pytest.mark.parametrize("spread, most", [(0.6, 8), (1.4, 8), (1.4, 3)])
def test_parts_by_formulas(spread, most):
    rows = people(4, 6, 8, spread) + 0.5 * unit(1, 8, seed=7)
    rows = rows / rows.norm(dim=1, keepdim=True)
    wanted = parts_by_peaks(rows.numpy(), 6, 0.2, 0.8, most, 0.99)
    found = parts_of(rows, 6, (0.2, 0.8), most, 0.99).tolist()
    print("\n", found)
    assert found == wanted and 2 <= len(set(found)) <= most
    assert parts_of(rows[:6], 6, (0.9, 0.91), most, 0.99).tolist() == [0] * 6


class Written:
    """The labels of HCD after a step, written from its description over lists of sets."""

    def __init__(self, rows, num_source, clusters, parts, args):
        self.rows, self.num_source, self.args = rows, num_source, args
        self.clusters, self.parts = ([set(np.flatnonzero(np.array(side) == x).tolist()) for x in sorted(set(side))]
                                     for side in (clusters, parts))  # fmt: skip
        self.events = {}

    @staticmethod
    def of(sets, row):
        return next(some for some in sets if row in some)

    def count(self, event):
        self.events[event] = self.events.get(event, 0) + 1

    def mean(self, some):
        return self.rows[sorted(some)].mean(0)

    def divide(self, sets, some, groups):
        sets.remove(some)
        sets.extend(groups)

    def step(self, targets):
        a, rows = self.args, self.rows
        near = {
            t: sorted(range(len(rows)), key=lambda j: (j != t, -(rows[t] @ rows[j])))[: a["graph"]] for t in targets
        }
        best, moves = {}, {}
        for t in targets:
            some = rows[near[t]]
            scores = scores_to(some, a["point"], a["alpha"], some @ some.T > a["cosine"])
            rank = int(scores.argmax())
            n = best[t] = near[t][rank]
            if rank < a["point"] and scores[rank] > a["score"] and n >= self.num_source:
                self.count("image joins")
                moves[t] = n
            else:
                self.count("image stays alone")
        rounds = 1 + len(set(best.values()) & set(targets))
        self.count("image follows one that moves" if set(moves) & set(moves.values()) else "none follows another")
        for bank in ("clusters", "parts"):
            name = {row: number for number, some in enumerate(getattr(self, bank)) for row in some}
            name |= {t: len(name) + t for t in targets}
            for _ in range(rounds):
                name |= {t: name[n] for t, n in moves.items()}
            setattr(self, bank, [{row for row in name if name[row] == number} for number in set(name.values())])
        for t in targets:
            some = self.of(self.parts, t)
            if len(some) > 4:
                order = sorted(some)
                numbers = parts_by_peaks(rows[order], a["group"], *a["peaks"], a["most"], a["alpha"])
                groups = [
                    {row for row, number in zip(order, numbers, strict=True) if number == k} for k in set(numbers)
                ]
                self.divide(self.parts, some, groups)
                self.count("part splits" if len(groups) > 1 else "part stays whole")
        self.join(
            self.parts,
            targets,
            near,
            best,
            lambda t, j: self.of(self.clusters, t) is self.of(self.clusters, j),
            "part",
        )
        for t in targets:
            some = self.of(self.clusters, t)
            inside = sorted((part for part in self.parts if part <= some), key=min)
            if len(inside) > 2 and len(some) > 4:
                features = np.stack([self.mean(part) for part in inside])
                numbers = parts_by_peaks(features, a["group"], *a["peaks"], a["most"], a["alpha"])
                groups = [set().union(*(p for p, number in zip(inside, numbers, strict=True) if number == k))
                          for k in sorted(set(numbers))]  # fmt: skip
                self.divide(self.clusters, some, groups)
                self.count("cluster splits" if len(groups) > 1 else "cluster stays whole")
        self.join(self.clusters, targets, near, best, lambda t, j: j >= self.num_source, "cluster")

    def join(self, sets, targets, near, best, fits, name):
        a, edges = self.args, []
        for t in targets:
            firsts = []
            for j in near[t][1:]:
                if not any(j in self.of(sets, other) for other in firsts):
                    firsts.append(j)
            nodes = np.stack([self.rows[t], *(self.mean(self.of(sets, j)) for j in firsts)])
            # Which are tied is seen among all rows near t.
            points = self.rows[near[t]]
            tied = np.array(written_graph(points, a["group"], points @ points.T > a["cosine"]) > 0)
            places = [near[t].index(j) for j in (t, *firsts)]
            w = np.exp(-(2 - 2 * nodes @ nodes.T)) * tied[places][:, places]
            d = w.sum(1) + 1
            s = w / np.sqrt(np.outer(d, d))
            scores = np.linalg.inv(np.eye(len(nodes)) - a["alpha"] * s)[0, 1:]
            high = [
                self.of(sets, j) for j, score in zip(firsts, scores, strict=True) if score > a["score"] and fits(t, j)
            ]
            if self.of(sets, t) not in high:
                high.append(self.of(sets, t))
                self.count("one joins by others")
            if any(best[t] in some for some in high):
                edges.append([frozenset(some) for some in high])
        for edge in edges:
            touched = [some for some in sets if any(some & other for other in edge)]
            if len(touched) > 1:
                self.count(f"{name}s join")
                for some in touched:
                    sets.remove(some)
                sets.append(set().union(*touched))


def partition(labels):
    return sorted(tuple(np.flatnonzero(labels.numpy() == label).tolist()) for label in labels.unique().tolist())


def module(folder, *more, num_source=3, images=40):
    torch.manual_seed(0)
    args = parse_args([*ARGUMENTS, "--memory_temperature", "0.1", "--memory_momentum", "0.3", "--graph_rows", "20",
                       "--point_neighbours", "6", "--part_neighbours", "5", "--spread", "0.95", "--most_peaks", "4",
                       "--least_similarity", "0.3", "--least_score", "0.3", "--peak_similarity", "0.2", "0.8",
                       *map(str, more)])  # fmt: skip
    encoder = ReIDModel.for_training(folder / "clip", num_ids=0, image_size=(64, 32))
    return HCD(encoder, args, num_source, torch.zeros(images), source_size=9).train()


@torch.no_grad()
def test_labels_move_by_formulas(standins):
    """Several steps from scattered labels: both banks are, as partitions, those of the description."""
    events = {}
    for seed in range(6):
        model = module(standins, "--memory_momentum", "1")
        width = model.encoder.num_features
        targets = people(8, 5, width, 0.4 + 0.25 * seed, seed=seed)
        # The source has rows among the target's.
        rows = torch.cat([targets[[1, 12, 30]] + 0.1 * unit(3, width, seed=50), targets])
        rows = rows / rows.norm(dim=1, keepdim=True)
        model.memory.prototypes.copy_(rows)
        rng = np.random.default_rng(seed)
        clusters = np.concatenate(
            [np.arange(3), 3 + (np.repeat(np.arange(8), 5) // 2 if seed % 2 else rng.integers(0, 9, 40))]
        )
        parts = np.unique(clusters * 3 + rng.integers(0, 3, 43), return_inverse=True)[1]
        model.memory.labels.copy_(torch.from_numpy(clusters))
        model.parts.copy_(torch.from_numpy(parts))
        model.epoch.fill_(2)
        setting = {"graph": 20, "point": 6, "group": 5, "most": 4}
        setting |= {"alpha": 0.95, "cosine": 0.3, "score": 0.3, "peaks": (0.2, 0.8)}
        written = Written(model.memory.prototypes.double().numpy(), 3, clusters, parts, setting)
        for step in range(6):
            targets = 3 + torch.from_numpy(rng.permutation(40)[:6])
            written.step(targets.tolist())
            clusters, parts = model.moved_labels(targets.tolist())
            assert partition(clusters) == sorted(tuple(sorted(some)) for some in written.clusters), (seed, step)
            assert partition(parts) == sorted(tuple(sorted(some)) for some in written.parts), (seed, step)
            # A part is in one cluster; the source is never touched.
            assert all(len(clusters[parts == part].unique()) == 1 for part in parts.unique())
            assert clusters[:3].tolist() == [0, 1, 2] and (clusters[3:] > 2).all()
            model.memory.labels.copy_(clusters)
            model.parts.copy_(parts)
        events = {name: events.get(name, 0) + written.events.get(name, 0) for name in {*events, *written.events}}
    print(f"\nHCD: {events}")
    several = ["image joins", "image stays alone", "part splits", "part stays whole", "parts join", "cluster splits"]
    several += ["image follows one that moves", "one joins by others"]
    assert all(events.get(name, 0) > 2 for name in (*several, "cluster stays whole", "clusters join"))


def test_labels_joined_by_way_of_others_are_one():
    joined = Joined()
    for labels in ([4, 7], [9, 5], [7, 9, 11], [2, 3]):
        joined.join(labels)
    assert {label: joined.name(label) for label in (4, 5, 7, 9, 11, 2, 3, 6)} == {
        4: 4, 5: 4, 7: 4, 9: 4, 11: 4, 2: 2, 3: 2, 6: 6,
    }  # fmt: skip
    labels = Labels(torch.tensor([0, 1, 2, 3]))
    labels.take_out(2)
    assert labels.labels.tolist() == [0, 1, 2, 3]
    labels.move([3], 1)
    labels.take_out(1)
    assert labels.labels.tolist() == [0, 3, 2, 1] and labels.counts.tolist() == [1, 1, 1, 1]


def test_loss_epochs_and_steps(standins):
    model = module(standins, "--images_per_id", "2", "--train_batch_size", "8", "--lr_milestones", "3",
                   "--lr_warmup_epochs", "0", "--num_train_epochs", "5", images=12)  # fmt: skip
    width = model.encoder.num_features
    known, features = unit(3, width, seed=1), unit(12, width)
    found = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, -1, -1, 2])

    def cluster(features=None, labels=None):
        return found if labels is None else labels

    def relabel(epoch):
        with torch.no_grad():
            labels = model.relabel(epoch, lambda: features.float(), lambda: known.float(), cluster)
        model.pseudo_labels.copy_(labels)
        return labels

    assert torch.equal(relabel(1), found)
    assert model.memory.labels.tolist() == [0, 1, 2, 3, 3, 3, 3, 4, 4, 4, 5, 5, 6, 7, 5]
    assert torch.equal(model.parts, model.memory.labels)
    images, rows = torch.randn(8, 3, 64, 32), torch.tensor([0, 0, 2, 2, 3, 5, 8, 12])
    loss, values, (bn_features, seen_rows) = model(images, rows)
    loss.backward()
    with torch.no_grad():
        memory = model.memory.prototypes.double()
        u = torch.cat([(f - f.mean(0)) / (f.var(0, correction=0) + 1e-5).sqrt()
                       for f in model.encoder.backbone(images).double().chunk(2)])  # fmt: skip
        u = u / u.norm(dim=1, keepdim=True)
        labels = model.memory.labels
        means = torch.stack([memory[labels == label].mean(0) for label in range(8)])
        odds = (u @ means.t() / 0.1).log_softmax(1)
        each = [-odds[n, int(labels[row])] for n, row in enumerate(rows)]
        close("HCD loss_source", values["loss_source"], sum(each[:4]) / 4, 1e-4)
        close("HCD loss_target", values["loss_target"], sum(each[4:]) / 4, 1e-4)
        close("HCD loss", loss, sum(each) / 4, 1e-4)
        # In the first epoch labels stay; the memory moves.
        before = labels.clone()
        model.after_step(bn_features, seen_rows)
        assert torch.equal(model.memory.labels, before) and not torch.equal(model.memory.prototypes.double(), memory)
        assert model.draws.tolist() == [1, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0]
        relabel(2)
        assert model.draws_before.tolist() == model.draws.tolist()
        model.after_step(bn_features, seen_rows)
        assert not torch.equal(model.memory.labels, before) and model.draws_before.max() == 1
        model.memory.labels.copy_(torch.tensor([0, 1, 2, 9, 9, 4, 4, 4, 12, 12, 5, 7, 8, 3, 12]))
    assert relabel(3).tolist() == [1, 1, 0, 0, 0, 2, 2, -1, -1, -1, -1, 2]
    # Three clusters of two each and four alone: 10 images in batches of 8.
    assert [model.epoch_steps(epoch, 7, 8) for epoch in (1, 3)] == [7, 2]
    assert sorted(model.labels_for_batches(model.pseudo_labels, "").bincount().tolist()) == [2, 2, 2, 3, 3]
    assert of(model, "all_steps")(model.args, 7) == 35
    rate = of(model, "rate")(model.args, 7)
    assert [rate(40, step) for step in (0, 13, 14, 34)] == pytest.approx([1, 1, 0.1, 0.1])
    model.memory.labels[3:] = 5
    with pytest.raises(ValueError, match="before epoch 4: the clusters collapsed: all 12 images.*--least_score 0.3"):
        relabel(4)


def test_draws_prefer_what_was_drawn_least():
    camids = [9] * 5 + [0, 0, 1, 1, 0, 2, 2, 2, 2]
    counts, parts = [0, 3, 2, 5, 1, 4, 0, 3, 1], [0, 0, 0, 0, 0, 1, 1, 2, 1]
    for seed in range(20):
        rng = random.Random(seed)
        draw = LeastDrawn(counts, parts, first=5)
        # 5 was never drawn; of the other camera there are two, fewer than four.
        chosen = draw(rng, [5, 6, 7, 8, 9], 4, camids)
        assert chosen[0] == 5 and len(chosen) == 4 and set(chosen[1:]) <= {7, 8}
        assert draw.counts[0] == 1 and sum(draw.counts[2:4]) == 2 + 5 + 3
        # As many as asked for: the least drawn, then any of the rest.
        draw = LeastDrawn(counts, parts, first=5)
        assert draw(rng, [5, 6, 7, 8, 9], 2, camids) == [5, 7]
        # One camera: 11 was never drawn, and 13 is the least drawn of the others.
        chosen = draw(rng, [10, 11, 12, 13], 3, camids)
        assert chosen[:2] == [11, 13] and chosen[2] in (10, 12)
        # All were drawn as often: of two other parts.
        draw = LeastDrawn([1] * 9, [0, 0, 0, 0, 0, 1, 2, 1, 2], first=5)
        chosen = draw(rng, [10, 11, 12, 13], 3, camids)
        assert {draw.parts[row - 5] for row in chosen[1:]} == {1, 2} and len(set(chosen)) == 3
        assert draw(rng, [5, 6], 3, camids) in ([5, 6, 6], [6, 5, 5]) and draw(rng, [12], 3, camids) == [12] * 3
    sampler = PseudoBatches(4, 2, 3, camids, source_labels=[0, 0, 1, 1, 1])
    sampler.take(torch.tensor([0, 0, 1, 1, 0, 2, 2, 2, 2]), 5, LeastDrawn([0] * 9, parts, first=5))
    first, again = list(sampler), list(sampler)
    assert first == again and len(first) == 5
    target = [row for batch in first for row, _ in batch if row > 4]
    assert max(map(target.count, set(target))) - min(map(target.count, set(target))) <= 3


def test_recipe():
    args = parse_args(["--recipe", "hcd-msmt17"])
    assert (args.source, args.steps_per_epoch, args.cluster_k1, args.min_samples) == (["market1501"], 800, 20, 3)
    assert (args.pooling, args.memory_momentum, args.probability_floor, args.eps) == ("gem", 0.2, 1e-6, 0.6)
    args = parse_args(["--recipe", "hcd"])
    rate = HCD.rate(args, 400)
    assert [rate(1, step) for step in (0, 7999, 8000, 16000)] == pytest.approx([1, 1, 0.1, 0.01])

"""Retrieval over several processes equals that of one, bit for bit; what is wrong on one rank is said on all."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels import cosine_topk, k_reciprocal_rerank, rank_metrics
from kernels.jaccard_graph import jaccard_graph
from kernels.ranking import rank_metrics_reference
from kernels.reranking import k_reciprocal_rerank_reference
from kernels.ring import processes, symmetric
from kernels.ring.processes import LostProcess, Ring
from kernels.ring.ranking import Pairs, ring_metrics
from kernels.tiles import cosine_reference
from tests.runs import launch
from utils.training.clustering import cluster


def a_set(seed):
    """Queries and gallery of any size, with equal rows, tied similarities and identities that match nothing."""
    draw = torch.Generator().manual_seed(seed)
    sizes = ((1, 150), (5, 700), (4, 70), (2, 30))
    num_queries, num_gallery, width, num_ids = (int(torch.randint(*size, (1,), generator=draw)) for size in sizes)
    centres = torch.randn(num_ids, width, generator=draw)
    pids = [
        torch.randint(low, num_ids, (count,), generator=draw) for low, count in ((0, num_queries), (-1, num_gallery))
    ]
    sides = [centres[ids] + torch.randn(len(ids), width, generator=draw) for ids in pids]
    for _ in range(num_gallery // 4):
        one, other = torch.randint(num_gallery, (2,), generator=draw)
        sides[1][one] = sides[1][other]
    if seed % 2:
        # Whole numbers: many similarities are equal.
        sides = [side.round() for side in sides]
        for side in sides:
            side[side.norm(dim=1) == 0] = 1
    if seed % 3 == 2:
        sides = [side.double() for side in sides]
    cams = [torch.randint(3, (len(ids),), generator=draw) for ids in pids]
    return *sides, *pids, *cams


def share(count, size, rank, seed):
    """An uneven share of the rows; some ranks have none."""
    draw = torch.Generator().manual_seed(seed)
    ends = [0, *torch.randint(0, count + 1, (size - 1,), generator=draw).sort().values.tolist(), count]
    return slice(ends[rank], ends[rank + 1])


def same(one, other):
    values = ("cmc", "ap", "inp", "first_match")
    numbers = (one.mAP, one.mINP, one.num_valid, one.num_skipped)
    return numbers == (other.mAP, other.mINP, other.num_valid, other.num_skipped) and all(
        torch.equal(getattr(one, name).nan_to_num(-1), getattr(other, name).nan_to_num(-1)) for name in values
    )


@pytest.fixture
def alone():
    """A group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()
    processes.PLACES.clear()


def test_features_that_a_group_cannot_send_are_refused(alone, monkeypatch):
    monkeypatch.setattr(dist, "get_backend", lambda group: "nccl")
    with pytest.raises(ValueError, match="process 0: a group of NCCL sends features of a GPU, and these lie on cpu"):
        Ring(alone, torch.eye(3), torch.eye(3))


def test_a_full_card_is_no_lost_process():
    with pytest.raises(torch.OutOfMemoryError, match="full"), processes.Processes(None, None).watched():
        raise torch.OutOfMemoryError("full")


def test_triton_is_taken_where_all_ranks_can(monkeypatch):
    asked = []
    monkeypatch.setattr(processes, "choose_backend", lambda *given: asked.append(given) or "triton")
    ring = Ring(None, torch.eye(3), torch.eye(3).double())
    for obstacle, wanted in ((None, "triton"), ("an older card", "torch")):
        monkeypatch.setattr(processes, "triton_obstacle", lambda device, dtype, obstacle=obstacle: obstacle)
        assert ring.backend_for("auto", ring.queries, "cosine_topk", 2) == wanted
    # The gallery's type counts too.
    assert asked[0][-1] is ring.gallery


def test_scores_that_never_settle_end(monkeypatch):
    """On some cards the same product may round differently in every pass."""
    queries, gallery, query_pids, gallery_pids, query_cams, gallery_cams = a_set(4)
    labels = query_pids, gallery_pids, query_cams, gallery_cams
    wanted, passes = rank_metrics(queries, gallery, *labels), []
    begin, count = Pairs.begin, Pairs.count

    def moves(self, *given):
        count(self, *given)
        self.moved = True

    monkeypatch.setattr(Pairs, "begin", lambda self: passes.append(self) or begin(self))
    monkeypatch.setattr(Pairs, "count", moves)
    options = {"max_rank": 50, "protocol": "market", "backend": "auto", "seed": 0, "group": None}
    assert same(ring_metrics(queries, gallery, *labels, **options), wanted) and len(passes) == 3


def outcome(call, *given, **options):
    """The metrics, or the words of a refusal."""
    try:
        return call(*given, **options)
    except ValueError as error:
        return str(error)


def agree(one, other):
    return one == other if isinstance(other, str) else same(one, other)


def compare(rank, size, seed):
    queries, gallery, *labels = a_set(seed)
    mine, shard = share(len(queries), size, rank, seed), share(len(gallery), size, rank, seed + 99)
    k, world = min(1 + 7 * seed, len(gallery)), dist.group.WORLD
    wanted, found = cosine_topk(queries, gallery, k), cosine_topk(queries[mine], gallery[shard], k, group=world)
    assert torch.equal(found.scores, wanted.scores[mine]) and torch.equal(found.indices, wanted.indices[mine])
    own = [ids[part] for ids, part in zip(labels, (mine, shard, mine, shard), strict=True)]
    for protocol in ("market", "all", "cuhk03"):
        wanted = outcome(rank_metrics, queries, gallery, *labels, protocol=protocol, seed=seed)
        found = outcome(rank_metrics, queries[mine], gallery[shard], *own, protocol=protocol, seed=seed, group=world)
        assert agree(found, wanted)

    # Small sets do not take the way that computes each product once.
    symmetric.SYMMETRIC_MIN_ROWS = 4096 * (seed % 4 == 3)
    draw = torch.Generator().manual_seed(seed)
    k1, k2 = (int(torch.randint(*ends, (1,), generator=draw)) for ends in ((0, 40), (0, 12)))
    options = {"k1": k1, "k2": k2, "lambda_value": (0.3, 0.0, 1.0)[seed % 3]}
    options["compat"] = "torchreid" if seed % 5 == 4 else None
    wanted = k_reciprocal_rerank(queries, gallery, **options)
    found = k_reciprocal_rerank(queries[mine], gallery[shard], **options, group=world)
    assert torch.equal(found.dense(), wanted.dense()[mine])
    first, nearest = wanted.topk(k), found.topk(k)
    assert torch.equal(nearest.scores, first.scores[mine]) and torch.equal(nearest.indices, first.indices[mine])
    for protocol in ("market", "cuhk03"):
        names = {"protocol": protocol, "seed": seed}
        assert agree(outcome(found.metrics, *own, **names), outcome(wanted.metrics, *labels, **names))

    options = {"k1": k1, "k2": k2, "max_distance": 0.7, "nearest": 1 + seed % 5}
    options["compat"] = "faiss" if seed % 2 else None
    if options["nearest"] <= len(gallery):
        wanted = jaccard_graph(gallery, **options)
        found = jaccard_graph(gallery[shard], **options, group=world)
        rows = wanted.near.take(torch.arange(len(gallery))[shard])
        assert torch.equal(found.reach, wanted.reach[shard])
        assert all(torch.equal(getattr(found.near, name), getattr(rows, name)) for name in vars(rows))
    if len(gallery) > 8:
        options = {"eps": 0.6, "min_samples": 3, "k1": 8, "k2": 4}
        wanted, found = cluster(gallery, **options), cluster(gallery, **options, group=world)
        assert torch.equal(found.labels, wanted.labels) and torch.equal(found.reach, wanted.reach)
    return gallery.dtype


def against_the_definition(rank, size, examples):
    """Drawn sets against the dense float64 definitions; all ranks draw the same ones, and fail together."""

    @settings(max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=HealthCheck)
    @given(st.data())
    def check(data):
        counts = [data.draw(st.integers(1, most)) for most in (25, 60)]
        width, num_ids = data.draw(st.integers(2, 12)), data.draw(st.integers(1, 12))
        draw = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))
        sides = [torch.randn(count, width, generator=draw, dtype=torch.float64) for count in counts]
        if data.draw(st.booleans()):
            sides[1] = sides[1][torch.randint(counts[1], (counts[1],), generator=draw)]
        labels = [torch.randint(most, (count,), generator=draw) for most in (num_ids, 3) for count in counts]
        ends = [sorted(data.draw(st.lists(st.integers(0, n), min_size=size - 1, max_size=size - 1))) for n in counts]
        parts = [slice(([0] + cut)[rank], (cut + [n])[rank]) for cut, n in zip(ends, counts, strict=True)]
        own = [side[part] for side, part in zip(sides, parts, strict=True)]
        own_labels = [ids[part] for ids, part in zip(labels, parts * 2, strict=True)]
        k, k1, k2 = (data.draw(st.integers(low, high)) for low, high in ((1, counts[1]), (0, 20), (0, 8)))
        world, right = dist.group.WORLD, []

        cosines = cosine_reference(*sides)
        scores, indices = cosine_topk(*own, k, group=world)
        want = cosines[parts[0]].sort(dim=1, descending=True, stable=True)
        right.append(torch.equal(indices, want.indices[:, :k]))
        right.append(bool((scores - want.values[:, :k]).abs().max() < 1e-12) if len(scores) else True)
        ranks = rank_metrics_reference(cosines, *labels, "market")
        found = outcome(rank_metrics, *own, *own_labels, group=world)
        firsts = [int(of[0]) if len(of) else -1 for of in ranks]
        if isinstance(found, str):
            right.append(max(firsts) == -1)
        else:
            places = [torch.arange(1, len(of) + 1) / of.double() for of in ranks]
            aps = torch.tensor([float(of.mean()) if len(of) else 0 for of in places], dtype=torch.float64)
            right.append(found.first_match.tolist() == firsts)
            right.append(bool((found.ap.nan_to_num() - aps).abs().max() < 1e-12))
        final = k_reciprocal_rerank(*own, k1=k1, k2=k2, group=world).dense()
        want = k_reciprocal_rerank_reference(*sides, k1, k2)[parts[0]]
        right.append(bool((final - want).abs().max() < 2e-6) if len(final) else True)
        everywhere = [None] * size
        dist.all_gather_object(everywhere, right)
        assert all(map(all, everywhere)), everywhere

    check()


def refusals(rank, size):
    world, sound = dist.group.WORLD, torch.randn(6, 4, generator=torch.Generator().manual_seed(rank))
    damaged, wide, half = sound.clone(), sound, sound
    if rank == 1:
        damaged[3], wide, half = torch.nan, torch.randn(6, 5), sound.half()
    for features, message in (
        (damaged, "process 1: 1 of 6 rows of gallery are NaN or infinite: rows 3"),
        (wide, "the features of process 1 are 5 wide and torch.float32, those of process 0 4 wide and torch.float32"),
        (half, "the features of process 1 are 4 wide and torch.float16, those of process 0 4 wide and torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            cosine_topk(features, features, 3, group=world)
    message = rf"k must be between 1 and {6 * size} \(the number of gallery rows of all ranks\), got {6 * size + 1}"
    with pytest.raises(ValueError, match=message):
        cosine_topk(sound, sound, 6 * size + 1, group=world)
    with pytest.raises(ValueError, match="gallery of all ranks together is empty"):
        cosine_topk(sound, sound[:0], 1, group=world)
    ids = torch.arange(6)
    with pytest.raises(ValueError, match="process 1: k1 must be at least 0, got -1"):
        k_reciprocal_rerank(sound, sound, k1=-rank, group=world)
    with pytest.raises(ValueError, match="process 1: 1 of 6 rows of gallery are NaN or infinite: rows 3"):
        k_reciprocal_rerank(sound, damaged, group=world)
    with pytest.raises(ValueError, match="process 0: backend='triton' cannot run under a group"):
        jaccard_graph(sound, backend="triton", group=world)
    with pytest.raises(ValueError, match=rf"nearest must be between 1 and {6 * size} \(the number of rows of all"):
        jaccard_graph(sound, nearest=6 * size + 1, group=world)
    with pytest.raises(ValueError, match="some processes have cameras and others have none"):
        cams = ids if rank else None
        rank_metrics(sound, sound, ids, ids, cams, cams, protocol="all", group=world)


def work(seeds):
    rank, size = connect()
    kinds = {compare(rank, size, seed) for seed in range(seeds)}
    assert kinds == {torch.float32, torch.float64}
    against_the_definition(rank, size, 3 * seeds)
    refusals(rank, size)
    dist.destroy_process_group()


def connect():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def test_two_processes_equal_one():
    launch(work, 3, processes=2)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
def test_any_number_of_processes_equals_one(size):
    launch(work, 60, processes=size, timeout=3000)


def several_tiles():
    """Shards of several tiles, a part of them empty."""
    rank, size = connect()
    draw = torch.Generator().manual_seed(5)
    centres = torch.randn(400, 12, generator=draw)
    sides = [centres[torch.randint(400, (n,), generator=draw)] for n in (700, 7300)]
    sides = [side + 0.5 * torch.randn(side.shape, generator=draw) for side in sides]
    sides[1][4000:7000] = sides[1][:3000]
    symmetric.SYMMETRIC_MIN_ROWS = 4096
    for seed in (0, 3):
        parts = share(700, size, rank, seed), share(7300, size, rank, seed + 1)
        own = [side[part] for side, part in zip(sides, parts, strict=True)]
        found = k_reciprocal_rerank(*own, group=dist.group.WORLD).topk(50)
        wanted = k_reciprocal_rerank(*sides).topk(50)
        assert torch.equal(found.scores, wanted.scores[parts[0]]), (rank, seed)
        assert torch.equal(found.indices, wanted.indices[parts[0]])
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_shards_of_several_tiles(size):
    launch(several_tiles, processes=size)


PHASES = {
    "neighbours": lambda *sides, **group: cosine_topk(*sides, 3, **group),
    "metrics": lambda *sides, **group: rank_metrics(*sides, *[torch.arange(64) % 8] * 4, protocol="all", **group),
    "re-ranking": lambda *sides, **group: k_reciprocal_rerank(*sides, k1=5, **group).topk(3),
    "clustering": lambda side, other, **group: jaccard_graph(side, k1=5, **group),
}


def die(folder, phase):
    rank, _ = connect()
    sound = torch.randn(64, 4, generator=torch.Generator().manual_seed(rank))
    call = PHASES[phase]
    call(sound, sound, group=dist.group.WORLD)
    if rank == 2:
        # In the middle of a ring: at its third exchange.
        real, sent = Ring.exchange, []

        def exchange(*given):
            sent.append(given)
            return real(*given) if len(sent) < 3 else os._exit(0)

        Ring.exchange = exchange
    began = time.monotonic()
    try:
        for _ in range(100):
            call(sound, sound, group=dist.group.WORLD)
    except LostProcess as error:
        (folder / str(rank)).write_text(f"{time.monotonic() - began} {error}")
    # Not cleanly: destroying the group would wait for the lost one.
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_a_process_that_dies_ends_the_others_within_a_minute(phase, tmp_path):
    launch(die, tmp_path, phase, processes=4)
    for rank in (0, 1, 3):
        seconds, words = (tmp_path / str(rank)).read_text().split(" ", 1)
        assert float(seconds) < 60 and words.startswith("process 2 of the group is gone")

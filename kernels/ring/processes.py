"""The processes of a ring: each has some rows of queries and gallery, and sees the others' gallery rows in turn.

Rank r holds the gallery rows between those of the ranks before and after it; a gallery row's index is its place in the
order of the ranks. In step s of P a rank works on the shard of rank r - s while the next one is on its way, so that no
rank ever holds more than three shards.

What is guaranteed, for all types of features: neighbours and ranks follow from the similarities by comparing and
counting only, and the similarity of two rows is summed in the same order in every shard (`tiles.padded`). On the CPU,
P processes give the same bits as one.
"""

import os
import socket
import time
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist

from kernels.disk.rows import BLOCK_ROWS, RowsOnDisk
from kernels.dispatch import FLOAT_DTYPES, check_features, choose_backend, requested, triton_obstacle
from kernels.tiles import padded, similarity_strips, unit_rows

LOST = "diffreid/lost-process"
# Tenths of a second in which a process that is gone is looked for.
ATTEMPTS = 100
# Group: machine and number of each rank's process.
PLACES = {}


class LostProcess(RuntimeError):
    """A process of the group ended or failed; `rank` is its number."""

    def __init__(self, rank, reason):
        super().__init__(f"process {rank} of the group is gone: {reason}")
        self.rank = rank


class Processes:
    """The processes of a group, as this one sees them; without a group, this process alone."""

    def __init__(self, group, device):
        self.group, self.device = group, device
        if group is None:
            self.rank, self.size = 0, 1
            return
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.places = PLACES.setdefault(group.group_name, [])
        if len(self.places) != self.size:
            places = [None] * self.size
            dist.all_gather_object(places, (socket.gethostname(), os.getpid()), group=group)
            self.places[:] = places

    def finish(self, sending):
        with self.watched():
            for work in sending:
                work.wait()

    def gather(self, tensor):
        """The tensors of all ranks, of one shape, stacked in their order; on the CPU."""
        return torch.stack(self.gathered(tensor)).cpu()

    def gathered(self, tensor):
        """The tensors of all ranks, of one shape, in their order; where the group sends them."""
        if self.size == 1:
            return [tensor]
        device = self.device if dist.get_backend(self.group) == "nccl" else torch.device("cpu")
        tensor = tensor.to(device).contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        with self.watched():
            dist.all_gather(parts, tensor, group=self.group)
        return parts

    def gather_rows(self, tensor, counts):
        """One tensor of the rows of all ranks, in their order; `counts` are the numbers of rows."""
        padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
        padded[: tensor.shape[0]] = tensor
        parts = zip(self.gathered(padded), counts, strict=True)
        return torch.cat([part[:count].to(tensor.device) for part, count in parts])

    def any(self, value):
        """Whether the value is true on any rank."""
        return bool(self.gather(torch.tensor(int(value))).any())

    def agree(self, function):
        """The result of a check on this rank; a ValueError on any rank is raised on all, with its reason."""
        if self.group is None:
            return function()
        reason, result = "", None
        try:
            result = function()
        except ValueError as error:
            reason = str(error)
        reasons = [None] * self.size
        with self.watched():
            dist.all_gather_object(reasons, reason, group=self.group)
        bad = [rank for rank, text in enumerate(reasons) if text]
        if bad:
            raise ValueError(f"process {bad[0]}: {reasons[bad[0]]}")
        return result

    def gather_all(self, tensor):
        """`gather_rows` where the other ranks' numbers of rows are not known."""
        return self.gather_rows(tensor, self.gather(torch.tensor([len(tensor)])).flatten().tolist())

    def global_rank(self, rank):
        return dist.get_global_rank(self.group, rank)

    @contextmanager
    def watched(self):
        """The error of a broken connection names the process that is gone."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # Libraries begin with the place in their own source.
            reason = str(error).splitlines()[0].rpartition("] ")[2] if "[/" in str(error) else str(error)
            raise LostProcess(self.lost(), reason.splitlines()[0].partition(". ")[0][:200]) from error

    def lost(self):
        """The rank that ended first: seen on its machine, and told to the others through the store."""
        host, store = socket.gethostname(), None
        with suppress(Exception):
            # The store ends with rank 0.
            store = dist.distributed_c10d._get_default_store()
        for _ in range(ATTEMPTS):
            with suppress(Exception):
                if store.check([LOST]):
                    return int(store.get(LOST))
            gone = [rank for rank, (place, pid) in enumerate(self.places) if place == host and is_gone(pid)]
            if gone:
                with suppress(Exception):
                    store.set(LOST, str(gone[0]))
                return gone[0]
            time.sleep(0.1)
        return "unknown"


class Ring(Processes):
    """The ranks of a process group around one data set, of which this rank has the rows `queries` and `gallery`.

    Either may be on disk (`kernels.disk.rows`). Then shards come in blocks, and so do unit rows of the queries.
    """

    def __init__(self, group, queries, gallery):
        # Rows on disk go to the device of the others.
        devices = [features.device for features in (queries, gallery) if isinstance(features, torch.Tensor)]
        queries, gallery = (
            features.to(devices[0]) if devices and isinstance(features, RowsOnDisk) else features
            for features in (queries, gallery)
        )
        super().__init__(group, getattr(gallery, "device", None))

        def checked():
            check_features(queries, gallery, may_be_empty=True)
            if group is not None and dist.get_backend(group) == "nccl" and self.device.type != "cuda":
                raise ValueError(f"a group of NCCL sends features of a GPU, and these lie on {self.device}: move them")

        self.agree(checked)
        self.queries, self.gallery = queries, gallery
        types = [FLOAT_DTYPES.index(features.dtype) for features in (queries, gallery)]
        on_disk = isinstance(gallery, RowsOnDisk)
        facts = self.gather(torch.tensor([on_disk, len(queries), len(gallery), gallery.shape[1], *types])).tolist()
        for rank, (_, _, _, *kind) in enumerate(facts):
            if kind != facts[0][3:]:
                first, other = (f"{width} wide and {FLOAT_DTYPES[of]}" for width, _, of in (facts[0][3:], kind))
                raise ValueError(
                    f"the features of process {rank} are {other}, those of process 0 {first}; give all ranks features "
                    "of one model"
                )
        self.query_counts, self.counts = [fact[1] for fact in facts], [fact[2] for fact in facts]
        self.offsets = [sum(self.counts[:rank]) for rank in range(self.size)]
        self.total = sum(self.counts)
        if not self.total or not sum(self.query_counts):
            words = " of all ranks together" * (group is not None)
            raise ValueError(f"{'gallery' if not self.total else 'queries'}{words} is empty")
        self.block = BLOCK_ROWS if any(fact[0] for fact in facts) else max(self.counts)
        self.dtype = torch.float64 if torch.float64 in (queries.dtype, gallery.dtype) else torch.float32

    def units(self):
        """The `Units` of this rank's queries; ValueError on all ranks for a row without length, of the gallery too."""

        def checked():
            for start in range(0, len(self.gallery), self.block):
                self.unit("gallery", self.gallery[start : start + self.block], start)
            return Units(self)

        return self.agree(checked)

    def unit(self, name, rows, start=0):
        return unit_rows((name, rows.to(self.dtype)), first=start)

    def shards(self):
        """Yield (first index, rows) of the gallery of all ranks, this rank's own first; in blocks if it is on disk."""
        for start in range(0, max(self.counts), self.block):
            for rank, (rows,) in self.rounds(self.gallery[start : start + self.block]):
                if len(rows):
                    yield self.offsets[rank] + start, rows

    def rounds(self, *tensors, steps=None):
        """Yield (rank, tensors) of every rank, this rank's own first; the numbers of rows may differ between ranks.

        `steps` ends it after so many ranks: r, r - 1, r - 2 and so on.

        What is yielded is overwritten two steps later.
        """
        tensors = [tensor.contiguous() for tensor in tensors]
        if self.size == 1:
            yield self.rank, tensors
            return
        counts = self.gather(torch.tensor([len(tensor) for tensor in tensors])).tolist()
        most = [max(numbers) for numbers in zip(*counts, strict=True)]
        buffers = [
            [tensor.new_empty(length, *tensor.shape[1:]) for tensor, length in zip(tensors, most, strict=True)]
            for _ in range(min(2, self.size - 1))
        ]
        after, before, holder = (self.rank + 1) % self.size, (self.rank - 1) % self.size, self.rank
        steps = steps or self.size
        for step in range(steps):
            coming, sending, arriving = (holder - 1) % self.size, [], None
            if step + 1 < steps:
                spaces = buffers[step % len(buffers)]
                arriving = [space[:count] for space, count in zip(spaces, counts[coming], strict=True)]
                sending = self.exchange(tensors, after, arriving, before)
            yield holder, tensors
            self.finish(sending)
            holder, tensors = coming, arriving

    def swap(self, parts):
        """What the other ranks have for this one, in their order; `parts[r]` is what this rank has for rank r."""
        counts = self.gather(torch.tensor([len(part) for part in parts])).tolist()
        arrived = [part.new_empty(counts[rank][self.rank], *part.shape[1:]) for rank, part in enumerate(parts)]
        arrived[self.rank] = parts[self.rank]
        for step in range(1, self.size):
            after, before = (self.rank + step) % self.size, (self.rank - step) % self.size
            self.finish(self.exchange([parts[after].contiguous()], after, [arrived[before]], before))
        return arrived

    def exchange(self, tensors, after, arriving, before, first_tag=0):
        """Send tensors to one rank while those of another arrive; empty ones are not sent."""
        work = []
        with self.watched():
            for tag, (rows, target) in enumerate(zip(tensors, arriving, strict=True), first_tag):
                if len(rows):
                    work.append(dist.P2POp(dist.isend, rows, self.global_rank(after), self.group, tag))
                if len(target):
                    work.append(dist.P2POp(dist.irecv, target, self.global_rank(before), self.group, tag))
            return dist.batch_isend_irecv(work) if work else []

    def backend_for(self, backend, features, operation, k=1):
        """The path that rank 0 chooses, for all ranks: it alone measures, and all must be able to take it."""
        able = triton_obstacle(features.device, self.dtype) is None

        def chosen():
            mine = backend if self.rank == 0 or requested(backend)[0] != "auto" else "torch"
            return choose_backend(mine, features, operation, k, max(self.counts), self.gallery)

        path = self.agree(chosen)
        facts = self.gather(torch.tensor([int(path == "triton"), int(able)]))
        return "triton" if facts[0, 0] and facts[:, 1].all() else "torch"


class Units:
    """Unit rows of a rank's queries: in memory as a whole, or made in blocks from those on disk."""

    def __init__(self, ring):
        self.ring, self.count, self.dtype = ring, len(ring.queries), ring.dtype
        self.in_memory = not isinstance(ring.queries, RowsOnDisk)
        self.block = max(self.count, 1) if self.in_memory else BLOCK_ROWS
        self.made = []
        for start in range(0, self.count, self.block):
            # This checks the rows, too.
            units = self.unit(start)
            if self.in_memory:
                self.made.append(units)

    def unit(self, start):
        return self.ring.unit("queries", self.ring.queries[start : start + self.block], start)

    def strips(self, rows, count, begin=0, end=None):
        """`similarity_strips` of the queries begin:end with unit rows of the gallery."""
        end = self.count if end is None else end
        for start in range(begin // self.block * self.block, end, self.block):
            units = self.made[start // self.block] if self.in_memory else self.unit(start)
            first, last = max(begin - start, 0), min(end - start, self.block)
            block = units[first : first + padded(last - first, self.dtype)]
            for place, strip in similarity_strips(block, last - first, rows, count):
                yield start + first + place, strip


def all_processes():
    """The group of all processes of this run; None for a single one."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return dist.group.WORLD if several else None


def shares_of(group, *values):
    """This process's share of the rows of each, which all processes of the `group` have; None is one process."""
    if group is None:
        return values
    number, count = dist.get_rank(group), dist.get_world_size(group)
    shares = []
    for part in values:
        begin, end = (len(part) * place // count for place in (number, number + 1))
        shares.append(part.span(begin, end) if isinstance(part, RowsOnDisk) else part[begin:end])
    return shares


def joined(group, values):
    """The rows of all processes of the `group`, of which each has its share, on every process."""
    return values if group is None else Processes(group, values.device).gather_all(values)


def is_gone(pid):
    """Whether a process of this machine has ended, also if nobody has taken note of it yet."""
    if os.name == "nt":
        # Asking there would send Ctrl-C.
        return False
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in "ZX"
    except ProcessLookupError:
        return True
    except OSError:
        return False

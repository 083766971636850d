"""Features in safetensors files, larger than memory: `cosine_topk` and `rank_metrics` take them and read blocks.

gallery = RowsOnDisk.open(["0.safetensors", "1.safetensors"], name="features")
cosine_topk(queries, gallery, 50)
"""

import torch
from safetensors import SafetensorError, safe_open

# Rows that are in memory at once: 192 MiB at 512 float32 numbers a row. A multiple of what `tiles.padded` pads to.
BLOCK_ROWS = 3 << 15


class RowsOnDisk:
    """The rows of several tensors, one after the other, which may be memory-mapped; `device` is where blocks go.

    A slice or a tensor of numbers gives these rows in memory.
    """

    def __init__(self, tensors, device="cpu"):
        self.tensors, self.device = list(tensors), torch.device(device)
        if not self.tensors:
            raise ValueError("no file of features was given")
        first = self.tensors[0]
        for number, tensor in enumerate(self.tensors):
            if tensor.ndim != 2 or tensor.shape[1] != first.shape[1] or tensor.dtype != first.dtype:
                raise ValueError(
                    f"file {number} holds {tensor.dtype} of shape {tuple(tensor.shape)}, file 0 {first.dtype} of "
                    f"shape {tuple(first.shape)}; give files with rows of one width and type"
                )
        self.dtype, self.ndim = first.dtype, 2
        self.starts = torch.tensor([0, *map(len, self.tensors)]).cumsum(0).tolist()
        self.shape = (self.starts[-1], first.shape[1])

    @classmethod
    def open(cls, paths, name="features", device="cpu"):
        """The tensors `name` of these files; ValueError for a file that is missing, damaged or cut short."""
        return cls([mapped(path, name) for path in paths], device)

    def __len__(self):
        return self.shape[0]

    def dim(self):
        return self.ndim

    def to(self, device):
        return RowsOnDisk(self.tensors, device)

    def span(self, begin, end):
        """These rows, still on disk."""
        spans = [
            tensor[max(begin - start, 0) : max(end - start, 0)]
            for start, tensor in zip(self.starts, self.tensors, strict=False)
        ]
        return RowsOnDisk(spans, self.device)

    def __getitem__(self, rows):
        if isinstance(rows, slice):
            begin, end, step = rows.indices(len(self))
            if step != 1:
                raise ValueError(f"rows on disk are read one after the other, got a step of {step}")
            parts = [
                tensor[max(begin - start, 0) : max(end - start, 0)]
                for start, tensor in zip(self.starts, self.tensors, strict=False)
                if start < end and begin < start + len(tensor)
            ]
            return (torch.cat(parts) if parts else self.tensors[0][:0]).to(self.device)
        rows = torch.as_tensor(rows, device="cpu")
        found = torch.empty(len(rows), self.shape[1], dtype=self.dtype)
        for start, tensor in zip(self.starts, self.tensors, strict=False):
            inside = (rows >= start) & (rows < start + len(tensor))
            found[inside] = tensor[rows[inside] - start]
        return found.to(self.device)


def mapped(path, name):
    """A tensor of a safetensors file, read when it is used."""
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read, it is missing, damaged or cut short: {error}") from None

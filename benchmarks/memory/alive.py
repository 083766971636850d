"""Bytes of tensors alive while code runs; with fake tensors, this needs neither memory nor a GPU."""

import weakref
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Alive(TorchDispatchMode):
    """`now` and `peak` count every tensor that an operation returned or that was added, until it is freed."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = {}

    def add(self, *tensors):
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = id(storage), storage.nbytes()
            if key in self.known:
                continue
            self.known[key] = weakref.ref(storage, lambda _, key=key, size=size: self.forget(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def forget(self, key, size):
        del self.known[key]
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.add(*(leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)))
        return result


def hollow(module, device="cpu"):
    """Inside a FakeTensorMode: replace the module's tensors by fake ones of the same shapes and types."""
    for part in module.modules():
        for name, tensor in part._parameters.items():
            if tensor is not None:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                part._parameters[name] = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        for name, tensor in part._buffers.items():
            if tensor is not None:
                part._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    return module


@contextmanager
def gpu_autocast(dtype):
    """torch.autocast("cuda") that also works without a GPU: for types, not for values."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)

"""The choice of the backend and the checks of inputs that all public functions of this package share."""

import contextlib
import os

import torch

from kernels.disk.rows import RowsOnDisk

BACKENDS = ("auto", "torch", "triton")
TRITON_MAX_K, TRITON_MAX_ROWS = 64, (1 << 31) - 1
# Names the path for all calls that leave it to `auto`.
FORCED = "DIFFREID_KERNELS"
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_features(queries, gallery, may_be_empty=False):
    """Raise ValueError unless both are 2-D float tensors of one width on one device, with at least one row each."""
    for name, features in (("queries", queries), ("gallery", gallery)):
        if isinstance(features, RowsOnDisk) and not may_be_empty:
            check_in_memory(features)
        if not isinstance(features, (torch.Tensor, RowsOnDisk)):
            raise ValueError(f"{name} must be a torch tensor, got {type(features).__name__}")
        if features.dim() != 2:
            raise ValueError(f"{name} must have shape (rows, dimensions), got {tuple(features.shape)}")
        if features.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{name} must be float32, float16, bfloat16 or float64, got {features.dtype}")
        if features.shape[0] == 0 and not may_be_empty:
            raise ValueError(f"{name} is empty: shape {tuple(features.shape)}")
        if features.shape[1] == 0:
            raise ValueError(f"{name} has rows of width 0: shape {tuple(features.shape)}")
    if queries.shape[1] != gallery.shape[1]:
        raise ValueError(f"queries and gallery have different widths: {queries.shape[1]} and {gallery.shape[1]}")
    if queries.device != gallery.device:
        raise ValueError(f"queries and gallery lie on different devices: {queries.device} and {gallery.device}")


def check_in_memory(*features):
    if any(isinstance(rows, RowsOnDisk) for rows in features):
        raise ValueError("features on disk cannot be re-ranked or clustered; read them into memory: features[:]")


def check_ids(name, ids, length, device):
    """Return `ids` as an int64 tensor of the given length on the device, or raise ValueError."""
    try:
        ids = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be a list, array or tensor of integers: {error}") from None
    if ids.dim() != 1 or ids.shape[0] != length:
        raise ValueError(f"{name} must hold one number for each of {length} rows, got shape {tuple(ids.shape)}")
    # An empty list has no type.
    ids = ids if ids.numel() else ids.long()
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {ids.dtype}")
    return ids.to(device=device, dtype=torch.int64)


def check_count(name, value, low, high=None, hint=""):
    """Return `value` as int if it is a whole number in low..high, or raise ValueError."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    value = value.__index__()
    if value < low or (high is not None and value > high):
        limits = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{name} must be {limits}{hint}, got {value}")
    return value


def triton_obstacle(device, dtype):
    """Why the Triton kernels cannot run on tensors of this device and type, or None if they can."""
    if dtype == torch.float64:
        return "the Triton kernels take float32, float16 and bfloat16, not float64"
    try:
        import triton
    except ImportError:
        return "triton is not installed"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if torch.version.hip is None and capability < (8, 0):
            return f"the kernels need compute capability 8.0, {torch.cuda.get_device_name(device)} has {capability}"
        return None
    if device.type != "cpu":
        return f"the Triton kernels run on CUDA devices, the features lie on {device}"
    if not interpreting(triton):
        return "the features lie on the CPU; set TRITON_INTERPRET=1 before triton is imported to interpret the kernels"
    return None


def interpreting(triton):
    """Whether kernels run in Triton's interpreter; older releases have only an environment variable for it."""
    knobs = getattr(triton, "knobs", None)
    if knobs is not None:
        return bool(knobs.runtime.interpret)
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def requested(backend):
    """(backend, what names it): the argument, or in the place of `auto` the environment variable DIFFREID_KERNELS."""
    source = f"backend={backend!r}"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto" and os.environ.get(FORCED):
        backend = os.environ[FORCED]
        source = f"{FORCED}={backend}"
        if backend not in BACKENDS:
            raise ValueError(f"{FORCED} must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend, source


def choose_backend(backend, features, operation, k=1, num_columns=None, gallery=None):
    """The backend, `torch` or `triton`, for these features, `k` neighbours and a gallery of `num_columns` rows.

    Where `gallery` is given, it counts with its rows and its type.
    Forcing `triton` where it cannot run raises ValueError. On a card `auto` takes the path that was measured as the
    faster one (`kernels.measured`). It is never Triton's interpreter.
    """
    backend, source = requested(backend)
    if backend == "torch":
        return "torch"
    gallery = features if gallery is None else gallery
    num_columns = len(gallery) if num_columns is None else num_columns
    # With one side in float64, all is computed in float64.
    obstacle = triton_obstacle(features.device, torch.promote_types(features.dtype, gallery.dtype))
    if obstacle is None and k > TRITON_MAX_K:
        obstacle = f"the kernels keep at most {TRITON_MAX_K} neighbours in registers, {k} were asked for"
    if obstacle is None and num_columns > TRITON_MAX_ROWS:
        obstacle = f"the kernels number at most {TRITON_MAX_ROWS:,} gallery rows, there are {num_columns:,}"
    if backend == "triton":
        if obstacle:
            raise ValueError(f"{source} cannot run here: {obstacle}")
        return "triton"
    if obstacle or features.device.type != "cuda":
        return "torch"
    from .measured import faster

    return faster(operation, features, num_columns, k)


@contextlib.contextmanager
def full_precision():
    """float32 products are computed in float32: TF32 or bfloat16, which users may allow, would change rankings."""
    # torch's older functions for all devices raise an error where somebody has used these.
    places = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision

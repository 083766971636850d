"""`PrototypeMemory` under a short name: it stands in `utils.modeling.memories`, losses in `utils.modeling.losses`."""

from utils.modeling.memories import PrototypeMemory  # noqa: F401

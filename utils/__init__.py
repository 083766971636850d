"""Everything below the scripts, in packages by subject, the rooms; a room imports only from rooms before it.

`files`, `flags`, `launch`, `worklist`; `reporting`, `synthetic`; `datasets`, `batches`; `modeling`, `diffusion`;
`evaluation`; `training`; `generated`; `standins`.
"""

import importlib
import logging

# bitsandbytes asks a package of the name `kernels` for a 4-bit product and finds ours; nothing here uses that product.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "gemm_4bit_forward" not in record.getMessage()
)


def opened_when_used(room, homes):
    """The `__getattr__` of a room that gives its names, {file: names}, without loading a file before it is needed."""
    files = {name: file for file, names in homes.items() for name in names.split()}

    def find(name):
        if name not in files:
            raise AttributeError(f"module {room!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{room}.{files[name]}"), name)

    return find

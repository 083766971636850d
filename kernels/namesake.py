"""PyPI has a package `kernels` too. From this folder ours is found, also by transformers and diffusers.

Where the other one is installed they import names of it, so those are served from it.
"""

import importlib.util
import sys
from pathlib import Path

OWN = Path(__file__).resolve().parent
ALIAS = "kernels._namesake"


def installed():
    """The folder of PyPI's package, or None."""
    for entry in sys.path:
        folder = Path(entry or ".").resolve() / "kernels"
        if folder != OWN and (folder / "hf_hub.py").is_file():
            return folder
    return None


def attribute(name):
    """A name that ours does not have, from the installed package."""
    folder = None if name.startswith("__") or (OWN / f"{name}.py").exists() else installed()
    if folder is None:
        raise AttributeError(f"module 'kernels' has no attribute {name!r}")
    if ALIAS not in sys.modules:
        path = sys.modules["kernels"].__path__
        # Its files import one another as `kernels.something`; ours come first and bear other names.
        if str(folder) not in path:
            path.append(str(folder))
        spec = importlib.util.spec_from_file_location(ALIAS, folder / "__init__.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[ALIAS] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[ALIAS]
            raise
    return getattr(sys.modules[ALIAS], name)

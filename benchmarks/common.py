"""What benchmarks share: the results' folder, the environment of a measurement, files of peers."""

import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from utils.files import versions

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def peer_module(path):
    """One file of a peer, without importing the rest of its package."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def status(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def environment():
    """Machine, versions, revision and command, without any path of this disk."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    names = [line.split(":")[1].strip() for line in cpu_lines() if line.startswith("model name")]
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return {
        "machine": f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, {platform.system()}",
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "revision": git.stdout.strip(),
        "command": " ".join([f"python -m {module_of(sys.argv[0])}", *words]),
    }


def module_of(path):
    """`benchmarks.speed.retrieval` of the file's path; of another file its name."""
    parts = Path(path).with_suffix("").parts
    return ".".join(parts[parts.index("benchmarks") :]) if "benchmarks" in parts else f"benchmarks.{parts[-1]}"


def cpu_lines():
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


NUM_IDS, BATCH, RANK, TAU = 751, 64, 8, 0.6
IMAGE_SIZE, LATENT_SIZE, WIDTH = (256, 128), (4, 16, 16), 768
CLIP = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "patch_size": 16,
    "image_size": 224,
    "projection_dim": 512,
}
UNET = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": WIDTH,
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": LATENT_SIZE[0],
}
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def packages():
    return {name: number for name, number in versions().items() if name in ("diffusers", "peft", "transformers")}

"""Reference sets: images that the untouched model draws, kept on disk for all identities with the same prompt."""

import hashlib
import json

from safetensors import safe_open
from safetensors.torch import save_file

from utils.generated.made_report import REFERENCES, SHOWN
from utils.generated.made_set import is_reference
from utils.worklist import seed_of


def open_references(model, work, prompt, count, *, seed, precision, sampling):
    """(`count` latents, key) of a prompt; drawn unless they are in `work`. `sampling`: arguments of `model.sample`."""
    settings = [count, *(sampling[name] for name in ("resolution", "solver", "steps", "guidance"))]
    inputs = [prompt, model.digest, str(model.dtype), precision, seed, *settings]
    key = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:32]
    path = work.folder / REFERENCES / f"{key}.safetensors"
    if not is_reference(path, count):
        seeds = [seed_of(seed, "reference", prompt, number) for number in range(count)]
        condition = model.encode_all([prompt]).expand(len(seeds), -1, -1)
        latents = model.sample(condition, seeds, **sampling)
        preview = model.decode(latents[: SHOWN["reference"]], sampling["batch_size"])
        with work.scratch() as part:
            save_file({"latents": latents.half().cpu(), "preview": preview}, part / path.name)
            work.move(part / path.name, path)
    with safe_open(path, "pt") as file:
        return file.get_tensor("latents").float().to(model.device), key

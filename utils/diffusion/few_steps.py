"""How a few-step LoRA draws, by its name. torch is not imported here: `--help` answers at once."""

import re

KINDS = {"hyper": "ddim-trailing", "lightning": "ddim-trailing", "tcd": "tcd", "lcm": "lcm"}


def usual_drawing(name):
    """{solver, num_inference_steps, guidance_scale} as published for LoRAs of such a name; guidance may be left open.

    Names are such as lcm-lora-sdv1-5, Hyper-SD15-8steps-lora, Hyper-SD15-8steps-CFG-lora.
    """
    # A file is named for its kind, or its folder is.
    parts = [part for part in reversed(name.lower().split("/")) if part]
    name = next((part for part in parts[:2] if any(kind in part for kind in KINDS)), parts[0])
    steps = re.search(r"(\d+)[-_ ]?steps?(?![a-z])", name)
    usual = {"solver": next((solver for kind, solver in KINDS.items() if kind in name), "lcm")}
    usual["num_inference_steps"] = int(steps[1]) if steps else 4
    return usual if "cfg" in name else usual | {"guidance_scale": 1.0}

"""How a few-step LoRA draws, by its name. torch is not imported here: `--help` answers at once."""

import re


def usual_drawing(name):
    """{solver, num_inference_steps, guidance_scale} as published for LoRAs of such a name; guidance may be left open.

    Names are such as lcm-lora-sdv1-5, Hyper-SD15-8steps-lora, Hyper-SD15-8steps-CFG-lora.
    """
    name = name.lower()
    steps = re.search(r"(\d+)[-_ ]?steps?(?![a-z])", name)
    usual = {"solver": "ddim-trailing" if "hyper" in name else "tcd" if "tcd" in name else "lcm"}
    usual["num_inference_steps"] = int(steps[1]) if steps else 4
    return usual if "cfg" in name else usual | {"guidance_scale": 1.0}

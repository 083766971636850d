"""Where the shipped stand-in models lie; apart from `utils.tiny`, which imports all that builds them."""

from pathlib import Path

STANDINS = Path(__file__).parent / "standins"
CLIP_DIR, DIFFUSION_DIR, CAPTIONER_DIR = (str(STANDINS / name) for name in ("clip", "stable-diffusion", "blip-vqa"))

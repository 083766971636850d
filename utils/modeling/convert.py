"""Writes weights of another project as a model folder of ours.

python -m utils.modeling.convert market_sbs_R50.pth output/sbs
python -m utils.modeling.convert ViT-B-16.pth output/clip --activation quick_gelu --resolution 256 128
"""

import argparse
import json
import sys
from pathlib import Path


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(
        prog="python -m utils.modeling.convert",
        description="Writes weights of another project as a model folder of ours; the README lists those that load.",
    )
    parser.add_argument("weights", help="a file of weights, or a folder or Hub id of timm")
    parser.add_argument("folder", help="the folder to write; it must not exist, or hold a model of ours")
    parser.add_argument(
        "--resolution", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="input in pixels; default by the layout"
    )
    parser.add_argument("--activation", choices=["gelu", "quick_gelu"], help="of CLIP; default by the file")
    parser.add_argument("--stem_relu", choices=["yes", "no"], help="of reid-strong-baseline; default as in its code")
    parser.add_argument(
        "--last_stride", type=int, choices=[1, 2], help="of Person_reID_baseline_pytorch; default 2, as in its code"
    )
    parser.add_argument("--semantic_weight", type=float, help="of SOLIDER, 0 to 1; default 0.2")
    args = parser.parse_args(input_args)
    folder = Path(args.folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir()) and not is_ours(folder)):
        parser.error(f"{folder} exists and is no model folder of ours; give another one")
    return args


def is_ours(folder):
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type") == "diffreid"
    except (OSError, ValueError, AttributeError):
        return False


def main(args):
    from utils.modeling.reid_model import ReIDModel

    given = {"activation": args.activation, "semantic_weight": args.semantic_weight}
    given["last_stride"] = args.last_stride
    given["stem_relu"] = None if args.stem_relu is None else args.stem_relu == "yes"
    options = {name: value for name, value in given.items() if value is not None}
    model = ReIDModel.from_weights(args.weights, args.resolution and tuple(args.resolution), **options)
    model.save_pretrained(args.folder)
    print(*model.notes, sep="\n")
    (height, width), kind = model.image_size, model.backbone.config.model_type
    print(f"{args.folder}: {kind}, images of {height} x {width}, features of {model.num_features} numbers")


if __name__ == "__main__":
    try:
        main(parse_args())
    # A full disk is an error of safetensors.
    except Exception as error:
        if not isinstance(error, (ValueError, OSError)) and type(error).__name__ != "SafetensorError":
            raise
        sys.exit(f"error: {error}")

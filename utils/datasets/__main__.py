"""Count a data set, or write a portable copy of it.

    python -m utils.datasets market1501 --root /data/reid
    python -m utils.datasets viper:split=3 --root /data/reid --save_to viper3

A copy has the images inside.
"""

import argparse
import os
import sys

from utils.datasets.images import check_images
from utils.datasets.load import load_reid, read_options
from utils.datasets.portable import count_table, push, save
from utils.files import one_line


def main(input_args=None):
    parser = argparse.ArgumentParser(
        prog="python -m utils.datasets",
        description="Count a data set, or make a portable copy of it with images inside.",
    )
    parser.add_argument("name", nargs="+", help="NAME, NAME:key=value,..., a path or a Hub id; several are merged")
    parser.add_argument("--root", "--data_root", help="folder of the set, or the one it lies in")
    parser.add_argument("--options", nargs="*", default=[], help="key=value for a path or Hub id (pid_column=label)")
    parser.add_argument("--skip_unreadable", action="store_true", help="leave out and list images that do not decode")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--save_to", help="new folder to write, readable by load_reid and datasets.load_from_disk")
    target.add_argument("--push_to_hub", help="Hub id to push to")
    parser.add_argument("--public", action="store_true", help="push to a public repository instead of a private one")
    args = parser.parse_args(input_args)
    try:
        if args.save_to and os.path.exists(args.save_to):
            raise ValueError(f"{args.save_to} exists already; give a new folder")
        options = read_options(args.options, "--options")
        if flags := sorted({"root", "skip_unreadable"} & options.keys()):
            raise ValueError(f"--options {flags[0]}: it is a flag, --{flags[0]}")
        names = args.name[0] if len(args.name) == 1 else args.name
        data = load_reid(names, args.root, skip_unreadable=args.skip_unreadable, **options)
        for note in dict.fromkeys(dataset.info.description for dataset in data.values()):
            if note:
                print(note)
        print(count_table(data))
        if args.save_to or args.push_to_hub:
            check_images(data, where=" + ".join(args.name))
        if args.save_to:
            save(data, args.save_to)
            print(f"wrote {args.save_to}")
        if args.push_to_hub:
            push(data, args.push_to_hub, private=not args.public)
            print(f"pushed to {args.push_to_hub}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {one_line(error)}")


if __name__ == "__main__":
    main()

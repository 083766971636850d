"""Draw a contact sheet of the synthetic world, or plain folders of images to try the scripts with.

    python -m utils.synthetic --domain a --num_ids 8 --out sheet.png
    python -m utils.synthetic --domain d --num_ids 64 --folders own

Each row of the sheet shows the pictures of one identity, sorted by camera. `own` is a folder like one's own data:
`people` to train on, `wanted` and `camera2` to search, `tracklets` to group; see `utils/synthetic/folders.py`.
"""

import argparse

from PIL import Image, ImageDraw

from utils.synthetic.domains import DOMAINS
from utils.synthetic.folders import write_folders
from utils.synthetic.world import SIZE, camera_of, check_request, render


def contact_sheet(domain, num_ids=8, images_per_id=8, seed=0):
    """A sheet with one row per identity, its pictures sorted by camera."""
    check_request(domain, num_ids, images_per_id, seed)
    height, width = SIZE
    sheet = Image.new("RGB", (images_per_id * (width + 4) + 4, num_ids * (height + 4) + 18), (250, 250, 250))
    ink = ImageDraw.Draw(sheet)
    ink.text((4, 3), f"synthetic {domain}: {DOMAINS[domain]['place']}", fill=(20, 20, 20))
    for pid in range(num_ids):
        order = sorted(range(images_per_id), key=lambda index, pid=pid: (camera_of(domain, pid, index, seed), index))
        for column, index in enumerate(order):
            picture = render(domain, pid, camera_of(domain, pid, index, seed), index, seed)
            sheet.paste(picture, (4 + column * (width + 4), 18 + pid * (height + 4)))
    return sheet


def main(input_args=None):
    parser = argparse.ArgumentParser(
        prog="python -m utils.synthetic",
        description="Draw the synthetic world: a contact sheet, or plain folders of images.",
    )
    parser.add_argument("--domain", default="a", choices=sorted(DOMAINS), help="which domain")
    parser.add_argument(
        "--num_ids", type=int, default=8, help="identities, one a row; of --folders, those to train on"
    )
    parser.add_argument("--images_per_id", type=int, default=8, help="pictures of each, sorted by camera")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other people")
    parser.add_argument("--out", default="sheet.png", help="sheet to write")
    parser.add_argument("--folders", help="write no sheet, but images into this new folder, like data of your own")
    args = parser.parse_args(input_args)
    wanted = args.domain, args.num_ids, args.images_per_id, args.seed
    try:
        if args.folders:
            counts = write_folders(args.folders, *wanted)
        else:
            contact_sheet(*wanted).save(args.out)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if args.folders:
        print(f"wrote {', '.join(f'{count} images in {args.folders}/{name}' for name, count in counts.items())}")
    else:
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()

"""Draw a contact sheet of the synthetic world.

    python -m utils.synthetic --domain a --num_ids 8 --out sheet.png

Each row shows the pictures of one identity, sorted by camera.
"""

import argparse

from PIL import Image, ImageDraw

from utils.synthetic.domains import DOMAINS
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
    parser = argparse.ArgumentParser(description="Draw a contact sheet of the synthetic world: identities x cameras.")
    parser.add_argument("--domain", default="a", choices=sorted(DOMAINS), help="which domain")
    parser.add_argument("--num_ids", type=int, default=8, help="identities, one a row")
    parser.add_argument("--images_per_id", type=int, default=8, help="pictures of each, sorted by camera")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other people")
    parser.add_argument("--out", default="sheet.png", help="file to write")
    args = parser.parse_args(input_args)
    try:
        contact_sheet(args.domain, args.num_ids, args.images_per_id, args.seed).save(args.out)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()

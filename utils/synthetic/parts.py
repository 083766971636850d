"""Where the parts of a drawn person are: true boxes, for detectors and part masks to be compared with."""

from PIL import Image, ImageDraw

from utils.synthetic.camera import SCALE, place_of
from utils.synthetic.person import Figure, draw_person
from utils.synthetic.world import SIZE, appearance, lens_of, parse_name, pose_of

PARTS = ("head", "upper body", "legs")


class PartFigure(Figure):
    """A figure with a mask of its own for each part."""

    def __init__(self, size, *place):
        self.masks = {part: Image.new("L", size) for part in PARTS}
        super().__init__(size, *place)

    @property
    def stencil(self):
        return ImageDraw.Draw(self.masks[self.part])

    @stencil.setter
    def stencil(self, of_the_whole):
        """Nothing: each part has its own."""


def part_boxes(domain, pid, camid, index, seed=0):
    """{part: (left, top, right, bottom) as shares of the picture, or None outside of it} of one picture.

    Bags belong to no part, and what stands before a person hides nothing.
    """
    pose, _ = pose_of(domain, pid, camid, index, seed)
    person = appearance(domain, pid, seed) | {"carried_kind": "nothing"}
    height, width = SIZE[0] * SCALE, SIZE[1] * SCALE
    figure = PartFigure((width, height), *place_of(person, pose, lens_of(domain, camid, seed), (width, height)))
    draw_person(figure, person, pose)
    boxes = {part: mask.getbbox() for part, mask in figure.masks.items()}
    size = width, height, width, height
    return {
        part: box and tuple(edge / whole for edge, whole in zip(box, size, strict=True)) for part, box in boxes.items()
    }


def boxes_of(path):
    """`part_boxes` of a picture by its file name."""
    return part_boxes(**parse_name(path))

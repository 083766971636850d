"""Draws one pedestrian with Pillow only: body, clothes, hair and carried objects.

`world` chooses appearance and pose, `camera` the place in the picture and the camera's effects. Points of a body are
(x, u): x in body heights right of the middle, u in body heights above the ground.
"""

import math

from PIL import Image, ImageDraw

COLOURS = {
    "black": (34, 34, 38),
    "white": (238, 238, 234),
    "grey": (132, 134, 138),
    "red": (196, 34, 38),
    "orange": (236, 126, 30),
    "yellow": (240, 208, 52),
    "green": (44, 136, 62),
    "blue": (38, 72, 172),
    "purple": (118, 54, 148),
    "pink": (240, 138, 172),
    "brown": (108, 68, 40),
    "beige": (214, 190, 150),
}
HAIR = {
    "black": (30, 26, 26),
    "brown": (88, 54, 32),
    "blond": (212, 176, 98),
    "grey": (164, 164, 164),
    "red": (158, 66, 28),
}
SKIN = [(250, 218, 190), (232, 190, 154), (204, 154, 114), (158, 108, 74), (104, 70, 50)]


def shade(colour, amount):
    """The colour made darker (amount < 1) or lighter (amount > 1)."""
    return tuple(max(0, min(255, round(channel * amount))) for channel in colour)


class Figure:
    """Maps body points to pixels for one person in one camera, and draws on a layer with its own mask."""

    def __init__(self, size, centre, ground, height, tilt):
        self.image = Image.new("RGB", size)
        self.mask = Image.new("L", size)
        self.ink = ImageDraw.Draw(self.image)
        self.stencil = ImageDraw.Draw(self.mask)
        self.centre, self.ground, self.height, self.tilt = centre, ground, height, tilt
        # What is being drawn: head, upper body or legs.
        self.part = None

    def at(self, x, u):
        # Seen from above (tilt > 0) the head comes closer: the upper body grows, the legs shrink.
        wide = 1.0 + self.tilt * (u - 0.45)
        tall = u * (1.0 - self.tilt * 0.45 * (1.0 - u))
        return (self.centre + x * self.height * wide, self.ground - tall * self.height)

    def polygon(self, points, colour):
        points = [self.at(*point) for point in points]
        self.ink.polygon(points, fill=colour)
        self.stencil.polygon(points, fill=255)

    def ellipse(self, x, u, half_width, half_height, colour):
        left, top = self.at(x - half_width, u + half_height)
        right, bottom = self.at(x + half_width, u - half_height)
        self.ink.ellipse((left, top, right, bottom), fill=colour)
        self.stencil.ellipse((left, top, right, bottom), fill=255)

    def limb(self, start, end, width_start, width_end, colour):
        (x1, u1), (x2, u2) = start, end
        length = math.hypot(x2 - x1, u2 - u1) or 1.0
        nx, nu = (u2 - u1) / length, -(x2 - x1) / length
        self.polygon(
            [
                (x1 - nx * width_start, u1 - nu * width_start),
                (x1 + nx * width_start, u1 + nu * width_start),
                (x2 + nx * width_end, u2 + nu * width_end),
                (x2 - nx * width_end, u2 - nu * width_end),
            ],
            colour,
        )
        self.ellipse(x2, u2, width_end, width_end * 0.8, colour)

    def cloth(self, points, colour, pattern=None, second=None, pitch=0.05):
        """A piece of cloth: the polygon in one colour, with its pattern drawn inside it only."""
        self.polygon(points, colour)
        if pattern is None:
            return
        pixels = [self.at(*point) for point in points]
        left, top = (int(min(p[i] for p in pixels)) for i in (0, 1))
        right, bottom = (int(max(p[i] for p in pixels)) + 1 for i in (0, 1))
        size = (max(1, right - left), max(1, bottom - top))
        piece = Image.new("RGB", size, colour)
        ink = ImageDraw.Draw(piece)
        step = max(5, round(pitch * self.height))
        if pattern in ("striped", "checked"):
            for y in range(step // 2, size[1], step):
                ink.rectangle((0, y, size[0], y + max(1, step * 2 // 5)), fill=second)
        if pattern == "checked":
            for x in range(step // 2, size[0], step):
                ink.rectangle((x, 0, x + max(1, step // 3), size[1]), fill=second)
        if pattern == "dotted":
            radius = max(2, step // 4)
            for row, y in enumerate(range(step // 2, size[1], step)):
                for x in range((row % 2) * step // 2 + step // 4, size[0], step):
                    ink.ellipse((x - radius, y - radius, x + radius, y + radius), fill=second)
        stencil = Image.new("L", size)
        ImageDraw.Draw(stencil).polygon([(x - left, y - top) for x, y in pixels], fill=255)
        self.image.paste(piece, (left, top), stencil)


def draw_person(figure, person, pose):
    """The whole person, from the ground up and from the far side to the near one."""
    view, phase = pose["view"], pose["phase"]
    side = view in ("left", "right")
    facing = -1 if view == "left" else 1
    wide = person["build"] * (0.66 if side else 1.0)
    stride = pose["stride"]
    skin = SKIN[person["skin"]]
    figure.part = "legs"
    draw_legs(figure, person, side, facing, wide, stride, phase, skin)
    figure.part = "upper body"

    carried, back = person["carried_kind"], view == "back"
    bag = person["carried_rgb"]
    if carried == "backpack" and side:
        figure.ellipse(-facing * 0.105 * wide, 0.70, 0.062, 0.115, bag)
        figure.ellipse(-facing * 0.125 * wide, 0.66, 0.032, 0.05, shade(bag, 0.75))

    upper, long_coat = person["upper_rgb"], person["upper_kind"] == "coat"
    shoulder, waist, hem = 0.118 * wide, 0.092 * wide, 0.36 if long_coat else 0.475
    swing = math.sin(phase) * stride
    far = (shoulder * 0.95, 0.80) if not side else (0.0, 0.80)
    near = (-shoulder * 0.95, 0.80) if not side else (0.0, 0.80)
    reach = 0.20 if side else 0.035
    arm_far = (far[0] + (0.03 if not side else 0) + swing * reach * facing, 0.50)
    arm_near = (near[0] - (0.03 if not side else 0) - swing * reach * facing, 0.50)
    draw_arm(figure, person, far, arm_far, skin, 0.86)

    torso = [
        (-shoulder * 0.72, 0.845),
        (shoulder * 0.72, 0.845),
        (shoulder, 0.80),
        (waist * 1.02, 0.62),
        (waist * (1.3 if long_coat else 1.1), hem),
        (-waist * (1.3 if long_coat else 1.1), hem),
        (-waist * 1.02, 0.62),
        (-shoulder, 0.80),
    ]
    pattern = person["pattern"] if person["pattern"] in ("striped", "checked", "dotted") else None
    figure.cloth(torso, upper, pattern, person["second_rgb"], person["pitch"])
    if person["pattern"] == "printed" and not back:
        x, half = (0.02 * facing if side else person["print_x"]), 0.036 * (0.6 if side else 1.0)
        figure.polygon([(x - half, 0.74), (x + half, 0.74), (x + half, 0.66), (x - half, 0.66)], person["second_rgb"])
    if person["upper_kind"] in ("jacket", "coat") and view == "front":
        figure.polygon([(-0.006, 0.845), (0.006, 0.845), (0.006, hem), (-0.006, hem)], shade(upper, 0.55))
        figure.polygon([(-0.035, 0.848), (0.035, 0.848), (0.0, 0.76)], person["inner_rgb"])
    if person["upper_kind"] == "hoodie":
        figure.ellipse(0.0, 0.842, 0.062 * wide, 0.022, shade(upper, 0.7))
    figure.part = "head"
    draw_head(figure, person, view, side, facing, skin)
    figure.part = "upper body"
    draw_arm(figure, person, near, arm_near, skin, 1.0)

    if carried == "backpack" and back:
        figure.ellipse(0.0, 0.71, 0.095 * wide, 0.115, bag)
        figure.ellipse(0.0, 0.665, 0.06 * wide, 0.045, shade(bag, 0.75))
    elif carried == "backpack" and view == "front":
        for sign in (-1, 1):
            figure.limb((sign * 0.062 * wide, 0.838), (sign * 0.07 * wide, 0.66), 0.014, 0.014, bag)
    elif carried == "handbag":
        x, u = arm_near[0], arm_near[1] - 0.03
        figure.limb((x, u + 0.03), (x, u - 0.02), 0.006, 0.006, shade(bag, 0.7))
        figure.polygon([(x - 0.05, u - 0.02), (x + 0.05, u - 0.02), (x + 0.06, u - 0.11), (x - 0.06, u - 0.11)], bag)
    elif carried == "shoulder bag":
        sign = facing if side else (1 if back else -1)
        x = sign * shoulder * 0.95
        figure.limb((-x * 0.6, 0.84), (x, 0.56), 0.011, 0.011, shade(bag, 0.8))
        figure.polygon([(x - 0.06, 0.57), (x + 0.06, 0.57), (x + 0.06, 0.45), (x - 0.06, 0.45)], bag)


def draw_legs(figure, person, side, facing, wide, stride, phase, skin):
    lower, kind = person["lower_rgb"], person["lower_kind"]
    hip = 0.012 if side else 0.047 * wide
    for sign in (1, -1):
        swing = math.sin(phase) * stride * sign
        foot_x = sign * hip + (swing * 0.17 * facing if side else 0.012 * sign)
        lift = 0.03 * max(0.0, swing) if not side else 0.0
        knee = (sign * hip * 1.05 + (swing * 0.08 * facing if side else 0.0), 0.27)
        ankle = (foot_x, 0.045 + lift)
        tone = 1.0 if sign < 0 else 0.84
        bare = kind in ("shorts", "skirt")
        leg = shade(skin if bare else lower, tone)
        figure.limb((sign * hip, 0.50), knee, 0.056 * wide + 0.004, 0.042, leg)
        figure.limb(knee, ankle, 0.042, 0.026 if bare else 0.034, leg)
        if kind == "shorts":
            top, end = (sign * hip, 0.50), (knee[0], 0.31)
            figure.limb(top, end, 0.060 * wide + 0.004, 0.056, shade(lower, tone))
        toe = 0.024 * facing if side else 0.0
        figure.ellipse(foot_x + toe, 0.022 + lift, 0.050 if side else 0.034, 0.024, shade(person["shoes_rgb"], tone))
    if kind == "skirt":
        figure.cloth([(-0.085 * wide, 0.52), (0.085 * wide, 0.52), (0.125 * wide, 0.27), (-0.125 * wide, 0.27)], lower)
    else:
        figure.polygon([(-0.085 * wide, 0.52), (0.085 * wide, 0.52), (0.07 * wide, 0.44), (-0.07 * wide, 0.44)], lower)


def draw_arm(figure, person, shoulder, hand, skin, tone):
    elbow = ((shoulder[0] + hand[0]) / 2 + (0.012 if hand[0] > shoulder[0] else -0.012), 0.645)
    sleeve = shade(person["sleeve_rgb"], tone)
    bare = person["upper_kind"] == "t-shirt"
    figure.limb(elbow, hand, 0.030, 0.022, shade(skin, tone) if bare else sleeve)
    figure.limb(shoulder, elbow, 0.040, 0.032, sleeve)
    figure.ellipse(hand[0], hand[1] - 0.012, 0.022, 0.022, shade(skin, tone))


def draw_head(figure, person, view, side, facing, skin):
    hair = person["hair_rgb"]
    long_hair = person["hair_kind"] == "long"
    if long_hair and view != "back":
        figure.ellipse(-0.02 * facing if side else 0.0, 0.895, 0.068, 0.085, shade(hair, 0.85))
    figure.polygon([(-0.028, 0.88), (0.028, 0.88), (0.034, 0.835), (-0.034, 0.835)], shade(skin, 0.85))
    figure.ellipse(0.0, 0.925, 0.054, 0.07, skin)
    if view == "back":
        figure.ellipse(0.0, 0.935, 0.058, 0.068, hair)
        if long_hair:
            figure.polygon([(-0.058, 0.93), (0.058, 0.93), (0.062, 0.80), (-0.062, 0.80)], hair)
    elif side:
        figure.ellipse(-0.020 * facing, 0.945, 0.048, 0.058, hair)
        figure.ellipse(0.055 * facing, 0.918, 0.010, 0.010, skin)
        figure.ellipse(0.032 * facing, 0.932, 0.008, 0.007, (40, 32, 32))
    else:
        figure.ellipse(0.0, 0.972, 0.054, 0.028, hair)
        for sign in (-1, 1):
            figure.ellipse(sign * 0.021, 0.930, 0.008, 0.007, (40, 32, 32))
        figure.ellipse(0.0, 0.893, 0.014, 0.004, shade(skin, 0.62))
    hat, colour = person["hat_kind"], person["hat_rgb"]
    if hat != "none":
        figure.ellipse(0.0, 0.975, 0.062, 0.034, colour)
        figure.polygon([(-0.062, 0.972), (0.062, 0.972), (0.062, 0.953), (-0.062, 0.953)], colour)
    if hat == "cap" and view != "back":
        reach = (0.02 * facing, 0.115 * facing) if side else (-0.05, 0.05)
        left, right = sorted(reach)
        figure.polygon([(left, 0.962), (right, 0.962), (right, 0.946), (left, 0.946)], shade(colour, 0.7))
    if hat == "beanie":
        figure.ellipse(0.0, 1.012, 0.018, 0.016, shade(colour, 1.25))

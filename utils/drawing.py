"""Draws one pedestrian in front of one camera's background, with Pillow and nothing else.

`utils.synthetic` decides who is drawn, where and how they move; this file turns that into pixels. Everything is drawn
at twice the final size and reduced once, so edges are smooth. Points of a body are (x, u): x in body heights right of
the middle, u in body heights above the ground.
"""

import functools
import io
import math
import random

from PIL import Image, ImageChops, ImageDraw, ImageFilter

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

SCALE = 2


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
    draw_legs(figure, person, side, facing, wide, stride, phase, skin)

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
    draw_head(figure, person, view, side, facing, skin)
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


@functools.lru_cache(maxsize=64)
def background(style, variant, width, height):
    """One camera's empty scene, wider than an image so that every picture shows another part of it."""
    rng = random.Random(f"background/{style}/{variant}")
    image = Image.new("RGB", (width, height))
    ink = ImageDraw.Draw(image)
    horizon = round(height * (0.40 + 0.12 * rng.random()))
    PAINTERS[style](ink, rng, width, height, horizon)
    return image.filter(ImageFilter.GaussianBlur(1.6))


def fill(ink, box, top, bottom):
    """A vertical gradient."""
    left, upper, right, lower = box
    for y in range(int(upper), int(lower)):
        part = (y - upper) / max(1, lower - upper)
        ink.line((left, y, right, y), fill=tuple(round(a + (b - a) * part) for a, b in zip(top, bottom, strict=True)))


def paint_campus(ink, rng, width, height, horizon):
    fill(ink, (0, 0, width, horizon), (150, 196, 236), (214, 230, 240))
    x = -10
    while x < width:
        wide = rng.randint(50, 90)
        top = rng.randint(10, horizon // 2)
        ink.rectangle(
            (x, top, x + wide, horizon), fill=rng.choice([(216, 196, 168), (196, 152, 128), (226, 222, 210)])
        )
        for wx in range(x + 8, x + wide - 8, 16):
            for wy in range(top + 10, horizon - 12, 22):
                ink.rectangle((wx, wy, wx + 7, wy + 11), fill=(118, 146, 168))
        x += wide + rng.randint(0, 24)
    fill(ink, (0, horizon, width, height), (126, 176, 92), (150, 192, 110))
    ink.polygon(
        [(width * 0.1, height), (width * 0.9, height), (width * 0.62, horizon), (width * 0.4, horizon)],
        fill=(208, 202, 190),
    )
    for _ in range(5):
        x, r = rng.randint(0, width), rng.randint(16, 30)
        ink.rectangle((x - 3, horizon - 20, x + 3, horizon + 14), fill=(96, 72, 50))
        ink.ellipse((x - r, horizon - 20 - 2 * r, x + r, horizon - 10), fill=(70, rng.randint(116, 150), 60))


def paint_night(ink, rng, width, height, horizon):
    fill(ink, (0, 0, width, horizon), (8, 10, 30), (30, 32, 62))
    x = 0
    while x < width:
        wide, top = rng.randint(34, 70), rng.randint(0, horizon // 2)
        ink.rectangle((x, top, x + wide, horizon), fill=(22, 24, 40))
        for wx in range(x + 5, x + wide - 6, 12):
            for wy in range(top + 8, horizon - 10, 16):
                if rng.random() < 0.45:
                    ink.rectangle(
                        (wx, wy, wx + 5, wy + 8), fill=rng.choice([(250, 208, 116), (120, 150, 190), (240, 170, 90)])
                    )
        x += wide
    fill(ink, (0, horizon, width, height), (40, 40, 54), (62, 58, 66))
    for _ in range(4):
        x = rng.randint(0, width)
        ink.line((x, 10, x, horizon + 20), fill=(60, 60, 70), width=3)
        ink.ellipse((x - 12, 2, x + 12, 22), fill=(255, 226, 150))
        ink.ellipse((x - 40, horizon + 30, x + 40, horizon + 60), fill=(112, 96, 70))


def paint_metro(ink, rng, width, height, horizon):
    fill(ink, (0, 0, width, height), (206, 214, 196), (184, 194, 176))
    step = 14
    for x in range(0, width, step):
        ink.line((x, 0, x, horizon + 30), fill=(164, 176, 158))
    for y in range(0, horizon + 30, step):
        ink.line((0, y, width, y), fill=(164, 176, 158))
    band = rng.choice([(30, 110, 160), (180, 60, 50), (30, 130, 90)])
    ink.rectangle((0, 26, width, 46), fill=band)
    for _ in range(3):
        x = rng.randint(0, width - 60)
        ink.rectangle(
            (x, 58, x + rng.randint(30, 60), horizon),
            fill=rng.choice([(240, 240, 236), (70, 90, 110), (226, 180, 70)]),
        )
    fill(ink, (0, horizon + 30, width, height), (120, 122, 120), (146, 148, 142))
    ink.rectangle((0, horizon + 40, width, horizon + 52), fill=(232, 202, 60))


def paint_shop(ink, rng, width, height, horizon):
    fill(ink, (0, 0, width, height), (250, 236, 210), (228, 206, 172))
    for shelf in range(4):
        y = 14 + shelf * (horizon // 3)
        ink.rectangle((0, y + 30, width, y + 35), fill=(150, 110, 74))
        x = 0
        while x < width:
            wide = rng.randint(6, 16)
            colour = rng.choice(list(COLOURS.values()))
            ink.rectangle((x, y + 30 - rng.randint(12, 26), x + wide - 2, y + 30), fill=shade(colour, 1.08))
            x += wide
    fill(ink, (0, horizon + 30, width, height), (206, 180, 146), (226, 204, 172))
    for x in range(0, width, 40):
        ink.line((x, horizon + 30, x - 30, height), fill=(188, 160, 128), width=2)


def paint_cctv(ink, rng, width, height, horizon):
    fill(ink, (0, 0, width, height), (112, 114, 112), (138, 138, 132))
    for _ in range(160):
        x, y, g = rng.randint(0, width), rng.randint(0, height), rng.randint(96, 150)
        ink.rectangle((x, y, x + rng.randint(2, 9), y + rng.randint(1, 4)), fill=(g, g, g - 4))
    for _ in range(3):
        x = rng.randint(-20, width)
        ink.polygon([(x, 0), (x + 10, 0), (x + 50, height), (x + 34, height)], fill=(206, 206, 198))
    for _ in range(2):
        x, y = rng.randint(0, width), rng.randint(0, height)
        ink.rectangle((x, y, x + 46, y + 30), fill=rng.choice([(86, 96, 84), (146, 128, 108)]))


def paint_rain(ink, rng, width, height, horizon):
    fill(ink, (0, 0, width, horizon), (128, 142, 158), (160, 170, 178))
    x = 0
    while x < width:
        wide, top = rng.randint(40, 80), rng.randint(0, horizon // 2)
        ink.rectangle((x, top, x + wide, horizon), fill=rng.choice([(98, 108, 122), (116, 122, 130), (86, 98, 108)]))
        for wy in range(top + 10, horizon - 8, 18):
            ink.rectangle((x + 6, wy, x + wide - 8, wy + 6), fill=(150, 160, 160))
        x += wide
    fill(ink, (0, horizon, width, height), (84, 92, 102), (112, 122, 134))
    for _ in range(18):
        x, y = rng.randint(0, width), rng.randint(horizon, height)
        ink.ellipse((x - rng.randint(10, 36), y - 3, x + rng.randint(10, 36), y + 3), fill=(146, 158, 172))


def paint_snow(ink, rng, width, height, horizon):
    fill(ink, (0, 0, width, horizon), (206, 214, 224), (232, 236, 240))
    for _ in range(7):
        x, tall = rng.randint(0, width), rng.randint(70, 110)
        for part in range(3):
            y = horizon + 8 - tall * part // 4
            half = 26 - 6 * part
            ink.polygon([(x - half, y), (x + half, y), (x, y - 44)], fill=(54, 84 + 10 * part, 74))
            ink.polygon([(x - half // 3, y - 30), (x + half // 3, y - 30), (x, y - 44)], fill=(240, 244, 248))
    fill(ink, (0, horizon, width, height), (226, 232, 242), (244, 246, 250))
    for _ in range(10):
        x, y = rng.randint(0, width), rng.randint(horizon, height)
        ink.ellipse((x - 24, y - 4, x + 24, y + 4), fill=(204, 214, 230))


def paint_hall(ink, rng, width, height, horizon):
    fill(ink, (0, 0, width, horizon), (120, 88, 62), (152, 116, 84))
    for x in range(rng.randint(-30, 10), width, 72):
        ink.rectangle((x, 6, x + 40, horizon - 10), fill=(246, 238, 214))
        ink.line((x + 20, 6, x + 20, horizon - 10), fill=(120, 96, 70), width=3)
        ink.line((x, horizon // 2, x + 40, horizon // 2), fill=(120, 96, 70), width=3)
        ink.rectangle((x + 48, 0, x + 64, horizon + 12), fill=(176, 142, 108))
    fill(ink, (0, horizon, width, height), (168, 130, 96), (204, 170, 132))
    for row in range(6):
        y = horizon + row * row * 5
        ink.line((0, y, width, y), fill=(142, 106, 76))


PAINTERS = {
    "campus": paint_campus,
    "night": paint_night,
    "metro": paint_metro,
    "shop": paint_shop,
    "cctv": paint_cctv,
    "rain": paint_rain,
    "snow": paint_snow,
    "hall": paint_hall,
}


@functools.lru_cache(maxsize=32)
def light_map(width, height, slant):
    """A soft light from one side, as a factor of 255."""
    image = Image.new("L", (2, 2))
    bright, dark = 255, round(255 * (1.0 - abs(slant)))
    left, right = (bright, dark) if slant > 0 else (dark, bright)
    image.putdata([left, right, round(left * 0.94), round(right * 0.94)])
    return Image.merge("RGB", [image.resize((width, height), Image.Resampling.BILINEAR)] * 3)


@functools.lru_cache(maxsize=256)
def tone_curve(gain, cast, gamma, flat):
    """One lookup table of 768 entries: exposure, contrast, gamma and colour cast."""
    table = []
    for channel in range(3):
        for value in range(256):
            level = min(1.0, (value / 255) * gain * cast[channel]) ** gamma
            table.append(round(255 * (flat + (1 - 2 * flat) * level)))
    return table


def draw_weather(image, weather, rng):
    ink = ImageDraw.Draw(image)
    width, height = image.size
    if weather == "rain":
        for _ in range(26):
            x, y = rng.randrange(width), rng.randrange(height)
            ink.line((x, y, x - 4, y + 16), fill=(186, 198, 210))
    elif weather == "snow":
        for _ in range(34):
            x, y, r = rng.randrange(width), rng.randrange(height), rng.choice((1, 1, 2))
            ink.ellipse((x - r, y - r, x + r, y + r), fill=(250, 250, 252))


def draw_occluder(image, rng, kind):
    ink = ImageDraw.Draw(image)
    width, height = image.size
    if kind == "pole":
        x = rng.choice((rng.randint(0, width // 4), rng.randint(width * 3 // 4, width)))
        ink.rectangle((x - 5, 0, x + 5, height), fill=(92, 96, 98))
    elif kind == "bush":
        for _ in range(5):
            x, r = rng.randint(-5, width), rng.randint(16, 28)
            ink.ellipse((x - r, height - r, x + r, height + r), fill=(60, rng.randint(90, 120), 54))
    else:
        y = rng.randint(height * 3 // 4, height * 7 // 8)
        ink.rectangle(
            (0, y, width, height), fill=shade(rng.choice([(176, 140, 104), (134, 140, 146), (90, 94, 104)]), 1.0)
        )
        ink.line((0, y, width, y), fill=(60, 60, 60), width=3)


def draw_image(person, pose, camera, rng, size):
    """The finished picture: background, person, occlusion, weather, then what the lens and sensor do to it."""
    height, width = size[0] * SCALE, size[1] * SCALE
    scene = background(camera["style"], camera["variant"], width * 3, height)
    x = rng.randint(0, width * 2)
    image = scene.crop((x, 0, x + width, height))

    tall = height * camera["size"] * person["height"] * pose["zoom"]
    centre, ground = width * (0.5 + pose["shift"]), height * camera["ground"] + pose["drop"] * height
    figure = Figure((width, height), centre, ground, tall, camera["tilt"])
    draw_person(figure, person, pose)
    shadow = Image.new("L", (32, 8))
    ImageDraw.Draw(shadow).ellipse((2, 1, 29, 6), fill=110)
    shadow = shadow.resize((round(tall * 0.42), max(4, round(tall * 0.06))), Image.Resampling.BILINEAR)
    image.paste((20, 20, 26), (round(centre - shadow.width / 2), round(ground - shadow.height * 0.6)), shadow)
    body = ImageChops.multiply(figure.image, light_map(width, height, pose["slant"]))
    image.paste(body, (0, 0), figure.mask)
    if pose["occluder"]:
        draw_occluder(image, rng, pose["occluder"])
    draw_weather(image, camera["weather"], rng)

    image = image.reduce(SCALE)
    if camera["coarse"] > 1:
        small = (max(1, round(size[1] / camera["coarse"])), max(1, round(size[0] / camera["coarse"])))
        image = image.resize(small, Image.Resampling.BOX).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    elif camera["blur"]:
        image = image.filter(ImageFilter.BoxBlur(camera["blur"]))
    image = image.point(
        tone_curve(round(camera["gain"] * pose["exposure"], 2), camera["cast"], camera["gamma"], camera["flat"])
    )
    if camera["noise"]:
        image = add_noise(image, camera["noise"], rng)
    if camera["quality"]:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=camera["quality"])
        image = Image.open(buffer)
        image.load()
    return image


@functools.lru_cache(maxsize=16)
def noise_curve(amount):
    return [round(128 + (value - 127.5) * amount) for value in range(256)]


def add_noise(image, amount, rng):
    """Grain: the same seed gives the same grain on every machine."""
    grain = Image.frombytes("L", image.size, rng.randbytes(image.width * image.height)).point(noise_curve(amount))
    return ImageChops.add(image, Image.merge("RGB", [grain] * 3), 1.0, -128)

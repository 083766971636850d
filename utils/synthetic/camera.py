"""One camera's picture of a pedestrian: background, occlusion and weather, then the effects of lens and sensor.

Everything is drawn at twice the final size and reduced once, so edges are smooth.
"""

import functools
import io
import random

from PIL import Image, ImageChops, ImageDraw, ImageFilter

from utils.synthetic.person import COLOURS, Figure, draw_person, shade

SCALE = 2


@functools.lru_cache(maxsize=256)
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


def paint_clutter(ink, rng, width, height, horizon):
    """Random shapes and colours, used by no domain: for training to separate a person from the background."""

    def colour():
        return tuple(rng.randint(0, 255) for _ in range(3))

    fill(ink, (0, 0, width, horizon), colour(), colour())
    fill(ink, (0, horizon, width, height), colour(), colour())
    for _ in range(40):
        x, y, wide, tall = (rng.randint(0, limit) for limit in (width, height, 60, 90))
        draw = rng.choice((ink.rectangle, ink.ellipse))
        draw((x, y, x + wide, y + tall), fill=rng.choice((colour(), rng.choice(list(COLOURS.values())))))


PAINTERS = {
    "campus": paint_campus,
    "night": paint_night,
    "metro": paint_metro,
    "shop": paint_shop,
    "cctv": paint_cctv,
    "rain": paint_rain,
    "snow": paint_snow,
    "hall": paint_hall,
    "clutter": paint_clutter,
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


def place_of(person, pose, camera, size):
    """Where a person stands in a picture of (width, height): centre, ground, height in pixels, and the tilt."""
    width, height = size
    tall = height * camera["size"] * person["height"] * pose["zoom"]
    centre, ground = width * (0.5 + pose["shift"]), height * camera["ground"] + pose["drop"] * height
    return centre, ground, tall, camera["tilt"]


def draw_image(person, pose, camera, rng, size):
    """The finished picture: background, person, occlusion, weather, then the effects of lens and sensor."""
    height, width = size[0] * SCALE, size[1] * SCALE
    scene = background(camera["style"], camera["variant"], width * 3, height)
    x = rng.randint(0, width * 2)
    image = scene.crop((x, 0, x + width, height))

    place = place_of(person, pose, camera, (width, height))
    figure, centre, ground, tall = Figure((width, height), *place), *place[:3]
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

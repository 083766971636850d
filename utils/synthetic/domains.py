"""The domains of the synthetic world: a place, the clothes worn there, and four different cameras."""

INDOORS = ("in a metro station", "in a shop", "in an indoor hall")


def camera(style, variant, **changes):
    values = {
        "style": style,
        "variant": variant,
        "gain": 1.0,
        "gamma": 1.0,
        "cast": (1.0, 1.0, 1.0),
        "flat": 0.0,
        "size": 0.86,
        "ground": 0.95,
        "tilt": 0.05,
        "blur": 0.0,
        "coarse": 1.0,
        "noise": 0.06,
        "quality": 80,
        "occlusion": 0.10,
        "occluders": ("pole",),
        "weather": None,
        "views": (3, 3, 2, 2),
    }
    return values | changes


# The place in words; weights of the colours of upper and lower clothes and of `synthetic.UPPER_KINDS`; the cameras.
DOMAINS = {
    "a": {
        "place": "on a bright campus",
        "upper": {"white": 4, "blue": 3, "red": 3, "green": 2, "yellow": 2, "grey": 2, "pink": 2, "orange": 1},
        "lower": {"blue": 4, "black": 3, "beige": 2, "grey": 2},
        "kinds": (5, 3, 2, 0, 2),
        "cameras": [
            camera("campus", 0, gain=1.10, occluders=("bush", "pole")),
            camera("campus", 1, gain=0.78, cast=(0.92, 0.98, 1.10), tilt=0.10, size=0.80),
            camera("campus", 2, gain=1.25, cast=(1.12, 1.02, 0.84), flat=0.06, quality=55, occluders=("bush",)),
            camera("campus", 3, gain=0.95, cast=(0.95, 1.06, 0.92), blur=0.8, size=0.74, tilt=0.14, noise=0.10),
        ],
    },
    "b": {
        "place": "on a street at night",
        "upper": {"black": 4, "grey": 3, "white": 3, "purple": 2, "red": 2, "brown": 2, "blue": 2},
        "lower": {"black": 4, "grey": 3, "blue": 3, "brown": 2},
        "kinds": (2, 2, 5, 2, 3),
        "cameras": [
            camera("night", 0, gain=0.80, cast=(1.12, 0.98, 0.76), noise=0.20, quality=60),
            camera("night", 1, gain=0.66, cast=(0.86, 0.94, 1.20), noise=0.26, quality=55, tilt=0.10),
            camera("night", 2, gain=0.92, cast=(1.20, 0.94, 0.68), blur=0.7, noise=0.16, size=0.78),
            camera("night", 3, gain=0.60, gamma=0.86, flat=0.05, noise=0.30, quality=45, size=0.90),
        ],
    },
    "c": {
        "place": "in a metro station",
        "upper": {"black": 4, "blue": 3, "beige": 3, "green": 2, "grey": 3, "orange": 1, "purple": 1, "white": 2},
        "lower": {"black": 5, "blue": 3, "beige": 2, "brown": 1},
        "kinds": (2, 4, 4, 3, 2),
        "cameras": [
            camera("metro", 0, cast=(0.94, 1.08, 0.86), tilt=0.14, occlusion=0.2, occluders=("bar", "pole")),
            camera("metro", 1, gain=0.80, cast=(1.08, 1.06, 0.80), tilt=0.18, size=0.80, quality=50),
            camera("metro", 2, gain=1.15, cast=(0.90, 1.02, 1.04), flat=0.08, blur=0.9, occluders=("bar",)),
            camera("metro", 3, gain=0.70, cast=(1.0, 1.10, 0.90), noise=0.18, coarse=1.5, tilt=0.10),
        ],
    },
    "d": {
        "place": "in a shop",
        "upper": {"pink": 3, "white": 4, "red": 3, "yellow": 2, "black": 3, "beige": 2, "green": 2, "blue": 2},
        "lower": {"blue": 4, "black": 3, "white": 2, "pink": 1, "grey": 2},
        "kinds": (4, 4, 2, 1, 3),
        "cameras": [
            camera("shop", 0, cast=(1.10, 1.0, 0.84), tilt=0.18, occlusion=0.35, occluders=("bar",)),
            camera("shop", 1, gain=1.22, cast=(1.06, 1.0, 0.90), flat=0.05, tilt=0.22, size=0.80),
            camera("shop", 2, gain=0.76, cast=(1.16, 0.98, 0.76), tilt=0.12, occlusion=0.35, occluders=("bar",)),
            camera("shop", 3, gain=0.98, cast=(0.92, 1.0, 1.08), coarse=1.6, quality=60, tilt=0.26, size=0.78),
        ],
    },
    "e": {
        "place": "on a square seen from above",
        "upper": {"grey": 3, "black": 4, "white": 3, "blue": 3, "brown": 2, "red": 2, "yellow": 1, "purple": 1},
        "lower": {"black": 4, "blue": 3, "grey": 3, "beige": 2},
        "kinds": (3, 3, 3, 2, 3),
        "cameras": [
            camera("cctv", 0, tilt=0.36, size=0.74, coarse=1.8, quality=50, flat=0.10, cast=(0.98, 1.0, 0.96)),
            camera("cctv", 1, tilt=0.42, size=0.70, coarse=2.0, quality=45, flat=0.12, gain=0.84, noise=0.12),
            camera(
                "cctv", 2, tilt=0.32, size=0.78, coarse=1.6, quality=40, flat=0.08, gain=1.16, cast=(1.06, 1.0, 0.88)
            ),
            camera("cctv", 3, tilt=0.40, size=0.72, coarse=2.2, quality=55, flat=0.14, cast=(0.90, 0.98, 1.08)),
        ],
    },
    "f": {
        "place": "on a street in the rain",
        "upper": {
            "yellow": 3,
            "blue": 3,
            "black": 3,
            "green": 3,
            "red": 2,
            "grey": 2,
            "purple": 2,
            "orange": 2,
            "brown": 2,
        },
        "lower": {"black": 3, "blue": 3, "grey": 2, "brown": 2, "green": 1, "beige": 1, "white": 1},
        "kinds": (3, 3, 4, 3, 3),
        "cameras": [
            camera("rain", 0, gain=0.92, cast=(0.92, 1.0, 1.08), weather="rain"),
            camera("rain", 1, gain=0.78, flat=0.08, weather="rain", tilt=0.16, size=0.80, quality=60),
            camera("rain", 2, gain=1.06, cast=(0.96, 1.02, 1.06), weather="rain", blur=0.8, noise=0.12),
            camera("rain", 3, gain=0.66, cast=(1.10, 0.98, 0.80), weather="rain", noise=0.22, quality=50),
        ],
    },
    "g": {
        "place": "in the snow",
        "upper": {
            "red": 3,
            "white": 2,
            "orange": 2,
            "pink": 3,
            "purple": 3,
            "blue": 2,
            "black": 2,
            "beige": 2,
            "green": 2,
        },
        "lower": {"black": 3, "grey": 3, "blue": 2, "white": 2, "purple": 1, "red": 1, "brown": 1},
        "kinds": (3, 3, 4, 4, 3),
        "cameras": [
            camera("snow", 0, gain=1.12, weather="snow"),
            camera("snow", 1, gain=0.84, cast=(0.92, 0.98, 1.10), weather="snow", tilt=0.12, size=0.78),
            camera("snow", 2, gain=1.0, cast=(1.10, 1.0, 0.86), weather="snow", flat=0.06, quality=55),
            camera("snow", 3, gain=0.94, weather="snow", coarse=1.6, tilt=0.30, size=0.76),
        ],
    },
    "h": {
        "place": "in an indoor hall",
        "upper": {
            "white": 3,
            "beige": 2,
            "brown": 2,
            "pink": 2,
            "yellow": 3,
            "grey": 3,
            "orange": 3,
            "green": 2,
            "blue": 2,
        },
        "lower": {"blue": 3, "beige": 3, "white": 2, "black": 2, "pink": 2, "yellow": 1, "orange": 1},
        "kinds": (4, 4, 3, 2, 3),
        "cameras": [
            camera("hall", 0, cast=(1.10, 1.0, 0.84), occlusion=0.2, occluders=("bar", "pole")),
            camera("hall", 1, gain=0.72, cast=(1.06, 1.0, 0.90), tilt=0.20, size=0.80),
            camera("hall", 2, gain=1.28, cast=(1.04, 1.02, 0.92), flat=0.08, quality=60, tilt=0.12),
            camera("hall", 3, gain=0.90, cast=(0.96, 1.08, 0.92), blur=0.8, noise=0.16, tilt=0.26, size=0.76),
        ],
    },
}

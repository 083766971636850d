"""The built-in world: drawn pedestrians in drawn places. `python -m utils.synthetic` draws a sheet of them.

`rows` lists the images of a domain, `render` draws one, `attributes` and `describe` give its true attributes.
"""

from utils import opened_when_used

__getattr__ = opened_when_used(
    __name__,
    {
        "world": (
            "SIZE VIEWS attributes caption camera_of check_request describe file_name rows "
            "parse_name appearance pose_of render tint HATS HAIR_KINDS CARRIED_KINDS LOWER_KINDS "
            "PATTERNS UPPER_KINDS PROTOCOL SyntheticFileSystem"
        ),
        "person": "COLOURS",
        "domains": "DOMAINS INDOORS",
        "__main__": "contact_sheet main",
    },
)

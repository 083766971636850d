"""What a score says, measured on labelled data; `calibration.json`, by which a search decides.

For others: `calibrate`, `calibration_lines`, and the file's `fingerprint`, `calibration_path`, `read_calibration`,
`calibration_of`, `write_calibration`.
"""

from utils import opened_when_used

__getattr__ = opened_when_used(
    __name__,
    {
        "rates": "FALSE_ALARM_RATES FALSE_MATCH_RATES calibrate calibration_lines",
        "stored": "CALIBRATION calibration_of calibration_path fingerprint read_calibration write_calibration",
    },
)

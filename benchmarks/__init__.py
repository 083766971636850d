"""Measurements, by what they measure: speed, memory, quality, robustness; `common` holds what they share.

`python -m benchmarks.ROOM.NAME` runs one of them and writes `results/NAME.json`; README.md shows all tables.
"""

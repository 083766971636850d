"""Measurements: speed, memory, quality of trainings, evaluation, generated sets, robustness; `common` is for all.

`python -m benchmarks.ROOM.NAME` runs one of them and writes `results/NAME.json`; README.md shows all tables.
"""

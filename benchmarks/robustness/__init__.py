"""Kills, full disks and unusable folders: what a long job loses when it is stopped.

`jobs` lists the jobs, `runner` starts and kills them, `checks` compares their results, `faults` is the command.
"""

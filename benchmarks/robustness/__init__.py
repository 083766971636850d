"""Kills, full disks and unusable folders: what a long job loses when it is stopped; and both chains end to end.

The commands are `faults` and `chain`. `jobs` lists the jobs, `runner` starts and kills them, `checks` compares them.
"""

"""What the numbers of evaluate.py are worth: thresholds, their intervals, groups, and photographs of real people."""

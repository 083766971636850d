"""Generated sets: captions and images are made, then scored, chosen and written as a data set."""

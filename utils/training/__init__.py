"""What training loops need: the loop, optimiser and rate, checkpoints, clustering, reports."""

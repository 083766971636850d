"""mAP, Rank-1, AUC and accuracy on the built-in world, over several seeds: whether the methods learn."""

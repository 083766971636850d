"""mAP and Rank-1 of the trainings on the built-in world, over several seeds: whether the methods learn."""

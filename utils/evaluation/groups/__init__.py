"""Identities across cameras: clusters of images and tracklets, scores of a grouping, and its report."""

"""Seconds and images a second: retrieval, clustering, loading, training, generation, filtering.

`reid_features` makes the features that the retrieval and clustering benchmarks rank and cluster.
"""

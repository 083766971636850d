"""Synthetic features at the sizes of public re-identification sets: unit rows of 512 numbers, mAP 0.5 to 0.65.

    python -m benchmarks.speed.reid_features M features.npz

S is small, M has the size of Market-1501, L that of MSMT17. An identity is a direction near that of its group, whose
members are hard to tell apart. A camera moves all its images in one direction. Each image has noise of its own
strength.
"""

import argparse

import numpy as np

# Queries, gallery images, identities, cameras, share of gallery images of other identities.
SIZES = {"S": (500, 3000, 120, 6, 0.175), "M": (3368, 15913, 750, 6, 0.175), "L": (11659, 82161, 3060, 15, 0.0)}
DEPTH = 512
GROUP_WEIGHT, CAMERA_WEIGHT, NOISE_WEIGHT, NOISE_SPREAD = 0.8, 0.65, 1.3, 0.35
IDS_PER_GROUP = 15


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def directions(generator, count):
    return unit(generator.standard_normal((count, DEPTH), dtype=np.float32))


def reid_features(size, seed=0):
    """A dictionary of queries, gallery (float32) and query_pids, gallery_pids, query_cams, gallery_cams (int64).

    `size` is a name of SIZES or numbers such as theirs.
    """
    num_queries, num_gallery, num_ids, num_cams, strangers = SIZES.get(size, size)
    generator = np.random.default_rng(seed)
    groups = directions(generator, max(8, num_ids // IDS_PER_GROUP))
    cameras = CAMERA_WEIGHT * directions(generator, num_cams)

    def people(count):
        near = groups[generator.integers(0, len(groups), count)]
        return unit(GROUP_WEIGHT * near + directions(generator, count))

    def images(centres, cams):
        strength = NOISE_WEIGHT * np.exp(NOISE_SPREAD * generator.standard_normal((len(centres), 1), dtype=np.float32))
        return unit(centres + cameras[cams] + strength * directions(generator, len(centres))).astype(np.float32)

    # A query is one identity in front of one camera, each pair once; every identity has at least one query.
    views = generator.permuted(np.tile(np.arange(num_cams), (num_ids, 1)), axis=1)
    query_pids = np.tile(np.arange(num_ids), num_cams)[:num_queries]
    query_cams = views.T.reshape(-1)[:num_queries]

    # Identities have many or few gallery images, as in real sets.
    frequency = generator.gamma(2.0, 1.0, num_ids) + 0.3
    num_strangers = int(strangers * num_gallery)
    gallery_pids = generator.choice(num_ids, num_gallery - num_strangers, p=frequency / frequency.sum())
    centres = people(num_ids)
    gallery_centres = np.concatenate([centres[gallery_pids], people(num_strangers)])
    gallery_pids = np.concatenate([gallery_pids, np.full(num_strangers, -1)])
    order = generator.permutation(num_gallery)
    gallery_cams = generator.integers(0, num_cams, num_gallery)
    return {
        "queries": images(centres[query_pids], query_cams),
        "gallery": images(gallery_centres[order], gallery_cams),
        "query_pids": query_pids.astype(np.int64),
        "gallery_pids": gallery_pids[order].astype(np.int64),
        "query_cams": query_cams.astype(np.int64),
        "gallery_cams": gallery_cams.astype(np.int64),
    }


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("output")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(args)
    np.savez(args.output, **reid_features(args.size, args.seed))


if __name__ == "__main__":
    main()

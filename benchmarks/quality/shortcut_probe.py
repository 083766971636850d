"""Whether a model's features follow the person or the place: drawn people at their own home and at another's.

    python -m benchmarks.quality.shortcut_probe output/dcac/model

Of each pair of people p and q, who were not trained on: p at home, p at the home of q, and q at the home of p. The
model looks at the person if the two images of p are more alike than the two images of that one place.
"""

import argparse
from itertools import pairwise

import torch

from utils.modeling import ReIDModel
from utils.synthetic.domains import DOMAINS
from utils.synthetic.world import render

# Training sets have even numbers.
PEOPLE = range(1, 257, 2)


def at_home_of(domain, person, host, index):
    """A picture of a person where the images of another are, in a world with a shortcut."""
    return render(domain, person, len(DOMAINS[domain]["cameras"]) + host, index)


def person_over_place(model, domain="a", people=PEOPLE):
    """{person: share of pairs in which the person counts more, same_person, same_place: mean cosines}."""
    images = [
        at_home_of(domain, *who, index)
        for p, q in pairwise(people)
        for index, who in enumerate(((p, p), (p, q), (q, p)))
    ]
    features = torch.nn.functional.normalize(model.extract(images), dim=1).view(-1, 3, model.num_features)
    same_person, same_place = ((features[:, 0] * features[:, other]).sum(1) for other in (1, 2))
    found = {"person": (same_person > same_place).double(), "same_person": same_person, "same_place": same_place}
    return {name: float(values.mean()) for name, values in found.items()}


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a ReIDModel folder")
    parser.add_argument("--domain", default="a", choices=sorted(DOMAINS), help="whose people; default a")
    args = parser.parse_args(input_args)
    found = person_over_place(ReIDModel.open(args.model), args.domain)
    print(", ".join(f"{name} {value:.3f}" for name, value in found.items()))


if __name__ == "__main__":
    main()

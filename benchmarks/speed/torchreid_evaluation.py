"""torchreid's own evaluation of a set in Market-1501's layout; runs in the peers' environment, see end_to_end.py.

`torchreid_evaluation.py ROOT WEIGHTS [--rerank]`; with --make it writes the weights: a random OSNet x0.25, whose norms
have the averages of the set's queries.
"""

import argparse
import json
import warnings

import torch

with warnings.catch_warnings():
    # That its compiled ranking is missing.
    warnings.simplefilter("ignore")
    from torchreid.reid import data, engine, models


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("root")
    parser.add_argument("weights")
    parser.add_argument("--rerank", action="store_true")
    parser.add_argument("--make", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    images = data.ImageDataManager(root=args.root, sources="market1501", use_gpu=False, batch_size_test=64, workers=0)
    loaders = images.test_loader["market1501"]
    model = models.build_model("osnet_x0_25", num_classes=4, pretrained=False)
    if args.make:
        # With the averages of new norms the features of all images are nearly the same.
        for module in model.modules():
            if hasattr(module, "running_var"):
                module.momentum = None
        with torch.no_grad():
            for batch in loaders["query"]:
                model(batch["img"])
        torch.save(model.state_dict(), args.weights)
        return
    model.load_state_dict(torch.load(args.weights, weights_only=True))
    run = engine.ImageSoftmaxEngine(images, model, torch.optim.SGD(model.parameters(), lr=0.1), use_gpu=False)
    model.eval()
    # With unit features its squared distances rank as cosines do.
    with torch.no_grad():
        first, mean = run._evaluate("market1501", *loaders.values(), normalize_feature=True, rerank=args.rerank)
    print(json.dumps({"mAP": float(mean), "rank1": float(first)}))


if __name__ == "__main__":
    main()

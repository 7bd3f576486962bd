"""What does a noise set do to a comparison of OOD detectors?

    python experiments/detectors.py --checkpoint seed0.pth seed1.pth --ood-types gaussian svhn

Takes the options of test.py. Scores its sets with 21 detectors of pytorch-ood at their defaults;
nothing is tuned on OOD data. What needs fitting is fitted on the training images, not augmented.
Prints AUROCs, on how many networks each detector is better than MaxSoftmax, and how the detectors'
ranks correlate between sets, and between noises and images; writes results/detectors.json, or into
--output.
"""

import copy
import json
import sys
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
from pytorch_ood import detector as library
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ood_data
import ood_utils
import test as evaluation
import train
from experiments.compare import print_table, spread

RESULTS = Path(__file__).resolve().parent.parent / "results"
NOISES, IMAGES = "mean of noises", "mean of images"
SAME_AS = {  # what test.py calls the same score
    "MaxSoftmax": "msp",
    "MaxLogit": "max_logit",
    "EnergyBased": "energy",
    "Entropy": "entropy",
    "GEN": "gen",
}


def build_detectors(model, last):
    """{name: detector}, not yet fitted; all but ODIN get what enters or leaves the last layer."""
    head = nn.Sequential(nn.Flatten(), last)  # takes feature maps of 1x1
    return {
        "MaxSoftmax": library.MaxSoftmax(None),
        "MaxLogit": library.MaxLogit(None),
        "EnergyBased": library.EnergyBased(None),
        "Entropy": library.Entropy(None),
        "GEN": library.GEN(None),
        "TemperatureScaling": library.TemperatureScaling(None),
        "KLMatching": library.KLMatching(None),
        "ODIN": library.ODIN(model),
        "ReAct": library.ReAct(None, head),
        "ASH": library.ASH(None, head),
        "SCALE": library.SCALE(None, head),
        "VRA": library.VRA(None, head),
        "DICE": library.DICE(None, last.weight, last.bias, p=0.9),  # has no default: OpenOOD's
        "ViM": library.ViM(None, 256, last.weight, last.bias),  # has no default: half of 512
        "KNN": library.KNN(None),
        "Mahalanobis": library.Mahalanobis(None),
        "RMD": library.RMD(None),
        "SHE": library.SHE(None, last),
        "fDBD": library.fDBD(None, last),
        "NNGuide": library.NNGuide(None, last),
        "NCI": library.NCI(None, last),
    }


def represent(model, last, loader):
    """What a detector may take, on the CPU: {name: float32 (N, ...)}."""
    features = ood_utils.get_features(model, loader)
    maps = features[:, :, None, None]
    return {"logits": last(features), "features": features, "feature_maps": maps}


def fit(detector, inputs, labels):
    for name, values in inputs.items():
        if hasattr(detector, f"fit_{name}"):
            getattr(detector, f"fit_{name}")(values, labels)


def score(detector, inputs, loader):
    """Scores float64 (N,), higher for in-distribution: the library's point the other way."""
    taken = [name for name in inputs if hasattr(detector, f"predict_{name}")]
    if taken:
        (name,) = taken
        predict = getattr(detector, f"predict_{name}")
        batches = inputs[name].split(1000)
    else:  # ODIN
        predict = detector.predict
        batches = (images for images, _ in loader)
    outlier_scores = [predict(batch).detach().cpu() for batch in batches]
    return -torch.cat(outlier_scores).double()


def get_aurocs(scores):
    """{set: AUROC in percent} of {set: scores (N,)}, the closed set's among them."""
    closed = scores[evaluation.CLOSED]
    others = {name: values for name, values in scores.items() if name != evaluation.CLOSED}
    return {
        name: 100 * ood_utils.get_performance(closed, values)[0] for name, values in others.items()
    }


def compare(config):
    """Score every set with every detector; print the tables, write and return the JSON."""
    config = ood_utils.check(config)
    options = {"data_root": config.data_root, "batch_size": config.batch_size}
    results = {"checkpoints": [], "rows": []}
    for path in evaluation.find_checkpoints(config):
        model, loaders, described = evaluation.load(config, path)
        results["checkpoints"].append(described["checkpoint"])
        if results.setdefault("config", described["config"]) != described["config"]:
            raise ood_utils.InputError(f"{path} was trained on another data set: pass --dataset.")
        if len(loaders) == 1:
            skipped = "; ".join(described["skipped"].values())
            raise ood_utils.InputError(f"No OOD set to compare on: pass --ood-types. {skipped}")
        options["device"] = loaders[evaluation.CLOSED].images.device
        held_out = 0
        if config.split == "validation":
            held_out = described["training"]["config"]["validation"]
        dataset = described["config"]["dataset"]
        training = train.get_loader(True, dataset, False, held_out, **options)
        last = copy.deepcopy(ood_utils.last_layer(model)).cpu().requires_grad_(False)
        to_fit = represent(model, last, training)
        sets = {name: represent(model, last, loader) for name, loader in loaders.items()}
        for name, detector in tqdm(build_detectors(model, last).items(), path.stem, disable=None):
            try:
                fit(detector, to_fit, training.labels.cpu())
            except ValueError as error:  # SHE needs a correct prediction of every class
                print(f"note: {name} is left out of {path}: {error}", file=sys.stderr)
                continue
            aurocs = get_aurocs({key: score(detector, sets[key], loaders[key]) for key in sets})
            ours = {}
            if name in SAME_AS:
                our_score = ood_utils.SCORES[SAME_AS[name]]
                ours = get_aurocs({key: our_score(sets[key]["logits"].double()) for key in sets})
            for key, auroc in aurocs.items():
                row = {"checkpoint": str(path), "set": key, "detector": name, "auroc": auroc}
                results["rows"].append(row | {"auroc_of_test_py": ours.get(key)})
    results |= {name: described[name] for name in ("device", "versions", "skipped")}
    results["versions"]["pytorch-ood"] = version("pytorch-ood")
    print_tables(results)
    file = (config.output or RESULTS) / "detectors.json"
    ood_utils.write_file(file, json.dumps(results, indent=1).encode())
    return results


def print_tables(results):
    """AUROC, wins, correlations of ranks (Spearman's), and the differences to test.py's scores."""
    rows = pd.DataFrame(results["rows"])
    kind = rows["set"].isin(list(ood_data.NOISES)).map({True: NOISES, False: IMAGES})
    keys = ["checkpoint", "set", "detector"]
    means = rows.assign(set=kind).groupby(keys, sort=False)["auroc"].mean().reset_index()
    table = pd.concat([rows, means])
    table = table.pivot_table("auroc", "detector", "set", spread, sort=False)
    print_table(table, "AUROC")

    aurocs = rows.pivot_table("auroc", ["checkpoint", "set"], "detector", sort=False)
    wins = aurocs.gt(aurocs["MaxSoftmax"], axis=0).groupby("set", sort=False).sum().T
    wins = wins.drop("MaxSoftmax").astype(str)
    count = rows["checkpoint"].nunique()
    print_table(wins, f"networks, of {count}, on which it is above MaxSoftmax")

    order = list(rows["set"].unique())
    ranks = rows.pivot_table("auroc", "detector", "set")[order].rank()
    print_table(ranks.corr().map("{:.2f}".format), "correlation of ranks")

    correlations = []
    for _, of_network in means.groupby("checkpoint"):
        ranks = of_network.pivot_table("auroc", "detector", "set").rank()
        if ranks.shape[1] == 2:
            correlations.append(ranks[NOISES].corr(ranks[IMAGES]))
    if correlations:
        print("Correlation of the detectors' ranks by the mean of noises with those by the mean")
        print(f"of images (Spearman), by network: {spread(correlations)}\n")

    rows["difference"] = (rows["auroc"] - rows["auroc_of_test_py"]).round(2) + 0.0  # no -0.00
    same = rows.dropna(subset="difference")
    differences = same.pivot_table("difference", "detector", "set", spread, sort=False)
    print_table(differences, "AUROC minus that of test.py's score of the name")
    for name, reason in results["skipped"].items():
        print(f"skipped {name}: {reason}")


if __name__ == "__main__":
    ood_utils.run_command(compare, evaluation.Config)

"""Why is the published error rate higher than that of these runs?

    python experiments/published_test_pass.py --checkpoint seed0.pth seed1.pth

Takes the options of test.py. The published script tests after every epoch, but in train mode, and
saves after that: its checkpoint has the batch-norm statistics of the test pass. Here each network
gets one such pass, in batches of 128, over the test images in their order and in two others, and is
evaluated. Prints the figures before, after and as published; writes
results/published_test_pass.json, or into --output.
"""

import copy
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ood_data
import ood_utils
import test as evaluation
from experiments.compare import print_table, spread

RESULTS = Path(__file__).resolve().parent.parent / "results"
BATCH_SIZE = 128
ORDERS = 3  # of the test images: that of the data set, and shuffled ones
BEFORE = "none"
METRICS = {"auroc": "AUROC", "aupr": "AUPR", "fpr95": "FPR95"}


@torch.no_grad()
def published_test_pass(model, images, order):
    """One pass whose outputs nobody needs: it leaves its batch-norm statistics behind.

    With momentum 0.1, 79 batches keep 0.02% of the training's; the last batch has 16 images.
    """
    model.train()
    for batch in torch.from_numpy(order).to(images.device).split(BATCH_SIZE):
        model(ood_data.normalise(images[batch]))
    model.eval()


def ask(config):
    """Evaluate every network before and after; print the table, write and return the JSON."""
    config = ood_utils.check(config)
    results = {"checkpoints": [], "rows": []}
    for path in evaluation.find_checkpoints(config):
        network, loaders, described = evaluation.load(config, path)
        results["checkpoints"].append(described["checkpoint"])
        if results.setdefault("config", described["config"]) != described["config"]:
            raise ood_utils.InputError(f"{path} was trained on another data set: pass --dataset.")
        images = loaders[evaluation.CLOSED].images
        if len(images) % BATCH_SIZE == 1:
            raise ood_utils.InputError("Batch norm cannot be trained on a last batch of one image.")
        orders = {BEFORE: None, "order 0": np.arange(len(images))}
        for seed in range(1, ORDERS):
            orders[f"order {seed}"] = np.random.default_rng(seed).permutation(len(images))
        for name, order in orders.items():
            model = copy.deepcopy(network)
            if order is not None:
                published_test_pass(model, images, order)
            scores, predictions = evaluation.score_sets(model, loaders)
            figures = evaluation.measure(scores, predictions, loaders)
            of_pass = {"checkpoint": str(path), "test_pass": name}
            of_pass["error_rate"] = figures["error_rate"]
            results["rows"] += [of_pass | row for row in figures["rows"]]
    results |= {name: described[name] for name in ("device", "versions", "skipped")}
    results["config"]["score"] = config.score
    print_tables(results)
    file = (config.output or RESULTS) / "published_test_pass.json"
    ood_utils.write_file(file, json.dumps(results, indent=1).encode())
    return results


def by_pass(rows, figure):
    """A figure as a table: a row a network, a column a test pass."""
    return rows.pivot(index="checkpoint", columns="test_pass", values=figure).astype(float)


def summarise(values, published=None):
    """A line of the table; values: what by_pass returns."""
    after = values.drop(columns=BEFORE)
    low, high = after.min(axis=None), after.max(axis=None)
    line = {
        "before": spread(values[BEFORE]),
        "after": spread(after.mean(axis=1)),
        "between orders": f"{(after.max(axis=1) - after.min(axis=1)).mean():.2f}",
        "after, range": f"{low:.2f} to {high:.2f}",
    }
    if published is None:
        return line | {"published": "", "in the range": ""}
    outside_by = max(low - published, published - high)
    inside = "yes" if outside_by <= 0 else f"no, by {outside_by:.2f}"
    return line | {"published": f"{published:.2f}", "in the range": inside}


def print_tables(results):
    """A line a figure; the range is over networks and orders, "between orders" within a network."""
    rows = pd.DataFrame(results["rows"])
    rows = rows[rows["score"] == results["config"]["score"]]
    published = json.loads((RESULTS / "published.ood.json").read_text())
    known = {(row["set"], row["score"]): row for row in published["rows"]}
    if results["config"]["dataset"] != "cifar100":
        published, known = {}, {}
    split = rows[rows["set"] == evaluation.RIGHT_WRONG]
    lines = {"error rate": summarise(by_pass(split, "error_rate"), published.get("error_rate"))}
    for name, of_set in rows.groupby("set", sort=False):
        row = known.get((name, results["config"]["score"]), {})
        for metric, title in METRICS.items():
            lines[f"{name}, {title}"] = summarise(by_pass(of_set, metric), row.get(metric))
    print_table(pd.DataFrame(lines).T, "test pass in train mode")
    for name, reason in results["skipped"].items():
        print(f"skipped {name}: {reason}")


if __name__ == "__main__":
    ood_utils.run_command(ask, evaluation.Config)

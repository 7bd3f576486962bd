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
    config.output = config.output or str(RESULTS)
    results, networks, loaders = evaluation.load(config)
    images = loaders[evaluation.CLOSED].images
    if len(images) % BATCH_SIZE == 1:
        raise ood_utils.InputError("Batch norm cannot be trained on a last batch of one image.")
    orders = {BEFORE: None, "order 0": np.arange(len(images))}
    for seed in range(1, ORDERS):
        orders[f"order {seed}"] = np.random.default_rng(seed).permutation(len(images))
    labels = loaders[evaluation.CLOSED].labels.cpu().numpy()
    results["rows"] = []
    for path, network in networks.items():
        for name, order in orders.items():
            model = copy.deepcopy(network)
            if order is not None:
                published_test_pass(model, images, order)
            run, rows, _ = evaluation.measure_run(
                path, *evaluation.score_sets(model, loaders), labels
            )
            of_pass = {"test_pass": name, "error_rate": run["error_rate"]}
            results["rows"] += [row | of_pass for row in rows]
    print_tables(results)
    file = Path(config.output).expanduser() / "published_test_pass.json"
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
        "before": evaluation.spread(values[BEFORE]),
        "after": evaluation.spread(after.mean(axis=1)),
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
    rows = evaluation.shown_rows(results)
    on_cifar100 = results["config"]["dataset"] == "cifar100" and results["config"]["score"] == "msp"
    published = evaluation.PUBLISHED if on_cifar100 else {}
    error_rate = evaluation.PUBLISHED_ERROR_RATE if published else None
    split = rows[rows["set"] == evaluation.SPLIT]
    lines = {"error rate": summarise(by_pass(split, "error_rate"), error_rate)}
    for name, of_set in rows.groupby("set", sort=False):
        known = published.get(name, [None] * len(METRICS))
        for (metric, title), figure in zip(METRICS.items(), known, strict=True):
            lines[f"{name}, {title}"] = summarise(by_pass(of_set, metric), figure)
    evaluation.print_table(pd.DataFrame(lines).T, "test pass in train mode")
    for name, reason in results["skipped"].items():
        print(f"skipped {name}: {reason}")


if __name__ == "__main__":
    ood_utils.run_command(ask, evaluation.Config)

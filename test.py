"""Evaluate a checkpoint of train.py: closed-set error, and how well a score tells OOD sets from the closed set.

    python test.py                                                  # cifar100_resnet18.pth against OOD_TYPES
    python test.py --ood-types gaussian photos ~/pictures           # other sets, or a folder of images
    python test.py --checkpoint seed0.pth seed1.pth seed2.pth       # mean and sample standard deviation
    python test.py --table results/cifar100_seed0.ood.json          # the tables of an earlier evaluation again

Prints, in percent, the error rate, the score's performance on correctly classified images (positive) against
misclassified ones, then on the closed set (positive) against each OOD set; then the same figures in both conventions,
and all scores side by side. Writes beside the checkpoint, for cifar100_resnet18.pth,
    cifar100_resnet18.ood.json    every figure of every set and score, and what they depend on
    cifar100_resnet18.ood.npz     the scores themselves, labels and predictions: any other metric needs no GPU
    cifar100_resnet18.ood.png     histograms and ROC curves
Exit status 1 if an OOD set had to be skipped.
"""

import hashlib
import io
import json
import sys
from pathlib import Path

import numpy as np

from ood_data import DATA_ROOT, DATASET, EVAL_BATCH_SIZE, SEED, build_ood_loader, check_ood_type
from ood_utils import (
    SCORES,
    InputError,
    aurc,
    checkpoint_path,
    describe,
    get_logits,
    get_performance,
    load_file,
    pick_device,
    print_performance,
    run_command,
    write_file,
)
from train import build_network, get_loader

OOD_TYPES = ("gaussian", "rademacher", "blob", "svhn")  # any of ood_data.py's, or paths of folders
SCORE = "msp"  # any of ood_utils.py's: what the report and the picture show
OOD_SHARE = 5  # one OOD image for so many test images: the chance level of AUPR depends on it
SPLIT = "right / wrong"  # the row of correctly classified images against misclassified ones
PUBLISHED = {  # with this experiment: one run on CIFAR-100 with MSP; AUROC / AUPR / FPR95, in-distribution positive
    "error rate": "46.30",
    SPLIT: "81.98 / 85.74 / 73.39",
    "gaussian": "68.16 / 92.93 / 99.40",
    "rademacher": "69.91 / 93.18 / 96.15",
    "blob": "68.06 / 92.75 / 97.55",
    "svhn": "66.97 / 91.65 / 89.05",
}


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def measure(pos, neg):
    """Metrics in percent of positive against negative scores, in both conventions; None when a group is empty."""
    if not len(pos) or not len(neg):
        return None
    auroc, aupr, fpr95 = get_performance(pos, neg)
    _, aupr_out, fpr95_out = get_performance(-neg, -pos)  # the negative class (OOD, wrong) as the positive one
    figures = dict(auroc=auroc, aupr=aupr, fpr95=fpr95, chance_aupr=len(pos) / (len(pos) + len(neg)))
    figures |= dict(aupr_out=aupr_out, fpr95_out=fpr95_out, chance_aupr_out=len(neg) / (len(pos) + len(neg)))
    return {name: 100 * value for name, value in figures.items()}


def evaluate_network(model, test_loader, ood_loaders):
    """One forward pass over every set: raw scores, and every metric of every score.

    Returns (run, labels, scores). run["sets"][set][score] is measure()'s dict, for SPLIT and each OOD set. labels holds
    the closed set's labels and predictions, int64 (N,); scores, for the closed set and each OOD set, (N, len(SCORES)).
    """
    logits, labels = get_logits(model, test_loader)
    labels = {"labels": labels.numpy(), "predictions": logits.argmax(1).numpy()}
    all_logits = {"closed set": logits} | {name: get_logits(model, loader)[0] for name, loader in ood_loaders.items()}
    scores = {
        name: np.stack([score(logits.double()).numpy() for score in SCORES.values()], axis=1)
        for name, logits in all_logits.items()
    }
    closed, correct = scores["closed set"], labels["labels"] == labels["predictions"]
    groups = {SPLIT: (closed[correct], closed[~correct])} | {name: (closed, scores[name]) for name in ood_loaders}
    run = {
        "error_rate": 100 * (1 - correct.mean()),
        "aurc": {score: 100 * aurc(closed[:, i], correct) for i, score in enumerate(SCORES)},
        "counts": {name: [len(pos), len(neg)] for name, (pos, neg) in groups.items()},
        "sets": {
            name: {score: measure(pos[:, i], neg[:, i]) for i, score in enumerate(SCORES)}
            for name, (pos, neg) in groups.items()
        },
    }
    return run, labels, scores


def summarise(values):
    """Mean and sample standard deviation (ddof 1; None for one run) over runs."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std}


def summarise_runs(runs):
    """summarise() of every figure: the shape of a run, without its counts; None where a run has no such figure."""

    def walk(nodes):
        if any(node is None for node in nodes):
            return None
        if isinstance(nodes[0], dict):
            return {key: walk([node[key] for node in nodes]) for key in nodes[0]}
        return summarise(nodes)

    return walk([{key: run[key] for key in ("error_rate", "aurc", "sets")} for run in runs])


# ---------------------------------------------------------------------------------------------------------------------
# Report


def print_report(run, score, skipped, ood_types):
    """The report of the published experiment: in-distribution, or correctly classified, is the positive class."""
    print(f"Error Rate {run['error_rate']:.4f}")
    if figures := run["sets"][SPLIT][score]:
        print_performance(figures["auroc"], figures["aupr"], figures["fpr95"])
    else:
        missing = "misclassified" if run["counts"][SPLIT][1] == 0 else "correctly classified"
        print(f"AUROC: n/a, AUPR: n/a, FPR95: n/a (no {missing} test image)")
    for name in ood_types:
        print(f"ood type: {name}")
        if name in skipped:
            print(f"skipped: {skipped[name]}")
        else:
            figures = run["sets"][name][score]
            print_performance(figures["auroc"], figures["aupr"], figures["fpr95"])


def cell(figure, with_std=True):
    """A figure of the summary as text: mean, with the standard deviation where there are several runs."""
    if figure is None:
        return "n/a"
    return f"{figure['mean']:.2f}" + (f" +- {figure['std']:.2f}" if with_std and figure["std"] is not None else "")


def print_table(rows):
    """Rows of cells as a Markdown table whose source is aligned too: first column to the left, others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rules = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    for first, *others in (rows[0], rules, *rows[1:]):
        cells = [first.ljust(widths[0])] + [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        print("| " + " | ".join(cells) + " |")


def print_tables(results):
    """Markdown tables of what the JSON holds: the first in the report's convention, the second in the other one."""
    runs, summary, score = results["runs"], results["summary"], results["config"]["score"]
    published = PUBLISHED if results["config"]["dataset"] == "cifar100" and score == "msp" else {}
    spread = f" of {len(runs)} runs, mean +- sample standard deviation (ddof 1)" if len(runs) > 1 else ""
    print(f"\n{score}{spread}, in percent; higher means more in-distribution; each table names its positive class\n")
    error_rate = cell(summary["error_rate"]) + (f" (published run {published['error rate']})" if published else "")
    risk = f"AURC of selective classification {cell(summary['aurc'][score])} (lower is better)"
    print(f"Closed set: error rate {error_rate}, {risk}\n")

    for positive, suffix in (("in-distribution, right", ""), ("OOD, wrong", "_out")):
        rows = [[f"positive: {positive}", "AUROC", "AUPR", "FPR95", "chance AUPR", "positive / negative images"]]
        for name, scores in summary["sets"].items():
            figures = scores[score] or {}
            cells = [cell(figures.get(metric)) for metric in ("auroc", "aupr" + suffix, "fpr95" + suffix)]
            counts = np.mean([run["counts"][name] for run in runs], axis=0)[:: -1 if suffix else 1]
            chance = cell(figures.get("chance_aupr" + suffix), with_std=False)
            rows.append([name, *cells, chance, " / ".join(f"{count:.0f}" for count in counts)])
        rows += [[name, *["skipped"] * 5] for name in results["skipped"]]
        if published and not suffix:
            rows = [[*row, published.get(row[0], "")] for row in rows]
            rows[0][-1] = "published: AUROC / AUPR / FPR95"
        print_table(rows)
        print()

    sets = [name for name in summary["sets"] if name != SPLIT]
    for metric, title in (("auroc", "AUROC"), ("fpr95", "FPR95, in-distribution positive")):
        rows = [[title, *SCORES]]
        rows += [[name, *(cell(summary["sets"][name][score][metric]) for score in SCORES)] for name in sets]
        means = [[np.mean([run["sets"][name][score][metric] for name in sets]) for run in runs] for score in SCORES]
        if sets:
            print_table([*rows, ["mean over sets", *(cell(summarise(values)) for values in means)]])
            print()


def draw(scores, score, title):
    """PNG bytes: ROC curves, and score histograms of the closed set and each OOD set with the threshold of 95% TPR."""
    import matplotlib
    from matplotlib.figure import Figure  # no pyplot: no display, no global state
    from sklearn.metrics import roc_auc_score, roc_curve

    column = list(SCORES).index(score)
    sets = {name: array[:, column] for name, array in scores.items()}
    closed = sets.pop("closed set")
    threshold = np.sort(closed)[::-1][int(np.ceil(0.95 * len(closed))) - 1]
    bins = np.linspace(*np.quantile(np.concatenate([closed, *sets.values()]), [0, 1]), 41)
    colours = [c for i, c in enumerate(matplotlib.color_sequences["petroff10"]) if i not in (3, 8)]  # these are grey
    rows = -(-len(sets) // 2)
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        height = max(4.4, 1.7 * rows)
        figure = Figure(figsize=(9, height), dpi=150, layout="constrained")
        figure.suptitle(f"{title}\ngrey: closed set, 95% of it lies right of the dashed line", fontsize=10)
        grid = figure.add_gridspec(max(rows, 1), 3, width_ratios=(1.5, 1, 1))
        roc = figure.add_subplot(grid[:, 0])
        roc.plot([0, 1], [0, 1], color="0.8", linewidth=1)
        for i, (name, ood) in enumerate(sets.items()):
            is_in = np.repeat([1, 0], [len(closed), len(ood)])
            both = np.concatenate([closed, ood])
            fpr, tpr, _ = roc_curve(is_in, both)
            colour, style = colours[i % 8], ("-", "--", ":")[i // 8 % 3]
            auroc = 100 * roc_auc_score(is_in, both)
            roc.plot(fpr, tpr, style, color=colour, label=f"{short(name)}  {auroc:.1f}")
            panel = figure.add_subplot(grid[i // 2, 1 + i % 2])
            for values, fill in ((closed, "0.5"), (ood, colour)):
                panel.hist(values, bins, weights=np.full(len(values), 100 / len(values)), color=fill, alpha=0.6)
            panel.axvline(threshold, color="black", linewidth=1, linestyle="--")
            panel.set_title(short(name), fontsize=9, color=colour)
            panel.yaxis.set_major_formatter("{x:g}%")
        roc.set(xlabel="OOD accepted (false positive rate)", ylabel="closed set accepted (true positive rate)")
        roc.legend(
            title="AUROC", loc="upper center", bbox_to_anchor=(0.45, -0.14 * 4.4 / height), ncols=2, frameon=False
        )
        content = io.BytesIO()
        figure.savefig(content, format="png")
    return content.getvalue()


def short(name):
    """A folder's own name for its path."""
    return Path(name).name or name


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def load_network(path):
    """Return (network in eval mode on the CPU, class count) from a checkpoint; stem and class count are read from it.

    Raises FileNotFoundError or InputError.
    """
    state = load_file(path)
    try:
        num_classes = len(state["fc.weight"])
        model = build_network(num_classes, "cifar" if state["conv1.weight"].shape[-1] == 3 else "imagenet")
        model.load_state_dict(state)
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise InputError(f"{path} is not a ResNet-18 of `python train.py`: {str(error)[:200]}") from error
    if not all(value.isfinite().all() for value in state.values()):
        raise InputError(f"{path} holds weights that are not finite: train it again, with a lower --lr.")
    return model.eval(), num_classes


def build_ood_loaders(ood_types, count, batch_size, seed, data_root, device):
    """Return {name: loader} of the sets that can be had, and {name: reason} of the others."""
    loaders, skipped = {}, {}
    for name in ood_types:
        try:
            loaders[name] = build_ood_loader(name, count, batch_size, seed, data_root, device)
        except (InputError, OSError) as error:
            skipped[name] = " ".join(str(error).split())
    return loaders, skipped


def evaluate(
    checkpoint: tuple[str, ...] = (),
    dataset: str = DATASET,
    data_root: str = DATA_ROOT,
    ood_types: tuple[str, ...] = OOD_TYPES,
    score: str = SCORE,
    batch_size: int = EVAL_BATCH_SIZE,
    seed: int = SEED,
    device: str | None = None,
    table: str | None = None,
):
    """Evaluate checkpoints, print the report, write it beside the (first) checkpoint; return what the JSON holds.

    Raises InputError or OSError; an OOD set that cannot be had is listed in the result under "skipped".

    Args:
        checkpoint: One checkpoint of train.py, or one for each of several runs; <dataset>_resnet18.pth by default.
        dataset: The closed set: cifar100, cifar10, digits, or a folder with train/<class>/ and test/<class>/.
        data_root: Where torchvision's data sets lie, or are downloaded to.
        ood_types: gaussian, rademacher, blob, svhn, cifar10, cifar100, textures, mnist, photos, or folders of images.
        score: msp, max_logit, energy, entropy or gen: what the report and the picture show.
        batch_size: Images per forward pass; no figure depends on it.
        seed: Of the noises.
        device: cuda, mps or cpu; by default the first of them that is there.
        table: A .ood.json of an earlier evaluation: print its tables again and do nothing else.
    """
    if table:
        try:
            results = json.loads(Path(table).expanduser().read_text())
            print_tables(results)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"{table} is not a .ood.json of `python test.py`: {str(error)[:200]}") from error
        return results
    if score not in SCORES:
        raise InputError(f"Unknown score {score!r}: use {', '.join(SCORES)}.")
    if batch_size < 1 or seed < 0:
        raise InputError(f"--batch-size ({batch_size}) must be at least 1, --seed ({seed}) at least 0.")
    ood_types = (ood_types,) if isinstance(ood_types, str) else tuple(dict.fromkeys(ood_types))
    for name in ood_types:
        check_ood_type(name, dataset)
    checkpoint = (checkpoint,) if isinstance(checkpoint, str | Path) else checkpoint or (None,)
    paths = [checkpoint_path(path, dataset) for path in checkpoint]
    networks = [load_network(path) for path in paths]
    device, note = pick_device(device)
    print(note, file=sys.stderr)
    test_loader = get_loader(False, dataset, data_root, batch_size, device=device)
    for path, (_, num_classes) in zip(paths, networks, strict=True):
        if num_classes != len(test_loader.classes):
            raise InputError(f"{path} has {num_classes} classes, {dataset} {len(test_loader.classes)}: pass --dataset.")
    count = max(1, len(test_loader.images) // OOD_SHARE)
    ood_loaders, skipped = build_ood_loaders(ood_types, count, batch_size, seed, data_root, device)

    runs, picture = [], None
    for path, (model, _) in zip(paths, networks, strict=True):
        run, labels, scores = evaluate_network(model.to(device), test_loader, ood_loaders)
        if len(paths) > 1:
            print(f"checkpoint: {path}")
        print_report(run, score, skipped, ood_types)
        runs.append({"checkpoint": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), **run})
        content = io.BytesIO()
        named = {f"scores/{name}": array for name, array in scores.items()}
        np.savez_compressed(content, score_names=list(SCORES), **labels, **named)
        write_file(path.with_suffix(".ood.npz"), content.getvalue())
        picture = picture or draw(scores, score, f"{path.stem}: {score}, higher is more in-distribution")
    config = dict(dataset=dataset, ood_types=ood_types, score=score, batch_size=batch_size, seed=seed)
    results = dict(config=config, **describe(device), skipped=skipped, runs=runs, summary=summarise_runs(runs))
    print_tables(results)
    write_file(paths[0].with_suffix(".ood.json"), json.dumps(results, indent=1).encode())
    write_file(paths[0].with_suffix(".ood.png"), picture)
    return results


if __name__ == "__main__":
    sys.exit(1 if run_command(evaluate)["skipped"] else 0)

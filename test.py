"""Evaluate a checkpoint of train.py: closed-set error, and how well scores tell OOD sets apart.

    python test.py                                               # cifar100_resnet18.pth
    python test.py --ood-types gaussian photos ~/pictures        # other sets, or a folder
    python test.py --checkpoint seed0.pth seed1.pth seed2.pth    # mean and standard deviation

Prints, in percent, the error rate, the score's performance on correctly classified images
(positive) against misclassified ones, then on the closed set (positive) against each OOD set;
then tables. Writes first, unless every set was skipped, beside the checkpoint or into --output,
    cifar100_resnet18.ood.json    every figure of every set and score, and what they depend on
    cifar100_resnet18.ood.png     ROC curves, or the AUROC of several runs, and histograms
    cifar100_resnet18.ood.npz     scores and predictions of every image; one for each checkpoint
Exit status 1 if an OOD set had to be skipped.
"""

import hashlib
import io
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import torch
from torchvision.utils import make_grid
from tyro.conf import arg

import ood_data
import ood_utils
import train
from ood_utils import SCORES, InputError

CLOSED_SET_HELP = f"{ood_data.CLOSED_SET_NAMES}; by default what the checkpoint's log names"


@dataclass
class Config:
    """The published evaluation. Edit a value here, or pass it as a flag."""

    checkpoint: tuple[str, ...] = ()  # of one run, or of several; by default <dataset>_resnet18.pth
    dataset: Annotated[str | None, arg(help=CLOSED_SET_HELP)] = None
    data_root: str = ood_data.DATA_ROOT  # where torchvision's data sets lie, or are downloaded to
    ood_types: Annotated[tuple[str, ...], arg(help=ood_data.OOD_SET_NAMES)] = (
        "gaussian",
        "rademacher",
        "blob",
        "svhn",
    )
    score: Literal[tuple(SCORES)] = "msp"  # what the report and the picture show
    batch_size: int = ood_data.EVAL_BATCH_SIZE  # no figure depends on it
    seed: int = ood_data.NOISE_SEED  # of the noises
    device: str | None = None  # by default cuda, mps or cpu, whichever is there first
    output: str | None = None  # folder to write to, by default that of each checkpoint


OOD_SHARE = 5  # one OOD image for so many test images: the chance level of AUPR depends on it
CLOSED = "closed set"
SPLIT = "right / wrong"  # correctly classified test images against misclassified ones
# One run on CIFAR-100 with MSP: AUROC, AUPR, FPR95, in-distribution positive.
PUBLISHED_ERROR_RATE = 46.30
PUBLISHED = {
    SPLIT: (81.98, 85.74, 73.39),
    "gaussian": (68.16, 92.93, 99.40),
    "rademacher": (69.91, 93.18, 96.15),
    "blob": (68.06, 92.75, 97.55),
    "svhn": (66.97, 91.65, 89.05),
}


# ----------------------------------------------------------------------------------------
# Load


def check_closed_set(path, model, dataset):
    """Raise InputError, before anything is read, if the checkpoint is of another closed set."""
    log = train.read_log(path)
    folder = Path(dataset).expanduser() / "train"
    if dataset in ood_data.CLOSED_SETS:
        count, _ = ood_data.CLOSED_SETS[dataset]
        same = log is None or log["config"]["dataset"] == dataset
    elif folder.is_dir():
        classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        count = len(classes)
        same = log is None or log.get("classes") == classes
    else:
        raise InputError(f"Unknown data set {dataset!r}: use {ood_data.CLOSED_SET_NAMES}.")
    if not same or count != model.fc.out_features:
        trained_on = log["config"]["dataset"] if log else f"{model.fc.out_features} classes"
        raise InputError(
            f"{path} was trained on {trained_on}, not on {dataset}: pass its --dataset."
        )
    if log and not log["finished"]:
        done, epochs = len(log["epochs"]), log["config"]["epochs"]
        print(f"note: {path} is of an unfinished run, {done} of {epochs} epochs", file=sys.stderr)


def name_sets(ood_types, dataset):
    """Return {name: OOD type}; the set of a folder has the folder's name."""
    sets = {}
    known = [*ood_data.NOISES, *ood_data.OOD_IMAGES]
    for ood_type in dict.fromkeys(ood_types):
        ood_data.check_ood_type(ood_type, dataset)
        name = ood_type if ood_type in known else Path(ood_type).expanduser().resolve().name
        if name in sets or name == CLOSED or (name in known and name != ood_type):
            raise InputError(f"Two sets would be named {name!r}: rename the folder {ood_type}.")
        sets[name] = ood_type
    return sets


def build_loaders(config, sets, test_loader, device):
    """Return {name: loader} of the closed set and the OOD sets, {name: reason} of those skipped."""
    count = max(1, len(test_loader.images) // OOD_SHARE)
    loaders, skipped = {CLOSED: test_loader}, {}
    for name, ood_type in sets.items():
        try:
            loaders[name] = ood_data.build_ood_loader(
                ood_type, count, config.batch_size, config.seed, config.data_root, device
            )
        except (InputError, OSError) as error:
            skipped[name] = " ".join(str(error).split())
    return loaders, skipped


# ----------------------------------------------------------------------------------------
# Score and measure


def score_sets(model, loaders):
    """One forward pass over every set.

    Returns {name: float64 (N, len(SCORES))}, {name: predictions int64 (N,)}, and the closed
    set's labels, int64 (N,).
    """
    scores, predictions = {}, {}
    for name, loader in loaders.items():
        logits, labels = ood_utils.get_logits(model, loader)
        columns = [score(logits.double()) for score in SCORES.values()]
        scores[name] = torch.stack(columns, dim=1).numpy()
        predictions[name] = logits.argmax(1).numpy()
        if name == CLOSED:
            closed_labels = labels.numpy()
    return scores, predictions, closed_labels


def measure(pos, neg):
    """Counts, and metrics in percent in both conventions; None where a group is empty."""
    total = len(pos) + len(neg)
    row = {"positives": len(pos), "negatives": len(neg)}
    row["chance_aupr"] = 100 * len(pos) / total
    row["chance_aupr_out"] = 100 * len(neg) / total
    row |= dict.fromkeys(("auroc", "aupr", "fpr95", "aupr_out", "fpr95_out"))
    if len(pos) and len(neg):
        auroc, aupr, fpr95 = ood_utils.get_performance(pos, neg)
        row |= {"auroc": 100 * auroc, "aupr": 100 * aupr, "fpr95": 100 * fpr95}
        _, aupr, fpr95 = ood_utils.get_performance(-neg, -pos)  # OOD, or wrong, is positive
        row |= {"aupr_out": 100 * aupr, "fpr95_out": 100 * fpr95}
    return row


def measure_checkpoint(path, scores, predictions, labels):
    """Return what the JSON holds of one checkpoint: its own figures, rows and sets."""
    correct = predictions[CLOSED] == labels
    checkpoint = {"path": str(path), "error_rate": 100 * (1 - correct.mean())}
    checkpoint |= {"threshold": {}, "aurc": {}, "augrc": {}}
    rows = []
    for column, score in enumerate(SCORES):
        values = scores[CLOSED][:, column]
        checkpoint["threshold"][score] = ood_utils.get_threshold(values)
        checkpoint["aurc"][score] = 100 * ood_utils.aurc(values, correct)
        checkpoint["augrc"][score] = 100 * ood_utils.augrc(values, correct)
        pairs = {SPLIT: (values[correct], values[~correct])}
        pairs |= {name: (values, scores[name][:, column]) for name in scores if name != CLOSED}
        for name, (pos, neg) in pairs.items():
            row = {"checkpoint": str(path), "set": name, "score": score}
            rows.append(row | measure(pos, neg))
    sets = []
    for name, classes in predictions.items():
        effective, largest = ood_utils.predicted_classes(classes)
        row = {"checkpoint": str(path), "set": name, "images": len(classes)}
        sets.append(row | {"effective_classes": effective, "largest_share": 100 * largest})
    return checkpoint, rows, sets


# ----------------------------------------------------------------------------------------
# Report


def shown_rows(results):
    """The rows of the score that report and picture are about, as a DataFrame."""
    rows = pd.DataFrame(results["rows"])
    return rows[rows["score"] == results["config"]["score"]]


def published_of(results):
    """The published figures, where they are of this closed set and score."""
    config = results["config"]
    return PUBLISHED if (config["dataset"], config["score"]) == ("cifar100", "msp") else {}


def print_report(results):
    """The published report: in-distribution, or correctly classified, is the positive class."""
    rows = shown_rows(results)
    for checkpoint in results["checkpoints"]:
        if len(results["checkpoints"]) > 1:
            print(f"checkpoint: {checkpoint['path']}")
        print(f"Error Rate {checkpoint['error_rate']:.4f}")
        of_run = rows[rows["checkpoint"] == checkpoint["path"]].set_index("set")
        for name in (SPLIT, *results["config"]["ood_types"]):
            if name != SPLIT:
                print(f"ood type: {name}")
            if name in results["skipped"]:
                print(f"skipped: {results['skipped'][name]}")
                continue
            row = of_run.loc[name]
            if pd.isna(row.auroc):
                missing = "misclassified" if row.positives else "correctly classified"
                print(f"AUROC: n/a, AUPR: n/a, FPR95: n/a (no {missing} test image)")
            else:
                print(ood_utils.performance_line(row.auroc, row.aupr, row.fpr95))


def spread(values):
    """Mean +- sample standard deviation (ddof 1) over checkpoints; of one, its value."""
    values = np.asarray(values, dtype=float)
    if np.isnan(values).any():
        return "n/a"
    text = f"{np.mean(values):.2f}"
    if len(values) > 1:
        text += f" +- {np.std(values, ddof=1):.2f}"
    return text


def print_table(table, title):
    """A DataFrame of texts as a Markdown table, its index as the first column."""
    table = table.rename_axis(title).reset_index()
    align = ["left", *["right"] * (table.shape[1] - 1)]
    print(table.to_markdown(index=False, tablefmt="pipe", colalign=align, disable_numparse=True))
    print()


def print_closed_set(results):
    """Error rate, the risks of selective classification, and the threshold of the score."""
    score, runs = results["config"]["score"], results["checkpoints"]
    of_runs = f" of {len(runs)} runs, mean +- sample standard deviation" if len(runs) > 1 else ""
    print(f"\n{score}{of_runs}, in percent; higher scores mean more in-distribution\n")
    error_rate = spread([run["error_rate"] for run in runs])
    if published_of(results):
        error_rate += f" (published {PUBLISHED_ERROR_RATE:.2f})"
    aurc = spread([run["aurc"][score] for run in runs])
    augrc = spread([run["augrc"][score] for run in runs])
    thresholds = ", ".join(f"{run['threshold'][score]:.4f}" for run in runs)
    print(f"Closed set: error rate {error_rate}; AURC {aurc}, AUGRC {augrc} (lower is better)")
    print(f"95% of the closed set scores at least {thresholds}\n")


def print_performance(results, positive, out=""):
    """The metrics of one convention; out: "" or "_out", the ending of their names in a row."""
    sets = shown_rows(results).groupby("set", sort=False)
    table = sets[["auroc", f"aupr{out}", f"fpr95{out}"]].agg(spread)
    table.columns = ["AUROC", "AUPR", "FPR95"]
    table["chance AUPR"] = sets[f"chance_aupr{out}"].mean().map("{:.2f}".format)
    table = table.reindex([*table.index, *results["skipped"]], fill_value="skipped")
    if published_of(results) and not out:
        published = {
            name: "{:.2f} / {:.2f} / {:.2f}".format(*PUBLISHED[name]) for name in PUBLISHED
        }
        table["published"] = [published.get(name, "") for name in table.index]
    print_table(table, f"positive: {positive}")


def print_scores(results, metric, title):
    """One metric of every OOD set and of their mean, by score."""
    rows = pd.DataFrame(results["rows"])
    rows = rows[rows["set"] != SPLIT]
    means = rows.groupby(["checkpoint", "score"], sort=False)[metric].mean().reset_index()
    rows = pd.concat([rows, means.assign(set="mean over sets")])
    table = rows.pivot_table(metric, index="set", columns="score", aggfunc=spread, sort=False)
    print_table(table, title)


def print_predicted_classes(results):
    sets = pd.DataFrame(results["sets"]).groupby("set", sort=False)
    table = sets[["effective_classes", "largest_share"]].agg(spread)
    table.columns = ["effective classes", "largest share"]
    table.insert(0, "images", sets["images"].first().astype(str))
    print_table(table, "predicted classes")
    print("Effective classes: exp of the entropy of the predicted classes. The fewer, the more a")
    print("set is one draw for each network instead of many images: its row moves with the seed.")


def print_tables(results):
    """Markdown tables of what the JSON holds; each names its positive class."""
    print_closed_set(results)
    print_performance(results, "in-distribution, right")
    print_performance(results, "OOD, wrong", "_out")
    if len(results["sets"]) > len(results["checkpoints"]):  # more than the closed set
        print_scores(results, "auroc", "AUROC")
        print_scores(results, "fpr95", "FPR95, in-distribution positive")
    print_predicted_classes(results)


# ----------------------------------------------------------------------------------------
# Picture


def log_odds(scores):
    """log(p / (1 - p)): a third of the closed set's MSP lies within 0.01 of 1."""
    scores = np.clip(scores, 1e-5, 1 - 1e-5)
    return np.log(scores / (1 - scores))


def to_pixels(images):
    """Four images of a loader as one picture (70, 70, 3) in [0, 1], noises un-normalised."""
    images = images[:4].cpu()
    if images.dtype == torch.uint8:
        images = images / 255
    else:
        mean, std = ood_data.statistics(images.device)
        images = (images * std + mean).clip(0, 1)
    return make_grid(images, nrow=2, pad_value=1).permute(1, 2, 0).numpy()


def short(name):
    return name if len(name) <= 25 else f"{name[:24]}…"


def draw_rocs(axes, scores, colours):
    """The ROC curve of each set; scores {set: (N,)}, the closed set's among them."""
    from sklearn.metrics import roc_curve

    axes.plot([0, 1], [0, 1], color="0.8")
    for name, colour in colours.items():
        is_in = np.repeat([1, 0], [len(scores[CLOSED]), len(scores[name])])
        fpr, tpr, _ = roc_curve(is_in, np.concatenate([scores[CLOSED], scores[name]]))
        axes.plot(fpr, tpr, color=colour)
    axes.set_xlabel("OOD accepted (false positive rate)")
    axes.set_ylabel("closed set accepted (true positive rate)")


def draw_dots(axes, rows, published, colours):
    """A line a set, a dot a checkpoint, a cross the published figure; in grey, chance."""
    names = list(rows["set"].unique())
    axes.axvline(50, color="0.8")
    for y, name in enumerate(names):
        aurocs = rows[rows["set"] == name]["auroc"]
        axes.plot(aurocs, [y] * len(aurocs), "o", color=colours.get(name, "0.3"), alpha=0.7)
        if name in published:
            axes.plot(published[name][0], y, "x", color="black", markersize=8)
    axes.set_yticks(range(len(names)), [short(name) for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("AUROC: a dot a run" + (", x published" if published else ""))


def draw_scores(axes, closed, scores, colour, bins, is_msp):
    """A set's scores over the closed set's in grey, and the threshold of the latter."""
    for values, fill in ((closed, "0.5"), (scores, colour)):
        share = np.full(len(values), 100 / len(values))
        axes.hist(values, bins, weights=share, color=fill, alpha=0.6)
    axes.axvline(ood_utils.get_threshold(closed), color="black", lw=1, ls="--")
    axes.yaxis.set_major_formatter("{x:g}%")
    axes.tick_params(labelsize=7)
    if is_msp:  # its log odds
        ticks = np.array([0.1, 0.5, 0.9, 0.99, 0.9999])
        axes.set_xticks(log_odds(ticks), [f"{tick:g}" for tick in ticks])
        axes.set_xlim(bins[0], bins[-1])


def draw(results, scores, loaders):
    """PNG bytes: ROC curves, or AUROCs of several runs, then images and scores of each set.

    scores: {set: (N,)} of the first checkpoint.
    """
    import matplotlib
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    rows = shown_rows(results)
    names = [name for name in scores if name != CLOSED]
    hues = matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, len(names)))
    colours = dict(zip(names, hues, strict=True))
    is_msp = results["config"]["score"] == "msp"
    shown = {name: log_odds(values) if is_msp else values for name, values in scores.items()}
    everything = np.concatenate(list(shown.values()))
    low, high = everything.min(), everything.max()
    bins = np.linspace(low, max(high, low + 0.01), 41)

    columns = 1 if len(scores) <= 3 else 2
    lines = math.ceil(len(scores) / columns)
    size = (11, max(3.8, 1.3 * lines + 0.6))
    spines = {"axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context({"font.size": 8, **spines}):
        figure = Figure(size, dpi=130, layout="constrained")
        left, right = figure.subfigures(1, 2, width_ratios=(1, 1.6))
        if len(results["checkpoints"]) > 1:
            draw_dots(left.subplots(), rows, published_of(results), colours)
        else:
            draw_rocs(left.subplots(), scores, colours)
        first = Path(results["checkpoints"][0]["path"]).stem
        what = f"{results['config']['score']} of {short(first)}"
        what += ", AUROC; grey: closed set, 95% of it right of the dashed line"
        right.suptitle(what, fontsize=9)
        panels = right.subplots(lines, 2 * columns, width_ratios=(1, 2.6) * columns, squeeze=False)
        for axes in panels.flat[2 * len(scores) :]:
            axes.axis("off")
        for (pixels, axes), name in zip(panels.reshape(-1, 2), scores, strict=False):
            pixels.imshow(to_pixels(loaders[name].images))
            pixels.axis("off")
            colour = colours.get(name, "0.5")
            draw_scores(axes, shown[CLOSED], shown[name], colour, bins, is_msp)
            title = short(name)
            if name != CLOSED:
                auroc = rows[rows["set"] == name]["auroc"].iloc[0]  # of the first checkpoint
                title += f"  {auroc:.1f}"
            axes.set_title(title, loc="left", fontsize=8, color=colour)
        content = io.BytesIO()
        figure.savefig(content, format="png")
    return content.getvalue()


# ----------------------------------------------------------------------------------------
# Evaluation


def output_path(config, path, ending):
    """Where a file about the checkpoint at path goes: into --output, or beside it."""
    folder = Path(config.output).expanduser() if config.output else path.parent
    return folder / path.with_suffix(ending).name


def load(config):
    """Read and check everything that a Config names, before anything is scored.

    Returns what the JSON says of it, and the checkpoints' paths, their networks, and
    {name: loader}, the closed set's first. Raises InputError or OSError; an OOD set that
    cannot be had is listed under "skipped".
    """
    if config.batch_size < 1 or config.seed < 0:
        raise InputError("--batch-size must be at least 1 and --seed at least 0.")
    dataset = config.dataset or ood_data.DATASET
    paths = [ood_utils.checkpoint_path(name, dataset) for name in config.checkpoint or [None]]
    networks = [train.load_network(path) for path in paths]
    log = train.read_log(paths[0])
    if log and config.dataset is None:
        dataset = log["config"]["dataset"]
    for path, model in zip(paths, networks, strict=True):
        check_closed_set(path, model, dataset)
    sets = name_sets(config.ood_types, dataset)
    outputs = {output_path(config, path, ".ood.npz") for path in paths}
    if len(outputs) < len(paths):
        raise InputError("Checkpoints of the same name would overwrite each other's files.")
    for output in outputs:
        ood_utils.check_writable(output.parent, "--output")
    device = ood_utils.pick_device(config.device)
    settings = asdict(config) | {"dataset": dataset, "ood_types": list(sets)}
    del settings["output"]  # no figure depends on it
    results = {"config": settings, "checkpoints": []}
    for path in paths:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        results["checkpoints"].append({"path": str(path), "sha256": digest})
    results |= ood_utils.describe(device)
    print(f"device: {results['device']}, float32", file=sys.stderr)
    test_loader = train.get_loader(
        False, dataset, config.data_root, config.batch_size, device=device
    )
    loaders, results["skipped"] = build_loaders(config, sets, test_loader, device)
    return results, paths, [model.to(device) for model in networks], loaders


def evaluate(config=None):
    """Evaluate checkpoints, write and print the report; return what the JSON holds.

    config: a Config, by default the published evaluation. Raises what load raises.
    """
    config = config or Config()
    results, paths, networks, loaders = load(config)
    results |= {"rows": [], "sets": []}
    scored = []
    for path, model, checkpoint in zip(paths, networks, results["checkpoints"], strict=True):
        arrays = score_sets(model, loaders)
        figures, rows, sets = measure_checkpoint(path, *arrays)
        checkpoint.update(figures)
        results["rows"] += rows
        results["sets"] += sets
        scored.append(arrays)

    files = []
    if len(loaders) > 1 or not config.ood_types:  # where every set was skipped, the old are kept
        files = write_results(config, paths, results, scored, loaders)
    print_report(results)
    print_tables(results)
    for file in files:
        print(f"wrote {file}")
    return results


def write_results(config, paths, results, scored, loaders):
    """Write JSON, PNG and a .npz for each checkpoint; return their paths."""
    files = {}
    for path, (scores, predictions, labels) in zip(paths, scored, strict=True):
        arrays = {"score_names": list(SCORES), "labels": labels}
        arrays["predictions"] = predictions[CLOSED]
        arrays |= {f"scores/{name}": array for name, array in scores.items()}
        arrays |= {f"predictions/{name}": array for name, array in predictions.items()}
        content = io.BytesIO()
        np.savez_compressed(content, **arrays)
        files[output_path(config, path, ".ood.npz")] = content.getvalue()
    column = list(SCORES).index(config.score)
    scores, _, _ = scored[0]
    first = {name: array[:, column] for name, array in scores.items()}
    text = json.dumps(results, indent=1)
    files[output_path(config, paths[0], ".ood.json")] = text.encode()
    files[output_path(config, paths[0], ".ood.png")] = draw(results, first, loaders)
    for file, content in files.items():
        ood_utils.write_file(file, content)
    return list(files)


if __name__ == "__main__":
    outcome = ood_utils.run_command(evaluate, Config)
    sys.exit(1 if outcome["skipped"] else 0)

"""Evaluate a checkpoint of train.py: closed-set error, and how well scores detect OOD sets.

    python test.py                                               # cifar100_resnet18.pth
    python test.py --ood-types gaussian photos ~/pictures        # other sets, or a folder
    python test.py --checkpoint seed0.pth seed1.pth seed2.pth    # mean and standard deviation

Prints, in percent, the error rate, the score's performance on correctly classified images
(positive) against misclassified ones, then on the closed set (positive) against each OOD set;
then tables. Before that it writes, beside the checkpoint or into --output,
    cifar100_resnet18.ood.json    every figure of every set and score, and what they depend on
    cifar100_resnet18.ood.png     AUROC of every run, images and score histograms of every set
    cifar100_resnet18.ood.npz     scores and predictions of every image; one for each checkpoint
Exit status 1 if an OOD set had to be skipped; if all were, nothing is written.
"""

import hashlib
import io
import json
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

    checkpoint: tuple[str, ...] = ()  # of one run, or of several; by default train.py's
    dataset: Annotated[str | None, arg(help=CLOSED_SET_HELP)] = None
    data_root: str = train.Config.data_root  # where torchvision's data sets are
    ood_types: Annotated[tuple[str, ...], arg(help=ood_data.OOD_SET_NAMES)] = (
        "gaussian",
        "rademacher",
        "blob",
        "svhn",
    )
    score: Literal[tuple(SCORES)] = "msp"  # what the report and the picture show
    batch_size: int = ood_data.EVAL_BATCH_SIZE  # affects speed and memory only
    seed: int = ood_data.NOISE_SEED  # of the noises
    device: str | None = None  # by default cuda, mps or cpu, whichever is there first
    output: str | None = None  # folder to write to, by default that of each checkpoint


OOD_SHARE = 5  # one OOD image for five test images: the chance level of AUPR depends on it
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
METRICS = {
    "auroc": "AUROC",
    "aupr": "AUPR, in-distribution positive",
    "fpr95": "FPR95, in-distribution positive",
    "aupr_out": "AUPR, OOD positive",
    "fpr95_out": "FPR95, OOD positive",
}


def evaluate(config=None):
    """Evaluate checkpoints, write and print the report; return what the JSON holds.

    config: a Config, by default the published evaluation. Raises InputError or OSError.
    """
    config = config or Config()
    results, networks, loaders = load(config)
    labels = loaders[CLOSED].labels.cpu().numpy()
    files, pictured = {}, None
    for path, model in networks.items():
        scores, predictions = score_sets(model, loaders)
        run, rows, sets = measure_run(path, scores, predictions, labels)
        results["checkpoints"].append(run)
        results["rows"] += rows
        results["sets"] += sets
        files[output_path(config, path, ".ood.npz")] = pack(scores, predictions, labels)
        pictured = pictured or scores  # the first run's
    if len(loaders) > 1 or not config.ood_types:
        first = next(iter(networks))
        files[output_path(config, first, ".ood.json")] = json.dumps(results, indent=1).encode()
        files[output_path(config, first, ".ood.png")] = draw(results, pictured, loaders)
        for file, content in files.items():
            ood_utils.write_file(file, content)
    else:  # every set was skipped: earlier files are kept
        files = {}
    print_report(results)
    print_tables(results)
    for file in files:
        print(f"wrote {file}")
    return results


# Load -----------------------------------------------------------------------------------


def load(config):
    """Read and check everything that a Config names, before anything is scored.

    Returns the start of the JSON, {path: network}, and {name: loader} with the closed set
    first. Raises InputError or OSError; an unavailable OOD set is listed under "skipped".
    """
    if config.batch_size < 1 or config.seed < 0:
        raise InputError("--batch-size must be at least 1 and --seed at least 0.")
    names = config.checkpoint or [None]
    default = config.dataset or train.Config.dataset
    paths = list(dict.fromkeys(train.checkpoint_path(name, default) for name in names))
    networks = {path: train.load_network(path) for path in paths}
    if len({output_path(config, path, "") for path in paths}) < len(paths):
        raise InputError("Checkpoints of the same name would overwrite each other's files.")
    for path in paths:
        output_path(config, path, "").parent.mkdir(parents=True, exist_ok=True)
    log = train.read_log(paths[0])
    dataset = config.dataset or (log["config"]["dataset"] if log else default)
    sets = name_sets(config.ood_types, dataset)
    device = ood_utils.pick_device(config.device)
    settings = asdict(config) | {"dataset": dataset, "ood_types": list(sets)}
    del settings["output"]  # no figure depends on it
    results = {"config": settings, "checkpoints": [], **ood_utils.describe(device)}
    print(f"device: {results['device']}, float32", file=sys.stderr)
    test_loader = train.get_loader(
        False, dataset, config.data_root, config.batch_size, device=device
    )
    for path, model in networks.items():
        check_closed_set(path, model, dataset, test_loader.classes)
        model.to(device)
    loaders, results["skipped"] = build_loaders(config, sets, test_loader, device)
    return results | {"rows": [], "sets": []}, networks, loaders


def check_closed_set(path, model, dataset, classes):
    """Raise InputError if the checkpoint is of another closed set; name an unfinished run."""
    log = train.read_log(path)
    outputs = ood_utils.last_layer(model).out_features
    if (log["classes"] if log else outputs) != (classes if log else len(classes)):
        trained_on = log["config"]["dataset"] if log else f"{outputs} classes"
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
        ood_data.check_ood_name(ood_type, dataset)
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


def output_path(config, path, ending):
    """Where a file about the checkpoint at path goes: into --output, or beside it."""
    folder = Path(config.output).expanduser() if config.output else path.parent
    return folder / f"{path.stem}{ending}"


# Score and measure ----------------------------------------------------------------------


def all_scores(logits):
    """float64 (N, len(SCORES) + 1): every score; in the last column the predicted class."""
    columns = [score(logits) for score in SCORES.values()]
    return torch.stack([*columns, logits.argmax(1).double()], dim=1)


def score_sets(model, loaders):
    """{name: scores float64 (N, len(SCORES))} and {name: predictions int64 (N,)} of every set."""
    scores, predictions = {}, {}
    for name, loader in loaders.items():
        columns = ood_utils.get_ood_scores(model, loader, score=all_scores)
        scores[name] = columns[:, :-1]
        predictions[name] = columns[:, -1].astype(np.int64)
    return scores, predictions


def measure(pos, neg):
    """Counts, and metrics in percent in both conventions; None where a group is empty."""
    total = len(pos) + len(neg)
    row = {"positives": len(pos), "negatives": len(neg)}
    row |= {"chance_aupr": 100 * len(pos) / total, "chance_aupr_out": 100 * len(neg) / total}
    row |= dict.fromkeys(METRICS)
    if len(pos) and len(neg):
        auroc, aupr, fpr95 = ood_utils.get_performance(pos, neg)
        row |= {"auroc": 100 * auroc, "aupr": 100 * aupr, "fpr95": 100 * fpr95}
        _, aupr, fpr95 = ood_utils.get_performance(-neg, -pos)  # OOD, or wrong, is positive
        row |= {"aupr_out": 100 * aupr, "fpr95_out": 100 * fpr95}
    return row


def name_file(path):
    return {"path": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def measure_run(path, scores, predictions, labels):
    """Return what the JSON holds of one checkpoint: its own figures, its rows, its sets."""
    correct = predictions[CLOSED] == labels
    run = {**name_file(path), "error_rate": 100 * (1 - correct.mean())}
    run |= {"threshold": {}, "aurc": {}, "augrc": {}}
    rows, sets = [], []
    for column, score in enumerate(SCORES):
        closed = scores[CLOSED][:, column]
        run["threshold"][score] = ood_utils.get_threshold(closed)
        run["aurc"][score] = 100 * ood_utils.aurc(closed, correct)
        run["augrc"][score] = 100 * ood_utils.augrc(closed, correct)
        pairs = {SPLIT: (closed[correct], closed[~correct])}
        pairs |= {name: (closed, scores[name][:, column]) for name in scores if name != CLOSED}
        for name, (pos, neg) in pairs.items():
            row = {"checkpoint": str(path), "set": name, "score": score}
            rows.append(row | measure(pos, neg))
    for name, classes in predictions.items():
        effective, largest = ood_utils.predicted_classes(classes)
        row = {"checkpoint": str(path), "set": name, "images": len(classes)}
        sets.append(row | {"effective_classes": effective, "largest_share": 100 * largest})
    return run, rows, sets


def pack(scores, predictions, labels):
    """The bytes of the .npz: what any other metric needs."""
    arrays = {"score_names": list(SCORES), "labels": labels, "predictions": predictions[CLOSED]}
    arrays |= {f"scores/{name}": array for name, array in scores.items()}
    arrays |= {f"predictions/{name}": array for name, array in predictions.items()}
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    return content.getvalue()


# Report ---------------------------------------------------------------------------------


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
    for run in results["checkpoints"]:
        if len(results["checkpoints"]) > 1:
            print(f"checkpoint: {run['path']}")
        print(f"Error Rate {run['error_rate']:.4f}")
        of_run = rows[rows["checkpoint"] == run["path"]].set_index("set")
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


def print_performance(results):
    """Every metric of every set, both conventions."""
    rows = shown_rows(results).groupby("set", sort=False)
    table = rows[list(METRICS)].agg(spread).rename(columns=METRICS)
    classes = pd.DataFrame(results["sets"]).groupby("set")["effective_classes"].agg(spread)
    table["effective classes"] = classes.reindex(table.index, fill_value="")
    table = table.reindex([*table.index, *results["skipped"]], fill_value="skipped")
    published = published_of(results)
    if published:
        cells = {name: "{:.2f} / {:.2f} / {:.2f}".format(*published[name]) for name in published}
        table["published"] = [cells.get(name, "") for name in table.index]
    print_table(table, results["config"]["score"])


def print_scores(results, metric):
    """One metric by score, of every OOD set and of the means of noises and of image sets."""
    rows = pd.DataFrame(results["rows"])
    rows = rows[rows["set"] != SPLIT]
    kinds = rows["set"].isin(list(ood_data.NOISES))
    kinds = kinds.map({True: "mean of noises", False: "mean of image sets"})
    keys = ["checkpoint", "score", "set"]
    means = rows.assign(set=kinds).groupby(keys, sort=False)[metric].mean().reset_index()
    table = pd.concat([rows, means])
    table = table.pivot_table(metric, index="set", columns="score", aggfunc=spread, sort=False)
    print_table(table, METRICS[metric])


def print_tables(results):
    """Markdown tables of what the JSON holds."""
    runs = results["checkpoints"]
    error_rate = spread([run["error_rate"] for run in runs])
    published = f" (published {PUBLISHED_ERROR_RATE:.2f})" if published_of(results) else ""
    of_runs = f" of {len(runs)} runs, mean +- sample standard deviation," if len(runs) > 1 else ""
    print(f"\nIn percent{of_runs} error rate {error_rate}{published}\n")
    print_performance(results)
    if len(results["sets"]) > len(runs):  # more than the closed set
        print_scores(results, "auroc")


# Picture --------------------------------------------------------------------------------


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


def draw_dots(axes, results):
    """A line for each set, a dot for each run, a cross for the published figure; grey: chance."""
    published = published_of(results)
    sets = shown_rows(results).groupby("set", sort=False)["auroc"]
    axes.axvline(50, color="0.8")
    for y, (name, aurocs) in enumerate(sets):
        axes.plot(aurocs, [y] * len(aurocs), "o", color="C0", alpha=0.7)
        if name in published:
            axes.plot(published[name][0], y, "x", color="black", markersize=8)
    axes.set_yticks(range(len(sets)), [short(name) for name in sets.groups])
    axes.invert_yaxis()
    axes.set_xlabel("AUROC: a dot for each run" + (", x published" if published else ""))


def draw_scores(axes, name, closed, ood):
    """A set's scores over the closed set's in grey, and the threshold of the latter."""
    everything = np.concatenate([closed, ood])
    bins = np.linspace(everything.min(), everything.max() + 1e-9, 41)
    for values, colour in ((ood, "C1"), (closed, "0.5")):
        share = np.full(len(values), 100 / len(values))
        axes.hist(values, bins, weights=share, color=colour, alpha=0.6)
    axes.axvline(ood_utils.get_threshold(closed), color="black", lw=1, ls="--")
    axes.yaxis.set_major_formatter("{x:g}%")
    axes.set_title(short(name), loc="left", fontsize=8)


def draw(results, scores, loaders):
    """PNG bytes: AUROC of every run; images of every set, and its scores with the first run.

    scores: {set: (N, len(SCORES))} of that run.
    """
    import matplotlib
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    score = results["config"]["score"]
    shown = {name: array[:, list(SCORES).index(score)] for name, array in scores.items()}
    if score == "msp":  # a third of the closed set's is within 0.01 of 1
        shown = {name: np.clip(p, 1e-5, 1 - 1e-5) for name, p in shown.items()}
        shown = {name: np.log(p / (1 - p)) for name, p in shown.items()}
    style = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        figure = Figure((11, 1.1 * len(scores) + 1), dpi=130, layout="constrained")
        left, right = figure.subfigures(1, 2)
        draw_dots(left.subplots(), results)
        panels = right.subplots(len(scores), 2, width_ratios=(1, 4), squeeze=False)
        for (pixels, axes), name in zip(panels, scores, strict=True):
            pixels.imshow(to_pixels(loaders[name].images))
            pixels.axis("off")
            draw_scores(axes, name, shown[CLOSED], shown[name])
        what = "log odds of msp" if score == "msp" else score
        first = short(Path(results["checkpoints"][0]["path"]).stem)
        right.suptitle(f"{what}, {first}; grey: closed set, 95% of it right of the line")
        content = io.BytesIO()
        figure.savefig(content, format="png")
    return content.getvalue()


if __name__ == "__main__":
    outcome = ood_utils.run_command(evaluate, Config)
    sys.exit(1 if outcome["skipped"] else 0)

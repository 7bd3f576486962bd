"""Evaluate checkpoints of train.py, and compare the settings that they were trained with.

    python test.py                                               # cifar100_resnet18.pth
    python test.py --ood-types gaussian photos ~/pictures        # other sets, or a folder
    python test.py --checkpoint seed0.pth seed1.pth seed2.pth    # mean and standard deviation
    python test.py --checkpoint mine.pth --compare results/cifar100_seeds.ood.json

Prints, in percent, the error rate, then AUROC, AUPR and FPR95: of correctly classified images
(positive) against misclassified ones, and of the closed set (positive) against each OOD set.
Tables follow; runs that differ in more than their seed are compared. Before that it writes,
beside each checkpoint or into --output:
    cifar100_resnet18.ood.json    every figure of every set and score, and their conditions
    cifar100_resnet18.ood.npz     scores and predictions of every image
    cifar100_resnet18.ood.png     AUROC of every run on every set, accuracy by epoch
Several runs share a .json and a .png, <first>_and_<number of others> or --name.
Exit status 1 if an OOD set or a checkpoint was skipped.
"""

import hashlib
import io
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import torch
from tyro.conf import arg

import ood_data
import ood_utils
import train
from ood_utils import SCORES, InputError

CLOSED_SET_HELP = f"{ood_data.CLOSED_SET_NAMES}; by default that of the checkpoint's log"
OodTypes = Annotated[tuple[str, ...], arg(help=ood_data.OOD_SET_NAMES)]


@dataclass
class Config:
    """The published evaluation. Edit a value here, or pass it as a flag."""

    checkpoint: tuple[str, ...] = ()  # of one run or several; by default train.py's
    compare: tuple[str, ...] = ()  # .ood.json files of earlier evaluations
    dataset: Annotated[str | None, arg(help=CLOSED_SET_HELP)] = None
    data_root: str = train.Config.data_root  # where torchvision's data sets are
    split: Literal["test", "validation"] = "test"  # validation: see train.py --validation
    ood_types: OodTypes = ("gaussian", "rademacher", "blob", "svhn")
    score: Literal[tuple(SCORES)] = "msp"  # what the report and the picture show
    batch_size: int = ood_data.EVAL_BATCH_SIZE  # affects speed and memory only
    seed: int = ood_data.NOISE_SEED  # of the noises
    device: str | None = None  # by default the first available of cuda, mps and cpu
    output: str | None = None  # folder to write to, by default that of each checkpoint
    name: str | None = None  # of the files about several runs
    verbose: bool = False  # print risks, thresholds, FPR95 by score and largest shares too


OOD_SHARE = 5  # test images per OOD image; AUPR's chance level depends on it
PARTS = ("checkpoints", "rows", "sets")  # the lists of an .ood.json file
CLOSED = "closed set"
SPLIT = "right / wrong"  # correctly classified test images against misclassified ones
ERROR, MEANS = "error rate", ("mean of noises", "mean of image sets")
METRICS = {
    "auroc": "AUROC",
    "aupr": "AUPR, in-distribution positive",
    "fpr95": "FPR95, in-distribution positive",
    "aupr_out": "AUPR, OOD positive",
    "fpr95_out": "FPR95, OOD positive",
}
# One run of 100 epochs, ryyt.cn/news/65707.html: AUROC, AUPR, FPR95 of MSP.
PUBLISHED_ERROR_RATE = 46.30
PUBLISHED = {
    SPLIT: (81.98, 85.74, 73.39),
    "gaussian": (68.16, 92.93, 99.40),
    "rademacher": (69.91, 93.18, 96.15),
    "blob": (68.06, 92.75, 97.55),
    "svhn": (66.97, 91.65, 89.05),
}
PUBLISHED_RECIPE = {"dataset": "cifar100", "stem": "imagenet", "validation": 0}
PUBLISHED_RECIPE |= {"epochs": 100, "epochs_done": 100, "batch_size": 128, "lr": 0.1}
PUBLISHED_RECIPE |= {"momentum": 0.9, "weight_decay": 1e-4, "label_smoothing": 0.0}
PUBLISHED_RECIPE |= {"schedule": "steps", "milestones": [0.5, 0.75], "gamma": 0.1}
RESULTS = Path(__file__).resolve().parent / "results"
SEEDS = RESULTS / "cifar100_seeds.ood.json"  # five runs of the published recipe


def evaluate(config=None):
    """Evaluate checkpoints, write and print the report; return what the last JSON holds.

    config: a Config, by default the published evaluation. Raises InputError or OSError.
    """
    config = ood_utils.as_plain(config or Config())
    settings, networks, loaders = load(config)
    earlier = [read_evaluation(file, settings, loaders) for file in as_tuple(config.compare)]
    check_twins([run for one in (*earlier, settings) for run in one["checkpoints"]])
    labels = loaders[CLOSED].labels.cpu().numpy()
    evaluations, files, failed = {}, {}, []
    for run, (path, model) in zip(settings["checkpoints"], networks.items(), strict=True):
        try:
            scores, predictions = score_sets(model, loaders)
        except InputError as error:
            print(f"error: {path}: {error}", file=sys.stderr)
            failed.append(str(path))
            continue
        figures, rows, sets = measure_run(path, scores, predictions, labels)
        of_run = {"checkpoints": [run | figures], "rows": rows, "sets": sets}
        evaluations[path] = settings | of_run
        files[output_path(config, path, ".ood.npz")] = pack(scores, predictions, labels, loaders)
    if not evaluations:
        raise InputError("No checkpoint is left.")
    results = combine(earlier, evaluations.values())
    first = next(iter(evaluations))
    others = len(results["checkpoints"]) - 1
    name = config.name or (f"{first.stem}_and_{others}" if others else first.stem)
    joint = first.with_name(f"{name}.pth")
    for path, evaluation in (evaluations | {joint: results}).items():
        text = json.dumps(evaluation, indent=1)
        files[output_path(config, path, ".ood.json")] = text.encode()
    files[output_path(config, joint, ".ood.png")] = draw(results)
    if len(loaders) == 1 and config.ood_types:  # every set was skipped: keep earlier files
        files = {}
    for file, content in files.items():
        ood_utils.write_file(file, content)
    print_report(results, len(evaluations))
    print_tables(results, config.verbose)
    for file in files:
        print(f"wrote {file}")
    return results | {"failed": failed}


# Load -----------------------------------------------------------------------------------


def load(config):
    """Read and check everything that a Config names, before anything is scored.

    Returns the start of the JSON, {path: network}, and {name: loader} with the closed set
    first. Raises InputError or OSError; an unavailable OOD set is listed under "skipped".
    """
    ood_utils.check_numbers(config, batch_size=1, seed=0)
    if config.score not in SCORES:
        raise InputError(f"Unknown score {config.score!r}: use {', '.join(SCORES)}.")
    if config.name and Path(config.name).name != config.name:
        raise InputError(f"--name {config.name} is a path: use --output for the folder.")
    dataset = train.Config.dataset if config.dataset is None else config.dataset
    names = as_tuple(config.checkpoint) or [train.Config.checkpoint]
    paths = [train.checkpoint_path(name, dataset, train.Config.seed) for name in names]
    networks = {path: train.load_network(path) for path in paths}
    logs = {path: train.read_log(path) for path in paths}
    runs = [name_run(path, networks[path], logs[path]) for path in paths]
    check_twins(runs)
    check_outputs(config, paths)
    known = [log["config"]["dataset"] for log in logs.values() if log]
    if known and config.dataset is None:
        dataset = known[0]
    sets = name_sets(as_tuple(config.ood_types), dataset)
    device = ood_utils.pick_device(config.device)
    settings = asdict(config) | {"dataset": dataset, "ood_types": list(sets)}
    for name in ("output", "name", "verbose", "compare"):  # no figure depends on them
        del settings[name]
    results = {"config": settings, **ood_utils.describe(device), "checkpoints": runs}
    print(f"device: {results['device']}, float32", file=sys.stderr)
    held_out = 0
    if config.split == "validation":
        held_out, *others = {known_of(run).get("validation", 0) for run in runs}
        if others or not held_out:
            raise InputError("--split validation needs runs of one train.py --validation NUMBER.")
    data = (dataset, config.data_root, config.batch_size)
    test_loader = train.get_loader(False, *data, device=device, validation=held_out)
    for run, model in zip(runs, networks.values(), strict=True):
        check_closed_set(run, model, dataset, test_loader.classes)
        model.to(device)
    loaders, results["skipped"] = build_loaders(config, sets, test_loader, device)
    results["code"] = train.digest_code(ood_data.__file__, ood_utils.__file__)
    images = [name for name in loaders if name not in ood_data.NOISES]
    results["content"] = {name: ood_data.digest(loaders[name]) for name in images}
    return results, networks, loaders


def as_tuple(names):
    return (names,) if isinstance(names, str) else tuple(names)


def check_outputs(config, paths):
    """Raise InputError where two checkpoints would share files, or a folder is read-only."""
    outputs = [output_path(config, path, "") for path in paths]
    if config.name:
        outputs.append(outputs[0].with_name(config.name))
    if len(set(outputs)) < len(outputs):
        raise InputError("Checkpoints or --name: two of the same name would share files.")
    for output in outputs:
        output.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(output.parent, os.W_OK):
            raise InputError(f"{output.parent} cannot be written to: pass --output.")


def output_path(config, path, ending):
    """In --output, or beside the checkpoint; in results/ only where --output says so."""
    folder = path.parent if path.parent.resolve() != RESULTS else Path()
    if config.output is not None:
        folder = ood_utils.as_path(config.output, "--output")
    return folder / f"{path.stem}{ending}"


def name_run(path, model, log):
    """What the JSON says of a checkpoint before its figures: its digests and its training."""
    weights = hashlib.sha256()
    for value in model.state_dict().values():
        weights.update(value.contiguous().numpy())
    run = {"path": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    run["weights"] = weights.hexdigest()
    if log:
        settings = train.trained_with(log)
        accuracies = [epoch[key] for epoch in log["epochs"] for key in epoch if "accuracy" in key]
        run["training"] = {"seed": settings.pop("seed", None), "settings": settings}
        run["training"] |= {"epochs_done": len(log["epochs"]), "accuracy": accuracies}
    return run


def known_of(run):
    """What a run was trained with, by its log; {} without one."""
    if "training" not in run:
        return {}
    return run["training"]["settings"] | {"epochs_done": run["training"]["epochs_done"]}


def check_twins(runs):
    """Raise InputError where two runs have the same file or weights."""
    known = {}
    for run in runs:
        for digest in {run["sha256"], run.get("weights", run["sha256"])}:
            twin = known.setdefault(digest, run)
            if twin is not run:
                both = f"{run['path']} has the weights of {twin['path']}"
                raise InputError(f"{both}: pass it once.")


def check_closed_set(run, model, dataset, classes):
    """Raise InputError if a run has other classes or another normalisation than now."""
    known, path = known_of(run), run["path"]
    outputs = ood_utils.last_layer(model).out_features
    trained_on, fits = f"{outputs} classes", outputs == len(classes)
    if known:
        trained_on, fits = known["dataset"], known["classes"] == classes
    if not fits:
        raise InputError(f"{path} was trained on {trained_on}, not on {dataset}: pass --dataset.")
    normalisation = {"mean": list(ood_data.MEAN), "std": list(ood_data.STD)}
    if train.differences(known, normalisation):
        raise InputError(f"{path} has another MEAN and STD: --compare its evaluation.")
    if known and known["epochs_done"] < known["epochs"]:
        epochs = f"{known['epochs_done']} of {known['epochs']} epochs"
        print(f"note: {path} is an unfinished run, {epochs}", file=sys.stderr)


def name_sets(ood_types, dataset):
    """Return {name: OOD type}; the set of a folder has the folder's name."""
    sets = {}
    known = [*ood_data.NOISES, *ood_data.OOD_IMAGES]
    for ood_type in dict.fromkeys(ood_types):
        ood_data.check_ood_name(ood_type, dataset)
        name = ood_type
        if ood_type not in known:
            name = printable(ood_utils.as_path(ood_type, "OOD type").resolve().name)
        if name in (*sets, CLOSED, ERROR, *MEANS) or (name in known and name != ood_type):
            raise InputError(f"Two sets would be named {name!r}: rename the folder {ood_type}.")
        sets[name] = ood_type
    return sets


def printable(name):
    return "".join(letter if letter.isprintable() else "?" for letter in str(name))


def build_loaders(config, sets, test_loader, device):
    """{name: loader} of the closed set and the OOD sets, {name: reason} of those skipped."""
    count = max(1, len(test_loader.images) // OOD_SHARE)
    settings = (config.batch_size, config.seed, config.data_root, device)
    loaders, skipped = {CLOSED: test_loader}, {}
    for name, ood_type in sets.items():
        try:
            loaders[name] = ood_data.build_ood_loader(ood_type, count, *settings)
        except (InputError, OSError) as error:
            place = "" if isinstance(error, InputError) else f" ({ood_utils.place_of(error)})"
            skipped[name] = " ".join(f"{error}{place}".split())
    return loaders, skipped


def read_evaluation(file, settings, loaders):
    """Return the JSON of an earlier evaluation; InputError if it is for other images."""
    ours = images_of(settings, {name: len(loaders[name].images) for name in loaders})
    score = settings["config"]["score"]
    try:
        earlier = json.loads(ood_utils.as_path(file, "--compare").read_text())
        theirs = images_of(earlier, {row["set"]: row["images"] for row in earlier["sets"]})
        has_score = all(score in run["threshold"] for run in earlier["checkpoints"])
        figures = [*pd.DataFrame(earlier["rows"])["auroc"].dropna()]
        figures += [run["error_rate"] for run in earlier["checkpoints"]]
        if not all(figure >= 0 for figure in figures):
            raise ValueError("a figure is no percentage")
        for row in (*earlier["rows"], *earlier["sets"]):
            row["checkpoint"] = f"{file}: {row['checkpoint']}"
        for run in earlier["checkpoints"]:
            run["path"] = f"{file}: {run['path']}"
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(f"{file} is not an .ood.json file of test.py: {error!r}") from error
    if earlier.get("code", settings["code"]) != settings["code"]:
        print(f"note: ood_data.py or ood_utils.py has changed since {file}", file=sys.stderr)
    differ = train.differences(theirs, ours)
    if differ or not has_score:
        raise InputError(f"{file} does not compare: {differ or f'it has no score {score}'}.")
    return earlier


def images_of(results, counts):
    """What two evaluations must agree on to be compared."""
    config, contents = results["config"], results.get("content", {})
    same = {"closed set": Path(config["dataset"]).name, "noise seed": config["seed"]}
    same |= {"split": config.get("split", "test")}
    same |= {f"images of {name}": count for name, count in counts.items()}
    return same | {f"content of {name}": contents[name] for name in contents}


# Score and measure ----------------------------------------------------------------------


def all_scores(logits):
    """float64 (N, len(SCORES) + 1): every score; in the last column the predicted class."""
    columns = [score(logits) for score in SCORES.values()]
    return torch.stack([*columns, logits.argmax(1).double()], dim=1)


def score_sets(model, loaders):
    """Of every set, scores float64 (N, len(SCORES)) and predictions int64 (N,), as two dicts."""
    scores, predictions = {}, {}
    for name, loader in loaders.items():
        columns = ood_utils.get_ood_scores(model, loader, score=all_scores)
        if not np.isfinite(columns).all():
            raise InputError(f"scores of {name} are not finite: leave this checkpoint out.")
        scores[name] = columns[:, :-1]
        predictions[name] = columns[:, -1].astype(np.int64)
    return scores, predictions


def measure(pos, neg):
    """Counts, and metrics in percent in both conventions; None where a group is empty."""
    total = len(pos) + len(neg)
    row = {"positives": len(pos), "negatives": len(neg)}
    row["chance_aupr"] = 100 * len(pos) / total
    row["chance_aupr_out"] = 100 * len(neg) / total
    row |= dict.fromkeys(METRICS)
    if len(pos) and len(neg):
        auroc, aupr, fpr95 = ood_utils.get_performance(pos, neg)
        row |= {"auroc": 100 * auroc, "aupr": 100 * aupr, "fpr95": 100 * fpr95}
        _, aupr, fpr95 = ood_utils.get_performance(-neg, -pos)  # OOD is positive
        row |= {"aupr_out": 100 * aupr, "fpr95_out": 100 * fpr95}
    return row


def measure_run(path, scores, predictions, labels):
    """Return what the JSON holds of one checkpoint: its own figures, its rows, its sets."""
    correct = predictions[CLOSED] == labels
    run = {"path": str(path), "error_rate": 100 * (1 - correct.mean())}
    run |= {"threshold": {}, "aurc": {}, "augrc": {}}
    rows, sets = [], []
    for column, score in enumerate(SCORES):
        closed = scores[CLOSED][:, column]
        run["threshold"][score] = ood_utils.get_threshold(closed)
        aurc, augrc = ood_utils.get_risks(closed, correct)
        run["aurc"][score], run["augrc"][score] = 100 * aurc, 100 * augrc
        pairs = {SPLIT: (closed[correct], closed[~correct])}
        ood_sets = [name for name in scores if name != CLOSED]
        pairs |= {name: (closed, scores[name][:, column]) for name in ood_sets}
        for name, (pos, neg) in pairs.items():
            row = {"checkpoint": str(path), "set": name, "score": score}
            rows.append(row | measure(pos, neg))
    for name, classes in predictions.items():
        effective, largest = ood_utils.predicted_classes(classes)
        row = {"checkpoint": str(path), "set": name, "images": len(classes)}
        sets.append(row | {"effective_classes": effective, "largest_share": 100 * largest})
    return run, rows, sets


def pack(scores, predictions, labels, loaders):
    """The bytes of the .npz: what any other metric needs."""
    arrays = {"score_names": list(SCORES), "labels": labels}
    arrays["predictions"] = predictions[CLOSED]
    arrays |= {f"scores/{name}": array for name, array in scores.items()}
    arrays |= {f"predictions/{name}": array for name, array in predictions.items()}
    named = {name: loader.files for name, loader in loaders.items() if loader.files}
    arrays |= {f"files/{name}": files for name, files in named.items()}
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    return content.getvalue()


# Group and compare ----------------------------------------------------------------------


def combine(earlier, ours):
    """Join evaluations, earlier ones first, and name the group of every run and row.

    A group is a setting: its runs differ in their seed only. Earlier evaluations have groups
    of their own, and so has a run without a log.
    """
    evaluations = [*earlier, *ours]
    results = dict(evaluations[-1])
    for part in PARTS:
        results[part] = [entry for one in evaluations for entry in one[part]]
    groups = group_runs(earlier) + group_runs(ours)
    for group, name in zip(groups, name_groups(groups), strict=True):
        for run in group["runs"]:
            run["group"] = printable(name)
    names = {run["path"]: run["group"] for run in results["checkpoints"]}
    for row in (*results["rows"], *results["sets"]):
        row["group"] = names[row["checkpoint"]]
    return results


def group_runs(evaluations):
    """Group the runs of evaluations by what is known of them: {"known": {}, "runs": []}."""
    groups = []
    for run in [run for one in evaluations for run in one["checkpoints"]]:
        known = known_of(run)
        for group in groups:
            if known and group["known"] and not train.differences(group["known"], known):
                break
        else:
            group = {"known": {}, "runs": []}
            groups.append(group)
        group["known"] |= known
        group["runs"].append(run)
    return groups


def name_groups(groups):
    """The settings in which groups differ; where needed their code and data, or their files."""
    first, *others = [group["known"] for group in groups]
    common = [key for key in first if all(key in other for other in others)]
    differ = [key for key in common if any(other[key] != first[key] for other in others)]
    implied = (*train.DATA, "epochs_done", "code")  # by a setting, as a rule
    for keys in ([key for key in differ if key not in implied], differ):
        names = [", ".join(f"{key} {group['known'][key]}" for key in keys) for group in groups]
        if all(names) and len(set(names)) == len(names):
            return names
    paths = [group["runs"][0]["path"] for group in groups]
    files = [Path(path.split(": ")[0]).name for path in paths]  # .pth, or an earlier .ood.json
    stems = [file.removesuffix(".pth").removesuffix(".ood.json") for file in files]
    names = [f"{name} {stem}".strip() for name, stem in zip(names, stems, strict=True)]
    return names if len(set(names)) == len(names) else paths


def set_values(rows, metric):
    """A metric: a line for each run, a column for each set and for two means over sets."""
    values = rows.pivot(index="checkpoint", columns="set", values=metric)
    values = values.loc[rows["checkpoint"].unique(), rows["set"].unique()]
    noises = [name for name in values if name in ood_data.NOISES]
    images = [name for name in values if name not in (*noises, SPLIT)]
    for title, names in zip(MEANS, (noises, images), strict=True):
        if names:
            values[title] = values[names].mean(axis=1)
    return values


def compare(results):
    """A DataFrame of texts: error rate and AUROC of each group, and differences."""
    rows = shown_rows(results)
    runs = pd.DataFrame(results["checkpoints"]).set_index("path")
    runs["seed"] = [run.get("training", {}).get("seed") for run in results["checkpoints"]]
    everywhere = rows.groupby("set")["checkpoint"].transform("nunique") == len(runs)
    values = set_values(rows[everywhere], "auroc").loc[runs.index]
    values.insert(0, ERROR, runs["error_rate"])
    table, base = {}, None
    for name, group in runs.groupby("group", sort=False):
        group = group.sort_values("seed")
        figures = values.loc[group.index]
        count = "1 run" if len(group) == 1 else f"{len(group)} runs"
        table[f"{name} ({count})"] = figures.agg(spread)
        if base is None:
            base, base_name, seeds = figures, name, list(group["seed"])
            continue
        same_seeds = seeds == list(group["seed"])
        paired = 1 < len(seeds) == group["seed"].nunique() and same_seeds
        how = "paired by seed" if paired else "unpaired"
        how = how if len(seeds) + len(group) > 2 else "one run each"
        pairs = [(base[row], figures[row]) for row in values]
        differences = [ood_utils.get_difference(*pair, paired) for pair in pairs]
        texts = [difference_text(*difference) for difference in differences]
        table[f"{name} minus {base_name}, {how}"] = texts
    return pd.DataFrame(table)


def difference_text(difference, low, high):
    if not np.isfinite(low):
        return f"{difference:+.2f}"
    marked = " *" if low > 0 or high < 0 else ""
    return f"{difference:+.2f} [{low:.2f}, {high:.2f}]{marked}"


# Report ---------------------------------------------------------------------------------


def shown_rows(results):
    """The rows of the score that report and picture are about, as a DataFrame."""
    rows = pd.DataFrame(results["rows"])
    return rows[rows["score"] == results["config"]["score"]]


def published_of(results):
    """The published figures if all runs have that recipe, split and score, else {}."""
    config, runs = results["config"], results["checkpoints"]
    shown = config["score"] == "msp" and config.get("split", "test") == "test"
    same = [PUBLISHED_RECIPE.items() <= known_of(run).items() for run in runs]
    return PUBLISHED if shown and all(same) else {}


def print_report(results, count):
    """The published report; in-distribution, or correctly classified, is positive."""
    rows = shown_rows(results)
    for run in results["checkpoints"][-count:]:
        if count > 1:
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
                print(f"AUROC: n/a, AUPR: n/a, FPR95: n/a (no {missing} image)")
            else:
                print(ood_utils.PERFORMANCE_LINE.format(row.auroc, row.aupr, row.fpr95))


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
    table[title] = table[title].str.replace("|", "\\|")
    table.columns = table.columns.str.replace("|", "\\|")
    align = ["left", *["right"] * (table.shape[1] - 1)]
    print(table.to_markdown(index=False, tablefmt="pipe", colalign=align, disable_numparse=True))
    print()


def print_comparison(results):
    table = compare(results)
    count = table.map(lambda cell: "[" in cell).sum(axis=None)
    sets = shown_rows(results)["set"].unique()
    left_out = [name for name in sets if name not in table.index]
    if not count and results["config"]["dataset"] == "cifar100" and SEEDS.exists():
        seeds = json.loads(SEEDS.read_text()) | {"config": results["config"]}
        values = set_values(shown_rows(seeds), "auroc")
        values[ERROR] = [run["error_rate"] for run in seeds["checkpoints"]]
        table["range over seeds (5 shipped runs)"] = [
            f"{np.ptp(values[row]):.2f}" if row in values else "" for row in table.index
        ]
    print()
    print_table(table, f"error rate and AUROC, {results['config']['score']}")
    if left_out:
        print(f"Left out, not in every evaluation: {', '.join(left_out)}.")
    if count:
        print(f"{count} intervals at 95%, each for the mean difference over training seeds on")
        print("these images, not on others; * excludes 0, as 1 of 20 does by chance.")
    else:
        print("One run each, or nothing varies, so no interval: another seed moves these rows,")
        print("too, noises most.")


def print_performance(results):
    """Every metric of every set, both conventions."""
    rows = shown_rows(results).groupby("set", sort=False)
    table = rows[list(METRICS)].agg(spread).rename(columns=METRICS)
    sets = pd.DataFrame(results["sets"]).groupby("set")
    classes = sets["effective_classes"].agg(spread)
    table["effective classes"] = classes.reindex(table.index, fill_value="")
    skipped = [name for name in results["skipped"] if name not in table.index]
    table = table.reindex([*table.index, *skipped], fill_value="skipped")
    published = published_of(results)
    if published:
        as_text = "{:.2f} / {:.2f} / {:.2f}".format
        cells = {name: as_text(*figures) for name, figures in published.items()}
        table["published"] = [cells.get(name, "") for name in table.index]
    print_table(table, results["config"]["score"])


def print_scores(results, metric):
    """One metric by score, of every OOD set and of the means of noises and of image sets."""
    rows = pd.DataFrame(results["rows"])
    scores = rows[rows["set"] != SPLIT].groupby("score", sort=False)
    columns = {score: set_values(of, metric).agg(spread) for score, of in scores}
    print_table(pd.DataFrame(columns), METRICS[metric])


def print_details(results):
    """What else the JSON holds: risks, thresholds, FPR95 by score, predicted classes."""
    score, runs = results["config"]["score"], results["checkpoints"]
    risks = [spread([run[risk][score] for run in runs]) for risk in ("aurc", "augrc")]
    thresholds = ", ".join(f"{run['threshold'][score]:.4f}" for run in runs)
    print("AURC {}, AUGRC {} of the closed set (lower is better)".format(*risks))
    print(f"95% of the closed set has a score of at least {thresholds}\n")
    print_scores(results, "fpr95")
    sets = pd.DataFrame(results["sets"]).groupby("set", sort=False)
    shares = sets["largest_share"].agg(spread)
    print_table(shares.to_frame("largest share"), "predicted classes")


def print_tables(results, verbose=False):
    """Markdown tables of what the JSON holds: the comparison, then each group."""
    codes = [known_of(run).get("code", "unknown") for run in results["checkpoints"]]
    if len(set(codes)) > 1:
        codes = ", ".join(dict.fromkeys(codes))
        print(f"\nThe code of these runs differs, or may differ: {codes}.")
    groups = list(dict.fromkeys(run["group"] for run in results["checkpoints"]))
    if len(groups) > 1:
        print_comparison(results)
    for group in groups:
        own = dict(results)
        for part in PARTS:
            own[part] = [one for one in results[part] if one["group"] == group]
        runs = own["checkpoints"]
        title = f"\n{group}: {own['config'].get('split', 'test')} images, in percent"
        if len(runs) > 1:
            title += f" of {len(runs)} runs, mean +- standard deviation"
        title += f"; error rate {spread([run['error_rate'] for run in runs])}"
        if published_of(own):
            title += f" (published {PUBLISHED_ERROR_RATE:.2f})"
        print(f"{title}\n")
        seeds = [run["training"]["seed"] for run in runs if "training" in run]
        if len(set(seeds)) < len(seeds):
            print("Some of these runs have the same seed: they are not independent.\n")
        print_performance(own)
        if len(own["config"]["ood_types"]) > len(own["skipped"]):
            print_scores(own, "auroc")
        if verbose:
            print_details(own)


# Picture --------------------------------------------------------------------------------


def short(name, longest=25):
    name = name if len(name) <= longest else f"{name[: longest - 1]}…"
    return name.replace("$", r"\$")  # no TeX


def draw_dots(axes, results, colours):
    """For each set a line of dots per group, below each other; grey: chance."""
    published, rows = published_of(results), shown_rows(results)
    names = list(rows["set"].unique())
    axes.axvline(50, color="0.8")
    for y, name in enumerate(names):
        for line, (group, colour) in enumerate(colours.items()):
            aurocs = rows[(rows["set"] == name) & (rows["group"] == group)]["auroc"]
            height = y + 0.6 * line / len(colours)
            axes.plot(aurocs, [height] * len(aurocs), "o", color=colour, alpha=0.7)
        if name in published:
            axes.plot(published[name][0], y, "x", color="black", markersize=8)
    axes.set_yticks(range(len(names)), [short(name) for name in names])
    axes.invert_yaxis()
    label = "AUROC of each run; grey: chance"
    axes.set_xlabel(f"{label}; x: published" if published else label)


def draw_accuracies(axes, results, colours):
    """The accuracy by epoch of every run whose log is known."""
    for run in results["checkpoints"]:
        accuracy = 100 * np.array(run.get("training", {}).get("accuracy", []))
        epochs = np.arange(len(accuracy)) + 1
        axes.plot(epochs, accuracy, color=colours[run["group"]], lw=1)
    axes.set_xlabel("epoch")
    axes.set_ylabel("accuracy, %")
    for group, colour in colours.items():
        axes.plot([], [], "o", color=colour, label=f" {short(group, 60)}")  # no "_" first
    axes.legend(loc="lower right", frameon=False)


def draw(results):
    """PNG bytes: the AUROC of every run on every set, and its accuracy by epoch."""
    import matplotlib
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    groups = dict.fromkeys(run["group"] for run in results["checkpoints"])
    colours = {group: f"C{number}" for number, group in enumerate(groups)}
    height = 0.3 * shown_rows(results)["set"].nunique()  # inches
    style = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        figure = Figure((7.5, height + 2.2), dpi=130, layout="constrained")
        dots, accuracies = figure.subplots(2, 1, height_ratios=(height + 0.4, 1.6))
        draw_dots(dots, results, colours)
        draw_accuracies(accuracies, results, colours)
        content = io.BytesIO()
        figure.savefig(content, format="png")
    return content.getvalue()


if __name__ == "__main__":
    outcome = ood_utils.run_command(evaluate, Config)
    sys.exit(1 if outcome["skipped"] or outcome["failed"] else 0)

"""Evaluate checkpoints of train.py on their closed set and on OOD sets.

    python test.py                                               # cifar100_resnet18.pth
    python test.py --ood-types gaussian photos ~/pictures        # other sets, or a folder
    python test.py --checkpoint seed0.pth seed1.pth seed2.pth    # one after the other

Prints, in percent, the error rate, then AUROC, AUPR and FPR95: of correctly classified images
(positive) against misclassified ones, and of the closed set (positive) against each OOD set; then
a table. Writes, beside each checkpoint X.pth or into --output, every figure (X.ood.json, which
experiments/compare.py compares) and the scores and predictions of every image (X.ood.npz); moves
another evaluation there to X.1.ood.*. Exit status 1 if an OOD set or a checkpoint was skipped.
"""

import glob
import hashlib
import io
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from tabulate import tabulate
from tyro.conf import arg

import ood_data
import ood_utils
import train
from ood_utils import SCORES, InputError, Name, Natural, Positive, UserPath, digest

CLOSED_SET_HELP = f"{ood_data.CLOSED_SET_NAMES}; by default that of the training"
OodTypes = Annotated[tuple[Name, ...], arg(help=ood_data.OOD_SET_NAMES)]


@dataclass
class Config:
    """The published evaluation. Edit a value here, or pass it as a flag."""

    checkpoint: tuple[UserPath, ...] = ()  # of one run or several; by default train.py's
    dataset: Annotated[Name | None, arg(help=CLOSED_SET_HELP)] = None
    data_root: UserPath = train.Config.data_root  # where torchvision's data sets are
    split: Literal["test", "validation"] = "test"  # validation: see train.py --validation
    ood_types: OodTypes = ("gaussian", "rademacher", "blob", "svhn")
    score: Literal[tuple(SCORES)] = "msp"  # what is printed
    batch_size: Positive = ood_data.EVAL_BATCH_SIZE  # affects speed and memory only
    seed: Natural = ood_data.NOISE_SEED  # of the noises
    device: str | None = None  # by default the first available of cuda, mps and cpu
    output: UserPath | None = None  # folder, by default that of each checkpoint


TEST_PER_OOD = 5  # test images per OOD image; sets AUPR's chance level
CLOSED = "closed set"
RIGHT_WRONG = "right / wrong"  # correctly classified images against misclassified ones
RESERVED = (CLOSED, "error rate", "mean of noises", "mean of image sets")  # rows of tables
METRICS = {"auroc": "AUROC", "aupr": "AUPR, in-distribution positive"}
METRICS |= {"fpr95": "FPR95, in-distribution positive"}
METRICS |= {"aupr_out": "AUPR, OOD positive", "fpr95_out": "FPR95, OOD positive"}
RESULTS = Path(__file__).resolve().parent / "results"


def evaluate(config=None):
    """Evaluate the checkpoints of a Config, by default with the published evaluation; return what
    the JSON of each holds. Raises InputError or OSError; of several checkpoints, prints an
    InputError of one, whose evaluation is None."""
    config = ood_utils.check(config or Config())
    paths, evaluations = find_checkpoints(config), []
    for path in paths:
        try:
            evaluations.append(evaluate_run(config, path))
        except InputError as error:
            # If all failed, the last one ends the call.
            if len(evaluations) == len(paths) - 1 and not any(evaluations):
                raise
            print(f"error: {error}", file=sys.stderr)
            evaluations.append(None)
    return evaluations


def evaluate_run(config, path):
    """Evaluate a checkpoint: print the report, write the files, return what the JSON holds."""
    # The shipped results are not written to.
    shipped = Path(os.path.realpath(path)).parent == RESULTS
    folder = Path() if shipped else path.parent
    if folder.resolve() == RESULTS and not config.output:
        raise InputError(f"{RESULTS} is not written to: pass --output.")
    model, loaders, evaluation = load(config, path)
    scores, predictions = score_sets(model, loaders, path)
    evaluation |= measure(scores, predictions, loaders)
    check_error_rate(evaluation, path)
    print(f"checkpoint: {path}", file=sys.stderr)
    name = path.name if config.split == "test" else f"{path.stem}.val.pth"
    try:
        print_report(evaluation, config.score)
    finally:  # also if nobody reads the report
        write(evaluation, scores, predictions, loaders, (config.output or folder) / name)
    return evaluation


# Load -----------------------------------------------------------------------------------
def find_checkpoints(config):
    """The paths of a Config, with patterns expanded, where no shell did it."""
    paths, trained = [], train.Config(dataset=config.dataset or train.Config.dataset)
    for path in config.checkpoint or (train.checkpoint_path(trained),):
        found = [] if path.exists() else sorted(glob.glob(str(path)))
        paths += map(Path, found or [path])
    return paths


def load(config, path):
    """Return a network on the device, {name: loader} of its sets, and what the JSON says of both.
    Raises InputError for a network of other images, OSError where the closed set is missing."""
    run = train.read_run(path)
    log, model = run["log"], train.load_network(path, run)
    outputs = ood_utils.last_layer(model).out_features
    if not (log or config.dataset or outputs == 100):
        raise InputError(f"{path} has no log and {outputs} classes: pass --dataset.")
    loaders, conditions = load_sets(config, log["config"] if log else vars(train.Config()))
    closed = loaders[CLOSED]
    if outputs != len(closed.classes) or (log and log["classes"] != closed.classes):
        raise InputError(f"{path} was trained on {outputs} classes, not on these: pass --dataset.")
    constants = {"mean": [*ood_data.MEAN], "std": [*ood_data.STD]}
    if log and not constants.items() <= log["settings"].items():
        raise InputError(f"{path} was trained with another MEAN and STD than ood_data.py has.")
    held_out = config.split == "validation"
    if log and held_out and log["tested_on"] != digest(closed.images, closed.labels):
        raise InputError(f"{path} did not hold out these validation images.")
    if log and len(log["epochs"]) < log["config"]["epochs"]:
        done = f"{len(log['epochs'])} of {log['config']['epochs']} epochs"
        print(f"note: {path} is unfinished, {done}", file=sys.stderr)
    checkpoint = {"path": path.name, "weights": digest(*model.state_dict().values())}
    evaluation = {"checkpoint": checkpoint, "training": log} | conditions
    return model.to(closed.images.device), loaders, evaluation


def load_sets(config, trained_on):
    """Return {name: loader} with the closed set first, and the conditions that the JSON holds.
    trained_on: settings of the training. An unavailable OOD set is listed under "skipped"."""
    dataset = config.dataset or trained_on["dataset"]
    held_out = trained_on["validation"] if config.split == "validation" else 0
    if config.split == "validation" and not held_out:
        raise InputError("--split validation needs a run of train.py --validation NUMBER.")
    names = name_sets(config.ood_types, dataset)
    device = ood_utils.pick_device(config.device)
    common = {"batch_size": config.batch_size, "data_root": config.data_root, "device": device}
    loaders = {CLOSED: train.get_loader(False, dataset, validation=held_out, **common)}
    count = max(1, len(loaders[CLOSED].images) // TEST_PER_OOD)
    skipped = {}
    for name, ood_type in names.items():
        try:
            loaders[name] = ood_data.build_ood_loader(ood_type, count, config.seed, **common)
        except OSError as error:
            skipped[name] = " ".join(str(error).split())
    asked = {"dataset": dataset, "split": config.split, "seed": config.seed}
    conditions = {"config": asked | {"ood_types": [*names]}, **ood_utils.describe(device)}
    print(f"device: {conditions['device']}, float32", file=sys.stderr)
    classes = len(loaders[CLOSED].classes)
    digests = {name: digest_score(score, classes) for name, score in SCORES.items()}
    return loaders, conditions | {"skipped": skipped, "scores": digests}


def name_sets(ood_types, dataset):
    """Return {name: OOD type}; the set of a folder has the folder's name."""
    names, known = {}, (*ood_data.NOISES, *ood_data.OOD_IMAGES)
    closed = Path(os.path.realpath(os.path.expanduser(dataset)))
    own = () if dataset in ood_data.CLOSED_SETS else ("train", "val", "test")
    splits = [closed / split for split in own]
    for ood_type in dict.fromkeys(ood_types):
        name, overlaps = ood_type, ood_type == dataset
        if ood_type not in known:
            folder = Path(os.path.realpath(os.path.expanduser(ood_type)))
            name = "".join(c if c.isprintable() else "?" for c in ood_data.path_name(folder))
            overlaps = any(s.is_relative_to(folder) or folder.is_relative_to(s) for s in splits)
        if overlaps:
            raise InputError(f"OOD type {ood_type} is, or holds, the closed set: leave it out.")
        if name in (*names, *RESERVED) or (name in known and name != ood_type):
            raise InputError(f"Two sets would be named {name!r}: rename the folder {ood_type}.")
        names[name] = ood_type
    return names


def digest_score(score, classes):
    """8 hex digits of a score of fixed logits (20, classes): compare.py refuses another one."""
    logits = torch.from_numpy(np.random.default_rng(0).normal(0, 5, (20, classes)))
    values = " ".join(f"{value:.6g}" for value in score(logits).tolist())
    return hashlib.sha256(values.encode()).hexdigest()[:8]


def check_error_rate(evaluation, path):
    """Raise InputError where the log says another error rate on these images."""
    log, closed = evaluation["training"], evaluation["sets"][CLOSED]
    if not log or log["tested_on"] != closed["digest"]:
        return
    split = "validation" if log["config"]["validation"] else "test"
    logged = 100 * (1 - log["epochs"][-1][f"{split}_accuracy"])
    error_rate = evaluation["error_rate"]
    if abs(error_rate - logged) > max(0.5, 200 / closed["images"]):  # two images; devices: 0.04
        rates = f"an error rate of {error_rate:.2f}, but {logged:.2f} by its log"
        raise InputError(f"{path} has {rates}: evaluate it with the code that trained it.")


# Score and measure ----------------------------------------------------------------------
def score_sets(model, loaders, path=None):
    """Of every set, scores float64 (N, len(SCORES)) and predictions int64 (N,), as two dicts."""
    scores, predictions = {}, {}
    for name, loader in loaders.items():
        logits, _ = ood_utils.get_logits(model, loader)
        columns = [score(logits.double()) for score in SCORES.values()]
        scores[name] = torch.stack(columns, dim=1).double().numpy()
        predictions[name] = logits.argmax(1).numpy()
        if not np.isfinite(scores[name]).all():
            raise InputError(f"{path}: scores of {name} are not finite.")
    return scores, predictions


def measure(scores, predictions, loaders):
    """Return the figures of a network that the JSON holds, in percent; the arguments are by set.
    Metrics are None where a group is empty. The effective number of predicted classes is
    exp(-sum p ln p) over their shares p: k for k equally frequent ones. Near 1 the network assigns
    the whole set to one class: its row is one sample per network."""
    correct = predictions[CLOSED] == loaders[CLOSED].labels.cpu().numpy()
    figures = {"sets": {}, "error_rate": 100 * (1 - correct.mean())}
    for name, loader in loaders.items():
        _, counts = np.unique(predictions[name], return_counts=True)
        shares = counts / counts.sum()
        effective = np.exp(-np.sum(shares * np.log(shares)))
        of_set = {"kind": "noise" if name in ood_data.NOISES else "images"}
        of_set |= {"images": len(loader.images), "digest": digest(loader.images, loader.labels)}
        of_set |= {"effective_classes": effective, "largest_share": 100 * shares.max()}
        figures["sets"][name] = of_set
    figures |= {"threshold": {}, "aurc": {}, "augrc": {}, "metrics": METRICS, "rows": []}
    for column, score in enumerate(SCORES):
        closed = scores[CLOSED][:, column]
        figures["threshold"][score] = ood_utils.get_threshold(closed)
        aurc, augrc = ood_utils.get_risks(closed, correct)
        figures["aurc"][score], figures["augrc"][score] = 100 * aurc, 100 * augrc
        pairs = {name: (closed, scores[name][:, column]) for name in scores if name != CLOSED}
        pairs = {RIGHT_WRONG: (closed[correct], closed[~correct])} | pairs
        for name, (pos, neg) in pairs.items():
            row = {"set": name, "score": score, "positives": len(pos), "negatives": len(neg)}
            values = [None] * len(METRICS)
            if len(pos) and len(neg):
                swapped = ood_utils.get_performance(-neg, -pos)  # OOD is positive
                values = [*ood_utils.get_performance(pos, neg), *swapped[1:]]
                values = [100 * value for value in values]
            figures["rows"].append(row | dict(zip(METRICS, values, strict=True)))
    return figures


# Report ---------------------------------------------------------------------------------
def print_report(evaluation, score):
    """The published report, in-distribution or correctly classified as positive, and a table."""
    rows = {row["set"]: row for row in evaluation["rows"] if row["score"] == score}
    print(f"Error Rate {evaluation['error_rate']:.4f}")
    table = []
    for name in (RIGHT_WRONG, *evaluation["config"]["ood_types"]):
        if name != RIGHT_WRONG:
            print(f"ood type: {name}")
        if name in evaluation["skipped"]:
            print(f"skipped: {evaluation['skipped'][name]}")
            continue
        row = rows[name]
        if row["auroc"] is None:
            print("AUROC: n/a, AUPR: n/a, FPR95: n/a (one group has no image)")
        else:
            print(ood_utils.PERFORMANCE_LINE.format(row["auroc"], row["aupr"], row["fpr95"]))
        of_set = evaluation["sets"].get(name, {})
        counts = row["negatives"], of_set.get("effective_classes")
        table.append([name.replace("|", "\\|"), *(row[metric] for metric in METRICS), *counts])
    headers = score, *METRICS.values(), "negatives", "effective classes"
    print("\n" + tabulate(table, headers, "pipe", floatfmt=".2f", missingval="n/a"), flush=True)


def write(evaluation, scores, predictions, loaders, path):
    """Write X.ood.npz and X.ood.json for a path X.pth; another evaluation there is moved first.
    The .npz has what any other metric needs."""
    arrays = {"score_names": list(SCORES), "labels": loaders[CLOSED].labels.cpu().numpy()}
    arrays["predictions"] = predictions[CLOSED]
    for name, loader in loaders.items():
        arrays |= {f"scores/{name}": scores[name], f"predictions/{name}": predictions[name]}
        if loader.files:
            arrays[f"files/{name}"] = loader.files
    file, content = path.with_suffix(".ood.json"), io.BytesIO()
    np.savez_compressed(content, **arrays)
    text = json.dumps(evaluation, indent=1).encode()
    if not file.exists() or file.read_bytes() != text:
        ood_utils.set_aside(path, (".ood.npz", ".ood.json"))
    ood_utils.write_file(file.with_suffix(".npz"), content.getvalue())
    ood_utils.write_file(file, text)
    print(f"wrote {file} and {file.with_suffix('.npz').name}")


if __name__ == "__main__":
    outcome = ood_utils.run_command(evaluate, Config)
    sys.exit(1 if None in outcome or any(one["skipped"] for one in outcome) else 0)

"""How far does rounding the weights to float16 move the figures?

    python experiments/float16.py --checkpoint seed0.pth seed1.pth

Takes the options of test.py. Writes every checkpoint once more into results/ (or --output), with
its log beside it: in float16 and compressed, about a fifth as large, for torchvision's resnet18 and
test.py as before. Prints how far the figures move, and writes results/float16.json.
"""

import io
import json
import shutil
import sys
import zipfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ood_utils
import test as evaluation
import train

RESULTS = Path(__file__).resolve().parent.parent / "results"
METRICS = ["auroc", "aupr", "fpr95"]


def round_weights(model):
    """Round the weights in place; return torchvision's state dict of them in float16."""
    state = train.to_torchvision(model)
    for name, value in state.items():
        if value.is_floating_point():  # batch norm also counts its batches
            state[name] = value.half()
    train.from_torchvision(model, state)
    return state


def compress(state):
    """What torch.save writes, deflated: torch.load reads it, and the zeros cost nothing."""
    saved, content = io.BytesIO(), io.BytesIO()
    torch.save(state, saved)
    stored = zipfile.ZipFile(saved)
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as deflated:
        for name in stored.namelist():
            deflated.writestr(name, stored.read(name))
    return content.getvalue()


def measure_rounding(config):
    """Evaluate before and after; print the table, write the files and return the JSON."""
    config.output = config.output or str(RESULTS)
    results, paths, networks, loaders = evaluation.load(config)
    folder = Path(config.output).expanduser()
    if any(path.resolve().parent == folder.resolve() for path in paths):
        raise ood_utils.InputError("The rounded files would replace these: pass another --output.")
    results["rows"] = []
    for path, model in zip(paths, networks, strict=True):
        for weights in ("float32", "float16"):
            if weights == "float16":
                state = round_weights(model)
            arrays = evaluation.score_sets(model, loaders)
            checkpoint, rows, _ = evaluation.measure_checkpoint(path, *arrays)
            of_run = {"weights": weights, "error_rate": checkpoint["error_rate"]}
            results["rows"] += [row | of_run for row in rows]
        ood_utils.write_file(folder / path.name, compress(state))
        log = path.with_suffix(".json")
        if log.exists():
            shutil.copy(log, folder)
    print_tables(results)
    ood_utils.write_file(folder / "float16.json", json.dumps(results, indent=1).encode())
    return results


def print_tables(results):
    """The largest change of each figure over the checkpoints, in points."""
    rows = evaluation.shown_rows(results)
    figures = rows.set_index(["checkpoint", "set", "weights"])[[*METRICS, "error_rate"]]
    changes = figures.xs("float16", level="weights") - figures.xs("float32", level="weights")
    largest = changes.abs().groupby("set", sort=False).max()
    table = largest[METRICS].map("{:.2f}".format)
    table.columns = ["AUROC", "AUPR", "FPR95"]
    evaluation.print_table(table, "largest change")
    print(f"The error rate changes by at most {largest['error_rate'].max():.2f} points.")
    for name, reason in results["skipped"].items():
        print(f"skipped {name}: {reason}")


if __name__ == "__main__":
    ood_utils.run_command(measure_rounding, evaluation.Config)

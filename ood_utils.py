"""From a network's logits to OOD scores, and from scores to AUROC, AUPR and FPR95.

Every score points the same way: **higher means more in-distribution**. In `get_performance(pos, neg)` the first
argument is the positive class. Metrics are fractions; what is printed is percent. The second half of the file is what
train.py and test.py share besides: files, device, processes and the command line.

    from ood_utils import get_ood_scores, show_performance
    scores, right, wrong = get_ood_scores(model, test_loader, closed_set=True)
    show_performance(scores, get_ood_scores(model, ood_loader))
"""

import contextlib
import io
import os
import pickle
import platform
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchvision
import tyro
from tqdm import tqdm

RECALL_LEVEL = 0.95  # FPR95: the true positive rate at which the false positive rate is read


class InputError(ValueError):
    """Input that the user can mend: the command line prints it as one line, without a traceback."""


# ---------------------------------------------------------------------------------------------------------------------
# Scores


# Each takes logits float64 (N, classes) and returns (N,).


def msp(logits):
    """Maximum softmax probability (Hendrycks & Gimpel 2017, https://arxiv.org/abs/1610.02136)."""
    return logits.softmax(1).amax(1)


def max_logit(logits):
    """Largest logit (Hendrycks et al. 2022, https://arxiv.org/abs/1911.11132)."""
    return logits.amax(1)


def energy(logits):
    """Negative free energy at temperature 1, log sum exp of the logits (Liu et al. 2020, https://arxiv.org/abs/2010.03759)."""
    return logits.logsumexp(1)


def entropy(logits):
    """Negative Shannon entropy of the softmax, in nats."""
    return -torch.special.entr(logits.softmax(1)).sum(1)


def gen(logits, gamma=0.1, top=100):
    """Negative generalised entropy, minus the sum of p^gamma (1 - p)^gamma over the top classes (Liu, Lochman & Zach,
    GEN: Pushing the Limits of Softmax-Based Out-of-Distribution Detection, CVPR 2023)."""
    p = logits.softmax(1).topk(min(top, logits.shape[1]), 1).values
    return -(p**gamma * (1 - p) ** gamma).sum(1)


SCORES = {"msp": msp, "max_logit": max_logit, "energy": energy, "entropy": entropy, "gen": gen}


@torch.no_grad()
def get_logits(model, dataloader):
    """Run the network in eval mode and float32; return logits float32 (N, classes) and labels int64 (N,), on the CPU.

    dataloader: any iterable of (images, labels) batches, on whatever device. The model is left in the mode it was in.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        bar = tqdm(dataloader, "scoring", delay=1, leave=False, disable=None)
        batches = [(model(images.to(device)).cpu(), labels.cpu()) for images, labels in bar]
    finally:
        model.train(was_training)
    if not batches:
        raise InputError("the data loader yields no batch")
    logits, labels = zip(*batches, strict=True)
    return torch.cat(logits), torch.cat(labels)


def get_ood_scores(model, dataloader, closed_set=False, score=msp):
    """Score every image that the loader yields, float64 (N,): higher means more in-distribution.

    With closed_set=True return (scores, right, wrong): all scores, those of correctly classified images and those of
    misclassified ones. The score is computed in float64: a float32 softmax reaches exactly 1.0 at a logit margin of
    about 21, and ties begin.
    """
    logits, labels = get_logits(model, dataloader)
    scores = score(logits.double()).numpy()
    if not closed_set:
        return scores
    correct = (logits.argmax(1) == labels).numpy()
    return scores, scores[correct], scores[~correct]


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def as_scores(scores, group):
    """Return a score array, tensor or list as float64 (N,), or raise InputError, a ValueError."""
    scores = np.asarray(torch.as_tensor(scores).cpu(), dtype=np.float64)
    if scores.size == 0:
        raise InputError(f"no {group} scores: the metrics need at least one of each class")
    if scores.size != max(scores.shape, default=1):
        raise InputError(f"{group} scores have shape {scores.shape}: expected one score per image")
    if not np.isfinite(scores).all():
        raise InputError(f"{np.sum(~np.isfinite(scores))} of {scores.size} {group} scores are not finite")
    return scores.ravel()


def get_performance(pos, neg):
    """Return (AUROC, AUPR, FPR95) as fractions for the scores of the positive and of the negative class.

    Higher scores must mean "positive". For OOD as the positive class: get_performance(-ood_scores, -id_scores).
    AUROC: roc_auc_score. AUPR: average_precision_score, whose chance level is len(pos) / (len(pos) + len(neg)).
    FPR95: the false positive rate at the first threshold whose true positive rate is at least 0.95, no interpolation.
    Raises ValueError for an empty group, non-finite scores, or more than one score per image.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve  # slow to import

    pos, neg = as_scores(pos, "positive"), as_scores(neg, "negative")
    is_pos = np.repeat([1, 0], [len(pos), len(neg)])
    scores = np.concatenate([pos, neg])
    fpr, tpr, _ = roc_curve(is_pos, scores, drop_intermediate=False)
    fpr95 = fpr[np.argmax(tpr >= RECALL_LEVEL)]
    return float(roc_auc_score(is_pos, scores)), float(average_precision_score(is_pos, scores)), float(fpr95)


def aurc(scores, correct):
    """Area under the risk-coverage curve, a fraction, lower is better (Geifman & El-Yaniv 2017, arXiv 1705.08500).

    scores (N,): confidence in the prediction; correct (N,): whether it was right. The mean, over k = 1 ... N, of the
    error rate among the k most confident; among equal scores, its expectation over their orders. ValueError as above.
    """
    scores = as_scores(scores, "confidence")
    _, tie, sizes = np.unique(-scores, return_inverse=True, return_counts=True)
    errors = np.bincount(tie, weights=~np.asarray(correct, dtype=bool)) / sizes  # per group of equal scores
    return float(np.mean(np.cumsum(np.repeat(errors, sizes)) / np.arange(1, len(scores) + 1)))


def print_performance(auroc, aupr, fpr95):
    """Print the three metrics, given in percent, on one line."""
    print(f"AUROC: {auroc:.4f}, AUPR: {aupr:.4f}, FPR95: {fpr95:.4f}")


def show_performance(pos, neg):
    """Print AUROC, AUPR and FPR95 of get_performance in percent on one line."""
    print_performance(*(100 * metric for metric in get_performance(pos, neg)))


# ---------------------------------------------------------------------------------------------------------------------
# Files, device, processes and the command line, for train.py and test.py


def checkpoint_path(checkpoint, dataset):
    """The given path, or <dataset>_resnet18.pth in the working directory; InputError if it cannot be a checkpoint's."""
    path = Path(checkpoint or f"{Path(dataset).expanduser().resolve().name}_resnet18.pth").expanduser()
    if path.is_dir() or path.suffix == ".json":  # the run's figures go to <stem>.json
        kind = "a folder" if path.is_dir() else "a .json file"
        raise InputError(f"{path} is {kind}: pass a file such as resnet18.pth as --checkpoint.")
    return path


def write_file(path, content):
    """Write bytes, or what torch.save takes: at any moment the path holds the old file or the new one, whole."""
    if not isinstance(content, bytes):
        # On a full disk torch.save would stop with an internal error; a plain write says what is wrong.
        buffer = io.BytesIO()
        torch.save(content, buffer)
        content = buffer.getvalue()
    temporary = temporary_path(path)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written ({error}). What it held before is untouched.") from error


def temporary_path(path):
    """Where write_file writes first; the next run of the same checkpoint clears what a killed one left there."""
    return path.with_name(path.name + ".tmp")


def check_writable(path):
    """Raise an OSError now rather than after the first epoch; clear what a killed run left."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"Folder {path.parent} does not exist: create it, or pass another --checkpoint.")
    try:
        temporary_path(path).write_bytes(b"")
        temporary_path(path).unlink()
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error}): pass another --checkpoint.") from error


def load_file(path):
    """Load what torch.save wrote, tensors and plain data only: nothing in the file is executed."""
    if not path.is_file():
        raise FileNotFoundError(f"No checkpoint at {path}. Run `python train.py` first, or pass --checkpoint.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} is damaged, or holds code, and was not loaded: remove it.") from error
    except Exception as error:
        raise InputError(f"{path} is damaged or truncated ({str(error)[:200]}). Remove it and train again.") from error


def load_state(path, config, model, optimizer):
    """Put the unfinished run saved at path into model and optimizer; return its history, a dict per epoch."""
    state = on_rank_0(load_file, path)
    try:
        saved = state["config"]
        changed = [f"{name} {saved.get(name)} -> {config[name]}" for name in config if saved.get(name) != config[name]]
        if not changed:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            return state["history"]
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise InputError(f"{path} is not the state of a run: start over without --resume.") from error
    raise InputError(f"{path} is of a run with other settings: {', '.join(changed)}. Start over without --resume.")


def pick_device(name=None):
    """Return torch.device(name), by default CUDA, else MPS, else the CPU, and a line that says which and why."""
    with warnings.catch_warnings(record=True) as caught:  # where a driver is too old, CUDA says so in a warning
        warnings.simplefilter("always")
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    reason = "".join(f" ({' '.join(str(warning.message).split())})" for warning in caught[:1])
    if name is None:
        name = next(kind for kind in there if there[kind])
        reason = "" if name == "cuda" else reason
    elif not there.get(name.partition(":")[0]):
        usable = ", ".join(kind for kind in there if there[kind])
        raise InputError(f"Device {name!r} is not available{reason}: use one of {usable}, or leave --device out.")
    else:
        reason = ""
    try:
        torch.empty(0, device=name)
    except RuntimeError as error:
        raise InputError(f"Device {name!r} is not available: {str(error).splitlines()[0]}") from error
    return torch.device(name), f"device: {name}{reason}"


def autocast(device):
    """bfloat16 autocast where the hardware multiplies bfloat16 natively, else a context without effect: float32."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.autocast(device.type, torch.bfloat16) if native else contextlib.nullcontext()


def join_ranks(device):
    """Under torchrun, meet the other processes and take this one's GPU; alone, do nothing. Return the device."""
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        if device.type == "cuda":
            device, _ = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def get_ranks():
    """(rank of this process, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def on_rank_0(function, *args):
    """Call function on rank 0 alone and return its result on every rank."""
    result = [function(*args) if get_ranks()[0] == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(result)
    return result[0]


def describe(device):
    """Device and versions that figures depend on, for the JSON files."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = {"python": platform.python_version()} | {m.__name__: m.__version__ for m in (torch, torchvision, np)}
    return {"device": f"{device.type} ({name}), {torch.get_num_threads()} threads", "versions": versions}


def run_command(entry):
    """Run an entry function with the flags of the command line; what the user can mend ends in one line on stderr."""
    status = 2
    sys.stdout.reconfigure(line_buffering=True)  # a line per epoch shows at once in a pipe too
    try:
        return tyro.cli(entry)
    except KeyboardInterrupt:
        sys.exit(130)
    except FloatingPointError as caught:
        error, status = caught, 1
    except (InputError, OSError) as caught:
        error = caught
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(status)

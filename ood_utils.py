"""From a network's logits to OOD scores, and from scores to AUROC, AUPR and FPR95. Below: what
train.py and test.py share to check settings and write files.

Every score points the same way: **higher means more in-distribution**. Metrics are fractions;
what is printed is percent.
"""

import contextlib
import errno
import hashlib
import importlib
import os
import platform
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from filelock import FileLock, Timeout
from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError
from tqdm import tqdm

PERFORMANCE_LINE = "AUROC: {:.4f}, AUPR: {:.4f}, FPR95: {:.4f}"  # as published, in percent
# Of a run, in the order of moving: after a kill, those left get the same number.
RUN_FILES = (".val.ood.npz", ".val.ood.json", ".ood.npz", ".ood.json", ".json")
RUN_FILES += (".pth", ".resume.pth")

Positive = Annotated[int, Field(gt=0, lt=2**31)]
Natural = Annotated[int, Field(ge=0, lt=2**31)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, BeforeValidator(lambda name: str(name) if isinstance(name, Path) else name)]
UserPath = Annotated[Path, AfterValidator(lambda path: Path(os.path.expanduser(path)))]

# What file systems without locks or fsync answer: NFS, CIFS, FUSE.
NO_SUPPORT = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


class InputError(ValueError):
    """An error that the user can fix: the command line prints it as one line."""


# Scores: each takes logits float64 (N, classes) and returns (N,) ------------------------
def msp(logits):
    """Maximum softmax probability (Hendrycks & Gimpel 2017, arXiv 1610.02136)."""
    return logits.softmax(1).amax(1)


def max_logit(logits):
    """Largest logit (Hendrycks et al. 2022, arXiv 1911.11132)."""
    return logits.amax(1)


def energy(logits):
    """Negative free energy, log sum exp (Liu et al. 2020, arXiv 2010.03759)."""
    return logits.logsumexp(1)


def entropy(logits):
    """Negative Shannon entropy of the softmax, in nats."""
    return -torch.special.entr(logits.softmax(1)).sum(1)


def gen(logits, gamma=0.1, top=100):
    """Negative generalised entropy, the sum of p^gamma (1 - p)^gamma (Liu et al., CVPR 2023)."""
    p = logits.softmax(1).topk(min(top, logits.shape[1]), 1).values
    return -(p**gamma * (1 - p) ** gamma).sum(1)


SCORES = {"msp": msp, "max_logit": max_logit, "energy": energy, "entropy": entropy, "gen": gen}


def get_ood_scores(model, dataloader, closed_set=False, score=msp):
    """Score every image, float64 (N,): higher means more in-distribution. score: a function of
    logits float64 (N, classes); in float32 a softmax is exactly 1.0 from a logit margin of about 21
    on, which creates ties. With closed_set=True return (scores, right, wrong): of all, of correctly
    classified and of misclassified images."""
    logits, labels = get_logits(model, dataloader)
    scores = score(logits.double()).numpy()
    if not closed_set:
        return scores
    if (labels < 0).any():
        raise InputError("The closed set needs a label for every image.")
    correct = (logits.argmax(1) == labels).numpy()
    return scores, scores[correct], scores[~correct]


@torch.no_grad()
def get_logits(model, dataloader):
    """Return logits float32 (N, classes) and labels int64 (N,), on the CPU. dataloader: an iterable
    of batches (images, labels) on any device. Leaves the network in eval mode. Raises InputError
    without a batch, or for images that are not normalised, with MEAN and STD of ood_data.py."""
    parameter = next(model.parameters())
    normalised = getattr(dataloader, "normalises", False)
    operators = [torch.backends.cudnn.conv, torch.backends.cuda.matmul]
    operators += [torch.backends.mkldnn.conv, torch.backends.mkldnn.matmul]
    logits, labels = [], []
    model.eval()
    # Full float32, without autocast, TF32 or bfloat16: they shift scores.
    with torch.autocast(parameter.device.type, enabled=False), contextlib.ExitStack() as restored:
        for operator in operators:
            restored.callback(setattr, operator, "fp32_precision", operator.fp32_precision)
            operator.fp32_precision = "ieee"
        for images, targets, *_ in tqdm(dataloader, "scoring", delay=1, leave=False, disable=None):
            if not normalised:  # they lie within -2.5 and 3, others in [0, 255] or about [0, 1]
                normalised = bool(images.amin() < -0.5 or 1.3 < images.amax() < 3)
            images = images.to(parameter.device, parameter.dtype)
            logits.append(model(images).float().cpu())
            labels.append(torch.as_tensor(targets).cpu())
    if not normalised:
        raise InputError("No batch, or images that are not normalised: see ood_data.normalise.")
    return torch.cat(logits), torch.cat(labels)


def get_features(model, dataloader):
    """Return what enters the last Linear layer, float32 (N, features), on the CPU."""
    features = []
    keep = last_layer(model).register_forward_pre_hook(lambda _, x: features.append(x[0].cpu()))
    with keep:  # and remove the hook
        get_logits(model, dataloader)
    return torch.cat(features)


def last_layer(model):
    """The last nn.Linear of a network, which turns features into logits."""
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    if not layers:
        raise InputError("The network needs an nn.Linear that gives the logits.")
    return layers[-1]


# Metrics --------------------------------------------------------------------------------
def as_scores(scores):
    """Numbers as float64 (N,), or InputError, a ValueError."""
    if torch.is_tensor(scores):
        scores = scores.tolist()  # NumPy has no bfloat16
    if np.ma.is_masked(scores) or np.asarray(scores).dtype.kind not in "fiu":
        raise InputError("Scores must be real numbers, none of them masked.")
    scores = np.asarray(scores, dtype=np.float64)
    if not scores.size or scores.squeeze().ndim > 1 or not np.isfinite(scores).all():
        raise InputError(f"Scores must be finite, (N,) with N > 0, not {str(scores)[:60]}.")
    return scores.ravel()


def get_threshold(scores):
    """The highest score that at least 95% of the scores (N,) of the positive class reach."""
    return float(-np.quantile(-as_scores(scores), 0.95, method="inverted_cdf"))


def get_performance(pos, neg):
    """Return (AUROC, AUPR, FPR95), fractions, for scores (N,) and (M,). Higher must mean positive;
    with OOD as the positive class: get_performance(-ood, -closed). AUPR is average precision, whose
    chance level is N / (N + M). FPR95 is the false positive rate at the first threshold whose true
    positive rate is at least 0.95, no interpolation. Raises InputError, a ValueError, for no scores
    or some not finite."""
    from sklearn.metrics import average_precision_score, roc_auc_score  # slow to import

    pos, neg = as_scores(pos), as_scores(neg)
    both = np.repeat([1, 0], [len(pos), len(neg)]), np.concatenate([pos, neg])
    fpr95 = np.mean(neg >= get_threshold(pos))
    return float(roc_auc_score(*both)), float(average_precision_score(*both)), float(fpr95)


def show_performance(pos, neg):
    """Print AUROC, AUPR and FPR95 of get_performance on one line, in percent."""
    print(PERFORMANCE_LINE.format(*(100 * figure for figure in get_performance(pos, neg))))


def get_risks(scores, correct):
    """Return (AURC, AUGRC) of confidences (N,) and whether each prediction was right (N,).
    Means over k of the errors among the k most confident images, as a share of k (AURC: Geifman
    et al. 2018, arXiv 1805.08206) or of all (AUGRC: Traub et al. 2024, arXiv 2407.01032). Lower
    is better. Equal scores: the expectation over their orders."""
    wrong = ~np.asarray(correct, dtype=bool)
    _, tie, sizes = np.unique(-as_scores(scores), return_inverse=True, return_counts=True)
    tie_error = np.bincount(tie, weights=wrong) / sizes  # per group of equal scores
    errors = np.cumsum(np.repeat(tie_error, sizes))  # among the k first
    accepted = np.arange(1, len(errors) + 1)
    return float(np.mean(errors / accepted)), float(np.mean(errors / len(errors)))


# Settings, files, device and command line -----------------------------------------------
def check(config):
    """The Config with its values checked against their types and converted, or InputError."""
    types = type(config).__annotations__
    for name, value in vars(type(config)).items():
        if name not in types and not name.startswith("_") and not callable(value):
            raise InputError(f"Config.{name} has no type: write `{name}: {type(value).__name__}`.")
    try:
        return TypeAdapter(type(config)).validate_python(vars(config))
    except ValidationError as error:
        first = error.errors()[0]
        flag = str(first["loc"][0]).replace("_", "-")
        raise InputError(f"--{flag} {first['input']}: {first['msg']}.") from error


def lock(path, if_held=None):
    """Lock a file in a with block; if another process has it, wait or raise InputError(if_held)."""
    held = FileLock(path)
    try:
        return held.acquire(blocking=False)
    except Timeout as error:
        if if_held:
            raise InputError(if_held) from error
        print(f"waiting for the process that holds {path}", file=sys.stderr)
        return held.acquire()
    except (OSError, NotImplementedError) as error:
        if getattr(error, "errno", errno.ENOSYS) not in NO_SUPPORT:
            raise
        print(f"note: no lock on {path} ({error}): start one run at a time", file=sys.stderr)
        return contextlib.nullcontext()


def write_file(path, content):
    """Write bytes; the path holds the old or the new file, whole."""
    temporary = path.with_name(f"{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            try:
                os.fsync(file.fileno())
            except OSError as error:
                if error.errno not in NO_SUPPORT:
                    raise
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def set_aside(path, endings=RUN_FILES):
    """Move the files of X.pth with these endings to a free name, X.1.pth, and print it."""
    present = [ending for ending in endings if path.with_suffix(ending).exists()]
    number, taken = 1, {*present, ".pth", ".resume.pth"}
    while any(path.with_suffix(f".{number}{ending}").exists() for ending in taken):
        number += 1
    for ending in present:
        new = path.with_suffix(f".{number}{ending}")
        path.with_suffix(ending).rename(new)
        print(f"kept the earlier {path.with_suffix(ending).name} as {new}")


def digest(*tensors):
    """8 hex digits of the content of tensors."""
    content = hashlib.sha256()
    for tensor in tensors:
        content.update(tensor.cpu().contiguous().numpy())
    return content.hexdigest()[:8]


def pick_device(name=None):
    """torch.device(name), by default torch's accelerator, else the CPU; InputError if unusable."""
    device = name or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        torch.ones(1, device=device).add(1).item()  # some builds have no kernels for some GPUs
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"Device '{device}' cannot be used ({reason}): pass --device.") from error
    return torch.device(device)


def describe(device):
    """Device and versions that figures depend on, for the JSON files."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    text = f"{device.type} ({name}), {torch.get_num_threads()} threads"
    versions = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "numpy", "skimage", "sklearn", "PIL"):
        module = importlib.import_module(package)
        versions[package] = str(getattr(module, "__version__", "unknown"))
    return {"device": text, "versions": versions}


def run_command(entry, config_class, if_interrupted="interrupted"):
    """Return entry(settings). InputError and OSError end in a line and status 2, Ctrl-C in 130."""
    try:
        return entry(tyro.cli(config_class))
    except BrokenPipeError:  # python test.py | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"\n{if_interrupted}", file=sys.stderr)
        sys.exit(130)
    except (InputError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)

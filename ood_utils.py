"""From a network's logits to OOD scores, and from scores to AUROC, AUPR and FPR95.

Every score points the same way: **higher means more in-distribution**. Metrics are
fractions; what is printed is percent.
"""

import contextlib
import errno
import io
import json
import os
import platform
import shutil
import sys
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import filelock
import numpy as np
import torch
import tyro
from torch import nn
from tqdm import tqdm

RECALL_LEVEL = 0.95  # FPR95: the true positive rate at which the false positive rate is read
PERFORMANCE_LINE = "AUROC: {:.4f}, AUPR: {:.4f}, FPR95: {:.4f}"  # as published, in percent


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
    """Minus the sum of p^gamma (1 - p)^gamma (Liu et al., GEN, CVPR 2023)."""
    top = min(top, logits.shape[1])
    p = logits.softmax(1).topk(top, 1).values
    return -(p**gamma * (1 - p) ** gamma).sum(1)


SCORES = {"msp": msp, "max_logit": max_logit, "energy": energy, "entropy": entropy, "gen": gen}


def get_ood_scores(model, dataloader, closed_set=False, score=msp):
    """Score every image, float64 (N,): higher means more in-distribution.

    score: a function of logits float64 (N, classes). With closed_set=True return (scores,
    right, wrong): all scores, those of correctly classified images, and those of
    misclassified ones. The softmax is taken in float64: in float32 it is exactly 1.0 from a
    logit margin of about 21 on, which creates ties.
    """
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
    """Return logits float32 (N, classes) and labels int64 (N,), on the CPU.

    dataloader: an iterable of batches on any device: (images, labels), images, or a dict of
    them. Images: uint8, which is normalised, or float32 normalised with this repository's
    MEAN and STD. Labels: class numbers or one-hot; -1 where there are none. The network runs
    in eval mode and in full float32; afterwards every layer has its own mode back. Raises
    InputError, a ValueError, without a batch, or for float images that are not normalised.
    """
    from ood_data import ImageLoader, to_input  # which imports this file

    parameter = next(model.parameters())
    logits, labels, normalised = [], [], isinstance(dataloader, ImageLoader)
    with scoring_mode(model):
        for batch in tqdm(dataloader, "scoring", delay=1, leave=False, disable=None):
            images, targets = split_batch(batch)
            normalised = normalised or looks_normalised(images)
            images = to_input(images.to(parameter.device)).to(parameter.dtype)
            logits.append(model(images).float().cpu())
            labels.append(targets)
    if not logits:
        raise InputError("The data loader yields no batch.")
    if not normalised:
        raise InputError(
            "The images are floats within [0, 1] or [0, 255], so not normalised: pass uint8 "
            "images, or use MEAN and STD of ood_data.py."
        )
    return torch.cat(logits), torch.cat(labels)


def looks_normalised(images):
    """False for float images in about [0, 1] or [0, 255]; normalised ones are within -2.5 and 3."""
    if images.dtype == torch.uint8 or images.ndim != 4:
        return True
    return bool(images.amin() < -0.5 or 1.3 < images.amax() < 3)  # resizing may overshoot


def split_batch(batch):
    """Return images and labels int64 (N,), on the CPU, of a batch in one of the usual forms."""
    if isinstance(batch, Mapping):
        images = [batch[key] for key in ("image", "images", "img", "pixel_values") if key in batch]
        labels = [batch[key] for key in ("label", "labels", "fine_label") if key in batch]
        batch = [*images[:1], *labels[:1]] if images else []
    if not isinstance(batch, (list, tuple)):
        batch = [batch]
    images, labels, *_ = [*batch, None, None]
    if not torch.is_tensor(images):
        raise InputError("A batch must be (images, labels), images, or a dict with both.")
    if labels is None:
        return images, torch.full((len(images),), -1)
    labels = torch.as_tensor(labels).cpu()
    if labels.ndim == 2 and labels.shape[1] > 1:  # one-hot
        labels = labels.argmax(1)
    return images, labels.reshape(-1).long()


def get_features(model, dataloader):
    """Return what enters the last Linear layer, float32 (N, features), on the CPU."""
    for wrapper in ("_orig_mod", "module"):  # a compiled network, DataParallel
        model = getattr(model, wrapper, model)
    features = []
    hook = last_layer(model).register_forward_pre_hook(
        lambda _, inputs: features.append(inputs[0].cpu())
    )
    with hook:  # removes it
        get_logits(model, dataloader)
    return torch.cat(features)


def last_layer(model):
    """The last nn.Linear of a network, which turns features into logits."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise InputError("The network needs an nn.Linear that gives the logits.")
    return layers[-1]


@contextlib.contextmanager
def scoring_mode(model):
    """Eval mode, and full float32: no autocast, TF32 or bfloat16. Then all is as it was."""
    modes = {module: module.training for module in model.modules()}
    backends = torch.backends
    operators = [backends.cudnn.conv, backends.cuda.matmul]
    operators += [backends.mkldnn.conv, backends.mkldnn.matmul]
    precisions = [operator.fp32_precision for operator in operators]
    device = next(model.parameters()).device
    try:
        model.eval()
        for operator in operators:
            operator.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for operator, precision in zip(operators, precisions, strict=True):
            operator.fp32_precision = precision


# Metrics --------------------------------------------------------------------------------


def as_scores(scores, group):
    """An array, tensor or list as float64 (N,), or raise InputError, a ValueError."""
    if isinstance(scores, (list, tuple)) and any(torch.is_tensor(score) for score in scores):
        scores = torch.cat([torch.as_tensor(score).detach().reshape(-1) for score in scores])
    if torch.is_tensor(scores):
        scores = scores.detach().cpu()
        scores = scores.double().numpy() if scores.is_floating_point() else scores.numpy()
    if np.ma.is_masked(scores) or np.asarray(scores).dtype.kind not in "fiu":
        raise InputError(f"{group} scores must be real numbers, none of them masked.")
    scores = np.asarray(scores, dtype=np.float64)
    bad = np.sum(~np.isfinite(scores))
    if bad or scores.size == 0 or scores.squeeze().ndim > 1:
        found = f"the shape is {scores.shape}, {bad} are not finite"
        raise InputError(f"{group} scores must be finite, (N,) with N > 0: {found}.")
    return scores.ravel()


def get_threshold(scores):
    """The score at or above which 95% of the scores (N,) of the closed set lie."""
    scores = as_scores(scores, "positive")
    return float(-np.quantile(-scores, RECALL_LEVEL, method="inverted_cdf"))


def get_performance(pos, neg):
    """Return (AUROC, AUPR, FPR95), fractions, for scores (N,) and (M,) of two classes.

    Higher must mean positive. With OOD as the positive class: get_performance(-ood, -closed).
    AUROC: roc_auc_score. AUPR: average_precision_score, whose chance level is N / (N + M).
    FPR95: the false positive rate at the first threshold whose true positive rate is at
    least 0.95, no interpolation. Raises ValueError for no scores, or some not finite.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score  # slow to import

    pos = as_scores(pos, "positive")
    neg = as_scores(neg, "negative")
    is_pos = np.repeat([1, 0], [len(pos), len(neg)])
    scores = np.concatenate([pos, neg])
    auroc = roc_auc_score(is_pos, scores)
    aupr = average_precision_score(is_pos, scores)
    fpr95 = np.mean(neg >= get_threshold(pos))
    return float(auroc), float(aupr), float(fpr95)


def show_performance(pos, neg):
    """Print AUROC, AUPR and FPR95 of get_performance on one line, in percent."""
    percents = [100 * figure for figure in get_performance(pos, neg)]
    print(PERFORMANCE_LINE.format(*percents))


def get_risks(scores, correct):
    """Return (AURC, AUGRC) of confidences (N,) and whether each prediction was right (N,).

    Means over k of the errors among the k most confident images, as a share of k (AURC:
    Geifman et al. 2018, arXiv 1805.08206) or of all (AUGRC: Traub et al. 2024, arXiv
    2407.01032). Lower is better. Equal scores: the expectation over their orders.
    """
    scores = as_scores(scores, "confidence")
    wrong = ~np.asarray(correct, dtype=bool)
    _, tie, sizes = np.unique(-scores, return_inverse=True, return_counts=True)
    tie_error = np.bincount(tie, weights=wrong) / sizes  # per group of equal scores
    errors = np.cumsum(np.repeat(tie_error, sizes))  # among the k first
    accepted = np.arange(1, len(errors) + 1)
    return float(np.mean(errors / accepted)), float(np.mean(errors / len(errors)))


def predicted_classes(predictions):
    """Return (effective number of classes, share of the largest) of predictions (N,).

    The number is exp(-sum p ln p) over the classes' shares p: k for k equally frequent ones.
    Near 1 the network assigns the whole set to one class: its row is one sample per network.
    """
    _, counts = np.unique(predictions, return_counts=True)
    shares = counts / counts.sum()
    return float(np.exp(-np.sum(shares * np.log(shares)))), float(shares.max())


def get_difference(base, other, paired):
    """Return (difference of the means, low, high), with its 95% interval over training runs.

    base, other: a figure of each run, (N,) and (M,). paired: run i has the same seed on both
    sides; scipy.stats.ttest_rel, N >= 2. Otherwise ttest_ind, Student's test with equal
    variances, N + M >= 3. The interval is NaN for one run on each side, and where nothing
    varies: a few test images round the error rates, seeds do not agree like that.
    """
    from scipy import stats

    base, other = np.asarray(base, dtype=float), np.asarray(other, dtype=float)
    difference = other.mean() - base.mean()
    deviations = np.ptp(other - base) if paired else np.ptp(base) + np.ptp(other)
    if len(base) + len(other) < 3 or deviations < 1e-9:
        return difference, np.nan, np.nan
    test = stats.ttest_rel(other, base) if paired else stats.ttest_ind(other, base)
    low, high = test.confidence_interval(0.95)
    return difference, low, high


# Settings, files, device and command line -----------------------------------------------


def check_numbers(config, **lowest):
    """Raise InputError for a setting below its lowest value, or from 2^31 on."""
    for name, low in lowest.items():
        value = getattr(config, name)
        if value is None or not low <= value < 2**31:  # nor NaN
            raise InputError(f"--{name.replace('_', '-')} {value} is out of range.")


def as_plain(config):
    """The Config with settings as JSON has them: paths become text, NumPy's numbers numbers."""

    def convert(value):
        return value.tolist() if hasattr(value, "tolist") else str(value)

    settings = json.loads(json.dumps(asdict(config), default=convert))
    return type(config)(**settings)


def place_of(error):
    """File and line in which an exception was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


def as_path(text, flag):
    """The path, with ~ and variables expanded, or InputError."""
    if not str(text).strip() or "\0" in str(text):
        raise InputError(f"{flag} {str(text)!r} is empty: is a shell variable unset?")
    try:
        return Path(os.path.expandvars(text)).expanduser()
    except RuntimeError as error:  # no home directory
        raise InputError(f"{flag} {str(text)!r}: {error}") from error


@contextlib.contextmanager
def lock(path, if_held=None):
    """Hold a lock; wait for it, or raise InputError(if_held). A note where there are no locks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    held = filelock.FileLock(path, blocking=if_held is None)
    try:
        held.acquire()
    except filelock.Timeout as error:
        raise InputError(if_held) from error
    except (OSError, NotImplementedError) as error:
        known = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)
        if isinstance(error, OSError) and error.errno not in known:
            raise
        print(f"note: no lock on {path} ({error}): start one run at a time", file=sys.stderr)
    try:
        yield
    finally:
        held.release()


def write_file(path, content):
    """Write bytes, or what torch.save takes; the path holds the old or the new file, whole."""
    if not isinstance(content, bytes):
        buffer = io.BytesIO()  # torch.save itself does not report a full disk
        torch.save(content, buffer)
        content = buffer.getvalue()
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def pick_device(name=None):
    """torch.device(name), by default a GPU if there is one; InputError if unusable."""
    device = name or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        torch.ones(1, device=device).add(1).item()  # some builds have no kernels for some GPUs
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"Device '{device}' cannot be used ({reason}): pass --device cpu, or another torch."
        ) from error
    return torch.device(device)


def describe(device):
    """Device and versions that figures depend on, for the JSON files."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("torchvision", "numpy", "scikit-image", "scikit-learn", "pillow"):
        versions[package] = metadata.version(package)
    threads = f"{torch.get_num_threads()} threads"
    return {"device": f"{device.type} ({name}), {threads}", "versions": versions}


def run_command(entry, config_class, if_interrupted="interrupted"):
    """Call entry(config) with the settings of the command line and return its result.

    An error that the user can fix ends in one line on stderr and exit status 2, an
    interruption in status 130.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed: python train.py >&-
            setattr(sys, name, io.StringIO())
    if hasattr(sys.stdout, "reconfigure"):  # line by line in a pipe, and no fatal character
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    if shutil.get_terminal_size().columns < 40:
        os.environ["COLUMNS"] = "40"  # tyro's help never ends in fewer
    try:
        return entry(tyro.cli(config_class))
    except BrokenPipeError:  # python test.py | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"\n{if_interrupted}", file=sys.stderr)
        sys.exit(130)
    except (InputError, OSError, FloatingPointError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)

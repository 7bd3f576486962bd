"""Train a ResNet-18 on CIFAR-100, or on another closed set, and write a checkpoint.

    python train.py                                # CIFAR-100, 100 epochs
    python train.py --dataset digits --epochs 20   # a laptop, no download
    python train.py --resume                       # continue after an interruption

Prints a line per epoch and writes, by default for CIFAR-100 and in the working directory,
    cifar100_resnet18.pth          a plain state dict; unless --stem is cifar, torchvision's
                                   resnet18 loads it, for 32x32 images
    cifar100_resnet18.json         the log: settings, classes, versions, figures of every epoch
    cifar100_resnet18.resume.pth   the state of an unfinished run
"""

import ast
import hashlib
import itertools
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_pre_hook
from torchvision.models import resnet18
from tqdm import tqdm
from tyro.conf import arg

import ood_data
import ood_utils
from ood_data import ImageLoader, memory_format, to_input
from ood_utils import InputError


@dataclass
class Config:
    """The published recipe. Edit a value here, or pass it as a flag."""

    dataset: Annotated[str, arg(help=ood_data.CLOSED_SET_NAMES)] = "cifar100"
    data_root: str = ood_data.DATA_ROOT  # where torchvision's data sets are, or are downloaded to
    validation: int = 0  # training images to hold out and measure accuracy on, instead of test
    checkpoint: str | None = None  # by default <dataset>_resnet18[_seed<N>].pth
    epochs: int = 100  # passes over the training images
    batch_size: int = 128  # images per step
    lr: float = 0.1  # initial learning rate
    momentum: float = 0.9
    weight_decay: float = 1e-4
    label_smoothing: float = 0.0  # share of the target spread over all classes
    schedule: Literal["steps", "cosine"] = "steps"  # how the learning rate falls
    milestones: tuple[float, ...] = (0.5, 0.75)  # steps: fractions of the run at which it drops
    gamma: float = 0.1  # steps: its factor at a milestone
    stem: Literal["imagenet", "cifar"] = "imagenet"  # 7x7 stride 2 and max-pool, or 3x3 stride 1
    seed: int = 0  # of weights, order and augmentation
    device: str | None = None  # by default the first available of cuda, mps and cpu
    precision: Literal["auto", "bfloat16", "float32"] = "auto"  # auto: bfloat16 if native
    resume: bool = False  # continue the unfinished run of this checkpoint


EAGER_STEPS = 3  # of each epoch on CUDA, before capture_step; math.inf: no capture
SAVE_SECONDS = 10  # at least, between saves: one may take longer than an epoch


# Data -----------------------------------------------------------------------------------


def augment_batch(images, generator):
    """Augment a training batch: uint8 (N, 3, 32, 32) -> the same.

    The whole batch comes at once: draw for each image. Draw from the generator only; it is
    seeded by (seed, epoch, batch), which keeps a resumed run exact.
    """
    return crop_and_flip(images, generator)


def crop_and_flip(images, generator, padding=4):
    """Pad with black, crop at random, flip with p = 0.5."""
    count, _, _, size = images.shape
    draw = {"generator": generator, "device": images.device}
    row, column = torch.randint(2 * padding + 1, (2, count), **draw)
    flip = torch.rand(count, 1, 1, 1, **draw) < 0.5
    padded = F.pad(images, (padding,) * 4)
    windows = padded.unfold(2, size, 1).unfold(3, size, 1)  # (N, 3, 9, 9, 32, 32), a view
    each = torch.arange(count, device=images.device)
    crops = windows[each, :, row, column]
    return torch.where(flip, crops.flip(3), crops)


def get_transform(train=True):
    """Return the function of a batch that get_loader uses: uint8, generator -> float32."""

    def transform(images, generator=None):
        augmented = augment_batch(images, generator)
        ood_data.check_images(augmented, "augment_batch")
        return to_input(augmented)

    return transform if train else to_input


def get_loader(
    train=True,
    dataset=Config.dataset,
    data_root=Config.data_root,
    batch_size=None,
    seed=Config.seed,
    device="cpu",
    augment=True,
    validation=0,
):
    """Return an ImageLoader over a split of a closed set; its `classes` are the class names.

    Training images are shuffled and augmented anew in each epoch unless augment=False. With
    validation=n, n of them are held out, and train=False gives these, not the test images.
    Raises InputError for an unknown or unavailable set.
    """
    data = ood_data.read_closed_set(dataset, data_root, train, validation)
    augment = train and augment
    default = Config.batch_size if augment else ood_data.EVAL_BATCH_SIZE
    transform = get_transform(augment)
    return ImageLoader(*data, batch_size or default, device, transform, augment, seed)


# Network --------------------------------------------------------------------------------


def build_network(num_classes=100, stem=Config.stem):
    """Return a network: images float32 (N, 3, 32, 32) -> logits (N, num_classes).

    Build another network here; its last nn.Linear must give the logits.
    """
    model = resnet18(num_classes=num_classes)
    if stem == "cifar":  # feature maps four times as wide
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    return shorten_small_maps(model)


def load_network(path):
    """Return the network of a checkpoint, in eval mode on the CPU, or raise InputError.

    Stem and number of classes come from the log, or without one from the weights. Wrappers
    of other tools are removed: a "state_dict" entry, a "module." before each name.
    """
    path = checkpoint_path(path)
    state, log = load_file(path), read_log(path)
    for entry in ("state_dict", "model", "model_state_dict", "net"):
        state = state[entry] if isinstance(state, dict) and entry in state else state
    tensors = isinstance(state, dict) and all(torch.is_tensor(v) for v in state.values())
    if not tensors or not state:
        raise InputError(f"{path} holds a {type(state).__name__}, no state dict of tensors.")
    for prefix in ("module.", "_orig_mod.", "module."):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    if log:
        num_classes, stem = len(log["classes"]), log["config"]["stem"]
    else:
        log_path = path.with_suffix(".json")
        if log_path.exists():
            print(f"note: {log_path} is no log of train.py", file=sys.stderr)
        first = state.get("conv1.weight")
        stem = "cifar" if first is not None and first.shape[-1] == 3 else "imagenet"
        *_, bias = build_network(1, stem).state_dict()
        num_classes = state[bias].numel() if bias in state else 1
    model = build_network(num_classes, stem).float()
    check_fit(path, state, model.state_dict())
    model.load_state_dict(state)
    return model.eval()


def check_fit(path, state, expected):
    """Raise InputError unless a state dict has the expected tensors with finite values."""

    def kind(tensors, name):
        return name in tensors and (tensors[name].shape, tensors[name].is_floating_point())

    names = dict.fromkeys([*state, *expected])
    odd = [name for name in names if kind(state, name) != kind(expected, name)]
    if odd:
        raise InputError(
            f"{path} does not fit build_network: {len(odd)} weights differ in name, shape or type,"
            f" such as {', '.join(odd[:3])}. If you edited it since, --compare an older .ood.json."
        )
    for name, value in state.items():
        if not value.isfinite().all() or ("running_var" in name and value.min() < 0):
            raise InputError(f"{path}: {name} is not finite, or negative: train with a lower --lr.")


# Training -------------------------------------------------------------------------------


def learning_rate(config, epoch):
    """The learning rate of an epoch, counted from 0."""
    done = epoch / config.epochs
    if config.schedule == "cosine":
        return config.lr * (1 + math.cos(math.pi * done)) / 2
    drops = sum(done >= milestone for milestone in config.milestones)
    return config.lr * config.gamma**drops


def build_optimizer(model, config):
    """The optimizer; on CUDA another one may need capturable=True, see capture_step."""
    settings = {"momentum": config.momentum, "weight_decay": config.weight_decay}
    return torch.optim.SGD(model.parameters(), config.lr, fused=True, **settings)


def train_step(model, optimizer, images, labels, config):
    """One SGD step on images (N, 3, 32, 32) and labels (N,); return the mean loss, on device."""
    half = config.precision == "bfloat16"
    with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
        loss = F.cross_entropy(model(images), labels, label_smoothing=config.label_smoothing)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def train_epoch(model, optimizer, loader, config):
    """One pass over the loader; return the mean of its steps' losses."""
    epoch = loader.epoch + 1
    captured, losses = None, []
    for images, labels in tqdm(loader, f"epoch {epoch}", leave=False, disable=None):
        full = len(images) == loader.batch_size
        if full and images.is_cuda and len(losses) == EAGER_STEPS:
            captured = capture_step(model, optimizer, images, labels, config)
        step = captured if captured and full else train_step
        losses.append(step(model, optimizer, images, labels, config))
    losses = torch.stack(losses).tolist()  # once: each reading makes a GPU wait
    for step, loss in enumerate(losses, start=1):
        if not math.isfinite(loss):
            where = f"epoch {epoch}, step {step}"
            raise FloatingPointError(f"The loss is not finite at {where}: lower --lr.")
    return sum(losses) / len(losses)


def capture_step(model, optimizer, images, labels, config):
    """Record train_step as a CUDA graph; return a function that replays it on another batch.

    A replay is one launch, a step about 400. Python code in train_step, such as a draw with
    NumPy, runs at the recording only, so once an epoch; torch's draws are new in each step.
    """
    images, labels = images.clone(), labels.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = train_step(model, optimizer, images, labels, config)

    def replay(model, optimizer, new_images, new_labels, config):
        images.copy_(new_images)
        labels.copy_(new_labels)
        graph.replay()
        return loss.clone()

    return replay


def get_accuracy(model, loader):
    """Share of a set's images that the network classifies correctly."""
    logits, labels = ood_utils.get_logits(model, loader)
    return (logits.argmax(1) == labels).double().mean().item()


def train_model(config=None):
    """Train a network and write its checkpoint; the last epoch is the result.

    config: a Config, by default the published recipe. Returns the network in eval mode.
    Raises InputError, OSError, or FloatingPointError for a loss that is not finite.
    """
    config = ood_utils.as_plain(config or Config())
    check_settings(config)
    path = checkpoint_path(config.checkpoint, config.dataset, config.seed)
    device = ood_utils.pick_device(config.device)
    config = replace(config, precision=pick_precision(config.precision, device))
    if_held = f"Another run is writing {path}: pass another --checkpoint."
    with ood_utils.lock(path.with_name(f".{path.stem}.lock"), if_held):
        check_own_files(path)
        common = {"device": device, "validation": config.validation}
        data = (config.dataset, config.data_root)
        train_loader = get_loader(True, *data, config.batch_size, config.seed, **common)
        test_loader = get_loader(False, *data, **common)
        check_batches(train_loader)

        torch.manual_seed(config.seed)
        model = build_network(len(train_loader.classes), config.stem)
        ood_utils.last_layer(model)  # or InputError: get_features needs one
        model.to(device, memory_format=memory_format(device))
        optimizer = build_optimizer(model, config)
        log = start_log(config, device, train_loader, test_loader)
        split = "validation" if config.validation else "test"
        resume(path, log, model, optimizer)

        saved = time.perf_counter()
        for epoch in range(len(log["epochs"]), config.epochs):
            start = time.perf_counter()
            lr = learning_rate(config, epoch)
            for group in optimizer.param_groups:
                group["lr"] = lr
            train_loader.epoch = epoch
            torch.manual_seed(ood_data.mix_seed(config.seed, epoch))  # dropout, after a resume too
            loss = train_epoch(model, optimizer, train_loader, config)
            rate = len(train_loader.images) / (time.perf_counter() - start)
            accuracy = get_accuracy(model, test_loader)
            seconds = time.perf_counter() - start
            figures = {"epoch": epoch + 1, "loss": loss, f"{split}_accuracy": accuracy}
            log["epochs"].append(figures | {"lr": lr, "seconds": seconds})
            left = timedelta(seconds=round(seconds * (config.epochs - epoch - 1)))
            print(
                f"epoch {epoch + 1:3d}/{config.epochs}  loss {loss:.4f}  {split} accuracy "
                f"{accuracy:.2%}  lr {lr:g}  {seconds:.1f} s  {rate:.0f} images/s  {left} left"
            )
            if epoch + 1 == config.epochs or time.perf_counter() - saved >= SAVE_SECONDS:
                save(path, log, model, optimizer)
                saved = time.perf_counter()
    return model.eval()


# Small convolutions: the same outputs and gradients from less arithmetic ----------------
# 32x32 images reach resnet18's last blocks as maps of 2x2 and 1x1. On these a 3x3 convolution is
# one matrix product. Kernel weights that only ever see padding change no output and get no
# gradient: the network does not have them, and its state dict has zeros.


class SmallMapConv(nn.Module):
    """A 3x3 convolution, with padding 1, of maps of 2x2 or 1x1; its state dict has 3x3 kernels.

    live: a slice, the rows and columns of the kernel that are kept.
    """

    def __init__(self, conv, live):
        super().__init__()
        self.live = live
        weight = conv.weight[:, :, live, live].detach().clone()
        self.weight = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)

    def forward(self, maps):
        size = maps.shape[-1]
        taps = self.weight.to(maps.dtype).permute(0, 2, 3, 1)
        starts = range(taps.shape[1] - size, -1, -1)  # of the map in the kernel, per output
        kernels = [taps[:, y : y + size, x : x + size] for y in starts for x in starts]
        matrix = torch.stack(kernels).flatten(0, 1).flatten(1)  # (outputs x C_out, pixels x C_in)
        outputs = F.linear(maps.permute(0, 2, 3, 1).flatten(1), matrix)
        outputs = outputs.unflatten(1, (len(starts), len(starts), -1)).permute(0, 3, 1, 2)
        return outputs.contiguous(memory_format=memory_format(maps.device))

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        kernel = self.weight.new_zeros(*self.weight.shape[:2], 3, 3)
        kernel[:, :, self.live, self.live] = self.weight.detach()
        destination[f"{prefix}weight"] = kernel

    def _load_from_state_dict(self, state, prefix, *args):
        name = f"{prefix}weight"
        if name in state and state[name].shape[2:] == (3, 3):
            state[name] = state[name][:, :, self.live, self.live]
        super()._load_from_state_dict(state, prefix, *args)


LIVE = {  # (map, stride): the rows, and columns, of the kernel that see a pixel
    (2, 2, 1, 1): slice(0, 3),
    (2, 2, 2, 2): slice(1, 3),
    (1, 1, 1, 1): slice(1, 2),
    (1, 1, 2, 2): slice(1, 2),
}


@torch.no_grad()
def shorten_small_maps(model):
    """Replace, in place, each plain 3x3 convolution of small maps; return the network."""
    sizes = {}

    def note_size(module, inputs):
        if type(module) is nn.Conv2d:
            sizes.setdefault(module, set()).add(inputs[0].shape[2:])

    try:
        with ood_utils.scoring_mode(model), register_module_forward_pre_hook(note_size):
            model(torch.zeros(1, 3, 32, 32))
    except Exception as error:
        raise InputError(f"build_network's network takes no 32x32 images: {error}") from error
    names = {module: name for name, module in model.named_modules()}
    for conv, shapes in sizes.items():
        channels = (conv.in_channels, conv.out_channels)
        plain = nn.Conv2d(*channels, 3, conv.stride, padding=1, bias=False, device="meta")
        has_hooks = conv._forward_hooks or conv._forward_pre_hooks
        live = LIVE.get((*max(shapes), *conv.stride)) if len(shapes) == 1 else None
        if live and not has_hooks and conv.extra_repr() == plain.extra_repr():
            model.set_submodule(names[conv], SmallMapConv(conv, live))
    return model


# Settings and device --------------------------------------------------------------------


def check_settings(config):
    """Raise InputError for a number out of its range."""
    ood_utils.check_numbers(config, epochs=1, batch_size=1, seed=0, validation=0)
    above_zero = sys.float_info.min
    ood_utils.check_numbers(config, lr=above_zero, gamma=above_zero, momentum=0, weight_decay=0)
    if not 0 <= config.label_smoothing <= 1:
        raise InputError("--label-smoothing must lie between 0 and 1.")
    if not all(0 < milestone <= 1 for milestone in config.milestones):
        fractions = [f"{m / config.epochs if m > 1 else m:g}" for m in config.milestones]
        fractions = " ".join(fractions)
        raise InputError(f"--milestones are fractions of the run: pass --milestones {fractions}.")


def check_batches(loader):
    """Raise InputError where the last batch has one image: batch norm needs two."""
    count, size = len(loader.images), loader.batch_size
    if count % size == 1 or size == 1:
        raise InputError(f"{count} images leave a last batch of 1: change --batch-size {size}.")


def pick_precision(precision, device):
    """The precision; for "auto", bfloat16 where the device has it natively, else float32.

    On CUDA, float32 training has PyTorch's default, TF32 convolutions.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        able = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        native = able.get("avx512_bf16") or able.get("bf16")  # x86, ARM
    return "bfloat16" if native else "float32"


# Files: checkpoint X.pth, log X.json, and X.resume.pth while the run is unfinished ------


def checkpoint_path(checkpoint, dataset=Config.dataset, seed=0):
    """The given path, or <dataset>_resnet18.pth, with the seed in its name unless it is 0."""
    name = f"{ood_utils.as_path(dataset, '--dataset').resolve().name}_resnet18"
    name += f"_seed{seed}.pth" if seed else ".pth"
    path = ood_utils.as_path(name if checkpoint is None else checkpoint, "--checkpoint")
    other_files = (".resume", ".ood")  # of a run, whose log is <stem>.json
    if path.is_dir() or path.suffix not in (".pth", ".pt") or path.stem.endswith(other_files):
        raise InputError(f"{path} cannot be a checkpoint: its name must end in .pth or .pt.")
    return path


def load_file(path):
    """Load what torch.save wrote, tensors and plain data only: nothing in it is executed."""
    if not path.is_file():
        raise InputError(
            f"No checkpoint at {path}. Run `python train.py` first, or pass another path."
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"{path} is damaged, or holds code, not a state dict.") from error


def read_log(path):
    """Return the log beside a checkpoint, or beside what it links to; None if there is none."""
    path = path.resolve().with_suffix(".json")
    try:
        log = json.loads(path.read_text(encoding="utf-8"))
        log["finished"] = len(log["epochs"]) == log["config"]["epochs"]
        return log if log["classes"] and log["config"]["stem"] else None
    except (FileNotFoundError, ValueError, LookupError, TypeError):  # or of another program
        return None


def digest_code(*files):
    """A digest of Python files without words, and without Config's values."""
    digest = hashlib.sha256()
    for file in files:
        tree = ast.parse(Path(file).read_text(encoding="utf-8"))
        tree.body = [part for part in tree.body if getattr(part, "name", None) != "Config"]
        for node in ast.walk(tree):
            if isinstance(getattr(node, "body", None), list):
                node.body = [part for part in node.body if not is_docstring(part)]
        text = ast.unparse(tree).replace('"', "'")  # Python 3.12 quotes f-strings differently
        digest.update(text.encode())
    return digest.hexdigest()[:8]


def is_docstring(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def start_log(config, device, train_loader, test_loader):
    """Return the log of a run that has no epoch yet, and print what it runs on."""
    settings = asdict(config)
    if config.dataset not in ood_data.CLOSED_SETS:
        settings["dataset"] = str(ood_utils.as_path(config.dataset, "--dataset").resolve())
    settings |= {"mean": list(ood_data.MEAN), "std": list(ood_data.STD)}
    code = digest_code(__file__, ood_data.__file__)
    split = "validation" if config.validation else "test"
    log = {"config": settings, "code": code, "classes": train_loader.classes}
    log["images"] = len(train_loader.images)
    log[f"{split}_images"] = len(test_loader.images)
    log["content"] = ood_data.digest(train_loader)
    log |= ood_utils.describe(device) | {"epochs": []}
    print(f"device: {log['device']}, {config.precision}")
    return log


DATA = ("classes", "images", "test_images", "validation_images", "content")


def trained_with(log):
    """What the figures of a run depend on: its settings, its data, its code."""
    free = ("data_root", "checkpoint", "device", "resume")
    settings = {key: value for key, value in log["config"].items() if key not in free}
    settings["dataset"] = Path(settings["dataset"]).name  # a folder may move
    return settings | {name: log[name] for name in (*DATA, "code") if name in log}


def differences(old, new):
    """Where two runs differ in what both know, as text: "lr 0.1 -> 0.05", or ""."""
    texts = []
    for name in new:
        if name not in old or old[name] == new[name]:
            continue
        before, after = old[name], new[name]
        if name == "classes":
            only = sorted(set(before) - set(after)), sorted(set(after) - set(before))
            before, after = only if any(only) else (before[:3], after[:3])  # in another order
        texts.append(f"{name} {before} -> {after}")
    return ", ".join(texts)


def save(path, log, model, optimizer):
    """Write the state for --resume, until the last epoch, then checkpoint and log."""
    keep_other_run(path, log)
    unfinished = len(log["epochs"]) < log["config"]["epochs"]
    weights = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    state_path = path.with_suffix(".resume.pth")
    if unfinished:
        state = {"log": log, "model": weights, "optimizer": optimizer.state_dict()}
        ood_utils.write_file(state_path, state)
    ood_utils.write_file(path, weights)
    ood_utils.write_file(path.with_suffix(".json"), json.dumps(log, indent=1).encode())
    if not unfinished:
        state_path.unlink(missing_ok=True)
        print(f"wrote {path}")


def keep_other_run(path, log):
    """Move the files of a finished run of other settings, data or code to the next free name.

    The log moves last: after a kill the next run finds it and moves the rest to the same name.
    """
    changed = finished_otherwise(path, log)
    if not changed:
        return
    for number in itertools.count(1):
        kept = path.with_name(f"{path.stem}.{number}{path.suffix}")
        taken = kept.exists() and path.exists()
        if not taken and not kept.with_suffix(".json").exists():
            break
    for ending in (".ood.json", ".ood.npz", ".ood.png", path.suffix, ".json"):
        file = path.with_name(path.stem + ending)
        if file.exists():
            os.replace(file, kept.with_name(kept.stem + ending))
    print(f"kept the finished run as {kept} ({changed}); to compare the two:")
    print(f"    python test.py --checkpoint {kept} {path}")


def finished_otherwise(path, log):
    """How the finished run at path differs from the run of the log; "" if there is none."""
    old = read_log(path)
    if old and not old["finished"]:
        return ""
    if not old:  # a checkpoint of another program, unless a first save was interrupted
        foreign = path.exists() and not path.with_suffix(".resume.pth").exists()
        return "it has no log" if foreign else ""
    return differences({"code": "unknown", **trained_with(old)}, trained_with(log))


def resume(path, log, model, optimizer):
    """With --resume, load the run of this checkpoint into log, model and optimizer."""
    state_path, done = path.with_suffix(".resume.pth"), read_log(path)
    if not log["config"]["resume"]:
        if finished_otherwise(path, log):
            print(f"starting: the first save moves the finished run at {path} to a new name")
        elif path.exists() or state_path.exists():
            print(f"starting over: the first save replaces {path}")
        return
    if state_path.exists():
        state = load_file(state_path)
    elif path.exists() and done and done["finished"]:
        state = {"log": done, "model": load_file(path)}
        state["optimizer"] = optimizer.state_dict()
    else:
        print(f"no unfinished run at {state_path}: starting")
        return
    try:
        old, new = trained_with(state["log"]), trained_with(log)
        code = old.pop("code", new["code"])
        changed = differences(old, new)
        if not changed:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            log["epochs"] = state["log"]["epochs"]
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f"{path} is not a run of this network: {str(error)[:200]}") from error
    if changed:
        raise InputError(
            f"{path} has other settings or data: {changed}. Pass another --checkpoint,"
            " or start over without --resume."
        )
    print(f"resuming after epoch {len(log['epochs'])} of {log['config']['epochs']}")
    if code.split("+")[-1] != log["code"]:
        log["code"] = f"{code}+{log['code']}"
        print(f"note: the code has changed since: code {log['code']}")


def check_own_files(path):
    """Raise InputError where a file of this run would be another's."""
    twin = path.with_suffix(".pt" if path.suffix == ".pth" else ".pth")
    log_path = path.with_suffix(".json")
    others = [twin] if twin.exists() else []
    if log_path.exists() and not read_log(path):
        others.append(log_path)
    if others:
        raise InputError(f"{path} would share files with {others[0]}: pass another name.")


if __name__ == "__main__":
    hint = "interrupted: saved epochs are kept; --resume continues"
    ood_utils.run_command(train_model, Config, hint)

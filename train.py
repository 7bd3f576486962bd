"""Train a ResNet-18 on CIFAR-100, or on another closed set, and write a checkpoint.

    python train.py                                # CIFAR-100, 100 epochs
    python train.py --dataset digits --epochs 20   # a laptop, no download
    python train.py --resume                       # continue after an interruption

Prints a line per epoch. Writes cifar100_resnet18.resume.pth, and at the end in its place
    cifar100_resnet18.pth    a state dict that torchvision's resnet18 loads (--stem imagenet)
    cifar100_resnet18.json   the log: settings, data, code, figures of every epoch
Files of an earlier run are moved to cifar100_resnet18.1.pth, and so on.
"""

import ast
import contextlib
import hashlib
import io
import json
import math
import os
import random
import shlex
import sys
import time
from dataclasses import dataclass, replace
from importlib.util import decode_source
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import NonNegativeFloat, PositiveFloat
from pydantic_core import to_jsonable_python
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18
from tqdm import tqdm
from tyro.conf import arg

import ood_data
import ood_utils
from ood_data import ImageLoader, memory_format, normalise, to_input
from ood_utils import Fraction, InputError, Name, Natural, Positive, UserPath


@dataclass
class Config:
    """The published recipe. Edit a value here, or pass it as a flag."""

    dataset: Annotated[Name, arg(help=ood_data.CLOSED_SET_NAMES)] = "cifar100"
    data_root: UserPath = ood_data.DATA_ROOT  # where torchvision's data sets are
    validation: Natural = 0  # training images to hold out, and to test on instead
    checkpoint: UserPath | None = None  # by default <dataset>_resnet18[_seed<N>].pth
    epochs: Positive = 100  # passes over the training images
    batch_size: Positive = 128  # images per step
    lr: PositiveFloat = 0.1  # initial learning rate
    momentum: Fraction = 0.9
    weight_decay: NonNegativeFloat = 1e-4
    label_smoothing: Fraction = 0.0  # share of the target spread over all classes
    schedule: Literal["steps", "cosine"] = "steps"  # how the learning rate falls
    milestones: tuple[Fraction, ...] = (0.5, 0.75)  # steps: fractions of the run at which it drops
    gamma: PositiveFloat = 0.1  # steps: its factor at a milestone
    stem: Literal["imagenet", "cifar"] = "imagenet"  # 7x7 stride 2 and max-pool, or 3x3 stride 1
    seed: Natural = 0  # of weights, order and augmentation
    device: str | None = None  # by default the first available of cuda, mps and cpu
    precision: Literal["auto", "bfloat16", "float32"] = "auto"  # auto: bfloat16 if native
    resume: bool = False  # continue the unfinished run of this checkpoint


EAGER_STEPS = 3  # of each epoch on CUDA, before capture_step; math.inf: no capture
SAVE_SECONDS = 10  # at least, between saves: one may take longer than an epoch


# Data -----------------------------------------------------------------------------------
def augment_batch(images, generator):
    """Augment a training batch: uint8 (N, 3, 32, 32) -> the same. The whole batch comes at once:
    draw for each image. Draw from the generator: it is seeded by (seed, epoch, batch), which keeps
    a resumed run exact."""
    return crop_and_flip(images, generator)


def crop_and_flip(images, generator):
    """Pad with 4 black pixels, crop at random, flip with p = 0.5."""
    count, _, _, size = images.shape
    draw = {"generator": generator, "device": images.device}
    row, column = torch.randint(9, (2, count), **draw)
    flip = torch.rand(count, 1, 1, 1, dtype=torch.float32, **draw) < 0.5
    padded = F.pad(images, (4, 4, 4, 4))
    windows = padded.unfold(2, size, 1).unfold(3, size, 1)  # (N, 3, 9, 9, 32, 32), a view
    each = torch.arange(count, device=images.device)
    crops = windows[each, :, row, column]  # (N, 3, 32, 32), one window of each image
    return torch.where(flip, crops.flip(3), crops)


def get_transform(train=True):
    """Return the function of a batch that get_loader uses: uint8, generator -> float32."""
    if not train:
        return to_input
    return lambda images, generator=None: normalise(augment_batch(images, generator))


def get_loader(train=True, dataset=Config.dataset, augment=True, validation=0, **options):
    """Return an ImageLoader over a closed set; its `classes` are the class names. Training images
    are shuffled and augmented anew in each epoch unless augment=False. train=False: test images, or
    with validation=n the n held out of training. options: data_root, batch_size, seed, device."""
    data_root = options.pop("data_root", Config.data_root)
    data = ood_data.read_closed_set(dataset, data_root, train, validation)
    augment = train and augment
    if augment:
        options = {"batch_size": Config.batch_size, "shuffle": True} | options
    return ImageLoader(*data, transform=get_transform(augment), **options)


# Network --------------------------------------------------------------------------------
# Convolutions of 2x2 or 1x1 maps: the rows, and columns, of their 3x3 kernels that ever meet a
# pixel, not only padding.
SMALL_MAPS = dict.fromkeys(("layer3.0.conv2", "layer3.1.conv1", "layer3.1.conv2"), slice(0, 3))
SMALL_MAPS |= {"layer4.0.conv1": slice(1, 3), "layer4.0.conv2": slice(1, 2)}
SMALL_MAPS |= {"layer4.1.conv1": slice(1, 2), "layer4.1.conv2": slice(1, 2)}


def build_network(num_classes=100, stem=Config.stem):
    """Return a network: images float32 (N, 3, 32, 32) -> logits (N, num_classes). stem:
    torchvision's for photographs, or a 3x3 one for small images. Return another network here, such
    as mobilenet_v3_small(num_classes=num_classes); its last nn.Linear must give the logits."""
    model = resnet18(num_classes=num_classes)
    if stem == "cifar":  # feature maps four times as wide
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
        return model
    for name, live in SMALL_MAPS.items():  # for speed: the function is the same
        model.set_submodule(name, SmallMapConv(model.get_submodule(name), live))
    return model


class SmallMapConv(nn.Module):
    """A 3x3 convolution of 2x2 or 1x1 maps, with padding 1, as one matrix product: on a CPU,
    training is 1.4 times as fast. Kernel weights that only ever see padding change no output:
    they are left out, and are zeros in the state dict."""

    def __init__(self, conv, live):
        super().__init__()
        self.live = live
        self.weight = nn.Parameter(conv.weight[:, :, live, live].detach().clone())

    def forward(self, maps):
        size = maps.shape[-1]
        taps = self.weight.to(maps.dtype).permute(0, 2, 3, 1)
        # Output i meets the kernel's rows, and columns, from starts[i] on: 1, 0 for maps of 2x2.
        starts = range(taps.shape[1] - size, -1, -1)
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


def load_network(path, run=None):
    """Return the network of X.pth or X.resume.pth, in eval mode on the CPU, or raise
    InputError. run: what read_run returned for the path, if that was called before."""
    run = run or read_run(path)
    state = {str(name): value for name, value in run["model"].items() if torch.is_tensor(value)}
    expected = build_network(1, Config.stem).state_dict()
    for prefix in ("module.", "_orig_mod.", "module."):  # DataParallel, torch.compile
        known = {name: name if name in expected else name.removeprefix(prefix) for name in state}
        state = {known[name]: value for name, value in state.items()}
    first = state.get("conv1.weight", torch.empty(0))
    stem = "cifar" if first.shape[2:] == (3, 3) else "imagenet"
    heads = [len(value) for value in state.values() if value.ndim == 2]  # of Linear layers
    count = heads[-1] if heads else 1
    if run["log"]:
        stem, count = run["log"]["config"]["stem"], len(run["log"]["classes"])
    model = build_network(count, stem).float()
    try:
        model.load_state_dict(state)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{path} does not fit build_network: {reason}") from error
    for name, value in model.state_dict().items():
        same_kind = state.get(name, value).is_floating_point() == value.is_floating_point()
        if not same_kind or not value.isfinite().all():
            raise InputError(f"{path}: {name} is not finite, or of another type.")
    return model.eval()


# Training -------------------------------------------------------------------------------
def rate_factor(config, epoch):
    """The learning rate of an epoch, counted from 0, as a share of the initial one."""
    done = epoch / config.epochs
    if config.schedule == "cosine":
        return (1 + math.cos(math.pi * done)) / 2
    return config.gamma ** sum(done >= milestone for milestone in config.milestones)


def build_optimizer(model, config):
    """The optimizer; on CUDA another one may need capturable=True, see capture_step. A
    parameter group may have a learning rate of its own: the schedule multiplies each."""
    settings = {"momentum": config.momentum, "weight_decay": config.weight_decay}
    return torch.optim.SGD(model.parameters(), config.lr, fused=True, **settings)


def train_step(model, optimizer, images, labels, config):
    """One optimizer step on images (N, 3, 32, 32), labels (N,); return the mean loss, on device."""
    mixed = config.precision == "bfloat16"
    with torch.autocast(images.device.type, torch.bfloat16, enabled=mixed):
        loss = F.cross_entropy(model(images), labels, label_smoothing=config.label_smoothing)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def train_epoch(model, optimizer, loader, config):
    """One pass over the loader; return the mean of its steps' losses."""
    model.train()
    captured, losses, epoch = None, [], loader.epoch + 1
    for images, labels in tqdm(loader, f"epoch {epoch}", leave=False, disable=None):
        full = len(images) == loader.batch_size
        if full and images.is_cuda and len(losses) == EAGER_STEPS:
            captured = capture_step(model, optimizer, images, labels, config)
        step = captured if captured and full else train_step
        losses.append(step(model, optimizer, images, labels, config))
    loss = torch.stack(losses).cpu().double().mean().item()  # once: reading makes a GPU wait
    if not math.isfinite(loss):
        raise InputError(f"The loss is not finite at epoch {epoch}: lower --lr.")
    return loss


def capture_step(model, optimizer, images, labels, config):
    """Record train_step as a CUDA graph; return a function that replays it on another batch. A
    replay is one launch, a step about 400. Python code in train_step, such as a draw with
    NumPy, runs at the recording only, so once an epoch; torch's draws are new in each step."""
    images, labels = images.clone(), labels.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = train_step(model, optimizer, images, labels, config)

    def replay(model, optimizer, new_images, new_labels, config):  # as train_step
        images.copy_(new_images)
        labels.copy_(new_labels)
        graph.replay()
        return loss.clone()

    return replay


def set_seed(seed):
    """Seed every generator that an edited augmentation or network may draw from."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def run_epoch(epoch, model, optimizer, loaders, config):
    """Train for an epoch, counted from 0, and test; print and return its figures."""
    start = time.perf_counter()
    factor = rate_factor(config, epoch)
    for group in optimizer.param_groups:
        group["lr"] = factor * group.setdefault("initial_lr", group["lr"])
    train_loader, test_loader = loaders
    train_loader.epoch = epoch
    set_seed(ood_data.mix_seed(config.seed, epoch))  # dropout draws the same after a resume
    loss = train_epoch(model, optimizer, train_loader, config)
    speed = len(train_loader.images) / (time.perf_counter() - start)
    logits, labels = ood_utils.get_logits(model, test_loader)
    accuracy = (logits.argmax(1) == labels).double().mean().item()
    split = "validation" if config.validation else "test"
    lr, seconds = config.lr * factor, time.perf_counter() - start
    left = tqdm.format_interval(seconds * (config.epochs - epoch - 1))
    results = f"loss {loss:.4f}  {split} accuracy {accuracy:.2%}  lr {lr:g}"
    times = f"{seconds:.1f} s  {speed:.0f} images/s  {left} left"
    print(f"epoch {epoch + 1:3d}/{config.epochs}  {results}  {times}", flush=True)
    figures = {"epoch": epoch + 1, "loss": loss, f"{split}_accuracy": accuracy}
    return figures | {"lr": lr, "seconds": seconds}


def train_model(config=None):
    """Train a network, by default with the published recipe, and write its checkpoint. Return it
    in eval mode; the last epoch is the result. Raises OSError or InputError."""
    config = ood_utils.check(config or Config())
    path = checkpoint_path(config)
    device = ood_utils.pick_device(config.device)
    with ood_utils.lock(path.with_name(f".{path.stem}.lock"), f"Another run is writing {path}."):
        files = [file for file in (path, path.with_suffix(".resume.pth")) if file.exists()]
        run = read_run(files[0]) if config.resume and files else None
        if run and not run["log"]:
            raise InputError(f"{files[0]} has no log: omit --resume, or pass another --checkpoint.")
        if config.precision == "auto":
            begun = run["log"]["config"]["precision"] if run else native_precision(device)
            config = replace(config, precision=begun)
        data = {"dataset": config.dataset, "data_root": config.data_root}
        data |= {"validation": config.validation, "device": device}
        train_loader = get_loader(True, batch_size=config.batch_size, seed=config.seed, **data)
        loaders = train_loader, get_loader(False, **data)
        count = len(train_loader.images)
        # Batch norm needs two images.
        if config.batch_size == 1 or count % config.batch_size == 1:
            raise InputError(f"{count} images leave a batch of 1: change --batch-size.")

        set_seed(config.seed)
        model = build_network(len(train_loader.classes), config.stem).float()
        if ood_utils.last_layer(model).out_features != len(train_loader.classes):
            raise InputError("The last nn.Linear of build_network must have num_classes outputs.")
        model.to(device, memory_format=memory_format(device))
        optimizer = build_optimizer(model, config)
        log = start_log(config, device, loaders)
        if run:
            resume(path, run, log, model, optimizer)
        else:
            ood_utils.set_aside(path)
        print(f"device: {log['device']}, {config.precision}; {count} images", flush=True)

        saved = time.perf_counter()
        for epoch in range(len(log["epochs"]), config.epochs):
            log["epochs"].append(run_epoch(epoch, model, optimizer, loaders, config))
            if epoch + 1 == config.epochs or time.perf_counter() - saved >= SAVE_SECONDS:
                save(path, log, model, optimizer)
                saved = time.perf_counter()
    return model.eval()


def native_precision(device):
    """bfloat16 where the device has it, else float32; on CUDA with TF32 convolutions."""
    able = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    native = able.get("avx512_bf16") or able.get("bf16")  # x86, ARM
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    return "bfloat16" if native else "float32"


# Files: X.resume.pth while a run is unfinished, then checkpoint X.pth and log X.json ----
def checkpoint_path(config):
    """The given path, or <dataset>_resnet18.pth, with the seed in its name unless it is 0."""
    suffix = f"_seed{config.seed}" if config.seed else ""
    folder = ood_data.path_name(os.path.realpath(config.dataset))
    name = config.dataset if config.dataset in ood_data.CLOSED_SETS else folder
    path = Path(config.checkpoint or f"{name}_resnet18{suffix}.pth")
    taken = (".resume", ".ood", ".val")  # other files of a run
    if path.suffix != ".pth" or path.stem.endswith(taken) or path.is_dir():
        raise InputError(f"{path} cannot be a checkpoint: use NAME.pth, not NAME.resume.pth.")
    return path


def read_run(path):
    """Read X.pth with its log X.json, or X.resume.pth: {"log", "model", and "optimizer"}; the log
    may be None. Executes nothing from a file. Raises InputError."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"No checkpoint at {path}: run `python train.py`, or pass --checkpoint.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        names = ", ".join(map(str, state.keys()))
    except Exception as error:
        raise InputError(f"{path} is damaged, or no state dict of plain tensors.") from error
    log = state.get("log")
    if isinstance(log, dict) and "settings" in log:  # X.resume.pth
        return state
    for entry in ("state_dict", "model", "model_state_dict", "net"):
        if isinstance(state.get(entry), dict):
            print(f"note: of {names} in {path}, {entry} is taken", file=sys.stderr)
            state = state[entry]
    log_path = path.resolve().with_suffix(".json")  # a link has the log of its target
    if not log_path.exists():
        return {"log": None, "model": state}
    with contextlib.suppress(ValueError, LookupError, TypeError):
        log = json.loads(log_path.read_bytes())
        if log["settings"] and log["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest():
            return {"log": log, "model": state}
    raise InputError(f"{log_path} is damaged, old, or the log of another checkpoint: move it.")


def start_log(config, device, loaders):
    """The log of a run that has no epoch yet. "settings" is all that its figures depend on:
    --resume and compare.py compare it."""
    asked = to_jsonable_python(config)
    if config.dataset not in ood_data.CLOSED_SETS:
        asked["dataset"] = str(Path(config.dataset).expanduser().resolve())
    started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    log = {"date": started, "command": shlex.join(sys.argv), "config": asked}
    train_loader, test_loader = loaders
    content = {"classes": train_loader.classes, "code": digest_code(SOURCES)}
    inputs = ood_data.to_input(train_loader.images[:1000].cpu())
    content["data"] = ood_utils.digest(train_loader.images, train_loader.labels, inputs)
    free = ("data_root", "checkpoint", "device", "resume")
    settings = {name: asked[name] for name in asked if name not in free} | content
    settings["dataset"] = ood_data.path_name(asked["dataset"])  # a folder may move
    settings |= {"mean": list(ood_data.MEAN), "std": list(ood_data.STD)}
    log |= content | {"settings": settings}
    log |= {"images": len(train_loader.images), "sources": SOURCES, "epochs": []}
    log["tested_on"] = ood_utils.digest(test_loader.images, test_loader.labels)
    return log | ood_utils.describe(device)


def resume(path, run, log, model, optimizer):
    """Load a run into log, model and optimizer, or raise InputError if it is another one."""
    old, new = run["log"]["settings"], log["settings"]
    changed = [name for name in old | new if old.get(name) != new.get(name)]
    if changed:
        texts = ", ".join(f"{name} {old.get(name)} -> {new.get(name)}"[:99] for name in changed)
        raise InputError(f"{path} is another run ({texts}): pass another --checkpoint.")
    model.load_state_dict(run["model"])
    log["epochs"] = run["log"]["epochs"]
    before, now = run["log"]["device"], log["device"]
    log["device"] = before if before.endswith(now) else f"{before}, then {now}"
    if "optimizer" in run:
        optimizer.load_state_dict(run["optimizer"])
        print(f"resuming after epoch {len(log['epochs'])} of {log['config']['epochs']}")
    else:
        print(f"{path} is finished: nothing to train")


def save(path, log, model, optimizer):
    """Write the state for --resume, or after the last epoch log and checkpoint."""
    state_path = path.with_suffix(".resume.pth")
    weights = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    content = io.BytesIO()  # torch.save itself does not report a full disk
    if len(log["epochs"]) < log["config"]["epochs"]:
        torch.save({"log": log, "model": weights, "optimizer": optimizer.state_dict()}, content)
        ood_utils.write_file(state_path, content.getvalue())
        return
    torch.save(weights, content)
    log["sha256"] = hashlib.sha256(content.getvalue()).hexdigest()
    ood_utils.write_file(path.with_suffix(".json"), json.dumps(log, indent=1).encode())
    ood_utils.write_file(path, content.getvalue())
    state_path.unlink(missing_ok=True)
    print(f"wrote {path}")


# The code of a run -----------------------------------------------------------------------
def read_sources(script):
    """{name: text} of a script and of the files and whole packages beside it that it imports."""
    sources, files, seen = {}, [script], {script.stem}
    for file in filter(Path.is_file, files):  # which grows
        try:
            text = decode_source(file.read_bytes())
            tree = ast.parse(text)
        except SyntaxError:  # in a file of a package that is not imported
            continue
        sources[file.relative_to(script.parent).as_posix()] = text
        modules = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules.add(node.module)
        for name in sorted({module.split(".")[0] for module in modules} - seen):
            seen.add(name)
            files += [script.parent / f"{name}.py", *(script.parent / name).rglob("*.py")]
    return sources


def digest_code(sources):
    """8 hex digits of {name: text}. Comments, docstrings and the values of Config do not count, nor
    do ood_data.py and ood_utils.py: an OOD set or score may be added between two seeds."""
    digest = hashlib.sha256()
    for name in sorted(sources.keys() - {"ood_data.py", "ood_utils.py"}):
        tree = ast.parse(sources[name])
        for node in tree.body if name == "train.py" else ():
            if isinstance(node, ast.ClassDef) and node.name == "Config":
                node.body = [getattr(part, "target", part) for part in node.body]  # names only
        digest.update(repr(simplify(tree)).encode())
    return digest.hexdigest()[:8]


def simplify(node):
    """A syntax tree as lists, without docstrings, nor empty fields, in which Pythons differ."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return None  # a docstring
    if isinstance(node, list):
        return [part for part in map(simplify, node) if part is not None]
    if isinstance(node, ast.AST):
        fields = [(name, value) for name, value in ast.iter_fields(node) if value not in (None, [])]
        return [type(node).__name__, [(name, simplify(value)) for name, value in fields]]
    return ascii(node)


SOURCES = read_sources(Path(__file__))  # now: a later edit belongs to the next run

if __name__ == "__main__":
    ood_utils.run_command(train_model, Config, "interrupted: --resume continues")

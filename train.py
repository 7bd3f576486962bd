"""Train a ResNet-18 on CIFAR-100, or on another closed set, and write a checkpoint.

    python train.py                                # CIFAR-100, 100 epochs
    python train.py --dataset digits --epochs 20   # a laptop, no download
    python train.py --resume                       # go on after an interruption

Prints a line per epoch and writes, by default for CIFAR-100 and in the working directory,
    cifar100_resnet18.pth          a plain state dict, which torchvision's resnet18 loads (for
                                   32x32 images: taps that these never meet are zero)
    cifar100_resnet18.json         settings, classes, versions, and the figures of every epoch
    cifar100_resnet18.resume.pth   the state of an unfinished run
"""

import contextlib
import datetime
import functools
import glob
import json
import math
import os
import time
import warnings
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import filelock
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18
from tqdm import tqdm
from tyro.conf import arg

import ood_data
import ood_utils
from ood_data import ImageLoader, memory_format, normalise
from ood_utils import InputError


@dataclass
class Config:
    """The published recipe. Edit a value here, or pass it as a flag."""

    dataset: Annotated[str, arg(help=ood_data.CLOSED_SET_NAMES)] = ood_data.DATASET
    data_root: str = ood_data.DATA_ROOT  # where torchvision's data sets lie, or are downloaded to
    checkpoint: str | None = None  # file to write, by default <dataset>_resnet18.pth
    epochs: int = 100  # passes over the training images
    batch_size: int = 128  # images per step, of all processes together
    lr: float = 0.1  # learning rate before the first milestone
    momentum: float = 0.9
    weight_decay: float = 1e-4
    milestones: tuple[float, ...] = (0.5, 0.75)  # fractions of the run at which lr drops
    gamma: float = 0.1  # factor of the learning rate at a milestone
    stem: Literal["imagenet", "cifar"] = "imagenet"  # 7x7 stride 2 and max-pool, or 3x3 stride 1
    seed: int = 0  # of weights, order and augmentation
    device: str | None = None  # by default cuda, mps or cpu, whichever is there first
    precision: Literal["auto", "bfloat16", "float32"] = "auto"  # bfloat16 where it is native
    resume: bool = False  # go on with the unfinished run of this checkpoint


PADDING = 4  # pixels of black around an image before the random crop
EPOCH_LINE = (
    "epoch {epoch:3d}/{epochs}  loss {loss:.4f}  test accuracy {test_accuracy:.2%}  lr {lr:g}  "
    "{seconds:.1f} s  {rate:.0f} images/s"  # the seconds with, the rate without the test
)
SAVE_SECONDS = 10  # at least, between saves: an epoch of a small set is shorter than a save


# ----------------------------------------------------------------------------------------
# Data


def crop_and_flip(images, draws):
    """Pad uint8 (N, 3, 32, 32) with black, crop 32x32 at a random place, flip with p = 0.5.

    draws: float32 (N, 3) in [0, 1), which decide row, column and flip of each image.
    """
    size = images.shape[-1]
    row, column = (draws[:, :2] * (2 * PADDING + 1)).long().unbind(1)
    padded = F.pad(images, (PADDING,) * 4)
    windows = padded.unfold(2, size, 1).unfold(3, size, 1)  # (N, 3, 9, 9, 32, 32), a view
    each = torch.arange(len(images), device=images.device)
    crops = windows[each, :, row, column]
    flip = draws[:, 2, None, None, None] < 0.5
    return torch.where(flip, crops.flip(3), crops)


def get_transform(train=True):
    """Return what get_loader does to a batch: uint8 (N, 3, 32, 32) -> float32, normalised.

    With train=True it crops and flips first, by draws of its own or those it is given.
    """

    def transform(images, draws=None):
        draws = torch.rand(len(images), 3) if draws is None else draws
        return normalise(crop_and_flip(images, draws.to(images.device)))

    return transform if train else normalise


def get_loader(
    train=True,
    dataset=Config.dataset,
    data_root=Config.data_root,
    batch_size=None,
    seed=Config.seed,
    device="cpu",
    augment=True,
):
    """Return an ImageLoader over a split of a closed set; its `classes` are the class names.

    The training split is shuffled, cropped and flipped anew in each epoch unless
    augment=False. Raises InputError where the set is unknown or cannot be had.
    """
    data = first_on_each_machine(ood_data.read_closed_set, dataset, data_root, train)
    if not (train and augment):
        return ImageLoader(*data, batch_size or ood_data.EVAL_BATCH_SIZE, device)
    rank, processes = get_ranks()
    order = {"shuffle": True, "seed": seed, "rank": rank, "processes": processes}
    return ImageLoader(*data, batch_size or Config.batch_size, device, crop_and_flip, **order)


# ----------------------------------------------------------------------------------------
# Network: torchvision's resnet18, with small maps computed the short way
#
# 32x32 images reach layer3 as maps of 4x4, then 2x2, and layer4 as 2x2, then 1x1. Of layer4's
# 3x3 kernels only 2x2 taps, then the centre one, ever meet a pixel: the others change no output
# and get no gradient. On layer3's 2x2 maps all taps do; there the computation alone is shorter.


class SmallMapConv(nn.Module):
    """A convolution of a map so small that each output sees every pixel: one matrix product.

    Each side has (kernel - map + 1) outputs: two where a 3x3 kernel meets a 2x2 map, one where
    kernel and map are equally large.
    """

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())

    def forward(self, maps):
        size = maps.shape[-1]
        taps = self.weight.to(maps.dtype).permute(0, 2, 3, 1)
        starts = range(taps.shape[1] - size, -1, -1)  # of the map in the kernel, per output
        kernels = [taps[:, y : y + size, x : x + size] for y in starts for x in starts]
        matrix = torch.stack(kernels).flatten(0, 1).flatten(1)  # (outputs x C_out, pixels x C_in)
        outputs = F.linear(maps.permute(0, 2, 3, 1).flatten(1), matrix)
        outputs = outputs.unflatten(1, (len(starts), len(starts), -1)).permute(0, 3, 1, 2)
        return outputs.contiguous(memory_format=memory_format(maps.device))


LIVE_TAPS = {  # rows, and columns, of the 3x3 kernel that ever meet the map
    "layer3.0.conv2": slice(0, 3),
    "layer3.1.conv1": slice(0, 3),
    "layer3.1.conv2": slice(0, 3),
    "layer4.0.conv1": slice(1, 3),
    "layer4.0.conv2": slice(1, 2),
    "layer4.1.conv1": slice(1, 2),
    "layer4.1.conv2": slice(1, 2),
}


def build_network(num_classes=100, stem=Config.stem):
    """Return a resnet18 for images float32 (N, 3, 32, 32), initialised as torchvision's."""
    model = resnet18(num_classes=num_classes)
    if stem == "cifar":  # its maps are four times as wide
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
        return model
    for name, live in LIVE_TAPS.items():
        weight = model.get_submodule(name).weight
        model.set_submodule(name, SmallMapConv(weight[:, :, live, live]))
    return model


def to_torchvision(model):
    """The state dict of torchvision's resnet18, on the CPU; the taps left out are zero."""
    state = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    for name, live in LIVE_TAPS.items():
        weight = state[f"{name}.weight"]
        if isinstance(model.get_submodule(name), SmallMapConv):
            state[f"{name}.weight"] = weight.new_zeros(*weight.shape[:2], 3, 3)
            state[f"{name}.weight"][:, :, live, live] = weight
    return state


def from_torchvision(model, state):
    """Load a state dict of torchvision's resnet18, strictly, into one of build_network's."""
    state = dict(state)
    for name, live in LIVE_TAPS.items():
        if isinstance(model.get_submodule(name), SmallMapConv):
            state[f"{name}.weight"] = state[f"{name}.weight"][:, :, live, live]
    model.load_state_dict(state)


def load_network(path):
    """Return the network of a checkpoint, in eval mode on the CPU, or raise InputError.

    Stem and number of classes, `model.fc.out_features`, are those of the file.
    """
    path = ood_utils.checkpoint_path(path)
    state = load_file(path)
    try:
        stem = "cifar" if state["conv1.weight"].shape[-1] == 3 else "imagenet"
        model = build_network(len(state["fc.weight"]), stem)
        from_torchvision(model, state)
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error)[:200]
        raise InputError(f"{path} is not a ResNet-18 of `python train.py`: {reason}") from error
    if not all(value.isfinite().all() for value in state.values()):
        raise InputError(f"{path} has weights that are not finite: train with a lower --lr.")
    return model.eval()


# ----------------------------------------------------------------------------------------
# Training


def learning_rate(config, epoch):
    """The learning rate of an epoch, counted from 0."""
    passed = [fraction for fraction in config.milestones if epoch / config.epochs >= fraction]
    return config.lr * config.gamma ** len(passed)


def build_optimizer(model, config):
    settings = {"momentum": config.momentum, "weight_decay": config.weight_decay}
    return torch.optim.SGD(model.parameters(), config.lr, fused=True, **settings)


def train_step(model, optimizer, images, labels, precision="float32"):
    """One SGD step on images (N, 3, 32, 32) and labels (N,); return the mean loss, on device."""
    device = images.device.type
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
        loss = F.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def train_epoch(network, optimizer, loader, precision="float32"):
    """One pass over the loader; return the mean of its steps' losses."""
    epoch = loader.epoch + 1
    hidden = True if loader.rank > 0 else None  # None: shown on a terminal
    losses = []
    for images, labels in tqdm(loader, f"epoch {epoch}", leave=False, disable=hidden):
        losses.append(train_step(network, optimizer, images, labels, precision))
    losses = torch.stack(losses)
    if loader.processes > 1:
        dist.all_reduce(losses)
    losses = losses.cpu() / loader.processes  # once an epoch: each reading makes a GPU wait
    for step, loss in enumerate(losses.tolist(), start=1):
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"The loss is not finite at epoch {epoch}, step {step}: lower --lr."
            )
    return losses.mean().item()


def get_accuracy(model, loader):
    """Share of a set's images that the network classifies correctly."""
    logits, labels = ood_utils.get_logits(model, loader)
    if not logits.isfinite().all():
        raise FloatingPointError("The logits of test images are not finite: lower --lr.")
    return (logits.argmax(1) == labels).double().mean().item()


def train_model(config=None):
    """Train a ResNet-18 on a closed set and write its checkpoint: the last epoch is the result.

    config: a Config, by default the published recipe. Returns the network. Raises InputError,
    OSError, or FloatingPointError when the loss is no longer finite.
    """
    config = config or Config()
    check_settings(config)
    path = ood_utils.checkpoint_path(config.checkpoint, config.dataset)
    with process_group(), only_run_of(path):
        device = process_device(config.device)
        data = (config.dataset, config.data_root)
        train_loader = get_loader(True, *data, config.batch_size, config.seed, device)
        test_loader = get_loader(False, *data, device=device)
        check_batches(train_loader)
        log = start_log(config, device, train_loader)
        precision = log["config"]["precision"]

        torch.manual_seed(config.seed)
        model = build_network(len(train_loader.classes), config.stem)
        model.to(device, memory_format=memory_format(device))
        optimizer = build_optimizer(model, config)
        if train_loader.rank == 0:
            resume(path, log, model, optimizer)
        network = join_processes(log, model, optimizer)

        saved = time.perf_counter()
        for epoch in range(len(log["epochs"]), config.epochs):
            start = time.perf_counter()
            lr = learning_rate(config, epoch)
            for group in optimizer.param_groups:
                group["lr"] = lr
            train_loader.epoch = epoch
            loss = train_epoch(network, optimizer, train_loader, precision)
            rate = len(train_loader.images) / (time.perf_counter() - start)
            if train_loader.rank > 0:
                continue  # the first process tests, says and saves

            figures = {
                "epoch": epoch + 1,
                "loss": loss,
                "test_accuracy": get_accuracy(model, test_loader),
                "lr": lr,
                "seconds": time.perf_counter() - start,
            }
            log["epochs"].append(figures)
            print(EPOCH_LINE.format(epochs=config.epochs, rate=rate, **figures))
            if epoch + 1 == config.epochs or time.perf_counter() - saved >= SAVE_SECONDS:
                save(path, log, model, optimizer)
                saved = time.perf_counter()
    return model.eval()


# ----------------------------------------------------------------------------------------
# What is refused


def check_settings(config):
    """Raise InputError for a number out of its range."""
    for name in ("epochs", "batch_size", "lr", "gamma", "momentum", "weight_decay", "seed"):
        value = getattr(config, name)
        may_be_zero = name in ("momentum", "weight_decay", "seed")
        if value < 0 or (value == 0 and not may_be_zero) or not math.isfinite(value):
            raise InputError(f"--{name.replace('_', '-')} {value} is out of range.")
    if not all(0 < milestone < 1 for milestone in config.milestones):
        fractions = " ".join(f"{milestone / config.epochs:g}" for milestone in config.milestones)
        raise InputError(
            "--milestones must be fractions of the run, between 0 and 1: instead of numbers of "
            f"epochs pass --milestones {fractions}."
        )


def check_batches(loader):
    """Raise InputError where a batch does not split into equal shares of 2 images or more."""
    count, size, processes = len(loader.images), loader.batch_size, loader.processes
    last_batch = count - size * (len(loader) - 1)
    share = last_batch // processes
    if size % processes or share < 2:
        raise InputError(
            f"{count} images in batches of {size} over {processes} processes leave a batch of "
            f"{share}, too few for batch norm, or unequal shares: change --batch-size."
        )


# ----------------------------------------------------------------------------------------
# Files: checkpoint X.pth, log X.json, and X.resume.pth while the run is unfinished


def load_file(path):
    """Load what torch.save wrote, tensors and plain data alone: nothing in it is executed."""
    if not path.is_file():
        raise InputError(f"No checkpoint at {path}. Run `python train.py` first, or pass another.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"{path} is damaged, or holds code: it was not loaded.") from error


def read_log(path):
    """Return the log beside a checkpoint, None where there is none; raise InputError."""
    path = path.with_suffix(".json")
    if not path.exists():
        return None
    try:
        log = json.loads(path.read_text())
        log["finished"] = len(log["epochs"]) == log["config"]["epochs"]
        return log
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path} is not the log of a run: remove it.") from error


def start_log(config, device, loader):
    """Return the log of a run without epochs, and say in a line what it runs on."""
    settings = asdict(config)
    settings["milestones"] = list(config.milestones)
    settings["precision"] = pick_precision(config.precision, device)
    log = {"config": settings, "images": len(loader.images), "classes": list(loader.classes)}
    log |= ood_utils.describe(device)
    log["processes"] = loader.processes
    log["epochs"] = []
    if loader.rank == 0:
        print(f"device: {log['device']}, {settings['precision']}, processes: {loader.processes}")
    return log


def save(path, log, model, optimizer):
    """Write checkpoint and log, and until the last epoch what --resume needs; each file whole."""
    weights = to_torchvision(model)
    state_path = path.with_suffix(".resume.pth")
    ood_utils.write_file(path, weights)
    ood_utils.write_file(path.with_suffix(".json"), json.dumps(log, indent=1).encode())
    if len(log["epochs"]) < log["config"]["epochs"]:
        state = {"log": log, "model": weights, "optimizer": optimizer.state_dict()}
        ood_utils.write_file(state_path, state)
    else:
        state_path.unlink(missing_ok=True)
        print(f"wrote {path}")


def resume(path, log, model, optimizer):
    """Where --resume asks for it, put a run into log, model and optimizer, and say so."""
    state_path = path.with_suffix(".resume.pth")
    done = read_log(path)
    if not log["config"]["resume"]:
        if path.exists() or state_path.exists():
            print(f"starting over: the first save replaces {path}")
    elif state_path.exists():
        state = load_file(state_path)
        try:
            check_same_settings(state_path, state["log"], log)
            from_torchvision(model, state["model"])
            optimizer.load_state_dict(state["optimizer"])
            log["epochs"] = state["log"]["epochs"]
        except (LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise InputError(f"{state_path} is not the state of a run: remove it.") from error
        print(f"resuming after epoch {len(log['epochs'])} of {log['config']['epochs']}")
    elif done and done["finished"] and path.exists():
        check_same_settings(path, done, log)
        model.load_state_dict(load_network(path).state_dict())
        log["epochs"] = done["epochs"]
        print(f"finished: {path} has all {len(log['epochs'])} epochs")
    else:
        print(f"no unfinished run at {state_path}: starting")


def check_same_settings(path, saved, log):
    """Raise InputError where a setting that figures depend on has changed."""
    old = {"images": saved.get("images"), **saved["config"]}
    new = {"images": log["images"], **log["config"]}
    changed = []
    for name, value in new.items():
        if old.get(name) != value and name not in ("data_root", "checkpoint", "device", "resume"):
            changed.append(f"{name} {old.get(name)} -> {value}")
    if changed:
        raise InputError(
            f"{path} is of a run with other settings: {', '.join(changed)}. Pass the former, or "
            "start over without --resume."
        )


@contextlib.contextmanager
def only_run_of(path):
    """Hold a lock that dies with this process, and clear what a killed run left behind."""
    if get_ranks()[0] > 0:
        yield
        return
    ood_utils.check_writable(path.parent, "--checkpoint")
    lock_path = path.with_suffix(".lock")
    lock = filelock.FileLock(lock_path, blocking=False)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise InputError(f"Another run is writing {path}: pass another --checkpoint.") from error
    try:
        for ending in (path.suffix, ".json", ".resume.pth"):
            name = glob.escape(path.with_suffix(ending).name)
            for left in path.parent.glob(f"{name}.{'?' * 32}.tmp"):  # as write_file names them
                left.unlink()
        yield
    finally:
        with contextlib.suppress(OSError):
            lock_path.unlink()
        lock.release()


# ----------------------------------------------------------------------------------------
# Device, precision, and several processes, which torchrun starts


def pick_precision(precision, device):
    """The precision; for "auto", bfloat16 where the device has it natively, else float32."""
    if precision != "auto":
        return precision
    native = False
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu":
        able = torch.cpu.get_capabilities()
        native = able.get("avx512_bf16", False) or able.get("bf16", False)  # x86, ARM
    return "bfloat16" if native else "float32"


@contextlib.contextmanager
def process_group():
    """Meet the other processes, and part from them on every path."""
    if not dist.is_torchelastic_launched():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    patience = datetime.timedelta(days=1)  # one process may read, or download, for hours
    dist.init_process_group(backend, timeout=patience)
    try:
        yield
    except BaseException:
        first_to_fail()  # before the others notice
        raise
    finally:
        dist.destroy_process_group()


def get_ranks():
    """(rank of this process, number of processes)."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def process_device(name):
    """pick_device(name); of several processes each takes the GPU of its number."""
    if dist.is_initialized() and name in (None, "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(name)
    device = ood_utils.pick_device(name)
    if dist.is_initialized() and device.type == "mps":
        raise InputError("torchrun does not work on MPS: run `python train.py`.")
    return device


def first_on_each_machine(read, *args):
    """read(*args), by one process of each machine before the others: it may have to download."""
    if not dist.is_initialized():
        return read(*args)
    is_first = os.environ["LOCAL_RANK"] == "0"
    if is_first:
        data = read(*args)
    dist.all_reduce(torch.zeros(1))  # a barrier on the CPU
    if not is_first:
        data = read(*args)
    return data


def join_processes(log, model, optimizer):
    """Give all processes the first one's state; return the network that averages gradients."""
    if not dist.is_initialized():
        return model
    epochs = [log["epochs"]]
    dist.broadcast_object_list(epochs)
    log["epochs"] = epochs[0]
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        momentum = state.setdefault("momentum_buffer", torch.zeros_like(parameter))
        dist.broadcast(momentum, 0)
    # It shares the weights itself. Batch norm's statistics stay each process's own.
    with warnings.catch_warnings(action="ignore"):  # torch 2.14 has another name for it
        return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)


@functools.cache
def first_to_fail():
    """Claim to be the first process of the run that failed; return whether it was."""
    if not dist.is_torchelastic_launched():
        return True
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = dist.TCPStore(host, port, is_master=False, timeout=datetime.timedelta(seconds=5))
        return store.add(f"failures of start {os.environ['TORCHELASTIC_RESTART_COUNT']}", 1) == 1
    except RuntimeError:  # torchrun has ended: better told twice than not
        return True


if __name__ == "__main__":
    ood_utils.run_command(train_model, Config, speaks=first_to_fail)

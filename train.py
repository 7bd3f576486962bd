"""Train a ResNet-18 on CIFAR-100, or on another closed set, and write a checkpoint.

    python train.py                                   # CIFAR-100, 100 epochs, on the GPU if there is one
    python train.py --dataset digits --epochs 20      # a laptop, no download
    python train.py --resume                          # go on after an interruption

Prints one line per epoch and writes, by default for CIFAR-100 and in the working directory,
    cifar100_resnet18.pth           a plain state dict of torchvision's resnet18(num_classes=100)
    cifar100_resnet18.json          configuration, versions, device, and the figures of every epoch
    cifar100_resnet18.resume.pth    the state of an unfinished run
"""

import contextlib
import json
import math
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18
from tqdm import tqdm

from ood_data import DATA_ROOT, DATASET, EVAL_BATCH_SIZE, SEED, ImageLoader, normalise, read_closed_set
from ood_utils import (
    InputError,
    check_writable,
    describe,
    get_logits,
    load_file,
    pick_device,
    run_command,
    to_bytes,
    write_file,
)

# The published recipe: 100 epochs of CIFAR-100 in 391 steps each. DATASET, DATA_ROOT and SEED stand in ood_data.py.
EPOCHS = 100
BATCH_SIZE = 128
LR = 0.1
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4
MILESTONES = (0.5, 0.75)  # fractions of the run after which lr is multiplied by GAMMA
GAMMA = 0.1
STEM = "imagenet"  # torchvision's 7x7 stride-2 stem and max-pool; "cifar": 3x3 stride 1, as most papers use at 32x32
PADDING = 4  # pixels of black around an image before the random crop
SAVE_SECONDS = 10  # an epoch of a small set takes less time than writing a checkpoint does


# ---------------------------------------------------------------------------------------------------------------------
# Data


def get_transform(train=True):
    """Return the function that makes a batch of uint8 images (N, 3, H, W) the network's float32 input, normalised.

    With train=True each image is padded with PADDING black pixels, cropped to its size at a random place and flipped
    with p = 0.5; a second argument, float32 (N, 3) in [0, 1), decides row, column and flip (default: torch.rand).
    """
    if not train:
        return normalise

    def transform(images, draws=None):
        draws = torch.rand(len(images), 3) if draws is None else draws
        return normalise(crop_and_flip(images, draws.to(images.device)))

    return transform


def crop_and_flip(images, draws):
    """uint8 (N, 3, H, W), float32 (N, 3) -> uint8 (N, 3, H, W); row and column are uniform over 2 * PADDING + 1."""
    count, _, height, width = images.shape
    offset = (draws[:, :2] * (2 * PADDING + 1)).long()
    columns = torch.arange(width, device=images.device)
    rows = offset[:, :1] + torch.arange(height, device=images.device)  # (N, H)
    columns = offset[:, 1:] + torch.where(draws[:, 2:] < 0.5, columns.flip(0), columns)  # (N, W)
    each = torch.arange(count, device=images.device)
    padded = F.pad(images, (PADDING,) * 4)
    return padded[each[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def get_loader(train=True, dataset=DATASET, data_root=DATA_ROOT, batch_size=None, seed=SEED, device="cpu"):
    """Return an ImageLoader over a closed set's split: shuffled and augmented with train=True, else in order.

    Its `classes` are the class names. batch_size defaults to BATCH_SIZE for training, EVAL_BATCH_SIZE for the test.
    Raises InputError or FileNotFoundError, as read_closed_set does.
    """
    images, labels, classes = read_closed_set(dataset, data_root, train)
    batch_size = batch_size or (BATCH_SIZE if train else EVAL_BATCH_SIZE)
    loader = ImageLoader(images, labels, batch_size, get_transform(train), seed if train else None, device)
    loader.classes = classes
    return loader


# ---------------------------------------------------------------------------------------------------------------------
# Network


class SmallMapConv(nn.Conv2d):
    """A convolution for maps so small that part of its kernel only ever meets padding: it keeps the live taps.

    On 32x32 images torchvision's layer4 sees maps of 2x2, then 1x1: of its 3x3 taps only the lower-right 2x2, then the
    centre one, touch the output or get a gradient. The state dict has the full kernel, the dead taps zero.
    """

    def __init__(self, conv, taps):
        padding = max(0, conv.padding[0] - taps.start)
        super().__init__(conv.in_channels, conv.out_channels, len(taps), conv.stride, padding, bias=False)
        self.taps, self.full_size = taps, conv.kernel_size[0]
        self.weight = nn.Parameter(self.live(conv.weight.detach()).clone())
        self.register_state_dict_post_hook(self.pad_taps)
        self.register_load_state_dict_pre_hook(self.cut_taps)

    def live(self, weight):
        return weight[:, :, self.taps.start : self.taps.stop, self.taps.start : self.taps.stop]

    @staticmethod
    def pad_taps(self, state, prefix, metadata):
        before, after = self.taps.start, self.full_size - self.taps.stop
        state[prefix + "weight"] = F.pad(state[prefix + "weight"], (before, after, before, after))

    @staticmethod
    def cut_taps(self, state, prefix, *_):
        if prefix + "weight" in state and state[prefix + "weight"].shape[-1] == self.full_size:
            state[prefix + "weight"] = self.live(state[prefix + "weight"])

    def forward(self, images):
        if not (images.is_cpu and images.shape[-1] == 2 and self.stride == (1, 1)):
            return super().forward(images)
        # On a CPU a 3x3 convolution of a 2x2 map is faster as one matrix product, 4 C_in -> 4 C_out: output (y, x) sees
        # the whole map, through the 2x2 taps that begin at (1 - y, 1 - x).
        taps = self.weight.permute(0, 2, 3, 1)  # (C_out, 3, 3, C_in)
        taps = torch.stack([taps[:, 1 - y : 3 - y, 1 - x : 3 - x] for y in (0, 1) for x in (0, 1)])
        outputs = F.linear(images.permute(0, 2, 3, 1).flatten(1), taps.flatten(0, 1).flatten(1))
        return outputs.view(-1, 2, 2, self.out_channels).permute(0, 3, 1, 2)


def shrink_convolutions(model):
    """Replace, in place, each 3x3 convolution that 32x32 images reach as a map of 2x2 or 1x1 by a SmallMapConv."""
    sizes = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.register_forward_pre_hook(lambda _, inputs, name=name: sizes.update({name: inputs[0].shape[-1]}))
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, 32, 32))
    for name, size in sizes.items():
        conv = model.get_submodule(name)
        conv._forward_pre_hooks.clear()
        if size <= 2:
            starts = range(-conv.padding[0], size - 1, conv.stride[0])  # where each output's kernel begins
            live = [tap for tap in range(3) if any(0 <= start + tap < size for start in starts)]
            model.set_submodule(name, SmallMapConv(conv, range(live[0], live[-1] + 1)))
    model.train()


def build_network(num_classes=100, stem=STEM):
    """Return torchvision's resnet18 for 32x32 images, in channels_last; its state dict is torchvision's.

    stem: "imagenet", torchvision's own, or "cifar", a 3x3 convolution of stride 1 and no max-pool.
    """
    model = resnet18(num_classes=num_classes)
    if stem == "cifar":
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    shrink_convolutions(model)
    return model.to(memory_format=torch.channels_last)


def load_network(path):
    """Return (network in eval mode on the CPU, class count) from a checkpoint; stem and class count are read from it.

    Raises FileNotFoundError or InputError.
    """
    state = load_file(path)
    try:
        num_classes = len(state["fc.weight"])
        model = build_network(num_classes, "cifar" if state["conv1.weight"].shape[-1] == 3 else "imagenet")
        model.load_state_dict(state)
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise InputError(f"{path} is not a ResNet-18 of `python train.py`: {str(error)[:200]}") from error
    return model.eval(), num_classes


# ---------------------------------------------------------------------------------------------------------------------
# Training


def checkpoint_path(checkpoint, dataset):
    """The given path, or <dataset>_resnet18.pth in the working directory."""
    return Path(checkpoint or f"{Path(dataset).expanduser().resolve().name}_resnet18.pth").expanduser()


def autocast(device):
    """bfloat16 autocast where the hardware multiplies bfloat16 natively, else a context without effect: float32."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.autocast(device.type, torch.bfloat16) if native else contextlib.nullcontext()


def build_optimizer(model, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY):
    return torch.optim.SGD(model.parameters(), lr, momentum, weight_decay=weight_decay, fused=True)


def train_step(model, optimizer, images, labels):
    """One SGD step on float32 images (N, 3, 32, 32) and labels (N,); return the mean loss, still on the device."""
    with autocast(images.device):
        loss = F.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def check_config(config):
    """Raise InputError for a hyperparameter out of its range."""
    for name in ("epochs", "batch_size", "lr", "gamma"):
        if not 0 < config[name] < math.inf:
            raise InputError(f"--{name.replace('_', '-')} must be greater than 0, not {config[name]}.")
    for name in ("momentum", "weight_decay", "seed"):
        if not 0 <= config[name] < math.inf:
            raise InputError(f"--{name.replace('_', '-')} must be 0 or greater, not {config[name]}.")
    if not all(0 < milestone < 1 for milestone in config["milestones"]):
        raise InputError(f"--milestones must lie between 0 and 1, the whole run, not {config['milestones']}.")
    if config["stem"] not in ("imagenet", "cifar"):
        raise InputError(f"Unknown stem {config['stem']!r}: use imagenet or cifar.")


def load_state(path, config, model, optimizer):
    """Put the unfinished run saved at path into model and optimizer; return its history, a dict per epoch."""
    state = load_file(path)
    try:
        saved = state["config"]
        changed = [f"{name} {saved.get(name)} -> {config[name]}" for name in config if saved.get(name) != config[name]]
        if changed:
            raise InputError(
                f"{path} is of a run with other settings: {', '.join(changed)}. Start over without --resume."
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return state["history"]
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f"{path} is not the state of a run: start over without --resume.") from error


def train_model(
    dataset: str = DATASET,
    data_root: str = DATA_ROOT,
    checkpoint: str | None = None,
    epochs: int = EPOCHS,
    batch_size: int = BATCH_SIZE,
    lr: float = LR,
    momentum: float = MOMENTUM,
    weight_decay: float = WEIGHT_DECAY,
    milestones: tuple[float, ...] = MILESTONES,
    gamma: float = GAMMA,
    stem: str = STEM,
    seed: int = SEED,
    device: str | None = None,
    resume: bool = False,
):
    """Train a ResNet-18 on a closed set and write its checkpoint; the last epoch is the result.

    Returns the network. Raises InputError, OSError, or FloatingPointError when the loss is no longer finite.

    Args:
        dataset: cifar100, cifar10, digits, or a folder with train/<class>/ and test/<class>/.
        data_root: Where torchvision's data sets lie, or are downloaded to.
        checkpoint: File to write; <dataset>_resnet18.pth by default.
        epochs: Passes over the training images.
        batch_size: Images per step.
        lr: Learning rate before the first milestone.
        momentum: Of SGD.
        weight_decay: Of SGD.
        milestones: Fractions of the run after which the learning rate is multiplied by gamma.
        gamma: Factor at a milestone.
        stem: imagenet (7x7 stride 2, max-pool) or cifar (3x3 stride 1).
        seed: Of weights, order and augmentation.
        device: cuda, mps or cpu; by default the first of them that is there.
        resume: Go on with the unfinished run of this checkpoint.
    """
    config = dict(dataset=dataset, epochs=epochs, batch_size=batch_size, lr=lr, momentum=momentum)
    config |= dict(weight_decay=weight_decay, milestones=list(milestones), gamma=gamma, stem=stem, seed=seed)
    check_config(config)
    path = checkpoint_path(checkpoint, dataset)
    state_path, log_path = path.with_suffix(".resume.pth"), path.with_suffix(".json")
    for file in (path, state_path, log_path):
        check_writable(file)
    device = pick_device(device)
    train_loader = get_loader(True, dataset, data_root, batch_size, seed, device)
    test_loader = get_loader(False, dataset, data_root, device=device)
    count = config["images"] = len(train_loader.images)
    if (count % batch_size or batch_size) < 2:
        raise InputError(f"{count} images in batches of {batch_size} leave a batch of 1, too few for batch norm.")

    torch.manual_seed(seed)
    model = build_network(len(train_loader.classes), stem).to(device)
    optimizer = build_optimizer(model, lr, momentum, weight_decay)
    history = []
    if resume and state_path.exists():
        history = load_state(state_path, config, model, optimizer)
        print(f"resuming after epoch {len(history)} of {epochs}", flush=True)
    elif resume:
        print(f"no unfinished run at {state_path}: starting", flush=True)
    elif state_path.exists():
        print(f"starting over: the first save replaces {state_path}, which --resume would continue", flush=True)

    saved, saved_time = len(history), time.monotonic()
    try:
        for epoch in range(len(history), epochs):
            start = time.perf_counter()
            train_loader.epoch = epoch
            # epoch / epochs is rounded as the literal 0.75 is, so that no milestone comes an epoch late
            epoch_lr = lr * gamma ** sum(epoch / epochs >= milestone for milestone in milestones)
            for group in optimizer.param_groups:
                group["lr"] = epoch_lr
            batches = tqdm(train_loader, f"epoch {epoch + 1}/{epochs}", leave=False, disable=None)
            losses = torch.stack([train_step(model, optimizer, *batch) for batch in batches]).cpu()
            if not losses.isfinite().all():
                step = 1 + int(losses.isfinite().int().argmin())
                where = f"epoch {epoch + 1}, step {step}, lr {epoch_lr:g}"
                raise FloatingPointError(
                    f"The loss is {losses[step - 1]} at {where}; epoch {saved} is kept. Lower --lr."
                )
            train_seconds = time.perf_counter() - start
            logits, labels = get_logits(model, test_loader)
            accuracy = (logits.argmax(1) == labels).double().mean().item()
            figures = dict(epoch=epoch + 1, loss=losses.mean().item(), test_accuracy=accuracy, lr=epoch_lr)
            history.append(figures | dict(seconds=time.perf_counter() - start))
            print(
                f"epoch {epoch + 1:3d}/{epochs}  loss {figures['loss']:.4f}  test accuracy {100 * accuracy:.2f}%  "
                f"lr {epoch_lr:g}  {history[-1]['seconds']:.1f} s  {count / train_seconds:.0f} images/s",
                flush=True,
            )
            last = epoch + 1 == epochs
            if last or time.monotonic() - saved_time >= SAVE_SECONDS:
                write_file(path, to_bytes(model.state_dict()))
                log = dict(config=config, **describe(device), epochs=history)
                write_file(log_path, json.dumps(log, indent=1).encode())
                if not last:
                    state = dict(
                        config=config, history=history, model=model.state_dict(), optimizer=optimizer.state_dict()
                    )
                    write_file(state_path, to_bytes(state))
                saved, saved_time = epoch + 1, time.monotonic()
    except KeyboardInterrupt:
        print(f"\ninterrupted: epoch {saved} is safe on disk; --resume goes on from there", file=sys.stderr)
        raise
    state_path.unlink(missing_ok=True)
    print(f"wrote {path}")
    return model


if __name__ == "__main__":
    run_command(train_model)

"""Train a ResNet-18 on CIFAR-100, or on another closed set, and write a checkpoint.

    python train.py                                   # CIFAR-100, 100 epochs, on the GPU if there is one
    python train.py --dataset digits --epochs 20      # a laptop, no download
    python train.py --resume                          # go on after an interruption

Prints one line per epoch and writes, by default for CIFAR-100 and in the working directory,
    cifar100_resnet18.pth           a plain state dict of torchvision's resnet18(num_classes=100)
    cifar100_resnet18.json          configuration, versions, device, and the figures of every epoch
    cifar100_resnet18.resume.pth    the state of an unfinished run
"""

import json
import math
import sys
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18
from tqdm import tqdm

from ood_data import DATA_ROOT, DATASET, EVAL_BATCH_SIZE, SEED, ImageLoader, normalise, read_closed_set
from ood_utils import (
    InputError,
    autocast,
    check_writable,
    checkpoint_path,
    describe,
    get_logits,
    get_ranks,
    join_ranks,
    load_state,
    on_rank_0,
    pick_device,
    run_command,
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
    images, labels, classes = on_rank_0(read_closed_set, dataset, data_root, train)
    batch_size = batch_size or (BATCH_SIZE if train else EVAL_BATCH_SIZE)
    ranks = get_ranks() if train else (0, 1)
    loader = ImageLoader(images, labels, batch_size, get_transform(train), seed if train else None, device, ranks)
    loader.classes = classes
    return loader


# ---------------------------------------------------------------------------------------------------------------------
# Network


class SmallMapConv(nn.Conv2d):
    """A convolution for maps so small that part of its kernel only ever meets padding: it keeps the live taps.

    On 32x32 images torchvision's layer4 sees maps of 2x2, then 1x1: of its 3x3 taps only the lower-right 2x2, then the
    centre one, touch the output or get a gradient. The state dict has the full kernel, the dead taps zero.
    """

    def __init__(self, conv, size):
        kernel, stride, padding = conv.kernel_size[0], conv.stride[0], conv.padding[0]
        starts = range(-padding, size + padding - kernel + 1, stride)  # where the kernel begins for each output
        live = [tap for tap in range(kernel) if any(0 <= start + tap < size for start in starts)]
        padding = max(0, padding - live[0])
        super().__init__(conv.in_channels, conv.out_channels, len(live), stride, padding, bias=False)
        self.size, self.full_size, self.taps = size, kernel, range(live[0], live[-1] + 1)
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

    def forward(self, maps):
        if maps.shape[-2:] != (self.size, self.size):
            raise ValueError(
                f"this network is built for 32x32 images: a map is {tuple(maps.shape)}, not {self.size} wide"
            )
        if not maps.is_cpu:
            return super().forward(maps)
        # On a CPU a convolution of so small a map is faster as one matrix product, the whole map -> all outputs: each
        # output meets the map through as many taps as the map has pixels, which begin at the output's own start.
        starts = (1, 0) if self.kernel_size == (3, 3) else (0,)  # rows, or columns, of the outputs
        taps = self.weight.to(maps.dtype).permute(0, 2, 3, 1)  # (C_out, k, k, C_in)
        taps = torch.stack([taps[:, y : y + self.size, x : x + self.size] for y in starts for x in starts])
        outputs = F.linear(maps.permute(0, 2, 3, 1).flatten(1), taps.flatten(0, 1).flatten(1))
        return outputs.unflatten(1, (len(starts), len(starts), -1)).permute(0, 3, 1, 2)


def shrink_convolutions(model):
    """Replace, in place, each 3x3 convolution that 32x32 images reach as a map of 2x2 or 1x1 by a SmallMapConv."""
    convs = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)}
    sizes = {}
    hooks = [
        m.register_forward_pre_hook(lambda m, inputs: sizes.update({m: inputs[0].shape[-1]})) for m in convs.values()
    ]
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    for name, conv in convs.items():
        if sizes[conv] <= 2:
            model.set_submodule(name, SmallMapConv(conv, sizes[conv]))
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
    model.relu, model.maxpool = model.maxpool, model.relu  # the same result, with a quarter of the values to rectify
    shrink_convolutions(model)
    return model.to(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------------------------------
# Training


def build_optimizer(model, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY):
    return torch.optim.SGD(model.parameters(), lr, momentum, weight_decay=weight_decay, fused=True)


def train_step(model, optimizer, images, labels, weight=1.0):
    """One SGD step on float32 images (N, 3, 32, 32) and labels (N,); return weight x mean loss, still on the device.

    weight: this process's share of the images of the step times the number of processes, whose gradients are averaged.
    """
    with autocast(images.device):
        loss = F.cross_entropy(model(images), labels) * weight
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def train_epoch(network, optimizer, loader, title):
    """One pass over the loader; return the mean loss of every step over all processes, float32 (steps,) on the CPU."""
    losses = []
    for images, labels in tqdm(loader, title, leave=False, disable=True if loader.rank else None):
        batch_size = min(loader.batch_size, len(loader.images) - len(losses) * loader.batch_size)
        losses.append(train_step(network, optimizer, images, labels, loader.ranks * len(labels) / batch_size))
    losses = torch.stack(losses)  # read once per epoch: reading each would make the device wait
    if loader.ranks > 1:
        dist.all_reduce(losses)
    return losses.cpu() / loader.ranks


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
    device, note = pick_device(device)
    device = join_ranks(device)
    rank, ranks = get_ranks()
    say = print if rank == 0 else lambda line, file=None: None
    say(note)
    for file in (path, state_path, log_path):
        on_rank_0(check_writable, file)
    train_loader = get_loader(True, dataset, data_root, batch_size, seed, device)
    test_loader = get_loader(False, dataset, data_root, device=device)
    count = config["images"] = len(train_loader.images)
    if (least := (count % batch_size or batch_size) // ranks) < 2:
        parts = f"{count} images in batches of {batch_size}" + (f" over {ranks} processes" if ranks > 1 else "")
        raise InputError(f"{parts} leave a batch of {least}, too few for batch norm: change --batch-size.")

    torch.manual_seed(seed)
    model = build_network(len(train_loader.classes), stem).to(device)
    optimizer = build_optimizer(model, lr, momentum, weight_decay)
    history, found = [], on_rank_0(state_path.exists)
    if resume and found:
        history = load_state(state_path, config, model, optimizer)
        say(f"resuming after epoch {len(history)} of {epochs}")
    elif resume:
        say(f"no unfinished run at {state_path}: starting")
    elif found:
        say(f"starting over: the first save replaces {state_path}, which --resume would continue")
    network = nn.parallel.DistributedDataParallel(model) if ranks > 1 else model

    saved, saved_time = len(history), time.monotonic()
    try:
        for epoch in range(len(history), epochs):
            start = time.perf_counter()
            # epoch / epochs is rounded as the literal 0.75 is, so that no milestone comes an epoch late
            epoch_lr = lr * gamma ** sum(epoch / epochs >= milestone for milestone in milestones)
            for group in optimizer.param_groups:
                group["lr"] = epoch_lr
            train_loader.epoch = epoch
            losses = train_epoch(network, optimizer, train_loader, f"epoch {epoch + 1}/{epochs}")
            where = f"lr {epoch_lr:g}; epoch {saved} is kept: lower --lr"
            if bad := (~losses.isfinite()).nonzero().flatten().tolist():
                raise FloatingPointError(
                    f"The loss is {losses[bad[0]]} at epoch {epoch + 1}, step {bad[0] + 1}, {where}."
                )
            train_seconds = time.perf_counter() - start
            if rank > 0:
                continue
            logits, labels = get_logits(model, test_loader)
            if not logits.isfinite().all():
                raise FloatingPointError(f"Logits are not finite after epoch {epoch + 1}, step {len(losses)}, {where}.")
            accuracy = (logits.argmax(1) == labels).double().mean().item()
            figures = dict(epoch=epoch + 1, loss=losses.mean().item(), test_accuracy=accuracy, lr=epoch_lr)
            history = [*history, figures | dict(seconds=time.perf_counter() - start)]
            say(
                f"epoch {epoch + 1:3d}/{epochs}  loss {figures['loss']:.4f}  test accuracy {100 * accuracy:.2f}%  "
                f"lr {epoch_lr:g}  {history[-1]['seconds']:.1f} s  {count / train_seconds:.0f} images/s"
            )
            last = epoch + 1 == epochs
            if last or time.monotonic() - saved_time >= SAVE_SECONDS:
                write_file(path, model.state_dict())
                log = dict(config=config, **describe(device), epochs=history)
                write_file(log_path, json.dumps(log, indent=1).encode())
                if not last:
                    state = dict(config=config, history=history, model=model.state_dict())
                    write_file(state_path, state | dict(optimizer=optimizer.state_dict()))
                saved, saved_time = epoch + 1, time.monotonic()
    except KeyboardInterrupt:
        safe = f"epoch {saved} is safe on disk; --resume goes on from there" if saved else "no epoch was saved yet"
        say(f"\ninterrupted: {safe}", file=sys.stderr)
        raise
    if rank == 0:
        state_path.unlink(missing_ok=True)
    say(f"wrote {path}")
    if ranks > 1:
        dist.destroy_process_group()
    return model


if __name__ == "__main__":
    run_command(train_model)

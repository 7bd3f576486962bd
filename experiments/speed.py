"""Time the training step and the evaluation against the plain loop, alternating in one run.

    python experiments/speed.py --pairs 10    # CIFAR-100 if it is on disk, else random images

The plain loop is what such scripts usually are: PIL crop and flip in a DataLoader with 8 workers,
float32, the full resnet18, default SGD; evaluation by batches of 128, one blur a blob image.
Prints a Markdown table: medians over the pairs and their range; a ratio above 1 is a gain.
"""

import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import torch
from PIL import Image
from skimage.filters import gaussian as blur
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision import transforms
from torchvision.models import resnet18

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ood_data
import ood_utils
import train


@dataclass
class Config:
    """What is timed, and where."""

    pairs: int = 5  # how often each side is timed
    steps: int = 30  # training steps a time; on a GPU 390, an epoch
    device: str | None = None  # by default cuda, mps or cpu, whichever is there first
    data_root: str = ood_data.DATA_ROOT  # where CIFAR-100 may lie
    memory_of: Literal["", "plain", "project"] = ""  # run one side once: its memory is measured


class PlainImages(Dataset):
    """PIL images through torchvision's transforms, one by one."""

    def __init__(self, images, labels, augment):
        self.images = images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = labels
        crop = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
        normalise = transforms.Normalize(ood_data.MEAN, ood_data.STD)
        steps = [*(crop if augment else []), transforms.ToTensor(), normalise]
        self.transform = transforms.Compose(steps)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i])), self.labels[i]


class Plain:
    """The plain loop."""

    def __init__(self, images, labels, test_images, test_labels, device):
        self.device, self.count = device, len(test_labels)
        workers = {"num_workers": 8, "pin_memory": device.type == "cuda"}
        self.loader = DataLoader(PlainImages(images, labels, True), 128, shuffle=True, **workers)
        self.test_loader = DataLoader(PlainImages(test_images, test_labels, False), 128, **workers)
        self.model = resnet18(num_classes=100).to(device)
        parameters = self.model.parameters()
        self.optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=1e-4)

    def step(self, images, labels):
        images, labels = images.to(self.device), labels.to(self.device)
        loss = F.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        loss.item()

    @torch.no_grad()
    def scores(self, loader):
        batches = [F.softmax(self.model(images.to(self.device)), 1) for images, _ in loader]
        return torch.cat([batch.amax(1).cpu() for batch in batches])

    def evaluate(self):
        self.model.eval()
        closed = self.scores(self.test_loader)
        count = len(closed) // 5
        rng = np.random.default_rng(0)
        blobs = rng.binomial(1, 0.7, (count, 32, 32, 3)).astype(np.float32)
        for i in range(count):
            blobs[i] = blur(blobs[i], sigma=1.5, channel_axis=None, mode="nearest")
            blobs[i][blobs[i] < 0.75] = 0
        blobs = blobs.transpose(0, 3, 1, 2) * 2 - 1
        gaussian = rng.normal(0, 0.5, (count, 3, 32, 32)).clip(-1, 1).astype(np.float32)
        for noise in (gaussian, blobs):
            noise = TensorDataset(torch.from_numpy(noise), torch.zeros(count))
            scores = self.scores(DataLoader(noise, 128, num_workers=8))
            ood_utils.get_performance(closed, scores)
        self.model.train()


class Project:
    """train.py's loader and step, test.py's path."""

    def __init__(self, images, labels, test_images, test_labels, device):
        self.device, self.count = device, len(test_labels)
        augment = {"augment": train.crop_and_flip, "shuffle": True}
        self.loader = ood_data.ImageLoader(images, labels, (), 128, device, **augment)
        self.test_loader = ood_data.ImageLoader(test_images, test_labels, device=device)
        layout = ood_data.memory_format(device)
        self.model = train.build_network(100).to(device, memory_format=layout)
        self.optimizer = train.build_optimizer(self.model, train.Config())
        self.precision = train.pick_precision("auto", device)

    def step(self, images, labels):
        train.train_step(self.model, self.optimizer, images, labels, self.precision)

    def evaluate(self):
        closed = ood_utils.get_ood_scores(self.model, self.test_loader)
        for name in ("gaussian", "blob"):
            loader = ood_data.build_ood_loader(name, len(closed) // 5, device=self.device)
            scores = ood_utils.get_ood_scores(self.model, loader)
            ood_utils.get_performance(closed, scores)


SIDES = {"plain": Plain, "project": Project}


def now(device):
    """Seconds, when the device has done its work."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


def time_training(side, steps):
    """Images/s over so many steps, after two that start workers and choose kernels."""
    batches = iter(side.loader)
    for _ in range(2):
        side.step(*next(batches))
    start = now(side.device)
    for _ in range(min(steps, len(side.loader) - 2)):
        side.step(*next(batches))
    return 128 * min(steps, len(side.loader) - 2) / (now(side.device) - start)


def time_parts(side, steps=20):
    """Milliseconds a step of the four parts, each waited for, so that they add up to more."""
    seconds, last = np.zeros(4), 0.0
    marks = []

    def mark(*_):
        marks.append(now(side.device))

    hooks = [
        side.model.register_forward_hook(mark),
        side.optimizer.register_step_pre_hook(mark),
        side.optimizer.register_step_post_hook(mark),
    ]
    batches = iter(side.loader)
    for step in range(2 + steps):
        last = now(side.device)
        batch = next(batches)
        marks[:] = [now(side.device)]
        side.step(*batch)
        if step >= 2:
            seconds += np.diff([last, *marks])
    for hook in hooks:
        hook.remove()
    return 1000 * seconds / steps


def time_evaluation(side):
    """Images/s of one evaluation: the closed set, and a fifth as many of two noises."""
    count = side.count
    start = now(side.device)
    side.evaluate()
    return (count + 2 * (count // 5)) / (now(side.device) - start)


def peak_memory(name, config):
    """Peak MB of a process that trains and evaluates, with its workers."""
    command = [sys.executable, __file__, "--memory-of", name, "--data-root", config.data_root]
    command += ["--device", config.device] if config.device else []
    process = psutil.Popen(command)
    peak = 0
    while process.poll() is None:
        try:
            infos = [p.memory_full_info() for p in (process, *process.children(recursive=True))]
            # Linux counts shared pages once in pss; elsewhere uss leaves them out.
            peak = max(peak, sum(getattr(info, "pss", info.uss) for info in infos))
        except psutil.Error:
            pass
        time.sleep(0.2)
    if process.returncode:
        raise ood_utils.InputError(f"the process that measures {name} ended with an error")
    return peak / 2**20


def read_data(config):
    """Training and test images and labels, and what they are."""
    if (Path(config.data_root).expanduser() / "cifar-100-python").exists():
        data = []
        for is_train in (True, False):
            images, labels, _ = ood_data.read_closed_set("cifar100", config.data_root, is_train)
            data += [images, torch.as_tensor(labels)]
        return data, "CIFAR-100"
    rng = torch.Generator().manual_seed(0)
    data = []
    for count in (50_000, 10_000):
        shape = (count, 3, 32, 32)
        data += [torch.randint(0, 256, shape, dtype=torch.uint8, generator=rng)]
        data += [torch.arange(count) % 100]
    return data, "random images of CIFAR-100's shape"


def spread(values, digits=0):
    low, middle, high = np.quantile(values, [0, 0.5, 1])
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def measure(config):
    """Print the table."""
    warnings.filterwarnings("ignore", module="torch.utils.data")  # more workers than cores
    device = ood_utils.pick_device(config.device)
    data, source = read_data(config)
    if config.memory_of:
        side = SIDES[config.memory_of](*data, device)
        time_training(side, 20)
        return time_evaluation(side)
    memory = [peak_memory(name, config) for name in SIDES]
    sides = {name: side(*data, device) for name, side in SIDES.items()}
    steps = 390 if device.type in ("cuda", "mps") else config.steps
    training, evaluation = {name: [] for name in sides}, {name: [] for name in sides}
    for pair in range(config.pairs):
        for name, side in sides.items():
            training[name].append(time_training(side, steps))
            evaluation[name].append(time_evaluation(side))
        print(f"pair {pair + 1} done", file=sys.stderr)
    parts = [time_parts(side) for side in sides.values()]

    about = ood_utils.describe(device)
    versions = f"torch {torch.__version__}, {config.pairs} pairs"
    print(f"{source}; {about['device']}, {sides['project'].precision}; {versions}\n")
    print("| | plain loop | this repository | ratio |\n|---|---|---|---|")
    for title, rates in (("training", training), ("evaluation", evaluation)):
        ratios = [b / a for a, b in zip(rates["plain"], rates["project"], strict=True)]
        cells = [spread(rates["plain"]), spread(rates["project"]), spread(ratios, 2)]
        print(f"| {title}, images/s | {' | '.join(cells)} |")
    names = ("load and augment", "forward", "backward", "optimiser")
    for name, a, b in zip(names, *parts, strict=True):
        print(f"| {name}, ms/step | {a:.1f} | {b:.1f} | {a / b:.2f} |")
    print(f"| peak memory, MB | {memory[0]:.0f} | {memory[1]:.0f} | {memory[0] / memory[1]:.2f} |")


if __name__ == "__main__":
    ood_utils.run_command(measure, Config)

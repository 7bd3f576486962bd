"""Time training and scoring against the plain loop, alternating in one run.

    python experiments/speed.py --rounds 10

The plain loop is what most such scripts have: PIL crop and flip in a DataLoader with 8 workers,
float32, torchvision's resnet18, default SGD; scoring in batches of 128. Images are random. Prints a
Markdown table: the median over the rounds and their range; a ratio above 1 is a gain.
"""

import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.models import resnet18

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ood_data
import ood_utils
import train


@dataclass
class Config:
    rounds: int = 5  # how often each side is timed
    steps: int = 30  # training steps each time; on a GPU take 390, an epoch
    device: str | None = None  # by default the first available of cuda, mps and cpu


class PlainImages(Dataset):
    """PIL images through torchvision's transforms, one by one."""

    def __init__(self, images, labels, augmentation=()):
        self.images = images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = labels
        normalise = transforms.Normalize(ood_data.MEAN, ood_data.STD)
        self.transform = transforms.Compose([*augmentation, transforms.ToTensor(), normalise])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i])), self.labels[i]


class Plain:
    def __init__(self, training, test, device):
        self.device = device
        workers = {"num_workers": 8, "pin_memory": device.type == "cuda"}
        crop_and_flip = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
        images = PlainImages(*training, crop_and_flip)
        self.loader = DataLoader(images, 128, shuffle=True, persistent_workers=True, **workers)
        self.test_loader = DataLoader(PlainImages(*test), 128, **workers)
        self.model = resnet18(num_classes=100).to(device)
        settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
        self.optimizer = torch.optim.SGD(self.model.parameters(), **settings)

    def train(self):
        for images, labels in self.loader:
            loss = F.cross_entropy(self.model(images.to(self.device)), labels.to(self.device))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            loss.item()

    @torch.no_grad()
    def score(self):
        self.model.eval()
        logits = [self.model(images.to(self.device)).cpu() for images, _ in self.test_loader]
        self.model.train()
        return torch.cat(logits).softmax(1).amax(1)


class Ours:
    def __init__(self, training, test, device, model, precision):
        self.config = train.Config(precision=precision)
        transform = train.get_transform(train=True)
        self.loader = ood_data.ImageLoader(*training, (), 128, device, transform, shuffle=True)
        self.test_loader = ood_data.ImageLoader(*test, device=device)
        self.model = model.to(device, memory_format=ood_data.memory_format(device))
        self.optimizer = train.build_optimizer(self.model, self.config)

    def train(self):
        train.train_epoch(self.model, self.optimizer, self.loader, self.config)

    def score(self):
        return ood_utils.get_ood_scores(self.model, self.test_loader)


def now(device):
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def get_rate(run, count, device):
    """Images/s of a function that takes `count` images through the network."""
    start = now(device)
    run()
    return count / (now(device) - start)


def spread(values, form):
    low, middle, high = (format(value, form) for value in np.quantile(values, [0, 0.5, 1]))
    return f"{middle} ({low} to {high})"


def compare(config):
    warnings.filterwarnings("ignore", module="torch.utils.data")  # more workers than cores
    device = ood_utils.pick_device(config.device)
    images = torch.randint(0, 256, (10_000, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(10_000) % 100
    chosen = torch.arange(128 * config.steps) % 10_000
    data = (images[chosen], labels[chosen]), (images, labels), device
    plain, ours = Plain(*data), Ours(*data, train.build_network(), "float32")
    training = {
        "plain loop, float32": plain,
        "ours, float32, torchvision's network": Ours(*data, resnet18(num_classes=100), "float32"),
        "ours, float32": ours,
    }
    if train.native_precision(device) == "bfloat16":
        training["ours, bfloat16"] = Ours(*data, train.build_network(), "bfloat16")
    for side in training.values():
        side.train()  # starts workers, chooses kernels
    rates = {}
    for _ in range(config.rounds):
        for name, side in training.items():
            rate = get_rate(side.train, len(chosen), device)
            rates.setdefault(f"training: {name}", []).append(rate)
        for name, side in (("plain loop, float32", plain), ("ours, float32", ours)):
            rate = get_rate(side.score, len(images), device)
            rates.setdefault(f"scoring: {name}", []).append(rate)
    print(f"{ood_utils.describe(device)['device']}, torch {torch.__version__}\n")
    print("| | images/s | ratio to the plain loop |\n|---|---|---|")
    for name, values in rates.items():
        what, _ = name.split(":")
        ratios = np.divide(values, rates[f"{what}: plain loop, float32"])
        print(f"| {name} | {spread(values, '.0f')} | {spread(ratios, '.2f')} |")


if __name__ == "__main__":
    ood_utils.run_command(compare, Config)

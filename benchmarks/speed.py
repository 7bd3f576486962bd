"""Time the project's training step and evaluation against the plain loop, in one run, alternating A B A B.

    python benchmarks/speed.py                # CIFAR-100 if it is on disk, else random images of its shape

The plain loop is what such scripts usually are: PIL crop and flip in a DataLoader with 8 workers, float32, the full
resnet18, default SGD; for evaluation, batches of 128 and one blur per blob image. The project's side is imported from
the scripts. Prints a Markdown table: medians over the pairs and, in brackets, their range; a ratio above 1 is a gain.
"""

import contextlib
import platform
import subprocess
import sys
import time
import warnings
from pathlib import Path

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
import train
from ood_data import DATA_ROOT, EVAL_BATCH_SIZE, MEAN, STD, ImageLoader, build_ood_loader, read_closed_set
from ood_utils import InputError, get_ood_scores, get_performance, pick_device, run_command

BATCH_SIZE = train.BATCH_SIZE
WORKERS = 8


class PlainImages(Dataset):
    """PIL images through torchvision transforms, one by one."""

    def __init__(self, images, labels, augment):
        self.images = images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = labels
        crop_and_flip = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()] if augment else []
        self.transform = transforms.Compose([*crop_and_flip, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i])), self.labels[i]


class Laps:
    """laps(part) adds the time since the last call to laps.seconds[part]; with the device's work done."""

    def __init__(self, device):
        self.device = device
        self.start()

    def start(self):
        self.seconds = {}
        self.last = self.now()

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __call__(self, part):
        now = self.now()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.last
        self.last = now


class Plain:
    """The plain loop on the same images."""

    def __init__(self, data, device):
        (images, labels), (test_images, test_labels) = data
        self.device = device
        self.loader = DataLoader(
            PlainImages(images, labels, augment=True), BATCH_SIZE, shuffle=True, num_workers=WORKERS, pin_memory=True
        )
        self.test_loader = DataLoader(
            PlainImages(test_images, test_labels, augment=False), BATCH_SIZE, num_workers=WORKERS, pin_memory=True
        )
        self.model = resnet18(num_classes=100).to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)

    def step(self, images, labels, lap):
        images, labels = images.to(self.device), labels.to(self.device)
        loss = F.cross_entropy(self.model(images), labels)
        lap("forward")
        self.optimizer.zero_grad()
        loss.backward()
        lap("backward")
        self.optimizer.step()
        loss.item()
        lap("optimiser")

    @torch.no_grad()
    def scores(self, loader):
        return np.concatenate([F.softmax(self.model(images.to(self.device)), 1).amax(1).cpu() for images, _ in loader])

    def evaluate(self, lap):
        self.model.eval()
        closed = self.scores(self.test_loader)
        lap("score")
        rng = np.random.default_rng(0)
        count = len(closed) // 5
        blobs = rng.binomial(1, 0.7, (count, 32, 32, 3)).astype(np.float32)
        for i in range(count):
            blobs[i] = blur(blobs[i], sigma=1.5, channel_axis=None, mode="nearest")
            blobs[i][blobs[i] < 0.75] = 0
        blobs = blobs.transpose(0, 3, 1, 2) * 2 - 1
        gaussian = rng.normal(0, 0.5, (count, 3, 32, 32)).clip(-1, 1).astype(np.float32)
        lap("build noise")
        for noise in (gaussian, blobs):
            loader = DataLoader(
                TensorDataset(torch.from_numpy(noise), torch.zeros(count)), BATCH_SIZE, num_workers=WORKERS
            )
            scores = self.scores(loader)
            lap("score")
            get_performance(closed, scores)
            lap("metrics")
        self.model.train()
        return count * 7


class Project:
    """train.py's loader and step, test.py's path."""

    def __init__(self, data, device):
        (images, labels), (test_images, test_labels) = data
        self.device = device
        self.loader = ImageLoader(images, labels, BATCH_SIZE, train.get_transform(), 0, device)
        normalise = train.get_transform(train=False)
        self.test_loader = ImageLoader(test_images, test_labels, EVAL_BATCH_SIZE, normalise, device=device)
        self.model = train.build_network(100).to(device)
        self.optimizer = train.build_optimizer(self.model)

    def step(self, images, labels, lap):
        """train_step whole, timed in its parts by hooks on the loss and on the optimiser."""
        marks = [self.model.register_forward_hook(lambda *_: lap("forward"))]
        marks.append(self.optimizer.register_step_pre_hook(lambda *_: lap("backward")))
        train.train_step(self.model, self.optimizer, images, labels)
        lap("optimiser")
        for mark in marks:
            mark.remove()

    def evaluate(self, lap):
        count = len(self.test_loader.images) // 5
        closed = get_ood_scores(self.model, self.test_loader)
        lap("score")
        for name in ("gaussian", "blob"):
            loader = build_ood_loader(name, count, device=self.device)
            lap("build noise")
            scores = get_ood_scores(self.model, loader)
            lap("score")
            get_performance(closed, scores)
            lap("metrics")
        return count * 7


def time_training(side, steps):
    """Images/s over so many steps (None: the rest of an epoch), and milliseconds a step in each of its parts."""
    warm_up = 2  # workers start, kernels are chosen
    steps = steps or len(side.loader) - warm_up
    laps, batches, images_seen = Laps(side.device), iter(side.loader), 0
    for step in range(warm_up + steps):
        if step == warm_up:
            images_seen = 0
            laps.start()
        images, labels = next(batches)
        laps("load and augment")
        side.step(images, labels, laps)
        images_seen += len(labels)
    return images_seen / sum(laps.seconds.values()), {part: 1000 * s / steps for part, s in laps.seconds.items()}


def time_evaluation(side):
    """Images/s of the closed set and two noises, and the milliseconds of each part of one evaluation."""
    laps = Laps(side.device)
    images = side.evaluate(laps)
    return images / sum(laps.seconds.values()), {part: 1000 * s for part, s in laps.seconds.items()}


def peak_memory(side):
    """Peak memory in MB of a process that trains 20 steps and evaluates, with its workers; shared pages count once."""
    code = f"from speed import *; side = {side}(random_images(), pick_device()[0]); time_training(side, 20)"
    code += "; time_evaluation(side)"
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], cwd=Path(__file__).resolve().parent)
    peak = 0
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            root = psutil.Process(process.pid)
            members = (root, *root.children(recursive=True))
            peak = max(peak, sum(member.memory_full_info().pss for member in members))
        time.sleep(0.2)
    if process.returncode:
        raise InputError(f"the process that measures the memory of {side} ended with status {process.returncode}")
    return peak / 2**20


def random_images():
    """Training and test images and labels, as many as CIFAR-100's."""
    rng = torch.Generator().manual_seed(0)
    return [
        (torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=rng), torch.arange(count) % 100)
        for count in (50_000, 10_000)
    ]


def spread(values, digits=0):
    low, middle, high = np.quantile(values, [0, 0.5, 1])
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def measure(pairs: int = 5, steps: int = 30, device: str | None = None, data_root: str = DATA_ROOT):
    """Print the table.

    Args:
        pairs: How often each side is timed.
        steps: Training steps a time; on CUDA whole epochs.
        device: cuda, mps or cpu.
        data_root: Where CIFAR-100 may lie.
    """
    warnings.filterwarnings("ignore", module="torch.utils.data")  # more workers than cores: as such scripts have
    device, _ = pick_device(device)
    source = "random images of CIFAR-100's shape"
    data = random_images()
    if (Path(data_root).expanduser() / "cifar-100-python").exists():
        with contextlib.suppress(InputError):  # damaged: random images do
            data = [read_closed_set("cifar100", data_root, train=part)[:2] for part in (True, False)]
            data = [(images, torch.as_tensor(labels)) for images, labels in data]
            source = "CIFAR-100"
    memory = [peak_memory(side) for side in ("Plain", "Project")]
    sides = {"plain": Plain(data, device), "project": Project(data, device)}
    training = {name: [] for name in sides}
    evaluation = {name: [] for name in sides}
    for pair in range(pairs + (device.type == "cuda")):
        for name, side in sides.items():
            training[name].append(time_training(side, None if device.type == "cuda" else steps))
            evaluation[name].append(time_evaluation(side))
        print(f"pair {pair + 1} done", file=sys.stderr)
    if device.type == "cuda":  # the first epoch chooses kernels
        training, evaluation = ({name: runs[1:] for name, runs in each.items()} for each in (training, evaluation))

    dtype = "float32" if isinstance(train.autocast(device), contextlib.nullcontext) else "bfloat16"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    print(f"{source}; {name}, {torch.get_num_threads()} threads, {dtype}; torch {torch.__version__}, {pairs} pairs\n")
    print("| | plain loop | this repository | ratio |\n|---|---|---|---|")
    print_rates("training", "ms/step", training["plain"], training["project"])
    print_rates("evaluation", "ms", evaluation["plain"], evaluation["project"])
    print(f"| peak memory of the process tree, MB | {memory[0]:.0f} | {memory[1]:.0f} | {memory[0] / memory[1]:.2f} |")


def print_rates(title, unit, plain, project):
    """Rows of images/s, with the ratio's spread over the pairs, and of each part's median time."""
    rates = [run[0] for run in plain], [run[0] for run in project]
    ratios = [b / a for a, b in zip(*rates, strict=True)]
    print(f"| {title}, images/s | {spread(rates[0])} | {spread(rates[1])} | {spread(ratios, 2)} |")
    for part in plain[0][1]:
        a, b = (np.median([run[1][part] for run in runs]) for runs in (plain, project))
        print(f"| {part}, {unit} | {a:.1f} | {b:.1f} | {a / b:.2f} |")


def processor():
    """The processor's name, where Linux tells it."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return platform.machine()


if __name__ == "__main__":
    run_command(measure)

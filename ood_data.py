"""Every image set of the experiment: the closed sets to train and test on, and the OOD sets to tell from them.

Image sets are uint8 tensors (N, 3, 32, 32), normalised batch by batch. The noises are float32 tensors of the same
shape that go into the network as they are: they live in its input space, where -1 is about pixel 70 and +1 about
pixel 172 (Hendrycks et al., https://github.com/hendrycks/outlier-exposure).

To add an OOD set, add a line to NOISES or OOD_IMAGES. `build_ood_loader` yields the batches of any of them:

    from ood_data import build_ood_loader
    images, labels = next(iter(build_ood_loader("blob", 2000, batch_size=1000)))
"""

import contextlib
import functools
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torch.nn import functional as F
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import check_integrity
from tqdm import tqdm

from ood_utils import InputError

# Shared by train.py and test.py: an edit here reaches both.
DATASET = "cifar100"  # cifar100, cifar10, digits (needs no download), or a folder with train/<class>/ and test/<class>/
DATA_ROOT = "~/data"
SEED = 0
EVAL_BATCH_SIZE = 1000  # only speed and memory depend on it

# CIFAR-10's statistics. CIFAR-100's own are (0.5071, 0.4867, 0.4408) and (0.2675, 0.2565, 0.2761), but the published
# figures, like much of the OOD literature, used these; the noises are defined in the space they span.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2023, 0.1994, 0.2010)

# name: torchvision's class, its folder under the data root, what unpacking leaves there, where it comes from
DOWNLOADS = {
    "cifar10": (datasets.CIFAR10, "", "cifar-10-batches-py", "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"),
    "cifar100": (datasets.CIFAR100, "", "cifar-100-python", "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"),
    "svhn": (datasets.SVHN, "svhn", "test_32x32.mat", "http://ufldl.stanford.edu/housenumbers/test_32x32.mat"),
    "textures": (datasets.DTD, "", "dtd/dtd", "https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz"),
    "mnist": (datasets.MNIST, "", "MNIST/raw/t10k-images-idx3-ubyte", "https://ossci-datasets.s3.amazonaws.com/mnist/"),
}
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")  # the colour photographs of everyday scenes in scikit-image


# ---------------------------------------------------------------------------------------------------------------------
# Batches


@functools.cache  # a copy to the device for every batch would make a GPU wait
def statistics(device):
    """MEAN and STD as float32 (3, 1, 1) on the device."""
    return tuple(torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))


def normalise(images):
    """uint8 (N, 3, H, W) -> float32 (N, 3, H, W): to [0, 1], minus MEAN, over STD, bit for bit as torchvision."""
    mean, std = statistics(images.device)
    return images.float().div_(255).sub_(mean).div_(std)


class ImageLoader:
    """Batches (images, labels) of a set that lies on the device as a whole: no worker processes, no decoding.

    images: uint8 or float32 (N, 3, H, W); labels: int64 (N,); transform: called on each batch of images (None: as they
    are). With `train_seed` the order is shuffled and transform gets float32 draws (B, 3) from [0, 1) as its second
    argument; both are functions of (train_seed, epoch) alone. `epoch` counts up by itself and may be set. With `ranks`,
    (rank, number of processes), the batches are this process's share of each.
    """

    def __init__(self, images, labels, batch_size, transform=None, train_seed=None, device="cpu", ranks=(0, 1)):
        self.images = images.to(device, memory_format=torch.channels_last)
        self.labels = torch.as_tensor(labels, dtype=torch.int64, device=device)
        self.batch_size = batch_size
        self.transform = transform
        self.train_seed = train_seed
        self.rank, self.ranks = ranks
        self.epoch = 0

    def __len__(self):
        return -(-len(self.images) // self.batch_size)

    def __iter__(self):
        count, device = len(self.images), self.images.device
        if self.train_seed is not None:
            rng = np.random.default_rng((self.train_seed, self.epoch))
            order = torch.from_numpy(rng.permutation(count)).to(device)
            draws = torch.from_numpy(rng.random((count, 3), dtype=np.float32)).to(device)
            self.epoch += 1
        for start in range(0, count, self.batch_size):
            batch = slice(start + self.rank, min(start + self.batch_size, count), self.ranks)
            if self.train_seed is not None:
                yield self.transform(self.images[order[batch]], draws[batch]), self.labels[order[batch]]
            else:
                images = self.images[batch]
                yield self.transform(images) if self.transform else images, self.labels[batch]


# ---------------------------------------------------------------------------------------------------------------------
# Reading images


def fetch(name, data_root, **split):
    """torchvision's data set `name`, downloaded when it is absent.

    Raises FileNotFoundError when it is neither on disk nor to be had, InputError when what is on disk is damaged.
    """
    kind, folder, local, url = DOWNLOADS[name]
    root = Path(data_root).expanduser() / folder
    if (root / local).exists():
        try:
            return kind(root, download=False, **split)
        except Exception as error:
            sums = getattr(kind, "train_list", []) + getattr(kind, "test_list", [])  # CIFAR: (file, md5)
            bad = [root / local / file for file, md5 in sums if not check_integrity(root / local / file, md5)]
            raise InputError(
                f"{(bad or [root / local])[0]} is damaged or missing: "
                f"remove {root / local} and run again to download {name} anew."
            ) from error
    try:
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for results
            return kind(root, download=True, **split)
    except Exception as error:
        raise FileNotFoundError(
            f"{name} is not at {root / local} and could not be downloaded ({error}). "
            f"Get {url} on a machine that can and put it into {(root / local).parent}."
        ) from error


def read_cifar(name, data_root, train):
    """uint8 images (N, 3, 32, 32), labels, class names of CIFAR-10 or CIFAR-100."""
    data = fetch(name, data_root, train=train)
    return torch.from_numpy(data.data).permute(0, 3, 1, 2), data.targets, data.classes


def grey_to_rgb(images):
    """uint8 (N, H, W) -> uint8 (N, 3, 32, 32)."""
    images = F.interpolate(images[:, None].float(), size=32, mode="bilinear", antialias=True)
    return images.round().to(torch.uint8).expand(-1, 3, -1, -1)


def read_digits(train):
    """scikit-learn's 1,797 handwritten digits, 8x8 with values 0 to 16, in a stratified 80/20 split that is fixed."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    halves = train_test_split(digits.images, digits.target, test_size=0.2, stratify=digits.target, random_state=0)
    images, labels = halves[::2] if train else halves[1::2]
    images = torch.from_numpy(images / 16 * 255).round().to(torch.uint8)
    return grey_to_rgb(images), labels, [str(digit) for digit in range(10)]


def fit(image):
    """uint8 (3, 32, 32) of a PIL image of any size: shorter side to 32, centre crop."""
    return TF.pil_to_tensor(TF.center_crop(TF.resize(image.convert("RGB"), 32), 32))


def decode(path):
    """uint8 (3, 32, 32) of an image file."""
    try:
        with Image.open(path) as image:
            return fit(image)
    except Exception as error:
        raise InputError(f"{path} is not a readable image ({error}). Remove or replace it.") from error


def decode_all(paths, name):
    """uint8 (N, 3, 32, 32) of N image files."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            images = pool.map(decode, paths)
            return torch.stack(list(tqdm(images, name, len(paths), delay=1, leave=False, disable=None)))
        except InputError:
            pool.shutdown(cancel_futures=True)
            raise


def read_class_folder(folder, train):
    """The closed set in folder/train/<class>/* and folder/test/<class>/*."""
    folder = Path(folder).expanduser()
    for split in ("train", "test"):
        if not (folder / split).is_dir():
            raise FileNotFoundError(
                f"{folder} has no folder {split}/: a data set needs train/<class>/ and test/<class>/."
            )
    splits = [datasets.ImageFolder(folder / split) for split in ("train", "test")]
    if odd := sorted(set(splits[0].classes) ^ set(splits[1].classes)):
        raise InputError(f"{folder}/train and {folder}/test must hold the same classes; only one has {', '.join(odd)}.")
    split = splits[0 if train else 1]
    paths, labels = zip(*split.samples, strict=True)
    return decode_all(paths, str(folder)), labels, split.classes


def read_closed_set(dataset=DATASET, data_root=DATA_ROOT, train=True):
    """Return images uint8 (N, 3, 32, 32), labels (N,), class names. Raises InputError or FileNotFoundError."""
    if dataset in ("cifar10", "cifar100"):
        try:
            return read_cifar(dataset, data_root, train)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error} `--dataset digits` needs no download.") from error
    if dataset == "digits":
        return read_digits(train)
    if Path(dataset).expanduser().is_dir():
        return read_class_folder(dataset, train)
    raise InputError(f"Unknown dataset {dataset!r}: use cifar100, cifar10, digits or the path of a folder.")


# ---------------------------------------------------------------------------------------------------------------------
# OOD sets


def gaussian(rng, count):
    """Normal noise with mean 0 and standard deviation 0.5, clipped to [-1, 1]."""
    return rng.normal(0, 0.5, (count, 3, 32, 32)).clip(-1, 1)


def rademacher(rng, count):
    """-1 or 1, each with p = 0.5."""
    return rng.integers(0, 2, (count, 3, 32, 32)) * 2 - 1


def blob(rng, count):
    """Bernoulli(0.7) values blurred with sigma 1.5 over rows, columns and channels; below 0.75 becomes 0; x * 2 - 1."""
    from skimage.filters import gaussian as blur

    values = rng.binomial(1, 0.7, (count, 32, 32, 3)).astype(np.float32)
    # Sigma 0 along the first axis blurs each image by itself: the bits of one call per image, in one call.
    values = blur(values, sigma=(0, 1.5, 1.5, 1.5), mode="nearest", channel_axis=None)
    return np.where(values < 0.75, 0, values).transpose(0, 3, 1, 2) * 2 - 1


def fixed_order(count):
    """A permutation of range(count) that is always the same: the first images of a sorted folder share a class."""
    return np.random.default_rng(0).permutation(count)


def photos(count):
    """Distinct 32x32 crops, 16 pixels apart, of the colour photographs that scikit-image brings along."""
    import skimage.data

    pictures = [torch.from_numpy(getattr(skimage.data, name)()) for name in PHOTOS]
    crops = [picture.unfold(0, 32, 16).unfold(1, 32, 16).flatten(0, 1) for picture in pictures]  # (N, 3, 32, 32)
    crops = torch.cat(crops).unique(dim=0)
    return crops[fixed_order(len(crops))[:count]]


def image_files(folder):
    """All image files below a folder, sorted by path, then put into a fixed order."""
    files = sorted(path for path in Path(folder).expanduser().rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
    if not files:
        raise InputError(f"{folder} holds no image ({' '.join(IMG_EXTENSIONS)}).")
    return [files[i] for i in fixed_order(len(files))]


def textures(data_root, count):
    """The first images, in a fixed order, of the test split of DTD: 1,880 textures of 47 classes."""
    data = fetch("textures", data_root, split="test")
    return torch.stack([fit(data[i][0]) for i in fixed_order(len(data))[:count]])


# (rng, count) -> (count, 3, 32, 32) in the network's input space
NOISES = {"gaussian": gaussian, "rademacher": rademacher, "blob": blob}
# (data root, count) -> uint8 (count or fewer, 3, 32, 32), the first of the test split
OOD_IMAGES = {
    "svhn": lambda root, count: torch.from_numpy(fetch("svhn", root, split="test").data[:count]),
    "cifar10": lambda root, count: read_cifar("cifar10", root, train=False)[0][:count],
    "cifar100": lambda root, count: read_cifar("cifar100", root, train=False)[0][:count],
    "textures": textures,
    "mnist": lambda root, count: grey_to_rgb(fetch("mnist", root, train=False).data[:count]),
    "photos": lambda root, count: photos(count),
}


def check_ood_type(name, dataset=None):
    """Raise InputError unless `name` is a known OOD set, or a folder, and not the closed set."""
    if name in NOISES or name in OOD_IMAGES:
        overlap = name == dataset
    else:
        folder = Path(name).expanduser().resolve()
        if not folder.is_dir():
            known = ", ".join([*NOISES, *OOD_IMAGES])
            raise InputError(f"Unknown OOD type {name!r}: use {known} or the path of a folder of images.")
        closed = dataset and Path(dataset).expanduser().resolve()
        overlap = closed and closed.is_dir() and (closed in (folder, *folder.parents) or folder in closed.parents)
    if overlap:
        raise InputError(f"OOD type {name!r} is, or holds, the closed set itself: leave it out of --ood-types.")


def build_ood_loader(
    noise_type, ood_num_examples, batch_size=EVAL_BATCH_SIZE, seed=SEED, data_root=DATA_ROOT, device="cpu"
):
    """Return an ImageLoader over the first `ood_num_examples` images of an OOD set; fewer where the set is smaller.

    noise_type: a name in NOISES or OOD_IMAGES, or the path of a folder of images. Batches are images float32
    (B, 3, 32, 32) in the network's input space, and labels of -1, no closed-set class. A noise is a function of
    (seed, noise_type), whatever else is built. Raises InputError (a ValueError) for an unknown type, a count or batch
    size below 1, or damaged files, FileNotFoundError for a set that is neither on disk nor to be had.
    """
    if ood_num_examples < 1 or batch_size < 1:
        raise InputError(
            f"The number of images ({ood_num_examples}) and the batch size ({batch_size}) must be at least 1."
        )
    check_ood_type(noise_type)
    if noise_type in NOISES:
        rng = np.random.default_rng((seed, *noise_type.encode()))
        images = torch.from_numpy(NOISES[noise_type](rng, ood_num_examples).astype(np.float32))
    elif noise_type in OOD_IMAGES:
        images = OOD_IMAGES[noise_type](data_root, ood_num_examples)
    else:
        images = decode_all(image_files(noise_type)[:ood_num_examples], noise_type)
    transform = None if noise_type in NOISES else normalise
    return ImageLoader(images, torch.full((len(images),), -1), batch_size, transform, device=device)

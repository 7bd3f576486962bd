"""Every image set: closed sets to train and test on, OOD sets to detect.

The closed set is the in-distribution one, whose classes a network is trained on. Image sets are
uint8 (N, 3, 32, 32); the loader normalises them. Noises are float32 and enter the network as they
are: in its input space -1 is about pixel 70 and +1 about 172. outlier-exposure, whose idea they are
(github.com/hendrycks), normalises differently (57 and 185), so its noise sets differ from these.

To add an OOD set, write its function and a line in NOISES or OOD_IMAGES.
"""

import contextlib
import functools
import math
import os
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import Image, ImageOps
from torch.nn import functional as F
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm.contrib.concurrent import thread_map

from ood_utils import InputError, lock

DATA_ROOT = Path("~/data")  # where torchvision's data sets are, or are downloaded to
NOISE_SEED = 0
EVAL_BATCH_SIZE = 1000  # affects speed and memory only

# The published figures used these, and the noises are defined in the space they span. The
# mean is CIFAR-10's. The std is not: it is the mean over images of each image's own standard
# deviation, a slip of an early repository (kuangliu/pytorch-cifar#16) that spread. CIFAR-10's
# is (0.2470, 0.2435, 0.2616); CIFAR-100 has (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761).
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2023, 0.1994, 0.2010)


# Noises: (rng, count) -> (count, 3, 32, 32) in the network's input space ----------------
def gaussian(rng, count):
    """Normal noise with mean 0 and standard deviation 0.5, clipped to [-1, 1]."""
    return rng.normal(0, 0.5, (count, 3, 32, 32)).clip(-1, 1)


def rademacher(rng, count):
    """-1 or 1, each with p = 0.5."""
    return rng.integers(0, 2, (count, 3, 32, 32)) * 2 - 1


def blob(rng, count):
    """Bernoulli(0.7) values, blurred with sigma 1.5 over rows, columns and channels. Values below
    0.75 then become 0; x * 2 - 1."""
    from skimage.filters import gaussian as blur

    values = rng.binomial(1, 0.7, (count, 32, 32, 3)).astype(np.float32)
    # Sigma 0 along the first axis: one call gives the bits of a call for each image.
    values = blur(values, sigma=(0, 1.5, 1.5, 1.5), mode="nearest", channel_axis=None)
    values[values < 0.75] = 0
    return values.transpose(0, 3, 1, 2) * 2 - 1


NOISES = {"gaussian": gaussian, "rademacher": rademacher, "blob": blob}


# Closed sets: (data root, train) -> images uint8 (N, 3, 32, 32), labels, class names ----
def read_cifar(dataset, root, train):
    data = fetch(dataset, root, train=train)
    return torch.from_numpy(data.data).permute(0, 3, 1, 2), data.targets, data.classes


def read_digits(root, train):
    """scikit-learn's 1,797 digits of 8x8, in a fixed stratified 80/20 split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    images, labels = parts[0::2] if train else parts[1::2]
    images = torch.from_numpy(images / 16 * 255).round().to(torch.uint8)
    return grey_to_rgb(images.view(-1, 8, 8)), labels, list("0123456789")


CLOSED_SETS = {
    "cifar100": functools.partial(read_cifar, datasets.CIFAR100),
    "cifar10": functools.partial(read_cifar, datasets.CIFAR10),
    "digits": read_digits,
}
CLOSED_SET_NAMES = f"{', '.join(CLOSED_SETS)}, or a folder with train/<class>/ and test/<class>/"


def read_class_folder(folder, split):
    """The images of folder/<split>/<class>/*; train/ must have the same classes."""
    folders = {}
    for part in (split, "train"):
        shown = filter(is_shown, (folder / part).iterdir())
        folders[part] = sorted((path_name(path), path) for path in shown if path.is_dir())
    classes = sorted({name for name, _ in folders[split]})
    different = sorted({name for name, _ in folders["train"]} ^ set(classes))
    if different or not classes:
        missing = ", ".join(different) or "any class"
        raise InputError(f"{folder}: train/ and {split}/ do not both have {missing}.")
    files, labels = [], []
    for name, path in folders[split]:
        found = find_images(path)
        files += found
        labels += [classes.index(name)] * len(found)
    return decode_all(files), labels, classes


def read_closed_set(dataset, data_root=DATA_ROOT, train=True, validation=0):
    """Return images uint8 (N, 3, 32, 32), labels (N,), class names. validation: how many training
    images to hold out, for every seed the same, or a folder's whole val/; with train=False these
    are returned, not the test images. Raises InputError, and OSError for an unavailable set."""
    folder = Path(os.path.expanduser(dataset))
    if dataset in CLOSED_SETS:
        images, labels, classes = CLOSED_SETS[dataset](data_root, train or validation > 0)
    elif validation and (folder / "val").is_dir():
        return read_class_folder(folder, "train" if train else "val")
    elif folder.is_dir():
        split = "train" if train or validation else "test"
        images, labels, classes = read_class_folder(folder, split)
    else:
        raise InputError(f"Unknown data set {dataset!r}: use {CLOSED_SET_NAMES}.")
    check_images(images, dataset)
    if validation >= len(images):
        raise InputError(f"--validation {validation} leaves none of the {len(images)} images.")
    if validation:
        order = fixed_order(len(images))
        chosen = np.sort(order[validation:] if train else order[:validation])
        images, labels = images[chosen], np.asarray(labels)[chosen]
    return images, labels, list(classes)


# OOD sets of images: (data root, count) -> uint8 (N, 3, 32, 32); the first `count` are taken
def read_textures(root, count):
    """From the test split of DTD, 1,880 textures of 47 classes, in a fixed order."""
    files = fetch(datasets.DTD, root, split="test")._image_files
    return decode_all([files[i] for i in fixed_order(len(files))[:count]])


def read_photos(root, count):
    """Distinct 32x32 crops of photographs that scikit-image ships."""
    import skimage.data

    crops = []
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        picture = torch.from_numpy(getattr(skimage.data, name)())  # (H, W, 3)
        crops.append(picture.unfold(0, 32, 16).unfold(1, 32, 16).flatten(0, 1))
    crops = torch.cat(crops).unique(dim=0)  # (N, 3, 32, 32)
    return crops[fixed_order(len(crops))]


OOD_IMAGES = {
    "svhn": lambda root, _: fetch(datasets.SVHN, Path(root) / "svhn", split="test").data,
    "cifar10": lambda root, _: CLOSED_SETS["cifar10"](root, False)[0],
    "cifar100": lambda root, _: CLOSED_SETS["cifar100"](root, False)[0],
    "textures": read_textures,
    "mnist": lambda root, count: grey_to_rgb(fetch(datasets.MNIST, root, train=False).data[:count]),
    "photos": read_photos,
}
OOD_SET_NAMES = f"{', '.join([*NOISES, *OOD_IMAGES])}, or a folder of images"


def build_ood_loader(noise_type, ood_num_examples, seed=NOISE_SEED, data_root=DATA_ROOT, **options):
    """Return an ImageLoader over the first images of an OOD set, or all if there are fewer.
    noise_type: in NOISES or OOD_IMAGES, or a folder of images, taken in a fixed order. Batches are
    float32 (B, 3, 32, 32), as the network takes them, with labels -1. A noise is a function of
    (seed, name). options: batch_size, device. Raises InputError, OSError for an unavailable set."""
    name, count = str(noise_type), ood_num_examples
    folder = Path(os.path.expanduser(name))
    if min(count, options.get("batch_size", 1)) < 1:
        raise InputError("The number of images and the batch size must be at least 1.")
    if name in NOISES:
        rng = np.random.default_rng((seed, *name.encode()))
        images = torch.as_tensor(NOISES[name](rng, count))[:count]
        images = images if images.dtype == torch.uint8 else images.float()
    elif name in OOD_IMAGES:
        images = torch.as_tensor(OOD_IMAGES[name](data_root, count))[:count]
    elif folder.is_dir():
        paths = find_images(folder)
        paths = [paths[i] for i in fixed_order(len(paths))[:count]]
        images = decode_all(paths)
        options["files"] = [str(path.relative_to(folder)) for path in paths]
    else:
        raise InputError(f"Unknown OOD type {name!r}: use {OOD_SET_NAMES}.")
    check_images(images, name, images.dtype if name in NOISES else torch.uint8)
    return ImageLoader(images, [-1] * len(images), **options)


# Batches --------------------------------------------------------------------------------
def memory_format(device):
    """channels_last, the faster one; on MPS its gradients are wrong (pytorch#175189)."""
    on_mps = torch.device(device).type == "mps"
    return torch.contiguous_format if on_mps else torch.channels_last


@functools.cache  # a copy per batch would make a GPU wait
def statistics(device):
    """MEAN and STD on the device, float32 (2, 3, 1, 1)."""
    return torch.tensor([MEAN, STD], dtype=torch.float32, device=device).view(2, 3, 1, 1)


def normalise(images):
    """uint8 (N, 3, H, W) -> float32, bit for bit as torchvision's Normalize."""
    if images.dtype != torch.uint8:
        raise InputError(f"Only uint8 images can be normalised, not {images.dtype}.")
    mean, std = statistics(images.device)
    return images.to(torch.float32).div_(255).sub_(mean).div_(std)


def to_input(images, generator=None):
    """A batch as the network takes it: uint8 images normalised, float32 noise unchanged."""
    return normalise(images) if images.dtype == torch.uint8 else images


def mix_seed(*numbers):
    """One seed of 64 bits, a function of some numbers."""
    (state,) = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return int(state)


@dataclass
class ImageLoader:
    """Batches (images, labels) of a set that is on the device as a whole. The order depends on
    (seed, epoch) only, what transform draws on (seed, epoch, batch) only."""

    images: torch.Tensor  # (N, 3, 32, 32): uint8, or float32 in the network's input space
    labels: torch.Tensor  # (N,), or a list
    classes: tuple = ()  # the names of the labels
    batch_size: int = EVAL_BATCH_SIZE
    device: torch.device = "cpu"
    transform: Callable = to_input  # (images, generator) -> what the network takes
    shuffle: bool = False  # a new order in each epoch
    seed: int = 0
    files: list | None = None  # of the images of a folder, relative to it
    normalises = True  # its batches are in the network's input space

    def __post_init__(self):
        self.images = self.images.to(self.device, memory_format=memory_format(self.device))
        self.labels = torch.as_tensor(self.labels, dtype=torch.int64, device=self.device)
        self.epoch = 0  # incremented by each iteration

    def __len__(self):
        return math.ceil(len(self.images) / self.batch_size)

    def __iter__(self):
        device, epoch, count = self.images.device, self.epoch, len(self.images)
        self.epoch += 1
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(count) if self.shuffle else np.arange(count)
        batches = torch.from_numpy(order).to(device).split(self.batch_size)
        for number, batch in enumerate(batches):
            generator = torch.Generator(device).manual_seed(mix_seed(self.seed, epoch, number))
            yield self.transform(self.images[batch], generator), self.labels[batch]


def check_images(images, name, dtype=torch.uint8):
    """Raise InputError unless there are images (N, 3, 32, 32) of the dtype."""
    if images.dtype != dtype or images.shape[1:] != (3, 32, 32) or not len(images):
        found = f"{images.dtype} {tuple(images.shape)}"
        raise InputError(f"{name} has {found}, not images of {dtype} (N, 3, 32, 32).")


# Files and downloads --------------------------------------------------------------------
def path_name(path):
    """The last part of a path of any system; a Mac decomposes accented letters, others do not."""
    name = os.path.basename(str(path).replace("\\", "/").rstrip("/"))
    return unicodedata.normalize("NFC", name)


def is_shown(path):
    """False for hidden entries and for folders that are named like an image."""
    image_named = path.suffix.lower() in IMG_EXTENSIONS and path.is_dir()
    return not path.name.startswith(".") and not image_named


def find_images(folder):
    """The image files below a folder, sorted; links are followed, each folder is read once."""
    found, folders, seen = [], [folder], {folder.resolve()}
    for current in folders:  # which grows
        for path in filter(is_shown, sorted(map(Path, os.scandir(str(current))))):
            if path.is_dir() and path.resolve() not in seen:
                seen.add(path.resolve())
                folders.append(path)
            elif path.suffix.lower() in IMG_EXTENSIONS and path.is_file():
                found.append(path)
    if not found:
        raise InputError(f"{folder} holds no image ({' '.join(IMG_EXTENSIONS)}).")
    return sorted(found, key=lambda file: file.relative_to(folder).parts)


def decode(path):
    """uint8 (3, 32, 32) of an image file: shorter side to 32, centre crop. Rotated by EXIF,
    transparency over white. Raises InputError, also for pixels without 8 bits."""
    try:
        image = ImageOps.exif_transpose(Image.open(path))
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"mode {image.mode}, save it with 8 bits")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return TF.pil_to_tensor(TF.center_crop(TF.resize(image.convert("RGB"), 32), 32))
    except MemoryError as error:
        raise OSError(f"No memory is left for {path}") from error
    except Exception as error:
        raise InputError(f"{path} is not a readable image ({error})") from error


def decode_all(paths):
    """uint8 (N, 3, 32, 32) of N image files; InputError names the first that are not readable."""

    def try_decode(path):
        try:
            return decode(path)
        except InputError as error:
            return error

    images = thread_map(try_decode, paths, desc="decoding", delay=1, disable=None)
    bad = [str(image) for image in images if isinstance(image, InputError)]
    if bad:
        raise InputError(f"Fix or remove {len(bad)} files: {', '.join(bad[:3])}.")
    return torch.stack(images)


def grey_to_rgb(images):
    """uint8 (N, H, W) -> uint8 (N, 3, 32, 32)."""
    images = F.interpolate(images[:, None].float(), size=32, mode="bilinear", antialias=True)
    return images.round().to(torch.uint8).expand(-1, 3, -1, -1)


def fixed_order(count):
    """A fixed permutation; without it, the first images of a sorted folder share a class."""
    return np.random.default_rng(0).permutation(count)


def fetch(dataset, root, **split):
    """A data set of torchvision, or OSError; one process at a time downloads it."""
    root, name = Path(os.path.expanduser(root)), dataset.__name__
    with contextlib.suppress(RuntimeError):  # missing or damaged
        return dataset(root, **split)
    try:
        with lock(root / f".{name}.lock"), contextlib.redirect_stdout(sys.stderr):
            return dataset(root, download=True, **split)
    except Exception as error:
        missing = f"{name} is missing or damaged under {root}, and no download was possible"
        raise OSError(f"{missing} ({error}): copy it there.") from error

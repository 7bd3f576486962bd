"""Every image set: closed sets to train and test on, OOD sets to tell from them.

Image sets are uint8 (N, 3, 32, 32), which the loader normalises. Noises are float32
and go into the network as they are: in its input space -1 is about pixel 70 and +1
about 172. The idea is outlier-exposure's (github.com/hendrycks/outlier-exposure); under
its normalisation, where they are about 57 and 185, the noises are others.

To add an OOD set, write its function and a line in NOISES or OOD_IMAGES. To use one:

    from ood_data import build_ood_loader
    images, labels = next(iter(build_ood_loader("blob", 2000)))
"""

import contextlib
import functools
import math
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torch.nn import functional as F
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from ood_utils import InputError

DATASET = "cifar100"  # a name in CLOSED_SETS, or a folder
DATA_ROOT = "~/data"  # where torchvision's data sets lie, or are downloaded to
NOISE_SEED = 0
EVAL_BATCH_SIZE = 1000  # images per forward pass: speed and memory alone

# The published figures used these, and the noises are defined in the space they span. The
# mean is CIFAR-10's. The std is not: it is the mean over images of each image's own standard
# deviation, a slip of an early repository (kuangliu/pytorch-cifar#16) that spread. CIFAR-10's
# is (0.2470, 0.2435, 0.2616); CIFAR-100 has (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761).
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2023, 0.1994, 0.2010)

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")  # of scikit-image


# ----------------------------------------------------------------------------------------
# Batches


def memory_format(device):
    """channels_last, the faster one; on MPS its gradients are wrong (pytorch#175189)."""
    on_mps = torch.device(device).type == "mps"
    return torch.contiguous_format if on_mps else torch.channels_last


@functools.cache  # a copy to the device for every batch would make a GPU wait
def statistics(device):
    """MEAN and STD as float32 (3, 1, 1) on the device."""
    mean = torch.tensor(MEAN, device=device).view(3, 1, 1)
    std = torch.tensor(STD, device=device).view(3, 1, 1)
    return mean, std


def normalise(images):
    """uint8 (N, 3, H, W) -> float32, with the bits of torchvision's Normalize."""
    mean, std = statistics(images.device)
    return (images / 255).sub_(mean).div_(std)


@dataclass
class ImageLoader:
    """Batches (images, labels) of a set that lies on the device as a whole.

    Several processes take equal shares of each batch; of the last one (processes - 1)
    images at most are left out, others in each epoch.
    """

    images: torch.Tensor  # (N, 3, H, W): uint8, to be normalised, or float32, left as it is
    labels: torch.Tensor  # (N,)
    classes: tuple = ()  # the names of the labels
    batch_size: int = EVAL_BATCH_SIZE
    device: torch.device = "cpu"
    augment: Callable | None = None  # (uint8 (B, 3, H, W), draws float32 (B, 3) in [0, 1))
    shuffle: bool = False  # a new order in each epoch
    seed: int = 0  # order and draws are functions of (seed, epoch)
    rank: int = 0  # the number of this process
    processes: int = 1

    def __post_init__(self):
        self.images = self.images.to(self.device, memory_format=memory_format(self.device))
        self.labels = torch.as_tensor(self.labels, dtype=torch.int64, device=self.device)
        self.epoch = 0  # counts up by itself

    def __len__(self):
        return math.ceil(len(self.images) / self.batch_size)

    def __iter__(self):
        count, device = len(self.images), self.images.device
        rng = np.random.default_rng((self.seed, self.epoch))
        self.epoch += 1
        order = rng.permutation(count) if self.shuffle else np.arange(count)
        draws = torch.from_numpy(rng.random((count, 3), dtype=np.float32)).to(device)
        for batch in torch.from_numpy(order).to(device).split(self.batch_size):
            shared = len(batch) - len(batch) % self.processes
            batch = batch[self.rank : shared : self.processes]
            images = self.images[batch]
            if self.augment:
                images = self.augment(images, draws[batch])
            if images.dtype == torch.uint8:
                images = normalise(images)
            yield images, self.labels[batch]


# ----------------------------------------------------------------------------------------
# Reading images


def to_rgb(image):
    """8-bit RGB of a PIL image; convert() alone turns more than 8 bits white."""
    values = np.asarray(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((values / 257).round().astype(np.uint8))
    elif image.mode in ("I", "F"):
        if not (values.min() >= 0 and values.max() <= 255):
            raise InputError(f"mode {image.mode} with values outside 0 to 255: save it with 8 bits")
        image = Image.fromarray(values.round().astype(np.uint8))
    return image.convert("RGB")


def fit(image):
    """uint8 (3, 32, 32) of a PIL image: shorter side to 32, centre crop."""
    image = TF.resize(to_rgb(image), 32)
    image = TF.center_crop(image, 32)
    return TF.pil_to_tensor(image)


def decode(path):
    """uint8 (3, 32, 32) of an image file."""
    try:
        with Image.open(path) as image:
            return fit(image)
    except Exception as error:
        raise InputError(f"{path} is not a readable image ({error}): mend or remove it.") from error


def decode_all(paths, name):
    """uint8 (N, 3, 32, 32) of N image files."""
    with ThreadPoolExecutor() as pool:
        images = pool.map(decode, paths)
        images = tqdm(images, name, len(paths), delay=1, leave=False, disable=None)
        return torch.stack(list(images))


def grey_to_rgb(images):
    """uint8 (N, H, W) -> uint8 (N, 3, 32, 32)."""
    images = F.interpolate(images[:, None].float(), size=32, mode="bilinear", antialias=True)
    return images.round().to(torch.uint8).expand(-1, 3, -1, -1)


def fixed_order(count):
    """A permutation: the first images of a sorted folder share a class."""
    return np.random.default_rng(0).permutation(count)


def fetch(dataset, root, **split):
    """A data set of torchvision, downloaded where missing, or raise InputError."""
    root = Path(root).expanduser()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for results
            return dataset(root, download=True, **split)
    except Exception as error:
        raise InputError(
            f"{dataset.__name__} is missing or damaged under {root} and could not be downloaded "
            f"({error}): copy it there from a machine that can. digits and photos need none."
        ) from error


# ----------------------------------------------------------------------------------------
# Closed sets: (data root, train) -> images uint8 (N, 3, 32, 32), labels (N,), class names


def read_cifar(dataset, root, train):
    data = fetch(dataset, root, train=train)
    return torch.from_numpy(data.data).permute(0, 3, 1, 2), data.targets, data.classes


def read_digits(root, train):
    """scikit-learn's 1,797 digits of 8x8, in a fixed stratified 80/20 split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    train_images, test_images, train_labels, test_labels = train_test_split(
        digits.images, digits.target, test_size=0.2, stratify=digits.target, random_state=0
    )
    images = torch.from_numpy(train_images if train else test_images)
    images = (images / 16 * 255).round().to(torch.uint8)
    labels = train_labels if train else test_labels
    return grey_to_rgb(images), labels, [str(digit) for digit in range(10)]


def read_class_folder(folder, train):
    """The closed set in folder/train/<class>/* and folder/test/<class>/*."""
    folder = Path(folder).expanduser()
    try:
        train_set = datasets.ImageFolder(folder / "train")
        test_set = datasets.ImageFolder(folder / "test")
    except FileNotFoundError as error:
        layout = "a data set needs train/<class>/ and test/<class>/ with images"
        raise InputError(f"{folder} is no data set ({error}): {layout}.") from error
    odd = sorted(set(train_set.classes) ^ set(test_set.classes))
    if odd:
        raise InputError(f"{folder}: only one of train/ and test/ has the class {', '.join(odd)}.")
    split = train_set if train else test_set
    paths, labels = zip(*split.samples, strict=True)
    return decode_all(paths, str(folder)), labels, split.classes


# name: number of classes, reader
CLOSED_SETS = {
    "cifar100": (100, functools.partial(read_cifar, datasets.CIFAR100)),
    "cifar10": (10, functools.partial(read_cifar, datasets.CIFAR10)),
    "digits": (10, read_digits),
}
CLOSED_SET_NAMES = f"{', '.join(CLOSED_SETS)}, or a folder with train/<class>/ and test/<class>/"


def read_closed_set(dataset=DATASET, data_root=DATA_ROOT, train=True):
    """Return images uint8 (N, 3, 32, 32), labels, class names, or raise InputError."""
    if dataset in CLOSED_SETS:
        _, read = CLOSED_SETS[dataset]
        return read(data_root, train)
    if Path(dataset).expanduser().is_dir():
        return read_class_folder(dataset, train)
    raise InputError(f"Unknown data set {dataset!r}: use {CLOSED_SET_NAMES}.")


# ----------------------------------------------------------------------------------------
# OOD sets


def gaussian(rng, count):
    """Normal noise with mean 0 and standard deviation 0.5, clipped to [-1, 1]."""
    return rng.normal(0, 0.5, (count, 3, 32, 32)).clip(-1, 1)


def rademacher(rng, count):
    """-1 or 1, each with p = 0.5."""
    return rng.integers(0, 2, (count, 3, 32, 32)) * 2 - 1


def blob(rng, count):
    """Bernoulli(0.7) values, blurred with sigma 1.5 over rows, columns, channels.

    What is below 0.75 then becomes 0; x * 2 - 1.
    """
    from skimage.filters import gaussian as blur

    values = rng.binomial(1, 0.7, (count, 32, 32, 3)).astype(np.float32)
    # Sigma 0 along the first axis: the bits of one call per image, in one call.
    values = blur(values, sigma=(0, 1.5, 1.5, 1.5), mode="nearest", channel_axis=None)
    values[values < 0.75] = 0
    return values.transpose(0, 3, 1, 2) * 2 - 1


def read_svhn(root, count):
    data = fetch(datasets.SVHN, Path(root) / "svhn", split="test")
    return torch.from_numpy(data.data[:count])


def read_mnist(root, count):
    data = fetch(datasets.MNIST, root, train=False)
    return grey_to_rgb(data.data[:count])


def read_textures(root, count):
    """From the test split of DTD, 1,880 textures of 47 classes, in a fixed order."""
    data = fetch(datasets.DTD, root, split="test")
    return torch.stack([fit(data[i][0]) for i in fixed_order(len(data))[:count]])


def read_photos(root, count):
    """Distinct 32x32 crops of photographs that scikit-image ships."""
    import skimage.data

    crops = []
    for name in PHOTOS:
        picture = torch.from_numpy(getattr(skimage.data, name)())  # (H, W, 3)
        crops.append(picture.unfold(0, 32, 16).unfold(1, 32, 16).flatten(0, 1))
    crops = torch.cat(crops).unique(dim=0)  # (N, 3, 32, 32)
    return crops[fixed_order(len(crops))[:count]]


def read_folder(folder, count):
    """From all image files below a folder, in a fixed order."""
    files = sorted(Path(folder).expanduser().rglob("*"))
    files = [path for path in files if path.suffix.lower() in IMG_EXTENSIONS]
    if not files:
        raise InputError(f"{folder} holds no image ({' '.join(IMG_EXTENSIONS)}).")
    return decode_all([files[i] for i in fixed_order(len(files))[:count]], str(folder))


# name: (rng, count) -> (count, 3, 32, 32) in the network's input space
NOISES = {"gaussian": gaussian, "rademacher": rademacher, "blob": blob}
# name: (data root, count) -> uint8 (count or fewer, 3, 32, 32)
OOD_IMAGES = {
    "svhn": read_svhn,
    "cifar10": lambda root, count: read_cifar(datasets.CIFAR10, root, False)[0][:count],
    "cifar100": lambda root, count: read_cifar(datasets.CIFAR100, root, False)[0][:count],
    "textures": read_textures,
    "mnist": read_mnist,
    "photos": read_photos,
}
OOD_SET_NAMES = f"{', '.join([*NOISES, *OOD_IMAGES])}, or a folder of images"


def check_ood_type(name, dataset=None):
    """Raise InputError unless `name` is an OOD set or a folder, not the closed set."""
    is_name = name in NOISES or name in OOD_IMAGES
    folder = Path(name).expanduser().resolve()
    if not is_name and not folder.is_dir():
        raise InputError(f"Unknown OOD type {name!r}: use {OOD_SET_NAMES}.")
    overlaps = name == dataset
    if dataset and not is_name and dataset not in CLOSED_SETS:  # two folders
        closed = Path(dataset).expanduser().resolve()
        within = folder.is_relative_to(closed / "train") or folder.is_relative_to(closed / "test")
        overlaps = within or closed.is_relative_to(folder)
    if overlaps:
        raise InputError(f"OOD type {name!r} is, or holds, the closed set itself: leave it out.")


def build_ood_loader(
    noise_type,
    ood_num_examples,
    batch_size=EVAL_BATCH_SIZE,
    seed=NOISE_SEED,
    data_root=DATA_ROOT,
    device="cpu",
):
    """Return an ImageLoader over the first images of an OOD set.

    noise_type: a name in NOISES or OOD_IMAGES, or the path of a folder of images.
    Fewer images where the set is smaller. Batches are float32 (B, 3, 32, 32) in the
    network's input space, and labels of -1: no class. A noise is a function of (seed,
    noise_type) alone. Raises InputError, a ValueError, for an unknown set, one that is
    neither on disk nor to be had, or a number below 1.
    """
    if ood_num_examples < 1 or batch_size < 1:
        raise InputError("The number of images and the batch size must be at least 1.")
    check_ood_type(noise_type)
    if noise_type in NOISES:
        rng = np.random.default_rng((seed, *noise_type.encode()))
        noise = NOISES[noise_type](rng, ood_num_examples)
        images = torch.as_tensor(noise, dtype=torch.float32)
    elif noise_type in OOD_IMAGES:
        images = OOD_IMAGES[noise_type](data_root, ood_num_examples)
    else:
        images = read_folder(noise_type, ood_num_examples)
    labels = torch.full((len(images),), -1)
    return ImageLoader(images, labels, batch_size=batch_size, device=device)

"""Image sets through torchvision's own reading, noise against a per-image reference, the loader."""

import hashlib
import re
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import md5_of, write_images
from PIL import Image
from scipy.io import savemat
from scipy.ndimage import gaussian_filter
from torchvision import datasets, transforms

import ood_data
from ood_data import (
    MEAN,
    STD,
    ImageLoader,
    build_ood_loader,
    check_ood_name,
    normalise,
    read_closed_set,
    read_photos,
)
from ood_utils import InputError


def all_images(loader):
    return torch.cat([images for images, _ in loader])


# Noise


def test_gaussian_and_rademacher_are_what_they_say():
    noise = all_images(build_ood_loader("gaussian", 400))
    assert noise.dtype == torch.float32 and noise.shape == (400, 3, 32, 32)
    assert noise.min() == -1 and noise.max() == 1
    inside = noise[noise.abs() < 1]
    # P(|x| < 2 sigma), and the standard deviation of a normal truncated there, 0.87963 sigma
    assert inside.numel() / noise.numel() == pytest.approx(0.95450, abs=0.001)
    assert inside.std() == pytest.approx(0.5 * 0.87963, abs=0.002) and abs(noise.mean()) < 0.002
    signs = all_images(build_ood_loader("rademacher", 400))
    assert signs.unique().tolist() == [-1, 1] and abs(signs.mean()) < 0.005


def test_blob_equals_the_per_image_protocol():
    blobs = all_images(build_ood_loader("blob", 20, seed=3)).numpy()
    rng = np.random.default_rng((3, *b"blob"))
    values = rng.binomial(1, 0.7, (20, 32, 32, 3)).astype(np.float32)
    for image, blob in zip(values, blobs, strict=True):
        blurred = gaussian_filter(image, sigma=1.5, mode="nearest", truncate=4.0)  # all three axes
        blurred[blurred < 0.75] = 0
        np.testing.assert_allclose(blob, blurred.transpose(2, 0, 1) * 2 - 1, atol=1e-6)
    assert (all_images(build_ood_loader("blob", 500)) == -1).float().mean() == pytest.approx(
        0.787, abs=0.01
    )


@pytest.mark.parametrize(
    "name,digest",
    [
        ("gaussian", "d323776486548027"),
        ("rademacher", "63ae944aeeb64c6a"),
        ("blob", "d08ea7ef6e15be1b"),
    ],
)
def test_noise_is_pinned(name, digest):
    """To four decimals: the last bits of a blur or of a normal may differ between processors."""
    images = all_images(build_ood_loader(name, 50, seed=0, batch_size=7))
    rounded = (images.numpy().astype(np.float64) * 1e4).round().astype(np.int64)
    assert hashlib.sha256(np.ascontiguousarray(rounded).tobytes()).hexdigest()[:16] == digest
    assert torch.equal(images, all_images(build_ood_loader(name, 80, seed=0))[:50])
    assert not torch.equal(images, all_images(build_ood_loader(name, 50, seed=1)))


# Image sets


def reference_transform(images):
    """torchvision's ToTensor and Normalize, image by image."""
    steps = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    return torch.stack([steps(Image.fromarray(image.transpose(1, 2, 0))) for image in images])


def test_normalise_has_the_bits_of_torchvision():
    images = np.random.default_rng(0).integers(0, 256, (16, 3, 32, 32), dtype=np.uint8)
    assert torch.equal(normalise(torch.from_numpy(images)), reference_transform(images))


def test_cifar100_is_read_as_torchvision_reads_it(cifar100_files):
    root, images, labels = cifar100_files
    read, read_labels, classes = read_closed_set("cifar100", root, train=True)
    assert read.dtype == torch.uint8 and np.array_equal(read.numpy(), images)
    assert list(read_labels) == labels and classes[3] == "class 3"
    assert len(all_images(build_ood_loader("cifar100", 15, data_root=root))) == 15


def test_svhn_is_the_first_test_images_in_order(tmp_path, monkeypatch):
    (tmp_path / "svhn").mkdir()
    images = np.random.default_rng(0).integers(0, 256, (9, 3, 32, 32), dtype=np.uint8)
    labels = np.arange(1, 10, dtype=np.uint8)[:, None]
    path = tmp_path / "svhn/test_32x32.mat"
    savemat(path, {"X": images.transpose(2, 3, 1, 0), "y": labels})
    url, name, _ = datasets.SVHN.split_list["test"]
    monkeypatch.setattr(datasets.SVHN, "split_list", {"test": [url, name, md5_of(path)]})
    loader = build_ood_loader("svhn", 7, batch_size=3, data_root=tmp_path)
    assert torch.equal(all_images(loader), reference_transform(images[:7]))
    assert [labels.tolist() for _, labels in loader] == [[-1] * 3, [-1] * 3, [-1]]


def test_mnist_is_the_test_split_in_three_channels(tmp_path):
    folder = tmp_path / "MNIST/raw"
    folder.mkdir(parents=True)
    for split, pixel in (("train", 0), ("t10k", 255)):
        header = b"".join(number.to_bytes(4, "big") for number in (0x803, 5, 28, 28))
        pixels = bytes([pixel]) * (5 * 28 * 28)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(header + pixels)
        header = b"".join(number.to_bytes(4, "big") for number in (0x801, 5))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(header + bytes(range(5)))
    images = build_ood_loader("mnist", 3, data_root=tmp_path).images
    assert images.shape == (3, 3, 32, 32) and (images == 255).all()


def test_textures_are_the_test_split_of_dtd(tmp_path):
    for name, seed in (("banded", 0), ("woven", 1)):
        write_images(tmp_path / "dtd/dtd/images" / name, 4, seed=seed, size=(32, 50))
    labels = tmp_path / "dtd/dtd/labels"
    labels.mkdir()
    for split, number in (("train", 0), ("val", 1), ("test", 2)):
        (labels / f"{split}1.txt").write_text(f"banded/00{number}.png\nwoven/00{number}.png\n")
    found = all_images(build_ood_loader("textures", 10, data_root=tmp_path))
    paths = [tmp_path / f"dtd/dtd/images/{name}/002.png" for name in ("banded", "woven")]
    expected = reference_transform(
        np.stack([np.asarray(Image.open(path))[:, 9:41].transpose(2, 0, 1) for path in paths])
    )
    assert torch.equal(found, expected) or torch.equal(found, expected.flip(0))


def test_digits_are_split_once_and_for_all():
    train, train_labels, classes = read_closed_set("digits", train=True)
    test, test_labels, _ = read_closed_set("digits", train=False)
    assert (len(train), len(test), len(classes)) == (1437, 360, 10)
    assert train.shape[1:] == (3, 32, 32) and train.dtype == torch.uint8 and train.max() == 255
    counts = np.bincount(test_labels)
    assert counts.min() >= 34 and counts.max() <= 37
    assert torch.equal(test, read_closed_set("digits", train=False)[0])


def test_photos_are_distinct_colour_crops():
    crops = read_photos("", 2000)
    assert crops.shape == (2000, 3, 32, 32) and crops.dtype == torch.uint8
    assert len(crops.unique(dim=0)) == 2000
    assert torch.equal(read_photos("", 10), crops[:10])
    assert (crops[:, 0] != crops[:, 1]).float().mean() > 0.5


def test_images_of_any_size_are_cut_from_the_centre(tmp_path):
    wide = np.zeros((32, 100, 3), dtype=np.uint8)
    wide[:, 34:66] = (200, 100, 50)  # the centre 32 columns
    Image.fromarray(wide).save(tmp_path / "a.png")
    Image.fromarray(np.full((64, 64), 80, dtype=np.uint8)).save(tmp_path / "b.PNG")  # grey
    (tmp_path / "notes.txt").write_text("not an image")
    found = all_images(build_ood_loader(str(tmp_path), 10))
    expected = torch.tensor([[200, 100, 50], [80, 80, 80]], dtype=torch.uint8)[
        :, :, None, None
    ].expand(2, 3, 32, 32)
    assert {tuple(image.flatten().tolist()) for image in found} == {
        tuple(image.flatten().tolist()) for image in normalise(expected)
    }


def test_the_first_images_of_a_folder_are_not_all_of_one_class(tmp_path):
    for i in range(4):
        write_images(tmp_path / f"class{i}", 10, seed=i, size=(32, 32))
    first = all_images(build_ood_loader(str(tmp_path), 10))
    assert torch.equal(first, all_images(build_ood_loader(str(tmp_path), 40))[:10])
    classes = set()
    for path in tmp_path.rglob("*.png"):
        image = reference_transform(np.asarray(Image.open(path)).transpose(2, 0, 1)[None])
        if any(torch.equal(image[0], other) for other in first):
            classes.add(path.parent.name)
    assert len(classes) >= 3


@pytest.mark.parametrize("arguments,message", [
    (("fog", 10), "Unknown OOD type 'fog': use .*gaussian, .*, or a folder"),
    (("blob", 0), "at least 1"),
    (("blob",), "at least 1"),
    (("blob", 10, 0), "at least 1"),
])  # fmt: skip
def test_build_ood_loader_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_ood_loader(*arguments)


@pytest.mark.parametrize("name,dataset", [
    ("svhn", "SVHN"), ("cifar10", "CIFAR10"), ("mnist", "MNIST"), ("textures", "DTD")
])  # fmt: skip
def test_an_unavailable_set_says_so(name, dataset, tmp_path, no_network):
    """Also the second time: a failed download leaves empty folders."""
    for _ in range(2):
        with pytest.raises(InputError) as error:
            build_ood_loader(name, 10, data_root=tmp_path)
        pattern = rf"{dataset} is missing or damaged under {tmp_path}.*not be downloaded.*: copy it"
        assert re.match(pattern, " ".join(str(error.value).split()))


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_a_noise_may_be_an_array_or_a_tensor(kind, monkeypatch):
    monkeypatch.setitem(ood_data.NOISES, "flat", lambda rng, n: kind(np.ones((n, 3, 32, 32))))
    images = all_images(build_ood_loader("flat", 5))
    assert images.dtype == torch.float32 and images.shape == (5, 3, 32, 32) and (images == 1).all()


def test_the_closed_set_is_no_ood_set(class_folder, tmp_path, monkeypatch):
    check_ood_name("cifar10", "cifar100")
    (class_folder / "far").mkdir()
    check_ood_name(class_folder / "far", class_folder)  # beside train/ and test/
    check_ood_name(tmp_path, "cifar100")
    (tmp_path / "cifar10").mkdir()
    monkeypatch.chdir(tmp_path)
    check_ood_name(".", "cifar10")  # another thing than ./cifar10
    monkeypatch.chdir(class_folder / "train")
    check_ood_name("svhn", "../../pets")  # not ./svhn
    for name, dataset in (
        ("cifar100", "cifar100"),
        (class_folder, class_folder),
        (class_folder / "test/cat", class_folder),
        (tmp_path, class_folder),
    ):
        with pytest.raises(InputError, match="closed set itself"):
            check_ood_name(name, dataset)


# Loader


def numbered(count):
    """`count` images whose pixels are their number."""
    pixels = torch.arange(count, dtype=torch.float32)[:, None, None, None]
    return pixels.expand(count, 3, 32, 32)


def test_the_loader_keeps_the_last_batch_and_the_order():
    loader = ImageLoader(numbered(10), range(10), batch_size=4)
    assert len(loader) == 3 and [len(labels) for _, labels in loader] == [4, 4, 2]
    assert torch.cat([labels for _, labels in loader]).tolist() == list(range(10))


def test_epochs_are_functions_of_seed_and_epoch():
    """Order by (seed, epoch); the generator that the transform gets by (seed, epoch, batch)."""

    def epoch(seed, number):
        drawn = []

        def transform(images, generator):
            drawn.append(torch.rand(1, generator=generator).item())
            return images

        options = {"batch_size": 16, "transform": transform, "shuffle": True, "seed": seed}
        loader = ImageLoader(numbered(50), range(50), **options)
        loader.epoch = number
        images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
        assert loader.epoch == number + 1 and torch.equal(images[:, 0, 0, 0].long(), labels)
        return labels.tolist(), drawn

    labels, drawn = epoch(5, 3)
    assert sorted(labels) == list(range(50)) and len(set(drawn)) == 4
    assert epoch(5, 3) == (labels, drawn)
    for other in (epoch(5, 4), epoch(6, 3)):
        assert labels != other[0] and not set(drawn) & set(other[1])


def test_images_of_another_form_are_refused(monkeypatch):
    """Floats, or another size, from a function that a user adds."""
    for images in (torch.zeros(4, 3, 32, 32), torch.zeros(4, 3, 64, 64, dtype=torch.uint8)):
        monkeypatch.setitem(ood_data.CLOSED_SETS, "mine", lambda *a, i=images: (i, [0] * 4, ["x"]))
        monkeypatch.setitem(ood_data.OOD_IMAGES, "mine", lambda *a, i=images: i)
        for read in (lambda: read_closed_set("mine"), lambda: build_ood_loader("mine", 4)):
            with pytest.raises(InputError, match=r"mine must return images uint8 \(N, 3, 32, 32\)"):
                read()


def test_the_former_keywords_still_work():
    former = build_ood_loader(noise_type="blob", ood_num_examples=3)
    assert torch.equal(former.images, build_ood_loader(name="blob", count=3).images)


def test_downloads_into_one_folder_wait_for_each_other(tmp_path, monkeypatch):
    """Two threads stand for two jobs: the second starts when the first has its files."""
    events = []

    class Slow:
        def __init__(self, root, download):
            events.append("begin")
            time.sleep(0.2)
            events.append("end")

    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda _: ood_data.fetch(Slow, tmp_path / "new"), range(3)))
    assert events == ["begin", "end"] * 3

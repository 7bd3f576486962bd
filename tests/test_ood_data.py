"""Image sets by torchvision's own reading, noise by a reference for each image, the loader."""

import hashlib
import pickle
import re
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image
from scipy.io import savemat
from scipy.ndimage import gaussian_filter
from torchvision import datasets, transforms

import ood_data
from ood_data import ImageLoader, build_ood_loader, check_ood_name, read_closed_set
from ood_utils import InputError


def md5_of(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def all_images(loader):
    return torch.cat([images for images, _ in loader])


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


@pytest.mark.parametrize("name,digest", [
    ("gaussian", "d323776486548027"),
    ("rademacher", "63ae944aeeb64c6a"),
    ("blob", "d08ea7ef6e15be1b"),
])  # fmt: skip
def test_noise_is_pinned(name, digest):
    """To four decimals: the last bits of a blur or of a normal may differ between processors."""
    images = all_images(build_ood_loader(name, 50, seed=0, batch_size=7))
    rounded = (images.numpy().astype(np.float64) * 1e4).round().astype(np.int64)
    assert hashlib.sha256(np.ascontiguousarray(rounded).tobytes()).hexdigest()[:16] == digest
    more = build_ood_loader(noise_type=name, ood_num_examples=80, seed=0)  # former keywords
    assert torch.equal(images, all_images(more)[:50])
    assert not torch.equal(images, all_images(build_ood_loader(name, 50, seed=1)))


def reference_transform(images):
    """torchvision's ToTensor and Normalize of each image (H, W, 3)."""
    to_tensor, scale = transforms.ToTensor(), transforms.Normalize(ood_data.MEAN, ood_data.STD)
    return torch.stack([scale(to_tensor(image)) for image in images])


def test_cifar100_is_read_as_torchvision_reads_it(tmp_path, monkeypatch):
    rng, folder = np.random.default_rng(0), tmp_path / "cifar-100-python"
    folder.mkdir()
    contents = {"meta": {"fine_label_names": [f"class {i}" for i in range(100)]}}
    for split, count in (("train", 40), ("test", 20)):
        pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        contents[split] = {"data": pixels, "fine_labels": list(range(count))}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
        files = [[name, md5_of(folder / name)]]
        monkeypatch.setattr(datasets.CIFAR100, f"{name}_list", files, raising=False)
    meta = {**datasets.CIFAR100.meta, "md5": md5_of(folder / "meta")}
    monkeypatch.setattr(datasets.CIFAR100, "meta", meta)
    for split in ("train", "test"):
        images, labels, classes = read_closed_set("cifar100", tmp_path, train=split == "train")
        assert images.dtype == torch.uint8 and images.shape[1:] == (3, 32, 32)
        assert np.array_equal(images.flatten(1).numpy(), contents[split]["data"])
        assert labels == contents[split]["fine_labels"] and classes[3] == "class 3"
    assert torch.equal(build_ood_loader("cifar100", 15, data_root=tmp_path).images, images[:15])


def test_svhn_is_the_first_test_images_in_order(tmp_path, monkeypatch):
    """Normalised with the bits of torchvision's."""
    (tmp_path / "svhn").mkdir()
    images = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(1, 10, dtype=np.uint8)[:, None]
    path = tmp_path / "svhn/test_32x32.mat"
    savemat(path, {"X": images.transpose(1, 2, 3, 0), "y": labels})
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
    expected = reference_transform([np.array(Image.open(path))[:, 9:41] for path in paths])
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
    crops = ood_data.read_photos("", 2000)
    assert crops.shape == (2000, 3, 32, 32) and crops.dtype == torch.uint8
    assert len(crops.unique(dim=0)) == 2000
    assert torch.equal(ood_data.read_photos("", 10), crops[:10])
    assert (crops[:, 0] != crops[:, 1]).float().mean() > 0.5


@pytest.mark.parametrize("size,box,name", [
    ((32, 100), (slice(None), slice(34, 66)), "a.png"), ((64, 64), ..., "b.JPEG"),
    ((300, 100), (slice(100, 200), slice(None)), "c.PNG"),
])  # fmt: skip
def test_images_of_any_size_are_cut_from_the_centre(size, box, name, tmp_path):
    pixels = np.zeros(size, dtype=np.uint8)
    pixels[box] = 80
    Image.fromarray(pixels).save(tmp_path / name)
    (found,) = build_ood_loader(str(tmp_path), 10).images
    middle = found[:, 2:-2, 2:-2]  # resizing blurs an edge
    assert found.shape == (3, 32, 32) and (middle == 80).all() and found.min() > 60


def test_the_first_images_of_a_folder_are_not_all_of_one_class(tmp_path):
    for i in range(4):
        write_images(tmp_path / f"class{i}", 10, seed=i, size=(32, 32))
    first, every = (build_ood_loader(str(tmp_path), count) for count in (10, 40))
    assert torch.equal(first.images, every.images[:10]) and first.files == every.files[:10]
    assert len({file.split("/")[0] for file in first.files}) >= 3


def test_build_ood_loader_refuses():
    with pytest.raises(ValueError, match="Unknown OOD type 'fog': use .*gaussian, .*, or a folder"):
        build_ood_loader("fog", 10)
    for arguments in (("blob", 0), ("blob",), ("blob", 10, 0)):
        with pytest.raises(ValueError, match="at least 1"):
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


def test_sets_of_a_user_are_cut_and_bytes_are_normalised(monkeypatch):
    grey = np.full((9, 3, 32, 32), 128, dtype=np.uint8)
    monkeypatch.setitem(ood_data.NOISES, "grey", lambda rng, n: grey)
    monkeypatch.setitem(ood_data.OOD_IMAGES, "mine", lambda root, n: torch.from_numpy(grey))
    red = (128 / 255 - 0.4914) / 0.2023
    for name in ("grey", "mine"):
        images = all_images(build_ood_loader(name, 5))
        assert len(images) == 5 and images[0, 0, 0, 0].item() == pytest.approx(red, abs=1e-6)


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
    (class_folder / "val").mkdir()
    inside = [class_folder / name for name in ("test/cat", "train", "val")]
    for name in (class_folder, tmp_path, *inside):
        with pytest.raises(InputError, match="closed set itself"):
            check_ood_name(name, class_folder)


def test_epochs_are_functions_of_seed_and_epoch():
    """Order by (seed, epoch); the generator that the transform gets by (seed, epoch, batch)."""
    numbered = torch.arange(50.0)[:, None, None, None].expand(50, 3, 32, 32)

    def epoch(seed, number):
        drawn = []

        def transform(images, generator):
            drawn.append(torch.rand(1, generator=generator).item())
            return images

        options = {"batch_size": 16, "transform": transform, "shuffle": True, "seed": seed}
        loader = ImageLoader(numbered, range(50), **options)
        loader.epoch = number
        images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
        assert loader.epoch == number + 1 and torch.equal(images[:, 0, 0, 0].long(), labels)
        assert len(loader) == len(drawn) == 4
        return labels.tolist(), drawn

    labels, drawn = epoch(5, 3)
    assert sorted(labels) == list(range(50)) and len(set(drawn)) == 4
    assert epoch(5, 3) == (labels, drawn)
    for other in (epoch(5, 4), epoch(6, 3)):
        assert labels != other[0] and not set(drawn) & set(other[1])


def test_images_of_another_form_are_refused(monkeypatch):
    """Floats, or another size, from a function that a user adds."""
    empty, large = (torch.zeros(n, 3, w, w, dtype=torch.uint8) for n, w in ((0, 32), (4, 64)))
    monkeypatch.setitem(ood_data.NOISES, "noise", lambda rng, n: rng.normal(size=(n, 32, 32, 3)))
    with pytest.raises(InputError, match=r"noise must return .* not torch.float32 \(4, 32, 32, 3"):
        build_ood_loader("noise", 4)
    for images in (torch.zeros(4, 3, 32, 32), empty, large):
        monkeypatch.setitem(ood_data.CLOSED_SETS, "mine", lambda *a, i=images: (i, [0] * 4, ["x"]))
        monkeypatch.setitem(ood_data.OOD_IMAGES, "mine", lambda *a, i=images: i)
        for read in (lambda: read_closed_set("mine"), lambda: build_ood_loader("mine", 4)):
            with pytest.raises(InputError, match=r"mine must return images uint8 \(N, 3, 32, 32\)"):
                read()


def test_downloads_into_one_folder_wait_for_each_other(tmp_path):
    """Threads stand for jobs: the second starts when the first has its files."""
    events = []

    class Slow:
        def __init__(self, root, download):
            events.append("begin")
            time.sleep(0.05)
            events.append("end")

    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda _: ood_data.fetch(Slow, tmp_path / "new"), range(3)))
    assert events == ["begin", "end"] * 3

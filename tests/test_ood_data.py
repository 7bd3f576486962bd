"""Image sets by torchvision's own reading, noise by a reference for each image, the loader."""

import pickle
import struct
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image
from scipy.io import savemat
from scipy.ndimage import gaussian_filter
from scipy.stats import norm
from torchvision import transforms

import ood_data
import test as evaluation
import train
from ood_data import build_ood_loader, read_closed_set
from ood_utils import InputError


def all_images(loader):
    return torch.cat([images for images, _ in loader])


def test_gaussian_and_rademacher_are_what_they_say():
    noise = all_images(build_ood_loader("gaussian", 400))
    assert noise.dtype == torch.float32 and noise.shape == (400, 3, 32, 32)
    assert noise.min() == -1 and noise.max() == 1
    shares = (0.1, 0.3, 0.5, 0.7, 0.9)
    np.testing.assert_allclose(np.quantile(noise, shares), norm.ppf(shares) / 2, atol=0.003)
    signs = all_images(build_ood_loader(noise_type="rademacher", ood_num_examples=400))
    assert signs.unique().tolist() == [-1, 1] and abs(signs.mean()) < 0.005


def test_blob_equals_the_per_image_protocol():
    blobs = all_images(build_ood_loader("blob", 20, seed=3, batch_size=7)).numpy()
    rng = np.random.default_rng((3, *b"blob"))
    values = rng.binomial(1, 0.7, (20, 32, 32, 3)).astype(np.float32)
    for image, blob in zip(values, blobs, strict=True):
        blurred = gaussian_filter(image, sigma=1.5, mode="nearest", truncate=4.0)  # all three axes
        blurred[blurred < 0.75] = 0
        np.testing.assert_allclose(blob, blurred.transpose(2, 0, 1) * 2 - 1, atol=1e-6)


@pytest.fixture
def any_files(monkeypatch):
    """torchvision takes files that are not those it would download."""
    for module in ("cifar", "mnist", "svhn", "utils"):
        name = f"torchvision.datasets.{module}.check_integrity"
        monkeypatch.setattr(name, lambda path, md5=None: True)


REFERENCE = transforms.Compose([
    transforms.ToTensor(), transforms.Normalize(ood_data.MEAN, ood_data.STD)
])  # fmt: skip


def test_cifar100_is_read_as_torchvision_reads_it(tmp_path, any_files):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    names = [f"class {i}" for i in range(100)]
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names}))
    for split, count in (("train", 40), ("test", 20)):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 3072), dtype=np.uint8)
        content = {"data": pixels, "fine_labels": list(range(count))}
        (folder / split).write_bytes(pickle.dumps(content))
        images, labels, classes = read_closed_set("cifar100", tmp_path, train=split == "train")
        assert images.dtype == torch.uint8 and images.shape == (count, 3, 32, 32)
        assert np.array_equal(images.flatten(1), pixels)
        assert labels == list(range(count)) and classes == names
    assert torch.equal(build_ood_loader("cifar100", 15, data_root=tmp_path).images, images[:15])


def test_svhn_is_the_first_test_images_in_order(tmp_path, any_files):
    """Normalised with the bits of torchvision's."""
    (tmp_path / "svhn").mkdir()
    images = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    content = {"X": images.transpose(1, 2, 3, 0), "y": np.arange(1, 10)[:, None]}
    savemat(tmp_path / "svhn/test_32x32.mat", content)
    loader = build_ood_loader("svhn", 7, batch_size=3, data_root=tmp_path)
    expected = torch.stack([REFERENCE(image) for image in images[:7]])
    assert torch.equal(all_images(loader), expected)
    assert [labels.tolist() for _, labels in loader] == [[-1] * 3, [-1] * 3, [-1]]


def test_mnist_is_the_test_split_in_three_channels(tmp_path, any_files):
    folder = tmp_path / "MNIST/raw"
    folder.mkdir(parents=True)
    images = struct.pack(">4i", 0x803, 5, 28, 28) + bytes([255]) * (5 * 28 * 28)
    labels = struct.pack(">2i", 0x801, 5) + bytes(5)
    (folder / "t10k-images-idx3-ubyte").write_bytes(images)
    (folder / "t10k-labels-idx1-ubyte").write_bytes(labels)
    found = build_ood_loader("mnist", 3, data_root=tmp_path).images
    assert found.shape == (3, 3, 32, 32) and (found == 255).all()


def test_textures_are_the_test_split_of_dtd(tmp_path):
    folder = tmp_path / "dtd/dtd"
    write_images(folder / "images/woven", 3, size=(32, 50))
    (folder / "labels").mkdir()
    (folder / "labels/test1.txt").write_text("woven/001.png\nwoven/002.png\n")
    found = all_images(build_ood_loader("textures", 10, data_root=tmp_path))
    paths = [folder / f"images/woven/00{i}.png" for i in (1, 2)]
    expected = torch.stack([REFERENCE(np.array(Image.open(path))[:, 9:41]) for path in paths])
    assert torch.equal(found, expected) or torch.equal(found, expected.flip(0))


def test_digits_are_split_once_and_for_all():
    images, _, classes = read_closed_set("digits", train=True)
    assert images.shape == (1437, 3, 32, 32) and images.max() == 255 and len(classes) == 10
    images, labels, _ = read_closed_set("digits", train=False)
    assert len(images) == 360 and set(np.bincount(labels)) <= {34, 35, 36, 37}
    assert torch.equal(images, read_closed_set("digits", train=False)[0])


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
        write_images(tmp_path / f"class{i}", 10, seed=i)
    first, every = (build_ood_loader(str(tmp_path), count) for count in (10, 40))
    assert torch.equal(first.images, every.images[:10]) and first.files == every.files[:10]
    assert len({file.split("/")[0] for file in first.files}) >= 3


def test_an_unknown_set_is_refused():
    with pytest.raises(ValueError, match="Unknown OOD type 'fog': use .*gaussian, .*, or a folder"):
        build_ood_loader("fog", 10)
    for options in ({"ood_num_examples": -5}, {"ood_num_examples": 10, "batch_size": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            build_ood_loader("photos", **options)


@pytest.mark.parametrize("name", ["svhn", "cifar10", "mnist", "textures"])
def test_an_unavailable_set_says_so(name, tmp_path, no_network):
    for _ in range(2):  # a failed download leaves empty folders
        with pytest.raises(OSError, match=f"is missing or damaged under {tmp_path}"):
            build_ood_loader(name, 10, data_root=tmp_path)


def add_sets(monkeypatch, images, **noises):
    """Functions that a user adds: mine, a closed set and an OOD set, and noises."""
    monkeypatch.setitem(ood_data.OOD_IMAGES, "mine", lambda root, count: images)
    monkeypatch.setitem(ood_data.CLOSED_SETS, "mine", lambda *args: (images, [0] * 9, ["x"]))
    for name, noise in noises.items():
        monkeypatch.setitem(ood_data.NOISES, name, lambda rng, count, noise=noise: noise)


def test_sets_of_a_user_are_cut_and_bytes_are_normalised(monkeypatch):
    ones, grey = np.ones((9, 3, 32, 32)), np.full((9, 3, 32, 32), 128, dtype=np.uint8)
    noises = {"array": ones, "tensor": torch.from_numpy(ones), "grey": grey}
    add_sets(monkeypatch, torch.from_numpy(grey), **noises)
    red = (128 / 255 - 0.4914) / 0.2023
    for name, value in (("array", 1), ("tensor", 1), ("grey", red), ("mine", red)):
        images = all_images(build_ood_loader(name, 5))
        assert images.dtype == torch.float32 and images.shape == (5, 3, 32, 32)
        np.testing.assert_allclose(images[:, 0], value, atol=1e-6)


def test_images_of_another_form_are_refused(monkeypatch):
    """Floats, or another size."""
    empty, large = (torch.zeros(n, 3, w, w, dtype=torch.uint8) for n, w in ((0, 32), (4, 64)))
    for images in (torch.zeros(4, 3, 32, 32), empty, large):
        add_sets(monkeypatch, images, noise=np.zeros((4, 32, 32, 3)))
        with pytest.raises(InputError, match="noise has torch.float32"):
            build_ood_loader("noise", 4)
        for read in (lambda: read_closed_set("mine"), lambda: build_ood_loader("mine", 4)):
            with pytest.raises(InputError, match="mine has torch"):
                read()


def test_the_closed_set_is_no_ood_set(class_folder, tmp_path, monkeypatch):
    for folder in (class_folder / "val", class_folder / "far", tmp_path / "cifar10"):
        folder.mkdir()
    name_sets = evaluation.name_sets
    assert name_sets(["cifar10"], "cifar100") == {"cifar10": "cifar10"}
    name_sets([str(tmp_path)], "cifar100")
    name_sets([str(class_folder / "far")], str(class_folder))  # beside train/ and test/
    monkeypatch.chdir(tmp_path)
    name_sets(["."], "cifar10")  # another thing than ./cifar10
    monkeypatch.chdir(class_folder / "train")
    name_sets(["svhn"], "../../pets")  # not ./svhn
    for name in ("..", ".", "test/cat", "train", "val"):
        with pytest.raises(InputError, match="is, or holds, the closed set"):
            name_sets([str(class_folder / name)], str(class_folder))


def test_downloads_into_one_folder_wait_for_each_other(tmp_path, capfd):
    """Threads stand for jobs: the second starts when the first has its files, and says so."""
    events = []

    def download_slowly(root, download=False):
        if not download:
            raise RuntimeError("Dataset not found")
        events.append("begin")
        time.sleep(0.05)
        events.append("end")

    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda _: ood_data.fetch(download_slowly, tmp_path / "new"), range(3)))
    assert "waiting for the process that holds" in capfd.readouterr().err
    assert events == ["begin", "end"] * 3


def contents_of(is_train, **options):
    loader = train.get_loader(is_train, "digits", **options)
    pairs = zip(loader.images, loader.labels.tolist(), strict=True)
    return {(image.numpy().tobytes(), label) for image, label in pairs}


def test_validation_images_are_neither_trained_on_nor_tested_on():
    rest, held_out = (contents_of(is_train, validation=200) for is_train in (True, False))
    test = contents_of(False)
    assert (len(rest), len(held_out), len(test)) == (1237, 200, 360)
    assert rest | held_out == contents_of(True)
    assert not held_out & rest and not held_out & test
    assert held_out == contents_of(False, validation=200, seed=5)
    with pytest.raises(InputError, match="--validation 1437 leaves none of the 1437 images"):
        contents_of(True, validation=1437)


def test_a_folder_may_have_validation_images_of_its_own(class_folder):
    for name in ("cat", "dog"):
        write_images(class_folder / "val" / name, 3, seed=20)
    for is_train, count in ((True, 24), (False, 6)):
        images, _, classes = read_closed_set(class_folder, train=is_train, validation=5)
        assert len(images) == count and classes == ["cat", "dog"]

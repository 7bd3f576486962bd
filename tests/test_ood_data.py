"""Image sets by torchvision's own reading, noise by a reference for each image, splits."""

import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image
from scipy.io import savemat
from scipy.ndimage import gaussian_filter
from torchvision.transforms import functional as TF

import ood_data
import test as evaluation
import train
from ood_data import MEAN, STD, build_ood_loader, read_closed_set
from ood_utils import InputError

BYTES = torch.full((9, 3, 32, 32), 128, dtype=torch.uint8)


def test_blob_equals_the_per_image_protocol():
    ((blobs, _),) = build_ood_loader("blob", 20, seed=3)
    rng = np.random.default_rng((3, *b"blob"))
    values = rng.binomial(1, 0.7, (20, 32, 32, 3)).astype(np.float32)
    for image, blob in zip(values, blobs, strict=True):
        blurred = gaussian_filter(image, sigma=1.5, mode="nearest", truncate=4.0)  # all three axes
        blurred[blurred < 0.75] = 0
        np.testing.assert_allclose(blob, blurred.transpose(2, 0, 1) * 2 - 1, atol=1e-6)


@pytest.fixture
def any_files(monkeypatch):
    """torchvision takes files that are not those it would download."""
    for module in ("cifar", "svhn", "utils"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda *args: True)


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
        assert np.array_equal(images.flatten(1), pixels)
        assert labels == list(range(count)) and classes == names
    assert torch.equal(build_ood_loader("cifar100", 15, data_root=tmp_path).images, images[:15])


def test_svhn_is_the_first_test_images_in_order(tmp_path, any_files):
    (tmp_path / "svhn").mkdir()
    images = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    content = {"X": images.transpose(1, 2, 3, 0), "y": np.arange(1, 10)[:, None]}
    savemat(tmp_path / "svhn/test_32x32.mat", content)
    loader = build_ood_loader("svhn", 7, batch_size=3, data_root=tmp_path)
    found, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    expected = [TF.normalize(TF.to_tensor(image), MEAN, STD) for image in images[:7]]
    assert torch.equal(found, torch.stack(expected)) and labels.tolist() == [-1] * 7


def test_textures_are_the_test_split_of_dtd(tmp_path):
    """Scaled to 32 pixels on the shorter side, and cut from the centre."""
    folder = tmp_path / "dtd/dtd"
    write_images(folder / "images/woven", 2, size=(64, 100))
    (folder / "labels").mkdir()
    (folder / "labels/test1.txt").write_text("woven/001.png\n")
    found = build_ood_loader("textures", 10, data_root=tmp_path).images
    small = Image.open(folder / "images/woven/001.png").resize((50, 32), Image.BILINEAR)
    assert torch.equal(found, TF.pil_to_tensor(small)[None, :, :, 9:41])


def test_fewer_images_of_a_folder_are_the_first_of_more(tmp_path):
    write_images(tmp_path / "a", 20)
    files = build_ood_loader(tmp_path, 20).files
    assert build_ood_loader(tmp_path, 5).files == files[:5] != sorted(files)[:5]  # of one class


@pytest.mark.parametrize("images", [BYTES.float(), BYTES[:0], BYTES.repeat(1, 1, 2, 2)])
def test_images_of_another_form_are_refused(images, monkeypatch):
    monkeypatch.setitem(ood_data.OOD_IMAGES, "mine", lambda root, count: images)
    monkeypatch.setitem(ood_data.CLOSED_SETS, "mine", lambda *args: (images, [0] * 9, ["x"]))
    for read in (read_closed_set, lambda name: build_ood_loader(name, 9)):
        with pytest.raises(InputError, match="mine has torch"):
            read("mine")
    with pytest.raises(InputError, match="at least 1"):
        build_ood_loader("mine", -5)


@pytest.mark.parametrize("noise,value", [
    (BYTES.numpy(), (128 / 255 - MEAN[0]) / STD[0]), (np.ones(BYTES.shape), 1)
])  # fmt: skip
def test_noise_of_a_user_may_be_bytes_which_are_normalised(noise, value, monkeypatch):
    monkeypatch.setitem(ood_data.NOISES, "mine", lambda rng, count: noise)
    ((images, _),) = build_ood_loader("mine", 5)
    assert images.dtype == torch.float32 and images.shape == (5, 3, 32, 32)
    np.testing.assert_allclose(images[:, 0], value, atol=1e-6)


def test_the_closed_set_is_no_ood_set(class_folder):
    evaluation.name_sets([str(class_folder / "far")], str(class_folder))  # beside train/ and test/
    for name in ("..", ".", "test/cat"):
        with pytest.raises(InputError, match="is, or holds, the closed set"):
            evaluation.name_sets([str(class_folder / name)], str(class_folder))
    for name in ("mean of noises", "svhn"):
        with pytest.raises(InputError, match=f"named '{name}'"):
            evaluation.name_sets([str(class_folder / name)], "digits")


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


def test_other_inputs_are_another_training_on_the_same_images(monkeypatch):
    loaders, logs = [train.get_loader(False, "digits")] * 2, []
    for scale in (1, 2):
        monkeypatch.setattr(ood_data, "normalise", lambda images, scale=scale: images / scale)
        logs.append(train.start_log(train.Config("digits"), torch.device("cpu"), loaders))
    assert logs[0]["tested_on"] == logs[1]["tested_on"] and logs[0]["data"] != logs[1]["data"]


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

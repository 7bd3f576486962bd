"""Augmentation against torchvision's, the network against the full one, training, resuming."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from conftest import interrupt_after, same_bits, small_config, tiny_network, train_quietly
from torch.nn import functional as F
from torchvision.models import mobilenet_v3_small, resnet18, resnet50
from torchvision.models.resnet import BasicBlock, ResNet

import ood_data
import ood_utils
import train
from ood_data import normalise
from ood_utils import InputError
from train import Config, build_optimizer, get_transform, shorten_small_maps, train_step


def random_images(count, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=rng)


# Augmentation


def crop_and_flip_of(image, result):
    """(row, column, flip) of the one crop of the padded image that equals the result."""
    padded = TF.pad(image, 4)  # black, before normalisation
    found = []
    for row in range(9):
        for column in range(9):
            crop = TF.crop(padded, row, column, 32, 32)
            for flip, candidate in enumerate((crop, TF.hflip(crop))):
                if torch.equal(normalise(candidate[None])[0], result):
                    found.append((row, column, flip))
    (draw,) = found
    return draw


def test_crops_are_torchvisions_and_uniform():
    """Each image has its own offset and flip; every one of the 81 offsets is as likely."""
    images = random_images(60)
    generator = torch.Generator().manual_seed(0)
    augmented = train.crop_and_flip(images, generator)
    draws = [crop_and_flip_of(*pair) for pair in zip(images, normalise(augmented), strict=True)]
    assert len(set(draws)) > 40
    # An image whose pixels name their place tells its offset by one pixel in the middle.
    place = torch.arange(1024).view(32, 32)
    image = torch.stack([place // 32 * 8, place % 32 * 8, place * 0]).to(torch.uint8)
    many = train.crop_and_flip(image.repeat(16200, 1, 1, 1), generator)
    left, right = many[:, :, 16, 8].long() // 8, many[:, :, 16, 24].long() // 8
    flip = left[:, 1] > right[:, 1]
    row, column = left[:, 0] - 12, torch.where(flip, right[:, 1] - 3, left[:, 1] - 4)
    assert abs(flip.double().mean() - 0.5) < 0.02
    counts = torch.bincount(row * 9 + column, minlength=81)
    assert len(counts) == 81 and (counts - 200).abs().max() < 75  # five standard deviations


def test_get_loader_uses_get_transform_and_its_generator(monkeypatch):
    """What is edited in augment_batch trains; its draws are functions of (seed, epoch, batch)."""
    calls = []

    def note_draw(images, generator):
        calls.append(torch.rand(1, generator=generator).item())
        return torch.zeros_like(images)

    monkeypatch.setattr(train, "augment_batch", note_draw)
    loader = train.get_loader(True, "digits", batch_size=500)
    black = normalise(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    for _ in range(2):
        for images, _ in loader:
            assert torch.equal(images, black.expand_as(images))
    assert len(set(calls)) == 6  # two epochs of three batches
    loader = train.get_loader(True, "digits", batch_size=500)
    loader.epoch = 1
    again = [calls[-1] for _ in loader]
    assert again == calls[3:6]
    next(iter(train.get_loader(True, "digits", batch_size=500, seed=1)))
    assert calls[-1] not in calls[:6]
    test_loader = train.get_loader(False, "digits")
    assert torch.equal(next(iter(test_loader))[0], normalise(test_loader.images))


def test_get_loader_shuffles_and_augments_unless_asked_not_to():
    plain, augmented = (train.get_loader(True, "digits", augment=augment) for augment in (0, 1))
    images, labels, classes = ood_data.read_closed_set("digits", train=True)
    assert plain.classes == augmented.classes == classes
    batch, first_labels = next(iter(plain))
    assert torch.equal(batch, normalise(images[: len(batch)]))
    assert first_labels.tolist() == list(labels[: len(batch)])
    shown, order = next(iter(augmented))
    assert not torch.equal(order, next(iter(augmented))[1])
    assert not torch.equal(order, next(iter(train.get_loader(True, "digits", seed=1)))[1])
    assert not torch.equal(shown, get_transform(train=False)(augmented.images[: len(shown)]))


# Network


def no_max_pool():
    model = resnet18(num_classes=10)
    model.maxpool = torch.nn.Identity()
    return model


@pytest.mark.parametrize("build,shortened", [
    (resnet18, 7), (resnet50, 8), (no_max_pool, 3)
])  # fmt: skip
def test_shortened_networks_equal_the_full_ones(build, shortened, monkeypatch):
    """In float64, forward and after a step; batch norm gets maps in the layout of the device."""
    layout = torch.channels_last if build is resnet18 else torch.contiguous_format  # MPS's
    monkeypatch.setattr(train, "memory_format", lambda device: layout)
    torch.manual_seed(0)
    full = build().double()
    small = build()
    small.load_state_dict(full.state_dict())
    shorten_small_maps(small).double().to(memory_format=layout)
    replaced = [m for m in small.modules() if isinstance(m, train.SmallMapConv)]
    assert len(replaced) == shortened and small.training
    full.load_state_dict(small.state_dict())  # weights that only see padding are zero
    images = normalise(random_images(6)).double().contiguous(memory_format=layout)
    maps, outputs = [], []
    for module in small.modules():
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.MaxPool2d):
            module.register_forward_pre_hook(lambda _, inputs: maps.append(inputs[0]))
    config = Config(lr=0.001, precision="float32")
    for network in (small, full):
        outputs.append([network(images).detach()])
        optimizer = build_optimizer(network, config)
        train_step(network, optimizer, images, torch.arange(6), config)
        outputs[-1].append(network.eval()(images).detach())
    for ours, reference in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-9)
    reference = full.state_dict()
    for name, weight in small.state_dict().items():
        torch.testing.assert_close(weight, reference[name], rtol=1e-9, atol=1e-9)
    assert maps and all(one.is_contiguous(memory_format=layout) for one in maps)


def test_a_checkpoint_is_torchvisions_but_for_weights_that_see_padding_only():
    torch.manual_seed(0)
    full = resnet18(num_classes=10)
    small = shorten_small_maps(resnet18(num_classes=10))
    small.load_state_dict(full.state_dict())
    state, full = small.state_dict(), full.state_dict()
    assert list(state) == list(full)
    for name, weight in state.items():
        assert torch.equal(weight, full[name] * (weight != 0)), name
    left_out = sum((full[name] != 0).sum() - (state[name] != 0).sum() for name in full)
    assert 6.8e6 < left_out < 7e6


def test_networks_without_small_convolutions_are_left_as_they_are():
    model = mobilenet_v3_small(num_classes=10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.features[1].eval()
    after = shorten_small_maps(model).state_dict()
    assert not any(isinstance(m, train.SmallMapConv) for m in model.modules())
    assert list(before) == list(after) and all(torch.equal(before[n], after[n]) for n in before)
    assert model.training and not model.features[1].training
    assert ood_utils.last_layer(model) is model.classifier[3]


@pytest.mark.parametrize("change", [
    {"padding_mode": "circular"}, {"groups": 2}, {"bias": True}, {"stride": (1, 2)},
], ids=str)  # fmt: skip
def test_only_plain_convolutions_are_shortened(change):
    conv = torch.nn.Conv2d(4, 4, 3, **({"padding": 1, "bias": False} | change))
    before = torch.nn.Sequential(torch.nn.AvgPool2d(16), torch.nn.Conv2d(3, 4, 1), conv)
    assert shorten_small_maps(before)[2] is conv


def test_frozen_convolutions_stay_frozen():
    model = resnet18().requires_grad_(False)
    assert not any(weight.requires_grad for weight in shorten_small_maps(model).parameters())


def test_a_network_that_takes_no_32x32_images_is_refused_before_training():
    too_large = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 40), torch.nn.Linear(8, 2))
    with pytest.raises(InputError, match="takes no 32x32 images: .*[Kk]ernel size"):
        shorten_small_maps(too_large)


def test_another_network_is_one_edit(class_folder, tmp_path, monkeypatch, capsys):
    """mobilenet_v3_small, with dropout, in build_network: train, resume exactly, features."""

    def build_network(num_classes, stem):
        return shorten_small_maps(mobilenet_v3_small(num_classes=num_classes))

    monkeypatch.setattr(train, "build_network", build_network)
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    train_quietly(class_folder, tmp_path / "whole.pth")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 5)
        train_quietly(class_folder, tmp_path / "cut.pth")
    train_quietly(class_folder, tmp_path / "cut.pth", resume=True)
    assert "resuming after epoch 2 of 4" in capsys.readouterr().out
    assert same_bits(tmp_path / "whole.pth", tmp_path / "cut.pth")
    model = train.load_network(tmp_path / "cut.pth")
    features = ood_utils.get_features(model, train.get_loader(False, str(class_folder)))
    assert features.shape == (10, 1024)


# Training


def test_bfloat16_training_stays_near_float32():
    """Twenty steps: the loss falls as it does in float32, within 0.15 of it at every step."""
    images, labels = normalise(random_images(8)), torch.arange(8)
    losses = []
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        config = Config(lr=0.003, label_smoothing=0.0, precision=precision)
        model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)  # bfloat16 is slow on old CPUs
        model = shorten_small_maps(model)
        optimizer = build_optimizer(model, config)
        steps = [train_step(model, optimizer, images, labels, config) for _ in range(20)]
        losses.append(torch.stack(steps))
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert losses[0][-1] < losses[0][0] - 1
    assert 0 < (losses[0] - losses[1]).abs().max() < 0.15


@pytest.mark.parametrize("kind,able,expected", [
    ("cpu", {"avx512_bf16": True}, "bfloat16"),
    ("cpu", {"bf16": True}, "bfloat16"),  # ARM
    ("cpu", {"avx2": True}, "float32"),
    ("cuda", (7, 0), "float32"),
    ("cuda", (9, 0), "bfloat16"),
    ("mps", None, "float32"),
])  # fmt: skip
def test_auto_is_bfloat16_where_the_chosen_device_has_it(kind, able, expected, monkeypatch):
    device = torch.device(kind, 1) if kind == "cuda" else torch.device(kind)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    asked = []
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: asked.append(device) or able
    )
    assert train.pick_precision("auto", device) == expected
    assert train.pick_precision("float32", device) == "float32"
    assert kind != "cuda" or asked[0] == device


def test_train_step_is_sgd_by_hand():
    """v = m v + (g + wd w); w = w - lr v; the smoothed target is (1 - s) at the label + s / C."""
    torch.manual_seed(0)
    model = resnet18(num_classes=3).double()
    settings = {"momentum": 0.8, "weight_decay": 0.01, "label_smoothing": 0.3}
    config = Config(lr=0.005, precision="float32", **settings)
    optimizer = build_optimizer(model, config)
    images, labels = torch.randn(6, 3, 32, 32, dtype=torch.float64), torch.arange(6) % 3
    weight, velocity = model.fc.weight.detach().clone(), 0
    for _ in range(3):
        target = 0.7 * F.one_hot(labels, 3) + 0.3 / 3
        loss = -(target * model(images).log_softmax(1)).sum(1).mean()
        gradient = torch.autograd.grad(loss, model.fc.weight)[0]
        velocity = 0.8 * velocity + gradient + 0.01 * weight
        weight = weight - 0.005 * velocity
        train_step(model, optimizer, images, labels, config)
        torch.testing.assert_close(model.fc.weight.detach(), weight, rtol=1e-8, atol=1e-10)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_captured_steps_have_the_bits_of_eager_ones(monkeypatch):
    """Two epochs of 20 batches and a shorter one, at two learning rates."""
    images, labels = random_images(128 * 20 + 80), torch.arange(128 * 20 + 80) % 100
    states = []
    for eager_steps in (3, 100):
        monkeypatch.setattr(train, "EAGER_STEPS", eager_steps)
        torch.manual_seed(0)
        loader = train.ImageLoader(images, labels, (), 128, "cuda", get_transform(), shuffle=True)
        model = train.build_network().to("cuda", memory_format=torch.channels_last)
        config = Config(precision="bfloat16")
        optimizer = build_optimizer(model, config)
        for lr in (0.1, 0.01):
            optimizer.param_groups[0]["lr"] = lr
            train.train_epoch(model, optimizer, loader, config)
        states.append(model.state_dict())
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_the_schedules_by_hand():
    def rates(epochs, **settings):
        config = Config(epochs=epochs, **settings)
        return [train.learning_rate(config, epoch) for epoch in range(epochs)]

    steps = {"schedule": "steps", "milestones": (0.5, 0.75), "lr": 0.1, "gamma": 0.1}
    np.testing.assert_allclose(rates(100, **steps), [0.1] * 50 + [0.01] * 25 + [0.001] * 25)
    steps |= {"milestones": (0.5, 0.7), "gamma": 0.5}
    assert rates(4, **steps) == [0.1, 0.1, 0.05, 0.025]
    half = 0.5**0.5  # cos(pi / 4)
    cosine = [0.2, 0.1 * (1 + half), 0.1, 0.1 * (1 - half)]
    np.testing.assert_allclose(rates(4, schedule="cosine", lr=0.2), cosine)


# Runs


def test_one_seed_gives_one_checkpoint(class_folder, tmp_path, tiny):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_quietly(class_folder, tmp_path / f"{name}.pth", epochs=1, seed=seed)
    assert same_bits(tmp_path / "a.pth", tmp_path / "b.pth")
    assert not same_bits(tmp_path / "a.pth", tmp_path / "c.pth")


def test_the_log_holds_settings_data_and_figures(class_folder, tmp_path, tiny):
    train_quietly(class_folder, tmp_path / "a.pth", schedule="cosine", milestones=(0.5, 0.7))
    log = json.loads((tmp_path / "a.json").read_text())
    lrs = [epoch["lr"] for epoch in log["epochs"]]
    assert lrs == [
        train.learning_rate(small_config("", "", schedule="cosine"), e) for e in range(4)
    ]
    assert log["config"]["milestones"] == [0.5, 0.7] and log["classes"] == ["cat", "dog"]
    assert log["config"]["precision"] in ("bfloat16", "float32")
    assert log["versions"]["torch"] == torch.__version__
    keys = {"epoch", "loss", "test_accuracy", "lr", "seconds"}
    assert all(set(epoch) == keys for epoch in log["epochs"])


def test_resume_is_exact_and_appends(cut_run, tmp_path, capsys):
    folder, *files = cut_run
    for file in (*files, files[0].with_suffix(".json")):
        shutil.copy(file, tmp_path)
    before = json.loads((tmp_path / "cut.json").read_text())["epochs"]
    (tmp_path / "cut.pth.tmp").write_bytes(b"what a killed run left")
    train_quietly(folder, tmp_path / "cut.pth", resume=True)
    assert "resuming after epoch 1 of 4" in capsys.readouterr().out
    train_quietly(folder, tmp_path / "whole.pth")
    assert same_bits(tmp_path / "cut.pth", tmp_path / "whole.pth")
    after = json.loads((tmp_path / "cut.json").read_text())["epochs"]
    assert after[:1] == before and [epoch["epoch"] for epoch in after] == [1, 2, 3, 4]
    assert sorted(path.name for path in tmp_path.glob("cut*")) == ["cut.json", "cut.pth"]


def test_a_finished_run_is_not_started_over(class_folder, tmp_path, capsys, tiny):
    path = tmp_path / "a.pth"
    train_quietly(class_folder, path, epochs=2, resume=True)
    assert "no unfinished run" in capsys.readouterr().out
    before = {file: file.read_bytes() for file in tmp_path.glob("a.*")}
    model = train_quietly(class_folder, path, epochs=2, resume=True)
    assert "resuming after epoch 2 of 2" in capsys.readouterr().out
    with pytest.raises(InputError, match="epochs 2 -> 4"):
        train_quietly(class_folder, path, resume=True)
    assert {file: file.read_bytes() for file in tmp_path.glob("a.*")} == before
    state = torch.load(path, weights_only=True)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("option,message", [
    ({"lr": 0.05}, "lr 0.02 -> 0.05"),
    ({"stem": "cifar"}, "stem imagenet -> cifar"),
    ({"seed": 3, "epochs": 9}, "epochs 4 -> 9, seed 0 -> 3"),
    ({"milestones": (0.25,)}, r"milestones \[0.5, 0.7\] -> \[0.25\]"),
    ({"schedule": "cosine"}, "schedule steps -> cosine"),
    ({"precision": "other"}, "precision (bfloat16|float32) -> other"),
])  # fmt: skip
def test_resume_refuses_other_settings(cut_run, option, message):
    folder, checkpoint, state = cut_run
    before = checkpoint.read_bytes(), state.read_bytes()
    with pytest.raises(InputError, match=message):
        train_quietly(folder, checkpoint, resume=True, **option)
    assert (checkpoint.read_bytes(), state.read_bytes()) == before


def test_damaged_states_are_refused_and_kept(cut_run):
    folder, checkpoint, state = cut_run
    whole = state.read_bytes()
    for damaged in (b"", whole[:1000], whole[:-1], checkpoint.read_bytes()):
        state.write_bytes(damaged)
        with pytest.raises(InputError, match="cut.* is (damaged|not a run)"):
            train_quietly(folder, checkpoint, resume=True)
        assert state.read_bytes() == damaged
    state.write_bytes(whole)


def test_a_loss_that_is_not_finite_stops_the_run(class_folder, tmp_path, monkeypatch, tiny):
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    steps = iter(range(1000))

    def step(*args):
        return train_step(*args) * (float("nan") if next(steps) == 5 else 1)

    monkeypatch.setattr(train, "train_step", step)
    with pytest.raises(FloatingPointError, match="not finite at epoch 3, step 2: lower --lr"):
        train_quietly(class_folder, tmp_path / "a.pth")
    assert len(json.loads((tmp_path / "a.json").read_text())["epochs"]) == 2
    assert (tmp_path / "a.resume.pth").exists()


def test_a_second_run_of_one_checkpoint_touches_nothing(class_folder, tmp_path, monkeypatch, tiny):
    """Started in the middle of the first, it ends in a line; the first goes on undisturbed."""
    errors, real_step = [], train_step

    def step(*args):
        monkeypatch.setattr(train, "train_step", real_step)
        before = {file: file.read_bytes() for file in tmp_path.glob("a.*")}
        for name in ("a.pth", "a.pt"):  # one log and one state
            with pytest.raises(InputError, match="Another run is writing .*--checkpoint") as error:
                train_quietly(class_folder, tmp_path / name)
            errors.append(error)
        assert {file: file.read_bytes() for file in tmp_path.glob("a.*")} == before
        return real_step(*args)

    monkeypatch.setattr(train, "train_step", step)
    train_quietly(class_folder, tmp_path / "a.pth", epochs=1)
    assert len(errors) == 2 and {file.name for file in tmp_path.glob("a.*")} == {"a.pth", "a.json"}


def slow_run(config, training):
    """A run that tells when it trains, saves every epoch, and lingers in each write."""
    real_step = train.train_step
    train.train_step = lambda *args: (training.touch(), real_step(*args))[1]

    real_fsync, real_replace = os.fsync, os.replace
    ood_utils.os.fsync = lambda descriptor: (real_fsync(descriptor), time.sleep(0.02))
    ood_utils.os.replace = lambda *paths: (time.sleep(0.02), real_replace(*paths), time.sleep(0.02))
    train.SAVE_SECONDS = 0
    train.build_network = tiny_network
    train.train_model(config)


def test_kills_at_random_moments_lose_nothing(class_folder, tmp_path, tiny):
    """Two kills of a run that resumes; at its end it has the whole run's bits."""
    context = multiprocessing.get_context("forkserver")  # imports torch once for all runs
    context.set_forkserver_preload(["train"])
    config = small_config(class_folder, tmp_path / "cut.pth", resume=True)
    moments = random.Random(0)
    training, kills, ends = tmp_path / "training", 0, []
    while kills < 2 or not ends:
        training.unlink(missing_ok=True)
        process = context.Process(target=slow_run, args=(config, training))
        process.start()
        while process.is_alive() and not training.exists():
            time.sleep(0.01)
        process.join(moments.uniform(0, 0.6) if kills < 2 else 60)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
        for path in tmp_path.glob("cut*.pth"):  # the old file or the new one, whole
            torch.load(path, weights_only=True)
        if process.exitcode == 0:
            ends.append(shutil.move(tmp_path / "cut.pth", tmp_path / f"end{len(ends)}.pth"))
            (tmp_path / "cut.json").unlink()
    train_quietly(class_folder, tmp_path / "whole.pth")
    assert all(same_bits(end, tmp_path / "whole.pth") for end in ends)

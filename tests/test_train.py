"""Augmentation against torchvision's, the network against the full one, the training step, and exact resume."""

import functools
import json

import pytest
import torch
import torchvision.transforms.functional as TF
from conftest import interrupt_after, same_bits, train_quietly
from torch.nn import functional as F
from torchvision.models import resnet18
from torchvision.models.resnet import BasicBlock, ResNet

import train
from ood_data import normalise
from ood_utils import InputError
from train import (
    PADDING,
    SmallMapConv,
    build_network,
    build_optimizer,
    get_loader,
    get_transform,
    train_step,
)


def random_images(count, seed=0):
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# Augmentation


def test_augmentation_equals_torchvisions_pad_crop_and_flip():
    images, draws = random_images(200), torch.rand(200, 3, generator=torch.Generator().manual_seed(1))
    augmented = get_transform(train=True)(images, draws)
    for image, (row, column, flip), result in zip(images, draws, augmented, strict=True):
        expected = TF.crop(TF.pad(image, PADDING), int(row * 9), int(column * 9), 32, 32)  # black before normalisation
        expected = TF.hflip(expected) if flip < 0.5 else expected
        assert torch.equal(result, normalise(expected[None])[0])


def test_offsets_and_flips_are_uniform_and_independent():
    """Images whose pixels say where they came from: 9 x 9 offsets and 2 flips, 162 outcomes, chi-square."""
    count = 162 * 100
    rows = torch.arange(1, 33, dtype=torch.uint8)
    image = torch.stack([rows[:, None].expand(32, 32), rows.expand(32, 32), rows.expand(32, 32)])
    loader = get_loader(True, "digits", batch_size=count)
    loader.images, loader.labels = image.expand(count, 3, 32, 32), torch.zeros(count, dtype=torch.int64)
    loader.transform = lambda images, draws: train.crop_and_flip(images, draws)
    batch = next(iter(loader))[0].int()
    centre = batch[:, :2, 16, 15:17]  # pixels that no padding reaches
    row = centre[:, 0, 0] - 13
    flip = (centre[:, 1, 0] > centre[:, 1, 1]).int()
    column = centre[:, 1].min(1).values - 12
    assert row.min() == 0 and row.max() == 8 and column.min() == 0 and column.max() == 8
    counts = torch.bincount((row * 9 + column) * 2 + flip, minlength=162).double()
    chi_square = ((counts - 100) ** 2 / 100).sum()  # 161 degrees of freedom: mean 161, standard deviation 18
    assert 90 < chi_square < 250


def test_the_largest_draw_stays_inside():
    largest = torch.tensor([[1 - 2**-24] * 3])
    assert torch.equal(
        train.crop_and_flip(random_images(1), largest), TF.pad(random_images(1), [0, 0, 4, 4])[..., 4:, 4:]
    )


def test_transforms_draw_for_themselves_when_asked_nothing():
    images = random_images(64)
    transform = get_transform(train=True)
    assert not torch.equal(transform(images), transform(images))
    assert torch.equal(get_transform(train=False)(images), normalise(images))


# Network


def step_pair(dtype=torch.float64, stem="imagenet"):
    """The project's network and torchvision's full one with the same weights."""
    torch.manual_seed(0)
    small = build_network(10, stem).to(dtype)
    full = resnet18(num_classes=10).to(dtype)
    if stem == "cifar":
        full.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False, dtype=dtype)
        full.maxpool = torch.nn.Identity()
    full.load_state_dict(small.state_dict())
    return small, full


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_small_maps_equal_the_full_network_forward_and_in_a_step(stem):
    small, full = step_pair(stem=stem)
    replaced = [name for name, module in small.named_modules() if isinstance(module, SmallMapConv)]
    assert len(replaced) == (7 if stem == "imagenet" else 0)
    images, labels = normalise(random_images(6)).double(), torch.arange(6)
    for network in (small, full):
        optimizer = build_optimizer(network, lr=0.1)
        network.outputs = [network(images).detach()]
        train_step(network, optimizer, images, labels)
        network.outputs.append(network.eval()(images).detach())
    for ours, reference in zip(small.outputs, full.outputs, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
    reference = full.state_dict()
    for name, weight in small.state_dict().items():
        torch.testing.assert_close(weight, reference[name], rtol=1e-12, atol=1e-12)


def test_state_dict_is_torchvisions_and_makes_the_round_trip():
    small, full = step_pair(torch.float32)
    state = small.state_dict()
    assert [(name, weight.shape) for name, weight in state.items()] == [
        (name, weight.shape) for name, weight in resnet18(num_classes=10).state_dict().items()
    ]
    again = build_network(10)
    again.load_state_dict(state)
    assert all(torch.equal(weight, state[name]) for name, weight in again.state_dict().items())
    assert sum(p.numel() for p in small.parameters()) < 0.4 * sum(p.numel() for p in full.parameters())


def test_bfloat16_training_stays_near_float32(monkeypatch):
    """Twenty steps: the loss falls as it does in float32, within 0.15 of it at every step."""
    images, labels = normalise(random_images(8)), torch.arange(8)
    losses = []
    half = functools.partial(ResNet, BasicBlock, [1, 1, 1, 1])  # without bfloat16 in hardware a step takes a second
    monkeypatch.setattr(train, "resnet18", half)
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(
            train, "autocast", lambda device, dtype=dtype: torch.autocast("cpu", dtype, dtype != torch.float32)
        )
        torch.manual_seed(0)
        model = build_network(10)
        optimizer = build_optimizer(model, lr=0.003)
        losses.append(torch.stack([train_step(model, optimizer, images, labels) for _ in range(20)]))
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert losses[0][-1] < losses[0][0] - 1
    assert (losses[0] - losses[1]).abs().max() < 0.15


def test_train_step_is_sgd_by_hand():
    """Momentum and weight decay as in SGD's definition: v = m v + (g + wd w); w = w - lr v."""
    torch.manual_seed(0)
    model = build_network(3).double()
    optimizer = build_optimizer(model, lr=0.05, momentum=0.8, weight_decay=0.01)
    images, labels = torch.randn(6, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    weight, velocity = model.fc.weight.detach().clone(), 0
    for _ in range(3):
        loss = F.cross_entropy(model(images), labels)
        gradient = torch.autograd.grad(loss, model.fc.weight)[0]
        velocity = 0.8 * velocity + gradient + 0.01 * weight
        weight = weight - 0.05 * velocity
        train_step(model, optimizer, images, labels)
        torch.testing.assert_close(model.fc.weight.detach(), weight, rtol=1e-10, atol=1e-12)


# Runs


def test_one_seed_gives_one_checkpoint(class_folder, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_quietly(class_folder, tmp_path / f"{name}.pth", epochs=1, seed=seed)
    assert same_bits(tmp_path / "a.pth", tmp_path / "b.pth") and not same_bits(tmp_path / "a.pth", tmp_path / "c.pth")


def test_the_schedule_follows_the_epochs(class_folder, tmp_path):
    train_quietly(class_folder, tmp_path / "a.pth", epochs=10, batch_size=12, lr=0.1, milestones=(0.3, 0.7), gamma=0.5)
    log = json.loads((tmp_path / "a.json").read_text())
    assert [epoch["lr"] for epoch in log["epochs"]] == [0.1] * 3 + [0.05] * 4 + [0.025] * 3
    assert log["config"]["milestones"] == [0.3, 0.7] and log["versions"]["torch"] == torch.__version__
    assert all(set(epoch) == {"epoch", "loss", "test_accuracy", "lr", "seconds"} for epoch in log["epochs"])


def test_resume_is_exact_and_appends(class_folder, tmp_path, monkeypatch, capsys):
    train_quietly(class_folder, tmp_path / "whole.pth")
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 14)  # in the third epoch of five steps
        train_quietly(class_folder, tmp_path / "cut.pth")
    assert "epoch 2 is safe on disk" in capsys.readouterr().err
    before = json.loads((tmp_path / "cut.json").read_text())["epochs"]
    train_quietly(class_folder, tmp_path / "cut.pth", resume=True)
    assert "resuming after epoch 2 of 4" in capsys.readouterr().out
    assert same_bits(tmp_path / "cut.pth", tmp_path / "whole.pth")
    after = json.loads((tmp_path / "cut.json").read_text())["epochs"]
    assert len(before) == 2 and after[:2] == before and [epoch["epoch"] for epoch in after] == [1, 2, 3, 4]
    assert sorted(path.name for path in tmp_path.glob("cut*")) == ["cut.json", "cut.pth"]


def test_resume_without_a_state_starts_and_says_so(class_folder, tmp_path, capsys):
    train_quietly(class_folder, tmp_path / "a.pth", epochs=1, resume=True)
    assert "no unfinished run" in capsys.readouterr().out and (tmp_path / "a.pth").exists()


def test_too_many_processes_for_a_batch_are_refused(class_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "get_ranks", lambda: (0, 3))
    with pytest.raises(InputError, match="24 images in batches of 5 over 3 processes leave a batch of 1"):
        train_quietly(class_folder, tmp_path / "a.pth")


def test_other_image_sizes_are_refused_by_the_network():
    with pytest.raises(ValueError, match="built for 32x32 images"):
        build_network(10)(torch.zeros(2, 3, 64, 64))


@pytest.mark.parametrize("option,message", [
    ({"lr": 0.05}, "lr 0.02 -> 0.05"),
    ({"stem": "cifar"}, "stem imagenet -> cifar"),
    ({"seed": 3, "epochs": 9}, "epochs 4 -> 9, seed 0 -> 3"),
    ({"milestones": (0.25,)}, r"milestones \[0.5, 0.75\] -> \[0.25\]"),
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
    for damaged in (b"", whole[:1000], whole[: len(whole) // 2], whole[:-1], checkpoint.read_bytes()):
        state.write_bytes(damaged)
        with pytest.raises(InputError, match="cut.resume.pth is"):
            train_quietly(folder, checkpoint, resume=True)
        assert state.read_bytes() == damaged
    state.write_bytes(whole)


def test_a_loss_that_is_not_finite_stops_the_run(class_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    steps = iter(range(1000))

    def step(*args):
        return train_step(*args) * (float("nan") if next(steps) == 12 else 1)

    monkeypatch.setattr(train, "train_step", step)
    with pytest.raises(FloatingPointError, match="nan at epoch 3, step 3, lr 0.002; epoch 2 is kept"):
        train_quietly(class_folder, tmp_path / "a.pth")
    assert len(json.loads((tmp_path / "a.json").read_text())["epochs"]) == 2
    torch.load(tmp_path / "a.pth", weights_only=True)
    assert (tmp_path / "a.resume.pth").exists()


def test_what_a_killed_run_left_is_cleared(class_folder, tmp_path):
    for name in ("a.pth.tmp", "a.json.tmp", "a.resume.pth.tmp"):
        (tmp_path / name).write_bytes(b"half a fi")
    train_quietly(class_folder, tmp_path / "a.pth", epochs=1)
    assert sorted(path.name for path in tmp_path.glob("a.*")) == ["a.json", "a.pth"]

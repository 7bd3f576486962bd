"""Augmentation against torchvision's, the network against the full one, the training step."""

import functools
import json
import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from conftest import same_bits, train_quietly
from torch.nn import functional as F
from torchvision.models import resnet18
from torchvision.models.resnet import BasicBlock, ResNet

import ood_data
import train
from ood_data import normalise
from ood_utils import InputError
from train import PADDING, Config, build_network, build_optimizer, get_transform, train_step


def random_images(count, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=rng)


def sgd(model, **settings):
    return build_optimizer(model, Config(**settings))


def test_the_default_recipe_is_the_published_one():
    recipe = {
        "dataset": "cifar100", "epochs": 100, "batch_size": 128, "lr": 0.1, "momentum": 0.9,
        "weight_decay": 1e-4, "milestones": (0.5, 0.75), "gamma": 0.1, "stem": "imagenet",
    }  # fmt: skip
    assert recipe.items() <= asdict(Config()).items() and PADDING == 4


# Augmentation


def test_augmentation_equals_torchvisions_pad_crop_and_flip():
    images = random_images(200)
    draws = torch.rand(200, 3, generator=torch.Generator().manual_seed(1))
    draws[0] = 1 - 2**-24  # the largest draw stays inside
    augmented = get_transform(train=True)(images, draws)
    for image, (row, column, flip), result in zip(images, draws, augmented, strict=True):
        padded = TF.pad(image, PADDING)  # black, before normalisation
        expected = TF.crop(padded, int(row * 9), int(column * 9), 32, 32)
        expected = TF.hflip(expected) if flip < 0.5 else expected
        assert torch.equal(result, normalise(expected[None])[0])


def test_transforms_draw_for_themselves_when_asked_nothing():
    images = random_images(64)
    transform = get_transform(train=True)
    assert not torch.equal(transform(images), transform(images))
    assert torch.equal(get_transform(train=False)(images), normalise(images))


def test_get_loader_augments_the_training_split_unless_asked_not_to():
    plain, augmented = (train.get_loader(True, "digits", augment=augment) for augment in (0, 1))
    images, labels, classes = ood_data.read_closed_set("digits", train=True)
    assert plain.classes == augmented.classes == classes
    batch, first_labels = next(iter(plain))
    assert torch.equal(batch, normalise(images[:1000]))
    assert first_labels.tolist() == list(labels[:1000])
    known = {image.numpy().tobytes() for image in normalise(images)}
    shown, order = next(iter(augmented))
    same = sum(image.numpy().tobytes() in known for image in shown)
    assert len(shown) == 128 and same < 20  # about one in 162 is neither moved nor flipped
    assert not torch.equal(order, next(iter(augmented))[1])
    assert not torch.equal(order, next(iter(train.get_loader(True, "digits", seed=1)))[1])


# Network


def network_pair(stem="imagenet"):
    """The project's network and torchvision's full one with the same weights, in float64."""
    torch.manual_seed(0)
    small = build_network(10, stem).double()
    full = resnet18(num_classes=10).double()
    if stem == "cifar":
        full.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False, dtype=torch.float64)
        full.maxpool = torch.nn.Identity()
    full.load_state_dict(train.to_torchvision(small))
    return small, full


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_the_network_equals_the_full_one_forward_and_in_a_step(stem, layout, monkeypatch):
    """In both memory layouts; in MPS's, batch norm and max-pool get contiguous maps alone."""
    monkeypatch.setattr(train, "memory_format", lambda device: layout)
    small, full = network_pair(stem)
    small.to(memory_format=layout)
    images = normalise(random_images(6)).double().contiguous(memory_format=layout)
    labels, strides = torch.arange(6), []
    for module in small.modules():
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.MaxPool2d):
            module.register_forward_pre_hook(lambda _, inputs: strides.append(inputs[0]))
    outputs = []
    for network in (small, full):
        optimizer = sgd(network)
        outputs.append([network(images).detach()])
        train_step(network, optimizer, images, labels)
        outputs[-1].append(network.eval()(images).detach())
    for ours, reference in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
    reference = full.state_dict()
    for name, weight in train.to_torchvision(small).items():
        torch.testing.assert_close(weight, reference[name], rtol=1e-12, atol=1e-12)
    assert len(strides) >= 60 and all(maps.is_contiguous(memory_format=layout) for maps in strides)


def test_a_checkpoint_is_torchvisions_but_for_taps_that_meet_no_pixel():
    torch.manual_seed(0)
    full = resnet18(num_classes=10).state_dict()
    torch.manual_seed(0)
    small = build_network(10)
    state = train.to_torchvision(small)
    assert state.keys() == full.keys()
    for name, weight in state.items():
        assert torch.equal(weight, full[name] * (weight != 0)), name
    left_out = sum((full[name] != 0).sum() - (state[name] != 0).sum() for name in full)
    assert left_out == sum(w.numel() for w in full.values()) - sum(
        w.numel() for w in small.state_dict().values()
    )
    assert 6.8e6 < left_out < 7e6


def test_a_checkpoint_holds_cpu_tensors():
    """The file of a network on another device; "meta" stands for a GPU that is not here."""
    moved = []

    class Elsewhere(torch.Tensor):
        def cpu(self):
            moved.append(self)
            return torch.Tensor(self)

    model = build_network(10)
    state = {name: value.as_subclass(Elsewhere) for name, value in model.state_dict().items()}
    model.state_dict = lambda: state
    assert all(type(value) is torch.Tensor for value in train.to_torchvision(model).values())
    assert len(moved) == len(state)


def test_bfloat16_training_stays_near_float32(monkeypatch):
    """Twenty steps: the loss falls as it does in float32, within 0.15 of it at every step."""
    images, labels = normalise(random_images(8)), torch.arange(8)
    losses = []
    half = functools.partial(ResNet, BasicBlock, [1, 1, 1, 1])  # bfloat16 is slow on old CPUs
    monkeypatch.setattr(train, "resnet18", half)
    one_block = {name: live for name, live in train.LIVE_TAPS.items() if ".0." in name}
    monkeypatch.setattr(train, "LIVE_TAPS", one_block)
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        model = build_network(10)
        optimizer = sgd(model, lr=0.003)
        steps = [train_step(model, optimizer, images, labels, precision) for _ in range(20)]
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
    """Momentum and weight decay as in SGD's definition: v = m v + (g + wd w); w = w - lr v."""
    torch.manual_seed(0)
    model = build_network(3).double()
    optimizer = sgd(model, lr=0.05, momentum=0.8, weight_decay=0.01)
    images, labels = torch.randn(6, 3, 32, 32, dtype=torch.float64), torch.arange(6) % 3
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
    assert same_bits(tmp_path / "a.pth", tmp_path / "b.pth")
    assert not same_bits(tmp_path / "a.pth", tmp_path / "c.pth")


def test_the_schedule_and_the_log(class_folder, tmp_path):
    options = {"epochs": 4, "lr": 0.1, "milestones": (0.5, 0.7), "gamma": 0.5}
    train_quietly(class_folder, tmp_path / "a.pth", **options)
    log = json.loads((tmp_path / "a.json").read_text())
    assert [epoch["lr"] for epoch in log["epochs"]] == [0.1, 0.1, 0.05, 0.025]
    assert log["config"]["milestones"] == [0.5, 0.7] and log["classes"] == ["cat", "dog"]
    assert log["config"]["precision"] in ("bfloat16", "float32") and log["processes"] == 1
    assert log["versions"]["torch"] == torch.__version__
    keys = {"epoch", "loss", "test_accuracy", "lr", "seconds"}
    assert all(set(epoch) == keys for epoch in log["epochs"])
    published = [train.learning_rate(Config(), epoch) for epoch in range(100)]
    np.testing.assert_allclose(published, [0.1] * 50 + [0.01] * 25 + [0.001] * 25)


def test_resume_is_exact_and_appends(cut_run, tmp_path, capsys):
    folder, *files = cut_run
    for file in (*files, files[0].with_suffix(".json")):
        shutil.copy(file, tmp_path)
    before = json.loads((tmp_path / "cut.json").read_text())["epochs"]
    (tmp_path / f"cut.pth.{'0' * 32}.tmp").write_bytes(b"what a killed run left")
    (tmp_path / f"cut.b.pth.{'0' * 32}.tmp").write_bytes(b"what another run is writing")
    train_quietly(folder, tmp_path / "cut.pth", resume=True)
    assert "resuming after epoch 1 of 4" in capsys.readouterr().out
    train_quietly(folder, tmp_path / "whole.pth")
    assert same_bits(tmp_path / "cut.pth", tmp_path / "whole.pth")
    after = json.loads((tmp_path / "cut.json").read_text())["epochs"]
    assert after[:1] == before and [epoch["epoch"] for epoch in after] == [1, 2, 3, 4]
    left = sorted(path.name for path in tmp_path.glob("cut*"))
    assert left == [f"cut.b.pth.{'0' * 32}.tmp", "cut.json", "cut.pth"]


def test_a_finished_run_is_not_started_over(class_folder, tmp_path, capsys):
    path = tmp_path / "a.pth"
    train_quietly(class_folder, path, epochs=2, resume=True)
    assert "no unfinished run" in capsys.readouterr().out
    before = {file: file.read_bytes() for file in tmp_path.glob("a.*")}
    model = train_quietly(class_folder, path, epochs=2, resume=True)
    assert "finished" in capsys.readouterr().out
    with pytest.raises(InputError, match="epochs 2 -> 4"):
        train_quietly(class_folder, path, resume=True)
    assert {file: file.read_bytes() for file in tmp_path.glob("a.*")} == before
    assert torch.equal(model.fc.weight, torch.load(path, weights_only=True)["fc.weight"])
    torch.save({"another": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="a.pth is not a ResNet-18"):
        train_quietly(class_folder, path, epochs=2, resume=True)


@pytest.mark.parametrize("option,message", [
    ({"lr": 0.05}, "lr 0.02 -> 0.05"),
    ({"stem": "cifar"}, "stem imagenet -> cifar"),
    ({"seed": 3, "epochs": 9}, "epochs 4 -> 9, seed 0 -> 3"),
    ({"milestones": (0.25,)}, r"milestones \[0.5, 0.75\] -> \[0.25\]"),
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
        with pytest.raises(InputError, match="cut.resume.pth is"):
            train_quietly(folder, checkpoint, resume=True)
        assert state.read_bytes() == damaged
    state.write_bytes(whole)


def test_a_loss_that_is_not_finite_stops_the_run(class_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    steps = iter(range(1000))

    def step(*args):
        return train_step(*args) * (float("nan") if next(steps) == 5 else 1)

    monkeypatch.setattr(train, "train_step", step)
    with pytest.raises(FloatingPointError, match="not finite at epoch 3, step 2: lower --lr"):
        train_quietly(class_folder, tmp_path / "a.pth")
    assert len(json.loads((tmp_path / "a.json").read_text())["epochs"]) == 2
    assert (tmp_path / "a.resume.pth").exists()


def test_a_second_run_of_one_checkpoint_touches_nothing(class_folder, tmp_path, monkeypatch):
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

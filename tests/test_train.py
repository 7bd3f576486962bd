"""Augmentation against torchvision's, the network against the full one, training, resuming."""

import json

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from conftest import same_bits, small_config, train_quietly, write_images
from torch.nn import functional as F
from torchvision.models import ResNet, mobilenet_v3_small, resnet18

import ood_data
import ood_utils
import train
from ood_data import normalise
from ood_utils import InputError
from train import Config, build_optimizer, get_transform, shorten_small_maps, train_step


def random_images(count, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=rng)


def test_crops_are_torchvisions_and_uniform():
    """Two channels hold each pixel's row and column, so a pixel in the middle tells the offset."""
    images = random_images(16200)
    images[:, 0] = 8 * torch.arange(32)[:, None]
    images[:, 1] = 8 * torch.arange(32)
    found = train.crop_and_flip(images, torch.Generator().manual_seed(0))
    left, right = found[:, :, 16, 8].long() // 8, found[:, :, 16, 24].long() // 8
    flip = left[:, 1] > right[:, 1]
    row, column = left[:, 0] - 12, torch.where(flip, right[:, 1] - 3, left[:, 1] - 4)
    assert abs(flip.double().mean() - 0.5) < 0.02
    counts = torch.bincount(row * 9 + column, minlength=81)
    assert len(counts) == 81 and (counts - 200).abs().max() < 75  # five standard deviations
    for i in range(60):
        crop = TF.crop(TF.pad(images[i], 4), row[i], column[i], 32, 32)
        assert torch.equal(found[i], TF.hflip(crop) if flip[i] else crop)


def test_get_loader_shuffles_and_augments_unless_asked_not_to(monkeypatch):
    """By what is edited in augment_batch; order and draws are functions of the seed."""
    draws, orders = [], []

    def augment(images, generator):
        draws.append(torch.rand(1, generator=generator).item())
        return torch.zeros_like(images)

    monkeypatch.setattr(train, "augment_batch", augment)
    black = normalise(torch.zeros(500, 3, 32, 32, dtype=torch.uint8))
    for seed in (0, 0, 1):
        loader = train.get_loader(True, "digits", batch_size=500, seed=seed)
        for _ in range(2):
            shown, order = next(iter(loader))
            assert torch.equal(shown, black)
            orders.append(order.tolist())
    for found in (draws, orders):
        assert found[:2] == found[2:4] and found[0] != found[1] and found[0] != found[4]
    for is_train, augment in ((True, False), (False, True)):
        images, labels, classes = ood_data.read_closed_set("digits", train=is_train)
        loader = train.get_loader(is_train, "digits", augment=augment)
        shown, order = next(iter(loader))
        assert loader.classes == classes and order.tolist() == list(labels[: len(order)])
        assert torch.equal(shown, normalise(images[: len(shown)]))


def every_small_map():
    """3x3 convolutions of 4x4 maps, which stay; of 2x2 and 1x1 maps, with stride 1 and 2."""
    layers, width = [torch.nn.Conv2d(3, 4, 8, 8)], 4
    for stride in (2, 1, 2, 1, 2):
        layers += [torch.nn.Conv2d(width, width + 2, 3, stride, padding=1, bias=False)]
        width += 2
        layers += [torch.nn.BatchNorm2d(width), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(width, 10))


@pytest.mark.parametrize("build,shortened,left_out", [
    (resnet18, 7, 256 * 512 * 5 + 3 * 512 * 512 * 8),
    (every_small_map, 4, 8 * 10 * 5 + 10 * 12 * 8 + 12 * 14 * 8),
])  # fmt: skip
def test_shortened_networks_equal_the_full_ones(build, shortened, left_out, monkeypatch):
    """In float64, forward and after a step; batch norm gets maps in the layout of the device.

    The state dict is the full one's, but for weights that only see padding: they are zero.
    """
    layout = torch.channels_last if build is resnet18 else torch.contiguous_format  # MPS's
    monkeypatch.setattr(train, "memory_format", lambda device: layout)
    torch.manual_seed(0)
    full = build().double()
    small = build()
    small.load_state_dict(full.state_dict())
    shorten_small_maps(small).double().to(memory_format=layout)
    replaced = [m for m in small.modules() if isinstance(m, train.SmallMapConv)]
    assert len(replaced) == shortened and small.training
    state, original = small.state_dict(), full.state_dict()
    for name, weight in state.items():
        assert torch.equal(weight, original[name] * (weight != 0)), name
    zeros = [((state[name] == 0) & (original[name] != 0)).sum() for name in state]
    assert list(state) == list(original) and sum(zeros) == left_out
    full.load_state_dict(state)
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
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(small.state_dict(), full.state_dict(), rtol=1e-9, atol=1e-9)
    assert maps and all(one.is_contiguous(memory_format=layout) for one in maps)


def test_every_stem_is_known_from_the_weights(tmp_path):
    if not isinstance(train.build_network(2), ResNet):
        pytest.skip("another network: --stem is for ResNets")
    for stem in ("imagenet", "cifar"):
        state = train.build_network(2, stem).state_dict()
        torch.save(state, tmp_path / "a.pth")
        loaded = train.load_network(tmp_path / "a.pth").state_dict()
        torch.testing.assert_close(loaded, state, rtol=0, atol=0)


def test_networks_without_small_convolutions_are_left_as_they_are():
    model = mobilenet_v3_small(num_classes=10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.features[1].eval()
    after = shorten_small_maps(model).state_dict()
    assert not any(isinstance(m, train.SmallMapConv) for m in model.modules())
    assert list(before) == list(after) and all(torch.equal(before[n], after[n]) for n in before)
    assert model.training and not model.features[1].training
    assert ood_utils.last_layer(model) is model.classifier[3]


@pytest.mark.parametrize("change,shortened", [
    ({}, True), ({"padding_mode": "circular"}, False), ({"groups": 2}, False),
    ({"bias": True}, False), ({"stride": (1, 2)}, False),
], ids=str)  # fmt: skip
def test_only_plain_convolutions_are_shortened(change, shortened):
    """A frozen one stays frozen."""
    conv = torch.nn.Conv2d(4, 4, 3, **({"padding": 1, "bias": False} | change))
    model = torch.nn.Sequential(torch.nn.AvgPool2d(16), torch.nn.Conv2d(3, 4, 1), conv)
    last = shorten_small_maps(model.requires_grad_(False))[2]
    assert (last is not conv) == shortened and not last.weight.requires_grad


def test_a_network_that_takes_no_32x32_images_is_refused_before_training():
    too_large = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 40), torch.nn.Linear(8, 2))
    with pytest.raises(InputError, match="takes no 32x32 images: .*[Kk]ernel size"):
        shorten_small_maps(too_large)


def test_what_augments_must_return_bytes(monkeypatch):
    """Floats would be trained on as they are, and tested normalised."""
    monkeypatch.setattr(train, "augment_batch", lambda images, generator: images * 0.5)
    with pytest.raises(InputError, match="augment_batch must return images uint8"):
        get_transform()(random_images(2))


def test_a_network_without_a_linear_layer_is_refused_before_training(
    class_folder, tmp_path, monkeypatch
):
    pooled = [torch.nn.Conv2d(3, 2, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()]
    monkeypatch.setattr(train, "build_network", lambda *args: torch.nn.Sequential(*pooled))
    with pytest.raises(InputError, match="needs an nn.Linear"):
        train_quietly(class_folder, tmp_path / "a.pth")


def test_bfloat16_training_stays_near_float32():
    """Twenty steps: the loss falls as it does in float32, within 0.15 of it at every step."""
    images, labels = normalise(random_images(8)), torch.arange(8)
    losses = []
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10))
        config = Config(lr=0.0003, precision=precision)
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
    ("cuda:1", (7, 0), "float32"),
    ("cuda:1", (9, 0), "bfloat16"),
    ("mps", None, "float32"),
])  # fmt: skip
def test_auto_is_bfloat16_where_the_chosen_device_has_it(kind, able, expected, monkeypatch):
    device = torch.device(kind)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    monkeypatch.setattr(torch.cuda, "get_device_capability", {device: able}.get)
    assert train.pick_precision("auto", device) == expected
    assert train.pick_precision("float32", device) == "float32"


def test_train_step_is_sgd_by_hand():
    """v = m v + (g + wd w); w = w - lr v; the smoothed target is (1 - s) at the label + s / C."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3).double()
    settings = {"momentum": 0.8, "weight_decay": 0.01, "label_smoothing": 0.3}
    config = Config(lr=0.005, precision="float32", **settings)
    optimizer = build_optimizer(model, config)
    inputs, labels = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3
    weight, velocity = model.weight.detach().clone(), 0
    for _ in range(3):
        target = 0.7 * F.one_hot(labels, 3) + 0.3 / 3
        loss = -(target * model(inputs).log_softmax(1)).sum(1).mean()
        gradient = torch.autograd.grad(loss, model.weight)[0]
        velocity = 0.8 * velocity + gradient + 0.01 * weight
        weight = weight - 0.005 * velocity
        train_step(model, optimizer, inputs, labels, config)
        torch.testing.assert_close(model.weight.detach(), weight, rtol=1e-8, atol=1e-10)


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
    steps |= {"milestones": (0.5, 0.7, 1.0), "gamma": 0.5}
    train.check_settings(Config(**steps))  # a milestone may be the end
    assert rates(4, **steps) == [0.1, 0.1, 0.05, 0.025]
    half = 0.5**0.5  # cos(pi / 4)
    cosine = [0.2, 0.1 * (1 + half), 0.1, 0.1 * (1 - half)]
    np.testing.assert_allclose(rates(4, schedule="cosine", lr=0.2), cosine)


def test_the_log_holds_settings_data_and_figures(class_folder, tmp_path, tiny, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_quietly(f"{class_folder.name}/", "a.pth", schedule="cosine")
    log = json.loads((tmp_path / "a.json").read_text())
    config = small_config("", "", schedule="cosine")
    rates = [train.learning_rate(config, epoch) for epoch in range(4)]
    assert [epoch["lr"] for epoch in log["epochs"]] == rates
    assert log["config"]["dataset"] == str(class_folder)  # for a start elsewhere
    assert log["config"]["milestones"] == [0.5, 0.7] and log["classes"] == ["cat", "dog"]
    assert log["config"]["precision"] in ("bfloat16", "float32")
    assert log["versions"]["torch"] == torch.__version__
    keys = {"epoch", "loss", "test_accuracy", "lr", "seconds"}
    assert all(set(epoch) == keys for epoch in log["epochs"])


def test_resume_is_exact_and_appends(cut_run, tmp_path, monkeypatch, capsys):
    """With other code too, which the log then names."""
    folder, checkpoint, _ = cut_run
    before = train.read_log(checkpoint)
    for name in (".cut.lock", "cut.pth.tmp"):
        checkpoint.with_name(name).write_bytes(b"what a killed run left")
    monkeypatch.setattr(train, "digest_code", lambda *files: "edited")
    train_quietly(folder, checkpoint, resume=True)
    out = capsys.readouterr().out
    assert "resuming after epoch 1 of 4" in out
    assert f"the code has changed since: code {before['code']}+edited" in out
    torch.manual_seed(9)  # what a caller draws changes nothing
    for name, seed in (("whole", 0), ("other", 1)):
        train_quietly(folder, tmp_path / f"{name}.pth", seed=seed)
    assert same_bits(checkpoint, tmp_path / "whole.pth")
    assert not same_bits(checkpoint, tmp_path / "other.pth")
    after = train.read_log(checkpoint)
    assert after["code"] == f"{before['code']}+edited"
    assert after["epochs"][:1] == before["epochs"]
    assert [epoch["epoch"] for epoch in after["epochs"]] == [1, 2, 3, 4]
    files = sorted(path.name for path in checkpoint.parent.glob("cut*"))
    assert files == ["cut.json", "cut.pth"]


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


@pytest.mark.parametrize("option,edit,message", [
    ({"lr": 0.05}, None, "lr 0.02 -> 0.05"),
    ({"stem": "cifar"}, None, "stem imagenet -> cifar"),
    ({"seed": 3, "epochs": 9}, None, "epochs 4 -> 9, seed 0 -> 3"),
    ({"milestones": (0.25,)}, None, r"milestones \[0.5, 0.7\] -> \[0.25\]"),
    ({"schedule": "cosine"}, None, "schedule steps -> cosine"),
    ({"precision": "other"}, None, "precision (bfloat16|float32) -> other"),
    ({}, lambda cat: cat.rename(cat.with_name("ant")), r"classes \['cat'\] -> \['ant'\]"),
    ({}, lambda cat: (cat / "000.png").unlink(), "images 24 -> 23, test_images 10 -> 9"),
    ({}, lambda cat: write_images(cat.with_name("eel"), 2), r"classes \[\] -> \['eel'\]"),
])  # fmt: skip
def test_resume_refuses_other_settings_and_other_data(cut_run, option, edit, message):
    folder, checkpoint, state = cut_run
    before = checkpoint.read_bytes(), state.read_bytes()
    for split in ("train", "test") if edit else ():
        edit(folder / split / "cat")
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

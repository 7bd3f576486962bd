"""Augmentation against torchvision's, the network against the full one, training, resuming."""

import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from conftest import ROOT, files_of, read_json, same_bits, train_quietly, write_images
from torch import nn
from torch.nn import functional as F
from torchvision.models import ResNet, resnet18

import ood_data
import train
from ood_data import normalise
from ood_utils import InputError
from train import Config, build_optimizer, get_transform, shorten_small_maps, train_step


def random_images(count):
    rng = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=rng)


def test_crops_are_torchvisions_and_uniform():
    """All 162 of one image, each as often within five standard deviations."""
    generator = torch.Generator().manual_seed(0)
    (image,) = random_images(1)
    padded = TF.pad(image, 4)
    crops = [TF.crop(padded, row, column, 32, 32) for row in range(9) for column in range(9)]
    flipped = [TF.hflip(crop) for crop in crops]
    found = train.crop_and_flip(image.expand(16200, 3, 32, 32), generator)
    counts = Counter(crop.numpy().tobytes() for crop in found)
    assert set(counts) == {crop.numpy().tobytes() for crop in crops + flipped}
    assert all(abs(count - 100) < 50 for count in counts.values())
    assert abs(sum(counts[crop.numpy().tobytes()] for crop in flipped) - 8100) < 320
    greys = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1).expand(256, 3, 32, 32)
    found = train.crop_and_flip(greys, generator)
    assert torch.equal(found[:, :, 16, 16], greys[:, :, 16, 16])  # each image has its own crop


def test_get_loader_shuffles_and_augments_unless_asked_not_to(monkeypatch):
    """By what is edited in augment_batch; order and draws are functions of seed and epoch."""

    def augment(images, generator):
        grey = torch.randint(256, (1,), generator=generator)
        return torch.full_like(images, grey.item())

    monkeypatch.setattr(train, "augment_batch", augment)
    loaders = [train.get_loader(True, "digits", seed=seed) for seed in (0, 0, 1)]
    batches = [next(iter(loader)) for loader in (*loaders, loaders[0])]
    shown, orders = zip(*batches, strict=True)
    assert len(shown[0].unique()) == 3  # one grey, normalised
    for first, same, *others in (shown, orders):
        assert torch.equal(first, same)
        assert not any(torch.equal(first, other) for other in others)
    for is_train, augment in ((True, False), (False, True)):
        images, labels, _ = ood_data.read_closed_set("digits", train=is_train)
        shown, order = next(iter(train.get_loader(is_train, "digits", augment=augment)))
        assert order.tolist() == list(labels[: len(order)])
        assert torch.equal(shown, normalise(images[: len(shown)]))


def every_small_map():
    """3x3 convolutions of 4x4 maps, which stay; of 2x2 and 1x1 maps, with stride 1 and 2."""
    layers, width = [nn.Conv2d(3, 4, 8, 8)], 4
    for stride in (2, 1, 2, 1, 2):
        layers += [nn.Conv2d(width, width + 2, 3, stride, padding=1, bias=False)]
        width += 2
        layers += [nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, 10))


@pytest.mark.parametrize("build,shortened", [(resnet18, 7), (every_small_map, 4)])
def test_shortened_networks_equal_the_full_ones(build, shortened, monkeypatch):
    """In float64, forward and after a step; maps have the layout of the device."""
    layout = torch.channels_last if build is resnet18 else torch.contiguous_format  # MPS's
    monkeypatch.setattr(train, "memory_format", lambda device: layout)
    torch.manual_seed(0)
    full = build().double()
    small = build()
    small.load_state_dict(full.state_dict())
    shorten_small_maps(small).double().to(memory_format=layout)
    replaced = [m for m in small.modules() if isinstance(m, train.SmallMapConv)]
    assert len(replaced) == shortened
    maps = []
    for module in replaced:
        module.register_forward_hook(lambda module, inputs, output: maps.append(output))
    images = normalise(random_images(6)).double().contiguous(memory_format=layout)
    config = Config(lr=0.001, precision="float32")
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(small(images), full(images), **close)
    full.load_state_dict(small.state_dict())  # zeros where a weight only sees padding
    for network in (small, full):
        train_step(network, build_optimizer(network, config), images, torch.arange(6), config)
    torch.testing.assert_close(small.state_dict(), full.state_dict(), **close)
    assert all(one.is_contiguous(memory_format=layout) for one in maps)


def test_every_stem_is_known_from_the_weights(tmp_path):
    if not isinstance(train.build_network(2), ResNet):
        pytest.skip("another network: --stem is for ResNets")
    for stem in ("imagenet", "cifar"):
        state = train.build_network(2, stem).state_dict()
        torch.save(state, tmp_path / "a.pth")
        loaded = train.load_network(tmp_path / "a.pth").state_dict()
        torch.testing.assert_close(loaded, state, rtol=0, atol=0)


@pytest.mark.parametrize("change,shortened", [
    ({}, True), ({"padding_mode": "circular"}, False), ({"groups": 2}, False),
    ({"bias": True}, False), ({"stride": (1, 2)}, False),
], ids=str)  # fmt: skip
def test_only_plain_convolutions_are_shortened(change, shortened):
    """A frozen one stays frozen, and every layer in its mode."""
    conv = nn.Conv2d(4, 4, 3, **({"padding": 1, "bias": False} | change))
    model = nn.Sequential(nn.AvgPool2d(16), nn.Conv2d(3, 4, 1), conv)
    model[0].eval()
    last = shorten_small_maps(model.requires_grad_(False))[2]
    assert (last is not conv) == shortened and not last.weight.requires_grad
    assert model.training and not model[0].training


@pytest.mark.parametrize("layers,message", [
    ([nn.Conv2d(3, 8, 40), nn.Linear(8, 2)], "takes no 32x32 images"),
    ([nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()], "needs an nn.Linear"),
], ids=["too large", "no logits"])  # fmt: skip
def test_other_networks_are_refused_before_training(layers, message, in_tiny_run, monkeypatch):
    network = nn.Sequential(*layers)
    monkeypatch.setattr(train, "build_network", lambda *args: shorten_small_maps(network))
    with pytest.raises(InputError, match=message):
        train_quietly("pets", "new.pth")


def test_what_augments_must_return_bytes(monkeypatch):
    """Floats would be trained on as they are, and tested normalised."""
    monkeypatch.setattr(train, "augment_batch", lambda images, generator: images * 0.5)
    with pytest.raises(InputError, match="augment_batch must return images uint8"):
        get_transform()(random_images(2))


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


@pytest.mark.parametrize("precision,least,most", [("float32", 0, 1e-6), ("bfloat16", 1e-5, 1e-2)])
def test_train_step_is_sgd_by_hand(precision, least, most):
    """v = m v + (g + wd w); w = w - lr v; the smoothed target is (1 - s) at the label + s / C."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    settings = {"momentum": 0.8, "weight_decay": 0.01, "label_smoothing": 0.3}
    config = Config(lr=0.5, precision=precision, **settings)
    optimizer = build_optimizer(model, config)
    inputs, labels = torch.randn(6, 4), torch.arange(6) % 3
    weight, velocity = model.weight.detach().clone(), 0
    for _ in range(3):
        target = 0.7 * F.one_hot(labels, 3) + 0.3 / 3
        loss = -(target * model(inputs).log_softmax(1)).sum(1).mean()
        gradient = torch.autograd.grad(loss, model.weight)[0]
        velocity = 0.8 * velocity + gradient + 0.01 * weight
        weight = weight - 0.5 * velocity
        train_step(model, optimizer, inputs, labels, config)
    error = (model.weight.detach() - weight).abs().max()
    assert least <= error <= most


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


@pytest.mark.parametrize("settings,rates", [
    ({"gamma": 0.5, "milestones": (0.5, 0.7, 1.0)}, [0.02, 0.02, 0.01, 0.005]),
    ({"schedule": "cosine", "lr": 0.2}, [0.2, 0.1 + 0.1 * 0.5**0.5, 0.1, 0.1 - 0.1 * 0.5**0.5]),
])  # fmt: skip
def test_the_log_holds_settings_data_and_rates(settings, rates, in_tiny_run, monkeypatch):
    """The rates by hand; they are the optimizer's, too, which gives them as losses here."""
    monkeypatch.setattr(train, "train_epoch", lambda _, sgd, *rest: sgd.param_groups[0]["lr"])
    train_quietly("pets/", "new.pth", **settings)
    log = read_json("new.json")
    for name in ("lr", "loss"):
        np.testing.assert_allclose([epoch[name] for epoch in log["epochs"]], rates)
    assert log["config"]["dataset"] == str(in_tiny_run / "pets")  # for a start elsewhere
    assert log["config"]["precision"] in ("bfloat16", "float32")
    assert log["classes"] == ["cat", "dog"]
    assert log["versions"]["torch"] == torch.__version__


def test_resume_is_exact_and_appends(in_tiny_run, monkeypatch, capsys):
    """With other code too, which the log then names."""
    before = read_json("cut.json")
    for name in (".cut.lock", "cut.pth.tmp"):
        (in_tiny_run / name).write_bytes(b"what a killed run left")
    monkeypatch.setattr(train, "digest_code", lambda *files: "edited")
    torch.manual_seed(9)  # what a caller draws changes nothing
    train_quietly("pets", "cut.pth", resume=True)
    out = capsys.readouterr().out
    after = read_json("cut.json")
    assert "resuming after epoch 1 of 4" in out
    assert after["code"] == f"{before['code']}+edited" and after["code"] in out
    assert after["epochs"][:1] == before["epochs"]
    assert [epoch["epoch"] for epoch in after["epochs"]] == [1, 2, 3, 4]
    assert same_bits("cut.pth", "whole.pth")
    assert set(files_of(in_tiny_run, "cut")) == {".json", ".pth"}
    train_quietly("pets", "other.pth", seed=1)
    assert not same_bits("other.pth", "whole.pth")


def test_a_finished_run_is_not_started_over(in_tiny_run, capsys):
    before = files_of(in_tiny_run, "a")
    model = train_quietly("pets", "a.pth", epochs=1, resume=True)
    assert "resuming after epoch 1 of 1" in capsys.readouterr().out
    state = torch.load("a.pth", weights_only=True)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert files_of(in_tiny_run, "a") == before
    train_quietly("pets", "new.pth", epochs=1, resume=True)
    assert "no unfinished run" in capsys.readouterr().out


@pytest.mark.parametrize("options,edit,message", [
    ({"lr": 0.05, "schedule": "cosine"}, None, "lr 0.02 -> 0.05, schedule steps -> cosine"),
    ({"stem": "cifar", "seed": 3}, None, "stem imagenet -> cifar, seed 0 -> 3"),
    ({"epochs": 9, "milestones": [0.2]}, None, r"epochs 4 -> 9, .*0.7\] -> \[0.2\]"),
    ({"precision": "other"}, None, "precision (bfloat16|float32) -> other"),
    ({}, lambda cat: (cat / "000.png").unlink(), "images 24 -> 23, test_images 10 -> 9"),
    ({}, lambda cat: write_images(cat.with_name("eel"), 2), r"classes \[\] -> \['eel'\]"),
    ({}, lambda cat: Path("cut.resume.pth").write_bytes(b""), "cut.resume.pth is damaged"),
    ({}, lambda cat: shutil.copy("cut.pth", "cut.resume.pth"), "cut.pth is not a run"),
])  # fmt: skip
def test_resume_refuses_other_settings_and_data(in_tiny_run, options, edit, message):
    for split in ("train", "test") if edit else ():
        edit(in_tiny_run / "pets" / split / "cat")
    before = files_of(in_tiny_run, "cut")
    with pytest.raises(InputError, match=message):
        train_quietly("pets", "cut.pth", resume=True, **options)
    assert files_of(in_tiny_run, "cut") == before


def test_a_loss_that_is_not_finite_stops_the_run(in_tiny_run, monkeypatch):
    """Of epochs of two steps, in the third: two are saved."""
    losses = iter(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, torch.nan]))
    monkeypatch.setattr(train, "train_step", lambda *args: next(losses))
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    with pytest.raises(FloatingPointError, match="epoch 3, step 2: lower --lr"):
        train_quietly("pets", "new.pth")
    assert [epoch["loss"] for epoch in read_json("new.json")["epochs"]] == [1.5, 3.5]
    assert set(files_of(in_tiny_run, "new")) == {".json", ".pth", ".resume.pth"}


def test_a_second_run_of_one_checkpoint_touches_nothing(in_tiny_run, monkeypatch):
    """Started in the middle of the first, it ends in a line; the first goes on undisturbed."""
    errors = []

    def step(*args):
        monkeypatch.setattr(train, "train_step", train_step)
        for name in ("new.pth", "new.pt"):  # one log and one state
            with pytest.raises(InputError, match="Another run") as error:
                train_quietly("pets", name)
            errors.append(error)
        assert not files_of(in_tiny_run, "new")
        return train_step(*args)

    monkeypatch.setattr(train, "train_step", step)
    train_quietly("pets", "new.pth", epochs=1)
    assert len(errors) == 2 and set(files_of(in_tiny_run, "new")) == {".pth", ".json"}


@pytest.mark.slow
def test_the_real_command_survives_ten_kills(tmp_path, monkeypatch):
    """`python train.py --dataset digits` killed at random moments and resumed."""
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset", "digits", "--epochs", "12", "--resume", "--checkpoint"]
    command = [sys.executable, ROOT / "train.py", *flags]
    subprocess.run([*command, "whole.pth"], check=True)
    moments, kills = random.Random(0), 0
    while kills < 10:
        try:
            subprocess.run([*command, "cut.pth"], check=True, timeout=moments.uniform(4, 24))
            Path("cut.pth").unlink()  # finished: the next one starts anew
        except subprocess.TimeoutExpired:  # it was killed
            kills += 1
        for path in tmp_path.glob("cut*.pth"):
            torch.load(path, weights_only=True)
    subprocess.run([*command, "cut.pth"], check=True)
    assert same_bits("cut.pth", "whole.pth")

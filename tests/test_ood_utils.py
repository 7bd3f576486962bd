"""Scores and metrics against brute force, formulas and answers known by hand; files; device."""

from itertools import pairwise, permutations

import numpy as np
import pytest
import torch

import ood_utils
from ood_data import ImageLoader, normalise
from ood_utils import SCORES, InputError, get_logits, get_ood_scores, get_performance, get_threshold


def brute_force(pos, neg):
    """AUROC, average precision and FPR95 by counting."""
    wins = [(float(p > n) + float(p >= n)) / 2 for p in pos for n in neg]
    aupr, recall_before, fpr95 = 0, 0, None
    for threshold in sorted({*pos, *neg}, reverse=True):
        true = np.sum(pos >= threshold)
        false = np.sum(neg >= threshold)
        recall = true / len(pos)
        aupr += (recall - recall_before) * true / (true + false)
        recall_before = recall
        if fpr95 is None and 100 * true >= 95 * len(pos):
            fpr95 = false / len(neg)
    return np.mean(wins), aupr, fpr95


rng = np.random.default_rng(0)


@pytest.mark.parametrize("pos,neg", [
    (rng.normal(1, 1, 60), rng.normal(0, 1, 40)),
    (rng.integers(0, 6, 80).astype(float), rng.integers(0, 5, 30).astype(float)),  # ties
    (np.ones(7), np.ones(3)),
    (np.array([0.2]), np.array([0.7])),
    (np.arange(20.0), np.array([0.5, 1.0, 1.5, 18.0])),  # a recall of exactly 0.95
    (np.arange(41.0), np.arange(-1, 40, 3) + 0.5),  # and none
    (np.array([1e-300, 1e300, 1.0]), np.array([1e-12, 2.0])),
])  # fmt: skip
def test_performance_equals_brute_force_in_both_conventions(pos, neg):
    for one, other in ((pos, neg), (-neg, -pos)):
        found = get_performance(one, other)
        np.testing.assert_allclose(found, brute_force(one, other), rtol=0, atol=1e-12)


def test_performance_known_by_hand(capsys):
    # Precision at the positives: 1/1 and 2/3; the second is reached past one of two negatives.
    np.testing.assert_allclose(get_performance([4, 2], [3, 1]), (0.75, (1 + 2 / 3) / 2, 0.5))
    ood_utils.show_performance([4, 2, 5], [3, 1])
    assert capsys.readouterr().out == "AUROC: 83.3333, AUPR: 91.6667, FPR95: 50.0000\n"
    assert get_threshold(np.arange(20.0)) == 1  # 19 of 20 are at least 1
    assert get_threshold(np.arange(21.0)) == 1  # 20 of 21: 19 are 0.905


@pytest.mark.parametrize("scores", [
    torch.tensor([3.0, 4.0], dtype=torch.bfloat16), torch.tensor([3.0, 4.0], requires_grad=True),
    np.array([3, 4], np.float16), torch.tensor([3, 4]), torch.tensor([[3.0], [4.0]]),
    np.ma.masked_array([3.0, 4.0], [False, False]), np.array([[3.0, 4.0]]),
], ids=str)  # fmt: skip
def test_scores_come_in_many_types(scores):
    assert get_performance(scores, [1.0, 3.5])[0] == get_performance([5.0, 3.5], scores)[0] == 0.75


@pytest.mark.parametrize("scores", [
    ["1", "2"], [True, False], np.array([1 + 2j]), torch.tensor([1 + 1j]), torch.tensor([True]),
    [], [1.0, np.nan], [np.inf, -np.inf], np.ones((3, 2)), [None, 1.0],
    np.ma.masked_array([1.0, 2.0], [False, True]),
], ids=str)  # fmt: skip
def test_what_is_no_finite_number_is_refused(scores):
    for pair in ((scores, [1.0]), ([1.0], scores)):
        with pytest.raises(InputError, match="Scores must be"):
            get_performance(*pair)


def test_scores_equal_their_formulas():
    z = np.random.default_rng(0).normal(0, 4, (50, 120))
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    top = -np.sort(-p, axis=1)[:, :100]
    expected = {
        "msp": p.max(1),
        "max_logit": z.max(1),
        "energy": np.log(np.exp(z).sum(1)),
        "entropy": (p * np.log(p)).sum(1),
        "gen": -(top**0.1 * (1 - top) ** 0.1).sum(1),
    }
    for name, scores in expected.items():
        found = getattr(ood_utils, name)(torch.from_numpy(z))
        np.testing.assert_allclose(found, scores, rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("scale", [5, 800])
def test_scores_point_one_way_and_stay_finite(scale):
    """Confident above undecided, also where a softmax reaches exactly 1 and 0."""
    logits = torch.zeros(2, 100, dtype=torch.float64)
    logits[0, 7] = scale
    for name, score in SCORES.items():
        sure, undecided = score(logits)
        assert sure.isfinite() and undecided.isfinite() and sure > undecided, name


def risks_by_orders(scores, correct):
    """AURC and AUGRC by counting, a mean over every order that the scores allow."""
    count, areas = len(scores), []
    for order in permutations(range(count)):
        if all(scores[a] >= scores[b] for a, b in pairwise(order)):
            errors = np.cumsum([not correct[i] for i in order])
            areas.append((np.mean(errors / np.arange(1, count + 1)), np.mean(errors / count)))
    return np.mean(areas, axis=0)


@pytest.mark.parametrize("scores,correct", [
    ([3, 2, 2, 2, 1], [True, False, True, True, False]),
    ([1, 1, 1, 1], [False, True, True, True]),
    ([1, 2], [True, True]),
    ([1, 2], [False, False]),
])  # fmt: skip
def test_aurc_and_augrc_equal_brute_force_over_orders(scores, correct):
    found = ood_utils.get_risks(scores, correct)
    assert found == pytest.approx(risks_by_orders(scores, correct), abs=1e-12)


def test_get_ood_scores_is_float64_in_eval_mode_without_tf32():
    """In float32 a margin of 21 has a softmax of exactly 1. Precisions are then as they were."""
    logits = torch.tensor([[0.0, 3.0], [21.0, 0.0], [-1.0, 0.0]])
    labels = torch.tensor([1, 0, 0])
    expected = logits.double().softmax(1).amax(1).tolist()
    model, convolutions, runs = torch.nn.Linear(2, 2, bias=False), torch.backends.cudnn.conv, []
    model.weight.data = torch.eye(2)
    model.register_forward_pre_hook(
        lambda *args: runs.append((model.training, convolutions.fp32_precision))
    )
    before = convolutions.fp32_precision
    batches = [(logits[:2], labels[:2]), (logits[2:], labels[2:], "an index")]
    dataset = torch.utils.data.TensorDataset(logits, labels)
    for loader in (batches, torch.utils.data.DataLoader(dataset, 2)):
        scores, right, wrong = get_ood_scores(model, loader, closed_set=True)
        assert scores.tolist() == get_ood_scores(model, loader).tolist() == expected
        assert right.tolist() == expected[:2] and wrong.tolist() == expected[2:]
    assert set(runs) == {(False, "ieee")} and convolutions.fp32_precision == before
    with pytest.raises(ValueError, match="No batch"):
        get_ood_scores(model, [])
    with pytest.raises(InputError, match="needs a label for every image"):
        get_ood_scores(model, [(logits, torch.tensor([1, 0, -1]))], closed_set=True)


IMAGES = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
NORMAL, UNIT = normalise(IMAGES), IMAGES / 255


def test_images_that_are_not_normalised_are_refused():
    network, labels = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 3)), [0] * 6
    resized = UNIT * 1.1 - 0.05  # a bicubic one is a little wider than [0, 1]
    for images in (UNIT, IMAGES.float(), IMAGES, resized):
        with pytest.raises(InputError, match="not normalised"):
            get_logits(network, [(images, labels)])
    get_logits(network, [(normalise(torch.full_like(IMAGES, 255)), labels)])
    get_logits(network, [(NORMAL, labels), (UNIT, labels)])  # some batch is
    get_logits(network, ImageLoader(UNIT, labels))  # a noise may lie anywhere


@pytest.mark.parametrize("backend,precision", [
    (torch.backends, "ieee"),
    (torch.backends.cudnn, "ieee"),
    (torch.backends.cudnn.conv, "ieee"),
    (torch.backends.mkldnn.matmul, "bf16"),
])  # fmt: skip
def test_the_precision_of_the_caller_changes_no_score(backend, precision):
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 3))
    expected = network(NORMAL)
    before = backend.fp32_precision
    try:
        backend.fp32_precision = precision
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(get_logits(network, [(NORMAL, [0] * 6)])[0], expected)
        assert backend.fp32_precision == precision
    finally:
        backend.fp32_precision = before


@pytest.mark.parametrize("wrap", [torch.nn.Sequential, torch.nn.DataParallel, torch.compile])
def test_get_features_is_what_enters_the_last_linear_layer(wrap):
    head = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU())
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3), torch.nn.ReLU(), head)
    images = torch.randn(5, 2, 2)
    images[0] = images[3] = -1
    batches = [(images[:3], [0] * 3), (images[3:], [0] * 2)]
    features = ood_utils.get_features(wrap(model), batches)
    assert torch.equal(features, model[:3](images)) and not head[0]._forward_pre_hooks


def test_a_gpu_without_kernels_is_found_by_launching_one(monkeypatch):
    """It has memory, but computes nothing, like the device "meta"."""
    real_ones = torch.ones
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **options: gpu)
    monkeypatch.setattr(torch, "ones", lambda *size, device: real_ones(*size, device="meta"))
    with pytest.raises(InputError, match="'cuda' cannot be used"):
        ood_utils.pick_device()

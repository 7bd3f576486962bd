"""Scores and metrics against brute force, formulas and answers known by hand; files; device."""

import contextlib
from fractions import Fraction
from itertools import pairwise, permutations

import numpy as np
import pytest
import torch

import ood_utils
from ood_utils import SCORES, InputError, get_ood_scores, get_performance, get_threshold


def brute_force(pos, neg):
    """AUROC, average precision and FPR95 by counting, in exact rational arithmetic."""
    pairs = [Fraction(int(p > n) + int(p >= n), 2) for p in pos for n in neg]
    auroc = sum(pairs) / len(pairs)
    aupr, recall_before, fpr95 = Fraction(0), Fraction(0), None
    for threshold in sorted({*pos, *neg}, reverse=True):
        true = int(sum(p >= threshold for p in pos))
        false = int(sum(n >= threshold for n in neg))
        recall = Fraction(true, len(pos))
        aupr += (recall - recall_before) * Fraction(true, true + false)
        recall_before = recall
        if fpr95 is None and recall >= Fraction(95, 100):
            fpr95 = Fraction(false, len(neg))
    return [float(x) for x in (auroc, aupr, fpr95)]


rng = np.random.default_rng(0)
CASES = {
    "distinct": (rng.normal(1, 1, 60), rng.normal(0, 1, 40)),
    "ties": (rng.integers(0, 6, 80).astype(float), rng.integers(0, 5, 30).astype(float)),
    "all tied": (np.ones(7), np.ones(3)),
    "one each": (np.array([0.2]), np.array([0.7])),
    "saturated MSP": (np.array([1.0] * 50 + [0.5] * 3), np.array([1.0] * 9 + [0.9])),
    "recall exactly 0.95": (np.arange(20.0), np.array([0.5, 1.0, 1.5, 18.0])),
    "0.95 between two": (np.arange(41.0), np.arange(-1, 40, 3) + 0.5),
    "far apart in size": (np.array([1e-300, 1e300, 1.0]), np.array([1e-12, 2.0])),
}


@pytest.mark.parametrize("name", CASES)
def test_performance_equals_brute_force_in_both_conventions(name):
    pos, neg = CASES[name]
    for one, other in ((pos, neg), (-neg, -pos)):
        expected = brute_force(one, other)
        np.testing.assert_allclose(get_performance(one, other), expected, rtol=0, atol=1e-12)


def test_performance_known_by_hand(capsys):
    assert get_performance([3, 4], [1, 2]) == (1, 1, 0)
    assert get_performance([1, 2], [3, 4])[::2] == (0, 1)
    # Precision at the positives: 1/1 and 2/3; the second is reached past one of two negatives.
    np.testing.assert_allclose(get_performance([4, 2], [3, 1]), (0.75, (1 + 2 / 3) / 2, 0.5))
    column, row = torch.tensor([[3.0], [4.0]]), np.array([[1.0, 2.0]])
    assert get_performance(column, row)[0] == 1  # (N, 1) and (1, N) are (N,)
    ood_utils.show_performance([4, 2, 5], [3, 1])
    assert capsys.readouterr().out == "AUROC: 83.3333, AUPR: 91.6667, FPR95: 50.0000\n"


@pytest.mark.parametrize("pos,neg,message", [
    ([], [1.0], "positive scores must be"),
    ([1.0], [], "negative scores must be"),
    ([1.0, float("nan")], [1.0], "positive scores .* 1 are not finite"),
    ([1.0], [float("inf"), float("-inf")], "negative scores .* 2 are not finite"),
    (np.ones((3, 2)), [1.0], r"shape is \(3, 2\)"),
])  # fmt: skip
def test_performance_refuses(pos, neg, message):
    with pytest.raises(ValueError, match=message):
        get_performance(pos, neg)


def test_the_threshold_is_that_of_fpr95():
    assert get_threshold(np.arange(20.0)) == 1  # 19 of 20 are at least 1
    assert get_threshold(np.arange(21.0)) == 1  # 20 of 21: 19 are 0.905
    assert get_threshold([0.3, 0.3, 0.3]) == 0.3


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
        found = getattr(ood_utils, name)(torch.from_numpy(z)).numpy()
        np.testing.assert_allclose(found, scores, rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("name", SCORES)
def test_scores_point_one_way_and_stay_finite(name):
    """Confident above undecided, also where a softmax reaches exactly 1 and 0."""
    for scale in (5, 800):
        sure = torch.zeros(1, 100, dtype=torch.float64)
        sure[0, 7] = scale
        scores = [SCORES[name](logits).item() for logits in (sure, torch.zeros_like(sure))]
        assert np.isfinite(scores).all() and scores[0] > scores[1]


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
    ([5, 4, 3, 2, 1, 0], [True, True, False, True, False, False]),
    ([1, 1, 1, 1], [False, True, True, True]),
    ([1, 2], [True, True]),
    ([1, 2], [False, False]),
])  # fmt: skip
def test_aurc_and_augrc_equal_brute_force_over_orders(scores, correct):
    found = ood_utils.aurc(scores, correct), ood_utils.augrc(scores, correct)
    assert found == pytest.approx(risks_by_orders(scores, correct), abs=1e-12)


def test_predicted_classes_by_hand():
    assert ood_utils.predicted_classes([7] * 10) == (1, 1)
    assert ood_utils.predicted_classes([0, 1, 2, 3] * 5) == pytest.approx((4, 0.25))
    # 3/4 and 1/4: the entropy is ln 4 - 3/4 ln 3
    effective, largest = ood_utils.predicted_classes(torch.tensor([5, 5, 2, 5]))
    assert effective == pytest.approx(4 / 3**0.75) and largest == 0.75


class FixedLogits(torch.nn.Module):
    """Returns its input as logits and notes how it was run."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.frozen = torch.nn.BatchNorm2d(3).eval()
        self.runs = set()

    def forward(self, images):
        self.runs.add((self.training, torch.backends.cudnn.conv.fp32_precision))
        return images * self.weight


def test_get_ood_scores_is_float64_in_eval_mode_without_tf32():
    """Of any iterable, every image; in float32 a margin of 21 has a softmax of exactly 1."""
    logits = torch.tensor([[0.0, 3.0], [21.0, 0.0], [1.0, 0.0]])
    labels = torch.tensor([1, 0, 1])
    expected = logits.double().softmax(1).amax(1).tolist()
    assert logits.softmax(1).amax() == 1 and max(expected) < 1
    model = FixedLogits()
    batches = [(logits[:2], labels[:2]), (logits[2:], labels[2:])]
    dataset = torch.utils.data.TensorDataset(logits, labels)
    for loader in (batches, torch.utils.data.DataLoader(dataset, 2)):
        scores, right, wrong = get_ood_scores(model, loader, closed_set=True)
        assert scores.tolist() == get_ood_scores(model, loader).tolist() == expected
        assert right.tolist() == expected[:2] and wrong.tolist() == expected[2:]
    assert model.runs == {(False, "ieee")}
    with pytest.raises(ValueError, match="no batch"):
        get_ood_scores(model, [])


def test_every_layer_and_setting_is_as_it_was_after_scoring():
    """Or after a failure."""
    model, convolutions = FixedLogits(), torch.backends.cudnn.conv
    before = convolutions.fp32_precision
    for loader in ([(torch.zeros(1, 2), torch.zeros(1))], [(None, None)]):
        with contextlib.suppress(InputError):
            get_ood_scores(model, loader)
        assert model.training and not model.frozen.training
        assert convolutions.fp32_precision == before


def test_get_features_is_what_enters_the_last_linear_layer():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3), torch.nn.ReLU())
    model.append(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU()))
    images = torch.randn(5, 2, 2)
    loader = [(images[:3], torch.zeros(3)), (images[3:], torch.zeros(2))]
    features = ood_utils.get_features(model, loader)
    assert torch.equal(features, model[:3](images)) and not model[3][0]._forward_pre_hooks


def test_a_failing_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.pth"
    ood_utils.write_file(path, b"old")

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ood_utils.os, "fsync", fail)
    with pytest.raises(OSError, match="No space left on device: .*model.pth"):
        ood_utils.write_file(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_gpu_without_kernels_is_found_by_launching_one(monkeypatch):
    """It has memory, but computes nothing, like the device "meta"."""
    real_ones = torch.ones
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **options: gpu)
    monkeypatch.setattr(torch, "ones", lambda *size, device: real_ones(*size, device="meta"))
    with pytest.raises(InputError, match="'cuda' cannot be used .*--device cpu"):
        ood_utils.pick_device()

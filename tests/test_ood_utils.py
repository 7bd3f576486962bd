"""Scores and metrics against brute force and formulas; what a network is given."""

from itertools import pairwise, permutations

import numpy as np
import pytest
import torch

import ood_utils
from ood_data import ImageLoader, normalise
from ood_utils import InputError, get_logits, get_ood_scores, get_performance

IMAGES = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
NORMAL, UNIT = normalise(IMAGES), IMAGES / 255
NETWORK, LABELS = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 3)), [0] * 6
rng = np.random.default_rng(0)


def brute_force(pos, neg):
    """AUROC, average precision and FPR95 by counting."""
    wins = [(float(p > n) + float(p >= n)) / 2 for p in pos for n in neg]
    thresholds = sorted({*pos, *neg}, reverse=True)
    true = np.array([sum(pos >= threshold) for threshold in thresholds])
    false = np.array([sum(neg >= threshold) for threshold in thresholds])
    aupr = np.sum(np.diff(true, prepend=0) / len(pos) * true / (true + false))
    fpr95 = false[100 * true >= 95 * len(pos)][0] / len(neg)
    return np.mean(wins), aupr, fpr95


@pytest.mark.parametrize("pos,neg", [
    (rng.integers(0, 6, 80).astype(float), rng.integers(0, 5, 30).astype(float)),  # ties
    (np.arange(20.0), np.array([0.5, 1.0, 1.5, 18.0])),  # a recall of exactly 0.95
])  # fmt: skip
def test_performance_equals_brute_force_in_both_conventions(pos, neg):
    for one, other in ((pos, neg), (-neg, -pos)):
        found = get_performance(one, other)
        np.testing.assert_allclose(found, brute_force(one, other), rtol=0, atol=1e-12)


def test_figures_known_by_hand_are_printed_in_percent(capsys):
    """Of six pairs five are right; precision is 1, 1 and 3 of 4; 2 lies below one of two."""
    scores = torch.tensor([4.0, 2.0, 5.0], dtype=torch.bfloat16, requires_grad=True)
    ood_utils.show_performance(scores, [3, 1])
    assert capsys.readouterr().out == "AUROC: 83.3333, AUPR: 91.6667, FPR95: 50.0000\n"
    assert ood_utils.get_threshold(np.arange(21.0)) == 1  # 20 of 21: 19 are 0.905


@pytest.mark.parametrize("scores", [
    ["1", "2"], [True, False], np.array([1 + 2j]), torch.tensor([True]), [], [1.0, np.nan],
    [np.inf], np.ones((3, 2)), [None, 1.0], np.ma.masked_array([1.0, 2.0], [False, True]),
], ids=str)  # fmt: skip
def test_what_is_no_finite_number_is_refused(scores):
    for pair in ((scores, [1.0]), ([1.0], scores)):
        with pytest.raises(InputError, match="Scores must be"):
            get_performance(*pair)


def test_scores_point_one_way_and_stay_finite():
    """Confident above undecided, also where a softmax reaches exactly 1 and 0."""
    logits = torch.zeros(3, 100, dtype=torch.float64)
    logits[:2, 7] = torch.tensor([5, 800])
    for name, score in ood_utils.SCORES.items():
        *sure, undecided = found = score(logits)
        assert found.isfinite().all() and min(sure) > undecided, name


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


def risks_by_orders(scores, correct):
    """AURC and AUGRC by counting, a mean over every order that the scores allow."""
    count, areas = len(scores), []
    for order in permutations(range(count)):
        if all(scores[a] >= scores[b] for a, b in pairwise(order)):
            errors = np.cumsum([not correct[i] for i in order])
            areas.append((np.mean(errors / np.arange(1, count + 1)), np.mean(errors / count)))
    return np.mean(areas, axis=0)


def test_aurc_and_augrc_equal_brute_force_over_orders():
    scores, correct = [3, 2, 2, 2, 1], [True, False, True, True, False]
    found = ood_utils.get_risks(scores, correct)
    assert found == pytest.approx(risks_by_orders(scores, correct), abs=1e-12)


def test_get_ood_scores_is_float64_in_eval_mode():
    """In float32 a margin of 21 has a softmax of exactly 1."""
    logits, labels = torch.tensor([[0.0, 3.0], [21.0, 0.0], [-1.0, 0.0]]), torch.tensor([1, 0, 0])
    expected = logits.double().softmax(1).amax(1).tolist()
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Dropout(0.9))
    model[0].weight.data = torch.eye(2)
    batches = [(logits[:2], labels[:2]), (logits[2:], labels[2:], "an index")]
    scores, right, wrong = get_ood_scores(model, batches, closed_set=True)
    assert scores.tolist() == get_ood_scores(model, batches).tolist() == expected
    assert right.tolist() == expected[:2] and wrong.tolist() == expected[2:]
    with pytest.raises(InputError, match="needs a label for every"):
        get_ood_scores(model, [(logits, [1, 0, -1])], closed_set=True)


def test_images_that_are_not_normalised_are_refused():
    for images in (UNIT, IMAGES, UNIT * 1.1 - 0.05):  # a bicubic one is a little wider than [0, 1]
        with pytest.raises(InputError, match="not normalised"):
            get_logits(NETWORK, [(images, LABELS)])
    get_logits(NETWORK, [(NORMAL, LABELS), (UNIT, LABELS)])  # some batch is
    get_logits(NETWORK, ImageLoader(UNIT, LABELS))  # a noise may lie anywhere


def test_the_precision_of_the_caller_changes_no_score():
    """In full float32, also on a GPU; afterwards every precision is as it was."""
    cpu, cuda = torch.backends.mkldnn, torch.backends.cuda
    operators = cpu.conv, cpu.matmul, cuda.matmul, torch.backends.cudnn.conv
    cpu.matmul.fp32_precision = "none"  # the default, whatever the tests before left
    before = [operator.fp32_precision for operator in operators]
    network, expected, during = torch.nn.Sequential(NETWORK), NETWORK(NORMAL), []
    network.register_forward_pre_hook(
        lambda *args: during.extend(operator.fp32_precision for operator in operators)
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(get_logits(network, [(NORMAL, LABELS)])[0], expected)
    assert during == ["ieee"] * 4
    assert [operator.fp32_precision for operator in operators] == before


def test_get_features_is_what_enters_the_last_linear_layer():
    head = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU())
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3), torch.nn.ReLU(), head)
    images = torch.randn(5, 2, 2) - 1
    batches = [(images[:3], [0] * 3), (images[3:], [0] * 2)]
    features = ood_utils.get_features(model, batches)
    assert torch.equal(features, model[:3](images)) and not head[0]._forward_pre_hooks

"""Hosts come out as their closed form on all data seen, however it was split into tasks."""

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlayer.methods.class_incremental import RanPAC, SimpleCIL, pooled
from memlayer.methods.infonce import projection, supervised_infonce
from memlayer.methods.mist import adapt
from memlayer.methods.sparse_mask import linear_weights


def data(rows=60, width=6, classes=5, seed=0):
    draws = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=draws)
    centres = 3 * torch.randn(classes, width, generator=draws)
    return centres[labels] + torch.randn(rows, width, generator=draws), 10 + labels


def in_tasks(host, features, labels, bounds):
    for first, last in zip([0, *bounds], [*bounds, len(labels)], strict=True):
        if first < last:
            host.learn(features[first:last], labels[first:last])
    return host


bounds_of = st.lists(st.integers(0, 60), max_size=5).map(sorted)


@settings(deadline=None)
@given(bounds_of, st.integers(0, 2**32))
def test_prototypes_are_the_means_of_all_data_seen(bounds, seed):
    features, labels = data(seed=seed)
    host = in_tasks(SimpleCIL(), features, labels, bounds)
    means = torch.stack([features[labels == label].mean(0) for label in host.classes])
    torch.testing.assert_close(host.prototypes, means, rtol=1e-4, atol=1e-5)  # float32
    cosines = torch.cosine_similarity(features[:, None], means[None], dim=2)
    torch.testing.assert_close(host.scores(features), cosines, rtol=1e-4, atol=1e-5)
    assert torch.equal(host.predict(features), torch.tensor(host.classes)[host.scores(features).argmax(1)])


@settings(deadline=None)
@given(bounds_of, st.integers(0, 2**32))
def test_ranpac_is_ridge_regression_on_all_data_seen(bounds, seed):
    """As the least squares of rows with sqrt(ridge) times the identity below, on random features written out."""
    features, labels = data(seed=seed)
    host = in_tasks(RanPAC(6, 20, ridges=[0.3], seed=7), features, labels, bounds)
    projection = torch.randn(6, 20, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    hidden = (features.double() @ projection).clamp(min=0)
    targets = torch.stack([(labels == label).double() for label in host.classes], dim=1)
    rows = torch.cat([hidden, 0.3**0.5 * torch.eye(20, dtype=torch.float64)])
    weights = torch.linalg.lstsq(rows, torch.cat([targets, torch.zeros(20, targets.shape[1])])).solution
    torch.testing.assert_close(host.scores(features), hidden @ weights, rtol=1e-6, atol=1e-8)  # float64


def test_the_ridge_is_that_with_the_least_error_on_the_last_fifth():
    features, labels = data(rows=50)
    ridges = [1e-3, 1.0, 1e3, 1e6]
    chosen = RanPAC(6, 40, ridges, seed=1)
    chosen.learn(features, labels)
    errors = []
    for ridge in ridges:
        part = RanPAC(6, 40, [ridge], seed=1)
        part.learn(features[:40], labels[:40])
        targets = torch.stack([(labels[40:] == label).double() for label in part.classes], dim=1)
        errors.append(float((part.scores(features[40:]) - targets).square().mean()))
    assert chosen.ridge == ridges[errors.index(min(errors))]
    assert len(set(errors)) == 4


def test_both_tell_new_classes_from_old_ones_after_every_task():
    features, labels = data(rows=300)
    order = labels.argsort(stable=True)
    features, labels = features[order], labels[order]
    for host in (SimpleCIL(), RanPAC(6, 100)):
        for label in range(10, 15):
            mine = labels == label
            host.learn(features[mine], labels[mine])
            seen = labels <= label
            assert (host.predict(features[seen]) == labels[seen]).float().mean() > 0.9
        assert host.classes == [10, 11, 12, 13, 14]


def test_features_are_the_position_asked_for_whatever_the_padding():
    hidden = torch.arange(24.0).view(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]])
    assert torch.equal(pooled(hidden, mask, "first"), torch.stack([hidden[0, 0], hidden[1, 1]]))
    assert torch.equal(pooled(hidden, mask, "last"), torch.stack([hidden[0, 1], hidden[1, 3]]))
    assert torch.equal(pooled(hidden, mask, "mean"), torch.stack([hidden[0, :2].mean(0), hidden[1, 1:].mean(0)]))
    batch = tiny.batch(lengths=(7, 4))
    hidden = tiny.decoder().model(batch["input_ids"], attention_mask=batch["attention_mask"])[0]
    assert torch.equal(pooled(hidden, batch["attention_mask"], "last")[1], hidden[1, 3])


def texts(label, rows, seed):
    """Sentences of a class: of every class most tokens are its own ten."""
    draws = torch.Generator().manual_seed(100 * label + seed)
    ours = 4 + 10 * label + torch.randint(10, (rows, 9), generator=draws)
    anything = torch.randint(4, tiny.VOCAB, (rows, 9), generator=draws)
    return ours.where(torch.rand(rows, 9, generator=draws) < 0.9, anything), torch.full((rows,), label)


def test_mist_comes_before_hosts_over_a_decoders_features():
    """The plug-in of the paper on text: before each task tune, then let the host take in the task's features."""
    model = tiny.decoder()
    head, start = projection(tiny.WIDTH, seed=0), tiny.snapshot(model)

    def features(ids):
        return pooled(model.base_model(input_ids=ids)[0], torch.ones_like(ids), "mean")

    hosts = {"simplecil": SimpleCIL(), "ranpac": RanPAC(tiny.WIDTH, 100)}
    for task in ([0, 1], [2, 3]):
        ids, labels = map(torch.cat, zip(*(texts(label, 30, 0) for label in task), strict=True))
        adapt(model, head, lambda: [supervised_infonce(head(features(ids)), labels)], epochs=3, lr=0.01)  # noqa: B023
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            for host in hosts.values():
                host.learn(features(ids[order]), labels[order])
    ids, labels = map(torch.cat, zip(*(texts(label, 30, 1) for label in range(4)), strict=True))
    with torch.no_grad():
        for name, host in hosts.items():
            assert (host.predict(features(ids)) == labels).float().mean() > 0.45, name  # chance is 0.25
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])}
    assert moved
    assert moved <= set(linear_weights(model))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: SimpleCIL().predict(torch.ones(1, 2)), "no class was learned yet"),
        (
            lambda: SimpleCIL().learn(torch.ones(2, 3), torch.tensor([1])),
            r"shapes \[2, 3\] and \[1\], must be \(B, 3\)",
        ),
        (lambda: RanPAC(4, 5).learn(torch.ones(2, 3), torch.tensor([1, 2])), r"must be \(B, 4\)"),
        (lambda: RanPAC(3, 5).learn(torch.ones(0, 3), torch.zeros(0)), "a task without examples"),
        (lambda: RanPAC(3, 5).learn(torch.ones(1, 3), torch.tensor([1])), "a task of 1 rows is too small"),
        (lambda: RanPAC(3, 5, ridges=[0.0]), r"ridges are \[0.0\], must be above 0"),
        (lambda: pooled(torch.ones(1, 2, 3), torch.ones(1, 2), "max"), "the 'max' position, must be 'first' or"),
        (lambda: pooled(torch.ones(1, 2, 3), torch.zeros(1, 2), "mean"), "has no position that counts"),
    ],
)
def test_what_cannot_be_learned_or_pooled_is_refused(make, named):
    with pytest.raises(ValueError, match=named):
        make()

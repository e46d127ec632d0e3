"""Classifiers of a frozen model's features that learn classes task after task, in closed form: the hosts of MIST.

``SimpleCIL`` keeps the mean of each class, ``RanPAC`` a ridge regression on random features. Neither forgets as long as
the features of an example stay the same: both come out as if all tasks had been learned at once. When MIST tunes the
model between tasks the earlier statistics are of the model before, and nothing here repairs them.

They take features of anything; ``pooled`` makes them of a text model's hidden states.

Shapes: B examples, D features, M random features, C classes seen, L positions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def pooled(hidden_BLD: Tensor, mask_BL: Tensor, how: str) -> Tensor:
    """One vector an example: an encoder's "first" position, the "last" that counts (a decoder's), or their "mean".

    Args:
        hidden_BLD: hidden states behind the last layer.
        mask_BL: 1 where a position counts, padding 0.

    Returns:
        shape (B, D), float32.

    Raises:
        ValueError: an unknown way, or an example of which no position counts.
    """
    if how not in ("first", "last", "mean"):
        raise ValueError(f"features are the {how!r} position, must be 'first' or 'last' or 'mean'")
    mask_BL = mask_BL.bool()
    if not bool(mask_BL.any(1).all()):
        raise ValueError("an example has no position that counts")
    hidden_BLD = hidden_BLD.float()
    if how == "mean":
        return hidden_BLD.where(mask_BL[..., None], 0.0).sum(1) / mask_BL.sum(1, keepdim=True)
    position_L = torch.arange(mask_BL.shape[1], device=mask_BL.device)
    at_B = mask_BL.int().argmax(1) if how == "first" else position_L.where(mask_BL, -1).amax(1)
    return hidden_BLD[torch.arange(len(at_B), device=at_B.device), at_B]


class _Classes:
    """Which column of the scores is which class: in the order in which they were first seen."""

    def __init__(self):
        self.classes: list[int] = []

    def _columns(self, labels_B: Tensor) -> Tensor:
        """The column of each label; new ones are added."""
        self.classes += sorted(set(labels_B.tolist()) - set(self.classes))
        column = {label: number for number, label in enumerate(self.classes)}
        return torch.tensor([column[label] for label in labels_B.tolist()], device=labels_B.device)

    def predict(self, features_BD: Tensor) -> Tensor:
        """The label of the highest score among all classes seen, shape (B,)."""
        if not self.classes:
            raise ValueError("no class was learned yet")
        best_B = self.scores(features_BD).argmax(1)
        return torch.tensor(self.classes, device=best_B.device)[best_B].to(features_BD.device)


class SimpleCIL(_Classes):
    """Nearest class mean by cosine. Implements SimpleCIL (arXiv:2303.07338).

    Ours: a class may come in several tasks; its mean is that of all its examples.
    """

    def __init__(self):
        super().__init__()
        self._sums_CD = self._counts_C = torch.zeros(0)

    def learn(self, features_BD: Tensor, labels_B: Tensor) -> None:
        """Take in the examples of a task."""
        _check(features_BD, labels_B, self._sums_CD.shape[1] if self.classes else features_BD.shape[1])
        column_B, width = self._columns(labels_B), features_BD.shape[1]
        if self._sums_CD.ndim == 1:
            self._sums_CD, self._counts_C = features_BD.new_zeros(0, width), features_BD.new_zeros(0)
        new = len(self.classes) - len(self._counts_C)
        self._sums_CD = F.pad(self._sums_CD, (0, 0, 0, new)).index_add(0, column_B, features_BD)
        self._counts_C = F.pad(self._counts_C, (0, new)).index_add(0, column_B, torch.ones_like(features_BD[:, 0]))

    @property
    def prototypes(self) -> Tensor:
        """The mean of each class, not normalised, shape (C, D)."""
        return self._sums_CD / self._counts_C[:, None]

    def scores(self, features_BD: Tensor) -> Tensor:
        """Cosines, shape (B, C)."""
        return F.normalize(features_BD, dim=1) @ F.normalize(self.prototypes, dim=1).T


class RanPAC(_Classes):
    """Ridge regression of one-hot labels on relu(features @ W), W random and fixed, from its normal equations alone.

    Implements phase 2 of RanPAC (arXiv:2307.02251); its first phase, which trains adapters on the first
    task, is left out. Ours: float64 on the CPU, 8 M (M + C) bytes.

    Args:
        width: D.
        num_random: M; the paper's 10,000.
        ridges: what the ridge penalty is chosen from at each task, by the squared error on the last fifth of the task's
            rows of a fit to the others. Give the rows in a random order. One value is taken as it is.
        seed: of W, standard normal.
    """

    def __init__(
        self,
        width: int,
        num_random: int = 10_000,
        ridges: Sequence[float] = tuple(10.0**power for power in range(-8, 9)),
        seed: int = 0,
    ):
        super().__init__()
        if not ridges or not all(ridge > 0 for ridge in ridges):
            raise ValueError(f"ridges are {list(ridges)}, must be above 0")
        draws = torch.Generator().manual_seed(seed)
        self._random_DM = torch.randn(width, num_random, generator=draws, dtype=torch.float64)
        self._gram_MM = torch.zeros(num_random, num_random, dtype=torch.float64)
        self._moments_MC = torch.zeros(num_random, 0, dtype=torch.float64)
        self._weights_MC = self._moments_MC
        self._ridges = tuple(ridges)
        self.ridge = self._ridges[0]

    def learn(self, features_BD: Tensor, labels_B: Tensor) -> None:
        """Take in the examples of a task, choose the penalty, and solve."""
        _check(features_BD, labels_B, len(self._random_DM))
        if len(self._ridges) > 1 and len(labels_B) < 2:
            raise ValueError(f"a task of {len(labels_B)} rows is too small to choose a ridge penalty: give one")
        hidden_BM = self._hidden(features_BD)
        column_B = self._columns(labels_B)
        targets_BC = F.one_hot(column_B, len(self.classes)).to(hidden_BM)
        self._gram_MM += hidden_BM.T @ hidden_BM
        new = len(self.classes) - self._moments_MC.shape[1]
        self._moments_MC = F.pad(self._moments_MC, (0, new)) + hidden_BM.T @ targets_BC
        if len(self._ridges) > 1:
            self.ridge = _best_ridge(hidden_BM, targets_BC, self._ridges)
        self._weights_MC = _solve(self._gram_MM, self._moments_MC, self.ridge)

    def scores(self, features_BD: Tensor) -> Tensor:
        """What the regression says of each class, shape (B, C), float64."""
        return self._hidden(features_BD) @ self._weights_MC

    def _hidden(self, features_BD: Tensor) -> Tensor:
        return (features_BD.to(self._random_DM) @ self._random_DM).relu()


def _solve(gram_MM: Tensor, moments_MC: Tensor, ridge: float) -> Tensor:
    return torch.linalg.solve(gram_MM + ridge * torch.eye(len(gram_MM), dtype=gram_MM.dtype), moments_MC)


def _best_ridge(hidden_BM: Tensor, targets_BC: Tensor, ridges: Sequence[float]) -> float:
    """The penalty with the least squared error on the last fifth of the rows, of a fit to the first four."""
    fit = len(hidden_BM) * 4 // 5
    rows_BM, held_BM = hidden_BM[:fit], hidden_BM[fit:]
    gram_MM, moments_MC = rows_BM.T @ rows_BM, rows_BM.T @ targets_BC[:fit]
    errors = [
        float((held_BM @ _solve(gram_MM, moments_MC, ridge) - targets_BC[fit:]).square().mean()) for ridge in ridges
    ]
    return ridges[errors.index(min(errors))]


def _check(features_BD: Tensor, labels_B: Tensor, width: int) -> None:
    if features_BD.ndim != 2 or features_BD.shape[1] != width or labels_B.shape != features_BD.shape[:1]:
        raise ValueError(
            f"features and labels have shapes {list(features_BD.shape)} and {list(labels_B.shape)}, must be "
            f"(B, {width}) and (B,)"
        )
    if not len(labels_B):
        raise ValueError("a task without examples teaches nothing")

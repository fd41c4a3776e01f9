"""How parallel branches differ: their errors, correlations and shares in the loss on one batch."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BranchDiversity:
    """Measures of how m branches differ, in float64.

    Correlations (m,m) are Pearson's over images and positions, with the mean of each channel removed, so differences
    between channels do not count; a constant branch has the correlation 0. ``squared_error`` (m,) and
    ``squared_error_of_mean`` () are means over all elements. ``loss_share`` (m,) sums to 1; it is None if the loss is
    not a quadratic form of the errors.
    """

    error_correlation: Tensor
    feature_correlation: Tensor
    squared_error: Tensor
    squared_error_of_mean: Tensor
    loss_share: Tensor | None

    @property
    def ambiguity(self) -> Tensor:
        """The mean squared error of the branches minus that of their mean, () (Krogh & Vedelsby, 1994).

        It is the variance among the branches, and the gain of averaging: 0 if all branches are equal.
        """
        return self.squared_error.mean() - self.squared_error_of_mean

    def scalars(self) -> dict[str, Tensor]:
        """All measures as scalars by name; of correlations the mean, minimum and maximum over pairs, if any."""
        count = len(self.squared_error)
        named = {"squared_error_of_mean": self.squared_error_of_mean, "ambiguity": self.ambiguity}
        upper = torch.triu_indices(count, count, 1, device=self.squared_error.device)
        for name, matrix in (("error", self.error_correlation), ("feature", self.feature_correlation)):
            if count > 1:
                pairs = matrix[upper[0], upper[1]]
                kept = {"mean": pairs.mean(), "min": pairs.amin(), "max": pairs.amax()}
                named.update({f"{name}_correlation/{key}": value for key, value in kept.items()})
        for name, values in (("squared_error", self.squared_error), ("loss_share", self.loss_share)):
            if values is not None:
                named.update({f"{name}/branch{index + 1}": value for index, value in enumerate(values)})
        return named


@torch.no_grad()
def branch_diversity(branches: Tensor, target: Tensor, form: Tensor | None = None) -> BranchDiversity:
    """Compare m branch features (m,N,C,h,w) with each other and with their target (N,C,h,w).

    ``form`` (m,m) is the matrix F of a loss e' F e of the errors e_j. The share of branch j in the loss is
    e_j' (F e)_j / e' F e, half of its contribution to the derivative along e; all shares are 0 if the loss is 0.
    """
    if branches.shape[1:] != target.shape or target.ndim != 4:
        raise ValueError(
            f"branches must be (m,N,C,h,w) for a target (N,C,h,w), but the shapes are {tuple(branches.shape)} and "
            f"{tuple(target.shape)}"
        )
    features, x0 = branches.double(), target.double()
    errors = x0 - features
    share = None
    if form is not None:
        flat = errors.flatten(1)
        parts = form.to(flat) * (flat @ flat.T)
        total = parts.sum()
        share = torch.where(total > 0, parts.sum(1) / total, 0.0)
    return BranchDiversity(
        error_correlation=_correlation(errors),
        feature_correlation=_correlation(features),
        squared_error=errors.square().flatten(1).mean(1),
        squared_error_of_mean=errors.mean(0).square().mean(),
        loss_share=share,
    )


def as_floats(scalars: Mapping[str, Tensor]) -> dict[str, float]:
    """Scalars as plain numbers, with a single wait for their device."""
    if not scalars:
        return {}
    values = torch.stack([value.double() for value in scalars.values()]).tolist()
    return dict(zip(scalars, values, strict=True))


def _correlation(x: Tensor) -> Tensor:
    """(m,N,C,h,w) to (m,m)."""
    centred = (x - x.mean((1, 3, 4), keepdim=True)).flatten(1)
    norms = centred.norm(dim=1, keepdim=True)
    # Rounding gives a constant a small variance.
    varies = norms > 1e-12 * x.flatten(1).norm(dim=1, keepdim=True)
    unit = torch.where(varies, centred / norms, 0.0)
    return (unit @ unit.T).clamp(-1, 1)

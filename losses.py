"""Losses of semantic segmentation, by name, and sums of them.

All take logits (B, C, H, W) and a mask (B, H, W) of class ids, in which `IGNORE` marks pixels that
teach nothing: they have no gradient and do not count in any mean. A batch of nothing else has the
loss 0.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable

import torch
from segmentation_models_pytorch.losses import LovaszLoss
from torch import Tensor, nn
from torch.nn import functional

from ImageData import IGNORE, InputError
from ModelConfig import SegmentationConfig

TERM = re.compile(r"\s*(?:([0-9]*\.?[0-9]+)\s*\*)?\s*([a-z_]+)\s*")
LEAST_SHARE = 0.01  # of a batch, by which a class is weighed at least
LEAST_PIXELS = 16  # that a batch's hard examples are at least


class MaskLoss(nn.Module):
    """A weighted sum of losses.

    Args:
        conf: Which losses, and their options.
        classes: Number of classes.
    """

    def __init__(self, conf: SegmentationConfig, classes: int) -> None:
        """Read the names and check the weights of the classes.

        Raises:
            InputError: A loss is not known, or the weights do not fit the classes or the loss.
        """
        super().__init__()
        self.terms = [(weight, LOSSES[name]) for name, weight in parse_loss(conf.loss).items()]
        self.conf = conf
        weights = conf.class_weights
        if weights is not None and len(weights) != classes:
            raise InputError(
                f"segmentation.class_weights must hold a weight for each of the {classes} classes, "
                f"got {len(weights)}"
            )
        if weights is not None and not any(weights):
            raise InputError("segmentation.class_weights are all 0, so that nothing is learnt")
        if weights is not None and all(loss is _lovasz for _, loss in self.terms):
            raise InputError("segmentation.class_weights have no part in lovasz; leave them out")
        weights = torch.ones(classes) if weights is None else torch.tensor(weights)
        self.register_buffer("weights", weights.float(), persistent=False)

    def forward(self, logits: Tensor, mask: Tensor) -> Tensor:
        """Return the loss, a scalar."""
        known = mask != IGNORE
        flat = logits.float().movedim(1, -1)[known]  # (P, C), in full precision
        truth = mask[known].long()
        if not len(truth):
            return logits.float().sum() * 0.0
        losses = [weight * loss(flat, truth, self) for weight, loss in self.terms]
        return torch.stack(losses).sum()


def parse_loss(text: str) -> dict[str, float]:
    """Read a sum such as "0.5*cross_entropy+0.5*dice" as name -> weight.

    Raises:
        InputError: It is no such sum, or a name is not known.
    """
    terms: dict[str, float] = {}
    for part in text.split("+"):
        match = TERM.fullmatch(part)
        name = match[2] if match else part.strip()
        if name not in LOSSES:
            close = difflib.get_close_matches(name, LOSSES, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(LOSSES)}"
            raise InputError(
                f"segmentation.loss must be a loss or a sum such as 0.5*cross_entropy+0.5*dice, "
                f"got {text!r}, in which {name!r} is none; {hint}"
            )
        terms[name] = terms.get(name, 0.0) + float(match[1] or 1)
    if not all(terms.values()):
        raise InputError(f"segmentation.loss {text!r} holds a loss of weight 0; leave it out")
    return terms


def _cross_entropy(logits: Tensor, truth: Tensor, of: MaskLoss) -> Tensor:
    per_pixel = functional.cross_entropy(logits, truth, reduction="none")
    return _mean(per_pixel, of.weights[truth])


def _wbce_adaptive(logits: Tensor, truth: Tensor, of: MaskLoss) -> Tensor:
    """Weigh the classes of each batch alike, however many of its pixels show each.

    A pixel weighs 1 / share of its class in the batch; a class in less than `LEAST_SHARE` of it no
    more than one that has that share, so that a few pixels do not outweigh all others.

    References:
        Cui et al. 2019, Class-balanced loss, for the inverse frequencies that it starts from; ours
        are of the batch. Of two classes it is the weighted binary cross entropy.
    """
    per_pixel = functional.cross_entropy(logits, truth, reduction="none")
    shares = torch.bincount(truth, minlength=logits.shape[1]).to(per_pixel) / len(truth)
    return _mean(per_pixel, (of.weights / shares.clamp(min=LEAST_SHARE))[truth])


def _focal(logits: Tensor, truth: Tensor, of: MaskLoss) -> Tensor:
    """Weigh easy pixels less.

    References: Lin et al. 2017, Focal loss, eq. 4, on the probability of the true class among all.
    """
    per_pixel = functional.cross_entropy(logits, truth, reduction="none")
    hard = (-torch.expm1(-per_pixel)).clamp(min=1e-7) ** of.conf.focal_gamma
    return _mean(hard * per_pixel, of.weights[truth])


def _ohem(logits: Tensor, truth: Tensor, of: MaskLoss) -> Tensor:
    """Learn from the hardest pixels of a batch only, a share of them.

    References: Shrivastava et al. 2016, Training region-based detectors with online hard example
    mining; ours are pixels.
    """
    weighted = functional.cross_entropy(logits, truth, reduction="none") * of.weights[truth]
    count = max(round(of.conf.ohem_share * len(weighted)), min(LEAST_PIXELS, len(weighted)))
    return weighted.topk(count).values.mean()


def _overlap(false_positives: float, false_negatives: float) -> Callable:
    """Make a loss of the overlap of classes, 1 - TP / (TP + a FP + b FN), of probabilities.

    Classes that a batch does not show, and that therefore cannot be overlapped, are left out.
    """

    def loss(logits: Tensor, truth: Tensor, of: MaskLoss) -> Tensor:
        return _tversky_of(logits, truth, of, false_positives, false_negatives)

    return loss


def _tversky(logits: Tensor, truth: Tensor, of: MaskLoss) -> Tensor:
    return _tversky_of(logits, truth, of, of.conf.tversky_alpha, of.conf.tversky_beta)


def _tversky_of(
    logits: Tensor, truth: Tensor, of: MaskLoss, false_positives: float, false_negatives: float
) -> Tensor:
    """Return the loss of the overlap of the classes that a batch shows.

    References: Salehi et al. 2017, Tversky loss, eq. 3; Milletari et al. 2016, V-Net, for half and
    half, dice; Rahman and Wang 2016 for one and one, jaccard. Ours is over the pixels of a batch,
    not of an image.
    """
    probabilities = logits.softmax(dim=1)
    wanted = functional.one_hot(truth, logits.shape[1]).to(probabilities)
    hit = (probabilities * wanted).sum(dim=0)
    wrong, missed = probabilities.sum(dim=0) - hit, wanted.sum(dim=0) - hit
    score = hit / (hit + false_positives * wrong + false_negatives * missed).clamp(min=1e-7)
    return _mean(1 - score, of.weights * (wanted.sum(dim=0) > 0))


_lovasz_softmax = LovaszLoss(mode="multiclass")


def _lovasz(logits: Tensor, truth: Tensor, of: MaskLoss) -> Tensor:
    """Minimise the Jaccard index itself, by its convex extension; classes weigh the same.

    References: Berman et al. 2018, The Lovász-Softmax loss.
    """
    return _lovasz_softmax(logits.T[None, :, :, None], truth[None, :, None])


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).sum() / weights.sum().clamp(min=1e-7)


LOSSES = {
    "cross_entropy": _cross_entropy,
    "wbce_adaptive": _wbce_adaptive,
    "focal": _focal,
    "dice": _overlap(0.5, 0.5),
    "jaccard": _overlap(1.0, 1.0),
    "lovasz": _lovasz,
    "tversky": _tversky,
    "ohem": _ohem,
}

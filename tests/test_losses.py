"""Losses of masks: pixels that do not count teach nothing, and all of them are learnt by."""

from __future__ import annotations

import pytest
import torch
from segmentation_models_pytorch import losses as theirs

from ImageData import IGNORE, InputError
from losses import LOSSES, MaskLoss, parse_loss
from ModelConfig import SegmentationConfig


def loss_of(name, classes=3, **options):
    return MaskLoss(SegmentationConfig(loss=name, **options), classes)


def a_mask():
    torch.manual_seed(0)
    mask = torch.randint(3, (2, 12, 12))
    mask[:, :4] = IGNORE
    return mask


SUMS = [*LOSSES, "0.5*cross_entropy+0.5*dice"]


@pytest.mark.parametrize("name", SUMS)
def test_pixels_that_do_not_count_have_no_gradient_and_change_nothing(name):
    mask, loss = a_mask(), loss_of(name)
    logits = torch.randn(2, 3, 12, 12, requires_grad=True)
    value = loss(logits, mask)
    value.backward()
    assert (logits.grad[:, :, :4] == 0).all()
    assert (logits.grad[:, :, 4:] != 0).any()
    other = logits.detach().clone()
    other[:, :, :4] = 50.0
    torch.testing.assert_close(loss(other, mask), value.detach())
    # as if only the rest were there
    torch.testing.assert_close(loss(logits[:, :, 4:], mask[:, 4:]), value)


@pytest.mark.parametrize("name", SUMS)
def test_a_batch_of_nothing_known_has_no_loss(name):
    logits = torch.randn(1, 3, 8, 8, requires_grad=True)
    value = loss_of(name)(logits, torch.full((1, 8, 8), IGNORE))
    value.backward()
    assert float(value.detach()) == 0
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("name", SUMS)
def test_a_perfect_prediction_costs_nothing_and_a_wrong_one_much(name):
    mask = a_mask()
    wanted = torch.nn.functional.one_hot(mask.clamp(max=2), 3).movedim(-1, 1).float()
    assert float(loss_of(name)(40 * wanted, mask)) < 1e-4
    assert float(loss_of(name)(-40 * wanted, mask)) > 0.5


@pytest.mark.parametrize("name", SUMS)
def test_every_loss_learns_a_toy_image(name):
    mask, loss = a_mask(), loss_of(name)
    logits = torch.zeros(2, 3, 12, 12, requires_grad=True)
    optimizer = torch.optim.Adam([logits], 0.3)
    for _ in range(60):
        optimizer.zero_grad()
        loss(logits, mask).backward()
        optimizer.step()
    known = mask != IGNORE
    assert (logits.argmax(dim=1) == mask)[known].float().mean() > 0.98


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("dice", theirs.DiceLoss("multiclass", ignore_index=IGNORE)),
        ("jaccard", theirs.JaccardLoss("multiclass", ignore_index=IGNORE)),
        ("tversky", theirs.TverskyLoss("multiclass", ignore_index=IGNORE, alpha=0.3, beta=0.7)),
        ("lovasz", theirs.LovaszLoss("multiclass", ignore_index=IGNORE)),
    ],
)
def test_overlaps_are_those_of_the_library_where_all_is_known(name, reference):
    torch.manual_seed(1)
    logits, mask = torch.randn(2, 3, 12, 12), torch.randint(3, (2, 12, 12))
    # what the library makes of overlap is an approximation for uncertain predictions, so sure ones
    sure = 40 * torch.nn.functional.one_hot(logits.argmax(dim=1), 3).movedim(-1, 1).float()
    torch.testing.assert_close(loss_of(name)(sure, mask), reference(sure, mask))


def test_focal_without_gamma_is_cross_entropy_and_hard_pixels_weigh_more():
    logits, mask = torch.randn(1, 3, 6, 6), torch.randint(3, (1, 6, 6))
    cross_entropy = torch.nn.functional.cross_entropy(logits, mask)
    torch.testing.assert_close(loss_of("focal", focal_gamma=0.0)(logits, mask), cross_entropy)
    torch.testing.assert_close(loss_of("cross_entropy")(logits, mask), cross_entropy)
    assert loss_of("focal")(logits, mask) < cross_entropy
    assert loss_of("ohem", ohem_share=0.5)(logits, mask) > cross_entropy
    torch.testing.assert_close(loss_of("ohem", ohem_share=1.0)(logits, mask), cross_entropy)


def test_adaptive_weights_make_the_classes_of_a_batch_weigh_the_same():
    torch.manual_seed(0)
    logits = torch.randn(1, 3, 20, 20)
    mask = torch.zeros(1, 20, 20, dtype=torch.int64)
    mask[:, :4] = 1  # a fifth of the pixels; the third class is not there
    per_pixel = torch.nn.functional.cross_entropy(logits, mask, reduction="none")
    expected = (per_pixel[mask == 0].mean() + per_pixel[mask == 1].mean()) / 2
    torch.testing.assert_close(loss_of("wbce_adaptive")(logits, mask), expected)
    # a class of a single pixel of 400 weighs as one of a hundredth
    mask = torch.zeros(1, 20, 20, dtype=torch.int64)
    mask[0, 0, 0] = 2
    per_pixel = torch.nn.functional.cross_entropy(logits, mask, reduction="none")
    weights = torch.where(mask == 2, 100.0, 400 / 399)
    expected = (per_pixel * weights).sum() / weights.sum()
    torch.testing.assert_close(loss_of("wbce_adaptive")(logits, mask), expected)
    # of two classes it is the binary loss on the difference of their logits
    two, mask = torch.randn(1, 2, 10, 10), (torch.arange(100).view(1, 10, 10) % 4 == 0).long()
    binary = torch.nn.functional.binary_cross_entropy_with_logits(
        two[:, 1] - two[:, 0], mask.float(), reduction="none"
    )
    expected = (binary[mask == 0].mean() + binary[mask == 1].mean()) / 2
    torch.testing.assert_close(loss_of("wbce_adaptive", 2)(two, mask), expected)


def test_weights_of_classes_are_torchs():
    logits, mask, weights = torch.randn(2, 3, 6, 6), torch.randint(3, (2, 6, 6)), (0.1, 0.9, 2.0)
    expected = torch.nn.functional.cross_entropy(logits, mask, weight=torch.tensor(weights))
    value = loss_of("cross_entropy", class_weights=weights)(logits, mask)
    torch.testing.assert_close(value, expected)
    ignoring = loss_of("dice", class_weights=(0.0, 1.0, 1.0))
    assert ignoring(logits, torch.zeros(2, 6, 6, dtype=torch.int64)) == 0


def test_sums_are_read_with_their_weights():
    assert parse_loss("0.5*cross_entropy + dice") == {"cross_entropy": 0.5, "dice": 1.0}
    assert parse_loss("dice+dice") == {"dice": 2.0}
    for text, message in (("", "is none"), ("0*dice", "weight 0"), ("focl", "did you mean focal")):
        with pytest.raises(InputError, match=message):
            parse_loss(text)
    with pytest.raises(InputError, match="no part in lovasz"):
        loss_of("lovasz", class_weights=(1.0, 1.0, 1.0))


def test_of_two_classes_cross_entropy_and_jaccard_are_those_of_one_probability():
    torch.manual_seed(1)
    logits, mask = torch.randn(2, 2, 9, 7), torch.randint(2, (2, 9, 7))
    mask[0, :2] = IGNORE
    known, one = mask != IGNORE, (logits[:, 1] - logits[:, 0])
    truth, score = mask[known].float(), one[known].sigmoid()
    binary = torch.nn.functional.binary_cross_entropy(score, truth)

    def jaccard(p, t):
        return 1 - (p * t).sum() / (p + t - p * t).sum()

    both = (jaccard(score, truth) + jaccard(1 - score, 1 - truth)) / 2
    torch.testing.assert_close(loss_of("cross_entropy", 2)(logits, mask), binary)
    torch.testing.assert_close(loss_of("jaccard", 2)(logits, mask), both)
    torch.testing.assert_close(loss_of("cross_entropy+jaccard", 2)(logits, mask), binary + both)

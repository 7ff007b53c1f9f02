"""Uses of the ops of autoshard/ops/loss.py: see tests/test_rules.py."""

import torch
from torch import Tensor
from torch.nn import Buffer

from uses.arguments import Use, bools, ints, labels, pos, use, x

NONE, MEAN, SUM = 0, 1, 2


def unit(*shape: int) -> Tensor:
    """Between 0 and 1."""
    return x(*shape).sigmoid()


def signs(*shape: int) -> Buffer:
    return Buffer(torch.where(bools(*shape), 1.0, -1.0).double())


# fmt: off
USES: dict[str, list[Use]] = {
    "aten.binary_cross_entropy.default": [
        use("m.1 m.0", unit(4, 6), unit(4, 6)),
        use("p.1 p.0", unit(4, 6), unit(4, 6), Buffer(pos(4, 6)), NONE),
        use("m.1 m.0", unit(4, 6), unit(4, 6), Buffer(pos(6)), MEAN),
        use("p.0", unit(12), unit(12), None, SUM),
    ],
    "aten.binary_cross_entropy_with_logits.default": [
        use("m.1 m.0", x(4, 6), unit(4, 6)),
        use("p.1 p.0", x(4, 6), unit(4, 6), Buffer(pos(6)), Buffer(pos(6)), NONE),
        use("m.1 m.0", x(4, 6), unit(4, 6), None, Buffer(pos(6)), MEAN),
        use("p.1 p.0", x(4, 6), unit(4, 6), Buffer(pos(4, 1)), None, SUM),
    ],
    "aten.cosine_embedding_loss.default": [
        use("m.0", x(12, 4), x(12, 4), signs(12)),
        use("p.0", x(12, 4), x(12, 4), signs(12), 0.2, NONE),
        use("p.0", x(12, 4), x(12, 4), signs(12), 0.2, SUM),
        use("", x(4), x(4), signs()),
    ],
    "aten.cross_entropy_loss.default": [
        use("b c", x(12, 6), ints(6, 12)),
        use("b c", x(12, 6), labels(6, 12), Buffer(pos(6)), 0),
        use("b c", x(12, 12), labels(12, 12), Buffer(pos(12)), 1, -100, 0.2),
        use("b c", x(12, 6), labels(6, 12), None, 2, -100, 0.2),
        use("b c", x(12, 6), ints(6, 12), Buffer(pos(6)), 2, 3, 0.2),
        use("b c s.1", x(4, 6, 2, 3), labels(6, 4, 2, 3), Buffer(pos(6)), 1),
        use("b c s.0", x(4, 12, 4), labels(12, 4, 4), None, 0, -100, 0.1),
        use("c", x(6), ints(6)),
        use("c", x(6), ints(6), Buffer(pos(6)), 1, -100, 0.3),
        use("b c", x(12, 6), Buffer(pos(12, 6)), None, 1),
        use("b c", x(12, 12), pos(12, 12), None, 2, -100, 0.2),
        use("b c s.0", x(4, 6, 2), pos(4, 6, 2), Buffer(pos(6)), 0, -100, 0.1),
        use("b c s.0", x(4, 12, 6), pos(4, 12, 6), Buffer(pos(12)), 1, -100, 0.1),
        use("c", x(6), pos(6)),
        use("c", x(12), pos(12), Buffer(pos(12)), 0, -100, 0.2),
    ],
    "aten.hinge_embedding_loss.default": [
        use("m.1 m.0", x(4, 6), signs(4, 6)),
        use("p.1 p.0", x(4, 6), signs(4, 6), 0.5, NONE),
        use("p.0", x(12), signs(12), 0.5, SUM),
    ],
    "aten.huber_loss.default": [
        use("m.1 m.0", x(4, 6), x(4, 6)),
        use("p.1 p.0", x(4, 6), x(4, 6), NONE, 0.5),
        use("m.1 m.0", x(4, 6), x(4, 6), MEAN, 0.5),
        use("p.1 p.0", x(4, 6), x(4, 6), SUM),
    ],
    "aten.kl_div.default": [
        use("m.1 m.0", x(4, 6), pos(4, 6)),
        use("p.1 p.0", x(4, 6), pos(4, 6), NONE),
        use("p.1 p.0", x(4, 6), pos(4, 6), SUM),
        use("m.1 m.0", x(4, 6), x(4, 6), MEAN, log_target=True),
        use("p.1 p.0", x(4, 6), x(4, 6), SUM, log_target=True),
    ],
    "aten.l1_loss.default": [
        use("m.1 m.0", x(4, 6), x(4, 6)),
        use("p.1 p.0", x(4, 6), x(4, 6), NONE),
        use("p.1 p.0", x(4, 6), x(6), SUM),
        use("m.1 m.0", x(4, 1), x(6), MEAN),
    ],
    "aten.margin_ranking_loss.default": [
        use("m.0", x(12), x(12), signs(12)),
        use("p.0", x(12), x(12), signs(12), 0.3, NONE),
        use("p.1 p.0", x(4, 6), x(4, 6), signs(4, 6), 0.3, SUM),
    ],
    "aten.mse_loss.default": [
        use("m.1 m.0", x(4, 6), x(4, 6)),
        use("m.2 m.1 m.0", x(2, 4, 6), x(2, 4, 6), MEAN),
        use("p.1 p.0", x(4, 6), x(4, 6), NONE),
        use("p.1 p.0", x(4, 6), x(4, 6), SUM),
        use("", x(), x()),
        use("", x(0, 1), x(0, 1), MEAN),
    ],
    "aten.multi_margin_loss.default": [
        use("m.0", x(12, 4), ints(4, 12)),
        use("p.0", x(12, 4), ints(4, 12), 2, 0.5, Buffer(pos(4)), NONE),
        use("p.0", x(12, 4), ints(4, 12), 1, 1, Buffer(pos(4)), SUM),
        use("", x(4), ints(4)),
    ],
    "aten.multilabel_margin_loss.default": [
        use("m.0", x(12, 4), ints(4, 12, 4, low=-1)),
        use("p.0", x(12, 4), ints(4, 12, 4, low=-1), NONE),
        use("p.0", x(12, 4), ints(4, 12, 4, low=-1), SUM),
        use("", x(4), ints(4, 4, low=-1)),
    ],
    "aten.nll_loss.default": [
        use("b c", x(12, 6), labels(6, 12)),
        use("b c", x(12, 6), ints(6, 12), Buffer(pos(6)), MEAN, 2),
        use("b c", x(12, 6), labels(6, 12), Buffer(pos(6)), NONE),
        use("b c", x(12, 6), labels(6, 12), None, SUM),
        use("c", x(6), ints(6)),
    ],
    "aten.nll_loss2d.default": [
        use("b c s.1", x(4, 6, 2, 3), labels(6, 4, 2, 3)),
        use("b c s.1", x(4, 6, 2, 3), labels(6, 4, 2, 3), Buffer(pos(6)), NONE),
        use("b c s.1", x(4, 6, 2, 3), ints(6, 4, 2, 3), Buffer(pos(6)), SUM, 3),
    ],
    "aten.nll_loss_nd.default": [
        use("b c", x(12, 6), labels(6, 12), Buffer(pos(6))),
        use("b c s.0", x(4, 12, 2), labels(12, 4, 2), None, MEAN),
        use("b c s.1", x(4, 6, 2, 3), labels(6, 4, 2, 3), Buffer(pos(6)), NONE),
        use("c", x(6), ints(6)),
    ],
    "aten.poisson_nll_loss.default": [
        use("m.1 m.0", x(4, 6), pos(4, 6), True, False, 1e-8, MEAN),
        use("p.1 p.0", x(4, 6), pos(4, 6), True, True, 1e-8, NONE),
        use("p.1 p.0", pos(4, 6), pos(4, 6), False, False, 1e-8, SUM),
    ],
    "aten.smooth_l1_loss.default": [
        use("m.1 m.0", x(4, 6), x(4, 6)),
        use("p.1 p.0", x(4, 6), x(4, 6), NONE, 0.5),
        use("p.1 p.0", x(4, 6), x(4, 6), SUM, 2.0),
    ],
    "aten.soft_margin_loss.default": [
        use("m.1 m.0", x(4, 6), signs(4, 6)),
        use("p.1 p.0", x(4, 6), signs(4, 6), NONE),
        use("p.1 p.0", x(4, 6), signs(4, 6), SUM),
    ],
    "aten.triplet_margin_loss.default": [
        use("m.0", x(12, 4), x(12, 4), x(12, 4)),
        use("p.1 p.0", x(4, 6, 2), x(4, 6, 2), x(4, 6, 2), 1.0, 2.0, 1e-6, True, NONE),
        use("p.0", x(12, 4), x(12, 4), x(12, 4), 2.0, 1.0, 1e-6, False, SUM),
        use("", x(4), x(4), x(4)),
    ],
}

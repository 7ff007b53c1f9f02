"""Uses of the ops of autoshard/ops/embedding.py: see tests/test_rules.py."""

import torch
from torch.nn import Buffer

from uses.arguments import Use, ints, use, x

# Bags of 5, 0, 3, 2 and 2 indices; of 5, 0, 25 and 6, and where the last one ends, which must be the end of the list.
_STARTS, _ENDED = torch.tensor([0, 5, 5, 8, 10]), torch.tensor([0, 5, 5, 30, 36])

# fmt: off
USES: dict[str, list[Use]] = {
    "aten.embedding.default": [
        use("v h b.1 b.0 P", x(12, 6), ints(12, 4, 8)),
        use("v h b.1 b.0 P", x(12, 6), ints(12, 4, 6), 3),
        use("v h b.0 P", x(12, 6), ints(12, 4), 0),
        use("v h P", x(12, 6), ints(12)),
        use("h P", x(12, 6), ints(12, 24), -1, True),
        use("v h b.0 P", Buffer(x(12, 6)), ints(12, 4)),
    ],
    "embedding_bag": [
        use("v h b k P", x(12, 6), ints(12, 4, 6), None, None, mode="sum"),
        use("v h b k P", x(12, 6), ints(12, 4, 6), None, x(4, 6), mode="sum", padding_idx=3),
        use("v h b k P", x(12, 6), ints(12, 4, 6), None, None, mode="mean"),
        use("v h b k P", x(12, 6), ints(4, 4, 6), None, None, mode="mean", padding_idx=2),
        use("h b", x(12, 6), ints(12, 4, 6), None, None, mode="max", padding_idx=0),
        use("v h n P", x(12, 6), ints(12, 12), _STARTS, None, mode="sum", padding_idx=0),
        use("v h n P", x(12, 6), ints(12, 12), _STARTS, x(12), mode="sum"),
        use("v h n P", x(12, 6), ints(4, 12), _STARTS, None, mode="mean", padding_idx=1),
        use("v h n P", x(12, 6), ints(12, 36), _ENDED, None, mode="mean", include_last_offset=True),
        use("v h n P", Buffer(x(12, 6)), ints(12, 36), _ENDED, x(36), mode="sum", include_last_offset=True),
        use("h", x(12, 6), ints(12, 12), _STARTS, None, mode="max"),
        use("h P", x(12, 6), ints(12, 4, 6), None, x(4, 6), mode="sum", scale_grad_by_freq=True),
        use("h P", x(12, 6), ints(12, 12), _STARTS, None, mode="mean", scale_grad_by_freq=True),
    ],
}

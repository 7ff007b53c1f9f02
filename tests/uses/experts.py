"""Uses of the ops of autoshard/ops/experts.py: see tests/test_rules.py."""

import torch
import transformers.integrations.moe  # noqa: F401  (defines transformers::grouped_mm_fallback)

from uses.arguments import Use, ints, pos, use, x

# fmt: off
USES: dict[str, list[Use]] = {
    "aten._grouped_mm.default": [
        use("h e P", x(12, 16).bfloat16(), x(6, 16, 8).bfloat16(), torch.tensor([2, 2, 5, 9, 9, 12], dtype=torch.int32)),
    ],
    "experts": [
        use("t e f o t&e P", x(12, 4), ints(12, 12, 2), pos(12, 2), x(12, 12, 4), x(12, 6, 6)),
        use("t e f o t&e P", x(12, 4), ints(2, 12, 2) * 7, pos(12, 2), x(12, 8, 4), x(12, 4, 4), activation="gelu_tanh"),
        use("t f o P", x(12, 4), ints(5, 12, 3), pos(12, 3), x(5, 12, 4), x(5, 6, 6), activation="relu"),
        use("e f o P", x(5, 4), ints(12, 5, 2), pos(5, 2), x(12, 12, 4), x(12, 6, 6), activation="gelu"),
    ],
    "transformers.grouped_mm_fallback.default": [
        use("h e f P", x(12, 6), x(6, 6, 12), torch.tensor([2, 2, 5, 9, 9, 12], dtype=torch.int32)),
        use("h e f P", x(12, 6), x(12, 6, 12), torch.tensor([0] * 6 + [12] * 6)),
    ],
}

"""An op of one's own: without a rule every process computes all of it; one line makes it splittable, and is proved by execution.

    python examples/custom_op.py

No processes are needed: the rule is checked on pieces of small tensors, and the plan is run for all ranks in this process.
"""

import torch
from torch import Tensor, nn

import autoshard
from autoshard.testing import UnsoundRuleError, check_rule

MESH = "dp=2,tp=2"


@torch.library.custom_op("examples::capped", mutates_args=())
def capped(x: Tensor, cap: Tensor) -> Tensor:
    """`x` with each feature squeezed between -cap and cap. x: [..., features]; cap: [features]."""
    return cap * torch.tanh(x / cap)


@capped.register_fake
def _(x: Tensor, cap: Tensor) -> Tensor:
    return torch.empty_like(x)


def keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def differentiate(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, cap = ctx.saved_tensors
    squeezed = torch.tanh(x / cap)
    slope = 1 - squeezed**2
    of_cap = grad * (squeezed - slope * x / cap)
    return grad * slope, of_cap.flatten(0, -2).sum(0)


capped.register_autograd(differentiate, setup_context=keep)


class Net(nn.Module):
    def __init__(self, width: int = 512) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.cap = nn.Parameter(torch.full((4 * width,), 3.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(capped(self.up(x), self.cap))


def report(title: str, plan: autoshard.Plan) -> None:
    line = next(line.strip() for line in plan.source().splitlines() if "examples.capped" in line)
    print(f"{title}: predicted {plan.stats['predicted_s'] * 1e6:.0f} us a step")
    print(f"    {' '.join(line.split())}")
    for note in plan.notes:
        print(f"    note: {note}")


def main() -> None:
    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(512, 512, dtype=torch.float64)
    report("without a rule", autoshard.plan(model, MESH, (x,), hardware="h100"))

    small, cap = torch.randn(2, 4, 6, dtype=torch.float64), torch.rand(6, dtype=torch.float64) + 1
    autoshard.register_rule("examples::capped", "+b* c, +c -> b* c")  # `+`: linear in both, so terms of a sum may go in
    try:
        check_rule("examples::capped", small, cap)
        raise SystemExit("a wrong rule was not refuted: this is a defect, please report it")
    except UnsoundRuleError as error:
        print("a wrong rule is refuted:", str(error).splitlines()[1].strip())

    autoshard.register_rule("examples::capped", "b* c, c -> b* c")  # every dim may be split, and that is all
    proved = check_rule("examples::capped", small, cap)
    print(f"the right one: {len(proved)} ways to run it on an axis of two, values and gradients equal in all")

    plan = autoshard.plan(model, MESH, (x,), hardware="h100")
    report("with the rule", plan)
    checked = autoshard.verify(model, plan, (x,))
    print("against the model on one device:", checked)
    if not checked.is_equal:
        raise SystemExit("the plan computes something else: this is a defect, please report it")


if __name__ == "__main__":
    main()

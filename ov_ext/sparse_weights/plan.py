"""Which form does each weight get? Time decides, and the size of the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ov_ext.sparse_weights.cost import MARGIN, OURS, CostTable, Form, break_even, bytes_per_weight, fastest
from ov_ext.sparse_weights.policy import SparsePolicy
from ov_ext.sparse_weights.survey import Candidate
from ov_ext.sparse_weights.workload import Expected


@dataclass(frozen=True)
class Decision:
    """The form that a weight gets.

    :param form: ``"stock"``: it stays as it is; ``"dense"``, ``"sparse"``: our operation without or with a bitmap.
    :param times: Expected times of one MatMul in each form; empty where nothing is known.
    :param speedup: Expected time of stock / time of our form, or of our best one where it stays stock; None where
        nothing is known.
    :param reason: Why it stays stock; "" when it does not.
    """

    form: Form
    times: dict[Form, Expected]
    speedup: float | None
    reason: str = ""


def decide(
    candidates: Mapping[str, Candidate], policy: SparsePolicy, table: CostTable, model_bytes: int
) -> dict[str, Decision]:
    """Choose a form for each weight.

    :param candidates: The weights.
    :param policy: Its target names an instruction set.
    :param table: Costs on the target.
    :param model_bytes: Bytes of all constants of the stock model.
    """
    hints: dict[tuple[str, int], str] = {}
    decisions = {name: _fastest(each, policy, table, hints) for name, each in candidates.items()}
    _limit_growth(decisions, candidates, policy, policy.max_growth * model_bytes)
    return decisions


def _fastest(weight: Candidate, policy: SparsePolicy, table: CostTable, hints: dict[tuple[str, int], str]) -> Decision:
    times = table.expected(weight.kind, weight.zeros, weight.group, weight.weights, policy.workload)
    if policy.min_sparsity is not None:
        if weight.zeros < policy.min_sparsity:
            return Decision("stock", times, None, f"too few zeros: {policy.min_sparsity:.0%} are needed")
        size = {form: bytes_per_weight(form, weight.kind, weight.zeros, weight.group) for form in OURS}
        form = min(OURS, key=lambda form: size[form])
        return Decision(form, times, fastest(times, policy.workload, [form])[1] if times else None)
    if not times:
        known = (
            f"nothing is known about {weight.kind} weights and this workload"
            if table.kinds
            else "there are no fast kernels"
        )
        return Decision("stock", times, None, f"{known} on {policy.target}")
    form, ratio = fastest(times, policy.workload)
    if ratio >= MARGIN:
        return Decision(form, times, ratio)
    key = weight.kind, weight.group
    if key not in hints:
        needed = break_even(table, *key, policy.workload)
        hints[key] = "no share of zeros helps" if needed is None else f"from {needed:.0%} zeros on ours is faster"
    reason = f"{weight.zeros:.0%} zeros would give {ratio:.2f}x stock, {hints[key]} on {policy.target}"
    return Decision("stock", times, ratio, reason)


def _limit_growth(
    decisions: dict[str, Decision], candidates: Mapping[str, Candidate], policy: SparsePolicy, limit: float
) -> None:
    """Take back what makes the model too large: first where a saved byte costs the least time."""
    growth = sum(candidates[name].growth(decision.form) for name, decision in decisions.items())
    steps: list[tuple[float, int, str, Form]] = []
    for name, decision in decisions.items() if growth > limit else ():
        weight, now = candidates[name], decision.form
        for form in ("stock", *OURS):
            saved = weight.growth(now) - weight.growth(form)
            if saved > 0 and (form == "stock" or _worthwhile(decision, policy, form)):
                steps.append((_loss(decision, policy, form) * weight.uses / saved, len(steps), name, form))
    for _, _, name, form in sorted(steps):
        if growth <= limit:
            return
        saved = candidates[name].growth(decisions[name].form) - candidates[name].growth(form)
        if saved > 0:
            growth -= saved
            decisions[name] = _smaller(decisions[name], candidates[name], policy, form)


def _worthwhile(decision: Decision, policy: SparsePolicy, form: Form) -> bool:
    if policy.min_sparsity is not None:
        return True
    return bool(decision.times) and fastest(decision.times, policy.workload, [form])[1] >= MARGIN


def _loss(decision: Decision, policy: SparsePolicy, form: Form) -> float:
    """:return: Seconds of work that another form costs; 0 where nothing is known."""
    if not decision.times:
        return 0.0
    return policy.workload.seconds(decision.times[form]) - policy.workload.seconds(decision.times[decision.form])


def _smaller(decision: Decision, weight: Candidate, policy: SparsePolicy, form: Form) -> Decision:
    if form != "stock":
        speedup = fastest(decision.times, policy.workload, [form])[1] if decision.times else None
        return replace(decision, form=form, speedup=speedup)
    cause = (
        f"{weight.reader} reads it too: packed, it would be stored twice" if weight.reader else "packed, it is larger"
    )
    cure = f"the model may grow by {policy.max_growth:.0%} (SparsePolicy(max_growth=...))"
    return replace(decision, form="stock", reason=f"{cause}, and {cure}")

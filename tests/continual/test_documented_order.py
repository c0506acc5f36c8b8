"""The worked numbers of docs/data_order.md are those of the code."""

import re
from decimal import Decimal

from megatron_mer.continual.plan import Plan
from megatron_mer.continual.spec import DatasetSpec, EntrySpec, PlanSpec, ReplaySpec

EN = EntrySpec("en", (DatasetSpec("web", 9, 3.0), DatasetSpec("wiki", 5, 1.0)), steps=3)
FR = EntrySpec("fr", (DatasetSpec("fr", 20),), steps=4)
MIXED = EntrySpec("fr", (DatasetSpec("fr", 20, 1.0), DatasetSpec("news", 8, 1.0)), steps=4)


def lines(plan: Plan, first: int) -> list[str]:
    found = []
    for batch in range(first, plan.total_batches):
        rows = plan.rows(batch)
        places = zip(rows.kind, rows.dataset, rows.sample, strict=True)
        words = [f"{'fR'[kind]}:{plan.datasets[data]}#{sample}" for kind, data, sample in places]
        found.append(" ".join([str(batch), plan.entry_of(batch).task, *words]))
    return found


def test_worked_numbers(project_root) -> None:
    text = (project_root / "docs" / "data_order.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```\nbatch  task  rows\n(.*?)```", text, flags=re.DOTALL)
    documented = [[" ".join(line.split()) for line in block.splitlines()] for block in blocks]
    plan = Plan(PlanSpec(1, 4, 2048, ReplaySpec(Decimal("0.25")), (EN, FR)))
    spec = PlanSpec(1, 4, 2048, ReplaySpec(Decimal("0.5")), (EN, MIXED))
    changed = Plan.continued(plan.history(), spec, 5)
    assert documented == [lines(plan, 0), lines(changed, 3)]

"""What a model can do and what a run costs: evaluation, reports, Table 1, the planner."""

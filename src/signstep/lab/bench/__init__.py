"""What a step costs in computation, communication and memory, beside others' steps.

A benchmark is a file with its options and their `run`: step, comm, train, monitor. Files whose names begin like it hold
how it measures and what it reports. `lab.cli.bench` has a line for each benchmark. All share spread, targets, report,
bars and workloads. What `signstep plan` predicts is in `signstep.distributed.plan`; plan_report has its tables.
"""

"""Studies, which ask questions of our own, and what is shown of a monitor's records.

Each study is a dataclass of options with a `run`, registered by one line in `signstep.lab.cli.study`.

byzantine.py     accuracy against the share of Byzantine workers; byzantine_training.py, byzantine_report.py
vote_curve.py    the expected vote against m / sigma
monitored.py     the monitor through trainings of the paper's methods
inspect_run.py   `signstep inspect`: a run's checkpoint or records
monitor_numbers.py, monitor_figures.py, monitor_page.py   a monitor's records in words, drawn, and on a page

The paper's own table and figures are in lab.paper; what is stated and verified is in lab.verify.
"""

"""The paper's Table I and Figures 1 to 3: presets, sweep of learning rates, plan of runs, training, and report.

How one run trains is not here but in `signstep.lab.training`.
"""

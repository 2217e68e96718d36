"""`signstep verify`: what the paper and our pages state, statement by statement, each measured.

A file of statements registers them when it is imported; verification.py imports all of them. Within a group,
statements run in the order of their files' names, and in a file from top to bottom.

gauss.py               the chance of a wrong sign, eq. (5) to (7)
theorem_bounds.py      Theorem 1, eq. (1) to (4) and (8), and the floor of (3)
theorem_steps.py       around Theorem 1: constant and best steps, dither, real noise
dithered_sign.py       Sec. IV, eq. (9) and (10): the law of a dithered step, on the real optimizer
dithered_training.py   Sec. IV in a training: dither beside the momentum
projection_rate.py     Sec. V, eq. (11) and (12): what the calibrated rate measures, on the real optimizer
projection_switch.py   Sec. V: averages of the rate, and the switch
projection_length.py   the rules beside it: SWATS, and the step that keeps its length
majority.py            the majority vote, through the real ballots
estimators.py          what a live run can know, signstep.theory.stationarity

registry.py            a statement, its verdict, and the list of all
measures.py, chains.py what several files of statements measure with
verification.py        the command; verification_report.py and drawings.py are what it shows and writes

Studies, which ask questions of our own, are not here, and no statement imports one.
"""

"""`signstep verify`: what the paper and our pages state, statement by statement, each measured.

registry.py    checks, their names and verdicts
gauss.py       the chance of a wrong sign, eq. (5)-(7)
theorem.py     Theorem 1, eq. (1)-(4) and (8)
dither.py      Sec. IV, eq. (9)-(10), on the real optimizer
projection.py  Sec. V, eq. (11)-(12), on the real optimizer
vote.py        the majority vote, through the real ballots
estimators.py  what a live run can know, signstep.theory.stationarity
command.py     the command; report.py, drawings.py what it shows and writes
"""

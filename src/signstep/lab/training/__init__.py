"""One training run: its configuration, optimizer, network, batches, loop, workers, checkpoint and record.

Images come from `signstep.lab.data`; which runs to make is decided in `signstep.lab.paper` and `signstep.lab.studies`.
"""

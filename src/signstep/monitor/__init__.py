"""What a live training run says of the assumptions behind sign steps.

- `monitor`: `Monitor`, which measures at its own steps and writes a record
- `sampling`, `untouched`: how it gets the gradients of micro-batches without a change to the run
- `reliability`, `symmetry`: what these gradients say of signs and of noise
- `dither_meter`, `calibration_panel`: what the step says of dither and of a switch to SGD; `last_step` reads the
  optimizer for them, `totals` has their sums
- `sinks`: where records go
- `lightning`, `huggingface`: callbacks for these trainers; `callbacks` has what they share

The estimators themselves are in `signstep.theory.stationarity`. How records become pages is in the lab.
"""

from signstep.monitor.monitor import Monitor

__all__ = ["Monitor"]

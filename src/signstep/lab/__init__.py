"""The experiments: data, models, training, sweeps and reports; needs the extra `signstep[lab]`."""

"""Compositions of the rest: fine-tuning, black-box tuning, blocks kept on the host, scipy's call, an Optuna sampler."""

"""Compositions of the rest: fine-tuning, black-box tuning, blocks kept on the host."""

"""Sub-commands of ``grass`` that put an experiment, the gradient store and influence functions together."""

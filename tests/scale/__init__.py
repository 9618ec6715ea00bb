"""A network of 40 real nodes on one machine, measured by hand: ``make scale``."""

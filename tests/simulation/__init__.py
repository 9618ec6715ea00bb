"""A discrete-event model of the network: the real peer book, interval policy, selection and health, on modelled time.

``python -m tests.simulation`` runs it; ``docs/simulation.md`` says what is real in it and what is modelled.
"""

"""Further stories. Each is a flat script with its own knobs: python -m experiments.NAME.

Nothing imports an experiment.
"""

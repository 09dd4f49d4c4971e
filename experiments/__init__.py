"""Further stories, a flat script each, with knobs of its own: python -m experiments.NAME.

Nothing imports an experiment.
"""

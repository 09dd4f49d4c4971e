"""Four lessons of half an hour each: see docs/teaching.md.

A master is a plain script (python workshop/1_unlearning.py). python -m workshop.build makes two
notebooks of it, one with exercises and one with solutions.
"""

"""Four lessons of half an hour each. The masters are plain scripts (python workshop/1_unlearning.py);
python -m workshop.build makes a notebook with exercises and one with solutions of each. See
docs/teaching.md."""

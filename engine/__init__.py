"""What runs every script. Nothing in this folder knows of tasks, models or techniques."""

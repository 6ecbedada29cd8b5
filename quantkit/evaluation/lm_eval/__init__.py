"""lm-eval's tasks on any model that quantkit reads. ``run`` asks them; ``python -m`` is lm-eval's own command."""

"""Whole experiments, each one command: `python -m lorasmith.recipes.pixels`.

They use what any user can import, and nothing imports them.

May import: analysis, bases, formats, inject, lora, train, drawing, errors.
"""

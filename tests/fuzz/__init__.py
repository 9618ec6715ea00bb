"""Fuzzing by hand: ``make fuzz``. What it found, and what it starts from, is run by ``make test`` too."""

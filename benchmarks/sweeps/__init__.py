"""Workers of the sweep benchmark."""

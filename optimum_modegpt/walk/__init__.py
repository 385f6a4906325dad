"""What surrounds the walk of `compress`: its state, what is refused, what is kept for later, what is recorded."""

"""What is allowed and what follows: pure functions over the model. No clock, no loop, no ids made here."""

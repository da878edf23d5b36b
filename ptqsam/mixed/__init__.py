"""Mixed precision: which bits where, under a budget, and a recipe that says so."""

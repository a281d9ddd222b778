"""Tables of bad inputs; ../bad_inputs.py runs them."""

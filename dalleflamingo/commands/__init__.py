"""The commands `reconstruct` and `cycle`, and the parser of every command."""

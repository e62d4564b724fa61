"""The commands that run models, `reconstruct` and `cycle`, and the parsers that all commands share."""

"""A user's own files as data sets: folders of images, and captions in a text, JSON or CSV file."""

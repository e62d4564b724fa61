"""Do DALL-E and Flamingo understand each other? The helper package of the course."""

__version__ = "0.1.0"

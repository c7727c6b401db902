"""Version of the package."""

__version__ = "0.1.0"
VERSION_LINE = f"dist_trainer {__version__}"
"""What --version prints."""

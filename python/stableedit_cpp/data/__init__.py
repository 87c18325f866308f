"""Small data files that come with the package."""

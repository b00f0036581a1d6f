"""The model that comes with the package, and the form of the documents on which it learned to recall."""

"""One folder is one method."""

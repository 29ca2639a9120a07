"""Plain torch modules, each readable from top to bottom."""

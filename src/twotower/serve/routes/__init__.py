"""Routes of a service, a module for each group, and their common parts."""

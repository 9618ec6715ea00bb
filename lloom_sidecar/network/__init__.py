"""The control plane: one trio service a file."""

"""The two commands: lloom-sidecar and lloomctl."""

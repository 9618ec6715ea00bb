"""A real container engine for the system tests."""

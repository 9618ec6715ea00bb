"""The wire: sans-IO, no trio, no clock, no randomness, no logging. PROTOCOL.md beside this file is normative."""

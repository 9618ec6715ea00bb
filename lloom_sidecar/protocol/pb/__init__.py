"""Generated protobuf code of lloom.proto; `make proto` writes it, nobody edits it."""

"""One suite for every daemon: the fake, Lloom's p2pd, the unmodified upstream one, and any other."""

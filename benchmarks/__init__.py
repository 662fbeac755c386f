"""How fast the library is: beside two plain implementations of the same mathematics, and the machine's own limit."""

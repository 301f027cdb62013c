"""Instruction sets of CPUs: table lookup, byte dot product, registers, one a file."""

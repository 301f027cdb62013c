"""CPU kernels in TensorIR for the packed layout ``tile16x32``.

One kernel text per activation type; an instruction set (``isa.py`` and its neighbours) supplies
the table lookup and the byte dot product, a number format only its tables and scales.
"""

"""Refuse to be imported where a file of the user's stands for one of the compiler's packages.

Whoever imports one of them imports this module first: a ``tuning.py`` that the user's script has
imported already is for :func:`amx_tvm.shadowing.check` to find.
"""

from amx_tvm.shadowing import check

check("relax_passes", "tuning", "tvm", "numpy")

"""Everything that runs on Ray; the only package that imports it.

Modules that Ray Data's own processes load (`stream`, `pool`) do not import torch: it would cost each
of those processes half a gigabyte and several seconds.
"""
